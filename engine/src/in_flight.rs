//! Which byte ranges are being read or written, and who waits for them to end.
//! Overlapping writes take their turns in the order in which they came, so that
//! a write that was stalled never lands on newer data (durability.md, rule 14).

use std::collections::BTreeMap;

use crate::volume::task::TaskId;

/// Names a range until it is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct RangeId {
    start: u64,
    serial: u64,
}

#[derive(Debug)]
struct Range {
    end: u64,
    waiting: Vec<TaskId>,
}

/// A set of byte ranges that may overlap.
#[derive(Debug, Default)]
pub(crate) struct Ranges {
    by_start: BTreeMap<RangeId, Range>,
    serial: u64,
    /// No range in the set is longer: bounds how far back an overlap can begin.
    longest: u64,
}

impl Ranges {
    /// Add `start..end`.
    pub(crate) fn insert(&mut self, start: u64, end: u64) -> RangeId {
        debug_assert!(start < end);
        self.serial += 1;
        self.longest = self.longest.max(end - start);
        let id = RangeId {
            start,
            serial: self.serial,
        };
        let waiting = Vec::new();
        self.by_start.insert(id, Range { end, waiting });
        id
    }

    /// Nothing is in the set.
    pub(crate) fn is_empty(&self) -> bool {
        self.by_start.is_empty()
    }

    fn candidates(&self, start: u64, end: u64) -> std::ops::Range<RangeId> {
        let first = start.saturating_sub(self.longest);
        RangeId {
            start: first,
            serial: 0,
        }..RangeId {
            start: end,
            serial: 0,
        }
    }

    /// Whether anything in the set touches `start..end`.
    pub(crate) fn overlaps(&self, start: u64, end: u64) -> bool {
        !self.by_start.is_empty()
            && self
                .by_start
                .range(self.candidates(start, end))
                .any(|(_, range)| range.end > start)
    }

    /// Make `task` wait for every range in the set that touches `start..end`,
    /// and say how many those are.
    pub(crate) fn wait_for_overlaps(&mut self, start: u64, end: u64, task: TaskId) -> u32 {
        if self.by_start.is_empty() {
            return 0;
        }
        let mut count = 0;
        for (_, range) in self.by_start.range_mut(self.candidates(start, end)) {
            if range.end > start {
                range.waiting.push(task);
                count += 1;
            }
        }
        count
    }

    /// Take a range out, and learn who waited for it.
    pub(crate) fn remove(&mut self, id: RangeId) -> Vec<TaskId> {
        let range = self.by_start.remove(&id).expect("a range ends once");
        if self.by_start.is_empty() {
            self.longest = 0;
        }
        range.waiting
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn overlaps_are_found_whatever_the_lengths(
            ranges in proptest::collection::vec((0u64..200, 1u64..60), 0..20),
            start in 0u64..220, len in 1u64..50,
        ) {
            let mut set = Ranges::default();
            let ids: Vec<_> = ranges.iter().map(|&(s, l)| set.insert(s, s + l)).collect();
            let touching = ranges.iter().filter(|&&(s, l)| s < start + len && start < s + l).count();
            prop_assert_eq!(set.overlaps(start, start + len), touching > 0);
            prop_assert_eq!(set.wait_for_overlaps(start, start + len, TaskId(7)) as usize, touching);
            let mut woken = 0;
            for id in ids {
                woken += set.remove(id).len();
            }
            prop_assert_eq!(woken, touching);
            prop_assert!(set.by_start.is_empty());
        }
    }
}
