//! Programs as the virtual machine gets them: without their debug information,
//! which is four fifths of them, since every boot unpacks them into its memory.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::machine::target;
use crate::harness::program::program;

/// The program under test, for [`Vm::program`](super::vm::Vm::program).
pub fn nbdsnap() -> PathBuf {
    stripped(program())
}

/// A program without its debug information, under its own name in a folder named
/// like its own: `target/plain/nbdsnap` becomes `target/stripped/plain/nbdsnap`.
pub fn stripped(program: &Path) -> PathBuf {
    let name = program.file_name().expect("a program has a name");
    let parent = program.parent().and_then(Path::file_name);
    let folder = target().join("stripped").join(parent.unwrap_or_default());
    std::fs::create_dir_all(&folder).expect("a folder under target/ can be made");
    // Tests run side by side: each makes its own and gives it the name when it is whole.
    let fresh = tempfile::NamedTempFile::new_in(&folder).expect("a temporary file");
    let strip = Command::new("strip")
        .arg("-o")
        .arg(fresh.path())
        .arg(program)
        .status()
        .expect("strip runs");
    assert!(strip.success(), "strip {}: {strip}", program.display());
    let path = folder.join(name);
    fresh.persist(&path).expect("the name can be given");
    path
}
