//! The disks' side of a process: the operations that the engine hands out, when
//! they end, and the crash that lies in wait for some of them.

use nbdsnap_engine::{Action, Device, OpId};

use super::Violation;
use super::ledger::Tally;
use super::live::Suspension;
use super::requests::{Pending, name};
use super::traffic::Session;
use super::world::{Phase, World, say};
use crate::pattern::SECTOR;
use crate::store_bytes;
use crate::workload::Ambush;

/// What an operation was, for judging its failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sort {
    Read,
    Write,
    Flush,
    Grow,
}

/// A disk operation in a few words.
pub(super) fn brief(action: &Action) -> String {
    let at = |offset: &u64, len: u64| {
        format!(
            "{}.{}+{}.{}",
            offset / SECTOR,
            offset % SECTOR,
            len / SECTOR,
            len % SECTOR
        )
    };
    match action {
        Action::Read { offset, len } => format!("read {}", at(offset, *len)),
        Action::Write { offset, data } => format!(
            "write {}",
            at(offset, data.iter().map(|d| d.len() as u64).sum())
        ),
        Action::WriteZeroes { offset, len, .. } => format!("zero {}", at(offset, *len)),
        Action::Trim { offset, len } => format!("trim {}", at(offset, *len)),
        Action::Flush => "flush".into(),
        Action::Grow { to } => format!("grow to {}", to / SECTOR),
    }
}

/// An operation in flight.
#[derive(Clone, Copy, Debug)]
pub(super) struct InFlight {
    sort: Sort,
    /// It takes its time.
    slow: bool,
}

impl Session<'_> {
    /// 0 for the origin, 1 and up for the slots.
    pub(super) fn disk_index(&self, device: Device) -> Result<usize, Violation> {
        match device {
            Device::Origin => Ok(0),
            Device::Cow(id) => match self.world.slot_of(id) {
                Some(index) => Ok(index + 1),
                None => Err(Violation(format!(
                    "the engine speaks of {device:?}, which does not exist"
                ))),
            },
        }
    }

    /// Let the engine hand out its operations, and hear what it says.
    pub(super) fn pump(&mut self) -> Result<(), Violation> {
        self.listen()?;
        for _ in 0..100_000 {
            let Some(op) = self.volume.poll_disk_op() else {
                self.listen()?;
                return self.check_not_stuck();
            };
            self.listen()?;
            let disk = self.disk_index(op.device)?;
            self.may_begin(disk, &op.action)?;
            self.watch(disk, &op.action);
            let inline = self.world.rng.chance(self.world.plan.inline, 8)
                && !matches!(self.ambush, Some((_, 0)));
            say!(
                self.world,
                "    op {}: disk {disk}: {}{}",
                op.id.0,
                brief(&op.action),
                if inline { ", at once" } else { "" }
            );
            let sort = match op.action {
                Action::Read { .. } => Sort::Read,
                Action::Write { .. } | Action::WriteZeroes { .. } | Action::Trim { .. } => {
                    Sort::Write
                }
                Action::Flush => Sort::Flush,
                Action::Grow { .. } => Sort::Grow,
            };
            let slow = self.world.rng.chance(self.world.plan.lag, 16);
            if self.ops.insert(op.id.0, InFlight { sort, slow }).is_some() {
                return Err(Violation(format!(
                    "operation {} is handed out twice",
                    op.id.0
                )));
            }
            let World {
                origin, slots, rng, ..
            } = &mut *self.world;
            let device = if disk == 0 {
                origin
            } else {
                &mut slots[disk - 1].disk
            };
            device.issue(op.id.0, op.action, rng);
            let last = device.in_flight() - 1;
            if inline {
                self.end_op(disk, last)?;
            }
            self.listen()?;
        }
        Err(Violation("the engine never runs out of operations".into()))
    }

    /// Whether the volume may begin anything there.
    fn may_begin(&self, disk: usize, action: &Action) -> Result<(), Violation> {
        let removed = disk
            .checked_sub(1)
            .is_some_and(|index| self.world.slots[index].phase == Phase::Removing);
        if removed || self.suspension == Suspension::Suspended {
            let why = if removed { "removed" } else { "suspended" };
            return Err(Violation(format!(
                "disk {disk}: {} begins, though it is {why}",
                brief(action)
            )));
        }
        Ok(())
    }

    /// Whether this is what the crash lies in wait for. From then on nothing ends by itself.
    fn watch(&mut self, disk: usize, action: &Action) {
        let wide = self.is_wide_commit(disk, action);
        let merged = disk > 0 && self.world.merged_slot() == Some(disk - 1);
        if wide {
            self.world.ledger.count(if merged {
                Tally::MergeTorn
            } else {
                Tally::WideCommit
            });
        }
        if let (true, Action::Write { offset, .. }) = (merged, action)
            && !store_bytes::is_in_area(*offset, self.world.slots[disk - 1].plan.chunk_sectors)
        {
            self.world.ledger.count(Tally::MergeInPlace);
        }
        let Some((kind, left)) = &mut self.ambush else {
            return;
        };
        let header = |offset: &u64| disk > 0 && *offset == 0;
        let met = match (*kind, action) {
            (
                Ambush::OriginWrite,
                Action::Write { .. } | Action::WriteZeroes { .. } | Action::Trim { .. },
            )
            | (Ambush::OriginFlush, Action::Flush) => disk == 0,
            (Ambush::StoreWrite, Action::Write { .. }) | (Ambush::StoreFlush, Action::Flush) => {
                disk > 0
            }
            (Ambush::WideCommit, _) => wide,
            (Ambush::HeaderWrite, Action::Write { offset, .. }) => header(offset),
            (Ambush::Grow, Action::Grow { .. }) | (Ambush::Any, _) => true,
            _ => false,
        };
        if met {
            *left = left.saturating_sub(1);
        }
    }

    /// Whether this write changes several sectors of an area: a power cut can tear it.
    fn is_wide_commit(&self, disk: usize, action: &Action) -> bool {
        let (Action::Write { offset, data }, Some(slot)) =
            (action, disk.checked_sub(1).map(|i| &self.world.slots[i]))
        else {
            return false;
        };
        if !slot.plan.is_persistent() || !store_bytes::is_in_area(*offset, slot.plan.chunk_sectors)
        {
            return false;
        }
        let new = data.concat();
        let old = &slot.disk.content()[*offset as usize..*offset as usize + new.len()];
        let sector = SECTOR as usize;
        new.chunks(sector)
            .zip(old.chunks(sector))
            .filter(|(new, old)| new != old)
            .count()
            > 1
    }

    /// Where nothing is in flight, nobody may wait.
    fn check_not_stuck(&self) -> Result<(), Violation> {
        if self.in_flight() > 0 {
            return Ok(());
        }
        let held = self.instants.iter().any(|told| told.held.is_some());
        if let Some((id, p)) = self.pending.iter().find(|(_, p)| !self.may_wait(p, held)) {
            return Err(Violation(format!(
                "request {id} ({} {:?}) is stuck: nothing is in flight",
                name(p.slot),
                p.ask
            )));
        }
        if self
            .world
            .slots
            .iter()
            .any(|slot| slot.phase == Phase::Creating)
            && !held
        {
            return Err(Violation(
                "a snapshot's creation is stuck: nothing is in flight".into(),
            ));
        }
        if self.merge_is_stuck() {
            return Err(Violation("the merge is stuck: nothing is in flight".into()));
        }
        if self.closing && self.closed.is_none() {
            return Err(Violation("closing is stuck: nothing is in flight".into()));
        }
        if self
            .world
            .slots
            .iter()
            .any(|slot| slot.phase == Phase::Removing)
        {
            return Err(Violation("a removal is stuck: nothing is in flight".into()));
        }
        if self.suspension == Suspension::Asked {
            return Err(Violation(
                "suspending is stuck: nothing is in flight".into(),
            ));
        }
        let merge_waits = self.merge_may_wait() || self.merge_stands_still();
        let waits = merge_waits || !self.pending.is_empty() || !self.instants.is_empty();
        if !waits && !self.volume.is_idle() {
            return Err(Violation(
                "nothing is in flight, yet the volume is not idle".into(),
            ));
        }
        Ok(())
    }

    /// Whether a request may go unanswered with nothing in flight: it queues in a
    /// suspended volume, it is held for an instant, or it waits for room or for a
    /// write that does. Reads and flushes wait for no room.
    fn may_wait(&self, p: &Pending, held: bool) -> bool {
        let paused = match p.slot {
            None => (0..self.world.slots.len()).any(|index| self.paused(index) > 0),
            Some(index) => self.paused(index) > 0,
        };
        let still = self.suspension == Suspension::Suspended;
        p.queued || (p.changes() && (still || paused || (held && p.slot.is_none())))
    }

    /// Whether a store is growing.
    pub(super) fn is_growing(&self) -> bool {
        self.ops.values().any(|op| op.sort == Sort::Grow)
    }

    /// Operations in flight on all disks, and marks in the list.
    pub(super) fn in_flight(&self) -> usize {
        self.ops.len() + self.marks.len()
    }

    /// One of the operations in flight: its disk and its place there. Slow ones
    /// are mostly passed over, so that there may be none.
    fn pick_op(&mut self) -> Option<(usize, usize)> {
        for _ in 0..4 {
            let (disk, index) = self.pick_any_op()?;
            let World { origin, slots, .. } = &*self.world;
            let device = if disk == 0 {
                origin
            } else {
                &slots[disk - 1].disk
            };
            let slow = self.ops.get(&device.tag(index)).is_some_and(|op| op.slow);
            if !slow || self.world.rng.chance(1, 16) {
                return Some((disk, index));
            }
        }
        None
    }

    fn pick_any_op(&mut self) -> Option<(usize, usize)> {
        let World {
            origin, slots, rng, ..
        } = &mut *self.world;
        if self.ops.is_empty() {
            return None;
        }
        let mut pick = rng.index(self.ops.len());
        for (disk, device) in std::iter::once(&*origin)
            .chain(slots.iter().map(|slot| &slot.disk))
            .enumerate()
        {
            if pick < device.in_flight() {
                return Some((disk, pick));
            }
            pick -= device.in_flight();
        }
        None
    }

    pub(super) fn progress_one(&mut self) {
        if let Some((disk, index)) = self.pick_op() {
            let World {
                origin, slots, rng, ..
            } = &mut *self.world;
            let device = if disk == 0 {
                origin
            } else {
                &mut slots[disk - 1].disk
            };
            device.progress(index, rng);
        }
    }

    pub(super) fn end_one(&mut self) -> Result<(), Violation> {
        if !self.marks.is_empty() && (self.ops.is_empty() || self.world.rng.chance(1, 4)) {
            self.answer_mark();
        } else if let Some((disk, index)) = self.pick_op() {
            self.end_op(disk, index)?;
        }
        self.pump()
    }

    fn end_op(&mut self, disk: usize, index: usize) -> Result<(), Violation> {
        let World {
            origin,
            slots,
            rng,
            ledger,
            origin_hurt,
            ..
        } = &mut *self.world;
        let device = if disk == 0 {
            origin
        } else {
            &mut slots[disk - 1].disk
        };
        let (tag, outcome) = device.end(index, rng);
        let Some(InFlight { sort, .. }) = self.ops.remove(&tag) else {
            return Err(Violation(format!("operation {tag} ended twice")));
        };
        match (&outcome, sort) {
            (Ok(_), Sort::Grow) => ledger.count(Tally::Grown),
            (Ok(_), _) => {}
            (Err(_), sort) if disk == 0 => {
                match sort {
                    Sort::Read => self.injected.origin_read = true,
                    Sort::Flush => {
                        ledger.count(Tally::OriginFlushFailed);
                        self.injected.origin_flush = true;
                    }
                    _ => self.injected.origin_write = true,
                }
                *origin_hurt = true;
            }
            (Err(_), _) => {
                self.injected.store = true;
                slots[disk - 1].hurt = true;
            }
        }
        say!(
            self.world,
            "    op {tag}: ended{}",
            if outcome.is_ok() {
                ""
            } else {
                " with an injected error"
            }
        );
        self.volume.handle_completion(OpId(tag), outcome);
        self.listen()
    }

    /// End everything that is in flight, in any order.
    pub(super) fn settle(&mut self) -> Result<(), Violation> {
        self.pump()?;
        while self.in_flight() > 0 {
            self.end_one()?;
        }
        self.compare_status()
    }
}
