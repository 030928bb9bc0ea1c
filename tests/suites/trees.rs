//! Snapshots of snapshots through sockets: a disk with up to forty, eight deep, that
//! come and go, are merged and removed while all of them are written, by a server that
//! is ended and killed in between; every node always is what its model says.
//!
//! And what is refused, by name; one instant over several levels; and that stores come
//! back only upon what they were taken of.

#[path = "random_views/batch.rs"]
mod batch;
#[path = "trees/forest.rs"]
mod forest;
#[path = "trees/instants.rs"]
mod instants;
#[path = "trees/merges.rs"]
mod merges;
#[path = "trees/refusals.rs"]
mod refusals;
#[path = "random_views/view.rs"]
mod view;

use std::time::{Duration, Instant};

use nbdsnap_tests::harness::random::{Random, long_run, seed};

use forest::{Forest, Size};

/// In every run of the tests.
const SMALL: Size = Size {
    nodes: 14,
    depth: 5,
    rounds: 18,
    requests: 60,
};

/// With `NBDSNAP_LONG`.
const FULL: Size = Size {
    nodes: 40,
    depth: 8,
    rounds: 90,
    requests: 200,
};

#[test]
fn every_node_of_a_tree_is_what_its_model_says() {
    let Some(limit) = long_run() else {
        let seed = seed("trees");
        Forest::play(SMALL, seed).insist_on_everything(SMALL);
        return;
    };
    let begun = Instant::now();
    let mut more = Random::new(seed("trees"));
    loop {
        let seed = more.bits();
        println!("trees: seed {seed} (again with NBDSNAP_SEED={seed})");
        let tally = Forest::play(FULL, seed);
        println!("{tally:?}");
        tally.insist_on_everything(FULL);
        if begun.elapsed() >= limit.max(Duration::from_secs(1)) {
            return;
        }
    }
}
