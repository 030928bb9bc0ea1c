//! Device-mapper's devices: named tables over disks and over each other, and
//! snapshots of what they make.
//!
//! # Three layers
//!
//! 1. *Devices* have tables. A request to a device is cut along the lines of its
//!    table and goes to the devices and disks below, each of which may be suspended
//!    and let it wait (`route.rs`).
//! 2. It comes down to *bases*: disks, and snapshots' views ([`Base`]).
//! 3. A base may be *covered*: what lies there may be a part of the origin of
//!    snapshots. A request to such a part is handed to the [`Volume`] whose origin it
//!    is (`cover.rs`), and what that volume asks of its origin and its stores comes
//!    down to bases again.
//!
//! So a write reaches the snapshots of whatever it lands on, by whichever device it
//! came: through a `snapshot-origin`, around it, or from beneath, where snapshots are
//! of a slice of a disk and somebody writes to the disk. This is safer than the
//! kernel, which looks at writes through `snapshot-origin` only.
//!
//! Volumes that cover the same range stand upon each other in the order in which they
//! came: what the later one asks of its origin is looked at by the earlier one. Any
//! order will do, as long as it stays: each has its copies before the base changes.
//!
//! # What is the kernel's
//!
//! What may be loaded, resumed, suspended and removed when, and what becomes of a
//! store's exceptions when a second table names it (`orders.rs`, `snap.rs`), follow
//! shared facts about dm-snapshot. What differs, on purpose:
//!
//! - the instant of a snapshot is exact: writes under way when it is resumed end
//!   first, whatever is suspended;
//! - while a merge is under way the origin reads as the snapshot, by every device;
//! - a COW store on its own origin is refused, and so is one store for two origins.
//!
//! # Files
//!
//! - `table.rs`: tables, as values; `device.rs`: devices, their tables and courses;
//! - `snap.rs`: the snapshots that tables name, and where their exceptions are;
//! - `orders.rs`: what is ordered of devices; `course.rs`: what takes time of it;
//!   `join.rs`: snapshots come to work in their volumes; `close.rs`: the end of it all;
//! - `route.rs`: requests down, replies up; `cut.rs`: commands in parts; `cover.rs`: whose
//!   origin a range is; `disk.rs`: what disks are asked for; `news.rs`: what
//!   volumes tell;
//! - `info.rs`: what there is to tell.

mod close;
mod course;
mod cover;
mod cut;
mod device;
mod disk;
mod info;
mod join;
mod news;
mod orders;
mod route;
mod snap;
mod table;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};

use slab::Slab;

use crate::disk::{Action, OpId};
use crate::law::Law;
use crate::request::{Reply, SnapshotId};
use crate::volume::{Volume, VolumeConfig};

use course::Pending;
use cover::Cover;
use device::Device;
use disk::{Flushes, InFlight};
pub use info::{DeviceInfo, TableLine};
pub use orders::{DEFAULT_CHUNK, Errno, Need, NewLine, Refused};
use route::{Asked, Parent};
use snap::Snap;
pub use table::{DeviceId, DiskId, Line, Lower, Pair, Persistence, Target};

/// A snapshot's place among those that tables name.
type SnapKey = usize;
/// A volume's place.
type LevelKey = usize;

/// Where the bytes of a device lie in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Base {
    /// On a disk.
    Disk(DiskId),
    /// In a snapshot's view.
    Snap(SnapKey),
    /// They are zeros.
    Zero,
    /// Nowhere: it fails.
    Error,
}

/// An operation to perform on a disk.
#[derive(Clone, Debug)]
pub struct MappedOp {
    /// To be given back with the outcome.
    pub id: OpId,
    /// The disk.
    pub disk: DiskId,
    /// What to do.
    pub action: Action,
}

/// Names an order until it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OrderId(pub u64);

/// What a mapper has to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MapperEvent {
    /// An order has come to its end.
    Done(OrderId, Result<(), Refused>),
    /// The device is gone.
    Gone(DeviceId),
    /// No table names the disk any more: it can be closed.
    Unused(DiskId),
    /// A snapshot was lost, for this reason, and its store durably says so.
    Invalid(DeviceId, &'static str),
    /// The same, but its store cannot be made to say so: its origin takes no writes as
    /// long as a table has the snapshot (durability.md, rule 6).
    Unmarked(DeviceId, &'static str),
    /// A snapshot's store is full: it can be read, and no more written.
    Overflow(DeviceId),
    /// The device has been rolled back, and its chunks are merged from now on.
    MergeBegun(DeviceId),
    /// The merge is done.
    Merged(DeviceId),
    /// The merge has stopped.
    MergeFailed(DeviceId, &'static str),
    /// [`Mapper::close`] has ended (false: something could not be made durable).
    Closed(bool),
}

/// A disk that tables stand on.
#[derive(Debug)]
struct Disk {
    bytes: u64,
    /// Sectors of the smallest unit of I/O that it takes.
    block: u64,
    flushes: Flushes,
}

/// A volume, and what its origin is.
#[derive(Debug)]
struct Level {
    volume: Volume,
    origin: Lower,
    /// It asks those with smaller numbers that cover the same range.
    order: u32,
    is_touched: bool,
    is_runnable: bool,
    /// Snapshots that are on their way out, with the devices of their stores.
    leaving: Vec<(SnapshotId, Lower)>,
    /// It is ending: [`Mapper::close`].
    is_closing: bool,
}

/// All mapped devices of a server, their disks and snapshots. One thread owns it.
#[derive(Debug)]
pub struct Mapper {
    config: VolumeConfig,
    law: Law,
    /// Windows and merge steps of volumes, in bytes, if not theirs.
    steps: Option<(u64, u64)>,
    disks: BTreeMap<DiskId, Disk>,
    next_disk: u32,
    devices: BTreeMap<DeviceId, Device>,
    snaps: Slab<Snap>,
    levels: Slab<Level>,
    next_level: u32,
    covers: BTreeMap<Base, Vec<Cover>>,
    parents: Slab<Parent>,
    /// Requests that volumes have.
    asked: Slab<Asked>,
    /// Operations that disks have.
    in_flight: Slab<(DiskId, InFlight)>,
    /// Disks with flushes to begin.
    flush_wanted: Vec<DiskId>,
    /// Operations handed out since flushes were last begun.
    restless: u32,
    /// Requests that have come down to bases from devices and stores and have not
    /// ended, in the order in which they came, with how many parts are left of each.
    under_way: BTreeMap<u64, u32>,
    next_serial: u64,
    ready_ops: VecDeque<MappedOp>,
    touched: VecDeque<LevelKey>,
    runnable: VecDeque<LevelKey>,
    pending: Vec<Pending>,
    /// No order waits, and every volume has snapshots.
    is_settled: bool,
    next_order: u64,
    replies: VecDeque<Reply>,
    events: VecDeque<MapperEvent>,
    phase: Phase,
}

/// Where the mapper is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Open,
    /// Volumes end.
    Closing {
        ok: bool,
    },
    /// The last flushes are running.
    Flushing {
        left: usize,
        ok: bool,
    },
    Closed,
}

impl Mapper {
    /// No devices yet. Of the config, the memory and the piece hold for each origin
    /// of snapshots.
    pub fn new(config: VolumeConfig) -> Self {
        Self {
            config,
            law: Law::default(),
            steps: None,
            disks: BTreeMap::new(),
            next_disk: 0,
            devices: BTreeMap::new(),
            snaps: Slab::new(),
            levels: Slab::new(),
            next_level: 1,
            covers: BTreeMap::new(),
            parents: Slab::new(),
            asked: Slab::new(),
            in_flight: Slab::new(),
            flush_wanted: Vec::new(),
            restless: 0,
            under_way: BTreeMap::new(),
            next_serial: 1,
            ready_ops: VecDeque::new(),
            touched: VecDeque::new(),
            runnable: VecDeque::new(),
            pending: Vec::new(),
            is_settled: true,
            next_order: 0,
            replies: VecDeque::new(),
            events: VecDeque::new(),
            phase: Phase::Open,
        }
    }

    /// Have volumes work mutations off in windows, and merge in steps, of so many bytes:
    /// simulated disks are small ([`Volume::set_window`], [`Volume::set_merge_step`]).
    pub fn set_steps(&mut self, window: u64, merge_step: u64) {
        self.steps = Some((window, merge_step));
    }

    /// A mapper that breaks a rule, and has its volumes break it. None may be there yet.
    #[cfg(feature = "mutants")]
    pub fn set_law(&mut self, law: Law) {
        assert!(self.levels.is_empty());
        self.law = law;
    }

    /// A disk of so many bytes that tables may name from now on; `block` are the sectors
    /// of the smallest unit of I/O that it takes.
    pub fn add_disk(&mut self, bytes: u64, block: u64) -> DiskId {
        let id = DiskId(self.next_disk);
        self.next_disk += 1;
        let flushes = Flushes::default();
        let disk = Disk {
            bytes,
            block,
            flushes,
        };
        self.disks.insert(id, disk);
        id
    }

    /// The disk is forgotten, unless a table names it.
    pub fn drop_disk(&mut self, id: DiskId) -> bool {
        let is_busy = self.has_under_way() || self.in_flight.iter().any(|(_, op)| op.0 == id);
        let unused = !self.is_named(Lower::Disk(id)) && !is_busy;
        if unused {
            self.disks.remove(&id);
        }
        unused
    }

    /// The next reply, if there is one.
    pub fn poll_reply(&mut self) -> Option<Reply> {
        self.replies.pop_front()
    }

    /// The next thing to tell, if there is one.
    pub fn poll_event(&mut self) -> Option<MapperEvent> {
        self.settle();
        self.events.pop_front()
    }

    /// Nothing is in flight or waits.
    pub fn is_idle(&self) -> bool {
        self.touched.is_empty()
            && self.runnable.is_empty()
            && self.ready_ops.is_empty()
            && self.in_flight.is_empty()
            && self.flush_wanted.is_empty()
            && self.asked.is_empty()
            && self.parents.is_empty()
            && self.replies.is_empty()
            && self.pending.is_empty()
    }

    fn has_under_way(&self) -> bool {
        !self.under_way.is_empty()
    }
}
