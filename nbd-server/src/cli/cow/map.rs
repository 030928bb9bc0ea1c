//! `nbdsnap cow map`.

use std::io::Write;
use std::path::PathBuf;

use clap::{Args, ValueHint};
use nbdsnap_format::Runs;

use super::{Ended, Printing, Source, out, print_json_lines};
use crate::cow::open::disk_bytes;
use crate::cow::ranges::{self, Order, RangeReport, RunReport};
use crate::cow::{CowError, CowStore};

/// List every run of exceptions: which range of the origin lies where in the store.
///
/// Offsets and lengths are in bytes, chunks are counted from 0. With --changed only
/// the ranges of the origin, joined where they touch: what a backup program has to
/// copy. Without --origin the last one may reach past the end of the disk.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  nbdsnap cow map monday.cow
  nbdsnap cow map monday.cow --order store --json
  nbdsnap cow map monday.cow --changed --origin disk.img |
      while read -r offset length; do echo \"$length bytes at $offset\"; done

--json prints a list of objects: origin_offset, length, cow_offset, old_chunk,
new_chunk, chunks; with --changed: offset, length. Fields are added, never renamed.")]
pub(super) struct MapArgs {
    #[command(flatten)]
    source: Source,
    /// The disk, for its size: the last range ends where it ends. It may be in use.
    #[arg(long, value_name = "DISK", value_hint = ValueHint::FilePath)]
    origin: Option<PathBuf>,
    /// Only which ranges of the origin have changed.
    #[arg(long, conflicts_with = "order")]
    changed: bool,
    /// In which order.
    #[arg(long, value_enum, default_value_t = ListOrder::Origin)]
    order: ListOrder,
    #[command(flatten)]
    printing: Printing,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum ListOrder {
    /// As they lie on the origin.
    Origin,
    /// As their data lies in the store.
    Store,
    /// As they were made.
    List,
}

impl From<ListOrder> for Order {
    fn from(order: ListOrder) -> Self {
        match order {
            ListOrder::Origin => Self::Origin,
            ListOrder::Store => Self::Store,
            ListOrder::List => Self::List,
        }
    }
}

/// The verb.
pub(super) fn run(args: &MapArgs, quiet: bool) -> Result<(), Ended> {
    let store = CowStore::open(&args.source.cow, args.source.reading(quiet))?;
    let origin_bytes = args.origin.as_deref().map(disk_bytes).transpose()?;
    let exceptions = ranges::exceptions(&store, args.order.into())?;
    if args.changed {
        let ranges = ranges::changed(&store, &exceptions, origin_bytes).map(RangeReport::from);
        return Ok(print_ranges(ranges, args.printing.json)?);
    }
    let runs =
        Runs::of(exceptions.iter().copied()).map(|run| ranges::report(&store, run, origin_bytes));
    if args.printing.json {
        return Ok(print_json_lines(runs)?);
    }
    Ok(print_runs(runs).map_err(CowError::output)?)
}

fn print_runs(runs: impl Iterator<Item = RunReport>) -> std::io::Result<()> {
    let mut out = out();
    writeln!(
        out,
        "{:>16} {:>14} {:>16} {:>12} {:>12} {:>8}",
        "ORIGIN OFFSET", "LENGTH", "STORE OFFSET", "OLD CHUNK", "NEW CHUNK", "CHUNKS"
    )?;
    for run in runs {
        let RunReport {
            origin_offset,
            length,
            cow_offset,
            old_chunk,
            new_chunk,
            chunks,
        } = run;
        writeln!(
            out,
            "{origin_offset:>16} {length:>14} {cow_offset:>16} {old_chunk:>12} {new_chunk:>12} {chunks:>8}"
        )?;
    }
    out.flush()
}

/// Ranges as a program reads them: offset and length on a line.
pub(super) fn print_ranges(
    ranges: impl Iterator<Item = RangeReport>,
    json: bool,
) -> Result<(), CowError> {
    if json {
        return print_json_lines(ranges);
    }
    let mut out = out();
    let write = || -> std::io::Result<()> {
        for RangeReport { offset, length } in ranges {
            writeln!(out, "{offset} {length}")?;
        }
        out.flush()
    };
    write().map_err(CowError::output)
}
