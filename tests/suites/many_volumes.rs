//! Many volumes that share one read-only base image, each with a snapshot that is
//! written: made in one order or in many at once, all under load together, over
//! restarts and kills, each alone with what it has changed; and the rules for a base
//! that nobody writes.
//!
//! A normal run has a few dozen of them; `NBDSNAP_LONG` has a thousand.

use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use nbdsnap::client::Client;
use nbdsnap_tests::harness::files::{folder, random_file, sha256};
use nbdsnap_tests::harness::live::{attach, contents, done, names, one_line, refused};
use nbdsnap_tests::harness::process::{Running, wait_until};
use nbdsnap_tests::harness::random::{Random, long_run, seed};
use nbdsnap_tests::harness::server::{Serve, Server};

/// Bytes of the base: small, since each model is as large.
const BASE: usize = 256 << 10;
/// Requests of each client in one load.
const REQUESTS: usize = 40;
/// A volume and its snapshot, at rest, may have so much of the server's memory.
const MEMORY_OF_ONE: u64 = 100 << 10;

/// So many volumes in this run.
fn many() -> usize {
    if long_run().is_some() { 1000 } else { 60 }
}

/// A base image, and servers that begin with nothing but what they remember.
struct Place {
    folder: tempfile::TempDir,
    base: Vec<u8>,
    random: Random,
}

impl Place {
    fn new(test: &str) -> Self {
        let mut random = Random::new(seed(test));
        let folder = folder();
        let base = random_file(&folder.path().join("base.img"), BASE, &mut random);
        std::fs::create_dir(folder.path().join("forks")).expect("a folder");
        Self {
            folder,
            base,
            random,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A server that remembers so many volumes with a snapshot each, at least.
    fn serve(&self, volumes: usize) -> Server {
        let mut serve = Serve::on_socket_in(self.folder.path());
        serve.control_in(self.folder.path());
        serve.state(&self.path("state"), 2 * volumes);
        let server = serve.start();
        wait_until("it takes orders", || {
            UnixStream::connect(server.control()).is_ok()
        });
        server
    }

    fn cow(&self, volume: usize) -> PathBuf {
        self.path(&format!("forks/{volume}.cow"))
    }

    /// The words that add these volumes.
    fn addition(&self, volumes: impl IntoIterator<Item = usize>) -> Vec<String> {
        let mut words: Vec<String> = ["volume", "add", "--shared"].map(str::to_owned).into();
        let base = self.path("base.img");
        for volume in volumes {
            words.push(format!("fork{volume}={}", base.display()));
            words.push("--snapshot".into());
            let cow = self.cow(volume);
            words.push(format!("fork{volume}@w={},chunk=4K", cow.display()));
        }
        words
    }

    /// Stores that lie in the folder of the forks, and whatever else does.
    fn files(&self) -> BTreeSet<String> {
        let entries = std::fs::read_dir(self.path("forks")).expect("a folder");
        let name = |entry: std::io::Result<std::fs::DirEntry>| {
            entry.expect("an entry").file_name().into_string().unwrap()
        };
        entries.map(name).collect()
    }
}

fn as_words(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

/// What a writable snapshot holds, and a generator for its client.
struct Model {
    volume: usize,
    bytes: Vec<u8>,
    random: Random,
}

impl Model {
    /// Random requests, each answer compared; the last is a flush.
    fn play(&mut self, client: &mut Client) {
        let Self {
            volume,
            bytes,
            random,
        } = self;
        for _ in 0..REQUESTS {
            let len = random.between(1, 12 << 10) as usize;
            let at = random.below((BASE - len) as u64) as usize;
            if random.one_in(3) {
                let read = client.read(at as u64, len as u32);
                let read = read.unwrap_or_else(|error| panic!("fork{volume}: {error}"));
                assert!(read == bytes[at..at + len], "fork{volume} at {at}, {len}");
            } else {
                let data = random.bytes(len);
                let written = client.write(at as u64, &data, random.one_in(10));
                written.unwrap_or_else(|error| panic!("fork{volume}: {error}"));
                bytes[at..at + len].copy_from_slice(&data);
            }
        }
        client.flush().expect("a flush");
    }
}

/// All at once: every client is attached before the first begins.
fn play_all(server: &Server, models: &mut [Model]) -> Duration {
    let mut clients: Vec<Client> = Vec::new();
    for model in &*models {
        clients.push(attach(server, &format!("fork{}@w", model.volume)));
    }
    let began = Instant::now();
    thread::scope(|scope| {
        for (model, client) in models.iter_mut().zip(&mut clients) {
            let builder = thread::Builder::new().stack_size(256 << 10);
            let started = builder.spawn_scoped(scope, || model.play(client));
            started.expect("a thread for each client");
        }
    });
    let took = began.elapsed();
    for client in clients {
        client.disconnect().expect("a farewell");
    }
    took
}

fn compare_all(server: &Server, models: &[Model], when: &str) {
    for model in models {
        let volume = model.volume;
        let found = contents(server, &format!("fork{volume}@w"));
        assert!(found == model.bytes, "{when}: fork{volume} differs");
    }
}

/// A line of `/proc/PID/status`, as a number.
fn status_of(server: &Server, field: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/status", server.id()));
    let text = text.expect("the server runs");
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    let number = line.and_then(|line| line.trim_start_matches(':').split_whitespace().next());
    number.and_then(|word| word.parse().ok()).expect("a number")
}

#[test]
fn many_volumes_share_a_base_and_nothing_else() {
    let mut place = Place::new("many_volumes_share_a_base");
    let many = many();
    let hash = sha256(&place.path("base.img"));
    let server = place.serve(0);
    // A first one, so that what a server has only once is there.
    done(&server, &as_words(&place.addition([0])));
    let before = status_of(&server, "VmRSS") << 10;
    let began = Instant::now();
    let added = done(&server, &as_words(&place.addition(1..many)));
    let took = began.elapsed();
    let more = (status_of(&server, "VmRSS") << 10).saturating_sub(before);
    let each = more / (many as u64 - 1);
    println!(
        "{} volumes with a snapshot each: {:.0} a second in one order, {each} bytes of memory each",
        many - 1,
        (many - 1) as f64 / took.as_secs_f64()
    );
    assert_eq!(names(&added).len(), many - 1);
    assert!(added.as_array().unwrap().iter().all(|one| {
        one["shared"] == true && one["read_only"] == true && one["snapshots"][0].is_string()
    }));
    assert!(each <= MEMORY_OF_ONE, "{each} bytes of memory for each");

    let mut models: Vec<Model> = (0..many)
        .map(|volume| Model {
            volume,
            bytes: place.base.clone(),
            random: Random::new(place.random.bits()),
        })
        .collect();
    let took = play_all(&server, &mut models);
    println!("{many} clients at once, {REQUESTS} requests each: {took:.1?}");
    let threads = status_of(&server, "Threads");
    println!("{threads} threads");
    assert!(threads < 120, "the server has {threads} threads");
    let mut origin = attach(&server, "fork0");
    let error = origin.write(0, &[1; 512], false).unwrap_err().to_string();
    assert!(error.contains("EPERM"), "{error}");
    origin.disconnect().expect("a farewell");
    assert!(
        contents(&server, "fork1") == place.base,
        "the base as it was"
    );
    compare_all(&server, &models, "after the load");

    server.stop();
    let server = place.serve(many);
    compare_all(&server, &models, "after a restart");
    play_all(&server, &mut models);
    server.kill();
    let server = place.serve(many);
    compare_all(&server, &models, "after a kill");

    remove_all(&server, many);
    assert_eq!(place.files(), BTreeSet::new());
    server.stop();
    assert_eq!(sha256(&place.path("base.img")), hash);
    // Nobody's store is left: it may be written again.
    let mut serve = Serve::on_socket_in(place.folder.path());
    serve.disk("base", &place.path("base.img"));
    serve.start().stop();
}

#[test]
fn orders_that_come_at_once_are_each_done_or_refused() {
    let place = Place::new("orders_that_come_at_once");
    let server = place.serve(0);
    std::fs::write(place.cow(3), b"not a store").expect("a file");
    // The fourth cannot be; and two want the same store.
    let mut commands: Vec<_> = (0..16)
        .map(|volume| server.order_command(place.addition([volume])))
        .collect();
    let clash = place.addition([5]).join(" ").replace("fork5", "clash");
    commands.push(server.order_command(clash.split(' ')));
    let running: Vec<Running> = commands.iter_mut().map(Running::start).collect();
    let ended: Vec<_> = running.into_iter().map(Running::finish).collect();
    for (volume, finished) in ended.iter().enumerate() {
        match volume {
            3 => {
                let line = one_line(finished, 1);
                assert!(line.contains("holds something else"), "{line}");
            }
            5 | 16 => {}
            _ => assert_eq!(finished.code, Some(0), "{finished}"),
        }
    }
    let (first, second) = (&ended[5], &ended[16]);
    let refused = if first.code == Some(0) { second } else { first };
    assert_ne!(first.code, second.code, "{first} {second}");
    let line = one_line(refused, 1);
    assert!(line.contains("5.cow: is the same file as"), "{line}");
    let listed = done(&server, &["volume", "list"]);
    assert_eq!(names(&listed).len(), 15);
    assert_eq!(place.files().len(), 16);
    assert_eq!(std::fs::read(place.cow(3)).unwrap(), b"not a store");
    server.stop();
    place.serve(15).stop();
}

#[test]
fn volumes_of_one_order_are_all_served_or_none() {
    let place = Place::new("volumes_of_one_order");
    let server = place.serve(0);
    let before = std::fs::read_dir(place.folder.path()).unwrap().count();
    std::fs::write(place.cow(7), b"not a store").expect("a file");
    let line = refused(&server, &as_words(&place.addition(0..10)));
    assert!(line.contains("7.cow: holds something else"), "{line}");
    let mut twice = place.addition([0, 1]);
    twice.push(format!("fork0={}", place.path("base.img").display()));
    let line = refused(&server, &as_words(&twice));
    assert!(line.contains("fork0 is named twice"), "{line}");
    assert_eq!(names(&done(&server, &["volume", "list"])).len(), 0);
    assert_eq!(place.files(), BTreeSet::from(["7.cow".to_owned()]));
    let after = std::fs::read_dir(place.folder.path()).unwrap().count();
    assert_eq!(before, after, "no list, and no other file");
    server.stop();
}

/// End all forks, with their stores.
fn remove_all(server: &Server, many: usize) {
    let forks: Vec<String> = (0..many).map(|one| format!("fork{one}@w")).collect();
    let mut words = vec!["snapshot", "remove", "--delete-cow"];
    words.extend(forks.iter().map(String::as_str));
    done(server, &words);
    let forks: Vec<String> = (0..many).map(|one| format!("fork{one}")).collect();
    let mut words = vec!["volume", "remove"];
    words.extend(forks.iter().map(String::as_str));
    done(server, &words);
}

#[test]
fn a_kill_leaves_all_volumes_of_an_order_or_none() {
    let mut place = Place::new("a_kill_in_the_middle");
    let many = 40;
    let rounds = if long_run().is_some() { 60 } else { 8 };
    let server = place.serve(0);
    let began = Instant::now();
    done(&server, &as_words(&place.addition(0..many)));
    let took = began.elapsed().as_micros() as u64;
    remove_all(&server, many);
    server.stop();
    let (mut none, mut all) = (0, 0);
    for _ in 0..rounds {
        let server = place.serve(0);
        let order = Running::start(&mut server.order_command(place.addition(0..many)));
        let moment = Duration::from_micros(place.random.below(took * 5 / 4));
        thread::sleep(moment);
        server.kill();
        let finished = order.finish();
        let server = place.serve(0);
        let served = names(&done(&server, &["volume", "list"])).len();
        assert!(
            served == 0 || served == many,
            "{served} of {many} after {moment:?}"
        );
        assert!(
            finished.code != Some(0) || served == many,
            "what was done is there"
        );
        let stores: BTreeSet<String> = (0..served).map(|one| format!("{one}.cow")).collect();
        assert_eq!(place.files(), stores, "after {moment:?}");
        let list = place.path("base.img.nbdsnap");
        assert_eq!(list.exists(), served > 0, "after {moment:?}");
        if served == 0 {
            none += 1;
        } else {
            all += 1;
            remove_all(&server, many);
        }
        server.stop();
    }
    println!("{none} times none, {all} times all of them");
}

#[test]
fn a_base_that_nobody_writes_is_not_written_later_without_its_stores() {
    let place = Place::new("a_base_that_nobody_writes");
    let base = place.path("base.img");
    let server = place.serve(0);
    done(&server, &as_words(&place.addition(0..3)));
    // As long as it is shared nobody writes it, and who shares it is welcome.
    let elsewhere = folder();
    let mut writer = Serve::on_socket_in(elsewhere.path());
    writer.disk("base", &base);
    let line = one_line(&writer.run_to_end(), 1);
    assert!(line.contains("is already open"), "{line}");
    let line = refused(&server, &["volume", "add", base.to_str().unwrap()]);
    assert!(line.contains("is the same file as"), "{line}");
    let mut sharer = Serve::on_socket_in(elsewhere.path());
    sharer.arg("--shared").disk("mine", &base);
    sharer.snapshot("mine@w", &elsewhere.path().join("mine.cow"), "");
    let other = sharer.start();
    let mut client = attach(&other, "mine@w");
    client.write(0, b"theirs", true).expect("a write");
    client.disconnect().expect("a farewell");
    other.stop();
    // What nobody writes is not merged; a snapshot of it can be taken anew.
    let line = refused(&server, &["snapshot", "merge", "fork0@w"]);
    assert!(
        line.contains("fork0@w cannot be merged: its disk is shared"),
        "{line}"
    );
    let mut client = attach(&server, "fork1@w");
    client.write(0, b"ours", true).expect("a write");
    client.disconnect().expect("a farewell");
    done(&server, &["snapshot", "create", "fork0@more", "fork1@more"]);
    assert!(place.path("base.img.fork1.more.cow").exists());
    assert!(contents(&server, "fork1@more") == place.base);
    done(&server, &["snapshot", "reset", "fork1@w"]);
    assert!(contents(&server, "fork1@w") == place.base);
    // A volume that leaves has its stores stay on the list.
    done(&server, &["volume", "remove", "fork2"]);
    server.stop();

    let line = one_line(&writer.run_to_end(), 1);
    assert!(line.contains("is not served with it"), "{line}");
    // Read-only and shared it is served without them, and the list stays.
    let mut sharer = Serve::on_socket_in(elsewhere.path());
    sharer.arg("--shared").disk("a", &base).disk("b", &base);
    sharer.start().stop();
    let line = one_line(&writer.run_to_end(), 1);
    assert!(line.contains("is not served with it"), "{line}");
    // With all of them it can be written, and none is wrong.
    let mut all = writer.clone();
    all.snapshot("base@0", &place.cow(0), "");
    all.snapshot("base@1", &place.cow(1), "");
    all.snapshot("base@2", &place.cow(2), "");
    all.snapshot("base@3", &place.path("base.img.fork0.more.cow"), "");
    all.snapshot("base@4", &place.path("base.img.fork1.more.cow"), "");
    let line = one_line(&all.run_to_end(), 1);
    assert!(line.contains("mine.cow"), "{line}");
    all.snapshot("base@5", &elsewhere.path().join("mine.cow"), "");
    let server = all.start();
    let mut client = attach(&server, "base");
    client.write(0, &[9; 4096], true).expect("a write");
    client.disconnect().expect("a farewell");
    for one in 0..5 {
        let found = contents(&server, &format!("base@{one}"));
        assert!(found == place.base, "base@{one}");
    }
    let mut mine = place.base.clone();
    mine[..6].copy_from_slice(b"theirs");
    assert!(contents(&server, "base@5") == mine);
    server.stop();
}
