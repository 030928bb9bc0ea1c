//! One process: a mapper, the requests it is given, and the operations that it hands out.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use nbdsnap_engine::dm::{DeviceId, DiskId, Line, Lower, Mapper, NewLine, OrderId, Refused};
use nbdsnap_engine::{Action, Command, Failure, OpId, RequestId, Status, VolumeConfig};

use super::world::{Name, Stop, World, disk, places};
use crate::model::Time;
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
    /// What it was handed to.
    pub(super) to: Lower,
    /// Its snapshot has gone.
    pub(super) orphan: bool,
    /// A rollback came in the middle of it: some of it may be gone.
    pub(super) is_halved: bool,
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

/// An order that somebody looks at the moment it is done.
#[derive(Clone, Copy, Debug)]
pub(super) enum Watched {
    /// A snapshot's instant has come.
    Creation { index: usize },
    /// The device stands still: what it was given before has been answered.
    Standstill { device: DeviceId, since: Time },
}

/// A mapper, its clients and its operator.
pub(super) struct Process<'w> {
    pub(super) world: &'w mut World,
    pub(super) mapper: Mapper,
    pub(super) checks: Checks,
    pub(super) pending: BTreeMap<u64, Pending>,
    /// What the operator has asked for, and the answers.
    inner: BTreeMap<u64, Option<Result<Vec<u8>, Failure>>>,
    next_id: u64,
    pub(super) done: BTreeMap<OrderId, Result<(), Refused>>,
    pub(super) watched: BTreeMap<OrderId, Watched>,
    /// Devices that stand still.
    pub(super) still: BTreeSet<String>,
    /// A snapshot whose device is about to go: nobody asks for anything there.
    pub(super) held: Name,
    /// Tables are being loaded after a crash.
    pub(super) boots: bool,
    /// Requests are refused.
    pub(super) closes: bool,
    pub(super) closed: Option<bool>,
    /// The snapshots that devices are, or are merges of.
    pub(super) views: BTreeMap<String, usize>,
}

impl<'w> Process<'w> {
    /// Disks, and no devices yet.
    pub(super) fn new(world: &'w mut World, checks: Checks) -> Self {
        let mut mapper = Mapper::new(VolumeConfig {
            origin_bytes: SECTOR,
            copy_memory: 1 << 20,
            copy_piece: 512 * (1 + world.rng.below(8)),
        });
        mapper.set_law(checks.law());
        mapper.set_steps(world.window, world.merge_step);
        for (n, disk) in world.disks.iter().enumerate() {
            assert_eq!(mapper.add_disk(disk.len(), 1), DiskId(n as u32));
        }
        Self {
            world,
            mapper,
            checks,
            pending: BTreeMap::new(),
            inner: BTreeMap::new(),
            next_id: 0,
            done: BTreeMap::new(),
            watched: BTreeMap::new(),
            still: BTreeSet::new(),
            held: None,
            boots: true,
            closes: false,
            closed: None,
            views: BTreeMap::new(),
        }
    }

    pub(super) fn device(&self, name: &str) -> DeviceId {
        let found = self.mapper.find(name);
        found.unwrap_or_else(|| panic!("the device {name} is there"))
    }

    pub(super) fn lower(&self, name: &str) -> Lower {
        Lower::Device(self.device(name))
    }

    /// The device by which tables name a view.
    pub(super) fn lower_of(&self, name: Name) -> Lower {
        match name {
            None => self.lower("real"),
            Some(index) => self.lower(&self.world.snaps[index].device),
        }
    }

    /// The status of a device's first line.
    pub(super) fn status(&self, device: &str) -> Option<Status> {
        let lines = self.mapper.table(self.device(device), false).ok()?;
        lines.first()?.status
    }

    /// Hand a request for a view in, to its device or another way to it.
    pub(super) fn hand_in(&mut self, name: Name, cells: Cells, ask: Ask, to: Lower) {
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
            to,
            orphan: false,
            is_halved: false,
        };
        if p.changes() {
            self.world.model(name).begin_write(cells, stamp, issued);
        }
        let len = cells.len_bytes();
        let offset = match to {
            // Beneath the origin: within a sector of it.
            Lower::Disk(_) => {
                let place = places(&self.world.real)[(cells.offset() / SECTOR) as usize];
                assert_eq!(disk(place.0), to);
                place.1 * SECTOR + cells.offset() % SECTOR
            }
            Lower::Device(_) => cells.offset(),
        };
        let command = match ask {
            Ask::Read => Command::Read { offset, len },
            Ask::Write { fua } => Command::Write {
                offset,
                data: pattern::bytes(stamp, cells).into(),
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
        self.mapper.handle_request(RequestId(id), to, command);
    }

    /// Take operations until there are no more, or some of them.
    fn pump(&mut self) -> Result<(), Stop> {
        while let Some(op) = self.mapper.poll_disk_op() {
            // What is told now is of a moment before the operation.
            self.listen()?;
            say!(
                self.world,
                "    op {}: disk {} {}",
                op.id.0,
                op.disk.0,
                brief(&op.action)
            );
            let World { disks, rng, .. } = &mut *self.world;
            disks[op.disk.0 as usize].issue(op.id.0, op.action, rng);
            if self.world.rng.chance(1, 12) {
                break;
            }
        }
        self.listen()
    }

    /// Let some operation progress, or end. False if there is none.
    pub(super) fn step(&mut self) -> Result<bool, Stop> {
        match &mut self.world.fuse {
            Some(0) => return Err(Stop::Cut),
            Some(left) => *left -= 1,
            None => {}
        }
        self.pump()?;
        let World { disks, rng, .. } = &mut *self.world;
        let busy: Vec<_> = (0..disks.len())
            .filter(|&n| disks[n].in_flight() > 0)
            .collect();
        if busy.is_empty() {
            // The pump may have been stopped early.
            return Ok(!self.mapper.is_idle() && self.goes_on()?);
        }
        let disk = &mut disks[busy[rng.index(busy.len())]];
        let index = rng.index(disk.in_flight());
        if rng.chance(1, 4) {
            disk.progress(index, rng);
            return Ok(true);
        }
        let (tag, outcome) = disk.end(index, rng);
        say!(
            self.world,
            "    op {tag}: {}",
            if outcome.is_ok() { "ok" } else { "FAILED" }
        );
        self.mapper.handle_completion(OpId(tag), outcome);
        self.listen()?;
        Ok(true)
    }

    /// With nothing in flight: whether there is something to hand out.
    fn goes_on(&mut self) -> Result<bool, Stop> {
        self.pump()?;
        Ok(self.world.disks.iter().any(|disk| disk.in_flight() > 0))
    }

    /// Take what the mapper has to tell. What was answered before an event comes before it.
    fn listen(&mut self) -> Result<(), Stop> {
        loop {
            let event = self.mapper.poll_event();
            while let Some(reply) = self.mapper.poll_reply() {
                if let Some(answer) = self.inner.get_mut(&reply.id.0) {
                    *answer = Some(reply.result.map(|pieces| pieces.concat()));
                } else {
                    self.on_reply(reply)?;
                }
            }
            match event {
                Some(event) => self.on_event(event)?,
                None => return Ok(()),
            }
        }
    }

    /// Ask for something, as the operator, and wait for the answer.
    pub(super) fn ask(
        &mut self,
        lower: Lower,
        command: Command,
    ) -> Result<Result<Vec<u8>, Failure>, Stop> {
        self.next_id += 1;
        let id = self.next_id;
        self.inner.insert(id, None);
        self.mapper.handle_request(RequestId(id), lower, command);
        loop {
            let went_on = self.step()?;
            if let Some(Some(_)) = self.inner.get(&id) {
                let answer = self.inner.remove(&id).flatten();
                return Ok(answer.expect("it was looked at"));
            }
            if !went_on {
                return Err(Violation("a request is never answered".into()).into());
            }
        }
    }

    /// Wait for the end of an order, while requests go on.
    pub(super) fn wait(&mut self, order: OrderId) -> Result<Result<(), Refused>, Stop> {
        loop {
            if !self.boots && self.world.rng.chance(1, 6) {
                self.random_request();
            }
            let went_on = self.step()?;
            if let Some(result) = self.done.remove(&order) {
                return Ok(result);
            }
            if !went_on {
                return Err(Violation(format!("{order:?} does not end")).into());
            }
        }
    }

    /// Load a table, with stores opened or made as the kernel does. The outer error is
    /// the end of the process, the inner one a refusal.
    pub(super) fn load(
        &mut self,
        device: &str,
        lines: &[Line],
    ) -> Result<Result<(), String>, Stop> {
        let id = self.device(device);
        let needs = match self.mapper.examine(id, lines) {
            Ok(needs) => needs,
            Err(refused) => return Ok(Err(refused.why)),
        };
        let mut new = Vec::new();
        for (line, need) in lines.iter().zip(needs) {
            let store = match need {
                None => None,
                Some(need) => match self.store(&line.target, &need)? {
                    Ok(store) => store,
                    Err(why) => return Ok(Err(why)),
                },
            };
            let line = line.clone();
            new.push(NewLine { line, store });
        }
        say!(self.world, "load {device}: {lines:?}");
        let loaded = self.mapper.load(id, false, new);
        Ok(loaded.map_err(|refused| refused.why))
    }

    pub(super) fn resume(&mut self, device: &str) -> Result<Result<(), Refused>, Stop> {
        let id = self.device(device);
        say!(self.world, "resume {device}");
        let result = match self.mapper.resume(id, false) {
            Ok(order) => self.wait(order)?,
            Err(refused) => Err(refused),
        };
        if result.is_ok() {
            self.still.remove(device);
        }
        say!(self.world, "resume {device}: {result:?}");
        Ok(result)
    }

    pub(super) fn suspend(&mut self, device: &str, noflush: bool) -> Result<(), Stop> {
        let id = self.device(device);
        say!(self.world, "suspend {device}, noflush: {noflush}");
        let since = self.world.tick();
        let order = self.mapper.suspend(id, noflush).expect("it is there");
        // A short one is done already; nobody has heard of it yet.
        if !noflush {
            let device = id;
            let watched = Watched::Standstill { device, since };
            self.watched.insert(order, watched);
        }
        self.still.insert(device.to_owned());
        let result = self.wait(order)?;
        result.map_err(|refused| Violation(format!("suspend {device}: {refused}")).into())
    }

    pub(super) fn remove(&mut self, device: &str) -> Result<(), Stop> {
        let id = self.device(device);
        say!(self.world, "remove {device}");
        let wrong = |refused: Refused| Violation(format!("remove {device}: {refused}"));
        let order = self.mapper.remove(id, false).map_err(wrong)?;
        let result = self.wait(order.expect("it is not deferred"))?;
        self.still.remove(device);
        result.map_err(|refused| wrong(refused).into())
    }

    pub(super) fn create(&mut self, device: &str) {
        let created = self.mapper.create(device, "", None);
        created.unwrap_or_else(|refused| panic!("create {device}: {refused}"));
    }
}

/// An operation of a store as a request.
pub(super) fn command_for(action: Action) -> Command {
    let fua = false;
    match action {
        Action::Read { offset, len } => Command::Read { offset, len },
        Action::Write { offset, data } => Command::Write {
            offset,
            data: Bytes::from(data.concat()),
            fua,
        },
        Action::WriteZeroes { offset, len, .. } => Command::WriteZeroes {
            offset,
            len,
            fua,
            no_hole: true,
            fast_only: false,
        },
        Action::Flush => Command::Flush,
        other => unreachable!("{other:?} of a store"),
    }
}
