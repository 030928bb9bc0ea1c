//! The verbs of a live disk: snapshots removed, several taken at one instant,
//! volumes suspended and resumed, stores extended, policies changed, the origin
//! grown; and what the engine may say of each. All of it also while the origin is
//! being merged (see `merging.rs`), but for new snapshots.

use nbdsnap_engine::disk::sim::Faults;
use nbdsnap_engine::{Action, ExtendError, InstantId, NotHeld, OnFull, SnapshotId, Status, Store};

use super::Violation;
use super::ledger::Tally;
use super::requests::Pending;
use super::traffic::Session;
use super::world::{Phase, World, say};
use crate::pattern::SECTOR;

/// Whether the volume was told to stand still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Suspension {
    Running,
    /// It was, and has not said that it does.
    Asked,
    /// It does.
    Suspended,
}

/// An instant that the simulator is to take.
pub(super) struct Told {
    pub(super) id: InstantId,
    pub(super) slots: Vec<usize>,
    /// What the origin showed when it was said to be held.
    pub(super) held: Option<u64>,
}

impl Session<'_> {
    /// Something of this, now and then; and what keeps others waiting comes to an
    /// end after a while.
    pub(super) fn live_step(&mut self) -> Result<(), Violation> {
        self.look_at_merge();
        let rng = &mut self.world.rng;
        if self.suspension != Suspension::Running && rng.chance(1, 8) {
            self.resume()?;
        }
        let rng = &mut self.world.rng;
        if !self.instants.is_empty() && rng.chance(1, 6) {
            let place = rng.index(self.instants.len());
            if rng.chance(3, 4) {
                self.take(0)?;
            } else {
                self.abandon(place)?;
            }
        }
        if let Some(index) = self.paused_slot()
            && self.world.rng.chance(1, 12)
        {
            self.extend(index)?;
        }
        if !self.world.rng.chance(self.world.plan.live, 64) {
            return Ok(());
        }
        match self.world.rng.below(16) {
            0..6 => self.remove_one(),
            6 | 7 => self.suspend(),
            8..11 => self.extend_one(),
            11 | 12 => self.change_policy(),
            13 => self.grow_origin(),
            _ => Ok(()),
        }
    }

    fn paused_slot(&self) -> Option<usize> {
        (0..self.world.slots.len()).find(|&i| self.paused(i) > 0)
    }

    /// Writes that wait for room in the store of a slot.
    pub(super) fn paused(&self, index: usize) -> usize {
        let id = self.world.slots[index].id;
        let info = id.and_then(|id| self.volume.snapshot_info(id));
        info.map_or(0, |info| info.paused)
    }

    /// One of the slots whose snapshot `wanted` says yes to.
    fn pick_slot(&mut self, wanted: impl Fn(Phase) -> bool) -> Option<usize> {
        let World { rng, slots, .. } = &mut *self.world;
        let some: Vec<usize> = (0..slots.len())
            .filter(|&i| slots[i].id.is_some() && wanted(slots[i].phase))
            .collect();
        (!some.is_empty()).then(|| some[rng.index(some.len())])
    }

    // Removal.

    fn remove_one(&mut self) -> Result<(), Violation> {
        // What the engine wanted before is in flight.
        self.pump()?;
        let there = |phase| !matches!(phase, Phase::Absent | Phase::Merging);
        let Some(index) = self.pick_slot(there) else {
            return Ok(());
        };
        if self
            .world
            .merging
            .is_some_and(|merging| merging.slot == index)
        {
            // Whoever has ordered a merge does not remove its snapshot.
            return Ok(());
        }
        if self.world.merged_slot().is_some() {
            self.world.ledger.count(Tally::MergeSiblingRemoved);
        }
        if self.merge_waits() && self.paused(index) > 0 {
            self.world.ledger.count(Tally::MergeRoomByRemoval);
        }
        let busy = self.world.slots[index].disk.in_flight() > 0;
        let paused = self.paused(index) > 0;
        let suspended = self.suspension == Suspension::Suspended;
        let Some(id) = self.world.slots[index].id else {
            return Ok(());
        };
        say!(self.world, "remove snapshot {} in store {index}", id.0);
        let World { slots, ledger, .. } = &mut *self.world;
        let slot = &mut slots[index];
        ledger.count(match slot.phase {
            Phase::Creating => Tally::RemovedCreating,
            Phase::Invalid => Tally::RemovedInvalid,
            Phase::Overflowed => Tally::RemovedOverflowed,
            Phase::Removing => Tally::RemovedTwice,
            _ if busy => Tally::RemovedBusy,
            _ => Tally::RemovedIdle,
        });
        if paused {
            ledger.count(Tally::RemovedPaused);
        }
        if suspended {
            ledger.count(Tally::RemovedSuspended);
        }
        for told in &mut self.instants {
            told.slots.retain(|&other| other != index);
        }
        self.world.slots[index].phase = Phase::Removing;
        self.removed_any = true;
        self.volume.remove_snapshot(id);
        self.pump()
    }

    pub(super) fn on_removed(&mut self, id: SnapshotId) -> Result<(), Violation> {
        let index = self.known(id)?;
        let slot = &mut self.world.slots[index];
        if slot.phase != Phase::Removing {
            return Err(Violation(format!("store {index} is removed, unasked")));
        }
        if slot.disk.in_flight() > 0 {
            return Err(Violation(format!(
                "store {index} is said to be removed while operations are in flight there"
            )));
        }
        slot.clear();
        slot.was_removed = true;
        self.world.ledger.count(Tally::Removed);
        self.forget_view(index, "removed")
    }

    /// The snapshot in a slot is gone: only what queues in a suspended volume may
    /// not have been answered.
    pub(super) fn forget_view(&mut self, index: usize, how: &str) -> Result<(), Violation> {
        let of_it = |p: &Pending| p.slot == Some(index) && !p.orphan;
        for (request, p) in self.pending.iter_mut().filter(|(_, p)| of_it(p)) {
            if !p.queued {
                return Err(Violation(format!(
                    "store {index} is said to be {how} before request {request} was answered"
                )));
            }
            p.orphan = true;
        }
        Ok(())
    }

    // Instants.

    /// Order snapshots into the stores of several slots, at one instant.
    pub(super) fn begin_instant(&mut self, stores: Vec<(usize, Store)>) -> Result<(), Violation> {
        self.world.ledger.count(Tally::InstantBegun);
        let (indices, stores): (Vec<_>, Vec<_>) = stores.into_iter().unzip();
        let (id, snapshots) = self.volume.begin_instant(stores);
        say!(self.world, "begin instant {} of stores {indices:?}", id.0);
        for (&index, &snapshot) in indices.iter().zip(&snapshots) {
            self.note_creation(index, snapshot);
        }
        self.instants.push(Told {
            id,
            slots: indices,
            held: None,
        });
        self.pump()
    }

    pub(super) fn on_held(&mut self, id: InstantId) -> Result<(), Violation> {
        let shown = self.world.origin.digest(0);
        match self.instants.iter_mut().find(|told| told.id == id) {
            Some(told) if told.held.is_none() => told.held = Some(shown),
            _ => return Err(Violation(format!("{id:?} is held, unasked or twice"))),
        }
        self.world.ledger.count(Tally::InstantHeld);
        Ok(())
    }

    /// While an instant is held the origin stays as it is.
    fn check_held(&self) -> Result<(), Violation> {
        let shown = self.world.origin.digest(0);
        let changed = |told: &&Told| told.held.is_some_and(|held| held != shown);
        match self.instants.iter().find(changed) {
            Some(Told { id, .. }) => Err(Violation(format!(
                "the origin changed while {id:?} was held"
            ))),
            None => Ok(()),
        }
    }

    fn take(&mut self, place: usize) -> Result<(), Violation> {
        self.check_held()?;
        let Told { id, held, .. } = self.instants[place];
        let result = self.volume.take_instant(id);
        say!(self.world, "take instant {}: {result:?}", id.0);
        match (held, result) {
            (None, Err(NotHeld)) => {
                self.world.ledger.count(Tally::InstantNotYet);
                return Ok(());
            }
            (Some(_), Ok(())) => {}
            (_, result) => return Err(Violation(format!("taking {id:?}: {result:?}"))),
        }
        let told = self.instants.remove(place);
        self.listen()?;
        let slots = &self.world.slots;
        if told
            .slots
            .iter()
            .any(|&i| slots[i].phase == Phase::Creating)
        {
            return Err(Violation(format!("{id:?} was taken, but not all of it")));
        }
        self.world.ledger.count(match told.slots.len() {
            0 => Tally::InstantEmpty,
            1 => Tally::InstantOfOne,
            _ => Tally::InstantOfSeveral,
        });
        self.pump()
    }

    fn abandon(&mut self, place: usize) -> Result<(), Violation> {
        let Told { id, slots, held } = self.instants.remove(place);
        say!(self.world, "abandon instant {}", id.0);
        self.world.ledger.count(if held.is_some() {
            Tally::HeldAbandoned
        } else {
            Tally::InstantAbandoned
        });
        self.volume.abandon_instant(id);
        self.forget_untaken(&slots)?;
        self.pump()
    }

    fn forget_untaken(&mut self, slots: &[usize]) -> Result<(), Violation> {
        for &index in slots {
            let slot = &mut self.world.slots[index];
            if slot.phase != Phase::Creating || slot.disk.in_flight() > 0 {
                return Err(Violation(format!(
                    "store {index} was not taken, and is {:?}",
                    slot.phase
                )));
            }
            slot.clear();
        }
        Ok(())
    }

    pub(super) fn on_instant_failed(&mut self, id: InstantId) -> Result<(), Violation> {
        let place = self.instants.iter().position(|told| told.id == id);
        let hurt = self.world.origin_hurt || self.injected.origin_flush;
        let Some(place) = place.filter(|_| self.closing || hurt) else {
            return Err(Violation(format!("{id:?} failed for no reason")));
        };
        self.world.ledger.count(if self.closing {
            Tally::InstantClosed
        } else {
            Tally::InstantFailed
        });
        let told = self.instants.remove(place);
        self.forget_untaken(&told.slots)
    }

    // Suspension.

    fn suspend(&mut self) -> Result<(), Violation> {
        say!(self.world, "suspend");
        if self.suspension == Suspension::Running {
            self.suspension = Suspension::Asked;
            self.world.ledger.count(Tally::SuspendAsked);
        }
        self.volume.suspend();
        self.pump()
    }

    /// Its store cannot say that it is lost: the list of the origin's stores does, or
    /// it cannot be written either.
    pub(super) fn on_mark_wanted(&mut self, id: SnapshotId) -> Result<(), Violation> {
        self.known(id)?;
        self.marks.push(id);
        Ok(())
    }

    /// One of the marks under way is made, or cannot be. A crash before that leaves
    /// none, and no write of the origin may have gone on without it.
    pub(super) fn answer_mark(&mut self) {
        let which = self.world.rng.index(self.marks.len());
        let id = self.marks.swap_remove(which);
        // One that has been removed meanwhile needs none.
        let there = |index: &usize| self.world.slots[*index].phase != Phase::Removing;
        let index = self.world.slot_of(id).filter(there);
        let durable = index.is_some() && self.world.rng.chance(1, 2);
        if let Some(index) = index.filter(|_| durable) {
            self.world.slots[index].listed_lost = true;
            self.world.ledger.count(Tally::MarkedElsewhere);
        }
        say!(self.world, "mark of snapshot {}: {durable}", id.0);
        self.volume.marked_lost(id, durable);
    }

    pub(super) fn on_suspended(&mut self, durable: bool) -> Result<(), Violation> {
        if self.suspension != Suspension::Asked || self.in_flight() > 0 {
            return Err(Violation(
                "suspended unasked, or with operations in flight".into(),
            ));
        }
        if !(durable || self.world.origin_hurt || self.injected.store) {
            return Err(Violation("suspending failed for no reason".into()));
        }
        self.suspension = Suspension::Suspended;
        if self.world.merged_slot().is_some() {
            self.world.ledger.count(Tally::MergeStoodStill);
        }
        if !durable {
            self.world.ledger.count(Tally::SuspendedNotDurable);
            return Ok(());
        }
        self.world.ledger.count(Tally::Suspended);
        let (now, oldest) = (self.world.tick(), self.oldest_read());
        self.world.model.flush(now, oldest);
        for slot in self
            .world
            .slots
            .iter_mut()
            .filter(|slot| slot.is_attached())
        {
            slot.view.flush(now, oldest);
            slot.volatile.clear();
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Violation> {
        say!(self.world, "resume");
        self.world.ledger.count(match self.suspension {
            Suspension::Suspended => Tally::Resumed,
            _ => Tally::ResumedOnTheWay,
        });
        if self.suspension == Suspension::Suspended && self.world.merged_slot().is_some() {
            self.world.ledger.count(Tally::MergeWentOn);
        }
        self.suspension = Suspension::Running;
        for p in self.pending.values_mut().filter(|p| p.queued) {
            p.queued = false;
            self.world.ledger.count(Tally::QueuedReleased);
        }
        self.volume.resume();
        self.pump()
    }

    // Full stores.

    /// What a full store of this slot means from now on.
    pub(super) fn set_policy(&mut self, index: usize, policy: OnFull) {
        let slot = &mut self.world.slots[index];
        let Some(id) = slot.id else { return };
        slot.on_full.note(policy);
        self.pauses |= policy == OnFull::Pause;
        self.volume.set_on_full(id, policy);
    }

    fn change_policy(&mut self) -> Result<(), Violation> {
        let policy = [OnFull::Invalidate, OnFull::Pause, OnFull::Error];
        let policy = policy[self.world.rng.index(3)];
        let there = |phase| matches!(phase, Phase::Active | Phase::Overflowed | Phase::Creating);
        if let Some(index) = self.pick_slot(there) {
            say!(
                self.world,
                "a full store {index} means {policy:?} from now on"
            );
            let paused = self.paused(index) > 0;
            let merge_waits = self.merge_waits();
            let World { ledger, .. } = &mut *self.world;
            ledger.count(if paused {
                Tally::PolicyChangedPaused
            } else {
                Tally::PolicyChanged
            });
            if paused && merge_waits {
                ledger.count(Tally::MergeRoomByPolicy);
            }
            if self.world.merged_slot().is_some() {
                self.world.ledger.count(Tally::MergePolicyChanged);
            }
            self.set_policy(index, policy);
        }
        self.pump()
    }

    fn extend_one(&mut self) -> Result<(), Violation> {
        match self.pick_slot(|phase| phase != Phase::Absent) {
            Some(index) => self.extend(index),
            None => Ok(()),
        }
    }

    fn extend(&mut self, index: usize) -> Result<(), Violation> {
        let paused = self.paused(index) > 0;
        let merge_waits = self.merge_waits();
        let merging = self.world.merged_slot().is_some();
        let status = self.status(index);
        let World {
            rng, slots, ledger, ..
        } = &mut *self.world;
        let slot = &mut slots[index];
        let Some(id) = slot.id else { return Ok(()) };
        let limit = slot.plan.limit_sectors.max(slot.disk.len() / SECTOR);
        let less = rng.chance(1, 16);
        let more = rng.below(6) * slot.plan.chunk_sectors + rng.below(2);
        let sectors = if less { limit - 1 } else { limit + more };
        let result = self.volume.extend_snapshot(id, sectors * SECTOR);
        let lost = slot.phase == Phase::Invalid || status == Some(Status::Invalid);
        let gone = matches!(slot.phase, Phase::Removing | Phase::Merging);
        let right = match result {
            Ok(()) => !lost && !gone && (!less || slot.hurt),
            Err(ExtendError::Invalid) => lost,
            Err(ExtendError::NoSuchSnapshot) => gone,
            Err(ExtendError::Smaller { .. }) => less,
        };
        if !right {
            return Err(Violation(format!(
                "extending store {index} ({:?}) from {limit} to {sectors} sectors: {result:?}",
                slot.phase
            )));
        }
        ledger.count(match result {
            Ok(()) if paused => Tally::ExtendedPaused,
            Ok(()) => Tally::Extended,
            Err(_) => Tally::ExtendRefused,
        });
        match result {
            Ok(()) if merging && paused && merge_waits => ledger.count(Tally::MergeRoomByExtension),
            Ok(()) if merging => ledger.count(Tally::MergeSiblingExtended),
            Err(_) if slot.phase == Phase::Merging => ledger.count(Tally::MergeExtendRefused),
            _ => {}
        }
        if result.is_ok() {
            slot.on_full
                .extended(slot.exceptions().1 > slot.plan.capacity());
            slot.plan.limit_sectors = limit.max(sectors);
            say!(self.world, "store {index} may grow to {sectors} sectors");
            self.rearm(index);
        }
        self.pump()
    }

    /// The warnings of a store begin anew, at what its status says now.
    pub(super) fn rearm(&mut self, index: usize) {
        let percent = self.percent(index);
        self.world.slots[index].filling = percent;
    }

    /// The last mark that the store has reached, by its status.
    fn percent(&self, index: usize) -> u8 {
        let info = self.world.slots[index]
            .id
            .and_then(|id| self.volume.snapshot_info(id));
        let Some(info) = info else { return 0 };
        let reached =
            |percent: &&u8| 100 * info.allocated_bytes >= u64::from(**percent) * info.limit_bytes;
        [50, 80, 95].iter().rfind(reached).copied().unwrap_or(0)
    }

    pub(super) fn on_filling(&mut self, id: SnapshotId, percent: u8) -> Result<(), Violation> {
        let index = self.known(id)?;
        let slot = &self.world.slots[index];
        if slot.phase == Phase::Removing {
            return Ok(());
        }
        if percent <= slot.filling || percent > self.percent(index) {
            return Err(Violation(format!(
                "store {index} is said to be {percent} % full, after {} % and with {} %",
                slot.filling,
                self.percent(index)
            )));
        }
        self.world.slots[index].filling = percent;
        self.world.ledger.count(Tally::Filling);
        Ok(())
    }

    pub(super) fn on_full(&mut self, id: SnapshotId) -> Result<(), Violation> {
        let index = self.known(id)?;
        let slot = &mut self.world.slots[index];
        let policy = slot.on_full;
        let reason = (slot.may_be_full() || slot.hurt) && (policy.pause || policy.error);
        if slot.phase == Phase::Removing {
            return Ok(());
        }
        if policy.said || !reason {
            return Err(Violation(format!(
                "store {index} is full for no reason, or twice"
            )));
        }
        slot.on_full.said = true;
        self.world.ledger.count(if policy.pause {
            Tally::FullPaused
        } else {
            Tally::FullRefused
        });
        Ok(())
    }

    // The origin.

    fn grow_origin(&mut self) -> Result<(), Violation> {
        self.check_held()?;
        if self.pending.values().any(|p| p.past_end && p.queued) {
            // By the time it is looked at it may not be past the end any more.
            return Ok(());
        }
        let World {
            rng,
            origin,
            origin_sectors,
            model,
            plan,
            ..
        } = &mut *self.world;
        let sectors = *origin_sectors + rng.between(1, 9);
        origin.set_faults(Faults::default());
        let grown = origin.perform(
            Action::Grow {
                to: sectors * SECTOR,
            },
            rng,
        );
        origin.set_faults(plan.faults);
        assert!(grown.is_ok(), "nothing fails without faults");
        *origin_sectors = sectors;
        model.grow(sectors);
        let shown = origin.digest(0);
        for told in &mut self.instants {
            told.held = told.held.map(|_| shown);
        }
        say!(self.world, "the origin has {sectors} sectors");
        if let Err(error) = self.volume.grow_origin(sectors * SECTOR) {
            return Err(Violation(format!("the origin cannot grow: {error}")));
        }
        self.world.ledger.count(Tally::OriginGrown);
        if self.world.merged_slot().is_some() {
            self.world.ledger.count(Tally::MergeOriginGrown);
        }
        self.pump()
    }
}
