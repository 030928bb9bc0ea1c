//! The reference: what each view may show, now and after a crash. It knows
//! nothing of chunks, exceptions or flush orders; it only remembers, for every
//! cell of a view, which writes could still be its content.
//!
//! Two rules say it all. A write that was answered replaces every write that was
//! answered before it was handed in: from then on no read shows those. And a
//! write that is durable (its own FUA, or a FLUSH handed in after its answer)
//! does the same for what a power cut may bring back. Writes that overlap in time
//! may have happened in either order; an unanswered write may have happened or
//! not. What failed, and a trim, may have happened or not and replaces nothing.
//!
//! A snapshot's view begins as what the origin's was made of at its instant,
//! every cell of it durable. The instant lies between the order and its
//! announcement: writes answered before the announcement are in, and those that
//! are unanswered then are in or out as a whole.

use crate::pattern::{self, CELLS, Cells, Stamp, byte_of};

/// A moment: every call of the model has its own.
pub type Time = u32;

const NEVER: Time = Time::MAX;

/// What a cell may hold.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    stamp: Stamp,
    /// When the write was handed in, and when it was answered.
    issued: Time,
    answered: Time,
    /// It replaces nothing: a trim, or a write that failed.
    weak: bool,
    /// No read that begins after this shows it.
    replaced: Time,
    /// A power cut cannot bring it back.
    gone: bool,
}

/// A cell: one durable value, or several candidates.
#[derive(Clone, Debug, Default)]
struct Cell {
    settled: Stamp,
    /// Empty where the cell is settled.
    candidates: Vec<Candidate>,
}

/// What a crash was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// The power failed: what was not durable may be lost.
    Power,
    /// The process was killed: nothing that was answered may be lost.
    Kill,
    /// The process was killed after a flush had failed: what was not durable may be lost.
    KillAfterError,
}

/// How a request that changes a view ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Done.
    Done,
    /// Done, and durable.
    Durable,
    /// It failed: it may have happened in part.
    Failed,
    /// It was refused, and changed nothing.
    Refused,
}

/// How much of a write a snapshot shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// None of it.
    Nothing,
    /// All of it, but for what overlapping writes replaced.
    All,
    /// Some of it: the snapshot shows an instant that never was.
    Torn,
}

/// The view shows what it may not.
#[derive(Clone, Debug)]
pub struct Wrong {
    /// The cell.
    pub cell: usize,
    /// The stamps it may show, and since when and until when.
    pub allowed: String,
    /// The first bytes found.
    pub found: Vec<u8>,
}

/// The reference of one view.
#[derive(Clone, Debug)]
pub struct ViewModel {
    cells: Vec<Cell>,
    /// When it was rolled back last.
    rolled_back: Time,
}

impl ViewModel {
    /// A view whose cell `i` durably holds `stamp_of(i)`.
    pub fn new(cells: usize, stamp_of: impl Fn(usize) -> Stamp) -> Self {
        let cell = |i| Cell {
            settled: stamp_of(i),
            candidates: Vec::new(),
        };
        Self {
            cells: (0..cells).map(cell).collect(),
            rolled_back: 0,
        }
    }

    /// All of it.
    pub fn all(&self) -> Cells {
        Cells {
            from: 0,
            to: self.cells.len(),
        }
    }

    /// The view is `sectors` long from now on: what is new holds zeros, durably.
    pub fn grow(&mut self, sectors: u64) {
        let cells = sectors as usize * CELLS;
        assert!(cells >= self.cells.len(), "a view does not shrink");
        self.cells.resize_with(cells, || Cell {
            settled: pattern::ZERO,
            candidates: Vec::new(),
        });
    }

    /// A write of `stamp` is handed in (a trim, or zeroes: [`pattern::ZERO`]).
    pub fn begin_write(&mut self, range: Cells, stamp: Stamp, issued: Time) {
        for cell in &mut self.cells[range.from..range.to] {
            if cell.candidates.is_empty() {
                cell.candidates.push(Candidate::settled(cell.settled));
            }
            cell.candidates.push(Candidate {
                stamp,
                issued,
                answered: NEVER,
                weak: false,
                replaced: NEVER,
                gone: false,
            });
        }
    }

    /// The write that was handed in at `issued` has been answered.
    pub fn end_write(&mut self, range: Cells, issued: Time, now: Time, end: End, replaces: bool) {
        for cell in &mut self.cells[range.from..range.to] {
            if end == End::Refused {
                cell.candidates.retain(|c| c.issued != issued);
                continue;
            }
            let weak = end == End::Failed || !replaces;
            for candidate in &mut cell.candidates {
                if candidate.issued == issued {
                    candidate.answered = now;
                    candidate.weak = weak;
                } else if !weak && candidate.answered < issued {
                    candidate.replaced = candidate.replaced.min(now);
                    candidate.gone |= end == End::Durable;
                }
            }
        }
    }

    /// A FLUSH that was handed in at `issued` has been answered: what was
    /// replaced by then is gone for good. Reads from `oldest_read` on are still
    /// in flight.
    pub fn flush(&mut self, issued: Time, oldest_read: Time) {
        for cell in &mut self.cells {
            for candidate in &mut cell.candidates {
                candidate.gone |= candidate.replaced < issued;
            }
            cell.tidy(oldest_read);
        }
    }

    /// A read of `range`, handed in at `issued` and answered at `now`, showed
    /// `found`. Cells that nothing was writing to meanwhile must stay like that.
    pub fn read(
        &mut self,
        range: Cells,
        issued: Time,
        now: Time,
        found: &[u8],
    ) -> Result<(), Wrong> {
        // What a read saw before a rollback says nothing of what is there now.
        let is_now = issued > self.rolled_back;
        self.compare(
            range,
            found,
            |candidate| candidate.replaced >= issued,
            |cell, stamp| {
                if is_now
                    && cell
                        .candidates
                        .iter()
                        .all(|c| c.replaced < issued || c.answered < issued)
                {
                    cell.resolve(stamp, now);
                }
            },
        )
    }

    /// After a crash and recovery the whole view shows `found`.
    pub fn check_after(&mut self, crash: Crash, now: Time, found: &[u8]) -> Result<(), Wrong> {
        let all = self.all();
        match crash {
            Crash::Power => self.compare(
                all,
                found,
                |c| !c.gone,
                |cell, stamp| {
                    cell.settled = stamp;
                    cell.candidates.clear();
                },
            ),
            Crash::Kill => self.compare(
                all,
                found,
                |c| c.replaced == NEVER,
                |cell, stamp| {
                    cell.resolve(stamp, now);
                },
            ),
            Crash::KillAfterError => self.compare(
                all,
                found,
                |c| !c.gone,
                |cell, stamp| {
                    for candidate in cell.candidates.iter_mut().filter(|c| c.stamp == stamp) {
                        candidate.replaced = NEVER;
                    }
                    cell.resolve(stamp, now);
                },
            ),
        }
    }

    /// Close: everything answered is durable.
    pub fn close(&mut self, now: Time) {
        self.flush(now, NEVER);
    }

    /// The view of a snapshot that was taken just now: what was answered is in,
    /// what was not may be, but see [`ViewModel::part_in`]. `origin` are the
    /// origin's bytes at this moment.
    pub fn freeze(&self, now: Time, origin: &[u8]) -> Result<Self, Wrong> {
        let mut frozen = self.clone();
        for cell in &mut frozen.cells {
            cell.candidates.retain(|c| c.replaced == NEVER);
        }
        frozen.check_after(Crash::Power, now, origin)?;
        Ok(frozen)
    }

    /// From now on the view shows what `to` shows. Writes that are unanswered
    /// here happen after that; those of `to` never do. What was shown before is
    /// gone for good: the order is durable, and so is what `to` shows.
    pub fn roll_back(&mut self, to: &Self, now: Time) {
        self.rolled_back = now;
        for (cell, to) in self.cells.iter_mut().zip(&to.cells) {
            if cell.candidates.is_empty() {
                if to.candidates.is_empty() && cell.settled == to.settled {
                    continue;
                }
                cell.candidates.push(Candidate::settled(cell.settled));
            }
            for candidate in &mut cell.candidates {
                if candidate.answered != NEVER {
                    candidate.replaced = candidate.replaced.min(now);
                    candidate.gone = true;
                }
            }
            if to.candidates.is_empty() {
                cell.candidates.push(Candidate::settled(to.settled));
            }
            let shown = to.candidates.iter();
            let shown = shown.filter(|c| c.answered != NEVER && c.replaced == NEVER && !c.gone);
            cell.candidates.extend(shown.map(|c| Candidate {
                issued: 0,
                answered: 0,
                ..*c
            }));
        }
    }

    /// Nothing is known of this view any more but that it is what `to` is, where `to`
    /// reaches: a crash came between the order of a rollback and its beginning.
    pub fn take_over(&mut self, to: &Self) {
        self.cells[..to.cells.len()].clone_from_slice(&to.cells);
        self.rolled_back = to.rolled_back;
    }

    /// How much of an unanswered write the frozen view shows: a snapshot has all
    /// of it or nothing, but for what overlapping writes may have replaced.
    pub fn part_in(&self, frozen: &Self, range: Cells, stamp: Stamp, issued: Time) -> Part {
        let shows = |cell: &usize| frozen.cells[*cell].settled == stamp;
        let concurrent = |cell: &usize| {
            let shown = frozen.cells[*cell].settled;
            self.cells[*cell]
                .candidates
                .iter()
                .any(|c| c.stamp == shown && c.answered > issued)
        };
        let cells = range.from..range.to;
        match (
            cells.clone().any(|c| shows(&c)),
            cells.clone().all(|c| shows(&c) || concurrent(&c)),
        ) {
            (false, _) => Part::Nothing,
            (true, true) => Part::All,
            (true, false) => Part::Torn,
        }
    }

    /// The stamp of a cell that can hold one value only.
    pub fn settled(&self, cell: usize) -> Option<Stamp> {
        let cell = &self.cells[cell];
        cell.candidates.is_empty().then_some(cell.settled)
    }

    /// Whether a write to a cell of `range` is unanswered.
    pub fn is_being_written(&self, range: Cells) -> bool {
        self.cells[range.from..range.to]
            .iter()
            .any(|cell| cell.candidates.iter().any(|c| c.answered == NEVER))
    }

    /// Compare `found`, the bytes of `range`, cell by cell with the candidates
    /// that `may` lets through, and hand each cell and what it showed to `then`.
    fn compare(
        &mut self,
        range: Cells,
        found: &[u8],
        may: impl Fn(&Candidate) -> bool,
        then: impl Fn(&mut Cell, Stamp),
    ) -> Result<(), Wrong> {
        assert_eq!(
            range.len_bytes(),
            found.len() as u64,
            "a read of another length"
        );
        let start = range.offset();
        let mut at = range.from;
        while at < range.to {
            // Whole sectors of one settled value are compared at once.
            let run = self.settled_run(at, range.to);
            let (from, to) = (byte_of(at), byte_of(at + run.max(1)));
            let bytes = &found[(from - start) as usize..(to - start) as usize];
            let cell = &mut self.cells[at];
            if run > 0 {
                if !pattern::matches(cell.settled, from, bytes) {
                    return Err(self.wrong(at, run, start, found));
                }
                at += run;
                continue;
            }
            let shown = cell
                .candidates
                .iter()
                .find(|c| may(c) && pattern::matches(c.stamp, from, bytes))
                .map(|c| c.stamp);
            match shown {
                Some(stamp) => then(cell, stamp),
                None => return Err(self.wrong(at, 1, start, found)),
            }
            at += 1;
        }
        Ok(())
    }

    /// How many cells from `at` on are settled at the same stamp, up to a sector's end.
    fn settled_run(&self, at: usize, to: usize) -> usize {
        let end = to.min((at / CELLS + 1) * CELLS);
        let stamp = self.cells[at].settled;
        self.cells[at..end]
            .iter()
            .take_while(|c| c.candidates.is_empty() && c.settled == stamp)
            .count()
    }

    fn wrong(&self, at: usize, run: usize, start: u64, found: &[u8]) -> Wrong {
        let bytes = |cell: usize| {
            &found[(byte_of(cell) - start) as usize..(byte_of(cell + 1) - start) as usize]
        };
        let settled =
            |cell: usize| pattern::matches(self.cells[cell].settled, byte_of(cell), bytes(cell));
        let cell = (at..at + run)
            .find(|&cell| !self.cells[cell].candidates.is_empty() || !settled(cell))
            .unwrap_or(at);
        let candidates = &self.cells[cell].candidates;
        let allowed = if candidates.is_empty() {
            format!("stamp {} only", self.cells[cell].settled)
        } else {
            format!("{candidates:?}")
        };
        Wrong {
            cell,
            allowed,
            found: bytes(cell).iter().copied().take(16).collect(),
        }
    }
}

impl Candidate {
    fn settled(stamp: Stamp) -> Self {
        Self {
            stamp,
            issued: 0,
            answered: 0,
            weak: false,
            replaced: NEVER,
            gone: false,
        }
    }
}

impl Cell {
    /// The cell shows `stamp` and nothing is being written: so it stays.
    fn resolve(&mut self, stamp: Stamp, now: Time) {
        for candidate in &mut self.candidates {
            if candidate.stamp == stamp {
                candidate.answered = candidate.answered.min(now);
            } else {
                candidate.replaced = candidate.replaced.min(now);
                candidate.answered = candidate.answered.min(now);
            }
        }
    }

    /// Forget what neither a read in flight nor a crash can show any more.
    fn tidy(&mut self, oldest_read: Time) {
        self.candidates
            .retain(|c| !(c.gone && c.replaced < oldest_read));
        if let [only] = self.candidates[..]
            && only.answered != NEVER
            && only.replaced == NEVER
        {
            self.settled = only.stamp;
            self.candidates.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CELL: Cells = Cells { from: 0, to: 1 };

    /// A view of one cell that durably holds stamp 1.
    fn view() -> ViewModel {
        ViewModel::new(1, |_| 1)
    }

    fn shows(view: &ViewModel, crash: Crash, stamp: Stamp) -> bool {
        let found = pattern::bytes(stamp, CELL);
        view.clone().check_after(crash, 100, &found).is_ok()
    }

    fn reads(view: &mut ViewModel, issued: Time, now: Time, stamp: Stamp) -> bool {
        view.read(CELL, issued, now, &pattern::bytes(stamp, CELL))
            .is_ok()
    }

    #[test]
    fn an_answered_write_shows_at_once_and_survives_a_kill_but_no_power_cut() {
        let mut view = view();
        view.begin_write(CELL, 2, 10);
        assert!(shows(&view, Crash::Kill, 1) && shows(&view, Crash::Kill, 2));
        view.end_write(CELL, 10, 11, End::Done, true);
        assert!(!reads(&mut view.clone(), 12, 13, 1) && reads(&mut view, 12, 13, 2));
        assert!(!shows(&view, Crash::Kill, 1) && shows(&view, Crash::Kill, 2));
        assert!(shows(&view, Crash::Power, 1) && shows(&view, Crash::Power, 2));
    }

    #[test]
    fn a_flush_covers_what_was_answered_before_it_was_handed_in() {
        let mut view = view();
        view.begin_write(CELL, 2, 10);
        view.end_write(CELL, 10, 12, End::Done, true);
        view.flush(11, NEVER);
        assert!(
            shows(&view, Crash::Power, 1),
            "it was handed in before the answer"
        );
        view.flush(13, NEVER);
        assert!(!shows(&view, Crash::Power, 1));
        assert_eq!(view.settled(0), Some(2));
    }

    #[test]
    fn overlapping_writes_may_happen_in_either_order_but_stay() {
        let mut view = view();
        view.begin_write(CELL, 2, 10);
        view.begin_write(CELL, 3, 11);
        view.end_write(CELL, 10, 12, End::Durable, true);
        view.end_write(CELL, 11, 13, End::Done, true);
        assert!(!shows(&view, Crash::Power, 1));
        assert!(reads(&mut view.clone(), 14, 15, 3));
        assert!(reads(&mut view, 14, 15, 2));
        assert!(!reads(&mut view, 16, 17, 3), "it has shown the other");
    }

    #[test]
    fn a_read_may_show_what_was_there_at_any_moment_of_it() {
        let mut view = view();
        view.begin_write(CELL, 2, 10);
        view.end_write(CELL, 10, 12, End::Durable, true);
        assert!(reads(&mut view, 11, 13, 1) && reads(&mut view, 11, 13, 2));
        assert!(!reads(&mut view, 13, 14, 1));
    }

    #[test]
    fn a_view_that_is_rolled_back_shows_the_other_and_what_is_held() {
        let mut view = view();
        view.begin_write(CELL, 2, 10);
        view.end_write(CELL, 10, 11, End::Done, true);
        view.begin_write(CELL, 3, 12);
        let mut to = self::view();
        to.begin_write(CELL, 4, 13);
        to.end_write(CELL, 13, 14, End::Done, true);
        to.begin_write(CELL, 5, 14);
        view.roll_back(&to, 15);
        let may: Vec<_> = (1..6)
            .filter(|&s| reads(&mut view.clone(), 16, 17, s))
            .collect();
        assert_eq!(may, [3, 4]);
        assert!(reads(&mut view.clone(), 14, 17, 2), "it began before");
        assert!(!shows(&view, Crash::Power, 2) && shows(&view, Crash::Power, 4));
        view.end_write(CELL, 12, 18, End::Done, true);
        assert!(!reads(&mut view.clone(), 19, 20, 4) && reads(&mut view, 19, 20, 3));
    }

    #[test]
    fn what_failed_may_have_happened_and_what_was_refused_has_not() {
        let mut view = view();
        view.begin_write(CELL, 2, 10);
        view.begin_write(CELL, 3, 11);
        view.end_write(CELL, 10, 12, End::Failed, true);
        view.end_write(CELL, 11, 13, End::Refused, true);
        let may: Vec<_> = (1..4)
            .filter(|&s| reads(&mut view.clone(), 14, 15, s))
            .collect();
        assert_eq!(may, [1, 2]);
    }

    #[test]
    fn a_snapshot_is_durable_and_shows_no_part_of_a_write() {
        let mut view = ViewModel::new(2, |_| 1);
        let both = Cells { from: 0, to: 2 };
        view.begin_write(both, 2, 10);
        let torn = [
            pattern::bytes(2, CELL),
            pattern::bytes(1, Cells { from: 1, to: 2 }),
        ]
        .concat();
        let frozen = view.freeze(11, &torn).expect("each cell may show that");
        assert_eq!(view.part_in(&frozen, both, 2, 10), Part::Torn);
        let whole = view
            .freeze(11, &pattern::bytes(2, both))
            .expect("it may be in");
        assert_eq!(view.part_in(&whole, both, 2, 10), Part::All);
        assert_eq!(whole.settled(0), Some(2));
    }
}
