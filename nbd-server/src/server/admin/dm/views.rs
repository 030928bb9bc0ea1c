//! Two views of the same devices: what `snapshot` and `volume` show of mapped devices
//! (what they do to them: `ordered.rs`), and what `dm` shows of volumes that are served,
//! and does to them.
//!
//! A mapped device with a `snapshot` target is a snapshot to them, whatever it is
//! called; all others are volumes.

use std::path::PathBuf;

use nbdsnap_engine::dm::{DeviceInfo, Lower, Pair, Persistence, TableLine, Target};
use nbdsnap_engine::{OnFull, Status, StoreKind};
use nbdsnap_format::SECTOR_BYTES;

use super::{Done, Failed, refused};
use crate::control::dm::{DeviceName, DmAnswer, DmDep, DmInfo, DmName, DmOrder, MAJOR, TextLine};
use crate::control::protocol::{
    Answer, MergeReport, Resume, SnapshotName, SnapshotRemove, SnapshotReport, SnapshotState,
    Suspend, VolumeReport, WhenFull,
};
use crate::dm::plain;
use crate::server::admin::refusal::Refused;
use crate::server::admin::turn::Turn;

/// A mapped device and its active table.
pub(super) type Seen = (DeviceInfo, Vec<TableLine>);

impl From<Failed> for Refused {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Server(refused) => refused,
            Failed::Dm { errno, why } => {
                let error = std::io::Error::from_raw_os_error(errno);
                Self::Mapped(plain(&why.unwrap_or_else(|| error.to_string())))
            }
        }
    }
}

impl Turn<'_> {
    /// Those that have an active table.
    pub(super) fn look_at_mapped(&mut self) -> Result<Vec<Seen>, Refused> {
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

    pub(super) fn list_with_mapped(
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
                let shows = match line.target {
                    Target::Snapshot(_) => true,
                    Target::SnapshotMerge(_) => self.dm.merge_of(info).is_some(),
                    _ => false,
                };
                if let Some(status) = line.status.filter(|_| shows) {
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
        let (Target::Snapshot(pair) | Target::SnapshotMerge(pair)) = &line.target else {
            unreachable!("it is a snapshot");
        };
        let called = self.snapshot_name(seen, info, pair);
        let sectors = |of: fn(u64, u64, u64) -> u64| match status {
            Status::Active {
                allocated,
                total,
                metadata,
            } => Some(of(allocated, total, metadata) * SECTOR_BYTES),
            _ => None,
        };
        let data_bytes = sectors(|allocated, _, metadata| allocated.saturating_sub(metadata));
        let merge = self.dm.merge_of(info).map(|merge| MergeReport {
            left_chunks: data_bytes.unwrap_or(0) / (pair.chunk * SECTOR_BYTES).max(1),
            total_chunks: merge.total_chunks,
        });
        SnapshotReport {
            name: info.name.clone(),
            volume: called.volume,
            of: self.name_of_mapped(seen, pair.origin),
            snapshot: called.snapshot,
            state: match status {
                Status::Active { .. } if merge.is_some() => SnapshotState::Merging,
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
            data_bytes,
            limit_bytes: sectors(|_, total, _| total),
            free_bytes: sectors(|allocated, total, _| total.saturating_sub(allocated)),
            fill_bytes_per_second: None,
            full_in_seconds: None,
            on_full: WhenFull::from(OnFull::Invalidate),
            is_full: status == Status::Overflow,
            paused_writes: 0,
            merge,
            clients: info.clients,
            status: format!(
                "{} {} {} {status}",
                line.start,
                line.len,
                line.target.name()
            ),
        }
    }

    /// A snapshot's name in its two parts: `VOLUME@NAME`, where the device is called so,
    /// else what it was taken of and the device.
    pub(super) fn snapshot_name(
        &self,
        seen: &[Seen],
        info: &DeviceInfo,
        pair: &Pair,
    ) -> SnapshotName {
        let (volume, snapshot) = match info.name.split_once('@') {
            Some((volume, snapshot)) => (volume.to_owned(), snapshot.to_owned()),
            None => (self.name_of_mapped(seen, pair.origin), info.name.clone()),
        };
        SnapshotName { volume, snapshot }
    }

    /// A device's name, or a disk's path.
    pub(super) fn name_of_mapped(&self, seen: &[Seen], lower: Lower) -> String {
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

    pub(super) fn volumes_with_mapped(&mut self) -> Result<Answer, Refused> {
        let Answer::Volumes(mut volumes) = self.report_volumes(&|_| true)? else {
            unreachable!("volumes were asked for");
        };
        let seen = self.look_at_mapped()?;
        for (info, lines) in &seen {
            if !is_snapshot(lines) && self.dm.merge_of(info).is_none() {
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
        let (mut info, origin, line, status) = self.look_at_served(export)?;
        if order.asks_inactive() {
            // A volume has one table, which is in use.
            info = DmInfo {
                target_count: 0,
                read_only: false,
                ..info
            };
        }
        let suspends = |volumes| Suspend {
            volumes,
            timeout_seconds: None,
        };
        match order {
            DmOrder::Info { .. } => return Ok(DmAnswer::Device(info)),
            DmOrder::Table { inactive, .. } | DmOrder::Status { inactive, .. } => {
                let params = match order {
                    DmOrder::Table { .. } => line.params,
                    _ => status,
                };
                let line = TextLine { params, ..line };
                let lines = (!inactive).then_some(line).into_iter().collect();
                let device = info;
                return Ok(DmAnswer::Lines { device, lines });
            }
            DmOrder::Deps { inactive, .. } => {
                let deps = origin.into_iter().filter(|_| !inactive);
                let deps = deps.map(|path| DmDep::File { path }).collect();
                let device = info;
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
pub(super) fn origin_below(lines: &[TableLine]) -> Option<Lower> {
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

pub(super) fn letters(kind: StoreKind) -> &'static str {
    match kind {
        StoreKind::Persistent => "P",
        StoreKind::PersistentOverflow => "PO",
        StoreKind::Transient => "N",
    }
}
