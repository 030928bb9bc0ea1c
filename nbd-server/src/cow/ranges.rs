//! `cow map`: where the exceptions of a store point, and which ranges of its origin
//! have changed.

use std::ops::Range;

use nbdsnap_format::runs::{clipped, joined};
use nbdsnap_format::{Exception, Run, Runs};
use serde::Serialize;

use super::{CowError, CowStore};

/// A run, as `cow map --json` prints it. All but the chunk numbers is in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct RunReport {
    /// Where it begins on the origin.
    pub origin_offset: u64,
    /// How long it is. The last chunk of an origin may be longer than what is left
    /// of the origin: that counts only where the origin is known.
    pub length: u64,
    /// Where its data begins in the store.
    pub cow_offset: u64,
    /// Its first origin chunk.
    pub old_chunk: u64,
    /// Its first store chunk.
    pub new_chunk: u64,
    /// How many.
    pub chunks: u64,
}

/// A range of the origin, as `cow map --changed --json` and `cow diff --json` print
/// it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct RangeReport {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// How long it is, in bytes.
    pub length: u64,
}

impl From<Range<u64>> for RangeReport {
    fn from(range: Range<u64>) -> Self {
        Self {
            offset: range.start,
            length: range.end - range.start,
        }
    }
}

/// In which order runs are listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// That of the origin.
    Origin,
    /// That of the data in the store.
    Store,
    /// That of the list of exceptions: the order in which they were made.
    List,
}

/// The exceptions of a store in an order; misplaced ones too, with their numbers as
/// they are written.
pub fn exceptions(store: &CowStore, order: Order) -> Result<Vec<Exception>, CowError> {
    let mut all = store.exceptions(None)?;
    match order {
        Order::Origin => all.sort_unstable(),
        Order::Store => all.sort_unstable_by_key(|e| (e.new, e.old)),
        Order::List => {}
    }
    Ok(all)
}

/// A run of this store, for printing.
pub fn report(store: &CowStore, run: Run, origin_bytes: Option<u64>) -> RunReport {
    let chunk_size = store.header.chunk_size;
    let origin = clipped(&run.origin_range(chunk_size), origin_bytes);
    RunReport {
        origin_offset: run.origin_range(chunk_size).start,
        length: origin.end - origin.start,
        cow_offset: run.cow_range(chunk_size).start,
        old_chunk: run.old.0,
        new_chunk: run.new.0,
        chunks: run.chunks,
    }
}

/// The ranges of the origin that have exceptions, in ascending order, as far as they
/// lie on the origin.
pub fn changed(
    store: &CowStore,
    exceptions: &[Exception],
    origin_bytes: Option<u64>,
) -> impl Iterator<Item = Range<u64>> {
    let chunk_size = store.header.chunk_size;
    joined(
        Runs::of(exceptions.iter().copied())
            .map(move |run| clipped(&run.origin_range(chunk_size), origin_bytes)),
    )
}
