//! Has the store read ahead of a merge, by a thread that is always a little further: a
//! step takes the end of the list, and what that is the data of was written one after
//! the other, and lies there one after the other too.
//!
//! These are hints: a store whose exceptions point elsewhere is read as it comes.

use std::thread::JoinHandle;

use nbdsnap_format::{ChunkSize, Layout};

use super::super::hints::read_ahead;
use crate::server::setup::OpenDisk;

/// Reads ahead in a store that is merged from its end.
#[derive(Debug)]
pub(super) struct ReadAhead {
    layout: Layout,
    /// Exceptions in a step.
    step: u64,
    /// The exceptions of which the data was asked for: from this one on.
    from: u64,
    /// The data of the next step is being asked for.
    running: Option<JoinHandle<()>>,
}

impl ReadAhead {
    /// Of a store with so many exceptions, which is merged in steps of so many bytes.
    pub(super) fn new(chunk_size: ChunkSize, step_bytes: u64, exceptions: u64) -> Self {
        Self {
            layout: Layout::new(chunk_size),
            step: (step_bytes / chunk_size.bytes()).max(1),
            from: exceptions,
            running: None,
        }
    }

    /// So many exceptions are left: have the data of those read that the next steps take.
    pub(super) fn left(&mut self, store: &OpenDisk, left: u64) {
        if (self.running.as_ref()).is_some_and(|running| !running.is_finished()) {
            return;
        }
        self.end();
        let ends = [1, 2].map(|steps| left.saturating_sub(steps * self.step));
        if let Some(&end) = ends.iter().find(|&&end| end < self.from) {
            self.ask(store, end);
        }
    }

    /// Ask for the data of the exceptions from `from` on.
    fn ask(&mut self, store: &OpenDisk, from: u64) {
        let Some(last) = self.from.checked_sub(1) else {
            return;
        };
        let size = self.layout.chunk_size();
        let start = size.cow_offset(self.layout.data_chunk(from));
        let end = size.cow_offset(self.layout.data_chunk(last)) + size.bytes();
        self.from = from;
        // Without a thread or another descriptor it is read when it is needed.
        let Ok(file) = store.file.try_clone() else {
            return;
        };
        let read = move || read_ahead(&file, start..end);
        self.running = std::thread::Builder::new()
            .name("read-ahead".into())
            .spawn(read)
            .ok();
    }

    /// Wait for what was asked for.
    fn end(&mut self) {
        if let Some(running) = self.running.take() {
            // It does nothing that could panic, and what it does is only a hint.
            let _ = running.join();
        }
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        // The store's lock lives as long as any descriptor of it.
        self.end();
    }
}
