//! `volume add`: disks join a running server, with their snapshots.
//!
//! What has to be durable for one volume is made durable for many at the same
//! price, so volumes are added in groups: those of one order, all of them or none,
//! and those of orders that wait behind each other, as one group as long as nothing
//! goes wrong, else each order by itself.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::MutexGuard;
use std::sync::mpsc::channel;
use std::time::Instant;

use tokio::sync::oneshot;

use super::claims::{Claimed, Scope};
use super::create::log_notes;
use super::outcome;
use super::refusal::Refused;
use super::turn::{Shared, Turn};
use super::volumes::LEAVE;
use crate::control::protocol::{
    Answer, EventKind, EventReport, Order, Outcome, SnapshotName, StoreToServe, VolumeAdd,
    VolumesAdd,
};
use crate::disks::{self, Known, Opened, Plan, SnapshotRequest, VolumeRequest};
use crate::io::{VolumeAccess, VolumeId, VolumeOrder};
use crate::names;
use crate::server::moving::{self, Moving};
use crate::server::registry::VolumeEntry;
use crate::server::setup::OpenVolume;
use crate::state::admission::{Recorded, admit, as_listed, files_to_make};
use crate::state::keeper::Change;

/// So many orders are one group at most: who follows does not wait for ever.
const ORDERS_MAX: usize = 256;

/// An order to add volumes, with what it has claimed, and where its outcome goes.
#[derive(Debug)]
pub(super) struct Addition {
    volumes: Vec<VolumeAdd>,
    claimed: Claimed,
    answer: oneshot::Sender<Outcome>,
}

impl Addition {
    /// What an order adds, if it is one to add volumes.
    pub(super) fn of(order: Order) -> Result<Vec<VolumeAdd>, Order> {
        match order {
            Order::VolumeAdd(add) => Ok(vec![add]),
            Order::VolumesAdd(VolumesAdd { volumes }) => Ok(volumes),
            other => Err(other),
        }
    }
}

impl Shared {
    /// Add volumes, as soon as nobody else is busy with their names: with what others
    /// ask for who wait for the books too. Whoever has them first adds for all.
    pub(super) fn add(
        &self,
        scope: Scope,
        volumes: Vec<VolumeAdd>,
        answer: oneshot::Sender<Outcome>,
    ) {
        // Not answered: the server is stopping.
        let Some(claimed) = self.claims.claim(scope) else {
            return;
        };
        self.waiting().push(Addition {
            volumes,
            claimed,
            answer,
        });
        let books = self.books();
        let group: Vec<Addition> = {
            let mut waiting = self.waiting();
            let count = waiting.len().min(ORDERS_MAX);
            waiting.drain(..count).collect()
        };
        let mut orders = Vec::new();
        let mut all: Option<Claimed> = None;
        for Addition {
            volumes,
            claimed,
            answer,
        } in group
        {
            orders.push((volumes, answer));
            all = Some(match all {
                Some(all) => all.and(claimed),
                None => claimed,
            });
        }
        // None: somebody else has done it.
        if let Some(all) = all {
            self.turn_with(books, all).add_all(orders);
        }
    }

    /// Those that have what they claim, and wait for the books.
    pub(super) fn waiting(&self) -> MutexGuard<'_, Vec<Addition>> {
        let waiting = self.additions.lock();
        waiting.expect("no holder of this lock panics")
    }
}

impl Turn<'_> {
    /// Add what these orders ask for, as one group if nothing goes wrong.
    fn add_all(&mut self, orders: Vec<(Vec<VolumeAdd>, oneshot::Sender<Outcome>)>) {
        let together = orders.len() > 1 && {
            let volumes: Vec<&VolumeAdd> = orders.iter().flat_map(|(volumes, _)| volumes).collect();
            self.add_volumes(&volumes).is_ok()
        };
        for (volumes, answer) in orders {
            let added = if together {
                Ok(())
            } else {
                self.add_volumes(&volumes.iter().collect::<Vec<_>>())
            };
            // Whoever asked may have gone.
            let _ = answer.send(outcome(added.map(|()| self.report_added(&volumes))));
        }
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
        let new: BTreeSet<String> = requests.iter().map(|one| one.name.clone()).collect();
        let requests = as_listed(&self.keeper, requests)?;
        let plan = disks::inspect(requests, &mut self.taken)?;
        let mut next = self.recorded();
        next.volumes.retain(|one| !new.contains(&one.name));
        let mut files = Vec::new();
        for offered in &plan.offered() {
            admit(&self.keeper, offered, without)?;
            files.extend(files_to_make(&offered.stores));
            next.volumes.push(offered.into());
        }
        let mut change = self.keeper.begin(next, files)?;
        let mut hosted = Vec::new();
        let made = self.make_and_host(plan, &mut change, &mut hosted);
        let committed = made.and_then(|()| Ok(self.keeper.commit(&mut change)?));
        if let Err(refused) = committed {
            self.unhost(&hosted);
            self.forget(change);
            return Err(refused);
        }
        self.registry.volumes.extend(hosted);
        self.publish();
        if let Err(error) = self.keeper.finish(change) {
            // They are there all the same, and the next start sees to it.
            tracing::error!("that volumes were to be added is still noted: {error}");
        }
        Ok(())
    }

    fn make_and_host(
        &mut self,
        plan: Plan,
        change: &mut Change,
        hosted: &mut Vec<VolumeEntry>,
    ) -> Result<(), Refused> {
        let books = &mut **self;
        let mut making = Recorded {
            keeper: &mut books.keeper,
            change,
        };
        let Opened { volumes, notes } = plan.carry_out(&mut books.taken, &mut making)?;
        log_notes(&notes);
        self.host(volumes, hosted)
    }

    /// Have volumes leave that have come just now, and that nobody has seen.
    fn unhost(&mut self, hosted: &[VolumeEntry]) {
        self.have_leave(hosted.iter().map(|entry| (entry.shard, entry.id)));
    }

    /// Have volumes give up their files. The error that led here is the one to tell of.
    fn have_leave(&mut self, volumes: impl Iterator<Item = (usize, VolumeId)>) {
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

    /// Have volumes move to their threads. Those that have are `hosted`, though
    /// another cannot: they are not in the registry yet, in which others may look while
    /// this waits.
    fn host(
        &mut self,
        volumes: Vec<OpenVolume>,
        hosted: &mut Vec<VolumeEntry>,
    ) -> Result<(), Refused> {
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
                Ok(views) => hosted.push(moving::end(entry, facts, &views)),
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
        known: Known::default(),
        behaviour: None,
    }
}
