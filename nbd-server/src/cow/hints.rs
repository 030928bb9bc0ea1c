//! What the kernel is told ahead of time, so that disks work while bytes are copied. All
//! of it is only a hint: where it is not taken, or not understood, everything is as
//! right and takes longer.

use std::fs::File;
use std::num::NonZeroU64;
use std::ops::Range;

use rustix::fs::{Advice, fadvise};

/// Asked for in one call.
const READ_AHEAD: u64 = 8 << 20;

/// So much is written before it begins to be written back.
const WRITE_BACK: u64 = 8 << 20;

/// Have a range read into the page cache. It waits only where too much is under way.
pub(super) fn read_ahead(file: &File, range: Range<u64>) {
    let mut at = range.start;
    while let Some(len) = NonZeroU64::new(range.end.saturating_sub(at).min(READ_AHEAD)) {
        if fadvise(file, at, Some(len), Advice::WillNeed).is_err() {
            return;
        }
        at += len.get();
    }
}

/// Whether so many bytes can be kept in the page cache beside all else.
pub(super) fn fits_in_memory(bytes: u64) -> bool {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
    available.is_some_and(|kib| bytes / 1024 <= kib / 2)
}

/// Has what is written to a file be written back while more of it is written, so that
/// the flush at the end has less to wait for. What is durable is only what a flush has
/// answered for, as everywhere.
#[derive(Debug, Default)]
pub(super) struct WriteBack {
    /// Bytes written since.
    dirty: u64,
    /// Where those lie.
    range: Option<Range<u64>>,
}

impl WriteBack {
    /// This was written.
    pub(super) fn wrote(&mut self, file: &File, range: Range<u64>) {
        self.dirty += range.end - range.start;
        let known = self.range.take().unwrap_or_else(|| range.clone());
        let known = known.start.min(range.start)..known.end.max(range.end);
        if self.dirty < WRITE_BACK {
            self.range = Some(known);
            return;
        }
        // Linux begins to write the dirty pages of a range that is not needed, and
        // forgets those that are clean.
        let len = NonZeroU64::new(known.end - known.start);
        let _ = fadvise(file, known.start, len, Advice::DontNeed);
        self.dirty = 0;
    }
}
