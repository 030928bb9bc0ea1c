//! Recovery: what a store holds when it is opened, whoever wrote it and however
//! that ended.

use std::collections::HashSet;

use bytes::Bytes;
use nbdsnap_format::area::EXCEPTION_BYTES;
use nbdsnap_format::{
    Bounds, CowChunk, Exception, Found, Header, Layout, ListEnd, ListRead, ListReader,
    SECTOR_BYTES, Tail,
};

use super::commit::block_entries;
use super::{Access, OpenError, Store, StoreIo, StoreKind, StoreSize};
use crate::disk::Action;
use crate::law::Law;
use crate::table::ExceptionTable;

/// See [`Store::open`].
pub(super) fn open(
    kind: StoreKind,
    size: StoreSize,
    origin_bytes: u64,
    access: Access,
    law: Law,
    io: &mut dyn StoreIo,
) -> Result<Store, OpenError> {
    if access == Access::ReadWrite {
        // What a process that was killed left in the page cache reads as if it
        // were durable: from here on it is (durability.md, rule 5).
        io.act(Action::Flush)?;
    }
    let header = read_header(size, io)?;
    let layout = Layout::new(header.chunk_size);
    let mut store = Store {
        kind,
        layout,
        size,
        table: ExceptionTable::default(),
        next_free: layout.next_free(None),
        block: Vec::new(),
        invalid: !header.valid,
        origin_bytes: Some(origin_bytes),
        torn_area: None,
    };
    if store.invalid {
        return Ok(store);
    }
    let bounds = Bounds::new(header.chunk_size, size.ready, Some(origin_bytes));
    let (area, tail) = Filler::new(&mut store, bounds).fill(io)?;
    match tail {
        Tail::Clean => {}
        Tail::Torn { from_entry } => {
            if access == Access::ReadWrite && law.scrub_on_open() {
                scrub(layout, area, from_entry, io)?;
            }
            store.torn_area = Some(area);
        }
        Tail::Corrupt { entry } => return Err(OpenError::Corrupt { area, entry }),
    }
    Ok(store)
}

fn read(io: &mut dyn StoreIo, offset: u64, len: u64) -> Result<Bytes, OpenError> {
    let bytes = io.act(Action::Read { offset, len })?;
    assert_eq!(bytes.len() as u64, len, "a read is whole or fails");
    Ok(bytes)
}

fn read_header(size: StoreSize, io: &mut dyn StoreIo) -> Result<Header, OpenError> {
    if size.ready < SECTOR_BYTES {
        return Err(truncated(size, SECTOR_BYTES));
    }
    match Header::decode(&read(io, 0, SECTOR_BYTES)?)? {
        Found::New => Err(OpenError::New),
        Found::Store(header) => Ok(header),
    }
}

fn truncated(size: StoreSize, needed: u64) -> OpenError {
    OpenError::Truncated {
        found: size.ready,
        needed,
    }
}

/// Fills a store's table from its list of exceptions.
struct Filler<'a> {
    store: &'a mut Store,
    bounds: Bounds,
    /// The largest store chunk in use so far; 0 before the first.
    highest: CowChunk,
    /// Every store chunk in use, once they were seen out of order: until then
    /// `highest` alone tells a chunk that is named twice.
    unordered: Option<HashSet<u64>>,
}

impl<'a> Filler<'a> {
    fn new(store: &'a mut Store, bounds: Bounds) -> Self {
        Self {
            store,
            bounds,
            highest: CowChunk(0),
            unordered: None,
        }
    }

    /// Read the whole list: the area in which it ends, and what lies behind it there.
    fn fill(mut self, io: &mut dyn StoreIo) -> Result<(u64, Tail), OpenError> {
        let layout = self.store.layout;
        let mut list = ListReader::new(self.bounds);
        while let Some(ListRead { offset, len }) = list.poll_read() {
            let bytes = read(io, offset, len as u64)?;
            for exception in list.handle_read(&bytes) {
                self.add(exception)?;
            }
        }
        match list.end().expect("there is no more to read") {
            ListEnd::InArea { area, tail, .. } => {
                let highest = (self.highest.0 > 0).then_some(self.highest);
                self.store.next_free = layout.next_free(highest);
                Ok((area, tail))
            }
            ListEnd::NoArea { area } => {
                let end = layout.area_location(area).0.saturating_add(1);
                Err(truncated(
                    self.store.size,
                    layout.chunk_size().cow_offset(CowChunk(end)),
                ))
            }
        }
    }

    fn add(&mut self, exception: Exception) -> Result<(), OpenError> {
        let Exception { old, new } = exception;
        let refuse = |store: &Store, why| {
            Err(OpenError::Exception {
                index: store.table.len(),
                old,
                new,
                why,
            })
        };
        if let Some(misplaced) = self.bounds.misplaced(exception) {
            return refuse(self.store, misplaced.why());
        }
        if self.store.table.get(old).is_some() {
            return refuse(
                self.store,
                "the origin chunk has an exception already: the store is damaged",
            );
        }
        if !self.claim(new) {
            return refuse(
                self.store,
                "the store chunk holds the copy of another origin chunk: the store is damaged",
            );
        }
        self.store.table.insert(old, new);
        let block = &mut self.store.block;
        block.push(exception);
        if block.len() as u64 == block_entries(self.store.layout) {
            block.clear();
        }
        Ok(())
    }

    /// Whether `new` was free.
    fn claim(&mut self, new: CowChunk) -> bool {
        if let Some(seen) = &mut self.unordered {
            self.highest = self.highest.max(new);
            return seen.insert(new.0);
        }
        if new > self.highest {
            self.highest = new;
            return true;
        }
        let mut seen: HashSet<u64> = self.store.table.store_chunks().collect();
        let free = seen.insert(new.0);
        self.unordered = Some(seen);
        free
    }
}

/// Keep a copy of the area, then zero it from `from_entry` on, durably, before
/// anything is allocated (durability.md, rule 5).
fn scrub(
    layout: Layout,
    area: u64,
    from_entry: u64,
    io: &mut dyn StoreIo,
) -> Result<(), OpenError> {
    let start = layout.area_offset(area);
    let bytes = read(io, start, layout.chunk_size().bytes())?;
    io.keep_copy(area, &bytes)?;
    let kept = from_entry * EXCEPTION_BYTES as u64;
    io.act(Action::WriteZeroes {
        offset: start + kept,
        len: layout.chunk_size().bytes() - kept,
        may_punch: false,
    })?;
    io.act(Action::Flush)?;
    Ok(())
}
