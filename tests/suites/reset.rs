//! `snapshot reset`: whatever happens in the middle of it, the snapshot is of the
//! old instant or of the new one, as a whole, with its length and its time; by the
//! state folder, and by the disk's own list.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nbdsnap::client::Client;
use nbdsnap_tests::harness::files::{folder, random_file};
use nbdsnap_tests::harness::live::{attach, contents, done};
use nbdsnap_tests::harness::process::Running;
use nbdsnap_tests::harness::random::{Random, long_run, seed};
use nbdsnap_tests::harness::server::{Serve, Server};

const BLOCK: usize = 4096;
const DISK: usize = 256 * BLOCK;
/// By so much the disk grows at a time.
const GROWTH: usize = 4 * BLOCK;

/// How a server comes by what it serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Memory {
    /// From its state folder, and nothing else.
    State,
    /// From its command line.
    Lists,
}

struct Scene {
    folder: tempfile::TempDir,
    memory: Memory,
    first: Vec<u8>,
}

impl Scene {
    fn new(memory: Memory, random: &mut Random) -> Self {
        let folder = folder();
        let first = random_file(&folder.path().join("vm.img"), DISK, random);
        Self {
            folder,
            memory,
            first,
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
        let server = serve.start();
        for name in ["vm@kept", "vm@s"] {
            done(&server, &["snapshot", "create", name, "--chunk", "4K"]);
        }
        server
    }

    fn start_again(&self) -> Server {
        let mut serve = self.serve();
        if self.memory == Memory::State {
            serve.state(&self.path("state"), 3);
        } else {
            serve.disk("vm", &self.path("vm.img"));
            for name in ["kept", "s"] {
                let cow = self.path(&format!("vm.img.{name}.cow"));
                serve.snapshot(&format!("vm@{name}"), &cow, "");
            }
        }
        serve.start()
    }

    /// The disk becomes larger under the server.
    fn grow(&self, server: &Server) {
        let disk = std::fs::File::options()
            .write(true)
            .open(self.path("vm.img"))
            .expect("the disk");
        let bytes = disk.metadata().expect("its size").len();
        disk.set_len(bytes + GROWTH as u64).expect("it grows");
        done(server, &["volume", "resize", "vm"]);
    }

    /// Files of stores, whatever they are called.
    fn stores(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).expect("the folder");
        let names = entries.map(|entry| entry.expect("an entry").file_name());
        let mut names: Vec<String> = names
            .map(|name| name.to_string_lossy().into_owned())
            .filter(|name| name.contains(".cow"))
            .collect();
        names.sort();
        names
    }
}

/// Writes of one client, in the order in which they were sent.
#[derive(Debug, Default)]
struct Journal {
    sent: Vec<(usize, u64)>,
    /// So many of them were answered: all, or all but the last.
    answered: usize,
}

/// A client that writes one numbered block after the other until it is told to
/// stop, or its server dies.
struct Writer {
    journal: Arc<Mutex<Journal>>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

fn block(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(BLOCK / 8)
}

impl Writer {
    fn start(mut client: Client, seed: u64) -> Self {
        let journal = Arc::new(Mutex::new(Journal::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let (told, stopped) = (Arc::clone(&journal), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let mut random = Random::new(seed);
            let blocks = client.size() / BLOCK as u64;
            for number in 0.. {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let at = random.below(blocks) as usize * BLOCK;
                let number = seed ^ number;
                told.lock().expect("a journal").sent.push((at, number));
                if client.write(at as u64, &block(number), false).is_err() {
                    return;
                }
                told.lock().expect("a journal").answered += 1;
            }
        });
        Self {
            journal,
            stop,
            thread,
        }
    }

    fn answered(&self) -> usize {
        self.journal.lock().expect("a journal").answered
    }

    fn end(self) -> Journal {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the writer does not panic");
        std::mem::take(&mut self.journal.lock().expect("a journal"))
    }
}

/// Whether `found` is `before` with the first writes of the journal in it, for a
/// number of them from `least` on.
fn is_an_instant(found: &[u8], before: &[u8], journal: &Journal, least: usize) -> bool {
    if found.len() != before.len() {
        return false;
    }
    let mut now = before.to_vec();
    let differs = |now: &[u8], at: usize| now[at..at + BLOCK] != found[at..at + BLOCK];
    let mut wrong: Vec<bool> = (0..now.len())
        .step_by(BLOCK)
        .map(|at| differs(&now, at))
        .collect();
    let mut count = wrong.iter().filter(|&&wrong| wrong).count();
    for (done, &(at, number)) in journal.sent.iter().enumerate() {
        if done >= least && count == 0 {
            return true;
        }
        now[at..at + BLOCK].copy_from_slice(&block(number));
        let differs = differs(&now, at);
        count = count + usize::from(differs) - usize::from(wrong[at / BLOCK]);
        wrong[at / BLOCK] = differs;
    }
    count == 0
}

/// Resets under a client that writes, each cut off by a kill at a random moment.
fn kills(test: &str, memory: Memory, rounds: usize) {
    let seed = seed(test);
    let mut random = Random::new(seed);
    let scene = Scene::new(memory, &mut random);
    let mut server = scene.first_start();
    let mut disk = scene.first.clone();
    let mut then = disk.clone();
    let begun = Instant::now();
    done(&server, &["snapshot", "reset", "vm@s"]);
    // From before the order is read to after it has been answered, however fast
    // this machine is today.
    let whole = 2 * begun.elapsed().as_micros() as u64;
    let (mut old, mut new) = (0, 0);
    for round in 0..rounds {
        if random.one_in(3) {
            scene.grow(&server);
            disk.resize(disk.len() + GROWTH, 0);
        }
        let writer = Writer::start(attach(&server, "vm"), seed ^ ((round as u64) << 32));
        let least = writer.answered();
        let words = ["snapshot", "reset", "vm@s"];
        let order = Running::start(&mut server.order_command(words));
        std::thread::sleep(Duration::from_micros(random.below(whole)));
        server.kill();
        let answered = order.finish().code == Some(0);
        let journal = writer.end();

        server = scene.start_again();
        let now = contents(&server, "vm");
        assert!(
            is_an_instant(&now, &disk, &journal, journal.answered),
            "round {round}: the disk"
        );
        let found = contents(&server, "vm@s");
        let is_old = found == then;
        assert!(
            is_old || is_an_instant(&found, &disk, &journal, least),
            "round {round}: a snapshot of {} bytes that is of no instant; the old one has {}, the new one {}",
            found.len(),
            then.len(),
            disk.len()
        );
        assert!(!(is_old && answered), "round {round}: it was answered");
        old += usize::from(is_old);
        new += usize::from(!is_old);
        assert!(
            contents(&server, "vm@kept") == scene.first,
            "round {round}: the other snapshot"
        );
        if memory == Memory::State {
            let wanted = ["vm.img.kept.cow", "vm.img.s.cow"];
            assert_eq!(scene.stores(), wanted, "round {round}");
        }
        (disk, then) = (now, found);
    }
    println!("{test}: {old} times the old, {new} times the new");
    assert!(old > 0 && new > 0, "the kills come before and after");
    server.stop();
}

fn rounds() -> usize {
    if long_run().is_some() { 200 } else { 20 }
}

#[test]
fn a_kill_in_a_reset_leaves_the_old_or_the_new_by_the_state_folder() {
    kills("reset_state", Memory::State, rounds());
}

#[test]
fn a_kill_in_a_reset_leaves_the_old_or_the_new_by_the_disks_own_list() {
    kills("reset_lists", Memory::Lists, rounds());
}

#[test]
fn a_disk_that_has_grown_is_taken_anew_with_its_new_length() {
    for memory in [Memory::State, Memory::Lists] {
        let mut random = Random::new(seed("reset_grown"));
        let scene = Scene::new(memory, &mut random);
        let server = scene.first_start();
        scene.grow(&server);
        let before = std::fs::metadata(scene.path("vm.img.s.cow")).expect("a store");
        done(&server, &["snapshot", "reset", "vm@s"]);
        let after = std::fs::metadata(scene.path("vm.img.s.cow")).expect("a store");
        assert_ne!(before.ino(), after.ino());
        let grown = contents(&server, "vm");
        assert_eq!(grown.len(), DISK + GROWTH);
        let times = |server: &Server| -> Vec<serde_json::Value> {
            let list = done(server, &["snapshot", "list"]);
            let list = list.as_array().expect("a list").clone();
            list.iter().map(|one| one["taken_at"].clone()).collect()
        };
        let taken = times(&server);
        assert!(taken.iter().all(serde_json::Value::is_u64), "{taken:?}");
        server.kill();
        let server = scene.start_again();
        assert_eq!(times(&server), taken, "{memory:?}: when they were taken");
        assert!(
            contents(&server, "vm@s") == grown,
            "{memory:?}: the snapshot has {} bytes",
            contents(&server, "vm@s").len()
        );
        assert!(contents(&server, "vm@kept") == scene.first, "{memory:?}");
        server.stop();
    }
}
