//! `cow extract`: a snapshot as an image of its own, or into a pipe.

use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{Advice, SeekFrom, fadvise, seek};

use super::CowError;
use super::hints::{WriteBack, fits_in_memory, read_ahead};
use super::target::{Sink, Target, is_zero};
use super::view::{Piece, Source, View};

/// Read and written at a time.
const PIECE: u64 = 1 << 20;

/// Runs of this length are read well as they come: the kernel reads ahead in them.
const LONG_RUN: u64 = 16 << 20;

/// Zeros of at least this length, at multiples of it, become holes.
const HOLE: usize = 64 << 10;

/// A block is looked at as a whole only if it begins with so many zeros.
const SAMPLE: usize = 512;

/// Write the snapshot to a new file at `path`, or to the block device there. Holes of
/// the origin, and zeros, are holes of a file.
pub fn to_file(
    view: &View,
    path: &Path,
    force: bool,
    progress: &mut dyn FnMut(u64),
) -> Result<(), CowError> {
    let target = Target::create(path, view.bytes(), force)?;
    prepare(view);
    if target.is_new() {
        let mut copier = Copier::new(view, &target);
        for piece in view.pieces(0..view.bytes()) {
            copier.take(&piece)?;
            progress(piece.range.end);
        }
        copier.copy_gathered()?;
    } else {
        for_each_piece(view, &mut |offset, bytes| {
            progress(offset + bytes.len() as u64);
            target.write_all(offset, bytes)
        })?;
    }
    target.finish()
}

/// Write all of the snapshot to a stream, from its first byte to its last.
pub fn to_stream(
    view: &View,
    out: &mut impl Write,
    progress: &mut dyn FnMut(u64),
) -> Result<(), CowError> {
    prepare(view);
    for_each_piece(view, &mut |offset, bytes| {
        out.write_all(bytes).map_err(CowError::output)?;
        progress(offset + bytes.len() as u64);
        Ok(())
    })?;
    out.flush().map_err(CowError::output)
}

/// Write the snapshot as a qcow2 image, by qemu-img. It reads no pipe, so that there
/// is a raw image beside it meanwhile, with holes where it can have them.
pub fn to_qcow2(view: &View, path: &Path, progress: &mut dyn FnMut(u64)) -> Result<(), CowError> {
    const PROGRAM: &str = "qemu-img";
    if path.exists() {
        return Err(CowError::Exists(path.to_owned()));
    }
    let beside = |suffix: &str| {
        let mut name = path.to_owned();
        name.as_mut_os_string().push(suffix);
        Gone(name)
    };
    let (raw, image) = (beside(".raw"), beside(".qcow2-unfinished"));
    to_file(view, &raw.0, false, progress)?;
    let ended = Command::new(PROGRAM)
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .args([&raw.0, &image.0])
        .output();
    let failed = |error| CowError::Program {
        program: PROGRAM,
        error,
    };
    let ended = ended.map_err(|error| failed(error.to_string()))?;
    if !ended.status.success() {
        let said = String::from_utf8_lossy(&ended.stderr);
        return Err(failed(
            said.split_whitespace().collect::<Vec<_>>().join(" "),
        ));
    }
    std::fs::File::open(&image.0)
        .and_then(|file| file.sync_all())
        .and_then(|()| std::fs::rename(&image.0, path))
        .and_then(|()| crate::disks::sync_folder_of(path))
        .map_err(CowError::io(path, "making it durable", 0))
}

/// A file that is deleted at the end, if it is still there.
struct Gone(PathBuf);

impl Drop for Gone {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The disk is read from its start to its end. A store of short runs is read here and
/// there, and all of it: where it can stay in memory, it is read in one go instead.
fn prepare(view: &View) {
    let _ = fadvise(&view.origin().file, 0, None, Advice::Sequential);
    let (store, chunk_size) = (view.store(), view.store().header.chunk_size);
    let (runs, chunks) = view.runs().fold((0, 0), |(runs, chunks), run| {
        (runs + 1, chunks + run.chunks)
    });
    let bytes = chunks * chunk_size.bytes();
    if bytes >= runs * LONG_RUN {
        let _ = fadvise(&store.disk.file, 0, None, Advice::Sequential);
    } else if fits_in_memory(bytes) {
        let last = view.runs().map(|run| run.cow_range(chunk_size).end).max();
        // What lies between the runs is read too.
        let end = last.unwrap_or(0).min(2 * bytes);
        read_ahead(&store.disk.file, 0..end);
    }
}

/// Hand out all of the snapshot in pieces, in their order.
fn for_each_piece(view: &View, each: Sink<'_>) -> Result<(), CowError> {
    let mut buffer = vec![0; PIECE as usize];
    let mut at = 0;
    while at < view.bytes() {
        let piece = &mut buffer[..PIECE.min(view.bytes() - at) as usize];
        view.read(at, piece)?;
        each(at, piece)?;
        at += piece.len() as u64;
    }
    Ok(())
}

/// The parts of a piece that are no hole of the origin.
fn parts_with_data(view: &View, piece: &Piece) -> impl Iterator<Item = Piece> {
    let file = &view.origin().file;
    let (source, end) = (piece.source, piece.range.end);
    let mut at = piece.range.start;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        if matches!(source, Source::Cow(_)) {
            let range = std::mem::replace(&mut at, end)..end;
            return Some(Piece { range, source });
        }
        // Where a file system cannot tell, all is data; NXIO is a hole to the end.
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => end,
            Err(_) => at,
        };
        if data >= end {
            at = end;
            return None;
        }
        let hole = seek(file, SeekFrom::Hole(data)).unwrap_or(end).min(end);
        at = hole.max(data + 1);
        let range = data..at;
        Some(Piece { range, source })
    })
}

/// Copies a snapshot to a new file. The kernel copies long pieces, except for blocks
/// that begin with zeros: those are looked at, and may become holes. Short ones are
/// gathered, and written together.
struct Copier<'a> {
    view: &'a View,
    target: &'a Target,
    buffer: Vec<u8>,
    /// Short pieces, one behind the other.
    gathered: Range<u64>,
    write_back: WriteBack,
}

impl<'a> Copier<'a> {
    fn new(view: &'a View, target: &'a Target) -> Self {
        Self {
            view,
            target,
            buffer: vec![0; PIECE as usize],
            gathered: 0..0,
            write_back: WriteBack::default(),
        }
    }

    /// The next piece of the snapshot.
    fn take(&mut self, piece: &Piece) -> Result<(), CowError> {
        if piece.range.end - piece.range.start >= PIECE {
            self.copy_gathered()?;
            self.gathered = piece.range.end..piece.range.end;
            let view = self.view;
            return parts_with_data(view, piece).try_for_each(|part| self.copy(&part));
        }
        if piece.range.end - self.gathered.start > PIECE {
            self.copy_gathered()?;
            self.gathered = piece.range.clone();
        }
        self.gathered.end = piece.range.end;
        Ok(())
    }

    /// Write what was gathered, but for blocks of zeros.
    fn copy_gathered(&mut self) -> Result<(), CowError> {
        let range = std::mem::take(&mut self.gathered);
        let bytes = &mut self.buffer[..(range.end - range.start) as usize];
        self.view.read(range.start, bytes)?;
        let bytes = &*bytes;
        let (mut from, mut at) = (range.start, range.start);
        let slice =
            |from: u64, to: u64| &bytes[(from - range.start) as usize..(to - range.start) as usize];
        while at < range.end {
            let end = block_end(at, range.end);
            if is_zero(slice(at, end)) {
                self.target.write_all(from, slice(from, at))?;
                from = end;
            }
            at = end;
        }
        self.target.write_all(from, slice(from, range.end))?;
        self.write_back.wrote(self.target.opened(), range);
        Ok(())
    }

    fn copy(&mut self, part: &Piece) -> Result<(), CowError> {
        let end = part.range.end;
        let (mut from, mut at) = (part.range.start, part.range.start);
        while at < end {
            let block = at..block_end(at, end);
            if self.is_zero(&block)? {
                self.copy_data(part, from..at)?;
                from = block.end;
            }
            at = block.end;
        }
        self.copy_data(part, from..end)
    }

    fn is_zero(&mut self, block: &Range<u64>) -> Result<bool, CowError> {
        let len = (block.end - block.start) as usize;
        let sample = len.min(SAMPLE);
        self.view.read(block.start, &mut self.buffer[..sample])?;
        if !is_zero(&self.buffer[..sample]) {
            return Ok(false);
        }
        self.view.read(block.start, &mut self.buffer[..len])?;
        Ok(is_zero(&self.buffer[..len]))
    }

    /// Copy a range of `part`, whatever is in it.
    fn copy_data(&mut self, part: &Piece, range: Range<u64>) -> Result<(), CowError> {
        if range.is_empty() {
            return Ok(());
        }
        let (disk, start) = match part.source {
            Source::Origin => (self.view.origin(), range.start),
            Source::Cow(at) => (
                &self.view.store().disk,
                at + (range.start - part.range.start),
            ),
        };
        let len = range.end - range.start;
        let mut at = range.start + self.target.copy_from(disk, start, range.start, len);
        // The kernel does not copy between any two file systems, nor from devices.
        while at < range.end {
            let piece = &mut self.buffer[..PIECE.min(range.end - at) as usize];
            self.view.read(at, piece)?;
            self.target.write_all(at, piece)?;
            at += piece.len() as u64;
        }
        self.write_back.wrote(self.target.opened(), range);
        Ok(())
    }
}

/// Where the block ends in which `at` lies: at a multiple of [`HOLE`], or at `end`.
fn block_end(at: u64, end: u64) -> u64 {
    ((at / HOLE as u64 + 1) * HOLE as u64).min(end)
}
