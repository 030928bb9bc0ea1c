//! The Law of durability, and the ways to break it on purpose.
//!
//! > The old chunk is durable in the COW store -> its exception is durable ->
//! > only then is the origin overwritten.
//!
//! Every place in the engine that waits for the sake of a power cut asks a
//! method of [`Law`] whether it must. In a build of the program each answers
//! `true`, always, and costs nothing. With the cargo feature `mutants` a test
//! breaks one rule, and the crash simulator has to notice.

/// Defines [`Mutant`] and the list of all of them.
macro_rules! mutants {
    ($($(#[$what:meta])+ $name:ident,)+) => {
        /// A rule of durability to break.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub enum Mutant {
            $($(#[$what])+ $name,)+
        }

        impl Mutant {
            /// Those that need a snapshot of a snapshot to do any harm.
            pub const OF_TREES: &[Self] = &[Self::InnerFlushNotPassedOn];

            /// Those that need mapped devices (`dm`) to do any harm.
            pub const OF_MAPPED: &[Self] = &[
                Self::MappedFlushNotPassedOn,
                Self::MappedFlushForgets,
                Self::MappedLossUnmarked,
                Self::JoinedWithoutDrain,
                Self::HandoverWithoutDrain,
            ];

            /// Every one of them, `None` first.
            pub const ALL: &[Self] = &[$(Self::$name,)+];
        }
    };
}

mutants! {
    /// None: the engine as it is meant to be.
    #[default]
    None,
    /// The area is written without waiting for the flush of the chunks it names.
    OneFlush,
    /// Stale entries past the end of the list are left in place by an open.
    NoScrub,
    /// The origin is overwritten before the exceptions are durable.
    OriginWriteEarly,
    /// An exception of a snapshot's own write, still volatile, lets an origin write pass.
    VolatileTakenForDurable,
    /// The same for origin writes that are done at once (`write_now`), and only those.
    WriteNowOnVolatile,
    /// A snapshot is taken without flushing the origin.
    CreateWithoutFlush,
    /// A snapshot is taken while origin writes are in flight.
    CreateWithoutDrain,
    /// The header of a new store is written without waiting for its zeroed area.
    StoreCreateOneFlush,
    /// Origin writes do not wait for the header that says invalid.
    InvalidateLate,
    /// An area is filled before the zeros of the next one are durable.
    NextAreaNotZeroed,
    /// An origin write does not wait for snapshot reads of the same range.
    ReadsNotDrained,
    /// A trim acts whether or not snapshots have their copies.
    TrimUncopied,
    /// A FLUSH takes the end of a flush that began before it.
    FlushJoinsRunning,
    /// A volume is said to be suspended without flushing anything.
    SuspendWithoutFlush,
    /// A snapshot is said to be removed while operations on its store are in flight.
    RemovedBeforeItsEnd,
    /// A merge takes exceptions off the list before the origin's chunks are durable.
    MergeCommitEarly,
    /// A merge overwrites the origin before the other snapshots' exceptions are durable.
    MergeSiblingsUncopied,
    /// Writes to the chunks that a merge is copying go through.
    MergeWindowOpen,
    /// A merge copies chunks while writes to them are on their way to the store.
    MergeWritesNotDrained,
    /// Writes to merged chunks go to the origin before the store durably lacks them.
    MergeReleasedEarly,
    /// A FLUSH of an origin that is being merged leaves the store out.
    MergeFlushOneDevice,
    /// A FLUSH of a snapshot that has snapshots of its own does not reach its store.
    InnerFlushNotPassedOn,
    /// A FLUSH of a mapped device does not reach what the device stands on.
    MappedFlushNotPassedOn,
    /// A flush that failed is forgotten, and the next one of that disk believed.
    MappedFlushForgets,
    /// The origin of a snapshot that is lost, with no mark of it anywhere, goes on.
    MappedLossUnmarked,
    /// A snapshot comes to its volume with writes of before under way around that.
    JoinedWithoutDrain,
    /// A mapped device is said to stand still, so that its store may change hands, with
    /// requests to it under way.
    HandoverWithoutDrain,
}

impl Mutant {
    /// The one of this name, spelled as in the code.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|mutant| format!("{mutant:?}") == name)
    }
}

/// Which rules hold. All of them, but for one in a mutant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Law {
    #[cfg(feature = "mutants")]
    broken: Mutant,
}

impl Law {
    /// A law with one rule broken.
    #[cfg(feature = "mutants")]
    pub const fn broken(broken: Mutant) -> Self {
        Self { broken }
    }

    #[cfg(feature = "mutants")]
    fn holds(self, rule: Mutant) -> bool {
        self.broken != rule
    }

    #[cfg(not(feature = "mutants"))]
    #[allow(clippy::unused_self)]
    const fn holds(self, _rule: Mutant) -> bool {
        true
    }

    /// Chunks are durable before the area that names them is written.
    pub(crate) fn data_before_area(self) -> bool {
        self.holds(Mutant::OneFlush)
    }

    /// What lies past the end of the list is zeroed before anything is allocated.
    pub(crate) fn scrub_on_open(self) -> bool {
        self.holds(Mutant::NoScrub)
    }

    /// Exceptions are committed before the origin is overwritten.
    pub(crate) fn exception_before_origin(self) -> bool {
        self.holds(Mutant::OriginWriteEarly)
    }

    /// A committed exception counts only once it is durable.
    pub(crate) fn volatile_is_not_durable(self) -> bool {
        self.holds(Mutant::VolatileTakenForDurable)
    }

    /// An origin write that is done at once finds its exceptions durable, not
    /// only there.
    pub(crate) fn write_now_on_durable(self) -> bool {
        self.holds(Mutant::WriteNowOnVolatile)
    }

    /// The origin is durable at the instant of a snapshot.
    pub(crate) fn flush_before_snapshot(self) -> bool {
        self.holds(Mutant::CreateWithoutFlush)
    }

    /// No origin write is in flight at the instant of a snapshot.
    pub(crate) fn drain_before_snapshot(self) -> bool {
        self.holds(Mutant::CreateWithoutDrain)
    }

    /// Area 0 is durably zero before a header makes it count.
    pub(crate) fn area_before_header(self) -> bool {
        self.holds(Mutant::StoreCreateOneFlush)
    }

    /// The snapshot is durably invalid before the write that broke it.
    pub(crate) fn invalid_before_origin(self) -> bool {
        self.holds(Mutant::InvalidateLate)
    }

    /// The next area is durably zero before its predecessor fills.
    pub(crate) fn zeros_before_full_area(self) -> bool {
        self.holds(Mutant::NextAreaNotZeroed)
    }

    /// Snapshot reads of a range end before the origin changes there.
    pub(crate) fn reads_before_origin(self) -> bool {
        self.holds(Mutant::ReadsNotDrained)
    }

    /// A trim keeps to what every snapshot has durably copied.
    pub(crate) fn trim_only_copied(self) -> bool {
        self.holds(Mutant::TrimUncopied)
    }

    /// What a suspended volume has answered is durable.
    pub(crate) fn flush_before_suspended(self) -> bool {
        self.holds(Mutant::SuspendWithoutFlush)
    }

    /// Nothing is in flight on a store that is said to be removed: whoever gets it
    /// next would find it written to.
    pub(crate) fn drain_before_removed(self) -> bool {
        self.holds(Mutant::RemovedBeforeItsEnd)
    }

    /// What a merge copied to the origin is durable before the list lacks it.
    pub(crate) fn origin_before_merged(self) -> bool {
        self.holds(Mutant::MergeCommitEarly)
    }

    /// A merge is an origin write: the other snapshots have their durable copies first.
    pub(crate) fn siblings_before_merge(self) -> bool {
        self.holds(Mutant::MergeSiblingsUncopied)
    }

    /// Writes to the chunks of a merge's step wait for its end.
    pub(crate) fn window_closed(self) -> bool {
        self.holds(Mutant::MergeWindowOpen)
    }

    /// Writes that are on their way to a chunk of the store end before it is merged.
    pub(crate) fn writes_before_merge(self) -> bool {
        self.holds(Mutant::MergeWritesNotDrained)
    }

    /// That the list lacks a merged chunk is durable before writes to it go to
    /// the origin: else the chunk would be merged over them once more.
    pub(crate) fn merged_before_released(self) -> bool {
        self.holds(Mutant::MergeReleasedEarly)
    }

    /// While a merge runs, an origin's content lies on two devices.
    pub(crate) fn flush_both_devices(self) -> bool {
        self.holds(Mutant::MergeFlushOneDevice)
    }

    /// What a volume asks of its origin, it asks of the store of the snapshot that
    /// is its origin.
    pub(crate) fn inner_flush_passed_on(self) -> bool {
        self.holds(Mutant::InnerFlushNotPassedOn)
    }

    /// A flush of a mapped device is one of all that it stands on.
    pub(crate) fn mapped_flush_passed_on(self) -> bool {
        self.holds(Mutant::MappedFlushNotPassedOn)
    }

    /// A disk with a flush that failed is trusted no more until it is opened anew.
    pub(crate) fn failed_flush_is_remembered(self) -> bool {
        self.holds(Mutant::MappedFlushForgets)
    }

    /// A snapshot is lost with a durable mark, or its origin takes no writes.
    pub(crate) fn mark_or_refuse(self) -> bool {
        self.holds(Mutant::MappedLossUnmarked)
    }

    /// What came down before a volume was there ends before its first instant.
    pub(crate) fn drain_before_joining(self) -> bool {
        self.holds(Mutant::JoinedWithoutDrain)
    }

    /// A device stands still once its requests have ended.
    pub(crate) fn drain_before_standstill(self) -> bool {
        self.holds(Mutant::HandoverWithoutDrain)
    }

    /// A FLUSH is answered by a flush that began after it came.
    pub(crate) fn flush_begins_after(self) -> bool {
        self.holds(Mutant::FlushJoinsRunning)
    }
}
