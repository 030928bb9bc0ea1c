//! The start of a process: stores are made or opened, the tree is put together, and
//! every node is compared.

use nbdsnap_engine::{Access, Store, StoreSize, StoreSpec};
use nbdsnap_format::ChunkSize;

use super::process::Process;
use super::tally::Tally;
use super::world::{Name, Phase, World, called};
use crate::model::Crash;
use crate::pattern::SECTOR;
use crate::simulator::recovery::Bench;
use crate::simulator::world::say;
use crate::simulator::{Checks, Violation};
use crate::workload::Ask;

fn size(world: &World, index: usize) -> StoreSize {
    let node = &world.nodes[index];
    let ready = node.disk.len();
    StoreSize {
        ready,
        limit: (node.limit_sectors * SECTOR).max(ready),
        step: node.step_chunks * node.chunk_bytes(),
    }
}

/// The disk under a store, with the power failing after `steps`.
fn bench(world: &mut World, index: usize, steps: Option<u64>) -> Bench<'_> {
    Bench {
        disk: &mut world.nodes[index].disk,
        rng: &mut world.rng,
        steps,
        failed: false,
        told: world.told,
        kept: Vec::new(),
        wrote: false,
    }
}

/// Make the store of a node.
pub(super) fn make_store(
    world: &mut World,
    index: usize,
    checks: Checks,
) -> Result<Store, Violation> {
    let node = &world.nodes[index];
    let chunk_size = ChunkSize::from_sectors(node.chunk_sectors);
    let spec = StoreSpec {
        kind: node.kind,
        chunk_size: chunk_size.expect("the plan's chunk sizes are good"),
        size: size(world, index),
    };
    let made = checks.create(spec, &mut bench(world, index, None));
    made.map_err(|error| Violation(format!("store {index} cannot be made: {error}")))
}

/// Put the tree together that a crash left, or the first one. None if the power
/// failed meanwhile.
pub(super) fn start(
    world: &mut World,
    checks: Checks,
    crash: Option<Crash>,
    mut steps: Option<u64>,
) -> Result<Option<Process<'_>>, Violation> {
    let mut stores = Vec::new();
    // Those that were taken first come first: so does what others stand on.
    for index in 0..world.nodes.len() {
        if world.nodes[index].phase == Phase::Gone {
            continue;
        }
        match open(world, index, checks, &mut steps)? {
            Some(store) => stores.push((index, store)),
            None => return Ok(None),
        }
    }
    let mut process = Process::new(world, checks);
    for (index, store) in stores {
        process.attach(index, store);
    }
    if let Some(crash) = crash {
        process.compare_after(crash)?;
    } else {
        for _ in 0..process.world.plan.begin {
            process.begin_with_one()?;
        }
    }
    Ok(Some(process))
}

fn open(
    world: &mut World,
    index: usize,
    checks: Checks,
    steps: &mut Option<u64>,
) -> Result<Option<Store>, Violation> {
    let size = size(world, index);
    let (kind, bytes) = (world.nodes[index].kind, world.plan.sectors * SECTOR);
    say!(world, "  open store {index}");
    let mut bench = bench(world, index, *steps);
    let opened = checks.open(kind, size, bytes, Access::ReadWrite, &mut bench);
    *steps = bench.steps;
    if bench.failed {
        return Ok(None);
    }
    let store = opened.map_err(|error| Violation(format!("store {index}: {error}")))?;
    if store.is_invalid() {
        if !world.may_be_lost(Some(index)) {
            return Err(Violation(format!("store {index} is invalid")));
        }
        world.ledger.count(Tally::LostFound);
    }
    Ok(Some(store))
}

impl Process<'_> {
    fn attach(&mut self, index: usize, store: Store) {
        let invalid = store.is_invalid();
        let view = self.world.view(self.world.nodes[index].origin);
        let phase = self.world.nodes[index].phase;
        let (id, phase) = match phase {
            Phase::MergeOrdered | Phase::Merging => {
                self.world.ledger.count(Tally::MergeTakenUp);
                if phase == Phase::MergeOrdered {
                    // The mark is durable: what was the snapshot's is its origin's.
                    self.world.ledger.count(Tally::MergeCutBeforeItBegan);
                    let origin = self.world.nodes[index].origin;
                    *self.world.model(origin) = self.world.nodes[index].model.clone();
                }
                (self.tree.attach_merging(view, store), Phase::Merging)
            }
            _ if invalid => (self.tree.attach_snapshot(view, store), Phase::Lost),
            _ => (self.tree.attach_snapshot(view, store), Phase::Active),
        };
        self.world.nodes[index].id = Some(id);
        self.world.nodes[index].phase = phase;
        say!(self.world, "  store {index} is {id:?}, {phase:?}");
    }

    /// One of the snapshots that the run begins with.
    fn begin_with_one(&mut self) -> Result<(), Violation> {
        let origin = self.world.pick_origin();
        let index = self.world.new_node(origin);
        let store = make_store(self.world, index, self.checks)?;
        let id = self.tree.attach_snapshot(self.world.view(origin), store);
        let model = self.world.model(origin).clone();
        let node = &mut self.world.nodes[index];
        (node.id, node.phase, node.model) = (Some(id), Phase::Active, model);
        Ok(())
    }

    /// Compare every node with what it may show after the crash.
    fn compare_after(&mut self, crash: Crash) -> Result<(), Violation> {
        for index in 0..self.world.nodes.len() {
            let lost = self.world.stands_on_lost(Some(index));
            self.world.nodes[index].is_unknown |= lost;
        }
        self.compare_stacked(Some(crash))?;
        for index in 0..=self.world.nodes.len() {
            let name: Name = index.checked_sub(1);
            let is_view = name.is_none_or(|i| self.world.nodes[i].phase.is_view());
            if !is_view || self.world.is_unknown(name) {
                continue;
            }
            let cells = self.world.model(name).all();
            let stacked = self.world.stacked(name);
            let mapped = self.read_now(name, cells).map(|(found, _)| found);
            if mapped.is_none() || mapped != stacked {
                return Err(Violation(format!(
                    "{} does not read as its stores say",
                    called(name)
                )));
            }
            if self.world.rng.chance(1, 4) {
                self.hand_in(name, cells, Ask::Read)?;
            }
            self.world.ledger.count(Tally::Reopened);
        }
        Ok(())
    }
}
