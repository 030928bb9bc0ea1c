//! What the mapper may answer: every reply and event is held against the models.

use nbdsnap_engine::dm::{DeviceId, Lower, MapperEvent, OrderId, Refused};
use nbdsnap_engine::{Failure, Reply, Status};

use super::process::{Pending, Process, Watched};
use super::tally::Tally;
use super::world::{Phase, Place, Stop, World};
use crate::model::{End, Part, Time};
use crate::simulator::Violation;
use crate::simulator::world::say;
use crate::workload::Ask;

impl Process<'_> {
    pub(super) fn on_reply(&mut self, reply: Reply) -> Result<(), Stop> {
        let id = reply.id.0;
        let Some(p) = self.pending.remove(&id) else {
            return Err(Violation(format!("request {id} is answered unasked")).into());
        };
        let now = self.world.tick();
        let pieces = match reply.result {
            Err(failure) => return self.on_failure(id, &p, failure, now),
            Ok(pieces) => pieces,
        };
        say!(self.world, "[{now}] reply {id}: ok");
        if p.orphan {
            return Ok(());
        }
        match p.ask {
            Ask::Read => {
                let found = pieces.concat();
                if found.len() as u64 != p.cells.len_bytes() {
                    return Err(Violation(format!("{p:?} brought {} bytes", found.len())).into());
                }
                if !self.world.is_unknown(p.name) {
                    let read = (self.world.model(p.name)).read(p.cells, p.issued, now, &found);
                    read.map_err(|wrong| self.world.wrong("a read", p.name, &wrong))?;
                }
            }
            Ask::Flush => {
                let oldest = self.oldest_read();
                self.world.model(p.name).flush(p.issued, oldest);
            }
            Ask::Write { .. } | Ask::Zero { .. } | Ask::Trim { .. } => {
                let end = if p.is_halved {
                    End::Failed
                } else if p.fua() {
                    End::Durable
                } else {
                    End::Done
                };
                self.end_change(&p, now, end);
            }
        }
        Ok(())
    }

    fn end_change(&mut self, p: &Pending, now: Time, end: End) {
        let replaces = !matches!(p.ask, Ask::Trim { .. });
        (self.world.model(p.name)).end_write(p.cells, p.issued, now, end, replaces);
    }

    /// When the oldest read that is in flight was handed in.
    fn oldest_read(&self) -> Time {
        let reads = self.pending.values().filter(|p| p.ask == Ask::Read);
        reads.map(|p| p.issued).min().unwrap_or(Time::MAX)
    }

    fn on_failure(
        &mut self,
        id: u64,
        p: &Pending,
        failure: Failure,
        now: Time,
    ) -> Result<(), Stop> {
        say!(self.world, "[{now}] reply {id}: {failure:?}");
        let tally = match failure {
            Failure::Io | Failure::NoSuchView if p.orphan => Tally::FailedByRemoval,
            Failure::Io | Failure::NoSpace if self.world.may_be_lost(p.name) => Tally::FailedByLoss,
            Failure::Io if self.world.faulty => Tally::FailedByDisk,
            Failure::ShuttingDown if self.closes => Tally::FailedByClose,
            _ => return Err(Violation(format!("request {id} failed: {failure:?}, {p:?}")).into()),
        };
        self.world.ledger.count(tally);
        if p.changes() && !p.orphan {
            let end = match failure {
                Failure::ShuttingDown => End::Refused,
                _ => End::Failed,
            };
            self.end_change(p, now, end);
        }
        Ok(())
    }

    pub(super) fn on_event(&mut self, event: MapperEvent) -> Result<(), Stop> {
        say!(self.world, "{event:?}");
        match event {
            MapperEvent::Done(order, result) => self.on_done(order, result),
            MapperEvent::Invalid(device, why) => self.on_lost(device, true, why),
            MapperEvent::Unmarked(device, why) => self.on_lost(device, false, why),
            MapperEvent::Overflow(device) => {
                let index = self.view_of(device);
                if index.is_some_and(|i| self.world.snaps[i].is_roomy) {
                    return Err(Violation("a store with room overflows".into()).into());
                }
                self.world.ledger.count(Tally::Overflow);
                Ok(())
            }
            MapperEvent::MergeBegun(device) => self.on_merge_begun(device),
            MapperEvent::Merged(device) => {
                let index = self.view_of(device);
                let snap = index.map(|i| &mut self.world.snaps[i]);
                let Some(snap) = snap.filter(|snap| snap.phase == Phase::Merging) else {
                    return Err(Violation(format!("{event:?}, for no reason")).into());
                };
                snap.phase = Phase::Merged;
                self.world.ledger.count(Tally::Merged);
                Ok(())
            }
            MapperEvent::MergeFailed(device, why) => self.on_merge_failed(device, why),
            MapperEvent::Closed(ok) => {
                self.closed = Some(ok);
                Ok(())
            }
            MapperEvent::Gone(_) | MapperEvent::Unused(_) => Ok(()),
        }
    }

    /// The snapshot that a device is, or is the merge of.
    fn view_of(&self, device: DeviceId) -> Option<usize> {
        let info = self.mapper.info(device).ok()?;
        self.views.get(&info.name).copied()
    }

    fn on_done(&mut self, order: OrderId, result: Result<(), Refused>) -> Result<(), Stop> {
        let good = result.is_ok();
        self.done.insert(order, result);
        match self.watched.remove(&order) {
            Some(Watched::Creation { index }) if good => self.on_created(index),
            Some(Watched::Standstill { device, since }) if good => {
                let to = Lower::Device(device);
                let left = (self.pending.values()).find(|p| p.to == to && p.issued < since);
                left.map_or(Ok(()), |p| {
                    let text = format!("{order:?}: a device stands still with {p:?} under way");
                    Err(Violation(text).into())
                })
            }
            Some(_) | None => Ok(()),
        }
    }

    /// The instant of a snapshot has come: it shows what its origin does now.
    fn on_created(&mut self, index: usize) -> Result<(), Stop> {
        let snap = &self.world.snaps[index];
        let origin = snap.origin;
        if self.status(&snap.device) == Some(Status::Invalid) {
            // Its instant has failed; whoever ordered it looks.
            return Ok(());
        }
        let parent = origin.map(|i| self.world.snaps[i].device.clone());
        let parent_lost = parent.is_some_and(|name| self.status(&name) == Some(Status::Invalid));
        let found = self.world.stacked(origin).filter(|_| !parent_lost);
        let Some(found) = found else {
            if !self.world.faulty && !self.world.may_be_lost(origin) {
                return Err(Violation(format!("snapshot {index} is taken of nothing")).into());
            }
            let model = self.world.model(origin).clone();
            let snap = &mut self.world.snaps[index];
            (snap.model, snap.is_unknown, snap.phase) = (model, true, Phase::Active);
            return Ok(());
        };
        let now = self.world.tick();
        let frozen = self.world.model(origin).freeze(now, &found);
        let frozen = frozen.map_err(|wrong| {
            let what = format!("at the instant of snapshot {index}");
            self.world.wrong(&what, origin, &wrong)
        })?;
        // Whole, as far as they come to the origin's volume in one.
        let whole = |p: &&Pending| p.name == origin && matches!(p.ask, Ask::Write { .. });
        let writes: Vec<_> = self.pending.values().filter(whole).copied().collect();
        for p in writes {
            if self.world.may_be_cut(&p) {
                continue;
            }
            let model = self.world.model(origin);
            let is_torn = model.part_in(&frozen, p.cells, p.stamp, p.issued) == Part::Torn;
            if is_torn {
                let text = format!("snapshot {index} shows a part of {p:?}");
                return Err(Violation(text).into());
            }
        }
        let World { snaps, ledger, .. } = &mut *self.world;
        let snap = &mut snaps[index];
        (snap.model, snap.phase) = (frozen, Phase::Active);
        ledger.count(match origin {
            None => Tally::Created,
            Some(_) => Tally::CreatedInner,
        });
        Ok(())
    }

    fn on_lost(&mut self, device: DeviceId, marked: bool, why: &'static str) -> Result<(), Stop> {
        let Some(index) = self.view_of(device) else {
            return Ok(());
        };
        if !self.world.faulty && !self.world.may_be_lost(Some(index)) {
            return Err(Violation(format!("snapshot {index} is lost: {why}")).into());
        }
        let has_snaps = !self.world.snaps_of(Some(index)).is_empty();
        let World { snaps, ledger, .. } = &mut *self.world;
        let snap = &mut snaps[index];
        match snap.phase {
            Phase::Merging | Phase::Merged => {
                let text = format!("snapshot {index} is lost in the middle of its merge: {why}");
                return Err(Violation(text).into());
            }
            Phase::Gone | Phase::Creating => return Ok(()),
            Phase::Active | Phase::Lost { .. } | Phase::MergeOrdered => {}
        }
        snap.phase = Phase::Lost { marked };
        ledger.count(match (marked, snap.is_roomy) {
            (false, _) => Tally::LostUnmarked,
            (true, false) => Tally::LostByFullStore,
            (true, true) => Tally::LostByDisk,
        });
        if has_snaps {
            ledger.count(Tally::LostInner);
        }
        Ok(())
    }

    /// The origin reads as the snapshot.
    fn on_merge_begun(&mut self, device: DeviceId) -> Result<(), Stop> {
        let index = self.view_of(device);
        let phase = index.map(|i| self.world.snaps[i].phase);
        let (Some(index), Some(Phase::MergeOrdered | Phase::Merging)) = (index, phase) else {
            return Err(Violation("a merge begins that nobody ordered".into()).into());
        };
        if phase == Some(Phase::Merging) {
            // One that a crash cut off: the model knows already.
            return Ok(());
        }
        let now = self.world.tick();
        let merged = self.world.snaps[index].model.clone();
        let origin = self.world.snaps[index].origin;
        self.world.model(origin).roll_back(&merged, now);
        for p in self.pending.values_mut().filter(|p| p.name == origin) {
            // Some of it may have been before.
            p.is_halved |= self.world.may_be_cut(p);
        }
        self.world.snaps[index].phase = Phase::Merging;
        Ok(())
    }

    fn on_merge_failed(&mut self, device: DeviceId, why: &'static str) -> Result<(), Stop> {
        let Some(index) = self.view_of(device) else {
            return Ok(());
        };
        let faulty = self.world.faulty;
        let may_be_lost = self.world.may_be_lost(Some(index));
        let World { snaps, ledger, .. } = &mut *self.world;
        match snaps[index].phase {
            Phase::Merging if faulty || may_be_lost => ledger.count(Tally::MergeStopped),
            // It is being lost: that is told apart, and its order looks.
            Phase::MergeOrdered | Phase::Lost { .. } if faulty || may_be_lost => {
                ledger.count(Tally::MergeNotBegun);
                if snaps[index].phase == Phase::MergeOrdered {
                    snaps[index].phase = Phase::Active;
                }
            }
            _ => {
                let text = format!("the merge of snapshot {index} has stopped: {why}");
                return Err(Violation(text).into());
            }
        }
        Ok(())
    }

    /// The server ends well: everything that was answered is durable.
    pub(super) fn close(&mut self) -> Result<(), Stop> {
        self.mapper.close();
        if self.world.rng.chance(1, 2) {
            self.random_request();
        }
        self.closes = true;
        while self.closed.is_none() {
            if !self.step()? && self.closed.is_none() {
                return Err(Violation("the close does not end".into()).into());
            }
        }
        if let Some((id, p)) = self.pending.first_key_value() {
            return Err(Violation(format!("closed with request {id} open: {p:?}")).into());
        }
        if self.closed == Some(true) {
            let now = self.world.tick();
            self.world.model.close(now);
            for snap in &mut self.world.snaps {
                snap.model.close(now);
            }
            self.world.ledger.count(Tally::Closed);
        } else if self.world.faulty {
            self.world.ledger.count(Tally::ClosedBadly);
        } else {
            return Err(Violation("not all is durable at the end".into()).into());
        }
        self.world.place = Place::Closed;
        Ok(())
    }
}
