//! The NBD protocol: bytes in, bytes out, with no socket, thread or clock.
//!
//! - [`wire`]: every number of the protocol.
//! - [`export`]: what can be chosen in a handshake: [`Catalog`](export::Catalog).
//! - [`negotiation`]: the server's side of the handshake, until an export is agreed.
//! - [`transmission`]: requests out of bytes, checked against the export.
//! - [`reply`]: replies into bytes, gathered in an [`outbox`].
//! - [`uri`]: NBD URIs and the addresses a server listens at.

pub mod export;
pub mod negotiation;
pub mod outbox;
pub mod reply;
pub mod transmission;
pub mod uri;
pub mod wire;
