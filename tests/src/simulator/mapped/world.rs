//! What outlives a process: the disks, what the operator remembers of tables and
//! snapshots, the models of the views, and the count.

use nbdsnap_engine::disk::sim::{Loss, Rng, SimDisk};
use nbdsnap_engine::dm::{DiskId, Line, Lower, Persistence, Target};

use super::process::Pending;
use super::tally::{Ledger, Tally};
use crate::model::{Crash, Time, ViewModel, Wrong};
use crate::pattern::{self, CELLS, SECTOR, Stamp};
use crate::simulator::world::say;
use crate::simulator::{Checks, Violation};
use crate::store_bytes;

/// Sectors of the origin, and so of every view.
pub(super) const SECTORS: u64 = 96;
/// Devices for stores.
pub(super) const COWS: usize = 6;
/// Sectors of the largest of them.
const ROOM: u64 = 200;
/// Sectors before the stores on a disk that the origin has a part of.
const FIRST: u64 = 128;

/// Why a process ends.
pub(super) enum Stop {
    /// The power fails, or the process is killed.
    Cut,
    /// Something is not as it must be.
    Wrong(Violation),
}

impl From<Violation> for Stop {
    fn from(violation: Violation) -> Self {
        Self::Wrong(violation)
    }
}

/// What a process is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Tables are loaded, and views compared.
    Boot,
    Traffic,
    /// An order is under way.
    Order,
    /// A store is being handed over.
    Handover,
    /// All has come to its end.
    Closed,
}

/// Names a view: none for the origin, else a snapshot's place in [`World::snaps`].
pub(super) type Name = Option<usize>;

/// Where a snapshot stands, as its operator knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// It is being taken: a crash undoes that.
    Creating,
    /// A view that can be read and written.
    Active,
    /// Lost; `marked`: it was said to be so durably.
    Lost { marked: bool },
    /// Its store has been given to a snapshot-merge that is about to be resumed.
    MergeOrdered,
    /// Its origin reads as it does.
    Merging,
    /// All of it lies in the origin.
    Merged,
    /// It is no more.
    Gone,
}

impl Phase {
    pub(super) fn merges(self) -> bool {
        matches!(self, Self::MergeOrdered | Self::Merging | Self::Merged)
    }

    pub(super) fn is_lost(self) -> bool {
        matches!(self, Self::Lost { .. })
    }
}

/// A snapshot.
pub(super) struct Snap {
    pub(super) origin: Name,
    /// Which device its store is on.
    pub(super) cow: usize,
    pub(super) persistence: Persistence,
    /// Sectors.
    pub(super) chunk: u64,
    /// The device that is its view, or its merge.
    pub(super) device: String,
    pub(super) model: ViewModel,
    pub(super) phase: Phase,
    /// Its store can hold all that may come.
    pub(super) is_roomy: bool,
    /// Nobody knows what it shows: it was taken of one that was just being lost.
    pub(super) is_unknown: bool,
}

/// The disks, the tables, the models and the count.
pub(super) struct World {
    pub(super) rng: Rng,
    pub(super) disks: Vec<SimDisk>,
    /// The table of the origin.
    pub(super) real: Vec<Line>,
    /// The tables of the devices for stores.
    pub(super) cows: Vec<Vec<Line>>,
    pub(super) model: ViewModel,
    pub(super) snaps: Vec<Snap>,
    pub(super) clock: Time,
    pub(super) stamp: Stamp,
    /// Steps until the process is cut off.
    pub(super) fuse: Option<u64>,
    /// What happened since all views were compared last.
    pub(super) crash: Option<Crash>,
    /// A disk has been failing since then.
    pub(super) faulty: bool,
    pub(super) place: Place,
    pub(super) window: u64,
    pub(super) merge_step: u64,
    /// Orders come this often, in 64ths; disks begin to fail this often, in 1024ths.
    pub(super) orders: u64,
    pub(super) faults: u64,
    pub(super) images: Vec<u64>,
    pub(super) ledger: Ledger,
    pub(super) told: bool,
}

pub(super) fn disk(n: usize) -> Lower {
    Lower::Disk(DiskId(n as u32))
}

pub(super) fn line(start: u64, len: u64, target: Target) -> Line {
    Line { start, len, target }
}

pub(super) fn linear(lower: Lower, start: u64) -> Target {
    Target::Linear { lower, start }
}

fn striped(chunk: u64, stripes: &[(usize, u64)]) -> Target {
    let stripes = stripes.iter().map(|&(n, start)| (disk(n), start)).collect();
    Target::Striped { chunk, stripes }
}

/// What the origin is made of.
fn origin_lines(rng: &mut Rng) -> Vec<Line> {
    match rng.below(5) {
        0 => vec![line(0, SECTORS, linear(disk(0), 8))],
        1 => vec![
            line(0, 20, linear(disk(1), 3)),
            line(20, SECTORS - 20, linear(disk(0), 30)),
        ],
        2 => vec![
            line(0, 16, striped(4, &[(0, 1), (1, 8)])),
            line(16, SECTORS - 16, linear(disk(1), 20)),
        ],
        3 => vec![line(0, SECTORS, striped(2, &[(0, 5), (1, 0), (2, 7)]))],
        _ => vec![line(0, SECTORS, striped(4, &[(0, 5), (1, 0)]))],
    }
}

/// A device for a store: beside the origin, on a disk of its own, or dealt out.
fn cow_lines(rng: &mut Rng, n: u64) -> Vec<Line> {
    let at = FIRST + ROOM * n;
    let len = match rng.below(6) {
        0 => rng.between(4, 24) * 2,
        _ => ROOM,
    };
    let target = match rng.below(4) {
        0 | 1 => linear(disk(2), at),
        2 => linear(disk(rng.index(2)), at),
        _ => striped(4, &[(0, at), (2, at)]),
    };
    let len = match target {
        Target::Striped { .. } => len / 8 * 8,
        _ => len,
    };
    vec![line(0, len.max(8), target)]
}

impl World {
    pub(super) fn new(seed: u64, checks: Checks) -> Self {
        let mut rng = Rng::new(seed);
        let real = origin_lines(&mut rng);
        let cows = (0..COWS as u64).map(|n| cow_lines(&mut rng, n)).collect();
        let bytes = ((FIRST + ROOM * COWS as u64) * SECTOR) as usize;
        let dirty = rng.chance(1, 2);
        let disks = (0..3).map(|_| {
            let mut content = vec![0; bytes];
            if dirty {
                pattern::fill(u32::MAX, 0, &mut content);
            }
            content
        });
        let mut world = Self {
            disks: Vec::new(),
            real,
            cows,
            model: ViewModel::new(SECTORS as usize * CELLS, |_| 1),
            snaps: Vec::new(),
            clock: 1,
            stamp: 1,
            fuse: None,
            crash: None,
            faulty: false,
            place: Place::Boot,
            window: rng.between(1, 16) * SECTOR,
            merge_step: rng.between(1, 8) * SECTOR,
            orders: rng.between(1, 10),
            faults: match rng.below(3) {
                0 => rng.between(2, 30),
                _ => 0,
            },
            images: Vec::new(),
            ledger: Ledger::default(),
            told: checks.told,
            rng,
        };
        let mut contents: Vec<Vec<u8>> = disks.collect();
        for (n, (disk, sector)) in places(&world.real).into_iter().enumerate() {
            let at = sector as usize * SECTOR as usize;
            let to = &mut contents[disk][at..at + SECTOR as usize];
            pattern::fill(1, n as u64 * SECTOR, to);
        }
        world.disks = contents.into_iter().map(SimDisk::new).collect();
        world
    }

    pub(super) fn tick(&mut self) -> Time {
        self.clock += 1;
        self.clock
    }

    pub(super) fn model(&mut self, name: Name) -> &mut ViewModel {
        match name {
            None => &mut self.model,
            Some(index) => &mut self.snaps[index].model,
        }
    }

    /// Snapshots of a view that are not gone.
    pub(super) fn snaps_of(&self, name: Name) -> Vec<usize> {
        let of_it = |&i: &usize| self.snaps[i].origin == name && self.snaps[i].phase != Phase::Gone;
        (0..self.snaps.len()).filter(of_it).collect()
    }

    /// Those in this phase.
    pub(super) fn in_phase(&self, is_it: impl Fn(Phase) -> bool) -> Vec<usize> {
        (0..self.snaps.len())
            .filter(|&i| is_it(self.snaps[i].phase))
            .collect()
    }

    /// The snapshot that is being merged into a view.
    pub(super) fn merging_into(&self, name: Name) -> Option<usize> {
        let merges = |&i: &usize| self.snaps[i].phase.merges();
        self.snaps_of(name).into_iter().find(merges)
    }

    /// The snapshots that a view consists of, down to the origin.
    pub(super) fn path(&self, name: Name) -> Vec<usize> {
        std::iter::successors(name, |&index| self.snaps[index].origin).collect()
    }

    /// A store on the way down from the view may be full, or is lost.
    pub(super) fn may_be_lost(&self, name: Name) -> bool {
        let lost = |&i: &usize| {
            let snap = &self.snaps[i];
            !snap.is_roomy || snap.phase.is_lost() || snap.is_unknown
        };
        self.path(name).iter().any(lost)
    }

    /// The request may come to the origin's volume in several parts, with an instant
    /// between them, as the kernel's do: its table cuts it.
    pub(super) fn may_be_cut(&self, p: &Pending) -> bool {
        let in_one = matches!(
            self.real[..],
            [Line {
                target: Target::Linear { .. },
                ..
            }]
        );
        let sectors = p.cells.from / CELLS..p.cells.to.div_ceil(CELLS);
        p.name.is_none() && !in_one && sectors.len() > 1
    }

    pub(super) fn is_unknown(&self, name: Name) -> bool {
        self.path(name).iter().any(|&i| self.snaps[i].is_unknown)
    }

    /// The snapshot and all that stand on it are given up.
    pub(super) fn bury(&mut self, index: usize) {
        self.snaps[index].phase = Phase::Gone;
        for above in self.snaps_of(Some(index)) {
            self.bury(above);
        }
    }

    pub(super) fn room(&self, cow: usize) -> u64 {
        self.cows[cow]
            .last()
            .map_or(0, |line| line.start + line.len)
    }

    /// The power fails, or the process is killed: what that does to the disks.
    pub(super) fn crash(&mut self, crash: Crash) {
        let crash = match crash {
            Crash::Kill if self.faulty => Crash::KillAfterError,
            other => other,
        };
        say!(self, "-- {crash:?}");
        let Self { disks, rng, .. } = self;
        let same = rng.chance(1, 2).then(|| Loss::pick(rng));
        let mut digest = 0;
        for disk in disks {
            match crash {
                Crash::Power => disk.power_cut(same.unwrap_or_else(|| Loss::pick(rng)), rng),
                Crash::Kill | Crash::KillAfterError => disk.kill(rng),
            }
            digest = disk.digest(digest);
        }
        if self.place == Place::Handover {
            self.ledger.count(Tally::HandoverCut);
        }
        self.ledger.count(match (crash, self.place) {
            (Crash::Power, Place::Order | Place::Handover) => Tally::PowerCutInOrder,
            (Crash::Power, Place::Boot) => Tally::PowerCutInBoot,
            (Crash::Power, Place::Traffic) => Tally::PowerCut,
            (Crash::Power, Place::Closed) => Tally::CrashAfterClose,
            (Crash::Kill | Crash::KillAfterError, _) => Tally::Killed,
        });
        if crash == Crash::Power {
            self.images.push(digest);
        }
        // The worst of all that happened since views were compared last.
        self.crash = Some(match (self.crash, crash) {
            (Some(Crash::Power), _) | (_, Crash::Power) => Crash::Power,
            (Some(Crash::KillAfterError), _) | (_, Crash::KillAfterError) => Crash::KillAfterError,
            _ => Crash::Kill,
        });
    }

    /// A view and its model differ.
    pub(super) fn wrong(&self, what: &str, name: Name, wrong: &Wrong) -> Violation {
        let offset = pattern::byte_of(wrong.cell);
        let known = |stamp: &Stamp| pattern::matches(*stamp, offset, &wrong.found);
        let found = match (0..=self.stamp).rev().find(known) {
            Some(stamp) => format!("stamp {stamp}"),
            None => "bytes that nobody wrote there".into(),
        };
        Violation(format!(
            "{what}: {}, sector {}, cell {}, shows {found} where it may show {}",
            called(name),
            wrong.cell / CELLS,
            wrong.cell,
            wrong.allowed
        ))
    }

    /// What a view holds by the bytes of its stores, stacked as the kernel would, with
    /// merges that are under way where they are. None if a store on the way has no bytes
    /// that say so: it is lost, or transient.
    pub(super) fn stacked(&self, name: Name) -> Option<Vec<u8>> {
        let mut bytes = self.bytes_of(&self.real);
        // What a snapshot stands on is a device, without the merge that may be over it.
        for &index in self.path(name).iter().rev() {
            self.overlay(index, &mut bytes)?;
        }
        self.overlay_merge(name, &mut bytes)?;
        Some(bytes)
    }

    fn overlay_merge(&self, name: Name, bytes: &mut [u8]) -> Option<()> {
        let of_it = self.snaps_of(name);
        let merging = of_it
            .into_iter()
            .find(|&index| self.snaps[index].phase == Phase::Merging);
        merging.map_or(Some(()), |index| self.overlay(index, bytes))
    }

    /// Put the chunks of a store in the place of those that it has exceptions for.
    fn overlay(&self, index: usize, bytes: &mut [u8]) -> Option<()> {
        let snap = &self.snaps[index];
        if snap.persistence == Persistence::Transient {
            return None;
        }
        let size = (snap.chunk * SECTOR) as usize;
        let store = self.bytes_of(&self.cows[snap.cow]);
        for (old, new) in store_bytes::mappings(&store, snap.chunk)? {
            let (from, to) = (new as usize * size, old as usize * size);
            let end = (to + size).min(bytes.len());
            bytes[to..end].copy_from_slice(&store[from..from + (end - to)]);
        }
        Some(())
    }

    /// What reads of a device would show at this moment.
    fn bytes_of(&self, lines: &[Line]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (disk, sector) in places(lines) {
            let at = (sector * SECTOR) as usize;
            bytes.extend_from_slice(&self.disks[disk].content()[at..at + SECTOR as usize]);
        }
        bytes
    }
}

/// Where each sector of a device lies: on which disk, at which sector there.
pub(super) fn places(lines: &[Line]) -> Vec<(usize, u64)> {
    let mut places = Vec::new();
    let number = |lower: Lower| match lower {
        Lower::Disk(DiskId(n)) => n as usize,
        Lower::Device(_) => unreachable!("these tables name disks"),
    };
    for Line { len, target, .. } in lines {
        for at in 0..*len {
            places.push(match target {
                Target::Linear { lower, start } => (number(*lower), start + at),
                Target::Striped { chunk, stripes } => {
                    let (index, inside) = (at / chunk, at % chunk);
                    let count = stripes.len() as u64;
                    let (lower, start) = stripes[(index % count) as usize];
                    (number(lower), start + index / count * chunk + inside)
                }
                other => unreachable!("no such line is below: {other:?}"),
            });
        }
    }
    places
}

/// A view's name in messages.
pub(super) fn called(name: Name) -> String {
    name.map_or_else(|| "the origin".into(), |index| format!("snapshot {index}"))
}
