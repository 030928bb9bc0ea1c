//! `cow extract`: a snapshot as an image of its own, or into a pipe.

use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{Advice, SeekFrom, fadvise, seek};

use super::CowError;
use super::target::{Target, is_zero};
use super::view::{Piece, Source, View};

/// Read and written at a time.
const PIECE: u64 = 1 << 20;

/// Zeros of at least this length, at multiples of it, become holes.
const HOLE: usize = 64 << 10;

/// Write the snapshot to a new file at `path`, or to the block device there. Holes of
/// the origin, and zeros, are holes of a file.
pub fn to_file(
    view: &View,
    path: &Path,
    force: bool,
    progress: &mut dyn FnMut(u64),
) -> Result<(), CowError> {
    let target = Target::create(path, view.bytes(), force)?;
    let is_new = target.is_new();
    for_each_piece(view, is_new, &mut |offset, bytes| {
        if is_new {
            write_sparse(&target, offset, bytes)?;
        } else {
            target.write_all(offset, bytes)?;
        }
        progress(offset + bytes.len() as u64);
        Ok(())
    })?;
    target.finish()
}

/// Write all of the snapshot to a stream, from its first byte to its last.
pub fn to_stream(
    view: &View,
    out: &mut impl Write,
    progress: &mut dyn FnMut(u64),
) -> Result<(), CowError> {
    for_each_piece(view, false, &mut |offset, bytes| {
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

/// Hand out the snapshot in pieces, in their order. Holes of the origin may be left
/// out.
fn for_each_piece(
    view: &View,
    skip_holes: bool,
    each: &mut dyn FnMut(u64, &[u8]) -> Result<(), CowError>,
) -> Result<(), CowError> {
    // Both are read from their start to their end, more or less.
    let _ = fadvise(&view.origin().file, 0, None, Advice::Sequential);
    let _ = fadvise(&view.store().disk.file, 0, None, Advice::Normal);
    let mut buffer = vec![0; PIECE as usize];
    let mut hand_out = |range: Range<u64>| -> Result<(), CowError> {
        let mut at = range.start;
        while at < range.end {
            // Up to the next multiple, so that holes are where they can be.
            let end = ((at / PIECE + 1) * PIECE).min(range.end);
            let piece = &mut buffer[..(end - at) as usize];
            view.read(at, piece)?;
            each(at, piece)?;
            at = end;
        }
        Ok(())
    };
    if !skip_holes {
        return hand_out(0..view.bytes());
    }
    // What lies in one piece on either device is handed out together, except for
    // holes that are worth leaving out.
    let mut pending = 0..0;
    for Piece { range, source } in view.pieces(0..view.bytes()) {
        for part in parts_with_data(view, &range, source) {
            if part.start - pending.end >= HOLE as u64 {
                hand_out(pending.clone())?;
                pending.start = part.start;
            }
            pending.end = part.end;
        }
    }
    hand_out(pending)
}

/// The parts of a piece that are no hole of the origin.
fn parts_with_data(
    view: &View,
    range: &Range<u64>,
    source: Source,
) -> impl Iterator<Item = Range<u64>> {
    let file = &view.origin().file;
    let end = range.end;
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        if matches!(source, Source::Cow(_)) {
            return Some(std::mem::replace(&mut at, end)..end);
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
        Some(data..at)
    })
}

/// Write to a new file what is not zeros, in pieces that can be holes.
fn write_sparse(target: &Target, offset: u64, bytes: &[u8]) -> Result<(), CowError> {
    let mut from = 0;
    for (n, block) in bytes.chunks(HOLE).enumerate() {
        if is_zero(block) {
            let at = n * HOLE;
            if at > from {
                target.write_all(offset + from as u64, &bytes[from..at])?;
            }
            from = at + block.len();
        }
    }
    if from < bytes.len() {
        target.write_all(offset + from as u64, &bytes[from..])?;
    }
    Ok(())
}
