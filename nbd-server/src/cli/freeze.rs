//! `snapshot create --freeze CMD --thaw CMD`: commands around the instant, such as
//! fsfreeze or a database's own. The thaw always runs once the freeze was begun:
//! it is a process of its own from before the freeze on, which waits for the end of
//! a pipe, so that it runs even if this program is killed.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use super::Failure;

/// How often a command is looked after.
const LOOK: Duration = Duration::from_millis(5);

/// Waits for the end of its input, then becomes the command.
const GUARD: &str = "cat >/dev/null; exec /bin/sh -c \"$1\"";

/// A frozen application. Dropped, it thaws.
pub(super) struct Frozen {
    /// Waits for its input to end, then thaws.
    guard: Option<Child>,
}

impl Frozen {
    /// Run `freeze`, for `patience` at most; `thaw` will run in any case.
    pub(super) fn new(
        freeze: Option<&str>,
        thaw: Option<&str>,
        patience: Duration,
    ) -> Result<Self, Failure> {
        let guard = thaw.map(start_guard).transpose()?;
        let frozen = Self { guard };
        if let Some(command) = freeze
            && let Err(why) = run(command, patience)
        {
            let thawed = frozen.thaw();
            let why = format!("--freeze: {why}; no snapshot was taken");
            return Err(Failure::Refused(match thawed {
                Ok(()) => why,
                Err(error) => format!("{why}; and {}", text(&error)),
            }));
        }
        Ok(frozen)
    }

    /// Thaw, and wait for the end of that.
    pub(super) fn thaw(mut self) -> Result<(), Failure> {
        self.release()
    }

    fn release(&mut self) -> Result<(), Failure> {
        let Some(mut guard) = self.guard.take() else {
            return Ok(());
        };
        drop(guard.stdin.take());
        match guard.wait() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(Failure::Refused(format!(
                "--thaw: the command ended with {status}: look whether everything is thawed"
            ))),
            Err(error) => Err(Failure::Refused(format!("--thaw: {error}"))),
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = self.release();
    }
}

fn text(failure: &Failure) -> &str {
    match failure {
        Failure::Usage(text) | Failure::Refused(text) => text,
        Failure::Found => "",
    }
}

fn start_guard(thaw: &str) -> Result<Child, Failure> {
    Command::new("/bin/sh")
        .args(["-c", GUARD, "thaw", thaw])
        .stdin(Stdio::piped())
        // A Ctrl-C at the terminal is not for it.
        .process_group(0)
        .spawn()
        .map_err(|error| Failure::Refused(format!("--thaw: {error}")))
}

fn run(command: &str, patience: Duration) -> Result<(), String> {
    let mut child = Command::new("/bin/sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        .process_group(0)
        .spawn()
        .map_err(|error| error.to_string())?;
    let until = Instant::now() + patience;
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(format!("the command ended with {status}")),
            Ok(None) if Instant::now() < until => std::thread::sleep(LOOK),
            Ok(None) => {
                if let Some(group) = Pid::from_raw(child.id() as i32) {
                    let _ = rustix::process::kill_process_group(group, Signal::KILL);
                }
                let _ = child.wait();
                return Err(format!(
                    "the command has not ended within {} seconds",
                    patience.as_secs()
                ));
            }
            Err(error) => return Err(error.to_string()),
        }
    }
}
