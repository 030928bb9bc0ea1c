//! One process: a volume under traffic, from its start to the crash that ends it.

use std::collections::BTreeMap;

use nbdsnap_engine::{SnapshotId, Status, Store, Volume, VolumeConfig};

use super::ledger::Tally;
use super::live::{Suspension, Told};
use super::operations::InFlight;
use super::recovery::Made;
use super::requests::Pending;
use super::world::{Phase, World, say};
use super::{Checks, Violation};
use crate::model::ViewModel;
use crate::pattern::SECTOR;
use crate::store_bytes;
use crate::workload::{Ambush, Ask, Plan};

/// Errors that were injected in this process.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Injected {
    pub(super) origin_read: bool,
    pub(super) origin_write: bool,
    pub(super) origin_flush: bool,
    /// On any store.
    pub(super) store: bool,
}

/// A volume and its clients.
pub(super) struct Session<'w> {
    pub(super) world: &'w mut World,
    pub(super) volume: Volume,
    pub(super) pending: BTreeMap<u64, Pending>,
    pub(super) next_id: u64,
    pub(super) injected: Injected,
    /// The merge was told to rest.
    pub(super) merge_suspended: bool,
    pub(super) closing: bool,
    pub(super) closed: Option<bool>,
    /// What operations in flight are about, by their tag.
    pub(super) ops: BTreeMap<u64, InFlight>,
    /// The crash comes after this many more operations of this kind.
    pub(super) ambush: Option<(Ambush, u64)>,
    pub(super) suspension: Suspension,
    /// Instants that were begun and not taken, in order.
    pub(super) instants: Vec<Told>,
    /// Snapshots that are lost, and whose marks in the list are under way.
    pub(super) marks: Vec<SnapshotId>,
    /// A snapshot was removed in this process.
    pub(super) removed_any: bool,
    /// A full store has meant in this process that writes wait, whoever has it by now.
    pub(super) pauses: bool,
}

impl<'w> Session<'w> {
    /// A volume without snapshots.
    pub(super) fn new(world: &'w mut World, checks: Checks) -> Self {
        let config = VolumeConfig {
            origin_bytes: world.origin_sectors * SECTOR,
            copy_memory: world.plan.copy_memory,
            copy_piece: world.plan.copy_piece,
        };
        let mut volume = checks.volume(config);
        volume.set_window(world.plan.window);
        volume.set_merge_step(world.plan.merge_step);
        Self {
            world,
            volume,
            pending: BTreeMap::new(),
            next_id: 0,
            injected: Injected::default(),
            merge_suspended: false,
            closing: false,
            closed: None,
            ops: BTreeMap::new(),
            ambush: None,
            suspension: Suspension::Running,
            instants: Vec::new(),
            marks: Vec::new(),
            removed_any: false,
            pauses: false,
        }
    }

    /// Take in the snapshot of a store that was opened.
    pub(super) fn attach(&mut self, index: usize, store: Store) {
        if self.world.take_merge_up(index, &store) {
            return self.attach_merging(index, store);
        }
        let id = self.volume.attach_snapshot(store);
        say!(self.world, "  store {index} is snapshot {}", id.0);
        self.world.slots[index].id = Some(id);
        self.set_policy(index, self.world.slots[index].plan.on_full);
        self.rearm(index);
    }

    /// Order a snapshot into the store of a slot.
    pub(super) fn create(&mut self, index: usize, store: Store) -> Result<(), Violation> {
        self.world.ledger.count(Tally::CreateBegun);
        let id = self.volume.create_snapshot(store);
        say!(self.world, "create snapshot {} in store {index}", id.0);
        self.note_creation(index, id);
        self.pump()
    }

    /// A snapshot was ordered.
    pub(super) fn note_creation(&mut self, index: usize, id: SnapshotId) {
        let now = self.world.tick();
        let sectors = self.world.origin_sectors;
        let writes = self
            .pending
            .values()
            .filter(|p| p.slot.is_none() && p.writes())
            .count();
        let slot = &mut self.world.slots[index];
        slot.clear();
        slot.id = Some(id);
        slot.phase = Phase::Creating;
        slot.traffic_at_creation = writes;
        slot.created_at = now;
        slot.begin_view(ViewModel::new(0, |_| 0), sectors);
        self.set_policy(index, self.world.slots[index].plan.on_full);
        self.rearm(index);
    }

    /// Traffic until the crash.
    pub(super) fn traffic(&mut self, checks: Checks) -> Result<Option<usize>, Violation> {
        self.world.set_faults(self.world.plan.faults);
        let World {
            rng,
            plan,
            slots,
            origin_sectors,
            ..
        } = &mut *self.world;
        if rng.chance(plan.ambush, 8) {
            let kind = if rng.chance(plan.tears, 8) {
                Ambush::WideCommit
            } else {
                Ambush::pick(rng)
            };
            let often = kind != Ambush::WideCommit;
            self.ambush = Some((
                kind,
                1 + if often {
                    rng.below(4) * rng.below(4)
                } else {
                    0
                },
            ));
        }
        let storm = rng
            .chance(plan.storms, 8)
            .then(|| Plan::storm(*origin_sectors, slots[0].plan.chunk_sectors, rng));
        if let Some(mut cells) = storm {
            let slot = self.pick_view();
            cells.to = cells.to.min(self.world.cells_of(slot).to);
            cells.from = cells.from.min(cells.to);
            self.hand_in(slot, cells, Ask::Write { fua: false })?;
            self.pump()?;
        }
        let World { rng, plan, .. } = &mut *self.world;
        let steps = rng.between(1, plan.steps);
        let pressure = plan.pressure;
        for _ in 0..steps {
            if self.world.rng.chance(self.world.plan.merges, 64) {
                self.meddle_with_merge()?;
            }
            self.live_step()?;
            let there = self.world.slots.iter().filter(|slot| slot.is_attached());
            if there.count() == 16 {
                self.world.ledger.count(Tally::Sixteen);
            }
            match self.world.rng.below(64) {
                n if n < pressure => self.burst()?,
                0..50 => self.end_one()?,
                50..58 => self.progress_one(),
                58 => self.settle()?,
                59 => self.compare_map()?,
                60 => self.compare_status()?,
                61 => {
                    let slot = self.pick_view();
                    let cells = self.world.cells_of(slot);
                    self.hand_in(slot, cells, Ask::Read)?;
                }
                _ => {
                    if let Some(index) = self.create_somewhere(checks)? {
                        return Ok(Some(index));
                    }
                }
            }
            if matches!(self.ambush, Some((_, 0))) {
                break;
            }
        }
        Ok(None)
    }

    /// Order a snapshot, if a store is free, or several at one instant. The slot,
    /// if the power failed while its store was made.
    fn create_somewhere(&mut self, checks: Checks) -> Result<Option<usize>, Violation> {
        let slots = &self.world.slots;
        let another = slots.iter().any(|slot| slot.phase == Phase::Creating);
        if self.world.merging.is_some() {
            return Ok(None);
        }
        if self.closing || (another && self.world.rng.chance(1, 2)) {
            return Ok(None);
        }
        let together = self.world.plan.live > 0 && self.world.rng.chance(1, 2);
        let most = if together {
            self.world.rng.between(1, 4)
        } else {
            1
        };
        let mut made = Vec::new();
        while made.len() < most as usize {
            let slots = &self.world.slots;
            let free: Vec<usize> = (0..slots.len())
                .filter(|&i| slots[i].phase == Phase::Absent)
                .filter(|i| made.iter().all(|(other, _)| other != i))
                .collect();
            if free.is_empty() {
                break;
            }
            let index = free[self.world.rng.index(free.len())];
            match self.make_store(index, checks)? {
                Some(store) => made.push((index, store)),
                None => return Ok(Some(index)),
            }
        }
        if another && !made.is_empty() {
            self.world.ledger.count(Tally::CreatedTogether);
        }
        if together && !made.is_empty() {
            self.begin_instant(made)?;
            return Ok(None);
        }
        for (index, store) in made {
            self.create(index, store)?;
            if self.world.rng.chance(1, 6) {
                return self.create_somewhere(checks);
            }
        }
        Ok(None)
    }

    /// Make the store of a slot; none if the power failed meanwhile.
    fn make_store(&mut self, index: usize, checks: Checks) -> Result<Option<Store>, Violation> {
        let sectors = self.world.origin_sectors;
        let slot = &mut self.world.slots[index];
        slot.sectors = sectors;
        slot.disk
            .set_faults(nbdsnap_engine::disk::sim::Faults::default());
        slot.was_blank = !slot.was_removed
            && store_bytes::exceptions(slot.disk.content(), slot.plan.chunk_sectors).is_none();
        let fails = self.world.crashes_left > 0 && self.world.rng.chance(1, 6);
        let steps = fails.then(|| self.world.rng.below(6));
        match self.world.create_store(index, checks, steps)? {
            Made::Store(store) => {
                let faults = self.world.plan.faults;
                self.world.slots[index].disk.set_faults(faults);
                Ok(Some(store))
            }
            Made::PowerFailed => Ok(None),
            Made::Refused(why) => Err(Violation(format!("store {index} cannot be made: {why}"))),
        }
    }

    /// A few requests handed in together.
    pub(super) fn burst(&mut self) -> Result<(), Violation> {
        let count = self.world.rng.between(1, self.world.plan.burst);
        for _ in 0..count {
            if self.pending.len() >= self.world.plan.depth {
                break;
            }
            let slot = self.pick_view();
            let slots = &self.world.slots;
            let grid = slot.unwrap_or_else(|| self.world.rng.index(slots.len()));
            let chunk = self.world.slots[grid].plan.chunk_sectors;
            let sectors = self.world.sectors_of(slot);
            let World { plan, rng, .. } = &mut *self.world;
            let (cells, ask) = plan.request(sectors, chunk, rng);
            if !self.around_the_queue(slot, cells, ask)? {
                self.hand_in(slot, cells, ask)?;
            }
        }
        self.pump()
    }

    /// The volume is closed in order.
    pub(super) fn close(&mut self) -> Result<(), Violation> {
        say!(self.world, "close");
        self.closing = true;
        self.suspension = Suspension::Running;
        self.volume.close();
        self.pump()?;
        let cells = self.world.cells_of(None);
        for ask in [Ask::Read, Ask::Flush] {
            if self.world.rng.chance(1, 4) {
                self.hand_in(None, cells, ask)?;
                self.pump()?;
            }
        }
        while self.in_flight() > 0 {
            self.end_one()?;
        }
        self.world.ledger.count(Tally::Closed);
        Ok(())
    }

    /// Take everything that the engine has to say.
    pub(super) fn listen(&mut self) -> Result<(), Violation> {
        loop {
            if let Some(reply) = self.volume.poll_reply() {
                self.on_reply(reply)?;
            } else if let Some(event) = self.volume.poll_event() {
                self.on_event(&event)?;
            } else {
                return Ok(());
            }
        }
    }

    /// What the engine says of a snapshot.
    pub(super) fn status(&self, index: usize) -> Option<Status> {
        self.world.slots[index]
            .id
            .and_then(|id| self.volume.status(id))
    }
}
