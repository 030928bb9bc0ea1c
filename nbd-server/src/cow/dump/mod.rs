//! `cow dump`: a store's metadata as text, JSON or XML. Text is `format`'s own
//! ([`nbdsnap_format::dump`]); [`json`] and [`xml`] say the same in other words. All
//! three are written as the store is read, a run at a time; [`read`] tells them apart
//! by their first character.

pub mod json;
pub mod xml;

use std::io::{self, BufRead, Write};
use std::path::Path;

use nbdsnap_format::dump::{Dump, DumpReader, Line, Stale, StoreLine};
use nbdsnap_format::{Exception, ListEnd, Run, SECTOR_BYTES};

use super::{CowError, CowStore};

/// How a dump is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// A line for each run, to be read and edited by people.
    Text,
    /// One object.
    Json,
    /// One element.
    Xml,
}

/// Writes the lines of a dump in some format.
pub trait Writer {
    /// The next.
    fn line(&mut self, line: &Line) -> io::Result<()>;
}

/// As text.
#[derive(Debug)]
pub struct TextWriter<W>(pub W);

impl<W: Write> Writer for TextWriter<W> {
    fn line(&mut self, line: &Line) -> io::Result<()> {
        if matches!(line, Line::Store(_)) {
            self.0.write_all(HEAD.as_bytes())?;
        }
        writeln!(self.0, "{line}")
    }
}

/// What a text begins with.
const HEAD: &str = "\
# The metadata of a COW store; 'nbdsnap cow restore' makes a store of it again.
# run OLD -> NEW xCOUNT: origin chunk OLD lies at store chunk NEW, and so on COUNT times.
";

/// Write the metadata of `store` to `out`.
pub fn run(store: &CowStore, format: Format, out: impl Write) -> Result<(), CowError> {
    match format {
        Format::Text => write(store, &mut TextWriter(out)),
        Format::Json => write(store, &mut json::JsonWriter::new(out)),
        Format::Xml => write(store, &mut xml::XmlWriter(out)),
    }
}

fn write(store: &CowStore, writer: &mut dyn Writer) -> Result<(), CowError> {
    let mut failed = None;
    let mut put = |line: Line| {
        if failed.is_none()
            && let Err(error) = writer.line(&line)
        {
            failed = Some(CowError::output(error));
        }
        failed.is_none()
    };
    put(Line::Store(StoreLine {
        header: store.header,
        bytes: store.bytes(),
    }));
    let mut run: Option<Run> = None;
    let end = store.for_each(|_, exception| match &mut run {
        Some(run) if run.continues_with(exception) => run.chunks += 1,
        _ => {
            if let Some(whole) = run.replace(Run::of(exception)) {
                put(Line::Run(whole));
            }
        }
    })?;
    if let Some(last) = run {
        put(Line::Run(last));
    }
    for_each_stale(store, end, |stale| put(Line::Stale(stale)))?;
    put(Line::End);
    match failed {
        None => Ok(()),
        Some(error) => Err(error),
    }
}

/// Tell `each` of every entry behind the end of the list, in its area, that is not
/// zeros; until it says no.
pub fn for_each_stale(
    store: &CowStore,
    end: ListEnd,
    mut each: impl FnMut(Stale) -> bool,
) -> Result<(), CowError> {
    const PIECE: u64 = 1 << 20;
    let ListEnd::InArea { area, entries, .. } = end else {
        return Ok(());
    };
    let layout = store.layout();
    let area_end = layout.area_offset(area) + layout.chunk_size().bytes();
    // From the sector on in which the list ends.
    let mut at = layout.area_offset(area) + entries * 16 / SECTOR_BYTES * SECTOR_BYTES;
    let mut buffer = vec![0; PIECE.min(area_end - at) as usize];
    while at < area_end {
        let piece = &mut buffer[..PIECE.min(area_end - at) as usize];
        store.read(at, piece)?;
        let first = (at - layout.area_offset(area)) / 16;
        for (index, entry) in (first..).zip(piece.as_chunks::<16>().0) {
            let (old, new) = entry.split_at(8);
            let number = |bytes: &[u8]| {
                bytes
                    .iter()
                    .rev()
                    .fold(0, |number, byte| number << 8 | u64::from(*byte))
            };
            let (old, new) = (number(old), number(new));
            let at = nbdsnap_format::Slot { area, index };
            let is_stale = index >= entries && (old, new) != (0, 0);
            if is_stale && !each(Stale { at, old, new }) {
                return Ok(());
            }
        }
        at += piece.len() as u64;
    }
    Ok(())
}

/// Read a dump in any of the formats. `path` is for messages.
pub fn read(mut input: impl BufRead, path: &Path) -> Result<Dump, CowError> {
    let unreadable = |error: io::Error| CowError::Markup {
        path: path.to_owned(),
        error: error.to_string(),
    };
    let first = input
        .fill_buf()
        .map_err(unreadable)?
        .iter()
        .find(|byte| !byte.is_ascii_whitespace())
        .copied();
    let markup = |error| CowError::Markup {
        path: path.to_owned(),
        error,
    };
    match first {
        Some(b'{') => json::read(input).map_err(markup),
        Some(b'<') => xml::read(input).map_err(markup),
        _ => read_text(input, path),
    }
}

fn read_text(input: impl BufRead, path: &Path) -> Result<Dump, CowError> {
    let wrong = |error| CowError::Dump {
        path: path.to_owned(),
        error,
    };
    let mut reader = DumpReader::new();
    for line in input.lines() {
        let line = line.map_err(|error| CowError::Markup {
            path: path.to_owned(),
            error: error.to_string(),
        })?;
        reader.push(&line).map_err(wrong)?;
    }
    reader.finish().map_err(wrong)
}

/// The exceptions of a dump.
pub fn exceptions(dump: &Dump) -> impl Iterator<Item = Exception> + '_ {
    dump.runs.iter().flat_map(|run| run.exceptions())
}
