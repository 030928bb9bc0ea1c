//! `volume add`: disks join a running server, with their snapshots.
//!
//! What has to be durable for one volume is made durable for many at the same
//! price, so volumes are added in groups: those of one order, all of them or none,
//! and those of orders that wait behind each other, as one group as long as nothing
//! goes wrong, else each order by itself. One group is added after the other; one that
//! waits for a volume's thread for long lets the next begin.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use tokio::sync::oneshot;

use super::claims::{Claimed, Scope};
use super::create::{RecordedAside, log_notes};
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
use crate::state::admission::{admit, as_listed, files_to_make};
use crate::state::keeper::Change;
use crate::state::record::{State, VolumeRecord};

/// So many orders are one group at most: who follows does not wait for ever.
const ORDERS_MAX: usize = 256;

/// What an order asks for, and where its outcome goes.
#[derive(Debug)]
struct Asked {
    volumes: Vec<VolumeAdd>,
    answer: oneshot::Sender<Outcome>,
}

/// An order to add volumes, with what it has claimed.
#[derive(Debug)]
pub(super) struct Addition {
    asked: Asked,
    claimed: Claimed,
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

/// Orders to add volumes.
#[derive(Debug, Default)]
pub(super) struct Additions {
    /// Those that have what they claim, and wait for their group.
    waiting: Mutex<Vec<Addition>>,
    gate: Mutex<()>,
}

/// Held by the group whose turn it is.
pub(super) type Gate<'a> = MutexGuard<'a, ()>;

impl Additions {
    /// Those that wait.
    pub(super) fn waiting(&self) -> MutexGuard<'_, Vec<Addition>> {
        self.waiting.lock().expect("no holder of this lock panics")
    }

    /// Wait until a group may begin.
    pub(super) fn gate(&self) -> Gate<'_> {
        self.gate.lock().expect("no order panics")
    }

    /// The next group: what it asks for, and what it has claimed. None: those that
    /// waited are in a group already.
    fn group(&self) -> Option<(Vec<Asked>, Claimed)> {
        let mut waiting = self.waiting();
        let count = waiting.len().min(ORDERS_MAX);
        let mut orders = Vec::new();
        let mut all: Option<Claimed> = None;
        for addition in waiting.drain(..count) {
            let claimed = addition.claimed;
            orders.push(addition.asked);
            all = Some(match all {
                Some(all) => all.and(claimed),
                None => claimed,
            });
        }
        Some((orders, all?))
    }
}

impl Shared {
    /// Add volumes, as soon as nobody else is busy with their names: with what others
    /// ask for who wait for their turn too. Whoever has it first adds for all.
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
        let asked = Asked { volumes, answer };
        self.additions.waiting().push(Addition { asked, claimed });
        let gate = self.additions.gate();
        if let Some((group, claimed)) = self.additions.group() {
            self.turn_with(claimed, Some(gate)).add_all(group);
        }
    }
}

impl Turn<'_> {
    /// Add what these orders ask for, as one group if nothing goes wrong.
    fn add_all(&mut self, orders: Vec<Asked>) {
        let together = orders.len() > 1 && {
            let volumes: Vec<&VolumeAdd> = orders.iter().flat_map(|one| &one.volumes).collect();
            self.add_volumes(&volumes).is_ok()
        };
        for Asked { volumes, answer } in orders {
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
            if self.registry.volume(&add.name).is_some() || self.registry.mapped.has(&add.name) {
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
        let requests = self.aside(|shared| as_listed(&shared.records(), requests))?;
        let plan = disks::inspect(requests, &mut self.taken)?;
        let offered = plan.offered();
        self.aside(|shared| {
            let records = shared.records();
            let mut each = offered.iter();
            each.try_for_each(|volume| admit(&records, volume, without))
        })?;
        let files = files_to_make(offered.iter().flat_map(|volume| &volume.stores));
        let edit = |next: &mut State| {
            let new: BTreeSet<&str> = offered.iter().map(|one| one.name.as_str()).collect();
            next.volumes.retain(|one| !new.contains(one.name.as_str()));
            next.volumes.extend(offered.iter().map(VolumeRecord::from));
        };
        let mut change = self.begin_change(edit, files)?;
        let mut hosted = Vec::new();
        let made = self.make_and_host(plan, &mut change, &mut hosted);
        if let Err(refused) = made.and_then(|()| self.commit(&mut change)) {
            self.unhost(&hosted);
            self.forget(change);
            return Err(refused);
        }
        self.registry.volumes.extend(hosted);
        self.publish();
        if let Err(error) = self.finish(change) {
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
        let opened = self.aside(|aside| plan.carry_out(&mut RecordedAside { aside, change }))?;
        opened.note(&mut self.taken);
        let Opened { volumes, notes } = opened;
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
    let fault = names::fault(&add.name).map(|why| (&*add.name, why));
    let mut paths = add.snapshots.iter().map(|one| &one.snapshot);
    if let Some((name, why)) = fault.or_else(|| paths.find_map(|path| names::path_fault(path))) {
        let name = name.to_owned();
        return Err(Refused::Name { name, why });
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
