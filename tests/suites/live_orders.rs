//! What orders to a running server do: snapshots, volumes and clients come and go
//! while other clients stay attached.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nbdsnap_tests::harness::files::{folder, random_file};
use nbdsnap_tests::harness::live::{attach, contents, done, listed, names, try_attach};
use nbdsnap_tests::harness::process::{Running, run, wait_until};
use nbdsnap_tests::harness::random::{Random, long_run, seed};
use nbdsnap_tests::harness::server::{Serve, Server};
use rustix::process::Signal;

const MIB: usize = 1 << 20;

/// Disks of random bytes in a folder of their own, and a server that takes orders.
struct Scene {
    folder: tempfile::TempDir,
    server: Server,
    before: Vec<Vec<u8>>,
}

impl Scene {
    fn new(test: &str, disks: &[&str]) -> Self {
        Self::with(test, disks, |_| {})
    }

    fn with(test: &str, disks: &[&str], more: impl FnOnce(&mut Serve)) -> Self {
        let folder = folder();
        let mut random = Random::new(seed(test));
        let mut serve = Serve::on_socket_in(folder.path());
        serve.control_in(folder.path());
        let mut before = Vec::new();
        for disk in disks {
            let path = folder.path().join(format!("{disk}.img"));
            before.push(random_file(&path, 4 * MIB, &mut random));
            serve.disk(disk, &path);
        }
        more(&mut serve);
        Self {
            server: serve.start(),
            folder,
            before,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn done(&self, words: &[&str]) -> serde_json::Value {
        done(&self.server, words)
    }

    /// Events that are kept, as "kind subject".
    fn events(&self) -> Vec<String> {
        let text = self.server.order(["events", "--json"]).ok().text();
        let event = |line: &str| {
            let event: serde_json::Value = serde_json::from_str(line).expect("JSON");
            let part = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
            format!("{} {}@{}", part("event"), part("volume"), part("snapshot"))
        };
        text.lines().map(event).collect()
    }
}

#[test]
fn a_snapshot_comes_and_goes_under_clients_that_stay_attached() {
    let scene = Scene::new("comes_and_goes", &["disk"]);
    let server = &scene.server;
    let mut origin = attach(server, "disk");
    let mut then = scene.before[0].clone();
    origin.write(1000, &vec![1; 70_000], false).unwrap();
    then[1000..71_000].fill(1);

    let taken = scene.done(&["snapshot", "create", "disk@then", "--chunk", "4K"]);
    assert_eq!(names(&taken), ["disk@then"]);
    let cow = scene.path("disk.img.then.cow");
    assert_eq!(taken[0]["cow"], cow.to_str().unwrap());
    assert_eq!(taken[0]["chunk_bytes"], 4096);
    assert!(cow.exists());
    origin.write(0, &vec![2; 4 * MIB], false).unwrap();
    assert_eq!(contents(server, "disk@then"), then);
    assert_eq!(listed(server, scene.folder.path()), ["disk", "disk@then"]);

    let status = scene.done(&["snapshot", "status", "disk@then"]);
    assert_eq!(status[0]["state"], "active");
    assert_eq!(status[0]["data_bytes"], 4 * MIB);
    // 1,024 chunks fill four areas, and the fifth is there for the next.
    assert_eq!(status[0]["status"], "0 8192 snapshot 8240/8240 48");

    let mut attached = attach(server, "disk@then");
    assert_eq!(attached.read(0, 512).unwrap(), then[..512]);
    scene.done(&["snapshot", "remove", "disk@then", "--delete-cow"]);
    assert!(!cow.exists());
    assert!(
        attached.read(0, 512).is_err(),
        "a snapshot that is gone is read"
    );
    assert!(try_attach(server, "disk@then").is_err());
    assert_eq!(listed(server, scene.folder.path()), ["disk"]);
    origin.write(0, &[3; 512], true).unwrap();
    assert_eq!(origin.read(0, 1024).unwrap(), [[3; 512], [2; 512]].concat());
    origin.disconnect().unwrap();
    scene.server.stop();
}

#[test]
fn a_server_without_a_disk_is_given_some() {
    let scene = Scene::new("without_a_disk", &[]);
    let server = &scene.server;
    let mut random = Random::new(seed("without_a_disk"));
    let image = scene.path("late.img");
    let bytes = random_file(&image, MIB, &mut random);
    assert_eq!(names(&scene.done(&["volume", "list"])), [""; 0]);
    let (late, cow) = (image.to_str().unwrap(), scene.path("x.cow"));
    let snapshot = format!("late@x={},chunk=4K", cow.display());
    scene.done(&["volume", "add", late, "--snapshot", &snapshot]);
    assert_eq!(contents(server, ""), bytes, "the only disk is the default");
    let mut client = attach(server, "late");
    client.write(0, &[9; 8192], false).unwrap();
    assert_eq!(contents(server, "late@x"), bytes);

    let in_use = nbdsnap_tests::harness::live::refused(server, &["volume", "remove", "late"]);
    assert!(in_use.contains("has clients attached (1)"), "{in_use}");
    scene.done(&["volume", "remove", "late", "--force"]);
    assert!(client.read(0, 512).is_err(), "its client was not dropped");
    assert_eq!(listed(server, scene.folder.path()), [""; 0]);

    // Everything is durable and free: another server, or this one, takes it again.
    scene.done(&["volume", "add", late, "--snapshot", &snapshot]);
    assert_eq!(contents(server, "late@x"), bytes);
    assert_eq!(contents(server, "late")[..8192], [9; 8192]);
    scene.server.stop();
}

#[test]
fn a_snapshot_gets_another_name_and_keeps_its_clients() {
    let scene = Scene::new("another_name", &["disk"]);
    scene.done(&["snapshot", "create", "disk@a"]);
    let mut client = attach(&scene.server, "disk@a");
    scene.done(&["snapshot", "rename", "disk@a", "b"]);
    assert_eq!(client.read(0, 512).unwrap(), scene.before[0][..512]);
    let exports = listed(&scene.server, scene.folder.path());
    assert_eq!(exports, ["disk", "disk@b"]);
    let clients = scene.done(&["clients", "--interval", "0"]);
    assert_eq!(clients[0]["export"], "disk@b");
    // The old name is free, its store's path is not.
    let cow = scene.path("another.cow");
    let words = [
        "snapshot",
        "create",
        "disk@a",
        "--cow",
        cow.to_str().unwrap(),
    ];
    scene.done(&words);
    scene.server.stop();
}

#[test]
fn clients_are_listed_and_parted_with() {
    let scene = Scene::new("parted_with", &["disk"]);
    let mut first = attach(&scene.server, "disk");
    let mut second = attach(&scene.server, "disk");
    first.read(0, 4096).unwrap();
    second.write(0, &[1; 512], false).unwrap();
    let clients = scene.done(&["clients", "--interval", "0"]);
    let of = |n: usize, field: &str| clients[n][field].as_u64();
    let ids = [of(0, "id").unwrap(), of(1, "id").unwrap()];
    assert!(ids[0] < ids[1]);
    assert_eq!(
        (of(0, "read_bytes"), of(0, "written_bytes")),
        (Some(4096), Some(0))
    );
    assert_eq!(
        (of(1, "read_bytes"), of(1, "written_bytes")),
        (Some(0), Some(512))
    );
    assert_eq!(of(0, "requests_per_second"), None);
    scene.done(&["disconnect", &ids[0].to_string()]);
    assert!(first.read(0, 512).is_err(), "it was not disconnected");
    assert_eq!(second.read(0, 512).unwrap(), [1; 512]);
    wait_until("the list forgets the client", || {
        let clients = scene.done(&["clients", "--interval", "0"]);
        clients.as_array().unwrap().len() == 1
    });
    scene.server.stop();
}

#[test]
fn events_are_told_to_followers_and_to_a_command() {
    let told = folder();
    let list = told.path().join("events");
    let command = format!(
        "echo $NBDSNAP_EVENT $NBDSNAP_VOLUME@$NBDSNAP_SNAPSHOT >> {}",
        list.display()
    );
    let scene = Scene::with("events", &["disk"], |serve| {
        serve.arg("--on-event").arg(command);
    });
    let follower = Running::start(&mut scene.server.order_command(["events", "--follow"]));
    // A follower is told of what comes once it is there: let something come until it is.
    scene.done(&["snapshot", "create", "disk@a"]);
    scene.done(&["snapshot", "rename", "disk@a", "b"]);
    attach(&scene.server, "disk").disconnect().unwrap();
    wait_until("the client is seen to go", || {
        scene
            .events()
            .last()
            .is_some_and(|last| last.starts_with("client-went"))
    });
    scene.done(&["snapshot", "remove", "disk@b"]);
    let expected = [
        "created disk@a",
        "renamed disk@b",
        "client-came disk@",
        "client-went disk@",
        "removed disk@b",
    ];
    assert_eq!(scene.events(), expected);
    scene.server.stop();
    let by_command = std::fs::read_to_string(&list).unwrap();
    assert_eq!(by_command.lines().collect::<Vec<_>>(), expected);
    let followed = follower.finish().ok().text();
    assert!(
        followed
            .lines()
            .last()
            .is_some_and(|last| last.contains("removed disk@b")),
        "{followed}"
    );
}

#[test]
fn a_disk_is_rolled_back_to_a_snapshot() {
    let scene = Scene::new("rolled_back", &["disk"]);
    let server = &scene.server;
    let names = ["disk@one", "disk@two"];
    scene.done(&["snapshot", "create", names[0]]);
    let mut origin = attach(server, "disk");
    origin.write(0, &vec![1; MIB], false).unwrap();
    scene.done(&["snapshot", "create", names[1]]);
    origin.write(0, &vec![2; 3 * MIB], true).unwrap();
    let in_use = nbdsnap_tests::harness::live::refused(server, &["snapshot", "merge", names[0]]);
    assert!(in_use.contains("--when-idle"), "{in_use}");

    let waiting = scene.done(&["snapshot", "merge", names[0], "--when-idle", "--background"]);
    assert_eq!(waiting[0]["state"], "merge-waiting");
    assert_eq!(origin.read(0, 512).unwrap(), [2; 512], "it does wait");
    let line = nbdsnap_tests::harness::live::refused(server, &["snapshot", "merge", names[1]]);
    assert!(line.contains("disk@one is being merged"), "{line}");
    scene.done(&["snapshot", "cancel", names[0]]);
    scene.done(&["snapshot", "merge", names[0], "--when-idle", "--background"]);
    origin.disconnect().unwrap();
    wait_until("the merge is done", || {
        scene
            .events()
            .iter()
            .any(|event| event == "merge-done disk@one")
    });
    assert_eq!(contents(server, "disk"), scene.before[0]);
    let mut second = scene.before[0].clone();
    second[..MIB].fill(1);
    assert!(
        contents(server, "disk@two") == second,
        "a sibling has changed"
    );
    assert_eq!(listed(server, scene.folder.path()), ["disk", "disk@two"]);

    // Under a client, in the foreground, and with nothing left of it.
    let mut origin = attach(server, "disk");
    origin.write(MIB as u64, &[7; 512], false).unwrap();
    let done = scene.done(&["snapshot", "merge", names[1], "--force", "--delete-cow"]);
    assert_eq!(done, serde_json::json!([]));
    assert_eq!(origin.read(0, 512).unwrap(), [1; 512]);
    assert!(
        contents(server, "disk") == second,
        "the disk is not the snapshot"
    );
    assert!(!scene.path("disk.img.two.cow").exists());
    let image = scene.path("disk.img");
    scene.server.stop();
    assert_eq!(std::fs::read(image).unwrap(), second);
}

#[test]
fn what_was_frozen_is_thawed_whatever_happens() {
    let scene = Scene::new("frozen", &["disk"]);
    let log = scene.path("log");
    let said = || std::fs::read_to_string(&log).unwrap_or_default();
    let say = |word: &str| format!("echo {word} >> {}", log.display());
    let (freeze, thaw) = (say("frozen"), say("thawed"));
    let create = |name: &str, freeze: &str, more: &[&str]| {
        let mut words = vec![
            "snapshot", "create", name, "--freeze", freeze, "--thaw", &thaw,
        ];
        words.extend(more);
        scene.server.order_command(words)
    };
    let _ = run(&mut create("disk@a", &freeze, &[])).ok();
    assert_eq!(said(), "frozen\nthawed\n");
    for (what, freeze, name, more) in [
        ("a refused creation", freeze.as_str(), "none@a", &[][..]),
        ("a freeze that fails", "exit 3", "disk@b", &[]),
        (
            "one that takes too long",
            "sleep 600",
            "disk@b",
            &["--freeze-timeout", "1"],
        ),
    ] {
        std::fs::remove_file(&log).unwrap();
        let finished = run(&mut create(name, freeze, more)).failed();
        assert!(said().ends_with("thawed\n"), "{what}: {finished}");
        assert_eq!(
            names(&scene.done(&["snapshot", "list"])),
            ["disk@a"],
            "{what}"
        );
    }
    // kill -9 in the middle of a freeze.
    std::fs::remove_file(&log).unwrap();
    let pause = format!("{freeze}; exec sleep 600");
    let mut child = create("disk@b", &pause, &[]).spawn().unwrap();
    wait_until("the freeze has begun", || said() == "frozen\n");
    let pid = rustix::process::Pid::from_raw(child.id() as i32).unwrap();
    let freezing = children_of(child.id());
    rustix::process::kill_process(pid, Signal::KILL).unwrap();
    child.wait().unwrap();
    wait_until("it is thawed all the same", || said() == "frozen\nthawed\n");
    for pid in freezing {
        // The guard has gone by now; the freeze would sleep on.
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        let _ = rustix::process::kill_process(pid, Signal::KILL);
    }
    scene.server.stop();
}

/// As long as the control socket waits for a word, and longer.
#[test]
fn a_freeze_may_take_longer_than_the_servers_patience() {
    if long_run().is_none() {
        println!("only with NBDSNAP_LONG: it takes half a minute");
        return;
    }
    let scene = Scene::new("long_freeze", &["disk"]);
    let words = ["snapshot", "create", "disk@a", "--freeze", "sleep 33"];
    let rest = ["--freeze-timeout", "60", "--thaw", "true"];
    let mut create = scene.server.order_command(words.iter().chain(&rest));
    let _ = run(&mut create).ok();
    assert_eq!(names(&scene.done(&["snapshot", "list"])), ["disk@a"]);
    scene.server.stop();
}

fn children_of(pid: u32) -> Vec<i32> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace()
        .map(|word| word.parse().unwrap())
        .collect()
}

#[test]
fn a_transient_snapshot_and_a_store_that_is_named_and_sized() {
    let scene = Scene::new("named_and_sized", &["disk"]);
    let cow = scene.path("named");
    let path = cow.to_str().unwrap();
    let sized = scene.done(&[
        "snapshot",
        "create",
        "disk@sized",
        "--cow",
        path,
        "--size",
        "50%ORIGIN",
        "--overflow",
        "--read-only",
    ]);
    assert_eq!(sized[0]["limit_bytes"], 2 * MIB);
    assert_eq!(sized[0]["kind"], "overflow");
    assert_eq!(sized[0]["read_only"], true);
    let mut client = attach(&scene.server, "disk@sized");
    assert!(client.write(0, &[0; 512], false).is_err());
    scene.done(&["snapshot", "create", "disk@scratch", "--transient"]);
    let mut scratch = attach(&scene.server, "disk@scratch");
    scratch.write(0, &[5; 512], false).unwrap();
    assert_eq!(contents(&scene.server, "disk"), scene.before[0]);
    drop((client, scratch));
    let scratch = scene.path("disk.img.scratch.cow");
    scene.server.stop();
    assert_eq!(len(&scratch), 0, "it means nothing any more");
    let magic = &mut [0; 4];
    let file = std::fs::File::open(&cow).unwrap();
    file.read_exact_at(magic, 0).unwrap();
    assert_eq!(magic, b"SnAp");
}

fn len(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().len()
}

#[test]
fn the_program_makes_its_own_pages() {
    let folder = folder();
    let program = nbdsnap_tests::harness::program::program();
    let nbdsnap = |words: &[&str]| {
        let mut command = std::process::Command::new(program);
        run(command.args(words).current_dir(folder.path()))
    };
    for shell in ["bash", "zsh", "fish"] {
        let text = nbdsnap(&["completions", shell]).ok().text();
        assert!(
            text.contains("snapshot") && text.contains("disconnect"),
            "{shell}"
        );
    }
    let _ = nbdsnap(&["man", "."]).ok();
    for page in ["nbdsnap.1", "nbdsnap-serve.1", "nbdsnap-snapshot-merge.1"] {
        let text = std::fs::read_to_string(folder.path().join(page)).unwrap();
        assert!(text.contains(".TH nbdsnap"), "{page}: {text}");
    }
    let refused = nbdsnap(&["man", "nowhere"]);
    nbdsnap_tests::harness::live::one_line(&refused, 1);
}

#[test]
fn a_snapshot_is_taken_anew_in_its_place() {
    let scene = Scene::new("reset", &["disk"]);
    let cow = scene.path("disk.img.s.cow");
    let words = [
        "snapshot", "create", "disk@s", "--chunk", "4K", "--size", "64K",
    ];
    scene.done(&words);
    scene.done(&["snapshot", "create", "disk@other"]);
    let mut origin = attach(&scene.server, "disk");
    // More than its store holds: it is lost. So it can be taken anew under clients
    // of the disk, who stay; its own would have to go.
    origin.write(0, &vec![1; 256 << 10], false).unwrap();
    let state = |scene: &Scene| scene.done(&["snapshot", "list", "disk@s"])[0]["state"].clone();
    assert_eq!(state(&scene), "invalid");
    let reader = attach(&scene.server, "disk@s");
    let line =
        nbdsnap_tests::harness::live::refused(&scene.server, &["snapshot", "reset", "disk@s"]);
    assert!(line.contains("clients attached (1)"), "{line}");
    assert_eq!(state(&scene), "invalid");
    reader.disconnect().unwrap();
    wait_until("it has gone", || {
        scene.done(&["snapshot", "list", "disk@s"])[0]["clients"] == 0
    });

    let mut then = scene.before[0].clone();
    then[..256 << 10].fill(1);
    let anew = scene.done(&["snapshot", "reset", "disk@s"]);
    assert_eq!(names(&anew), ["disk@s"]);
    assert_eq!(anew[0]["state"], "active");
    assert_eq!(anew[0]["chunk_bytes"], 4096);
    assert_eq!(anew[0]["cow"], cow.to_str().unwrap());
    origin.write(8192, &[2; 4096], false).unwrap();
    assert!(contents(&scene.server, "disk@s") == then);
    assert!(contents(&scene.server, "disk@other") == scene.before[0]);
    let left: Vec<_> = std::fs::read_dir(scene.folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains(".s.cow"))
        .collect();
    assert_eq!(
        left,
        ["disk.img.s.cow"],
        "the old store is gone, and nothing else is left"
    );
    assert!(scene.events().contains(&"reset disk@s".to_owned()));
    // Its store is the one that a restart finds.
    drop(origin);
    let mut serve = Serve::on_socket_in(scene.folder.path());
    serve.control_in(scene.folder.path());
    serve
        .disk("disk", &scene.path("disk.img"))
        .snapshot("disk@s", &cow, "")
        .snapshot("disk@other", &scene.path("disk.img.other.cow"), "");
    scene.server.stop();
    let server = serve.start();
    assert!(contents(&server, "disk@s") == then);
    assert!(contents(&server, "disk@other") == scene.before[0]);
}
