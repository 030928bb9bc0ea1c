//! Disks that stand still, stores that fill and grow, disks that grow.

use std::fs::File;
use std::time::{Duration, Instant};

use nbdsnap::client::Client;
use nbdsnap_tests::harness::files::{folder, random_file};
use nbdsnap_tests::harness::live::{attach, contents, done, refused};
use nbdsnap_tests::harness::process::wait_until;
use nbdsnap_tests::harness::random::{Random, seed};
use nbdsnap_tests::harness::server::{Serve, Server};

const MIB: usize = 1 << 20;

fn serve(test: &str, more: impl FnOnce(&mut Serve)) -> (tempfile::TempDir, Server, Vec<u8>) {
    let folder = folder();
    let image = folder.path().join("disk.img");
    let before = random_file(&image, 4 * MIB, &mut Random::new(seed(test)));
    let mut serve = Serve::on_socket_in(folder.path());
    serve.control_in(folder.path()).disk("disk", &image);
    more(&mut serve);
    (folder, serve.start(), before)
}

/// A write on a thread of its own: it may have to wait.
fn write_behind(server: &Server, offset: u64, len: usize) -> std::thread::JoinHandle<Client> {
    let mut client = attach(server, "disk");
    std::thread::spawn(move || {
        let written = client.write(offset, &vec![7; len], false);
        written.expect("a write that waits, and then is done");
        client
    })
}

#[test]
fn a_suspended_disk_stands_still_until_it_is_resumed() {
    let (_folder, server, mut before) = serve("suspended", |_| {});
    let mut client = attach(&server, "disk");
    client.write(0, &[1; 4096], false).unwrap();
    before[..4096].fill(1);
    let told = done(&server, &["suspend", "disk"]);
    assert_eq!(told[0]["suspended"], true);
    let line = refused(&server, &["suspend", "disk"]);
    assert!(line.contains("suspended already"), "{line}");
    let line = refused(&server, &["snapshot", "merge", "disk@none"]);
    assert!(line.contains("no snapshot"), "{line}");
    let waiting = write_behind(&server, 0, 4096);
    wait_until("the write has come", || {
        let clients = done(&server, &["clients", "--interval", "0"]);
        clients[1]["in_flight"] == 1
    });
    // A snapshot of a disk that stands still does not have what waits.
    done(&server, &["snapshot", "create", "disk@still"]);
    assert!(!waiting.is_finished());
    done(&server, &["resume", "disk"]);
    waiting.join().unwrap();
    assert!(contents(&server, "disk@still") == before);
    let line = refused(&server, &["resume", "disk"]);
    assert!(line.contains("is not suspended"), "{line}");
    assert_eq!(client.read(0, 1).unwrap(), [7]);
    // Nobody resumes it: it goes on by itself.
    let began = Instant::now();
    done(&server, &["suspend", "disk", "--timeout", "1"]);
    assert_eq!(client.read(0, 1).unwrap(), [7]);
    assert!(began.elapsed() >= Duration::from_secs(1));
    server.stop();
}

#[test]
fn a_server_with_a_suspended_disk_can_be_stopped() {
    let (_folder, server, _) = serve("stopped", |_| {});
    done(&server, &["suspend", "disk"]);
    server.stop();
}

#[test]
fn a_full_store_pauses_writes_until_it_is_extended() {
    let (_folder, server, before) = serve("pauses", |serve| {
        serve.arg("--on-full").arg("pause");
    });
    let words = [
        "snapshot", "create", "disk@a", "--size", "1M", "--chunk", "4K",
    ];
    let taken = done(&server, &words);
    assert_eq!(taken[0]["on_full"], "pause");
    let waiting = write_behind(&server, 0, 2 * MIB);
    wait_until("the store is full", || {
        let status = done(&server, &["snapshot", "status", "disk@a"]);
        status[0]["is_full"] == true && status[0]["paused_writes"].as_u64() > Some(0)
    });
    let mut client = attach(&server, "disk");
    client.read(0, 4096).expect("reads go on");
    let line = refused(&server, &["snapshot", "extend", "disk@a", "--size", "512K"]);
    assert!(line.contains("grow to 1048576 bytes already"), "{line}");
    let line = refused(&server, &["snapshot", "extend", "disk@a"]);
    assert!(line.contains("--size"), "{line}");
    assert!(!waiting.is_finished());
    done(&server, &["snapshot", "extend", "disk@a", "--size", "3M"]);
    waiting.join().unwrap();
    assert!(contents(&server, "disk@a") == before);
    let events = server.order(["events"]).ok().text();
    for event in ["filling disk@a 50%", "full disk@a", "extended disk@a"] {
        assert!(events.contains(event), "{event}: {events}");
    }
    // A removed snapshot needs no room either.
    let waiting = write_behind(&server, 2 * MIB as u64, 2 * MIB);
    wait_until("the store is full again", || {
        done(&server, &["snapshot", "status", "disk@a"])[0]["is_full"] == true
    });
    done(&server, &["snapshot", "remove", "disk@a", "--delete-cow"]);
    waiting.join().unwrap();
    server.stop();
}

#[test]
fn a_full_store_may_refuse_writes_and_live() {
    let (_folder, server, before) = serve("refuses", |_| {});
    let words = [
        "snapshot",
        "create",
        "disk@a",
        "--size",
        "1M",
        "--chunk",
        "4K",
        "--on-full",
        "error",
    ];
    done(&server, &words);
    let mut client = attach(&server, "disk");
    let error = client.write(0, &vec![7; 2 * MIB], false).unwrap_err();
    assert!(
        error.to_string().to_lowercase().contains("space"),
        "{error}"
    );
    assert!(contents(&server, "disk@a") == before);
    // Waiting writes do not keep a server from stopping.
    done(
        &server,
        &[
            "snapshot",
            "create",
            "disk@b",
            "--size",
            "1M",
            "--on-full",
            "pause",
        ],
    );
    server.stop();
}

#[test]
fn stores_grow_by_themselves() {
    let (_folder, server, before) = serve("by_themselves", |serve| {
        serve.arg("--auto-extend").arg("50%+50%");
    });
    done(
        &server,
        &[
            "snapshot", "create", "disk@a", "--size", "512K", "--chunk", "4K",
        ],
    );
    let mut client = attach(&server, "disk");
    for at in (0..4 * MIB).step_by(64 << 10) {
        client.write(at as u64, &vec![7; 64 << 10], false).unwrap();
    }
    assert!(contents(&server, "disk@a") == before);
    let status = done(&server, &["snapshot", "status", "disk@a"]);
    assert_eq!(status[0]["state"], "active");
    // All that the disk can ever need: 1,024 chunks, five areas and the header.
    assert_eq!(status[0]["limit_bytes"], 1030 * 4096);
    let events = server.order(["events"]).ok().text();
    assert!(events.contains("extended disk@a"), "{events}");
    server.stop();
}

#[test]
fn a_disk_that_has_grown_is_seen_and_snapshots_keep_their_size() {
    let (folder, server, before) = serve("has_grown", |_| {});
    done(&server, &["snapshot", "create", "disk@then"]);
    let image = File::options()
        .write(true)
        .open(folder.path().join("disk.img"))
        .unwrap();
    image.set_len(6 * MIB as u64).unwrap();
    assert_eq!(attach(&server, "disk").size(), 4 * MIB as u64);
    let told = done(&server, &["volume", "resize", "disk"]);
    assert_eq!(told[0]["bytes"], 6 * MIB);
    let mut client = attach(&server, "disk");
    assert_eq!(client.size(), 6 * MIB as u64);
    client
        .write(3 * MIB as u64, &vec![9; 3 * MIB], true)
        .unwrap();
    assert!(contents(&server, "disk@then") == before);
    done(&server, &["snapshot", "create", "disk@now"]);
    assert_eq!(attach(&server, "disk@now").size(), 6 * MIB as u64);
    image.set_len(5 * MIB as u64).unwrap();
    let line = refused(&server, &["volume", "resize", "disk"]);
    assert!(line.contains("keeps its size"), "{line}");
    image.set_len(6 * MIB as u64).unwrap();
    server.stop();
}
