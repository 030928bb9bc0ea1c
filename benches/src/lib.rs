//! The load generator of nbdsnap: one thread, one NBD connection, many
//! requests in flight, sent and answered in batches, every reply checked.
//!
//! It is built to be faster than the servers it measures: a client that makes
//! one system call a request is itself the limit at a few hundred thousand
//! requests a second. Two programs stand on it: `nbdload` (one load against one
//! server that is running) and `peers` (the same loads against nbdsnap and
//! other servers, in alternating turns).
//!
//! | module | owns |
//! |---|---|
//! | [`connection`] | an export's socket: non-blocking reads and writes, polling before sleeping |
//! | [`plan`] | which block comes next: random, once each, sequential |
//! | [`content`] | what the bytes at an offset must be, and what is written there |
//! | [`replies`] | bytes in, finished requests out: parsing and checking |
//! | [`load`] | the loop that keeps the requests in flight, and its result |
//! | [`cpu`] | CPU times, of a process and of the machine |
//! | [`served`] | what the other programs share: their files, a server of their own |
//! | [`answerer`] | a server in memory: tests, and the generator's own ceiling |

pub mod answerer;
pub mod connection;
pub mod content;
pub mod cpu;
pub mod load;
pub mod plan;
pub mod replies;
pub mod served;

use std::io;

use nbdsnap::client::ClientError;

/// Why a load could not be run, or was stopped.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// No connection to the export could be had.
    #[error("{server}: {cause}")]
    Connect {
        /// The URI that was tried.
        server: String,
        /// Why.
        cause: ClientError,
    },
    /// The server did not hang up when it was told to.
    #[error("the end of the connection: {0}")]
    Goodbye(ClientError),
    /// The socket failed, or the server hung up.
    #[error("the connection broke with {in_flight} requests in flight: {cause}")]
    Connection {
        /// Requests without a reply.
        in_flight: usize,
        /// Why.
        cause: io::Error,
    },
    /// No reply for a long time.
    #[error("the server has not answered for {seconds} s; {in_flight} requests are in flight")]
    Silence {
        /// How long was waited.
        seconds: u64,
        /// Requests without a reply.
        in_flight: usize,
    },
    /// The server broke the protocol.
    #[error("not a reply that NBD allows here: {0}")]
    Protocol(String),
    /// The server answered a request with an error.
    #[error("the server answered {command} of {len} bytes at {offset} with error {error}")]
    Refused {
        /// The command.
        command: &'static str,
        /// Where.
        offset: u64,
        /// How long.
        len: u32,
        /// An NBD error number.
        error: u32,
    },
    /// A read returned other bytes than it had to.
    #[error("wrong data: the byte at {at} reads {got:#04x}, and has to be {expected:#04x}")]
    WrongData {
        /// Offset in the export of the first wrong byte.
        at: u64,
        /// What came.
        got: u8,
        /// What has to be there.
        expected: u8,
    },
    /// The load does not fit the export or itself.
    #[error("{0}")]
    Unsuitable(String),
    /// A file could not be used.
    #[error("{path}: {cause}")]
    File {
        /// Which.
        path: String,
        /// Why.
        cause: io::Error,
    },
}
