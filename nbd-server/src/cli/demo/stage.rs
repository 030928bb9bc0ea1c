//! The demonstration's server and its client: everything lies in one temporary
//! folder, and every start goes the way of `nbdsnap serve`, from the words of the
//! command line on.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::super::Failure;
use super::super::serve;
use super::super::spec::{self, DiskSpec, SnapshotSpec};
use crate::client::{Answer, Client, ClientError};
use crate::io::VolumeAccess;
use crate::nbd::uri::{ListenAddr, NbdUri};
use crate::server::setup::Setup;
use crate::server::{RunningServer, SnapshotStatus};

/// The image's file; its export is `disk`.
const DISK: &str = "disk.img";
const SOCKET: &str = "sock";
/// Bytes in one read.
const PIECE: u32 = 1 << 20;
/// No answer of the server may take longer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Everything that the demonstration works with.
pub(super) struct Stage {
    folder: PathBuf,
    /// The words after each `--snapshot`.
    snapshots: Vec<&'static str>,
    server: Option<RunningServer>,
}

fn failed(doing: &str) -> impl FnOnce(ClientError) -> Failure {
    move |error| Failure::Refused(format!("demo: {doing}: {error}"))
}

impl Stage {
    /// Nothing is there yet but the folder.
    pub(super) fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            snapshots: Vec::new(),
            server: None,
        }
    }

    /// Make the disk.
    pub(super) fn make_disk(&self, image: &[u8]) -> Result<(), Failure> {
        let path = self.folder.join(DISK);
        std::fs::write(&path, image)
            .map_err(|error| Failure::Refused(format!("demo: {}: {error}", path.display())))
    }

    /// The bytes of one of its files.
    pub(super) fn file(&self, name: &str) -> Result<Vec<u8>, Failure> {
        let path = self.folder.join(name);
        std::fs::read(&path)
            .map_err(|error| Failure::Refused(format!("demo: {}: {error}", path.display())))
    }

    /// From the next start on, serve this snapshot too.
    pub(super) fn add_snapshot(&mut self, words: &'static str) {
        self.snapshots.push(words);
    }

    /// The lines of the command that does what [`Stage::start`] does.
    pub(super) fn command(&self) -> Vec<String> {
        let mut lines = vec![format!("nbdsnap serve {DISK} --listen unix:{SOCKET}")];
        lines.extend(
            self.snapshots
                .iter()
                .map(|words| format!("--snapshot {words}")),
        );
        let last = lines.len() - 1;
        for line in &mut lines[..last] {
            line.push_str(" \\");
        }
        lines
    }

    /// Open, make and bind everything.
    pub(super) fn setup(&self) -> Result<Setup, Failure> {
        let mut disk = DiskSpec::parse(OsStr::new(DISK)).map_err(Failure::usage)?;
        disk.path = self.folder.join(disk.path);
        let mut snapshots = Vec::new();
        for words in &self.snapshots {
            let mut snapshot = SnapshotSpec::parse(OsStr::new(words)).map_err(Failure::usage)?;
            snapshot.cow = self.folder.join(snapshot.cow);
            snapshots.push(snapshot);
        }
        let volumes = spec::assemble(vec![disk], snapshots, VolumeAccess::ReadWrite)
            .map_err(Failure::usage)?;
        let wanted = serve::Wanted {
            volumes,
            addresses: &[self.address()],
            threads: Some(1),
            ..serve::Wanted::default()
        };
        match serve::make_ready(wanted) {
            Ok(ready) => Ok(ready.setup),
            Err(Failure::Refused(why)) => Err(Failure::Refused(format!(
                "demo: {why} (TMPDIR says where its folder is made)"
            ))),
            Err(other) => Err(other),
        }
    }

    /// Begin to serve.
    pub(super) fn start(&mut self) -> Result<(), Failure> {
        let server = RunningServer::start(self.setup()?).map_err(Failure::refused)?;
        self.server = Some(server);
        Ok(())
    }

    /// Stop serving: all that was written is durable then.
    pub(super) fn stop(&mut self) -> Result<(), Failure> {
        match self.server.take() {
            Some(server) => server.stop().map_err(Failure::refused),
            None => Ok(()),
        }
    }

    /// The URI of an export.
    pub(super) fn uri(&self, export: &str) -> NbdUri {
        self.address().uri(export)
    }

    /// Where its socket is.
    pub(super) fn socket(&self) -> PathBuf {
        self.folder.join(SOCKET)
    }

    fn address(&self) -> ListenAddr {
        ListenAddr::Unix(self.socket())
    }

    /// A connection to an export.
    pub(super) fn client(&self, export: &str) -> Result<Client, Failure> {
        let connect = || {
            let client = Client::connect(&self.uri(export))?;
            client.set_timeout(Some(PATIENCE))?;
            Ok(client)
        };
        connect().map_err(failed(&format!("connecting to {export}")))
    }

    /// All that an export holds.
    pub(super) fn read(&self, export: &str) -> Result<Vec<u8>, Failure> {
        let mut client = self.client(export)?;
        let read = || {
            let mut image = Vec::new();
            while (image.len() as u64) < client.size() {
                let left = client.size() - image.len() as u64;
                let len = left.min(u64::from(PIECE)) as u32;
                image.extend(client.read(image.len() as u64, len)?);
            }
            client.disconnect()?;
            Ok(image)
        };
        read().map_err(failed(&format!("reading {export}")))
    }

    /// Perform writes, all of them under way at once, and flush.
    pub(super) fn write(&self, export: &str, writes: &[(u64, Vec<u8>)]) -> Result<(), Failure> {
        let mut client = self.client(export)?;
        let write = || {
            for (offset, bytes) in writes {
                client.queue_write(*offset, bytes, false);
            }
            client.flush_out()?;
            while client.in_flight() > 0 {
                match client.recv_reply()?.result? {
                    Answer::Done => {}
                    other => {
                        let answer = format!("{other:?} in answer to WRITE");
                        return Err(ClientError::Protocol(answer));
                    }
                }
            }
            client.flush()?;
            client.disconnect()
        };
        write().map_err(failed(&format!("writing to {export}")))
    }

    /// Make the first `len` bytes of an export zero, and flush.
    pub(super) fn wipe(&self, export: &str, len: u32) -> Result<(), Failure> {
        let mut client = self.client(export)?;
        let wipe = || {
            client.write_zeroes(0, len, 0)?;
            client.flush()?;
            client.disconnect()
        };
        wipe().map_err(failed(&format!("wiping {export}")))
    }

    /// How the store of a snapshot is doing.
    pub(super) fn status(&self, export: &str) -> Result<SnapshotStatus, Failure> {
        let server = self.server.as_ref().expect("asked while it serves");
        let statuses = server.statuses().map_err(Failure::refused)?;
        let status = statuses.into_iter().find(|status| status.export == export);
        status.ok_or_else(|| Failure::Refused(format!("demo: there is no snapshot {export}")))
    }
}
