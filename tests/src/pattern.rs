//! What the simulator writes, so that every byte says where it came from: a
//! [`Stamp`] names a write, and the bytes of a stamp differ at every offset.
//!
//! A view is divided into cells, four a sector, cut at odd places: requests of
//! the workload begin and end at cells, so that they meet sectors and chunks at
//! awkward bytes, while the model keeps one value a cell instead of one a byte.

/// Names a write. [`ZERO`] is what zeroed ranges hold.
pub type Stamp = u32;

/// The stamp of zeros.
pub const ZERO: Stamp = 0;

/// Bytes in a sector.
pub const SECTOR: u64 = 512;

/// Where the cells of a sector begin.
const CUTS: [u64; 4] = [0, 37, 256, 509];

/// Cells in a sector.
pub const CELLS: usize = CUTS.len();

/// A run of cells, from the first to before the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cells {
    /// The first.
    pub from: usize,
    /// One past the last.
    pub to: usize,
}

impl Cells {
    /// Whether the two have a cell in common.
    pub fn overlaps(self, other: Self) -> bool {
        self.from < other.to && other.from < self.to
    }

    /// The first byte.
    pub fn offset(self) -> u64 {
        byte_of(self.from)
    }

    /// How many bytes.
    pub fn len_bytes(self) -> u64 {
        byte_of(self.to) - byte_of(self.from)
    }

    /// The chunks of `chunk_bytes` that it touches, from the first to before the last.
    pub fn chunks(self, chunk_bytes: u64) -> std::ops::Range<u64> {
        if self.from == self.to {
            return 0..0;
        }
        self.offset() / chunk_bytes..(self.offset() + self.len_bytes()).div_ceil(chunk_bytes)
    }
}

/// Where a cell begins, in bytes.
pub fn byte_of(cell: usize) -> u64 {
    (cell / CELLS) as u64 * SECTOR + CUTS[cell % CELLS]
}

/// The eight bytes of `stamp` at `word`, counted in words from the view's beginning.
fn word(stamp: Stamp, word: u64) -> u64 {
    if stamp == ZERO {
        return 0;
    }
    let mut z = (u64::from(stamp) << 32 | word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z ^ (z >> 32)
}

/// Write the bytes of `stamp` at `offset` into `out`.
pub fn fill(stamp: Stamp, offset: u64, out: &mut [u8]) {
    let mut at = offset;
    let mut rest = out;
    while !rest.is_empty() {
        let bytes = word(stamp, at / 8).to_le_bytes();
        let skip = (at % 8) as usize;
        let n = rest.len().min(8 - skip);
        rest[..n].copy_from_slice(&bytes[skip..skip + n]);
        rest = &mut rest[n..];
        at += n as u64;
    }
}

/// The bytes of `stamp` over `cells`.
pub fn bytes(stamp: Stamp, cells: Cells) -> Vec<u8> {
    let mut out = vec![0; cells.len_bytes() as usize];
    fill(stamp, cells.offset(), &mut out);
    out
}

/// Whether `found`, which lies at `offset`, holds the bytes of `stamp`.
pub fn matches(stamp: Stamp, offset: u64, found: &[u8]) -> bool {
    // Up to the first whole word, the whole words, and what is left.
    let head = ((offset.next_multiple_of(8) - offset) as usize).min(found.len());
    let (words, tail) = found[head..].as_chunks::<8>();
    let first = offset.div_ceil(8);
    let part = |from: u64, bytes: &[u8]| {
        bytes.iter().enumerate().all(|(i, byte)| {
            let at = from + i as u64;
            word(stamp, at / 8).to_le_bytes()[(at % 8) as usize] == *byte
        })
    };
    part(offset, &found[..head])
        && words
            .iter()
            .zip(first..)
            .all(|(bytes, n)| u64::from_le_bytes(*bytes) == word(stamp, n))
        && part((first + words.len() as u64) * 8, tail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_matches_itself_and_no_other() {
        let cells = Cells { from: 3, to: 13 };
        let data = bytes(7, cells);
        assert!(matches(7, cells.offset(), &data));
        assert!(!matches(8, cells.offset(), &data));
        assert!(!matches(7, cells.offset() + 512, &data));
        assert!(matches(ZERO, 5, &[0; 40]));
    }

    #[test]
    fn cells_cover_sectors_without_gaps() {
        let total: u64 = (0..8)
            .map(|c| Cells { from: c, to: c + 1 }.len_bytes())
            .sum();
        assert_eq!(total, 2 * SECTOR);
        assert_eq!(Cells { from: 7, to: 9 }.chunks(512), 1..3);
    }
}
