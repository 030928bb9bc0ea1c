//! What is wrong with a store. [`check`] reads all of its metadata through a
//! function that the caller brings, and answers with [`Findings`]. The crash
//! tests call it after every crash; the offline tools print what it says.
//!
//! It keeps at most 1 MiB of the store in memory at a time, and 8 bytes for each
//! exception, to find those that contradict each other: the chunks alone are
//! sorted, and the list is read once more only where two are the same.

use std::fmt;

use crate::area::{Bounds, Exception, Misplaced, Tail};
use crate::header::{Found, HEADER_BYTES, Header, HeaderError};
use crate::layout::{Layout, Slot};
use crate::list::{ListEnd, read_list};
use crate::units::{ChunkSize, CowChunk, OriginChunk, SECTOR_BYTES};

/// One thing that is wrong with a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// The magic is 0: there is no store.
    NoStore,
    /// The header is not one of a store.
    Header(HeaderError),
    /// Shorter than a header and one area.
    Truncated {
        /// Bytes there are.
        found: u64,
        /// Bytes the smallest store of this chunk size has.
        needed: u64,
    },
    /// An exception that points where none can.
    Misplaced {
        /// Where it is written.
        at: Slot,
        /// What it says.
        exception: Exception,
        /// What is wrong with that.
        why: Misplaced,
    },
    /// Two exceptions for one origin chunk: which data the snapshot shows there
    /// depends on who reads.
    SameOriginChunk {
        /// The chunk.
        old: OriginChunk,
        /// The earlier.
        first: Slot,
        /// The later.
        second: Slot,
    },
    /// Two exceptions whose data would lie in the same place: one of them shows
    /// what is not its own.
    SameStoreChunk {
        /// The chunk.
        new: CowChunk,
        /// The earlier.
        first: Slot,
        /// The later.
        second: Slot,
    },
    /// A write of an area was torn by a power cut. Opening the store for writing
    /// mends it.
    Torn {
        /// Where the list ends.
        end: Slot,
        /// The first stale entry of that area.
        from_entry: u64,
    },
    /// Behind the end of the list lie bytes that no torn write leaves.
    Corrupt {
        /// The first such entry.
        at: Slot,
    },
    /// The last area is full, and the store has no room for the next, where the
    /// list would end.
    NoNextArea {
        /// The area that is missing.
        area: u64,
        /// Bytes there are.
        found: u64,
        /// Bytes with that area.
        needed: u64,
    },
}

impl Finding {
    /// Whether opening the store for writing mends it. Every other finding keeps
    /// the store from being opened.
    pub const fn is_mended_by_opening(&self) -> bool {
        matches!(self, Self::Torn { .. })
    }

    /// A short name that stays, for programs.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::NoStore => "no-store",
            Self::Header(HeaderError::TooShort { .. }) => "header-too-short",
            Self::Header(HeaderError::WrongMagic { .. }) => "wrong-magic",
            Self::Header(HeaderError::WrongVersion { .. }) => "wrong-version",
            Self::Header(HeaderError::ImpossibleChunkSize { .. }) => "impossible-chunk-size",
            Self::Truncated { .. } => "truncated",
            Self::Misplaced { why, .. } => match why {
                Misplaced::OutsideStore => "outside-store",
                Misplaced::OnMetadata => "on-metadata",
                Misplaced::OutsideOrigin => "outside-origin",
            },
            Self::SameOriginChunk { .. } => "same-origin-chunk",
            Self::SameStoreChunk { .. } => "same-store-chunk",
            Self::Torn { .. } => "torn",
            Self::Corrupt { .. } => "corrupt",
            Self::NoNextArea { .. } => "no-next-area",
        }
    }

    /// The slot that it is about, if it is about one; of two the later.
    pub const fn slot(&self) -> Option<Slot> {
        match self {
            Self::Misplaced { at, .. } | Self::Corrupt { at } => Some(*at),
            Self::SameOriginChunk { second, .. } | Self::SameStoreChunk { second, .. } => {
                Some(*second)
            }
            Self::Torn { end, from_entry } => Some(Slot {
                area: end.area,
                index: *from_entry,
            }),
            Self::NoStore | Self::Header(_) | Self::Truncated { .. } | Self::NoNextArea { .. } => {
                None
            }
        }
    }

    /// What the kernel's dm-snapshot does with such a store.
    pub const fn kernel(&self) -> Kernel {
        match self {
            Self::NoStore => Kernel::Formats,
            Self::Header(_) | Self::Truncated { .. } | Self::NoNextArea { .. } => Kernel::Rejects,
            // It looks at no chunk number when it loads a store.
            Self::Misplaced { why, .. } => match why {
                Misplaced::OutsideStore | Misplaced::OutsideOrigin => Kernel::Fails,
                Misplaced::OnMetadata => Kernel::Misreads,
            },
            Self::SameOriginChunk { .. } | Self::SameStoreChunk { .. } | Self::Corrupt { .. } => {
                Kernel::Misreads
            }
            Self::Torn { .. } => Kernel::MisreadsLater,
        }
    }
}

/// What Linux's dm-snapshot does with a store that has a fault, if it is given to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kernel {
    /// It loads it, and reads what was meant.
    Accepts,
    /// It takes it for a device that was never used and makes an empty store of it.
    Formats,
    /// It refuses to load it.
    Rejects,
    /// It loads it; what needs the faulty exception ends with an I/O error: reading
    /// it, merging it, or the next allocation, which makes the snapshot invalid.
    Fails,
    /// It loads it, reads it as it is meant, and goes wrong without a word once more
    /// is written to it.
    MisreadsLater,
    /// It loads it and shows wrong data without a word.
    Misreads,
}

impl Kernel {
    /// A short name that stays, for programs.
    pub const fn code(self) -> &'static str {
        match self {
            Self::Accepts => "accepts",
            Self::Formats => "formats",
            Self::Rejects => "rejects",
            Self::Fails => "fails",
            Self::MisreadsLater => "misreads-later",
            Self::Misreads => "misreads",
        }
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Accepts => "the kernel accepts it",
            Self::Formats => "the kernel makes an empty store of it without asking",
            Self::Rejects => "the kernel rejects it",
            Self::Fails => "the kernel accepts it, and fails with an I/O error where it needs this",
            Self::MisreadsLater => {
                "the kernel accepts it, and shows wrong data, silently, once more is written to it"
            }
            Self::Misreads => "the kernel accepts it, and reads it wrongly, silently",
        })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoStore => write!(
                f,
                "no snapshot store: its first bytes are zeros, so it was never made, or its header is lost; the kernel would make a new one here without asking"
            ),
            Self::Header(error) => error.fmt(f),
            Self::Truncated { found, needed } => write!(
                f,
                "cut off: {found} bytes, where the header and the first area take {needed}; the exceptions are lost unless the rest is brought back"
            ),
            Self::Misplaced { at, exception, why } => write!(
                f,
                "{at}: origin chunk {} -> store chunk {}: {why}",
                exception.old, exception.new
            ),
            Self::SameOriginChunk { old, first, second } => write!(
                f,
                "{second}: origin chunk {old} has an exception already ({first}): the snapshot's data there is not certain"
            ),
            Self::SameStoreChunk { new, first, second } => write!(
                f,
                "{second}: its data would lie at store chunk {new}, where that of another exception lies ({first}): one of the two origin chunks shows wrong data"
            ),
            Self::Torn { end, from_entry } => write!(
                f,
                "the list of exceptions ends at {end}, and entries of a write that a power cut tore follow from entry {from_entry} on: no data is lost, and opening the store for writing removes them; the kernel does not, so open it here first"
            ),
            Self::Corrupt { at } => write!(
                f,
                "{at}: it lies behind the end of the list of exceptions and is not empty, and no torn write leaves that: the store is damaged, and exceptions may be missing"
            ),
            Self::NoNextArea {
                area,
                found,
                needed,
            } => write!(
                f,
                "all areas are full, and area {area}, where the list of exceptions would end, does not fit: {found} bytes, where it needs {needed}; the kernel refuses such a store too: make it that long, with zeros, and it can be opened"
            ),
        }
    }
}

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Findings {
    /// The header, if there is one. A store that it calls invalid holds a lost
    /// snapshot: that is no fault, and its exceptions are not looked at.
    pub header: Option<Header>,
    /// Exceptions in the store.
    pub exceptions: u64,
    /// The data chunk that would be handed out next.
    pub next_free: CowChunk,
    /// Data chunks before the last one in use that no exception points to. They are
    /// never handed out again: a merge or a power cut left them, and they are no
    /// fault.
    pub unreferenced: u64,
    /// How the list of exceptions ended; none where it was not read.
    pub end: Option<ListEnd>,
    /// What is wrong, the first [`Findings::LIMIT`].
    pub list: Vec<Finding>,
    /// How many more things are wrong.
    pub left_out: u64,
}

impl Findings {
    /// The most findings that are listed. A damaged store of a terabyte can have
    /// a billion; nobody reads them, and each takes memory.
    pub const LIMIT: usize = 1000;

    /// Whether nothing is wrong.
    pub fn is_sound(&self) -> bool {
        self.list.is_empty()
    }

    /// Whether nothing is wrong that opening the store for writing does not mend.
    pub fn can_be_opened(&self) -> bool {
        self.left_out == 0 && self.list.iter().all(Finding::is_mended_by_opening)
    }

    fn new() -> Self {
        Self {
            header: None,
            exceptions: 0,
            next_free: CowChunk(2),
            unreferenced: 0,
            end: None,
            list: Vec::new(),
            left_out: 0,
        }
    }

    fn add(&mut self, finding: Finding) {
        if self.list.len() < Self::LIMIT {
            self.list.push(finding);
        } else {
            self.left_out += 1;
        }
    }
}

/// Check the store of `store_bytes` bytes that `read` reads: it fills a buffer
/// with the bytes at an offset, which always lie in the store. Where the
/// length of the origin is known, exceptions outside it are found too.
///
/// Fails only if `read` does.
pub fn check<E>(
    mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    store_bytes: u64,
    origin_bytes: Option<u64>,
) -> Result<Findings, E> {
    let mut findings = Findings::new();
    if let Some(header) = check_header(&mut read, store_bytes, &mut findings)? {
        findings.header = Some(header);
        if header.valid {
            let bounds = Bounds::new(header.chunk_size, store_bytes, origin_bytes);
            let mut scan = Scan {
                read: &mut read,
                bounds,
                findings: &mut findings,
                chunks: Vec::new(),
            };
            scan.list(store_bytes)?;
        }
    }
    Ok(findings)
}

/// The header, or a finding.
fn check_header<E>(
    read: &mut impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    store_bytes: u64,
    findings: &mut Findings,
) -> Result<Option<Header>, E> {
    let mut sector = [0; HEADER_BYTES];
    let there = &mut sector[..store_bytes.min(SECTOR_BYTES) as usize];
    read(0, there)?;
    match Header::decode(there) {
        Ok(Found::Store(header)) => return Ok(Some(header)),
        Ok(Found::New) => findings.add(Finding::NoStore),
        Err(error) => findings.add(Finding::Header(error)),
    }
    Ok(None)
}

/// The look at a list.
struct Scan<'a, R> {
    read: &'a mut R,
    bounds: Bounds,
    findings: &'a mut Findings,
    /// Of every exception one chunk, of the origin or of the store.
    chunks: Vec<u64>,
}

/// Two exceptions, by their numbers, that share a chunk.
struct Pair {
    chunk: u64,
    first: u64,
    second: u64,
}

impl<E, R: FnMut(u64, &mut [u8]) -> Result<(), E>> Scan<'_, R> {
    /// All exceptions, each judged by itself; the end of their list; and then those
    /// that contradict each other.
    fn list(&mut self, store_bytes: u64) -> Result<(), E> {
        let (bounds, layout) = (self.bounds, self.bounds.layout());
        let mut highest = None;
        // The highest in the store; and whether they all ascend, as they do in
        // every store but one that was merged or damaged.
        let (mut highest_there, mut placed, mut ascending) = (None, 0, true);
        let end = read_list(bounds, self.read, |n, exception| {
            let why = bounds.misplaced(exception);
            if let Some(why) = why {
                let at = layout.slot(n);
                self.findings.add(Finding::Misplaced { at, exception, why });
            }
            if !matches!(why, Some(Misplaced::OutsideStore | Misplaced::OnMetadata)) {
                highest_there = highest_there.max(Some(exception.new));
                placed += 1;
            }
            ascending &= highest.is_none_or(|before| before < exception.new);
            highest = highest.max(Some(exception.new));
            self.findings.exceptions = n + 1;
            self.chunks.push(exception.old.0);
        })?;
        self.findings.next_free = layout.next_free(highest);
        self.findings.end = Some(end);
        if let Some(finding) = judge_end(end, layout.chunk_size(), store_bytes) {
            self.findings.add(finding);
        }
        for Pair {
            chunk,
            first,
            second,
        } in self.shared(|exception| exception.old.0)?
        {
            self.findings.add(Finding::SameOriginChunk {
                old: OriginChunk(chunk),
                first: layout.slot(first),
                second: layout.slot(second),
            });
        }
        let mut twice = 0;
        if !ascending {
            self.chunks.clear();
            read_list(bounds, self.read, |_, e| self.chunks.push(e.new.0))?;
            let left_out = self.findings.left_out;
            let pairs = self.shared(|exception| exception.new.0)?;
            twice = pairs.len() as u64 + (self.findings.left_out - left_out);
            for Pair {
                chunk,
                first,
                second,
            } in pairs
            {
                self.findings.add(Finding::SameStoreChunk {
                    new: CowChunk(chunk),
                    first: layout.slot(first),
                    second: layout.slot(second),
                });
            }
        }
        let handed_out = layout.data_chunks_before(layout.next_free(highest_there));
        self.findings.unreferenced = (handed_out + twice).saturating_sub(placed);
        Ok(())
    }

    /// Exceptions that share a chunk, in the order of chunks: of several at one,
    /// each with the one before it. As many as can still be listed; the others are
    /// counted as left out. `self.chunks` holds the chunk of every exception.
    fn shared(&mut self, chunk_of: impl Fn(Exception) -> u64) -> Result<Vec<Pair>, E> {
        /// A chunk that several exceptions share.
        struct Sharing {
            chunk: u64,
            wanted: usize,
            last: Option<u64>,
            pairs: Vec<Pair>,
        }
        self.chunks.sort_unstable();
        let mut room = Findings::LIMIT.saturating_sub(self.findings.list.len());
        let mut sharing: Vec<Sharing> = Vec::new();
        for same in self.chunks.chunk_by(|a, b| a == b).filter(|c| c.len() > 1) {
            let wanted = room.min(same.len() - 1);
            self.findings.left_out += (same.len() - 1 - wanted) as u64;
            room -= wanted;
            if wanted > 0 {
                sharing.push(Sharing {
                    chunk: same[0],
                    wanted,
                    last: None,
                    pairs: Vec::new(),
                });
            }
        }
        self.chunks = Vec::new();
        if sharing.is_empty() {
            return Ok(Vec::new());
        }
        read_list(self.bounds, self.read, |n, exception| {
            let chunk = chunk_of(exception);
            let Ok(at) = sharing.binary_search_by_key(&chunk, |one| one.chunk) else {
                return;
            };
            let one = &mut sharing[at];
            if let Some(first) = one.last.replace(n)
                && one.pairs.len() < one.wanted
            {
                one.pairs.push(Pair {
                    chunk,
                    first,
                    second: n,
                });
            }
        })?;
        Ok(sharing.into_iter().flat_map(|one| one.pairs).collect())
    }
}

/// What is wrong with how the list ended.
fn judge_end(end: ListEnd, chunk_size: ChunkSize, store_bytes: u64) -> Option<Finding> {
    let layout = Layout::new(chunk_size);
    match end {
        ListEnd::InArea {
            area,
            entries: index,
            tail,
        } => match tail {
            Tail::Clean => None,
            Tail::Torn { from_entry } => Some(Finding::Torn {
                end: Slot { area, index },
                from_entry,
            }),
            Tail::Corrupt { entry: index } => Some(Finding::Corrupt {
                at: Slot { area, index },
            }),
        },
        ListEnd::NoArea { area } => {
            let found = store_bytes;
            let needed = layout.area_offset(area).saturating_add(chunk_size.bytes());
            Some(if area == 0 {
                Finding::Truncated { found, needed }
            } else {
                Finding::NoNextArea {
                    area,
                    found,
                    needed,
                }
            })
        }
    }
}
