//! A merge that one began, and that was cut off, the other finishes: the kernel
//! one that nbdsnap was killed in, nbdsnap one that a power cut of the kernel's
//! machine ended. The origin is then what the snapshot was, and another snapshot of
//! the same origin notices nothing.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::SUITE;
use nbdsnap_engine::StoreKind;
use nbdsnap_format::{ChunkSize, Layout};
use nbdsnap_tests::harness::files::folder;
use nbdsnap_tests::harness::process::{Running, wait_until};
use nbdsnap_tests::harness::random::{Random, long_run};
use nbdsnap_tests::harness::server::{Serve, Server};
use nbdsnap_tests::kernel::compare::{Compared, expect_difference, expect_same, same_bytes};
use nbdsnap_tests::kernel::exports;
use nbdsnap_tests::kernel::machine::Machine;
use nbdsnap_tests::kernel::play::{Score, apply, play};
use nbdsnap_tests::kernel::seed;
use nbdsnap_tests::kernel::slices::Slices;
use nbdsnap_tests::kernel::vm::Vm;

const SECTOR: u64 = 512;
const PLAYER: &str = env!("CARGO_BIN_EXE_kernel-player");

/// A disk with two snapshots: one that is merged, and one that stays.
struct Shape {
    name: &'static str,
    /// Sectors of a chunk of each.
    chunks: [u64; 2],
    /// Sectors of the origin, a fraction of a chunk at its end.
    origin: u64,
    steps: usize,
}

/// All have more than goes in a step of a merge (4 MiB), so that a kill falls between
/// two.
const SHAPES: [Shape; 3] = [
    Shape {
        name: "c1",
        chunks: [1, 8],
        origin: 24_001,
        steps: 900,
    },
    Shape {
        name: "c8",
        chunks: [8, 1],
        origin: 8 * 3000 + 5,
        steps: 500,
    },
    Shape {
        name: "c32",
        chunks: [32, 128],
        origin: 32 * 900 + 17,
        steps: 200,
    },
];

/// A shape with its content, and what its views hold.
struct Disk {
    shape: &'static Shape,
    origin: Vec<u8>,
    cows: [Vec<u8>; 2],
    /// What the origin and the snapshots show before the merge.
    models: Vec<Vec<u8>>,
}

impl Disk {
    fn new(shape: &'static Shape, random: &mut Random) -> Self {
        let bytes = shape.origin * SECTOR;
        let origin = random.bytes(bytes as usize);
        let cow = |sectors: u64| {
            let chunk = ChunkSize::from_sectors(sectors).expect("a chunk size");
            let needed = Layout::new(chunk).sectors_needed_for_origin(bytes);
            vec![0; ((needed + 2 * sectors) * SECTOR) as usize]
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

    /// As files in a folder.
    fn lay_out(&self, folder: &Path) -> Files {
        let files = Files {
            origin: folder.join("disk"),
            cows: [0, 1].map(|n| folder.join(format!("cow{n}"))),
        };
        let write = |path: &Path, bytes: &[u8]| {
            std::fs::write(path, bytes).expect("a test file can be written");
        };
        write(&files.origin, &self.origin);
        for (path, cow) in files.cows.iter().zip(&self.cows) {
            write(path, cow);
        }
        files
    }

    /// The files are taken back in.
    fn take_in(&mut self, files: &Files) {
        let read = |path: &Path, len: usize| {
            let mut bytes = std::fs::read(path).expect("readable");
            assert!(bytes.len() <= len, "{} grew past its size", path.display());
            bytes.resize(len, 0);
            bytes
        };
        self.origin = read(&files.origin, self.origin.len());
        self.cows = [0, 1].map(|n| read(&files.cows[n], self.cows[n].len()));
    }

    fn serve(&self, folder: &Path, files: &Files) -> Server {
        let mut serve = Serve::on_socket_in(folder);
        serve.control_in(folder).disk("disk", &files.origin);
        for (n, cow) in files.cows.iter().enumerate() {
            let options = format!(",adopt,chunk={}", self.shape.chunks[n] * SECTOR);
            serve.snapshot(&format!("disk@s{n}"), cow, &options);
        }
        serve.start()
    }

    /// Sectors of the merging store that hold chunks, as the engine counts them.
    fn data_left(&self, cow: &Path) -> u64 {
        self.left_now(cow).expect("a store")
    }

    /// The same for a store that may be changing, if it makes sense at the moment.
    fn left_now(&self, cow: &Path) -> Option<u64> {
        let origin = self.origin.len() as u64;
        let status = exports::status(cow, StoreKind::Persistent, origin).ok()?;
        let text = status.to_string();
        let (allocated, rest) = text.split_once('/').expect("a status");
        let (_, metadata) = rest.split_once(' ').expect("a status");
        let number = |word: &str| word.parse::<u64>().expect("a number");
        Some(number(allocated) - number(metadata))
    }

    /// The origin has become what snapshot 0 was; snapshot 1 is what it was.
    fn check_end(&self, origin: &[u8], sibling: &[u8], who: &str) -> Compared {
        let name = self.shape.name;
        same_bytes(origin, &self.models[1], &format!("{name}: {who}'s origin"))?;
        let what = format!("{name}: {who}'s other snapshot");
        same_bytes(sibling, &self.models[2], &what)
    }
}

/// A disk and its stores, outside of the machine.
struct Files {
    origin: PathBuf,
    cows: [PathBuf; 2],
}

/// nbdsnap writes through all views, begins to merge, and is killed in the middle.
fn begun_by_nbdsnap(shape: &'static Shape, random: &mut Random) -> Disk {
    let mut disk = Disk::new(shape, random);
    let first = folder();
    let files = disk.lay_out(first.path());
    let server = disk.serve(first.path(), &files);
    let steps = disk.score(random.below(1 << 32)).steps();
    apply(&steps, &mut disk.models);
    let outcomes = play(&steps, &mut exports::places(&server, 3));
    assert!(outcomes.iter().all(|ok| *ok), "a request failed");
    server.stop();
    let all = disk.data_left(&files.cows[0]);
    disk.take_in(&files);

    // The kill follows on the moment at which so much or less is seen to be left; one that
    // comes when all is done is not looked at.
    for attempt in 0..100 {
        let folder = folder();
        let files = disk.lay_out(folder.path());
        let server = disk.serve(folder.path(), &files);
        let when = 1 + random.below(all - 1);
        let order = ["snapshot", "merge", "disk@s0"];
        let mut order = Running::start(&mut server.order_command(order));
        wait_until("the merge goes on", || {
            let left = disk.left_now(&files.cows[0]);
            left.is_some_and(|left| left <= when) || !order.is_running()
        });
        server.kill();
        let _ = order.finish();
        let left = disk.data_left(&files.cows[0]);
        if (1..all).contains(&left) {
            println!(
                "{}: attempt {attempt}: killed with {left} of {all} sectors left",
                shape.name
            );
            disk.take_in(&files);
            return disk;
        }
    }
    panic!("{}: no kill came in the middle of the merge", shape.name);
}

/// The kernel goes on with the merge, and reads the other snapshot.
fn kernel_merges(disk: &Disk, script: &mut String) {
    let Shape {
        name,
        chunks: [merged, other],
        origin,
        ..
    } = disk.shape;
    let _ = write!(
        script,
        "dmsetup create {name}.s1 --table \"0 {origin} snapshot /dev/mapper/{name}.o /dev/mapper/{name}.c1 P {other}\"
dmsetup create {name} --table \"0 {origin} snapshot-merge /dev/mapper/{name}.o /dev/mapper/{name}.c0 P {merged}\"
say before.{name} $(status {name})
patiently is_merged {name}
copy /dev/mapper/{name} /dev/mapper/{name}.d0
copy /dev/mapper/{name}.s1 /dev/mapper/{name}.d1
dmsetup remove {name}
dmsetup remove {name}.s1
"
    );
}

/// Until nothing but metadata is left in the store.
const IS_MERGED: &str = "
is_merged() {
    words=$(status $1)
    allocated=${words%%/*}
    metadata=${words##* }
    [ $allocated = $metadata ]
}
patiently() {
    n=0
    until \"$@\"; do
        n=$((n + 1))
        [ $n -lt 1200 ] || die \"$@: $(status $2)\"
        usleep 50000
    done
}
";

fn add(slices: &mut Slices, disk: &Disk) {
    let name = disk.shape.name;
    slices.add_filled(&format!("{name}.o"), &disk.origin);
    for n in 0..2 {
        slices.add_filled(&format!("{name}.c{n}"), &disk.cows[n]);
        slices.add(&format!("{name}.d{n}"), disk.origin.len() as u64);
    }
}

#[test]
fn a_merge_that_nbdsnap_began_is_finished_by_the_kernel() {
    let Some(machine) = Machine::for_suite(SUITE) else {
        return;
    };
    let mut random = Random::new(seed(SUITE, "a_merge_that_nbdsnap"));
    let disks = SHAPES.each_ref().map(|s| begun_by_nbdsnap(s, &mut random));
    let folder = folder();
    let mut slices = Slices::create(&folder.path().join("slices"));
    for disk in &disks {
        add(&mut slices, disk);
    }
    let mut script = slices.script("/dev/vda") + IS_MERGED;
    for disk in &disks {
        kernel_merges(disk, &mut script);
    }
    let output = Vm::new(machine).disk(slices.path()).run(&script);
    for disk in &disks {
        let name = disk.shape.name;
        println!("{name}: before {}", output.value(&format!("before.{name}")));
        let [shown, sibling] = [0, 1].map(|n| slices.read(&format!("{name}.d{n}")));
        expect_same(disk.check_end(&shown, &sibling, "the kernel"));
        let below = slices.read(&format!("{name}.o"));
        expect_same(disk.check_end(&below, &sibling, "the kernel (below the merge)"));
        // And these comparisons can fail.
        let wrong = disk.check_end(&disk.models[0], &sibling, "x");
        expect_difference(wrong, "x's origin: differs");
        let wrong = disk.check_end(&shown, &disk.models[0], "x");
        expect_difference(wrong, "x's other snapshot: differs");
    }
}

/// The kernel plays on all views, and begins to merge.
fn kernel_plays(disk: &Disk, seed: u64, script: &mut String) {
    let Shape {
        name,
        chunks,
        origin,
        ..
    } = disk.shape;
    for (n, chunk) in chunks.iter().enumerate() {
        let _ = writeln!(
            script,
            "dmsetup create {name}.s{n} --table \"0 {origin} snapshot /dev/mapper/{name}.o /dev/mapper/{name}.c{n} P {chunk}\""
        );
    }
    let devices = ["", ".s0", ".s1"].map(|view| format!("/dev/mapper/{name}{view}"));
    let play = disk.score(seed).command(&devices);
    let merging = chunks[0];
    let _ = write!(
        script,
        "dmsetup create {name} --table \"0 {origin} snapshot-origin /dev/mapper/{name}.o\"
{play} >/tmp/{name} || die {name}: play
! grep -q 0 /tmp/{name} || die {name}: $(cat /tmp/{name})
say all.{name} $(status {name}.s0)
dmsetup remove {name}
dmsetup remove {name}.s0
"
    );
    let _ = writeln!(
        script,
        "merge_{name}() {{ dmsetup create {name} --table \"0 {origin} snapshot-merge /dev/mapper/{name}.o /dev/mapper/{name}.c0 P {merging}\"; }}"
    );
}

/// The power goes while the kernel merges all disks; what was to be merged of each.
fn cut_the_kernel(
    machine: &Machine,
    slices: &Slices,
    disks: &mut [Disk],
    random: &mut Random,
) -> Vec<u64> {
    let mut script = slices.script("/dev/vda");
    for disk in &mut *disks {
        let seed = random.below(1 << 32);
        kernel_plays(disk, seed, &mut script);
        apply(&disk.score(seed).steps(), &mut disk.models);
    }
    script += "sync\n";
    for disk in &*disks {
        let _ = writeln!(script, "merge_{}", disk.shape.name);
    }
    script += "say merging\nwhile :; do sleep 1; done\n";
    let mut vm = Vm::new(machine);
    // A slow disk: a merge takes some operations for each step, one by one.
    vm.disk(slices.path()).slow(150).program(Path::new(PLAYER));
    let mut running = vm.start(&script);
    running.wait_for("merging");
    let wait = Duration::from_millis(random.below(1500));
    std::thread::sleep(wait);
    println!("cut {} ms after the last began", wait.as_millis());
    let said = running.cut_power();
    let all = disks.iter().map(|disk| {
        let status = said.value(&format!("all.{}", disk.shape.name));
        let (allocated, rest) = status.split_once('/').expect("a status");
        let (_, metadata) = rest.split_once(' ').expect("a status");
        let number = |word: &str| word.parse::<u64>().expect("a number");
        number(allocated) - number(metadata)
    });
    all.collect()
}

/// nbdsnap goes on with a merge of the kernel's; whether it was in the middle.
fn nbdsnap_merges(disk: &Disk, all: u64) -> bool {
    let name = disk.shape.name;
    let folder = folder();
    let files = disk.lay_out(folder.path());
    let left = disk.data_left(&files.cows[0]);
    println!("{name}: the cut left {left} of {all} sectors");
    let server = disk.serve(folder.path(), &files);
    // Until it is merged, the snapshot is still what it was.
    let shown = exports::read(&server, 1).expect("readable");
    expect_same(same_bytes(&shown, &disk.models[1], &format!("{name}: s0")));
    let _ = server.order(["snapshot", "merge", "disk@s0"]).ok();
    let origin = exports::read(&server, 0).expect("readable");
    let sibling = exports::read(&server, 2).expect("readable");
    server.stop();
    expect_same(disk.check_end(&origin, &sibling, "nbdsnap"));
    let below = std::fs::read(&files.origin).expect("readable");
    expect_same(disk.check_end(&below, &sibling, "nbdsnap (in the file)"));
    assert_eq!(disk.data_left(&files.cows[0]), 0, "{name}: not all merged");
    let wrong = disk.check_end(&disk.models[0], &sibling, "x");
    expect_difference(wrong, "x's origin: differs");
    (1..all).contains(&left)
}

#[test]
fn a_merge_that_the_kernel_began_is_finished_by_nbdsnap() {
    let Some(machine) = Machine::for_suite(SUITE) else {
        return;
    };
    let mut random = Random::new(seed(SUITE, "a_merge_that_the_kernel"));
    let rounds = if long_run().is_some() { 15 } else { 1 };
    let mut middle = 0;
    for _ in 0..rounds {
        let mut disks = SHAPES.each_ref().map(|s| Disk::new(s, &mut random));
        let folder = folder();
        let mut slices = Slices::create(&folder.path().join("slices"));
        for disk in &disks {
            add(&mut slices, disk);
        }
        let all = cut_the_kernel(machine, &slices, &mut disks, &mut random);
        for (disk, all) in disks.iter_mut().zip(all) {
            let name = disk.shape.name;
            disk.origin = slices.read(&format!("{name}.o"));
            disk.cows = [0, 1].map(|n| slices.read(&format!("{name}.c{n}")));
            middle += usize::from(nbdsnap_merges(disk, all));
        }
    }
    assert!(middle > 0, "no cut came in the middle of a merge");
    println!("{middle} of {} cuts came in the middle", 3 * rounds);
}
