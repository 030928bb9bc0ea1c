//! The exceptions of a snapshot in memory: which origin chunks have a copy, and
//! where. Kept as runs (neighbours on both devices), so that sequential change
//! costs next to nothing; a scattered chunk costs one B-tree entry of 16 bytes. Every
//! chunk costs two to four bytes, but all together 128 KiB at most, in a sieve that says
//! of most chunks without a copy that they have none.

mod sieve;

use std::collections::BTreeMap;

use nbdsnap_format::{CowChunk, OriginChunk};

use sieve::Sieve;

/// Questions about at most so many chunks are put to the sieve first.
const SIEVED: u64 = 8;

/// Runs are at most this long: a length fits beside the chunk number in 64 bits.
const MAX_RUN: u64 = 256;

/// A run's store chunk and its length less one, in one word.
#[derive(Clone, Copy, Debug)]
struct Packed(u64);

impl Packed {
    fn new(first: CowChunk, len: u64) -> Self {
        debug_assert!((1..=MAX_RUN).contains(&len) && first.0 < 1 << 56);
        Self(first.0 << 8 | (len - 1))
    }

    fn first(self) -> u64 {
        self.0 >> 8
    }

    fn len(self) -> u64 {
        (self.0 & 0xff) + 1
    }
}

/// What the table says about a range of origin chunks that begins at some chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Run {
    /// `len` chunks have copies, in a row from `first` on.
    Mapped {
        /// The copy of the first chunk.
        first: CowChunk,
        /// How many.
        len: u64,
    },
    /// `len` chunks have none.
    Unmapped {
        /// How many; at least up to the next exception or the end of the question.
        len: u64,
    },
}

/// Old chunk to new chunk.
#[derive(Debug, Default)]
pub(crate) struct ExceptionTable {
    runs: BTreeMap<u64, Packed>,
    count: u64,
    sieve: Sieve,
}

impl ExceptionTable {
    /// Exceptions in the table.
    pub(crate) fn len(&self) -> u64 {
        self.count
    }

    /// The copy of `old`, if it has one.
    pub(crate) fn get(&self, old: OriginChunk) -> Option<CowChunk> {
        if self.sieve.has_none(old.0) {
            return None;
        }
        let (&start, run) = self.runs.range(..=old.0).next_back()?;
        let into = old.0 - start;
        (into < run.len()).then(|| CowChunk(run.first() + into))
    }

    /// The longest known run that begins at `old`, within `limit` chunks (at least 1).
    #[inline]
    pub(crate) fn run_at(&self, old: OriginChunk, limit: u64) -> Run {
        let mut chunks = old.0..old.0.saturating_add(limit);
        if limit <= SIEVED && chunks.all(|chunk| self.sieve.has_none(chunk)) {
            return Run::Unmapped { len: limit };
        }
        self.search(old, limit)
    }

    fn search(&self, old: OriginChunk, limit: u64) -> Run {
        if let Some((&start, run)) = self.runs.range(..=old.0).next_back() {
            let into = old.0 - start;
            if into < run.len() {
                return Run::Mapped {
                    first: CowChunk(run.first() + into),
                    len: (run.len() - into).min(limit),
                };
            }
        }
        if limit == 1 {
            // Nobody asks what comes next: a second search less, at each level of a tree.
            return Run::Unmapped { len: 1 };
        }
        let end = old.0.saturating_add(limit);
        let next = self.runs.range(old.0..end).next().map_or(end, |(&s, _)| s);
        Run::Unmapped { len: next - old.0 }
    }

    /// Every store chunk that holds a copy.
    pub(crate) fn store_chunks(&self) -> impl Iterator<Item = u64> {
        self.runs
            .values()
            .flat_map(|run| run.first()..run.first() + run.len())
    }

    /// Add an exception for a chunk that has none.
    pub(crate) fn insert(&mut self, old: OriginChunk, new: CowChunk) {
        debug_assert!(
            self.get(old).is_none(),
            "origin chunk {old} has a copy already"
        );
        self.count += 1;
        if self.sieve.wants_room_for(self.count) {
            let runs = self.runs.iter();
            let chunks = runs.flat_map(|(&start, run)| start..start + run.len());
            self.sieve = Sieve::with_room_for(self.count, chunks);
        }
        self.sieve.add(old.0);
        if let Some((&start, run)) = self.runs.range_mut(..=old.0).next_back()
            && old.0 == start + run.len()
            && new.0 == run.first() + run.len()
            && run.len() < MAX_RUN
        {
            *run = Packed::new(CowChunk(run.first()), run.len() + 1);
            return;
        }
        self.runs.insert(old.0, Packed::new(new, 1));
    }

    /// Take out the exception of a chunk that has one.
    pub(crate) fn remove(&mut self, old: OriginChunk) {
        let found = self.runs.range_mut(..=old.0).next_back();
        let (&start, packed) = found.expect("the chunk has a copy");
        let (into, run) = (old.0 - start, *packed);
        assert!(into < run.len(), "the chunk has a copy");
        self.count -= 1;
        if into > 0 {
            *packed = Packed::new(CowChunk(run.first()), into);
        } else {
            self.runs.remove(&start);
        }
        let after = run.len() - into - 1;
        if after > 0 {
            let first = CowChunk(run.first() + into + 1);
            self.runs.insert(old.0 + 1, Packed::new(first, after));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The table answers as a plain map does, for every chunk and every run.
        #[test]
        fn table_is_a_map(pairs in proptest::collection::btree_map(0u64..600, 0u64..1 << 50, 0..300), dense: bool, removed in proptest::collection::vec(0u64..600, 0..200)) {
            let mut table = ExceptionTable::default();
            let mut model = BTreeMap::new();
            for (i, (old, new)) in pairs.into_iter().enumerate() {
                let new = if dense { i as u64 + 2 } else { new };
                table.insert(OriginChunk(old), CowChunk(new));
                model.insert(old, new);
            }
            for old in removed {
                if model.remove(&old).is_some() {
                    table.remove(OriginChunk(old));
                }
            }
            prop_assert_eq!(table.len(), model.len() as u64);
            for old in 0..610 {
                let at_most = old % 9 + 1;
                if let Run::Unmapped { len } = table.run_at(OriginChunk(old), at_most) {
                    prop_assert_eq!(model.range(old..old + at_most).next().map_or(at_most, |(&next, _)| next - old), len);
                }
                prop_assert_eq!(table.get(OriginChunk(old)).map(|c| c.0), model.get(&old).copied());
                match table.run_at(OriginChunk(old), 20) {
                    Run::Mapped { first, len } => {
                        prop_assert!((1..=20).contains(&len));
                        for i in 0..len {
                            prop_assert_eq!(model.get(&(old + i)).copied(), Some(first.0 + i));
                        }
                    }
                    Run::Unmapped { len } => {
                        prop_assert!((1..=20).contains(&len));
                        for i in 0..len {
                            prop_assert!(!model.contains_key(&(old + i)));
                        }
                        prop_assert!(len == 20 || model.contains_key(&(old + len)));
                    }
                }
            }
        }
    }

    #[test]
    fn a_long_sequential_run_costs_an_entry_in_256() {
        let mut table = ExceptionTable::default();
        for i in 0..10_000 {
            table.insert(OriginChunk(i), CowChunk(i + 2));
        }
        assert_eq!(table.runs.len(), 10_000_usize.div_ceil(256));
    }
}
