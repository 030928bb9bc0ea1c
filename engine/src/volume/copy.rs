//! Copies of old chunks: read from the origin, overlaid with what a snapshot's
//! client writes, written to the store. In pieces, within a bound on memory.

use std::collections::VecDeque;

use bytes::Bytes;
use nbdsnap_format::OriginChunk;

use super::active::Effect;
use super::merge::PieceKey;
use super::task::{TaskId, Work};
use super::{Purpose, Volume};
use crate::disk::{Action, Device, DiskError, Outcome};
use crate::request::SnapshotId;
use crate::store::{Allocation, NoRoom};

/// A copy's place in the volume's slab.
pub(crate) type JobKey = usize;

/// New bytes that take the place of old ones on the way to the store.
#[derive(Debug)]
pub(crate) struct Overlay {
    pub(crate) effect: Effect,
    /// Where the effect's first byte lies in the view.
    pub(crate) base: u64,
    /// First byte that is overlaid.
    pub(crate) start: u64,
    /// First byte past those.
    pub(crate) end: u64,
}

/// A run of chunks on its way: neighbours on both devices, moved together.
#[derive(Debug)]
pub(crate) struct Job {
    snapshot: SnapshotId,
    old: OriginChunk,
    allocation: Allocation,
    overlay: Option<Overlay>,
    /// The piece that is being moved, in bytes of the origin.
    piece: (u64, u64),
    /// Where the last chunk ends, or the origin.
    end: u64,
    /// Bytes of the budget that the piece holds.
    held: u64,
}

/// The budget for old chunks in memory.
#[derive(Debug)]
pub(crate) struct CopyMemory {
    limit: u64,
    used: u64,
    /// Copies that found no room, in order, with what they need.
    waiting: VecDeque<(TaskId, Holder, u64)>,
}

/// What holds some of the copies' memory.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Holder {
    /// The piece of a copy.
    Job(JobKey),
    /// A piece of a merge's step.
    Piece(PieceKey),
}

impl CopyMemory {
    pub(super) fn new(limit: u64) -> Self {
        Self {
            limit,
            used: 0,
            waiting: VecDeque::new(),
        }
    }

    /// From now on so much. What is under way keeps what it has.
    pub(super) fn set_limit(&mut self, limit: u64) {
        self.limit = limit;
    }

    /// Room for one more: there is always some for the first.
    fn has_room(&self, len: u64) -> bool {
        self.used == 0 || self.used + len <= self.limit
    }
}

impl Job {
    pub(super) fn is_for(&self, snapshot: SnapshotId) -> bool {
        self.snapshot == snapshot
    }
}

impl Volume {
    /// Allocate exceptions for up to `count` chunks from `old` on, none of which
    /// has one, and set their copy going. Answers how many were allocated: as
    /// many as one copy may take.
    pub(super) fn prepare_exceptions(
        &mut self,
        index: usize,
        old: OriginChunk,
        count: u64,
        overlay: Option<Overlay>,
    ) -> Result<Allocation, NoRoom> {
        let snapshot = &mut self.snapshots[index];
        let size = snapshot.chunk_size;
        let most = (self.config.copy_piece / size.bytes()).max(1);
        let allocated = snapshot.allocator.allocate(count.min(most));
        if let Some(to) = snapshot.allocator.poll_growth() {
            let id = snapshot.id;
            self.emit(Device::Cow(id), Action::Grow { to }, Purpose::Grow(id));
        }
        let allocation = allocated?;
        self.note_filling(index);
        let snapshot = &mut self.snapshots[index];
        snapshot.touched = true;
        snapshot.add_pending(old, allocation);
        let start = size.origin_offset(old);
        let end = size.origin_offset(OriginChunk(old.0 + allocation.count));
        let job = self.jobs.insert(Job {
            snapshot: snapshot.id,
            old,
            allocation,
            overlay,
            piece: (start, start),
            end: end.min(snapshot.origin_bytes + snapshot.copied_behind),
            held: 0,
        });
        self.next_piece(job);
        self.drive_store(index);
        Ok(allocation)
    }

    /// Turn to the job's next piece.
    fn next_piece(&mut self, key: JobKey) {
        let job = &mut self.jobs[key];
        let start = job.piece.1;
        job.piece = (start, job.end.min(start + self.config.copy_piece));
        self.advance_copy(key);
    }

    /// Read the old bytes of the job's piece, if any are wanted and there is
    /// room for them; else write it.
    pub(super) fn advance_copy(&mut self, key: JobKey) {
        if !self.job_lives(key) {
            return self.copy_ended(key);
        }
        let job = &mut self.jobs[key];
        let (start, end) = job.piece;
        let covered = |o: &Overlay| o.start <= start && end <= o.end;
        if job.overlay.as_ref().is_some_and(covered) {
            return self.write_piece(key, &Bytes::new());
        }
        let len = end - start;
        if job.held == 0 {
            if !self.hold_memory(Work::Copy(key), Holder::Job(key), len) {
                return;
            }
            self.jobs[key].held = len;
        }
        self.emit(
            Device::Origin,
            Action::Read { offset: start, len },
            Purpose::CopyRead(key),
        );
    }

    pub(super) fn copy_read_ended(&mut self, key: JobKey, outcome: Outcome) {
        match outcome {
            Ok(old) if self.job_lives(key) => self.write_piece(key, &old),
            outcome => {
                if outcome.is_err() {
                    self.copy_failed(key, "an old chunk could not be read from the origin");
                }
                self.copy_ended(key);
            }
        }
    }

    /// Write the piece: old bytes, and over them what the overlay has.
    fn write_piece(&mut self, key: JobKey, old: &Bytes) {
        let job = &self.jobs[key];
        let (start, end) = job.piece;
        let mut data = Vec::with_capacity(3);
        match &job.overlay {
            Some(o) if o.start < end && start < o.end => {
                let (from, to) = (o.start.max(start), o.end.min(end));
                if start < from {
                    data.push(old.slice(..(from - start) as usize));
                }
                o.effect.pieces(o.base, from, to, &mut data);
                if to < end {
                    data.push(old.slice((to - start) as usize..));
                }
            }
            _ => data.push(old.clone()),
        }
        let snapshot = self.snapshot(job.snapshot).expect("the job lives");
        let size = snapshot.chunk_size;
        let offset = size.cow_offset(job.allocation.first) + (start - size.origin_offset(job.old));
        let device = Device::Cow(job.snapshot);
        let action = Action::Write { offset, data };
        self.emit(device, action, Purpose::CopyWrite(key));
    }

    pub(super) fn copy_write_ended(&mut self, key: JobKey, result: Result<(), DiskError>) {
        self.release_memory(key);
        let job = &self.jobs[key];
        if result.is_err() {
            self.copy_failed(key, "an old chunk could not be written to its store");
            self.copy_ended(key);
        } else if job.piece.1 < job.end {
            self.next_piece(key);
        } else {
            self.copied(key);
            self.copy_ended(key);
        }
    }

    /// All of the job's chunks are in the store: on to the commit.
    fn copied(&mut self, key: JobKey) {
        if !self.job_lives(key) {
            return;
        }
        let job = &self.jobs[key];
        let (old, allocation) = (job.old, job.allocation);
        let index = self.index_of(job.snapshot).expect("the job lives");
        if let Some(commit) = &mut self.snapshots[index].commit {
            commit.copied(allocation.slot, allocation.count);
            return self.list(index);
        }
        // A transient store has nothing to commit: order is all that it needs.
        for i in 0..allocation.count {
            let snapshot = &mut self.snapshots[index];
            let new = nbdsnap_format::CowChunk(allocation.first.0 + i);
            snapshot.publish(OriginChunk(old.0 + i), new);
            let slot = allocation.slot + i;
            let published = snapshot.until_published.remove(&slot);
            let durable = snapshot.until_durable.remove(&slot);
            self.wake(published.into_iter().chain(durable).flatten());
        }
    }

    /// The snapshot still wants the copy.
    fn job_lives(&self, key: JobKey) -> bool {
        self.snapshot(self.jobs[key].snapshot)
            .is_some_and(crate::snapshot::Snapshot::is_readable)
    }

    fn copy_failed(&mut self, key: JobKey, why: &'static str) {
        if let Some(index) = self.index_of(self.jobs[key].snapshot) {
            self.invalidate(index, why);
        }
    }

    fn copy_ended(&mut self, key: JobKey) {
        self.release_memory(key);
        self.jobs.remove(key);
    }

    /// Give the piece's memory back, and let as many copies go on as may fit.
    fn release_memory(&mut self, key: JobKey) {
        let held = std::mem::take(&mut self.jobs[key].held);
        if held > 0 {
            self.free_memory(held);
        }
    }

    /// Take `len` bytes of the copies' memory, or make the work wait for them:
    /// when it is done, `holder` has them.
    pub(super) fn hold_memory(&mut self, work: Work, holder: Holder, len: u64) -> bool {
        if self.memory.waiting.is_empty() && self.memory.has_room(len) {
            self.memory.used += len;
            return true;
        }
        let task = self.new_task(work);
        self.tasks[task.0].waits = 1;
        self.memory.waiting.push_back((task, holder, len));
        false
    }

    pub(super) fn free_memory(&mut self, held: u64) {
        self.memory.used -= held;
        while let Some(&(task, holder, len)) = self.memory.waiting.front()
            && self.memory.has_room(len)
        {
            self.memory.waiting.pop_front();
            self.memory.used += len;
            match holder {
                Holder::Job(job) => self.jobs[job].held = len,
                Holder::Piece(piece) => {
                    let merge = self.merge.as_mut().expect("it waits for its pieces");
                    merge.pieces[piece].held = len;
                }
            }
            self.wake([task]);
        }
    }
}
