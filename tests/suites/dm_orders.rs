//! What `snapshot`, `volume`, `suspend` and `resume` do to mapped devices: they are the
//! same snapshots and volumes to them as those that are served, and where the means of
//! the device-mapper end, a refusal says so and changes nothing.
//! (That groups are of one instant: `live_rounds.rs`.)

use nbdsnap::client::Client;
use nbdsnap_tests::harness::files::{folder, random_file, sparse_file};
use nbdsnap_tests::harness::live::{attach, contents, done, names, refused, try_attach};
use nbdsnap_tests::harness::process::wait_until;
use nbdsnap_tests::harness::random::{Random, seed};
use nbdsnap_tests::harness::server::{Serve, Server};

const MIB: usize = 1 << 20;
const SECTOR: u64 = 512;

/// A mapped device `vm` over a file, and a volume `served`.
struct Scene {
    folder: tempfile::TempDir,
    server: Server,
    random: Random,
}

impl Scene {
    fn new(test: &str) -> Self {
        let folder = folder();
        let mut random = Random::new(seed(test));
        let mut serve = Serve::on_socket_in(folder.path());
        serve.control_in(folder.path());
        for disk in ["a", "b", "served"] {
            random_file(&folder.path().join(disk), 2 * MIB, &mut random);
        }
        serve.disk("served", &folder.path().join("served"));
        let scene = Self {
            server: serve.start(),
            folder,
            random,
        };
        scene.map("vm", &format!("linear {} 0", scene.path("a")));
        scene
    }

    fn path(&self, name: &str) -> String {
        let path = self.folder.path().join(name);
        path.to_str().expect("a path of ASCII").to_owned()
    }

    fn exists(&self, name: &str) -> bool {
        std::fs::exists(self.path(name)).expect("a look")
    }

    fn map(&self, name: &str, table: &str) {
        self.ok(&["create", name, "--table", &format!("0 4096 {table}")]);
    }

    fn ok(&self, words: &[&str]) -> String {
        self.server.order(["dm"].iter().chain(words)).ok().text()
    }

    fn done(&self, words: &[&str]) -> serde_json::Value {
        done(&self.server, words)
    }

    fn refused(&self, words: &[&str]) -> String {
        refused(&self.server, words)
    }

    fn snapshots(&self) -> Vec<String> {
        names(&self.done(&["snapshot", "list"]))
    }

    fn contents(&self, export: &str) -> Vec<u8> {
        contents(&self.server, export)
    }

    /// Write here and there, and leave.
    fn scribble(&mut self, export: &str) {
        let mut client = attach(&self.server, export);
        self.scribble_as(&mut client);
        client.disconnect().expect("a farewell");
    }

    fn scribble_as(&mut self, client: &mut Client) {
        for _ in 0..40 {
            let len = 1 + self.random.below(12);
            let at = self.random.below(client.size() / SECTOR - len) * SECTOR;
            let data = self.random.bytes((len * SECTOR) as usize);
            client.write(at, &data, false).expect("a device is written");
        }
    }
}

#[test]
fn a_merge_rolls_back_what_the_snapshot_was_taken_of_by_every_way() {
    let mut scene = Scene::new("rolled_back");
    scene.map("top", "snapshot-origin /dev/mapper/vm");
    let first = scene.contents("vm");
    scene.done(&["snapshot", "create", "vm@first", "--chunk", "4K"]);
    scene.scribble("top");
    let second = scene.contents("vm");
    scene.done(&["snapshot", "create", "top@second", "--chunk", "8K"]);
    scene.scribble("vm");
    // A client that is attached to any of them is in the way.
    let mut client = attach(&scene.server, "top");
    for name in ["vm@first", "top@second"] {
        let why = scene.refused(&["snapshot", "merge", name]);
        assert!(why.contains("clients attached (1)"), "{why}");
        let why = scene.refused(&["snapshot", "merge", name, "--when-idle"]);
        assert!(why.contains("does not wait"), "{why}");
    }
    let before = scene.contents("vm");
    let order = ["snapshot", "merge", "vm@first", "--force", "--delete-cow"];
    assert_eq!(scene.done(&order), serde_json::json!([]));
    let now = client.read(0, first.len() as u32).expect("a read");
    assert!(
        now == first && before != first,
        "rolled back under a client"
    );
    assert!(scene.contents("vm") == first);
    assert!(scene.contents("top@second") == second, "the other stays");
    assert!(!scene.exists("a.vm@first.cow") && scene.exists("a.top@second.cow"));
    assert_eq!(scene.snapshots(), ["top@second"]);
    client.disconnect().expect("a farewell");
    let background = ["snapshot", "merge", "top@second", "--background"];
    scene.done(&background);
    assert!(scene.contents("top") == second, "at once");
    wait_until("both merges are told to be done", || {
        let events = scene.server.order(["events"]).ok().text();
        let told = |name: &str| events.contains(&format!("merge-done {name}\n"));
        told("vm@first") && told("top@second")
    });
    assert!(scene.snapshots().is_empty() && scene.exists("a.top@second.cow"));
    scene.ok(&["remove", "top"]);
    scene.ok(&["remove", "vm"]);
    assert!(std::fs::read(scene.path("a")).expect("the disk") == second);
}

#[test]
fn a_rename_takes_those_with_it_that_are_named_after_the_snapshot() {
    let mut scene = Scene::new("renamed");
    scene.done(&["snapshot", "create", "vm@one", "vm@other"]);
    scene.done(&["snapshot", "create", "vm@one@next"]);
    let mut client = attach(&scene.server, "vm@one");
    let taken = scene.refused(&["snapshot", "rename", "vm@one", "other"]);
    assert!(taken.contains("vm@other"), "{taken}");
    assert_eq!(scene.snapshots(), ["vm@one", "vm@one@next", "vm@other"]);
    let answer = scene.done(&["snapshot", "rename", "vm@one", "uno"]);
    assert_eq!(names(&answer), ["vm@uno"]);
    assert_eq!(answer[0]["volume"], "vm");
    assert_eq!(scene.snapshots(), ["vm@other", "vm@uno", "vm@uno@next"]);
    scene.scribble_as(&mut client);
    let written = client.read(0, 2 * MIB as u32).expect("a read");
    assert!(scene.contents("vm@uno") == written, "the client stays");
    assert!(try_attach(&scene.server, "vm@one").is_err());
    // By the name of its device, whatever that is.
    scene.ok(&["rename", "vm@other", "elsewhere"]);
    let answer = scene.done(&["snapshot", "rename", "vm@elsewhere", "back"]);
    assert_eq!(names(&answer), ["back"]);
}

#[test]
fn what_is_taken_anew_shows_the_present_even_if_it_was_lost() {
    let mut scene = Scene::new("anew");
    let create = ["snapshot", "create", "vm@small", "--chunk", "4K"];
    scene.done(&[&create[..], &["--size", "32K"]].concat());
    let served = ["snapshot", "create", "served@small", "--chunk", "4K"];
    scene.done(&[&served[..], &["--size", "32K"]].concat());
    scene.scribble("vm");
    scene.scribble("served");
    for volume in ["vm", "served"] {
        let name = format!("{volume}@small");
        let status = scene.done(&["snapshot", "status", &name]);
        assert_eq!(status[0]["state"], "invalid");
        let next = format!("{name}@next");
        let why = scene.refused(&["snapshot", "create", &next]);
        let lost = format!("{name} is lost");
        assert!(why.contains(&lost) && why.contains("reset"), "{why}");
        let answer = scene.done(&["snapshot", "reset", &name]);
        assert_eq!(answer[0]["state"], "active");
        assert!(scene.contents(&name) == scene.contents(volume));
    }
    // Its number and settings stay, and it goes on keeping what it showed.
    let table = scene.ok(&["table", "vm@small"]);
    let cow = scene.path("a.vm@small.cow");
    assert_eq!(table, format!("0 4096 snapshot 999:0 {cow} P 8\n"));
    let frozen = scene.contents("vm");
    let mut client = attach(&scene.server, "vm");
    client.write(0, &[1; 4096], false).expect("a write");
    assert!(scene.contents("vm@small") == frozen);
    // One that is in use is not taken anew unasked.
    let mut reader = attach(&scene.server, "vm@small");
    let why = scene.refused(&["snapshot", "reset", "vm@small"]);
    assert!(why.contains("clients attached (1)"), "{why}");
    scene.done(&["snapshot", "reset", "vm@small", "--force"]);
    let now = reader.read(0, 4096).expect("a read");
    assert_eq!(now, [1; 4096]);
}

#[test]
fn several_are_taken_and_removed_in_one_order_or_none_of_them() {
    let scene = Scene::new("several");
    scene.map("other", &format!("linear {} 0", scene.path("b")));
    let taken = scene.done(&["snapshot", "create", "other@a", "served@a", "vm@a"]);
    assert_eq!(names(&taken), ["other@a", "served@a", "vm@a"]);
    scene.done(&["snapshot", "create", "vm@a@b"]);
    let all = ["served@a", "other@a", "vm@a", "vm@a@b"];
    assert_eq!(scene.snapshots(), all);
    let stores = [
        "b.other@a.cow",
        "served.a.cow",
        "a.vm@a.cow",
        "a.vm@a@b.cow",
    ];
    assert!(stores.iter().all(|store| scene.exists(store)));
    // The last of each cannot be taken.
    std::fs::write(scene.path("served.x.cow"), b"precious").expect("a file");
    sparse_file(&scene.folder.path().join("empty"), MIB as u64);
    for (order, why) in [
        (&["other@x", "vm@x", "served@x"][..], "served.x.cow"),
        (&["other@x", "vm@a"], "there is a snapshot vm@a already"),
        (&["other@x", "nosuch@x"], "no volume is named \"nosuch\""),
        (&["other@x", "vm@x@y"], "there is no snapshot vm@x"),
        (&["other@x", "other@x"], "named twice"),
        (&["vm@x", "other@x", "--cow", "/x"], "--cow names one path"),
        (&["vm@x", "--auto-extend", "80%+20%"], "--auto-extend"),
        (&["vm@x", "--on-full", "error"], "--on-full"),
        (&["vm@x", "--chunk", "5K"], "power of two"),
        (&["vm@x", "--cow", "/dev/mapper/vm"], "dm create"),
    ] {
        let line = scene.refused(&[&["snapshot", "create"], order].concat());
        assert!(line.contains(why), "{order:?}: {line}");
        assert!(!line.contains("os error"), "{line}");
        assert_eq!(scene.snapshots(), all, "{order:?}");
        assert!(!scene.exists("b.other@x.cow") && !scene.exists("a.vm@x.cow"));
        assert_eq!(scene.ok(&["ls"]).lines().count(), 7, "{order:?}");
    }
    // What is there is no new store, be it one.
    for (cow, what) in [
        ("a.vm@a@b.cow", "a disk under mapped devices"),
        ("served.x.cow", "is no place"),
    ] {
        let create = ["snapshot", "create", "vm@x", "--cow", &scene.path(cow)];
        let line = scene.refused(&create);
        assert!(line.contains(what), "{line}");
    }
    // A device that would go on with another table is not one that can be held.
    scene.ok(&["load", "other", "--table", "0 4096 zero"]);
    let line = scene.refused(&["snapshot", "create", "other@x", "vm@x"]);
    assert!(line.contains("dm clear other"), "{line}");
    scene.ok(&["clear", "other"]);
    for (order, why) in [
        (&["vm@a"][..], "vm@a@b"),
        (&["vm@a@b", "vm@nosuch"], "there is no snapshot vm@nosuch"),
        (
            &["vm@a@b", "served@nosuch"],
            "there is no snapshot served@nosuch",
        ),
    ] {
        let line = scene.refused(&[&["snapshot", "remove"], order].concat());
        assert!(line.contains(why), "{order:?}: {line}");
        assert_eq!(scene.snapshots(), all, "{order:?}");
    }
    let remove = [
        "snapshot", "remove", "vm@a", "vm@a@b", "other@a", "served@a",
    ];
    let gone = scene.done(&[&remove[..], &["--delete-cow"]].concat());
    assert_eq!(names(&gone).len(), 4);
    assert!(scene.snapshots().is_empty());
    assert!(stores.iter().all(|store| !scene.exists(store)));
    // An empty file is a place for a store.
    let empty = scene.path("empty");
    scene.done(&["snapshot", "create", "vm@x", "--cow", &empty]);
    scene.done(&["snapshot", "remove", "vm@x"]);
    let line = scene.refused(&["snapshot", "create", "vm@x", "--cow", &empty]);
    assert!(line.contains("a COW store is there"), "{line}");
}

#[test]
fn what_mapped_devices_do_not_do_is_refused_with_what_does_it() {
    let scene = Scene::new("refused");
    scene.done(&["snapshot", "create", "vm@a", "served@a"]);
    for (order, why) in [
        (
            &["snapshot", "extend", "vm@a", "--size", "1G"][..],
            "dm load vm@a",
        ),
        (&["snapshot", "cancel", "vm@a"], "no merge of vm@a waits"),
        (&["volume", "remove", "vm"], "dm remove vm"),
        (&["volume", "resize", "vm"], "dm load vm"),
        (&["suspend", "vm", "--timeout", "3"], "--timeout"),
        (
            &["suspend", "vm", "nosuch"],
            "no volume is named \"nosuch\"",
        ),
        (&["suspend", "served", "vm", "vm"], "named twice"),
        (&["resume", "served", "vm"], "not suspended"),
    ] {
        let line = scene.refused(order);
        assert!(line.contains(why), "{order:?}: {line}");
    }
    let volumes = scene.done(&["volume", "list"]);
    let stands_still = |one: &serde_json::Value| one["suspended"] == true;
    assert!(!volumes.as_array().expect("a list").iter().any(stands_still));
    let still = scene.done(&["suspend", "vm", "served"]);
    assert_eq!(names(&still), ["served", "vm"]);
    let line = scene.refused(&["suspend", "vm"]);
    assert!(line.contains("suspended already"), "{line}");
    scene.done(&["resume", "served", "vm"]);
}
