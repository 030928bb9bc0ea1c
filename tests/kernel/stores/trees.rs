//! Snapshots of snapshots: what nbdsnap wrote, stacked in the same order under
//! dmsetup, reads the same at every level; and what the kernel made of it then,
//! nbdsnap serves.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use nbdsnap_engine::StoreKind;
use nbdsnap_format::{ChunkSize, Layout};
use nbdsnap_tests::harness::files::folder;
use nbdsnap_tests::harness::live::{attach, contents};
use nbdsnap_tests::harness::random::Random;
use nbdsnap_tests::harness::server::{Serve, Server};
use nbdsnap_tests::kernel::compare::{expect_same, same, same_bytes};
use nbdsnap_tests::kernel::exports;
use nbdsnap_tests::kernel::machine::Machine;
use nbdsnap_tests::kernel::play::{Place, Score, apply, play};
use nbdsnap_tests::kernel::seed;
use nbdsnap_tests::kernel::slices::Slices;
use nbdsnap_tests::kernel::vm::Vm;

use super::SUITE;

const SECTOR: u64 = 512;
const PLAYER: &str = env!("CARGO_BIN_EXE_kernel-player");

/// Sectors of the disk, with a fraction of a chunk at its end.
const DISK: u64 = 8 * 500 + 5;

/// The disk, and a snapshot upon a snapshot upon a snapshot of it.
const EXPORTS: [&str; 4] = ["disk", "disk@a", "disk@a@b", "disk@a@b@c"];

/// Sectors of a chunk in the store of each snapshot.
const CHUNKS: [u64; 3] = [8, 1, 32];

/// Written by each side.
const STEPS: usize = 160;

struct Stack {
    origin: Vec<u8>,
    cows: Vec<Vec<u8>>,
    /// What each export has to show.
    models: Vec<Vec<u8>>,
}

impl Stack {
    fn new(random: &mut Random) -> Self {
        let origin = random.bytes((DISK * SECTOR) as usize);
        let empty = |sectors: &u64| {
            let chunk = ChunkSize::from_sectors(*sectors).expect("a chunk size");
            let needed = Layout::new(chunk).sectors_needed_for_origin(DISK * SECTOR);
            vec![0; ((needed + 2 * sectors) * SECTOR) as usize]
        };
        Self {
            models: vec![origin.clone(); EXPORTS.len()],
            cows: CHUNKS.iter().map(empty).collect(),
            origin,
        }
    }

    fn score(seed: u64) -> Score {
        Score {
            seed,
            steps: STEPS,
            chunk: 8 * SECTOR,
            views: vec![DISK * SECTOR; EXPORTS.len()],
            snapshot_writes: 2,
            within_chunk: false,
        }
    }

    /// As files of a folder, each level with what it stands on.
    fn lay_out(&self, folder: &Path) -> (PathBuf, Vec<PathBuf>) {
        let write = |name: String, bytes: &[u8]| {
            let path = folder.join(name);
            std::fs::write(&path, bytes).expect("a test file can be written");
            path
        };
        let origin = write("disk".into(), &self.origin);
        let cows = self.cows.iter().enumerate();
        let cows = cows.map(|(n, cow)| write(format!("cow{n}"), cow)).collect();
        (origin, cows)
    }

    fn serve(origin: &Path, cows: &[PathBuf], adopt: &str) -> Server {
        let folder = origin.parent().expect("a folder");
        let mut serve = Serve::on_socket_in(folder);
        serve.disk(EXPORTS[0], origin);
        for ((export, cow), sectors) in EXPORTS[1..].iter().zip(cows).zip(CHUNKS) {
            serve.snapshot(export, cow, &format!(",chunk={sectors}s{adopt}"));
        }
        serve.start()
    }

    fn check(&self, server: &Server, what: &str) {
        for (export, model) in EXPORTS.iter().zip(&self.models) {
            let shown = contents(server, export);
            expect_same(same_bytes(&shown, model, &format!("{what}: {export}")));
        }
    }

    /// nbdsnap makes the stores, or goes on with them, and writes to every level.
    fn our_turn(&mut self, adopt: &str, seed: u64) {
        let folder = folder();
        let (origin, cows) = self.lay_out(folder.path());
        let server = Self::serve(&origin, &cows, adopt);
        self.check(&server, "as nbdsnap finds it");
        let steps = Self::score(seed).steps();
        let place = |export: &&str| Place::Export(Box::new(attach(&server, export)));
        let mut places: Vec<Place> = EXPORTS.iter().map(place).collect();
        assert!(play(&steps, &mut places).iter().all(|ok| *ok));
        apply(&steps, &mut self.models);
        drop(places);
        self.check(&server, "after nbdsnap's turn");
        server.stop();
        self.origin = read(&origin);
        self.cows = cows.iter().map(|cow| read(cow)).collect();
    }

    /// The kernel stacks the same devices, shows every level, and writes to all.
    fn kernel_turn(&mut self, machine: &Machine, seed: u64) {
        let folder = folder();
        let mut slices = Slices::create(&folder.path().join("slices"));
        slices.add_filled("o", &self.origin);
        for (n, cow) in self.cows.iter().enumerate() {
            slices.add_filled(&format!("c{n}"), cow);
        }
        let shown: Vec<String> = ["before", "after"]
            .iter()
            .flat_map(|when| (0..EXPORTS.len()).map(move |n| format!("{when}{n}")))
            .collect();
        for name in &shown {
            slices.add(name, DISK * SECTOR);
        }
        let mut vm = Vm::new(machine);
        vm.disk(slices.path()).program(Path::new(PLAYER));
        let output = vm.run(&(slices.script("/dev/vda") + &script(seed)));
        let (_, cows) = self.lay_out(folder.path());
        for (n, cow) in cows.iter().enumerate() {
            let ours = exports::status(cow, StoreKind::Persistent, DISK * SECTOR);
            let ours = ours.expect("a store").to_string();
            let what = format!("the status of the store of {}", EXPORTS[n + 1]);
            expect_same(same(output.value(&format!("status.{n}")), &ours, &what));
        }
        let compare = |when: &str, models: &[Vec<u8>]| {
            for (n, model) in models.iter().enumerate() {
                let what = format!("the kernel's {} {when}", EXPORTS[n]);
                let shown = slices.read(&format!("{when}{n}"));
                expect_same(same_bytes(&shown, model, &what));
            }
        };
        compare("before", &self.models);
        apply(&Self::score(seed).steps(), &mut self.models);
        compare("after", &self.models);
        self.origin = slices.read("o");
        let cows = 0..self.cows.len();
        self.cows = cows.map(|n| slices.read(&format!("c{n}"))).collect();
    }
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).expect("a test file can be read")
}

/// Each snapshot upon the one below, with a snapshot-origin over everything that
/// something stands on: through these the lower levels are written.
fn script(seed: u64) -> String {
    let mut script = String::new();
    let last = CHUNKS.len() - 1;
    for (n, sectors) in CHUNKS.iter().enumerate() {
        let below = if n == 0 {
            "o".to_owned()
        } else {
            format!("s{}", n - 1)
        };
        let _ = write!(
            script,
            "dmsetup create s{n} --table \"0 {DISK} snapshot /dev/mapper/{below} /dev/mapper/c{n} P {sectors}\"\n\
             dmsetup create w{n} --table \"0 {DISK} snapshot-origin /dev/mapper/{below}\"\n\
             say status.{n} $(status s{n})\n"
        );
    }
    let mut devices: Vec<String> = (0..=last).map(|n| format!("/dev/mapper/w{n}")).collect();
    devices.push(format!("/dev/mapper/s{last}"));
    let copy = |script: &mut String, when: &str| {
        for (n, device) in devices.iter().enumerate() {
            let _ = writeln!(script, "copy {device} /dev/mapper/{when}{n}");
        }
    };
    copy(&mut script, "before");
    let command = Stack::score(seed).command(&devices);
    let _ = writeln!(script, "{command} >/tmp/played || die play");
    let _ = writeln!(script, "! grep -q 0 /tmp/played || die $(cat /tmp/played)");
    copy(&mut script, "after");
    for n in (0..=last).rev() {
        let _ = writeln!(script, "dmsetup remove w{n}; dmsetup remove s{n}");
    }
    script
}

#[test]
fn stacked_in_the_same_order_the_kernel_reads_the_same_and_the_other_way_round() {
    let Some(machine) = Machine::for_suite(SUITE) else {
        return;
    };
    let mut random = Random::new(seed(SUITE, "stacked_in_the_same_order"));
    let mut stack = Stack::new(&mut random);
    stack.our_turn("", random.below(1 << 32));
    for (n, model) in stack.models.iter().enumerate() {
        assert!(!stack.models[..n].contains(model), "two levels are alike");
    }
    stack.kernel_turn(machine, random.below(1 << 32));
    stack.our_turn(",adopt", random.below(1 << 32));
}
