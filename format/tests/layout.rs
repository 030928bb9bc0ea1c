//! The layout, against an independent model that walks a store chunk by chunk,
//! for every chunk size from 1 sector to 2^21.

use nbdsnap_format::layout::Slot;
use nbdsnap_format::{ChunkSize, ChunkSizeError, CowChunk, Layout, OriginChunk};
use proptest::prelude::*;

/// All 22 chunk sizes.
fn chunk_sizes() -> impl Iterator<Item = ChunkSize> {
    (0..=21).map(|shift| ChunkSize::from_sectors(1 << shift).unwrap())
}

/// What a chunk is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Use {
    Header,
    Area(u64),
    Data(Slot),
}

/// The chunks of a store from 0 on, as a maker of stores meets them: the header,
/// then again and again an area and as many data chunks as it has entries.
fn walk(chunk_size: ChunkSize) -> impl Iterator<Item = Use> {
    // An entry is an 8-byte and an 8-byte number.
    let entries = 512 * chunk_size.sectors() / (8 + 8);
    let rows = (0..).flat_map(move |area| {
        let data = (0..entries).map(move |index| Use::Data(Slot { area, index }));
        std::iter::once(Use::Area(area)).chain(data)
    });
    std::iter::once(Use::Header).chain(rows)
}

/// Far enough to meet areas 0 to 3 of small chunks, and areas 0 and 1 of large ones.
fn steps(chunk_size: ChunkSize) -> usize {
    let row = 32 * chunk_size.sectors() as usize + 1;
    if row < 100_000 { 3 * row + 5 } else { row + 5 }
}

#[test]
fn every_chunk_is_what_a_walk_finds_it_to_be() {
    for chunk_size in chunk_sizes() {
        let layout = Layout::new(chunk_size);
        let mut data_seen = 0;
        let mut waiting_for_data = Vec::new();
        for (number, chunk_use) in (0..).zip(walk(chunk_size).take(steps(chunk_size))) {
            let chunk = CowChunk(number);
            waiting_for_data.push(chunk);
            let is_data = matches!(chunk_use, Use::Data(_));
            assert_eq!(layout.is_metadata(chunk), !is_data, "{chunk_size}: {chunk}");
            match chunk_use {
                Use::Header => assert_eq!(number, 0),
                Use::Area(n) => {
                    assert_eq!(layout.area_location(n), chunk, "{chunk_size}");
                    assert_eq!(layout.area_offset(n), number * chunk_size.bytes());
                }
                Use::Data(slot) => {
                    assert_eq!(layout.slot(data_seen), slot, "{chunk_size}");
                    assert_eq!(layout.data_chunk(data_seen), chunk, "{chunk_size}");
                    for earlier in waiting_for_data.drain(..) {
                        assert_eq!(layout.data_chunk_from(earlier), chunk, "{chunk_size}");
                    }
                    let before = CowChunk(number - 1);
                    assert_eq!(layout.next_free(Some(before)), chunk, "{chunk_size}");
                    data_seen += 1;
                }
            }
        }
        assert_eq!(layout.next_free(None), CowChunk(2));
    }
}

/// Allocates like a store that is filled: how many exceptions fit into `chunks`
/// chunks if an area is filled only when the next one is there to end the list.
fn fill(chunk_size: ChunkSize, chunks: u64) -> u64 {
    let entries = 32 * chunk_size.sectors();
    let there: Vec<Use> = walk(chunk_size).take(chunks as usize).collect();
    let has_area = |n| there.contains(&Use::Area(n));
    let fits = |slot: &Slot| slot.index + 1 < entries || has_area(slot.area + 1);
    let slots = there.iter().filter_map(|u| match u {
        Use::Data(slot) => Some(*slot),
        _ => None,
    });
    slots.take_while(fits).count() as u64
}

/// Numbers of chunks around which something changes, for small chunk sizes.
fn interesting_chunks(chunk_size: ChunkSize) -> Vec<u64> {
    let row = 32 * chunk_size.sectors() + 1;
    let mut chunks: Vec<u64> = (0..6).collect();
    for rows in 1..=3 {
        chunks.extend((rows * row - 1)..(rows * row + 5));
    }
    chunks
}

#[test]
fn capacity_is_what_filling_a_store_gives() {
    for chunk_size in chunk_sizes().take(8) {
        let layout = Layout::new(chunk_size);
        for chunks in interesting_chunks(chunk_size) {
            for odd in [0, 1, chunk_size.bytes() - 1] {
                let bytes = chunks * chunk_size.bytes() + odd;
                let expected = fill(chunk_size, chunks);
                assert_eq!(
                    layout.capacity(bytes),
                    expected,
                    "{chunk_size}: {chunks} chunks and {odd} bytes"
                );
            }
        }
    }
}

#[test]
fn there_is_room_for_exactly_the_capacity() {
    for chunk_size in chunk_sizes() {
        let layout = Layout::new(chunk_size);
        for chunks in interesting_chunks(chunk_size) {
            let bytes = chunks * chunk_size.bytes();
            let capacity = layout.capacity(bytes);
            let has_room = |n| layout.has_room(layout.data_chunk(n), n, bytes);
            for n in capacity.saturating_sub(3)..capacity {
                assert!(has_room(n), "{chunk_size}: {n} of {chunks} chunks");
            }
            assert!(!has_room(capacity), "{chunk_size}: {chunks} chunks");
        }
    }
}

#[test]
fn the_kernels_size_formula_is_the_store_that_holds_so_many() {
    for chunk_size in chunk_sizes() {
        let layout = Layout::new(chunk_size);
        let e = chunk_size.exceptions_per_area();
        for n in [0, 1, 2, e - 1, e, e + 1, 2 * e - 1, 2 * e, 7 * e + 3] {
            let sectors = layout.sectors_for(n);
            assert_eq!(sectors, (2 + n + n / e) * chunk_size.sectors());
            assert_eq!(layout.capacity(sectors * 512), n, "{chunk_size}: {n}");
            if n > 0 {
                assert_eq!(layout.capacity(sectors * 512 - 1), n - 1, "{chunk_size}");
            }
        }
    }
}

#[test]
fn the_size_oracle_at_8_sector_chunks() {
    let layout = Layout::new(ChunkSize::from_sectors(8).unwrap());
    assert_eq!(
        [0, 1, 2, 3].map(|n| layout.sectors_for(n)),
        [16, 24, 32, 40]
    );
    // 256 entries fill an area, and take the next one with them.
    assert_eq!(layout.sectors_for(255), 8 * 257);
    assert_eq!(layout.sectors_for(256), 8 * 259);
    assert_eq!(layout.metadata_sectors(0), 16);
    assert_eq!(layout.metadata_sectors(1), 24);
}

#[test]
fn a_store_with_no_room_for_the_next_area_keeps_the_last_slot_empty() {
    let chunk_size = ChunkSize::MIN;
    let layout = Layout::new(chunk_size);
    // Chunk 33 is the 32nd data chunk, and area 1 lies at chunk 34.
    assert_eq!(layout.data_chunk(31), CowChunk(33));
    assert_eq!(layout.area_location(1), CowChunk(34));
    assert!(!layout.has_room(CowChunk(33), 31, 34 * 512));
    assert!(layout.has_room(CowChunk(33), 31, 35 * 512));
    assert_eq!(layout.capacity(34 * 512), 31);
    assert_eq!(layout.capacity(35 * 512), 32);
}

#[test]
fn the_largest_store_an_origin_needs_counts_its_last_fraction() {
    let layout = Layout::new(ChunkSize::from_sectors(8).unwrap());
    assert_eq!(layout.sectors_needed_for_origin(0), 16);
    assert_eq!(layout.sectors_needed_for_origin(512), 24);
    assert_eq!(layout.sectors_needed_for_origin(4096), 24);
    assert_eq!(layout.sectors_needed_for_origin(4097), 32);
    for chunk_size in chunk_sizes() {
        let layout = Layout::new(chunk_size);
        for chunks in [0, 1, 31, 32, 33, 1_000_000] {
            for odd in [0, 512] {
                let origin = chunks * chunk_size.bytes() + odd;
                let needed = chunk_size.chunks_to_cover(origin);
                let store = layout.sectors_needed_for_origin(origin) * 512;
                assert_eq!(layout.capacity(store), needed, "{chunk_size}: {origin}");
            }
        }
    }
}

#[test]
fn chunk_sizes_are_powers_of_two_of_sectors() {
    use ChunkSizeError::{NotPowerOfTwo, NotSectors, TooLarge};
    for shift in 0..=21 {
        let sectors = 1 << shift;
        let chunk_size = ChunkSize::from_sectors(sectors).unwrap();
        assert_eq!(chunk_size.sectors(), sectors);
        assert_eq!(chunk_size.bytes(), sectors * 512);
        assert_eq!(chunk_size.exceptions_per_area(), sectors * 32);
        assert_eq!(ChunkSize::from_bytes(sectors * 512), Ok(chunk_size));
    }
    assert_eq!(ChunkSize::from_sectors(0), Err(NotPowerOfTwo(0)));
    assert_eq!(ChunkSize::from_sectors(12), Err(NotPowerOfTwo(12)));
    assert_eq!(ChunkSize::from_sectors(1 << 22), Err(TooLarge(1 << 22)));
    assert_eq!(ChunkSize::from_sectors(1 << 63), Err(TooLarge(1 << 63)));
    assert_eq!(ChunkSize::from_bytes(513), Err(NotSectors(513)));
    assert_eq!(ChunkSize::from_bytes(0), Err(NotPowerOfTwo(0)));
}

/// Any u64, the ends of its range as likely as the rest.
fn any_number() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0..100_u64,
        (u64::MAX - 100)..=u64::MAX,
        (0..64_u32).prop_map(|bit| 1 << bit)
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    /// What the layout says agrees with itself, far beyond what a walk reaches,
    /// and nothing panics.
    #[test]
    fn arithmetic_is_total_and_consistent(a in any_number(), b in any_number(), c in any_number()) {
        for chunk_size in chunk_sizes() {
            let layout = Layout::new(chunk_size);
            let e = chunk_size.exceptions_per_area();

            let slot = layout.slot(a);
            prop_assert_eq!(u128::from(slot.area) * u128::from(e) + u128::from(slot.index), a.into());
            prop_assert!(slot.index < e);

            // Computed without bounds, then cut to what a u64 holds.
            let cut = |n: u128| u64::try_from(n).unwrap_or(u64::MAX);
            let wide = u128::from;
            let area = cut(1 + wide(a) * (wide(e) + 1));
            prop_assert_eq!(layout.area_location(a).0, area);
            prop_assert_eq!(layout.area_offset(a), cut(wide(area) * wide(chunk_size.bytes())));
            let data = cut(2 + wide(a) + wide(a / e));
            prop_assert_eq!(layout.data_chunk(a).0, data);
            prop_assert_eq!(layout.sectors_for(a), cut(wide(data) * wide(chunk_size.sectors())));
            let metadata = cut((wide(a) + 2).min(wide(u64::MAX)) * wide(chunk_size.sectors()));
            prop_assert_eq!(layout.metadata_sectors(a), metadata);
            let offset = cut(wide(a) * wide(chunk_size.bytes()));
            prop_assert_eq!(chunk_size.cow_offset(CowChunk(a)), offset);
            prop_assert_eq!(chunk_size.origin_offset(OriginChunk(a)), offset);
            prop_assert_eq!(chunk_size.origin_chunk(a), OriginChunk(a / chunk_size.bytes()));
            prop_assert_eq!(chunk_size.chunks_to_cover(a), a.div_ceil(chunk_size.bytes()));
            prop_assert_eq!(chunk_size.whole_chunks(a), a / chunk_size.bytes());

            if area < u64::MAX {
                prop_assert!(layout.is_metadata(CowChunk(area)));
            }
            if data < u64::MAX {
                prop_assert!(!layout.is_metadata(CowChunk(data)));
            }
            let next = layout.data_chunk_from(CowChunk(a));
            prop_assert!(next.0 >= a && next.0 - a <= 2);
            prop_assert!(!layout.is_metadata(next) || next.0 == u64::MAX);
            prop_assert!(layout.next_free(Some(CowChunk(a))) >= next);

            // A store of c bytes holds as many as fit, and not one more.
            let n = layout.capacity(c);
            let chunks = wide(chunk_size.whole_chunks(c));
            prop_assert!(n == 0 || 2 + wide(n) + wide(n / e) <= chunks);
            prop_assert!(2 + wide(n + 1) + wide((n + 1) / e) > chunks);
            prop_assert_eq!(layout.has_room(layout.data_chunk(b), b, c), b < n);
            // Wherever its data goes: there is none past the end.
            prop_assert!(!layout.has_room(CowChunk(a), b, c) || wide(a) < chunks);
            prop_assert!(layout.sectors_needed_for_origin(a) >= 2 * chunk_size.sectors());
        }
    }
}
