//! Exception stores: made, opened, described. A [`Store`] is what a volume
//! takes in to become one of its snapshots.

mod allocate;
mod commit;
mod create;
mod open;
mod unwind;

use std::fmt;

use nbdsnap_format::header::HeaderError;
use nbdsnap_format::{ChunkSize, CowChunk, Exception, Layout, OriginChunk, SECTOR_BYTES};

use crate::disk::{Action, DiskError, Outcome};
use crate::law::Law;
use crate::table::ExceptionTable;

pub(crate) use allocate::{Allocation, Allocator, Growth, NoRoom};
pub(crate) use commit::{AreaWrite, Commit};
pub(crate) use unwind::{Changed, Tail, Unwind};

/// Where exceptions live and what happens when a snapshot write finds no space;
/// dm-snapshot's table letters in brackets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StoreKind {
    /// Durable; a full store makes the snapshot Invalid (P).
    Persistent,
    /// Durable; a snapshot write that finds no space is refused and the snapshot lives (PO).
    PersistentOverflow,
    /// In memory, gone when the volume closes (N).
    Transient,
}

/// How large a store is and may become, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreSize {
    /// Usable now: reserved, and durable as a length.
    pub ready: u64,
    /// It may grow up to here by [`Action::Grow`]; equal to `ready` for a block device.
    pub limit: u64,
    /// How much it grows at a time; 4 chunks at least are taken. 0 for a device,
    /// with `ready` equal to `limit`: it is never asked to grow, and when it is
    /// extended the new room is there already.
    pub step: u64,
}

/// What a store to be made shall be like.
#[derive(Clone, Copy, Debug)]
pub struct StoreSpec {
    /// P, PO or N.
    pub kind: StoreKind,
    /// The chunk size.
    pub chunk_size: ChunkSize,
    /// Its room.
    pub size: StoreSize,
}

/// Whether opening may write (scrub a torn area).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Not a byte changes.
    ReadOnly,
    /// A torn area is made whole before anything is allocated.
    ReadWrite,
}

/// The disk under a store while it is made or opened: each action is performed
/// before the next is asked for.
pub trait StoreIo {
    /// Perform `action` on the COW store.
    fn act(&mut self, action: Action) -> Outcome;
    /// Keep a copy of a torn area, durably, before it is scrubbed.
    fn keep_copy(&mut self, area: u64, bytes: &[u8]) -> Result<(), DiskError>;
}

/// Why a store cannot be opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The disk failed.
    #[error("{0}")]
    Disk(#[from] DiskError),
    /// Shorter than a header and one area.
    #[error("the store is truncated: it has {found} bytes and needs at least {needed}")]
    Truncated {
        /// Bytes there are.
        found: u64,
        /// Bytes there would have to be.
        needed: u64,
    },
    /// The header is not one of a store.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// Magic 0: nobody made a store here yet.
    #[error("there is no store: its first sector begins with zeros")]
    New,
    /// An exception that cannot be.
    #[error("exception {index} (origin chunk {old} -> store chunk {new}): {why}")]
    Exception {
        /// Counted over all areas, from 0.
        index: u64,
        /// Its origin chunk.
        old: OriginChunk,
        /// Its store chunk.
        new: CowChunk,
        /// What is wrong.
        why: &'static str,
    },
    /// Entries past the end of the list that no torn write leaves behind.
    #[error(
        "area {area} has entries past its end, from entry {entry} on, that no torn write leaves behind: the store is damaged"
    )]
    Corrupt {
        /// The area.
        area: u64,
        /// The first such entry.
        entry: u64,
    },
}

/// An exception store in memory, ready to become a snapshot.
#[derive(Debug)]
pub struct Store {
    pub(crate) kind: StoreKind,
    pub(crate) layout: Layout,
    pub(crate) size: StoreSize,
    pub(crate) table: ExceptionTable,
    /// The chunk that the next exception gets.
    pub(crate) next_free: CowChunk,
    /// The entries of the area block that the next exception falls in.
    pub(crate) block: Vec<Exception>,
    pub(crate) invalid: bool,
    /// The length of the origin for which it was opened; a new store gets that of
    /// its instant.
    pub(crate) origin_bytes: Option<u64>,
    torn_area: Option<u64>,
}

impl Store {
    /// Make an empty store: area 0 zeroed, flush, header, flush (durability.md,
    /// rule 4). A transient store touches nothing. Whatever the device held is lost.
    pub fn create(spec: StoreSpec, io: &mut dyn StoreIo) -> Result<Self, DiskError> {
        create::create(spec, Law::default(), io)
    }

    /// Open a persistent store, whoever made it: the header, then areas until
    /// one is not full. `kind` says what a full store does; the chunk size is the
    /// header's. A store whose header says invalid opens as Invalid, its
    /// exceptions unread.
    pub fn open(
        kind: StoreKind,
        size: StoreSize,
        origin_bytes: u64,
        access: Access,
        io: &mut dyn StoreIo,
    ) -> Result<Self, OpenError> {
        open::open(kind, size, origin_bytes, access, Law::default(), io)
    }

    /// [`Store::create`] with a rule broken.
    #[cfg(feature = "mutants")]
    pub fn create_under(
        law: Law,
        spec: StoreSpec,
        io: &mut dyn StoreIo,
    ) -> Result<Self, DiskError> {
        create::create(spec, law, io)
    }

    /// [`Store::open`] with a rule broken.
    #[cfg(feature = "mutants")]
    pub fn open_under(
        law: Law,
        kind: StoreKind,
        size: StoreSize,
        origin_bytes: u64,
        access: Access,
        io: &mut dyn StoreIo,
    ) -> Result<Self, OpenError> {
        open::open(kind, size, origin_bytes, access, law, io)
    }

    /// The chunk size.
    pub fn chunk_size(&self) -> ChunkSize {
        self.layout.chunk_size()
    }

    /// P, PO or N.
    pub fn kind(&self) -> StoreKind {
        self.kind
    }

    /// Whether the header said invalid.
    pub fn is_invalid(&self) -> bool {
        self.invalid
    }

    /// Exceptions in it.
    pub fn exception_count(&self) -> u64 {
        self.table.len()
    }

    /// The area that held a torn write when the store was opened.
    pub fn torn_area(&self) -> Option<u64> {
        self.torn_area
    }

    /// The status that a snapshot with this store begins with.
    pub fn status(&self) -> Status {
        if self.invalid {
            return Status::Invalid;
        }
        let chunk = self.layout.chunk_size();
        let current_area = self.table.len() / chunk.exceptions_per_area();
        Status::Active {
            allocated: self.next_free.0 * chunk.sectors(),
            total: self.size.limit / SECTOR_BYTES,
            metadata: metadata_sectors(self.kind, self.layout, current_area),
        }
    }
}

/// Sectors of the header and of the areas up to the current one, as the kernel
/// reports them; a transient store has none.
pub(crate) fn metadata_sectors(kind: StoreKind, layout: Layout, current_area: u64) -> u64 {
    match kind {
        StoreKind::Transient => 0,
        StoreKind::Persistent | StoreKind::PersistentOverflow => {
            layout.metadata_sectors(current_area)
        }
    }
}

/// A snapshot's state, as `dmsetup status` words it (Display gives its words
/// after the target's name).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// `allocated/total metadata`, in sectors.
    Active {
        /// Sectors up to the next free chunk.
        allocated: u64,
        /// Sectors of the store, as far as it may grow.
        total: u64,
        /// Sectors of header and areas; 0 for a transient store.
        metadata: u64,
    },
    /// A snapshot write found no space in a PO store.
    Overflow,
    /// The snapshot is lost.
    Invalid,
    /// Its merge into the origin met an error, and has stopped.
    MergeFailed,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Active {
                allocated,
                total,
                metadata,
            } => write!(f, "{allocated}/{total} {metadata}"),
            Self::Overflow => f.write_str("Overflow"),
            Self::Invalid => f.write_str("Invalid"),
            Self::MergeFailed => f.write_str("Merge failed"),
        }
    }
}
