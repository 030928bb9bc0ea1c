//! `snapshot remove`: the records forget it first, for from the moment on at which
//! the volume lets a snapshot go its store misses writes; then it vanishes from
//! the lists, its clients are dropped, and its store is given back. One that others
//! were taken of goes only with all of these.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use super::refusal::Refused;
use super::turn::Turn;
use crate::control::protocol::{Answer, EventKind, SnapshotName, SnapshotRemove};
use crate::disks::{Scratch, shown, sync_folder_of};
use crate::io::{VolumeId, VolumeOrder};
use crate::names;
use crate::server::registry::{MergeState, SnapshotEntry};
use crate::state::keeper::Change;
use crate::state::record::State;

/// Operations on a store that is given up end within this time.
pub(super) const LEAVE: Duration = Duration::from_secs(30);

impl Turn<'_> {
    pub(super) fn remove(&mut self, remove: &SnapshotRemove) -> Result<Answer, Refused> {
        let names = &remove.snapshots;
        if names.is_empty() {
            return Err(Refused::NothingNamed);
        }
        for (place, name) in names.iter().enumerate() {
            if names[..place].contains(name) {
                return Err(Refused::Twice(name.clone()));
            }
            let (_, _, entry) = self.find(name)?;
            if entry.merge != MergeState::None {
                return Err(Refused::Merging(name.clone()));
            }
            let volume = self.registry.volume(&name.volume).expect("found above");
            let mut depending = volume.dependents(&name.snapshot);
            depending.retain(|other| !names.contains(other));
            if !depending.is_empty() {
                return Err(Refused::Depended(name.clone(), depending));
            }
            if remove.delete_cow && entry.cow_is_block_device {
                return Err(Refused::DeleteDevice(name.clone(), shown(&entry.cow)));
            }
        }
        let answer = self.report_named(names)?;
        let change = self.begin_removal(remove)?;
        let mut leaving = Vec::new();
        for name in names {
            leaving.push((name, self.strike_out(name)));
        }
        // Each before what it was taken of.
        leaving.sort_by_key(|(name, _)| Reverse(names::depth(&name.snapshot)));
        self.publish();
        let until = Instant::now() + LEAVE;
        let mut answers = Vec::new();
        for (name, (shard, volume, entry)) in leaving {
            let (removed, answer) = channel();
            let snapshot = entry.id;
            let order = VolumeOrder::Remove { snapshot, removed };
            self.shards[shard].order(volume, order);
            answers.push((name, shard, entry, answer));
        }
        let mut failed = None;
        let mut deleted = BTreeMap::new();
        for (name, shard, entry, answer) in answers {
            let ended = match self.wait(shard, &answer, Some(until)) {
                Err(Refused::TooSlow) => Err(Refused::StillBusy(name.clone(), LEAVE.as_secs())),
                other => other,
            };
            self.taken.give_back_cow(&name.to_string());
            let (cow, delete) = (entry.cow.clone(), remove.delete_cow);
            let cleaned = ended.and_then(|()| self.aside(|_| give_back(name, entry, delete)));
            if cleaned.is_ok() && delete {
                deleted.insert(cow.parent().map(Path::to_owned), (name, cow));
            }
            failed = failed.or(cleaned.err());
            self.tell(EventKind::Removed, name);
        }
        // Each folder once, of however many stores it had.
        for (name, cow) in deleted.into_values() {
            let durable = self.aside(|_| make_durable(name, &cow));
            failed = failed.or(durable.err());
        }
        self.finish(change)?;
        failed.map_or(Ok(answer), Err)
    }

    /// Record that the snapshots have gone: from here on their stores may miss writes.
    fn begin_removal(&mut self, remove: &SnapshotRemove) -> Result<Change, Refused> {
        let mut given_up = Vec::new();
        for name in &remove.snapshots {
            let (_, _, entry) = self.find(name)?;
            if remove.delete_cow {
                given_up.extend(entry.store_to_give_up());
            }
        }
        let edit = |next: &mut State| {
            for name in &remove.snapshots {
                next.remove_snapshot(&name.volume, &name.snapshot);
            }
        };
        self.commit_change(edit, given_up)
    }

    /// A snapshot, with the thread and the volume it lives on.
    pub(super) fn find(
        &self,
        name: &SnapshotName,
    ) -> Result<(usize, VolumeId, &SnapshotEntry), Refused> {
        let missing = || Refused::NoSnapshot(name.clone());
        let volume = self.registry.volume(&name.volume).ok_or_else(missing)?;
        let entry = volume.snapshot(&name.snapshot).ok_or_else(missing)?;
        Ok((volume.shard, volume.id, entry))
    }

    /// Take a snapshot that is there out of the registry.
    pub(super) fn strike_out(&mut self, name: &SnapshotName) -> (usize, VolumeId, SnapshotEntry) {
        let volume = self
            .registry
            .volume_mut(&name.volume)
            .expect("it was found");
        let here = |entry: &SnapshotEntry| entry.name == name.snapshot;
        let place = volume
            .snapshots
            .iter()
            .position(here)
            .expect("it was found");
        (volume.shard, volume.id, volume.snapshots.remove(place))
    }
}

/// See to the file of a store that nobody uses any more.
pub(super) fn clean_up(
    name: &SnapshotName,
    entry: SnapshotEntry,
    delete: bool,
) -> Result<(), Refused> {
    let cow = entry.cow.clone();
    give_back(name, entry, delete)?;
    if delete {
        make_durable(name, &cow)?;
    }
    Ok(())
}

/// That a store was deleted.
fn make_durable(name: &SnapshotName, cow: &Path) -> Result<(), Refused> {
    sync_folder_of(cow)
        .map_err(|error| Refused::NotDeleted(name.clone(), shown(cow), error.to_string()))
}

/// The same as [`clean_up`], not durable yet.
fn give_back(name: &SnapshotName, entry: SnapshotEntry, delete: bool) -> Result<(), Refused> {
    let path = shown(&entry.cow);
    let done = if delete {
        delete_store(&entry)
    } else {
        entry.scratch.map_or(Ok(()), Scratch::discard)
    };
    done.map_err(|error| Refused::NotDeleted(name.clone(), path, error.to_string()))
}

/// Delete the file, if it is still the store that was served.
fn delete_store(entry: &SnapshotEntry) -> io::Result<()> {
    let meta = std::fs::symlink_metadata(&entry.cow)?;
    let served = std::fs::metadata(&entry.cow)?;
    if Some((served.dev(), served.ino())) != entry.cow_inode {
        return Err(io::Error::other("another file lies there by now"));
    }
    if meta.is_symlink() {
        return Err(io::Error::other(
            "it is a symbolic link: delete what it leads to",
        ));
    }
    std::fs::remove_file(&entry.cow)
}
