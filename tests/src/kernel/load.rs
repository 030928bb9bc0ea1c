//! A random load on several volumes at once, each with several snapshots, that
//! goes on over restarts of the server: what the player inside the virtual
//! machine sends, and the replay outside expects.
//!
//! A [`Load`] has rounds, one for each start of the server, which begins with new
//! snapshots; a round has segments, after each of which everything has been
//! answered and made durable; a segment has waves of requests that are in flight
//! together.

use super::play::Act;
use crate::harness::random::Random;

const SECTOR: u64 = 512;
const PAGE: u64 = 4096;

/// Segments of a round.
pub const SEGMENTS: usize = 3;
/// Waves of a segment, for each volume.
const WAVES: u64 = 5;
/// Requests of a wave, at most.
const REQUESTS: u64 = 8;
/// The longest write, if a chunk is shorter.
const LONGEST: u64 = 24 << 10;

/// A disk of the load.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Bytes in a chunk of each of its snapshots.
    pub chunk: u64,
    /// Bytes of the origin. Of a device of whole pages the kernel writes a page at
    /// a time, of any other a sector: each is an entry of the log.
    pub bytes: u64,
    /// Bytes of each of its stores.
    pub cow_bytes: u64,
}

/// The disks: areas of 32, of 256 and of 1024 exceptions; a disk and stores that
/// the kernel writes in sectors, and two in pages, one of which ends within a chunk.
pub const VOLUMES: [Shape; 3] = [
    Shape {
        chunk: SECTOR,
        bytes: 1029 * SECTOR,
        cow_bytes: 1205 * SECTOR,
    },
    Shape {
        chunk: 8 * SECTOR,
        bytes: 512 * PAGE,
        cow_bytes: 600 * PAGE,
    },
    Shape {
        chunk: 32 * SECTOR,
        bytes: 1025 * PAGE,
        cow_bytes: 1200 * PAGE,
    },
];

/// A request to a view of a volume: 0 is the origin, `n` its snapshot `n - 1`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sent {
    /// The view.
    pub view: usize,
    /// The request.
    pub act: Act,
}

/// All that the player and the replay need to know.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// The seed of all choices.
    pub seed: u64,
    /// Starts of the server.
    pub rounds: usize,
}

/// Snapshots of each volume in a round: two in the first, one more in each later one.
pub const fn snapshots(round: usize) -> usize {
    round + 2
}

/// Whether the load writes to this snapshot. The others stay as they were taken.
const fn is_written(snapshot: usize) -> bool {
    snapshot % 2 == 1
}

/// The mark in the log when a round's snapshots exist.
pub fn taken(round: usize) -> String {
    format!("taken.{round}")
}

/// The mark in the log when all of a segment is durable.
pub fn durable(round: usize, segment: usize) -> String {
    format!("durable.{round}.{segment}")
}

impl Load {
    /// The waves of one volume in a segment: within a wave no two writes touch
    /// the same sector of a view.
    pub fn waves(self, volume: usize, round: usize, segment: usize) -> Vec<Vec<Sent>> {
        let number = (round * SEGMENTS + segment) * VOLUMES.len() + volume;
        let mut random = Random::new(self.seed ^ (number as u64 + 1) << 40);
        let shape = VOLUMES[volume];
        (0..WAVES)
            .map(|_| wave(shape, snapshots(round), &mut random))
            .collect()
    }
}

fn wave(shape: Shape, snapshots: usize, random: &mut Random) -> Vec<Sent> {
    let mut wave: Vec<Sent> = Vec::new();
    for _ in 0..random.between(1, REQUESTS) {
        let view = if random.one_in(4) {
            let written: Vec<usize> = (0..snapshots).filter(|&s| is_written(s)).collect();
            1 + written[random.below(written.len() as u64) as usize]
        } else {
            0
        };
        let act = if random.one_in(12) {
            Act::Flush
        } else {
            let (offset, len) = place(shape, random);
            let fill = random.bits();
            Act::Write { offset, len, fill }
        };
        let sent = Sent { view, act };
        if !wave.iter().any(|other| collide(&sent, other)) {
            wave.push(sent);
        }
    }
    wave
}

fn place(shape: Shape, random: &mut Random) -> (u64, u64) {
    let Shape { chunk, bytes, .. } = shape;
    let any_chunk = random.below(bytes.div_ceil(chunk)) * chunk;
    let any_sector = random.below(bytes / SECTOR) * SECTOR;
    let (offset, len) = match random.below(4) {
        0 | 1 => (any_chunk, chunk),
        2 => (any_sector, random.between(1, 12) * SECTOR),
        _ => {
            let most = (LONGEST / chunk).max(3);
            (any_chunk, random.between(2, most) * chunk)
        }
    };
    (offset, len.min(bytes - offset))
}

fn collide(one: &Sent, other: &Sent) -> bool {
    let range = |act: &Act| match *act {
        Act::Write { offset, len, .. } => offset..offset + len,
        Act::Flush => 0..0,
    };
    let (a, b) = (range(&one.act), range(&other.act));
    one.view == other.view && a.start < b.end && b.start < a.end
}
