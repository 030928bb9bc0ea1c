//! Probes over raw sockets: wrong lengths, wrong names, wrong order, clients
//! that never read and clients that vanish. After every probe the server must
//! still serve another client; what one client does, no other feels.

#[path = "protocol/handshake.rs"]
mod handshake;
#[path = "protocol/structured.rs"]
mod structured;
#[path = "protocol/transmission.rs"]
mod transmission;

use nbdsnap_tests::harness::files::{folder, sparse_file};
use nbdsnap_tests::harness::random::Random;
use nbdsnap_tests::harness::server::{Serve, Server};
use nbdsnap_tests::harness::wire::{Address, Negotiation, Session};

const MIB: usize = 1 << 20;
/// Larger than the largest request.
const SIZE: u64 = 48 << 20;
/// The beginning of the disk holds random bytes, the rest is a hole.
const FILLED: usize = 4 * MIB;

/// A server to probe: the export `vm` with the snapshot `vm@snap`.
struct Probed {
    server: Server,
    address: Address,
    content: Vec<u8>,
    _folder: tempfile::TempDir,
}

impl Probed {
    fn over_unix() -> Self {
        let folder = folder();
        Self::start(Serve::on_socket_in(folder.path()), folder)
    }

    fn over_tcp() -> Self {
        Self::start(Serve::on_free_port(), folder())
    }

    fn start(mut serve: Serve, folder: tempfile::TempDir) -> Self {
        let disk = folder.path().join("disk.img");
        sparse_file(&disk, SIZE);
        let content = Random::new(42).bytes(FILLED);
        let file = std::fs::File::options()
            .write(true)
            .open(&disk)
            .expect("the disk");
        std::os::unix::fs::FileExt::write_all_at(&file, &content, 0)
            .expect("the disk can be written");
        serve
            .disk("vm", &disk)
            .snapshot("vm@snap", &folder.path().join("snap.cow"), ",chunk=16K");
        let server = serve.start();
        let address = server.address();
        Self {
            server,
            address,
            content,
            _folder: folder,
        }
    }

    fn session(&self) -> Session {
        Session::open(&self.address, "vm").expect("a connection to the origin")
    }

    fn negotiation(&self) -> Negotiation {
        Negotiation::start(&self.address).expect("a connection")
    }

    /// The server runs and serves a new client, and the snapshot is what it was.
    fn check_alive(&mut self, after: &str) {
        assert!(
            self.server.is_running(),
            "{after}: the server is gone\n{}",
            self.server.stderr()
        );
        let mut session = Session::open(&self.address, "vm@snap")
            .unwrap_or_else(|e| panic!("{after}: no new connection: {e}"));
        let read = session
            .read(1000, 70_000)
            .unwrap_or_else(|e| panic!("{after}: no reply: {e}"));
        assert!(
            read.as_deref() == Ok(&self.content[1000..71_000]),
            "{after}: the snapshot reads otherwise"
        );
    }

    /// The last check of every probe.
    fn finish(mut self, after: &str) {
        self.check_alive(after);
        let stderr = self.server.stderr();
        assert!(!stderr.contains("panicked"), "{after}: {stderr}");
        self.server.stop();
    }
}
