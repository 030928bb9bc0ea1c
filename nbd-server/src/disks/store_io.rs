//! The disk under a store while it is opened or made: the engine asks, this
//! performs, one action after the other.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use nbdsnap_engine::{Access, Action, DiskError, Outcome, StoreIo};
use rustix::io::Errno;

use crate::io::file::{Medium, disk_error, perform};
use crate::server::setup::OpenDisk;

/// So many copies of one torn area are kept before one more is refused.
const MOST_COPIES: u32 = 1000;

/// A COW store's file or device.
#[derive(Debug)]
pub(super) struct StoreDisk<'a> {
    disk: &'a OpenDisk,
    access: Access,
    /// Copies of torn areas that were written.
    pub(super) kept: Vec<PathBuf>,
    /// Where a copy could not be written, and why.
    pub(super) copy_failed: Option<(PathBuf, io::Error)>,
}

impl<'a> StoreDisk<'a> {
    pub(super) fn new(disk: &'a OpenDisk, access: Access) -> Self {
        Self {
            disk,
            access,
            kept: Vec::new(),
            copy_failed: None,
        }
    }
}

impl StoreIo for StoreDisk<'_> {
    fn act(&mut self, action: Action) -> Outcome {
        let changes = !matches!(action, Action::Read { .. });
        if changes && self.access == Access::ReadOnly {
            return Err(disk_error(Errno::ROFS));
        }
        perform(&self.disk.file, Medium::Store, &action)
    }

    fn keep_copy(&mut self, area: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let base = copy_path(self.disk, area);
        match write_copy(&base, bytes) {
            Ok(path) => {
                self.kept.push(path);
                Ok(())
            }
            Err(error) => {
                let failure = Errno::from_io_error(&error).map_or(DiskError::Io(0), disk_error);
                self.copy_failed = Some((base, error));
                Err(failure)
            }
        }
    }
}

/// `COW.torn-AREA`, beside the store. Beside a block device lies a folder that
/// does not outlive a restart of the machine: its copies go to the working folder.
fn copy_path(disk: &OpenDisk, area: u64) -> PathBuf {
    let mut path = if disk.is_block_device {
        PathBuf::from(disk.path.file_name().unwrap_or(disk.path.as_os_str()))
    } else {
        disk.path.clone()
    };
    path.as_mut_os_string().push(format!(".torn-{area}"));
    path
}

/// Write a copy under a name that is free, durably.
fn write_copy(base: &Path, bytes: &[u8]) -> io::Result<PathBuf> {
    let (path, mut file) = create_free(base)?;
    let written = file
        .write_all(bytes)
        .and_then(|()| file.sync_all())
        .and_then(|()| sync_folder_of(&path));
    if let Err(error) = written {
        let _ = std::fs::remove_file(&path);
        return Err(error);
    }
    Ok(path)
}

/// `base`, or `base.2` and so on where earlier copies are.
fn create_free(base: &Path) -> io::Result<(PathBuf, File)> {
    for copy in 1..=MOST_COPIES {
        let mut path = base.to_owned();
        if copy > 1 {
            path.as_mut_os_string().push(format!(".{copy}"));
        }
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(file) => return Ok((path, file)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other(format!(
        "there are {MOST_COPIES} copies of it already: move them away"
    )))
}

/// Make the names in a path's folder durable.
pub(crate) fn sync_folder_of(path: &Path) -> io::Result<()> {
    let folder = super::open::folder_of(path).unwrap_or_else(|| PathBuf::from("/"));
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(path: &Path, is_block_device: bool) -> OpenDisk {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let bytes = file.metadata().unwrap().len();
        OpenDisk {
            file,
            path: path.to_owned(),
            bytes,
            is_block_device,
            logical_block: 512,
        }
    }

    #[test]
    fn copies_lie_beside_the_store_and_never_replace_one_another() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cow");
        std::fs::write(&path, [0; 512]).unwrap();
        let disk = disk(&path, false);
        let mut io = StoreDisk::new(&disk, Access::ReadWrite);
        io.keep_copy(3, b"one").unwrap();
        io.keep_copy(3, b"two").unwrap();
        let first = folder.path().join("cow.torn-3");
        let second = folder.path().join("cow.torn-3.2");
        assert_eq!(io.kept, [first.clone(), second.clone()]);
        assert_eq!(std::fs::read(first).unwrap(), b"one");
        assert_eq!(std::fs::read(second).unwrap(), b"two");
    }

    #[test]
    fn a_copy_that_cannot_be_kept_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cow");
        std::fs::write(&path, [0; 512]).unwrap();
        let mut disk = disk(&path, false);
        disk.path = folder.path().join("gone/cow");
        let mut io = StoreDisk::new(&disk, Access::ReadWrite);
        assert_eq!(
            io.keep_copy(0, b"x"),
            Err(DiskError::Io(Errno::NOENT.raw_os_error()))
        );
        assert!(io.copy_failed.is_some());
    }

    #[test]
    fn read_only_access_writes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cow");
        std::fs::write(&path, [7; 512]).unwrap();
        let disk = disk(&path, false);
        let mut io = StoreDisk::new(&disk, Access::ReadOnly);
        let refused = Err(DiskError::Io(Errno::ROFS.raw_os_error()));
        assert_eq!(io.act(Action::Grow { to: 1024 }), refused);
        assert_eq!(
            io.act(Action::WriteZeroes {
                offset: 0,
                len: 512,
                may_punch: false
            }),
            refused
        );
        assert_eq!(io.act(Action::Flush), refused);
        assert_eq!(
            io.act(Action::Read {
                offset: 0,
                len: 512
            })
            .unwrap(),
            vec![7; 512]
        );
        assert_eq!(std::fs::read(&path).unwrap(), [7; 512]);
    }

    #[test]
    fn copies_of_a_device_go_to_the_working_folder() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cow");
        std::fs::write(&path, [0; 512]).unwrap();
        assert_eq!(copy_path(&disk(&path, true), 7), Path::new("cow.torn-7"));
    }
}
