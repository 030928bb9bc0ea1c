//! Stores that fill, in the kernel's hands and in nbdsnap's: the same requests
//! fail in both, and what the one left, invalid or overflowed, is the same to the
//! other.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::SUITE;
use nbdsnap_engine::{Status, StoreKind};
use nbdsnap_tests::harness::files::folder;
use nbdsnap_tests::harness::random::Random;
use nbdsnap_tests::harness::server::Server;
use nbdsnap_tests::kernel::compare::{Compared, expect_difference, expect_same, same, same_bytes};
use nbdsnap_tests::kernel::exports::{self, Cow};
use nbdsnap_tests::kernel::machine::Machine;
use nbdsnap_tests::kernel::play::{Act, Score, Step, apply, outcomes_text, play};
use nbdsnap_tests::kernel::seed;
use nbdsnap_tests::kernel::slices::Slices;
use nbdsnap_tests::kernel::vm::{Output, Vm};

const SECTOR: u64 = 512;
const PLAYER: &str = env!("CARGO_BIN_EXE_kernel-player");
/// Sectors of every origin here.
const ORIGIN: u64 = 8 * 300 + 3;
const STEPS: usize = 120;

/// A snapshot whose store is too small for what is played.
struct Shape {
    name: &'static str,
    /// As dm-snapshot's table has it.
    letter: &'static str,
    kind: StoreKind,
    chunk: u64,
    /// Chunks of the store.
    chunks: u64,
    /// One step in so many writes to the snapshot; 1: all of them.
    snapshot_writes: u64,
    /// How it ends.
    end: Status,
}

const SHAPES: [Shape; 5] = [
    Shape {
        name: "p_origin",
        letter: "P",
        kind: StoreKind::Persistent,
        chunk: 8,
        chunks: 40,
        snapshot_writes: 0,
        end: Status::Invalid,
    },
    Shape {
        name: "p_snapshot",
        letter: "P",
        kind: StoreKind::Persistent,
        chunk: 8,
        chunks: 50,
        snapshot_writes: 1,
        end: Status::Invalid,
    },
    Shape {
        name: "po_origin",
        letter: "PO",
        kind: StoreKind::PersistentOverflow,
        chunk: 1,
        chunks: 81,
        snapshot_writes: 0,
        end: Status::Invalid,
    },
    Shape {
        name: "po_snapshot",
        letter: "PO",
        kind: StoreKind::PersistentOverflow,
        chunk: 8,
        chunks: 37,
        snapshot_writes: 1,
        end: Status::Overflow,
    },
    Shape {
        name: "po_small",
        letter: "PO",
        kind: StoreKind::PersistentOverflow,
        chunk: 1,
        chunks: 60,
        snapshot_writes: 1,
        end: Status::Overflow,
    },
];

impl Shape {
    fn score(&self, seed: u64) -> Score {
        Score {
            seed,
            steps: STEPS,
            chunk: self.chunk * SECTOR,
            views: vec![ORIGIN * SECTOR; 2],
            snapshot_writes: self.snapshot_writes,
            within_chunk: true,
        }
    }

    fn options(&self) -> String {
        let overflow = match self.kind {
            StoreKind::PersistentOverflow => ",overflow",
            StoreKind::Persistent | StoreKind::Transient => "",
        };
        format!(
            ",chunk={}{overflow},size={}",
            self.chunk * SECTOR,
            self.cow_bytes()
        )
    }

    fn cow_bytes(&self) -> u64 {
        self.chunks * self.chunk * SECTOR
    }
}

/// What one side made of a shape.
#[derive(Clone)]
struct Left {
    outcomes: String,
    origin: Vec<u8>,
    cow: Vec<u8>,
}

/// What the views hold where the steps with these outcomes are played.
fn models(image: &[u8], steps: &[Step], outcomes: &str) -> Vec<Vec<u8>> {
    let succeeded = |(_, outcome): &(&Step, char)| *outcome == '1';
    let steps: Vec<Step> = steps
        .iter()
        .zip(outcomes.chars())
        .filter(succeeded)
        .map(|(step, _)| step.clone())
        .collect();
    let mut models = vec![image.to_vec(); 2];
    apply(&steps, &mut models);
    models
}

/// The outcomes of writes; what a flush of a lost snapshot says is each one's own.
fn of_writes(steps: &[Step], outcomes: &str) -> String {
    let is_write = |(step, _): &(&Step, char)| matches!(step.act, Act::Write { .. });
    let both = steps.iter().zip(outcomes.chars());
    both.filter(is_write).map(|(_, outcome)| outcome).collect()
}

/// The kernel fills its stores, loads them once more, and loads nbdsnap's.
fn kernels_side(
    machine: &Machine,
    image: &[u8],
    seed: u64,
    ours: &[Left],
) -> (Slices, Output, tempfile::TempDir) {
    let folder = folder();
    let mut slices = Slices::create(&folder.path().join("slices"));
    let mut script = String::new();
    for (shape, ours) in SHAPES.iter().zip(ours) {
        let name = shape.name;
        slices.add_filled(&format!("{name}.o"), image);
        slices.add(&format!("{name}.c"), shape.cow_bytes());
        slices.add(&format!("{name}.d"), image.len() as u64);
        slices.add_filled(&format!("{name}.our.o"), &ours.origin);
        slices.add_filled(&format!("{name}.our.c"), &ours.cow);
        slices.add(&format!("{name}.our.d"), image.len() as u64);
        script_of(shape, seed, &mut script);
    }
    let mut vm = Vm::new(machine);
    vm.disk(slices.path()).program(Path::new(PLAYER));
    let output = vm.run(&(slices.script("/dev/vda") + &script));
    (slices, output, folder)
}

fn script_of(shape: &Shape, seed: u64, script: &mut String) {
    let Shape {
        name,
        letter,
        chunk,
        ..
    } = shape;
    let table = |of: &str| {
        format!(
            "0 {ORIGIN} snapshot /dev/mapper/{name}{of}.o /dev/mapper/{name}{of}.c {letter} {chunk}"
        )
    };
    let devices = ["", ".s"].map(|view| format!("/dev/mapper/{name}{view}"));
    let play = shape.score(seed).command(&devices);
    let (own, our) = (table(""), table(".our"));
    let _ = write!(
        script,
        "dmsetup create {name}.s --table \"{own}\"
dmsetup create {name} --table \"0 {ORIGIN} snapshot-origin /dev/mapper/{name}.o\"
say {name} $({play})
say {name}.end $(status {name}.s)
dmsetup remove {name}; dmsetup remove {name}.s
dmsetup create {name}.s --table \"{own}\"
say {name}.again $(status {name}.s)
copy /dev/mapper/{name}.s /dev/mapper/{name}.d || say {name}.unreadable yes
dmsetup create {name}.t --table \"{our}\"
say {name}.our $(status {name}.t)
copy /dev/mapper/{name}.t /dev/mapper/{name}.our.d || say {name}.our.unreadable yes
dmsetup remove {name}.s; dmsetup remove {name}.t
"
    );
}

/// nbdsnap fills a store; what it leaves after a clean end.
fn our_side(shape: &Shape, image: &[u8], seed: u64) -> Left {
    let folder = folder();
    let (origin, cow) = lay_out(folder.path(), shape, image, None);
    let server = exports::serve(folder.path(), &origin, std::slice::from_ref(&cow), false);
    let steps = shape.score(seed).steps();
    let outcomes = outcomes_text(&play(&steps, &mut exports::places(&server, 2)));
    let models = models(image, &steps, &outcomes);
    let invalid = shape.end == Status::Invalid;
    expect_same(check_views(shape.name, &server, &models, invalid));
    server.stop();
    let mut bytes = std::fs::read(&cow.path).expect("readable");
    assert!(
        bytes.len() as u64 <= shape.cow_bytes(),
        "{}: the store grew past its size",
        shape.name
    );
    bytes.resize(shape.cow_bytes() as usize, 0);
    Left {
        outcomes,
        origin: std::fs::read(&origin).expect("readable"),
        cow: bytes,
    }
}

fn lay_out(folder: &Path, shape: &Shape, origin: &[u8], cow: Option<&[u8]>) -> (PathBuf, Cow) {
    let disk = folder.join("disk");
    std::fs::write(&disk, origin).expect("a test file can be written");
    let path = folder.join("cow");
    if let Some(cow) = cow {
        std::fs::write(&path, cow).expect("a test file can be written");
    }
    (
        disk,
        Cow {
            path,
            options: shape.options(),
        },
    )
}

fn check_views(what: &str, server: &Server, models: &[Vec<u8>], invalid: bool) -> Compared {
    let origin = exports::read(server, 0).expect("the origin is readable");
    same_bytes(&origin, &models[0], &format!("{what}: nbdsnap's origin"))?;
    match exports::read(server, 1) {
        Ok(_) if invalid => Err(format!("{what}: nbdsnap reads a lost snapshot")),
        Ok(view) => same_bytes(&view, &models[1], &format!("{what}: nbdsnap's snapshot")),
        Err(_) if invalid => Ok(()),
        Err(why) => Err(format!("{what}: nbdsnap's snapshot: {why}")),
    }
}

fn compare(
    shape: &Shape,
    image: &[u8],
    seed: u64,
    ours: &Left,
    slices: &Slices,
    output: &Output,
) -> Compared {
    let name = shape.name;
    let steps = shape.score(seed).steps();
    let kernels = output.value(name).trim_start_matches("outcomes ");
    let of = |what: &str| format!("{name}: {what}");
    same(
        &of_writes(&steps, kernels),
        &of_writes(&steps, &ours.outcomes),
        &of("which writes succeeded: the kernel's, nbdsnap's"),
    )?;
    let invalid = shape.end == Status::Invalid;
    same(
        output.value(&format!("{name}.end")),
        &shape.end.to_string(),
        &of("the kernel's end"),
    )?;
    same(
        &output.find(&format!("{name}.unreadable")).is_some(),
        &invalid,
        &of("whether the kernel's own is lost"),
    )?;
    same(
        &output.find(&format!("{name}.our.unreadable")).is_some(),
        &invalid,
        &of("whether nbdsnap's is lost to the kernel"),
    )?;

    // The kernel's store, loaded again by the kernel and by nbdsnap.
    let (origin, cow) = (
        slices.read(&format!("{name}.o")),
        slices.read(&format!("{name}.c")),
    );
    let models = models(image, &steps, kernels);
    same_bytes(&origin, &models[0], &of("the kernel's origin"))?;
    let folder = folder();
    let (disk, cow) = lay_out(folder.path(), shape, &origin, Some(&cow));
    let status = |path: &Path| {
        exports::status(path, shape.kind, ORIGIN * SECTOR)
            .unwrap_or_else(|e| panic!("{name}: {e}"))
            .to_string()
    };
    same(
        output.value(&format!("{name}.again")),
        &status(&cow.path),
        &of("loaded again"),
    )?;
    let server = exports::serve(folder.path(), &disk, std::slice::from_ref(&cow), true);
    check_views(name, &server, &models, invalid)?;
    server.stop();

    // nbdsnap's store, loaded by the kernel.
    std::fs::write(&cow.path, &ours.cow).expect("a test file can be written");
    same(
        output.value(&format!("{name}.our")),
        &status(&cow.path),
        &of("nbdsnap's, as the kernel loads it"),
    )?;
    if invalid {
        return Ok(());
    }
    let (own, our) = (
        slices.read(&format!("{name}.d")),
        slices.read(&format!("{name}.our.d")),
    );
    same_bytes(&own, &models[1], &of("the kernel's snapshot"))?;
    same_bytes(&our, &models[1], &of("nbdsnap's, as the kernel reads it"))?;
    let kernels = slices.read(&format!("{name}.c"));
    same_bytes(&ours.cow, &kernels, &of("nbdsnap's store"))
}

#[test]
fn a_full_store_is_as_full_to_the_other() {
    let Some(machine) = Machine::for_suite(SUITE) else {
        return;
    };
    let seed = seed(SUITE, "a_full_store");
    let mut random = Random::new(seed);
    let image = random.bytes((ORIGIN * SECTOR) as usize);
    let seed = random.below(1 << 32);
    let ours: Vec<Left> = SHAPES
        .iter()
        .map(|shape| our_side(shape, &image, seed))
        .collect();
    let (slices, output, _folder) = kernels_side(machine, &image, seed, &ours);
    for (shape, ours) in SHAPES.iter().zip(&ours) {
        expect_same(compare(shape, &image, seed, ours, &slices, &output));
    }
    differences_are_noticed(&image, seed, &ours, &slices, &output);
}

/// What nbdsnap left is another than what it was: the comparison notices, for a
/// store that overflowed and for one that was lost.
fn differences_are_noticed(
    image: &[u8],
    seed: u64,
    ours: &[Left],
    slices: &Slices,
    output: &Output,
) {
    let compare = |n: usize, left: &Left, image: &[u8]| {
        compare(&SHAPES[n], image, seed, left, slices, output)
    };
    for n in [0, 3] {
        let failed = ours[n].outcomes.replace('1', "0");
        let wrong = ours[n].with(|left| left.outcomes = failed);
        expect_difference(compare(n, &wrong, image), "which writes succeeded");
        let mut sectors = image.chunks(512).zip(ours[n].origin.chunks(512));
        let untouched = sectors.position(|(before, after)| before == after);
        let mut other = image.to_vec();
        other[untouched.expect("a sector that nobody wrote") * 512] ^= 1;
        expect_difference(compare(n, &ours[n], &other), "origin: differs");
        // The word that says valid, or that does not.
        let wrong = ours[n].with(|left| left.cow[4] ^= 1);
        expect_difference(compare(n, &wrong, image), "as the kernel loads it");
    }
    let wrong = ours[3].with(|left| left.cow[2 * 8 * 512] ^= 1);
    expect_difference(compare(3, &wrong, image), "nbdsnap's store: differs");
}

impl Left {
    /// The same, but for one thing.
    fn with(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut other = self.clone();
        change(&mut other);
        other
    }
}
