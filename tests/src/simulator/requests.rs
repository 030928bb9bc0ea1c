//! The clients: requests handed in, the ways around the queue, and what the model
//! is told of both.

use bytes::Bytes;
use nbdsnap_engine::{Action, Command, Device, Extent, Now, Request, RequestId, View};

use super::Violation;
use super::ledger::Tally;
use super::live::Suspension;
use super::operations::brief;
use super::traffic::Session;
use super::world::{Has, Phase, World, say};
use crate::model::{End, Time};
use crate::pattern::{self, Cells, SECTOR, Stamp};
use crate::workload::Ask;

/// A request that was not answered yet.
pub(super) struct Pending {
    /// The snapshot's slot; none for the origin.
    pub(super) slot: Option<usize>,
    pub(super) ask: Ask,
    pub(super) cells: Cells,
    pub(super) stamp: Stamp,
    pub(super) issued: Time,
    /// It lies past the end, and must be refused.
    pub(super) past_end: bool,
    /// What the snapshot was known to be when the request was handed in.
    pub(super) phase: Phase,
    /// An origin flush was known to have failed.
    pub(super) after_failed_flush: bool,
    /// It was handed in after close.
    pub(super) closing: bool,
    /// Snapshots (a bit a slot) that were taken after it had reached the disk.
    pub(super) inside: u32,
    /// It was handed in while the volume was suspended or on the way there, and
    /// queues.
    pub(super) queued: bool,
    /// Its snapshot was removed while it queued.
    pub(super) orphan: bool,
}

impl Session<'_> {
    /// The origin or a snapshot.
    pub(super) fn pick_view(&mut self) -> Option<usize> {
        let world = &mut *self.world;
        if world.rng.chance(world.plan.temper.origin, 16) {
            return None;
        }
        let there: Vec<usize> = (0..world.slots.len())
            .filter(|&i| world.slots[i].is_attached() || world.slots[i].phase == Phase::Removing)
            .collect();
        (!there.is_empty()).then(|| there[world.rng.index(there.len())])
    }

    fn view_of(&self, slot: Option<usize>) -> View {
        match slot.and_then(|i| self.world.slots[i].id) {
            Some(id) => View::Snapshot(id),
            None => View::Origin,
        }
    }

    /// Hand a request in.
    pub(super) fn hand_in(
        &mut self,
        slot: Option<usize>,
        cells: Cells,
        ask: Ask,
    ) -> Result<(), Violation> {
        let world = &mut *self.world;
        let past_end = world.rng.chance(1, 128) && ask != Ask::Flush;
        let stamp = if matches!(ask, Ask::Write { .. }) {
            world.new_stamp()
        } else {
            pattern::ZERO
        };
        let (offset, len) = (cells.offset(), cells.len_bytes());
        let offset = if past_end {
            world.sectors_of(slot) * SECTOR - len.min(SECTOR) + 1
        } else {
            offset
        };
        let command = match ask {
            Ask::Read => Command::Read { offset, len },
            Ask::Write { fua } => Command::Write {
                offset,
                data: Bytes::from(pattern::bytes(stamp, cells)),
                fua,
            },
            Ask::Zero { fua, fast_only } => Command::WriteZeroes {
                offset,
                len,
                fua,
                no_hole: world.rng.chance(1, 2),
                fast_only,
            },
            Ask::Trim { fua } => Command::Trim { offset, len, fua },
            Ask::Flush => Command::Flush,
        };
        let issued = world.tick();
        let phase = slot.map_or(Phase::Active, |i| world.slots[i].phase);
        let pending = Pending {
            slot,
            ask,
            cells,
            stamp,
            issued,
            past_end,
            phase,
            after_failed_flush: self.injected.origin_flush,
            closing: self.closing,
            inside: 0,
            queued: !self.closing && self.suspension != Suspension::Running,
            orphan: false,
        };
        self.next_id += 1;
        let id = self.next_id;
        say!(
            self.world,
            "[{issued}] request {id}: {} {ask:?} {offset}+{len} (cells {}..{}) stamp {stamp}",
            name(slot),
            cells.from,
            cells.to
        );
        self.note_request(&pending);
        let view = self.view_of(slot);
        self.pending.insert(id, pending);
        self.volume.handle_request(Request {
            id: RequestId(id),
            view,
            command,
        });
        self.listen()
    }

    /// Tell the model and the ledger of a request.
    fn note_request(&mut self, p: &Pending) {
        self.count_request(p);
        if p.past_end || !p.changes() {
            return;
        }
        let writes = p.writes();
        if self.view_model(p.slot).is_being_written(p.cells) {
            self.world.ledger.count(Tally::Overlapping);
        }
        self.view_model(p.slot)
            .begin_write(p.cells, p.stamp, p.issued);
        if !writes {
            return;
        }
        let World { slots, ledger, .. } = &mut *self.world;
        for (index, slot) in slots.iter_mut().enumerate() {
            let concerned = match p.slot {
                None => slot.is_attached() || slot.phase == Phase::Creating,
                Some(own) => own == index,
            };
            if !concerned || slot.phase == Phase::Invalid {
                continue;
            }
            if p.slot.is_none() && p.cells.offset() + p.cells.len_bytes() > slot.sectors * SECTOR {
                ledger.count(Tally::BehindSnapshot);
            }
            for chunk in slot.chunks(p.cells) {
                if slot.has[chunk as usize] == Has::No {
                    slot.has[chunk as usize] = Has::Maybe;
                    if p.slot.is_none() {
                        ledger.count(Tally::FirstOriginWrite);
                    } else {
                        slot.volatile.insert(chunk);
                    }
                    if (chunk + 1) * slot.plan.chunk_sectors > slot.sectors {
                        ledger.count(Tally::TailCopy);
                    }
                }
                if p.slot.is_none() && slot.volatile.remove(&chunk) {
                    ledger.count(Tally::VolatileCommitted);
                }
            }
        }
    }

    fn count_request(&mut self, p: &Pending) {
        let ledger = &mut self.world.ledger;
        let (from, len) = (p.cells.offset(), p.cells.len_bytes());
        if p.ask != Ask::Flush && !(from.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR)) {
            ledger.count(Tally::UnalignedToSector);
        }
        let fua = matches!(
            p.ask,
            Ask::Write { fua: true } | Ask::Zero { fua: true, .. } | Ask::Trim { fua: true }
        );
        let Some(index) = p.slot else {
            ledger.count(match p.ask {
                Ask::Read => Tally::OriginRead,
                Ask::Write { .. } => Tally::OriginWrite,
                Ask::Zero { .. } => Tally::OriginZero,
                Ask::Trim { .. } => Tally::OriginTrim,
                Ask::Flush => Tally::OriginFlush,
            });
            if fua {
                ledger.count(Tally::OriginFua);
            }
            return;
        };
        let chunk = self.world.slots[index].plan.chunk_bytes();
        let whole = from.is_multiple_of(chunk) && len >= chunk;
        ledger.count(match p.ask {
            Ask::Read => Tally::SnapshotRead,
            Ask::Write { .. } if whole => Tally::SnapshotWholeChunk,
            Ask::Write { .. } => Tally::SnapshotPartChunk,
            Ask::Zero { .. } => Tally::SnapshotZero,
            Ask::Trim { .. } => Tally::SnapshotTrim,
            Ask::Flush => Tally::SnapshotFlush,
        });
        if fua {
            ledger.count(Tally::SnapshotFua);
        }
    }

    /// Try the ways around the queue. Whether the request was served.
    pub(super) fn around_the_queue(
        &mut self,
        slot: Option<usize>,
        cells: Cells,
        ask: Ask,
    ) -> Result<bool, Violation> {
        if self.closing || !self.world.rng.chance(self.world.plan.fast, 8) {
            return Ok(false);
        }
        let view = self.view_of(slot);
        let (offset, len) = (cells.offset(), cells.len_bytes());
        let mut extents = Vec::new();
        let now = match ask {
            Ask::Read => self.volume.read_now(view, offset, len, &mut extents),
            Ask::Write { fua: false } => self.volume.write_now(view, offset, len, &mut extents),
            _ => return Ok(false),
        };
        if now == Now::Queue {
            self.world.ledger.count(Tally::FastDeclined);
            return Ok(false);
        }
        if extents.iter().map(|e| e.len).sum::<u64>() != len {
            return Err(Violation(format!(
                "the fast way of {} {offset}+{len} gives {extents:?}",
                name(slot)
            )));
        }
        let phase = slot.map_or(Phase::Active, |i| self.world.slots[i].phase);
        if self.suspension != Suspension::Running {
            return Err(Violation(format!(
                "the fast way of {} is open in a suspended volume",
                name(slot)
            )));
        }
        if matches!(phase, Phase::Invalid | Phase::Removing)
            || (phase == Phase::Overflowed && ask != Ask::Read)
        {
            return Err(Violation(format!(
                "the fast way of {} is open, though the snapshot is {phase:?}",
                name(slot)
            )));
        }
        let issued = self.world.tick();
        if ask == Ask::Read {
            self.world.ledger.count(Tally::FastRead);
            say!(
                self.world,
                "[{issued}] read around the queue: {} cells {}..{}",
                name(slot),
                cells.from,
                cells.to
            );
            let found = self.peek(&extents)?;
            let now = self.world.tick();
            self.compare(slot, cells, issued, now, &found)?;
            return Ok(true);
        }
        let in_place = extents.iter().any(|e| e.device != Device::Origin);
        self.world.ledger.count(if slot.is_none() && in_place {
            Tally::FastInPlace
        } else if slot.is_none() {
            Tally::FastWrite
        } else {
            Tally::FastSnapshotWrite
        });
        let stamp = self.world.new_stamp();
        say!(
            self.world,
            "[{issued}] write around the queue: {} cells {}..{} stamp {stamp}, to {extents:?}",
            name(slot),
            cells.from,
            cells.to
        );
        let p = Pending {
            slot,
            ask,
            cells,
            stamp,
            issued,
            past_end: false,
            phase,
            after_failed_flush: self.injected.origin_flush,
            closing: false,
            inside: 0,
            queued: false,
            orphan: false,
        };
        self.note_request(&p);
        let data = Bytes::from(pattern::bytes(stamp, cells));
        let mut at = 0;
        let mut end = End::Done;
        for extent in extents {
            let piece = data.slice(at..at + extent.len as usize);
            at += extent.len as usize;
            let disk = self.disk_index(extent.device)?;
            let World {
                origin, slots, rng, ..
            } = &mut *self.world;
            let disk = if disk == 0 {
                origin
            } else {
                &mut slots[disk - 1].disk
            };
            if disk
                .perform(
                    Action::Write {
                        offset: extent.offset,
                        data: vec![piece],
                    },
                    rng,
                )
                .is_err()
            {
                end = End::Failed;
            }
        }
        let now = self.world.tick();
        self.end_change(&p, now, end);
        Ok(true)
    }

    /// What the extents hold, at this moment.
    pub(super) fn peek(&self, extents: &[Extent]) -> Result<Vec<u8>, Violation> {
        let mut found = Vec::new();
        for extent in extents {
            let disk = match self.disk_index(extent.device)? {
                0 => &self.world.origin,
                n => &self.world.slots[n - 1].disk,
            };
            let (from, to) = (
                extent.offset as usize,
                (extent.offset + extent.len) as usize,
            );
            let Some(bytes) = disk.content().get(from..to) else {
                return Err(Violation(format!(
                    "{extent:?} lies past the end of its device"
                )));
            };
            found.extend_from_slice(bytes);
        }
        Ok(found)
    }

    /// Read a view from end to end, by one way or the other.
    pub(super) fn read_whole(&mut self, slot: Option<usize>) -> Result<Vec<u8>, Violation> {
        let view = self.view_of(slot);
        let len = self.world.cells_of(slot).len_bytes();
        let mut extents = Vec::new();
        if self.world.rng.chance(1, 2)
            && self.volume.read_now(view, 0, len, &mut extents) == Now::Go
        {
            return self.peek(&extents);
        }
        self.volume.handle_request(Request {
            id: RequestId(0),
            view,
            command: Command::Read { offset: 0, len },
        });
        loop {
            if let Some(reply) = self.volume.poll_reply() {
                let found = reply
                    .result
                    .map_err(|f| Violation(format!("{} cannot be read: {f:?}", name(slot))))?;
                return Ok(found.concat());
            }
            let Some(op) = self.volume.poll_disk_op() else {
                return Err(Violation(format!("a read of the {} is stuck", name(slot))));
            };
            if !matches!(op.action, Action::Read { .. }) {
                return Err(Violation(format!(
                    "a read of the {} asks for {}",
                    name(slot),
                    brief(&op.action)
                )));
            }
            let disk = self.disk_index(op.device)?;
            let World {
                origin, slots, rng, ..
            } = &mut *self.world;
            let device = if disk == 0 {
                origin
            } else {
                &mut slots[disk - 1].disk
            };
            let outcome = device.perform(op.action, rng);
            self.volume.handle_completion(op.id, outcome);
        }
    }
}

impl Pending {
    /// It may change the view.
    pub(super) fn changes(&self) -> bool {
        !matches!(self.ask, Ask::Read | Ask::Flush)
    }

    /// It copies chunks.
    pub(super) fn writes(&self) -> bool {
        !self.past_end && matches!(self.ask, Ask::Write { .. } | Ask::Zero { .. })
    }

    pub(super) fn fua(&self) -> bool {
        matches!(
            self.ask,
            Ask::Write { fua: true } | Ask::Zero { fua: true, .. } | Ask::Trim { fua: true }
        )
    }
}

/// A view's name in messages.
pub(super) fn name(slot: Option<usize>) -> String {
    slot.map_or_else(
        || "origin".into(),
        |index| format!("snapshot in store {index}"),
    )
}
