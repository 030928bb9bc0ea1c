//! Orders to a running server: what can be said on its control socket, and both
//! ends of saying it.
//!
//! The control socket is a Unix socket of mode 0600. A client sends one JSON
//! object a line ([`protocol::Request`]) and gets one line for it
//! ([`protocol::Response`]); then it may send the next. Followers of events get
//! line after line. Bounds: a line has at most [`LINE_MAX`] bytes, a client that
//! says nothing for [`SILENCE`] is dropped, and so are those beyond
//! [`CLIENTS_MAX`]. What cannot be read is answered with one line that says why,
//! and the connection ends.
//!
//! - [`protocol`]: the words. They are also what `--json` prints.
//! - [`dm`]: those of mapped devices, in the device-mapper's terms.
//! - [`door`]: the server's end; hands orders to the administrator.
//! - [`client`]: a blocking client, for the command line.

pub mod client;
pub mod dm;
pub mod door;
pub mod protocol;
mod reports;

use std::path::PathBuf;
use std::time::Duration;

/// Bytes that a line may have, its end included: a few thousand volumes are added by
/// one order.
pub const LINE_MAX: usize = 1 << 20;
/// A client that has said nothing for so long is dropped.
pub const SILENCE: Duration = Duration::from_secs(30);
/// Connections at once.
pub const CLIENTS_MAX: usize = 64;

/// Where the control socket is unless `--control` says otherwise: in the runtime
/// folder of the user, or of the system for root.
pub fn default_path() -> Option<PathBuf> {
    const NAME: &str = "nbdsnap.control";
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(folder) if !folder.is_empty() => Some(PathBuf::from(folder).join(NAME)),
        _ if rustix::process::geteuid().is_root() => Some(PathBuf::from("/run").join(NAME)),
        _ => None,
    }
}
