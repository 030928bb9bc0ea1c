//! The words of the control socket, which are also the schema of `--json`.
//!
//! Stable: fields are added, never renamed or given another meaning, as long as
//! [`VERSION`] stays. Sizes are bytes, times are seconds since 1970 (UTC), names
//! of fields end in their unit. An unknown field in an order is refused, since
//! leaving it out would do something else than was asked for; readers of answers
//! should skip what they do not know.

use std::path::PathBuf;

use nbdsnap_engine::{OnFull, StoreKind};
use serde::{Deserialize, Serialize};

use super::dm::DmOrder;
pub use super::reports::*;

/// Of these words.
pub const VERSION: u32 = 1;

/// One line to the server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// [`VERSION`].
    pub version: u32,
    /// What is wanted.
    pub order: Order,
}

/// One line from the server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Response {
    /// [`VERSION`].
    pub version: u32,
    /// What came of the order.
    pub outcome: Outcome,
}

/// What came of an order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It was done.
    Done(Answer),
    /// It was refused, with nothing changed, or failed; why, in one line.
    Refused(String),
}

/// What a server can be asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Take snapshots, all at one instant. Answer: [`Answer::Snapshots`].
    SnapshotCreate(SnapshotCreate),
    /// Tell of snapshots. Answer: [`Answer::Snapshots`].
    SnapshotList(Selection),
    /// End snapshots. Answer: [`Answer::Snapshots`], as they were.
    SnapshotRemove(SnapshotRemove),
    /// Let a snapshot's store grow further. Answer: [`Answer::Snapshots`].
    SnapshotExtend(SnapshotExtend),
    /// Have volumes stand still. Answer: [`Answer::Volumes`].
    Suspend(Suspend),
    /// Have volumes go on. Answer: [`Answer::Volumes`].
    Resume(Resume),
    /// See how large a volume's disk is now. Answer: [`Answer::Volumes`].
    VolumeResize(VolumeResize),
    /// Roll a disk back to a snapshot. Answer: [`Answer::Snapshots`]; none, if the
    /// merge is done already.
    SnapshotMerge(SnapshotMerge),
    /// Call off a merge that waits. Answer: [`Answer::Snapshots`].
    SnapshotCancel(SnapshotCancel),
    /// Give a snapshot another name. Answer: [`Answer::Snapshots`].
    SnapshotRename(SnapshotRename),
    /// Take a snapshot anew, with the same name, store and settings.
    SnapshotReset(SnapshotReset),
    /// Tell of volumes. Answer: [`Answer::Volumes`].
    VolumeList,
    /// Serve one more disk. Answer: [`Answer::Volumes`].
    VolumeAdd(VolumeAdd),
    /// Serve several, all of them or none. Answer: [`Answer::Volumes`].
    VolumesAdd(VolumesAdd),
    /// Serve a disk no longer. Answer: [`Answer::Volumes`], as it was.
    VolumeRemove(VolumeRemove),
    /// Serve several no longer, all of them or none. Answer: [`Answer::Volumes`], as
    /// they were.
    VolumesRemove(VolumesRemove),
    /// Tell of clients. Answer: [`Answer::Clients`].
    Clients,
    /// Part with a client. Answer: [`Answer::Clients`], as it was.
    Disconnect(Disconnect),
    /// Tell what has happened. Answer: [`Answer::Events`]; when following, one
    /// such answer after the other.
    Events(EventsWanted),
    /// Something to do with mapped devices. Answer: [`Answer::Dm`].
    Dm(DmOrder),
}

/// Roll a disk, or a snapshot, back to one of its snapshots: from the first instant it
/// reads as the snapshot, while the chunks are copied behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotMerge {
    /// Which.
    pub snapshot: SnapshotName,
    /// What to do about clients that are attached to the disk.
    #[serde(default)]
    pub clients: MergeClients,
    /// Delete the file of the store when the merge is done.
    #[serde(default)]
    pub delete_cow: bool,
}

/// What a merge does about clients that are attached to the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MergeClients {
    /// The merge is refused.
    #[default]
    Refuse,
    /// It begins under them: the disk changes before their eyes.
    Force,
    /// It waits until they have gone.
    Wait,
}

/// Call off a merge that waits for clients to go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCancel {
    /// Which.
    pub snapshot: SnapshotName,
}

/// Take a snapshot anew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotReset {
    /// Which.
    pub snapshot: SnapshotName,
    /// Even while clients are attached to it: they are dropped.
    #[serde(default)]
    pub force: bool,
}

/// Give a snapshot another name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRename {
    /// Which.
    pub snapshot: SnapshotName,
    /// What it is called from now on: the last of its names, without an `@`.
    pub name: String,
}

/// Serve one more disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeAdd {
    /// What it is called.
    pub name: String,
    /// Its path, absolute.
    pub disk: PathBuf,
    /// Change nothing, neither the disk nor its stores.
    #[serde(default)]
    pub read_only: bool,
    /// Only read the disk, which other volumes may have too; snapshots of it can be
    /// taken and written.
    #[serde(default)]
    pub shared: bool,
    /// Its snapshots.
    #[serde(default)]
    pub snapshots: Vec<StoreToServe>,
    /// Stores of the disk that are given up: it is written without them.
    #[serde(default)]
    pub without: Vec<PathBuf>,
}

/// Serve several disks more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumesAdd {
    /// All of them are served, or none.
    pub volumes: Vec<VolumeAdd>,
}

/// A snapshot that comes with its volume, as with `serve --snapshot`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreToServe {
    /// Its name within the volume: `NAME`, or `NAME@NEXT` for a snapshot of that one,
    /// which has to be among them.
    pub snapshot: String,
    /// The path of its COW store, absolute.
    pub cow: PathBuf,
    /// How far the store may grow.
    #[serde(default)]
    pub size_bytes: Option<u64>,
    /// The chunk size of a store that is to be made.
    #[serde(default)]
    pub chunk_bytes: Option<u64>,
    /// What a full store means.
    #[serde(default)]
    pub kind: Kind,
    /// Refuse writes to it.
    #[serde(default)]
    pub read_only: bool,
    /// Make the store even where something else is.
    #[serde(default)]
    pub format: bool,
    /// It has seen every write to the disk, though the disk's list does not name it.
    #[serde(default)]
    pub adopt: bool,
}

/// Serve a disk no longer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeRemove {
    /// Which.
    pub name: String,
    /// Even while clients are attached: they are dropped.
    #[serde(default)]
    pub force: bool,
}

/// Serve several disks no longer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumesRemove {
    /// Which.
    pub names: Vec<String>,
    /// Even while clients are attached: they are dropped.
    #[serde(default)]
    pub force: bool,
}

/// Part with a client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disconnect {
    /// [`ClientReport::id`].
    pub client: u64,
}

/// What has happened.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventsWanted {
    /// Only what came behind this number; without it, all that is kept, or when
    /// following, what comes from now on.
    #[serde(default)]
    pub after: Option<u64>,
    /// Go on telling.
    #[serde(default)]
    pub follow: bool,
}

/// A snapshot's name in its two parts.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotName {
    /// What stands before the first `@`.
    pub volume: String,
    /// What stands behind it: `NAME`, or `NAME@NEXT` for a snapshot of that one, and
    /// so on.
    pub snapshot: String,
}

/// Take snapshots, all at one instant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreate {
    /// Which. Several are one instant: all are taken, or none.
    pub snapshots: Vec<SnapshotName>,
    /// The path of the COW store, for a single snapshot; without it, beside the
    /// disk, as `DISK.NAME.cow`.
    #[serde(default)]
    pub cow: Option<PathBuf>,
    /// How far each store may grow; without it, what its disk can ever need.
    #[serde(default)]
    pub size: Option<StoreLimit>,
    /// The chunk size in bytes; without it, 16 KiB.
    #[serde(default)]
    pub chunk_bytes: Option<u64>,
    /// Where the exceptions live, and what a full store means.
    #[serde(default)]
    pub kind: Kind,
    /// Refuse writes to the snapshots.
    #[serde(default)]
    pub read_only: bool,
    /// What a write means that finds a store full; without it, what the server was
    /// started with.
    #[serde(default)]
    pub on_full: Option<WhenFull>,
    /// Have the stores grow by themselves; without it, as the server was started.
    #[serde(default)]
    pub auto_extend: Option<Growth>,
}

/// What a write means that finds a store full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WhenFull {
    /// The snapshot is lost, and the write goes on: as with the kernel's.
    #[default]
    Invalidate,
    /// The write waits until the store is extended or the snapshot removed.
    Pause,
    /// The write fails, and the snapshot lives.
    Error,
}

/// When and how far a store grows by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Growth {
    /// When so many percent of it are used, 1 to 99.
    pub threshold_percent: u32,
    /// By so many percent of what it has, 1 to 1000, up to what its disk can need.
    pub step_percent: u32,
}

/// Let a snapshot's store grow further.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotExtend {
    /// Which.
    pub snapshot: SnapshotName,
    /// How far from now on, not less than before; none for a block device, which is
    /// measured.
    #[serde(default)]
    pub size: Option<StoreLimit>,
}

/// Have volumes stand still: new requests queue, those in flight end, everything is
/// flushed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Suspend {
    /// Which.
    pub volumes: Vec<String>,
    /// They go on by themselves after so many seconds.
    #[serde(default)]
    pub timeout_seconds: Option<u64>,
}

/// Have volumes go on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resume {
    /// Which.
    pub volumes: Vec<String>,
}

/// See how large a volume's disk is now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeResize {
    /// Which.
    pub name: String,
}

/// How large a store may grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StoreLimit {
    /// So many bytes.
    Bytes(u64),
    /// So many hundredths of the origin's size.
    PercentOfOrigin(u32),
}

/// Where exceptions live, and what happens when the store is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// On disk; a full store loses the snapshot (dm-snapshot's P).
    #[default]
    Persistent,
    /// On disk; a write to the snapshot that finds no space is refused, and the
    /// snapshot can still be read (PO).
    Overflow,
    /// In memory (N).
    Transient,
}

impl From<WhenFull> for OnFull {
    fn from(when: WhenFull) -> Self {
        match when {
            WhenFull::Invalidate => Self::Invalidate,
            WhenFull::Pause => Self::Pause,
            WhenFull::Error => Self::Error,
        }
    }
}

impl From<OnFull> for WhenFull {
    fn from(on_full: OnFull) -> Self {
        match on_full {
            OnFull::Invalidate => Self::Invalidate,
            OnFull::Pause => Self::Pause,
            OnFull::Error => Self::Error,
        }
    }
}

impl From<Kind> for StoreKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Persistent => Self::Persistent,
            Kind::Overflow => Self::PersistentOverflow,
            Kind::Transient => Self::Transient,
        }
    }
}

impl From<StoreKind> for Kind {
    fn from(kind: StoreKind) -> Self {
        match kind {
            StoreKind::Persistent => Self::Persistent,
            StoreKind::PersistentOverflow => Self::Overflow,
            StoreKind::Transient => Self::Transient,
        }
    }
}

/// Which snapshots.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Selection {
    /// `VOLUME` (all its snapshots) or `VOLUME@NAME`; none: all there are.
    #[serde(default)]
    pub names: Vec<String>,
}

/// End snapshots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRemove {
    /// Which.
    pub snapshots: Vec<SnapshotName>,
    /// Delete the files of their stores too.
    #[serde(default)]
    pub delete_cow: bool,
}

impl std::fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.volume, self.snapshot)
    }
}
