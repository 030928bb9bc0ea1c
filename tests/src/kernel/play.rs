//! Requests from a seed, played one at a time on the views of a volume: the
//! kernel's devices inside the virtual machine, nbdsnap's exports outside. Who
//! plays the same [`Score`] sends the same bytes to the same places in the same
//! order.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use nbdsnap::client::Client;

use crate::harness::random::Random;

const SECTOR: u64 = 512;
/// Larger requests the kernel would cut up.
const LONGEST: u64 = 1 << 20;
/// `O_DIRECT` on x86-64: each step is one request, nothing stays in a cache.
const O_DIRECT: i32 = 0o40_000;
const PAGE: usize = 4096;

/// What to play: all that both sides need to know.
#[derive(Clone, Debug)]
pub struct Score {
    /// The seed of the choices.
    pub seed: u64,
    /// How many steps.
    pub steps: usize,
    /// Bytes in a chunk: lengths and places are chosen around it.
    pub chunk: u64,
    /// Bytes of each view: the origin, then its snapshots.
    pub views: Vec<u64>,
    /// One step in so many goes to a snapshot; 0: none.
    pub snapshot_writes: u64,
    /// No request crosses the border of a chunk, so that each is done or refused
    /// as a whole.
    pub within_chunk: bool,
}

/// One request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The view: 0 is the origin.
    pub view: usize,
    /// What it does.
    pub act: Act,
}

/// What a request does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// Write `len` bytes, made from `fill`, at `offset`.
    Write {
        /// First byte.
        offset: u64,
        /// How many.
        len: u64,
        /// The seed of the bytes.
        fill: u64,
    },
    /// Make durable.
    Flush,
}

impl Score {
    /// The command that plays it inside the virtual machine, on these devices.
    pub fn command(&self, devices: &[String]) -> String {
        let Self {
            seed,
            steps,
            chunk,
            snapshot_writes,
            within_chunk,
            ..
        } = self;
        let within = u8::from(*within_chunk);
        let devices = devices.join(" ");
        format!("kernel-player {seed} {steps} {chunk} {snapshot_writes} {within} {devices}")
    }

    /// Its steps.
    pub fn steps(&self) -> Vec<Step> {
        let mut random = Random::new(self.seed);
        (0..self.steps).map(|_| self.step(&mut random)).collect()
    }

    fn step(&self, random: &mut Random) -> Step {
        let to_snapshot = self.snapshot_writes > 0 && random.one_in(self.snapshot_writes);
        let view = if to_snapshot && self.views.len() > 1 {
            1 + random.below(self.views.len() as u64 - 1) as usize
        } else {
            0
        };
        if random.one_in(16) {
            return Step {
                view,
                act: Act::Flush,
            };
        }
        let (offset, len) = self.place(random, self.views[view]);
        let fill = random.bits();
        Step {
            view,
            act: Act::Write { offset, len, fill },
        }
    }

    /// A range in sectors of 512 bytes: whole chunks, parts of chunks, runs of
    /// several, and now and then the end of the device.
    fn place(&self, random: &mut Random, size: u64) -> (u64, u64) {
        let chunks = size / self.chunk;
        let (offset, len) = match random.below(8) {
            0..3 => (random.below(chunks) * self.chunk, self.chunk),
            3 | 4 => {
                let offset = random.below(size / SECTOR) * SECTOR;
                (offset, random.between(1, 8) * SECTOR)
            }
            5 => {
                let count = random.between(2, 64);
                (random.below(chunks) * self.chunk, count * self.chunk)
            }
            6 => {
                let offset = random.below(size / SECTOR) * SECTOR;
                let most = (3 * self.chunk).max(8 * SECTOR) / SECTOR;
                (offset, random.between(1, most) * SECTOR)
            }
            _ => {
                let back = random.between(1, (2 * self.chunk / SECTOR).min(size / SECTOR));
                let offset = size - back * SECTOR;
                (offset, random.between(1, back) * SECTOR)
            }
        };
        let len = len.min(LONGEST).min(size - offset);
        if self.within_chunk {
            (offset, len.min(self.chunk - offset % self.chunk))
        } else {
            (offset, len)
        }
    }
}

/// The bytes that a write writes.
pub fn content(fill: u64, len: u64) -> Vec<u8> {
    Random::new(fill).bytes(len as usize)
}

/// Apply the steps to byte arrays, one a view: what each view must hold.
pub fn apply(steps: &[Step], models: &mut [Vec<u8>]) {
    for step in steps {
        if let Act::Write { offset, len, fill } = step.act {
            let range = offset as usize..(offset + len) as usize;
            models[step.view][range].copy_from_slice(&content(fill, len));
        }
    }
}

/// Where steps are played.
#[derive(Debug)]
pub enum Place {
    /// A block device, past the page cache.
    Device(File),
    /// An NBD export.
    Export(Box<Client>),
}

impl Place {
    /// A device by its path.
    pub fn device(path: &str) -> std::io::Result<Self> {
        let mut options = File::options();
        options.read(true).write(true).custom_flags(O_DIRECT);
        Ok(Self::Device(options.open(path)?))
    }

    /// Perform one request and wait for its end; an error in words.
    pub fn perform(&mut self, act: &Act) -> Result<(), String> {
        match (self, act) {
            (Self::Device(file), Act::Write { offset, len, fill }) => {
                let bytes = content(*fill, *len);
                let mut buffer = vec![0; bytes.len() + PAGE];
                let skip = buffer.as_ptr().align_offset(PAGE);
                buffer[skip..skip + bytes.len()].copy_from_slice(&bytes);
                file.write_all_at(&buffer[skip..skip + bytes.len()], *offset)
                    .map_err(|e| e.to_string())
            }
            (Self::Device(file), Act::Flush) => file.sync_data().map_err(|e| e.to_string()),
            (Self::Export(client), Act::Write { offset, len, fill }) => client
                .write(*offset, &content(*fill, *len), false)
                .map_err(|e| e.to_string()),
            (Self::Export(client), Act::Flush) => client.flush().map_err(|e| e.to_string()),
        }
    }
}

/// Play steps in order, one at a time; which of them succeeded.
pub fn play(steps: &[Step], places: &mut [Place]) -> Vec<bool> {
    steps
        .iter()
        .map(|step| places[step.view].perform(&step.act).is_ok())
        .collect()
}

/// Outcomes as text, a `1` for each success.
pub fn outcomes_text(outcomes: &[bool]) -> String {
    let digit = |ok: &bool| if *ok { '1' } else { '0' };
    outcomes.iter().map(digit).collect()
}
