//! The verbs of `nbdsnap cow` that make or mend something: `create`, `extract`,
//! `repair`, `shrink`, `grow`, `convert`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::{Args, ValueHint};
use nbdsnap_format::ChunkSize;

use super::super::orders::rough_size;
use super::super::size as sizes;
use super::progress::Progress;
use super::{Ended, Printing, Source, counted, out, parse_chunk, parse_size, print, print_json};
use crate::cli::Failure;
use crate::cow::open::disk_bytes;
use crate::cow::repair::{self, RepairReport};
use crate::cow::rewrite::{self, Wanted};
use crate::cow::view::View;
use crate::cow::{CowError, extract as work, restore};
use crate::disks::shown;

/// Make an empty store, exactly as the kernel initialises one.
///
/// Its snapshot begins when it is first given to the kernel or to nbdsnap, with a
/// disk that is not written before that.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  nbdsnap cow create monday.cow --size 1G --chunk 4K
  nbdsnap cow create /dev/vg/cow")]
pub(super) struct CreateArgs {
    /// A file that does not exist, or a block device.
    #[arg(value_name = "COW", value_hint = ValueHint::FilePath)]
    cow: PathBuf,
    /// How long the file is; a device is as long as it is.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    size: Option<u64>,
    /// The unit of copying: a power of two from 1s to 1G.
    #[arg(long, value_name = "SIZE", default_value = "16K", value_parser = parse_chunk)]
    chunk: ChunkSize,
    /// Overwrite whatever a block device holds.
    #[arg(long)]
    force: bool,
}

/// The verb 'create'.
pub(super) fn create(args: &CreateArgs, quiet: bool) -> Result<(), Ended> {
    if args.size.is_none() && !args.cow.exists() {
        return Err(CowError::Senseless("a new file needs --size SIZE".into()).into());
    }
    let bytes = restore::create(&args.cow, args.size, args.chunk, args.force)?;
    say(
        quiet,
        &format!(
            "{}: an empty store of {}, with chunks of {}\n",
            shown(&args.cow),
            rough_size(Some(bytes)),
            sizes::show(args.chunk.bytes())
        ),
    )
}

/// Write the snapshot as an image of its own.
///
/// The disk and the store are read, and neither is changed. In a file, holes of the
/// disk and long runs of zeros become holes.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  nbdsnap cow extract monday.cow --origin disk.img -o monday.img
  nbdsnap cow extract monday.cow --origin disk.img -o - | zstd > monday.img.zst
  nbdsnap cow extract monday.cow --origin disk.img -o monday.qcow2 --format qcow2")]
pub(super) struct ExtractArgs {
    #[command(flatten)]
    source: Source,
    /// The disk.
    #[arg(long, value_name = "DISK", value_hint = ValueHint::FilePath)]
    origin: PathBuf,
    /// The image: a file that does not exist, a block device, or '-' for standard output.
    #[arg(short, long, value_name = "IMAGE|-", value_hint = ValueHint::FilePath)]
    output: PathBuf,
    /// The form of the image; qcow2 is written by qemu-img.
    #[arg(long, value_enum, default_value_t = ImageFormat::Raw)]
    format: ImageFormat,
    /// Overwrite whatever a block device holds.
    #[arg(long)]
    force: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum ImageFormat {
    /// Byte for byte.
    Raw,
    /// By qemu-img, which has to be installed.
    Qcow2,
}

/// The verb 'extract'.
pub(super) fn extract(args: &ExtractArgs, quiet: bool) -> Result<(), Ended> {
    let to_stdout = args.output == Path::new("-");
    if to_stdout && args.format == ImageFormat::Qcow2 {
        return Err(CowError::Senseless("a qcow2 image cannot go into a pipe".into()).into());
    }
    let reading = args.source.reading(quiet);
    let view = View::open(&args.source.cow, &args.origin, reading)?;
    let mut bar = Progress::new("extracting", view.bytes(), quiet);
    let mut progress = |done| bar.done(done);
    if to_stdout {
        return Ok(work::to_stream(&view, &mut out(), &mut progress)?);
    }
    match args.format {
        ImageFormat::Raw => work::to_file(&view, &args.output, args.force, &mut progress)?,
        ImageFormat::Qcow2 => work::to_qcow2(&view, &args.output, &mut progress)?,
    }
    drop(bar);
    say(
        quiet,
        &format!(
            "{}: the snapshot, {}\n",
            shown(&args.output),
            rough_size(Some(view.bytes()))
        ),
    )
}

/// Save what can be saved of a damaged store.
///
/// Exceptions that point nowhere are left out; of two that contradict each other the
/// earlier is kept; what lies behind the end of the list is scrubbed. Where something
/// was left out the snapshot shows what the disk holds now, which is wrong: those
/// ranges are listed. Exit status 1 if anything was lost.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  nbdsnap cow repair broken.cow --output saved.cow --origin disk.img
  nbdsnap cow repair torn.cow --in-place
  nbdsnap cow repair headless.cow --output saved.cow --chunk 4K")]
pub(super) struct RepairArgs {
    /// The store.
    #[arg(value_name = "COW", value_hint = ValueHint::FilePath)]
    cow: PathBuf,
    /// The sound store: a file that does not exist, or a block device.
    #[arg(short, long, value_name = "NEW", value_hint = ValueHint::FilePath, required_unless_present = "in_place")]
    output: Option<PathBuf>,
    /// Mend the store itself. Its metadata as they were are kept beside it, as
    /// COW.before-repair; those of a block device in the working folder.
    #[arg(long, conflicts_with_all = ["output", "force"])]
    in_place: bool,
    /// The disk, for its size: exceptions outside it are left out.
    #[arg(long, value_name = "DISK", value_hint = ValueHint::FilePath)]
    origin: Option<PathBuf>,
    /// The chunk size, where the header is lost.
    #[arg(long, value_name = "SIZE", value_parser = parse_chunk)]
    chunk: Option<ChunkSize>,
    /// Overwrite whatever a block device holds.
    #[arg(long)]
    force: bool,
    /// Bring back what lies behind a hole in the list, where it can be what a torn write
    /// left; the kernel would not read it. Not after a merge of the store has begun: that
    /// opens such holes, and what lies behind them has been merged.
    #[arg(long)]
    beyond_holes: bool,
    #[command(flatten)]
    printing: Printing,
}

/// The verb 'repair'.
pub(super) fn repair(args: &RepairArgs, quiet: bool) -> Result<(), Ended> {
    let mut bar = Progress::new("copying", disk_bytes(&args.cow)?, quiet);
    let wanted = repair::Wanted {
        cow: &args.cow,
        origin: args.origin.as_deref(),
        output: args.output.as_deref(),
        force: args.force,
        chunk_size: args.chunk,
        beyond_holes: args.beyond_holes,
    };
    let report = repair::run(wanted, &mut |done| bar.done(done))?;
    drop(bar);
    if args.printing.json {
        print_json(&report)?;
    } else if !quiet {
        print(&repaired(&report))?;
    }
    if report.lost_exceptions > 0 || report.doubtful {
        return Err(Failure::Found.into());
    }
    Ok(())
}

fn repaired(report: &RepairReport) -> String {
    let mut text = String::new();
    for loss in &report.lost {
        let _ = writeln!(
            text,
            "lost: {} bytes of the snapshot at {} ({})",
            loss.range.length, loss.range.offset, loss.why
        );
    }
    let unlisted = report.lost_exceptions - report.lost.len() as u64;
    if unlisted > 0 {
        let _ = writeln!(text, "and {} more", counted(unlisted, "chunk", "chunks"));
    }
    for range in &report.regained {
        let _ = writeln!(
            text,
            "brought back from behind a hole: {} bytes of the snapshot at {}",
            range.length, range.offset
        );
    }
    let unlisted = report.regained_exceptions - report.regained.len() as u64;
    if unlisted > 0 {
        let _ = writeln!(text, "and {} more", counted(unlisted, "chunk", "chunks"));
    }
    if report.regained_exceptions > 0 {
        text.push_str("what was in the hole is lost, and nobody knows what it stood for\n");
    }
    if report.header_made {
        text.push_str("the header was made anew\n");
    }
    if report.scrubbed > 0 {
        let _ = writeln!(
            text,
            "{} behind the end of the list scrubbed{}",
            counted(report.scrubbed, "entry", "entries"),
            if report.doubtful {
                ": they may have been exceptions, and then what they stood for is lost"
            } else {
                ", which a power cut had left: nothing is lost with them"
            }
        );
    }
    if let Some(dump) = &report.kept_dump {
        let _ = writeln!(text, "the metadata as they were are kept in {dump}");
    }
    let _ = writeln!(
        text,
        "{}: sound, with {}; {}",
        report.output,
        counted(report.kept, "exception", "exceptions"),
        match report.lost_exceptions {
            0 => "none was lost".into(),
            count => format!("{count} lost"),
        }
    );
    text
}

/// The new store of a verb that rewrites one.
#[derive(Clone, Debug, Args)]
struct NewStore {
    /// The store.
    #[arg(value_name = "COW", value_hint = ValueHint::FilePath)]
    cow: PathBuf,
    /// The new store: a file that does not exist, or a block device.
    #[arg(short, long, value_name = "NEW", value_hint = ValueHint::FilePath)]
    output: PathBuf,
    /// Overwrite whatever a block device holds.
    #[arg(long)]
    force: bool,
}

impl NewStore {
    fn wanted(&self, bytes: Option<u64>) -> Wanted<'_> {
        Wanted {
            output: &self.output,
            bytes,
            force: self.force,
        }
    }

    fn said(&self, bytes: u64, quiet: bool) -> Result<(), Ended> {
        let size = rough_size(Some(bytes));
        say(
            quiet,
            &format!("{}: the same snapshot, in {size}\n", shown(&self.output)),
        )
    }
}

/// Make the same snapshot in a store that is no larger than it has to be.
///
/// The old store stays as it is; once the new one is served instead (with ',adopt'),
/// the old one is of no more use.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  nbdsnap cow shrink monday.cow --output small.cow")]
pub(super) struct ResizeArgs {
    #[command(flatten)]
    new: NewStore,
    /// How long it is; as short as it can be unless said.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    size: Option<u64>,
}

/// Make the same snapshot in a larger store.
///
/// The old store stays as it is; once the new one is served instead (with ',adopt'),
/// the old one is of no more use. A store in a file that only nbdsnap serves grows by
/// itself, and needs this not.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  nbdsnap cow grow monday.cow --size 10G --output large.cow")]
pub(super) struct GrowArgs {
    #[command(flatten)]
    new: NewStore,
    /// How long it is.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    size: u64,
}

/// Make the same snapshot in a store with another chunk size.
///
/// Smaller chunks let later small writes copy less; larger ones need less metadata.
/// What a larger chunk has around a copy comes from the disk.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  nbdsnap cow convert monday.cow --origin disk.img --chunk 64K --output coarse.cow")]
pub(super) struct ConvertArgs {
    #[command(flatten)]
    new: NewStore,
    /// The disk.
    #[arg(long, value_name = "DISK", value_hint = ValueHint::FilePath)]
    origin: PathBuf,
    /// The new chunk size.
    #[arg(long, value_name = "SIZE", value_parser = parse_chunk)]
    chunk: ChunkSize,
    /// How long the store is; as short as it can be unless said.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    size: Option<u64>,
}

/// The verb 'shrink'.
pub(super) fn shrink(args: &ResizeArgs, quiet: bool) -> Result<(), Ended> {
    let old = disk_bytes(&args.new.cow)?;
    if args.size.is_some_and(|size| size > old) {
        return Err(CowError::Senseless(format!(
            "--size is more than the {} of the store: that is 'grow'",
            sizes::show(old)
        ))
        .into());
    }
    resize(&args.new, args.size, quiet)
}

/// The verb 'grow'.
pub(super) fn grow(args: &GrowArgs, quiet: bool) -> Result<(), Ended> {
    let old = disk_bytes(&args.new.cow)?;
    if args.size < old {
        return Err(CowError::Senseless(format!(
            "--size is less than the {} of the store: that is 'shrink'",
            sizes::show(old)
        ))
        .into());
    }
    resize(&args.new, Some(args.size), quiet)
}

fn resize(new: &NewStore, bytes: Option<u64>, quiet: bool) -> Result<(), Ended> {
    let mut bar = Progress::new("copying", disk_bytes(&new.cow)?, quiet);
    let bytes = rewrite::resize(&new.cow, new.wanted(bytes), &mut |done| bar.done(done))?;
    drop(bar);
    new.said(bytes, quiet)
}

/// The verb 'convert'.
pub(super) fn convert(args: &ConvertArgs, quiet: bool) -> Result<(), Ended> {
    let new = &args.new;
    let mut bar = Progress::new("copying", disk_bytes(&new.cow)?, quiet);
    let bytes = rewrite::convert(
        &new.cow,
        &args.origin,
        args.chunk,
        new.wanted(args.size),
        &mut |done| bar.done(done),
    )?;
    drop(bar);
    new.said(bytes, quiet)
}

fn say(quiet: bool, text: &str) -> Result<(), Ended> {
    if !quiet {
        print(text)?;
    }
    Ok(())
}
