//! What clients ask of a volume, and what it answers: values, with no word of
//! sockets. Offsets and lengths are in bytes; any byte range within the view is
//! accepted, aligned or not.

use bytes::Bytes;

/// Names a snapshot of a volume. Never used again within a volume's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SnapshotId(pub u32);

/// What a request looks at: the live disk or one frozen instant of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum View {
    /// The live disk.
    Origin,
    /// A snapshot of it.
    Snapshot(SnapshotId),
}

/// The caller's own name for a request; the reply carries it back. The engine
/// never interprets it. It must not be in use by another unanswered request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// One request of a client.
#[derive(Clone, Debug)]
pub struct Request {
    /// Comes back in the [`Reply`].
    pub id: RequestId,
    /// The view it is for.
    pub view: View,
    /// What is asked.
    pub command: Command,
}

/// The commands a volume understands; NBD's own, without its encoding.
/// `fua` asks that the effect is durable before the reply.
#[derive(Clone, Debug)]
pub enum Command {
    /// Read `len` bytes at `offset`.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes to read.
        len: u64,
    },
    /// Write `data` at `offset`.
    Write {
        /// First byte.
        offset: u64,
        /// What to write.
        data: Bytes,
        /// Durable before the reply.
        fua: bool,
    },
    /// Make `len` bytes at `offset` read as zeros. A write: old chunks are copied first.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes to zero; may exceed what a single write may carry.
        len: u64,
        /// Durable before the reply.
        fua: bool,
        /// The range must stay allocated (NBD's NO_HOLE).
        no_hole: bool,
        /// Answer [`Failure::NotSupported`], changing nothing, where zeroing
        /// would be no faster than writing (NBD's FAST_ZERO).
        fast_only: bool,
    },
    /// The client no longer needs these bytes. Never allocates in a COW store:
    /// it acts only where every snapshot holds its own durable copy.
    Trim {
        /// First byte.
        offset: u64,
        /// Bytes to give up.
        len: u64,
        /// Durable before the reply.
        fua: bool,
    },
    /// Every write answered before this request is durable before its reply.
    Flush,
}

/// The answer to the [`Request`] of the same `id`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The request's.
    pub id: RequestId,
    /// For a read, its bytes in order, in one or more pieces; else empty.
    pub result: Result<Vec<Bytes>, Failure>,
}

/// Why a request failed. The server maps these to NBD's errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Failure {
    /// A disk failed, the snapshot is Invalid, or it has overflowed and this is a write.
    Io,
    /// The range does not lie within the view, for a write or zero (NBD: ENOSPC).
    PastEnd,
    /// The range does not lie within the view, for anything else (NBD: EINVAL).
    Invalid,
    /// `fast_only` was asked and it would not be fast.
    NotSupported,
    /// A store is full, and that is what a write gets then (NBD: ENOSPC).
    NoSpace,
    /// The volume is closing.
    ShuttingDown,
    /// No such snapshot (any more).
    NoSuchView,
}
