//! Runs of the crash simulator with snapshots of snapshots: a seed picks a tree,
//! and [`nbdsnap_engine::Tree`] lives through traffic to every node of it, and
//! through crashes, with a model for each node.
//!
//! A run is a chain of processes, as in `simulator.rs`, and each process begins
//! with a comparison of every node in three ways: what its stores hold, stacked by
//! a second reader of the layout; where the tree says that its bytes lie; and what
//! requests bring. No errors are injected: what failing disks do to a volume is
//! searched for there. Here a snapshot is lost by a store that is too small.

mod orders;
mod process;
mod recovery;
pub mod tally;
mod traffic;
mod verdict;
mod world;

use self::process::Process;
use self::tally::Tally;
use self::world::World;
use super::world::say;
use super::{CRASHES, Checks, Violation, search};
use crate::model::Crash;

/// What a run found.
pub type Report = search::Report<Tally>;

/// Play the run of a seed.
pub fn run(checks: Checks, seed: u64) -> Report {
    let mut world = World::new(seed, checks);
    let violation = search::violation_of(|| play(checks, &mut world));
    Report {
        violation,
        images: world.images,
        ledger: world.ledger,
    }
}

fn play(checks: Checks, world: &mut World) -> Result<(), Violation> {
    let mut last = None;
    let mut crashes = CRASHES;
    loop {
        let fails = last.is_some() && crashes > 0 && world.rng.chance(1, 6);
        let steps = fails.then(|| world.rng.below(12));
        let Some(mut process) = recovery::start(world, checks, last, steps)? else {
            crashes -= 1;
            say!(world, "-- the power fails during recovery");
            world.ledger.count(Tally::CrashRecovery);
            world.crash(Crash::Power);
            last = Some(Crash::Power);
            continue;
        };
        if crashes == 0 {
            return finish(process);
        }
        process.traffic()?;
        let closed = process.world.rng.chance(1, 8);
        if closed {
            process.close()?;
        }
        let kill = !closed && process.world.rng.chance(1, 4);
        let crash = if kill { Crash::Kill } else { Crash::Power };
        process.count_crash(crash, closed);
        let Process { world, .. } = process;
        say!(world, "-- {crash:?}");
        crashes -= 1;
        world.crash(crash);
        last = Some(crash);
    }
}

/// The last process: everything comes to its end.
fn finish(mut process: Process<'_>) -> Result<(), Violation> {
    process.come_to_rest()?;
    process.compare_all()?;
    process.close()?;
    let World { nodes, .. } = process.world;
    if nodes.iter().any(|node| node.phase.merges()) {
        return Err(Violation("a merge did not end".into()));
    }
    process.compare_stacked(None)
}
