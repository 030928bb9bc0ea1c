//! The servers: how each is started over a disk, and what its exports are called.

use std::path::Path;
use std::process::Command;

/// A server in one of its roles. Where two have a snapshot, `chunk` is its
/// granularity: the chunk of nbdsnap, the block or cluster of the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Contender {
    /// nbdsnap; the load goes to the origin.
    NbdsnapOrigin {
        /// With a snapshot of this chunk size, or without.
        snapshot: Option<Chunk>,
    },
    /// nbdsnap; the load goes to a snapshot.
    NbdsnapSnapshot {
        /// Its chunk size.
        chunk: Chunk,
    },
    /// nbdkit's file plugin.
    NbdkitFile,
    /// nbdkit's cow filter over the file plugin: writes go to a temporary overlay.
    NbdkitCow {
        /// Its block size.
        chunk: Chunk,
    },
    /// qemu-nbd over a raw file.
    QemuRaw,
    /// qemu-nbd over a qcow2 overlay of the raw file.
    QemuOverlay {
        /// Its cluster size.
        chunk: Chunk,
    },
    /// QEMU's copy-before-write filter: a live origin with a point-in-time
    /// export, the map of which lives in memory alone. It copies clusters of 64
    /// KiB, and none smaller can be chosen.
    QemuCopyBeforeWrite,
}

/// The granularities that are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Chunk {
    /// 4 KiB
    K4,
    /// 64 KiB
    K64,
}

impl Chunk {
    /// As options take it.
    fn text(self) -> &'static str {
        match self {
            Self::K4 => "4K",
            Self::K64 => "64K",
        }
    }

    pub(crate) const fn bytes(self) -> u64 {
        match self {
            Self::K4 => 4 << 10,
            Self::K64 => 64 << 10,
        }
    }
}

/// The files and the socket that a server is started on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Site<'a> {
    /// The disk, a raw file.
    pub(crate) disk: &'a Path,
    /// Where a server may keep what it needs; nothing is there.
    pub(crate) store: &'a Path,
    /// The Unix socket to listen at.
    pub(crate) socket: &'a Path,
    /// Length of the disk.
    pub(crate) bytes: u64,
}

/// What has to be done before a server starts.
#[derive(Debug)]
pub(crate) enum Preparation {
    /// Nothing.
    Nothing,
    /// Its store has to be a file of zeros, as long as the disk.
    EmptyStore,
    /// A program has to run to its end.
    Run(Command),
}

/// The programs that the servers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    /// This project's.
    Nbdsnap,
    /// nbdkit
    Nbdkit,
    /// qemu-nbd, and qemu-img, which comes with it.
    QemuNbd,
    /// qemu-storage-daemon
    QemuStorageDaemon,
}

impl Program {
    /// Each of them.
    pub(crate) const ALL: [Self; 4] = [
        Self::Nbdsnap,
        Self::Nbdkit,
        Self::QemuNbd,
        Self::QemuStorageDaemon,
    ];

    /// The name of its file.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Nbdsnap => "nbdsnap",
            Self::Nbdkit => "nbdkit",
            Self::QemuNbd => "qemu-nbd",
            Self::QemuStorageDaemon => "qemu-storage-daemon",
        }
    }
}

impl Contender {
    /// Its name in tables.
    pub(crate) fn label(self) -> String {
        match self {
            Self::NbdsnapOrigin { snapshot: None } => "nbdsnap origin".into(),
            Self::NbdsnapOrigin {
                snapshot: Some(chunk),
            } => {
                format!("nbdsnap origin, snapshot {}", chunk.text())
            }
            Self::NbdsnapSnapshot { chunk } => format!("nbdsnap snapshot {}", chunk.text()),
            Self::NbdkitFile => "nbdkit file".into(),
            Self::NbdkitCow { chunk } => format!("nbdkit cow {}", chunk.text()),
            Self::QemuRaw => "qemu-nbd raw".into(),
            Self::QemuOverlay { chunk } => format!("qemu-nbd qcow2 overlay {}", chunk.text()),
            Self::QemuCopyBeforeWrite => "qemu copy-before-write 64K".into(),
        }
    }

    /// True for the server that the others are compared with.
    pub(crate) fn is_nbdsnap(self) -> bool {
        self.program() == Program::Nbdsnap
    }

    /// What has to be installed.
    pub(crate) fn program(self) -> Program {
        match self {
            Self::NbdsnapOrigin { .. } | Self::NbdsnapSnapshot { .. } => Program::Nbdsnap,
            Self::NbdkitFile | Self::NbdkitCow { .. } => Program::Nbdkit,
            Self::QemuRaw | Self::QemuOverlay { .. } => Program::QemuNbd,
            Self::QemuCopyBeforeWrite => Program::QemuStorageDaemon,
        }
    }

    /// The export that gets the load.
    pub(crate) fn export(self) -> &'static str {
        match self {
            Self::NbdsnapOrigin { .. } | Self::QemuCopyBeforeWrite => "disk",
            Self::NbdsnapSnapshot { .. } => "disk@s",
            _ => "",
        }
    }

    /// The export on the other side of the snapshot: it has to read as before,
    /// whatever is written to [`Contender::export`].
    pub(crate) fn other_export(self) -> Option<&'static str> {
        match self {
            Self::NbdsnapOrigin { snapshot: Some(_) } => Some("disk@s"),
            Self::NbdsnapSnapshot { .. } => Some("disk"),
            Self::QemuCopyBeforeWrite => Some("snapshot"),
            _ => None,
        }
    }

    /// What has to be done before it starts.
    pub(crate) fn preparation(self, site: &Site<'_>) -> Preparation {
        match self {
            Self::QemuOverlay { chunk } => {
                let mut command = Command::new("qemu-img");
                command.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]);
                command.arg(site.disk).arg("-o");
                command.arg(format!("cluster_size={}", chunk.bytes()));
                command.arg(site.store);
                Preparation::Run(command)
            }
            Self::QemuCopyBeforeWrite => Preparation::EmptyStore,
            _ => Preparation::Nothing,
        }
    }

    /// Starts it in the foreground. `program` is its path.
    pub(crate) fn command(self, program: &Path, site: &Site<'_>) -> Command {
        let mut command = Command::new(program);
        let (disk, store, socket) = (
            site.disk.display(),
            site.store.display(),
            site.socket.display(),
        );
        match self {
            Self::NbdsnapOrigin { .. } | Self::NbdsnapSnapshot { .. } => {
                command.args([
                    "serve",
                    &format!("disk={disk}"),
                    "--listen",
                    &format!("unix:{socket}"),
                ]);
                if let Some(chunk) = self.nbdsnap_chunk() {
                    command.args([
                        "--snapshot",
                        &format!("disk@s={store},chunk={}", chunk.text()),
                    ]);
                }
            }
            Self::NbdkitFile => {
                command
                    .args(["-f", "-U"])
                    .arg(site.socket)
                    .arg("file")
                    .arg(site.disk);
            }
            Self::NbdkitCow { chunk } => {
                command.args(["-f", "--filter=cow", "-U"]).arg(site.socket);
                command.arg("file").arg(site.disk);
                command.arg(format!("cow-block-size={}", chunk.text()));
            }
            Self::QemuRaw => qemu_nbd(&mut command, site.socket, "raw", site.disk),
            Self::QemuOverlay { .. } => qemu_nbd(&mut command, site.socket, "qcow2", site.store),
            Self::QemuCopyBeforeWrite => {
                command.args([
                    "--blockdev",
                    &format!("file,node-name=origin,filename={disk}"),
                ]);
                command.args([
                    "--blockdev",
                    &format!("file,node-name=target,filename={store}"),
                ]);
                command.args([
                    "--blockdev",
                    "copy-before-write,node-name=cbw,file=origin,target=target",
                ]);
                command.args(["--blockdev", "snapshot-access,node-name=frozen,file=cbw"]);
                command.args([
                    "--nbd-server",
                    &format!("addr.type=unix,addr.path={socket}"),
                ]);
                command.args([
                    "--export",
                    "nbd,id=live,node-name=cbw,name=disk,writable=on",
                ]);
                command.args(["--export", "nbd,id=frozen,node-name=frozen,name=snapshot"]);
            }
        }
        command
    }

    fn nbdsnap_chunk(self) -> Option<Chunk> {
        match self {
            Self::NbdsnapOrigin { snapshot } => snapshot,
            Self::NbdsnapSnapshot { chunk } => Some(chunk),
            _ => None,
        }
    }
}

/// Any number of connections, one after the other, through the page cache.
fn qemu_nbd(command: &mut Command, socket: &Path, format: &str, file: &Path) {
    command.args([
        "--persistent",
        "--shared=0",
        "--cache=writeback",
        "--aio=io_uring",
    ]);
    command
        .arg("--format")
        .arg(format)
        .arg("--socket")
        .arg(socket)
        .arg(file);
}
