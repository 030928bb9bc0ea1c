//! The simulated disk: a device in memory that ends its operations when it is
//! told to, and that can lose power. The fault model of the whole project is
//! written here and nowhere else. The crash simulator in `tests/` drives it; it
//! is pure values, and every choice comes from the caller's [`Rng`].
//!
//! # The fault model
//!
//! - A device is 512-byte sectors. A sector is written whole or not at all; a
//!   write of several sectors may be performed for any of them.
//! - An operation takes effect at any moment between [`SimDisk::issue`] and its
//!   end, in one step or in two ([`SimDisk::progress`]). Operations that overlap
//!   in time apply in any order; a read sees what is there when it applies.
//! - A power cut ([`SimDisk::power_cut`]) leaves each sector, independently, with
//!   what was durable or with any later version of it that was issued, the
//!   operations still in flight included.
//! - A flush makes durable, when it ends, exactly what had *ended* before it was
//!   issued. A write that overlaps a flush may be durable afterwards or not.
//! - A trim leaves each sector as it was or zeroed; where it was left, a power
//!   cut may still zero it until the next flush.
//! - Growth adds zeros; it is durable when it ends. A power cut before leaves any
//!   length in between, as does a kill.
//! - A kill ([`SimDisk::kill`]) ends the process and keeps the page cache: what
//!   was applied stays readable, and as volatile as it was.
//! - Errors, where [`Faults`] allows them: a read fails; a write fails with any
//!   of its sectors written, as far as reads and later flushes go; a flush fails and forgets that some sectors are
//!   dirty, so that the next one succeeds with their data gone; growth meets the
//!   end of the file system.
//!
//! Reading or writing past the end is a fault of the caller's and panics.

mod rng;
#[cfg(test)]
mod tests;

use bytes::Bytes;

use super::{Action, DiskError, Outcome};

pub use rng::Rng;

/// Bytes in a sector, the grain of a power cut.
pub const SECTOR: usize = 512;

/// How often operations fail, in 1024ths; all zero by default.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Reads.
    pub read: u64,
    /// Writes, zeroing and trims.
    pub write: u64,
    /// Flushes.
    pub flush: u64,
    /// Growth, with [`DiskError::NoSpace`].
    pub grow: u64,
}

/// What a power cut does to the sectors that are not durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Each keeps any of its versions.
    Any,
    /// All fall back to what was durable.
    All,
    /// All keep the newest version that was applied.
    Nothing,
    /// Most fall back.
    Most,
    /// Most keep the newest.
    Few,
    /// Those below a point keep the newest, those above fall back: a torn write.
    Above,
    /// Those above a point keep the newest, those below fall back.
    Below,
}

impl Loss {
    /// One of them, mostly [`Loss::Any`].
    pub fn pick(rng: &mut Rng) -> Self {
        match rng.below(16) {
            0..3 => Self::All,
            3..6 => Self::Nothing,
            6 => Self::Most,
            7 => Self::Few,
            8 | 9 => Self::Above,
            10 | 11 => Self::Below,
            _ => Self::Any,
        }
    }
}

/// What a sector held at some moment since it was last durable.
#[derive(Clone, Copy, Debug)]
struct Version {
    sector: u32,
    /// Where its bytes lie in the arena, in sectors.
    at: u32,
    /// The operation that made it.
    op: u64,
    /// When that operation ended; `NEVER` while it is in flight.
    ended: u64,
    /// When it was applied.
    applied: u64,
    /// False for the zeros that a trim may still bring: no read shows them.
    shown: bool,
    /// A failed flush has forgotten that it is dirty.
    forgotten: bool,
}

const NEVER: u64 = u64::MAX;

/// What an operation in flight is about.
#[derive(Clone, Debug)]
enum Kind {
    Read { buffer: Vec<u8> },
    Write { data: Vec<u8> },
    Trim,
    Flush { length: usize },
    Grow { to: usize },
}

/// An operation between its issue and its end.
#[derive(Clone, Debug)]
struct InFlight {
    tag: u64,
    serial: u64,
    issued: u64,
    kind: Kind,
    /// The first byte it covers.
    from: usize,
    /// What is still to be applied of them.
    left: (usize, usize),
    fails: Option<DiskError>,
}

/// A device in memory. See the module's text for what it does to its content.
#[derive(Clone, Debug)]
pub struct SimDisk {
    /// What a read shows.
    cache: Vec<u8>,
    /// What is certainly durable. May be shorter than the cache while a growth is not durable.
    base: Vec<u8>,
    /// What was applied since, oldest first.
    log: Vec<Version>,
    arena: Vec<u8>,
    ops: Vec<InFlight>,
    clock: u64,
    faults: Faults,
}

impl SimDisk {
    /// A device that holds `content`, durably.
    pub fn new(content: Vec<u8>) -> Self {
        assert!(
            content.len().is_multiple_of(SECTOR),
            "a device is whole sectors"
        );
        Self {
            base: content.clone(),
            cache: content,
            log: Vec::new(),
            arena: Vec::new(),
            ops: Vec::new(),
            clock: 0,
            faults: Faults::default(),
        }
    }

    /// Let operations that are issued from now on fail this often.
    pub fn set_faults(&mut self, faults: Faults) {
        self.faults = faults;
    }

    /// Its length now, in bytes.
    pub fn len(&self) -> u64 {
        self.cache.len() as u64
    }

    /// Whether it has no sectors.
    pub fn is_empty(&self) -> bool {
        self.cache.is_empty()
    }

    /// What reads would show at this moment.
    pub fn content(&self) -> &[u8] {
        &self.cache
    }

    /// Operations in flight.
    pub fn in_flight(&self) -> usize {
        self.ops.len()
    }

    /// The name that was given to the operation at `index`.
    pub fn tag(&self, index: usize) -> u64 {
        self.ops[index].tag
    }

    /// Whether nothing would be lost by a power cut, nor anything in flight.
    pub fn is_clean(&self) -> bool {
        self.log.is_empty() && self.ops.is_empty() && self.base.len() == self.cache.len()
    }

    /// Begin an operation; `tag` names it when it ends.
    pub fn issue(&mut self, tag: u64, action: Action, rng: &mut Rng) {
        self.clock += 1;
        let (kind, offset, len, fault) = match action {
            Action::Read { offset, len } => (
                Kind::Read {
                    buffer: vec![0; len as usize],
                },
                offset,
                len,
                self.faults.read,
            ),
            Action::Write { offset, data } => {
                let data = data.concat();
                let len = data.len() as u64;
                (Kind::Write { data }, offset, len, self.faults.write)
            }
            Action::WriteZeroes { offset, len, .. } => (
                Kind::Write {
                    data: vec![0; len as usize],
                },
                offset,
                len,
                self.faults.write,
            ),
            Action::Trim { offset, len } => (Kind::Trim, offset, len, self.faults.write),
            Action::Flush => (
                Kind::Flush {
                    length: self.cache.len(),
                },
                0,
                0,
                self.faults.flush,
            ),
            Action::Grow { to } => (Kind::Grow { to: to as usize }, 0, 0, self.faults.grow),
        };
        let (from, to) = (offset as usize, (offset + len) as usize);
        assert!(
            to <= self.cache.len(),
            "{kind:?} of {offset}+{len} lies past the end at {}",
            self.cache.len()
        );
        if let Kind::Grow { to } = kind {
            assert!(
                to.is_multiple_of(SECTOR),
                "growth to {to}, which is no whole sectors"
            );
        }
        let fails = rng.chance(fault, 1024).then_some(match kind {
            Kind::Grow { .. } => DiskError::NoSpace,
            _ => DiskError::Io(5),
        });
        self.ops.push(InFlight {
            tag,
            serial: self.clock,
            issued: self.clock,
            kind,
            from,
            left: (from, to),
            fails,
        });
    }

    /// Let a part of the operation at `index` (below [`SimDisk::in_flight`]) take effect now.
    pub fn progress(&mut self, index: usize, rng: &mut Rng) {
        let op = &self.ops[index];
        if op.fails.is_some() || matches!(op.kind, Kind::Flush { .. } | Kind::Grow { .. }) {
            return;
        }
        let (from, to) = op.left;
        let first = from / SECTOR;
        let cut =
            (first as u64 + rng.below((to.div_ceil(SECTOR) - first) as u64 + 1)) as usize * SECTOR;
        let cut = cut.clamp(from, to);
        let (part, left) = match rng.below(4) {
            0 => ((from, cut), (cut, to)),
            1 => ((cut, to), (from, cut)),
            _ => ((from, to), (to, to)),
        };
        let mut op = self.ops.swap_remove(index);
        self.apply(&mut op, part, rng);
        op.left = left;
        self.ops.push(op);
        let last = self.ops.len() - 1;
        self.ops.swap(index, last);
    }

    /// End the operation at `index`: its tag and how it ended.
    pub fn end(&mut self, index: usize, rng: &mut Rng) -> (u64, Outcome) {
        self.clock += 1;
        let mut op = self.ops.swap_remove(index);
        let outcome = match op.fails {
            Some(error) => {
                self.fail(&mut op, rng);
                Err(error)
            }
            None => Ok(self.finish(&mut op, rng)),
        };
        let now = self.clock;
        for version in self
            .log
            .iter_mut()
            .rev()
            .take_while(|v| v.applied >= op.issued)
        {
            if version.op == op.serial {
                version.ended = now;
            }
        }
        (op.tag, outcome)
    }

    /// Begin and end an operation at once.
    pub fn perform(&mut self, action: Action, rng: &mut Rng) -> Outcome {
        self.issue(0, action, rng);
        self.end(self.ops.len() - 1, rng).1
    }

    fn finish(&mut self, op: &mut InFlight, rng: &mut Rng) -> Bytes {
        let left = op.left;
        self.apply(op, left, rng);
        match &mut op.kind {
            Kind::Read { buffer } => return Bytes::from(std::mem::take(buffer)),
            Kind::Write { .. } | Kind::Trim => {}
            Kind::Flush { length } => {
                let length = *length;
                self.make_durable(op.issued, length);
            }
            Kind::Grow { to } => {
                let to = *to;
                self.cache.resize(to.max(self.cache.len()), 0);
                self.base.resize(to.max(self.base.len()), 0);
            }
        }
        Bytes::new()
    }

    /// The operation fails; what it may have done all the same, it does.
    fn fail(&mut self, op: &mut InFlight, rng: &mut Rng) {
        match &op.kind {
            Kind::Write { .. } | Kind::Trim => {
                let (from, to) = op.left;
                let mut at = from;
                while at < to {
                    let next = (at / SECTOR + 1) * SECTOR;
                    if rng.chance(1, 2) {
                        self.apply(op, (at, next.min(to)), rng);
                    }
                    at = next;
                }
            }
            Kind::Flush { .. } => {
                let all = rng.chance(1, 2);
                for version in &mut self.log {
                    if version.ended <= op.issued && (all || rng.chance(1, 2)) {
                        version.forgotten = true;
                    }
                }
                // A page is dirty or not: with what it shows, all before that is forgotten.
                let mut clean = vec![false; self.cache.len() / SECTOR];
                for version in self.log.iter_mut().rev() {
                    let clean = &mut clean[version.sector as usize];
                    version.forgotten |= *clean;
                    *clean |= version.forgotten && version.shown;
                }
            }
            Kind::Grow { to } => {
                let more = rng.below(to.saturating_sub(self.cache.len()) as u64) as usize / SECTOR
                    * SECTOR;
                self.cache.resize(self.cache.len() + more, 0);
            }
            Kind::Read { .. } => {}
        }
    }

    /// Let the bytes `part` of an operation take effect on what reads show.
    fn apply(&mut self, op: &mut InFlight, part: (usize, usize), rng: &mut Rng) {
        let (from, to) = part;
        if from >= to {
            return;
        }
        self.clock += 1;
        let start = op.from;
        match &mut op.kind {
            Kind::Read { buffer } => {
                buffer[from - start..to - start].copy_from_slice(&self.cache[from..to]);
            }
            Kind::Write { data } => {
                self.cache[from..to].copy_from_slice(&data[from - start..to - start]);
                for sector in from / SECTOR..to.div_ceil(SECTOR) {
                    self.log_sector(sector, op.serial);
                }
            }
            Kind::Trim => {
                let act = rng.below(3);
                for sector in from / SECTOR..to.div_ceil(SECTOR) {
                    let (a, b) = (from.max(sector * SECTOR), to.min((sector + 1) * SECTOR));
                    let zero = act == 0 || (act == 1 && rng.chance(1, 2));
                    let kept = (!zero).then(|| self.cache[a..b].to_vec());
                    self.cache[a..b].fill(0);
                    self.log_sector(sector, op.serial);
                    if let Some(kept) = kept {
                        self.cache[a..b].copy_from_slice(&kept);
                        if let Some(ghost) = self.log.last_mut() {
                            ghost.shown = false;
                        }
                    }
                }
            }
            Kind::Flush { .. } | Kind::Grow { .. } => {}
        }
    }

    /// Remember the sector's present content as a version.
    fn log_sector(&mut self, sector: usize, op: u64) {
        let at = self.arena.len() / SECTOR;
        self.arena
            .extend_from_slice(&self.cache[sector * SECTOR..(sector + 1) * SECTOR]);
        self.log.push(Version {
            sector: sector as u32,
            at: at as u32,
            op,
            ended: NEVER,
            applied: self.clock,
            shown: true,
            forgotten: false,
        });
    }

    /// A flush that was issued at `issued`, when the device was `length` long, has ended.
    fn make_durable(&mut self, issued: u64, length: usize) {
        if self.base.len() < length {
            self.base.resize(length, 0);
        }
        // The newest version of each sector that the flush covers: its position in the log, plus one.
        let mut newest = vec![0; self.cache.len() / SECTOR];
        for (position, version) in self.log.iter().enumerate() {
            if version.ended <= issued && version.shown && !version.forgotten {
                newest[version.sector as usize] = position + 1;
            }
        }
        for (sector, &position) in newest.iter().enumerate() {
            if let Some(version) = position.checked_sub(1).map(|p| self.log[p]) {
                let at = version.at as usize * SECTOR;
                self.base[sector * SECTOR..(sector + 1) * SECTOR]
                    .copy_from_slice(&self.arena[at..at + SECTOR]);
            }
        }
        let mut position = 0;
        self.log.retain(|version| {
            position += 1;
            let decided = !version.shown && version.ended <= issued;
            position > newest[version.sector as usize] && !decided
        });
        if self.log.is_empty() {
            self.arena.clear();
        }
    }

    /// The power fails: what is in flight is gone, and each sector that is not
    /// durable keeps one of its versions.
    pub fn power_cut(&mut self, loss: Loss, rng: &mut Rng) {
        let mut longest = self.cache.len();
        for mut op in std::mem::take(&mut self.ops) {
            if let Kind::Grow { to } = op.kind {
                longest = longest.max(to);
            } else if !matches!(op.kind, Kind::Read { .. }) && loss != Loss::Nothing {
                // As if applied last: one more version that each sector may keep.
                let left = op.left;
                self.apply(&mut op, left, rng);
            }
        }
        let length = match loss {
            Loss::All => self.base.len(),
            Loss::Nothing => self.cache.len(),
            _ => {
                (self.base.len() as u64 + rng.below((longest - self.base.len() + SECTOR) as u64))
                    as usize
                    / SECTOR
                    * SECTOR
            }
        };
        self.base.resize(length, 0);
        self.keep_versions(loss, rng);
        self.cache.clear();
        self.cache.extend_from_slice(&self.base);
        self.log.clear();
        self.arena.clear();
        self.faults = Faults::default();
    }

    /// Move one version of each sector in the log into the base.
    fn keep_versions(&mut self, loss: Loss, rng: &mut Rng) {
        let mut seen = vec![0; self.base.len() / SECTOR];
        let point = match self.log.len() {
            0 => return,
            // Often within what was written last.
            n if rng.chance(1, 2) => self.log[n - 1 - rng.index(n.min(4))].sector,
            n => self.log[rng.index(n)].sector,
        };
        for version in &self.log {
            let Some(seen) = seen.get_mut(version.sector as usize) else {
                continue;
            };
            // The n-th candidate replaces the choice so far once in n: each is as likely.
            *seen += 1;
            let keep = match loss {
                Loss::Any => rng.chance(1, *seen + 1),
                Loss::All => false,
                Loss::Nothing => version.shown,
                Loss::Most => rng.chance(1, 8),
                Loss::Few => rng.chance(7, 8),
                Loss::Above => version.shown && version.sector < point,
                Loss::Below => version.shown && version.sector >= point,
            };
            if keep {
                let (to, from) = (
                    version.sector as usize * SECTOR,
                    version.at as usize * SECTOR,
                );
                self.base[to..to + SECTOR].copy_from_slice(&self.arena[from..from + SECTOR]);
            }
        }
    }

    /// The process is killed: what is in flight happens for any of its sectors or
    /// does not, and what was applied stays as readable and as volatile as it was.
    /// Who opens the disk next drops its clean pages: what a failed flush has
    /// forgotten shows what the disk really holds.
    pub fn kill(&mut self, rng: &mut Rng) {
        self.drop_forgotten(rng);
        for mut op in std::mem::take(&mut self.ops) {
            match op.kind {
                Kind::Grow { to } => {
                    let more = rng.below((to.saturating_sub(self.cache.len()) + SECTOR) as u64)
                        as usize
                        / SECTOR
                        * SECTOR;
                    self.cache.resize(self.cache.len() + more, 0);
                }
                _ => self.fail_or_finish(&mut op, rng),
            }
        }
        self.clock += 1;
        for version in &mut self.log {
            version.ended = version.ended.min(self.clock);
        }
        self.faults = Faults::default();
    }

    fn drop_forgotten(&mut self, rng: &mut Rng) {
        if !self.log.iter().any(|version| version.forgotten) {
            return;
        }
        let mut dirty = vec![false; self.cache.len() / SECTOR];
        let mut forgotten = dirty.clone();
        self.base.resize(self.cache.len(), 0);
        for version in &self.log {
            let (sector, at) = (version.sector as usize, version.at as usize * SECTOR);
            dirty[sector] |= !version.forgotten && version.shown;
            forgotten[sector] |= version.forgotten;
            if version.forgotten && rng.chance(1, 2) {
                self.base[sector * SECTOR..(sector + 1) * SECTOR]
                    .copy_from_slice(&self.arena[at..at + SECTOR]);
            }
        }
        self.log.retain(|version| !version.forgotten);
        for sector in 0..dirty.len() {
            let bytes = sector * SECTOR..(sector + 1) * SECTOR;
            if forgotten[sector] && !dirty[sector] {
                self.cache[bytes.clone()].copy_from_slice(&self.base[bytes]);
            }
        }
    }

    fn fail_or_finish(&mut self, op: &mut InFlight, rng: &mut Rng) {
        if matches!(op.kind, Kind::Write { .. } | Kind::Trim) {
            if rng.chance(1, 2) {
                self.fail(op, rng);
            } else {
                let left = op.left;
                self.apply(op, left, rng);
            }
        }
    }

    /// A 64-bit hash of what reads show, continued from `seed`.
    pub fn digest(&self, seed: u64) -> u64 {
        let mut hash = seed ^ self.len();
        for word in self.cache.as_chunks::<8>().0 {
            hash = (hash.rotate_left(5) ^ u64::from_le_bytes(*word))
                .wrapping_mul(0x517c_c1b7_2722_0a95);
        }
        hash ^ (hash >> 29)
    }
}
