//! What is wrong with a store. [`check`] reads all of its metadata through a
//! function that the caller brings, and answers with [`Findings`]. The crash
//! tests call it after every crash; the offline tools print what it says.
//!
//! It keeps at most 1 MiB of the store in memory at a time, and 24 bytes for
//! each exception, to find those that contradict each other.

use std::fmt;

use crate::area::{Bounds, Exception, Misplaced, Tail};
use crate::header::{Found, HEADER_BYTES, Header, HeaderError};
use crate::layout::{Layout, Slot};
use crate::list::{ListEnd, ListReader, MAX_READ_BYTES};
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
            let exceptions = check_list(&mut read, bounds, store_bytes, &mut findings)?;
            find_contradictions(bounds.layout(), &exceptions, &mut findings);
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

/// All exceptions, in their order, each judged by itself; and the end of their
/// list.
fn check_list<E>(
    read: &mut impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    bounds: Bounds,
    store_bytes: u64,
    findings: &mut Findings,
) -> Result<Vec<Exception>, E> {
    let layout = bounds.layout();
    let mut exceptions: Vec<Exception> = Vec::new();
    let mut buffer = vec![0; layout.chunk_size().bytes().min(MAX_READ_BYTES) as usize];
    let mut list = ListReader::new(bounds);
    while let Some(wanted) = list.poll_read() {
        let piece = &mut buffer[..wanted.len];
        read(wanted.offset, piece)?;
        for exception in list.handle_read(piece) {
            if let Some(why) = bounds.misplaced(exception) {
                let at = layout.slot(exceptions.len() as u64);
                findings.add(Finding::Misplaced { at, exception, why });
            }
            exceptions.push(exception);
        }
    }
    findings.exceptions = list.exceptions();
    findings.next_free = layout.next_free(exceptions.iter().map(|e| e.new).max());
    let end = list.end().expect("a list that wants no bytes has ended");
    if let Some(finding) = judge_end(end, layout.chunk_size(), store_bytes) {
        findings.add(finding);
    }
    Ok(exceptions)
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

/// Exceptions that share a chunk, of the origin or of the store. Of several at
/// one chunk, each is reported with the one before it.
fn find_contradictions(layout: Layout, exceptions: &[Exception], findings: &mut Findings) {
    let mut order: Vec<u64> = (0..exceptions.len() as u64).collect();
    let at = |n: u64| exceptions[n as usize];

    order.sort_unstable_by_key(|&n| (at(n).old, n));
    for pair in order.windows(2).filter(|p| at(p[0]).old == at(p[1]).old) {
        findings.add(Finding::SameOriginChunk {
            old: at(pair[0]).old,
            first: layout.slot(pair[0]),
            second: layout.slot(pair[1]),
        });
    }

    order.sort_unstable_by_key(|&n| (at(n).new, n));
    for pair in order.windows(2).filter(|p| at(p[0]).new == at(p[1]).new) {
        findings.add(Finding::SameStoreChunk {
            new: at(pair[0]).new,
            first: layout.slot(pair[0]),
            second: layout.slot(pair[1]),
        });
    }
}
