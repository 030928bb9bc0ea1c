//! Requests in flight, and the bytes that answer them: [`ReplyParser`] takes
//! what a read of the socket returned, in whatever pieces it comes, checks data
//! as it passes, and says which requests are done. No socket, no clock of its
//! own. The caller is the loop in `load`.

use std::time::Instant;

use nbdsnap::nbd::wire::{
    NBD_CMD_READ, NBD_CMD_WRITE, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_FLAG_ERROR,
    NBD_REPLY_TYPE_NONE, NBD_REPLY_TYPE_OFFSET_DATA, NBD_REPLY_TYPE_OFFSET_HOLE, NBD_REQUEST_MAGIC,
    NBD_SIMPLE_REPLY_MAGIC, NBD_STRUCTURED_REPLY_MAGIC, SIMPLE_REPLY_BYTES, STRUCTURED_REPLY_BYTES,
};

use crate::BenchError;
use crate::content::Content;

/// The largest error chunk that is taken: a number, a message and an offset.
const MAX_ERROR_CHUNK: u32 = 8192;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// NBD_CMD_READ
    Read,
    /// NBD_CMD_WRITE
    Write,
}

impl Command {
    fn name(self) -> &'static str {
        match self {
            Self::Read => "NBD_CMD_READ",
            Self::Write => "NBD_CMD_WRITE",
        }
    }
}

/// A request that was sent and not yet answered.
#[derive(Clone, Copy, Debug)]
struct Slot {
    cookie: u64,
    command: Command,
    offset: u64,
    len: u32,
    /// Bytes that have come.
    received: u32,
    since: Instant,
}

/// A request that was answered, in full and rightly.
#[derive(Clone, Copy, Debug)]
pub struct Finished {
    /// Its offset.
    pub offset: u64,
    /// When it was put into the send buffer.
    pub since: Instant,
}

/// The requests in flight, at most `depth`.
#[derive(Debug)]
pub struct InFlight {
    slots: Vec<Option<Slot>>,
    free: Vec<u16>,
    generation: u64,
}

impl InFlight {
    /// Room for `depth` requests.
    pub fn new(depth: u16) -> Self {
        Self {
            slots: vec![None; usize::from(depth)],
            free: (0..depth).rev().collect(),
            generation: 0,
        }
    }

    /// How many more may be sent.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes a free place and appends the request's header to a send buffer.
    /// Call it only while there is room.
    pub fn begin(
        &mut self,
        command: Command,
        offset: u64,
        len: u32,
        since: Instant,
        out: &mut Vec<u8>,
    ) {
        let place = self
            .free
            .pop()
            .expect("begin is called while there is room");
        // A number that no earlier request had: a reply that comes twice is noticed.
        self.generation += 1;
        let cookie = self.generation << 16 | u64::from(place);
        self.slots[usize::from(place)] = Some(Slot {
            cookie,
            command,
            offset,
            len,
            received: 0,
            since,
        });
        let number = match command {
            Command::Read => NBD_CMD_READ,
            Command::Write => NBD_CMD_WRITE,
        };
        let mut header = [0; 28];
        header[..4].copy_from_slice(&NBD_REQUEST_MAGIC.to_be_bytes());
        header[6..8].copy_from_slice(&number.to_be_bytes());
        header[8..16].copy_from_slice(&cookie.to_be_bytes());
        header[16..24].copy_from_slice(&offset.to_be_bytes());
        header[24..].copy_from_slice(&len.to_be_bytes());
        out.extend_from_slice(&header);
    }

    fn slot(&mut self, cookie: u64) -> Result<&mut Slot, BenchError> {
        self.slots
            .get_mut((cookie & 0xffff) as usize)
            .and_then(Option::as_mut)
            .filter(|slot| slot.cookie == cookie)
            .ok_or_else(|| {
                BenchError::Protocol(format!("cookie {cookie:#x} is of no request in flight"))
            })
    }

    fn finish(&mut self, cookie: u64) -> Result<Finished, BenchError> {
        let slot = *self.slot(cookie)?;
        if slot.command == Command::Read && slot.received != slot.len {
            return Err(BenchError::Protocol(format!(
                "a read of {} bytes at {} ended after {}",
                slot.len, slot.offset, slot.received
            )));
        }
        let place = (cookie & 0xffff) as u16;
        self.slots[usize::from(place)] = None;
        self.free.push(place);
        Ok(Finished {
            offset: slot.offset,
            since: slot.since,
        })
    }

    /// Counts data that is to come for a read, and finds it inside the request.
    fn expect_data(&mut self, cookie: u64, offset: u64, len: u32) -> Result<(), BenchError> {
        let slot = self.slot(cookie)?;
        let inside =
            offset >= slot.offset && offset + u64::from(len) <= slot.offset + u64::from(slot.len);
        if slot.command != Command::Read || !inside || slot.received + len > slot.len {
            return Err(BenchError::Protocol(format!(
                "{len} bytes for {offset} in reply to {} of {} bytes at {}",
                slot.command.name(),
                slot.len,
                slot.offset
            )));
        }
        slot.received += len;
        Ok(())
    }

    fn refusal(&mut self, cookie: u64, error: u32) -> BenchError {
        match self.slot(cookie) {
            Ok(slot) => BenchError::Refused {
                command: slot.command.name(),
                offset: slot.offset,
                len: slot.len,
                error,
            },
            Err(unknown) => unknown,
        }
    }
}

/// Reads simple and structured replies.
#[derive(Debug, Default)]
pub struct ReplyParser {
    /// The head of a reply of which not all bytes have come.
    head: Vec<u8>,
    /// Data that is passing.
    data: Option<Data>,
}

/// Data of a read that is passing.
#[derive(Debug)]
struct Data {
    cookie: u64,
    at: u64,
    left: u32,
    /// The request is done when it has passed.
    last: bool,
}

/// What the first bytes of a reply say.
enum Head {
    /// It takes this many bytes to tell.
    Needs(usize),
    /// Data follows.
    Data(Data),
    /// The request is done.
    Done { cookie: u64 },
    /// A chunk that is complete, and not the last one.
    More,
}

impl ReplyParser {
    /// Takes bytes from the socket. Each request that is done is handed to `done`.
    pub fn feed(
        &mut self,
        mut input: &[u8],
        in_flight: &mut InFlight,
        content: &Content,
        mut done: impl FnMut(Finished),
    ) -> Result<(), BenchError> {
        loop {
            if let Some(data) = &mut self.data {
                let (now, rest) = input.split_at(input.len().min(data.left as usize));
                content.check(data.at, now)?;
                data.at += now.len() as u64;
                data.left -= now.len() as u32;
                input = rest;
                if data.left > 0 {
                    return Ok(());
                }
                let Data { cookie, last, .. } = *data;
                self.data = None;
                if last {
                    done(in_flight.finish(cookie)?);
                }
            }
            if input.is_empty() {
                return Ok(());
            }
            match self.head(&mut input, in_flight, content)? {
                Head::Needs(_) => return Ok(()),
                Head::Data(data) => self.data = Some(data),
                Head::Done { cookie } => done(in_flight.finish(cookie)?),
                Head::More => {}
            }
        }
    }

    /// Reads a head from the input, and from what was left of the input before.
    fn head(
        &mut self,
        input: &mut &[u8],
        in_flight: &mut InFlight,
        content: &Content,
    ) -> Result<Head, BenchError> {
        let mut need = 4;
        loop {
            // Straight from the input where all of it is there; else piece by piece.
            let in_place = self.head.is_empty() && input.len() >= need;
            if !in_place && self.head.len() < need {
                let piece = input.len().min(need - self.head.len());
                self.head.extend_from_slice(&input[..piece]);
                *input = &input[piece..];
                if self.head.len() < need {
                    return Ok(Head::Needs(need));
                }
            }
            let bytes = if in_place {
                &input[..need]
            } else {
                self.head.as_slice()
            };
            match decode(bytes, in_flight, content)? {
                Head::Needs(more) => need = more,
                head => {
                    if in_place {
                        *input = &input[need..];
                    }
                    self.head.clear();
                    return Ok(head);
                }
            }
        }
    }
}

/// Decodes the head of a reply, or says how many bytes that takes.
fn decode(bytes: &[u8], in_flight: &mut InFlight, content: &Content) -> Result<Head, BenchError> {
    match u32_at(bytes, 0) {
        NBD_SIMPLE_REPLY_MAGIC if bytes.len() < SIMPLE_REPLY_BYTES => {
            Ok(Head::Needs(SIMPLE_REPLY_BYTES))
        }
        NBD_SIMPLE_REPLY_MAGIC => simple(u32_at(bytes, 4), u64_at(bytes, 8), in_flight),
        NBD_STRUCTURED_REPLY_MAGIC if bytes.len() < STRUCTURED_REPLY_BYTES => {
            Ok(Head::Needs(STRUCTURED_REPLY_BYTES))
        }
        NBD_STRUCTURED_REPLY_MAGIC => structured(bytes, in_flight, content),
        other => Err(BenchError::Protocol(format!(
            "a reply begins with {other:#010x}"
        ))),
    }
}

fn simple(error: u32, cookie: u64, in_flight: &mut InFlight) -> Result<Head, BenchError> {
    if error != 0 {
        return Err(in_flight.refusal(cookie, error));
    }
    let Slot {
        command,
        offset,
        len,
        ..
    } = *in_flight.slot(cookie)?;
    match command {
        Command::Write => Ok(Head::Done { cookie }),
        Command::Read => {
            in_flight.expect_data(cookie, offset, len)?;
            Ok(Head::Data(Data {
                cookie,
                at: offset,
                left: len,
                last: true,
            }))
        }
    }
}

fn structured(
    bytes: &[u8],
    in_flight: &mut InFlight,
    content: &Content,
) -> Result<Head, BenchError> {
    let (flags, kind) = (u16_at(bytes, 4), u16_at(bytes, 6));
    let (cookie, length) = (u64_at(bytes, 8), u32_at(bytes, 16));
    let last = flags & NBD_REPLY_FLAG_DONE != 0;
    let (payload, have) = (STRUCTURED_REPLY_BYTES, bytes.len());
    match kind {
        NBD_REPLY_TYPE_NONE if length == 0 && last => Ok(Head::Done { cookie }),
        NBD_REPLY_TYPE_OFFSET_DATA if length > 8 && have < payload + 8 => {
            Ok(Head::Needs(payload + 8))
        }
        NBD_REPLY_TYPE_OFFSET_DATA if length > 8 => {
            let (at, left) = (u64_at(bytes, payload), length - 8);
            in_flight.expect_data(cookie, at, left)?;
            Ok(Head::Data(Data {
                cookie,
                at,
                left,
                last,
            }))
        }
        NBD_REPLY_TYPE_OFFSET_HOLE if length == 12 && have < payload + 12 => {
            Ok(Head::Needs(payload + 12))
        }
        NBD_REPLY_TYPE_OFFSET_HOLE if length == 12 => {
            let (at, zeroes) = (u64_at(bytes, payload), u32_at(bytes, payload + 8));
            in_flight.expect_data(cookie, at, zeroes)?;
            content.check(at, &vec![0; zeroes as usize])?;
            Ok(if last {
                Head::Done { cookie }
            } else {
                Head::More
            })
        }
        _ if kind & NBD_REPLY_TYPE_FLAG_ERROR != 0 && (6..=MAX_ERROR_CHUNK).contains(&length) => {
            if have < payload + length as usize {
                return Ok(Head::Needs(payload + length as usize));
            }
            Err(in_flight.refusal(cookie, u32_at(bytes, payload)))
        }
        _ => Err(BenchError::Protocol(format!(
            "a chunk of type {kind} with {length} bytes and flags {flags:#x}"
        ))),
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Content {
        Content::Image(
            (0..4096_u32)
                .map(|n| if n < 2048 { (n / 7) as u8 } else { 0 })
                .collect(),
        )
    }

    /// Two reads and a write in flight; their cookies.
    fn three() -> (InFlight, [u64; 3]) {
        let mut in_flight = InFlight::new(4);
        let mut out = Vec::new();
        for (command, offset) in [
            (Command::Read, 0),
            (Command::Read, 1536),
            (Command::Write, 512),
        ] {
            in_flight.begin(command, offset, 1024, Instant::now(), &mut out);
        }
        let cookies = [0, 1, 2].map(|n| u64_at(&out, n * 28 + 8));
        (in_flight, cookies)
    }

    fn data(offset: usize, len: usize) -> Vec<u8> {
        let Content::Image(bytes) = image() else {
            unreachable!()
        };
        bytes[offset..offset + len].to_vec()
    }

    fn simple_reply(cookie: u64, error: u32, data: &[u8]) -> Vec<u8> {
        [
            &NBD_SIMPLE_REPLY_MAGIC.to_be_bytes()[..],
            &error.to_be_bytes(),
            &cookie.to_be_bytes(),
            data,
        ]
        .concat()
    }

    fn chunk(cookie: u64, flags: u16, kind: u16, payload: &[u8]) -> Vec<u8> {
        let length = (payload.len() as u32).to_be_bytes();
        let magic = NBD_STRUCTURED_REPLY_MAGIC.to_be_bytes();
        [
            &magic[..],
            &flags.to_be_bytes(),
            &kind.to_be_bytes(),
            &cookie.to_be_bytes(),
            &length,
            payload,
        ]
        .concat()
    }

    /// Feeds in pieces of `piece` bytes; the offsets of the requests that ended.
    fn feed(bytes: &[u8], piece: usize, in_flight: &mut InFlight) -> Result<Vec<u64>, BenchError> {
        let mut parser = ReplyParser::default();
        let mut ended = Vec::new();
        for piece in bytes.chunks(piece) {
            parser.feed(piece, in_flight, &image(), |finished| {
                ended.push(finished.offset);
            })?;
        }
        Ok(ended)
    }

    #[test]
    fn replies_in_any_order_and_any_pieces() {
        for piece in [1, 3, 16, 17, 28, 500, 1039, 1040, 5000] {
            let (mut in_flight, [a, b, c]) = three();
            let bytes = [
                simple_reply(b, 0, &data(1536, 1024)),
                simple_reply(c, 0, &[]),
                simple_reply(a, 0, &data(0, 1024)),
            ];
            assert_eq!(
                feed(&bytes.concat(), piece, &mut in_flight).unwrap(),
                [1536, 512, 0],
                "pieces of {piece}"
            );
            assert!(in_flight.is_empty());
        }
    }

    #[test]
    fn chunks_and_holes() {
        for piece in [1, 8, 28, 32, 600, 5000] {
            let (mut in_flight, [a, b, c]) = three();
            let at = |offset: u64, data: &[u8]| [&offset.to_be_bytes()[..], data].concat();
            let hole = [&2048_u64.to_be_bytes()[..], &512_u32.to_be_bytes()].concat();
            let bytes = [
                chunk(b, 0, NBD_REPLY_TYPE_OFFSET_HOLE, &hole),
                chunk(
                    a,
                    NBD_REPLY_FLAG_DONE,
                    NBD_REPLY_TYPE_OFFSET_DATA,
                    &at(0, &data(0, 1024)),
                ),
                chunk(
                    b,
                    0,
                    NBD_REPLY_TYPE_OFFSET_DATA,
                    &at(1536, &data(1536, 512)),
                ),
                chunk(c, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_NONE, &[]),
                chunk(b, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_NONE, &[]),
            ];
            assert_eq!(
                feed(&bytes.concat(), piece, &mut in_flight).unwrap(),
                [0, 512, 1536],
                "pieces of {piece}"
            );
        }
    }

    #[test]
    fn what_must_not_be_is_noticed() {
        let wrong = |bytes: &dyn Fn([u64; 3]) -> Vec<u8>| {
            let (mut in_flight, cookies) = three();
            feed(&bytes(cookies), 100, &mut in_flight)
                .unwrap_err()
                .to_string()
        };
        let mut flipped = data(0, 1024);
        flipped[700] ^= 1;
        assert!(
            wrong(&|[a, ..]| simple_reply(a, 0, &flipped))
                .starts_with("wrong data: the byte at 700 ")
        );
        assert!(
            wrong(&|[a, ..]| simple_reply(a, 5, &[]))
                .contains("NBD_CMD_READ of 1024 bytes at 0 with error 5")
        );
        assert!(
            wrong(&|[_, _, c]| [simple_reply(c, 0, &[]), simple_reply(c, 0, &[])].concat())
                .contains("cookie")
        );
        assert!(wrong(&|[a, ..]| chunk(a, 1, NBD_REPLY_TYPE_NONE, &[])).contains("ended after 0"));
        let error = [&28_u32.to_be_bytes()[..], &[0, 0]].concat();
        assert!(
            wrong(&|[_, _, c]| chunk(c, 1, NBD_REPLY_TYPE_FLAG_ERROR + 1, &error))
                .contains("error 28")
        );
        assert!(wrong(&|_| vec![0; 16]).contains("begins with"));
        let outside = [&1000_u64.to_be_bytes()[..], &[0; 512]].concat();
        assert!(
            wrong(&|[a, ..]| chunk(a, 1, NBD_REPLY_TYPE_OFFSET_DATA, &outside))
                .contains("512 bytes for 1000")
        );
    }
}
