//! What there is to tell of devices.

use super::device::{Course, Device, Mapped, Table};
use super::{DeviceId, Lower, Mapper, Persistence, Refused, Target};
use crate::store::Status;

/// What there is to know of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its minor number.
    pub id: DeviceId,
    /// Its name.
    pub name: String,
    /// Its uuid; empty if it has none.
    pub uuid: String,
    /// Bytes, by its active table.
    pub bytes: u64,
    /// Clients, and tables of other devices.
    pub open_count: u64,
    /// Clients.
    pub clients: u64,
    /// How many events it has had.
    pub event_nr: u32,
    /// Its requests queue.
    pub suspended: bool,
    /// It has an active table.
    pub live_table: bool,
    /// It has a table that waits for a resume.
    pub inactive_table: bool,
    /// Its active table is read-only.
    pub read_only: bool,
    /// It goes when nobody has it open any more.
    pub deferred_remove: bool,
    /// Lines of its active table.
    pub target_count: usize,
    /// The table that waits is read-only.
    pub inactive_read_only: bool,
    /// Lines of the table that waits.
    pub inactive_target_count: usize,
}

/// A line of a table as it is in use: what a snapshot's store is like is the store's
/// word, not the table's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableLine {
    /// First sector.
    pub start: u64,
    /// Sectors.
    pub len: u64,
    /// What is there.
    pub target: Target,
    /// How its snapshot is, if it has one.
    pub status: Option<Status>,
}

impl Mapper {
    /// All devices, by name.
    pub fn devices(&self) -> Vec<DeviceInfo> {
        let ids = self.devices.iter().filter(|(_, device)| !device.leaving);
        let infos = ids.filter_map(|(&id, _)| self.info(id).ok());
        let mut infos: Vec<_> = infos.collect();
        infos.sort_by(|a, b| a.name.cmp(&b.name));
        infos
    }

    /// One device.
    pub fn info(&self, id: DeviceId) -> Result<DeviceInfo, Refused> {
        let device = self.device(id)?;
        let (live, inactive) = (device.live.as_ref(), device.inactive.as_ref());
        let lines = |table: &Table| table.lines.len();
        Ok(DeviceInfo {
            id,
            name: device.name.clone(),
            uuid: device.uuid.clone(),
            bytes: device.bytes(),
            open_count: self.open_count(id),
            clients: device.clients,
            event_nr: device.event_nr,
            suspended: device.course == Course::Suspended,
            live_table: live.is_some(),
            inactive_table: inactive.is_some(),
            read_only: live.is_some_and(|table| table.read_only),
            deferred_remove: device.deferred_remove,
            target_count: live.map_or(0, lines),
            inactive_read_only: inactive.is_some_and(|table| table.read_only),
            inactive_target_count: inactive.map_or(0, lines),
        })
    }

    /// The lines of a device's active table, or of that which waits; none if there is
    /// no such table.
    pub fn table(&self, id: DeviceId, inactive: bool) -> Result<Vec<TableLine>, Refused> {
        let lines = self.chosen(id, inactive)?.map(|table| &table.lines);
        let lines = lines.into_iter().flatten();
        Ok(lines.map(|mapped| self.table_line(mapped)).collect())
    }

    /// What a device's active table names, or that which waits.
    pub fn deps(&self, id: DeviceId, inactive: bool) -> Result<Vec<Lower>, Refused> {
        let mut deps = Vec::new();
        for mapped in self
            .chosen(id, inactive)?
            .into_iter()
            .flat_map(|t| &t.lines)
        {
            for lower in mapped.line.target.lowers() {
                if !deps.contains(&lower) {
                    deps.push(lower);
                }
            }
        }
        // The latest first, as the kernel has them.
        deps.reverse();
        Ok(deps)
    }

    fn chosen(&self, id: DeviceId, inactive: bool) -> Result<Option<&Table>, Refused> {
        let device = self.device(id)?;
        Ok(if inactive {
            device.inactive.as_ref()
        } else {
            device.live.as_ref()
        })
    }

    fn table_line(&self, mapped: &Mapped) -> TableLine {
        let mut target = mapped.line.target.clone();
        if let (Target::Snapshot(pair) | Target::SnapshotMerge(pair), Some(key)) =
            (&mut target, mapped.snap)
        {
            let snap = &self.snaps[key];
            pair.persistence = snap.persistence;
            pair.chunk = snap.chunk;
        }
        TableLine {
            start: mapped.line.start,
            len: mapped.line.len,
            target,
            status: mapped.snap.map(|key| self.snap_status(key)),
        }
    }

    /// The devices by which requests come to what `origins` lie on, those that stand on
    /// others before these. While they stand still, nothing there changes.
    pub fn ways_to(&self, origins: &[Lower]) -> Vec<DeviceId> {
        let is_there = |device: &Device| !device.leaving && device.live.is_some();
        let devices = self.devices.iter().filter(|(_, device)| is_there(device));
        let leads_there = |id: DeviceId| {
            let mut origins = origins.iter();
            origins.any(|&origin| self.overlap(Lower::Device(id), origin))
        };
        let mut left: Vec<DeviceId> = devices.map(|(&id, _)| id).collect();
        left.retain(|&id| leads_there(id));
        let mut ways = Vec::with_capacity(left.len());
        while !left.is_empty() {
            let is_top = |&id: &DeviceId| {
                let mut others = left.iter().filter(|&&other| other != id);
                !others.any(|&other| self.stands_on(Lower::Device(other), Lower::Device(id)))
            };
            let top = left.iter().position(is_top);
            ways.push(left.remove(top.expect("none stands on itself")));
        }
        ways
    }

    /// Clients, and other devices' tables.
    pub(super) fn open_count(&self, id: DeviceId) -> u64 {
        let clients = self.devices.get(&id).map_or(0, |device| device.clients);
        clients + self.names(Lower::Device(id)) as u64
    }

    /// The snapshots that the origin of a device has, by devices: what `snapshot`'s
    /// orders show of them.
    pub fn snapshots_of(&self, origin: Lower) -> Vec<DeviceId> {
        let snaps = self.snaps.iter().filter(|(_, snap)| {
            snap.origin == origin && !snap.merges && snap.persistence != Persistence::Transient
        });
        snaps.filter_map(|(key, _)| self.device_of(key)).collect()
    }
}
