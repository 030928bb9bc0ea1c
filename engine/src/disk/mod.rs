//! The disk operations that the engine asks for, and how they end. The engine
//! performs none: whoever drives it does, and reports each end exactly once.

pub mod sim;

use bytes::Bytes;

use crate::request::SnapshotId;

/// A device of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Device {
    /// The disk that is snapshotted.
    Origin,
    /// The COW store of a snapshot.
    Cow(SnapshotId),
}

/// Names an operation until its end has been reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId(pub u64);

/// One operation to perform. Operations may be performed in any order and at
/// the same time: the engine hands out only those that do not depend on each
/// other.
#[derive(Clone, Debug)]
pub struct DiskOp {
    /// To be given back with the outcome.
    pub id: OpId,
    /// The device it is for.
    pub device: Device,
    /// What to do.
    pub action: Action,
}

/// What to do on a device. Offsets and lengths in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Read exactly `len` bytes; ends with the bytes.
    Read {
        /// First byte.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// Write the pieces one after the other from `offset` on.
    Write {
        /// First byte.
        offset: u64,
        /// What, in order.
        data: Vec<Bytes>,
    },
    /// Make the range read as zeros.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// How many.
        len: u64,
        /// The range may become a hole. Never set for a COW store.
        may_punch: bool,
    },
    /// Give the range up: it reads as anything afterwards (a hole where possible).
    Trim {
        /// First byte.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// Everything whose end was reported before this was handed out is durable
    /// when this ends (fdatasync).
    Flush,
    /// Grow the COW file so that `0..to` is backed by reserved space that reads
    /// as zeros, durably. Asked only where [`crate::StoreSize`] allows growth.
    Grow {
        /// The new length.
        to: u64,
    },
}

/// How an operation ended: the bytes of a read (empty otherwise), or an error.
pub type Outcome = Result<Bytes, DiskError>;

/// An operation failed. What was to be written may have been written in part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiskError {
    /// No space is left on the file system or device.
    #[error("no space left")]
    NoSpace,
    /// Anything else, with the operating system's error number where there is one.
    #[error("input/output error (errno {0})")]
    Io(i32),
}
