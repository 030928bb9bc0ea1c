//! A dump as JSON, one object:
//!
//! ```json
//! {"store":{"version":1,"valid":true,"chunk_sectors":8,"bytes":16777216},
//!  "runs":[{"old":100,"new":2,"chunks":16}],
//!  "stale":[{"area":0,"entry":32,"old":9,"new":19}]}
//! ```
//!
//! Fields are added, never renamed; `stale` may be left out.

use std::io::{self, Read, Write};

use nbdsnap_format::dump::{Dump, Line, Stale, StoreLine};
use nbdsnap_format::header::VERSION;
use nbdsnap_format::{ChunkSize, Header, Run, Slot};
use serde::{Deserialize, Serialize};

use super::Writer;

/// The header.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct StoreFields {
    /// Of the layout.
    pub version: u32,
    /// False where the snapshot is lost.
    pub valid: bool,
    /// Sectors in a chunk.
    pub chunk_sectors: u64,
    /// How long the store is.
    pub bytes: u64,
}

/// A run.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct RunFields {
    /// Its first origin chunk.
    pub old: u64,
    /// Its first store chunk.
    pub new: u64,
    /// How many; 1 where it is left out.
    #[serde(default = "one")]
    pub chunks: u64,
}

/// An entry that is no exception.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct StaleFields {
    /// Its area.
    pub area: u64,
    /// Its place there.
    pub entry: u64,
    /// Its old chunk.
    pub old: u64,
    /// Its new chunk.
    pub new: u64,
}

#[derive(Deserialize)]
struct Document {
    store: StoreFields,
    runs: Vec<RunFields>,
    #[serde(default)]
    stale: Vec<StaleFields>,
}

const fn one() -> u64 {
    1
}

impl From<StoreLine> for StoreFields {
    fn from(line: StoreLine) -> Self {
        Self {
            version: VERSION,
            valid: line.header.valid,
            chunk_sectors: line.header.chunk_size.sectors(),
            bytes: line.bytes,
        }
    }
}

impl TryFrom<StoreFields> for StoreLine {
    type Error = String;

    fn try_from(fields: StoreFields) -> Result<Self, String> {
        if fields.version != VERSION {
            return Err(format!(
                "version {}, where only version {VERSION} is known",
                fields.version
            ));
        }
        let chunk_size =
            ChunkSize::from_sectors(fields.chunk_sectors).map_err(|error| error.to_string())?;
        Ok(Self {
            header: Header {
                valid: fields.valid,
                chunk_size,
            },
            bytes: fields.bytes,
        })
    }
}

impl From<Run> for RunFields {
    fn from(run: Run) -> Self {
        Self {
            old: run.old.0,
            new: run.new.0,
            chunks: run.chunks,
        }
    }
}

impl TryFrom<RunFields> for Run {
    type Error = String;

    fn try_from(RunFields { old, new, chunks }: RunFields) -> Result<Self, String> {
        Self::from_numbers(old, new, chunks)
            .ok_or_else(|| format!("a run of {chunks} chunks from {old} -> {new}: there is none"))
    }
}

impl From<Stale> for StaleFields {
    fn from(stale: Stale) -> Self {
        Self {
            area: stale.at.area,
            entry: stale.at.index,
            old: stale.old,
            new: stale.new,
        }
    }
}

impl From<StaleFields> for Stale {
    fn from(fields: StaleFields) -> Self {
        Self {
            at: Slot {
                area: fields.area,
                index: fields.entry,
            },
            old: fields.old,
            new: fields.new,
        }
    }
}

/// Writes the object, a run a line.
#[derive(Debug)]
pub struct JsonWriter<W> {
    out: W,
    runs: u64,
    stale: u64,
}

impl<W: Write> JsonWriter<W> {
    /// To `out`.
    pub fn new(out: W) -> Self {
        Self {
            out,
            runs: 0,
            stale: 0,
        }
    }

    fn item(&mut self, is_first: bool, value: &impl Serialize) -> io::Result<()> {
        self.out
            .write_all(if is_first { b"\n  " } else { b",\n  " })?;
        serde_json::to_writer(&mut self.out, value).map_err(io::Error::from)
    }
}

impl<W: Write> Writer for JsonWriter<W> {
    fn line(&mut self, line: &Line) -> io::Result<()> {
        match line {
            Line::Store(store) => {
                self.out.write_all(b"{\"store\": ")?;
                serde_json::to_writer(&mut self.out, &StoreFields::from(*store))?;
                self.out.write_all(b",\n\"runs\": [")
            }
            Line::Run(run) => {
                self.runs += 1;
                self.item(self.runs == 1, &RunFields::from(*run))
            }
            Line::Stale(stale) => {
                self.stale += 1;
                if self.stale == 1 {
                    self.out.write_all(b"\n],\n\"stale\": [")?;
                }
                self.item(self.stale == 1, &StaleFields::from(*stale))
            }
            Line::End => self.out.write_all(b"\n]}\n"),
        }
    }
}

/// Read the object.
pub fn read(input: impl Read) -> Result<Dump, String> {
    let Document { store, runs, stale } =
        serde_json::from_reader(input).map_err(|error| error.to_string())?;
    Ok(Dump {
        store: store.try_into()?,
        runs: runs
            .into_iter()
            .map(Run::try_from)
            .collect::<Result<_, _>>()?,
        stale: stale.into_iter().map(Stale::from).collect(),
    })
}
