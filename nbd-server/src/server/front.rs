//! The thread that meets the clients: it accepts them, leads the handshake, and
//! hands those who have chosen an export to that volume's thread. Nothing that
//! a client does here can hold up another: handshakes run side by side, bounded
//! in number and time.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{sleep, timeout};

use super::directory::{Directory, Exports};
use super::setup::Listener;
use crate::io::{NewConnection, Shard};
use crate::nbd::negotiation::{Agreed, Negotiation, Refusal, Step};
use crate::nbd::transmission::Terms;

/// A client has this long to choose an export.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes that go on at once; further clients wait to be accepted.
const HANDSHAKES: usize = 1024;
/// What a Unix socket may hold of replies that the client has not read.
const SEND_BUFFER: usize = 1 << 20;
/// After a failed accept (no file descriptor left, mostly) the next one waits.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A handle to the thread.
#[derive(Debug)]
pub(super) struct Front {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
    /// Sockets in the file system, to be removed at the end.
    paths: Vec<PathBuf>,
}

/// What every handshake needs to know.
struct Hall {
    directory: Arc<Directory>,
    shards: Arc<Vec<Shard>>,
    handshakes: Arc<Semaphore>,
    /// How many have been handed over.
    clients: AtomicU64,
}

impl Front {
    /// Begin to accept clients.
    pub(super) fn start(
        listeners: Vec<Listener>,
        directory: Arc<Directory>,
        shards: Arc<Vec<Shard>>,
    ) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let hall = Arc::new(Hall {
            directory,
            shards,
            handshakes: Arc::new(Semaphore::new(HANDSHAKES)),
            clients: AtomicU64::new(0),
        });
        let mut paths = Vec::new();
        {
            let _context = runtime.enter();
            for listener in listeners {
                match listener {
                    Listener::Tcp(listener) => {
                        listener.set_nonblocking(true)?;
                        let listener = TcpListener::from_std(listener)?;
                        runtime.spawn(accept(Door::Tcp(listener), Arc::clone(&hall)));
                    }
                    Listener::Unix(listener, path) => {
                        listener.set_nonblocking(true)?;
                        let listener = UnixListener::from_std(listener)?;
                        runtime.spawn(accept(Door::Unix(listener), Arc::clone(&hall)));
                        paths.push(path);
                    }
                }
            }
        }
        let (stop, stopped) = oneshot::channel();
        let builder = std::thread::Builder::new().name("front".into());
        let thread = builder.spawn(move || {
            // An error means that the handle was dropped: then serve on.
            let end = async {
                if stopped.await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            runtime.block_on(end);
            // Dropping the runtime drops its tasks: listeners and handshakes close.
        })?;
        Ok(Self {
            stop,
            thread,
            paths,
        })
    }

    /// Accept nobody any more, and drop those who have not chosen yet.
    pub(super) fn stop(self) {
        let _ = self.stop.send(());
        let _ = self.thread.join();
        for path in &self.paths {
            if let Err(error) = std::fs::remove_file(path) {
                tracing::warn!("cannot remove the socket {}: {error}", path.display());
            }
        }
    }
}

/// Where clients come from.
enum Door {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Door {
    async fn accept(&self) -> io::Result<(Client, Peer)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                // Replies are sent in batches that are as large as they should be.
                stream.set_nodelay(true)?;
                // A client whose machine has gone away is noticed after some hours.
                rustix::net::sockopt::set_socket_keepalive(&stream, true)?;
                Ok((Client::Tcp(stream), Peer::Address(address)))
            }
            Self::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                // As much as the system allows: fewer wake-ups for large replies.
                rustix::net::sockopt::set_socket_send_buffer_size(&stream, SEND_BUFFER)?;
                let process = stream.peer_cred().ok().and_then(|cred| cred.pid());
                Ok((Client::Unix(stream), Peer::Process(process)))
            }
        }
    }
}

/// Who a client is, for messages.
enum Peer {
    Address(std::net::SocketAddr),
    Process(Option<i32>),
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Process(Some(process)) => write!(f, "process {process}"),
            Self::Process(None) => f.write_str("a local process"),
        }
    }
}

/// A client's socket during the handshake.
enum Client {
    Tcp(TcpStream),
    Unix(UnixStream),
}

async fn accept(door: Door, hall: Arc<Hall>) {
    loop {
        let permit = Arc::clone(&hall.handshakes).acquire_owned().await;
        let permit = permit.expect("the semaphore is never closed");
        match door.accept().await {
            Ok((client, peer)) => {
                let hall = Arc::clone(&hall);
                tokio::spawn(async move {
                    meet(client, &peer, &hall).await;
                    drop(permit);
                });
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                tracing::warn!("a client cannot be accepted: {error}");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// What a handshake ended with, other than an export.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("{0}")]
    Socket(#[from] io::Error),
    #[error("{0}")]
    Refused(#[from] Refusal),
    #[error("no export chosen within {} seconds", HANDSHAKE.as_secs())]
    TooSlow,
    #[error("the client has gone")]
    Gone,
}

impl Failed {
    /// The client has left, which is its right, and no reason for a line in the log.
    fn is_departure(&self) -> bool {
        match self {
            Self::Gone => true,
            Self::Socket(error) => matches!(
                error.kind(),
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
            ),
            Self::Refused(_) | Self::TooSlow => false,
        }
    }
}

/// Lead one client through the handshake, and hand it over.
async fn meet(mut client: Client, peer: &Peer, hall: &Hall) {
    let handshake = async {
        match &mut client {
            Client::Tcp(stream) => shake_hands(stream, hall).await,
            Client::Unix(stream) => shake_hands(stream, hall).await,
        }
    };
    let result = match timeout(HANDSHAKE, handshake).await {
        Ok(result) => result,
        Err(_) => Err(Failed::TooSlow),
    };
    match result {
        Ok(Some(choice)) => {
            if let Err(error) = hand_over(client, peer, hall, &choice) {
                tracing::warn!(%peer, "client dropped: {error}");
            }
        }
        Ok(None) => tracing::debug!(%peer, "client has asked and gone"),
        Err(failed) if failed.is_departure() => tracing::debug!(%peer, "client has gone"),
        Err(failed) => tracing::info!(%peer, "handshake failed: {failed}"),
    }
}

/// What a handshake came to.
struct Choice {
    agreed: Agreed,
    /// Where the export was found.
    exports: Arc<Exports>,
    /// What the client sent behind the handshake.
    leftover: BytesMut,
}

/// Negotiate until an export is agreed, or the client says good-bye. What comes
/// or goes meanwhile is seen with the client's next option.
async fn shake_hands<S>(stream: &mut S, hall: &Hall) -> Result<Option<Choice>, Failed>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut exports = hall.directory.look();
    let mut negotiation = Negotiation::new(Arc::clone(&exports.catalog));
    let mut input = BytesMut::new();
    let mut step = Ok(Step::NeedMore);
    loop {
        while let Some(output) = negotiation.poll_output() {
            stream.write_all(&output).await?;
        }
        match step? {
            Step::Done(agreed) => {
                return Ok(Some(Choice {
                    agreed,
                    exports,
                    leftover: input,
                }));
            }
            Step::Ended => return Ok(None),
            Step::SendFirst => {}
            Step::NeedMore => {
                if stream.read_buf(&mut input).await? == 0 {
                    return Err(Failed::Gone);
                }
            }
        }
        exports = hall.directory.look();
        negotiation.look_at(&exports.catalog);
        step = negotiation.handle_input(&mut input);
    }
}

fn hand_over(client: Client, peer: &Peer, hall: &Hall, choice: &Choice) -> io::Result<()> {
    let agreed = &choice.agreed;
    let export = &choice.exports.catalog.exports()[agreed.export];
    let route = choice.exports.route(agreed.export);
    let socket: OwnedFd = match client {
        Client::Tcp(stream) => stream.into_std()?.into(),
        Client::Unix(stream) => stream.into_std()?.into(),
    };
    tracing::debug!(%peer, export = export.name, "client attached");
    hall.shards[route.shard].attach(NewConnection {
        id: hall.clients.fetch_add(1, Ordering::Relaxed) + 1,
        socket,
        peer: peer.to_string(),
        volume: route.volume,
        view: route.view,
        terms: Terms {
            export_bytes: export.size,
            read_only: route.read_only,
            structured: agreed.structured_replies,
            base_allocation: agreed.base_allocation,
        },
        leftover: choice.leftover.to_vec(),
    });
    Ok(())
}
