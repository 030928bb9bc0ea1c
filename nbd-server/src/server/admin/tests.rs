//! An order that waits for long holds up nobody but those who come to the same
//! volume.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::control::protocol::{Disconnect, Resume, VolumeAdd, VolumesAdd, VolumesRemove};

/// What is waited for comes within this time; a wait that should not end goes on for
/// longer than a moment.
const SOON: Duration = Duration::from_secs(20);

#[derive(Debug)]
struct Deaf;

impl Herald for Deaf {
    fn tell(&self, _: News) {}

    fn mark_lost(&self, _: Loss) {}
}

/// An administrator of nothing.
fn administrator() -> Administrator {
    let shards = vec![Shard::start(0, Arc::new(Deaf)).unwrap()];
    let outfit = Outfit {
        taken: Taken::default(),
        defaults: Defaults::default(),
    };
    let (directory, events) = (Arc::default(), Arc::default());
    Administrator::new(
        Registry::default(),
        outfit,
        directory,
        Arc::new(shards),
        events,
        Mailroom::default(),
    )
}

fn resume(volume: &str) -> Order {
    Order::Resume(Resume {
        volumes: vec![volume.into()],
    })
}

fn addition(name: &str, folder: &Path) -> VolumeAdd {
    VolumeAdd {
        name: name.into(),
        disk: folder.join(name),
        read_only: false,
        shared: false,
        snapshots: Vec::new(),
        without: Vec::new(),
    }
}

fn add(names: &[&str]) -> Order {
    let volumes = names.iter();
    let volumes = volumes.map(|name| addition(name, Path::new("/nowhere")));
    Order::VolumesAdd(VolumesAdd {
        volumes: volumes.collect(),
    })
}

fn remove(names: &[&str]) -> Order {
    Order::VolumesRemove(VolumesRemove {
        names: names.iter().map(|&name| name.to_owned()).collect(),
        force: false,
    })
}

#[test]
fn an_order_that_waits_lets_the_others_pass() {
    let mailroom = Mailroom::default();
    let letters = mailroom.letters.clone();
    let records = Keeper::open(SystemFiles, None).unwrap();
    let shared = Shared::new(administrator(), records);
    std::thread::scope(|threads| {
        let (answer, asked) = channel::<()>();
        let (begun, has_begun) = channel();
        let shared = &shared;
        let waits = threads.spawn(move || {
            let mut turn = shared.turn(Scope::volume("a")).unwrap();
            begun.send(()).unwrap();
            let waited = turn.wait(0, &asked, Some(Instant::now() + 10 * SOON));
            (waited, turn.registry.volumes.len())
        });
        has_begun.recv().unwrap();
        let working = threads.spawn(move || {
            std::thread::scope(|threads| work(shared, &mailroom, threads));
        });
        let submit = |order| {
            let (sender, outcome) = oneshot::channel();
            letters.send(Letter::Order(order, sender)).unwrap();
            outcome
        };
        let same = submit(resume("a"));
        let mut added = submit(add(&["a", "z"]));
        for (order, words) in [
            (Order::VolumeList, "Volumes([])"),
            (Order::Clients, "Clients([])"),
            (
                Order::Disconnect(Disconnect { client: 7 }),
                "no client has the id 7",
            ),
            (resume("b"), "no volume is named"),
            (add(&["b"]), "/nowhere/b"),
            (add(&["b", "c"]), "/nowhere/b"),
            (remove(&["b", "c"]), "no volume is named"),
        ] {
            let outcome = soon(submit(order));
            assert!(outcome.contains(words), "{outcome}");
        }
        assert!(!waits.is_finished());
        let mut same = same;
        assert!(
            same.try_recv().is_err(),
            "an order on the same volume waits"
        );
        assert!(added.try_recv().is_err(), "and so does one that adds it");
        answer.send(()).unwrap();
        assert!(soon(same).contains("no volume is named"));
        assert!(soon(added).contains("/nowhere/a"));
        let (waited, volumes) = waits.join().unwrap();
        waited.unwrap();
        assert_eq!(volumes, 0, "it has the books again");
        letters.send(Letter::Stop).unwrap();
        working.join().unwrap();
    });
}

/// Whoever's turn it is first adds what all ask for who wait; one that cannot be
/// takes none of the others along.
#[test]
fn additions_that_wait_together_are_each_done_or_refused() {
    let names = ["a", "b", "c", "d", "e"];
    for missing in [None, Some("d")] {
        let folder = tempfile::tempdir().unwrap();
        let there = names.into_iter().filter(|&name| missing != Some(name));
        let there: Vec<&str> = there.collect();
        for name in &there {
            std::fs::write(folder.path().join(name), [1; 4096]).unwrap();
        }
        let records = Keeper::open(SystemFiles, None).unwrap();
        let shared = Shared::new(administrator(), records);
        std::thread::scope(|threads| {
            let gate = shared.additions.gate();
            let mut outcomes = Vec::new();
            for (place, name) in names.into_iter().enumerate() {
                let (sender, outcome) = oneshot::channel();
                let (shared, volumes) = (&shared, vec![addition(name, folder.path())]);
                threads.spawn(move || shared.add(Scope::volume(name), volumes, sender));
                while shared.additions.waiting().len() <= place {
                    std::thread::yield_now();
                }
                outcomes.push(outcome);
            }
            drop(gate);
            for (name, outcome) in names.into_iter().zip(outcomes) {
                let wanted = if there.contains(&name) {
                    "Done"
                } else {
                    "Refused"
                };
                let outcome = soon(outcome);
                assert!(outcome.contains(wanted), "{name}: {outcome}");
            }
        });
        let state = shared.records().state().clone();
        let books = shared.into_books();
        let served = books.registry.volumes.iter();
        let served: Vec<&str> = served.map(|volume| volume.name.as_str()).collect();
        assert_eq!(served, there);
        assert_eq!(state.by_name().into_keys().collect::<Vec<_>>(), there);
    }
}

/// What an order brings.
fn soon(outcome: oneshot::Receiver<Outcome>) -> String {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    let outcome = runtime.block_on(async { tokio::time::timeout(SOON, outcome).await });
    format!("{:?}", outcome.expect("it waits behind another order"))
}
