//! What orders bring: the other half of [`super::protocol`], and what `--json`
//! prints.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::dm::DmAnswer;
use super::protocol::{Kind, WhenFull};

/// What an order brought.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Snapshots, in the order in which they were asked for, or are served.
    Snapshots(Vec<SnapshotReport>),
    /// Volumes, in the order in which they are served.
    Volumes(Vec<VolumeReport>),
    /// Clients, in the order in which they came.
    Clients(Vec<ClientReport>),
    /// Events, in the order in which they came.
    Events(Vec<EventReport>),
    /// What the device-mapper answers.
    Dm(DmAnswer),
}

/// A snapshot, and how it is doing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// Its export, `VOLUME@NAME`, or `VOLUME@NAME@NEXT` for a snapshot of that one.
    pub name: String,
    /// The volume it belongs to.
    pub volume: String,
    /// Its name within that.
    pub snapshot: String,
    /// The export that it was taken of.
    #[serde(default)]
    pub of: String,
    /// How it is doing.
    pub state: SnapshotState,
    /// The path of its COW store.
    pub cow: PathBuf,
    /// Where its exceptions live, and what a full store means.
    pub kind: Kind,
    /// Writes to it are refused.
    pub read_only: bool,
    /// When it was taken; null if nobody has written that down.
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
    /// What a write means that finds its store full.
    pub on_full: WhenFull,
    /// Its store is full.
    pub is_full: bool,
    /// Writes that wait for room in it.
    pub paused_writes: u64,
    /// How far its merge has come, in chunks; null unless it is being merged.
    pub merge: Option<MergeReport>,
    /// Clients attached to it.
    pub clients: u64,
    /// The line that `dmsetup status` has for it.
    pub status: String,
}

/// How far a merge has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MergeReport {
    /// Chunks that are still to be copied to the disk.
    pub left_chunks: u64,
    /// Chunks that there were when it began.
    pub total_chunks: u64,
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
    /// It will be merged when no client is attached to the disk any more.
    MergeWaiting,
    /// The disk reads as the snapshot, and its chunks are being copied.
    Merging,
    /// The disk reads as the snapshot, and the copying has stopped on an error.
    MergeFailed,
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
    /// Its disk is only read, and other volumes may have it too.
    #[serde(default)]
    pub shared: bool,
    /// It stands still until it is resumed.
    pub suspended: bool,
    /// Its snapshots' exports, in the order in which they are served.
    pub snapshots: Vec<String>,
    /// Clients attached to the origin.
    pub clients: u64,
}

/// A client in transmission.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClientReport {
    /// Names it within the server; never used again.
    pub id: u64,
    /// Who it is: an address, or a process.
    pub peer: String,
    /// What it is attached to, `VOLUME` or `VOLUME@NAME`.
    pub export: String,
    /// When it attached.
    pub since: u64,
    /// Requests that it waits for.
    pub in_flight: u64,
    /// Requests that it has sent.
    pub requests: u64,
    /// Bytes that it has asked to read.
    pub read_bytes: u64,
    /// Bytes that it has written.
    pub written_bytes: u64,
    /// Requests a second, where two looks were taken; else null.
    pub requests_per_second: Option<u64>,
    /// Bytes a second that it reads.
    pub read_bytes_per_second: Option<u64>,
    /// Bytes a second that it writes.
    pub written_bytes_per_second: Option<u64>,
}

/// Something that has happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventReport {
    /// Events are numbered from 1 in the order in which they came.
    pub sequence: u64,
    /// When.
    pub at: u64,
    /// What.
    pub event: EventKind,
    /// The volume it happened to.
    pub volume: Option<String>,
    /// The snapshot of it, by its own name.
    pub snapshot: Option<String>,
    /// How full a store is, or how much of a merge is done.
    pub percent: Option<u64>,
    /// The client, by its id.
    pub client: Option<u64>,
    /// More, for people.
    pub message: Option<String>,
}

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// A snapshot was taken.
    Created,
    /// A snapshot was removed.
    Removed,
    /// A snapshot has another name.
    Renamed,
    /// A snapshot was taken anew.
    Reset,
    /// A snapshot's store is full: it can be read, but not written.
    Overflow,
    /// 50, 80 or 95 percent of a store are used.
    Filling,
    /// A store is full.
    Full,
    /// A store may grow further.
    Extended,
    /// A volume stands still.
    Suspended,
    /// A volume goes on.
    Resumed,
    /// A volume's disk has grown.
    VolumeResized,
    /// A snapshot is lost.
    Invalid,
    /// A snapshot will be merged when no client is attached to the disk any more.
    MergeWaiting,
    /// A merge that waited was called off.
    MergeCancelled,
    /// A disk has been rolled back to a snapshot.
    MergeBegun,
    /// A tenth more of a merge, or several, is done: so many percent.
    MergeProgress,
    /// A merge is done, and the snapshot gone.
    MergeDone,
    /// A merge has stopped on an error.
    MergeFailed,
    /// A volume is served.
    VolumeAdded,
    /// A volume is not served any more.
    VolumeRemoved,
    /// A client has attached.
    ClientCame,
    /// A client has gone.
    ClientWent,
    /// Events were dropped before they were read.
    Lost,
}

impl EventKind {
    /// As it is written in JSON.
    pub fn word(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Removed => "removed",
            Self::Renamed => "renamed",
            Self::Reset => "reset",
            Self::Overflow => "overflow",
            Self::Filling => "filling",
            Self::Full => "full",
            Self::Extended => "extended",
            Self::Suspended => "suspended",
            Self::Resumed => "resumed",
            Self::VolumeResized => "volume-resized",
            Self::Invalid => "invalid",
            Self::MergeWaiting => "merge-waiting",
            Self::MergeCancelled => "merge-cancelled",
            Self::MergeBegun => "merge-begun",
            Self::MergeProgress => "merge-progress",
            Self::MergeDone => "merge-done",
            Self::MergeFailed => "merge-failed",
            Self::VolumeAdded => "volume-added",
            Self::VolumeRemoved => "volume-removed",
            Self::ClientCame => "client-came",
            Self::ClientWent => "client-went",
            Self::Lost => "lost",
        }
    }
}

impl EventReport {
    /// `event`, about nothing in particular yet.
    pub fn new(event: EventKind) -> Self {
        Self {
            sequence: 0,
            at: 0,
            event,
            volume: None,
            snapshot: None,
            percent: None,
            client: None,
            message: None,
        }
    }

    /// About a volume.
    #[must_use]
    pub fn of_volume(mut self, volume: &str) -> Self {
        self.volume = Some(volume.to_owned());
        self
    }

    /// About a snapshot of it.
    #[must_use]
    pub fn of_snapshot(mut self, snapshot: &str) -> Self {
        self.snapshot = Some(snapshot.to_owned());
        self
    }

    /// With more, for people.
    #[must_use]
    pub fn saying(mut self, message: impl Into<String>) -> Self {
        self.message = Some(message.into());
        self
    }
}
