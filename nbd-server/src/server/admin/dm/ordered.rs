//! What `snapshot`, `volume`, `suspend` and `resume` do to mapped devices. What they do
//! to volumes they do here as far as the device-mapper's own means go: a snapshot is
//! the device that has its table. Where these end, the refusal names the orders of `dm`
//! that lead on. Taking snapshots is in `group.rs`, merging and taking anew in
//! `rolling.rs`.
//!
//! A snapshot is named by its device, `VOLUME@NAME`, or, where that is called otherwise,
//! by what it was taken of and the device.

use nbdsnap_engine::dm::{DeviceInfo, Line, Lower, Pair, TableLine, Target};

use super::views::Seen;
use super::{Done, Failed};
use crate::control::dm::{DeviceName, DmOrder, TextLine};
use crate::control::protocol::{
    Answer, EventKind, EventReport, Order, Selection, SnapshotName, SnapshotRemove, SnapshotRename,
    SnapshotReport,
};
use crate::disks::shown;
use crate::dm::text;
use crate::names;
use crate::server::admin::refusal::Refused;
use crate::server::admin::turn::Turn;

/// A snapshot that is a mapped device.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) name: SnapshotName,
    pub(super) info: DeviceInfo,
    pub(super) line: TableLine,
    pub(super) pair: Pair,
}

impl Found {
    pub(super) fn device(&self) -> DeviceName {
        DeviceName::Name(self.info.name.clone())
    }
}

impl Turn<'_> {
    /// Execute an order as far as it is about mapped devices; none: it is not.
    pub(in crate::server::admin) fn on_mapped(
        &mut self,
        order: &Order,
    ) -> Option<Result<Answer, Refused>> {
        if self.registry.mapped.devices.is_empty() {
            return None;
        }
        let mapped = &self.registry.mapped;
        let is_about =
            |name: &SnapshotName| mapped.has(&name.to_string()) || mapped.has(&name.volume);
        let any_about = |names: &[SnapshotName]| names.iter().any(is_about);
        let any_device = |names: &[String]| names.iter().any(|name| mapped.has(name));
        Some(match order {
            Order::SnapshotList(selection) => self.list_some(selection),
            Order::VolumeList => self.volumes_with_mapped(),
            Order::SnapshotCreate(create) if any_about(&create.snapshots) => {
                self.create_on_mapped(create)
            }
            Order::SnapshotRemove(remove) if any_about(&remove.snapshots) => {
                self.remove_on_mapped(remove)
            }
            Order::SnapshotRename(rename) if is_about(&rename.snapshot) => {
                self.rename_on_mapped(rename)
            }
            Order::SnapshotMerge(merge) if is_about(&merge.snapshot) => self.merge_on_mapped(merge),
            Order::SnapshotReset(reset) if is_about(&reset.snapshot) => self.reset_on_mapped(reset),
            Order::SnapshotCancel(cancel) if is_about(&cancel.snapshot) => {
                Err(Refused::NoMergeWaits(cancel.snapshot.clone()))
            }
            Order::SnapshotExtend(extend) if is_about(&extend.snapshot) => {
                self.no_extending(&extend.snapshot)
            }
            Order::Suspend(suspend) if any_device(&suspend.volumes) => {
                if suspend.timeout_seconds.is_some() {
                    let why = "mapped devices do not go on by themselves: leave --timeout out, and 'resume' them";
                    return Some(Err(Refused::Mapped(why.into())));
                }
                self.suspend_mapped(&suspend.volumes)
            }
            Order::Resume(resume) if any_device(&resume.volumes) => {
                self.resume_mapped(&resume.volumes)
            }
            Order::VolumeResize(resize) if mapped.has(&resize.name) => {
                let name = &resize.name;
                Err(Refused::Mapped(format!(
                    "{name} is a mapped device, as large as its table says: 'nbdsnap dm load {name}' another one, then 'nbdsnap dm resume {name}'"
                )))
            }
            Order::VolumeRemove(remove) if mapped.has(&remove.name) => no_removing(&remove.name),
            Order::VolumesRemove(remove) if any_device(&remove.names) => {
                let mut names = remove.names.iter();
                let name = names.find(|name| mapped.has(name)).expect("there is one");
                no_removing(name)
            }
            _ => return None,
        })
    }

    fn list_some(&mut self, selection: &Selection) -> Result<Answer, Refused> {
        let mapped = &self.registry.mapped;
        let is_mapped = |name: &String| {
            mapped.has(name) || name.split_once('@').is_some_and(|(of, _)| mapped.has(of))
        };
        let (names, rest): (Vec<_>, Vec<_>) = selection.names.iter().cloned().partition(is_mapped);
        let all = selection.names.is_empty();
        let others = (all || !rest.is_empty()).then_some(Selection { names: rest });
        self.list_with_mapped(others, all, &names)
    }

    /// The snapshot that is meant.
    pub(super) fn found(&mut self, name: &SnapshotName) -> Result<Found, Refused> {
        let seen = self.look_at_mapped()?;
        let mut found = self.snapshots_among(&seen);
        let called = |one: &Found| one.info.name == name.to_string() || one.name == *name;
        let place = found.iter().position(called);
        let place = place.ok_or_else(|| Refused::NoSnapshot(name.clone()))?;
        Ok(found.swap_remove(place))
    }

    fn snapshots_among(&self, seen: &[Seen]) -> Vec<Found> {
        let mut all = Vec::new();
        for (info, lines) in seen {
            let is_merged = self.dm.merge_of(info).is_some();
            let line = lines.iter().find_map(|line| match &line.target {
                Target::Snapshot(pair) => Some((line, pair)),
                Target::SnapshotMerge(pair) if is_merged => Some((line, pair)),
                _ => None,
            });
            if let Some((line, pair)) = line {
                all.push(Found {
                    name: self.snapshot_name(seen, info, pair),
                    info: info.clone(),
                    line: line.clone(),
                    pair: pair.clone(),
                });
            }
        }
        all
    }

    /// The devices whose tables stand on a snapshot, by name; and what they may be.
    pub(super) fn standing_on(&mut self, found: &Found) -> Result<Vec<String>, Refused> {
        let lower = Lower::Device(found.info.id);
        self.mapped(move |mapped| {
            let mapper = mapped.mapper();
            let devices = mapper.devices().into_iter().filter(|device| {
                [false, true].into_iter().any(|inactive| {
                    let deps = mapper.deps(device.id, inactive).unwrap_or_default();
                    deps.contains(&lower)
                })
            });
            devices.map(|device| device.name).collect()
        })
    }

    /// Nothing stands on a snapshot.
    pub(super) fn check_free(&mut self, found: &Found) -> Result<(), Refused> {
        let others = self.standing_on(found)?;
        if others.is_empty() {
            return Ok(());
        }
        let (name, others) = (&found.name, others.join(", "));
        Err(Refused::Mapped(format!(
            "{name} is in use: these stand on it: {others}"
        )))
    }

    /// A snapshot's line of a table, with this target.
    pub(super) fn line_of(&self, found: &Found, target: Target) -> TextLine {
        let line = Line {
            start: found.line.start,
            len: found.line.len,
            target,
        };
        let mut lines = text::print(&[line], &|lower| self.dm.text_of(lower));
        lines.pop().expect("a line of text for each")
    }

    /// Suspend a device, or have it go on.
    pub(super) fn stand_still(&mut self, device: &DeviceName, still: bool) -> Done<()> {
        let (device, noflush, nolockfs) = (device.clone(), false, false);
        let order = if still {
            DmOrder::Suspend {
                device,
                noflush,
                nolockfs,
            }
        } else {
            DmOrder::Resume {
                device,
                noflush,
                nolockfs,
            }
        };
        self.dm_order(order).map(drop)
    }

    fn remove_on_mapped(&mut self, remove: &SnapshotRemove) -> Result<Answer, Refused> {
        let mapped = &self.registry.mapped;
        let is_about =
            |name: &SnapshotName| mapped.has(&name.to_string()) || mapped.has(&name.volume);
        let (names, served): (Vec<_>, Vec<_>) =
            remove.snapshots.iter().cloned().partition(is_about);
        let mut leaving = Vec::new();
        for (place, name) in names.iter().enumerate() {
            if names[..place].contains(name) {
                return Err(Refused::Twice(name.clone()));
            }
            leaving.push(self.found(name)?);
        }
        for one in &leaving {
            if self.dm.merge_of(&one.info).is_some() {
                return Err(Refused::Merging(one.name.clone()));
            }
            let mut others = self.standing_on(one)?;
            others.retain(|other| leaving.iter().all(|one| one.info.name != *other));
            if !others.is_empty() {
                self.check_free(one)?;
            }
            if one.info.clients > 0 {
                return Err(Refused::Mapped(format!(
                    "{} is in use: clients are attached to it ({}): detach them first",
                    one.name, one.info.clients
                )));
            }
        }
        let all: Vec<String> = leaving.iter().map(|one| one.info.name.clone()).collect();
        let Answer::Snapshots(mut reports) = self.list_with_mapped(None, false, &all)? else {
            unreachable!("snapshots were asked for");
        };
        reports.retain(|report| all.contains(&report.name));
        if !served.is_empty() {
            let (snapshots, delete_cow) = (served, remove.delete_cow);
            let removed = self.remove(&SnapshotRemove {
                snapshots,
                delete_cow,
            })?;
            if let Answer::Snapshots(others) = removed {
                reports.splice(..0, others);
            }
        }
        self.remove_in_turn(leaving)?;
        let files = reports.iter().filter(|one| all.contains(&one.name));
        for report in files.filter(|_| remove.delete_cow) {
            delete_store(report)?;
        }
        Ok(Answer::Snapshots(reports))
    }

    /// Those that stand on others before these.
    fn remove_in_turn(&mut self, mut leaving: Vec<Found>) -> Result<(), Refused> {
        while !leaving.is_empty() {
            let mut next = 0;
            for (place, one) in leaving.iter().enumerate() {
                if self.standing_on(one)?.is_empty() {
                    next = place;
                    break;
                }
            }
            let one = leaving.remove(next);
            self.dm_remove(&one.device(), false)?;
            self.tell(EventKind::Removed, &one.name);
        }
        Ok(())
    }

    /// Another name for the device, and for those that are named after it.
    fn rename_on_mapped(&mut self, rename: &SnapshotRename) -> Result<Answer, Refused> {
        let SnapshotRename { snapshot, name } = rename;
        if let Some(why) = names::fault(name) {
            let name = name.clone();
            return Err(Refused::Name { name, why });
        }
        let found = self.found(snapshot)?;
        if self.dm.merge_of(&found.info).is_some() {
            return Err(Refused::Merging(found.name));
        }
        let old = found.info.name;
        let new = match old.rsplit_once('@') {
            Some((of, _)) => names::export(of, name),
            None => name.clone(),
        };
        let devices = self.mapped(|mapped| mapped.mapper().devices())?;
        let renamed = |device: &DeviceInfo| match device.name.strip_prefix(&*old) {
            Some("") => Some(new.clone()),
            Some(rest) if rest.starts_with('@') => Some(format!("{new}{rest}")),
            _ => None,
        };
        let pairs = devices
            .iter()
            .filter_map(|one| Some((one.name.clone(), renamed(one)?)));
        let pairs: Vec<(String, String)> = pairs.collect();
        for (was, is) in &pairs {
            if devices.iter().any(|device| device.name == *is) {
                return Err(Refused::Mapped(format!(
                    "{was} cannot be called {is}: there is a device of that name already"
                )));
            }
            self.dm_check_name(is)?;
        }
        for (was, is) in pairs {
            let (device, new_name) = (DeviceName::Name(was.clone()), is.clone());
            self.dm_order(DmOrder::Rename { device, new_name })?;
            let (volume, snapshot) = is.split_once('@').unwrap_or((&found.name.volume, &is));
            let event = EventReport::new(EventKind::Renamed)
                .of_volume(volume)
                .of_snapshot(snapshot)
                .saying(format!("was {was}"));
            self.events.publish(event);
        }
        self.report_on_mapped(&[new])
    }

    /// How these snapshots are, by their devices.
    pub(super) fn report_on_mapped(&mut self, devices: &[String]) -> Result<Answer, Refused> {
        let Answer::Snapshots(mut reports) = self.list_with_mapped(None, true, &[])? else {
            unreachable!("snapshots were asked for");
        };
        reports.retain(|report| devices.contains(&report.name));
        Ok(Answer::Snapshots(reports))
    }

    fn no_extending(&mut self, name: &SnapshotName) -> Result<Answer, Refused> {
        let found = self.found(name)?;
        let device = found.info.name;
        let why = format!(
            "the store of a mapped device is as large as what it lies on: enlarge that, and give the device its table once more ('nbdsnap dm table {device} | nbdsnap dm load {device}', then 'nbdsnap dm resume {device}')"
        );
        Err(Refused::NotExtended(name.clone(), why))
    }

    /// All of them, or none.
    fn suspend_mapped(&mut self, volumes: &[String]) -> Result<Answer, Refused> {
        let before = self.check_volumes(volumes)?;
        for (done, name) in volumes.iter().enumerate() {
            if before[done] {
                return Err(Refused::Suspended(name.clone()));
            }
        }
        for (done, name) in volumes.iter().enumerate() {
            let failed = self.stand_still(&DeviceName::Name(name.clone()), true);
            if let Err(failed) = failed {
                for name in &volumes[..done] {
                    // What failed is told; these went a moment ago.
                    let _ = self.stand_still(&DeviceName::Name(name.clone()), false);
                }
                return Err(failed.into());
            }
        }
        self.volumes_named(volumes)
    }

    fn resume_mapped(&mut self, volumes: &[String]) -> Result<Answer, Refused> {
        let before = self.check_volumes(volumes)?;
        for (place, name) in volumes.iter().enumerate() {
            if !before[place] {
                return Err(Refused::NotSuspended(name.clone()));
            }
        }
        for name in volumes {
            self.stand_still(&DeviceName::Name(name.clone()), false)?;
        }
        self.volumes_named(volumes)
    }

    /// All of them are there, and each is named once; which of them are suspended.
    fn check_volumes(&mut self, volumes: &[String]) -> Result<Vec<bool>, Refused> {
        let mut suspended = Vec::with_capacity(volumes.len());
        for (place, name) in volumes.iter().enumerate() {
            if volumes[..place].contains(name) {
                return Err(Refused::VolumeTwice(name.clone()));
            }
            let device = DeviceName::Name(name.clone());
            if let Some(volume) = self.registry.volume(name) {
                suspended.push(volume.is_suspended());
                continue;
            }
            match self.dm_device(&device) {
                Ok(id) => suspended.push(self.dm_info(id)?.suspended),
                Err(Failed::Dm { .. }) => return Err(Refused::NoVolume(name.clone())),
                Err(Failed::Server(refused)) => return Err(refused),
            }
        }
        Ok(suspended)
    }

    fn volumes_named(&mut self, volumes: &[String]) -> Result<Answer, Refused> {
        let Answer::Volumes(mut reports) = self.volumes_with_mapped()? else {
            unreachable!("volumes were asked for");
        };
        reports.retain(|report| volumes.contains(&report.name));
        Ok(Answer::Volumes(reports))
    }
}

fn no_removing(name: &str) -> Result<Answer, Refused> {
    Err(Refused::Mapped(format!(
        "{name} is a mapped device: 'nbdsnap dm remove {name}' ends it"
    )))
}

/// Delete the file of a store that nobody uses any more.
pub(super) fn delete_store(report: &SnapshotReport) -> Result<(), Refused> {
    let is_file = std::fs::metadata(&report.cow).is_ok_and(|meta| meta.is_file());
    let deleted = if is_file {
        std::fs::remove_file(&report.cow).map_err(|error| error.to_string())
    } else {
        Err("it is no file".into())
    };
    deleted.map_err(|why| {
        let (name, cow) = (&report.name, shown(&report.cow));
        let why = crate::dm::plain(&why);
        Refused::Mapped(format!(
            "{name} is removed, but its store {cow} is not deleted: {why}"
        ))
    })
}
