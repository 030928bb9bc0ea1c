//! `chain`: what reads cost through snapshots of snapshots. See benches/README.md.
//!
//! A disk, a snapshot of it, a snapshot of that, and so on; each level has exceptions
//! of its own, at places of its own. The same random reads of 4 KiB go to the first
//! snapshot and to the last one, turn by turn, from the page cache, and every byte is
//! compared with what has to be there.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use nbdsnap::client::Client;
use nbdsnap::control::protocol::{Kind, Order, SnapshotCreate, SnapshotName};
use nbdsnap::nbd::uri::{ListenAddr, NbdUri};
use nbdsnap_benches::BenchError;
use nbdsnap_benches::connection::Connection;
use nbdsnap_benches::content::Content;
use nbdsnap_benches::load::{Limit, Load, Measured};
use nbdsnap_benches::plan::{Order as Places, Rng};
use nbdsnap_benches::served::{Bench, Served, end, unsuitable};
use serde_json::json;

const BLOCK: u64 = 4096;

/// The bar: so many times what reads of the first level cost, at most.
const BAR: f64 = 1.5;

/// Measures what reads cost through a chain of snapshots.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// Turns
    #[arg(long, default_value_t = 9)]
    turns: usize,
    /// Snapshots upon each other
    #[arg(long, default_value_t = 8)]
    levels: usize,
    /// Mebibytes of the disk
    #[arg(long, default_value_t = 128)]
    size: u64,
    /// One chunk in so many has an exception, at each level
    #[arg(long, default_value_t = 16)]
    share: u64,
    /// Requests in flight
    #[arg(long, default_value_t = 32)]
    depth: u16,
    /// Seconds of a measurement
    #[arg(long, default_value_t = 1.0)]
    time: f64,
    /// Fail unless reads of the last level cost at most 1.5 times those of the first
    #[arg(long)]
    check_bar: bool,
    #[command(flatten)]
    bench: Bench,
}

fn main() -> ExitCode {
    end("chain", run(&Options::parse()).map(|()| true))
}

/// A server with one disk.
struct Server(Served);

impl Server {
    fn start(program: &Path, folder: &Path, content: &[u8]) -> Result<Self, BenchError> {
        let disk = folder.join("disk.img");
        std::fs::write(&disk, content).map_err(unsuitable("the disk"))?;
        let args = [format!("disk={}", disk.display()).into()];
        Served::start(program, folder, &args, 1).map(Self)
    }

    fn uri(&self, path: &str) -> NbdUri {
        ListenAddr::Unix(self.0.socket.clone()).uri(&format!("disk@{path}"))
    }

    fn snapshot(&self, path: &str) -> Result<(), BenchError> {
        let order = Order::SnapshotCreate(SnapshotCreate {
            snapshots: vec![SnapshotName {
                volume: "disk".into(),
                snapshot: path.to_owned(),
            }],
            cow: None,
            size: None,
            chunk_bytes: Some(BLOCK),
            kind: Kind::Persistent,
            read_only: false,
            on_full: None,
            auto_extend: None,
        });
        let mut orders = self.0.orders()?;
        orders.order(order).map(drop).map_err(unsuitable(path))
    }

    /// Write to one chunk in `share` of a level, at places of its own; `content` is what
    /// it shows.
    fn fill(
        &self,
        path: &str,
        share: u64,
        random: &mut Rng,
        content: &mut [u8],
    ) -> Result<(), BenchError> {
        let mut client = Client::connect(&self.uri(path)).map_err(unsuitable(path))?;
        for group in 0..content.len() as u64 / BLOCK / share {
            let offset = (group * share + random.below(share)) * BLOCK;
            let data = &mut content[offset as usize..(offset + BLOCK) as usize];
            random.fill(data);
            client
                .write(offset, data, false)
                .map_err(unsuitable("a write"))?;
        }
        client.flush().map_err(unsuitable("a flush"))
    }

    fn read(&self, path: &str, content: &Content, load: &Load) -> Result<Measured, BenchError> {
        let mut connection = Connection::open(&self.uri(path), false)?;
        let (measured, _) = load.run(&mut connection, content)?;
        connection.close()?;
        Ok(measured)
    }
}

/// What a turn found.
struct Turn {
    first: Measured,
    last: Measured,
}

impl Turn {
    /// How long a read of the last level takes, by one of the first.
    fn ratio(&self) -> f64 {
        self.first.iops() / self.last.iops()
    }
}

/// The server's CPU time for one read, over all turns: less of others' doing is in it
/// than in the time that passes.
fn cpu_us<'a>(all: impl Iterator<Item = &'a Measured>) -> Option<f64> {
    let mut cpu = Duration::ZERO;
    let mut operations = 0;
    for one in all {
        cpu += one.server_cpu?;
        operations += one.operations;
    }
    Some(cpu.as_secs_f64() * 1e6 / operations as f64)
}

fn run(options: &Options) -> Result<(), BenchError> {
    let (folder, program) = (options.bench.folder()?, options.bench.program()?);
    let mut random = Rng::new(options.bench.seed);
    let mut content = vec![0; (options.size << 20) as usize];
    random.fill(&mut content);
    let server = Server::start(&program, folder.path(), &content)?;
    let mut path = String::new();
    let mut first = None;
    for level in 1..=options.levels.max(1) {
        let name = format!("s{level}");
        path = if path.is_empty() {
            name
        } else {
            format!("{path}@{name}")
        };
        server.snapshot(&path)?;
        server.fill(&path, options.share, &mut random, &mut content)?;
        // What is written to a level later is not in those above it.
        first.get_or_insert_with(|| (path.clone(), Content::Image(content.clone())));
    }
    let (first_path, first_content) = first.expect("there is a level");
    let content = Content::Image(content);
    let mut turns = Vec::new();
    // The first one warms up, and is not counted.
    for turn in 0..=options.turns {
        let measure = |path: &str, content: &Content| {
            let load = load(options, turn as u64, server.0.id())?;
            server.read(path, content, &load)
        };
        // Who begins changes from turn to turn.
        let (first, last) = if turn % 2 == 0 {
            let first = measure(&first_path, &first_content)?;
            (first, measure(&path, &content)?)
        } else {
            let last = measure(&path, &content)?;
            (measure(&first_path, &first_content)?, last)
        };
        if turn > 0 {
            turns.push(Turn { first, last });
        }
    }
    report(options, turns)
}

fn load(options: &Options, turn: u64, server: u32) -> Result<Load, BenchError> {
    let time = Duration::try_from_secs_f64(options.time).map_err(unsuitable("--time"))?;
    Ok(Load {
        command: nbdsnap_benches::replies::Command::Read,
        order: Places::Random,
        block: BLOCK as u32,
        stride: BLOCK,
        depth: options.depth,
        batch: options.depth.div_ceil(4),
        limit: Limit::Time {
            warm_up: time / 4,
            measure: time,
        },
        seed: options.bench.seed + turn,
        server_pid: Some(server),
    })
}

fn report(options: &Options, mut turns: Vec<Turn>) -> Result<(), BenchError> {
    turns.sort_by(|a, b| a.ratio().total_cmp(&b.ratio()));
    let (Some(least), Some(most)) = (turns.first(), turns.last()) else {
        return Err(BenchError::Unsuitable("--turns: at least one".into()));
    };
    let middle = &turns[turns.len() / 2];
    let ratio = middle.ratio();
    let first_cpu = cpu_us(turns.iter().map(|turn| &turn.first));
    let last_cpu = cpu_us(turns.iter().map(|turn| &turn.last));
    let first_cpu = first_cpu.ok_or_else(|| BenchError::Unsuitable("the server ended".into()))?;
    let last_cpu = last_cpu.ok_or_else(|| BenchError::Unsuitable("the server ended".into()))?;
    if options.bench.json {
        let report = json!({
            "levels": options.levels,
            "turns": turns.len(),
            "ratio": ratio,
            "least": least.ratio(),
            "most": most.ratio(),
            "first_iops": middle.first.iops(),
            "last_iops": middle.last.iops(),
            "first_cpu_us": first_cpu,
            "last_cpu_us": last_cpu,
        });
        println!("{report}");
    } else {
        println!(
            "{} levels: a read takes x {ratio:.2} ({:.2} to {:.2}) of one of the first level: {:.0} and {:.0} IOPS in the median turn of {}",
            options.levels,
            least.ratio(),
            most.ratio(),
            middle.last.iops(),
            middle.first.iops(),
            turns.len()
        );
        println!(
            "  server CPU: x {:.2}, {last_cpu:.2} and {first_cpu:.2} us a read",
            last_cpu / first_cpu
        );
    }
    if options.check_bar && ratio > BAR {
        return Err(BenchError::Unsuitable(format!(
            "the bar is {BAR}, and reads of the last level cost {ratio:.2}"
        )));
    }
    Ok(())
}
