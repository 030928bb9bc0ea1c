//! Striped over two disks and over three, linear over pieces of several, an origin on
//! top and snapshots of two chunk sizes, with random requests to all of them: every
//! device equal to the kernel's, byte for byte.

use nbdsnap_tests::harness::files::folder;
use nbdsnap_tests::harness::random::Random;
use nbdsnap_tests::kernel::dm::layout::make_disks;
use nbdsnap_tests::kernel::dm::step::Step;
use nbdsnap_tests::kernel::dm::words::difference;
use nbdsnap_tests::kernel::machine::Machine;
use nbdsnap_tests::kernel::seed;

use super::SUITE;
use super::differential::{on_nbdsnap, on_the_kernel};

const SECTOR: u64 = 512;

/// Requests of a round, to each base.
const WRITES: u64 = 20;

/// A base: its name, its sectors and its table.
const BASES: [(&str, u64, &str); 3] = [
    ("two", 2048, "0 2048 striped 2 16 @a 64 @b 1088"),
    ("three", 1536, "0 1536 striped 3 8 @c 64 @a 2112 @b 4160"),
    (
        "pieces",
        1501,
        "0 800 linear @b 8256\n800 8 linear @a 8256\n808 500 linear @c 4160\n1308 193 linear @b 64",
    ),
];

/// The chunk sizes of the two snapshots of each base, and the sectors of their stores.
const SNAPSHOTS: [(u64, u64); 2] = [(8, 4096), (32, 4096)];

fn dm(steps: &mut Vec<Step>, words: &[&str]) {
    steps.push(Step::dm(words.iter().copied()));
}

/// All devices of one base, the second snapshot later than the first.
fn snapshot(steps: &mut Vec<Step>, base: usize, which: usize) {
    let (name, len, _) = BASES[base];
    let (chunk, store) = SNAPSHOTS[which];
    let disk = ['a', 'b', 'c'][(base + which) % 3];
    let start = 16384 + (base * 2 + which) as u64 * 8192;
    let cow = format!("{name}-cow{chunk}");
    dm(
        steps,
        &[
            "create",
            &cow,
            "--table",
            &format!("0 {store} linear @{disk} {start}"),
        ],
    );
    steps.push(Step::Zero {
        device: cow.clone(),
        len: 32 * SECTOR,
    });
    let origin = format!("{name}-origin");
    let table = format!("0 {len} snapshot /dev/mapper/{name} /dev/mapper/{cow} P {chunk}");
    dm(steps, &["suspend", &origin]);
    dm(
        steps,
        &["create", &format!("{name}-snap{chunk}"), "--table", &table],
    );
    dm(steps, &["resume", &origin]);
}

/// Random requests to an origin and to its snapshots.
fn requests(steps: &mut Vec<Step>, base: usize, snapshots: usize, random: &mut Random) {
    let (name, len, _) = BASES[base];
    for _ in 0..WRITES {
        let to = random.below(snapshots as u64 * 2 + 1) as usize;
        let device = match SNAPSHOTS[..snapshots].get(to) {
            Some((chunk, _)) => format!("{name}-snap{chunk}"),
            None => format!("{name}-origin"),
        };
        let first = random.below(len);
        let sectors = random.between(1, 100).min(len - first);
        steps.push(Step::Write {
            device,
            offset: first * SECTOR,
            len: sectors * SECTOR,
            fill: random.bits(),
        });
    }
}

fn look(steps: &mut Vec<Step>, base: usize, snapshots: usize) {
    let (name, ..) = BASES[base];
    let mut devices = vec![name.to_owned(), format!("{name}-origin")];
    for (chunk, _) in &SNAPSHOTS[..snapshots] {
        devices.extend([format!("{name}-snap{chunk}"), format!("{name}-cow{chunk}")]);
    }
    for device in devices {
        steps.push(Step::Read { device });
    }
}

fn steps(seed: u64) -> Vec<Step> {
    let mut random = Random::new(seed);
    let mut steps = Vec::new();
    for (name, len, table) in BASES {
        dm(&mut steps, &["create", name, "--table", table]);
        let origin = format!("0 {len} snapshot-origin /dev/mapper/{name}");
        dm(
            &mut steps,
            &["create", &format!("{name}-origin"), "--table", &origin],
        );
    }
    for count in 1..=SNAPSHOTS.len() {
        for base in 0..BASES.len() {
            snapshot(&mut steps, base, count - 1);
            requests(&mut steps, base, count, &mut random);
            look(&mut steps, base, count);
        }
    }
    for words in [&["table"][..], &["status"], &["deps"], &["info", "-c"]] {
        dm(&mut steps, words);
    }
    steps
}

#[test]
fn stripes_and_pieces_are_the_kernels() {
    let Some(machine) = Machine::for_suite(SUITE) else {
        return;
    };
    let seed = seed(SUITE, "stripes_and_pieces_are_the_kernels");
    let steps = steps(seed);
    let (here, there) = (folder(), folder());
    let kernel = on_the_kernel(machine, &make_disks(there.path(), seed), &steps);
    if let Some(n) = kernel.iter().position(|outcome| outcome.code != 0) {
        panic!("the kernel refuses {}: {}", steps[n], kernel[n]);
    }
    let (ours, server) = on_nbdsnap(here.path(), &make_disks(here.path(), seed), &steps);
    if let Some(told) = difference(&steps, &kernel, &ours, ["dmsetup", "nbdsnap"]) {
        panic!("seed {seed}: {told}");
    }
    server.stop();
    // And that a difference is seen: other bytes in the last write.
    let mut other_steps = steps.clone();
    let at = other_steps
        .iter()
        .rposition(|step| matches!(step, Step::Write { .. }));
    let step = &mut other_steps[at.expect("a write")];
    let Step::Write { fill, .. } = step else {
        unreachable!("it is a write")
    };
    *fill ^= 1;
    let other = folder();
    let (altered, server) = on_nbdsnap(other.path(), &make_disks(other.path(), seed), &other_steps);
    server.stop();
    let told = difference(&steps, &kernel, &altered, ["dmsetup", "altered"]);
    assert!(
        told.is_some_and(|told| told.contains("read ")),
        "not noticed"
    );
}
