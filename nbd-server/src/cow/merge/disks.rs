//! Performs what the engine wants of the disks in an offline merge, on this thread.
//!
//! - What may go together goes together: writes that are neighbours on the disk are
//!   one call.
//! - What is written to the disk begins to be written back while the merge goes on, so
//!   that the flush at the end of a step has less to wait for. That promises nothing;
//!   what is durable is only what a flush has answered for, as everywhere.

use nbdsnap_engine::{Action, Device, DiskOp, OpId, Outcome, SnapshotId};

use super::super::hints::WriteBack;
use crate::io::file::{Medium, perform};
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
    write_back: WriteBack,
}

impl Disks {
    /// Of a volume whose disks are open.
    pub(super) fn new(origin: OpenDisk, stores: Vec<(SnapshotId, OpenDisk)>) -> Self {
        Self {
            origin,
            stores,
            write_back: WriteBack::default(),
        }
    }

    /// The store of a snapshot.
    pub(super) fn store(&self, id: SnapshotId) -> &OpenDisk {
        let store = self.stores.iter().find(|(known, _)| *known == id);
        &store.expect("a store that was attached").1
    }

    /// Perform operations that do not depend on each other, and tell how each ended.
    pub(super) fn perform(&mut self, ops: Vec<DiskOp>, ended: &mut dyn FnMut(OpId, Outcome)) {
        let mut together = Together::default();
        for op in ops {
            if let (Device::Origin, Action::Write { offset, data }) = (op.device, &op.action) {
                if !together.takes(*offset, data.len()) {
                    self.write(&mut together, ended);
                }
                together.push(op.id, *offset, data);
                continue;
            }
            let (file, medium) = match op.device {
                Device::Origin => (&self.origin, self.medium()),
                Device::Cow(id) => (self.store(id), Medium::Store),
            };
            ended(op.id, perform(&file.file, medium, &op.action));
        }
        self.write(&mut together, ended);
    }

    fn medium(&self) -> Medium {
        if self.origin.is_block_device {
            Medium::OriginBlockDevice
        } else {
            Medium::OriginFile
        }
    }

    fn write(&mut self, together: &mut Together, ended: &mut dyn FnMut(OpId, Outcome)) {
        let Together { ids, start, data } = std::mem::take(together);
        if ids.is_empty() {
            return;
        }
        let len: u64 = data.iter().map(|piece| piece.len() as u64).sum();
        let action = Action::Write {
            offset: start,
            data,
        };
        let outcome = perform(&self.origin.file, self.medium(), &action);
        self.write_back.wrote(&self.origin.file, start..start + len);
        for id in ids {
            ended(id, outcome.clone());
        }
    }
}

/// Writes to the disk, one behind the other.
#[derive(Debug, Default)]
struct Together {
    ids: Vec<OpId>,
    start: u64,
    data: Vec<bytes::Bytes>,
}

impl Together {
    /// Whether these pieces go behind those that are there.
    fn takes(&self, offset: u64, pieces: usize) -> bool {
        let len: u64 = self.data.iter().map(|piece| piece.len() as u64).sum();
        !self.ids.is_empty()
            && self.start + len == offset
            && self.data.len() + pieces <= MOST_PIECES
    }

    fn push(&mut self, id: OpId, offset: u64, data: &[bytes::Bytes]) {
        if self.ids.is_empty() {
            self.start = offset;
        }
        self.ids.push(id);
        self.data.extend_from_slice(data);
    }
}
