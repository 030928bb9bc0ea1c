//! `nbdsnap cow inspect`.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::{Args, ValueHint};

use super::super::orders::{rough_size, table};
use super::super::size as sizes;
use super::{Ended, Printing, Source, counted, fields, percent, print, print_json};
use crate::cow::inspect::{self, InspectReport, Inspected};
use crate::cow::{CowError, picture::Picture};

/// Say what a store is and holds, and draw where the changes lie.
///
/// Everything is read from the store's metadata, in a second even for millions of
/// exceptions. What is drawn is the origin, from its first byte to its last; without
/// --origin up to the last change.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  nbdsnap cow inspect monday.cow
  nbdsnap cow inspect monday.cow --origin disk.img --svg changes.svg
  nbdsnap cow inspect monday.cow --json | jq .changed_share")]
pub(super) struct InspectArgs {
    #[command(flatten)]
    source: Source,
    /// The disk, for its size: what share of it has changed. It may be in use.
    #[arg(long, value_name = "DISK", value_hint = ValueHint::FilePath)]
    origin: Option<PathBuf>,
    /// Draw the picture into a file, as SVG.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    svg: Option<PathBuf>,
    /// The same as PNG.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    png: Option<PathBuf>,
    #[command(flatten)]
    printing: Printing,
}

/// The verb.
pub(super) fn run(args: &InspectArgs, quiet: bool) -> Result<(), Ended> {
    let reading = args.source.reading(quiet);
    let Inspected {
        report,
        small,
        large,
    } = inspect::run(&args.source.cow, args.origin.as_deref(), reading)?;
    if let Some(path) = &args.svg {
        let title = format!("Changes of the origin in {}", report.cow);
        let svg = large.svg(&title, &caption(&report, &large), label);
        write(path, svg.as_bytes())?;
    }
    if let Some(path) = &args.png {
        let bytes = large
            .png(&caption(&report, &large))
            .map_err(|error| CowError::Program {
                program: "PNG",
                error: error.to_string(),
            })?;
        write(path, &bytes)?;
    }
    if args.printing.json {
        return Ok(print_json(&report)?);
    }
    if !quiet {
        print(&text(&report, &small))?;
    }
    Ok(())
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), CowError> {
    std::fs::write(path, bytes).map_err(|error| CowError::Io {
        path: path.to_owned(),
        doing: "writing the picture",
        offset: 0,
        error,
    })
}

fn label(offset: u64) -> String {
    rough_size(Some(offset))
}

/// What a picture shows, in a sentence.
fn caption(report: &InspectReport, picture: &Picture) -> String {
    let changed = rough_size(Some(report.changed_bytes));
    let share = match (report.origin_bytes, report.changed_share) {
        (Some(bytes), Some(share)) => format!(
            "{changed} of {} ({})",
            rough_size(Some(bytes)),
            percent(share)
        ),
        _ => changed,
    };
    format!(
        "{share} in {}; each cell is {}",
        counted(report.exceptions, "chunk", "chunks"),
        sizes::show(picture.cell_bytes())
    )
}

fn text(report: &InspectReport, picture: &Picture) -> String {
    let size = |bytes| rough_size(Some(bytes));
    let mut text = format!("{}\n", report.cow);
    text.push_str(&fields(&[
        ("state", state(report)),
        (
            "chunk size",
            format!(
                "{} ({})",
                sizes::show(report.chunk_bytes),
                counted(report.chunk_bytes / 512, "sector", "sectors")
            ),
        ),
        (
            "exceptions",
            format!(
                "{} in {}, each for {}",
                report.exceptions,
                counted(report.areas, "area", "areas"),
                report.exceptions_per_area
            ),
        ),
        ("data", size(report.data_bytes)),
        ("metadata", size(report.metadata_bytes)),
        (
            "free",
            format!("{} of {}", size(report.free_bytes), size(report.bytes)),
        ),
        ("next free chunk", report.next_free_chunk.to_string()),
        ("dmsetup status", report.status.clone()),
        ("origin", origin(report)),
        ("runs", report.runs.to_string()),
    ]));
    if report.faults > 0 {
        let faults = counted(report.faults, "fault", "faults");
        let _ = writeln!(text, "  {faults} found: 'nbdsnap cow check' says more");
    }
    if report.exceptions == 0 {
        return text;
    }
    let rows: Vec<Vec<String>> = report
        .longest_runs
        .iter()
        .map(|run| {
            vec![
                run.origin_offset.to_string(),
                run.cow_offset.to_string(),
                size(run.length),
                run.chunks.to_string(),
            ]
        })
        .collect();
    text.push_str("\nThe longest runs\n\n");
    let head = ["ORIGIN OFFSET", "STORE OFFSET", "LENGTH", "CHUNKS"];
    text.push_str(&table(&head, &rows));
    let _ = writeln!(
        text,
        "\nWhere the changes lie: a character is {} of the origin, from · (nothing) to █ (all of it)\n",
        sizes::show(picture.cell_bytes())
    );
    text.push_str(&picture.text(label));
    text
}

fn state(report: &InspectReport) -> String {
    match report.state {
        "valid" => "valid".into(),
        other => format!("{other}: the snapshot is lost, and its exceptions mean nothing"),
    }
}

fn origin(report: &InspectReport) -> String {
    let changed = rough_size(Some(report.changed_bytes));
    match (report.origin_bytes, report.changed_share) {
        (Some(bytes), Some(share)) => format!(
            "{}, of which {changed} ({}) changed",
            rough_size(Some(bytes)),
            percent(share)
        ),
        _ => format!("{changed} of it changed (its size is not known: --origin)"),
    }
}
