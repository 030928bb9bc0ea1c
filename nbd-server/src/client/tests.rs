//! The client against this project's own handshake, and against the servers of
//! others where they are installed.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use bytes::BytesMut;

use super::*;
use crate::nbd::export::{BlockSize, Catalog, Export, transmission_flags};
use crate::nbd::negotiation::{Agreed, Negotiation, Step};
use crate::nbd::uri::ListenAddr;
use crate::nbd::wire::*;

// ---- This project's handshake ---------------------------------------------

/// Serves handshakes for one connection: what was agreed, if something was,
/// and the bytes that followed until the client closed.
fn serve_handshake(mut stream: UnixStream) -> (Option<Agreed>, Vec<u8>) {
    let exports = ["disk", "disk@mon"].map(|name| Export {
        name: name.into(),
        description: format!("about {name}"),
        size: 1 << 20,
        flags: transmission_flags(name.contains('@'), true),
        block_size: BlockSize::for_chunk(16384),
    });
    let catalog = Catalog::new(exports.into(), Some(0)).unwrap();
    let mut negotiation = Negotiation::new(Arc::new(catalog));
    let mut input = BytesMut::new();
    let mut agreed = None;
    loop {
        if agreed.is_none() {
            let step = negotiation.handle_input(&mut input).unwrap();
            if let Some(output) = negotiation.poll_output() {
                stream.write_all(&output).unwrap();
            }
            match step {
                Step::NeedMore => {}
                Step::SendFirst => continue,
                Step::Done(done) => agreed = Some(done),
                Step::Ended => return (None, input.to_vec()),
            }
        }
        let mut bytes = [0; 1000];
        match stream.read(&mut bytes).unwrap() {
            0 => return (agreed, input.to_vec()),
            count => input.extend_from_slice(&bytes[..count]),
        }
    }
}

/// Lets `client` talk to a handshake; what that agreed, and what followed.
fn with_handshake(client: impl FnOnce(&ListenAddr)) -> (Option<Agreed>, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nbd.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let server = thread::spawn(move || serve_handshake(listener.accept().unwrap().0));
    client(&ListenAddr::Unix(path));
    server.join().unwrap()
}

#[test]
fn options_are_asked_one_by_one() {
    let ended = with_handshake(|address| {
        let mut handshake = Handshake::connect(address).unwrap();
        let listed = handshake.list_exports().unwrap();
        let listed: Vec<_> = listed
            .iter()
            .map(|export| (export.name.as_str(), export.description.as_str()))
            .collect();
        assert_eq!(
            listed,
            [("disk", "about disk"), ("disk@mon", "about disk@mon")]
        );
        let refused = handshake.list_meta_contexts("", &[]).unwrap_err();
        let ClientError::Refused { option, kind, .. } = refused else {
            panic!("{refused}");
        };
        assert_eq!(
            (option, kind),
            (NBD_OPT_LIST_META_CONTEXT, NBD_REP_ERR_INVALID)
        );
        assert!(handshake.structured_replies().unwrap());
        let contexts = handshake.list_meta_contexts("", &["base:"]).unwrap();
        assert_eq!(contexts, ["base:allocation"]);
        let info = handshake.info("disk@mon").unwrap();
        let expected = ExportInfo {
            size: 1 << 20,
            flags: transmission_flags(true, true) | NBD_FLAG_SEND_DF,
            name: Some("disk@mon".into()),
            description: Some("about disk@mon".into()),
            block_size: Some(BlockSize::for_chunk(16384)),
            structured_replies: true,
            base_allocation: None,
        };
        assert_eq!(info, expected);
        assert!(handshake.info("nope").is_err());
        let replies = handshake.ask(NBD_OPT_STARTTLS, &[]).unwrap();
        assert_eq!(replies[0].kind, NBD_REP_ERR_UNSUP);
        handshake.abort().unwrap();
    });
    assert_eq!(ended, (None, Vec::new()));
}

#[test]
fn connecting_agrees_on_what_was_wished() {
    let connect = |wish: Connect, export: &'static str| {
        let (agreed, rest) = with_handshake(|address| {
            let mut client = wish.to(&address.uri(export)).unwrap();
            assert_eq!(client.size(), 1 << 20);
            client.queue_disconnect();
            client.flush_out().unwrap();
        });
        assert_eq!(rest.len(), REQUEST_BYTES);
        assert_eq!(rest[..8], [0x25, 0x60, 0x95, 0x13, 0, 0, 0, 2]);
        agreed.unwrap()
    };
    let all = connect(Connect::default(), "disk@mon");
    assert_eq!((all.export, all.structured_replies), (1, true));
    assert!(all.base_allocation.is_some());
    let simple = connect(Connect::simple(), "");
    assert_eq!((simple.export, simple.structured_replies), (0, false));
    assert_eq!(simple.base_allocation, None);
    let old = Connect {
        by_export_name: true,
        ..Connect::default()
    };
    assert_eq!(connect(old, "disk@mon"), all);
}

// ---- The servers of others ---------------------------------------------------

/// A server that runs until it is dropped.
struct Peer {
    child: Child,
    uri: NbdUri,
    _folder: tempfile::TempDir,
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const PEER_BYTES: u64 = 64 << 20;

/// Starts `program` with what `arguments` makes of a socket and an image, or
/// says that it is not installed.
fn peer(program: &str, arguments: impl FnOnce(&Path, &Path) -> Vec<PathBuf>) -> Option<Peer> {
    let folder = tempfile::tempdir().unwrap();
    let (socket, image) = (folder.path().join("sock"), folder.path().join("image"));
    std::fs::File::create(&image)
        .unwrap()
        .set_len(PEER_BYTES)
        .unwrap();
    let spawned = Command::new(program)
        .args(arguments(&socket, &image))
        .stdin(Stdio::null())
        // It complains of the requests that are meant to fail.
        .stderr(Stdio::null())
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => {
            println!("skipped: {program} does not start here: {error}");
            return None;
        }
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    while UnixStream::connect(&socket).is_err() {
        if let Some(status) = child.try_wait().unwrap() {
            panic!("{program} ended before it listened: {status}");
        }
        assert!(Instant::now() < deadline, "{program} does not listen");
        thread::sleep(Duration::from_millis(5));
    }
    Some(Peer {
        child,
        uri: ListenAddr::Unix(socket).uri(""),
        _folder: folder,
    })
}

fn nbdkit() -> Option<Peer> {
    peer("nbdkit", |socket, _| {
        let fixed = ["--exit-with-parent", "-f", "memory", "64M", "-U"];
        fixed
            .map(PathBuf::from)
            .into_iter()
            .chain([socket.into()])
            .collect()
    })
}

fn qemu_nbd() -> Option<Peer> {
    peer("qemu-nbd", |socket, image| {
        let fixed = ["-t", "-f", "raw", "-e", "8", "--discard=unmap", "-k"];
        let paths = [socket.into(), image.into()];
        fixed.map(PathBuf::from).into_iter().chain(paths).collect()
    })
}

const WISHES: [Connect; 3] = [
    Connect {
        structured_replies: true,
        base_allocation: true,
        by_export_name: false,
    },
    Connect {
        structured_replies: false,
        base_allocation: false,
        by_export_name: false,
    },
    Connect {
        structured_replies: true,
        base_allocation: true,
        by_export_name: true,
    },
];

fn pattern(len: usize, salt: u64) -> Vec<u8> {
    let mut state = salt.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
    .take(len)
    .collect()
}

fn every_request_works(peer: &Peer) {
    for wish in WISHES {
        let mut client = wish.to(&peer.uri).unwrap();
        client.set_timeout(Some(Duration::from_secs(30))).unwrap();
        assert_eq!(client.size(), PEER_BYTES);
        let flags = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_WRITE_ZEROES;
        assert!(client.has_flags(flags));
        let mut expected = pattern(100_000, 1);
        client.write(4096, &expected, true).unwrap();
        client
            .write_zeroes(8192, 20_000, NBD_CMD_FLAG_NO_HOLE)
            .unwrap();
        expected[4096..24_096].fill(0);
        client.flush().unwrap();
        assert_eq!(client.read(4096, 100_000).unwrap(), expected);
        assert_eq!(client.read(4097, 1).unwrap(), expected[1..2]);
        if client.has_flags(NBD_FLAG_SEND_CACHE) {
            client.cache(4096, 4096).unwrap();
        }
        if client.has_flags(NBD_FLAG_SEND_DF) {
            let one = client.read_flags(4096, 50_000, NBD_CMD_FLAG_DF).unwrap();
            assert_eq!(one, expected[..50_000]);
        }
        client.trim(0, 4 << 20, false).unwrap();
        let refused = client.read(PEER_BYTES - 1, 2).unwrap_err();
        assert_eq!(refused.errno(), Some(NBD_EINVAL), "{refused}");
        if client.info().base_allocation.is_some() {
            maps_holes(&mut client);
        }
        client.disconnect().unwrap();
    }
}

fn maps_holes(client: &mut Client) {
    client.write(32 << 20, &pattern(1 << 20, 2), false).unwrap();
    let (mut offset, mut data_bytes) = (0, 0);
    while offset < PEER_BYTES {
        let rest = (PEER_BYTES - offset) as u32;
        for extent in client.block_status(offset, rest).unwrap() {
            offset += u64::from(extent.len);
            if !extent.is_zero() {
                data_bytes += u64::from(extent.len);
            }
        }
    }
    assert_eq!(offset, PEER_BYTES);
    assert!(
        ((1 << 20)..PEER_BYTES).contains(&data_bytes),
        "{data_bytes}"
    );
    let one = client
        .block_status_flags(0, 65536, NBD_CMD_FLAG_REQ_ONE)
        .unwrap();
    assert_eq!(one.len(), 1);
}

/// 64 reads in flight, each replaced as it completes, against known bytes.
fn pipelining_works(peer: &Peer) {
    for wish in WISHES {
        let mut client = wish.to(&peer.uri).unwrap();
        client.set_timeout(Some(Duration::from_secs(30))).unwrap();
        let expected = pattern(1 << 20, 3);
        client.write(0, &expected, false).unwrap();
        let mut in_flight = std::collections::BTreeMap::new();
        let (mut asked, mut answered) = (0u64, 0);
        while answered < 5000 {
            while asked < 5000 && in_flight.len() < 64 {
                let offset = asked * 7919 % ((1 << 20) - 4096);
                in_flight.insert(client.queue_read(offset, 4096), offset as usize);
                asked += 1;
            }
            client.flush_out().unwrap();
            client.fill().unwrap();
            while let Some(reply) = client.next_reply().unwrap() {
                let offset = in_flight.remove(&reply.cookie).unwrap();
                let Ok(Answer::Data(data)) = reply.result else {
                    panic!("{:?}", reply.result);
                };
                assert!(data[..] == expected[offset..offset + 4096]);
                answered += 1;
            }
        }
        assert_eq!(client.in_flight(), 0);
        client.disconnect().unwrap();
    }
}

/// More in both directions than any socket holds, all sent before a reply is
/// asked for.
fn sending_never_waits_for_ever(peer: &Peer) {
    let mut client = Client::connect(&peer.uri).unwrap();
    client.set_timeout(Some(Duration::from_secs(30))).unwrap();
    let data = pattern(1 << 20, 4);
    for slot in 0..16 {
        client.queue_read(slot << 20, 1 << 20);
        client.queue_write((16 + slot) << 20, &data, false);
    }
    client.flush_out().unwrap();
    for _ in 0..32 {
        assert!(client.recv_reply().unwrap().result.is_ok());
    }
    assert_eq!(client.read(31 << 20, 1 << 20).unwrap(), data);
    client.disconnect().unwrap();
}

#[test]
fn works_with_nbdkit() {
    if let Some(peer) = nbdkit() {
        every_request_works(&peer);
        pipelining_works(&peer);
        sending_never_waits_for_ever(&peer);
    }
}

#[test]
fn works_with_qemu_nbd() {
    if let Some(peer) = qemu_nbd() {
        every_request_works(&peer);
        pipelining_works(&peer);
        sending_never_waits_for_ever(&peer);
    }
}
