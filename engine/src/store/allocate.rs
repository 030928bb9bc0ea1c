//! Which store chunk the next exception gets, and what to do when there is none.

use nbdsnap_format::{CowChunk, Layout, SECTOR_BYTES};

use super::StoreSize;

/// Chunks in a row for exceptions in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Allocation {
    /// The first chunk.
    pub(crate) first: CowChunk,
    /// The slot of the first.
    pub(crate) slot: u64,
    /// How many.
    pub(crate) count: u64,
}

/// Why nothing was allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoRoom {
    /// The file has to grow first, and may.
    Grow,
    /// The store is full.
    Full,
}

/// How an attempt to grow a store's file ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Growth {
    /// The file has grown.
    Done,
    /// It has not, ahead of any need: there may be room when there is one.
    Postponed,
    /// It has not, and somebody needs it.
    Refused,
}

/// Where the growth of a store's file stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Growing {
    Idle,
    Running(u64),
    /// The last attempt failed ahead of need: the next is made when there is one.
    WhenNeeded,
}

/// The allocator of one store.
#[derive(Debug)]
pub(crate) struct Allocator {
    layout: Layout,
    /// A transient store has no metadata to step over.
    persistent: bool,
    next_free: CowChunk,
    next_slot: u64,
    size: StoreSize,
    /// Of a size that is not the engine's to change: a device.
    fixed: bool,
    growing: Growing,
}

impl Allocator {
    pub(crate) fn new(
        layout: Layout,
        persistent: bool,
        next_free: CowChunk,
        next_slot: u64,
        size: StoreSize,
    ) -> Self {
        Self {
            layout,
            persistent,
            next_free,
            next_slot,
            size,
            fixed: size.step == 0 && size.ready == size.limit,
            growing: Growing::Idle,
        }
    }

    /// The chunk that the next exception would get.
    pub(crate) fn next_free(&self) -> CowChunk {
        self.next_free
    }

    /// Bytes that the store may come to have.
    pub(crate) fn limit(&self) -> u64 {
        self.size.limit
    }

    /// Bytes that can be used now.
    pub(crate) fn ready(&self) -> u64 {
        self.size.ready
    }

    /// Let the store become as large as `limit`, in whole sectors. False if it
    /// may become larger already.
    pub(crate) fn extend(&mut self, limit: u64) -> bool {
        let limit = limit / SECTOR_BYTES * SECTOR_BYTES;
        if limit < self.size.limit / SECTOR_BYTES * SECTOR_BYTES {
            return false;
        }
        self.size.limit = self.size.limit.max(limit);
        if self.fixed {
            self.size.ready = self.size.limit;
        }
        true
    }

    fn has_room(&self, chunk: CowChunk, slot: u64, bytes: u64) -> bool {
        if self.persistent {
            self.layout.has_room(chunk, slot, bytes)
        } else {
            chunk.0 < self.layout.chunk_size().whole_chunks(bytes)
        }
    }

    /// Up to `wanted` chunks, as many as lie in a row.
    pub(crate) fn allocate(&mut self, wanted: u64) -> Result<Allocation, NoRoom> {
        let (first, slot) = (self.next_free, self.next_slot);
        let mut count = 0;
        while count < wanted
            && self.next_free.0 == first.0 + count
            && self.has_room(self.next_free, self.next_slot, self.size.ready)
        {
            count += 1;
            self.next_slot += 1;
            let next = CowChunk(self.next_free.0 + 1);
            self.next_free = if self.persistent {
                self.layout.data_chunk_from(next)
            } else {
                next
            };
        }
        if count > 0 {
            return Ok(Allocation { first, slot, count });
        }
        if self.has_room(first, slot, self.size.limit) {
            Err(NoRoom::Grow)
        } else {
            Err(NoRoom::Full)
        }
    }

    /// The length to grow to now, because less than half a step is left.
    pub(crate) fn poll_growth(&mut self) -> Option<u64> {
        let used = self.layout.chunk_size().cow_offset(self.next_free);
        let step = self.size.step.max(4 * self.layout.chunk_size().bytes());
        let left = self.size.ready.saturating_sub(used);
        let wanted = match self.growing {
            Growing::Idle => left < (step / 2).max(2 * self.layout.chunk_size().bytes()),
            Growing::Running(_) => false,
            Growing::WhenNeeded => !self.has_room(self.next_free, self.next_slot, self.size.ready),
        };
        if !wanted || self.size.ready >= self.size.limit {
            return None;
        }
        let to = self.size.ready.saturating_add(step).min(self.size.limit);
        self.growing = Growing::Running(to);
        Some(to)
    }

    /// Growth has ended. If it was refused, the store is as large as it will be.
    pub(crate) fn growth_ended(&mut self, how: Growth) {
        let Growing::Running(to) = std::mem::replace(&mut self.growing, Growing::Idle) else {
            panic!("growth ends once");
        };
        match how {
            Growth::Done => self.size.ready = to,
            Growth::Postponed => self.growing = Growing::WhenNeeded,
            Growth::Refused => self.size.limit = self.size.ready,
        }
    }
}
