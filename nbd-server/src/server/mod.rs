//! The control plane: listeners, handshakes, exports and the hand-over of
//! connections to the threads that own the volumes.
//!
//! [`RunningServer::start`] takes a [`Setup`] in which everything is open,
//! checked and bound. It spreads the volumes over a few threads ([`Shard`]),
//! takes the instants of new snapshots, and only then begins to accept clients
//! on a thread of its own (`front`) and, where there is a control socket, orders,
//! which the administrator (`admin`) executes. [`RunningServer::stop`] goes the
//! other way.
//! [`run`] does both around the signals of a process; it is what the command
//! line calls.

mod admin;
mod directory;
mod front;
mod registry;
pub mod setup;
mod signals;
mod status;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use nbdsnap_engine::VolumeConfig;

use crate::control::door::Door;
use crate::disks::Origin;
use crate::io::{NewDisk, NewSnapshot, NewVolume, Shard, VolumeId};
use crate::nbd::export::{CatalogError, Export};
use crate::state::keeper::StateError;
use admin::{Admin, Administrator};
use directory::Directory;
use front::Front;
use nbdsnap_engine::View;
use registry::{Registry, SnapshotEntry, SnapshotFacts, Taken, VolumeEntry};
use setup::{Listener, OpenDisk, OpenVolume, Setup};

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
    /// The records of what the server has cannot be written.
    #[error(transparent)]
    State(#[from] StateError),
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
    directory: Arc<Directory>,
    shards: Arc<Vec<Shard>>,
    front: Front,
    admin: Admin,
    door: Option<Door>,
}

impl RunningServer {
    /// Start to serve. When this returns, every new snapshot's instant has been
    /// taken and clients are accepted.
    pub fn start(setup: Setup) -> Result<Self, ServerError> {
        let mut shards = Vec::new();
        for number in 0..setup.threads.max(1) {
            let shard = Shard::start(number).map_err(system("start a volume's thread"))?;
            shards.push(shard);
        }
        let moved_in = move_in(setup.volumes, &shards).and_then(|registry| {
            let exports = registry.exports()?;
            Ok((registry, exports))
        });
        let committed = match moved_in {
            Ok((registry, exports)) => setup
                .records
                .commit()
                .map(|keeper| (registry, exports, keeper))
                .map_err(ServerError::from),
            Err(error) => {
                setup.records.abandon();
                Err(error)
            }
        };
        let (registry, exports, keeper) = match committed {
            Ok(committed) => committed,
            Err(error) => {
                // Whatever has been begun is closed in order; the first error counts.
                let _ = end_shards(shards);
                return Err(error);
            }
        };
        let directory = Arc::new(Directory::default());
        directory.publish(exports);
        let shards = Arc::new(shards);
        let administrator = Administrator::new(
            registry,
            setup.taken,
            keeper,
            Arc::clone(&directory),
            Arc::clone(&shards),
        );
        let doors = open_doors(
            administrator,
            setup.listeners,
            setup.control,
            &directory,
            &shards,
        );
        match doors {
            Ok((admin, front, door)) => Ok(Self {
                directory,
                shards,
                front,
                admin,
                door,
            }),
            Err(error) => {
                let shards = Arc::into_inner(shards).expect("nobody else has begun");
                let _ = end_shards(shards);
                Err(error)
            }
        }
    }

    /// What is being served now: each volume, followed by its snapshots.
    pub fn exports(&self) -> Vec<Export> {
        self.directory.look().catalog.exports().to_vec()
    }

    /// A thread has ended, though nobody asked it to: stop the server.
    pub fn has_failed(&self) -> bool {
        self.shards.iter().any(Shard::has_ended) || self.admin.has_ended()
    }

    /// Finish the order that is being executed and take no more, accept no more
    /// clients, take no more requests (ESHUTDOWN), finish those in flight, commit
    /// and flush every store, and end. Clients that do not read their replies are
    /// given up after a few seconds.
    pub fn stop(self) -> Result<(), ServerError> {
        self.front.stop();
        let registry = self.admin.stop();
        if let Some(door) = self.door {
            door.close();
        }
        let failed = self.shards.iter().any(Shard::has_ended) || registry.is_none();
        let shards = Arc::into_inner(self.shards).expect("everybody has given the handle back");
        let ended = end_shards(shards);
        for volume in registry.into_iter().flat_map(|registry| registry.volumes) {
            discard_scratch(volume);
        }
        ended?;
        if failed {
            Err(ServerError::ThreadEnded)
        } else {
            Ok(())
        }
    }
}

/// Let clients and orders in. If one thing fails, what was begun ends.
fn open_doors(
    administrator: Administrator,
    listeners: Vec<Listener>,
    control: Option<Listener>,
    directory: &Arc<Directory>,
    shards: &Arc<Vec<Shard>>,
) -> Result<(Admin, Front, Option<Door>), ServerError> {
    let admin = administrator
        .start()
        .map_err(system("start the administrator's thread"))?;
    let front = match Front::start(listeners, Arc::clone(directory), Arc::clone(shards)) {
        Ok(front) => front,
        Err(error) => {
            admin.stop();
            return Err(system("accept clients")(error));
        }
    };
    let door = match control {
        Some(Listener::Unix(listener, path)) => match Door::open(listener, path, admin.office()) {
            Ok(door) => Some(door),
            Err(error) => {
                front.stop();
                admin.stop();
                return Err(system("take orders")(error));
            }
        },
        Some(Listener::Tcp(_)) => unreachable!("orders come through a Unix socket"),
        None => None,
    };
    Ok((admin, front, door))
}

fn discard_scratch(volume: VolumeEntry) {
    let files = volume.snapshots.into_iter().filter_map(|one| one.scratch);
    for file in files {
        if let Err(error) = file.discard() {
            tracing::warn!("a transient store could not be emptied: {error}");
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

/// Move every volume to its thread, and learn what its snapshots are called there.
fn move_in(volumes: Vec<OpenVolume>, shards: &[Shard]) -> Result<Registry, ServerError> {
    let mut answers = Vec::new();
    let share = COPY_MEMORY / volumes.len().max(1) as u64;
    let copy_memory = share.clamp(COPY_PIECE, COPY_MEMORY_OF_ONE);
    for (number, mut volume) in volumes.into_iter().enumerate() {
        let shard = number % shards.len();
        let id = VolumeId(number as u32);
        let facts: Vec<(SnapshotFacts, bool)> = volume
            .snapshots
            .iter_mut()
            .map(|snapshot| (SnapshotFacts::of(snapshot), snapshot.fresh))
            .collect();
        let entry = VolumeEntry {
            name: volume.name.clone(),
            id,
            shard,
            origin: Origin {
                path: registry::absolute(&volume.disk.path),
                ..Origin::of(&volume.disk, volume.read_only)
            },
            is_block_device: volume.disk.is_block_device,
            snapshots: Vec::new(),
        };
        let answer = shards[shard].host(new_volume(id, volume, copy_memory));
        answers.push((entry, facts, answer));
    }
    let mut registry = Registry::default();
    for (mut entry, facts, answer) in answers {
        let views = answer.recv().map_err(|_| ServerError::ThreadEnded)?;
        let views = views.map_err(ServerError::SnapshotNotTaken)?;
        for (view, (mut facts, fresh)) in views.into_iter().zip(facts) {
            facts.read_only |= entry.origin.read_only;
            let View::Snapshot(id) = view else {
                unreachable!("a snapshot is no origin");
            };
            let taken = if fresh {
                Taken::AtStart(registry::now())
            } else {
                Taken::Before
            };
            let bytes = entry.origin.bytes;
            let snapshot = SnapshotEntry::new(id, bytes, taken, facts);
            entry.snapshots.push(snapshot);
        }
        registry.volumes.push(entry);
    }
    Ok(registry)
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
