//! The bytes that wait to be sent on one connection, in order: small ones
//! gathered in a buffer, large ones passed along without copying.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::Bytes;

/// Data of at least this size is queued as it is instead of being copied.
const SHARE_FROM: usize = 16 << 10;
/// A buffer begins with this size at least.
const TAIL_MIN: usize = 20 << 10;
/// A buffer that has grown to this size is closed, and the next one begun.
const CLOSE_FROM: usize = 128 << 10;
/// An empty buffer larger than this is given back ([`Outbox::give_back`]).
const KEEP_BYTES: usize = 64 << 10;

/// Outgoing bytes. They are appended at the end ([`Outbox::tail`],
/// [`Outbox::push`]) and leave at the front ([`Outbox::slices`], [`Outbox::advance`]).
#[derive(Debug, Default)]
pub struct Outbox {
    /// Closed pieces, older than everything in `tail`; none is empty.
    queue: VecDeque<Piece>,
    queued_bytes: usize,
    tail: Vec<u8>,
    /// Of the oldest piece (or of `tail`, if there is no other), already sent.
    sent: usize,
    /// A large buffer that has been sent, for the next large reply.
    spare: Option<Vec<u8>>,
}

/// Bytes that no longer change.
#[derive(Debug)]
enum Piece {
    /// Gathered here; the buffer can be used again.
    Own(Vec<u8>),
    /// Somebody else's, too.
    Shared(Bytes),
}

impl Piece {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Own(bytes) => bytes,
            Self::Shared(bytes) => bytes,
        }
    }
}

impl Outbox {
    /// Bytes that wait.
    pub fn len(&self) -> usize {
        self.queued_bytes + self.tail.len() - self.sent
    }

    /// Nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The open end: append to it, or take back what was appended; nothing else.
    pub fn tail(&mut self) -> &mut Vec<u8> {
        &mut self.tail
    }

    /// Append `data`, by reference where that is cheaper.
    pub fn push(&mut self, data: Bytes) {
        if data.len() < SHARE_FROM {
            self.tail.extend_from_slice(&data);
            return;
        }
        self.close_tail();
        self.queued_bytes += data.len();
        self.queue.push_back(Piece::Shared(data));
    }

    /// A reply of `len` bytes is about to be appended to the tail: see to it that
    /// it finds room, in a buffer that has been used before where there is one.
    pub fn make_room(&mut self, len: usize, spares: &mut Spares) {
        if self.tail.capacity() - self.tail.len() >= len {
            return;
        }
        if self.tail.len() >= CLOSE_FROM || len >= CLOSE_FROM {
            self.close_tail();
        }
        if self.tail.is_empty() {
            let used_before = self.spare.take();
            let used_before = used_before.or_else(|| (len >= CLOSE_FROM).then(|| spares.take())?);
            if let Some(buffer) = used_before {
                self.tail = buffer;
            }
        }
        self.tail.reserve(len.max(TAIL_MIN));
    }

    /// What is gathered so far becomes a piece of its own.
    fn close_tail(&mut self) {
        let is_oldest = self.queue.is_empty();
        let waiting = self.tail.len() - if is_oldest { self.sent } else { 0 };
        if waiting == 0 {
            self.tail.clear();
        } else if waiting >= SHARE_FROM {
            self.queued_bytes += self.tail.len();
            self.queue
                .push_back(Piece::Own(std::mem::take(&mut self.tail)));
            return;
        } else {
            // Headers before large data are short: a copy costs less than
            // giving the buffer away.
            let start = self.tail.len() - waiting;
            let closed = Bytes::copy_from_slice(&self.tail[start..]);
            self.queued_bytes += waiting;
            self.queue.push_back(Piece::Shared(closed));
            self.tail.clear();
        }
        if is_oldest {
            self.sent = 0;
        }
    }

    /// What to send next, in order: as many pieces as fit into `slices`, whose
    /// number is returned.
    pub fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let closed = self.queue.iter().map(Piece::bytes);
        let mut used = 0;
        let mut skip = self.sent;
        for bytes in closed.chain([&self.tail[..]]).take(slices.len()) {
            if bytes.len() > skip {
                slices[used] = IoSlice::new(&bytes[skip..]);
                used += 1;
            }
            skip = 0;
        }
        used
    }

    /// The first `count` bytes have been sent.
    pub fn advance(&mut self, count: usize) {
        self.sent += count;
        while let Some(piece) = self.queue.front() {
            let len = piece.bytes().len();
            if self.sent < len {
                return;
            }
            self.sent -= len;
            self.queued_bytes -= len;
            if let Some(Piece::Own(buffer)) = self.queue.pop_front() {
                self.retire(buffer);
            }
        }
        assert!(self.sent <= self.tail.len(), "more sent than there was");
        if self.sent == self.tail.len() {
            self.sent = 0;
            self.tail.clear();
            if self.tail.capacity() > KEEP_BYTES {
                let buffer = std::mem::take(&mut self.tail);
                self.retire(buffer);
            }
        } else if self.tail.len() >= CLOSE_FROM {
            // Else what was sent would stay in memory until all has been sent.
            self.close_tail();
        }
    }

    fn retire(&mut self, mut buffer: Vec<u8>) {
        let best = self.spare.as_ref().map_or(0, Vec::capacity);
        if buffer.capacity() > best {
            buffer.clear();
            self.spare = Some(buffer);
        }
    }

    /// Nothing is under way for now: the large buffer may serve others.
    pub fn give_back(&mut self, spares: &mut Spares) {
        if let Some(spare) = self.spare.take() {
            spares.put(spare);
        }
    }

    /// Drop everything: nobody will read it.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

/// Large buffers that outboxes have no use for at the moment: memory that has
/// been touched before costs less than new memory.
#[derive(Debug, Default)]
pub struct Spares {
    buffers: Vec<Vec<u8>>,
}

/// So many are kept.
const SPARES: usize = 8;
/// None larger than this.
const SPARE_MAX: usize = 2 << 20;

impl Spares {
    fn take(&mut self) -> Option<Vec<u8>> {
        self.buffers.pop()
    }

    fn put(&mut self, buffer: Vec<u8>) {
        if self.buffers.len() < SPARES && buffer.capacity() <= SPARE_MAX {
            self.buffers.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Send in steps of `step` bytes and return what went out.
    fn drain(outbox: &mut Outbox, step: usize) -> Vec<u8> {
        let mut sent = Vec::new();
        while !outbox.is_empty() {
            let mut slices = [IoSlice::new(&[]); 2];
            let used = outbox.slices(&mut slices);
            let all: Vec<u8> = slices[..used].iter().flat_map(|s| s.to_vec()).collect();
            let now = all.len().min(step);
            sent.extend(&all[..now]);
            outbox.advance(now);
        }
        sent
    }

    #[test]
    fn bytes_leave_in_the_order_they_came() {
        for step in [997, 20_000, usize::MAX] {
            let mut outbox = Outbox::default();
            let mut spares = Spares::default();
            let mut expected = Vec::new();
            for round in 0..4u8 {
                let header = if round == 2 { 200_000 } else { 28 };
                outbox.make_room(header, &mut spares);
                outbox.tail().extend(vec![round; header]);
                expected.extend(vec![round; header]);
                for len in [5, 20_000, 40_000] {
                    outbox.push(Bytes::from(vec![round + 100; len]));
                    expected.extend(vec![round + 100; len]);
                }
            }
            assert_eq!(outbox.len(), expected.len());
            assert_eq!(drain(&mut outbox, step), expected);
            assert_eq!(outbox.len(), 0);
        }
    }

    #[test]
    fn memory_stays_bounded_while_some_bytes_always_wait() {
        let mut outbox = Outbox::default();
        let mut spares = Spares::default();
        for _ in 0..10_000 {
            outbox.make_room(5000, &mut spares);
            outbox.tail().extend([1; 5000]);
            if outbox.len() > 300_000 {
                outbox.advance(5000);
            }
        }
        let held: usize = outbox.queue.iter().map(|piece| piece.bytes().len()).sum();
        assert!(held + outbox.tail.capacity() < 1 << 20);
        outbox.advance(outbox.len());
        assert!(outbox.is_empty());
        outbox.give_back(&mut spares);
        assert_eq!(spares.buffers.len(), 1);
    }
}
