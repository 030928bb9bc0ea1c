//! `nbdsnap snapshot merge` and `cancel`.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use clap::Args;

use super::Failure;
use super::orders::{ToServer, beside_the_point, parse_snapshot, print, print_json};
use crate::control::client::ControlClient;
use crate::control::protocol::{
    Answer, MergeClients, Order, Selection, SnapshotCancel, SnapshotMerge, SnapshotName,
    SnapshotReport, SnapshotState,
};

/// How often the server is asked how far it is.
const LOOK: Duration = Duration::from_millis(200);
/// Characters of the bar.
const BAR: u64 = 40;

/// Roll a disk back to a snapshot; or a snapshot to one that was taken of it.
///
/// What is said of the disk holds for what the snapshot was taken of. From the first instant the disk reads as the snapshot; the chunks are copied
/// behind it, under the disk's clients. What was written to the disk since the
/// snapshot was taken is gone, and the snapshot ends; other snapshots stay as they
/// are. A merge goes on after a crash, and cannot be undone.
#[derive(Debug, Args)]
pub(super) struct MergeArgs {
    /// The snapshot.
    #[arg(value_name = "VOLUME@NAME", value_parser = parse_snapshot)]
    snapshot: SnapshotName,
    /// Begin even while clients are attached to the disk, which changes before
    /// their eyes.
    #[arg(long, conflicts_with = "when_idle")]
    force: bool,
    /// Wait until no client is attached to the disk any more.
    #[arg(long)]
    when_idle: bool,
    /// Do not wait for the end.
    #[arg(long)]
    background: bool,
    /// Delete the file of the store at the end.
    #[arg(long)]
    delete_cow: bool,
}

/// Call off a merge that waits for clients to go.
#[derive(Debug, Args)]
pub(super) struct CancelArgs {
    /// The snapshot.
    #[arg(value_name = "VOLUME@NAME", value_parser = parse_snapshot)]
    snapshot: SnapshotName,
}

/// The verb 'merge'.
pub(super) fn run(server: &ToServer, args: MergeArgs) -> Result<(), Failure> {
    let name = args.snapshot;
    let mut client = server.connect()?;
    let order = Order::SnapshotMerge(SnapshotMerge {
        snapshot: name.clone(),
        clients: match (args.force, args.when_idle) {
            (true, _) => MergeClients::Force,
            (false, true) => MergeClients::Wait,
            (false, false) => MergeClients::Refuse,
        },
        delete_cow: args.delete_cow,
    });
    let mut reports = ask(&mut client, order)?;
    if !args.background {
        reports = follow(&mut client, &name, reports)?;
    }
    if server.json {
        return print_json(&reports);
    }
    print(&match reports.first().map(|one| one.state) {
        None => format!("{name}: merged\n"),
        Some(SnapshotState::MergeWaiting) => {
            format!("{name}: will be merged when no client is attached to the disk\n")
        }
        Some(_) => format!("{name}: is being merged; the disk reads as the snapshot\n"),
    })
}

/// The verb 'cancel'.
pub(super) fn cancel(server: &ToServer, args: CancelArgs) -> Result<(), Failure> {
    let name = args.snapshot;
    let order = Order::SnapshotCancel(SnapshotCancel {
        snapshot: name.clone(),
    });
    let reports = ask(&mut server.connect()?, order)?;
    if server.json {
        return print_json(&reports);
    }
    print(&format!("{name}: its merge is called off\n"))
}

fn ask(client: &mut ControlClient, order: Order) -> Result<Vec<SnapshotReport>, Failure> {
    match client.order(order).map_err(Failure::refused)? {
        Answer::Snapshots(reports) => Ok(reports),
        _ => Err(beside_the_point()),
    }
}

/// Watch the merge to its end: no report is left then.
fn follow(
    client: &mut ControlClient,
    name: &SnapshotName,
    mut reports: Vec<SnapshotReport>,
) -> Result<Vec<SnapshotReport>, Failure> {
    let bar = Bar::new();
    while let Some(report) = reports.first() {
        match report.state {
            SnapshotState::MergeFailed => {
                bar.clear();
                return Err(Failure::Refused(format!(
                    "{name}: the merge has stopped on an error, and the disk goes on reading as \
                     the snapshot: see the server's log, then order the merge again"
                )));
            }
            SnapshotState::Merging | SnapshotState::MergeWaiting => {}
            SnapshotState::Active | SnapshotState::Overflow | SnapshotState::Invalid => {
                bar.clear();
                return Err(Failure::Refused(format!(
                    "{name}: is not being merged any more"
                )));
            }
        }
        bar.show(report);
        std::thread::sleep(LOOK);
        let names = vec![name.volume.clone()];
        reports = ask(client, Order::SnapshotList(Selection { names }))?;
        reports.retain(|one| one.snapshot == name.snapshot);
    }
    bar.clear();
    Ok(reports)
}

/// A line that is written over, where somebody looks at it.
struct Bar {
    visible: bool,
}

impl Bar {
    fn new() -> Self {
        Self {
            visible: std::io::stderr().is_terminal(),
        }
    }

    fn show(&self, report: &SnapshotReport) {
        let text = match report.merge {
            None => "waiting until no client is attached to the disk".to_owned(),
            Some(merge) => {
                let total = merge.total_chunks.max(1);
                let done = total.saturating_sub(merge.left_chunks);
                let full = (done * BAR / total) as usize;
                format!(
                    "[{}{}] {} %",
                    "#".repeat(full),
                    ".".repeat(BAR as usize - full),
                    done * 100 / total
                )
            }
        };
        self.write(&text);
    }

    fn clear(&self) {
        self.write("");
    }

    fn write(&self, text: &str) {
        if self.visible {
            // Nobody minds if it cannot be seen.
            let _ = write!(std::io::stderr(), "\r\x1b[K{text}");
        }
    }
}
