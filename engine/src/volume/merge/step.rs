//! The steps of a merge. Each takes some exceptions from the end of the list:
//!
//! 1. the end of the list is read, for only the disk knows its order;
//! 2. the step's chunks are a window from here on: writes to them wait. Writes
//!    that are on their way to them end, the other snapshots get durable
//!    exceptions of them (or are durably lost), their reads of the origin end;
//! 3. neighbours are copied from the store to the origin, in pieces, in the order in
//!    which they lie in the store;
//! 4. the origin is flushed;
//! 5. the entries are zeroed, the store is flushed, and the window opens: the
//!    chunks lie in the origin now.
//!
//! A crash between any two of these leaves exceptions that are merged again, or
//! are gone with their chunks durable in the origin. As writes to the window wait
//! for the end, merging again changes nothing.

use bytes::Bytes;
use nbdsnap_format::OriginChunk;

use super::Merge;
use crate::disk::{Action, Device, Outcome};
use crate::in_flight::RangeId;
use crate::snapshot::State;
use crate::store::{Changed, Tail};
use crate::volume::copy::Holder;
use crate::volume::flush::Waiter;
use crate::volume::origin_write::Writer;
use crate::volume::task::Work;
use crate::volume::{Event, Purpose, Volume};

/// A piece's place in the merge's slab.
pub(crate) type PieceKey = usize;

/// Where a merge stands.
#[derive(Debug)]
pub(crate) enum Stage {
    /// Between two steps: all that was done is durable.
    Resting,
    /// The end of the list is being read, area by area: the parts that are there.
    Reading {
        tails: Vec<Tail>,
        blocks: Vec<Bytes>,
    },
    /// The window is closed; what is in its way ends.
    Clearing(Step),
    /// Pieces are being copied: how many more, and whether one has failed.
    Copying {
        step: Step,
        left: usize,
        failed: bool,
    },
    /// The origin is being flushed.
    FlushingOrigin(Step),
    /// The entries are being zeroed, area by area: in how many they are.
    Zeroing { step: Step, done: usize },
    /// The store is being flushed.
    FlushingStore(Step),
    /// An error has stopped it.
    Failed,
}

/// The exceptions that are merged together.
#[derive(Debug)]
pub(crate) struct Step {
    tails: Vec<Tail>,
    /// What the blocks of each of them hold afterwards.
    zeroed: Vec<Bytes>,
    /// In the order of the origin's chunks.
    chunks: Vec<OriginChunk>,
    /// The bytes of the origin that they are, neighbours together.
    ranges: Vec<(u64, u64)>,
    /// The same, in the merge's window.
    window: Vec<RangeId>,
}

/// Bytes on their way from the store to the origin.
#[derive(Debug)]
pub(crate) struct Piece {
    /// Where they lie in the store.
    from: u64,
    /// Where they go in the origin.
    to: u64,
    len: u64,
    /// Bytes of the copies' memory that it holds.
    pub(in crate::volume) held: u64,
}

impl Merge {
    fn take_stage(&mut self) -> Stage {
        std::mem::replace(&mut self.stage, Stage::Resting)
    }
}

impl Volume {
    fn merge_mut(&mut self) -> &mut Merge {
        let merge = self.merge.as_mut();
        merge.expect("a merge outlives its operations")
    }

    pub(super) fn begin_merge_step(&mut self) {
        let bytes = self.merge_step;
        let merge = self.merge_mut();
        let tails = merge.unwind.tails(bytes);
        assert!(!tails.is_empty(), "there is something left");
        let blocks = Vec::with_capacity(tails.len());
        merge.stage = Stage::Reading { tails, blocks };
        self.read_merge_tail();
    }

    /// Read the end of the next area.
    fn read_merge_tail(&mut self) {
        let merge = self.merge_mut();
        let Stage::Reading { tails, blocks } = &merge.stage else {
            unreachable!("the end of the list is being read");
        };
        let Tail { offset, len, .. } = tails[blocks.len()];
        let device = Device::Cow(merge.id);
        self.emit(device, Action::Read { offset, len }, Purpose::MergeTail);
    }

    /// The end of an area is there; with the last of them, close the window around
    /// the step's chunks.
    pub(in crate::volume) fn merge_tail_read(&mut self, outcome: Outcome) {
        let merge = self.merge_mut();
        let Stage::Reading { tails, mut blocks } = merge.take_stage() else {
            unreachable!("the end of the list is being read");
        };
        let Ok(block) = outcome else {
            return self.merge_failed("the list of its store could not be read");
        };
        blocks.push(block);
        if blocks.len() < tails.len() {
            merge.stage = Stage::Reading { tails, blocks };
            return self.read_merge_tail();
        }
        let mut all = Vec::new();
        for (tail, block) in tails.iter().zip(&blocks) {
            match tail.exceptions(block) {
                Ok(exceptions) => all.extend(exceptions),
                Err(Changed) => {
                    return self.merge_failed("the list of its store is not what it was");
                }
            }
        }
        if all.iter().any(|e| merge.table.get(e.old) != Some(e.new)) {
            return self.merge_failed("the list of its store is not what it was");
        }
        all.sort_unstable();
        let size = merge.chunk_size;
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for exception in &all {
            let start = size.origin_offset(exception.old);
            let end = (start + size.bytes()).min(merge.bytes);
            match ranges.last_mut() {
                Some(last) if last.1 == start => last.1 = end,
                _ => ranges.push((start, end)),
            }
        }
        let window = (ranges.iter())
            .map(|&(start, end)| merge.window.insert(start, end))
            .collect();
        merge.stage = Stage::Clearing(Step {
            zeroed: (tails.iter().zip(&blocks))
                .map(|(tail, block)| tail.zeroed(block))
                .collect(),
            tails,
            chunks: all.into_iter().map(|e| e.old).collect(),
            ranges,
            window,
        });
        self.clear_merge_window();
    }

    /// Wait for what is in the way of the step, or begin to copy.
    pub(in crate::volume) fn clear_merge_window(&mut self) {
        let may_step = self.may_step();
        let Some(merge) = &mut self.merge else {
            return;
        };
        merge.paused = false;
        let Stage::Clearing(step) = &merge.stage else {
            // The step was abandoned meanwhile.
            return;
        };
        if !may_step {
            return self.abandon_merge_step();
        }
        if self.snapshots.iter().any(|s| s.state == State::Unmarked) {
            return self.merge_failed("a lost snapshot of the origin could not be marked so");
        }
        let ranges = step.ranges.clone();
        let task = self.guarded_task(Work::MergeStep);
        if self.law.siblings_before_merge() {
            self.wait_for_all_copies(&ranges, Writer::Merge, task);
        } else {
            self.begin_all_copies(&ranges);
        }
        self.unguard(task);
        if self.merge_mut().paused {
            // The task waits for room, and then it is all looked at anew.
            return self.abandon_merge_step();
        }
        if self.law.writes_before_merge() {
            let writes = &mut self.merge_mut().writes;
            let waits: u32 = (ranges.iter())
                .map(|&(start, end)| writes.wait_for_overlaps(start, end, task))
                .sum();
            self.tasks[task.0].waits += waits;
        }
        if self.tasks[task.0].waits == 0 && self.law.reads_before_origin() {
            // Reads of the other snapshots that begin from now on find the copies.
            let reads = &mut self.origin_reads;
            let waits: u32 = (ranges.iter())
                .map(|&(start, end)| reads.wait_for_overlaps(start, end, task))
                .sum();
            self.tasks[task.0].waits += waits;
        }
        if !self.waits(task) {
            self.copy_merge_step();
        }
    }

    /// A snapshot has no room for its copies and is not to be lost: no step begins
    /// until it has, and writes to the window do not wait for that.
    pub(in crate::volume) fn merge_pauses(&mut self) {
        self.merge_mut().paused = true;
    }

    /// No more steps are to begin, and this one has changed nothing yet.
    pub(super) fn abandon_merge_step(&mut self) {
        let Stage::Clearing(step) = self.merge_mut().take_stage() else {
            unreachable!("the step clears its window");
        };
        self.open_merge_window(step.window);
    }

    fn open_merge_window(&mut self, window: Vec<RangeId>) {
        let merge = self.merge_mut();
        let waiting: Vec<_> = (window.into_iter())
            .flat_map(|range| merge.window.remove(range))
            .collect();
        self.wake(waiting);
    }

    /// Nothing is in the way: on to the origin, neighbours together, in pieces.
    fn copy_merge_step(&mut self) {
        let most = self.config.copy_piece;
        let merge = self.merge_mut();
        let Stage::Clearing(step) = merge.take_stage() else {
            unreachable!("the step clears its window");
        };
        let size = merge.chunk_size;
        let mut keys = Vec::new();
        let mut last: Option<Piece> = None;
        for &old in &step.chunks {
            let new = merge.table.get(old).expect("the chunk was found there");
            let (mut from, mut to) = (size.cow_offset(new), size.origin_offset(old));
            let end = (to + size.bytes()).min(merge.bytes);
            while to < end {
                let mut piece = match last.take() {
                    Some(p) if p.to + p.len == to && p.from + p.len == from && p.len < most => p,
                    full => {
                        keys.extend(full.map(|piece| merge.pieces.insert(piece)));
                        let (len, held) = (0, 0);
                        Piece {
                            from,
                            to,
                            len,
                            held,
                        }
                    }
                };
                let len = (end - to).min(most - piece.len);
                piece.len += len;
                (from, to) = (from + len, to + len);
                last = Some(piece);
            }
        }
        keys.extend(last.map(|piece| merge.pieces.insert(piece)));
        // The store is read in one go, as it was written. What is written to the origin
        // out of order is put in order by whoever has it until the flush.
        keys.sort_unstable_by_key(|&key| merge.pieces[key].from);
        merge.stage = Stage::Copying {
            step,
            left: keys.len(),
            failed: false,
        };
        for key in keys {
            self.read_piece(key);
        }
    }

    /// Read a piece, once there is memory for it.
    pub(in crate::volume) fn read_piece(&mut self, key: PieceKey) {
        let merge = self.merge_mut();
        let id = merge.id;
        let Piece {
            from, len, held, ..
        } = merge.pieces[key];
        if held == 0 {
            if !self.hold_memory(Work::MergePiece(key), Holder::Piece(key), len) {
                return;
            }
            self.merge_mut().pieces[key].held = len;
        }
        self.emit(
            Device::Cow(id),
            Action::Read { offset: from, len },
            Purpose::PieceRead(key),
        );
    }

    pub(in crate::volume) fn piece_read(&mut self, key: PieceKey, outcome: Outcome) {
        let Ok(bytes) = outcome else {
            return self.piece_ended(key, false);
        };
        let offset = self.merge_mut().pieces[key].to;
        let data = vec![bytes];
        let action = Action::Write { offset, data };
        self.emit(Device::Origin, action, Purpose::PieceWrite(key));
    }

    pub(in crate::volume) fn piece_written(&mut self, key: PieceKey, ok: bool) {
        self.origin_changes += 1;
        self.piece_ended(key, ok);
    }

    fn piece_ended(&mut self, key: PieceKey, ok: bool) {
        let piece = self.merge_mut().pieces.remove(key);
        self.free_memory(piece.held);
        let merge = self.merge_mut();
        let Stage::Copying { left, failed, .. } = &mut merge.stage else {
            unreachable!("the step copies");
        };
        *left -= 1;
        *failed |= !ok;
        if *left > 0 {
            return;
        }
        if *failed {
            return self.merge_failed("a chunk could not be copied to the origin");
        }
        let Stage::Copying { step, .. } = merge.take_stage() else {
            unreachable!("it was looked at above");
        };
        if self.law.origin_before_merged() {
            self.merge_mut().stage = Stage::FlushingOrigin(step);
            self.origin_flush.waiting.push(Waiter::Merge);
        } else {
            self.zero_entries(step);
        }
    }

    /// The flush that the step asked for has ended: of the origin, and later of
    /// the store.
    pub(in crate::volume) fn merge_flushed(&mut self, ok: bool) {
        match (&self.merge_mut().stage, ok) {
            (Stage::FlushingOrigin(_), true) => {
                let Stage::FlushingOrigin(step) = self.merge_mut().take_stage() else {
                    unreachable!("it was looked at above");
                };
                self.zero_entries(step);
            }
            (Stage::FlushingOrigin(_), false) => self.merge_failed("a flush of the origin failed"),
            (_, true) => self.step_is_durable(),
            (_, false) => self.merge_failed("a flush of its store failed"),
        }
    }

    fn zero_entries(&mut self, step: Step) {
        self.merge_mut().stage = Stage::Zeroing { step, done: 0 };
        self.zero_next_entries();
    }

    /// Zero the entries of the next area.
    fn zero_next_entries(&mut self) {
        let merge = self.merge_mut();
        let Stage::Zeroing { step, done } = &merge.stage else {
            unreachable!("the step zeroes its entries");
        };
        let id = merge.id;
        let (offset, data) = (step.tails[*done].offset, vec![step.zeroed[*done].clone()]);
        self.emit(
            Device::Cow(id),
            Action::Write { offset, data },
            Purpose::MergeEntries,
        );
    }

    pub(in crate::volume) fn merge_entries_written(&mut self, ok: bool) {
        if !ok {
            return self.merge_failed("the list of its store could not be written");
        }
        let must_flush = self.law.merged_before_released();
        let merge = self.merge_mut();
        let Stage::Zeroing { step, done } = merge.take_stage() else {
            unreachable!("the step zeroes its entries");
        };
        let done = done + 1;
        if done < step.tails.len() {
            merge.stage = Stage::Zeroing { step, done };
            return self.zero_next_entries();
        }
        merge.stage = Stage::FlushingStore(step);
        if must_flush {
            merge.lane.waiting.push(Waiter::Merge);
        } else {
            self.step_is_durable();
        }
    }

    /// The store durably lacks the step's exceptions: its chunks lie in the origin
    /// from now on.
    fn step_is_durable(&mut self) {
        let merge = self.merge_mut();
        let Stage::FlushingStore(step) = merge.take_stage() else {
            unreachable!("the step asked for the flush");
        };
        merge.unwind.commit(&step.tails);
        // From the end of each run: what is left of it is shortened in its place.
        for &old in step.chunks.iter().rev() {
            merge.table.remove(old);
        }
        if let Some(percent) = merge.progress_to_say() {
            let id = merge.id;
            self.events.push_back(Event::MergeProgress(id, percent));
        }
        self.open_merge_window(step.window);
    }

    /// An error has stopped the merge. What is mapped is read and written in the
    /// store as before. But if the list may have lost entries, nobody can say
    /// where a crash would find these chunks: they take no more writes.
    pub(super) fn merge_failed(&mut self, why: &'static str) {
        let merge = self.merge_mut();
        let id = merge.id;
        match std::mem::replace(&mut merge.stage, Stage::Failed) {
            Stage::Resting | Stage::Reading { .. } | Stage::Failed => {}
            Stage::Clearing(step) | Stage::Copying { step, .. } | Stage::FlushingOrigin(step) => {
                self.open_merge_window(step.window);
            }
            Stage::Zeroing { step, .. } | Stage::FlushingStore(step) => {
                for &(start, end) in &step.ranges {
                    merge.doubtful.insert(start, end);
                }
                self.open_merge_window(step.window);
            }
        }
        self.events.push_back(Event::MergeFailed(id, why));
    }
}
