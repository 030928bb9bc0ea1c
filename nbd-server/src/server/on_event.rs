//! `serve --on-event CMD`: a command for every event, one after the other, on a
//! thread of its own. However long the command takes, the server goes on; events
//! wait as long as they are kept.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use super::events::Events;
use crate::control::protocol::EventReport;

/// A command that has not ended by then is killed.
const COMMAND_TIME: Duration = Duration::from_mins(1);
/// When the server ends, events that have not been told yet have this long.
const LAST_TIME: Duration = Duration::from_secs(10);
/// How often a command is looked after.
const LOOK_AFTER: Duration = Duration::from_millis(20);

/// A handle to the thread.
#[derive(Debug)]
pub(super) struct Runner {
    events: Arc<Events>,
    thread: JoinHandle<()>,
}

impl Runner {
    /// Run `command` by the shell for every event from now on.
    pub(super) fn start(events: Arc<Events>, command: String) -> std::io::Result<Self> {
        let builder = std::thread::Builder::new().name("on-event".into());
        let followed = Arc::clone(&events);
        let thread = builder.spawn(move || follow(&followed, &command))?;
        Ok(Self { events, thread })
    }

    /// There are no more events: tell of those there are, and end.
    pub(super) fn stop(self) {
        self.events.close();
        let until = Instant::now() + LAST_TIME;
        while !self.thread.is_finished() && Instant::now() < until {
            std::thread::sleep(LOOK_AFTER);
        }
        if self.thread.is_finished() {
            let _ = self.thread.join();
        } else {
            tracing::warn!("the command of --on-event still runs: not waiting for it");
        }
    }
}

fn follow(events: &Events, command: &str) {
    let mut seen = 0;
    while let Some(new) = events.wait(seen, Duration::MAX) {
        for event in new {
            seen = event.sequence;
            run(command, &event);
        }
    }
}

fn run(command: &str, event: &EventReport) {
    let mut shell = Command::new("/bin/sh");
    shell
        .arg("-c")
        .arg(command)
        .envs(environment(event))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .process_group(0);
    match shell.spawn() {
        Ok(child) => wait(child),
        Err(error) => tracing::warn!("the command of --on-event cannot be run: {error}"),
    }
}

fn wait(mut child: Child) {
    let until = Instant::now() + COMMAND_TIME;
    loop {
        match child.try_wait() {
            Ok(None) if Instant::now() < until => std::thread::sleep(LOOK_AFTER),
            Ok(Some(status)) => {
                if !status.success() {
                    tracing::warn!("the command of --on-event ended with {status}");
                }
                return;
            }
            Ok(None) => {
                tracing::warn!(
                    "the command of --on-event has not ended within {} seconds: killed",
                    COMMAND_TIME.as_secs()
                );
                if let Some(group) = Pid::from_raw(child.id() as i32) {
                    let _ = rustix::process::kill_process_group(group, Signal::KILL);
                }
                let _ = child.wait();
                return;
            }
            Err(error) => {
                tracing::warn!("the command of --on-event cannot be waited for: {error}");
                return;
            }
        }
    }
}

/// What the command finds in its environment; what does not apply is empty.
fn environment(event: &EventReport) -> [(&'static str, String); 8] {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let number = |number: Option<u64>| number.map_or(String::new(), |number| number.to_string());
    [
        ("NBDSNAP_EVENT", event.event.word().to_owned()),
        ("NBDSNAP_SEQUENCE", event.sequence.to_string()),
        ("NBDSNAP_AT", event.at.to_string()),
        ("NBDSNAP_VOLUME", text(&event.volume)),
        ("NBDSNAP_SNAPSHOT", text(&event.snapshot)),
        ("NBDSNAP_PERCENT", number(event.percent)),
        ("NBDSNAP_CLIENT", number(event.client)),
        ("NBDSNAP_MESSAGE", text(&event.message)),
    ]
}
