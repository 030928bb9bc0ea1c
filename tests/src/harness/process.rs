//! Commands with a bound on their time. A command that has not ended by then is
//! killed, with its children, and the test fails: a hang is a failure.

use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use super::PATIENCE;

/// What a command left behind.
#[derive(Clone, Debug)]
pub struct Finished {
    /// As it was called, for messages.
    pub command: String,
    /// The exit status; `None` where a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error, made readable.
    pub stderr: String,
}

impl Finished {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Insist on exit status 0.
    #[must_use]
    pub fn ok(self) -> Self {
        assert!(self.code == Some(0), "{self}");
        self
    }

    /// Insist on a failure by itself: an exit status that is not 0, no signal.
    #[must_use]
    pub fn failed(self) -> Self {
        assert!(
            self.code.is_some_and(|code| code != 0),
            "should have failed: {self}"
        );
        self
    }

    /// Standard output as JSON, from its first brace or bracket on.
    pub fn json(&self) -> serde_json::Value {
        let text = self.text();
        let start = text
            .find(['{', '['])
            .unwrap_or_else(|| panic!("no JSON: {self}"));
        serde_json::from_str(&text[start..]).unwrap_or_else(|e| panic!("no JSON ({e}): {self}"))
    }
}

impl std::fmt::Display for Finished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            command,
            code,
            signal,
            stderr,
            ..
        } = self;
        write!(
            f,
            "`{command}` ended with {code:?} (signal {signal:?})\nstdout: {}\nstderr: {stderr}",
            self.text()
        )
    }
}

/// A client of Debian's by its name; Debian's own programs come first in its
/// PATH (another python3 would not find libnbd's module).
pub fn client(name: &str) -> Command {
    let mut command = Command::new(name);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("/usr/bin:/bin:/usr/sbin:/sbin:{path}"));
    command.env("LC_ALL", "C.UTF-8");
    command
}

/// Run a client of Debian's in `folder`.
pub fn run_client<S: AsRef<OsStr>>(
    folder: &Path,
    name: &str,
    args: impl IntoIterator<Item = S>,
) -> Finished {
    run(client(name).args(args).current_dir(folder))
}

/// Run a command to its end, or to the end of [`PATIENCE`].
pub fn run(command: &mut Command) -> Finished {
    Running::start(command).finish()
}

/// A command that runs beside the test. Dropped, it is killed.
#[derive(Debug)]
pub struct Running {
    command: String,
    child: Child,
    stdout: Option<JoinHandle<Vec<u8>>>,
    stderr: Option<JoinHandle<Vec<u8>>>,
    ended: bool,
}

impl Running {
    /// Start it, in a process group of its own.
    pub fn start(command: &mut Command) -> Self {
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let text = words
            .map(|word| word.to_string_lossy().into_owned())
            .collect::<Vec<_>>()
            .join(" ");
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap_or_else(|e| {
                panic!("cannot run `{text}`: {e} (tests/run installs what the suites need)")
            });
        let stdout = child.stdout.take().map(drain);
        let stderr = child.stderr.take().map(drain);
        Self {
            command: text,
            child,
            stdout,
            stderr,
            ended: false,
        }
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Wait for its end.
    #[must_use]
    pub fn finish(mut self) -> Finished {
        let status = wait(&mut self.child, PATIENCE);
        if status.is_none() {
            kill_group(&self.child);
        }
        self.ended = true;
        let stdout = self.stdout.take().map_or_else(Vec::new, collect);
        let stderr = self.stderr.take().map_or_else(Vec::new, collect);
        let stderr = String::from_utf8_lossy(&stderr).into_owned();
        let Some(status) = status else {
            panic!(
                "`{}` did not end within {PATIENCE:?}\nstderr: {stderr}",
                self.command
            );
        };
        let command = std::mem::take(&mut self.command);
        Finished {
            command,
            code: status.code(),
            signal: status.signal(),
            stdout,
            stderr,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended {
            kill_group(&self.child);
            let _ = self.child.wait();
        }
    }
}

/// Wait for a child for at most `limit`.
pub fn wait(child: &mut Child, limit: Duration) -> Option<std::process::ExitStatus> {
    let until = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            return Some(status);
        }
        if Instant::now() >= until {
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Wait until `condition` holds, looking again every few milliseconds; panics
/// after [`PATIENCE`].
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !condition() {
        assert!(
            Instant::now() < until,
            "still waiting after {PATIENCE:?}: {what}"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The process id of a child, for a signal.
pub fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(child.id() as i32).expect("a process id is not 0")
}

fn kill_group(child: &Child) {
    let _ = rustix::process::kill_process_group(pid_of(child), Signal::KILL);
}

fn drain(mut stream: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        bytes
    })
}

fn collect(reader: JoinHandle<Vec<u8>>) -> Vec<u8> {
    reader.join().unwrap_or_default()
}
