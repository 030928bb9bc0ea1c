//! A dump as XML, one element:
//!
//! ```xml
//! <cow version="1" valid="true" chunk_sectors="8" bytes="16777216">
//!   <run old="100" new="2" chunks="16"/>
//!   <stale area="0" entry="32" old="9" new="19"/>
//! </cow>
//! ```

use std::io::{self, BufRead, Write};

use nbdsnap_format::Run;
use nbdsnap_format::dump::{Dump, Line, StoreLine};
use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

use super::Writer;
use super::json::{RunFields, StaleFields, StoreFields};

/// Writes the element, a run a line.
#[derive(Debug)]
pub struct XmlWriter<W>(pub W);

impl<W: Write> Writer for XmlWriter<W> {
    fn line(&mut self, line: &Line) -> io::Result<()> {
        let out = &mut self.0;
        match line {
            Line::Store(store) => {
                let StoreFields {
                    version,
                    valid,
                    chunk_sectors,
                    bytes,
                } = (*store).into();
                writeln!(
                    out,
                    "<cow version=\"{version}\" valid=\"{valid}\" chunk_sectors=\"{chunk_sectors}\" bytes=\"{bytes}\">"
                )
            }
            Line::Run(run) => {
                let RunFields { old, new, chunks } = (*run).into();
                writeln!(
                    out,
                    "  <run old=\"{old}\" new=\"{new}\" chunks=\"{chunks}\"/>"
                )
            }
            Line::Stale(stale) => {
                let StaleFields {
                    area,
                    entry,
                    old,
                    new,
                } = (*stale).into();
                writeln!(
                    out,
                    "  <stale area=\"{area}\" entry=\"{entry}\" old=\"{old}\" new=\"{new}\"/>"
                )
            }
            Line::End => writeln!(out, "</cow>"),
        }
    }
}

/// Read the element.
pub fn read(input: impl BufRead) -> Result<Dump, String> {
    let mut reader = Reader::from_reader(input);
    let mut buffer = Vec::new();
    let mut store: Option<StoreLine> = None;
    let (mut runs, mut stale, mut ended) = (Vec::new(), Vec::new(), false);
    loop {
        buffer.clear();
        let event = reader
            .read_event_into(&mut buffer)
            .map_err(|error| format!("at byte {}: {error}", reader.error_position()))?;
        match event {
            Event::Start(element) if element.name().as_ref() == "cow" && store.is_none() => {
                store = Some(store_fields(&element)?.try_into()?);
            }
            Event::Empty(element) if element.name().as_ref() == "run" && store.is_some() => {
                let chunks = optional(&element, "chunks")?.unwrap_or(1);
                let run = RunFields {
                    old: number(&element, "old")?,
                    new: number(&element, "new")?,
                    chunks,
                };
                runs.push(Run::try_from(run)?);
            }
            Event::Empty(element) if element.name().as_ref() == "stale" && store.is_some() => {
                stale.push(
                    StaleFields {
                        area: number(&element, "area")?,
                        entry: number(&element, "entry")?,
                        old: number(&element, "old")?,
                        new: number(&element, "new")?,
                    }
                    .into(),
                );
            }
            Event::End(element) if element.name().as_ref() == "cow" => ended = true,
            Event::Eof => break,
            Event::Start(element) | Event::Empty(element) => {
                return Err(format!(
                    "at byte {}: <{}> cannot be here: there are one <cow>, and in it <run/>s and <stale/>s",
                    reader.buffer_position(),
                    element.name().as_ref().escape_debug()
                ));
            }
            // Comments, declarations, blanks.
            _ => {}
        }
    }
    match store {
        Some(store) if ended => Ok(Dump { store, runs, stale }),
        _ => Err("no whole <cow> element: the text was cut off".to_owned()),
    }
}

fn store_fields(element: &BytesStart<'_>) -> Result<StoreFields, String> {
    let valid = match attribute(element, "valid")?.as_deref() {
        Some("true" | "1") => true,
        Some("false" | "0") => false,
        _ => return Err("<cow>: valid is missing, or neither true nor false".to_owned()),
    };
    Ok(StoreFields {
        version: u32::try_from(number(element, "version")?).unwrap_or(u32::MAX),
        valid,
        chunk_sectors: number(element, "chunk_sectors")?,
        bytes: number(element, "bytes")?,
    })
}

fn attribute(element: &BytesStart<'_>, name: &str) -> Result<Option<String>, String> {
    let found = element
        .try_get_attribute(name)
        .map_err(|error| error.to_string())?;
    Ok(found.map(|attribute| attribute.value.into_owned()))
}

fn optional(element: &BytesStart<'_>, name: &str) -> Result<Option<u64>, String> {
    let of = || element.name().as_ref().to_owned();
    attribute(element, name)?
        .map(|text| {
            text.parse()
                .map_err(|_| format!("<{}>: {name} is no number", of()))
        })
        .transpose()
}

fn number(element: &BytesStart<'_>, name: &str) -> Result<u64, String> {
    optional(element, name)?
        .ok_or_else(|| format!("<{}>: {name} is missing", element.name().as_ref()))
}
