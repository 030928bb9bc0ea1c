//! Blocking execution of the engine's disk operations on a file or block
//! device: one call performs one [`Action`] to its end.
//!
//! It promises that an action ends whole or with an error: short transfers are
//! continued, interrupted calls repeated, a read past the end of the file is an
//! error. It never retries a failed flush (durability: a second fdatasync
//! succeeds with the data gone). Called by the helper threads of the loop, by
//! the loop itself for what it knows to be quick, and by the command line while
//! it makes and opens stores.

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::AsRawFd;

use bytes::Bytes;
use nbdsnap_engine::{Action, DiskError, Outcome};
use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::io::Errno;

use super::sys;

/// What an action is performed on. It decides how zeros are made: an origin may
/// leave that to the file system or the drive, a COW store gets zeros that were
/// written, because an unwritten extent makes the later commits into it slow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    /// The disk, a file.
    OriginFile,
    /// The disk, a block device.
    OriginBlockDevice,
    /// A COW store, file or block device.
    Store,
}

/// Zeros are written in pieces of this size.
const ZERO_PIECE: usize = 256 << 10;

/// Block devices zero and discard at this grain at least; what hangs over is
/// written (zeros) or left alone (trim).
const BLOCK_GRAIN: u64 = 4096;

/// The kernel takes no more pieces in one vectored call (IOV_MAX).
const MAX_PIECES: usize = 1024;

/// And in pieces of this size where they go to the disk directly.
const DIRECT_PIECE: usize = 128 << 10;

/// Aligned as direct writes ask for.
#[repr(align(4096))]
struct Zeros([u8; ZERO_PIECE]);

static ZEROS: Zeros = Zeros([0; ZERO_PIECE]);

/// Perform `action` and say how it ended. Blocks as long as the disk does.
pub fn perform(file: &File, medium: Medium, action: &Action) -> Outcome {
    let done = match action {
        Action::Read { offset, len } => return read_exact(file, *offset, *len),
        Action::Write { offset, data } => write_all(file, *offset, data),
        Action::WriteZeroes {
            offset,
            len,
            may_punch,
        } => write_zeroes(file, medium, *offset, *len, *may_punch),
        Action::Trim { offset, len } => trim(file, medium, *offset, *len),
        Action::Flush => rustix::fs::fdatasync(file),
        Action::Grow { to } => grow(file, *to),
    };
    done.map(|()| Bytes::new()).map_err(disk_error)
}

/// The engine's word for an error of the operating system.
pub fn disk_error(errno: Errno) -> DiskError {
    match errno {
        Errno::NOSPC | Errno::DQUOT | Errno::FBIG => DiskError::NoSpace,
        other => DiskError::Io(other.raw_os_error()),
    }
}

/// Repeat a call until no signal interrupts it.
pub(super) fn uninterrupted<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            ended => return ended,
        }
    }
}

fn read_exact(file: &File, offset: u64, len: u64) -> Outcome {
    read_into(file, offset, len, Vec::new()).map(Bytes::from)
}

/// What [`Action::Read`] reads, in memory that there is already.
pub fn read_into(
    file: &File,
    offset: u64,
    len: u64,
    mut bytes: Vec<u8>,
) -> Result<Vec<u8>, DiskError> {
    let len = usize::try_from(len).map_err(|_| disk_error(Errno::NOMEM))?;
    bytes.clear();
    bytes.reserve_exact(len);
    while bytes.len() < len {
        let want = len - bytes.len();
        let at = offset + bytes.len() as u64;
        match uninterrupted(|| sys::read_append(file, &mut bytes, want, at, sys::Wait::Block)) {
            // The file is shorter than the disk that it was when it was opened.
            Ok(0) => return Err(disk_error(Errno::IO)),
            Ok(_) => {}
            Err(errno) => return Err(disk_error(errno)),
        }
    }
    Ok(bytes)
}

fn write_all(file: &File, offset: u64, data: &[Bytes]) -> Result<(), Errno> {
    let mut at = offset;
    for batch in data.chunks(MAX_PIECES) {
        let mut pieces: Vec<IoSlice<'_>> = batch.iter().map(|piece| IoSlice::new(piece)).collect();
        let mut rest = &mut pieces[..];
        // Empty pieces in front would make a write of nothing look like a full disk.
        IoSlice::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            let written = uninterrupted(|| rustix::io::pwritev(file, rest, at))?;
            if written == 0 {
                return Err(Errno::NOSPC);
            }
            at += written as u64;
            IoSlice::advance_slices(&mut rest, written);
        }
    }
    Ok(())
}

fn write_zeroes(
    file: &File,
    medium: Medium,
    offset: u64,
    len: u64,
    may_punch: bool,
) -> Result<(), Errno> {
    match medium {
        Medium::OriginFile => {
            let mode = if may_punch {
                FallocateFlags::PUNCH_HOLE
            } else {
                FallocateFlags::ZERO_RANGE
            };
            let zeroed = uninterrupted(|| {
                rustix::fs::fallocate(file, mode | FallocateFlags::KEEP_SIZE, offset, len)
            });
            match zeroed {
                Err(errno) if is_unsupported(errno) => write_zero_bytes(file, offset, len),
                ended => ended,
            }
        }
        Medium::OriginBlockDevice => {
            let Some((inner, inner_len)) = whole_blocks(offset, len) else {
                return write_zero_bytes(file, offset, len);
            };
            match uninterrupted(|| sys::block_zero_out(file, inner, inner_len)) {
                Err(errno) if is_unsupported(errno) => return write_zero_bytes(file, offset, len),
                ended => ended?,
            }
            write_zero_bytes(file, offset, inner - offset)?;
            let inner_end = inner + inner_len;
            write_zero_bytes(file, inner_end, offset + len - inner_end)
        }
        Medium::Store => write_zero_bytes(file, offset, len),
    }
}

fn write_zero_bytes(file: &File, offset: u64, len: u64) -> Result<(), Errno> {
    let mut at = offset;
    let end = offset + len;
    while at < end {
        let piece = (end - at).min(ZERO_PIECE as u64) as usize;
        let written = uninterrupted(|| rustix::io::pwrite(file, &ZEROS.0[..piece], at))?;
        if written == 0 {
            return Err(Errno::NOSPC);
        }
        at += written as u64;
    }
    Ok(())
}

/// Trimming is advice: where it cannot be done it has succeeded.
fn trim(file: &File, medium: Medium, offset: u64, len: u64) -> Result<(), Errno> {
    let trimmed = match medium {
        Medium::OriginFile => {
            let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            uninterrupted(|| rustix::fs::fallocate(file, mode, offset, len))
        }
        Medium::OriginBlockDevice => match whole_blocks(offset, len) {
            Some((inner, inner_len)) => {
                uninterrupted(|| sys::block_discard(file, inner, inner_len))
            }
            None => Ok(()),
        },
        // A hole in a store would have to be allocated again at the worst time.
        Medium::Store => Ok(()),
    };
    match trimmed {
        Err(errno) if is_unsupported(errno) => Ok(()),
        ended => ended,
    }
}

/// The part of the range that consists of whole [`BLOCK_GRAIN`] blocks.
fn whole_blocks(offset: u64, len: u64) -> Option<(u64, u64)> {
    let start = offset.next_multiple_of(BLOCK_GRAIN);
    let end = (offset + len) / BLOCK_GRAIN * BLOCK_GRAIN;
    (start < end).then(|| (start, end - start))
}

/// "This file system or drive cannot do that", in the ways they say it.
fn is_unsupported(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NOTTY | Errno::NODEV | Errno::PERM
    )
}

/// Reserve, write zeros, make the new length durable. On failure the file has
/// its old length again.
/// On an open file description of its own: the kernel reports that writing back
/// failed once to each, and the report that a commit's flush waits for must not be
/// taken away by the flush of a growth that runs beside it.
fn grow(file: &File, to: u64) -> Result<(), Errno> {
    // Where there is no /proc, it has to be the shared one.
    let own = reopen(file, OFlags::RDWR).ok();
    let file = own.as_ref().unwrap_or(file);
    let from = rustix::fs::fstat(file)?.st_size as u64;
    if to <= from {
        return flush_growth(file);
    }
    let grown = reserve_and_zero(file, from, to);
    if grown.is_err() {
        // The error that counts is the first; a tail left behind is harmless.
        let _ = rustix::fs::ftruncate(file, from);
    }
    grown
}

fn reserve_and_zero(file: &File, from: u64, to: u64) -> Result<(), Errno> {
    // Reserving first finds a full disk before time is spent on writing zeros.
    let reserved =
        uninterrupted(|| rustix::fs::fallocate(file, FallocateFlags::empty(), from, to - from));
    match reserved {
        // Around the page cache: zeros in it would have to be written by the
        // next flush, which somebody waits for, and would push out what is read.
        Ok(()) => match zero_directly(file, from, to) {
            Err(errno) if is_unsupported(errno) => write_zero_bytes(file, from, to - from)?,
            ended => ended?,
        },
        Err(errno) if is_unsupported(errno) => write_zero_bytes(file, from, to - from)?,
        Err(errno) => return Err(errno),
    }
    flush_growth(file)
}

/// The length and the blocks, durable. No error of this is a full disk: whatever it
/// is called, something that was written is lost.
fn flush_growth(file: &File) -> Result<(), Errno> {
    rustix::fs::fsync(file).map_err(|_| Errno::IO)
}

/// The same file, with a description of its own.
fn reopen(file: &File, flags: OFlags) -> Result<File, Errno> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).map(File::from)
}

/// Write zeros past the page cache (O_DIRECT), in pieces short enough that
/// writes into the same file do not wait long.
fn zero_directly(file: &File, from: u64, to: u64) -> Result<(), Errno> {
    let Some((start, len)) = whole_blocks(from, to - from) else {
        return Err(Errno::INVAL);
    };
    // Opened once more: the flag must not change for others.
    let direct = match reopen(file, OFlags::WRONLY | OFlags::DIRECT) {
        Err(Errno::NOENT | Errno::ACCESS) => return Err(Errno::INVAL),
        opened => opened?,
    };
    let mut at = start;
    while at < start + len {
        let piece = (start + len - at).min(DIRECT_PIECE as u64) as usize;
        let written = uninterrupted(|| rustix::io::pwrite(&direct, &ZEROS.0[..piece], at))?;
        if !(written as u64).is_multiple_of(BLOCK_GRAIN) || written == 0 {
            return Err(Errno::INVAL);
        }
        at += written as u64;
    }
    write_zero_bytes(file, from, start - from)?;
    write_zero_bytes(file, start + len, to - (start + len))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(bytes: &[u8]) -> File {
        let file = tempfile::tempfile().unwrap();
        write_all(&file, 0, &[Bytes::copy_from_slice(bytes)]).unwrap();
        file
    }

    fn read(file: &File, offset: u64, len: u64) -> Outcome {
        perform(file, Medium::OriginFile, &Action::Read { offset, len })
    }

    #[test]
    fn writes_many_pieces_in_order() {
        let file = sample(&[]);
        let data: Vec<Bytes> = (0..3000u32)
            .map(|i| Bytes::from(i.to_le_bytes().to_vec()))
            .collect();
        let mut with_empty = data.clone();
        with_empty.insert(0, Bytes::new());
        perform(
            &file,
            Medium::Store,
            &Action::Write {
                offset: 5,
                data: with_empty,
            },
        )
        .unwrap();
        let all: Vec<u8> = data.iter().flat_map(|piece| piece.to_vec()).collect();
        assert_eq!(read(&file, 5, 12000).unwrap(), all);
    }

    #[test]
    fn a_read_past_the_end_is_an_error() {
        let file = sample(&[7; 1000]);
        assert_eq!(read(&file, 999, 1).unwrap(), vec![7]);
        assert!(matches!(read(&file, 999, 2), Err(DiskError::Io(_))));
    }

    #[test]
    fn zeroes_and_trims_exactly_the_range() {
        for medium in [Medium::OriginFile, Medium::OriginBlockDevice, Medium::Store] {
            for may_punch in [false, true] {
                for (offset, len) in [(0, 1), (4096, 8192), (100, 20000), (5000, 10), (1, 1 << 20)]
                {
                    let file = sample(&vec![9; 2 << 20]);
                    let action = Action::WriteZeroes {
                        offset,
                        len,
                        may_punch,
                    };
                    perform(&file, medium, &action).unwrap();
                    let bytes = read(&file, 0, 2 << 20).unwrap();
                    for (i, byte) in bytes.iter().enumerate() {
                        let inside = (offset..offset + len).contains(&(i as u64));
                        assert_eq!(
                            *byte,
                            if inside { 0 } else { 9 },
                            "{medium:?} {action:?} at {i}"
                        );
                    }
                    perform(&file, medium, &Action::Trim { offset, len }).unwrap();
                    assert_eq!(read(&file, offset + len, 4).unwrap(), vec![9; 4]);
                }
            }
        }
    }

    #[test]
    fn growth_is_backed_by_blocks_and_reads_as_zeros() {
        use std::os::unix::fs::MetadataExt;
        let file = sample(&[1; 512]);
        perform(&file, Medium::Store, &Action::Grow { to: 3 << 20 }).unwrap();
        let meta = file.metadata().unwrap();
        assert_eq!(meta.len(), 3 << 20);
        assert!(meta.blocks() * 512 >= 3 << 20);
        assert!(
            read(&file, 512, (3 << 20) - 512)
                .unwrap()
                .iter()
                .all(|byte| *byte == 0)
        );
        assert_eq!(read(&file, 0, 512).unwrap(), vec![1; 512]);
        perform(&file, Medium::Store, &Action::Grow { to: 1000 }).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 3 << 20);
    }

    #[test]
    fn growth_from_and_to_odd_lengths_is_whole() {
        for (from, to) in [(100, 200), (4095, 8193), (1, 300_001), (8192, 8193)] {
            let file = sample(&vec![1; from]);
            perform(&file, Medium::Store, &Action::Grow { to }).unwrap();
            let bytes = read(&file, 0, to).unwrap();
            assert!(bytes[..from].iter().all(|byte| *byte == 1));
            assert!(bytes[from..].iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn growth_that_finds_no_space_leaves_the_old_length() {
        let file = sample(&[1; 512]);
        // Larger than any file can be.
        let outcome = perform(
            &file,
            Medium::Store,
            &Action::Grow {
                to: i64::MAX as u64,
            },
        );
        assert_eq!(outcome, Err(DiskError::NoSpace));
        assert_eq!(file.metadata().unwrap().len(), 512);
    }

    #[test]
    fn flush_succeeds() {
        perform(&sample(&[1]), Medium::OriginFile, &Action::Flush).unwrap();
    }
}
