//! What the runs of trees met, counted: see `simulator/ledger.rs`.

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
    FastOnlyRefused "fast zero, refused",
    InnerWrite "write to a snapshot that has snapshots",
    InnerFlush "flush or FUA of a snapshot that has snapshots",
    FastRead "read around the queue",
    FastReadDeep "read around the queue that found bytes on three disks or more",
    FastWrite "write around the queue to a snapshot",
    FastWriteInner "write around the queue to a snapshot that has snapshots",
    FastWriteRoot "write around the queue to the disk",
    FastDeclined "fast way declined",
    Created "snapshot of the disk created under traffic",
    CreatedInner "snapshot of a snapshot created under traffic",
    CreateUndone "crash before a creation was announced",
    CreateFailed "creation failed because its origin was lost",
    Group "instant of several views taken",
    GroupAbandoned "instant of several views abandoned",
    DepthEight "snapshot at depth 8",
    Forty "forty snapshots at once",
    Removed "snapshot removed",
    RemoveRefused "removal refused, with the names of those that depend on it",
    FailedByRemoval "request failed because its snapshot was removed or merged",
    RemovalCutOff "removal cut off by a crash",
    MergeOrdered "merge into the disk ordered",
    MergeOrderedInner "merge into a snapshot ordered",
    MergeWithSiblings "merge ordered beside other snapshots of the same view",
    MergeRefusedDependents "merge refused, with the names of those that depend on it",
    MergeRefused "merge refused for another reason",
    Merged "merge ended",
    MergeTakenUp "merge taken up again after a crash",
    MergeCutBeforeItBegan "crash between the order of a merge and its beginning",
    Suspended "tree suspended",
    Resumed "suspended tree resumed",
    CrashSuspended "crash while suspended",
    Lost "snapshot lost by a full store",
    LostInner "snapshot lost that had snapshots",
    LostAbove "snapshot lost because what it was taken of was lost",
    Overflow "overflow of a PO store",
    FailedByLoss "request failed because a snapshot on its way was lost or full",
    LostFound "lost snapshot found on open",
    PowerCut "power cut under traffic",
    Killed "process killed under traffic",
    CrashAfterClose "power cut after a close",
    CrashRecovery "power cut during recovery",
    CrashDeep "crash with operations in flight on four disks or more",
    Reopened "snapshot reopened and compared",
    Stacked "snapshot read from the bytes of its stacked stores, and compared",
    Mapped "map compared under traffic",
    Closed "tree closed",
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
