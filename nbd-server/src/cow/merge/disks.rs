//! Performs what the engine wants of the disks in an offline merge: on this thread, but
//! for the writes to the disk ([`Writer`]).
//!
//! What may go together goes together: writes that are neighbours on the disk are one
//! call, of up to a piece.

use nbdsnap_engine::{Action, Device, DiskOp, OpId, Outcome, SnapshotId};

use super::buffers::Buffers;
use super::writer::{Write, Writer};
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
    /// Bytes in one write.
    piece: u64,
    buffers: Buffers,
    writer: Writer,
}

impl Disks {
    /// Of a volume whose disks are open; writes to the disk have up to `piece` bytes.
    pub(super) fn new(
        origin: OpenDisk,
        stores: Vec<(SnapshotId, OpenDisk)>,
        piece: u64,
    ) -> std::io::Result<Self> {
        let writer = Writer::new(&origin.file, medium(&origin))?;
        Ok(Self {
            origin,
            stores,
            piece,
            buffers: Buffers::default(),
            writer,
        })
    }

    /// The store of a snapshot.
    pub(super) fn store(&self, id: SnapshotId) -> &OpenDisk {
        let store = self.stores.iter().find(|(known, _)| *known == id);
        &store.expect("a store that was attached").1
    }

    /// Perform operations that do not depend on each other, and tell how each ended,
    /// or leave it under way.
    pub(super) fn perform(&mut self, ops: Vec<DiskOp>, ended: &mut dyn FnMut(OpId, Outcome)) {
        let mut together: Option<Write> = None;
        for DiskOp { id, device, action } in ops {
            let (disk, medium) = match device {
                Device::Origin => (&self.origin, medium(&self.origin)),
                Device::Cow(snapshot) => (self.store(snapshot), Medium::Store),
            };
            match action {
                Action::Write { offset, data } if device == Device::Origin => {
                    let next = Write {
                        ids: vec![id],
                        start: offset,
                        len: data.iter().map(|piece| piece.len() as u64).sum(),
                        data,
                    };
                    match &mut together {
                        Some(write) if takes(write, &next, self.piece) => {
                            write.ids.push(id);
                            write.len += next.len;
                            write.data.extend(next.data);
                        }
                        _ => {
                            if let Some(write) = together.replace(next) {
                                self.writer.write(write);
                            }
                        }
                    }
                }
                Action::Read { offset, len } => {
                    let read = read_into(&disk.file, offset, len, self.buffers.take());
                    ended(id, read.map(|bytes| self.buffers.lend(bytes)));
                }
                action => ended(id, perform(&disk.file, medium, &action)),
            }
        }
        if let Some(write) = together {
            self.writer.write(write);
        }
    }

    /// Wait until something that is under way has ended, if anything is.
    pub(super) fn wait(&mut self, ended: &mut dyn FnMut(OpId, Outcome)) -> bool {
        self.writer.wait(ended)
    }
}

fn medium(origin: &OpenDisk) -> Medium {
    if origin.is_block_device {
        Medium::OriginBlockDevice
    } else {
        Medium::OriginFile
    }
}

/// Whether `next` goes behind `write`, in one call of up to `most` bytes.
fn takes(write: &Write, next: &Write, most: u64) -> bool {
    write.start + write.len == next.start
        && write.len + next.len <= most
        && write.data.len() + next.data.len() <= MOST_PIECES
}
