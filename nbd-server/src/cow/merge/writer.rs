//! Writes to the disk in a merge, on a thread of their own, so that the store is read
//! meanwhile.
//!
//! - Writes go to the disk in the order in which they come. A flush is not among them:
//!   the engine asks for one when all that it has to cover has ended.
//! - What is written begins to be written back while the merge goes on, so that the
//!   flush at the end of a step has less to wait for. That promises nothing; what is
//!   durable is only what a flush has answered for, as everywhere.
//! - The thread ends with the [`Writer`], and with it the last descriptor of the disk.

use std::fs::File;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use bytes::Bytes;
use nbdsnap_engine::{Action, OpId, Outcome};

use super::super::hints::WriteBack;
use crate::io::file::{Medium, perform};

/// Neighbours on the disk, in one write.
#[derive(Debug)]
pub(super) struct Write {
    /// The operations that it is.
    pub(super) ids: Vec<OpId>,
    /// Where it begins.
    pub(super) start: u64,
    /// Bytes in it.
    pub(super) len: u64,
    /// What is written.
    pub(super) data: Vec<Bytes>,
}

type Ended = (Vec<OpId>, Outcome);

/// Writes to the disk.
#[derive(Debug)]
pub(super) struct Writer {
    /// None: it ends.
    to_do: Option<Sender<Write>>,
    ended: Receiver<Ended>,
    under_way: usize,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// To this disk.
    pub(super) fn new(disk: &File, medium: Medium) -> std::io::Result<Self> {
        let file = disk.try_clone()?;
        let (to_do, orders) = channel();
        let (answers, ended) = channel();
        let thread = std::thread::Builder::new()
            .name("write".into())
            .spawn(move || write_all(&file, medium, &orders, &answers))?;
        Ok(Self {
            to_do: Some(to_do),
            ended,
            under_way: 0,
            thread: Some(thread),
        })
    }

    /// Have this written. It has ended when [`Writer::wait`] says so.
    pub(super) fn write(&mut self, write: Write) {
        let to_do = self.to_do.as_ref().expect("it takes writes until it ends");
        to_do.send(write).expect("the thread takes all writes");
        self.under_way += 1;
    }

    /// Wait for the end of a write, if one is under way, and tell of all that have ended.
    pub(super) fn wait(&mut self, ended: &mut dyn FnMut(OpId, Outcome)) -> bool {
        if self.under_way == 0 {
            return false;
        }
        let first = self.ended.recv().expect("the thread answers all writes");
        let rest = self.ended.try_iter();
        for (ids, outcome) in std::iter::once(first).chain(rest) {
            self.under_way -= 1;
            for id in ids {
                ended(id, outcome.clone());
            }
        }
        true
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // The disk's lock lives as long as any descriptor of it.
        self.to_do = None;
        if let Some(thread) = self.thread.take() {
            // If it panicked, that was told by the answer that did not come.
            let _ = thread.join();
        }
    }
}

/// What the thread does until nobody can order anything any more.
fn write_all(file: &File, medium: Medium, orders: &Receiver<Write>, answers: &Sender<Ended>) {
    let mut write_back = WriteBack::default();
    for Write {
        ids,
        start,
        len,
        data,
    } in orders
    {
        let action = Action::Write {
            offset: start,
            data,
        };
        let outcome = perform(file, medium, &action);
        // The memory is free before the next bytes are read.
        drop(action);
        write_back.wrote(file, start..start + len);
        if answers.send((ids, outcome)).is_err() {
            return;
        }
    }
}
