//! `nbdload`: one load against one server that is running. See benches/README.md.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use nbdsnap::cli::size::{parse as parse_size, show as show_size};
use nbdsnap::nbd::uri::{ListenAddr, NbdUri, UriError};
use nbdsnap_benches::BenchError;
use nbdsnap_benches::answerer::answer;
use nbdsnap_benches::connection::Connection;
use nbdsnap_benches::content::{Content, Stamp};
use nbdsnap_benches::cpu::stay_on;
use nbdsnap_benches::load::{Limit, Load, Measured};
use nbdsnap_benches::plan::{Order, Rng};
use nbdsnap_benches::replies::Command;
use serde_json::json;

/// Loads an NBD server through one connection and measures it.
///
/// Keeps DEPTH requests in flight, sends and receives them in batches from one
/// thread, and checks every reply.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Options {
    /// The server: unix:PATH, HOST:PORT, or an NBD URI
    #[arg(required_unless_present = "ceiling", value_parser = parse_server)]
    address: Option<NbdUri>,
    /// Export; overrides the one of a URI
    #[arg(long)]
    export: Option<String>,
    /// What to do
    #[arg(long, value_enum, default_value_t = Mode::Randread)]
    mode: Mode,
    /// Bytes of a request
    #[arg(long, value_parser = parse_size, default_value = "4K")]
    block: u64,
    /// One block in every so many bytes; default: the block size
    #[arg(long, value_parser = parse_size)]
    stride: Option<u64>,
    /// Requests in flight
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..))]
    depth: u16,
    /// Send when so many new requests can be sent together; default: a quarter of the depth
    #[arg(long)]
    batch: Option<u16>,
    /// Seconds to measure
    #[arg(long, default_value_t = 3.0, conflicts_with = "count")]
    time: f64,
    /// Seconds before measuring; not for --count and first-writes
    #[arg(long, default_value_t = 0.5)]
    warm_up: f64,
    /// Measure so many requests instead of a time
    #[arg(long)]
    count: Option<u64>,
    /// Chooses the blocks, and the bytes that are written
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Compare reads with this file, which is as long as the export
    #[arg(long, value_name = "FILE")]
    check: Option<PathBuf>,
    /// Compare reads with the stamps that a write with the same seed left on the whole export
    #[arg(long, conflicts_with = "check")]
    check_stamps: bool,
    /// After writes, read every written block back and compare it
    #[arg(long)]
    verify: bool,
    /// Ask for structured replies
    #[arg(long)]
    structured: bool,
    /// Microseconds to poll the socket before sleeping; 0: sleep at once
    #[arg(long, default_value_t = 50)]
    poll: u64,
    /// Keep the generator on this processor, counted from 0
    #[arg(long)]
    cpu: Option<usize>,
    /// Process of the server, to measure its CPU time
    #[arg(long)]
    server_pid: Option<u32>,
    /// Measure the generator itself, against a thread that answers from memory
    #[arg(long, conflicts_with_all = ["address", "check", "check_stamps", "export"])]
    ceiling: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Mode {
    /// Random blocks
    Randread,
    /// Random blocks
    Randwrite,
    /// Every block once, in random order
    FirstWrites,
    /// Ascending, from the start again at the end
    Seqread,
    /// Ascending, from the start again at the end
    Seqwrite,
}

/// An NBD URI, or an address, which means its default export.
fn parse_server(text: &str) -> Result<NbdUri, UriError> {
    text.parse()
        .or_else(|_| text.parse::<ListenAddr>().map(|address| address.uri("")))
}

fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nbdload: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<(), BenchError> {
    let load = load(options)?;
    let (mut connection, content) = if options.ceiling {
        ceiling(options)?
    } else {
        server(options)?
    };
    connection
        .transport
        .poll_up_to(Duration::from_micros(options.poll));
    if let Some(processor) = options.cpu {
        stay_on(processor)
            .map_err(|cause| BenchError::Unsuitable(format!("--cpu {processor}: {cause}")))?;
    }
    let (measured, written) = load.run(&mut connection, &content)?;
    let mut verified = None;
    if let (true, Some(written)) = (options.verify, &written) {
        written.verify(&mut connection)?;
        verified = Some(written.blocks());
    }
    connection.close()?;
    if options.json {
        print_json(options, &measured, verified);
    } else {
        print_text(options, &measured, verified);
    }
    Ok(())
}

fn load(options: &Options) -> Result<Load, BenchError> {
    let (command, order) = match options.mode {
        Mode::Randread => (Command::Read, Order::Random),
        Mode::Randwrite => (Command::Write, Order::Random),
        Mode::FirstWrites => (Command::Write, Order::Once),
        Mode::Seqread => (Command::Read, Order::Sequential),
        Mode::Seqwrite => (Command::Write, Order::Sequential),
    };
    let block = u32::try_from(options.block)
        .ok()
        .filter(|&block| block <= 32 << 20)
        .ok_or_else(|| BenchError::Unsuitable("a request has at most 32 MiB".into()))?;
    let seconds = |given: f64| {
        Duration::try_from_secs_f64(given)
            .map_err(|error| BenchError::Unsuitable(format!("{given} s: {error}")))
    };
    let limit = match (options.count, order) {
        (Some(count), _) => Limit::Count(count),
        (None, Order::Once) => Limit::WholePlan,
        (None, _) => Limit::Time {
            warm_up: seconds(options.warm_up)?,
            measure: seconds(options.time)?,
        },
    };
    Ok(Load {
        command,
        order,
        block,
        stride: options.stride.unwrap_or(options.block),
        depth: options.depth,
        batch: options.batch.unwrap_or(options.depth.div_ceil(4)),
        limit,
        seed: options.seed,
        server_pid: options.server_pid,
    })
}

fn server(options: &Options) -> Result<(Connection, Content), BenchError> {
    let mut address = options.address.clone().expect("clap requires it");
    if let Some(export) = &options.export {
        address.export.clone_from(export);
    }
    let content = match &options.check {
        Some(file) => Content::load(file)?,
        None if options.check_stamps => Content::Stamped(Stamp::new(options.seed)),
        None => Content::Unchecked,
    };
    Ok((Connection::open(&address, options.structured)?, content))
}

/// A server in memory, over random bytes that the replies are compared with.
fn ceiling(options: &Options) -> Result<(Connection, Content), BenchError> {
    let mut image = vec![0; 512 << 20];
    Rng::new(options.seed).fill(&mut image);
    let (stream, _thread) = answer(image.clone())
        .map_err(|cause| BenchError::Unsuitable(format!("no thread or socket: {cause}")))?;
    let connection = Connection::over(stream, false)?;
    Ok((connection, Content::Image(image)))
}

fn print_text(options: &Options, measured: &Measured, verified: Option<u64>) {
    let mode = options.mode.to_possible_value().expect("no mode is hidden");
    println!(
        "{}, {}, depth {}",
        mode.get_name(),
        show_size(options.block),
        options.depth
    );
    println!(
        "  {} requests in {:.3} s: {:.0} IOPS, {:.1} MB/s",
        measured.operations,
        measured.elapsed.as_secs_f64(),
        measured.iops(),
        measured.bytes_per_second() / 1e6
    );
    println!(
        "  latency us: p50 {:.1}, p99 {:.1}, max {:.1}",
        measured.latency_us(0.5),
        measured.latency_us(0.99),
        measured.latency_us(1.0)
    );
    if let Some(cpu) = measured.server_cpu_us() {
        println!("  server CPU: {cpu:.2} us a request");
    }
    println!(
        "  the generator was idle {:.0} % of the time",
        measured.idle * 100.0
    );
    if let Some(others) = measured.others {
        println!(
            "  other processes took {:.0} % of the machine",
            others * 100.0
        );
    }
    if let Some(blocks) = verified {
        println!("  {blocks} blocks read back and found right");
    }
}

fn print_json(options: &Options, measured: &Measured, verified: Option<u64>) {
    let mode = options.mode.to_possible_value().expect("no mode is hidden");
    let report = json!({
        "mode": mode.get_name(),
        "block": options.block,
        "depth": options.depth,
        "operations": measured.operations,
        "seconds": measured.elapsed.as_secs_f64(),
        "iops": measured.iops(),
        "bytes_per_second": measured.bytes_per_second(),
        "latency_us": {
            "p50": measured.latency_us(0.5),
            "p99": measured.latency_us(0.99),
            "max": measured.latency_us(1.0),
        },
        "server_cpu_us": measured.server_cpu_us(),
        "generator_idle": measured.idle,
        "others": measured.others,
        "verified_blocks": verified,
    });
    println!("{report}");
}
