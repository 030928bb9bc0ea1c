//! The snapshots that tables name: each line of `snapshot` and `snapshot-merge` has
//! one, from the load of its table to the end of it. Where its exceptions are is
//! its body, which goes from one to another when a COW store changes hands.

use super::orders::{Errno, Refused};
use super::{Base, LevelKey, Lower, Mapper, Persistence, SnapKey};
use crate::request::SnapshotId;
use crate::store::{Status, Store};

/// Where a snapshot's exceptions are.
#[derive(Debug)]
pub(super) enum Body {
    /// In a store that was opened; its instant comes with the first resume.
    Loaded(Box<Store>),
    /// At another snapshot with the same store, from which it takes over at resume.
    Heir,
    /// In the store, until everything under way before `serial` has ended.
    Joining {
        level: LevelKey,
        store: Box<Store>,
        serial: u64,
    },
    /// In the volume, which takes the instant.
    Taking { level: LevelKey, id: SnapshotId },
    /// In the volume.
    There { level: LevelKey, id: SnapshotId },
    /// In the volume, which is told to merge them.
    Beginning { level: LevelKey, id: SnapshotId },
    /// In the volume, and on their way to the origin.
    Merging { level: LevelKey, id: SnapshotId },
    /// In the origin: the store is empty.
    Merged,
    /// Lost, or given to another snapshot.
    Lost,
}

/// A snapshot that a table names.
#[derive(Debug)]
pub(super) struct Snap {
    pub(super) origin: Lower,
    pub(super) cow: Lower,
    /// It is a `snapshot-merge`.
    pub(super) merges: bool,
    /// As the table shows it. What the store is goes with the exceptions.
    pub(super) persistence: Persistence,
    /// A full store overflows. It is the word of the snapshot's own table, whatever the
    /// table said that the exceptions came from, and holds for a transient one too, which
    /// does not show it.
    pub(super) overflows: bool,
    /// Sectors; 0 as long as it is not known. They go with the exceptions.
    pub(super) chunk: u64,
    pub(super) discard_zeroes_cow: bool,
    pub(super) discard_passdown_origin: bool,
    /// Bytes of its device.
    pub(super) bytes: u64,
    /// It has been resumed.
    pub(super) active: bool,
    /// Its store has been full, which goes with the exceptions too.
    pub(super) overflowed: bool,
    pub(super) body: Body,
}

impl Snap {
    /// Its volume, and its name there.
    pub(super) fn place(&self) -> Option<(LevelKey, SnapshotId)> {
        match self.body {
            Body::Taking { level, id }
            | Body::There { level, id }
            | Body::Beginning { level, id }
            | Body::Merging { level, id } => Some((level, id)),
            Body::Loaded(_) | Body::Heir | Body::Joining { .. } | Body::Merged | Body::Lost => None,
        }
    }

    pub(super) fn level(&self) -> Option<LevelKey> {
        match self.body {
            Body::Joining { level, .. } => Some(level),
            _ => self.place().map(|(level, _)| level),
        }
    }
}

/// Those with one store and one origin. Of two, one may have given its exceptions to
/// the other: both have been resumed then.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sharing {
    /// The one that has the exceptions.
    pub(super) source: Option<SnapKey>,
    /// The one that is to have them.
    pub(super) heir: Option<SnapKey>,
    pub(super) count: usize,
}

impl Mapper {
    pub(super) fn sharing(&self, origin: Lower, cow: Lower) -> Sharing {
        let mut sharing = Sharing::default();
        for (key, snap) in &self.snaps {
            if snap.origin == origin && snap.cow == cow {
                let place = if snap.active {
                    &mut sharing.source
                } else {
                    &mut sharing.heir
                };
                *place = Some(key);
                sharing.count += 1;
            }
        }
        sharing
    }

    /// Another `snapshot-merge` of the same origin.
    pub(super) fn other_merge(&self, origin: Lower) -> bool {
        let merges = |snap: &Snap| snap.merges && snap.origin == origin;
        self.snaps.iter().any(|(_, snap)| merges(snap))
    }

    /// Whether a snapshot of `origin` can be merged now, as far as others are concerned.
    pub fn may_merge(&self, origin: Lower) -> Result<(), Refused> {
        self.may_merge_beside(origin, None)
    }

    pub(super) fn may_merge_beside(
        &self,
        origin: Lower,
        own: Option<SnapshotId>,
    ) -> Result<(), Refused> {
        let level = self.level_of(origin);
        let merging = level.and_then(|key| self.levels[key].volume.merging());
        let why = if merging.is_some() && merging != own {
            "A snapshot is already merging."
        } else if self.is_covered_above(origin) {
            "the origin is part of another origin, which was taken snapshots of later"
        } else {
            return Ok(());
        };
        Err(Refused::new(Errno::Invalid, why))
    }

    /// Whether a volume that came later covers some of the origin: it would see a
    /// rollback as something that it has to keep, or not at all.
    fn is_covered_above(&self, origin: Lower) -> bool {
        let Some(own) = self.level_of(origin) else {
            return false;
        };
        let order = self.levels[own].order;
        let mut later = self.levels.iter().filter(|(_, level)| level.order > order);
        later.any(|(_, level)| self.overlap(level.origin, origin))
    }

    /// The exceptions go from one to the other.
    pub(super) fn hand_over(&mut self, source: SnapKey, heir: SnapKey) {
        let (from, to) = self
            .snaps
            .get2_mut(source, heir)
            .expect("they are two, and there");
        to.body = std::mem::replace(&mut from.body, Body::Lost);
        std::mem::swap(&mut to.persistence, &mut from.persistence);
        from.overflows = to.overflows;
        to.persistence = to.persistence.or_overflow(to.overflows);
        std::mem::swap(&mut to.chunk, &mut from.chunk);
        std::mem::swap(&mut to.overflowed, &mut from.overflowed);
        self.set_lengths(heir);
        self.set_overflow(heir);
    }

    /// Have the volume know what it means that a snapshot's store is full.
    pub(super) fn set_overflow(&mut self, key: SnapKey) {
        let snap = &self.snaps[key];
        if let Some((level, id)) = snap.place() {
            let volume = &mut self.levels[level].volume;
            volume.set_overflows(id, snap.overflows);
        }
    }

    /// Have the volume know how long a snapshot is. The kernel looks at the length of
    /// the device, not at that of the line.
    pub(super) fn set_lengths(&mut self, key: SnapKey) {
        let snap = &self.snaps[key];
        let device_bytes = self.bytes_of(snap.origin);
        if let Some((level, id)) = snap.place() {
            let volume = &mut self.levels[level].volume;
            volume.set_snapshot_bytes(id, snap.bytes, device_bytes);
        }
    }

    /// There is nothing in it that a flush could save: it is lost, or it has no exceptions
    /// of its own and fails whatever is asked of it.
    pub(super) fn holds_nothing(&self, key: SnapKey) -> bool {
        match self.snaps[key].body {
            Body::Loaded(_) | Body::Heir | Body::Lost => true,
            _ => self.snap_status(key) == Status::Invalid,
        }
    }

    /// The same of a base: only a snapshot's can be so.
    pub(super) fn is_lost(&self, base: Base) -> bool {
        matches!(base, Base::Snap(key) if self.holds_nothing(key))
    }

    /// In dm-snapshot's words.
    pub(super) fn snap_status(&self, key: SnapKey) -> Status {
        let snap = &self.snaps[key];
        let total = self.bytes_of(snap.cow) / nbdsnap_format::SECTOR_BYTES;
        let usage = |chunks: u64| Status::Active {
            allocated: chunks * snap.chunk,
            total,
            metadata: chunks * snap.chunk,
        };
        if snap.overflowed
            && let Some((level, id)) = snap.place()
            && self.levels[level].volume.status(id) != Some(Status::Invalid)
        {
            return Status::Overflow;
        }
        match &snap.body {
            Body::Merged if snap.overflowed => Status::Overflow,
            Body::Loaded(store) | Body::Joining { store, .. } => store.status(),
            Body::Taking { level, id }
            | Body::There { level, id }
            | Body::Beginning { level, id }
            | Body::Merging { level, id } => {
                let status = self.levels[*level].volume.status(*id);
                status.unwrap_or(Status::Invalid)
            }
            Body::Heir => usage(0),
            // The header and one area.
            Body::Merged => usage(2),
            Body::Lost => Status::Invalid,
        }
    }
}
