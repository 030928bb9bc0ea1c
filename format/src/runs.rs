//! Runs: exceptions that are neighbours on the origin and in the store, as one; and
//! ranges of the origin, in bytes. The tools print them, and compare snapshots by
//! them. Everything here streams: it takes the memory of one run.

use std::iter::Peekable;
use std::ops::Range;

use crate::area::Exception;
use crate::units::{ChunkSize, CowChunk, OriginChunk};

/// `chunks` origin chunks from `old` on, whose data lies at as many store chunks
/// from `new` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Run {
    /// The first origin chunk.
    pub old: OriginChunk,
    /// Where its data lies.
    pub new: CowChunk,
    /// How many; at least 1.
    pub chunks: u64,
}

impl Run {
    /// A run of one exception.
    pub const fn of(exception: Exception) -> Self {
        Self {
            old: exception.old,
            new: exception.new,
            chunks: 1,
        }
    }

    /// A run of these numbers, if there is one: its last chunks have numbers too, and
    /// no data lies at store chunk 0, whose entry would end the list.
    pub fn from_numbers(old: u64, new: u64, chunks: u64) -> Option<Self> {
        let more = chunks.checked_sub(1)?;
        let fits = new > 0 && old.checked_add(more).is_some() && new.checked_add(more).is_some();
        fits.then_some(Self {
            old: OriginChunk(old),
            new: CowChunk(new),
            chunks,
        })
    }

    /// Whether `exception` is the next of this run.
    pub fn continues_with(self, exception: Exception) -> bool {
        self.old.0.checked_add(self.chunks) == Some(exception.old.0)
            && self.new.0.checked_add(self.chunks) == Some(exception.new.0)
    }

    /// Its exceptions. None whose numbers are too large for any device.
    pub fn exceptions(self) -> impl Iterator<Item = Exception> {
        (0..self.chunks).map_while(move |n| {
            Some(Exception {
                old: OriginChunk(self.old.0.checked_add(n)?),
                new: CowChunk(self.new.0.checked_add(n)?),
            })
        })
    }

    /// The bytes of the origin that it stands for.
    pub fn origin_range(self, chunk_size: ChunkSize) -> Range<u64> {
        let start = chunk_size.origin_offset(self.old);
        start..start.saturating_add(self.chunks.saturating_mul(chunk_size.bytes()))
    }

    /// Where they lie in the store.
    pub fn cow_range(self, chunk_size: ChunkSize) -> Range<u64> {
        let start = chunk_size.cow_offset(self.new);
        start..start.saturating_add(self.chunks.saturating_mul(chunk_size.bytes()))
    }
}

/// Makes runs of exceptions, in the order in which they come.
#[derive(Clone, Debug)]
pub struct Runs<I: Iterator<Item = Exception>> {
    exceptions: Peekable<I>,
}

impl<I: Iterator<Item = Exception>> Runs<I> {
    /// The runs of these.
    pub fn of(exceptions: impl IntoIterator<IntoIter = I>) -> Self {
        Self {
            exceptions: exceptions.into_iter().peekable(),
        }
    }
}

impl<I: Iterator<Item = Exception>> Iterator for Runs<I> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        let mut run = Run::of(self.exceptions.next()?);
        while self
            .exceptions
            .next_if(|next| run.continues_with(*next))
            .is_some()
        {
            run.chunks += 1;
        }
        Some(run)
    }
}

/// Ranges that overlap or touch, as one. They have to come in ascending order of
/// their starts.
pub fn joined(ranges: impl Iterator<Item = Range<u64>>) -> impl Iterator<Item = Range<u64>> {
    let mut ranges = ranges.filter(|range| !range.is_empty()).peekable();
    std::iter::from_fn(move || {
        let mut range = ranges.next()?;
        while let Some(next) = ranges.next_if(|next| next.start <= range.end) {
            range.end = range.end.max(next.end);
        }
        Some(range)
    })
}

/// The ranges that lie in `a`, in `b` or in both. Each of them has to ascend.
pub fn union(
    a: impl Iterator<Item = Range<u64>>,
    b: impl Iterator<Item = Range<u64>>,
) -> impl Iterator<Item = Range<u64>> {
    let (mut a, mut b) = (a.peekable(), b.peekable());
    joined(std::iter::from_fn(move || match (a.peek(), b.peek()) {
        (Some(x), Some(y)) if y.start < x.start => b.next(),
        (None, _) => b.next(),
        (Some(_), _) => a.next(),
    }))
}

/// The part of a range that lies on an origin of `origin_bytes` bytes; all of it
/// where that is not known.
pub fn clipped(range: &Range<u64>, origin_bytes: Option<u64>) -> Range<u64> {
    let end = origin_bytes.unwrap_or(u64::MAX);
    range.start.min(end)..range.end.min(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exception(old: u64, new: u64) -> Exception {
        Exception {
            old: OriginChunk(old),
            new: CowChunk(new),
        }
    }

    #[test]
    fn neighbours_on_both_devices_are_a_run() {
        let list = [
            (5, 2),
            (6, 3),
            (7, 5),
            (8, 6),
            (8, 7),
            (u64::MAX, 8),
            (0, 9),
        ];
        let exceptions = list.map(|(old, new)| exception(old, new));
        let runs: Vec<Run> = Runs::of(exceptions).collect();
        let run = |old, new, chunks| Run {
            old: OriginChunk(old),
            new: CowChunk(new),
            chunks,
        };
        let expected = [
            run(5, 2, 2),
            run(7, 5, 2),
            run(8, 7, 1),
            run(u64::MAX, 8, 1),
            run(0, 9, 1),
        ];
        assert_eq!(runs, expected);
        let back: Vec<Exception> = runs.into_iter().flat_map(Run::exceptions).collect();
        assert_eq!(back, exceptions);
    }

    #[test]
    fn a_run_past_every_device_ends_there() {
        let run = Run {
            old: OriginChunk(u64::MAX - 1),
            new: CowChunk(2),
            chunks: u64::MAX,
        };
        assert_eq!(run.exceptions().count(), 2);
        assert_eq!(run.origin_range(ChunkSize::MIN), u64::MAX..u64::MAX);
    }

    #[test]
    fn ranges_are_joined_and_united() {
        let a = [0..4, 4..6, 8..9, 9..9].into_iter();
        assert_eq!(joined(a.clone()).collect::<Vec<_>>(), [0..6, 8..9]);
        let b = [1..2, 7..8, 20..22].into_iter();
        assert_eq!(union(a, b).collect::<Vec<_>>(), [0..6, 7..9, 20..22]);
        assert_eq!(clipped(&(3..9), Some(5)), 3..5);
        assert_eq!(clipped(&(6..9), Some(5)), 5..5);
    }
}
