//! Origins and their stores are slices of one device whose writes the kernel
//! logs (`dm-log-writes`). nbdsnap serves them inside the virtual machine, under a
//! random load and over restarts; then the log is replayed: at every entry, and at
//! random subsets of what two flushes enclose, every snapshot is exact.

use std::fmt::Write as _;
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use nbdsnap_engine::law::Mutant;
use nbdsnap_tests::harness::files::folder;
use nbdsnap_tests::harness::program::{MUTANT_VARIABLE, mutant_program};
use nbdsnap_tests::harness::random::{Random, long_run};
use nbdsnap_tests::kernel::load::{self, Load, VOLUMES};
use nbdsnap_tests::kernel::log::{self, Entry};
use nbdsnap_tests::kernel::machine::Machine;
use nbdsnap_tests::kernel::replay::{Replay, Sample, Violation, slice_name};
use nbdsnap_tests::kernel::slices::Slices;
use nbdsnap_tests::kernel::vm::Vm;
use nbdsnap_tests::kernel::{program, seed};

const SECTOR: u64 = 512;
const SUITE: &str = "kernel_log_writes";
const PLAYER: &str = env!("CARGO_BIN_EXE_log-player");
/// Bytes of the device that the log is written to.
const LOG: u64 = 1 << 30;
/// Loads after which a mutant must have been found.
const MOST_LOADS: u64 = 4;

/// What is done inside the machine with each start of the server.
const FUNCTIONS: &str = "
modprobe dm-log-writes
# See record() for why: nothing may hold up a flush of the device.
echo 0 >/sys/block/vda/queue/wbt_lat_usec
echo none >/sys/block/vda/queue/scheduler
# serve EXPORTS ARGUMENT...: start the server and wait for its exports.
serve() {
    exports=$1
    shift
    rm -f /tmp/served
    nbdsnap serve \"$@\" --listen unix:/tmp/nbd.sock >/tmp/served 2>>/tmp/log &
    server=$!
    until [ -e /tmp/served ] && [ $(wc -l </tmp/served) = $exports ]; do
        kill -0 $server || { cat /tmp/log; die the server does not serve; }
        usleep 10000
    done
}
";

/// A load that was played and logged.
struct Recorded {
    load: Load,
    /// The devices as they were before.
    slices: Slices,
    entries: Vec<Entry>,
}

/// Play a load in the virtual machine and take in its log.
fn record(machine: &Machine, folder: &Path, load: Load, mutant: Option<Mutant>) -> Recorded {
    let mut random = Random::new(load.seed);
    let mut slices = Slices::create(&folder.join("before"));
    for (volume, shape) in VOLUMES.iter().enumerate() {
        let image = random.bytes(shape.bytes as usize);
        slices.add_filled(&slice_name(volume, None), &image);
        for snapshot in 0..load::snapshots(load.rounds - 1) {
            slices.add(&slice_name(volume, Some(snapshot)), shape.cow_bytes);
        }
    }
    let disk = folder.join("disk");
    std::fs::copy(slices.path(), &disk).expect("a test file can be copied");
    let log = folder.join("log");
    File::create_new(&log)
        .and_then(|file| file.set_len(LOG))
        .expect("a test file can be made");

    let mut vm = Vm::new(machine);
    // A flush takes the writes that it is to be logged behind when it arrives, and
    // is logged when it ends. Where a later one can overtake it, on another
    // processor or past the throttling of writes, the log says that those writes
    // came after what had waited for the later one, and that is not what happened.
    vm.processors(1);
    vm.disk(&disk).disk(&log).program(Path::new(PLAYER));
    vm.program(&match mutant {
        None => program::nbdsnap(),
        Some(_) => program::stripped(mutant_program()),
    });
    let said = vm.run(&script(load, &slices, mutant));
    let announced = said.value("log").contains("MUTANT");
    assert_eq!(announced, mutant.is_some(), "the wrong program was served");
    let entries = log::read(&log).unwrap_or_else(|why| panic!("{why}\n{}", said.lines.join("\n")));
    Recorded {
        load,
        slices,
        entries,
    }
}

fn script(load: Load, slices: &Slices, mutant: Option<Mutant>) -> String {
    let mut script = FUNCTIONS.to_owned();
    if let Some(mutant) = mutant {
        let _ = writeln!(script, "export {MUTANT_VARIABLE}={mutant:?}");
    }
    script += "dmsetup create log --table \"0 $(sectors /dev/vda) log-writes /dev/vda /dev/vdb\"\n";
    script += &slices.script("/dev/mapper/log");
    for round in 0..load.rounds {
        let snapshots = load::snapshots(round);
        let _ = write!(script, "serve {}", VOLUMES.len() * (1 + snapshots));
        for (volume, shape) in VOLUMES.iter().enumerate() {
            let device = |snapshot| format!("/dev/mapper/{}", slice_name(volume, snapshot));
            let _ = write!(script, " v{volume}={}", device(None));
            for n in 0..snapshots {
                let (cow, chunk) = (device(Some(n)), shape.chunk);
                let _ = write!(script, " --snapshot v{volume}@s{n}={cow},chunk={chunk}");
            }
        }
        let seed = load.seed;
        let _ = write!(
            script,
            "
log-player {seed} {round} /tmp/nbd.sock || {{ cat /tmp/log; die the load failed; }}
kill $server
wait $server
"
        );
    }
    script += "say log $(cat /tmp/log)\n";
    script += "say status $(status log)\n";
    // Everything that lies on the logged device goes before it does.
    script += "for device in /dev/mapper/v*; do dmsetup remove $device; done\ndmsetup remove log\n";
    script
}

fn violation(recorded: &Recorded) -> Option<Violation> {
    Replay::new(recorded.load, &recorded.slices)
        .play(&recorded.entries)
        .err()
}

/// The kernel shows of every sample what nbdsnap shows.
fn the_kernel_agrees(machine: &Machine, folder: &Path, samples: &[Sample]) {
    let mut slices = Slices::create(&folder.join("samples"));
    let mut script = String::new();
    for (n, sample) in samples.iter().enumerate() {
        slices.add_filled(&format!("o{n}"), &sample.origin);
        slices.add_filled(&format!("c{n}"), &sample.cow);
        slices.add(&format!("d{n}"), sample.origin.len() as u64);
        let (sectors, chunk) = (sample.origin.len() as u64 / SECTOR, sample.chunk / SECTOR);
        let _ = write!(
            script,
            "dmsetup create s{n} --table \"0 {sectors} snapshot /dev/mapper/o{n} /dev/mapper/c{n} P {chunk}\"
say s{n} $(status s{n})
copy /dev/mapper/s{n} /dev/mapper/d{n}
dmsetup remove s{n}
"
        );
    }
    let mut vm = Vm::new(machine);
    vm.disk(slices.path());
    let said = vm.run(&(slices.script("/dev/vda") + &script));
    for (n, sample) in samples.iter().enumerate() {
        let status = said.value(&format!("s{n}"));
        println!("{}: the kernel says {status}", sample.what);
        let kernel = slices.read(&format!("d{n}"));
        let at = kernel.iter().zip(&sample.shown).position(|(k, s)| k != s);
        assert!(
            at.is_none(),
            "{}: the kernel's snapshot differs from byte {at:?} on",
            sample.what
        );
    }
}

#[test]
fn every_state_that_a_crash_could_leave_shows_each_snapshot_exactly() {
    let Some(machine) = Machine::for_suite(SUITE) else {
        return;
    };
    let first = seed(SUITE, "every_state");
    let (start, limit) = (Instant::now(), long_run().unwrap_or_default());
    for seed in first.. {
        let folder = folder();
        let recorded = record(machine, folder.path(), Load { seed, rounds: 3 }, None);
        println!("seed {seed}: recorded after {:.1?}", start.elapsed());
        let replay = Replay::new(recorded.load, &recorded.slices);
        let (tally, samples) = match replay.play(&recorded.entries) {
            Ok(played) => played,
            Err(Violation(why)) => panic!("seed {seed}: {why}"),
        };
        println!("seed {seed}: {tally:?} after {:.1?}", start.elapsed());
        assert!(tally.writes > 500 && tally.epochs > 100, "{tally:?}");
        assert!(tally.longest > 8, "{tally:?}");
        the_kernel_agrees(machine, folder.path(), &samples);
        // The same log from a disk that forgets what it had flushed: the replay
        // would notice.
        let lying = Replay::new(recorded.load, &recorded.slices).of_a_disk_that_lies();
        let Violation(why) = lying
            .play(&recorded.entries)
            .expect_err("a disk that lies loses something");
        println!("seed {seed}: a disk that lies: {why}");
        println!("seed {seed}: done after {:.1?}", start.elapsed());
        if start.elapsed() + Duration::from_secs(1) > limit {
            return;
        }
    }
}

#[test]
fn one_flush_for_two_is_found() {
    let Some(machine) = Machine::for_suite(SUITE) else {
        return;
    };
    let first = seed(SUITE, "one_flush");
    for seed in first..first + MOST_LOADS {
        let folder = folder();
        let recorded = record(
            machine,
            folder.path(),
            Load { seed, rounds: 1 },
            Some(Mutant::OneFlush),
        );
        if let Some(Violation(why)) = violation(&recorded) {
            println!("seed {seed}: found in load {}: {why}", seed - first + 1);
            return;
        }
    }
    panic!("not found in {MOST_LOADS} loads");
}
