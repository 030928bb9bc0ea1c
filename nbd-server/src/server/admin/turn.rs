//! An order's turn with the books. One thread has them at a time; while it waits for
//! a volume's thread for more than a moment, or makes and deletes stores, it lays them
//! down for the others, and takes them up again afterwards. What it has read in them does not outlive a wait:
//! the compiler sees to that. What it has claimed stays its own.

use std::ops::{Deref, DerefMut};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::Administrator;
use super::claims::{Claimed, Claims, Scope};
use super::refusal::Refused;
use crate::server::registry::VolumeEntry;
use crate::state::admission::state_with;
use crate::state::record::State;

/// How often a thread that does not answer is looked after.
const LOOK_AFTER: Duration = Duration::from_millis(50);
/// A volume that answers within this time has been waited for with the books in hand:
/// while it is held, nobody's files are in its way.
const MOMENT: Duration = Duration::from_millis(100);

/// What the threads share that execute orders.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) books: Mutex<Administrator>,
    pub(super) claims: Claims,
}

/// An order that is being executed.
#[derive(Debug)]
pub(super) struct Turn<'a> {
    shared: &'a Shared,
    /// None only while it waits.
    books: Option<MutexGuard<'a, Administrator>>,
    claimed: Claimed<'a>,
}

impl Shared {
    /// Wait for a turn with what `scope` names. `None`: no more orders are executed.
    pub(super) fn turn(&self, scope: Scope) -> Option<Turn<'_>> {
        let claimed = self.claims.claim(scope)?;
        Some(Turn {
            shared: self,
            books: Some(self.books()),
            claimed,
        })
    }

    /// The books, for a moment.
    pub(super) fn books(&self) -> MutexGuard<'_, Administrator> {
        self.books.lock().expect("no order panics")
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

impl Turn<'_> {
    /// What the records should say: what is claimed as it is served now, and all
    /// else as it was recorded. Others may be in the middle of a change.
    pub(super) fn recorded(&self) -> State {
        let volumes = self.registry.volumes.iter();
        let mine = volumes.filter(|volume| self.claimed.scope.has(&volume.name));
        state_with(&self.keeper, mine.map(VolumeEntry::record).collect())
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
