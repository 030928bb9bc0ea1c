//! What a seed chooses: the shape of a volume and its stores, the temper of a
//! run, and its requests one by one. Pure choices; the simulator plays them.

use nbdsnap_engine::disk::sim::{Faults, Rng};
use nbdsnap_engine::{OnFull, StoreKind};

use crate::pattern::{CELLS, Cells, SECTOR};
use crate::store_bytes;

/// How a snapshot comes into the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beginning {
    /// It exists from the start, in a store with this many exceptions.
    Preloaded(u64),
    /// It is taken during the run.
    Later,
}

/// A store that a run uses.
#[derive(Clone, Copy, Debug)]
pub struct StorePlan {
    /// P, PO or N.
    pub kind: StoreKind,
    /// Sectors in a chunk.
    pub chunk_sectors: u64,
    /// Sectors there are when it is made.
    pub ready_sectors: u64,
    /// Sectors it may grow to.
    pub limit_sectors: u64,
    /// Chunks that it grows by, at least.
    pub step_chunks: u64,
    /// How it begins.
    pub beginning: Beginning,
    /// What happens when it is full.
    pub on_full: OnFull,
}

impl StorePlan {
    /// Bytes in a chunk.
    pub fn chunk_bytes(&self) -> u64 {
        self.chunk_sectors * SECTOR
    }

    /// Whether its exceptions survive a crash.
    pub fn is_persistent(&self) -> bool {
        self.kind != StoreKind::Transient
    }

    /// Exceptions that fit when it is as large as it may become.
    pub fn capacity(&self) -> u64 {
        if self.is_persistent() {
            store_bytes::capacity(self.limit_sectors, self.chunk_sectors)
        } else {
            self.limit_sectors / self.chunk_sectors
        }
    }
}

/// Everything about a run that is chosen before it starts.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Sectors of the origin.
    pub origin_sectors: u64,
    /// The stores: mostly up to four, sometimes sixteen.
    pub stores: Vec<StorePlan>,
    /// `VolumeConfig::copy_piece`.
    pub copy_piece: u64,
    /// `VolumeConfig::copy_memory`.
    pub copy_memory: u64,
    /// Bytes of a mutation that are brought under way at a time.
    pub window: u64,
    /// Requests unanswered at once, at most.
    pub depth: usize,
    /// Requests handed in together, at most.
    pub burst: u64,
    /// How often, of 8, an operation is performed the moment it is handed out.
    pub inline: u64,
    /// How often, of 8, the ways around the queue are tried.
    pub fast: u64,
    /// How often, of 16, a crash is a kill.
    pub kills: u64,
    /// Steps of traffic before a crash, at most.
    pub steps: u64,
    /// Of 64: how many steps hand requests in; most others end operations.
    pub pressure: u64,
    /// Of 16: how many operations take their time while others overtake them.
    pub lag: u64,
    /// Of 8: how many crashes come just after an operation of a chosen kind was handed out.
    pub ambush: u64,
    /// Of 8: how many of those crashes wait for a commit that can tear.
    pub tears: u64,
    /// Of 8: how many processes begin with a write over many chunks.
    pub storms: u64,
    /// Of 64: how many steps order a merge, or meddle with one.
    pub merges: u64,
    /// Bytes that a merge copies in a step.
    pub merge_step: u64,
    /// Of 64: how many steps have one of the verbs of a live disk with them.
    pub live: u64,
    /// What fails while there is traffic.
    pub faults: Faults,
    /// What requests are like.
    pub temper: Temper,
}

/// An operation just after which a crash comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ambush {
    /// A write to the origin.
    OriginWrite,
    /// A flush of the origin.
    OriginFlush,
    /// A write to a store.
    StoreWrite,
    /// A write to an area that changes several sectors of it.
    WideCommit,
    /// A write to the header of a store.
    HeaderWrite,
    /// A flush of a store.
    StoreFlush,
    /// Growth.
    Grow,
    /// Anything.
    Any,
}

impl Ambush {
    /// One of them.
    pub fn pick(rng: &mut Rng) -> Self {
        match rng.below(12) {
            0 | 1 => Self::OriginWrite,
            2 => Self::OriginFlush,
            3 | 4 => Self::StoreWrite,
            5 => Self::WideCommit,
            6 => Self::HeaderWrite,
            7..11 => Self::StoreFlush,
            _ => Self::Grow,
        }
    }
}

/// Weights of requests.
#[derive(Clone, Debug)]
pub struct Temper {
    /// Of 16: how many go to the origin.
    pub origin: u64,
    /// Weights of read, write, zero, trim, flush.
    pub commands: [u64; 5],
    /// Of 16: how many writes carry FUA.
    pub fua: u64,
    /// Of 16: how many go to the few hot chunks.
    pub hot: u64,
    /// Where the hot chunks are, in sectors.
    pub hot_at: u64,
    /// How many chunks a long request may span.
    pub span: u64,
}

/// What a request asks, before it has an identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Read.
    Read,
    /// Write.
    Write {
        /// With FUA.
        fua: bool,
    },
    /// Write zeroes.
    Zero {
        /// With FUA.
        fua: bool,
        /// Refuse rather than be slow.
        fast_only: bool,
    },
    /// Trim.
    Trim {
        /// With FUA.
        fua: bool,
    },
    /// Flush.
    Flush,
}

impl Plan {
    /// The plan of a run.
    pub fn pick(rng: &mut Rng) -> Self {
        let large = rng.chance(1, 400);
        let profile = if large { 0 } else { rng.below(100) };
        let (origin_sectors, first_chunk) = match profile {
            // Areas of more than 4 KiB, which are rewritten in parts.
            _ if large => (rng.between(260 * 16, 262 * 16), 16),
            // Areas of 64 entries, which can tear, and origins that fill them.
            0..30 => (rng.between(90, 160), 2),
            30..36 => (rng.between(140, 180), 4),
            36..50 => (rng.between(36, 72), 1),
            _ => (rng.between(12, 48), 1 << rng.below(4)),
        };
        let count = if large {
            1
        } else if profile >= 50 && rng.chance(1, 40) {
            16
        } else {
            [1, 1, 2, 2, 3, 4][rng.index(6)]
        };
        let mut stores: Vec<StorePlan> = (0..count)
            .map(|i| {
                let chunk = if i == 0 {
                    first_chunk
                } else {
                    1 << rng.below(4)
                };
                Self::store(origin_sectors, chunk, i == 0, i == 0 && profile < 36, rng)
            })
            .collect();
        let mut temper = Temper::pick(origin_sectors, rng);
        let merges = [0, 0, 1, 4][rng.index(4)];
        // Some merges are played by themselves, the others among everything else.
        let live_in_merges = match () {
            () if merges > 0 && profile >= 36 => [0, 0, 8, 24][rng.index(4)],
            () => 0,
        };
        if profile < 36 || (merges > 0 && live_in_merges == 0) {
            for store in &mut stores {
                store.on_full = OnFull::Invalidate;
            }
        }
        if profile < 36 {
            temper.span = 12;
            temper.commands[1] += 8;
            temper.hot = temper.hot.min(3);
        }
        let faults = if rng.chance(1, 8) {
            let mut rate = || if rng.chance(1, 2) { rng.below(40) } else { 0 };
            Faults {
                read: rate(),
                write: rate(),
                flush: rate(),
                grow: rate() * 8,
            }
        } else {
            Faults::default()
        };
        let copy_piece = [512, 1024, 4096, 1 << 16][rng.index(4)];
        Self {
            origin_sectors,
            stores,
            copy_piece,
            copy_memory: copy_piece * [1, 2, 5, 64][rng.index(4)],
            window: [512, 1536, 1 << 20, 1 << 20][rng.index(4)],
            depth: [1, 3, 8, 24][rng.index(4)],
            burst: [1, 2, 6, 12][rng.index(4)],
            inline: [0, 0, 2, 6, 8][rng.index(5)],
            fast: [0, 2, 6][rng.index(3)],
            kills: [0, 1, 3, 8][rng.index(4)],
            steps: [8, 20, 50, 100][rng.index(4)],
            pressure: [10, 20, 40][rng.index(3)],
            lag: [0, 1, 4][rng.index(3)],
            ambush: if profile < 36 {
                7
            } else {
                [0, 4, 8][rng.index(3)]
            },
            tears: if profile < 36 { 6 } else { 0 },
            storms: if profile < 36 {
                5
            } else {
                [0, 1][rng.index(2)]
            },
            merges,
            merge_step: [512, 2048, 8192, 1 << 20][rng.index(4)],
            // What tears takes its time undisturbed.
            live: match () {
                () if merges > 0 => live_in_merges,
                () if profile < 36 => [0, 0, 0, 0, 0, 8][rng.index(6)],
                () => [0, 2, 8, 24][rng.index(4)],
            },
            faults,
            temper,
        }
    }

    /// The plan of a small merge: a store with some exceptions, up to two others of
    /// other chunk sizes with room for all that they may need, and no errors.
    pub fn small_merge(rng: &mut Rng) -> Self {
        let mut plan = Self::pick(rng);
        plan.origin_sectors = rng.between(8, 20);
        let chunks = |sectors: u64| plan.origin_sectors.div_ceil(sectors);
        let merged = 1 << rng.below(3);
        let mut sizes = vec![merged];
        sizes.extend((0..rng.below(3)).map(|_| 1 << rng.below(4)));
        let preload = |i: usize, sectors: u64, rng: &mut Rng| match i {
            0 => rng.between(1, chunks(sectors)),
            _ => rng.below(chunks(sectors)),
        };
        plan.stores = (sizes.iter().enumerate())
            .map(|(i, &chunk_sectors)| {
                let room = store_bytes::chunks_for(chunks(chunk_sectors) + 1, chunk_sectors);
                let limit_sectors = (room + 1) * chunk_sectors;
                StorePlan {
                    kind: StoreKind::Persistent,
                    chunk_sectors,
                    ready_sectors: limit_sectors,
                    limit_sectors,
                    step_chunks: 1,
                    beginning: Beginning::Preloaded(preload(i, chunk_sectors, rng)),
                    on_full: OnFull::Invalidate,
                }
            })
            .collect();
        plan.temper = Temper::pick(plan.origin_sectors, rng);
        plan.depth = [1, 3, 8][rng.index(3)];
        plan.burst = rng.between(1, 3);
        plan.merges = 0;
        plan.live = 0;
        plan.merge_step = [512, 2048, 1 << 20][rng.index(3)];
        plan.faults = Faults::default();
        plan
    }

    fn store(
        origin_sectors: u64,
        chunk_sectors: u64,
        first: bool,
        at_edge: bool,
        rng: &mut Rng,
    ) -> StorePlan {
        let kind = match rng.below(10) {
            0 | 1 if !first => StoreKind::Transient,
            0..4 => StoreKind::PersistentOverflow,
            _ => StoreKind::Persistent,
        };
        let chunks = origin_sectors.div_ceil(chunk_sectors);
        let entries = store_bytes::area_entries(chunk_sectors);
        let beginning = match rng.below(4) {
            _ if at_edge => Beginning::Preloaded(
                (rng.between(1, entries / 32) * 32).min(chunks - 6) - rng.between(1, 6),
            ),
            _ if kind == StoreKind::Transient => Beginning::Later,
            0 => Beginning::Later,
            1 => Beginning::Preloaded(rng.below(chunks.min(4))),
            _ => {
                // Just before the next boundary that matters: a sector of entries, or an area.
                let edge = if rng.chance(1, 3) { entries } else { 32 };
                Beginning::Preloaded(rng.between(edge - 5, edge + 1).min(chunks - 1))
            }
        };
        let begun = if let Beginning::Preloaded(n) = beginning {
            n
        } else {
            0
        };
        let all = store_bytes::chunks_for(chunks, chunk_sectors);
        let least = store_bytes::chunks_for(begun, chunk_sectors).max(3);
        let limit = match rng.below(8) {
            0 => least + rng.below(4),
            1 | 2 => rng.between(least.min(all), all),
            _ => all + rng.below(3),
        }
        .max(least);
        let odd = if rng.chance(1, 4) {
            rng.below(chunk_sectors)
        } else {
            0
        };
        let limit_sectors = limit * chunk_sectors + odd;
        let ready_sectors = if rng.chance(1, 2) {
            limit_sectors
        } else {
            (least + rng.below(4)) * chunk_sectors
        };
        let step_chunks = rng.between(1, 6);
        StorePlan {
            kind,
            chunk_sectors,
            ready_sectors: ready_sectors.min(limit_sectors),
            limit_sectors,
            step_chunks,
            beginning,
            on_full: {
                let half = OnFull::Invalidate;
                [half, half, OnFull::Pause, OnFull::Error][rng.index(4)]
            },
        }
    }

    /// The ends of requests: a range of a view of `sectors`, and what is done with it.
    pub fn request(&self, sectors: u64, chunk_sectors: u64, rng: &mut Rng) -> (Cells, Ask) {
        let temper = &self.temper;
        let weights = &temper.commands;
        let mut pick = rng.below(weights.iter().sum());
        let mut command = 0;
        while pick >= weights[command] {
            pick -= weights[command];
            command += 1;
        }
        let fua = rng.chance(temper.fua, 16);
        let ask = match command {
            0 => Ask::Read,
            1 => Ask::Write { fua },
            2 => Ask::Zero {
                fua,
                fast_only: rng.chance(1, 8),
            },
            3 => Ask::Trim { fua },
            _ => Ask::Flush,
        };
        (self.range(sectors, chunk_sectors, rng), ask)
    }

    /// A range of several chunks, of a view of `sectors`.
    pub fn storm(sectors: u64, chunk: u64, rng: &mut Rng) -> Cells {
        let from = rng.below(sectors) / chunk * chunk;
        let to = (from + chunk * rng.between(3, 12)).min(sectors);
        Cells {
            from: from as usize * CELLS,
            to: to as usize * CELLS,
        }
    }

    fn range(&self, sectors: u64, chunk: u64, rng: &mut Rng) -> Cells {
        let temper = &self.temper;
        let sector = match rng.below(16) {
            n if n < temper.hot => (temper.hot_at + rng.below(chunk * 2)) % sectors,
            15 => sectors - 1,
            _ => rng.below(sectors),
        };
        if rng.chance(1, 128) {
            let cell = sector as usize * CELLS;
            return Cells {
                from: cell,
                to: cell,
            };
        }
        let start = sector / chunk * chunk;
        let (from, to) = match rng.below(8) {
            // Whole chunks.
            0 | 1 => (start, start + chunk),
            2 => (start, start + chunk * rng.between(1, temper.span)),
            // Some sectors.
            3 => (sector, sector + rng.between(1, chunk)),
            4 => (sector, sector + rng.between(1, chunk * temper.span)),
            _ => {
                // From and to any cell.
                let from = sector as usize * CELLS + rng.index(CELLS);
                let most = chunk * if rng.chance(1, 2) { 1 } else { temper.span };
                let len = 1 + rng.index(most as usize * CELLS);
                return Cells {
                    from,
                    to: (from + len).min(sectors as usize * CELLS),
                };
            }
        };
        Cells {
            from: from as usize * CELLS,
            to: to.min(sectors) as usize * CELLS,
        }
    }
}

impl Temper {
    fn pick(origin_sectors: u64, rng: &mut Rng) -> Self {
        let mut commands = [4, 12, 2, 2, 2].map(|most| rng.below(most + 1));
        commands[1] += 2;
        commands[4] += u64::from(rng.chance(1, 2));
        Self {
            origin: rng.between(4, 14),
            commands,
            fua: [0, 1, 4][rng.index(3)],
            hot: rng.below(12),
            hot_at: rng.below(origin_sectors),
            span: [2, 4, 12][rng.index(3)],
        }
    }
}
