//! `cow check`: what is wrong with a store, and what can be said of it without being
//! wrong.

use std::path::Path;

use nbdsnap_format::header::HeaderError;
use nbdsnap_format::{Exception, Finding, Findings, Kernel, ListEnd, check};
use serde::Serialize;

use super::open::{open_disk, read_at};
use super::{CowError, CowStore, Reading};
use crate::server::setup::OpenDisk;

/// What a check found, as `cow check --json` prints it. Fields are added, never
/// renamed; what does not apply is null.
#[derive(Clone, Debug, Serialize)]
pub struct CheckReport {
    /// The store, as it was named.
    pub cow: String,
    /// `sound`: nothing is wrong. `mendable`: opening it for writing here mends all
    /// that is. `damaged`: it is to be repaired. `invalid`: the snapshot is lost, and
    /// its exceptions mean nothing. `no-store`: there is none.
    pub verdict: Verdict,
    /// What the kernel does with the store as a whole, the worst of its findings:
    /// `accepts`, `formats`, `rejects`, `fails`, `misreads-later`, `misreads`.
    pub kernel: &'static str,
    /// Exceptions that were looked at.
    pub exceptions: u64,
    /// What is wrong, the first thousand.
    pub findings: Vec<FindingReport>,
    /// How many more findings there are.
    pub left_out: u64,
    /// What is no fault, and may be worth knowing.
    pub notes: Notes,
}

/// See [`CheckReport::verdict`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Nothing is wrong.
    Sound,
    /// Opening it for writing mends it.
    Mendable,
    /// It has to be repaired.
    Damaged,
    /// Its snapshot is lost.
    Invalid,
    /// There is none.
    NoStore,
}

/// One finding.
#[derive(Clone, Debug, Serialize)]
pub struct FindingReport {
    /// Its name, which stays.
    pub code: &'static str,
    /// The area that it is about, from 0.
    pub area: Option<u64>,
    /// The entry in that area, from 0.
    pub entry: Option<u64>,
    /// Where that entry lies in the store, in bytes.
    pub offset: Option<u64>,
    /// What the kernel does with a store that has it.
    pub kernel: &'static str,
    /// All of it, in a sentence.
    pub message: String,
    /// The same answer of the kernel's in words; not in the JSON.
    #[serde(skip)]
    pub kernel_words: Kernel,
}

/// What is no fault.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Notes {
    /// Data chunks that no exception points to, and that are never handed out again.
    pub unreferenced_chunks: u64,
    /// Chunks whose copy equals what the origin holds; null unless the contents were
    /// compared.
    pub needless_copies: Option<u64>,
    /// Bytes at the end of the store that are no whole chunk.
    pub odd_bytes: u64,
}

impl CheckReport {
    /// Whether all is well.
    pub fn is_fine(&self) -> bool {
        self.verdict == Verdict::Sound
    }
}

/// Check the store at `cow`. With an origin, exceptions outside it are found; and
/// with `contents`, which are told how many bytes were compared, needless copies.
pub fn run(
    cow: &Path,
    origin: Option<&Path>,
    reading: Reading,
    contents: Option<&mut dyn FnMut(u64)>,
) -> Result<CheckReport, CowError> {
    let disk = open_disk(cow, reading)?;
    let origin = origin
        // Its length alone tells nothing that a writer could disturb.
        .map(|path| {
            open_disk(
                path,
                if contents.is_some() {
                    reading
                } else {
                    Reading::Forced
                },
            )
        })
        .transpose()?;
    let origin_bytes = origin.as_ref().map(|origin| origin.bytes);
    let read = |offset: u64, buffer: &mut [u8]| read_at(&disk, offset, buffer);
    let findings = check(read, disk.bytes, origin_bytes)?;
    let mut report = report(&disk, &findings);
    if let (Some(origin), Some(progress)) = (&origin, contents)
        && findings.header.is_some_and(|header| header.valid)
    {
        let store = CowStore::of(disk)?;
        report.notes.needless_copies = Some(needless_copies(&store, origin, progress)?);
    }
    Ok(report)
}

fn report(disk: &OpenDisk, findings: &Findings) -> CheckReport {
    let layout = findings
        .header
        .map(|header| nbdsnap_format::Layout::new(header.chunk_size));
    let describe = |finding: &Finding| {
        let slot = finding.slot();
        FindingReport {
            code: finding.code(),
            area: slot.map(|slot| slot.area),
            entry: slot.map(|slot| slot.index),
            offset: slot
                .zip(layout)
                .map(|(slot, layout)| layout.area_offset(slot.area) + 16 * slot.index),
            kernel: finding.kernel().code(),
            message: finding.to_string(),
            kernel_words: finding.kernel(),
        }
    };
    let worst = findings.list.iter().map(Finding::kernel).max();
    CheckReport {
        cow: crate::disks::shown(&disk.path),
        verdict: verdict(findings),
        kernel: worst.unwrap_or(Kernel::Accepts).code(),
        exceptions: findings.exceptions,
        findings: findings.list.iter().map(describe).collect(),
        left_out: findings.left_out,
        notes: Notes {
            unreferenced_chunks: findings.unreferenced,
            needless_copies: None,
            odd_bytes: layout.map_or(0, |layout| disk.bytes % layout.chunk_size().bytes()),
        },
    }
}

fn verdict(findings: &Findings) -> Verdict {
    match findings.header {
        Some(header) if !header.valid => Verdict::Invalid,
        _ if findings.is_sound() => Verdict::Sound,
        _ if findings.can_be_opened() => Verdict::Mendable,
        None if findings.list.iter().all(is_no_store) => Verdict::NoStore,
        _ => Verdict::Damaged,
    }
}

fn is_no_store(finding: &Finding) -> bool {
    matches!(
        finding,
        Finding::NoStore
            | Finding::Header(HeaderError::WrongMagic { .. } | HeaderError::TooShort { .. })
    )
}

/// How many copies equal what the origin holds at their chunk. What is misplaced
/// is left out.
fn needless_copies(
    store: &CowStore,
    origin: &OpenDisk,
    progress: &mut dyn FnMut(u64),
) -> Result<u64, CowError> {
    /// Compared at a time.
    const PIECE: u64 = 1 << 20;
    let chunk_size = store.header.chunk_size;
    let bounds = store.bounds(Some(origin.bytes));
    let piece = chunk_size.bytes().min(PIECE);
    let (mut ours, mut theirs) = (vec![0; piece as usize], vec![0; piece as usize]);
    let (mut needless, mut done) = (0, 0);
    let mut same = |exception: Exception| -> Result<bool, CowError> {
        let start = chunk_size.origin_offset(exception.old);
        let end = (start + chunk_size.bytes()).min(origin.bytes);
        let shift = chunk_size.cow_offset(exception.new);
        let mut at = start;
        while at < end {
            let len = piece.min(end - at) as usize;
            read_at(origin, at, &mut ours[..len])?;
            store.read(shift + (at - start), &mut theirs[..len])?;
            if ours[..len] != theirs[..len] {
                return Ok(false);
            }
            at += len as u64;
        }
        Ok(true)
    };
    let mut failed = None;
    let _: ListEnd = store.for_each(|_, exception| {
        if failed.is_some() || bounds.misplaced(exception).is_some() {
            return;
        }
        match same(exception) {
            Ok(equal) => needless += u64::from(equal),
            Err(error) => failed = Some(error),
        }
        done += chunk_size.bytes();
        progress(done);
    })?;
    match failed {
        None => Ok(needless),
        Some(error) => Err(error),
    }
}
