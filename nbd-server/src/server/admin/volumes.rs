//! `volume remove`: a disk leaves a running server; and who is attached to which.

use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use nbdsnap_engine::View;

use super::Administrator;
use super::refusal::Refused;
use crate::control::protocol::{Answer, EventKind, EventReport, SnapshotName, VolumeRemove};
use crate::io::{ClientStatus, VolumeId, VolumeOrder};

/// A volume that closes has this long.
pub(super) const LEAVE: Duration = Duration::from_mins(1);

impl Administrator {
    pub(super) fn remove_volume(&mut self, remove: &VolumeRemove) -> Result<Answer, Refused> {
        let name = &remove.name;
        let missing = || Refused::NoVolume(name.clone());
        let volume = self.registry.volume(name).ok_or_else(missing)?;
        let (id, shard) = (volume.id, volume.shard);
        let answer = self.report_volumes(&|one| one == name)?;
        if let Some(merging) = volume.merging() {
            return Err(Refused::Merging(SnapshotName {
                volume: name.clone(),
                snapshot: merging.name.clone(),
            }));
        }
        let clients = self.clients_of(id)?;
        if clients > 0 && !remove.force {
            return Err(Refused::InUse(name.clone(), clients));
        }
        // Its disk's list stays: the stores still belong to it.
        self.record(|next| next.volumes.retain(|one| one.name != *name))?;
        let place = self.registry.volumes.iter().position(|one| one.id == id);
        let entry = self
            .registry
            .volumes
            .remove(place.expect("it was found just now"));
        self.publish();
        let (left, told) = channel();
        self.shards[shard].order(id, VolumeOrder::Leave { left });
        let until = Instant::now() + LEAVE;
        let durable = match self.wait(shard, &told, Some(until)) {
            Err(Refused::TooSlow) => Err(Refused::VolumeBusy(name.clone(), LEAVE.as_secs())),
            other => other,
        };
        // Who is still busy keeps its locks: the same files are refused by those.
        self.taken.give_back_volume(name);
        let event = EventReport::new(EventKind::VolumeRemoved);
        self.events.publish(event.of_volume(name));
        let durable = durable?;
        entry.discard_scratch();
        if durable {
            Ok(answer)
        } else {
            Err(Refused::NotDurable(name.clone()))
        }
    }

    /// Clients attached to a volume or to one of its snapshots.
    fn clients_of(&self, volume: VolumeId) -> Result<u64, Refused> {
        self.count_clients(|client| client.volume == volume)
    }

    /// Clients attached to a volume itself.
    pub(super) fn origin_clients(&self, volume: VolumeId) -> Result<u64, Refused> {
        self.count_clients(|client| client.volume == volume && client.view == View::Origin)
    }

    pub(super) fn count_clients(
        &self,
        counts: impl Fn(&ClientStatus) -> bool,
    ) -> Result<u64, Refused> {
        let mut count = 0;
        for (number, shard) in self.shards.iter().enumerate() {
            let clients = self.wait(number, &shard.clients(), None)?;
            count += clients.iter().filter(|one| counts(one)).count() as u64;
        }
        Ok(count)
    }
}
