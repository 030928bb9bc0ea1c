//! `snapshot reset`: the same snapshot, taken anew. A new store is made beside the
//! old one; when the volume is held it takes the old one's name, which is the one
//! step that a crash can fall before or after; then the new snapshot's instant is
//! taken, and the old one ends. The snapshot has the same name, path and settings,
//! and no store of the disk misses a write.

use std::sync::mpsc::channel;
use std::time::Instant;

use nbdsnap_engine::{SnapshotId, View};

use super::Administrator;
use super::create::{HeldPart, Part, log_notes};
use super::refusal::Refused;
use super::remove::LEAVE;
use crate::control::protocol::{Answer, EventKind, SnapshotName, SnapshotReset};
use crate::disks::{Deed, Made, SnapshotPlan, SnapshotRequest, Unrecorded, sync_folder_of};
use crate::io::VolumeOrder;
use crate::names;
use crate::server::moving::new_snapshot;
use crate::server::registry::{MergeState, SnapshotEntry, SnapshotFacts, Taken, now};
use crate::state::place::settled;
use crate::state::record::IntentFile;

impl Administrator {
    pub(super) fn reset(&mut self, reset: &SnapshotReset) -> Result<Answer, Refused> {
        let name = &reset.snapshot;
        self.check_reset(reset)?;
        let file = IntentFile::to_make(settled(&self.find(name)?.2.cow));
        let change = self.keeper.begin(self.recorded(), vec![file.clone()])?;
        match self.make_and_exchange(name, &file) {
            Ok(()) => {
                self.publish();
                self.keeper.finish(change)?;
                self.tell(EventKind::Reset, name);
                self.report_named(std::slice::from_ref(name))
            }
            Err(refused) => {
                self.forget(change);
                Err(refused)
            }
        }
    }

    fn check_reset(&self, reset: &SnapshotReset) -> Result<(), Refused> {
        let name = &reset.snapshot;
        let (_, id, entry) = self.find(name)?;
        let volume = self.registry.volume(&name.volume).expect("found above");
        if !volume.origin.access.writes_stores() {
            return Err(Refused::ReadOnly(name.volume.clone()));
        }
        if let Some(merging) = volume.merging() {
            return Err(Refused::Merging(SnapshotName {
                volume: name.volume.clone(),
                snapshot: merging.name.clone(),
            }));
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

    fn make_and_exchange(&mut self, name: &SnapshotName, file: &IntentFile) -> Result<(), Refused> {
        let made_as = file.made_as().expect("it is to be made");
        let (_, _, old) = self.find(name)?;
        let (old_id, behaviour, cow) = (old.id, old.behaviour, old.cow.clone());
        let request = SnapshotRequest {
            // Both are there for a while.
            name: format!("{} (new)", name.snapshot),
            cow: made_as.clone(),
            kind: old.kind,
            chunk: Some(old.chunk_bytes),
            size: old.limit,
            read_only: old.read_only,
            format: false,
            adopt: false,
            must_exist: false,
            merging: false,
            bytes: None,
            behaviour: Some(behaviour),
        };
        let new_role = names::export(&name.volume, &request.name);
        let made = self.make_beside(name, &request)?;
        let Made {
            mut snapshots,
            notes,
            deed,
        } = made;
        let mut open = snapshots.pop().expect("one was planned");
        open.name.clone_from(&name.snapshot);
        let mut facts = SnapshotFacts::of(&mut open, behaviour);
        facts.cow.clone_from(&cow);
        let volume = self.registry.volume(&name.volume).expect("found above");
        let settings = behaviour.settings(&open, volume.origin.bytes);
        let part = Part {
            shard: volume.shard,
            volume: volume.id,
            name: volume.name.clone(),
            snapshots: vec![new_snapshot(open, settings)],
            facts: vec![facts],
        };
        let exchange = |_: &mut Self| {
            std::fs::rename(&made_as, &cow)
                .and_then(|()| sync_folder_of(&cow))
                .map_err(|error| Refused::NotExchanged(name.clone(), error.to_string()))
        };
        let held = match self.take_all(vec![part], exchange) {
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
        self.end_old(name, old_id)
    }

    fn make_beside(
        &mut self,
        name: &SnapshotName,
        request: &SnapshotRequest,
    ) -> Result<Made, Refused> {
        let mut plan = SnapshotPlan::default();
        let volume = self.registry.volume(&name.volume).expect("found before");
        plan.add(&name.volume, &volume.origin, request, &mut self.taken)?;
        Ok(plan.carry_out(&mut self.taken, &mut Unrecorded)?)
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
        self.publish();
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
