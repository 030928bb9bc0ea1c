//! `peers`: the same loads on nbdsnap and on other servers, side by side.
//!
//! A shared machine is never twice the same, so only what ran next to each
//! other is compared: in each turn every server of a case gets the same load
//! once, one after the other, beginning with another one each turn; the ratio is
//! taken turn by turn. Every reply is checked, written blocks are read back, and
//! the view that had to stay as it was is compared as a whole.
//!
//! | module | owns |
//! |---|---|
//! | `cases` | which load goes to which servers |
//! | `contender` | how each server is started, and what its exports are called |
//! | `server` | a server's process: started, ready, stopped |
//! | `turn` | the files, and one measurement from an empty store to its checks |
//! | `report` | medians and ratios, for people and as JSON |

mod cases;
mod contender;
mod report;
mod server;
mod turn;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use nbdsnap::cli::size::parse as parse_size;
use nbdsnap_benches::BenchError;

use cases::{CASES, Case};
use contender::Contender;
use report::Report;
use turn::Bench;

/// Measures nbdsnap side by side with nbdkit and QEMU, in alternating turns.
///
/// Servers that are not installed are left out, and named. See benches/README.md
/// for how to read the result.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Options {
    /// Cases to run; default: all of them
    #[arg(value_name = "CASE")]
    cases: Vec<String>,
    /// List the cases
    #[arg(long)]
    list: bool,
    /// Turns of each case
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    turns: u32,
    /// Seconds to measure in each turn (first writes end by themselves)
    #[arg(long, default_value_t = 2.0)]
    time: f64,
    /// Seconds to wait before each measurement, at most, for other processes to leave the machine alone
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    wait_quiet: u64,
    /// Size of the disk
    #[arg(long, value_parser = parse_size, default_value = "512M")]
    size: u64,
    /// The program nbdsnap; default: beside this one
    #[arg(long, value_name = "PATH")]
    nbdsnap: Option<PathBuf>,
    /// Folder on the file system to be measured; default: that for temporary files
    #[arg(long, value_name = "FOLDER")]
    dir: Option<PathBuf>,
    /// Ask for structured replies
    #[arg(long)]
    structured: bool,
    /// Fail if a case with a bar is below it
    #[arg(long)]
    check_bar: bool,
    /// Print JSON, with every turn
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if options.list {
        for case in CASES {
            println!("{:<22} {}", case.name, case.title());
        }
        return ExitCode::SUCCESS;
    }
    match run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("peers: {error}");
            ExitCode::FAILURE
        }
    }
}

/// False if a bar was asked for and missed.
fn run(options: &Options) -> Result<bool, BenchError> {
    let cases = chosen(&options.cases)?;
    let measure = Duration::try_from_secs_f64(options.time)
        .map_err(|error| BenchError::Unsuitable(format!("--time {}: {error}", options.time)))?;
    if cfg!(debug_assertions) {
        eprintln!("peers: this is a debug build; its numbers mean nothing");
    }
    let programs = server::Programs::find(options.nbdsnap.as_deref());
    let bench = Bench::set_up(options, measure, &programs)?;
    let mut report = Report::new(options.json, &programs);
    for case in cases {
        let (present, absent): (Vec<Contender>, Vec<Contender>) = case
            .contenders
            .iter()
            .partition(|contender| programs.has(**contender));
        report.begin(case, &absent);
        for turn in 0..options.turns {
            // Another one begins each turn: whoever runs behind a write finds a busier disk.
            for place in 0..present.len() {
                let contender = present[(place + turn as usize) % present.len()];
                let measured = bench.turn(case, contender, turn)?;
                report.add(contender, turn, measured);
            }
        }
        report.end();
    }
    report.finish();
    Ok(!options.check_bar || report.bars_held())
}

fn chosen(names: &[String]) -> Result<Vec<&'static Case>, BenchError> {
    if names.is_empty() {
        return Ok(CASES.iter().collect());
    }
    let find = |name: &String| {
        CASES
            .iter()
            .find(|case| case.name == name)
            .ok_or_else(|| BenchError::Unsuitable(format!("no case {name}; see --list")))
    };
    names.iter().map(find).collect()
}
