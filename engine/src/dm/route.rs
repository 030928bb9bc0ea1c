//! Requests go down, through tables to bases, from there to volumes or disks; what
//! comes of them goes up.

use bytes::Bytes;

use super::cover::Part;
use super::cut::{part, range};
use super::device::{Course, Mapped, Step, Way};
use super::snap::Snap;
use super::{Base, DeviceId, Level, LevelKey, Lower, MappedOp, Mapper, Phase, Target};
use crate::below::{outcome_of, request_for};
use crate::disk::{Device as Which, DiskOp, OpId};
use crate::request::{Command, Failure, Reply, Request, RequestId, View};

/// Volumes with larger numbers than this: all.
const ALL: u32 = u32::MAX;

/// Who asked for something.
#[derive(Clone, Copy, Debug)]
pub(super) enum Asker {
    /// A client.
    Client(RequestId),
    /// Part `index` of a request.
    Part { parent: usize, index: usize },
    /// A volume, by an operation.
    Level { level: LevelKey, op: OpId },
    /// The end of it all.
    Close,
}

/// Something that a volume or a disk has been asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    asker: Asker,
    /// See [`Mapper::under_way`]; 0: it is not counted.
    serial: u64,
    /// A flush of the disk comes behind it.
    pub(super) fua: bool,
}

/// A request in parts.
#[derive(Debug)]
pub(super) struct Parent {
    asker: Asker,
    /// The device that it is in flight in.
    device: Option<DeviceId>,
    left: usize,
    parts: Vec<Vec<Bytes>>,
    failure: Option<Failure>,
}

type Result = std::result::Result<Vec<Bytes>, Failure>;

impl Asked {
    pub(super) fn by_close() -> Self {
        Self {
            asker: Asker::Close,
            serial: 0,
            fua: false,
        }
    }
}

impl Mapper {
    /// Hand in a request for a device or a disk; its reply comes from
    /// [`Mapper::poll_reply`].
    pub fn handle_request(&mut self, id: RequestId, lower: Lower, command: Command) {
        let asker = Asker::Client(id);
        if self.phase != Phase::Open {
            return self.answer(asker, Err(Failure::ShuttingDown));
        }
        if let Err(failure) = self.check(lower, &command) {
            return self.answer(asker, Err(failure));
        }
        self.ask_lower(lower, command, asker);
    }

    fn check(&self, lower: Lower, command: &Command) -> std::result::Result<(), Failure> {
        let is_there = match lower {
            Lower::Disk(id) => self.disks.contains_key(&id),
            Lower::Device(id) => self.devices.get(&id).is_some_and(|d| !d.leaving),
        };
        if !is_there {
            return Err(Failure::NoSuchView);
        }
        let Some((offset, len)) = range(command) else {
            return Ok(());
        };
        let end = offset.checked_add(len);
        if end.is_none_or(|end| end > self.bytes_of(lower)) {
            return Err(match command {
                Command::Write { .. } | Command::WriteZeroes { .. } => Failure::PastEnd,
                Command::Read { .. } | Command::Trim { .. } | Command::Flush => Failure::Invalid,
            });
        }
        if !matches!(command, Command::Read { .. }) && self.is_read_only(lower) {
            return Err(Failure::Io);
        }
        match command {
            // Nobody here knows whether it would be.
            Command::WriteZeroes { fast_only, .. } if *fast_only => Err(Failure::NotSupported),
            _ => Ok(()),
        }
    }

    fn is_read_only(&self, lower: Lower) -> bool {
        let Lower::Device(id) = lower else {
            return false;
        };
        let table = self.devices.get(&id).and_then(|d| d.live.as_ref());
        table.is_some_and(|table| table.read_only)
    }

    fn ask_lower(&mut self, lower: Lower, command: Command, asker: Asker) {
        match lower {
            Lower::Disk(id) => self.ask_base(Base::Disk(id), ALL, &command, asker),
            Lower::Device(id) => self.ask_device(id, command, asker),
        }
    }

    /// A request enters a device, unless that is suspended.
    fn ask_device(&mut self, id: DeviceId, command: Command, asker: Asker) {
        let Some(device) = self.devices.get_mut(&id) else {
            return self.answer(asker, Err(Failure::Io));
        };
        if device.course != Course::Running {
            return device.queued.push_back((command, asker));
        }
        let Some(table) = &device.live else {
            return self.answer(asker, Err(Failure::Io));
        };
        let steps = match range(&command) {
            Some((_, 0)) => Vec::new(),
            Some((offset, len)) => {
                let Some(end) = offset.checked_add(len).filter(|&end| end <= table.bytes()) else {
                    return self.answer(asker, Err(Failure::Io));
                };
                let mut steps = Vec::new();
                for (mapped, first, last) in table.cut(offset, end) {
                    mapped.steps(first, last, &mut steps);
                }
                steps
            }
            None if self.law.mapped_flush_passed_on() => flushes(&table.lines),
            None => Vec::new(),
        };
        device.in_flight += 1;
        let parent = self.new_parent(asker, Some(id), steps.len());
        let mut from = 0;
        for (index, step) in steps.into_iter().enumerate() {
            let command = part(&command, from, step.offset, step.len);
            from += step.len;
            let asker = Asker::Part { parent, index };
            match step.way {
                Way::Lower(lower) => self.ask_lower(lower, command, asker),
                Way::Base(base) => self.ask_base(base, ALL, &command, asker),
            }
        }
    }

    /// A suspended device goes on.
    pub(super) fn release(&mut self, id: DeviceId) {
        let device = self.devices.get_mut(&id).expect("it is there");
        device.course = Course::Running;
        for (command, asker) in std::mem::take(&mut device.queued) {
            self.ask_device(id, command, asker);
        }
    }

    /// A request has come down to a base: to the volumes whose origin it lies in, of
    /// those below `limit`, or to the base itself.
    fn ask_base(&mut self, base: Base, limit: u32, command: &Command, asker: Asker) {
        let Some((offset, len)) = range(command) else {
            return self.ask_flush(base, limit, &[(0, u64::MAX)], asker);
        };
        let asked = self.new_asked(limit, asker);
        let serial = asked.serial;
        let parts = self.parts(base, limit, offset, offset + len);
        if let [one] = parts[..] {
            return self.ask_part(base, one, 0, command, asked);
        }
        let parent = self.new_parent(asker, None, parts.len());
        self.count(serial, parts.len());
        let mut from = 0;
        for (index, one) in parts.into_iter().enumerate() {
            let asker = Asker::Part { parent, index };
            self.ask_part(base, one, from, command, Asked { asker, ..asked });
            from += match one {
                Part::Bottom { len, .. } | Part::Level { len, .. } => len,
            };
        }
    }

    fn new_asked(&mut self, limit: u32, asker: Asker) -> Asked {
        let serial = match limit {
            ALL => self.new_serial(),
            _ => 0,
        };
        Asked {
            asker,
            serial,
            fua: false,
        }
    }

    /// Ranges of a base are to be durable: by the volumes whose origin they lie in, of
    /// those below `limit`, which come down to the base in the end; else by the base.
    fn ask_flush(&mut self, base: Base, limit: u32, ranges: &[(u64, u64)], asker: Asker) {
        let asked = self.new_asked(limit, asker);
        let levels = self.flushers(base, limit, ranges);
        if levels.is_empty() {
            return self.ask_bottom(base, Command::Flush, asked);
        }
        let parent = self.new_parent(asker, None, levels.len());
        self.count(asked.serial, levels.len());
        for (index, level) in levels.into_iter().enumerate() {
            let asker = Asker::Part { parent, index };
            self.ask_level(
                level,
                View::Origin,
                Command::Flush,
                Asked { asker, ..asked },
            );
        }
    }

    fn ask_part(&mut self, base: Base, one: Part, from: u64, command: &Command, asked: Asked) {
        match one {
            Part::Bottom { offset, len } => {
                self.ask_bottom(base, part(command, from, offset, len), asked);
            }
            Part::Level { level, offset, len } => {
                let command = part(command, from, offset, len);
                self.ask_level(level, View::Origin, command, asked);
            }
        }
    }

    fn ask_level(&mut self, key: LevelKey, view: View, command: Command, asked: Asked) {
        let id = RequestId(self.asked.insert(asked) as u64);
        let level = &mut self.levels[key];
        level.volume.handle_request(Request { id, view, command });
        self.touch(key);
    }

    fn ask_bottom(&mut self, base: Base, command: Command, asked: Asked) {
        match base {
            Base::Disk(disk) => self.ask_disk(disk, command, asked),
            Base::Snap(key) => match self.snaps.get(key).map(Snap::place) {
                Some(Some((level, id))) => {
                    self.ask_snap(key, level, View::Snapshot(id), command, asked);
                }
                _ => self.end(asked, Err(Failure::Io)),
            },
            Base::Zero => {
                let zeros = match command {
                    Command::Read { len, .. } => vec![Bytes::from(vec![0; len as usize])],
                    _ => Vec::new(),
                };
                self.end(asked, Ok(zeros));
            }
            Base::Error => self.end(
                asked,
                match command {
                    Command::Flush => Ok(Vec::new()),
                    _ => Err(Failure::Io),
                },
            ),
        }
    }

    /// A discard of a snapshot means what the table's features say.
    fn ask_snap(
        &mut self,
        key: usize,
        level: LevelKey,
        view: View,
        command: Command,
        asked: Asked,
    ) {
        let snap = &self.snaps[key];
        let Command::Trim { offset, len, fua } = command else {
            return self.ask_level(level, view, command, asked);
        };
        if !snap.discard_zeroes_cow {
            return self.end(asked, Ok(Vec::new()));
        }
        let (passdown, chunk) = (
            snap.discard_passdown_origin,
            (snap.chunk * nbdsnap_format::SECTOR_BYTES).max(1),
        );
        let extents = self.levels[level].volume.map(view, offset, len, usize::MAX);
        let mut commands = Vec::new();
        let mut at = offset;
        for extent in extents.unwrap_or_default() {
            let (start, end) = (at, at + extent.len);
            at = end;
            if extent.device != Which::Origin {
                let (first, last) = (start.next_multiple_of(chunk), end / chunk * chunk);
                if first < last {
                    commands.push(Command::WriteZeroes {
                        offset: first,
                        len: last - first,
                        fua,
                        no_hole: true,
                        fast_only: false,
                    });
                }
            }
        }
        let views = commands.into_iter().map(|command| (view, command));
        let mut asks: Vec<_> = views.collect();
        if passdown {
            asks.push((View::Origin, Command::Trim { offset, len, fua }));
        }
        if asks.is_empty() {
            return self.end(asked, Ok(Vec::new()));
        }
        let parent = self.new_parent(asked.asker, None, asks.len());
        self.count(asked.serial, asks.len());
        for (index, (view, command)) in asks.into_iter().enumerate() {
            let asker = Asker::Part { parent, index };
            self.ask_level(level, view, command, Asked { asker, ..asked });
        }
    }

    /// The next operation to perform on a disk, if there is one.
    pub fn poll_disk_op(&mut self) -> Option<MappedOp> {
        loop {
            self.settle();
            if self.is_time_to_flush() {
                self.begin_flushes();
            }
            if let Some(op) = self.ready_ops.pop_front() {
                return Some(op);
            }
            let Some(key) = self.runnable.pop_front() else {
                if self.begin_flushes() {
                    continue;
                }
                return None;
            };
            let Some(level) = self.levels.get_mut(key) else {
                continue;
            };
            let op = level.volume.poll_disk_op();
            level.is_runnable = op.is_some();
            if op.is_some() {
                self.runnable.push_back(key);
            }
            self.hear(key);
            if let Some(op) = op {
                self.pass_on(key, op);
            }
        }
    }

    /// What a volume asks of its origin or of a store comes down to bases again.
    fn pass_on(&mut self, key: LevelKey, op: DiskOp) {
        let DiskOp { id, device, action } = op;
        let level = &self.levels[key];
        let (lower, limit) = match device {
            Which::Origin => (level.origin, level.order),
            Which::Cow(snapshot) => {
                let place = Some((key, snapshot));
                let snap = self.snaps.iter().find(|(_, snap)| snap.place() == place);
                let leaving = level.leaving_cow(snapshot);
                let cow = snap.map(|(_, snap)| snap.cow).or(leaving);
                (cow.expect("a store has its device"), ALL)
            }
        };
        let asker = Asker::Level { level: key, op: id };
        let command = request_for(action);
        let Some((offset, len)) = range(&command) else {
            let mut ranges = self.ranges(lower);
            if device == Which::Origin {
                let bases = ranges.len();
                ranges.retain(|&base, _| !self.is_lost(base));
                if ranges.len() < bases {
                    self.levels[key].volume.origin_is_lost();
                }
            }
            let parent = self.new_parent(asker, None, ranges.len());
            for (index, (base, ranges)) in ranges.into_iter().enumerate() {
                let asker = Asker::Part { parent, index };
                self.ask_flush(base, limit, &ranges, asker);
            }
            return;
        };
        let mut steps = Vec::new();
        self.look_through(lower, offset, len, &mut steps);
        let parent = self.new_parent(asker, None, steps.len());
        let mut from = 0;
        for (index, (base, offset, len)) in steps.into_iter().enumerate() {
            let asker = Asker::Part { parent, index };
            self.ask_base(base, limit, &part(&command, from, offset, len), asker);
            from += len;
        }
    }

    /// Where a range of a device lies, through all tables, suspended or not.
    fn look_through(&self, lower: Lower, offset: u64, len: u64, out: &mut Vec<(Base, u64, u64)>) {
        let id = match lower {
            Lower::Disk(id) => return out.push((Base::Disk(id), offset, len)),
            Lower::Device(id) => id,
        };
        let table = self.devices.get(&id).and_then(|d| d.live.as_ref());
        let end = offset + len;
        let mut at = offset;
        for (mapped, first, last) in table.iter().flat_map(|table| table.cut(offset, end)) {
            let mut steps = Vec::new();
            mapped.steps(first, last, &mut steps);
            for Step { way, offset, len } in steps {
                match way {
                    Way::Lower(lower) => self.look_through(lower, offset, len, out),
                    Way::Base(base) => out.push((base, offset, len)),
                }
            }
            at = last;
        }
        if at < end {
            // The device has become smaller.
            out.push((Base::Error, at, end - at));
        }
    }

    pub(super) fn on_reply(&mut self, reply: Reply) {
        let asked = self.asked.remove(reply.id.0 as usize);
        self.end(asked, reply.result);
    }

    /// What was asked of a base has ended.
    pub(super) fn end(&mut self, asked: Asked, result: Result) {
        if let Some(left) = self.under_way.get_mut(&asked.serial) {
            *left -= 1;
            if *left == 0 {
                self.under_way.remove(&asked.serial);
            }
        }
        self.answer(asked.asker, result);
        self.close_on();
    }

    pub(super) fn answer(&mut self, mut asker: Asker, mut result: Result) {
        loop {
            match asker {
                Asker::Client(id) => return self.replies.push_back(Reply { id, result }),
                Asker::Close => return self.closing_flush_ended(result.is_ok()),
                Asker::Level { level, op } => {
                    let outcome = outcome_of(result);
                    self.levels[level].volume.handle_completion(op, outcome);
                    return self.touch(level);
                }
                Asker::Part { parent: key, index } => {
                    let parent = &mut self.parents[key];
                    match result {
                        Ok(bytes) => parent.parts[index] = bytes,
                        Err(failure) => parent.failure = parent.failure.or(Some(failure)),
                    }
                    parent.left -= 1;
                    if parent.left > 0 {
                        return;
                    }
                    (asker, result) = self.end_parent(key);
                }
            }
        }
    }

    fn end_parent(&mut self, key: usize) -> (Asker, Result) {
        let parent = self.parents.remove(key);
        if let Some(device) = parent.device.and_then(|id| self.devices.get_mut(&id)) {
            device.in_flight -= 1;
        }
        let result = match parent.failure {
            Some(failure) => Err(failure),
            None => Ok(parent.parts.into_iter().flatten().collect()),
        };
        (parent.asker, result)
    }

    /// A request in so many parts; if there are none, it has ended.
    fn new_parent(&mut self, asker: Asker, device: Option<DeviceId>, parts: usize) -> usize {
        let key = self.parents.insert(Parent {
            asker,
            device,
            left: parts,
            parts: vec![Vec::new(); parts],
            failure: None,
        });
        if parts == 0 {
            let (asker, result) = self.end_parent(key);
            self.answer(asker, result);
        }
        key
    }

    fn new_serial(&mut self) -> u64 {
        let serial = self.next_serial;
        self.next_serial += 1;
        self.under_way.insert(serial, 1);
        serial
    }

    /// What was counted as one has become several.
    fn count(&mut self, serial: u64, parts: usize) {
        if let Some(left) = self.under_way.get_mut(&serial) {
            *left += parts as u32 - 1;
        }
    }

    /// A volume has been told something: look for what comes of it.
    pub(super) fn touch(&mut self, key: LevelKey) {
        self.hear(key);
        let level = &mut self.levels[key];
        if !std::mem::replace(&mut level.is_runnable, true) {
            self.runnable.push_back(key);
        }
    }

    fn hear(&mut self, key: LevelKey) {
        if !std::mem::replace(&mut self.levels[key].is_touched, true) {
            self.touched.push_back(key);
        }
    }
}

impl Level {
    /// The device of a store that is on its way out.
    fn leaving_cow(&self, snapshot: crate::request::SnapshotId) -> Option<Lower> {
        let leaving = self.leaving.iter().find(|(id, _)| *id == snapshot);
        leaving.map(|&(_, cow)| cow)
    }
}

/// The flushes that a flush of a device consists of.
fn flushes(lines: &[Mapped]) -> Vec<Step> {
    let mut ways: Vec<Way> = Vec::new();
    for mapped in lines {
        let of_line: Vec<Way> = match (&mapped.line.target, mapped.snap) {
            (Target::Snapshot(_), Some(snap)) => vec![Way::Base(Base::Snap(snap))],
            (Target::SnapshotMerge(pair), _) => vec![Way::Lower(pair.origin)],
            (target, _) => target.lowers().into_iter().map(Way::Lower).collect(),
        };
        for way in of_line {
            if !ways.contains(&way) {
                ways.push(way);
            }
        }
    }
    let step = |way| Step {
        way,
        offset: 0,
        len: 0,
    };
    ways.into_iter().map(step).collect()
}
