//! `volume remove`: a disk leaves a running server; and who is attached to which.

use std::collections::BTreeSet;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use super::refusal::Refused;
use super::turn::Turn;
use crate::control::protocol::{Answer, EventKind, EventReport, SnapshotName};
use crate::io::{ClientStatus, Shard, VolumeOrder};
use crate::server::registry::VolumeEntry;

/// A volume that closes has this long.
pub(super) const LEAVE: Duration = Duration::from_mins(1);

impl Turn<'_> {
    /// Serve these volumes no longer: all of them, or none if one cannot go.
    pub(super) fn remove_volumes(
        &mut self,
        names: &[String],
        force: bool,
    ) -> Result<Answer, Refused> {
        let leaving = self.check_removal(names, force)?;
        let answer = self.report_volumes(&|one| leaving.contains(one))?;
        // Their disks' lists stay: the stores still belong to them.
        self.record(|next| {
            next.volumes
                .retain(|one| !leaving.contains(one.name.as_str()));
        })?;
        let volumes = std::mem::take(&mut self.registry.volumes);
        let (gone, rest) = volumes
            .into_iter()
            .partition(|one| leaving.contains(one.name.as_str()));
        self.registry.volumes = rest;
        self.publish();
        let failed = self.see_off(gone);
        failed.map_or(Ok(answer), Err)
    }

    fn check_removal<'a>(
        &mut self,
        names: &'a [String],
        force: bool,
    ) -> Result<BTreeSet<&'a str>, Refused> {
        if names.is_empty() {
            return Err(Refused::NoVolumes);
        }
        let mut leaving = BTreeSet::new();
        let clients = self.all_clients()?;
        for name in names {
            let missing = || Refused::NoVolume(name.clone());
            let volume = self.registry.volume(name).ok_or_else(missing)?;
            if !leaving.insert(name.as_str()) {
                return Err(Refused::VolumeTwice(name.clone()));
            }
            if let Some(merging) = volume.merging() {
                return Err(Refused::Merging(SnapshotName {
                    volume: name.clone(),
                    snapshot: merging.name.clone(),
                }));
            }
            let here = clients.iter().filter(|one| one.volume == volume.id);
            let count = here.count() as u64;
            if count > 0 && !force {
                return Err(Refused::InUse(name.clone(), count));
            }
        }
        Ok(leaving)
    }

    /// Have volumes close that nobody finds any more; the first thing that went wrong.
    fn see_off(&mut self, volumes: Vec<VolumeEntry>) -> Option<Refused> {
        let until = Instant::now() + LEAVE;
        let mut leaving = Vec::new();
        for volume in volumes {
            let (left, told) = channel();
            self.shards[volume.shard].order(volume.id, VolumeOrder::Leave { left });
            leaving.push((volume, told));
        }
        let mut failed = None;
        for (volume, told) in leaving {
            let name = volume.name.clone();
            let durable = match self.wait(volume.shard, &told, Some(until)) {
                Err(Refused::TooSlow) => Err(Refused::VolumeBusy(name.clone(), LEAVE.as_secs())),
                other => other,
            };
            // Who is still busy keeps its locks: the same files are refused by those.
            self.taken.give_back_volume(&name);
            let event = EventReport::new(EventKind::VolumeRemoved);
            self.events.publish(event.of_volume(&name));
            let ended = durable.and_then(|durable| {
                volume.discard_scratch();
                let lost = Refused::NotDurable(name);
                if durable { Ok(()) } else { Err(lost) }
            });
            failed = failed.or(ended.err());
        }
        failed
    }

    pub(super) fn count_clients(
        &mut self,
        counts: impl Fn(&ClientStatus) -> bool,
    ) -> Result<u64, Refused> {
        let clients = self.all_clients()?;
        Ok(clients.iter().filter(|one| counts(one)).count() as u64)
    }

    fn all_clients(&mut self) -> Result<Vec<ClientStatus>, Refused> {
        let mut clients = Vec::new();
        let asked: Vec<_> = self.shards.iter().map(Shard::clients).collect();
        for (shard, answer) in asked.into_iter().enumerate() {
            clients.extend(self.wait(shard, &answer, None)?);
        }
        Ok(clients)
    }
}
