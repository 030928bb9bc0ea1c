//! An NBD client for raw sockets, for tests that must say wrong things or see
//! each reply. Its numbers come from the specification and not from the server's
//! `wire.rs`: a test that shared them could not find a wrong one.
//!
//! Three layers: [`Socket`] is bytes with a bound on waiting; [`Negotiation`]
//! asks options; [`Session`] sends requests and takes replies, simple or
//! structured.

mod negotiation;
mod session;

pub use negotiation::{Negotiation, OptionReply, info_request, meta_request};
pub use session::{Chunk, Outcome, Reply, Session, request};

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use super::PATIENCE;

/// Client flag: fixed newstyle.
pub const C_FIXED_NEWSTYLE: u32 = 1;
/// Client flag: no 124 zeros after NBD_OPT_EXPORT_NAME.
pub const C_NO_ZEROES: u32 = 2;

/// Options.
pub mod opt {
    #![allow(missing_docs)]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Replies to options.
pub mod rep {
    #![allow(missing_docs)]
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = 0x8000_0001;
    pub const ERR_INVALID: u32 = 0x8000_0003;
    pub const ERR_UNKNOWN: u32 = 0x8000_0006;
    pub const ERR_TOO_BIG: u32 = 0x8000_0009;
}

/// Kinds of NBD_REP_INFO.
pub mod info {
    #![allow(missing_docs)]
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Commands.
pub mod cmd {
    #![allow(missing_docs)]
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Command flags.
pub mod flag {
    #![allow(missing_docs)]
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 2;
    pub const DF: u16 = 4;
    pub const REQ_ONE: u16 = 8;
    pub const FAST_ZERO: u16 = 16;
}

/// Transmission flags.
pub mod tflag {
    #![allow(missing_docs)]
    pub const READ_ONLY: u16 = 2;
    pub const SEND_FLUSH: u16 = 4;
    pub const SEND_FUA: u16 = 8;
    pub const SEND_TRIM: u16 = 32;
    pub const SEND_WRITE_ZEROES: u16 = 64;
    pub const SEND_DF: u16 = 128;
    pub const CAN_MULTI_CONN: u16 = 256;
    pub const SEND_CACHE: u16 = 1024;
    pub const SEND_FAST_ZERO: u16 = 2048;
}

/// Errors in replies.
pub mod errno {
    #![allow(missing_docs)]
    pub const EPERM: u32 = 1;
    pub const EIO: u32 = 5;
    pub const EINVAL: u32 = 22;
    pub const ENOSPC: u32 = 28;
    pub const ENOTSUP: u32 = 95;
    pub const ESHUTDOWN: u32 = 108;
}

/// Where a server listens.
#[derive(Clone, Debug)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// TCP.
    Tcp(SocketAddr),
}

/// A connected socket; every wait on it ends after [`PATIENCE`].
#[derive(Debug)]
pub enum Socket {
    /// Unix.
    Unix(UnixStream),
    /// TCP.
    Tcp(TcpStream),
}

impl Socket {
    /// Connect.
    pub fn connect(address: &Address) -> io::Result<Self> {
        let socket = match address {
            Address::Unix(path) => Self::Unix(UnixStream::connect(path)?),
            Address::Tcp(address) => {
                let stream = TcpStream::connect(address)?;
                stream.set_nodelay(true)?;
                Self::Tcp(stream)
            }
        };
        match &socket {
            Self::Unix(s) => s
                .set_read_timeout(Some(PATIENCE))
                .and(s.set_write_timeout(Some(PATIENCE)))?,
            Self::Tcp(s) => s
                .set_read_timeout(Some(PATIENCE))
                .and(s.set_write_timeout(Some(PATIENCE)))?,
        }
        Ok(socket)
    }

    /// A second handle on the same connection, to read and write at once.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Unix(s) => Self::Unix(s.try_clone()?),
            Self::Tcp(s) => Self::Tcp(s.try_clone()?),
        })
    }

    /// Say that nothing more will be sent; replies can still come.
    pub fn close_sending(&self) -> io::Result<()> {
        match self {
            Self::Unix(s) => s.shutdown(Shutdown::Write),
            Self::Tcp(s) => s.shutdown(Shutdown::Write),
        }
    }

    /// Exactly `len` bytes.
    pub fn take(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn u16(&mut self) -> io::Result<u16> {
        let mut b = [0; 2];
        self.read_exact(&mut b).map(|()| u16::from_be_bytes(b))
    }

    fn u32(&mut self) -> io::Result<u32> {
        let mut b = [0; 4];
        self.read_exact(&mut b).map(|()| u32::from_be_bytes(b))
    }

    fn u64(&mut self) -> io::Result<u64> {
        let mut b = [0; 8];
        self.read_exact(&mut b).map(|()| u64::from_be_bytes(b))
    }

    /// Whether the server has closed the connection, all it sent being taken
    /// first: the end of the stream or a reset counts, silence does not.
    pub fn is_dropped(&mut self) -> bool {
        let mut scrap = [0; 4096];
        loop {
            match self.read(&mut scrap) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    return matches!(
                        e.kind(),
                        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
                    );
                }
            }
        }
    }
}

impl Read for Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(s) => s.read(buf),
            Self::Tcp(s) => s.read(buf),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(s) => s.write(buf),
            Self::Tcp(s) => s.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn check(what: &str, found: u64, expected: u64) -> io::Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "{what} is {found:#x}, expected {expected:#x}"
    )))
}

/// A big-endian number in `bytes`.
pub fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

/// A big-endian number in `bytes`.
pub fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// A big-endian number in `bytes`.
pub fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
