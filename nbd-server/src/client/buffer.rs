//! The bytes that came and were not looked at yet. One allocation that is
//! filled at its end and emptied at its front, so that many replies come with
//! one system call and none is copied to be read.

use std::io::{self, Read};
use std::ops::Range;

/// Room for one read of the socket.
const ROOM: usize = 512 << 10;

#[derive(Debug)]
pub(super) struct InputBuffer {
    /// Initialized as a whole; the bytes at hand are `bytes[at_hand]`.
    bytes: Vec<u8>,
    at_hand: Range<usize>,
}

impl InputBuffer {
    pub(super) fn new() -> Self {
        let bytes = vec![0; ROOM];
        Self {
            bytes,
            at_hand: 0..0,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.at_hand.is_empty()
    }

    /// What is at hand.
    pub(super) fn peek(&self) -> &[u8] {
        &self.bytes[self.at_hand.clone()]
    }

    /// Takes the first `len` bytes; where they stay until the next read.
    pub(super) fn take(&mut self, len: usize) -> Range<usize> {
        assert!(len <= self.at_hand.len());
        let start = self.at_hand.start;
        self.at_hand.start += len;
        start..start + len
    }

    /// Bytes that [`take`](Self::take) took.
    pub(super) fn taken(&self, range: Range<usize>) -> &[u8] {
        assert!(range.end <= self.at_hand.start);
        &self.bytes[range]
    }

    /// Reads once; 0 if the peer has closed. Makes room for `wanted` bytes in
    /// all first, so that a long reply is not read in crumbs.
    pub(super) fn read_from(&mut self, stream: &mut impl Read, wanted: usize) -> io::Result<usize> {
        self.make_room(wanted);
        loop {
            match stream.read(&mut self.bytes[self.at_hand.end..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => {
                    let count = result?;
                    self.at_hand.end += count;
                    return Ok(count);
                }
            }
        }
    }

    fn make_room(&mut self, wanted: usize) {
        let len = self.at_hand.len();
        if self.at_hand.is_empty() {
            self.at_hand = 0..0;
        }
        let room = self.bytes.len() - self.at_hand.end;
        let missing = wanted.max(len + 1) - len;
        // Moving is worth it where it is needed, or cheap and room is short.
        if room < missing || (room < ROOM / 4 && len < ROOM / 4) {
            self.bytes.copy_within(self.at_hand.clone(), 0);
            self.at_hand = 0..len;
        }
        let needed = len + missing;
        if self.bytes.len() < needed {
            self.bytes.resize(needed.next_multiple_of(ROOM), 0);
        }
    }
}
