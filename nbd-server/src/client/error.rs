//! What can go wrong for a client.

use std::io;

use crate::nbd::uri::UriError;
use crate::nbd::wire::{
    NBD_EINVAL, NBD_EIO, NBD_ENOMEM, NBD_ENOSPC, NBD_ENOTSUP, NBD_EOVERFLOW, NBD_EPERM,
    NBD_ESHUTDOWN,
};

/// A request that the server refused or failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdError {
    /// `NBD_E*`.
    pub errno: u32,
    /// The server's explanation, where it gave one.
    pub message: String,
}

impl NbdError {
    /// The specification's name of the error, or `unknown`.
    pub fn name(&self) -> &'static str {
        match self.errno {
            NBD_EPERM => "EPERM",
            NBD_EIO => "EIO",
            NBD_ENOMEM => "ENOMEM",
            NBD_EINVAL => "EINVAL",
            NBD_ENOSPC => "ENOSPC",
            NBD_EOVERFLOW => "EOVERFLOW",
            NBD_ENOTSUP => "ENOTSUP",
            NBD_ESHUTDOWN => "ESHUTDOWN",
            _ => "unknown",
        }
    }
}

impl std::fmt::Display for NbdError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the server answered {} ({})", self.name(), self.errno)?;
        if !self.message.is_empty() {
            write!(f, ": {}", self.message)?;
        }
        Ok(())
    }
}

impl std::error::Error for NbdError {}

/// Why a client could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The socket failed.
    #[error("connection to the server: {0}")]
    Io(#[from] io::Error),
    /// The server hung up in the middle.
    #[error("the server closed the connection")]
    Closed,
    /// The server broke the protocol.
    #[error("the server broke the NBD protocol: {0}")]
    Protocol(String),
    /// The server refused an option of the handshake.
    #[error("the server refused option {option} with error {kind:#x}: {message}")]
    Refused {
        /// `NBD_OPT_*`.
        option: u32,
        /// `NBD_REP_ERR_*`.
        kind: u32,
        /// The server's explanation.
        message: String,
    },
    /// The server failed a request; the connection goes on.
    #[error(transparent)]
    Request(#[from] NbdError),
    /// Not a URI.
    #[error(transparent)]
    Uri(#[from] UriError),
}

impl ClientError {
    /// The `NBD_E*` of a failed request.
    pub fn errno(&self) -> Option<u32> {
        match self {
            Self::Request(error) => Some(error.errno),
            _ => None,
        }
    }
}
