//! What there is, and how it is doing.

use std::collections::BTreeMap;

use nbdsnap_engine::{SnapshotId, Status, View};
use nbdsnap_format::SECTOR_BYTES;

use super::refusal::Refused;
use super::turn::Turn;
use crate::control::protocol::{
    Answer, MergeReport, Selection, SnapshotName, SnapshotReport, SnapshotState, VolumeReport,
    WhenFull,
};
use crate::io::{ClientStatus, HostedStatus, VolumeAccess, VolumeId};
use crate::names;
use crate::server::registry::{MergeState, SnapshotEntry, VolumeEntry};

/// What the volumes' threads say.
struct Said {
    statuses: BTreeMap<(VolumeId, SnapshotId), HostedStatus>,
    clients: Vec<ClientStatus>,
}

impl Said {
    fn clients_of(&self, volume: VolumeId, view: View) -> u64 {
        let here = |client: &&ClientStatus| client.volume == volume && client.view == view;
        self.clients.iter().filter(here).count() as u64
    }
}

impl Turn<'_> {
    /// All snapshots of a volume, for `VOLUME`; one, for `VOLUME@NAME`; else all.
    pub(super) fn report_snapshots(&mut self, selection: &Selection) -> Result<Answer, Refused> {
        // Before a look at the registry: while it waits, snapshots come and go.
        let said = self.ask_shards()?;
        let mut wanted = Vec::new();
        if selection.names.is_empty() {
            for volume in &self.registry.volumes {
                wanted.extend(all_of(volume));
            }
        }
        for text in &selection.names {
            let name = text.split_once('@');
            let volume = name.map_or(text.as_str(), |(volume, _)| volume);
            let entry = self
                .registry
                .volume(volume)
                .ok_or_else(|| Refused::NoVolume(volume.to_owned()))?;
            match name {
                None => wanted.extend(all_of(entry)),
                Some((volume, snapshot)) => wanted.push(SnapshotName {
                    volume: volume.to_owned(),
                    snapshot: snapshot.to_owned(),
                }),
            }
        }
        self.reports_of(&wanted, &said)
    }

    /// Just these.
    pub(super) fn report_named(&mut self, wanted: &[SnapshotName]) -> Result<Answer, Refused> {
        let said = self.ask_shards()?;
        self.reports_of(wanted, &said)
    }

    fn reports_of(&mut self, wanted: &[SnapshotName], said: &Said) -> Result<Answer, Refused> {
        let mut reports = Vec::new();
        for name in wanted {
            let missing = || Refused::NoSnapshot(name.clone());
            let volume = self.registry.volume_mut(&name.volume).ok_or_else(missing)?;
            let (id, volume_name) = (volume.id, volume.name.clone());
            let entry = volume
                .snapshots
                .iter_mut()
                .find(|entry| entry.name == name.snapshot)
                .ok_or_else(missing)?;
            reports.push(report(id, &volume_name, entry, said));
        }
        Ok(Answer::Snapshots(reports))
    }

    /// Those volumes that are `wanted`, by name.
    pub(super) fn report_volumes(
        &mut self,
        wanted: &dyn Fn(&str) -> bool,
    ) -> Result<Answer, Refused> {
        let said = self.ask_shards()?;
        let volumes = self.registry.volumes.iter();
        let volumes = volumes.filter(|volume| wanted(&volume.name));
        let clients = |volume: &VolumeEntry| said.clients_of(volume.id, View::Origin);
        let volumes = volumes.map(|volume| volume.report(clients(volume)));
        Ok(Answer::Volumes(volumes.collect()))
    }

    fn ask_shards(&mut self) -> Result<Said, Refused> {
        let mut said = Said {
            statuses: BTreeMap::new(),
            clients: Vec::new(),
        };
        let asked: Vec<_> = self
            .shards
            .iter()
            .map(|shard| (shard.statuses(), shard.clients()))
            .collect();
        for (shard, (statuses, clients)) in asked.into_iter().enumerate() {
            let statuses: Vec<HostedStatus> = self.wait(shard, &statuses, None)?;
            said.statuses.extend(
                statuses
                    .into_iter()
                    .map(|one| ((one.volume, one.snapshot), one)),
            );
            said.clients.extend(self.wait(shard, &clients, None)?);
        }
        Ok(said)
    }
}

impl VolumeEntry {
    /// What is said of it, when so many clients are attached to its origin.
    pub(super) fn report(&self, clients: u64) -> VolumeReport {
        VolumeReport {
            name: self.name.clone(),
            disk: self.origin.path.clone(),
            bytes: self.origin.bytes,
            read_only: !self.origin.access.writes_origin(),
            shared: self.origin.access == VolumeAccess::Shared,
            suspended: self.is_suspended(),
            snapshots: all_of(self).map(|name| name.to_string()).collect(),
            clients,
        }
    }
}

fn all_of(volume: &VolumeEntry) -> impl Iterator<Item = SnapshotName> + '_ {
    let order = volume.in_tree_order().into_iter();
    order.map(|snapshot| volume.name_of(snapshot))
}

fn report(
    volume: VolumeId,
    volume_name: &str,
    entry: &mut SnapshotEntry,
    said: &Said,
) -> SnapshotReport {
    let hosted = said.statuses.get(&(volume, entry.id));
    let status = hosted.map_or(Status::Invalid, |hosted| hosted.status);
    let info = hosted.and_then(|hosted| hosted.info);
    let progress = hosted.and_then(|hosted| hosted.merge);
    let mut report = SnapshotReport {
        name: names::export(volume_name, &entry.name),
        volume: volume_name.to_owned(),
        snapshot: entry.name.clone(),
        of: names::origin_export(volume_name, &entry.name),
        state: match (status, entry.merge) {
            (Status::MergeFailed, _) => SnapshotState::MergeFailed,
            (_, MergeState::Begun { .. }) => SnapshotState::Merging,
            (Status::Active { .. }, MergeState::Waiting { .. }) => SnapshotState::MergeWaiting,
            (Status::Active { .. }, MergeState::None) => SnapshotState::Active,
            (Status::Overflow, _) => SnapshotState::Overflow,
            (Status::Invalid, _) => SnapshotState::Invalid,
        },
        cow: entry.cow.clone(),
        kind: entry.kind.into(),
        read_only: entry.read_only,
        taken_at: entry.taken.at(),
        bytes: entry.bytes,
        chunk_bytes: entry.chunk_bytes,
        allocated_bytes: None,
        metadata_bytes: None,
        data_bytes: None,
        limit_bytes: None,
        free_bytes: None,
        fill_bytes_per_second: None,
        full_in_seconds: None,
        on_full: info.map_or(WhenFull::default(), |info| info.on_full.into()),
        is_full: info.is_some_and(|info| info.is_full),
        paused_writes: info.map_or(0, |info| info.paused as u64),
        merge: progress.map(|progress| MergeReport {
            left_chunks: progress.left_chunks,
            total_chunks: progress.total_chunks,
        }),
        clients: said.clients_of(volume, View::Snapshot(entry.id)),
        status: format!("0 {} snapshot {status}", entry.bytes / SECTOR_BYTES),
    };
    if let Status::Active {
        allocated,
        total,
        metadata,
    } = status
    {
        let [allocated, total, metadata] =
            [allocated, total, metadata].map(|sectors| sectors * SECTOR_BYTES);
        let free = total.saturating_sub(allocated);
        let rate = entry.fill.measure(allocated);
        report.allocated_bytes = Some(allocated);
        report.metadata_bytes = Some(metadata);
        report.data_bytes = Some(allocated.saturating_sub(metadata));
        report.limit_bytes = Some(total);
        report.free_bytes = Some(free);
        report.fill_bytes_per_second = rate;
        report.full_in_seconds = rate.and_then(|rate| free.checked_div(rate));
    }
    report
}
