//! A volume moves in with its snapshots. Those that were there before come in as
//! they are, each behind what it was taken of; the others are taken now, and one of a
//! snapshot that is still being taken when that is there.

use std::sync::mpsc::Sender;

use nbdsnap_engine::{SnapshotId, View};

use super::{Hosted, HostedStore, NewSnapshot, Views};
use crate::io::disk::{Disk, LocalDisk};
use crate::io::file::Medium;
use crate::names;

/// Snapshots that are still being taken before the volume can be announced.
#[derive(Debug)]
pub(super) struct Arrival {
    /// In the order in which they were given.
    views: Vec<Option<View>>,
    missing: Vec<SnapshotId>,
    /// Those whose origin is missing, with their places; the last comes first.
    upcoming: Vec<(usize, NewSnapshot)>,
    report: Sender<Views>,
}

impl Arrival {
    /// The snapshot is there.
    pub(super) fn created(&mut self, id: SnapshotId) {
        self.missing.retain(|missing| *missing != id);
    }

    /// It cannot be taken.
    pub(super) fn fail(self, export: String) {
        // Whoever asked may have given up.
        let _ = self.report.send(Err(export));
    }
}

impl Hosted {
    /// Have the snapshots come in; the views are reported when all are there.
    pub(super) fn receive(&mut self, snapshots: Vec<NewSnapshot>, report: Sender<Views>) {
        let views = vec![None; snapshots.len()];
        let mut upcoming: Vec<_> = snapshots.into_iter().enumerate().collect();
        upcoming.sort_by_key(|(_, one)| (one.fresh, names::depth(&one.name)));
        upcoming.reverse();
        self.arrival = Some(Arrival {
            views,
            missing: Vec::new(),
            upcoming,
            report,
        });
        self.go_on_arriving();
    }

    /// Have those come in whose origins are there.
    pub(super) fn go_on_arriving(&mut self) {
        let Some(mut arrival) = self.arrival.take() else {
            return;
        };
        let waiting = std::mem::take(&mut arrival.upcoming);
        for (place, snapshot) in waiting.into_iter().rev() {
            let Some(of) = self.origin_named(&snapshot.name) else {
                arrival.upcoming.push((place, snapshot));
                continue;
            };
            let export = names::export(&self.name, &snapshot.name);
            match self.bring_in(of, snapshot) {
                Some((id, is_there)) => {
                    arrival.views[place] = Some(View::Snapshot(id));
                    arrival.missing.extend((!is_there).then_some(id));
                }
                None => return arrival.fail(export),
            }
        }
        arrival.upcoming.reverse();
        if arrival.missing.is_empty()
            && let Some((_, lost)) = arrival.upcoming.first()
        {
            let export = names::export(&self.name, &lost.name);
            return arrival.fail(export);
        }
        self.arrival = Some(arrival);
    }

    /// A snapshot of a view, and whether it is there already; none: it cannot be taken.
    fn bring_in(&mut self, of: View, snapshot: NewSnapshot) -> Option<(SnapshotId, bool)> {
        let fresh = snapshot.fresh;
        let id = if fresh {
            self.tree.create_snapshot(of, snapshot.store).ok()?
        } else if snapshot.merging {
            self.tree.attach_merging(of, snapshot.store)
        } else {
            self.tree.attach_snapshot(of, snapshot.store)
        };
        self.add_store(id, snapshot.name, snapshot.disk.file);
        self.settle(id, snapshot.settings);
        Some((id, !fresh))
    }

    /// What the snapshot of this path is one of, if that is there.
    pub(super) fn origin_named(&self, path: &str) -> Option<View> {
        let Some(of) = names::origin(path) else {
            return Some(View::Origin);
        };
        // While one is taken anew there are two of its name, and the old one leaves.
        let mut named = self.stores.iter().rev();
        let named = named.find(|(id, store)| store.name == of && !self.leaving.contains_key(id));
        let view = View::Snapshot(*named?.0);
        self.tree.view_bytes(view).map(|_| view)
    }

    pub(super) fn add_store(&mut self, id: SnapshotId, name: String, file: std::fs::File) {
        let disk = LocalDisk::new(Disk {
            file,
            medium: Medium::Store,
            read_only: !self.access.writes_stores(),
        });
        self.stores.insert(id, HostedStore { name, disk });
    }

    pub(super) fn report_arrival(&mut self) {
        let complete =
            |arrival: &mut Arrival| arrival.missing.is_empty() && arrival.upcoming.is_empty();
        if let Some(arrival) = self.arrival.take_if(complete) {
            let views = arrival.views.into_iter().flatten().collect();
            // Whoever asked may have given up.
            let _ = arrival.report.send(Ok(views));
        }
    }
}
