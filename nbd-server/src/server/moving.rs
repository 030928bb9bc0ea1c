//! How an open volume moves to its thread, and what the registry keeps of it.

use std::cell::OnceCell;
use std::sync::mpsc::Receiver;

use nbdsnap_engine::{View, VolumeConfig};

use super::ServerError;
use super::registry::{
    self, Registry, SnapshotEntry, SnapshotFacts, Suspension, Taken, VolumeEntry,
};
use super::setup::{Defaults, OpenDisk, OpenSnapshot, OpenVolume};
use crate::disks::Origin;
use crate::io::{NewDisk, NewSnapshot, NewVolume, Settings, Shard, Views, VolumeId};

/// Memory for old chunks on their way, shared out to all volumes in equal parts.
const COPY_MEMORY: u64 = 256 << 20;
/// A volume has this much of it at most, and [`COPY_PIECE`] at least.
const COPY_MEMORY_OF_ONE: u64 = 64 << 20;
/// The largest piece in which old chunks are copied.
const COPY_PIECE: u64 = 1 << 20;

/// A volume on its way.
pub(super) struct Moving {
    pub(super) entry: VolumeEntry,
    pub(super) facts: Vec<SnapshotFacts>,
    /// Where its thread says that it is there.
    pub(super) answer: Receiver<Views>,
}

/// What one of so many volumes may have in memory.
pub(super) fn share_of_copy_memory(volumes: usize) -> u64 {
    (COPY_MEMORY / volumes.max(1) as u64).clamp(COPY_PIECE, COPY_MEMORY_OF_ONE)
}

/// Have `volume` move to `shard`.
pub(super) fn begin(
    mut volume: OpenVolume,
    id: VolumeId,
    number: usize,
    copy_memory: u64,
    shard: &Shard,
    defaults: &Defaults,
) -> Moving {
    let facts = volume.snapshots.iter_mut();
    let facts = facts.map(|one| SnapshotFacts::of(one, *defaults)).collect();
    let entry = VolumeEntry {
        name: volume.name.clone(),
        id,
        shard: number,
        origin: Origin {
            path: registry::absolute(&volume.disk.path),
            ..Origin::of(&volume.disk, volume.access)
        },
        is_block_device: volume.disk.is_block_device,
        suspension: Suspension::Running,
        recorded_disk: OnceCell::new(),
        snapshots: Vec::new(),
    };
    let answer = shard.host(NewVolume {
        id,
        name: volume.name,
        config: VolumeConfig {
            origin_bytes: volume.disk.bytes,
            copy_memory,
            copy_piece: COPY_PIECE,
        },
        disk: new_disk(volume.disk),
        access: volume.access,
        snapshots: volume
            .snapshots
            .into_iter()
            .map(|one| {
                let behaviour = one.behaviour.unwrap_or(*defaults);
                let settings = behaviour.settings(&one);
                new_snapshot(one, settings)
            })
            .collect(),
    });
    Moving {
        entry,
        facts,
        answer,
    }
}

/// It is there, and its snapshots are called this.
pub(super) fn end(
    mut entry: VolumeEntry,
    facts: Vec<SnapshotFacts>,
    views: &[View],
) -> VolumeEntry {
    for (view, mut facts) in views.iter().zip(facts) {
        facts.read_only |= !entry.origin.access.writes_stores();
        let &View::Snapshot(id) = view else {
            unreachable!("a snapshot is no origin");
        };
        let taken = match facts.taken_at {
            Some(at) if facts.fresh => Taken::AtStart(at),
            Some(at) => Taken::Live(at),
            None => Taken::Before,
        };
        let snapshot = SnapshotEntry::new(id, taken, facts);
        entry.snapshots.push(snapshot);
    }
    entry
}

/// Move every volume of a server that starts.
pub(super) fn all(
    volumes: Vec<OpenVolume>,
    shards: &[Shard],
    defaults: &Defaults,
) -> Result<Registry, ServerError> {
    let share = share_of_copy_memory(volumes.len());
    let mut moving = Vec::new();
    for (number, volume) in volumes.into_iter().enumerate() {
        let shard = number % shards.len();
        let id = VolumeId(number as u32);
        moving.push(begin(volume, id, shard, share, &shards[shard], defaults));
    }
    let mut registry = Registry::default();
    for Moving {
        entry,
        facts,
        answer,
    } in moving
    {
        let views = answer.recv().map_err(|_| ServerError::ThreadEnded)?;
        let views = views.map_err(ServerError::SnapshotNotTaken)?;
        registry.volumes.push(end(entry, facts, &views));
    }
    Ok(registry)
}

/// A snapshot as its thread takes it.
pub(super) fn new_snapshot(snapshot: OpenSnapshot, settings: Settings) -> NewSnapshot {
    NewSnapshot {
        name: snapshot.name,
        store: snapshot.store,
        disk: new_disk(snapshot.disk),
        fresh: snapshot.fresh,
        merging: snapshot.past.merging.is_some(),
        settings,
    }
}

fn new_disk(disk: OpenDisk) -> NewDisk {
    NewDisk {
        file: disk.file,
        is_block_device: disk.is_block_device,
    }
}
