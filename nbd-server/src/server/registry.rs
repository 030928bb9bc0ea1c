//! What a server serves: its volumes and their snapshots, by name, with where
//! each lives and what it was made with. The administrator owns it.

use std::cell::OnceCell;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use nbdsnap_engine::dm::DeviceInfo;
use nbdsnap_engine::{SnapshotId, StoreKind, View};

use super::directory::{Exports, Route};
use super::setup::{Defaults, OpenSnapshot};
use crate::cli::size;
use crate::control::protocol::SnapshotName;
pub(super) use crate::disks::now;
use crate::disks::{Merging, Origin, Scratch};
use crate::io::{MAPPED, MAPPED_SHARD, VolumeAccess, VolumeId, view_of};
use crate::names;
use crate::nbd::export::{BlockSize, Catalog, CatalogError, Export, transmission_flags};
use crate::state::files::{Files, SystemFiles};
use crate::state::place::settled;
use crate::state::record::{IntentFile, SnapshotRecord, VolumeRecord};

/// The volumes, in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Registry {
    pub(super) volumes: Vec<VolumeEntry>,
    /// Devices that have a table.
    pub(super) mapped: MappedEntries,
}

/// The mapped devices, as of some moment.
#[derive(Debug, Default)]
pub(super) struct MappedEntries {
    /// Of two looks at them the later one has the larger number.
    pub(super) number: u64,
    pub(super) devices: Vec<DeviceInfo>,
}

impl MappedEntries {
    pub(super) fn has(&self, name: &str) -> bool {
        self.devices.iter().any(|device| device.name == name)
    }
}

/// A volume that is served.
#[derive(Debug)]
pub(super) struct VolumeEntry {
    pub(super) name: String,
    pub(super) id: VolumeId,
    /// The thread that owns it.
    pub(super) shard: usize,
    pub(super) origin: Origin,
    pub(super) is_block_device: bool,
    pub(super) suspension: Suspension,
    /// How records call the disk, found out once.
    pub(super) recorded_disk: OnceCell<PathBuf>,
    /// In the order in which they came.
    pub(super) snapshots: Vec<SnapshotEntry>,
}

/// A snapshot of it, or of one of its snapshots.
#[derive(Debug)]
pub(super) struct SnapshotEntry {
    /// Its path within the volume, which says what it is of (`names`).
    pub(super) name: String,
    pub(super) id: SnapshotId,
    pub(super) cow: PathBuf,
    pub(super) cow_is_block_device: bool,
    /// The store's file, by device and inode: whether the path still leads to it.
    pub(super) cow_inode: Option<(u64, u64)>,
    pub(super) kind: StoreKind,
    /// How far its file may grow, as it was asked for.
    pub(super) limit: Option<u64>,
    pub(super) chunk_bytes: u64,
    pub(super) read_only: bool,
    /// Its size: what it was taken of had so much then.
    pub(super) bytes: u64,
    pub(super) behaviour: Defaults,
    pub(super) taken: Taken,
    pub(super) scratch: Option<Scratch>,
    pub(super) fill: FillRate,
    pub(super) merge: MergeState,
    /// How records call the store, found out once.
    recorded_cow: OnceCell<PathBuf>,
}

/// Whether a volume stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Suspension {
    /// It does not.
    Running,
    /// Until it is resumed.
    Suspended,
    /// Until then, at most.
    Until(Instant),
}

/// What has become of an order to merge a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MergeState {
    /// There is none.
    None,
    /// It waits until no client is attached to what it was taken of.
    Waiting { delete_cow: bool },
    /// That reads as the snapshot, which is no export any more.
    Begun { delete_cow: bool },
}

/// When a snapshot was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// Before this server: nobody has written down when.
    Before,
    /// When this server started, at this second.
    AtStart(u64),
    /// While it ran, or one before it.
    Live(u64),
}

impl Taken {
    /// Seconds since 1970.
    pub(super) fn at(self) -> Option<u64> {
        match self {
            Self::Before => None,
            Self::AtStart(at) | Self::Live(at) => Some(at),
        }
    }
}

/// Whoever reads it may be in another folder.
pub(super) fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// How fast a store fills: what was allocated when somebody looked last, or when
/// it came.
#[derive(Clone, Copy, Debug)]
pub(super) struct FillRate {
    since: Instant,
    allocated: u64,
    /// What was measured when `since` was moved.
    last: Option<u64>,
}

impl FillRate {
    /// Shorter spans say nothing.
    const SHORTEST: f64 = 1.0;
    /// Older measurements are of another time.
    const LONGEST: f64 = 60.0;

    pub(super) fn new(allocated: u64) -> Self {
        Self {
            since: Instant::now(),
            allocated,
            last: None,
        }
    }

    /// Bytes a second of late, given what is allocated now.
    pub(super) fn measure(&mut self, allocated: u64) -> Option<u64> {
        let seconds = self.since.elapsed().as_secs_f64();
        if seconds < Self::SHORTEST {
            return self.last;
        }
        let rate = (allocated.saturating_sub(self.allocated) as f64 / seconds) as u64;
        self.last = Some(rate);
        if seconds > Self::LONGEST {
            self.since = Instant::now();
            self.allocated = allocated;
        }
        self.last
    }
}

impl SnapshotEntry {
    /// A snapshot that is served from now on as `id`. The open store itself is
    /// somebody else's by then.
    pub(super) fn new(id: SnapshotId, taken: Taken, facts: SnapshotFacts) -> Self {
        Self {
            name: facts.name,
            id,
            cow: facts.cow,
            cow_is_block_device: facts.cow_is_block_device,
            cow_inode: facts.cow_inode,
            kind: facts.kind,
            limit: facts.limit,
            chunk_bytes: facts.chunk_bytes,
            read_only: facts.read_only,
            bytes: facts.bytes,
            behaviour: facts.behaviour,
            taken,
            scratch: facts.scratch,
            fill: FillRate::new(facts.allocated),
            recorded_cow: OnceCell::new(),
            merge: match facts.merging {
                Some(Merging { delete_cow }) => MergeState::Begun { delete_cow },
                None => MergeState::None,
            },
        }
    }
}

/// What the registry keeps of an [`OpenSnapshot`] that moves to its thread.
#[derive(Debug)]
pub(super) struct SnapshotFacts {
    name: String,
    pub(super) cow: PathBuf,
    cow_is_block_device: bool,
    cow_inode: Option<(u64, u64)>,
    kind: StoreKind,
    limit: Option<u64>,
    chunk_bytes: u64,
    pub(super) read_only: bool,
    scratch: Option<Scratch>,
    allocated: u64,
    /// Its instant is taken now.
    pub(super) fresh: bool,
    /// It is being merged into the origin.
    merging: Option<Merging>,
    bytes: u64,
    /// When it was taken, or when that was planned.
    pub(super) taken_at: Option<u64>,
    pub(super) behaviour: Defaults,
}

impl SnapshotFacts {
    pub(super) fn of(snapshot: &mut OpenSnapshot, defaults: Defaults) -> Self {
        let allocated = match snapshot.store.status() {
            nbdsnap_engine::Status::Active { allocated, .. } => {
                allocated * nbdsnap_format::SECTOR_BYTES
            }
            _ => 0,
        };
        Self {
            name: snapshot.name.clone(),
            cow: absolute(&snapshot.disk.path),
            cow_is_block_device: snapshot.disk.is_block_device,
            cow_inode: snapshot
                .disk
                .file
                .metadata()
                .ok()
                .map(|meta| (meta.dev(), meta.ino())),
            kind: snapshot.store.kind(),
            limit: snapshot.limit,
            chunk_bytes: snapshot.store.chunk_size().bytes(),
            read_only: snapshot.read_only,
            scratch: snapshot.scratch.take(),
            allocated,
            fresh: snapshot.fresh,
            merging: snapshot.past.merging,
            bytes: snapshot.past.bytes,
            taken_at: snapshot.past.taken_at,
            behaviour: snapshot.behaviour.unwrap_or(defaults),
        }
    }
}

impl SnapshotEntry {
    /// Its store, as a file that a change deletes.
    pub(super) fn store_to_give_up(&self) -> Option<IntentFile> {
        let path = settled(&self.cow);
        let identity = SystemFiles.identify(&path).ok()??;
        Some(IntentFile::given_up(path, identity))
    }

    fn record(&self) -> SnapshotRecord {
        SnapshotRecord {
            name: self.name.clone(),
            cow: self.recorded_cow.get_or_init(|| settled(&self.cow)).clone(),
            kind: self.kind.into(),
            limit: self.limit,
            read_only: self.read_only,
            bytes: Some(self.bytes),
            on_full: self.behaviour.on_full.into(),
            auto_extend: self.behaviour.auto_extend,
            taken_at: self.taken.at(),
            merging: matches!(self.merge, MergeState::Begun { .. }),
            delete_cow: self.merge == MergeState::Begun { delete_cow: true },
            anew: None,
        }
    }
}

impl VolumeEntry {
    /// What the records say of it.
    pub(super) fn record(&self) -> VolumeRecord {
        VolumeRecord {
            name: self.name.clone(),
            disk: self
                .recorded_disk
                .get_or_init(|| settled(&self.origin.path))
                .clone(),
            read_only: self.origin.access == VolumeAccess::ReadOnly,
            shared: self.origin.access == VolumeAccess::Shared,
            snapshots: self.snapshots.iter().map(SnapshotEntry::record).collect(),
        }
    }

    /// It stands still.
    pub(super) fn is_suspended(&self) -> bool {
        self.suspension != Suspension::Running
    }

    /// A snapshot that is being merged, or will be.
    pub(super) fn merging(&self) -> Option<&SnapshotEntry> {
        let merges = |entry: &&SnapshotEntry| entry.merge != MergeState::None;
        self.snapshots.iter().find(merges)
    }

    /// The same, of those that were taken of one snapshot, or of the disk.
    pub(super) fn merging_into(&self, of: Option<&str>) -> Option<&SnapshotEntry> {
        let merges = |entry: &&SnapshotEntry| entry.merge != MergeState::None;
        self.snapshots
            .iter()
            .find(|entry| is_of(entry, of) && merges(entry))
    }

    /// Those that were taken of one snapshot, or of the disk.
    fn snapshots_of<'a>(&'a self, of: Option<&'a str>) -> impl Iterator<Item = &'a SnapshotEntry> {
        self.snapshots.iter().filter(move |entry| is_of(entry, of))
    }

    /// Those that were taken of a snapshot, and of these, and so on.
    pub(super) fn dependents(&self, path: &str) -> Vec<SnapshotName> {
        let entries = self.in_tree_order().into_iter();
        let depending = entries.filter(|entry| names::depends(&entry.name, path));
        depending.map(|entry| self.name_of(entry)).collect()
    }

    pub(super) fn name_of(&self, entry: &SnapshotEntry) -> SnapshotName {
        SnapshotName {
            volume: self.name.clone(),
            snapshot: entry.name.clone(),
        }
    }

    /// Each behind what it was taken of, and before its siblings that came later.
    pub(super) fn in_tree_order(&self) -> Vec<&SnapshotEntry> {
        let mut waiting: Vec<&SnapshotEntry> = self.snapshots_of(None).collect();
        waiting.reverse();
        let mut order = Vec::with_capacity(self.snapshots.len());
        while let Some(entry) = waiting.pop() {
            order.push(entry);
            if self.snapshots.len() > order.len() + waiting.len() {
                let before = waiting.len();
                waiting.extend(self.snapshots_of(Some(&entry.name)));
                waiting[before..].reverse();
            }
        }
        order
    }

    /// The disk as it is, or as long as a snapshot of it: what another is taken of.
    pub(super) fn origin_of(&self, path: &str) -> Origin {
        let below = names::origin(path).and_then(|of| self.snapshot(of));
        Origin {
            bytes: below.map_or(self.origin.bytes, |below| below.bytes),
            ..self.origin.clone()
        }
    }

    /// What the snapshot of this path is one of; none: that is not there.
    pub(super) fn view_below(&self, path: &str) -> Option<View> {
        match names::origin(path) {
            None => Some(View::Origin),
            Some(of) => self.snapshot(of).map(|below| View::Snapshot(below.id)),
        }
    }

    pub(super) fn snapshot(&self, name: &str) -> Option<&SnapshotEntry> {
        self.snapshots.iter().find(|entry| entry.name == name)
    }

    /// Nobody uses its stores any more: empty the files of those that were in memory.
    pub(super) fn discard_scratch(self) {
        let files = self.snapshots.into_iter().filter_map(|one| one.scratch);
        for file in files {
            if let Err(error) = file.discard() {
                tracing::warn!("a transient store could not be emptied: {error}");
            }
        }
    }

    fn export(&self) -> Export {
        let chunks = self.snapshots_of(None).map(|snapshot| snapshot.chunk_bytes);
        let description = match self.snapshots_of(None).count() {
            0 => "disk without snapshots".into(),
            1 => "origin of 1 snapshot".into(),
            count => format!("origin of {count} snapshots"),
        };
        Export {
            name: self.name.clone(),
            description,
            size: self.origin.bytes,
            flags: transmission_flags(!self.origin.access.writes_origin(), false),
            block_size: BlockSize::for_chunk(chunks.min().unwrap_or(0)),
        }
    }

    fn snapshot_export(&self, snapshot: &SnapshotEntry) -> Export {
        let kind = match snapshot.kind {
            StoreKind::Persistent => "persistent",
            StoreKind::PersistentOverflow => "persistent, kept when full",
            StoreKind::Transient => "transient",
        };
        let taken = match snapshot.taken {
            Taken::Before => String::new(),
            Taken::AtStart(_) => ", taken when this server started".into(),
            Taken::Live(at) => format!(", taken at {}", crate::cli::when::show(at)),
        };
        Export {
            name: names::export(&self.name, &snapshot.name),
            description: format!(
                "snapshot of {} ({kind}, chunks of {}{taken})",
                names::origin_export(&self.name, &snapshot.name),
                size::show(snapshot.chunk_bytes)
            ),
            size: snapshot.bytes,
            flags: transmission_flags(snapshot.read_only, false),
            block_size: BlockSize::for_chunk(snapshot.chunk_bytes),
        }
    }
}

fn mapped_export(device: &DeviceInfo) -> Export {
    Export {
        name: device.name.clone(),
        description: "mapped device".into(),
        size: device.bytes,
        flags: transmission_flags(device.read_only, false),
        block_size: BlockSize::for_chunk(0),
    }
}

fn is_of(entry: &SnapshotEntry, of: Option<&str>) -> bool {
    names::origin(&entry.name) == of
}

impl Registry {
    pub(super) fn volume(&self, name: &str) -> Option<&VolumeEntry> {
        self.volumes.iter().find(|entry| entry.name == name)
    }

    pub(super) fn volume_mut(&mut self, name: &str) -> Option<&mut VolumeEntry> {
        self.volumes.iter_mut().find(|entry| entry.name == name)
    }

    /// Whether a volume or a snapshot has this export.
    pub(super) fn is_served(&self, export: &str) -> bool {
        self.volumes.iter().any(|volume| {
            let mut snapshots = volume.snapshots.iter();
            volume.name == export
                || snapshots.any(|one| names::export(&volume.name, &one.name) == export)
        })
    }

    /// What clients see: for each volume the export `NAME`, then `NAME@SNAPSHOT`
    /// for each of its snapshots, `NAME@SNAPSHOT@NEXT` for theirs. Where there is only one volume, its origin is
    /// the default export too.
    pub(super) fn exports(&self) -> Result<Exports, CatalogError> {
        let mut exports = Vec::new();
        let mut routes = Vec::new();
        for volume in &self.volumes {
            let route = |view, read_only| Route {
                shard: volume.shard,
                volume: volume.id,
                view,
                read_only,
            };
            exports.push(volume.export());
            routes.push(route(View::Origin, !volume.origin.access.writes_origin()));
            let begun = |one: &&SnapshotEntry| matches!(one.merge, MergeState::Begun { .. });
            for snapshot in volume.in_tree_order().into_iter().filter(|one| !begun(one)) {
                exports.push(volume.snapshot_export(snapshot));
                routes.push(route(View::Snapshot(snapshot.id), snapshot.read_only));
            }
        }
        let default = (self.volumes.len() == 1).then_some(0);
        for device in self
            .mapped
            .devices
            .iter()
            .filter(|device| device.live_table)
        {
            if exports.iter().any(|export| export.name == device.name) {
                continue;
            }
            exports.push(mapped_export(device));
            routes.push(Route {
                shard: MAPPED_SHARD,
                volume: MAPPED,
                view: view_of(device.id),
                read_only: device.read_only,
            });
        }
        Ok(Exports::new(Catalog::new(exports, default)?, routes))
    }
}
