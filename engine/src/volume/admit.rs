//! Requests come in and replies go out: checks, turns among overlapping writes,
//! reads, and the end of every request.

use bytes::Bytes;

use super::active::{Active, Doing, Effect, Mutation, RequestKey};
use super::lifecycle::Phase;
use super::task::Work;
use super::{Extent, Purpose, Volume};
use crate::disk::{Action, Device, Outcome};
use crate::in_flight::RangeId;
use crate::request::{Command, Failure, Reply, Request, RequestId, View};
use crate::snapshot::State;

impl Volume {
    /// Hand in a request; its reply comes from [`Volume::poll_reply`].
    pub fn handle_request(&mut self, request: Request) {
        if self.phase != Phase::Open {
            return self.reply(request.id, Err(Failure::ShuttingDown));
        }
        if self.is_open() {
            self.admit(request);
        } else {
            self.queued.push_back(request);
        }
    }

    /// Take a request in.
    pub(super) fn admit(&mut self, request: Request) {
        let Some(request) = self.hold_for_merge(request) else {
            return;
        };
        let Request { id, view, command } = request;
        if let Err(failure) = self.check_view(view) {
            return self.reply(id, Err(failure));
        }
        let (offset, len) = match &command {
            Command::Read { offset, len }
            | Command::WriteZeroes { offset, len, .. }
            | Command::Trim { offset, len, .. } => (*offset, *len),
            Command::Write { offset, data, .. } => (*offset, data.len() as u64),
            Command::Flush => return self.admit_flush(id, view),
        };
        let allocates = matches!(command, Command::Write { .. } | Command::WriteZeroes { .. });
        if self.check_range(view, offset, len).is_err() {
            let failure = if allocates {
                Failure::PastEnd
            } else {
                Failure::Invalid
            };
            return self.reply(id, Err(failure));
        }
        if len == 0 {
            return self.reply(id, Ok(Vec::new()));
        }
        if matches!(command, Command::Read { .. }) {
            return self.admit_read(id, view, offset, len);
        }
        self.admit_mutation(id, view, command, offset, len);
    }

    fn check_view(&self, view: View) -> Result<(), Failure> {
        let View::Snapshot(id) = view else {
            return Ok(());
        };
        match self.snapshot(id) {
            Some(snapshot) if snapshot.is_there() => Ok(()),
            _ => Err(Failure::NoSuchView),
        }
    }

    fn admit_flush(&mut self, id: RequestId, view: View) {
        let key = self.requests.insert(Active {
            id,
            view,
            doing: Doing::Flush,
            parts: 0,
            failure: None,
        });
        self.flush_for(key);
    }

    fn admit_read(&mut self, id: RequestId, view: View, offset: u64, len: u64) {
        let mut extents = Vec::new();
        if let Err(failure) = self.resolve(view, offset, offset + len, usize::MAX, &mut extents) {
            return self.reply(id, Err(failure));
        }
        let request = self.requests.insert(Active {
            id,
            view,
            doing: Doing::Read(vec![None; extents.len()]),
            parts: extents.len() as u32,
            failure: None,
        });
        for (index, extent) in extents.into_iter().enumerate() {
            if view == View::Origin && extent.device != Device::Origin {
                self.begin_merged_read(request, index, extent);
                continue;
            }
            let Extent {
                device,
                offset,
                len,
            } = extent;
            let reading = (device == Device::Origin && view != View::Origin)
                .then(|| self.origin_reads.insert(offset, offset + len));
            self.emit(
                device,
                Action::Read { offset, len },
                Purpose::ClientRead {
                    request,
                    index,
                    reading,
                },
            );
        }
    }

    pub(super) fn client_read_ended(
        &mut self,
        request: RequestKey,
        index: usize,
        reading: Option<RangeId>,
        outcome: Outcome,
    ) {
        if let Some(range) = reading {
            let waiting = self.origin_reads.remove(range);
            self.wake(waiting);
        }
        let active = &mut self.requests[request];
        active.parts -= 1;
        match (outcome, &mut active.doing) {
            (Ok(bytes), Doing::Read(pieces)) => pieces[index] = Some(bytes),
            (Ok(_), _) => unreachable!("only reads read"),
            (Err(_), _) => active.failure = Some(Failure::Io),
        }
        if active.parts == 0 {
            self.finish(request);
        }
    }

    fn admit_mutation(
        &mut self,
        id: RequestId,
        view: View,
        command: Command,
        offset: u64,
        len: u64,
    ) {
        let end = offset + len;
        let (effect, fua) = match command {
            Command::Write { data, fua, .. } => (Effect::Data(data), fua),
            Command::WriteZeroes { fast_only, .. }
                if fast_only && !self.is_fast(view, offset, end) =>
            {
                return self.reply(id, Err(Failure::NotSupported));
            }
            Command::WriteZeroes { fua, no_hole, .. } => (
                Effect::Zeroes {
                    may_punch: !no_hole,
                },
                fua,
            ),
            Command::Trim { fua, .. } => (Effect::Trim, fua),
            Command::Read { .. } | Command::Flush => unreachable!("handled by the caller"),
        };
        let request = self.requests.vacant_key();
        let task = self.new_task(Work::Mutation(request));
        let turns = match view {
            View::Origin => &mut self.origin_writes,
            View::Snapshot(id) => {
                let index = self.snapshots.binary_search_by_key(&id, |s| s.id);
                &mut self.snapshots[index.expect("the view was checked")].writes
            }
        };
        self.tasks[task.0].waits = turns.wait_for_overlaps(offset, end, task);
        let turn = turns.insert(offset, end);
        self.requests.insert(Active {
            id,
            view,
            doing: Doing::Mutate(Mutation {
                offset,
                end,
                effect,
                fua,
                turn,
                begun: false,
                window: (offset, end.min(offset.saturating_add(self.window))),
            }),
            parts: 0,
            failure: None,
        });
        if !self.waits(task) {
            self.advance_mutation(request);
        }
    }

    /// Zeroing the range would need neither a copy nor a write of zeros.
    fn is_fast(&self, view: View, start: u64, end: u64) -> bool {
        view == View::Origin
            && (self.merge.as_ref()).is_none_or(|merge| merge.leaves_alone(start, end))
            && self.snapshots.iter().all(|s| match s.state {
                State::Creating | State::Invalid | State::Removing => true,
                State::Active | State::Overflowed => s.is_durable(start, end, self.law),
                State::Invalidating(_) | State::Unmarked => false,
            })
    }

    /// It is the mutation's turn, or what its window waited for has happened.
    pub(super) fn advance_mutation(&mut self, request: RequestKey) {
        match self.requests[request].view {
            View::Origin => self.advance_origin_mutation(request),
            View::Snapshot(id) => self.begin_snapshot_window(request, id),
        }
    }

    pub(super) fn mutation(&self, request: RequestKey) -> &Mutation {
        match &self.requests[request].doing {
            Doing::Mutate(mutation) => mutation,
            Doing::Read(_) | Doing::Flush => unreachable!("the request is a mutation"),
        }
    }

    pub(super) fn mutation_mut(&mut self, request: RequestKey) -> &mut Mutation {
        match &mut self.requests[request].doing {
            Doing::Mutate(mutation) => mutation,
            Doing::Read(_) | Doing::Flush => unreachable!("the request is a mutation"),
        }
    }

    /// Part of the current window has ended.
    pub(super) fn part_ended(&mut self, request: RequestKey, result: Result<(), Failure>) {
        let active = &mut self.requests[request];
        if let Err(failure) = result {
            active.failure = Some(failure);
        }
        active.parts -= 1;
        if active.parts == 0 {
            self.window_ended(request);
        }
    }

    pub(super) fn window_ended(&mut self, request: RequestKey) {
        let active = &mut self.requests[request];
        let Doing::Mutate(mutation) = &mut active.doing else {
            unreachable!("only mutations have windows");
        };
        if active.failure.is_none() && mutation.window.1 < mutation.end {
            let start = mutation.window.1;
            mutation.window = (start, mutation.end.min(start.saturating_add(self.window)));
            // By way of a task, so that other work gets between two windows.
            let task = self.new_task(Work::Mutation(request));
            self.runnable.push_back(task);
            return;
        }
        self.mutation_ended(request);
    }

    /// The last window has ended, or one has failed.
    fn mutation_ended(&mut self, request: RequestKey) {
        let active = &self.requests[request];
        let (view, failed) = (active.view, active.failure.is_some());
        let mutation = self.mutation(request);
        let (turn, fua, begun) = (mutation.turn, mutation.fua, mutation.begun);
        let waiting = match view {
            View::Origin => {
                self.origin_mutations -= u64::from(begun);
                self.origin_writes.remove(turn)
            }
            View::Snapshot(id) => {
                let index = self.index_of(id).expect("a snapshot outlives its requests");
                self.snapshots[index].writes.remove(turn)
            }
        };
        self.wake(waiting);
        if fua && !failed {
            self.requests[request].doing = Doing::Flush;
            self.flush_for(request);
        } else {
            self.finish(request);
        }
    }

    /// Answer a request and forget it.
    pub(super) fn finish(&mut self, request: RequestKey) {
        let active = self.requests.remove(request);
        let result = match (active.failure, active.doing) {
            (Some(failure), _) => Err(failure),
            (None, Doing::Read(pieces)) => {
                let whole: Option<Vec<Bytes>> = pieces.into_iter().collect();
                Ok(whole.expect("every piece of a read has come"))
            }
            (None, Doing::Mutate(_) | Doing::Flush) => Ok(Vec::new()),
        };
        self.reply(active.id, result);
    }

    pub(super) fn reply(&mut self, id: RequestId, result: Result<Vec<Bytes>, Failure>) {
        self.replies.push_back(Reply { id, result });
    }
}
