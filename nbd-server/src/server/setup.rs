//! What the command line hands to the server: everything opened, checked,
//! locked and bound, so that starting to serve can no longer be refused.

use std::fs::File;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use nbdsnap_engine::{OnFull, Store};

use crate::control::protocol::Growth;
use crate::disks::{self, Past, Scratch, Taken};
use crate::io::{AutoExtend, Settings, VolumeAccess};
use crate::state::Records;

/// A disk or COW store that is open, locked and of known size.
#[derive(Debug)]
pub struct OpenDisk {
    /// The open file or block device; its lock lives as long as it does.
    pub file: File,
    /// Where it was found, for messages.
    pub path: PathBuf,
    /// Bytes.
    pub bytes: u64,
    /// A block device (it cannot grow, and has a logical block size).
    pub is_block_device: bool,
    /// The smallest unit of I/O that it takes: 512 for a file.
    pub logical_block: u32,
}

/// A snapshot that is to be served.
#[derive(Debug)]
pub struct OpenSnapshot {
    /// Its path within the volume, which says what it is of (`names`).
    pub name: String,
    /// Its COW store's device.
    pub disk: OpenDisk,
    /// Its exceptions.
    pub store: Store,
    /// True if the store was made just now: its instant is still to be taken.
    pub fresh: bool,
    /// Writes are refused with EPERM.
    pub read_only: bool,
    /// How far its file may grow, as it was asked for, in bytes.
    pub limit: Option<u64>,
    /// Its length, and what else is known of it.
    pub past: Past,
    /// How it behaves; none: as the server was told.
    pub behaviour: Option<Defaults>,
    /// What is to be done with its file when it is not used any more.
    pub scratch: Option<Scratch>,
}

/// A volume that is to be served: the export `name` and one `name@snapshot` each.
#[derive(Debug)]
pub struct OpenVolume {
    /// The export's name.
    pub name: String,
    /// The origin.
    pub disk: OpenDisk,
    /// What may change on its devices; writes to an origin that may not are refused
    /// with EPERM.
    pub access: VolumeAccess,
    /// Its snapshots.
    pub snapshots: Vec<OpenSnapshot>,
}

/// How snapshots behave unless it is said.
#[derive(Clone, Copy, Debug, Default)]
pub struct Defaults {
    /// What a write means that finds a store full.
    pub on_full: OnFull,
    /// Stores grow by themselves.
    pub auto_extend: Option<Growth>,
}

impl Defaults {
    /// What that means for a snapshot.
    pub(super) fn settings(&self, snapshot: &OpenSnapshot) -> Settings {
        let fixed = snapshot.disk.is_block_device;
        let auto_extend = self
            .auto_extend
            .filter(|_| !fixed)
            .map(|growth| AutoExtend {
                threshold: growth.threshold_percent,
                step: growth.step_percent,
                most_bytes: disks::all_it_needs(
                    snapshot.store.kind(),
                    snapshot.store.chunk_size(),
                    snapshot.past.bytes,
                ),
            });
        Settings {
            on_full: self.on_full,
            auto_extend,
        }
    }
}

/// A socket that is bound and listens.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// A Unix socket and its path, removed at the end.
    Unix(UnixListener, PathBuf),
}

/// All that the server needs.
#[derive(Debug)]
pub struct Setup {
    /// The volumes.
    pub volumes: Vec<OpenVolume>,
    /// Where clients come from.
    pub listeners: Vec<Listener>,
    /// Volume threads.
    pub threads: usize,
    /// Where orders come from: a Unix socket.
    pub control: Option<Listener>,
    /// The files that the volumes use.
    pub taken: Taken,
    /// What outlives the server. The change that these volumes are is committed
    /// once every new instant has been taken, before clients come.
    pub records: Records,
    /// How snapshots behave unless it is said.
    pub defaults: Defaults,
    /// A command for the shell, to be run for every event.
    pub on_event: Option<String>,
}
