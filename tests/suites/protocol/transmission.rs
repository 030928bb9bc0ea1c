//! The transmission phase.

use std::io::Write;
use std::time::{Duration, Instant};

use nbdsnap_tests::harness::files::{folder, sparse_file};
use nbdsnap_tests::harness::random::{Random, seed};
use nbdsnap_tests::harness::server::Serve;
use nbdsnap_tests::harness::wire::{Outcome, Session, Socket, cmd, errno, flag, request};

use super::{FILLED, MIB, Probed, SIZE};

const END: u64 = SIZE;
const GONE: &[u32] = &[errno::EINVAL];
const FULL: &[u32] = &[errno::ENOSPC];
/// Success, or EINVAL.
const EITHER: &[u32] = &[0, errno::EINVAL];
const DONE: &[u32] = &[0];

/// A request and the errors it may be answered with (0 for success).
struct Case {
    flags: u16,
    command: u16,
    offset: u64,
    len: u32,
    expected: &'static [u32],
}

const fn case(command: u16, offset: u64, len: u32, expected: &'static [u32]) -> Case {
    Case {
        flags: 0,
        command,
        offset,
        len,
        expected,
    }
}

const fn flagged(
    flags: u16,
    command: u16,
    offset: u64,
    len: u32,
    expected: &'static [u32],
) -> Case {
    Case {
        flags,
        command,
        offset,
        len,
        expected,
    }
}

/// Each of these is answered and the connection goes on.
#[rustfmt::skip]
const CASES: &[Case] = &[
    // Zero lengths.
    case(cmd::READ, 0, 0, EITHER),
    case(cmd::WRITE, 0, 0, EITHER),
    case(cmd::TRIM, 0, 0, EITHER),
    case(cmd::WRITE_ZEROES, 0, 0, EITHER),
    case(cmd::CACHE, 0, 0, EITHER),
    case(cmd::READ, END, 0, EITHER),
    // The last byte.
    case(cmd::READ, END - 1, 1, DONE),
    case(cmd::WRITE, END - 1, 1, DONE),
    case(cmd::TRIM, END - 1, 1, DONE),
    case(cmd::WRITE_ZEROES, END - 1, 1, DONE),
    case(cmd::CACHE, END - 1, 1, DONE),
    // One past it, and far past it.
    case(cmd::READ, END, 1, GONE),
    case(cmd::READ, END - 1, 2, GONE),
    case(cmd::READ, u64::MAX, 1, GONE),
    case(cmd::READ, u64::MAX - 511, 512, GONE),
    case(cmd::READ, 1 << 63, 512, GONE),
    case(cmd::WRITE, END, 1, FULL),
    case(cmd::WRITE, END - 1, 2, FULL),
    case(cmd::WRITE, u64::MAX, 1, FULL),
    case(cmd::WRITE, u64::MAX - 511, 512, FULL),
    case(cmd::WRITE_ZEROES, END, 1, FULL),
    case(cmd::WRITE_ZEROES, END - 1, 2, FULL),
    case(cmd::WRITE_ZEROES, 0, u32::MAX, FULL),
    case(cmd::TRIM, END, 1, GONE),
    case(cmd::TRIM, 1, SIZE as u32, GONE),
    case(cmd::TRIM, 0, u32::MAX, GONE),
    case(cmd::CACHE, END, 1, GONE),
    case(cmd::CACHE, 0, u32::MAX, GONE),
    // Larger than a request may be.
    case(cmd::READ, 0, 32 << 20, DONE),
    case(cmd::READ, 0, (32 << 20) + 1, GONE),
    case(cmd::READ, 0, 33 << 20, GONE),
    case(cmd::READ, 0, u32::MAX, GONE),
    case(cmd::CACHE, 0, SIZE as u32, DONE),
    case(cmd::TRIM, FILLED as u64, SIZE as u32 - FILLED as u32, DONE),
    // What was not negotiated or does not exist.
    case(cmd::BLOCK_STATUS, 0, 512, GONE),
    flagged(flag::DF, cmd::READ, 0, 512, GONE),
    case(8, 0, 0, GONE),
    case(9, 0, 512, GONE),
    case(0x7fff, 0, 512, GONE),
    case(u16::MAX, 0, 512, GONE),
    flagged(0x20, cmd::READ, 0, 512, GONE),
    flagged(0x8000, cmd::READ, 0, 512, GONE),
    flagged(0x8000, cmd::WRITE, FILLED as u64, 512, GONE),
    flagged(0x40, cmd::TRIM, 0, 512, GONE),
    flagged(0x40, cmd::FLUSH, 0, 0, GONE),
    flagged(0x40, cmd::WRITE_ZEROES, FILLED as u64, 512, GONE),
    flagged(flag::NO_HOLE, cmd::READ, 0, 512, GONE),
    flagged(flag::NO_HOLE, cmd::WRITE, FILLED as u64, 512, GONE),
    flagged(flag::FAST_ZERO, cmd::WRITE, FILLED as u64, 512, GONE),
    // Known flags where they belong.
    flagged(flag::FUA, cmd::WRITE, FILLED as u64, 512, DONE),
    flagged(flag::FUA, cmd::WRITE_ZEROES, FILLED as u64, 512, DONE),
    flagged(flag::FUA | flag::NO_HOLE, cmd::WRITE_ZEROES, FILLED as u64, 4096, DONE),
    flagged(flag::FUA, cmd::TRIM, FILLED as u64, 512, DONE),
    flagged(flag::FAST_ZERO, cmd::WRITE_ZEROES, FILLED as u64, 4096, &[0, errno::ENOTSUP]),
    case(cmd::FLUSH, 0, 0, DONE),
];

#[test]
fn every_request_is_answered_as_it_deserves() {
    for mut probed in [Probed::over_unix(), Probed::over_tcp()] {
        for export in ["vm", "vm@snap"] {
            let mut session = Session::open(&probed.address, export).expect("a connection");
            for Case {
                flags,
                command,
                offset,
                len,
                expected,
            } in CASES
            {
                let what = format!(
                    "{export}: command {command} flags {flags:#x} at {offset}, {len} bytes"
                );
                let data = if *command == cmd::WRITE {
                    vec![7; *len as usize]
                } else {
                    Vec::new()
                };
                let outcome = session.ask(*flags, *command, *offset, *len, &data);
                let outcome = outcome.unwrap_or_else(|e| panic!("{what}: {e}"));
                let error = outcome.err().unwrap_or(0);
                assert!(
                    expected.contains(&error),
                    "{what}: error {error}, expected one of {expected:?}"
                );
            }
            let begin = session
                .read(0, FILLED as u32)
                .expect("a reply")
                .expect("data");
            assert!(
                begin == probed.content,
                "{export}: a refused request has changed something"
            );
            session.disconnect().expect("a clean end");
        }
        probed.check_alive("single requests");
    }
}

#[test]
fn oversized_writes_are_drained_or_dropped_and_change_nothing() {
    let mut probed = Probed::over_unix();
    for export in ["vm", "vm@snap"] {
        let mut session = Session::open(&probed.address, export).expect("a connection");
        let largest = vec![3; 32 * MIB];
        assert_eq!(
            session.write(8 << 20, &largest).expect("a reply"),
            Ok(Vec::new())
        );
        assert_eq!(
            session.read(8 << 20, 32 << 20).expect("a reply"),
            Ok(largest)
        );
        let outcome = session
            .write(0, &vec![9; 33 * MIB])
            .expect("33 MiB are drained and answered");
        assert_eq!(outcome, Err(errno::EINVAL));
        let begin = session
            .read(0, FILLED as u32)
            .expect("a reply")
            .expect("data");
        assert!(
            begin == probed.content,
            "{export}: a refused write has written"
        );
        // 65 MiB: answered with EINVAL, or the client is dropped.
        match session.write(0, &vec![9; 65 * MIB]) {
            Ok(outcome) => assert_eq!(outcome, Err(errno::EINVAL)),
            Err(e) => assert!(
                session.socket.is_dropped(),
                "neither an answer nor an end: {e}"
            ),
        }
        let mut session = Session::open(&probed.address, export).expect("a connection");
        let _ = session.send(0, cmd::WRITE, 1, 0, u32::MAX, &[]);
        assert!(
            session.socket.is_dropped(),
            "{export}: 4 GiB would be waited for"
        );
    }
    probed.check_alive("oversized writes");
}

#[test]
fn a_wrong_request_magic_drops_the_client() {
    let mut probed = Probed::over_unix();
    let mut session = probed.session();
    session.socket.write_all(&[0x25; 28]).expect("sent");
    assert!(session.socket.is_dropped());
    probed.check_alive("a wrong magic");
}

#[test]
fn pipelined_reads_that_nobody_takes_hurt_nobody_else() {
    for mut probed in [Probed::over_unix(), Probed::over_tcp()] {
        let mut deaf = Vec::new();
        for _ in 0..3 {
            let mut session = probed.session();
            let mut bytes = Vec::new();
            for cookie in 0..200 {
                bytes.extend_from_slice(&request(0, cmd::READ, cookie, 0, 4 << 20));
            }
            session.socket.write_all(&bytes).expect("sent");
            deaf.push(session);
        }
        let mut other = probed.session();
        for n in 0..200_u64 {
            let begun = Instant::now();
            let offset = n * 4096 % FILLED as u64;
            let data = other.read(offset, 4096).expect("a reply").expect("data");
            assert!(data == probed.content[offset as usize..offset as usize + 4096]);
            assert!(
                begun.elapsed() < Duration::from_secs(5),
                "another client waited for {:?}",
                begun.elapsed()
            );
        }
        // 600 replies of 4 MiB are asked for; the server must not hold them all.
        let resident = resident_bytes(probed.server.id());
        assert!(
            resident < 1 << 30,
            "the server holds {resident} bytes for clients that do not read"
        );
        drop(deaf);
        assert!(other.read(0, 4096).expect("a reply").is_ok());
        probed.check_alive("clients that never read");
    }
}

/// The resident memory of a process, from /proc.
fn resident_bytes(id: u32) -> u64 {
    let status =
        std::fs::read_to_string(format!("/proc/{id}/status")).expect("the server's status");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .expect("VmRSS");
    let kib: u64 = line
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .expect("a number");
    kib << 10
}

#[test]
fn a_half_closed_connection_gets_all_its_replies() {
    for mut probed in [Probed::over_unix(), Probed::over_tcp()] {
        for structured in [false, true] {
            let mut session = if structured {
                Session::open_structured(&probed.address, "vm").expect("a connection")
            } else {
                probed.session()
            };
            exchange_eight(&mut session, &probed.content, |socket| {
                socket.close_sending().expect("half-closed");
            });
            assert!(
                session.socket.is_dropped(),
                "still open after the last reply"
            );
        }
        probed.check_alive("half-closed connections");
    }
}

#[test]
fn disconnect_answers_every_request_before_it() {
    for mut probed in [Probed::over_unix(), Probed::over_tcp()] {
        let mut session = probed.session();
        exchange_eight(&mut session, &probed.content, |socket| {
            let mut bytes = request(0, cmd::DISC, 0, 0, 0);
            // What comes after it is not taken.
            bytes.extend_from_slice(&request(0, cmd::WRITE, 99, 0, 512));
            bytes.extend_from_slice(&[0xee; 512]);
            let _ = socket.write_all(&bytes);
        });
        assert!(session.socket.is_dropped(), "still open after NBD_CMD_DISC");
        let begin = probed
            .session()
            .read(0, 512)
            .expect("a reply")
            .expect("data");
        assert!(
            begin == probed.content[..512],
            "a write after NBD_CMD_DISC was taken"
        );
        probed.check_alive("NBD_CMD_DISC");
    }
}

/// Send eight requests at once, then what `ending` sends, and take eight replies.
/// Replies are taken meanwhile: a server need not hold more of them than it wants.
fn exchange_eight(session: &mut Session, content: &[u8], ending: impl FnOnce(&mut Socket) + Send) {
    let mut sender = session.socket.try_clone().expect("a second handle");
    std::thread::scope(|scope| {
        scope.spawn(move || {
            sender.write_all(&eight_requests()).expect("sent");
            ending(&mut sender);
        });
        take_eight(session, content);
    });
}

/// Three reads, two writes, a trim, a flush and another read.
fn eight_requests() -> Vec<u8> {
    let hole = FILLED as u64 + (1 << 20);
    let mut bytes = Vec::new();
    let mut add = |command: u16, cookie: u64, offset: u64, len: u32| {
        bytes.extend_from_slice(&request(0, command, cookie, offset, len));
        if command == cmd::WRITE {
            bytes.extend_from_slice(&vec![cookie as u8; len as usize]);
        }
    };
    add(cmd::READ, 1, 0, 1 << 20);
    add(cmd::READ, 2, 4096, 2 << 20);
    add(cmd::READ, 3, 12_345, 54_321);
    add(cmd::WRITE, 4, hole, 100_000);
    add(cmd::WRITE, 5, hole + (1 << 20), 1 << 20);
    add(cmd::TRIM, 6, hole + (8 << 20), 1 << 20);
    add(cmd::FLUSH, 7, 0, 0);
    add(cmd::READ, 8, 1, 1);
    bytes
}

fn take_eight(session: &mut Session, content: &[u8]) {
    let range = |cookie: u64| match cookie {
        1 => 0..1 << 20,
        2 => 4096..4096 + (2 << 20),
        3 => 12_345..66_666,
        8 => 1..2,
        _ => 0..0,
    };
    let mut seen = [false; 9];
    for _ in 0..8 {
        let reply = session
            .reply(|cookie| range(cookie).len())
            .expect("one of 8 replies");
        let data: Outcome = Ok(content[range(reply.cookie)].to_vec());
        assert!(
            reply.outcome == data,
            "the reply to request {} is wrong",
            reply.cookie
        );
        assert!(
            !std::mem::replace(&mut seen[reply.cookie as usize], true),
            "request {} answered twice",
            reply.cookie
        );
    }
}

/// TRIM, WRITE_ZEROES, CACHE and BLOCK_STATUS take 32 bits of length.
#[test]
fn the_longest_lengths_are_worked_off() {
    let folder = folder();
    let disk = folder.path().join("large.img");
    sparse_file(&disk, 5 << 30);
    let mut serve = Serve::on_socket_in(folder.path());
    let server = serve.disk("large", &disk).start();
    let mut session = Session::open(&server.address(), "large").expect("a connection");
    assert_eq!(
        session.write(1 << 30, &[1; 4096]).expect("a reply"),
        Ok(Vec::new())
    );
    assert_eq!(
        session
            .write(u64::from(u32::MAX), &[2; 4096])
            .expect("a reply"),
        Ok(Vec::new())
    );
    for (command, offset) in [
        (cmd::CACHE, 0),
        (cmd::TRIM, 1 << 29),
        (cmd::WRITE_ZEROES, 512 << 20),
        (cmd::WRITE_ZEROES, 0),
    ] {
        assert_eq!(
            session
                .ask(0, command, offset, u32::MAX, &[])
                .expect("a reply"),
            Ok(Vec::new()),
            "command {command}"
        );
    }
    let tail = session
        .read(u64::from(u32::MAX) - 1, 3)
        .expect("a reply")
        .expect("data");
    assert_eq!(tail[0], 0, "the last byte of the zeros");
    assert_eq!(
        session.read(1 << 30, 4096).expect("a reply"),
        Ok(vec![0; 4096])
    );
    server.stop();
}

#[test]
fn noise_between_requests_hurts_nobody() {
    let mut random = Random::new(seed("noise in transmission"));
    let mut probed = Probed::over_unix();
    for _ in 0..100 {
        let mut session = Session::open(&probed.address, "vm@snap").expect("a connection");
        let mut bytes = Vec::new();
        for _ in 0..random.between(1, 20) {
            // Never a write or zero that succeeds: the snapshot is compared.
            let command = [cmd::READ, cmd::FLUSH, cmd::CACHE, cmd::BLOCK_STATUS, 12]
                [random.below(5) as usize];
            let offset = if random.one_in(3) {
                random.bits()
            } else {
                random.below(SIZE)
            };
            let len = if random.one_in(3) {
                random.bits() as u32
            } else {
                random.below(100_000) as u32
            };
            bytes.extend_from_slice(&request(
                random.bits() as u16 & 0x3f,
                command,
                random.bits(),
                offset,
                len,
            ));
        }
        if random.one_in(2) {
            let len = random.between(1, 27) as usize;
            bytes.extend_from_slice(&random.bytes(len));
        }
        let _ = session.socket.write_all(&bytes);
        // Half of them stay for the replies, the others vanish.
        if random.one_in(2) {
            session.socket.close_sending().expect("half-closed");
            assert!(
                session.socket.is_dropped(),
                "still open after the last reply"
            );
        }
    }
    probed.check_alive("noise");
}

#[test]
fn a_hundred_connections_are_served_at_once() {
    for mut probed in [Probed::over_unix(), Probed::over_tcp()] {
        let mut sessions: Vec<Session> = (0..100)
            .map(|n| {
                Session::open(&probed.address, if n % 2 == 0 { "vm" } else { "vm@snap" })
                    .expect("a connection")
            })
            .collect();
        for (n, session) in sessions.iter_mut().enumerate() {
            session
                .send(0, cmd::READ, n as u64, n as u64 * 512, 4096, &[])
                .expect("sent");
        }
        for (n, session) in sessions.iter_mut().enumerate().rev() {
            let reply = session.reply(|_| 4096).expect("a reply");
            assert_eq!(reply.cookie, n as u64);
            assert!(reply.outcome.expect("data") == probed.content[n * 512..n * 512 + 4096]);
        }
        drop(sessions);
        probed.check_alive("a hundred connections");
    }
}
