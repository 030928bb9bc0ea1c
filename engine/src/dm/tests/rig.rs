//! A mapper over disks in memory. Operations under way end in an order that a seed
//! decides.

use std::collections::BTreeMap;

use bytes::Bytes;
use nbdsnap_format::ChunkSize;

use super::super::*;
use crate::disk::{DiskError, Outcome};
use crate::request::{Command, Failure, RequestId};
use crate::store::{Access, Store, StoreIo, StoreKind, StoreSize, StoreSpec};

pub(super) const SECTOR: u64 = 512;

/// A small generator: what it gives depends on its seed alone.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }
}

/// A mapper and its disks.
pub(super) struct Rig {
    pub(super) mapper: Mapper,
    pub(super) disks: BTreeMap<DiskId, Vec<u8>>,
    pub(super) ops: Vec<MappedOp>,
    pub(super) replies: BTreeMap<RequestId, Result<Vec<u8>, Failure>>,
    pub(super) done: BTreeMap<OrderId, Result<(), Refused>>,
    pub(super) events: Vec<MapperEvent>,
    pub(super) next: u64,
    pub(super) dice: Dice,
    /// A disk that fails whatever changes it, and its flushes.
    pub(super) fails: Option<DiskId>,
}

/// A COW device as a store sees it.
pub(super) struct Cow<'a> {
    pub(super) rig: &'a mut Rig,
    pub(super) cow: Lower,
}

impl StoreIo for Cow<'_> {
    fn act(&mut self, action: Action) -> Outcome {
        let fua = false;
        let command = match action {
            Action::Read { offset, len } => Command::Read { offset, len },
            Action::Write { offset, data } => {
                let data = Bytes::from(data.concat());
                Command::Write { offset, data, fua }
            }
            Action::WriteZeroes { offset, len, .. } => Command::WriteZeroes {
                offset,
                len,
                fua,
                no_hole: true,
                fast_only: false,
            },
            Action::Flush => Command::Flush,
            other => unreachable!("{other:?} of a store"),
        };
        let id = self.rig.hand_in(self.cow, command);
        self.rig.run();
        let result = self.rig.replies.remove(&id).expect("it is answered");
        result.map(Bytes::from).map_err(|_| DiskError::Io(5))
    }

    fn keep_copy(&mut self, _: u64, _: &[u8]) -> Result<(), DiskError> {
        unreachable!("nothing tears here")
    }
}

pub(super) fn linear(lower: Lower, start: u64) -> Target {
    Target::Linear { lower, start }
}

pub(super) fn pair(origin: Lower, cow: Lower, chunk: u64) -> Pair {
    Pair {
        origin,
        cow,
        persistence: Persistence::Persistent,
        chunk,
        discard_zeroes_cow: false,
        discard_passdown_origin: false,
    }
}

pub(super) fn line(start: u64, len: u64, target: Target) -> Line {
    Line { start, len, target }
}

impl Rig {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            mapper: Mapper::new(VolumeConfig {
                origin_bytes: SECTOR,
                copy_memory: 1 << 20,
                copy_piece: 4096,
            }),
            disks: BTreeMap::new(),
            ops: Vec::new(),
            replies: BTreeMap::new(),
            done: BTreeMap::new(),
            events: Vec::new(),
            next: 0,
            dice: Dice(seed * 2 + 1),
            fails: None,
        }
    }

    /// A disk of so many sectors, each of which says where it is.
    pub(super) fn disk(&mut self, sectors: u64) -> Lower {
        let id = self.mapper.add_disk(sectors * SECTOR, 1);
        let bytes = (0..sectors).flat_map(|n| [(u64::from(id.0) * 50 + n) as u8; SECTOR as usize]);
        self.disks.insert(id, bytes.collect());
        Lower::Disk(id)
    }

    pub(super) fn empty_disk(&mut self, sectors: u64) -> Lower {
        let disk = self.disk(sectors);
        self.bytes(disk).fill(0);
        disk
    }

    pub(super) fn bytes(&mut self, disk: Lower) -> &mut Vec<u8> {
        let Lower::Disk(id) = disk else {
            unreachable!("it is a disk");
        };
        self.disks.get_mut(&id).expect("it is there")
    }

    pub(super) fn hand_in(&mut self, lower: Lower, command: Command) -> RequestId {
        let id = RequestId(self.next);
        self.next += 1;
        self.mapper.handle_request(id, lower, command);
        id
    }

    pub(super) fn collect(&mut self) {
        while let Some(op) = self.mapper.poll_disk_op() {
            self.ops.push(op);
        }
        while let Some(reply) = self.mapper.poll_reply() {
            let result = reply.result.map(|pieces| pieces.concat());
            assert!(self.replies.insert(reply.id, result).is_none());
        }
        while let Some(event) = self.mapper.poll_event() {
            if let MapperEvent::Done(order, result) = event {
                self.done.insert(order, result);
            } else {
                self.events.push(event);
            }
        }
    }

    /// One operation that is under way ends. False: there is none.
    pub(super) fn step(&mut self) -> bool {
        self.collect();
        if self.ops.is_empty() {
            return false;
        }
        let index = self.dice.below(self.ops.len() as u64) as usize;
        let MappedOp { id, disk, action } = self.ops.swap_remove(index);
        if self.fails == Some(disk) && !matches!(action, Action::Read { .. }) {
            self.mapper.handle_completion(id, Err(DiskError::Io(5)));
            return true;
        }
        let bytes = self.disks.get_mut(&disk).expect("it is there");
        let mut read = Bytes::new();
        match action {
            Action::Read { offset, len } => {
                let range = offset as usize..(offset + len) as usize;
                read = Bytes::copy_from_slice(&bytes[range]);
            }
            Action::Write { offset, data } => {
                let data = data.concat();
                bytes[offset as usize..][..data.len()].copy_from_slice(&data);
            }
            Action::WriteZeroes { offset, len, .. } => {
                bytes[offset as usize..][..len as usize].fill(0);
            }
            Action::Trim { .. } | Action::Flush => {}
            Action::Grow { .. } => unreachable!("nothing grows"),
        }
        self.mapper.handle_completion(id, Ok(read));
        true
    }

    pub(super) fn run(&mut self) {
        while self.step() {}
    }

    pub(super) fn ask(&mut self, lower: Lower, command: Command) -> Result<Vec<u8>, Failure> {
        let id = self.hand_in(lower, command);
        self.run();
        self.replies.remove(&id).expect("it is answered")
    }

    pub(super) fn read(&mut self, lower: Lower) -> Vec<u8> {
        let len = self.mapper.bytes_of(lower);
        self.ask(lower, Command::Read { offset: 0, len }).unwrap()
    }

    pub(super) fn write(&mut self, lower: Lower, sector: u64, len: u64, byte: u8) {
        self.ask(lower, write(sector, len, byte)).unwrap();
    }

    pub(super) fn create(&mut self, name: &str) -> DeviceId {
        self.mapper.create(name, "", None).unwrap()
    }

    /// Load a table, with stores made or opened as dmsetup would.
    pub(super) fn load(&mut self, id: DeviceId, lines: Vec<Line>) -> Result<(), Refused> {
        let needs = self.mapper.examine(id, &lines)?;
        let mut new = Vec::new();
        for (line, need) in lines.into_iter().zip(needs) {
            let store = match need {
                Some(Need::Store {
                    cow,
                    cow_bytes,
                    origin_bytes,
                    ..
                }) => Some(self.store(&line.target, cow, cow_bytes, origin_bytes)),
                Some(Need::Heir) | None => None,
            };
            new.push(NewLine { line, store });
        }
        self.mapper.load(id, false, new)
    }

    pub(super) fn store(
        &mut self,
        target: &Target,
        cow: Lower,
        cow_bytes: u64,
        origin_bytes: u64,
    ) -> Store {
        let (Target::Snapshot(pair) | Target::SnapshotMerge(pair)) = target else {
            unreachable!("it has a store");
        };
        let size = StoreSize {
            ready: cow_bytes,
            limit: cow_bytes,
            step: 0,
        };
        let kind = match pair.persistence {
            Persistence::Persistent => StoreKind::Persistent,
            Persistence::PersistentOverflow => StoreKind::PersistentOverflow,
            Persistence::Transient => StoreKind::Transient,
        };
        let chunk_size = ChunkSize::from_sectors(pair.chunk).unwrap();
        let mut io = Cow { rig: self, cow };
        let spec = StoreSpec {
            kind,
            chunk_size,
            size,
        };
        if kind == StoreKind::Transient {
            return Store::create(spec, &mut io).unwrap();
        }
        let opened = Store::open(kind, size, origin_bytes, Access::ReadWrite, &mut io);
        opened.unwrap_or_else(|_| Store::create(spec, &mut io).unwrap())
    }

    pub(super) fn end(&mut self, order: OrderId) -> Result<(), Refused> {
        self.run();
        self.done.remove(&order).expect("the order has ended")
    }

    pub(super) fn resume(&mut self, id: DeviceId) -> Result<(), Refused> {
        let order = self.mapper.resume(id, false)?;
        self.end(order)
    }

    pub(super) fn suspend(&mut self, id: DeviceId) {
        let order = self.mapper.suspend(id, false).unwrap();
        self.end(order).unwrap();
    }

    pub(super) fn remove(&mut self, id: DeviceId) -> Result<(), Refused> {
        let order = self.mapper.remove(id, false)?.expect("it is not deferred");
        self.end(order)
    }

    pub(super) fn device(&mut self, name: &str, lines: Vec<Line>) -> (DeviceId, Lower) {
        let id = self.create(name);
        self.load(id, lines).unwrap();
        self.resume(id).unwrap();
        (id, Lower::Device(id))
    }

    pub(super) fn status(&self, id: DeviceId) -> String {
        let lines = self.mapper.table(id, false).unwrap();
        lines[0].status.map_or_else(String::new, |s| s.to_string())
    }
}

pub(super) fn write(sector: u64, len: u64, byte: u8) -> Command {
    Command::Write {
        offset: sector * SECTOR,
        data: vec![byte; (len * SECTOR) as usize].into(),
        fua: false,
    }
}

pub(super) fn sectors(bytes: &[u8]) -> Vec<u8> {
    bytes.chunks(SECTOR as usize).map(|s| s[0]).collect()
}
