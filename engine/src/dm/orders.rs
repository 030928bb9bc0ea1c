//! What is ordered of devices, and when it is refused. What takes time goes on in
//! `course.rs`.

use super::course::{Kind, Pending, Progress};
use super::cover::is_shredded;
use super::device::{Course, Device, Mapped, Table};
use super::snap::{Body, Snap};
use super::{DeviceId, Line, Lower, Mapper, MapperEvent, OrderId, Pair, Persistence, Target};
use crate::store::{Status, Store};

/// Why the kernel would have refused, by its error's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errno {
    /// EIO
    Io,
    /// ENXIO
    NoDevice,
    /// ENOENT
    NoEntry,
    /// EBUSY
    Busy,
    /// EINVAL
    Invalid,
}

/// An order was refused, or has failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct Refused {
    /// The kernel's word for it.
    pub errno: Errno,
    /// The reason, in the words of the target where it has some.
    pub why: String,
}

impl Refused {
    pub(super) fn new(errno: Errno, why: impl Into<String>) -> Self {
        let why = why.into();
        Self { errno, why }
    }
}

/// What a snapshot needs before its table can be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Need {
    /// A store, opened or made on this device.
    Store {
        /// Where it lies.
        cow: Lower,
        /// Sectors of a chunk, if it is to be made.
        chunk: u64,
        /// Its length in bytes.
        cow_bytes: u64,
        /// The origin's.
        origin_bytes: u64,
    },
    /// Nothing: it takes over from another one that has this store.
    Heir,
}

/// A line, with the store that its snapshot needs.
#[derive(Debug)]
pub struct NewLine {
    /// The line.
    pub line: Line,
    /// The store, if [`Mapper::examine`] asked for one.
    pub store: Option<Store>,
}

/// Sectors of a chunk where a persistent store's table says 0.
pub const DEFAULT_CHUNK: u64 = 32;

/// Number of minors.
const MINORS: u32 = 1 << 20;

impl Mapper {
    /// A device without a table. Names and uuids are the caller's, who has looked at
    /// their spelling; an empty uuid is none.
    pub fn create(
        &mut self,
        name: &str,
        uuid: &str,
        minor: Option<u32>,
    ) -> Result<DeviceId, Refused> {
        if self.find(name).is_some() {
            return Err(Refused::new(Errno::Busy, "the name is in use"));
        }
        if !uuid.is_empty() && self.find_uuid(uuid).is_some() {
            return Err(Refused::new(Errno::Busy, "the uuid is in use"));
        }
        let free = |minor: &u32| !self.devices.contains_key(&DeviceId(*minor));
        let minor = match minor {
            Some(minor) if !free(&minor) => {
                return Err(Refused::new(Errno::Busy, "the minor number is in use"));
            }
            Some(minor) if minor < MINORS => minor,
            Some(_) => return Err(Refused::new(Errno::Invalid, "no such minor number")),
            None => (0..MINORS).find(free).expect("there are a million"),
        };
        let id = DeviceId(minor);
        self.devices
            .insert(id, Device::new(name.into(), uuid.into()));
        Ok(id)
    }

    /// The device of that name.
    pub fn find(&self, name: &str) -> Option<DeviceId> {
        self.find_by(|device| device.name == name)
    }

    /// The device of that uuid.
    pub fn find_uuid(&self, uuid: &str) -> Option<DeviceId> {
        self.find_by(|device| !uuid.is_empty() && device.uuid == uuid)
    }

    fn find_by(&self, is_it: impl Fn(&Device) -> bool) -> Option<DeviceId> {
        let mut found = self.devices.iter().filter(|(_, d)| !d.leaving && is_it(d));
        found.next().map(|(&id, _)| id)
    }

    pub(super) fn device(&self, id: DeviceId) -> Result<&Device, Refused> {
        let device = self.devices.get(&id).filter(|device| !device.leaving);
        device.ok_or_else(|| Refused::new(Errno::NoDevice, "there is no such device"))
    }

    fn device_mut(&mut self, id: DeviceId) -> Result<&mut Device, Refused> {
        self.device(id)?;
        Ok(self.devices.get_mut(&id).expect("it was looked at"))
    }

    /// What a table's snapshots need before it is loaded, line by line (none where a
    /// line has no snapshot); or why it cannot be loaded.
    pub fn examine(&self, id: DeviceId, lines: &[Line]) -> Result<Vec<Option<Need>>, Refused> {
        let device = self.device(id)?;
        let lowers = lines.iter().flat_map(|line| line.target.lowers());
        for lower in lowers {
            if self.stands_on(lower, Lower::Device(id)) {
                let why = format!("{} would stand on itself", device.name);
                return Err(Refused::new(Errno::Invalid, why));
            }
        }
        let needs = lines.iter().map(|line| self.examine_line(&line.target));
        let needs: Vec<_> = needs.collect::<Result<_, _>>()?;
        if !device.was_loaded {
            self.check_areas(lines)?;
        }
        Ok(needs)
    }

    fn examine_line(&self, target: &Target) -> Result<Option<Need>, Refused> {
        let (pair, merges) = match target {
            Target::Snapshot(pair) => (pair, false),
            Target::SnapshotMerge(pair) => (pair, true),
            _ => return Ok(None),
        };
        let refuse = |why: &str| Err(Refused::new(Errno::Invalid, why));
        if pair.origin == pair.cow {
            return refuse("COW device cannot be the same as origin device");
        }
        if self.overlap(pair.origin, pair.cow) {
            return refuse("COW device overlaps with its origin device");
        }
        let sharing = self.sharing(pair.origin, pair.cow);
        if sharing.count >= 2 || sharing.heir.is_some() {
            return refuse("Snapshot cow pairing for exception table handover failed");
        }
        if let Some(source) = sharing.source {
            if merges {
                if self.other_merge(pair.origin) {
                    return refuse("A snapshot is already merging.");
                }
                if self.snaps[source].persistence == Persistence::Transient {
                    return refuse("Snapshot exception store does not support snapshot-merge.");
                }
            }
            if !matches!(self.snaps[source].body, Body::Merged) || self.snaps[source].overflowed {
                return Ok(Some(Need::Heir));
            }
        }
        self.examine_store(pair, merges).map(Some)
    }

    fn examine_store(&self, pair: &Pair, merges: bool) -> Result<Need, Refused> {
        if merges && pair.persistence == Persistence::Transient {
            let why = "Snapshot exception store does not support snapshot-merge.";
            return Err(Refused::new(Errno::Invalid, why));
        }
        let other = self
            .snaps
            .iter()
            .map(|(_, snap)| snap)
            .find(|snap| snap.cow == pair.cow && snap.origin != pair.origin);
        if other.is_some() {
            let why = "COW device is the store of a snapshot of another origin";
            return Err(Refused::new(Errno::Busy, why));
        }
        let block = self.block_of(pair.origin).max(self.block_of(pair.cow));
        let chunk = match pair.chunk {
            0 if pair.persistence == Persistence::Transient => {
                return Err(Refused::new(Errno::Invalid, "Chunk size not set"));
            }
            0 => DEFAULT_CHUNK,
            chunk => chunk,
        };
        if !chunk.is_multiple_of(block) {
            let why =
                "Couldn't create exception store: Chunk size is not a multiple of device blocksize";
            return Err(Refused::new(Errno::Invalid, why));
        }
        if merges && self.other_merge(pair.origin) {
            let why = "A snapshot is already merging.";
            return Err(Refused::new(Errno::Invalid, why));
        }
        Ok(Need::Store {
            cow: pair.cow,
            chunk,
            cow_bytes: self.bytes_of(pair.cow),
            origin_bytes: self.bytes_of(pair.origin),
        })
    }

    /// Everything that lines name lies within what it is part of.
    pub(super) fn check_areas(&self, lines: &[Line]) -> Result<(), Refused> {
        for line in lines {
            let areas: Vec<(Lower, u64, u64)> = match &line.target {
                Target::Linear { lower, start } => vec![(*lower, *start, line.len)],
                Target::Striped { stripes, .. } => {
                    let width = line.len / stripes.len() as u64;
                    let areas = stripes.iter().map(|&(lower, start)| (lower, start, width));
                    areas.collect()
                }
                Target::SnapshotOrigin { origin } => vec![(*origin, 0, line.len)],
                Target::Snapshot(pair) | Target::SnapshotMerge(pair) => {
                    vec![(pair.origin, 0, line.len)]
                }
                Target::Zero | Target::Error => Vec::new(),
            };
            for (lower, start, len) in areas {
                let sectors = self.bytes_of(lower) / nbdsnap_format::SECTOR_BYTES;
                if start.checked_add(len).is_none_or(|end| end > sectors) {
                    let why = format!(
                        "device too small for target: start={start}, len={len}, dev_size={sectors}"
                    );
                    return Err(Refused::new(Errno::Invalid, why));
                }
            }
        }
        Ok(())
    }

    /// The table waits as the inactive one, for the next resume. An earlier one that
    /// waits goes.
    pub fn load(
        &mut self,
        id: DeviceId,
        read_only: bool,
        lines: Vec<NewLine>,
    ) -> Result<(), Refused> {
        let values: Vec<_> = lines.iter().map(|new| new.line.clone()).collect();
        let needs = self.examine(id, &values)?;
        for (new, need) in lines.iter().zip(&needs) {
            let wants_store = matches!(need, Some(Need::Store { .. }));
            if wants_store != new.store.is_some() {
                let why = "another table with this COW device came or went meanwhile";
                return Err(Refused::new(Errno::Busy, why));
            }
        }
        for line in &values {
            if let Target::Snapshot(pair) | Target::SnapshotMerge(pair) = &line.target {
                let mut runs = Vec::new();
                self.flatten(pair.origin, 0, self.bytes_of(pair.origin), 0, &mut runs);
                if is_shredded(&runs) {
                    let why = "the origin is dealt out in too many pieces";
                    return Err(Refused::new(Errno::Invalid, why));
                }
            }
        }
        let bytes = values.last().map_or(0, Line::end);
        let mut mapped = Vec::new();
        for new in lines {
            let snap = self.new_snap(&new.line.target, bytes, new.store);
            let line = new.line;
            mapped.push(Mapped { line, snap });
        }
        let device = self.device_mut(id)?;
        device.was_loaded = true;
        let lines = mapped;
        let old = device.inactive.replace(Table { lines, read_only });
        if let Some(old) = old {
            self.drop_table(&old);
        }
        Ok(())
    }

    fn new_snap(&mut self, target: &Target, bytes: u64, store: Option<Store>) -> Option<usize> {
        let (pair, merges) = match target {
            Target::Snapshot(pair) => (pair, false),
            Target::SnapshotMerge(pair) => (pair, true),
            _ => return None,
        };
        let mut chunk = 0;
        let body = match store {
            None => Body::Heir,
            Some(store) => {
                chunk = store.chunk_size().sectors();
                match store.status() {
                    Status::Invalid => Body::Lost,
                    _ => Body::Loaded(Box::new(store)),
                }
            }
        };
        Some(self.snaps.insert(Snap {
            origin: pair.origin,
            cow: pair.cow,
            merges,
            persistence: pair.persistence,
            overflows: pair.persistence == Persistence::PersistentOverflow,
            chunk,
            discard_zeroes_cow: pair.discard_zeroes_cow,
            discard_passdown_origin: pair.discard_passdown_origin,
            bytes,
            active: false,
            overflowed: false,
            body,
        }))
    }

    /// The inactive table goes.
    pub fn clear(&mut self, id: DeviceId) -> Result<(), Refused> {
        if let Some(old) = self.device_mut(id)?.inactive.take() {
            self.drop_table(&old);
        }
        Ok(())
    }

    /// Let new requests queue, and those under way end (unless `noflush`); then
    /// [`MapperEvent::Done`].
    pub fn suspend(&mut self, id: DeviceId, noflush: bool) -> Result<OrderId, Refused> {
        self.device(id)?;
        Ok(self.order(id, Kind::Suspend { noflush }))
    }

    /// Put the inactive table in place of the active one, if there is one, and let
    /// requests go on; then [`MapperEvent::Done`]. A device that is not suspended is,
    /// for the exchange.
    pub fn resume(&mut self, id: DeviceId, noflush: bool) -> Result<OrderId, Refused> {
        self.device(id)?;
        Ok(self.order(id, Kind::Resume { noflush }))
    }

    /// The device goes, if nobody has it open; then [`MapperEvent::Gone`] and
    /// [`MapperEvent::Done`]. `deferred`: else it goes when nobody has it open any more.
    pub fn remove(&mut self, id: DeviceId, deferred: bool) -> Result<Option<OrderId>, Refused> {
        self.device(id)?;
        if self.open_count(id) > 0 {
            if deferred {
                self.device_mut(id)?.deferred_remove = true;
                return Ok(None);
            }
            return Err(Refused::new(Errno::Busy, "the device is in use"));
        }
        self.device_mut(id)?.leaving = true;
        Ok(Some(self.order(id, Kind::Remove)))
    }

    /// Another name.
    pub fn rename(&mut self, id: DeviceId, name: &str) -> Result<(), Refused> {
        self.device(id)?;
        if self.find(name).is_some() {
            return Err(Refused::new(Errno::Busy, "the name is in use"));
        }
        let device = self.device_mut(id)?;
        device.name = name.into();
        // It is the table in use that has events.
        device.event_nr += u32::from(device.live.is_some());
        self.settle();
        Ok(())
    }

    /// A uuid for a device that has none.
    pub fn set_uuid(&mut self, id: DeviceId, uuid: &str) -> Result<(), Refused> {
        if !self.device(id)?.uuid.is_empty() {
            return Err(Refused::new(
                Errno::Invalid,
                "the device has a uuid already",
            ));
        }
        if self.find_uuid(uuid).is_some() {
            return Err(Refused::new(Errno::Busy, "the uuid is in use"));
        }
        self.device_mut(id)?.uuid = uuid.into();
        Ok(())
    }

    /// [`MapperEvent::Done`] comes as soon as the device has not had exactly so many
    /// events, as the kernel has it.
    pub fn wait(&mut self, id: DeviceId, event_nr: u32) -> Result<OrderId, Refused> {
        self.device(id)?;
        Ok(self.order(id, Kind::Wait { event_nr }))
    }

    /// Nobody waits for the order any more: a [`Mapper::wait`] is forgotten, anything
    /// else goes on.
    pub fn forget(&mut self, order: OrderId) {
        self.pending
            .retain(|p| p.id != order || !matches!(p.kind, Kind::Wait { .. }));
    }

    /// A client has the device open.
    pub fn attach(&mut self, id: DeviceId) -> bool {
        let device = self.devices.get_mut(&id).filter(|device| !device.leaving);
        if let Some(device) = device {
            device.clients += 1;
            return true;
        }
        false
    }

    /// Whether a client has it open.
    pub fn has_clients(&self, id: DeviceId) -> bool {
        self.devices
            .get(&id)
            .is_some_and(|device| device.clients > 0)
    }

    /// It has it open no more.
    pub fn detach(&mut self, id: DeviceId) {
        let Some(device) = self.devices.get_mut(&id) else {
            return;
        };
        device.clients -= 1;
        if device.deferred_remove && self.open_count(id) == 0 {
            // Nobody waits for the end of it.
            let _ = self.remove(id, false);
        }
    }

    fn order(&mut self, device: DeviceId, kind: Kind) -> OrderId {
        let id = OrderId(self.next_order);
        self.next_order += 1;
        self.pending.push(Pending {
            id,
            device,
            kind,
            progress: Progress::Waiting,
        });
        self.is_settled = false;
        self.settle();
        id
    }

    /// A table is in use no more: its snapshots leave their volumes.
    pub(super) fn drop_table(&mut self, table: &Table) {
        self.is_settled = false;
        for lower in table.lowers() {
            if let Lower::Disk(disk) = lower
                && !self.is_named(lower)
            {
                self.events.push_back(MapperEvent::Unused(disk));
            }
        }
        for key in table.snaps() {
            self.drop_snap(key);
        }
        self.cover_anew();
    }

    fn drop_snap(&mut self, key: usize) {
        let snap = self.snaps.remove(key);
        let sharing = self.sharing(snap.origin, snap.cow);
        if snap.active
            && let Some(heir) = sharing.heir
            && matches!(self.snaps[heir].body, Body::Heir)
        {
            // Nobody is left to hand anything over.
            self.snaps[heir].body = Body::Lost;
        }
        match snap.body {
            Body::Taking { level, id }
            | Body::There { level, id }
            | Body::Beginning { level, id }
            | Body::Merging { level, id } => {
                let there = &mut self.levels[level];
                there.leaving.push((id, snap.cow));
                there.volume.remove_snapshot(id);
                there.volume.let_merge_go(id);
                self.touch(level);
            }
            Body::Loaded(_) | Body::Heir | Body::Joining { .. } | Body::Merged | Body::Lost => {}
        }
    }

    /// Whether the device lets requests through.
    pub(super) fn is_suspended(&self, id: DeviceId) -> bool {
        let device = self.devices.get(&id);
        device.is_some_and(|device| device.course == Course::Suspended)
    }
}
