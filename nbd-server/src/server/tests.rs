//! A server inside the test's own process, with real files and sockets, through
//! the project's own client.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nbdsnap_engine::{
    Access, Action, DiskError, Outcome, Store, StoreIo, StoreKind, StoreSize, StoreSpec,
};
use nbdsnap_format::ChunkSize;
use tempfile::TempDir;

use super::setup::{Defaults, Listener, OpenDisk, OpenSnapshot, OpenVolume, Setup};
use super::{RunningServer, ServerError};
use crate::client::{Answer, Client};
use crate::disks::{Past, Taken};
use crate::io::VolumeAccess;
use crate::io::file::{Medium, perform};
use crate::nbd::uri::ListenAddr;
use crate::nbd::wire::{NBD_CMD_BLOCK_STATUS, NBD_CMD_READ, NBD_EIO, NBD_EPERM};
use crate::state::Records;
use crate::state::attached::Mark;
use crate::state::files::SystemFiles;
use crate::state::keeper::Keeper;
use crate::state::place::settled;
use crate::state::record::{SnapshotRecord, State, VolumeRecord};

const DISK: usize = 8 << 20;

struct StoreFile<'a>(&'a File);

impl StoreIo for StoreFile<'_> {
    fn act(&mut self, action: Action) -> Outcome {
        perform(self.0, Medium::Store, &action)
    }

    fn keep_copy(&mut self, area: u64, _bytes: &[u8]) -> Result<(), DiskError> {
        panic!("area {area} of a store that was closed in order is torn");
    }
}

/// A disk image and a store in a folder, and the socket they are served on.
struct Place {
    folder: TempDir,
}

impl Place {
    /// A disk of random-looking bytes, its last quarter a hole.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let place = Self { folder };
        let disk = File::create(place.path("disk")).unwrap();
        disk.write_all_at(&content(), 0).unwrap();
        disk.set_len(DISK as u64).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn client(&self, export: &str) -> Client {
        let address = ListenAddr::Unix(self.path("sock"));
        let client = Client::connect(&address.uri(export)).unwrap();
        client.set_timeout(Some(Duration::from_mins(1))).unwrap();
        client
    }

    /// Serve the disk with its snapshot, new if it has none yet.
    fn serve(&self, read_only: bool) -> RunningServer {
        let records = Records::unchanged().unwrap();
        self.serve_volume(self.volume(read_only), records)
    }

    /// The disk with its snapshot, open.
    fn volume(&self, read_only: bool) -> OpenVolume {
        let store_path = self.path("cow");
        let fresh = !store_path.exists();
        let store_file = open(&store_path);
        let size = |ready| StoreSize {
            ready,
            limit: 64 << 20,
            step: 1 << 20,
        };
        let mut io = StoreFile(&store_file);
        let kind = StoreKind::Persistent;
        let store = if fresh {
            perform(&store_file, Medium::Store, &Action::Grow { to: 1 << 20 }).unwrap();
            let chunk_size = ChunkSize::from_bytes(16384).unwrap();
            let spec = StoreSpec {
                kind,
                chunk_size,
                size: size(1 << 20),
            };
            Store::create(spec, &mut io).unwrap()
        } else {
            let ready = store_file.metadata().unwrap().len();
            let access = if read_only {
                Access::ReadOnly
            } else {
                Access::ReadWrite
            };
            Store::open(kind, size(ready), DISK as u64, access, &mut io).unwrap()
        };
        OpenVolume {
            name: "disk".into(),
            disk: open_disk(&self.path("disk")),
            access: VolumeAccess::from_words(read_only, false),
            snapshots: vec![OpenSnapshot {
                name: "then".into(),
                disk: open_disk(&store_path),
                store,
                fresh,
                read_only: false,
                limit: None,
                past: Past {
                    bytes: DISK as u64,
                    taken_at: None,
                    merging: None,
                },
                behaviour: None,
                scratch: None,
            }],
        }
    }

    fn serve_volume(&self, volume: OpenVolume, records: Records) -> RunningServer {
        let sock = self.path("sock");
        let listener = UnixListener::bind(&sock).unwrap();
        let setup = Setup {
            volumes: vec![volume],
            listeners: vec![Listener::Unix(listener, sock)],
            threads: 2,
            control: None,
            taken: Taken::default(),
            records,
            on_event: None,
            defaults: super::setup::Defaults::default(),
        };
        RunningServer::start(setup).unwrap()
    }

    fn bytes_of(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }
}

fn open(path: &Path) -> File {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).unwrap()
}

fn open_disk(path: &Path) -> OpenDisk {
    let file = open(path);
    OpenDisk {
        bytes: file.metadata().unwrap().len(),
        file,
        path: path.into(),
        is_block_device: false,
        logical_block: 512,
    }
}

/// What the disk holds before anybody writes, but for the hole at its end.
fn content() -> Vec<u8> {
    let mut state = 1u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 56) as u8
    };
    (0..DISK * 3 / 4).map(|_| next()).collect()
}

fn read_all(client: &mut Client) -> Vec<u8> {
    client.read(0, DISK as u32).unwrap()
}

#[test]
fn a_snapshot_stays_while_the_origin_changes_and_through_a_restart() {
    let place = Place::new();
    let mut before = content();
    before.resize(DISK, 0);
    let mut after = before.clone();
    let server = place.serve(false);
    let names: Vec<_> = server
        .exports()
        .iter()
        .map(|export| export.name.clone())
        .collect();
    assert_eq!(names, ["disk", "disk@then"]);
    let mut origin = place.client("");
    // Across chunks, within one, into the hole, and one larger than what is
    // done on the volume's own thread.
    for (offset, len, byte) in [
        (100, 40_000, 1),
        (200_000, 5, 2),
        (DISK - 9, 9, 3),
        (1 << 20, 1 << 20, 4),
    ] {
        origin
            .write(offset as u64, &vec![byte; len], byte == 2)
            .unwrap();
        after[offset..offset + len].fill(byte);
    }
    origin.write_zeroes(3 << 20, 100_000, 0).unwrap();
    after[3 << 20..(3 << 20) + 100_000].fill(0);
    origin.flush().unwrap();
    assert!(read_all(&mut origin) == after);
    let mut then = place.client("disk@then");
    assert!(read_all(&mut then) == before);
    then.write(5000, b"a fork", false).unwrap();
    before[5000..5006].copy_from_slice(b"a fork");
    assert!(read_all(&mut then) == before);
    assert!(read_all(&mut origin) == after);
    server.stop().unwrap();
    assert!(!place.path("sock").exists());
    assert!(place.bytes_of("disk") == after);

    let server = place.serve(false);
    assert!(read_all(&mut place.client("disk@then")) == before);
    assert!(read_all(&mut place.client("disk")) == after);
    server.stop().unwrap();
}

#[test]
fn read_only_means_that_not_a_byte_changes() {
    let place = Place::new();
    let server = place.serve(false);
    place.client("").write(0, &vec![1; 100_000], false).unwrap();
    server.stop().unwrap();
    let (disk, store) = (place.bytes_of("disk"), place.bytes_of("cow"));

    let server = place.serve(true);
    for export in ["disk", "disk@then"] {
        let mut client = place.client(export);
        let refused = client.write(0, b"x", true).unwrap_err();
        assert_eq!(refused.errno(), Some(NBD_EPERM));
        client.flush().unwrap();
        read_all(&mut client);
    }
    server.stop().unwrap();
    assert!(place.bytes_of("disk") == disk);
    assert!(place.bytes_of("cow") == store);
}

#[test]
fn what_is_not_cached_is_read_too() {
    let place = Place::new();
    let server = place.serve(false);
    let disk = File::open(place.path("disk")).unwrap();
    disk.sync_all().unwrap();
    let mut client = place.client("disk@then");
    let expected = content();
    for block in 0..100usize {
        // Only sometimes does the kernel let go of a page: both ways are right.
        rustix::fs::fadvise(&disk, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let at = block * 45_007;
        let len = 1 + block * 97;
        assert!(client.read(at as u64, len as u32).unwrap() == expected[at..at + len]);
    }
    server.stop().unwrap();
}

#[test]
fn a_client_that_never_reads_holds_up_nobody() {
    let place = Place::new();
    let server = place.serve(false);
    let mut deaf = place.client("disk");
    for _ in 0..200 {
        deaf.queue(NBD_CMD_READ, 0, 0, 1 << 20, &[]);
    }
    deaf.flush_out().unwrap();
    let mut other = place.client("disk");
    for block in 0..500u64 {
        other.read(block * 4096, 4096).unwrap();
        other.write(block * 4096, &[7; 512], false).unwrap();
    }
    // Nor the server's end.
    server.stop().unwrap();
}

#[test]
fn replies_come_for_all_that_was_sent_before_a_half_close() {
    let place = Place::new();
    let server = place.serve(false);
    let mut client = place.client("disk");
    let mut cookies = std::collections::BTreeSet::new();
    for block in 0..50u64 {
        cookies.insert(client.queue_write(block * 50_000, &[block as u8; 10_000], block % 7 == 0));
        cookies.insert(client.queue_read(block * 70_000, 20_000));
        cookies.insert(client.queue(NBD_CMD_BLOCK_STATUS, 0, 0, DISK as u32, &[]));
    }
    cookies.insert(client.queue_flush());
    client.flush_out().unwrap();
    client.stream().shutdown(std::net::Shutdown::Write).unwrap();
    while !cookies.is_empty() {
        let reply = client.recv_reply().unwrap();
        assert!(cookies.remove(&reply.cookie));
        if let Answer::Extents(extents) = reply.result.unwrap() {
            assert!(extents.last().unwrap().is_hole());
        }
    }
    assert!(
        client.recv_reply().is_err(),
        "the server closes after the last reply"
    );
    server.stop().unwrap();
}

#[test]
fn names_that_cannot_be_served_are_refused_before_anything_happens() {
    let place = Place::new();
    let volume = || OpenVolume {
        name: "twice".into(),
        disk: open_disk(&place.path("disk")),
        access: VolumeAccess::ReadOnly,
        snapshots: Vec::new(),
    };
    let setup = Setup {
        volumes: vec![volume(), volume()],
        listeners: Vec::new(),
        threads: 1,
        control: None,
        taken: Taken::default(),
        records: Records::unchanged().unwrap(),
        defaults: Defaults::default(),
        on_event: None,
    };
    let refused = RunningServer::start(setup).unwrap_err();
    assert!(matches!(refused, ServerError::Catalog(_)), "{refused}");
}

/// What the records say of [`Place::volume`].
fn records(place: &Place) -> Records {
    let snapshot = SnapshotRecord {
        name: "then".into(),
        cow: settled(&place.path("cow")),
        kind: crate::control::protocol::Kind::Persistent,
        limit: None,
        bytes: Some(DISK as u64),
        read_only: false,
        on_full: crate::control::protocol::WhenFull::default(),
        auto_extend: None,
        taken_at: None,
        merging: false,
        delete_cow: false,
        anew: None,
    };
    let next = State {
        volumes: vec![VolumeRecord {
            name: "disk".into(),
            disk: settled(&place.path("disk")),
            read_only: false,
            shared: false,
            snapshots: vec![snapshot],
        }],
    };
    let mut keeper = Keeper::open(SystemFiles, None).unwrap();
    let change = Some(keeper.begin(next, Vec::new()).unwrap());
    Records { keeper, change }
}

/// A store that takes no writes any more loses its snapshot, and cannot say so: the
/// disk's list does, before the write that broke it is answered; if that cannot be
/// written either, the write fails.
#[test]
fn a_loss_that_the_store_cannot_say_is_said_by_the_disks_list() {
    for list_can_be_written in [true, false] {
        let place = Place::new();
        place.serve(false).stop().unwrap();
        let mut volume = place.volume(false);
        volume.snapshots[0].disk.file = File::open(place.path("cow")).unwrap();
        let server = place.serve_volume(volume, records(&place));
        let list = place.path("disk.nbdsnap");
        assert!(list.is_file());
        if !list_can_be_written {
            std::fs::remove_file(&list).unwrap();
            std::fs::create_dir(&list).unwrap();
        }
        let mut client = place.client("disk");
        let written = client.write(0, &[1; 4096], false);
        if list_can_be_written {
            written.unwrap();
            let list = Keeper::open(SystemFiles, None)
                .unwrap()
                .list(&place.path("disk"));
            assert_eq!(list.unwrap().stores[0].mark, Mark::Lost);
            server.stop().unwrap();
        } else {
            assert_eq!(written.unwrap_err().errno(), Some(NBD_EIO));
            let ended = server.stop();
            assert!(matches!(ended, Err(ServerError::NotDurable)), "{ended:?}");
        }
    }
}
