//! What the server sends in transmission, taken apart and checked: each reply
//! against the request it answers. A reply in chunks is put together here.

use std::borrow::Cow;
use std::ops::Range;

use bytes::Buf;

use super::buffer::InputBuffer;
use super::error::{ClientError, NbdError};
use super::handshake::ExportInfo;
use crate::nbd::wire::{
    NBD_CMD_BLOCK_STATUS, NBD_CMD_FLAG_DF, NBD_CMD_FLAG_REQ_ONE, NBD_CMD_READ, NBD_REPLY_FLAG_DONE,
    NBD_REPLY_TYPE_BLOCK_STATUS, NBD_REPLY_TYPE_ERROR_OFFSET, NBD_REPLY_TYPE_FLAG_ERROR,
    NBD_REPLY_TYPE_NONE, NBD_REPLY_TYPE_OFFSET_DATA, NBD_REPLY_TYPE_OFFSET_HOLE,
    NBD_SIMPLE_REPLY_MAGIC, NBD_STATE_HOLE, NBD_STATE_ZERO, NBD_STRUCTURED_REPLY_MAGIC,
    SIMPLE_REPLY_BYTES, STRUCTURED_REPLY_BYTES,
};

/// No chunk but a read's data is longer than this: 2^20 extents and an id.
const MAX_OTHER_CHUNK: usize = 4 + (8 << 20);

/// A request that has been answered.
#[derive(Debug)]
pub struct Completion<'a> {
    /// As `queue_*` returned it.
    pub cookie: u64,
    /// The answer, or the server's error.
    pub result: Result<Answer<'a>, NbdError>,
}

/// What a successful request gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer<'a> {
    /// Nothing but success.
    Done,
    /// A read's bytes, all of them; borrowed where they came in one piece.
    Data(Cow<'a, [u8]>),
    /// Extents of `base:allocation`.
    Extents(Vec<Extent>),
}

/// A stretch of an export with one status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes.
    pub len: u32,
    /// `NBD_STATE_*`.
    pub flags: u32,
}

impl Extent {
    /// Not allocated.
    pub fn is_hole(self) -> bool {
        self.flags & NBD_STATE_HOLE != 0
    }

    /// Reads as zeroes.
    pub fn is_zero(self) -> bool {
        self.flags & NBD_STATE_ZERO != 0
    }
}

/// A reply that has been taken from the buffer, with its data still in there.
#[derive(Debug)]
pub(super) struct Taken {
    cookie: u64,
    result: Result<TakenAnswer, NbdError>,
}

#[derive(Debug)]
enum TakenAnswer {
    Done,
    InBuffer(Range<usize>),
    Assembled(Vec<u8>),
    Extents(Vec<Extent>),
}

impl Taken {
    pub(super) fn view(self, input: &InputBuffer) -> Completion<'_> {
        let result = self.result.map(|answer| match answer {
            TakenAnswer::Done => Answer::Done,
            TakenAnswer::InBuffer(range) => Answer::Data(Cow::Borrowed(input.taken(range))),
            TakenAnswer::Assembled(data) => Answer::Data(Cow::Owned(data)),
            TakenAnswer::Extents(extents) => Answer::Extents(extents),
        });
        Completion {
            cookie: self.cookie,
            result,
        }
    }
}

/// A request without its whole reply.
#[derive(Debug)]
struct Pending {
    cookie: u64,
    command: u16,
    flags: u16,
    offset: u64,
    len: u32,
    /// The first error chunk.
    error: Option<NbdError>,
    /// A read's bytes so far; made with the first chunk that is not the whole.
    data: Vec<u8>,
    /// Which bytes of `data` have come, in ranges that do not overlap.
    covered: Vec<Range<usize>>,
    extents: Option<Vec<Extent>>,
}

/// The header of a chunk.
#[derive(Clone, Copy, Debug)]
struct Chunk {
    flags: u16,
    kind: u16,
    len: usize,
}

/// All requests in flight and the reader of their replies.
#[derive(Debug)]
pub(super) struct Replies {
    structured: bool,
    base_allocation: Option<u32>,
    export_size: u64,
    /// A cookie's low half is an index here; its high half tells reuses apart.
    pending: Vec<Option<Pending>>,
    free: Vec<u32>,
    next_serial: u32,
    wanted: usize,
}

impl Replies {
    pub(super) fn new(info: &ExportInfo) -> Self {
        Self {
            structured: info.structured_replies,
            base_allocation: info.base_allocation,
            export_size: info.size,
            pending: Vec::new(),
            free: Vec::new(),
            next_serial: 1,
            wanted: 1,
        }
    }

    pub(super) fn in_flight(&self) -> usize {
        self.pending.len() - self.free.len()
    }

    /// How long the reply at the front of the buffer is, as far as is known.
    pub(super) fn bytes_wanted(&self) -> usize {
        self.wanted
    }

    /// Registers a request; its cookie.
    pub(super) fn expect(&mut self, command: u16, flags: u16, offset: u64, len: u32) -> u64 {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.pending.push(None);
            self.pending.len() as u32 - 1
        });
        let cookie = u64::from(self.next_serial) << 32 | u64::from(slot);
        self.next_serial = self.next_serial.wrapping_add(1);
        self.pending[slot as usize] = Some(Pending {
            cookie,
            command,
            flags,
            offset,
            len,
            error: None,
            data: Vec::new(),
            covered: Vec::new(),
            extents: None,
        });
        cookie
    }

    fn find(&mut self, cookie: u64) -> Result<&mut Pending, ClientError> {
        let slot = self.pending.get_mut(cookie as u32 as usize);
        match slot.and_then(Option::as_mut) {
            Some(pending) if pending.cookie == cookie => Ok(pending),
            _ => Err(broken(format!(
                "reply with cookie {cookie:#x}, not in flight"
            ))),
        }
    }

    fn remove(&mut self, cookie: u64) -> Pending {
        let slot = cookie as u32;
        self.free.push(slot);
        let pending = self.pending[slot as usize].take();
        pending.expect("found before it is removed")
    }

    /// The next whole reply in `input`. If there is none, sets
    /// [`bytes_wanted`](Self::bytes_wanted).
    pub(super) fn take(&mut self, input: &mut InputBuffer) -> Result<Option<Taken>, ClientError> {
        loop {
            self.wanted = SIMPLE_REPLY_BYTES;
            let mut bytes = input.peek();
            if bytes.len() < SIMPLE_REPLY_BYTES {
                return Ok(None);
            }
            let taken = match bytes.get_u32() {
                NBD_SIMPLE_REPLY_MAGIC => return self.take_simple(input),
                NBD_STRUCTURED_REPLY_MAGIC => self.take_chunk(input)?,
                magic => return Err(broken(format!("a reply begins with {magic:#x}"))),
            };
            match taken {
                TakenChunk::Incomplete => return Ok(None),
                TakenChunk::MoreToCome => {}
                TakenChunk::Last(taken) => return Ok(Some(taken)),
            }
        }
    }

    fn take_simple(&mut self, input: &mut InputBuffer) -> Result<Option<Taken>, ClientError> {
        let mut bytes = &input.peek()[4..];
        let (errno, cookie) = (bytes.get_u32(), bytes.get_u64());
        let at_hand = bytes.len();
        let structured = self.structured;
        let pending = self.find(cookie)?;
        let reads = pending.command == NBD_CMD_READ;
        if structured && reads {
            return Err(broken(
                "a simple reply to READ after structured replies were agreed",
            ));
        }
        if pending.command == NBD_CMD_BLOCK_STATUS && errno == 0 {
            return Err(broken("a simple reply to BLOCK_STATUS"));
        }
        let data_len = if reads && errno == 0 {
            pending.len as usize
        } else {
            0
        };
        if at_hand < data_len {
            self.wanted = SIMPLE_REPLY_BYTES + data_len;
            return Ok(None);
        }
        if !pending.covered.is_empty() || pending.error.is_some() || pending.extents.is_some() {
            return Err(broken("a simple reply after chunks of the same request"));
        }
        input.take(SIMPLE_REPLY_BYTES);
        let data = input.take(data_len);
        self.remove(cookie);
        let message = String::new();
        let result = match errno {
            0 if reads => Ok(TakenAnswer::InBuffer(data)),
            0 => Ok(TakenAnswer::Done),
            errno => Err(NbdError { errno, message }),
        };
        Ok(Some(Taken { cookie, result }))
    }

    fn take_chunk(&mut self, input: &mut InputBuffer) -> Result<TakenChunk, ClientError> {
        if !self.structured {
            return Err(broken("a chunk though structured replies were not agreed"));
        }
        let mut bytes = input.peek();
        if bytes.len() < STRUCTURED_REPLY_BYTES {
            self.wanted = STRUCTURED_REPLY_BYTES;
            return Ok(TakenChunk::Incomplete);
        }
        bytes.advance(4);
        let (flags, kind) = (bytes.get_u16(), bytes.get_u16());
        let cookie = bytes.get_u64();
        let len = bytes.get_u32() as usize;
        let chunk = Chunk { flags, kind, len };
        let at_hand = bytes.len();
        let pending = self.find(cookie)?;
        if len > MAX_OTHER_CHUNK.max(pending.len as usize + 8) {
            return Err(broken(format!("a chunk of {len} bytes")));
        }
        if at_hand < len {
            self.wanted = STRUCTURED_REPLY_BYTES + len;
            return Ok(TakenChunk::Incomplete);
        }
        input.take(STRUCTURED_REPLY_BYTES);
        let payload = input.take(len);
        self.handle_chunk(cookie, chunk, payload, input)
    }

    fn handle_chunk(
        &mut self,
        cookie: u64,
        chunk: Chunk,
        payload: Range<usize>,
        input: &InputBuffer,
    ) -> Result<TakenChunk, ClientError> {
        let last = chunk.flags & NBD_REPLY_FLAG_DONE != 0;
        let bytes = input.taken(payload.clone());
        let (id, size) = (self.base_allocation, self.export_size);
        let pending = self.find(cookie)?;
        if last && pending.is_all_of_it(chunk, bytes) {
            self.remove(cookie);
            let data = TakenAnswer::InBuffer(payload.start + 8..payload.end);
            let result = Ok(data);
            return Ok(TakenChunk::Last(Taken { cookie, result }));
        }
        match chunk.kind {
            NBD_REPLY_TYPE_NONE if chunk.len == 0 && last => {}
            NBD_REPLY_TYPE_OFFSET_DATA if chunk.len > 8 => pending.add_data(bytes)?,
            NBD_REPLY_TYPE_OFFSET_HOLE if chunk.len == 12 => pending.add_hole(bytes)?,
            NBD_REPLY_TYPE_BLOCK_STATUS => pending.add_extents(bytes, id, size)?,
            kind if kind & NBD_REPLY_TYPE_FLAG_ERROR != 0 => pending.add_error(kind, bytes)?,
            kind => {
                let len = chunk.len;
                return Err(broken(format!("a chunk of type {kind} and {len} bytes")));
            }
        }
        if !last {
            return Ok(TakenChunk::MoreToCome);
        }
        let result = self.remove(cookie).finish()?;
        Ok(TakenChunk::Last(Taken { cookie, result }))
    }
}

enum TakenChunk {
    Incomplete,
    MoreToCome,
    Last(Taken),
}

impl Pending {
    /// Is this chunk by itself everything that the read asked for?
    fn is_all_of_it(&self, chunk: Chunk, bytes: &[u8]) -> bool {
        self.command == NBD_CMD_READ
            && chunk.kind == NBD_REPLY_TYPE_OFFSET_DATA
            && self.len > 0
            && chunk.len == self.len as usize + 8
            && bytes[..8] == self.offset.to_be_bytes()
            && self.error.is_none()
            && self.covered.is_empty()
    }

    fn add_data(&mut self, mut bytes: &[u8]) -> Result<(), ClientError> {
        let range = self.cover(bytes.get_u64(), bytes.len())?;
        self.data[range].copy_from_slice(bytes);
        Ok(())
    }

    fn add_hole(&mut self, mut bytes: &[u8]) -> Result<(), ClientError> {
        // The assembled data begins as zeroes.
        self.cover(bytes.get_u64(), bytes.get_u32() as usize)?;
        Ok(())
    }

    /// Notes that `len` bytes at `offset` of the export have come; where they
    /// lie in the answer.
    fn cover(&mut self, offset: u64, len: usize) -> Result<Range<usize>, ClientError> {
        if self.command != NBD_CMD_READ {
            return Err(broken("data for a request that is no READ"));
        }
        let total = self.len as usize;
        let start = offset.checked_sub(self.offset).unwrap_or(u64::MAX) as usize;
        let end = start.saturating_add(len);
        if len == 0 || end > total {
            return Err(broken(format!("{len} bytes at {offset}, outside the READ")));
        }
        let overlaps = |range: &Range<usize>| range.start < end && start < range.end;
        if self.covered.iter().any(overlaps) {
            return Err(broken(format!("the bytes at {offset} came twice")));
        }
        if self.flags & NBD_CMD_FLAG_DF != 0 && !self.covered.is_empty() {
            return Err(broken("a READ with DF was answered in several pieces"));
        }
        self.data.resize(total, 0);
        match self.covered.last_mut() {
            Some(range) if range.end == start && self.flags & NBD_CMD_FLAG_DF == 0 => {
                range.end = end;
            }
            _ => self.covered.push(start..end),
        }
        Ok(start..end)
    }

    fn add_extents(
        &mut self,
        mut bytes: &[u8],
        id: Option<u32>,
        export_size: u64,
    ) -> Result<(), ClientError> {
        let len = bytes.len();
        if self.command != NBD_CMD_BLOCK_STATUS || len < 12 || !(len - 4).is_multiple_of(8) {
            return Err(broken(format!("a block status chunk of {len} bytes")));
        }
        let context = bytes.get_u32();
        if Some(context) != id || self.extents.is_some() {
            return Err(broken(format!(
                "block status of context {context}, unagreed or twice"
            )));
        }
        let mut extents = Vec::with_capacity(bytes.len() / 8);
        let mut before_last = 0;
        let mut total = 0;
        while !bytes.is_empty() {
            let (len, flags) = (bytes.get_u32(), bytes.get_u32());
            before_last = total;
            total += u64::from(len);
            if len == 0 {
                return Err(broken("a block status extent of no length"));
            }
            extents.push(Extent { len, flags });
        }
        let one = self.flags & NBD_CMD_FLAG_REQ_ONE != 0;
        let asked = u64::from(self.len);
        let one_too_many = one && (extents.len() > 1 || total > asked);
        if one_too_many || before_last >= asked || self.offset.saturating_add(total) > export_size {
            let count = extents.len();
            let text =
                format!("block status of {total} bytes in {count} extents for {asked} bytes");
            return Err(broken(text));
        }
        self.extents = Some(extents);
        Ok(())
    }

    fn add_error(&mut self, kind: u16, mut bytes: &[u8]) -> Result<(), ClientError> {
        let after = if kind == NBD_REPLY_TYPE_ERROR_OFFSET {
            8
        } else {
            0
        };
        if bytes.len() < 6 + after {
            return Err(broken(format!("an error chunk of {} bytes", bytes.len())));
        }
        let (errno, message_len) = (bytes.get_u32(), usize::from(bytes.get_u16()));
        if errno == 0 || message_len + after > bytes.len() {
            return Err(broken(
                "an error chunk without error, or with a cut message",
            ));
        }
        let message = String::from_utf8_lossy(&bytes[..message_len]).into_owned();
        self.error.get_or_insert(NbdError { errno, message });
        Ok(())
    }

    fn finish(self) -> Result<Result<TakenAnswer, NbdError>, ClientError> {
        if let Some(error) = self.error {
            return Ok(Err(error));
        }
        match self.command {
            NBD_CMD_READ => {
                let covered: usize = self.covered.iter().map(ExactSizeIterator::len).sum();
                if covered == self.len as usize {
                    Ok(Ok(TakenAnswer::Assembled(self.data)))
                } else {
                    let asked = self.len;
                    Err(broken(format!(
                        "only {covered} of {asked} bytes came, without an error"
                    )))
                }
            }
            NBD_CMD_BLOCK_STATUS => match self.extents {
                Some(extents) => Ok(Ok(TakenAnswer::Extents(extents))),
                None => Err(broken("BLOCK_STATUS succeeded without a status")),
            },
            _ => Ok(Ok(TakenAnswer::Done)),
        }
    }
}

fn broken(what: impl Into<String>) -> ClientError {
    ClientError::Protocol(what.into())
}

#[cfg(test)]
mod tests;
