//! `nbdsnap cow check`.

use std::fmt::Write;
use std::path::PathBuf;

use clap::{Args, ValueHint};

use super::progress::Progress;
use super::{Ended, Printing, Source, counted, print, print_json};
use crate::cli::Failure;
use crate::cow::check::{self, CheckReport, Verdict};
use crate::cow::open::disk_bytes;

/// Say whether a store is sound, and what the kernel would make of it.
///
/// All of the metadata is read: the header, every exception, and what lies behind the
/// last. Each finding says where it is and what it means. With --origin exceptions
/// outside the disk are found too, and with --contents copies that equal what the disk
/// holds: they were not needed, and are no fault.
///
/// Exit status 0: sound. 1: not, or the snapshot is lost, or it could not be read.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  nbdsnap cow check monday.cow --origin disk.img
  nbdsnap cow check -q monday.cow && echo sound
  nbdsnap cow check monday.cow --json | jq '.findings[].code'

What the kernel does with a fault, as --json says it: 'accepts', 'formats' (it makes an
empty store without asking), 'rejects', 'fails' (I/O errors where it needs it),
'misreads-later' and 'misreads' (wrong data without a word).")]
pub(super) struct CheckArgs {
    #[command(flatten)]
    source: Source,
    /// The disk that the store belongs to.
    #[arg(long, value_name = "DISK", value_hint = ValueHint::FilePath)]
    origin: Option<PathBuf>,
    /// Compare every copy with what the disk holds; reads all of the store's data.
    #[arg(long, requires = "origin")]
    contents: bool,
    #[command(flatten)]
    printing: Printing,
}

/// The verb.
pub(super) fn run(args: &CheckArgs, quiet: bool) -> Result<(), Ended> {
    let cow = &args.source.cow;
    let reading = args.source.reading(quiet);
    let origin = args.origin.as_deref();
    let report = if args.contents {
        let mut progress = Progress::new("comparing", disk_bytes(cow)?, quiet);
        let mut done = |bytes| progress.done(bytes);
        check::run(cow, origin, reading, Some(&mut done))?
    } else {
        check::run(cow, origin, reading, None)?
    };
    if args.printing.json {
        print_json(&report)?;
    } else if !quiet {
        print(&text(&report))?;
    }
    if report.is_fine() {
        Ok(())
    } else {
        Err(Failure::Found.into())
    }
}

fn text(report: &CheckReport) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        let _ = writeln!(text, "{}: {}", finding.code, finding.message);
        let _ = writeln!(text, "    {}", finding.kernel_words);
    }
    if report.left_out > 0 {
        let _ = writeln!(
            text,
            "and {} more",
            counted(report.left_out, "finding", "findings")
        );
    }
    let _ = writeln!(text, "{}: {}", report.cow, verdict(report));
    let notes = &report.notes;
    if notes.unreferenced_chunks > 0 {
        let _ = writeln!(
            text,
            "note: no exception points to {} of the store: a merge or a power cut left that, and it is no fault",
            counted(notes.unreferenced_chunks, "data chunk", "data chunks")
        );
    }
    if notes.odd_bytes > 0 {
        let _ = writeln!(
            text,
            "note: the last {} of the store are no whole chunk, and are never used",
            counted(notes.odd_bytes, "byte", "bytes")
        );
    }
    match notes.needless_copies {
        Some(0) if report.exceptions == 0 => {}
        Some(0) => text.push_str("note: every copy differs from what the disk holds\n"),
        Some(count) => {
            let _ = writeln!(
                text,
                "note: {} what the disk holds: the disk was written with what it had, or the snapshot with what it showed",
                if count == 1 {
                    "1 copy equals".into()
                } else {
                    format!("{count} copies equal")
                }
            );
        }
        None => {}
    }
    text
}

fn verdict(report: &CheckReport) -> String {
    let exceptions = counted(report.exceptions, "exception", "exceptions");
    match report.verdict {
        Verdict::Sound => format!("sound, with {exceptions}"),
        Verdict::Mendable => format!(
            "{exceptions}, all sound; opening it for writing here, or 'nbdsnap cow repair', mends the rest"
        ),
        Verdict::Damaged => format!(
            "damaged, with {exceptions}: 'nbdsnap cow repair' saves what can be saved"
        ),
        Verdict::Invalid => "the snapshot is lost: its store is marked invalid, as one is that ran full or met an error; the kernel accepts it, and every read of the snapshot fails".into(),
        Verdict::NoStore => "no store".into(),
    }
}
