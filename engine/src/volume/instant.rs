//! The instants of snapshots: the moments whose content they show. An instant is
//! for one snapshot or for several of this volume, and a caller that holds
//! several volumes at once makes one instant of theirs.
//!
//! It is prepared while the origin's clients go on (a first flush), then new
//! changes of the origin are held, those under way end, and what they left is
//! flushed. From then on until it is taken or abandoned nothing changes the
//! origin. Only the operations themselves are waited for: a write that still
//! waits for its turn, for copies or for room has not begun, and is held before
//! it does.

use super::active::RequestKey;
use super::flush::Waiter;
use super::lifecycle::Phase;
use super::task::Work;
use super::{Event, Volume};
use crate::request::SnapshotId;
use crate::snapshot::State;
use crate::store::Store;

/// Names an instant. Never used again within a volume's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InstantId(pub u32);

/// The instant is not held: it has not come so far, or it is gone (taken,
/// abandoned, or failed: an event says that).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the instant is not held")]
pub struct NotHeld;

/// An instant that has not been taken.
#[derive(Debug)]
pub(crate) struct Instant {
    id: InstantId,
    snapshots: Vec<SnapshotId>,
    taking: Taking,
    step: Step,
}

/// Who takes an instant once it is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taking {
    /// It does so by itself: [`Volume::create_snapshot`].
    AtOnce,
    /// The caller: [`Volume::begin_instant`].
    WhenTold,
}

#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Waits for the one before it.
    Queued,
    /// The origin is flushed while its clients go on, so that the second flush
    /// finds little to do. With the count of changes when it was asked for.
    FirstFlush(u64),
    /// New origin writes are held; those under way end.
    Draining(u64),
    /// The origin is flushed, and nobody writes to it.
    SecondFlush,
    /// It can be taken.
    Held,
}

impl Volume {
    /// Take a snapshot now, into a store that was made for it: an instant of its
    /// own that is taken by itself. What was answered before this call is in the
    /// snapshot; what is handed in after [`Event::Created`] is not. Ends with that
    /// event or with [`Event::CreateFailed`].
    pub fn create_snapshot(&mut self, store: Store) -> SnapshotId {
        let (_, snapshots) = self.prepare_instant(vec![store], Taking::AtOnce);
        snapshots[0]
    }

    /// Prepare one instant for several snapshots of this volume, in stores that
    /// were made for them. Ends with [`Event::Held`]: from then on nothing changes
    /// the origin, until [`Volume::take_instant`] or [`Volume::abandon_instant`].
    /// Or with [`Event::InstantFailed`]: the disk failed or the volume closes, the
    /// snapshots' ids are gone and nothing is held. Instants are held one at a
    /// time, in the order in which they were begun.
    pub fn begin_instant(&mut self, stores: Vec<Store>) -> (InstantId, Vec<SnapshotId>) {
        self.prepare_instant(stores, Taking::WhenTold)
    }

    /// The next instant gets this number: where several volumes share one count of
    /// them (`tree`).
    pub(crate) fn number_next_instant(&mut self, number: u32) {
        assert!(number >= self.next_instant, "no number is given twice");
        self.next_instant = number;
    }

    /// The instant is now: its snapshots are Active, an [`Event::Created`] each,
    /// and origin writes go on.
    pub fn take_instant(&mut self, id: InstantId) -> Result<(), NotHeld> {
        match self.instants.front() {
            Some(instant) if instant.id == id && instant.step == Step::Held => {
                self.end_instant(true);
                Ok(())
            }
            _ => Err(NotHeld),
        }
    }

    /// Give an instant up, however far it has come: its snapshots' ids are gone,
    /// and nothing is held for it. Flushes that it has begun may still end. An
    /// instant that is gone already is none of its business.
    pub fn abandon_instant(&mut self, id: InstantId) {
        let Some(place) = self.instants.iter().position(|instant| instant.id == id) else {
            return;
        };
        let instant = self.instants.remove(place).expect("it was found there");
        self.drop_untaken(&instant.snapshots);
        if place == 0 {
            self.release();
        }
    }

    fn prepare_instant(
        &mut self,
        stores: Vec<Store>,
        taking: Taking,
    ) -> (InstantId, Vec<SnapshotId>) {
        assert!(
            self.merging().is_none(),
            "no snapshot is taken of an origin that is merging"
        );
        let mut snapshots = Vec::with_capacity(stores.len());
        for store in stores {
            assert!(!store.invalid, "a snapshot is taken into a good store");
            snapshots.push(self.add_snapshot(store, State::Creating));
        }
        let id = InstantId(self.next_instant);
        self.next_instant += 1;
        self.instants.push_back(Instant {
            id,
            snapshots: snapshots.clone(),
            taking,
            step: Step::Queued,
        });
        if self.phase != Phase::Open {
            self.fail_instant(self.instants.len() - 1);
        }
        (id, snapshots)
    }

    pub(super) fn advance_instant(&mut self) {
        // Everything has been flushed, and nothing is in flight.
        let suspended = self.is_suspended();
        let frozen = self.is_frozen();
        let Some(instant) = self.instants.front_mut() else {
            return;
        };
        match instant.step {
            Step::Queued if suspended => self.hold_instant(!self.origin_flush_failed()),
            Step::Queued if frozen => {}
            Step::Queued if self.law.flush_before_snapshot() => {
                instant.step = Step::FirstFlush(self.origin_changes);
                let waiter = Waiter::Instant(instant.id);
                self.origin_flush.waiting.push(waiter);
                // Begun by the next round of coming to rest.
                self.begin_origin_flush();
            }
            Step::Queued => self.begin_drain(self.origin_changes),
            Step::Draining(_) => self.end_drain(),
            Step::FirstFlush(_) | Step::SecondFlush | Step::Held => {}
        }
    }

    /// A flush that an instant was waiting for has ended.
    pub(super) fn instant_flushed(&mut self, id: InstantId, ok: bool) {
        let Some(instant) = self.instants.front().filter(|instant| instant.id == id) else {
            // It was abandoned meanwhile.
            return;
        };
        match instant.step {
            _ if !ok => self.end_instant(false),
            Step::FirstFlush(changes) => self.begin_drain(changes),
            Step::SecondFlush => self.hold_instant(true),
            Step::Queued | Step::Draining(_) | Step::Held => {
                unreachable!("it did not ask for a flush")
            }
        }
    }

    fn begin_drain(&mut self, changes: u64) {
        let instant = self.instants.front_mut().expect("an instant is under way");
        instant.step = Step::Draining(changes);
        self.holding = self.law.drain_before_snapshot();
        self.end_drain();
    }

    /// If no write is under way any more, flush what they left, and be done.
    fn end_drain(&mut self) {
        if self.law.drain_before_snapshot() && self.origin_mutations > 0 {
            return;
        }
        let instant = self.instants.front_mut().expect("an instant is under way");
        let Step::Draining(changes) = instant.step else {
            unreachable!("it drains");
        };
        if changes == self.origin_changes || !self.law.flush_before_snapshot() {
            return self.hold_instant(!self.origin_flush_failed());
        }
        instant.step = Step::SecondFlush;
        let waiter = Waiter::Instant(instant.id);
        self.origin_flush.waiting.push(waiter);
        self.begin_origin_flush();
    }

    /// Nothing is in flight, and what the snapshots will show is durable.
    fn hold_instant(&mut self, ok: bool) {
        let instant = self.instants.front_mut().expect("an instant is under way");
        if !ok || instant.taking == Taking::AtOnce {
            return self.end_instant(ok);
        }
        instant.step = Step::Held;
        self.holding = self.law.drain_before_snapshot();
        self.events.push_back(Event::Held(instant.id));
    }

    /// The first instant is taken, or it cannot be.
    fn end_instant(&mut self, ok: bool) {
        if ok {
            let instant = self.instants.pop_front().expect("an instant is under way");
            for id in instant.snapshots {
                let index = self.index_of(id).expect("it was added when it was begun");
                let snapshot = &mut self.snapshots[index];
                snapshot.state = State::Active;
                snapshot.origin_bytes = self.config.origin_bytes;
                self.events.push_back(Event::Created(id));
            }
        } else {
            self.fail_instant(0);
        }
        self.release();
    }

    /// The instant at this place in the queue is gone; the caller sees to what
    /// was held for it.
    fn fail_instant(&mut self, place: usize) {
        let instant = self.instants.remove(place).expect("there is one");
        self.drop_untaken(&instant.snapshots);
        match instant.taking {
            Taking::AtOnce => {
                let failed = instant.snapshots.into_iter().map(Event::CreateFailed);
                self.events.extend(failed);
            }
            Taking::WhenTold => self.events.push_back(Event::InstantFailed(instant.id)),
        }
    }

    /// The volume closes: nobody is going to take the instants that wait to be
    /// told. The others come to their end by themselves.
    pub(super) fn fail_instants_to_be_told(&mut self) {
        let told = |instant: &Instant| instant.taking == Taking::WhenTold;
        while let Some(place) = self.instants.iter().position(told) {
            self.fail_instant(place);
            if place == 0 {
                self.release();
            }
        }
    }

    /// The snapshot is removed before its instant. The instant stays for the
    /// others, and for a caller who is to take it or abandon it.
    pub(super) fn leave_instant(&mut self, id: SnapshotId) {
        let in_it = |instant: &Instant| instant.snapshots.contains(&id);
        let place = self.instants.iter().position(in_it);
        let place = place.expect("a snapshot that is being created has its instant");
        let instant = &mut self.instants[place];
        instant.snapshots.retain(|&other| other != id);
        if instant.taking == Taking::AtOnce {
            self.instants.remove(place);
            if place == 0 {
                self.release();
            }
        }
    }

    fn drop_untaken(&mut self, ids: &[SnapshotId]) {
        // Nothing is in flight for a snapshot before its instant.
        self.snapshots.retain(|s| !ids.contains(&s.id));
    }

    /// A change of the origin is ready to begin. False if it is held: it comes
    /// again when the origin is released, and decides anew, for there may be
    /// snapshots then that need copies.
    pub(super) fn may_begin(&mut self, request: RequestKey) -> bool {
        if self.holding {
            self.held.push(request);
        }
        !self.holding
    }

    /// The origin is held no longer: on with what waits, and with the next instant.
    pub(super) fn release(&mut self) {
        self.holding = false;
        for request in std::mem::take(&mut self.held) {
            let task = self.new_task(Work::Mutation(request));
            self.runnable.push_back(task);
        }
        self.advance_instant();
    }
}
