//! `snapshot create`: stores are made while clients go on; then all volumes are
//! held, the creation is committed, and all snapshots are taken: one instant for
//! all of them, or none.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use nbdsnap_engine::{OnFull, SnapshotId, StoreKind};

use super::refusal::Refused;
use super::turn::{Shared, Turn};
use crate::control::protocol::{
    Answer, EventKind, Kind, SnapshotCreate, SnapshotName, SnapshotReport, SnapshotState,
    StoreLimit,
};
use crate::disks::{self, Known, Making, Note, SnapshotPlan, SnapshotRequest};
use crate::io::{NewSnapshot, NotHeld, VolumeId, VolumeOrder};
use crate::law;
use crate::names;
use crate::server::moving::new_snapshot;
use crate::server::registry::{MergeState, SnapshotEntry, SnapshotFacts, Taken, now};
use crate::server::setup::{Defaults, OpenSnapshot};
use crate::state::admission::files_to_make;
use crate::state::keeper::Change;
use crate::state::place::settled;
use crate::state::record::State;

/// All volumes of a group are at rest within this time, or none is held any more.
const HOLD: Duration = Duration::from_secs(30);

/// The part of a group that one volume has.
pub(super) struct Part {
    pub(super) shard: usize,
    pub(super) volume: VolumeId,
    pub(super) name: String,
    pub(super) snapshots: Vec<NewSnapshot>,
    pub(super) facts: Vec<SnapshotFacts>,
}

/// A volume that is held.
pub(super) struct HeldPart {
    pub(super) name: String,
    pub(super) ids: Vec<SnapshotId>,
    pub(super) facts: Vec<SnapshotFacts>,
}

impl Turn<'_> {
    pub(super) fn create(&mut self, create: &SnapshotCreate) -> Result<Answer, Refused> {
        self.create_beside(create, |_| Ok(()))
    }

    /// The same; `others` are taken while all volumes are held.
    pub(super) fn create_beside(
        &mut self,
        create: &SnapshotCreate,
        others: impl FnOnce(&mut Self) -> Result<(), Refused>,
    ) -> Result<Answer, Refused> {
        self.check_creation(create)?;
        self.check_origins_live(create)?;
        let mut plan = SnapshotPlan::default();
        for name in &create.snapshots {
            if let Err(refused) = self.plan_one(create, name, &mut plan) {
                plan.give_up(&mut self.taken);
                return Err(refused);
            }
        }
        let mut change = match self.begin(create, &plan) {
            Ok(change) => change,
            Err(refused) => {
                plan.give_up(&mut self.taken);
                return Err(refused);
            }
        };
        let roles = plan.roles();
        let making = |aside: &Shared| {
            let change = &mut change;
            plan.carry_out(&mut RecordedAside { aside, change })
        };
        let made = match self.aside(making) {
            Ok(made) => made,
            Err(refusal) => {
                self.give_back(&roles);
                self.forget(change);
                return Err(refusal.into());
            }
        };
        made.note(&mut self.taken);
        let parts = self.parts(create, made.snapshots);
        let commit = |this: &mut Self| {
            others(this)?;
            Ok(this.records().commit(&mut change)?)
        };
        match self.take_all(parts, commit) {
            Ok(held) => {
                made.deed.keep();
                log_notes(&made.notes);
                let as_planned = self.enter(held);
                self.publish();
                self.finish(change)?;
                if !as_planned {
                    self.record(|_| ())?;
                }
                for name in &create.snapshots {
                    self.tell(EventKind::Created, name);
                }
                self.report_named(&create.snapshots)
            }
            Err(refused) => {
                made.deed.take_back(&mut self.taken);
                self.forget(change);
                Err(refused)
            }
        }
    }

    /// Stores that could not be made are nobody's.
    pub(super) fn give_back(&mut self, roles: &[String]) {
        for role in roles {
            self.taken.give_back_cow(role);
        }
    }

    /// Begin to record the snapshots of a plan.
    fn begin(&mut self, create: &SnapshotCreate, plan: &SnapshotPlan) -> Result<Change, Refused> {
        let offered = plan.offered();
        let edit = |next: &mut State| {
            for (name, store) in create.snapshots.iter().zip(&offered) {
                let volumes = &mut next.volumes;
                let volume = volumes.iter_mut().find(|volume| volume.name == name.volume);
                let volume = volume.expect("checked before");
                volume.snapshots.push(store.into());
            }
        };
        self.begin_change(edit, files_to_make(&offered))
    }

    /// What can be refused by looking at names.
    fn check_creation(&self, create: &SnapshotCreate) -> Result<(), Refused> {
        let wanted = &create.snapshots;
        if wanted.is_empty() {
            return Err(Refused::NothingNamed);
        }
        if create.cow.is_some() && wanted.len() > 1 {
            return Err(Refused::OnePath(wanted.len()));
        }
        if let Some(path) = create.cow.as_ref().filter(|path| !path.is_absolute()) {
            return Err(Refused::RelativePath(path.clone()));
        }
        if let Some(StoreLimit::PercentOfOrigin(percent)) = create.size
            && !(1..=1000).contains(&percent)
        {
            return Err(Refused::Percent(percent));
        }
        if let Some(growth) = create.auto_extend
            && !((1..=99).contains(&growth.threshold_percent)
                && (1..=1000).contains(&growth.step_percent))
        {
            return Err(Refused::Growth(
                growth.threshold_percent,
                growth.step_percent,
            ));
        }
        for (place, name) in wanted.iter().enumerate() {
            let volume = self
                .registry
                .volume(&name.volume)
                .ok_or_else(|| Refused::NoVolume(name.volume.clone()))?;
            if let Some((fault, why)) = names::path_fault(&name.snapshot) {
                let name = fault.to_owned();
                return Err(Refused::Name { name, why });
            }
            let export = names::export(&name.volume, &name.snapshot);
            if volume.snapshot(&name.snapshot).is_some() || self.registry.mapped.has(&export) {
                return Err(Refused::Exists(name.clone()));
            }
            if wanted[..place].contains(name) {
                return Err(Refused::Twice(name.clone()));
            }
            let of = names::origin(&name.snapshot);
            let mut changing = volume.merging_into(of);
            if let Some(path) = of {
                let (volume_name, snapshot) = (name.volume.clone(), path.to_owned());
                let below = volume
                    .snapshot(path)
                    .ok_or(Refused::NoSnapshot(SnapshotName {
                        volume: volume_name,
                        snapshot,
                    }))?;
                changing = changing.or((below.merge != MergeState::None).then_some(below));
                if below.kind == StoreKind::Transient && create.kind != Kind::Transient {
                    return Err(Refused::OfTransient(name.clone()));
                }
            }
            if let Some(merging) = changing {
                return Err(Refused::Merging(volume.name_of(merging)));
            }
            if !volume.origin.access.writes_stores() {
                return Err(Refused::ReadOnly(volume.name.clone()));
            }
            if create.cow.is_none() && volume.is_block_device {
                return Err(Refused::NoDefaultCow(name.to_string()));
            }
        }
        Ok(())
    }

    /// What is lost shows nothing that a snapshot could keep.
    fn check_origins_live(&mut self, create: &SnapshotCreate) -> Result<(), Refused> {
        let below = create.snapshots.iter().filter_map(|name| {
            let of = names::origin(&name.snapshot)?;
            let (volume, snapshot) = (name.volume.clone(), of.to_owned());
            Some(SnapshotName { volume, snapshot })
        });
        let below: Vec<SnapshotName> = below.collect();
        if below.is_empty() {
            return Ok(());
        }
        let Answer::Snapshots(reports) = self.report_named(&below)? else {
            unreachable!("snapshots were asked for");
        };
        let is_lost = |report: &&SnapshotReport| report.state == SnapshotState::Invalid;
        match below.iter().zip(&reports).find(|(_, one)| is_lost(one)) {
            Some((name, _)) => Err(Refused::OfLost(name.clone())),
            None => Ok(()),
        }
    }

    fn plan_one(
        &mut self,
        create: &SnapshotCreate,
        name: &SnapshotName,
        plan: &mut SnapshotPlan,
    ) -> Result<(), Refused> {
        let behaviour = self.behaviour(create);
        let books = &mut **self;
        let volume = books.registry.volume(&name.volume).expect("checked before");
        let origin = &volume.origin_of(&name.snapshot);
        let beside = || disks::default_cow(origin, &name.volume, &name.snapshot);
        let request = SnapshotRequest {
            name: name.snapshot.clone(),
            cow: create.cow.clone().unwrap_or_else(beside),
            kind: create.kind.into(),
            chunk: create.chunk_bytes,
            size: create.size.map(|size| size.bytes(origin.bytes)),
            read_only: create.read_only,
            format: false,
            adopt: false,
            must_exist: false,
            known: Known::default(),
            behaviour: Some(behaviour),
        };
        plan.add(&name.volume, origin, &request, &mut books.taken)?;
        Ok(())
    }

    /// How the new snapshots behave.
    fn behaviour(&self, create: &SnapshotCreate) -> Defaults {
        Defaults {
            on_full: create.on_full.map_or(self.defaults.on_full, OnFull::from),
            auto_extend: create.auto_extend.or(self.defaults.auto_extend),
        }
    }

    /// Sort the stores by volume, in the one order in which volumes are held.
    fn parts(&self, create: &SnapshotCreate, made: Vec<OpenSnapshot>) -> Vec<Part> {
        let behaviour = self.behaviour(create);
        let mut parts: BTreeMap<VolumeId, Part> = BTreeMap::new();
        for (name, mut open) in create.snapshots.iter().zip(made) {
            let volume = self.registry.volume(&name.volume).expect("checked before");
            let part = parts.entry(volume.id).or_insert_with(|| Part {
                shard: volume.shard,
                volume: volume.id,
                name: volume.name.clone(),
                snapshots: Vec::new(),
                facts: Vec::new(),
            });
            part.facts.push(SnapshotFacts::of(&mut open, behaviour));
            let settings = behaviour.settings(&open);
            part.snapshots.push(new_snapshot(open, settings));
        }
        parts.into_values().collect()
    }

    /// Hold all, commit, take all; or leave all as they were.
    pub(super) fn take_all(
        &mut self,
        parts: Vec<Part>,
        commit: impl FnOnce(&mut Self) -> Result<(), Refused>,
    ) -> Result<Vec<HeldPart>, Refused> {
        if law::group_is_one_instant() {
            return self.take_together(parts, commit);
        }
        commit(self)?;
        let mut all = Vec::new();
        for part in parts {
            all.extend(self.take_together(vec![part], |_| Ok(()))?);
        }
        Ok(all)
    }

    fn take_together(
        &mut self,
        parts: Vec<Part>,
        commit: impl FnOnce(&mut Self) -> Result<(), Refused>,
    ) -> Result<Vec<HeldPart>, Refused> {
        let until = Instant::now() + HOLD;
        let places: Vec<(usize, VolumeId)> =
            parts.iter().map(|part| (part.shard, part.volume)).collect();
        let mut answers = Vec::new();
        for part in parts {
            let (held, answer) = channel();
            let snapshots = part.snapshots;
            let order = VolumeOrder::Hold { snapshots, held };
            self.shards[part.shard].order(part.volume, order);
            answers.push((part.shard, part.name, part.facts, answer));
        }
        let mut all = Vec::new();
        let mut failed = None;
        for (shard, name, facts, answer) in answers {
            match self.wait(shard, &answer, Some(until)) {
                Ok(Ok(ids)) => all.push(HeldPart { name, ids, facts }),
                Ok(Err(NotHeld::FlushFailed)) => failed = Some(Refused::FlushFailed(name)),
                Ok(Err(NotHeld::NotThere)) => failed = Some(Refused::NotTakeable(name)),
                Ok(Err(NotHeld::Closing)) => failed = Some(Refused::Stopping),
                Err(Refused::TooSlow) => failed = Some(Refused::NotHeld(HOLD.as_secs())),
                Err(refused) => failed = Some(refused),
            }
            if failed.is_some() {
                break;
            }
        }
        if failed.is_none() {
            failed = commit(self).err();
        }
        if let Some(refused) = failed {
            self.abandon(&places);
            return Err(refused);
        }
        self.take(&places)?;
        Ok(all)
    }

    /// Take the instant that the volumes hold, all of them before any answer is
    /// waited for.
    fn take(&mut self, places: &[(usize, VolumeId)]) -> Result<(), Refused> {
        let mut answers = Vec::new();
        for &(shard, volume) in places {
            let (taken, answer) = channel();
            self.shards[shard].order(volume, VolumeOrder::Take { taken });
            answers.push((shard, answer));
        }
        for (shard, answer) in answers {
            if !self.wait(shard, &answer, None)? {
                // It was held when it said so, and only an order ends that.
                return Err(Refused::Stopping);
            }
        }
        Ok(())
    }

    /// Give the instant up, and wait until nobody uses the stores any more.
    fn abandon(&mut self, places: &[(usize, VolumeId)]) {
        let mut answers = Vec::new();
        for &(shard, volume) in places {
            let (abandoned, answer) = channel();
            self.shards[shard].order(volume, VolumeOrder::Abandon { abandoned });
            answers.push((shard, answer));
        }
        for (shard, answer) in answers {
            // A volume that is gone uses nothing.
            let _ = self.wait(shard, &answer, None);
        }
    }

    /// The registry has the snapshots from now on. False: the records have them as
    /// of another second, in which they were planned.
    fn enter(&mut self, held: Vec<HeldPart>) -> bool {
        let taken = Taken::Live(now());
        let mut as_planned = true;
        for part in held {
            let volume = self
                .registry
                .volume_mut(&part.name)
                .expect("volumes stay while an order is executed");
            for (id, facts) in part.ids.into_iter().zip(part.facts) {
                as_planned &= facts.taken_at == taken.at();
                let entry = SnapshotEntry::new(id, taken, facts);
                volume.snapshots.push(entry);
            }
        }
        as_planned
    }
}

/// Files that are made while others may have the books, as part of a change.
pub(super) struct RecordedAside<'a> {
    pub(super) aside: &'a Shared,
    pub(super) change: &'a mut Change,
}

impl Making for RecordedAside<'_> {
    fn first_name(&self, path: &Path) -> Option<PathBuf> {
        self.change.made_as(&settled(path))
    }

    fn made(&mut self, paths: &[PathBuf]) -> io::Result<()> {
        let paths: Vec<PathBuf> = paths.iter().map(|path| settled(path)).collect();
        let made = self.aside.records().made(self.change, &paths);
        made.map_err(io::Error::other)
    }
}

/// What disks have to say goes to the log.
pub(super) fn log_notes(notes: &[Note]) {
    for note in notes {
        match note {
            Note::Warning(text) => tracing::warn!("{text}"),
            Note::Info(text) => tracing::info!("{text}"),
        }
    }
}
