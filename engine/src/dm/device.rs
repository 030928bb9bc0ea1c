//! Devices: their tables, and whether they let requests through.

use std::collections::VecDeque;

use super::route::Asker;
use super::{Base, Mapper, SnapKey};
use super::{DeviceId, Line, Lower, Target};
use crate::request::Command;

/// Whether requests go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Course {
    Running,
    /// New requests queue; those under way end.
    Suspending,
    Suspended,
}

/// A line in use, and its snapshot if it has one.
#[derive(Debug)]
pub(super) struct Mapped {
    pub(super) line: Line,
    pub(super) snap: Option<SnapKey>,
}

/// What a table has a device open for. The kernel reads a snapshot's origin, and only
/// writes one that is merged into: it looks no closer at it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Usage {
    reads: bool,
    writes: bool,
}

impl Usage {
    fn is_any(self) -> bool {
        self.reads || self.writes
    }
}

/// A table that was loaded.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) lines: Vec<Mapped>,
    pub(super) read_only: bool,
}

#[derive(Debug)]
pub(super) struct Device {
    pub(super) name: String,
    pub(super) uuid: String,
    pub(super) live: Option<Table>,
    pub(super) inactive: Option<Table>,
    /// The table that was active before the one that is being resumed.
    pub(super) replaced: Option<Table>,
    pub(super) course: Course,
    pub(super) queued: VecDeque<(Command, Asker)>,
    /// Requests that have gone through and have not ended.
    pub(super) in_flight: u64,
    /// Clients that are attached to it.
    pub(super) clients: u64,
    pub(super) event_nr: u32,
    /// A table has been loaded once.
    pub(super) was_loaded: bool,
    /// It goes when the last client does.
    pub(super) deferred_remove: bool,
    /// It is on its way out.
    pub(super) leaving: bool,
}

impl Table {
    /// Bytes of the device.
    pub(super) fn bytes(&self) -> u64 {
        self.lines.last().map_or(0, |mapped| mapped.line.end())
    }

    pub(super) fn lowers(&self) -> Vec<Lower> {
        let lowers = self.lines.iter().flat_map(|m| m.line.target.lowers());
        let mut lowers: Vec<_> = lowers.collect();
        lowers.sort_unstable();
        lowers.dedup();
        lowers
    }

    /// What the table has something open for.
    fn usage(&self, lower: Lower) -> Usage {
        let mut usage = Usage::default();
        for Mapped { line, .. } in &self.lines {
            let (pair, merges) = match &line.target {
                Target::Snapshot(pair) => (pair, false),
                Target::SnapshotMerge(pair) => (pair, true),
                target => {
                    if target.lowers().contains(&lower) {
                        usage.reads = true;
                        usage.writes |= !self.read_only;
                    }
                    continue;
                }
            };
            if pair.origin == lower {
                usage.reads |= !merges;
                usage.writes |= merges;
            }
            if pair.cow == lower {
                usage.reads = true;
                usage.writes |= !self.read_only;
            }
        }
        usage
    }

    /// The lines that have something of `start..end`, in bytes, with which part of it.
    pub(super) fn cut(&self, start: u64, end: u64) -> impl Iterator<Item = (&Mapped, u64, u64)> {
        let first = self.lines.partition_point(|m| m.line.end() <= start);
        self.lines[first..]
            .iter()
            .take_while(move |m| m.line.first() < end)
            .map(move |m| (m, start.max(m.line.first()), end.min(m.line.end())))
    }

    pub(super) fn snaps(&self) -> impl Iterator<Item = SnapKey> {
        self.lines.iter().filter_map(|mapped| mapped.snap)
    }
}

impl Device {
    pub(super) fn new(name: String, uuid: String) -> Self {
        Self {
            name,
            uuid,
            live: None,
            inactive: None,
            replaced: None,
            course: Course::Running,
            queued: VecDeque::new(),
            in_flight: 0,
            clients: 0,
            event_nr: 0,
            was_loaded: false,
            deferred_remove: false,
            leaving: false,
        }
    }

    pub(super) fn tables(&self) -> impl Iterator<Item = &Table> {
        self.live.iter().chain(&self.inactive).chain(&self.replaced)
    }

    pub(super) fn bytes(&self) -> u64 {
        self.live.as_ref().map_or(0, Table::bytes)
    }
}

/// A part of a line, where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Lower(Lower),
    Base(Base),
}

/// A piece of a range of a device: where it goes, from which byte there, how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) way: Way,
    pub(super) offset: u64,
    pub(super) len: u64,
}

impl Mapped {
    /// The ways of the bytes `start..end` of the device, all within this line.
    pub(super) fn steps(&self, start: u64, end: u64, steps: &mut Vec<Step>) {
        let within = start - self.line.first();
        let len = end - start;
        // The snapshot targets count from the device's beginning, not from the line's.
        let one = |way| Step {
            way,
            offset: start,
            len,
        };
        match &self.line.target {
            Target::Linear { lower, start } => steps.push(Step {
                way: Way::Lower(*lower),
                offset: start * nbdsnap_format::SECTOR_BYTES + within,
                len,
            }),
            Target::Striped { chunk, stripes } => {
                let chunk = chunk * nbdsnap_format::SECTOR_BYTES;
                let (mut at, end) = (within, within + len);
                while at < end {
                    let (index, inside) = (at / chunk, at % chunk);
                    let (row, stripe) =
                        (index / stripes.len() as u64, index % stripes.len() as u64);
                    let (lower, start) = stripes[stripe as usize];
                    let len = (chunk - inside).min(end - at);
                    steps.push(Step {
                        way: Way::Lower(lower),
                        offset: start * nbdsnap_format::SECTOR_BYTES + row * chunk + inside,
                        len,
                    });
                    at += len;
                }
            }
            Target::Zero => steps.push(one(Way::Base(Base::Zero))),
            Target::Error => steps.push(one(Way::Base(Base::Error))),
            Target::SnapshotOrigin { origin } => steps.push(one(Way::Lower(*origin))),
            Target::SnapshotMerge(pair) => steps.push(one(Way::Lower(pair.origin))),
            Target::Snapshot(_) => {
                let snap = self.snap.expect("a snapshot's line has its snapshot");
                steps.push(one(Way::Base(Base::Snap(snap))));
            }
        }
    }
}

impl Mapper {
    /// Bytes of what a table may name.
    pub(super) fn bytes_of(&self, lower: Lower) -> u64 {
        match lower {
            Lower::Disk(id) => self.disks.get(&id).map_or(0, |disk| disk.bytes),
            Lower::Device(id) => self.devices.get(&id).map_or(0, Device::bytes),
        }
    }

    /// Sectors of the smallest unit of I/O of what a table may name.
    pub(super) fn block_of(&self, lower: Lower) -> u64 {
        let mut block = 1;
        let mut left = vec![lower];
        while let Some(next) = left.pop() {
            match next {
                Lower::Disk(id) => {
                    let disk = self.disks.get(&id);
                    block = disk.map_or(block, |disk| block.max(disk.block));
                }
                Lower::Device(id) => {
                    let live = self.devices.get(&id).and_then(|d| d.live.as_ref());
                    left.extend(live.into_iter().flat_map(Table::lowers));
                }
            }
        }
        block
    }

    /// How often devices have it open. As in the kernel, the tables of one device share
    /// what they open for the same use.
    pub(super) fn names(&self, lower: Lower) -> usize {
        let opened = self.devices.values().map(|device| {
            let uses = device.tables().map(|table| table.usage(lower));
            let mut uses: Vec<_> = uses.filter(|usage| usage.is_any()).collect();
            uses.sort_unstable();
            uses.dedup();
            uses.len()
        });
        opened.sum()
    }

    pub(super) fn is_named(&self, lower: Lower) -> bool {
        self.names(lower) > 0
    }

    /// Whether `upper` is `lower` or stands on it, by any table.
    pub(super) fn stands_on(&self, upper: Lower, lower: Lower) -> bool {
        let mut left = vec![upper];
        let mut seen = Vec::new();
        while let Some(next) = left.pop() {
            if next == lower {
                return true;
            }
            if seen.contains(&next) {
                continue;
            }
            seen.push(next);
            if let Lower::Device(id) = next
                && let Some(device) = self.devices.get(&id)
            {
                left.extend(device.tables().flat_map(Table::lowers));
            }
        }
        false
    }

    /// The device whose table, live or not, has this snapshot.
    pub(super) fn device_of(&self, key: SnapKey) -> Option<DeviceId> {
        let has = |device: &Device| device.tables().any(|t| t.snaps().any(|other| other == key));
        self.devices
            .iter()
            .find(|(_, device)| has(device))
            .map(|(&id, _)| id)
    }
}
