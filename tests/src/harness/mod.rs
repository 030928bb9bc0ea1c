//! What the black-box suites stand on: they run the program `nbdsnap` as a user
//! does, with real files, real sockets and real clients, and know nothing of
//! its inside.
//!
//! - [`program`]: where the program under test comes from,
//! - [`server`]: `nbdsnap serve` as a child that is always ended,
//! - [`process`]: any other command, with a bound on its time,
//! - [`store`]: COW stores put together byte by byte,
//! - [`blocks`]: disks whose blocks say which write was the last,
//! - [`wire`]: an NBD client for raw sockets, written from the specification,
//! - [`files`]: images, hashes, fingerprints of folders,
//! - [`fio`]: writes that check themselves,
//! - [`golden`]: the archives of stores that the kernel wrote,
//! - [`live`]: orders to a running server, and clients in this process,
//! - [`random`]: seeds that are printed and can be played again.
//!
//! Nothing here waits without a bound: a client or server that hangs is a
//! failure after [`PATIENCE`].

use std::time::Duration;

pub mod blocks;
pub mod files;
pub mod fio;
pub mod golden;
pub mod live;
pub mod process;
pub mod program;
pub mod random;
pub mod server;
pub mod store;
pub mod wire;

/// How long anything may take that takes well under a second on an idle machine.
pub const PATIENCE: Duration = Duration::from_mins(1);
