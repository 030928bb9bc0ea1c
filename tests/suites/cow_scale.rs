//! Large stores: a million exceptions (five with `NBDSNAP_LONG`) take the offline tools
//! little memory.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use nbdsnap_tests::harness::files::folder;
use nbdsnap_tests::harness::process::run;
use nbdsnap_tests::harness::program::program;
use nbdsnap_tests::harness::random::long_run;

/// A sparse store of `count` exceptions in a scattered order, and its disk's length.
fn large_store(path: &Path, count: u64) -> u64 {
    const CHUNK: u64 = 16384;
    const PER_AREA: u64 = CHUNK / 16;
    let chunks = (count * 5 / 4).next_power_of_two();
    let file = std::fs::File::create(path).expect("a file");
    let areas = count / PER_AREA + 1;
    file.set_len(((areas + count + 2) * CHUNK).max(100 << 30))
        .expect("a long file");
    let header = [0x7041_6e53_u32, 1, 1, 32].map(u32::to_le_bytes);
    file.write_all_at(header.as_flattened(), 0)
        .expect("written");
    for area in 0..areas {
        let first = area * PER_AREA;
        let entries: Vec<[u8; 8]> = (first..count.min(first + PER_AREA))
            // An odd factor: every chunk once.
            .flat_map(|n| [n.wrapping_mul(0x9e37_79b1) % chunks, 2 + n + area])
            .map(u64::to_le_bytes)
            .collect();
        let at = (1 + area * (PER_AREA + 1)) * CHUNK;
        file.write_all_at(entries.as_flattened(), at)
            .expect("written");
    }
    chunks * CHUNK
}

/// `nbdsnap cow VERB STORE` with so much address space and no more.
fn within(kib: u64, verb: &str, store: &Path) -> bool {
    let ended = run(Command::new("/bin/sh")
        .args(["-c", "ulimit -v $0 && exec \"$@\" >/dev/null 2>&1"])
        .arg(kib.to_string())
        .arg(program())
        .args(["cow", verb])
        .arg(store));
    ended.code == Some(0)
}

#[test]
fn an_exception_takes_less_than_24_bytes() {
    let count: u64 = if long_run().is_some() {
        5_000_000
    } else {
        1_000_000
    };
    let folder = folder();
    let (large, empty) = (folder.path().join("large"), folder.path().join("empty"));
    large_store(&large, count);
    large_store(&empty, 0);
    for verb in ["check", "inspect", "map"] {
        // What the program takes for a store of nothing, to the MiB.
        let (mut enough, mut too_little) = (1 << 20, 0);
        assert!(within(enough, verb, &empty), "{verb} fails with a GiB");
        while enough - too_little > 1024 {
            let middle = u64::midpoint(enough, too_little);
            if within(middle, verb, &empty) {
                enough = middle;
            } else {
                too_little = middle;
            }
        }
        let begun = Instant::now();
        let kib = enough + count * 24 / 1024;
        assert!(
            within(kib, verb, &large),
            "{verb}: {count} exceptions in {kib} KiB"
        );
        println!(
            "{verb}: {count} exceptions in {:?}, {enough} KiB for none",
            begun.elapsed()
        );
    }
}
