//! Disks and sockets: the threads that own the volumes, and the only place
//! where system calls on the data path are made.
//!
//! A [`Shard`] is one thread with the volumes that live on it, their clients'
//! sockets and their disks. The way of a request, file by file: `poller` says
//! that a socket is ready; `connection` reads it and `nbd::transmission` turns
//! the bytes into calls; `hosted` serves what can be served at once (a read from
//! the page cache, a write that needs no copy) and hands the rest to the engine;
//! then it performs the operations that the engine wants, here when `disk` says
//! that this needs no waiting, else in `helpers`, whose results come back
//! through the `mailbox`; replies gather in the connection's outbox and leave in
//! small batches, so that the client works while the rest is being made.
//!
//! Nothing on a shard's thread waits for a disk or a client. That is the rule
//! behind every decision here.

mod block_status;
mod census;
mod connection;
mod disk;
pub mod file;
mod helpers;
mod hosted;
mod mailbox;
mod mapped;
mod news;
mod pace;
mod poller;
mod shard;
pub(crate) mod sys;
mod table;

pub use census::ClientStatus;
pub use connection::Traffic;
pub use hosted::{
    AutoExtend, HostedStatus, NewDisk, NewSnapshot, NewVolume, NotHeld, NotMerged, Settings, Views,
    VolumeOrder,
};
pub use mapped::{Answered, MAPPED, MAPPED_SHARD, Mapped, view_of};
pub use news::{Herald, Loss, News, What};
pub use shard::{NewConnection, Shard};

/// What may change on the devices of a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VolumeAccess {
    /// The origin, and its stores.
    #[default]
    ReadWrite,
    /// The stores. The origin is only read, by others too.
    Shared,
    /// Nothing.
    ReadOnly,
}

impl VolumeAccess {
    /// The two words that orders and records have for it.
    pub fn from_words(read_only: bool, shared: bool) -> Self {
        match (read_only, shared) {
            (true, _) => Self::ReadOnly,
            (false, true) => Self::Shared,
            (false, false) => Self::ReadWrite,
        }
    }

    /// The origin may be written.
    pub fn writes_origin(self) -> bool {
        self == Self::ReadWrite
    }

    /// The stores may be written.
    pub fn writes_stores(self) -> bool {
        self != Self::ReadOnly
    }
}

/// Names a volume within a server. Never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeId(pub u32);
