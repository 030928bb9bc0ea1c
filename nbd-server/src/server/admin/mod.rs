//! The administrator: a thread that has orders executed, each on a thread of its own,
//! and the books: the registry and the files in use. Whoever has the books works alone
//! ([`turn`]); an order that waits for long, for a volume or a disk, lays them down, so
//! that looks, clients' ends and orders on other volumes do not wait behind it, while
//! those on the same volume do ([`claims`]). Records are kept beside the books. Volumes
//! that are to be added by orders which come at once are added together ([`adding`]).
//! What takes long to make (stores, checks) is made before a volume is held; what a
//! volume has to do is ordered from its thread, with a deadline.

mod adding;
mod claims;
mod clients;
mod create;
mod dm;
mod merge;
mod refusal;
mod remove;
mod rename;
mod report;
mod reset;
mod resize;
mod suspend;
#[cfg(test)]
mod tests;
mod turn;
mod volumes;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{JoinHandle, Scope as Threads};
use std::time::Instant;

use tokio::sync::oneshot;

use super::directory::Directory;
use super::events::{Events, event_of};
use super::registry::Registry;
use super::setup::Defaults;
use crate::control::door::Office;
use crate::control::protocol::{
    Answer, EventKind, EventReport, Order, Outcome, SnapshotName, VolumeRemove,
};
use crate::disks::Taken;
use crate::io::{Herald, Loss, News, Shard, What};
use crate::state::files::SystemFiles;
use crate::state::keeper::Keeper;
use crate::state::place::settled;
use adding::Addition;
use claims::Scope;
use dm::DmDisks;
use refusal::Refused;
use turn::{Shared, Turn};

/// What reaches the administrator.
#[derive(Debug)]
enum Letter {
    Order(Order, oneshot::Sender<Outcome>),
    /// Something has happened that the registry has to follow.
    News(News),
    /// A snapshot is lost, and the list of its disk's stores is to say so.
    Loss(Loss),
    /// An order has ended: it may have left something to be done in time.
    Ended,
    /// An order has panicked: nobody knows what the books say any more.
    Broken,
    Stop,
}

/// A handle to the administrator's thread.
#[derive(Debug)]
pub(super) struct Admin {
    letters: Sender<Letter>,
    thread: JoinHandle<Registry>,
    events: Arc<Events>,
}

/// What the administrator works with.
#[derive(Debug)]
pub(super) struct Administrator {
    registry: Registry,
    taken: Taken,
    directory: Arc<Directory>,
    shards: Arc<Vec<Shard>>,
    events: Arc<Events>,
    /// How many volumes there have been: they are never called the same.
    volumes: u32,
    mailroom: Mailroom,
    /// How snapshots behave unless it is said.
    defaults: Defaults,
    /// The disks under mapped devices.
    dm: DmDisks,
}

/// What an administrator is given to begin with.
#[derive(Debug)]
pub(super) struct Outfit {
    /// The files that are used.
    pub(super) taken: Taken,
    /// How snapshots behave unless it is said.
    pub(super) defaults: Defaults,
}

/// Where letters arrive, from before the administrator is there.
#[derive(Debug)]
pub(super) struct Mailroom {
    letters: Sender<Letter>,
    inbox: Receiver<Letter>,
}

impl Default for Mailroom {
    fn default() -> Self {
        let (letters, inbox) = channel();
        Self { letters, inbox }
    }
}

impl Mailroom {
    /// For a volume's thread: tells followers of events and, where the registry
    /// has to follow, the administrator.
    pub(super) fn herald(&self, events: Arc<Events>) -> impl Herald + use<> {
        Crier {
            events,
            letters: self.letters.clone(),
        }
    }
}

#[derive(Debug)]
struct Crier {
    events: Arc<Events>,
    letters: Sender<Letter>,
}

impl Herald for Crier {
    fn tell(&self, news: News) {
        if let Some(event) = event_of(&news) {
            self.events.publish(event);
        }
        if matches!(news.what, What::Merged | What::ClientWent { .. }) {
            // Nobody there: the server is stopping.
            let _ = self.letters.send(Letter::News(news));
        }
    }

    fn mark_lost(&self, loss: Loss) {
        // Nobody there: it answers for itself when it is dropped.
        let _ = self.letters.send(Letter::Loss(loss));
    }
}

impl Administrator {
    pub(super) fn new(
        registry: Registry,
        outfit: Outfit,
        directory: Arc<Directory>,
        shards: Arc<Vec<Shard>>,
        events: Arc<Events>,
        mailroom: Mailroom,
    ) -> Self {
        let Outfit { taken, defaults } = outfit;
        Self {
            volumes: registry.volumes.len() as u32,
            registry,
            taken,
            directory,
            shards,
            events,
            mailroom,
            defaults,
            dm: DmDisks::default(),
        }
    }

    /// Begin to execute orders.
    pub(super) fn start(mut self, keeper: Keeper<SystemFiles>) -> std::io::Result<Admin> {
        let letters = self.mailroom.letters.clone();
        let mailroom = std::mem::take(&mut self.mailroom);
        let events = Arc::clone(&self.events);
        let shared = Shared::new(self, keeper);
        let builder = std::thread::Builder::new().name("administrator".into());
        let thread = builder.spawn(move || {
            std::thread::scope(|threads| work(&shared, &mailroom, threads));
            shared.into_books().registry
        })?;
        Ok(Admin {
            letters,
            thread,
            events,
        })
    }

    /// The disk and the store of a loss.
    fn place_of(&self, loss: &Loss) -> Option<(PathBuf, PathBuf)> {
        let volumes = &self.registry.volumes;
        let volume = volumes.iter().find(|volume| volume.id == loss.volume)?;
        let mut entries = volume.snapshots.iter();
        let entry = entries.find(|entry| entry.id == loss.snapshot)?;
        Some((settled(&volume.origin.path), settled(&entry.cow)))
    }

    /// Have clients see what the registry has.
    fn publish(&self) {
        let exports = self.registry.exports();
        self.directory
            .publish(exports.expect("names were checked when they came"));
    }

    /// Tell followers of what has happened to a snapshot.
    fn tell(&self, event: EventKind, name: &SnapshotName) {
        let event = EventReport::new(event).of_volume(&name.volume);
        self.events.publish(event.of_snapshot(&name.snapshot));
    }
}

impl Turn<'_> {
    fn execute(&mut self, order: Order) -> Result<Answer, Refused> {
        if let Some(done) = self.on_mapped(&order) {
            return done;
        }
        match order {
            Order::SnapshotCreate(create) => self.create(&create),
            Order::SnapshotList(selection) => self.report_snapshots(&selection),
            Order::SnapshotRemove(remove) => self.remove(&remove),
            Order::SnapshotExtend(extend) => self.extend(&extend),
            Order::Suspend(suspend) => self.suspend(&suspend),
            Order::Resume(resume) => self.resume(&resume),
            Order::VolumeResize(resize) => self.resize(&resize),
            Order::SnapshotMerge(merge) => self.merge(&merge),
            Order::SnapshotCancel(cancel) => self.cancel(&cancel),
            Order::SnapshotRename(rename) => self.rename(&rename),
            Order::SnapshotReset(reset) => self.reset(&reset),
            Order::VolumeList => self.report_volumes(&|_| true),
            Order::VolumeAdd(_) | Order::VolumesAdd(_) => unreachable!("they go in groups"),
            Order::VolumeRemove(VolumeRemove { name, force }) => {
                self.remove_volumes(&[name], force)
            }
            Order::VolumesRemove(remove) => self.remove_volumes(&remove.names, remove.force),
            Order::Clients => self.report_clients(),
            Order::Disconnect(disconnect) => self.disconnect(&disconnect),
            Order::Events(_) => unreachable!("the door answers it by itself"),
            Order::Dm(order) => self.dm(order),
        }
    }
}

/// Have everything done that comes, until it is to stop and all orders have ended.
fn work<'scope>(shared: &'scope Shared, mailroom: &Mailroom, threads: &'scope Threads<'scope, '_>) {
    while let Some(letter) = next_letter(shared, mailroom) {
        match letter {
            Letter::Order(order, answer) => {
                in_a_thread(threads, mailroom, move || shared.execute(order, answer));
            }
            Letter::News(news) => {
                let concerned = shared.books().concerned(&news);
                if let Some(volume) = concerned {
                    in_a_thread(threads, mailroom, move || {
                        if let Some(mut turn) = shared.turn(Scope::volume(&volume)) {
                            turn.hear(&news);
                        }
                    });
                }
            }
            Letter::Loss(loss) => in_a_thread(threads, mailroom, move || shared.mark_lost(loss)),
            Letter::Ended => {}
            Letter::Broken => panic!("an order has panicked"),
            Letter::Stop => break,
        }
    }
    shared.claims.close();
}

impl Shared {
    /// Execute an order and answer it, unless the server is stopping.
    fn execute(&self, order: Order, answer: oneshot::Sender<Outcome>) {
        let scope = Scope::of(&order);
        let order = match Addition::of(order) {
            Ok(volumes) => return self.add(scope, volumes, answer),
            Err(order) => order,
        };
        if let Some(mut turn) = self.turn(scope) {
            let outcome = outcome(turn.execute(order));
            drop(turn);
            // Whoever asked may have gone.
            let _ = answer.send(outcome);
        }
    }
}

fn outcome(ended: Result<Answer, Refused>) -> Outcome {
    match ended {
        Ok(answer) => Outcome::Done(answer),
        Err(refused) => Outcome::Refused(refused.to_string()),
    }
}

/// The next letter; `None`: there will be no more. Meanwhile volumes go on that are to.
fn next_letter(shared: &Shared, mailroom: &Mailroom) -> Option<Letter> {
    loop {
        let at = shared.books().next_resumption();
        let Some(at) = at else {
            return mailroom.inbox.recv().ok();
        };
        let left = at.saturating_duration_since(Instant::now());
        match mailroom.inbox.recv_timeout(left) {
            Ok(letter) => return Some(letter),
            Err(RecvTimeoutError::Timeout) => shared.books().resume_in_time(),
            Err(RecvTimeoutError::Disconnected) => return None,
        }
    }
}

/// Do what may have to wait.
fn in_a_thread<'scope>(
    threads: &'scope Threads<'scope, '_>,
    mailroom: &Mailroom,
    what: impl FnOnce() + Send + 'scope,
) {
    let end = End(mailroom.letters.clone());
    let builder = std::thread::Builder::new().name("order".into());
    let begun = builder.spawn_scoped(threads, move || {
        let _end = end;
        what();
    });
    if let Err(error) = begun {
        tracing::error!("an order cannot be executed: {error}");
    }
}

/// Tells of the end of a thread, however it comes.
struct End(Sender<Letter>);

impl Drop for End {
    fn drop(&mut self) {
        let _ = self.0.send(if std::thread::panicking() {
            Letter::Broken
        } else {
            Letter::Ended
        });
    }
}

impl Admin {
    /// Where orders are handed in.
    pub(super) fn office(&self) -> Arc<dyn Office> {
        Arc::new(Desk {
            letters: self.letters.clone(),
            events: Arc::clone(&self.events),
        })
    }

    /// It has ended, though nobody asked it to.
    pub(super) fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Finish the orders that are being executed, refuse the others, and end.
    pub(super) fn stop(self) -> Option<Registry> {
        let _ = self.letters.send(Letter::Stop);
        self.thread.join().ok()
    }
}

/// Where orders are handed in.
struct Desk {
    letters: Sender<Letter>,
    events: Arc<Events>,
}

impl Office for Desk {
    fn submit(&self, order: Order, answer: oneshot::Sender<Outcome>) {
        // Nobody there: the answer's sender is dropped, which says so.
        let _ = self.letters.send(Letter::Order(order, answer));
    }

    fn events(&self) -> &Events {
        &self.events
    }
}
