//! `volume add` and `volume remove`: disks join and leave a running server.

use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use nbdsnap_engine::View;

use super::create::log_notes;
use super::refusal::Refused;
use super::turn::Turn;
use crate::control::protocol::{
    Answer, EventKind, EventReport, SnapshotName, StoreToServe, VolumeAdd, VolumeRemove,
};
use crate::disks::{self, Known, Opened, Plan, SnapshotRequest, VolumeRequest};
use crate::io::{ClientStatus, Shard, VolumeId, VolumeOrder};
use crate::names;
use crate::server::moving::{self, Moving};
use crate::server::registry::VolumeEntry;
use crate::server::setup::OpenVolume;
use crate::state::admission::{Recorded, admit, as_listed, files_to_make};
use crate::state::keeper::Change;
use crate::state::record::State;

/// A volume that closes has this long.
const LEAVE: Duration = Duration::from_mins(1);

impl Turn<'_> {
    pub(super) fn add_volume(&mut self, add: &VolumeAdd) -> Result<Answer, Refused> {
        self.check_addition(add)?;
        let request = VolumeRequest {
            name: add.name.clone(),
            path: add.disk.clone(),
            read_only: add.read_only,
            snapshots: add.snapshots.iter().map(request).collect(),
        };
        if let Err(refused) = self.open_and_host(request, &add.without) {
            self.taken.give_back_volume(&add.name);
            return Err(refused);
        }
        self.publish();
        let event = EventReport::new(EventKind::VolumeAdded);
        self.events.publish(event.of_volume(&add.name));
        self.report_volumes(&|name| name == add.name)
    }

    fn check_addition(&self, add: &VolumeAdd) -> Result<(), Refused> {
        let mut seen: Vec<&str> = Vec::new();
        let snapshots = add.snapshots.iter().map(|one| &one.snapshot);
        for name in std::iter::once(&add.name).chain(snapshots) {
            if let Some(why) = names::fault(name) {
                let name = name.clone();
                return Err(Refused::Name { name, why });
            }
        }
        for one in &add.snapshots {
            if seen.contains(&one.snapshot.as_str()) {
                let (volume, snapshot) = (add.name.clone(), one.snapshot.clone());
                return Err(Refused::Twice(SnapshotName { volume, snapshot }));
            }
            seen.push(&one.snapshot);
        }
        let paths = add.snapshots.iter().map(|one| &one.cow);
        if let Some(path) = paths.chain([&add.disk]).find(|path| !path.is_absolute()) {
            return Err(Refused::RelativePath(path.clone()));
        }
        if self.registry.volume(&add.name).is_some() {
            return Err(Refused::VolumeExists(add.name.clone()));
        }
        Ok(())
    }

    fn open_and_host(
        &mut self,
        request: VolumeRequest,
        without: &[PathBuf],
    ) -> Result<(), Refused> {
        let name = request.name.clone();
        let requests = as_listed(&self.records(), vec![request])?;
        let plan = disks::inspect(requests, &mut self.taken)?;
        let offered = plan.offered();
        let mut files = Vec::new();
        for offered in &offered {
            admit(&self.records(), offered, without)?;
            files.extend(files_to_make(&offered.stores));
        }
        let edit = |next: &mut State| {
            for offered in &offered {
                next.volumes.retain(|one| one.name != offered.name);
                next.volumes.push(offered.into());
            }
        };
        let mut change = self.begin_change(edit, files)?;
        let hosted = self.make_and_host(plan, &mut change);
        let committed = hosted.and_then(|()| Ok(self.records().commit(&mut change)?));
        if let Err(refused) = committed {
            self.unhost(&name);
            self.forget(change);
            return Err(refused);
        }
        self.finish(change)
    }

    fn make_and_host(&mut self, plan: Plan, change: &mut Change) -> Result<(), Refused> {
        let mut records = self.records();
        let mut making = Recorded {
            keeper: &mut records,
            change,
        };
        let opened = plan.carry_out(&mut self.taken, &mut making)?;
        drop(records);
        let Opened { volumes, notes } = opened;
        log_notes(&notes);
        for volume in volumes {
            self.host(volume)?;
        }
        Ok(())
    }

    /// Have a volume leave that has come just now, and that nobody has seen.
    fn unhost(&mut self, name: &str) {
        let place = self
            .registry
            .volumes
            .iter()
            .position(|one| one.name == name);
        if let Some(place) = place {
            let entry = self.registry.volumes.remove(place);
            let (left, told) = channel();
            self.shards[entry.shard].order(entry.id, VolumeOrder::Leave { left });
            let until = Instant::now() + LEAVE;
            // The error that led here is the one to tell of.
            let _ = self.wait(entry.shard, &told, Some(until));
        }
    }

    fn host(&mut self, volume: OpenVolume) -> Result<(), Refused> {
        let id = VolumeId(self.volumes);
        self.volumes += 1;
        let load = |shard: &usize| {
            let here = |volume: &&VolumeEntry| volume.shard == *shard;
            self.registry.volumes.iter().filter(here).count()
        };
        let shard = (0..self.shards.len())
            .min_by_key(load)
            .expect("there is a thread");
        let share = moving::share_of_copy_memory(self.registry.volumes.len() + 1);
        let Moving {
            entry,
            facts,
            answer,
        } = moving::begin(
            volume,
            id,
            shard,
            share,
            &self.shards[shard],
            &self.defaults,
        );
        let views = self
            .wait(shard, &answer, None)?
            .map_err(Refused::NotTaken)?;
        self.registry
            .volumes
            .push(moving::end(entry, facts, &views));
        Ok(())
    }

    pub(super) fn remove_volume(&mut self, remove: &VolumeRemove) -> Result<Answer, Refused> {
        let name = &remove.name;
        let missing = || Refused::NoVolume(name.clone());
        let volume = self.registry.volume(name).ok_or_else(missing)?;
        let (id, shard) = (volume.id, volume.shard);
        if let Some(merging) = volume.merging() {
            return Err(Refused::Merging(SnapshotName {
                volume: name.clone(),
                snapshot: merging.name.clone(),
            }));
        }
        let answer = self.report_volumes(&|one| one == name)?;
        let clients = self.clients_of(id)?;
        if clients > 0 && !remove.force {
            return Err(Refused::InUse(name.clone(), clients));
        }
        // Its disk's list stays: the stores still belong to it.
        self.record(|next| next.volumes.retain(|one| one.name != *name))?;
        let place = self.registry.volumes.iter().position(|one| one.id == id);
        let entry = self
            .registry
            .volumes
            .remove(place.expect("it was found just now"));
        self.publish();
        let (left, told) = channel();
        self.shards[shard].order(id, VolumeOrder::Leave { left });
        let until = Instant::now() + LEAVE;
        let durable = match self.wait(shard, &told, Some(until)) {
            Err(Refused::TooSlow) => Err(Refused::VolumeBusy(name.clone(), LEAVE.as_secs())),
            other => other,
        };
        // Who is still busy keeps its locks: the same files are refused by those.
        self.taken.give_back_volume(name);
        let event = EventReport::new(EventKind::VolumeRemoved);
        self.events.publish(event.of_volume(name));
        let durable = durable?;
        entry.discard_scratch();
        if durable {
            Ok(answer)
        } else {
            Err(Refused::NotDurable(name.clone()))
        }
    }

    /// Clients attached to a volume or to one of its snapshots.
    fn clients_of(&mut self, volume: VolumeId) -> Result<u64, Refused> {
        self.count_clients(|client| client.volume == volume)
    }

    /// Clients attached to a volume itself.
    pub(super) fn origin_clients(&mut self, volume: VolumeId) -> Result<u64, Refused> {
        self.count_clients(|client| client.volume == volume && client.view == View::Origin)
    }

    pub(super) fn count_clients(
        &mut self,
        counts: impl Fn(&ClientStatus) -> bool,
    ) -> Result<u64, Refused> {
        let mut count = 0;
        let asked: Vec<_> = self.shards.iter().map(Shard::clients).collect();
        for (shard, answer) in asked.into_iter().enumerate() {
            let clients = self.wait(shard, &answer, None)?;
            count += clients.iter().filter(|one| counts(one)).count() as u64;
        }
        Ok(count)
    }
}

fn request(store: &StoreToServe) -> SnapshotRequest {
    SnapshotRequest {
        name: store.snapshot.clone(),
        cow: store.cow.clone(),
        kind: store.kind.into(),
        chunk: store.chunk_bytes,
        size: store.size_bytes,
        read_only: store.read_only,
        format: store.format,
        adopt: store.adopt,
        must_exist: false,
        known: Known::default(),
        behaviour: None,
    }
}
