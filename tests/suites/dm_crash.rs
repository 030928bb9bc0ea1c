//! The crash search under mapped devices: many seeds, each a run of dmsetup's orders and
//! traffic with three crashes on disks that may fail, every view compared after each. The
//! same for the rules of durability, broken one at a time: the search must notice. What it
//! takes from the environment is told in `simulator/search.rs`.

use nbdsnap_engine::law::Mutant;
use nbdsnap_tests::mutants_found_by;
use nbdsnap_tests::simulator::mapped::{self, tally::Tally};
use nbdsnap_tests::simulator::search::Search;

const SEARCH: Search<Tally> = Search {
    name: ["dm_crash", "crashes_lose"],
    run: mapped::run,
    runs: 3_000,
    images: 6_000,
    most: 20_000,
};

#[test]
fn crashes_lose_nothing_that_was_promised() {
    SEARCH.finds_nothing();
}

mutants_found_by! { SEARCH:
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
