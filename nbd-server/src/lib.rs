//! The NBD server of nbdsnap: the command line, what it opens, and what serves it.

pub mod cli;
pub mod client;
pub mod control;
pub mod cow;
pub mod disks;
pub mod dm;
pub mod io;
mod law;
pub mod names;
pub mod nbd;
pub mod server;
pub mod state;
