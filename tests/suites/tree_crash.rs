//! The crash search for snapshots of snapshots: many seeds, each a tree under
//! traffic with three crashes, every node compared after each. The same for the
//! rules of durability, broken one at a time: the search must notice. What it takes
//! from the environment is told in `simulator/search.rs`.

use nbdsnap_engine::law::Mutant;
use nbdsnap_tests::mutants_found_by;
use nbdsnap_tests::simulator::search::Search;
use nbdsnap_tests::simulator::tree::{self, tally::Tally};

const SEARCH: Search<Tally> = Search {
    name: ["tree_crash", "every_node"],
    run: tree::run,
    runs: 3_000,
    images: 6_000,
    most: 20_000,
};

#[test]
fn every_node_survives_crashes() {
    SEARCH.finds_nothing();
}

mutants_found_by! { SEARCH:
    mutant_flush_that_stays_in_its_level_is_found InnerFlushNotPassedOn,
    mutant_one_flush_for_two_is_found OneFlush,
    mutant_origin_write_early_is_found OriginWriteEarly,
    mutant_volatile_taken_for_durable_is_found VolatileTakenForDurable,
    mutant_write_now_on_volatile_is_found WriteNowOnVolatile,
    mutant_create_without_flush_is_found CreateWithoutFlush,
    mutant_create_without_drain_is_found CreateWithoutDrain,
    mutant_late_invalidation_is_found InvalidateLate,
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
fn every_mutant_of_trees_is_searched_for() {
    assert!(Mutant::OF_TREES.iter().all(|m| MUTANTS.contains(m)));
}
