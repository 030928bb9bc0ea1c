//! An order's turn with the books. One thread has them at a time; while it waits for
//! a volume's thread for more than a moment, or works on files, it lays them down for
//! the others, and takes them up again afterwards. What it has read in them does not
//! outlive a wait: the compiler sees to that. What it has claimed stays its own.

use std::ops::{Deref, DerefMut};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::Administrator;
use super::adding::{Additions, Gate};
use super::claims::{Claimed, Claims, Scope};
use super::refusal::Refused;
use crate::disks::shown;
use crate::io::Loss;
use crate::server::registry::VolumeEntry;
use crate::state::admission::state_with;
use crate::state::files::SystemFiles;
use crate::state::keeper::{Change, Keeper};
use crate::state::record::{IntentFile, State, VolumeRecord};

/// How often a thread that does not answer is looked after.
const LOOK_AFTER: Duration = Duration::from_millis(50);
/// A volume that answers within this time has been waited for with the books in hand,
/// so that nobody keeps it waiting for them while it is held.
const MOMENT: Duration = Duration::from_millis(100);

/// What the threads share that execute orders.
#[derive(Debug)]
pub(super) struct Shared {
    books: Mutex<Administrator>,
    /// Taken while the books are in hand or not; never the books after it.
    records: Mutex<Keeper<SystemFiles>>,
    pub(super) claims: Arc<Claims>,
    /// Orders to add volumes, and who executes them.
    pub(super) additions: Additions,
}

/// An order that is being executed.
#[derive(Debug)]
pub(super) struct Turn<'a> {
    shared: &'a Shared,
    /// None only while it waits, or works aside.
    books: Option<MutexGuard<'a, Administrator>>,
    claimed: Claimed,
    /// Of an order that adds volumes: opened when it waits for long.
    gate: Option<Gate<'a>>,
}

impl Shared {
    /// Nothing has been claimed yet.
    pub(super) fn new(books: Administrator, records: Keeper<SystemFiles>) -> Self {
        Self {
            books: Mutex::new(books),
            records: Mutex::new(records),
            claims: Arc::default(),
            additions: Additions::default(),
        }
    }

    /// Wait for a turn with what `scope` names. `None`: no more orders are executed.
    pub(super) fn turn(&self, scope: Scope) -> Option<Turn<'_>> {
        let claimed = self.claims.claim(scope)?;
        Some(self.turn_with(claimed, None))
    }

    /// A turn with what was claimed before.
    pub(super) fn turn_with<'a>(&'a self, claimed: Claimed, gate: Option<Gate<'a>>) -> Turn<'a> {
        Turn {
            shared: self,
            books: Some(self.books()),
            claimed,
            gate,
        }
    }

    /// The books, when there are no more orders.
    pub(super) fn into_books(self) -> Administrator {
        self.books.into_inner().expect("no order panics")
    }

    /// The books, for a moment.
    pub(super) fn books(&self) -> MutexGuard<'_, Administrator> {
        self.books.lock().expect("no order panics")
    }

    /// The records.
    pub(super) fn records(&self) -> MutexGuard<'_, Keeper<SystemFiles>> {
        self.records.lock().expect("no order panics")
    }

    /// Write a loss down in the list of the disk's stores (durability.md, rule 6).
    pub(super) fn mark_lost(&self, loss: Loss) {
        let place = self.books().place_of(&loss);
        let Some((disk, cow)) = place else {
            return;
        };
        match self.records().mark_lost(&disk, &cow) {
            Ok(true) => loss.marked(),
            Ok(false) => tracing::error!("{}: its disk does not list it", shown(&cow)),
            Err(error) => tracing::error!("the loss of a snapshot is not marked: {error}"),
        }
    }
}

impl Deref for Turn<'_> {
    type Target = Administrator;

    fn deref(&self) -> &Administrator {
        self.books.as_ref().expect("it does not wait")
    }
}

impl DerefMut for Turn<'_> {
    fn deref_mut(&mut self) -> &mut Administrator {
        self.books.as_mut().expect("it does not wait")
    }
}

impl<'a> Turn<'a> {
    /// The records.
    pub(super) fn records(&self) -> MutexGuard<'a, Keeper<SystemFiles>> {
        self.shared.records()
    }

    /// Where it is seen that the server stops, and whoever waits for long should not.
    pub(super) fn claims(&self) -> Arc<Claims> {
        Arc::clone(&self.shared.claims)
    }

    /// Begin a change of the records: what is claimed as it is served now, and edited;
    /// all else as it is recorded, for others may be in the middle of a change.
    pub(super) fn begin_change(
        &mut self,
        edit: impl FnOnce(&mut State),
        files: Vec<IntentFile>,
    ) -> Result<Change, Refused> {
        let volumes = self.registry.volumes.iter();
        let mine = volumes.filter(|volume| self.claimed.has(&volume.name));
        let mine: Vec<VolumeRecord> = mine.map(VolumeEntry::record).collect();
        let begun = self.aside(|shared| {
            let mut records = shared.records();
            let mut next = state_with(&records, mine);
            edit(&mut next);
            records.begin(next, files)
        });
        Ok(begun?)
    }

    /// The same of a change that has been begun, which is committed too.
    pub(super) fn amend_and_commit(
        &mut self,
        change: &mut Change,
        edit: impl FnOnce(&mut State),
    ) -> Result<(), Refused> {
        let amended = self.aside(|shared| {
            let mut records = shared.records();
            let mut next = records.state().clone();
            edit(&mut next);
            records.amend(change, next)?;
            records.commit(change)
        });
        Ok(amended?)
    }

    /// Record a change that makes no file, before it takes effect.
    pub(super) fn record(&mut self, edit: impl FnOnce(&mut State)) -> Result<(), Refused> {
        let change = self.commit_change(edit, Vec::new())?;
        self.finish(change)
    }

    /// The same, of a change that gives files up; [`Turn::finish`] deletes them.
    pub(super) fn commit_change(
        &mut self,
        edit: impl FnOnce(&mut State),
        given_up: Vec<IntentFile>,
    ) -> Result<Change, Refused> {
        let mut change = self.begin_change(edit, given_up)?;
        match self.commit(&mut change) {
            Ok(()) => Ok(change),
            Err(refused) => {
                self.forget(change);
                Err(refused)
            }
        }
    }

    /// A change takes effect.
    pub(super) fn commit(&mut self, change: &mut Change) -> Result<(), Refused> {
        Ok(self.aside(|shared| shared.records().commit(change))?)
    }

    /// Everything that follows from a commit has happened.
    pub(super) fn finish(&mut self, change: Change) -> Result<(), Refused> {
        Ok(self.aside(|shared| shared.records().finish(change))?)
    }

    /// Take a change back that comes to nothing.
    pub(super) fn forget(&mut self, change: Change) {
        if let Err(error) = self.aside(|shared| shared.records().abandon(change)) {
            tracing::error!("what was begun could not be taken back: {error}");
        }
    }

    /// Do something that may take long without the books, which `work` may borrow for
    /// a moment.
    pub(super) fn aside<T>(&mut self, work: impl FnOnce(&Shared) -> T) -> T {
        self.books = None;
        let done = work(self.shared);
        self.books = Some(self.shared.books());
        done
    }

    /// Wait for a volume's thread.
    pub(super) fn wait<T>(
        &mut self,
        shard: usize,
        answer: &Receiver<T>,
        until: Option<Instant>,
    ) -> Result<T, Refused> {
        let shards = Arc::clone(&self.shards);
        let moment = Instant::now() + MOMENT;
        loop {
            let now = Instant::now();
            if now >= moment {
                self.books = None;
                self.gate = None;
            }
            let left = until.map(|until| until.saturating_duration_since(now));
            let wait = left.map_or(LOOK_AFTER, |left| left.min(LOOK_AFTER));
            let outcome = match answer.recv_timeout(wait) {
                Ok(answer) => Ok(answer),
                Err(RecvTimeoutError::Disconnected) => Err(Refused::Stopping),
                Err(RecvTimeoutError::Timeout) if shards[shard].has_ended() => {
                    Err(Refused::Stopping)
                }
                Err(RecvTimeoutError::Timeout) if left.is_some_and(|left| left.is_zero()) => {
                    Err(Refused::TooSlow)
                }
                Err(RecvTimeoutError::Timeout) => continue,
            };
            let shared = self.shared;
            self.books.get_or_insert_with(|| shared.books());
            return outcome;
        }
    }
}
