//! Snapshots leave while the volume is in use.
//!
//! A store that is being removed takes part in nothing from the call on: no
//! operation on it begins, and no origin write asks it for a copy. What is in
//! flight ends first, so that whoever is told of the end may delete the file or
//! give it to somebody else.

use super::{Event, Purpose, Volume};
use crate::request::{SnapshotId, View};
use crate::snapshot::State;

impl Volume {
    /// Remove a snapshot, whatever its state. New requests for it are answered
    /// with [`crate::Failure::NoSuchView`], those that wait with that or with
    /// [`crate::Failure::Io`]; what is in flight ends; then [`Event::Removed`], and
    /// the device is gone. Origin writes that waited for it go on at once: the
    /// caller has durably noted before that the store is no snapshot of this
    /// origin any more (durability.md, rule 7).
    ///
    /// A snapshot whose instant has not been taken leaves its instant. One that is
    /// being removed, or is gone already, stays what it is. A removal that meets
    /// the last flushes of [`Volume::close`] ends after them.
    pub fn remove_snapshot(&mut self, id: SnapshotId) {
        let Some(index) = self.index_of(id) else {
            return;
        };
        match self.snapshots[index].state {
            State::Removing => return,
            State::Creating => self.leave_instant(id),
            State::Active
            | State::Overflowed
            | State::Invalidating(_)
            | State::Invalid
            | State::Unmarked => {}
        }
        self.snapshots[index].state = State::Removing;
        let origin_writes = self.forsake(index);
        let unmarked = std::mem::take(&mut self.snapshots[index].until_invalid);
        self.wake(origin_writes.into_iter().chain(unmarked));
        self.removals.push(id);
    }

    /// Let the snapshots go that nothing is in flight for any more.
    pub(super) fn end_removals(&mut self) {
        let mut at = 0;
        while at < self.removals.len() {
            let id = self.removals[at];
            if self.law.drain_before_removed() && self.is_in_use(id) {
                at += 1;
                continue;
            }
            self.removals.remove(at);
            let index = self.index_of(id).expect("a removal ends once");
            self.snapshots.remove(index);
            self.events.push_back(Event::Removed(id));
        }
    }

    /// Whether a request, a copy or an operation speaks of the snapshot. Looked
    /// for instead of counted: removals are rare and short.
    pub(super) fn is_in_use(&self, id: SnapshotId) -> bool {
        let asked = |view: View| view == View::Snapshot(id);
        self.requests.iter().any(|(_, request)| asked(request.view))
            || self.jobs.iter().any(|(_, job)| job.is_for(id))
            || self.in_flight.iter().any(|(_, purpose)| match *purpose {
                Purpose::AreaWrite(other)
                | Purpose::NextArea(other)
                | Purpose::StoreFlush(other)
                | Purpose::InvalidHeader(other)
                | Purpose::InvalidFlush(other)
                | Purpose::Grow(other) => other == id,
                Purpose::CloseFlush => true,
                // Of a request or a copy, which have been asked already.
                Purpose::ClientRead { .. }
                | Purpose::ClientWrite(_)
                | Purpose::CopyRead(_)
                | Purpose::CopyWrite(_)
                | Purpose::OriginFlush
                // Of a merging store, which is no snapshot any more.
                | Purpose::MergedRead { .. }
                | Purpose::MergedWrite { .. }
                | Purpose::MergeTail
                | Purpose::PieceRead(_)
                | Purpose::PieceWrite(_)
                | Purpose::MergeEntries
                | Purpose::MergeFlush => false,
            })
    }
}
