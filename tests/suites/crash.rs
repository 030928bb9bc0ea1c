//! The crash search: many seeds, each a run of traffic with three crashes on
//! simulated disks, each image opened again and every view compared. The same for the
//! rules of durability, broken one at a time: the search must notice. What it takes
//! from the environment is told in `simulator/search.rs`.

use nbdsnap_engine::law::Mutant;
use nbdsnap_tests::mutants_found_by;
use nbdsnap_tests::simulator::Checks;
use nbdsnap_tests::simulator::ledger::Tally;
use nbdsnap_tests::simulator::search::Search;

const SEARCH: Search<Tally> = Search {
    name: ["crash", "crashes_lose"],
    run: Checks::run,
    // A run leaves two images or three (a kill leaves none), nearly all of them distinct.
    runs: 52_000,
    images: 100_000,
    most: 40_000,
};

#[test]
fn crashes_lose_nothing_that_was_promised() {
    SEARCH.finds_nothing();
}

mutants_found_by! { SEARCH:
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
