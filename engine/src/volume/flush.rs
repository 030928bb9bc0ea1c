//! FLUSH, FUA and the flushes of commits. A flush never answers for what came
//! after it began (durability.md, rule 9), and one that failed is never tried
//! again (rule 10).

use super::active::RequestKey;
use super::instant::InstantId;
use super::{Purpose, Volume};
use crate::disk::{Action, Device};
use crate::request::{Failure, View};
use crate::snapshot::{InvalidHeader, State, take_below};

/// Who waits for a flush of the origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waiter {
    /// A request: FLUSH, or a mutation with FUA.
    Request(RequestKey),
    /// The instant of snapshots.
    Instant(InstantId),
    /// The step of a merge.
    Merge,
    /// [`Volume::suspend`].
    Suspension,
}

/// The flushes of a device: the origin, or a store that is merged into it.
#[derive(Debug, Default)]
pub(crate) struct Lane {
    /// The next flush is theirs.
    pub(super) waiting: Vec<Waiter>,
    /// The flush that is running is theirs.
    running: Option<Vec<Waiter>>,
    /// A flush has failed: what was written before may be lost, and no later
    /// flush would say so.
    failed: bool,
    /// What the running flush is of is lost, all or some of it ([`Volume::origin_is_lost`]).
    lost: bool,
}

/// What a lane does next.
pub(super) enum Next {
    /// Nobody waits for a flush, or one is running.
    Nothing,
    /// Begin a flush.
    Flush,
    /// Answer these: no flush could be trusted any more.
    Refuse(Vec<Waiter>),
}

impl Lane {
    /// Nobody waits for a flush, and none is running.
    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_none()
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed
    }

    /// Turn to those who wait, if it is time.
    pub(super) fn next(&mut self) -> Next {
        if self.waiting.is_empty() || self.running.is_some() {
            return Next::Nothing;
        }
        let waiters = std::mem::take(&mut self.waiting);
        if self.failed {
            return Next::Refuse(waiters);
        }
        self.running = Some(waiters);
        self.lost = false;
        Next::Flush
    }

    /// The flush that is running has ended: for whom.
    pub(super) fn ended(&mut self, ok: bool) -> Vec<Waiter> {
        self.failed |= !ok;
        self.running.take().expect("a flush is running")
    }
}

impl Volume {
    /// Have the device of the request's view flushed, then answer it.
    pub(super) fn flush_for(&mut self, request: RequestKey) {
        match self.requests[request].view {
            View::Origin => {
                let devices = 1 + u32::from(self.flush_merge_for(Waiter::Request(request)));
                self.requests[request].parts = devices;
                let lane = &mut self.origin_flush;
                match &mut lane.running {
                    Some(running) if !self.law.flush_begins_after() => {
                        running.push(Waiter::Request(request));
                    }
                    _ => lane.waiting.push(Waiter::Request(request)),
                }
            }
            View::Snapshot(id) => {
                let index = self.index_of(id).expect("a snapshot outlives its requests");
                if self.snapshots[index].is_readable() {
                    self.snapshots[index].until_flushed.push(request);
                    self.list(index);
                } else {
                    self.fail_all([request]);
                }
            }
        }
    }

    pub(super) fn fail_all(&mut self, requests: impl IntoIterator<Item = RequestKey>) {
        for request in requests {
            self.requests[request].failure = Some(Failure::Io);
            self.finish(request);
        }
    }

    /// Nothing else is left to hand out: begin the flushes that are wanted. The
    /// more came together until now, the fewer are needed. Says whether there is
    /// anything new to poll for.
    pub(super) fn come_to_rest(&mut self) -> bool {
        self.restless = 0;
        while let Some(id) = self.listed.pop_front() {
            if let Some(index) = self.index_of(id) {
                self.snapshots[index].listed = false;
                self.begin_store_flush(index);
            }
        }
        self.begin_origin_flush();
        self.advance_lifecycle();
        !self.ready_ops.is_empty() || (!self.runnable.is_empty() && !self.is_frozen())
    }

    pub(super) fn begin_store_flush(&mut self, index: usize) {
        let snapshot = &mut self.snapshots[index];
        let wanted = snapshot.durable_wanted();
        let asked = snapshot.flush_wanted || !snapshot.until_flushed.is_empty();
        let Some(commit) = &mut snapshot.commit else {
            // Nothing of a transient store outlives the volume.
            let requests = std::mem::take(&mut snapshot.until_flushed);
            for request in requests {
                self.finish(request);
            }
            return;
        };
        if !commit.can_flush() || !(asked || commit.wants_flush(wanted)) {
            return;
        }
        commit.flush_begun();
        snapshot.flush_wanted = false;
        snapshot.is_flushing = true;
        snapshot.flushing = std::mem::take(&mut snapshot.until_flushed);
        let id = snapshot.id;
        self.emit(Device::Cow(id), Action::Flush, Purpose::StoreFlush(id));
    }

    pub(super) fn store_flush_ended(&mut self, index: usize, ok: bool) {
        let snapshot = &mut self.snapshots[index];
        let requests = std::mem::take(&mut snapshot.flushing);
        snapshot.is_flushing = false;
        if snapshot.commit.is_none() {
            // The snapshot was lost while the flush ran. If that failed, the header
            // that says so may be among what it lost.
            if !matches!(snapshot.state, State::Invalidating(_)) {
                // It is being removed.
            } else if ok {
                self.flush_invalid_header(index);
            } else if snapshot.header == InvalidHeader::Written {
                self.ask_for_mark(index);
            }
            return self.fail_all(requests);
        }
        if !ok {
            self.fail_all(requests);
            self.suspending_flush_failed();
            return self.invalidate(index, "a flush of its store failed");
        }
        let commit = snapshot.commit.as_mut().expect("it was looked at above");
        commit.flush_ended();
        let mark = commit.durable();
        let durable = take_below(&mut snapshot.until_durable, mark);
        self.wake(durable);
        for request in requests {
            self.finish(request);
        }
        self.drive_store(index);
        self.list(index);
    }

    pub(super) fn begin_origin_flush(&mut self) {
        match self.origin_flush.next() {
            Next::Nothing => {}
            Next::Flush => self.emit(Device::Origin, Action::Flush, Purpose::OriginFlush),
            Next::Refuse(waiters) => self.flushed(waiters, false),
        }
    }

    pub(super) fn origin_flush_ended(&mut self, ok: bool) {
        let waiters = self.origin_flush.ended(ok);
        if !self.origin_flush.lost {
            return self.flushed(waiters, ok);
        }
        let is_instant = |waiter: &Waiter| matches!(waiter, Waiter::Instant(_));
        let (instants, others) = waiters.into_iter().partition(is_instant);
        self.flushed(others, false);
        self.flushed(instants, ok);
    }

    /// The flush of the origin that was asked for last cannot save all of it: some is a
    /// snapshot's that is lost, where every request fails from now on. Whoever wants to
    /// know what was written safe is told that it is not; an instant needs nothing of what
    /// nobody can see, as the kernel has it, which takes snapshots of such an origin.
    pub(crate) fn origin_is_lost(&mut self) {
        self.origin_flush.lost = true;
    }

    /// A flush that these waited for has ended.
    pub(super) fn flushed(&mut self, waiters: Vec<Waiter>, ok: bool) {
        for waiter in waiters {
            match waiter {
                Waiter::Request(request) => self.device_flushed(request, ok),
                Waiter::Instant(id) => self.instant_flushed(id, ok),
                Waiter::Merge => self.merge_flushed(ok),
                Waiter::Suspension if ok => {}
                Waiter::Suspension => self.suspending_flush_failed(),
            }
        }
    }

    /// One of the devices that the request wants flushed has been.
    fn device_flushed(&mut self, request: RequestKey, ok: bool) {
        let active = &mut self.requests[request];
        if !ok {
            active.failure = Some(Failure::Io);
        }
        active.parts -= 1;
        if active.parts == 0 {
            self.finish(request);
        }
    }

    /// A flush of the origin has failed since the volume was made.
    pub(super) fn origin_flush_failed(&self) -> bool {
        self.origin_flush.failed
    }
}
