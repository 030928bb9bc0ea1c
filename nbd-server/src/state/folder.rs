//! The folder of `--state`: made if need be, and one server's alone.

use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::keeper::StateError;
use crate::io::sys;

/// A state folder, locked as long as this lives.
#[derive(Debug)]
pub struct StateFolder {
    pub(super) path: PathBuf,
    _lock: File,
}

impl StateFolder {
    /// Take the folder, made with mode 0700 if there is none.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        let system = |doing| {
            move |error| StateError::System {
                path: path.to_owned(),
                doing,
                error,
            }
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(system("making the state folder"))?;
        let path = std::fs::canonicalize(path).map_err(system("opening the state folder"))?;
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path.join("lock"))
            .map_err(system("opening the state folder's lock"))?;
        sys::lock_whole(&lock, true).map_err(|errno| match errno {
            Errno::AGAIN | Errno::ACCESS => StateError::Locked(path.clone()),
            other => StateError::System {
                path: path.clone(),
                doing: "locking the state folder",
                error: other.into(),
            },
        })?;
        Ok(Self { path, _lock: lock })
    }
}
