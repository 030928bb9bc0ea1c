//! Why an offline tool did not do what it was asked for: one line that names the
//! path, the cause and what can be done.

use std::io;
use std::path::{Path, PathBuf};

use nbdsnap_format::build::BuildError;
use nbdsnap_format::dump::{Contradiction, DumpError};
use nbdsnap_format::{Finding, HeaderError};

use crate::disks::{Cause, Refusal, shown};

/// Why it did not.
#[derive(Debug, thiserror::Error)]
pub enum CowError {
    /// It cannot be opened.
    #[error("{0}")]
    Refused(Refusal),
    /// Somebody else has it.
    #[error("{}: is in use (a server, device-mapper or another tool has it): stop that one first, or read it all the same with --force-read", shown(.0))]
    InUse(PathBuf),
    /// Somebody else has it, and it is to be written.
    #[error("{}: is in use (a server, device-mapper or another tool has it): stop that one first", shown(.0))]
    InUseForWriting(PathBuf),
    /// A read or write failed.
    #[error("{}: {doing} at byte {offset}: {error}", shown(path))]
    Io {
        /// The file or device.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// Where.
        offset: u64,
        /// The answer.
        error: io::Error,
    },
    /// There is no store.
    #[error("{}: no snapshot store: it begins with zeros, so none was made here, or its header is lost", shown(.0))]
    NoStore(PathBuf),
    /// Its header is none.
    #[error("{}: {error}", shown(path))]
    Header {
        /// The file or device.
        path: PathBuf,
        /// What is wrong.
        error: HeaderError,
    },
    /// It would have to be sound, and is not.
    #[error(
        "{}: {finding} ('nbdsnap cow check' says more, 'nbdsnap cow repair' saves what can be saved)",
        shown(path)
    )]
    Unsound {
        /// The store.
        path: PathBuf,
        /// The first thing that is wrong.
        finding: Box<Finding>,
    },
    /// Its snapshot is lost.
    #[error("{}: the snapshot is lost: its store is marked invalid", shown(.0))]
    Invalid(PathBuf),
    /// Something is there already.
    #[error("{}: exists already: name another path", shown(.0))]
    Exists(PathBuf),
    /// A device that holds something.
    #[error(
        "{}: is a block device that holds {what}: --force overwrites it",
        shown(path)
    )]
    NotEmpty {
        /// The device.
        path: PathBuf,
        /// In words.
        what: String,
    },
    /// It does not fit.
    #[error("{}: has {found} bytes, and {needed} are needed", shown(path))]
    TooSmall {
        /// The file or device.
        path: PathBuf,
        /// Bytes there are.
        found: u64,
        /// Bytes needed.
        needed: u64,
    },
    /// A dump that is none.
    #[error("{}: {error}", shown(path))]
    Dump {
        /// The text.
        path: PathBuf,
        /// What is wrong.
        error: DumpError,
    },
    /// The same, of JSON or XML.
    #[error("{}: {error}", shown(path))]
    Markup {
        /// The text.
        path: PathBuf,
        /// What is wrong.
        error: String,
    },
    /// A dump of a store that no snapshot can have.
    #[error("{}: {error}; --damaged makes such a store all the same", shown(path))]
    Contradiction {
        /// The text.
        path: PathBuf,
        /// What is wrong.
        error: Contradiction,
    },
    /// It cannot be laid out.
    #[error("{0}")]
    Build(#[from] BuildError),
    /// Two files that have to be two are one.
    #[error("{}: is both the store and the disk", shown(.0))]
    Same(PathBuf),
    /// Another store is being merged into the disk.
    #[error(
        "{}: another store is being merged into it, {}: go on with that one first",
        shown(disk),
        shown(other)
    )]
    Merging {
        /// The disk.
        disk: PathBuf,
        /// The other store.
        other: PathBuf,
    },
    /// It was not taken of a disk.
    #[error(
        "{}: is of a snapshot, whose store is {}, and not of the disk: read upon that it would show a mixture; serve both ('nbdsnap serve --read-only'), and copy the export",
        shown(cow),
        shown(of)
    )]
    OfSnapshot {
        /// The store.
        cow: PathBuf,
        /// That of the snapshot.
        of: PathBuf,
    },
    /// Others were taken of the snapshot.
    #[error(
        "{}: a snapshot was taken of it, whose store is {}, and depends on it: merge or remove that one first",
        shown(cow),
        shown(other)
    )]
    Depended {
        /// The store.
        cow: PathBuf,
        /// That of the other snapshot.
        other: PathBuf,
    },
    /// Another program did not do its part.
    #[error("{program}: {error}")]
    Program {
        /// Its name.
        program: &'static str,
        /// What it said, or why it could not be run.
        error: String,
    },
    /// What was printed cannot be read by anybody.
    #[error("standard output: {0}")]
    Output(io::Error),
    /// Nobody wants to read it any more: no error.
    #[error("standard output is closed")]
    OutputClosed,
    /// What was asked for makes no sense here.
    #[error("{0}")]
    Senseless(String),
}

impl CowError {
    /// An error of a read or write at a place.
    pub(super) fn io<'a>(
        path: &'a Path,
        doing: &'static str,
        offset: u64,
    ) -> impl FnOnce(io::Error) -> Self + 'a {
        move |error| Self::Io {
            path: path.to_owned(),
            doing,
            offset,
            error,
        }
    }

    /// An error of the output stream.
    pub fn output(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            Self::OutputClosed
        } else {
            Self::Output(error)
        }
    }
}

impl From<Refusal> for CowError {
    fn from(refusal: Refusal) -> Self {
        match refusal.cause {
            Cause::Locked | Cause::Busy => Self::InUseForWriting(refusal.path),
            _ => Self::Refused(refusal),
        }
    }
}
