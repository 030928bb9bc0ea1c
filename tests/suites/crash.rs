//! The crash search: many seeds, each a run of traffic with three crashes on
//! simulated disks, each image opened again and every view compared.
//!
//! `NBDSNAP_SEED=n` plays one run and prints every step (with `NBDSNAP_MUTANT=OneFlush`,
//! of that mutant); `NBDSNAP_RUNS=n` changes how many are played, `NBDSNAP_FIRST=n`
//! where they begin; with `NBDSNAP_GO_ON` set the search does not stop at the first
//! violation, but lists them all.

use std::time::Instant;

use nbdsnap_engine::law::Mutant;
use nbdsnap_tests::harness::random::long_run;
use nbdsnap_tests::simulator::ledger::Ledger;
use nbdsnap_tests::simulator::{Checks, Violation};

/// Runs of the search. A run leaves two images or three (a kill leaves none), nearly all of them distinct.
const RUNS: u64 = 52_000;

/// Crash images that the search must look at, at least.
const IMAGES: usize = 100_000;

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is no number"))
    })
}

/// What a search found.
#[derive(Default)]
struct Search {
    ledger: Ledger,
    images: Vec<u64>,
    violation: Option<(u64, Violation)>,
    /// All violations, where the search is told to go on.
    all: Vec<(u64, Violation)>,
}

/// Play `seeds` on one thread, until a violation.
fn search_alone(checks: Checks, seeds: impl Iterator<Item = u64>) -> Search {
    let mut search = Search::default();
    let go_on = std::env::var_os("NBDSNAP_GO_ON").is_some();
    for seed in seeds {
        let report = checks.run(seed);
        search.ledger.add(&report.ledger);
        search.images.extend(report.images);
        if let Some(violation) = report.violation {
            if go_on {
                search.all.push((seed, violation));
                continue;
            }
            search.violation = Some((seed, violation));
            break;
        }
    }
    search
}

/// Play runs from `first` on two threads.
fn search(checks: Checks, first: u64, runs: u64) -> Search {
    let mut parts: Vec<Search> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2)
            .map(|k| {
                scope.spawn(move || search_alone(checks, (first + k..first + runs).step_by(2)))
            })
            .collect();
        threads
            .into_iter()
            .map(|t| t.join().expect("a run never panics: violations are values"))
            .collect()
    });
    let mut all = Search::default();
    for part in &mut parts {
        all.ledger.add(&part.ledger);
        all.images.append(&mut part.images);
        all.all.append(&mut part.all);
        let earlier = match (&all.violation, &part.violation) {
            (_, None) => false,
            (None, Some(_)) => true,
            (Some((mine, _)), Some((theirs, _))) => theirs < mine,
        };
        if earlier {
            all.violation = part.violation.take();
        }
    }
    all.images.sort_unstable();
    all.images.dedup();
    all
}

/// Play one run and print every step: of the engine, or of the mutant that `NBDSNAP_MUTANT` names.
fn play_told(seed: u64) {
    let name = std::env::var("NBDSNAP_MUTANT").unwrap_or_else(|_| "None".into());
    let mutant = Mutant::named(&name);
    let mutant =
        mutant.unwrap_or_else(|| panic!("NBDSNAP_MUTANT={name}: there is none of that name"));
    let report = Checks { mutant, told: true }.run(seed);
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
    let found = search(Checks::default(), first, runs);
    println!(
        "seeds {first} to {}: {} distinct crash images in {:.1?}",
        first + runs - 1,
        found.images.len(),
        start.elapsed()
    );
    println!("{}", found.ledger);
    expect_clean(&found);
    if asked.is_none() {
        assert!(
            found.images.len() >= IMAGES,
            "{} distinct images are too few",
            found.images.len()
        );
        assert_eq!(
            found.ledger.never(),
            Vec::<&str>::new(),
            "the search never met these"
        );
    }
    let limit = long_run().unwrap_or_default();
    let mut next = first + runs;
    while start.elapsed() < limit {
        let found = search(Checks::default(), next, RUNS);
        println!(
            "seeds {next} to {}: {} distinct crash images, {:.1?} since the beginning",
            next + RUNS - 1,
            found.images.len(),
            start.elapsed()
        );
        expect_clean(&found);
        next += RUNS;
    }
}

fn expect_clean(found: &Search) {
    for (seed, Violation(text)) in &found.all {
        println!("seed {seed}: {text}");
    }
    assert!(found.all.is_empty(), "{} violations", found.all.len());
    if let Some((seed, Violation(text))) = &found.violation {
        panic!(
            "seed {seed}: {text}\n\
             play it again: NBDSNAP_SEED={seed} cargo test --release -p nbdsnap-tests --test crash crashes_lose -- --nocapture"
        );
    }
}

/// Break a rule; the search must notice, within a bounded number of runs.
fn must_be_found(mutant: Mutant) {
    const MOST: u64 = 40_000;
    let checks = Checks {
        mutant,
        told: false,
    };
    let mut seed = 0;
    while seed < MOST {
        let found = search(checks, seed, 500);
        if let Some((seed, Violation(text))) = found.violation {
            println!("{mutant:?}: found after {} runs: {text}", seed + 1);
            return;
        }
        seed += 500;
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
    mutant_one_flush_for_two_is_found OneFlush,
    mutant_no_scrub_is_found NoScrub,
    mutant_origin_write_early_is_found OriginWriteEarly,
    mutant_volatile_taken_for_durable_is_found VolatileTakenForDurable,
    mutant_write_now_on_volatile_is_found WriteNowOnVolatile,
    mutant_create_without_flush_is_found CreateWithoutFlush,
    mutant_create_without_drain_is_found CreateWithoutDrain,
    mutant_store_create_with_one_flush_is_found StoreCreateOneFlush,
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
    mutant_suspended_without_a_flush_is_found SuspendWithoutFlush,
    mutant_removed_before_its_end_is_found RemovedBeforeItsEnd,
}

#[test]
fn every_mutant_is_searched_for() {
    let left_out: Vec<_> = Mutant::ALL
        .iter()
        .filter(|m| **m != Mutant::None && !MUTANTS.contains(m))
        .filter(|m| !Mutant::OF_TREES.contains(m) && !Mutant::OF_MAPPED.contains(m))
        .collect();
    assert!(left_out.is_empty(), "{left_out:?}");
}

/// Seeds that found something once. The sentence is what must not come back. A
/// change of the workload gives a seed another run: then break the engine again,
/// and pin the first seed that notices.
fn stays_right(seed: u64) {
    let report = Checks::default().run(seed);
    assert_eq!(report.violation, None, "seed {seed}");
}

#[test]
fn seed_120_open_flushes_what_a_killed_process_left_in_the_page_cache() {
    stays_right(120);
}

#[test]
fn seed_2385_close_flushes_an_origin_that_a_killed_process_wrote() {
    stays_right(2385);
}
