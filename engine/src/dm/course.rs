//! What takes time: devices come to a standstill, tables are exchanged, snapshots join
//! and leave their volumes, and the end of it all.
//!
//! The orders of one device are worked off one after the other. Each looks again,
//! whenever something has ended, whether it can go on.

use super::device::Course;
use super::orders::{Errno, Refused};
use super::snap::Body;
use super::{DeviceId, Level, LevelKey, Lower, Mapper, MapperEvent, OrderId, Phase, SnapKey};
use crate::request::SnapshotId;
use crate::store::Status;
use crate::volume::{Event, Volume, VolumeConfig};

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
    /// Carry replies and events up, and orders on, until there is nothing more.
    pub(super) fn settle(&mut self) {
        loop {
            while let Some(key) = self.touched.pop_front() {
                let Some(level) = self.levels.get_mut(key) else {
                    continue;
                };
                level.is_touched = false;
                while let Some(reply) = self.levels[key].volume.poll_reply() {
                    self.on_reply(reply);
                }
                // The last event ends the level.
                while let Some(event) = self.levels.get_mut(key).and_then(|l| l.volume.poll_event())
                {
                    self.on_event(key, &event);
                }
            }
            // Most requests leave orders and snapshots as they are.
            if self.is_settled {
                return;
            }
            let joined = self.join_snaps();
            let went_on = self.advance_orders();
            let all_needed = self.end_levels();
            if !joined && !went_on && self.touched.is_empty() {
                self.is_settled = self.pending.is_empty() && all_needed;
                return;
            }
        }
    }

    fn snap_at(&self, key: LevelKey, id: SnapshotId) -> Option<SnapKey> {
        let place = Some((key, id));
        let found = self.snaps.iter().find(|(_, snap)| snap.place() == place);
        found.map(|(snap, _)| snap)
    }

    fn on_event(&mut self, key: LevelKey, event: &Event) {
        self.is_settled = false;
        match *event {
            Event::Created(id) => self.on_joined(key, id),
            Event::CreateFailed(id) => {
                if let Some(snap) = self.snap_at(key, id) {
                    self.snaps[snap].body = Body::Lost;
                }
            }
            Event::Removed(id) => self.levels[key].leaving.retain(|(left, _)| *left != id),
            Event::Invalid(id, why) | Event::Unmarked(id, why) => {
                self.tell(key, id, |device| MapperEvent::Invalid(device, why));
            }
            // A mapped device's origin goes on, as the kernel's does; nobody but the
            // operator, who is told, remembers what is lost.
            Event::MarkLost(id, why) => {
                self.levels[key].volume.marked_lost(id, true);
                self.tell(key, id, |device| MapperEvent::Invalid(device, why));
                self.touch(key);
            }
            Event::Overflow(id) => {
                if let Some(snap) = self.snap_at(key, id) {
                    self.snaps[snap].overflowed = true;
                }
                self.tell(key, id, MapperEvent::Overflow);
            }
            Event::MergeBegun(id) => {
                self.set_body(key, id, Body::Merging { level: key, id });
                self.tell(key, id, MapperEvent::MergeBegun);
            }
            Event::Merged(id) => {
                self.tell(key, id, MapperEvent::Merged);
                self.levels[key].leaving.retain(|(left, _)| *left != id);
                self.set_body(key, id, Body::Merged);
            }
            Event::MergeFailed(id, why) => {
                if let Some(snap) = self.snap_at(key, id)
                    && matches!(self.snaps[snap].body, Body::Beginning { .. })
                {
                    self.snaps[snap].body = Body::There { level: key, id };
                }
                self.tell(key, id, |device| MapperEvent::MergeFailed(device, why));
            }
            Event::Closed(ok) => self.on_closed(key, ok),
            Event::Suspended(_)
            | Event::Filling(..)
            | Event::Full(_)
            | Event::Held(_)
            | Event::InstantFailed(_)
            | Event::MergeProgress(..) => {}
        }
    }

    fn set_body(&mut self, key: LevelKey, id: SnapshotId, body: Body) {
        if let Some(snap) = self.snap_at(key, id) {
            self.snaps[snap].body = body;
        }
    }

    /// Whoever waits for the device's events hears of a lost snapshot, as the kernel has
    /// it, and of nothing else.
    fn tell(&mut self, key: LevelKey, id: SnapshotId, event: impl Fn(DeviceId) -> MapperEvent) {
        let Some(device) = self.snap_at(key, id).and_then(|snap| self.device_of(snap)) else {
            return;
        };
        let event = event(device);
        if let (MapperEvent::Invalid(..), Some(device)) = (&event, self.devices.get_mut(&device)) {
            device.event_nr += 1;
        }
        self.events.push_back(event);
    }

    fn on_joined(&mut self, key: LevelKey, id: SnapshotId) {
        let Some(snap) = self.snap_at(key, id) else {
            return;
        };
        self.snaps[snap].body = Body::There { level: key, id };
        self.set_lengths(snap);
        if self.snaps[snap].merges {
            self.begin_merge(snap);
        }
    }

    fn begin_merge(&mut self, snap: SnapKey) {
        let Body::There { level, id } = self.snaps[snap].body else {
            return;
        };
        let volume = &mut self.levels[level].volume;
        volume.resume_merge();
        // What is lost has nothing to be merged: everything is the origin's.
        if volume.begin_merge(id).is_ok() {
            self.snaps[snap].body = Body::Beginning { level, id };
        }
        self.touch(level);
    }

    /// Those whose volume has nothing under way from before them take their instant.
    fn join_snaps(&mut self) -> bool {
        let oldest = self.under_way.keys().next().copied().unwrap_or(u64::MAX);
        let ready = self.snaps.iter().filter(|(_, snap)| match snap.body {
            Body::Joining { serial, .. } => serial <= oldest,
            _ => false,
        });
        let ready: Vec<_> = ready.map(|(key, _)| key).collect();
        for &key in &ready {
            let body = std::mem::replace(&mut self.snaps[key].body, Body::Lost);
            let Body::Joining { level, store, .. } = body else {
                unreachable!("it was looked at above");
            };
            let id = self.levels[level].volume.create_snapshot(*store);
            self.snaps[key].body = Body::Taking { level, id };
            self.touch(level);
        }
        !ready.is_empty()
    }

    fn advance_orders(&mut self) -> bool {
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
        (noflush || self.devices[&id].in_flight == 0) && self.merges_of(id).iter().all(rests)
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
            self.begin_standstill(id);
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

    /// Origins that have become larger, and what that means for their snapshots.
    fn grow_levels(&mut self) {
        let keys: Vec<_> = self.levels.iter().map(|(key, _)| key).collect();
        for key in keys {
            let bytes = self.bytes_of(self.levels[key].origin);
            // One that has become smaller fails where it is no more.
            let _ = self.levels[key].volume.grow_origin(bytes);
        }
        let snaps: Vec<_> = self.snaps.iter().map(|(snap, _)| snap).collect();
        for snap in snaps {
            self.set_lengths(snap);
        }
    }

    /// Whether a snapshot can come to work now.
    fn may_join(&self, key: SnapKey) -> Result<(), Refused> {
        let snap = &self.snaps[key];
        let refuse = |why: &str| Err(Refused::new(Errno::Invalid, why));
        let sharing = self.sharing(snap.origin, snap.cow);
        if let (Some(source), Some(_)) = (sharing.source, sharing.heir) {
            if snap.active {
                return refuse("Unable to resume snapshot source until handover completes.");
            }
            let device = self.device_of(source);
            if !device.is_some_and(|device| self.is_suspended(device)) {
                return refuse("Unable to perform snapshot handover until source is suspended.");
            }
        }
        let level = self.level_of(snap.origin);
        let merging = level.and_then(|key| self.levels[key].volume.merging());
        if let Body::Loaded(_) = snap.body {
            if merging.is_some() {
                return refuse("A snapshot is already merging.");
            }
            if level.is_some_and(|level| self.waits_for_itself(level, snap.cow)) {
                return refuse("COW device lies on what its own origin's snapshots keep");
            }
        }
        if snap.merges {
            let own = snap.place().map(|(_, own)| own);
            self.may_merge_beside(snap.origin, own)?;
        }
        Ok(())
    }

    pub(super) fn level_of(&self, origin: Lower) -> Option<LevelKey> {
        let mut levels = self.levels.iter();
        levels
            .find(|(_, level)| level.origin == origin && !level.is_closing)
            .map(|(key, _)| key)
    }

    /// A snapshot comes to work: by taking over from another, or into its volume.
    fn join(&mut self, key: SnapKey) {
        let snap = &mut self.snaps[key];
        let (origin, cow) = (snap.origin, snap.cow);
        if !snap.active && matches!(snap.body, Body::Heir) {
            match self.sharing(origin, cow).source {
                Some(source) => self.hand_over(source, key),
                None => self.snaps[key].body = Body::Lost,
            }
        }
        let snap = &mut self.snaps[key];
        snap.active = true;
        if let Body::Loaded(_) = snap.body {
            let Body::Loaded(store) = std::mem::replace(&mut snap.body, Body::Lost) else {
                unreachable!("it was looked at");
            };
            let level = self.level_for(origin);
            // What is under way from now on comes to the volume.
            let serial = self.next_serial;
            self.snaps[key].body = Body::Joining {
                level,
                store,
                serial,
            };
        } else if self.snaps[key].merges {
            if let Some((level, _)) = self.snaps[key].place() {
                self.levels[level].volume.resume_merge();
                self.touch(level);
            }
            self.begin_merge(key);
        }
    }

    fn level_for(&mut self, origin: Lower) -> LevelKey {
        if let Some(key) = self.level_of(origin) {
            return key;
        }
        let mut volume = Volume::new(VolumeConfig {
            origin_bytes: self.bytes_of(origin),
            ..self.config
        });
        let bases = self.bases(origin);
        if bases
            .iter()
            .any(|base| matches!(base, super::Base::Snap(_)))
        {
            volume.stand_on_snapshot();
        }
        let order = self.next_level;
        self.next_level += 1;
        let key = self.levels.insert(Level {
            volume,
            origin,
            order,
            is_touched: false,
            is_runnable: false,
            leaving: Vec::new(),
            is_closing: false,
        });
        self.cover_anew();
        key
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

    /// Volumes without snapshots go, once nothing is in flight in them. True: there is
    /// none left.
    fn end_levels(&mut self) -> bool {
        let mut all_needed = true;
        let keys: Vec<_> = self.levels.iter().map(|(key, _)| key).collect();
        for key in keys {
            let level = &self.levels[key];
            let is_needed = self.snaps.iter().any(|(_, snap)| snap.level() == Some(key));
            let rests = level.leaving.is_empty()
                && !level.is_touched
                && !level.is_runnable
                && level.volume.is_idle();
            if is_needed || self.phase != Phase::Open {
                continue;
            }
            if rests {
                self.levels.remove(key);
                self.cover_anew();
            } else {
                all_needed = false;
            }
        }
        all_needed
    }

    /// Answer new requests with [`crate::Failure::ShuttingDown`], let the others end,
    /// commit and flush every store and every disk; then [`MapperEvent::Closed`].
    pub fn close(&mut self) {
        if self.phase != Phase::Open {
            return;
        }
        self.phase = Phase::Closing { ok: true };
        self.pending.clear();
        let ids: Vec<_> = self.devices.keys().copied().collect();
        for id in ids {
            // What queues goes through: nobody is going to resume the device.
            self.release(id);
        }
        self.close_next();
    }

    /// The next volume that no other one still needs.
    fn close_next(&mut self) {
        let open: Vec<_> = self.levels.iter().map(|(key, _)| key).collect();
        let asked: Vec<_> = open.iter().flat_map(|&key| self.asks(key, None)).collect();
        let free = open
            .iter()
            .find(|key| !asked.contains(key))
            .or(open.first());
        if let Some(&key) = free {
            self.levels[key].is_closing = true;
            self.levels[key].volume.close();
            self.touch(key);
        } else if let Phase::Closing { ok } = self.phase {
            self.phase = Phase::Closed;
            self.events.push_back(MapperEvent::Closed(ok));
        }
    }

    /// Whether it is, or has a part of, the view of a snapshot that is lost: that was told
    /// when it came to be, and nothing more can be lost by a flush that fails.
    fn stands_on_lost(&self, lower: Lower) -> bool {
        self.bases(lower).into_iter().any(|base| match base {
            super::Base::Snap(key) => self.snap_status(key) == Status::Invalid,
            _ => false,
        })
    }

    fn on_closed(&mut self, key: LevelKey, well: bool) {
        let stands_on_lost = self.stands_on_lost(self.levels[key].origin);
        if let Phase::Closing { ok } = &mut self.phase {
            *ok &= well || stands_on_lost;
        }
        for (_, snap) in &mut self.snaps {
            if snap.level() == Some(key) {
                snap.body = Body::Lost;
            }
        }
        self.levels.remove(key);
        self.cover_anew();
        self.close_next();
    }
}
