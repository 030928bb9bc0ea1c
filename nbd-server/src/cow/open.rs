//! A store, opened on its own: locked, its header decoded, its areas streamed. All
//! that the tools read of a store, they read here.

use std::os::unix::fs::FileExt;
use std::path::Path;

use nbdsnap_format::header::HEADER_BYTES;
use nbdsnap_format::{
    Bounds, Exception, Findings, Found, Header, Layout, ListEnd, check, read_list,
};
use rustix::fs::Advice;

use super::CowError;
use crate::disks::{Opening, existing};
use crate::server::setup::OpenDisk;

/// What is asked of the others while a store is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// That nobody has it open for writing: it is locked.
    Alone,
    /// Nothing (`--force-read`): it may change under the reader.
    Forced,
}

impl Reading {
    const fn opening(self) -> Opening {
        match self {
            Self::Alone => Opening::ReadAlone,
            Self::Forced => Opening::ReadInUse,
        }
    }
}

/// Open a file or device to read it.
pub fn open_disk(path: &Path, reading: Reading) -> Result<OpenDisk, CowError> {
    existing(path, reading.opening()).map_err(|refusal| match CowError::from(refusal) {
        CowError::InUseForWriting(path) => CowError::InUse(path),
        other => other,
    })
}

/// How large a disk is. It may be in use: only its length is looked at.
pub fn disk_bytes(path: &Path) -> Result<u64, CowError> {
    Ok(existing(path, Opening::ReadInUse)?.bytes)
}

/// Fill `buffer` from `offset` on.
pub(super) fn read_at(disk: &OpenDisk, offset: u64, buffer: &mut [u8]) -> Result<(), CowError> {
    disk.file
        .read_exact_at(buffer, offset)
        .map_err(CowError::io(&disk.path, "reading", offset))
}

/// A store whose header is one.
#[derive(Debug)]
pub struct CowStore {
    /// The file or device, locked as long as this lives.
    pub(super) disk: OpenDisk,
    /// Its header. A store that is marked invalid is one too.
    pub header: Header,
}

impl CowStore {
    /// Open the store at `path` to read it.
    pub fn open(path: &Path, reading: Reading) -> Result<Self, CowError> {
        Self::of(open_disk(path, reading)?)
    }

    /// Open it to write to it.
    pub fn open_for_writing(path: &Path) -> Result<Self, CowError> {
        Self::of(existing(path, Opening::Write)?)
    }

    /// The store on a disk that is open.
    pub(super) fn of(disk: OpenDisk) -> Result<Self, CowError> {
        // Areas lie far apart, and what is between them is not wanted.
        let _ = rustix::fs::fadvise(&disk.file, 0, None, Advice::Random);
        let mut sector = [0; HEADER_BYTES];
        let there = disk.bytes.min(HEADER_BYTES as u64) as usize;
        read_at(&disk, 0, &mut sector[..there])?;
        let path = disk.path.clone();
        match Header::decode(&sector[..there]) {
            Ok(Found::Store(header)) => Ok(Self { disk, header }),
            Ok(Found::New) => Err(CowError::NoStore(path)),
            Err(error) => Err(CowError::Header { path, error }),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.disk.path
    }

    /// How long it is, in bytes.
    pub fn bytes(&self) -> u64 {
        self.disk.bytes
    }

    /// Its geometry.
    pub fn layout(&self) -> Layout {
        Layout::new(self.header.chunk_size)
    }

    /// Where its exceptions may point.
    pub fn bounds(&self, origin_bytes: Option<u64>) -> Bounds {
        Bounds::new(self.header.chunk_size, self.disk.bytes, origin_bytes)
    }

    /// Fill `buffer` from `offset` on.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), CowError> {
        read_at(&self.disk, offset, buffer)
    }

    /// Tell `each` of every exception, in the order of the list, with its number.
    pub fn for_each(&self, each: impl FnMut(u64, Exception)) -> Result<ListEnd, CowError> {
        let mut read = |offset: u64, buffer: &mut [u8]| self.read(offset, buffer);
        read_list(self.bounds(None), &mut read, each)
    }

    /// Its exceptions in the order of the list; those that are misplaced are left
    /// out where `bounds` are given. The list is read twice, so that the array is as
    /// long as it has to be, and no longer.
    pub fn exceptions(&self, bounds: Option<Bounds>) -> Result<Vec<Exception>, CowError> {
        let wanted = |exception| bounds.is_none_or(|bounds| bounds.misplaced(exception).is_none());
        let mut count = 0;
        self.for_each(|_, exception| count += usize::from(wanted(exception)))?;
        let mut all = Vec::with_capacity(count);
        self.for_each(|_, exception| {
            // Read without a lock, there may be more by now.
            if wanted(exception) && all.len() < count {
                all.push(exception);
            }
        })?;
        Ok(all)
    }

    /// Insist that the store can be used as it is: its snapshot is not lost, and its
    /// metadata are sound, or torn, which loses nothing.
    pub fn insist_on_soundness(&self, origin_bytes: Option<u64>) -> Result<Findings, CowError> {
        if !self.header.valid {
            return Err(CowError::Invalid(self.path().to_owned()));
        }
        let read = |offset: u64, buffer: &mut [u8]| self.read(offset, buffer);
        let findings = check(read, self.bytes(), origin_bytes)?;
        match findings.list.iter().find(|f| !f.is_mended_by_opening()) {
            None => Ok(findings),
            Some(finding) => Err(CowError::Unsound {
                path: self.path().to_owned(),
                finding: Box::new(*finding),
            }),
        }
    }
}
