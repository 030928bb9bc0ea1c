//! `cow shrink`, `cow grow` and `cow convert`: the same snapshot in a new store, of
//! another length or with another chunk size. Its exceptions are listed in the order
//! of the origin, without gaps.

use std::path::Path;

use nbdsnap_format::runs::{clipped, joined};
use nbdsnap_format::{ChunkSize, Exception, Header, Layout, OriginChunk};

use super::open::open_disk;
use super::target::{Sink, Target};
use super::view::View;
use super::{CowError, CowStore, Reading};

/// Read and written at a time.
const PIECE: u64 = 1 << 20;

/// What the new store is to be like.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// Where it is made.
    pub output: &'a Path,
    /// How long; none: as long as it has to be.
    pub bytes: Option<u64>,
    /// Whatever a block device holds.
    pub force: bool,
}

/// Make the store `cow` anew with the same chunk size and another length. Answers how
/// long it is.
pub fn resize(
    cow: &Path,
    wanted: Wanted<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<u64, CowError> {
    let store = CowStore::open(cow, Reading::Alone)?;
    store.insist_on_soundness(None)?;
    let mut exceptions = store.exceptions(None)?;
    exceptions.sort_unstable();
    let layout = store.layout();
    let chunk_size = layout.chunk_size();
    let target = make(wanted, layout, exceptions.len() as u64)?;
    let mut areas = target.areas(chunk_size)?;
    let mut buffer = vec![0; PIECE.min(chunk_size.bytes()) as usize];
    for (n, exception) in (0..).zip(&exceptions) {
        let new = layout.data_chunk(n);
        let (from, to) = (
            chunk_size.cow_offset(exception.new),
            chunk_size.cow_offset(new),
        );
        let mut done = 0;
        while done < chunk_size.bytes() {
            store.read(from + done, &mut buffer)?;
            target.write(to + done, &buffer)?;
            done += buffer.len() as u64;
        }
        let old = exception.old;
        areas.push(Exception { old, new })?;
        progress((n + 1) * chunk_size.bytes());
    }
    areas.finish(store.header, &[])?;
    let bytes = target.bytes();
    target.finish()?;
    Ok(bytes)
}

/// Make the store `cow` anew with another chunk size. What a larger chunk has around
/// what was copied comes from the origin. Answers how long the new store is.
pub fn convert(
    cow: &Path,
    origin: &Path,
    chunk_size: ChunkSize,
    wanted: Wanted<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<u64, CowError> {
    let store = CowStore::open(cow, Reading::Alone)?;
    let view = View::of(store, open_disk(origin, Reading::Alone)?)?;
    let layout = Layout::new(chunk_size);
    let chunks = || chunks(&view, chunk_size);
    let target = make(wanted, layout, chunks().count() as u64)?;
    let mut areas = target.areas(chunk_size)?;
    let mut buffer = vec![0; PIECE.min(chunk_size.bytes()) as usize];
    for (n, old) in (0..).zip(chunks()) {
        let new = layout.data_chunk(n);
        copy_chunk(&view, chunk_size, old, &mut buffer, &mut |done, bytes| {
            target.write(chunk_size.cow_offset(new) + done, bytes)
        })?;
        areas.push(Exception { old, new })?;
        progress((n + 1) * chunk_size.bytes());
    }
    let header = Header {
        valid: true,
        chunk_size,
    };
    areas.finish(header, &[])?;
    let bytes = target.bytes();
    target.finish()?;
    Ok(bytes)
}

/// A store for so many exceptions.
fn make(wanted: Wanted<'_>, layout: Layout, exceptions: u64) -> Result<Target, CowError> {
    let least = layout
        .sectors_for(exceptions)
        .max(3 * layout.chunk_size().sectors());
    let least = least.saturating_mul(nbdsnap_format::SECTOR_BYTES);
    let bytes = wanted.bytes.unwrap_or(least);
    if bytes < least {
        return Err(CowError::TooSmall {
            path: wanted.output.to_owned(),
            found: bytes,
            needed: least,
        });
    }
    Target::create(wanted.output, bytes, wanted.force)
}

/// The chunks of this size that have something of an exception in them.
fn chunks(view: &View, chunk_size: ChunkSize) -> impl Iterator<Item = OriginChunk> {
    let old_size = view.store().header.chunk_size;
    let grain = chunk_size.bytes();
    let changed = joined(
        view.runs()
            .map(move |run| clipped(&run.origin_range(old_size), Some(view.bytes()))),
    );
    // In whole chunks of the new size two ranges may share one.
    joined(changed.map(move |range| range.start / grain..range.end.div_ceil(grain)))
        .flatten()
        .map(OriginChunk)
}

/// One chunk of the snapshot, in pieces; past its end are zeros.
fn copy_chunk(
    view: &View,
    chunk_size: ChunkSize,
    chunk: OriginChunk,
    buffer: &mut [u8],
    write: Sink<'_>,
) -> Result<(), CowError> {
    let start = chunk_size.origin_offset(chunk);
    let mut done = 0;
    while done < chunk_size.bytes() {
        let at = start + done;
        let there = view.bytes().saturating_sub(at).min(buffer.len() as u64) as usize;
        view.read(at, &mut buffer[..there])?;
        buffer[there..].fill(0);
        write(done, buffer)?;
        done += buffer.len() as u64;
    }
    Ok(())
}

/// How long a store of `exceptions` exceptions has to be, in bytes; the last of them
/// has room for the area behind it where that is needed.
pub fn bytes_for(chunk_size: ChunkSize, exceptions: u64) -> u64 {
    Layout::new(chunk_size)
        .sectors_for(exceptions)
        .saturating_mul(nbdsnap_format::SECTOR_BYTES)
}
