//! Carrying a plan out: files are made and grown, torn areas repaired, stores
//! written. If one thing fails, what was made before is taken back.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use nbdsnap_engine::{Access, Action, Store, StoreKind, StoreSize, StoreSpec};
use nbdsnap_format::SECTOR_BYTES;

use super::cow::{NewStore, Place, PlannedCow, refused};
use super::open::lock;
use super::store_io::{StoreDisk, sync_folder_of};
use super::{Note, Opened, Plan, PlannedVolume, Refusal, Scratch, shown};
use crate::cli::size;
use crate::io::file::{Medium, perform};
use crate::law;
use crate::server::setup::{OpenDisk, OpenSnapshot, OpenVolume};

/// A store in the making: its room is there, its header is not.
struct Prepared {
    disk: OpenDisk,
    work: Work,
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
    /// no store behind.
    pub fn carry_out(self) -> Result<Opened, Refusal> {
        for volume in &self.volumes {
            settle_origin(volume)?;
        }
        let mut undo = Undo::default();
        let mut notes = self.notes;
        let mut scratch = Vec::new();
        let mut prepared = Vec::new();
        for volume in self.volumes {
            let PlannedVolume {
                name,
                disk,
                read_only,
                snapshots,
            } = volume;
            let mut cows = Vec::new();
            for snapshot in snapshots {
                let cow = prepare(snapshot.cow, &mut undo, &mut scratch)?;
                cows.push((snapshot.name, snapshot.read_only, snapshot.kind, cow));
            }
            prepared.push((name, disk, read_only, cows));
        }
        let mut volumes = Vec::new();
        for (name, disk, read_only, cows) in prepared {
            let mut snapshots = Vec::new();
            for (name, read_only, kind, cow) in cows {
                snapshots.push(finish(name, read_only, kind, cow, &mut undo, &mut notes)?);
            }
            volumes.push(OpenVolume {
                name,
                disk,
                read_only,
                snapshots,
            });
        }
        undo.steps.clear();
        Ok(Opened {
            volumes,
            notes,
            scratch,
        })
    }
}

/// Make what the origin shows durable, whoever wrote it: its snapshots show it too,
/// and a power cut must not change them (durability.md, rule 4). First of all, since
/// it may take long, and a process killed meanwhile has made nothing yet.
fn settle_origin(volume: &PlannedVolume) -> Result<(), Refusal> {
    if volume.read_only || volume.snapshots.is_empty() {
        return Ok(());
    }
    volume
        .disk
        .file
        .sync_data()
        .map_err(|error| Refusal::io(&volume.disk.path, "flushing it", &error))
}

/// Make room for a store.
fn prepare(
    cow: PlannedCow,
    undo: &mut Undo,
    scratch: &mut Vec<Scratch>,
) -> Result<Prepared, Refusal> {
    match cow {
        PlannedCow::Whole { disk, store } => Ok(Prepared {
            disk,
            work: Work::Nothing(store),
        }),
        PlannedCow::Torn {
            disk,
            size,
            origin_bytes,
        } => Ok(Prepared {
            disk,
            work: Work::Repair { size, origin_bytes },
        }),
        PlannedCow::New(new) => prepare_new(new, undo, scratch),
    }
}

fn prepare_new(
    new: NewStore,
    undo: &mut Undo,
    scratch: &mut Vec<Scratch>,
) -> Result<Prepared, Refusal> {
    let NewStore { place, spec } = new;
    let (mut disk, zeros) = match place {
        Place::Missing(path) => (create(path, undo)?, 0),
        Place::Empty(disk) => {
            let zeros = written(&spec).min(disk.bytes);
            (disk, zeros)
        }
        // What it held was given up; only its length can come back.
        Place::Overwrite(disk) => {
            if spec.kind == StoreKind::Transient {
                forget_store(&disk)?;
            }
            (disk, 0)
        }
    };
    if spec.kind == StoreKind::Transient && disk.bytes == 0 {
        scratch.push(Scratch {
            path: disk.path.clone(),
            file: duplicate(&disk)?,
        });
    }
    if disk.bytes < spec.size.ready {
        undo.steps.push(Step::Shorten {
            file: duplicate(&disk)?,
            to: disk.bytes,
        });
        let action = Action::Grow {
            to: spec.size.ready,
        };
        perform(&disk.file, Medium::Store, &action)
            .map_err(|error| Refusal::disk(&disk.path, "reserving its first chunks", error))?;
        disk.bytes = spec.size.ready;
    }
    Ok(Prepared {
        disk,
        work: Work::Create { spec, zeros },
    })
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

fn create(path: PathBuf, undo: &mut Undo) -> Result<OpenDisk, Refusal> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        // It holds blocks of the disk: nobody else's business.
        .mode(0o600)
        .open(&path)
        .map_err(|error| Refusal::io(&path, "creating it", &error))?;
    lock(&file, &path, true)?;
    undo.steps.push(Step::Remove(path.clone()));
    sync_folder_of(&path).map_err(|error| Refusal::io(&path, "making its name durable", &error))?;
    Ok(OpenDisk {
        file,
        path,
        bytes: 0,
        is_block_device: false,
        logical_block: SECTOR_BYTES as u32,
    })
}

fn duplicate(disk: &OpenDisk) -> Result<File, Refusal> {
    disk.file
        .try_clone()
        .map_err(|error| Refusal::io(&disk.path, "opening it once more", &error))
}

/// Repair or write what has to be, and hand the store over.
fn finish(
    name: String,
    read_only: bool,
    kind: StoreKind,
    cow: Prepared,
    undo: &mut Undo,
    notes: &mut Vec<Note>,
) -> Result<OpenSnapshot, Refusal> {
    let Prepared { disk, work } = cow;
    let (store, fresh) = match work {
        Work::Nothing(store) => (store, false),
        Work::Repair { size, origin_bytes } => {
            (repair(&disk, kind, size, origin_bytes, notes)?, false)
        }
        Work::Create { spec, zeros } => {
            if zeros > 0 {
                let file = duplicate(&disk)?;
                undo.steps.push(Step::Zero { file, len: zeros });
            }
            (write_store(&disk, spec, notes)?, true)
        }
    };
    Ok(OpenSnapshot {
        name,
        disk,
        store,
        fresh,
        read_only,
    })
}

fn write_store(disk: &OpenDisk, spec: StoreSpec, notes: &mut Vec<Note>) -> Result<Store, Refusal> {
    let mut io = StoreDisk::new(disk, Access::ReadWrite);
    let store = law::create_store(spec, &mut io)
        .map_err(|error| Refusal::disk(&disk.path, "writing the store", error))?;
    disk.file
        .sync_all()
        .map_err(|error| Refusal::io(&disk.path, "flushing it", &error))?;
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
#[derive(Default)]
struct Undo {
    steps: Vec<Step>,
}

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
            Self::Remove(path) => std::fs::remove_file(&path).and_then(|()| sync_folder_of(&path)),
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
