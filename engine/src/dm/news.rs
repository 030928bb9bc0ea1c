//! What volumes have to tell: their replies go up, their events become the mapper's,
//! and whoever waits for either goes on.

use super::snap::Body;
use super::{DeviceId, LevelKey, Mapper, MapperEvent, SnapKey};
use crate::request::SnapshotId;
use crate::volume::Event;

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

    pub(super) fn snap_at(&self, key: LevelKey, id: SnapshotId) -> Option<SnapKey> {
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
            Event::Invalid(id, why) => {
                self.tell(key, id, |device| MapperEvent::Invalid(device, why));
            }
            Event::Unmarked(id, why) => {
                self.tell(key, id, |device| MapperEvent::Unmarked(device, why));
            }
            // There is no list of what devices' stores are worth: tables come and go, and
            // may name slices of whatever. So the origin waits for the operator.
            Event::MarkLost(id, _) => {
                let marked = !self.law.mark_or_refuse();
                self.levels[key].volume.marked_lost(id, marked);
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
        let is_loss = matches!(event, MapperEvent::Invalid(..) | MapperEvent::Unmarked(..));
        if let Some(device) = self.devices.get_mut(&device).filter(|_| is_loss) {
            device.event_nr += 1;
        }
        self.events.push_back(event);
    }
}
