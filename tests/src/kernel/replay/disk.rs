//! The disk of a replay: origins and COW stores as byte arrays, what each view
//! shows of them when nbdsnap's engine opens the stores, and what it may show.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

use bytes::Bytes;
use nbdsnap_engine::{
    Access, Action, Device, DiskError, Extent, OpenError, Outcome, Store, StoreIo, StoreKind,
    StoreSize, View, Volume, VolumeConfig,
};

use crate::kernel::load::{Sent, Shape};
use crate::kernel::play::{Act, content};
use crate::store_bytes;

const SECTOR: usize = 512;

/// What a view may show: everything up to the last mark, and of the segment that
/// is being played, for each sector, any of the writes to it, or none.
#[derive(Clone, Debug)]
pub struct Expected {
    settled: Vec<u8>,
    /// Sector by number: the bytes that the segment's writes have for it.
    alternatives: BTreeMap<usize, Vec<Vec<u8>>>,
}

impl Expected {
    /// A view that shows exactly this.
    pub fn exactly(image: Vec<u8>) -> Self {
        Self {
            settled: image,
            alternatives: BTreeMap::new(),
        }
    }

    /// What the view shows where nothing is under way.
    pub fn settled(&self) -> &[u8] {
        &self.settled
    }

    /// A segment begins: these requests to the view `view` are under way.
    pub fn begin(&mut self, view: usize, waves: &[Vec<Sent>]) {
        each_write(view, waves, |offset, bytes| {
            for (n, sector) in bytes.chunks(SECTOR).enumerate() {
                let number = offset / SECTOR + n;
                let known = self.alternatives.entry(number).or_default();
                known.push(sector.to_vec());
            }
        });
    }

    /// All of them have been answered and are durable.
    pub fn end(&mut self, view: usize, waves: &[Vec<Sent>]) {
        self.alternatives.clear();
        each_write(view, waves, |offset, bytes| {
            self.settled[offset..offset + bytes.len()].copy_from_slice(bytes);
        });
    }

    /// Look at `found`, which lies at `offset`: the first sector that may not be so.
    fn check(&self, offset: usize, found: &[u8]) -> Result<(), String> {
        if self.settled[offset..offset + found.len()] == *found {
            return Ok(());
        }
        let mut sectors = found.chunks(SECTOR).zip(offset / SECTOR..);
        let wrong = sectors.find(|(sector, number)| {
            let settled = &self.settled[number * SECTOR..][..sector.len()];
            let others = self.alternatives.get(number);
            settled != *sector && !others.is_some_and(|all| all.iter().any(|a| a == sector))
        });
        wrong.map_or(Ok(()), |(sector, number)| {
            let others = self.alternatives.get(&number).map_or(0, Vec::len);
            Err(format!(
                "sector {number} begins with {:x?}, and should with {:x?} or as {others} writes do",
                &sector[..8],
                &self.settled[number * SECTOR..][..8]
            ))
        })
    }
}

fn each_write(view: usize, waves: &[Vec<Sent>], mut what: impl FnMut(usize, &[u8])) {
    for sent in waves.iter().flatten().filter(|sent| sent.view == view) {
        if let Act::Write { offset, len, fill } = sent.act {
            what(offset as usize, &content(fill, len));
        }
    }
}

/// A snapshot's store.
#[derive(Clone, Debug)]
pub struct CowStore {
    /// The store.
    pub bytes: Vec<u8>,
    /// What the snapshot may show, once it has been taken.
    pub expected: Option<Expected>,
    /// Where the snapshot's bytes lie, as of the last look at the store.
    map: Option<Vec<Extent>>,
}

/// An origin with its stores.
#[derive(Clone, Debug)]
pub struct Disk {
    /// What it is like.
    pub shape: Shape,
    /// The origin.
    pub origin: Vec<u8>,
    /// What the origin may show.
    pub expected: Expected,
    /// Its stores.
    pub cows: Vec<CowStore>,
    /// Stores that were found torn, and repaired on a copy.
    pub torn: usize,
}

impl Disk {
    /// An origin, and stores that are not there yet.
    pub fn new(shape: Shape, origin: Vec<u8>, cows: Vec<Vec<u8>>) -> Self {
        let cow = |bytes| CowStore {
            bytes,
            expected: None,
            map: None,
        };
        Self {
            shape,
            expected: Expected::exactly(origin.clone()),
            origin,
            cows: cows.into_iter().map(cow).collect(),
            torn: 0,
        }
    }

    /// What is wrong after bytes of the origin have changed: on the origin and on
    /// every snapshot.
    pub fn check_origin(&self, range: &Range<usize>) -> Result<(), String> {
        let found = &self.origin[range.clone()];
        self.expected
            .check(range.start, found)
            .map_err(|why| format!("the origin: {why}"))?;
        (0..self.cows.len()).try_for_each(|n| self.check_snapshot(n, range))
    }

    /// What is wrong after bytes of a store have changed. Chunks change what the
    /// snapshot shows where they are mapped; for anything else it is opened again.
    pub fn check_cow_write(&mut self, n: usize, range: &Range<usize>) -> Result<(), String> {
        let (chunk, sectors) = (self.shape.chunk, self.shape.chunk / SECTOR as u64);
        let is_chunks = range.clone().step_by(SECTOR).all(|at| {
            let at = at as u64;
            at >= chunk && !store_bytes::is_in_area(at, sectors)
        });
        if is_chunks {
            self.check_chunks(n, range)
        } else {
            self.check_cow(n)
        }
    }

    /// The parts of a snapshot that lie in a range of its store.
    fn check_chunks(&self, n: usize, range: &Range<usize>) -> Result<(), String> {
        let mut at = 0;
        for extent in self.cows[n].map.iter().flatten() {
            let (start, len) = (extent.offset as usize, extent.len as usize);
            if extent.device != Device::Origin {
                let from = range.start.clamp(start, start + len) - start;
                let to = range.end.clamp(start, start + len) - start;
                self.check_snapshot(n, &(at + from..at + to))?;
            }
            at += len;
        }
        Ok(())
    }

    /// What is wrong with a store: it is opened again, and all of the snapshot
    /// looked at.
    pub fn check_cow(&mut self, n: usize) -> Result<(), String> {
        let opened = open(&self.cows[n].bytes, self.origin.len() as u64);
        let cow = &mut self.cows[n];
        cow.map = match (opened, &cow.expected) {
            (Ok((map, torn)), _) => {
                self.torn += usize::from(torn);
                Some(map)
            }
            (Err(Fault::New), None) => None,
            (Err(fault), _) => return Err(format!("snapshot {n}: {fault:?}")),
        };
        self.check_snapshot(n, &(0..self.origin.len()))
    }

    /// Everything is looked at again.
    pub fn check(&mut self) -> Result<(), String> {
        (0..self.cows.len()).try_for_each(|n| self.check_cow(n))?;
        self.check_origin(&(0..self.origin.len()))
    }

    /// A range of what the snapshot shows. One that has not been taken yet either
    /// has no store or shows what the origin shows.
    fn check_snapshot(&self, n: usize, range: &Range<usize>) -> Result<(), String> {
        let cow = &self.cows[n];
        let Some(map) = &cow.map else {
            return Ok(());
        };
        let expected = cow.expected.as_ref().unwrap_or(&self.expected);
        let mut at = 0;
        for extent in map {
            let end = at + extent.len as usize;
            let (from, to) = (at.max(range.start), end.min(range.end));
            if from < to {
                let found = &self.piece(cow, extent)[from - at..to - at];
                expected
                    .check(from, found)
                    .map_err(|why| format!("snapshot {n}: {why}"))?;
            }
            at = end;
        }
        Ok(())
    }

    /// All that a snapshot shows; `None` if it has no store.
    pub fn shown(&self, n: usize) -> Option<Vec<u8>> {
        let cow = &self.cows[n];
        let pieces = cow.map.as_ref()?.iter();
        Some(pieces.flat_map(|e| self.piece(cow, e)).copied().collect())
    }

    fn piece<'a>(&'a self, cow: &'a CowStore, extent: &Extent) -> &'a [u8] {
        let device = match extent.device {
            Device::Origin => &self.origin,
            Device::Cow(_) => &cow.bytes,
        };
        &device[extent.offset as usize..][..extent.len as usize]
    }
}

/// Why a snapshot cannot be shown.
#[derive(Debug, PartialEq, Eq)]
enum Fault {
    /// Nobody made a store there.
    New,
    /// The store is no good.
    Bad(String),
}

/// Where the bytes of the snapshot lie, as the engine opens its store, and
/// whether the store was torn. A torn one is repaired, on a copy, which changes
/// nothing of what it shows.
fn open(cow: &[u8], origin_bytes: u64) -> Result<(Vec<Extent>, bool), Fault> {
    let mut memory = Memory(Cow::Borrowed(cow));
    let store = open_store(&mut memory, Access::ReadOnly, origin_bytes)?;
    let torn = store.torn_area().is_some();
    let map = map(store, origin_bytes);
    if torn {
        open_store(&mut memory, Access::ReadWrite, origin_bytes)?;
        let repaired = open_store(&mut memory, Access::ReadOnly, origin_bytes)?;
        if repaired.torn_area().is_some() || self::map(repaired, origin_bytes) != map {
            return Err(Fault::Bad("its repair changed it".to_owned()));
        }
    }
    Ok((map, torn))
}

fn open_store(memory: &mut Memory<'_>, access: Access, origin_bytes: u64) -> Result<Store, Fault> {
    let bytes = memory.0.len() as u64;
    let size = StoreSize {
        ready: bytes,
        limit: bytes,
        step: 0,
    };
    let opened = Store::open(StoreKind::Persistent, size, origin_bytes, access, memory);
    match opened {
        Err(OpenError::New) => Err(Fault::New),
        Err(error) => Err(Fault::Bad(error.to_string())),
        Ok(store) if store.is_invalid() => Err(Fault::Bad("invalid".to_owned())),
        Ok(store) => Ok(store),
    }
}

fn map(store: Store, origin_bytes: u64) -> Vec<Extent> {
    let mut volume = Volume::new(VolumeConfig {
        origin_bytes,
        copy_memory: 1 << 20,
        copy_piece: 1 << 16,
    });
    let id = volume.attach_snapshot(store);
    volume
        .map(View::Snapshot(id), 0, origin_bytes, usize::MAX)
        .expect("a valid snapshot can be read")
}

/// A store in memory.
struct Memory<'a>(Cow<'a, [u8]>);

impl StoreIo for Memory<'_> {
    fn act(&mut self, action: Action) -> Outcome {
        let range = |offset: u64, len: u64| offset as usize..(offset + len) as usize;
        match action {
            Action::Read { offset, len } => {
                return Ok(Bytes::copy_from_slice(&self.0[range(offset, len)]));
            }
            Action::Write { offset, data } => {
                let bytes = data.concat();
                self.0.to_mut()[range(offset, bytes.len() as u64)].copy_from_slice(&bytes);
            }
            Action::WriteZeroes { offset, len, .. } => self.0.to_mut()[range(offset, len)].fill(0),
            Action::Flush => {}
            other => panic!("opening a store does not ask for {other:?}"),
        }
        Ok(Bytes::new())
    }

    fn keep_copy(&mut self, _: u64, _: &[u8]) -> Result<(), DiskError> {
        Ok(())
    }
}
