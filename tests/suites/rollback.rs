//! A disk that is rolled back goes on being rolled back after a kill, with a state
//! folder and without one, whether or not anybody names the snapshot; its clients
//! never see anything but the snapshot and what they wrote since, and the other
//! snapshots of the disk see nothing of it at all.
//!
//! A normal run plays a few kills; `NBDSNAP_LONG` goes on until a hundred have fallen
//! into rollbacks that a state folder remembers, and a hundred into those that the
//! disk's own list does.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nbdsnap_tests::harness::files::{folder, random_file};
use nbdsnap_tests::harness::live::{attach, contents, done, names};
use nbdsnap_tests::harness::process::{Running, run, wait_until};
use nbdsnap_tests::harness::random::{Random, long_run, seed};
use nbdsnap_tests::harness::server::{Serve, Server};

const MIB: usize = 1 << 20;
const DISK: usize = 8 * MIB;
const BLOCK: usize = 4096;
const PIECE: usize = 64 * BLOCK;

/// How a server comes by what it serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Memory {
    /// From its state folder, and nothing else.
    State,
    /// From its command line, which names the disk and the sibling, but not the
    /// snapshot that is merged.
    Lists,
}

struct Scene {
    folder: tempfile::TempDir,
    memory: Memory,
    random: Random,
    /// What the disk reads as.
    disk: Vec<u8>,
}

impl Scene {
    fn new(test: &str, memory: Memory) -> Self {
        let mut random = Random::new(seed(test));
        let folder = folder();
        let disk = random_file(&folder.path().join("vm.img"), DISK, &mut random);
        Self {
            folder,
            memory,
            random,
            disk,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn serve(&self) -> Serve {
        let mut serve = Serve::on_socket_in(self.folder.path());
        serve.control_in(self.folder.path());
        serve
    }

    fn first_start(&self) -> Server {
        let mut serve = self.serve();
        serve.disk("vm", &self.path("vm.img"));
        if self.memory == Memory::State {
            serve.state(&self.path("state"), 0);
        }
        serve.start()
    }

    /// After a kill: the disk and its sibling are served.
    fn start_again(&self) -> Server {
        let mut serve = self.serve();
        match self.memory {
            Memory::State => serve.state(&self.path("state"), 2),
            Memory::Lists => serve.disk("vm", &self.path("vm.img")).snapshot(
                "vm@sibling",
                &self.path("vm.img.sibling.cow"),
                "",
            ),
        };
        serve.start()
    }

    /// Write random blocks, and know them; before that `bulk` pieces in a row, which
    /// make a rollback long and cost little.
    fn write_some(&mut self, server: &Server, bulk: usize, blocks: usize) {
        let mut client = attach(server, "vm");
        let from = self.random.below((DISK / PIECE - bulk) as u64) as usize * PIECE;
        for at in (from..from + bulk * PIECE).step_by(PIECE) {
            let bytes = self.random.bytes(PIECE);
            client.write(at as u64, &bytes, false).expect("a write");
            self.disk[at..at + PIECE].copy_from_slice(&bytes);
        }
        for _ in 0..blocks {
            let at = self.random.below((DISK / BLOCK) as u64) as usize * BLOCK;
            let bytes = self.random.bytes(BLOCK);
            client.write(at as u64, &bytes, false).expect("a write");
            self.disk[at..at + BLOCK].copy_from_slice(&bytes);
        }
        client.disconnect().expect("a farewell");
    }
}

/// The state of a snapshot, if there is one of this name.
fn state_of(server: &Server, name: &str) -> Option<String> {
    let listed = done(server, &["snapshot", "list"]);
    let mut list = listed.as_array().expect("a list").iter();
    let state = &list.find(|one| one["name"] == name)?["state"];
    Some(state.as_str().expect("a word").to_owned())
}

fn gone(path: &Path) {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => panic!("{error}"),
        _ => {}
    }
}

/// How long rounds go on.
struct Goal {
    /// Rounds, at least.
    rounds: usize,
    /// Kills that have fallen into a rollback, at least.
    hits: usize,
}

impl Goal {
    /// A long run has its hundred kills in the middle of rollbacks; kills that came
    /// too early or too late do not count.
    fn of_this_run() -> Self {
        match long_run() {
            Some(_) => Self {
                rounds: 100,
                hits: 100,
            },
            None => Self { rounds: 8, hits: 1 },
        }
    }
}

/// Rounds: snapshots, writes, a rollback, a kill somewhere in it, writes under the
/// rollback that goes on, its end.
fn kills(test: &str, memory: Memory) {
    let goal = Goal::of_this_run();
    let mut scene = Scene::new(test, memory);
    let mut server = scene.first_start();
    let (mut resumed, mut before, mut after) = (0, 0, 0);
    let mut round = 0;
    while round < goal.rounds || resumed < goal.hits {
        assert!(
            round < 10 * goal.rounds,
            "{resumed} of {round} kills fell into a rollback"
        );
        round += 1;
        let then = scene.disk.clone();
        done(&server, &["snapshot", "create", "vm@then", "--chunk", "4K"]);
        scene.write_some(&server, 12, 50);
        let sibling = scene.disk.clone();
        done(
            &server,
            &["snapshot", "create", "vm@sibling", "--chunk", "16K"],
        );
        scene.write_some(&server, 12, 50);

        let deletes = scene.random.one_in(2);
        let mut words = vec!["snapshot", "merge", "vm@then", "--background"];
        words.extend(deletes.then_some("--delete-cow"));
        let begun = Instant::now();
        let mut order = Running::start(&mut server.order_command(&words));
        if scene.random.one_in(3) {
            std::thread::sleep(Duration::from_micros(scene.random.below(20_000)));
        } else {
            wait_until("the order is answered", || !order.is_running());
            let more = scene.random.below(begun.elapsed().as_micros() as u64);
            std::thread::sleep(Duration::from_micros(more));
        }
        server.kill();
        let answered = order.finish().code == Some(0);

        // A rollback that was never recorded has left the snapshot where it was:
        // without a state folder it must then be named.
        let listed = std::fs::read_to_string(scene.path("vm.img.nbdsnap")).expect("the list");
        let on_list = !listed.contains("vm.img.then.cow") || listed.contains("\"merging\"");
        if scene.memory == Memory::Lists && !on_list {
            let mut serve = scene.serve();
            serve
                .disk("vm", &scene.path("vm.img"))
                .snapshot("vm@then", &scene.path("vm.img.then.cow"), "")
                .snapshot("vm@sibling", &scene.path("vm.img.sibling.cow"), "");
            server = serve.start();
        } else {
            server = scene.start_again();
        }
        let recorded = state_of(&server, "vm@then").is_none_or(|state| state == "merging");
        assert!(
            recorded || !answered,
            "round {round}: an answer without a record"
        );
        if recorded {
            scene.disk.clone_from(&then);
            let goes_on = state_of(&server, "vm@then").is_some();
            resumed += usize::from(goes_on);
            after += usize::from(!goes_on);
        } else {
            before += 1;
            done(&server, &words);
            scene.disk.clone_from(&then);
        }
        let ends_here = state_of(&server, "vm@then").is_some();
        // From the first instant on, and under whatever is copied behind it.
        assert!(
            contents(&server, "vm") == scene.disk,
            "round {round}: the disk"
        );
        scene.write_some(&server, 1, 20);
        assert!(
            contents(&server, "vm@sibling") == sibling,
            "round {round}: the sibling"
        );
        wait_until("the rollback is done", || {
            names(&done(&server, &["snapshot", "list"])) == ["vm@sibling"]
        });
        assert!(
            contents(&server, "vm") == scene.disk,
            "round {round}: the disk, at the end"
        );
        assert!(
            contents(&server, "vm@sibling") == sibling,
            "round {round}: the sibling, at the end"
        );
        done(
            &server,
            &["snapshot", "remove", "vm@sibling", "--delete-cow"],
        );
        let cow = scene.path("vm.img.then.cow");
        if ends_here {
            assert_eq!(!cow.exists(), deletes, "round {round}: the store's file");
        }
        gone(&cow);
    }
    println!(
        "{test}: {round} kills: {resumed} rollbacks went on, {after} were done, {before} had not begun"
    );
    server.stop();
    let on_disk = std::fs::read(scene.path("vm.img")).expect("the disk");
    assert!(on_disk == scene.disk, "the disk by itself");
}

#[test]
fn a_rollback_goes_on_after_a_kill_by_the_state_folder() {
    kills("rollback_state", Memory::State);
}

#[test]
fn a_rollback_goes_on_after_a_kill_by_the_disks_own_list() {
    kills("rollback_lists", Memory::Lists);
}

/// A disk large enough for a rollback of many steps, and a snapshot of it of which
/// every chunk has been overwritten.
fn large_rollback(scene: &Scene) -> Server {
    const LARGE: u64 = 64 << 20;
    let disk = scene.path("large.img");
    std::fs::write(&disk, vec![1; LARGE as usize]).expect("a disk");
    let server = scene.serve().disk("vm", &disk).start();
    done(&server, &["snapshot", "create", "vm@then", "--chunk", "4K"]);
    let mut client = attach(&server, "vm");
    for at in (0..LARGE).step_by(MIB) {
        client.write(at, &vec![2; MIB], false).expect("a write");
    }
    client.disconnect().expect("a farewell");
    server
}

#[test]
fn a_rollback_tells_how_far_it_is_by_events() {
    let scene = Scene::new("rollback_events", Memory::Lists);
    let server = large_rollback(&scene);
    done(&server, &["snapshot", "merge", "vm@then"]);
    let text = server.order(["events", "--json"]).ok().text();
    let mut told = Vec::new();
    for line in text.lines() {
        let event: serde_json::Value = serde_json::from_str(line).expect("JSON");
        let word = event["event"].as_str().expect("a word").to_owned();
        if word.starts_with("merge") {
            assert_eq!(
                (&event["volume"], &event["snapshot"]),
                (&"vm".into(), &"then".into())
            );
            told.push((word, event["percent"].as_u64()));
        }
    }
    let tenths = (1..10).map(|tenth| ("merge-progress".to_owned(), Some(tenth * 10)));
    let mut wanted = vec![("merge-begun".to_owned(), None)];
    wanted.extend(tenths);
    wanted.push(("merge-done".to_owned(), None));
    assert_eq!(told, wanted);
    server.stop();
}

#[test]
fn a_rollback_shows_a_bar_on_a_terminal_and_nothing_in_a_pipe() {
    let scene = Scene::new("rollback_bar", Memory::Lists);
    let server = large_rollback(&scene);
    let line = format!(
        "{} snapshot merge vm@then --delete-cow --control {}",
        nbdsnap_tests::harness::program::program().display(),
        server.control().display()
    );
    let mut terminal = std::process::Command::new("script");
    let shown = run(terminal.args(["-qec", &line, "/dev/null"])).ok().text();
    let (before, rest) = shown.split_once("\r\x1b[K[").expect("a bar");
    assert_eq!(before, "", "{shown:?}");
    assert!(rest.contains("] ") && rest.contains(" %"), "{shown:?}");
    let end = shown
        .rsplit("\x1b[K")
        .next()
        .expect("the bar is wiped away");
    assert_eq!(end.trim(), "vm@then: merged");
    server.stop();

    let server = large_rollback(&scene);
    let piped = server.order(["snapshot", "merge", "vm@then", "--delete-cow"]);
    assert_eq!(piped.stderr, "");
    assert_eq!(piped.ok().text(), "vm@then: merged\n");
    // Nobody waits for the end of it.
    server.stop();
    let server = large_rollback(&scene);
    let words = ["snapshot", "merge", "vm@then", "--background"];
    let background = server.order(words).ok();
    assert_eq!(background.stderr, "");
    assert!(background.text().starts_with("vm@then: "), "{background}");
    // What is refused meanwhile is not written down either.
    let again = ["snapshot", "merge", "vm@then", "--delete-cow"];
    let again = server.order(again);
    let list = std::fs::read_to_string(scene.path("large.img.nbdsnap")).unwrap_or_default();
    assert!(
        again.code == Some(1) && !list.contains("\"delete_cow\": true"),
        "{again}: {list}"
    );
    wait_until("it is done", || state_of(&server, "vm@then").is_none());
    assert!(scene.path("large.img.then.cow").exists());
    server.stop();
}

#[test]
fn a_disk_in_the_middle_of_a_rollback_is_served_whole_or_not_at_all() {
    let mut scene = Scene::new("rollback_whole", Memory::Lists);
    let mut server = scene.first_start();
    let then = scene.disk.clone();
    let mut left = 50;
    // A kill that leaves something to be done; a fast machine needs a few tries.
    loop {
        done(&server, &["snapshot", "create", "vm@then", "--chunk", "4K"]);
        scene.write_some(&server, 20, 200);
        done(&server, &["snapshot", "merge", "vm@then", "--background"]);
        server.kill();
        let list = std::fs::read_to_string(scene.path("vm.img.nbdsnap")).unwrap_or_default();
        if list.contains("\"merging\"") {
            break;
        }
        left -= 1;
        assert!(left > 0, "every rollback was done before the kill");
        gone(&scene.path("vm.img.then.cow"));
        server = scene.first_start();
        scene.disk.clone_from(&then);
    }
    let refused = |serve: &mut Serve, word: &str| {
        let ended = serve.run_to_end().failed();
        assert!(ended.stderr.contains(word), "no '{word}': {}", ended.stderr);
    };
    let mut disk = scene.serve();
    disk.disk("vm", &scene.path("vm.img"));
    refused(disk.clone().read_only(), "rolled back");
    std::fs::rename(scene.path("vm.img.then.cow"), scene.path("away")).expect("a file moves");
    refused(&mut disk, "vm.img.then.cow");
    let mut without = disk.clone();
    without.arg("--without").arg(scene.path("vm.img.then.cow"));
    refused(&mut without, "vm.img.then.cow");
    std::fs::rename(scene.path("away"), scene.path("vm.img.then.cow")).expect("a file moves");
    let server = disk.start();
    assert!(contents(&server, "vm") == then);
    server.stop();
}
