//! The server's side of the fixed newstyle handshake, as a state machine over
//! bytes: no socket, no clock. One [`Negotiation`] lives for one connection and
//! shares nothing with any other.
//!
//! Order of calls: [`Negotiation::new`] has a greeting ready, so begin by
//! sending what [`Negotiation::poll_output`] gives. Then read from the client
//! and call [`Negotiation::handle_input`] until it returns a last word:
//!
//! | returned | then |
//! |---|---|
//! | [`Step::NeedMore`] | send the output, read more |
//! | [`Step::SendFirst`] | send the output, call again before reading more |
//! | [`Step::Done`] | send the output; the rest of the input belongs to transmission |
//! | [`Step::Ended`] | send the output, close |
//! | [`Refusal`] | send the output, close, log the reason |
//!
//! Promises: no input makes it panic; it never holds more than one option's
//! data ([`MAX_OPTION_BYTES`]) and asks the caller's buffer to hold no more
//! than that; between two sends it produces at most [`SEND_FIRST_BYTES`] plus
//! the answer to one option; a client has [`MAX_OPTIONS`] options in all. The
//! time a client may take is the caller's to limit.
//!
//! What is not offered: TLS (STARTTLS is answered ERR_UNSUP) and extended
//! headers, like every unknown option.

mod decode;
mod options;

use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};

use self::options::Choices;
use super::export::Catalog;
use super::wire::{
    GREETING_BYTES, NBD_FLAG_C_FIXED_NEWSTYLE, NBD_FLAG_C_NO_ZEROES, NBD_FLAG_FIXED_NEWSTYLE,
    NBD_FLAG_NO_ZEROES, NBD_MAGIC, NBD_OPTION_MAGIC, OPTION_HEADER_BYTES,
};

/// The longest option whose data is looked at. Enough for every name and
/// thousands of queries.
pub const MAX_OPTION_BYTES: usize = 64 << 10;
/// Longer options are read past and answered ERR_TOO_BIG up to this length;
/// beyond it the client is dropped.
pub const MAX_SKIPPED_BYTES: u32 = 1 << 20;
/// Options a client may send, listing and all.
pub const MAX_OPTIONS: u32 = 64;
/// With this much output waiting, no further option is worked on.
pub const SEND_FIRST_BYTES: usize = 64 << 10;

/// What a handshake came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// The index of the export in the [`Catalog`] that this negotiation looked at last.
    pub export: usize,
    /// The transmission flags that the client was told.
    pub flags: u16,
    /// Reads are answered in chunks.
    pub structured_replies: bool,
    /// The id of the `base:allocation` context, if the client has chosen it for
    /// this export; without it, BLOCK_STATUS is invalid.
    pub base_allocation: Option<u32>,
}

/// How far a handshake has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// The input is used up as far as it goes.
    NeedMore,
    /// There is so much output that it has to go first.
    SendFirst,
    /// Transmission begins.
    Done(Agreed),
    /// The client has said goodbye.
    Ended,
}

/// Why a client is dropped, for the log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Flags that no specification knows: the client would expect what we cannot know.
    #[error("client flags {0:#x} are not known; an NBD client sends bits 0 and 1 only")]
    UnknownClientFlags(u32),
    /// Not an NBD client, or out of step.
    #[error("an option begins with {0:#018x} instead of IHAVEOPT: not an NBD client")]
    BadOptionMagic(u64),
    /// An option that is longer than anyone needs.
    #[error("option {option} announces {len} bytes of data, more than {MAX_SKIPPED_BYTES}")]
    OptionTooLong {
        /// The option.
        option: u32,
        /// The length that it announces.
        len: u32,
    },
    /// A client that only ever asks.
    #[error("more than {MAX_OPTIONS} options without beginning transmission")]
    TooManyOptions,
    /// EXPORT_NAME has no way to answer an error but to hang up.
    #[error("no export is named {0:?}, and EXPORT_NAME leaves no way to say so")]
    UnknownExport(String),
    /// EXPORT_NAME with a name that breaks the rules, or while the server stops.
    #[error("EXPORT_NAME cannot be granted: {0}")]
    ExportName(&'static str),
}

/// What the next input bytes are.
#[derive(Debug)]
enum State {
    /// The client's 32 flags.
    ClientFlags,
    /// The header of an option.
    OptionHeader,
    /// All the data of an option. It stays in the caller's buffer until it is whole.
    OptionData { option: u32, len: usize },
    /// What is left of an option that is too long; answered at its end.
    Skipping { option: u32, left: usize },
    /// A last word was returned.
    Finished,
}

/// The handshake of one connection. The module's text has the order of calls.
#[derive(Debug)]
pub struct Negotiation {
    catalog: Arc<Catalog>,
    state: State,
    output: BytesMut,
    no_zeroes: bool,
    shutting_down: bool,
    options_seen: u32,
    choices: Choices,
}

impl Negotiation {
    /// Begins a handshake over the exports of `catalog`; its greeting waits in
    /// [`poll_output`](Self::poll_output).
    pub fn new(catalog: Arc<Catalog>) -> Self {
        let mut output = BytesMut::with_capacity(512);
        output.extend_from_slice(&NBD_MAGIC.to_be_bytes());
        output.extend_from_slice(&NBD_OPTION_MAGIC.to_be_bytes());
        let flags = NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES;
        output.extend_from_slice(&flags.to_be_bytes());
        debug_assert_eq!(output.len(), GREETING_BYTES);
        Self {
            catalog,
            state: State::ClientFlags,
            output,
            no_zeroes: false,
            shutting_down: false,
            options_seen: 0,
            choices: Choices::default(),
        }
    }

    /// Exports have come or gone: from now on `catalog` is what the client is
    /// told of and chooses from.
    pub fn look_at(&mut self, catalog: &Arc<Catalog>) {
        if Arc::ptr_eq(&self.catalog, catalog) {
            return;
        }
        let chosen = self.choices.base_allocation_of;
        self.choices.base_allocation_of =
            chosen.and_then(|index| catalog.find(&self.catalog.exports()[index].name));
        self.catalog = Arc::clone(catalog);
    }

    /// From now on every option but ABORT is answered ERR_SHUTDOWN.
    pub fn shut_down(&mut self) {
        self.shutting_down = true;
    }

    /// All bytes that wait to be sent, or none.
    pub fn poll_output(&mut self) -> Option<Bytes> {
        (!self.output.is_empty()).then(|| self.output.split().freeze())
    }

    /// Takes from the front of `input` what it can use. Bytes it leaves there
    /// are either the beginning of an option (after [`Step::NeedMore`]), options
    /// for the next call, or the beginning of transmission.
    ///
    /// # Panics
    /// If called after [`Step::Done`], [`Step::Ended`] or a [`Refusal`].
    pub fn handle_input(&mut self, input: &mut BytesMut) -> Result<Step, Refusal> {
        let step = self.advance(input);
        if !matches!(step, Ok(Step::NeedMore | Step::SendFirst)) {
            self.state = State::Finished;
        }
        step
    }

    fn advance(&mut self, input: &mut BytesMut) -> Result<Step, Refusal> {
        loop {
            let handled = match self.state {
                State::ClientFlags => {
                    if input.len() < 4 {
                        return Ok(Step::NeedMore);
                    }
                    self.handle_client_flags(input.get_u32())?;
                    None
                }
                State::OptionHeader => {
                    if self.output.len() >= SEND_FIRST_BYTES {
                        return Ok(Step::SendFirst);
                    }
                    if input.len() < OPTION_HEADER_BYTES {
                        return Ok(Step::NeedMore);
                    }
                    self.handle_header(input.get_u64(), input.get_u32(), input.get_u32())?;
                    None
                }
                State::OptionData { option, len } => {
                    if input.len() < len {
                        return Ok(Step::NeedMore);
                    }
                    let data = input.split_to(len);
                    self.state = State::OptionHeader;
                    self.handle_option(option, &data)?
                }
                State::Skipping { option, left } => {
                    let skipped = input.len().min(left);
                    input.advance(skipped);
                    if skipped < left {
                        let left = left - skipped;
                        self.state = State::Skipping { option, left };
                        return Ok(Step::NeedMore);
                    }
                    self.state = State::OptionHeader;
                    self.handle_skipped_option(option)?
                }
                State::Finished => panic!("a handshake that is over was given more input"),
            };
            if let Some(last_word) = handled {
                return Ok(last_word);
            }
        }
    }

    fn handle_client_flags(&mut self, flags: u32) -> Result<(), Refusal> {
        if flags & !(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES) != 0 {
            return Err(Refusal::UnknownClientFlags(flags));
        }
        // A client that leaves FIXED_NEWSTYLE out should only send EXPORT_NAME;
        // the specification lets us answer its other options all the same.
        self.no_zeroes = flags & NBD_FLAG_C_NO_ZEROES != 0;
        self.state = State::OptionHeader;
        Ok(())
    }

    fn handle_header(&mut self, magic: u64, option: u32, len: u32) -> Result<(), Refusal> {
        if magic != NBD_OPTION_MAGIC {
            return Err(Refusal::BadOptionMagic(magic));
        }
        self.options_seen += 1;
        if self.options_seen > MAX_OPTIONS {
            return Err(Refusal::TooManyOptions);
        }
        if len > MAX_SKIPPED_BYTES {
            return Err(Refusal::OptionTooLong { option, len });
        }
        let len = len as usize;
        self.state = if len > MAX_OPTION_BYTES {
            State::Skipping { option, left: len }
        } else {
            State::OptionData { option, len }
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests;
