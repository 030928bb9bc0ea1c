//! Requests from bytes: in pieces of any size, in order and out of it.

use proptest::prelude::*;

use super::*;

const TERMS: Terms = Terms {
    export_bytes: 1 << 30,
    read_only: false,
    structured: true,
    base_allocation: Some(1),
};

fn request(command: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = NBD_REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

fn write_request(cookie: u64, offset: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = request(NBD_CMD_WRITE, 0, cookie, offset, data.len() as u32);
    bytes.extend(data);
    bytes
}

/// Everything that comes out when the bytes arrive in pieces of `step`, as text.
fn outcome(terms: Terms, wire: &[u8], step: usize) -> Vec<String> {
    let mut transmission = Transmission::new(terms, &[]);
    let mut out = Vec::new();
    let mut rest = wire;
    loop {
        loop {
            match transmission.poll() {
                Ok(Some(item)) => out.push(format!("{item:?}")),
                Ok(None) => break,
                Err(broken) => {
                    out.push(broken.to_string());
                    return out;
                }
            }
        }
        if rest.is_empty() {
            return out;
        }
        let (room, most) = transmission.room();
        assert!(most > 0, "no room for the rest of a request");
        let now = rest.len().min(step).min(most);
        room.extend_from_slice(&rest[..now]);
        transmission.received(now);
        rest = &rest[now..];
    }
}

fn refusal(terms: Terms, wire: &[u8]) -> Refusal {
    let mut transmission = Transmission::new(terms, wire);
    match transmission.poll() {
        Ok(Some(Item::Refused { cookie: 9, refusal })) => refusal,
        other => panic!("{other:?}"),
    }
}

fn call(terms: Terms, wire: &[u8]) -> Call {
    let mut transmission = Transmission::new(terms, wire);
    match transmission.poll() {
        Ok(Some(Item::Call { cookie: 9, call })) => call,
        other => panic!("{other:?}"),
    }
}

fn sample_wire() -> Vec<u8> {
    let mut wire = request(NBD_CMD_READ, 0, 1, 4096, 4096);
    wire.extend(write_request(2, 0, b"hello"));
    wire.extend(request(NBD_CMD_FLUSH, NBD_CMD_FLAG_FUA, 3, 0, 0));
    wire.extend(write_request(4, 100, &vec![5; 100_000]));
    wire.extend(request(NBD_CMD_TRIM, NBD_CMD_FLAG_DF, 5, 0, 512));
    wire.extend(write_request(6, 1 << 30, &vec![6; 70_000]));
    wire.extend(request(
        NBD_CMD_BLOCK_STATUS,
        NBD_CMD_FLAG_REQ_ONE,
        7,
        0,
        1 << 29,
    ));
    wire.extend(request(77, 0, 8, 0, 0));
    wire.extend(request(NBD_CMD_DISC, 0, 9, 0, 0));
    wire.extend(request(NBD_CMD_READ, 0, 10, 0, 1));
    wire
}

#[test]
fn byte_by_byte_is_all_at_once() {
    let wire = sample_wire();
    let all = outcome(TERMS, &wire, wire.len());
    assert_eq!(all.len(), 9);
    assert_eq!(all[8], "Disconnect");
    for step in [1, 7, 28, 29, 4096] {
        assert_eq!(outcome(TERMS, &wire, step), all, "in steps of {step}");
    }
}

#[test]
fn the_range_is_checked() {
    let end = TERMS.export_bytes;
    let read = |offset, len| request(NBD_CMD_READ, 0, 9, offset, len);
    assert!(matches!(
        call(TERMS, &read(end - 1, 1)),
        Call::Read { len: 1, .. }
    ));
    assert!(matches!(
        call(TERMS, &read(end, 0)),
        Call::Read { len: 0, .. }
    ));
    assert_eq!(refusal(TERMS, &read(end, 1)), Refusal::PastEnd);
    assert_eq!(refusal(TERMS, &read(u64::MAX, 2)), Refusal::PastEnd);
    assert_eq!(refusal(TERMS, &read(0, (32 << 20) + 1)), Refusal::TooLong);
    assert_eq!(
        refusal(TERMS, &write_request(9, end - 1, b"ab")),
        Refusal::WritePastEnd
    );
    let zero = request(NBD_CMD_WRITE_ZEROES, 0, 9, end - 1, 2);
    assert_eq!(refusal(TERMS, &zero), Refusal::WritePastEnd);
    let trim = request(NBD_CMD_TRIM, 0, 9, end - 1, 2);
    assert_eq!(refusal(TERMS, &trim), Refusal::PastEnd);
    let status = request(NBD_CMD_BLOCK_STATUS, 0, 9, 0, 0);
    assert_eq!(refusal(TERMS, &status), Refusal::EmptyRange);
}

#[test]
fn a_read_only_export_refuses_what_writes_and_flushes_nothing() {
    let terms = Terms {
        read_only: true,
        ..TERMS
    };
    for command in [NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES] {
        assert_eq!(
            refusal(terms, &request(command, 0, 9, 0, 512)),
            Refusal::ReadOnly
        );
    }
    assert_eq!(
        refusal(terms, &write_request(9, 0, b"x")),
        Refusal::ReadOnly
    );
    let flush = request(NBD_CMD_FLUSH, 0, 9, 0, 0);
    assert!(matches!(call(terms, &flush), Call::Nothing));
}

#[test]
fn empty_requests_succeed_and_their_fua_flushes() {
    assert!(matches!(
        call(TERMS, &write_request(9, 0, b"")),
        Call::Nothing
    ));
    let trim = request(NBD_CMD_TRIM, NBD_CMD_FLAG_FUA, 9, 0, 0);
    assert!(matches!(call(TERMS, &trim), Call::Command(Command::Flush)));
}

#[test]
fn an_oversized_write_is_drained_and_refused() {
    let mut wire = write_request(9, 0, &vec![1; (33 << 20) + 1]);
    wire.extend(request(NBD_CMD_FLUSH, 0, 10, 0, 0));
    let out = outcome(TERMS, &wire, 1 << 20);
    assert_eq!(out.len(), 2);
    assert!(
        out[0].contains("TooLong") && out[1].contains("Flush"),
        "{out:?}"
    );
    let endless = request(NBD_CMD_WRITE, 0, 9, 0, u32::MAX);
    assert!(outcome(TERMS, &endless, 28)[0].contains("4294967295"));
}

#[test]
fn without_negotiation_its_flags_and_commands_are_refused() {
    let terms = Terms {
        structured: false,
        base_allocation: None,
        ..TERMS
    };
    let df = request(NBD_CMD_READ, NBD_CMD_FLAG_DF, 9, 0, 1);
    assert_eq!(refusal(terms, &df), Refusal::UnknownFlag);
    let status = request(NBD_CMD_BLOCK_STATUS, 0, 9, 0, 1);
    assert_eq!(refusal(terms, &status), Refusal::NoContext);
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(wire in proptest::collection::vec(any::<u8>(), 0..500), step in 1..100usize) {
        outcome(TERMS, &wire, step);
    }

    #[test]
    fn arbitrary_requests_never_panic(
        requests in proptest::collection::vec(
            (0..10u16, any::<u16>(), any::<u64>(), any::<u64>(), any::<u32>()), 0..20),
        step in 1..100usize,
    ) {
        let mut wire = Vec::new();
        for (command, flags, cookie, offset, len) in requests {
            wire.extend(request(command, flags & 0x1f, cookie, offset & 0x7fff_ffff, len >> 12));
        }
        let all = outcome(TERMS, &wire, wire.len().max(1));
        prop_assert_eq!(outcome(TERMS, &wire, step), all);
    }
}
