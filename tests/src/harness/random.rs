//! Seeds of the black-box suites. Each run draws a new one and prints it;
//! `NBDSNAP_SEED=N` plays one again. (Threads and sockets add chance of their
//! own: a seed repeats the requests, not the order in which they meet.)

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nbdsnap_engine::disk::sim::Rng;

/// The simulator's generator, with what requests to a real server need besides.
#[derive(Clone, Debug)]
pub struct Random(Rng);

impl Random {
    /// The generator that `seed` names.
    pub fn new(seed: u64) -> Self {
        Self(Rng::new(seed))
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0.bits()
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0.below(bound)
    }

    /// A number from `low` to `high`, both included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        self.0.between(low, high)
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.0.chance(1, n)
    }

    /// `len` random bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend_from_slice(&self.bits().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}

/// The seed of this test: from `NBDSNAP_SEED`, else a new one. Printed, so that
/// it stands in the output of a failed test.
pub fn seed(test: &str) -> u64 {
    let seed = match std::env::var("NBDSNAP_SEED") {
        Ok(text) => text.parse().expect("NBDSNAP_SEED is a number"),
        Err(_) => {
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_nanos() as u64)
                % 1_000_000_007
        }
    };
    println!("{test}: seed {seed} (again with NBDSNAP_SEED={seed})");
    seed
}

/// How long the searches may go on, where somebody asked for more than one run
/// (`NBDSNAP_LONG=SECONDS`, from `tests/run --long`).
pub fn long_run() -> Option<Duration> {
    let seconds = std::env::var("NBDSNAP_LONG")
        .ok()
        .filter(|text| !text.is_empty())?;
    Some(Duration::from_secs(
        seconds
            .parse()
            .expect("NBDSNAP_LONG is a number of seconds"),
    ))
}
