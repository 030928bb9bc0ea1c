//! Tables: what a mapped device is made of, line by line, in dmsetup's terms.
//! Sectors have 512 bytes.

use nbdsnap_format::SECTOR_BYTES;

/// Names a disk that tables stand on: a file or block device. Never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskId(pub u32);

/// Names a mapped device: its minor number. Used again once the device is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(pub u32);

/// What a target stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lower {
    /// A disk.
    Disk(DiskId),
    /// Another mapped device.
    Device(DeviceId),
}

/// A line of a table: sectors of the device, and what is behind them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// First sector of the device.
    pub start: u64,
    /// How many.
    pub len: u64,
    /// What they are.
    pub target: Target,
}

/// What a line maps its sectors to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Sectors of another device, from `start` on.
    Linear {
        /// Which device.
        lower: Lower,
        /// Its first sector.
        start: u64,
    },
    /// Chunks dealt out in turn.
    Striped {
        /// Sectors of a chunk.
        chunk: u64,
        /// The devices, each with its first sector.
        stripes: Vec<(Lower, u64)>,
    },
    /// Reads as zeros; writes go nowhere.
    Zero,
    /// Everything fails.
    Error,
    /// The disk that snapshots are taken of.
    SnapshotOrigin {
        /// The disk.
        origin: Lower,
    },
    /// A snapshot of a disk.
    Snapshot(Pair),
    /// A disk that is being rolled back to a snapshot.
    SnapshotMerge(Pair),
}

/// The arguments of `snapshot` and `snapshot-merge`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The disk that the snapshot is one of.
    pub origin: Lower,
    /// Where its COW store lies.
    pub cow: Lower,
    /// What the store survives.
    pub persistence: Persistence,
    /// Sectors of a chunk, as given in the table; 0: the default, for a persistent store.
    pub chunk: u64,
    /// The feature `discard_zeroes_cow`.
    pub discard_zeroes_cow: bool,
    /// The feature `discard_passdown_origin`.
    pub discard_passdown_origin: bool,
}

/// What a COW store survives, and what happens when it is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Persistence {
    /// `P`: it outlives the device; full means Invalid.
    Persistent,
    /// `PO`: the same, but writes to a full snapshot leave it readable (Overflow).
    PersistentOverflow,
    /// `N`: nothing of it outlives the device.
    Transient,
}

impl Persistence {
    /// The same, but that a full store overflows or does not. Of a transient one nobody
    /// says so.
    pub(super) fn or_overflow(self, overflows: bool) -> Self {
        match self {
            Self::Transient => Self::Transient,
            _ if overflows => Self::PersistentOverflow,
            _ => Self::Persistent,
        }
    }

    /// As it stands in tables.
    pub fn word(self) -> &'static str {
        match self {
            Self::Persistent => "P",
            Self::PersistentOverflow => "PO",
            Self::Transient => "N",
        }
    }
}

impl Target {
    /// Its name in tables.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Linear { .. } => "linear",
            Self::Striped { .. } => "striped",
            Self::Zero => "zero",
            Self::Error => "error",
            Self::SnapshotOrigin { .. } => "snapshot-origin",
            Self::Snapshot(_) => "snapshot",
            Self::SnapshotMerge(_) => "snapshot-merge",
        }
    }

    /// The devices that it stands on, in the order of its arguments.
    pub fn lowers(&self) -> Vec<Lower> {
        match self {
            Self::Linear { lower, .. } => vec![*lower],
            Self::Striped { stripes, .. } => stripes.iter().map(|(lower, _)| *lower).collect(),
            Self::Zero | Self::Error => Vec::new(),
            Self::SnapshotOrigin { origin } => vec![*origin],
            Self::Snapshot(pair) | Self::SnapshotMerge(pair) => vec![pair.origin, pair.cow],
        }
    }
}

impl Line {
    /// First byte.
    pub(super) fn first(&self) -> u64 {
        self.start * SECTOR_BYTES
    }

    /// The byte behind the last.
    pub(super) fn end(&self) -> u64 {
        (self.start + self.len) * SECTOR_BYTES
    }
}
