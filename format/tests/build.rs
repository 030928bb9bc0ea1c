//! Stores that are built by the tools, against the list reader: what goes in comes
//! out, and the bytes are those that a plain encoding has.

use std::convert::Infallible;

use nbdsnap_format::build::{AreaBuilder, BuildError};
use nbdsnap_format::dump::Stale;
use nbdsnap_format::{
    Bounds, ChunkSize, CowChunk, Exception, Layout, ListEnd, OriginChunk, Slot, Tail, read_list,
};
use proptest::prelude::*;

/// A store in memory, with junk where nothing was written.
struct Image(Vec<u8>);

impl Image {
    fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.0[offset as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    fn list(&self, size: ChunkSize) -> (Vec<Exception>, ListEnd) {
        let mut found = Vec::new();
        let mut read = |offset: u64, buffer: &mut [u8]| {
            buffer.copy_from_slice(&self.0[offset as usize..][..buffer.len()]);
            Ok::<_, Infallible>(())
        };
        let bounds = Bounds::new(size, self.0.len() as u64, None);
        let Ok(end) = read_list(bounds, &mut read, |n, exception| {
            assert_eq!(n, found.len() as u64);
            found.push(exception);
        });
        (found, end)
    }
}

fn exceptions(size: ChunkSize, count: u64) -> Vec<Exception> {
    let layout = Layout::new(size);
    let nth = |n| Exception {
        old: OriginChunk(n * 7 % 1000),
        new: layout.data_chunk(n),
    };
    (0..count).map(nth).collect()
}

fn build(
    size: ChunkSize,
    chunks: u64,
    list: &[Exception],
    stale: &[Stale],
) -> Result<Image, BuildError> {
    let bytes = chunks * size.bytes();
    let mut image = Image(vec![0xa5; bytes as usize]);
    let mut builder = AreaBuilder::new(size, bytes);
    let mut write = |offset: u64, bytes: &[u8]| {
        image.write(offset, bytes);
        Ok::<_, BuildError>(())
    };
    for exception in list {
        builder.push(*exception, &mut write)?;
    }
    for one in stale {
        builder.stale(*one, &mut write)?;
    }
    builder.finish(&mut write)?;
    Ok(image)
}

#[test]
fn an_empty_store_has_one_area_of_zeros() {
    let size = ChunkSize::from_sectors(2).unwrap();
    let image = build(size, 3, &[], &[]).unwrap();
    assert_eq!(image.0[1024..2048], [0; 1024]);
    assert_eq!(image.0[2048], 0xa5);
    let (area, needed, bytes) = (0, 2048, 1024);
    let error = BuildError::NoArea {
        area,
        needed,
        bytes,
    };
    assert_eq!(build(size, 1, &[], &[]).err(), Some(error));
}

#[test]
fn a_full_area_is_followed_by_an_empty_one_if_that_fits() {
    let size = ChunkSize::MIN;
    let list = exceptions(size, 32);
    let (found, end) = build(size, 35, &list, &[]).unwrap().list(size);
    assert_eq!(found, list);
    let tail = Tail::Clean;
    let (area, entries) = (1, 0);
    assert_eq!(
        end,
        ListEnd::InArea {
            area,
            entries,
            tail
        }
    );
    let (found, end) = build(size, 34, &list, &[]).unwrap().list(size);
    assert_eq!((found, end), (list, ListEnd::NoArea { area: 1 }));
    let too_many = exceptions(size, 33);
    assert!(build(size, 34, &too_many, &[]).is_err());
}

/// The largest area has 67 million entries. They go out in pieces one behind the other,
/// and what is empty is not gone through one by one: that took `cow repair` of a store of
/// a kilobyte seconds (found by the fuzzer).
#[test]
fn an_area_of_a_gibibyte_is_made_in_pieces() {
    let size = ChunkSize::MAX;
    let (layout, bytes) = (Layout::new(size), 4 * size.bytes());
    let area = layout.area_offset(0);
    let first = exceptions(size, 1)[0];
    let stale = Stale {
        at: Slot {
            area: 0,
            index: 40_000_000,
        },
        old: 9,
        new: 2,
    };
    let (mut at, mut entries) = (area, Vec::new());
    let mut write = |offset: u64, bytes: &[u8]| {
        assert_eq!(offset, at);
        if bytes.iter().any(|byte| *byte != 0) {
            let nth = bytes.chunks(16).enumerate();
            let nth = nth.filter(|(_, entry)| entry.iter().any(|byte| *byte != 0));
            entries.extend(nth.map(|(n, entry)| ((offset - area) / 16 + n as u64, entry.to_vec())));
        }
        at += bytes.len() as u64;
        Ok::<_, BuildError>(())
    };
    let mut builder = AreaBuilder::new(size, bytes);
    builder.push(first, &mut write).unwrap();
    builder.stale(stale, &mut write).unwrap();
    builder.finish(&mut write).unwrap();
    assert_eq!(at, area + size.bytes());
    let stale_bytes = [9_u64.to_le_bytes(), 2_u64.to_le_bytes()].concat();
    let expected = [(0, first.encode().to_vec()), (40_000_000, stale_bytes)];
    assert_eq!(entries, expected);
}

#[test]
fn stale_entries_lie_behind_the_end_and_nowhere_else() {
    let size = ChunkSize::from_sectors(2).unwrap();
    let list = exceptions(size, 5);
    let stale = |area, index, new| Stale {
        at: Slot { area, index },
        old: 9,
        new,
    };
    let image = build(size, 80, &list, &[stale(0, 32, 20), stale(0, 63, 21)]).unwrap();
    let tail = Tail::Corrupt { entry: 63 };
    let (area, entries) = (0, 5);
    let expected = ListEnd::InArea {
        area,
        entries,
        tail,
    };
    assert_eq!(image.list(size), (list.clone(), expected));
    assert!(build(size, 80, &list, &[stale(0, 5, 0)]).is_ok());
    for wrong in [
        stale(0, 4, 20),
        stale(0, 5, 20),
        stale(0, 64, 20),
        stale(1, 6, 20),
    ] {
        assert!(build(size, 80, &list, &[wrong]).is_err(), "{wrong:?}");
    }
    let backwards = [stale(0, 33, 20), stale(0, 32, 20)];
    assert!(build(size, 80, &list, &backwards).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_built_is_read(numbers in prop::collection::vec((any::<u64>(), 1..u64::MAX), 0..300), shift in 0..4_u32) {
        let size = ChunkSize::from_sectors(1 << shift).unwrap();
        let list: Vec<Exception> = numbers
            .iter()
            .map(|&(old, new)| Exception { old: OriginChunk(old), new: CowChunk(new) })
            .collect();
        let chunks = Layout::new(size).sectors_for(list.len() as u64) / size.sectors();
        let (found, end) = build(size, chunks, &list, &[]).unwrap().list(size);
        prop_assert_eq!(found, list);
        let clean = matches!(end, ListEnd::InArea { tail: Tail::Clean, .. });
        prop_assert!(clean);
    }
}
