//! Which block comes next. A plan is a value: the same seed gives the same
//! offsets, so that two servers get the same load.

use crate::BenchError;

/// The order in which blocks are visited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Any block, again and again.
    Random,
    /// Every block once, in random order; then the plan ends.
    Once,
    /// One after the other, from the start again at the end.
    Sequential,
}

/// Offsets of the blocks of an export, in some order.
#[derive(Clone, Debug)]
pub struct Plan {
    stride: u64,
    places: u64,
    state: State,
}

#[derive(Clone, Debug)]
enum State {
    /// The next is drawn.
    Random(Rng),
    /// The rest of a shuffled list, last first.
    List(Vec<u32>),
    /// The next place.
    Sequential(u64),
}

impl Plan {
    /// Visits blocks of `block` bytes, one at the start of every `stride`
    /// bytes, of an export of `export_bytes`. What does not fill a block at the
    /// end is left out.
    pub fn new(
        order: Order,
        export_bytes: u64,
        block: u32,
        stride: u64,
        seed: u64,
    ) -> Result<Self, BenchError> {
        let block = u64::from(block);
        if block == 0 || stride < block {
            return Err(BenchError::Unsuitable(
                "a block has at least one byte, and a stride at least a block".into(),
            ));
        }
        if export_bytes < block {
            return Err(BenchError::Unsuitable(format!(
                "the export has {export_bytes} bytes, less than one block of {block}"
            )));
        }
        let places = (export_bytes - block) / stride + 1;
        let mut rng = Rng::new(seed);
        let state = match order {
            Order::Random => State::Random(rng),
            Order::Sequential => State::Sequential(0),
            Order::Once => {
                let count = u32::try_from(places).map_err(|_| {
                    BenchError::Unsuitable(format!(
                        "{places} blocks are too many to visit once each"
                    ))
                })?;
                let mut list: Vec<u32> = (0..count).collect();
                rng.shuffle(&mut list);
                State::List(list)
            }
        };
        Ok(Self {
            stride,
            places,
            state,
        })
    }

    /// Visits the given places (numbers of strides) in ascending order, once.
    pub fn of_places(stride: u64, ascending: impl DoubleEndedIterator<Item = u32>) -> Self {
        let list: Vec<u32> = ascending.rev().collect();
        Self {
            stride,
            places: list.len() as u64,
            state: State::List(list),
        }
    }

    /// How many different blocks there are.
    pub fn places(&self) -> u64 {
        self.places
    }

    /// The offset of the next block; `None` when all were visited.
    pub fn next_offset(&mut self) -> Option<u64> {
        let place = match &mut self.state {
            State::Random(rng) => rng.below(self.places),
            State::List(list) => u64::from(list.pop()?),
            State::Sequential(next) => {
                let place = *next;
                *next = (place + 1) % self.places;
                place
            }
        };
        Some(place * self.stride)
    }
}

/// A small and fast source of random numbers (splitmix64): made for even
/// spreading, not for secrets.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// Begins the sequence that belongs to `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next_u64()) * u128::from(bound)) >> 64) as u64
    }

    /// Fills a buffer.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        for piece in buffer.chunks_mut(8) {
            let word = self.next_u64().to_le_bytes();
            piece.copy_from_slice(&word[..piece.len()]);
        }
    }

    fn shuffle(&mut self, list: &mut [u32]) {
        for end in (1..list.len()).rev() {
            let other = self.below(end as u64 + 1) as usize;
            list.swap(end, other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn once_visits_every_block_once_and_ends() {
        let mut plan = Plan::new(Order::Once, 10 * 65536 + 5000, 4096, 65536, 7).unwrap();
        let mut seen: Vec<u64> = std::iter::from_fn(|| plan.next_offset()).collect();
        assert_ne!(
            seen,
            (0..11).map(|n| n * 65536).collect::<Vec<_>>(),
            "not shuffled"
        );
        seen.sort_unstable();
        assert_eq!(seen, (0..11).map(|n| n * 65536).collect::<Vec<_>>());
    }

    #[test]
    fn random_stays_inside_and_repeats_with_its_seed() {
        let draw = |seed| {
            let mut plan = Plan::new(Order::Random, 1_000_000, 4096, 4096, seed).unwrap();
            (0..1000)
                .map(|_| plan.next_offset().unwrap())
                .collect::<Vec<_>>()
        };
        let offsets = draw(1);
        assert!(
            offsets
                .iter()
                .all(|offset| offset % 4096 == 0 && offset + 4096 <= 1_000_000)
        );
        assert_eq!(offsets, draw(1));
        assert_ne!(offsets, draw(2));
    }

    #[test]
    fn sequential_begins_again() {
        let mut plan = Plan::new(Order::Sequential, 3 * 512, 512, 512, 0).unwrap();
        let offsets: Vec<_> = (0..4).map(|_| plan.next_offset().unwrap()).collect();
        assert_eq!(offsets, [0, 512, 1024, 0]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(Plan::new(Order::Random, 4095, 4096, 4096, 0).is_err());
        assert!(Plan::new(Order::Random, 8192, 4096, 512, 0).is_err());
    }
}
