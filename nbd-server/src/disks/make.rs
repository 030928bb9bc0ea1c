//! Carrying a plan out: files are made and grown, torn areas repaired, stores
//! written. If one thing fails, what was made before is taken back.
//!
//! What has to be flushed for a thousand stores is flushed by many threads at once
//! ([`super::together`]): the file system does it for all who wait at one price.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nbdsnap_engine::{Access, Action, Store, StoreKind, StoreSize, StoreSpec};
use nbdsnap_format::SECTOR_BYTES;
use rustix::fs::CWD;

use super::cow::{NewStore, Place, PlannedCow, refused};
use super::identity::{Identity, Role, Taken};
use super::open::lock;
use super::store_io::{StoreDisk, sync_folder_of};
use super::{
    Making, Note, Opened, Past, Plan, PlannedSnapshot, PlannedVolume, Refusal, Scratch, shown,
    together,
};
use crate::cli::size;
use crate::io::file::{Medium, perform};
use crate::law;
use crate::names;
use crate::server::setup::{Defaults, OpenDisk, OpenSnapshot, OpenVolume};

/// A store in the making: its room is there, its header is not.
struct Prepared {
    name: String,
    read_only: bool,
    kind: StoreKind,
    limit: Option<u64>,
    past: Past,
    behaviour: Option<Defaults>,
    disk: OpenDisk,
    /// The name that it was made under, and still has.
    first_name: Option<PathBuf>,
    work: Work,
    scratch: Option<Scratch>,
}

enum Work {
    Nothing(Store),
    Repair {
        size: StoreSize,
        origin_bytes: u64,
    },
    Create {
        spec: StoreSpec,
        /// So many zeros lie where the store's beginning will.
        zeros: u64,
    },
}

impl Plan {
    /// Do what was planned. Everything that may fail for want of space comes
    /// first, for all stores; headers are written last, so that a failure leaves
    /// no store behind. It may take long; [`Opened::note`] is for afterwards.
    pub fn carry_out(self, making: &mut dyn Making) -> Result<Opened, Refusal> {
        settle_origins(&self.volumes)?;
        let mut notes = self.notes;
        let mut planned = Vec::new();
        let mut volumes = Vec::new();
        for volume in self.volumes {
            let PlannedVolume {
                name,
                disk,
                access,
                snapshots,
            } = volume;
            volumes.push((name, disk, access, snapshots.len()));
            planned.extend(snapshots);
        }
        let (made, undo) = make_snapshots(planned, &mut notes, making)?;
        let mut made = made.into_iter();
        let volumes: Vec<OpenVolume> = volumes
            .into_iter()
            .map(|(name, disk, access, count)| OpenVolume {
                name,
                disk,
                access,
                snapshots: made.by_ref().take(count).collect(),
            })
            .collect();
        undo.keep();
        Ok(Opened { volumes, notes })
    }
}

impl Opened {
    /// Files that did not exist do now.
    pub fn note(&self, taken: &mut Taken) {
        for volume in &self.volumes {
            note_made(taken, &volume.name, &volume.snapshots);
        }
    }
}

/// Make the stores of snapshots that were planned: all of them or none.
pub(super) fn make_snapshots(
    planned: Vec<PlannedSnapshot>,
    notes: &mut Vec<Note>,
    making: &mut dyn Making,
) -> Result<(Vec<OpenSnapshot>, Undo), Refusal> {
    let mut undo = Undo::default();
    let mut prepared = Vec::new();
    let mut files = Vec::new();
    for snapshot in planned {
        let one = prepare(snapshot, &mut undo, making)?;
        files.extend(one.first_name.is_some().then(|| one.disk.path.clone()));
        prepared.push(one);
    }
    if let Some(first) = files.first() {
        making
            .made(&files)
            .map_err(|error| Refusal::io(first, "recording it", &error))?;
    }
    let prepared = undo.each(prepared, make_room)?;
    let mut synced = BTreeSet::new();
    for path in &files {
        if synced.insert(path.parent()) {
            sync_folder_of(path)
                .map_err(|error| Refusal::io(path, "making its name durable", &error))?;
        }
    }
    let finished = undo.each(prepared, finish)?;
    let mut made = Vec::new();
    for (snapshot, told) in finished {
        made.push(snapshot);
        notes.extend(told);
    }
    Ok((made, undo))
}

/// Files that did not exist when they were looked at do now.
pub(super) fn note_made(taken: &mut Taken, volume: &str, snapshots: &[OpenSnapshot]) {
    for snapshot in snapshots {
        if let Ok(meta) = snapshot.disk.file.metadata() {
            let role = Role::Cow(names::export(volume, &snapshot.name));
            taken.identify(&role, Identity::of(&meta));
        }
    }
}

/// Make what the origin shows durable, whoever wrote it: its snapshots show it too,
/// and a power cut must not change them (durability.md, rule 4). First of all, since
/// it may take long, and a process killed meanwhile has made nothing yet.
fn settle_origins(volumes: &[PlannedVolume]) -> Result<(), Refusal> {
    let mut settled: BTreeSet<&Path> = BTreeSet::new();
    for PlannedVolume {
        disk,
        access,
        snapshots,
        ..
    } in volumes
    {
        // A shared one once, though many volumes have it.
        if access.writes_stores() && !snapshots.is_empty() && settled.insert(&disk.path) {
            disk.file
                .sync_data()
                .map_err(|error| Refusal::io(&disk.path, "flushing it", &error))?;
        }
    }
    Ok(())
}

/// Make the file of a store, where there is none.
fn prepare(
    snapshot: PlannedSnapshot,
    undo: &mut Undo,
    making: &mut dyn Making,
) -> Result<Prepared, Refusal> {
    let PlannedSnapshot {
        name,
        read_only,
        kind,
        limit,
        adopted: _,
        past,
        behaviour,
        cow,
    } = snapshot;
    let mut first_name = None;
    let (disk, work) = match cow {
        PlannedCow::Whole { disk, store } => (disk, Work::Nothing(store)),
        PlannedCow::Torn {
            disk,
            size,
            origin_bytes,
        } => (disk, Work::Repair { size, origin_bytes }),
        PlannedCow::New(NewStore { place, spec }) => match place {
            Place::Missing(path) => {
                let (disk, name) = create(path, undo, making)?;
                first_name = Some(name);
                (disk, Work::Create { spec, zeros: 0 })
            }
            Place::Empty(disk) => {
                let zeros = written(&spec).min(disk.bytes);
                (disk, Work::Create { spec, zeros })
            }
            // What it held was given up; only its length can come back.
            Place::Overwrite(disk) => {
                if spec.kind == StoreKind::Transient {
                    forget_store(&disk)?;
                }
                (disk, Work::Create { spec, zeros: 0 })
            }
        },
    };
    Ok(Prepared {
        name,
        read_only,
        kind,
        limit,
        past,
        behaviour,
        disk,
        first_name,
        work,
        scratch: None,
    })
}

/// Give a new file its own name, and make room for the store in it.
fn make_room(mut prepared: Prepared, undo: &mut Undo) -> Result<Prepared, Refusal> {
    let disk = &mut prepared.disk;
    let is_ours = prepared.first_name.is_some();
    if let Some(first_name) = prepared.first_name.take_if(|name| *name != disk.path) {
        let flags = rustix::fs::RenameFlags::NOREPLACE;
        rustix::fs::renameat_with(CWD, &first_name, CWD, &disk.path, flags)
            .map_err(|errno| Refusal::io(&disk.path, "creating it", &errno.into()))?;
        undo.steps.push(Step::Remove(disk.path.clone()));
    }
    let Work::Create { spec, .. } = &prepared.work else {
        return Ok(prepared);
    };
    if spec.kind == StoreKind::Transient && disk.bytes == 0 {
        prepared.scratch = Some(Scratch {
            path: disk.path.clone(),
            file: duplicate(disk)?,
        });
    }
    if disk.bytes < spec.size.ready {
        if !is_ours {
            undo.steps.push(Step::Shorten {
                file: duplicate(disk)?,
                to: disk.bytes,
            });
        }
        let action = Action::Grow {
            to: spec.size.ready,
        };
        perform(&disk.file, Medium::Store, &action)
            .map_err(|error| Refusal::disk(&disk.path, "reserving its first chunks", error))?;
        disk.bytes = spec.size.ready;
    }
    Ok(prepared)
}

/// A persistent store that was given up for a transient one is none from now on:
/// nothing else would overwrite its header soon, and it would open as if it were good.
fn forget_store(disk: &OpenDisk) -> Result<(), Refusal> {
    let zeros = Action::WriteZeroes {
        offset: 0,
        len: SECTOR_BYTES.min(disk.bytes),
        may_punch: false,
    };
    for action in [zeros, Action::Flush] {
        perform(&disk.file, Medium::Store, &action)
            .map_err(|error| Refusal::disk(&disk.path, "giving up the store in it", error))?;
    }
    Ok(())
}

/// Make the file of a store, and say under which name. It is empty until whoever
/// records it has recorded it.
fn create(
    path: PathBuf,
    undo: &mut Undo,
    making: &mut dyn Making,
) -> Result<(OpenDisk, PathBuf), Refusal> {
    let first_name = making.first_name(&path).unwrap_or_else(|| path.clone());
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        // It holds blocks of the disk: nobody else's business.
        .mode(0o600)
        .open(&first_name)
        .map_err(|error| Refusal::io(&path, "creating it", &error))?;
    undo.steps.push(Step::Remove(first_name.clone()));
    lock(&file, &path, true)?;
    let disk = OpenDisk {
        file,
        path,
        bytes: 0,
        is_block_device: false,
        logical_block: SECTOR_BYTES as u32,
    };
    Ok((disk, first_name))
}

fn duplicate(disk: &OpenDisk) -> Result<File, Refusal> {
    disk.file
        .try_clone()
        .map_err(|error| Refusal::io(&disk.path, "opening it once more", &error))
}

/// Repair or write what has to be, and hand the store over.
fn finish(prepared: Prepared, undo: &mut Undo) -> Result<(OpenSnapshot, Vec<Note>), Refusal> {
    let Prepared {
        name,
        read_only,
        kind,
        limit,
        past,
        behaviour,
        disk,
        first_name: _,
        work,
        scratch,
    } = prepared;
    let mut notes = Vec::new();
    let (store, fresh) = match work {
        Work::Nothing(store) => (store, false),
        Work::Repair { size, origin_bytes } => {
            (repair(&disk, kind, size, origin_bytes, &mut notes)?, false)
        }
        Work::Create { spec, zeros } => {
            if zeros > 0 {
                let file = duplicate(&disk)?;
                undo.steps.push(Step::Zero { file, len: zeros });
            }
            (write_store(&disk, spec, &mut notes)?, true)
        }
    };
    let snapshot = OpenSnapshot {
        name,
        disk,
        store,
        fresh,
        read_only,
        limit,
        past,
        behaviour,
        scratch,
    };
    Ok((snapshot, notes))
}

fn write_store(disk: &OpenDisk, spec: StoreSpec, notes: &mut Vec<Note>) -> Result<Store, Refusal> {
    let mut io = StoreDisk::new(disk, Access::ReadWrite);
    let store = law::create_store(spec, &mut io)
        .map_err(|error| Refusal::disk(&disk.path, "writing the store", error))?;
    notes.push(Note::Info(format!(
        "{}: new store with chunks of {}",
        shown(&disk.path),
        size::show(spec.chunk_size.bytes())
    )));
    Ok(store)
}

fn repair(
    disk: &OpenDisk,
    kind: StoreKind,
    size: StoreSize,
    origin_bytes: u64,
    notes: &mut Vec<Note>,
) -> Result<Store, Refusal> {
    let mut io = StoreDisk::new(disk, Access::ReadWrite);
    let opened = law::open_store(kind, size, origin_bytes, Access::ReadWrite, &mut io);
    if let Some((path, error)) = &io.copy_failed {
        return Err(Refusal::io(path, "keeping a copy of a torn area", error));
    }
    let store = opened.map_err(|error| refused(&disk.path, error))?;
    for copy in &io.kept {
        notes.push(Note::Warning(format!(
            "{}: a power cut had torn its last area; it was repaired, and nothing that was flushed is lost; a copy of the area is kept in {}",
            shown(&disk.path),
            shown(copy)
        )));
    }
    Ok(store)
}

/// Bytes at the beginning of a store that making it writes: header and area 0.
fn written(spec: &StoreSpec) -> u64 {
    match spec.kind {
        StoreKind::Transient => 0,
        StoreKind::Persistent | StoreKind::PersistentOverflow => 2 * spec.chunk_size.bytes(),
    }
}

/// What was made so far. Dropped with steps left in it, it takes them back.
#[derive(Debug, Default)]
pub(super) struct Undo {
    steps: Vec<Step>,
}

impl Undo {
    /// Do `step` to each of `items`, many at once; if one fails, all that was made
    /// by any is still to be taken back.
    fn each<T: Send, U: Send>(
        &mut self,
        items: Vec<T>,
        step: impl Fn(T, &mut Undo) -> Result<U, Refusal> + Sync,
    ) -> Result<Vec<U>, Refusal> {
        let done = together::each(items, |item| {
            let mut own = Undo::default();
            let result = step(item, &mut own);
            (std::mem::take(&mut own.steps), result)
        });
        let mut results = Vec::new();
        for (steps, result) in done {
            self.steps.extend(steps);
            results.push(result);
        }
        results.into_iter().collect()
    }

    /// What was made stays.
    pub(super) fn keep(mut self) {
        self.steps.clear();
    }
}

#[derive(Debug)]
enum Step {
    /// A file of ours.
    Remove(PathBuf),
    /// A file that was there has grown.
    Shorten { file: File, to: u64 },
    /// A store was written where zeros were.
    Zero { file: File, len: u64 },
}

impl Step {
    fn take_back(self) -> std::io::Result<()> {
        match self {
            Self::Remove(path) => match std::fs::remove_file(&path) {
                // It has got another name.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
                removed => removed.and_then(|()| sync_folder_of(&path)),
            },
            Self::Shorten { file, to } => file.set_len(to).and_then(|()| file.sync_all()),
            Self::Zero { file, len } => {
                let action = Action::WriteZeroes {
                    offset: 0,
                    len,
                    may_punch: false,
                };
                perform(&file, Medium::Store, &action)
                    .and_then(|_| perform(&file, Medium::Store, &Action::Flush))
                    .map(|_| ())
                    .map_err(std::io::Error::other)
            }
        }
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        while let Some(step) = self.steps.pop() {
            // The failure that led here is the one to tell of.
            if let Err(error) = step.take_back() {
                tracing::debug!(%error, "a file that was made could not be taken back");
            }
        }
    }
}
