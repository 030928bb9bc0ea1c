//! How snapshots that existed before come in, and the end of the volume.

use super::{Event, Purpose, Volume};
use crate::disk::{Action, Device};
use crate::request::SnapshotId;
use crate::snapshot::{Snapshot, State};
use crate::store::{Commit, Store};

/// Where the volume is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// It takes requests.
    Open,
    /// It takes none, and ends those that it has.
    Draining,
    /// The last flushes are running: how many, and whether all went well.
    Flushing { left: u32, ok: bool },
    /// Nothing happens any more.
    Closed,
}

impl Volume {
    /// Take in a snapshot that existed before: a store that was opened. No
    /// request may have been handled yet.
    pub fn attach_snapshot(&mut self, store: Store) -> SnapshotId {
        self.add_snapshot(store, State::Active)
    }

    pub(super) fn new_snapshot_id(&mut self) -> SnapshotId {
        let id = SnapshotId(self.next_snapshot);
        self.next_snapshot += 1;
        id
    }

    pub(super) fn add_snapshot(&mut self, store: Store, state: State) -> SnapshotId {
        let id = self.new_snapshot_id();
        self.snapshots
            .push(Snapshot::new(id, store, state, self.law));
        id
    }

    /// Answer new requests with [`crate::Failure::ShuttingDown`], let those
    /// handed in end, commit and flush every store and the origin, as far as they
    /// were written; then [`Event::Closed`].
    pub fn close(&mut self) {
        if self.phase == Phase::Open {
            self.phase = Phase::Draining;
            self.fail_instants_to_be_told();
        }
    }

    pub(super) fn advance_lifecycle(&mut self) {
        self.advance_instant();
        self.advance_merge();
        self.end_removals();
        if self.phase == Phase::Draining && self.is_drained() {
            self.begin_last_flushes();
        }
    }

    /// Everything that was begun has ended, but for flushes that nobody waits for.
    fn is_drained(&self) -> bool {
        let settled = |s: &Snapshot| s.commit.as_ref().is_none_or(Commit::is_settled);
        self.requests.is_empty()
            && self.in_flight.is_empty()
            && self.jobs.is_empty()
            && self.instants.is_empty()
            && self.removals.is_empty()
            && self.merge_is_idle()
            && self.snapshots.iter().all(settled)
    }

    fn begin_last_flushes(&mut self) {
        let mut left = 0;
        for index in 0..self.snapshots.len() {
            let snapshot = &mut self.snapshots[index];
            let id = snapshot.id;
            if let Some(commit) = &mut snapshot.commit
                && snapshot.touched
            {
                commit.flush_begun();
                self.emit(Device::Cow(id), Action::Flush, Purpose::CloseFlush);
                left += 1;
            }
        }
        let (merging, merge_ok) = self.last_flush_of_merge();
        if let Some(store) = merging {
            self.emit(store, Action::Flush, Purpose::CloseFlush);
            left += 1;
        }
        let mut ok = !self.origin_flush_failed();
        if ok {
            // Whether or not this volume wrote: one that was killed before it may
            // have left answered writes in the page cache.
            self.emit(Device::Origin, Action::Flush, Purpose::CloseFlush);
            left += 1;
        }
        ok &= merge_ok;
        ok &= self.snapshots.iter().all(|s| s.state != State::Unmarked);
        self.phase = Phase::Flushing { left, ok };
        self.end_if_flushed();
    }

    pub(super) fn close_flush_ended(&mut self, ended_well: bool) {
        let Phase::Flushing { left, ok } = &mut self.phase else {
            unreachable!("the last flushes are running");
        };
        *left -= 1;
        *ok &= ended_well;
        self.end_if_flushed();
    }

    fn end_if_flushed(&mut self) {
        if let Phase::Flushing { left: 0, ok } = self.phase {
            self.phase = Phase::Closed;
            self.events.push_back(Event::Closed(ok));
        }
    }
}
