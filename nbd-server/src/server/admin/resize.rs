//! `snapshot extend` and `volume resize`: stores and disks that become larger.

use std::sync::mpsc::channel;

use super::refusal::Refused;
use super::turn::Turn;
use crate::cli::size;
use crate::control::protocol::{
    Answer, EventKind, EventReport, SnapshotExtend, SnapshotName, StoreLimit, VolumeResize,
};
use crate::io::VolumeOrder;

impl Turn<'_> {
    pub(super) fn extend(&mut self, extend: &SnapshotExtend) -> Result<Answer, Refused> {
        let name = &extend.snapshot;
        let (shard, volume, entry) = self.find(name)?;
        let snapshot = entry.id;
        let entry_is_device = entry.cow_is_block_device;
        let limit = match (extend.size, entry.cow_is_block_device) {
            (Some(_), true) => return Err(Refused::ExtendDevice(name.clone())),
            (None, false) => return Err(Refused::ExtendBy(name.clone())),
            (None, true) => None,
            (Some(size), false) => {
                let bytes = size.bytes(entry.bytes);
                let chunk = entry.chunk_bytes;
                Some(bytes / chunk * chunk)
            }
        };
        let (extended, answer) = channel();
        let order = VolumeOrder::Extend {
            snapshot,
            limit,
            extended,
        };
        self.shards[shard].order(volume, order);
        let limit = self
            .wait(shard, &answer, None)?
            .map_err(|why| Refused::NotExtended(name.clone(), why))?;
        if !entry_is_device {
            self.set_limit(name, limit)?;
        }
        let event = EventReport::new(EventKind::Extended).of_volume(&name.volume);
        let event = event.of_snapshot(&name.snapshot);
        self.events
            .publish(event.saying(format!("to {}", size::show(limit))));
        self.report_named(std::slice::from_ref(name))
    }

    /// Remember how far a store may grow.
    fn set_limit(&mut self, name: &SnapshotName, limit: u64) -> Result<(), Refused> {
        let volume = self.registry.volume_mut(&name.volume);
        let entries = volume.into_iter().flat_map(|one| &mut one.snapshots);
        for entry in entries.filter(|entry| entry.name == name.snapshot) {
            entry.limit = Some(limit);
        }
        self.record(|_| ())
    }

    pub(super) fn resize(&mut self, resize: &VolumeResize) -> Result<Answer, Refused> {
        let name = &resize.name;
        let missing = || Refused::NoVolume(name.clone());
        let volume = self.registry.volume_mut(name).ok_or_else(missing)?;
        let (shard, id, before) = (volume.shard, volume.id, volume.origin.bytes);
        let (measured, answer) = channel();
        self.shards[shard].order(id, VolumeOrder::Measure { measured });
        let bytes = self
            .wait(shard, &answer, None)?
            .map_err(|why| Refused::NotResized(name.clone(), why))?;
        if bytes != before {
            let volume = self.registry.volume_mut(name).expect("it was there");
            volume.origin.bytes = bytes;
            self.publish();
            let event = EventReport::new(EventKind::VolumeResized).of_volume(name);
            self.events
                .publish(event.saying(format!("to {}", size::show(bytes))));
        }
        self.report_volumes(&|one| one == name)
    }
}

impl StoreLimit {
    /// In bytes, for a disk of so many.
    pub(super) fn bytes(self, origin: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::PercentOfOrigin(percent) => (u128::from(origin) * u128::from(percent) / 100)
                .try_into()
                .unwrap_or(u64::MAX),
        }
    }
}
