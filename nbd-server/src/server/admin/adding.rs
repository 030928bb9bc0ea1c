//! `volume add`: disks join a running server, with their snapshots.
//!
//! What has to be durable for one volume is made durable for many at the same
//! price, so volumes are added in groups: those of one order, all of them or none,
//! and those of orders that wait behind each other, as one group as long as nothing
//! goes wrong, else each order by itself.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::time::Instant;

use tokio::sync::oneshot;

use super::create::log_notes;
use super::refusal::Refused;
use super::volumes::LEAVE;
use super::{Administrator, Letter};
use crate::control::protocol::{
    Answer, EventKind, EventReport, Order, Outcome, SnapshotName, StoreToServe, VolumeAdd,
};
use crate::disks::{self, Opened, Plan, SnapshotRequest, VolumeRequest};
use crate::io::{VolumeAccess, VolumeId, VolumeOrder};
use crate::names;
use crate::server::moving::{self, Moving};
use crate::server::setup::OpenVolume;
use crate::state::admission::{Recorded, admit, as_listed, files_to_make};
use crate::state::keeper::Change;

/// So many orders are one group at most: who follows does not wait for ever.
const ORDERS_MAX: usize = 256;

/// An order to add volumes, and where its outcome goes.
pub(super) struct Addition {
    pub(super) volumes: Vec<VolumeAdd>,
    pub(super) answer: oneshot::Sender<Outcome>,
}

impl Addition {
    /// What a letter is, if it is an order to add volumes.
    pub(super) fn of(letter: Letter) -> Result<Self, Letter> {
        match letter {
            Letter::Order(Order::VolumeAdd(add), answer) => Ok(Self {
                volumes: vec![add],
                answer,
            }),
            Letter::Order(Order::VolumesAdd(adds), answer) => Ok(Self {
                volumes: adds.volumes,
                answer,
            }),
            other => Err(other),
        }
    }
}

impl Administrator {
    /// Add what `first` and the orders behind it ask for. What came behind those is
    /// returned: the next letter.
    pub(super) fn add_all(&mut self, first: Addition) -> Option<Letter> {
        let mut group = vec![first];
        let mut next = None;
        while group.len() < ORDERS_MAX && next.is_none() {
            match self.mailroom.inbox.try_recv().map(Addition::of) {
                Ok(Ok(addition)) => group.push(addition),
                Ok(Err(other)) => next = Some(other),
                Err(_) => break,
            }
        }
        let together = group.len() > 1 && {
            let volumes: Vec<&VolumeAdd> = group.iter().flat_map(|one| &one.volumes).collect();
            self.add_volumes(&volumes).is_ok()
        };
        for Addition { volumes, answer } in group {
            let added = if together {
                Ok(())
            } else {
                self.add_volumes(&volumes.iter().collect::<Vec<_>>())
            };
            let outcome = match added {
                Ok(()) => Outcome::Done(self.report_added(&volumes)),
                Err(refused) => Outcome::Refused(refused.to_string()),
            };
            // Whoever asked may have gone.
            let _ = answer.send(outcome);
        }
        next
    }

    fn report_added(&self, added: &[VolumeAdd]) -> Answer {
        let entries = added
            .iter()
            .filter_map(|add| self.registry.volume(&add.name));
        Answer::Volumes(entries.map(|entry| entry.report(0)).collect())
    }

    /// Add these volumes, or none.
    fn add_volumes(&mut self, adds: &[&VolumeAdd]) -> Result<(), Refused> {
        self.check_additions(adds)?;
        let requests = adds.iter().map(|add| VolumeRequest {
            name: add.name.clone(),
            path: add.disk.clone(),
            access: VolumeAccess::from_words(add.read_only, add.shared),
            snapshots: add.snapshots.iter().map(request).collect(),
        });
        let without: Vec<PathBuf> = adds.iter().flat_map(|add| add.without.clone()).collect();
        if let Err(refused) = self.open_and_host(requests.collect(), &without) {
            for add in adds {
                self.taken.give_back_volume(&add.name);
            }
            return Err(refused);
        }
        self.publish();
        for add in adds {
            let event = EventReport::new(EventKind::VolumeAdded);
            self.events.publish(event.of_volume(&add.name));
        }
        Ok(())
    }

    fn check_additions(&self, adds: &[&VolumeAdd]) -> Result<(), Refused> {
        if adds.is_empty() {
            return Err(Refused::NoVolumes);
        }
        let mut volumes = BTreeSet::new();
        for add in adds {
            check_addition(add)?;
            if !volumes.insert(add.name.as_str()) {
                return Err(Refused::VolumeTwice(add.name.clone()));
            }
            if self.registry.volume(&add.name).is_some() {
                return Err(Refused::VolumeExists(add.name.clone()));
            }
        }
        Ok(())
    }

    fn open_and_host(
        &mut self,
        requests: Vec<VolumeRequest>,
        without: &[PathBuf],
    ) -> Result<(), Refused> {
        let names: Vec<String> = requests.iter().map(|one| one.name.clone()).collect();
        let requests = as_listed(&self.keeper, requests)?;
        let plan = disks::inspect(requests, &mut self.taken)?;
        let mut next = self.recorded();
        let new: BTreeSet<&str> = names.iter().map(String::as_str).collect();
        next.volumes.retain(|one| !new.contains(one.name.as_str()));
        let mut files = Vec::new();
        for offered in &plan.offered() {
            admit(&self.keeper, offered, without)?;
            files.extend(files_to_make(&offered.stores));
            next.volumes.push(offered.into());
        }
        let mut change = self.keeper.begin(next, files)?;
        let hosted = self.make_and_host(plan, &mut change);
        let committed = hosted.and_then(|()| Ok(self.keeper.commit(&mut change)?));
        if let Err(refused) = committed {
            self.unhost(&names);
            self.forget(change);
            return Err(refused);
        }
        Ok(self.keeper.finish(change)?)
    }

    fn make_and_host(&mut self, plan: Plan, change: &mut Change) -> Result<(), Refused> {
        let mut making = Recorded {
            keeper: &mut self.keeper,
            change,
        };
        let Opened { volumes, notes } = plan.carry_out(&mut self.taken, &mut making)?;
        log_notes(&notes);
        self.host(volumes)
    }

    /// Have volumes leave that have come just now, and that nobody has seen.
    fn unhost(&mut self, names: &[String]) {
        let mut gone = Vec::new();
        for name in names {
            let mut volumes = self.registry.volumes.iter();
            if let Some(place) = volumes.position(|one| one.name == *name) {
                gone.push(self.registry.volumes.remove(place));
            }
        }
        self.have_leave(gone.iter().map(|entry| (entry.shard, entry.id)));
    }

    /// Have volumes give up their files. The error that led here is the one to tell of.
    fn have_leave(&self, volumes: impl Iterator<Item = (usize, VolumeId)>) {
        let until = Instant::now() + LEAVE;
        let mut leaving = Vec::new();
        for (shard, id) in volumes {
            let (left, told) = channel();
            self.shards[shard].order(id, VolumeOrder::Leave { left });
            leaving.push((shard, told));
        }
        for (shard, told) in leaving {
            let _ = self.wait(shard, &told, Some(until));
        }
    }

    /// Have volumes move to their threads; if one cannot, the others are in the
    /// registry all the same, for [`Administrator::unhost`].
    fn host(&mut self, volumes: Vec<OpenVolume>) -> Result<(), Refused> {
        let share = moving::share_of_copy_memory(self.registry.volumes.len() + volumes.len());
        let mut load = vec![0; self.shards.len()];
        for volume in &self.registry.volumes {
            load[volume.shard] += 1;
        }
        let mut moving = Vec::new();
        for volume in volumes {
            let id = VolumeId(self.volumes);
            self.volumes += 1;
            let shard = (0..load.len())
                .min_by_key(|&shard| load[shard])
                .expect("there is a thread");
            load[shard] += 1;
            let defaults = &self.defaults;
            let thread = &self.shards[shard];
            moving.push(moving::begin(volume, id, shard, share, thread, defaults));
        }
        let mut failed = None;
        for Moving {
            entry,
            facts,
            answer,
        } in moving
        {
            let views = self.wait(entry.shard, &answer, None);
            match views.and_then(|views| views.map_err(Refused::NotTaken)) {
                Ok(views) => self
                    .registry
                    .volumes
                    .push(moving::end(entry, facts, &views)),
                Err(refused) => {
                    self.have_leave(std::iter::once((entry.shard, entry.id)));
                    failed = failed.or(Some(refused));
                }
            }
        }
        failed.map_or(Ok(()), Err)
    }
}

/// What can be refused by looking at the words of an order.
fn check_addition(add: &VolumeAdd) -> Result<(), Refused> {
    let snapshots = add.snapshots.iter().map(|one| &one.snapshot);
    for name in std::iter::once(&add.name).chain(snapshots) {
        if let Some(why) = names::fault(name) {
            let name = name.clone();
            return Err(Refused::Name { name, why });
        }
    }
    let mut seen: Vec<&str> = Vec::new();
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
    if add.read_only && add.shared {
        return Err(Refused::ReadOnlyShared(add.name.clone()));
    }
    Ok(())
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
        merging: false,
        bytes: None,
        behaviour: None,
    }
}
