//! `snapshot create` on mapped devices: each snapshot becomes a mapped device of just
//! its name, `DEVICE@NAME`, with a store of fixed size.
//!
//! Several are one instant, on devices and on volumes that are served: everything is
//! made beforehand; then the volumes are held, the devices by which requests come to
//! the origins are suspended, the new tables become active, and all go on. All are
//! taken, or none.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nbdsnap_engine::StoreKind;
use nbdsnap_engine::dm::{DeviceId, Lower};
use nbdsnap_format::{ChunkSize, SECTOR_BYTES};

use super::Failed;
use super::views::{letters, origin_below};
use crate::control::dm::{DeviceName, TextLine};
use crate::control::protocol::{
    Answer, EventKind, SnapshotCreate, SnapshotName, StoreLimit, WhenFull,
};
use crate::disks::{self, Opening, all_it_needs, shown};
use crate::dm::params;
use crate::law;
use crate::server::admin::refusal::Refused;
use crate::server::admin::turn::Turn;

/// The chunk size of a store unless it is said, in bytes.
const CHUNK: u64 = 16 << 10;

/// All devices of a group stand still within this time, or go on.
const REST: Duration = Duration::from_secs(30);

/// Where the nodes of mapped devices are.
const NODES: &str = "/dev/mapper/";

/// A snapshot whose device is made, and has its table as the inactive one.
struct Ready {
    name: SnapshotName,
    origin: Lower,
    /// The file of its store, if it was made for it.
    made: Option<PathBuf>,
}

impl Ready {
    fn device(&self) -> DeviceName {
        DeviceName::Name(self.name.to_string())
    }
}

impl Turn<'_> {
    pub(super) fn create_on_mapped(&mut self, create: &SnapshotCreate) -> Result<Answer, Refused> {
        let mapped = &self.registry.mapped;
        let is_about = |name: &SnapshotName| mapped.has(&name.volume) || mapped.has(&of(name));
        let (names, served): (Vec<_>, Vec<_>) =
            create.snapshots.iter().cloned().partition(is_about);
        self.check_on_mapped(create, &names)?;
        let mut ready = Vec::new();
        for name in &names {
            match self.make_ready(create, name) {
                Ok(one) => ready.push(one),
                Err(refused) => {
                    self.unmake(ready);
                    return Err(refused);
                }
            }
        }
        let is_group = create.snapshots.len() > 1;
        let mut held = Vec::new();
        let taken = if served.is_empty() {
            self.take_ready(&ready, is_group, &mut held)
        } else {
            let snapshots = served.clone();
            let rest = SnapshotCreate {
                snapshots,
                ..create.clone()
            };
            let others = |this: &mut Self| this.take_ready(&ready, is_group, &mut held);
            self.create_beside(&rest, others).map(drop)
        };
        self.let_go(&held);
        if let Err(refused) = taken {
            self.unmake(ready);
            return Err(refused);
        }
        for name in &names {
            self.tell(EventKind::Created, name);
        }
        let mut reports = Vec::new();
        for name in &create.snapshots {
            let answer = if served.contains(name) {
                self.report_named(std::slice::from_ref(name))?
            } else {
                self.report_on_mapped(&[name.to_string()])?
            };
            if let Answer::Snapshots(mut more) = answer {
                reports.append(&mut more);
            }
        }
        Ok(Answer::Snapshots(reports))
    }

    /// What can be refused by looking at names and settings.
    fn check_on_mapped(
        &self,
        create: &SnapshotCreate,
        names: &[SnapshotName],
    ) -> Result<(), Refused> {
        if create.cow.is_some() && create.snapshots.len() > 1 {
            return Err(Refused::OnePath(create.snapshots.len()));
        }
        let other = |when: &WhenFull| *when != WhenFull::Invalidate;
        if create.on_full.as_ref().is_some_and(other) || create.auto_extend.is_some() {
            let why = "the store of a mapped device has a fixed size, and is lost when it is full, as with the kernel's: leave --on-full and --auto-extend out";
            return Err(Refused::Mapped(why.into()));
        }
        for (place, name) in names.iter().enumerate() {
            if let Some((bad, why)) = crate::names::path_fault(&name.snapshot) {
                let name = bad.to_owned();
                return Err(Refused::Name { name, why });
            }
            if names[..place].contains(name) {
                return Err(Refused::Twice(name.clone()));
            }
            if self.registry.mapped.has(&name.to_string()) {
                return Err(Refused::Exists(name.clone()));
            }
        }
        Ok(())
    }

    /// Make the store and the device, and load its table.
    fn make_ready(
        &mut self,
        create: &SnapshotCreate,
        name: &SnapshotName,
    ) -> Result<Ready, Refused> {
        let missing = || {
            let (volume, snapshot) = (name.volume.clone(), name.snapshot.clone());
            match crate::names::origin(&snapshot) {
                Some(of) => Refused::NoSnapshot(SnapshotName {
                    volume,
                    snapshot: of.to_owned(),
                }),
                None => Refused::NoVolume(volume),
            }
        };
        let device = match self.dm_device(&DeviceName::Name(of(name))) {
            Ok(device) => device,
            Err(Failed::Dm { .. }) => return Err(missing()),
            Err(Failed::Server(refused)) => return Err(refused),
        };
        self.check_not_lost(name, device)?;
        let (origin, bytes) = self.mapped(move |mapped| {
            let mapper = mapped.mapper();
            let lines = mapper.table(device, false).unwrap_or_default();
            let bytes = mapper.info(device).map_or(0, |info| info.bytes);
            (origin_below(&lines).unwrap_or(Lower::Device(device)), bytes)
        })?;
        let cow = match &create.cow {
            Some(path) if !path.is_absolute() => return Err(Refused::RelativePath(path.clone())),
            Some(path) => path.clone(),
            None => self.cow_beside(name, origin)?,
        };
        if let Ok(meta) = std::fs::metadata(&cow) {
            self.taken.check_free(&meta, &cow)?;
        }
        let chunk = create.chunk_bytes.unwrap_or(CHUNK);
        let kind = StoreKind::from(create.kind);
        let made = make_file(&cow, create.size, kind, chunk, bytes)?.then_some(cow.clone());
        let path = |path: String| params::quote(&path);
        let params = format!(
            "{} {} {} {}",
            path(self.dm.text_of(origin)),
            path(cow.display().to_string()),
            letters(kind),
            chunk / SECTOR_BYTES,
        );
        let line = TextLine {
            start: 0,
            len: bytes / SECTOR_BYTES,
            target: "snapshot".into(),
            params,
        };
        let name = name.clone();
        let ready = Ready { name, origin, made };
        if let Err(failed) = self.dm_create(&ready.name.to_string(), None, None) {
            delete(ready.made.as_deref());
            return Err(failed.into());
        }
        if let Err(failed) = self.dm_load(&ready.device(), create.read_only, &[line]) {
            self.unmake(vec![ready]);
            return Err(failed.into());
        }
        Ok(ready)
    }

    /// What is lost shows nothing that a snapshot could keep.
    fn check_not_lost(&mut self, name: &SnapshotName, device: DeviceId) -> Result<(), Refused> {
        let of = crate::names::origin(&name.snapshot);
        match (self.is_lost(device)?, of) {
            (false, _) => Ok(()),
            (true, Some(of)) => Err(Refused::OfLost(SnapshotName {
                volume: name.volume.clone(),
                snapshot: of.to_owned(),
            })),
            (true, None) => Err(Refused::Mapped(format!(
                "{} is lost, and shows nothing that a snapshot of it could keep",
                name.volume
            ))),
        }
    }

    /// The path of a store for which none is named: beside the file that comes first in
    /// what the device stands on.
    fn cow_beside(&mut self, name: &SnapshotName, origin: Lower) -> Result<PathBuf, Refused> {
        let mut lower = origin;
        loop {
            let id = match lower {
                Lower::Disk(id) => {
                    let file = self.dm.file_of(id).map(Path::to_owned);
                    let mut path = file.ok_or_else(|| Refused::NoDefaultCow(name.to_string()))?;
                    path.as_mut_os_string().push(format!(".{name}.cow"));
                    return Ok(path);
                }
                Lower::Device(id) => id,
            };
            let lines = self.mapped(move |mapped| mapped.mapper().table(id, false))?;
            let lines = lines.unwrap_or_default();
            let mut lowers = lines.iter().flat_map(|line| line.target.lowers());
            let Some(next) = lowers.next() else {
                return Err(Refused::Mapped(format!(
                    "{name}: there is no file below the device, beside which its store could be made: name the store's path with --cow"
                )));
            };
            lower = next;
        }
    }

    /// Take the snapshots that are ready; as a group while nothing reaches their origins.
    /// Those devices that stand still for it are `held`.
    fn take_ready(
        &mut self,
        ready: &[Ready],
        is_group: bool,
        held: &mut Vec<DeviceId>,
    ) -> Result<(), Refused> {
        if is_group && law::group_is_one_instant() {
            let origins: Vec<Lower> = ready.iter().map(|one| one.origin).collect();
            self.hold(origins, held)?;
        }
        for one in ready {
            self.stand_still(&one.device(), false)?;
            self.check_taken(one)?;
        }
        Ok(())
    }

    /// Its device goes on even where its origin could not be flushed for the instant.
    fn check_taken(&mut self, one: &Ready) -> Result<(), Refused> {
        let device = self.dm_device(&one.device())?;
        if self.is_lost(device)? {
            return Err(Refused::FlushFailed(of(&one.name)));
        }
        Ok(())
    }

    fn is_lost(&mut self, device: DeviceId) -> Result<bool, Refused> {
        let lines = self.mapped(move |mapped| mapped.mapper().table(device, false))?;
        let is_lost = |status| status == Some(nbdsnap_engine::Status::Invalid);
        Ok(lines.is_ok_and(|lines| lines.iter().any(|line| is_lost(line.status))))
    }

    /// Have the devices stand still by which requests come to `origins`.
    fn hold(&mut self, origins: Vec<Lower>, held: &mut Vec<DeviceId>) -> Result<(), Refused> {
        let ways = self.mapped(move |mapped| {
            let mapper = mapped.mapper();
            let ways = mapper.ways_to(&origins).into_iter();
            let ways = ways.filter_map(|id| mapper.info(id).ok());
            ways.filter(|one| !one.suspended).collect::<Vec<_>>()
        })?;
        if let Some(one) = ways.iter().find(|one| one.inactive_table) {
            let name = &one.name;
            return Err(Refused::Mapped(format!(
                "{name} has a table that waits, which taking several snapshots at one instant would make the active one: 'nbdsnap dm resume {name}' or 'nbdsnap dm clear {name}' first"
            )));
        }
        let until = Instant::now() + REST;
        for one in ways {
            held.push(one.id);
            let suspend = self.dm_follow_until(Some(until), move |mapped| {
                mapped.mapper().suspend(one.id, false).map(Some)
            });
            match suspend {
                Err(Failed::Server(Refused::TooSlow)) => {
                    return Err(Refused::NotHeld(REST.as_secs()));
                }
                suspended => suspended?,
            }
        }
        Ok(())
    }

    /// Have devices go on that stand still; also those that are only about to.
    fn let_go(&mut self, held: &[DeviceId]) {
        for &id in held.iter().rev() {
            // One that has gone meanwhile holds up nobody.
            let _ = self.mapped(move |mapped| mapped.mapper().resume(id, false).map(drop));
        }
    }

    /// Leave nothing of what was made.
    fn unmake(&mut self, ready: Vec<Ready>) {
        for one in ready.into_iter().rev() {
            if let Err(failed) = self.dm_remove(&one.device(), false) {
                let why = Refused::from(failed);
                tracing::warn!(device = %one.name, "it is left over, without a use: {why}");
                continue;
            }
            delete(one.made.as_deref());
        }
    }
}

/// What a snapshot is taken of, as a device.
fn of(name: &SnapshotName) -> String {
    crate::names::origin_export(&name.volume, &name.snapshot)
}

fn delete(file: Option<&Path>) {
    if let Some(path) = file
        && let Err(error) = std::fs::remove_file(path)
    {
        tracing::warn!("{}: it is left over: {error}", shown(path));
    }
}

/// Make the file of a store, unless there is something already, which must be empty
/// (durability.md, rule 15). True: it was made.
fn make_file(
    path: &Path,
    size: Option<StoreLimit>,
    kind: StoreKind,
    chunk: u64,
    origin_bytes: u64,
) -> Result<bool, Refused> {
    let fault = |why: String| {
        let why = crate::dm::plain(&why);
        Refused::Mapped(format!("{}: {why}", shown(path)))
    };
    if path.starts_with(NODES) {
        let why = "a store on a mapped device is for 'nbdsnap dm create' with a table to name";
        return Err(fault(why.into()));
    }
    if path.exists() {
        let disk = disks::existing(path, Opening::Write)?;
        let found = match disks::contents(&disk).map_err(|error| fault(error.to_string()))? {
            disks::Contents::Empty => return Ok(false),
            disks::Contents::Store => "a COW store".to_owned(),
            disks::Contents::Other(what) => what,
        };
        return Err(fault(format!(
            "is no place for a new store: {found} is there; name another path with --cow, or take that store over with 'nbdsnap dm create'"
        )));
    }
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
        delete(Some(path));
        fault(format!("{bytes} bytes for the store: {error}"))
    })?;
    Ok(true)
}
