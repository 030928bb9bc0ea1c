//! What the runs of mapped devices met, counted: see `simulator/ledger.rs`.

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
    Read "read",
    Write "write",
    Fua "write, zero or trim with FUA",
    Zero "write zeroes",
    Trim "trim",
    Flush "flush",
    Around "request to the origin around its snapshot-origin",
    Beneath "request to a disk beneath the origin",
    Queued "request to a device that stands still",
    MergingWrite "write to an origin that is being merged",
    MergingFlush "flush or FUA of an origin that is being merged",
    InnerWrite "write to a snapshot that has snapshots",
    Created "snapshot of the origin taken under traffic",
    CreatedInner "snapshot of a snapshot taken under traffic",
    CreatedTransient "transient snapshot taken",
    CreateUndone "crash in the middle of a creation",
    CreateFailed "creation failed by its disk",
    CreateRefused "creation refused while the origin is merged",
    Removed "snapshot removed",
    RemovedBusy "snapshot removed with requests under way",
    RemovedUnmarked "snapshot removed that was lost without a mark",
    HandedOver "store handed over to another snapshot",
    HandoverRefused "handover refused, for its source does not stand still",
    HandoverCut "crash in the middle of a handover",
    MergeOrdered "store of the origin's snapshot handed over to snapshot-merge",
    MergeOrderedInner "store of a snapshot's snapshot handed over to snapshot-merge",
    MergeWithSiblings "merge ordered beside other snapshots of the same origin",
    MergeCutBeforeItBegan "crash between the order of a merge and its beginning",
    MergeTakenUp "merge begun again by its table after a crash",
    MergeStoodStill "merge that stood still and went on",
    MergeStopped "merge stopped by its disk",
    MergeNotBegun "merge that did not begin, for its snapshot was lost",
    Merged "merge ended",
    OriginBack "snapshot-origin in the place of a merge that had ended",
    ExchangedOrigin "table of the origin exchanged under I/O",
    ExchangedStore "table under a store exchanged under I/O",
    ExchangedUpper "table of the snapshot-origin exchanged under I/O",
    StoodStill "device suspended, and resumed",
    StoodStillNoFlush "device suspended with requests under way (noflush)",
    CrashStandingStill "crash with a device suspended",
    FaultRead "disk that fails reads",
    FaultWrite "disk that fails writes",
    FaultFlush "disk that fails flushes",
    FailedByDisk "request failed by a disk",
    FailedByLoss "request failed because its snapshot was lost or full",
    FailedByRemoval "request failed because its snapshot was removed",
    FailedByClose "request refused by a close",
    LostByFullStore "snapshot lost by a full store",
    LostByDisk "snapshot lost by its disk",
    LostInner "snapshot lost that had snapshots",
    LostUnmarked "snapshot lost, and its store cannot be made to say so",
    Overflow "overflow of a PO store",
    LostFound "lost snapshot found as lost",
    LostUnannounced "snapshot found lost that a crash kept from being told of",
    UnmarkedFound "snapshot that was lost without a mark found good, and good it is",
    PowerCut "power cut under traffic",
    PowerCutInOrder "power cut in the middle of an order",
    PowerCutInBoot "power cut while tables are loaded",
    Killed "process killed",
    Closed "everything closed, and durable",
    ClosedBadly "everything closed, and not all durable",
    CrashAfterClose "power cut after a close",
    TransientGone "transient snapshot gone by a crash",
    Reopened "snapshot compared after a crash",
    Stacked "view compared with the bytes of its stacked stores",
    Finished "run that came to its end",
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
        let unmet = Tally::ALL
            .iter()
            .filter(|(tally, _)| self.counts[*tally as usize] == 0);
        unmet.map(|(_, text)| *text).collect()
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
