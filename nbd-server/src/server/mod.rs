//! The control plane: listeners, handshakes, exports and the hand-over of
//! connections to the threads that own the volumes.
//!
//! [`RunningServer::start`] takes a [`Setup`] in which everything is open,
//! checked and bound. It spreads the volumes over a few threads ([`Shard`]),
//! takes the instants of new snapshots, and only then begins to accept clients
//! on a thread of its own (`front`). [`RunningServer::stop`] goes the other way.
//! [`run`] does both around the signals of a process; it is what the command
//! line calls.

mod catalog;
mod front;
pub mod setup;
mod signals;
mod status;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use nbdsnap_engine::VolumeConfig;

use crate::io::{NewDisk, NewSnapshot, NewVolume, Shard, VolumeId};
use crate::nbd::export::{Catalog, CatalogError, Export};
use front::{Front, Routes};
use setup::{OpenDisk, OpenVolume, Setup};

pub use signals::run;
pub use status::SnapshotStatus;

/// Clients get this long to read their last replies when the server stops.
const PARTING: Duration = Duration::from_secs(3);
/// Memory for old chunks on their way, shared out to all volumes in equal parts.
const COPY_MEMORY: u64 = 256 << 20;
/// A volume has this much of it at most, and [`COPY_PIECE`] at least.
const COPY_MEMORY_OF_ONE: u64 = 64 << 20;
/// The largest piece in which old chunks are copied.
const COPY_PIECE: u64 = 1 << 20;

/// Why a server cannot start, or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The exports' names cannot be served.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// The operating system refused something that every server needs.
    #[error("cannot {what}: {error}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The answer.
        error: std::io::Error,
    },
    /// A new snapshot's instant could not be taken.
    #[error("the snapshot {0} could not be taken: its disk or its origin's failed; see the log")]
    SnapshotNotTaken(String),
    /// A thread that owns volumes has ended in the middle of its work.
    #[error("a volume's thread has ended unexpectedly: this is a bug; no more requests are served")]
    ThreadEnded,
    /// Closing could not make everything durable.
    #[error(
        "not everything could be flushed: the last writes may be lost; check the disks and the kernel's log"
    )]
    NotDurable,
}

fn system(what: &'static str) -> impl FnOnce(std::io::Error) -> ServerError {
    move |error| ServerError::System { what, error }
}

/// A server at work in this process. Dropped without [`RunningServer::stop`] it
/// leaves its threads to the end of the process.
#[derive(Debug)]
pub struct RunningServer {
    catalog: Arc<Catalog>,
    shards: Arc<Vec<Shard>>,
    front: Front,
}

impl RunningServer {
    /// Start to serve. When this returns, every new snapshot's instant has been
    /// taken and clients are accepted.
    pub fn start(setup: Setup) -> Result<Self, ServerError> {
        let catalog = Arc::new(catalog::of(&setup.volumes)?);
        let mut shards = Vec::new();
        for number in 0..setup.threads.max(1) {
            let shard = Shard::start(number).map_err(system("start a volume's thread"))?;
            shards.push(shard);
        }
        let routes = match move_in(setup.volumes, &shards) {
            Ok(routes) => routes,
            Err(error) => {
                // Whatever has been begun is closed in order; the first error counts.
                let _ = end_shards(shards);
                return Err(error);
            }
        };
        let shards = Arc::new(shards);
        let front = Front::start(
            setup.listeners,
            Arc::clone(&catalog),
            routes,
            Arc::clone(&shards),
        );
        let front = match front {
            Ok(front) => front,
            Err(error) => {
                let shards = Arc::into_inner(shards).expect("the front has not begun");
                let _ = end_shards(shards);
                return Err(system("accept clients")(error));
            }
        };
        Ok(Self {
            catalog,
            shards,
            front,
        })
    }

    /// What is being served, in the order of the setup.
    pub fn exports(&self) -> &[Export] {
        self.catalog.exports()
    }

    /// A thread has ended, though nobody asked it to: stop the server.
    pub fn has_failed(&self) -> bool {
        self.shards.iter().any(Shard::has_ended)
    }

    /// Accept no more clients, take no more requests (ESHUTDOWN), finish those in
    /// flight, commit and flush every store, and end. Clients that do not read
    /// their replies are given up after a few seconds.
    pub fn stop(self) -> Result<(), ServerError> {
        self.front.stop();
        let failed = self.shards.iter().any(Shard::has_ended);
        let shards = Arc::into_inner(self.shards).expect("the front has given its handle back");
        end_shards(shards)?;
        if failed {
            Err(ServerError::ThreadEnded)
        } else {
            Ok(())
        }
    }
}

fn end_shards(shards: Vec<Shard>) -> Result<(), ServerError> {
    for shard in &shards {
        shard.stop(PARTING);
    }
    let ends: Vec<bool> = shards.into_iter().map(Shard::join).collect();
    let durable = ends.into_iter().all(|durable| durable);
    if durable {
        Ok(())
    } else {
        Err(ServerError::NotDurable)
    }
}

/// Move every volume to its thread, and learn where its exports lead.
fn move_in(volumes: Vec<OpenVolume>, shards: &[Shard]) -> Result<Routes, ServerError> {
    let mut answers = Vec::new();
    let share = COPY_MEMORY / volumes.len().max(1) as u64;
    let copy_memory = share.clamp(COPY_PIECE, COPY_MEMORY_OF_ONE);
    for (number, volume) in volumes.into_iter().enumerate() {
        let shard = number % shards.len();
        let id = VolumeId(number as u32);
        let read_only: Vec<bool> = std::iter::once(volume.read_only)
            .chain(
                volume
                    .snapshots
                    .iter()
                    .map(|snapshot| volume.read_only || snapshot.read_only),
            )
            .collect();
        let answer = shards[shard].host(new_volume(id, volume, copy_memory));
        answers.push((shard, id, read_only, answer));
    }
    let mut routes = Routes::default();
    for (shard, id, read_only, answer) in answers {
        let views = answer.recv().map_err(|_| ServerError::ThreadEnded)?;
        let views = views.map_err(ServerError::SnapshotNotTaken)?;
        routes.add(shard, id, &views, &read_only);
    }
    Ok(routes)
}

fn new_volume(id: VolumeId, volume: OpenVolume, copy_memory: u64) -> NewVolume {
    NewVolume {
        id,
        name: volume.name,
        config: VolumeConfig {
            origin_bytes: volume.disk.bytes,
            copy_memory,
            copy_piece: COPY_PIECE,
        },
        disk: new_disk(volume.disk),
        read_only: volume.read_only,
        snapshots: volume
            .snapshots
            .into_iter()
            .map(|snapshot| NewSnapshot {
                name: snapshot.name,
                store: snapshot.store,
                disk: new_disk(snapshot.disk),
                fresh: snapshot.fresh,
            })
            .collect(),
    }
}

fn new_disk(disk: OpenDisk) -> NewDisk {
    NewDisk {
        file: disk.file,
        is_block_device: disk.is_block_device,
    }
}
