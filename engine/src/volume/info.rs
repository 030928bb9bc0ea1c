//! What there is to know of a volume and its snapshots, for status.

use nbdsnap_format::ChunkSize;

use super::Volume;
use super::full::OnFull;
use crate::request::{SnapshotId, View};
use crate::snapshot::State;
use crate::store::{Status, StoreKind};

/// Where a snapshot stands, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotState {
    /// Its instant has not been taken.
    Creating,
    /// It works.
    Active,
    /// It can be read, and no more written.
    Overflowed,
    /// It is lost, or about to be: the header that says so is on its way.
    Invalid,
    /// It is lost, and no disk could be made to say so.
    Unmarked,
    /// It goes when nothing is in flight for it any more.
    Removing,
}

/// What there is to know of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Where it stands.
    pub state: SnapshotState,
    /// The same in dm-snapshot's words and numbers.
    pub status: Status,
    /// Where its exceptions live.
    pub kind: StoreKind,
    /// The chunk size.
    pub chunk_size: ChunkSize,
    /// Bytes of the view: what the origin had at its instant.
    pub bytes: u64,
    /// Chunks that have copies; those that are under way are not among them.
    pub exceptions: u64,
    /// Bytes of the store up to its next free chunk.
    pub allocated_bytes: u64,
    /// Bytes of the store that can be used now.
    pub ready_bytes: u64,
    /// Bytes that it may come to have.
    pub limit_bytes: u64,
    /// What happens when it is full.
    pub on_full: OnFull,
    /// It has met the end of its store since it was last extended.
    pub is_full: bool,
    /// Writes, or parts of them, that wait for room in it.
    pub paused: usize,
}

impl Volume {
    /// What there is to know of a snapshot.
    pub fn snapshot_info(&self, id: SnapshotId) -> Option<SnapshotInfo> {
        let snapshot = self.snapshot(id)?;
        let allocator = &snapshot.allocator;
        Some(SnapshotInfo {
            state: match snapshot.state {
                State::Creating => SnapshotState::Creating,
                State::Active => SnapshotState::Active,
                State::Overflowed => SnapshotState::Overflowed,
                State::Invalidating(_) | State::Invalid => SnapshotState::Invalid,
                State::Unmarked => SnapshotState::Unmarked,
                State::Removing => SnapshotState::Removing,
            },
            status: snapshot.status(),
            kind: snapshot.kind,
            chunk_size: snapshot.chunk_size,
            bytes: snapshot.origin_bytes,
            exceptions: snapshot.table.len(),
            allocated_bytes: snapshot.chunk_size.cow_offset(allocator.next_free()),
            ready_bytes: allocator.ready(),
            limit_bytes: allocator.limit(),
            on_full: snapshot.on_full,
            is_full: snapshot.full,
            paused: snapshot.until_extended.len(),
        })
    }

    /// Bytes of a view; none if it is not there.
    pub fn view_bytes(&self, view: View) -> Option<u64> {
        match view {
            View::Origin => Some(self.config.origin_bytes),
            View::Snapshot(id) => {
                let snapshot = self.snapshot(id).filter(|s| s.is_there())?;
                Some(snapshot.origin_bytes)
            }
        }
    }
}
