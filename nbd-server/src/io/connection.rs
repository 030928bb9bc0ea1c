//! One client's connection on its volume's thread: the socket, the bytes on
//! their way in and out, and how much of the client's work is under way.
//!
//! A client that does not read its replies, or asks for too much at once, is
//! not read from until that changes; nobody else notices. A client that is gone
//! is heard to the end of what it sent; its replies are dropped.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::SystemTime;

use nbdsnap_engine::{Command, View};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags};

use super::VolumeId;
use super::file::uninterrupted;
use super::poller::EventFlags;
use super::shard::NewConnection;
use super::sys;
use crate::nbd::outbox::Outbox;
use crate::nbd::reply::ReadOf;
use crate::nbd::transmission::{Call, Terms, Transmission};

/// Replies are sent as soon as this much has gathered: the client works on them
/// while the rest is being made.
pub(super) const SEND_FROM: usize = 16 << 10;
/// With so much unsent, no further request is taken. Clients that send a burst
/// of requests before they read the first reply are common: it fits in here.
const UNSENT_MAX: usize = 8 << 20;
/// With so much unsent to a client whose socket is full, its reads wait: what
/// they bring would only lie in memory. Its other requests are taken, so that a
/// client that writes much before it reads does not wait for us, and we for it.
const READS_WAIT_FROM: usize = 512 << 10;
/// Requests of one connection that are under way.
const REQUESTS_MAX: usize = 256;
/// Bytes that they may carry or will bring, together with what is unsent.
const BYTES_MAX: usize = 64 << 20;

/// What a client can still say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Incoming {
    /// Anything.
    Open,
    /// Nothing: it has disconnected, shut down its side, or broken the protocol.
    Ended,
}

/// Whether the client still listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outgoing {
    /// It does, as far as we know.
    Open,
    /// The socket is full; it has to become writable first.
    Blocked,
    /// It does not: replies are dropped.
    Lost,
}

/// What a client has asked for since it attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Requests.
    pub requests: u64,
    /// Bytes to be read.
    pub read_bytes: u64,
    /// Bytes to be written.
    pub written_bytes: u64,
}

/// A connection in transmission.
#[derive(Debug)]
pub(super) struct Connection {
    /// What orders call it.
    pub(super) id: u64,
    socket: OwnedFd,
    /// For messages.
    pub(super) peer: String,
    pub(super) volume: VolumeId,
    pub(super) view: View,
    pub(super) terms: Terms,
    pub(super) transmission: Transmission,
    pub(super) outbox: Outbox,
    incoming: Incoming,
    outgoing: Outgoing,
    requests: usize,
    bytes: usize,
    /// What it has asked for so far.
    pub(super) traffic: Traffic,
    /// When it attached.
    pub(super) since: SystemTime,
    /// It has to go: a socket that takes no more is given up.
    is_dismissed: bool,
    /// Reads that wait until the client has taken earlier replies.
    waiting_reads: VecDeque<ReadOf>,
    /// Parsing stopped with requests left: it has to go on by itself, since no
    /// byte may ever come to wake it.
    pub(super) is_held: bool,
    /// It is on the list of connections to be looked after in this turn.
    pub(super) is_touched: bool,
    /// What the poller was last asked about it.
    pub(super) interest: EventFlags,
}

impl Connection {
    pub(super) fn new(new: NewConnection) -> Self {
        Self {
            id: new.id,
            socket: new.socket,
            peer: new.peer,
            volume: new.volume,
            view: new.view,
            terms: new.terms,
            transmission: Transmission::new(new.terms, &new.leftover),
            outbox: Outbox::default(),
            incoming: Incoming::Open,
            outgoing: Outgoing::Open,
            requests: 0,
            bytes: 0,
            traffic: Traffic::default(),
            since: SystemTime::now(),
            is_dismissed: false,
            waiting_reads: VecDeque::new(),
            is_held: false,
            is_touched: false,
            interest: EventFlags::empty(),
        }
    }

    /// Read once what the socket has, as far as there is room. False: it had nothing.
    pub(super) fn receive(&mut self) -> bool {
        if self.incoming == Incoming::Ended {
            return false;
        }
        let (room, most) = self.transmission.room();
        match uninterrupted(|| sys::receive_append(&self.socket, room, most)) {
            Ok(0) => self.end_input(),
            Ok(received) => self.transmission.received(received),
            Err(Errno::AGAIN) => return false,
            Err(_) => {
                self.end_input();
                self.lose();
            }
        }
        true
    }

    /// Nothing more is read from the client.
    pub(super) fn end_input(&mut self) {
        self.incoming = Incoming::Ended;
    }

    /// The same, and the client gets no time to take what it is owed: what its
    /// socket does not hold is dropped.
    pub(super) fn dismiss(&mut self) {
        self.end_input();
        self.is_dismissed = true;
        if self.outgoing == Outgoing::Blocked {
            self.lose();
        }
    }

    /// More may come in, and may be taken.
    pub(super) fn is_heard_on(&self) -> bool {
        self.incoming == Incoming::Open && !self.is_held
    }

    /// Nobody is at the other end any more: not a client that has only shut down
    /// its sending side.
    pub(super) fn has_gone(&self) -> bool {
        let mut polled = [PollFd::new(&self.socket, PollFlags::empty())];
        let now = Timespec::default();
        rustix::event::poll(&mut polled, Some(&now)).is_ok()
            && polled[0]
                .revents()
                .intersects(PollFlags::HUP | PollFlags::ERR)
    }

    /// Forget what has come in and was not begun.
    pub(super) fn abandon(&mut self) {
        self.transmission = Transmission::new(self.terms, &[]);
        self.end_input();
        self.lose();
    }

    /// Nothing more is sent to the client.
    pub(super) fn lose(&mut self) {
        self.outgoing = Outgoing::Lost;
        self.outbox.clear();
        self.requests -= self.waiting_reads.len();
        self.waiting_reads.clear();
    }

    /// A read that comes now has to wait: see [`Connection::let_wait`].
    pub(super) fn reads_wait(&self) -> bool {
        self.outgoing == Outgoing::Blocked && self.outbox.len() >= READS_WAIT_FROM
    }

    /// Have a read wait until the client has taken earlier replies.
    pub(super) fn let_wait(&mut self, of: ReadOf) {
        self.begin(0);
        self.waiting_reads.push_back(of);
    }

    /// The next read that need not wait any more.
    pub(super) fn next_waiting_read(&mut self) -> Option<ReadOf> {
        if self.reads_wait() {
            return None;
        }
        let of = self.waiting_reads.pop_front()?;
        self.finish(0);
        Some(of)
    }

    /// There are reads that need not wait any more.
    pub(super) fn has_waiting_read(&self) -> bool {
        !self.waiting_reads.is_empty() && !self.reads_wait()
    }

    /// No further request may be begun now.
    pub(super) fn is_full(&self) -> bool {
        self.outbox.len() > UNSENT_MAX
            || self.requests >= REQUESTS_MAX
            || self.bytes + self.outbox.len() >= BYTES_MAX
    }

    /// Count a request that has come.
    pub(super) fn count(&mut self, call: &Call) {
        self.traffic.requests += 1;
        match call {
            Call::Read { len, .. } => self.traffic.read_bytes += u64::from(*len),
            Call::Command(Command::Write { data, .. }) => {
                self.traffic.written_bytes += data.len() as u64;
            }
            _ => {}
        }
    }

    /// Requests that are under way.
    pub(super) fn in_flight(&self) -> usize {
        self.requests
    }

    /// A request that carries or will bring `bytes` is under way.
    pub(super) fn begin(&mut self, bytes: usize) {
        self.requests += 1;
        self.bytes += bytes;
    }

    /// It has been answered.
    pub(super) fn finish(&mut self, bytes: usize) {
        self.requests -= 1;
        self.bytes -= bytes;
    }

    /// Send if enough has gathered to be worth a call.
    pub(super) fn send_batch(&mut self) {
        if self.outbox.len() >= SEND_FROM && self.outgoing != Outgoing::Blocked {
            self.send();
        }
    }

    /// The socket has become writable.
    pub(super) fn unblock(&mut self) {
        if self.outgoing == Outgoing::Blocked {
            self.outgoing = Outgoing::Open;
        }
    }

    /// Send what there is, as far as the socket takes it.
    pub(super) fn send(&mut self) {
        if self.outgoing == Outgoing::Lost {
            self.outbox.clear();
        }
        while !self.outbox.is_empty() && self.outgoing == Outgoing::Open {
            match uninterrupted(|| send_once(&self.socket, &self.outbox)) {
                Ok(sent) => self.outbox.advance(sent),
                Err(Errno::AGAIN) if !self.is_dismissed => self.outgoing = Outgoing::Blocked,
                Err(_) => self.lose(),
            }
        }
    }

    /// Everything was said, on both sides.
    pub(super) fn is_finished(&self) -> bool {
        self.incoming == Incoming::Ended
            && self.requests == 0
            && self.outbox.is_empty()
            && !self.is_held
    }

    /// What the poller should tell about.
    pub(super) fn wanted(&self) -> EventFlags {
        let mut wanted = EventFlags::empty();
        if self.incoming == Incoming::Open && !self.is_held {
            wanted |= EventFlags::IN;
        }
        if self.outgoing == Outgoing::Blocked {
            wanted |= EventFlags::OUT;
        }
        wanted
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Pieces that go out in one call.
const PIECES: usize = 16;

fn send_once(socket: &OwnedFd, outbox: &Outbox) -> Result<usize, Errno> {
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let mut slices = [IoSlice::new(&[]); PIECES];
    match outbox.slices(&mut slices) {
        1 => rustix::net::send(socket, &slices[0], flags),
        used => {
            let mut no_control = SendAncillaryBuffer::default();
            rustix::net::sendmsg(socket, &slices[..used], &mut no_control, flags)
        }
    }
}
