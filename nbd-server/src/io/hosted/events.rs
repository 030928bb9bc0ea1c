//! What the volume has to tell: to the operator, in the log, and to whoever had
//! it move in.

use nbdsnap_engine::{Event, SnapshotId};

use super::{Hosted, State};

impl Hosted {
    pub(super) fn handle_event(&mut self, event: &Event) {
        match event {
            Event::Created(id) => {
                tracing::info!(export = self.export(*id), "snapshot taken");
                if let Some(arrival) = &mut self.arrival {
                    arrival.missing.retain(|missing| missing != id);
                }
            }
            Event::CreateFailed(id) => {
                let export = self.export(*id);
                tracing::error!(export, "the snapshot could not be taken");
                if let Some(arrival) = self.arrival.take() {
                    let _ = arrival.report.send(Err(export));
                }
                self.stores.remove(id);
            }
            Event::Invalid(id, why) => tracing::warn!(
                export = self.export(*id),
                "the snapshot is lost: {why}; its reads and writes fail from now on, the origin goes on; \
                 give the next one a larger store"
            ),
            Event::Unmarked(id, why) => tracing::error!(
                export = self.export(*id),
                "the snapshot is lost: {why}; and its store could not be marked as lost, so that the \
                 origin takes no more writes: stop the server, remove the store, and look at its disk"
            ),
            Event::Overflow(id) => tracing::warn!(
                export = self.export(*id),
                "the snapshot's store is full: it can still be read, but writes to it fail; \
                 copy what you need from it and take a new one with a larger store"
            ),
            Event::Removed(id) => {
                tracing::info!(export = self.export(*id), "snapshot removed");
                self.stores.remove(id);
            }
            Event::MergeBegun(id) => tracing::info!(
                export = self.export(*id),
                "the disk has been rolled back to the snapshot; its chunks are merged from now on"
            ),
            Event::Merged(id) => {
                tracing::info!(export = self.export(*id), "the snapshot is merged");
            }
            Event::MergeFailed(id, why) => tracing::error!(
                export = self.export(*id),
                "the merge has stopped: {why}; the disk goes on reading as the snapshot"
            ),
            Event::Filling(id, percent) => {
                tracing::info!(
                    export = self.export(*id),
                    percent,
                    "the snapshot's store fills"
                );
            }
            Event::Full(id) => {
                tracing::warn!(export = self.export(*id), "the snapshot's store is full");
            }
            // Nobody here orders these.
            Event::Held(_) | Event::InstantFailed(_) | Event::Suspended(_) => {}
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

    pub(super) fn export(&self, id: SnapshotId) -> String {
        let name = self
            .stores
            .get(&id)
            .map_or("?", |store| store.name.as_str());
        format!("{}@{name}", self.name)
    }

    pub(super) fn report_arrival(&mut self) {
        let complete = self.arrival.take_if(|arrival| arrival.missing.is_empty());
        if let Some(arrival) = complete {
            // Whoever asked may have given up.
            let _ = arrival.report.send(Ok(arrival.views));
        }
    }
}
