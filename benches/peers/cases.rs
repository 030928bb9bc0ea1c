//! Which load goes to which servers.

use std::time::Duration;

use nbdsnap::cli::size::show as show_size;
use nbdsnap_benches::load::{Limit, Load};
use nbdsnap_benches::plan::Order;
use nbdsnap_benches::replies::Command;

use crate::contender::{Chunk, Contender};

/// One load, and the servers that get it.
#[derive(Debug)]
pub(crate) struct Case {
    /// Its name on the command line.
    pub(crate) name: &'static str,
    what: &'static str,
    command: Command,
    order: Order,
    block: u32,
    stride: u64,
    depth: u16,
    /// Before the load, every chunk of the origin is written once, so that the
    /// snapshot's data lies in its store.
    pub(crate) copied_before: bool,
    /// nbdsnap first.
    pub(crate) contenders: &'static [Contender],
    /// The server that nbdsnap has to be at least equal to.
    pub(crate) bar: Option<Contender>,
}

impl Case {
    /// What it does, for people.
    pub(crate) fn title(&self) -> String {
        let depth = self.depth;
        let every = if self.stride == u64::from(self.block) {
            String::new()
        } else {
            format!(" in each {}", show_size(self.stride))
        };
        format!(
            "{}, {}{every}, depth {depth}",
            self.what,
            show_size(self.block.into())
        )
    }

    /// True if the disk changes.
    pub(crate) fn writes(&self) -> bool {
        self.command == Command::Write || self.copied_before
    }

    /// The load of one turn.
    pub(crate) fn load(&self, measure: Duration, seed: u64, server_pid: u32) -> Load {
        let limit = match self.order {
            Order::Once => Limit::WholePlan,
            Order::Random | Order::Sequential => Limit::Time {
                warm_up: measure / 8,
                measure,
            },
        };
        Load {
            command: self.command,
            order: self.order,
            block: self.block,
            stride: self.stride,
            depth: self.depth,
            batch: self.depth.div_ceil(4),
            limit,
            seed,
            server_pid: Some(server_pid),
        }
    }
}

const K4: u32 = 4 << 10;
const ORIGIN: Contender = Contender::NbdsnapOrigin { snapshot: None };
const SNAPSHOT_4K: Contender = Contender::NbdsnapSnapshot { chunk: Chunk::K4 };
const SNAPSHOT_64K: Contender = Contender::NbdsnapSnapshot { chunk: Chunk::K64 };

/// Random 4 KiB reads at depth 32 of `contenders`: the other cases say how they differ.
const fn reads(name: &'static str, what: &'static str, contenders: &'static [Contender]) -> Case {
    Case {
        name,
        what,
        command: Command::Read,
        order: Order::Random,
        block: K4,
        stride: K4 as u64,
        depth: 32,
        copied_before: false,
        contenders,
        bar: None,
    }
}

/// A 4 KiB write into each chunk, once, at depth 32.
const fn first_writes(
    name: &'static str,
    what: &'static str,
    chunk: Chunk,
    contenders: &'static [Contender],
) -> Case {
    Case {
        command: Command::Write,
        order: Order::Once,
        stride: chunk.bytes(),
        ..reads(name, what, contenders)
    }
}

/// All cases, in the order in which they run: those that leave the disk as it is come first.
pub(crate) const CASES: &[Case] = &[
    Case {
        bar: Some(Contender::NbdkitFile),
        ..reads(
            "read",
            "random reads",
            &[ORIGIN, Contender::NbdkitFile, Contender::QemuRaw],
        )
    },
    Case {
        depth: 1,
        ..reads(
            "read-depth-1",
            "random reads",
            &[ORIGIN, Contender::NbdkitFile, Contender::QemuRaw],
        )
    },
    Case {
        block: 1 << 20,
        stride: 1 << 20,
        depth: 8,
        ..reads(
            "read-1m",
            "random reads",
            &[ORIGIN, Contender::NbdkitFile, Contender::QemuRaw],
        )
    },
    reads(
        "snapshot-read",
        "random reads of a snapshot, all of it shared with the origin",
        &[
            SNAPSHOT_4K,
            Contender::NbdkitFile,
            Contender::NbdkitCow { chunk: Chunk::K4 },
            Contender::QemuOverlay { chunk: Chunk::K64 },
        ],
    ),
    Case {
        copied_before: true,
        ..reads(
            "snapshot-read-copied",
            "random reads of a snapshot, all of it in its store",
            &[SNAPSHOT_4K, Contender::NbdkitFile],
        )
    },
    Case {
        command: Command::Write,
        ..reads(
            "write",
            "random writes, no snapshot",
            &[ORIGIN, Contender::NbdkitFile, Contender::QemuRaw],
        )
    },
    first_writes(
        "origin-first-4k",
        "first writes to an origin with a snapshot",
        Chunk::K4,
        &[
            Contender::NbdsnapOrigin {
                snapshot: Some(Chunk::K4),
            },
            Contender::QemuCopyBeforeWrite,
        ],
    ),
    first_writes(
        "origin-first-64k",
        "first writes to an origin with a snapshot",
        Chunk::K64,
        &[
            Contender::NbdsnapOrigin {
                snapshot: Some(Chunk::K64),
            },
            Contender::QemuCopyBeforeWrite,
        ],
    ),
    first_writes(
        "snapshot-first-4k",
        "first writes to a snapshot",
        Chunk::K4,
        &[
            SNAPSHOT_4K,
            Contender::NbdkitCow { chunk: Chunk::K4 },
            Contender::QemuOverlay { chunk: Chunk::K4 },
        ],
    ),
    first_writes(
        "snapshot-first-64k",
        "first writes to a snapshot",
        Chunk::K64,
        &[
            SNAPSHOT_64K,
            Contender::NbdkitCow { chunk: Chunk::K64 },
            Contender::QemuOverlay { chunk: Chunk::K64 },
        ],
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_has_its_own_name_and_begins_with_nbdsnap() {
        for (number, case) in CASES.iter().enumerate() {
            assert!(
                CASES[..number]
                    .iter()
                    .all(|earlier| earlier.name != case.name),
                "{}",
                case.name
            );
            let (first, others) = case.contenders.split_first().unwrap();
            assert!(first.is_nbdsnap() && !others.is_empty(), "{}", case.name);
            assert!(
                others.iter().all(|other| !other.is_nbdsnap()),
                "{}",
                case.name
            );
            assert!(
                case.bar.is_none_or(|bar| others.contains(&bar)),
                "{}",
                case.name
            );
        }
    }
}
