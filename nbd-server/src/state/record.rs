//! The records of a state folder: what a server has, and what it is about to do.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::attached::{Anew, Attached, AttachedStore, Mark};
use super::files::{FileIdentity, beside};
use super::seal;
use crate::control::protocol::{Growth, Kind, WhenFull};
use crate::names;

/// A snapshot that a server has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// Its path within the volume, which says what it is of (`names`).
    pub name: String,
    /// Its store, absolute.
    #[serde(with = "seal::path")]
    pub cow: PathBuf,
    /// P, PO or N.
    pub kind: Kind,
    /// How far its file may grow, in bytes; none for a device.
    pub limit: Option<u64>,
    /// How large its disk was at its instant, in bytes.
    #[serde(default)]
    pub bytes: Option<u64>,
    /// Writes to it are refused.
    #[serde(default)]
    pub read_only: bool,
    /// What happens when it is full.
    #[serde(default)]
    pub on_full: WhenFull,
    /// How it is extended by itself.
    #[serde(default)]
    pub auto_extend: Option<Growth>,
    /// When that was, in seconds since 1970; none: nobody has written it down.
    #[serde(default)]
    pub taken_at: Option<u64>,
    /// It is being merged into what it was taken of.
    #[serde(default)]
    pub merging: bool,
    /// At the end of that its file is deleted.
    #[serde(default)]
    pub delete_cow: bool,
    /// The file that is about to take the store's place.
    #[serde(default)]
    pub anew: Option<Anew>,
}

/// A volume that a server has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// The export's name.
    pub name: String,
    /// The origin, absolute.
    #[serde(with = "seal::path")]
    pub disk: PathBuf,
    /// Nothing may change on it or its stores.
    #[serde(default)]
    pub read_only: bool,
    /// The origin is only read, and other volumes may have the same; stores are written.
    #[serde(default)]
    pub shared: bool,
    /// In the order in which they were taken.
    pub snapshots: Vec<SnapshotRecord>,
}

/// All that a server has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// In the order in which they came.
    pub volumes: Vec<VolumeRecord>,
}

impl State {
    /// What the list of each disk has to say, if this state is true. A transient
    /// store is on no list, since nothing of it outlives a server; a disk that is
    /// served read-only has none that this server may write.
    pub fn lists(&self) -> BTreeMap<&Path, Attached> {
        let mut lists = BTreeMap::<&Path, Attached>::new();
        for volume in self.volumes.iter().filter(|volume| !volume.read_only) {
            let stores = volume
                .snapshots
                .iter()
                .filter(|snapshot| snapshot.kind != Kind::Transient)
                .map(|snapshot| snapshot.attached(volume.store_below(&snapshot.name)));
            lists.entry(&volume.disk).or_default().stores.extend(stores);
        }
        lists
    }

    /// Whether a disk is one that several may have.
    pub fn shares(&self, disk: &Path) -> bool {
        let mut volumes = self.volumes.iter();
        volumes.any(|volume| volume.shared && volume.disk == disk)
    }

    /// Of a shared disk's stores, those of which `next` says something else than this
    /// state does: they join the list, change on it or leave it. A volume that leaves
    /// the server has its stores stay. `before` and `after` are what the two states
    /// say of the disk.
    pub fn changed_stores(
        &self,
        next: &Self,
        disk: &Path,
        before: &Attached,
        after: &Attached,
    ) -> Vec<StorePath> {
        let (known, kept) = (before.by_cow(), after.by_cow());
        let joins = |one: &&AttachedStore| known.get(one.cow.as_os_str()) != Some(one);
        let joining = after.stores.iter().filter(joins);
        let mut changed: Vec<StorePath> = joining.map(|one| StorePath(one.cow.clone())).collect();
        let stays = next.by_name();
        let here = self.volumes.iter().filter(|volume| volume.disk == disk);
        for volume in here.filter(|volume| stays.contains_key(volume.name.as_str())) {
            let cows = volume.snapshots.iter().map(|snapshot| &snapshot.cow);
            let leaving = cows.filter(|cow| !kept.contains_key(cow.as_os_str()));
            changed.extend(leaving.map(|cow| StorePath(cow.clone())));
        }
        changed
    }

    /// The volumes by their names.
    pub fn by_name(&self) -> BTreeMap<&str, &VolumeRecord> {
        let volumes = self.volumes.iter();
        volumes
            .map(|volume| (volume.name.as_str(), volume))
            .collect()
    }

    /// This state, but of the volumes that are named what is said of each: it is so
    /// now, in its place or, if it is new, behind the others; or it is not there.
    #[must_use]
    pub fn with(&self, said: &[(&str, Option<&VolumeRecord>)]) -> Self {
        let mut left: BTreeMap<&str, Option<&VolumeRecord>> = said.iter().copied().collect();
        let mut volumes = Vec::new();
        for volume in &self.volumes {
            let now = left.remove(volume.name.as_str()).unwrap_or(Some(volume));
            volumes.extend(now.cloned());
        }
        let new = said.iter().filter_map(|(name, _)| left.remove(name));
        volumes.extend(new.flatten().cloned());
        Self { volumes }
    }

    /// A snapshot, by the names of its volume and its own.
    pub fn snapshot_mut(&mut self, volume: &str, snapshot: &str) -> Option<&mut SnapshotRecord> {
        let mut volumes = self.volumes.iter_mut();
        let volume = volumes.find(|one| one.name == volume)?;
        volume.snapshots.iter_mut().find(|one| one.name == snapshot)
    }

    /// Every snapshot of a volume of which `of` says a new path is called that.
    pub fn rename_snapshots(&mut self, volume: &str, of: impl Fn(&str) -> Option<String>) {
        let volumes = self.volumes.iter_mut().filter(|one| one.name == volume);
        for snapshot in volumes.flat_map(|one| &mut one.snapshots) {
            if let Some(new) = of(&snapshot.name) {
                snapshot.name = new;
            }
        }
    }

    /// Strike a snapshot out.
    pub fn remove_snapshot(&mut self, volume: &str, snapshot: &str) {
        for one in self.volumes.iter_mut().filter(|one| one.name == volume) {
            one.snapshots.retain(|one| one.name != snapshot);
        }
    }

    /// Every store that a snapshot names.
    pub fn cows(&self) -> BTreeSet<&OsStr> {
        self.volumes
            .iter()
            .flat_map(|volume| &volume.snapshots)
            .map(|snapshot| snapshot.cow.as_os_str())
            .collect()
    }
}

impl VolumeRecord {
    /// The store of the snapshot that another was taken of; none: it is of the disk.
    fn store_below(&self, path: &str) -> Option<StorePath> {
        let of = names::origin(path)?;
        let below = self.snapshots.iter().find(|one| one.name == of);
        below.map(|below| StorePath(below.cow.clone()))
    }
}

impl SnapshotRecord {
    /// Settle a change of the store's file, given which one lies there.
    pub(super) fn settle_anew(&mut self, there: Option<FileIdentity>) {
        if let Some(anew) = self.anew.take().filter(|anew| Some(anew.file) == there) {
            self.bytes = Some(anew.bytes);
            self.taken_at = anew.taken_at;
        }
    }

    fn attached(&self, of: Option<StorePath>) -> AttachedStore {
        AttachedStore {
            snapshot: self.name.clone(),
            cow: self.cow.clone(),
            of,
            bytes: self.bytes,
            taken_at: self.taken_at,
            delete_cow: self.delete_cow,
            anew: self.anew,
            mark: if self.merging {
                Mark::Merging
            } else {
                Mark::Attached
            },
        }
    }
}

/// A file that a change makes or gives up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IntentFile {
    /// Where.
    #[serde(with = "seal::path")]
    pub path: PathBuf,
    /// Which file that is; none as long as it is still to be made.
    pub identity: Option<FileIdentity>,
    /// What stands behind `path` in the name under which it is made: a name that
    /// nobody else would choose, so that whatever has it is ours.
    pub making: Option<String>,
}

impl IntentFile {
    /// A file that is to be made at `path`, where nothing is.
    pub fn to_make(path: PathBuf) -> Self {
        let random = RandomState::new().hash_one(&path);
        Self {
            path,
            identity: None,
            making: Some(format!(".{random:016x}.new")),
        }
    }

    /// A file that is given up.
    pub fn given_up(path: PathBuf, identity: FileIdentity) -> Self {
        Self {
            path,
            identity: Some(identity),
            making: None,
        }
    }

    /// The name under which it is made.
    pub fn made_as(&self) -> Option<PathBuf> {
        self.making
            .as_ref()
            .map(|suffix| beside(&self.path, suffix))
    }
}

/// What a change is about: enough to settle it after a crash.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// The disks whose lists change, with where those lists are.
    pub lists: Vec<IntentList>,
    /// Files that belong to nobody if no snapshot of the state names them.
    pub files: Vec<IntentFile>,
}

/// A list that a change is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IntentList {
    /// The disk.
    #[serde(with = "seal::path")]
    pub disk: PathBuf,
    /// Its list.
    #[serde(with = "seal::path")]
    pub list: PathBuf,
    /// Of a disk that others may share, the stores that the change is about: what
    /// else is on the list is not this server's to change. None: the list says what
    /// the state says.
    #[serde(default)]
    pub about: Option<Vec<StorePath>>,
}

/// The path of a store, in a list of such.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StorePath(#[serde(with = "seal::path")] pub PathBuf);
