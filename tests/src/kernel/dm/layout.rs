//! The disks of a sequence, and what lies where on them: for each stack a base, made
//! of pieces or stripes, and devices for stores, small and large. All places are
//! disjoint, so that nothing is reached in two ways.

use std::path::{Path, PathBuf};

use super::table::{Line, On, Table, Target};
use crate::harness::random::Random;

const SECTOR: u64 = 512;

/// Disks of a sequence.
pub const DISKS: usize = 3;

/// Sectors of a disk.
pub const DISK: u64 = 32 << 11;

/// What lies before belongs to nobody: no store begins where a disk begins.
const FIRST: u64 = 64;

/// The chunk sizes that snapshots are given.
pub const CHUNKS: [u64; 5] = [1, 4, 8, 16, 32];

/// A device for a store.
#[derive(Clone, Debug)]
pub struct Cow {
    /// Its name.
    pub name: String,
    /// Its table.
    pub table: Table,
    /// It has room for every chunk of the base, whatever the chunk size.
    pub is_large: bool,
}

/// A base and the devices for its snapshots' stores.
#[derive(Clone, Debug)]
pub struct Stack {
    /// The tables that the base can have: the same sectors in the same order.
    pub base: Vec<Table>,
    /// Its stores, and those of snapshots of its snapshots.
    pub cows: Vec<Cow>,
}

/// The disks with what lies on them.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Each a base with its stores.
    pub stacks: Vec<Stack>,
    /// Where unimportant devices may lie.
    pub scratch: On,
    /// From this sector of it on, to the end of the disk.
    pub scratch_start: u64,
    next: [u64; DISKS],
}

impl Layout {
    /// Places from chance.
    pub fn new(stacks: usize, random: &mut Random) -> Self {
        let mut layout = Self {
            stacks: Vec::new(),
            scratch: On::Disk('a'),
            scratch_start: 0,
            next: [FIRST; DISKS],
        };
        for number in 0..stacks {
            let stack = layout.stack(number, random);
            layout.stacks.push(stack);
        }
        layout.scratch_start = layout.next[0];
        layout
    }

    /// Sectors of the part for unimportant devices.
    pub fn scratch_len(&self) -> u64 {
        DISK - self.scratch_start
    }

    fn stack(&mut self, number: usize, random: &mut Random) -> Stack {
        let (base, sectors) = self.base(random);
        let cows = (0..4)
            .map(|n| {
                // Everything copied, in chunks of one sector, with the metadata.
                let is_large = random.one_in(2);
                let len = if is_large {
                    (sectors + sectors / 16).next_multiple_of(96) + 288
                } else {
                    without_a_brim(random.between(96, 700))
                };
                Cow {
                    name: format!("c{number}{n}"),
                    table: self.store(len, random),
                    is_large,
                }
            })
            .collect();
        Stack { base, cows }
    }

    /// The tables of a base, and its sectors.
    fn base(&mut self, random: &mut Random) -> (Vec<Table>, u64) {
        match random.below(4) {
            0 => {
                let (chunk, count) = (8 << random.below(3), random.between(2, 3));
                let each = random.between(4, 24) * chunk;
                let on = (0..count as usize).map(|disk| (on(disk), self.take(disk, each)));
                let target = Target::Striped {
                    chunk,
                    on: on.collect(),
                };
                let len = each * count;
                (vec![vec![Line { len, target }]], len)
            }
            1 => {
                let pieces: Vec<u64> = (0..3).map(|_| random.between(20, 90) * 8).collect();
                let table: Table = pieces.iter().map(|&len| self.piece(len, random)).collect();
                (vec![table], pieces.iter().sum())
            }
            _ => {
                let len = random.between(700, 2500);
                let line = self.piece(len, random);
                let cut = len / 2 / 8 * 8;
                let Target::Linear { on, start } = line.target else {
                    unreachable!("a piece is linear")
                };
                let part = |len, start| Line {
                    len,
                    target: Target::Linear { on, start },
                };
                let halves = vec![part(cut, start), part(len - cut, start + cut)];
                (vec![vec![line], halves], len)
            }
        }
    }

    fn store(&mut self, len: u64, random: &mut Random) -> Table {
        if random.one_in(4) && len.is_multiple_of(16) {
            let each = len / 2;
            let on = vec![(on(1), self.take(1, each)), (on(2), self.take(2, each))];
            let target = Target::Striped { chunk: 8, on };
            return vec![Line { len, target }];
        }
        vec![self.piece(len, random)]
    }

    /// A piece of some disk.
    fn piece(&mut self, len: u64, random: &mut Random) -> Line {
        let disk = random.below(DISKS as u64) as usize;
        let start = self.take(disk, len);
        let on = on(disk);
        Line {
            len,
            target: Target::Linear { on, start },
        }
    }

    fn take(&mut self, disk: usize, len: u64) -> u64 {
        let start = self.next[disk];
        self.next[disk] = (start + len).next_multiple_of(8) + 8;
        assert!(self.next[disk] < DISK - 4096, "the disks are too small");
        start
    }
}

fn on(disk: usize) -> On {
    On::Disk(('a'..='z').nth(disk).expect("a letter"))
}

/// A length that no chunk size divides so that the last area is full exactly at the
/// end: there the kernel loses the snapshot one chunk later than nbdsnap says that it
/// is full, and cannot open the store again.
fn without_a_brim(mut len: u64) -> u64 {
    let brim = |len: u64| {
        CHUNKS
            .iter()
            .any(|chunk| (len / chunk) % (32 * chunk + 1) <= 1)
    };
    while brim(len) {
        len += 8;
    }
    len
}

/// The disks as files in a folder, filled from a seed.
pub fn make_disks(folder: &Path, seed: u64) -> Vec<PathBuf> {
    ('a'..)
        .take(DISKS)
        .map(|letter| {
            let path = folder.join(format!("disk-{letter}"));
            let bytes = Random::new(seed ^ u64::from(letter) << 40).bytes((DISK * SECTOR) as usize);
            std::fs::write(&path, bytes).expect("a disk can be written");
            path
        })
        .collect()
}
