//! A volume: one origin and its snapshots.
//!
//! Order of calls: any number of `handle_*` calls, then `poll_disk_op` until it
//! answers `None` (performing the operations, at once or later, and reporting
//! each end by `handle_completion`; completions reported while polling are
//! fine), then `poll_reply` and `poll_event` until they answer `None`. Again
//! whenever a request or a completion comes.
//!
//! `poll_disk_op` closes commit groups when it has nothing else to hand out: a
//! driver that performs cached operations inline, reports them at once and polls
//! again gives the engine its batches.

pub(crate) mod active;
mod admit;
mod copy;
mod drive;
mod flush;
pub(crate) mod full;
mod info;
mod instant;
mod lifecycle;
mod merge;
mod origin_write;
mod removal;
mod snapshot_write;
mod suspend;
pub(crate) mod task;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use slab::Slab;

use crate::disk::{Action, Device, DiskOp, OpId};
use crate::in_flight::{RangeId, Ranges};
use crate::law::Law;
use crate::request::{Failure, Reply, Request, SnapshotId, View};
use crate::snapshot::{Snapshot, State};
use crate::store::Status;
use active::{Active, RequestKey};
use copy::{CopyMemory, Job, JobKey};
use flush::Lane;
use instant::Instant;
use lifecycle::Phase;
use merge::{Beginning, Merge, PieceKey};
use suspend::Suspension;
use task::{Task, TaskId, Work};

pub use full::{ExtendError, OnFull};
pub use info::{SnapshotInfo, SnapshotState};
pub use instant::{InstantId, NotHeld};
pub use lifecycle::GrowError;
pub use merge::{MergeError, MergeProgress};

/// A mutation is worked off in windows of this many bytes.
const WINDOW_BYTES: u64 = 32 << 20;

/// A merge takes steps of this many bytes.
const MERGE_STEP_BYTES: u64 = 4 << 20;

/// What a volume is like.
#[derive(Clone, Copy, Debug)]
pub struct VolumeConfig {
    /// Bytes of the origin: a multiple of 512, not 0.
    pub origin_bytes: u64,
    /// Bytes of old chunks that may be in memory at once, at least 1 MiB.
    pub copy_memory: u64,
    /// The largest piece in which a chunk or a run of chunks is copied.
    pub copy_piece: u64,
}

/// A piece of a view: `len` bytes that lie on `device` at `offset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The device that holds them.
    pub device: Device,
    /// Where on it.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
}

/// Whether I/O can be done at once, around the queues. See [`Volume::read_now`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Now {
    /// Do it on the extents, before anything else is asked of the volume.
    Go,
    /// Hand it in with [`Volume::handle_request`].
    Queue,
}

/// Something that an operator wants to hear of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The snapshot exists: its instant has been taken.
    Created(SnapshotId),
    /// The snapshot begun by [`Volume::create_snapshot`] could not be taken; the id is gone.
    CreateFailed(SnapshotId),
    /// The snapshot was lost, for this reason.
    Invalid(SnapshotId, &'static str),
    /// The same, but its store cannot be made to say so: the caller makes a durable
    /// mark elsewhere and answers with [`Volume::marked_lost`]. Until then writes of
    /// the origin that would need a copy for it wait.
    MarkLost(SnapshotId, &'static str),
    /// The same, and there is no mark of it anywhere: the origin takes no writes
    /// any more, or a later start would serve a stale snapshot.
    Unmarked(SnapshotId, &'static str),
    /// A PO store is full: the snapshot can be read, but no more written.
    Overflow(SnapshotId),
    /// The allocated part of the store's limit has reached so many percent: 50, 80
    /// or 95, each once until the store is extended.
    Filling(SnapshotId, u8),
    /// A write has met the end of the store and waits or fails ([`OnFull::Pause`],
    /// [`OnFull::Error`]); said once until the store is extended.
    Full(SnapshotId),
    /// The volume stands still until [`Volume::resume`], and all that was written
    /// is durable (false: a flush failed).
    Suspended(bool),
    /// The instant begun by [`Volume::begin_instant`] can be taken: nothing
    /// changes the origin until it is, or is abandoned.
    Held(InstantId),
    /// It cannot be taken; its snapshots' ids are gone.
    InstantFailed(InstantId),
    /// The snapshot is gone, and nothing is in flight on its store.
    Removed(SnapshotId),
    /// The origin reads as the snapshot from here on, and the snapshot takes no
    /// more requests; see [`Volume::begin_merge`].
    MergeBegun(SnapshotId),
    /// So many percent of a merge's chunks have been copied: a tenth, or several, more
    /// than was said last. Not said of the end.
    MergeProgress(SnapshotId, u8),
    /// The store of the merged snapshot holds no exceptions any more, the origin
    /// is durable, and the id is gone.
    Merged(SnapshotId),
    /// The merge has stopped, or did not begin, for this reason.
    MergeFailed(SnapshotId, &'static str),
    /// [`Volume::close`] has ended: nothing is in flight and all is durable
    /// (false: a flush failed).
    Closed(bool),
}

/// After so many operations flushes are begun even if there are more to hand out:
/// somebody who never stops reading must not keep others' commits waiting.
const REST_AFTER: u32 = 256;

/// What an operation in flight is for.
#[derive(Debug)]
enum Purpose {
    /// Piece `index` of a client's read; `reading` if it keeps origin writes away.
    ClientRead {
        request: RequestKey,
        index: usize,
        reading: Option<RangeId>,
    },
    /// Part of a mutation, straight to its place.
    ClientWrite(RequestKey),
    /// The old chunk comes in.
    CopyRead(JobKey),
    /// The old chunk goes out.
    CopyWrite(JobKey),
    /// Entries of a commit group.
    AreaWrite(SnapshotId),
    /// The next area's zeros.
    NextArea(SnapshotId),
    /// A flush of a store, for its commits and for FLUSH and FUA.
    StoreFlush(SnapshotId),
    /// The header that says invalid.
    InvalidHeader(SnapshotId),
    /// The flush after it.
    InvalidFlush(SnapshotId),
    /// The store's file grows.
    Grow(SnapshotId),
    /// A flush of the origin.
    OriginFlush,
    /// Piece `index` of the read of an origin's client, from a merging store.
    MergedRead { request: RequestKey, index: usize },
    /// Part of an origin's mutation, in place to a merging store.
    MergedWrite { request: RequestKey, range: RangeId },
    /// The end of a merging store's list comes in.
    MergeTail,
    /// Part of a merge's step comes in.
    PieceRead(PieceKey),
    /// Part of a merge's step goes out.
    PieceWrite(PieceKey),
    /// The end of a merging store's list, without the step's exceptions.
    MergeEntries,
    /// A flush of a merging store, for its steps and for FLUSH and FUA.
    MergeFlush,
    /// The last flush of a device.
    CloseFlush,
}

/// An origin and its snapshots. One thread owns it.
#[derive(Debug)]
pub struct Volume {
    config: VolumeConfig,
    /// The origin is a snapshot of another volume (`tree`).
    stands_on_snapshot: bool,
    /// Bytes of a mutation that are brought under way at a time.
    window: u64,
    law: Law,
    phase: Phase,
    suspension: Suspension,
    /// In ascending order of id.
    snapshots: Vec<Snapshot>,
    next_snapshot: u32,
    requests: Slab<Active>,
    tasks: Slab<Task>,
    runnable: VecDeque<TaskId>,
    jobs: Slab<Job>,
    memory: CopyMemory,
    in_flight: Slab<Purpose>,
    ready_ops: VecDeque<DiskOp>,
    /// Operations handed out since the volume last came to rest.
    restless: u32,
    replies: VecDeque<Reply>,
    events: VecDeque<Event>,
    /// Mutations of the origin, waiting or under way.
    origin_writes: Ranges,
    /// Reads of the origin by snapshots' clients.
    origin_reads: Ranges,
    /// Mutations that have begun to change the origin and have not ended.
    origin_mutations: u64,
    /// Of these, those that this volume does not perform (`tree`).
    elsewhere: u64,
    /// Counts changes of the origin: equal numbers mean that nothing changed.
    origin_changes: u64,
    origin_flush: Lane,
    /// Snapshots to look after before the volume comes to rest.
    listed: VecDeque<SnapshotId>,
    /// The first is under way.
    instants: VecDeque<Instant>,
    next_instant: u32,
    /// No mutation of the origin may begin.
    holding: bool,
    /// Mutations of the origin that would begin.
    held: Vec<RequestKey>,
    /// Snapshots that go when nothing is in flight for them.
    removals: Vec<SnapshotId>,
    /// Requests handed in while the volume is suspended, or on the way there.
    queued: VecDeque<Request>,
    /// A merge that was ordered and has not begun.
    merge_begins: Option<Beginning>,
    /// The store that is being merged into the origin.
    merge: Option<Merge>,
    merge_suspended: bool,
    /// Bytes that a merge copies in a step.
    merge_step: u64,
}

impl Volume {
    /// A volume without snapshots.
    pub fn new(config: VolumeConfig) -> Self {
        assert!(
            config.origin_bytes > 0 && config.origin_bytes.is_multiple_of(512),
            "an origin is whole sectors, at least one"
        );
        assert!(config.copy_piece >= 512 && config.copy_memory >= config.copy_piece);
        Self {
            config,
            stands_on_snapshot: false,
            window: WINDOW_BYTES,
            law: Law::default(),
            phase: Phase::Open,
            suspension: Suspension::Running,
            snapshots: Vec::new(),
            next_snapshot: 0,
            requests: Slab::new(),
            tasks: Slab::new(),
            runnable: VecDeque::new(),
            jobs: Slab::new(),
            memory: CopyMemory::new(config.copy_memory),
            in_flight: Slab::new(),
            ready_ops: VecDeque::new(),
            restless: 0,
            replies: VecDeque::new(),
            events: VecDeque::new(),
            origin_writes: Ranges::default(),
            origin_reads: Ranges::default(),
            origin_mutations: 0,
            elsewhere: 0,
            origin_changes: 0,
            origin_flush: Lane::default(),
            listed: VecDeque::new(),
            instants: VecDeque::new(),
            next_instant: 0,
            holding: false,
            held: Vec::new(),
            removals: Vec::new(),
            queued: VecDeque::new(),
            merge_begins: None,
            merge: None,
            merge_suspended: false,
            merge_step: MERGE_STEP_BYTES,
        }
    }

    /// Work mutations off in windows of `bytes` instead of 32 MiB: simulated disks
    /// are smaller than that.
    pub fn set_window(&mut self, bytes: u64) {
        assert!(bytes > 0);
        self.window = bytes;
    }

    /// Have so much memory for old chunks from now on, where several volumes share it
    /// (`tree`).
    pub(crate) fn set_copy_memory(&mut self, bytes: u64) {
        self.memory.set_limit(bytes.max(self.config.copy_piece));
    }

    /// The origin is a snapshot of another volume: what its store refuses for lack
    /// of room is refused here too, and is no failed disk.
    pub(crate) fn stand_on_snapshot(&mut self) {
        self.stands_on_snapshot = true;
    }

    /// A volume that breaks a rule. Nothing may have been attached yet.
    #[cfg(feature = "mutants")]
    pub fn set_law(&mut self, law: Law) {
        assert!(self.snapshots.is_empty());
        self.law = law;
    }

    /// The next operation to perform, if there is one.
    pub fn poll_disk_op(&mut self) -> Option<DiskOp> {
        loop {
            while let Some(task) = self.next_task() {
                self.run(task);
            }
            if self.restless >= REST_AFTER {
                self.come_to_rest();
            }
            if let Some(op) = self.ready_ops.pop_front() {
                self.restless += 1;
                return Some(op);
            }
            if !self.come_to_rest() {
                return None;
            }
        }
    }

    /// The next reply, if there is one.
    pub fn poll_reply(&mut self) -> Option<Reply> {
        self.replies.pop_front()
    }

    /// The next event, if there is one.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// The fast way of a read: where `len` bytes at `offset` lie right now. On
    /// [`Now::Go`] the caller reads the extents (appended to `extents`, in
    /// order) at once, before any other call of this volume, and need not
    /// report anything. Otherwise, or when the read would block, the request
    /// goes to [`Volume::handle_request`].
    pub fn read_now(&self, view: View, offset: u64, len: u64, extents: &mut Vec<Extent>) -> Now {
        if !self.is_open() || self.check_range(view, offset, len).is_err() {
            return Now::Queue;
        }
        let before = extents.len();
        if self
            .resolve(view, offset, offset + len, usize::MAX, extents)
            .is_err()
        {
            extents.truncate(before);
            return Now::Queue;
        }
        Now::Go
    }

    /// The same for a write that needs no copy, no commit and waits for nobody.
    /// The caller writes all extents at once; if one fails it reports that as a
    /// failed request itself.
    pub fn write_now(
        &mut self,
        view: View,
        offset: u64,
        len: u64,
        extents: &mut Vec<Extent>,
    ) -> Now {
        if !self.is_open() || self.check_range(view, offset, len).is_err() {
            return Now::Queue;
        }
        match view {
            View::Origin => self.origin_write_now(offset, len, extents),
            View::Snapshot(id) => self.snapshot_write_now(id, offset, len, extents),
        }
    }

    /// Where the bytes of a view lie, for BLOCK_STATUS; like [`Volume::read_now`],
    /// but never waits. Stops after `max_extents`.
    pub fn map(
        &self,
        view: View,
        offset: u64,
        len: u64,
        max_extents: usize,
    ) -> Result<Vec<Extent>, Failure> {
        self.check_range(view, offset, len)?;
        let mut extents = Vec::new();
        self.resolve(view, offset, offset + len, max_extents, &mut extents)?;
        Ok(extents)
    }

    /// A snapshot's status; none once it is being removed.
    pub fn status(&self, snapshot: SnapshotId) -> Option<Status> {
        if let Some(merging) = self.merge_status(snapshot) {
            return Some(merging);
        }
        let snapshot = self.snapshot(snapshot)?;
        (snapshot.state != State::Removing).then(|| snapshot.status())
    }

    /// Nothing is in flight or queued, and every reply has been taken.
    pub fn is_idle(&self) -> bool {
        self.requests.is_empty()
            && self.in_flight.is_empty()
            && self.runnable.is_empty()
            && self.replies.is_empty()
            && self.instants.is_empty()
            && self.removals.is_empty()
            && self.merge_is_idle()
            && self.queued.is_empty()
            && matches!(self.suspension, Suspension::Running | Suspension::Suspended)
    }

    /// The devices there are, the origin first.
    pub fn devices(&self) -> Vec<Device> {
        let merging = self.merge.as_ref().map(|merge| merge.id);
        let cows = self.snapshots.iter().map(|s| s.id).chain(merging);
        (std::iter::once(Device::Origin).chain(cows.map(Device::Cow))).collect()
    }

    /// Requests are let in.
    fn is_open(&self) -> bool {
        self.phase == Phase::Open && self.suspension == Suspension::Running
    }

    pub(crate) fn check_range(&self, view: View, offset: u64, len: u64) -> Result<(), Failure> {
        let bytes = self.view_bytes(view).ok_or(Failure::NoSuchView)?;
        match offset.checked_add(len) {
            Some(end) if end <= bytes => Ok(()),
            _ => Err(Failure::Invalid),
        }
    }

    fn index_of(&self, id: SnapshotId) -> Option<usize> {
        self.snapshots.binary_search_by_key(&id, |s| s.id).ok()
    }

    fn snapshot(&self, id: SnapshotId) -> Option<&Snapshot> {
        self.index_of(id).map(|i| &self.snapshots[i])
    }

    /// Where the bytes `start..end` of a view lie, in order, until there are `max`
    /// extents: in a store, or in the origin.
    pub(crate) fn resolve(
        &self,
        view: View,
        start: u64,
        end: u64,
        max: usize,
        extents: &mut Vec<Extent>,
    ) -> Result<(), Failure> {
        match view {
            View::Origin => {
                self.resolve_origin(start, end, max, extents);
                Ok(())
            }
            View::Snapshot(id) => match self.snapshot(id) {
                Some(snapshot) if snapshot.is_there() => snapshot.resolve(start, end, max, extents),
                _ => Err(Failure::NoSuchView),
            },
        }
    }

    /// The snapshot is there and can be read, and all bytes `start..end` of it (not
    /// empty) are its origin's.
    pub(crate) fn has_no_copy_of(&self, id: SnapshotId, start: u64, end: u64) -> bool {
        let snapshot = self.snapshot(id);
        snapshot.is_some_and(|it| it.is_there() && it.has_no_copy_of(start, end))
    }

    /// What its origin shows is not all in the origin.
    pub(crate) fn is_merging(&self) -> bool {
        self.merge.is_some()
    }

    fn emit(&mut self, device: Device, action: Action, purpose: Purpose) {
        let is_flush = action == Action::Flush;
        let id = OpId(self.in_flight.insert(purpose) as u64);
        let op = DiskOp { id, device, action };
        if is_flush {
            // Others wait for it, and it takes the longest.
            self.ready_ops.push_front(op);
        } else {
            self.ready_ops.push_back(op);
        }
    }

    /// A task that is about to be made to wait; see [`Volume::waits`].
    fn new_task(&mut self, work: Work) -> TaskId {
        TaskId(self.tasks.insert(Task { work, waits: 0 }))
    }

    /// A task that is about to be made to wait in several places, of which one may
    /// wake it for another before all are done: it stays until [`Volume::unguard`].
    fn guarded_task(&mut self, work: Work) -> TaskId {
        TaskId(self.tasks.insert(Task { work, waits: 1 }))
    }

    fn unguard(&mut self, task: TaskId) {
        self.tasks[task.0].waits -= 1;
    }

    /// Whether the task has been made to wait for anything. If not, it is gone,
    /// and its work can go on at once.
    fn waits(&mut self, task: TaskId) -> bool {
        if self.tasks[task.0].waits > 0 {
            return true;
        }
        self.tasks.remove(task.0);
        false
    }

    /// One thing that each of the tasks waited for has happened.
    fn wake(&mut self, tasks: impl IntoIterator<Item = TaskId>) {
        for id in tasks {
            let task = &mut self.tasks[id.0];
            task.waits -= 1;
            if task.waits == 0 {
                self.runnable.push_back(id);
            }
        }
    }

    fn run(&mut self, task: TaskId) {
        match self.tasks.remove(task.0).work {
            Work::Mutation(request) => self.advance_mutation(request),
            Work::SnapshotPart {
                request,
                start,
                end,
            } => self.advance_snapshot_part(request, start, end),
            Work::SnapshotCopied(request) => self.snapshot_copied(request),
            Work::Copy(job) => self.advance_copy(job),
            Work::MergeStep => self.clear_merge_window(),
            Work::MergePiece(piece) => self.read_piece(piece),
        }
    }

    /// Have the snapshot looked after before the volume comes to rest.
    fn list(&mut self, index: usize) {
        let snapshot = &mut self.snapshots[index];
        if !snapshot.listed {
            snapshot.listed = true;
            self.listed.push_back(snapshot.id);
        }
    }
}
