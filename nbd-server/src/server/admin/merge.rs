//! `snapshot merge` and `snapshot cancel`: a disk, or a snapshot, is rolled back to one
//! of its snapshots.
//! The records mark it durably before the volume is told; the end comes as news
//! from the volume's thread.

use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use nbdsnap_engine::{StoreKind, View};

use super::Administrator;
use super::refusal::Refused;
use super::remove::clean_up;
use super::turn::Turn;
use crate::control::protocol::{
    Answer, EventKind, MergeClients, SnapshotCancel, SnapshotMerge, SnapshotName,
};
use crate::io::{MAPPED, News, NotMerged, VolumeAccess, VolumeId, VolumeOrder, What};
use crate::names;
use crate::server::registry::{MergeState, SnapshotEntry, Suspension, VolumeEntry};
use crate::state::record::State;

/// A disk comes to rest within this time, mostly.
const BEGIN: Duration = Duration::from_mins(1);

impl Turn<'_> {
    pub(super) fn merge(&mut self, merge: &SnapshotMerge) -> Result<Answer, Refused> {
        let name = &merge.snapshot;
        let (_, volume, entry) = self.find(name)?;
        let tries_again = matches!(entry.merge, MergeState::Begun { .. });
        if entry.kind == StoreKind::Transient {
            return Err(Refused::MergeTransient(name.clone()));
        }
        let volume_entry = self.registry.volume(&name.volume).expect("found above");
        let depending = volume_entry.dependents(&name.snapshot);
        if !depending.is_empty() {
            return Err(Refused::Depended(name.clone(), depending));
        }
        let of = names::origin(&name.snapshot);
        match volume_entry.origin.access {
            VolumeAccess::ReadWrite => {}
            VolumeAccess::Shared if of.is_some() => {}
            VolumeAccess::Shared => return Err(Refused::MergeShared(name.clone())),
            VolumeAccess::ReadOnly => return Err(Refused::ReadOnly(name.volume.clone())),
        }
        let below = of.and_then(|of| volume_entry.snapshot(of));
        if below.is_some_and(|below| below.read_only) {
            let why = "what it was taken of takes no writes".to_owned();
            return Err(Refused::NotMergeable(name.clone(), why));
        }
        if volume_entry.suspension != Suspension::Running {
            return Err(Refused::StandsStill(name.volume.clone()));
        }
        // One that has failed is taken up again: the engine knows whether it has.
        let others = volume_entry.merging_into(of);
        if let Some(other) = others.filter(|_| !tries_again) {
            return Err(Refused::Merging(volume_entry.name_of(other)));
        }
        let delete_cow = merge.delete_cow;
        let clients = self.clients_below(name, volume)?;
        match merge.clients {
            MergeClients::Wait if clients > 0 => {
                self.set_merge(name, MergeState::Waiting { delete_cow });
                self.tell(EventKind::MergeWaiting, name);
                // The last of them may have gone between the look and the note.
                if self.clients_below(name, volume)? == 0 {
                    match self.begin_merge(name, true, delete_cow) {
                        Ok(()) | Err(Refused::MergeInUse(..)) => {}
                        Err(refused) => return Err(refused),
                    }
                }
            }
            MergeClients::Refuse if clients > 0 && !tries_again => {
                return Err(in_use(name, clients));
            }
            MergeClients::Force => self.begin_merge(name, false, delete_cow)?,
            MergeClients::Wait | MergeClients::Refuse => {
                self.begin_merge(name, !tries_again, delete_cow)?;
            }
        }
        if self.find(name).is_err() {
            // A small one may be done by now.
            return Ok(Answer::Snapshots(Vec::new()));
        }
        self.report_named(std::slice::from_ref(name))
    }

    pub(super) fn cancel(&mut self, cancel: &SnapshotCancel) -> Result<Answer, Refused> {
        let name = &cancel.snapshot;
        let (_, _, entry) = self.find(name)?;
        if !matches!(entry.merge, MergeState::Waiting { .. }) {
            return Err(Refused::NoMergeWaits(name.clone()));
        }
        self.set_merge(name, MergeState::None);
        self.tell(EventKind::MergeCancelled, name);
        self.report_named(std::slice::from_ref(name))
    }

    fn begin_merge(
        &mut self,
        name: &SnapshotName,
        only_idle: bool,
        delete_cow: bool,
    ) -> Result<(), Refused> {
        let (shard, volume, entry) = self.find(name)?;
        let (snapshot, before) = (entry.id, entry.merge);
        self.record_merging(name, delete_cow)?;
        // It vanishes from the lists before its clients are dropped.
        self.set_merge(name, MergeState::Begun { delete_cow });
        self.publish();
        let (begun, answer) = channel();
        let order = VolumeOrder::Merge {
            snapshot,
            only_idle,
            begun,
        };
        self.shards[shard].order(volume, order);
        let until = Instant::now() + BEGIN;
        let begun = match self.wait(shard, &answer, Some(until)) {
            Err(Refused::TooSlow) => {
                return Err(Refused::MergeSlow(name.clone(), BEGIN.as_secs()));
            }
            other => other?,
        };
        let refused = match begun {
            Ok(()) => return Ok(()),
            Err(NotMerged::InUse(clients)) => in_use(name, clients),
            Err(NotMerged::Refused(error)) => {
                Refused::NotMergeable(name.clone(), error.to_string())
            }
            Err(NotMerged::Failed(why)) => Refused::NotMergeable(name.clone(), why.to_owned()),
        };
        // The mark goes again, or says what it said before.
        self.set_merge(name, before);
        self.publish();
        self.record(|_| ())?;
        Err(refused)
    }

    /// Clients attached to what a snapshot was taken of.
    fn clients_below(&mut self, name: &SnapshotName, volume: VolumeId) -> Result<u64, Refused> {
        let entry = self.registry.volume(&name.volume);
        let view = entry.and_then(|entry| entry.view_below(&name.snapshot));
        self.count_clients(|one| one.volume == volume && Some(one.view) == view)
    }

    /// The mark that a restart goes by (durability.md, rule 12).
    fn record_merging(&mut self, name: &SnapshotName, delete_cow: bool) -> Result<(), Refused> {
        self.record(|next| {
            if let Some(one) = next.snapshot_mut(&name.volume, &name.snapshot) {
                one.merging = true;
                one.delete_cow = delete_cow;
            }
        })
    }

    fn set_merge(&mut self, name: &SnapshotName, state: MergeState) {
        let volume = self.registry.volume_mut(&name.volume);
        let entries = volume.into_iter().flat_map(|one| &mut one.snapshots);
        for entry in entries.filter(|entry| entry.name == name.snapshot) {
            entry.merge = state;
        }
    }

    /// Follow what has happened to a volume by itself.
    pub(super) fn hear(&mut self, news: &News) {
        if news.volume == MAPPED {
            return self.hear_of_mapped(news);
        }
        match &news.what {
            What::Merged => self.merged(news),
            What::ClientWent { .. } => self.origin_left(news),
            _ => {}
        }
    }

    fn merged(&mut self, news: &News) {
        let Some((id, _)) = &news.snapshot else {
            return;
        };
        let volumes = &self.registry.volumes;
        let Some(volume) = volumes.iter().find(|volume| volume.id == news.volume) else {
            return;
        };
        let Some(entry) = volume.snapshots.iter().find(|entry| entry.id == *id) else {
            return;
        };
        let delete_cow = matches!(entry.merge, MergeState::Begun { delete_cow: true });
        let name = SnapshotName {
            volume: volume.name.clone(),
            snapshot: entry.name.clone(),
        };
        let given_up = entry.store_to_give_up().filter(|_| delete_cow);
        let edit = |next: &mut State| next.remove_snapshot(&name.volume, &name.snapshot);
        let change = self.commit_change(edit, given_up.into_iter().collect());
        let (_, _, entry) = self.strike_out(&name);
        self.taken.give_back_cow(&name.to_string());
        self.publish();
        let cleaned = self.aside(|_| clean_up(&name, entry, delete_cow));
        let ended = change.and_then(|change| self.finish(change));
        for failed in [ended, cleaned] {
            if let Err(error) = failed {
                tracing::warn!(export = %name, "{error}");
            }
        }
        self.tell(EventKind::MergeDone, &name);
    }

    /// A client has gone: it may be the last that a merge waits for.
    fn origin_left(&mut self, news: &News) {
        let mut volumes = self.registry.volumes.iter();
        let Some(volume) = volumes.find(|volume| volume.id == news.volume) else {
            return;
        };
        let mut entries = volume.snapshots.iter();
        let Some((entry, delete_cow)) = entries.find_map(|entry| match entry.merge {
            MergeState::Waiting { delete_cow } if waits_for(volume, entry, news) => {
                Some((entry, delete_cow))
            }
            _ => None,
        }) else {
            return;
        };
        let name = volume.name_of(entry);
        if self.clients_below(&name, news.volume).unwrap_or(1) > 0 {
            return;
        }
        match self.begin_merge(&name, true, delete_cow) {
            // Somebody has come again: it goes on waiting.
            Ok(()) | Err(Refused::MergeInUse(..)) => {}
            Err(error) => {
                tracing::error!(export = %name, "the merge that waited cannot begin: {error}");
                self.set_merge(&name, MergeState::None);
                self.tell(EventKind::MergeFailed, &name);
            }
        }
    }
}

/// The news are of a client of what the snapshot was taken of.
fn waits_for(volume: &VolumeEntry, entry: &SnapshotEntry, news: &News) -> bool {
    let of = news.snapshot.as_ref();
    let left = of.map_or(View::Origin, |(id, _)| View::Snapshot(*id));
    volume.view_below(&entry.name) == Some(left)
}

fn in_use(name: &SnapshotName, clients: u64) -> Refused {
    let changes = names::origin_export(&name.volume, &name.snapshot);
    Refused::MergeInUse(changes, clients)
}

impl Administrator {
    /// The volume of which there may be something to follow.
    pub(super) fn concerned(&self, news: &News) -> Option<String> {
        if self.concerns_mapped(news) {
            return Some(news.volume_name.clone());
        }
        let mut volumes = self.registry.volumes.iter();
        let volume = volumes.find(|volume| volume.id == news.volume)?;
        let waits = |entry: &&SnapshotEntry| matches!(entry.merge, MergeState::Waiting { .. });
        let follows = match news.what {
            What::Merged => true,
            What::ClientWent { .. } => {
                let mut waiting = volume.snapshots.iter().filter(waits);
                waiting.any(|entry| waits_for(volume, entry, news))
            }
            _ => false,
        };
        follows.then(|| volume.name.clone())
    }
}
