//! The persistent exception store of Linux's dm-snapshot, as pure bytes: no I/O,
//! no clock, nothing that another crate must be mocked for. The engine writes
//! and opens stores with it, the tools check them with it.
//!
//! # The layout
//!
//! A store is a row of chunks of one size, a power of two from 1 to 2^21
//! sectors of 512 bytes. All numbers are little-endian. With E exceptions in an
//! area (E = chunk bytes / 16):
//!
//! ```text
//! chunk     0        1        2  ...  E+1     E+2      E+3 ... 2E+2    2E+3
//!       +--------+--------+----------------+--------+----------------+--------+--
//!       | header | area 0 | data of area 0 | area 1 | data of area 1 | area 2 | ...
//!       +--------+--------+----------------+--------+----------------+--------+--
//!
//! header                                   area: E entries of 16 bytes
//!   0  u32  magic     "SnAp" 0x70416e53      0  u64  old_chunk   of the origin
//!   4  u32  valid     0: snapshot is lost    8  u64  new_chunk   of the store,
//!   8  u32  version   1                                          0: end of the list
//!  12  u32  chunk size in sectors
//!  16  zeros to the end of the chunk
//! ```
//!
//! Area n lies at chunk 1 + n * (E + 1). The list of exceptions runs through the
//! areas in their order and ends at the first entry whose new_chunk is 0. An
//! exception is usually described by the area before its data, but nothing
//! relies on that: new_chunk may be any data chunk of the store.
//!
//! # The rooms
//!
//! - [`units`]: sectors, chunk sizes and the two kinds of chunk, never mixable.
//! - [`header`]: the header.
//! - [`area`]: exceptions, and what may lie behind the end of the list.
//! - [`list`]: the list of exceptions through all areas, to be read.
//! - [`layout`]: where things lie, and how much fits.
//! - [`runs`]: exceptions that are neighbours on both devices, and changed ranges.
//! - [`dump`]: the metadata as text that a person can read and edit.
//! - [`build`]: the metadata of a store, to be written.
//! - [`check`](mod@check): what is wrong with a store.

#![forbid(unsafe_code)]

pub mod area;
pub mod build;
pub mod check;
pub mod dump;
pub mod header;
pub mod layout;
pub mod list;
pub mod runs;
pub mod units;

pub use area::{AreaDecoder, AreaEnd, Bounds, Exception, Exceptions, Misplaced, Tail};
pub use check::{Finding, Findings, Kernel, check};
pub use header::{Found, Header, HeaderError};
pub use layout::{Layout, Slot};
pub use list::{ListEnd, ListRead, ListReader, read_list};
pub use runs::{Run, Runs};
pub use units::{ChunkSize, ChunkSizeError, CowChunk, OriginChunk, SECTOR_BYTES};
