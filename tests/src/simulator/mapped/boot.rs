//! The start of a process: the tables that the operator remembers are loaded, those
//! first that others name, and every view is compared.

use nbdsnap_engine::dm::{Line, Lower, Need, Pair, Persistence, Target};
use nbdsnap_engine::{
    Access, Action, Command, DiskError, OpenError, Outcome, Status, Store, StoreIo, StoreKind,
    StoreSize, StoreSpec,
};
use nbdsnap_format::ChunkSize;

use super::process::{Process, command_for};
use super::tally::Tally;
use super::world::{Name, Phase, Place, SECTORS, Snap, Stop, World, called, line};
use crate::pattern::SECTOR;
use crate::simulator::world::say;
use crate::simulator::{Checks, Violation};

/// A device as a store that is opened or made sees it.
struct Cow<'a, 'w> {
    process: &'a mut Process<'w>,
    lower: Lower,
    stop: Option<Stop>,
}

impl StoreIo for Cow<'_, '_> {
    fn act(&mut self, action: Action) -> Outcome {
        let failed = DiskError::Io(5);
        if self.stop.is_some() {
            return Err(failed);
        }
        match self.process.ask(self.lower, command_for(action)) {
            Ok(answer) => answer.map(bytes::Bytes::from).map_err(|_| failed),
            Err(stop) => {
                self.stop = Some(stop);
                Err(failed)
            }
        }
    }

    fn keep_copy(&mut self, _: u64, _: &[u8]) -> Result<(), DiskError> {
        Ok(())
    }
}

/// Load the tables that a crash has left nothing of, or the first ones.
pub(super) fn boot(world: &mut World, checks: Checks) -> Result<Process<'_>, Stop> {
    world.place = Place::Boot;
    let mut process = Process::new(world, checks);
    process.load_tables()?;
    process.compare_after()?;
    process.boots = false;
    let World {
        place,
        crash,
        faulty,
        ..
    } = &mut *process.world;
    (*place, *crash, *faulty) = (Place::Traffic, None, false);
    Ok(process)
}

impl Process<'_> {
    fn load_tables(&mut self) -> Result<(), Stop> {
        let real = self.world.real.clone();
        self.bring_up("real", &real)?;
        for n in 0..self.world.cows.len() {
            let lines = self.world.cows[n].clone();
            self.bring_up(&format!("cow{n}"), &lines)?;
        }
        // Those that were taken first come first: so does what others stand on.
        for index in 0..self.world.snaps.len() {
            let snap = &self.world.snaps[index];
            match snap.phase {
                Phase::Gone => {}
                Phase::Creating => {
                    self.world.ledger.count(Tally::CreateUndone);
                    self.world.bury(index);
                }
                _ if snap.persistence == Persistence::Transient => {
                    self.world.ledger.count(Tally::TransientGone);
                    self.world.bury(index);
                }
                Phase::Active | Phase::Lost { .. } => self.load_snap(index)?,
                // All that is there besides has to be, before a merge writes.
                Phase::MergeOrdered | Phase::Merging | Phase::Merged => {}
            }
        }
        for index in self.world.in_phase(Phase::merges) {
            self.load_merge(index)?;
        }
        if self.mapper.find("base").is_none() {
            let lines = self.origin_lines();
            self.bring_up("base", &lines)?;
        }
        Ok(())
    }

    /// The table of the snapshot-origin.
    pub(super) fn origin_lines(&self) -> Vec<Line> {
        let origin = self.lower("real");
        vec![line(0, SECTORS, Target::SnapshotOrigin { origin })]
    }

    /// The table of a snapshot, or of its merge.
    pub(super) fn snap_lines(&self, index: usize, merges: bool) -> Vec<Line> {
        let snap = &self.world.snaps[index];
        let pair = Pair {
            origin: self.lower_of(snap.origin),
            cow: self.lower(&format!("cow{}", snap.cow)),
            persistence: snap.persistence,
            chunk: snap.chunk,
            discard_zeroes_cow: false,
            discard_passdown_origin: false,
        };
        let target = if merges {
            Target::SnapshotMerge(pair)
        } else {
            Target::Snapshot(pair)
        };
        vec![line(0, SECTORS, target)]
    }

    fn bring_up(&mut self, device: &str, lines: &[Line]) -> Result<(), Stop> {
        self.create(device);
        let wrong = |why: String| Stop::Wrong(Violation(format!("load {device}: {why}")));
        self.load(device, lines)?.map_err(wrong)?;
        let resumed = self.resume(device)?;
        resumed.map_err(|refused| wrong(refused.why))
    }

    /// A snapshot that was there before the crash.
    fn load_snap(&mut self, index: usize) -> Result<(), Stop> {
        let device = format!("snap{index}");
        self.world.snaps[index].device.clone_from(&device);
        self.views.insert(device.clone(), index);
        let lines = self.snap_lines(index, false);
        self.bring_up(&device, &lines)?;
        let invalid = self.status(&device) == Some(Status::Invalid);
        let may_be_lost = self.world.faulty || self.world.may_be_lost(Some(index));
        let World { snaps, ledger, .. } = &mut *self.world;
        let phase = &mut snaps[index].phase;
        let lost = Phase::Lost { marked: true };
        match (*phase, invalid) {
            (Phase::Lost { marked: true }, false) => {
                let text = format!("snapshot {index} was lost, and comes back");
                return Err(Violation(text).into());
            }
            (Phase::Lost { .. }, true) => {
                ledger.count(Tally::LostFound);
                *phase = lost;
            }
            (Phase::Lost { marked: false }, false) => {
                ledger.count(Tally::UnmarkedFound);
                *phase = Phase::Active;
            }
            (_, true) if may_be_lost => {
                ledger.count(Tally::LostUnannounced);
                *phase = lost;
            }
            (_, true) => return Err(Violation(format!("snapshot {index} is lost")).into()),
            (_, false) => {}
        }
        if invalid {
            // What was taken of it cannot be read any more.
            for above in self.world.snaps_of(Some(index)) {
                self.world.bury(above);
            }
        }
        Ok(())
    }

    /// A merge that was ordered before the crash, by the same table.
    fn load_merge(&mut self, index: usize) -> Result<(), Stop> {
        let phase = self.world.snaps[index].phase;
        if phase == Phase::Merged && self.world.rng.chance(1, 2) {
            self.world.bury(index);
            return Ok(());
        }
        let origin = self.world.snaps[index].origin;
        let device = merge_device(origin, index);
        self.world.snaps[index].device.clone_from(&device);
        self.views.insert(device.clone(), index);
        self.create(&device);
        let lines = self.snap_lines(index, true);
        let wrong = |why: String| Stop::Wrong(Violation(format!("load {device}: {why}")));
        self.load(&device, &lines)?.map_err(wrong)?;
        let waits = self.mapper.table(self.device(&device), true);
        let waits = waits.map_err(|refused| wrong(refused.why))?;
        if waits[0].status == Some(Status::Invalid) {
            if phase != Phase::MergeOrdered {
                return Err(wrong("a store is lost in the middle of its merge".into()));
            }
            // It was lost before the merge began: the origin is what it was.
            if !self.world.faulty && !self.world.may_be_lost(Some(index)) {
                return Err(wrong("its snapshot is lost".into()));
            }
            self.world.ledger.count(Tally::MergeNotBegun);
            self.world.bury(index);
            return self.remove(&device);
        }
        if phase == Phase::MergeOrdered {
            self.world.ledger.count(Tally::MergeCutBeforeItBegan);
            let merged = self.world.snaps[index].model.clone();
            self.world.model(origin).take_over(&merged);
        }
        self.world.snaps[index].phase = Phase::Merging;
        self.world.ledger.count(Tally::MergeTakenUp);
        let resumed = self.resume(&device)?;
        resumed.map_err(|refused| wrong(refused.why))
    }

    /// Open the store of a table's line, or make it where there is none.
    pub(super) fn store(
        &mut self,
        target: &Target,
        need: &Need,
    ) -> Result<Result<Option<Store>, String>, Stop> {
        let Need::Store {
            cow,
            chunk,
            cow_bytes,
            origin_bytes,
        } = *need
        else {
            return Ok(Ok(None));
        };
        let (Target::Snapshot(pair) | Target::SnapshotMerge(pair)) = target else {
            unreachable!("only these have stores");
        };
        let kind = match pair.persistence {
            Persistence::Persistent => StoreKind::Persistent,
            Persistence::PersistentOverflow => StoreKind::PersistentOverflow,
            Persistence::Transient => StoreKind::Transient,
        };
        let size = StoreSize {
            ready: cow_bytes,
            limit: cow_bytes,
            step: 0,
        };
        let spec = StoreSpec {
            kind,
            chunk_size: ChunkSize::from_sectors(chunk).expect("chunks are powers of two"),
            size,
        };
        let checks = self.checks;
        let stop = None;
        let process = self;
        let mut io = Cow {
            process,
            lower: cow,
            stop,
        };
        let opened = match kind {
            StoreKind::Transient => Err(OpenError::New),
            _ => checks.open(kind, size, origin_bytes, Access::ReadWrite, &mut io),
        };
        let made = match opened {
            Err(OpenError::New) if io.stop.is_none() => {
                checks.create(spec, &mut io).map_err(OpenError::from)
            }
            opened => opened,
        };
        if let Some(stop) = io.stop {
            return Err(stop);
        }
        Ok(made.map(Some).map_err(|error| error.to_string()))
    }

    /// Views that can be compared.
    fn comparable(&self) -> Vec<Name> {
        let active = self.world.in_phase(|phase| phase == Phase::Active);
        let active = active.into_iter().map(Some);
        std::iter::once(None)
            .chain(active)
            .filter(|name| !self.world.is_unknown(*name))
            .collect()
    }

    /// All of a view; none if it is being lost, for want of room in its store.
    fn read_all(&mut self, name: Name) -> Result<Option<Vec<u8>>, Stop> {
        let way = match name {
            None if self.world.rng.chance(1, 2) => self.lower("base"),
            _ => self.lower_of(name),
        };
        let len = SECTORS * SECTOR;
        let read = self.ask(way, Command::Read { offset: 0, len })?;
        match read {
            Ok(found) => Ok(Some(found)),
            Err(_) if self.world.may_be_lost(name) => Ok(None),
            Err(failure) => {
                let text = format!("{} cannot be read: {failure:?}", called(name));
                Err(Violation(text).into())
            }
        }
    }

    fn compare_after(&mut self) -> Result<(), Stop> {
        let Some(crash) = self.world.crash else {
            return Ok(());
        };
        for name in self.comparable() {
            let Some(found) = self.read_all(name)? else {
                continue;
            };
            let now = self.world.tick();
            let checked = self.world.model(name).check_after(crash, now, &found);
            checked.map_err(|wrong| self.world.wrong(&format!("after {crash:?}"), name, &wrong))?;
            self.world.ledger.count(Tally::Reopened);
            say!(self.world, "  {} is right", called(name));
        }
        self.compare_stacked()
    }

    /// Compare every view with its model, by requests.
    pub(super) fn compare_all(&mut self) -> Result<(), Stop> {
        for name in self.comparable() {
            let issued = self.world.tick();
            let Some(found) = self.read_all(name)? else {
                continue;
            };
            let now = self.world.tick();
            let model = self.world.model(name);
            let read = model.read(model.all(), issued, now, &found);
            read.map_err(|wrong| self.world.wrong("at rest", name, &wrong))?;
        }
        Ok(())
    }

    /// Compare every view with what its stacked stores hold.
    pub(super) fn compare_stacked(&mut self) -> Result<(), Stop> {
        for name in self.comparable() {
            let Some(found) = self.world.stacked(name) else {
                let path = self.world.path(name);
                let mut snaps = path.iter().map(|&i| &self.world.snaps[i]);
                let is_transient = |snap: &Snap| snap.persistence == Persistence::Transient;
                if snaps.any(is_transient) || self.world.may_be_lost(name) {
                    continue;
                }
                return Err(Violation(format!("{} has no stores", called(name))).into());
            };
            let now = self.world.tick();
            let model = self.world.model(name);
            let read = model.read(model.all(), now, now, &found);
            read.map_err(|wrong| self.world.wrong("the stacked stores", name, &wrong))?;
            self.world.ledger.count(Tally::Stacked);
        }
        Ok(())
    }
}

/// The device that a snapshot's store is merged by.
pub(super) fn merge_device(origin: Name, index: usize) -> String {
    match origin {
        None => "base".into(),
        Some(_) => format!("merge{index}"),
    }
}
