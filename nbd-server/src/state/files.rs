//! The few things that are done to small files, each durable when it returns:
//! a trait, so that a test can take the power away between any two of them.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// A record is small; more than this is something else.
const LONGEST: u64 = 64 << 20;

/// Which file a path led to, once: its number and when it was made. A file that
/// is made later at the same path is another one, even where the file system
/// uses the number again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileIdentity {
    /// The file system's device number.
    pub device: u64,
    /// The file's number in it.
    pub inode: u64,
    /// When it was made, in nanoseconds; 0 where the file system does not say.
    pub born: i128,
}

/// What is done to files. The steps are those that a power cut can fall between.
pub trait Files {
    /// All of a file; none if there is no such file.
    fn read(&self, path: &Path) -> io::Result<Option<Vec<u8>>>;
    /// Make or overwrite a file and flush what is in it; its name may not be durable yet.
    fn write(&mut self, path: &Path, bytes: &[u8]) -> io::Result<()>;
    /// Put a file in the place of another.
    fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()>;
    /// Take a file away, if it is there.
    fn remove(&mut self, path: &Path) -> io::Result<()>;
    /// Make the names in a folder durable.
    fn sync_folder(&mut self, folder: &Path) -> io::Result<()>;
    /// Keep other servers from changing what is in a folder, as long as what is
    /// answered lives; none where that cannot be.
    fn hold(&self, folder: &Path) -> Option<File> {
        let _ = folder;
        None
    }
    /// Which file is there, if one is.
    fn identify(&self, path: &Path) -> io::Result<Option<FileIdentity>>;
}

/// Put `bytes` in the place of the file at `path`: afterwards, and after any
/// power cut, it holds what it held or all of `bytes`.
pub fn replace(files: &mut dyn Files, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = beside(path, ".new");
    files.write(&new, bytes)?;
    files.rename(&new, path)?;
    files.sync_folder(folder_of(path))
}

/// Take a file away, durably.
pub fn remove(files: &mut dyn Files, path: &Path) -> io::Result<()> {
    files.remove(path)?;
    files.sync_folder(folder_of(path))
}

/// The path with `suffix` behind its last name.
pub fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// The folder that a path lies in.
pub fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// The files of this machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemFiles;

impl Files for SystemFiles {
    fn read(&self, path: &Path) -> io::Result<Option<Vec<u8>>> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut bytes = Vec::new();
        file.take(LONGEST + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > LONGEST {
            return Err(io::Error::other("it is far too long for a record"));
        }
        Ok(Some(bytes))
    }

    fn write(&mut self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        if let Some(folder) = path.parent() {
            // The system's folder for lists, the first time.
            std::fs::create_dir_all(folder)?;
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    }

    fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn remove(&mut self, path: &Path) -> io::Result<()> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    fn sync_folder(&mut self, folder: &Path) -> io::Result<()> {
        if !folder.exists() {
            return Ok(());
        }
        File::open(folder)?.sync_all()
    }

    fn hold(&self, folder: &Path) -> Option<File> {
        let file = File::open(folder).ok()?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).ok()?;
        Some(file)
    }

    fn identify(&self, path: &Path) -> io::Result<Option<FileIdentity>> {
        let meta = match std::fs::symlink_metadata(path) {
            Ok(meta) => meta,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let born = meta
            .created()
            .ok()
            .and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok())
            .map_or(0, |since| since.as_nanos() as i128);
        Ok(meta.is_file().then(|| FileIdentity {
            device: meta.dev(),
            inode: meta.ino(),
            born,
        }))
    }
}
