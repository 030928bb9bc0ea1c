//! What power cuts leave of an area, and what they cannot leave.
//!
//! An area on a disk that keeps, for each 512-byte sector by itself, any of the
//! versions written since the last flush. It is appended to in groups and cut
//! at its end by merges; power cuts come at any time, and the area goes on with
//! what they left. Whatever happens, the decoder must call no image corrupt,
//! and must call corrupt what no such disk can hold.

use std::collections::HashMap;

use nbdsnap_format::{
    AreaDecoder, AreaEnd, Bounds, ChunkSize, CowChunk, Exception, OriginChunk, Tail,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

type Sector = [u8; 512];

/// A store large enough for all that the tests allocate.
fn bounds(chunk_size: ChunkSize) -> Bounds {
    Bounds::new(chunk_size, 20_000 * chunk_size.bytes(), None)
}

fn decode(chunk_size: ChunkSize, area: &[u8]) -> (Vec<Exception>, AreaEnd) {
    let mut decoder = AreaDecoder::new(bounds(chunk_size));
    let found = decoder.push(area).collect();
    (found, decoder.finish())
}

/// What happens to an area.
#[derive(Clone, Debug)]
enum Step {
    /// A group of exceptions, and a write of the area.
    Append(usize),
    /// A merge takes exceptions off the end, and writes the area.
    Cut(usize),
    /// A flush.
    Flush,
    /// The power fails. Of each sector the version survives that a number picks.
    PowerCut(Vec<u8>),
}

/// Who goes on after a power cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Opener {
    /// This program: the tail is zeroed, durably.
    Scrubs,
    /// The kernel: the stale entries stay, in memory too.
    LeavesStale,
}

/// An area in memory and on disk.
struct Area {
    chunk_size: ChunkSize,
    memory: Vec<u8>,
    entries: usize,
    next_free: CowChunk,
    /// Of each sector: what is durable, then what was written since.
    disk: Vec<Vec<Sector>>,
}

impl Area {
    fn new(chunk_size: ChunkSize) -> Self {
        let sectors = chunk_size.sectors() as usize;
        Self {
            chunk_size,
            memory: vec![0; 512 * sectors],
            entries: 0,
            next_free: CowChunk(2),
            disk: vec![vec![[0; 512]]; sectors],
        }
    }

    fn append(&mut self, count: usize) {
        let room = self.memory.len() / 16 - self.entries;
        for _ in 0..count.min(room) {
            let exception = Exception {
                // Any origin chunk: 0 too.
                old: OriginChunk(self.next_free.0 * 7919 % 1009),
                new: self.next_free,
            };
            self.memory[16 * self.entries..][..16].copy_from_slice(&exception.encode());
            self.entries += 1;
            self.next_free = bounds(self.chunk_size)
                .layout()
                .next_free(Some(self.next_free));
        }
        self.write();
    }

    fn cut(&mut self, count: usize) {
        let left = self.entries.saturating_sub(count);
        self.memory[16 * left..16 * self.entries].fill(0);
        self.entries = left;
        self.write();
    }

    fn write(&mut self) {
        for (versions, sector) in self.disk.iter_mut().zip(self.memory.as_chunks().0) {
            versions.push(*sector);
        }
    }

    fn flush(&mut self) {
        for versions in &mut self.disk {
            versions.drain(..versions.len() - 1);
        }
    }

    /// Lose power, and find this on the disk.
    fn power_cut(&mut self, picks: &[u8]) -> Vec<u8> {
        for (versions, pick) in self.disk.iter_mut().zip(picks) {
            *versions = vec![versions[usize::from(*pick) % versions.len()]];
        }
        self.disk.concat().concat()
    }

    /// Go on with `image`, of which `live` are the exceptions.
    fn open(&mut self, opener: Opener, image: Vec<u8>, live: &[Exception]) {
        self.memory = image;
        self.entries = live.len();
        self.next_free = bounds(self.chunk_size)
            .layout()
            .next_free(live.iter().map(|e| e.new).max());
        if opener == Opener::Scrubs {
            self.memory[16 * self.entries..].fill(0);
            self.write();
            self.flush();
        }
    }
}

/// What an image turned out to be.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Seen {
    Full,
    Clean,
    Torn,
}

/// Judge an image that a power cut left; fails for one that is called corrupt.
fn judge(end: AreaEnd) -> Result<Seen, TestCaseError> {
    match end {
        AreaEnd::Full => Ok(Seen::Full),
        AreaEnd::Ended { entries, tail } => match tail {
            Tail::Clean => Ok(Seen::Clean),
            Tail::Torn { from_entry } => {
                prop_assert!(from_entry.is_multiple_of(32) && from_entry > entries);
                Ok(Seen::Torn)
            }
            Tail::Corrupt { .. } => Err(TestCaseError::fail("a tear is called corruption")),
        },
    }
}

fn step(chunk_size: ChunkSize, opener: Opener) -> impl Strategy<Value = Step> {
    let cuts = match opener {
        Opener::Scrubs => 2,
        // A merge of a list whose stale entries came back to life is a matter of
        // its own: such a store is damaged already.
        Opener::LeavesStale => 0,
    };
    // Areas of every size fill up now and then.
    let group = 1..20 + 8 * chunk_size.sectors() as usize;
    prop_oneof![
        6 => group.clone().prop_map(Step::Append),
        cuts => group.prop_map(Step::Cut),
        2 => Just(Step::Flush),
        3 => prop::collection::vec(any::<u8>(), 32).prop_map(Step::PowerCut),
    ]
}

/// Play the steps; counts what power cuts left.
fn play(
    chunk_size: ChunkSize,
    opener: Opener,
    steps: Vec<Step>,
    seen: &mut HashMap<Seen, u64>,
) -> Result<(), TestCaseError> {
    let mut area = Area::new(chunk_size);
    for step in steps {
        match step {
            Step::Append(count) => area.append(count),
            Step::Cut(count) => area.cut(count),
            Step::Flush => area.flush(),
            Step::PowerCut(picks) => {
                let durable: Vec<Sector> = area.disk.iter().map(|v| v[0]).collect();
                let only_appended = area.disk.iter().all(|versions| {
                    let entries = |v: &Sector| {
                        v.as_chunks::<16>()
                            .0
                            .iter()
                            .filter(|e| **e != [0; 16])
                            .count()
                    };
                    versions.is_sorted_by_key(entries)
                });
                let image = area.power_cut(&picks);
                let (live, end) = decode(chunk_size, &image);
                *seen.entry(judge(end)?).or_default() += 1;
                if only_appended {
                    // What was flushed is still there.
                    let (flushed, _) = decode(chunk_size, &durable.concat());
                    prop_assert_eq!(&live[..flushed.len()], flushed);
                }
                area.open(opener, image, &live);
                let (again, end) = decode(chunk_size, &area.memory);
                prop_assert_eq!(again, live);
                if opener == Opener::Scrubs {
                    prop_assert_ne!(judge(end)?, Seen::Torn);
                }
            }
        }
    }
    Ok(())
}

/// Play many runs at each chunk size from 1 to 32 sectors.
fn no_tear_is_corruption(opener: Opener) {
    for shift in 0..=5 {
        let chunk_size = ChunkSize::from_sectors(1 << shift).unwrap();
        let mut runner = TestRunner::new(Config {
            cases: 3000,
            failure_persistence: None,
            ..Config::default()
        });
        let seen = std::cell::RefCell::new(HashMap::new());
        runner
            .run(
                &prop::collection::vec(step(chunk_size, opener), 1..40),
                |steps| play(chunk_size, opener, steps, &mut seen.borrow_mut()),
            )
            .unwrap();
        let seen = seen.into_inner();
        let count = |kind| seen.get(&kind).copied().unwrap_or(0);
        // Some hundreds of each are usual: a zero is no bad luck.
        assert!(count(Seen::Clean) > 0, "{chunk_size}: {seen:?}");
        assert!(count(Seen::Full) > 0, "{chunk_size}: {seen:?}");
        if shift == 0 {
            assert_eq!(count(Seen::Torn), 0, "one sector cannot tear");
        } else {
            assert!(count(Seen::Torn) > 0, "{chunk_size}: {seen:?}");
        }
    }
}

#[test]
fn no_tear_is_corruption_where_every_open_scrubs() {
    no_tear_is_corruption(Opener::Scrubs);
}

#[test]
fn no_tear_is_corruption_where_the_kernel_went_on_without_a_scrub() {
    no_tear_is_corruption(Opener::LeavesStale);
}

/// An area with `count` exceptions, and which sectors lie behind that in which
/// the list ends.
fn filled(chunk_size: ChunkSize, count: usize) -> (Vec<u8>, std::ops::Range<usize>) {
    let mut area = Area::new(chunk_size);
    area.append(count);
    (area.memory, count / 32 + 1..chunk_size.sectors() as usize)
}

fn is_corrupt(end: AreaEnd) -> bool {
    let AreaEnd::Ended { tail, .. } = end else {
        return false;
    };
    matches!(tail, Tail::Corrupt { .. })
}

/// A chunk size from 2 to 32 sectors, and exceptions that leave a sector free
/// behind the one in which their list ends.
fn unfilled() -> impl Strategy<Value = (ChunkSize, usize)> {
    (1..=5_u32).prop_flat_map(|shift| {
        let chunk_size = ChunkSize::from_sectors(1 << shift).unwrap();
        let entries = chunk_size.exceptions_per_area() as usize;
        (Just(chunk_size), 0..entries - 32)
    })
}

proptest! {
    #![proptest_config(Config { cases: 2000, failure_persistence: None, ..Config::default() })]

    /// Any byte in the sector in which the list ends, at the end or behind it.
    #[test]
    fn a_byte_behind_the_end_in_its_sector_is_corruption(
        (chunk_size, count) in unfilled(),
        place in any::<prop::sample::Index>(),
        byte in 1..=255_u8,
    ) {
        let (mut area, later) = filled(chunk_size, count);
        // A byte of the end's own new_chunk would make it an exception.
        let places: Vec<usize> = (16 * count..512 * later.start)
            .filter(|at| !(16 * count + 8..16 * count + 16).contains(at))
            .collect();
        let at = places[place.index(places.len())];
        area[at] = byte;
        let (live, end) = decode(chunk_size, &area);
        prop_assert_eq!(live.len(), count);
        let entry = at as u64 / 16;
        prop_assert_eq!(end, AreaEnd::Ended { entries: count as u64, tail: Tail::Corrupt { entry } });
    }

    /// Good entries that begin anywhere but at the start of a sector.
    #[test]
    fn entries_that_begin_inside_a_sector_are_corruption(
        (chunk_size, count) in unfilled(),
        sector in any::<prop::sample::Index>(),
        from in 1..32_usize,
        length in 1..32_usize,
    ) {
        let (mut area, later) = filled(chunk_size, count);
        let first = 32 * (later.start + sector.index(later.len())) + from;
        let stale = Exception { old: OriginChunk(3), new: CowChunk(5) }.encode();
        for entry in area.as_chunks_mut::<16>().0.iter_mut().skip(first).take(length) {
            *entry = stale;
        }
        let (_, end) = decode(chunk_size, &area);
        let tail = Tail::Corrupt { entry: first as u64 };
        prop_assert_eq!(end, AreaEnd::Ended { entries: count as u64, tail });
    }

    /// Random bytes in a later sector, all of it or some, from its start on.
    #[test]
    fn garbage_behind_the_end_is_corruption(
        (chunk_size, count) in unfilled(),
        sector in any::<prop::sample::Index>(),
        garbage in prop::collection::vec(any::<u8>(), 16..=512),
    ) {
        let (mut area, later) = filled(chunk_size, count);
        let at = 512 * (later.start + sector.index(later.len()));
        area[at..][..garbage.len()].copy_from_slice(&garbage);
        prop_assert!(is_corrupt(decode(chunk_size, &area).1));
    }
}
