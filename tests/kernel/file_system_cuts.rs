//! The machine in which nbdsnap runs is cut off while the kernel writes files to
//! the origin through it. At the next boot nbdsnap and the kernel's dm-snapshot
//! both show the snapshot as the disk was when it was taken, and on the origin
//! the journal replays and every file is there that was durable before.
//!
//! Disk and store are kept from cut to cut: what a recovery left is cut again.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nbdsnap_tests::harness::files::folder;
use nbdsnap_tests::harness::program::{MUTANT_VARIABLE, mutant_program};
use nbdsnap_tests::harness::random::{Random, long_run};
use nbdsnap_tests::kernel::exports::{self, Cow};
use nbdsnap_tests::kernel::file_load::ext4;
use nbdsnap_tests::kernel::machine::Machine;
use nbdsnap_tests::kernel::program::{nbdsnap, stripped};
use nbdsnap_tests::kernel::seed;
use nbdsnap_tests::kernel::slices::Slices;
use nbdsnap_tests::kernel::vm::{Output, Vm};

const SUITE: &str = "kernel_file_system_cuts";
const SERVING: &str = include_str!("serving.sh");
const ORIGIN: usize = 24 << 20;
/// The store behind its first area.
const COW: usize = 27 << 20;
/// The disk of the file system that holds a store as a file.
const STORE_DISK: usize = 48 << 20;
const LEDGER: u64 = 16 << 20;
/// Zeroed to have a new store made over the remains of the last one; room for
/// the header and the first area at every chunk size.
const HEAD: usize = 128 << 10;
/// From a stage of the script to the cut.
const LATEST_CUT_MS: u64 = 1500;

/// Where the store lies in the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// On a disk.
    Disk,
    /// In a file, on an ext4 of its own, which the cut strikes as well.
    File,
}

/// What is asked of a boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Boot {
    /// Make a store, then write until the cut.
    Fresh,
    /// Judge what the last cut left, then write until the next one.
    Again,
    /// Judge, and come to a good end.
    Last,
}

/// A machine's disks, over many boots.
struct Cuts<'a> {
    machine: &'a Machine,
    program: PathBuf,
    /// The rule of durability that the program breaks in there, if any.
    mutant: Option<&'static str>,
    random: Random,
    place: Place,
    chunk: u64,
    /// `o`, the ledgers, copies of the snapshot as both show it; and the head of
    /// the store, as far as its first area, where it is on a disk.
    disks: Slices,
    /// The rest of the store, alone on a disk that can be slow. So an area that
    /// does not wait for its chunks is on its disk long before them: a single
    /// disk would get them in the order of the kernel's choice, chunks first.
    cow: Slices,
    image: Vec<u8>,
    _folder: tempfile::TempDir,
}

impl<'a> Cuts<'a> {
    fn new(machine: &'a Machine, program: PathBuf, place: Place, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let folder = folder();
        let image = ext4(ORIGIN, [1024, 4096][random.below(2) as usize], &mut random);
        let mut disks = Slices::create(&folder.path().join("disks"));
        disks.add_filled("o", &image);
        disks.add("la", LEDGER);
        disks.add("lb", LEDGER);
        disks.add("dk", ORIGIN as u64);
        disks.add("dn", ORIGIN as u64);
        disks.add("head", HEAD as u64);
        let mut cow = Slices::create(&folder.path().join("cow"));
        match place {
            Place::Disk => {
                let mut remains = random.bytes(COW);
                remains[COW - HEAD..].fill(0);
                cow.add_filled("rest", &remains);
            }
            Place::File => cow.add_filled("rest", &ext4(STORE_DISK, 4096, &mut random)),
        }
        Self {
            machine,
            program,
            mutant: None,
            place,
            chunk: 0,
            disks,
            cow,
            image,
            random,
            _folder: folder,
        }
    }

    /// The snapshot begins: the disk as it is now is what it must show.
    fn take_snapshot(&mut self) {
        self.image = self.disks.read("o");
        self.chunk = 512 * [8, 32, 128][self.random.below(3) as usize];
        if self.place == Place::Disk {
            self.disks.write("head", &vec![0; HEAD]);
            self.cow.write("rest", &vec![0; HEAD]);
        }
    }

    /// Bytes of the header and the first area.
    fn head(&self) -> usize {
        2 * self.chunk as usize
    }

    /// The store, put together.
    fn store(&self) -> Vec<u8> {
        let mut store = self.disks.read("head");
        store.truncate(self.head());
        store.extend(self.cow.read("rest"));
        store
    }

    /// Boot, and cut the machine off at a random moment.
    fn cut(&mut self, boot: Boot, slow: Option<u32>) {
        let script = self.script(boot);
        let mut running = self.vm(slow).start(&script);
        // Most cuts come while files are written, some while the last cut is mended.
        let early = boot == Boot::Again && self.random.one_in(4);
        running.wait_for(if early { "judged" } else { "begun" });
        let wait = self.random.below(LATEST_CUT_MS);
        std::thread::sleep(Duration::from_millis(wait));
        let output = running.cut_power();
        let stage = if early { "recovery" } else { "the first files" };
        println!(
            "{:?}, chunk {}: cut {wait} ms after {stage}; before: a {:?}, b {:?}",
            self.place,
            self.chunk,
            output.find("checked.a"),
            output.find("checked.b"),
        );
        if boot == Boot::Again {
            self.assert_judged();
        }
    }

    /// Boot after the last cut.
    fn finish(&mut self) -> Output {
        let script = self.script(Boot::Last);
        let output = self.vm(None).run(&script);
        self.assert_judged();
        output
    }

    /// What the machine showed of the snapshot after the last cut.
    fn assert_judged(&self) {
        for (copy, who) in [("dn", "nbdsnap"), ("dk", "the kernel")] {
            let shown = self.disks.read(copy);
            if let Some(at) = first_difference(&shown, &self.image) {
                panic!("{who} shows a snapshot that is not exact from byte {at} on");
            }
        }
    }

    /// What nbdsnap shows of the snapshot here, outside, as the cut left it.
    fn judge_outside(&self) -> Result<(), String> {
        if self.place == Place::File {
            return Ok(());
        }
        let folder = folder();
        let file = |name: &str, bytes: Vec<u8>| {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).expect("a test file can be written");
            path
        };
        let origin = file("disk", self.disks.read("o"));
        let cow = Cow {
            path: file("cow", self.store()),
            options: String::new(),
        };
        let server = exports::serve(folder.path(), &origin, &[cow], true);
        let shown = exports::read(&server, 1)?;
        server.stop();
        match first_difference(&shown, &self.image) {
            None => Ok(()),
            Some(at) => Err(format!("the snapshot is not exact from byte {at} on")),
        }
    }

    /// The machine; what it showed before is wiped, so that nothing is judged twice.
    fn vm(&self, slow: Option<u32>) -> Vm<'a> {
        for copy in ["dk", "dn"] {
            self.disks.write(copy, &vec![0; ORIGIN]);
        }
        let mut vm = Vm::new(self.machine);
        vm.disk(self.disks.path()).disk(self.cow.path());
        if let Some(writes) = slow {
            vm.slow(writes);
        }
        vm.program(&self.program)
            .program(&stripped(Path::new(env!("CARGO_BIN_EXE_file-player"))))
            .file("serving.sh", SERVING);
        vm
    }

    fn script(&mut self, boot: Boot) -> String {
        let mut script = self.disks.script("/dev/vda") + &self.cow.script("/dev/vdb");
        script += "
. /test/serving.sh
modprobe nbd
modprobe ext4
";
        script += &match self.place {
            Place::Disk => self.store_on_a_disk(),
            Place::File => STORE_IN_A_FILE.to_owned(),
        };
        if self.place == Place::File && boot == Boot::Fresh {
            script += "rm -f $store\nsync\n";
        }
        if let Some(mutant) = self.mutant {
            let _ = writeln!(script, "export {MUTANT_VARIABLE}={mutant}");
        }
        let chunk = self.chunk;
        // The list of a block device's stores lies in the machine's memory, and is
        // gone with it.
        let _ = writeln!(
            script,
            "serve_all() {{ serve disk=/dev/mapper/o --snapshot disk@s=$store,chunk={chunk},adopt; }}"
        );
        if boot != Boot::Fresh {
            // Whoever looks first must leave the store as good as it was.
            let mut judges = [self.kernel_judges(), NBDSNAP_JUDGES.to_owned()];
            if self.random.one_in(2) {
                judges.swap(0, 1);
            }
            script += &judges.concat();
            script += "say judged\n";
        }
        script += "
serve_all
attach disk 0
mount -t ext4 /dev/nbd0 /mnt
";
        if boot != Boot::Fresh {
            script += "
checked a
checked b
umount /mnt
consistent /dev/nbd0
";
        }
        match boot {
            Boot::Last => script += "detach 0\nstop_server\n",
            Boot::Fresh => script += &self.write_files(),
            Boot::Again => {
                script += "mount -t ext4 /dev/nbd0 /mnt\n";
                script += &self.write_files();
            }
        }
        script
    }

    fn store_on_a_disk(&self) -> String {
        let (head, rest) = (self.head() / 512, COW / 512);
        format!(
            "
dmsetup create c <<END
0 {head} linear /dev/mapper/head 0
{head} {rest} linear /dev/mapper/rest 0
END
store=/dev/mapper/c
"
        )
    }

    fn kernel_judges(&self) -> String {
        let (origin, chunk) = (ORIGIN / 512, self.chunk / 512);
        format!(
            "
cow=$store
[ -b $store ] || {{ cow=$(losetup -f); losetup $cow $store; }}
dmsetup create k --table \"0 {origin} snapshot /dev/mapper/o $cow P {chunk}\"
say kernel $(status k)
copy /dev/mapper/k /dev/mapper/dk
dmsetup remove k
[ -b $store ] || losetup -d $cow
"
        )
    }

    fn write_files(&mut self) -> String {
        let (a, b) = (self.random.below(1 << 32), self.random.below(1 << 32));
        format!("play_files {a} /never a\nplay_files {b} /never b\nsay begun\nwait\n")
    }
}

const STORE_IN_A_FILE: &str = "
modprobe loop
mkdir /cow
mount -t ext4 /dev/mapper/rest /cow
store=/cow/store
";

const NBDSNAP_JUDGES: &str = "
serve_all
attach disk@s 1
copy /dev/nbd1 /dev/mapper/dn
detach 1
stop_server
";

fn first_difference(shown: &[u8], image: &[u8]) -> Option<usize> {
    shown.iter().zip(image).position(|(x, y)| x != y)
}

fn cut_again_and_again(test: &str, place: Place, cuts: usize, fresh_every: usize) {
    let Some(machine) = Machine::for_suite(SUITE) else {
        return;
    };
    let mut rounds = Cuts::new(machine, nbdsnap(), place, seed(SUITE, test));
    for cut in 0..cuts {
        let fresh = cut % fresh_every == 0;
        if fresh && cut > 0 {
            let _ = rounds.finish();
        }
        if fresh {
            rounds.take_snapshot();
        }
        let slow = [None, Some(60), Some(200)][rounds.random.below(3) as usize];
        rounds.cut(if fresh { Boot::Fresh } else { Boot::Again }, slow);
        rounds
            .judge_outside()
            .unwrap_or_else(|why| panic!("cut {cut}: {why}"));
        assert!(
            !fresh || rounds.disks.read("o") != rounds.image,
            "cut {cut} came before any write"
        );
    }
    let output = rounds.finish();
    for name in ["a", "b"] {
        let found = output.value(&format!("checked.{name}"));
        println!("files, bytes in {name}: {found}");
        let files = found.split(' ').nth(1).and_then(|n| n.parse().ok());
        assert!(files > Some(0_u64), "no file was compared: {found}");
    }
}

fn cuts(normal: usize, long: usize) -> usize {
    if long_run().is_some() { long } else { normal }
}

#[test]
fn a_cut_while_files_are_written_leaves_snapshot_and_files() {
    cut_again_and_again("a_cut_while_files", Place::Disk, cuts(3, 40), 5);
}

#[test]
fn a_cut_strikes_a_store_in_a_file_with_its_file_system() {
    cut_again_and_again(
        "a_cut_strikes_a_store_in_a_file",
        Place::File,
        cuts(1, 10),
        4,
    );
}

/// The area is written without waiting for the flush of the chunks that it
/// names: where they are on a slow disk, the cut comes between soon enough.
#[test]
fn one_flush_for_two_is_found_by_the_cuts() {
    const MOST: usize = 30;
    if long_run().is_none() {
        // Some cuts find it early and some late; kernel_log_writes finds it every time.
        println!("only with tests/run --long");
        return;
    }
    let Some(machine) = Machine::for_suite(SUITE) else {
        return;
    };
    let seed = seed(SUITE, "one_flush_for_two");
    let program = stripped(mutant_program());
    let mut rounds = Cuts::new(machine, program, Place::Disk, seed);
    rounds.mutant = Some("OneFlush");
    for cut in 1..=MOST {
        rounds.take_snapshot();
        // Small chunks: hardly a write that needs no copy.
        rounds.chunk = 4096;
        rounds.cut(Boot::Fresh, Some(4));
        if let Err(found) = rounds.judge_outside() {
            println!("found by cut {cut}: {found}");
            return;
        }
    }
    panic!("{MOST} cuts did not find it");
}
