//! Mapped devices under clients that stay: tables are exchanged beneath them, snapshots
//! come and go, writes come by every way there is, and bad tables change nothing.
//! (`tests/kernel/dm.rs` holds the same against the kernel's.)

use std::path::PathBuf;

use nbdsnap::client::Client;
use nbdsnap_tests::harness::files::{Fingerprint, folder, random_file, sparse_file};
use nbdsnap_tests::harness::live::{attach, contents, done, names, refused, try_attach};
use nbdsnap_tests::harness::process::{Finished, Running, wait_until};
use nbdsnap_tests::harness::random::{Random, seed};
use nbdsnap_tests::harness::server::{Serve, Server};

const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;

/// A server without volumes, and files for tables to name.
struct Scene {
    folder: tempfile::TempDir,
    serve: Serve,
    server: Server,
    random: Random,
}

impl Scene {
    fn new(test: &str) -> Self {
        let folder = folder();
        let mut random = Random::new(seed(test));
        let mut serve = Serve::on_socket_in(folder.path());
        serve.control_in(folder.path());
        for disk in ["a", "b", "c"] {
            random_file(&folder.path().join(disk), 4 * MIB as usize, &mut random);
        }
        for cow in ["cow1", "cow2", "cow3"] {
            sparse_file(&folder.path().join(cow), 8 * MIB);
        }
        Self {
            server: serve.start(),
            folder,
            serve,
            random,
        }
    }

    fn path(&self, name: &str) -> String {
        let path: PathBuf = self.folder.path().join(name);
        path.to_str().expect("a path of ASCII").to_owned()
    }

    fn dm(&self, words: &[&str]) -> Finished {
        self.server.order(["dm"].iter().chain(words))
    }

    fn ok(&self, words: &[&str]) -> String {
        self.dm(words).ok().text()
    }

    fn create(&self, name: &str, table: &str) {
        assert_eq!(self.ok(&["create", name, "--table", table]), "");
    }

    fn status(&self, name: &str) -> String {
        self.ok(&["status", name]).trim_end().to_owned()
    }

    /// Write a few sectors somewhere, and do the same to a model.
    fn write(&mut self, client: &mut Client, model: &mut [u8], shift: u64) {
        let sectors = client.size() / SECTOR;
        let len = 1 + self.random.below(12);
        let at = self.random.below(sectors - len) * SECTOR;
        let data = self.random.bytes((len * SECTOR) as usize);
        client.write(at, &data, false).expect("a device is written");
        let at = (at + shift) as usize;
        model[at..at + data.len()].copy_from_slice(&data);
    }
}

#[test]
fn a_client_stays_while_a_snapshot_is_slid_in_beneath_it_and_taken_out() {
    let mut scene = Scene::new("slid_in");
    let (a, cow) = (scene.path("a"), scene.path("cow1"));
    let table = format!("0 8192 linear {a} 0");
    scene.create("home", &table);
    let mut client = attach(&scene.server, "home");
    let mut model = contents(&scene.server, "home");
    for _ in 0..20 {
        scene.write(&mut client, &mut model, 0);
    }
    scene.ok(&["suspend", "home"]);
    // What comes meanwhile waits for the resume.
    let data = scene.random.bytes(4096);
    client.queue_write(8192, &data, false);
    client.flush_out().expect("it is sent");
    scene.create("home_org", &table);
    let snapshot = format!("0 8192 snapshot /dev/mapper/home_org {cow} p 16");
    scene.create("home_snap", &snapshot);
    let origin = "0 8192 snapshot-origin /dev/mapper/home_org";
    scene.ok(&["load", "home", "--table", origin]);
    let frozen = model.clone();
    scene.ok(&["resume", "home"]);
    client.recv_reply().expect("the write is answered");
    model[8192..8192 + 4096].copy_from_slice(&data);
    for _ in 0..40 {
        scene.write(&mut client, &mut model, 0);
    }
    assert!(contents(&scene.server, "home_snap") == frozen);
    assert!(contents(&scene.server, "home") == model);
    let status = scene.status("home_snap");
    assert!(status.starts_with("0 8192 snapshot ") && status.ends_with("/16384 32"));
    let busy = scene.dm(&["remove", "home"]);
    assert_eq!(busy.code, Some(1));
    assert!(busy.stderr.contains("Device or resource busy"), "{busy}");
    scene.ok(&["suspend", "home"]);
    scene.ok(&["load", "home", "--table", &table]);
    scene.ok(&["remove", "home_snap"]);
    scene.ok(&["resume", "home"]);
    scene.ok(&["remove", "home_org"]);
    scene.write(&mut client, &mut model, 0);
    assert!(contents(&scene.server, "home") == model);
    client.disconnect().expect("a farewell");
    scene.ok(&["remove", "home"]);
    assert_eq!(scene.ok(&["ls"]), "No devices found\n");
    assert!(std::fs::read(scene.path("a")).expect("the disk") == model);
}

#[test]
fn writes_around_and_beneath_reach_the_snapshots_too() {
    let mut scene = Scene::new("around");
    let (a, b) = (scene.path("a"), scene.path("b"));
    let (cow1, cow2) = (scene.path("cow1"), scene.path("cow2"));
    scene.create("real", &format!("0 6144 striped 2 64 {a} 512 {b} 0"));
    scene.create("top", "0 6144 snapshot-origin /dev/mapper/real");
    scene.create("slice", "0 2048 linear /dev/mapper/real 1024");
    scene.create("disk", &format!("0 8192 linear {a} 0"));
    let whole = contents(&scene.server, "real");
    let disk = contents(&scene.server, "disk");
    let snapshot = format!("0 6144 snapshot /dev/mapper/real {cow1} P 8");
    scene.create("snap", &snapshot);
    let snapshot = format!("0 8192 snapshot {a} {cow2} P 32");
    scene.create("disk_snap", &snapshot);
    let mut ways: Vec<Client> = ["real", "top", "slice", "disk"]
        .map(|name| attach(&scene.server, name))
        .into_iter()
        .collect();
    for round in 0..120 {
        let client = &mut ways[round % 4];
        let mut scratch = vec![0; client.size() as usize];
        scene.write(client, &mut scratch, 0);
    }
    assert!(contents(&scene.server, "snap") == whole);
    assert!(contents(&scene.server, "disk_snap") == disk);
    assert!(contents(&scene.server, "real") != whole);
    assert!(contents(&scene.server, "disk") != disk);
    for name in ["snap", "disk_snap"] {
        let status = scene.status(name);
        let words: Vec<&str> = status.split([' ', '/']).collect();
        assert!(words[3] != words[5], "{name} has copies: {status}");
    }
    // A snapshot that others can write to, and be taken of.
    let cow3 = scene.path("cow3");
    let mut snap = attach(&scene.server, "snap");
    let mut model = whole.clone();
    scene.write(&mut snap, &mut model, 0);
    scene.create(
        "next",
        &format!("0 6144 snapshot /dev/mapper/snap {cow3} P 8"),
    );
    let frozen = model.clone();
    for _ in 0..10 {
        scene.write(&mut snap, &mut model, 0);
        let mut scratch = whole.clone();
        scene.write(&mut ways[1], &mut scratch, 0);
    }
    assert!(contents(&scene.server, "next") == frozen);
    assert!(contents(&scene.server, "snap") == model);
}

#[test]
fn a_merge_is_seen_at_once_by_every_way() {
    let mut scene = Scene::new("merge");
    let (a, cow) = (scene.path("a"), scene.path("cow1"));
    scene.create("real", &format!("0 8192 linear {a} 0"));
    scene.create("base", "0 8192 snapshot-origin /dev/mapper/real");
    scene.create(
        "snap",
        &format!("0 8192 snapshot /dev/mapper/real {cow} P 8"),
    );
    let frozen = contents(&scene.server, "base");
    let mut base = attach(&scene.server, "base");
    let mut model = frozen.clone();
    for _ in 0..60 {
        scene.write(&mut base, &mut model, 0);
    }
    scene.ok(&["suspend", "base", "snap"]);
    let merge = format!("0 8192 snapshot-merge /dev/mapper/real {cow} P 8");
    scene.ok(&["load", "base", "--table", &merge]);
    scene.ok(&["resume", "base"]);
    assert!(base.read(0, 4 * MIB as u32).expect("a read") == frozen);
    assert!(contents(&scene.server, "real") == frozen);
    assert_eq!(scene.status("snap"), "0 8192 snapshot Invalid");
    wait_until("the merge is done", || {
        scene.status("base") == "0 8192 snapshot-merge 16/16384 16"
    });
    scene.ok(&["remove", "snap"]);
    scene.ok(&[
        "load",
        "base",
        "--table",
        "0 8192 linear /dev/mapper/real 0",
    ]);
    scene.ok(&["resume", "base"]);
    assert!(std::fs::read(&a).expect("the disk") == frozen);
    assert!(contents(&scene.server, "base") == frozen);
}

#[test]
fn bad_tables_are_refused_as_dmsetup_does_and_change_nothing() {
    let scene = Scene::new("bad_tables");
    let (a, b, cow) = (scene.path("a"), scene.path("b"), scene.path("cow1"));
    scene.create("low", &format!("0 4096 linear {a} 0"));
    scene.create("high", "0 4096 linear /dev/mapper/low 0");
    let elsewhere = folder();
    let mut served = Serve::on_socket_in(elsewhere.path());
    served.disk("other", &scene.folder.path().join("b"));
    let tables = scene.ok(&["table"]);
    let before = Fingerprint::of(scene.folder.path());
    let table = |table: &str| {
        table
            .replace("$A", &a)
            .replace("$B", &b)
            .replace("$COW", &cow)
    };
    for (bad, why) in [
        ("0 8 zero\n4 8 zero", "Gap in table"),
        ("0 8 zero\n9 8 zero", "Gap in table"),
        ("1 8 zero", "Gap in table"),
        ("0 0 zero", "zero-length target"),
        ("0 8 nosuch", "unknown target type"),
        ("0 8 linear", "Invalid argument count"),
        ("0 8 linear $A x", "Invalid device sector"),
        ("0 8 linear /nowhere 0", "No such device"),
        ("0 8 striped 2 4 $A 0", "Not enough destinations"),
        ("0 9 striped 2 4 $A 0 $B 0", "not divisible"),
        ("0 8 snapshot-origin", "incorrect number of arguments"),
        ("0 8 snapshot $A", "requires 4 or more arguments"),
        (
            "0 8 snapshot $A $A P 8",
            "COW device cannot be the same as origin device",
        ),
        (
            "0 8 snapshot $B $COW Q 8",
            "Exception store type is not P or N",
        ),
        ("0 8 snapshot $B $COW P 7", "Chunk size is not a power of 2"),
        ("0 8 snapshot $B $COW N 0", "Chunk size not set"),
        ("0 8 snapshot $B $COW P 8 1 nosuch", "Unrecognised feature"),
        (
            "0 8 snapshot-merge $B $COW N 8",
            "does not support snapshot-merge",
        ),
        ("0 8 linear /dev/mapper/high 0", "stand on itself"),
        ("0 8 linear /dev/mapper/low 0", "stand on itself"),
        (
            "0 8 linear relative 0",
            "a file is named by a path: ./relative",
        ),
    ] {
        let finished = scene.dm(&["load", "low", "--table", &table(bad)]);
        assert_eq!(finished.code, Some(1), "{bad}: {finished}");
        assert!(finished.stdout.is_empty(), "{bad}");
        assert!(finished.stderr.contains(why), "{bad}: {finished}");
        assert!(
            finished
                .stderr
                .contains("device-mapper: reload ioctl on low  failed: ")
                && finished.stderr.ends_with("Command failed.\n"),
            "{bad}: {finished}"
        );
        let created = scene.dm(&["create", "new", "--table", &table(bad)]);
        if why.contains("itself") {
            scene.ok(&["remove", "new"]);
        } else {
            assert_eq!(created.code, Some(1), "{bad}: {created}");
        }
        assert_eq!(scene.ok(&["table"]), tables, "{bad}");
        assert!(
            scene
                .ok(&["info", "low"])
                .contains("Tables present:    LIVE\n")
        );
    }
    let on_its_origin = table("0 8 snapshot /dev/mapper/low $A P 8");
    let finished = scene.dm(&["create", "new", "--table", &on_its_origin]);
    assert!(
        finished.stderr.contains("overlaps with its origin"),
        "{finished}"
    );
    // Where there is no table yet, sizes are looked at when one is loaded; else when it
    // is to become the active one, which stays what it was.
    let finished = scene.dm(&["create", "new", "--table", &table("0 8 linear $A 8190")]);
    assert!(
        finished.stderr.contains("device too small for target"),
        "{finished}"
    );
    scene.ok(&["load", "low", "--table", &table("0 16384 linear $A 0")]);
    let finished = scene.dm(&["resume", "low"]);
    assert_eq!(finished.code, Some(1), "{finished}");
    assert!(
        finished.stderr.contains("device too small for target"),
        "{finished}"
    );
    assert_eq!(scene.ok(&["table"]), tables);
    scene.ok(&["resume", "low"]);
    before.assert_unchanged(scene.folder.path(), "a bad table");
    // Disks that others have.
    let mut locked = served.start();
    let taken = table("0 8 linear $B 0");
    let finished = scene.dm(&["load", "low", "--table", &taken]);
    assert!(
        finished.stderr.contains("Device or resource busy"),
        "{finished}"
    );
    assert!(locked.is_running());
    locked.stop();
    scene.ok(&["load", "low", "--table", &taken]);
}

#[test]
fn stores_survive_the_server_and_stand_still_ends_with_it() {
    let mut scene = Scene::new("survive");
    let (a, cow) = (scene.path("a"), scene.path("cow1"));
    let real = format!("0 8192 linear {a} 0");
    let snapshot = format!("0 8192 snapshot /dev/mapper/real {cow} PO 8");
    scene.create("real", &real);
    let frozen = contents(&scene.server, "real");
    scene.create("snap", &snapshot);
    let mut client = attach(&scene.server, "real");
    let mut model = frozen.clone();
    for _ in 0..30 {
        scene.write(&mut client, &mut model, 0);
    }
    client.flush().expect("a flush");
    let status = scene.status("snap");
    let Scene {
        folder,
        serve,
        server,
        random,
    } = scene;
    server.kill();
    let server = serve.start();
    let scene = Scene {
        folder,
        serve,
        server,
        random,
    };
    assert_eq!(scene.ok(&["ls"]), "No devices found\n");
    scene.create("real", &real);
    scene.create("snap", &snapshot);
    assert_eq!(scene.status("snap"), status);
    assert!(contents(&scene.server, "snap") == frozen);
    assert!(contents(&scene.server, "real") == model);
    // The server's end waits neither for a device that stands still, nor for somebody
    // who waits for an event, nor for a load from a store that cannot be read now.
    let cow2 = scene.path("cow2");
    scene.create("low", &format!("0 8192 linear {cow2} 0"));
    let mut held = attach(&scene.server, "real");
    scene.ok(&["suspend", "real"]);
    scene.ok(&["suspend", "low"]);
    held.queue_write(0, &[1; 512], false);
    held.flush_out().expect("it is sent");
    let wait = scene.server.order_command(["dm", "wait", "snap"]);
    let mut wait = Running::start(&mut { wait });
    let load = "0 8192 snapshot /dev/mapper/real /dev/mapper/low P 8";
    let load = scene
        .server
        .order_command(["dm", "create", "stuck", "--table", load]);
    let mut load = Running::start(&mut { load });
    wait_until("the load has come so far", || {
        scene.ok(&["ls"]).contains("stuck")
    });
    assert!(wait.is_running() && load.is_running());
    scene.server.stop();
    assert_ne!(wait.finish().code, Some(0));
    assert_ne!(load.finish().code, Some(0));
}

#[test]
fn dm_and_snapshot_are_two_views_of_the_same_devices() {
    let mut scene = Scene::new("two_views");
    let (a, b) = (scene.path("a"), scene.path("b"));
    done(&scene.server, &["volume", "add", &format!("vol={b}")]);
    done(&scene.server, &["snapshot", "create", "vol@one"]);
    scene.create("base", &format!("0 8192 linear {a} 0"));
    let cow = scene.path("mon.cow");
    let create = [
        "snapshot", "create", "base@mon", "--cow", &cow, "--chunk", "4K",
    ];
    let answer = done(&scene.server, &create);
    assert_eq!(names(&answer), ["base@mon"]);
    assert_eq!(answer[0]["volume"], "base");
    let ls = scene.ok(&["ls"]);
    let listed: Vec<&str> = ls
        .lines()
        .filter_map(|line| line.split('\t').next())
        .collect();
    assert_eq!(listed, ["base", "base@mon", "vol", "vol@one"]);
    assert_eq!(
        names(&done(&scene.server, &["snapshot", "list"])),
        ["vol@one", "base@mon"]
    );
    assert_eq!(
        names(&done(&scene.server, &["volume", "list"])),
        ["vol", "base"]
    );
    let frozen = contents(&scene.server, "base");
    let mut base = attach(&scene.server, "base");
    let mut model = frozen.clone();
    for _ in 0..10 {
        scene.write(&mut base, &mut model, 0);
    }
    assert!(contents(&scene.server, "base@mon") == frozen);
    // A snapshot of the snapshot.
    let next = scene.path("next.cow");
    let create = ["snapshot", "create", "base@mon@next", "--cow", &next];
    let answer = done(&scene.server, &create);
    assert_eq!(answer[0]["of"], "base@mon");
    let mut mon = attach(&scene.server, "base@mon");
    let mut changed = frozen.clone();
    scene.write(&mut mon, &mut changed, 0);
    assert!(contents(&scene.server, "base@mon@next") == frozen);
    assert!(contents(&scene.server, "base@mon") == changed);
    mon.disconnect().expect("a farewell");
    let busy = refused(&scene.server, &["snapshot", "remove", "base@mon"]);
    assert!(busy.contains("in use"), "{busy}");
    done(&scene.server, &["snapshot", "remove", "base@mon@next"]);
    // Each says the other's words about a snapshot.
    let status = done(&scene.server, &["snapshot", "status", "base@mon"]);
    assert_eq!(status[0]["status"], scene.status("base@mon"));
    let status = done(&scene.server, &["snapshot", "status", "vol@one"]);
    assert_eq!(status[0]["status"], scene.status("vol@one"));
    let table = scene.ok(&["table", "vol@one"]);
    assert!(
        table.starts_with(&format!("0 8192 snapshot {b} ")),
        "{table}"
    );
    scene.ok(&["suspend", "vol"]);
    let volumes = done(&scene.server, &["volume", "list"]);
    assert_eq!(volumes[0]["suspended"], true);
    scene.ok(&["resume", "vol"]);
    done(&scene.server, &["suspend", "base"]);
    assert!(scene.ok(&["info", "base"]).contains("SUSPENDED"));
    done(&scene.server, &["resume", "base"]);
    // Names are taken only once, whoever has them, and each keeps to its own.
    let finished = scene.dm(&["create", "vol", "--notable"]);
    assert!(
        finished.stderr.contains("Device or resource busy"),
        "{finished}"
    );
    let taken = refused(
        &scene.server,
        &["volume", "add", &format!("base={}", scene.path("c"))],
    );
    assert!(taken.contains("base"), "{taken}");
    let finished = scene.dm(&["load", "vol", "--table", "0 8 zero"]);
    assert!(finished.stderr.contains("served as a volume"), "{finished}");
    scene.ok(&["remove", "vol@one"]);
    done(
        &scene.server,
        &["snapshot", "remove", "base@mon", "--delete-cow"],
    );
    assert!(!std::fs::exists(&cow).expect("a look"));
    assert!(try_attach(&scene.server, "base@mon").is_err());
    assert_eq!(scene.ok(&["ls"]).lines().count(), 2);
}
