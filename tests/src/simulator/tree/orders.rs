//! Orders: snapshots of every node come and go, are merged, and the tree stands
//! still. What is durable once ordered (a removal, a merge) is noted when it is.

use nbdsnap_engine::{MergeError, NodeMergeError, RemoveError, SnapshotId, Store};

use super::process::{Course, Process};
use super::recovery;
use super::tally::Tally;
use super::world::{Name, Phase, World};
use crate::simulator::Violation;
use crate::simulator::world::say;

impl Process<'_> {
    pub(super) fn order(&mut self) -> Result<(), Violation> {
        self.listen()?;
        match self.world.rng.below(16) {
            0..=5 => self.create()?,
            6 | 7 => self.remove()?,
            8..=10 => self.merge()?,
            11 | 12 => self.meddle_with_group()?,
            _ if self.course == Course::Suspended || self.world.rng.chance(1, 3) => {
                self.resume()?;
            }
            _ if self.course == Course::Running && self.group.is_empty() => {
                say!(self.world, "suspend");
                self.course = Course::Suspending;
                self.tree.suspend();
            }
            _ => {}
        }
        self.listen()
    }

    /// A snapshot of some node, and the store for it; its place among the nodes.
    fn new_snapshot(&mut self) -> Result<Option<(Name, usize, Store)>, Violation> {
        let merging = |world: &World, name: Name| {
            let of_it = world.snapshots_of(name);
            of_it.iter().any(|&i| world.nodes[i].phase.merges())
        };
        let origin = self.world.pick_origin();
        let is_full = self.world.count() >= self.world.plan.most;
        if is_full || merging(self.world, origin) || self.world.stands_on_lost(origin) {
            return Ok(None);
        }
        let index = self.world.new_node(origin);
        let store = recovery::make_store(self.world, index, self.checks)?;
        Ok(Some((origin, index, store)))
    }

    fn create(&mut self) -> Result<(), Violation> {
        let Some((origin, index, store)) = self.new_snapshot()? else {
            return Ok(());
        };
        let view = self.world.view(origin);
        match self.tree.create_snapshot(view, store) {
            Ok(id) => {
                say!(self.world, "create snapshot {index} of {origin:?}: {id:?}");
                self.world.nodes[index].id = Some(id);
                Ok(())
            }
            Err(error) => Err(Violation(format!("no snapshot of {origin:?}: {error}"))),
        }
    }

    /// Instants of two views that are to be one; then they are taken, or given up.
    fn meddle_with_group(&mut self) -> Result<(), Violation> {
        if !self.group.is_empty() {
            let held = self.group.iter().all(|&(_, held)| held);
            if self.world.rng.chance(1, 4) {
                return self.abandon_group();
            }
            if held {
                say!(self.world, "take the group");
                for (id, _) in std::mem::take(&mut self.group) {
                    let taken = self.tree.take_instant(id);
                    taken.map_err(|error| Violation(format!("{id:?}: {error}")))?;
                }
                self.world.ledger.count(Tally::Group);
            }
            return Ok(());
        }
        if self.course != Course::Running {
            return Ok(());
        }
        if self.world.nodes.iter().any(|node| !node.is_roomy) {
            // It would fail as a whole where one of its snapshots is lost.
            return Ok(());
        }
        for _ in 0..2 {
            let Some((origin, index, store)) = self.new_snapshot()? else {
                break;
            };
            let view = self.world.view(origin);
            let begun = self.tree.begin_instant(view, vec![store]);
            let (id, ids) = begun.map_err(|error| Violation(format!("{view:?}: {error}")))?;
            say!(self.world, "{id:?} of {origin:?} for snapshot {index}");
            self.world.nodes[index].id = Some(ids[0]);
            self.group.push((id, false));
        }
        Ok(())
    }

    pub(super) fn abandon_group(&mut self) -> Result<(), Violation> {
        self.listen()?;
        if self.group.is_empty() {
            return Ok(());
        }
        let group = std::mem::take(&mut self.group);
        let before = self.tree.devices();
        for &(id, _) in &group {
            self.tree.abandon_instant(id);
        }
        let after = self.tree.devices();
        let gone = |id: SnapshotId| !after.contains(&nbdsnap_engine::Device::Cow(id));
        for index in 0..self.world.nodes.len() {
            if self.world.nodes[index].id.is_some_and(gone) {
                self.world.bury(index);
            }
        }
        self.world.ledger.count(Tally::GroupAbandoned);
        if after.len() < before.len() {
            return self.listen();
        }
        Err(Violation(
            "an abandoned instant leaves its snapshots".into(),
        ))
    }

    fn ids(&self, nodes: &[usize]) -> Vec<SnapshotId> {
        let mut ids: Vec<_> = (nodes.iter())
            .filter_map(|&index| self.world.nodes[index].id)
            .collect();
        ids.sort_unstable();
        ids
    }

    fn pick(&mut self) -> Option<usize> {
        let there: Vec<usize> = (0..self.world.nodes.len())
            .filter(|&i| self.world.nodes[i].phase != Phase::Gone)
            .collect();
        (!there.is_empty()).then(|| there[self.world.rng.index(there.len())])
    }

    fn remove(&mut self) -> Result<(), Violation> {
        let Some(index) = self.pick() else {
            return Ok(());
        };
        let node = &self.world.nodes[index];
        let (phase, id) = (node.phase, node.id.expect("it has come in"));
        if phase == Phase::Creating {
            // Of a group, perhaps: the other search removes such.
            return Ok(());
        }
        let of_it = self.world.snapshots_of(Some(index));
        let refused = self.tree.remove_snapshot(id);
        say!(self.world, "remove snapshot {index}: {refused:?}");
        let expected = match phase {
            _ if !of_it.is_empty() => Err(RemoveError::HasSnapshots(self.ids(&of_it))),
            Phase::MergeOrdered | Phase::Merging => Err(RemoveError::Merging),
            Phase::Removing => Err(RemoveError::NoSuchSnapshot),
            _ => Ok(()),
        };
        if refused != expected {
            return Err(Violation(format!(
                "the removal of snapshot {index}, {phase:?} with {of_it:?}: {refused:?}"
            )));
        }
        match refused {
            Ok(()) => {
                self.world.nodes[index].phase = Phase::Removing;
                let of_it = self.pending.values_mut();
                for p in of_it.filter(|p| p.name == Some(index)) {
                    p.orphan = true;
                }
            }
            Err(RemoveError::HasSnapshots(_)) => self.world.ledger.count(Tally::RemoveRefused),
            Err(_) => {}
        }
        Ok(())
    }

    fn merge(&mut self) -> Result<(), Violation> {
        let Some(index) = self.pick() else {
            return Ok(());
        };
        if self.world.may_be_lost(Some(index)) {
            // A merge that meets a lost store stops; volumes are searched for that.
            return Ok(());
        }
        let node = &self.world.nodes[index];
        let (phase, id, origin) = (node.phase, node.id.expect("it has come in"), node.origin);
        let of_it = self.world.snapshots_of(Some(index));
        let beside = self.world.snapshots_of(origin);
        let any = |wanted: fn(Phase) -> bool| {
            let mut phases = beside.iter().map(|&i| self.world.nodes[i].phase);
            phases.any(wanted)
        };
        let (merges, takes) = (any(Phase::merges), any(|p| p == Phase::Creating));
        let ordered = self.tree.begin_merge(id);
        say!(self.world, "merge snapshot {index}: {ordered:?}");
        let refused = |error| Err(NodeMergeError::Refused(error));
        let expected = match phase {
            _ if !of_it.is_empty() => Err(NodeMergeError::HasSnapshots(self.ids(&of_it))),
            _ if merges => refused(MergeError::AlreadyMerging),
            Phase::Removing => refused(MergeError::NoSuchSnapshot),
            _ if takes => refused(MergeError::InstantUnderWay),
            _ => Ok(()),
        };
        if ordered != expected {
            return Err(Violation(format!(
                "the merge of snapshot {index}, {phase:?} with {of_it:?}: {ordered:?}"
            )));
        }
        self.world.ledger.count(match (&ordered, origin) {
            (Ok(()), None) => Tally::MergeOrdered,
            (Ok(()), Some(_)) => Tally::MergeOrderedInner,
            (Err(NodeMergeError::HasSnapshots(_)), _) => Tally::MergeRefusedDependents,
            (Err(_), _) => Tally::MergeRefused,
        });
        if ordered.is_ok() {
            if beside.len() > 1 {
                self.world.ledger.count(Tally::MergeWithSiblings);
            }
            self.world.nodes[index].phase = Phase::MergeOrdered;
        }
        Ok(())
    }

    pub(super) fn resume(&mut self) -> Result<(), Violation> {
        if matches!(self.course, Course::Suspending | Course::Suspended) {
            say!(self.world, "resume");
            self.world.ledger.count(Tally::Resumed);
            self.course = Course::Running;
            self.tree.resume();
            for p in self.pending.values_mut() {
                p.queued = false;
            }
        }
        self.listen()
    }
}
