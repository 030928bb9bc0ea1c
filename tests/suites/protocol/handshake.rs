//! The option phase.

use std::io::Write;
use std::time::{Duration, Instant};

use nbdsnap_tests::harness::random::{Random, seed};
use nbdsnap_tests::harness::wire::{
    C_FIXED_NEWSTYLE, C_NO_ZEROES, Negotiation, OptionReply, Socket, be16, be32, be64, info,
    info_request, meta_request, opt, rep, tflag,
};

use super::{Probed, SIZE};

/// A name of so many bytes.
fn name(len: usize) -> Vec<u8> {
    vec![b'n'; len]
}

/// `data` with something done to it.
fn cut(mut data: Vec<u8>, len: usize) -> Vec<u8> {
    data.truncate(len);
    data
}

fn with(mut data: Vec<u8>, more: &[u8]) -> Vec<u8> {
    data.extend_from_slice(more);
    data
}

fn patched(mut data: Vec<u8>, at: usize, number: u32) -> Vec<u8> {
    data[at..at + 4].copy_from_slice(&number.to_be_bytes());
    data
}

/// Every option with wrong lengths, each on a connection of its own: the answer
/// must be one of those listed, and the connection must go on.
#[test]
fn options_with_wrong_lengths_are_refused_and_the_connection_goes_on() {
    const INVALID: &[u32] = &[rep::ERR_INVALID];
    const NO_NAME: &[u32] = &[rep::ERR_UNKNOWN];
    const TOO_LONG: &[u32] = &[rep::ERR_TOO_BIG, rep::ERR_INVALID, rep::ERR_UNKNOWN];
    const UNSUP: &[u32] = &[rep::ERR_UNSUP];
    let go = || info_request(b"vm", &[info::BLOCK_SIZE]);
    let meta = || meta_request(b"vm", &["base:allocation"]);
    let cases: Vec<(u32, Vec<u8>, &[u32])> = vec![
        (opt::LIST, vec![0], INVALID),
        (opt::LIST, vec![0; 4], INVALID),
        (opt::LIST, name(5000), INVALID),
        (opt::STRUCTURED_REPLY, vec![0], INVALID),
        (opt::STRUCTURED_REPLY, vec![0; 8], INVALID),
        (opt::GO, vec![], INVALID),
        (opt::GO, vec![0], INVALID),
        (opt::GO, vec![0; 4], INVALID),
        (opt::GO, vec![0; 5], INVALID),
        (opt::GO, cut(go(), 6), INVALID),
        (opt::GO, cut(go(), 7), INVALID),
        (opt::GO, cut(go(), 9), INVALID),
        (opt::GO, with(go(), &[0]), INVALID),
        (opt::GO, with(go(), &[0, 0, 0]), INVALID),
        (opt::GO, patched(go(), 0, 3), INVALID),
        (opt::GO, patched(go(), 0, 10), INVALID),
        (opt::GO, patched(go(), 0, u32::MAX), INVALID),
        (opt::GO, patched(go(), 6, u32::MAX), INVALID),
        (opt::GO, info_request(&name(4096), &[]), NO_NAME),
        (opt::GO, info_request(&name(4097), &[]), TOO_LONG),
        (opt::GO, info_request(&name(60_000), &[]), TOO_LONG),
        (opt::GO, info_request(&name(900_000), &[]), TOO_LONG),
        (opt::GO, info_request(b"vm@", &[]), NO_NAME),
        (opt::GO, info_request(b"@snap", &[]), NO_NAME),
        (opt::GO, info_request(b"vm/snap", &[]), NO_NAME),
        (opt::GO, info_request(b"VM", &[]), NO_NAME),
        (
            opt::GO,
            info_request(b"\xff\xfe", &[]),
            &[rep::ERR_UNKNOWN, rep::ERR_INVALID],
        ),
        (
            opt::GO,
            info_request(b"vm\0", &[]),
            &[rep::ERR_UNKNOWN, rep::ERR_INVALID],
        ),
        (opt::INFO, vec![], INVALID),
        (opt::INFO, vec![0; 3], INVALID),
        (opt::INFO, patched(go(), 0, 1 << 31), INVALID),
        (opt::INFO, with(go(), &[0, 3]), INVALID),
        (
            opt::INFO,
            info_request(&name(4096), &[1, 2, 3, 77]),
            NO_NAME,
        ),
        (opt::INFO, info_request(&name(4097), &[]), TOO_LONG),
        (opt::LIST_META_CONTEXT, meta(), INVALID), // before structured replies
        (opt::SET_META_CONTEXT, meta(), INVALID),  // the same
        (opt::SET_META_CONTEXT, vec![], INVALID),
        (opt::STARTTLS, vec![], UNSUP),
        (
            opt::STARTTLS,
            vec![1, 2, 3],
            &[rep::ERR_UNSUP, rep::ERR_INVALID],
        ),
        (opt::EXTENDED_HEADERS, vec![], UNSUP),
        (4, vec![], UNSUP),
        (0, vec![], UNSUP),
        (12, vec![7; 100], UNSUP),
        (0x7fff_ffff, vec![], UNSUP),
        (0xffff_ffff, name(4097), UNSUP),
    ];
    let mut probed = Probed::over_unix();
    for (option, data, expected) in cases {
        let case = format!(
            "option {option:#x} with {} bytes {:02x?}",
            data.len(),
            &data[..data.len().min(24)]
        );
        let mut negotiation = probed.negotiation();
        expect_refusal(&mut negotiation, &case, option, &data, expected);
    }
    probed.check_alive("wrong lengths");

    let cases: Vec<(u32, Vec<u8>, &[u32])> = vec![
        (opt::SET_META_CONTEXT, vec![], INVALID),
        (opt::SET_META_CONTEXT, vec![0; 7], INVALID),
        (opt::SET_META_CONTEXT, cut(meta(), 9), INVALID),
        (opt::SET_META_CONTEXT, cut(meta(), 14), INVALID),
        (opt::SET_META_CONTEXT, cut(meta(), 28), INVALID),
        (opt::SET_META_CONTEXT, with(meta(), &[0]), INVALID),
        (opt::SET_META_CONTEXT, patched(meta(), 0, 200), INVALID),
        (opt::SET_META_CONTEXT, patched(meta(), 6, 2), INVALID),
        (opt::SET_META_CONTEXT, patched(meta(), 6, u32::MAX), INVALID),
        (opt::SET_META_CONTEXT, patched(meta(), 10, 16), INVALID),
        (
            opt::SET_META_CONTEXT,
            patched(meta(), 10, u32::MAX),
            INVALID,
        ),
        (
            opt::SET_META_CONTEXT,
            meta_request(b"nobody", &["base:allocation"]),
            NO_NAME,
        ),
        (
            opt::SET_META_CONTEXT,
            meta_request(&name(4097), &["base:allocation"]),
            TOO_LONG,
        ),
        (opt::LIST_META_CONTEXT, vec![0; 5], INVALID),
        (opt::LIST_META_CONTEXT, patched(meta(), 10, 16), INVALID),
        (
            opt::LIST_META_CONTEXT,
            meta_request(b"nobody", &[]),
            NO_NAME,
        ),
    ];
    for (option, data, expected) in cases {
        let case = format!(
            "option {option:#x} after structured replies: {:02x?}",
            &data[..data.len().min(40)]
        );
        let mut negotiation = structured(&probed);
        expect_refusal(&mut negotiation, &case, option, &data, expected);
    }
    probed.finish("wrong lengths");
}

/// Structured replies negotiated.
fn structured(probed: &Probed) -> Negotiation {
    let mut negotiation = probed.negotiation();
    let replies = negotiation
        .ask(opt::STRUCTURED_REPLY, &[])
        .expect("a reply");
    assert_eq!(replies[0].kind, rep::ACK);
    negotiation
}

fn expect_refusal(
    negotiation: &mut Negotiation,
    case: &str,
    option: u32,
    data: &[u8],
    expected: &[u32],
) {
    let replies = negotiation
        .ask(option, data)
        .unwrap_or_else(|e| panic!("{case}: {e}"));
    let last = replies.last().expect("a reply").kind;
    assert!(
        replies.len() == 1 && expected.contains(&last),
        "{case}: {replies:x?}, expected one of {expected:x?}"
    );
    let listed = negotiation
        .ask(opt::LIST, &[])
        .unwrap_or_else(|e| panic!("{case}, then a list: {e}"));
    assert_eq!(
        listed.last().map(|reply| reply.kind),
        Some(rep::ACK),
        "{case}, then a list"
    );
}

#[test]
fn unknown_client_flags_drop_the_client_and_known_ones_do_not() {
    let mut probed = Probed::over_unix();
    for bit in 2..32 {
        let flags = C_FIXED_NEWSTYLE | C_NO_ZEROES | 1 << bit;
        let mut negotiation =
            Negotiation::start_with_flags(&probed.address, flags).expect("a greeting");
        let _ = negotiation.send(opt::LIST, &[]);
        assert!(
            negotiation.socket.is_dropped(),
            "client flag {bit} was accepted"
        );
        let mut alone =
            Negotiation::start_with_flags(&probed.address, 1 << bit).expect("a greeting");
        assert!(
            alone.socket.is_dropped(),
            "client flag {bit} alone was accepted"
        );
    }
    probed.check_alive("unknown client flags");
    for flags in [C_FIXED_NEWSTYLE, C_FIXED_NEWSTYLE | C_NO_ZEROES] {
        let mut negotiation =
            Negotiation::start_with_flags(&probed.address, flags).expect("a greeting");
        let listed = negotiation.ask(opt::LIST, &[]).expect("replies");
        // A length, the name, and then whatever the server likes to say of it.
        let name = |data: &[u8]| data[4..4 + be32(data, 0) as usize].to_vec();
        let servers = listed.iter().filter(|reply| reply.kind == rep::SERVER);
        let names: Vec<_> = servers.map(|reply| name(&reply.data)).collect();
        assert!(
            names.contains(&b"vm".to_vec()) && names.contains(&b"vm@snap".to_vec()),
            "{names:?}"
        );
    }
    probed.finish("client flags");
}

#[test]
fn export_name_grants_with_and_without_zeroes_and_drops_for_unknown_names() {
    let probed = Probed::over_unix();
    for (flags, zeros) in [
        (C_FIXED_NEWSTYLE, 124),
        (C_FIXED_NEWSTYLE | C_NO_ZEROES, 0),
        (0, 124),
        (C_NO_ZEROES, 0),
    ] {
        for export in ["vm", "vm@snap", ""] {
            let mut negotiation =
                Negotiation::start_with_flags(&probed.address, flags).expect("a greeting");
            negotiation
                .send(opt::EXPORT_NAME, export.as_bytes())
                .expect("sent");
            let granted = negotiation.socket.take(10 + zeros).expect("a grant");
            assert_eq!(be64(&granted, 0), SIZE, "flags {flags}, export {export:?}");
            assert_eq!(be16(&granted, 8) & 1, 1, "NBD_FLAG_HAS_FLAGS");
            assert!(granted[10..].iter().all(|byte| *byte == 0));
            // Nothing but the zeros lies between the grant and the first reply.
            let request = nbdsnap_tests::harness::wire::request(0, 0, 5, 0, 512);
            negotiation.socket.write_all(&request).expect("sent");
            let reply = negotiation.socket.take(16 + 512).expect("a reply");
            assert_eq!(
                (be32(&reply, 0), be32(&reply, 4), be64(&reply, 8)),
                (0x6744_6698, 0, 5)
            );
        }
    }
    for unknown in [&b"nobody"[..], &name(4096), &name(4097), b"\xff", b"vm\0"] {
        let mut negotiation = probed.negotiation();
        negotiation.send(opt::EXPORT_NAME, unknown).expect("sent");
        assert!(
            negotiation.socket.is_dropped(),
            "EXPORT_NAME with {} bytes",
            unknown.len()
        );
    }
    probed.finish("EXPORT_NAME");
}

#[test]
fn a_client_that_only_lists_is_dropped_after_a_bound() {
    for mut probed in [Probed::over_unix(), Probed::over_tcp()] {
        let mut negotiation = probed.negotiation();
        let mut answered = 0;
        for _ in 0..2000 {
            match negotiation.ask(opt::LIST, &[]) {
                Ok(replies) => {
                    assert_eq!(replies.last().map(|reply| reply.kind), Some(rep::ACK));
                    answered += 1;
                }
                Err(_) => break,
            }
        }
        assert!(
            (32..=64).contains(&answered),
            "{answered} of 2,000 lists were answered"
        );
        // The same without reading a word.
        let mut silent = probed.negotiation();
        for _ in 0..2000 {
            if silent.send(opt::LIST, &[]).is_err() {
                break;
            }
        }
        assert!(silent.socket.is_dropped(), "2,000 lists, unread");
        probed.check_alive("2,000 lists");
    }
}

#[test]
fn lengths_that_nobody_needs_are_not_waited_for() {
    let mut probed = Probed::over_unix();
    for option in [
        opt::GO,
        opt::LIST,
        opt::EXPORT_NAME,
        opt::SET_META_CONTEXT,
        0x7777,
    ] {
        for len in [u32::MAX, 1 << 31, 100 << 20] {
            let mut negotiation = probed.negotiation();
            negotiation
                .send_with_length(option, len, &[])
                .expect("sent");
            let begun = Instant::now();
            assert!(
                negotiation.socket.is_dropped(),
                "option {option} of {len} bytes"
            );
            assert!(
                begun.elapsed() < Duration::from_secs(5),
                "option {option} of {len} bytes was waited for"
            );
        }
    }
    probed.check_alive("huge options");
    let mut negotiation = probed.negotiation();
    negotiation.socket.write_all(&[0x55; 16]).expect("sent");
    assert!(negotiation.socket.is_dropped(), "a wrong option magic");
    probed.finish("huge options");
}

#[test]
fn a_silent_client_is_dropped_after_the_time_for_a_handshake() {
    let mut probed = Probed::over_unix();
    let begun = Instant::now();
    let mut mute = Socket::connect(&probed.address).expect("a connection");
    let mut negotiation = probed.negotiation();
    // One that keeps talking, too slowly, does not get more time.
    negotiation
        .send_with_length(opt::GO, 100, &[0; 10])
        .expect("sent");
    assert!(mute.is_dropped(), "a client that never said a word");
    assert!(
        negotiation.socket.is_dropped(),
        "a client in the middle of an option"
    );
    let took = begun.elapsed();
    assert!(
        (Duration::from_secs(8)..Duration::from_secs(20)).contains(&took),
        "dropped after {took:?}"
    );
    probed.check_alive("silent clients");
}

#[test]
fn abort_is_acknowledged_and_closes() {
    let probed = Probed::over_unix();
    for data in [&[][..], &[1, 2, 3]] {
        let mut negotiation = probed.negotiation();
        negotiation.send(opt::ABORT, data).expect("sent");
        // A polite server acknowledges; the specification lets it just close.
        if let Ok(reply) = negotiation.reply(opt::ABORT) {
            assert!(
                data.is_empty() && reply.kind == rep::ACK || !data.is_empty(),
                "{reply:?}"
            );
        }
        if data.is_empty() {
            assert!(
                negotiation.socket.is_dropped(),
                "still open after NBD_OPT_ABORT"
            );
        }
    }
    probed.finish("ABORT");
}

#[test]
fn infos_tell_what_the_export_is() {
    let probed = Probed::over_tcp();
    for option in [opt::INFO, opt::GO] {
        for export in ["vm", "vm@snap"] {
            let mut negotiation = probed.negotiation();
            let wanted = [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE, 99, 3, 3];
            let replies = negotiation
                .ask(option, &info_request(export.as_bytes(), &wanted))
                .expect("replies");
            let infos: Vec<&OptionReply> = replies
                .iter()
                .filter(|reply| reply.kind == rep::INFO)
                .collect();
            let one = |kind: u16| {
                let found: Vec<_> = infos
                    .iter()
                    .filter(|reply| be16(&reply.data, 0) == kind)
                    .collect();
                assert_eq!(found.len(), 1, "info {kind} of {export}: {replies:x?}");
                found[0].data[2..].to_vec()
            };
            let export_info = one(info::EXPORT);
            assert_eq!(be64(&export_info, 0), SIZE);
            let flags = be16(&export_info, 8);
            let offered =
                tflag::SEND_FLUSH | tflag::SEND_FUA | tflag::SEND_TRIM | tflag::SEND_WRITE_ZEROES;
            let more = tflag::CAN_MULTI_CONN | tflag::SEND_CACHE | tflag::SEND_FAST_ZERO;
            assert_eq!(flags & (offered | more), offered | more, "{flags:#x}");
            assert_eq!(flags & (tflag::READ_ONLY | tflag::SEND_DF), 0, "{flags:#x}");
            assert_eq!(one(info::NAME), export.as_bytes());
            assert!(!one(info::DESCRIPTION).is_empty());
            let sizes = one(info::BLOCK_SIZE);
            assert_eq!(
                [be32(&sizes, 0), be32(&sizes, 4), be32(&sizes, 8)],
                [1, 16 << 10, 32 << 20]
            );
            assert_eq!(replies.last().map(|reply| reply.kind), Some(rep::ACK));
        }
    }
    // Who asks for nothing gets in all the same, whatever block sizes it does not know.
    let replies = probed
        .negotiation()
        .ask(opt::GO, &info_request(b"vm", &[]))
        .expect("replies");
    assert_eq!(
        replies.last().map(|reply| reply.kind),
        Some(rep::ACK),
        "{replies:x?}"
    );
    let mut session = structured(&probed).go("vm").expect("a grant");
    assert_eq!(
        session.flags & tflag::SEND_DF,
        tflag::SEND_DF,
        "DF is offered with structured replies"
    );
    session.structured = true;
    assert!(session.read(0, 512).expect("a reply").is_ok());
    probed.finish("infos");
}

#[test]
fn meta_contexts_are_answered_once_each() {
    let probed = Probed::over_unix();
    let contexts = |option: u32, queries: &[&str]| {
        let replies = structured(&probed)
            .ask(option, &meta_request(b"vm@snap", queries))
            .expect("replies");
        assert_eq!(
            replies.last().map(|reply| reply.kind),
            Some(rep::ACK),
            "{queries:?}: {replies:x?}"
        );
        let found = replies
            .iter()
            .filter(|reply| reply.kind == rep::META_CONTEXT);
        found
            .map(|reply| String::from_utf8_lossy(&reply.data[4..]).into_owned())
            .collect::<Vec<_>>()
    };
    let cases: [(u32, &[&str], &[&str]); 10] = [
        (opt::LIST_META_CONTEXT, &[], &["base:allocation"]),
        (opt::LIST_META_CONTEXT, &["base:"], &["base:allocation"]),
        (
            opt::LIST_META_CONTEXT,
            &["base:", "base:allocation"],
            &["base:allocation"],
        ),
        (opt::LIST_META_CONTEXT, &["nobody:knows"], &[]),
        (opt::SET_META_CONTEXT, &[], &[]),
        (
            opt::SET_META_CONTEXT,
            &["base:allocation"],
            &["base:allocation"],
        ),
        (
            opt::SET_META_CONTEXT,
            &["base:allocation", "base:allocation"],
            &["base:allocation"],
        ),
        (
            opt::SET_META_CONTEXT,
            &["x:y", "base:allocation", "base:nothing"],
            &["base:allocation"],
        ),
        (opt::SET_META_CONTEXT, &["base:alloc"], &[]),
        (opt::SET_META_CONTEXT, &["", "allocation", ":"], &[]),
    ];
    for (option, queries, expected) in cases {
        assert_eq!(
            contexts(option, queries),
            expected,
            "option {option}, {queries:?}"
        );
    }
    let many = vec!["x:unknown"; 1000];
    assert_eq!(contexts(opt::SET_META_CONTEXT, &many), Vec::<String>::new());
    probed.finish("meta contexts");
}

#[test]
fn noise_and_clients_that_vanish_leave_no_trace() {
    let mut random = Random::new(seed("noise"));
    for mut probed in [Probed::over_unix(), Probed::over_tcp()] {
        for _ in 0..150 {
            let mut socket = Socket::connect(&probed.address).expect("a connection");
            let mut bytes = (random.below(4) as u32).to_be_bytes().to_vec();
            while random.below(5) > 0 {
                // A plausible option with noise for its data and length.
                let data = random.between(0, 60) as usize;
                let len = if random.one_in(4) {
                    random.bits() as u32 % 200
                } else {
                    data as u32
                };
                bytes.extend_from_slice(&0x4948_4156_454f_5054_u64.to_be_bytes());
                bytes.extend_from_slice(&(random.below(13) as u32).to_be_bytes());
                bytes.extend_from_slice(&len.to_be_bytes());
                bytes.extend_from_slice(&random.bytes(data));
            }
            let noise = random.between(0, 40) as usize;
            bytes.extend_from_slice(&random.bytes(noise));
            let _ = socket.write_all(&bytes);
        }
        probed.check_alive("noise");
    }
}
