//! The procedures that people follow with dmsetup, with `nbdsnap dm` in its place:
//! the scripts in `walkthroughs/` run as they are, on the kernel's device-mapper and
//! on exports of nbdsnap that are attached as block devices, and what both print of
//! their devices is the same. The scripts of the harness lie in `dm/`.

use std::path::Path;
use std::time::Instant;

use nbdsnap_tests::harness::files::{folder, sparse_file};
use nbdsnap_tests::harness::program::workspace;
use nbdsnap_tests::harness::random::Random;
use nbdsnap_tests::kernel::dm::step::Step;
use nbdsnap_tests::kernel::machine::Machine;
use nbdsnap_tests::kernel::program::{nbdsnap, stripped};
use nbdsnap_tests::kernel::vm::{Output, Vm};

use super::{PLAYER, SUITE};

const MIB: u64 = 1 << 20;

/// Bytes of the volume of `roll_back`, whose second half is merged last.
const VOLUME: u64 = 16 * MIB;

/// A write of several chunks.
const LARGE: u64 = 64 << 10;

fn text(name: &str) -> String {
    let path = workspace().join("tests/kernel").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Writes to the snapshot and to the volume: single chunks of the second half, then
/// 6 MiB in the first one, which is more than nbdsnap merges in a step. What comes last
/// is merged first.
fn scattered() -> Vec<Step> {
    let mut random = Random::new(1);
    let write = |device: &str, offset: u64, len: u64, fill| Step::Write {
        device: device.to_owned(),
        offset,
        len,
        fill,
    };
    let second = (0..16).map(|n| ("vol-snap", VOLUME / 2 + n * LARGE, 4096));
    let first = (0..80).map(|n| ("vol-snap", n * (LARGE + 4096), LARGE));
    let volume = (0..16).map(|n| ("vol", VOLUME / 4 + n * LARGE, LARGE));
    let all = second.chain(first).chain(volume);
    all.map(|(device, offset, len)| write(device, offset, len, random.bits()))
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

/// Follow a walkthrough of `walkthroughs.sh`, on both sides, in a machine of its own.
fn follow(what: &str) -> Option<Output> {
    let machine = Machine::for_suite(SUITE)?;
    let folder = folder();
    let mut vm = Vm::new(machine);
    for n in 0..3 {
        let disk = folder.path().join(format!("disk{n}"));
        sparse_file(&disk, 128 * MIB);
        vm.disk(&disk);
    }
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
    let script = [
        text("dm/lib.sh"),
        format!("WRITES={}\n", writes.len()),
        text("dm/walkthroughs.sh"),
        format!("follow {what}\n"),
    ];
    let began = Instant::now();
    let output = vm.run(&script.concat());
    println!(
        "{what}: {} lines are the same; {:.0?}, up since {} s, {} s and {} s",
        output.value(&format!("same.{what}")),
        began.elapsed(),
        output.value("VM-BEGIN"),
        output.value("uptime.kernel"),
        output.value("uptime.nbdsnap"),
    );
    Some(output)
}

#[test]
fn a_mounted_linear_device_is_backed_up_by_the_same_words() {
    follow("linear");
}

#[test]
fn a_mounted_xfs_is_backed_up_by_the_same_words() {
    follow("xfs");
}

#[test]
fn a_volume_is_rolled_back_by_the_same_words() {
    let Some(output) = follow("roll") else {
        return;
    };
    let [kernel, ours] = ["kernel", "nbdsnap"].map(|side| three_lines(&output, side));
    for (side, [before, during, after]) in [("the kernel", kernel), ("nbdsnap", ours)] {
        println!("{side}: {before:?} {during:?} {after:?}");
        assert!(
            during.0 < before.0 && during.0 > after.0,
            "{side}: in the middle of the merge"
        );
        assert_eq!(after.0, after.2, "{side}: done");
    }
    assert_eq!(kernel[0], ours[0], "the snapshot's status");
    assert_eq!(kernel[2], ours[2], "the status at the end");
}
