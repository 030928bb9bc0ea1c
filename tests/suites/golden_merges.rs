//! Stores that the Linux kernel wrote are merged into their origins, by the engine
//! in this process: the origin must become what the kernel read from the
//! snapshot. Among them is a merge that the kernel began and a power cut ended,
//! which the program finishes too; and each merge is cut off again at many places,
//! and taken up from the bytes that are left.

use std::fmt::Write;

use bytes::Bytes;
use nbdsnap_engine::{
    Access, Action, Device, DiskError, Event, Outcome, SnapshotId, Store, StoreIo, StoreKind,
    StoreSize, Volume, VolumeConfig,
};
use nbdsnap_tests::harness::files::{folder, sha256};
use nbdsnap_tests::harness::golden::{Golden, golden_names, unpack_golden};
use nbdsnap_tests::harness::server::Serve;
use sha2::{Digest, Sha256};

/// A device in memory.
#[derive(Clone)]
struct Memory(Vec<u8>);

impl Memory {
    fn perform(&mut self, action: &Action) -> Bytes {
        let range = |offset: u64, len: u64| offset as usize..(offset + len) as usize;
        match action {
            Action::Read { offset, len } => {
                return Bytes::copy_from_slice(&self.0[range(*offset, *len)]);
            }
            Action::Write { offset, data } => {
                let mut at = *offset as usize;
                for piece in data {
                    self.0[at..at + piece.len()].copy_from_slice(piece);
                    at += piece.len();
                }
            }
            Action::WriteZeroes { offset, len, .. } => self.0[range(*offset, *len)].fill(0),
            Action::Flush => {}
            Action::Trim { .. } | Action::Grow { .. } => {
                panic!("a merge asks for {action:?}")
            }
        }
        Bytes::new()
    }
}

impl StoreIo for Memory {
    fn act(&mut self, action: Action) -> Outcome {
        Ok(self.perform(&action))
    }

    fn keep_copy(&mut self, area: u64, _: &[u8]) -> Result<(), DiskError> {
        panic!("area {area} is torn")
    }
}

/// An origin and a store, as they lie on their devices.
#[derive(Clone)]
struct Pair {
    origin: Memory,
    cow: Memory,
}

impl Pair {
    fn of(golden: &Golden) -> Self {
        let read = |path| Memory(std::fs::read(path).expect("an image"));
        Self {
            origin: read(&golden.origin),
            cow: read(&golden.cow),
        }
    }

    fn open(&mut self) -> Store {
        let bytes = self.cow.0.len() as u64;
        let size = StoreSize {
            ready: bytes,
            limit: bytes,
            step: 0,
        };
        let origin_bytes = self.origin.0.len() as u64;
        let kind = StoreKind::Persistent;
        Store::open(kind, size, origin_bytes, Access::ReadWrite, &mut self.cow)
            .expect("the kernel's store")
    }

    /// Merge until `most` operations have been performed, or to the end: how many
    /// there were, and whether that was the end.
    fn merge(&mut self, step_bytes: u64, most: u64) -> (u64, bool) {
        let store = self.open();
        let mut volume = Volume::new(VolumeConfig {
            origin_bytes: self.origin.0.len() as u64,
            copy_memory: 1 << 20,
            copy_piece: 256 << 10,
        });
        volume.set_merge_step(step_bytes);
        let id = volume.attach_merging(store);
        for count in 0..most {
            let Some(op) = volume.poll_disk_op() else {
                let mut events = std::iter::from_fn(|| volume.poll_event());
                let end = events.find(|event| !matches!(event, Event::MergeProgress(..)));
                assert_eq!(end, Some(Event::Merged(id)));
                return (count, true);
            };
            let device = match op.device {
                Device::Origin => &mut self.origin,
                Device::Cow(SnapshotId(_)) => &mut self.cow,
            };
            let outcome = Ok(device.perform(&op.action));
            volume.handle_completion(op.id, outcome);
        }
        (most, false)
    }

    fn assert_merged(&mut self, name: &str, sha: &str) {
        let mut found = String::new();
        for byte in Sha256::digest(&self.origin.0) {
            write!(found, "{byte:02x}").expect("a string takes all");
        }
        assert_eq!(found, sha, "{name}: the origin");
        let store = self.open();
        assert_eq!(store.exception_count(), 0, "{name}: what is left");
        assert!(!store.is_invalid(), "{name}");
    }
}

/// Steps of a merge in bytes: a chunk at a time, some, and as the program does.
const STEPS: [u64; 3] = [1, 64 << 10, 4 << 20];

#[test]
fn every_archive_merges_to_what_the_kernel_read() {
    let mut merged = 0;
    for name in golden_names() {
        let folder = folder();
        let golden = unpack_golden(&name, folder.path());
        let Some(sha) = &golden.snapshot_sha else {
            continue;
        };
        let pair = Pair::of(&golden);
        let count = pair.clone().open().exception_count();
        for step_bytes in STEPS {
            let mut pair = pair.clone();
            let (ops, ended) = pair.merge(step_bytes, u64::MAX);
            assert!(ended);
            pair.assert_merged(&name, sha);
            println!("{name}: {count} exceptions in steps of {step_bytes} bytes: {ops} operations");
        }
        merged += u64::from(count > 0);
    }
    assert!(
        merged >= 10,
        "only {merged} archives had something to merge"
    );
}

/// Killed at any operation: what was performed stays, and the next process goes on.
#[test]
fn a_merge_that_is_cut_off_again_and_again_comes_to_the_same_end() {
    for name in ["merge_cut", "ph8", "snapwrites16k", "exact_area"] {
        let folder = folder();
        let golden = unpack_golden(name, folder.path());
        let sha = golden.snapshot_sha.as_ref().expect("the snapshot is valid");
        let pair = Pair::of(&golden);
        let (whole, _) = pair.clone().merge(64 << 10, u64::MAX);
        for life in [3, 7, 50] {
            let mut pair = pair.clone();
            let mut lives = 1;
            // Each goes a little further than the last: a step takes a few
            // operations, and one that is cut off begins anew.
            while !pair.merge(64 << 10, life + lives).1 {
                lives += 1;
                assert!(lives < 10 * whole, "{name} makes no progress");
            }
            pair.assert_merged(name, sha);
            println!("{name}: {whole} operations at once; {lives} processes, the first of {life}");
        }
    }
}

/// As an operator finishes what the kernel began: the snapshot is still whole, and
/// is merged like any other.
#[test]
fn the_program_finishes_the_kernels_merge() {
    let folder = folder();
    let golden = unpack_golden("merge_cut", folder.path());
    let sha = golden.snapshot_sha.as_ref().expect("the snapshot is valid");
    assert_ne!(&sha256(&golden.origin), sha, "there is nothing to finish");
    let mut serve = Serve::on_socket_in(folder.path());
    serve
        .control_in(folder.path())
        .disk("disk", &golden.origin)
        .snapshot("disk@cut", &golden.cow, ",adopt");
    let server = serve.start();
    let _ = server.order(["snapshot", "merge", "disk@cut"]).ok();
    server.stop();
    assert_eq!(&sha256(&golden.origin), sha);
}
