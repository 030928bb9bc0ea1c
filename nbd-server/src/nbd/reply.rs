//! The transmission phase, outgoing side: replies into bytes. The one place
//! that knows which NBD error an outcome becomes.
//!
//! A read is either handed in as the pieces that the engine returned
//! ([`read`]), or its data is appended straight behind a header
//! ([`begin_read`], [`end_read`]), with no copy between the page cache and the
//! bytes to be sent. With structured replies, blocks of zeros travel as holes
//! and errors carry a sentence.

use bytes::Bytes;
use nbdsnap_engine::Failure;

use super::outbox::Outbox;
use super::wire::{
    NBD_EINVAL, NBD_EIO, NBD_ENOSPC, NBD_ENOTSUP, NBD_EPERM, NBD_ESHUTDOWN, NBD_REPLY_FLAG_DONE,
    NBD_REPLY_TYPE_BLOCK_STATUS, NBD_REPLY_TYPE_ERROR, NBD_REPLY_TYPE_NONE,
    NBD_REPLY_TYPE_OFFSET_DATA, NBD_REPLY_TYPE_OFFSET_HOLE, NBD_SIMPLE_REPLY_MAGIC,
    NBD_STRUCTURED_REPLY_MAGIC, SIMPLE_REPLY_BYTES, STRUCTURED_REPLY_BYTES,
};

/// Zeros become a hole at this grain, counted from the export's start.
const HOLE_GRAIN: u64 = 4096;
/// Fewer zeros than this, at the ragged ends of a read, are sent as data.
const HOLE_MIN: usize = 512;
/// Bytes before the data of an OFFSET_DATA chunk: its header and the offset.
const DATA_CHUNK_BYTES: usize = STRUCTURED_REPLY_BYTES + 8;
/// [`begin_read`] appends no more than this.
pub const READ_HEADER_MAX: usize = DATA_CHUNK_BYTES;

/// Why a request is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The export is read-only.
    ReadOnly,
    /// The range ends behind the export, for a command that adds nothing to it.
    PastEnd,
    /// The same for a write: no space is left there.
    WritePastEnd,
    /// More bytes than one request may carry.
    TooLong,
    /// BLOCK_STATUS of no bytes.
    EmptyRange,
    /// BLOCK_STATUS without a negotiated context.
    NoContext,
    /// A command that this server does not know.
    UnknownCommand,
    /// A flag that is unknown, or means nothing here.
    UnknownFlag,
    /// The server is stopping.
    ShuttingDown,
    /// The volume could not do it.
    Failed(Failure),
}

impl Refusal {
    /// The error number on the wire.
    pub fn error(self) -> u32 {
        match self {
            Self::ReadOnly => NBD_EPERM,
            Self::WritePastEnd | Self::Failed(Failure::PastEnd | Failure::NoSpace) => NBD_ENOSPC,
            Self::PastEnd
            | Self::TooLong
            | Self::EmptyRange
            | Self::NoContext
            | Self::UnknownCommand
            | Self::UnknownFlag
            | Self::Failed(Failure::Invalid) => NBD_EINVAL,
            Self::ShuttingDown | Self::Failed(Failure::ShuttingDown) => NBD_ESHUTDOWN,
            Self::Failed(Failure::NotSupported) => NBD_ENOTSUP,
            Self::Failed(Failure::Io | Failure::NoSuchView) => NBD_EIO,
        }
    }

    /// A sentence for people, where the client can show one.
    pub fn message(self) -> &'static str {
        match self {
            Self::ReadOnly => "the export is read-only",
            Self::PastEnd | Self::Failed(Failure::Invalid) => "the range ends behind the export",
            Self::WritePastEnd | Self::Failed(Failure::PastEnd) => {
                "no space: the range ends behind the export"
            }
            Self::TooLong => "a request may carry at most 32 MiB",
            Self::EmptyRange => "the status of no bytes was asked",
            Self::NoContext => "no metadata context was negotiated",
            Self::UnknownCommand => "unknown command",
            Self::UnknownFlag => "unknown command flag",
            Self::ShuttingDown | Self::Failed(Failure::ShuttingDown) => "the server is stopping",
            Self::Failed(Failure::NotSupported) => "zeroing would be no faster than writing",
            Self::Failed(Failure::Io) => {
                "the disk failed, or the snapshot is invalid or full: the server's log says which"
            }
            Self::Failed(Failure::NoSuchView) => "the snapshot is gone",
            Self::Failed(Failure::NoSpace) => {
                "no space: the store of a snapshot is full, and its policy is to refuse"
            }
        }
    }
}

/// What an extent of BLOCK_STATUS says: its length and the context's flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtent {
    /// Bytes, not 0.
    pub len: u32,
    /// Flags of the context.
    pub flags: u32,
}

/// The read that a reply is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadOf {
    /// The request's.
    pub cookie: u64,
    /// Its first byte.
    pub offset: u64,
    /// Its length.
    pub len: u32,
    /// One content chunk only (DF).
    pub one_chunk: bool,
}

/// Success with no data.
pub fn done(outbox: &mut Outbox, cookie: u64) {
    simple_header(outbox.tail(), cookie, 0);
}

/// An error.
pub fn refused(outbox: &mut Outbox, structured: bool, cookie: u64, refusal: Refusal) {
    let out = outbox.tail();
    if !structured {
        simple_header(out, cookie, refusal.error());
        return;
    }
    let message = refusal.message().as_bytes();
    let payload = 6 + message.len();
    chunk_header(
        out,
        NBD_REPLY_FLAG_DONE,
        NBD_REPLY_TYPE_ERROR,
        cookie,
        payload,
    );
    out.extend_from_slice(&refusal.error().to_be_bytes());
    out.extend_from_slice(&(message.len() as u16).to_be_bytes());
    out.extend_from_slice(message);
}

/// The answer to BLOCK_STATUS, in the context with this id.
pub fn block_status(outbox: &mut Outbox, cookie: u64, context: u32, extents: &[StatusExtent]) {
    let out = outbox.tail();
    let payload = 4 + 8 * extents.len();
    chunk_header(
        out,
        NBD_REPLY_FLAG_DONE,
        NBD_REPLY_TYPE_BLOCK_STATUS,
        cookie,
        payload,
    );
    out.extend_from_slice(&context.to_be_bytes());
    for extent in extents {
        out.extend_from_slice(&extent.len.to_be_bytes());
        out.extend_from_slice(&extent.flags.to_be_bytes());
    }
}

/// A read reply that is being filled: where it begins in the outbox's tail.
#[derive(Debug)]
#[must_use]
pub struct OpenRead {
    start: usize,
}

/// Begin the reply to a read: exactly `of.len` bytes of data are then appended
/// to the outbox's tail, and [`end_read`] or [`abandon_read`] follows.
pub fn begin_read(outbox: &mut Outbox, structured: bool, of: &ReadOf) -> OpenRead {
    let out = outbox.tail();
    let start = out.len();
    if !structured {
        simple_header(out, of.cookie, 0);
    } else if of.len == 0 {
        chunk_header(out, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_NONE, of.cookie, 0);
    } else {
        data_chunk_header(
            out,
            NBD_REPLY_FLAG_DONE,
            of.cookie,
            of.offset,
            of.len as usize,
        );
    }
    OpenRead { start }
}

/// All data is there.
pub fn end_read(outbox: &mut Outbox, structured: bool, of: &ReadOf, open: &OpenRead) {
    let header = if structured {
        DATA_CHUNK_BYTES
    } else {
        SIMPLE_REPLY_BYTES
    };
    let data_start = open.start + header;
    let out = outbox.tail();
    if !structured || of.len == 0 {
        return;
    }
    assert_eq!(
        out.len(),
        data_start + of.len as usize,
        "a read reply is whole"
    );
    if of.one_chunk || !has_hole(&out[data_start..], of.offset) {
        return;
    }
    let data = Bytes::copy_from_slice(&out[data_start..]);
    out.truncate(open.start);
    read_chunks(outbox, of, &[data]);
}

/// The data could not be had: take the begun reply back.
pub fn abandon_read(outbox: &mut Outbox, open: &OpenRead) {
    outbox.tail().truncate(open.start);
}

/// The reply to a read from the pieces of its data, `of.len` bytes together.
pub fn read(outbox: &mut Outbox, structured: bool, of: &ReadOf, pieces: Vec<Bytes>) {
    let len: usize = pieces.iter().map(Bytes::len).sum();
    assert_eq!(len, of.len as usize, "a read reply is whole");
    if structured && !of.one_chunk && len > 0 {
        read_chunks(outbox, of, &pieces);
        return;
    }
    let _whole = begin_read(outbox, structured, of);
    for piece in pieces {
        outbox.push(piece);
    }
}

/// Data and holes, each in its chunk.
fn read_chunks(outbox: &mut Outbox, of: &ReadOf, pieces: &[Bytes]) {
    let end = of.offset + u64::from(of.len);
    let mut at = of.offset;
    for piece in pieces {
        let mut rest = piece.clone();
        for run in runs(piece, at) {
            let data = rest.split_to(run.len);
            let last = at + run.len as u64 == end;
            let flags = if last { NBD_REPLY_FLAG_DONE } else { 0 };
            if run.is_hole {
                let out = outbox.tail();
                chunk_header(out, flags, NBD_REPLY_TYPE_OFFSET_HOLE, of.cookie, 12);
                out.extend_from_slice(&at.to_be_bytes());
                out.extend_from_slice(&(run.len as u32).to_be_bytes());
            } else {
                data_chunk_header(outbox.tail(), flags, of.cookie, at, run.len);
                outbox.push(data);
            }
            at += run.len as u64;
        }
    }
}

/// Bytes in a row that are all data or all hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    len: usize,
    is_hole: bool,
}

/// Divide data that begins at `offset` of the export into runs.
fn runs(data: &[u8], offset: u64) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for block in blocks(data, offset) {
        let is_hole = is_hole(block);
        match runs.last_mut() {
            Some(run) if run.is_hole == is_hole => run.len += block.len(),
            _ => runs.push(Run {
                len: block.len(),
                is_hole,
            }),
        }
    }
    runs
}

fn has_hole(data: &[u8], offset: u64) -> bool {
    blocks(data, offset).any(is_hole)
}

/// The data in blocks that end at multiples of [`HOLE_GRAIN`].
fn blocks(data: &[u8], offset: u64) -> impl Iterator<Item = &[u8]> {
    let ragged = (offset.next_multiple_of(HOLE_GRAIN) - offset) as usize;
    let (head, rest) = data.split_at(ragged.min(data.len()));
    let head = (!head.is_empty()).then_some(head);
    head.into_iter().chain(rest.chunks(HOLE_GRAIN as usize))
}

fn is_hole(block: &[u8]) -> bool {
    block.len() >= HOLE_MIN && is_zero(block)
}

/// Data mostly differs from zero at once: look at its first bytes first.
fn is_zero(block: &[u8]) -> bool {
    let (words, rest) = block.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

fn simple_header(out: &mut Vec<u8>, cookie: u64, error: u32) {
    let mut header = [0; SIMPLE_REPLY_BYTES];
    header[0..4].copy_from_slice(&NBD_SIMPLE_REPLY_MAGIC.to_be_bytes());
    header[4..8].copy_from_slice(&error.to_be_bytes());
    header[8..16].copy_from_slice(&cookie.to_be_bytes());
    out.extend_from_slice(&header);
}

fn chunk_header(out: &mut Vec<u8>, flags: u16, kind: u16, cookie: u64, payload: usize) {
    let mut header = [0; STRUCTURED_REPLY_BYTES];
    header[0..4].copy_from_slice(&NBD_STRUCTURED_REPLY_MAGIC.to_be_bytes());
    header[4..6].copy_from_slice(&flags.to_be_bytes());
    header[6..8].copy_from_slice(&kind.to_be_bytes());
    header[8..16].copy_from_slice(&cookie.to_be_bytes());
    header[16..20].copy_from_slice(&(payload as u32).to_be_bytes());
    out.extend_from_slice(&header);
}

fn data_chunk_header(out: &mut Vec<u8>, flags: u16, cookie: u64, offset: u64, len: usize) {
    chunk_header(out, flags, NBD_REPLY_TYPE_OFFSET_DATA, cookie, 8 + len);
    out.extend_from_slice(&offset.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;

    use super::*;

    const COOKIE: u64 = 0x0102_0304_0506_0708;

    fn sent(outbox: &Outbox) -> Vec<u8> {
        let mut slices = [IoSlice::new(&[]); 64];
        let used = outbox.slices(&mut slices);
        slices[..used].iter().flat_map(|s| s.to_vec()).collect()
    }

    fn of(offset: u64, len: u32) -> ReadOf {
        ReadOf {
            cookie: COOKIE,
            offset,
            len,
            one_chunk: false,
        }
    }

    /// Decode chunks: (flags, type, payload).
    fn chunks(mut wire: &[u8]) -> Vec<(u16, u16, Vec<u8>)> {
        let mut found = Vec::new();
        while !wire.is_empty() {
            assert_eq!(wire[0..4], NBD_STRUCTURED_REPLY_MAGIC.to_be_bytes());
            assert_eq!(wire[8..16], COOKIE.to_be_bytes());
            let flags = u16::from_be_bytes([wire[4], wire[5]]);
            let kind = u16::from_be_bytes([wire[6], wire[7]]);
            let len = u32::from_be_bytes(wire[16..20].try_into().unwrap()) as usize;
            found.push((flags, kind, wire[20..20 + len].to_vec()));
            wire = &wire[20 + len..];
        }
        found
    }

    /// Rebuild a read's data from its chunks, checking that they cover it once.
    fn rebuilt(wire: &[u8], offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0xee; len];
        let mut covered = 0;
        let all = chunks(wire);
        for (i, (flags, kind, payload)) in all.iter().enumerate() {
            assert_eq!(
                *flags,
                if i + 1 == all.len() {
                    NBD_REPLY_FLAG_DONE
                } else {
                    0
                }
            );
            let at = (u64::from_be_bytes(payload[0..8].try_into().unwrap()) - offset) as usize;
            let content = match *kind {
                NBD_REPLY_TYPE_OFFSET_DATA => payload[8..].to_vec(),
                NBD_REPLY_TYPE_OFFSET_HOLE => {
                    vec![0; u32::from_be_bytes(payload[8..12].try_into().unwrap()) as usize]
                }
                other => panic!("chunk type {other}"),
            };
            data[at..at + content.len()].copy_from_slice(&content);
            covered += content.len();
        }
        assert_eq!(covered, len);
        data
    }

    #[test]
    fn simple_replies_to_the_byte() {
        let mut outbox = Outbox::default();
        done(&mut outbox, COOKIE);
        refused(&mut outbox, false, COOKIE, Refusal::WritePastEnd);
        read(
            &mut outbox,
            false,
            &of(0, 3),
            vec![Bytes::from_static(b"ab"), Bytes::from_static(b"c")],
        );
        let expected = b"\x67\x44\x66\x98\0\0\0\0\x01\x02\x03\x04\x05\x06\x07\x08\
            \x67\x44\x66\x98\0\0\0\x1c\x01\x02\x03\x04\x05\x06\x07\x08\
            \x67\x44\x66\x98\0\0\0\0\x01\x02\x03\x04\x05\x06\x07\x08abc";
        assert_eq!(sent(&outbox), expected);
    }

    #[test]
    fn a_structured_error_carries_its_sentence() {
        let mut outbox = Outbox::default();
        refused(&mut outbox, true, COOKIE, Refusal::ReadOnly);
        let all = chunks(&sent(&outbox));
        assert_eq!(all.len(), 1);
        let (flags, kind, payload) = &all[0];
        assert_eq!((*flags, *kind), (NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_ERROR));
        assert_eq!(payload[..6], [0, 0, 0, 1, 0, 23]);
        assert_eq!(&payload[6..], b"the export is read-only");
    }

    #[test]
    fn block_status_to_the_byte() {
        let mut outbox = Outbox::default();
        let extents = [
            StatusExtent {
                len: 4096,
                flags: 0,
            },
            StatusExtent { len: 512, flags: 3 },
        ];
        block_status(&mut outbox, COOKIE, 7, &extents);
        let payload = vec![0, 0, 0, 7, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 3];
        let expected = vec![(NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_BLOCK_STATUS, payload)];
        assert_eq!(chunks(&sent(&outbox)), expected);
    }

    #[test]
    fn zeros_travel_as_holes_and_nothing_is_lost() {
        let mut data = vec![0u8; 80_000];
        data[10_000..20_000].fill(3);
        data[50_000] = 1;
        data[79_999] = 1;
        for (offset, len) in [
            (0, 80_000),
            (4096, 70_000),
            (1000, 79_000),
            (1, 5000),
            (4095, 2),
            (3, 1),
        ] {
            let expected = &data[..len];
            for pieces in [1, 2, 7] {
                let mut outbox = Outbox::default();
                let pieces = expected
                    .chunks(len.div_ceil(pieces))
                    .map(Bytes::copy_from_slice)
                    .collect();
                read(&mut outbox, true, &of(offset, len as u32), pieces);
                assert_eq!(rebuilt(&sent(&outbox), offset, len), expected);
            }
            let mut outbox = Outbox::default();
            let open = begin_read(&mut outbox, true, &of(offset, len as u32));
            outbox.tail().extend_from_slice(expected);
            end_read(&mut outbox, true, &of(offset, len as u32), &open);
            let wire = sent(&outbox);
            assert_eq!(rebuilt(&wire, offset, len), expected);
            assert!(len < 8192 || wire.len() < len, "holes save bytes");
        }
    }

    #[test]
    fn df_is_one_chunk_and_an_empty_read_is_none() {
        let mut outbox = Outbox::default();
        let mut one = of(0, 16384);
        one.one_chunk = true;
        let halves = vec![Bytes::from(vec![0; 8192]), Bytes::from(vec![1; 8192])];
        read(&mut outbox, true, &one, halves);
        assert_eq!(chunks(&sent(&outbox)).len(), 1);

        let mut outbox = Outbox::default();
        read(&mut outbox, true, &of(5, 0), Vec::new());
        let expected = vec![(NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_NONE, Vec::new())];
        assert_eq!(chunks(&sent(&outbox)), expected);
    }

    #[test]
    fn an_abandoned_read_leaves_nothing() {
        let mut outbox = Outbox::default();
        done(&mut outbox, 1);
        let before = sent(&outbox);
        let open = begin_read(&mut outbox, true, &of(0, 10));
        outbox.tail().extend_from_slice(b"abc");
        abandon_read(&mut outbox, &open);
        assert_eq!(sent(&outbox), before);
    }
}
