//! What the engine may answer: every reply and event is held against the model
//! and against the errors that were injected.

use nbdsnap_engine::{Event, Failure, Reply, SnapshotId, Status};

use super::Violation;
use super::ledger::Tally;
use super::requests::{Pending, name};
use super::traffic::Session;
use super::world::{Has, Phase, World, say};
use crate::model::{End, Part, Time, ViewModel};
use crate::pattern::{self, Cells};
use crate::store_bytes;
use crate::workload::Ask;

impl Session<'_> {
    pub(super) fn view_model(&mut self, slot: Option<usize>) -> &mut ViewModel {
        match slot {
            None => &mut self.world.model,
            Some(index) => &mut self.world.slots[index].view,
        }
    }

    /// When the oldest read that is in flight was handed in.
    pub(super) fn oldest_read(&self) -> Time {
        self.pending
            .values()
            .filter(|p| p.ask == Ask::Read)
            .map(|p| p.issued)
            .min()
            .unwrap_or(Time::MAX)
    }

    /// Compare what a read showed with the model.
    pub(super) fn compare(
        &mut self,
        slot: Option<usize>,
        cells: Cells,
        issued: Time,
        now: Time,
        found: &[u8],
    ) -> Result<(), Violation> {
        self.view_model(slot)
            .read(cells, issued, now, found)
            .map_err(|wrong| {
                self.world.violation(
                    &format!("a read of the {} handed in at {issued}", name(slot)),
                    &wrong,
                )
            })
    }

    pub(super) fn on_reply(&mut self, reply: Reply) -> Result<(), Violation> {
        let id = reply.id.0;
        let Some(p) = self.pending.remove(&id) else {
            return Err(Violation(format!(
                "request {id} is answered, but was not asked or was answered before"
            )));
        };
        let now = self.world.tick();
        let told = reply
            .result
            .as_ref()
            .map(|pieces| pieces.iter().map(bytes::Bytes::len).sum::<usize>());
        say!(self.world, "[{now}] reply {id}: {told:?}");
        match reply.result {
            Err(failure) => self.on_failure(id, &p, failure, now),
            Ok(pieces) => self.on_success(id, &p, &pieces.concat(), now),
        }
    }

    fn on_success(
        &mut self,
        id: u64,
        p: &Pending,
        data: &[u8],
        now: Time,
    ) -> Result<(), Violation> {
        let who = format!("request {id} ({} {:?})", name(p.slot), p.ask);
        if p.orphan || p.queued || p.phase == Phase::Removing {
            return Err(Violation(format!(
                "{who} succeeded, though its snapshot was removed or the volume suspended"
            )));
        }
        if p.closing || p.past_end {
            return Err(Violation(format!(
                "{who} succeeded, though it was {}",
                if p.closing {
                    "handed in after close"
                } else {
                    "past the end"
                }
            )));
        }
        let empty = p.ask != Ask::Flush && p.cells.from == p.cells.to;
        let lost = p.phase == Phase::Invalid && !matches!(p.ask, Ask::Flush | Ask::Trim { .. });
        let full = p.phase == Phase::Overflowed && p.writes();
        if (lost || full) && !empty {
            return Err(Violation(format!(
                "{who} succeeded, though the snapshot was known to be {:?}",
                p.phase
            )));
        }
        let durable = p.fua() || p.ask == Ask::Flush;
        if p.slot.is_none() && p.after_failed_flush && durable && !empty {
            return Err(Violation(format!(
                "{who} succeeded after a flush of the origin had failed"
            )));
        }
        match p.ask {
            Ask::Read if data.len() as u64 != p.cells.len_bytes() => {
                return Err(Violation(format!(
                    "{who} brought {} bytes of {}",
                    data.len(),
                    p.cells.len_bytes()
                )));
            }
            Ask::Read => self.compare(p.slot, p.cells, p.issued, now, data)?,
            Ask::Flush => {
                let oldest = self.oldest_read();
                self.view_model(p.slot).flush(p.issued, oldest);
                if let Some(index) = p.slot {
                    self.world.slots[index].volatile.clear();
                }
            }
            _ => self.end_change(p, now, if p.fua() { End::Durable } else { End::Done }),
        }
        if p.ask != Ask::Read && !data.is_empty() {
            return Err(Violation(format!("{who} brought bytes")));
        }
        Ok(())
    }

    /// A request that changes a view was answered: tell the model.
    pub(super) fn end_change(&mut self, p: &Pending, now: Time, end: End) {
        let trim = matches!(p.ask, Ask::Trim { .. });
        self.view_model(p.slot)
            .end_write(p.cells, p.issued, now, end, !trim);
        if trim && p.slot.is_none() && p.cells.from < p.cells.to && end != End::Failed {
            let (from, len) = (p.cells.offset() as usize, p.cells.len_bytes() as usize);
            let zero = pattern::matches(
                pattern::ZERO,
                0,
                &self.world.origin.content()[from..from + len],
            );
            self.world.ledger.count(if zero {
                Tally::TrimActed
            } else {
                Tally::TrimIgnored
            });
        }
        if !p.writes() || matches!(end, End::Failed | End::Refused) {
            return;
        }
        let merging = p.slot.is_none() && self.world.merged_slot().is_some();
        let World { slots, ledger, .. } = &mut *self.world;
        for (index, slot) in slots.iter_mut().enumerate() {
            let concerned = p.slot.map_or(slot.is_attached(), |own| own == index);
            if !concerned || p.inside & 1 << index != 0 {
                continue;
            }
            for chunk in slot.chunks(p.cells) {
                let has = &mut slot.has[chunk as usize];
                if merging {
                    // The write may lie in the merging store.
                    continue;
                }
                if slot.phase == Phase::Invalid {
                    slot.doomed |= *has == Has::No && p.slot.is_none() && slot.plan.is_persistent();
                } else {
                    *has = Has::Yes;
                }
            }
            let count = slot.exceptions().0;
            if slot.phase != Phase::Invalid && slot.plan.is_persistent() && count > slot.counted {
                let entries = store_bytes::area_entries(slot.plan.chunk_sectors);
                if count / 32 > slot.counted / 32 {
                    ledger.count(Tally::AreaSectorCrossed);
                }
                if count / entries > slot.counted / entries {
                    ledger.count(Tally::AreaFilled);
                }
                slot.counted = count;
            }
        }
    }

    fn on_failure(
        &mut self,
        id: u64,
        p: &Pending,
        failure: Failure,
        now: Time,
    ) -> Result<(), Violation> {
        let who = format!("request {id} ({} {:?})", name(p.slot), p.ask);
        let verdict = self.why_failed(p, failure);
        let Some(tally) = verdict else {
            return Err(Violation(format!(
                "{who} failed with {failure:?}, for no reason"
            )));
        };
        self.world.ledger.count(tally);
        if p.changes() && !p.past_end && !p.orphan {
            let refused = match failure {
                Failure::NotSupported | Failure::NoSuchView => true,
                // What was paused may have begun.
                Failure::ShuttingDown => p.closing || p.queued,
                _ => false,
            };
            self.end_change(p, now, if refused { End::Refused } else { End::Failed });
        }
        Ok(())
    }

    /// The reason there is for a failure, if there is one.
    fn why_failed(&mut self, p: &Pending, failure: Failure) -> Option<Tally> {
        match failure {
            Failure::ShuttingDown if p.closing => Some(Tally::RefusedClosing),
            Failure::ShuttingDown if self.closing && p.queued => Some(Tally::QueuedRefused),
            Failure::ShuttingDown => {
                let pausing = self.world.slots.iter().any(|slot| slot.on_full.pause);
                (self.closing && p.changes() && pausing).then_some(Tally::PausedRefused)
            }
            Failure::PastEnd => (p.past_end && p.changes() && !matches!(p.ask, Ask::Trim { .. }))
                .then_some(Tally::PastEnd),
            Failure::Invalid => (p.past_end && matches!(p.ask, Ask::Read | Ask::Trim { .. }))
                .then_some(Tally::PastEnd),
            Failure::NotSupported => matches!(
                p.ask,
                Ask::Zero {
                    fast_only: true,
                    ..
                }
            )
            .then_some(Tally::FastOnlyRefused),
            Failure::NoSuchView => {
                let slot = p.slot.map(|index| &self.world.slots[index]);
                let removed = slot.is_some_and(|slot| slot.phase == Phase::Removing);
                // Or it was handed in while its merge was beginning.
                let merging = p.slot.is_some() && p.slot == self.world.merging.map(|m| m.slot);
                let removed = (p.orphan || removed).then_some(Tally::RemovedRefused);
                removed.or_else(|| merging.then_some(Tally::HeldByMerge))
            }
            Failure::NoSpace => {
                let refuses = |index: usize| {
                    let slot = &self.world.slots[index];
                    slot.on_full.error && (slot.may_be_full() || slot.hurt)
                };
                if p.writes() && p.slot.is_some_and(|index| self.merge_ends_pause(index)) {
                    return Some(Tally::MergeEndsPause);
                }
                let found = match p.slot {
                    Some(index) => refuses(index),
                    // The snapshot that refused may be gone by the time of the answer.
                    None => (0..self.world.slots.len()).any(refuses) || self.removed_any,
                };
                (p.writes() && found).then_some(Tally::NoSpaceRefused)
            }
            Failure::Io => self.why_io(p),
        }
    }

    fn why_io(&mut self, p: &Pending) -> Option<Tally> {
        let Some(index) = p.slot else {
            if self.world.merged_slot().is_some() && self.injected.store {
                return Some(Tally::FailedByError);
            }
            let durable = p.fua() || p.ask == Ask::Flush;
            if durable && self.injected.origin_flush {
                return Some(if p.after_failed_flush {
                    Tally::FlushLatched
                } else {
                    Tally::FailedByError
                });
            }
            let hit = match p.ask {
                Ask::Read => self.injected.origin_read,
                Ask::Flush => false,
                // A header that cannot be marked invalid stops the write that would break the snapshot.
                _ => self.injected.origin_write || self.injected.store,
            };
            return hit.then_some(Tally::FailedByError);
        };
        let status = self.status(index);
        let slot = &self.world.slots[index];
        let full = slot.may_be_full();
        let hurt = slot.hurt || self.world.origin_hurt;
        match status {
            _ if slot.phase == Phase::Removing => Some(Tally::FailedByRemoval),
            Some(Status::Invalid) if slot.phase == Phase::Invalid => Some(Tally::InvalidRefused),
            Some(Status::Invalid) if hurt => Some(Tally::FailedByError),
            Some(Status::Invalid) if full && p.writes() && p.phase == Phase::Active => {
                Some(Tally::InvalidBySnapshotWrite)
            }
            Some(Status::Invalid) if full => Some(Tally::InvalidRefused),
            Some(Status::Overflow) if p.writes() && full => Some(Tally::OverflowRefused),
            _ => (hurt).then_some(Tally::FailedByError),
        }
    }

    pub(super) fn on_event(&mut self, event: &Event) -> Result<(), Violation> {
        say!(self.world, "event: {event:?}");
        match *event {
            Event::Created(id) => self.on_created(id),
            Event::CreateFailed(id) => {
                let index = self.known(id)?;
                let hurt = self.world.origin_hurt || self.injected.origin_flush;
                if self.world.slots[index].phase != Phase::Creating || !(hurt || self.closing) {
                    return Err(Violation(format!("{event:?} for no reason")));
                }
                self.world.slots[index].clear();
                Ok(())
            }
            Event::Invalid(id, why) | Event::Unmarked(id, why) => {
                self.on_invalid(id, why, matches!(event, Event::Unmarked(..)))
            }
            Event::MarkLost(id, _) => self.on_mark_wanted(id),
            Event::MergeProgress(id, percent) => self.on_merge_progress(id, percent),
            Event::Overflow(id) => {
                let index = self.known(id)?;
                let slot = &mut self.world.slots[index];
                let po = slot.plan.kind == nbdsnap_engine::StoreKind::PersistentOverflow;
                if slot.phase == Phase::Removing {
                    return Ok(());
                }
                if !po
                    || !slot.on_full.invalidate
                    || slot.phase != Phase::Active
                    || !(slot.may_be_full() || slot.hurt)
                {
                    return Err(Violation(format!("store {index}: {event:?} for no reason")));
                }
                slot.phase = Phase::Overflowed;
                self.world.ledger.count(Tally::Overflow);
                Ok(())
            }
            Event::MergeBegun(id) => self.on_merge_begun(id),
            Event::Merged(id) => self.on_merged(id),
            Event::MergeFailed(id, why) => self.on_merge_failed(id, why),
            Event::Filling(id, percent) => self.on_filling(id, percent),
            Event::Full(id) => self.on_full(id),
            Event::Held(id) => self.on_held(id),
            Event::InstantFailed(id) => self.on_instant_failed(id),
            Event::Removed(id) => self.on_removed(id),
            Event::Suspended(durable) => self.on_suspended(durable),
            Event::Closed(well) => {
                if !self.closing || self.closed.is_some() || !self.pending.is_empty() {
                    return Err(Violation(
                        "closed before everything was answered, or unasked".into(),
                    ));
                }
                if !(well || self.world.origin_hurt || self.injected.store) {
                    return Err(Violation("closing failed for no reason".into()));
                }
                self.closed = Some(well);
                if well {
                    let now = self.world.tick();
                    self.world.model.close(now);
                    for slot in &mut self.world.slots {
                        slot.view.close(now);
                    }
                }
                Ok(())
            }
        }
    }

    pub(super) fn known(&self, id: SnapshotId) -> Result<usize, Violation> {
        self.world
            .slot_of(id)
            .ok_or_else(|| Violation(format!("an event about {id:?}, which does not exist")))
    }

    fn on_created(&mut self, id: SnapshotId) -> Result<(), Violation> {
        let index = self.known(id)?;
        let now = self.world.tick();
        let found = self.world.origin.content().to_vec();
        let frozen = match self.world.model.freeze(now, &found) {
            Ok(frozen) => frozen,
            Err(wrong) => {
                return Err(self
                    .world
                    .violation("the origin at the instant of a snapshot", &wrong));
            }
        };
        let mut writes = Vec::new();
        let mut torn = 0;
        let pausing = self.pauses;
        let window = self.world.plan.window;
        let torn_by_pause = |p: &Pending| pausing && p.cells.len_bytes() > window;
        for (request, p) in &mut self
            .pending
            .iter_mut()
            .filter(|(_, p)| p.slot.is_none() && p.writes())
        {
            if p.stamp == pattern::ZERO {
                // Zeros do not say whose they are: it may be in or out.
                p.inside |= 1 << index;
                writes.push((p.cells, p.issued));
                continue;
            }
            match self
                .world
                .model
                .part_in(&frozen, p.cells, p.stamp, p.issued)
            {
                Part::Nothing => {
                    p.inside &= !(1 << index);
                    writes.push((p.cells, p.issued));
                }
                Part::All => p.inside |= 1 << index,
                Part::Torn if torn_by_pause(p) => {
                    torn += 1;
                    p.inside |= 1 << index;
                    writes.push((p.cells, p.issued));
                }
                Part::Torn => {
                    return Err(Violation(format!(
                        "the snapshot in store {index} shows a part of request {request}"
                    )));
                }
            }
        }
        let World {
            slots,
            ledger,
            origin_sectors,
            ..
        } = &mut *self.world;
        let slot = &mut slots[index];
        if slot.phase != Phase::Creating {
            return Err(Violation(format!("store {index} is created twice")));
        }
        slot.begin_view(frozen, *origin_sectors);
        slot.phase = Phase::Active;
        for _ in 0..torn {
            ledger.count(Tally::TornByPause);
        }
        let held = writes
            .iter()
            .filter(|(_, issued)| *issued > slot.created_at)
            .count();
        let earlier = writes.len() - held;
        if held > 0 {
            ledger.count(Tally::HeldByCreation);
        }
        if slot.traffic_at_creation > earlier {
            ledger.count(Tally::DrainedByCreation);
        }
        let quiet = held == 0 && slot.traffic_at_creation == 0;
        ledger.count(if quiet {
            Tally::CreatedEmptyHanded
        } else {
            Tally::Created
        });
        if !slot.plan.is_persistent() {
            ledger.count(Tally::TransientCreated);
        }
        for (cells, _) in writes {
            for chunk in slot.chunks(cells) {
                slot.has[chunk as usize] = Has::Maybe;
            }
        }
        Ok(())
    }

    fn on_invalid(&mut self, id: SnapshotId, why: &str, unmarked: bool) -> Result<(), Violation> {
        let index = self.known(id)?;
        let origin_writes = self
            .pending
            .values()
            .any(|p| p.slot.is_none() && p.writes());
        let merging = self.world.merged_slot().is_some();
        let World {
            slots,
            ledger,
            origin_hurt,
            ..
        } = &mut *self.world;
        let slot = &mut slots[index];
        let hurt = slot.hurt || *origin_hurt;
        if slot.phase == Phase::Removing {
            // It was said before the removal, and is heard after it.
            return Ok(());
        }
        if !matches!(slot.phase, Phase::Active | Phase::Overflowed)
            || !(hurt || (slot.may_be_full() && slot.on_full.invalidate))
            || (unmarked && !slot.hurt)
        {
            return Err(Violation(format!(
                "store {index} is invalid ({why}) for no reason, or twice"
            )));
        }
        if unmarked {
            ledger.count(Tally::Unmarked);
        } else if hurt {
            ledger.count(Tally::InvalidByError);
        } else if origin_writes {
            ledger.count(Tally::InvalidByFull);
        } else if merging {
            ledger.count(Tally::MergeSiblingLost);
        }
        slot.phase = Phase::Invalid;
        Ok(())
    }

    /// Hold the status of every snapshot against a count of its exceptions.
    pub(super) fn compare_status(&mut self) -> Result<(), Violation> {
        if self.in_flight() > 0 || !self.pending.is_empty() {
            return Ok(());
        }
        for index in 0..self.world.slots.len() {
            let status = self.status(index);
            let slot = &self.world.slots[index];
            let wrong = match (slot.phase, status) {
                (Phase::Absent | Phase::Removing, None)
                | (Phase::Creating, Some(Status::Active { .. }))
                | (Phase::Invalid, Some(Status::Invalid))
                | (Phase::Overflowed, Some(Status::Overflow)) => false,
                (
                    Phase::Active,
                    Some(Status::Active {
                        allocated,
                        total,
                        metadata,
                    }),
                ) => !self.status_is_right(index, allocated, total, metadata),
                (Phase::Merging, Some(status)) => !self.merge_status_is_right(index, status),
                _ => true,
            };
            if wrong {
                let (least, most) = slot.exceptions();
                let phase = slot.phase;
                return Err(Violation(format!(
                    "store {index} is {phase:?} with {least} to {most} exceptions, and its status {status:?}"
                )));
            }
            self.world.ledger.count(Tally::Status);
        }
        Ok(())
    }

    fn status_is_right(&self, index: usize, allocated: u64, total: u64, metadata: u64) -> bool {
        let slot = &self.world.slots[index];
        let chunk = slot.plan.chunk_sectors;
        let (least, most) = slot.exceptions();
        let limit = slot
            .plan
            .limit_sectors
            .max(slot.disk.len() / pattern::SECTOR);
        // Growth that failed is not tried again: the store is as large as it will be.
        (total == limit || (slot.hurt && total < limit))
            && (least..=most).any(|n| {
                if slot.plan.is_persistent() {
                    let areas = n / store_bytes::area_entries(chunk) + 1;
                    allocated == store_bytes::chunks_for(n, chunk) * chunk
                        && metadata == (areas + 1) * chunk
                } else {
                    allocated == n * chunk && metadata == 0
                }
            })
    }

    /// Compare a view with what its map says, if nothing is going on.
    pub(super) fn compare_map(&mut self) -> Result<(), Violation> {
        if self.in_flight() > 0 || !self.pending.is_empty() || self.closing {
            return Ok(());
        }
        for index in 0..=self.world.slots.len() {
            let slot = index.checked_sub(1);
            let view = match slot {
                None => nbdsnap_engine::View::Origin,
                Some(i) => match (self.world.slots[i].phase, self.world.slots[i].id) {
                    (Phase::Active | Phase::Overflowed, Some(id)) => {
                        nbdsnap_engine::View::Snapshot(id)
                    }
                    _ => continue,
                },
            };
            let cells = self.world.cells_of(slot);
            let extents = match self.volume.map(view, 0, cells.len_bytes(), usize::MAX) {
                Ok(extents) => extents,
                Err(failure) => {
                    return Err(Violation(format!("{}: no map: {failure:?}", name(slot))));
                }
            };
            let found = self.peek(&extents)?;
            if found.len() as u64 != cells.len_bytes() {
                return Err(Violation(format!(
                    "{}: the map covers {} bytes",
                    name(slot),
                    found.len()
                )));
            }
            let issued = self.world.tick();
            let now = self.world.tick();
            self.compare(slot, cells, issued, now, &found)?;
            self.world.ledger.count(Tally::Mapped);
        }
        Ok(())
    }
}
