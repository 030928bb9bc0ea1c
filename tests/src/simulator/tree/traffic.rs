//! The clients of a process: requests to every node, and the ways around the queue.

use nbdsnap_engine::{Action, Device, Now};

use super::process::{Course, Process};
use super::tally::Tally;
use super::world::{Name, Phase, World};
use crate::model::End;
use crate::pattern::{self, Cells};
use crate::simulator::Violation;
use crate::workload::Ask;

impl Process<'_> {
    /// Requests and orders, until the process is to end.
    pub(super) fn traffic(&mut self) -> Result<(), Violation> {
        let (steps, haste, orders) = {
            let plan = &self.world.plan;
            (plan.steps, plan.haste, plan.orders)
        };
        for _ in 0..self.world.rng.between(1, steps) {
            if self.world.rng.chance(orders, 64) {
                self.order()?;
            } else if self.world.rng.chance(haste, 16) {
                self.work(true)?;
            } else {
                match self.world.rng.below(8) {
                    0 | 1 => {
                        self.work(false)?;
                    }
                    2 => self.around_the_queue()?,
                    3 if self.world.rng.chance(1, 8) => self.compare_all()?,
                    4 if self.world.rng.chance(1, 16) => self.come_to_rest()?,
                    _ => self.request()?,
                }
            }
            self.pump()?;
        }
        Ok(())
    }

    fn pick_view(&mut self) -> Name {
        let there: Vec<usize> = (0..self.world.nodes.len())
            .filter(|&i| self.world.nodes[i].phase.is_view())
            .collect();
        if there.is_empty() || self.world.rng.chance(1, 5) {
            return None;
        }
        Some(there[self.world.rng.index(there.len())])
    }

    fn pick_cells(&mut self) -> Cells {
        let World {
            rng, plan, model, ..
        } = &mut *self.world;
        let all = model.all().to;
        let most = if rng.chance(1, 2) {
            plan.hot_cells as usize
        } else {
            all
        };
        let from = rng.index(most.min(all));
        let longest = if rng.chance(1, 8) { all } else { 24 };
        let mut cells = Cells {
            from,
            to: (from + 1 + rng.index(longest)).min(all),
        };
        if rng.chance(1, 2) {
            // Whole sectors.
            cells.from -= cells.from % pattern::CELLS;
            cells.to = cells.to.next_multiple_of(pattern::CELLS).min(all);
        }
        cells
    }

    fn request(&mut self) -> Result<(), Violation> {
        let name = self.pick_view();
        let cells = self.pick_cells();
        let rng = &mut self.world.rng;
        let fua = rng.chance(1, 6);
        let ask = match rng.below(32) {
            0..=7 => Ask::Read,
            8..=23 => Ask::Write { fua },
            24 | 25 => Ask::Zero {
                fua,
                fast_only: rng.chance(1, 4),
            },
            26 | 27 => Ask::Trim { fua },
            _ => Ask::Flush,
        };
        let is_inner = name.is_some() && !self.world.snapshots_of(name).is_empty();
        let ledger = &mut self.world.ledger;
        ledger.count(match ask {
            Ask::Read => Tally::Read,
            Ask::Write { .. } => Tally::Write,
            Ask::Zero { .. } => Tally::Zero,
            Ask::Trim { .. } => Tally::Trim,
            Ask::Flush => Tally::Flush,
        });
        let is_write = matches!(ask, Ask::Write { .. } | Ask::Zero { .. });
        let flushes = ask == Ask::Flush || (fua && ask != Ask::Read);
        if flushes && ask != Ask::Flush {
            ledger.count(Tally::Fua);
        }
        if is_inner && is_write {
            ledger.count(Tally::InnerWrite);
        }
        if is_inner && flushes {
            ledger.count(Tally::InnerFlush);
        }
        self.hand_in(name, cells, ask)
    }

    /// A read or write that is done at once, if it can be.
    fn around_the_queue(&mut self) -> Result<(), Violation> {
        let name = self.pick_view();
        let cells = self.pick_cells();
        if self.world.rng.chance(1, 2) {
            return self.fast_read(name, cells);
        }
        let view = self.world.view(name);
        let mut extents = Vec::new();
        let (offset, len) = (cells.offset(), cells.len_bytes());
        if self.tree.write_now(view, offset, len, &mut extents) == Now::Queue {
            self.world.ledger.count(Tally::FastDeclined);
            return Ok(());
        }
        self.expect_running("a write")?;
        let p = self.new_request(name, cells, Ask::Write { fua: false });
        let data = pattern::bytes(p.stamp, cells);
        let mut at = 0;
        for extent in extents {
            let piece = data[at..at + extent.len as usize].to_vec();
            at += piece.len();
            let World {
                disk, nodes, rng, ..
            } = &mut *self.world;
            let disk = match extent.device {
                Device::Origin => disk,
                Device::Cow(id) => {
                    let node = nodes.iter_mut().find(|node| node.id == Some(id));
                    &mut node.expect("the tree names what there is").disk
                }
            };
            let action = Action::Write {
                offset: extent.offset,
                data: vec![piece.into()],
            };
            if disk.perform(action, rng).is_err() {
                return Err(Violation("a disk fails unasked".into()));
            }
        }
        let now = self.world.tick();
        self.end_change(&p, now, End::Done);
        let is_inner = !self.world.snapshots_of(name).is_empty();
        self.world.ledger.count(match name {
            None => Tally::FastWriteRoot,
            Some(_) if is_inner => Tally::FastWriteInner,
            Some(_) => Tally::FastWrite,
        });
        Ok(())
    }

    fn fast_read(&mut self, name: Name, cells: Cells) -> Result<(), Violation> {
        let mut p = self.new_request(name, cells, Ask::Read);
        let Some((found, extents)) = self.read_now(name, cells) else {
            self.world.ledger.count(Tally::FastDeclined);
            return Ok(());
        };
        self.expect_running("a read")?;
        p.issued = self.world.tick();
        let now = self.world.tick();
        self.compare("a read around the queue", &p, now, &found)?;
        self.world.ledger.count(Tally::FastRead);
        let mut devices: Vec<_> = extents.iter().map(|extent| extent.device).collect();
        devices.sort_unstable();
        devices.dedup();
        if devices.len() >= 3 {
            self.world.ledger.count(Tally::FastReadDeep);
        }
        Ok(())
    }

    fn expect_running(&self, what: &str) -> Result<(), Violation> {
        match self.course {
            Course::Running => Ok(()),
            course => Err(Violation(format!(
                "{what} around a queue that is {course:?}"
            ))),
        }
    }

    /// Let the tree close.
    pub(super) fn close(&mut self) -> Result<(), Violation> {
        if self.world.rng.chance(1, 2) || !self.group.is_empty() {
            self.come_to_rest()?;
        }
        if matches!(self.course, Course::Suspending | Course::Suspended) {
            self.resume()?;
        }
        // A creation that is under way comes to its end first.
        let creates = |world: &World| world.nodes.iter().any(|n| n.phase == Phase::Creating);
        if creates(self.world) {
            self.come_to_rest()?;
        }
        self.course = Course::Closing;
        self.tree.close();
        let mut idle = 0;
        while self.course != Course::Closed {
            self.pump()?;
            idle = if self.work(true)? { 0 } else { idle + 1 };
            if idle > 64 {
                return Err(Violation("a close is stuck".into()));
            }
        }
        match self.pending.first_key_value() {
            Some((id, p)) => Err(Violation(format!("closed over request {id}: {p:?}"))),
            None => Ok(()),
        }
    }
}
