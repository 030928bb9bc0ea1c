//! A volume is suspended and resumed: the disks stand still, and clients notice
//! nothing but a pause.
//!
//! What was handed in before comes to its end, but for writes that wait for a
//! full store to be extended or for an instant to be taken: those wait on. Then
//! the stores and the origin are flushed, and until [`Volume::resume`] no
//! operation is begun: whatever wakes meanwhile runs afterwards.

use super::flush::Waiter;
use super::lifecycle::Phase;
use super::task::{TaskId, Work};
use super::{Event, Volume};
use crate::request::{Failure, View};
use crate::snapshot::{Snapshot, State};
use crate::store::Commit;

/// Whether requests are let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Suspension {
    /// They are.
    Running,
    /// They queue, and those handed in before come to their ends.
    Draining,
    /// The last flushes are running, and whether all went well so far.
    Flushing { ok: bool },
    /// Nothing is in flight, and nothing begins.
    Suspended,
}

impl Suspension {
    /// Nothing that is woken runs.
    fn is_frozen(self) -> bool {
        matches!(self, Self::Flushing { .. } | Self::Suspended)
    }
}

impl Volume {
    /// Let new requests of every view queue, those in flight end, and flush the
    /// stores and the origin; then [`Event::Suspended`]. Snapshots can be taken
    /// (their instants come at once), removed and extended meanwhile.
    ///
    /// Calling it again before [`Volume::resume`] changes nothing, and brings no
    /// second event; nor does it do anything once the volume closes.
    pub fn suspend(&mut self) {
        if self.suspension == Suspension::Running && self.phase == Phase::Open {
            self.suspension = Suspension::Draining;
        }
    }

    /// A new volume among others that stand still: so does it, from its beginning.
    pub(crate) fn begin_suspended(&mut self) {
        self.suspension = Suspension::Suspended;
    }

    /// Let everything go on. If the volume was not suspended, nothing happens; if
    /// it was on the way there, [`Event::Suspended`] does not come any more.
    pub fn resume(&mut self) {
        if self.suspension == Suspension::Running {
            return;
        }
        self.suspension = Suspension::Running;
        for request in std::mem::take(&mut self.queued) {
            self.admit(request);
        }
    }

    /// The volume closes: nobody is going to resume it.
    pub(super) fn end_suspension(&mut self) {
        self.suspension = Suspension::Running;
        for request in std::mem::take(&mut self.queued) {
            self.reply(request.id, Err(Failure::ShuttingDown));
        }
    }

    pub(super) fn is_suspended(&self) -> bool {
        self.suspension == Suspension::Suspended
    }

    /// Everything has been flushed, or is being: no flush is to begin for anything else.
    pub(super) fn is_frozen(&self) -> bool {
        self.suspension.is_frozen()
    }

    pub(super) fn advance_suspension(&mut self) {
        if self.suspension == Suspension::Draining && self.in_flight.is_empty() && self.is_quiet() {
            self.begin_suspending_flushes();
        }
        if let Suspension::Flushing { ok } = self.suspension
            && self.in_flight.is_empty()
        {
            let marked = self.snapshots.iter().all(|s| s.state != State::Unmarked);
            self.suspension = Suspension::Suspended;
            self.events.push_back(Event::Suspended(ok && marked));
        }
    }

    /// With nothing in flight: nothing is about to be, either.
    fn is_quiet(&self) -> bool {
        let settled = |commit: Option<&Commit>| commit.is_none_or(Commit::is_settled);
        self.runnable.is_empty()
            && self.elsewhere == 0
            && self.merge_is_quiet()
            && !self.snapshots.iter().any(Snapshot::waits_for_mark)
            && self.snapshots.iter().all(|s| settled(s.commit.as_ref()))
    }

    fn begin_suspending_flushes(&mut self) {
        self.suspension = Suspension::Flushing { ok: true };
        if !self.law.flush_before_suspended() {
            return;
        }
        for index in 0..self.snapshots.len() {
            let snapshot = &mut self.snapshots[index];
            if snapshot.touched && snapshot.commit.is_some() {
                snapshot.flush_wanted = true;
                self.begin_store_flush(index);
            }
        }
        self.flush_merge_for(Waiter::Suspension);
        self.begin_merge_flush();
        self.origin_flush.waiting.push(Waiter::Suspension);
        self.begin_origin_flush();
    }

    /// One of the flushes has failed.
    pub(super) fn suspending_flush_failed(&mut self) {
        if let Suspension::Flushing { ok } = &mut self.suspension {
            *ok = false;
        }
    }

    /// The next task to run. While the volume stands still only those that end
    /// the requests of snapshots that are being removed.
    pub(super) fn next_task(&mut self) -> Option<TaskId> {
        if !self.is_frozen() {
            return self.runnable.pop_front();
        }
        let of_removed = |&task: &TaskId| match self.tasks[task.0].work {
            Work::Mutation(request)
            | Work::SnapshotPart { request, .. }
            | Work::SnapshotCopied(request) => match self.requests[request].view {
                View::Origin => false,
                View::Snapshot(id) => self.removals.contains(&id),
            },
            Work::Copy(_) | Work::MergeStep | Work::MergePiece(_) => false,
        };
        let place = self.runnable.iter().position(of_removed)?;
        self.runnable.remove(place)
    }
}
