//! What a plan is about, for those who judge it before it is carried out.

use std::path::PathBuf;

use nbdsnap_engine::StoreKind;

use super::cow::{Place, PlannedCow};
use super::live::SnapshotPlan;
use super::{Past, Plan, PlannedSnapshot, PlannedVolume};
use crate::io::VolumeAccess;
use crate::server::setup::Defaults;

/// A volume that shall be served.
#[derive(Clone, Debug)]
pub struct OfferedVolume {
    /// The export's name.
    pub name: String,
    /// The origin, as it was named.
    pub disk: PathBuf,
    /// What may change on it and its stores.
    pub access: VolumeAccess,
    /// Its stores.
    pub stores: Vec<OfferedStore>,
}

/// A store that shall be served.
#[derive(Clone, Debug)]
pub struct OfferedStore {
    /// Its path within the volume, which says what it is of (`names`).
    pub snapshot: String,
    /// Where it is, as it was named.
    pub cow: PathBuf,
    /// P, PO or N.
    pub kind: StoreKind,
    /// How far its file may grow, as it was asked for, in bytes.
    pub limit: Option<u64>,
    /// Writes are refused.
    pub read_only: bool,
    /// A valid store is there. False: one is to be made, or it is invalid.
    pub is_old: bool,
    /// A store is to be made.
    pub is_new: bool,
    /// There is no file yet.
    pub is_missing: bool,
    /// The operator says that it has seen every write.
    pub adopted: bool,
    /// Its length, and what else the records say of it.
    pub past: Past,
    /// How it behaves, if that was said.
    pub behaviour: Option<Defaults>,
}

impl Plan {
    /// What shall be served.
    pub fn offered(&self) -> Vec<OfferedVolume> {
        self.volumes.iter().map(offered_volume).collect()
    }

    /// The last `count` that were added.
    pub fn last_offered(&self, count: usize) -> Vec<OfferedVolume> {
        let before = self.volumes.len() - count;
        self.volumes[before..].iter().map(offered_volume).collect()
    }
}

impl SnapshotPlan {
    /// The stores that shall be made, in the order in which they were added.
    pub fn offered(&self) -> Vec<OfferedStore> {
        self.snapshots.iter().map(offered).collect()
    }
}

fn offered_volume(volume: &PlannedVolume) -> OfferedVolume {
    OfferedVolume {
        name: volume.name.clone(),
        disk: volume.disk.path.clone(),
        access: volume.access,
        stores: volume.snapshots.iter().map(offered).collect(),
    }
}

fn offered(snapshot: &PlannedSnapshot) -> OfferedStore {
    let (cow, is_old, is_missing) = match &snapshot.cow {
        PlannedCow::Whole { disk, store } => (&disk.path, !store.is_invalid(), false),
        PlannedCow::Torn { disk, .. } => (&disk.path, true, false),
        PlannedCow::New(new) => match &new.place {
            Place::Missing(path) => (path, false, true),
            Place::Empty(disk) | Place::Overwrite(disk) => (&disk.path, false, false),
        },
    };
    OfferedStore {
        snapshot: snapshot.name.clone(),
        cow: cow.clone(),
        kind: snapshot.kind,
        limit: snapshot.limit,
        read_only: snapshot.read_only,
        is_old,
        is_new: matches!(snapshot.cow, PlannedCow::New(_)),
        is_missing,
        adopted: snapshot.adopted,
        past: snapshot.past,
        behaviour: snapshot.behaviour,
    }
}
