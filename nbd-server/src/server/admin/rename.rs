//! `snapshot rename`. Clients stay attached.

use super::refusal::Refused;
use super::turn::Turn;
use crate::control::protocol::{Answer, EventKind, EventReport, SnapshotName, SnapshotRename};
use crate::io::VolumeOrder;
use crate::names;

impl Turn<'_> {
    pub(super) fn rename(&mut self, rename: &SnapshotRename) -> Result<Answer, Refused> {
        let SnapshotRename { snapshot, name } = rename;
        let (shard, volume, entry) = self.find(snapshot)?;
        let id = entry.id;
        let new = SnapshotName {
            volume: snapshot.volume.clone(),
            snapshot: name.clone(),
        };
        if let Some(why) = names::fault(name) {
            let name = name.clone();
            return Err(Refused::Name { name, why });
        }
        if self.find(&new).is_ok() {
            return Err(Refused::Exists(new));
        }
        self.record(|next| {
            if let Some(one) = next.snapshot_mut(&snapshot.volume, &snapshot.snapshot) {
                one.name.clone_from(name);
            }
        })?;
        self.taken
            .rename_cow(&snapshot.to_string(), &new.to_string());
        let volume_entry = self.registry.volume_mut(&snapshot.volume);
        let entries = volume_entry.into_iter().flat_map(|one| &mut one.snapshots);
        for entry in entries.filter(|entry| entry.id == id) {
            entry.name.clone_from(name);
        }
        let order = VolumeOrder::Rename {
            snapshot: id,
            name: name.clone(),
        };
        self.shards[shard].order(volume, order);
        self.publish();
        let event = EventReport::new(EventKind::Renamed)
            .of_volume(&snapshot.volume)
            .of_snapshot(name)
            .saying(format!("was {snapshot}"));
        self.events.publish(event);
        self.report_named(&[new])
    }
}
