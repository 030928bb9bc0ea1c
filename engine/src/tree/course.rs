//! The whole tree is suspended, resumed and closed. A level comes to rest after
//! those above it: what they still write and flush goes through it.

use super::{LevelKey, Tree};
use crate::request::Failure;
use crate::store::Status;
use crate::volume::{Event, OnFull};

/// Where the tree is going.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Course {
    /// It takes requests.
    Open,
    /// They queue, and level after level comes to a standstill; `ok` if all that
    /// was flushed so far could be.
    Suspending { ok: bool },
    /// Every level stands still.
    Suspended,
    /// Requests are refused, and level after level closes.
    Closing { ok: bool },
    /// Nothing happens any more.
    Closed,
}

impl Course {
    pub(super) fn is_open(self) -> bool {
        self == Self::Open
    }

    pub(super) fn stands_still(self) -> bool {
        matches!(self, Self::Suspending { .. } | Self::Suspended)
    }

    pub(super) fn ends(self) -> bool {
        matches!(self, Self::Closing { .. } | Self::Closed)
    }
}

impl Tree {
    /// Let new requests queue, those in flight end, and flush every store and the
    /// disk; then [`Event::Suspended`]. See [`crate::Volume::suspend`].
    pub fn suspend(&mut self) {
        if self.course.is_open() {
            self.course = Course::Suspending { ok: true };
            self.begin_course();
        }
    }

    /// Let everything go on. See [`crate::Volume::resume`].
    pub fn resume(&mut self) {
        if self.course.stands_still() {
            self.resume_levels();
            self.course = Course::Open;
            for request in std::mem::take(&mut self.queued) {
                self.admit(request);
            }
        }
    }

    fn resume_levels(&mut self) {
        // A standstill that was reached and not announced yet is none.
        self.settle();
        let keys: Vec<_> = self.levels.iter().map(|(key, _)| key).collect();
        for key in keys {
            self.levels[key].volume.resume();
            self.touch(key);
        }
    }

    /// Answer new requests, and those that queue in a suspended tree, with
    /// [`Failure::ShuttingDown`]; let the others end, commit and flush every store
    /// and the disk; then [`Event::Closed`]. A write that waits for room in a store
    /// fails, with [`Failure::NoSpace`] or [`Failure::ShuttingDown`].
    pub fn close(&mut self) {
        if self.course.ends() {
            return;
        }
        if self.course.stands_still() {
            self.resume_levels();
            for request in std::mem::take(&mut self.queued) {
                self.reply(request.id, Err(Failure::ShuttingDown));
            }
        }
        // Levels above would wait for these writes for ever.
        let ids: Vec<_> = self.nodes.keys().copied().collect();
        for id in ids {
            let pauses = |info: crate::SnapshotInfo| info.on_full == OnFull::Pause;
            if self.snapshot_info(id).is_some_and(pauses) {
                self.set_on_full(id, OnFull::Error);
            }
        }
        self.course = Course::Closing { ok: true };
        self.begin_course();
    }

    /// Every level is to come where the course leads: those first that nothing
    /// stands on.
    fn begin_course(&mut self) {
        for (_, level) in &mut self.levels {
            level.waits_for = 0;
            level.has_arrived = false;
        }
        let keys: Vec<_> = self.levels.iter().map(|(key, _)| key).collect();
        for &key in &keys {
            if let Some(below) = self.levels[key].below {
                self.levels[below.level].waits_for += 1;
            }
        }
        for key in keys {
            if self.levels[key].waits_for == 0 {
                self.send(key);
            }
        }
    }

    fn send(&mut self, key: LevelKey) {
        let volume = &mut self.levels[key].volume;
        match self.course {
            Course::Suspending { .. } => volume.suspend(),
            Course::Closing { .. } => volume.close(),
            Course::Open | Course::Suspended | Course::Closed => {
                unreachable!("there is nowhere to go")
            }
        }
        self.touch(key);
    }

    /// A level has come where the course leads (or has gone for good), and so has
    /// everything above it.
    pub(super) fn arrived(&mut self, key: LevelKey, ended_well: bool) {
        // A snapshot that is gone or lost has nothing left that a flush could save.
        let well = ended_well || self.is_gone_or_lost(key);
        let (Course::Suspending { ok } | Course::Closing { ok }) = &mut self.course else {
            return;
        };
        *ok &= well;
        let level = &mut self.levels[key];
        if std::mem::replace(&mut level.has_arrived, true) {
            return;
        }
        match level.below {
            Some(below) => {
                let under = &mut self.levels[below.level];
                under.waits_for -= 1;
                if under.waits_for == 0 {
                    self.send(below.level);
                }
            }
            None => self.end_course(),
        }
    }

    fn is_gone_or_lost(&self, key: LevelKey) -> bool {
        let level = &self.levels[key];
        level.is_orphan
            || level.below.is_some_and(|below| {
                let under = &self.levels[below.level].volume;
                under.status(below.snapshot) == Some(Status::Invalid)
            })
    }

    fn end_course(&mut self) {
        match self.course {
            Course::Suspending { ok } => {
                self.course = Course::Suspended;
                self.events.push_back(Event::Suspended(ok));
            }
            Course::Closing { ok } => {
                self.course = Course::Closed;
                self.events.push_back(Event::Closed(ok));
            }
            Course::Open | Course::Suspended | Course::Closed => {
                unreachable!("there was somewhere to go")
            }
        }
    }
}
