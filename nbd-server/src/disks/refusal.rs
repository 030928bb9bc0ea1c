//! Why a disk or a store is not served: one line that names the path, the cause
//! and what can be done. The wording of the command line lives here.

use std::io;
use std::path::{Path, PathBuf};

use nbdsnap_engine::{DiskError, OpenError};
use nbdsnap_format::ChunkSizeError;
use rustix::io::Errno;

use crate::cli::size;

/// A path and why it is refused.
#[derive(Debug, thiserror::Error)]
#[error("{}: {cause}", shown(path))]
pub struct Refusal {
    /// As it was given.
    pub path: PathBuf,
    /// Why.
    pub cause: Cause,
}

impl Refusal {
    /// `path` is refused for `cause`.
    pub fn new(path: &Path, cause: Cause) -> Self {
        Self {
            path: path.to_owned(),
            cause,
        }
    }

    /// Somebody else uses it.
    pub(crate) fn is_busy(&self) -> bool {
        let cause = &self.cause;
        matches!(cause, Cause::Busy | Cause::Locked | Cause::Twice { .. })
    }

    /// Something that was done to `path` failed in the operating system.
    pub(crate) fn io(path: &Path, doing: &'static str, error: &io::Error) -> Self {
        let errno = Errno::from_io_error(error);
        let cause = match errno {
            Some(Errno::NOENT) => Cause::Missing,
            Some(Errno::NOTDIR) => Cause::NotAFolder,
            Some(Errno::ACCESS | Errno::PERM) => Cause::Permission(doing),
            Some(Errno::ROFS) => Cause::ReadOnlyFileSystem,
            Some(Errno::BUSY) => Cause::Busy,
            Some(Errno::MFILE | Errno::NFILE) => Cause::TooManyFiles,
            Some(Errno::NOSPC | Errno::DQUOT) => Cause::NoSpace(doing),
            _ => Cause::System {
                doing,
                error: io::Error::other(error.to_string()),
            },
        };
        Self::new(path, cause)
    }

    /// The same for an operation that the engine asked for.
    pub(super) fn disk(path: &Path, doing: &'static str, error: DiskError) -> Self {
        match error {
            DiskError::NoSpace => Self::new(path, Cause::NoSpace(doing)),
            DiskError::Io(errno) => Self::io(path, doing, &io::Error::from_raw_os_error(errno)),
        }
    }
}

/// Why a path is refused.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// Nothing is there.
    #[error("no such file or device")]
    Missing,
    /// A store cannot be made there.
    #[error("the folder {0} does not exist: make it first")]
    NoFolder(String),
    /// A part of the path is no folder.
    #[error("a part of this path is not a folder")]
    NotAFolder,
    /// A symbolic link to nothing.
    #[error("a symbolic link to a path that does not exist: name the target itself")]
    DanglingLink,
    /// A directory.
    #[error("is a directory: name a disk image or a block device")]
    Directory,
    /// A FIFO, a socket or a character device.
    #[error("is a {0}: name a disk image or a block device")]
    NotADisk(&'static str),
    /// EACCES or EPERM.
    #[error(
        "permission denied ({0}): change the permissions or the user; --read-only needs no more than reading"
    )]
    Permission(&'static str),
    /// EROFS.
    #[error("lies on a read-only file system: serve it with --read-only")]
    ReadOnlyFileSystem,
    /// EBUSY from a block device.
    #[error(
        "the device is in use (mounted, served by another server, or a part of another device): free it first, or serve it with --read-only"
    )]
    Busy,
    /// EMFILE or ENFILE.
    #[error(
        "too many files are open: raise the server's limit (ulimit -n, or LimitNOFILE= of systemd)"
    )]
    TooManyFiles,
    /// Somebody else holds its lock.
    #[error(
        "is already open in another server or locked by another program: stop that one first ('fuser -v' names it)"
    )]
    Locked,
    /// It was replaced between the look at it and its opening.
    #[error("was replaced while it was being opened: try again")]
    Replaced,
    /// The same file has another part in the same command.
    #[error("is the same file as {other}, {role}: each disk and each COW store needs its own")]
    Twice {
        /// The path it was given before.
        other: String,
        /// What it is there.
        role: String,
    },
    /// An empty origin.
    #[error("has a size of 0: there is nothing to serve")]
    Empty,
    /// An origin that does not end on a sector.
    #[error(
        "has a size of {0} bytes, which is no multiple of 512: pad it, for example with 'truncate -s %512'"
    )]
    NotSectors(u64),
    /// An impossible `chunk=`.
    #[error("{0}: use a power of two from 1 sector (1s) to 1G")]
    Chunk(ChunkSizeError),
    /// A chunk size that a disk cannot do.
    #[error("chunk size {} is smaller than the logical block size {block} of {disk}: use chunk={block} or more", size::show(*chunk))]
    ChunkBelowBlock {
        /// In bytes.
        chunk: u64,
        /// The disk.
        disk: String,
        /// Its logical block size.
        block: u32,
    },
    /// Something that is not a store lies where one is to be made.
    #[error(
        "holds something else, not a store ({0}): nothing was changed; add ',format' to overwrite it"
    )]
    Foreign(String),
    /// A store lies where a live snapshot is to begin.
    #[error(
        "holds a store already, and a snapshot that is taken now needs a new one: name another path with --cow, or delete the store if it is of no more use"
    )]
    StoreThere,
    /// Something else lies there.
    #[error(
        "holds something else, not a store ({0}): nothing was changed; name another path with --cow"
    )]
    NotEmpty(String),
    /// A header that only a store can have, but no usable one.
    #[error("holds {0}; nothing was changed: use another path, or add ',format' to overwrite it")]
    Header(String),
    /// A store that cannot be used.
    #[error(
        "holds a damaged store: {0}; nothing was changed: use another path, or delete it if it is of no more use"
    )]
    Store(OpenError),
    /// A persistent store where a transient one is to be.
    #[error(
        "holds a persistent store: a transient one does not overwrite it; drop 'transient' to open it, use another path, or add ',format'"
    )]
    Persistent,
    /// Not enough room for a store.
    #[error("has room for {} chunks of {}, a store needs {needed}: give it more room, or use a smaller chunk=", found, size::show(*chunk))]
    TooSmall {
        /// Chunks there are.
        found: u64,
        /// Chunks needed.
        needed: u64,
        /// Bytes in a chunk.
        chunk: u64,
    },
    /// `size=` for a block device.
    #[error("is a block device and as large as it is: leave 'size=' out")]
    SizeOfDevice,
    /// A store is to be made while serving read-only.
    #[error("holds no store, and --read-only makes none: name an existing store")]
    ReadOnlyMakes,
    /// A transient store while serving read-only.
    #[error("a transient snapshot writes to its COW store: it cannot be served with --read-only")]
    ReadOnlyTransient,
    /// There should be a store, and there is none.
    #[error("the store is gone: what was there once is not there any more")]
    StoreGone,
    /// A snapshot of a snapshot that is not served.
    #[error(
        "its snapshot is one of {0}, which is not served, and it reads from that what it does not have: add the store of {0} too, or give this one up"
    )]
    NoOrigin(String),
    /// A store that outlives the server, of a snapshot that does not.
    #[error(
        "{0} is transient and ends with the server, and a persistent store of a snapshot of it would be of no use then: make it 'transient' too"
    )]
    OfTransient(String),
    /// A store that was used before, of a snapshot that is only about to be taken.
    #[error(
        "holds a store, and {0}, of which its snapshot would be one, is only about to be taken: is the store of {0} missing?"
    )]
    OriginIsNew(String),
    /// A store that the disk's list says is of something else.
    #[error(
        "is the store of a snapshot of {listed}, says the list of stores of {disk}, and not of {wanted}: served there it would show a mixture"
    )]
    OtherOrigin {
        /// The disk.
        disk: String,
        /// What it was taken of.
        listed: String,
        /// What it was named as being of.
        wanted: String,
    },
    /// The list of the disk's stores cannot be read or written.
    #[error("the list of its stores cannot be used: {0}")]
    List(String),
    /// A store of the disk is not among those named.
    #[error(
        "its snapshot '{snapshot}' ({cow}) is not served with it, and would be wrong without a word once the disk is written: add it with --snapshot, give it up with --without {cow}, or serve with --read-only"
    )]
    StoreMissing {
        /// The snapshot.
        snapshot: String,
        /// Its store.
        cow: String,
    },
    /// The same, while that store is being merged.
    #[error(
        "it is being rolled back to the store {0}, which is not there: without it the disk is a mixture of two times; bring the store back"
    )]
    MergeMissing(String),
    /// The same disk, to be served read-only.
    #[error(
        "it is being rolled back to the store {0}, and is a mixture of two times until that is done: serve it writable, so that it can go on"
    )]
    MergeReadOnly(String),
    /// A store that was used before, but not with this disk, or not all the time.
    #[error(
        "is not on the list of stores of {0}, so that it may have missed writes to it: if you know that it has not (the kernel or LVM had them both), add ',adopt'"
    )]
    Unlisted(String),
    /// A store that is known to be stale.
    #[error(
        "has missed a write to {disk}, and is of no more use: its snapshot is lost; leave it out with --without {cow}"
    )]
    Stale {
        /// The disk.
        disk: String,
        /// The store.
        cow: String,
    },
    /// ENOSPC.
    #[error("no space left on its file system ({0})")]
    NoSpace(&'static str),
    /// Anything else.
    #[error("{doing}: {error}")]
    System {
        /// What was tried.
        doing: &'static str,
        /// How it ended.
        error: io::Error,
    },
}

/// A path on one line, whatever characters it is made of.
pub fn shown(path: &Path) -> String {
    let mut line = String::new();
    for character in path.to_string_lossy().chars() {
        if character.is_control() {
            line.extend(character.escape_default());
        } else {
            line.push(character);
        }
    }
    line
}
