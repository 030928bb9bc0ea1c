//! Mutations of the origin: they wait until every snapshot has what it needs.

use nbdsnap_format::OriginChunk;

use super::active::{Effect, RequestKey};
use super::lifecycle::Phase;
use super::task::{TaskId, Work};
use super::{Extent, Now, Purpose, Volume};
use crate::disk::{Action, Device};
use crate::request::Failure;
use crate::snapshot::{Snapshot, State};
use crate::store::{NoRoom, StoreKind};
use crate::table::Run;

impl Volume {
    /// Look at the current window of a mutation: prepare what is missing and wait
    /// for it, or let it go to the disk.
    pub(super) fn advance_origin_mutation(&mut self, request: RequestKey) {
        let mutation = self.mutation(request);
        let (start, end) = mutation.window;
        let is_trim = matches!(mutation.effect, Effect::Trim);
        let task = self.new_task(Work::Mutation(request));
        if !is_trim {
            if self.snapshots.iter().any(|s| s.state == State::Unmarked) {
                self.tasks.remove(task.0);
                self.requests[request].failure = Some(Failure::Io);
                return self.window_ended(request);
            }
            for index in 0..self.snapshots.len() {
                self.wait_for_copies(index, start, end, task);
            }
        }
        if self.tasks[task.0].waits == 0 && self.law.reads_before_origin() {
            // Snapshot reads that begin from now on find the copies, so nobody
            // can come in between for ever.
            self.tasks[task.0].waits = self.origin_reads.wait_for_overlaps(start, end, task);
        }
        if !self.waits(task) {
            self.issue_origin_window(request);
        }
    }

    /// Make `task` wait until the snapshot no longer needs `start..end` of the origin.
    fn wait_for_copies(&mut self, index: usize, start: u64, end: u64, task: TaskId) {
        match self.snapshots[index].state {
            State::Creating | State::Invalid => return,
            State::Unmarked => unreachable!("refused before"),
            State::Invalidating(_) => {}
            State::Active | State::Overflowed => match self.prepare_range(index, start, end) {
                Ok(slots) => return self.wait_until_durable(index, &slots, task),
                Err(NoRoom::Grow) => {
                    self.snapshots[index].until_grown.push(task);
                    self.tasks[task.0].waits += 1;
                    return;
                }
                Err(NoRoom::Full) => self.invalidate(index, "its store is full"),
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
        let mutation = self.mutation(request);
        let (start, end) = mutation.window;
        let effect = mutation.effect.clone();
        let actions = match effect {
            Effect::Data(_) => {
                let mut data = Vec::with_capacity(1);
                effect.pieces(mutation.offset, start, end, &mut data);
                vec![Action::Write {
                    offset: start,
                    data,
                }]
            }
            Effect::Zeroes { may_punch } => vec![Action::WriteZeroes {
                offset: start,
                len: end - start,
                may_punch,
            }],
            Effect::Trim => self
                .trimmable(start, end)
                .into_iter()
                .map(|(start, end)| Action::Trim {
                    offset: start,
                    len: end - start,
                })
                .collect(),
        };
        self.requests[request].parts = actions.len() as u32;
        if actions.is_empty() {
            return self.window_ended(request);
        }
        for action in actions {
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
                State::Creating | State::Invalid => {}
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
        snapshot.each_run(start, end, |chunk, run| {
            if let Run::Mapped { first, len } = run
                && snapshot.volatile_slot(first, len, self.law).is_none()
            {
                let size = snapshot.chunk_size;
                let from = size.origin_offset(chunk).max(start);
                let to = size.origin_offset(OriginChunk(chunk.0 + len)).min(end);
                match parts.last_mut() {
                    Some(last) if last.1 == from => last.1 = to,
                    _ => parts.push((from, to)),
                }
            }
            true
        });
        parts
    }

    /// See [`Volume::write_now`].
    pub(super) fn origin_write_now(
        &mut self,
        offset: u64,
        len: u64,
        extents: &mut Vec<Extent>,
    ) -> Now {
        debug_assert_eq!(self.phase, Phase::Open);
        let end = offset + len;
        let clear = len > 0
            && !self.holding
            && !self.origin_writes.overlaps(offset, end)
            && !self.origin_reads.overlaps(offset, end)
            && self.snapshots.iter().all(|s| match s.state {
                State::Creating | State::Invalid => true,
                State::Active | State::Overflowed if self.law.write_now_on_durable() => {
                    s.is_durable(offset, end, self.law)
                }
                State::Active | State::Overflowed => s.is_mapped(offset, end),
                State::Invalidating(_) | State::Unmarked => false,
            });
        if !clear {
            return Now::Queue;
        }
        self.origin_changes += 1;
        extents.push(Extent {
            device: Device::Origin,
            offset,
            len,
        });
        Now::Go
    }
}
