//! Stores made and opened on simulated disks, with the power failing between any
//! two of their steps, and the comparison of every view after a crash.

use nbdsnap_engine::disk::sim::{Loss, Rng, SimDisk};
use nbdsnap_engine::{Access, Action, DiskError, Outcome, Store, StoreIo, StoreSize, StoreSpec};
use nbdsnap_format::ChunkSize;

use super::ledger::Tally;
use super::world::{Phase, Slot, World, say};
use super::{Checks, Violation};
use crate::model::Crash;
use crate::pattern::SECTOR;
use crate::store_bytes;

/// The disk under a store that is made or opened.
pub(super) struct Bench<'a> {
    pub(super) disk: &'a mut SimDisk,
    pub(super) rng: &'a mut Rng,
    /// Steps until the power fails.
    pub(super) steps: Option<u64>,
    pub(super) failed: bool,
    pub(super) told: bool,
    pub(super) kept: Vec<(u64, Vec<u8>)>,
    pub(super) wrote: bool,
}

impl Bench<'_> {
    /// Whether the power still holds for one more step.
    fn step(&mut self) -> bool {
        match &mut self.steps {
            _ if self.failed => false,
            Some(0) => {
                self.failed = true;
                false
            }
            Some(left) => {
                *left -= 1;
                true
            }
            None => true,
        }
    }
}

impl StoreIo for Bench<'_> {
    fn act(&mut self, action: Action) -> Outcome {
        let already = self.failed;
        let holds = self.step();
        self.wrote |= !matches!(action, Action::Read { .. } | Action::Flush);
        if self.told && !already {
            let fails = if holds { "" } else { " and the power fails" };
            println!("    {}{fails}", super::operations::brief(&action));
        }
        if holds {
            return self.disk.perform(action, self.rng);
        }
        if !already {
            self.disk.issue(0, action, self.rng);
            if self.rng.chance(1, 2) {
                self.disk.progress(0, self.rng);
            }
        }
        Err(DiskError::Io(5))
    }

    fn keep_copy(&mut self, area: u64, bytes: &[u8]) -> Result<(), DiskError> {
        if !self.step() {
            return Err(DiskError::Io(5));
        }
        self.kept.push((area, bytes.to_vec()));
        Ok(())
    }
}

/// How the making or opening of a store went.
pub(super) enum Made {
    /// It is there.
    Store(Store),
    /// The power failed.
    PowerFailed,
    /// It is refused.
    Refused(String),
}

fn size_of(slot: &Slot) -> StoreSize {
    StoreSize {
        ready: slot.disk.len(),
        limit: (slot.plan.limit_sectors * SECTOR).max(slot.disk.len()),
        step: slot.plan.step_chunks * slot.plan.chunk_bytes(),
    }
}

impl World {
    /// Make the store of a slot, with the power failing after `steps`.
    pub(super) fn create_store(
        &mut self,
        index: usize,
        checks: Checks,
        steps: Option<u64>,
    ) -> Result<Made, Violation> {
        let slot = &mut self.slots[index];
        let Ok(chunk_size) = ChunkSize::from_sectors(slot.plan.chunk_sectors) else {
            return Err(Violation("the plan has an impossible chunk size".into()));
        };
        let spec = StoreSpec {
            kind: slot.plan.kind,
            chunk_size,
            size: size_of(slot),
        };
        say!(self, "  make store {index}: {spec:?}");
        let mut bench = Bench {
            disk: &mut slot.disk,
            rng: &mut self.rng,
            steps,
            failed: false,
            told: self.told,
            kept: Vec::new(),
            wrote: false,
        };
        match checks.create(spec, &mut bench) {
            _ if bench.failed => Ok(Made::PowerFailed),
            Ok(_) if bench.wrote && slot.plan.kind == nbdsnap_engine::StoreKind::Transient => Err(
                Violation(format!("making transient store {index} wrote to it")),
            ),
            Ok(store) => Ok(Made::Store(store)),
            Err(error) => Err(Violation(format!("store {index} cannot be made: {error}"))),
        }
    }

    /// Open the store of a slot, with the power failing after `steps`.
    pub(super) fn open_store(
        &mut self,
        index: usize,
        access: Access,
        checks: Checks,
        steps: Option<u64>,
    ) -> Result<Made, Violation> {
        let slot = &mut self.slots[index];
        let origin_bytes = slot.sectors * SECTOR;
        say!(self, "  open store {index} {access:?}");
        let size = size_of(slot);
        let before = (access == Access::ReadOnly).then(|| slot.disk.digest(0));
        let mut bench = Bench {
            disk: &mut slot.disk,
            rng: &mut self.rng,
            steps,
            failed: false,
            told: self.told,
            kept: Vec::new(),
            wrote: false,
        };
        let opened = checks.open(slot.plan.kind, size, origin_bytes, access, &mut bench);
        let (failed, kept, wrote) = (bench.failed, bench.kept, bench.wrote);
        if failed {
            return Ok(Made::PowerFailed);
        }
        if before.is_some_and(|before| wrote || before != slot.disk.digest(0)) {
            return Err(Violation(format!(
                "opening store {index} read-only wrote to it"
            )));
        }
        match opened {
            Err(error) => Ok(Made::Refused(error.to_string())),
            Ok(store) => {
                if let Some(area) = store.torn_area() {
                    let tally = if access == Access::ReadOnly {
                        Tally::TornReadOnly
                    } else {
                        Tally::Torn
                    };
                    self.ledger.count(tally);
                    if wrote && !kept.iter().any(|(a, _)| *a == area) {
                        return Err(Violation(format!(
                            "area {area} of store {index} was scrubbed without a copy"
                        )));
                    }
                }
                Ok(Made::Store(store))
            }
        }
    }

    /// The power fails while a store was being made; look at what it left behind.
    pub(super) fn look_at_half_made(
        &mut self,
        index: usize,
        was_blank: bool,
        checks: Checks,
    ) -> Result<(), Violation> {
        match self.open_store(index, Access::ReadWrite, checks, None)? {
            Made::Store(store)
                if was_blank && !store.is_invalid() && store.exception_count() > 0 =>
            {
                Err(Violation(format!(
                    "half-made store {index} opens with {} exceptions",
                    store.exception_count()
                )))
            }
            Made::Store(_) => {
                self.ledger.count(Tally::CreationWhole);
                Ok(())
            }
            Made::Refused(_) => {
                self.ledger.count(Tally::CreationHalfMade);
                Ok(())
            }
            Made::PowerFailed => Ok(()),
        }
    }

    /// The power fails again while stores are being opened.
    pub(super) fn crash_in_recovery(&mut self) {
        self.crashes_left -= 1;
        self.ledger.count(Tally::CrashRecovery);
        say!(self, "-- power cut during recovery");
        let mut digest = 0;
        for disk in std::iter::once(&mut self.origin)
            .chain(self.slots.iter_mut().map(|slot| &mut slot.disk))
        {
            disk.power_cut(Loss::pick(&mut self.rng), &mut self.rng);
            digest = disk.digest(digest);
        }
        self.images.push(digest);
    }

    /// What a store that was opened after a crash may be.
    pub(super) fn judge_opened(&mut self, index: usize, store: &Store) -> Result<(), Violation> {
        let slot = &mut self.slots[index];
        let parsed = store_bytes::exceptions(slot.disk.content(), slot.plan.chunk_sectors);
        say!(
            self,
            "  store {index}: {} exceptions, {}",
            store.exception_count(),
            if store.is_invalid() {
                "invalid"
            } else {
                "valid"
            }
        );
        if store.is_invalid() != parsed.is_none() {
            return Err(Violation(format!(
                "store {index} opens with invalid = {} against its header",
                store.is_invalid()
            )));
        }
        if store.is_invalid() {
            self.ledger.count(Tally::InvalidFound);
            if slot.phase != Phase::Invalid && !slot.may_be_invalid {
                return Err(Violation(format!(
                    "store {index} is invalid after the crash, for no reason"
                )));
            }
            slot.phase = Phase::Invalid;
            return Ok(());
        }
        let count = parsed.map_or(0, |old| old.len() as u64);
        if store.exception_count() != count {
            return Err(Violation(format!(
                "store {index} opens with {} exceptions of {count}",
                store.exception_count()
            )));
        }
        if slot.phase == Phase::Invalid && slot.doomed {
            return Err(Violation(format!(
                "store {index} was invalid, an origin write that broke it was answered, and now it opens as valid"
            )));
        }
        slot.phase = Phase::Active;
        self.ledger.count(Tally::Reopened);
        Ok(())
    }

    /// What the check of the format finds after a crash: nothing, but for a torn area.
    pub(super) fn check_store(&mut self, index: usize) -> Result<(), Violation> {
        let slot = &self.slots[index];
        let content = slot.disk.content();
        let read = |offset: u64, buffer: &mut [u8]| {
            let from = offset as usize;
            buffer.copy_from_slice(&content[from..from + buffer.len()]);
            Ok::<(), std::convert::Infallible>(())
        };
        let Ok(findings) =
            nbdsnap_format::check(read, slot.disk.len(), Some(slot.sectors * SECTOR));
        let parsed = store_bytes::exceptions(content, slot.plan.chunk_sectors);
        let count = parsed.map_or(0, |old| old.len() as u64);
        if !findings.can_be_opened() || findings.exceptions != count {
            return Err(Violation(format!(
                "store {index} has {count} exceptions, and its check finds {findings:?}"
            )));
        }
        self.ledger.count(Tally::Checked);
        Ok(())
    }

    /// The bytes of the origin after a crash, compared on the disk itself.
    pub(super) fn check_origin_disk(&mut self, crash: Crash) -> Result<(), Violation> {
        let now = self.tick();
        let found = self.origin.content().to_vec();
        match self.model.check_after(crash, now, &found) {
            Ok(()) => Ok(()),
            Err(wrong) => Err(self.violation("the origin's disk after the crash", &wrong)),
        }
    }
}
