//! Which devices there are and how they stand on each other: as much of dm and of
//! dm-snapshot's rules of handover as tells whether a command succeeds, and whether
//! it or a request would wait for something that is suspended. It knows nothing of
//! data, and of a store only whether the kernel would open it.

use std::collections::BTreeMap;

use super::layout::DISK;
use super::table::{
    Kind, On, Snapshot, Table, Target, reaches, size, snapshots, snapshots_mut, stands_on,
};

/// A command whose effect the model knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// A new device; without a table, `--notable`.
    Create {
        /// Its name.
        name: String,
        /// Its uuid, if it has one.
        uuid: Option<String>,
        /// Its table.
        table: Option<Table>,
    },
    /// A table into the inactive slot.
    Load(String, Table),
    /// Held.
    Suspend(String),
    /// Released, with the inactive table if there is one.
    Resume(String),
    /// The inactive slot emptied.
    Clear(String),
    /// The end of a device.
    Remove(String),
    /// A new name.
    Rename(String, String),
}

/// What lies at the beginning of a device that may hold a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Store {
    /// Neither zeros nor a store: the kernel refuses it.
    #[default]
    Rubbish,
    /// Zeros: taken for a new one.
    Zeros,
    /// A store.
    Store,
    /// A transient store may have written there.
    Unknown,
}

/// Larger than any chunk.
const NO_CHUNK: u64 = u64::MAX;

/// A table in one of the two slots.
#[derive(Clone, Debug)]
struct Loaded {
    table: Table,
    /// Its snapshots take part: it has been resumed.
    active: bool,
    /// Its snapshot has its store: it neither waits for it nor has given it away.
    holds: bool,
    /// Its merge has been waited for.
    merged: bool,
}

/// A device.
#[derive(Clone, Debug)]
pub struct Device {
    /// Its number.
    pub number: u64,
    uuid: Option<String>,
    /// The smallest chunk of the snapshots that there were when it was last resumed.
    split: u64,
    live: Option<Loaded>,
    inactive: Option<Loaded>,
    /// Whether it is suspended.
    pub suspended: bool,
    /// Whether a table has ever been loaded: sizes are checked with the first one, and
    /// later when one is to be used.
    was_loaded: bool,
    /// Whether there is a node of its name: dmsetup makes it with the first resume that
    /// succeeds.
    has_node: bool,
}

impl Device {
    /// The table in use.
    pub fn table(&self) -> Option<&Table> {
        self.live.as_ref().map(|loaded| &loaded.table)
    }

    /// Whether it can be called `/dev/mapper/NAME`, on a command line and in tables.
    pub fn has_node(&self) -> bool {
        self.has_node && self.size() > 0
    }

    /// Whether a table waits for the next resume.
    pub fn has_inactive(&self) -> bool {
        self.inactive.is_some()
    }

    /// Sectors of the table in use.
    pub fn size(&self) -> u64 {
        self.table().map_or(0, |table| size(table))
    }

    /// The only line of the table in use.
    pub fn only_line(&self) -> Option<&Target> {
        match self.table()?.as_slice() {
            [line] => Some(&line.target),
            _ => None,
        }
    }

    fn loaded(&self) -> impl Iterator<Item = &Loaded> {
        self.live.iter().chain(&self.inactive)
    }

    /// Merges, as far as anybody knows.
    pub fn is_merging(&self) -> bool {
        self.live.as_ref().is_some_and(|live| {
            live.active && !live.merged && snapshots(&live.table).any(|line| line.merge)
        })
    }
}

/// Devices, by their names.
#[derive(Clone, Debug, Default)]
pub struct Model {
    /// All of them.
    pub devices: BTreeMap<String, Device>,
    stores: BTreeMap<On, Store>,
    /// Sectors in a chunk, where there is a store.
    chunks: BTreeMap<On, u64>,
    made: u64,
}

impl Model {
    /// A device that there is.
    pub fn device(&self, name: &str) -> Option<&Device> {
        self.devices.get(name)
    }

    /// The name of a device now.
    pub fn name_of(&self, number: u64) -> Option<&str> {
        let mut all = self.devices.iter();
        all.find(|(_, device)| device.number == number)
            .map(|(name, _)| name.as_str())
    }

    fn by_number(&self, number: u64) -> Option<&Device> {
        self.devices.values().find(|device| device.number == number)
    }

    /// What lies at the beginning of a device.
    pub fn store(&self, cow: On) -> Store {
        self.stores.get(&cow).copied().unwrap_or_default()
    }

    /// It has been overwritten with zeros.
    pub fn zeroed(&mut self, cow: On) {
        self.stores.insert(cow, Store::Zeros);
    }

    /// Its merge has come to an end.
    pub fn merged(&mut self, name: &str) {
        if let Some(live) = self.devices.get_mut(name).and_then(|d| d.live.as_mut()) {
            live.merged = true;
        }
    }

    /// Whether a table of some device stands on it.
    pub fn is_in_use(&self, number: u64) -> bool {
        let mut all = self.devices.values().flat_map(Device::loaded);
        all.any(|loaded| {
            let mut lines = loaded.table.iter();
            lines.any(|line| stands_on(&line.target).contains(&On::Device(number)))
        })
    }

    /// The lines of snapshots of an origin, with whether they are active.
    fn snapshots_of(&self, origin: On) -> impl Iterator<Item = (&Device, &Snapshot, bool)> {
        self.devices.values().flat_map(move |device| {
            device.loaded().flat_map(move |loaded| {
                snapshots(&loaded.table)
                    .filter(move |line| line.origin == origin)
                    .map(move |line| (device, line, loaded.active))
            })
        })
    }

    /// Whether there are snapshots of it.
    pub fn is_origin(&self, origin: On) -> bool {
        self.snapshots_of(origin).next().is_some()
    }

    /// Whether a merge into it has been loaded.
    pub fn has_merge(&self, origin: On) -> bool {
        self.snapshots_of(origin).any(|(_, line, _)| line.merge)
    }

    /// The stores of an origin's snapshots, and their chunks.
    pub fn stores_of(&self, origin: On) -> impl Iterator<Item = (On, u64)> {
        let lines = self.snapshots_of(origin).map(|(_, line, _)| line);
        lines.map(|line| (line.cow, line.chunk))
    }

    /// The smallest chunk of the snapshots of an origin.
    pub fn smallest_chunk(&self, origin: On) -> u64 {
        let chunks = self.snapshots_of(origin).map(|(_, line, _)| line.chunk);
        chunks.min().unwrap_or(NO_CHUNK)
    }

    /// The same, as the kernel knows it: it has a store's chunk only with the store.
    fn smallest_held_chunk(&self, origin: On) -> u64 {
        let loaded = self.devices.values().flat_map(Device::loaded);
        let held = loaded.filter(|loaded| loaded.holds);
        let lines = held.flat_map(|loaded| snapshots(&loaded.table));
        let chunks = lines.filter(|line| line.origin == origin);
        chunks.map(|line| line.chunk).min().unwrap_or(NO_CHUNK)
    }

    /// Sectors of something that a table may name.
    fn size_of(&self, on: On) -> u64 {
        match on {
            On::Disk(_) => DISK,
            On::Device(number) => self.by_number(number).map_or(0, Device::size),
        }
    }

    /// Whether everything that a table names lies within what it is part of.
    fn fits(&self, table: &Table) -> bool {
        reaches(table).all(|(on, end)| end <= self.size_of(on))
    }

    fn has_node(&self, on: On) -> bool {
        match on {
            On::Disk(_) => true,
            On::Device(number) => self.by_number(number).is_some_and(Device::has_node),
        }
    }

    /// A write to this device must not cross borders of so many sectors: the kernel
    /// cuts writes to an origin by the chunks of those snapshots that it had when it was
    /// resumed. Of a write that it should have cut, it copies the first chunk only.
    pub fn uncut(&self, name: &str) -> Option<u64> {
        let device = self.device(name)?;
        let origin = match device.only_line()? {
            Target::Origin { on } => *on,
            Target::Snapshot(line) if line.merge => line.origin,
            _ => return None,
        };
        let smallest = self.smallest_chunk(origin);
        (smallest < device.split).then_some(smallest)
    }

    /// Whether I/O there would fail or wait: it, or what it stands on, is suspended
    /// or has no table.
    pub fn is_blocked(&self, on: On) -> bool {
        let On::Device(number) = on else {
            return false;
        };
        let Some(device) = self.by_number(number) else {
            return true;
        };
        let Some(table) = device.table() else {
            return true;
        };
        let mut beneath = table.iter().flat_map(|line| stands_on(&line.target));
        device.suspended || beneath.any(|on| self.is_blocked(on))
    }

    /// Whether copies to the stores of an origin's snapshots would wait.
    fn copies_wait(&self, origin: On) -> bool {
        let mut all = self.snapshots_of(origin);
        all.any(|(_, line, active)| active && self.is_blocked(line.cow))
    }

    /// Whether a device can be read.
    pub fn is_readable(&self, name: &str) -> bool {
        self.device(name)
            .is_some_and(|device| !self.is_blocked(On::Device(device.number)))
    }

    /// Whether a write to it goes through and reaches all snapshots that it must.
    pub fn is_writable(&self, name: &str) -> bool {
        let Some(device) = self.device(name) else {
            return false;
        };
        let own = On::Device(device.number);
        if self.is_blocked(own) || self.is_origin(own) {
            return false;
        }
        match device.only_line() {
            Some(Target::Origin { on }) => !self.copies_wait(*on) && !self.copies_wait_above(*on),
            Some(Target::Snapshot(line)) => !line.merge || !self.copies_wait(line.origin),
            _ => false,
        }
    }

    /// An origin over a merging device, whose write copies in a second place.
    fn copies_wait_above(&self, on: On) -> bool {
        let On::Device(number) = on else {
            return false;
        };
        match self.by_number(number).and_then(Device::only_line) {
            Some(Target::Snapshot(line)) if line.merge => self.copies_wait(line.origin),
            _ => false,
        }
    }

    /// Whether a command's outcome is known and it does not wait for ever.
    pub fn is_safe(&self, command: &Command) -> bool {
        match command {
            Command::Create { table, .. } => table.iter().all(|table| self.may_load(table)),
            Command::Load(name, table) => self.may_load(table) && !self.loops(name, table),
            Command::Resume(name) => self.device(name).is_none_or(|device| {
                let next = device.inactive.as_ref().or(device.live.as_ref());
                let mut lines = next.into_iter().flat_map(|next| snapshots(&next.table));
                lines.all(|line| !line.merge || self.may_merge(line))
            }),
            _ => true,
        }
    }

    /// Whether the device would stand on itself, now or after some resume: the kernel
    /// takes that, and ends in its own tail.
    fn loops(&self, name: &str, table: &Table) -> bool {
        let Some(device) = self.device(name) else {
            return false;
        };
        let mut left: Vec<On> = table
            .iter()
            .flat_map(|line| stands_on(&line.target))
            .collect();
        while let Some(on) = left.pop() {
            let On::Device(number) = on else {
                continue;
            };
            if number == device.number {
                return true;
            }
            let tables = self.by_number(number).into_iter().flat_map(Device::loaded);
            let lines = tables.flat_map(|loaded| &loaded.table);
            left.extend(lines.flat_map(|line| stands_on(&line.target)));
        }
        false
    }

    fn may_load(&self, table: &Table) -> bool {
        let mut below = table.iter().flat_map(|line| stands_on(&line.target));
        below.all(|on| self.has_node(on)) && self.may_load_lines(table)
    }

    fn may_load_lines(&self, table: &Table) -> bool {
        table.iter().all(|line| match &line.target {
            Target::Snapshot(line) => {
                let shared = self.sharing(line);
                let known = self.store(line.cow) != Store::Unknown || line.kind == Kind::Transient;
                // The same store for two origins is a fault, and so is a second
                // merge that is not a handover.
                let others = self.devices.values().flat_map(Device::loaded);
                let mut others = others.flat_map(|loaded| snapshots(&loaded.table));
                let elsewhere = others.any(|o| o.cow == line.cow && o.origin != line.origin);
                let second = line.merge && shared == (0, 0) && self.has_merge(line.origin);
                known
                    && !elsewhere
                    && !second
                    && !self.is_blocked(line.cow)
                    && (!line.merge || self.may_merge(line))
            }
            _ => true,
        })
    }

    /// A merge writes to its origin, and to the stores of the others.
    fn may_merge(&self, line: &Snapshot) -> bool {
        !self.is_blocked(line.origin)
            && !self.is_blocked(line.cow)
            && !self.copies_wait(line.origin)
    }

    /// Tables with the same origin and the same store: those in use, those that wait.
    fn sharing(&self, line: &Snapshot) -> (usize, usize) {
        let same = self.snapshots_of(line.origin);
        let same = same.filter(|(_, other, _)| other.cow == line.cow);
        let (active, waiting): (Vec<_>, Vec<_>) = same.partition(|(_, _, active)| *active);
        (active.len(), waiting.len())
    }

    /// Whether a command succeeds; its effect, where it has one.
    pub fn apply(&mut self, command: &Command) -> bool {
        match command {
            Command::Create { name, uuid, table } => {
                self.create(name, uuid.as_ref(), table.as_ref())
            }
            Command::Load(name, table) => self.load(name, table),
            Command::Suspend(name) => {
                let device = self.devices.get_mut(name);
                device.map(|device| device.suspended = true).is_some()
            }
            Command::Resume(name) => self.resume(name),
            Command::Clear(name) => {
                let device = self.devices.get_mut(name);
                device.map(|device| device.inactive = None).is_some()
            }
            Command::Remove(name) => {
                let free = self
                    .device(name)
                    .is_some_and(|device| !self.is_in_use(device.number));
                free && self.devices.remove(name).is_some()
            }
            Command::Rename(name, new) => {
                if !self.devices.contains_key(name) || self.devices.contains_key(new) {
                    return false;
                }
                let device = self.devices.remove(name).expect("it is there");
                self.devices.insert(new.clone(), device);
                true
            }
        }
    }

    fn create(&mut self, name: &str, uuid: Option<&String>, table: Option<&Table>) -> bool {
        let taken = |device: &Device| uuid.is_some() && device.uuid.as_ref() == uuid;
        if self.devices.contains_key(name) || self.devices.values().any(taken) {
            return false;
        }
        self.made += 1;
        let device = Device {
            number: self.made,
            uuid: uuid.cloned(),
            split: NO_CHUNK,
            live: None,
            inactive: None,
            suspended: false,
            was_loaded: false,
            has_node: false,
        };
        self.devices.insert(name.to_owned(), device);
        let Some(table) = table else {
            return true;
        };
        let done = self.load(name, table) && self.resume(name);
        if !done {
            self.devices.remove(name);
        }
        done
    }

    fn load(&mut self, name: &str, table: &Table) -> bool {
        let Some(device) = self.device(name) else {
            return false;
        };
        let is_first = !device.was_loaded;
        let mut table = table.clone();
        let mut holds = true;
        for line in snapshots_mut(&mut table) {
            let (active, waiting) = self.sharing(line);
            let transient = line.kind == Kind::Transient;
            let second = active == 1 && line.merge && self.has_merge(line.origin);
            if waiting > 0 || active > 1 || (line.merge && transient) || second {
                return false;
            }
            match (active, self.store(line.cow)) {
                (0, Store::Rubbish) if !transient => return false,
                // What is there has its own chunk size.
                (0, Store::Store) if !transient => line.chunk = self.chunks[&line.cow],
                (0, _) => {
                    self.chunks.insert(line.cow, line.chunk);
                }
                _ => line.chunk = self.chunks[&line.cow],
            }
            holds = active == 0;
            if holds {
                let store = if transient {
                    Store::Unknown
                } else {
                    Store::Store
                };
                self.stores.insert(line.cow, store);
            }
        }
        // The stores have been opened, and made, before this is looked at.
        if is_first && !self.fits(&table) {
            return false;
        }
        let device = self.devices.get_mut(name).expect("it is there");
        device.was_loaded = true;
        device.inactive = Some(Loaded {
            table,
            active: false,
            holds,
            merged: false,
        });
        true
    }

    fn resume(&mut self, name: &str) -> bool {
        let Some(device) = self.devices.get_mut(name) else {
            return false;
        };
        let mut before = None;
        if let Some(next) = device.inactive.take() {
            device.suspended = true;
            if !self.fits(&next.table) {
                return false;
            }
            let device = self.devices.get_mut(name).expect("it is there");
            before = device.live.replace(next);
        } else if !device.suspended {
            return true;
        }
        let Some(live) = &self.devices[name].live else {
            return false;
        };
        let (number, active) = (self.devices[name].number, live.active);
        let lines: Vec<Snapshot> = snapshots(&live.table).cloned().collect();
        if !lines
            .iter()
            .all(|line| self.may_resume(line, number, active, before.as_ref()))
        {
            return false;
        }
        if !active && let Some(line) = lines.first() {
            self.hand_over(name, line, before.as_ref());
        }
        let origin = match self.devices[name].only_line() {
            Some(Target::Origin { on }) => Some(*on),
            Some(Target::Snapshot(line)) => Some(line.origin),
            _ => None,
        };
        let split = origin.map_or(NO_CHUNK, |origin| self.smallest_held_chunk(origin));
        let device = self.devices.get_mut(name).expect("it is there");
        device.split = split;
        device.suspended = false;
        device.has_node = true;
        device.live.as_mut().expect("a table").active = true;
        true
    }

    /// A snapshot that waited takes over from the one that was active, which may be
    /// that of the same device's table before.
    fn hand_over(&mut self, name: &str, line: &Snapshot, before: Option<&Loaded>) {
        let is_source = |loaded: &Loaded| {
            let mut lines = snapshots(&loaded.table);
            loaded.active && lines.any(|o| o.origin == line.origin && o.cow == line.cow)
        };
        let mut live = self.devices.values_mut().filter_map(|d| d.live.as_mut());
        let source = live.find(|loaded| is_source(loaded));
        let held = match source {
            Some(source) => Some(std::mem::replace(&mut source.holds, false)),
            None => before.filter(|loaded| is_source(loaded)).map(|b| b.holds),
        };
        let device = self.devices.get_mut(name).expect("it is there");
        if let (Some(held), Some(live)) = (held, device.live.as_mut()) {
            live.holds = held;
        }
    }

    /// The rules of handover; `before` is the table that the device has had until now.
    fn may_resume(
        &self,
        line: &Snapshot,
        number: u64,
        active: bool,
        before: Option<&Loaded>,
    ) -> bool {
        let own = before.is_some_and(|before| {
            let mut lines = snapshots(&before.table);
            before.active && lines.any(|o| o.origin == line.origin && o.cow == line.cow)
        });
        let same = self.snapshots_of(line.origin);
        let mut others =
            same.filter(|(device, other, _)| other.cow == line.cow && device.number != number);
        if active {
            return !others.any(|(_, _, active)| !active);
        }
        own || others.all(|(device, _, active)| !active || device.suspended)
    }

    /// A table as text.
    pub fn text(&self, table: &Table) -> String {
        super::table::text(table, |on| self.path(on))
    }

    fn path(&self, on: On) -> String {
        match on {
            On::Disk(letter) => format!("@{letter}"),
            On::Device(number) => {
                let name = self.name_of(number).unwrap_or("gone");
                format!("/dev/mapper/{name}")
            }
        }
    }
}
