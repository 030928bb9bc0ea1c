//! The virtual machine's kernel and RAM disk, made by `tests/kernel/image` and
//! kept under the target folder; and the judgement whether it can run here.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::harness::program::workspace;

/// What must be installed to make the image and boot it.
const TOOLS: [&str; 16] = [
    "qemu-system-x86_64",
    "apt-get",
    "busybox",
    "cpio",
    "flock",
    "dmsetup",
    "lvm",
    "nbd-client",
    "mkfs.ext4",
    "e2fsck",
    "mkfs.xfs",
    "xfs_repair",
    "fstrim",
    "blkdiscard",
    "sfdisk",
    "strip",
];

/// A kernel and a RAM disk to boot.
#[derive(Clone, Debug)]
pub struct Machine {
    folder: PathBuf,
}

impl Machine {
    /// The machine, made on the first call. Where it cannot run, the suite is
    /// skipped by name: `None`; with `CI=true` that is a failure.
    pub fn for_suite(suite: &str) -> Option<&'static Self> {
        static MACHINE: OnceLock<Result<Machine, String>> = OnceLock::new();
        match MACHINE.get_or_init(Self::make) {
            Ok(machine) => Some(machine),
            Err(why) => {
                assert!(
                    std::env::var("CI").as_deref() != Ok("true"),
                    "CI=true: {suite} must not be skipped: {why}"
                );
                eprintln!("SKIPPED: {suite}: {why}");
                None
            }
        }
    }

    fn make() -> Result<Self, String> {
        let missing: Vec<_> = TOOLS.iter().filter(|tool| !installed(tool)).collect();
        if !missing.is_empty() {
            return Err(format!("not installed: {missing:?}"));
        }
        let folder = target().join("kernel-vm");
        let made = Command::new(workspace().join("tests/kernel/image"))
            .arg(&folder)
            .output()
            .map_err(|e| format!("tests/kernel/image: {e}"))?;
        if made.status.success() {
            Ok(Self { folder })
        } else {
            let stderr = String::from_utf8_lossy(&made.stderr);
            Err(format!("tests/kernel/image failed: {stderr}"))
        }
    }

    /// Where it is kept.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The kernel.
    pub fn kernel(&self) -> PathBuf {
        self.folder.join("vmlinuz")
    }

    /// The RAM disk that all suites share.
    pub fn ram_disk(&self) -> PathBuf {
        self.folder.join("initrd.cpio")
    }
}

/// Cargo's target folder.
pub(super) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

fn installed(tool: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':')
        .chain(["/usr/sbin", "/sbin"])
        .any(|folder| Path::new(folder).join(tool).is_file())
}
