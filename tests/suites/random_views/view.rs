//! One view of the disk: its model, its connections, and what is known of the
//! state of its store.

use std::collections::BTreeSet;
use std::ops::Range;

use nbdsnap_format::{ChunkSize, SECTOR_BYTES};
use nbdsnap_tests::harness::wire::{Address, Session, errno};
use nbdsnap_tests::store_bytes;

/// What a store does when it is full, in dm-snapshot's letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Invalid.
    P,
    /// Overflow, where a snapshot write finds no space.
    PO,
    /// Transient; Invalid.
    N,
}

/// A store and how many exceptions it can hold.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    pub(crate) kind: Kind,
    pub(crate) chunk: ChunkSize,
    /// Bytes, where it is limited.
    pub(crate) size: Option<u64>,
}

impl Store {
    /// Exceptions that fit.
    fn capacity(&self) -> u64 {
        let Some(size) = self.size else {
            return u64::MAX;
        };
        if self.kind == Kind::N {
            return self.chunk.whole_chunks(size);
        }
        store_bytes::capacity(size / SECTOR_BYTES, self.chunk.sectors())
    }
}

/// What is known of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// All exceptions fit: everything must work.
    Fits,
    /// More were needed than fit, in the batch that runs: either answer is right.
    Filling,
    /// A PO store is full. Reads work (unless an origin write has found no space
    /// either); writes are refused (after a restart, only those that need space).
    Full {
        may_be_invalid: bool,
        reopened: bool,
    },
    /// Lost: everything is EIO.
    Invalid,
}

/// What a request may be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expect {
    Success,
    Eio,
    Either,
}

/// The origin or one snapshot.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) export: String,
    /// None for the origin.
    pub(crate) store: Option<Store>,
    pub(crate) model: Vec<u8>,
    pub(crate) sessions: Vec<Session>,
    pub(crate) state: State,
    /// Chunks that need an exception.
    touched: BTreeSet<u64>,
    capacity: u64,
}

impl View {
    pub(crate) fn new(export: &str, store: Option<Store>, model: Vec<u8>) -> Self {
        let capacity = store.as_ref().map_or(u64::MAX, Store::capacity);
        Self {
            export: export.to_owned(),
            store,
            model,
            sessions: Vec::new(),
            state: State::Fits,
            touched: BTreeSet::new(),
            capacity,
        }
    }

    pub(crate) fn connect(&mut self, address: &Address, connections: usize) {
        let open = |n| {
            if n % 2 == 0 {
                Session::open(address, &self.export)
            } else {
                Session::open_structured(address, &self.export)
            }
        };
        self.sessions = (0..connections)
            .map(|n| open(n).expect("a connection"))
            .collect();
    }

    /// A write to this snapshot or to its origin is about to go out.
    pub(crate) fn touch(&mut self, range: &Range<u64>, by_origin: bool) {
        let Some(store) = &self.store else { return };
        match &mut self.state {
            State::Fits | State::Filling => {
                let chunks = store.chunk.origin_chunk(range.start).0
                    ..=store.chunk.origin_chunk(range.end - 1).0;
                self.touched.extend(chunks);
                if self.touched.len() as u64 > self.capacity {
                    self.state = State::Filling;
                }
            }
            State::Full { may_be_invalid, .. } => *may_be_invalid |= by_origin,
            State::Invalid => {}
        }
    }

    /// The batch has ended. `origin_written`: it wrote to the origin.
    pub(crate) fn settle_state(&mut self, origin_written: bool) {
        if self.state == State::Filling {
            self.state = match self.store.as_ref().map(|store| store.kind) {
                Some(Kind::PO) => State::Full {
                    may_be_invalid: origin_written,
                    reopened: false,
                },
                _ => State::Invalid,
            };
            println!(
                "{} is full after {} exceptions: {:?}",
                self.export, self.capacity, self.state
            );
        }
    }

    /// The server was started again.
    pub(crate) fn reopened(&mut self, origin: &[u8]) {
        if self
            .store
            .as_ref()
            .is_some_and(|store| store.kind == Kind::N)
        {
            // A transient snapshot begins anew.
            self.model.copy_from_slice(origin);
            self.touched.clear();
            self.state = State::Fits;
        } else if let State::Full { reopened, .. } = &mut self.state {
            *reopened = true;
        }
    }

    pub(crate) fn expect_of_read(&self) -> Expect {
        match self.state {
            State::Fits
            | State::Full {
                may_be_invalid: false,
                ..
            } => Expect::Success,
            State::Filling
            | State::Full {
                may_be_invalid: true,
                ..
            } => Expect::Either,
            State::Invalid => Expect::Eio,
        }
    }

    pub(crate) fn expect_of_write(&self) -> Expect {
        match self.state {
            State::Fits => Expect::Success,
            State::Filling | State::Full { reopened: true, .. } => Expect::Either,
            State::Full {
                reopened: false, ..
            }
            | State::Invalid => Expect::Eio,
        }
    }

    /// A read was answered EIO where both answers are right: now it is known.
    pub(crate) fn found_invalid(&mut self) {
        if matches!(self.state, State::Full { .. }) {
            self.state = State::Invalid;
        }
    }

    /// Read all of it and compare.
    pub(crate) fn check_all(&mut self) {
        let expected = self.expect_of_read();
        let outcome = self.sessions[0].read_all().expect("replies");
        match outcome {
            Ok(bytes) => {
                assert_ne!(
                    expected,
                    Expect::Eio,
                    "{} is {:?} and can be read",
                    self.export,
                    self.state
                );
                assert_eq!(bytes.len(), self.model.len());
                if bytes != self.model {
                    let at = bytes
                        .iter()
                        .zip(&self.model)
                        .position(|(a, b)| a != b)
                        .unwrap_or(0);
                    panic!("{} differs from its model from byte {at} on", self.export);
                }
            }
            Err(error) => {
                assert_eq!(error, errno::EIO, "{}", self.export);
                assert_ne!(
                    expected,
                    Expect::Success,
                    "{} cannot be read, and should be",
                    self.export
                );
                self.found_invalid();
            }
        }
    }
}
