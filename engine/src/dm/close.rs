//! The end of it all: volume after volume closes, those first that no other one stands
//! on, and then every disk is flushed.

use super::route::Asked;
use super::snap::Body;
use super::{LevelKey, Mapper, MapperEvent, Phase};

impl Mapper {
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
        }
        self.close_on();
    }

    /// Once every volume has closed and what goes around them has ended, the disks follow.
    pub(super) fn close_on(&mut self) {
        if matches!(self.phase, Phase::Closing { .. })
            && self.levels.is_empty()
            && !self.has_under_way()
        {
            self.flush_disks();
        }
    }

    /// Whether or not anything was written by this mapper: a server that was killed
    /// before it may have left answered writes in the page cache.
    fn flush_disks(&mut self) {
        let disks: Vec<_> = self.disks.keys().copied().collect();
        self.phase = Phase::Flushing {
            left: disks.len(),
            ok: !matches!(self.phase, Phase::Closing { ok: false }),
        };
        for disk in disks {
            self.flush_disk(disk, Asked::by_close());
        }
        self.end_if_flushed();
    }

    /// One of the last flushes has ended.
    pub(super) fn closing_flush_ended(&mut self, well: bool) {
        if let Phase::Flushing { left, ok } = &mut self.phase {
            *left -= 1;
            *ok &= well;
        }
        self.end_if_flushed();
    }

    fn end_if_flushed(&mut self) {
        if let Phase::Flushing { left: 0, ok } = self.phase {
            self.phase = Phase::Closed;
            self.events.push_back(MapperEvent::Closed(ok));
        }
    }

    pub(super) fn on_closed(&mut self, key: LevelKey, well: bool) {
        let bases = self.bases(self.levels[key].origin);
        let nothing_to_save = bases.into_iter().any(|base| self.is_lost(base));
        if let Phase::Closing { ok } = &mut self.phase {
            *ok &= well || nothing_to_save;
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
