//! `nbdsnap cow merge`: a disk is rolled back without a server. It becomes what the
//! kernel read; a kill at any moment changes nothing about how it ends; no other
//! snapshot of the disk notices.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nbdsnap_tests::harness::files::{Fingerprint, assert_same, folder, random_file, sha256};
use nbdsnap_tests::harness::golden::{golden_names, unpack_golden};
use nbdsnap_tests::harness::process::{Finished, pid_of, run, wait};
use nbdsnap_tests::harness::program::program;
use nbdsnap_tests::harness::random::{Random, long_run, seed};
use nbdsnap_tests::harness::server::Serve;
use nbdsnap_tests::harness::wire::Session;
use rustix::process::{Signal, kill_process};

fn command(folder: &Path, args: &str) -> Command {
    let mut command = Command::new(program());
    command
        .arg("cow")
        .args(args.split_whitespace())
        .current_dir(folder);
    command
}

fn cow(folder: &Path, args: &str) -> Finished {
    run(&mut command(folder, args))
}

#[test]
fn every_archive_is_rolled_back_to_what_the_kernel_read() {
    for name in golden_names() {
        let folder = folder();
        let golden = unpack_golden(&name, folder.path());
        let inside = golden.cow.parent().expect("a folder");
        let before = Fingerprint::of(inside);
        let refused = cow(inside, "merge cow.img --origin origin.img").failed();
        let Some(sha) = &golden.snapshot_sha else {
            assert_eq!(
                refused.stderr,
                "nbdsnap: cow.img: the snapshot is lost: its store is marked invalid\n"
            );
            before.assert_unchanged(inside, &name);
            continue;
        };
        assert!(refused.stderr.contains("adopt"), "{refused}");
        before.assert_unchanged(inside, &name);
        let merged = cow(inside, "merge cow.img --origin origin.img --adopt").ok();
        assert_eq!(&sha256(&golden.origin), sha, "{name}");
        let report = cow(inside, "inspect cow.img --json").ok().json();
        assert_eq!(report["exceptions"], 0, "{name}: {merged}");
        assert!(
            !inside.join("origin.img.nbdsnap").exists(),
            "{name}: the disk's list has forgotten the store"
        );
        println!("{name}: {}", merged.text().trim_end());
    }
}

/// A disk of 8 MiB with two snapshots, written before, between and after; what the
/// disk held at each instant.
fn disk_with_two_snapshots(folder: &Path, random: &mut Random) -> [Vec<u8>; 2] {
    let disk = folder.join("disk");
    let first = random_file(&disk, 8 << 20, random);
    let scatter = |random: &mut Random, session: &mut Session, model: &mut Vec<u8>| {
        for _ in 0..300 {
            let len = random.between(1, 20_000) as usize;
            let at = random.below(model.len() as u64 - len as u64) as usize;
            let data = random.bytes(len);
            model[at..at + len].copy_from_slice(&data);
            let written = session.write(at as u64, &data).expect("a reply");
            assert_eq!(written, Ok(Vec::new()));
        }
    };
    let mut model = first.clone();
    let mut serve = Serve::on_socket_in(folder);
    serve
        .disk("disk", &disk)
        .snapshot("disk@first", &folder.join("first"), ",chunk=4K");
    let server = serve.start();
    let mut session = Session::open(&server.address(), "disk").expect("a connection");
    scatter(random, &mut session, &mut model);
    drop(session);
    server.stop();
    let second = model.clone();
    serve.snapshot("disk@second", &folder.join("second"), ",chunk=16K");
    let server = serve.start();
    let mut session = Session::open(&server.address(), "disk").expect("a connection");
    scatter(random, &mut session, &mut model);
    drop(session);
    server.stop();
    [first, second]
}

#[test]
fn other_snapshots_of_the_disk_stay_what_they_are() {
    let mut random = Random::new(seed("cow_merge_siblings"));
    let folder = folder();
    let folder = folder.path();
    let [first, second] = disk_with_two_snapshots(folder, &mut random);
    // One that is not there keeps the disk from being written.
    std::fs::rename(folder.join("second"), folder.join("away")).expect("it is there");
    let before = Fingerprint::of(folder);
    let refused = cow(folder, "merge first --origin disk").failed();
    assert!(refused.stderr.contains("second"), "{refused}");
    before.assert_unchanged(folder, "a store that is missing");
    std::fs::rename(folder.join("away"), folder.join("second")).expect("it is there");

    let _ = cow(folder, "merge first --origin disk").ok();
    assert!(std::fs::read(folder.join("disk")).expect("readable") == first);
    let _ = cow(folder, "extract second --origin disk -o image").ok();
    assert!(std::fs::read(folder.join("image")).expect("readable") == second);
    let _ = cow(folder, "check second --origin disk").ok();
    // The server knows nothing of the merged store any more.
    let disk = folder.join("disk");
    let mut serve = Serve::on_socket_in(folder);
    serve
        .disk("disk", &disk)
        .snapshot("disk@second", &folder.join("second"), "");
    serve.start().stop();
}

#[test]
fn a_killed_merge_goes_on_to_the_same_end() {
    let mut random = Random::new(seed("cow_merge_kills"));
    let rounds = if long_run().is_some() { 40 } else { 4 };
    let mut cut_off = 0;
    for _ in 0..rounds {
        let folder = folder();
        let folder = folder.path();
        let [first, second] = disk_with_two_snapshots(folder, &mut random);
        std::fs::write(folder.join("wanted"), &first).expect("writable");
        loop {
            let mut child = command(folder, "merge first --origin disk -q")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("the program runs");
            // Whenever that is: before it begins, in the middle, or after its end.
            let micros = random.below(60_000);
            if let Some(status) = wait(&mut child, Duration::from_micros(micros)) {
                if !status.success() {
                    // The last one was cut off when the list had forgotten the store.
                    let again = cow(folder, "merge first --origin disk").failed();
                    assert!(again.stderr.contains("adopt"), "{again}");
                }
                break;
            }
            let _ = kill_process(pid_of(&child), Signal::KILL);
            let status = child.wait().expect("a child can be waited for");
            if status.success() {
                break;
            }
            cut_off += 1;
            // The last word is the tool's: after some cuts it is left alone.
            if random.one_in(4) {
                let ended = cow(folder, "merge first --origin disk");
                // Cut off when all was done but the list, it has nothing to do any more.
                assert!(
                    ended.code == Some(0) || ended.stderr.contains("adopt"),
                    "{ended}"
                );
                break;
            }
        }
        assert_same(&folder.join("disk"), &folder.join("wanted"));
        let _ = cow(folder, "extract second --origin disk -o image").ok();
        assert!(std::fs::read(folder.join("image")).expect("readable") == second);
    }
    println!("{rounds} merges were cut off {cut_off} times");
}

/// The program may write no file beyond a limit, and is killed (SIGXFSZ) when it does:
/// at its first write to the disk, when nothing but the mark in the list has happened,
/// and then further and further behind that.
#[test]
fn a_merge_that_is_killed_behind_its_mark_goes_on() {
    const UNTOUCHED: usize = 1 << 20;
    let mut random = Random::new(seed("cow_merge_marked"));
    let folder = folder();
    let folder = folder.path();
    let disk = folder.join("disk");
    let wanted = random_file(&disk, 8 << 20, &mut random);
    let mut model = wanted.clone();
    let mut serve = Serve::on_socket_in(folder);
    serve
        .disk("disk", &disk)
        .snapshot("disk@s", &folder.join("cow"), ",chunk=4K");
    let server = serve.start();
    let mut session = Session::open(&server.address(), "disk").expect("a connection");
    for n in 0..500 {
        let len = random.between(1, 20_000) as usize;
        let at = match n {
            // The first in the store, and so the first to be merged, lies below the
            // second limit.
            0 => UNTOUCHED,
            _ => random.between(UNTOUCHED as u64, (model.len() - len) as u64) as usize,
        };
        let data = random.bytes(len);
        model[at..at + len].copy_from_slice(&data);
        let written = session.write(at as u64, &data).expect("a reply");
        assert_eq!(written, Ok(Vec::new()));
    }
    drop(session);
    server.stop();
    // The list and whatever else is small can be written.
    for (n, limit) in [64 << 10, 2 << 20, 5 << 20].into_iter().enumerate() {
        let mut limited = Command::new("sh");
        let script = format!("ulimit -c 0; ulimit -f {}; exec \"$0\" \"$@\"", limit / 512);
        limited.args(["-c", &script]).arg(program());
        limited.args(["cow", "merge", "cow", "--origin", "disk", "-q"]);
        let killed = run(limited.current_dir(folder));
        assert_eq!(killed.code, None, "{killed}");
        let list = std::fs::read_to_string(folder.join("disk.nbdsnap")).expect("a list");
        assert!(list.contains("merging"), "{list}");
        let now = std::fs::read(&disk).expect("readable");
        assert!(now[limit..] == model[limit..], "written behind {limit}");
        assert!(now[..UNTOUCHED] == wanted[..UNTOUCHED], "at {limit}");
        assert_eq!(now == model, n == 0, "at {limit}");
    }
    let _ = cow(folder, "merge cow --origin disk").ok();
    assert!(std::fs::read(&disk).expect("readable") == wanted);
}

#[test]
fn a_disk_that_is_served_is_not_rolled_back() {
    let folder = folder();
    let folder = folder.path();
    let mut random = Random::new(seed("cow_merge_served"));
    let disk = folder.join("disk");
    random_file(&disk, 1 << 20, &mut random);
    let mut serve = Serve::on_socket_in(folder);
    serve
        .disk("disk", &disk)
        .snapshot("disk@s", &folder.join("cow"), "");
    let server = serve.start();
    let refused = cow(folder, "merge cow --origin disk").failed();
    assert!(refused.stderr.contains("is in use"), "{refused}");
    server.stop();
}
