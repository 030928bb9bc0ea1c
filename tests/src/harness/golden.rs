//! The archives in tests/golden: origins and COW stores that the Linux kernel's
//! dm-snapshot wrote, with the hashes of what it read from them.

use std::path::{Path, PathBuf};

use super::process::run_client;
use super::program::workspace;

/// An archive of stores that the kernel made, with what the kernel read from them.
#[derive(Debug)]
pub struct Golden {
    /// Its name.
    pub name: String,
    /// SHA-256 of the snapshot device; none where it is Invalid.
    pub snapshot_sha: Option<String>,
    /// SHA-256 of the origin device.
    pub origin_sha: String,
    /// Sectors in a chunk; none where the kernel printed no table.
    pub chunk_sectors: Option<u64>,
    /// Sectors allocated and in all, from the last status; none where it printed words.
    pub allocated: Option<(u64, u64)>,
    /// The table's letter for the store: `P` or `PO`.
    pub kind: String,
    /// The origin.
    pub origin: PathBuf,
    /// The COW store.
    pub cow: PathBuf,
}

/// The names of all archives.
pub fn golden_names() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(golden_folder())
        .expect("tests/golden")
        .filter_map(|entry| {
            entry
                .ok()?
                .file_name()
                .to_str()?
                .strip_suffix(".tar.xz")
                .map(str::to_owned)
        })
        .collect();
    names.sort();
    names
}

/// Unpack the archive `name` into `folder`.
pub fn unpack_golden(name: &str, folder: &Path) -> Golden {
    let archive = golden_folder().join(format!("{name}.tar.xz"));
    let _ = run_client(folder, "tar", [Path::new("-xJf"), &archive]).ok();
    let inside = folder.join(name);
    let manifest = std::fs::read_to_string(inside.join("manifest")).expect("a manifest");
    // Where a run reports twice, the last counts.
    let last = |key: &str| {
        let line = manifest
            .lines()
            .rev()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
        line.map(|line| {
            line.split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
    };
    let table = last("TABLE");
    let allocated = last("STATUS").and_then(|words| {
        let (allocated, total) = words[3].split_once('/')?;
        Some((allocated.parse().ok()?, total.parse().ok()?))
    });
    Golden {
        name: name.to_owned(),
        snapshot_sha: last("SNAPSHA").map(|words| words[0].clone()),
        origin_sha: last("ORGSHA").expect("every manifest has ORGSHA")[0].clone(),
        chunk_sectors: table
            .as_ref()
            .map(|words| words[6].parse().expect("a chunk size")),
        allocated,
        kind: table.map_or_else(|| "P".to_owned(), |words| words[5].clone()),
        origin: inside.join("origin.img"),
        cow: inside.join("cow.img"),
    }
}

fn golden_folder() -> PathBuf {
    workspace().join("tests/golden")
}
