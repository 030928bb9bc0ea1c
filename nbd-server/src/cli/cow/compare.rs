//! `nbdsnap cow diff`.

use std::path::PathBuf;

use clap::{Args, ValueHint};

use super::map::print_ranges;
use super::progress::Progress;
use super::{Ended, Printing, Source};
use crate::cow::CowError;
use crate::cow::diff;
use crate::cow::open::disk_bytes;
use crate::cow::ranges::RangeReport;

/// List the ranges in which a snapshot and its disk, or two snapshots of one disk,
/// differ.
///
/// By the metadata they may differ where either has a copy: exact to the chunk, and
/// quick. With --content the bytes there are compared: exact to the sector. A line is
/// an offset and a length, in bytes.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  nbdsnap cow diff monday.cow --origin disk.img             since monday
  nbdsnap cow diff monday.cow tuesday.cow --origin disk.img --content
  nbdsnap cow diff monday.cow --origin disk.img --json      a list of {offset, length}")]
pub(super) struct DiffArgs {
    #[command(flatten)]
    source: Source,
    /// The store of another snapshot of the same disk; without it, the disk itself.
    #[arg(value_name = "COW2", value_hint = ValueHint::FilePath)]
    other: Option<PathBuf>,
    /// The disk.
    #[arg(long, value_name = "DISK", value_hint = ValueHint::FilePath)]
    origin: Option<PathBuf>,
    /// Compare the bytes.
    #[arg(long, requires = "origin")]
    content: bool,
    #[command(flatten)]
    printing: Printing,
}

/// The verb.
pub(super) fn run(args: &DiffArgs, quiet: bool) -> Result<(), Ended> {
    let (cow, other) = (&args.source.cow, args.other.as_deref());
    let reading = args.source.reading(quiet);
    let ranges = match (&args.origin, args.content) {
        (Some(origin), true) => {
            let total = disk_bytes(cow)?.min(disk_bytes(origin)?);
            let mut progress = Progress::new("comparing", total, quiet);
            diff::by_content(cow, other, origin, reading, &mut |done| progress.done(done))?
        }
        (None, true) => {
            return Err(CowError::Senseless("--content needs --origin DISK".into()).into());
        }
        (origin, false) => diff::by_metadata(cow, other, origin.as_deref(), reading)?,
    };
    let ranges = ranges.into_iter().map(RangeReport::from);
    Ok(print_ranges(ranges, args.printing.json)?)
}
