//! `forks`: many volumes that share one read-only image, each with a writable
//! snapshot: how fast they are made, what each costs at rest, and how they do with a
//! client each at once. See benches/README.md.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Barrier;
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use clap::Parser;
use hdrhistogram::Histogram;
use nbdsnap::client::Client;
use nbdsnap::control::client::ControlClient;
use nbdsnap::control::protocol::{
    Answer, Kind, Order, SnapshotName, SnapshotRemove, StoreToServe, VolumeAdd, VolumesAdd,
    VolumesRemove,
};
use nbdsnap::nbd::uri::ListenAddr;
use nbdsnap_benches::BenchError;
use nbdsnap_benches::plan::Rng;
use nbdsnap_benches::served::{Bench, Served, end, filled, unsuitable};
use serde_json::json;

const BLOCK: usize = 4096;
/// Orders that are given at once, where several are.
const AT_ONCE: usize = 16;

/// Measures many volumes on one shared image, each with a writable snapshot.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// Volumes
    #[arg(long, default_value_t = 1000)]
    volumes: usize,
    /// Volumes that are added by a program each
    #[arg(long, default_value_t = 200)]
    by_program: usize,
    /// Mebibytes of the image
    #[arg(long, default_value_t = 256)]
    size: u64,
    /// Seconds of load
    #[arg(long, default_value_t = 10)]
    time: u64,
    #[command(flatten)]
    bench: Bench,
}

fn main() -> ExitCode {
    end("forks", run(&Options::parse()).map(|()| true))
}

/// A server that begins with what its state names.
struct Server {
    served: Served,
    program: PathBuf,
    folder: PathBuf,
}

impl Server {
    fn start(program: &Path, folder: &Path, volumes: usize) -> Result<Self, BenchError> {
        let args = ["--state".into(), folder.join("state").into()];
        let server = Self {
            served: Served::start(program, folder, &args, 2 * volumes)?,
            program: program.to_owned(),
            folder: folder.to_owned(),
        };
        // Without volumes it prints nothing: it is there when it takes orders.
        let until = Instant::now() + Duration::from_secs(30);
        while server.control().is_err() {
            if Instant::now() > until {
                return Err(BenchError::Unsuitable("the server takes no orders".into()));
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(server)
    }

    fn control(&self) -> Result<ControlClient, BenchError> {
        self.served.orders()
    }

    fn order(&self, order: Order) -> Result<Answer, BenchError> {
        self.control()?.order(order).map_err(unsuitable("an order"))
    }

    fn attach(&self, volume: usize) -> Result<Client, BenchError> {
        let uri = ListenAddr::Unix(self.served.socket.clone()).uri(&format!("fork{volume}@w"));
        Client::connect(&uri).map_err(unsuitable("a client"))
    }

    fn volume(&self, number: usize) -> VolumeAdd {
        VolumeAdd {
            name: format!("fork{number}"),
            disk: self.folder.join("base.img"),
            read_only: false,
            shared: true,
            snapshots: vec![StoreToServe {
                snapshot: "w".into(),
                cow: self.folder.join(format!("{number}.cow")),
                size_bytes: None,
                chunk_bytes: None,
                kind: Kind::default(),
                read_only: false,
                format: false,
                adopt: false,
            }],
            without: Vec::new(),
        }
    }

    /// The program that adds one volume.
    fn program(&self, number: usize) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(["volume", "add", "--shared"])
            .arg(format!("fork{number}={}/base.img", self.folder.display()))
            .arg("--snapshot")
            .arg(format!(
                "fork{number}@w={}/{number}.cow",
                self.folder.display()
            ))
            .arg("--control")
            .arg(self.folder.join("control"))
            .stdout(Stdio::null());
        command
    }

    fn remove(&self, volumes: usize) -> Result<(), BenchError> {
        let names: Vec<String> = (0..volumes).map(|number| format!("fork{number}")).collect();
        let snapshots = names.iter().map(|volume| SnapshotName {
            volume: volume.clone(),
            snapshot: "w".into(),
        });
        self.order(Order::SnapshotRemove(SnapshotRemove {
            snapshots: snapshots.collect(),
            delete_cow: true,
        }))?;
        self.order(Order::VolumesRemove(VolumesRemove {
            names,
            force: false,
        }))?;
        Ok(())
    }

    /// A number of `/proc/PID/status`.
    fn status(&self, field: &str) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.served.id()));
        let text = text.unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix(field));
        let word = line.and_then(|line| line.split_whitespace().nth(1));
        word.and_then(|word| word.parse().ok()).unwrap_or(0)
    }
}

/// One way to add volumes, and how many a second came of it.
struct Rate {
    way: &'static str,
    volumes: usize,
    seconds: f64,
}

impl Rate {
    fn of(
        way: &'static str,
        volumes: usize,
        work: impl FnOnce() -> Result<(), BenchError>,
    ) -> Result<Self, BenchError> {
        let began = Instant::now();
        work()?;
        let seconds = began.elapsed().as_secs_f64();
        Ok(Self {
            way,
            volumes,
            seconds,
        })
    }

    fn a_second(&self) -> f64 {
        self.volumes as f64 / self.seconds
    }
}

/// Share the numbers up to `volumes` out to so many threads, each of which works off
/// its own one by one.
fn shared_out(
    volumes: usize,
    work: impl Fn(&mut dyn Iterator<Item = usize>) -> Result<(), BenchError> + Sync,
) -> Result<(), BenchError> {
    let results = thread::scope(|scope| {
        let threads: Vec<_> = (0..AT_ONCE)
            .map(|first| {
                let work = &work;
                scope.spawn(move || work(&mut (first..volumes).step_by(AT_ONCE)))
            })
            .collect();
        let ends = threads.into_iter().map(ScopedJoinHandle::join);
        ends.map(|end| end.expect("it does not panic"))
            .collect::<Vec<_>>()
    });
    results.into_iter().collect()
}

fn add_on_one_connection(
    server: &Server,
    numbers: &mut dyn Iterator<Item = usize>,
) -> Result<(), BenchError> {
    let mut control = server.control()?;
    for number in numbers {
        let order = Order::VolumeAdd(server.volume(number));
        control.order(order).map_err(unsuitable("an order"))?;
    }
    Ok(())
}

fn add_by_programs(
    server: &Server,
    numbers: &mut dyn Iterator<Item = usize>,
) -> Result<(), BenchError> {
    for number in numbers {
        let status = server.program(number).status();
        if !status.is_ok_and(|status| status.success()) {
            return Err(BenchError::Unsuitable("an order was refused".into()));
        }
    }
    Ok(())
}

/// What volumes cost that do nothing.
struct Rest {
    bytes_each: u64,
    threads: u64,
}

/// Every way that takes more than one order.
fn by_many_orders(options: &Options, server: &Server) -> Result<Vec<Rate>, BenchError> {
    let (all, few) = (options.volumes, options.by_program.min(options.volumes));
    let mut rates = Vec::new();
    rates.push(Rate::of("a program each, one by one", few, || {
        add_by_programs(server, &mut (0..few))
    })?);
    server.remove(few)?;
    rates.push(Rate::of("a program each, 16 at once", few, || {
        shared_out(few, |numbers| add_by_programs(server, numbers))
    })?);
    server.remove(few)?;
    rates.push(Rate::of("one connection, one by one", all, || {
        add_on_one_connection(server, &mut (0..all))
    })?);
    server.remove(all)?;
    rates.push(Rate::of("16 connections at once", all, || {
        shared_out(all, |numbers| add_on_one_connection(server, numbers))
    })?);
    server.remove(all)?;
    Ok(rates)
}

fn one_order(options: &Options, server: &Server) -> Result<(Rate, Rest), BenchError> {
    server.order(Order::VolumeAdd(server.volume(0)))?;
    let before = server.status("VmRSS");
    let volumes = (1..options.volumes)
        .map(|number| server.volume(number))
        .collect();
    let rate = Rate::of("one order for all", options.volumes - 1, || {
        let order = Order::VolumesAdd(VolumesAdd { volumes });
        server.order(order).map(|_| ())
    })?;
    let more = server.status("VmRSS").saturating_sub(before) << 10;
    let rest = Rest {
        bytes_each: more / (options.volumes as u64 - 1).max(1),
        threads: server.status("Threads"),
    };
    Ok((rate, rest))
}

/// What the clients saw.
struct Load {
    requests: u64,
    seconds: f64,
    /// Median and 99th percentile, in milliseconds.
    reads: (f64, f64),
    /// The same.
    writes: (f64, f64),
    threads: u64,
}

/// For microseconds, up to ten minutes.
fn times() -> Result<Histogram<u64>, BenchError> {
    Histogram::new_with_bounds(1, 600_000_000, 2).map_err(unsuitable("a histogram"))
}

/// A client for each volume, all at once, each with one request at a time: reads and
/// writes by turns, which are mostly first writes.
fn load(options: &Options, server: &Server) -> Result<Load, BenchError> {
    let begin = Barrier::new(options.volumes + 1);
    let blocks = (options.size << 20) / BLOCK as u64;
    let time = Duration::from_secs(options.time);
    let one = |number: usize| -> Result<[Histogram<u64>; 2], BenchError> {
        let attached = server.attach(number);
        begin.wait();
        let mut client = attached?;
        let mut rng = Rng::new(options.bench.seed + number as u64);
        let mut seen = [times()?, times()?];
        let block = [number as u8; BLOCK];
        let until = Instant::now() + time;
        let mut count = 0;
        while Instant::now() < until {
            let at = rng.below(blocks) * BLOCK as u64;
            let sent = Instant::now();
            if count % 2 == 0 {
                client
                    .write(at, &block, false)
                    .map_err(unsuitable("a write"))?;
            } else {
                client
                    .read(at, BLOCK as u32)
                    .map_err(unsuitable("a read"))?;
            }
            seen[count % 2].saturating_record(sent.elapsed().as_micros() as u64);
            count += 1;
        }
        Ok(seen)
    };
    let (results, threads) = thread::scope(|scope| {
        let clients: Vec<_> = (0..options.volumes)
            .map(|number| {
                let builder = thread::Builder::new().stack_size(256 << 10);
                let started = builder.spawn_scoped(scope, move || one(number));
                started.expect("a thread for each client")
            })
            .collect();
        begin.wait();
        thread::sleep(time / 2);
        let threads = server.status("Threads");
        let ends = clients.into_iter().map(ScopedJoinHandle::join);
        let results: Result<Vec<_>, _> = ends.map(|end| end.expect("it does not panic")).collect();
        (results, threads)
    });
    let (mut writes, mut reads) = (times()?, times()?);
    for [of_writes, of_reads] in results? {
        let added = writes.add(of_writes).and_then(|()| reads.add(of_reads));
        added.map_err(unsuitable("a histogram"))?;
    }
    let spread = |all: &Histogram<u64>| {
        let at = |part| all.value_at_quantile(part) as f64 / 1000.0;
        (at(0.5), at(0.99))
    };
    Ok(Load {
        requests: reads.len() + writes.len(),
        seconds: options.time as f64,
        reads: spread(&reads),
        writes: spread(&writes),
        threads,
    })
}

fn run(options: &Options) -> Result<(), BenchError> {
    let (folder, program) = (options.bench.folder()?, options.bench.program()?);
    filled(&folder.path().join("base.img"), options.size << 20)?;
    let server = Server::start(&program, folder.path(), 0)?;
    let mut rates = by_many_orders(options, &server)?;
    drop(server);
    // What memory it takes shows in a server that has nothing behind it.
    let server = Server::start(&program, folder.path(), 0)?;
    let (rate, rest) = one_order(options, &server)?;
    rates.push(rate);
    let load = load(options, &server)?;
    drop(server);
    let restart = Rate::of("a restart", options.volumes, || {
        Server::start(&program, folder.path(), options.volumes).map(drop)
    })?;
    report(options, &rates, &rest, &load, &restart);
    Ok(())
}

fn report(options: &Options, rates: &[Rate], rest: &Rest, load: &Load, restart: &Rate) {
    let per_second = load.requests as f64 / load.seconds;
    if options.bench.json {
        let rates: Vec<_> = rates
            .iter()
            .map(
                |one| json!({"way": one.way, "volumes": one.volumes, "per_second": one.a_second()}),
            )
            .collect();
        let result = json!({
            "added": rates,
            "at_rest": {"bytes_each": rest.bytes_each, "threads": rest.threads},
            "load": {
                "clients": options.volumes, "requests_per_second": per_second,
                "reads": {"median_ms": load.reads.0, "p99_ms": load.reads.1},
                "writes": {"median_ms": load.writes.0, "p99_ms": load.writes.1},
                "threads": load.threads,
            },
            "restart_seconds": restart.seconds,
        });
        println!("{result}");
        return;
    }
    println!("volumes with a snapshot each, added:");
    for one in rates {
        let (way, volumes, rate) = (one.way, one.volumes, one.a_second());
        println!("  {way:<28}{volumes:>6}{rate:>10.0} a second");
    }
    println!(
        "at rest: {:.1} KiB of memory each, {} threads",
        rest.bytes_each as f64 / 1024.0,
        rest.threads
    );
    println!(
        "{} clients at once, reads and writes of 4 KiB: {per_second:.0} requests a second, reads median {:.1} ms, p99 {:.1} ms, writes median {:.0} ms, p99 {:.0} ms, {} threads",
        options.volumes, load.reads.0, load.reads.1, load.writes.0, load.writes.1, load.threads
    );
    println!(
        "all of them served again after a kill: {:.2} s",
        restart.seconds
    );
}
