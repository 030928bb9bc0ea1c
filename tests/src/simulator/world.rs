//! What outlives a process: the disks, the model of what they may hold, and the
//! count of what was met. Crashes happen to it.

use std::collections::BTreeSet;

use nbdsnap_engine::disk::sim::{Faults, Loss, Rng, SimDisk};
use nbdsnap_engine::{OnFull, SnapshotId};

use super::Violation;
use super::ledger::{Ledger, Tally};
use super::merging::Merging;
use crate::model::{Crash, Time, ViewModel};
use crate::pattern::{self, CELLS, Cells, SECTOR, Stamp};
use crate::store_bytes;
use crate::workload::{Beginning, Plan, StorePlan};

/// Prints a step where the run is to be told.
macro_rules! say {
    ($world:expr, $($text:tt)*) => {
        if $world.told {
            println!($($text)*);
        }
    };
}
pub(super) use say;

/// Where a store stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// There is no snapshot in it.
    Absent,
    /// A snapshot was ordered and not announced yet.
    Creating,
    /// A snapshot that can be read and written.
    Active,
    /// A PO snapshot that has met the end of its store: it can be read.
    Overflowed,
    /// A snapshot that is lost.
    Invalid,
    /// No snapshot any more, but a part of the origin, which is being merged.
    Merging,
    /// A snapshot that was removed: the store is no snapshot of this origin any
    /// more, whatever happens.
    Removing,
}

/// What a full store has meant since the snapshot was attached.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct FullPolicy {
    pub(super) invalidate: bool,
    pub(super) pause: bool,
    pub(super) error: bool,
    /// What it means now.
    pub(super) current: OnFull,
    /// It may have been full before it was extended.
    pub(super) was_full: bool,
    /// It was said to be full since it was extended last.
    pub(super) said: bool,
}

impl FullPolicy {
    pub(super) fn note(&mut self, policy: OnFull) {
        self.current = policy;
        match policy {
            OnFull::Invalidate => self.invalidate = true,
            OnFull::Pause => self.pause = true,
            OnFull::Error => self.error = true,
        }
    }

    pub(super) fn extended(&mut self, was_full: bool) {
        self.was_full |= was_full;
        self.said = false;
    }
}

/// Whether a chunk has an exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Has {
    No,
    /// A request that needs one is unanswered, or failed.
    Maybe,
    Yes,
}

/// A store, its disk and what the model knows of its snapshot.
pub(super) struct Slot {
    pub(super) plan: StorePlan,
    pub(super) disk: SimDisk,
    pub(super) phase: Phase,
    /// Its name in the volume of this process.
    pub(super) id: Option<SnapshotId>,
    pub(super) view: ViewModel,
    /// Sectors of the view; before the instant, those of the origin at the order.
    pub(super) sectors: u64,
    pub(super) on_full: FullPolicy,
    /// The mark that was said last, in percent.
    pub(super) filling: u8,
    /// One a chunk of the origin.
    pub(super) has: Vec<Has>,
    /// Chunks whose exceptions came from the snapshot's own writes and were not flushed since.
    pub(super) volatile: BTreeSet<u64>,
    /// An error was injected that may cost the snapshot.
    pub(super) hurt: bool,
    /// There was a reason to become Invalid before the last crash.
    pub(super) may_be_invalid: bool,
    /// An origin write went out without a copy: no open may find it valid.
    pub(super) doomed: bool,
    /// The list of the origin's stores says that it is lost: it is not opened again.
    pub(super) listed_lost: bool,
    /// Exceptions at the last look, to see boundaries being crossed.
    pub(super) counted: u64,
    /// When its creation began, and how many writes of the origin were unanswered then.
    pub(super) created_at: Time,
    pub(super) traffic_at_creation: usize,
    /// An error was injected in the process that ended last.
    pub(super) lossy: bool,
    /// No store was on the disk before one was made there.
    pub(super) was_blank: bool,
    /// It was left as it is by a removed snapshot: a power cut may bring back what
    /// it held.
    pub(super) was_removed: bool,
}

impl Slot {
    fn new(plan: StorePlan, origin_sectors: u64, disk: SimDisk) -> Self {
        let chunks = origin_sectors.div_ceil(plan.chunk_sectors);
        Self {
            plan,
            disk,
            phase: Phase::Absent,
            id: None,
            view: ViewModel::new(0, |_| 0),
            sectors: origin_sectors,
            on_full: FullPolicy::default(),
            filling: 0,
            has: vec![Has::No; chunks as usize],
            volatile: BTreeSet::new(),
            hurt: false,
            may_be_invalid: false,
            doomed: false,
            listed_lost: false,
            counted: 0,
            created_at: 0,
            traffic_at_creation: 0,
            lossy: false,
            was_blank: false,
            was_removed: false,
        }
    }

    pub(super) fn is_attached(&self) -> bool {
        matches!(
            self.phase,
            Phase::Active | Phase::Overflowed | Phase::Invalid
        )
    }

    /// Exceptions for certain, and at most.
    pub(super) fn exceptions(&self) -> (u64, u64) {
        let yes = self.has.iter().filter(|h| **h == Has::Yes).count() as u64;
        let maybe = self.has.iter().filter(|h| **h == Has::Maybe).count() as u64;
        (yes, yes + maybe)
    }

    /// The chunks of the snapshot that `cells` of the origin or of it touch.
    pub(super) fn chunks(&self, cells: Cells) -> std::ops::Range<u64> {
        let end = self.sectors as usize * CELLS;
        let own = Cells {
            from: cells.from.min(end),
            to: cells.to.min(end),
        };
        own.chunks(self.plan.chunk_bytes())
    }

    /// It has become the snapshot of an origin of `sectors`, with no exceptions.
    pub(super) fn begin_view(&mut self, view: ViewModel, sectors: u64) {
        self.view = view;
        self.sectors = sectors;
        let chunks = sectors.div_ceil(self.plan.chunk_sectors);
        self.has = vec![Has::No; chunks as usize];
    }

    /// Whether more exceptions may have been wanted than fit.
    pub(super) fn may_be_full(&self) -> bool {
        self.on_full.was_full || self.exceptions().1 > self.plan.capacity()
    }

    /// Take the exceptions from the store's bytes, as a crash left them.
    pub(super) fn recount(&mut self) {
        if let Some(old) = store_bytes::exceptions(self.disk.content(), self.plan.chunk_sectors) {
            self.has.fill(Has::No);
            for chunk in &old {
                if let Some(has) = self.has.get_mut(*chunk as usize) {
                    *has = Has::Yes;
                }
            }
            self.counted = old.len() as u64;
        }
        self.volatile.clear();
    }

    /// Forget the snapshot.
    pub(super) fn clear(&mut self) {
        self.phase = Phase::Absent;
        self.id = None;
        self.has.fill(Has::No);
        self.volatile.clear();
        self.hurt = false;
        self.may_be_invalid = false;
        self.doomed = false;
        self.listed_lost = false;
        self.counted = 0;
        self.on_full = FullPolicy::default();
        self.filling = 0;
    }
}

/// The disks, the model and the count.
pub(super) struct World {
    pub(super) rng: Rng,
    pub(super) plan: Plan,
    pub(super) origin: SimDisk,
    pub(super) model: ViewModel,
    /// Sectors of the origin: it grows.
    pub(super) origin_sectors: u64,
    pub(super) slots: Vec<Slot>,
    /// The durable mark of a merge.
    pub(super) merging: Option<Merging>,
    pub(super) clock: Time,
    pub(super) stamp: Stamp,
    pub(super) crashes_left: u64,
    /// An error was injected on the origin since the last start.
    pub(super) origin_hurt: bool,
    /// One was injected in the process that ended last.
    pub(super) lossy: bool,
    pub(super) images: Vec<u64>,
    pub(super) ledger: Ledger,
    /// Print every step.
    pub(super) told: bool,
}

impl World {
    pub(super) fn new(seed: u64, crashes: u64, told: bool) -> Self {
        let mut rng = Rng::new(seed);
        let plan = Plan::pick(&mut rng);
        Self::of_plan(rng, plan, crashes, told)
    }

    pub(super) fn of_plan(rng: Rng, plan: Plan, crashes: u64, told: bool) -> Self {
        if told {
            println!("{plan:#?}");
        }
        let sectors = plan.origin_sectors;
        let mut content = vec![0; (sectors * SECTOR) as usize];
        pattern::fill(1, 0, &mut content);
        let mut world = Self {
            origin: SimDisk::new(content),
            model: ViewModel::new(sectors as usize * CELLS, |_| 1),
            origin_sectors: sectors,
            slots: Vec::new(),
            merging: None,
            clock: 1,
            stamp: 1,
            crashes_left: crashes,
            origin_hurt: false,
            lossy: false,
            images: Vec::new(),
            ledger: Ledger::default(),
            told,
            rng,
            plan,
        };
        for plan in world.plan.stores.clone() {
            world.add_slot(plan);
        }
        world
    }

    /// A store, filled with what a disk that was used before holds, or with a
    /// snapshot that somebody else made.
    fn add_slot(&mut self, plan: StorePlan) {
        let mut content = vec![0; (plan.ready_sectors * SECTOR) as usize];
        match self.rng.below(3) {
            0 => {}
            1 => pattern::fill(u32::MAX, 0, &mut content),
            _ => leave_an_invalid_store(&mut content, plan),
        }
        let Beginning::Preloaded(count) = plan.beginning else {
            self.slots.push(Slot::new(
                plan,
                self.plan.origin_sectors,
                SimDisk::new(content),
            ));
            return;
        };
        let chunks = self.plan.origin_sectors.div_ceil(plan.chunk_sectors);
        let mut old: Vec<u64> = (0..chunks).collect();
        for i in 0..count as usize {
            let j = i + self.rng.index(old.len() - i);
            old.swap(i, j);
        }
        old.truncate(count as usize);
        self.stamp += 1;
        let stamp = self.stamp;
        let origin_bytes = self.plan.origin_sectors * SECTOR;
        store_bytes::write(&mut content, plan.chunk_sectors, &old, |chunk, data| {
            let offset = chunk * plan.chunk_bytes();
            let len = data.len().min((origin_bytes - offset) as usize);
            pattern::fill(stamp, offset, &mut data[..len]);
        });
        let mut slot = Slot::new(plan, self.plan.origin_sectors, SimDisk::new(content));
        slot.phase = Phase::Active;
        let cells_a_chunk = plan.chunk_sectors as usize * CELLS;
        let kept: BTreeSet<u64> = old.iter().copied().collect();
        slot.view = ViewModel::new(self.plan.origin_sectors as usize * CELLS, |cell| {
            if kept.contains(&((cell / cells_a_chunk) as u64)) {
                stamp
            } else {
                1
            }
        });
        slot.recount();
        self.slots.push(slot);
    }

    /// The next moment.
    pub(super) fn tick(&mut self) -> Time {
        self.clock += 1;
        self.clock
    }

    pub(super) fn new_stamp(&mut self) -> Stamp {
        self.stamp += 1;
        self.stamp
    }

    /// Sectors of a view.
    pub(super) fn sectors_of(&self, slot: Option<usize>) -> u64 {
        slot.map_or(self.origin_sectors, |index| self.slots[index].sectors)
    }

    /// All of a view.
    pub(super) fn cells_of(&self, slot: Option<usize>) -> Cells {
        Cells {
            from: 0,
            to: self.sectors_of(slot) as usize * CELLS,
        }
    }

    pub(super) fn slot_of(&self, id: SnapshotId) -> Option<usize> {
        self.slots.iter().position(|slot| slot.id == Some(id))
    }

    /// Let operations fail from now on, or no longer.
    pub(super) fn set_faults(&mut self, faults: Faults) {
        self.origin.set_faults(faults);
        for slot in &mut self.slots {
            slot.disk.set_faults(faults);
        }
    }

    /// The end of a process: what that means for the model, before the disks are looked at.
    fn end_process(&mut self) {
        let mut dropped = 0;
        for slot in &mut self.slots {
            if slot.id.is_none() {
                continue;
            }
            if slot.phase == Phase::Removing {
                slot.clear();
                slot.was_removed = true;
                self.ledger.count(Tally::RemovalCutOff);
                continue;
            }
            if slot.listed_lost {
                slot.clear();
                slot.was_removed = true;
                continue;
            }
            let full = slot.on_full.invalidate && slot.may_be_full();
            slot.may_be_invalid |=
                slot.phase == Phase::Invalid || slot.hurt || self.origin_hurt || full;
            slot.on_full = FullPolicy::default();
            slot.lossy = slot.hurt;
            slot.hurt = false;
            if slot.plan.is_persistent() {
                if slot.phase == Phase::Overflowed {
                    slot.phase = Phase::Active;
                    self.ledger.count(Tally::OverflowReopened);
                }
            } else {
                dropped += u64::from(slot.is_attached());
                slot.clear();
            }
            slot.id = None;
        }
        for _ in 0..dropped {
            self.ledger.count(Tally::TransientGone);
        }
        self.lossy = self.origin_hurt;
        self.origin_hurt = false;
    }

    /// The power fails, or the process is killed.
    pub(super) fn crash(&mut self, crash: Crash) {
        self.end_process();
        let mut digest = 0;
        let Self {
            origin, slots, rng, ..
        } = self;
        let disks = std::iter::once(origin).chain(slots.iter_mut().map(|slot| &mut slot.disk));
        let same = rng.chance(1, 2).then(|| Loss::pick(rng));
        for disk in disks {
            match crash {
                Crash::Power => disk.power_cut(same.unwrap_or_else(|| Loss::pick(rng)), rng),
                Crash::Kill | Crash::KillAfterError => disk.kill(rng),
            }
            digest = disk.digest(digest);
        }
        if crash == Crash::Power {
            self.images.push(digest);
        }
    }

    /// Compare a view with the model and say who is wrong.
    pub(super) fn violation(&self, what: &str, wrong: &crate::model::Wrong) -> Violation {
        let sector = wrong.cell / CELLS;
        Violation(format!(
            "{what}: sector {sector}, cell {}, shows {} where it may show {}",
            wrong.cell,
            self.who_is(wrong.cell, &wrong.found),
            wrong.allowed
        ))
    }

    /// The stamp whose bytes these are.
    fn who_is(&self, cell: usize, found: &[u8]) -> String {
        let offset = pattern::byte_of(cell);
        let known = |stamp: &Stamp| pattern::matches(*stamp, offset, found);
        match (0..=self.stamp).rev().find(known) {
            Some(stamp) => format!("stamp {stamp}"),
            None => format!("bytes that nobody wrote there ({found:02x?}...)"),
        }
    }
}

/// The remains of a snapshot that was lost: exceptions that would pass for good
/// ones under a header that says valid.
fn leave_an_invalid_store(content: &mut [u8], plan: StorePlan) {
    let count = store_bytes::capacity(plan.ready_sectors, plan.chunk_sectors).min(4);
    if plan.is_persistent() && count > 0 {
        let old: Vec<u64> = (0..count).collect();
        store_bytes::write(content, plan.chunk_sectors, &old, |_, data| {
            pattern::fill(u32::MAX, 0, data);
        });
        content[4..8].fill(0);
    }
}
