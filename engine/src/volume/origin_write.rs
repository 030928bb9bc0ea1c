//! Mutations of the origin: they wait until every snapshot has what it needs.

use nbdsnap_format::OriginChunk;

use super::active::{Effect, RequestKey};
use super::task::{TaskId, Work};
use super::{Extent, Now, Purpose, Volume};
use crate::disk::{Action, Device};
use crate::request::Failure;
use crate::snapshot::{Snapshot, State};
use crate::store::{NoRoom, StoreKind};
use crate::table::Run;

/// Who is going to overwrite a part of the origin.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Writer {
    /// A write of the origin's client.
    Client(RequestKey),
    /// The step of a merge.
    Merge,
}

impl Volume {
    /// Look at the current window of a mutation: prepare what is missing and wait
    /// for it, or let it go to the disk.
    pub(super) fn advance_origin_mutation(&mut self, request: RequestKey) {
        let mutation = self.mutation(request);
        let (start, end) = mutation.window;
        let is_trim = matches!(mutation.effect, Effect::Trim);
        if !is_trim && self.takes_no_writes(start, end) {
            self.requests[request].failure = Some(Failure::Io);
        }
        let task = self.guarded_task(Work::Mutation(request));
        if !is_trim && self.requests[request].failure.is_none() {
            self.wait_for_merge_window(start, end, task);
            let direct = self.direct_parts(start, end);
            self.wait_for_all_copies(&direct, Writer::Client(request), task);
        }
        self.unguard(task);
        if self.requests[request].failure.is_some() {
            // It ends once what it has been made to wait for has happened.
            if !self.waits(task) {
                self.window_ended(request);
            }
            return;
        }
        if self.tasks[task.0].waits == 0 && self.law.reads_before_origin() {
            // Snapshot reads that begin from now on find the copies, so nobody
            // can come in between for ever.
            self.tasks[task.0].waits = self.origin_reads.wait_for_overlaps(start, end, task);
        }
        let begun = self.mutation(request).begun;
        if !self.waits(task) && (begun || self.may_begin(request)) {
            self.issue_origin_window(request);
        }
    }

    /// A write of `start..end` would let a lost snapshot come back as if it were
    /// whole, or would not be found again after a crash.
    fn takes_no_writes(&self, start: u64, end: u64) -> bool {
        let merge = self.merge.as_ref();
        let unmarked = |s: &Snapshot| s.state == State::Unmarked && start < s.origin_bytes;
        self.snapshots.iter().any(unmarked)
            || merge.is_some_and(|merge| merge.is_doubtful(start, end))
    }

    /// The parts of `start..end` that lie in the origin itself: all of it, unless
    /// a merge keeps some in its store.
    fn direct_parts(&self, start: u64, end: u64) -> Vec<(u64, u64)> {
        let extents = self.origin_extents(start, end);
        let direct = extents.iter().filter(|e| e.device == Device::Origin);
        direct.map(|e| (e.offset, e.offset + e.len)).collect()
    }

    /// Make `task` wait until no snapshot needs `ranges` of the origin any more, or
    /// until the writer finds that it has to fail.
    pub(super) fn wait_for_all_copies(
        &mut self,
        ranges: &[(u64, u64)],
        writer: Writer,
        task: TaskId,
    ) {
        for &(start, end) in ranges {
            for index in 0..self.snapshots.len() {
                let fails = |request: RequestKey| self.requests[request].failure.is_some();
                if matches!(writer, Writer::Client(request) if fails(request)) {
                    return;
                }
                self.wait_for_copies(index, start, end, writer, task);
            }
        }
    }

    /// A merge that breaks its rule: the copies are begun, and not waited for.
    pub(super) fn begin_all_copies(&mut self, ranges: &[(u64, u64)]) {
        for &(start, end) in ranges {
            for index in 0..self.snapshots.len() {
                let snapshot = &self.snapshots[index];
                let end = end.min(snapshot.origin_bytes);
                if snapshot.is_readable() && start < end {
                    let _ = self.prepare_range(index, start, end);
                }
            }
        }
    }

    /// Make `task` wait until the snapshot no longer needs `start..end` of the origin.
    fn wait_for_copies(
        &mut self,
        index: usize,
        start: u64,
        end: u64,
        writer: Writer,
        task: TaskId,
    ) {
        // What lies behind its end is no concern of a snapshot's.
        let end = end.min(self.snapshots[index].origin_bytes);
        if start >= end {
            return;
        }
        match self.snapshots[index].state {
            State::Creating | State::Invalid | State::Removing => return,
            State::Unmarked => unreachable!("refused before"),
            State::Invalidating(_) => {}
            State::Active | State::Overflowed => match self.prepare_range(index, start, end) {
                Ok(slots) => return self.wait_until_durable(index, &slots, task),
                Err(NoRoom::Grow) => {
                    self.snapshots[index].until_grown.push(task);
                    self.tasks[task.0].waits += 1;
                    return;
                }
                Err(NoRoom::Full) => self.origin_write_found_no_space(index, writer, task),
            },
        }
        let snapshot = &mut self.snapshots[index];
        if matches!(snapshot.state, State::Invalidating(_)) && self.law.invalid_before_origin() {
            snapshot.until_invalid.push(task);
            self.tasks[task.0].waits += 1;
        }
    }

    /// Prepare an exception for every chunk of the range that has none. Answers
    /// the slots to wait for; the last alone where the store commits in order.
    fn prepare_range(&mut self, index: usize, start: u64, end: u64) -> Result<Vec<u64>, NoRoom> {
        let mut slots = Vec::new();
        let chunks = self.snapshots[index].chunks(start, end);
        let mut at = chunks.start;
        while at < chunks.end {
            let snapshot = &self.snapshots[index];
            match snapshot.table.run_at(OriginChunk(at), chunks.end - at) {
                Run::Mapped { first, len } => {
                    slots.extend(snapshot.volatile_slot(first, len, self.law));
                    at += len;
                }
                Run::Unmapped { len } => {
                    let unmapped_end = at + len;
                    while at < unmapped_end {
                        at += self.prepare_next(index, at, unmapped_end, &mut slots)?;
                    }
                }
            }
        }
        if self.snapshots[index].kind != StoreKind::Transient {
            slots = slots.into_iter().max().into_iter().collect();
        }
        Ok(slots)
    }

    /// The pending exceptions at `at`, or new ones up to the next pending one:
    /// how many, with their slots.
    fn prepare_next(
        &mut self,
        index: usize,
        at: u64,
        end: u64,
        slots: &mut Vec<u64>,
    ) -> Result<u64, NoRoom> {
        let mut pending = self.snapshots[index].pending.range(at..end);
        let next = pending.next().map(|(&chunk, p)| (chunk, p.slot));
        if let Some((chunk, slot)) = next
            && chunk == at
        {
            slots.push(slot);
            return Ok(1);
        }
        let free_end = next.map_or(end, |(chunk, _)| chunk);
        let allocation = self.prepare_exceptions(index, OriginChunk(at), free_end - at, None)?;
        slots.extend(allocation.slot..allocation.slot + allocation.count);
        Ok(allocation.count)
    }

    fn wait_until_durable(&mut self, index: usize, slots: &[u64], task: TaskId) {
        if !self.law.exception_before_origin() {
            return;
        }
        for &slot in slots {
            let waiting = &mut self.snapshots[index].until_durable;
            waiting.entry(slot).or_default().push(task);
            self.tasks[task.0].waits += 1;
        }
        if !slots.is_empty() {
            self.list(index);
        }
    }

    /// Nothing stands in the way of the current window any more.
    fn issue_origin_window(&mut self, request: RequestKey) {
        let mutation = self.mutation_mut(request);
        let first = !std::mem::replace(&mut mutation.begun, true);
        self.origin_mutations += u64::from(first);
        let mutation = self.mutation(request);
        let (start, end) = mutation.window;
        let (offset, effect) = (mutation.offset, mutation.effect.clone());
        let extents = self.origin_extents(start, end);
        if matches!(effect, Effect::Trim) {
            return self.issue_trim(request, &extents);
        }
        self.requests[request].parts = extents.len() as u32;
        let mut at = start;
        for extent in extents {
            let from = at;
            at += extent.len;
            let is_direct = extent.device == Device::Origin;
            let action = match effect {
                Effect::Zeroes { may_punch } if is_direct => Action::WriteZeroes {
                    offset: from,
                    len: extent.len,
                    may_punch,
                },
                _ => {
                    let mut data = Vec::with_capacity(1);
                    effect.pieces(offset, from, at, &mut data);
                    let offset = extent.offset;
                    Action::Write { offset, data }
                }
            };
            if is_direct {
                self.emit(Device::Origin, action, Purpose::ClientWrite(request));
            } else {
                self.begin_merged_write(request, from, extent, action);
            }
        }
    }

    /// A trim acts where the origin's bytes lie in the origin, and no snapshot
    /// reads them there. (A chunk in a store is never given back.)
    fn issue_trim(&mut self, request: RequestKey, extents: &[Extent]) {
        let direct = extents.iter().filter(|e| e.device == Device::Origin);
        let ranges: Vec<_> = direct
            .flat_map(|e| self.trimmable(e.offset, e.offset + e.len))
            .collect();
        self.requests[request].parts = ranges.len() as u32;
        if ranges.is_empty() {
            return self.window_ended(request);
        }
        for (start, end) in ranges {
            let (offset, len) = (start, end - start);
            let action = Action::Trim { offset, len };
            self.emit(Device::Origin, action, Purpose::ClientWrite(request));
        }
    }

    /// The parts of a range that no snapshot reads from the origin, now or after
    /// a power cut.
    fn trimmable(&self, start: u64, end: u64) -> Vec<(u64, u64)> {
        let mut ranges = vec![(start, end)];
        if !self.law.trim_only_copied() {
            return ranges;
        }
        for snapshot in &self.snapshots {
            match snapshot.state {
                State::Creating | State::Invalid | State::Removing => {}
                State::Invalidating(_) | State::Unmarked => return Vec::new(),
                State::Active | State::Overflowed => {
                    ranges = ranges
                        .iter()
                        .flat_map(|&(start, end)| self.durable_parts(snapshot, start, end))
                        .collect();
                }
            }
        }
        ranges
    }

    fn durable_parts(&self, snapshot: &Snapshot, start: u64, end: u64) -> Vec<(u64, u64)> {
        let mut parts: Vec<(u64, u64)> = Vec::new();
        let mut add = |from: u64, to: u64| match parts.last_mut() {
            Some(last) if last.1 == from => last.1 = to,
            _ => parts.push((from, to)),
        };
        let its_end = snapshot.origin_bytes.clamp(start, end);
        snapshot.each_run(start, its_end, |chunk, run| {
            if let Run::Mapped { first, len } = run
                && snapshot.volatile_slot(first, len, self.law).is_none()
            {
                let size = snapshot.chunk_size;
                let from = size.origin_offset(chunk).max(start);
                let to = size.origin_offset(OriginChunk(chunk.0 + len)).min(its_end);
                add(from, to);
            }
            true
        });
        if its_end < end {
            add(its_end, end);
        }
        parts
    }

    /// See [`Volume::write_now`].
    pub(super) fn origin_write_now(
        &mut self,
        offset: u64,
        len: u64,
        extents: &mut Vec<Extent>,
    ) -> Now {
        debug_assert!(self.is_open());
        let end = offset + len;
        let free = len > 0
            && !self.holding
            && !self.origin_writes.overlaps(offset, end)
            && !self.origin_reads.overlaps(offset, end)
            && (self.merge.as_ref()).is_none_or(|merge| merge.is_open(offset, end));
        if !free {
            return Now::Queue;
        }
        let before = extents.len();
        self.resolve_origin(offset, end, usize::MAX, extents);
        let direct = extents[before..]
            .iter()
            .filter(|e| e.device == Device::Origin);
        let clear = direct
            .clone()
            .all(|e| self.is_copied_for_now(e.offset, e.offset + e.len));
        let in_store = direct.count() < extents.len() - before;
        if !clear {
            extents.truncate(before);
            return Now::Queue;
        }
        self.origin_changes += 1;
        if let Some(merge) = self.merge.as_mut().filter(|_| in_store) {
            merge.written();
        }
        Now::Go
    }

    /// [`Volume::is_copied`], for a write that is done at once.
    fn is_copied_for_now(&self, start: u64, end: u64) -> bool {
        if self.law.write_now_on_durable() {
            return self.is_copied(start, end);
        }
        self.snapshots.iter().all(|s| match s.state {
            State::Creating | State::Invalid | State::Removing => true,
            State::Active | State::Overflowed => s.is_mapped(start, end),
            State::Invalidating(_) | State::Unmarked => false,
        })
    }

    /// Every snapshot has durable copies of `start..end`, or needs none.
    fn is_copied(&self, start: u64, end: u64) -> bool {
        self.snapshots.iter().all(|s| match s.state {
            State::Creating | State::Invalid | State::Removing => true,
            State::Active | State::Overflowed => s.is_durable(start, end, self.law),
            State::Invalidating(_) | State::Unmarked => false,
        })
    }
}
