//! A device-mapper of tables without data: enough of one for the command line to be
//! tried on. What it refuses, it refuses with the kernel's numbers and words.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::Duration;

use libc::{EBUSY, EINVAL, ENODEV, ENOENT, ENXIO};
use nbdsnap_engine::dm::{DeviceId, DiskId, Line, Lower, Target};

use super::super::session::{Located, World};
use crate::cli::Failure;
use crate::control::dm::{
    DeviceName, DmAnswer, DmDep, DmInfo, DmName, DmOrder, DmTarget, TextLine,
};
use crate::dm::{params, text};

/// Of Linux, where the transcripts were made.
const MAJOR: u32 = 254;

/// Disks: paths, minor numbers of major 252, and sectors.
const DISKS: [(&str, u32, u64); 3] = [
    ("/dev/vda", 0, 131_072),
    ("/dev/vdb", 16, 131_072),
    ("/dev/vdc", 32, 65_536),
];

type Answer = Result<DmAnswer, (i32, Option<String>)>;

#[derive(Debug, Default)]
pub(super) struct Device {
    pub(super) name: String,
    uuid: String,
    live: Option<Table>,
    inactive: Option<Table>,
    is_suspended: bool,
    goes_when_closed: bool,
    events: u32,
}

#[derive(Clone, Debug)]
struct Table {
    lines: Vec<Line>,
    is_read_only: bool,
}

#[derive(Default)]
pub(super) struct Kernel {
    pub(super) devices: BTreeMap<u32, Device>,
    /// What has been asked.
    pub(super) orders: Vec<DmOrder>,
    /// Standard input.
    pub(super) input: String,
    pub(super) files: BTreeMap<String, String>,
    /// What is where, but for /dev/mapper.
    pub(super) nodes: BTreeMap<String, Located>,
    /// Devices that somebody has open.
    pub(super) clients: BTreeSet<String>,
}

impl World for Kernel {
    fn ask(&mut self, order: DmOrder) -> Result<DmAnswer, Failure> {
        self.orders.push(order.clone());
        Ok(self
            .execute(order)
            .unwrap_or_else(|(errno, why)| DmAnswer::Refused { errno, why }))
    }

    fn pause(&mut self, _: Duration) {}

    fn read(&mut self, file: Option<&str>) -> io::Result<String> {
        match file {
            None => Ok(std::mem::take(&mut self.input)),
            Some(file) => match self.files.get(file) {
                Some(text) => Ok(text.clone()),
                None => Err(io::Error::from_raw_os_error(ENOENT)),
            },
        }
    }

    fn absolute(&self, path: &str) -> String {
        if path.starts_with('/') {
            path.to_owned()
        } else {
            format!("/here/{path}")
        }
    }

    fn locate(&self, path: &str) -> Located {
        self.nodes.get(path).cloned().unwrap_or(Located::Nowhere)
    }

    fn width(&self) -> Option<usize> {
        None
    }

    fn speaks_utf8(&self) -> bool {
        false
    }
}

/// How the kernel's `table` names a device.
fn numbers(lower: Lower) -> String {
    match lower {
        Lower::Disk(DiskId(minor)) => format!("252:{minor}"),
        Lower::Device(DeviceId(minor)) => format!("{MAJOR}:{minor}"),
    }
}

impl Kernel {
    fn execute(&mut self, order: DmOrder) -> Answer {
        match order {
            DmOrder::Create { name, uuid, minor } => self.create(name, uuid, minor),
            DmOrder::Load {
                device,
                read_only,
                lines,
            } => self.load(&device, read_only, &lines),
            DmOrder::Clear { device } => self.change(&device, |device| {
                device.inactive = None;
                Ok(())
            }),
            DmOrder::Suspend { device, .. } => self.change(&device, |device| {
                device.is_suspended = true;
                Ok(())
            }),
            DmOrder::Resume { device, .. } => self.change(&device, |device| {
                let new = device.inactive.take();
                if new.is_none() && device.live.is_none() && device.is_suspended {
                    return Err((EINVAL, None));
                }
                device.live = new.or(device.live.take());
                device.is_suspended = false;
                Ok(())
            }),
            DmOrder::Remove { device, deferred } => self.remove(&device, deferred),
            DmOrder::Rename { device, new_name } => self.rename(
                &device,
                |device| &device.name,
                &new_name,
                |device| {
                    device.name.clone_from(&new_name);
                    Ok(())
                },
            ),
            DmOrder::SetUuid { device, uuid } => self.rename(
                &device,
                |device| &device.uuid,
                &uuid,
                |device| {
                    if !device.uuid.is_empty() {
                        return Err((EINVAL, None));
                    }
                    device.uuid.clone_from(&uuid);
                    Ok(())
                },
            ),
            DmOrder::Info { device, inactive } => {
                let minor = self.find(&device)?;
                Ok(DmAnswer::Device(self.info(minor, inactive)))
            }
            DmOrder::List => Ok(DmAnswer::Names(self.names())),
            DmOrder::Table { device, inactive } => self.lines(&device, inactive, true),
            DmOrder::Status {
                device, inactive, ..
            }
            | DmOrder::Wait {
                device, inactive, ..
            } => self.lines(&device, inactive, false),
            DmOrder::Deps { device, inactive } => self.deps(&device, inactive),
            DmOrder::Targets => Ok(DmAnswer::Targets(
                params::VERSIONS
                    .iter()
                    .map(|(name, version)| DmTarget {
                        name: (*name).to_owned(),
                        version: *version,
                    })
                    .collect(),
            )),
            DmOrder::Version => Ok(DmAnswer::Version {
                version: "4.47.0".into(),
            }),
            DmOrder::Message { device, .. } => {
                self.find(&device)?;
                let why = "ioctl: Target type does not support messages";
                Err((EINVAL, Some(why.into())))
            }
        }
    }

    fn find(&self, wanted: &DeviceName) -> Result<u32, (i32, Option<String>)> {
        let mut devices = self.devices.iter();
        let found = devices.find(|(minor, device)| match wanted {
            DeviceName::Name(name) => device.name == *name,
            DeviceName::Uuid(uuid) => device.uuid == *uuid,
            DeviceName::Number {
                major,
                minor: number,
            } => *major == MAJOR && *minor == number,
        });
        found.map(|(minor, _)| *minor).ok_or((ENXIO, None))
    }

    fn change(
        &mut self,
        wanted: &DeviceName,
        change: impl FnOnce(&mut Device) -> Result<(), (i32, Option<String>)>,
    ) -> Answer {
        let minor = self.find(wanted)?;
        change(self.devices.get_mut(&minor).expect("it is there"))?;
        self.remove_closed();
        Ok(DmAnswer::Device(self.info(minor, false)))
    }

    fn create(&mut self, name: String, uuid: Option<String>, minor: Option<u32>) -> Answer {
        if name.is_empty() {
            let why = "ioctl: name not supplied when creating device";
            return Err((EINVAL, Some(why.into())));
        }
        let uuid = uuid.unwrap_or_default();
        let is_same = |one: &Device| one.name == name || (!uuid.is_empty() && one.uuid == uuid);
        let free = minor.or_else(|| (0..256).find(|minor| !self.devices.contains_key(minor)));
        let minor = free.expect("a free number");
        if self.devices.contains_key(&minor) || self.devices.values().any(is_same) {
            return Err((EBUSY, None));
        }
        let device = Device {
            name,
            uuid,
            ..Device::default()
        };
        self.devices.insert(minor, device);
        Ok(DmAnswer::Device(self.info(minor, false)))
    }

    /// As the kernel opens a device: it has to be a block device, with a size.
    fn resolve(&self, name: &str) -> Result<Lower, i32> {
        if let Some(disk) = DISKS.iter().find(|(path, ..)| *path == name) {
            return Ok(Lower::Disk(DiskId(disk.1)));
        }
        if let Some(name) = name.strip_prefix("/dev/mapper/") {
            let mut devices = self.devices.iter();
            let found = devices.find(|(_, one)| {
                one.name == name && (one.live.is_some() || one.inactive.is_some())
            });
            return found
                .map(|(minor, _)| Lower::Device(DeviceId(*minor)))
                .ok_or(ENODEV);
        }
        Err(if name.contains(':') { ENXIO } else { ENODEV })
    }

    fn sectors(&self, lower: Lower) -> u64 {
        match lower {
            Lower::Disk(DiskId(minor)) => {
                let disk = DISKS.iter().find(|(_, number, _)| *number == minor);
                disk.expect("a disk").2
            }
            Lower::Device(DeviceId(minor)) => {
                let table = self.devices[&minor].live.as_ref();
                let last = table.and_then(|table| table.lines.last());
                last.map_or(0, |line| line.start + line.len)
            }
        }
    }

    /// The first table of a device is held against the sizes of what it stands on.
    fn fits(&self, line: &Line) -> bool {
        let ends: Vec<(Lower, u64)> = match &line.target {
            Target::Linear { lower, start } => vec![(*lower, start + line.len)],
            Target::Striped { stripes, .. } => {
                let width = line.len / stripes.len() as u64;
                stripes
                    .iter()
                    .map(|(lower, start)| (*lower, start + width))
                    .collect()
            }
            Target::SnapshotOrigin { origin } => vec![(*origin, line.len)],
            _ => Vec::new(),
        };
        ends.iter().all(|(lower, end)| *end <= self.sectors(*lower))
    }

    fn load(&mut self, wanted: &DeviceName, is_read_only: bool, lines: &[TextLine]) -> Answer {
        let minor = self.find(wanted)?;
        let parsed = text::parse(lines, &mut |name| self.resolve(name));
        let lines = parsed.map_err(|error| {
            let log = error.log(&format!("{MAJOR}:{minor}"));
            (error.errno(), Some(log))
        })?;
        let is_first = self.devices[&minor].live.is_none();
        if is_first && !lines.iter().all(|line| self.fits(line)) {
            return Err((EINVAL, None));
        }
        self.change(wanted, |device| {
            device.inactive = Some(Table {
                lines,
                is_read_only,
            });
            Ok(())
        })
    }

    fn tables(&self) -> impl Iterator<Item = &Table> {
        let devices = self.devices.values();
        devices.flat_map(|device| device.live.iter().chain(&device.inactive))
    }

    fn opened(&self, minor: u32) -> u32 {
        let is_below = |table: &&Table| below(table).contains(&Lower::Device(DeviceId(minor)));
        let clients = self.clients.contains(&self.devices[&minor].name);
        self.tables().filter(is_below).count() as u32 + u32::from(clients)
    }

    fn remove(&mut self, wanted: &DeviceName, deferred: bool) -> Answer {
        let minor = self.find(wanted)?;
        if self.opened(minor) > 0 && deferred {
            self.devices
                .get_mut(&minor)
                .expect("it is there")
                .goes_when_closed = true;
            return Ok(DmAnswer::Done);
        }
        if self.opened(minor) > 0 {
            return Err((EBUSY, None));
        }
        self.devices.remove(&minor);
        self.remove_closed();
        Ok(DmAnswer::Done)
    }

    fn remove_closed(&mut self) {
        let mut minors = self.devices.keys().copied();
        let goes = |minor: &u32| self.devices[minor].goes_when_closed && self.opened(*minor) == 0;
        if let Some(minor) = minors.find(goes) {
            self.devices.remove(&minor);
            self.remove_closed();
        }
    }

    fn rename(
        &mut self,
        wanted: &DeviceName,
        old: impl Fn(&Device) -> &String,
        new: &String,
        change: impl FnOnce(&mut Device) -> Result<(), (i32, Option<String>)>,
    ) -> Answer {
        if self.devices.values().any(|device| old(device) == new) {
            return Err((EBUSY, None));
        }
        self.change(wanted, |device| {
            change(device)?;
            device.events += u32::from(device.live.is_some());
            Ok(())
        })
    }

    fn info(&self, minor: u32, inactive: bool) -> DmInfo {
        let device = &self.devices[&minor];
        let table = if inactive {
            &device.inactive
        } else {
            &device.live
        };
        DmInfo {
            name: device.name.clone(),
            uuid: device.uuid.clone(),
            major: MAJOR,
            minor,
            open_count: self.opened(minor),
            event_nr: device.events,
            suspended: device.is_suspended,
            internal_suspend: false,
            live_table: device.live.is_some(),
            inactive_table: device.inactive.is_some(),
            read_only: table.as_ref().is_some_and(|table| table.is_read_only),
            deferred_remove: device.goes_when_closed,
            target_count: table.as_ref().map_or(0, |table| table.lines.len() as u32),
        }
    }

    fn names(&self) -> Vec<DmName> {
        let name = |(minor, device): (&u32, &Device)| DmName {
            name: device.name.clone(),
            uuid: device.uuid.clone(),
            major: MAJOR,
            minor: *minor,
            event_nr: device.events,
        };
        self.devices.iter().map(name).collect()
    }

    fn table(&self, minor: u32, inactive: bool) -> Option<&Table> {
        let device = &self.devices[&minor];
        let table = if inactive {
            &device.inactive
        } else {
            &device.live
        };
        table.as_ref()
    }

    fn lines(&self, wanted: &DeviceName, inactive: bool, is_table: bool) -> Answer {
        let minor = self.find(wanted)?;
        let table = self.table(minor, inactive);
        let table = table.map_or(&[][..], |table| &table.lines);
        let mut lines = text::print(table, &numbers);
        if !is_table {
            for (line, of) in lines.iter_mut().zip(table) {
                line.params = status(&of.target);
            }
        }
        let device = self.info(minor, inactive);
        Ok(DmAnswer::Lines { device, lines })
    }

    fn deps(&self, wanted: &DeviceName, inactive: bool) -> Answer {
        let minor = self.find(wanted)?;
        let mut lowers = self.table(minor, inactive).map(below).unwrap_or_default();
        // The one that was opened last comes first.
        lowers.reverse();
        let dep = |lower: &Lower| match lower {
            Lower::Disk(DiskId(minor)) => {
                let disk = DISKS.iter().find(|(_, number, _)| number == minor);
                DmDep::Block {
                    path: disk.expect("a disk").0.into(),
                    major: 252,
                    minor: *minor,
                }
            }
            Lower::Device(DeviceId(minor)) => DmDep::Mapped {
                name: self.devices[minor].name.clone(),
                major: MAJOR,
                minor: *minor,
            },
        };
        Ok(DmAnswer::Deps {
            device: self.info(minor, inactive),
            deps: lowers.iter().map(dep).collect(),
        })
    }
}

/// What a table stands on, each once.
fn below(table: &Table) -> Vec<Lower> {
    let mut seen = Vec::new();
    for lower in table.lines.iter().flat_map(|line| line.target.lowers()) {
        if !seen.contains(&lower) {
            seen.push(lower);
        }
    }
    seen
}

fn status(target: &Target) -> String {
    match target {
        Target::Striped { stripes, .. } => {
            let names = stripes
                .iter()
                .map(|(lower, _)| format!(" {}", numbers(*lower)));
            let names: String = names.collect();
            let count = stripes.len();
            format!("{count}{names} 1 {}", "A".repeat(count))
        }
        _ => String::new(),
    }
}
