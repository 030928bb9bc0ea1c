//! `cow repair`: what can be saved of a damaged store, as a sound one.
//!
//! - Exceptions that point where none can are left out.
//! - Of two that contradict each other the earlier is kept. Entries that a power cut
//!   brought back to life lie behind those that took their place, so that the later
//!   one is the more doubtful.
//! - What lies behind the end of the list is scrubbed, as the kernel would not read it
//!   either. Where it is what a torn write of an area leaves, it can be brought back
//!   instead (`beyond_holes`): its data was durable before the area was written. That is
//!   wrong after a merge, which opens such holes too, and so has to be asked for.
//! - Where the list has no room to end, a new store gets it.
//!
//! What was left out shows the origin's bytes from then on: each such range is
//! reported, so that nobody takes the snapshot for whole.

use std::path::{Path, PathBuf};

use nbdsnap_format::header::HEADER_BYTES;
use nbdsnap_format::runs::clipped;
use nbdsnap_format::{
    ChunkSize, CowChunk, Exception, Finding, Findings, Found, Header, ListEnd, Misplaced,
    OriginChunk, Tail,
};
use serde::Serialize;

use super::open::{disk_bytes, open_disk, read_at};
use super::ranges::RangeReport;
use super::target::Target;
use super::{CowError, CowStore, Reading, dump};
use crate::disks::{Opening, existing, sync_folder_of};
use crate::server::setup::OpenDisk;

/// Copied at a time.
const PIECE: u64 = 1 << 20;

/// So many losses are listed.
const MOST_LISTED: usize = Findings::LIMIT;

/// What a repair did, as `cow repair --json` prints it.
#[derive(Clone, Debug, Serialize)]
pub struct RepairReport {
    /// The sound store.
    pub output: String,
    /// Exceptions that it has.
    pub kept: u64,
    /// Exceptions that were left out.
    pub lost_exceptions: u64,
    /// What they stood for, the first thousand: the snapshot shows the origin there.
    pub lost: Vec<Loss>,
    /// Entries behind the end of the list that were scrubbed. They may have been
    /// exceptions if the hole before them is damage: then those are lost too.
    pub scrubbed: u64,
    /// Exceptions from behind a hole that were brought back (`--beyond-holes`).
    pub regained_exceptions: u64,
    /// What they stand for, the first thousand.
    pub regained: Vec<RangeReport>,
    /// Whether more may be lost than is listed: entries were scrubbed that no torn
    /// write leaves, or some were brought back, and nobody knows what was in the hole.
    pub doubtful: bool,
    /// Whether the header had to be made anew.
    pub header_made: bool,
    /// Where the metadata as they were are kept, if the store was repaired in place:
    /// a dump for `cow restore --damaged --in-place`.
    pub kept_dump: Option<String>,
}

/// An exception that was left out.
#[derive(Clone, Debug, Serialize)]
pub struct Loss {
    /// Where the snapshot is not what it was.
    #[serde(flatten)]
    pub range: RangeReport,
    /// Why: `outside-store`, `on-metadata`, `outside-origin`, `same-origin-chunk` or
    /// `same-store-chunk`.
    pub why: &'static str,
}

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// The store.
    pub cow: &'a Path,
    /// Its origin, to find what lies outside it.
    pub origin: Option<&'a Path>,
    /// The new store; none: the store itself is mended.
    pub output: Option<&'a Path>,
    /// Whatever a block device at `output` holds.
    pub force: bool,
    /// The chunk size, where the header does not say it.
    pub chunk_size: Option<ChunkSize>,
    /// Bring back what lies behind a hole, where a torn write explains it.
    pub beyond_holes: bool,
}

/// Repair it.
pub fn run(wanted: Wanted<'_>, progress: &mut dyn FnMut(u64)) -> Result<RepairReport, CowError> {
    let disk = match wanted.output {
        Some(_) => open_disk(wanted.cow, Reading::Alone)?,
        None => existing(wanted.cow, Opening::Write)?,
    };
    let (header, header_made) = header(&disk, wanted.chunk_size)?;
    let store = CowStore { disk, header };
    if !header.valid {
        return Err(CowError::Invalid(wanted.cow.to_owned()));
    }
    let origin_bytes = wanted.origin.map(disk_bytes).transpose()?;
    let saved = save(&store, origin_bytes, wanted.beyond_holes)?;
    let needed = bytes_needed(&store, saved.kept.len() as u64);
    let mut report = RepairReport {
        output: crate::disks::shown(wanted.output.unwrap_or(wanted.cow)),
        kept: saved.kept.len() as u64,
        lost_exceptions: saved.lost_exceptions,
        lost: saved.lost,
        scrubbed: saved.scrubbed,
        regained_exceptions: saved.regained_exceptions,
        regained: saved.regained,
        doubtful: saved.doubtful,
        header_made,
        kept_dump: None,
    };
    if let Some(output) = wanted.output {
        let target = Target::create(output, store.bytes().max(needed), wanted.force)?;
        copy_data(&store, &saved.kept, &target, progress)?;
        target.write_store(header, saved.kept, &[])?;
        target.finish()?;
        return Ok(report);
    }
    if needed > store.bytes() {
        return Err(CowError::TooSmall {
            path: wanted.cow.to_owned(),
            found: store.bytes(),
            needed,
        });
    }
    let kept = keep_dump(&store)?;
    report.kept_dump = Some(crate::disks::shown(&kept));
    let target = Target::in_place(store.disk);
    target.write_store(header, saved.kept, &[])?;
    target.finish()?;
    Ok(report)
}

/// The header, or one with the chunk size that the operator names.
fn header(disk: &OpenDisk, chunk_size: Option<ChunkSize>) -> Result<(Header, bool), CowError> {
    let mut sector = [0; HEADER_BYTES];
    let there = disk.bytes.min(HEADER_BYTES as u64) as usize;
    read_at(disk, 0, &mut sector[..there])?;
    let path = disk.path.clone();
    match (Header::decode(&sector[..there]), chunk_size) {
        (Ok(Found::Store(header)), _) => Ok((header, false)),
        (_, Some(chunk_size)) => Ok((
            Header {
                valid: true,
                chunk_size,
            },
            true,
        )),
        (Ok(Found::New), None) => Err(CowError::NoStore(path)),
        (Err(error), None) => Err(CowError::Header { path, error }),
    }
}

/// What is saved.
struct Saved {
    /// In the order of the list.
    kept: Vec<Exception>,
    lost_exceptions: u64,
    lost: Vec<Loss>,
    scrubbed: u64,
    regained_exceptions: u64,
    regained: Vec<RangeReport>,
    doubtful: bool,
}

fn save(
    store: &CowStore,
    origin_bytes: Option<u64>,
    beyond_holes: bool,
) -> Result<Saved, CowError> {
    let bounds = store.bounds(origin_bytes);
    let chunk_size = store.header.chunk_size;
    let mut saved = Saved {
        kept: Vec::new(),
        lost_exceptions: 0,
        lost: Vec::new(),
        scrubbed: 0,
        regained_exceptions: 0,
        regained: Vec::new(),
        doubtful: false,
    };
    let mut placed: Vec<Exception> = Vec::new();
    let end = store.for_each(|_, exception| match bounds.misplaced(exception) {
        None => placed.push(exception),
        Some(why) => saved.lose(exception, chunk_size, origin_bytes, misplaced(why)),
    })?;
    let listed = placed.len();
    let torn = matches!(
        end,
        ListEnd::InArea {
            tail: Tail::Torn { .. },
            ..
        }
    );
    dump::for_each_stale(store, end, |stale| {
        let (old, new) = (OriginChunk(stale.old), CowChunk(stale.new));
        let exception = Exception { old, new };
        if beyond_holes && torn && bounds.misplaced(exception).is_none() {
            placed.push(exception);
        } else {
            saved.scrubbed += 1;
        }
        true
    })?;
    let later = later_of_two(&placed);
    for (n, exception) in placed.into_iter().enumerate() {
        match later.binary_search_by_key(&(n as u64), |(n, _)| *n) {
            Err(_) if n >= listed => saved.regain(exception, chunk_size, origin_bytes),
            Err(_) => saved.kept.push(exception),
            // What took its place was written later, and is what the list has.
            Ok(_) if n >= listed => saved.scrubbed += 1,
            Ok(at) => saved.lose(exception, chunk_size, origin_bytes, later[at].1),
        }
    }
    if let ListEnd::InArea { tail, .. } = end {
        saved.doubtful = matches!(tail, Tail::Corrupt { .. }) || saved.regained_exceptions > 0;
    }
    Ok(saved)
}

impl Saved {
    /// From behind a hole.
    fn regain(&mut self, exception: Exception, chunk_size: ChunkSize, origin_bytes: Option<u64>) {
        self.kept.push(exception);
        self.regained_exceptions += 1;
        if self.regained.len() < MOST_LISTED {
            let range = nbdsnap_format::Run::of(exception).origin_range(chunk_size);
            self.regained.push(clipped(&range, origin_bytes).into());
        }
    }

    fn lose(
        &mut self,
        exception: Exception,
        chunk_size: ChunkSize,
        origin_bytes: Option<u64>,
        why: &'static str,
    ) {
        self.lost_exceptions += 1;
        if self.lost.len() < MOST_LISTED {
            let range = nbdsnap_format::Run::of(exception).origin_range(chunk_size);
            self.lost.push(Loss {
                range: clipped(&range, origin_bytes).into(),
                why,
            });
        }
    }
}

fn misplaced(why: Misplaced) -> &'static str {
    let at = nbdsnap_format::Slot { area: 0, index: 0 };
    let exception = Exception {
        old: nbdsnap_format::OriginChunk(0),
        new: nbdsnap_format::CowChunk(0),
    };
    Finding::Misplaced { at, exception, why }.code()
}

/// Those that share a chunk with an earlier one, by their numbers, and why they go.
fn later_of_two(placed: &[Exception]) -> Vec<(u64, &'static str)> {
    let mut later = Vec::new();
    let mut order: Vec<u64> = (0..placed.len() as u64).collect();
    let mut find = |key: fn(&Exception) -> u64, why| {
        order.sort_unstable_by_key(|n| (key(&placed[*n as usize]), *n));
        let same = |a: &u64, b: &u64| key(&placed[*a as usize]) == key(&placed[*b as usize]);
        for group in order.chunk_by(same) {
            later.extend(group[1..].iter().map(|n| (*n, why)));
        }
    };
    find(|e| e.old.0, "same-origin-chunk");
    find(|e| e.new.0, "same-store-chunk");
    later.sort_unstable();
    later.dedup_by_key(|(n, _)| *n);
    later
}

/// Bytes of a store in which a list of so many exceptions can end.
fn bytes_needed(store: &CowStore, exceptions: u64) -> u64 {
    let layout = store.layout();
    let area = layout.slot(exceptions).area;
    layout
        .area_offset(area)
        .saturating_add(layout.chunk_size().bytes())
}

fn copy_data(
    store: &CowStore,
    kept: &[Exception],
    target: &Target,
    progress: &mut dyn FnMut(u64),
) -> Result<(), CowError> {
    let chunk_size = store.header.chunk_size;
    let mut buffer = vec![0; PIECE.min(chunk_size.bytes()) as usize];
    for (n, exception) in (1..).zip(kept) {
        let start = chunk_size.cow_offset(exception.new);
        let mut done = 0;
        while done < chunk_size.bytes() {
            store.read(start + done, &mut buffer)?;
            target.write(start + done, &buffer)?;
            done += buffer.len() as u64;
        }
        progress(n * chunk_size.bytes());
    }
    Ok(())
}

/// Keep the metadata as they are beside the store, durably.
fn keep_dump(store: &CowStore) -> Result<PathBuf, CowError> {
    let mut path = if store.disk.is_block_device {
        PathBuf::from(store.path().file_name().unwrap_or_default())
    } else {
        store.path().to_owned()
    };
    path.as_mut_os_string().push(".before-repair");
    let file = std::fs::File::options()
        .write(true)
        .create_new(true)
        .open(&path)
        .map_err(CowError::io(&path, "making a copy of the metadata", 0))?;
    let mut out = std::io::BufWriter::new(file);
    dump::run(store, dump::Format::Text, &mut out)?;
    out.into_inner()
        .map_err(std::io::IntoInnerError::into_error)
        .and_then(|file| file.sync_all())
        .and_then(|()| sync_folder_of(&path))
        .map_err(CowError::io(&path, "making it durable", 0))?;
    Ok(path)
}
