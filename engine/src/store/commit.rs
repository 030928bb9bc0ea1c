//! Group commit of a persistent store, and the order that the Law asks for.
//!
//! Every exception of a store has a *slot*: its index over all areas, handed out
//! in the order of allocation. Four watermarks over the slots say how far the
//! store has come, each never ahead of the one before it:
//!
//! ```text
//! durable <= committed <= data_durable <= copied <= allocated
//! ```
//!
//! - `copied`: the chunks of all slots below have been written to the store;
//! - `data_durable`: a flush that began after that has ended;
//! - `committed`: their entries have been written to the area;
//! - `durable`: a flush that began after *that* has ended.
//!
//! One flush moves two watermarks at once (the entries of one group and the data
//! of the next), so under load a group costs one flush, not two. One area write
//! is in flight at a time, and a flush does not begin while it is.

use std::collections::VecDeque;

use bytes::Bytes;
use nbdsnap_format::{CowChunk, Exception, Layout, OriginChunk};

use crate::law::Law;

/// Areas are rewritten in blocks of this size (or of a chunk, if that is
/// smaller): a page of the page cache, so that none is read to be written.
const BLOCK_BYTES: u64 = 4096;

/// Bytes of an exception, as [`Exception::encode`] makes them.
const ENTRY_BYTES: u64 = nbdsnap_format::area::EXCEPTION_BYTES as u64;

/// An exception whose entry is not in its area yet.
#[derive(Clone, Copy, Debug)]
struct Entry {
    exception: Exception,
    copied: bool,
}

/// What is known of the area after the current one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NextArea {
    /// Nothing.
    Unknown,
    /// It is being zeroed.
    Zeroing,
    /// It was zeroed; a flush that begins now makes that durable.
    Zeroed,
    /// It is zero, durably: the current one may fill.
    Durable,
}

/// What a flush, once ended, makes durable: the state when it began.
#[derive(Clone, Copy, Debug)]
struct FlushMark {
    copied: u64,
    committed: u64,
    next_area_zeroed: bool,
}

/// A piece of an area to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AreaWrite {
    /// Bytes from the start of the store.
    pub(crate) offset: u64,
    /// Whole blocks: entries, then zeros.
    pub(crate) data: Bytes,
}

/// The commit pipeline of one persistent store.
#[derive(Debug)]
pub(crate) struct Commit {
    layout: Layout,
    law: Law,
    /// Allocated, not committed; the front has slot `committed`.
    queue: VecDeque<Entry>,
    copied: u64,
    data_durable: u64,
    committed: u64,
    durable: u64,
    /// The store chunks of slots `durable..committed`.
    volatile: VecDeque<CowChunk>,
    /// The slot at which the area write in flight ends.
    area_write: Option<u64>,
    /// The committed entries of the block that slot `committed` lies in.
    block: Vec<Exception>,
    next_area: NextArea,
    flush: Option<FlushMark>,
}

impl Commit {
    /// The pipeline of a store that holds `slots` durable exceptions; `block` are
    /// those of the block that the next one falls in.
    pub(crate) fn new(layout: Layout, law: Law, slots: u64, block: Vec<Exception>) -> Self {
        let this = Self {
            layout,
            law,
            queue: VecDeque::new(),
            copied: slots,
            data_durable: slots,
            committed: slots,
            durable: slots,
            volatile: VecDeque::new(),
            area_write: None,
            block,
            next_area: NextArea::Unknown,
            flush: None,
        };
        assert_eq!(this.block.len() as u64, slots % this.block_entries());
        this
    }

    fn per_area(&self) -> u64 {
        self.layout.chunk_size().exceptions_per_area()
    }

    /// Entries in a block of an area.
    fn block_entries(&self) -> u64 {
        block_entries(self.layout)
    }

    /// The slot that the next allocated exception gets.
    pub(crate) fn next_slot(&self) -> u64 {
        self.committed + self.queue.len() as u64
    }

    /// The area that the next committed entry goes to; the kernel's `current_area`.
    pub(crate) fn current_area(&self) -> u64 {
        self.committed / self.per_area()
    }

    /// Exceptions whose entries are durable in the order of slots, up to here.
    pub(crate) fn durable(&self) -> u64 {
        self.durable
    }

    /// Entries written to their areas, up to here.
    pub(crate) fn committed(&self) -> u64 {
        self.committed
    }

    /// Take in exceptions that were allocated just now, in order.
    pub(crate) fn allocated(&mut self, old: OriginChunk, new: CowChunk, count: u64) {
        self.queue.extend((0..count).map(|i| Entry {
            exception: Exception {
                old: OriginChunk(old.0 + i),
                new: CowChunk(new.0 + i),
            },
            copied: false,
        }));
    }

    /// The chunks of `count` slots from `slot` on have been written.
    pub(crate) fn copied(&mut self, slot: u64, count: u64) {
        let first = (slot - self.committed) as usize;
        for entry in self.queue.range_mut(first..first + count as usize) {
            assert!(!entry.copied, "a chunk is copied once");
            entry.copied = true;
        }
        let at = (self.copied - self.committed) as usize;
        self.copied += self.queue.range(at..).take_while(|e| e.copied).count() as u64;
    }

    /// The slot of a committed exception that is not durable yet, by its store chunk.
    pub(crate) fn volatile_slot(&self, new: CowChunk) -> Option<u64> {
        // Chunks are handed out in ascending order, so the list is sorted.
        if self.volatile.front().is_none_or(|&first| new < first) {
            return None;
        }
        let index = self.volatile.binary_search(&new).ok()?;
        Some(self.durable + index as u64)
    }

    /// Every exception that was allocated is in its area, and nothing is under way.
    pub(crate) fn is_settled(&self) -> bool {
        self.queue.is_empty() && self.can_flush()
    }

    /// Every exception that was allocated is durable, and nothing is under way.
    pub(crate) fn is_durable(&self) -> bool {
        self.is_settled() && self.durable == self.committed
    }

    /// The area to zero now, because the current one is about to fill.
    pub(crate) fn poll_zeros(&mut self) -> Option<u64> {
        if !self.law.zeros_before_full_area() {
            return None;
        }
        let next = self.current_area() + 1;
        if self.next_area == NextArea::Unknown && self.next_slot() >= next * self.per_area() {
            self.next_area = NextArea::Zeroing;
            return Some(next);
        }
        None
    }

    /// The zeros of the next area have been written.
    pub(crate) fn zeros_ended(&mut self) {
        assert_eq!(self.next_area, NextArea::Zeroing);
        self.next_area = NextArea::Zeroed;
    }

    /// Where the next area write would end.
    fn group_end(&self) -> u64 {
        let ready = if self.law.data_before_area() {
            self.data_durable
        } else {
            self.copied
        };
        let area_end = (self.current_area() + 1) * self.per_area();
        let zeros = self.next_area == NextArea::Durable || !self.law.zeros_before_full_area();
        if ready >= area_end {
            area_end - u64::from(!zeros)
        } else {
            ready
        }
    }

    /// The area write to do now, if the Law allows one.
    pub(crate) fn poll_area_write(&mut self) -> Option<AreaWrite> {
        let end = self.group_end();
        if self.area_write.is_some() || end <= self.committed {
            return None;
        }
        self.area_write = Some(end);
        let in_area = self.committed % self.per_area();
        let first = in_area - self.block.len() as u64;
        let fresh = (end - self.committed) as usize;
        let entries = self.block.len() + fresh;
        let blocks = (entries as u64).div_ceil(self.block_entries());
        let mut data = Vec::with_capacity((blocks * self.block_entries() * ENTRY_BYTES) as usize);
        for exception in &self.block {
            data.extend_from_slice(&exception.encode());
        }
        for entry in self.queue.range(..fresh) {
            data.extend_from_slice(&entry.exception.encode());
        }
        data.resize(data.capacity(), 0);
        Some(AreaWrite {
            offset: self.layout.area_offset(self.current_area()) + first * ENTRY_BYTES,
            data: data.into(),
        })
    }

    /// The area write has ended: the first slot it committed, and its exceptions.
    pub(crate) fn area_write_ended(&mut self) -> (u64, Vec<Exception>) {
        let end = self.area_write.take().expect("an area write is in flight");
        let first = self.committed;
        let group: Vec<_> = self
            .queue
            .drain(..(end - first) as usize)
            .map(|e| e.exception)
            .collect();
        self.volatile.extend(group.iter().map(|e| e.new));
        self.block.extend_from_slice(&group);
        if end.is_multiple_of(self.per_area()) {
            self.next_area = NextArea::Unknown;
        }
        let keep = (end % self.block_entries()) as usize;
        self.block.drain(..self.block.len() - keep);
        self.committed = end;
        // A mutant may have written entries before their data was durable.
        self.data_durable = self.data_durable.max(end);
        (first, group)
    }

    /// Whether a flush would bring something forward: data that waits for its
    /// area write, zeros that a full area waits for, or entries below
    /// `durable_wanted` that are not durable.
    pub(crate) fn wants_flush(&self, durable_wanted: u64) -> bool {
        let group_waits = self.copied > self.data_durable;
        let zeros_wait = self.next_area == NextArea::Zeroed;
        let entries_wait = self.durable < durable_wanted.min(self.committed);
        group_waits || zeros_wait || entries_wait
    }

    /// A flush may begin: none is running, and no area write either, which it
    /// would miss.
    pub(crate) fn can_flush(&self) -> bool {
        self.flush.is_none() && self.area_write.is_none()
    }

    /// A flush of the store begins now.
    pub(crate) fn flush_begun(&mut self) {
        assert!(self.can_flush());
        self.flush = Some(FlushMark {
            copied: self.copied,
            committed: self.committed,
            next_area_zeroed: self.next_area == NextArea::Zeroed,
        });
    }

    /// It has ended well.
    pub(crate) fn flush_ended(&mut self) {
        let mark = self.flush.take().expect("a flush is running");
        self.data_durable = self.data_durable.max(mark.copied);
        self.volatile
            .drain(..(mark.committed - self.durable) as usize);
        self.durable = mark.committed;
        if mark.next_area_zeroed {
            self.next_area = NextArea::Durable;
        }
        assert!(self.durable <= self.committed && self.committed <= self.copied);
    }
}

/// Entries in a block of an area of this layout.
pub(crate) fn block_entries(layout: Layout) -> u64 {
    BLOCK_BYTES.min(layout.chunk_size().bytes()) / ENTRY_BYTES
}
