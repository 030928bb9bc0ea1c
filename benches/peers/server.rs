//! A server's process: found, started, waited for, stopped. It never outlives
//! its [`Server`].

use std::env;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nbdsnap::nbd::uri::ListenAddr;
use nbdsnap_benches::BenchError;
use nbdsnap_benches::connection::Connection;
use rustix::process::{Pid, Signal};

use crate::contender::{Contender, Preparation, Program, Site};

/// How long a server may take to answer, and to end.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks at a server that starts or ends.
const PAUSE: Duration = Duration::from_millis(2);

/// Where the programs are.
#[derive(Debug)]
pub(crate) struct Programs {
    found: Vec<(Program, PathBuf)>,
}

impl Programs {
    /// Looks for nbdsnap beside this program (or where it is said to be), and for the others in
    /// the PATH and the folders of system programs.
    pub(crate) fn find(nbdsnap: Option<&Path>) -> Self {
        let beside = env::current_exe()
            .ok()
            .map(|this| this.with_file_name("nbdsnap"));
        let path = env::var_os("PATH").unwrap_or_default();
        let folders: Vec<PathBuf> = env::split_paths(&path)
            .chain(["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from))
            .collect();
        let place = |program: Program| match program {
            Program::Nbdsnap => nbdsnap
                .map(Path::to_path_buf)
                .or(beside.clone())
                .filter(|path| path.is_file()),
            other => folders
                .iter()
                .map(|folder| folder.join(other.name()))
                .find(|path| path.is_file()),
        };
        let found = Program::ALL
            .into_iter()
            .filter_map(|program| Some((program, place(program)?)))
            .collect();
        Self { found }
    }

    /// True if the server can be started.
    pub(crate) fn has(&self, contender: Contender) -> bool {
        self.path(contender.program()).is_some()
    }

    fn path(&self, program: Program) -> Option<&Path> {
        self.found
            .iter()
            .find(|(found, _)| *found == program)
            .map(|(_, path)| path.as_path())
    }

    /// The first line of what each says of its version.
    pub(crate) fn versions(&self) -> Vec<String> {
        let version = |(_, path): &(Program, PathBuf)| {
            let output = Command::new(path)
                .arg("--version")
                .stdin(Stdio::null())
                .output()
                .ok()?;
            let text = String::from_utf8_lossy(&output.stdout);
            text.lines().next().map(str::to_owned)
        };
        self.found.iter().filter_map(version).collect()
    }
}

/// A server that runs.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    label: String,
    address: ListenAddr,
    log: PathBuf,
}

impl Server {
    /// Starts a server and waits until its export answers. What it prints goes to `log`.
    pub(crate) fn start(
        contender: Contender,
        programs: &Programs,
        site: &Site<'_>,
        log: &Path,
    ) -> Result<Self, BenchError> {
        let label = contender.label();
        let failed = |what: &str, cause: io::Error| {
            BenchError::Unsuitable(format!("{label}: {what}: {cause}"))
        };
        prepare(contender.preparation(site), site).map_err(|cause| failed("its store", cause))?;
        let program = programs
            .path(contender.program())
            .expect("only servers that were found are started");
        let print = File::create(log).map_err(|cause| failed("its log", cause))?;
        let print_too = print
            .try_clone()
            .map_err(|cause| failed("its log", cause))?;
        let child = contender
            .command(program, site)
            .stdin(Stdio::null())
            .stdout(print)
            .stderr(print_too)
            .spawn()
            .map_err(|cause| failed("cannot start", cause))?;
        let address = ListenAddr::Unix(site.socket.to_path_buf());
        let mut server = Self {
            child,
            label,
            address,
            log: log.to_path_buf(),
        };
        server.wait_until_ready(contender.export())?;
        Ok(server)
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Connects to one of its exports.
    pub(crate) fn connect(&self, export: &str, structured: bool) -> Result<Connection, BenchError> {
        Connection::open(&self.address.uri(export), structured)
    }

    fn wait_until_ready(&mut self, export: &str) -> Result<(), BenchError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.connect(export, false).and_then(Connection::close) {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() >= deadline => {
                    return Err(self.complaint(&error.to_string()));
                }
                Err(_) => {}
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(self.complaint(&format!("ended with {status}")));
            }
            thread::sleep(PAUSE);
        }
    }

    /// Ends it as an operator would, and waits for that.
    pub(crate) fn stop(mut self) -> Result<(), BenchError> {
        let pid = Pid::from_child(&self.child);
        rustix::process::kill_process(pid, Signal::TERM)
            .map_err(|errno| self.complaint(&format!("cannot be stopped: {errno}")))?;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            // The signal is itself the end of some, so the status tells nothing.
            if let Ok(Some(_)) = self.child.try_wait() {
                return Ok(());
            }
            thread::sleep(PAUSE);
        }
        Err(self.complaint(&format!(
            "did not end within {} s of SIGTERM",
            PATIENCE.as_secs()
        )))
    }

    fn complaint(&self, what: &str) -> BenchError {
        let said = std::fs::read_to_string(&self.log).unwrap_or_default();
        let tail: Vec<&str> = said.lines().rev().take(5).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        BenchError::Unsuitable(format!(
            "{}: {what}; it printed: {}",
            self.label,
            tail.join(" | ")
        ))
    }
}

fn prepare(preparation: Preparation, site: &Site<'_>) -> io::Result<()> {
    match preparation {
        Preparation::Nothing => Ok(()),
        Preparation::EmptyStore => File::create_new(site.store)?.set_len(site.bytes),
        Preparation::Run(mut command) => {
            let output = command.output()?;
            if output.status.success() {
                return Ok(());
            }
            Err(io::Error::other(String::from_utf8_lossy(&output.stderr)))
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // After `stop` both do nothing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
