//! Orders that take time: devices come to a standstill, tables are exchanged, devices go.
//!
//! The orders of one device are worked off one after the other. Each looks again,
//! whenever something has ended, whether it can go on.

use super::device::Course;
use super::orders::{Errno, Refused};
use super::snap::Body;
use super::{DeviceId, Mapper, MapperEvent, OrderId, SnapKey};
use crate::request::Failure;

/// An order that has not come to its end.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) id: OrderId,
    pub(super) device: DeviceId,
    pub(super) kind: Kind,
    pub(super) progress: Progress,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Suspend { noflush: bool },
    Resume { noflush: bool },
    Remove,
    Wait { event_nr: u32 },
}

/// How far an order has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// It has not begun, or those before it on its device have not ended.
    Waiting,
    /// Requests end.
    Draining,
    /// The snapshots of the new table join their volumes.
    Joining,
    /// Those of the old one leave theirs.
    Leaving,
}

type Done = Option<Result<(), Refused>>;

impl Mapper {
    pub(super) fn advance_orders(&mut self) -> bool {
        let mut went_on = false;
        let mut at = 0;
        while at < self.pending.len() {
            let device = self.pending[at].device;
            let is_wait = matches!(self.pending[at].kind, Kind::Wait { .. });
            let mut before = self.pending[..at].iter();
            let blocked =
                before.any(|p| p.device == device && !matches!(p.kind, Kind::Wait { .. }));
            if blocked && !is_wait {
                at += 1;
                continue;
            }
            let before = self.pending[at].progress;
            if let Some(result) = self.advance(at) {
                let pending = self.pending.remove(at);
                self.events.push_back(MapperEvent::Done(pending.id, result));
                went_on = true;
            } else {
                went_on |= self.pending[at].progress != before;
                at += 1;
            }
        }
        went_on
    }

    fn advance(&mut self, at: usize) -> Done {
        let Pending {
            device,
            kind,
            progress,
            ..
        } = self.pending[at];
        let leaving = matches!(kind, Kind::Remove);
        if self.devices.get(&device).is_none_or(|d| d.leaving) && !leaving {
            return Some(Err(Refused::new(Errno::NoDevice, "the device has gone")));
        }
        match (kind, progress) {
            (Kind::Wait { event_nr }, _) => {
                let had = self.devices[&device].event_nr;
                (had != event_nr).then_some(Ok(()))
            }
            // Its number is not given to another one before its requests have ended.
            (Kind::Remove, Progress::Leaving) if self.devices[&device].in_flight > 0 => None,
            (Kind::Remove, Progress::Leaving) => {
                self.devices.remove(&device);
                self.events.push_back(MapperEvent::Gone(device));
                Some(Ok(()))
            }
            (Kind::Remove, _) => {
                self.empty(device);
                self.wait_for_leavers(at, Progress::Leaving)
            }
            (Kind::Suspend { noflush }, Progress::Waiting) => {
                self.begin_standstill(device);
                self.end_standstill(at, device, noflush)
            }
            (Kind::Suspend { noflush }, _) => self.end_standstill(at, device, noflush),
            (Kind::Resume { noflush }, Progress::Waiting | Progress::Draining) => {
                self.begin_resume(at, device, noflush)
            }
            (Kind::Resume { .. }, Progress::Joining) => self.end_joining(at, device),
            (Kind::Resume { .. }, Progress::Leaving) => self.no_leavers().then_some(Ok(())),
        }
    }

    /// A device that goes lets its tables go.
    fn empty(&mut self, id: DeviceId) {
        let device = self.devices.get_mut(&id).expect("it is leaving");
        let tables: Vec<_> = device
            .live
            .take()
            .into_iter()
            .chain(device.inactive.take())
            .collect();
        for (_, asker) in std::mem::take(&mut device.queued) {
            self.answer(asker, Err(Failure::Io));
        }
        for table in tables {
            self.drop_table(&table);
        }
    }

    fn wait_for_leavers(&mut self, at: usize, progress: Progress) -> Done {
        if self.no_leavers() {
            self.pending[at].progress = progress;
        }
        None
    }

    fn no_leavers(&self) -> bool {
        self.levels
            .iter()
            .all(|(_, level)| level.leaving.is_empty())
    }

    fn begin_standstill(&mut self, id: DeviceId) {
        let device = self.devices.get_mut(&id).expect("it was looked at");
        if device.course == Course::Running {
            device.course = Course::Suspending;
        }
        for key in self.merges_of(id) {
            if let Some((level, _)) = self.snaps[key].place() {
                self.levels[level].volume.suspend_merge();
                self.touch(level);
            }
        }
    }

    /// The merges of a device's active table.
    fn merges_of(&self, id: DeviceId) -> Vec<SnapKey> {
        let live = self
            .devices
            .get(&id)
            .and_then(|device| device.live.as_ref());
        let snaps = live.into_iter().flat_map(super::device::Table::snaps);
        snaps.filter(|&key| self.snaps[key].merges).collect()
    }

    fn stands_still(&self, id: DeviceId, noflush: bool) -> bool {
        let rests = |&key: &SnapKey| match self.snaps[key].body {
            Body::Merging { level, .. } => self.levels[level].volume.merge_rests(),
            _ => true,
        };
        let is_drained = self.devices[&id].in_flight == 0 || !self.law.drain_before_standstill();
        (noflush || is_drained) && self.merges_of(id).iter().all(rests)
    }

    fn end_standstill(&mut self, at: usize, id: DeviceId, noflush: bool) -> Done {
        self.pending[at].progress = Progress::Draining;
        if !self.stands_still(id, noflush) {
            return None;
        }
        let device = self.devices.get_mut(&id).expect("it was looked at");
        device.course = Course::Suspended;
        Some(Ok(()))
    }

    /// The inactive table takes its place, in a device that stands still for it.
    fn begin_resume(&mut self, at: usize, id: DeviceId, noflush: bool) -> Done {
        let device = &self.devices[&id];
        if device.inactive.is_some() {
            // Once: whoever is told something is looked at again, and so is this order.
            if self.pending[at].progress == Progress::Waiting {
                self.begin_standstill(id);
            }
            let _ = self.end_standstill(at, id, noflush)?;
            if let Err(refused) = self.exchange(id) {
                return Some(Err(refused));
            }
        }
        let device = &self.devices[&id];
        if device.live.is_none() {
            let why = "the device has no table";
            return match device.course {
                Course::Running => Some(Ok(())),
                _ => Some(Err(Refused::new(Errno::Invalid, why))),
            };
        }
        if device.course == Course::Running {
            return Some(Ok(()));
        }
        let table = device.live.as_ref().expect("it was looked at");
        let snaps: Vec<_> = table.snaps().collect();
        for &key in &snaps {
            if let Err(refused) = self.may_join(key) {
                // The table is in place all the same, and the one before it is gone.
                self.drop_replaced(id);
                return Some(Err(refused));
            }
        }
        for key in snaps {
            self.join(key);
        }
        self.pending[at].progress = Progress::Joining;
        None
    }

    /// The inactive table in place of the live one, which goes once the resume is done.
    fn exchange(&mut self, id: DeviceId) -> Result<(), Refused> {
        let device = self.devices.get_mut(&id).expect("it was looked at");
        let new = device.inactive.take().expect("it was looked at");
        let lines: Vec<_> = new.lines.iter().map(|mapped| mapped.line.clone()).collect();
        if let Err(refused) = self.check_areas(&lines) {
            self.drop_table(&new);
            return Err(refused);
        }
        let device = self.devices.get_mut(&id).expect("it was looked at");
        let old = device.live.replace(new);
        device.replaced = old;
        self.cover_anew();
        self.grow_levels();
        Ok(())
    }

    /// Once all snapshots of the new table are there, requests go on, and the old
    /// table goes.
    fn end_joining(&mut self, at: usize, id: DeviceId) -> Done {
        let device = self.devices.get_mut(&id).expect("it was looked at");
        let live = device.live.as_ref().expect("it was resumed with a table");
        let waits = live.snaps().any(|key| {
            let body = &self.snaps[key].body;
            matches!(
                body,
                Body::Joining { .. } | Body::Taking { .. } | Body::Beginning { .. }
            )
        });
        if waits {
            return None;
        }
        self.release(id);
        self.drop_replaced(id);
        self.pending[at].progress = Progress::Leaving;
        None
    }

    /// The table that a device had before the one that is in place goes.
    fn drop_replaced(&mut self, id: DeviceId) {
        let device = self.devices.get_mut(&id);
        if let Some(old) = device.and_then(|device| device.replaced.take()) {
            self.drop_table(&old);
        }
    }
}
