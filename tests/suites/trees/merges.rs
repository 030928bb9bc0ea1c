//! Snapshots that are merged into the snapshots they were taken of: cut off by kills
//! and gone on with, whatever the next start names; by the offline tool; and upon an
//! image that nobody writes.

use std::path::Path;
use std::process::Command;

use nbdsnap_tests::harness::files::{folder, random_file, sha256};
use nbdsnap_tests::harness::live::{attach, contents, done, names, one_line, refused};
use nbdsnap_tests::harness::process::{Finished, run, wait_until};
use nbdsnap_tests::harness::program::program;
use nbdsnap_tests::harness::random::{Random, seed};
use nbdsnap_tests::harness::server::{Serve, Server};

use super::forest::store_of;

const BYTES: usize = 8 << 20;

/// Write all of an export anew, in pieces that need many exceptions.
fn overwrite(server: &Server, export: &str, random: &mut Random) -> Vec<u8> {
    let bytes = random.bytes(BYTES);
    let mut client = attach(server, export);
    for (n, piece) in bytes.chunks(1 << 20).enumerate() {
        let offset = n as u64 * (1 << 20);
        client.write(offset, piece, false).expect("written");
    }
    client.flush().expect("flushed");
    bytes
}

fn wait_for_merges(server: &Server, left: &[&str]) {
    wait_until("the merge is done", || {
        names(&done(server, &["snapshot", "list"])) == left
    });
}

#[test]
fn a_merge_into_a_snapshot_goes_on_after_a_kill() {
    let folder = folder();
    let at = folder.path();
    let mut random = Random::new(seed("trees_merges"));
    let disk = at.join("disk.img");
    let content = random_file(&disk, BYTES, &mut random);
    let inner = store_of(at, "disk@a");
    let serve = |name: &str| {
        let mut serve = Serve::on_socket_in(at);
        serve.control_in(at).disk("disk", &disk);
        serve.snapshot(&format!("disk@{name}"), &inner, ",chunk=4K");
        serve
    };
    let mut server = serve("a").start();
    let mut cut_off = 0;
    // The snapshot below has another name each time.
    for (before, after) in [("a", "x"), ("x", "y"), ("y", "a"), ("a", "z")] {
        let merged = format!("disk@{before}@b");
        let order = ["snapshot", "create", &merged, "--chunk", "1s"];
        done(&server, &order);
        let wanted = overwrite(&server, &merged, &mut random);
        let order = ["snapshot", "merge", &merged, "--background", "--delete-cow"];
        done(&server, &order);
        server.kill();
        let list = std::fs::read_to_string(at.join("disk.img.nbdsnap")).expect("a list");
        cut_off += u32::from(list.contains("merging"));
        server = serve(after).start();
        let below = format!("disk@{after}");
        assert!(
            contents(&server, &below) == wanted,
            "{merged}, while it is merged"
        );
        assert!(contents(&server, "disk") == content, "the disk");
        wait_for_merges(&server, &[&below]);
        assert!(
            contents(&server, &below) == wanted,
            "{merged}, after it was merged"
        );
        let store = at.join(format!("disk.img.{before}@b.cow"));
        assert!(!store.exists(), "its store is still there");
    }
    assert!(cut_off > 0, "no kill came while a merge was under way");
    assert!(contents(&server, "disk") == content);
    server.stop();
}

fn cow_merge(cow: &Path, disk: &Path) -> Finished {
    let mut command = Command::new(program());
    command.args(["cow", "merge"]).arg(cow);
    run(command.arg("--origin").arg(disk))
}

fn cow_extract(cow: &Path, disk: &Path) -> Finished {
    let mut command = Command::new(program());
    command.args(["cow", "extract"]).arg(cow);
    run(command.arg("--origin").arg(disk).arg("--output").arg("-"))
}

#[test]
fn the_offline_tool_merges_a_snapshot_into_what_it_was_taken_of() {
    let folder = folder();
    let at = folder.path();
    let mut random = Random::new(seed("trees_offline"));
    let disk = at.join("disk.img");
    let content = random_file(&disk, BYTES, &mut random);
    let mut serve = Serve::on_socket_in(at);
    serve.control_in(at).disk("disk", &disk);
    serve.snapshot("disk@a", &store_of(at, "disk@a"), "");
    let server = serve.start();
    for export in ["disk@a@b", "disk@a@c"] {
        done(&server, &["snapshot", "create", export]);
    }
    let kept = overwrite(&server, "disk@a", &mut random);
    let wanted = overwrite(&server, "disk@a@b", &mut random);
    server.stop();
    let line = one_line(&cow_merge(&store_of(at, "disk@a"), &disk), 1);
    assert!(line.contains("a@b.cow, and depends on it"), "{line}");
    // What it shows lies in the snapshot below, of which the tool is told nothing.
    let line = one_line(&cow_extract(&store_of(at, "disk@a@b"), &disk), 1);
    assert!(line.contains("is of a snapshot"), "{line}");
    let before = sha256(&disk);
    let _ = cow_merge(&store_of(at, "disk@a@b"), &disk).ok();
    assert_eq!(sha256(&disk), before, "the disk has no part in it");
    serve.snapshot("disk@a@c", &store_of(at, "disk@a@c"), "");
    let server = serve.start();
    assert!(kept != wanted && contents(&server, "disk@a") == wanted);
    // It was taken before its origin was written.
    assert!(contents(&server, "disk@a@c") == content);
    assert!(contents(&server, "disk") == content);
    server.stop();
}

#[test]
fn upon_an_image_that_nobody_writes_snapshots_have_snapshots_too() {
    let folder = folder();
    let at = folder.path();
    let mut random = Random::new(seed("trees_shared"));
    let image = at.join("base.img");
    let content = random_file(&image, BYTES, &mut random);
    let (work, attempt) = (at.join("work.cow"), at.join("try.cow"));
    let serve = |nested: bool| {
        let mut serve = Serve::on_socket_in(at);
        serve.control_in(at).arg("--shared");
        serve.disk("one", &image).disk("two", &image);
        serve.snapshot("one@w", &work, ",chunk=4K");
        if nested {
            serve.snapshot("one@w@try", &attempt, ",chunk=4K");
        }
        serve
    };
    let server = serve(true).start();
    let kept = overwrite(&server, "one@w", &mut random);
    let wanted = overwrite(&server, "one@w@try", &mut random);
    server.kill();
    // The image may be served without its stores, a snapshot that is written not.
    let line = one_line(&serve(false).run_to_end(), 1);
    assert!(line.contains("'w@try'"), "{line}");
    let server = serve(true).start();
    assert!(contents(&server, "one@w") == kept);
    let line = refused(&server, &["snapshot", "merge", "one@w"]);
    assert!(line.contains("one@w@try"), "{line}");
    done(&server, &["snapshot", "merge", "one@w@try"]);
    wait_for_merges(&server, &["one@w"]);
    assert!(contents(&server, "one@w") == wanted);
    assert!(contents(&server, "two") == content);
    server.stop();
}
