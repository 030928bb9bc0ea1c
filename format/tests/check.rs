//! The checker: each thing that can be wrong, by a store made for it, and
//! random stores against a plain search for contradictions.

use std::collections::BTreeMap;
use std::convert::Infallible;

use nbdsnap_format::layout::Slot;
use nbdsnap_format::list::MAX_READ_BYTES;
use nbdsnap_format::{
    ChunkSize, CowChunk, Exception, Finding, Findings, Header, HeaderError, Layout, Misplaced,
    OriginChunk, check,
};
use proptest::prelude::*;

fn chunk_size(sectors: u64) -> ChunkSize {
    ChunkSize::from_sectors(sectors).unwrap()
}

fn exception(old: u64, new: u64) -> Exception {
    Exception {
        old: OriginChunk(old),
        new: CowChunk(new),
    }
}

/// The first `count` exceptions of a store, for origin chunks 0, 1, 2 and so on.
fn in_order(layout: Layout, count: u64) -> Vec<Exception> {
    let nth = |n| exception(n, layout.data_chunk(n).0);
    (0..count).map(nth).collect()
}

/// A store in memory that keeps only what is not zero: a chunk may be 1 GiB.
struct Image {
    layout: Layout,
    bytes: u64,
    sectors: BTreeMap<u64, [u8; 512]>,
    largest_read: usize,
}

impl Image {
    /// A store of `chunks` chunks with these exceptions.
    fn new(chunk_size: ChunkSize, chunks: u64, exceptions: &[Exception]) -> Self {
        let layout = Layout::new(chunk_size);
        let mut image = Self {
            layout,
            bytes: chunks * chunk_size.bytes(),
            sectors: BTreeMap::new(),
            largest_read: 0,
        };
        let header = Header {
            valid: true,
            chunk_size,
        };
        image.write(0, &header.encode());
        for (n, exception) in (0..).zip(exceptions) {
            image.write_entry(layout.slot(n), *exception);
        }
        image
    }

    fn write_entry(&mut self, slot: Slot, exception: Exception) {
        let offset = self.layout.area_offset(slot.area) + 16 * slot.index;
        self.write(offset, &exception.encode());
    }

    /// Bytes that lie in one sector.
    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let sector = self.sectors.entry(offset / 512).or_insert([0; 512]);
        sector[(offset % 512) as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    fn check(&mut self, origin_bytes: Option<u64>) -> Findings {
        let read = |offset: u64, buffer: &mut [u8]| {
            let end = offset + buffer.len() as u64;
            assert!(end <= self.bytes, "a read past the end");
            self.largest_read = self.largest_read.max(buffer.len());
            buffer.fill(0);
            for (at, sector) in self.sectors.range(offset / 512..end.div_ceil(512)) {
                let rest = &mut buffer[(at * 512 - offset) as usize..];
                let there = rest.len().min(512);
                rest[..there].copy_from_slice(&sector[..there]);
            }
            Ok::<_, Infallible>(())
        };
        let Ok(findings) = check(read, self.bytes, origin_bytes);
        findings
    }
}

/// What is wrong, and the sentence that says so.
fn only(findings: &Findings) -> (Finding, String) {
    assert_eq!(findings.list.len(), 1, "{:?}", findings.list);
    assert_eq!(findings.left_out, 0);
    (findings.list[0], findings.list[0].to_string())
}

#[test]
fn a_store_of_every_chunk_size_is_sound() {
    for shift in 0..=21 {
        let chunk_size = chunk_size(1 << shift);
        let layout = Layout::new(chunk_size);
        let e = chunk_size.exceptions_per_area();
        // Areas of small chunks are filled, and lists run through several.
        let counts = [0, 1, 3, e - 1, e, e + 1, 2 * e + 5];
        for count in counts.into_iter().filter(|n| *n < 5000) {
            let chunks = layout.sectors_for(count) / chunk_size.sectors();
            let mut image = Image::new(chunk_size, chunks, &in_order(layout, count));
            let findings = image.check(Some(count * chunk_size.bytes()));
            assert!(findings.is_sound(), "{chunk_size}: {findings:?}");
            assert!(findings.can_be_opened());
            assert_eq!(findings.exceptions, count);
            assert_eq!(findings.next_free, layout.data_chunk(count));
            assert!(image.largest_read as u64 <= MAX_READ_BYTES);
            // The layout's lengths are the shortest with which all is well.
            image.bytes -= 1;
            assert!(!image.check(None).can_be_opened(), "{chunk_size}: {count}");
        }
    }
}

#[test]
fn what_is_no_store() {
    let mut image = Image::new(chunk_size(8), 3, &[]);
    image.sectors.clear();
    let (finding, text) = only(&image.check(None));
    assert_eq!(finding, Finding::NoStore);
    assert_eq!(
        text,
        "no snapshot store: its first bytes are zeros, so it was never made, or its header is lost; the kernel would make a new one here without asking"
    );

    image.write(0, b"LUKS");
    let (finding, text) = only(&image.check(None));
    let found = 0x534b_554c;
    assert_eq!(finding, Finding::Header(HeaderError::WrongMagic { found }));
    assert_eq!(text, HeaderError::WrongMagic { found }.to_string());

    for bytes in [0, 1, 511] {
        image.bytes = bytes;
        let (finding, _) = only(&image.check(None));
        let found = bytes;
        assert_eq!(finding, Finding::Header(HeaderError::TooShort { found }));
    }
}

#[test]
fn a_store_that_is_cut_off() {
    let mut image = Image::new(chunk_size(8), 3, &[exception(5, 2)]);
    image.bytes = 8191;
    let findings = image.check(None);
    assert!(!findings.can_be_opened());
    let (finding, text) = only(&findings);
    let (found, needed) = (8191, 8192);
    assert_eq!(finding, Finding::Truncated { found, needed });
    assert_eq!(
        text,
        "cut off: 8191 bytes, where the header and the first area take 8192; the exceptions are lost unless the rest is brought back"
    );
}

#[test]
fn an_invalid_store_is_no_fault_and_its_exceptions_are_not_read() {
    let mut image = Image::new(chunk_size(8), 3, &[exception(5, 999)]);
    image.write(4, &[0]);
    let findings = image.check(None);
    assert!(findings.is_sound());
    assert!(!findings.header.unwrap().valid);
    assert_eq!(findings.exceptions, 0);
    assert_eq!(image.largest_read, 512);
}

#[test]
fn exceptions_that_point_where_none_can() {
    let cases = [
        (
            exception(5, 4),
            Misplaced::OutsideStore,
            "area 0, entry 1: origin chunk 5 -> store chunk 4: its data would lie outside the store: the store was cut off, or is damaged",
        ),
        (
            exception(5, 1),
            Misplaced::OnMetadata,
            "area 0, entry 1: origin chunk 5 -> store chunk 1: its data would lie on the store's own metadata: the store is damaged",
        ),
        (
            exception(7, 3),
            Misplaced::OutsideOrigin,
            "area 0, entry 1: origin chunk 7 -> store chunk 3: it is outside the origin: the store belongs to another origin, the origin shrank, or the store is damaged",
        ),
    ];
    for (exception, why, sentence) in cases {
        let good = self::exception(0, 2);
        let mut image = Image::new(chunk_size(8), 4, &[good, exception]);
        let findings = image.check(Some(7 * 4096));
        assert!(!findings.can_be_opened());
        let (finding, text) = only(&findings);
        let at = Slot { area: 0, index: 1 };
        assert_eq!(finding, Finding::Misplaced { at, exception, why });
        assert_eq!(text, sentence);
    }
}

#[test]
fn exceptions_that_contradict_each_other() {
    let layout = Layout::new(ChunkSize::MIN);
    let first = Slot { area: 0, index: 3 };
    let second = Slot { area: 1, index: 2 };
    let sound = in_order(layout, 40);

    let mut exceptions = sound.clone();
    exceptions[34].old = OriginChunk(3);
    let (finding, text) = only(&Image::new(ChunkSize::MIN, 50, &exceptions).check(None));
    let old = OriginChunk(3);
    assert_eq!(finding, Finding::SameOriginChunk { old, first, second });
    assert_eq!(
        text,
        "area 1, entry 2: origin chunk 3 has an exception already (area 0, entry 3): the snapshot's data there is not certain"
    );

    let mut exceptions = sound;
    exceptions[34].new = CowChunk(5);
    let (finding, text) = only(&Image::new(ChunkSize::MIN, 50, &exceptions).check(None));
    let new = CowChunk(5);
    assert_eq!(finding, Finding::SameStoreChunk { new, first, second });
    assert_eq!(
        text,
        "area 1, entry 2: its data would lie at store chunk 5, where that of another exception lies (area 0, entry 3): one of the two origin chunks shows wrong data"
    );
}

#[test]
fn entries_behind_the_end_are_torn_or_corrupt() {
    let size = chunk_size(2);
    let layout = Layout::new(size);
    // 64 entries an area; the list ends in area 1.
    let mut image = Image::new(size, 200, &in_order(layout, 70));
    image.write_entry(Slot { area: 1, index: 32 }, exception(900, 120));
    let findings = image.check(None);
    assert!(!findings.is_sound() && findings.can_be_opened());
    let (finding, text) = only(&findings);
    let end = Slot { area: 1, index: 6 };
    let from_entry = 32;
    assert_eq!(finding, Finding::Torn { end, from_entry });
    assert_eq!(
        text,
        "the list of exceptions ends at area 1, entry 6, and entries of a write that a power cut tore follow from entry 32 on: no data is lost, and opening the store for writing removes them; the kernel does not, so open it here first"
    );
    assert_eq!(findings.exceptions, 70);

    image.write_entry(Slot { area: 1, index: 20 }, exception(901, 121));
    let findings = image.check(None);
    assert!(!findings.can_be_opened());
    let (finding, text) = only(&findings);
    let at = Slot { area: 1, index: 20 };
    assert_eq!(finding, Finding::Corrupt { at });
    assert_eq!(
        text,
        "area 1, entry 20: it lies behind the end of the list of exceptions and is not empty, and no torn write leaves that: the store is damaged, and exceptions may be missing"
    );
}

#[test]
fn a_list_that_does_not_end() {
    let layout = Layout::new(ChunkSize::MIN);
    let mut image = Image::new(ChunkSize::MIN, 34, &in_order(layout, 32));
    let findings = image.check(None);
    assert!(!findings.can_be_opened());
    let (finding, text) = only(&findings);
    let (found, needed) = (34 * 512, 35 * 512);
    assert_eq!(
        finding,
        Finding::NoNextArea {
            area: 1,
            found,
            needed
        }
    );
    assert_eq!(
        text,
        "all areas are full, and area 1, where the list of exceptions would end, does not fit: 17408 bytes, where it needs 17920; the kernel refuses such a store too: make it that long, with zeros, and it can be opened"
    );
    image.bytes = needed;
    assert!(image.check(None).is_sound());
}

#[test]
fn a_badly_damaged_store_lists_only_so_much() {
    let exceptions = vec![exception(1, 2); 1500];
    let findings = Image::new(chunk_size(64), 10, &exceptions).check(None);
    assert_eq!(findings.list.len(), Findings::LIMIT);
    assert_eq!(findings.left_out, 2 * 1499 - Findings::LIMIT as u64);
    assert!(!findings.is_sound() && !findings.can_be_opened());
}

#[test]
fn an_error_of_the_reader_is_handed_on() {
    let mut reads = 0;
    let failing = |_: u64, buffer: &mut [u8]| {
        reads += 1;
        let header = Header {
            valid: true,
            chunk_size: ChunkSize::DEFAULT,
        };
        if reads == 2 {
            return Err("the second read failed");
        }
        buffer.copy_from_slice(&header.encode());
        Ok(())
    };
    let result = check(failing, 1 << 20, None);
    assert_eq!(result, Err("the second read failed"));
    assert_eq!(reads, 2);
}

/// Whether `findings` says that entry `n` is misplaced, or shares a chunk with
/// an entry before it.
fn is_named(findings: &Findings, at: Slot) -> [bool; 3] {
    let any = |test: &dyn Fn(&Finding) -> bool| findings.list.iter().any(test);
    [
        any(&|f| matches!(f, Finding::Misplaced { at: slot, .. } if *slot == at)),
        any(&|f| matches!(f, Finding::SameOriginChunk { second, .. } if *second == at)),
        any(&|f| matches!(f, Finding::SameStoreChunk { second, .. } if *second == at)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    /// Every entry that contradicts an earlier one, or points nowhere, is named,
    /// and no other.
    #[test]
    fn contradictions_are_all_found(
        numbers in prop::collection::vec((0..400_u64, 1..400_u64), 0..100),
        shift in 0..3_u32,
    ) {
        let size = chunk_size(1 << shift);
        let layout = Layout::new(size);
        let exceptions: Vec<_> = numbers.iter().map(|&(old, new)| exception(old, new)).collect();
        let mut image = Image::new(size, 380, &exceptions);
        let findings = image.check(Some(390 * size.bytes() - 1));
        prop_assert_eq!(findings.exceptions, numbers.len() as u64);
        for (n, (old, new)) in numbers.iter().enumerate() {
            let entries_per_area = 32 << shift;
            let misplaced = *old >= 390 || *new >= 380 || new % (entries_per_area + 1) == 1;
            let same_old = numbers[..n].iter().any(|e| e.0 == *old);
            let same_new = numbers[..n].iter().any(|e| e.1 == *new);
            let named = is_named(&findings, layout.slot(n as u64));
            prop_assert_eq!(named, [misplaced, same_old, same_new], "entry {}", n);
        }
    }

    /// Whatever the bytes are, the check ends, and reads only what is there.
    #[test]
    fn any_bytes_can_be_checked(
        sectors in prop::collection::vec(any::<[u8; 512]>(), 1..60),
        shift in 0..4_u32,
        cut in 0..512_u64,
        origin in any::<Option<u64>>(),
    ) {
        let size = chunk_size(1 << shift);
        let mut image = Image::new(size, 0, &[]);
        for (n, sector) in (1..).zip(&sectors) {
            image.write(512 * n, sector);
        }
        image.bytes = 512 * (1 + sectors.len() as u64) - cut;
        let findings = image.check(origin);
        // Random bytes are no good store; one cut down to a header is no store.
        prop_assert!(!findings.is_sound());
    }
}

#[test]
fn chunks_that_no_exception_points_to_are_counted() {
    let size = ChunkSize::MIN;
    let layout = Layout::new(size);
    let mut exceptions = in_order(layout, 40);
    let findings = Image::new(size, 50, &exceptions).check(None);
    assert_eq!(findings.unreferenced, 0);
    // Two taken out of the middle, and the order of the others turned round.
    exceptions.remove(7);
    exceptions.remove(20);
    exceptions.reverse();
    let findings = Image::new(size, 50, &exceptions).check(None);
    assert!(findings.is_sound());
    assert_eq!(findings.unreferenced, 2);
    // One more, whose chunk two exceptions name; and one that points nowhere.
    exceptions[4].new = exceptions[5].new;
    let findings = Image::new(size, 50, &exceptions).check(None);
    assert_eq!(findings.unreferenced, 3);
    exceptions[8].new = CowChunk(1 << 60);
    let findings = Image::new(size, 50, &exceptions).check(None);
    assert_eq!(findings.unreferenced, 4);
}

#[test]
fn what_the_kernel_does_with_a_fault_is_said() {
    use nbdsnap_format::Kernel;
    let slot = Slot { area: 1, index: 2 };
    let misplaced = |why| Finding::Misplaced {
        at: slot,
        exception: exception(1, 2),
        why,
    };
    for (finding, code, kernel) in [
        (Finding::NoStore, "no-store", Kernel::Formats),
        (
            misplaced(Misplaced::OutsideStore),
            "outside-store",
            Kernel::Fails,
        ),
        (
            misplaced(Misplaced::OutsideOrigin),
            "outside-origin",
            Kernel::Fails,
        ),
        (
            misplaced(Misplaced::OnMetadata),
            "on-metadata",
            Kernel::Misreads,
        ),
        (Finding::Corrupt { at: slot }, "corrupt", Kernel::Misreads),
        (
            Finding::Torn {
                end: slot,
                from_entry: 32,
            },
            "torn",
            Kernel::MisreadsLater,
        ),
        (
            Finding::NoNextArea {
                area: 1,
                found: 1,
                needed: 2,
            },
            "no-next-area",
            Kernel::Rejects,
        ),
    ] {
        assert_eq!((finding.code(), finding.kernel()), (code, kernel));
    }
}
