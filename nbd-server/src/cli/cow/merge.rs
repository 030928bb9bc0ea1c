//! `nbdsnap cow merge`.

use std::path::PathBuf;

use clap::{Args, ValueHint};

use super::progress::Progress;
use super::{Ended, counted, print};
use crate::cow::merge;
use crate::cow::open::disk_bytes;
use crate::disks::shown;

/// Roll a disk back to a snapshot, without a server.
///
/// The disk becomes what the snapshot shows, and the store is empty then and of no
/// more use. Other snapshots of the disk keep what they show: the copies that they need
/// are made first. What is cut off, by a crash or a signal, goes on when the same
/// command is run again, or when the disk is served; until then the disk is a mixture.
/// A merge that the kernel or LVM began goes on too.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  nbdsnap cow merge monday.cow --origin disk.img
  nbdsnap cow merge /dev/vg/cow --origin /dev/vg/disk --adopt    the kernel made it")]
pub(super) struct MergeArgs {
    /// The store of the snapshot.
    #[arg(value_name = "COW", value_hint = ValueHint::FilePath)]
    cow: PathBuf,
    /// The disk.
    #[arg(long, value_name = "DISK", value_hint = ValueHint::FilePath)]
    origin: PathBuf,
    /// The store has seen every write to the disk since its instant, though the disk's
    /// list of stores does not name it: the kernel or LVM had them both.
    #[arg(long)]
    adopt: bool,
    /// Give another store of the disk up: its snapshot is wrong from then on.
    #[arg(long, value_name = "COW", value_hint = ValueHint::FilePath)]
    without: Vec<PathBuf>,
}

/// The verb.
pub(super) fn run(args: &MergeArgs, quiet: bool) -> Result<(), Ended> {
    let mut bar = Progress::new("merging", disk_bytes(&args.cow)?, quiet);
    let wanted = merge::Wanted {
        cow: &args.cow,
        origin: &args.origin,
        adopt: args.adopt,
        without: &args.without,
    };
    let chunks = merge::run(wanted, &mut |done| bar.done(done))?;
    drop(bar);
    if !quiet {
        print(&format!(
            "{}: rolled back to the snapshot, {} merged; {} is of no more use\n",
            shown(&args.origin),
            counted(chunks, "chunk", "chunks"),
            shown(&args.cow)
        ))?;
    }
    Ok(())
}
