//! What the tree may answer: every reply, event and map is held against the models,
//! and every crash against the bytes of the stacked stores.

use nbdsnap_engine::{Device, Event, Extent, Failure, Now, Reply, SnapshotId};

use super::process::{Course, Pending, Process};
use super::tally::Tally;
use super::world::{Name, Phase, World, called};
use crate::model::{Crash, End, Part, Time, ViewModel};
use crate::pattern::{self, Cells, SECTOR};
use crate::simulator::Violation;
use crate::simulator::world::say;
use crate::workload::Ask;

impl Process<'_> {
    pub(super) fn on_reply(&mut self, reply: Reply) -> Result<(), Violation> {
        let id = reply.id.0;
        let Some(p) = self.pending.remove(&id) else {
            return Err(Violation(format!("request {id} is answered unasked")));
        };
        let now = self.world.tick();
        let pieces = match reply.result {
            Err(failure) => return self.on_failure(id, &p, failure, now),
            Ok(pieces) => pieces,
        };
        say!(self.world, "[{now}] reply {id}: ok");
        if p.queued {
            return Err(Violation(format!("request {id} succeeded: {p:?}")));
        }
        if p.orphan {
            // It was under way when its snapshot went.
            return Ok(());
        }
        match p.ask {
            Ask::Read => self.compare("a read", &p, now, &pieces.concat())?,
            Ask::Flush => {
                let oldest = self.oldest_read();
                self.world.model(p.name).flush(p.issued, oldest);
            }
            Ask::Write { .. } | Ask::Zero { .. } | Ask::Trim { .. } => {
                let end = if p.fua() { End::Durable } else { End::Done };
                self.end_change(&p, now, end);
            }
        }
        Ok(())
    }

    pub(super) fn end_change(&mut self, p: &Pending, now: Time, end: End) {
        let replaces = !matches!(p.ask, Ask::Trim { .. });
        (self.world.model(p.name)).end_write(p.cells, p.issued, now, end, replaces);
    }

    /// When the oldest read that is in flight was handed in.
    pub(super) fn oldest_read(&self) -> Time {
        let reads = self.pending.values().filter(|p| p.ask == Ask::Read);
        reads.map(|p| p.issued).min().unwrap_or(Time::MAX)
    }

    /// Compare what a read showed with the model.
    pub(super) fn compare(
        &mut self,
        what: &str,
        p: &Pending,
        now: Time,
        found: &[u8],
    ) -> Result<(), Violation> {
        if found.len() as u64 != p.cells.len_bytes() {
            return Err(Violation(format!("{p:?} brought {} bytes", found.len())));
        }
        if self.world.is_unknown(p.name) {
            return Ok(());
        }
        let read = (self.world.model(p.name)).read(p.cells, p.issued, now, found);
        read.map_err(|wrong| self.world.wrong(what, p.name, &wrong))
    }

    fn on_failure(
        &mut self,
        id: u64,
        p: &Pending,
        failure: Failure,
        now: Time,
    ) -> Result<(), Violation> {
        say!(self.world, "[{now}] reply {id}: {failure:?}");
        let phase = p.name.map(|index| self.world.nodes[index].phase);
        let leaves = p.orphan || phase.is_some_and(Phase::merges);
        let tally = match failure {
            Failure::NotSupported => matches!(
                p.ask,
                Ask::Zero {
                    fast_only: true,
                    ..
                }
            )
            .then_some(Tally::FastOnlyRefused),
            Failure::NoSuchView | Failure::Io if leaves => Some(Tally::FailedByRemoval),
            Failure::Io if self.world.may_be_lost(p.name) => Some(Tally::FailedByLoss),
            _ => None,
        };
        let Some(tally) = tally else {
            return Err(Violation(format!(
                "request {id} failed: {failure:?}, {p:?}"
            )));
        };
        self.world.ledger.count(tally);
        if p.changes() && !p.orphan {
            let refused = matches!(failure, Failure::NotSupported);
            self.end_change(p, now, if refused { End::Refused } else { End::Failed });
        }
        Ok(())
    }

    pub(super) fn on_event(&mut self, event: &Event) -> Result<(), Violation> {
        match *event {
            Event::Created(id) => self.on_created(id),
            Event::Removed(id) => {
                let index = self.world.node_of(id);
                if self.world.nodes[index].disk.in_flight() > 0 {
                    return Err(Violation(format!(
                        "snapshot {index} is removed with operations in flight"
                    )));
                }
                self.world.ledger.count(Tally::Removed);
                self.world.bury(index);
                Ok(())
            }
            Event::Held(id) => {
                for (instant, held) in &mut self.group {
                    *held |= *instant == id;
                }
                Ok(())
            }
            Event::MergeBegun(id) => self.on_merge_begun(id),
            Event::Merged(id) => {
                let index = self.world.node_of(id);
                self.world.ledger.count(Tally::Merged);
                self.world.bury(index);
                Ok(())
            }
            Event::Invalid(id, _) => self.on_invalid(id),
            Event::Overflow(id) => {
                let index = self.world.node_of(id);
                self.world.ledger.count(Tally::Overflow);
                if self.world.nodes[index].is_roomy {
                    return Err(Violation(format!("{event:?} of snapshot {index}")));
                }
                Ok(())
            }
            Event::Suspended(true) if self.course == Course::Suspending => {
                self.course = Course::Suspended;
                self.world.ledger.count(Tally::Suspended);
                self.all_is_durable();
                Ok(())
            }
            Event::Closed(true) if self.course == Course::Closing => {
                self.course = Course::Closed;
                self.world.ledger.count(Tally::Closed);
                self.all_is_durable();
                Ok(())
            }
            Event::Filling(..) | Event::MergeProgress(..) => Ok(()),
            Event::CreateFailed(id) => {
                let index = self.world.node_of(id);
                if !self.world.may_be_lost(self.world.nodes[index].origin) {
                    return Err(Violation(format!("{event:?}, for no reason")));
                }
                self.world.ledger.count(Tally::CreateFailed);
                self.world.bury(index);
                Ok(())
            }
            Event::InstantFailed(_)
            | Event::MarkLost(..)
            | Event::Unmarked(..)
            | Event::Full(_)
            | Event::MergeFailed(..)
            | Event::Suspended(_)
            | Event::Closed(_) => Err(Violation(format!("{event:?}, for no reason"))),
        }
    }

    fn all_is_durable(&mut self) {
        let now = self.world.tick();
        self.world.model.close(now);
        for node in &mut self.world.nodes {
            node.model.close(now);
        }
    }

    /// What a view holds at this moment, by its map; none if it cannot be read.
    pub(super) fn look(&self, name: Name) -> Option<Vec<u8>> {
        let view = self.world.view(name);
        let len = self.world.plan.sectors * SECTOR;
        let extents = self.tree.map(view, 0, len, usize::MAX).ok()?;
        Some(self.peek(&extents))
    }

    pub(super) fn peek(&self, extents: &[Extent]) -> Vec<u8> {
        let mut found = Vec::new();
        for extent in extents {
            let disk = match extent.device {
                Device::Origin => &self.world.disk,
                Device::Cow(id) => &self.world.nodes[self.world.node_of(id)].disk,
            };
            let end = extent.offset + extent.len;
            found.extend_from_slice(&disk.content()[extent.offset as usize..end as usize]);
        }
        found
    }

    /// The instant of a snapshot has been taken: it shows what its origin does now.
    fn on_created(&mut self, id: SnapshotId) -> Result<(), Violation> {
        let index = self.world.node_of(id);
        let origin = self.world.nodes[index].origin;
        let Some(found) = self.look(Some(index)) else {
            if !self.world.may_be_lost(origin) {
                return Err(Violation(format!("snapshot {index} is new and unreadable")));
            }
            // Its origin is being lost.
            let node = &mut self.world.nodes[index];
            (node.phase, node.is_unknown) = (Phase::Active, true);
            node.model = ViewModel::new(self.world.model.all().to, |_| 0);
            return Ok(());
        };
        let now = self.world.tick();
        let frozen = match origin {
            None => self.world.model.freeze(now, &found),
            Some(origin) => self.world.nodes[origin].model.freeze(now, &found),
        };
        let frozen = frozen.map_err(|wrong| {
            self.world
                .wrong("at the instant of a snapshot", origin, &wrong)
        })?;
        let whole = |p: &&Pending| p.name == origin && matches!(p.ask, Ask::Write { .. });
        for p in self.pending.values().filter(whole) {
            let model = match origin {
                None => &self.world.model,
                Some(origin) => &self.world.nodes[origin].model,
            };
            if model.part_in(&frozen, p.cells, p.stamp, p.issued) == Part::Torn {
                return Err(Violation(format!("snapshot {index} shows a part of {p:?}")));
            }
        }
        let node = &mut self.world.nodes[index];
        if node.phase == Phase::Removing {
            return Ok(());
        }
        node.model = frozen;
        node.phase = Phase::Active;
        self.world.ledger.count(match origin {
            None => Tally::Created,
            Some(_) => Tally::CreatedInner,
        });
        Ok(())
    }

    fn on_invalid(&mut self, id: SnapshotId) -> Result<(), Violation> {
        let index = self.world.node_of(id);
        if !self.world.may_be_lost(Some(index)) {
            return Err(Violation(format!("snapshot {index} is lost")));
        }
        let World { nodes, ledger, .. } = &mut *self.world;
        ledger.count(Tally::Lost);
        if nodes[index].is_roomy {
            ledger.count(Tally::LostAbove);
        }
        if nodes[index].phase != Phase::Removing {
            nodes[index].phase = Phase::Lost;
        }
        if !self.world.snapshots_of(Some(index)).is_empty() {
            self.world.ledger.count(Tally::LostInner);
        }
        Ok(())
    }

    /// The view that a snapshot is merged into reads as the snapshot.
    fn on_merge_begun(&mut self, id: SnapshotId) -> Result<(), Violation> {
        let index = self.world.node_of(id);
        if self.world.nodes[index].phase != Phase::MergeOrdered {
            return Err(Violation(format!("a merge of snapshot {index} begins")));
        }
        let now = self.world.tick();
        // What was handed in and is not answered fails; it may have happened in part.
        let mut changes = Vec::new();
        for p in self.pending.values_mut() {
            if p.name == Some(index) {
                p.orphan = true;
                changes.extend(p.changes().then_some(*p));
            }
        }
        for p in changes {
            self.end_change(&p, now, End::Failed);
        }
        let now = self.world.tick();
        let World { nodes, model, .. } = &mut *self.world;
        nodes[index].phase = Phase::Merging;
        let merged = nodes[index].model.clone();
        match nodes[index].origin {
            None => model.roll_back(&merged, now),
            Some(origin) => nodes[origin].model.roll_back(&merged, now),
        }
        Ok(())
    }

    /// Compare every view that can be read with its model, by its map.
    pub(super) fn compare_all(&mut self) -> Result<(), Violation> {
        let names: Vec<Name> = (0..self.world.nodes.len()).map(Some).collect();
        for name in std::iter::once(None).chain(names) {
            let is_view = name.is_none_or(|i| self.world.nodes[i].phase.is_view());
            if !is_view || self.world.stands_on_lost(name) {
                continue;
            }
            let Some(found) = self.look(name) else {
                if self.world.may_be_lost(name) {
                    // It is being lost.
                    continue;
                }
                return Err(Violation(format!("{} has no map", called(name))));
            };
            let cells = self.world.model(name).all();
            let p = Pending {
                name,
                ask: Ask::Read,
                cells,
                stamp: pattern::ZERO,
                issued: self.world.tick(),
                queued: false,
                orphan: false,
            };
            let now = self.world.tick();
            self.compare("a map", &p, now, &found)?;
            self.world.ledger.count(Tally::Mapped);
        }
        Ok(())
    }

    /// Compare every view with what its stacked stores hold: by the model, or after
    /// a crash.
    pub(super) fn compare_stacked(&mut self, crash: Option<Crash>) -> Result<(), Violation> {
        for index in 0..=self.world.nodes.len() {
            let name = index.checked_sub(1);
            let is_view = name.is_none_or(|i| self.world.nodes[i].phase.is_view());
            if !is_view || self.world.is_unknown(name) || self.world.stands_on_lost(name) {
                continue;
            }
            let Some(found) = self.world.stacked(name) else {
                return Err(Violation(format!("{} has no stores", called(name))));
            };
            let now = self.world.tick();
            let model = self.world.model(name);
            let all = model.all();
            let compared = match crash {
                Some(crash) => model.check_after(crash, now, &found),
                None => model.read(all, now, now, &found),
            };
            compared.map_err(|wrong| self.world.wrong("the stacked stores", name, &wrong))?;
            self.world.ledger.count(Tally::Stacked);
        }
        Ok(())
    }

    /// Whether all of a view can be read around the queue, and what it shows then.
    pub(super) fn read_now(&self, name: Name, cells: Cells) -> Option<(Vec<u8>, Vec<Extent>)> {
        let view = self.world.view(name);
        let mut extents = Vec::new();
        let (offset, len) = (cells.offset(), cells.len_bytes());
        match self.tree.read_now(view, offset, len, &mut extents) {
            Now::Go => Some((self.peek(&extents), extents)),
            Now::Queue => None,
        }
    }
}
