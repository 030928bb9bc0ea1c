//! What waits inside a volume. A task is looked at again once everything that it
//! waits for has happened, and then decides anew from the state that it finds:
//! no wake-up carries a decision with it.

use super::active::RequestKey;
use super::copy::JobKey;
use super::merge::PieceKey;

/// Names a task until it has run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TaskId(pub(crate) usize);

/// What to look at again.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Work {
    /// A write, zero or trim: decide about its current window.
    Mutation(RequestKey),
    /// Part of a snapshot write, in chunks whose exceptions somebody else has
    /// begun, or for which the store had to grow.
    SnapshotPart {
        /// The write.
        request: RequestKey,
        /// First byte of the part.
        start: u64,
        /// First byte past it.
        end: u64,
    },
    /// Part of a snapshot write went out with its chunks' copies, whose
    /// exceptions have to take effect.
    SnapshotCopied(RequestKey),
    /// A copy that was waiting for memory.
    Copy(JobKey),
    /// The step of a merge: what was in the way of its window may be gone.
    MergeStep,
    /// A piece of a merge's step that was waiting for memory.
    MergePiece(PieceKey),
}

/// A task and how many things it still waits for.
#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) work: Work,
    pub(crate) waits: u32,
}
