//! The system calls that need unsafe code: reads into memory that is not
//! initialised yet, calls that must not wait, block-device requests. The one
//! module of the project where unsafe is allowed; everything here takes and
//! returns safe types.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};

use bytes::BytesMut;
use rustix::io::Errno;

/// Whether a call may wait for the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// As long as it takes.
    Block,
    /// Not at all: what is not in the page cache is EAGAIN (RWF_NOWAIT).
    Never,
}

/// Read up to `len` bytes at `offset` to the end of `out`, growing it by what
/// was read; answers how many.
pub(super) fn read_append(
    file: &File,
    out: &mut Vec<u8>,
    len: usize,
    offset: u64,
    wait: Wait,
) -> Result<usize, Errno> {
    out.reserve(len);
    let spare = out.spare_capacity_mut();
    let iov = libc::iovec {
        iov_base: spare.as_mut_ptr().cast(),
        iov_len: len,
    };
    let flags = match wait {
        Wait::Block => 0,
        Wait::Never => libc::RWF_NOWAIT,
    };
    // SAFETY: `iov` names `len` bytes of `out`'s spare capacity, which `reserve`
    // has made at least that long; the kernel writes there and nowhere else.
    let got = unsafe {
        libc::preadv2(
            file.as_raw_fd(),
            &raw const iov,
            1,
            offset as libc::off_t,
            flags,
        )
    };
    let got = checked(got)?;
    // SAFETY: the kernel has initialised the first `got` bytes of the spare
    // capacity, and `got <= len`.
    unsafe { out.set_len(out.len() + got) };
    Ok(got)
}

/// Receive up to `len` bytes, without waiting, to the end of `out`; answers how
/// many, 0 at the end of the stream.
pub(super) fn receive_append(
    socket: &OwnedFd,
    out: &mut BytesMut,
    len: usize,
) -> Result<usize, Errno> {
    out.reserve(len);
    let spare = out.spare_capacity_mut();
    // SAFETY: the pointer and length name `len` bytes of `out`'s spare capacity,
    // which `reserve` has made at least that long; the kernel writes there only.
    let got = unsafe {
        libc::recv(
            socket.as_raw_fd(),
            spare.as_mut_ptr().cast(),
            len,
            libc::MSG_DONTWAIT,
        )
    };
    let got = checked(got)?;
    // SAFETY: the kernel has initialised the first `got` bytes of the spare
    // capacity, and `got <= len`.
    unsafe { out.set_len(out.len() + got) };
    Ok(got)
}

/// Make a range of a block device read as zeros (BLKZEROOUT).
pub(super) fn block_zero_out(file: &File, offset: u64, len: u64) -> Result<(), Errno> {
    /// `_IO(0x12, 127)` of linux/fs.h.
    const BLKZEROOUT: libc::c_ulong = 0x127f;
    range_ioctl(file, BLKZEROOUT, offset, len)
}

/// Tell a block device that a range is no longer needed (BLKDISCARD).
pub(super) fn block_discard(file: &File, offset: u64, len: u64) -> Result<(), Errno> {
    /// `_IO(0x12, 119)` of linux/fs.h.
    const BLKDISCARD: libc::c_ulong = 0x1277;
    range_ioctl(file, BLKDISCARD, offset, len)
}

fn range_ioctl(file: &File, request: libc::c_ulong, offset: u64, len: u64) -> Result<(), Errno> {
    let range = [offset, len];
    // SAFETY: both requests of the callers read two u64 from the pointer, which
    // `range` holds and outlives the call; nothing is written through it.
    let rc = unsafe { libc::ioctl(file.as_raw_fd(), request, range.as_ptr()) };
    checked(rc as isize).map(|_| ())
}

/// How often this thread has waited inside the kernel of its own accord.
pub(super) fn voluntary_switches() -> u64 {
    // SAFETY: rusage is plain integers, for which zeros are valid.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: getrusage writes one `rusage` through the pointer; `usage` is one.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    usage.ru_nvcsw as u64
}

fn checked(rc: isize) -> Result<usize, Errno> {
    usize::try_from(rc).map_err(|_| {
        let error = std::io::Error::last_os_error();
        Errno::from_io_error(&error).unwrap_or(Errno::IO)
    })
}

/// Lock the whole file for as long as it stays open, without waiting; held by
/// somebody else, it is EAGAIN or EACCES.
///
/// An open-file-description lock (F_OFD_SETLK): it belongs to this opening of
/// the file, so that a second opening conflicts in the same process, in another
/// one and through a hard link alike. flock does that too, but locks of this
/// kind also meet those of qemu and of fcntl's other users, and travel over NFS.
pub(crate) fn lock_whole(file: &File, exclusive: bool) -> Result<(), Errno> {
    let kind = if exclusive {
        libc::F_WRLCK
    } else {
        libc::F_RDLCK
    };
    // SAFETY: flock is plain integers, for which zeros are valid.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = kind as libc::c_short;
    range.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: F_OFD_SETLK reads one `flock` from the pointer; `range` is one, its
    // l_pid is 0 as it has to be, and it outlives the call.
    let rc = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) };
    checked(rc as isize).map(|_| ())
}
