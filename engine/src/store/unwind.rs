//! The list of a store that is being merged, taken off from its end: which
//! exceptions go next, and what their area holds without them. Pure numbers and
//! bytes; `volume/merge` does the reading and writing, in the order that the Law
//! asks for.
//!
//! The entries of a step are zeroed in one write of whole blocks for each area. If a
//! power cut tears these, or loses some of them, each sector still holds either what it
//! held (exceptions that are merged once more: their data is where it was, for writes
//! to them wait until the zeros are durable) or zeros behind what is left of the list.
//! A hole can open before entries of later sectors, from a multiple of 32 on; those are
//! exceptions that have been merged durably, and the next open scrubs them. The same
//! may lie in areas behind the one in which the list ends then: there nobody looks, and
//! whoever fills that one zeroes the next first.

use bytes::Bytes;
use nbdsnap_format::area::{EXCEPTION_BYTES, Exceptions};
use nbdsnap_format::{Exception, Layout, SECTOR_BYTES};

use super::Status;
use super::commit::block_entries;

/// A step takes at most this many exceptions: what is kept of each, meanwhile, is a
/// hundred bytes or two.
const MOST_ENTRIES: u64 = 1 << 17;

/// The end of the list, within one area: whole blocks of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tail {
    /// Where its blocks begin in the store.
    pub(crate) offset: u64,
    /// Their bytes.
    pub(crate) len: u64,
    /// Entries in them that stay.
    kept: u64,
    /// Entries behind those, which go.
    taken: u64,
}

/// The end of the list does not hold what it held when the store was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Changed;

impl Tail {
    /// The exceptions that go, from the bytes of the blocks.
    pub(crate) fn exceptions(&self, blocks: &[u8]) -> Result<Vec<Exception>, Changed> {
        let all = Exceptions::of(blocks);
        if blocks.len() as u64 != self.len || all.len() as u64 != self.kept + self.taken {
            return Err(Changed);
        }
        Ok(all.skip(self.kept as usize).collect())
    }

    /// The blocks without the exceptions that go.
    pub(crate) fn zeroed(&self, blocks: &[u8]) -> Bytes {
        let mut zeroed = vec![0; blocks.len()];
        let kept = self.kept as usize * EXCEPTION_BYTES;
        zeroed[..kept].copy_from_slice(&blocks[..kept]);
        zeroed.into()
    }
}

/// The exceptions that are left in a merging store, as slots from 0 on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unwind {
    layout: Layout,
    left: u64,
}

impl Unwind {
    /// Of a store that holds `slots` exceptions, all of them durable.
    pub(crate) fn new(layout: Layout, slots: u64) -> Self {
        Self {
            layout,
            left: slots,
        }
    }

    /// Exceptions that are left.
    pub(crate) fn left(&self) -> u64 {
        self.left
    }

    /// The last exceptions of the list: of up to `bytes` bytes of data, but one at
    /// least. They are the ends of areas, that of the last area first; of all areas
    /// but the last of these nothing is left.
    pub(crate) fn tails(&self, bytes: u64) -> Vec<Tail> {
        let most = (bytes / self.layout.chunk_size().bytes()).clamp(1, MOST_ENTRIES);
        let (mut rest, mut tails, mut taken) = (*self, Vec::new(), 0);
        while taken < most
            && let Some(tail) = rest.tail(most - taken)
        {
            taken += tail.taken;
            rest.left -= tail.taken;
            tails.push(tail);
        }
        tails
    }

    /// Up to `most` exceptions, the last of the last area that has any.
    fn tail(&self, most: u64) -> Option<Tail> {
        let last = self.layout.slot(self.left.checked_sub(1)?);
        let in_area = last.index + 1;
        let first = in_area.saturating_sub(most);
        let block = block_entries(self.layout);
        let (from, to) = (first / block * block, in_area.next_multiple_of(block));
        Some(Tail {
            offset: self.layout.area_offset(last.area) + from * EXCEPTION_BYTES as u64,
            len: (to - from) * EXCEPTION_BYTES as u64,
            kept: first - from,
            taken: in_area - first,
        })
    }

    /// The exceptions of `tails` are gone, durably.
    pub(crate) fn commit(&mut self, tails: &[Tail]) {
        self.left -= tails.iter().map(|tail| tail.taken).sum::<u64>();
    }

    /// As the kernel counts a merging store: one that holds the exceptions that
    /// are left and nothing else. Done when `allocated` is `metadata`.
    pub(crate) fn status(&self, limit: u64) -> Status {
        Status::Active {
            allocated: self.layout.sectors_for(self.left),
            total: limit / SECTOR_BYTES,
            metadata: self
                .layout
                .metadata_sectors(self.layout.slot(self.left).area),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nbdsnap_format::{AreaDecoder, AreaEnd, Bounds, ChunkSize, CowChunk, OriginChunk};

    const SECTOR: usize = SECTOR_BYTES as usize;

    fn exception(n: u64) -> Exception {
        Exception {
            old: OriginChunk(1000 - n),
            new: CowChunk(n + 2),
        }
    }

    /// The area of a store of 1 KiB chunks (two sectors of entries) with `count` exceptions.
    fn area(count: u64) -> Vec<u8> {
        let mut area: Vec<u8> = (0..count).flat_map(|n| exception(n).encode()).collect();
        area.resize(1024, 0);
        area
    }

    /// Whatever a power cut leaves of a step's write, an open finds a list that
    /// is a beginning of the old one and holds all that stays, and behind it at
    /// most what it scrubs.
    #[test]
    fn every_torn_step_leaves_a_list_that_holds_what_stays() {
        let layout = Layout::new(ChunkSize::from_sectors(2).unwrap());
        let bounds = Bounds::new(layout.chunk_size(), 1 << 20, None);
        let mut holes = 0;
        for count in 1..64 {
            for most in [1, 2, 7, 31, 32, 33, 64] {
                let unwind = Unwind::new(layout, count);
                let tail = unwind.tails(most * 1024)[0];
                let old = area(count);
                let new = tail.zeroed(&old);
                let stays = count - tail.exceptions(&old).unwrap().len() as u64;
                assert_eq!(stays, count.saturating_sub(most));
                for kept in 0..4 {
                    let mut torn = old.clone();
                    for sector in 0..2 {
                        if kept & 1 << sector != 0 {
                            let bytes = sector * SECTOR..(sector + 1) * SECTOR;
                            torn[bytes.clone()].copy_from_slice(&new[bytes]);
                        }
                    }
                    let mut decoder = AreaDecoder::new(bounds);
                    let list: Vec<_> = decoder.push(&torn).collect();
                    let expected: Vec<_> = (0..list.len() as u64).map(exception).collect();
                    assert_eq!(list, expected);
                    assert!((stays..=count).contains(&(list.len() as u64)));
                    let AreaEnd::Ended { tail, .. } = decoder.finish() else {
                        panic!("an area of less than 64 entries ends");
                    };
                    match tail {
                        nbdsnap_format::Tail::Clean => {}
                        nbdsnap_format::Tail::Torn { from_entry } => {
                            assert_eq!((kept, from_entry), (1, 32));
                            holes += 1;
                        }
                        nbdsnap_format::Tail::Corrupt { .. } => panic!("{count} {most} {kept}"),
                    }
                }
            }
        }
        assert!(holes > 0, "no step tore");
    }

    #[test]
    fn a_list_is_taken_off_from_its_end() {
        // Areas of 32 entries.
        let layout = Layout::new(ChunkSize::from_sectors(1).unwrap());
        let mut unwind = Unwind::new(layout, 65);
        let mut steps = Vec::new();
        loop {
            let tails = unwind.tails(20 * 512);
            if tails.is_empty() {
                break;
            }
            let shown = |tail: &Tail| (tail.offset / 512, tail.kept, tail.taken);
            steps.push(tails.iter().map(shown).collect::<Vec<_>>());
            unwind.commit(&tails);
        }
        assert_eq!(
            steps,
            [
                vec![(67, 0, 1), (34, 13, 19)],
                vec![(34, 0, 13), (1, 25, 7)],
                vec![(1, 5, 20)],
                vec![(1, 0, 5)],
            ]
        );
        let Status::Active {
            allocated,
            metadata,
            ..
        } = unwind.status(1 << 20)
        else {
            panic!("it can be read");
        };
        assert_eq!(allocated, metadata);
    }

    #[test]
    fn a_changed_end_is_noticed() {
        let layout = Layout::new(ChunkSize::from_sectors(2).unwrap());
        let tail = Unwind::new(layout, 40).tails(1 << 20)[0];
        assert!(tail.exceptions(&area(40)).is_ok());
        assert_eq!(tail.exceptions(&area(39)), Err(Changed));
        assert_eq!(tail.exceptions(&area(41)), Err(Changed));
        assert_eq!(tail.exceptions(&area(40)[..512]), Err(Changed));
    }
}
