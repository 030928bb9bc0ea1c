//! The procedures that people follow with dmsetup, with `nbdsnap dm` in its place:
//! the scripts in `walkthroughs/` run as they are, on the kernel's device-mapper and
//! on exports of nbdsnap that are attached as block devices, and what both print of
//! their devices is the same. The scripts of the harness lie in `dm/`.

use std::path::Path;

use nbdsnap_tests::harness::files::{folder, sparse_file};
use nbdsnap_tests::harness::program::workspace;
use nbdsnap_tests::harness::random::Random;
use nbdsnap_tests::kernel::dm::step::Step;
use nbdsnap_tests::kernel::machine::Machine;
use nbdsnap_tests::kernel::program::{nbdsnap, stripped};
use nbdsnap_tests::kernel::vm::{Output, Vm};

use super::{PLAYER, SUITE};

const MIB: u64 = 1 << 20;

/// Chunks of the volume of `roll_back`, of 4096 bytes.
const CHUNKS: u64 = 2048;

fn text(name: &str) -> String {
    let path = workspace().join("tests/kernel").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Writes to the snapshot, and to the volume: scattered chunks, from the end to the
/// beginning, so that no two of them are merged in one step.
fn scattered() -> Vec<Step> {
    let mut random = Random::new(1);
    let write = |device: &str, chunk: u64, fill| Step::Write {
        device: device.to_owned(),
        offset: chunk * 4096,
        len: 4096,
        fill,
    };
    let snapshot = (0..CHUNKS / 8).rev().map(|n| ("vol-snap", 8 * n));
    let volume = (0..CHUNKS / 32).rev().map(|n| ("vol", 32 * n + 1));
    let all = snapshot.chain(volume);
    all.map(|(device, chunk)| write(device, chunk, random.bits()))
        .collect()
}

/// The sectors in a status line: allocated, total, metadata.
fn sectors(line: &str) -> Option<(u64, u64, u64)> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [_, _, _, used, metadata] = words[..] else {
        return None;
    };
    let (allocated, total) = used.split_once('/')?;
    Some((
        allocated.parse().ok()?,
        total.parse().ok()?,
        metadata.parse().ok()?,
    ))
}

/// The three status lines of a roll-back: the snapshot's, the merge's when it has
/// just begun, and the last, which says that it is done.
fn three_lines(output: &Output, side: &str) -> [(u64, u64, u64); 3] {
    let prefix = format!("told.{side} ");
    let told = output
        .lines
        .iter()
        .filter_map(|line| line.strip_prefix(&prefix));
    let lines: Vec<_> = told.filter_map(sectors).collect();
    lines
        .try_into()
        .unwrap_or_else(|lines| panic!("{side}: not three status lines: {lines:?}"))
}

#[test]
fn the_walkthroughs_run_with_nbdsnap_in_dmsetups_place() {
    let Some(machine) = Machine::for_suite(SUITE) else {
        return;
    };
    let folder = folder();
    let mut vm = Vm::new(machine);
    for n in 0..3 {
        let disk = folder.path().join(format!("disk{n}"));
        sparse_file(&disk, 330 * MIB); // XFS takes 300 MiB at least
        vm.disk(&disk);
    }
    // Where the old chunks of the volume go that is rolled back: slow, so that it is
    // seen while it is rolled back.
    let slow = folder.path().join("slow");
    sparse_file(&slow, 32 * MIB);
    vm.disk(&slow).slow(100);
    let writes = scattered();
    let lines: Vec<String> = writes.iter().map(Step::to_line).collect();
    vm.program(&nbdsnap())
        .program(&stripped(Path::new(PLAYER)))
        .file("serving.sh", text("serving.sh"))
        .file("scattered", lines.join("\n"));
    for name in ["live_linear", "live_xfs", "roll_back"] {
        vm.file(name, text(&format!("walkthroughs/{name}")));
    }
    for name in ["dmsetup_traced", "dmsetup_by_nbdsnap"] {
        vm.file(name, text(&format!("dm/{name}")));
    }
    let script =
        text("dm/lib.sh") + &format!("WRITES={}\n", writes.len()) + &text("dm/walkthroughs.sh");
    let output = vm.run(&script);
    for name in ["linear", "xfs", "roll"] {
        println!(
            "{name}: {} lines are the same",
            output.value(&format!("same.{name}"))
        );
    }
    let [kernel, ours] = ["kernel", "nbdsnap"].map(|side| three_lines(&output, side));
    for (side, [before, during, after]) in [("the kernel", kernel), ("nbdsnap", ours)] {
        println!("{side}: {before:?} {during:?} {after:?}");
        assert!(
            during.0 < before.0 && during.0 >= after.0,
            "{side}: after the merge has begun"
        );
        assert_eq!(after.0, after.2, "{side}: done");
    }
    assert_eq!(kernel[0], ours[0], "the snapshot's status");
    assert_eq!(kernel[2], ours[2], "the status at the end");
}
