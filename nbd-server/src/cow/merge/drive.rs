//! The engine, driven to the end of a merge by one thread that does nothing else: what
//! it wants is performed, what it says is answered. What it wants goes to an
//! [`Outside`], so that a test can have disks that fail.

use nbdsnap_engine::{DiskOp, Event, OpId, Outcome, SnapshotId, Tree};

/// What a merge has around it.
pub(super) trait Outside {
    /// So many chunks are left to be merged.
    fn left(&mut self, chunks: u64);

    /// Perform operations that do not depend on each other, and tell how each ended.
    fn perform(&mut self, ops: Vec<DiskOp>, ended: &mut dyn FnMut(OpId, Outcome));

    /// Another snapshot is lost, and its store cannot be made to say so: make a durable
    /// mark elsewhere. Says whether there is one.
    fn mark_lost(&mut self, id: SnapshotId) -> bool;

    /// Another snapshot is lost.
    fn lost(&mut self, id: SnapshotId, why: &'static str);
}

/// Why a merge did not come to its end. It can be gone on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stopped {
    /// The engine gave it up.
    Failed(&'static str),
    /// Another snapshot would be lost by it, for its store is full.
    NoRoom,
}

/// Merge `merged`, which is attached to `engine` as merging, into what it was taken of.
/// Answers how many chunks that were.
pub(super) fn drive(
    engine: &mut Tree,
    merged: SnapshotId,
    outside: &mut impl Outside,
) -> Result<u64, Stopped> {
    let mut total = 0;
    loop {
        if let Some(progress) = engine.merge_of(merged) {
            total = progress.total_chunks;
            outside.left(progress.left_chunks);
        }
        let ops: Vec<DiskOp> = std::iter::from_fn(|| engine.poll_disk_op()).collect();
        if !ops.is_empty() {
            outside.perform(ops, &mut |op, outcome| {
                engine.handle_completion(op, outcome);
            });
            continue;
        }
        match engine.poll_event() {
            Some(Event::Merged(_)) => return Ok(total),
            Some(Event::MergeFailed(_, why)) => return Err(Stopped::Failed(why)),
            Some(Event::Invalid(id, why) | Event::Unmarked(id, why)) => outside.lost(id, why),
            Some(Event::MarkLost(id, _)) => {
                let marked = outside.mark_lost(id);
                engine.marked_lost(id, marked);
            }
            Some(_) => {}
            None => return Err(Stopped::NoRoom),
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use nbdsnap_engine::{
        Action, Command, Device, DiskError, Request, RequestId, Store, StoreIo, StoreKind,
        StoreSize, StoreSpec, View, VolumeConfig,
    };
    use nbdsnap_format::ChunkSize;

    use super::*;

    const CHUNK: u64 = 1024;
    const CHUNKS: u64 = 16;
    /// The snapshot that is merged, and another one.
    const MERGED: SnapshotId = SnapshotId(0);
    const OTHER: SnapshotId = SnapshotId(1);

    /// A device in memory. One that fails refuses every write and flush.
    #[derive(Clone)]
    struct Memory {
        bytes: Vec<u8>,
        fails: bool,
    }

    impl Memory {
        fn new(byte: u8, chunks: u64) -> Self {
            Self {
                bytes: vec![byte; (chunks * CHUNK) as usize],
                fails: false,
            }
        }
    }

    impl StoreIo for Memory {
        fn act(&mut self, action: Action) -> Outcome {
            match action {
                Action::Read { offset, len } => {
                    let range = offset as usize..(offset + len) as usize;
                    return Ok(Bytes::copy_from_slice(&self.bytes[range]));
                }
                _ if self.fails => return Err(DiskError::Io(5)),
                Action::Write { offset, data } => {
                    let (data, at) = (data.concat(), offset as usize);
                    self.bytes[at..at + data.len()].copy_from_slice(&data);
                }
                Action::WriteZeroes { offset, len, .. } => {
                    self.bytes[offset as usize..(offset + len) as usize].fill(0);
                }
                Action::Flush => {}
                Action::Trim { .. } | Action::Grow { .. } => panic!("nobody asks for {action:?}"),
            }
            Ok(Bytes::new())
        }

        fn keep_copy(&mut self, area: u64, _: &[u8]) -> Result<(), DiskError> {
            panic!("area {area} is torn")
        }
    }

    /// The disk, the two stores, and what a tool is asked besides.
    struct Rig {
        disks: [Memory; 3],
        can_mark: bool,
        said: Vec<String>,
    }

    impl Outside for Rig {
        fn left(&mut self, _: u64) {}

        fn perform(&mut self, ops: Vec<DiskOp>, ended: &mut dyn FnMut(OpId, Outcome)) {
            for op in ops {
                let disk = match op.device {
                    Device::Origin => 0,
                    Device::Cow(id) => 1 + id.0 as usize,
                };
                ended(op.id, self.disks[disk].act(op.action));
            }
        }

        fn mark_lost(&mut self, id: SnapshotId) -> bool {
            self.said.push(format!("mark {}", id.0));
            self.can_mark
        }

        fn lost(&mut self, id: SnapshotId, why: &'static str) {
            self.said.push(format!("lost {}: {why}", id.0));
        }
    }

    impl Rig {
        /// A disk of sevens with two empty stores, the other of which can hold so many
        /// chunks; then all of the merged snapshot's is written to be nines.
        fn new(others_chunks: u64) -> (Self, Tree) {
            let mut rig = Self {
                disks: [
                    Memory::new(7, CHUNKS),
                    Memory::new(0, CHUNKS + 2),
                    Memory::new(0, others_chunks + 2),
                ],
                can_mark: true,
                said: Vec::new(),
            };
            let mut engine = Tree::new(VolumeConfig {
                origin_bytes: CHUNKS * CHUNK,
                copy_memory: 1 << 16,
                copy_piece: 1 << 16,
            });
            for store in &mut rig.disks[1..] {
                let bytes = store.bytes.len() as u64;
                let size = StoreSize {
                    ready: bytes,
                    limit: bytes,
                    step: 0,
                };
                let spec = StoreSpec {
                    kind: StoreKind::Persistent,
                    chunk_size: ChunkSize::from_bytes(CHUNK).expect("a chunk size"),
                    size,
                };
                engine.attach_snapshot(View::Origin, Store::create(spec, store).expect("memory"));
            }
            engine.handle_request(Request {
                id: RequestId(0),
                view: View::Snapshot(MERGED),
                command: Command::Write {
                    offset: 0,
                    data: Bytes::from(vec![9; (CHUNKS * CHUNK) as usize]),
                    fua: true,
                },
            });
            while let Some(op) = engine.poll_disk_op() {
                rig.perform(vec![op], &mut |op, outcome| {
                    engine.handle_completion(op, outcome);
                });
            }
            engine.begin_merge(MERGED).expect("it can be merged");
            (rig, engine)
        }
    }

    #[test]
    fn a_merge_comes_to_its_end() {
        let (mut rig, mut engine) = Rig::new(CHUNKS);
        assert_eq!(drive(&mut engine, MERGED, &mut rig), Ok(CHUNKS));
        assert_eq!(rig.disks[0].bytes, vec![9; (CHUNKS * CHUNK) as usize]);
        assert!(rig.said.is_empty());
    }

    /// The other snapshot's store takes no writes, so that it cannot even be made to
    /// say that its snapshot is lost. Marked elsewhere, it is lost and the merge goes on.
    #[test]
    fn a_snapshot_whose_store_fails_is_marked_lost_elsewhere() {
        let (mut rig, mut engine) = Rig::new(CHUNKS);
        rig.disks[2].fails = true;
        assert_eq!(drive(&mut engine, MERGED, &mut rig), Ok(CHUNKS));
        assert_eq!(rig.disks[0].bytes, vec![9; (CHUNKS * CHUNK) as usize]);
        assert_eq!(rig.said[0], "mark 1");
        assert!(rig.said[1].starts_with("lost 1: "), "{:?}", rig.said);
        assert_eq!(rig.said.len(), 2);
    }

    /// Where there is no mark, the disk is not written: a later start would show a
    /// snapshot that is wrong.
    #[test]
    fn a_loss_that_cannot_be_marked_stops_the_merge_before_it_writes() {
        let (mut rig, mut engine) = Rig::new(CHUNKS);
        (rig.disks[2].fails, rig.can_mark) = (true, false);
        let stopped = drive(&mut engine, MERGED, &mut rig);
        assert_eq!(
            stopped,
            Err(Stopped::Failed(
                "a lost snapshot of the origin could not be marked so"
            ))
        );
        assert_eq!(rig.disks[0].bytes, vec![7; (CHUNKS * CHUNK) as usize]);
        assert_eq!(rig.said[0], "mark 1");
    }

    #[test]
    fn a_full_store_of_another_snapshot_stops_the_merge_before_it_writes() {
        let (mut rig, mut engine) = Rig::new(4);
        engine.set_on_full(OTHER, nbdsnap_engine::OnFull::Pause);
        assert_eq!(drive(&mut engine, MERGED, &mut rig), Err(Stopped::NoRoom));
        assert_eq!(rig.disks[0].bytes, vec![7; (CHUNKS * CHUNK) as usize]);
        assert!(rig.said.is_empty());
    }
}
