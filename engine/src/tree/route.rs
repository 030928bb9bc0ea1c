//! Operations go down the tree, replies and events go up. Levels take turns: none
//! hands out more than [`TURN`] operations while others wait.

use bytes::Bytes;

use super::{Asker, Below, LevelKey, Standing, Tree};
use crate::disk::{Action, Device, DiskError, DiskOp, OpId, Outcome};
use crate::request::{Command, Failure, Reply, Request, RequestId, SnapshotId, View};
use crate::volume::Event;

/// Operations that a level hands out in a row while others wait: as many as a
/// volume does before it begins the flushes that somebody waits for.
const TURN: u32 = 256;

/// What an operation on a snapshot meets where the snapshot fails (EIO).
const EIO: i32 = 5;

impl Tree {
    /// The next operation to perform on a physical disk, if there is one.
    pub fn poll_disk_op(&mut self) -> Option<DiskOp> {
        loop {
            self.settle();
            let &key = self.runnable.front()?;
            if self.turn >= TURN {
                self.turn = 0;
                self.runnable.rotate_left(1);
                continue;
            }
            self.turn += 1;
            let Some(op) = self.poll_level(key) else {
                self.turn = 0;
                self.runnable.pop_front();
                continue;
            };
            if let Some(op) = self.pass_on(key, op) {
                return Some(op);
            }
        }
    }

    fn poll_level(&mut self, key: LevelKey) -> Option<DiskOp> {
        let level = self.levels.get_mut(key)?;
        let op = level.volume.poll_disk_op();
        level.is_runnable = op.is_some();
        // What it went through to say so may have brought replies and events.
        self.hear(key);
        op
    }

    /// An operation of a level: to be performed, or a request to the level below.
    fn pass_on(&mut self, key: LevelKey, op: DiskOp) -> Option<DiskOp> {
        let DiskOp { id, device, action } = op;
        let below = self.levels[key].below;
        match (device, below) {
            (Device::Origin, Some(below)) => {
                self.ask_below(key, below, id, action);
                None
            }
            (Device::Origin, None) | (Device::Cow(_), _) => {
                let id = OpId(self.in_flight.insert((key, id)) as u64);
                Some(DiskOp { id, device, action })
            }
        }
    }

    fn ask_below(&mut self, key: LevelKey, below: Below, op: OpId, action: Action) {
        let fua = false;
        let command = match action {
            Action::Read { offset, len } => Command::Read { offset, len },
            Action::Write { offset, data } => Command::Write {
                offset,
                data: join(data),
                fua,
            },
            Action::WriteZeroes {
                offset,
                len,
                may_punch,
            } => Command::WriteZeroes {
                offset,
                len,
                fua,
                no_hole: !may_punch,
                fast_only: false,
            },
            Action::Trim { offset, len } => Command::Trim { offset, len, fua },
            Action::Flush if !self.law.inner_flush_passed_on() => {
                self.levels[key]
                    .volume
                    .handle_completion(op, Ok(Bytes::new()));
                return self.touch(key);
            }
            Action::Flush => Command::Flush,
            Action::Grow { .. } => unreachable!("only stores grow"),
        };
        let view = View::Snapshot(below.snapshot);
        self.ask(below.level, view, command, Asker::Level(key, op));
    }

    /// Hand a request to a level.
    pub(super) fn ask(&mut self, key: LevelKey, view: View, command: Command, asker: Asker) {
        let id = RequestId(self.asked.insert(asker) as u64);
        let request = Request { id, view, command };
        self.levels[key].volume.handle_request(request);
        self.touch(key);
    }

    /// Report how an operation ended.
    pub fn handle_completion(&mut self, op: OpId, outcome: Outcome) {
        let (key, op) = self.in_flight.remove(op.0 as usize);
        self.levels[key].volume.handle_completion(op, outcome);
        self.touch(key);
    }

    /// A level has been told something: look for what comes of it.
    pub(super) fn touch(&mut self, key: LevelKey) {
        self.hear(key);
        let level = &mut self.levels[key];
        if !std::mem::replace(&mut level.is_runnable, true) {
            self.runnable.push_back(key);
        }
    }

    /// It may have something to say; most of the time it has not.
    fn hear(&mut self, key: LevelKey) {
        let level = &mut self.levels[key];
        if !level.is_touched && (level.is_orphan || level.volume.has_news()) {
            level.is_touched = true;
            self.touched.push_back(key);
        }
    }

    /// Carry replies and events up until there are no more.
    #[inline]
    pub(super) fn settle(&mut self) {
        if !self.touched.is_empty() {
            self.settle_touched();
        }
    }

    fn settle_touched(&mut self) {
        while let Some(key) = self.touched.pop_front() {
            self.levels[key].is_touched = false;
            while let Some(reply) = self.levels[key].volume.poll_reply() {
                self.on_reply(reply);
            }
            while let Some(event) = self.levels[key].volume.poll_event() {
                self.on_event(key, event);
            }
            self.let_orphan_go(key);
        }
    }

    fn on_reply(&mut self, reply: Reply) {
        match self.asked.remove(reply.id.0 as usize) {
            Asker::Client(id) => self.reply(id, reply.result),
            Asker::PastLevel(key, id) => {
                let level = &mut self.levels[key];
                level.past_it -= 1;
                level.volume.change_ended_elsewhere();
                self.touch(key);
                self.reply(id, reply.result);
            }
            Asker::Level(key, op) => {
                let outcome = reply.result.map(join).map_err(|failure| match failure {
                    Failure::NoSpace => DiskError::NoSpace,
                    _ => DiskError::Io(EIO),
                });
                self.levels[key].volume.handle_completion(op, outcome);
                self.touch(key);
            }
        }
    }

    fn on_event(&mut self, key: LevelKey, event: Event) {
        match event {
            Event::Created(id) => self.rise(id),
            Event::CreateFailed(id) | Event::Removed(id) | Event::Merged(id) => {
                self.nodes.remove(&id);
                self.share_copy_memory();
            }
            Event::InstantFailed(id) => self.forget_instant(id),
            Event::MergeBegun(id) => self.leave(id, Standing::Merging),
            // Said for the whole tree when the root says it.
            Event::Suspended(ok) | Event::Closed(ok) => return self.arrived(key, ok),
            Event::Invalid(..)
            | Event::MarkLost(..)
            | Event::Unmarked(..)
            | Event::Overflow(_)
            | Event::Filling(..)
            | Event::Full(_)
            | Event::Held(_)
            | Event::MergeProgress(..)
            | Event::MergeFailed(..) => {}
        }
        self.events.push_back(event);
    }

    /// The snapshot is a view from now on.
    pub(super) fn rise(&mut self, id: SnapshotId) {
        let node = self.nodes[&id];
        let below = Below {
            level: node.origin,
            snapshot: id,
        };
        let bytes = (self.levels[node.origin].volume).view_bytes(View::Snapshot(id));
        let bytes = bytes.expect("it has become a view");
        let key = self.add_level(Some(below), bytes);
        self.set_standing(id, Standing::There(key));
    }

    /// The snapshot is no view any more. What its level has under way ends, by the
    /// failures that the level below answers with.
    pub(super) fn leave(&mut self, id: SnapshotId, standing: Standing) {
        if let Standing::There(key) = self.nodes[&id].standing {
            self.levels[key].is_orphan = true;
            self.touch(key);
        }
        self.set_standing(id, standing);
    }

    fn set_standing(&mut self, id: SnapshotId, standing: Standing) {
        let node = self.nodes.get_mut(&id);
        node.expect("a snapshot has its node").standing = standing;
    }

    fn let_orphan_go(&mut self, key: LevelKey) {
        let level = &self.levels[key];
        let has_work = level.is_touched || level.is_runnable || level.past_it > 0;
        if level.is_orphan && !has_work && level.volume.is_idle() {
            self.arrived(key, true);
            self.levels.remove(key);
        }
    }
}

/// The pieces in one.
fn join(mut pieces: Vec<Bytes>) -> Bytes {
    match pieces.len() {
        1 => pieces.remove(0),
        _ => pieces.concat().into(),
    }
}
