//! What clients see of the volumes: for each, the export `NAME`, and
//! `NAME@SNAPSHOT` for each of its snapshots, in the order of the setup. Where
//! there is only one volume, its origin is the default export too.

use nbdsnap_engine::StoreKind;

use super::setup::{OpenSnapshot, OpenVolume};
use crate::cli::size;
use crate::nbd::export::{BlockSize, Catalog, CatalogError, Export, transmission_flags};

/// The exports of `volumes`.
pub(super) fn of(volumes: &[OpenVolume]) -> Result<Catalog, CatalogError> {
    let mut exports = Vec::new();
    for volume in volumes {
        exports.push(origin(volume));
        exports.extend(volume.snapshots.iter().map(|one| snapshot(volume, one)));
    }
    let default = (volumes.len() == 1).then_some(0);
    Catalog::new(exports, default)
}

fn origin(volume: &OpenVolume) -> Export {
    let chunks = volume
        .snapshots
        .iter()
        .map(|one| one.store.chunk_size().bytes());
    let description = match volume.snapshots.len() {
        0 => "disk without snapshots".into(),
        1 => "origin of 1 snapshot".into(),
        count => format!("origin of {count} snapshots"),
    };
    Export {
        name: volume.name.clone(),
        description,
        size: volume.disk.bytes,
        flags: transmission_flags(volume.read_only, false),
        block_size: BlockSize::for_chunk(chunks.min().unwrap_or(0)),
    }
}

fn snapshot(volume: &OpenVolume, snapshot: &OpenSnapshot) -> Export {
    let chunk = snapshot.store.chunk_size();
    let kind = match snapshot.store.kind() {
        StoreKind::Persistent => "persistent",
        StoreKind::PersistentOverflow => "persistent, kept when full",
        StoreKind::Transient => "transient",
    };
    let age = if snapshot.fresh {
        ", taken when this server started"
    } else {
        ""
    };
    Export {
        name: format!("{}@{}", volume.name, snapshot.name),
        description: format!(
            "snapshot of {} ({kind}, chunks of {}{age})",
            volume.name,
            size::show(chunk.bytes())
        ),
        size: volume.disk.bytes,
        flags: transmission_flags(volume.read_only || snapshot.read_only, false),
        block_size: BlockSize::for_chunk(chunk.bytes()),
    }
}
