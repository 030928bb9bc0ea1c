//! Rollbacks under clients: a disk is merged with one of its snapshots again and
//! again, while two clients write to it, read it, and know what they must see.
//!
//! The rollback has an instant, between the order and its answer, that no client
//! knows. Each keeps what the disk may show: as it was, or as the snapshot with
//! what it wrote since, for every place where the instant may have been. A read
//! that none of them explains is a failure; once the merge is done, one is left.
//!
//! A normal run plays a few rounds; `NBDSNAP_LONG` plays a hundred.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;

use nbdsnap::client::Client;
use nbdsnap_tests::harness::blocks::{BLOCK, block_of, numbers_of};
use nbdsnap_tests::harness::files::{folder, sparse_file};
use nbdsnap_tests::harness::live::{attach, contents, done, names, one_line};
use nbdsnap_tests::harness::process::wait_until;
use nbdsnap_tests::harness::random::{Random, long_run, seed};
use nbdsnap_tests::harness::server::{Serve, Server};

/// Blocks of the disk; each client has a half of it.
const BLOCKS: usize = 2048;
const HALF: usize = BLOCKS / 2;

/// Something that a client is told between two of its requests.
enum Word {
    /// A rollback to this is about to be ordered.
    Expect(Vec<u64>),
    /// It was answered: the disk reads as the snapshot.
    RolledBack,
    /// Nobody rolls the disk back: compare all of it with what is known.
    Settle,
    Stop,
}

/// What a client's half of the disk may show.
struct World {
    shown: Vec<u64>,
    when: When,
}

/// Where a world has the rollback.
#[derive(Clone, Copy, PartialEq, Eq)]
enum When {
    /// Yet to come, if there is to be one.
    Before,
    /// Just now: nothing was written since.
    Now,
    After,
}

struct Modeller {
    client: Client,
    first: usize,
    random: Random,
    /// Numbers are unique over all clients: odd ones for one, even for the other.
    number: u64,
    worlds: Vec<World>,
    /// What the disk is being rolled back to.
    expected: Option<Vec<u64>>,
    /// What it did, for the message of a failure.
    history: Vec<String>,
}

impl Modeller {
    fn step(&mut self) {
        self.branch();
        let block = self.random.below(HALF as u64) as usize;
        let offset = ((self.first + block) * BLOCK) as u64;
        if self.random.one_in(2) {
            self.read(block, offset);
            return;
        }
        self.number += 2;
        let fua = self.random.one_in(16);
        let written = self.client.write(offset, &block_of(self.number), fua);
        written.expect("a write under a rollback");
        self.history
            .push(format!("block {block}: wrote {}", self.number));
        for world in &mut self.worlds {
            world.shown[block] = self.number;
            if world.when == When::Now {
                world.when = When::After;
            }
        }
    }

    /// Between two requests the rollback may come, if it has not.
    fn branch(&mut self) {
        let is_there = |when: When| self.worlds.iter().any(|world| world.when == when);
        if let Some(expected) = &self.expected
            && is_there(When::Before)
            && !is_there(When::Now)
        {
            let (shown, when) = (expected.clone(), When::Now);
            self.worlds.push(World { shown, when });
        }
    }

    fn read(&mut self, block: usize, offset: u64) {
        let bytes = self.client.read(offset, BLOCK as u32);
        let shown = numbers_of(&bytes.expect("a read under a rollback"));
        let shown = shown.unwrap_or_else(|error| panic!("a mixture: {error}"))[0];
        let explained = |world: &World| world.shown[block] == shown;
        if !self.worlds.iter().any(explained) {
            let about = format!("block {block}:");
            let history = self.history.iter();
            let history =
                history.filter(|line| line.starts_with(&about) || !line.starts_with("block"));
            let history: Vec<&str> = history.map(String::as_str).collect();
            panic!(
                "block {block} shows {shown}, which nothing explains that was done and seen:\n{}",
                history.join("\n")
            );
        }
        self.history.push(format!("block {block}: read {shown}"));
        self.worlds.retain(explained);
    }

    fn hear(&mut self, word: &Word) {
        match word {
            Word::Expect(snapshot) => {
                let expected = snapshot[self.first..self.first + HALF].to_vec();
                for (block, number) in expected.iter().enumerate() {
                    let line = format!("block {block}: showed {number} in the snapshot");
                    self.history.push(line);
                }
                self.expected = Some(expected);
                self.history.push("-- a rollback is ordered".into());
            }
            Word::RolledBack => {
                self.branch();
                self.worlds.retain(|world| world.when != When::Before);
                self.expected = None;
                self.history.push("-- it has begun".into());
                assert!(!self.worlds.is_empty(), "a rollback that nobody has seen");
            }
            Word::Settle => self.settle(),
            Word::Stop => {}
        }
    }

    fn settle(&mut self) {
        let len = (HALF * BLOCK) as u32;
        let bytes = self.client.read((self.first * BLOCK) as u64, len);
        let shown = numbers_of(&bytes.expect("the disk can be read"));
        let shown = shown.unwrap_or_else(|error| panic!("a mixture: {error}"));
        let explained = |world: &World| world.shown == shown;
        assert!(
            self.worlds.iter().any(explained),
            "the half from block {} on is not what was rolled back and written since",
            self.first
        );
        self.history.push("-- it is done".into());
        self.worlds = vec![World {
            shown,
            when: When::Before,
        }];
    }

    fn run(mut self, words: &Receiver<Word>, heard: &Sender<()>, steps: &AtomicU64) {
        loop {
            match words.try_recv() {
                Ok(Word::Stop) | Err(TryRecvError::Disconnected) => break,
                Ok(word) => {
                    self.hear(&word);
                    let _ = heard.send(());
                }
                Err(TryRecvError::Empty) => {
                    self.step();
                    steps.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        self.client.disconnect().expect("a farewell");
    }
}

/// A client on a thread of its own.
struct Attached {
    words: Sender<Word>,
    heard: Receiver<()>,
    steps: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Attached {
    fn new(server: &Server, n: usize, random: Random) -> Self {
        let modeller = Modeller {
            client: attach(server, "vm"),
            first: n * HALF,
            random,
            number: n as u64,
            worlds: vec![World {
                shown: vec![0; HALF],
                when: When::Before,
            }],
            expected: None,
            history: Vec::new(),
        };
        let (words, to_hear) = channel();
        let (to_say, heard) = channel();
        let steps = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&steps);
        let thread = std::thread::spawn(move || modeller.run(&to_hear, &to_say, &counted));
        Self {
            words,
            heard,
            steps,
            thread,
        }
    }

    /// Tell it, and wait until it has heard.
    fn tell(&self, word: Word) {
        let heard = self.words.send(word).is_ok() && self.heard.recv().is_ok();
        assert!(heard, "a client has ended: its panic is above");
    }

    fn steps(&self) -> u64 {
        self.steps.load(Ordering::Relaxed)
    }

    /// Wait until it has gone on for a while.
    fn pass(&self, steps: u64) {
        let until = self.steps() + steps;
        wait_until("the client goes on", || {
            assert!(!self.thread.is_finished(), "a client has ended");
            self.steps() >= until
        });
    }

    fn stop(self) {
        let _ = self.words.send(Word::Stop);
        self.thread.join().expect("the client ends well");
    }
}

/// Other orders about a disk that is being merged: those that go together with it
/// are done, a new snapshot is refused until it is over. What was done.
fn meddle(server: &Server, random: &mut Random) -> &'static str {
    match random.below(5) {
        0 => {
            done(server, &["suspend", "vm"]);
            done(server, &["resume", "vm"]);
            "suspended and resumed"
        }
        1 => {
            let extend = ["snapshot", "extend", "vm@sibling", "--size", "64M"];
            done(server, &extend);
            "sibling extended"
        }
        2 => {
            done(server, &["snapshot", "rename", "vm@sibling", "another"]);
            done(server, &["snapshot", "rename", "vm@another", "sibling"]);
            "sibling renamed"
        }
        3 => {
            let created = server.order(["snapshot", "create", "vm@new"]);
            if created.code == Some(0) {
                done(server, &["snapshot", "remove", "vm@new", "--delete-cow"]);
                return "over before the next order";
            }
            let line = one_line(&created, 1);
            assert!(line.contains("vm@then is being merged"), "{line}");
            "new snapshot refused"
        }
        _ => "left alone",
    }
}

#[test]
fn disks_are_rolled_back_under_clients_that_know_what_they_must_see() {
    let mut random = Random::new(seed("live_merges"));
    let folder = folder();
    let image = folder.path().join("vm.img");
    sparse_file(&image, (BLOCKS * BLOCK) as u64);
    let mut serve = Serve::on_socket_in(folder.path());
    serve.control_in(folder.path()).disk("vm", &image);
    let server = serve.start();
    let clients = [0, 1].map(|n| Attached::new(&server, n, Random::new(random.bits())));
    let rounds = if long_run().is_some() { 100 } else { 6 };
    let (mut meanwhile, mut under_way) = (0, 0);
    let mut meddled = BTreeMap::new();
    for round in 0..rounds {
        let chunks = ["4K", "16K", "64K"];
        let chunk = chunks[random.below(3) as usize];
        let pass = |steps| clients.iter().for_each(|client| client.pass(steps));
        pass(random.between(1, 200));
        done(
            &server,
            &["snapshot", "create", "vm@then", "--chunk", chunk],
        );
        let then = contents(&server, "vm@then");
        pass(random.between(1, 400));
        done(&server, &["snapshot", "create", "vm@sibling"]);
        let sibling = contents(&server, "vm@sibling");
        pass(random.between(1, 400));

        let expected = numbers_of(&then).expect("a snapshot of whole blocks");
        for client in &clients {
            client.tell(Word::Expect(expected.clone()));
        }
        let steps = || clients.iter().map(Attached::steps).sum::<u64>();
        let before = steps();
        let merge = ["snapshot", "merge", "vm@then", "--force", "--background"];
        let told = done(&server, &merge);
        under_way += u64::from(!told.as_array().expect("a list").is_empty());
        for client in &clients {
            client.tell(Word::RolledBack);
        }
        *meddled.entry(meddle(&server, &mut random)).or_insert(0) += 1;
        let left = || names(&done(&server, &["snapshot", "list"]));
        wait_until("the merge is done", || left() == ["vm@sibling"]);
        meanwhile += steps() - before;
        for client in &clients {
            client.tell(Word::Settle);
        }
        assert!(
            contents(&server, "vm@sibling") == sibling,
            "round {round}: the sibling has changed"
        );
        let remove = ["snapshot", "remove", "vm@sibling", "--delete-cow"];
        done(&server, &remove);
        std::fs::remove_file(folder.path().join("vm.img.then.cow")).expect("the merged store");
    }
    println!(
        "{rounds} merges, {under_way} of them still under way when the order was answered; \
         the clients had {meanwhile} requests answered while they ran; {meddled:?}"
    );
    assert!(meanwhile > 0, "nobody used the disk while it was merged");
    clients.into_iter().for_each(Attached::stop);
    server.stop();
}
