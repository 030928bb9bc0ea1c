//! Tables as values: what a line does and what it stands on, and the text that
//! dmsetup is given for it.

use std::fmt::Write as _;

/// What a line of a table stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum On {
    /// The disk `@a`, `@b`, ...
    Disk(char),
    /// A device, by its number in the model: names change.
    Device(u64),
}

/// How a store is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `P`.
    Persistent,
    /// `PO`.
    Overflow,
    /// `N`.
    Transient,
}

/// What a line of a table does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Reads as zeros.
    Zero,
    /// Fails.
    Error,
    /// A part of something.
    Linear {
        /// Of what.
        on: On,
        /// From which sector.
        start: u64,
    },
    /// Stripes over several.
    Striped {
        /// Sectors of a stripe's piece.
        chunk: u64,
        /// What, from which sector.
        on: Vec<(On, u64)>,
    },
    /// `snapshot-origin`.
    Origin {
        /// The origin.
        on: On,
    },
    /// `snapshot` or `snapshot-merge`.
    Snapshot(Snapshot),
}

/// A line of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// What it is of.
    pub origin: On,
    /// Where its old chunks go.
    pub cow: On,
    /// How its store is kept.
    pub kind: Kind,
    /// The word for that, which has more spellings than one.
    pub word: &'static str,
    /// Sectors in a chunk.
    pub chunk: u64,
    /// Whether it is merged into its origin.
    pub merge: bool,
}

/// A line of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Its sectors.
    pub len: u64,
    /// What they do.
    pub target: Target,
}

/// A table, from sector 0 on.
pub type Table = Vec<Line>;

/// Sectors of a table.
pub fn size(table: &[Line]) -> u64 {
    table.iter().map(|line| line.len).sum()
}

pub(super) fn snapshots(table: &[Line]) -> impl Iterator<Item = &Snapshot> {
    table.iter().filter_map(|line| match &line.target {
        Target::Snapshot(line) => Some(line),
        _ => None,
    })
}

pub(super) fn snapshots_mut(table: &mut Table) -> impl Iterator<Item = &mut Snapshot> {
    table.iter_mut().filter_map(|line| match &mut line.target {
        Target::Snapshot(line) => Some(line),
        _ => None,
    })
}

pub(super) fn stands_on(target: &Target) -> Vec<On> {
    match target {
        Target::Zero | Target::Error => Vec::new(),
        Target::Linear { on, .. } | Target::Origin { on } => vec![*on],
        Target::Striped { on, .. } => on.iter().map(|(on, _)| *on).collect(),
        Target::Snapshot(line) => vec![line.origin, line.cow],
    }
}

/// A table as text; `path` is what a device or a disk is called.
pub fn text(table: &[Line], path: impl Fn(On) -> String) -> String {
    let mut text = String::new();
    let mut start = 0;
    for Line { len, target } in table {
        let words = words(target, &path);
        let _ = writeln!(text, "{start} {len} {words}");
        start += len;
    }
    text.pop();
    text
}

fn words(target: &Target, path: impl Fn(On) -> String) -> String {
    match target {
        Target::Zero => "zero".to_owned(),
        Target::Error => "error".to_owned(),
        Target::Linear { on, start } => format!("linear {} {start}", path(*on)),
        Target::Striped { chunk, on } => {
            let parts = on.iter().fold(String::new(), |mut text, (on, start)| {
                let _ = write!(text, " {} {start}", path(*on));
                text
            });
            format!("striped {} {chunk}{parts}", on.len())
        }
        Target::Origin { on } => format!("snapshot-origin {}", path(*on)),
        Target::Snapshot(line) => {
            let target = if line.merge {
                "snapshot-merge"
            } else {
                "snapshot"
            };
            let (origin, cow) = (path(line.origin), path(line.cow));
            format!("{target} {origin} {cow} {} {}", line.word, line.chunk)
        }
    }
}

/// What each line needs of what it stands on: up to which sector.
pub(super) fn reaches(table: &[Line]) -> impl Iterator<Item = (On, u64)> {
    table.iter().flat_map(|Line { len, target }| match target {
        Target::Zero | Target::Error => Vec::new(),
        Target::Linear { on, start } => vec![(*on, start + len)],
        Target::Striped { on, .. } => {
            let width = len / on.len() as u64;
            on.iter().map(|(on, start)| (*on, start + width)).collect()
        }
        Target::Origin { on } => vec![(*on, *len)],
        Target::Snapshot(line) => vec![(line.origin, *len)],
    })
}
