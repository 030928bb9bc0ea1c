//! fio with its nbd engine: writes with checksums in every block, and the
//! reading back that proves how much of them is there.

use std::path::Path;
use std::process::Command;

use super::process::{Finished, client, run};

/// A fixed range, written in random order. The same job writes and verifies:
/// fio remembers nothing between runs, it derives both from the job.
#[derive(Clone, Debug)]
pub struct Job {
    /// The export.
    pub uri: String,
    /// First byte of the range.
    pub offset: u64,
    /// Bytes of the range; all of it is written.
    pub size: u64,
    /// Block size, or a range of sizes with `--bsrange` in `more`.
    pub block: &'static str,
    /// Further arguments.
    pub more: Vec<String>,
}

impl Job {
    /// A job of 4 KiB blocks.
    pub fn new(uri: &str, offset: u64, size: u64) -> Self {
        Self {
            uri: uri.to_owned(),
            offset,
            size,
            block: "4k",
            more: Vec::new(),
        }
    }

    /// fio's command line. It writes a state file: `folder` is to be the test's own.
    pub fn command(&self, folder: &Path, verify: &[&str]) -> Command {
        let mut fio = client("fio");
        fio.current_dir(folder)
            .args([
                "--name=job",
                "--ioengine=nbd",
                "--thread",
                "--rw=randwrite",
                "--iodepth=16",
            ])
            .args(["--randrepeat=1", "--verify=crc32c", "--output-format=json"])
            .arg(format!("--uri={}", self.uri))
            .arg(format!("--offset={}", self.offset))
            .arg(format!("--size={}", self.size))
            .args(&self.more)
            .args(verify);
        if !self.block.is_empty() {
            fio.arg(format!("--bs={}", self.block));
        }
        fio
    }

    /// Write the whole range; panics if not every byte was written.
    pub fn write(&self, folder: &Path) {
        let done = run(&mut self.command(folder, &["--do_verify=0"])).ok();
        assert_eq!(bytes(&done, "write"), self.size, "{done}");
        assert_eq!(bytes(&done, "read"), 0, "{done}");
    }

    /// Read back and check all that [`Job::write`] wrote.
    pub fn verify(&self, folder: &Path) {
        let done = run(&mut self.command(folder, &["--verify_only"])).ok();
        assert_eq!(
            bytes(&done, "read"),
            self.size,
            "fio verified less than was written: {done}"
        );
    }

    /// Write and verify in one run of fio; how much it wrote and read.
    pub fn write_and_verify(&self, folder: &Path) -> (u64, u64) {
        let done = run(&mut self.command(folder, &["--do_verify=1"])).ok();
        (bytes(&done, "write"), bytes(&done, "read"))
    }
}

/// Bytes that a run of fio read or wrote, from its JSON.
fn bytes(done: &Finished, direction: &str) -> u64 {
    let json = done.json();
    let job = &json["jobs"][0];
    assert_eq!(job["error"], 0, "{done}");
    job[direction]["io_bytes"]
        .as_u64()
        .unwrap_or_else(|| panic!("no {direction}.io_bytes: {done}"))
}
