//! What the volume has to tell: to the operator, in the log, and to whoever had
//! it move in.

use nbdsnap_engine::{Event, SnapshotId, View};

use super::{Hosted, State};
use crate::io::news::{News, What};
use crate::io::shard::Outside;

impl Hosted {
    /// Tell of what concerns others than whoever ordered it.
    fn herald(&self, event: &Event, outside: &Outside) {
        let (id, what) = match event {
            Event::Invalid(id, why) | Event::Unmarked(id, why) => (*id, What::Invalid(why)),
            Event::Overflow(id) => (*id, What::Overflow),
            Event::Filling(id, percent) => (*id, What::Filling(*percent)),
            Event::Full(id) => (*id, What::Full),
            Event::MergeBegun(id) => (*id, What::MergeBegun),
            Event::MergeProgress(id, percent) => (*id, What::MergeProgress(*percent)),
            Event::Merged(id) => (*id, What::Merged),
            Event::MergeFailed(id, why) => (*id, What::MergeFailed(why)),
            _ => return,
        };
        self.tell(id, what, outside);
    }

    /// Tell of a snapshot.
    pub(super) fn tell(&self, id: SnapshotId, what: What, outside: &Outside) {
        outside.herald.tell(News {
            volume: self.id,
            volume_name: self.name.clone(),
            snapshot: self.stores.get(&id).map(|store| (id, store.name.clone())),
            what,
        });
    }

    pub(super) fn handle_event(&mut self, event: &Event, outside: &Outside) {
        self.herald(event, outside);
        match event {
            Event::Created(id) => {
                tracing::info!(export = self.export(*id), "snapshot taken");
                if let Some(arrival) = &mut self.arrival {
                    arrival.created(*id);
                }
                self.go_on_arriving();
            }
            Event::CreateFailed(id) => {
                let export = self.export(*id);
                tracing::error!(export, "the snapshot could not be taken");
                if let Some(arrival) = self.arrival.take() {
                    arrival.fail(export);
                }
                self.stores.remove(id);
            }
            Event::Invalid(id, why) => tracing::warn!(
                export = self.export(*id),
                "the snapshot is lost: {why}; its reads and writes fail from now on, the origin goes on; \
                 give the next one a larger store"
            ),
            Event::MarkLost(id, why) => {
                tracing::error!(
                    export = self.export(*id),
                    "the snapshot is lost: {why}; its store could not be marked as lost, and is \
                     marked in the list of the disk's stores instead: look at the store's disk"
                );
                outside.herald.mark_lost(outside.loss(self.id, *id));
            }
            Event::Unmarked(id, why) => tracing::error!(
                export = self.export(*id),
                "the snapshot is lost: {why}; and neither its store nor the list of the disk's stores \
                 could be marked, so that the origin takes no more writes: stop the server, remove the store, and look at its disk"
            ),
            Event::Overflow(id) => tracing::warn!(
                export = self.export(*id),
                "the snapshot's store is full: it can still be read, but writes to it fail; \
                 copy what you need from it and take a new one with a larger store"
            ),
            Event::Removed(id) => {
                tracing::info!(export = self.export(*id), "snapshot removed");
                self.snapshot_removed(*id);
            }
            Event::Held(instant) => self.instant_held(*instant),
            Event::InstantFailed(instant) => {
                tracing::error!(volume = self.name, "no snapshot could be taken");
                self.instant_failed(*instant);
            }
            Event::MergeBegun(id) => {
                tracing::info!(
                    export = self.export(*id),
                    "the disk has been rolled back to the snapshot; its chunks are merged from now on"
                );
                self.merge_begun();
            }
            Event::MergeProgress(id, percent) => {
                tracing::debug!(export = self.export(*id), percent, "merging");
            }
            Event::Merged(id) => {
                tracing::info!(export = self.export(*id), "the snapshot is merged");
                self.stores.remove(id);
            }
            Event::MergeFailed(id, why) => {
                tracing::error!(
                    export = self.export(*id),
                    "the merge has stopped: {why}; the disk goes on reading as the snapshot"
                );
                self.merge_failed(why);
            }
            Event::Filling(id, percent) => tracing::info!(
                export = self.export(*id),
                percent,
                "the snapshot's store fills"
            ),
            Event::Full(id) => {
                tracing::warn!(export = self.export(*id), "the snapshot's store is full");
            }
            Event::Suspended(durable) => self.volume_suspended(*durable),
            Event::Closed(durable) => {
                if !durable {
                    tracing::error!(
                        export = self.name,
                        "closing could not make everything durable: the last writes may be lost; \
                         check the disk and the kernel's log"
                    );
                }
                self.state = State::Closed(*durable);
            }
        }
    }

    /// The volume's name, and for a snapshot its own.
    pub(in crate::io) fn names(&self, view: View) -> (String, Option<(SnapshotId, String)>) {
        let snapshot = match view {
            View::Origin => None,
            View::Snapshot(id) => self.stores.get(&id).map(|store| (id, store.name.clone())),
        };
        (self.name.clone(), snapshot)
    }

    pub(super) fn export(&self, id: SnapshotId) -> String {
        let name = self
            .stores
            .get(&id)
            .map_or("?", |store| store.name.as_str());
        format!("{}@{name}", self.name)
    }
}
