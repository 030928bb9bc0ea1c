//! What the bytes at an offset must be, and what is written there.
//!
//! A written block is *stamped*: each sector begins with its own number and the
//! seed, and goes on with random bytes. So what is written to a place depends
//! on the place alone, in whatever order the writes end, and a block that
//! landed elsewhere is noticed.

use std::fs;
use std::path::Path;

use crate::BenchError;
use crate::plan::Rng;

const SECTOR: usize = 512;
/// Random bytes that stamped sectors are cut from: small enough for a cache.
const FILLER: usize = 64 << 10;

/// What reads have to return.
#[derive(Debug)]
pub enum Content {
    /// These bytes, from offset 0 on.
    Image(Vec<u8>),
    /// Stamped sectors.
    Stamped(Stamp),
    /// Not known: replies are only counted.
    Unchecked,
}

impl Content {
    /// The content of a file.
    pub fn load(path: &Path) -> Result<Self, BenchError> {
        fs::read(path)
            .map(Self::Image)
            .map_err(|cause| BenchError::File {
                path: path.display().to_string(),
                cause,
            })
    }

    /// Compares what came for `offset` with what has to be there.
    #[inline]
    pub fn check(&self, offset: u64, got: &[u8]) -> Result<(), BenchError> {
        match self {
            Self::Image(image) => {
                // `load` compared the sizes at the start, so this lies inside.
                let expected = &image[offset as usize..offset as usize + got.len()];
                if expected == got {
                    Ok(())
                } else {
                    Err(first_difference(offset, got, expected))
                }
            }
            Self::Stamped(stamp) => stamp.check(offset, got),
            Self::Unchecked => Ok(()),
        }
    }

    /// How far it reaches; `None` if there is no end.
    pub fn len_bytes(&self) -> Option<u64> {
        match self {
            Self::Image(image) => Some(image.len() as u64),
            Self::Stamped(_) | Self::Unchecked => None,
        }
    }
}

/// Makes and recognises stamped blocks.
#[derive(Clone, Debug)]
pub struct Stamp {
    seed: u64,
    filler: Vec<u8>,
}

impl Stamp {
    /// The stamps of a seed.
    pub fn new(seed: u64) -> Self {
        let mut filler = vec![0; FILLER];
        Rng::new(seed).fill(&mut filler);
        Self { seed, filler }
    }

    /// Appends what belongs at `offset`, a multiple of 512, to a buffer.
    pub fn append(&self, offset: u64, len: usize, to: &mut Vec<u8>) {
        let start = to.len();
        let mut at = offset as usize % FILLER;
        let mut left = len;
        while left > 0 {
            let piece = left.min(FILLER - at);
            to.extend_from_slice(&self.filler[at..at + piece]);
            left -= piece;
            at = 0;
        }
        let first = offset / SECTOR as u64;
        for (number, sector) in (first..).zip(to[start..].chunks_mut(SECTOR)) {
            let mark = self.mark(number);
            let marked = sector.len().min(mark.len());
            sector[..marked].copy_from_slice(&mark[..marked]);
        }
    }

    /// The first bytes of a sector.
    fn mark(&self, sector: u64) -> [u8; 16] {
        let mut mark = [0; 16];
        mark[..8].copy_from_slice(&sector.to_le_bytes());
        mark[8..].copy_from_slice(&self.seed.to_le_bytes());
        mark
    }

    fn check(&self, offset: u64, got: &[u8]) -> Result<(), BenchError> {
        let skip = offset as usize % SECTOR;
        let mut expected = Vec::with_capacity(skip + got.len());
        self.append(offset - skip as u64, skip + got.len(), &mut expected);
        if &expected[skip..] == got {
            Ok(())
        } else {
            Err(first_difference(offset, got, &expected[skip..]))
        }
    }
}

fn first_difference(offset: u64, got: &[u8], expected: &[u8]) -> BenchError {
    let index = got.iter().zip(expected).position(|(a, b)| a != b);
    let index = index.expect("called for slices that differ");
    BenchError::WrongData {
        at: offset + index as u64,
        got: got[index],
        expected: expected[index],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_is_recognised_in_any_pieces_and_only_at_its_place() {
        let stamp = Stamp::new(3);
        let mut block = Vec::new();
        stamp.append(FILLER as u64 - 1024, 4096, &mut block);
        let content = Content::Stamped(stamp);
        let base = FILLER as u64 - 1024;
        for cut in [0, 1, 15, 16, 511, 512, 513, 1024, 4095, 4096] {
            content.check(base, &block[..cut]).unwrap();
            content.check(base + cut as u64, &block[cut..]).unwrap();
        }
        assert!(content.check(base + 512, &block).is_err());
        assert!(
            content.check(base + FILLER as u64, &block).is_err(),
            "same filler, other sector"
        );
        assert!(Content::Stamped(Stamp::new(4)).check(base, &block).is_err());
    }

    #[test]
    fn the_first_wrong_byte_is_named() {
        let content = Content::Image(vec![1, 2, 3, 4]);
        let error = content.check(1, &[2, 9, 4]).unwrap_err();
        assert!(
            matches!(
                error,
                BenchError::WrongData {
                    at: 2,
                    got: 9,
                    expected: 3
                }
            ),
            "{error}"
        );
    }
}
