//! A snapshot's bytes: those of its store where it has exceptions, those of its
//! origin elsewhere. Sixteen bytes of memory an exception at most.

use std::ops::Range;
use std::path::Path;

use nbdsnap_format::{Exception, OriginChunk, Run, Runs};

use super::open::{open_disk, read_at};
use super::{CowError, CowStore, Reading};
use crate::server::setup::OpenDisk;
use crate::state::files::SystemFiles;
use crate::state::keeper::Keeper;
use crate::state::place::settled;

/// Where a part of a snapshot lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// At the same place of the origin.
    Origin,
    /// At this byte of the store.
    Cow(u64),
}

/// A part of a snapshot that lies in one piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Which part.
    pub range: Range<u64>,
    /// Where it lies.
    pub source: Source,
}

/// A snapshot that can be read.
#[derive(Debug)]
pub struct View {
    store: CowStore,
    origin: OpenDisk,
    /// In the order of the origin.
    exceptions: Vec<Exception>,
    /// How long the snapshot is.
    bytes: u64,
}

impl View {
    /// The snapshot in the store at `cow`, of the disk at `origin`. The store has to
    /// be sound.
    pub fn open(cow: &Path, origin: &Path, reading: Reading) -> Result<Self, CowError> {
        let store = CowStore::open(cow, reading)?;
        let origin = open_disk(origin, reading)?;
        Self::of(store, origin)
    }

    /// The same, of what is open.
    pub fn of(store: CowStore, origin: OpenDisk) -> Result<Self, CowError> {
        if is_same(&store.disk, &origin) {
            return Err(CowError::Same(origin.path));
        }
        store.insist_on_soundness(Some(origin.bytes))?;
        let mut exceptions = store.exceptions(None)?;
        exceptions.sort_unstable();
        let bytes = snapshot_bytes(&store, &origin)?;
        Ok(Self {
            store,
            origin,
            exceptions,
            bytes,
        })
    }

    /// How long the snapshot is, in bytes: as its disk was at its instant where the
    /// disk's list knows that, else as the disk is.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Its store.
    pub fn store(&self) -> &CowStore {
        &self.store
    }

    /// Its disk.
    pub fn origin(&self) -> &OpenDisk {
        &self.origin
    }

    /// Its exceptions, as runs in the order of the origin.
    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        Runs::of(self.exceptions.iter().copied())
    }

    /// Where `range`, which lies in the snapshot, comes from: pieces in ascending order.
    pub fn pieces(&self, range: Range<u64>) -> impl Iterator<Item = Piece> + '_ {
        let chunk_size = self.store.header.chunk_size;
        let first = chunk_size.origin_chunk(range.start);
        let from = self.exceptions.partition_point(|e| e.old < first);
        let mut runs = Runs::of(self.exceptions[from..].iter().copied()).peekable();
        let mut at = range.start;
        std::iter::from_fn(move || {
            if at >= range.end {
                return None;
            }
            let (end, source) = match runs.peek() {
                None => (range.end, Source::Origin),
                Some(run) => {
                    let covers = run.origin_range(chunk_size);
                    if at < covers.start {
                        (covers.start.min(range.end), Source::Origin)
                    } else {
                        let cow = run.cow_range(chunk_size).start + (at - covers.start);
                        if covers.end <= range.end {
                            runs.next();
                        }
                        (covers.end.min(range.end), Source::Cow(cow))
                    }
                }
            };
            let piece = Piece {
                range: at..end,
                source,
            };
            at = end;
            Some(piece)
        })
    }

    /// Whether the snapshot has an exception for `chunk`.
    pub fn has(&self, chunk: OriginChunk) -> bool {
        self.exceptions
            .binary_search_by_key(&chunk, |exception| exception.old)
            .is_ok()
    }

    /// Fill `buffer` with the snapshot's bytes from `offset` on.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), CowError> {
        for Piece { range, source } in self.pieces(offset..offset + buffer.len() as u64) {
            let part = &mut buffer[(range.start - offset) as usize..(range.end - offset) as usize];
            match source {
                Source::Origin => read_at(&self.origin, range.start, part)?,
                Source::Cow(at) => self.store.read(at, part)?,
            }
        }
        Ok(())
    }
}

/// Whether both are the same file or device.
pub(super) fn is_same(a: &OpenDisk, b: &OpenDisk) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (a.file.metadata(), b.file.metadata()) {
        (Ok(x), Ok(y)) if a.is_block_device && b.is_block_device => x.rdev() == y.rdev(),
        (Ok(x), Ok(y)) => (x.dev(), x.ino()) == (y.dev(), y.ino()),
        _ => false,
    }
}

/// A disk that grew has snapshots that did not; nothing but the disk's list says so,
/// nor which store is of a snapshot: read upon the disk that would show a mixture.
fn snapshot_bytes(store: &CowStore, origin: &OpenDisk) -> Result<u64, CowError> {
    let list = Keeper::open(SystemFiles, None).and_then(|keeper| keeper.list(&origin.path));
    let list = list.unwrap_or_default();
    let Some(listed) = list.find(&settled(store.path())) else {
        return Ok(origin.bytes);
    };
    if let Some(of) = listed.is_of() {
        return Err(CowError::OfSnapshot {
            cow: store.path().to_owned(),
            of: of.to_owned(),
        });
    }
    let known = listed.bytes;
    Ok(known.map_or(origin.bytes, |bytes| bytes.min(origin.bytes)))
}
