//! Whose origin a range of a base is. Devices are looked through, down to what they
//! lie on, and each volume's origin is noted there in runs; a request that comes to a
//! base is cut by them.

use std::collections::BTreeMap;

use nbdsnap_format::SECTOR_BYTES;

use super::device::{Step, Way};
use super::{Base, LevelKey, Lower, Mapper, Target};

/// A range of a base that belongs to a volume's origin, all of it in one piece there
/// or dealt out in pieces at equal distances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) base: Base,
    /// First byte in the base.
    pub(super) start: u64,
    pub(super) len: u64,
    /// Where it begins in the origin.
    pub(super) at: u64,
    /// Bytes that lie together in both.
    pub(super) piece: u64,
    /// From the beginning of a piece to that of the next, in the origin.
    pub(super) step: u64,
}

/// A run, and whose it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cover {
    pub(super) order: u32,
    pub(super) level: LevelKey,
    pub(super) run: Run,
}

/// Where a part of a request to a base goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// To the base itself.
    Bottom { offset: u64, len: u64 },
    /// To a volume's origin.
    Level {
        level: LevelKey,
        offset: u64,
        len: u64,
    },
}

impl Run {
    fn end(&self) -> u64 {
        self.start + self.len
    }

    /// Where a byte of the base is in the origin, and how many from it on lie together.
    fn locate(&self, byte: u64) -> (u64, u64) {
        let inside = byte - self.start;
        let (index, rest) = (inside / self.piece, inside % self.piece);
        let together = (self.piece - rest).min(self.end() - byte);
        (self.at + index * self.step + rest, together)
    }
}

impl Mapper {
    /// Cut `start..end` of a base: who is asked for which part, if only volumes below
    /// `limit` are.
    pub(super) fn parts(&self, base: Base, limit: u32, start: u64, end: u64) -> Vec<Part> {
        let mut parts = Vec::new();
        let Some(covers) = self.covers.get(&base) else {
            parts.push(Part::Bottom {
                offset: start,
                len: end - start,
            });
            return parts;
        };
        let mut byte = start;
        while byte < end {
            let below = || covers.iter().filter(|cover| cover.order < limit);
            let over = |cover: &&Cover| cover.run.start <= byte && byte < cover.run.end();
            let top = below().filter(over).max_by_key(|cover| cover.order);
            let order = top.map_or(0, |cover| cover.order);
            // Up to where somebody above it begins.
            let next = below()
                .filter(|cover| cover.order > order && cover.run.start > byte)
                .map(|cover| cover.run.start)
                .min();
            let stop = next.map_or(end, |next| next.min(end));
            let part = match top {
                None => Part::Bottom {
                    offset: byte,
                    len: stop - byte,
                },
                Some(cover) => {
                    let (offset, together) = cover.run.locate(byte);
                    Part::Level {
                        level: cover.level,
                        offset,
                        len: together.min(stop - byte),
                    }
                }
            };
            byte += match part {
                Part::Bottom { len, .. } | Part::Level { len, .. } => len,
            };
            parts.push(part);
        }
        parts
    }

    /// The volumes that a flush of ranges of a base goes to: of those below `limit` that
    /// cover some of them, the ones that no other of these covers. What they flush
    /// comes to the others. Looked at by ranges, and not for the whole base, since a
    /// volume whose stores lie beside its origin would wait for itself.
    pub(super) fn flushers(&self, base: Base, limit: u32, ranges: &[(u64, u64)]) -> Vec<LevelKey> {
        let covers = self.covers.get(&base).into_iter().flatten();
        let mut asked: Vec<Cover> = covers
            .filter(|cover| cover.order < limit)
            .filter(|cover| {
                let run = &cover.run;
                ranges
                    .iter()
                    .any(|&(start, end)| start < run.end() && run.start < end)
            })
            .copied()
            .collect();
        asked.sort_by_key(|cover| std::cmp::Reverse(cover.order));
        let mut tops: Vec<Cover> = Vec::new();
        for cover in asked {
            let over = |top: &Cover| {
                top.order > cover.order
                    && top.run.start < cover.run.end()
                    && cover.run.start < top.run.end()
            };
            if !tops.iter().any(over) {
                tops.push(cover);
            }
        }
        let mut levels: Vec<_> = tops.iter().map(|top| top.level).collect();
        levels.sort_unstable();
        levels.dedup();
        levels
    }

    /// The ranges of bases that a device lies on, base by base.
    pub(super) fn ranges(&self, lower: Lower) -> BTreeMap<Base, Vec<(u64, u64)>> {
        let mut runs = Vec::new();
        self.flatten(lower, 0, self.bytes_of(lower), 0, &mut runs);
        let mut ranges = BTreeMap::<Base, Vec<_>>::new();
        for run in runs {
            ranges
                .entry(run.base)
                .or_default()
                .push((run.start, run.end()));
        }
        ranges
    }

    /// Tables or volumes have changed: look again who covers what.
    pub(super) fn cover_anew(&mut self) {
        self.covers.clear();
        let keys: Vec<_> = self.levels.iter().map(|(key, _)| key).collect();
        for key in keys {
            let origin = self.levels[key].origin;
            let order = self.levels[key].order;
            let mut runs = Vec::new();
            self.flatten(origin, 0, self.bytes_of(origin), 0, &mut runs);
            for &run in &runs {
                let level = key;
                let cover = Cover { order, level, run };
                self.covers.entry(run.base).or_default().push(cover);
            }
        }
    }

    /// Append what `start..end` of a device lies on, the first byte being `at` of the
    /// origin.
    pub(super) fn flatten(&self, lower: Lower, start: u64, end: u64, at: u64, runs: &mut Vec<Run>) {
        let one = |base| Run {
            base,
            start,
            len: end - start,
            at,
            piece: end - start,
            step: 0,
        };
        let id = match lower {
            _ if start >= end => return,
            Lower::Disk(id) => return runs.push(one(Base::Disk(id))),
            Lower::Device(id) => id,
        };
        let Some(table) = self.devices.get(&id).and_then(|d| d.live.as_ref()) else {
            return;
        };
        for (mapped, first, last) in table.cut(start, end) {
            let at = at + (first - start);
            if let Target::Striped { chunk, stripes } = &mapped.line.target {
                let begin = mapped.line.first();
                let dealt = Dealt {
                    chunk: chunk * SECTOR_BYTES,
                    stripes,
                };
                self.flatten_stripes(&dealt, first - begin, last - begin, at, runs);
                continue;
            }
            let mut steps = Vec::with_capacity(1);
            mapped.steps(first, last, &mut steps);
            let Step { way, offset, len } = steps[0];
            match way {
                Way::Lower(lower) => self.flatten(lower, offset, offset + len, at, runs),
                Way::Base(base @ Base::Snap(_)) => runs.push(Run {
                    base,
                    start: offset,
                    len,
                    at,
                    piece: len,
                    step: 0,
                }),
                Way::Base(_) => {}
            }
        }
    }

    /// The same for `start..end` of a striped line: whole rows stripe by stripe, the
    /// rest of the first and the last row chunk by chunk.
    fn flatten_stripes(&self, dealt: &Dealt, start: u64, end: u64, at: u64, runs: &mut Vec<Run>) {
        let row = dealt.chunk * dealt.stripes.len() as u64;
        let (first, last) = (start.next_multiple_of(row).min(end), end / row * row);
        self.flatten_chunks(dealt, start, first, at, runs);
        if last <= first {
            return self.flatten_chunks(dealt, first, end, at + (first - start), runs);
        }
        for (index, &(lower, begin)) in dealt.stripes.iter().enumerate() {
            let begin = begin * SECTOR_BYTES;
            let (from, to) = (first / row * dealt.chunk, last / row * dealt.chunk);
            let mut below = Vec::new();
            self.flatten(lower, begin + from, begin + to, 0, &mut below);
            let at = at + (first - start) + index as u64 * dealt.chunk;
            for run in below {
                dealt.deal_out(run, at, row, runs);
            }
        }
        self.flatten_chunks(dealt, last, end, at + (last - start), runs);
    }

    fn flatten_chunks(&self, dealt: &Dealt, start: u64, end: u64, at: u64, runs: &mut Vec<Run>) {
        let mut byte = start;
        while byte < end {
            let (index, inside) = (byte / dealt.chunk, byte % dealt.chunk);
            let count = dealt.stripes.len() as u64;
            let (lower, begin) = dealt.stripes[(index % count) as usize];
            let offset = begin * SECTOR_BYTES + index / count * dealt.chunk + inside;
            let len = (dealt.chunk - inside).min(end - byte);
            self.flatten(lower, offset, offset + len, at + (byte - start), runs);
            byte += len;
        }
    }

    /// All bases that a device may lie on.
    pub(super) fn bases(&self, lower: Lower) -> Vec<Base> {
        let mut bases = Vec::new();
        let mut left = vec![lower];
        while let Some(next) = left.pop() {
            let id = match next {
                Lower::Disk(id) => {
                    bases.push(Base::Disk(id));
                    continue;
                }
                Lower::Device(id) => id,
            };
            let table = self.devices.get(&id).and_then(|d| d.live.as_ref());
            for mapped in table.iter().flat_map(|table| &table.lines) {
                match (&mapped.line.target, mapped.snap) {
                    (Target::Snapshot(_), Some(snap)) => bases.push(Base::Snap(snap)),
                    (Target::SnapshotMerge(pair), _) => left.push(pair.origin),
                    (target, _) => left.extend(target.lowers()),
                }
            }
        }
        bases.sort_unstable();
        bases.dedup();
        bases
    }

    /// Whether two devices have bytes in common.
    pub(super) fn overlap(&self, a: Lower, b: Lower) -> bool {
        let flat = |lower| {
            let mut runs = Vec::new();
            self.flatten(lower, 0, self.bytes_of(lower), 0, &mut runs);
            runs
        };
        let (a, b) = (flat(a), flat(b));
        a.iter().any(|a| {
            b.iter()
                .any(|b| a.base == b.base && a.start < b.end() && b.start < a.end())
        })
    }

    /// The volumes that what `level` asks of its origin and its stores, and of a store
    /// on `cow`, may come to.
    pub(super) fn asks(&self, level: LevelKey, cow: Option<Lower>) -> Vec<LevelKey> {
        let order = self.levels[level].order;
        let mut asked = Vec::new();
        let mut look = |lower: Lower, limit: u32| {
            let mut runs = Vec::new();
            self.flatten(lower, 0, self.bytes_of(lower), 0, &mut runs);
            for run in runs {
                let covers = self.covers.get(&run.base).into_iter().flatten();
                let over = covers.filter(|cover| {
                    cover.order < limit
                        && cover.run.start < run.end()
                        && run.start < cover.run.end()
                });
                asked.extend(over.map(|cover| cover.level));
                if let Base::Snap(snap) = run.base {
                    asked.extend(self.snaps[snap].level());
                }
            }
        };
        look(self.levels[level].origin, order);
        let stores = self.snaps.iter().filter(|(_, s)| s.level() == Some(level));
        let stores: Vec<_> = stores.map(|(_, snap)| snap.cow).chain(cow).collect();
        for cow in stores {
            look(cow, u32::MAX);
        }
        asked
    }

    /// Whether a store on `cow` for `level` would have the level wait for itself.
    pub(super) fn waits_for_itself(&self, level: LevelKey, cow: Lower) -> bool {
        let mut left = self.asks(level, Some(cow));
        let mut seen = Vec::new();
        while let Some(next) = left.pop() {
            if next == level {
                return true;
            }
            if !seen.contains(&next) {
                seen.push(next);
                left.extend(self.asks(next, None));
            }
        }
        false
    }
}

/// The arguments of a striped line, in bytes.
struct Dealt<'a> {
    chunk: u64,
    stripes: &'a [(Lower, u64)],
}

impl Dealt<'_> {
    /// A run of a stripe, counted within it, in the whole: chunk n of the stripe lies
    /// at `at + n * row`.
    fn deal_out(&self, run: Run, at: u64, row: u64, runs: &mut Vec<Run>) {
        let place = |inside: u64| at + inside / self.chunk * row + inside % self.chunk;
        if run.piece == run.len {
            // Cut so that whole chunks are together, and what is left at the ends.
            let head = (run.at.next_multiple_of(self.chunk) - run.at).min(run.len);
            let whole = (run.len - head) / self.chunk * self.chunk;
            let cuts = [
                (0, head),
                (head, whole),
                (head + whole, run.len - head - whole),
            ];
            for (from, len) in cuts.into_iter().filter(|&(_, len)| len > 0) {
                let inside = run.at + from;
                runs.push(Run {
                    base: run.base,
                    start: run.start + from,
                    len,
                    at: place(inside),
                    piece: len.min(self.chunk),
                    step: row,
                });
            }
            return;
        }
        // Stripes upon stripes: piece by piece.
        let mut byte = run.start;
        while byte < run.end() {
            let (inside, together) = run.locate(byte);
            let len = together.min(self.chunk - inside % self.chunk);
            runs.push(Run {
                base: run.base,
                start: byte,
                len,
                at: place(inside),
                piece: len,
                step: 0,
            });
            byte += len;
        }
    }
}

/// Whether there are more runs than anybody will want to look through.
pub(super) fn is_shredded(runs: &[Run]) -> bool {
    runs.len() > 1 << 16
}
