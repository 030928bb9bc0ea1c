//! What the programs share that measure a server or the tools of their own: where their
//! files are made, the server that they start, and how they end.

use std::ffi::OsString;
use std::fmt::Display;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

use nbdsnap::control::client::ControlClient;
use tempfile::TempDir;

use crate::BenchError;

/// Options that they all have.
#[derive(Debug, clap::Args)]
pub struct Bench {
    /// Where files are made, on the file system that is measured; default: the system's
    /// temporary folder
    #[arg(long)]
    pub folder: Option<PathBuf>,
    /// The program; default: nbdsnap beside this one
    #[arg(long)]
    pub nbdsnap: Option<PathBuf>,
    /// Chooses what is random
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// The result as JSON
    #[arg(long)]
    pub json: bool,
}

impl Bench {
    /// A folder for the files. It is deleted when it is dropped.
    pub fn folder(&self) -> Result<TempDir, BenchError> {
        let folder = self.folder.clone().unwrap_or_else(std::env::temp_dir);
        tempfile::tempdir_in(&folder).map_err(|cause| BenchError::File {
            path: folder.display().to_string(),
            cause,
        })
    }

    /// The program that is measured.
    pub fn program(&self) -> Result<PathBuf, BenchError> {
        let beside = std::env::current_exe().map(|this| this.with_file_name("nbdsnap"));
        let program = self.nbdsnap.clone().or(beside.ok());
        program.ok_or_else(|| BenchError::Unsuitable("there is no nbdsnap".into()))
    }
}

/// The end of the program `name`: with an error, or with a bar that is held or not.
pub fn end(name: &str, ended: Result<bool, BenchError>) -> ExitCode {
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{name}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// An error of something that is called `what`.
pub fn unsuitable<E: Display>(what: &str) -> impl FnOnce(E) -> BenchError {
    move |error| BenchError::Unsuitable(format!("{what}: {error}"))
}

/// A file of `bytes` that are written, not a hole: a first write to a hole would cost the
/// file system more than an overwrite.
pub fn filled(path: &Path, bytes: u64) -> Result<(), BenchError> {
    let file_error = |cause| BenchError::File {
        path: path.display().to_string(),
        cause,
    };
    let mut file = std::fs::File::create(path).map_err(file_error)?;
    std::io::copy(&mut std::io::repeat(7).take(bytes), &mut file)
        .and_then(|_| file.sync_all())
        .map_err(file_error)
}

/// A server that was started for a measurement, and is ended when this is dropped.
#[derive(Debug)]
pub struct Served {
    child: Child,
    /// The socket of its exports.
    pub socket: PathBuf,
    /// The one for orders.
    pub control: PathBuf,
}

impl Served {
    /// Start `program serve` with `args`, its sockets in `folder`, and wait for the lines
    /// of so many exports. It logs only errors, for more would cost time.
    pub fn start(
        program: &Path,
        folder: &Path,
        args: &[OsString],
        exports: usize,
    ) -> Result<Self, BenchError> {
        let (socket, control) = (folder.join("nbd"), folder.join("control"));
        let mut child = Command::new(program)
            .args(["-q", "serve"])
            .args(args)
            .arg("--listen")
            .arg(format!("unix:{}", socket.display()))
            .arg("--control")
            .arg(&control)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(unsuitable("the server"))?;
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        let server = Self {
            child,
            socket,
            control,
        };
        let lines = stdout.lines().take(exports).map_while(Result::ok);
        if lines.count() < exports {
            return Err(BenchError::Unsuitable("the server has ended".into()));
        }
        Ok(server)
    }

    /// A connection for orders.
    pub fn orders(&self) -> Result<ControlClient, BenchError> {
        ControlClient::connect(&self.control).map_err(unsuitable("the server's control socket"))
    }

    /// The server's process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
