//! Runs of the crash simulator with mapped devices: a seed picks tables over three disks
//! (an origin in pieces or stripes, stores on slices beside it), and
//! [`nbdsnap_engine::dm::Mapper`] lives through dmsetup's orders, traffic by every way to
//! the origin, failing disks, and crashes, with a model for each view.
//!
//! A run is a chain of processes, as in `simulator.rs`. Each loads the tables anew that
//! its operator remembers, in dmsetup's order: a merge that was ordered is ordered again,
//! by the same table. Then every view is compared, by requests and by what the bytes of
//! the stacked stores hold. A crash falls anywhere, between any two operations of a disk:
//! in traffic, in the middle of an order, while tables are loaded.

mod boot;
mod orders;
mod process;
pub mod tally;
mod traffic;
mod verdict;
mod world;

use self::process::Process;
use self::tally::Tally;
use self::world::{Phase, Stop, World};
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
    for _ in 0..CRASHES {
        let cut_short = world.rng.chance(1, 8);
        world.fuse = Some(if cut_short {
            world.rng.below(60)
        } else {
            world.rng.between(40, 900)
        });
        let crash = match live(checks, world) {
            Err(Stop::Wrong(violation)) => return Err(violation),
            Err(Stop::Cut) if world.rng.chance(1, 4) => Crash::Kill,
            Ok(()) | Err(Stop::Cut) => Crash::Power,
        };
        world.crash(crash);
    }
    world.fuse = None;
    let mut process = match boot::boot(world, checks) {
        Err(Stop::Wrong(violation)) => return Err(violation),
        Err(Stop::Cut) => unreachable!("nobody cuts the last process off"),
        Ok(process) => process,
    };
    match finish(&mut process) {
        Err(Stop::Wrong(violation)) => Err(violation),
        Ok(()) | Err(Stop::Cut) => Ok(()),
    }
}

/// One process, up to its crash or its close.
fn live(checks: Checks, world: &mut World) -> Result<(), Stop> {
    let mut process = boot::boot(world, checks)?;
    let ended = process.traffic();
    if ended.is_err() && !process.still.is_empty() {
        process.world.ledger.count(Tally::CrashStandingStill);
    }
    ended?;
    if process.world.rng.chance(1, 3) {
        // What is under way is cut off by whatever comes.
        return Err(Stop::Cut);
    }
    process.close()
}

/// The last process: everything comes to its end.
fn finish(process: &mut Process<'_>) -> Result<(), Stop> {
    while process.step()? {}
    let merging = process.world.in_phase(|phase| phase == Phase::Merging);
    let stopped = |&at: &usize| !process.world.may_be_lost(Some(at));
    if let Some(at) = merging.into_iter().find(stopped) {
        return Err(Stop::Wrong(Violation(format!(
            "the merge of snapshot {at} does not end"
        ))));
    }
    process.end_merges()?;
    process.compare_all()?;
    process.close()?;
    process.compare_stacked()?;
    process.world.ledger.count(Tally::Finished);
    say!(process.world, "-- the end");
    Ok(())
}
