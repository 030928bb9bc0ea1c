//! Every number of the NBD protocol that this server speaks, and nothing else:
//! magics, options, replies, flags, commands, errors and sizes. Written here
//! once; `negotiation`, `transmission`, `reply` and the client name them.
//!
//! Source: doc/proto.md of <https://github.com/NetworkBlockDevice/nbd>; the
//! names are the specification's. All integers on the wire are big-endian.

// ---- Handshake ---------------------------------------------------------

/// The first 8 bytes that a server sends: ASCII `NBDMAGIC`.
pub const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// ASCII `IHAVEOPT`: the server's second 8 bytes, and the start of each option.
pub const NBD_OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Starts each reply of a server to an option.
pub const NBD_OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Handshake flag: the server speaks fixed newstyle.
pub const NBD_FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag: the server can leave out the 124 zeroes after [`NBD_OPT_EXPORT_NAME`].
pub const NBD_FLAG_NO_ZEROES: u16 = 1 << 1;
/// Client flag: the client speaks fixed newstyle.
pub const NBD_FLAG_C_FIXED_NEWSTYLE: u32 = 1 << 0;
/// Client flag: leave out the 124 zeroes.
pub const NBD_FLAG_C_NO_ZEROES: u32 = 1 << 1;

/// Bytes of the server's greeting: two magics and the handshake flags.
pub const GREETING_BYTES: usize = 18;
/// Bytes of an option before its data: magic, option, length.
pub const OPTION_HEADER_BYTES: usize = 16;
/// Bytes of an option reply before its data: magic, option, type, length.
pub const OPTION_REPLY_HEADER_BYTES: usize = 20;
/// The zeroes after the answer to [`NBD_OPT_EXPORT_NAME`] unless they were negotiated away.
pub const EXPORT_NAME_ZEROES: usize = 124;
/// The longest string (export name, description, context name) in the protocol, in bytes.
pub const NBD_MAX_STRING: usize = 4096;

// ---- Options and their replies -----------------------------------------

/// Option: choose an export and begin transmission, with no way to refuse but to hang up.
pub const NBD_OPT_EXPORT_NAME: u32 = 1;
/// Option: end the session.
pub const NBD_OPT_ABORT: u32 = 2;
/// Option: list the exports.
pub const NBD_OPT_LIST: u32 = 3;
/// Option: never to be used again.
pub const NBD_OPT_PEEK_EXPORT: u32 = 4;
/// Option: begin TLS.
pub const NBD_OPT_STARTTLS: u32 = 5;
/// Option: tell about an export.
pub const NBD_OPT_INFO: u32 = 6;
/// Option: tell about an export and begin transmission.
pub const NBD_OPT_GO: u32 = 7;
/// Option: reply in chunks during transmission.
pub const NBD_OPT_STRUCTURED_REPLY: u32 = 8;
/// Option: which metadata contexts an export has.
pub const NBD_OPT_LIST_META_CONTEXT: u32 = 9;
/// Option: choose metadata contexts.
pub const NBD_OPT_SET_META_CONTEXT: u32 = 10;
/// Option: 64-bit lengths.
pub const NBD_OPT_EXTENDED_HEADERS: u32 = 11;

/// Option reply: done.
pub const NBD_REP_ACK: u32 = 1;
/// Option reply: one export of a list.
pub const NBD_REP_SERVER: u32 = 2;
/// Option reply: one piece of information about an export.
pub const NBD_REP_INFO: u32 = 3;
/// Option reply: one metadata context.
pub const NBD_REP_META_CONTEXT: u32 = 4;
/// Set in every option reply that is an error.
pub const NBD_REP_FLAG_ERROR: u32 = 1 << 31;
/// Error: the option is not known.
pub const NBD_REP_ERR_UNSUP: u32 = NBD_REP_FLAG_ERROR + 1;
/// Error: forbidden by the server's policy.
pub const NBD_REP_ERR_POLICY: u32 = NBD_REP_FLAG_ERROR + 2;
/// Error: the option's data makes no sense.
pub const NBD_REP_ERR_INVALID: u32 = NBD_REP_FLAG_ERROR + 3;
/// Error: not supported on this platform.
pub const NBD_REP_ERR_PLATFORM: u32 = NBD_REP_FLAG_ERROR + 4;
/// Error: TLS first.
pub const NBD_REP_ERR_TLS_REQD: u32 = NBD_REP_FLAG_ERROR + 5;
/// Error: no such export.
pub const NBD_REP_ERR_UNKNOWN: u32 = NBD_REP_FLAG_ERROR + 6;
/// Error: the server is shutting down.
pub const NBD_REP_ERR_SHUTDOWN: u32 = NBD_REP_FLAG_ERROR + 7;
/// Error: the client has to ask for block sizes. Never sent by this server.
pub const NBD_REP_ERR_BLOCK_SIZE_REQD: u32 = NBD_REP_FLAG_ERROR + 8;
/// Error: the option is too large to be worked off.
pub const NBD_REP_ERR_TOO_BIG: u32 = NBD_REP_FLAG_ERROR + 9;
/// Error: extended headers first. Never sent by this server.
pub const NBD_REP_ERR_EXT_HEADER_REQD: u32 = NBD_REP_FLAG_ERROR + 10;

/// Information: size and transmission flags.
pub const NBD_INFO_EXPORT: u16 = 0;
/// Information: the export's canonical name.
pub const NBD_INFO_NAME: u16 = 1;
/// Information: a description for people.
pub const NBD_INFO_DESCRIPTION: u16 = 2;
/// Information: minimum, preferred and maximum block size.
pub const NBD_INFO_BLOCK_SIZE: u16 = 3;

/// The one metadata context of the `base:` namespace.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// Status flag of `base:allocation`: a hole.
pub const NBD_STATE_HOLE: u32 = 1 << 0;
/// Status flag of `base:allocation`: reads as zeroes.
pub const NBD_STATE_ZERO: u32 = 1 << 1;

// ---- Transmission ------------------------------------------------------

/// Transmission flag: always set.
pub const NBD_FLAG_HAS_FLAGS: u16 = 1 << 0;
/// Transmission flag: writes are refused.
pub const NBD_FLAG_READ_ONLY: u16 = 1 << 1;
/// Transmission flag: [`NBD_CMD_FLUSH`] is understood.
pub const NBD_FLAG_SEND_FLUSH: u16 = 1 << 2;
/// Transmission flag: [`NBD_CMD_FLAG_FUA`] is understood.
pub const NBD_FLAG_SEND_FUA: u16 = 1 << 3;
/// Transmission flag: behaves like a rotating disk.
pub const NBD_FLAG_ROTATIONAL: u16 = 1 << 4;
/// Transmission flag: [`NBD_CMD_TRIM`] is understood.
pub const NBD_FLAG_SEND_TRIM: u16 = 1 << 5;
/// Transmission flag: [`NBD_CMD_WRITE_ZEROES`] is understood.
pub const NBD_FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
/// Transmission flag: [`NBD_CMD_FLAG_DF`] is understood. Only with structured replies.
pub const NBD_FLAG_SEND_DF: u16 = 1 << 7;
/// Transmission flag: many connections see one state; a flush on one covers all.
pub const NBD_FLAG_CAN_MULTI_CONN: u16 = 1 << 8;
/// Transmission flag: an experimental extension. Never set by this server.
pub const NBD_FLAG_SEND_RESIZE: u16 = 1 << 9;
/// Transmission flag: [`NBD_CMD_CACHE`] is understood.
pub const NBD_FLAG_SEND_CACHE: u16 = 1 << 10;
/// Transmission flag: [`NBD_CMD_FLAG_FAST_ZERO`] is understood.
pub const NBD_FLAG_SEND_FAST_ZERO: u16 = 1 << 11;
/// Transmission flag: payload in [`NBD_CMD_BLOCK_STATUS`]. Never set by this server.
pub const NBD_FLAG_BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;

/// Starts each request.
pub const NBD_REQUEST_MAGIC: u32 = 0x2560_9513;
/// Starts each simple reply.
pub const NBD_SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Starts each chunk of a structured reply.
pub const NBD_STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Bytes of a request without its payload: magic, command flags, type, cookie, offset, length.
pub const REQUEST_BYTES: usize = 28;
/// Bytes of a simple reply without its data: magic, error, cookie.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// Bytes of a structured reply chunk without its payload: magic, flags, type, cookie, length.
pub const STRUCTURED_REPLY_BYTES: usize = 20;
/// The largest payload that every peer has to expect where no block sizes were agreed.
pub const DEFAULT_MAX_PAYLOAD: u32 = 32 << 20;

/// Command: read.
pub const NBD_CMD_READ: u16 = 0;
/// Command: write.
pub const NBD_CMD_WRITE: u16 = 1;
/// Command: disconnect. It has no reply.
pub const NBD_CMD_DISC: u16 = 2;
/// Command: make what was answered before durable.
pub const NBD_CMD_FLUSH: u16 = 3;
/// Command: discard.
pub const NBD_CMD_TRIM: u16 = 4;
/// Command: read ahead.
pub const NBD_CMD_CACHE: u16 = 5;
/// Command: write zeroes.
pub const NBD_CMD_WRITE_ZEROES: u16 = 6;
/// Command: metadata of a range.
pub const NBD_CMD_BLOCK_STATUS: u16 = 7;
/// Command: an experimental extension. Never understood by this server.
pub const NBD_CMD_RESIZE: u16 = 8;

/// Command flag: durable before the reply.
pub const NBD_CMD_FLAG_FUA: u16 = 1 << 0;
/// Command flag of WRITE_ZEROES: keep the range allocated.
pub const NBD_CMD_FLAG_NO_HOLE: u16 = 1 << 1;
/// Command flag of READ: answer in one content chunk.
pub const NBD_CMD_FLAG_DF: u16 = 1 << 2;
/// Command flag of BLOCK_STATUS: one extent a context.
pub const NBD_CMD_FLAG_REQ_ONE: u16 = 1 << 3;
/// Command flag of WRITE_ZEROES: fail where it would be no faster than a write.
pub const NBD_CMD_FLAG_FAST_ZERO: u16 = 1 << 4;
/// Command flag of extended headers. Never understood by this server.
pub const NBD_CMD_FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// Structured reply flag: the last chunk of its request.
pub const NBD_REPLY_FLAG_DONE: u16 = 1 << 0;

/// Chunk without content: only ends a reply.
pub const NBD_REPLY_TYPE_NONE: u16 = 0;
/// Chunk: a 64-bit offset and the bytes there.
pub const NBD_REPLY_TYPE_OFFSET_DATA: u16 = 1;
/// Chunk: a 64-bit offset and a 32-bit length of zeroes there.
pub const NBD_REPLY_TYPE_OFFSET_HOLE: u16 = 2;
/// Chunk: a 32-bit context id, then pairs of 32-bit length and 32-bit status flags.
pub const NBD_REPLY_TYPE_BLOCK_STATUS: u16 = 5;
/// Set in the type of every chunk that is an error.
pub const NBD_REPLY_TYPE_FLAG_ERROR: u16 = 1 << 15;
/// Chunk: a 32-bit error, a 16-bit message length and the message.
pub const NBD_REPLY_TYPE_ERROR: u16 = NBD_REPLY_TYPE_FLAG_ERROR + 1;
/// Chunk: as [`NBD_REPLY_TYPE_ERROR`], then a 64-bit offset.
pub const NBD_REPLY_TYPE_ERROR_OFFSET: u16 = NBD_REPLY_TYPE_FLAG_ERROR + 2;

// ---- Errors ------------------------------------------------------------

/// Error: operation not permitted (a write to a read-only export).
pub const NBD_EPERM: u32 = 1;
/// Error: input/output error.
pub const NBD_EIO: u32 = 5;
/// Error: cannot allocate memory.
pub const NBD_ENOMEM: u32 = 12;
/// Error: invalid argument.
pub const NBD_EINVAL: u32 = 22;
/// Error: no space left on device.
pub const NBD_ENOSPC: u32 = 28;
/// Error: value too large.
pub const NBD_EOVERFLOW: u32 = 75;
/// Error: operation not supported.
pub const NBD_ENOTSUP: u32 = 95;
/// Error: the server is about to shut down.
pub const NBD_ESHUTDOWN: u32 = 108;

// ---- TCP ---------------------------------------------------------------

/// The port that IANA assigned to NBD.
pub const NBD_DEFAULT_PORT: u16 = 10809;
