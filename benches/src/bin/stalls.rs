//! `stalls`: how long the client of a disk waits while a snapshot of it is
//! created. See benches/README.md.
//!
//! One client writes 4 KiB at random places, one request at a time, without ever
//! flushing, so that there is always something to flush; beside it, snapshots are
//! created and removed. The longest wait of a write that overlaps a creation is
//! compared with a flush of the disk a moment before.

use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use clap::Parser;
use nbdsnap::client::Client;
use nbdsnap::control::client::ControlClient;
use nbdsnap::control::protocol::{Order, SnapshotCreate, SnapshotName, SnapshotRemove};
use nbdsnap::nbd::uri::ListenAddr;
use nbdsnap_benches::BenchError;
use nbdsnap_benches::plan::Rng;
use nbdsnap_benches::served::{Bench, Served, end, filled, unsuitable};
use serde_json::json;

const BLOCK: usize = 4096;
/// Between two measurements: time for pages to become dirty.
const PAUSE: Duration = Duration::from_millis(10);

/// Measures how long a disk's client waits while snapshots are created.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// Creations
    #[arg(long, default_value_t = 500)]
    rounds: usize,
    /// Mebibytes of the disk
    #[arg(long, default_value_t = 256)]
    size: u64,
    #[command(flatten)]
    bench: Bench,
}

fn main() -> ExitCode {
    end("stalls", run(&Options::parse()).map(|()| true))
}

/// A server with one disk.
struct Server(Served);

impl Server {
    fn start(program: &Path, folder: &Path, bytes: u64) -> Result<Self, BenchError> {
        let disk = folder.join("disk.img");
        filled(&disk, bytes)?;
        let args = [format!("disk={}", disk.display()).into()];
        Served::start(program, folder, &args, 1).map(Self)
    }

    fn client(&self) -> Result<Client, BenchError> {
        let uri = ListenAddr::Unix(self.0.socket.clone()).uri("disk");
        Client::connect(&uri).map_err(unsuitable("a client"))
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
    let (folder, program) = (options.bench.folder()?, options.bench.program()?);
    let bytes = options.size << 20;
    let server = Server::start(&program, folder.path(), bytes)?;
    let writer = Writer::start(server.client()?, bytes, options.bench.seed);
    let mut flusher = server.client()?;
    let mut orders = server.0.orders()?;
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
    if options.bench.json {
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
