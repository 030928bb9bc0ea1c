//! A client that knows what it was promised: connections that write stamped
//! blocks as fast as they can, until the server is gone. What was acknowledged
//! must be there afterwards; what was in flight may be there, whole sector by
//! whole sector; nothing else may have changed.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use nbdsnap_tests::harness::random::Random;
use nbdsnap_tests::harness::wire::{Address, Session, cmd, errno, flag};

pub(crate) const BLOCK: usize = 4096;
const SECTOR: usize = 512;
/// Writes in flight on one connection.
const DEPTH: usize = 12;

/// What one view must read as.
#[derive(Debug)]
pub(crate) struct Promised {
    pub(crate) export: String,
    /// Acknowledged, or as it was before.
    bytes: Vec<u8>,
    /// Blocks that were in flight when the server went away, with what was on its way.
    open: HashMap<usize, Vec<Vec<u8>>>,
}

impl Promised {
    pub(crate) fn new(export: &str, bytes: Vec<u8>) -> Self {
        Self {
            export: export.to_owned(),
            bytes,
            open: HashMap::new(),
        }
    }

    fn blocks(&self) -> usize {
        self.bytes.len() / BLOCK
    }

    /// Compare with what is there now, which is what is promised from now on.
    /// Returns how many blocks were in flight, and how many of them arrived.
    pub(crate) fn check(&mut self, found: Vec<u8>) -> (usize, usize) {
        assert_eq!(found.len(), self.bytes.len(), "{}", self.export);
        let none = Vec::new();
        let mut arrived = 0;
        for (block, now) in found.chunks(BLOCK).enumerate() {
            let acknowledged = &self.bytes[block * BLOCK..block * BLOCK + now.len()];
            if now == acknowledged {
                continue;
            }
            let possible = self.open.get(&block).unwrap_or(&none);
            for sector in 0..now.len() / SECTOR {
                let range = sector * SECTOR..(sector + 1) * SECTOR;
                let right = now[range.clone()] == acknowledged[range.clone()]
                    || possible
                        .iter()
                        .any(|bytes| bytes[range.clone()] == now[range.clone()]);
                assert!(
                    right,
                    "{}: block {block}, sector {sector} is neither what was acknowledged nor in flight",
                    self.export
                );
            }
            arrived += 1;
        }
        let in_flight = self.open.len();
        self.bytes = found;
        self.open.clear();
        (in_flight, arrived)
    }

    /// Take in what a connection was told.
    fn learn(&mut self, told: Told) {
        for (block, bytes) in told.acknowledged {
            self.bytes[block * BLOCK..block * BLOCK + bytes.len()].copy_from_slice(&bytes);
        }
        for (block, bytes) in told.open {
            self.open.entry(block).or_default().push(bytes);
        }
    }
}

/// What became of one connection's writes.
#[derive(Debug, Default)]
struct Told {
    /// The last acknowledged bytes of each block.
    acknowledged: HashMap<usize, Vec<u8>>,
    /// Never answered.
    open: Vec<(usize, Vec<u8>)>,
    /// Answered ESHUTDOWN.
    refused: u64,
}

/// Write on `connections` connections to each view until the server goes away,
/// which `end` brings about; it is given the number of acknowledged writes so
/// far. Returns how many writes were answered ESHUTDOWN.
pub(crate) fn write_until_the_end(
    address: &Address,
    views: &mut [Promised],
    connections: usize,
    random: &mut Random,
    end: impl FnOnce(&AtomicU64),
) -> u64 {
    let acknowledged = AtomicU64::new(0);
    let told: Vec<(usize, Told)> = std::thread::scope(|scope| {
        let mut writers = Vec::new();
        for (view, promised) in views.iter().enumerate() {
            for n in 0..connections {
                let session = Session::open(address, &promised.export).expect("a connection");
                let seed = random.bits();
                // Connections share no block, so that each knows the last word on its own.
                let blocks: Vec<usize> = (n..promised.blocks()).step_by(connections).collect();
                let acknowledged = &acknowledged;
                writers.push((
                    view,
                    scope.spawn(move || write(session, &blocks, seed, acknowledged)),
                ));
            }
        }
        end(&acknowledged);
        writers
            .into_iter()
            .map(|(view, writer)| (view, writer.join().expect("a writer")))
            .collect()
    });
    let mut refused = 0;
    for (view, told) in told {
        refused += told.refused;
        views[view].learn(told);
    }
    refused
}

fn write(mut session: Session, blocks: &[usize], seed: u64, acknowledged: &AtomicU64) -> Told {
    let mut random = Random::new(seed);
    let mut told = Told::default();
    let mut in_flight: HashMap<u64, (usize, Vec<u8>)> = HashMap::new();
    let mut cookie = 0;
    'alive: loop {
        while in_flight.len() < DEPTH {
            let block = blocks[random.below(blocks.len() as u64) as usize];
            // One write to a block at a time: else their order is nobody's promise.
            if in_flight.values().any(|(other, _)| *other == block) {
                break;
            }
            cookie += 1;
            let flags = if random.one_in(20) { flag::FUA } else { 0 };
            let data = random.bytes(BLOCK);
            let sent = session.send(
                flags,
                cmd::WRITE,
                cookie,
                (block * BLOCK) as u64,
                BLOCK as u32,
                &data,
            );
            in_flight.insert(cookie, (block, data));
            if sent.is_err() {
                break 'alive;
            }
        }
        let Ok(reply) = session.reply(|_| 0) else {
            break;
        };
        let (block, data) = in_flight
            .remove(&reply.cookie)
            .expect("a reply to a request that was sent");
        match reply.outcome {
            Ok(_) => {
                told.acknowledged.insert(block, data);
                acknowledged.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => {
                assert_eq!(error, errno::ESHUTDOWN, "a write failed");
                told.refused += 1;
            }
        }
    }
    // Replies that were on their way when sending failed are still promises.
    while let Ok(reply) = session.reply(|_| 0) {
        if let Some((block, data)) = in_flight.remove(&reply.cookie)
            && reply.outcome.is_ok()
        {
            told.acknowledged.insert(block, data);
        }
    }
    told.open.extend(in_flight.into_values());
    told
}
