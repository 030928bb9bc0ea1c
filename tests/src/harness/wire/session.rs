//! The transmission phase: requests out, replies in, simple or structured.

use std::io::{self, Write};

use super::{Address, Negotiation, Socket, be32, be64, check, cmd, opt, rep};

const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// What a request came to: the data of a read, else nothing; or NBD's error.
pub type Outcome = Result<Vec<u8>, u32>;

/// A reply, with the cookie of its request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The request's cookie.
    pub cookie: u64,
    /// What it came to.
    pub outcome: Outcome,
}

/// A connection in the transmission phase.
#[derive(Debug)]
pub struct Session {
    /// The socket.
    pub socket: Socket,
    /// Bytes of the export.
    pub size: u64,
    /// Its transmission flags.
    pub flags: u16,
    /// Minimum, preferred and maximum block size, where the server told them.
    pub block_sizes: Option<[u32; 3]>,
    /// Structured replies were negotiated.
    pub structured: bool,
}

impl Session {
    /// Connect to an export, with simple replies.
    pub fn open(address: &Address, export: &str) -> io::Result<Self> {
        Negotiation::start(address)?.go(export)
    }

    /// Connect to an export, with structured replies.
    pub fn open_structured(address: &Address, export: &str) -> io::Result<Self> {
        let mut negotiation = Negotiation::start(address)?;
        let replies = negotiation.ask(opt::STRUCTURED_REPLY, &[])?;
        check(
            "the reply to NBD_OPT_STRUCTURED_REPLY",
            u64::from(replies[0].kind),
            u64::from(rep::ACK),
        )?;
        let mut session = negotiation.go(export)?;
        session.structured = true;
        Ok(session)
    }

    /// Send one request; `data` follows it on the wire.
    pub fn send(
        &mut self,
        flags: u16,
        command: u16,
        cookie: u64,
        offset: u64,
        len: u32,
        data: &[u8],
    ) -> io::Result<()> {
        let mut bytes = request(flags, command, cookie, offset, len);
        bytes.extend_from_slice(data);
        self.socket.write_all(&bytes)
    }

    /// The next reply; `len` is how much a successful read carries. Where
    /// structured replies were negotiated, all but reads may still be answered
    /// by a simple one.
    pub fn reply(&mut self, len: impl Fn(u64) -> usize) -> io::Result<Reply> {
        match self.socket.u32()? {
            SIMPLE_REPLY_MAGIC => self.simple_reply(len),
            STRUCTURED_REPLY_MAGIC if self.structured => self.structured_reply(len),
            other => Err(io::Error::other(format!("a reply begins with {other:#x}"))),
        }
    }

    fn simple_reply(&mut self, len: impl Fn(u64) -> usize) -> io::Result<Reply> {
        let error = self.socket.u32()?;
        let cookie = self.socket.u64()?;
        let carried = if error == 0 { len(cookie) } else { 0 };
        if self.structured && carried > 0 {
            return Err(io::Error::other(
                "a simple reply to a read after structured replies were negotiated",
            ));
        }
        let outcome = if error == 0 {
            Ok(self.socket.take(carried)?)
        } else {
            Err(error)
        };
        Ok(Reply { cookie, outcome })
    }

    /// All chunks of a structured reply, put together; the first one's magic has been read.
    fn structured_reply(&mut self, len: impl Fn(u64) -> usize) -> io::Result<Reply> {
        let mut pieces = Vec::new();
        let mut error = None;
        loop {
            let chunk = self.chunk_after_magic()?;
            let payload = &chunk.payload;
            match chunk.kind {
                0 => {}
                1 => pieces.push((be64(payload, 0), payload[8..].to_vec())),
                2 => pieces.push((be64(payload, 0), vec![0; be32(payload, 8) as usize])),
                other if other & 0x8000 != 0 => error = Some(be32(payload, 0)),
                other => return Err(io::Error::other(format!("a chunk of kind {other}"))),
            }
            if chunk.done {
                let outcome = match error {
                    Some(error) => Err(error),
                    None => Ok(assemble(pieces, len(chunk.cookie))),
                };
                return Ok(Reply {
                    cookie: chunk.cookie,
                    outcome,
                });
            }
            self.structured_magic()?;
        }
    }

    /// One chunk of a structured reply.
    pub fn chunk(&mut self) -> io::Result<Chunk> {
        self.structured_magic()?;
        self.chunk_after_magic()
    }

    fn structured_magic(&mut self) -> io::Result<()> {
        check(
            "a structured reply's magic",
            u64::from(self.socket.u32()?),
            u64::from(STRUCTURED_REPLY_MAGIC),
        )
    }

    fn chunk_after_magic(&mut self) -> io::Result<Chunk> {
        let done = self.socket.u16()? & 1 != 0;
        let kind = self.socket.u16()?;
        let cookie = self.socket.u64()?;
        let len = self.socket.u32()?;
        if len > 65 << 20 {
            return Err(io::Error::other(format!("a chunk of {len} bytes")));
        }
        let payload = self.socket.take(len as usize)?;
        Ok(Chunk {
            done,
            kind,
            cookie,
            payload,
        })
    }

    /// Send one request and take its reply, nothing else being in flight.
    pub fn ask(
        &mut self,
        flags: u16,
        command: u16,
        offset: u64,
        len: u32,
        data: &[u8],
    ) -> io::Result<Outcome> {
        let cookie = 0x1234_5678_9abc_def0 ^ offset;
        self.send(flags, command, cookie, offset, len, data)?;
        let carries = if command == cmd::READ {
            len as usize
        } else {
            0
        };
        let reply = self.reply(|_| carries)?;
        check("a reply's cookie", reply.cookie, cookie)?;
        Ok(reply.outcome)
    }

    /// Read.
    pub fn read(&mut self, offset: u64, len: u32) -> io::Result<Outcome> {
        self.ask(0, cmd::READ, offset, len, &[])
    }

    /// Write.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<Outcome> {
        self.ask(0, cmd::WRITE, offset, data.len() as u32, data)
    }

    /// Flush.
    pub fn flush(&mut self) -> io::Result<Outcome> {
        self.ask(0, cmd::FLUSH, 0, 0, &[])
    }

    /// Write zeros.
    pub fn zero(&mut self, offset: u64, len: u32) -> io::Result<Outcome> {
        self.ask(0, cmd::WRITE_ZEROES, offset, len, &[])
    }

    /// Trim.
    pub fn trim(&mut self, offset: u64, len: u32) -> io::Result<Outcome> {
        self.ask(0, cmd::TRIM, offset, len, &[])
    }

    /// The whole export, in pieces.
    pub fn read_all(&mut self) -> io::Result<Outcome> {
        let mut all = Vec::with_capacity(self.size as usize);
        while (all.len() as u64) < self.size {
            let len = (self.size - all.len() as u64).min(1 << 20) as u32;
            match self.read(all.len() as u64, len)? {
                Ok(piece) => all.extend_from_slice(&piece),
                Err(error) => return Ok(Err(error)),
            }
        }
        Ok(Ok(all))
    }

    /// NBD_CMD_DISC, after which the server must close.
    pub fn disconnect(mut self) -> io::Result<()> {
        self.send(0, cmd::DISC, 0, 0, 0, &[])?;
        if self.socket.is_dropped() {
            Ok(())
        } else {
            Err(io::Error::other("still open after NBD_CMD_DISC"))
        }
    }
}

/// One chunk of a structured reply.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// It is the last of its reply.
    pub done: bool,
    /// Its kind.
    pub kind: u16,
    /// The request's cookie.
    pub cookie: u64,
    /// What it carries.
    pub payload: Vec<u8>,
}

/// The bytes of a request's header.
pub fn request(flags: u16, command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&command.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&len.to_be_bytes());
    bytes
}

/// Data chunks come in any order, each with its offset; together they must be
/// one range of `expected` bytes.
fn assemble(mut pieces: Vec<(u64, Vec<u8>)>, expected: usize) -> Vec<u8> {
    pieces.sort_by_key(|piece| piece.0);
    let first = pieces.first().map_or(0, |piece| piece.0);
    let mut all = Vec::with_capacity(expected);
    for (start, bytes) in pieces {
        assert_eq!(
            start,
            first + all.len() as u64,
            "chunks of a reply overlap or leave a gap"
        );
        all.extend_from_slice(&bytes);
    }
    assert_eq!(
        all.len(),
        expected,
        "a structured read carried another length than was asked"
    );
    all
}
