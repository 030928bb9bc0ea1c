//! Stores that fill: the warnings on the way, what happens to the write that
//! finds no room, and the extension that makes room again.

use super::lifecycle::Phase;
use super::origin_write::Writer;
use super::task::TaskId;
use super::{Event, Volume};
use crate::request::{Failure, SnapshotId};
use crate::snapshot::State;

/// What happens when a write needs a chunk of a store that is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFull {
    /// What the kernel does: an origin write goes on and the snapshot becomes
    /// Invalid; so it does at a write of its own, but if the store is PO: that
    /// overflows.
    #[default]
    Invalidate,
    /// The write waits until the store is extended or the snapshot removed;
    /// whatever needs no room goes on.
    Pause,
    /// The write fails with [`Failure::NoSpace`], and the snapshot lives.
    Error,
}

/// Why a store cannot be extended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExtendError {
    /// There is none of that name, or it is being removed.
    #[error("there is no such snapshot")]
    NoSuchSnapshot,
    /// The snapshot is lost: room does not help it.
    #[error("the snapshot is invalid")]
    Invalid,
    /// The store may become larger than that already.
    #[error("the store may grow to {limit} bytes already")]
    Smaller {
        /// Its limit.
        limit: u64,
    },
}

/// Where [`Event::Filling`] is said, in percent of the limit.
pub(crate) const FILLING: [u8; 3] = [50, 80, 95];

impl Volume {
    /// Let a snapshot's store become as large as `limit_bytes`, whole sectors of
    /// them, and let go on what waits for room. A file grows to there by
    /// [`crate::Action::Grow`]; a store of fixed size ([`crate::StoreSize::step`])
    /// is that large already, the caller says. An Overflowed snapshot stays so, as
    /// the kernel's does.
    pub fn extend_snapshot(&mut self, id: SnapshotId, limit_bytes: u64) -> Result<(), ExtendError> {
        let index = self.index_of(id).ok_or(ExtendError::NoSuchSnapshot)?;
        let snapshot = &mut self.snapshots[index];
        match snapshot.state {
            State::Removing => return Err(ExtendError::NoSuchSnapshot),
            State::Invalidating(_) | State::Invalid | State::Unmarked => {
                return Err(ExtendError::Invalid);
            }
            State::Creating | State::Active | State::Overflowed => {}
        }
        let limit = snapshot.allocator.limit();
        if !snapshot.allocator.extend(limit_bytes) {
            return Err(ExtendError::Smaller { limit });
        }
        snapshot.full = false;
        snapshot.filling_said = snapshot.filling();
        self.wake_paused(index);
        Ok(())
    }

    /// Choose what a full store means from now on, for the writes that wait too.
    /// A snapshot that is gone is none of its business.
    pub fn set_on_full(&mut self, id: SnapshotId, on_full: OnFull) {
        if let Some(index) = self.index_of(id) {
            self.snapshots[index].on_full = on_full;
            self.wake_paused(index);
        }
    }

    /// With [`OnFull::Invalidate`]: a write to the snapshot that finds its store full
    /// leaves it readable, or does not, whatever kind the store was made as.
    pub(crate) fn set_overflows(&mut self, id: SnapshotId, overflows: bool) {
        if let Some(index) = self.index_of(id) {
            self.snapshots[index].overflows = overflows;
        }
    }

    /// Let whoever waits for room in the store look again.
    pub(super) fn wake_paused(&mut self, index: usize) {
        let paused = std::mem::take(&mut self.snapshots[index].until_extended);
        self.wake(paused);
    }

    /// The volume closes: nobody is going to extend its stores.
    pub(super) fn end_pauses(&mut self) {
        for index in 0..self.snapshots.len() {
            self.wake_paused(index);
        }
    }

    /// An origin write, with `task` waiting for what it needs, found the store full.
    pub(super) fn origin_write_found_no_space(
        &mut self,
        index: usize,
        writer: Writer,
        task: TaskId,
    ) {
        let on_full = self.snapshots[index].on_full;
        let request = match (on_full, writer) {
            (OnFull::Invalidate, _) => return self.invalidate(index, "its store is full"),
            (_, Writer::Client(request)) => request,
            (_, Writer::Merge) => {
                // Nobody can be told that it failed.
                self.merge_pauses();
                return self.pause(index, task);
            }
        };
        match on_full {
            OnFull::Invalidate => unreachable!("handled above"),
            OnFull::Pause if self.phase == Phase::Open => {
                self.pause(index, task);
                // It does not keep others waiting: an instant that comes meanwhile
                // shows what it has written so far.
                let begun = std::mem::replace(&mut self.mutation_mut(request).begun, false);
                self.origin_mutations -= u64::from(begun);
            }
            OnFull::Pause => self.requests[request].failure = Some(Failure::ShuttingDown),
            OnFull::Error => {
                self.say_full(index);
                self.requests[request].failure = Some(Failure::NoSpace);
            }
        }
    }

    /// Make the task wait until there may be room.
    pub(super) fn pause(&mut self, index: usize, task: TaskId) {
        self.say_full(index);
        self.snapshots[index].until_extended.push(task);
        self.tasks[task.0].waits += 1;
    }

    pub(super) fn say_full(&mut self, index: usize) {
        let snapshot = &mut self.snapshots[index];
        if !std::mem::replace(&mut snapshot.full, true) {
            self.events.push_back(Event::Full(snapshot.id));
        }
    }

    /// The store has been allocated from, or its limit has come down.
    pub(super) fn note_filling(&mut self, index: usize) {
        let snapshot = &mut self.snapshots[index];
        let reached = snapshot.filling();
        for percent in FILLING.iter().take(reached).skip(snapshot.filling_said) {
            self.events.push_back(Event::Filling(snapshot.id, *percent));
        }
        snapshot.filling_said = snapshot.filling_said.max(reached);
    }
}
