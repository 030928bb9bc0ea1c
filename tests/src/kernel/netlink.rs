//! The kernel's NBD client over generic netlink, as far as the suites need it:
//! connect a device, give it a new socket for a dead one, disconnect it. Speaks
//! for `nbd-attach` inside the virtual machine.
//!
//! What this has and nbd-client 3.24 has not is [`Attachment::dead_conn_timeout`]
//! together with [`Nbd::reconfigure`]: requests are held while no connection is
//! alive, instead of failing. The numbers are those of `linux/genetlink.h` and
//! `linux/nbd-netlink.h`; all fields are in the machine's byte order.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::netlink::{GENERIC, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, connect, recv, send, socket_with,
};

const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLA_F_NESTED: u16 = 1 << 15;
const HEADER_BYTES: usize = 16;
const GENL_HEADER_BYTES: usize = 4;

const GENL_ID_CTRL: u16 = 0x10;
const CTRL_VERSION: u8 = 2;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

const NBD_VERSION: u8 = 1;
const NBD_CMD_CONNECT: u8 = 1;
const NBD_CMD_DISCONNECT: u8 = 2;
const NBD_CMD_RECONFIGURE: u8 = 3;
const NBD_ATTR_INDEX: u16 = 1;
const NBD_ATTR_SIZE_BYTES: u16 = 2;
const NBD_ATTR_BLOCK_SIZE_BYTES: u16 = 3;
const NBD_ATTR_TIMEOUT: u16 = 4;
const NBD_ATTR_SERVER_FLAGS: u16 = 5;
const NBD_ATTR_SOCKETS: u16 = 7;
const NBD_ATTR_DEAD_CONN_TIMEOUT: u16 = 8;
const NBD_SOCK_ITEM: u16 = 1;
const NBD_SOCK_FD: u16 = 1;

/// A device to be connected.
#[derive(Clone, Copy, Debug)]
pub struct Attachment {
    /// N of `/dev/nbdN`.
    pub index: u32,
    /// Bytes of the export.
    pub size: u64,
    /// Bytes of a logical block.
    pub block_size: u64,
    /// The export's transmission flags.
    pub server_flags: u16,
    /// After this long without a reply a request is sent again, on a connection
    /// that is alive. Without it, what was in flight on a connection that died
    /// is never sent again.
    pub timeout: Duration,
    /// How long requests are held while no connection is alive, before they fail.
    pub dead_conn_timeout: Duration,
}

/// The kernel's NBD client.
#[derive(Debug)]
pub struct Nbd {
    socket: OwnedFd,
    family: u16,
    sequence: u32,
}

impl Nbd {
    /// Finds it; the module `nbd` must be loaded.
    pub fn open() -> io::Result<Self> {
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            Some(GENERIC),
        )?;
        connect(&socket, &SocketAddrNetlink::new(0, 0))?;
        let mut this = Self {
            socket,
            family: GENL_ID_CTRL,
            sequence: 0,
        };
        let mut request = Attributes::default();
        request.put(CTRL_ATTR_FAMILY_NAME, b"nbd\0");
        let reply = this.ask(CTRL_CMD_GETFAMILY, CTRL_VERSION, &request)?;
        let id = attribute(&reply, CTRL_ATTR_FAMILY_ID)
            .and_then(|id| Some(u16::from_ne_bytes(id.try_into().ok()?)));
        this.family = id.ok_or_else(|| broken("the reply names no family"))?;
        Ok(this)
    }

    /// Makes a device of sockets that are in transmission. The kernel keeps
    /// them, whatever becomes of these descriptors.
    pub fn connect(
        &mut self,
        attachment: &Attachment,
        sockets: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let mut request = Attributes::default();
        request.put(NBD_ATTR_INDEX, &attachment.index.to_ne_bytes());
        request.put_u64(NBD_ATTR_SIZE_BYTES, attachment.size);
        request.put_u64(NBD_ATTR_BLOCK_SIZE_BYTES, attachment.block_size);
        request.put_u64(NBD_ATTR_SERVER_FLAGS, attachment.server_flags.into());
        request.put_u64(NBD_ATTR_TIMEOUT, attachment.timeout.as_secs());
        request.put_u64(
            NBD_ATTR_DEAD_CONN_TIMEOUT,
            attachment.dead_conn_timeout.as_secs(),
        );
        request.put_sockets(sockets);
        self.ask(NBD_CMD_CONNECT, NBD_VERSION, &request).map(drop)
    }

    /// Gives a device a new socket in the place of one that died. ENOSPC: none
    /// is known to have died; EINVAL: the device is not connected at all.
    pub fn reconfigure(&mut self, index: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
        let mut request = Attributes::default();
        request.put(NBD_ATTR_INDEX, &index.to_ne_bytes());
        request.put_sockets(&[socket]);
        self.ask(NBD_CMD_RECONFIGURE, NBD_VERSION, &request)
            .map(drop)
    }

    /// Disconnects a device.
    pub fn disconnect(&mut self, index: u32) -> io::Result<()> {
        let mut request = Attributes::default();
        request.put(NBD_ATTR_INDEX, &index.to_ne_bytes());
        self.ask(NBD_CMD_DISCONNECT, NBD_VERSION, &request)
            .map(drop)
    }

    /// Sends a command and waits for its acknowledgement; the attributes of the
    /// reply before that, if there was one.
    fn ask(&mut self, command: u8, version: u8, attributes: &Attributes) -> io::Result<Vec<u8>> {
        self.sequence += 1;
        let len = HEADER_BYTES + GENL_HEADER_BYTES + attributes.0.len();
        let mut message = Vec::with_capacity(len);
        message.extend((len as u32).to_ne_bytes());
        message.extend(self.family.to_ne_bytes());
        message.extend((NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        message.extend(self.sequence.to_ne_bytes());
        message.extend(0u32.to_ne_bytes());
        message.extend([command, version, 0, 0]);
        message.extend(&attributes.0);
        send(&self.socket, &message, SendFlags::empty())?;

        let mut reply = Vec::new();
        let mut buffer = vec![0; 32 << 10];
        loop {
            let (len, _) = recv(&self.socket, &mut buffer[..], RecvFlags::empty())?;
            let mut rest = &buffer[..len];
            while let Some((kind, sequence, body)) = next_message(&mut rest)? {
                if sequence != self.sequence {
                    continue;
                }
                if kind != NLMSG_ERROR {
                    reply = body.get(GENL_HEADER_BYTES..).unwrap_or_default().to_vec();
                    continue;
                }
                let code = body.get(..4).and_then(|code| code.try_into().ok());
                let code = code.ok_or_else(|| broken("a short acknowledgement"))?;
                return match i32::from_ne_bytes(code) {
                    0 => Ok(reply),
                    code => Err(io::Error::from_raw_os_error(-code)),
                };
            }
        }
    }
}

/// Takes one message off: its type, its sequence number and what follows its header.
fn next_message<'a>(rest: &mut &'a [u8]) -> io::Result<Option<(u16, u32, &'a [u8])>> {
    let Some(header) = rest.first_chunk::<HEADER_BYTES>() else {
        return Ok(None);
    };
    let [l0, l1, l2, l3, t0, t1, _, _, s0, s1, s2, s3, ..] = *header;
    let len = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
    let body = rest.get(HEADER_BYTES..len);
    let body = body.ok_or_else(|| broken("a message of a wrong length"))?;
    *rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    let sequence = u32::from_ne_bytes([s0, s1, s2, s3]);
    Ok(Some((u16::from_ne_bytes([t0, t1]), sequence, body)))
}

/// The value of the first attribute of a type.
fn attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    while let Some([l0, l1, t0, t1]) = attributes.first_chunk::<4>() {
        let len = usize::from(u16::from_ne_bytes([*l0, *l1]));
        let value = attributes.get(4..len)?;
        if u16::from_ne_bytes([*t0, *t1]) & !NLA_F_NESTED == wanted {
            return Some(value);
        }
        attributes = attributes.get(len.next_multiple_of(4)..)?;
    }
    None
}

/// Attributes of a message, in their encoding.
#[derive(Debug, Default)]
struct Attributes(Vec<u8>);

impl Attributes {
    fn put(&mut self, kind: u16, value: &[u8]) {
        self.0.extend((4 + value.len() as u16).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn put_u64(&mut self, kind: u16, value: u64) {
        self.put(kind, &value.to_ne_bytes());
    }

    fn put_sockets(&mut self, sockets: &[BorrowedFd<'_>]) {
        let mut items = Self::default();
        for socket in sockets {
            let mut item = Self::default();
            item.put(
                NBD_SOCK_FD,
                &socket.as_raw_fd().cast_unsigned().to_ne_bytes(),
            );
            items.put(NBD_SOCK_ITEM | NLA_F_NESTED, &item.0);
        }
        self.put(NBD_ATTR_SOCKETS | NLA_F_NESTED, &items.0);
    }
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("netlink: {what}"))
}
