//! Orders to a volume that is being served. Each is begun at once and reported
//! when it has ended; meanwhile the volume goes on.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::sync::mpsc::Sender;

use nbdsnap_engine::{NodeMergeError, OnFull, RemoveError, SnapshotId, View};
use nbdsnap_format::SECTOR_BYTES;

use super::hold::Held;
use super::{Hosted, NewSnapshot};
use crate::io::news::What;
use crate::io::shard::Outside;

/// An order to one volume, and whom to tell how it ended. Whoever asked may have
/// given up: a report that nobody takes is dropped.
#[derive(Debug)]
pub enum VolumeOrder {
    /// Prepare the instant of new snapshots, of the origin and of snapshots that are
    /// there, and hold the writes to what they are of. Ends
    /// with the ids when the volume is held, to stay so until
    /// [`VolumeOrder::Take`] or [`VolumeOrder::Abandon`]. One at a time.
    Hold {
        /// The snapshots.
        snapshots: Vec<NewSnapshot>,
        /// Where the ids go.
        held: Held,
    },
    /// Take the instant that is held, and go on.
    Take {
        /// Told when the snapshots are there; false: nothing is held any more.
        taken: Sender<bool>,
    },
    /// Give the instant up, held or not, and go on.
    Abandon {
        /// Told when the snapshots' stores are not used any more.
        abandoned: Sender<()>,
    },
    /// Roll what a snapshot was taken of back to it; its own clients are dropped.
    Merge {
        /// Which.
        snapshot: SnapshotId,
        /// Only if no client is attached to what it was taken of.
        only_idle: bool,
        /// Told when that reads as the snapshot.
        begun: Sender<Result<(), NotMerged>>,
    },
    /// Let new requests queue, those in flight end, and flush everything.
    Suspend {
        /// Told when the volume stands still, and whether all is durable.
        suspended: Sender<bool>,
    },
    /// Go on.
    Resume,
    /// Let a snapshot's store grow further.
    Extend {
        /// Which.
        snapshot: SnapshotId,
        /// How far; none: as far as the device is large.
        limit: Option<u64>,
        /// Told at once what the limit is now.
        extended: Sender<Result<u64, String>>,
    },
    /// See how large the origin's disk is now.
    Measure {
        /// Told its bytes, or why it stays as it was.
        measured: Sender<Result<u64, String>>,
    },
    /// Call a snapshot something else.
    Rename {
        /// Which.
        snapshot: SnapshotId,
        /// Its name from now on.
        name: String,
    },
    /// Close the volume and have it leave: its clients are dropped.
    Leave {
        /// Told when its disks are not used any more, and whether all is durable.
        left: Sender<bool>,
    },
    /// What came of a [`crate::io::Loss`].
    MarkedLost {
        /// The snapshot.
        snapshot: SnapshotId,
        /// There is a durable mark.
        durable: bool,
    },
    /// End a snapshot: its clients are told, and dropped. It goes after those that
    /// were taken of it, which are to be removed too.
    Remove {
        /// Which.
        snapshot: SnapshotId,
        /// Told when its store is not used any more.
        removed: Sender<()>,
    },
}

/// How a snapshot behaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// What a write means that finds its store full.
    pub on_full: OnFull,
    /// Its store grows by itself.
    pub auto_extend: Option<AutoExtend>,
}

/// When and how far a store grows by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AutoExtend {
    /// When so many percent of it are used.
    pub threshold: u32,
    /// By so many percent of what it has.
    pub step: u32,
    /// Never beyond this: what its origin can ever need.
    pub most_bytes: u64,
}

impl AutoExtend {
    /// How far the store may grow from now on; `None`: as far as before.
    fn limit_for(&self, allocated: u64, limit: u64) -> Option<u64> {
        let used = u128::from(allocated) * 100;
        if limit >= self.most_bytes || used < u128::from(limit) * u128::from(self.threshold) {
            return None;
        }
        let more = u128::from(limit) * u128::from(self.step) / 100;
        let wanted = (u128::from(limit) + more).min(u128::from(self.most_bytes));
        Some((wanted as u64).next_multiple_of(SECTOR_BYTES).max(limit))
    }
}

/// Bytes of a file or block device.
fn size_of(mut file: &File) -> std::io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

/// Why a merge does not begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotMerged {
    /// So many clients are attached to what would change.
    InUse(u64),
    /// The engine's word.
    Refused(NodeMergeError),
    /// It was begun, and an operation failed.
    Failed(&'static str),
}

impl Hosted {
    /// Begin what is ordered; [`Hosted::pump`] goes on with it.
    pub(in crate::io) fn handle_order(&mut self, order: VolumeOrder) {
        match order {
            VolumeOrder::Hold { snapshots, held } => self.hold(snapshots, held),
            VolumeOrder::Take { taken } => {
                let _ = taken.send(self.take());
            }
            VolumeOrder::Abandon { abandoned } => {
                self.abandon();
                let _ = abandoned.send(());
            }
            VolumeOrder::Remove { snapshot, removed } => {
                self.leaving.insert(snapshot, removed);
                self.remove(snapshot);
            }
            VolumeOrder::Merge {
                snapshot, begun, ..
            } => match self.tree.begin_merge(snapshot) {
                Ok(()) if self.tree.merge_of(snapshot).is_some() => {
                    // It had begun and failed: the origin reads as the snapshot already.
                    let _ = begun.send(Ok(()));
                }
                Ok(()) => self.merge = Some(begun),
                Err(error) => {
                    let _ = begun.send(Err(NotMerged::Refused(error)));
                }
            },
            VolumeOrder::MarkedLost { snapshot, durable } => {
                self.tree.marked_lost(snapshot, durable);
            }
            VolumeOrder::Suspend { suspended } => {
                self.tree.suspend();
                self.suspending = Some(suspended);
            }
            VolumeOrder::Resume => {
                self.suspending = None;
                self.tree.resume();
            }
            VolumeOrder::Extend {
                snapshot,
                limit,
                extended,
            } => {
                let _ = extended.send(self.extend(snapshot, limit));
            }
            VolumeOrder::Measure { measured } => {
                let _ = measured.send(self.measure());
            }
            VolumeOrder::Rename { snapshot, name } => {
                if let Some(store) = self.stores.get_mut(&snapshot) {
                    store.name = name;
                }
            }
            // The rest of it is the thread's.
            VolumeOrder::Leave { .. } => self.close(),
        }
    }

    /// Have a snapshot that is there behave as it was ordered.
    pub(super) fn settle(&mut self, id: SnapshotId, settings: Settings) {
        self.tree.set_on_full(id, settings.on_full);
        if let Some(auto_extend) = settings.auto_extend {
            self.auto_extends.insert(id, auto_extend);
        }
    }

    fn extend(&mut self, id: SnapshotId, limit: Option<u64>) -> Result<u64, String> {
        let store = self.stores.get(&id).ok_or("there is no such snapshot")?;
        let limit = match limit {
            Some(limit) => limit,
            None => size_of(&store.disk.disk.file).map_err(|error| error.to_string())?,
        };
        match self.tree.extend_snapshot(id, limit) {
            Ok(()) => Ok(limit),
            Err(error) => Err(error.to_string()),
        }
    }

    fn measure(&mut self) -> Result<u64, String> {
        let bytes = size_of(&self.origin.disk.file).map_err(|error| error.to_string())?;
        match self.tree.grow_origin(bytes) {
            Ok(()) => Ok(bytes),
            Err(error) => Err(format!("{error}, and its disk has {bytes}")),
        }
    }

    /// Stores that are to grow by themselves do so in time.
    pub(super) fn extend_by_themselves(&mut self, outside: &Outside) {
        let wanted = self.auto_extends.iter().filter_map(|(&id, auto)| {
            let info = self.tree.snapshot_info(id)?;
            auto.limit_for(info.allocated_bytes, info.limit_bytes)
                .map(|limit| (id, limit))
        });
        let wanted: Vec<(SnapshotId, u64)> = wanted.collect();
        for (id, limit) in wanted {
            if self.tree.extend_snapshot(id, limit).is_ok() {
                self.tell(id, What::Extended(limit), outside);
            }
        }
    }

    /// The volume stands still.
    pub(super) fn volume_suspended(&mut self, durable: bool) {
        if let Some(suspended) = self.suspending.take() {
            let _ = suspended.send(durable);
        }
    }

    /// A snapshot has left.
    pub(super) fn snapshot_removed(&mut self, id: SnapshotId) {
        self.stores.remove(&id);
        self.auto_extends.remove(&id);
        if let Some(removed) = self.leaving.remove(&id) {
            let _ = removed.send(());
        }
        for later in std::mem::take(&mut self.leave_later) {
            self.remove(later);
        }
    }

    /// Remove a snapshot; if its own are on their way out, after them.
    fn remove(&mut self, id: SnapshotId) {
        match self.tree.remove_snapshot(id) {
            Ok(()) => {}
            Err(RemoveError::HasSnapshots(others))
                if others.iter().all(|one| self.leaving.contains_key(one)) =>
            {
                self.leave_later.push(id);
            }
            Err(error) => {
                // Whoever orders it sees to it that this does not happen; the channel
                // closes.
                self.leaving.remove(&id);
                tracing::error!(
                    export = self.export(id),
                    "the snapshot is not removed: {error}"
                );
            }
        }
    }

    /// What a snapshot is one of.
    pub(in crate::io) fn origin_of(&self, id: SnapshotId) -> View {
        self.tree.origin_of(id).unwrap_or(View::Origin)
    }

    /// The origin reads as the snapshot.
    pub(super) fn merge_begun(&mut self) {
        if let Some(begun) = self.merge.take() {
            let _ = begun.send(Ok(()));
        }
    }

    /// The merge has stopped, perhaps before it began.
    pub(super) fn merge_failed(&mut self, why: &'static str) {
        if let Some(begun) = self.merge.take() {
            let _ = begun.send(Err(NotMerged::Failed(why)));
        }
    }

    /// Whether clients can be attached to `view`.
    pub(in crate::io) fn has_view(&self, view: View) -> bool {
        match view {
            View::Origin => true,
            View::Snapshot(id) => {
                self.stores.contains_key(&id)
                    && !self.leaving.contains_key(&id)
                    && !self.tree.is_merging(id)
            }
        }
    }
}
