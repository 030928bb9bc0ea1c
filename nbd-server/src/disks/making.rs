//! Who hears of files that are made, so that a crash can take them back.

use std::io;
use std::path::{Path, PathBuf};

/// Told of each file before anything is in it.
pub trait Making {
    /// The name under which the file that belongs at `path` is made; none: its own.
    fn first_name(&self, path: &Path) -> Option<PathBuf>;

    /// The file that belongs at `path` was made, under its first name. It gets its
    /// own when this has returned.
    fn made(&mut self, path: &Path) -> io::Result<()>;
}

/// Nobody: what a crash leaves stays.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unrecorded;

impl Making for Unrecorded {
    fn first_name(&self, _: &Path) -> Option<PathBuf> {
        None
    }

    fn made(&mut self, _: &Path) -> io::Result<()> {
        Ok(())
    }
}
