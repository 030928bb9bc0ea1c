//! `cow restore` and `cow create`: a store out of a dump, or out of nothing.

use std::path::Path;

use nbdsnap_format::dump::Dump;
use nbdsnap_format::{ChunkSize, Header, Layout};

use super::dump::exceptions;
use super::target::Target;
use super::{CowError, CowStore, Reading};
use crate::disks::{Opening, existing};

/// Copied at a time.
const PIECE: u64 = 1 << 20;

/// Where the store of a dump goes.
#[derive(Clone, Copy, Debug)]
pub enum Place<'a> {
    /// Into a new file, or a block device that holds nothing, or is given up.
    New {
        /// Its path.
        path: &'a Path,
        /// Whatever a block device holds.
        force: bool,
    },
    /// Into the store that is there: its header and areas are replaced, its data stays.
    InPlace(&'a Path),
}

/// Make the store of `dump`; with the data of the store `data`, at the places where
/// the dump says that they lie. `damaged` makes also what no snapshot can have.
pub fn run(
    dump: &Dump,
    text: &Path,
    place: Place<'_>,
    data: Option<&Path>,
    damaged: bool,
) -> Result<(), CowError> {
    let target = match place {
        Place::New { path, force } => Target::create(path, dump.store.bytes, force)?,
        Place::InPlace(path) => {
            let disk = existing(path, Opening::Write)?;
            if disk.bytes < dump.store.bytes {
                return Err(CowError::TooSmall {
                    path: disk.path,
                    found: disk.bytes,
                    needed: dump.store.bytes,
                });
            }
            Target::in_place(disk)
        }
    };
    if !damaged && let Some(error) = dump.contradiction(dump.store.bytes) {
        let path = text.to_owned();
        return Err(CowError::Contradiction { path, error });
    }
    if let Some(data) = data {
        copy_data(dump, &CowStore::open(data, Reading::Alone)?, &target)?;
    }
    target.write_store(dump.store.header, exceptions(dump), &dump.stale)?;
    target.finish()
}

/// The data that the runs of `dump` point to, at the same places.
fn copy_data(dump: &Dump, from: &CowStore, to: &Target) -> Result<(), CowError> {
    let chunk_size = dump.store.header.chunk_size;
    let mut buffer = vec![0; PIECE as usize];
    for run in &dump.runs {
        // What is misplaced has no data.
        let range = run.cow_range(chunk_size);
        let end = range.end.min(from.bytes()).min(to.bytes());
        let mut at = range.start;
        while at < end {
            let piece = &mut buffer[..PIECE.min(end - at) as usize];
            from.read(at, piece)?;
            to.write(at, piece)?;
            at += piece.len() as u64;
        }
    }
    Ok(())
}

/// Make an empty store, as the kernel does: a header, and a first area of zeros.
/// Answers how long it is.
pub fn create(
    path: &Path,
    bytes: Option<u64>,
    chunk_size: ChunkSize,
    force: bool,
) -> Result<u64, CowError> {
    let least = Layout::new(chunk_size).area_offset(0) + 2 * chunk_size.bytes();
    let bytes = match bytes {
        Some(bytes) => bytes,
        // A device is as large as it is.
        None => existing(path, Opening::ReadInUse)?.bytes,
    };
    if bytes < least {
        return Err(CowError::TooSmall {
            path: path.to_owned(),
            found: bytes,
            needed: least,
        });
    }
    let target = Target::create(path, bytes, force)?;
    let header = Header {
        valid: true,
        chunk_size,
    };
    target.write_store(header, [], &[])?;
    let bytes = target.bytes();
    target.finish()?;
    Ok(bytes)
}
