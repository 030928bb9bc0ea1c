//! Orders to a volume that is being served. Each is begun at once and reported
//! when it has ended; meanwhile the volume goes on.

use std::sync::mpsc::Sender;

use nbdsnap_engine::{SnapshotId, View};

use super::{Hosted, HostedStore, NewSnapshot, State};
use crate::io::disk::{Disk, LocalDisk};
use crate::io::file::Medium;

/// An order to one volume, and whom to tell how it ended. Whoever asked may have
/// given up: a report that nobody takes is dropped.
#[derive(Debug)]
pub enum VolumeOrder {
    /// Prepare the instant of new snapshots and hold the origin's writes. Ends
    /// with the ids when the volume is held, to stay so until
    /// [`VolumeOrder::Take`] or [`VolumeOrder::Abandon`]. One at a time.
    Hold {
        /// The snapshots.
        snapshots: Vec<NewSnapshot>,
        /// Where the ids go.
        held: Sender<Result<Vec<SnapshotId>, NotHeld>>,
    },
    /// Take the instant that is held, and go on.
    Take {
        /// Told when the snapshots are there.
        taken: Sender<()>,
    },
    /// Give the instant up, held or not, and go on.
    Abandon {
        /// Told when the snapshots' stores are not used any more.
        abandoned: Sender<()>,
    },
}

/// Why a volume cannot be held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotHeld {
    /// A flush of the origin failed.
    FlushFailed,
    /// The volume takes no more requests.
    Closing,
}

/// An instant that is being prepared, or held.
#[derive(Debug)]
pub(super) struct Hold {
    ids: Vec<SnapshotId>,
    missing: Vec<SnapshotId>,
    held: Sender<Result<Vec<SnapshotId>, NotHeld>>,
}

impl Hosted {
    /// Begin what is ordered; [`Hosted::pump`] goes on with it.
    pub(in crate::io) fn handle_order(&mut self, order: VolumeOrder) {
        match order {
            VolumeOrder::Hold { snapshots, held } => self.hold(snapshots, held),
            VolumeOrder::Take { taken } => {
                self.hold = None;
                let _ = taken.send(());
            }
            VolumeOrder::Abandon { abandoned } => {
                self.hold = None;
                let _ = abandoned.send(());
            }
        }
    }

    fn hold(
        &mut self,
        snapshots: Vec<NewSnapshot>,
        held: Sender<Result<Vec<SnapshotId>, NotHeld>>,
    ) {
        assert!(self.hold.is_none(), "one instant at a time");
        if self.state != State::Serving {
            let _ = held.send(Err(NotHeld::Closing));
            return;
        }
        let mut ids = Vec::new();
        for snapshot in snapshots {
            let id = self.volume.create_snapshot(snapshot.store);
            ids.push(id);
            self.add_store(id, snapshot.name, snapshot.disk.file);
        }
        self.hold = Some(Hold {
            missing: ids.clone(),
            ids,
            held,
        });
    }

    fn add_store(&mut self, id: SnapshotId, name: String, file: std::fs::File) {
        let disk = LocalDisk::new(Disk {
            file,
            medium: Medium::Store,
            read_only: self.stores_read_only,
        });
        self.stores.insert(id, HostedStore { name, disk });
    }

    pub(super) fn hold_created(&mut self, id: SnapshotId) {
        if let Some(hold) = &mut self.hold {
            hold.missing.retain(|missing| *missing != id);
            if hold.missing.is_empty() {
                let _ = hold.held.send(Ok(hold.ids.clone()));
            }
        }
    }

    pub(super) fn hold_failed(&mut self, id: SnapshotId) {
        if let Some(hold) = self.hold.take_if(|hold| hold.ids.contains(&id)) {
            let _ = hold.held.send(Err(NotHeld::FlushFailed));
        }
    }

    /// Whether clients can be attached to `view`.
    pub(in crate::io) fn has_view(&self, view: View) -> bool {
        match view {
            View::Origin => true,
            View::Snapshot(id) => self.stores.contains_key(&id),
        }
    }
}
