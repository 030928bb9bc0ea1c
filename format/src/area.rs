//! Areas: the lists of exceptions in a store. Owns the 16 bytes of an
//! [`Exception`], where the list in an area ends, and what may lie behind its
//! end ([`Tail`]). The engine fills areas with [`Exception::encode`] and opens
//! stores with an [`AreaDecoder`]; the checker uses the same decoder.
//!
//! **The end of a list** is the first entry with `new_chunk` 0, whatever its
//! `old_chunk`: so the kernel reads it. (An `old_chunk` of 0 ends nothing: it is
//! the first chunk of the origin.) The kernel never writes an entry that has an
//! `old_chunk` and no `new_chunk`, so a list that ends with one is damaged.
//!
//! **What a power cut leaves.** An area is only ever appended to, or, in a
//! merge, cut at its end. Every version of a sector that was ever written is
//! therefore some entries, then zeros. A power cut keeps for each sector one of
//! the versions written since the last flush, each sector by itself, so
//! what it leaves is again, sector by sector, entries and then zeros. The sector
//! in which the list ends has only zeros behind the end; a later sector may
//! begin with stale entries, and the first of them is the first of its sector: a
//! multiple of [`ENTRIES_PER_SECTOR`]. They point where this store can have
//! entries point. Anything else behind the end is corruption, and not a tear.

use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::layout::Layout;
use crate::units::{ChunkSize, CowChunk, OriginChunk, SECTOR_BYTES};

/// Bytes of an exception on disk.
pub const EXCEPTION_BYTES: usize = size_of::<RawException>();

/// Exceptions in a sector, the grain at which an area can tear.
pub const ENTRIES_PER_SECTOR: u64 = SECTOR_BYTES / EXCEPTION_BYTES as u64;

/// An exception on disk.
#[derive(Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawException {
    old_chunk: U64,
    new_chunk: U64,
}

impl RawException {
    fn is_zero(&self) -> bool {
        self.old_chunk.get() == 0 && self.new_chunk.get() == 0
    }

    /// Ends the list.
    fn is_end(&self) -> bool {
        self.new_chunk.get() == 0
    }

    fn exception(&self) -> Exception {
        Exception {
            old: OriginChunk(self.old_chunk.get()),
            new: CowChunk(self.new_chunk.get()),
        }
    }
}

/// An exception: the data that the snapshot shows for origin chunk `old` lies
/// at chunk `new` of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Exception {
    /// The chunk of the origin.
    pub old: OriginChunk,
    /// The chunk of the store; never 0.
    pub new: CowChunk,
}

impl Exception {
    /// The exception in these bytes; none if they end the list.
    pub fn decode(bytes: &[u8; EXCEPTION_BYTES]) -> Option<Self> {
        let raw: &RawException = zerocopy::transmute_ref!(bytes);
        (!raw.is_end()).then(|| raw.exception())
    }

    /// Its bytes in an area. Panics for store chunk 0, which would end the list.
    pub fn encode(self) -> [u8; EXCEPTION_BYTES] {
        assert!(self.new.0 != 0, "no exception has its data in chunk 0");
        zerocopy::transmute!(RawException {
            old_chunk: U64::new(self.old.0),
            new_chunk: U64::new(self.new.0),
        })
    }
}

/// The exceptions in a piece of an area, in their order.
#[derive(Clone, Debug)]
pub struct Exceptions<'a> {
    entries: std::slice::Iter<'a, RawException>,
}

impl<'a> Exceptions<'a> {
    /// The exceptions at the start of `area`, up to the end of its list. Panics
    /// unless `area` is whole entries.
    pub fn of(area: &'a [u8]) -> Self {
        let (live, _) = split_at_end(entries(area));
        Self {
            entries: live.iter(),
        }
    }
}

impl Iterator for Exceptions<'_> {
    type Item = Exception;

    fn next(&mut self) -> Option<Exception> {
        self.entries.next().map(RawException::exception)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.entries.size_hint()
    }
}

impl ExactSizeIterator for Exceptions<'_> {}

/// Where an exception of one store may point: what its layout, its length and
/// the length of its origin allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    layout: Layout,
    store_chunks: u64,
    origin_chunks: Option<u64>,
}

/// Why an exception cannot be where it points.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.why())]
pub enum Misplaced {
    /// Its data would lie past the end of the store.
    OutsideStore,
    /// Its data would lie on the header or on an area.
    OnMetadata,
    /// The origin has no such chunk.
    OutsideOrigin,
}

impl Misplaced {
    /// A sentence about the exception.
    pub const fn why(self) -> &'static str {
        match self {
            Self::OutsideStore => {
                "its data would lie outside the store: the store was cut off, or is damaged"
            }
            Self::OnMetadata => {
                "its data would lie on the store's own metadata: the store is damaged"
            }
            Self::OutsideOrigin => {
                "it is outside the origin: the store belongs to another origin, the origin shrank, or the store is damaged"
            }
        }
    }
}

impl Bounds {
    /// The bounds in a store of `store_bytes` bytes; of its origin, nothing is
    /// checked where its length is not known.
    pub const fn new(chunk_size: ChunkSize, store_bytes: u64, origin_bytes: Option<u64>) -> Self {
        Self {
            layout: Layout::new(chunk_size),
            store_chunks: chunk_size.whole_chunks(store_bytes),
            origin_chunks: match origin_bytes {
                Some(bytes) => Some(chunk_size.chunks_to_cover(bytes)),
                None => None,
            },
        }
    }

    /// The layout of the store.
    pub const fn layout(self) -> Layout {
        self.layout
    }

    /// Whether area `n` lies in the store as a whole.
    pub const fn has_area(self, n: u64) -> bool {
        self.layout.area_location(n).0 < self.store_chunks
    }

    /// Why `exception` cannot be one of this store; nothing if it can.
    pub fn misplaced(self, exception: Exception) -> Option<Misplaced> {
        if exception.new.0 >= self.store_chunks {
            Some(Misplaced::OutsideStore)
        } else if self.layout.is_metadata(exception.new) {
            Some(Misplaced::OnMetadata)
        } else if self.origin_chunks.is_some_and(|n| exception.old.0 >= n) {
            Some(Misplaced::OutsideOrigin)
        } else {
            None
        }
    }
}

/// What lies behind the end of an area's list, in that area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tail {
    /// Zeros.
    Clean,
    /// Entries that a torn write of the area left. They are no exceptions, and
    /// filling the list up to them would make them some: zero the tail,
    /// durably, before anything is allocated.
    Torn {
        /// The first of them.
        from_entry: u64,
    },
    /// Bytes that no torn write leaves. The store is damaged.
    Corrupt {
        /// The first entry that no torn write leaves; the end of the list itself
        /// if that has an `old_chunk`.
        entry: u64,
    },
}

/// What an area turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AreaEnd {
    /// All of its entries are exceptions: the list goes on in the next area.
    Full,
    /// The list of exceptions ends in this area.
    Ended {
        /// Exceptions in this area: the index of the entry that ends the list.
        entries: u64,
        /// What lies behind.
        tail: Tail,
    },
}

/// Decodes one area, piece by piece, so that an area of 1 GiB needs no buffer
/// of 1 GiB.
///
/// Feed it the area from its start with [`push`](Self::push), which gives the
/// exceptions of each piece; when [`remaining_bytes`](Self::remaining_bytes) is
/// 0, [`finish`](Self::finish) says how the area ended. The exceptions it gives
/// are not checked against the bounds: the caller does that, and knows what to
/// say. The stale entries behind the end are, because a tear leaves only
/// entries that were once good.
#[derive(Clone, Debug)]
pub struct AreaDecoder {
    bounds: Bounds,
    /// Entries decoded so far, of any kind.
    decoded: u64,
    /// The end of the list, once it was seen.
    end: Option<(u64, Tail)>,
}

impl AreaDecoder {
    /// For an area of a store with these bounds.
    pub const fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            decoded: 0,
            end: None,
        }
    }

    /// Bytes of the area that were not pushed yet.
    pub const fn remaining_bytes(&self) -> u64 {
        self.bounds.layout.chunk_size().bytes() - self.decoded * EXCEPTION_BYTES as u64
    }

    /// Exceptions found so far: the index in this area of the next that `push`
    /// gives.
    pub const fn exceptions(&self) -> u64 {
        match self.end {
            Some((end, _)) => end,
            None => self.decoded,
        }
    }

    /// Take the next bytes of the area and give the exceptions in them: none
    /// once the list has ended. Panics unless `piece` is whole sectors and lies
    /// in the area.
    pub fn push<'a>(&mut self, piece: &'a [u8]) -> Exceptions<'a> {
        assert!(
            (piece.len() as u64).is_multiple_of(SECTOR_BYTES)
                && piece.len() as u64 <= self.remaining_bytes(),
            "a piece of {} bytes, where {} of the area remain",
            piece.len(),
            self.remaining_bytes(),
        );
        let entries = entries(piece);
        let (live, rest) = match self.end {
            None => split_at_end(entries),
            Some(_) => entries.split_at(0),
        };
        let first_of_rest = self.decoded + live.len() as u64;
        self.decoded += entries.len() as u64;
        if !rest.is_empty() {
            self.push_tail(first_of_rest, rest);
        }
        Exceptions {
            entries: live.iter(),
        }
    }

    /// How the area ended. Panics unless all of it was pushed.
    pub fn finish(self) -> AreaEnd {
        assert!(
            self.remaining_bytes() == 0,
            "{} bytes of the area were not read",
            self.remaining_bytes()
        );
        match self.end {
            None => AreaEnd::Full,
            Some((entries, tail)) => AreaEnd::Ended { entries, tail },
        }
    }

    /// Judge `rest`, entries from index `first` on, which lie at or behind the
    /// end of the list: at it if no end was seen so far.
    fn push_tail(&mut self, first: u64, rest: &[RawException]) {
        let (end, mut tail) = self.end.unwrap_or((first, Tail::Clean));
        let mut at = first;
        let mut rest = rest;
        while !rest.is_empty() && !matches!(tail, Tail::Corrupt { .. }) {
            let in_sector = (ENTRIES_PER_SECTOR - at % ENTRIES_PER_SECTOR) as usize;
            let (sector, later) = rest.split_at(in_sector);
            if !is_all_zero(sector) {
                tail = self.judge_sector(tail, at, sector);
            }
            at += in_sector as u64;
            rest = later;
        }
        self.end = Some((end, tail));
    }

    /// The tail so far, with a sector (or its rest) from entry `at` on.
    fn judge_sector(&self, tail: Tail, at: u64, sector: &[RawException]) -> Tail {
        // A tear leaves entries and then zeros. So in the sector where the list
        // ends: the end is zeros; with an old_chunk it would be an exception at
        // store chunk 0, which is misplaced.
        let mut zeros = false;
        let mut tail = tail;
        for (index, entry) in (at..).zip(sector) {
            if entry.is_zero() {
                zeros = true;
            } else if zeros || self.bounds.misplaced(entry.exception()).is_some() {
                return Tail::Corrupt { entry: index };
            } else if tail == Tail::Clean {
                tail = Tail::Torn { from_entry: index };
            }
        }
        tail
    }
}

/// The entries in `bytes`, which must be whole ones.
fn entries(bytes: &[u8]) -> &[RawException] {
    <[RawException]>::ref_from_bytes(bytes).expect("an area is read in whole entries")
}

/// The exceptions, and what follows from the end of the list on.
fn split_at_end(entries: &[RawException]) -> (&[RawException], &[RawException]) {
    let end = entries.iter().position(RawException::is_end);
    entries.split_at(end.unwrap_or(entries.len()))
}

/// Without an early exit, so that it runs at the speed of memory: most of a
/// young area is zeros.
fn is_all_zero(entries: &[RawException]) -> bool {
    entries
        .iter()
        .fold(0, |bits, e| bits | e.old_chunk.get() | e.new_chunk.get())
        == 0
}
