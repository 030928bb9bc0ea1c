//! Binding the sockets: all of them before anything is written, and all given
//! back, as they were found, if something later is refused.
//!
//! A Unix socket is bound with mode 0600 from its first instant. The socket of a
//! server that has died (nobody answers behind it) is replaced; one that answers
//! is an address in use; a path that is no socket is never touched.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, RenameFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::disks::shown;
use crate::nbd::uri::ListenAddr;
use crate::server::setup::Listener;

/// Clients that may wait to be accepted.
const BACKLOG: i32 = 1024;

/// Why an address cannot be listened at.
#[derive(Debug, thiserror::Error)]
#[error("{address}: {cause}")]
pub(super) struct ListenError {
    address: String,
    cause: Cause,
}

#[derive(Debug, thiserror::Error)]
enum Cause {
    #[error("address in use: another server listens there; stop it or name another address")]
    InUse,
    #[error("there is something that is not a socket; it is left alone: name another path")]
    NotASocket,
    #[error("the folder {0} does not exist: make it first")]
    NoFolder(String),
    #[error("permission denied: name an address that this user may listen at")]
    Permission,
    #[error(
        "the path is too long for a Unix socket ({0} bytes, at most 107): use a shorter or a relative one"
    )]
    TooLong(usize),
    #[error("no such host: {0}")]
    NoHost(io::Error),
    #[error("this machine does not have that address")]
    NotOurs,
    #[error("{0}")]
    System(io::Error),
}

impl From<io::Error> for Cause {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::AddrInUse => Self::InUse,
            ErrorKind::AddrNotAvailable => Self::NotOurs,
            ErrorKind::PermissionDenied => Self::Permission,
            _ => Self::System(error),
        }
    }
}

/// Sockets that listen. Dropped, it takes its Unix sockets' paths away again and
/// puts back what they replaced; [`Bound::keep`] makes them stay.
#[derive(Debug, Default)]
pub(super) struct Bound {
    sockets: Vec<Socket>,
}

#[derive(Debug)]
struct Socket {
    listener: Listener,
    /// A dead server's socket, moved aside.
    replaced: Option<PathBuf>,
}

impl Bound {
    /// Listen at one more address; a host name may stand for several.
    pub(super) fn add(&mut self, address: &ListenAddr) -> Result<(), ListenError> {
        let failed = |cause| ListenError {
            address: one_line(address),
            cause,
        };
        match address {
            ListenAddr::Tcp { host, port } => {
                for listener in bind_tcp(host, *port).map_err(failed)? {
                    self.sockets.push(Socket {
                        listener: Listener::Tcp(listener),
                        replaced: None,
                    });
                }
            }
            ListenAddr::Unix(path) => self.sockets.push(bind_unix(path).map_err(failed)?),
        }
        Ok(())
    }

    /// Everything else has worked out: the sockets stay.
    pub(super) fn keep(mut self) -> Vec<Listener> {
        let sockets = std::mem::take(&mut self.sockets);
        sockets
            .into_iter()
            .map(|socket| {
                if let Some(dead) = socket.replaced {
                    let _ = std::fs::remove_file(dead);
                }
                socket.listener
            })
            .collect()
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        for socket in self.sockets.drain(..).rev() {
            let Listener::Unix(listener, path) = socket.listener else {
                continue;
            };
            drop(listener);
            let _ = match socket.replaced {
                Some(dead) => std::fs::rename(dead, path),
                None => std::fs::remove_file(path),
            };
        }
    }
}

/// Where a listener listens, as its clients would write it.
pub(super) fn address_of(listener: &Listener) -> io::Result<ListenAddr> {
    match listener {
        Listener::Tcp(listener) => {
            let address = listener.local_addr()?;
            Ok(ListenAddr::Tcp {
                host: address.ip().to_string(),
                port: address.port(),
            })
        }
        Listener::Unix(_, path) => Ok(ListenAddr::Unix(path.clone())),
    }
}

fn one_line(address: &impl fmt::Display) -> String {
    shown(Path::new(&address.to_string()))
}

fn bind_tcp(host: &str, port: u16) -> Result<Vec<TcpListener>, Cause> {
    let addresses: Vec<SocketAddr> = (host, port)
        .to_socket_addrs()
        .map_err(Cause::NoHost)?
        .collect();
    let mut listeners: Vec<TcpListener> = Vec::new();
    let mut absent = None;
    for mut address in addresses {
        // The system chooses a port once, for all addresses of a name.
        if let Some(first) = listeners.first() {
            address.set_port(first.local_addr()?.port());
        }
        if listeners
            .iter()
            .any(|bound| bound.local_addr().is_ok_and(|bound| bound == address))
        {
            continue;
        }
        match TcpListener::bind(address) {
            Ok(listener) => {
                listener.set_nonblocking(true)?;
                listeners.push(listener);
            }
            // "localhost" has an IPv6 address where the machine may have none.
            Err(error) if is_absent(&error) => absent = Some(error),
            Err(error) => return Err(error.into()),
        }
    }
    match absent {
        Some(error) if listeners.is_empty() => Err(error.into()),
        _ => Ok(listeners),
    }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::ADDRNOTAVAIL | Errno::AFNOSUPPORT)
    )
}

fn bind_unix(path: &Path) -> Result<Socket, Cause> {
    let path = std::path::absolute(path)?;
    let replaced = match std::fs::symlink_metadata(&path) {
        Ok(meta) if !meta.file_type().is_socket() => return Err(Cause::NotASocket),
        Ok(_) => Some(move_dead_socket_aside(&path)?),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => return Err(error.into()),
    };
    match listen_unix(&path) {
        Ok(listener) => Ok(Socket {
            listener: Listener::Unix(listener, path),
            replaced,
        }),
        Err(cause) => {
            if let Some(dead) = replaced {
                let _ = std::fs::rename(dead, &path);
            }
            Err(cause)
        }
    }
}

fn listen_unix(path: &Path) -> Result<UnixListener, Cause> {
    let address = SocketAddrUnix::new(path).map_err(|_| Cause::TooLong(path.as_os_str().len()))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(io::Error::from)?;
    // The mode of the socket becomes that of its path: no instant in which
    // others could connect.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(io::Error::from)?;
    rustix::net::bind(&socket, &address).map_err(|errno| match (errno, path.parent()) {
        (Errno::NOENT | Errno::NOTDIR, Some(folder)) => Cause::NoFolder(shown(folder)),
        (errno, _) => Cause::from(io::Error::from(errno)),
    })?;
    if let Err(errno) = rustix::net::listen(&socket, BACKLOG) {
        let _ = std::fs::remove_file(path);
        return Err(io::Error::from(errno).into());
    }
    Ok(UnixListener::from(socket))
}

/// A socket that nobody listens behind gives way; it is only moved, so that it
/// can come back.
fn move_dead_socket_aside(path: &Path) -> Result<PathBuf, Cause> {
    if !is_dead(path)? {
        return Err(Cause::InUse);
    }
    let mut aside = path.to_owned();
    aside
        .as_mut_os_string()
        .push(format!(".dead-{}", std::process::id()));
    let cwd = rustix::fs::CWD;
    rustix::fs::renameat_with(cwd, path, cwd, &aside, RenameFlags::NOREPLACE)
        .map_err(io::Error::from)?;
    // Another server may have taken the path since the look at it: look again,
    // now that the path cannot change under us.
    match is_dead(&aside) {
        Ok(true) => Ok(aside),
        other => {
            let _ = rustix::fs::renameat_with(cwd, &aside, cwd, path, RenameFlags::NOREPLACE);
            Err(other.err().map_or(Cause::InUse, Cause::from))
        }
    }
}

fn is_dead(path: &Path) -> io::Result<bool> {
    match UnixStream::connect(path) {
        Ok(_) => Ok(false),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(true),
        // A full queue is a sign of life; so is a datagram socket.
        Err(error)
            if matches!(
                Errno::from_io_error(&error),
                Some(Errno::AGAIN | Errno::PROTOTYPE)
            ) =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn bind(path: &Path) -> Result<Bound, ListenError> {
        let mut bound = Bound::default();
        bound
            .add(&ListenAddr::Unix(path.to_owned()))
            .map(|()| bound)
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_socket_is_private_and_goes_away_unless_it_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let bound = bind(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        drop(bound);
        assert!(names(folder.path()).is_empty());
        let kept = bind(&path).unwrap().keep();
        assert_eq!(kept.len(), 1);
        assert_eq!(names(folder.path()), ["s"]);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_live_socket_is_in_use_and_a_dead_one_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let live = UnixListener::bind(&path).unwrap();
        let error = bind(&path).unwrap_err().to_string();
        assert!(
            error.contains("address in use") && error.contains("unix:"),
            "{error}"
        );
        UnixStream::connect(&path).unwrap();
        drop(live);
        let dead = path.symlink_metadata().unwrap();
        drop(bind(&path).unwrap());
        let back = path.symlink_metadata().unwrap();
        assert_eq!(
            std::os::unix::fs::MetadataExt::ino(&dead),
            std::os::unix::fs::MetadataExt::ino(&back)
        );
        let kept = bind(&path).unwrap().keep();
        assert_eq!(names(folder.path()), ["s"]);
        UnixStream::connect(&path).unwrap();
        drop(kept);
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        std::fs::write(&path, "precious").unwrap();
        assert!(
            bind(&path)
                .unwrap_err()
                .to_string()
                .contains("not a socket")
        );
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("nowhere", &link).unwrap();
        assert!(
            bind(&link)
                .unwrap_err()
                .to_string()
                .contains("not a socket")
        );
    }

    #[test]
    fn the_cause_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let error = bind(&folder.path().join("gone/s")).unwrap_err().to_string();
        assert!(error.contains("does not exist"), "{error}");
        let error = bind(&folder.path().join("x".repeat(120)))
            .unwrap_err()
            .to_string();
        assert!(error.contains("too long"), "{error}");
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let address = ListenAddr::Tcp {
            host: "127.0.0.1".into(),
            port,
        };
        let error = Bound::default().add(&address).unwrap_err().to_string();
        assert_eq!(error, format!("127.0.0.1:{port}: {}", Cause::InUse));
    }

    #[test]
    fn a_host_name_binds_all_its_addresses_with_one_port() {
        let mut bound = Bound::default();
        bound
            .add(&ListenAddr::Tcp {
                host: "localhost".into(),
                port: 0,
            })
            .unwrap();
        let listeners = bound.keep();
        assert!(!listeners.is_empty());
        let mut ports: Vec<u16> = listeners
            .iter()
            .map(|listener| match address_of(listener).unwrap() {
                ListenAddr::Tcp { port, .. } => port,
                ListenAddr::Unix(_) => unreachable!(),
            })
            .collect();
        ports.dedup();
        assert_eq!(ports.len(), 1);
    }
}
