//! Handshakes byte by byte, option by option, and with arbitrary bytes.

use std::sync::Arc;

use bytes::{Buf, BufMut, BytesMut};
use proptest::prelude::*;

use super::*;
use crate::nbd::export::{BlockSize, Export, transmission_flags};
use crate::nbd::wire::*;

mod meta_contexts;

const BOTH_FLAGS: u32 = NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES;

fn catalog() -> Arc<Catalog> {
    let export = |name: &str, description: &str, size, read_only, chunk| Export {
        name: name.into(),
        description: description.into(),
        size,
        flags: transmission_flags(read_only, false),
        block_size: BlockSize::for_chunk(chunk),
    };
    let exports = vec![
        export("disk", "origin", 1 << 30, false, 4096),
        export("disk@mon", "snapshot of disk", 1 << 20, true, 65536),
    ];
    Arc::new(Catalog::new(exports, Some(0)).unwrap())
}

/// A handshake that has got as far as the options, and what was sent since.
struct Peer {
    negotiation: Negotiation,
    input: BytesMut,
}

#[derive(Debug, PartialEq, Eq)]
struct OptionReply {
    option: u32,
    kind: u32,
    data: Vec<u8>,
}

impl Peer {
    fn new(client_flags: u32) -> Self {
        let mut negotiation = Negotiation::new(catalog());
        let greeting = negotiation.poll_output().unwrap();
        assert_eq!(&greeting[..], b"NBDMAGICIHAVEOPT\0\x03");
        let mut input = BytesMut::from(&client_flags.to_be_bytes()[..]);
        assert_eq!(negotiation.handle_input(&mut input), Ok(Step::NeedMore));
        assert_eq!(negotiation.poll_output(), None);
        Self { negotiation, input }
    }

    fn send(&mut self, option: u32, data: &[u8]) -> Result<Step, Refusal> {
        self.input.extend_from_slice(&option_bytes(option, data));
        self.negotiation.handle_input(&mut self.input)
    }

    /// Sends an option after which the handshake goes on; its replies.
    fn ask(&mut self, option: u32, data: &[u8]) -> Vec<OptionReply> {
        assert_eq!(self.send(option, data), Ok(Step::NeedMore));
        self.replies()
    }

    /// As [`Self::ask`], where one reply without interest in its text is expected.
    fn ask_kind(&mut self, option: u32, data: &[u8]) -> u32 {
        let replies = self.ask(option, data);
        assert_eq!(replies.len(), 1, "{replies:?}");
        replies[0].kind
    }

    fn replies(&mut self) -> Vec<OptionReply> {
        let mut output = self.negotiation.poll_output().unwrap_or_default();
        let mut replies = Vec::new();
        while !output.is_empty() {
            assert_eq!(output.get_u64(), NBD_OPTION_REPLY_MAGIC);
            let (option, kind) = (output.get_u32(), output.get_u32());
            let len = output.get_u32() as usize;
            let data = output.split_to(len).to_vec();
            replies.push(OptionReply { option, kind, data });
        }
        replies
    }

    fn go(&mut self, name: &str) -> Agreed {
        match self.send(NBD_OPT_GO, &info(name, &[])) {
            Ok(Step::Done(agreed)) => agreed,
            other => panic!("GO ended with {other:?}"),
        }
    }
}

fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.put_u64(NBD_OPTION_MAGIC);
    bytes.put_u32(option);
    bytes.put_u32(data.len() as u32);
    bytes.put_slice(data);
    bytes
}

fn string(text: &[u8]) -> Vec<u8> {
    let mut bytes = (text.len() as u32).to_be_bytes().to_vec();
    bytes.put_slice(text);
    bytes
}

fn info(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut bytes = string(name.as_bytes());
    bytes.put_u16(infos.len() as u16);
    for info in infos {
        bytes.put_u16(*info);
    }
    bytes
}

fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut bytes = string(name.as_bytes());
    bytes.put_u32(queries.len() as u32);
    for query in queries {
        bytes.put_slice(&string(query.as_bytes()));
    }
    bytes
}

fn structured_peer() -> Peer {
    let mut peer = Peer::new(BOTH_FLAGS);
    assert_eq!(peer.ask_kind(NBD_OPT_STRUCTURED_REPLY, b""), NBD_REP_ACK);
    peer
}

#[test]
fn unknown_client_flags_drop_the_client() {
    for flags in [4u32, 1 << 31, BOTH_FLAGS | 8] {
        let mut negotiation = Negotiation::new(catalog());
        let mut input = BytesMut::from(&flags.to_be_bytes()[..]);
        assert_eq!(
            negotiation.handle_input(&mut input),
            Err(Refusal::UnknownClientFlags(flags))
        );
    }
}

#[test]
fn export_name_begins_transmission_with_and_without_zeroes() {
    for (client_flags, zeroes) in [(0, 124), (1, 124), (2, 0), (3, 0)] {
        let mut peer = Peer::new(client_flags);
        let step = peer.send(NBD_OPT_EXPORT_NAME, b"disk@mon").unwrap();
        let flags = transmission_flags(true, false);
        assert_eq!(
            step,
            Step::Done(Agreed {
                export: 1,
                flags,
                structured_replies: false,
                base_allocation: None
            })
        );
        let mut output = peer.negotiation.poll_output().unwrap();
        assert_eq!((output.get_u64(), output.get_u16()), (1 << 20, flags));
        assert_eq!(output, vec![0; zeroes]);
    }
}

#[test]
fn export_name_that_cannot_be_granted_drops_the_client() {
    let refused = |name: &[u8]| Peer::new(BOTH_FLAGS).send(NBD_OPT_EXPORT_NAME, name);
    assert_eq!(refused(b"nope"), Err(Refusal::UnknownExport("nope".into())));
    for name in [&[b'x'; 4097][..], &vec![b'x'; 70_000], b"\xff"] {
        assert!(matches!(refused(name), Err(Refusal::ExportName(_))));
    }
    assert!(matches!(
        refused(&[b'x'; 4096]),
        Err(Refusal::UnknownExport(_))
    ));
}

#[test]
fn the_default_export_answers_to_the_empty_name() {
    assert_eq!(Peer::new(BOTH_FLAGS).go("").export, 0);
    let step = Peer::new(BOTH_FLAGS).send(NBD_OPT_EXPORT_NAME, b"");
    assert!(matches!(step, Ok(Step::Done(Agreed { export: 0, .. }))));
    let nothing = Arc::new(Catalog::new(Vec::new(), None).unwrap());
    let mut negotiation = Negotiation::new(nothing);
    negotiation.poll_output();
    let mut input = BytesMut::from(&BOTH_FLAGS.to_be_bytes()[..]);
    input.extend_from_slice(&option_bytes(NBD_OPT_GO, &info("", &[])));
    assert_eq!(negotiation.handle_input(&mut input), Ok(Step::NeedMore));
    let reply = negotiation.poll_output().unwrap();
    assert_eq!(reply[12..16], NBD_REP_ERR_UNKNOWN.to_be_bytes());
}

#[test]
fn abort_is_acknowledged_whatever_its_data() {
    for len in [0, 1, 100, MAX_OPTION_BYTES + 1] {
        let mut peer = Peer::new(BOTH_FLAGS);
        assert_eq!(peer.send(NBD_OPT_ABORT, &vec![7; len]), Ok(Step::Ended));
        let ack = OptionReply {
            option: NBD_OPT_ABORT,
            kind: NBD_REP_ACK,
            data: Vec::new(),
        };
        assert_eq!(peer.replies(), [ack]);
    }
}

#[test]
fn list_names_every_export_with_its_description() {
    let mut peer = Peer::new(BOTH_FLAGS);
    let replies = peer.ask(NBD_OPT_LIST, b"");
    let entries: Vec<_> = replies
        .iter()
        .map(|reply| (reply.kind, reply.data.clone()))
        .collect();
    assert_eq!(
        entries,
        [
            (NBD_REP_SERVER, [&string(b"disk")[..], b"origin"].concat()),
            (
                NBD_REP_SERVER,
                [&string(b"disk@mon")[..], b"snapshot of disk"].concat()
            ),
            (NBD_REP_ACK, Vec::new()),
        ]
    );
    assert_eq!(peer.ask_kind(NBD_OPT_LIST, b"x"), NBD_REP_ERR_INVALID);
}

#[test]
fn unknown_options_and_tls_are_unsupported_and_the_handshake_goes_on() {
    let mut peer = Peer::new(BOTH_FLAGS);
    let options = [
        0,
        NBD_OPT_PEEK_EXPORT,
        NBD_OPT_STARTTLS,
        NBD_OPT_EXTENDED_HEADERS,
        12,
        u32::MAX,
    ];
    for option in options {
        assert_eq!(peer.ask_kind(option, b"whatever"), NBD_REP_ERR_UNSUP);
        let long = vec![0; MAX_OPTION_BYTES + 1];
        assert_eq!(peer.ask_kind(option, &long), NBD_REP_ERR_UNSUP);
    }
    assert_eq!(peer.go("disk").export, 0);
}

#[test]
fn info_sends_what_was_asked_and_the_sizes_unasked() {
    let mut peer = Peer::new(BOTH_FLAGS);
    let flags = transmission_flags(true, false);
    let export = [
        &NBD_INFO_EXPORT.to_be_bytes()[..],
        &(1u64 << 20).to_be_bytes(),
        &flags.to_be_bytes(),
    ]
    .concat();
    let sizes = [
        &NBD_INFO_BLOCK_SIZE.to_be_bytes()[..],
        &1u32.to_be_bytes(),
        &65536u32.to_be_bytes(),
        &(32u32 << 20).to_be_bytes(),
    ]
    .concat();
    let name = b"\0\x01disk@mon".to_vec();
    let description = b"\0\x02snapshot of disk".to_vec();
    let info_of = |peer: &mut Peer, infos: &[u16]| -> Vec<Vec<u8>> {
        let mut replies = peer.ask(NBD_OPT_INFO, &info("disk@mon", infos));
        assert_eq!(replies.pop().unwrap().kind, NBD_REP_ACK);
        assert!(replies.iter().all(|reply| reply.kind == NBD_REP_INFO));
        replies.into_iter().map(|reply| reply.data).collect()
    };
    let plain = [export.clone(), sizes.clone()];
    assert_eq!(info_of(&mut peer, &[]), plain);
    assert_eq!(info_of(&mut peer, &[0, 3, 77, 0]), plain);
    let full = [export, name, description, sizes];
    assert_eq!(info_of(&mut peer, &[3, 2, 1, 1]), full);
    // INFO does not begin transmission; GO does, with the same answers.
    let go = peer.send(NBD_OPT_GO, &info("disk@mon", &[3, 2, 1, 1]));
    assert!(matches!(go, Ok(Step::Done(Agreed { export: 1, .. }))));
    let replies = peer.replies();
    let data: Vec<_> = replies.iter().map(|reply| &reply.data[..]).collect();
    assert_eq!(data[..4], full);
    assert_eq!(replies[4].kind, NBD_REP_ACK);
}

#[test]
fn info_and_go_with_wrong_lengths_are_invalid_and_the_handshake_goes_on() {
    let mut over = info("disk", &[]);
    over[..4].copy_from_slice(&5u32.to_be_bytes());
    let mut far_over = info("disk", &[]);
    far_over[..4].copy_from_slice(&u32::MAX.to_be_bytes());
    let mut count_over = info("disk", &[3]);
    count_over[8..10].copy_from_slice(&2u16.to_be_bytes());
    let mut trailing = info("disk", &[3]);
    trailing.push(0);
    let mut not_text = string(b"\xff\xfe");
    not_text.put_u16(0);
    for option in [NBD_OPT_INFO, NBD_OPT_GO] {
        let mut peer = Peer::new(BOTH_FLAGS);
        let cases = [
            &b""[..],
            b"\0",
            b"\0\0\0\0",
            b"\0\0\0\0\0",
            &over,
            &far_over,
            &count_over,
            &trailing,
            &not_text,
            &info("a\0b", &[]),
        ];
        for data in cases {
            assert_eq!(peer.ask_kind(option, data), NBD_REP_ERR_INVALID, "{data:?}");
        }
        for (len, kind) in [
            (4096, NBD_REP_ERR_UNKNOWN),
            (4097, NBD_REP_ERR_TOO_BIG),
            (MAX_OPTION_BYTES, NBD_REP_ERR_TOO_BIG),
        ] {
            let data = info(&"n".repeat(len), &[]);
            assert_eq!(peer.ask_kind(option, &data), kind, "{len}");
        }
        assert_eq!(
            peer.ask_kind(option, &info("nope", &[])),
            NBD_REP_ERR_UNKNOWN
        );
        assert_eq!(peer.go("disk").export, 0);
    }
}

#[test]
fn structured_replies_bring_df() {
    let mut peer = Peer::new(BOTH_FLAGS);
    let invalid = peer.ask_kind(NBD_OPT_STRUCTURED_REPLY, b"x");
    assert_eq!(invalid, NBD_REP_ERR_INVALID);
    assert_eq!(peer.ask_kind(NBD_OPT_STRUCTURED_REPLY, b""), NBD_REP_ACK);
    let agreed = peer.go("disk");
    assert!(agreed.structured_replies);
    assert_eq!(agreed.base_allocation, None);
    let plain = transmission_flags(false, false);
    assert_eq!(agreed.flags, plain | NBD_FLAG_SEND_DF);
    let data = &peer.replies()[0].data;
    assert_eq!(data[10..12], agreed.flags.to_be_bytes());
    assert_eq!(Peer::new(BOTH_FLAGS).go("disk").flags, plain);
}

#[test]
fn a_client_that_lists_two_thousand_times_is_dropped_after_its_bound() {
    let mut peer = Peer::new(BOTH_FLAGS);
    for _ in 0..2000 {
        peer.input
            .extend_from_slice(&option_bytes(NBD_OPT_LIST, b""));
    }
    let mut acks = 0;
    let refusal = loop {
        let step = peer.negotiation.handle_input(&mut peer.input);
        acks += peer
            .replies()
            .iter()
            .filter(|r| r.kind == NBD_REP_ACK)
            .count();
        match step {
            Ok(Step::SendFirst) => {}
            Ok(other) => panic!("{other:?}"),
            Err(refusal) => break refusal,
        }
    };
    assert_eq!((refusal, acks), (Refusal::TooManyOptions, 64));
}

#[test]
fn output_is_sent_before_more_is_made() {
    let exports = (0..100).map(|n| Export {
        name: format!("disk{n}"),
        description: "d".repeat(1000),
        ..catalog().exports()[0].clone()
    });
    let catalog = Arc::new(Catalog::new(exports.collect(), None).unwrap());
    let mut negotiation = Negotiation::new(catalog);
    let mut input = BytesMut::from(&BOTH_FLAGS.to_be_bytes()[..]);
    input.extend_from_slice(&option_bytes(NBD_OPT_LIST, b"").repeat(3));
    for _ in 0..3 {
        assert_eq!(negotiation.handle_input(&mut input), Ok(Step::SendFirst));
        assert!(negotiation.poll_output().unwrap().len() < 2 * SEND_FIRST_BYTES);
    }
    assert_eq!(negotiation.handle_input(&mut input), Ok(Step::NeedMore));
    assert_eq!(negotiation.poll_output(), None);
}

#[test]
fn options_beyond_any_use_or_out_of_step_drop_the_client() {
    let mut peer = Peer::new(BOTH_FLAGS);
    let mut header = option_bytes(NBD_OPT_LIST, b"");
    header[12..].copy_from_slice(&(MAX_SKIPPED_BYTES + 1).to_be_bytes());
    peer.input.extend_from_slice(&header);
    assert_eq!(
        peer.negotiation.handle_input(&mut peer.input),
        Err(Refusal::OptionTooLong {
            option: NBD_OPT_LIST,
            len: MAX_SKIPPED_BYTES + 1
        })
    );
    let mut peer = Peer::new(BOTH_FLAGS);
    peer.input.extend_from_slice(b"GET / HTTP/1.1\r\n\r\n");
    let refusal = peer.negotiation.handle_input(&mut peer.input);
    assert!(matches!(refusal, Err(Refusal::BadOptionMagic(_))));
    let mut peer = Peer::new(BOTH_FLAGS);
    let skipped = vec![0; MAX_SKIPPED_BYTES as usize];
    assert_eq!(peer.ask_kind(NBD_OPT_LIST, &skipped), NBD_REP_ERR_TOO_BIG);
}

#[test]
fn shutting_down_refuses_all_but_abort() {
    let mut peer = structured_peer();
    peer.negotiation.shut_down();
    for option in [NBD_OPT_LIST, NBD_OPT_GO, NBD_OPT_STRUCTURED_REPLY, 99] {
        assert_eq!(peer.ask_kind(option, b""), NBD_REP_ERR_SHUTDOWN);
    }
    assert_eq!(peer.send(NBD_OPT_ABORT, b""), Ok(Step::Ended));
    let mut peer = structured_peer();
    peer.negotiation.shut_down();
    let refusal = peer.send(NBD_OPT_EXPORT_NAME, b"disk");
    assert!(matches!(refusal, Err(Refusal::ExportName(_))));
}

#[test]
fn bytes_after_go_are_left_for_transmission() {
    let mut peer = structured_peer();
    peer.input
        .extend_from_slice(&option_bytes(NBD_OPT_GO, &info("disk", &[])));
    peer.input.extend_from_slice(b"a pipelined request");
    let step = peer.negotiation.handle_input(&mut peer.input);
    assert!(matches!(step, Ok(Step::Done(_))));
    assert_eq!(&peer.input[..], b"a pipelined request");
}

/// What a handshake said, its last word, and how many bytes it left.
type Played = (Vec<u8>, Result<Step, Refusal>, usize);

/// Plays `pieces` to a handshake, within its promises.
fn play(pieces: &[&[u8]]) -> Played {
    let mut negotiation = Negotiation::new(catalog());
    let (mut input, mut output) = (BytesMut::new(), Vec::new());
    let mut last = Ok(Step::NeedMore);
    for piece in pieces {
        input.extend_from_slice(piece);
        loop {
            last = negotiation.handle_input(&mut input);
            let waiting = negotiation.poll_output().unwrap_or_default();
            assert!(waiting.len() <= SEND_FIRST_BYTES + 4096);
            output.extend_from_slice(&waiting);
            match last {
                Ok(Step::SendFirst) => {}
                Ok(Step::NeedMore) => break,
                _ => return (output, last, input.len()),
            }
        }
        // What the caller has to keep is never more than one option's data.
        assert!(input.len() <= MAX_OPTION_BYTES);
    }
    (output, last, input.len())
}

fn long_session() -> Vec<u8> {
    let mut bytes = BOTH_FLAGS.to_be_bytes().to_vec();
    let mut add = |option, data: &[u8]| bytes.extend_from_slice(&option_bytes(option, data));
    add(NBD_OPT_STARTTLS, b"");
    add(NBD_OPT_LIST, b"");
    add(NBD_OPT_LIST, b"data");
    add(NBD_OPT_STRUCTURED_REPLY, b"");
    add(NBD_OPT_LIST_META_CONTEXT, &meta("", &["base:"]));
    add(
        NBD_OPT_SET_META_CONTEXT,
        &meta("disk", &["base:allocation"]),
    );
    add(NBD_OPT_INFO, &info("disk@mon", &[1, 2, 3]));
    add(NBD_OPT_INFO, b"\0\0\0\x09disk\0\0");
    add(99, &[1; 300]);
    add(NBD_OPT_GO, &info("disk", &[3]));
    bytes
}

#[test]
fn input_may_be_cut_at_every_byte() {
    let session = long_session();
    let whole = play(&[&session]);
    assert!(matches!(whole.1, Ok(Step::Done(_))), "{:?}", whole.1);
    let single: Vec<&[u8]> = session.chunks(1).collect();
    assert_eq!(play(&single), whole);
    for cut in 0..session.len() {
        assert_eq!(
            play(&[&session[..cut], &session[cut..]]),
            whole,
            "cut at {cut}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Options of any kind with any data, cut anywhere: no panic, bounded
    /// output (asserted in `play`), and the cut makes no difference.
    #[test]
    fn any_options_are_answered_the_same_however_they_arrive(
        options in prop::collection::vec(
            (0u32..13, prop::collection::vec(prop_oneof![Just(0u8), 0u8..8, any::<u8>()], 0..64)),
            0..80,
        ),
        piece in 1usize..200,
    ) {
        let mut bytes = BOTH_FLAGS.to_be_bytes().to_vec();
        for (option, data) in &options {
            bytes.extend_from_slice(&option_bytes(*option, data));
        }
        let pieces: Vec<&[u8]> = bytes.chunks(piece).collect();
        let (cut, whole) = (play(&pieces), play(&[&bytes]));
        prop_assert_eq!((cut.0, cut.1), (whole.0, whole.1));
    }

    /// A good session with some bytes changed, and plain noise.
    #[test]
    fn damaged_sessions_never_panic(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        noise in prop::collection::vec(any::<u8>(), 0..600),
        piece in 1usize..700,
    ) {
        let mut session = long_session();
        for (index, byte) in damage {
            let at = index.index(session.len());
            session[at] = byte;
        }
        drop(play(&session.chunks(piece).collect::<Vec<_>>()));
        drop(play(&noise.chunks(piece).collect::<Vec<_>>()));
        let after_flags = [&BOTH_FLAGS.to_be_bytes()[..], &noise].concat();
        drop(play(&after_flags.chunks(piece).collect::<Vec<_>>()));
    }
}
