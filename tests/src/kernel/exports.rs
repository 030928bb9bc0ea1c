//! nbdsnap on the host's side: an origin and its stores as files, served, played
//! upon and read back; and the status of a store as the engine counts it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use nbdsnap::client::Client;
use nbdsnap::nbd::uri::ListenAddr;
use nbdsnap_engine::{
    Access, Action, DiskError, OpenError, Outcome, Status, Store, StoreIo, StoreKind, StoreSize,
};

use super::play::{Act, Place, Step, content};
use crate::harness::server::{Serve, Server};
use crate::harness::wire::Address;

/// The largest piece that is read with one request.
const PIECE: u64 = 1 << 20;

/// A snapshot to be served.
#[derive(Clone, Debug)]
pub struct Cow {
    /// The store's file.
    pub path: PathBuf,
    /// What follows it on the command line, with its commas.
    pub options: String,
}

/// Serve an origin with its snapshots, as the exports `disk`, `disk@s0` and so on.
pub fn serve(folder: &Path, origin: &Path, cows: &[Cow], read_only: bool) -> Server {
    let mut serve = Serve::on_socket_in(folder);
    serve.disk("disk", origin);
    for (n, cow) in cows.iter().enumerate() {
        // The kernel had them both, or had a part in them.
        let options = format!(",adopt{}", cow.options);
        serve.snapshot(&format!("disk@s{n}"), &cow.path, &options);
    }
    if read_only {
        serve.read_only();
    }
    serve.start()
}

/// The name of a view's export: 0 is the origin.
pub fn export(view: usize) -> String {
    match view {
        0 => "disk".to_owned(),
        n => format!("disk@s{}", n - 1),
    }
}

/// A connection to a view.
pub fn connect(server: &Server, view: usize) -> Client {
    let address = match server.address() {
        Address::Unix(path) => ListenAddr::Unix(path),
        Address::Tcp(address) => ListenAddr::Tcp {
            host: address.ip().to_string(),
            port: address.port(),
        },
    };
    Client::connect(&address.uri(&export(view))).unwrap_or_else(|e| panic!("{}: {e}", export(view)))
}

/// The first `views` views, to be played upon.
pub fn places(server: &Server, views: usize) -> Vec<Place> {
    (0..views)
        .map(|view| Place::Export(Box::new(connect(server, view))))
        .collect()
}

/// Play steps with as many in flight as do not touch the same bytes of a view.
/// How many requests were so in flight at most.
pub fn play_at_once(server: &Server, views: usize, steps: &[Step]) -> usize {
    let mut clients: Vec<Client> = (0..views).map(|view| connect(server, view)).collect();
    let mut most = 0;
    let mut left = steps;
    while !left.is_empty() {
        let (wave, rest) = left.split_at(first_conflict(left));
        for step in wave {
            let client = &mut clients[step.view];
            match step.act {
                Act::Write { offset, len, fill } => {
                    client.queue_write(offset, &content(fill, len), false)
                }
                Act::Flush => client.queue_flush(),
            };
        }
        most = most.max(wave.len());
        for client in &mut clients {
            client.flush_out().expect("the server takes requests");
        }
        for client in &mut clients {
            while client.in_flight() > 0 {
                let reply = client.recv_reply().expect("the server replies");
                reply.result.expect("a request succeeds");
            }
        }
        left = rest;
    }
    most
}

/// How many steps can be in flight together, from the first on: none writes
/// what another one writes, and their data fits into a socket's patience.
fn first_conflict(steps: &[Step]) -> usize {
    const MOST_STEPS: usize = 48;
    const MOST_BYTES: u64 = 8 << 20;
    let mut bytes = 0;
    for (n, step) in steps.iter().enumerate() {
        let Act::Write { offset, len, .. } = step.act else {
            continue;
        };
        let meets = |other: &Step| {
            other.view == step.view
                && matches!(other.act, Act::Write { offset: o, len: l, .. } if offset < o + l && o < offset + len)
        };
        bytes += len;
        if n > 0 && (n == MOST_STEPS || bytes > MOST_BYTES || steps[..n].iter().any(meets)) {
            return n;
        }
    }
    steps.len()
}

/// All of a view; an error in words.
pub fn read(server: &Server, view: usize) -> Result<Vec<u8>, String> {
    let mut client = connect(server, view);
    let mut content = Vec::with_capacity(client.size() as usize);
    while (content.len() as u64) < client.size() {
        let offset = content.len() as u64;
        let len = PIECE.min(client.size() - offset) as u32;
        content.extend(client.read(offset, len).map_err(|e| e.to_string())?);
    }
    Ok(content)
}

/// The status of a store that lies in a file, as the engine counts it when it
/// opens it.
pub fn status(cow: &Path, kind: StoreKind, origin_bytes: u64) -> Result<Status, OpenError> {
    let file = File::open(cow).unwrap_or_else(|e| panic!("{}: {e}", cow.display()));
    let bytes = file.metadata().expect("a store has a length").len();
    let size = StoreSize {
        ready: bytes,
        limit: bytes,
        step: 0,
    };
    let mut io = ReadOnly(file);
    Store::open(kind, size, origin_bytes, Access::ReadOnly, &mut io).map(|store| store.status())
}

/// A store that is only looked at.
struct ReadOnly(File);

impl StoreIo for ReadOnly {
    fn act(&mut self, action: Action) -> Outcome {
        let Action::Read { offset, len } = action else {
            panic!("a store that is opened read-only was to be changed: {action:?}");
        };
        let mut bytes = vec![0; len as usize];
        match self.0.read_exact_at(&mut bytes, offset) {
            Ok(()) => Ok(Bytes::from(bytes)),
            Err(e) => Err(DiskError::Io(e.raw_os_error().unwrap_or(0))),
        }
    }

    fn keep_copy(&mut self, _: u64, _: &[u8]) -> Result<(), DiskError> {
        panic!("a store that is opened read-only was to be repaired");
    }
}
