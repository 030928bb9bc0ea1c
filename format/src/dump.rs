//! The metadata of a store as text, which a person can read and edit, and from which
//! the same bytes can be made again. The words:
//!
//! ```text
//! # A comment, to the end of the line. Empty lines mean nothing.
//! store version=1 valid=1 chunk_sectors=8 bytes=16777216
//! run 100 -> 2 x16
//! run 7 -> 18
//! stale 0/32: 9 -> 19
//! end
//! ```
//!
//! - `store` comes first: the header's fields, and the length of the store.
//! - `run OLD -> NEW xCOUNT`: COUNT exceptions, origin chunk OLD + n at store chunk
//!   NEW + n; without `xCOUNT` it is one. They are in the order of the store's list.
//! - `stale AREA/ENTRY: OLD -> NEW`: an entry behind the end of the list, in the area
//!   in which it ends: what a torn write or damage left. It is no exception. Leave
//!   such lines out to be rid of the entries.
//! - `end` comes last, so that a text that was cut off is noticed.
//!
//! The rest of the header's chunk is zeros in a store and is not in the text, nor is
//! the data.

use std::fmt;

use crate::area::{Bounds, Exception, Misplaced};
use crate::header::{Header, VERSION};
use crate::layout::Slot;
use crate::runs::Run;
use crate::units::{ChunkSize, ChunkSizeError, CowChunk};

/// What a dump says of the store as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreLine {
    /// The header.
    pub header: Header,
    /// How long the store is.
    pub bytes: u64,
}

/// An entry behind the end of the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stale {
    /// Where it lies.
    pub at: Slot,
    /// Its old chunk.
    pub old: u64,
    /// Its new chunk; may be 0.
    pub new: u64,
}

/// One line of a dump. Display gives it without the newline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// The first.
    Store(StoreLine),
    /// Exceptions.
    Run(Run),
    /// An entry that is none.
    Stale(Stale),
    /// The last.
    End,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Store(StoreLine { header, bytes }) => write!(
                f,
                "store version={VERSION} valid={} chunk_sectors={} bytes={bytes}",
                u8::from(header.valid),
                header.chunk_size.sectors()
            ),
            Self::Run(Run { old, new, chunks }) => {
                write!(f, "run {old} -> {new}")?;
                if *chunks > 1 {
                    write!(f, " x{chunks}")?;
                }
                Ok(())
            }
            Self::Stale(Stale { at, old, new }) => {
                write!(f, "stale {}/{}: {old} -> {new}", at.area, at.index)
            }
            Self::End => f.write_str("end"),
        }
    }
}

/// A whole dump.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dump {
    /// The store.
    pub store: StoreLine,
    /// Its exceptions, in the order of their list.
    pub runs: Vec<Run>,
    /// What lies behind it, in its order.
    pub stale: Vec<Stale>,
}

/// Why no snapshot can have a store like that of a dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Contradiction {
    /// A run that points where none can.
    #[error("'{}': {}", Line::Run(*.run), .why.why())]
    Misplaced {
        /// The run.
        run: Run,
        /// What is wrong with it.
        why: Misplaced,
    },
    /// Two exceptions for one origin chunk.
    #[error("'{}' and '{}' have an origin chunk in common", Line::Run(*.first), Line::Run(*.second))]
    SameOriginChunk {
        /// One of them.
        first: Run,
        /// The other.
        second: Run,
    },
    /// Two exceptions with one place.
    #[error("'{}' and '{}' have a store chunk in common", Line::Run(*.first), Line::Run(*.second))]
    SameStoreChunk {
        /// One of them.
        first: Run,
        /// The other.
        second: Run,
    },
    /// Something behind the end of the list.
    #[error("'{}': an entry behind the end of the list", Line::Stale(*.0))]
    Stale(Stale),
}

impl Dump {
    /// What keeps its store, with a length of `store_bytes`, from being sound; nothing
    /// if all is well.
    pub fn contradiction(&self, store_bytes: u64) -> Option<Contradiction> {
        let bounds = Bounds::new(self.store.header.chunk_size, store_bytes, None);
        let misplaced = self
            .runs
            .iter()
            .find_map(|&run| Some((run, misplaced(bounds, run)?)));
        if let Some((run, why)) = misplaced {
            return Some(Contradiction::Misplaced { run, why });
        }
        let mut runs = self.runs.clone();
        runs.sort_unstable_by_key(|run| run.old);
        let shared = |pair: &&[Run]| pair[1].old.0 - pair[0].old.0 < pair[0].chunks;
        if let Some(pair) = runs.windows(2).find(shared) {
            let (first, second) = (pair[0], pair[1]);
            return Some(Contradiction::SameOriginChunk { first, second });
        }
        runs.sort_unstable_by_key(|run| run.new);
        let shared = |pair: &&[Run]| pair[1].new.0 - pair[0].new.0 < pair[0].chunks;
        if let Some(pair) = runs.windows(2).find(shared) {
            let (first, second) = (pair[0], pair[1]);
            return Some(Contradiction::SameStoreChunk { first, second });
        }
        self.stale.first().copied().map(Contradiction::Stale)
    }
}

/// Why not all of a run can be where it points.
fn misplaced(bounds: Bounds, run: Run) -> Option<Misplaced> {
    let end = CowChunk(run.new.0.saturating_add(run.chunks));
    let last = Exception {
        old: run.old,
        new: CowChunk(end.0 - 1),
    };
    if let Some(why @ Misplaced::OutsideStore) = bounds.misplaced(last) {
        return Some(why);
    }
    let layout = bounds.layout();
    let data = layout.data_chunks_before(end) - layout.data_chunks_before(run.new);
    (data != run.chunks).then_some(Misplaced::OnMetadata)
}

/// Why a text is no dump.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DumpError {
    /// A line that is not understood.
    #[error(
        "line {line}: '{text}' is none of 'store ...', 'run OLD -> NEW xCOUNT', 'stale AREA/ENTRY: OLD -> NEW' and 'end'"
    )]
    NoSuchLine {
        /// Counted from 1.
        line: u64,
        /// What it says, cut to a length that can be read.
        text: String,
    },
    /// A field of the first line.
    #[error("line {line}: {field}= is missing, or no number that it can be")]
    Field {
        /// Counted from 1.
        line: u64,
        /// Its name.
        field: &'static str,
    },
    /// A chunk size that no store has.
    #[error("line {line}: {error}")]
    ChunkSize {
        /// Counted from 1.
        line: u64,
        /// What is wrong with it.
        error: ChunkSizeError,
    },
    /// A line where it cannot be.
    #[error(
        "line {line}: '{what}' cannot be here: 'store' comes first and once, then 'run's, then 'stale's, then 'end'"
    )]
    Misplaced {
        /// Counted from 1.
        line: u64,
        /// The line's word.
        what: &'static str,
    },
    /// No end.
    #[error("the text has no line 'end': it was cut off")]
    CutOff,
}

/// Reads a dump, line by line: [`push`](Self::push) each, then
/// [`finish`](Self::finish).
#[derive(Clone, Debug, Default)]
pub struct DumpReader {
    line: u64,
    store: Option<StoreLine>,
    runs: Vec<Run>,
    stale: Vec<Stale>,
    ended: bool,
}

impl DumpReader {
    /// Before the first line.
    pub fn new() -> Self {
        Self::default()
    }

    /// The next line, without its newline.
    pub fn push(&mut self, text: &str) -> Result<(), DumpError> {
        self.line += 1;
        let text = text.split('#').next().unwrap_or_default().trim();
        if text.is_empty() {
            return Ok(());
        }
        let line = self.parse(text)?;
        let (fits, what) = match line {
            Line::Store(_) => (self.store.is_none(), "store"),
            Line::Run(_) => (self.store.is_some() && self.stale.is_empty(), "run"),
            Line::Stale(_) => (self.store.is_some(), "stale"),
            Line::End => (self.store.is_some(), "end"),
        };
        if !fits || self.ended {
            let line = self.line;
            return Err(DumpError::Misplaced { line, what });
        }
        match line {
            Line::Store(store) => self.store = Some(store),
            Line::Run(run) => self.runs.push(run),
            Line::Stale(stale) => self.stale.push(stale),
            Line::End => self.ended = true,
        }
        Ok(())
    }

    /// All that was pushed.
    pub fn finish(self) -> Result<Dump, DumpError> {
        match self.store {
            Some(store) if self.ended => Ok(Dump {
                store,
                runs: self.runs,
                stale: self.stale,
            }),
            _ => Err(DumpError::CutOff),
        }
    }

    fn parse(&self, text: &str) -> Result<Line, DumpError> {
        let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
        let rest = rest.trim();
        let line = match word {
            "store" => return self.parse_store(rest).map(Line::Store),
            "run" => parse_run(rest).map(Line::Run),
            "stale" => parse_stale(rest).map(Line::Stale),
            "end" if rest.is_empty() => Some(Line::End),
            _ => None,
        };
        line.ok_or_else(|| DumpError::NoSuchLine {
            line: self.line,
            text: text.chars().filter(|c| !c.is_control()).take(60).collect(),
        })
    }

    fn parse_store(&self, fields: &str) -> Result<StoreLine, DumpError> {
        let line = self.line;
        let field = |name: &'static str| {
            fields
                .split_whitespace()
                .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
                .and_then(|number| number.parse::<u64>().ok())
                .ok_or(DumpError::Field { line, field: name })
        };
        if field("version")? != VERSION.into() {
            return Err(DumpError::Field {
                line,
                field: "version",
            });
        }
        let valid = match field("valid")? {
            0 => false,
            1 => true,
            _ => {
                return Err(DumpError::Field {
                    line,
                    field: "valid",
                });
            }
        };
        let chunk_size = ChunkSize::from_sectors(field("chunk_sectors")?)
            .map_err(|error| DumpError::ChunkSize { line, error })?;
        Ok(StoreLine {
            header: Header { valid, chunk_size },
            bytes: field("bytes")?,
        })
    }
}

/// `OLD -> NEW`, and what follows.
fn parse_arrow(text: &str) -> Option<(u64, u64, &str)> {
    let (old, rest) = text.split_once("->")?;
    let rest = rest.trim_start();
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    let (new, rest) = rest.split_at(digits);
    Some((old.trim().parse().ok()?, new.parse().ok()?, rest.trim()))
}

fn parse_run(text: &str) -> Option<Run> {
    let (old, new, rest) = parse_arrow(text)?;
    let chunks = match rest {
        "" => 1,
        _ => rest.strip_prefix('x')?.parse().ok()?,
    };
    Run::from_numbers(old, new, chunks)
}

fn parse_stale(text: &str) -> Option<Stale> {
    let (at, arrow) = text.split_once(':')?;
    let (area, index) = at.split_once('/')?;
    let (old, new, rest) = parse_arrow(arrow)?;
    let at = Slot {
        area: area.trim().parse().ok()?,
        index: index.trim().parse().ok()?,
    };
    rest.is_empty().then_some(Stale { at, old, new })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Dump, DumpError> {
        let mut reader = DumpReader::new();
        for line in text.lines() {
            reader.push(line)?;
        }
        reader.finish()
    }

    #[test]
    fn the_largest_numbers_are_read() {
        let store = "store version=1 valid=1 chunk_sectors=8 bytes=4096";
        let run = format!("run {0} -> {0}", u64::MAX);
        let dump = read(&format!("{store}\n{run}\nend")).unwrap();
        assert_eq!(Line::Run(dump.runs[0]).to_string(), run);
        assert!(dump.contradiction(4096).is_some());
    }

    const TEXT: &str = "\
# a comment
store version=1 valid=1 chunk_sectors=8 bytes=16777216
run 100 -> 2 x16

run 7->18  # another
stale 0/32: 9 -> 0
end
";

    #[test]
    fn what_was_written_is_read() {
        let dump = read(TEXT).unwrap();
        assert_eq!(dump.store.bytes, 16 << 20);
        let lines: Vec<String> = [Line::Store(dump.store)]
            .into_iter()
            .chain(dump.runs.iter().copied().map(Line::Run))
            .chain(dump.stale.iter().copied().map(Line::Stale))
            .chain([Line::End])
            .map(|line| line.to_string())
            .collect();
        assert_eq!(
            lines,
            [
                "store version=1 valid=1 chunk_sectors=8 bytes=16777216",
                "run 100 -> 2 x16",
                "run 7 -> 18",
                "stale 0/32: 9 -> 0",
                "end",
            ]
        );
        assert_eq!(read(&lines.join("\n")), Ok(dump));
    }

    #[test]
    fn what_is_no_dump_is_refused_with_its_line() {
        let store = "store version=1 valid=1 chunk_sectors=8 bytes=4096\n";
        for (text, message) in [
            ("", "the text has no line 'end': it was cut off"),
            (store, "the text has no line 'end': it was cut off"),
            (
                "end",
                "line 1: 'end' cannot be here: 'store' comes first and once, then 'run's, then 'stale's, then 'end'",
            ),
            (
                "\nrun 1 -> 2",
                "line 2: 'run' cannot be here: 'store' comes first and once, then 'run's, then 'stale's, then 'end'",
            ),
            (
                "store version=2 valid=1",
                "line 1: version= is missing, or no number that it can be",
            ),
            (
                "store version=1 valid=7",
                "line 1: valid= is missing, or no number that it can be",
            ),
            (
                "store version=1 valid=1 chunk_sectors=3",
                "line 1: chunk size of 3 sectors is not a power of two",
            ),
            (
                "store version=1 valid=1 chunk_sectors=8",
                "line 1: bytes= is missing, or no number that it can be",
            ),
        ] {
            assert_eq!(read(text).unwrap_err().to_string(), message, "{text:?}");
        }
        for line in [
            "run 1 -> 0",
            "run 1 -> 2 x0",
            "run 1 2",
            "run 18446744073709551615 -> 2 x2",
            "run -1 -> 2",
            "stale 1 -> 2",
            "stale 0/1: 1 -> 2 x3",
            "end of it",
            "hello",
        ] {
            let error = read(&format!("{store}{line}\nend")).unwrap_err();
            let text = line.to_owned();
            assert_eq!(error, DumpError::NoSuchLine { line: 2, text });
        }
    }

    #[test]
    fn what_no_snapshot_can_have_is_found() {
        // 32 exceptions an area: chunks 1, 34, 67 are areas.
        let verdict = |lines: &str| {
            let text = format!("store version=1 valid=1 chunk_sectors=1 bytes=51200\n{lines}\nend");
            let dump = read(&text).unwrap();
            dump.contradiction(dump.store.bytes)
                .map(|found| found.to_string())
        };
        for sound in [
            "",
            "run 0 -> 2 x32",
            "run 9 -> 40\nrun 3 -> 35 x5\nrun 8 -> 41",
        ] {
            assert_eq!(verdict(sound), None, "{sound}");
        }
        for (lines, found) in [
            (
                "run 0 -> 2 x33",
                "'run 0 -> 2 x33': its data would lie on the store's own metadata: the store is damaged",
            ),
            (
                "run 0 -> 1",
                "'run 0 -> 1': its data would lie on the store's own metadata: the store is damaged",
            ),
            (
                "run 0 -> 98 x3",
                "'run 0 -> 98 x3': its data would lie outside the store: the store was cut off, or is damaged",
            ),
            (
                "run 5 -> 2 x4\nrun 8 -> 10",
                "'run 5 -> 2 x4' and 'run 8 -> 10' have an origin chunk in common",
            ),
            (
                "run 5 -> 10 x4\nrun 80 -> 13",
                "'run 5 -> 10 x4' and 'run 80 -> 13' have a store chunk in common",
            ),
            (
                "run 5 -> 2\nstale 0/2: 1 -> 3",
                "'stale 0/2: 1 -> 3': an entry behind the end of the list",
            ),
        ] {
            assert_eq!(verdict(lines).as_deref(), Some(found));
        }
    }
}
