//! The transmission phase, incoming side: bytes in, requests out. No socket.
//!
//! The owner reads from its socket into [`Transmission::room`] and calls
//! [`Transmission::poll`] until it answers `None`; requests come out in the
//! order of the wire, already checked against the export: whatever comes out as
//! a [`Call`] lies within it, is allowed, and has its payload. A request that
//! cannot be served comes out as a refusal, with its payload skipped. Bytes that
//! are no request at all end the connection ([`Broken`]).
//!
//! Payloads are not copied: a small one stays in the buffer that it was read
//! with, a large one is read straight into a buffer of its own.

use bytes::{Buf, Bytes, BytesMut};
use nbdsnap_engine::Command;

use super::reply::{ReadOf, Refusal};
use super::wire::{
    DEFAULT_MAX_PAYLOAD, NBD_CMD_BLOCK_STATUS, NBD_CMD_CACHE, NBD_CMD_DISC, NBD_CMD_FLAG_DF,
    NBD_CMD_FLAG_FAST_ZERO, NBD_CMD_FLAG_FUA, NBD_CMD_FLAG_NO_HOLE, NBD_CMD_FLAG_REQ_ONE,
    NBD_CMD_FLUSH, NBD_CMD_READ, NBD_CMD_TRIM, NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES,
    NBD_REQUEST_MAGIC, REQUEST_BYTES,
};

/// A payload of at least this size gets a buffer of its own.
const OWN_BUFFER: u32 = 64 << 10;
/// The input buffer starts at this size and grows when reads fill it.
const INPUT_MIN: usize = 16 << 10;
/// It does not grow past this size.
const INPUT_MAX: usize = 256 << 10;
/// A write that is too large is still read to its end, to be refused, if it is
/// no longer than this; beyond, the connection ends.
const DRAIN_MAX: u32 = 128 << 20;

/// What was agreed with a client in the handshake, as far as requests depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// The export's size.
    pub export_bytes: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Structured replies were negotiated.
    pub structured: bool,
    /// The id under which `base:allocation` was negotiated, if it was.
    pub base_allocation: Option<u32>,
}

/// What comes out of the wire.
#[derive(Clone, Debug)]
pub enum Item {
    /// A request to be served and answered.
    Call {
        /// Names the request; its reply carries it.
        cookie: u64,
        /// What to do.
        call: Call,
    },
    /// A request to be answered with an error.
    Refused {
        /// Names the request.
        cookie: u64,
        /// Why.
        refusal: Refusal,
    },
    /// The client says good-bye: what came before is still to be answered.
    /// Nothing comes after.
    Disconnect,
}

impl From<ReadOf> for Item {
    /// The read that `of` was made from, once more.
    fn from(of: ReadOf) -> Self {
        let ReadOf {
            cookie,
            offset,
            len,
            one_chunk,
        } = of;
        let call = Call::Read {
            offset,
            len,
            one_chunk,
        };
        Self::Call { cookie, call }
    }
}

/// A request that is in order.
#[derive(Clone, Debug)]
pub enum Call {
    /// Read a range.
    Read {
        /// First byte.
        offset: u64,
        /// How many, at most [`DEFAULT_MAX_PAYLOAD`].
        len: u32,
        /// Answer with one content chunk (DF).
        one_chunk: bool,
    },
    /// Write, write zeroes, trim or flush: the engine's own words.
    Command(Command),
    /// Nothing is to be done: success.
    Nothing,
    /// Tell what is allocated.
    BlockStatus {
        /// First byte.
        offset: u64,
        /// How many, not 0.
        len: u32,
        /// Tell of one extent only.
        one_extent: bool,
    },
    /// Bring the range into memory.
    Cache {
        /// First byte.
        offset: u64,
        /// How many.
        len: u32,
    },
}

impl Call {
    /// Bytes of data that the reply brings.
    pub fn reply_bytes(&self) -> usize {
        match self {
            Self::Read { len, .. } => *len as usize,
            _ => 0,
        }
    }
}

/// The client does not speak the protocol: nothing after this can be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// A request does not begin with the magic number.
    #[error(
        "a request begins with {found:#010x} instead of the magic number {NBD_REQUEST_MAGIC:#010x}"
    )]
    Magic {
        /// What it begins with.
        found: u32,
    },
    /// A write's payload is so long that reading it only to refuse it is no use.
    #[error("a write of {len} bytes, far beyond the agreed maximum of {DEFAULT_MAX_PAYLOAD}")]
    Endless {
        /// Its length.
        len: u32,
    },
}

/// A request's fixed part.
#[derive(Clone, Copy, Debug)]
struct Header {
    flags: u16,
    command: u16,
    cookie: u64,
    offset: u64,
    len: u32,
}

/// What the next byte of the wire belongs to.
#[derive(Debug)]
enum State {
    /// A request's header, or a small payload behind it.
    Header,
    /// The payload of a write, collected in its own buffer.
    Payload { header: Header, data: BytesMut },
    /// A payload that nobody wants; the refusal follows it.
    Draining {
        left: usize,
        cookie: u64,
        refusal: Refusal,
    },
    /// After a disconnect nothing counts.
    Ended,
}

/// The incoming side of one connection.
#[derive(Debug)]
pub struct Transmission {
    terms: Terms,
    state: State,
    input: BytesMut,
    input_bytes: usize,
    offered: usize,
}

impl Transmission {
    /// Transmission under `terms`; `leftover` is what the client sent behind its
    /// last option.
    pub fn new(terms: Terms, leftover: &[u8]) -> Self {
        Self {
            terms,
            state: State::Header,
            input: BytesMut::from(leftover),
            input_bytes: INPUT_MIN,
            offered: 0,
        }
    }

    /// What was agreed.
    pub fn terms(&self) -> &Terms {
        &self.terms
    }

    /// Where the next bytes of the wire are to be appended, and how many at
    /// most. Only to be called after [`Transmission::poll`] has answered `None`.
    pub fn room(&mut self) -> (&mut BytesMut, usize) {
        if let State::Payload { header, data } = &mut self.state {
            let missing = header.len as usize - data.len();
            self.offered = usize::MAX;
            return (data, missing);
        }
        if self.input.capacity() - self.input.len() < self.input_bytes / 2 {
            self.input.reserve(self.input_bytes);
        }
        self.offered = self.input.capacity() - self.input.len();
        (&mut self.input, self.offered)
    }

    /// Tell how many bytes have been appended to the room.
    pub fn received(&mut self, bytes: usize) {
        // A read that filled all the room says that there is more where it came from.
        if bytes >= self.offered {
            self.input_bytes = (self.input_bytes * 2).min(INPUT_MAX);
        }
    }

    /// The next request, if all of it is there.
    pub fn poll(&mut self) -> Result<Option<Item>, Broken> {
        loop {
            match &mut self.state {
                State::Header => match self.poll_header()? {
                    Step::Item(item) => return Ok(Some(item)),
                    Step::Again => {}
                    Step::NeedBytes => return Ok(None),
                },
                State::Payload { header, data } => {
                    if data.len() < header.len as usize {
                        return Ok(None);
                    }
                    let (header, data) = (*header, std::mem::take(data).freeze());
                    self.state = State::Header;
                    return Ok(Some(write(&header, data)));
                }
                State::Draining {
                    left,
                    cookie,
                    refusal,
                } => {
                    let skip = self.input.len().min(*left);
                    self.input.advance(skip);
                    *left -= skip;
                    if *left > 0 {
                        return Ok(None);
                    }
                    let (cookie, refusal) = (*cookie, *refusal);
                    self.state = State::Header;
                    return Ok(Some(Item::Refused { cookie, refusal }));
                }
                State::Ended => {
                    self.input.clear();
                    return Ok(None);
                }
            }
        }
    }

    fn poll_header(&mut self) -> Result<Step, Broken> {
        let Some(header) = self.input.first_chunk() else {
            return Ok(Step::NeedBytes);
        };
        let header = Header::decode(header)?;
        if header.command == NBD_CMD_WRITE {
            return self.poll_write(header);
        }
        self.input.advance(REQUEST_BYTES);
        if header.command == NBD_CMD_DISC {
            self.state = State::Ended;
            return Ok(Step::Item(Item::Disconnect));
        }
        let cookie = header.cookie;
        Ok(Step::Item(match check(&self.terms, &header) {
            Ok(call) => Item::Call { cookie, call },
            Err(refusal) => Item::Refused { cookie, refusal },
        }))
    }

    fn poll_write(&mut self, header: Header) -> Result<Step, Broken> {
        if let Err(refusal) = check_write(&self.terms, &header) {
            if header.len > DRAIN_MAX {
                return Err(Broken::Endless { len: header.len });
            }
            self.input.advance(REQUEST_BYTES);
            self.state = State::Draining {
                left: header.len as usize,
                cookie: header.cookie,
                refusal,
            };
            return Ok(Step::Again);
        }
        let len = header.len as usize;
        if self.input.len() >= REQUEST_BYTES + len {
            self.input.advance(REQUEST_BYTES);
            let data = self.input.split_to(len).freeze();
            return Ok(Step::Item(write(&header, data)));
        }
        if header.len >= OWN_BUFFER {
            self.input.advance(REQUEST_BYTES);
            let mut data = BytesMut::with_capacity(len);
            data.extend_from_slice(&self.input);
            self.input.clear();
            self.state = State::Payload { header, data };
            return Ok(Step::Again);
        }
        let missing = REQUEST_BYTES + len - self.input.len();
        self.input.reserve(missing);
        Ok(Step::NeedBytes)
    }
}

/// How far a look at the input came.
enum Step {
    Item(Item),
    Again,
    NeedBytes,
}

impl Header {
    fn decode(bytes: &[u8; REQUEST_BYTES]) -> Result<Self, Broken> {
        let mut rest = &bytes[..];
        let found = rest.get_u32();
        if found != NBD_REQUEST_MAGIC {
            return Err(Broken::Magic { found });
        }
        Ok(Self {
            flags: rest.get_u16(),
            command: rest.get_u16(),
            cookie: rest.get_u64(),
            offset: rest.get_u64(),
            len: rest.get_u32(),
        })
    }

    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// FUA is allowed on every command, others where they mean something.
    fn check_flags(&self, allowed: u16) -> Result<(), Refusal> {
        if self.flags & !(allowed | NBD_CMD_FLAG_FUA) == 0 {
            Ok(())
        } else {
            Err(Refusal::UnknownFlag)
        }
    }

    fn check_range(&self, terms: &Terms, past_end: Refusal) -> Result<(), Refusal> {
        match self.offset.checked_add(u64::from(self.len)) {
            Some(end) if end <= terms.export_bytes => Ok(()),
            _ => Err(past_end),
        }
    }
}

fn write(header: &Header, data: Bytes) -> Item {
    let (offset, fua) = (header.offset, header.has(NBD_CMD_FLAG_FUA));
    let len = data.len() as u64;
    Item::Call {
        cookie: header.cookie,
        call: ranged(Command::Write { offset, data, fua }, len, fua),
    }
}

fn check_write(terms: &Terms, header: &Header) -> Result<(), Refusal> {
    header.check_flags(0)?;
    if terms.read_only {
        return Err(Refusal::ReadOnly);
    }
    if header.len > DEFAULT_MAX_PAYLOAD {
        return Err(Refusal::TooLong);
    }
    header.check_range(terms, Refusal::WritePastEnd)
}

/// Everything but writes, which have a payload.
fn check(terms: &Terms, header: &Header) -> Result<Call, Refusal> {
    let &Header { offset, len, .. } = header;
    let fua = header.has(NBD_CMD_FLAG_FUA);
    match header.command {
        NBD_CMD_READ => {
            let allowed = if terms.structured { NBD_CMD_FLAG_DF } else { 0 };
            header.check_flags(allowed)?;
            if len > DEFAULT_MAX_PAYLOAD {
                return Err(Refusal::TooLong);
            }
            header.check_range(terms, Refusal::PastEnd)?;
            let one_chunk = header.has(NBD_CMD_FLAG_DF);
            Ok(Call::Read {
                offset,
                len,
                one_chunk,
            })
        }
        NBD_CMD_FLUSH => {
            header.check_flags(0)?;
            // What nobody may write needs no flush, and a disk that is served
            // read-only gets none.
            let nothing = terms.read_only;
            Ok(if nothing {
                Call::Nothing
            } else {
                Call::Command(Command::Flush)
            })
        }
        NBD_CMD_TRIM => {
            header.check_flags(0)?;
            check_writable(terms)?;
            header.check_range(terms, Refusal::PastEnd)?;
            let len = u64::from(len);
            Ok(ranged(Command::Trim { offset, len, fua }, len, fua))
        }
        NBD_CMD_WRITE_ZEROES => {
            header.check_flags(NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO)?;
            check_writable(terms)?;
            header.check_range(terms, Refusal::WritePastEnd)?;
            let len = u64::from(len);
            let command = Command::WriteZeroes {
                offset,
                len,
                fua,
                no_hole: header.has(NBD_CMD_FLAG_NO_HOLE),
                fast_only: header.has(NBD_CMD_FLAG_FAST_ZERO),
            };
            Ok(ranged(command, len, fua))
        }
        NBD_CMD_CACHE => {
            header.check_flags(0)?;
            header.check_range(terms, Refusal::PastEnd)?;
            Ok(if len == 0 {
                Call::Nothing
            } else {
                Call::Cache { offset, len }
            })
        }
        NBD_CMD_BLOCK_STATUS => {
            header.check_flags(NBD_CMD_FLAG_REQ_ONE)?;
            if terms.base_allocation.is_none() {
                return Err(Refusal::NoContext);
            }
            header.check_range(terms, Refusal::PastEnd)?;
            // A status reply holds at least one extent, and none is empty.
            if len == 0 {
                return Err(Refusal::EmptyRange);
            }
            let one_extent = header.has(NBD_CMD_FLAG_REQ_ONE);
            Ok(Call::BlockStatus {
                offset,
                len,
                one_extent,
            })
        }
        _ => Err(Refusal::UnknownCommand),
    }
}

fn check_writable(terms: &Terms) -> Result<(), Refusal> {
    if terms.read_only {
        return Err(Refusal::ReadOnly);
    }
    Ok(())
}

/// A command on no bytes does nothing, unless it asks for durability.
fn ranged(command: Command, len: u64, fua: bool) -> Call {
    if len > 0 {
        Call::Command(command)
    } else if fua {
        Call::Command(Command::Flush)
    } else {
        Call::Nothing
    }
}

#[cfg(test)]
mod tests;
