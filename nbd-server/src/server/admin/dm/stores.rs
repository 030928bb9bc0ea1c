//! COW stores on mapped devices and the disks under them: opened, or made where the
//! device-mapper makes one, by requests like a client's. So what they write reaches the
//! snapshots of whatever it lands on.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};

use bytes::Bytes;
use nbdsnap_engine::dm::{Lower, Persistence, Target};
use nbdsnap_engine::{
    Access, Action, Command, DiskError, OpenError, Outcome, Store, StoreIo, StoreKind, StoreSize,
    StoreSpec,
};
use nbdsnap_format::header::HeaderError;
use nbdsnap_format::{ChunkSize, SECTOR_BYTES};

use super::{Done, PATIENCE, refused};
use crate::io::{MAPPED_SHARD, Shard};
use crate::law;
use crate::server::admin::claims::Claims;
use crate::server::admin::turn::Turn;

/// A store that a table names.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    cow: Lower,
    kind: StoreKind,
    /// Sectors.
    chunk: u64,
    cow_bytes: u64,
    origin_bytes: u64,
}

impl Wanted {
    pub(super) fn of(
        target: &Target,
        cow: Lower,
        chunk: u64,
        cow_bytes: u64,
        origin_bytes: u64,
    ) -> Self {
        let (Target::Snapshot(pair) | Target::SnapshotMerge(pair)) = target else {
            unreachable!("only snapshots have stores");
        };
        let kind = match pair.persistence {
            Persistence::Persistent => StoreKind::Persistent,
            Persistence::PersistentOverflow => StoreKind::PersistentOverflow,
            Persistence::Transient => StoreKind::Transient,
        };
        Self {
            cow,
            kind,
            chunk,
            cow_bytes,
            origin_bytes,
        }
    }
}

impl Turn<'_> {
    /// Open a store, or make it where the device begins with zeros, as the kernel does.
    pub(super) fn dm_store(&mut self, wanted: Wanted) -> Done<Store> {
        let (shards, claims) = (Arc::clone(&self.shards), self.claims());
        let opened = self.aside(|_| {
            let mut io = Asking {
                shards: &shards,
                claims: &claims,
                cow: wanted.cow,
            };
            open_or_make(wanted, &mut io)
        });
        opened.map_err(|error| {
            let errno = match &error {
                OpenError::Header(HeaderError::WrongMagic { .. }) => libc::ENXIO,
                OpenError::Disk(_) | OpenError::Truncated { .. } => libc::EIO,
                OpenError::Header(_)
                | OpenError::New
                | OpenError::Exception { .. }
                | OpenError::Corrupt { .. } => libc::EINVAL,
            };
            refused(errno, format!("Failed to read snapshot metadata: {error}"))
        })
    }
}

impl Turn<'_> {
    /// Have what is at the beginning of a store be no store any more, durably: the next
    /// table that names it has it made anew.
    pub(super) fn dm_blank(&mut self, cow: Lower) -> Done<()> {
        let (shards, claims) = (Arc::clone(&self.shards), self.claims());
        let blanked = self.aside(|_| {
            let mut io = Asking {
                shards: &shards,
                claims: &claims,
                cow,
            };
            let header = Action::WriteZeroes {
                offset: 0,
                len: SECTOR_BYTES,
                may_punch: false,
            };
            io.act(header)?;
            io.act(Action::Flush)
        });
        let failed = |error| refused(libc::EIO, format!("its store cannot be written: {error}"));
        blanked.map(drop).map_err(failed)
    }
}

fn open_or_make(wanted: Wanted, io: &mut Asking<'_>) -> Result<Store, OpenError> {
    let bytes = wanted.cow_bytes;
    let size = StoreSize {
        ready: bytes,
        limit: bytes,
        step: 0,
    };
    let chunk_size = ChunkSize::from_sectors(wanted.chunk).expect("the table was checked");
    let make = |io: &mut Asking<'_>| {
        let spec = StoreSpec {
            kind: wanted.kind,
            chunk_size,
            size,
        };
        // The header, and the first area.
        let needed = 2 * chunk_size.bytes();
        if wanted.kind != StoreKind::Transient && bytes < needed {
            let found = bytes;
            return Err(OpenError::Truncated { found, needed });
        }
        Ok(law::create_store(spec, io)?)
    };
    if wanted.kind == StoreKind::Transient {
        return make(io);
    }
    match law::open_store(
        wanted.kind,
        size,
        wanted.origin_bytes,
        Access::ReadWrite,
        io,
    ) {
        Err(OpenError::New) => make(io),
        opened => opened,
    }
}

/// A device or disk that is asked on its thread. It may stand still: then this waits,
/// as long as the server does not stop.
struct Asking<'a> {
    shards: &'a [Shard],
    claims: &'a Claims,
    cow: Lower,
}

impl Asking<'_> {
    fn ask(&self, command: Command) -> Outcome {
        let (sender, answered) = channel();
        let cow = self.cow;
        self.shards[MAPPED_SHARD].with_mapped(move |mapped| mapped.ask(cow, command, sender));
        loop {
            match answered.recv_timeout(PATIENCE) {
                Ok(Ok(pieces)) => return Ok(pieces.concat().into()),
                Err(RecvTimeoutError::Timeout)
                    if !self.claims.is_closed() && !self.shards[MAPPED_SHARD].has_ended() => {}
                Ok(Err(_)) | Err(_) => return Err(DiskError::Io(libc::EIO)),
            }
        }
    }
}

impl StoreIo for Asking<'_> {
    fn act(&mut self, action: Action) -> Outcome {
        let fua = false;
        self.ask(match action {
            Action::Read { offset, len } => Command::Read { offset, len },
            Action::Write { offset, data } => Command::Write {
                offset,
                data: Bytes::from(data.concat()),
                fua,
            },
            Action::WriteZeroes { offset, len, .. } => Command::WriteZeroes {
                offset,
                len,
                fua,
                no_hole: true,
                fast_only: false,
            },
            Action::Trim { offset, len } => Command::Trim { offset, len, fua },
            Action::Flush => Command::Flush,
            Action::Grow { .. } => return Err(DiskError::NoSpace),
        })
    }

    /// There is no folder beside a mapped device: what is scrubbed is told in the log.
    fn keep_copy(&mut self, area: u64, _: &[u8]) -> Result<(), DiskError> {
        tracing::warn!(
            area,
            "an area of a store was torn by a power cut: what lies behind its end is zeroed"
        );
        Ok(())
    }
}
