//! `snapshot reset`: the same snapshot, taken anew. A new store is made beside the
//! old one, and the records say which file it is and what its instant will be; when
//! the volume is held it takes the old one's name, which is the one step that a crash
//! can fall before or after ([`exchange`]); then the new snapshot's instant is taken,
//! and the old one ends. The snapshot has the same name, path and settings, and no
//! store of the disk misses a write.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::channel;
use std::time::Instant;

use nbdsnap_engine::{SnapshotId, StoreKind, View};
use nbdsnap_format::{ChunkSize, Header};

use super::create::{HeldPart, Part, log_notes};
use super::refusal::Refused;
use super::remove::LEAVE;
use super::turn::Turn;
use crate::control::protocol::{Answer, EventKind, SnapshotName, SnapshotReset};
use crate::disks::{Deed, Known, Made, SnapshotPlan, SnapshotRequest, Unrecorded};
use crate::io::VolumeOrder;
use crate::names;
use crate::server::moving::new_snapshot;
use crate::server::registry::{MergeState, SnapshotEntry, SnapshotFacts, Taken, now};
use crate::server::setup::OpenSnapshot;
use crate::state::attached::Anew;
use crate::state::files::{Files, SystemFiles, folder_of};
use crate::state::keeper::{Change, StateError};
use crate::state::place::settled;
use crate::state::record::IntentFile;

/// How a new store took the old one's name.
#[derive(Debug)]
enum Exchanged {
    /// For good.
    Durably,
    /// Its folder could not be flushed, for this reason.
    InDoubt(io::Error),
}

impl Turn<'_> {
    pub(super) fn reset(&mut self, reset: &SnapshotReset) -> Result<Answer, Refused> {
        let name = &reset.snapshot;
        self.check_reset(reset)?;
        let old = self.find(name)?.2.id;
        let file = IntentFile::to_make(settled(&self.find(name)?.2.cow));
        let mut change = self.begin_change(|_| (), vec![file.clone()])?;
        let mut exchanged = None;
        if let Err(refused) = self.make_and_exchange(name, &file, &mut change, &mut exchanged) {
            // Once the new store has the name, only a start can tell what has come of it.
            if exchanged.is_none() {
                self.forget(change);
            }
            return Err(refused);
        }
        self.publish();
        let ended = self.end_old(name, old);
        self.finish(change)?;
        // What the new store's record promised is so.
        self.record(|_| ())?;
        self.tell(EventKind::Reset, name);
        ended?;
        match exchanged {
            Some(Exchanged::InDoubt(error)) => Err(Refused::NameInDoubt(name.clone(), error)),
            _ => self.report_named(std::slice::from_ref(name)),
        }
    }

    fn check_reset(&mut self, reset: &SnapshotReset) -> Result<(), Refused> {
        let name = &reset.snapshot;
        let (_, id, entry) = self.find(name)?;
        let volume = self.registry.volume(&name.volume).expect("found above");
        if !volume.origin.access.writes_stores() {
            return Err(Refused::ReadOnly(name.volume.clone()));
        }
        if let Some(merging) = volume.merging_into(names::origin(&name.snapshot)) {
            return Err(Refused::Merging(volume.name_of(merging)));
        }
        let depending = volume.dependents(&name.snapshot);
        if !depending.is_empty() {
            return Err(Refused::Depended(name.clone(), depending));
        }
        if entry.cow_is_block_device {
            return Err(Refused::ResetDevice(name.clone()));
        }
        let view = View::Snapshot(entry.id);
        let clients = self.count_clients(|one| one.volume == id && one.view == view)?;
        if clients > 0 && !reset.force {
            return Err(Refused::ResetInUse(name.clone(), clients));
        }
        Ok(())
    }

    /// `exchanged` is set as soon as the new store has the old one's name.
    fn make_and_exchange(
        &mut self,
        name: &SnapshotName,
        file: &IntentFile,
        change: &mut Change,
        exchanged: &mut Option<Exchanged>,
    ) -> Result<(), Refused> {
        let made_as = file.made_as().expect("it is to be made");
        let (_, _, old) = self.find(name)?;
        let (kind, behaviour, cow) = (old.kind, old.behaviour, old.cow.clone());
        let request = SnapshotRequest {
            // Both are there for a while.
            name: format!("{} (new)", name.snapshot),
            cow: made_as.clone(),
            kind,
            chunk: Some(old.chunk_bytes),
            size: old.limit,
            read_only: old.read_only,
            format: false,
            adopt: false,
            must_exist: false,
            known: Known::default(),
            behaviour: Some(behaviour),
        };
        let new_role = names::export(&name.volume, &request.name);
        let Made {
            mut snapshots,
            notes,
            deed,
            ..
        } = self.make_beside(name, &request)?;
        let open = snapshots.pop().expect("one was planned");
        let chunk_size = open.store.chunk_size();
        let promised = self.promise(name, &made_as, &open, change);
        let part = self.part(name, open);
        let marks_old = kind != StoreKind::Transient;
        let exchange = |_: &mut Self| {
            let old = Old::open(&cow, chunk_size, marks_old);
            let how = exchange(&mut SystemFiles, &made_as, &cow, || old?.mark_lost());
            let failed = |error: io::Error| Refused::NotExchanged(name.clone(), error.to_string());
            *exchanged = Some(how.map_err(failed)?);
            Ok(())
        };
        let held = match promised.and_then(|()| self.take_all(vec![part], exchange)) {
            Ok(held) => held,
            Err(refused) => {
                self.take_back(deed);
                return Err(refused);
            }
        };
        deed.keep();
        log_notes(&notes);
        self.taken.give_back_cow(&name.to_string());
        self.taken.rename_cow(&new_role, &name.to_string());
        self.replace(name, held);
        Ok(())
    }

    /// Record what will be known of the snapshot once the new store has its name.
    fn promise(
        &mut self,
        name: &SnapshotName,
        made_as: &Path,
        new: &OpenSnapshot,
        change: &mut Change,
    ) -> Result<(), Refused> {
        let looked = SystemFiles.identify(made_as).map_err(|error| {
            let (path, doing) = (made_as.to_owned(), "looking at it");
            StateError::System { path, doing, error }
        })?;
        let anew = looked.map(|file| Anew {
            file,
            bytes: new.past.bytes,
            taken_at: new.past.taken_at,
        });
        self.amend_and_commit(change, |next| {
            if let Some(one) = next.snapshot_mut(&name.volume, &name.snapshot) {
                one.anew = anew;
            }
        })
    }

    fn part(&self, name: &SnapshotName, mut open: OpenSnapshot) -> Part {
        let volume = self.registry.volume(&name.volume).expect("found before");
        let old = volume.snapshot(&name.snapshot).expect("found before");
        open.name.clone_from(&name.snapshot);
        let mut facts = SnapshotFacts::of(&mut open, old.behaviour);
        facts.cow.clone_from(&old.cow);
        let settings = old.behaviour.settings(&open);
        Part {
            shard: volume.shard,
            volume: volume.id,
            name: volume.name.clone(),
            snapshots: vec![new_snapshot(open, settings)],
            facts: vec![facts],
        }
    }

    fn make_beside(
        &mut self,
        name: &SnapshotName,
        request: &SnapshotRequest,
    ) -> Result<Made, Refused> {
        let mut plan = SnapshotPlan::default();
        let books = &mut **self;
        let volume = books.registry.volume(&name.volume).expect("found before");
        let origin = volume.origin_of(&name.snapshot);
        plan.add(&name.volume, &origin, request, &mut books.taken)?;
        let roles = plan.roles();
        let made = self.aside(|_| plan.carry_out(&mut Unrecorded));
        let made = made.inspect_err(|_| self.give_back(&roles))?;
        made.note(&mut self.taken);
        Ok(made)
    }

    fn take_back(&mut self, deed: Deed) {
        deed.take_back(&mut self.taken);
    }

    /// The registry's entry is the new snapshot from now on.
    fn replace(&mut self, name: &SnapshotName, held: Vec<HeldPart>) {
        let part = held.into_iter().next().expect("one volume was held");
        let new = part.ids.into_iter().zip(part.facts).next();
        let (id, facts) = new.expect("one snapshot was taken");
        let volume = self.registry.volume_mut(&name.volume);
        let mut entries = volume.into_iter().flat_map(|one| &mut one.snapshots);
        if let Some(entry) = entries.find(|entry| entry.name == name.snapshot) {
            debug_assert_eq!(entry.merge, MergeState::None);
            *entry = SnapshotEntry::new(id, Taken::Live(now()), facts);
        }
    }

    /// Nobody needs the old one any more; its file has no name.
    fn end_old(&mut self, name: &SnapshotName, old: SnapshotId) -> Result<(), Refused> {
        let volume = self.registry.volume(&name.volume).expect("found before");
        let (removed, answer) = channel();
        let order = VolumeOrder::Remove {
            snapshot: old,
            removed,
        };
        self.shards[volume.shard].order(volume.id, order);
        let until = Instant::now() + LEAVE;
        match self.wait(volume.shard, &answer, Some(until)) {
            Err(Refused::TooSlow) => Err(Refused::StillBusy(name.clone(), LEAVE.as_secs())),
            other => other,
        }
    }
}

/// Put a store that was made as `made_as` in the place of the one at `cow`. If that
/// fails, nothing has changed. If only the folder cannot be flushed, there is no way
/// back that would be safer than the way on: the old store is marked as lost, so that
/// a power cut which gives it its name back does not bring back a snapshot that has
/// missed writes (durability.md, rule 6).
fn exchange(
    files: &mut dyn Files,
    made_as: &Path,
    cow: &Path,
    mark_old: impl FnOnce() -> io::Result<()>,
) -> io::Result<Exchanged> {
    files.rename(made_as, cow)?;
    let Err(error) = files.sync_folder(folder_of(cow)) else {
        return Ok(Exchanged::Durably);
    };
    if let Err(unmarked) = mark_old() {
        tracing::error!(
            "{}: its new store's name could not be made durable, nor could the old store be \
             marked as lost ({unmarked}): if a power cut comes, do not use what is there then",
            cow.display()
        );
    }
    Ok(Exchanged::InDoubt(error))
}

/// The file of a store that is about to lose its name.
struct Old {
    file: File,
    chunk_size: ChunkSize,
    /// It would outlive the server.
    is_persistent: bool,
}

impl Old {
    fn open(cow: &Path, chunk_size: ChunkSize, is_persistent: bool) -> io::Result<Self> {
        let file = File::options().write(true).open(cow)?;
        Ok(Self {
            file,
            chunk_size,
            is_persistent,
        })
    }

    /// Have its header say that it is lost, durably.
    fn mark_lost(&self) -> io::Result<()> {
        if !self.is_persistent {
            return Ok(());
        }
        let header = Header {
            valid: false,
            chunk_size: self.chunk_size,
        };
        self.file.write_all_at(&header.encode(), 0)?;
        self.file.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::files::FileIdentity;

    /// A file system that breaks when a folder is to be flushed.
    #[derive(Clone, Copy)]
    struct Breaking(SystemFiles);

    impl Files for Breaking {
        fn read(&self, path: &Path) -> io::Result<Option<Vec<u8>>> {
            self.0.read(path)
        }
        fn write(&mut self, path: &Path, bytes: &[u8]) -> io::Result<()> {
            self.0.write(path, bytes)
        }
        fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
            self.0.rename(from, to)
        }
        fn remove(&mut self, path: &Path) -> io::Result<()> {
            self.0.remove(path)
        }
        fn sync_folder(&mut self, _: &Path) -> io::Result<()> {
            Err(io::Error::other("broken"))
        }
        fn identify(&self, path: &Path) -> io::Result<Option<FileIdentity>> {
            self.0.identify(path)
        }
    }

    #[test]
    fn a_store_whose_new_name_is_in_doubt_leaves_no_old_one_that_looks_whole() {
        let folder = tempfile::tempdir().unwrap();
        let (new, cow) = (folder.path().join("new"), folder.path().join("cow"));
        let chunk_size = ChunkSize::from_bytes(4096).unwrap();
        let header = Header {
            valid: true,
            chunk_size,
        };
        std::fs::write(&cow, header.encode()).unwrap();
        std::fs::write(&new, b"new").unwrap();
        let nameless = File::open(&cow).unwrap();
        let old = Old::open(&cow, chunk_size, true).unwrap();
        let mut files = Breaking(SystemFiles);
        let how = exchange(&mut files, &new, &cow, || old.mark_lost()).unwrap();
        assert!(matches!(how, Exchanged::InDoubt(_)), "{how:?}");
        assert_eq!(std::fs::read(&cow).unwrap(), b"new", "it goes on");
        let mut bytes = vec![0; header.encode().len()];
        nameless.read_exact_at(&mut bytes, 0).unwrap();
        let lost = Header {
            valid: false,
            ..header
        };
        assert_eq!(
            bytes,
            lost.encode(),
            "a power cut may bring the old one back"
        );
    }

    #[test]
    fn a_store_that_cannot_be_renamed_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (new, cow) = (folder.path().join("new"), folder.path().join("cow"));
        std::fs::write(&cow, b"old").unwrap();
        let marked = || panic!("the old store stays good");
        exchange(&mut SystemFiles, &new, &cow, marked).unwrap_err();
        assert_eq!(std::fs::read(&cow).unwrap(), b"old");
    }
}
