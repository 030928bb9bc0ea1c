//! Who hears of files that are made, so that a crash can take them back.

use std::io;
use std::path::{Path, PathBuf};

/// Told of files before anything is in them.
pub trait Making {
    /// The name under which the file that belongs at `path` is made; none: its own.
    fn first_name(&self, path: &Path) -> Option<PathBuf>;

    /// The files that belong at `paths` were made, under their first names. They get
    /// their own when this has returned.
    fn made(&mut self, paths: &[PathBuf]) -> io::Result<()>;
}

/// Nobody: what a crash leaves stays.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unrecorded;

impl Making for Unrecorded {
    fn first_name(&self, _: &Path) -> Option<PathBuf> {
        None
    }

    fn made(&mut self, _: &[PathBuf]) -> io::Result<()> {
        Ok(())
    }
}
