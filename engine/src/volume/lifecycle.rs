//! The instants of snapshots, and the end of the volume.

use super::flush::Waiter;
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

/// A snapshot on its way to its instant.
#[derive(Debug)]
pub(crate) struct Creation {
    id: SnapshotId,
    step: Step,
}

#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Waits for the one before it.
    Queued,
    /// The origin is flushed while its clients go on, so that the second flush
    /// finds little to do. With the count of changes when it was asked for.
    FirstFlush(u64),
    /// New origin writes are held; those under way end.
    Draining(u64),
    /// The origin is flushed, and nobody writes to it.
    SecondFlush,
}

impl Volume {
    /// Take in a snapshot that existed before: a store that was opened. No
    /// request may have been handled yet.
    pub fn attach_snapshot(&mut self, store: Store) -> SnapshotId {
        self.add_snapshot(store, State::Active)
    }

    /// Take a snapshot now, into a store that was made for it: flush the origin,
    /// hold new writes to it, drain those in flight, flush again, release. What
    /// was answered before this call is in the snapshot; what is handed in after
    /// [`Event::Created`] is not. Ends with that event or with
    /// [`Event::CreateFailed`].
    pub fn create_snapshot(&mut self, store: Store) -> SnapshotId {
        assert!(!store.invalid, "a snapshot is taken into a good store");
        assert!(
            self.merging().is_none(),
            "no snapshot is taken of an origin that is merging"
        );
        let id = self.add_snapshot(store, State::Creating);
        self.creations.push_back(Creation {
            id,
            step: Step::Queued,
        });
        id
    }

    pub(super) fn new_snapshot_id(&mut self) -> SnapshotId {
        let id = SnapshotId(self.next_snapshot);
        self.next_snapshot += 1;
        id
    }

    fn add_snapshot(&mut self, store: Store, state: State) -> SnapshotId {
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
        }
    }

    pub(super) fn advance_lifecycle(&mut self) {
        self.advance_creation();
        self.advance_merge();
        if self.phase == Phase::Draining && self.is_drained() {
            self.begin_last_flushes();
        }
    }

    fn advance_creation(&mut self) {
        let Some(creation) = self.creations.front_mut() else {
            return;
        };
        match creation.step {
            Step::Queued if self.law.flush_before_snapshot() => {
                creation.step = Step::FirstFlush(self.origin_changes);
                self.origin_flush.waiting.push(Waiter::Creation);
                // Begun by the next round of coming to rest.
                self.begin_origin_flush();
            }
            Step::Queued => self.begin_drain(self.origin_changes),
            Step::Draining(_) => self.end_drain(),
            Step::FirstFlush(_) | Step::SecondFlush => {}
        }
    }

    /// A flush that a creation was waiting for has ended.
    pub(super) fn creation_flushed(&mut self, ok: bool) {
        let creation = self.creations.front().expect("it waits for this flush");
        match creation.step {
            _ if !ok => self.end_creation(false),
            Step::FirstFlush(changes) => self.begin_drain(changes),
            Step::SecondFlush => self.end_creation(true),
            Step::Queued | Step::Draining(_) => unreachable!("it did not ask for a flush"),
        }
    }

    fn begin_drain(&mut self, changes: u64) {
        let creation = self.creations.front_mut().expect("a creation is under way");
        creation.step = Step::Draining(changes);
        self.holding = self.law.drain_before_snapshot();
        self.end_drain();
    }

    /// If no write is under way any more, flush what they left, and be done.
    fn end_drain(&mut self) {
        if self.law.drain_before_snapshot() && self.origin_mutations > 0 {
            return;
        }
        let creation = self.creations.front_mut().expect("a creation is under way");
        let Step::Draining(changes) = creation.step else {
            unreachable!("it drains");
        };
        if changes == self.origin_changes || !self.law.flush_before_snapshot() {
            return self.end_creation(!self.origin_flush_failed());
        }
        creation.step = Step::SecondFlush;
        self.origin_flush.waiting.push(Waiter::Creation);
        self.begin_origin_flush();
    }

    /// The instant: nothing is in flight, and what the snapshot shows is durable.
    fn end_creation(&mut self, ok: bool) {
        let Creation { id, .. } = self.creations.pop_front().expect("a creation is under way");
        let index = self.index_of(id).expect("it was added when it was begun");
        self.events.push_back(if ok {
            self.snapshots[index].state = State::Active;
            Event::Created(id)
        } else {
            self.snapshots.remove(index);
            Event::CreateFailed(id)
        });
        self.release();
        self.advance_creation();
    }

    /// The origin is held no longer: on with what waits.
    pub(super) fn release(&mut self) {
        self.holding = false;
        for request in std::mem::take(&mut self.held) {
            self.admit(request);
        }
    }

    /// Whether a snapshot of the origin is on its way to its instant.
    pub(super) fn is_taking_instants(&self) -> bool {
        !self.creations.is_empty()
    }

    /// Everything that was begun has ended, but for flushes that nobody waits for.
    fn is_drained(&self) -> bool {
        let settled = |s: &Snapshot| s.commit.as_ref().is_none_or(Commit::is_settled);
        self.requests.is_empty()
            && self.in_flight.is_empty()
            && self.jobs.is_empty()
            && self.creations.is_empty()
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
