//! A volume on devices in memory, whose operations end in any order: every view
//! shows what a byte array would. Power cuts are the simulator's business.

mod faults;
mod full;
mod hands;
mod live;
mod merge;
mod still;

use bytes::Bytes;
use nbdsnap_format::ChunkSize;
use proptest::prelude::*;

use super::*;
use crate::disk::{Action, DiskError, Outcome};
use crate::request::{Command, Request, RequestId};
use crate::store::Store;
use crate::store::{StoreIo, StoreKind, StoreSize, StoreSpec};

const ORIGIN: u64 = 40 * 512;

/// A device in memory.
struct Memory(Vec<u8>);

impl Memory {
    fn perform(&mut self, action: &Action) -> Bytes {
        match action {
            Action::Read { offset, len } => {
                let range = *offset as usize..(*offset + *len) as usize;
                return Bytes::copy_from_slice(&self.0[range]);
            }
            Action::Write { offset, data } => {
                let mut at = *offset as usize;
                for piece in data {
                    self.0[at..at + piece.len()].copy_from_slice(piece);
                    at += piece.len();
                }
            }
            Action::WriteZeroes { offset, len, .. } | Action::Trim { offset, len } => {
                self.0[*offset as usize..(*offset + *len) as usize].fill(0);
            }
            Action::Flush => {}
            Action::Grow { to } => {
                assert!(*to > self.0.len() as u64);
                self.0.resize(*to as usize, 0);
            }
        }
        Bytes::new()
    }
}

impl StoreIo for Memory {
    fn act(&mut self, action: Action) -> Outcome {
        Ok(self.perform(&action))
    }

    fn keep_copy(&mut self, _: u64, _: &[u8]) -> Result<(), DiskError> {
        unreachable!("nothing tears here")
    }
}

/// A volume, its devices (the origin first) and operations that have not ended.
struct Rig {
    volume: Volume,
    devices: Vec<Memory>,
    running: Vec<DiskOp>,
    replies: Vec<Reply>,
    random: u64,
}

impl Rig {
    fn new(stores: &[(StoreKind, u64, u64, u64)], random: u64) -> Self {
        let mut rig = Self {
            volume: Volume::new(VolumeConfig {
                origin_bytes: ORIGIN,
                copy_memory: 4096,
                copy_piece: 2048,
            }),
            devices: vec![Memory(vec![7; ORIGIN as usize])],
            running: Vec::new(),
            replies: Vec::new(),
            random,
        };
        for &(kind, sectors, ready, limit) in stores {
            let chunk_size = ChunkSize::from_sectors(sectors).unwrap();
            let mut memory = Memory(vec![0; (ready * chunk_size.bytes()) as usize]);
            let size = StoreSize {
                ready: ready * chunk_size.bytes(),
                limit: limit * chunk_size.bytes(),
                step: 0,
            };
            let spec = StoreSpec {
                kind,
                chunk_size,
                size,
            };
            rig.volume
                .attach_snapshot(Store::create(spec, &mut memory).unwrap());
            rig.devices.push(memory);
        }
        rig
    }

    fn below(&mut self, n: usize) -> usize {
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) as usize % n
    }

    /// Let one operation end, in any order; false if there is none.
    fn step(&mut self) -> bool {
        while let Some(op) = self.volume.poll_disk_op() {
            self.running.push(op);
        }
        while let Some(reply) = self.volume.poll_reply() {
            self.replies.push(reply);
        }
        if self.running.is_empty() {
            return false;
        }
        let index = self.below(self.running.len());
        let op = self.running.swap_remove(index);
        let device = match op.device {
            Device::Origin => 0,
            Device::Cow(id) => id.0 as usize + 1,
        };
        let bytes = self.devices[device].perform(&op.action);
        self.volume.handle_completion(op.id, Ok(bytes));
        true
    }

    fn read_all(&mut self, view: View) -> Result<Vec<u8>, Failure> {
        let id = RequestId(u64::MAX);
        let (offset, len) = (0, ORIGIN);
        let command = Command::Read { offset, len };
        self.volume.handle_request(Request { id, view, command });
        while self.step() {}
        let reply = self.replies.pop().expect("the read is answered");
        assert_eq!(reply.id, id);
        reply.result.map(|pieces| pieces.concat())
    }
}

fn view_of(index: usize) -> View {
    match index {
        0 => View::Origin,
        n => View::Snapshot(SnapshotId(n as u32 - 1)),
    }
}

#[derive(Clone, Debug)]
enum Op {
    Write(usize, u64, u64, bool),
    Zero(usize, u64, u64),
    Flush(usize),
    Steps(usize),
}

fn ops(views: usize) -> impl Strategy<Value = Vec<Op>> {
    let range = || (0..ORIGIN, 1..5000u64);
    let op = prop_oneof![
        8 => (0..views, range(), any::<bool>()).prop_map(|(v, (o, l), f)| Op::Write(v, o, l.min(ORIGIN - o), f)),
        1 => (0..views, range()).prop_map(|(v, (o, l))| Op::Zero(v, o, l.min(ORIGIN - o))),
        1 => (0..views).prop_map(Op::Flush),
        4 => (0..12usize).prop_map(Op::Steps),
    ];
    proptest::collection::vec(op, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_view_shows_its_own_bytes(ops in ops(5), random: u64) {
        let stores = [
            (StoreKind::Persistent, 1, 80, 80),
            (StoreKind::Persistent, 2, 4, 60),
            (StoreKind::PersistentOverflow, 4, 3, 40),
            (StoreKind::Transient, 8, 8, 8),
        ];
        let mut rig = Rig::new(&stores, random);
        let mut models = vec![vec![7u8; ORIGIN as usize]; 5];
        let mut sent = 0;
        for (i, op) in ops.into_iter().enumerate() {
            let id = RequestId(i as u64);
            let (view, command) = match op {
                Op::Write(view, offset, len, fua) => {
                    let byte = (i % 250) as u8 + 1;
                    models[view][offset as usize..(offset + len) as usize].fill(byte);
                    let data = Bytes::from(vec![byte; len as usize]);
                    (view, Command::Write { offset, data, fua })
                }
                Op::Zero(view, offset, len) => {
                    models[view][offset as usize..(offset + len) as usize].fill(0);
                    let (fua, no_hole, fast_only) = (false, false, false);
                    (view, Command::WriteZeroes { offset, len, fua, no_hole, fast_only })
                }
                Op::Flush(view) => (view, Command::Flush),
                Op::Steps(n) => {
                    for _ in 0..n {
                        rig.step();
                    }
                    continue;
                }
            };
            sent += 1;
            rig.volume.handle_request(Request { id, view: view_of(view), command });
        }
        while rig.step() {}
        let replies = std::mem::take(&mut rig.replies);
        prop_assert_eq!(replies.len(), sent);
        for reply in replies {
            prop_assert_eq!(reply.result, Ok(Vec::new()));
        }
        for (index, model) in models.iter().enumerate() {
            prop_assert_eq!(&rig.read_all(view_of(index)).unwrap(), model, "view {}", index);
        }
        rig.volume.close();
        while rig.step() {}
        let mut events = std::iter::from_fn(|| rig.volume.poll_event());
        let last = events.find(|event| !matches!(event, Event::Filling(..)));
        prop_assert_eq!(last, Some(Event::Closed(true)));
        // The stores, opened anew, say the same.
        for index in 1..4 {
            let memory = &mut rig.devices[index];
            let ready = memory.0.len() as u64;
            let size = StoreSize { ready, limit: ready, step: 0 };
            let store = Store::open(StoreKind::Persistent, size, ORIGIN, crate::Access::ReadWrite, memory);
            let status = rig.volume.status(SnapshotId(index as u32 - 1)).unwrap();
            let (Status::Active { allocated, metadata, .. }, Status::Active { allocated: a, metadata: m, .. }) =
                (store.unwrap().status(), status) else { panic!("both are active") };
            prop_assert_eq!((allocated, metadata), (a, m));
        }
    }
}
