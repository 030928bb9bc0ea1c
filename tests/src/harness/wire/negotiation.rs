//! The option phase, as a client that may also say wrong things.

use std::io::{self, Write};

use super::{
    Address, C_FIXED_NEWSTYLE, C_NO_ZEROES, Session, Socket, be16, be32, be64, check, info, opt,
    rep,
};

const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// One reply to an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionReply {
    /// Its kind, see [`rep`].
    pub kind: u32,
    /// What came with it.
    pub data: Vec<u8>,
}

/// A connection in the option phase.
#[derive(Debug)]
pub struct Negotiation {
    /// The socket.
    pub socket: Socket,
}

impl Negotiation {
    /// Connect and greet with the usual client flags.
    pub fn start(address: &Address) -> io::Result<Self> {
        Self::start_with_flags(address, C_FIXED_NEWSTYLE | C_NO_ZEROES)
    }

    /// Connect and greet with any client flags.
    pub fn start_with_flags(address: &Address, flags: u32) -> io::Result<Self> {
        let mut socket = Socket::connect(address)?;
        check("the greeting", socket.u64()?, NBDMAGIC)?;
        check("the greeting's second half", socket.u64()?, IHAVEOPT)?;
        let server_flags = socket.u16()?;
        check("the handshake flags", u64::from(server_flags), 3)?;
        socket.write_all(&flags.to_be_bytes())?;
        Ok(Self { socket })
    }

    /// Send an option.
    pub fn send(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        self.send_with_length(option, data.len() as u32, data)
    }

    /// Send an option whose length says something else than its data.
    pub fn send_with_length(&mut self, option: u32, len: u32, data: &[u8]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(16 + data.len());
        bytes.extend_from_slice(&IHAVEOPT.to_be_bytes());
        bytes.extend_from_slice(&option.to_be_bytes());
        bytes.extend_from_slice(&len.to_be_bytes());
        bytes.extend_from_slice(data);
        self.socket.write_all(&bytes)
    }

    /// The next reply, which must be to `option`.
    pub fn reply(&mut self, option: u32) -> io::Result<OptionReply> {
        check(
            "an option reply's magic",
            self.socket.u64()?,
            OPTION_REPLY_MAGIC,
        )?;
        check(
            "the option of a reply",
            u64::from(self.socket.u32()?),
            u64::from(option),
        )?;
        let kind = self.socket.u32()?;
        let len = self.socket.u32()?;
        if len > 1 << 20 {
            return Err(io::Error::other(format!("an option reply of {len} bytes")));
        }
        let data = self.socket.take(len as usize)?;
        Ok(OptionReply { kind, data })
    }

    /// Send an option and take replies up to an ACK or an error; that one is the last.
    pub fn ask(&mut self, option: u32, data: &[u8]) -> io::Result<Vec<OptionReply>> {
        self.send(option, data)?;
        let mut replies = Vec::new();
        loop {
            let reply = self.reply(option)?;
            let last = reply.kind == rep::ACK || reply.kind >= 0x8000_0000;
            replies.push(reply);
            if last {
                return Ok(replies);
            }
        }
    }

    /// NBD_OPT_GO for `export`, asking for every info.
    pub fn go(mut self, export: &str) -> io::Result<Session> {
        let replies = self.ask(
            opt::GO,
            &info_request(
                export.as_bytes(),
                &[info::BLOCK_SIZE, info::NAME, info::DESCRIPTION],
            ),
        )?;
        let last = replies.last().map_or(0, |reply| reply.kind);
        check(
            "the end of NBD_OPT_GO",
            u64::from(last),
            u64::from(rep::ACK),
        )?;
        let mut session = Session {
            socket: self.socket,
            size: 0,
            flags: 0,
            block_sizes: None,
            structured: false,
        };
        for reply in replies.iter().filter(|reply| reply.kind == rep::INFO) {
            let data = &reply.data;
            match (be16(data, 0), data.len()) {
                (info::EXPORT, 12) => {
                    (session.size, session.flags) = (be64(data, 2), be16(data, 10));
                }
                (info::BLOCK_SIZE, 14) => {
                    session.block_sizes = Some([be32(data, 2), be32(data, 6), be32(data, 10)]);
                }
                _ => {}
            }
        }
        Ok(session)
    }
}

/// The data of NBD_OPT_INFO and NBD_OPT_GO.
pub fn info_request(name: &[u8], infos: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name);
    data.extend_from_slice(&(infos.len() as u16).to_be_bytes());
    for info in infos {
        data.extend_from_slice(&info.to_be_bytes());
    }
    data
}

/// The data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.
pub fn meta_request(name: &[u8], queries: &[&str]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name);
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend_from_slice(&(query.len() as u32).to_be_bytes());
        data.extend_from_slice(query.as_bytes());
    }
    data
}
