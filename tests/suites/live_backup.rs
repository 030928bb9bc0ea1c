//! The main job: a real file system is backed up from its snapshots while it is
//! written. Whatever happens to the origin, and however the server ends, each
//! snapshot stays the image of the instant at which it was taken.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nbdsnap_tests::harness::files::{assert_same, folder};
use nbdsnap_tests::harness::fio::Job;
use nbdsnap_tests::harness::process::{Running, run_client, wait_until};
use nbdsnap_tests::harness::random::{Random, seed};
use nbdsnap_tests::harness::server::{Serve, Server};

const MIB: u64 = 1 << 20;
const IMAGE_BYTES: u64 = 72 * MIB;
const FILES: u64 = 3000;
const CHUNKS: [&str; 4] = ["4K", "16K", "64K", "1M"];

/// An ext4 image with some thousand files, made without mounting anything.
fn ext4_image(folder: &Path, image: &Path, random: &mut Random) {
    let tree = folder.join("tree");
    for n in 0..FILES {
        let within = tree.join(format!("dir{}/sub{}", n % 17, n % 5));
        std::fs::create_dir_all(&within).expect("a folder for the tree");
        let len = random.between(1, 24 << 10) as usize;
        std::fs::write(within.join(format!("file{n}")), random.bytes(len))
            .expect("a file for the tree");
    }
    let tree_path = tree.to_str().expect("a plain path");
    let size = format!("{}M", IMAGE_BYTES / MIB);
    let image = image.to_str().expect("a plain path");
    let _ = run_client(
        folder,
        "mkfs.ext4",
        ["-q", "-F", "-b", "4096", "-d", tree_path, image, &size],
    )
    .ok();
    std::fs::remove_dir_all(&tree).expect("the tree can be removed");
}

struct Backup {
    folder: tempfile::TempDir,
    image: PathBuf,
    before: PathBuf,
    serve: Serve,
}

impl Backup {
    fn new() -> Self {
        let folder = folder();
        let (image, before) = (
            folder.path().join("disk.img"),
            folder.path().join("before.img"),
        );
        ext4_image(folder.path(), &image, &mut Random::new(seed("live_backup")));
        std::fs::copy(&image, &before).expect("the image can be copied");
        let mut serve = Serve::on_socket_in(folder.path());
        serve.disk("vm", &image);
        for chunk in CHUNKS {
            let cow = folder.path().join(format!("{chunk}.cow"));
            serve.snapshot(&format!("vm@{chunk}"), &cow, &format!(",chunk={chunk}"));
        }
        Self {
            folder,
            image,
            before,
            serve,
        }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Back each snapshot up with nbdcopy and compare it with the image as it was.
    fn check_snapshots(&self, server: &Server) {
        for chunk in CHUNKS {
            let copy = self.path().join("copy.img");
            let uri = server.uri(&format!("vm@{chunk}"));
            let _ = run_client(
                self.path(),
                "nbdcopy",
                [uri.as_str(), copy.to_str().expect("a plain path")],
            )
            .ok();
            assert_same(&copy, &self.before);
            let _ = run_client(self.path(), "e2fsck", [Path::new("-fn"), &copy]).ok();
            std::fs::remove_file(&copy).expect("the copy can be removed");
        }
    }

    /// How many of the 4 KiB blocks of a range of the origin differ from `before`.
    fn changed_blocks(&self, offset: u64, len: u64) -> usize {
        let read = |path: &Path| {
            let mut bytes = vec![0; len as usize];
            let file = std::fs::File::open(path).expect("the image can be opened");
            file.read_exact_at(&mut bytes, offset)
                .expect("the image can be read");
            bytes
        };
        let (now, before) = (read(&self.image), read(&self.before));
        now.chunks(4096)
            .zip(before.chunks(4096))
            .filter(|(a, b)| a != b)
            .count()
    }
}

#[test]
fn snapshots_of_four_chunk_sizes_outlive_writes_restarts_and_kills() {
    let backup = Backup::new();
    let folder = backup.path();

    let server = backup.serve.start();
    let first = Job::new(&server.uri("vm"), 8 * MIB, 24 * MIB);
    first.write(folder);
    first.verify(folder);
    backup.check_snapshots(&server);
    server.stop();

    let server = backup.serve.start();
    first.verify(folder);
    backup.check_snapshots(&server);

    // Over chunks that are copied already and over new ones, slowly enough to
    // be caught in the middle.
    let (offset, size) = (24 * MIB, 40 * MIB);
    let mut third = Job::new(&server.uri("vm"), offset, size);
    third.more = vec!["--rate_iops=3000".to_owned()];
    let earlier = backup.changed_blocks(offset, size);
    let mut writer = Running::start(&mut third.command(folder, &["--do_verify=0"]));
    wait_until("fio has written some of its range", || {
        backup.changed_blocks(offset, size) > earlier + 1000
    });
    assert!(writer.is_running(), "fio ended before the kill");
    server.kill();
    // What fio makes of a server that vanished is its own affair: some of its
    // versions poll a dead connection for ever.
    drop(writer);

    let server = backup.serve.start();
    backup.check_snapshots(&server);
    let untouched = Job::new(&server.uri("vm"), 8 * MIB, 16 * MIB);
    untouched.write(folder);
    untouched.verify(folder);
    third.more.clear();
    third.write(folder);
    third.verify(folder);
    backup.check_snapshots(&server);
    server.stop();
    assert_eq!(backup.changed_blocks(offset, size), (size / 4096) as usize);
}
