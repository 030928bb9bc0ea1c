//! `cow diff`: where a snapshot and its origin, or two snapshots of one origin,
//! differ; by their metadata, or byte by byte.
//!
//! By metadata a chunk may differ where either of them has an exception: what was
//! overwritten may have been overwritten with the same.

use std::ops::Range;
use std::path::Path;

use nbdsnap_format::SECTOR_BYTES;
use nbdsnap_format::runs::{joined, union};

use super::open::{disk_bytes, read_at};
use super::ranges::{self, Order};
use super::view::View;
use super::{CowError, CowStore, Reading};

/// Compared at a time.
const PIECE: u64 = 1 << 20;

/// The ranges in which the snapshot in the store `cow` and its origin, or another
/// snapshot of that, may differ.
pub fn by_metadata(
    cow: &Path,
    other: Option<&Path>,
    origin: Option<&Path>,
    reading: Reading,
) -> Result<Vec<Range<u64>>, CowError> {
    let origin_bytes = origin.map(disk_bytes).transpose()?;
    let changed = |path: &Path| -> Result<Vec<Range<u64>>, CowError> {
        let store = CowStore::open(path, reading)?;
        store.insist_on_soundness(origin_bytes)?;
        let exceptions = ranges::exceptions(&store, Order::Origin)?;
        Ok(ranges::changed(&store, &exceptions, origin_bytes).collect())
    };
    let ours = changed(cow)?;
    match other {
        None => Ok(ours),
        Some(other) => Ok(union(ours.into_iter(), changed(other)?.into_iter()).collect()),
    }
}

/// The ranges in which they do differ, to the sector.
pub fn by_content(
    cow: &Path,
    other: Option<&Path>,
    origin: &Path,
    reading: Reading,
    progress: &mut dyn FnMut(u64),
) -> Result<Vec<Range<u64>>, CowError> {
    let candidates = by_metadata(cow, other, Some(origin), reading)?;
    let ours = View::open(cow, origin, reading)?;
    let theirs = other
        .map(|other| View::open(other, origin, reading))
        .transpose()?;
    let bytes = ours
        .bytes()
        .min(theirs.as_ref().map_or(u64::MAX, View::bytes));
    let mut found = Vec::new();
    let (mut a, mut b) = (vec![0; PIECE as usize], vec![0; PIECE as usize]);
    let mut done = 0;
    for range in candidates {
        let mut at = range.start;
        let end = range.end.min(bytes);
        while at < end {
            let len = PIECE.min(end - at) as usize;
            ours.read(at, &mut a[..len])?;
            match &theirs {
                Some(view) => view.read(at, &mut b[..len])?,
                None => read_at(ours.origin(), at, &mut b[..len])?,
            }
            differing(at, &a[..len], &b[..len], &mut found);
            at += len as u64;
            done += len as u64;
            progress(done);
        }
    }
    Ok(joined(found.into_iter()).collect())
}

/// The sectors of two pieces that differ, joined with the last range where they touch.
fn differing(offset: u64, a: &[u8], b: &[u8], found: &mut Vec<Range<u64>>) {
    if a == b {
        return;
    }
    let sector = SECTOR_BYTES as usize;
    for (n, (x, y)) in a.chunks(sector).zip(b.chunks(sector)).enumerate() {
        if x == y {
            continue;
        }
        let start = offset + (n * sector) as u64;
        let end = start + x.len() as u64;
        match found.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => found.push(start..end),
        }
    }
}
