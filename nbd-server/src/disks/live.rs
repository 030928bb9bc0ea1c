//! Stores for snapshots of volumes that are being served: looked at, then made,
//! and taken back if the snapshots cannot be taken after all.

use super::cow::{self, PlannedCow};
use super::identity::{Role, Taken};
use super::make::{Undo, make_snapshots, note_made};
use super::{Cause, Making, Note, Origin, Past, PlannedSnapshot, Refusal, SnapshotRequest, open};
use crate::io::VolumeAccess;
use crate::names;
use crate::server::setup::OpenSnapshot;

/// Stores that shall be made, on paths that were looked at, opened and locked.
/// Nothing has changed yet; [`SnapshotPlan::give_up`] leaves it at that.
#[derive(Debug, Default)]
pub struct SnapshotPlan {
    pub(super) snapshots: Vec<PlannedSnapshot>,
    /// Their volumes.
    volumes: Vec<String>,
    notes: Vec<Note>,
}

impl SnapshotPlan {
    /// Add the store of a new snapshot of `volume`.
    pub fn add(
        &mut self,
        volume: &str,
        origin: &Origin,
        request: &SnapshotRequest,
        taken: &mut Taken,
    ) -> Result<(), Refusal> {
        let role = Role::Cow(names::export(volume, &request.name));
        let found = open::cow(&request.cow, origin.access, role.clone(), taken)?;
        let planned = cow::plan(request, origin, found, &mut self.notes);
        match planned
            .and_then(must_be_new(request))
            .map_err(in_live_words)
        {
            Ok(cow) => {
                self.volumes.push(volume.to_owned());
                self.snapshots.push(PlannedSnapshot {
                    name: request.name.clone(),
                    read_only: request.read_only,
                    kind: request.kind,
                    limit: request.size,
                    adopted: false,
                    past: Past::of(request, origin, &cow),
                    behaviour: request.behaviour,
                    cow,
                });
                Ok(())
            }
            Err(refusal) => {
                taken.give_back(&role);
                Err(refusal)
            }
        }
    }

    /// Forget the plan.
    pub fn give_up(self, taken: &mut Taken) {
        for (volume, snapshot) in self.volumes.iter().zip(&self.snapshots) {
            taken.give_back_cow(&names::export(volume, &snapshot.name));
        }
    }

    /// Whose stores they are, as `VOLUME@NAME`: what is to be given back if they
    /// cannot be made.
    pub fn roles(&self) -> Vec<String> {
        let named = self.volumes.iter().zip(&self.snapshots);
        named
            .map(|(volume, snapshot)| names::export(volume, &snapshot.name))
            .collect()
    }

    /// Make the stores, all or none, in the order in which they were added. It may
    /// take long; [`Made::note`] is for afterwards.
    pub fn carry_out(self, making: &mut dyn Making) -> Result<Made, Refusal> {
        let roles = self.roles();
        let mut notes = self.notes;
        let (snapshots, undo) = make_snapshots(self.snapshots, &mut notes, making)?;
        Ok(Made {
            snapshots,
            volumes: self.volumes,
            notes,
            deed: Deed { undo, roles },
        })
    }
}

/// A snapshot that is taken now begins with an empty store.
fn must_be_new(
    request: &SnapshotRequest,
) -> impl FnOnce(PlannedCow) -> Result<PlannedCow, Refusal> + '_ {
    |cow| match cow {
        PlannedCow::New(_) => Ok(cow),
        PlannedCow::Whole { .. } | PlannedCow::Torn { .. } => {
            Err(Refusal::new(&request.cow, Cause::StoreThere))
        }
    }
}

/// A refusal in the words of an order, which has no `,format`.
fn in_live_words(refusal: Refusal) -> Refusal {
    let cause = match refusal.cause {
        Cause::Foreign(what) | Cause::Header(what) => Cause::NotEmpty(what),
        Cause::Store(_) | Cause::Persistent => Cause::StoreThere,
        other => other,
    };
    Refusal { cause, ..refusal }
}

/// Stores that were made just now.
#[derive(Debug)]
pub struct Made {
    /// In the order of the plan.
    pub snapshots: Vec<OpenSnapshot>,
    /// Their volumes.
    volumes: Vec<String>,
    /// What to tell.
    pub notes: Vec<Note>,
    /// Whether they stay.
    pub deed: Deed,
}

impl Made {
    /// Files that did not exist do now.
    pub fn note(&self, taken: &mut Taken) {
        for (volume, snapshot) in self.volumes.iter().zip(&self.snapshots) {
            note_made(taken, volume, std::slice::from_ref(snapshot));
        }
    }
}

/// The making of stores. They are taken back unless [`Deed::keep`] is called.
#[derive(Debug)]
pub struct Deed {
    undo: Undo,
    roles: Vec<String>,
}

impl Deed {
    /// Their snapshots were taken.
    pub fn keep(self) {
        self.undo.keep();
    }

    /// Take them back: nobody may use them any more.
    pub fn take_back(self, taken: &mut Taken) {
        for role in &self.roles {
            taken.give_back_cow(role);
        }
        drop(self.undo);
    }
}

/// Where the store of the snapshot of this path goes unless it is said: beside the disk.
/// One that other volumes have too is not enough of a name.
pub fn default_cow(origin: &Origin, volume: &str, name: &str) -> std::path::PathBuf {
    let mut path = origin.path.clone();
    path.as_mut_os_string().push(match origin.access {
        VolumeAccess::Shared => format!(".{volume}.{name}.cow"),
        VolumeAccess::ReadWrite | VolumeAccess::ReadOnly => format!(".{name}.cow"),
    });
    path
}
