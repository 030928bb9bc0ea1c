//! The client's side of the handshake, one option at a time: what the server
//! offers can be looked at, and probes can send what no client would.

use std::io::Write;

use bytes::{Buf, BufMut};

use super::Client;
use super::buffer::InputBuffer;
use super::error::ClientError;
use super::stream::Stream;
use crate::nbd::export::BlockSize;
use crate::nbd::uri::{ListenAddr, NbdUri};
use crate::nbd::wire::{
    BASE_ALLOCATION, EXPORT_NAME_ZEROES, GREETING_BYTES, NBD_FLAG_C_FIXED_NEWSTYLE,
    NBD_FLAG_C_NO_ZEROES, NBD_FLAG_FIXED_NEWSTYLE, NBD_FLAG_NO_ZEROES, NBD_INFO_BLOCK_SIZE,
    NBD_INFO_DESCRIPTION, NBD_INFO_EXPORT, NBD_INFO_NAME, NBD_MAGIC, NBD_OPT_ABORT,
    NBD_OPT_EXPORT_NAME, NBD_OPT_GO, NBD_OPT_INFO, NBD_OPT_LIST, NBD_OPT_LIST_META_CONTEXT,
    NBD_OPT_SET_META_CONTEXT, NBD_OPT_STRUCTURED_REPLY, NBD_OPTION_MAGIC, NBD_OPTION_REPLY_MAGIC,
    NBD_REP_FLAG_ERROR, NBD_REP_INFO, NBD_REP_META_CONTEXT, NBD_REP_SERVER,
    OPTION_REPLY_HEADER_BYTES,
};

/// No reply to an option is longer than a name and a description.
const MAX_REPLY_BYTES: usize = 16 << 10;

/// How to connect: what to agree with the server, as far as it can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connect {
    /// Ask for structured replies.
    pub structured_replies: bool,
    /// Ask for `base:allocation`; needs structured replies.
    pub base_allocation: bool,
    /// Begin with EXPORT_NAME, as old clients do, instead of GO.
    pub by_export_name: bool,
}

impl Default for Connect {
    fn default() -> Self {
        Self {
            structured_replies: true,
            base_allocation: true,
            by_export_name: false,
        }
    }
}

impl Connect {
    /// Plain old NBD: simple replies, no extents.
    pub fn simple() -> Self {
        Self {
            structured_replies: false,
            base_allocation: false,
            by_export_name: false,
        }
    }

    /// Connects to the export of `uri`.
    pub fn to(self, uri: &NbdUri) -> Result<Client, ClientError> {
        let mut handshake = Handshake::connect(&uri.address)?;
        let structured = self.structured_replies && handshake.structured_replies()?;
        if structured && self.base_allocation {
            handshake.set_meta_contexts(&uri.export, &[BASE_ALLOCATION])?;
        }
        if self.by_export_name {
            handshake.export_name(&uri.export)
        } else {
            handshake.go(&uri.export)
        }
    }
}

/// What a server says about an export.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExportInfo {
    /// Bytes.
    pub size: u64,
    /// Transmission flags, `NBD_FLAG_*`.
    pub flags: u16,
    /// The canonical name, where the server told it.
    pub name: Option<String>,
    /// The description, where the server told it.
    pub description: Option<String>,
    /// The block sizes, where the server told them.
    pub block_size: Option<BlockSize>,
    /// Structured replies are agreed.
    pub structured_replies: bool,
    /// The id of `base:allocation`, if that is agreed.
    pub base_allocation: Option<u32>,
}

/// An entry of the server's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedExport {
    /// The name.
    pub name: String,
    /// The description, perhaps empty.
    pub description: String,
}

/// One reply to an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionReply {
    /// The option that it answers.
    pub option: u32,
    /// `NBD_REP_*`.
    pub kind: u32,
    /// Its data.
    pub data: Vec<u8>,
}

impl OptionReply {
    /// Is it an error?
    pub fn is_error(&self) -> bool {
        self.kind & NBD_REP_FLAG_ERROR != 0
    }

    /// The error that it is, if it is one.
    pub fn check(&self) -> Result<(), ClientError> {
        if !self.is_error() {
            return Ok(());
        }
        Err(ClientError::Refused {
            option: self.option,
            kind: self.kind,
            message: String::from_utf8_lossy(&self.data).into_owned(),
        })
    }
}

/// A connection in its handshake.
#[derive(Debug)]
pub struct Handshake {
    stream: Stream,
    input: InputBuffer,
    no_zeroes: bool,
    structured_replies: bool,
    base_allocation: Option<u32>,
}

impl Handshake {
    /// Connects, and begins fixed newstyle.
    pub fn connect(address: &ListenAddr) -> Result<Self, ClientError> {
        let flags = NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES;
        Self::begin(Stream::connect(address)?, flags)
    }

    /// Takes the greeting of the server behind `stream` and answers with these
    /// flags, less those that the server does not know.
    pub fn begin(stream: Stream, client_flags: u32) -> Result<Self, ClientError> {
        let mut this = Self {
            stream,
            input: InputBuffer::new(),
            no_zeroes: false,
            structured_replies: false,
            base_allocation: None,
        };
        let greeting = this.receive(GREETING_BYTES)?;
        let mut greeting = &greeting[..];
        let magics = (greeting.get_u64(), greeting.get_u64());
        if magics != (NBD_MAGIC, NBD_OPTION_MAGIC) {
            return Err(broken(format!(
                "greeting {magics:x?}: no newstyle NBD server"
            )));
        }
        let server_flags = greeting.get_u16();
        if server_flags & NBD_FLAG_FIXED_NEWSTYLE == 0 {
            return Err(broken("the server does not speak fixed newstyle"));
        }
        let mut flags = client_flags;
        if server_flags & NBD_FLAG_NO_ZEROES == 0 {
            flags &= !NBD_FLAG_C_NO_ZEROES;
        }
        this.no_zeroes = flags & NBD_FLAG_C_NO_ZEROES != 0;
        this.stream.write_all(&flags.to_be_bytes())?;
        Ok(this)
    }

    /// The bare socket.
    pub fn stream(&mut self) -> &mut Stream {
        &mut self.stream
    }

    // ---- What a client asks ------------------------------------------------

    /// Asks for structured replies; true if they are agreed.
    pub fn structured_replies(&mut self) -> Result<bool, ClientError> {
        let replies = self.ask(NBD_OPT_STRUCTURED_REPLY, &[])?;
        self.structured_replies = !replies[0].is_error();
        Ok(self.structured_replies)
    }

    /// Chooses the metadata contexts that match `queries`: ids and names.
    pub fn set_meta_contexts(
        &mut self,
        export: &str,
        queries: &[&str],
    ) -> Result<Vec<(u32, String)>, ClientError> {
        let contexts = self.meta_contexts(NBD_OPT_SET_META_CONTEXT, export, queries)?;
        let chosen = contexts.iter().find(|(_, name)| name == BASE_ALLOCATION);
        self.base_allocation = chosen.map(|(id, _)| *id);
        Ok(contexts)
    }

    /// The metadata contexts that match `queries`, or all of them.
    pub fn list_meta_contexts(
        &mut self,
        export: &str,
        queries: &[&str],
    ) -> Result<Vec<String>, ClientError> {
        let contexts = self.meta_contexts(NBD_OPT_LIST_META_CONTEXT, export, queries)?;
        Ok(contexts.into_iter().map(|(_, name)| name).collect())
    }

    fn meta_contexts(
        &mut self,
        option: u32,
        export: &str,
        queries: &[&str],
    ) -> Result<Vec<(u32, String)>, ClientError> {
        let mut data = string(export);
        data.put_u32(queries.len() as u32);
        for query in queries {
            data.put_slice(&string(query));
        }
        let mut contexts = Vec::new();
        for reply in self.ask_for(option, &data, NBD_REP_META_CONTEXT)? {
            let mut data = &reply.data[..];
            let id = data.try_get_u32().map_err(|_| broken("a short context"))?;
            contexts.push((id, text(data)?));
        }
        Ok(contexts)
    }

    /// The server's list of exports.
    pub fn list_exports(&mut self) -> Result<Vec<ListedExport>, ClientError> {
        let mut exports = Vec::new();
        for reply in self.ask_for(NBD_OPT_LIST, &[], NBD_REP_SERVER)? {
            let mut data = &reply.data[..];
            let len = data
                .try_get_u32()
                .map_err(|_| broken("a short list entry"))?;
            let (name, description) = data
                .split_at_checked(len as usize)
                .ok_or_else(|| broken("a list entry's name is longer than the entry"))?;
            exports.push(ListedExport {
                name: text(name)?,
                description: text(description)?,
            });
        }
        Ok(exports)
    }

    /// All that the server tells about an export.
    pub fn info(&mut self, export: &str) -> Result<ExportInfo, ClientError> {
        self.info_or_go(NBD_OPT_INFO, export)
    }

    /// Begins transmission with an export.
    pub fn go(mut self, export: &str) -> Result<Client, ClientError> {
        let info = self.info_or_go(NBD_OPT_GO, export)?;
        Ok(Client::new(self.stream, self.input, info))
    }

    /// Begins transmission as old clients do. If there is no such export, the
    /// server can only hang up.
    pub fn export_name(mut self, export: &str) -> Result<Client, ClientError> {
        self.send_option(NBD_OPT_EXPORT_NAME, export.as_bytes())?;
        let zeroes = if self.no_zeroes {
            0
        } else {
            EXPORT_NAME_ZEROES
        };
        let reply = self.receive(10 + zeroes)?;
        let mut reply = &reply[..];
        let mut info = self.agreed();
        info.size = reply.get_u64();
        info.flags = reply.get_u16();
        if reply.iter().any(|byte| *byte != 0) {
            return Err(broken("the zeroes after EXPORT_NAME are none"));
        }
        Ok(Client::new(self.stream, self.input, info))
    }

    /// Ends the handshake without an export.
    pub fn abort(mut self) -> Result<(), ClientError> {
        self.ask_for(NBD_OPT_ABORT, &[], 0).map(drop)
    }

    fn info_or_go(&mut self, option: u32, export: &str) -> Result<ExportInfo, ClientError> {
        let mut request = string(export);
        let asked = [NBD_INFO_NAME, NBD_INFO_DESCRIPTION, NBD_INFO_BLOCK_SIZE];
        request.put_u16(asked.len() as u16);
        for info in asked {
            request.put_u16(info);
        }
        let mut info = self.agreed();
        let mut told = false;
        for reply in self.ask_for(option, &request, NBD_REP_INFO)? {
            let mut data = &reply.data[..];
            let kind = data.try_get_u16().map_err(|_| broken("a short info"))?;
            match kind {
                NBD_INFO_EXPORT if data.len() == 10 => {
                    told = true;
                    info.size = data.get_u64();
                    info.flags = data.get_u16();
                }
                NBD_INFO_NAME => info.name = Some(text(data)?),
                NBD_INFO_DESCRIPTION => info.description = Some(text(data)?),
                NBD_INFO_BLOCK_SIZE if data.len() == 12 => {
                    info.block_size = Some(BlockSize {
                        minimum: data.get_u32(),
                        preferred: data.get_u32(),
                        maximum: data.get_u32(),
                    });
                }
                NBD_INFO_EXPORT | NBD_INFO_BLOCK_SIZE => {
                    return Err(broken(format!("info {kind} of {} bytes", reply.data.len())));
                }
                _ => {}
            }
        }
        if told {
            Ok(info)
        } else {
            Err(broken("the server did not tell the size of the export"))
        }
    }

    fn agreed(&self) -> ExportInfo {
        ExportInfo {
            structured_replies: self.structured_replies,
            base_allocation: self.base_allocation,
            ..ExportInfo::default()
        }
    }

    // ---- One option at a time --------------------------------------------

    /// Sends an option with any data and takes its replies, the last of which
    /// is an ACK or an error.
    pub fn ask(&mut self, option: u32, data: &[u8]) -> Result<Vec<OptionReply>, ClientError> {
        self.send_option(option, data)?;
        let mut replies = Vec::new();
        loop {
            let reply = self.receive_reply()?;
            if reply.option != option {
                let other = reply.option;
                return Err(broken(format!("a reply to option {other}, not {option}")));
            }
            let more = [NBD_REP_SERVER, NBD_REP_INFO, NBD_REP_META_CONTEXT].contains(&reply.kind);
            replies.push(reply);
            if !more {
                return Ok(replies);
            }
        }
    }

    /// As [`ask`](Self::ask), for the replies of one kind before an ACK.
    fn ask_for(
        &mut self,
        option: u32,
        data: &[u8],
        kind: u32,
    ) -> Result<Vec<OptionReply>, ClientError> {
        let mut replies = self.ask(option, data)?;
        let last = replies.pop().expect("ask returns at least one reply");
        last.check()?;
        match replies.iter().find(|reply| reply.kind != kind) {
            Some(other) => Err(broken(format!(
                "{} in reply to option {option}",
                other.kind
            ))),
            None => Ok(replies),
        }
    }

    /// Sends an option with any data.
    pub fn send_option(&mut self, option: u32, data: &[u8]) -> Result<(), ClientError> {
        let mut bytes = Vec::with_capacity(16 + data.len());
        bytes.put_u64(NBD_OPTION_MAGIC);
        bytes.put_u32(option);
        bytes.put_u32(data.len() as u32);
        bytes.put_slice(data);
        Ok(self.stream.write_all(&bytes)?)
    }

    /// Takes the next reply to an option.
    pub fn receive_reply(&mut self) -> Result<OptionReply, ClientError> {
        let header = self.receive(OPTION_REPLY_HEADER_BYTES)?;
        let mut header = &header[..];
        let magic = header.get_u64();
        if magic != NBD_OPTION_REPLY_MAGIC {
            return Err(broken(format!("an option reply begins with {magic:#x}")));
        }
        let (option, kind) = (header.get_u32(), header.get_u32());
        let len = header.get_u32() as usize;
        if len > MAX_REPLY_BYTES {
            return Err(broken(format!("an option reply of {len} bytes")));
        }
        let data = self.receive(len)?;
        Ok(OptionReply { option, kind, data })
    }

    fn receive(&mut self, len: usize) -> Result<Vec<u8>, ClientError> {
        while self.input.peek().len() < len {
            if self.input.read_from(&mut self.stream, len)? == 0 {
                return Err(ClientError::Closed);
            }
        }
        let range = self.input.take(len);
        Ok(self.input.taken(range).to_vec())
    }
}

/// A string with its length before it.
fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u32).to_be_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

fn text(bytes: &[u8]) -> Result<String, ClientError> {
    let text = std::str::from_utf8(bytes);
    Ok(text
        .map_err(|_| broken("a string that is not UTF-8"))?
        .to_owned())
}

fn broken(what: impl Into<String>) -> ClientError {
    ClientError::Protocol(what.into())
}
