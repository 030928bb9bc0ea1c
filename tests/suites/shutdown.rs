//! Endings: a server that is asked to stop finishes what it has begun and exits
//! with 0; one that is killed loses nothing that it acknowledged; one that loses
//! its terminal goes on.

#[path = "shutdown/stamps.rs"]
mod stamps;

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nbdsnap_tests::harness::PATIENCE;
use nbdsnap_tests::harness::files::{folder, random_file};
use nbdsnap_tests::harness::process::{pid_of, wait, wait_until};
use nbdsnap_tests::harness::random::{Random, seed};
use nbdsnap_tests::harness::server::{Serve, Server};
use nbdsnap_tests::harness::wire::{Address, Negotiation, Session, cmd, errno, request};
use rustix::process::Signal;

use stamps::{Promised, write_until_the_end};

const SIZE: usize = 6 << 20;

/// A disk with two snapshots that are written and one that is not.
struct Written {
    folder: tempfile::TempDir,
    disk: PathBuf,
    before: Vec<u8>,
    serve: Serve,
    /// The origin and the two snapshots.
    views: Vec<Promised>,
}

impl Written {
    fn new(random: &mut Random) -> Self {
        let folder = folder();
        let disk = folder.path().join("disk.img");
        let before = random_file(&disk, SIZE, random);
        let mut serve = Serve::on_socket_in(folder.path());
        serve.disk("disk", &disk);
        for (name, options) in [
            ("small", "chunk=1K"),
            ("large", "chunk=64K,overflow"),
            ("still", "chunk=16K,ro"),
        ] {
            let cow = folder.path().join(format!("{name}.cow"));
            serve.snapshot(&format!("disk@{name}"), &cow, &format!(",{options}"));
        }
        let views = ["disk", "disk@small", "disk@large"]
            .map(|export| Promised::new(export, before.clone()));
        Self {
            folder,
            disk,
            before,
            serve,
            views: views.into(),
        }
    }

    /// All that was promised is there, through the server.
    fn check(&mut self, server: &Server) {
        let read = |export: &str| {
            let mut session = Session::open(&server.address(), export).expect("a connection");
            session
                .read_all()
                .expect("replies")
                .unwrap_or_else(|e| panic!("{export}: error {e}"))
        };
        assert!(
            read("disk@still") == self.before,
            "the snapshot that nobody wrote has changed"
        );
        for view in &mut self.views {
            let found = read(&view.export);
            let (in_flight, arrived) = view.check(found);
            println!(
                "{}: {in_flight} blocks were in flight, {arrived} of them arrived",
                view.export
            );
        }
    }
}

#[test]
fn kill_loses_only_what_was_not_acknowledged() {
    let mut random = Random::new(seed("kill"));
    let mut written = Written::new(&mut random);
    let mut server = written.serve.start();
    for round in 0..10 {
        let enough = random.between(1, 1500);
        let address = server.address();
        write_until_the_end(
            &address,
            &mut written.views,
            3,
            &mut random,
            move |acknowledged| {
                wait_for(acknowledged, enough);
                server.kill();
            },
        );
        println!("round {round}: killed after {enough} writes");
        server = written.serve.start();
        written.check(&server);
    }
    server.stop();
}

fn wait_for(acknowledged: &AtomicU64, enough: u64) {
    wait_until("enough writes are acknowledged", || {
        acknowledged.load(Ordering::Relaxed) >= enough
    });
}

#[test]
fn a_signal_to_stop_finishes_what_is_in_flight() {
    let mut random = Random::new(seed("stop"));
    let mut written = Written::new(&mut random);
    for signal in [Signal::TERM, Signal::INT, Signal::TERM] {
        let server = written.serve.start();
        written.check(&server);
        let address = server.address();
        let refused = write_until_the_end(
            &address,
            &mut written.views,
            3,
            &mut random,
            move |acknowledged| {
                wait_for(acknowledged, 300);

                server.signal(signal);
                let (status, stderr) = server.wait_for_end();
                assert_eq!(status.code(), Some(0), "after {signal:?}: {stderr}");
            },
        );
        println!("{signal:?}: {refused} later writes were answered ESHUTDOWN");
        // The origin itself, with no server that could hide anything.
        let found = std::fs::read(&written.disk).expect("the disk");
        written.views[0].check(found);
        assert!(
            !written.folder.path().join("nbd.sock").exists(),
            "the socket is left behind"
        );
    }
    let server = written.serve.start();
    written.check(&server);
    server.stop();
}

#[test]
fn requests_that_were_sent_before_the_signal_are_answered() {
    let mut random = Random::new(seed("before the signal"));
    let written = Written::new(&mut random);
    let server = written.serve.start();
    let mut session = Session::open(&server.address(), "disk").expect("a connection");
    let mut idle = Session::open(&server.address(), "disk@still").expect("a connection");
    let mut handshaking = Negotiation::start(&server.address()).expect("a connection");
    for cookie in 0..100 {
        session
            .send(
                0,
                cmd::WRITE,
                cookie,
                cookie * 40_960,
                8192,
                &vec![cookie as u8; 8192],
            )
            .expect("sent");
    }
    // The first reply: the server has begun, and the others are in its hands or its socket.
    let mut finished = vec![session.reply(|_| 0).expect("a reply")];
    server.signal(Signal::TERM);
    // What is asked now is refused, or nobody is there any more.
    // It has a place of its own: it may also have come in time.
    let _ = session.send(0, cmd::WRITE, 1000, 100 * 40_960, 512, &[0xee; 512]);
    while let Ok(reply) = session.reply(|_| 0) {
        finished.push(reply);
    }
    assert!(idle.socket.is_dropped(), "an idle connection stays open");
    assert!(handshaking.socket.is_dropped(), "a handshake stays open");
    let (status, stderr) = server.wait_for_end();
    assert_eq!(status.code(), Some(0), "{stderr}");
    let disk = std::fs::read(&written.disk).expect("the disk");
    for reply in &finished {
        let begin = reply.cookie as usize * 40_960;
        match reply.outcome {
            Ok(_) if reply.cookie < 100 => {
                assert!(
                    disk[begin..begin + 8192]
                        .iter()
                        .all(|byte| u64::from(*byte) == reply.cookie),
                    "write {} is lost",
                    reply.cookie
                );
            }
            Ok(_) => {}
            Err(error) => assert_eq!(error, errno::ESHUTDOWN),
        }
    }
}

/// Nobody can hold up the end: neither a client that never reads its replies
/// nor one that stops in the middle of a request.
#[test]
fn clients_that_do_not_read_do_not_hold_up_the_end() {
    let mut random = Random::new(seed("deaf"));
    let written = Written::new(&mut random);
    let server = written.serve.start();
    let mut deaf = Session::open(&server.address(), "disk").expect("a connection");
    let mut bytes = Vec::new();
    for cookie in 0..200 {
        bytes.extend_from_slice(&request(0, cmd::READ, cookie, 0, 4 << 20));
    }
    deaf.socket.write_all(&bytes).expect("sent");
    let mut halting = Session::open(&server.address(), "disk").expect("a connection");
    halting
        .send(0, cmd::WRITE, 1, 0, 1 << 20, &vec![1; 1000])
        .expect("sent");
    let mut other = Session::open(&server.address(), "disk").expect("a connection");
    assert!(other.read(0, 512).expect("a reply").is_ok());
    let begun = Instant::now();
    server.stop();
    assert!(
        begun.elapsed() < Duration::from_secs(30),
        "the end took {:?}",
        begun.elapsed()
    );
    let disk = std::fs::read(&written.disk).expect("the disk");
    assert!(disk == written.before, "half a write has written");
}

#[test]
fn a_flush_on_one_connection_covers_the_writes_of_all() {
    let mut random = Random::new(seed("multi-conn"));
    let written = Written::new(&mut random);
    let server = written.serve.start();
    for export in ["disk", "disk@small"] {
        let mut sessions: Vec<Session> = (0..8)
            .map(|_| Session::open(&server.address(), export).expect("a connection"))
            .collect();
        for round in 0..20_u64 {
            let data = random.bytes(5000);
            let writer = random.below(8) as usize;
            // Others are busy while the flush comes.
            for session in &mut sessions {
                session.send(0, cmd::READ, 7, 0, 65536, &[]).expect("sent");
            }
            for session in &mut sessions {
                session
                    .reply(|_| 65536)
                    .expect("a reply")
                    .outcome
                    .expect("data");
            }
            assert_eq!(
                sessions[writer]
                    .write(100_000 + round * 7777, &data)
                    .expect("a reply"),
                Ok(Vec::new())
            );
            for session in &mut sessions {
                assert_eq!(session.flush().expect("a reply"), Ok(Vec::new()));
                let read = session
                    .read(100_000 + round * 7777, 5000)
                    .expect("a reply")
                    .expect("data");
                assert!(
                    read == data,
                    "{export}: a write is not seen by another connection"
                );
            }
        }
    }
    server.stop();
}

#[test]
fn losing_its_output_does_not_end_the_server() {
    let folder = folder();
    let disk = folder.path().join("disk.img");
    random_file(&disk, 1 << 20, &mut Random::new(1));
    let mut serve = Serve::on_socket_in(folder.path());
    serve
        .disk("disk", &disk)
        .snapshot("disk@x", &folder.path().join("x.cow"), "");
    let socket = folder.path().join("nbd.sock");
    let address = Address::Unix(socket.clone());

    // Whoever read its output goes away.
    let mut child = serve
        .command()
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("piped"))
        .read_line(&mut line)
        .expect("a line");
    drop(child.stderr.take());
    check_serves(&address);
    rustix::process::kill_process(pid_of(&child), Signal::PIPE).expect("a signal");
    check_serves(&address);
    rustix::process::kill_process(pid_of(&child), Signal::TERM).expect("a signal");
    let status = wait(&mut child, PATIENCE).expect("the server ends");
    assert_eq!(status.code(), Some(0), "{status}");

    // It never had any output.
    let with_args = serve.command();
    let words = std::iter::once(with_args.get_program()).chain(with_args.get_args());
    let mut shell = Command::new("sh");
    shell
        .args(["-c", "exec \"$0\" \"$@\" >&- 2>&- <&-"])
        .args(words);
    let mut child = shell.spawn().expect("a shell");
    wait_until("the server listens", || {
        Session::open(&address, "disk").is_ok()
    });
    check_serves(&address);
    rustix::process::kill_process(pid_of(&child), Signal::TERM).expect("a signal");
    let status = wait(&mut child, PATIENCE).expect("the server ends");
    assert_eq!(status.code(), Some(0), "{status}");
    let disk_now = std::fs::read(&disk).expect("the disk");
    assert!(
        !disk_now.windows(8).any(|window| window == b" nbdsnap"),
        "log lines went into the disk"
    );
}

/// It answers, also right after a client that makes it log.
fn check_serves(address: &Address) {
    for _ in 0..3 {
        if let Ok(mut wrong) = Negotiation::start_with_flags(address, 0x80) {
            assert!(wrong.socket.is_dropped());
        }
    }
    let mut session = Session::open(address, "disk@x").expect("a connection");
    assert!(session.read(0, 4096).expect("a reply").is_ok());
    let mut session = Session::open(address, "disk").expect("a connection");
    assert_eq!(
        session.write(0, &[3; 512]).expect("a reply"),
        Ok(Vec::new())
    );
}

/// A connection that has gone may have left requests that nobody has begun. They
/// must not land on what another client has written since (durability.md, rule 14).
#[test]
fn what_a_gone_client_left_never_lands_on_newer_data() {
    let mut random = Random::new(seed("gone client"));
    let written = Written::new(&mut random);
    let place = 5_u64 << 20;
    for round in 0..10 {
        let server = written.serve.start();
        let mut gone = Session::open(&server.address(), "disk").expect("a connection");
        let mut bytes = Vec::new();
        for cookie in 0..300 {
            // More than may be under way at once, each with two flushes to wait for.
            bytes.extend_from_slice(&request(1, cmd::WRITE, cookie, cookie * 4096, 512));
            bytes.extend_from_slice(&[1; 512]);
        }
        bytes.extend_from_slice(&request(0, cmd::WRITE, 300, place, 512));
        bytes.extend_from_slice(&[0x11; 512]);
        gone.socket.write_all(&bytes).expect("sent");
        drop(gone);
        let mut newer = Session::open(&server.address(), "disk").expect("a connection");
        newer
            .send(0, cmd::WRITE, 1, place, 512, &[0x22; 512])
            .expect("sent");
        let reply = newer.reply(|_| 0).expect("a reply");
        assert!(reply.outcome.is_ok());
        drop(newer);
        server.stop();
        let disk = std::fs::read(&written.disk).expect("the disk");
        let there = &disk[place as usize..place as usize + 512];
        assert!(
            there.iter().all(|byte| *byte == 0x22),
            "round {round}: a stalled write has landed on newer data"
        );
    }
}
