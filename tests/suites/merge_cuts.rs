//! Merges under clients' I/O, with the power failing after every disk operation
//! in turn: small volumes, each played as often as it has operations, several
//! times for what a power cut may leave. Afterwards the merge goes on to its end,
//! and every view is compared with the model all along.
//!
//! `NBDSNAP_SEED=n NBDSNAP_CUT=k NBDSNAP_SALT=s` plays one of them and prints every step.

use nbdsnap_tests::simulator::ledger::Ledger;
use nbdsnap_tests::simulator::{Checks, Cut, Violation};

/// Volumes.
const SEEDS: u64 = 60;

/// What a power cut may leave is chosen this often at each place.
const SALTS: u64 = 4;

fn from_environment(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().expect("a number"))
}

/// Play one volume at every place: how many there were.
fn every_place(seed: u64, ledger: &mut Ledger) -> u64 {
    for after in 1.. {
        for salt in 0..SALTS {
            let cut = Cut { seed, after, salt };
            let report = Checks::default().cut_merge(cut);
            ledger.add(&report.ledger);
            if let Some(Violation(text)) = report.violation {
                panic!(
                    "{cut:?}: {text}\nplay it again: NBDSNAP_SEED={seed} NBDSNAP_CUT={after} NBDSNAP_SALT={salt} \
                     cargo test --release -p nbdsnap-tests --test merge_cuts -- --nocapture"
                );
            }
            if report.images.is_empty() {
                // The merge has ended before so many operations.
                return after - 1;
            }
        }
    }
    unreachable!("a merge ends")
}

#[test]
fn the_power_fails_after_every_operation_of_small_merges() {
    if let Some(seed) = from_environment("NBDSNAP_SEED") {
        let cut = Cut {
            seed,
            after: from_environment("NBDSNAP_CUT").unwrap_or(1),
            salt: from_environment("NBDSNAP_SALT").unwrap_or(0),
        };
        let told = Checks {
            told: true,
            ..Checks::default()
        };
        assert_eq!(told.cut_merge(cut).violation, None);
        return;
    }
    let places: Vec<(u64, Ledger)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2)
            .map(|k| {
                scope.spawn(move || {
                    let mut ledger = Ledger::default();
                    let places = (k..SEEDS).step_by(2);
                    let sum = places.map(|seed| every_place(seed, &mut ledger)).sum();
                    (sum, ledger)
                })
            })
            .collect();
        let ends = threads.into_iter().map(|thread| match thread.join() {
            Ok(end) => end,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        ends.collect()
    });
    let mut ledger = Ledger::default();
    let mut sum = 0;
    for (places, part) in places {
        sum += places;
        ledger.add(&part);
    }
    println!("{SEEDS} volumes, {sum} places for a power cut, {SALTS} cuts at each");
    println!("{ledger}");
    assert!(sum > 20 * SEEDS, "{sum} places are too few");
}
