//! A new, empty store.

use bytes::Bytes;
use nbdsnap_format::{CowChunk, Header, Layout};

use super::{Store, StoreIo, StoreKind, StoreSpec};
use crate::disk::{Action, DiskError};
use crate::law::Law;
use crate::table::ExceptionTable;

/// See [`Store::create`].
pub(super) fn create(spec: StoreSpec, law: Law, io: &mut dyn StoreIo) -> Result<Store, DiskError> {
    let layout = Layout::new(spec.chunk_size);
    let next_free = match spec.kind {
        StoreKind::Transient => CowChunk(0),
        StoreKind::Persistent | StoreKind::PersistentOverflow => {
            format(layout, law, io)?;
            layout.next_free(None)
        }
    };
    Ok(Store {
        kind: spec.kind,
        layout,
        size: spec.size,
        table: ExceptionTable::default(),
        next_free,
        block: Vec::new(),
        invalid: false,
        origin_bytes: None,
        torn_area: None,
    })
}

/// The header's chunk and area 0, in the order that a power cut cannot turn
/// into a store with stale exceptions.
fn format(layout: Layout, law: Law, io: &mut dyn StoreIo) -> Result<(), DiskError> {
    io.act(Action::WriteZeroes {
        offset: 0,
        len: 2 * layout.chunk_size().bytes(),
        may_punch: false,
    })?;
    if law.area_before_header() {
        io.act(Action::Flush)?;
    }
    let header = Header {
        valid: true,
        chunk_size: layout.chunk_size(),
    };
    io.act(Action::Write {
        offset: 0,
        data: vec![Bytes::copy_from_slice(&header.encode())],
    })?;
    io.act(Action::Flush)?;
    Ok(())
}
