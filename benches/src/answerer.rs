//! A server of one connection that does as little as NBD allows: it answers
//! from memory. Tests run loads against it, with content that is right and
//! wrong; `nbdload --ceiling` shows with it how fast the generator can be.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};

use nbdsnap::client::Stream;
use nbdsnap::nbd::wire::{
    NBD_CMD_DISC, NBD_CMD_READ, NBD_CMD_WRITE, NBD_EINVAL, NBD_FLAG_FIXED_NEWSTYLE,
    NBD_FLAG_HAS_FLAGS, NBD_FLAG_NO_ZEROES, NBD_INFO_EXPORT, NBD_MAGIC, NBD_OPT_GO,
    NBD_OPTION_MAGIC, NBD_OPTION_REPLY_MAGIC, NBD_REP_ACK, NBD_REP_ERR_UNSUP, NBD_REP_INFO,
    NBD_REQUEST_MAGIC, NBD_SIMPLE_REPLY_MAGIC, OPTION_HEADER_BYTES, REQUEST_BYTES,
};

use crate::connection::{Outgoing, Transport, TransportError};

/// Replies are sent when so many bytes of them are there: client and server
/// then work at the same time.
const BATCH_BYTES: usize = 16 << 10;
const RECEIVE_BYTES: usize = 256 << 10;

/// Begins to serve `image` to the other end of the socket that is returned. The
/// thread ends with the connection, and returns the image.
pub fn answer(image: Vec<u8>) -> io::Result<(Stream, JoinHandle<io::Result<Vec<u8>>>)> {
    let (client, server) = UnixStream::pair()?;
    let thread = thread::Builder::new()
        .name("answerer".into())
        .spawn(move || {
            let mut server = server;
            negotiate(&mut server, image.len() as u64)?;
            let mut answerer = Answerer {
                image,
                out: Outgoing::default(),
            };
            answerer.serve(Transport::new(server.into()))?;
            Ok(answerer.image)
        })?;
    Ok((Stream::Unix(client), thread))
}

/// Any name is taken; no option but GO is known.
fn negotiate(stream: &mut UnixStream, bytes: u64) -> io::Result<()> {
    stream.write_all(&NBD_MAGIC.to_be_bytes())?;
    stream.write_all(&NBD_OPTION_MAGIC.to_be_bytes())?;
    stream.write_all(&(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES).to_be_bytes())?;
    stream.read_exact(&mut [0; 4])?;
    loop {
        let mut header = [0; OPTION_HEADER_BYTES];
        stream.read_exact(&mut header)?;
        let option = u32::from_be_bytes(header[8..12].try_into().expect("four bytes"));
        let length = u32::from_be_bytes(header[12..].try_into().expect("four bytes"));
        io::copy(
            &mut Read::by_ref(stream).take(length.into()),
            &mut io::sink(),
        )?;
        if option != NBD_OPT_GO {
            option_reply(stream, option, NBD_REP_ERR_UNSUP, &[])?;
            continue;
        }
        let mut info = NBD_INFO_EXPORT.to_be_bytes().to_vec();
        info.extend_from_slice(&bytes.to_be_bytes());
        info.extend_from_slice(&NBD_FLAG_HAS_FLAGS.to_be_bytes());
        option_reply(stream, option, NBD_REP_INFO, &info)?;
        return option_reply(stream, option, NBD_REP_ACK, &[]);
    }
}

fn option_reply(stream: &mut UnixStream, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
    let mut reply = NBD_OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    for field in [option, kind, data.len() as u32] {
        reply.extend_from_slice(&field.to_be_bytes());
    }
    reply.extend_from_slice(data);
    stream.write_all(&reply)
}

struct Answerer {
    image: Vec<u8>,
    out: Outgoing,
}

impl Answerer {
    /// Answers until the client is gone.
    fn serve(&mut self, mut transport: Transport) -> io::Result<()> {
        let mut input = Vec::new();
        let mut buffer = vec![0; RECEIVE_BYTES];
        loop {
            match transport.receive(&mut buffer, &mut self.out) {
                Ok(received) => input.extend_from_slice(&buffer[..received]),
                Err(TransportError::Broken(_)) => return Ok(()),
                Err(error @ TransportError::Silent(_)) => {
                    return Err(io::Error::other(error.to_string()));
                }
            }
            let mut used = 0;
            while let Some(len) = self.request(&input[used..])? {
                if len == 0 {
                    return Ok(());
                }
                used += len;
                if self.out.len() >= BATCH_BYTES && transport.send(&mut self.out).is_err() {
                    return Ok(());
                }
            }
            input.drain(..used);
            if transport.send(&mut self.out).is_err() {
                return Ok(());
            }
        }
    }

    /// Works off one request. How long it was; 0 for DISC; `None` if not all of it is there.
    fn request(&mut self, bytes: &[u8]) -> io::Result<Option<usize>> {
        let Some((header, rest)) = bytes.split_at_checked(REQUEST_BYTES) else {
            return Ok(None);
        };
        if header[..4] != NBD_REQUEST_MAGIC.to_be_bytes() {
            return Err(io::Error::other("not a request"));
        }
        let command = u16::from_be_bytes(header[6..8].try_into().expect("two bytes"));
        let cookie = &header[8..16];
        let offset = u64::from_be_bytes(header[16..24].try_into().expect("eight bytes")) as usize;
        let len = u32::from_be_bytes(header[24..].try_into().expect("four bytes")) as usize;
        let payload = if command == NBD_CMD_WRITE { len } else { 0 };
        if rest.len() < payload {
            return Ok(None);
        }
        let place = offset
            .checked_add(len)
            .and_then(|end| self.image.get_mut(offset..end));
        let (error, data): (u32, &[u8]) = match (command, place) {
            (NBD_CMD_DISC, _) => return Ok(Some(0)),
            (NBD_CMD_READ, Some(place)) => (0, place),
            (NBD_CMD_WRITE, Some(place)) => {
                place.copy_from_slice(&rest[..len]);
                (0, &[])
            }
            _ => (NBD_EINVAL, &[]),
        };
        let out = &mut self.out.bytes;
        out.extend_from_slice(&NBD_SIMPLE_REPLY_MAGIC.to_be_bytes());
        out.extend_from_slice(&error.to_be_bytes());
        out.extend_from_slice(cookie);
        out.extend_from_slice(data);
        Ok(Some(REQUEST_BYTES + payload))
    }
}
