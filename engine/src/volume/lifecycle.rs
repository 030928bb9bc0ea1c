//! How snapshots that existed before come in, and the end of the volume.

use nbdsnap_format::SECTOR_BYTES;

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

/// Why an origin cannot have a new length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrowError {
    /// An origin is whole sectors.
    #[error("the new length is not whole sectors")]
    NotSectors,
    /// It does not shrink.
    #[error("the origin has {bytes} bytes already")]
    Smaller {
        /// Its length.
        bytes: u64,
    },
}

impl Volume {
    /// Take in a snapshot that existed before: a store that was opened. Its length
    /// is that of the origin for which the store was opened: an origin that has
    /// grown since is longer. No request may have been handled yet.
    pub fn attach_snapshot(&mut self, store: Store) -> SnapshotId {
        self.add_snapshot(store, State::Active)
    }

    /// The origin's disk has become larger. Its snapshots keep their lengths, and
    /// what is written behind those is no concern of theirs.
    pub fn grow_origin(&mut self, new_bytes: u64) -> Result<(), GrowError> {
        if !new_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(GrowError::NotSectors);
        }
        let bytes = self.config.origin_bytes;
        if new_bytes < bytes {
            return Err(GrowError::Smaller { bytes });
        }
        self.config.origin_bytes = new_bytes;
        Ok(())
    }

    /// A snapshot is so long from now on, at most as long as the origin: writes behind
    /// its end are no concern of it. One that becomes longer shows there what the
    /// origin holds, whatever was written since its instant.
    ///
    /// What is copied of its last chunk goes on behind its end, as far as the origin
    /// does (`device_bytes`): as the kernel has it, so that stores are the same.
    pub(crate) fn set_snapshot_bytes(&mut self, id: SnapshotId, bytes: u64, device_bytes: u64) {
        let most = self.config.origin_bytes;
        if let Some(index) = self.index_of(id) {
            let snapshot = &mut self.snapshots[index];
            snapshot.origin_bytes = bytes.min(most);
            let behind = device_bytes.min(most).saturating_sub(snapshot.origin_bytes);
            snapshot.copied_behind = behind;
        }
    }

    /// The next snapshot gets this number: where several volumes share one count of
    /// them (`tree`).
    pub(crate) fn number_next_snapshot(&mut self, number: u32) {
        assert!(number >= self.next_snapshot, "no number is given twice");
        self.next_snapshot = number;
    }

    /// There are replies or events to be taken.
    pub(crate) fn has_news(&self) -> bool {
        !self.replies.is_empty() || !self.events.is_empty()
    }

    /// Nothing stands on the origin, is to, or is asked of it here: a request for it
    /// can as well be made around this volume, told of by
    /// [`Volume::change_begins_elsewhere`] if it changes the origin (`tree`).
    pub(crate) fn is_bare(&self) -> bool {
        self.snapshots.is_empty()
            && self.requests.is_empty()
            && self.instants.is_empty()
            && self.queued.is_empty()
            && self.merging().is_none()
            && self.is_open()
    }

    /// A change of the origin that this volume does not perform is under way: instants
    /// wait for its end, and so do a suspension and a close.
    pub(crate) fn change_begins_elsewhere(&mut self) {
        self.origin_mutations += 1;
        self.elsewhere += 1;
    }

    /// It has ended.
    pub(crate) fn change_ended_elsewhere(&mut self) {
        self.origin_mutations -= 1;
        self.elsewhere -= 1;
        self.origin_changes += 1;
    }

    pub(super) fn new_snapshot_id(&mut self) -> SnapshotId {
        let id = SnapshotId(self.next_snapshot);
        self.next_snapshot += 1;
        id
    }

    /// The length of the origin that the store is about.
    pub(super) fn bytes_of(&self, store: &Store) -> u64 {
        let bytes = store.origin_bytes.unwrap_or(self.config.origin_bytes);
        assert!(
            bytes <= self.config.origin_bytes,
            "an origin does not shrink under its snapshots"
        );
        bytes
    }

    pub(super) fn add_snapshot(&mut self, store: Store, state: State) -> SnapshotId {
        let bytes = self.bytes_of(&store);
        let id = self.new_snapshot_id();
        self.snapshots
            .push(Snapshot::new(id, store, state, self.law, bytes));
        id
    }

    /// Answer new requests with [`crate::Failure::ShuttingDown`], and those too
    /// that queue in a suspended volume or wait for room in a store; let the others
    /// that were handed in end, commit and flush every store and the origin, as far as they
    /// were written; then [`Event::Closed`].
    pub fn close(&mut self) {
        if self.phase == Phase::Open {
            self.phase = Phase::Draining;
            self.end_suspension();
            self.fail_instants_to_be_told();
            self.end_pauses();
        }
    }

    pub(super) fn advance_lifecycle(&mut self) {
        self.advance_merge();
        self.advance_suspension();
        self.advance_instant();
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
            && self.elsewhere == 0
            && self.jobs.is_empty()
            && self.instants.is_empty()
            && self.removals.is_empty()
            && self.merge_is_idle()
            && !self.snapshots.iter().any(Snapshot::waits_for_mark)
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
