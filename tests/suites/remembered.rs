//! What outlives a server: a disk knows its stores and is not written without
//! them, and with `--state` what was created live comes back, whole or not at
//! all, after a stop, a kill and a kill in the middle of an order.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nbdsnap::state::files::SystemFiles;
use nbdsnap::state::keeper::Keeper;
use nbdsnap::state::place::settled;
use nbdsnap_tests::harness::files::{Fingerprint, folder, random_file};
use nbdsnap_tests::harness::process::{Running, wait_until};
use nbdsnap_tests::harness::random::{Random, long_run, seed};
use nbdsnap_tests::harness::server::{Serve, Server};
use nbdsnap_tests::harness::wire::Session;

const MIB: usize = 1 << 20;

/// Disks in a folder, a state folder, and what their bytes were.
struct Place {
    folder: tempfile::TempDir,
    before: Vec<u8>,
}

impl Place {
    fn new(name: &str) -> Self {
        let mut random = Random::new(seed(name));
        let folder = folder();
        let before = random_file(&folder.path().join("vm.img"), MIB, &mut random);
        random_file(&folder.path().join("other.img"), MIB, &mut random);
        Self { folder, before }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn serve(&self) -> Serve {
        let mut serve = Serve::on_socket_in(self.folder.path());
        serve.control_in(self.folder.path());
        serve
    }

    /// The disk alone.
    fn disk(&self) -> Serve {
        let mut serve = self.serve();
        serve.disk("vm", &self.path("vm.img"));
        serve
    }

    /// With a snapshot in `x.cow`.
    fn with_store(&self, options: &str) -> Serve {
        let mut serve = self.disk();
        serve.snapshot("vm@x", &self.path("x.cow"), options);
        serve
    }

    /// Nothing but what the state folder has, which is so many exports.
    fn remembered(&self, exports: usize) -> Serve {
        let mut serve = self.serve();
        serve.state(&self.path("state"), exports);
        serve
    }
}

fn read(server: &Server, export: &str) -> Vec<u8> {
    let mut session = Session::open(&server.address(), export)
        .unwrap_or_else(|error| panic!("{export}: {error}"));
    let bytes = session.read_all().expect("a reply");
    bytes.unwrap_or_else(|errno| panic!("{export}: errno {errno}"))
}

fn write(server: &Server, export: &str, offset: u64, byte: u8) {
    let mut session = Session::open(&server.address(), export).expect("a connection");
    let written = session.write(offset, &[byte; 4096]).expect("a reply");
    written.expect("the write succeeds");
}

fn has(server: &Server, export: &str) -> bool {
    Session::open(&server.address(), export).is_ok()
}

/// Run a command line that must be refused with these words, and change nothing.
fn refused(place: &Place, serve: &Serve, words: &[&str]) {
    let before = Fingerprint::of(place.folder.path());
    let ended = serve.run_to_end().failed();
    for word in words {
        assert!(
            ended.stderr.contains(word),
            "no '{word}' in: {}",
            ended.stderr
        );
    }
    before.assert_unchanged(place.folder.path(), "a refusal");
}

#[test]
fn a_disk_is_not_written_without_its_store_unless_that_is_given_up() {
    let place = Place::new("without");
    let server = place.with_store("").start();
    write(&server, "vm", 0, 1);
    server.stop();
    assert!(place.path("vm.img.nbdsnap").exists());

    let cow = place.path("x.cow");
    let cow = cow.to_str().expect("UTF-8");
    refused(&place, &place.disk(), &["vm.img", "'x'", cow, "--without"]);
    let mut read_only = place.disk();
    let before = Fingerprint::of(place.folder.path());
    let server = read_only.read_only().start();
    server.stop();
    before.assert_unchanged(place.folder.path(), "--read-only");

    // With it, as ever, whatever path leads there.
    std::os::unix::fs::symlink(place.path("vm.img"), place.path("link")).expect("a link");
    let mut by_link = place.serve();
    by_link.disk("vm", &place.path("link"));
    refused(&place, &by_link, &["'x'"]);
    let server = by_link.snapshot("vm@y", &place.path("x.cow"), "").start();
    assert_eq!(read(&server, "vm@y"), place.before);
    server.kill();

    let mut without = place.disk();
    without.arg("--without").arg(place.path("x.cow"));
    let server = without.start();
    write(&server, "vm", 4096, 2);
    server.stop();
    assert!(!place.path("vm.img.nbdsnap").exists(), "no store is left");
    // It has missed a write: it does not come back by itself.
    refused(
        &place,
        &place.with_store(""),
        &["x.cow", "not on the list", "adopt"],
    );
}

#[test]
fn a_store_from_elsewhere_is_adopted_once() {
    let place = Place::new("adopt");
    let server = place.with_store("").start();
    write(&server, "vm", 0, 1);
    server.stop();
    // As if the kernel had made it: there is no list.
    std::fs::remove_file(place.path("vm.img.nbdsnap")).expect("the list");
    refused(&place, &place.with_store(""), &["x.cow", "vm.img", "adopt"]);
    for options in [",adopt", ""] {
        let server = place.with_store(options).start();
        assert_eq!(read(&server, "vm@x"), place.before, "options '{options}'");
        server.stop();
    }
    // A transient store is nobody's business afterwards.
    std::fs::remove_file(place.path("vm.img.nbdsnap")).expect("the list");
    std::fs::remove_file(place.path("x.cow")).expect("the store");
    place.with_store(",transient").start().stop();
    assert!(!place.path("vm.img.nbdsnap").exists());
}

#[test]
fn a_damaged_list_is_not_guessed_at() {
    let place = Place::new("damaged");
    place.with_store("").start().stop();
    let list = place.path("vm.img.nbdsnap");
    let mut bytes = std::fs::read(&list).expect("the list");
    let last = bytes.len() - 4;
    bytes[last] ^= 1;
    std::fs::write(&list, bytes).expect("the list can be written");
    refused(
        &place,
        &place.with_store(""),
        &["vm.img.nbdsnap", "checksum"],
    );
    refused(&place, &place.disk(), &["vm.img.nbdsnap", "checksum"]);
}

/// An order that must succeed.
fn order(server: &Server, words: &str) {
    let _ = server.order(words.split(' ')).ok();
}

#[test]
fn what_was_created_live_comes_back() {
    let place = Place::new("state");
    let mut first = place.disk();
    let server = first.state(&place.path("state"), 0).start();
    write(&server, "vm", 0, 1);
    let then = read(&server, "vm");
    order(&server, "snapshot create vm@a --chunk 4K");
    order(&server, "snapshot create vm@gone --chunk 4K");
    write(&server, "vm", 0, 2);
    order(&server, "snapshot remove vm@gone --delete-cow");
    let now = read(&server, "vm");
    server.kill();

    for kill in [true, false] {
        let server = place.remembered(2).start();
        assert_eq!(read(&server, "vm"), now);
        assert_eq!(read(&server, "vm@a"), then);
        assert!(!has(&server, "vm@gone"));
        assert!(!place.path("vm.img.gone.cow").exists());
        if kill {
            server.kill();
        } else {
            server.stop();
        }
    }
    // The command line may name it too, and more.
    let mut more = place.remembered(1);
    more.disk("vm", &place.path("vm.img"));
    more.disk("other", &place.path("other.img"));
    let server = more.start();
    assert_eq!(read(&server, "vm@a"), then);
    server.stop();
    let server = place.remembered(3).start();
    assert!(has(&server, "other"), "it is remembered from now on");
    server.stop();
    // Under another name, or at another path, it would be two things at once.
    let mut moved = place.remembered(3);
    moved.disk("vm", &place.path("other.img"));
    refused_state(&moved, &["vm", "other.img"]);
}

#[test]
fn a_lost_snapshot_is_listed_until_it_is_ended() {
    let place = Place::new("lost");
    let first = place.disk();
    let server = first.start();
    for name in ["vm@a", "vm@b"] {
        order(
            &server,
            &format!("snapshot create {name} --chunk 4K --size 64K"),
        );
    }
    for block in 0..30 {
        write(&server, "vm", block * 4096, 3);
    }
    server.stop();
    let (a, b) = (place.path("vm.img.a.cow"), place.path("vm.img.b.cow"));
    let b_shown = b.to_str().expect("UTF-8");
    let with_a = || {
        let mut serve = place.disk();
        serve.snapshot("vm@a", &a, "");
        serve
    };
    refused(&place, &with_a(), &["'b'", "--without", b_shown]);
    let mut without = with_a();
    without.arg("--without").arg(&b);
    let server = without.start();
    let list = || std::fs::read_to_string(place.path("vm.img.nbdsnap")).unwrap_or_default();
    assert!(list().contains("a.cow") && !list().contains("b.cow"));
    order(&server, "snapshot remove vm@a --delete-cow");
    assert_eq!(list(), "", "no store is left");
    let said = server.stop();
    for word in [
        "a.cow",
        "invalid",
        "snapshot reset",
        "snapshot remove",
        "--without",
    ] {
        assert!(said.contains(word), "no '{word}' in: {said}");
    }
}

#[test]
fn a_store_that_the_list_says_is_lost_is_left_out_with_a_word() {
    let place = Place::new("marked");
    let mut first = place.disk();
    let server = first.state(&place.path("state"), 0).start();
    order(&server, "snapshot create vm@a");
    server.stop();
    let (disk, cow) = (place.path("vm.img"), place.path("vm.img.a.cow"));
    let mut keeper = Keeper::open(SystemFiles, None).expect("records");
    let marked = keeper.mark_lost(&settled(&disk), &settled(&cow));
    assert!(
        marked.expect("the list can be written"),
        "it is on the list"
    );
    // As with everything that is only remembered, the server goes on without it.
    let server = place.remembered(0).start();
    wait_until("it says why it does not serve the volume", || {
        server.stderr().contains("--without")
    });
    assert!(!has(&server, "vm"));
    server.stop();
    let mut without = place.remembered(1);
    without.arg("--without").arg(&cow);
    let server = without.start();
    assert!(has(&server, "vm") && !has(&server, "vm@a"));
    server.stop();
    // It is not missed the next time.
    let server = place.remembered(1).start();
    assert!(has(&server, "vm") && !has(&server, "vm@a"));
    server.stop();
}

/// The same as [`refused`] where the state folder's lock may appear.
fn refused_state(serve: &Serve, words: &[&str]) {
    let ended = serve.run_to_end().failed();
    for word in words {
        assert!(
            ended.stderr.contains(word),
            "no '{word}' in: {}",
            ended.stderr
        );
    }
}

#[test]
fn a_missing_disk_or_store_does_not_stop_the_others() {
    let place = Place::new("missing");
    let mut first = place.serve();
    first.disk("vm", &place.path("vm.img"));
    first.disk("other", &place.path("other.img"));
    let server = first.state(&place.path("state"), 0).start();
    order(&server, "snapshot create vm@a other@a");
    server.stop();

    let away = |from: &str, to: &str| {
        std::fs::rename(place.path(from), place.path(to)).expect("a file can be moved");
    };
    for missing in ["vm.img", "vm.img.a.cow"] {
        away(missing, "away");
        let server = place.remembered(2).start();
        assert!(
            has(&server, "other") && has(&server, "other@a"),
            "{missing}"
        );
        assert!(!has(&server, "vm") && !has(&server, "vm@a"), "{missing}");
        let said = server.stop();
        assert!(
            said.contains("vm") && said.contains(missing),
            "{missing}: {said}"
        );
        away("away", missing);
    }
    // It is not forgotten meanwhile.
    let server = place.remembered(4).start();
    assert_eq!(read(&server, "vm@a"), place.before);
    server.stop();
    // A store that was replaced by something else is not taken for it.
    away("vm.img.a.cow", "away");
    std::fs::write(place.path("vm.img.a.cow"), vec![0; MIB]).expect("a file");
    let server = place.remembered(2).start();
    assert!(!has(&server, "vm"));
    server.stop();
    let zeros = std::fs::read(place.path("vm.img.a.cow")).expect("the file");
    assert!(
        zeros.iter().all(|&byte| byte == 0),
        "no store was made in it"
    );
}

#[test]
fn a_state_folder_is_one_servers_alone() {
    let place = Place::new("alone");
    let server = place.disk().state(&place.path("state"), 0).start();
    let mut second = Serve::on_socket_in(&place.path("state"));
    second.disk("other", &place.path("other.img"));
    second.state(&place.path("state"), 0);
    refused_state(&second, &["another server has this state folder"]);
    server.stop();
    let state = place.path("state").join("state");
    let mut bytes = std::fs::read(&state).expect("the state");
    bytes.truncate(bytes.len() - 1);
    std::fs::write(&state, bytes).expect("the state can be written");
    refused_state(&place.remembered(0), &["state", "checksum"]);
}

/// Stores in the folder, less the one that was there from the beginning.
fn stores(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("the folder");
    let names = entries.map(|entry| entry.expect("an entry").file_name());
    let mut names: Vec<String> = names
        .map(|name| name.to_string_lossy().into_owned())
        .filter(|name| name.contains(".cow"))
        .collect();
    names.sort();
    names
}

#[test]
fn a_kill_in_the_middle_of_an_order_leaves_it_done_or_undone() {
    let place = Place::new("orders");
    let mut random = Random::new(seed("orders.moments"));
    let mut first = place.serve();
    first.disk("vm", &place.path("vm.img"));
    first.disk("other", &place.path("other.img"));
    let mut server = first.state(&place.path("state"), 0).start();
    let begun = Instant::now();
    order(&server, "snapshot create vm@kept --chunk 4K");
    // From before the order is read to after it has been answered, however fast
    // this machine is today.
    let whole = 2 * begun.elapsed().as_micros() as u64;
    let rounds = if long_run().is_some() { 300 } else { 25 };
    let (mut done, mut undone, mut there) = (0, 0, false);
    for round in 0..rounds {
        let now = read(&server, "vm");
        let words = if there {
            "snapshot remove vm@g other@g --delete-cow"
        } else {
            "snapshot create vm@g other@g --chunk 4K"
        };
        let running = Running::start(&mut server.order_command(words.split(' ')));
        std::thread::sleep(Duration::from_micros(random.below(whole)));
        server.kill();
        let answered = running.finish().code == Some(0);
        // However many exports come back: two disks and one snapshot at least.
        server = place.remembered(3).start();
        let both = (has(&server, "vm@g"), has(&server, "other@g"));
        assert!(both.0 == both.1, "round {round}: half a group");
        if answered {
            assert_eq!(both.0, !there, "round {round}: an order that was answered");
        }
        if both.0 == there {
            undone += 1;
        } else {
            done += 1;
        }
        if !there && both.0 {
            assert_eq!(read(&server, "vm@g"), now, "round {round}");
        }
        there = both.0;
        let mut wanted = vec!["vm.img.kept.cow".to_owned()];
        if there {
            wanted.extend(["vm.img.g.cow".into(), "other.img.g.cow".into()]);
        }
        wanted.sort();
        assert_eq!(stores(place.folder.path()), wanted, "round {round}");
        assert_eq!(read(&server, "vm@kept"), place.before, "round {round}");
        write(&server, "vm", random.below(256) * 4096, round as u8);
    }
    println!("{done} times done, {undone} times undone");
    assert!(done > 0 && undone > 0, "the kills come before and after");
    server.stop();
}
