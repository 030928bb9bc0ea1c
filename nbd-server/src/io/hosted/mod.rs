//! A volume at home on a shard: the engine's tree of snapshots, the disks under it
//! and the requests of its clients that are under way.
//!
//! [`Hosted::start`] takes a request, answers it at once where that is
//! possible, else hands it to the engine. [`Hosted::pump`] performs what the
//! engine wants done and answers what it has finished.

mod arrival;
mod events;
mod hold;
mod orders;
mod questions;

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use bytes::Bytes;
use nbdsnap_engine::{
    Command, Device, Extent, Failure, MergeProgress, Now, OpId, Outcome, Reply, Request, RequestId,
    SnapshotId, SnapshotInfo, Status, Store, Tree, View, VolumeConfig,
};

use crate::io::connection::Connection;
use crate::io::disk::{Disk, LocalDisk, READ_HERE_MAX, WRITE_HERE_MAX};
use crate::io::file::Medium;
use crate::io::shard::{Clients, Message, Outside};
use crate::io::table::{Key, Table};
use crate::io::{VolumeAccess, VolumeId};
use crate::law;
use crate::nbd::reply::{self, ReadOf, Refusal};
use crate::nbd::transmission::Call;

use arrival::Arrival;
use hold::Hold;

pub(super) use questions::answer_status;

pub use hold::NotHeld;
pub use orders::{AutoExtend, NotMerged, Settings, VolumeOrder};

/// Operations performed for one volume before others have their turn.
const TURN_OPS: usize = 1024;

/// An open disk or store.
#[derive(Debug)]
pub struct NewDisk {
    /// The open file; its lock goes with it.
    pub file: File,
    /// It is a block device.
    pub is_block_device: bool,
}

/// A snapshot that comes with a volume.
#[derive(Debug)]
pub struct NewSnapshot {
    /// Its path within the volume, which says what it is of (`names`).
    pub name: String,
    /// Its exceptions.
    pub store: Store,
    /// Its store's device.
    pub disk: NewDisk,
    /// Its instant is still to be taken.
    pub fresh: bool,
    /// It is being merged into what it is of, and that goes on.
    pub merging: bool,
    /// How it behaves.
    pub settings: Settings,
}

/// A volume that moves in.
#[derive(Debug)]
pub struct NewVolume {
    /// What it is called from now on.
    pub id: VolumeId,
    /// The export's name, for messages.
    pub name: String,
    /// The engine's settings.
    pub config: VolumeConfig,
    /// The origin.
    pub disk: NewDisk,
    /// What may change on its devices.
    pub access: VolumeAccess,
    /// Its snapshots.
    pub snapshots: Vec<NewSnapshot>,
}

/// The views of a hosted volume's snapshots, in the order in which they came;
/// or the name of a snapshot that could not be taken.
pub type Views = Result<Vec<View>, String>;

/// How a snapshot of a hosted volume is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostedStatus {
    /// Its volume.
    pub volume: VolumeId,
    /// Its name within the volume.
    pub snapshot: SnapshotId,
    /// Its export's name.
    pub export: String,
    /// The engine's word.
    pub status: Status,
    /// More about it, unless it is being merged.
    pub info: Option<SnapshotInfo>,
    /// How far its merge has come, if it is being merged.
    pub merge: Option<MergeProgress>,
}

/// A request that the engine or a helper has.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) connection: Key,
    pub(super) cookie: u64,
    /// Counted against the connection's bound.
    pub(super) bytes: usize,
    pub(super) kind: Kind,
}

#[derive(Debug)]
pub(super) enum Kind {
    /// The reply brings these bytes.
    Read {
        offset: u64,
        len: u32,
        one_chunk: bool,
    },
    /// The reply is a word.
    Word,
    /// A helper asks the file system about `extents`.
    Status {
        offset: u64,
        len: u64,
        one_extent: bool,
        extents: Vec<Extent>,
        tries: u32,
    },
}

#[derive(Debug)]
struct HostedStore {
    name: String,
    disk: LocalDisk,
}

/// Where a volume is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Taking requests.
    Serving,
    /// Finishing those it has.
    Closing,
    /// Nothing is in flight; all is durable (or not: false).
    Closed(bool),
}

/// A volume and what belongs to it.
#[derive(Debug)]
pub(super) struct Hosted {
    id: VolumeId,
    name: String,
    tree: Tree,
    origin: LocalDisk,
    stores: BTreeMap<SnapshotId, HostedStore>,
    waiting: Table<Waiting>,
    state: State,
    arrival: Option<Arrival>,
    /// The instant that is being taken by an order.
    hold: Option<Hold>,
    /// Snapshots that are being removed, and whom to tell of the end.
    leaving: BTreeMap<SnapshotId, Sender<()>>,
    /// Of these, those that can only go when their own snapshots have gone.
    leave_later: Vec<SnapshotId>,
    /// Whom to tell that the volume stands still.
    suspending: Option<Sender<bool>>,
    /// Stores that grow by themselves.
    auto_extends: BTreeMap<SnapshotId, AutoExtend>,
    /// Whom to tell that a merge has begun.
    merge: Option<Sender<Result<(), NotMerged>>>,
    /// What may change on its devices.
    access: VolumeAccess,
    /// Memory for one question at a time.
    extents: Vec<Extent>,
}

impl Hosted {
    /// Move in. The views are reported once every fresh snapshot has been taken,
    /// which needs [`Hosted::pump`].
    pub(super) fn new(new: NewVolume, report: Sender<Views>) -> Self {
        let medium = if new.disk.is_block_device {
            Medium::OriginBlockDevice
        } else {
            Medium::OriginFile
        };
        let access = new.access;
        let mut hosted = Self {
            id: new.id,
            name: new.name,
            tree: law::new_tree(new.config),
            origin: LocalDisk::new(Disk {
                file: new.disk.file,
                medium,
                read_only: !access.writes_origin(),
            }),
            stores: BTreeMap::new(),
            waiting: Table::new(),
            state: State::Serving,
            hold: None,
            leaving: BTreeMap::new(),
            leave_later: Vec::new(),
            suspending: None,
            auto_extends: BTreeMap::new(),
            merge: None,
            access,
            arrival: None,
            extents: Vec::new(),
        };
        hosted.receive(new.snapshots, report);
        hosted
    }

    /// Take no further request; finish the others, commit and flush.
    pub(super) fn close(&mut self) {
        if self.state == State::Serving {
            self.state = State::Closing;
            self.tree.close();
        }
    }

    /// Once closed with nothing in flight: whether all is durable.
    pub(super) fn closed(&self) -> Option<bool> {
        match self.state {
            State::Closed(durable) if self.waiting.is_empty() => Some(durable),
            _ => None,
        }
    }

    /// Serve `call` of `connection`, whose key is `key`: answer it, or see to it
    /// that it will be answered.
    pub(super) fn start(
        &mut self,
        key: Key,
        connection: &mut Connection,
        cookie: u64,
        call: Call,
        outside: &mut Outside,
    ) {
        if self.state != State::Serving {
            refuse(connection, cookie, Refusal::ShuttingDown);
            return;
        }
        match call {
            Call::Read {
                offset,
                len,
                one_chunk,
            } => {
                let of = ReadOf {
                    cookie,
                    offset,
                    len,
                    one_chunk,
                };
                if connection.reads_wait() {
                    connection.let_wait(of);
                } else {
                    self.start_read(key, connection, &of, outside);
                }
            }
            Call::Command(command) => {
                self.start_command(key, connection, cookie, command, outside);
            }
            Call::Nothing => reply::done(&mut connection.outbox, cookie),
            Call::BlockStatus {
                offset,
                len,
                one_extent,
            } => self.start_status(key, connection, cookie, offset, len, one_extent, outside),
            Call::Cache { offset, len } => {
                self.start_cache(key, connection, cookie, offset, len, outside);
            }
        }
    }

    fn start_read(
        &mut self,
        key: Key,
        connection: &mut Connection,
        of: &ReadOf,
        outside: &mut Outside,
    ) {
        if self.read_here(connection, of, outside) {
            return;
        }
        let kind = Kind::Read {
            offset: of.offset,
            len: of.len,
            one_chunk: of.one_chunk,
        };
        let len = u64::from(of.len);
        let offset = of.offset;
        self.hand_in(
            key,
            connection,
            of.cookie,
            of.len as usize,
            kind,
            Command::Read { offset, len },
        );
    }

    /// Read from the page cache straight into the reply. False: that cannot be
    /// done now.
    fn read_here(
        &mut self,
        connection: &mut Connection,
        of: &ReadOf,
        outside: &mut Outside,
    ) -> bool {
        let structured = connection.terms.structured;
        let outbox = &mut connection.outbox;
        if of.len == 0 {
            let open = reply::begin_read(outbox, structured, of);
            reply::end_read(outbox, structured, of, &open);
            return true;
        }
        if u64::from(of.len) > READ_HERE_MAX {
            return false;
        }
        self.extents.clear();
        let len = u64::from(of.len);
        let now = self
            .tree
            .read_now(connection.view, of.offset, len, &mut self.extents);
        if now == Now::Queue {
            return false;
        }
        let room = of.len as usize + reply::READ_HEADER_MAX;
        outbox.make_room(room, &mut outside.spares);
        let open = reply::begin_read(outbox, structured, of);
        for extent in &self.extents {
            let disk = local_disk(&mut self.origin, &mut self.stores, extent.device);
            if !disk.read_now(
                outbox.tail(),
                extent.offset,
                extent.len as usize,
                &mut outside.sleeps,
            ) {
                reply::abandon_read(outbox, &open);
                return false;
            }
        }
        reply::end_read(outbox, structured, of, &open);
        true
    }

    fn start_command(
        &mut self,
        key: Key,
        connection: &mut Connection,
        cookie: u64,
        command: Command,
        outside: &mut Outside,
    ) {
        let mut bytes = 0;
        if let Command::Write { offset, data, fua } = &command {
            bytes = data.len();
            if !fua && self.write_here(connection, cookie, *offset, data, outside) {
                return;
            }
        }
        self.hand_in(key, connection, cookie, bytes, Kind::Word, command);
    }

    /// Write into the page cache at once. False: that cannot be done now.
    fn write_here(
        &mut self,
        connection: &mut Connection,
        cookie: u64,
        offset: u64,
        data: &Bytes,
        outside: &mut Outside,
    ) -> bool {
        let len = data.len() as u64;
        if len > WRITE_HERE_MAX {
            return false;
        }
        self.extents.clear();
        let now = self
            .tree
            .write_now(connection.view, offset, len, &mut self.extents);
        if now == Now::Queue {
            return false;
        }
        for extent in &self.extents {
            if !local_disk(&mut self.origin, &mut self.stores, extent.device).writes_are_quick() {
                return false;
            }
        }
        let mut rest = &data[..];
        for extent in &self.extents {
            let (piece, behind) = rest.split_at(extent.len as usize);
            let disk = local_disk(&mut self.origin, &mut self.stores, extent.device);
            if let Err(error) = disk.write_here(extent.offset, piece, &mut outside.sleeps) {
                tracing::warn!(export = self.name, offset, len, "a write failed: {error}");
                refuse(connection, cookie, Refusal::Failed(Failure::Io));
                return true;
            }
            rest = behind;
        }
        reply::done(&mut connection.outbox, cookie);
        true
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
        let id = self.waiting.insert(Waiting {
            connection: key,
            cookie,
            bytes,
            kind,
        });
        self.tree.handle_request(Request {
            id: RequestId(id.to_u64()),
            view: connection.view,
            command,
        });
    }

    /// A helper has performed an operation.
    pub(super) fn handle_completion(&mut self, op: OpId, outcome: Outcome) {
        self.tree.handle_completion(op, outcome);
    }

    /// Perform what the engine wants done, answer what it has finished. True if
    /// there is more to do at once than one turn allows.
    pub(super) fn pump(&mut self, clients: &mut Clients, outside: &mut Outside) -> bool {
        let mut more = self.perform_ops(outside);
        while let Some(reply) = self.tree.poll_reply() {
            self.handle_reply(reply, clients);
        }
        while let Some(event) = self.tree.poll_event() {
            self.handle_event(&event, outside);
            // What follows from it may be something to do.
            more = true;
        }
        if !self.auto_extends.is_empty() {
            self.extend_by_themselves(outside);
        }
        self.report_arrival();
        more
    }

    fn perform_ops(&mut self, outside: &mut Outside) -> bool {
        for _ in 0..TURN_OPS {
            let Some(op) = self.tree.poll_disk_op() else {
                return false;
            };
            let local = local_disk(&mut self.origin, &mut self.stores, op.device);
            if let Some(outcome) = local.perform_now(&op.action, &mut outside.sleeps) {
                self.tree.handle_completion(op.id, outcome);
                continue;
            }
            let disk = Arc::clone(&local.disk);
            let volume = self.id;
            outside.submit(volume, move || Message::Completed {
                volume,
                op: op.id,
                outcome: disk.perform(&op.action),
            });
        }
        true
    }

    fn handle_reply(&mut self, reply: Reply, clients: &mut Clients) {
        let key = Key::from_u64(reply.id.0);
        let waiting = self
            .waiting
            .remove(key)
            .expect("a reply answers a request, once");
        answer(clients, &waiting, reply.result);
    }
}

fn local_disk<'a>(
    origin: &'a mut LocalDisk,
    stores: &'a mut BTreeMap<SnapshotId, HostedStore>,
    device: Device,
) -> &'a mut LocalDisk {
    match device {
        Device::Origin => origin,
        Device::Cow(id) => {
            &mut stores
                .get_mut(&id)
                .expect("the engine knows its stores")
                .disk
        }
    }
}

pub(super) fn refuse(connection: &mut Connection, cookie: u64, refusal: Refusal) {
    let structured = connection.terms.structured;
    reply::refused(&mut connection.outbox, structured, cookie, refusal);
}

/// Answer a request that was under way, if its client is still there.
pub(super) fn answer(
    clients: &mut Clients,
    waiting: &Waiting,
    result: Result<Vec<Bytes>, Failure>,
) {
    let Some(connection) = clients.get(waiting.connection) else {
        return;
    };
    let cookie = waiting.cookie;
    match (result, &waiting.kind) {
        (Err(failure), _) => refuse(connection, cookie, Refusal::Failed(failure)),
        (
            Ok(pieces),
            &Kind::Read {
                offset,
                len,
                one_chunk,
            },
        ) => {
            let of = ReadOf {
                cookie,
                offset,
                len,
                one_chunk,
            };
            reply::read(
                &mut connection.outbox,
                connection.terms.structured,
                &of,
                pieces,
            );
        }
        (Ok(_), _) => reply::done(&mut connection.outbox, cookie),
    }
    connection.finish(waiting.bytes);
    connection.send_batch();
    clients.touch(waiting.connection);
}
