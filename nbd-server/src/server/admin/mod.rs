//! The administrator: one thread that executes orders one after the other, and
//! owns the registry. What takes long to make (stores, checks) is made here,
//! before a volume is held; what a volume has to do is ordered from its thread,
//! with a deadline.

mod create;
mod refusal;
mod remove;
mod report;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::directory::Directory;
use super::registry::{Registry, VolumeEntry};
use crate::control::door::Office;
use crate::control::protocol::{Answer, Order, Outcome};
use crate::disks::Taken;
use crate::io::Shard;
use crate::state::admission::state_with;
use crate::state::files::SystemFiles;
use crate::state::keeper::{Change, Keeper};
use crate::state::record::State;
use refusal::Refused;

/// How often a thread that does not answer is looked after.
const LOOK_AFTER: Duration = Duration::from_millis(50);

/// What reaches the administrator.
enum Letter {
    Order(Order, oneshot::Sender<Outcome>),
    Stop,
}

/// A handle to the administrator's thread.
#[derive(Debug)]
pub(super) struct Admin {
    letters: Sender<Letter>,
    thread: JoinHandle<Registry>,
}

/// What the administrator works with.
#[derive(Debug)]
pub(super) struct Administrator {
    registry: Registry,
    taken: Taken,
    keeper: Keeper<SystemFiles>,
    directory: Arc<Directory>,
    shards: Arc<Vec<Shard>>,
}

impl Administrator {
    pub(super) fn new(
        registry: Registry,
        taken: Taken,
        keeper: Keeper<SystemFiles>,
        directory: Arc<Directory>,
        shards: Arc<Vec<Shard>>,
    ) -> Self {
        Self {
            registry,
            taken,
            keeper,
            directory,
            shards,
        }
    }

    /// Begin to execute orders.
    pub(super) fn start(self) -> std::io::Result<Admin> {
        let (letters, inbox) = channel();
        let builder = std::thread::Builder::new().name("administrator".into());
        let thread = builder.spawn(move || self.work(&inbox))?;
        Ok(Admin { letters, thread })
    }

    fn work(mut self, inbox: &Receiver<Letter>) -> Registry {
        while let Ok(letter) = inbox.recv() {
            match letter {
                Letter::Order(order, answer) => {
                    let outcome = match self.execute(order) {
                        Ok(answer) => Outcome::Done(answer),
                        Err(refused) => Outcome::Refused(refused.to_string()),
                    };
                    // Whoever asked may have gone.
                    let _ = answer.send(outcome);
                }
                Letter::Stop => break,
            }
        }
        self.registry
    }

    fn execute(&mut self, order: Order) -> Result<Answer, Refused> {
        match order {
            Order::SnapshotCreate(create) => self.create(&create),
            Order::SnapshotList(selection) => self.report_snapshots(&selection),
            Order::SnapshotRemove(remove) => self.remove(&remove),
            Order::VolumeList => self.report_volumes(),
        }
    }

    /// What the records should say: all that is served, and what a start could not
    /// serve.
    fn recorded(&self) -> State {
        let volumes = self.registry.volumes.iter();
        state_with(&self.keeper, volumes.map(VolumeEntry::record).collect())
    }

    /// Take a change back that comes to nothing.
    fn forget(&mut self, change: Change) {
        if let Err(error) = self.keeper.abandon(change) {
            tracing::error!("what was begun could not be taken back: {error}");
        }
    }

    /// Have clients see what the registry has.
    fn publish(&self) {
        let exports = self.registry.exports();
        self.directory
            .publish(exports.expect("names were checked when they came"));
    }

    /// Wait for a volume's thread.
    fn wait<T>(
        &self,
        shard: usize,
        answer: &Receiver<T>,
        until: Option<Instant>,
    ) -> Result<T, Refused> {
        loop {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            let wait = left.map_or(LOOK_AFTER, |left| left.min(LOOK_AFTER));
            match answer.recv_timeout(wait) {
                Ok(answer) => return Ok(answer),
                Err(RecvTimeoutError::Disconnected) => return Err(Refused::Stopping),
                Err(RecvTimeoutError::Timeout) => {
                    if self.shards[shard].has_ended() {
                        return Err(Refused::Stopping);
                    }
                    if left.is_some_and(|left| left.is_zero()) {
                        return Err(Refused::TooSlow);
                    }
                }
            }
        }
    }
}

impl Admin {
    /// Where orders are handed in.
    pub(super) fn office(&self) -> Arc<dyn Office> {
        Arc::new(Desk(self.letters.clone()))
    }

    /// It has ended, though nobody asked it to.
    pub(super) fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Finish the order that is being executed, refuse the others, and end.
    pub(super) fn stop(self) -> Option<Registry> {
        let _ = self.letters.send(Letter::Stop);
        self.thread.join().ok()
    }
}

/// Where orders are handed in.
struct Desk(Sender<Letter>);

impl Office for Desk {
    fn submit(&self, order: Order, answer: oneshot::Sender<Outcome>) {
        // Nobody there: the answer's sender is dropped, which says so.
        let _ = self.0.send(Letter::Order(order, answer));
    }
}
