//! What the tools make: image files, and stores. A file that is made is not there
//! under its name until all of it is durable; if something fails, it is taken away.
//! A store gets its areas first, then its header, each followed by a flush
//! (durability.md, rule 4), so that a power cut leaves no store or a whole one.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nbdsnap_format::build::AreaBuilder;
use nbdsnap_format::dump::Stale;
use nbdsnap_format::{ChunkSize, Exception, Header};
use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::CowError;
use crate::disks::{Contents, Opening, Refusal, contents, existing, sync_folder_of};
use crate::server::setup::OpenDisk;

/// What takes the bytes that belong at an offset.
pub(super) type Sink<'a> = &'a mut dyn FnMut(u64, &[u8]) -> Result<(), CowError>;

/// What the name of a file ends with until it is whole.
const UNFINISHED: &str = ".unfinished";

/// A file or device that is being written.
#[derive(Debug)]
pub struct Target {
    disk: OpenDisk,
    /// Where the file goes once it is whole, if it is a new one.
    made: Option<PathBuf>,
    /// What was not written reads as zeros.
    is_new: bool,
}

impl Target {
    /// A new file of `bytes` bytes at `path`, all of it a hole; or the block device
    /// there, if that is large enough and either empty or given up (`force`).
    pub fn create(path: &Path, bytes: u64, force: bool) -> Result<Self, CowError> {
        match existing(path, Opening::Write) {
            Ok(disk) if disk.is_block_device => Self::device(disk, bytes, force),
            Ok(_) => Err(CowError::Exists(path.to_owned())),
            Err(Refusal {
                cause: crate::disks::Cause::Missing,
                ..
            }) => Self::file(path, bytes),
            Err(refusal) => Err(refusal.into()),
        }
    }

    fn device(disk: OpenDisk, bytes: u64, force: bool) -> Result<Self, CowError> {
        if disk.bytes < bytes {
            return Err(CowError::TooSmall {
                path: disk.path,
                found: disk.bytes,
                needed: bytes,
            });
        }
        if !force {
            let found = contents(&disk).map_err(CowError::io(&disk.path, "reading", 0))?;
            let what = match found {
                Contents::Empty => None,
                Contents::Store => Some("a snapshot store".to_owned()),
                Contents::Other(what) => Some(what),
            };
            if let Some(what) = what {
                let path = disk.path;
                return Err(CowError::NotEmpty { path, what });
            }
        }
        Ok(Self {
            disk,
            made: None,
            is_new: false,
        })
    }

    fn file(path: &Path, bytes: u64) -> Result<Self, CowError> {
        let mut first_name = path.to_owned();
        first_name.as_mut_os_string().push(UNFINISHED);
        let refused = |doing| {
            let name = first_name.clone();
            move |error: std::io::Error| CowError::Refused(Refusal::io(&name, doing, &error))
        };
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&first_name)
            .map_err(|error| match error.kind() {
                std::io::ErrorKind::AlreadyExists => CowError::Exists(first_name.clone()),
                _ => refused("making it")(error),
            })?;
        if let Err(error) = file.set_len(bytes) {
            let _ = std::fs::remove_file(&first_name);
            return Err(refused("making it so long")(error));
        }
        Ok(Self {
            disk: OpenDisk {
                file,
                path: first_name,
                bytes,
                is_block_device: false,
                logical_block: 512,
            },
            made: Some(path.to_owned()),
            is_new: true,
        })
    }

    /// What is open for writing already, to be changed in its place.
    pub fn in_place(disk: OpenDisk) -> Self {
        Self {
            disk,
            made: None,
            is_new: false,
        }
    }

    /// How long it is.
    pub fn bytes(&self) -> u64 {
        self.disk.bytes
    }

    /// The file or device.
    pub(super) fn opened(&self) -> &File {
        &self.disk.file
    }

    /// Whether it is a new file, in which zeros need not be written.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// Write; zeros in a new file stay a hole.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), CowError> {
        if self.is_new && is_zero(bytes) {
            return Ok(());
        }
        self.write_all(offset, bytes)
    }

    /// Write, whatever it is.
    pub fn write_all(&self, offset: u64, bytes: &[u8]) -> Result<(), CowError> {
        self.disk
            .file
            .write_all_at(bytes, offset)
            .map_err(CowError::io(&self.disk.path, "writing", offset))
    }

    /// Have the kernel copy `len` bytes of `from`, without a way through this process.
    /// Answers how many it copied: fewer, or none, where it cannot.
    pub fn copy_from(&self, from: &OpenDisk, from_offset: u64, offset: u64, len: u64) -> u64 {
        let mut done = 0;
        while done < len {
            let (mut source, mut goal) = (from_offset + done, offset + done);
            let most = usize::try_from(len - done).unwrap_or(usize::MAX);
            let copied = rustix::fs::copy_file_range(
                &from.file,
                Some(&mut source),
                &self.disk.file,
                Some(&mut goal),
                most,
            );
            match copied {
                Ok(0) | Err(_) => break,
                Ok(copied) => done += copied as u64,
            }
        }
        done
    }

    /// Have what was written be durable.
    pub fn flush(&self) -> Result<(), CowError> {
        self.disk
            .file
            .sync_data()
            .map_err(CowError::io(&self.disk.path, "flushing", 0))
    }

    /// Write the metadata of a store, the header last. What lay there before is
    /// marked invalid meanwhile: nobody reads half a list.
    pub fn write_store(
        &self,
        header: Header,
        exceptions: impl IntoIterator<Item = Exception>,
        stale: &[Stale],
    ) -> Result<(), CowError> {
        let mut areas = self.areas(header.chunk_size)?;
        for exception in exceptions {
            areas.push(exception)?;
        }
        areas.finish(header, stale)
    }

    /// The same, for who learns of the exceptions as it goes.
    pub fn areas(&self, chunk_size: ChunkSize) -> Result<Areas<'_>, CowError> {
        if !self.is_new {
            let invalid = Header {
                valid: false,
                chunk_size,
            };
            self.write_all(0, &invalid.encode())?;
            self.flush()?;
        }
        Ok(Areas {
            target: self,
            builder: AreaBuilder::new(chunk_size, self.disk.bytes),
        })
    }

    /// All of it is written: make it durable, and give the file its name.
    pub fn finish(mut self) -> Result<(), CowError> {
        self.flush()?;
        if let Some(path) = self.made.take() {
            // Never over a file that came meanwhile.
            renameat_with(CWD, &self.disk.path, CWD, &path, RenameFlags::NOREPLACE).map_err(
                |errno| CowError::Refused(Refusal::io(&path, "naming it", &errno.into())),
            )?;
            sync_folder_of(&path)
                .map_err(|error| CowError::Refused(Refusal::io(&path, "naming it", &error)))?;
        }
        Ok(())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if self.made.is_some() {
            let _ = std::fs::remove_file(&self.disk.path);
        }
    }
}

/// The metadata of a store that is being written.
#[derive(Debug)]
pub struct Areas<'a> {
    target: &'a Target,
    builder: AreaBuilder,
}

impl Areas<'_> {
    /// The next exception.
    pub fn push(&mut self, exception: Exception) -> Result<(), CowError> {
        let target = self.target;
        self.builder
            .push(exception, &mut |offset, bytes| target.write(offset, bytes))
    }

    /// The end of the list and what lies behind it; then, once that and all data are
    /// durable, the header.
    pub fn finish(mut self, header: Header, stale: &[Stale]) -> Result<(), CowError> {
        let target = self.target;
        let mut write = |offset: u64, bytes: &[u8]| target.write(offset, bytes);
        for one in stale {
            self.builder.stale(*one, &mut write)?;
        }
        self.builder.finish(&mut write)?;
        target.flush()?;
        let chunk = header.chunk_size.bytes();
        if !target.is_new {
            zero(target, 512..chunk)?;
        }
        target.write_all(0, &header.encode())?;
        target.flush()
    }
}

/// Zero what is in a range, in pieces.
fn zero(target: &Target, range: std::ops::Range<u64>) -> Result<(), CowError> {
    const PIECE: u64 = 1 << 20;
    let zeros = vec![0; PIECE.min(range.end - range.start) as usize];
    let mut at = range.start;
    while at < range.end {
        let len = PIECE.min(range.end - at) as usize;
        target.write_all(at, &zeros[..len])?;
        at += len as u64;
    }
    Ok(())
}

/// Whether all bytes are 0.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    // Most pieces that are not zero begin with something.
    bytes.first().is_none_or(|first| *first == 0)
        && bytes
            .chunks(4096)
            .all(|piece| piece.iter().fold(0, |bits, byte| bits | byte) == 0)
}
