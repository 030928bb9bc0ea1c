//! Areas by known bytes, and the decoder against a plain reading of the rules.

use nbdsnap_format::area::{ENTRIES_PER_SECTOR, EXCEPTION_BYTES};
use nbdsnap_format::{
    AreaDecoder, AreaEnd, Bounds, ChunkSize, CowChunk, Exception, Exceptions, Misplaced,
    OriginChunk, Tail,
};
use proptest::prelude::*;

fn exception(old: u64, new: u64) -> Exception {
    Exception {
        old: OriginChunk(old),
        new: CowChunk(new),
    }
}

/// A store of 1,000 chunks of an origin of 500.
fn bounds(sectors: u64) -> Bounds {
    let chunk_size = ChunkSize::from_sectors(sectors).unwrap();
    let bytes = chunk_size.bytes();
    Bounds::new(chunk_size, 1000 * bytes, Some(500 * bytes))
}

/// An area with these (old, new) numbers in some of its entries.
fn area(sectors: u64, entries: &[(usize, u64, u64)]) -> Vec<u8> {
    let mut bytes = vec![0; 512 * sectors as usize];
    for (index, old, new) in entries {
        bytes[16 * index..][..8].copy_from_slice(&old.to_le_bytes());
        bytes[16 * index + 8..][..8].copy_from_slice(&new.to_le_bytes());
    }
    bytes
}

/// Decode a whole area at once.
fn decode(sectors: u64, bytes: &[u8]) -> (Vec<Exception>, AreaEnd) {
    let mut decoder = AreaDecoder::new(bounds(sectors));
    let found = decoder.push(bytes).collect();
    (found, decoder.finish())
}

fn ended(entries: u64, tail: Tail) -> AreaEnd {
    AreaEnd::Ended { entries, tail }
}

#[test]
fn an_exception_is_two_little_endian_numbers() {
    let bytes = exception(0x0102_0304_0506_0708, 0x1112_1314_1516_1718).encode();
    assert_eq!(
        bytes,
        [
            0x08, 0x07, 0x06, 0x05, 0x04, 0x03, 0x02, 0x01, 0x18, 0x17, 0x16, 0x15, 0x14, 0x13,
            0x12, 0x11
        ]
    );
    assert_eq!(
        Exception::decode(&bytes),
        Some(exception(0x0102_0304_0506_0708, 0x1112_1314_1516_1718))
    );
    assert_eq!((EXCEPTION_BYTES, ENTRIES_PER_SECTOR), (16, 32));
}

#[test]
fn new_chunk_0_ends_the_list_and_old_chunk_0_does_not() {
    assert_eq!(Exception::decode(&[0; 16]), None);
    let mut only_old = [0; 16];
    only_old[0] = 9;
    assert_eq!(Exception::decode(&only_old), None);

    let bytes = area(1, &[(0, 7, 2), (1, 0, 3), (2, 5, 4)]);
    let expected = [exception(7, 2), exception(0, 3), exception(5, 4)];
    assert_eq!(Exceptions::of(&bytes).collect::<Vec<_>>(), expected);
    assert_eq!(decode(1, &bytes).0, expected);
    assert_eq!(decode(1, &bytes).1, ended(3, Tail::Clean));
}

#[test]
#[should_panic(expected = "no exception has its data in chunk 0")]
fn an_exception_that_would_end_the_list_is_never_written() {
    let _ = exception(1, 0).encode();
}

#[test]
fn an_area_is_full_when_no_entry_ends_the_list() {
    let entries: Vec<_> = (0..32).map(|i| (i, i as u64, i as u64 + 2)).collect();
    assert_eq!(decode(1, &area(1, &entries)).1, AreaEnd::Full);
    let (found, end) = decode(1, &area(1, &entries[..31]));
    assert_eq!((found.len(), end), (31, ended(31, Tail::Clean)));
    assert_eq!(decode(1, &[0; 512]).1, ended(0, Tail::Clean));
}

#[test]
fn stale_entries_from_a_multiple_of_32_on_are_a_tear() {
    // The list has 3 entries; sector 2 of a later write arrived, sector 1 did not.
    let mut entries = vec![(0, 0, 2), (1, 1, 3), (2, 2, 4)];
    entries.extend((64..70).map(|i| (i, i as u64, i as u64 + 2)));
    let torn = ended(3, Tail::Torn { from_entry: 64 });
    assert_eq!(
        decode(4, &area(4, &entries)),
        (
            vec![exception(0, 2), exception(1, 3), exception(2, 4)],
            torn
        )
    );
    // The list ends at the first entry of a sector: that sector is all zeros.
    let later_only = area(4, &[(32, 1, 36)]);
    assert_eq!(
        decode(4, &later_only).1,
        ended(0, Tail::Torn { from_entry: 32 })
    );
}

#[test]
fn anything_else_behind_the_end_is_corruption() {
    let corrupt = |entries: &[(usize, u64, u64)], entry| {
        let (found, end) = decode(4, &area(4, entries));
        assert_eq!(found, [exception(1, 2)], "{entries:?}");
        assert_eq!(end, ended(1, Tail::Corrupt { entry }), "{entries:?}");
    };
    // In the sector where the list ends.
    corrupt(&[(0, 1, 2), (2, 1, 3)], 2);
    corrupt(&[(0, 1, 2), (31, 1, 3)], 31);
    // The end itself has an old chunk.
    corrupt(&[(0, 1, 2), (1, 9, 0)], 1);
    // In a later sector, but not from its first entry on.
    corrupt(&[(0, 1, 2), (33, 1, 3)], 33);
    corrupt(&[(0, 1, 2), (32, 1, 3), (34, 1, 4)], 34);
    // What no exception of this store can say.
    corrupt(&[(0, 1, 2), (32, 1, 0)], 32);
    corrupt(&[(0, 1, 2), (32, 500, 3)], 32);
    corrupt(&[(0, 1, 2), (32, 1, 3), (33, 1, 1000)], 33);
    corrupt(&[(0, 1, 2), (32, 1, 1)], 32);
    corrupt(&[(0, 1, 2), (32, 1, 130)], 32);
    // A tear does not excuse corruption behind it.
    corrupt(&[(0, 1, 2), (32, 1, 3), (97, 1, 4)], 97);
}

#[test]
fn bounds_say_why_an_exception_cannot_be() {
    let bounds = bounds(1);
    assert_eq!(bounds.misplaced(exception(499, 999)), None);
    assert_eq!(
        bounds.misplaced(exception(0, 1000)),
        Some(Misplaced::OutsideStore)
    );
    for chunk in [0, 1, 34, 67] {
        assert_eq!(
            bounds.misplaced(exception(0, chunk)),
            Some(Misplaced::OnMetadata)
        );
    }
    assert_eq!(
        bounds.misplaced(exception(500, 2)),
        Some(Misplaced::OutsideOrigin)
    );
    let max = exception(u64::MAX, u64::MAX);
    assert_eq!(bounds.misplaced(max), Some(Misplaced::OutsideStore));

    // A fraction at the end is a chunk of the origin, and none of the store.
    let odd = Bounds::new(ChunkSize::MIN, 4 * 512 - 1, Some(2 * 512 + 1));
    assert_eq!(odd.misplaced(exception(2, 2)), None);
    assert_eq!(
        odd.misplaced(exception(2, 3)),
        Some(Misplaced::OutsideStore)
    );
    let no_origin = Bounds::new(ChunkSize::MIN, 4 * 512, None);
    assert_eq!(no_origin.misplaced(exception(u64::MAX, 3)), None);
}

#[test]
#[should_panic(expected = "a piece of 100 bytes")]
fn a_piece_is_whole_sectors() {
    let _ = AreaDecoder::new(bounds(1)).push(&[0; 100]);
}

#[test]
#[should_panic(expected = "512 bytes of the area were not read")]
fn an_area_is_read_to_its_end() {
    let mut decoder = AreaDecoder::new(bounds(2));
    let _ = decoder.push(&[0; 512]);
    let _ = decoder.finish();
}

/// What the module doc of `area` says, read entry by entry.
fn plain_reading(sectors: u64, entries: &[(u64, u64)]) -> AreaEnd {
    let bounds = bounds(sectors);
    let Some(end) = entries.iter().position(|&(_, new)| new == 0) else {
        return AreaEnd::Full;
    };
    let mut first_stale = None;
    for index in end..entries.len() {
        let (old, new) = entries[index];
        if (old, new) == (0, 0) {
            continue;
        }
        let sector = index / 32;
        let zeros_before = (32 * sector..index).any(|i| entries[i] == (0, 0));
        let impossible = new == 0 || bounds.misplaced(exception(old, new)).is_some();
        if sector == end / 32 || zeros_before || impossible {
            let entry = index as u64;
            return ended(end as u64, Tail::Corrupt { entry });
        }
        first_stale = first_stale.or(Some(index as u64));
    }
    let tail = first_stale.map_or(Tail::Clean, |from_entry| Tail::Torn { from_entry });
    ended(end as u64, tail)
}

/// Runs of entries, so that sectors are often full, empty, or cut.
fn entries(sectors: u64) -> impl Strategy<Value = Vec<(u64, u64)>> {
    let one = prop_oneof![
        40 => Just((0, 0)),
        40 => (0..500_u64, 2..30_u64),
        1 => (0..500_u64, 0..1100_u64),
        1 => (0..600_u64, 2..30_u64),
        1 => any::<(u64, u64)>(),
    ];
    let length = prop_oneof![Just(32), Just(64), 1..80_usize, Just(1)];
    let count = 32 * sectors as usize;
    prop::collection::vec((one, length), 1..40).prop_map(move |runs| {
        let repeat = |(entry, n)| std::iter::repeat_n(entry, n);
        let mut all: Vec<(u64, u64)> = runs.into_iter().flat_map(repeat).collect();
        all.resize(count, (0, 0));
        all
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// However the area is cut into pieces.
    #[test]
    fn the_decoder_agrees_with_a_plain_reading(
        (sectors, entries) in (0..=5_u32).prop_flat_map(|shift| (Just(1 << shift), entries(1 << shift))),
        cuts in prop::collection::vec(1..5_usize, 32),
    ) {
        let numbered: Vec<_> = entries.iter().enumerate().map(|(i, &(old, new))| (i, old, new)).collect();
        let bytes = area(sectors, &numbered);
        let mut decoder = AreaDecoder::new(bounds(sectors));
        let mut found = Vec::new();
        let mut rest = &bytes[..];
        for cut in cuts {
            let (piece, later) = rest.split_at(rest.len().min(512 * cut));
            prop_assert_eq!(decoder.remaining_bytes(), rest.len() as u64);
            found.extend(decoder.push(piece));
            prop_assert_eq!(decoder.exceptions(), found.len() as u64);
            rest = later;
        }
        let live: Vec<_> = entries.iter().take_while(|e| e.1 != 0).map(|&(old, new)| exception(old, new)).collect();
        prop_assert_eq!(&found, &live);
        prop_assert_eq!(Exceptions::of(&bytes).collect::<Vec<_>>(), live);
        prop_assert_eq!(decoder.finish(), plain_reading(sectors, &entries));
    }

    #[test]
    fn exceptions_survive_a_round_trip(old in any::<u64>(), new in 1..=u64::MAX) {
        let exception = exception(old, new);
        prop_assert_eq!(Exception::decode(&exception.encode()), Some(exception));
    }
}
