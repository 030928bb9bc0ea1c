//! Opening, checking, locking and making disks and COW stores, in two halves:
//!
//! 1. [`inspect`] opens, locks and reads everything that was asked for and
//!    changes nothing: what is refused is refused here, with every file as it
//!    was.
//! 2. [`Plan::carry_out`] makes, grows, formats and repairs. It is called when
//!    nothing else can be refused any more; where it fails all the same (a full
//!    disk), it takes back what it made.
//!
//! Called by the command line; its outcome goes to the server. [`SnapshotPlan`]
//! does the same for snapshots of volumes that are being served.

mod cow;
mod identity;
mod live;
mod make;
mod making;
mod offered;
mod open;
mod refusal;
mod signature;
mod store_io;
#[cfg(test)]
mod tests;
mod together;

use std::fs::File;
use std::path::PathBuf;

use nbdsnap_engine::StoreKind;

use crate::io::VolumeAccess;
use crate::names;
use crate::server::setup::{Defaults, OpenDisk, OpenVolume};
use cow::PlannedCow;
use identity::Role;

pub use cow::{Origin, all_it_needs};
pub use identity::Taken;
pub use live::{Deed, Made, SnapshotPlan, default_cow};
pub use making::{Making, Unrecorded};
pub use offered::{OfferedStore, OfferedVolume};
pub(crate) use open::{Opening, existing};
pub use refusal::{Cause, Refusal, shown};
pub(crate) use signature::{Contents, contents};
pub(crate) use store_io::sync_folder_of;

/// A volume that shall be served.
#[derive(Clone, Debug)]
pub struct VolumeRequest {
    /// The export's name.
    pub name: String,
    /// The origin: a file or a block device.
    pub path: PathBuf,
    /// What may change on the origin and its stores.
    pub access: VolumeAccess,
    /// Its snapshots.
    pub snapshots: Vec<SnapshotRequest>,
}

/// A snapshot of it.
#[derive(Clone, Debug)]
pub struct SnapshotRequest {
    /// Its path within the volume, which says what it is of (`names`).
    pub name: String,
    /// The COW store.
    pub cow: PathBuf,
    /// P, PO or N.
    pub kind: StoreKind,
    /// The chunk size of a store that is to be made, in bytes, as it was asked for.
    pub chunk: Option<u64>,
    /// How large a file may grow, in bytes.
    pub size: Option<u64>,
    /// Writes are refused.
    pub read_only: bool,
    /// Make a store even where something else is.
    pub format: bool,
    /// The operator says that the store has seen every write to the disk, though
    /// the disk's list does not name it.
    pub adopt: bool,
    /// There must be a store already.
    pub must_exist: bool,
    /// What the records say of it, if it was there before.
    pub known: Known,
    /// How it behaves; none: as the server was told.
    pub behaviour: Option<Defaults>,
}

/// What the records say of a snapshot that was there before, and its store does not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// How large the disk was at its instant, in bytes.
    pub bytes: Option<u64>,
    /// When that was, in seconds since 1970.
    pub taken_at: Option<u64>,
    /// It is being merged into the disk, and that goes on.
    pub merging: Option<Merging>,
}

/// A merge that has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Merging {
    /// The file of the store is deleted at the end.
    pub delete_cow: bool,
}

/// The past of a snapshot whose store has been looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Past {
    /// Its length: that of the disk at its instant.
    pub bytes: u64,
    /// When that was, in seconds since 1970, if anybody knows; for a store that is to
    /// be made, when that was planned.
    pub taken_at: Option<u64>,
    /// It is being merged into the disk, and that goes on.
    pub merging: Option<Merging>,
}

impl Past {
    fn of(wanted: &SnapshotRequest, origin: &Origin, cow: &PlannedCow) -> Self {
        Self {
            bytes: wanted.length(origin),
            taken_at: match cow {
                PlannedCow::New(_) => Some(now()),
                PlannedCow::Whole { .. } | PlannedCow::Torn { .. } => wanted.known.taken_at,
            },
            merging: wanted.known.merging,
        }
    }
}

impl VolumeRequest {
    /// What a snapshot is of: the volume's disk, or as long as the snapshot that it was
    /// taken of, which must be served too. One that outlives the server cannot be of
    /// one that does not.
    fn origin_of(&self, wanted: &SnapshotRequest, disk: Origin) -> Result<Origin, Refusal> {
        let Some(path) = names::origin(&wanted.name) else {
            return Ok(disk);
        };
        let of = names::export(&self.name, path);
        let Some(under) = self.snapshots.iter().find(|one| one.name == path) else {
            return Err(Refusal::new(&wanted.cow, Cause::NoOrigin(of)));
        };
        if under.kind == StoreKind::Transient && wanted.kind != StoreKind::Transient {
            return Err(Refusal::new(&wanted.cow, Cause::OfTransient(of)));
        }
        let below = self.origin_of(under, disk)?;
        let bytes = under.length(&below);
        Ok(Origin { bytes, ..below })
    }
}

impl SnapshotRequest {
    /// How long the snapshot is, in bytes.
    fn length(&self, origin: &Origin) -> u64 {
        let known = self.known.bytes;
        known.map_or(origin.bytes, |bytes| bytes.min(origin.bytes))
    }
}

/// Now, in seconds since 1970.
pub(crate) fn now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// What [`inspect`] found: everything open and locked, and what is to be done.
#[derive(Debug, Default)]
pub struct Plan {
    volumes: Vec<PlannedVolume>,
    notes: Vec<Note>,
}

#[derive(Debug)]
struct PlannedVolume {
    name: String,
    disk: OpenDisk,
    access: VolumeAccess,
    snapshots: Vec<PlannedSnapshot>,
}

#[derive(Debug)]
struct PlannedSnapshot {
    name: String,
    read_only: bool,
    kind: StoreKind,
    /// How far its file may grow, as it was asked for.
    limit: Option<u64>,
    adopted: bool,
    past: Past,
    behaviour: Option<Defaults>,
    cow: PlannedCow,
}

/// Something that the operator should hear once everything is in place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// What was asked for is not quite what happens.
    Warning(String),
    /// As it should be.
    Info(String),
}

/// Everything open, locked and made.
#[derive(Debug)]
pub struct Opened {
    /// What to serve.
    pub volumes: Vec<OpenVolume>,
    /// What to tell.
    pub notes: Vec<Note>,
}

/// The file of a transient store that began empty. What it holds means nothing
/// once the server has stopped, so that [`Scratch::discard`] empties it again
/// and the same command line works the next time.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    file: File,
}

impl Scratch {
    /// Empty the file. Call it when nobody uses the store any more.
    pub fn discard(self) -> std::io::Result<()> {
        tracing::debug!(path = %self.path.display(), "emptying the transient store");
        self.file.set_len(0)
    }
}

/// Open, lock and check everything, changing nothing.
pub fn inspect(requests: Vec<VolumeRequest>, taken: &mut Taken) -> Result<Plan, Refusal> {
    let mut plan = Plan::default();
    plan.add(requests, taken)?;
    Ok(plan)
}

fn plan_snapshot(
    wanted: &SnapshotRequest,
    origin: &Origin,
    found: open::Found,
) -> Result<(PlannedSnapshot, Vec<Note>), Refusal> {
    let mut notes = Vec::new();
    let cow = cow::plan(wanted, origin, found, &mut notes)?;
    let snapshot = PlannedSnapshot {
        name: wanted.name.clone(),
        read_only: wanted.read_only || !origin.access.writes_stores(),
        kind: wanted.kind,
        limit: wanted.size,
        adopted: wanted.adopt,
        past: Past::of(wanted, origin, &cow),
        behaviour: wanted.behaviour,
        cow,
    };
    Ok((snapshot, notes))
}

impl Plan {
    /// Open, lock and check these too. What is refused is not in the plan, nor in
    /// `taken`.
    pub fn add(&mut self, requests: Vec<VolumeRequest>, taken: &mut Taken) -> Result<(), Refusal> {
        let before = taken.mark();
        match self.inspect(requests, taken) {
            Ok(volumes) => self.volumes.extend(volumes),
            Err(refusal) => {
                taken.back_to(before);
                return Err(refusal);
            }
        }
        Ok(())
    }

    fn inspect(
        &mut self,
        requests: Vec<VolumeRequest>,
        taken: &mut Taken,
    ) -> Result<Vec<PlannedVolume>, Refusal> {
        // All origins first: a store that is somebody's origin is then refused by
        // that name, whatever the order of the arguments.
        let mut origins = Vec::new();
        for request in requests {
            let disk = open::origin(&request, taken)?;
            origins.push((request, disk));
        }
        let mut cows = Vec::new();
        for (request, disk) in &origins {
            for wanted in &request.snapshots {
                let origin = request.origin_of(wanted, Origin::of(disk, request.access))?;
                let role = Role::Cow(names::export(&request.name, &wanted.name));
                let found = open::cow(&wanted.cow, request.access, role, taken)?;
                cows.push((wanted, origin, found));
            }
        }
        // Each may wait for a flush.
        let planned = together::each(cows, |(wanted, origin, found)| {
            plan_snapshot(wanted, &origin, found)
        });
        let mut snapshots = Vec::new();
        for one in planned {
            let (snapshot, notes) = one?;
            snapshots.push(snapshot);
            self.notes.extend(notes);
        }
        let mut snapshots = snapshots.into_iter();
        let volumes = origins.into_iter().map(|(request, disk)| PlannedVolume {
            name: request.name,
            disk,
            access: request.access,
            snapshots: snapshots.by_ref().take(request.snapshots.len()).collect(),
        });
        Ok(volumes.collect())
    }

    /// Take the last volumes that were added out again: they are not served after all.
    pub fn drop_last(&mut self, count: usize, taken: &mut Taken) {
        for volume in self.volumes.drain(self.volumes.len() - count..) {
            taken.give_back_volume(&volume.name);
        }
    }
}
