//! `nbdsnap cow size`.

use std::path::Path;

use clap::Args;
use nbdsnap_format::{ChunkSize, SECTOR_BYTES};
use serde::Serialize;

use super::super::size as sizes;
use super::{Ended, Printing, fields, parse_chunk, print, print_json};
use crate::cow::CowError;
use crate::cow::open::disk_bytes;
use crate::cow::rewrite::bytes_for;

/// Say how large a store must be.
///
/// A change of one byte costs a whole chunk: --change is what the changed chunks come
/// to, so scattered small writes need small chunks or a larger share.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  nbdsnap cow size --origin 100G --change 20%
  nbdsnap cow size --origin /dev/vg/disk --change 5G --chunk 4K
  lvcreate -s -n snap -L $(nbdsnap cow size --origin 100G --change 20% --chunk 4K --bytes)b vg/disk")]
pub(super) struct SizeArgs {
    /// The size of the disk, or the disk.
    #[arg(long, value_name = "SIZE|DISK")]
    origin: String,
    /// How much of it changes while the snapshot lasts: a share, or a size.
    #[arg(long, value_name = "N%|SIZE", default_value = "100%", value_parser = parse_change)]
    change: Change,
    /// The chunk size; dm-snapshot's and nbdsnap's default is 16K, LVM's 4K.
    #[arg(long, value_name = "SIZE", default_value = "16K", value_parser = parse_chunk)]
    chunk: ChunkSize,
    /// Print the number of bytes, and nothing else.
    #[arg(long, conflicts_with = "json")]
    bytes: bool,
    #[command(flatten)]
    printing: Printing,
}

/// How much changes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Change {
    /// Of the origin, from 0 to 1.
    Share(f64),
    Bytes(u64),
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct SizeReport {
    /// Of the disk.
    origin_bytes: u64,
    /// Of a chunk.
    chunk_bytes: u64,
    /// Chunks that change, and so exceptions.
    exceptions: u64,
    /// How large the store must be for them.
    store_bytes: u64,
    /// The same in sectors of 512 bytes.
    store_sectors: u64,
    /// How large a store is that can never run full.
    most_bytes: u64,
}

fn parse_change(text: &str) -> Result<Change, String> {
    let Some(percent) = text.strip_suffix('%') else {
        return sizes::parse(text)
            .map(Change::Bytes)
            .map_err(|error| error.to_string());
    };
    match percent.trim().parse::<f64>() {
        Ok(percent) if (0.0..=100.0).contains(&percent) => Ok(Change::Share(percent / 100.0)),
        _ => Err(format!("'{text}': a share is from 0% to 100%")),
    }
}

/// The verb.
pub(super) fn run(args: &SizeArgs) -> Result<(), Ended> {
    let origin_bytes = match sizes::parse(&args.origin) {
        Ok(bytes) => bytes,
        Err(error) if !args.origin.contains('/') && !Path::new(&args.origin).exists() => {
            return Err(CowError::Senseless(format!("--origin: {error}, or name a disk")).into());
        }
        Err(_) => disk_bytes(Path::new(&args.origin))?,
    };
    let chunk = args.chunk;
    let most = chunk.chunks_to_cover(origin_bytes);
    let exceptions = match args.change {
        Change::Share(share) => (most as f64 * share).ceil() as u64,
        Change::Bytes(bytes) => chunk.chunks_to_cover(bytes),
    }
    .min(most);
    // A store of less than three chunks holds nothing.
    let store_bytes = bytes_for(chunk, exceptions).max(bytes_for(chunk, 1));
    let report = SizeReport {
        origin_bytes,
        chunk_bytes: chunk.bytes(),
        exceptions,
        store_bytes,
        store_sectors: store_bytes / SECTOR_BYTES,
        most_bytes: bytes_for(chunk, most),
    };
    if args.bytes {
        print(&format!("{store_bytes}\n"))?;
    } else if args.printing.json {
        print_json(&report)?;
    } else {
        print(&text(&report))?;
    }
    Ok(())
}

fn text(report: &SizeReport) -> String {
    let exact = |bytes: u64| {
        let rough = super::super::orders::rough_size(Some(bytes));
        format!("{rough} ({bytes} bytes, {} sectors)", bytes / SECTOR_BYTES)
    };
    fields(&[
        ("disk", exact(report.origin_bytes)),
        ("chunk size", sizes::show(report.chunk_bytes)),
        ("chunks that change", report.exceptions.to_string()),
        ("store", exact(report.store_bytes)),
        ("never full with", exact(report.most_bytes)),
    ])
}
