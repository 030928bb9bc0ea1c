//! `nbdsnap serve` as a child of the test: started with arguments, ready when it
//! has printed its exports, ended by a signal to its own process id and, whatever
//! happens, when it is dropped.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use nbdsnap_engine::law::Mutant;
use rustix::process::Signal;

use super::PATIENCE;
use super::process::{Finished, pid_of, run, wait, wait_until};
use super::program::{MUTANT_VARIABLE, mutant_program, program};
use super::wire::Address;

/// The arguments of one `nbdsnap serve`; can be started any number of times.
#[derive(Clone, Debug, Default)]
pub struct Serve {
    args: Vec<OsString>,
    exports: usize,
    socket: Option<PathBuf>,
    control: Option<PathBuf>,
    mutant: bool,
    environment: Vec<(String, String)>,
}

impl Serve {
    /// Serve on a Unix socket in `folder`.
    pub fn on_socket_in(folder: &Path) -> Self {
        let socket = folder.join("nbd.sock");
        let mut serve = Self {
            socket: Some(socket.clone()),
            ..Self::default()
        };
        serve
            .arg("--listen")
            .arg(format!("unix:{}", socket.display()));
        serve
    }

    /// Serve on a free port of the loopback interface.
    pub fn on_free_port() -> Self {
        let mut serve = Self::default();
        serve.arg("--listen").arg("127.0.0.1:0");
        serve
    }

    /// Any other argument.
    pub fn arg(&mut self, arg: impl Into<OsString>) -> &mut Self {
        self.args.push(arg.into());
        self
    }

    /// A disk, as the export `name`.
    pub fn disk(&mut self, name: &str, disk: &Path) -> &mut Self {
        self.exports += 1;
        self.arg(format!("{name}={}", disk.display()))
    }

    /// A snapshot: `export` is `VOLUME@NAME`, `options` what follows the store's
    /// path, with its commas (or empty).
    pub fn snapshot(&mut self, export: &str, cow: &Path, options: &str) -> &mut Self {
        self.exports += 1;
        self.arg("--snapshot")
            .arg(format!("{export}={}{options}", cow.display()))
    }

    /// Take orders on a socket in `folder`; see [`Server::order`].
    pub fn control_in(&mut self, folder: &Path) -> &mut Self {
        let control = folder.join("control.sock");
        self.control = Some(control.clone());
        self.arg("--control").arg(control)
    }

    /// Remember what there is in this folder. So many exports come from there.
    pub fn state(&mut self, folder: &Path, exports: usize) -> &mut Self {
        self.exports += exports;
        self.arg("--state").arg(folder)
    }

    /// Not a byte may change.
    pub fn read_only(&mut self) -> &mut Self {
        self.arg("--read-only")
    }

    /// Serve with a rule of durability broken: another build of the program.
    pub fn mutant(&mut self, mutant: Mutant) -> &mut Self {
        self.mutant_named(&format!("{mutant:?}"))
    }

    /// The same with any rule that this build can break, the server's own too.
    pub fn mutant_named(&mut self, name: &str) -> &mut Self {
        self.mutant = true;
        self.env(MUTANT_VARIABLE, name)
    }

    /// An environment variable.
    pub fn env(&mut self, name: &str, value: &str) -> &mut Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The command line, for a test that starts it its own way.
    pub fn command(&self) -> Command {
        let program = if self.mutant {
            mutant_program()
        } else {
            program()
        };
        let mut command = Command::new(program);
        command
            .arg("serve")
            .args(&self.args)
            .env_remove("RUST_LOG")
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null());
        command
    }

    /// Start it and wait until it is ready.
    pub fn start(&self) -> Server {
        let mut child = self
            .command()
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let lines = lines_of(child.stdout.take().expect("piped"));
        let stderr = Arc::new(Mutex::new(String::new()));
        let reader = collect_into(child.stderr.take().expect("piped"), Arc::clone(&stderr));
        let mut server = Server {
            child,
            ended: false,
            printed: Vec::new(),
            stderr,
            reader: Some(reader),
            socket: self.socket.clone(),
            control: self.control.clone(),
            port: None,
        };
        server.wait_until_ready(&lines, self.exports);
        if self.exports == 0 {
            server.wait_until_it_takes_orders();
        }
        server
    }

    /// Run it to its end, for a command line that is to be refused. Should it
    /// serve instead, it is ended after [`PATIENCE`] and the test fails.
    pub fn run_to_end(&self) -> Finished {
        run(&mut self.command())
    }
}

/// A server that runs.
#[derive(Debug)]
pub struct Server {
    child: Child,
    ended: bool,
    printed: Vec<String>,
    stderr: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
    socket: Option<PathBuf>,
    control: Option<PathBuf>,
    port: Option<u16>,
}

impl Server {
    /// The socket that it takes orders on.
    pub fn control(&self) -> &Path {
        self.control
            .as_deref()
            .expect("it was started to take orders")
    }

    /// `nbdsnap VERB...` against this server, as a command still to be run.
    pub fn order_command<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(program());
        command
            .args(words)
            .arg("--control")
            .arg(self.control())
            .env_remove("RUST_LOG");
        command
    }

    /// Give it an order by the program itself.
    pub fn order<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Finished {
        run(&mut self.order_command(words))
    }

    /// Lines on stdout until there is one with a URI for each export.
    fn wait_until_ready(&mut self, lines: &Receiver<String>, exports: usize) {
        let until = Instant::now() + PATIENCE;
        while self.printed_uris().len() < exports {
            let left = until.saturating_duration_since(Instant::now());
            match lines.recv_timeout(left) {
                Ok(line) => self.printed.push(line),
                Err(why) => {
                    if why == RecvTimeoutError::Disconnected {
                        let _ = wait(&mut self.child, PATIENCE);
                    }
                    panic!(
                        "the server did not become ready ({why}): {exports} exports expected\nstdout: {:#?}\nstderr: {}",
                        self.printed,
                        self.stderr()
                    );
                }
            }
        }
        let port = |uri: &String| {
            uri.strip_prefix("nbd://127.0.0.1:")?
                .split('/')
                .next()?
                .parse()
                .ok()
        };
        self.port = self.printed_uris().iter().find_map(port);
    }

    /// One that has nothing to print is ready when its control socket is.
    fn wait_until_it_takes_orders(&mut self) {
        let Some(control) = self.control.clone() else {
            return;
        };
        wait_until("the server takes orders", || {
            assert!(self.is_running(), "it has ended: {}", self.stderr());
            UnixStream::connect(&control).is_ok()
        });
    }

    /// The URIs that it printed.
    pub fn printed_uris(&self) -> Vec<String> {
        let words = self.printed.iter().filter_map(|line| {
            line.split_whitespace()
                .find(|word| word.starts_with("nbd") && word.contains("://"))
        });
        words.map(str::to_owned).collect()
    }

    /// What it has logged so far.
    pub fn stderr(&self) -> String {
        self.stderr
            .lock()
            .map(|text| text.clone())
            .unwrap_or_default()
    }

    /// The URI of an export, put together here.
    pub fn uri(&self, export: &str) -> String {
        match (&self.socket, self.port) {
            (Some(socket), _) => format!("nbd+unix:///{export}?socket={}", socket.display()),
            (None, Some(port)) => format!("nbd://127.0.0.1:{port}/{export}"),
            (None, None) => panic!("the server printed no port: {:?}", self.printed),
        }
    }

    /// Where it listens, for raw sockets.
    pub fn address(&self) -> Address {
        match (&self.socket, self.port) {
            (Some(socket), _) => Address::Unix(socket.clone()),
            (None, Some(port)) => Address::Tcp(SocketAddr::from(([127, 0, 0, 1], port))),
            (None, None) => panic!("the server printed no port: {:?}", self.printed),
        }
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Send it a signal.
    pub fn signal(&self, signal: Signal) {
        rustix::process::kill_process(pid_of(&self.child), signal)
            .expect("the server can be signalled");
    }

    /// SIGTERM: it must end with status 0. All that it wrote to standard error.
    pub fn stop(self) -> String {
        self.signal(Signal::TERM);
        let (status, stderr) = self.wait_for_end();
        assert!(
            status.code() == Some(0),
            "after SIGTERM the server ended with {status}\nstderr: {stderr}"
        );
        stderr
    }

    /// kill -9.
    pub fn kill(self) {
        self.signal(Signal::KILL);
        let (status, stderr) = self.wait_for_end();
        assert!(
            status.signal() == Some(9),
            "kill -9 came too late: {status}\nstderr: {stderr}"
        );
    }

    /// Wait for its end, whoever brings it about; its status and all that it logged.
    pub fn wait_for_end(mut self) -> (ExitStatus, String) {
        let Some(status) = wait(&mut self.child, PATIENCE) else {
            panic!(
                "the server did not end within {PATIENCE:?}\nstderr: {}",
                self.stderr()
            );
        };
        self.ended = true;
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        (status, self.stderr())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            eprintln!("the server's stderr:\n{}", self.stderr());
        }
    }
}

/// Lines as they come; goes on reading, so that the server never meets a full pipe.
fn lines_of(stream: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            let _ = sender.send(line);
        }
    });
    receiver
}

fn collect_into(stream: impl Read + Send + 'static, text: Arc<Mutex<String>>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            if let Ok(mut text) = text.lock() {
                text.push_str(&line);
                text.push('\n');
            }
        }
    })
}
