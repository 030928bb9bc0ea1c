//! Two views of the same devices: what `snapshot` and `volume` show of mapped devices,
//! and do to them, and what `dm` shows of volumes that are served, and does to them.
//!
//! A mapped device with a `snapshot` target is a snapshot to them, whatever it is
//! called; all others are volumes. `DEVICE@NAME`, where it is ordered here, becomes a
//! mapped device of just this name, with a store of fixed size.

use std::path::{Path, PathBuf};

use nbdsnap_engine::dm::{DeviceInfo, Lower, Persistence, TableLine, Target};
use nbdsnap_engine::{OnFull, Status, StoreKind};
use nbdsnap_format::{ChunkSize, SECTOR_BYTES};

use super::{Done, Failed, refused};
use crate::control::dm::{DeviceName, DmAnswer, DmDep, DmInfo, DmName, DmOrder, MAJOR, TextLine};
use crate::control::protocol::{
    Answer, Order, Resume, SnapshotCreate, SnapshotName, SnapshotRemove, SnapshotReport,
    SnapshotState, StoreLimit, Suspend, VolumeReport, WhenFull,
};
use crate::disks::{all_it_needs, shown};
use crate::server::admin::refusal::Refused;
use crate::server::admin::turn::Turn;

/// The chunk size of a store unless it is said, in bytes.
const CHUNK: u64 = 16 << 10;

/// A mapped device and its active table.
type Seen = (DeviceInfo, Vec<TableLine>);

impl From<Failed> for Refused {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Server(refused) => refused,
            Failed::Dm { errno, why } => {
                let error = std::io::Error::from_raw_os_error(errno);
                Self::Mapped(why.unwrap_or_else(|| error.to_string()))
            }
        }
    }
}

impl Turn<'_> {
    /// Execute an order as far as it is about mapped devices; none: it is not.
    pub(in crate::server::admin) fn on_mapped(
        &mut self,
        order: &Order,
    ) -> Option<Result<Answer, Refused>> {
        let mapped = &self.registry.mapped;
        if mapped.devices.is_empty() {
            return None;
        }
        match order {
            Order::SnapshotList(selection) => {
                let is_mapped = |name: &String| mapped.has(name);
                let (names, rest): (Vec<_>, Vec<_>) =
                    selection.names.iter().cloned().partition(is_mapped);
                let others = (rest.len() == selection.names.len() || !rest.is_empty())
                    .then_some(crate::control::protocol::Selection { names: rest });
                let all = selection.names.is_empty();
                Some(self.list_with_mapped(others, all, &names))
            }
            Order::VolumeList => Some(self.volumes_with_mapped()),
            Order::SnapshotCreate(create)
                if create.snapshots.iter().any(|one| mapped.has(&one.volume)) =>
            {
                Some(self.create_on_mapped(create))
            }
            Order::SnapshotRemove(remove)
                if remove
                    .snapshots
                    .iter()
                    .any(|one| mapped.has(&one.to_string())) =>
            {
                Some(self.remove_on_mapped(remove))
            }
            Order::Suspend(Suspend { volumes, .. }) | Order::Resume(Resume { volumes })
                if volumes.iter().any(|name| mapped.has(name)) =>
            {
                let resumes = matches!(order, Order::Resume(_));
                Some(self.suspend_mapped(volumes, resumes))
            }
            _ => None,
        }
    }

    fn look_at_mapped(&mut self) -> Result<Vec<Seen>, Refused> {
        self.mapped(|mapped| {
            let mapper = mapped.mapper();
            let devices = mapper.devices().into_iter().filter(|one| one.live_table);
            let devices: Vec<_> = devices.collect();
            let seen = devices.into_iter().filter_map(|info| {
                let lines = mapper.table(info.id, false).ok()?;
                Some((info, lines))
            });
            seen.collect()
        })
    }

    fn list_with_mapped(
        &mut self,
        others: Option<crate::control::protocol::Selection>,
        all: bool,
        names: &[String],
    ) -> Result<Answer, Refused> {
        let mut reports = match others {
            Some(selection) => match self.report_snapshots(&selection)? {
                Answer::Snapshots(reports) => reports,
                _ => unreachable!("snapshots were asked for"),
            },
            None => Vec::new(),
        };
        let seen = self.look_at_mapped()?;
        let names_it =
            |one: &SnapshotReport| all || names.contains(&one.name) || names.contains(&one.volume);
        reports.extend(self.reports_of_mapped(&seen).into_iter().filter(names_it));
        Ok(Answer::Snapshots(reports))
    }

    fn reports_of_mapped(&self, seen: &[Seen]) -> Vec<SnapshotReport> {
        let mut reports = Vec::new();
        for (info, lines) in seen {
            for line in lines {
                if let (Target::Snapshot(_), Some(status)) = (&line.target, line.status) {
                    reports.push(self.report_of_mapped(seen, info, line, status));
                }
            }
        }
        reports
    }

    fn report_of_mapped(
        &self,
        seen: &[Seen],
        info: &DeviceInfo,
        line: &TableLine,
        status: Status,
    ) -> SnapshotReport {
        let Target::Snapshot(pair) = &line.target else {
            unreachable!("it is a snapshot");
        };
        let sectors = |of: fn(u64, u64, u64) -> u64| match status {
            Status::Active {
                allocated,
                total,
                metadata,
            } => Some(of(allocated, total, metadata) * SECTOR_BYTES),
            _ => None,
        };
        SnapshotReport {
            name: info.name.clone(),
            volume: self.name_of_mapped(seen, pair.origin),
            of: self.name_of_mapped(seen, pair.origin),
            snapshot: info.name.clone(),
            state: match status {
                Status::Active { .. } => SnapshotState::Active,
                Status::Overflow => SnapshotState::Overflow,
                Status::Invalid => SnapshotState::Invalid,
                Status::MergeFailed => SnapshotState::MergeFailed,
            },
            cow: PathBuf::from(self.path_of_mapped(seen, pair.cow)),
            kind: kind(pair.persistence).into(),
            read_only: info.read_only,
            taken_at: None,
            bytes: line.len * SECTOR_BYTES,
            chunk_bytes: pair.chunk * SECTOR_BYTES,
            allocated_bytes: sectors(|allocated, _, _| allocated),
            metadata_bytes: sectors(|_, _, metadata| metadata),
            data_bytes: sectors(|allocated, _, metadata| allocated.saturating_sub(metadata)),
            limit_bytes: sectors(|_, total, _| total),
            free_bytes: sectors(|allocated, total, _| total.saturating_sub(allocated)),
            fill_bytes_per_second: None,
            full_in_seconds: None,
            on_full: WhenFull::from(OnFull::Invalidate),
            is_full: status == Status::Overflow,
            paused_writes: 0,
            merge: None,
            clients: info.clients,
            status: format!("{} {} snapshot {status}", line.start, line.len),
        }
    }

    /// A device's name, or a disk's path.
    fn name_of_mapped(&self, seen: &[Seen], lower: Lower) -> String {
        let device = seen
            .iter()
            .find(|(info, _)| Lower::Device(info.id) == lower);
        device.map_or_else(|| self.dm.path_of(lower), |(info, _)| info.name.clone())
    }

    fn path_of_mapped(&self, seen: &[Seen], lower: Lower) -> String {
        match lower {
            Lower::Device(_) => format!("/dev/mapper/{}", self.name_of_mapped(seen, lower)),
            Lower::Disk(_) => self.dm.path_of(lower),
        }
    }

    fn volumes_with_mapped(&mut self) -> Result<Answer, Refused> {
        let Answer::Volumes(mut volumes) = self.report_volumes(&|_| true)? else {
            unreachable!("volumes were asked for");
        };
        let seen = self.look_at_mapped()?;
        for (info, lines) in &seen {
            if !is_snapshot(lines) {
                volumes.push(self.volume_of_mapped(&seen, info, lines));
            }
        }
        Ok(Answer::Volumes(volumes))
    }

    fn volume_of_mapped(
        &self,
        seen: &[Seen],
        info: &DeviceInfo,
        lines: &[TableLine],
    ) -> VolumeReport {
        let lowers = lines.iter().flat_map(|line| line.target.lowers());
        let disk = lowers.into_iter().next();
        let origins = [Some(Lower::Device(info.id)), origin_below(lines)];
        let is_of = |one: &&Seen| {
            one.1.iter().any(|line| match &line.target {
                Target::Snapshot(pair) => origins.contains(&Some(pair.origin)),
                _ => false,
            })
        };
        VolumeReport {
            name: info.name.clone(),
            disk: disk.map_or_else(PathBuf::new, |lower| {
                self.path_of_mapped(seen, lower).into()
            }),
            bytes: info.bytes,
            read_only: info.read_only,
            shared: false,
            suspended: info.suspended,
            snapshots: seen
                .iter()
                .filter(is_of)
                .map(|(info, _)| info.name.clone())
                .collect(),
            clients: info.clients,
        }
    }

    fn create_on_mapped(&mut self, create: &SnapshotCreate) -> Result<Answer, Refused> {
        let [wanted] = &create.snapshots[..] else {
            let why = "several snapshots at one instant: suspend the devices with 'nbdsnap dm suspend', take the snapshots one by one, and resume the devices";
            return Err(Refused::Mapped(why.into()));
        };
        let name = wanted.to_string();
        if let Some((bad, why)) = crate::names::path_fault(&wanted.snapshot) {
            let name = bad.to_owned();
            return Err(Refused::Name { name, why });
        }
        let (of, _) = name.rsplit_once('@').expect("it has two parts");
        let Some(cow) = create.cow.as_ref().filter(|path| path.is_absolute()) else {
            let why = format!(
                "{name}: name the path of its store with --cow: a mapped device has no folder"
            );
            return Err(Refused::Mapped(why));
        };
        let device = self.dm_device(&DeviceName::Name(of.to_owned()))?;
        let (origin, bytes) = self.mapped(move |mapped| {
            let mapper = mapped.mapper();
            let lines = mapper.table(device, false).unwrap_or_default();
            let bytes = mapper.info(device).map_or(0, |info| info.bytes);
            (origin_below(&lines).unwrap_or(Lower::Device(device)), bytes)
        })?;
        let chunk = create.chunk_bytes.unwrap_or(CHUNK);
        let kind = StoreKind::from(create.kind);
        let made = make_file(cow, create.size, kind, chunk, bytes)?;
        let params = format!(
            "{} {} {} {}",
            self.dm.text_of(origin),
            cow.display()
                .to_string()
                .replace('\\', "\\\\")
                .replace(' ', "\\ "),
            letters(kind),
            chunk / SECTOR_BYTES,
        );
        let table = TextLine {
            start: 0,
            len: bytes / SECTOR_BYTES,
            target: "snapshot".into(),
            params,
        };
        if let Err(failed) = self.dm_create_whole(&name, create.read_only, table) {
            if made {
                let _ = std::fs::remove_file(cow);
            }
            return Err(failed.into());
        }
        self.list_with_mapped(None, false, &[name])
    }

    fn dm_create_whole(&mut self, name: &str, read_only: bool, line: TextLine) -> Done<()> {
        let device = || DeviceName::Name(name.to_owned());
        self.dm_create(name, None, None)?;
        let loaded = self.dm_load(&device(), read_only, &[line]);
        let resumed = loaded.and_then(|_| {
            let (device, noflush, nolockfs) = (device(), false, false);
            self.dm_order(DmOrder::Resume {
                device,
                noflush,
                nolockfs,
            })
        });
        if let Err(failed) = resumed {
            self.dm_remove(&device(), false)?;
            return Err(failed);
        }
        Ok(())
    }

    fn remove_on_mapped(&mut self, remove: &SnapshotRemove) -> Result<Answer, Refused> {
        let names: Vec<_> = remove
            .snapshots
            .iter()
            .map(SnapshotName::to_string)
            .collect();
        let answer = self.list_with_mapped(None, false, &names)?;
        let Answer::Snapshots(reports) = &answer else {
            unreachable!("snapshots were asked for");
        };
        if let Some(name) = names
            .iter()
            .find(|name| reports.iter().all(|one| one.name != **name))
        {
            return Err(Refused::Mapped(format!(
                "{name} is no snapshot that mapped devices have"
            )));
        }
        for name in &names {
            self.dm_remove(&DeviceName::Name(name.clone()), false)?;
        }
        for report in reports.iter().filter(|_| remove.delete_cow) {
            let is_file = std::fs::metadata(&report.cow).is_ok_and(|meta| meta.is_file());
            let deleted = if is_file {
                std::fs::remove_file(&report.cow).map_err(|error| error.to_string())
            } else {
                Err("it is no file".into())
            };
            deleted.map_err(|why| {
                Refused::Mapped(format!(
                    "{} is removed, but its store {} is not deleted: {why}",
                    report.name,
                    shown(&report.cow)
                ))
            })?;
        }
        Ok(answer)
    }

    fn suspend_mapped(&mut self, volumes: &[String], resumes: bool) -> Result<Answer, Refused> {
        for name in volumes {
            let device = DeviceName::Name(name.clone());
            let (noflush, nolockfs) = (false, false);
            let order = if resumes {
                DmOrder::Resume {
                    device,
                    noflush,
                    nolockfs,
                }
            } else {
                DmOrder::Suspend {
                    device,
                    noflush,
                    nolockfs,
                }
            };
            self.dm_order(order)?;
        }
        let Answer::Volumes(mut reports) = self.volumes_with_mapped()? else {
            unreachable!("volumes were asked for");
        };
        reports.retain(|report| volumes.contains(&report.name));
        Ok(Answer::Volumes(reports))
    }

    /// Names of what is served beside mapped devices, for `dm`'s list.
    pub(super) fn served_names(&mut self) -> Vec<DmName> {
        let volumes = self.registry.volumes.iter();
        let exports = volumes.flat_map(|volume| {
            let snapshots = volume.snapshots.iter();
            let snapshots = snapshots.map(|one| crate::names::export(&volume.name, &one.name));
            std::iter::once(volume.name.clone()).chain(snapshots)
        });
        let exports: Vec<_> = exports.collect();
        let names = exports.into_iter().map(|name| DmName {
            minor: self.dm.minor_of(&name),
            name,
            uuid: String::new(),
            major: MAJOR,
            event_nr: 0,
        });
        names.collect()
    }

    /// The volume or snapshot that `dm` means, by its export.
    pub(super) fn served(&self, name: &DeviceName) -> Option<String> {
        let export = match name {
            DeviceName::Name(name) => name.clone(),
            DeviceName::Uuid(_) => return None,
            DeviceName::Number { minor, .. } => self.dm.served_by(*minor)?,
        };
        self.registry.is_served(&export).then_some(export)
    }

    /// What `dm` asks about a volume or a snapshot, or does to it.
    pub(super) fn dm_served(&mut self, export: &str, order: &DmOrder) -> Done<DmAnswer> {
        let (info, origin, line, status) = self.look_at_served(export)?;
        let suspends = |volumes| Suspend {
            volumes,
            timeout_seconds: None,
        };
        match order {
            DmOrder::Info { .. } => {}
            DmOrder::Table { .. } => {
                let (device, lines) = (info, vec![line]);
                return Ok(DmAnswer::Lines { device, lines });
            }
            DmOrder::Status { .. } => {
                let params = status;
                let lines = vec![TextLine { params, ..line }];
                let device = info;
                return Ok(DmAnswer::Lines { device, lines });
            }
            DmOrder::Deps { .. } => {
                let deps = origin.into_iter().map(|path| DmDep::File { path });
                let (device, deps) = (info, deps.collect());
                return Ok(DmAnswer::Deps { device, deps });
            }
            DmOrder::Suspend { .. } if !export.contains('@') => {
                if !info.suspended {
                    self.suspend(&suspends(vec![export.to_owned()]))?;
                }
            }
            DmOrder::Resume { .. } if !export.contains('@') => {
                if info.suspended {
                    let volumes = vec![export.to_owned()];
                    self.resume(&Resume { volumes })?;
                }
            }
            DmOrder::Remove { .. } if export.contains('@') => {
                if info.open_count > 0 {
                    return Err(refused(libc::EBUSY, "clients are attached to it"));
                }
                let (volume, snapshot) = export.split_once('@').expect("it is a snapshot's");
                self.remove(&SnapshotRemove {
                    snapshots: vec![SnapshotName {
                        volume: volume.to_owned(),
                        snapshot: snapshot.to_owned(),
                    }],
                    delete_cow: false,
                })?;
                return Ok(DmAnswer::Done);
            }
            _ => {
                let why = format!(
                    "{export} is served as a volume: 'nbdsnap volume' and 'nbdsnap snapshot' change it"
                );
                return Err(refused(libc::EBUSY, why));
            }
        }
        let (info, ..) = self.look_at_served(export)?;
        Ok(DmAnswer::Device(info))
    }

    fn look_at_served(&mut self, export: &str) -> Done<(DmInfo, Vec<PathBuf>, TextLine, String)> {
        let volume = export.split('@').next().unwrap_or(export).to_owned();
        let Answer::Volumes(volumes) = self.report_volumes(&|name| name == volume)? else {
            unreachable!("volumes were asked for");
        };
        let gone = || refused(libc::ENXIO, "it has gone");
        let volume = volumes.into_iter().next().ok_or_else(gone)?;
        let disk = volume.disk.display().to_string();
        let mut info = DmInfo {
            name: export.to_owned(),
            major: MAJOR,
            minor: self.dm.minor_of(export),
            open_count: volume.clients as u32,
            suspended: volume.suspended,
            live_table: true,
            read_only: volume.read_only,
            target_count: 1,
            ..DmInfo::default()
        };
        let mut line = TextLine {
            start: 0,
            len: volume.bytes / SECTOR_BYTES,
            target: "snapshot-origin".into(),
            params: disk.clone(),
        };
        if !export.contains('@') {
            return Ok((info, vec![volume.disk], line, String::new()));
        }
        let names = vec![export.to_owned()];
        let selection = crate::control::protocol::Selection { names };
        let Answer::Snapshots(snapshots) = self.report_snapshots(&selection)? else {
            unreachable!("snapshots were asked for");
        };
        let snapshot = snapshots.into_iter().next().ok_or_else(gone)?;
        info.open_count = snapshot.clients as u32;
        info.read_only = snapshot.read_only;
        let kind = letters(snapshot.kind.into());
        line.len = snapshot.bytes / SECTOR_BYTES;
        line.target = "snapshot".into();
        let origin = if snapshot.of.contains('@') {
            format!("/dev/mapper/{}", snapshot.of)
        } else {
            disk
        };
        line.params = format!(
            "{origin} {} {kind} {}",
            snapshot.cow.display(),
            snapshot.chunk_bytes / SECTOR_BYTES
        );
        let status = snapshot
            .status
            .splitn(4, ' ')
            .nth(3)
            .unwrap_or("")
            .to_owned();
        Ok((info, vec![snapshot.cow, volume.disk], line, status))
    }
}

fn is_snapshot(lines: &[TableLine]) -> bool {
    let is_it = |line: &TableLine| matches!(line.target, Target::Snapshot(_));
    lines.iter().any(is_it)
}

/// What a device that is nothing but a snapshot-origin is the origin of.
fn origin_below(lines: &[TableLine]) -> Option<Lower> {
    match lines {
        [
            TableLine {
                target: Target::SnapshotOrigin { origin },
                ..
            },
        ] => Some(*origin),
        _ => None,
    }
}

fn kind(persistence: Persistence) -> StoreKind {
    match persistence {
        Persistence::Persistent => StoreKind::Persistent,
        Persistence::PersistentOverflow => StoreKind::PersistentOverflow,
        Persistence::Transient => StoreKind::Transient,
    }
}

fn letters(kind: StoreKind) -> &'static str {
    match kind {
        StoreKind::Persistent => "P",
        StoreKind::PersistentOverflow => "PO",
        StoreKind::Transient => "N",
    }
}

/// Make the file of a store, unless there is something already. True: it was made.
fn make_file(
    path: &Path,
    size: Option<StoreLimit>,
    kind: StoreKind,
    chunk: u64,
    origin_bytes: u64,
) -> Result<bool, Refused> {
    if path.exists() {
        return Ok(false);
    }
    let fault = |why: String| Refused::Mapped(format!("{}: {why}", shown(path)));
    let chunk =
        ChunkSize::from_sectors(chunk / SECTOR_BYTES).map_err(|error| fault(error.to_string()))?;
    let bytes = match size {
        Some(StoreLimit::Bytes(bytes)) => bytes,
        Some(StoreLimit::PercentOfOrigin(percent)) => {
            (u128::from(origin_bytes) * u128::from(percent) / 100) as u64
        }
        None => all_it_needs(kind, chunk, origin_bytes),
    };
    let bytes = bytes.next_multiple_of(SECTOR_BYTES);
    let file = std::fs::File::create_new(path).map_err(|error| fault(error.to_string()))?;
    let reserved = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes);
    reserved.map_err(|error| {
        let _ = std::fs::remove_file(path);
        fault(format!("{bytes} bytes for the store: {error}"))
    })?;
    Ok(true)
}
