//! What becomes of the path of a COW store: a store is opened, an empty place
//! gets a new one, anything else is refused. Nothing is changed here; what has
//! to be written is planned, for [`super::make`].

use nbdsnap_engine::{Access, OpenError, Store, StoreKind, StoreSize, StoreSpec};
use nbdsnap_format::header::{Found as Header, HEADER_BYTES, Header as Decode};
use nbdsnap_format::{ChunkSize, Layout, SECTOR_BYTES};

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::open::Found;
use super::signature::{self, Contents};
use super::store_io::StoreDisk;
use super::{Cause, Note, Refusal, SnapshotRequest, shown};
use crate::cli::size;
use crate::io::VolumeAccess;
use crate::law;
use crate::server::setup::OpenDisk;

/// A header, an area and one chunk of data.
const LEAST_CHUNKS: u64 = 3;

/// A store that grows does so by this much, or by [`LEAST_CHUNKS`] chunks if that
/// is more: large enough that growth (two flushes of the file system) is rare,
/// small enough that the zeros are written in a moment.
const GROWTH_STEP: u64 = 16 << 20;

/// A store of a shared origin begins with so much, or with one chunk more than
/// [`LEAST_CHUNKS`], and grows by so much, or by what it has when it is opened: there
/// may be a thousand of them, and most stay small.
const FIRST_OF_MANY: u64 = 256 << 10;

/// The origin, as a store's plan needs it.
#[derive(Clone, Debug)]
pub struct Origin {
    /// Where it is, for messages.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// The smallest unit of I/O that it takes.
    pub logical_block: u32,
    /// What may change, on it and on its stores.
    pub access: VolumeAccess,
}

impl Origin {
    /// What plans need to know of `disk`.
    pub fn of(disk: &OpenDisk, access: VolumeAccess) -> Self {
        Self {
            path: disk.path.clone(),
            bytes: disk.bytes,
            logical_block: disk.logical_block,
            access,
        }
    }

    /// Not a byte of its stores may change.
    fn freezes_stores(&self) -> bool {
        !self.access.writes_stores()
    }
}

/// A COW store, and what is still to be done to it.
#[derive(Debug)]
pub(super) enum PlannedCow {
    /// Read and whole: nothing to do.
    Whole { disk: OpenDisk, store: Store },
    /// An area was torn by a power cut: it is to be made whole, by opening it
    /// once more with leave to write.
    Torn {
        disk: OpenDisk,
        size: StoreSize,
        origin_bytes: u64,
    },
    /// A store is to be made.
    New(NewStore),
}

/// A store that is to be made.
#[derive(Debug)]
pub(super) struct NewStore {
    pub(super) place: Place,
    /// Its size has `ready` as it shall be once the file has grown.
    pub(super) spec: StoreSpec,
}

/// Where.
#[derive(Debug)]
pub(super) enum Place {
    /// A file that does not exist.
    Missing(PathBuf),
    /// A file or device that holds nothing but zeros, as far as rule 15 looks.
    Empty(OpenDisk),
    /// A file or device whose contents the operator gave up: `,format`.
    Overwrite(OpenDisk),
}

/// Decide what becomes of a COW path.
pub(super) fn plan(
    wanted: &SnapshotRequest,
    origin: &Origin,
    found: Found,
    notes: &mut Vec<Note>,
) -> Result<PlannedCow, Refusal> {
    let chunk = chosen_chunk(wanted)?;
    if origin.freezes_stores() && wanted.kind == StoreKind::Transient {
        return Err(Refusal::new(&wanted.cow, Cause::ReadOnlyTransient));
    }
    let disk = match found {
        Found::Missing(path) if wanted.must_exist => {
            return Err(Refusal::new(&path, Cause::StoreGone));
        }
        Found::Missing(path) => {
            return plan_new(wanted, origin, chunk, Place::Missing(path), notes);
        }
        Found::Disk(disk) => disk,
    };
    let contents = signature::contents(&disk)
        .map_err(|error| Refusal::io(&disk.path, "reading it", &error))?;
    match contents {
        Contents::Empty | Contents::Other(_) if wanted.must_exist => {
            Err(Refusal::new(&disk.path, Cause::StoreGone))
        }
        Contents::Empty => plan_new(wanted, origin, chunk, Place::Empty(disk), notes),
        Contents::Store => plan_store(wanted, origin, chunk, disk, notes),
        Contents::Other(what) if wanted.format && !origin.freezes_stores() => {
            notes.push(Note::Warning(format!(
                "{}: overwritten, as ',format' asks; it held {what}",
                shown(&disk.path)
            )));
            plan_new(wanted, origin, chunk, Place::Overwrite(disk), notes)
        }
        Contents::Other(what) => Err(Refusal::new(&disk.path, Cause::Foreign(what))),
    }
}

/// The chunk size that was asked for; wrong even where a store's header beats it.
fn chosen_chunk(wanted: &SnapshotRequest) -> Result<Option<ChunkSize>, Refusal> {
    wanted
        .chunk
        .map(ChunkSize::from_bytes)
        .transpose()
        .map_err(|error| Refusal::new(&wanted.cow, Cause::Chunk(error)))
}

/// Both disks, the origin and, where it is open, the store's own, must be able to
/// do I/O of a chunk.
fn check_chunk(
    path: &Path,
    chunk: ChunkSize,
    origin: &Origin,
    store: Option<&OpenDisk>,
) -> Result<(), Refusal> {
    let store = store.map(|disk| (&disk.path, disk.logical_block));
    for (disk, block) in [(&origin.path, origin.logical_block)]
        .into_iter()
        .chain(store)
    {
        if chunk.bytes() < block.into() {
            let disk = shown(disk);
            let cause = Cause::ChunkBelowBlock {
                chunk: chunk.bytes(),
                disk,
                block,
            };
            return Err(Refusal::new(path, cause));
        }
    }
    Ok(())
}

/// What begins with a store's magic number.
fn plan_store(
    wanted: &SnapshotRequest,
    origin: &Origin,
    chunk: Option<ChunkSize>,
    disk: OpenDisk,
    notes: &mut Vec<Note>,
) -> Result<PlannedCow, Refusal> {
    let overwrite = wanted.format && !origin.freezes_stores();
    let in_header = match header_chunk(&disk) {
        Ok(chunk) => chunk,
        Err(cause @ Cause::Header(_)) if overwrite => {
            notes.push(Note::Warning(format!("{}: {cause}", shown(&disk.path))));
            return plan_new(wanted, origin, chunk, Place::Overwrite(disk), notes);
        }
        Err(cause) => return Err(Refusal::new(&disk.path, cause)),
    };
    if wanted.kind == StoreKind::Transient {
        if overwrite {
            let held = format!(
                "{}: a persistent store was overwritten, as ',format' asks",
                shown(&disk.path)
            );
            notes.push(Note::Warning(held));
            return plan_new(wanted, origin, chunk, Place::Overwrite(disk), notes);
        }
        return Err(Refusal::new(&disk.path, Cause::Persistent));
    }
    check_chunk(&disk.path, in_header, origin, Some(&disk))?;
    open_store(wanted, origin, chunk, in_header, disk, notes)
}

/// The chunk size that a store's header names.
fn header_chunk(disk: &OpenDisk) -> Result<ChunkSize, Cause> {
    let mut sector = [0; HEADER_BYTES];
    let there = disk.bytes.min(HEADER_BYTES as u64) as usize;
    disk.file
        .read_exact_at(&mut sector[..there], 0)
        .map_err(|error| Cause::System {
            doing: "reading its header",
            error,
        })?;
    match Decode::decode(&sector[..there]) {
        Ok(Header::Store(header)) => Ok(header.chunk_size),
        Ok(Header::New) => Err(Cause::Store(OpenError::New)),
        Err(error) => Err(Cause::Header(error.to_string())),
    }
}

fn open_store(
    wanted: &SnapshotRequest,
    origin: &Origin,
    chunk: Option<ChunkSize>,
    in_header: ChunkSize,
    disk: OpenDisk,
    notes: &mut Vec<Note>,
) -> Result<PlannedCow, Refusal> {
    let path = shown(&disk.path);
    if wanted.size.is_some() && disk.is_block_device {
        return Err(Refusal::new(&disk.path, Cause::SizeOfDevice));
    }
    if !origin.freezes_stores() {
        read_from_the_disk(&disk)
            .map_err(|error| Refusal::io(&disk.path, "flushing it", &error))?;
    }
    let size = if disk.is_block_device || origin.freezes_stores() {
        fixed(disk.bytes)
    } else {
        let room = Room {
            wanted,
            origin_bytes: origin.bytes,
            chunk: in_header,
            present: disk.bytes,
        };
        StoreSize {
            ready: disk.bytes,
            limit: room.limit(notes)?,
            step: step(origin, in_header, disk.bytes),
        }
    };
    let origin_bytes = wanted.length(origin);
    let store = law::open_store(
        wanted.kind,
        size,
        origin_bytes,
        Access::ReadOnly,
        &mut StoreDisk::new(&disk, Access::ReadOnly),
    )
    .map_err(|error| refused(&disk.path, error))?;
    if chunk.is_some_and(|chunk| chunk != in_header) {
        let kept = size::show(in_header.bytes());
        notes.push(Note::Warning(format!(
            "{path}: the store's own chunk size, {kept}, is used instead of chunk="
        )));
    }
    if wanted.format {
        notes.push(Note::Warning(format!(
            "{path}: holds a store, which is opened as it is: ',format' overwrites only what is not a store; to begin anew, delete the file or zero its beginning"
        )));
    }
    if store.is_invalid() {
        notes.push(Note::Warning(format!(
            "{path}: this snapshot is invalid: it was lost in an earlier run, and reading it fails; take it anew ('nbdsnap snapshot reset'), or end it ('snapshot remove', or --without {path} at a start)"
        )));
    }
    match store.torn_area() {
        Some(area) if origin.freezes_stores() => {
            notes.push(Note::Warning(format!(
                "{path}: area {area} was torn by a power cut; it is served as it would be repaired, and left as it is (--read-only)"
            )));
            Ok(PlannedCow::Whole { disk, store })
        }
        Some(_) => Ok(PlannedCow::Torn {
            disk,
            size,
            origin_bytes,
        }),
        None => Ok(PlannedCow::Whole { disk, store }),
    }
}

/// After a failed fsync the cached pages of a file differ from what the disk
/// holds: push out what is dirty, then drop the cache, so that what is read is
/// what a power cut would leave (durability.md, rule 5).
fn read_from_the_disk(disk: &OpenDisk) -> std::io::Result<()> {
    disk.file.sync_data()?;
    rustix::fs::fadvise(&disk.file, 0, None, rustix::fs::Advice::DontNeed)?;
    Ok(())
}

/// A store that the engine does not open, in the operator's words.
pub(super) fn refused(path: &Path, error: OpenError) -> Refusal {
    match error {
        OpenError::Disk(error) => Refusal::disk(path, "reading the store", error),
        other => Refusal::new(path, Cause::Store(other)),
    }
}

fn plan_new(
    wanted: &SnapshotRequest,
    origin: &Origin,
    chunk: Option<ChunkSize>,
    place: Place,
    notes: &mut Vec<Note>,
) -> Result<PlannedCow, Refusal> {
    if origin.freezes_stores() {
        return Err(Refusal::new(&wanted.cow, Cause::ReadOnlyMakes));
    }
    let chunk = chunk.unwrap_or(ChunkSize::DEFAULT);
    let (present, is_block_device) = match &place {
        Place::Missing(_) => {
            check_chunk(&wanted.cow, chunk, origin, None)?;
            (0, false)
        }
        Place::Empty(disk) | Place::Overwrite(disk) => {
            check_chunk(&wanted.cow, chunk, origin, Some(disk))?;
            (disk.bytes, disk.is_block_device)
        }
    };
    let room = Room {
        wanted,
        origin_bytes: origin.bytes,
        chunk,
        present,
    };
    let first = match origin.access {
        VolumeAccess::Shared => FIRST_OF_MANY.max((LEAST_CHUNKS + 1) * chunk.bytes()),
        VolumeAccess::ReadWrite | VolumeAccess::ReadOnly => step(origin, chunk, present),
    };
    let size = if is_block_device {
        if wanted.size.is_some() {
            return Err(Refusal::new(&wanted.cow, Cause::SizeOfDevice));
        }
        room.check(present)?;
        fixed(present)
    } else {
        let limit = room.limit(notes)?;
        StoreSize {
            ready: room.first(limit, first),
            limit,
            step: step(origin, chunk, present),
        }
    };
    let spec = StoreSpec {
        kind: wanted.kind,
        chunk_size: chunk,
        size,
    };
    Ok(PlannedCow::New(NewStore { place, spec }))
}

/// A store that does not grow.
fn fixed(bytes: u64) -> StoreSize {
    StoreSize {
        ready: bytes,
        limit: bytes,
        step: 0,
    }
}

fn step(origin: &Origin, chunk: ChunkSize, present: u64) -> u64 {
    let step = match origin.access {
        VolumeAccess::Shared => present.clamp(FIRST_OF_MANY, GROWTH_STEP),
        VolumeAccess::ReadWrite | VolumeAccess::ReadOnly => GROWTH_STEP,
    };
    step.max(LEAST_CHUNKS * chunk.bytes())
}

/// Bytes of a store in which every chunk of its origin has an exception.
pub fn all_it_needs(kind: StoreKind, chunk: ChunkSize, origin_bytes: u64) -> u64 {
    let chunks = chunk.chunks_to_cover(origin_bytes);
    match kind {
        StoreKind::Transient => chunks * chunk.bytes(),
        StoreKind::Persistent | StoreKind::PersistentOverflow => {
            Layout::new(chunk).sectors_for(chunks) * SECTOR_BYTES
        }
    }
}

/// How large the file of a store is, shall be and may become.
struct Room<'a> {
    wanted: &'a SnapshotRequest,
    origin_bytes: u64,
    chunk: ChunkSize,
    /// What the file has now.
    present: u64,
}

impl Room<'_> {
    /// What the store needs when every chunk of the origin has an exception.
    fn need(&self) -> u64 {
        all_it_needs(self.wanted.kind, self.chunk, self.origin_bytes)
    }

    /// How far the file may grow: what the origin can need, or `size=` if that
    /// is less, and in any case what it has already.
    fn limit(&self, notes: &mut Vec<Note>) -> Result<u64, Refusal> {
        let need = self.need();
        let Some(size) = self.wanted.size else {
            return Ok(need.max(self.present));
        };
        let size = self.chunk.whole_chunks(size) * self.chunk.bytes();
        self.check(size.max(self.present))?;
        let path = shown(&self.wanted.cow);
        if size > need {
            notes.push(Note::Warning(format!(
                "{path}: size= is cut to {}, all that this origin can ever need",
                size::show(need)
            )));
        }
        let limit = size.min(need);
        if limit < self.present {
            notes.push(Note::Warning(format!(
                "{path}: has {} already, more than size= allows: it does not shrink, and does not grow",
                size::show(self.present)
            )));
        }
        Ok(limit.max(self.present))
    }

    fn check(&self, bytes: u64) -> Result<(), Refusal> {
        let found = self.chunk.whole_chunks(bytes);
        let needed = match self.wanted.kind {
            StoreKind::Transient => 1,
            StoreKind::Persistent | StoreKind::PersistentOverflow => LEAST_CHUNKS,
        };
        if found < needed {
            let cause = Cause::TooSmall {
                found,
                needed,
                chunk: self.chunk.bytes(),
            };
            return Err(Refusal::new(&self.wanted.cow, cause));
        }
        Ok(())
    }

    /// The size a new store's file is made with. One that was there before, with
    /// room for a store, keeps its size.
    fn first(&self, limit: u64, wanted: u64) -> u64 {
        if self.chunk.whole_chunks(self.present) >= LEAST_CHUNKS {
            self.present
        } else {
            let wanted = wanted.next_multiple_of(self.chunk.bytes());
            limit.min(wanted.max(self.present))
        }
    }
}
