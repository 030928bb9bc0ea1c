//! An order that waits for long holds up nobody but those who come to the same
//! volume.

use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::control::protocol::{Disconnect, Resume};

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
        for (order, words) in [
            (Order::VolumeList, "Volumes([])"),
            (Order::Clients, "Clients([])"),
            (
                Order::Disconnect(Disconnect { client: 7 }),
                "no client has the id 7",
            ),
            (resume("b"), "no volume is named"),
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
        answer.send(()).unwrap();
        assert!(soon(same).contains("no volume is named"));
        let (waited, volumes) = waits.join().unwrap();
        waited.unwrap();
        assert_eq!(volumes, 0, "it has the books again");
        letters.send(Letter::Stop).unwrap();
        working.join().unwrap();
    });
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
