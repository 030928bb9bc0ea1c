//! The kernel's dm-snapshot and nbdsnap on the same stores, turn by turn: what
//! one has written the other reads, statuses are equal, and where both play the
//! same requests one at a time, the stores are the same to the byte.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use nbdsnap_engine::StoreKind;
use nbdsnap_format::{ChunkSize, Layout};
use nbdsnap_tests::harness::files::folder;
use nbdsnap_tests::harness::random::Random;
use nbdsnap_tests::harness::server::Server;
use nbdsnap_tests::kernel::compare::{Compared, expect_difference, expect_same, same, same_bytes};
use nbdsnap_tests::kernel::exports::{self, Cow};
use nbdsnap_tests::kernel::machine::Machine;
use nbdsnap_tests::kernel::play::{Score, apply, play};
use nbdsnap_tests::kernel::seed;
use nbdsnap_tests::kernel::slices::Slices;
use nbdsnap_tests::kernel::vm::{Output, Vm};

const SECTOR: u64 = 512;
const SUITE: &str = "kernel_both_ways";
const PLAYER: &str = env!("CARGO_BIN_EXE_kernel-player");

/// A disk with two snapshots, of different chunk sizes.
struct Shape {
    name: &'static str,
    /// Sectors of a chunk of each snapshot.
    chunks: [u64; 2],
    /// Sectors of the origin: its last chunk is a fraction of one where it can be.
    origin: u64,
    /// Steps of a turn.
    steps: usize,
}

/// Every chunk size that is asked of comes first once. Those of 1, 8 and 32
/// sectors fill several areas.
const SHAPES: [Shape; 5] = [
    Shape {
        name: "c1",
        chunks: [1, 8],
        origin: 3001,
        steps: 150,
    },
    Shape {
        name: "c8",
        chunks: [8, 32],
        origin: 8 * 1600 + 5,
        steps: 150,
    },
    Shape {
        name: "c32",
        chunks: [32, 1],
        origin: 32 * 1500 + 17,
        steps: 150,
    },
    Shape {
        name: "c128",
        chunks: [128, 8],
        origin: 128 * 150 + 77,
        steps: 60,
    },
    Shape {
        name: "c2048",
        chunks: [2048, 128],
        origin: 2048 * 12 + 1111,
        steps: 25,
    },
];

/// A shape with its content, as it stands between two turns.
struct Disk {
    shape: &'static Shape,
    origin: Vec<u8>,
    cows: [Vec<u8>; 2],
    /// What the origin and the snapshots must show.
    models: Vec<Vec<u8>>,
}

impl Disk {
    fn new(shape: &'static Shape, random: &mut Random) -> Self {
        let origin = random.bytes((shape.origin * SECTOR) as usize);
        let cow = |chunk: u64| {
            let chunk = ChunkSize::from_sectors(chunk).expect("a chunk size");
            let layout = Layout::new(chunk);
            let needed = layout.sectors_needed_for_origin(shape.origin * SECTOR);
            vec![0; ((needed + 2 * chunk.sectors()) * SECTOR) as usize]
        };
        Self {
            shape,
            cows: shape.chunks.map(cow),
            models: vec![origin.clone(); 3],
            origin,
        }
    }

    fn score(&self, seed: u64) -> Score {
        Score {
            seed,
            steps: self.shape.steps,
            chunk: self.shape.chunks[0] * SECTOR,
            views: vec![self.origin.len() as u64; 3],
            snapshot_writes: 3,
            within_chunk: false,
        }
    }

    /// Origin and stores as files in a folder.
    fn lay_out(&self, folder: &Path) -> (PathBuf, Vec<Cow>) {
        let origin = folder.join("disk");
        std::fs::write(&origin, &self.origin).expect("a test file can be written");
        let mut cows = Vec::new();
        for (n, cow) in self.cows.iter().enumerate() {
            let path = folder.join(format!("cow{n}"));
            std::fs::write(&path, cow).expect("a test file can be written");
            let bytes = self.shape.chunks[n] * SECTOR;
            let options = format!(",chunk={bytes}");
            cows.push(Cow { path, options });
        }
        (origin, cows)
    }

    /// Take the files back in.
    fn take_in(&mut self, origin: &Path, cows: &[Cow]) {
        self.origin = std::fs::read(origin).expect("readable");
        for (n, cow) in cows.iter().enumerate() {
            let len = self.cows[n].len();
            self.cows[n] = std::fs::read(&cow.path).expect("readable");
            assert!(self.cows[n].len() <= len, "a store grew past its size");
            self.cows[n].resize(len, 0);
        }
    }

    fn same_as(&self, other: &Self, what: &str) -> Compared {
        let name = self.shape.name;
        let origin = format!("{name}: {what}: origin");
        same_bytes(&self.origin, &other.origin, &origin)?;
        (0..2).try_for_each(|n| {
            let chunk = self.shape.chunks[n] * SECTOR;
            let store = format!("{name}: {what}: the store of snapshot {n}, chunks of {chunk}");
            same_bytes(&self.cows[n], &other.cows[n], &store)
        })
    }

    /// What nbdsnap shows is what it must.
    fn check_views(&self, server: &Server, what: &str) -> Compared {
        let mut models = self.models.iter().enumerate();
        models.try_for_each(|(view, model)| {
            let shown = exports::read(server, view).expect("readable");
            let what = format!("{}: {what}, nbdsnap's view {view}", self.shape.name);
            same_bytes(&shown, model, &what)
        })
    }

    /// Its first store has filled an area, and gone on into the next.
    fn assert_several_areas(&self) {
        let chunk = (self.shape.chunks[0] * SECTOR) as usize;
        let second_area = (1 + chunk / 16 + 1) * chunk;
        let entries = &self.cows[0][second_area..second_area + 16];
        assert!(
            entries.iter().any(|byte| *byte != 0),
            "{}: the second area was never used",
            self.shape.name
        );
    }

    /// The statuses of its stores, as the engine counts them.
    fn statuses(&self, cows: &[Cow]) -> Vec<String> {
        let origin = self.origin.len() as u64;
        let status = |cow: &Cow| {
            exports::status(&cow.path, StoreKind::Persistent, origin)
                .unwrap_or_else(|e| panic!("{}: {e}", cow.path.display()))
                .to_string()
        };
        cows.iter().map(status).collect()
    }
}

/// The kernel's turn on all disks at once: it loads the stores, plays, and shows
/// its snapshots and their statuses before and after. What is wrong with each.
fn kernel_turn(machine: &Machine, disks: &mut [Disk], seed: Option<u64>) -> Vec<Compared> {
    let folder = folder();
    let mut slices = Slices::create(&folder.path().join("slices"));
    let mut script = String::new();
    for disk in &*disks {
        let name = disk.shape.name;
        slices.add_filled(&format!("{name}.o"), &disk.origin);
        for n in 0..2 {
            slices.add_filled(&format!("{name}.c{n}"), &disk.cows[n]);
            slices.add(&format!("{name}.d{n}"), disk.origin.len() as u64);
        }
        script_of(disk, seed, &mut script);
    }
    let mut vm = Vm::new(machine);
    vm.disk(slices.path()).program(Path::new(PLAYER));
    let output = vm.run(&(slices.script("/dev/vda") + &script));
    disks
        .iter_mut()
        .map(|disk| check_kernel(disk, &slices, &output, seed))
        .collect()
}

fn script_of(disk: &Disk, seed: Option<u64>, script: &mut String) {
    let Shape {
        name,
        chunks,
        origin,
        ..
    } = disk.shape;
    for (n, chunk) in chunks.iter().enumerate() {
        let _ = write!(
            script,
            "dmsetup create {name}.s{n} --table \"0 {origin} snapshot /dev/mapper/{name}.o /dev/mapper/{name}.c{n} P {chunk}\"\n\
             say before.{name}.{n} $(status {name}.s{n})\n"
        );
    }
    let _ = writeln!(
        script,
        "dmsetup create {name} --table \"0 {origin} snapshot-origin /dev/mapper/{name}.o\""
    );
    if let Some(seed) = seed {
        let devices = ["", ".s0", ".s1"].map(|view| format!("/dev/mapper/{name}{view}"));
        let command = disk.score(seed).command(&devices);
        let _ = writeln!(script, "{command} >/tmp/{name} || die {name}: play");
        let _ = writeln!(
            script,
            "! grep -q 0 /tmp/{name} || die {name}: $(cat /tmp/{name})"
        );
    }
    for n in 0..2 {
        let _ = write!(
            script,
            "copy /dev/mapper/{name}.s{n} /dev/mapper/{name}.d{n}\n\
             say after.{name}.{n} $(status {name}.s{n})\n"
        );
    }
    let _ = writeln!(
        script,
        "dmsetup remove {name}; dmsetup remove {name}.s0; dmsetup remove {name}.s1"
    );
}

/// Statuses before, views after, nbdsnap on what the kernel left, statuses after.
fn check_kernel(disk: &mut Disk, slices: &Slices, output: &Output, seed: Option<u64>) -> Compared {
    let name = disk.shape.name;
    let folder = folder();
    let (origin, cows) = disk.lay_out(folder.path());
    let is_new = |n: usize| disk.cows[n].iter().all(|byte| *byte == 0);
    if !is_new(0) && !is_new(1) {
        for (n, ours) in disk.statuses(&cows).iter().enumerate() {
            let kernels = output.value(&format!("before.{name}.{n}"));
            let what = format!("{name}: status of snapshot {n} as it is loaded");
            same(kernels, ours, &what)?;
        }
    }
    if let Some(seed) = seed {
        apply(&disk.score(seed).steps(), &mut disk.models);
    }
    disk.origin = slices.read(&format!("{name}.o"));
    let what = format!("{name}: the kernel's origin");
    same_bytes(&disk.origin, &disk.models[0], &what)?;
    for n in 0..2 {
        disk.cows[n] = slices.read(&format!("{name}.c{n}"));
        let what = format!("{name}: the kernel's snapshot {n}");
        let shown = slices.read(&format!("{name}.d{n}"));
        same_bytes(&shown, &disk.models[n + 1], &what)?;
    }
    drop((origin, cows));
    let (origin, cows) = disk.lay_out(folder.path());
    for (n, ours) in disk.statuses(&cows).iter().enumerate() {
        let kernels = output.value(&format!("after.{name}.{n}"));
        let what = format!("{name}: status of snapshot {n} after the turn");
        same(kernels, ours, &what)?;
    }
    let server = exports::serve(folder.path(), &origin, &cows, true);
    disk.check_views(&server, "after the kernel")?;
    server.stop();
    Ok(())
}

/// nbdsnap's turn on one disk, one request at a time or many at once.
fn our_turn(disk: &mut Disk, seed: u64, at_once: bool) {
    let name = disk.shape.name;
    let folder = folder();
    let (origin, cows) = disk.lay_out(folder.path());
    let server = exports::serve(folder.path(), &origin, &cows, false);
    let steps = disk.score(seed).steps();
    apply(&steps, &mut disk.models);
    if at_once {
        let most = exports::play_at_once(&server, 3, &steps);
        assert!(most > 1, "{name}: no two requests were ever in flight");
    } else {
        let outcomes = play(&steps, &mut exports::places(&server, 3));
        assert!(outcomes.iter().all(|ok| *ok), "{name}: a request failed");
    }
    expect_same(disk.check_views(&server, "after its turn"));
    server.stop();
    disk.take_in(&origin, &cows);
}

#[test]
fn turn_by_turn_with_small_chunks_each_reads_what_the_other_wrote_and_writes_the_same_bytes() {
    let Some((machine, mut disks)) = turn_by_turn("turn_by_turn_with_small", &SHAPES[..2]) else {
        return;
    };
    // Once more, beside a disk with a store that is wrong in one byte.
    let wrong = disks[0].with_a_wrong_byte();
    expect_difference(wrong.same_as(&disks[0], "x"), "the store of snapshot 0");
    wrong.nbdsnap_shows_the_difference();
    disks.push(wrong);
    let mut compared = kernel_turn(machine, &mut disks, None);
    let last = compared.pop().expect("the wrong one");
    expect_difference(last, "wrong: the kernel's snapshot 0: differs");
    compared.into_iter().for_each(expect_same);
}

#[test]
fn turn_by_turn_with_large_chunks_each_reads_what_the_other_wrote_and_writes_the_same_bytes() {
    let Some((machine, mut disks)) = turn_by_turn("turn_by_turn_with_large", &SHAPES[2..]) else {
        return;
    };
    let compared = kernel_turn(machine, &mut disks, None);
    compared.into_iter().for_each(expect_same);
}

/// Three turns of the kernel's and three of nbdsnap's; the disks as they are then.
fn turn_by_turn(test: &str, shapes: &'static [Shape]) -> Option<(&'static Machine, Vec<Disk>)> {
    let machine = Machine::for_suite(SUITE)?;
    let seed = seed(SUITE, test);
    let mut random = Random::new(seed);
    let mut disks: Vec<Disk> = shapes
        .iter()
        .map(|shape| Disk::new(shape, &mut random))
        .collect();
    for turn in 0..3 {
        // Both from the same state, one request at a time: the same bytes.
        let seed = random.below(1 << 32);
        let mut ours: Vec<Disk> = disks.iter().map(Disk::twin).collect();
        let compared = kernel_turn(machine, &mut disks, Some(seed));
        compared.into_iter().for_each(expect_same);
        for (disk, ours) in disks.iter().zip(&mut ours) {
            our_turn(ours, seed, false);
            let what = format!("turn {turn}, nbdsnap's bytes against the kernel's");
            expect_same(ours.same_as(disk, &what));
        }
        // Then nbdsnap on the kernel's stores, many requests at once.
        let seed = random.below(1 << 32);
        for disk in &mut disks {
            our_turn(disk, seed, true);
        }
    }
    for disk in disks.iter().filter(|disk| disk.shape.chunks[0] <= 32) {
        disk.assert_several_areas();
    }
    Some((machine, disks))
}

/// A disk that is like the first one, and wrong.
const WRONG: Shape = Shape {
    name: "wrong",
    ..SHAPES[0]
};

impl Disk {
    /// The same, but for a byte of the first chunk in the first store.
    fn with_a_wrong_byte(&self) -> Self {
        let mut wrong = self.twin();
        wrong.shape = &WRONG;
        let first_chunk = 2 * WRONG.chunks[0] * SECTOR;
        wrong.cows[0][first_chunk as usize] ^= 1;
        wrong
    }

    fn nbdsnap_shows_the_difference(&self) {
        let folder = folder();
        let (origin, cows) = self.lay_out(folder.path());
        let server = exports::serve(folder.path(), &origin, &cows, true);
        expect_difference(self.check_views(&server, "x"), "view 1: differs");
        server.stop();
    }

    /// The same once more.
    fn twin(&self) -> Self {
        Self {
            shape: self.shape,
            origin: self.origin.clone(),
            cows: self.cows.clone(),
            models: self.models.clone(),
        }
    }
}
