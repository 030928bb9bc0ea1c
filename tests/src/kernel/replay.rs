//! Replays the log of a `dm-log-writes` device that carried origins and COW
//! stores: after every entry, and after random subsets of what lies between two
//! flushes, torn at sectors, each snapshot shows what it may.
//!
//! What a crash can leave at any moment is all that was written before the last
//! flush that ended, and any subset, sector by sector, of what was written since.
//! The replay takes the epochs between flushes one after the other and plays them
//! in the log's order, then as subsets.

pub mod disk;

use std::collections::BTreeSet;
use std::ops::Range;

use super::load::{self, Load, SEGMENTS, VOLUMES};
use super::log::{END, Entry, Logged};
use super::slices::Slices;
use crate::harness::random::Random;
use disk::{Disk, Expected};

const SECTOR: usize = 512;
/// Subsets that are played of every epoch.
const SUBSETS: u32 = 3;
/// States that are kept for another judge.
const SAMPLES: u64 = 9;

/// A state in which a view shows what it may not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation(pub String);

/// What a replay met.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Entries of the log.
    pub entries: usize,
    /// Writes among them.
    pub writes: usize,
    /// Epochs with writes that a flush ended.
    pub epochs: usize,
    /// The most writes in an epoch.
    pub longest: usize,
    /// Subsets of epochs that were looked at.
    pub subsets: usize,
    /// Times that a store was found torn.
    pub torn: usize,
}

/// A volume in a state that a crash could have left, and what nbdsnap shows of it.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Where in the log.
    pub what: String,
    /// Bytes in a chunk.
    pub chunk: u64,
    /// The origin.
    pub origin: Vec<u8>,
    /// A store.
    pub cow: Vec<u8>,
    /// Its snapshot.
    pub shown: Vec<u8>,
}

/// The slice of an origin (no snapshot) or of a store.
pub fn slice_name(volume: usize, snapshot: Option<usize>) -> String {
    match snapshot {
        None => format!("v{volume}.o"),
        Some(n) => format!("v{volume}.s{n}"),
    }
}

/// Where a write of the log goes.
#[derive(Clone, Debug)]
struct Write {
    volume: usize,
    snapshot: Option<usize>,
    range: Range<usize>,
    data: Vec<u8>,
    durable: bool,
}

/// A write, and what was there before.
type Done = (Write, Vec<u8>);

/// What the next mark must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Taken(usize),
    Durable(usize, usize),
    End,
}

/// A replay under way.
#[derive(Debug)]
pub struct Replay<'a> {
    load: Load,
    slices: &'a Slices,
    disks: Vec<Disk>,
    /// Whether flushes are believed. Where not, everything up to a mark of the
    /// load is one epoch, as on a disk that lies.
    believe_flushes: bool,
    next: Next,
    /// What has been written since the last flush.
    epoch: Vec<Done>,
    random: Random,
    tally: Tally,
    samples: Vec<Sample>,
    sampled: u64,
}

impl<'a> Replay<'a> {
    /// A replay of a log of `load`, from the disks as they were before it:
    /// `slices`, named by [`slice_name`].
    pub fn new(load: Load, slices: &'a Slices) -> Self {
        let disk = |volume: usize| {
            let stores = 0..load::snapshots(load.rounds - 1);
            let cows = stores.map(|n| slices.read(&slice_name(volume, Some(n))));
            let origin = slices.read(&slice_name(volume, None));
            Disk::new(VOLUMES[volume], origin, cows.collect())
        };
        Self {
            load,
            slices,
            disks: (0..VOLUMES.len()).map(disk).collect(),
            believe_flushes: true,
            next: Next::Taken(0),
            epoch: Vec::new(),
            random: Random::new(load.seed),
            tally: Tally::default(),
            samples: Vec::new(),
            sampled: 0,
        }
    }

    /// Play as if the disk had lied about every flush.
    #[must_use]
    pub fn of_a_disk_that_lies(mut self) -> Self {
        self.believe_flushes = false;
        self
    }

    /// Play the whole log, up to the first violation.
    pub fn play(mut self, log: &[Entry]) -> Result<(Tally, Vec<Sample>), Violation> {
        for disk in &mut self.disks {
            disk.check().map_err(Violation)?;
        }
        for (n, entry) in log.iter().enumerate() {
            self.entry(entry)
                .map_err(|why| Violation(format!("entry {n} of {}: {why}", log.len())))?;
        }
        if self.next != Next::End {
            return Err(Violation(format!("the log ends before {:?}", self.next)));
        }
        self.tally.entries = log.len();
        self.tally.torn = self.disks.iter().map(|disk| disk.torn).sum();
        Ok((self.tally, self.samples))
    }

    fn entry(&mut self, entry: &Entry) -> Result<(), String> {
        if entry.flush && self.believe_flushes {
            self.end_epoch()?;
        }
        match &entry.act {
            Logged::Nothing => Ok(()),
            Logged::Mark(mark) => self.mark(mark),
            Logged::Discard { offset, len } => self.write(*offset, &vec![0; *len as usize], false),
            Logged::Write {
                offset,
                data,
                durable,
            } => self.write(*offset, data, *durable),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8], durable: bool) -> Result<(), String> {
        let (name, at) = self.slices.find(offset);
        let place = place_of(name).ok_or(format!("a write to the slice {name}"))?;
        let range = at as usize..at as usize + data.len();
        let write = Write {
            volume: place.0,
            snapshot: place.1,
            range,
            data: data.to_vec(),
            durable,
        };
        self.tally.writes += 1;
        let before = self.apply(&write);
        let checked = self.check_write(&write);
        self.epoch.push((write, before));
        checked
    }

    /// Put a write on its disk; what was there.
    fn apply(&mut self, write: &Write) -> Vec<u8> {
        let bytes = self.bytes(write);
        let before = bytes.to_vec();
        bytes.copy_from_slice(&write.data);
        before
    }

    fn bytes(&mut self, write: &Write) -> &mut [u8] {
        let disk = &mut self.disks[write.volume];
        let device = match write.snapshot {
            None => &mut disk.origin,
            Some(n) => &mut disk.cows[n].bytes,
        };
        &mut device[write.range.clone()]
    }

    fn check_write(&mut self, write: &Write) -> Result<(), String> {
        let disk = &mut self.disks[write.volume];
        let checked = match write.snapshot {
            None => disk.check_origin(&write.range),
            Some(n) => disk.check_cow_write(n, &write.range),
        };
        checked.map_err(|why| format!("volume {}: {why}", write.volume))
    }

    /// A flush has ended: what was written until then is durable. Before that,
    /// a crash could have left any subset of it.
    fn end_epoch(&mut self) -> Result<(), String> {
        let epoch = std::mem::take(&mut self.epoch);
        if epoch.is_empty() {
            return Ok(());
        }
        self.tally.epochs += 1;
        self.tally.longest = self.tally.longest.max(epoch.len());
        for (write, before) in epoch.iter().rev() {
            self.bytes(write).copy_from_slice(before);
        }
        for subset in 0..SUBSETS {
            self.play_subset(&epoch)
                .map_err(|why| format!("a subset of the {} writes before: {why}", epoch.len()))?;
            self.sample(&epoch, &format!("subset {subset}"));
            for (write, before) in epoch.iter().rev() {
                self.bytes(write).copy_from_slice(before);
            }
        }
        for (write, _) in &epoch {
            self.apply(write);
        }
        self.check_epoch(&epoch)?;
        self.sample(&epoch, "flush");
        Ok(())
    }

    fn play_subset(&mut self, epoch: &[Done]) -> Result<(), String> {
        self.tally.subsets += 1;
        let kept_in_eight = self.random.between(1, 7);
        for (write, _) in epoch {
            let kept = self.random.below(8) < kept_in_eight;
            if write.durable {
                self.apply(write);
            } else if self.random.one_in(4) {
                let sectors: Vec<bool> = (0..write.data.len() / SECTOR)
                    .map(|_| self.random.one_in(2))
                    .collect();
                let bytes = self.bytes(write);
                for (n, kept) in sectors.into_iter().enumerate() {
                    let sector = n * SECTOR..(n + 1) * SECTOR;
                    if kept {
                        bytes[sector.clone()].copy_from_slice(&write.data[sector]);
                    }
                }
            } else if kept {
                self.apply(write);
            }
        }
        self.check_epoch(epoch)
    }

    /// Look at all that the writes of an epoch may have changed: the stores first,
    /// since they say where the snapshots lie.
    fn check_epoch(&mut self, epoch: &[Done]) -> Result<(), String> {
        let stores = epoch
            .iter()
            .filter_map(|(w, _)| Some((w.volume, w.snapshot?)));
        for (volume, n) in stores.collect::<BTreeSet<_>>() {
            self.disks[volume]
                .check_cow(n)
                .map_err(|why| format!("volume {volume}: {why}"))?;
        }
        let mut origins = epoch.iter().filter(|(w, _)| w.snapshot.is_none());
        origins.try_for_each(|(write, _)| self.check_write(write))
    }

    /// Keep the state of one volume, each with the same chance.
    fn sample(&mut self, epoch: &[Done], what: &str) {
        let (write, _) = &epoch[self.random.below(epoch.len() as u64) as usize];
        let volume = write.volume;
        let disk = &self.disks[volume];
        let any = self.random.below(disk.cows.len() as u64) as usize;
        let n = write.snapshot.unwrap_or(any);
        if disk.cows[n].expected.is_none() {
            return;
        }
        self.sampled += 1;
        let place = self.random.below(self.sampled);
        if self.sampled > SAMPLES && place >= SAMPLES {
            return;
        }
        let Some(shown) = disk.shown(n) else {
            return;
        };
        let sample = Sample {
            what: format!(
                "epoch {}, {what}, volume {volume}, snapshot {n}",
                self.tally.epochs
            ),
            chunk: disk.shape.chunk,
            origin: disk.origin.clone(),
            cow: disk.cows[n].bytes.clone(),
            shown,
        };
        if self.samples.len() < SAMPLES as usize {
            self.samples.push(sample);
        } else {
            self.samples[place as usize] = sample;
        }
    }

    fn mark(&mut self, mark: &str) -> Result<(), String> {
        if !self.believe_flushes {
            self.end_epoch()?;
        }
        match self.next {
            Next::Taken(round) if mark == load::taken(round) => {
                self.snapshots_taken(round);
                self.begin(round, 0);
            }
            Next::Durable(round, segment) if mark == load::durable(round, segment) => {
                self.end(round, segment);
                if segment + 1 < SEGMENTS {
                    self.begin(round, segment + 1);
                } else if round + 1 < self.load.rounds {
                    self.next = Next::Taken(round + 1);
                } else {
                    self.next = Next::End;
                }
            }
            Next::End if mark == END => {}
            next => return Err(format!("the mark {mark} instead of {next:?}")),
        }
        // From now on the views may show less than before.
        let mut disks = self.disks.iter_mut().enumerate();
        disks.try_for_each(|(volume, disk)| {
            let fault = |why| format!("at {mark}: volume {volume}: {why}");
            disk.check().map_err(fault)
        })
    }

    fn snapshots_taken(&mut self, round: usize) {
        for disk in &mut self.disks {
            let image = disk.expected.settled().to_vec();
            for cow in &mut disk.cows[..load::snapshots(round)] {
                let now = || Expected::exactly(image.clone());
                cow.expected.get_or_insert_with(now);
            }
        }
    }

    fn begin(&mut self, round: usize, segment: usize) {
        self.next = Next::Durable(round, segment);
        for (volume, disk) in self.disks.iter_mut().enumerate() {
            let waves = self.load.waves(volume, round, segment);
            disk.expected.begin(0, &waves);
            for (n, cow) in disk.cows.iter_mut().enumerate() {
                if let Some(expected) = &mut cow.expected {
                    expected.begin(n + 1, &waves);
                }
            }
        }
    }

    fn end(&mut self, round: usize, segment: usize) {
        for (volume, disk) in self.disks.iter_mut().enumerate() {
            let waves = self.load.waves(volume, round, segment);
            disk.expected.end(0, &waves);
            for (n, cow) in disk.cows.iter_mut().enumerate() {
                if let Some(expected) = &mut cow.expected {
                    expected.end(n + 1, &waves);
                }
            }
        }
    }
}

/// The other way from [`slice_name`].
fn place_of(name: &str) -> Option<(usize, Option<usize>)> {
    let (volume, device) = name.strip_prefix('v')?.split_once('.')?;
    let snapshot = match device {
        "o" => None,
        store => Some(store.strip_prefix('s')?.parse().ok()?),
    };
    Some((volume.parse().ok()?, snapshot))
}
