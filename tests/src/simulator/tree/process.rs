//! One process: a tree, the requests it is given, and the operations that it hands out.

use std::collections::BTreeMap;

use nbdsnap_engine::disk::sim::SimDisk;
use nbdsnap_engine::{Command, Device, InstantId, OpId, Request, RequestId, Tree, VolumeConfig};

use super::tally::Tally;
use super::world::{Name, World};
use crate::model::{Crash, Time};
use crate::pattern::{self, Cells, SECTOR, Stamp};
use crate::simulator::operations::brief;
use crate::simulator::world::say;
use crate::simulator::{Checks, Violation};
use crate::workload::Ask;

/// A request that was not answered yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pending {
    pub(super) name: Name,
    pub(super) ask: Ask,
    pub(super) cells: Cells,
    pub(super) stamp: Stamp,
    pub(super) issued: Time,
    /// It was handed in while the tree was suspended or on the way there.
    pub(super) queued: bool,
    /// Its snapshot has gone, or become a part of another view.
    pub(super) orphan: bool,
}

impl Pending {
    pub(super) fn changes(&self) -> bool {
        !matches!(self.ask, Ask::Read | Ask::Flush)
    }

    pub(super) fn fua(&self) -> bool {
        matches!(
            self.ask,
            Ask::Write { fua: true } | Ask::Zero { fua: true, .. } | Ask::Trim { fua: true }
        )
    }
}

/// Whether the tree takes requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Course {
    Running,
    Suspending,
    Suspended,
    Closing,
    Closed,
}

/// A tree and its clients.
pub(super) struct Process<'w> {
    pub(super) world: &'w mut World,
    pub(super) tree: Tree,
    pub(super) checks: Checks,
    pub(super) pending: BTreeMap<u64, Pending>,
    next_id: u64,
    pub(super) course: Course,
    /// Instants that are to be one, each with whether it is held.
    pub(super) group: Vec<(InstantId, bool)>,
}

impl<'w> Process<'w> {
    /// A disk without snapshots.
    pub(super) fn new(world: &'w mut World, checks: Checks) -> Self {
        let mut tree = Tree::new(VolumeConfig {
            origin_bytes: world.plan.sectors * SECTOR,
            copy_memory: world.plan.copy_memory,
            copy_piece: world.plan.copy_piece,
        });
        tree.set_law(checks.law());
        tree.set_window(world.plan.window);
        tree.set_merge_step(world.plan.merge_step);
        Self {
            world,
            tree,
            checks,
            pending: BTreeMap::new(),
            next_id: 0,
            course: Course::Running,
            group: Vec::new(),
        }
    }

    /// Hand a request in.
    pub(super) fn hand_in(&mut self, name: Name, cells: Cells, ask: Ask) -> Result<(), Violation> {
        let p = self.new_request(name, cells, ask);
        let (offset, len) = (cells.offset(), cells.len_bytes());
        let command = match ask {
            Ask::Read => Command::Read { offset, len },
            Ask::Write { fua } => Command::Write {
                offset,
                data: pattern::bytes(p.stamp, cells).into(),
                fua,
            },
            Ask::Zero { fua, fast_only } => Command::WriteZeroes {
                offset,
                len,
                fua,
                no_hole: self.world.rng.chance(1, 2),
                fast_only,
            },
            Ask::Trim { fua } => Command::Trim { offset, len, fua },
            Ask::Flush => Command::Flush,
        };
        self.next_id += 1;
        let id = self.next_id;
        say!(self.world, "request {id}: {p:?}");
        self.pending.insert(id, p);
        let view = self.world.view(name);
        let id = RequestId(id);
        self.tree.handle_request(Request { id, view, command });
        self.listen()
    }

    /// A request that is about to be made; the model is told of it.
    pub(super) fn new_request(&mut self, name: Name, cells: Cells, ask: Ask) -> Pending {
        let issued = self.world.tick();
        let is_write = matches!(ask, Ask::Write { .. });
        self.world.stamp += u32::from(is_write);
        let stamp = if is_write {
            self.world.stamp
        } else {
            pattern::ZERO
        };
        let p = Pending {
            name,
            ask,
            cells,
            stamp,
            issued,
            queued: self.course != Course::Running,
            orphan: false,
        };
        if p.changes() {
            self.world.model(name).begin_write(cells, stamp, issued);
        }
        p
    }

    /// The disk that a device is.
    fn disk(&mut self, device: Device) -> &mut SimDisk {
        match device {
            Device::Origin => &mut self.world.disk,
            Device::Cow(id) => {
                let index = self.world.node_of(id);
                &mut self.world.nodes[index].disk
            }
        }
    }

    /// Take operations until there are no more, or some of them.
    pub(super) fn pump(&mut self) -> Result<(), Violation> {
        while let Some(op) = self.tree.poll_disk_op() {
            say!(
                self.world,
                "    op {}: {:?} {}",
                op.id.0,
                op.device,
                brief(&op.action)
            );
            if self.course == Course::Suspended {
                return Err(Violation(format!("a suspended tree asks for {op:?}")));
            }
            let mut rng = self.world.rng.clone();
            self.disk(op.device).issue(op.id.0, op.action, &mut rng);
            self.world.rng = rng;
            if self.world.rng.chance(1, 12) {
                break;
            }
        }
        self.listen()
    }

    /// The disks that have operations in flight: the disk, or a snapshot's store.
    pub(super) fn busy(&self) -> Vec<Name> {
        let stores = (0..self.world.nodes.len()).map(Some);
        let is_busy = |name: &Name| match name {
            None => self.world.disk.in_flight() > 0,
            Some(index) => self.world.nodes[*index].disk.in_flight() > 0,
        };
        std::iter::once(None)
            .chain(stores)
            .filter(is_busy)
            .collect()
    }

    /// Let some operation progress, or end. False if there is none.
    pub(super) fn work(&mut self, to_its_end: bool) -> Result<bool, Violation> {
        let busy = self.busy();
        if busy.is_empty() {
            return Ok(false);
        }
        let World {
            disk, nodes, rng, ..
        } = &mut *self.world;
        let disk = match busy[rng.index(busy.len())] {
            None => disk,
            Some(index) => &mut nodes[index].disk,
        };
        let index = rng.index(disk.in_flight());
        if !to_its_end {
            disk.progress(index, rng);
            return Ok(true);
        }
        let (tag, outcome) = disk.end(index, rng);
        say!(self.world, "    op {tag} ends");
        self.tree.handle_completion(OpId(tag), outcome);
        self.listen()?;
        if self.world.rng.chance(3, 4) {
            self.pump()?;
        }
        Ok(true)
    }

    /// Let everything that can end do so.
    pub(super) fn come_to_rest(&mut self) -> Result<(), Violation> {
        if matches!(self.course, Course::Suspending | Course::Suspended) {
            self.resume()?;
        }
        self.abandon_group()?;
        loop {
            // More than once: the pump may stop in between.
            for _ in 0..4 {
                self.pump()?;
            }
            if !self.work(true)? {
                let before = self.pending.len();
                for _ in 0..64 {
                    self.pump()?;
                }
                if self.busy().is_empty() && self.pending.len() == before {
                    break;
                }
            }
        }
        if let Some((id, p)) = self.pending.first_key_value() {
            return Err(Violation(format!("request {id} is stuck: {p:?}")));
        }
        Ok(())
    }

    /// Take replies and events.
    pub(super) fn listen(&mut self) -> Result<(), Violation> {
        while let Some(reply) = self.tree.poll_reply() {
            self.on_reply(reply)?;
        }
        while let Some(event) = self.tree.poll_event() {
            say!(self.world, "event: {event:?}");
            self.on_event(&event)?;
        }
        Ok(())
    }

    pub(super) fn count_crash(&mut self, crash: Crash, closed: bool) {
        let deep = self.busy().len() >= 4;
        let ledger = &mut self.world.ledger;
        ledger.count(match crash {
            Crash::Power if closed => Tally::CrashAfterClose,
            Crash::Power => Tally::PowerCut,
            Crash::Kill | Crash::KillAfterError => Tally::Killed,
        });
        if self.course == Course::Suspended {
            ledger.count(Tally::CrashSuspended);
        }
        if deep {
            ledger.count(Tally::CrashDeep);
        }
    }
}
