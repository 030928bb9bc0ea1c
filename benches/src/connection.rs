//! A connection to an export, and a transport over its socket that never blocks
//! in a write, polls a little before it sleeps in a read, and moves as many
//! bytes a system call as it can. The handshake and the goodbye are those of
//! `nbdsnap::client`; between them its socket belongs to the transport.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nbdsnap::client::{Client, ClientError, Connect, Handshake, Stream};
use nbdsnap::nbd::uri::NbdUri;
use nbdsnap::nbd::wire::{NBD_FLAG_C_FIXED_NEWSTYLE, NBD_FLAG_C_NO_ZEROES, NBD_FLAG_READ_ONLY};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use crate::BenchError;

/// How long a server may be silent while requests are in flight.
const PATIENCE: Duration = Duration::from_secs(30);

/// An export that is ready for requests.
#[derive(Debug)]
pub struct Connection {
    /// Carries requests and replies.
    pub transport: Transport,
    client: Client,
}

impl Connection {
    /// Connects and goes to the export. `structured` asks for structured
    /// replies; a server without them is used as it is.
    pub fn open(uri: &NbdUri, structured: bool) -> Result<Self, BenchError> {
        let connect = Connect {
            structured_replies: structured,
            ..Connect::simple()
        };
        let connected = connect.to(uri).and_then(Self::new);
        connected.map_err(|cause| BenchError::Connect {
            server: uri.to_string(),
            cause,
        })
    }

    /// Goes to the default export of the server at the other end of a socket.
    pub fn over(stream: Stream, structured: bool) -> Result<Self, BenchError> {
        let flags = NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES;
        let connected = Handshake::begin(stream, flags).and_then(|mut handshake| {
            if structured {
                handshake.structured_replies()?;
            }
            Self::new(handshake.go("")?)
        });
        connected.map_err(|cause| BenchError::Connect {
            server: "the server in this process".into(),
            cause,
        })
    }

    fn new(mut client: Client) -> Result<Self, ClientError> {
        let socket = client.stream().as_fd().try_clone_to_owned()?;
        Ok(Self {
            transport: Transport::new(socket),
            client,
        })
    }

    /// The length of the export.
    pub fn bytes(&self) -> u64 {
        self.client.size()
    }

    /// True if writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.client.has_flags(NBD_FLAG_READ_ONLY)
    }

    /// Says goodbye, and waits until the server hangs up. Call it when nothing
    /// is in flight.
    pub fn close(self) -> Result<(), BenchError> {
        self.client.disconnect().map_err(BenchError::Goodbye)
    }
}

/// Bytes that wait to be sent.
#[derive(Debug, Default)]
pub struct Outgoing {
    /// What is to be sent; append here.
    pub bytes: Vec<u8>,
    sent: usize,
}

impl Outgoing {
    /// How much waits.
    pub fn len(&self) -> usize {
        self.bytes.len() - self.sent
    }

    /// True if nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Why no bytes came.
#[derive(Debug)]
pub enum TransportError {
    /// The socket failed or was closed by the other side.
    Broken(io::Error),
    /// Nothing came for a long time.
    Silent(Duration),
}

impl fmt::Display for TransportError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Broken(cause) => cause.fmt(f),
            Self::Silent(waited) => write!(f, "nothing came for {} s", waited.as_secs()),
        }
    }
}

impl From<Errno> for TransportError {
    fn from(errno: Errno) -> Self {
        Self::Broken(errno.into())
    }
}

/// Sends and receives without blocking in a send, and with polling before
/// sleeping in a receive.
#[derive(Debug)]
pub struct Transport {
    socket: OwnedFd,
    polling: Polling,
    waited: Duration,
}

impl Transport {
    /// Takes over a connected socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            polling: Polling::up_to(Duration::from_micros(50)),
            waited: Duration::ZERO,
        }
    }

    /// Sets how long to poll before sleeping; zero means to sleep at once.
    pub fn poll_up_to(&mut self, longest: Duration) {
        self.polling = Polling::up_to(longest);
    }

    /// The time spent in [`Transport::receive`] with nothing to receive.
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// Sends as much as the socket takes now.
    pub fn send(&mut self, outgoing: &mut Outgoing) -> Result<(), TransportError> {
        while !outgoing.is_empty() {
            let rest = &outgoing.bytes[outgoing.sent..];
            match rustix::net::send(
                &self.socket,
                rest,
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            ) {
                Ok(sent) => outgoing.sent += sent,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        outgoing.bytes.clear();
        outgoing.sent = 0;
        Ok(())
    }

    /// Receives what is there, or waits for it; meanwhile goes on sending.
    /// `Ok(0)` is returned where no byte came, but all is sent.
    pub fn receive(
        &mut self,
        buffer: &mut [u8],
        outgoing: &mut Outgoing,
    ) -> Result<usize, TransportError> {
        if let Some(received) = self.try_receive(buffer)? {
            return Ok(received);
        }
        let began = Instant::now();
        let result = self.wait_and_receive(buffer, outgoing, began);
        self.waited += began.elapsed();
        result
    }

    fn wait_and_receive(
        &mut self,
        buffer: &mut [u8],
        outgoing: &mut Outgoing,
        began: Instant,
    ) -> Result<usize, TransportError> {
        let unsent = !outgoing.is_empty();
        let poll_until = began + self.polling.next();
        loop {
            self.send(outgoing)?;
            if let Some(received) = self.try_receive(buffer)? {
                self.polling.it_came();
                return Ok(received);
            }
            if unsent && outgoing.is_empty() {
                return Ok(0);
            }
            if Instant::now() >= poll_until {
                break;
            }
            std::hint::spin_loop();
        }
        self.polling.in_vain();
        loop {
            self.sleep(!outgoing.is_empty())?;
            self.send(outgoing)?;
            if let Some(received) = self.try_receive(buffer)? {
                return Ok(received);
            }
            if unsent && outgoing.is_empty() {
                return Ok(0);
            }
        }
    }

    fn try_receive(&mut self, buffer: &mut [u8]) -> Result<Option<usize>, TransportError> {
        loop {
            match rustix::net::recv(&self.socket, &mut *buffer, RecvFlags::DONTWAIT) {
                Ok((0, _)) => {
                    return Err(TransportError::Broken(io::ErrorKind::UnexpectedEof.into()));
                }
                Ok((received, _)) => return Ok(Some(received)),
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Sleeps until the socket can be read, or written where that is wanted.
    fn sleep(&self, or_writable: bool) -> Result<(), TransportError> {
        let mut events = PollFlags::IN;
        events.set(PollFlags::OUT, or_writable);
        let mut polled = [PollFd::new(&self.socket, events)];
        let timeout = Timespec {
            tv_sec: PATIENCE.as_secs() as i64,
            tv_nsec: 0,
        };
        match rustix::event::poll(&mut polled, Some(&timeout)) {
            Ok(0) => Err(TransportError::Silent(PATIENCE)),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// How long to poll before sleeping: as long as allowed while it helps, half
/// as long after each time in vain, and now and then a new try.
#[derive(Debug)]
struct Polling {
    longest: Duration,
    current: Duration,
    given_up: u32,
}

impl Polling {
    /// Below this, polling is given up.
    const SHORTEST: Duration = Duration::from_micros(2);
    /// Waits between given up and the next try.
    const RETRY: u32 = 64;

    fn up_to(longest: Duration) -> Self {
        Self {
            longest,
            current: longest,
            given_up: 0,
        }
    }

    fn next(&mut self) -> Duration {
        if self.current < Self::SHORTEST {
            self.given_up += 1;
            if self.given_up < Self::RETRY {
                return Duration::ZERO;
            }
            self.given_up = 0;
            self.current = self.longest;
        }
        self.current
    }

    fn it_came(&mut self) {
        self.current = self.longest;
    }

    fn in_vain(&mut self) {
        self.current /= 2;
    }
}
