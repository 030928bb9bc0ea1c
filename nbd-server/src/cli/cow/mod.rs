//! `nbdsnap cow`: offline work on COW stores. One file for verbs that belong
//! together; the work itself is in `crate::cow`.
//!
//! Exit statuses: 0 fine, 1 problems found, refused or failed, 2 an argument that
//! makes no sense. With `-q` only the status speaks.

mod check;
mod compare;
mod dump;
mod inspect;
mod make;
mod map;
mod merge;
mod progress;
mod size;

use std::io::{BufWriter, StdoutLock, Write};
use std::path::PathBuf;

use clap::{Args, Subcommand, ValueHint};
use nbdsnap_format::ChunkSize;
use serde::Serialize;

use super::Failure;
use super::size as sizes;
use crate::cow::{CowError, Reading};

/// Look into, check, mend and use COW stores that no server has open.
///
/// Stores of dm-snapshot's layout: those of nbdsnap, of the kernel (dmsetup, kind P or
/// PO) and of LVM, as files or block devices. A store that somebody has open is
/// refused. Nothing is written to it unless the verb says so.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  nbdsnap cow inspect monday.cow --origin disk.img     what it is, and where changes lie
  nbdsnap cow check /dev/vg/snap-cow                   is it sound? status 1 if not
  nbdsnap cow map monday.cow --changed --json          ranges for a backup program
  nbdsnap cow extract monday.cow --origin disk.img -o monday.img
  nbdsnap cow merge monday.cow --origin disk.img       roll the disk back
  nbdsnap cow repair broken.cow -o saved.cow --origin disk.img

Of an LVM snapshot the store is the hidden volume SNAP-cow, in /dev/mapper while the
snapshot is active; deactivate it first, or look at it with --force-read.")]
pub(super) struct CowArgs {
    #[command(subcommand)]
    verb: CowVerb,
}

#[derive(Debug, Subcommand)]
enum CowVerb {
    Inspect(inspect::InspectArgs),
    Map(map::MapArgs),
    Check(check::CheckArgs),
    Diff(compare::DiffArgs),
    Dump(dump::DumpArgs),
    Restore(dump::RestoreArgs),
    Create(make::CreateArgs),
    Size(size::SizeArgs),
    Extract(make::ExtractArgs),
    Merge(merge::MergeArgs),
    Repair(make::RepairArgs),
    Shrink(make::ResizeArgs),
    Grow(make::GrowArgs),
    Convert(make::ConvertArgs),
}

/// The verb.
pub(super) fn run(args: CowArgs, quiet: bool) -> Result<(), Failure> {
    let ended = match args.verb {
        CowVerb::Inspect(args) => inspect::run(&args, quiet),
        CowVerb::Map(args) => map::run(&args, quiet),
        CowVerb::Check(args) => check::run(&args, quiet),
        CowVerb::Diff(args) => compare::run(&args, quiet),
        CowVerb::Dump(args) => dump::run(&args),
        CowVerb::Restore(args) => dump::restore(&args, quiet),
        CowVerb::Create(args) => make::create(&args, quiet),
        CowVerb::Size(args) => size::run(&args),
        CowVerb::Extract(args) => make::extract(&args, quiet),
        CowVerb::Merge(args) => merge::run(&args, quiet),
        CowVerb::Repair(args) => make::repair(&args, quiet),
        CowVerb::Shrink(args) => make::shrink(&args, quiet),
        CowVerb::Grow(args) => make::grow(&args, quiet),
        CowVerb::Convert(args) => make::convert(&args, quiet),
    };
    match ended {
        // Whoever reads the answer has enough of it.
        Ok(()) | Err(Ended::Cow(CowError::OutputClosed)) => Ok(()),
        Err(Ended::Cow(CowError::Senseless(message))) => Err(Failure::Usage(message)),
        Err(Ended::Cow(error)) => Err(Failure::refused(error)),
        Err(Ended::Failure(failure)) => Err(failure),
    }
}

/// How a verb ended, other than well.
#[derive(Debug)]
enum Ended {
    /// By an error of the tools.
    Cow(CowError),
    /// As any verb may.
    Failure(Failure),
}

impl From<CowError> for Ended {
    fn from(error: CowError) -> Self {
        Self::Cow(error)
    }
}

impl From<Failure> for Ended {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

/// The store that a verb reads, and how it is read.
#[derive(Clone, Debug, Args)]
struct Source {
    /// The COW store: a file or a block device.
    #[arg(value_name = "COW", value_hint = ValueHint::FilePath)]
    cow: PathBuf,

    /// Read it even while somebody has it open for writing. It may change meanwhile,
    /// so that what is said of it may be wrong.
    #[arg(long, display_order = 800)]
    force_read: bool,
}

impl Source {
    /// How it is read; says what that means.
    fn reading(&self, quiet: bool) -> Reading {
        if !self.force_read {
            return Reading::Alone;
        }
        if !quiet {
            let path = crate::disks::shown(&self.cow);
            let _ = writeln!(
                std::io::stderr(),
                "nbdsnap: {path}: read without a lock: it may be changing, and what follows may be wrong"
            );
        }
        Reading::Forced
    }
}

/// How a report is printed.
#[derive(Clone, Copy, Debug, Args)]
struct Printing {
    /// Print JSON instead of a table.
    #[arg(long, display_order = 801)]
    json: bool,
}

/// Standard output, for much text.
fn out() -> BufWriter<StdoutLock<'static>> {
    BufWriter::with_capacity(64 << 10, std::io::stdout().lock())
}

/// Print text.
fn print(text: &str) -> Result<(), CowError> {
    let mut out = out();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(CowError::output)
}

/// Print one JSON document.
fn print_json(value: &impl Serialize) -> Result<(), CowError> {
    let mut out = out();
    serde_json::to_writer_pretty(&mut out, value)
        .map_err(std::io::Error::from)
        .and_then(|()| out.write_all(b"\n"))
        .and_then(|()| out.flush())
        .map_err(CowError::output)
}

/// Print a JSON list, an element a line, as its elements come.
fn print_json_lines<T: Serialize>(items: impl Iterator<Item = T>) -> Result<(), CowError> {
    let mut out = out();
    let mut separator = "[\n  ";
    let write = || -> std::io::Result<()> {
        for item in items {
            out.write_all(separator.as_bytes())?;
            serde_json::to_writer(&mut out, &item)?;
            separator = ",\n  ";
        }
        out.write_all(if separator == "[\n  " {
            b"[]\n"
        } else {
            b"\n]\n"
        })?;
        out.flush()
    };
    write().map_err(CowError::output)
}

/// Names and what they stand for, in two columns.
fn fields(rows: &[(&str, String)]) -> String {
    use std::fmt::Write;
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    rows.iter().fold(String::new(), |mut text, (name, value)| {
        let _ = writeln!(text, "  {name:width$}  {value}");
        text
    })
}

/// `1 area`, `2 areas`.
fn counted(count: u64, one: &str, several: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { several })
}

/// A share in per cent, as precise as people want it: no change is `0 %`, and any
/// change is more.
fn percent(share: f64) -> String {
    let percent = share * 100.0;
    if percent == 0.0 {
        "0 %".into()
    } else if percent < 0.1 {
        "less than 0.1 %".into()
    } else if percent < 100.0 && percent > 99.9 {
        "more than 99.9 %".into()
    } else if percent >= 100.0 {
        "100 %".into()
    } else {
        format!("{percent:.1} %")
    }
}

/// A chunk size on the command line.
fn parse_chunk(text: &str) -> Result<ChunkSize, String> {
    let bytes = sizes::parse(text).map_err(|error| error.to_string())?;
    ChunkSize::from_bytes(bytes)
        .map_err(|error| format!("{error}: use a power of two from 1 sector (1s) to 1G"))
}

/// A size on the command line.
fn parse_size(text: &str) -> Result<u64, sizes::SizeError> {
    sizes::parse(text)
}
