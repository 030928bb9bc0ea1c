//! The device-mapper front end beside the kernel's: the same steps on both, and
//! what each of them said.
//!
//! - [`step`]: dm commands and I/O, as values and as lines of text,
//! - [`table`]: tables as values and as text,
//! - [`model`]: which devices there are and how they stand on each other: enough to
//!   know which command succeeds and which I/O would wait for ever,
//! - [`layout`]: the disks, and what lies where on them,
//! - [`generate`]: steps from a seed, sensible ones and mistakes,
//! - `order`: what is a matter of order there, and how a sequence avoids it,
//! - [`procedures`]: what people do in several commands, now and then done wrong,
//! - [`bad`]: command lines that dmsetup refuses,
//! - [`play`]: plays steps, with dmsetup on the kernel's devices or with `nbdsnap dm`
//!   and NBD clients,
//! - [`words`]: what both print, with the numbers of devices in common words, and the
//!   first difference.

pub mod bad;
pub mod generate;
pub mod layout;
pub mod model;
mod order;
pub mod play;
pub mod procedures;
pub mod step;
pub mod table;
pub mod words;
