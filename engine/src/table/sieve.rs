//! Which chunks have no exception for sure, said in a few nanoseconds: a bit for
//! each possible hash of a chunk's number, set once a chunk with that hash has an
//! exception. A read through a chain of snapshots asks each of them, and most have
//! nothing to say.
//!
//! Two to four bytes an exception keep 15 of 16 questions out of the B-tree. There is an end
//! to that ([`MOST_BITS`]): a larger table fills the sieve until it says nothing any
//! more, and is then given up.

/// A larger sieve has its bits in slower memory than the top of the B-tree.
const MOST_BITS: u64 = 1 << 20;

/// Bits for each exception.
const BITS_EACH: u64 = 16;

/// See above.
#[derive(Debug, Default)]
pub(super) enum Sieve {
    /// No chunk has an exception.
    #[default]
    Empty,
    /// A chunk whose hash has no bit here has none.
    Bits {
        /// A power of two of them.
        words: Box<[u64]>,
        /// Takes a hash to the number of its bit.
        shift: u32,
    },
    /// It cannot say.
    GivenUp,
}

impl Sieve {
    /// A sieve for `count` exceptions, which are not more than [`Sieve::wants_room_for`]
    /// has been asked about, with the `chunks` in it.
    pub(super) fn with_room_for(count: u64, chunks: impl Iterator<Item = u64>) -> Self {
        let bits = (count * 2 * BITS_EACH).next_power_of_two();
        if bits > MOST_BITS * BITS_EACH {
            return Self::GivenUp;
        }
        let bits = bits.min(MOST_BITS);
        let mut this = Self::Bits {
            words: vec![0; (bits / 64).max(1) as usize].into(),
            shift: 64 - bits.max(64).trailing_zeros(),
        };
        chunks.for_each(|chunk| this.add(chunk));
        this
    }

    /// It ought to be made anew before it takes in the last of `count` exceptions.
    pub(super) fn wants_room_for(&self, count: u64) -> bool {
        match self {
            Self::Empty => true,
            Self::Bits { words, .. } => {
                let bits = words.len() as u64 * 64;
                // Once it is as large as it gets: when a question out of two passes it.
                let each = if bits < MOST_BITS { BITS_EACH } else { 1 };
                count * each > bits
            }
            Self::GivenUp => false,
        }
    }

    /// The chunk has an exception.
    pub(super) fn add(&mut self, chunk: u64) {
        if let Self::Bits { words, shift } = self {
            let bit = hash(chunk) >> *shift;
            words[(bit / 64) as usize] |= 1 << (bit % 64);
        }
    }

    /// The chunk has no exception.
    #[inline]
    pub(super) fn has_none(&self, chunk: u64) -> bool {
        match self {
            Self::Empty => true,
            Self::Bits { words, shift } => {
                let bit = hash(chunk) >> *shift;
                words[(bit / 64) as usize] >> (bit % 64) & 1 == 0
            }
            Self::GivenUp => false,
        }
    }
}

/// Multiplicative (Fibonacci) hashing, after Knuth, The Art of Computer Programming,
/// volume 3, 6.4: the upper bits depend on all bits of the number.
fn hash(chunk: u64) -> u64 {
    chunk.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sieve that chunks were put into one by one, as a table does it.
    fn grown(chunks: &[u64]) -> Sieve {
        let mut sieve = Sieve::default();
        for (n, &chunk) in chunks.iter().enumerate() {
            let count = n as u64 + 1;
            if sieve.wants_room_for(count) {
                sieve = Sieve::with_room_for(count, chunks[..n].iter().copied());
            }
            sieve.add(chunk);
        }
        sieve
    }

    #[test]
    fn it_never_denies_a_chunk() {
        for count in [
            0_u64,
            1,
            2,
            100,
            10_000,
            70_000,
            MOST_BITS - 1,
            MOST_BITS + 1,
        ] {
            let chunks: Vec<u64> = (0..count).map(|n| n * n * 7 + n).collect();
            let sieve = grown(&chunks);
            assert!(
                chunks.iter().all(|&chunk| !sieve.has_none(chunk)),
                "{count}"
            );
        }
    }

    #[test]
    fn most_chunks_without_an_exception_do_not_pass() {
        for (count, step) in [(1_u64, 1), (100, 1), (1000, 16), (2048, 17), (60_000, 3)] {
            let chunks: Vec<u64> = (0..count).map(|n| n * step).collect();
            let sieve = grown(&chunks);
            let others = count * step..count * step + 10_000;
            let pass = others.filter(|&chunk| !sieve.has_none(chunk)).count();
            assert!(
                pass < 1000,
                "{pass} of 10,000 pass one for {count} by {step}"
            );
        }
    }

    #[test]
    fn one_that_would_be_too_large_is_given_up() {
        let chunks: Vec<u64> = (0..=MOST_BITS).collect();
        assert!(matches!(grown(&chunks[..1 << 20]), Sieve::Bits { .. }));
        assert!(matches!(grown(&chunks), Sieve::GivenUp));
        assert!(matches!(grown(&[]), Sieve::Empty));
    }
}
