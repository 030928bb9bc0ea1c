//! Snapshots of any view come, go and are merged; and what there is to know of them.

use super::{Level, LevelKey, Node, Standing, Tree};
use crate::disk::Device;
use crate::request::{SnapshotId, View};
use crate::store::{Status, Store};
use crate::volume::{
    ExtendError, GrowError, InstantId, MergeError, MergeProgress, NotHeld, OnFull, SnapshotInfo,
};

/// Why no snapshot can be taken of a view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TakeError {
    /// It is not there, or not yet.
    #[error("there is no such disk or snapshot")]
    NoSuchView,
    /// A snapshot is being merged into it, or it is about to be merged itself.
    #[error("it is being merged")]
    Merging,
    /// The tree is closing.
    #[error("the disk is closing")]
    Closing,
}

/// Why a snapshot is not removed. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RemoveError {
    /// There is none of that name.
    #[error("there is no such snapshot")]
    NoSuchSnapshot,
    /// Others were taken of it, and read what they did not copy from it: these.
    #[error("snapshots depend on it")]
    HasSnapshots(Vec<SnapshotId>),
    /// It is a part of its origin, or about to be.
    #[error("it is being merged")]
    Merging,
}

/// Why a merge was not begun. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NodeMergeError {
    /// Others were taken of it: it would vanish under these.
    #[error("snapshots depend on it")]
    HasSnapshots(Vec<SnapshotId>),
    /// Its volume refuses it.
    #[error(transparent)]
    Refused(#[from] MergeError),
}

impl Tree {
    /// Take in a snapshot of `of` that existed before; those that it is a snapshot
    /// of come in before it. See [`crate::Volume::attach_snapshot`].
    pub fn attach_snapshot(&mut self, of: View, store: Store) -> SnapshotId {
        let origin = self.level_of(of).expect("its origin came in before it");
        let level = self.numbered_level(origin);
        let id = level.volume.attach_snapshot(store);
        self.add_nodes(origin, &[id]);
        self.rise(id);
        id
    }

    /// Go on with a merge into `of` that was cut off. See
    /// [`crate::Volume::attach_merging`].
    pub fn attach_merging(&mut self, of: View, store: Store) -> SnapshotId {
        let origin = self.level_of(of).expect("its origin came in before it");
        let level = self.numbered_level(origin);
        let id = level.volume.attach_merging(store);
        self.next_snapshot = id.0 + 1;
        let standing = Standing::Merging;
        self.nodes.insert(id, Node { origin, standing });
        self.share_copy_memory();
        self.touch(origin);
        id
    }

    /// Take a snapshot of `of` now. See [`crate::Volume::create_snapshot`].
    pub fn create_snapshot(&mut self, of: View, store: Store) -> Result<SnapshotId, TakeError> {
        let origin = self.may_be_taken(of)?;
        let level = self.numbered_level(origin);
        let id = level.volume.create_snapshot(store);
        self.add_nodes(origin, &[id]);
        self.touch(origin);
        Ok(id)
    }

    /// Prepare one instant for several snapshots of `of`. See
    /// [`crate::Volume::begin_instant`]; instants of different views are held at the
    /// same time, so that they can be made one.
    pub fn begin_instant(
        &mut self,
        of: View,
        stores: Vec<Store>,
    ) -> Result<(InstantId, Vec<SnapshotId>), TakeError> {
        let origin = self.may_be_taken(of)?;
        let level = self.numbered_level(origin);
        let (instant, ids) = level.volume.begin_instant(stores);
        self.add_nodes(origin, &ids);
        self.instants.insert(instant, (origin, ids.clone()));
        self.touch(origin);
        Ok((instant, ids))
    }

    /// The instant is now. See [`crate::Volume::take_instant`].
    pub fn take_instant(&mut self, id: InstantId) -> Result<(), NotHeld> {
        let &(origin, _) = self.instants.get(&id).ok_or(NotHeld)?;
        self.levels[origin].volume.take_instant(id)?;
        self.instants.remove(&id);
        self.touch(origin);
        Ok(())
    }

    /// Give an instant up. See [`crate::Volume::abandon_instant`].
    pub fn abandon_instant(&mut self, id: InstantId) {
        // One that has failed already is gone with its event.
        self.settle();
        if let Some(&(origin, _)) = self.instants.get(&id) {
            self.levels[origin].volume.abandon_instant(id);
            self.forget_instant(id);
            self.touch(origin);
        }
    }

    /// Remove a snapshot that no other one was taken of. See
    /// [`crate::Volume::remove_snapshot`].
    pub fn remove_snapshot(&mut self, id: SnapshotId) -> Result<(), RemoveError> {
        self.settle();
        let node = self.nodes.get(&id).ok_or(RemoveError::NoSuchSnapshot)?;
        let origin = node.origin;
        if self.levels[origin].volume.merging() == Some(id) {
            return Err(RemoveError::Merging);
        }
        if matches!(node.standing, Standing::Removing) {
            return Err(RemoveError::NoSuchSnapshot);
        }
        let dependents = self.snapshots_of(View::Snapshot(id));
        if !dependents.is_empty() {
            return Err(RemoveError::HasSnapshots(dependents));
        }
        self.leave(id, Standing::Removing);
        self.levels[origin].volume.remove_snapshot(id);
        self.touch(origin);
        Ok(())
    }

    /// Roll a view back to a snapshot of it that no other one was taken of. See
    /// [`crate::Volume::begin_merge`]. The view's other snapshots keep their content,
    /// and so does whatever it is itself a snapshot of. A write to the snapshot that
    /// is under way may fail, having happened in part: the merge takes what it finds.
    pub fn begin_merge(&mut self, id: SnapshotId) -> Result<(), NodeMergeError> {
        self.settle();
        let node = self.nodes.get(&id).ok_or(MergeError::NoSuchSnapshot)?;
        let origin = node.origin;
        if self.course.ends() {
            return Err(MergeError::Closing.into());
        }
        let dependents = self.snapshots_of(View::Snapshot(id));
        if !dependents.is_empty() {
            return Err(NodeMergeError::HasSnapshots(dependents));
        }
        self.levels[origin].volume.begin_merge(id)?;
        self.touch(origin);
        Ok(())
    }

    /// The snapshots that were taken of a view, those included that are being
    /// taken, removed or merged.
    pub fn snapshots_of(&self, view: View) -> Vec<SnapshotId> {
        let Some(key) = self.level_of(view) else {
            return Vec::new();
        };
        let of_it = self.nodes.iter().filter(|(_, node)| node.origin == key);
        of_it.map(|(&id, _)| id).collect()
    }

    /// What a snapshot was taken of.
    pub fn origin_of(&self, id: SnapshotId) -> Option<View> {
        let origin = self.nodes.get(&id)?.origin;
        let below = self.levels[origin].below;
        Some(below.map_or(View::Origin, |below| View::Snapshot(below.snapshot)))
    }

    /// Bytes of a view; none if it is not there.
    pub fn view_bytes(&self, view: View) -> Option<u64> {
        let key = self.level_of(view)?;
        self.levels[key].volume.view_bytes(View::Origin)
    }

    /// See [`crate::Volume::status`].
    pub fn status(&self, id: SnapshotId) -> Option<Status> {
        self.origin_level(id)?.volume.status(id)
    }

    /// See [`crate::Volume::snapshot_info`].
    pub fn snapshot_info(&self, id: SnapshotId) -> Option<SnapshotInfo> {
        self.origin_level(id)?.volume.snapshot_info(id)
    }

    /// How far the merge into a view has come. See [`crate::Volume::merge_progress`].
    pub fn merge_progress(&self, of: View) -> Option<MergeProgress> {
        self.levels[self.level_of(of)?].volume.merge_progress()
    }

    /// How far the merge of a snapshot into its origin has come, if it has begun.
    pub fn merge_of(&self, id: SnapshotId) -> Option<MergeProgress> {
        self.origin_level(id)?
            .volume
            .merge_progress()
            .filter(|_| self.is_merging(id))
    }

    /// A snapshot's merge into its origin has been ordered or is under way.
    pub fn is_merging(&self, id: SnapshotId) -> bool {
        self.origin_level(id)
            .is_some_and(|level| level.volume.merging() == Some(id))
    }

    /// The snapshot whose merge into a view has been ordered or is under way.
    pub fn merging(&self, of: View) -> Option<SnapshotId> {
        self.levels[self.level_of(of)?].volume.merging()
    }

    /// See [`crate::Volume::extend_snapshot`].
    pub fn extend_snapshot(&mut self, id: SnapshotId, limit_bytes: u64) -> Result<(), ExtendError> {
        let node = self.nodes.get(&id).ok_or(ExtendError::NoSuchSnapshot)?;
        let origin = node.origin;
        let extended = (self.levels[origin].volume).extend_snapshot(id, limit_bytes);
        self.touch(origin);
        extended
    }

    /// See [`crate::Volume::set_on_full`].
    pub fn set_on_full(&mut self, id: SnapshotId, on_full: OnFull) {
        if let Some(&Node { origin, .. }) = self.nodes.get(&id) {
            self.levels[origin].volume.set_on_full(id, on_full);
            self.touch(origin);
        }
    }

    /// See [`crate::Volume::marked_lost`].
    pub fn marked_lost(&mut self, id: SnapshotId, durable: bool) {
        if let Some(&Node { origin, .. }) = self.nodes.get(&id) {
            self.levels[origin].volume.marked_lost(id, durable);
            self.touch(origin);
        }
    }

    /// The disk at the root has become larger. Snapshots keep their lengths.
    pub fn grow_origin(&mut self, new_bytes: u64) -> Result<(), GrowError> {
        self.levels[self.root].volume.grow_origin(new_bytes)
    }

    /// The physical disks there are, that of the root first.
    pub fn devices(&self) -> Vec<Device> {
        let stores = self.nodes.keys().map(|&id| Device::Cow(id));
        std::iter::once(Device::Origin).chain(stores).collect()
    }

    fn origin_level(&self, id: SnapshotId) -> Option<&Level> {
        Some(&self.levels[self.nodes.get(&id)?.origin])
    }

    /// The level, ready to take snapshots in under the tree's next numbers, of at
    /// most one instant.
    fn numbered_level(&mut self, key: LevelKey) -> &mut Level {
        let level = &mut self.levels[key];
        level.volume.number_next_snapshot(self.next_snapshot);
        level.volume.number_next_instant(self.next_instant);
        self.next_instant += 1;
        level
    }

    fn add_nodes(&mut self, origin: LevelKey, ids: &[SnapshotId]) {
        for &id in ids {
            let standing = Standing::Creating;
            self.nodes.insert(id, Node { origin, standing });
            self.next_snapshot = id.0 + 1;
        }
        self.share_copy_memory();
    }

    fn may_be_taken(&mut self, of: View) -> Result<LevelKey, TakeError> {
        self.settle();
        let key = self.level_of(of).ok_or(TakeError::NoSuchView)?;
        let merges_away = matches!(of, View::Snapshot(id) if self.is_merging(id));
        if self.levels[key].volume.merging().is_some() || merges_away {
            return Err(TakeError::Merging);
        }
        if self.course.ends() {
            return Err(TakeError::Closing);
        }
        Ok(key)
    }

    /// The instant is gone, and its snapshots with it.
    pub(super) fn forget_instant(&mut self, id: InstantId) {
        let (_, snapshots) = self.instants.remove(&id).expect("an instant ends once");
        for id in snapshots {
            // Those that were removed before it say so by an event of their own.
            if let Some(node) = self.nodes.get(&id)
                && matches!(node.standing, Standing::Creating)
            {
                self.nodes.remove(&id);
            }
        }
        self.share_copy_memory();
    }
}
