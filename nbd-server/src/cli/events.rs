//! `nbdsnap events`.

use clap::Args;

use super::Failure;
use super::orders::{ToServer, beside_the_point, print};
use crate::control::protocol::{Answer, EventReport, EventsWanted, Order};

/// Tell what has happened in the server, a line for each event.
///
/// Events: created, removed, renamed, filling, full, extended, overflow, invalid,
/// merge-waiting, merge-begun, merge-done, merge-failed, suspended, resumed,
/// volume-added, volume-removed, volume-resized, client-came, client-went; and
/// lost, where more had happened than is kept (the last 4096). With --json each
/// line is a JSON object.
#[derive(Debug, Args)]
pub(super) struct EventsArgs {
    /// Go on with what happens from now on, until the server ends.
    #[arg(long, short)]
    follow: bool,
    /// Only events behind this number.
    #[arg(long, value_name = "NUMBER")]
    after: Option<u64>,
    #[command(flatten)]
    server: ToServer,
}

/// The verb.
pub(super) fn run(args: &EventsArgs) -> Result<(), Failure> {
    let mut server = args.server.connect()?;
    let order = Order::Events(EventsWanted {
        after: args.after,
        follow: args.follow,
    });
    let mut answer = Some(server.order(order).map_err(Failure::refused)?);
    while let Some(Answer::Events(events)) = answer {
        let mut lines = String::new();
        for event in &events {
            lines.push_str(&line(event, args.server.json)?);
        }
        print(&lines)?;
        if !args.follow {
            return Ok(());
        }
        answer = server.next_answer().map_err(Failure::refused)?;
    }
    answer.map_or(Ok(()), |_| Err(beside_the_point()))
}

fn line(event: &EventReport, json: bool) -> Result<String, Failure> {
    if json {
        let text = serde_json::to_string(event).map_err(Failure::refused)?;
        return Ok(text + "\n");
    }
    let mut line = format!(
        "{} {} {}",
        event.sequence,
        super::when::show(event.at),
        event.event.word()
    );
    let subject = match (&event.volume, &event.snapshot) {
        (Some(volume), Some(snapshot)) => Some(crate::names::export(volume, snapshot)),
        (Some(volume), None) => Some(volume.clone()),
        (None, _) => None,
    };
    let percent = event.percent.map(|percent| format!("{percent}%"));
    let client = event.client.map(|client| format!("client {client}"));
    let message = event.message.as_ref().map(|message| format!("({message})"));
    for word in [subject, percent, client, message].into_iter().flatten() {
        line.push(' ');
        line.push_str(&word);
    }
    line.push('\n');
    Ok(line)
}
