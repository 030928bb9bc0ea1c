//! Snapshots under traffic, again and again: fio verifies its own writes on two
//! connections while snapshots are taken, read and removed; and snapshots of
//! several volumes, and of mapped devices among them, are of one instant.
//!
//! A normal run plays a few rounds; `NBDSNAP_LONG` plays a hundred.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use nbdsnap::client::Client;
use nbdsnap_tests::harness::files::{folder, random_file, sparse_file};
use nbdsnap_tests::harness::fio::Job;
use nbdsnap_tests::harness::live::{attach, contents, done};
use nbdsnap_tests::harness::process::{Running, wait_until};
use nbdsnap_tests::harness::random::{Random, long_run, seed};
use nbdsnap_tests::harness::server::{Serve, Server};

const MIB: u64 = 1 << 20;

fn rounds(normal: u64) -> u64 {
    if long_run().is_some() { 100 } else { normal }
}

/// The first half of the disk is fio's, the rest holds still: what a snapshot shows
/// of it is known.
const FIO_BYTES: u64 = 16 * MIB;

#[test]
fn snapshots_come_and_go_under_fio_on_two_connections() {
    let folder = folder();
    let image = folder.path().join("disk.img");
    let mut random = Random::new(seed("under_fio"));
    let still =
        random_file(&image, 2 * FIO_BYTES as usize, &mut random).split_off(FIO_BYTES as usize);
    let mut serve = Serve::on_socket_in(folder.path());
    serve.control_in(folder.path()).disk("disk", &image);
    let server = serve.start();
    let mut taken = 0;
    for round in 0..rounds(3) {
        let half = FIO_BYTES / 2;
        let mut jobs = [0, half].map(|offset| {
            let mut job = Job::new(&server.uri("disk"), offset, half);
            // Another order and other contents each time.
            job.more.push(format!("--randseed={}", 1 + round));
            let tree = folder.path().join(format!("fio-{offset}"));
            std::fs::create_dir_all(&tree).expect("a folder");
            (job, tree)
        });
        let mut running = jobs.each_mut().map(|(job, tree)| {
            job.more.push("--rate_iops=2000".into());
            Running::start(&mut job.command(tree, &["--do_verify=0"]))
        });
        while running.iter_mut().any(Running::is_running) {
            take_look_at_and_remove(&server, &mut random, &still);
            taken += 1;
        }
        for (done, (job, tree)) in running.into_iter().zip(&jobs) {
            let done = done.finish().ok();
            let written = &done.json()["jobs"][0]["write"]["io_bytes"];
            assert_eq!(*written, job.size, "round {round}: {done}");
            job.verify(tree);
        }
    }
    println!("{taken} snapshots were taken under fio");
    assert!(taken >= rounds(3), "none was taken while fio wrote");
    server.stop();
}

/// A snapshot that is of one instant: two readings of it are the same, and what
/// nobody writes to is what it was.
fn take_look_at_and_remove(server: &Server, random: &mut Random, still: &[u8]) {
    let chunk = ["4K", "16K", "64K"][random.below(3) as usize];
    done(
        server,
        &["snapshot", "create", "disk@now", "--chunk", chunk],
    );
    let first = contents(server, "disk@now");
    assert!(
        first[FIO_BYTES as usize..] == *still,
        "what nobody wrote has changed"
    );
    let second = contents(server, "disk@now");
    assert!(first == second, "a snapshot changes under its readers");
    done(server, &["snapshot", "remove", "disk@now", "--delete-cow"]);
}

const DISKS: [&str; 3] = ["a", "b", "c"];

/// Puts an increasing number on each of three disks in turn: at no instant does a
/// disk have a larger number than the one before it in that order, nor one that is
/// smaller by more than one.
struct Counter {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Counter {
    fn start(server: &Server) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let count = Arc::new(AtomicU64::new(0));
        let mut clients: Vec<Client> = DISKS.iter().map(|disk| attach(server, disk)).collect();
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&count));
        let thread = std::thread::spawn(move || {
            let mut number = 0u64;
            while !stopped.load(Ordering::Relaxed) {
                number += 1;
                for client in &mut clients {
                    let written = client.write(0, &number.to_le_bytes(), false);
                    written.expect("a write under snapshots");
                }
                counted.store(number, Ordering::Relaxed);
            }
        });
        Self {
            stop,
            count,
            thread,
        }
    }

    /// Wait until it has gone on from where it is now.
    fn pass(&self) {
        let now = self.count.load(Ordering::Relaxed);
        wait_until("the writer goes on", || {
            self.count.load(Ordering::Relaxed) > now + 1
        });
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the writer ends well");
    }
}

fn serve_three(folder: &Path) -> Server {
    three_disks(folder).start()
}

fn three_disks(folder: &Path) -> Serve {
    let mut serve = Serve::on_socket_in(folder);
    serve.control_in(folder).arg("--threads").arg("3");
    for disk in DISKS {
        let image = folder.join(format!("{disk}.img"));
        sparse_file(&image, MIB + DIRT as u64);
        serve.disk(disk, &image);
    }
    serve
}

/// The first and the last are mapped devices, through one of which a writer comes from
/// above.
fn map_two(mut serve: Serve, folder: &Path) -> Server {
    let image = |disk| folder.join(format!("{disk}.img"));
    for disk in DISKS {
        sparse_file(&image(disk), MIB + DIRT as u64);
    }
    serve.control_in(folder).arg("--threads").arg("3");
    serve.disk("b", &image("b"));
    let server = serve.start();
    let sectors = (MIB + DIRT as u64) / 512;
    let map = |name: &str, table: &str| {
        let table = format!("0 {sectors} {table}");
        let dm = server.order(["dm", "create", name, "--table", &table]);
        assert_eq!(dm.ok().text(), "");
    };
    map("a", &format!("linear {} 0", image("a").display()));
    map("below", &format!("linear {} 0", image("c").display()));
    map("c", "snapshot-origin /dev/mapper/below");
    server
}

/// Bytes behind the number that are written before each group.
const DIRT: usize = 2 << 20;

/// Give the flush of each disk something to do, so that an instant takes a while.
fn make_dirty(server: &Server) {
    for disk in DISKS {
        let mut client = attach(server, disk);
        let written = client.write(MIB, &vec![1; DIRT], false);
        written.expect("a write under snapshots");
        client.disconnect().expect("a farewell");
    }
}

/// The numbers that the snapshots called `name` show.
fn numbers(server: &Server, name: &str) -> [u64; 3] {
    DISKS.map(|disk| {
        let mut client = attach(server, &format!("{disk}@{name}"));
        let bytes = client.read(0, 8).expect("a snapshot can be read");
        u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
    })
}

fn is_one_instant([a, b, c]: [u64; 3]) -> bool {
    a >= b && b >= c && a <= c + 1
}

/// Take a group while the writer goes on, look at it, and remove it. The copies of
/// a transient one cost the writer next to nothing: it gets far while anything
/// else is done, and an instant that is none shows.
fn numbers_of_a_group(server: &Server, writer: &Counter, is_transient: bool) -> [u64; 3] {
    let names = ["c@now", "a@now", "b@now"];
    make_dirty(server);
    writer.pass();
    let mut create = vec!["snapshot", "create", "--chunk", "4K"];
    create.extend(is_transient.then_some("--transient"));
    create.extend(names);
    done(server, &create);
    let shown = numbers(server, "now");
    let mut remove = vec!["snapshot", "remove", "--delete-cow"];
    remove.extend(names);
    done(server, &remove);
    shown
}

/// Groups that a normal run takes.
const GROUPS: u64 = 20;

#[test]
fn snapshots_of_several_volumes_are_of_one_instant() {
    let folder = folder();
    let server = serve_three(folder.path());
    let writer = Counter::start(&server);
    let rounds = rounds(GROUPS);
    for round in 0..rounds {
        let shown = numbers_of_a_group(&server, &writer, round % 2 == 0);
        assert!(is_one_instant(shown), "round {round}: {shown:?}");
    }
    println!("{rounds} groups, each of one instant");
    writer.stop();
    server.stop();
}

/// The test above can fail: it notices a server that holds one volume at a time,
/// within the rounds of a normal run.
#[test]
fn mutant_that_holds_one_volume_at_a_time_is_found() {
    let folder = folder();
    let server = three_disks(folder.path())
        .mutant_named("GroupOneByOne")
        .start();
    let writer = Counter::start(&server);
    let found = (1..=GROUPS).find_map(|round| {
        let shown = numbers_of_a_group(&server, &writer, true);
        (!is_one_instant(shown)).then_some((round, shown))
    });
    let (round, shown) = found.expect("a group that is not of one instant");
    println!("GroupOneByOne: found in round {round}: {shown:?}");
    writer.stop();
    server.stop();
}

#[test]
fn mapped_devices_and_volumes_are_one_instant_too() {
    let folder = folder();
    let server = map_two(Serve::on_socket_in(folder.path()), folder.path());
    let writer = Counter::start(&server);
    let rounds = rounds(GROUPS);
    for round in 0..rounds {
        let shown = numbers_of_a_group(&server, &writer, round % 2 == 0);
        assert!(is_one_instant(shown), "round {round}: {shown:?}");
    }
    println!("{rounds} groups, each of one instant");
    writer.stop();
    server.stop();
}

#[test]
fn mutant_that_holds_no_mapped_device_is_found() {
    let folder = folder();
    let mut serve = Serve::on_socket_in(folder.path());
    serve.mutant_named("GroupOneByOne");
    let server = map_two(serve, folder.path());
    let writer = Counter::start(&server);
    let found = (1..=GROUPS).find_map(|round| {
        let shown = numbers_of_a_group(&server, &writer, true);
        (!is_one_instant(shown)).then_some((round, shown))
    });
    let (round, shown) = found.expect("a group that is not of one instant");
    println!("GroupOneByOne: found in round {round}: {shown:?}");
    writer.stop();
    server.stop();
}

/// Nor are orders that come one after the other.
#[test]
fn one_order_after_the_other_is_not_one_instant() {
    let folder = folder();
    let server = serve_three(folder.path());
    let writer = Counter::start(&server);
    for name in ["c@now", "a@now", "b@now"] {
        writer.pass();
        done(&server, &["snapshot", "create", "--chunk", "4K", name]);
    }
    let shown = numbers(&server, "now");
    assert!(!is_one_instant(shown), "{shown:?}");
    writer.stop();
    server.stop();
}

#[test]
fn of_a_group_that_cannot_be_taken_none_is() {
    let folder = folder();
    let server = serve_three(folder.path());
    let writer = Counter::start(&server);
    writer.pass();
    // The store of the last one cannot be made: its place is taken.
    std::fs::write(folder.path().join("c.img.now.cow"), b"precious").expect("a file");
    let create = ["snapshot", "create", "a@now", "b@now", "c@now"];
    let line = nbdsnap_tests::harness::live::refused(&server, &create);
    assert!(line.contains("c.img.now.cow"), "{line}");
    for disk in ["a", "b"] {
        let cow = folder.path().join(format!("{disk}.img.now.cow"));
        assert!(!cow.exists(), "{} is left behind", cow.display());
    }
    assert_eq!(
        std::fs::read(folder.path().join("c.img.now.cow")).expect("it is still there"),
        b"precious"
    );
    writer.pass();
    assert_eq!(done(&server, &["snapshot", "list"]), serde_json::json!([]));
    writer.stop();
    server.stop();
}
