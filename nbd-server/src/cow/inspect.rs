//! `cow inspect`: what a store is and holds, in one look at its metadata.

use std::path::Path;

use nbdsnap_engine::Status;
use nbdsnap_format::{ListEnd, Run, Runs, SECTOR_BYTES, Tail};
use serde::Serialize;

use super::open::disk_bytes;
use super::picture::Picture;
use super::ranges::{self, RunReport};
use super::{CowError, CowStore, Reading};

/// So many of the longest runs are named.
const LONGEST: usize = 5;

/// What a store is, as `cow inspect --json` prints it. Fields are added, never
/// renamed; what does not apply or is not known is null.
#[derive(Clone, Debug, Serialize)]
pub struct InspectReport {
    /// The store, as it was named.
    pub cow: String,
    /// How long it is.
    pub bytes: u64,
    /// `valid`, or `invalid` where the snapshot is lost.
    pub state: &'static str,
    /// Bytes in a chunk.
    pub chunk_bytes: u64,
    /// Exceptions in the list.
    pub exceptions: u64,
    /// Exceptions that fit into an area.
    pub exceptions_per_area: u64,
    /// Areas that the list has, the one in which it ends included.
    pub areas: u64,
    /// Bytes of data that exceptions point to.
    pub data_bytes: u64,
    /// Bytes of the header and the areas.
    pub metadata_bytes: u64,
    /// Bytes from the next free chunk to the end of the store.
    pub free_bytes: u64,
    /// The chunk that the next exception would get.
    pub next_free_chunk: u64,
    /// The line of `dmsetup status` from the target's name on; the whole line where
    /// the origin is known.
    pub status: String,
    /// Bytes of the origin.
    pub origin_bytes: Option<u64>,
    /// Bytes of it that have exceptions.
    pub changed_bytes: u64,
    /// The same as a share of the origin, from 0 to 1.
    pub changed_share: Option<f64>,
    /// How many runs the exceptions make: neighbours on both devices.
    pub runs: u64,
    /// The longest, longest first.
    pub longest_runs: Vec<RunReport>,
    /// Exceptions that point where none can, and an end of the list that is none:
    /// `cow check` says more.
    pub faults: u64,
    /// Where the changes lie.
    pub map: MapReport,
}

/// A picture of the origin, in cells.
#[derive(Clone, Debug, Serialize)]
pub struct MapReport {
    /// Bytes of the origin in each cell.
    pub cell_bytes: u64,
    /// Of each cell, the share that has changed, from 0 to 1.
    pub shares: Vec<f64>,
}

/// A store that was looked at.
#[derive(Debug)]
pub struct Inspected {
    /// What there is to say.
    pub report: InspectReport,
    /// For a terminal.
    pub small: Picture,
    /// For a file.
    pub large: Picture,
}

/// Look at the store at `cow`.
pub fn run(cow: &Path, origin: Option<&Path>, reading: Reading) -> Result<Inspected, CowError> {
    let store = CowStore::open(cow, reading)?;
    let origin_bytes = origin.map(disk_bytes).transpose()?;
    let (bounds, layout) = (store.bounds(origin_bytes), store.layout());
    let chunk_size = layout.chunk_size();
    let (mut faults, mut highest, mut count) = (0, None, 0);
    let end = store.for_each(|_, exception| {
        count += 1;
        highest = highest.max(Some(exception.new));
        faults += u64::from(bounds.misplaced(exception).is_some());
    })?;
    faults += u64::from(!is_good_end(end));
    let mut exceptions = store.exceptions(Some(bounds))?;
    exceptions.sort_unstable();

    let extent = origin_bytes.map_or_else(
        || {
            exceptions
                .last()
                .map_or(0, |last| last.old.0.saturating_add(1))
        },
        |bytes| chunk_size.chunks_to_cover(bytes),
    );
    let mut small = Picture::new(chunk_size, extent, 64, 16);
    let mut large = Picture::new(chunk_size, extent, 128, 64);
    for exception in &exceptions {
        small.mark(exception.old.0);
        large.mark(exception.old.0);
    }
    let (mut runs, mut longest) = (0, Vec::new());
    for run in Runs::of(exceptions.iter().copied()) {
        runs += 1;
        keep_longest(&mut longest, run);
    }
    let changed_bytes = ranges::changed(&store, &exceptions, origin_bytes)
        .map(|range| range.end - range.start)
        .sum();
    let area = match end {
        ListEnd::InArea { area, .. } => area,
        ListEnd::NoArea { area } => area.saturating_sub(1),
    };
    let next_free = layout.next_free(highest);
    let allocated = next_free.0.saturating_mul(chunk_size.sectors());
    let status = if store.header.valid {
        Status::Active {
            allocated,
            total: store.bytes() / SECTOR_BYTES,
            metadata: layout.metadata_sectors(area),
        }
    } else {
        Status::Invalid
    };
    let report = InspectReport {
        cow: crate::disks::shown(store.path()),
        bytes: store.bytes(),
        state: if store.header.valid {
            "valid"
        } else {
            "invalid"
        },
        chunk_bytes: chunk_size.bytes(),
        exceptions: count,
        exceptions_per_area: chunk_size.exceptions_per_area(),
        areas: area + 1,
        data_bytes: (exceptions.len() as u64).saturating_mul(chunk_size.bytes()),
        metadata_bytes: layout.metadata_sectors(area).saturating_mul(SECTOR_BYTES),
        free_bytes: store
            .bytes()
            .saturating_sub(chunk_size.cow_offset(next_free)),
        next_free_chunk: next_free.0,
        status: match origin_bytes {
            Some(bytes) => format!("0 {} snapshot {status}", bytes / SECTOR_BYTES),
            None => format!("snapshot {status}"),
        },
        origin_bytes,
        changed_bytes,
        changed_share: origin_bytes
            .filter(|bytes| *bytes > 0)
            .map(|bytes| changed_bytes as f64 / bytes as f64),
        runs,
        longest_runs: longest
            .into_iter()
            .map(|run| ranges::report(&store, run, origin_bytes))
            .collect(),
        faults,
        map: MapReport {
            cell_bytes: small.cell_bytes(),
            shares: small.shares().collect(),
        },
    };
    Ok(Inspected {
        report,
        small,
        large,
    })
}

fn is_good_end(end: ListEnd) -> bool {
    matches!(
        end,
        ListEnd::InArea {
            tail: Tail::Clean,
            ..
        }
    )
}

/// The longest first; of equally long ones the first.
fn keep_longest(longest: &mut Vec<Run>, run: Run) {
    let at = longest.partition_point(|kept| kept.chunks >= run.chunks);
    if at < LONGEST {
        longest.truncate(LONGEST - 1);
        longest.insert(at, run);
    }
}
