//! `snapshot rename`. Clients stay attached. Those that were taken of the snapshot have
//! its name in theirs.

use super::refusal::Refused;
use super::turn::Turn;
use crate::control::protocol::{Answer, EventKind, EventReport, SnapshotName, SnapshotRename};
use crate::io::VolumeOrder;
use crate::names;

impl Turn<'_> {
    pub(super) fn rename(&mut self, rename: &SnapshotRename) -> Result<Answer, Refused> {
        let SnapshotRename { snapshot, name } = rename;
        let (shard, volume, _) = self.find(snapshot)?;
        let (volume_name, old) = (&snapshot.volume, &snapshot.snapshot);
        let new = names::path(names::origin(old), name);
        if let Some(why) = names::fault(name) {
            let name = name.clone();
            return Err(Refused::Name { name, why });
        }
        let newly_named = SnapshotName {
            volume: volume_name.clone(),
            snapshot: new.clone(),
        };
        if self.find(&newly_named).is_ok() {
            return Err(Refused::Exists(newly_named));
        }
        // What a snapshot is called from now on, if that is not what it was called.
        let renamed = |path: &str| match path.strip_prefix(&**old) {
            Some("") => Some(new.clone()),
            Some(rest) if rest.starts_with('@') => Some(format!("{new}{rest}")),
            _ => None,
        };
        let volume_entry = self.registry.volume(volume_name).expect("found above");
        let paths = volume_entry
            .snapshots
            .iter()
            .filter_map(|one| renamed(&one.name));
        for path in paths {
            if let Some((_, why)) = names::path_fault(&path) {
                return Err(Refused::Name { name: path, why });
            }
        }
        self.record(|next| next.rename_snapshots(volume_name, renamed))?;
        let books = &mut **self;
        let volume_entry = books.registry.volume_mut(volume_name);
        for entry in volume_entry.into_iter().flat_map(|one| &mut one.snapshots) {
            let Some(path) = renamed(&entry.name) else {
                continue;
            };
            let was = std::mem::replace(&mut entry.name, path.clone());
            let [was, is] = [&was, &path].map(|path| names::export(volume_name, path));
            books.taken.rename_cow(&was, &is);
            let event = EventReport::new(EventKind::Renamed)
                .of_volume(volume_name)
                .of_snapshot(&path)
                .saying(format!("was {was}"));
            books.events.publish(event);
            let order = VolumeOrder::Rename {
                snapshot: entry.id,
                name: path,
            };
            books.shards[shard].order(volume, order);
        }
        self.publish();
        self.report_named(&[newly_named])
    }
}
