//! The mapped devices of a server at home on a shard: the engine's [`Mapper`], the
//! disks under it, the requests of its devices' clients, and those of whoever makes
//! and opens stores on a device.
//!
//! It is to [`Mapper`] what `hosted` is to a volume. A client's view of it is named by
//! the device's minor number: see [`view_of`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use bytes::Bytes;
use nbdsnap_engine::dm::{
    DeviceId, DeviceInfo, DiskId, Lower, Mapper, MapperEvent, OrderId, Refused,
};
use nbdsnap_engine::{
    Command, Device, Extent, Failure, OpId, Outcome, Reply, RequestId, SnapshotId, View,
    VolumeConfig,
};

use nbdsnap_format::SECTOR_BYTES;

use super::VolumeId;
use super::block_status;
use super::connection::Connection;
use super::disk::{Disk, LocalDisk};
use super::file::Medium;
use super::hosted::{Kind, Waiting, answer, answer_status, refuse};
use super::news::{News, What};
use super::shard::{Clients, Message, Outside};
use super::table::{Key, Table};
use crate::law;
use crate::nbd::reply::{self, Refusal};
use crate::nbd::transmission::Call;
use crate::server::setup::OpenDisk;

/// The name of all mapped devices together where volumes are named.
pub const MAPPED: VolumeId = VolumeId(u32::MAX);

/// The shard on which they live.
pub const MAPPED_SHARD: usize = 0;

/// Operations performed before others have their turn.
const TURN_OPS: usize = 1024;

/// Memory for copies, for each origin of snapshots.
const COPY_MEMORY: u64 = 16 << 20;

/// The largest piece in which old chunks are copied.
const COPY_PIECE: u64 = 1 << 20;

/// How a route calls a mapped device: as a snapshot with its minor number.
pub fn view_of(device: DeviceId) -> View {
    View::Snapshot(SnapshotId(device.0))
}

fn device_of(view: View) -> DeviceId {
    match view {
        View::Snapshot(SnapshotId(minor)) => DeviceId(minor),
        View::Origin => unreachable!("routes to mapped devices name them"),
    }
}

/// What came of a request for a device or a disk.
pub type Answered = Result<Vec<Bytes>, Failure>;

/// Who waits for a reply.
#[derive(Debug)]
enum Asker {
    Client(Waiting),
    Order(Sender<Answered>),
}

/// All mapped devices and what belongs to them.
#[derive(Debug)]
pub struct Mapped {
    mapper: Mapper,
    disks: BTreeMap<DiskId, LocalDisk>,
    waiting: Table<Asker>,
    orders: BTreeMap<OrderId, Sender<Result<(), Refused>>>,
    /// How often somebody has looked at all devices.
    looks: u64,
    closed: Option<bool>,
    is_closing: bool,
}

/// Something to be done with the mapped devices, on their thread, between two turns of
/// requests.
pub(super) struct MappedCall(pub(super) Box<dyn FnOnce(&mut Mapped) + Send>);

impl std::fmt::Debug for MappedCall {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MappedCall")
    }
}

impl Mapped {
    pub(super) fn new() -> Self {
        Self {
            mapper: law::new_mapper(VolumeConfig {
                // Each origin of snapshots has its own length.
                origin_bytes: 512,
                copy_memory: COPY_MEMORY,
                copy_piece: COPY_PIECE,
            }),
            disks: BTreeMap::new(),
            waiting: Table::new(),
            orders: BTreeMap::new(),
            looks: 0,
            closed: None,
            is_closing: false,
        }
    }

    /// The engine: for questions, and for orders that are done at once.
    pub fn mapper(&mut self) -> &mut Mapper {
        &mut self.mapper
    }

    /// An open disk that tables may name from now on.
    pub fn add_disk(&mut self, open: OpenDisk) -> DiskId {
        let block = u64::from(open.logical_block) / SECTOR_BYTES;
        let id = self.mapper.add_disk(open.bytes, block);
        let file = open.file;
        let medium = if open.is_block_device {
            Medium::OriginBlockDevice
        } else {
            Medium::OriginFile
        };
        let read_only = false;
        let disk = Disk {
            file,
            medium,
            read_only,
        };
        self.disks.insert(id, LocalDisk::new(disk));
        id
    }

    /// Close a disk that no table names. False: one does, or something is under way.
    pub fn close_disk(&mut self, id: DiskId) -> bool {
        let dropped = self.mapper.drop_disk(id);
        if dropped {
            self.disks.remove(&id);
        }
        dropped
    }

    /// All devices, and a number that is larger with every such look.
    pub fn numbered_devices(&mut self) -> (u64, Vec<DeviceInfo>) {
        self.looks += 1;
        (self.looks, self.mapper.devices())
    }

    /// Have `end` told when `order` has come to its end.
    pub fn follow(&mut self, order: OrderId, end: Sender<Result<(), Refused>>) {
        self.orders.insert(order, end);
    }

    /// Nobody waits for an order any more.
    pub fn forget(&mut self, order: OrderId) {
        self.orders.remove(&order);
        self.mapper.forget(order);
    }

    /// Ask for something on a device or a disk.
    pub fn ask(&mut self, lower: Lower, command: Command, answered: Sender<Answered>) {
        let key = self.waiting.insert(Asker::Order(answered));
        self.mapper
            .handle_request(RequestId(key.to_u64()), lower, command);
    }

    /// A client comes. False: its device has gone.
    pub(super) fn attach(&mut self, view: View) -> bool {
        !self.is_closing && self.mapper.attach(device_of(view))
    }

    /// It has gone.
    pub(super) fn detach(&mut self, view: View) {
        self.mapper.detach(device_of(view));
    }

    /// What the client's export is called.
    pub(super) fn name_of(&self, view: View) -> String {
        let info = self.mapper.info(device_of(view));
        info.map_or_else(|_| "?".into(), |info| info.name)
    }

    /// Serve `call` of `connection`, whose key is `key`.
    pub(super) fn start(&mut self, key: Key, connection: &mut Connection, cookie: u64, call: Call) {
        if self.is_closing {
            return refuse(connection, cookie, Refusal::ShuttingDown);
        }
        match call {
            Call::Read {
                offset,
                len,
                one_chunk,
            } => {
                let kind = Kind::Read {
                    offset,
                    len,
                    one_chunk,
                };
                let command = Command::Read {
                    offset,
                    len: u64::from(len),
                };
                self.hand_in(key, connection, cookie, len as usize, kind, command);
            }
            Call::Command(command) => {
                let bytes = match &command {
                    Command::Write { data, .. } => data.len(),
                    _ => 0,
                };
                self.hand_in(key, connection, cookie, bytes, Kind::Word, command);
            }
            // Reading ahead is advice.
            Call::Nothing | Call::Cache { .. } => reply::done(&mut connection.outbox, cookie),
            Call::BlockStatus {
                offset,
                len,
                one_extent,
            } => {
                // What lies below may be anything: all of it is told to be data.
                let extent = Extent {
                    device: Device::Origin,
                    offset,
                    len: u64::from(len),
                };
                let status = block_status::all_data(&[extent]);
                answer_status(connection, cookie, one_extent, &status);
            }
        }
    }

    fn hand_in(
        &mut self,
        key: Key,
        connection: &mut Connection,
        cookie: u64,
        bytes: usize,
        kind: Kind,
        command: Command,
    ) {
        connection.begin(bytes);
        let waiting = Waiting {
            connection: key,
            cookie,
            bytes,
            kind,
        };
        let id = self.waiting.insert(Asker::Client(waiting));
        let lower = Lower::Device(device_of(connection.view));
        self.mapper
            .handle_request(RequestId(id.to_u64()), lower, command);
    }

    /// A helper has performed an operation.
    pub(super) fn handle_completion(&mut self, op: OpId, outcome: Outcome) {
        self.mapper.handle_completion(op, outcome);
    }

    /// Take no further request; finish the others, commit and flush.
    pub(super) fn close(&mut self) {
        if !self.is_closing {
            self.is_closing = true;
            self.orders.clear();
            self.mapper.close();
        }
    }

    /// Once closed with nothing in flight: whether all is durable.
    pub(super) fn closed(&self) -> Option<bool> {
        self.closed.filter(|_| self.waiting.is_empty())
    }

    /// Perform what the engine wants done, answer what it has finished. True if there
    /// is more to do at once than one turn allows.
    pub(super) fn pump(&mut self, clients: &mut Clients, outside: &mut Outside) -> bool {
        let more = self.perform_ops(outside);
        while let Some(reply) = self.mapper.poll_reply() {
            self.handle_reply(reply, clients);
        }
        while let Some(event) = self.mapper.poll_event() {
            self.handle_event(event, outside);
        }
        more
    }

    fn perform_ops(&mut self, outside: &mut Outside) -> bool {
        for _ in 0..TURN_OPS {
            let Some(op) = self.mapper.poll_disk_op() else {
                return false;
            };
            let local = self.disks.get_mut(&op.disk);
            let local = local.expect("a disk is open as long as something is under way");
            if let Some(outcome) = local.perform_now(&op.action, &mut outside.sleeps) {
                self.mapper.handle_completion(op.id, outcome);
                continue;
            }
            let disk = Arc::clone(&local.disk);
            outside.submit(MAPPED, move || Message::Completed {
                volume: MAPPED,
                op: op.id,
                outcome: disk.perform(&op.action),
            });
        }
        true
    }

    /// What happens to snapshots by itself is told to whoever follows events.
    fn tell(&self, event: &MapperEvent, outside: &Outside) {
        let (device, what) = match *event {
            MapperEvent::Invalid(device, why) | MapperEvent::Unmarked(device, why) => {
                (device, What::Invalid(why))
            }
            MapperEvent::Overflow(device) => (device, What::Overflow),
            MapperEvent::MergeBegun(device) => (device, What::MergeBegun),
            MapperEvent::Merged(device) => (device, What::Merged),
            MapperEvent::MergeFailed(device, why) => (device, What::MergeFailed(why)),
            MapperEvent::Done(..)
            | MapperEvent::Gone(_)
            | MapperEvent::Unused(_)
            | MapperEvent::Closed(_) => return,
        };
        let Ok(info) = self.mapper.info(device) else {
            return;
        };
        let (volume, snapshot) = match info.name.split_once('@') {
            Some((volume, snapshot)) => (volume, Some(snapshot)),
            None => (info.name.as_str(), None),
        };
        outside.herald.tell(News {
            volume: MAPPED,
            volume_name: volume.to_owned(),
            snapshot: snapshot.map(|name| (SnapshotId(device.0), name.to_owned())),
            what,
        });
    }

    fn handle_reply(&mut self, reply: Reply, clients: &mut Clients) {
        let asker = self.waiting.remove(Key::from_u64(reply.id.0));
        match asker.expect("a reply answers a request, once") {
            Asker::Client(waiting) => answer(clients, &waiting, reply.result),
            // Whoever asked may have given up.
            Asker::Order(answered) => drop(answered.send(reply.result)),
        }
    }

    fn handle_event(&mut self, event: MapperEvent, outside: &Outside) {
        self.tell(&event, outside);
        let name = |device| {
            let info = self.mapper.info(device);
            info.map_or_else(|_| "?".into(), |info| info.name)
        };
        match event {
            MapperEvent::Done(order, result) => {
                if let Some(end) = self.orders.remove(&order) {
                    let _ = end.send(result);
                }
            }
            MapperEvent::Invalid(device, why) => tracing::warn!(
                device = name(device),
                "the snapshot is lost: {why}; its reads and writes fail from now on, its origin goes on"
            ),
            MapperEvent::Unmarked(device, why) => tracing::error!(
                device = name(device),
                "the snapshot is lost: {why}; nor can its store be made to say so: its origin takes no writes until this device is removed, and the store is to be loaded no more"
            ),
            MapperEvent::Overflow(device) => tracing::warn!(
                device = name(device),
                "the snapshot's store is full: it can still be read, but writes to it fail"
            ),
            MapperEvent::MergeBegun(device) => tracing::info!(
                device = name(device),
                "the origin has been rolled back to the snapshot; its chunks are merged from now on"
            ),
            MapperEvent::Merged(device) => {
                tracing::info!(device = name(device), "the snapshot is merged");
            }
            MapperEvent::MergeFailed(device, why) => {
                tracing::error!(device = name(device), "the merge has stopped: {why}");
            }
            MapperEvent::Closed(durable) => self.closed = Some(durable),
            // Whoever ordered it closes what is not named any more.
            MapperEvent::Gone(_) | MapperEvent::Unused(_) => {}
        }
    }
}
