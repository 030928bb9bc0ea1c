//! A run of the crash simulator: a seed picks a plan, and the engine lives
//! through traffic and crashes on simulated disks, with the model watching.
//!
//! A run is a chain of processes. Each opens the stores that the last one left
//! behind (the power may fail there too), is compared with the model view by
//! view, serves traffic, and ends in a power cut, a kill, or a close. The same
//! seed always plays the same run.

pub mod ledger;
mod live;
pub mod mapped;
mod merging;
mod operations;
mod recovery;
mod requests;
pub mod search;
pub mod tallies;
mod traffic;
pub mod tree;
mod verdict;
mod world;

use nbdsnap_engine::disk::sim::{Faults, Rng};
use nbdsnap_engine::law::{Law, Mutant};
use nbdsnap_engine::{
    Access, OpenError, Store, StoreIo, StoreKind, StoreSize, StoreSpec, Volume, VolumeConfig,
};

use self::ledger::Tally;
use self::live::Suspension;
use self::recovery::Made;
use self::traffic::Session;
use self::world::{Phase, World, say};
use crate::model::Crash;
use crate::workload::{Ask, Plan};

/// The engine did what it must not, or did not what it must.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation(pub String);

/// What is tested: the engine, or one with a rule broken.
#[derive(Clone, Copy, Debug, Default)]
pub struct Checks {
    /// The rule to break.
    pub mutant: Mutant,
    /// Print every step.
    pub told: bool,
}

/// What a run found.
pub type Report = search::Report<Tally>;

/// A place in a small merge for a power cut.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    /// Chooses the volume and its traffic.
    pub seed: u64,
    /// After so many disk operations.
    pub after: u64,
    /// Chooses what the power cut leaves.
    pub salt: u64,
}

/// Crashes in a run.
pub const CRASHES: u64 = 3;

impl Checks {
    fn law(self) -> Law {
        Law::broken(self.mutant)
    }

    fn volume(self, config: VolumeConfig) -> Volume {
        let mut volume = Volume::new(config);
        volume.set_law(self.law());
        volume
    }

    fn create(
        self,
        spec: StoreSpec,
        io: &mut dyn StoreIo,
    ) -> Result<Store, nbdsnap_engine::DiskError> {
        Store::create_under(self.law(), spec, io)
    }

    fn open(
        self,
        kind: StoreKind,
        size: StoreSize,
        origin_bytes: u64,
        access: Access,
        io: &mut dyn StoreIo,
    ) -> Result<Store, OpenError> {
        Store::open_under(self.law(), kind, size, origin_bytes, access, io)
    }

    /// Play the run of a seed.
    pub fn run(self, seed: u64) -> Report {
        let mut world = World::new(seed, CRASHES, self.told);
        let violation = search::violation_of(|| self.play(&mut world));
        Self::report(world, violation)
    }

    fn report(world: World, violation: Option<Violation>) -> Report {
        Report {
            violation,
            images: world.images,
            ledger: world.ledger,
        }
    }

    /// Play a small merge, with the power failing after an operation. Where the
    /// merge ends before that, the report has no image.
    pub fn cut_merge(self, cut: Cut) -> Report {
        let mut rng = Rng::new(cut.seed);
        let plan = Plan::small_merge(&mut rng);
        let mut world = World::of_plan(rng, plan, 0, self.told);
        let violation = search::violation_of(|| self.play_cut(&mut world, cut));
        Self::report(world, violation)
    }

    fn play_cut(self, world: &mut World, cut: Cut) -> Result<(), Violation> {
        let no_crash = "nothing fails before the cut";
        let mut session = self.recover(world, Crash::Kill)?.expect(no_crash);
        let ended = session.merge_until(cut.after)?;
        if ended {
            return Self::finish(session);
        }
        let Session { world, .. } = session;
        world.rng = Rng::new(cut.seed ^ (cut.after << 16) ^ (cut.salt << 48));
        say!(world, "-- the power fails");
        world.crash(Crash::Power);
        let no_crash = "the power fails once";
        Self::finish(self.recover(world, Crash::Power)?.expect(no_crash))
    }

    fn play(self, world: &mut World) -> Result<(), Violation> {
        // The first process begins as after a kill: nothing is lost, nothing is new.
        let mut last = Crash::Kill;
        loop {
            let Some(mut session) = self.recover(world, last)? else {
                // The power failed during recovery.
                last = Crash::Power;
                continue;
            };
            if session.world.crashes_left == 0 {
                return Self::finish(session);
            }
            let half_made = session.traffic(self)?;
            let mut closed = false;
            if half_made.is_none() && session.world.rng.chance(1, 8) {
                session.close()?;
                closed = session.closed == Some(true);
            }
            last = Self::end_process(session, half_made.is_some(), closed);
            if let Some(index) = half_made {
                let blank = world.slots[index].was_blank;
                world.look_at_half_made(index, blank, self)?;
            }
        }
    }

    /// The process ends by a crash.
    fn end_process(mut session: Session<'_>, half_made: bool, closed: bool) -> Crash {
        session.count_crash_in_merge();
        if !session.marks.is_empty() {
            session.world.ledger.count(Tally::CrashBeforeMark);
        }
        let idle = session.in_flight() == 0;
        let growing = session.is_growing();
        let suspended = session.suspension == Suspension::Suspended;
        let Session { world, .. } = session;
        world.crashes_left -= 1;
        if suspended {
            world.ledger.count(Tally::CrashSuspended);
        }
        if growing {
            world.ledger.count(Tally::GrowthLost);
        }
        let kill = !half_made && world.rng.chance(world.plan.kills, 16);
        let tally = match () {
            () if half_made => Tally::CrashCreation,
            () if kill => Tally::Killed,
            () if closed => Tally::CrashAfterClose,
            () => Tally::PowerCut,
        };
        world.ledger.count(tally);
        if idle {
            world.ledger.count(Tally::CrashIdle);
        }
        let crash = if kill { Crash::Kill } else { Crash::Power };
        say!(world, "-- {crash:?}");
        world.crash(crash);
        crash
    }

    /// The last process: everything is quiet, and closes.
    fn finish(mut session: Session<'_>) -> Result<(), Violation> {
        let cells = session.world.cells_of(None);
        session.hand_in(None, cells, Ask::Read)?;
        session.let_merge_end()?;
        session.close()?;
        if session.world.merging.is_some() {
            return Err(Violation("a merge without errors did not end".into()));
        }
        if session.closed != Some(true) {
            return Err(Violation("the last close failed".into()));
        }
        Ok(())
    }

    /// Open what a crash left behind and compare it. `None` if the power failed meanwhile.
    fn recover(self, world: &mut World, crash: Crash) -> Result<Option<Session<'_>>, Violation> {
        world.set_faults(Faults::default());
        if crash == Crash::Power && world.merging.is_none() {
            world.check_origin_disk(crash)?;
        }
        if world.rng.chance(1, 8) {
            self.look_without_writing(world, crash)?;
        }
        let mut fails = (world.crashes_left > 0 && world.clock > 1 && world.rng.chance(1, 4))
            .then(|| world.rng.below(8));
        let mut stores = Vec::new();
        for index in 0..world.slots.len() {
            let phase = world.slots[index].phase;
            if phase == Phase::Absent {
                continue;
            }
            if phase == Phase::Creating {
                self.adopt(world, index, crash, &mut stores)?;
                continue;
            }
            world.check_store(index)?;
            let steps = if world.rng.chance(1, 2) {
                fails.take()
            } else {
                None
            };
            match world.open_store(index, Access::ReadWrite, self, steps)? {
                Made::PowerFailed => {
                    world.crash_in_recovery();
                    return Ok(None);
                }
                Made::Refused(why) => {
                    return Err(Violation(format!(
                        "store {index} is refused after a crash: {why}"
                    )));
                }
                Made::Store(store) => {
                    world.judge_opened(index, &store)?;
                    world.slots[index].recount();
                    stores.push((index, store));
                }
            }
        }
        let mut session = Session::new(world, self);
        for (index, store) in stores {
            session.attach(index, store);
        }
        session.compare_views(crash)?;
        session.compare_status()?;
        if session.world.rng.chance(7, 8) {
            session.resume_merge();
        }
        Ok(Some(session))
    }

    /// Serve everything read-only, which must show the same and write nothing.
    fn look_without_writing(self, world: &mut World, crash: Crash) -> Result<(), Violation> {
        let mut stores = Vec::new();
        for index in 0..world.slots.len() {
            if !world.slots[index].is_attached() && world.slots[index].phase != Phase::Merging {
                continue;
            }
            match world.open_store(index, Access::ReadOnly, self, None)? {
                Made::Store(store) => {
                    world.judge_opened(index, &store)?;
                    world.ledger.count(Tally::ReopenedReadOnly);
                    stores.push((index, store));
                }
                Made::Refused(why) => {
                    return Err(Violation(format!(
                        "store {index} is refused after a crash: {why}"
                    )));
                }
                Made::PowerFailed => unreachable!("the power holds while nothing is written"),
            }
        }
        let mut session = Session::new(world, self);
        for (index, store) in stores {
            session.attach(index, store);
        }
        session.compare_views(crash)?;
        for slot in &mut world.slots {
            slot.id = None;
        }
        Ok(())
    }

    /// A snapshot that was not announced before the crash: mostly it is dropped.
    /// If its store is empty it may as well become a snapshot of the origin as it is now.
    fn adopt(
        self,
        world: &mut World,
        index: usize,
        crash: Crash,
        stores: &mut Vec<(usize, Store)>,
    ) -> Result<(), Violation> {
        world.ledger.count(Tally::CreateUndone);
        // If it becomes a snapshot, then of the origin as it is now.
        world.slots[index].sectors = world.origin_sectors;
        let keep = crash == Crash::Power && world.rng.chance(1, 2);
        let opened = if keep {
            Some(world.open_store(index, Access::ReadWrite, self, None)?)
        } else {
            None
        };
        world.slots[index].clear();
        let Some(opened) = opened else { return Ok(()) };
        let Made::Store(store) = opened else {
            return Err(Violation(format!(
                "store {index} was made and is refused after a crash"
            )));
        };
        if store.exception_count() == 0 && !store.is_invalid() {
            world.ledger.count(Tally::CreateAdopted);
            let slot = &mut world.slots[index];
            slot.phase = Phase::Active;
            slot.begin_view(world.model.clone(), world.origin_sectors);
            slot.recount();
            stores.push((index, store));
        }
        Ok(())
    }
}

impl Session<'_> {
    /// Read every view whole and compare it with what the crash may have left.
    fn compare_views(&mut self, crash: Crash) -> Result<(), Violation> {
        for index in 0..=self.world.slots.len() {
            let slot = index.checked_sub(1);
            match slot.map(|i| (self.world.slots[i].phase, self.world.slots[i].id)) {
                Some((Phase::Active | Phase::Overflowed, Some(_))) | None => {}
                _ => continue,
            }
            let merged = self.world.merged_slot();
            let origin_lossy =
                self.world.lossy || merged.is_some_and(|i| self.world.slots[i].lossy);
            let lossy = slot.map_or(origin_lossy, |i| self.world.slots[i].lossy);
            let crash = if lossy && crash == Crash::Kill {
                Crash::KillAfterError
            } else {
                crash
            };
            let found = self.read_whole(slot)?;
            let now = self.world.tick();
            let model = self.view_model(slot);
            if let Err(wrong) = model.check_after(crash, now, &found) {
                let what = format!("the {} after a {crash:?} crash", requests::name(slot));
                return Err(self.world.violation(&what, &wrong));
            }
            if let Some(i) = slot {
                self.world.slots[i].may_be_invalid = false;
                self.world.slots[i].doomed = false;
            }
        }
        Ok(())
    }
}
