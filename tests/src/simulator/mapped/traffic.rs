//! Requests by every way to a view, and what befalls the disks, in an order that the seed
//! decides.

use nbdsnap_engine::disk::sim::Faults;
use nbdsnap_engine::dm::Lower;

use super::process::Process;
use super::tally::Tally;
use super::world::{Name, Phase, Place, SECTORS, Stop, disk, places};
use crate::pattern::{CELLS, Cells};
use crate::simulator::world::say;
use crate::workload::Ask;

/// Requests under way at most.
const MOST: usize = 14;

impl Process<'_> {
    /// Requests and orders, until the operator has had enough, or the fuse has burnt down.
    pub(super) fn traffic(&mut self) -> Result<(), Stop> {
        let rounds = self.world.rng.between(20, 120);
        for _ in 0..rounds {
            let (orders, faults) = (self.world.orders, self.world.faults);
            if self.world.rng.chance(faults, 1024) {
                self.break_a_disk();
            }
            if self.world.rng.chance(1, 40) {
                self.mend_disks();
            }
            if self.world.rng.chance(orders, 64) {
                self.world.place = Place::Order;
                self.random_order()?;
                self.world.place = Place::Traffic;
            }
            if self.world.rng.chance(2, 3) {
                self.random_request();
            }
            for _ in 0..self.world.rng.below(8) {
                self.step()?;
            }
        }
        Ok(())
    }

    fn break_a_disk(&mut self) {
        let at = self.world.rng.index(self.world.disks.len());
        let mut rate = |often: u64| match self.world.rng.below(3) {
            0 => 0,
            _ => self.world.rng.below(often),
        };
        let faults = Faults {
            read: rate(60),
            write: rate(100),
            flush: rate(300),
            grow: 0,
        };
        say!(self.world, "-- disk {at} begins to fail: {faults:?}");
        self.world.disks[at].set_faults(faults);
        self.world.faulty = true;
        let ledger = &mut self.world.ledger;
        for (rate, tally) in [
            (faults.read, Tally::FaultRead),
            (faults.write, Tally::FaultWrite),
            (faults.flush, Tally::FaultFlush),
        ] {
            if rate > 0 {
                ledger.count(tally);
            }
        }
    }

    fn mend_disks(&mut self) {
        for disk in &mut self.world.disks {
            disk.set_faults(Faults::default());
        }
    }

    /// Views that requests may be sent to.
    fn names(&self) -> Vec<Name> {
        let is_view = |phase: Phase| phase == Phase::Active || phase.is_lost();
        let snaps = self.world.in_phase(is_view).into_iter().map(Some);
        std::iter::once(None)
            .chain(snaps)
            .filter(|name| name.is_none() || *name != self.held)
            .collect()
    }

    /// One request, to some view.
    pub(super) fn random_request(&mut self) {
        if self.pending.len() >= MOST || self.closes {
            return;
        }
        let names = self.names();
        let name = names[self.world.rng.index(names.len())];
        let fua = self.world.rng.chance(1, 10);
        let ask = match self.world.rng.below(40) {
            0..10 => Ask::Read,
            10..29 => Ask::Write { fua },
            29..32 => Ask::Zero {
                fua,
                fast_only: false,
            },
            32..34 => Ask::Trim { fua },
            _ => Ask::Flush,
        };
        let all = SECTORS as usize * CELLS;
        // Often whole sectors, and often the same ones.
        let near = if self.world.rng.chance(1, 2) {
            8 * CELLS
        } else {
            all
        };
        let whole = self.world.rng.chance(1, 2);
        let grain = if whole { CELLS } else { 1 };
        let from = self.world.rng.index(near / grain) * grain;
        let len = (1 + self.world.rng.index(if whole { 4 } else { 10 })) * grain;
        let cells = Cells {
            from,
            to: (from + len).min(all),
        };
        let (to, cells) = self.way(name, cells, ask);
        let cells = match ask {
            Ask::Flush => Cells { from: 0, to: 0 },
            _ => cells,
        };
        self.count_request(name, ask, to);
        self.hand_in(name, cells, ask, to);
    }

    /// By which device or disk a request goes; beneath the origin, a part of it.
    fn way(&mut self, name: Name, cells: Cells, ask: Ask) -> (Lower, Cells) {
        let Some(index) = name else {
            return match self.world.rng.below(5) {
                0 | 1 => (self.lower("base"), cells),
                2 | 3 => (self.lower("real"), cells),
                _ if ask == Ask::Flush => (self.lower("base"), cells),
                _ => {
                    let sector = cells.from / CELLS;
                    let end = (sector + 1) * CELLS;
                    let (at, _) = places(&self.world.real)[sector];
                    let to = cells.to.min(end);
                    (disk(at), Cells { to, ..cells })
                }
            };
        };
        let merging = self.world.merging_into(name);
        let over = merging.map(|index| self.world.snaps[index].device.clone());
        let over = over.filter(|device| self.mapper.find(device).is_some());
        match over {
            Some(device) if self.is_merge(&device) && self.world.rng.chance(1, 2) => {
                (self.lower(&device), cells)
            }
            _ => (self.lower(&self.world.snaps[index].device), cells),
        }
    }

    /// The device is a snapshot-merge.
    fn is_merge(&self, device: &str) -> bool {
        device.starts_with("merge")
            && self
                .mapper
                .info(self.device(device))
                .is_ok_and(|i| i.live_table)
    }

    fn count_request(&mut self, name: Name, ask: Ask, to: Lower) {
        let still = match to {
            Lower::Device(id) => {
                let info = self.mapper.info(id);
                info.is_ok_and(|info| info.suspended)
            }
            Lower::Disk(_) => false,
        };
        let merging = self.world.merging_into(name);
        let merging = merging.is_some_and(|i| self.world.snaps[i].phase == Phase::Merging);
        let is_inner = name.is_some() && !self.world.snaps_of(name).is_empty();
        let real = self.lower("real");
        let ledger = &mut self.world.ledger;
        let (tally, fua) = match ask {
            Ask::Read => (Tally::Read, false),
            Ask::Write { fua } => (Tally::Write, fua),
            Ask::Zero { fua, .. } => (Tally::Zero, fua),
            Ask::Trim { fua } => (Tally::Trim, fua),
            Ask::Flush => (Tally::Flush, false),
        };
        ledger.count(tally);
        let is_write = matches!(ask, Ask::Write { .. });
        let met = [
            (fua, Tally::Fua),
            (still, Tally::Queued),
            (name.is_none() && to == real, Tally::Around),
            (matches!(to, Lower::Disk(_)), Tally::Beneath),
            (merging && is_write, Tally::MergingWrite),
            (merging && (fua || ask == Ask::Flush), Tally::MergingFlush),
            (is_inner && is_write, Tally::InnerWrite),
        ];
        for (_, tally) in met.into_iter().filter(|(is_so, _)| *is_so) {
            ledger.count(tally);
        }
    }
}
