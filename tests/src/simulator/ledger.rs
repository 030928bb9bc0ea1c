//! What the runs met: a count for each kind of operation and outcome, so that a
//! search that never tears an area or never fills a store cannot pass for one
//! that did.

macro_rules! tallies {
    ($($name:ident $text:literal,)*) => {
        /// Something that is counted.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Tally {
            $(
                #[doc = $text]
                $name,
            )*
        }

        impl Tally {
            /// All of them, in the order of the table.
            pub const ALL: &'static [(Self, &'static str)] = &[$((Self::$name, $text),)*];
        }
    };
}

tallies! {
    OriginRead "origin: read",
    OriginWrite "origin: write",
    OriginFua "origin: write, zero or trim with FUA",
    OriginZero "origin: write zeroes",
    OriginTrim "origin: trim",
    OriginFlush "origin: flush",
    SnapshotRead "snapshot: read",
    SnapshotWholeChunk "snapshot: write of a whole chunk",
    SnapshotPartChunk "snapshot: write of part of a chunk",
    SnapshotFua "snapshot: write, zero or trim with FUA",
    SnapshotZero "snapshot: write zeroes",
    SnapshotTrim "snapshot: trim",
    SnapshotFlush "snapshot: flush",
    UnalignedToSector "request that splits a sector",
    Overlapping "write handed in while an overlapping one was unanswered",
    PastEnd "request past the end, refused",
    FastOnlyRefused "fast zero, refused",
    FastRead "read around the queue",
    FastWrite "origin: write around the queue",
    FastSnapshotWrite "snapshot: write around the queue",
    FastDeclined "fast way declined",
    Mapped "block map compared",
    CreateBegun "snapshot creation begun",
    Created "snapshot created under traffic",
    CreatedEmptyHanded "snapshot created with nothing else going on",
    CreatedTogether "snapshot ordered while another is being created",
    HeldByCreation "origin write held by a creation",
    DrainedByCreation "origin write drained by a creation",
    CreateUndone "crash before a creation was announced",
    CreateAdopted "store of an unannounced snapshot found empty and attached",
    TransientCreated "transient snapshot created",
    TransientGone "transient snapshot gone by a crash",
    Removed "snapshot removed",
    RemovedIdle "snapshot removed with nothing in flight on its store",
    RemovedBusy "snapshot removed with operations in flight on its store",
    RemovedCreating "snapshot removed before its instant",
    RemovedInvalid "invalid snapshot removed",
    RemovedOverflowed "overflowed snapshot removed",
    RemovedPaused "snapshot removed with writes waiting for room in its store",
    RemovedSuspended "snapshot removed from a suspended volume",
    RemovedTwice "removal asked for twice",
    RemovedRefused "request refused because its snapshot is removed",
    FailedByRemoval "request failed because its snapshot is removed",
    RemovalCutOff "removal cut off by a crash",
    InstantBegun "instant begun",
    InstantHeld "instant held",
    InstantNotYet "instant refused, because it was not held yet",
    InstantOfOne "instant of one snapshot taken",
    InstantOfSeveral "instant of several snapshots taken",
    InstantEmpty "instant taken whose snapshots had been removed",
    InstantAbandoned "instant abandoned on its way",
    HeldAbandoned "instant abandoned while it was held",
    InstantFailed "instant failed by an injected error",
    InstantClosed "instant failed by a close",
    SuspendAsked "volume told to suspend",
    Suspended "volume suspended, all of it durable",
    SuspendedNotDurable "volume suspended, and a flush failed",
    Resumed "suspended volume resumed",
    ResumedOnTheWay "volume resumed before it was suspended",
    QueuedReleased "request that queued in a suspended volume let in",
    QueuedRefused "request that queued in a suspended volume refused by a close",
    CrashSuspended "crash while suspended",
    Extended "store extended",
    ExtendedPaused "store extended that writes waited for",
    ExtendRefused "extension refused",
    Filling "store said to fill",
    FullPaused "full store that writes wait for",
    FullRefused "full store that refuses writes",
    NoSpaceRefused "write refused by a full store",
    PausedRefused "write that waited for room refused by a close",
    PolicyChanged "policy of a store changed",
    PolicyChangedPaused "policy changed while writes waited for room",
    TornByPause "snapshot taken in the middle of a write that waits for room",
    OriginGrown "origin grown",
    BehindSnapshot "origin write behind the end of a snapshot",
    Sixteen "sixteen snapshots at once",
    FirstOriginWrite "origin write that needs a copy",
    TailCopy "fractional tail chunk that needs a copy",
    VolatileCommitted "origin write over a volatile exception",
    AreaSectorCrossed "list of exceptions that crossed a multiple of 32",
    WideCommit "group of exceptions that spans sectors of an area",
    AreaFilled "list of exceptions that crossed an area",
    Grown "store grown",
    GrowthLost "growth interrupted by a crash",
    TrimActed "trim that zeroed",
    TrimIgnored "trim without effect",
    InvalidByFull "invalid: no space for an origin write",
    InvalidBySnapshotWrite "invalid: no space for a snapshot write",
    InvalidByError "invalid: an injected error",
    Unmarked "invalid, and its store could not be marked so",
    MarkedElsewhere "invalid, and the list of stores says so",
    CrashBeforeMark "crash while the list was about to say so",
    InvalidFound "invalid store found on open",
    InvalidRefused "request refused by an invalid snapshot",
    Overflow "overflow of a PO store",
    OverflowRefused "write refused by an overflowed snapshot",
    OverflowReopened "overflowed snapshot active again after a crash",
    OriginFlushFailed "origin flush failed by an injected error",
    FlushLatched "flush refused after a failed flush",
    FailedByError "request failed by an injected error",
    PowerCut "power cut under traffic",
    Killed "process killed under traffic",
    CrashIdle "crash with nothing in flight",
    CrashRecovery "power cut during recovery",
    CrashCreation "power cut while a store was made",
    CreationHalfMade "half-made store refused",
    CreationWhole "store made just before a power cut found empty",
    Torn "torn area scrubbed",
    TornReadOnly "torn area left alone by a read-only open",
    Reopened "persistent store reopened and compared",
    ReopenedReadOnly "store opened read-only and compared, nothing written",
    Closed "volume closed",
    RefusedClosing "request refused while closing",
    CrashAfterClose "power cut after a close",
    MergeOrdered "merge ordered",
    MergeBegun "merge begun under traffic",
    HeldByMerge "origin write held until a merge had begun",
    Merged "merge ended",
    MergeSuspended "merge suspended",
    MergeRefused "merge refused",
    MergeFailed "merge stopped by an injected error",
    MergeTakenUpAgain "failed merge taken up again",
    MergeAttached "merge taken up again after a crash",
    MergeCutBeforeItBegan "crash between the order of a merge and its beginning",
    MergeRefusedHeld "merge refused, because a snapshot's instant is held",
    MergeOrderedSuspended "merge ordered in a suspended volume",
    MergeStoodStill "volume suspended in the middle of a merge",
    MergeWentOn "volume resumed in the middle of a merge",
    MergeSiblingRemoved "snapshot removed while its origin is merged",
    MergeSiblingExtended "store extended while its origin is merged",
    MergeExtendRefused "extension of the merging store refused",
    MergePolicyChanged "policy of a store changed while its origin is merged",
    MergeOriginGrown "origin grown while it is merged",
    MergeSiblingLost "snapshot lost to a merge that found its store full",
    MergeEndsPause "write that waits for room refused, because its snapshot is merged",
    MergeWaitsPausing "merge seen waiting for room in a store that pauses writes",
    MergeWaitsRefusing "merge seen waiting for room in a store that refuses writes",
    MergeRoomByExtension "store extended that a merge waited for",
    MergeRoomByRemoval "snapshot removed that a merge waited for",
    MergeRoomByPolicy "policy changed of a store that a merge waited for",
    CrashMergeSuspended "crash while a volume stands still in the middle of a merge",
    CrashMergeWaiting "crash while a merge waits for room",
    CrashMergeRemoving "crash in the middle of a removal and a merge",
    MergeTorn "write that zeroes several sectors of entries",
    MergeInPlace "origin write in place to a merging store",
    FastInPlace "origin write around the queue to a merging store",
    Status "status compared with the count of exceptions",
    Checked "store checked for findings",
}

/// The counts.
#[derive(Clone, Debug)]
pub struct Ledger {
    counts: Vec<u64>,
}

impl Default for Ledger {
    fn default() -> Self {
        Self {
            counts: vec![0; Tally::ALL.len()],
        }
    }
}

impl Ledger {
    /// One more.
    pub fn count(&mut self, tally: Tally) {
        self.counts[tally as usize] += 1;
    }

    /// All that another ledger has.
    pub fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
    }

    /// What was never met.
    pub fn never(&self) -> Vec<&'static str> {
        Tally::ALL
            .iter()
            .filter(|(tally, _)| self.counts[*tally as usize] == 0)
            .map(|(_, text)| *text)
            .collect()
    }
}

impl std::fmt::Display for Ledger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (tally, text) in Tally::ALL {
            writeln!(f, "{:>12}  {text}", self.counts[*tally as usize])?;
        }
        Ok(())
    }
}
