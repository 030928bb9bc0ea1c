//! One snapshot of a volume: its state, its exceptions, and who waits for what
//! in it. It decides nothing about disks: `volume` does, with its help.

use std::collections::BTreeMap;

use nbdsnap_format::{ChunkSize, CowChunk, Layout, OriginChunk, SECTOR_BYTES};

use crate::disk::Device;
use crate::in_flight::Ranges;
use crate::law::Law;
use crate::request::{Failure, SnapshotId};
use crate::store::{Allocation, Allocator, Commit, Status, Store, StoreKind, metadata_sectors};
use crate::table::{ExceptionTable, Run};
use crate::volume::active::RequestKey;
use crate::volume::full::FILLING;
use crate::volume::task::TaskId;
use crate::volume::{Extent, OnFull};

/// Where a snapshot stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Its instant has not been taken: origin writes pass it by.
    Creating,
    /// It works.
    Active,
    /// It can be read; a write found no space in its PO store.
    Overflowed,
    /// It is lost; the header that says so is on its way to the disk, or a mark
    /// elsewhere.
    Invalidating(&'static str),
    /// It is lost, durably.
    Invalid,
    /// It is lost, and no disk knows: an origin write that it has no durable
    /// copy for would let a stale snapshot come back, so it fails.
    Unmarked,
    /// It is being removed: nobody may use it, and it goes when nothing is in
    /// flight for it any more.
    Removing,
}

/// How far the header that says invalid has come, in a snapshot that is being lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InvalidHeader {
    /// Not yet written.
    Unwritten,
    /// Written, to be flushed.
    Written,
    /// It cannot be made durable: the caller is asked for a mark elsewhere.
    Impossible,
}

/// An exception between its allocation and its place in the table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pending {
    /// Its place in the order of allocation.
    pub(crate) slot: u64,
}

/// A snapshot and its store.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) id: SnapshotId,
    pub(crate) kind: StoreKind,
    pub(crate) chunk_size: ChunkSize,
    /// Bytes of the snapshot: those that the origin had at its instant. What is
    /// written to the origin behind them is no concern of its.
    pub(crate) origin_bytes: u64,
    /// Copies of its last chunk take so many bytes more of the origin, behind the
    /// snapshot's own end.
    pub(crate) copied_behind: u64,
    pub(crate) state: State,
    pub(crate) on_full: OnFull,
    /// With [`OnFull::Invalidate`]: a write of its own that finds the store full leaves
    /// it readable.
    pub(crate) overflows: bool,
    /// [`crate::Event::Full`] has been said since the store was last extended.
    pub(crate) full: bool,
    /// How many of the marks of [`crate::Event::Filling`] have been said.
    pub(crate) filling_said: usize,
    pub(crate) table: ExceptionTable,
    /// Exceptions that are being copied or committed, by origin chunk.
    pub(crate) pending: BTreeMap<u64, Pending>,
    pub(crate) allocator: Allocator,
    /// None for a transient store: it has nothing to commit.
    pub(crate) commit: Option<Commit>,
    /// Writes of the snapshot's own clients that have not ended.
    pub(crate) writes: Ranges,
    /// Who waits for the exception of a slot to be in the table.
    pub(crate) until_published: BTreeMap<u64, Vec<TaskId>>,
    /// Who waits for the exception of a slot to be durable.
    pub(crate) until_durable: BTreeMap<u64, Vec<TaskId>>,
    /// Who waits for the store to grow.
    pub(crate) until_grown: Vec<TaskId>,
    /// Who waits for room in a store that is full.
    pub(crate) until_extended: Vec<TaskId>,
    /// Who waits for the end of [`State::Invalidating`].
    pub(crate) until_invalid: Vec<TaskId>,
    /// Requests that a flush of the store, not begun yet, shall end.
    pub(crate) until_flushed: Vec<RequestKey>,
    /// A flush is to be begun whether or not anybody waits for it.
    pub(crate) flush_wanted: bool,
    /// The store was written since the volume took it in.
    pub(crate) touched: bool,
    /// Already in the volume's list of snapshots to look after.
    pub(crate) listed: bool,
    /// A flush for commits, FLUSH or FUA is running.
    pub(crate) is_flushing: bool,
    /// The header that says invalid.
    pub(crate) header: InvalidHeader,
    /// Requests that the running flush of the store will end.
    pub(crate) flushing: Vec<RequestKey>,
    pub(crate) layout: Layout,
}

impl Snapshot {
    pub(crate) fn new(
        id: SnapshotId,
        store: Store,
        state: State,
        law: Law,
        origin_bytes: u64,
    ) -> Self {
        let persistent = store.kind != StoreKind::Transient;
        let slots = store.table.len();
        let layout = store.layout;
        let state = if store.invalid { State::Invalid } else { state };
        let commit =
            (persistent && !store.invalid).then(|| Commit::new(layout, law, slots, store.block));
        let mut this = Self {
            id,
            kind: store.kind,
            chunk_size: layout.chunk_size(),
            origin_bytes,
            copied_behind: 0,
            state,
            on_full: OnFull::default(),
            overflows: store.kind == StoreKind::PersistentOverflow,
            full: false,
            filling_said: 0,
            table: store.table,
            pending: BTreeMap::new(),
            allocator: Allocator::new(layout, persistent, store.next_free, slots, store.size),
            commit,
            writes: Ranges::default(),
            until_published: BTreeMap::new(),
            until_durable: BTreeMap::new(),
            until_grown: Vec::new(),
            until_extended: Vec::new(),
            until_invalid: Vec::new(),
            until_flushed: Vec::new(),
            flush_wanted: false,
            touched: false,
            listed: false,
            is_flushing: false,
            header: InvalidHeader::Unwritten,
            flushing: Vec::new(),
            layout,
        };
        this.filling_said = this.filling();
        this
    }

    /// How many of the marks of [`crate::Event::Filling`] its store has reached.
    pub(crate) fn filling(&self) -> usize {
        let allocated = u128::from(self.chunk_size.cow_offset(self.allocator.next_free()));
        let limit = u128::from(self.allocator.limit());
        let reached = |&&percent: &&u8| 100 * allocated >= u128::from(percent) * limit;
        FILLING.iter().take_while(reached).count()
    }

    /// It is lost, and a mark elsewhere is being made.
    pub(crate) fn waits_for_mark(&self) -> bool {
        matches!(self.state, State::Invalidating(_)) && self.header == InvalidHeader::Impossible
    }

    /// It is one of the volume's views: clients may ask for it.
    pub(crate) fn is_there(&self) -> bool {
        !matches!(self.state, State::Creating | State::Removing)
    }

    /// It can be read.
    pub(crate) fn is_readable(&self) -> bool {
        matches!(self.state, State::Active | State::Overflowed)
    }

    pub(crate) fn status(&self) -> Status {
        match self.state {
            State::Invalidating(_) | State::Invalid | State::Unmarked | State::Removing => {
                Status::Invalid
            }
            State::Overflowed => Status::Overflow,
            State::Creating | State::Active => Status::Active {
                allocated: self.allocator.next_free().0 * self.chunk_size.sectors(),
                total: self.allocator.limit() / SECTOR_BYTES,
                metadata: metadata_sectors(
                    self.kind,
                    self.layout,
                    self.commit.as_ref().map_or(0, Commit::current_area),
                ),
            },
        }
    }

    pub(crate) fn area_offset(&self, area: u64) -> u64 {
        self.layout.area_offset(area)
    }

    /// The chunks that `start..end` (bytes, not empty) touches, as numbers.
    pub(crate) fn chunks(&self, start: u64, end: u64) -> std::ops::Range<u64> {
        self.chunk_size.origin_chunk(start).0..self.chunk_size.origin_chunk(end - 1).0 + 1
    }

    /// Append where the bytes `start..end` of the snapshot lie, in order, until
    /// there are `max` extents.
    pub(crate) fn resolve(
        &self,
        start: u64,
        end: u64,
        max: usize,
        extents: &mut Vec<Extent>,
    ) -> Result<(), Failure> {
        if !self.is_readable() {
            return Err(Failure::Io);
        }
        let cow = Device::Cow(self.id);
        resolve(&self.table, self.chunk_size, cow, start..end, max, extents);
        Ok(())
    }

    /// The snapshot can be read, and all bytes `start..end` of it (not empty) are its
    /// origin's.
    pub(crate) fn has_no_copy_of(&self, start: u64, end: u64) -> bool {
        let chunks = self.chunks(start, end);
        let len = chunks.end - chunks.start;
        let first = OriginChunk(chunks.start);
        self.is_readable() && self.table.run_at(first, len) == Run::Unmapped { len }
    }

    /// Whether every chunk of `start..end` that the snapshot has has an exception,
    /// all of them durable.
    pub(crate) fn is_durable(&self, start: u64, end: u64, law: Law) -> bool {
        let mut all = true;
        let end = end.min(self.origin_bytes);
        if start >= end {
            return all;
        }
        self.each_run(start, end, |_, run| {
            all = match run {
                Run::Mapped { first, len } => self.volatile_slot(first, len, law).is_none(),
                Run::Unmapped { .. } => false,
            };
            all
        });
        all
    }

    /// Whether every chunk of `start..end` that the snapshot has has an exception.
    pub(crate) fn is_mapped(&self, start: u64, end: u64) -> bool {
        let mut all = true;
        let end = end.min(self.origin_bytes);
        if start >= end {
            return all;
        }
        self.each_run(start, end, |_, run| {
            all = matches!(run, Run::Mapped { .. });
            all
        });
        all
    }

    /// Show `visit` the runs of `start..end` in order, until it says false.
    pub(crate) fn each_run(
        &self,
        start: u64,
        end: u64,
        mut visit: impl FnMut(OriginChunk, Run) -> bool,
    ) {
        let chunks = self.chunks(start, end);
        let mut at = chunks.start;
        while at < chunks.end {
            let run = self.table.run_at(OriginChunk(at), chunks.end - at);
            if !visit(OriginChunk(at), run) {
                return;
            }
            at += match run {
                Run::Mapped { len, .. } | Run::Unmapped { len } => len,
            };
        }
    }

    /// The last slot among `len` mapped store chunks from `first` on whose
    /// exception is not durable yet.
    pub(crate) fn volatile_slot(&self, first: CowChunk, len: u64, law: Law) -> Option<u64> {
        if !law.volatile_is_not_durable() {
            return None;
        }
        // Slots ascend with store chunks, so the last chunk speaks for all.
        self.commit
            .as_ref()?
            .volatile_slot(CowChunk(first.0 + len - 1))
    }

    /// Note that `allocation` was made for the origin chunks from `old` on.
    pub(crate) fn add_pending(&mut self, old: OriginChunk, allocation: Allocation) {
        for i in 0..allocation.count {
            let slot = allocation.slot + i;
            let earlier = self.pending.insert(old.0 + i, Pending { slot });
            assert!(earlier.is_none(), "a chunk has one pending exception");
        }
        if let Some(commit) = &mut self.commit {
            debug_assert_eq!(commit.next_slot(), allocation.slot);
            commit.allocated(old, allocation.first, allocation.count);
        }
    }

    /// An exception takes effect.
    pub(crate) fn publish(&mut self, old: OriginChunk, new: CowChunk) {
        let pending = self.pending.remove(&old.0);
        assert!(
            pending.is_some(),
            "an exception is prepared before it is published"
        );
        self.table.insert(old, new);
    }

    /// How far the durable mark has to move for everybody that waits.
    pub(crate) fn durable_wanted(&self) -> u64 {
        self.until_durable
            .last_key_value()
            .map_or(0, |(&slot, _)| slot + 1)
    }
}

/// Append where `bytes` of the origin lie according to `table`, in order, until
/// there are `max` extents: on `cow`, or still in the origin.
pub(crate) fn resolve(
    table: &ExceptionTable,
    size: ChunkSize,
    cow: Device,
    bytes: std::ops::Range<u64>,
    max: usize,
    extents: &mut Vec<Extent>,
) {
    let mut at = bytes.start;
    while at < bytes.end {
        let chunk = size.origin_chunk(at);
        let limit = size.origin_chunk(bytes.end - 1).0 + 1 - chunk.0;
        let into = at - size.origin_offset(chunk);
        let (device, offset, chunks) = match table.run_at(chunk, limit) {
            Run::Mapped { first, len } => (cow, size.cow_offset(first) + into, len),
            Run::Unmapped { len } => (Device::Origin, at, len),
        };
        let run_end = (size.origin_offset(OriginChunk(chunk.0 + chunks))).min(bytes.end);
        let len = run_end - at;
        at = run_end;
        if let Some(last) = extents.last_mut()
            && last.device == device
            && last.offset + last.len == offset
        {
            last.len += len;
            continue;
        }
        if extents.len() == max {
            break;
        }
        extents.push(Extent {
            device,
            offset,
            len,
        });
    }
}

/// Take everybody out who waits for a slot below `mark`.
pub(crate) fn take_below(waiting: &mut BTreeMap<u64, Vec<TaskId>>, mark: u64) -> Vec<TaskId> {
    let later = waiting.split_off(&mark);
    std::mem::replace(waiting, later)
        .into_values()
        .flatten()
        .collect()
}
