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
pub mod events;
mod front;
mod moving;
mod on_event;
mod registry;
pub mod setup;
mod signals;
mod status;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use crate::control::door::Door;
use crate::io::{Herald, Shard};
use crate::nbd::export::{CatalogError, Export};
use crate::state::files::SystemFiles;
use crate::state::keeper::{Keeper, StateError};
use admin::{Admin, Administrator, Mailroom, Outfit};
use directory::Directory;
use events::Events;
use front::Front;
use on_event::Runner;
use setup::{Listener, Setup};

pub use signals::run;
pub use status::SnapshotStatus;

/// Clients get this long to read their last replies when the server stops.
const PARTING: Duration = Duration::from_secs(3);
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
    runner: Option<Runner>,
}

impl RunningServer {
    /// Start to serve. When this returns, every new snapshot's instant has been
    /// taken and clients are accepted.
    pub fn start(setup: Setup) -> Result<Self, ServerError> {
        let events = Arc::new(Events::default());
        let mailroom = Mailroom::default();
        let mut shards = Vec::new();
        for number in 0..setup.threads.max(1) {
            let herald: Arc<dyn Herald> = Arc::new(mailroom.herald(Arc::clone(&events)));
            let shard = Shard::start(number, herald).map_err(system("start a volume's thread"))?;
            shards.push(shard);
        }
        let moved_in = moving::all(setup.volumes, &shards, &setup.defaults).and_then(|registry| {
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
            Outfit {
                taken: setup.taken,
                defaults: setup.defaults,
            },
            Arc::clone(&directory),
            Arc::clone(&shards),
            Arc::clone(&events),
            mailroom,
        );
        let runner = match setup.on_event.map(|command| Runner::start(events, command)) {
            None => None,
            Some(Ok(runner)) => Some(runner),
            Some(Err(error)) => {
                drop(administrator);
                let shards = Arc::into_inner(shards).expect("nobody else has begun");
                let _ = end_shards(shards);
                return Err(system("start the thread of --on-event")(error));
            }
        };
        let doors = open_doors(
            (administrator, keeper),
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
                runner,
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
            volume.discard_scratch();
        }
        if let Some(runner) = self.runner {
            runner.stop();
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
    (administrator, keeper): (Administrator, Keeper<SystemFiles>),
    listeners: Vec<Listener>,
    control: Option<Listener>,
    directory: &Arc<Directory>,
    shards: &Arc<Vec<Shard>>,
) -> Result<(Admin, Front, Option<Door>), ServerError> {
    let admin = administrator
        .start(keeper)
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
