//! Merges: the order, its mark (which outlives a crash, as the server's does),
//! and what the engine may say of them.

use nbdsnap_engine::{MergeError, OnFull, SnapshotId, Status, Store};

use super::Violation;
use super::ledger::Tally;
use super::live::Suspension;
use super::traffic::Session;
use super::world::{Has, Phase, Slot, World, say};
use crate::store_bytes;
use crate::workload::Ambush;

/// The durable mark of a merge, and how far this process knows it to have come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Merging {
    /// The store.
    pub(super) slot: usize,
    /// The origin reads as the snapshot.
    pub(super) begun: bool,
    /// An error has stopped it.
    pub(super) failed: bool,
}

impl World {
    /// The store of a merge that has begun.
    pub(super) fn merged_slot(&self) -> Option<usize> {
        self.merging
            .filter(|merging| merging.begun)
            .map(|merging| merging.slot)
    }

    /// Whether an error on the disks may be what a request or a merge met.
    fn merge_may_be_hurt(&self, slot: usize) -> bool {
        self.origin_hurt || self.slots.iter().any(|s| s.hurt) || self.slots[slot].hurt
    }

    /// After a crash the mark is found: the origin is what the snapshot was. If the
    /// snapshot was lost before its merge began, there is nothing to go on with.
    pub(super) fn take_merge_up(&mut self, index: usize, store: &Store) -> bool {
        let Some(merging) = self.merging.filter(|merging| merging.slot == index) else {
            return false;
        };
        if store.is_invalid() {
            assert!(!merging.begun, "a merging store has become invalid");
            self.merging = None;
            return false;
        }
        if !merging.begun {
            self.ledger.count(Tally::MergeCutBeforeItBegan);
            self.model.take_over(&self.slots[index].view);
        }
        self.ledger.count(Tally::MergeAttached);
        self.merging = Some(Merging {
            slot: index,
            begun: true,
            failed: false,
        });
        self.slots[index].phase = Phase::Merging;
        true
    }

    /// A snapshot that shares chunks with a merging store may get copies of them at any moment.
    fn expect_copies_of(&mut self, merged: usize) {
        let chunk = self.slots[merged].plan.chunk_bytes();
        let content = self.slots[merged].disk.content();
        let old = store_bytes::exceptions(content, self.slots[merged].plan.chunk_sectors);
        for old in old.unwrap_or_default() {
            for slot in &mut self.slots {
                let bytes = old * chunk..(old + 1) * chunk;
                let size = slot.plan.chunk_bytes();
                for has in (slot.has.iter_mut())
                    .take(bytes.end.div_ceil(size) as usize)
                    .skip((bytes.start / size) as usize)
                {
                    if *has == Has::No {
                        *has = Has::Maybe;
                    }
                }
            }
        }
    }
}

impl Session<'_> {
    /// Take in the store of a merge that was cut off. It copies nothing so far.
    pub(super) fn attach_merging(&mut self, index: usize, store: Store) {
        self.suspend_merge();
        let id = self.volume.attach_merging(store);
        say!(
            self.world,
            "  store {index} is merging, as snapshot {}",
            id.0
        );
        self.world.slots[index].id = Some(id);
        self.world.expect_copies_of(index);
    }

    fn suspend_merge(&mut self) {
        self.volume.suspend_merge();
        self.merge_suspended = true;
    }

    pub(super) fn resume_merge(&mut self) {
        self.volume.resume_merge();
        self.merge_suspended = false;
    }

    /// Order a merge of some snapshot, or let one rest or go on.
    pub(super) fn meddle_with_merge(&mut self) -> Result<(), Violation> {
        if self.closing {
            return Ok(());
        }
        match self.world.merging {
            None => self.merge_somewhere()?,
            Some(merging) if merging.failed => self.merge_again(merging)?,
            Some(_) if self.merge_suspended => {
                say!(self.world, "resume the merge");
                self.resume_merge();
            }
            Some(_) if self.world.rng.chance(1, 4) => {
                say!(self.world, "suspend the merge");
                self.world.ledger.count(Tally::MergeSuspended);
                self.suspend_merge();
            }
            Some(merging) => {
                let id = self.world.slots[merging.slot].id;
                let refused = id.map(|id| self.volume.begin_merge(id));
                if refused != Some(Err(MergeError::AlreadyMerging)) {
                    return Err(Violation(format!("a second merge: {refused:?}")));
                }
                self.world.ledger.count(Tally::MergeRefused);
            }
        }
        self.pump()
    }

    fn merge_somewhere(&mut self) -> Result<(), Violation> {
        let World { slots, rng, .. } = &mut *self.world;
        let there: Vec<usize> = (0..slots.len())
            .filter(|&i| slots[i].id.is_some())
            .collect();
        if there.is_empty() {
            return Ok(());
        }
        let index = there[rng.index(there.len())];
        let slot = &self.world.slots[index];
        let Some(id) = slot.id else { return Ok(()) };
        let creating = self.world.slots.iter().any(|s| s.phase == Phase::Creating);
        let taking = creating || !self.instants.is_empty();
        let held = self.instants.iter().any(|told| told.held.is_some());
        let ordered = self.volume.begin_merge(id);
        say!(
            self.world,
            "merge snapshot {} in store {index}: {ordered:?}",
            id.0
        );
        let slot = &self.world.slots[index];
        match ordered {
            Ok(()) if matches!(slot.phase, Phase::Active | Phase::Overflowed) && !taking => {
                self.world.ledger.count(Tally::MergeOrdered);
                if self.suspension == Suspension::Suspended {
                    self.world.ledger.count(Tally::MergeOrderedSuspended);
                }
                self.world.merging = Some(Merging {
                    slot: index,
                    begun: false,
                    failed: false,
                });
                return Ok(());
            }
            Err(MergeError::Transient) if !slot.plan.is_persistent() => {}
            Err(MergeError::InstantUnderWay) if taking => {
                if held {
                    self.world.ledger.count(Tally::MergeRefusedHeld);
                }
            }
            Err(MergeError::NoSuchSnapshot) if slot.phase == Phase::Removing => {}
            // It is lost, or about to be.
            Err(MergeError::NotReadable) if slot.phase == Phase::Invalid => {}
            Err(MergeError::NotReadable) if self.status(index) == Some(Status::Invalid) => {}
            _ => {
                return Err(Violation(format!(
                    "the merge of store {index}, which is {:?}: {ordered:?}",
                    slot.phase
                )));
            }
        }
        self.world.ledger.count(Tally::MergeRefused);
        Ok(())
    }

    /// One that an error has stopped: some can be taken up again.
    fn merge_again(&mut self, merging: Merging) -> Result<(), Violation> {
        let Some(id) = self.world.slots[merging.slot].id else {
            return Ok(());
        };
        match self.volume.begin_merge(id) {
            Ok(()) => {
                say!(self.world, "the merge is taken up again");
                self.world.ledger.count(Tally::MergeTakenUpAgain);
                self.world.merging = Some(Merging {
                    failed: false,
                    ..merging
                });
                Ok(())
            }
            Err(MergeError::Failed) => Ok(()),
            Err(error) => Err(Violation(format!(
                "a merge that has failed cannot be taken up again: {error}"
            ))),
        }
    }

    /// Traffic with a merge of the first store in it, until so many disk operations
    /// were handed out; or to the end of the merge, which it says.
    pub(super) fn merge_until(&mut self, operations: u64) -> Result<bool, Violation> {
        self.resume_merge();
        // Some of the snapshot's own writes are still under way.
        for _ in 0..self.world.rng.below(3) {
            self.burst()?;
        }
        self.ambush = Some((Ambush::Any, operations));
        self.merge_first()?;
        while self.world.merging.is_some() && !matches!(self.ambush, Some((_, 0))) {
            match self.world.rng.below(8) {
                0 | 1 => self.burst()?,
                2 => self.progress_one(),
                _ => self.end_one()?,
            }
        }
        let met = matches!(self.ambush, Some((_, 0)));
        self.ambush = None;
        Ok(!met)
    }

    fn merge_first(&mut self) -> Result<(), Violation> {
        let id = self.world.slots[0].id;
        let ordered = id.map(|id| self.volume.begin_merge(id));
        if ordered != Some(Ok(())) {
            return Err(Violation(format!("the merge is refused: {ordered:?}")));
        }
        self.world.merging = Some(Merging {
            slot: 0,
            begun: false,
            failed: false,
        });
        self.pump()
    }

    /// The mark, if it is about this snapshot.
    fn marked(&self, id: SnapshotId) -> Result<Merging, Violation> {
        let merging = self.world.merging;
        merging
            .filter(|merging| self.world.slots[merging.slot].id == Some(id))
            .ok_or_else(|| {
                Violation(format!(
                    "an event about the merge of {id:?}, which has none"
                ))
            })
    }

    /// From here on the origin reads as the snapshot, but for what was held.
    pub(super) fn on_merge_begun(&mut self, id: SnapshotId) -> Result<(), Violation> {
        let merging = self.marked(id)?;
        if merging.begun {
            return Err(Violation("a merge begins twice".into()));
        }
        self.world.ledger.count(Tally::MergeBegun);
        if self
            .pending
            .values()
            .any(|p| p.slot.is_none() && p.writes())
        {
            self.world.ledger.count(Tally::HeldByMerge);
        }
        let now = self.world.tick();
        let World { model, slots, .. } = &mut *self.world;
        model.roll_back(&slots[merging.slot].view, now);
        slots[merging.slot].phase = Phase::Merging;
        self.world.merging = Some(Merging {
            begun: true,
            ..merging
        });
        self.world.expect_copies_of(merging.slot);
        self.compare_origin_map()
    }

    fn compare_origin_map(&mut self) -> Result<(), Violation> {
        let cells = self.world.cells_of(None);
        let view = nbdsnap_engine::View::Origin;
        let extents = self.volume.map(view, 0, cells.len_bytes(), usize::MAX);
        let extents = extents.map_err(|f| Violation(format!("the origin has no map: {f:?}")))?;
        let found = self.peek(&extents)?;
        let issued = self.world.tick();
        let now = self.world.tick();
        self.compare(None, cells, issued, now, &found)
    }

    /// The store is empty, and the origin alone shows what both did.
    pub(super) fn on_merged(&mut self, id: SnapshotId) -> Result<(), Violation> {
        let Merging {
            slot: index,
            begun,
            failed,
        } = self.marked(id)?;
        if !begun || failed {
            return Err(Violation("a merge ends that did not run".into()));
        }
        self.world.ledger.count(Tally::Merged);
        let slot = &self.world.slots[index];
        let left = store_bytes::exceptions(slot.disk.content(), slot.plan.chunk_sectors);
        if left.as_ref().is_none_or(|left| !left.is_empty()) || slot.disk.in_flight() > 0 {
            return Err(Violation(format!(
                "store {index} is merged with {left:?} left and {} operations in flight",
                slot.disk.in_flight()
            )));
        }
        let cells = self.world.cells_of(None);
        let found = self.world.origin.content().to_vec();
        let issued = self.world.tick();
        let now = self.world.tick();
        self.compare(None, cells, issued, now, &found)?;
        self.world.merging = None;
        self.world.slots[index].clear();
        // What queues in a suspended volume finds no snapshot when it is let in.
        self.forget_view(index, "merged")
    }

    pub(super) fn on_merge_failed(&mut self, id: SnapshotId, why: &str) -> Result<(), Violation> {
        let merging = self.marked(id)?;
        let slot = &self.world.slots[merging.slot];
        let full = !merging.begun && slot.may_be_full();
        if !full && !self.world.merge_may_be_hurt(merging.slot) {
            return Err(Violation(format!(
                "the merge of store {} fails ({why}) for no reason",
                merging.slot
            )));
        }
        self.world.ledger.count(Tally::MergeFailed);
        self.world.merging = merging.begun.then_some(Merging {
            failed: true,
            ..merging
        });
        Ok(())
    }

    /// Whole tenths of a merge that runs, and not of more than is done.
    pub(super) fn on_merge_progress(&self, id: SnapshotId, percent: u8) -> Result<(), Violation> {
        let merging = self.marked(id)?;
        let progress = self.volume.merge_progress();
        let done = progress.map_or(100, |now| {
            100 * (now.total_chunks - now.left_chunks) / now.total_chunks.max(1)
        });
        let whole = (10..=90).contains(&percent) && percent.is_multiple_of(10);
        if !merging.begun || !whole || u64::from(percent) > done {
            return Err(Violation(format!(
                "{percent} percent of a merge are said to be done, of which {done} are"
            )));
        }
        Ok(())
    }

    /// The status of a merging store: the exceptions that are left in it.
    pub(super) fn merge_status_is_right(&self, index: usize, status: Status) -> bool {
        let slot = &self.world.slots[index];
        let chunk = slot.plan.chunk_sectors;
        let failed = self.world.merging.is_some_and(|merging| merging.failed);
        let left = store_bytes::exceptions(slot.disk.content(), chunk).unwrap_or_default();
        match status {
            Status::Active {
                allocated,
                metadata,
                ..
            } => {
                let count = left.len() as u64;
                let areas = count / store_bytes::area_entries(chunk) + 1;
                !failed
                    && allocated == store_bytes::chunks_for(count, chunk) * chunk
                    && metadata == (areas + 1) * chunk
            }
            Status::MergeFailed => failed,
            Status::Overflow | Status::Invalid => false,
        }
    }

    /// Whether a merge waits where it should not, with nothing in flight.
    pub(super) fn merge_is_stuck(&self) -> bool {
        let running = self.suspension == Suspension::Running;
        let may_go_on = !self.merge_suspended && !self.closing && !self.merge_may_wait();
        (self.world.merging)
            .is_some_and(|merging| running && (!merging.begun || (!merging.failed && may_go_on)))
    }

    /// The merge says that it waits for room in another snapshot's store.
    pub(super) fn merge_waits(&self) -> bool {
        let progress = self.volume.merge_progress();
        progress.is_some_and(|progress| progress.waits_for_room)
    }

    /// Whether the merge waits for room, and there is a store that may be full and
    /// whose snapshot is not to be lost.
    pub(super) fn merge_may_wait(&self) -> bool {
        let slots = self.world.slots.iter().enumerate();
        let mut full = slots.filter(|(index, slot)| {
            slot.on_full.current != OnFull::Invalidate
                && (slot.may_be_full() || slot.hurt)
                && self.paused(*index) > 0
        });
        self.merge_waits() && full.next().is_some()
    }

    /// A merge stands still with its volume: it is to begin, or it waits for room
    /// and goes on when both are over.
    pub(super) fn merge_stands_still(&self) -> bool {
        let still = self.suspension == Suspension::Suspended;
        let to_begin = self.world.merging.is_some_and(|merging| !merging.begun);
        still && (to_begin || self.merge_waits())
    }

    /// Nobody waits for room in a store that is about to become a part of the origin.
    pub(super) fn merge_ends_pause(&self, index: usize) -> bool {
        let slot = &self.world.slots[index];
        let marked = self
            .world
            .merging
            .is_some_and(|merging| merging.slot == index);
        marked && slot.on_full.pause && slot.may_be_full()
    }

    /// Count what a merge waits for.
    pub(super) fn look_at_merge(&mut self) {
        if !self.merge_waits() {
            return;
        }
        for index in 0..self.world.slots.len() {
            if self.paused(index) == 0 {
                continue;
            }
            match self.world.slots[index].on_full.current {
                OnFull::Pause => self.world.ledger.count(Tally::MergeWaitsPausing),
                OnFull::Error => self.world.ledger.count(Tally::MergeWaitsRefusing),
                OnFull::Invalidate => {}
            }
        }
    }

    /// Count what the process had under way beside a merge when it was cut off.
    pub(super) fn count_crash_in_merge(&mut self) {
        if self.world.merged_slot().is_none() {
            return;
        }
        if self.suspension == Suspension::Suspended {
            self.world.ledger.count(Tally::CrashMergeSuspended);
        }
        if self.merge_waits() {
            self.world.ledger.count(Tally::CrashMergeWaiting);
        }
        let removing = |slot: &Slot| slot.phase == Phase::Removing;
        if self.world.slots.iter().any(removing) {
            self.world.ledger.count(Tally::CrashMergeRemoving);
        }
    }

    /// The last process: a merge that waits for room is let go on, at the cost of
    /// whom it waits for.
    pub(super) fn let_merge_end(&mut self) -> Result<(), Violation> {
        self.resume_merge();
        self.settle()?;
        while self.merge_waits() {
            let full = (0..self.world.slots.len()).find(|&index| self.paused(index) > 0);
            let Some(index) = full else {
                return Err(Violation(
                    "a merge waits for room, and nobody is full".into(),
                ));
            };
            self.set_policy(index, OnFull::Invalidate);
            self.settle()?;
        }
        Ok(())
    }
}
