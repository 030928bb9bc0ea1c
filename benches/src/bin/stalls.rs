//! `stalls`: how long the client of a disk waits while a snapshot of it is
//! created. See benches/README.md.
//!
//! One client writes 4 KiB at random places, one request at a time, without ever
//! flushing, so that there is always something to flush; beside it, snapshots are
//! created and removed. The longest wait of a write that overlaps a creation is
//! compared with a flush of the disk a moment before.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use clap::Parser;
use nbdsnap::client::Client;
use nbdsnap::control::client::ControlClient;
use nbdsnap::control::protocol::{Order, SnapshotCreate, SnapshotName, SnapshotRemove};
use nbdsnap::nbd::uri::{ListenAddr, NbdUri};
use nbdsnap_benches::BenchError;
use nbdsnap_benches::plan::Rng;
use serde_json::json;

const BLOCK: usize = 4096;
/// Between two measurements: time for pages to become dirty.
const PAUSE: Duration = Duration::from_millis(10);

/// Measures how long a disk's client waits while snapshots are created.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Options {
    /// Creations
    #[arg(long, default_value_t = 500)]
    rounds: usize,
    /// Mebibytes of the disk
    #[arg(long, default_value_t = 256)]
    size: u64,
    /// Where the disk and its stores are made; default: the system's temporary folder
    #[arg(long)]
    folder: Option<PathBuf>,
    /// The program; default: nbdsnap beside this one
    #[arg(long)]
    nbdsnap: Option<PathBuf>,
    /// Chooses the blocks
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The result as JSON
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stalls: {error}");
            ExitCode::FAILURE
        }
    }
}

fn unsuitable(what: &str) -> impl FnOnce(std::io::Error) -> BenchError {
    move |error| BenchError::Unsuitable(format!("{what}: {error}"))
}

/// A server with one disk, ended when it is dropped.
struct Server {
    child: Child,
    uri: NbdUri,
    control: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start(program: &Path, folder: &Path, bytes: u64) -> Result<Self, BenchError> {
        let disk = folder.join("disk.img");
        // Written, not sparse: a first write to a hole would cost the file system
        // more than an overwrite.
        let mut filled = std::fs::File::create(&disk).map_err(unsuitable("the disk"))?;
        std::io::copy(
            &mut std::io::Read::take(std::io::repeat(7), bytes),
            &mut filled,
        )
        .and_then(|_| filled.sync_all())
        .map_err(unsuitable("the disk"))?;
        let (socket, control) = (folder.join("nbd"), folder.join("control"));
        let mut child = Command::new(program)
            // What it would log for each snapshot costs time too.
            .args(["-q", "serve"])
            .arg(format!("disk={}", disk.display()))
            .arg("--listen")
            .arg(format!("unix:{}", socket.display()))
            .arg("--control")
            .arg(&control)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(unsuitable("the server"))?;
        let mut line = String::new();
        let stdout = child.stdout.take().expect("piped");
        BufReader::new(stdout)
            .read_line(&mut line)
            .map_err(unsuitable("the server"))?;
        let uri = ListenAddr::Unix(socket).uri("disk");
        Ok(Self {
            child,
            uri,
            control,
        })
    }

    fn client(&self) -> Result<Client, BenchError> {
        Client::connect(&self.uri).map_err(|error| BenchError::Unsuitable(error.to_string()))
    }
}

/// A write: when it was sent, and when its reply came.
type Span = (Instant, Instant);

/// The client that never stops writing.
struct Writer {
    spans: Arc<Mutex<Vec<Span>>>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<(), String>>,
}

impl Writer {
    fn start(mut client: Client, bytes: u64, seed: u64) -> Self {
        let spans = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let (told, asked) = (Arc::clone(&spans), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            let mut rng = Rng::new(seed);
            let block = [9; BLOCK];
            while !asked.load(Ordering::Relaxed) {
                let at = rng.below(bytes / BLOCK as u64) * BLOCK as u64;
                let sent = Instant::now();
                client
                    .write(at, &block, false)
                    .map_err(|error| error.to_string())?;
                let mut spans = told.lock().expect("nobody panics with it");
                spans.push((sent, Instant::now()));
            }
            Ok(())
        });
        Self {
            spans,
            stop,
            thread,
        }
    }

    /// The longest write that overlaps `begin..end`, once a later one has ended.
    fn longest(&self, begin: Instant, end: Instant) -> Result<Duration, BenchError> {
        loop {
            if self.thread.is_finished() {
                return Err(BenchError::Unsuitable("the writer has ended".into()));
            }
            {
                let mut spans = self.spans.lock().expect("nobody panics with it");
                if spans.last().is_some_and(|&(sent, _)| sent > end) {
                    let overlaps = |&&(sent, replied): &&Span| sent <= end && replied >= begin;
                    let longest = spans
                        .iter()
                        .filter(overlaps)
                        .map(|&(sent, replied)| replied - sent)
                        .max()
                        .unwrap_or_default();
                    spans.clear();
                    return Ok(longest);
                }
            }
            thread::sleep(Duration::from_micros(200));
        }
    }

    fn end(self) -> Result<(), BenchError> {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.join().expect("the writer does not panic");
        ended.map_err(BenchError::Unsuitable)
    }
}

/// What one creation cost, in microseconds.
struct Cost {
    /// The order, from its sending to its answer.
    order: f64,
    /// A flush of the disk just before.
    flush: f64,
    /// The longest wait of a write meanwhile.
    stall: f64,
}

fn run(options: &Options) -> Result<(), BenchError> {
    let folder = options.folder.clone().unwrap_or_else(std::env::temp_dir);
    let folder = tempfile::tempdir_in(folder).map_err(unsuitable("a folder"))?;
    let beside = std::env::current_exe().map(|this| this.with_file_name("nbdsnap"));
    let program = options.nbdsnap.clone().or(beside.ok());
    let program = program.ok_or_else(|| BenchError::Unsuitable("no nbdsnap".into()))?;
    let bytes = options.size << 20;
    let server = Server::start(&program, folder.path(), bytes)?;
    let writer = Writer::start(server.client()?, bytes, options.seed);
    let mut flusher = server.client()?;
    let mut orders = ControlClient::connect(&server.control)
        .map_err(|error| BenchError::Unsuitable(error.to_string()))?;
    let mut costs = Vec::with_capacity(options.rounds);
    for _ in 0..options.rounds {
        costs.push(one(&mut flusher, &mut orders, &writer)?);
    }
    writer.end()?;
    report(options, &costs);
    Ok(())
}

fn one(
    flusher: &mut Client,
    orders: &mut ControlClient,
    writer: &Writer,
) -> Result<Cost, BenchError> {
    let failed = |error: String| BenchError::Unsuitable(error);
    let name = SnapshotName {
        volume: "disk".into(),
        snapshot: "s".into(),
    };
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    thread::sleep(PAUSE);
    let before = Instant::now();
    flusher.flush().map_err(|error| failed(error.to_string()))?;
    let flush = before.elapsed();
    thread::sleep(PAUSE);
    let create = Order::SnapshotCreate(SnapshotCreate {
        snapshots: vec![name.clone()],
        cow: None,
        size: None,
        chunk_bytes: None,
        kind: nbdsnap::control::protocol::Kind::default(),
        read_only: false,
        on_full: None,
        auto_extend: None,
    });
    let begin = Instant::now();
    orders
        .order(create)
        .map_err(|error| failed(error.to_string()))?;
    let end = Instant::now();
    let stall = writer.longest(begin, end)?;
    let remove = Order::SnapshotRemove(SnapshotRemove {
        snapshots: vec![name],
        delete_cow: true,
    });
    orders
        .order(remove)
        .map_err(|error| failed(error.to_string()))?;
    Ok(Cost {
        order: micros(end - begin),
        flush: micros(flush),
        stall: micros(stall),
    })
}

fn report(options: &Options, costs: &[Cost]) {
    let spread = |of: &dyn Fn(&Cost) -> f64| {
        let mut all: Vec<f64> = costs.iter().map(of).collect();
        all.sort_by(f64::total_cmp);
        let at = |part: f64| all[((all.len() - 1) as f64 * part).round() as usize] / 1000.0;
        [at(0.5), at(0.99), at(1.0)]
    };
    let rows = [
        ("order", spread(&|cost| cost.order)),
        ("flush before", spread(&|cost| cost.flush)),
        ("longest write", spread(&|cost| cost.stall)),
        (
            "beyond the flush",
            spread(&|cost| (cost.stall - cost.flush).max(0.0)),
        ),
    ];
    if options.json {
        let rows: Vec<_> = rows
            .iter()
            .map(|(name, [median, p99, most])| {
                json!({"what": name, "median_ms": median, "p99_ms": p99, "max_ms": most})
            })
            .collect();
        println!("{}", json!({"creations": costs.len(), "times": rows}));
        return;
    }
    println!("{} creations; milliseconds", costs.len());
    println!("{:<18}{:>10}{:>10}{:>10}", "", "median", "p99", "max");
    for (name, [median, p99, most]) in rows {
        println!("{name:<18}{median:>10.2}{p99:>10.2}{most:>10.2}");
    }
}
