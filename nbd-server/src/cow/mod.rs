//! The offline tools: work on COW stores that no server has open. One file a verb;
//! the command line in `cli/cow` says what was asked for and prints the answers.
//!
//! - [`open`]: a store, opened, locked and decoded; every read of it goes through
//!   there. Positioned reads, not a memory map: a store that is cut off while it is
//!   being read (`--force-read`) is an error then, where a map would be the end of
//!   the process (SIGBUS). And a map is not quicker: going through the areas of
//!   5 million exceptions (76 MiB, far apart, in the page cache) took 0.03 to 0.04 s of
//!   CPU time with a `pread` an area, and 0.05 to 0.07 s with a map, whose pages fault.
//! - [`view`]: a snapshot's bytes, out of its store and its origin.
//! - [`target`]: files and stores that are made: the metadata in an order that a power
//!   cut cannot make a wrong store of.
//! - `hints`: what the kernel is told ahead of time, for speed.
//! - [`check`], [`inspect`], [`ranges`], [`picture`], [`dump`] read; [`restore`],
//!   [`repair`], [`rewrite`], [`extract`] and [`merge`] write what they are told to,
//!   and nothing else.
//!
//! Memory: the areas are streamed. Who needs the exceptions in the origin's order
//! sorts them in an array of 16 bytes each; `check` has 8 for each.

pub mod check;
pub mod diff;
pub mod dump;
pub mod error;
pub mod extract;
mod hints;
pub mod inspect;
pub mod merge;
pub mod open;
pub mod picture;
pub mod ranges;
pub mod repair;
pub mod restore;
pub mod rewrite;
pub mod target;
pub mod view;

pub use error::CowError;
pub use open::{CowStore, Reading};
