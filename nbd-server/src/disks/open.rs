//! Opening and locking, without changing anything.
//!
//! Every path is looked at before it is opened: opening alone has effects on
//! some devices (a tape rewinds) and waits on others (a FIFO).
//!
//! Locks: an origin exclusively where it is written, shared where it is only
//! read; a COW store likewise. They last as long as the file is open. A block
//! device that is written is opened with O_EXCL too, which keeps mounts and other
//! users of the whole device away (between nbdsnap processes the lock alone would
//! do, but a mount does not look at locks).

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nbdsnap_format::SECTOR_BYTES;
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::identity::{Identity, Role, Taken};
use super::{Cause, Refusal, VolumeRequest, shown};
use crate::io::{VolumeAccess, sys};
use crate::server::setup::OpenDisk;

/// What lies at the path of a COW store.
#[derive(Debug)]
pub(super) enum Found {
    /// Nothing; a file can be made there.
    Missing(PathBuf),
    /// A file or device, open and locked.
    Disk(OpenDisk),
}

/// Open a volume's origin.
pub(super) fn origin(request: &VolumeRequest, taken: &mut Taken) -> Result<OpenDisk, Refusal> {
    let path = &request.path;
    let meta = look(path)?.ok_or_else(|| Refusal::new(path, Cause::Missing))?;
    let role = match request.access {
        VolumeAccess::Shared => Role::SharedOrigin(request.name.clone()),
        VolumeAccess::ReadWrite | VolumeAccess::ReadOnly => Role::Origin(request.name.clone()),
    };
    taken.take(Identity::of(&meta), role, path)?;
    let disk = open_and_lock(path, &meta, serving(request.access.writes_origin()))?;
    if disk.bytes == 0 {
        return Err(Refusal::new(path, Cause::Empty));
    }
    if !disk.bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(Refusal::new(path, Cause::NotSectors(disk.bytes)));
    }
    Ok(disk)
}

/// Open what lies at the path of a COW store.
pub(super) fn cow(
    path: &Path,
    access: VolumeAccess,
    role: Role,
    taken: &mut Taken,
) -> Result<Found, Refusal> {
    let Some(meta) = look(path)? else {
        taken.take(place_for_a_file(path)?, role, path)?;
        return Ok(Found::Missing(path.to_owned()));
    };
    taken.take(Identity::of(&meta), role, path)?;
    open_and_lock(path, &meta, serving(access.writes_stores())).map(Found::Disk)
}

/// How a file or device is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opening {
    /// To write to it: locked exclusively, a device claimed.
    Write,
    /// To read what nobody changes meanwhile: locked shared, a device claimed, so
    /// that one that the kernel's device-mapper has in use is refused.
    ReadAlone,
    /// To read what others only read too: locked shared.
    ReadShared,
    /// To read whatever is there, while others may be writing: not locked.
    ReadInUse,
}

fn serving(writes: bool) -> Opening {
    if writes {
        Opening::Write
    } else {
        Opening::ReadShared
    }
}

/// Open a file or device that exists, for a tool that works without a server.
pub(crate) fn existing(path: &Path, opening: Opening) -> Result<OpenDisk, Refusal> {
    let meta = look(path)?.ok_or_else(|| Refusal::new(path, Cause::Missing))?;
    open_and_lock(path, &meta, opening)
}

/// Lock a file that was made just now.
pub(super) fn lock(file: &File, path: &Path, exclusive: bool) -> Result<(), Refusal> {
    sys::lock_whole(file, exclusive).map_err(|errno| match errno {
        Errno::AGAIN | Errno::ACCESS => Refusal::new(path, Cause::Locked),
        other => Refusal::io(path, "locking it", &other.into()),
    })
}

/// What a path leads to, if it leads to a file or a block device; `None` where
/// nothing is.
fn look(path: &Path) -> Result<Option<Metadata>, Refusal> {
    let meta = match std::fs::metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if path.symlink_metadata().is_ok() {
                return Err(Refusal::new(path, Cause::DanglingLink));
            }
            return Ok(None);
        }
        Err(error) => return Err(Refusal::io(path, "looking at it", &error)),
    };
    let kind = meta.file_type();
    let cause = if kind.is_file() || kind.is_block_device() {
        return Ok(Some(meta));
    } else if kind.is_dir() {
        Cause::Directory
    } else if kind.is_fifo() {
        Cause::NotADisk("FIFO")
    } else if kind.is_socket() {
        Cause::NotADisk("socket")
    } else {
        Cause::NotADisk("character device")
    };
    Err(Refusal::new(path, cause))
}

/// The place of a file that does not exist yet, in a folder that may be written.
fn place_for_a_file(path: &Path) -> Result<Identity, Refusal> {
    let (Some(folder), Some(name)) = (folder_of(path), path.file_name()) else {
        return Err(Refusal::new(path, Cause::Missing));
    };
    let meta = match std::fs::metadata(&folder) {
        Ok(meta) if meta.is_dir() => meta,
        Ok(_) => return Err(Refusal::new(path, Cause::NotAFolder)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Refusal::new(path, Cause::NoFolder(shown(&folder))));
        }
        Err(error) => return Err(Refusal::io(path, "looking at its folder", &error)),
    };
    let wanted = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
    rustix::fs::access(&folder, wanted)
        .map_err(|errno| Refusal::io(path, "making a file in its folder", &errno.into()))?;
    Ok(Identity::missing(&meta, name.to_owned()))
}

/// The folder that a path lies in. A path that ends in a slash or in `..` names
/// no file.
pub(super) fn folder_of(path: &Path) -> Option<PathBuf> {
    let folder = path.parent()?;
    if path.as_os_str().as_encoded_bytes().ends_with(b"/") {
        return None;
    }
    Some(if folder.as_os_str().is_empty() {
        PathBuf::from(".")
    } else {
        folder.to_owned()
    })
}

fn open_and_lock(path: &Path, seen: &Metadata, opening: Opening) -> Result<OpenDisk, Refusal> {
    let is_block_device = seen.file_type().is_block_device();
    let write = opening == Opening::Write;
    let mut flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    if is_block_device && (write || opening == Opening::ReadAlone) {
        flags |= OFlags::EXCL;
    }
    let mut file = OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(flags.bits() as i32)
        .open(path)
        .map_err(|error| {
            Refusal::io(
                path,
                if write {
                    "opening it for writing"
                } else {
                    "opening it"
                },
                &error,
            )
        })?;
    let meta = file
        .metadata()
        .map_err(|error| Refusal::io(path, "looking at it", &error))?;
    if Identity::of(&meta) != Identity::of(seen) {
        return Err(Refusal::new(path, Cause::Replaced));
    }
    if opening != Opening::ReadInUse {
        lock(&file, path, write)?;
    }
    let (bytes, logical_block) = if is_block_device {
        let bytes = file
            .seek(SeekFrom::End(0))
            .map_err(|error| Refusal::io(path, "asking for its size", &error))?;
        let block = rustix::fs::ioctl_blksszget(&file).map_err(|errno| {
            Refusal::io(path, "asking for its logical block size", &errno.into())
        })?;
        (bytes, block)
    } else {
        // After the lock: until then another server may have let it grow.
        let meta = file
            .metadata()
            .map_err(|error| Refusal::io(path, "looking at it", &error))?;
        (meta.len(), SECTOR_BYTES as u32)
    };
    Ok(OpenDisk {
        file,
        path: path.to_owned(),
        bytes,
        is_block_device,
        logical_block,
    })
}
