//! Performs what the engine wants of the disks in an offline merge.
//!
//! What may go together goes together: reads that are neighbours in the store, and
//! writes that are neighbours on the disk, are one call each, of up to a piece. The
//! engine reads the store from one end to the other, which is what the system's
//! reading ahead is made for; what is written waits in the page cache for the flush at
//! the end of the step.

use bytes::Bytes;
use nbdsnap_engine::{Action, Device, DiskOp, OpId, Outcome, SnapshotId};

use super::buffers::Buffers;
use crate::io::file::{Medium, perform, read_into};
use crate::server::setup::OpenDisk;

/// One write gathers no more than so many pieces (IOV_MAX).
const MOST_PIECES: usize = 1024;

/// The disk and the stores of its snapshots.
#[derive(Debug)]
pub(super) struct Disks {
    /// The disk.
    pub(super) origin: OpenDisk,
    /// Its snapshots' stores.
    pub(super) stores: Vec<(SnapshotId, OpenDisk)>,
    /// Bytes in one read or write.
    piece: u64,
    buffers: Buffers,
}

/// Neighbours on a device, in one read or write.
struct Together {
    device: Device,
    start: u64,
    len: u64,
    /// The operations that it is, with the bytes of each, in order.
    ops: Vec<(OpId, u64)>,
    /// What is written; none for a read.
    data: Option<Vec<Bytes>>,
}

impl Together {
    /// An operation alone; or given back, if it is neither a read nor a write.
    fn new(op: DiskOp) -> Result<Self, DiskOp> {
        let (start, len, data) = match op.action {
            Action::Read { offset, len } => (offset, len, None),
            Action::Write { offset, data } => {
                let len = data.iter().map(|piece| piece.len() as u64).sum();
                (offset, len, Some(data))
            }
            _ => return Err(op),
        };
        Ok(Self {
            device: op.device,
            start,
            len,
            ops: vec![(op.id, len)],
            data,
        })
    }

    /// Take `next` in, if it goes behind this, in one call of up to `most` bytes.
    fn add(&mut self, next: Self, most: u64) -> Result<(), Self> {
        let is_neighbour = self.device == next.device && self.start + self.len == next.start;
        let fits = self.len + next.len <= most && self.ops.len() < MOST_PIECES;
        match (&mut self.data, &next.data) {
            (None, None) if is_neighbour && fits => {}
            (Some(data), Some(more))
                if is_neighbour && fits && data.len() + more.len() <= MOST_PIECES =>
            {
                data.extend(more.iter().cloned());
            }
            _ => return Err(next),
        }
        self.len += next.len;
        self.ops.extend(next.ops);
        Ok(())
    }
}

impl Disks {
    /// Of a volume whose disks are open; calls have up to `piece` bytes.
    pub(super) fn new(origin: OpenDisk, stores: Vec<(SnapshotId, OpenDisk)>, piece: u64) -> Self {
        Self {
            origin,
            stores,
            piece,
            buffers: Buffers::default(),
        }
    }

    /// The store of a snapshot.
    pub(super) fn store(&self, id: SnapshotId) -> &OpenDisk {
        let store = self.stores.iter().find(|(known, _)| *known == id);
        &store.expect("a store that was attached").1
    }

    /// Perform operations that do not depend on each other, and tell how each ended.
    pub(super) fn perform(&self, ops: Vec<DiskOp>, ended: &mut dyn FnMut(OpId, Outcome)) {
        let mut together: Option<Together> = None;
        for op in ops {
            let mut next = match Together::new(op) {
                Ok(next) => next,
                Err(DiskOp { id, device, action }) => {
                    let (disk, medium) = self.disk(device);
                    ended(id, perform(&disk.file, medium, &action));
                    continue;
                }
            };
            if let Some(known) = &mut together {
                match known.add(next, self.piece) {
                    Ok(()) => continue,
                    Err(back) => next = back,
                }
            }
            if let Some(complete) = together.replace(next) {
                self.transfer(complete, ended);
            }
        }
        if let Some(complete) = together {
            self.transfer(complete, ended);
        }
    }

    fn transfer(&self, all: Together, ended: &mut dyn FnMut(OpId, Outcome)) {
        let (disk, medium) = self.disk(all.device);
        let offset = all.start;
        let outcome = match all.data {
            None => read_into(&disk.file, offset, all.len, self.buffers.take())
                .map(|bytes| self.buffers.lend(bytes)),
            Some(data) => perform(&disk.file, medium, &Action::Write { offset, data }),
        };
        let mut at = 0;
        for (id, len) in all.ops {
            let part = match &outcome {
                // What a write answers is empty.
                Ok(bytes) if bytes.is_empty() => Ok(Bytes::new()),
                Ok(bytes) => Ok(bytes.slice(at..at + len as usize)),
                Err(error) => Err(*error),
            };
            at += len as usize;
            ended(id, part);
        }
    }

    fn disk(&self, device: Device) -> (&OpenDisk, Medium) {
        match device {
            Device::Origin if self.origin.is_block_device => {
                (&self.origin, Medium::OriginBlockDevice)
            }
            Device::Origin => (&self.origin, Medium::OriginFile),
            Device::Cow(id) => (self.store(id), Medium::Store),
        }
    }
}
