//! The snapshot engine: an origin, its snapshots and the order in which their
//! disks may be written, as a state machine over values. No thread, lock, clock,
//! socket or system call is in it: it says which disk operations it wants next
//! ([`Volume::poll_disk_op`]) and is told how they ended
//! ([`Volume::handle_completion`]). So every interleaving and every power cut can
//! be played in a test, in the code that runs in production.
//!
//! # The Law
//!
//! The old chunk is durable in the COW store -> its exception is durable -> only
//! then is the origin overwritten. [`law`] is its home, and lists the ways to
//! break it that the crash simulator must notice.
//!
//! # The way of a write to the origin
//!
//! 1. `volume/admit.rs` checks it, and lets it wait its turn behind writes that
//!    overlap it.
//! 2. `volume/origin_write.rs` asks each snapshot for a durable exception of
//!    every chunk, prepares those that are missing (`store/allocate.rs`) and
//!    waits for all of them.
//! 3. `volume/copy.rs` reads the old chunks and writes them to the store,
//!    neighbours in one operation.
//! 4. `store/commit.rs` closes the group: flush, area, flush; `volume/drive.rs`
//!    puts its exceptions into the table (`table.rs`).
//! 5. Once snapshot reads of the range have ended (`in_flight.rs`), the write
//!    goes to the disk, and its end to the client.
//!
//! A snapshot's instant holds step 5 of every write, and a suspended volume all
//! of them; a store that is full may do so too: see "While the disk is in use".
//!
//! A write that needs none of this goes around all of it: [`Volume::write_now`].
//!
//! # While the disk is in use
//!
//! Snapshots come (`volume/instant.rs`: one instant for one or several) and go
//! (`volume/removal.rs`); the volume stands still and goes on
//! (`volume/suspend.rs`); stores fill, pause writes or refuse them, and are
//! extended (`volume/full.rs`); the origin grows (`volume/lifecycle.rs`).
//!
//! # Merges
//!
//! An origin is rolled back to a snapshot in `volume/merge`: see there.
//!
//! # Snapshots of snapshots
//!
//! A volume whose origin is a snapshot of another one, and so on: `tree/`. What is
//! above holds for each of them.
//!
//! # Mapped devices
//!
//! Device-mapper's tables over disks, with volumes where something is an origin:
//! `dm/`.
//!
//! # Invariants
//!
//! - A chunk's copy never moves, and is never given back.
//! - An exception is in the table if and only if its entry has been written to
//!   its area; durable if and only if a flush that began later has ended.
//! - Slots, store chunks and entries ascend together, in the order of allocation.
//! - Whatever waits decides anew when it wakes (`volume/task.rs`).
#![forbid(unsafe_code)]

pub mod disk;
pub mod dm;
mod in_flight;
pub mod law;
pub mod request;
mod snapshot;
pub mod store;
mod table;
pub mod tree;
pub mod volume;

pub use disk::{Action, Device, DiskError, DiskOp, OpId, Outcome};

pub use request::{Command, Failure, Reply, Request, RequestId, SnapshotId, View};
pub use store::{Access, OpenError, Status, Store, StoreIo, StoreKind, StoreSize, StoreSpec};
pub use tree::{NodeMergeError, RemoveError, TakeError, Tree};
pub use volume::{
    Event, ExtendError, Extent, GrowError, InstantId, MergeError, MergeProgress, NotHeld, Now,
    OnFull, SnapshotInfo, SnapshotState, Volume, VolumeConfig,
};
