//! How a merge begins: by an order, with clients at work, or at the start of a
//! volume, where one was cut off.

use super::{Merge, MergeError, Merged, Stage};
use crate::disk::{Action, Device};
use crate::request::{Command, Request, SnapshotId, View};
use crate::snapshot::{Snapshot, State};
use crate::store::{Commit, Store, StoreKind, Unwind};
use crate::volume::active::Doing;
use crate::volume::lifecycle::Phase;
use crate::volume::{Event, Purpose, Volume};

/// A merge that was ordered and has not begun.
#[derive(Debug)]
pub(crate) struct Beginning {
    id: SnapshotId,
    step: Step,
    /// Requests for the snapshot, and flushes of the origin, that came since.
    held: Vec<Request>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Changes of the origin and requests for the snapshot are held; those under
    /// way end, and their exceptions are committed.
    Draining,
    /// The store is flushed, and nobody writes to it.
    Flushing,
}

impl Beginning {
    pub(super) fn id(&self) -> SnapshotId {
        self.id
    }
}

impl Volume {
    /// Roll the origin back to a snapshot. Changes of the origin and requests for
    /// the snapshot are held, those under way end, the store is committed and
    /// flushed; then [`Event::MergeBegun`]: from here on the origin reads as the
    /// snapshot, the snapshot takes no more requests, and what was held goes on
    /// upon the rolled-back origin. It ends with [`Event::Merged`]: the store
    /// holds nothing any more, the origin is durable, and the id is gone. Or with
    /// [`Event::MergeFailed`]: before `MergeBegun`, nothing has happened; after it,
    /// the origin goes on reading as it did, from the two devices, and the merge
    /// can be taken up again by calling this once more, where that makes sense, or
    /// by [`Volume::attach_merging`] at the next start.
    ///
    /// The caller has durably noted the merge before this call (durability.md,
    /// rule 12): after a crash the origin must not be served without its store.
    /// It takes no snapshot of the origin and removes none that merges until the
    /// merge has ended.
    pub fn begin_merge(&mut self, id: SnapshotId) -> Result<(), MergeError> {
        if self.phase != Phase::Open {
            return Err(MergeError::Closing);
        }
        if self.merge_begins.is_some() {
            return Err(MergeError::AlreadyMerging);
        }
        if self.merge.is_some() {
            return self.take_merge_up_again(id);
        }
        let snapshot = self.snapshot(id).filter(|s| s.state != State::Removing);
        let snapshot = snapshot.ok_or(MergeError::NoSuchSnapshot)?;
        if snapshot.kind == StoreKind::Transient {
            return Err(MergeError::Transient);
        }
        if !self.instants.is_empty() {
            return Err(MergeError::InstantUnderWay);
        }
        if !snapshot.is_readable() {
            return Err(MergeError::NotReadable);
        }
        self.holding = true;
        self.merge_begins = Some(Beginning {
            id,
            step: Step::Draining,
            held: Vec::new(),
        });
        // Its writes that wait for room are not worth holding the origin for.
        let index = self.index_of(id).expect("it was looked at above");
        self.wake_paused(index);
        Ok(())
    }

    /// A merge that has failed is tried again, unless a flush has failed: no later
    /// one would say what is lost.
    fn take_merge_up_again(&mut self, id: SnapshotId) -> Result<(), MergeError> {
        let origin_failed = self.origin_flush_failed();
        let merge = self.merge.as_mut().expect("there is one");
        if merge.id != id || !matches!(merge.stage, Stage::Failed) {
            return Err(MergeError::AlreadyMerging);
        }
        if origin_failed || merge.lane.has_failed() || !merge.doubtful.is_empty() {
            return Err(MergeError::Failed);
        }
        merge.stage = Stage::Resting;
        Ok(())
    }

    /// Go on with a merge that a crash, a close or the kernel has cut off. No
    /// request may have been handled yet: from the start the origin reads as the
    /// snapshot, and there is no [`Event::MergeBegun`]. The store must be a
    /// persistent one that can be read ([`Store::is_invalid`]).
    pub fn attach_merging(&mut self, store: Store) -> SnapshotId {
        assert!(
            store.kind != StoreKind::Transient && !store.invalid,
            "what is merged is a persistent store that can be read"
        );
        assert!(self.merging().is_none(), "an origin has one merge");
        let bytes = self.bytes_of(&store);
        let id = self.new_snapshot_id();
        self.merge = Some(Merge::new(Merged {
            id,
            chunk_size: store.chunk_size(),
            unwind: Unwind::new(store.layout, store.table.len()),
            limit: store.size.limit,
            bytes,
            table: store.table,
        }));
        id
    }

    /// Whether a request waits for a merge to begin: all for the snapshot, and
    /// flushes of the origin. (Changes of the origin are held as for an instant,
    /// and its reads go on.)
    pub(in crate::volume) fn hold_for_merge(&mut self, request: Request) -> Option<Request> {
        let Some(beginning) = &mut self.merge_begins else {
            return Some(request);
        };
        let is_held = match request.view {
            View::Origin => matches!(request.command, Command::Flush),
            View::Snapshot(id) => id == beginning.id,
        };
        if !is_held {
            return Some(request);
        }
        beginning.held.push(request);
        None
    }

    /// Whether the snapshot is about to become a part of the origin.
    pub(in crate::volume) fn merge_holds(&self, id: SnapshotId) -> bool {
        (self.merge_begins.as_ref()).is_some_and(|beginning| beginning.id == id)
    }

    pub(super) fn advance_merge_begin(&mut self) {
        let Some(&Beginning { id, step, .. }) = self.merge_begins.as_ref() else {
            return;
        };
        let Some(index) = self.index_of(id) else {
            return self.merge_not_begun(id);
        };
        if !self.snapshots[index].is_readable() {
            return self.merge_not_begun(id);
        }
        match step {
            Step::Draining if self.is_drained_for_merge(index) => {
                let snapshot = &mut self.snapshots[index];
                let commit = snapshot.commit.as_mut().expect("the store is persistent");
                commit.flush_begun();
                snapshot.is_flushing = true;
                snapshot.flushing = std::mem::take(&mut snapshot.until_flushed);
                self.emit(Device::Cow(id), Action::Flush, Purpose::StoreFlush(id));
                let beginning = self.merge_begins.as_mut().expect("it was looked at above");
                beginning.step = Step::Flushing;
            }
            Step::Flushing if self.is_drained_for_merge(index) => {
                let commit = self.snapshots[index].commit.as_ref();
                if commit.is_some_and(Commit::is_durable) {
                    return self.merge_begun(index);
                }
                // A held write of the origin had its chunks copied meanwhile.
                let beginning = self.merge_begins.as_mut().expect("it was looked at above");
                beginning.step = Step::Draining;
                self.advance_merge_begin();
            }
            Step::Draining | Step::Flushing => {}
        }
    }

    /// Nothing changes the origin or speaks of the snapshot any more.
    fn is_drained_for_merge(&self, index: usize) -> bool {
        let snapshot = &self.snapshots[index];
        let id = snapshot.id;
        let mut requests = self.requests.iter().map(|(_, active)| active);
        // A FUA whose write was before the rollback is not to be answered after it.
        let flushes = requests.any(|r| r.view == View::Origin && matches!(r.doing, Doing::Flush));
        self.origin_mutations == 0
            && !flushes
            && snapshot.pending.is_empty()
            && snapshot.commit.as_ref().is_some_and(Commit::is_settled)
            && !self.is_in_use(id)
    }

    /// The first instant: the snapshot becomes a part of the origin.
    fn merge_begun(&mut self, index: usize) {
        let snapshot = self.snapshots.remove(index);
        let Snapshot {
            id,
            chunk_size,
            table,
            ..
        } = snapshot;
        let commit = snapshot.commit.expect("the store is persistent");
        assert!(
            commit.is_durable(),
            "a merge begins with a list that is durable"
        );
        self.merge = Some(Merge::new(Merged {
            id,
            chunk_size,
            unwind: Unwind::new(snapshot.layout, commit.committed()),
            limit: snapshot.allocator.limit(),
            bytes: snapshot.origin_bytes,
            table,
        }));
        // Nobody needs anything of it any more.
        let waiting = (snapshot.until_published.into_values())
            .chain(snapshot.until_durable.into_values())
            .flatten()
            .chain(snapshot.until_grown)
            .chain(snapshot.until_extended)
            .chain(snapshot.until_invalid);
        self.wake(waiting);
        self.begin_mutations_anew();
        self.events.push_back(Event::MergeBegun(id));
        self.end_merge_begin();
    }

    /// Mutations of the origin that are not answered come after the rollback. Those
    /// that wait for room have been written in part, and that part is gone with all
    /// else: they begin again.
    fn begin_mutations_anew(&mut self) {
        let window = self.window;
        let requests = self.requests.iter_mut().map(|(_, active)| active);
        for active in requests.filter(|active| active.view == View::Origin) {
            if let Doing::Mutate(mutation) = &mut active.doing {
                assert!(!mutation.begun, "what had begun has ended");
                let first_end = mutation.offset.saturating_add(window);
                mutation.window = (mutation.offset, mutation.end.min(first_end));
            }
        }
    }

    /// The snapshot was lost before its merge began.
    fn merge_not_begun(&mut self, id: SnapshotId) {
        let why = "the snapshot was lost before it could be merged";
        self.events.push_back(Event::MergeFailed(id, why));
        self.end_merge_begin();
    }

    /// Let go what was held.
    fn end_merge_begin(&mut self) {
        let Beginning { held, .. } = self.merge_begins.take().expect("a merge is beginning");
        self.release();
        for request in held {
            self.admit(request);
        }
    }
}
