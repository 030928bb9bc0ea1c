//! What disks are asked for, and how it ends.
//!
//! Devices, stores and origins may share a disk: so one flush of it runs at a time, for
//! all who wait when it begins, and none who come later (durability.md, rule 9). Two at
//! once would share one report of an error. Once one has failed, none is trusted any more
//! until the disk is opened anew (rule 10): the next would succeed, with somebody else's
//! data gone.

use super::route::Asked;
use super::{DiskId, MappedOp, Mapper};
use crate::disk::{Action, DiskError, OpId, Outcome};
use crate::request::{Command, Failure};

/// After so many operations flushes are begun even if there are more to hand out.
const REST_AFTER: u32 = 256;

/// What a disk has been asked for.
#[derive(Debug)]
pub(super) enum InFlight {
    One(Asked),
    /// The flush that is running there, for whom [`Flushes`] says.
    Flush,
}

/// The flushes of a disk.
#[derive(Debug, Default)]
pub(super) struct Flushes {
    /// The next one is theirs.
    waiting: Vec<Asked>,
    /// The one that is running is theirs.
    running: Option<Vec<Asked>>,
    /// One has failed.
    failed: bool,
}

impl Mapper {
    pub(super) fn ask_disk(&mut self, disk: DiskId, command: Command, mut asked: Asked) {
        let action = match command {
            Command::Read { offset, len } => Action::Read { offset, len },
            Command::Write { offset, data, fua } => {
                asked.fua = fua;
                let data = vec![data];
                Action::Write { offset, data }
            }
            Command::WriteZeroes {
                offset,
                len,
                fua,
                no_hole,
                ..
            } => {
                asked.fua = fua;
                let may_punch = !no_hole;
                Action::WriteZeroes {
                    offset,
                    len,
                    may_punch,
                }
            }
            Command::Trim { offset, len, fua } => {
                asked.fua = fua;
                Action::Trim { offset, len }
            }
            Command::Flush => return self.flush_disk(disk, asked),
        };
        self.hand_out(disk, action, asked);
    }

    fn hand_out(&mut self, disk: DiskId, action: Action, asked: Asked) {
        let id = OpId(self.in_flight.insert((disk, InFlight::One(asked))) as u64);
        self.ready_ops.push_back(MappedOp { id, disk, action });
    }

    /// Report how an operation ended.
    pub fn handle_completion(&mut self, op: OpId, outcome: Outcome) {
        let (disk, what) = self.in_flight.remove(op.0 as usize);
        let InFlight::One(asked) = what else {
            return self.flush_ended(disk, outcome.is_ok());
        };
        if asked.fua && outcome.is_ok() {
            return self.flush_disk(disk, asked);
        }
        let result = outcome
            .map(|bytes| vec![bytes])
            .map_err(|error| match error {
                DiskError::NoSpace => Failure::NoSpace,
                DiskError::Io(_) => Failure::Io,
            });
        self.end(asked, result);
    }

    /// The disk is to be flushed, by a flush that has not begun yet.
    pub(super) fn flush_disk(&mut self, id: DiskId, asked: Asked) {
        let disk = self.disks.get_mut(&id).expect("it is there");
        let flushes = &mut disk.flushes;
        if flushes.failed {
            return self.end(asked, Err(Failure::Io));
        }
        flushes.waiting.push(asked);
        if flushes.waiting.len() == 1 && flushes.running.is_none() {
            self.flush_wanted.push(id);
        }
    }

    /// Nothing else is left to hand out, or flushes have waited long enough: begin
    /// those that are wanted. True if there are any.
    pub(super) fn begin_flushes(&mut self) -> bool {
        self.restless = 0;
        let wanted = std::mem::take(&mut self.flush_wanted);
        for &disk in &wanted {
            let flushes = &mut self.disks.get_mut(&disk).expect("it is there").flushes;
            flushes.running = Some(std::mem::take(&mut flushes.waiting));
            let id = OpId(self.in_flight.insert((disk, InFlight::Flush)) as u64);
            let action = Action::Flush;
            self.ready_ops.push_back(MappedOp { id, disk, action });
        }
        !wanted.is_empty()
    }

    /// Whether operations have been handed out for so long that flushes have their turn.
    pub(super) fn is_time_to_flush(&mut self) -> bool {
        self.restless += 1;
        self.restless >= REST_AFTER
    }

    pub(super) fn flush_ended(&mut self, id: DiskId, ok: bool) {
        let disk = self.disks.get_mut(&id).expect("it is there");
        let flushes = &mut disk.flushes;
        let mut asked = flushes.running.take().expect("a flush is running");
        if !ok && self.law.failed_flush_is_remembered() {
            flushes.failed = true;
            asked.append(&mut flushes.waiting);
        }
        if !flushes.waiting.is_empty() {
            self.flush_wanted.push(id);
        }
        for one in asked {
            let result = if ok { Ok(Vec::new()) } else { Err(Failure::Io) };
            self.end(one, result);
        }
    }
}
