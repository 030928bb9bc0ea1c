//! A small blocking NBD client, for the demonstration, the tests and the load
//! generator. It distrusts the server: a reply that breaks the protocol is a
//! [`ClientError::Protocol`], never a wrong answer.
//!
//! **One request at a time**: [`Client::connect`], then [`Client::read`],
//! [`Client::write`] and so on.
//!
//! **Many in flight, few system calls**: `queue_*` encode requests into a
//! buffer and return their cookies; [`Client::flush_out`] sends them all with
//! one call; [`Client::fill`] takes what the socket has with one call, and
//! [`Client::next_reply`] hands out the replies in it one by one, without
//! copying a read's data:
//!
//! ```no_run
//! # use nbdsnap::client::{Answer, Client, ClientError};
//! # fn run(client: &mut Client) -> Result<(), ClientError> {
//! for slot in 0..32 {
//!     client.queue_read(slot * 4096, 4096);
//! }
//! loop {
//!     client.flush_out()?;
//!     client.fill()?;
//!     while let Some(reply) = client.next_reply()? {
//!         match reply.result {
//!             Ok(Answer::Data(bytes)) => assert_eq!(bytes.len(), 4096),
//!             other => panic!("{other:?}"),
//!         }
//!         client.queue_read(0, 4096);
//!     }
//! }
//! # }
//! ```
//!
//! [`Client::recv_reply`] waits for the next reply. Sending never deadlocks
//! against a server that waits for its replies to be read: while the socket
//! takes no more, replies are taken in.
//!
//! **Probes**: [`Handshake`] plays options one at a time and shows every reply;
//! [`Client::queue`] takes any command, flags and payload; [`Handshake::stream`]
//! and [`Client::stream`] are the bare socket.

mod buffer;
mod error;
mod handshake;
mod replies;
mod stream;

use std::time::Duration;

use self::buffer::InputBuffer;
pub use self::error::{ClientError, NbdError};
pub use self::handshake::{Connect, ExportInfo, Handshake, ListedExport, OptionReply};
use self::replies::Replies;
pub use self::replies::{Answer, Completion, Extent};
pub use self::stream::Stream;
use crate::nbd::uri::NbdUri;
use crate::nbd::wire::{
    NBD_CMD_BLOCK_STATUS, NBD_CMD_CACHE, NBD_CMD_DISC, NBD_CMD_FLAG_FUA, NBD_CMD_FLUSH,
    NBD_CMD_READ, NBD_CMD_TRIM, NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES, NBD_REQUEST_MAGIC,
    REQUEST_BYTES,
};

/// A connection in transmission. The module's text says how to use it.
#[derive(Debug)]
pub struct Client {
    stream: Stream,
    output: Vec<u8>,
    input: InputBuffer,
    replies: Replies,
    info: ExportInfo,
}

impl Client {
    /// Connects to the export of `uri` with all that this client can do:
    /// structured replies and `base:allocation`, if the server has them.
    pub fn connect(uri: &NbdUri) -> Result<Self, ClientError> {
        Connect::default().to(uri)
    }

    fn new(stream: Stream, input: InputBuffer, info: ExportInfo) -> Self {
        Self {
            stream,
            output: Vec::new(),
            input,
            replies: Replies::new(&info),
            info,
        }
    }

    /// What the handshake told of the export.
    pub fn info(&self) -> &ExportInfo {
        &self.info
    }

    /// Bytes in the export.
    pub fn size(&self) -> u64 {
        self.info.size
    }

    /// Has the export all of these `NBD_FLAG_*`?
    pub fn has_flags(&self, flags: u16) -> bool {
        self.info.flags & flags == flags
    }

    /// The bare socket, beneath all buffers.
    pub fn stream(&mut self) -> &mut Stream {
        &mut self.stream
    }

    /// Lets a receive that waits longer than this fail; `None` waits for ever.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> Result<(), ClientError> {
        Ok(self.stream.set_read_timeout(timeout)?)
    }

    // ---- One request at a time ------------------------------------------

    /// Reads `len` bytes at `offset`.
    pub fn read(&mut self, offset: u64, len: u32) -> Result<Vec<u8>, ClientError> {
        self.read_flags(offset, len, 0)
    }

    /// Reads with `NBD_CMD_FLAG_*` such as DF.
    pub fn read_flags(
        &mut self,
        offset: u64,
        len: u32,
        flags: u16,
    ) -> Result<Vec<u8>, ClientError> {
        let cookie = self.queue(NBD_CMD_READ, flags, offset, len, &[]);
        match self.answer_to(cookie)? {
            Answer::Data(data) => Ok(data.into_owned()),
            other => Err(unexpected("READ", &other)),
        }
    }

    /// Writes `data` at `offset`; with `fua`, durable when it returns.
    pub fn write(&mut self, offset: u64, data: &[u8], fua: bool) -> Result<(), ClientError> {
        let cookie = self.queue_write(offset, data, fua);
        self.done(cookie)
    }

    /// Makes `len` bytes at `offset` zero, with `NBD_CMD_FLAG_*` such as
    /// NO_HOLE, FAST_ZERO and FUA.
    pub fn write_zeroes(&mut self, offset: u64, len: u32, flags: u16) -> Result<(), ClientError> {
        let cookie = self.queue(NBD_CMD_WRITE_ZEROES, flags, offset, len, &[]);
        self.done(cookie)
    }

    /// Gives up `len` bytes at `offset`; with `fua`, durably.
    pub fn trim(&mut self, offset: u64, len: u32, fua: bool) -> Result<(), ClientError> {
        let cookie = self.queue(NBD_CMD_TRIM, fua_flag(fua), offset, len, &[]);
        self.done(cookie)
    }

    /// Makes every write that was answered before durable.
    pub fn flush(&mut self) -> Result<(), ClientError> {
        let cookie = self.queue_flush();
        self.done(cookie)
    }

    /// Asks the server to have `len` bytes at `offset` at hand.
    pub fn cache(&mut self, offset: u64, len: u32) -> Result<(), ClientError> {
        let cookie = self.queue(NBD_CMD_CACHE, 0, offset, len, &[]);
        self.done(cookie)
    }

    /// The `base:allocation` extents from `offset` on: at least one, and
    /// together perhaps less or (in the last) more than `len`.
    pub fn block_status(&mut self, offset: u64, len: u32) -> Result<Vec<Extent>, ClientError> {
        self.block_status_flags(offset, len, 0)
    }

    /// As [`block_status`](Self::block_status), with `NBD_CMD_FLAG_*` such as REQ_ONE.
    pub fn block_status_flags(
        &mut self,
        offset: u64,
        len: u32,
        flags: u16,
    ) -> Result<Vec<Extent>, ClientError> {
        let cookie = self.queue(NBD_CMD_BLOCK_STATUS, flags, offset, len, &[]);
        match self.answer_to(cookie)? {
            Answer::Extents(extents) => Ok(extents),
            other => Err(unexpected("BLOCK_STATUS", &other)),
        }
    }

    /// Says goodbye: the server answers everything before it and hangs up.
    /// Fails if it does not, or if something else comes.
    pub fn disconnect(mut self) -> Result<(), ClientError> {
        self.queue_disconnect();
        self.flush_out()?;
        while self.replies.in_flight() > 0 {
            self.recv_reply()?;
        }
        if self.input.read_from(&mut self.stream, 1)? == 0 && self.input.is_empty() {
            Ok(())
        } else {
            Err(ClientError::Protocol(
                "the server sent more after DISC".into(),
            ))
        }
    }

    // ---- Many in flight --------------------------------------------------

    /// Queues any request, its flags and payload unchecked; its cookie.
    /// `len` stands in the header; a WRITE's payload should have that length.
    pub fn queue(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        len: u32,
        payload: &[u8],
    ) -> u64 {
        let cookie = self.replies.expect(command, flags, offset, len);
        self.encode(command, flags, cookie, offset, len);
        self.output.extend_from_slice(payload);
        cookie
    }

    /// Queues a read; its cookie.
    pub fn queue_read(&mut self, offset: u64, len: u32) -> u64 {
        self.queue(NBD_CMD_READ, 0, offset, len, &[])
    }

    /// Queues a write; its cookie.
    ///
    /// # Panics
    /// If `data` is 4 GiB or longer.
    pub fn queue_write(&mut self, offset: u64, data: &[u8], fua: bool) -> u64 {
        let len = u32::try_from(data.len()).expect("a write is shorter than 4 GiB");
        self.queue(NBD_CMD_WRITE, fua_flag(fua), offset, len, data)
    }

    /// Queues a flush; its cookie.
    pub fn queue_flush(&mut self) -> u64 {
        self.queue(NBD_CMD_FLUSH, 0, 0, 0, &[])
    }

    /// Queues DISC, which has no reply.
    pub fn queue_disconnect(&mut self) {
        self.encode(NBD_CMD_DISC, 0, 0, 0, 0);
    }

    /// Queues bytes as they are, for probes that break the protocol.
    pub fn queue_raw(&mut self, bytes: &[u8]) {
        self.output.extend_from_slice(bytes);
    }

    fn encode(&mut self, command: u16, flags: u16, cookie: u64, offset: u64, len: u32) {
        let mut header = [0; REQUEST_BYTES];
        header[..4].copy_from_slice(&NBD_REQUEST_MAGIC.to_be_bytes());
        header[4..6].copy_from_slice(&flags.to_be_bytes());
        header[6..8].copy_from_slice(&command.to_be_bytes());
        header[8..16].copy_from_slice(&cookie.to_be_bytes());
        header[16..24].copy_from_slice(&offset.to_be_bytes());
        header[24..].copy_from_slice(&len.to_be_bytes());
        self.output.extend_from_slice(&header);
    }

    /// Queues a request and sends all that is queued; its cookie.
    pub fn send_request(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        len: u32,
        payload: &[u8],
    ) -> Result<u64, ClientError> {
        let cookie = self.queue(command, flags, offset, len, payload);
        self.flush_out()?;
        Ok(cookie)
    }

    /// Sends all that is queued. Takes replies in while the socket is full, so
    /// that neither side waits for the other for ever.
    pub fn flush_out(&mut self) -> Result<(), ClientError> {
        let mut sent = 0;
        while sent < self.output.len() {
            if let Some(count) = self.stream.send_now(&self.output[sent..])? {
                sent += count;
            } else if self.stream.wait_for_either()?
                && self.input.read_from(&mut self.stream, 1)? == 0
            {
                return Err(ClientError::Closed);
            }
        }
        self.output.clear();
        Ok(())
    }

    /// Requests that have no reply yet, sent or queued.
    pub fn in_flight(&self) -> usize {
        self.replies.in_flight()
    }

    /// Waits for bytes and takes in what there is, with one system call. Call
    /// [`next_reply`](Self::next_reply) first: if a reply is at hand already,
    /// this may wait for one that never comes.
    pub fn fill(&mut self) -> Result<(), ClientError> {
        let wanted = self.replies.bytes_wanted();
        match self.input.read_from(&mut self.stream, wanted)? {
            0 => Err(ClientError::Closed),
            _ => Ok(()),
        }
    }

    /// The next reply that is at hand, without waiting.
    pub fn next_reply(&mut self) -> Result<Option<Completion<'_>>, ClientError> {
        let Some(taken) = self.replies.take(&mut self.input)? else {
            return Ok(None);
        };
        Ok(Some(taken.view(&self.input)))
    }

    /// Waits for the next reply, whichever it is.
    pub fn recv_reply(&mut self) -> Result<Completion<'_>, ClientError> {
        loop {
            if let Some(taken) = self.replies.take(&mut self.input)? {
                return Ok(taken.view(&self.input));
            }
            self.fill()?;
        }
    }

    // ---- Helpers -----------------------------------------------------------

    fn answer_to(&mut self, cookie: u64) -> Result<Answer<'_>, ClientError> {
        self.flush_out()?;
        let reply = self.recv_reply()?;
        if reply.cookie != cookie {
            let text = "another request's reply: take queued replies before asking anew";
            return Err(ClientError::Protocol(text.into()));
        }
        Ok(reply.result?)
    }

    fn done(&mut self, cookie: u64) -> Result<(), ClientError> {
        match self.answer_to(cookie)? {
            Answer::Done => Ok(()),
            other => Err(unexpected("the request", &other)),
        }
    }
}

fn fua_flag(fua: bool) -> u16 {
    if fua { NBD_CMD_FLAG_FUA } else { 0 }
}

fn unexpected(request: &str, answer: &Answer<'_>) -> ClientError {
    ClientError::Protocol(format!("{request} was answered {answer:?}"))
}

#[cfg(test)]
mod tests;
