//! `cow merge`: a disk is rolled back to a snapshot, by the engine and by the same
//! rules as in a server, without one.
//!
//! - The disk's list has the store marked as merging, durably, before the first byte
//!   of the disk changes (durability.md, rule 12): whoever comes after a crash, this
//!   tool or a server, goes on with it.
//! - The disk's other snapshots are served, and theirs: they get their copies first
//!   (rule 12), and one that is not there is a refusal (rule 7). One that others were
//!   taken of is not merged.
//! - A snapshot of a snapshot is merged into that; the disk stays as it is.
//! - Each step is durable before the next: what is cut off at any moment is taken up
//!   again by the same command.
//!
//! A merge that the kernel or LVM began is a store whose list is shorter; it is taken
//! up like any other, once the operator says that it belongs to the disk (`adopt`).
//!
//! `drive.rs` has the engine come to the end of the merge, `disks.rs` does what it wants,
//! `ahead.rs` has the store read before that, `buffers.rs` has the memory.

mod ahead;
mod buffers;
mod disks;
mod drive;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use nbdsnap_engine::{
    Action, Device, DiskOp, OnFull, OpId, Outcome, SnapshotId, StoreKind, View, VolumeConfig,
};

use self::ahead::ReadAhead;
use self::disks::Disks;
use self::drive::{Outside, Stopped, drive};
use super::hints::fits_in_memory;
use super::open::disk_bytes;
use super::{CowError, CowStore, Reading};
use crate::disks::{
    Known, Merging, Opened, Plan, SnapshotRequest, Taken, Unrecorded, VolumeRequest, shown,
};
use crate::io::VolumeAccess;
use crate::law;
use crate::names;
use crate::server::setup::{OpenDisk, OpenVolume};
use crate::state::admission;
use crate::state::attached::{Attached, Mark};
use crate::state::files::SystemFiles;
use crate::state::keeper::{Keeper, StateError};
use crate::state::place::settled;
use crate::state::record::State;

/// The name of the one volume there is.
const VOLUME: &str = "disk";

/// Copied in a step. Nobody waits for it; each step waits for two flushes, and the more
/// there is in a step, the more of it lies together on the disk. What a crash cuts off
/// is copied once more.
const STEP: u64 = 512 << 20;

/// The same where the page cache can hold what is read and what is written in it, and
/// what is read ahead.
const LARGE_STEP: u64 = 2 << 30;

/// On its way at a time: some pieces, for what lies together in the store lies together
/// on the disk here and there only.
const MEMORY: u64 = 4 << 20;

/// In one read or write. The page cache takes what is written in one call in pages of up
/// to its size: from 2 MiB on these are huge ones, and those are the free memory that a
/// virtual machine has given back to its host. To get it anew takes several times as
/// long as the copy.
const PIECE: u64 = 512 << 10;

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// The snapshot's store.
    pub cow: &'a Path,
    /// The disk.
    pub origin: &'a Path,
    /// The store has seen every write to the disk, though the disk's list does not
    /// name it.
    pub adopt: bool,
    /// Stores of the disk that are given up.
    pub without: &'a [PathBuf],
}

/// Roll the disk back. Answers how many chunks were merged; `progress` is told how
/// many bytes are done.
pub fn run(wanted: Wanted<'_>, progress: &mut dyn FnMut(u64)) -> Result<u64, CowError> {
    let origin_bytes = disk_bytes(wanted.origin)?;
    // What cannot be merged is refused before anything else is looked at.
    CowStore::open(wanted.cow, Reading::Alone)?.insist_on_soundness(Some(origin_bytes))?;
    let mut keeper = Keeper::open(SystemFiles, None).map_err(records)?;
    let list = keeper.list(wanted.origin).map_err(records)?;
    let mut called = names_in(&list);
    let name = match called.remove(&settled(wanted.cow)) {
        Some(name) => name,
        None => unused_name(&called),
    };
    let mut taken = Taken::default();
    let plan = plan(&keeper, wanted, &list, (&name, &called), &mut taken)?;
    let offered = plan.offered();
    for volume in &offered {
        admission::admit(&keeper, volume, wanted.without)?;
        let mut stores = volume.stores.iter();
        if let Some(other) = stores.find(|one| names::depends(&one.snapshot, &name)) {
            return Err(CowError::Depended {
                cow: wanted.cow.to_owned(),
                other: other.cow.clone(),
            });
        }
    }
    let merging = admission::state_with(&keeper, offered.iter().map(Into::into).collect());
    let mut merged = merging.clone();
    merged.remove_snapshot(VOLUME, &name);

    let mut change = keeper.begin(merging, Vec::new()).map_err(records)?;
    let Opened { volumes, .. } = match plan.carry_out(&mut Unrecorded) {
        Ok(opened) => opened,
        Err(refusal) => {
            keeper.abandon(change).map_err(records)?;
            return Err(refusal.into());
        }
    };
    // From here on a restart goes on with the merge.
    keeper.commit(&mut change).map_err(records)?;
    keeper.finish(change).map_err(records)?;
    let mut chunks = 0;
    for volume in volumes {
        chunks += merge(volume, &name, &mut keeper, progress)?;
    }
    settle(&mut keeper, merged)?;
    Ok(chunks)
}

/// What the stores of the list are called, by their paths: as the list says, but each
/// by the name that what it is of has here, and no two alike. (The list of a disk that
/// was shared names snapshots of several volumes.)
fn names_in(list: &Attached) -> BTreeMap<PathBuf, String> {
    let mut called = BTreeMap::<PathBuf, String>::new();
    let mut taken = BTreeSet::new();
    let mut stores: Vec<_> = list.stores.iter().collect();
    stores.sort_by_key(|one| names::depth(&one.snapshot));
    for store in stores {
        let below = store.is_of().and_then(|of| called.get(of));
        let mut name = match below {
            Some(below) => names::path(Some(below), names::last(&store.snapshot)),
            None => store.snapshot.clone(),
        };
        while !taken.insert(name.clone()) {
            name.push('+');
        }
        called.insert(store.cow.clone(), name);
    }
    called
}

/// A name for a store that the list does not have.
fn unused_name(called: &BTreeMap<PathBuf, String>) -> String {
    (0..=called.len())
        .map(|n| format!("merge{n}"))
        .find(|name| called.values().all(|one| one != name))
        .expect("more names than stores")
}

/// The disk with the store that is merged, and with all others of its list.
fn plan(
    keeper: &Keeper<SystemFiles>,
    wanted: Wanted<'_>,
    list: &Attached,
    (name, called): (&str, &BTreeMap<PathBuf, String>),
    taken: &mut Taken,
) -> Result<Plan, CowError> {
    let ours = settled(wanted.cow);
    let mut other = list.stores.iter().filter(|one| one.cow != ours);
    if let Some(other) = other.find(|one| one.mark == Mark::Merging) {
        return Err(CowError::Merging {
            disk: wanted.origin.to_owned(),
            other: other.cow.clone(),
        });
    }
    let given_up: Vec<PathBuf> = wanted.without.iter().map(|path| settled(path)).collect();
    let siblings = list
        .stores
        .iter()
        .filter(|one| one.cow != ours && one.mark == Mark::Attached)
        .filter(|one| !given_up.contains(&one.cow));
    let siblings = siblings.map(|one| request(&called[&one.cow], &one.cow, false));
    let request = VolumeRequest {
        name: VOLUME.to_owned(),
        path: wanted.origin.to_owned(),
        access: VolumeAccess::ReadWrite,
        snapshots: std::iter::once(request(name, wanted.cow, wanted.adopt))
            .chain(siblings)
            .collect(),
    };
    let mut requests = admission::as_listed(keeper, vec![request]).map_err(records)?;
    for snapshot in requests.iter_mut().flat_map(|one| &mut one.snapshots) {
        let delete_cow = snapshot.known.merging.is_some_and(|merge| merge.delete_cow);
        snapshot.known.merging = (snapshot.name == name).then_some(Merging { delete_cow });
    }
    Ok(crate::disks::inspect(requests, taken)?)
}

fn request(name: &str, cow: &Path, adopt: bool) -> SnapshotRequest {
    SnapshotRequest {
        name: name.to_owned(),
        cow: cow.to_owned(),
        kind: StoreKind::Persistent,
        chunk: None,
        size: None,
        read_only: false,
        format: false,
        adopt,
        must_exist: true,
        known: Known::default(),
        behaviour: None,
    }
}

/// Have the engine merge, and do what it wants of the disks.
fn merge(
    volume: OpenVolume,
    name: &str,
    keeper: &mut Keeper<SystemFiles>,
    progress: &mut dyn FnMut(u64),
) -> Result<u64, CowError> {
    let OpenVolume {
        disk, snapshots, ..
    } = volume;
    let mut engine = law::new_tree(VolumeConfig {
        origin_bytes: disk.bytes,
        copy_memory: MEMORY,
        copy_piece: PIECE,
    });
    let step = if fits_in_memory(3 * LARGE_STEP) {
        LARGE_STEP
    } else {
        STEP
    };
    engine.set_merge_step(step);
    let mut stores: Vec<(SnapshotId, OpenDisk)> = Vec::new();
    let mut views = BTreeMap::new();
    let mut merging = None;
    let mut snapshots = snapshots;
    snapshots.sort_by_key(|one| names::depth(&one.name));
    for snapshot in snapshots {
        let of = names::origin(&snapshot.name).map_or(View::Origin, |of| views[of]);
        let id = if snapshot.name == name {
            let (size, count) = (
                snapshot.store.chunk_size(),
                snapshot.store.exception_count(),
            );
            let id = engine.attach_merging(of, snapshot.store);
            merging = Some((id, ReadAhead::new(size, step, count)));
            id
        } else {
            let id = engine.attach_snapshot(of, snapshot.store);
            // One that is full stops the merge, rather than be lost for it.
            engine.set_on_full(id, OnFull::Pause);
            id
        };
        views.insert(snapshot.name, View::Snapshot(id));
        stores.push((id, snapshot.disk));
    }
    let (merged, ahead) = merging.expect("the disk is opened with the store that is merged");
    let mut around = Around {
        disks: Disks::new(disk, stores, PIECE),
        merged,
        ahead,
        written: 0,
        keeper,
        progress,
    };
    drive(&mut engine, merged, &mut around).map_err(|why| stopped(&around.disks.origin, why))
}

/// What a merge has around it: the disks, and the disk's list.
struct Around<'a> {
    disks: Disks,
    /// The snapshot that is merged.
    merged: SnapshotId,
    ahead: ReadAhead,
    /// Bytes that were written to what it is merged into, and copied before that.
    written: u64,
    keeper: &'a mut Keeper<SystemFiles>,
    progress: &'a mut dyn FnMut(u64),
}

impl Outside for Around<'_> {
    fn left(&mut self, chunks: u64) {
        self.ahead.left(self.disks.store(self.merged), chunks);
    }

    fn perform(&mut self, ops: Vec<DiskOp>, ended: &mut dyn FnMut(OpId, Outcome)) {
        for op in &ops {
            if let Action::Write { data, .. } = &op.action
                && op.device != Device::Cow(self.merged)
            {
                self.written += data.iter().map(|piece| piece.len() as u64).sum::<u64>();
            }
        }
        self.disks.perform(ops, ended);
        (self.progress)(self.written);
    }

    fn mark_lost(&mut self, id: SnapshotId) -> bool {
        let (disk, cow) = (&self.disks.origin.path, &self.disks.store(id).path);
        let marked = self.keeper.mark_lost(&settled(disk), &settled(cow));
        if let Err(error) = &marked {
            tracing::error!("the loss of a snapshot is not marked: {error}");
        }
        marked.unwrap_or(false)
    }

    fn lost(&mut self, id: SnapshotId, why: &'static str) {
        let path = &self.disks.store(id).path;
        tracing::error!("{}: the snapshot is lost: {why}", shown(path));
    }
}

/// A merge that has stopped halfway: it can be gone on with.
fn stopped(disk: &OpenDisk, why: Stopped) -> CowError {
    let why = match why {
        Stopped::Failed(why) => why,
        Stopped::NoRoom => {
            "the store of another snapshot of the disk is full, and that snapshot would be lost: extend it, or give it up with --without"
        }
    };
    CowError::Program {
        program: "merge",
        error: format!(
            "{}: is a mixture of two times, and not to be used until the merge has gone on: {why}; then run the same command again",
            shown(&disk.path)
        ),
    }
}

/// The store is merged, and on the list no more.
fn settle(keeper: &mut Keeper<SystemFiles>, next: State) -> Result<(), CowError> {
    let mut change = keeper.begin(next, Vec::new()).map_err(records)?;
    keeper.commit(&mut change).map_err(records)?;
    keeper.finish(change).map_err(records)
}

#[expect(clippy::needless_pass_by_value, reason = "handed to map_err")]
fn records(error: StateError) -> CowError {
    CowError::Program {
        program: "records",
        error: error.to_string(),
    }
}
