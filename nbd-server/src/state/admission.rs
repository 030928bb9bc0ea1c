//! Whether volumes may be served as it was asked for, by the lists of their
//! disks; and what the records will say of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use nbdsnap_engine::StoreKind;

use super::attached::{AttachedStore, Finding, Mark, Offered};
use super::files::{Files, SystemFiles};
use super::keeper::{Change, Keeper, StateError};
use super::place::settled;
use super::record::{IntentFile, SnapshotRecord, State, VolumeRecord};
use crate::control::protocol::{Kind, WhenFull};
use crate::disks::{
    Cause, Known, Making, Merging, OfferedStore, OfferedVolume, Refusal, SnapshotRequest,
    VolumeRequest, shown,
};
use crate::io::VolumeAccess;
use crate::names;
use crate::server::setup::Defaults;

impl From<&OfferedStore> for SnapshotRecord {
    fn from(store: &OfferedStore) -> Self {
        Self {
            name: store.snapshot.clone(),
            cow: settled(&store.cow),
            kind: store.kind.into(),
            limit: store.limit,
            bytes: Some(store.past.bytes),
            taken_at: store.past.taken_at,
            read_only: store.read_only,
            on_full: store
                .behaviour
                .map_or_else(WhenFull::default, |one| one.on_full.into()),
            auto_extend: store.behaviour.and_then(|one| one.auto_extend),
            merging: store.past.merging.is_some(),
            delete_cow: store.past.merging.is_some_and(|one| one.delete_cow),
            anew: None,
        }
    }
}

impl From<&OfferedVolume> for VolumeRecord {
    fn from(volume: &OfferedVolume) -> Self {
        Self {
            name: volume.name.clone(),
            disk: settled(&volume.disk),
            read_only: volume.access == VolumeAccess::ReadOnly,
            shared: volume.access == VolumeAccess::Shared,
            snapshots: volume.stores.iter().map(SnapshotRecord::from).collect(),
        }
    }
}

/// The files that serving these volumes would make.
pub fn files_to_make<'a>(stores: impl IntoIterator<Item = &'a OfferedStore>) -> Vec<IntentFile> {
    let missing = stores.into_iter().filter(|store| store.is_missing);
    missing
        .map(|store| IntentFile::to_make(settled(&store.cow)))
        .collect()
}

/// A volume that a record names, to be served as it was. Of a transient snapshot
/// nothing is left.
pub fn request_of(volume: &VolumeRecord) -> VolumeRequest {
    let lasting = |snapshot: &&SnapshotRecord| snapshot.kind != Kind::Transient;
    VolumeRequest {
        name: volume.name.clone(),
        path: volume.disk.clone(),
        access: VolumeAccess::from_words(volume.read_only, volume.shared),
        snapshots: volume
            .snapshots
            .iter()
            .filter(lasting)
            .map(|snapshot| SnapshotRequest {
                name: snapshot.name.clone(),
                cow: snapshot.cow.clone(),
                kind: snapshot.kind.into(),
                chunk: None,
                size: snapshot.limit,
                read_only: snapshot.read_only,
                format: false,
                adopt: false,
                must_exist: true,
                known: Known {
                    bytes: snapshot.bytes,
                    taken_at: snapshot.taken_at,
                    // Its disk's list says so, to whoever serves it.
                    merging: None,
                },
                behaviour: Some(Defaults {
                    on_full: snapshot.on_full.into(),
                    auto_extend: snapshot.auto_extend,
                }),
            })
            .collect(),
    }
}

/// What a disk's list says of a store.
fn known(store: &AttachedStore) -> Known {
    let delete_cow = store.delete_cow;
    Known {
        bytes: store.bytes,
        taken_at: store.taken_at,
        merging: (store.mark == Mark::Merging).then_some(Merging { delete_cow }),
    }
}

/// The same volumes, with what their disks' lists know of their stores; and with
/// each the store that is being merged into its disk, whether or not it was asked
/// for: the merge goes on (durability.md, rule 12).
pub fn as_listed<F: Files>(
    keeper: &Keeper<F>,
    mut requests: Vec<VolumeRequest>,
) -> Result<Vec<VolumeRequest>, StateError> {
    for request in &mut requests {
        if !request.path.exists() {
            continue;
        }
        let list = keeper.list(&request.path)?;
        let mut named = Vec::new();
        for snapshot in &mut request.snapshots {
            let cow = settled(&snapshot.cow);
            if let Some(store) = list.find(&cow) {
                snapshot.known = known(store);
            }
            named.push((cow, snapshot.name.clone()));
        }
        for store in &list.stores {
            let known = known(store);
            // Of a disk that nobody writes it is refused later.
            let may_go_on = match store.of {
                None => request.access.writes_origin(),
                Some(_) => request.access.writes_stores(),
            };
            let is_named = named.iter().any(|(cow, _)| *cow == store.cow);
            if known.merging.is_none() || !may_go_on || is_named {
                continue;
            }
            if let Some(name) = name_beside(store, &named) {
                request.snapshots.push(SnapshotRequest {
                    name,
                    cow: store.cow.clone(),
                    kind: StoreKind::Persistent,
                    chunk: None,
                    size: None,
                    read_only: false,
                    format: false,
                    adopt: false,
                    must_exist: true,
                    known,
                    behaviour: None,
                });
            }
        }
    }
    Ok(requests)
}

/// What a store of the list is called among those that are named, by the name there of
/// what it was taken of; none: that is not there.
fn name_beside(store: &AttachedStore, named: &[(PathBuf, String)]) -> Option<String> {
    let Some(of) = store.is_of() else {
        return Some(names::last(&store.snapshot).to_owned());
    };
    let (_, below) = named.iter().find(|(cow, _)| cow == of)?;
    Some(names::path(Some(below), names::last(&store.snapshot)))
}

/// Refuse a volume that would be written without one of its stores, or with one
/// that may be stale, unless the operator gave the word for it.
pub fn admit<F: Files>(
    keeper: &Keeper<F>,
    volume: &OfferedVolume,
    given_up: &[PathBuf],
) -> Result<(), Refusal> {
    let list = keeper
        .list(&volume.disk)
        .map_err(|error| Refusal::new(&volume.disk, Cause::List(error.to_string())))?;
    if !volume.access.writes_origin() {
        let mut stores = list.stores.iter();
        let writes = |store: &AttachedStore| store.of.is_some() && volume.access.writes_stores();
        let mut halfway = |store: &&AttachedStore| store.mark == Mark::Merging && !writes(store);
        if let Some(store) = stores.find(&mut halfway) {
            let cause = Cause::MergeReadOnly(shown(&store.cow));
            return Err(Refusal::new(&volume.disk, cause));
        }
    }
    if !volume.access.writes_stores() {
        return Ok(());
    }
    let cows: Vec<PathBuf> = volume.stores.iter().map(|s| settled(&s.cow)).collect();
    let store_of = |path: &str| {
        let place = volume.stores.iter().position(|one| one.snapshot == path);
        place.map(|place| cows[place].as_path())
    };
    let stores = volume.stores.iter().zip(&cows);
    let offered: Vec<Offered<'_>> = stores
        .filter(|(store, _)| store.kind != StoreKind::Transient)
        .map(|(store, cow)| Offered {
            cow,
            of: names::origin(&store.snapshot).and_then(store_of),
            is_old: store.is_old,
            adopted: store.adopted,
        })
        .collect();
    let given_up: Vec<PathBuf> = given_up.iter().map(|path| settled(path)).collect();
    let broken = |store: &&OfferedStore| store.past.merging.is_some() && !store.is_old;
    if let Some(store) = volume.stores.iter().find(broken) {
        return Err(Refusal::new(
            &volume.disk,
            Cause::MergeMissing(shown(&store.cow)),
        ));
    }
    for store in &volume.stores {
        let of = names::origin(&store.snapshot);
        let is_new = |one: &OfferedStore| one.is_new && Some(&*one.snapshot) == of;
        if !store.is_new && volume.stores.iter().any(is_new) {
            let of = names::origin_export(&volume.name, &store.snapshot);
            return Err(Refusal::new(&store.cow, Cause::OriginIsNew(of)));
        }
    }
    let findings = match volume.access {
        VolumeAccess::Shared => list.judge_shared(&offered, &given_up),
        VolumeAccess::ReadWrite | VolumeAccess::ReadOnly => list.judge(&offered, &given_up),
    };
    match findings.first() {
        None => Ok(()),
        Some(finding) => Err(refusal(volume, finding)),
    }
}

fn refusal(volume: &OfferedVolume, finding: &Finding) -> Refusal {
    let disk = &volume.disk;
    match finding {
        Finding::Missing(store) => Refusal::new(
            disk,
            Cause::StoreMissing {
                snapshot: store.snapshot.clone(),
                cow: shown(&store.cow),
            },
        ),
        Finding::MissingMerge(store) => Refusal::new(disk, Cause::MergeMissing(shown(&store.cow))),
        Finding::Unlisted(cow) => Refusal::new(cow, Cause::Unlisted(shown(disk))),
        Finding::OtherOrigin(store) => {
            let offered = volume.stores.iter();
            let mut here = offered.filter(|one| settled(&one.cow) == store.cow);
            let wanted = here.next().map_or_else(String::new, |one| {
                names::origin_export(&volume.name, &one.snapshot)
            });
            let listed = names::origin_export(&volume.name, &store.snapshot);
            let disk = shown(disk);
            Refusal::new(
                &store.cow,
                Cause::OtherOrigin {
                    disk,
                    listed,
                    wanted,
                },
            )
        }
        Finding::Lost(store) => Refusal::new(
            &store.cow,
            Cause::Stale {
                disk: shown(disk),
                cow: shown(&store.cow),
            },
        ),
    }
}

/// The state with these volumes in the place of those of the same name, and with
/// all others as they are: one that could not be served this time is not forgotten.
pub fn state_with<F: Files>(keeper: &Keeper<F>, volumes: Vec<VolumeRecord>) -> State {
    let mut next = keeper.state().clone();
    let known = next.volumes.iter().enumerate();
    let places: BTreeMap<String, usize> = known
        .map(|(place, volume)| (volume.name.clone(), place))
        .collect();
    for volume in volumes {
        match places.get(&volume.name) {
            Some(&place) => next.volumes[place] = volume,
            None => next.volumes.push(volume),
        }
    }
    next
}

/// Files that are made as part of a change.
#[derive(Debug)]
pub struct Recorded<'a> {
    /// Who records.
    pub keeper: &'a mut Keeper<SystemFiles>,
    /// The change.
    pub change: &'a mut Change,
}

impl Making for Recorded<'_> {
    fn first_name(&self, path: &Path) -> Option<PathBuf> {
        self.change.made_as(&settled(path))
    }

    fn made(&mut self, paths: &[PathBuf]) -> std::io::Result<()> {
        let paths: Vec<PathBuf> = paths.iter().map(|path| settled(path)).collect();
        self.keeper
            .made(self.change, &paths)
            .map_err(std::io::Error::other)
    }
}
