//! Merges: the origin is rolled back to one of its snapshots, in place and while
//! clients use it. From the first instant ([`Event::MergeBegun`]) the origin
//! reads as the snapshot; what the snapshot's store holds is copied behind that.
//!
//! A merging store is no snapshot any more: nobody asks it for copies, and
//! nothing is ever allocated in it. It is a part of the origin. Until a chunk is
//! merged its content lies in the store, is read from there, and is written
//! there in place. Other chunks of the origin are as ever. For the other
//! snapshots a merge is a writer of the origin like any other: they have their
//! durable copies first (durability.md, rule 12), and what they copy is the
//! origin's device, not its view.
//!
//! The layout has no mark for a merge: the caller makes one durable before it
//! begins one, and takes it away after [`Event::Merged`]. With the mark,
//! [`Volume::attach_merging`] goes on with a merge that was cut off at any moment.
//!
//! - `begin.rs`: from the order to the first instant;
//! - `step.rs`: a few exceptions at a time, from the end of the list;
//! - `view.rs`: what clients of the origin read, write and flush meanwhile.

mod begin;
mod step;
mod view;

use nbdsnap_format::ChunkSize;
use slab::Slab;

pub(crate) use begin::Beginning;
use step::Stage;
pub(crate) use step::{Piece, PieceKey};

use super::flush::Lane;
use super::{Event, Volume};
use crate::in_flight::Ranges;
use crate::request::SnapshotId;
use crate::store::{Status, Unwind};
use crate::table::ExceptionTable;

/// How far a merge has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MergeProgress {
    /// Chunks that the store still holds.
    pub left_chunks: u64,
    /// Chunks that it held when the merge began, or was taken up again.
    pub total_chunks: u64,
    /// It waits until another snapshot's store has room ([`crate::OnFull`]): a merge
    /// that finds none waits for it where a client's write would wait or fail.
    pub waits_for_room: bool,
}

/// Why a merge was not begun. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MergeError {
    /// There is no such snapshot.
    #[error("there is no such snapshot")]
    NoSuchSnapshot,
    /// It is not there yet, or it is lost.
    #[error("the snapshot cannot be read")]
    NotReadable,
    /// A transient store has no list that would survive a crash in the middle.
    #[error("a transient snapshot cannot be merged")]
    Transient,
    /// One merge an origin.
    #[error("a snapshot of this origin is merging already")]
    AlreadyMerging,
    /// A snapshot of the origin is being taken.
    #[error("a snapshot of this origin is being taken")]
    InstantUnderWay,
    /// This merge has failed, and what it flushed last may be lost: it can be
    /// taken up again when the disk and the store are opened anew.
    #[error("the merge has failed: serve the disk anew to take it up again")]
    Failed,
    /// The volume is closing.
    #[error("the volume is closing")]
    Closing,
}

/// A store that is being merged into the origin.
#[derive(Debug)]
pub(crate) struct Merge {
    pub(super) id: SnapshotId,
    chunk_size: ChunkSize,
    /// The chunks whose content lies in the store.
    table: ExceptionTable,
    /// The list of them on the disk.
    unwind: Unwind,
    total: u64,
    /// Tenths of them of which it was said that they are merged.
    said: u64,
    /// Bytes that the store may have.
    limit: u64,
    /// Bytes of the snapshot: what lies behind them is the origin's alone.
    bytes: u64,
    stage: Stage,
    /// Another snapshot has no room for what the next step needs.
    paused: bool,
    /// Pieces of the step's chunks on their way to the origin.
    pub(super) pieces: Slab<Piece>,
    /// Chunks of the step that is under way: writes to them wait.
    window: Ranges,
    /// Chunks that may or may not be on the list after a crash: writes to them
    /// would be lost if they are not, so they fail.
    doubtful: Ranges,
    /// Writes of the origin's clients on their way to the store.
    writes: Ranges,
    /// Reads of theirs that are on their way from it.
    reads: u64,
    /// Flushes of the store.
    lane: Lane,
    /// The store was written in place since its last flush began.
    dirty: bool,
    /// It goes, as it is, when it rests: [`Volume::let_merge_go`].
    is_leaving: bool,
}

/// What a store brings with it into its merge.
struct Merged {
    id: SnapshotId,
    table: ExceptionTable,
    unwind: Unwind,
    chunk_size: ChunkSize,
    limit: u64,
    bytes: u64,
}

impl Merge {
    fn new(store: Merged) -> Self {
        assert_eq!(
            store.unwind.left(),
            store.table.len(),
            "the list and the table hold the same"
        );
        Self {
            id: store.id,
            chunk_size: store.chunk_size,
            table: store.table,
            unwind: store.unwind,
            total: store.unwind.left(),
            said: 0,
            limit: store.limit,
            bytes: store.bytes,
            stage: Stage::Resting,
            paused: false,
            pieces: Slab::new(),
            window: Ranges::default(),
            doubtful: Ranges::default(),
            writes: Ranges::default(),
            reads: 0,
            lane: Lane::default(),
            // It was flushed when it was opened, or just before the merge began.
            dirty: false,
            is_leaving: false,
        }
    }

    /// No step is under way, and nobody reads, writes or flushes the store.
    fn is_quiet(&self) -> bool {
        self.rests() && self.reads == 0 && self.writes.is_empty() && self.is_flushed()
    }

    /// How much of it is done, in percent, if that is a tenth more than was said last.
    fn progress_to_say(&mut self) -> Option<u8> {
        let left = self.unwind.left();
        let tenths = 10 * (self.total - left) / self.total;
        if left == 0 || tenths <= self.said {
            return None;
        }
        self.said = tenths;
        Some(tenths as u8 * 10)
    }

    fn rests(&self) -> bool {
        matches!(self.stage, Stage::Resting | Stage::Failed)
    }

    /// Nobody waits for a flush of the store, or for the end of one.
    fn is_flushed(&self) -> bool {
        self.lane.is_idle()
    }

    fn status(&self) -> Status {
        match self.stage {
            Stage::Failed => Status::MergeFailed,
            _ => self.unwind.status(self.limit),
        }
    }
}

impl Volume {
    /// How far the merge of this origin has come, if there is one: from
    /// [`Event::MergeBegun`] or [`Volume::attach_merging`] on, to its end.
    pub fn merge_progress(&self) -> Option<MergeProgress> {
        self.merge.as_ref().map(|merge| MergeProgress {
            left_chunks: merge.unwind.left(),
            total_chunks: merge.total,
            waits_for_room: merge.paused,
        })
    }

    /// The snapshot whose merge has been ordered or is under way.
    pub fn merging(&self) -> Option<SnapshotId> {
        let begun = self.merge.as_ref().map(|merge| merge.id);
        begun.or_else(|| self.merge_begins.as_ref().map(Beginning::id))
    }

    /// Begin no new step of a merge until [`Volume::resume_merge`]: the one that
    /// is under way ends, and then [`Volume::merge_rests`]. Requests go on. A merge
    /// that has not begun yet begins, and copies nothing.
    pub fn suspend_merge(&mut self) {
        self.merge_suspended = true;
    }

    /// Let the merge go on.
    pub fn resume_merge(&mut self) {
        self.merge_suspended = false;
    }

    /// No step of a merge is under way: all that it has done is durable.
    pub fn merge_rests(&self) -> bool {
        self.merge_begins.is_none() && self.merge.as_ref().is_none_or(Merge::rests)
    }

    /// Give up a merge that has begun, and leave the origin and the store as they are:
    /// the chunks that are still in the store are the origin's no more. Once no step
    /// is under way and nobody reads or writes the store any more,
    /// [`Event::Removed`]; what was written to it in place may be volatile.
    pub fn let_merge_go(&mut self, id: SnapshotId) {
        if let Some(merge) = self.merge.as_mut().filter(|merge| merge.id == id) {
            merge.is_leaving = true;
        }
    }

    /// Copy `bytes` in a step instead of 4 MiB: simulated disks are smaller than that,
    /// and where nobody waits for a step, more takes less time.
    pub fn set_merge_step(&mut self, bytes: u64) {
        assert!(bytes > 0);
        self.merge_step = bytes;
    }

    /// The status of a store that is being merged.
    pub(super) fn merge_status(&self, id: SnapshotId) -> Option<Status> {
        let merge = self.merge.as_ref().filter(|merge| merge.id == id)?;
        Some(merge.status())
    }

    /// With nothing in flight: no step of a merge is under way.
    pub(super) fn merge_is_quiet(&self) -> bool {
        self.merge.as_ref().is_none_or(Merge::rests)
    }

    /// Nothing of a merge is waiting or under way.
    pub(super) fn merge_is_idle(&self) -> bool {
        self.merge_rests() && self.merge.as_ref().is_none_or(Merge::is_flushed)
    }

    /// Steps of a merge may begin, and be prepared.
    fn may_step(&self) -> bool {
        let leaves = self.merge.as_ref().is_some_and(|merge| merge.is_leaving);
        !self.merge_suspended && !leaves && self.is_open()
    }

    /// Looked at whenever the volume comes to rest.
    pub(super) fn advance_merge(&mut self) {
        if self.is_frozen() {
            return;
        }
        self.advance_merge_begin();
        // A flush that was held until now.
        self.begin_origin_flush();
        self.begin_merge_flush();
        let may_step = self.may_step();
        let Some(merge) = &self.merge else {
            return;
        };
        if merge.is_leaving && merge.is_quiet() {
            let id = merge.id;
            self.merge = None;
            return self.events.push_back(Event::Removed(id));
        }
        match merge.stage {
            Stage::Resting if merge.unwind.left() == 0 => self.end_merge(),
            Stage::Resting if may_step && merge.lane.has_failed() => {
                self.merge_failed("a flush of its store failed");
            }
            Stage::Resting if may_step && self.origin_flush_failed() => {
                self.merge_failed("a flush of the origin failed");
            }
            Stage::Resting if may_step && !merge.paused => self.begin_merge_step(),
            Stage::Clearing(_) if !may_step => self.abandon_merge_step(),
            _ => {}
        }
    }

    /// The list is empty: once nobody reads or flushes the store any more, it goes.
    fn end_merge(&mut self) {
        let Some(merge) = &self.merge else {
            return;
        };
        if merge.is_quiet() {
            let id = merge.id;
            self.merge = None;
            self.events.push_back(Event::Merged(id));
        }
    }
}
