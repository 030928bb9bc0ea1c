//! Block devices as disk and as COW store (loop devices: needs root): as big as
//! they are, never smaller chunks than their blocks, and theirs alone. The offline tools
//! take them too.

use std::path::{Path, PathBuf};
use std::process::Command;

use nbdsnap_tests::harness::files::{folder, random_file, sha256, sparse_file};
use nbdsnap_tests::harness::process::{Finished, run, run_client, wait_until};
use nbdsnap_tests::harness::program::program;
use nbdsnap_tests::harness::random::{Random, seed};
use nbdsnap_tests::harness::server::{Serve, Server};
use nbdsnap_tests::harness::wire::{Session, errno};

const MIB: u64 = 1 << 20;

/// A loop device on a file; detached when it is dropped.
struct LoopDevice {
    path: PathBuf,
}

impl LoopDevice {
    fn on(file: &Path, block: u32) -> Self {
        let file = file.to_str().expect("a plain path");
        let args = [
            "--find",
            "--show",
            "--sector-size",
            &block.to_string(),
            file,
        ];
        let mut done = run_client(Path::new("/"), "losetup", args);
        // Another process may have taken the free one between the look and the take.
        wait_until("a loop device is free", || {
            if done.code != Some(0) {
                done = run_client(Path::new("/"), "losetup", args);
            }
            done.code == Some(0)
        });
        Self {
            path: done.ok().text().trim().into(),
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = run_client(
            Path::new("/"),
            "losetup",
            [Path::new("--detach"), &self.path],
        );
    }
}

fn read(server: &Server, export: &str) -> Vec<u8> {
    let mut session = Session::open(&server.address(), export).expect("a connection");
    let bytes = session.read_all().expect("replies");
    bytes.unwrap_or_else(|error| panic!("{export}: error {error}"))
}

#[test]
fn a_disk_and_its_stores_can_be_block_devices() {
    let mut random = Random::new(seed("block_device"));
    let folder = folder();
    let file = |name: &str| folder.path().join(name);
    let before = random_file(&file("disk"), 8 * MIB as usize, &mut random);
    sparse_file(&file("cow"), 16 * MIB);
    sparse_file(&file("small"), MIB);
    let disk = LoopDevice::on(&file("disk"), 512);
    let cow = LoopDevice::on(&file("cow"), 4096);
    let small = LoopDevice::on(&file("small"), 512);
    let mut serve = Serve::on_socket_in(folder.path());
    serve
        .disk("vm", &disk.path)
        .snapshot("vm@a", &cow.path, ",chunk=4K")
        .snapshot("vm@small", &small.path, ",chunk=64K");

    let server = serve.start();
    let mut model = before.clone();
    let mut origin = Session::open(&server.address(), "vm").expect("a connection");
    assert_eq!(origin.size, 8 * MIB);
    for n in 0..300_u64 {
        // The first half leaves the small store room, the second does not.
        let within = if n < 150 { 512 << 10 } else { 8 * MIB };
        let len = random.between(1, 20_000);
        let offset = random.below(within - len);
        let data = random.bytes(len as usize);
        assert_eq!(
            origin.write(offset, &data).expect("a reply"),
            Ok(Vec::new())
        );
        model[offset as usize..(offset + len) as usize].copy_from_slice(&data);
        if n == 149 {
            assert!(
                read(&server, "vm@small") == before,
                "the snapshot on the small device"
            );
        }
    }
    let mut lost = Session::open(&server.address(), "vm@small").expect("a connection");
    assert_eq!(
        lost.read(0, 512).expect("a reply"),
        Err(errno::EIO),
        "a full store of a P snapshot"
    );
    drop((origin, lost));
    check(&server, &model, &before);
    server.kill();
    for _ in 0..2 {
        let server = serve.start();
        check(&server, &model, &before);
        server.stop();
    }
}

fn check(server: &Server, model: &[u8], before: &[u8]) {
    assert!(read(server, "vm") == model, "the origin");
    assert!(read(server, "vm@a") == before, "the snapshot");
    let mut lost = Session::open(&server.address(), "vm@small").expect("a connection");
    assert_eq!(
        lost.read(0, 512).expect("a reply"),
        Err(errno::EIO),
        "an Invalid snapshot"
    );
}

#[test]
fn what_a_block_device_cannot_do_is_refused_and_nothing_is_written() {
    let folder = folder();
    let file = |name: &str| folder.path().join(name);
    for name in ["disk", "cow", "coarse"] {
        random_file(&file(name), 4 * MIB as usize, &mut Random::new(5));
    }
    std::fs::write(file("cow"), vec![0; 4 * MIB as usize]).expect("an empty device");
    let disk = LoopDevice::on(&file("disk"), 512);
    let cow = LoopDevice::on(&file("cow"), 4096);
    let coarse = LoopDevice::on(&file("coarse"), 4096);
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&disk.path, &link).expect("a link");
    let hashes = || ["disk", "cow", "coarse"].map(|name| sha256(&file(name)));
    let before = hashes();
    let new = file("new.cow");
    let cases: [(&Path, &Path, &str, &Path, &str); 6] = [
        (
            &disk.path,
            &cow.path,
            ",chunk=2K",
            &cow.path,
            "logical block",
        ),
        (
            &disk.path,
            &cow.path,
            ",chunk=512",
            &cow.path,
            "logical block",
        ),
        (&coarse.path, &new, ",chunk=1K", &new, "logical block"),
        (&disk.path, &cow.path, ",size=1M", &cow.path, "block device"),
        (&disk.path, &link, "", &link, "same"),
        (&disk.path, &coarse.path, "", &coarse.path, "something else"),
    ];
    for (origin, cow, options, names, cause) in cases {
        let mut serve = Serve::on_socket_in(folder.path());
        let done = serve
            .disk("vm", origin)
            .snapshot("vm@x", cow, options)
            .run_to_end();
        assert_eq!(done.code, Some(1), "{done}");
        assert_eq!(done.stderr.lines().count(), 1, "{done}");
        let named = done.stderr.contains(names.to_str().expect("a plain path"));
        assert!(
            named && done.stderr.contains(cause),
            "expected {names:?} and '{cause}': {done}"
        );
        assert_eq!(hashes(), before, "{done}");
        assert!(!new.exists(), "{done}");
    }

    let mut first = Serve::on_socket_in(folder.path());
    let server = first
        .disk("vm", &disk.path)
        .snapshot("vm@x", &cow.path, "")
        .start();
    let elsewhere = nbdsnap_tests::harness::files::folder();
    let mut second = Serve::on_socket_in(elsewhere.path());
    let done = second
        .disk("other", &coarse.path)
        .snapshot("other@x", &cow.path, "")
        .run_to_end();
    assert_eq!(done.code, Some(1), "{done}");
    let cause = ["in use", "already open", "locked"]
        .iter()
        .any(|word| done.stderr.contains(word));
    assert!(
        cause
            && done
                .stderr
                .contains(cow.path.to_str().expect("a plain path")),
        "{done}"
    );
    server.stop();
}

/// `nbdsnap cow ...`; what changes a disk is remembered in the folder.
fn cow(folder: &Path, args: &[&dyn AsRef<std::ffi::OsStr>]) -> Finished {
    let mut command = Command::new(program());
    command.arg("cow").current_dir(folder);
    run(command.args(args.iter().map(AsRef::as_ref)))
}

#[test]
fn the_offline_tools_take_block_devices() {
    let mut random = Random::new(seed("block_device_offline"));
    let folder = folder();
    let folder = folder.path();
    let file = |name: &str| folder.join(name);
    let before = random_file(&file("disk"), 4 * MIB as usize, &mut random);
    for name in ["cow", "image", "again"] {
        sparse_file(&file(name), 8 * MIB);
    }
    let [disk, store, image, again] = ["disk", "cow", "image", "again"]
        .map(|name| LoopDevice::on(&file(name), 512))
        .map(|device| (device.path.clone(), device));
    let (disk, store, image, again) = (&disk.0, &store.0, &image.0, &again.0);
    let cow = |args: &[&dyn AsRef<std::ffi::OsStr>]| cow(folder, args);

    let _ = cow(&[&"create", store, &"--chunk", &"4K"]).ok();
    let mut serve = Serve::on_socket_in(folder);
    let options = ",adopt";
    serve.disk("vm", disk).snapshot("vm@a", store, options);
    let server = serve.start();
    let mut origin = Session::open(&server.address(), "vm").expect("a connection");
    let mut model = before.clone();
    for _ in 0..60 {
        let len = random.between(1, 20_000);
        let at = random.below(4 * MIB - len);
        let data = random.bytes(len as usize);
        assert_eq!(origin.write(at, &data).expect("a reply"), Ok(Vec::new()));
        model[at as usize..(at + len) as usize].copy_from_slice(&data);
    }
    drop(origin);
    let in_use = cow(&[&"check", store]).failed();
    assert!(in_use.stderr.contains("is in use"), "{in_use}");
    server.stop();

    let report = cow(&[&"inspect", store, &"--json"]).ok().json();
    assert_eq!(report["bytes"], 8 * MIB);
    assert_eq!(report["chunk_bytes"], 4096);
    let count = report["exceptions"].as_u64().expect("a number");
    assert!(count > 60, "{count}");
    let _ = cow(&[&"check", store, &"--origin", disk]).ok();
    let contents = |path: &Path| std::fs::read(path).expect("readable");
    let extract = |from: &Path, to: &Path, more: &str| {
        let mut args: Vec<&dyn AsRef<std::ffi::OsStr>> =
            vec![&"extract", &from, &"--origin", disk, &"-o", &to];
        if !more.is_empty() {
            args.push(&more);
        }
        cow(&args)
    };
    let _ = extract(store, Path::new("plain"), "").ok();
    assert!(contents(&file("plain")) == before, "extracted into a file");
    let _ = extract(store, image, "").ok();
    let is_before = |path: &Path| contents(path)[..before.len()] == before;
    assert!(is_before(image), "extracted onto a device");
    // It holds something now: only a word overwrites it.
    let refused = extract(store, image, "").failed();
    assert!(refused.stderr.contains("--force"), "{refused}");
    let _ = extract(store, image, "--force").ok();
    assert!(is_before(image), "extracted onto a device once more");

    let dumped = cow(&[&"dump", store]).ok();
    std::fs::write(file("dump"), &dumped.stdout).expect("writable");
    let _ = cow(&[&"restore", &"dump", &"--output", again, &"--data", store]).ok();
    assert_eq!(cow(&[&"dump", again]).ok().stdout, dumped.stdout);
    let _ = extract(again, Path::new("second"), "").ok();
    assert!(
        contents(&file("second")) == before,
        "out of the restored store"
    );

    assert!(contents(disk) == model, "the disk was only read");
    let merged = cow(&[&"merge", store, &"--origin", disk]).ok();
    assert!(contents(disk) == before, "{merged}");
    let report = cow(&[&"inspect", store, &"--json"]).ok().json();
    assert_eq!(report["exceptions"], 0);
}
