//! Where things lie in a store: area locations, the next data chunk, what fits.
//! One [`Layout`] answers for one chunk size. The engine allocates by it, the
//! checker checks by it, the command line sizes stores by it.
//!
//! Every function is total: for any numbers, also ones that only a damaged store
//! can hold, it returns and never panics. Results that do not fit saturate at
//! `u64::MAX`, a chunk, sector or byte that no device has, so that a comparison
//! with a device's length still comes out right.
//!
//! The module doc of the crate has the picture.

use std::fmt;

use crate::units::{ChunkSize, CowChunk};

/// The geometry of a persistent store with a given chunk size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    chunk_size: ChunkSize,
}

/// Where an exception's entry lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot {
    /// The area, counted from 0.
    pub area: u64,
    /// The entry in that area, counted from 0.
    pub index: u64,
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "area {}, entry {}", self.area, self.index)
    }
}

impl Layout {
    /// The layout of a store whose chunks are `chunk_size`.
    pub const fn new(chunk_size: ChunkSize) -> Self {
        Self { chunk_size }
    }

    /// The chunk size.
    pub const fn chunk_size(self) -> ChunkSize {
        self.chunk_size
    }

    /// Chunks from one area to the next: the area and the data it describes.
    const fn stride(self) -> u64 {
        self.chunk_size.exceptions_per_area() + 1
    }

    /// The chunk that holds area `n`.
    pub const fn area_location(self, n: u64) -> CowChunk {
        CowChunk(n.saturating_mul(self.stride()).saturating_add(1))
    }

    /// Whether `chunk` is the header or an area, never data.
    pub const fn is_metadata(self, chunk: CowChunk) -> bool {
        chunk.0 == 0 || chunk.0 % self.stride() == 1
    }

    /// The first data chunk at or after `chunk`. Where there is none that a u64
    /// can count, the last chunk of all, which no store has.
    pub const fn data_chunk_from(self, chunk: CowChunk) -> CowChunk {
        match chunk.0 {
            0 | 1 => CowChunk(2),
            // Two areas never lie side by side.
            _ if self.is_metadata(chunk) => CowChunk(chunk.0.saturating_add(1)),
            _ => chunk,
        }
    }

    /// The data chunk to hand out next, when a store is opened in which `highest`
    /// is the highest in use: the one behind it. Lower ones may be free after a
    /// merge or a crash; they stay so.
    pub const fn next_free(self, highest: Option<CowChunk>) -> CowChunk {
        let from = match highest {
            Some(chunk) => chunk.0.saturating_add(1),
            None => 0,
        };
        self.data_chunk_from(CowChunk(from))
    }

    /// How many data chunks lie before `chunk`.
    pub const fn data_chunks_before(self, chunk: CowChunk) -> u64 {
        let behind_header = chunk.0.saturating_sub(1);
        behind_header - behind_header.div_ceil(self.stride())
    }

    /// The slot of the `n`-th exception, counted from 0 over all areas.
    pub const fn slot(self, n: u64) -> Slot {
        let e = self.chunk_size.exceptions_per_area();
        Slot {
            area: n / e,
            index: n % e,
        }
    }

    /// The data chunk of the `n`-th exception (from 0), if no chunk was skipped.
    pub const fn data_chunk(self, n: u64) -> CowChunk {
        let areas_before = self.slot(n).area;
        CowChunk(n.saturating_add(areas_before).saturating_add(2))
    }

    /// Chunks of a store that holds `exceptions` exceptions, as the kernel
    /// counts them: header, areas and data, with the next area once one is full.
    const fn chunks_for(self, exceptions: u64) -> u64 {
        self.data_chunk(exceptions).0
    }

    /// Sectors of a store that holds `exceptions` exceptions, as the kernel
    /// counts them: header, areas and data, with the next area once one is full.
    pub const fn sectors_for(self, exceptions: u64) -> u64 {
        self.chunks_for(exceptions)
            .saturating_mul(self.chunk_size.sectors())
    }

    /// The largest store that an origin of `origin_bytes` bytes can ever need,
    /// in sectors: every chunk copied, the fraction at its end included.
    pub const fn sectors_needed_for_origin(self, origin_bytes: u64) -> u64 {
        self.sectors_for(self.chunk_size.chunks_to_cover(origin_bytes))
    }

    /// How many exceptions a store of `cow_bytes` bytes can hold, if no chunk is
    /// skipped: the number of slots for which there [is room](Self::has_room).
    pub const fn capacity(self, cow_bytes: u64) -> u64 {
        let e = self.chunk_size.exceptions_per_area();
        // Behind the header and area 0: rows of E data chunks and the next area.
        let chunks = self.chunk_size.whole_chunks(cow_bytes).saturating_sub(2);
        let (rows, rest) = (chunks / self.stride(), chunks % self.stride());
        // The last data chunk of a row is no use without the area behind it.
        rows * e + if rest < e { rest } else { e - 1 }
    }

    /// Whether a store of `cow_bytes` has room for an exception in slot `slot`
    /// (0-based, over all areas) whose data goes to `chunk`. The last slot of an
    /// area needs room for the next area too: the kernel cannot load a store
    /// that ends with a full area.
    pub const fn has_room(self, chunk: CowChunk, slot: u64, cow_bytes: u64) -> bool {
        let whole = self.chunk_size.whole_chunks(cow_bytes);
        let Slot { area, index } = self.slot(slot);
        let fills_area = index == self.chunk_size.exceptions_per_area() - 1;
        let next_area_fits = self.area_location(area.saturating_add(1)).0 < whole;
        chunk.0 < whole && (!fills_area || next_area_fits)
    }

    /// Sectors of metadata while `current_area` (from 0) is being filled, as
    /// `dmsetup status` counts them: the header and the areas up to that one.
    /// The current area of an empty store is 0.
    pub const fn metadata_sectors(self, current_area: u64) -> u64 {
        current_area
            .saturating_add(2)
            .saturating_mul(self.chunk_size.sectors())
    }

    /// Where area `n` begins in the store, in bytes.
    pub const fn area_offset(self, n: u64) -> u64 {
        self.chunk_size.cow_offset(self.area_location(n))
    }
}
