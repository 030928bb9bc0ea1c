//! The crash search under mapped devices: many seeds, each a run of dmsetup's orders and
//! traffic with three crashes on disks that may fail, every view compared after each. The
//! same for the rules of durability, broken one at a time: the search must notice.
//!
//! `NBDSNAP_SEED=n` plays one run and prints every step (with `NBDSNAP_MUTANT=name`, of
//! that mutant); `NBDSNAP_RUNS=n` changes how many are played, `NBDSNAP_FIRST=n` where
//! they begin, and `NBDSNAP_LONG=seconds` lets the search go on. With `NBDSNAP_GO_ON` set
//! it does not stop at the first violation, but lists them all.

use std::time::Instant;

use nbdsnap_engine::law::Mutant;
use nbdsnap_tests::harness::random::long_run;
use nbdsnap_tests::simulator::mapped::{self, tally::Ledger};
use nbdsnap_tests::simulator::{Checks, Violation};

/// Runs of the search.
const RUNS: u64 = 3_000;

fn from_environment(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// What a search found.
#[derive(Default)]
struct Search {
    ledger: Ledger,
    images: Vec<u64>,
    violations: Vec<(u64, Violation)>,
}

impl Search {
    fn play(&mut self, checks: Checks, seeds: impl Iterator<Item = u64>) {
        let go_on = std::env::var_os("NBDSNAP_GO_ON").is_some();
        for seed in seeds {
            let report = mapped::run(checks, seed);
            self.ledger.add(&report.ledger);
            self.images.extend(report.images);
            if let Some(violation) = report.violation {
                self.violations.push((seed, violation));
                if !go_on {
                    return;
                }
            }
        }
    }
}

/// Play `runs` from `first` on, on two threads.
fn search(checks: Checks, first: u64, runs: u64) -> Search {
    let half = |k: u64| {
        let mut search = Search::default();
        search.play(checks, (first + k..first + runs).step_by(2));
        search
    };
    let (mut all, other) = std::thread::scope(|scope| {
        let other = scope.spawn(|| half(1));
        let mine = half(0);
        let other = other.join();
        (
            mine,
            other.expect("a run never panics: violations are values"),
        )
    });
    all.ledger.add(&other.ledger);
    all.images.extend(other.images);
    all.images.sort_unstable();
    all.images.dedup();
    all.violations.extend(other.violations);
    all.violations.sort_by_key(|(seed, _)| *seed);
    all
}

/// Play one run and print every step.
fn play_told(seed: u64) {
    let name = std::env::var("NBDSNAP_MUTANT").unwrap_or_else(|_| "None".into());
    let mutant = Mutant::named(&name);
    let mutant = mutant.unwrap_or_else(|| panic!("NBDSNAP_MUTANT={name}: there is none"));
    let report = mapped::run(Checks { mutant, told: true }, seed);
    match report.violation {
        None => println!("seed {seed}: nothing wrong"),
        Some(Violation(text)) => panic!("seed {seed}: {text}"),
    }
}

#[test]
fn crashes_lose_nothing_that_was_promised() {
    if let Some(seed) = from_environment("NBDSNAP_SEED") {
        return play_told(seed);
    }
    let first = from_environment("NBDSNAP_FIRST").unwrap_or(0);
    let asked = from_environment("NBDSNAP_RUNS");
    let runs = asked.unwrap_or(RUNS);
    let start = Instant::now();
    let limit = long_run().unwrap_or_default();
    let mut all = Search::default();
    let mut next = first;
    while next == first || start.elapsed() < limit {
        let found = search(Checks::default(), next, runs);
        for (seed, Violation(text)) in &found.violations {
            println!("seed {seed}: {text}");
        }
        if let Some((seed, Violation(text))) = found.violations.first() {
            panic!(
                "seed {seed}: {text}\n\
                 play it again: NBDSNAP_SEED={seed} cargo test --release -p nbdsnap-tests --test dm_crash crashes_lose -- --nocapture"
            );
        }
        all.ledger.add(&found.ledger);
        all.images.extend(found.images);
        next += runs;
    }
    all.images.sort_unstable();
    all.images.dedup();
    println!(
        "seeds {first} to {}: {} distinct crash images in {:.1?}\n{}",
        next - 1,
        all.images.len(),
        start.elapsed(),
        all.ledger
    );
    if asked.is_none() {
        let never = all.ledger.never();
        assert!(never.is_empty(), "the search never met {never:?}");
    }
}

/// Break a rule; the search must notice, within a bounded number of runs.
fn must_be_found(mutant: Mutant) {
    const MOST: u64 = 20_000;
    let checks = Checks {
        mutant,
        told: false,
    };
    for first in (0..MOST).step_by(100) {
        if let Some((seed, Violation(text))) = search(checks, first, 100).violations.first() {
            println!("{mutant:?}: found after {} runs: {text}", seed + 1);
            return;
        }
    }
    panic!("{mutant:?} was not found in {MOST} runs");
}

macro_rules! mutants {
    ($($name:ident $mutant:ident,)*) => {
        const MUTANTS: &[Mutant] = &[$(Mutant::$mutant,)*];
        $(
            #[test]
            fn $name() {
                must_be_found(Mutant::$mutant);
            }
        )*
    };
}

mutants! {
    mutant_flush_of_a_device_that_goes_nowhere_is_found MappedFlushNotPassedOn,
    mutant_flush_that_forgets_a_failed_one_is_found MappedFlushForgets,
    mutant_loss_without_a_mark_is_found MappedLossUnmarked,
    mutant_join_that_waits_for_nothing_is_found JoinedWithoutDrain,
    mutant_handover_that_waits_for_nothing_is_found HandoverWithoutDrain,
    mutant_one_flush_for_two_is_found OneFlush,
    mutant_origin_write_early_is_found OriginWriteEarly,
    mutant_volatile_taken_for_durable_is_found VolatileTakenForDurable,
    mutant_create_without_flush_is_found CreateWithoutFlush,
    mutant_create_without_drain_is_found CreateWithoutDrain,
    mutant_late_invalidation_is_found InvalidateLate,
    mutant_next_area_not_zeroed_is_found NextAreaNotZeroed,
    mutant_reads_not_drained_is_found ReadsNotDrained,
    mutant_trim_of_the_uncopied_is_found TrimUncopied,
    mutant_flush_that_joins_a_running_one_is_found FlushJoinsRunning,
    mutant_merge_that_commits_early_is_found MergeCommitEarly,
    mutant_merge_that_leaves_siblings_uncopied_is_found MergeSiblingsUncopied,
    mutant_merge_with_an_open_window_is_found MergeWindowOpen,
    mutant_merge_that_overtakes_writes_is_found MergeWritesNotDrained,
    mutant_merge_that_releases_early_is_found MergeReleasedEarly,
    mutant_merge_with_a_flush_of_one_device_is_found MergeFlushOneDevice,
}

#[test]
fn every_mutant_of_mapped_devices_is_searched_for() {
    assert!(Mutant::OF_MAPPED.iter().all(|m| MUTANTS.contains(m)));
}
