//! Snapshots come to work, in the volume of what they are taken of: with an instant of
//! their own, by taking over from another, or to be merged. Volumes come with the first
//! of their snapshots, and go after the last.

use super::orders::{Errno, Refused};
use super::snap::Body;
use super::{Base, Level, LevelKey, Lower, Mapper, Phase, SnapKey};
use crate::request::SnapshotId;
use crate::volume::{Volume, VolumeConfig};

impl Mapper {
    /// Whether a snapshot can come to work now.
    pub(super) fn may_join(&self, key: SnapKey) -> Result<(), Refused> {
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
    pub(super) fn join(&mut self, key: SnapKey) {
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
        #[cfg(feature = "mutants")]
        volume.set_law(self.law);
        if let Some((window, merge_step)) = self.steps {
            volume.set_window(window);
            volume.set_merge_step(merge_step);
        }
        let bases = self.bases(origin);
        if bases.iter().any(|base| matches!(base, Base::Snap(_))) {
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

    /// Those whose volume has nothing under way from before them take their instant.
    pub(super) fn join_snaps(&mut self) -> bool {
        let oldest = match self.under_way.keys().next() {
            Some(&oldest) if self.law.drain_before_joining() => oldest,
            _ => u64::MAX,
        };
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

    pub(super) fn on_joined(&mut self, key: LevelKey, id: SnapshotId) {
        let Some(snap) = self.snap_at(key, id) else {
            return;
        };
        self.snaps[snap].body = Body::There { level: key, id };
        self.set_lengths(snap);
        self.set_overflow(snap);
        if self.snaps[snap].merges {
            self.begin_merge(snap);
        }
    }

    pub(super) fn begin_merge(&mut self, snap: SnapKey) {
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

    /// Origins that have become larger, and what that means for their snapshots.
    pub(super) fn grow_levels(&mut self) {
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

    /// Volumes without snapshots go, once nothing is in flight in them. True: there is
    /// none left.
    pub(super) fn end_levels(&mut self) -> bool {
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
}
