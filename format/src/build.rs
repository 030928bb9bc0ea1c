//! Lays out the metadata of a store: the areas, in pieces, and the header last. The
//! tools write stores with it; the engine, which fills areas one group at a time,
//! has its own way.
//!
//! The order is the one that a power cut cannot make a wrong store of, if each step
//! is flushed before the next: [`AreaBuilder`]'s pieces, then the header.

use crate::area::{EXCEPTION_BYTES, Exception};
use crate::dump::Stale;
use crate::layout::{Layout, Slot};
use crate::list::MAX_READ_BYTES;
use crate::units::ChunkSize;

/// Why the metadata does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BuildError {
    /// No room for an area.
    #[error(
        "the store is too short: area {area} of the exceptions ends at byte {needed}, and the store has {bytes}"
    )]
    NoArea {
        /// The area.
        area: u64,
        /// Where it ends.
        needed: u64,
        /// Bytes there are.
        bytes: u64,
    },
    /// An entry that does not lie behind the end of the list, in its area.
    #[error(
        "{at} does not lie behind the end of the list of exceptions, which is {end}, in the same area and in ascending order"
    )]
    Stale {
        /// Where it would lie.
        at: Slot,
        /// Where the list ends, or the last stale entry.
        end: Slot,
    },
}

/// Makes the areas of a store of `store_bytes` bytes: [`push`](Self::push) its
/// exceptions, then [`stale`](Self::stale) entries if there are any, then
/// [`finish`](Self::finish). Each hands its caller's `write` pieces of at most 1 MiB,
/// in ascending order.
#[derive(Clone, Debug)]
pub struct AreaBuilder {
    layout: Layout,
    store_bytes: u64,
    /// Entries so far, of any kind and over all areas.
    entries: u64,
    /// Those that no piece was made of yet.
    piece: Vec<u8>,
    exceptions: u64,
}

impl AreaBuilder {
    /// For a store of this chunk size and length.
    pub const fn new(chunk_size: ChunkSize, store_bytes: u64) -> Self {
        Self {
            layout: Layout::new(chunk_size),
            store_bytes,
            entries: 0,
            piece: Vec::new(),
            exceptions: 0,
        }
    }

    /// Exceptions so far.
    pub const fn exceptions(&self) -> u64 {
        self.exceptions
    }

    /// The next exception.
    pub fn push<E: From<BuildError>>(
        &mut self,
        exception: Exception,
        write: &mut impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.put(exception.encode(), write)?;
        self.exceptions += 1;
        Ok(())
    }

    /// An entry behind the end of the list.
    pub fn stale<E: From<BuildError>>(
        &mut self,
        stale: Stale,
        write: &mut impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let end = self.layout.slot(self.entries);
        let Slot { area, index } = stale.at;
        let in_area = index < self.layout.chunk_size().exceptions_per_area();
        // Straight behind the exceptions only what ends the list can lie.
        let ends_list = self.entries > self.exceptions || index > end.index || stale.new == 0;
        if area != end.area || !in_area || index < end.index || !ends_list {
            return Err(BuildError::Stale { at: stale.at, end }.into());
        }
        self.put_zeros(index - end.index, write)?;
        let mut entry = [0; EXCEPTION_BYTES];
        entry[..8].copy_from_slice(&stale.old.to_le_bytes());
        entry[8..].copy_from_slice(&stale.new.to_le_bytes());
        self.put(entry, write)
    }

    /// The rest of the area in which the list ends, as zeros. Where the last area is
    /// full and the next does not fit, there is none: such a store was found so.
    pub fn finish<E: From<BuildError>>(
        mut self,
        write: &mut impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let per_area = self.layout.chunk_size().exceptions_per_area();
        let fills = self.entries.is_multiple_of(per_area);
        if self.entries > 0 && fills && (self.exceptions < self.entries || !self.has_area()) {
            return Ok(());
        }
        self.put_zeros(per_area - self.entries % per_area, write)
    }

    /// Whether the area of the next entry lies in the store.
    fn has_area(&self) -> bool {
        self.area_end() <= self.store_bytes
    }

    fn area_end(&self) -> u64 {
        let area = self.layout.slot(self.entries).area;
        self.layout
            .area_offset(area)
            .saturating_add(self.layout.chunk_size().bytes())
    }

    fn put<E: From<BuildError>>(
        &mut self,
        entry: [u8; EXCEPTION_BYTES],
        write: &mut impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.insist_on_area()?;
        self.piece.extend_from_slice(&entry);
        self.entries += 1;
        self.write_if_full(write)
    }

    /// Empty entries of one area, a piece at a time: there may be 67 million of them.
    fn put_zeros<E: From<BuildError>>(
        &mut self,
        entries: u64,
        write: &mut impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut left = entries;
        while left > 0 {
            self.insist_on_area()?;
            let room = (self.piece_bytes() - self.piece.len()) / EXCEPTION_BYTES;
            let now = left.min(room as u64);
            let bytes = now as usize * EXCEPTION_BYTES;
            self.piece.resize(self.piece.len() + bytes, 0);
            self.entries += now;
            left -= now;
            self.write_if_full(write)?;
        }
        Ok(())
    }

    fn insist_on_area(&self) -> Result<(), BuildError> {
        if self.has_area() {
            return Ok(());
        }
        Err(BuildError::NoArea {
            area: self.layout.slot(self.entries).area,
            needed: self.area_end(),
            bytes: self.store_bytes,
        })
    }

    fn piece_bytes(&self) -> usize {
        self.layout.chunk_size().bytes().min(MAX_READ_BYTES) as usize
    }

    fn write_if_full<E>(
        &mut self,
        write: &mut impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.piece.len() < self.piece_bytes() {
            return Ok(());
        }
        let Slot { area, index } = self.layout.slot(self.entries - 1);
        let end = (index + 1) * EXCEPTION_BYTES as u64;
        let offset = self.layout.area_offset(area) + end - self.piece.len() as u64;
        write(offset, &self.piece)?;
        self.piece.clear();
        Ok(())
    }
}
