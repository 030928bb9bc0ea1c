//! What the suites under `tests/kernel/` stand on: a virtual machine with the
//! kernel's own dm-snapshot, and the means to play the same requests there and
//! on nbdsnap.
//!
//! - [`machine`]: Debian's kernel and an initial RAM disk, made once and kept,
//! - [`vm`]: boots it with disks and a script, and takes in what the script says,
//! - [`program`]: programs as they are put into it,
//! - [`slices`]: many small devices on one disk,
//! - [`play`]: requests from a seed, played on devices or on NBD exports,
//! - [`compare`]: comparisons that can be tried themselves,
//! - [`exports`]: what nbdsnap shows of an origin and its stores,
//! - [`load`]: requests on several volumes at once, over restarts,
//! - [`log`]: the log of a `dm-log-writes` device,
//! - [`replay`]: the states that a crash could have left, one after the other,
//! - [`dm`]: sequences of dm commands and I/O, for dmsetup and for nbdsnap,
//! - [`netlink`]: an NBD client's orders to the kernel,
//! - [`file_load`]: files, and what was promised about them.
//!
//! Nothing but emulation can be counted on, where a boot costs ten seconds of
//! processor time: it is done once and kept, and every machine goes on from there.

pub mod compare;
pub mod dm;
pub mod exports;
pub mod file_load;
mod frozen;
pub mod load;
pub mod log;
pub mod machine;
pub mod netlink;
pub mod play;
pub mod program;
pub mod replay;
pub mod slices;
pub mod vm;

/// The seed of a test, printed with the command that plays it again: from
/// `NBDSNAP_SEED`, else a new one.
pub fn seed(suite: &str, test: &str) -> u64 {
    let seed = crate::harness::random::seed(test);
    println!(
        "again: NBDSNAP_SEED={seed} cargo test --release --package nbdsnap-tests --test {suite} {test}"
    );
    seed
}
