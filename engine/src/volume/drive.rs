//! The ends of operations, and what they set going: the commit of groups, the
//! growth of stores, the loss of snapshots.

use bytes::Bytes;
use nbdsnap_format::Header;

use super::task::TaskId;
use super::{Event, Purpose, Volume};
use crate::disk::{Action, Device, DiskError, OpId, Outcome};
use crate::request::{Failure, SnapshotId, View};
use crate::snapshot::{InvalidHeader, State, take_below};
use crate::store::{AreaWrite, Growth};
use crate::table::ExceptionTable;

impl Volume {
    /// Report how an operation ended.
    pub fn handle_completion(&mut self, op: OpId, outcome: Outcome) {
        let purpose = self.in_flight.remove(op.0 as usize);
        let result = match &outcome {
            Ok(_) => Ok(()),
            Err(error) => Err(*error),
        };
        match purpose {
            Purpose::ClientRead {
                request,
                index,
                reading,
            } => self.client_read_ended(request, index, reading, outcome),
            Purpose::ClientWrite(request) => {
                let of_origin = self.requests[request].view == View::Origin;
                self.origin_changes += u64::from(of_origin);
                self.part_ended(
                    request,
                    result.map_err(|error| match error {
                        // Its store is full and refuses writes.
                        DiskError::NoSpace if of_origin && self.stands_on_snapshot => {
                            Failure::NoSpace
                        }
                        DiskError::NoSpace | DiskError::Io(_) => Failure::Io,
                    }),
                );
            }
            Purpose::CopyRead(job) => self.copy_read_ended(job, outcome),
            Purpose::CopyWrite(job) => self.copy_write_ended(job, result),
            Purpose::MergedRead { request, index } => {
                self.merged_read_ended();
                self.client_read_ended(request, index, None, outcome);
            }
            Purpose::MergedWrite { request, range } => {
                self.merged_write_ended(range);
                self.part_ended(request, result.map_err(|_| Failure::Io));
            }
            Purpose::MergeTail => self.merge_tail_read(outcome),
            Purpose::PieceRead(piece) => self.piece_read(piece, outcome),
            Purpose::PieceWrite(piece) => self.piece_written(piece, result.is_ok()),
            Purpose::MergeEntries => self.merge_entries_written(result.is_ok()),
            Purpose::MergeFlush => self.merge_flush_ended(result.is_ok()),
            Purpose::OriginFlush => self.origin_flush_ended(result.is_ok()),
            Purpose::CloseFlush => self.close_flush_ended(result.is_ok()),
            Purpose::AreaWrite(id)
            | Purpose::NextArea(id)
            | Purpose::StoreFlush(id)
            | Purpose::InvalidHeader(id)
            | Purpose::InvalidFlush(id)
            | Purpose::Grow(id) => {
                let index = self
                    .index_of(id)
                    .expect("a snapshot outlives its operations");
                self.store_op_ended(index, &purpose, result);
            }
        }
    }

    fn store_op_ended(&mut self, index: usize, purpose: &Purpose, result: Result<(), DiskError>) {
        match purpose {
            Purpose::Grow(_) => {
                let snapshot = &mut self.snapshots[index];
                let waiting = std::mem::take(&mut snapshot.until_grown);
                snapshot.allocator.growth_ended(match result {
                    Ok(()) => Growth::Done,
                    Err(_) if waiting.is_empty() => Growth::Postponed,
                    Err(_) => Growth::Refused,
                });
                self.note_filling(index);
                self.wake(waiting);
                if let Err(DiskError::Io(_)) = result {
                    // Not a full disk: what was written before may be lost too.
                    self.invalidate(index, "its file could not be grown");
                }
            }
            Purpose::StoreFlush(_) => self.store_flush_ended(index, result.is_ok()),
            Purpose::InvalidHeader(_) | Purpose::InvalidFlush(_)
                if self.snapshots[index].state == State::Removing => {}
            Purpose::InvalidHeader(_) => match result {
                Ok(()) => {
                    self.snapshots[index].header = InvalidHeader::Written;
                    self.flush_invalid_header(index);
                }
                Err(_) => self.ask_for_mark(index),
            },
            Purpose::InvalidFlush(_) if result.is_err() => self.ask_for_mark(index),
            Purpose::InvalidFlush(_) => self.invalidated(index, true),
            Purpose::AreaWrite(_) | Purpose::NextArea(_)
                if self.snapshots[index].commit.is_none() =>
            {
                // The snapshot was lost meanwhile.
            }
            Purpose::AreaWrite(_) if result.is_err() => {
                self.invalidate(index, "its exceptions could not be written");
            }
            Purpose::AreaWrite(_) => self.area_write_ended(index),
            Purpose::NextArea(_) if result.is_err() => {
                self.invalidate(index, "its next area could not be zeroed");
            }
            Purpose::NextArea(_) => {
                let commit = self.snapshots[index].commit.as_mut();
                commit.expect("checked above").zeros_ended();
                self.list(index);
            }
            _ => unreachable!("not an operation of a store"),
        }
    }

    /// Set going what the store's commit can do at once: zeros ahead, and the
    /// next area write. Flushes wait until the volume comes to rest.
    pub(super) fn drive_store(&mut self, index: usize) {
        let snapshot = &mut self.snapshots[index];
        let id = snapshot.id;
        let Some(commit) = &mut snapshot.commit else {
            return;
        };
        let zeros = commit.poll_zeros();
        let area = commit.poll_area_write();
        if let Some(area) = zeros {
            let offset = snapshot.area_offset(area);
            let len = snapshot.chunk_size.bytes();
            let action = Action::WriteZeroes {
                offset,
                len,
                may_punch: false,
            };
            self.emit(Device::Cow(id), action, Purpose::NextArea(id));
        }
        if let Some(AreaWrite { offset, data }) = area {
            let data = vec![data];
            let action = Action::Write { offset, data };
            self.emit(Device::Cow(id), action, Purpose::AreaWrite(id));
        }
    }

    /// A group's entries are in the area: its exceptions take effect. They are
    /// volatile until the next flush.
    fn area_write_ended(&mut self, index: usize) {
        let snapshot = &mut self.snapshots[index];
        let commit = snapshot.commit.as_mut().expect("the store commits");
        let (_, group) = commit.area_write_ended();
        let mark = commit.committed();
        for exception in group {
            snapshot.publish(exception.old, exception.new);
        }
        let published = take_below(&mut snapshot.until_published, mark);
        self.wake(published);
        self.drive_store(index);
        self.list(index);
    }

    /// The snapshot is lost. What its clients have under way fails; origin
    /// writes wait until that is durable (durability.md, rule 6).
    pub(super) fn invalidate(&mut self, index: usize, why: &'static str) {
        let snapshot = &mut self.snapshots[index];
        if !snapshot.is_readable() {
            return;
        }
        let id = snapshot.id;
        let persistent = snapshot.commit.is_some();
        snapshot.touched = true;
        snapshot.state = if persistent {
            State::Invalidating(why)
        } else {
            State::Invalid
        };
        let header = Header {
            valid: false,
            chunk_size: snapshot.chunk_size,
        };
        let origin_writes = self.forsake(index);
        if persistent && self.law.invalid_before_origin() {
            self.snapshots[index].until_invalid.extend(origin_writes);
        } else {
            self.wake(origin_writes);
        }
        if persistent {
            let data = vec![Bytes::copy_from_slice(&header.encode())];
            let action = Action::Write { offset: 0, data };
            self.emit(Device::Cow(id), action, Purpose::InvalidHeader(id));
        } else {
            self.events.push_back(Event::Invalid(id, why));
        }
    }

    /// Nobody will ever ask for the snapshot's exceptions again: forget them,
    /// commit no more, and end what its own clients wait for. Answers the origin
    /// writes that waited for a copy.
    pub(super) fn forsake(&mut self, index: usize) -> Vec<TaskId> {
        let snapshot = &mut self.snapshots[index];
        snapshot.commit = None;
        snapshot.pending.clear();
        snapshot.table = ExceptionTable::default();
        let mut woken = take_below(&mut snapshot.until_published, u64::MAX);
        woken.append(&mut snapshot.until_grown);
        woken.append(&mut snapshot.until_extended);
        snapshot.flush_wanted = false;
        let origin_writes = take_below(&mut snapshot.until_durable, u64::MAX);
        let unflushed = std::mem::take(&mut snapshot.until_flushed);
        self.wake(woken);
        self.fail_all(unflushed);
        origin_writes
    }

    /// Flush the header that says invalid once no flush of a commit is running: two
    /// flushes at the same time share one report of an error, and the other would
    /// take the lost header for a durable one.
    pub(super) fn flush_invalid_header(&mut self, index: usize) {
        let snapshot = &self.snapshots[index];
        if snapshot.header == InvalidHeader::Written && !snapshot.is_flushing {
            let id = snapshot.id;
            self.emit(Device::Cow(id), Action::Flush, Purpose::InvalidFlush(id));
        }
    }

    /// The header cannot be made to say so: somebody else has to.
    pub(super) fn ask_for_mark(&mut self, index: usize) {
        let snapshot = &mut self.snapshots[index];
        let State::Invalidating(why) = snapshot.state else {
            unreachable!("a snapshot is lost once");
        };
        snapshot.header = InvalidHeader::Impossible;
        self.events.push_back(Event::MarkLost(snapshot.id, why));
    }

    /// The answer to [`Event::MarkLost`]: whether there is a durable mark by which
    /// every later start knows that the snapshot is lost. One that has been removed
    /// meanwhile needs none.
    pub fn marked_lost(&mut self, id: SnapshotId, durable: bool) {
        let index = self.index_of(id);
        if let Some(index) = index.filter(|&index| self.snapshots[index].waits_for_mark()) {
            self.invalidated(index, durable);
        }
    }

    /// A mark that says so is durable, or cannot be made so.
    fn invalidated(&mut self, index: usize, durable: bool) {
        let snapshot = &mut self.snapshots[index];
        let State::Invalidating(why) = snapshot.state else {
            unreachable!("a snapshot is lost once");
        };
        snapshot.state = if durable {
            State::Invalid
        } else {
            State::Unmarked
        };
        self.events.push_back(if durable {
            Event::Invalid(snapshot.id, why)
        } else {
            Event::Unmarked(snapshot.id, why)
        });
        let waiting = std::mem::take(&mut snapshot.until_invalid);
        self.wake(waiting);
    }
}
