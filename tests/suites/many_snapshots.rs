//! A hundred and one snapshots of one disk, taken one after the other while the
//! disk is written, each of its instant, then removed one after the other under
//! the same writer; and what an origin write costs with so many.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nbdsnap::client::Client;
use nbdsnap_tests::harness::blocks::{BLOCK, Journal, block_of, numbers_of};
use nbdsnap_tests::harness::files::{folder, sparse_file};
use nbdsnap_tests::harness::live::{attach, contents, done, names};
use nbdsnap_tests::harness::process::wait_until;
use nbdsnap_tests::harness::random::{Random, seed};
use nbdsnap_tests::harness::server::{Serve, Server};

const SNAPSHOTS: usize = 101;
/// Blocks that the writer writes; the figures are measured behind them.
const BLOCKS: usize = 512;
/// Writes that are measured, each to a block of its own.
const MEASURED: usize = 32;

/// Writes block after block, each with the number of the write.
struct Writer {
    stop: Arc<AtomicBool>,
    journal: Arc<Mutex<Journal>>,
    /// Writes that were answered.
    answered: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Writer {
    fn start(mut client: Client, mut random: Random) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let journal = Arc::new(Mutex::new(Journal::default()));
        let answered = Arc::new(AtomicU64::new(0));
        let (stopped, noted, counted) = (
            Arc::clone(&stop),
            Arc::clone(&journal),
            Arc::clone(&answered),
        );
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let block = random.below(BLOCKS as u64) as usize;
                let number = noted.lock().expect("nobody panics").write(block);
                let written = client.write((block * BLOCK) as u64, &block_of(number), false);
                written.expect("a write under a hundred and one snapshots");
                counted.store(number, Ordering::Relaxed);
            }
            client.disconnect().expect("a farewell");
        });
        Self {
            stop,
            journal,
            answered,
            thread,
        }
    }

    fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    fn begun(&self) -> u64 {
        self.journal.lock().expect("nobody panics").len()
    }

    /// Wait until it has gone on.
    fn pass(&self) {
        let now = self.answered();
        wait_until("the writer goes on", || {
            assert!(!self.thread.is_finished(), "the writer has ended");
            self.answered() > now
        });
    }

    /// The instant that a snapshot shows; it must be of one.
    fn instant_of(&self, server: &Server, name: &str) -> u64 {
        let bytes = contents(server, name);
        let shown = numbers_of(&bytes[..BLOCKS * BLOCK]);
        let journal = self.journal.lock().expect("nobody panics");
        let instant = shown.and_then(|shown| journal.instant_of(&shown));
        instant.unwrap_or_else(|error| panic!("{name} is of no instant: {error}"))
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the writer ends well");
    }
}

/// How long each write of the measured blocks takes, in turn: median and longest.
fn measure(client: &mut Client, what: &str) -> Duration {
    let mut took: Vec<Duration> = (0..MEASURED)
        .map(|n| {
            let offset = ((BLOCKS + n) * BLOCK) as u64;
            let begun = Instant::now();
            let written = client.write(offset, &block_of(n as u64), false);
            written.expect("a write that is measured");
            begun.elapsed()
        })
        .collect();
    took.sort_unstable();
    let (median, longest) = (took[MEASURED / 2], took[MEASURED - 1]);
    println!("{what}: median {median:?}, longest {longest:?} of {MEASURED} writes of 4K");
    median
}

#[test]
fn a_hundred_and_one_snapshots_come_and_go_under_a_writer() {
    let mut random = Random::new(seed("many_snapshots"));
    let folder = folder();
    let image = folder.path().join("disk.img");
    sparse_file(&image, ((BLOCKS + MEASURED) * BLOCK) as u64);
    let mut serve = Serve::on_socket_in(folder.path());
    serve.control_in(folder.path()).disk("disk", &image);
    let server = serve.start();
    let writer = Writer::start(attach(&server, "disk"), Random::new(random.bits()));
    let mut taken: Vec<(String, u64)> = Vec::new();
    let begun = Instant::now();
    for n in 0..SNAPSHOTS {
        writer.pass();
        let name = format!("disk@{n}");
        let least = writer.answered();
        let chunk = ["4K", "16K", "64K"][random.below(3) as usize];
        done(&server, &["snapshot", "create", &name, "--chunk", chunk]);
        let most = writer.begun();
        let instant = writer.instant_of(&server, &name);
        assert!(
            (least..=most).contains(&instant),
            "{name} shows write {instant}, and was ordered between {least} and {most}"
        );
        taken.push((name, instant));
    }
    println!(
        "{SNAPSHOTS} snapshots in {:?}, under {} writes",
        begun.elapsed(),
        writer.answered()
    );
    writer.pass();
    for (name, instant) in &taken {
        assert_eq!(
            writer.instant_of(&server, name),
            *instant,
            "{name} has moved"
        );
    }

    // One goes, and another one is looked at.
    let (begun, before) = (Instant::now(), writer.answered());
    let kept = taken.len() / 2;
    for n in 0..SNAPSHOTS - kept {
        let at = random.below(taken.len() as u64) as usize;
        let (name, _) = taken.swap_remove(at);
        writer.pass();
        done(&server, &["snapshot", "remove", &name, "--delete-cow"]);
        let (name, instant) = &taken[n % taken.len()];
        assert_eq!(
            writer.instant_of(&server, name),
            *instant,
            "{name} has moved"
        );
    }
    // The others all at once.
    let mut remove = vec!["snapshot", "remove", "--delete-cow"];
    remove.extend(taken.iter().map(|(name, _)| name.as_str()));
    done(&server, &remove);
    println!(
        "removed in {:?}, under {} writes",
        begun.elapsed(),
        writer.answered() - before
    );
    assert_eq!(names(&done(&server, &["snapshot", "list"])), [""; 0]);
    writer.pass();
    writer.stop();
    server.stop();
    let stores = std::fs::read_dir(folder.path()).expect("a folder").count();
    assert_eq!(stores, 1, "stores are left behind");
}

#[test]
fn what_an_origin_write_costs_with_a_hundred_and_one_snapshots() {
    let folder = folder();
    let image = folder.path().join("disk.img");
    sparse_file(&image, ((BLOCKS + MEASURED) * BLOCK) as u64);
    let mut serve = Serve::on_socket_in(folder.path());
    serve.control_in(folder.path()).disk("disk", &image);
    let server = serve.start();
    let mut client = attach(&server, "disk");
    measure(&mut client, "no snapshot");
    let create = |n: usize| {
        let name = format!("disk@{n}");
        done(&server, &["snapshot", "create", &name, "--chunk", "4K"]);
    };
    create(0);
    measure(&mut client, "1 snapshot, copied on the way");
    measure(&mut client, "1 snapshot, copied before");
    (1..SNAPSHOTS).for_each(create);
    measure(
        &mut client,
        "101 snapshots, copied on the way into 100 of them",
    );
    let copied = measure(&mut client, "101 snapshots, copied before");
    // Where every snapshot has its copy, how many there are must not matter: this
    // is a bound on waiting for a flush, not a figure.
    assert!(copied < Duration::from_millis(20), "{copied:?}");
    let status = done(&server, &["snapshot", "status"]);
    let data = |one: &serde_json::Value| one["data_bytes"].as_u64();
    let all = status.as_array().expect("a list");
    assert_eq!(all.len(), SNAPSHOTS);
    for one in all {
        assert_eq!(data(one), Some((MEASURED * BLOCK) as u64), "{one}");
    }
    server.stop();
}
