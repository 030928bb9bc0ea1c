//! `snapshot merge` and `snapshot reset` on mapped devices.
//!
//! A snapshot is merged by its own device, whose table becomes `snapshot-merge`: from
//! that moment what it was taken of reads as the snapshot by every device, so that no
//! other table has to change, as LVM has to have it. Once it is done the device goes.
//!
//! It is taken anew by way of a table of `error`, with which the old exceptions end, and
//! of a store that begins anew. The device stays the same.

use nbdsnap_engine::Status;
use nbdsnap_engine::dm::{DeviceId, Persistence, TableLine, Target};

use super::disks::DmMerge;
use super::ordered::{Found, delete_store};
use super::{Failed, Refused};
use crate::control::dm::{DmOrder, TextLine};
use crate::control::protocol::{
    Answer, EventKind, MergeClients, SnapshotMerge, SnapshotName, SnapshotReport, SnapshotReset,
};
use crate::io::{MAPPED, News, What};
use crate::server::admin::Administrator;
use crate::server::admin::turn::Turn;

impl Turn<'_> {
    pub(super) fn merge_on_mapped(&mut self, merge: &SnapshotMerge) -> Result<Answer, Refused> {
        let found = self.found(&merge.snapshot)?;
        if self.dm.merge_of(&found.info).is_some() {
            if found.line.status != Some(Status::MergeFailed) {
                return Err(Refused::Merging(found.name));
            }
            // What stands still takes the merge up again when it goes on.
            self.stand_still(&found.device(), true)?;
            self.stand_still(&found.device(), false)?;
            return self.report_on_mapped(&[found.info.name]);
        }
        self.check_merge(merge, &found)?;
        let (id, name) = (found.info.id, found.info.name.clone());
        let line = self.line_of(&found, Target::SnapshotMerge(found.pair.clone()));
        let begun = DmMerge {
            name: name.clone(),
            delete_cow: merge.delete_cow,
            total_chunks: chunks_of(&found.line, found.pair.chunk),
        };
        let loaded = self.dm_load(&found.device(), false, &[line]);
        // Before it begins: it may be done at once.
        self.dm.begin_merge(id, begun);
        let resumed = loaded.and_then(|_| self.stand_still(&found.device(), false));
        if let Err(failed) = resumed {
            self.dm.end_merge(id);
            self.stay_as_it_was(&found);
            return Err(not_mergeable(found.name, failed));
        }
        self.see_to_merges();
        self.report_on_mapped(&[name])
    }

    fn check_merge(&mut self, merge: &SnapshotMerge, found: &Found) -> Result<(), Refused> {
        let name = &found.name;
        if found.pair.persistence == Persistence::Transient {
            return Err(Refused::MergeTransient(name.clone()));
        }
        if found.line.status == Some(Status::Invalid) {
            let why = "it is lost, and nothing is left to merge".to_owned();
            return Err(Refused::NotMergeable(name.clone(), why));
        }
        self.check_free(found)?;
        self.check_origin_rests(found)?;
        if found.info.clients > 0 {
            let (export, clients) = (&found.info.name, found.info.clients);
            return Err(Refused::Mapped(format!(
                "{export} has clients attached ({clients}), and ends with the merge: detach them first"
            )));
        }
        let origin = found.pair.origin;
        let possible = self.mapped(move |mapped| mapped.mapper().may_merge(origin))?;
        if let Err(refused) = possible {
            return Err(Refused::NotMergeable(name.clone(), refused.why));
        }
        let clients: u64 = self.mapped(move |mapped| {
            let mapper = mapped.mapper();
            let ways = mapper.ways_to(&[origin]).into_iter();
            let ways = ways.filter_map(|id| mapper.info(id).ok());
            ways.map(|info| info.clients).sum()
        })?;
        match merge.clients {
            MergeClients::Force => Ok(()),
            MergeClients::Refuse | MergeClients::Wait if clients == 0 => Ok(()),
            MergeClients::Refuse => Err(Refused::Mapped(format!(
                "what {name} was taken of has clients attached ({clients}), under which it would change: detach them first, or use --force"
            ))),
            MergeClients::Wait => Err(Refused::Mapped(format!(
                "a merge of a mapped device does not wait for clients to go, and there are {clients}: detach them first, or use --force"
            ))),
        }
    }

    /// No other snapshot of the same origin is being merged.
    fn check_origin_rests(&mut self, found: &Found) -> Result<(), Refused> {
        let seen = self.look_at_mapped()?;
        let merges = |line: &TableLine| match &line.target {
            Target::SnapshotMerge(pair) => pair.origin == found.pair.origin,
            _ => false,
        };
        match seen.iter().find(|(_, lines)| lines.iter().any(merges)) {
            None => Ok(()),
            Some((info, _)) => Err(Refused::Mapped(format!(
                "{}: its origin is being merged by {}: wait for the end of that, and give that device another table, or remove it",
                found.name, info.name
            ))),
        }
    }

    /// A device whose new table is refused goes on with the old one.
    fn stay_as_it_was(&mut self, found: &Found) {
        let device = found.device();
        let cleared = self.dm_order(DmOrder::Clear {
            device: device.clone(),
        });
        if let Err(failed) = cleared.and(self.stand_still(&device, false)) {
            let why = Refused::from(failed);
            tracing::warn!(device = found.info.name, "it stands still: {why}");
        }
    }

    /// The devices go whose merges are done.
    pub(super) fn see_to_merges(&mut self) {
        let Ok(seen) = self.look_at_mapped() else {
            return;
        };
        for (info, lines) in seen {
            let Some(merge) = self.dm.merge_of(&info).cloned() else {
                continue;
            };
            match &lines[..] {
                [line] if matches!(line.target, Target::SnapshotMerge(_)) => {
                    if is_done(line) {
                        self.end_merge(info.id, &merge, line);
                    }
                }
                // Somebody has given the device another table.
                _ => self.dm.end_merge(info.id),
            }
        }
    }

    fn end_merge(&mut self, id: DeviceId, merge: &DmMerge, line: &TableLine) {
        let name = merge.name.clone();
        let report = match self.report_on_mapped(std::slice::from_ref(&name)) {
            Ok(Answer::Snapshots(reports)) => reports.into_iter().next(),
            _ => None,
        };
        let device = crate::control::dm::DeviceName::Name(name.clone());
        if let Err(failed) = self.dm_remove(&device, true) {
            if !self.dm.has_merge(id) {
                // Another order has seen to it at the same time.
                return;
            }
            let why = Refused::from(failed);
            tracing::warn!(device = name, "it is merged, and cannot be removed: {why}");
            return;
        }
        self.dm.end_merge(id);
        let Some(report) = report else {
            return;
        };
        let (volume, snapshot) = (report.volume.clone(), report.snapshot.clone());
        self.tell(EventKind::MergeDone, &SnapshotName { volume, snapshot });
        if merge.delete_cow && !self.is_named(line) {
            delete_at_end(&report);
        }
    }

    /// Whether a table still names a store, as that of a device that somebody has open.
    fn is_named(&mut self, line: &TableLine) -> bool {
        let lowers = line.target.lowers();
        let look = self.mapped(move |mapped| {
            let mapper = mapped.mapper();
            let mut devices = mapper.devices().into_iter();
            devices.any(|device| {
                let deps = mapper.deps(device.id, false).unwrap_or_default();
                lowers.last().is_some_and(|cow| deps.contains(cow))
            })
        });
        look.unwrap_or(true)
    }

    pub(super) fn reset_on_mapped(&mut self, reset: &SnapshotReset) -> Result<Answer, Refused> {
        let found = self.found(&reset.snapshot)?;
        let name = &found.name;
        if self.dm.merge_of(&found.info).is_some() {
            return Err(Refused::Merging(name.clone()));
        }
        self.check_free(&found)?;
        self.check_origin_rests(&found)?;
        if found.info.inactive_table {
            let device = &found.info.name;
            return Err(Refused::Mapped(format!(
                "{device} has a table that waits: 'nbdsnap dm clear {device}' first"
            )));
        }
        if found.info.clients > 0 && !reset.force {
            let clients = found.info.clients;
            return Err(Refused::Mapped(format!(
                "{name} has clients attached ({clients}), whose requests would fail while it is taken anew: detach them first, or use --force"
            )));
        }
        let device = found.device();
        let line = self.line_of(&found, Target::Snapshot(found.pair.clone()));
        let cow = found.pair.cow;
        let nothing = TextLine {
            target: "error".into(),
            params: String::new(),
            ..line
        };
        self.dm_load(&device, found.info.read_only, &[nothing])?;
        // With the device the store would be closed, if nothing else named it.
        let pins = self.dm.pins();
        let anew = self
            .stand_still(&device, false)
            .and_then(|()| match found.pair.persistence {
                Persistence::Transient => Ok(()),
                Persistence::Persistent | Persistence::PersistentOverflow => self.dm_blank(cow),
            })
            .and_then(|()| self.dm_load(&device, found.info.read_only, &[line]))
            .and_then(|_| self.stand_still(&device, false));
        self.dm.unpin(pins);
        if let Err(failed) = anew {
            let why = Refused::from(failed);
            let device = &found.info.name;
            return Err(Refused::Mapped(format!(
                "{name} shows nothing any more, and could not be taken anew: {why}; 'nbdsnap dm table {device}' shows the table that the device has now"
            )));
        }
        self.tell(EventKind::Reset, name);
        self.report_on_mapped(&[found.info.name])
    }

    /// Something has happened to mapped devices by itself.
    pub(in crate::server::admin) fn hear_of_mapped(&mut self, news: &News) {
        if news.what == What::Merged {
            self.see_to_merges();
        }
    }
}

impl Administrator {
    /// Whether the administrator has something to do about it.
    pub(in crate::server::admin) fn concerns_mapped(&self, news: &News) -> bool {
        news.volume == MAPPED && news.what == What::Merged && self.dm.has_merges()
    }
}

fn not_mergeable(name: SnapshotName, failed: Failed) -> Refused {
    let why = Refused::from(failed).to_string();
    Refused::NotMergeable(name, why)
}

/// All chunks are in the origin: nothing but the header and one area is left.
fn is_done(line: &TableLine) -> bool {
    match line.status {
        Some(Status::Active {
            allocated,
            metadata,
            ..
        }) => allocated == metadata,
        _ => false,
    }
}

/// The chunks that a snapshot's store holds.
fn chunks_of(line: &TableLine, chunk: u64) -> u64 {
    match line.status {
        Some(Status::Active {
            allocated,
            metadata,
            ..
        }) => allocated.saturating_sub(metadata) / chunk.max(1),
        _ => 0,
    }
}

fn delete_at_end(report: &SnapshotReport) {
    if let Err(error) = delete_store(report) {
        tracing::warn!(export = report.name, "{error}");
    }
}
