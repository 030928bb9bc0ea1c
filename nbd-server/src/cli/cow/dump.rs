//! `nbdsnap cow dump` and `nbdsnap cow restore`.

use std::fs::File;
use std::io::{BufReader, Write};
use std::path::{Path, PathBuf};

use clap::{Args, ValueHint};

use super::{Ended, Source, counted, out, print};
use crate::cow::dump::{self, Format};
use crate::cow::restore::{self, Place};
use crate::cow::{CowError, CowStore};

/// Print a store's metadata, so that a person or a program can read and edit them.
///
/// 'restore' makes the same bytes of it. The data is not in it.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  nbdsnap cow dump monday.cow > monday.txt
  nbdsnap cow dump monday.cow --format json | jq '.runs | length'

The text: 'store' with the header's fields and the length of the store; 'run 100 -> 2
x16' for 16 exceptions, origin chunks from 100 on at store chunks from 2 on; 'stale
0/32: 9 -> 19' for an entry behind the end of the list (area 0, entry 32), which damage
or a power cut left; 'end'. JSON and XML say the same.")]
pub(super) struct DumpArgs {
    #[command(flatten)]
    source: Source,
    /// In which form.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

/// Make a store of a dump's metadata.
///
/// The store is a new file as long as the dump says, or a block device. Its chunks of
/// data are holes unless --data names the store that has them. With --in-place the
/// store that is there keeps its data and gets the dump's metadata: dump, edit,
/// restore.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  nbdsnap cow restore monday.txt --output new.cow --data monday.cow
  nbdsnap cow dump a.cow > a.txt; edit a.txt; nbdsnap cow restore a.txt --output a.cow --in-place")]
pub(super) struct RestoreArgs {
    /// The dump, in any of its forms; '-' is standard input.
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    dump: PathBuf,
    /// The store to be made: a file that does not exist, or a block device.
    #[arg(short, long, value_name = "COW", value_hint = ValueHint::FilePath)]
    output: PathBuf,
    /// Replace the metadata of the store at --output, and leave its data alone.
    #[arg(long, conflicts_with_all = ["data", "force"])]
    in_place: bool,
    /// Take the data from this store, at the places that the dump names.
    #[arg(long, value_name = "COW", value_hint = ValueHint::FilePath)]
    data: Option<PathBuf>,
    /// Overwrite whatever a block device holds.
    #[arg(long)]
    force: bool,
    /// Make also a store that is damaged: misplaced exceptions, two for one chunk,
    /// stale entries.
    #[arg(long)]
    damaged: bool,
}

/// The verb 'dump'.
pub(super) fn run(args: &DumpArgs) -> Result<(), Ended> {
    let store = CowStore::open(&args.source.cow, args.source.reading(false))?;
    let mut out = out();
    dump::run(&store, args.format, &mut out)?;
    out.flush().map_err(CowError::output)?;
    Ok(())
}

/// The verb 'restore'.
pub(super) fn restore(args: &RestoreArgs, quiet: bool) -> Result<(), Ended> {
    let read = if args.dump == Path::new("-") {
        dump::read(std::io::stdin().lock(), &args.dump)?
    } else {
        let file = File::open(&args.dump).map_err(|error| CowError::Io {
            path: args.dump.clone(),
            doing: "opening it",
            offset: 0,
            error,
        })?;
        dump::read(BufReader::with_capacity(64 << 10, file), &args.dump)?
    };
    let place = if args.in_place {
        Place::InPlace(&args.output)
    } else {
        Place::New {
            path: &args.output,
            force: args.force,
        }
    };
    restore::run(&read, &args.dump, place, args.data.as_deref(), args.damaged)?;
    if !quiet {
        let count = read.runs.iter().map(|run| run.chunks).sum();
        print(&format!(
            "{}: made, with {}\n",
            crate::disks::shown(&args.output),
            counted(count, "exception", "exceptions")
        ))?;
    }
    Ok(())
}
