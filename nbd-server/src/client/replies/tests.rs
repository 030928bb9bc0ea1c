//! Replies as servers send them, right and wrong, taken apart byte by byte.

use bytes::BufMut;

use super::*;
use crate::nbd::wire::{NBD_CMD_WRITE, NBD_REPLY_TYPE_ERROR};

const DONE: u16 = NBD_REPLY_FLAG_DONE;

fn replies(structured: bool) -> Replies {
    Replies::new(&ExportInfo {
        size: 1 << 20,
        structured_replies: structured,
        base_allocation: structured.then_some(7),
        ..ExportInfo::default()
    })
}

fn simple(cookie: u64, errno: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = NBD_SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.put_u32(errno);
    bytes.put_u64(cookie);
    bytes.put_slice(data);
    bytes
}

fn chunk(cookie: u64, flags: u16, kind: u16, parts: &[&[u8]]) -> Vec<u8> {
    let payload = parts.concat();
    let mut bytes = NBD_STRUCTURED_REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.put_u16(flags);
    bytes.put_u16(kind);
    bytes.put_u64(cookie);
    bytes.put_u32(payload.len() as u32);
    bytes.put_slice(&payload);
    bytes
}

fn data(cookie: u64, flags: u16, offset: u64, data: &[u8]) -> Vec<u8> {
    let parts = [&offset.to_be_bytes()[..], data];
    chunk(cookie, flags, NBD_REPLY_TYPE_OFFSET_DATA, &parts)
}

fn hole(cookie: u64, flags: u16, offset: u64, len: u32) -> Vec<u8> {
    let parts = [&offset.to_be_bytes()[..], &len.to_be_bytes()];
    chunk(cookie, flags, NBD_REPLY_TYPE_OFFSET_HOLE, &parts)
}

fn error(cookie: u64, flags: u16, kind: u16, errno: u32, message: &str, tail: &[u8]) -> Vec<u8> {
    let len = message.len() as u16;
    let parts = [
        &errno.to_be_bytes()[..],
        &len.to_be_bytes(),
        message.as_bytes(),
        tail,
    ];
    chunk(cookie, flags, kind, &parts)
}

fn status(cookie: u64, flags: u16, id: u32, extents: &[(u32, u32)]) -> Vec<u8> {
    let mut payload = id.to_be_bytes().to_vec();
    for (len, state) in extents {
        payload.put_u32(*len);
        payload.put_u32(*state);
    }
    chunk(cookie, flags, NBD_REPLY_TYPE_BLOCK_STATUS, &[&payload])
}

/// The first reply in `bytes`, which come one at a time and must all be used.
fn play(replies: &mut Replies, bytes: &[u8]) -> Result<Owned, ClientError> {
    let mut input = InputBuffer::new();
    for (at, byte) in bytes.iter().enumerate() {
        assert!(replies.bytes_wanted() <= bytes.len().max(20));
        input.read_from(&mut &[*byte][..], 1)?;
        if let Some(taken) = replies.take(&mut input)? {
            assert_eq!(at + 1, bytes.len(), "a reply before its end");
            let reply = taken.view(&input);
            return Ok((reply.cookie, reply.result.map(own)));
        }
    }
    panic!("no reply in {bytes:x?}");
}

type Owned = (u64, Result<Answer<'static>, NbdError>);

fn own(answer: Answer<'_>) -> Answer<'static> {
    match answer {
        Answer::Done => Answer::Done,
        Answer::Data(data) => Answer::Data(Cow::Owned(data.into_owned())),
        Answer::Extents(extents) => Answer::Extents(extents),
    }
}

fn bytes_of(bytes: &[u8]) -> Answer<'static> {
    Answer::Data(Cow::Owned(bytes.to_vec()))
}

fn failed(errno: u32, message: &str) -> Result<Answer<'static>, NbdError> {
    let message = message.to_owned();
    Err(NbdError { errno, message })
}

#[test]
fn simple_replies() {
    let mut replies = replies(false);
    let read = replies.expect(NBD_CMD_READ, 0, 0, 3);
    let write = replies.expect(NBD_CMD_WRITE, 0, 0, 3);
    let failing = replies.expect(NBD_CMD_READ, 0, 0, 3);
    assert_eq!(replies.in_flight(), 3);
    let mut play = |bytes: &[u8]| play(&mut replies, bytes).unwrap();
    assert_eq!(play(&simple(write, 0, b"")), (write, Ok(Answer::Done)));
    assert_eq!(play(&simple(failing, 22, b"")), (failing, failed(22, "")));
    assert_eq!(play(&simple(read, 0, b"abc")), (read, Ok(bytes_of(b"abc"))));
    assert_eq!(replies.in_flight(), 0);
    let reused = replies.expect(NBD_CMD_WRITE, 0, 0, 0);
    assert!(![read, write, failing].contains(&reused));
}

#[test]
fn reads_in_one_and_many_chunks() {
    let mut replies = replies(true);
    let at = 4096;
    let mut cookie = || replies.expect(NBD_CMD_READ, 0, at, 6);
    let whole = cookie();
    let cases = [
        (whole, data(whole, DONE, at, b"abcdef"), &b"abcdef"[..]),
        {
            let c = cookie();
            let parts = [
                data(c, 0, at + 4, b"ef"),
                hole(c, 0, at + 2, 2),
                data(c, DONE, at, b"ab"),
            ];
            (c, parts.concat(), b"ab\0\0ef")
        },
        {
            let c = cookie();
            let none = chunk(c, DONE, NBD_REPLY_TYPE_NONE, &[]);
            (c, [data(c, 0, at, b"abcdef"), none].concat(), b"abcdef")
        },
        {
            let c = cookie();
            (c, hole(c, DONE, at, 6), b"\0\0\0\0\0\0")
        },
    ];
    for (cookie, bytes, expected) in cases {
        let reply = play(&mut replies, &bytes).unwrap();
        assert_eq!(reply, (cookie, Ok(bytes_of(expected))));
    }
    let empty = replies.expect(NBD_CMD_READ, 0, at, 0);
    let none = chunk(empty, DONE, NBD_REPLY_TYPE_NONE, &[]);
    assert_eq!(
        play(&mut replies, &none).unwrap(),
        (empty, Ok(bytes_of(b"")))
    );
}

#[test]
fn chunks_of_two_requests_interleave() {
    let mut replies = replies(true);
    let [a, b] = [0, 100].map(|offset| replies.expect(NBD_CMD_READ, 0, offset, 4));
    let bytes = [
        data(a, 0, 0, b"aa"),
        data(b, 0, 102, b"BB"),
        data(a, DONE, 2, b"AA"),
    ]
    .concat();
    assert_eq!(
        play(&mut replies, &bytes).unwrap(),
        (a, Ok(bytes_of(b"aaAA")))
    );
    let rest = data(b, DONE, 100, b"bb");
    assert_eq!(
        play(&mut replies, &rest).unwrap(),
        (b, Ok(bytes_of(b"bbBB")))
    );
}

#[test]
fn errors_in_chunks_carry_the_first_message() {
    let mut replies = replies(true);
    let read = replies.expect(NBD_CMD_READ, 0, 0, 4);
    let offset = 0u64.to_be_bytes();
    let bytes = [
        data(read, 0, 0, b"abcd"),
        error(read, 0, NBD_REPLY_TYPE_ERROR_OFFSET, 5, "disk", &offset),
        error(read, 0, NBD_REPLY_TYPE_ERROR, 22, "second", b""),
        chunk(read, DONE, NBD_REPLY_TYPE_NONE, &[]),
    ]
    .concat();
    let reply = play(&mut replies, &bytes).unwrap();
    assert_eq!(reply, (read, failed(5, "disk")));
    let write = replies.expect(NBD_CMD_WRITE, 0, 0, 4);
    let unknown = error(write, DONE, 0x8123, 28, "full", b"and more");
    let reply = play(&mut replies, &unknown).unwrap();
    assert_eq!(reply, (write, failed(28, "full")));
    let write = replies.expect(NBD_CMD_WRITE, 0, 0, 4);
    let reply = play(&mut replies, &simple(write, 1, b"")).unwrap();
    assert_eq!(reply, (write, failed(1, "")));
}

#[test]
fn block_status() {
    let mut replies = replies(true);
    let cookie = replies.expect(NBD_CMD_BLOCK_STATUS, 0, 0, 100);
    let bytes = status(cookie, DONE, 7, &[(99, 3), (50, 0)]);
    let extents = vec![Extent { len: 99, flags: 3 }, Extent { len: 50, flags: 0 }];
    assert!(extents[0].is_hole() && extents[0].is_zero() && !extents[1].is_hole());
    let reply = play(&mut replies, &bytes).unwrap();
    assert_eq!(reply, (cookie, Ok(Answer::Extents(extents))));
}

#[test]
fn replies_that_break_the_protocol_are_refused() {
    fn refused(structured: bool, command: u16, flags: u16, reply: impl Fn(u64) -> Vec<u8>) {
        let mut replies = replies(structured);
        let cookie = replies.expect(command, flags, 0, 4);
        let result = play(&mut replies, &reply(cookie));
        assert!(
            matches!(result, Err(ClientError::Protocol(_))),
            "{result:?}"
        );
    }
    const READ: u16 = NBD_CMD_READ;
    const STATUS: u16 = NBD_CMD_BLOCK_STATUS;
    const DF: u16 = NBD_CMD_FLAG_DF;
    refused(false, READ, 0, |c| data(c, DONE, 0, b"abcd"));
    refused(false, READ, 0, |c| simple(c + 1, 0, b"abcd"));
    refused(false, READ, 0, |_| simple(0, 0, b""));
    refused(false, READ, 0, |_| vec![0; 40]);
    refused(true, READ, 0, |c| simple(c, 0, b"abcd"));
    refused(true, READ, 0, |c| simple(c, 22, b""));
    refused(true, READ, 0, |c| data(c, DONE, 0, b"abc"));
    refused(true, READ, 0, |c| data(c, DONE, 0, b"abcde"));
    refused(true, READ, 0, |c| data(c, DONE, 1, b"abcd"));
    refused(true, READ, 0, |c| data(c, DONE, 0, b""));
    refused(true, READ, 0, |c| hole(c, DONE, u64::MAX, 4));
    refused(true, READ, 0, |c| hole(c, DONE, 0, 0));
    refused(true, READ, 0, |c| {
        [hole(c, 0, 0, 3), data(c, DONE, 2, b"xx")].concat()
    });
    refused(true, READ, DF, |c| {
        [hole(c, 0, 0, 2), hole(c, DONE, 2, 2)].concat()
    });
    refused(true, READ, 0, |c| chunk(c, DONE, NBD_REPLY_TYPE_NONE, &[]));
    refused(true, READ, 0, |c| chunk(c, 0, NBD_REPLY_TYPE_NONE, &[]));
    refused(true, READ, 0, |c| {
        chunk(c, DONE, NBD_REPLY_TYPE_NONE, &[b"x"])
    });
    refused(true, READ, 0, |c| chunk(c, DONE, 99, &[b"x"]));
    refused(true, READ, 0, |c| {
        chunk(c, DONE, NBD_REPLY_TYPE_ERROR, &[b"12345"])
    });
    refused(true, READ, 0, |c| {
        error(c, DONE, NBD_REPLY_TYPE_ERROR, 0, "", b"")
    });
    refused(true, READ, 0, |c| {
        let parts: [&[u8]; 2] = [&5u32.to_be_bytes(), &9u16.to_be_bytes()];
        chunk(c, DONE, NBD_REPLY_TYPE_ERROR, &parts)
    });
    refused(true, READ, 0, |c| status(c, DONE, 7, &[(4, 0)]));
    refused(true, NBD_CMD_WRITE, 0, |c| data(c, DONE, 0, b"abcd"));
    refused(true, STATUS, 0, |c| simple(c, 0, b""));
    refused(true, STATUS, 0, |c| {
        chunk(c, DONE, NBD_REPLY_TYPE_NONE, &[])
    });
    refused(true, STATUS, 0, |c| status(c, DONE, 8, &[(4, 0)]));
    refused(true, STATUS, 0, |c| status(c, DONE, 7, &[]));
    refused(true, STATUS, 0, |c| status(c, DONE, 7, &[(0, 0)]));
    refused(true, STATUS, 0, |c| status(c, DONE, 7, &[(4, 0), (4, 0)]));
    refused(true, STATUS, 0, |c| status(c, DONE, 7, &[(2 << 20, 0)]));
    refused(true, STATUS, NBD_CMD_FLAG_REQ_ONE, |c| {
        status(c, DONE, 7, &[(5, 0)])
    });
    refused(true, STATUS, 0, |c| {
        [status(c, 0, 7, &[(4, 0)]), status(c, DONE, 7, &[(4, 0)])].concat()
    });
}

#[test]
fn a_length_on_the_wire_costs_no_memory_before_it_is_checked() {
    let mut replies = replies(true);
    let cookie = replies.expect(NBD_CMD_READ, 0, 0, 4);
    let mut bytes = chunk(cookie, DONE, NBD_REPLY_TYPE_OFFSET_DATA, &[]);
    bytes[16..].copy_from_slice(&u32::MAX.to_be_bytes());
    let refused = play(&mut replies, &bytes);
    assert!(matches!(refused, Err(ClientError::Protocol(_))));
}
