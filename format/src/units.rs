//! Units that cannot be mixed: sectors, chunk sizes, chunks of the origin and
//! chunks of the COW store. A chunk number means nothing without knowing which
//! of the two devices it counts, so each has its own type.

use std::fmt;

/// Bytes in a sector, the unit of the kernel's block layer.
pub const SECTOR_BYTES: u64 = 512;

/// A chunk of the origin: the `old_chunk` of an exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OriginChunk(pub u64);

/// A chunk of the COW store: the `new_chunk` of an exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CowChunk(pub u64);

impl fmt::Display for OriginChunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for CowChunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A chunk size: a power of two of sectors, from 1 to 2^21 (1 GiB), the range
/// that dm-snapshot accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkSize {
    shift: u8,
}

/// Why a number of sectors is no chunk size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChunkSizeError {
    /// Zero or not a power of two.
    #[error("chunk size of {0} sectors is not a power of two")]
    NotPowerOfTwo(u64),
    /// More than 2^21 sectors.
    #[error("chunk size of {0} sectors is larger than 2097152 sectors (1 GiB)")]
    TooLarge(u64),
    /// A number of bytes that is no whole number of sectors.
    #[error("chunk size of {0} bytes is not a multiple of 512 bytes")]
    NotSectors(u64),
}

impl ChunkSize {
    /// dm-snapshot's default, 32 sectors (16 KiB).
    pub const DEFAULT: Self = Self { shift: 5 };
    /// The smallest: 1 sector.
    pub const MIN: Self = Self { shift: 0 };
    /// The largest: 2^21 sectors.
    pub const MAX: Self = Self { shift: 21 };

    /// A chunk size of `sectors` sectors.
    pub const fn from_sectors(sectors: u64) -> Result<Self, ChunkSizeError> {
        if !sectors.is_power_of_two() {
            return Err(ChunkSizeError::NotPowerOfTwo(sectors));
        }
        if sectors > 1 << 21 {
            return Err(ChunkSizeError::TooLarge(sectors));
        }
        Ok(Self {
            shift: sectors.trailing_zeros() as u8,
        })
    }

    /// A chunk size of `bytes` bytes.
    pub const fn from_bytes(bytes: u64) -> Result<Self, ChunkSizeError> {
        if !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(ChunkSizeError::NotSectors(bytes));
        }
        Self::from_sectors(bytes / SECTOR_BYTES)
    }

    /// Sectors in a chunk.
    pub const fn sectors(self) -> u64 {
        1 << self.shift
    }

    /// Bytes in a chunk.
    pub const fn bytes(self) -> u64 {
        SECTOR_BYTES << self.shift
    }

    /// Exceptions in an area: one chunk of 16-byte exceptions.
    pub const fn exceptions_per_area(self) -> u64 {
        self.bytes() / 16
    }

    /// The origin chunk that holds byte `offset`.
    pub const fn origin_chunk(self, offset: u64) -> OriginChunk {
        OriginChunk(offset >> (self.shift + 9))
    }

    /// Where `chunk` begins on the origin, in bytes; `u64::MAX`, past the end of
    /// any device, where that is no u64.
    pub const fn origin_offset(self, chunk: OriginChunk) -> u64 {
        chunk.0.saturating_mul(self.bytes())
    }

    /// Where `chunk` begins on the COW store, in bytes; `u64::MAX`, past the end
    /// of any device, where that is no u64.
    pub const fn cow_offset(self, chunk: CowChunk) -> u64 {
        chunk.0.saturating_mul(self.bytes())
    }

    /// How many chunks cover an origin of `bytes` bytes, a fraction at its end included.
    pub const fn chunks_to_cover(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.bytes())
    }

    /// How many whole chunks fit into a store of `bytes` bytes.
    pub const fn whole_chunks(self, bytes: u64) -> u64 {
        bytes >> (self.shift + 9)
    }
}

impl fmt::Display for ChunkSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} sectors", self.sectors())
    }
}
