//! The words of the control socket, which are also the schema of `--json`.
//!
//! Stable: fields are added, never renamed or given another meaning, as long as
//! [`VERSION`] stays. Sizes are bytes, times are seconds since 1970 (UTC), names
//! of fields end in their unit. An unknown field in an order is refused, since
//! leaving it out would do something else than was asked for; readers of answers
//! should skip what they do not know.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

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
    /// Tell of volumes. Answer: [`Answer::Volumes`].
    VolumeList,
}

/// A snapshot's name in its two parts.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotName {
    /// What stands before the `@`.
    pub volume: String,
    /// What stands behind it.
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

/// What an order brought.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Snapshots, in the order in which they were asked for, or are served.
    Snapshots(Vec<SnapshotReport>),
    /// Volumes, in the order in which they are served.
    Volumes(Vec<VolumeReport>),
}

/// A snapshot, and how it is doing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// Its export, `VOLUME@NAME`.
    pub name: String,
    /// The volume it is of.
    pub volume: String,
    /// Its own name.
    pub snapshot: String,
    /// How it is doing.
    pub state: SnapshotState,
    /// The path of its COW store.
    pub cow: PathBuf,
    /// Where its exceptions live, and what a full store means.
    pub kind: Kind,
    /// Writes to it are refused.
    pub read_only: bool,
    /// When it was taken; null if that was before this server started.
    pub taken_at: Option<u64>,
    /// Its size.
    pub bytes: u64,
    /// The unit of copying.
    pub chunk_bytes: u64,
    /// Of its store, used so far, metadata included; null unless active.
    pub allocated_bytes: Option<u64>,
    /// Of these, metadata.
    pub metadata_bytes: Option<u64>,
    /// Of these, old chunks and the snapshot's own.
    pub data_bytes: Option<u64>,
    /// How far the store may grow.
    pub limit_bytes: Option<u64>,
    /// What is left of that.
    pub free_bytes: Option<u64>,
    /// At which rate it has filled of late, in bytes a second.
    pub fill_bytes_per_second: Option<u64>,
    /// When it will be full if that goes on, in seconds from now.
    pub full_in_seconds: Option<u64>,
    /// Clients attached to it.
    pub clients: u64,
    /// The line that `dmsetup status` has for it.
    pub status: String,
}

/// How a snapshot is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SnapshotState {
    /// Well.
    Active,
    /// Its store is full; it can be read.
    Overflow,
    /// It is lost.
    Invalid,
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VolumeReport {
    /// Its export.
    pub name: String,
    /// The path of its disk.
    pub disk: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Writes to it are refused.
    pub read_only: bool,
    /// Its snapshots' exports, in the order in which they are served.
    pub snapshots: Vec<String>,
    /// Clients attached to the origin.
    pub clients: u64,
}

impl std::fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.volume, self.snapshot)
    }
}
