//! A disk or COW store as a volume's thread sees it: what can be done at once
//! without blocking is done here and now, and everything else is said to be
//! for the helpers. A disk that is served read-only is guarded here, last of
//! all: no operation that changes anything gets past.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use nbdsnap_engine::{Action, DiskError, Outcome};
use rustix::io::Errno;

use super::file::{self, Medium, uninterrupted};
use super::pace::{Call, Pace, Sleeps};
use super::sys::{self, Wait};

/// Longer reads are not done on the volume's thread: others wait meanwhile.
pub(super) const READ_HERE_MAX: u64 = 1 << 20;
/// Nor are longer writes.
pub(super) const WRITE_HERE_MAX: u64 = 1 << 20;
/// A write into the page cache that takes longer is being throttled.
const SLOW_WRITE: Duration = Duration::from_millis(1);
/// A read from the page cache that takes longer came from a disk.
const SLOW_READ: Duration = Duration::from_micros(50);

/// An open device, shared with the helpers that work on it.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) file: File,
    pub(super) medium: Medium,
    /// Nothing on it may change.
    pub(super) read_only: bool,
}

impl Disk {
    /// Perform `action` to its end, waiting as long as it takes.
    pub(super) fn perform(&self, action: &Action) -> Outcome {
        if self.read_only {
            match action {
                Action::Read { .. } => {}
                // Nothing was written: there is nothing to make durable.
                Action::Flush => return Ok(Bytes::new()),
                _ => return Err(DiskError::Io(Errno::ROFS.raw_os_error())),
            }
        }
        file::perform(&self.file, self.medium, action)
    }
}

/// How a file system answers reads that must not wait.
#[derive(Debug)]
enum CachedReads {
    /// It says EAGAIN when it would have to wait.
    Honest,
    /// It knows no such reads: they are risked as long as they are quick.
    Risked(Pace),
}

/// A [`Disk`] and what its volume's thread has learned about it.
#[derive(Debug)]
pub(super) struct LocalDisk {
    pub(super) disk: Arc<Disk>,
    reads: CachedReads,
    writes: Pace,
}

impl LocalDisk {
    pub(super) fn new(disk: Disk) -> Self {
        Self {
            disk: Arc::new(disk),
            reads: CachedReads::Honest,
            writes: Pace::new(SLOW_WRITE),
        }
    }

    /// Append `len` bytes at `offset` to `out`, if that needs no waiting.
    /// False: it does, or it fails; `out` may then hold a part.
    pub(super) fn read_now(
        &mut self,
        out: &mut Vec<u8>,
        offset: u64,
        len: usize,
        sleeps: &mut Sleeps,
    ) -> bool {
        match &mut self.reads {
            CachedReads::Honest => self.read_honest(out, offset, len),
            CachedReads::Risked(pace) => {
                if !pace.is_quick(Instant::now) {
                    return false;
                }
                let file = &self.disk.file;
                let read = || read_all(file, out, offset, len, Wait::Block);
                timed(pace, sleeps, len, read).is_ok()
            }
        }
    }

    fn read_honest(&mut self, out: &mut Vec<u8>, offset: u64, len: usize) -> bool {
        match read_all(&self.disk.file, out, offset, len, Wait::Never) {
            Ok(()) => true,
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                self.reads = CachedReads::Risked(Pace::new(SLOW_READ));
                false
            }
            Err(_) => false,
        }
    }

    /// Writes are being taken quickly.
    pub(super) fn writes_are_quick(&mut self) -> bool {
        self.writes.is_quick(Instant::now)
    }

    /// Write on this thread. Only when [`LocalDisk::writes_are_quick`].
    pub(super) fn write_here(
        &mut self,
        offset: u64,
        data: &[u8],
        sleeps: &mut Sleeps,
    ) -> Result<(), DiskError> {
        assert!(!self.disk.read_only, "a write to a read-only disk");
        let file = &self.disk.file;
        let write = || write_all(file, offset, data);
        timed(&mut self.writes, sleeps, data.len(), write)
    }

    /// Perform `action` on this thread if it needs no waiting; `None`: it is for
    /// the helpers.
    pub(super) fn perform_now(&mut self, action: &Action, sleeps: &mut Sleeps) -> Option<Outcome> {
        match action {
            Action::Read { offset, len } if *len <= READ_HERE_MAX => {
                let mut bytes = Vec::with_capacity(*len as usize);
                let read = self.read_now(&mut bytes, *offset, *len as usize, sleeps);
                read.then(|| Ok(Bytes::from(bytes)))
            }
            Action::Flush if self.disk.read_only => Some(self.disk.perform(action)),
            Action::Write { data, .. } if !self.disk.read_only => {
                let len: usize = data.iter().map(Bytes::len).sum();
                if len as u64 > WRITE_HERE_MAX || !self.writes_are_quick() {
                    return None;
                }
                let disk = &self.disk;
                let write = || disk.perform(action);
                Some(timed(&mut self.writes, sleeps, len, write))
            }
            _ => None,
        }
    }
}

/// Make a call that may wait, and tell `pace` how it went.
fn timed<T>(pace: &mut Pace, sleeps: &mut Sleeps, bytes: usize, call: impl FnOnce() -> T) -> T {
    sleeps.watch();
    let began = Instant::now();
    let result = call();
    let ended = Instant::now();
    let call = Call {
        began,
        ended,
        bytes,
    };
    pace.record(call, || sleeps.has_slept());
    result
}

fn write_all(file: &File, offset: u64, data: &[u8]) -> Result<(), DiskError> {
    let mut rest = data;
    while !rest.is_empty() {
        let at = offset + (data.len() - rest.len()) as u64;
        match uninterrupted(|| rustix::io::pwrite(file, rest, at)) {
            Ok(0) => return Err(DiskError::NoSpace),
            Ok(written) => rest = &rest[written..],
            Err(errno) => return Err(file::disk_error(errno)),
        }
    }
    Ok(())
}

fn read_all(
    file: &File,
    out: &mut Vec<u8>,
    offset: u64,
    len: usize,
    wait: Wait,
) -> Result<(), Errno> {
    let end = out.len() + len;
    while out.len() < end {
        let missing = end - out.len();
        let at = offset + (len - missing) as u64;
        let got = uninterrupted(|| sys::read_append(file, out, missing, at, wait))?;
        if got == 0 {
            // Past the end of the file: the slow way says so.
            return Err(Errno::IO);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn disk(bytes: &[u8], read_only: bool) -> LocalDisk {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        LocalDisk::new(Disk {
            file,
            medium: Medium::OriginFile,
            read_only,
        })
    }

    #[test]
    fn what_is_cached_is_read_here() {
        let mut disk = disk(&[5; 9000], false);
        let mut out = vec![1];
        let mut sleeps = Sleeps::default();
        // A file system without such reads says so once, and is then risked.
        let read = disk.read_now(&mut out, 10, 5000, &mut sleeps) || {
            out.truncate(1);
            disk.read_now(&mut out, 10, 5000, &mut sleeps)
        };
        assert!(read);
        assert_eq!(out.len(), 5001);
        assert!(out[1..].iter().all(|byte| *byte == 5));
        assert!(
            !disk.read_now(&mut out, 8999, 2, &mut sleeps),
            "a read past the end"
        );
    }

    #[test]
    fn nothing_changes_a_read_only_disk() {
        let mut disk = disk(&[5; 9000], true);
        let data = vec![Bytes::from_static(b"x")];
        for action in [
            Action::Write { offset: 0, data },
            Action::WriteZeroes {
                offset: 0,
                len: 1,
                may_punch: true,
            },
            Action::Trim {
                offset: 0,
                len: 4096,
            },
            Action::Grow { to: 10_000 },
        ] {
            assert_eq!(disk.perform_now(&action, &mut Sleeps::default()), None);
            assert!(disk.disk.perform(&action).is_err(), "{action:?}");
        }
        assert_eq!(disk.disk.perform(&Action::Flush), Ok(Bytes::new()));
        let read = Action::Read {
            offset: 0,
            len: 9000,
        };
        assert_eq!(disk.disk.perform(&read).unwrap(), vec![5; 9000]);
    }
}
