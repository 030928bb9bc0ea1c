//! `nbdsnap snapshot`: snapshots of the volumes of a running server.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueHint};

use super::Failure;
use super::freeze::Frozen;
use super::merge::{self, CancelArgs, MergeArgs};
use super::orders::{
    ToServer, absolute, beside_the_point, parse_growth, parse_limit, parse_name, parse_on_full,
    parse_snapshot, print, print_json, rough_size, rough_span, table,
};
use super::size;
use crate::control::protocol::{
    Answer, Growth, Kind, Order, Selection, SnapshotCreate, SnapshotExtend, SnapshotName,
    SnapshotRemove, SnapshotRename, SnapshotReport, SnapshotReset, SnapshotState, StoreLimit,
    WhenFull,
};
use crate::names;

/// Take, look after and end snapshots of a running server's disks.
///
/// The server is one that runs with --control. Its clients stay attached and
/// notice no more than a pause of milliseconds.
#[derive(Debug, Args)]
pub(super) struct SnapshotArgs {
    #[command(subcommand)]
    verb: SnapshotVerb,
    #[command(flatten)]
    server: ToServer,
}

#[derive(Debug, Subcommand)]
enum SnapshotVerb {
    Create(CreateArgs),
    List(SelectArgs),
    Status(SelectArgs),
    Remove(RemoveArgs),
    Rename(RenameArgs),
    Reset(ResetArgs),
    Extend(ExtendArgs),
    Merge(MergeArgs),
    Cancel(CancelArgs),
}

/// Take snapshots now; several are one instant.
///
/// All the disks that are named are held, all snapshots are taken, all are
/// released: what one client wrote after another had written to the other disk is
/// never without it. If one snapshot cannot be taken, none is.
#[derive(Debug, Args)]
struct CreateArgs {
    /// The snapshots; VOLUME@NAME@NEXT is one of the snapshot VOLUME@NAME, and so on.
    #[arg(value_name = "VOLUME@NAME", required = true, value_parser = parse_snapshot)]
    snapshots: Vec<SnapshotName>,

    /// The COW store, a file or a block device; without it, a file DISK.NAME.cow
    /// beside the disk. For one snapshot only.
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    cow: Option<PathBuf>,

    /// How far the file may grow: 10G, or 20%ORIGIN. Without it, what the disk can
    /// ever need.
    #[arg(long, value_name = "SIZE|N%ORIGIN", value_parser = parse_limit)]
    size: Option<StoreLimit>,

    /// The unit of copying: a power of two from 1s to 1G, 16K unless said.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    chunk: Option<u64>,

    /// When the store is full, refuse writes to the snapshot and keep it.
    #[arg(long, conflicts_with = "transient")]
    overflow: bool,

    /// Keep the list of exceptions in memory: the snapshot ends with the server.
    #[arg(long)]
    transient: bool,

    /// Refuse writes to the snapshot.
    #[arg(long)]
    read_only: bool,

    /// What a write means that finds the store full: 'invalidate', 'pause' or
    /// 'error'; as the server was started unless said.
    #[arg(long, value_name = "WHAT", value_parser = parse_on_full)]
    on_full: Option<WhenFull>,

    /// Let the store grow by itself: 80%+20% is by 20 % when 80 % are used, up to
    /// what the disk can ever need; as the server was started unless said.
    #[arg(long, value_name = "N%+M%", value_parser = parse_growth)]
    auto_extend: Option<Growth>,

    /// Run a command before the disks are held, by the shell: freeze a file system,
    /// quiesce a database. If it fails, no snapshot is taken.
    #[arg(long, value_name = "CMD", requires = "thaw")]
    freeze: Option<String>,

    /// Run a command when the snapshots have been taken. It runs whatever happens
    /// once --freeze was begun, even if this program is killed.
    #[arg(long, value_name = "CMD")]
    thaw: Option<String>,

    /// Kill the command of --freeze if it takes longer, and take no snapshot.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    freeze_timeout: u64,
}

/// Say which snapshots there are, or how they are doing. Those of a snapshot stand
/// below it.
#[derive(Debug, Args)]
struct SelectArgs {
    /// A volume, for all its snapshots, or a snapshot; without any, all.
    #[arg(value_name = "VOLUME[@NAME]")]
    names: Vec<String>,
}

/// End snapshots. Their clients are told and dropped; the disk goes on. One that
/// others were taken of can only be removed together with these.
#[derive(Debug, Args)]
struct RemoveArgs {
    /// The snapshots.
    #[arg(value_name = "VOLUME@NAME", required = true, value_parser = parse_snapshot)]
    snapshots: Vec<SnapshotName>,

    /// Delete the files of their stores too. Without it they stay, of no use: the
    /// disk has been written since, so never serve them with it again.
    #[arg(long)]
    delete_cow: bool,
}

/// Let a snapshot's store grow further; writes that wait for room go on.
#[derive(Debug, Args)]
struct ExtendArgs {
    /// The snapshot.
    #[arg(value_name = "VOLUME@NAME", value_parser = parse_snapshot)]
    snapshot: SnapshotName,
    /// How far the file may grow from now on: 10G, or 20%ORIGIN. Without it, as far
    /// as the block device is large by now.
    #[arg(long, value_name = "SIZE|N%ORIGIN", value_parser = parse_limit)]
    size: Option<StoreLimit>,
}

/// Give a snapshot another name. Its clients stay attached. The names of those that
/// were taken of it change with it.
#[derive(Debug, Args)]
struct RenameArgs {
    /// The snapshot.
    #[arg(value_name = "VOLUME@NAME", value_parser = parse_snapshot)]
    snapshot: SnapshotName,
    /// What it is called from now on: the part behind the last '@'.
    #[arg(value_name = "NEWNAME", value_parser = parse_name)]
    name: String,
}

/// Take a snapshot anew: the same name, store and settings, and the disk as it is
/// now. What the snapshot showed is gone. One that is lost is good again.
#[derive(Debug, Args)]
struct ResetArgs {
    /// The snapshot.
    #[arg(value_name = "VOLUME@NAME", value_parser = parse_snapshot)]
    snapshot: SnapshotName,
    /// Even while clients are attached to it: they are dropped.
    #[arg(long)]
    force: bool,
}

/// The verb.
pub(super) fn run(args: SnapshotArgs) -> Result<(), Failure> {
    let SnapshotArgs { verb, server } = args;
    match verb {
        SnapshotVerb::Create(args) => {
            // Nothing is frozen for a server that is not there. It does not wait for
            // as long as a freeze may take: the order has a connection of its own.
            drop(server.connect()?);
            let patience = Duration::from_secs(args.freeze_timeout);
            let frozen = Frozen::new(args.freeze.as_deref(), args.thaw.as_deref(), patience)?;
            let taken = create(args).and_then(|order| ask(&server, order));
            let thawed = frozen.thaw();
            let reports = taken?;
            thawed?;
            show(&server, &reports, |one| {
                format!("{}: taken, its store is {}\n", one.name, one.cow.display())
            })
        }
        SnapshotVerb::List(args) => {
            let reports = ask(&server, list(args))?;
            if server.json {
                return print_json(&reports);
            }
            print(&list_table(&reports))
        }
        SnapshotVerb::Status(args) => {
            let reports = ask(&server, list(args))?;
            if server.json {
                return print_json(&reports);
            }
            print(&status_table(&reports))
        }
        SnapshotVerb::Rename(RenameArgs { snapshot, name }) => {
            let old = snapshot.to_string();
            let order = Order::SnapshotRename(SnapshotRename { snapshot, name });
            let reports = ask(&server, order)?;
            show(&server, &reports, |one| {
                format!("{old}: is {} from now on\n", one.name)
            })
        }
        SnapshotVerb::Extend(ExtendArgs { snapshot, size }) => {
            let order = Order::SnapshotExtend(SnapshotExtend { snapshot, size });
            let reports = ask(&server, order)?;
            show(&server, &reports, |one| {
                let limit = rough_size(one.limit_bytes);
                format!("{}: its store may grow to {limit}\n", one.name)
            })
        }
        SnapshotVerb::Reset(ResetArgs { snapshot, force }) => {
            let order = Order::SnapshotReset(SnapshotReset { snapshot, force });
            let reports = ask(&server, order)?;
            show(&server, &reports, |one| {
                format!("{}: taken anew\n", one.name)
            })
        }
        SnapshotVerb::Merge(args) => merge::run(&server, args),
        SnapshotVerb::Cancel(args) => merge::cancel(&server, args),
        SnapshotVerb::Remove(args) => {
            let deleted = args.delete_cow;
            let order = Order::SnapshotRemove(SnapshotRemove {
                snapshots: args.snapshots,
                delete_cow: args.delete_cow,
            });
            let reports = ask(&server, order)?;
            show(&server, &reports, |one| {
                let store = one.cow.display();
                if deleted {
                    format!("{}: removed, with its store {store}\n", one.name)
                } else {
                    format!(
                        "{}: removed; its store {store} is of no more use\n",
                        one.name
                    )
                }
            })
        }
    }
}

fn create(args: CreateArgs) -> Result<Order, Failure> {
    let cow = args.cow.as_deref().map(absolute).transpose()?;
    let kind = match (args.transient, args.overflow) {
        (true, _) => Kind::Transient,
        (false, true) => Kind::Overflow,
        (false, false) => Kind::Persistent,
    };
    Ok(Order::SnapshotCreate(SnapshotCreate {
        snapshots: args.snapshots,
        cow,
        size: args.size,
        chunk_bytes: args.chunk,
        kind,
        read_only: args.read_only,
        on_full: args.on_full,
        auto_extend: args.auto_extend,
    }))
}

fn list(args: SelectArgs) -> Order {
    Order::SnapshotList(Selection { names: args.names })
}

fn ask(server: &ToServer, order: Order) -> Result<Vec<SnapshotReport>, Failure> {
    match server.order(order)? {
        Answer::Snapshots(reports) => Ok(reports),
        _ => Err(beside_the_point()),
    }
}

/// JSON, or a line for each.
fn show(
    server: &ToServer,
    reports: &[SnapshotReport],
    line: impl Fn(&SnapshotReport) -> String,
) -> Result<(), Failure> {
    if server.json {
        return print_json(&reports);
    }
    print(&reports.iter().map(line).collect::<String>())
}

fn list_table(reports: &[SnapshotReport]) -> String {
    let rows: Vec<Vec<String>> = reports
        .iter()
        .map(|one| {
            let taken = one.taken_at.map_or("-".into(), super::when::show);
            vec![
                indented(one),
                state(one).into(),
                taken,
                rough_size(Some(one.bytes)),
                one.cow.display().to_string(),
            ]
        })
        .collect();
    table(&["SNAPSHOT", "STATE", "TAKEN", "SIZE", "STORE"], &rows)
}

/// Its name, behind that of what it was taken of.
fn indented(report: &SnapshotReport) -> String {
    let depth = names::depth(&report.snapshot);
    format!("{}{}", "  ".repeat(depth), report.name)
}

fn status_table(reports: &[SnapshotReport]) -> String {
    let rows: Vec<Vec<String>> = reports
        .iter()
        .map(|one| {
            let rate = one.fill_bytes_per_second;
            let rate = rate.map_or("-".into(), |rate| format!("{}/s", rough_size(Some(rate))));
            vec![
                indented(one),
                state(one).into(),
                rough_size(one.data_bytes),
                rough_size(one.metadata_bytes),
                rough_size(one.free_bytes),
                rate,
                rough_span(one.full_in_seconds),
                one.clients.to_string(),
                one.status.clone(),
            ]
        })
        .collect();
    let head = [
        "SNAPSHOT",
        "STATE",
        "DATA",
        "METADATA",
        "FREE",
        "FILLS BY",
        "FULL IN",
        "CLIENTS",
        "DMSETUP STATUS",
    ];
    table(&head, &rows)
}

fn state(report: &SnapshotReport) -> &'static str {
    match report.state {
        SnapshotState::Active => "active",
        SnapshotState::Overflow => "overflow",
        SnapshotState::Invalid => "invalid",
        SnapshotState::MergeWaiting => "merge waiting",
        SnapshotState::Merging => "merging",
        SnapshotState::MergeFailed => "merge failed",
    }
}

fn parse_size(text: &str) -> Result<u64, size::SizeError> {
    size::parse(text)
}
