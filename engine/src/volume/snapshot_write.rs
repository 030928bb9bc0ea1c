//! Mutations of a snapshot: they go to its store, and make the exceptions that
//! are missing on their way.

use nbdsnap_format::OriginChunk;

use super::active::{Effect, RequestKey};
use super::copy::Overlay;
use super::full::OnFull;
use super::lifecycle::Phase;
use super::task::{TaskId, Work};
use super::{Event, Extent, Now, Purpose, Volume};
use crate::disk::{Action, Device};
use crate::request::{Failure, SnapshotId, View};
use crate::snapshot::{Snapshot, State};
use crate::store::{NoRoom, StoreKind};
use crate::table::Run;

impl Volume {
    /// Begin the current window of a snapshot's write.
    pub(super) fn begin_snapshot_window(&mut self, request: RequestKey, id: SnapshotId) {
        let mutation = self.mutation(request);
        let (start, end) = mutation.window;
        let is_trim = matches!(mutation.effect, Effect::Trim);
        let index = self.index_of(id).expect("a snapshot outlives its requests");
        self.requests[request].parts = 1;
        if is_trim {
            // A chunk in a store is never given back, and one that is not there
            // must not be made: the advice is taken and nothing happens.
            let readable = self.snapshots[index].is_readable();
            let result = if readable { Ok(()) } else { Err(Failure::Io) };
            return self.part_ended(request, result);
        }
        self.advance_snapshot_part(request, start, end);
    }

    /// Bring `start..end` of a snapshot's write under way, chunk by chunk: to
    /// the store where there is an exception, with a copy where there is none,
    /// and later where somebody else is making one. The part itself has been
    /// counted; this ends it.
    pub(super) fn advance_snapshot_part(&mut self, request: RequestKey, start: u64, end: u64) {
        let View::Snapshot(id) = self.requests[request].view else {
            unreachable!("the origin has no snapshot parts");
        };
        let index = self.index_of(id).expect("a snapshot outlives its requests");
        if self.snapshots[index].state != State::Active {
            return self.part_ended(request, Err(Failure::Io));
        }
        let mut at = start;
        let mut result = Ok(());
        while at < end && result.is_ok() {
            match self.next_step(index, at, end) {
                Step::Write { offset, until } => {
                    self.write_to_store(request, index, offset, at, until);
                    at = until;
                }
                Step::Wait { slots, until } => {
                    self.wait_for_part(request, index, at, until, &slots);
                    at = until;
                }
                Step::Prepare { old, count } => {
                    match self.prepare_with(request, index, at, end, old, count) {
                        Ok(until) => at = until,
                        Err(NoRoom::Grow) => {
                            self.wait_for_growth(request, index, at, end);
                            at = end;
                        }
                        Err(NoRoom::Full) => {
                            result = self.snapshot_write_found_no_space(request, index, at, end);
                            at = end;
                        }
                    }
                }
            }
        }
        self.part_ended(request, result);
    }

    /// What to do with the bytes from `at` on.
    fn next_step(&self, index: usize, at: u64, end: u64) -> Step {
        let snapshot = &self.snapshots[index];
        let size = snapshot.chunk_size;
        let chunk = size.origin_chunk(at);
        let limit = snapshot.chunks(at, end).count() as u64;
        let until = |chunks: u64| size.origin_offset(OriginChunk(chunk.0 + chunks)).min(end);
        match snapshot.table.run_at(chunk, limit) {
            Run::Mapped { first, len } => Step::Write {
                offset: size.cow_offset(first) + (at - size.origin_offset(chunk)),
                until: until(len),
            },
            Run::Unmapped { len } => {
                let pending: Vec<u64> = (snapshot.pending)
                    .range(chunk.0..chunk.0 + len)
                    .zip(chunk.0..)
                    .take_while(|((chunk, _), expected)| **chunk == *expected)
                    .map(|((_, pending), _)| pending.slot)
                    .collect();
                if !pending.is_empty() {
                    return Step::Wait {
                        until: until(pending.len() as u64),
                        slots: pending,
                    };
                }
                let next_pending = (snapshot.pending).range(chunk.0..chunk.0 + len).next();
                let free = next_pending.map_or(len, |(&next, _)| next - chunk.0);
                Step::Prepare {
                    old: chunk,
                    count: whole_chunks(snapshot, at, end).clamp(1, free),
                }
            }
        }
    }

    fn write_to_store(
        &mut self,
        request: RequestKey,
        index: usize,
        offset: u64,
        at: u64,
        until: u64,
    ) {
        let mutation = self.mutation(request);
        let mut data = Vec::with_capacity(1);
        (mutation.effect).pieces(mutation.offset, at, until, &mut data);
        self.requests[request].parts += 1;
        self.snapshots[index].touched = true;
        let device = Device::Cow(self.snapshots[index].id);
        let action = Action::Write { offset, data };
        self.emit(device, action, Purpose::ClientWrite(request));
    }

    fn wait_for_part(
        &mut self,
        request: RequestKey,
        index: usize,
        start: u64,
        end: u64,
        slots: &[u64],
    ) {
        self.requests[request].parts += 1;
        let task = self.new_task(Work::SnapshotPart {
            request,
            start,
            end,
        });
        self.wait_until_published(index, slots, task);
    }

    fn wait_until_published(&mut self, index: usize, slots: &[u64], task: TaskId) {
        let snapshot = &mut self.snapshots[index];
        // A store that commits in order is done with all once it is with the last.
        let slots = match (snapshot.kind, slots.iter().max()) {
            (StoreKind::Persistent | StoreKind::PersistentOverflow, Some(last)) => {
                std::slice::from_ref(last)
            }
            _ => slots,
        };
        for &slot in slots {
            let waiting = &mut snapshot.until_published;
            waiting.entry(slot).or_default().push(task);
            self.tasks[task.0].waits += 1;
        }
    }

    /// Make exceptions whose chunks carry the write's own bytes; answers how far
    /// that took the write.
    fn prepare_with(
        &mut self,
        request: RequestKey,
        index: usize,
        at: u64,
        end: u64,
        old: OriginChunk,
        count: u64,
    ) -> Result<u64, NoRoom> {
        let mutation = self.mutation(request);
        let overlay = Overlay {
            effect: mutation.effect.clone(),
            base: mutation.offset,
            start: at,
            end,
        };
        let allocation = self.prepare_exceptions(index, old, count, Some(overlay))?;
        self.requests[request].parts += 1;
        let task = self.new_task(Work::SnapshotCopied(request));
        // All of them belong to one copy, and take effect together.
        let last = allocation.slot + allocation.count - 1;
        self.wait_until_published(index, &[last], task);
        let size = self.snapshots[index].chunk_size;
        let past = size.origin_offset(OriginChunk(old.0 + allocation.count));
        Ok(past.min(end))
    }

    fn wait_for_growth(&mut self, request: RequestKey, index: usize, start: u64, end: u64) {
        self.requests[request].parts += 1;
        let task = self.new_task(Work::SnapshotPart {
            request,
            start,
            end,
        });
        self.tasks[task.0].waits = 1;
        self.snapshots[index].until_grown.push(task);
    }

    /// There is no room for the chunk at `start`: the part from there on waits, or
    /// the write fails.
    fn snapshot_write_found_no_space(
        &mut self,
        request: RequestKey,
        index: usize,
        start: u64,
        end: u64,
    ) -> Result<(), Failure> {
        let merges = self.merge_holds(self.snapshots[index].id);
        let snapshot = &mut self.snapshots[index];
        match snapshot.on_full {
            OnFull::Invalidate if snapshot.overflows => {
                snapshot.state = State::Overflowed;
                self.events.push_back(Event::Overflow(snapshot.id));
                Err(Failure::Io)
            }
            OnFull::Invalidate => {
                self.invalidate(index, "a write to it found its store full");
                if self.waits_until_lost(request, index) {
                    self.requests[request].parts += 1;
                    return Ok(());
                }
                Err(Failure::Io)
            }
            OnFull::Pause if merges => Err(Failure::NoSpace),
            OnFull::Pause if self.phase == Phase::Open => {
                self.requests[request].parts += 1;
                let task = self.new_task(Work::SnapshotPart {
                    request,
                    start,
                    end,
                });
                self.pause(index, task);
                Ok(())
            }
            OnFull::Pause => Err(Failure::ShuttingDown),
            OnFull::Error => {
                self.say_full(index);
                Err(Failure::NoSpace)
            }
        }
    }

    /// The exceptions that a part of the write was waiting for are in the table,
    /// or never will be.
    pub(super) fn snapshot_copied(&mut self, request: RequestKey) {
        let View::Snapshot(id) = self.requests[request].view else {
            unreachable!("the origin has no snapshot parts");
        };
        let index = self.index_of(id);
        if index.is_some_and(|index| self.waits_until_lost(request, index)) {
            return;
        }
        let lives = self.snapshot(id).is_some_and(Snapshot::is_readable);
        self.part_ended(request, if lives { Ok(()) } else { Err(Failure::Io) });
    }

    /// The write that lost the snapshot, or met its loss, is told of it once that is
    /// durable, and not before others are: the kernel too writes the header first. Says
    /// whether that is still to come; a part of the write waits for it then.
    fn waits_until_lost(&mut self, request: RequestKey, index: usize) -> bool {
        if !matches!(self.snapshots[index].state, State::Invalidating(_)) {
            return false;
        }
        let task = self.new_task(Work::SnapshotCopied(request));
        self.tasks[task.0].waits = 1;
        self.snapshots[index].until_invalid.push(task);
        true
    }

    /// See [`Volume::write_now`].
    pub(super) fn snapshot_write_now(
        &mut self,
        id: SnapshotId,
        offset: u64,
        len: u64,
        extents: &mut Vec<Extent>,
    ) -> Now {
        let end = offset + len;
        let Some(index) = self.index_of(id).filter(|_| !self.merge_holds(id)) else {
            return Now::Queue;
        };
        let snapshot = &mut self.snapshots[index];
        if len == 0
            || snapshot.state != State::Active
            || snapshot.writes.overlaps(offset, end)
            || !snapshot.is_mapped(offset, end)
        {
            return Now::Queue;
        }
        snapshot.touched = true;
        let resolved = snapshot.resolve(offset, end, usize::MAX, extents);
        debug_assert!(resolved.is_ok(), "an active snapshot resolves");
        Now::Go
    }
}

/// How many whole chunks `at..end` begins with: they need no old data. What
/// there is of the last chunk of the snapshot counts as a whole.
fn whole_chunks(snapshot: &Snapshot, at: u64, end: u64) -> u64 {
    let size = snapshot.chunk_size;
    let first = size.origin_chunk(at);
    if size.origin_offset(first) != at {
        return 0;
    }
    let past = if end == snapshot.origin_bytes {
        size.chunks_to_cover(end)
    } else {
        size.origin_chunk(end).0
    };
    past - first.0
}

/// What a snapshot's write does next.
enum Step {
    /// Write to the store at `offset`, as far as `until`.
    Write { offset: u64, until: u64 },
    /// Wait for exceptions that are under way, as far as `until`.
    Wait { slots: Vec<u64>, until: u64 },
    /// Make exceptions for `count` chunks.
    Prepare { old: OriginChunk, count: u64 },
}
