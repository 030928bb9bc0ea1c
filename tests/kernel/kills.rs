//! nbdsnap in the virtual machine is killed (kill -9) while the machine's kernel
//! writes files through it, and is started again.
//!
//! With nbd-client the kernel's requests fail, and the file system with them:
//! after unmount, detach, attach and mount every file is there that was durable
//! before. With a client that holds requests (`nbd-attach`) the mounted file
//! system notices nothing but a pause. Each time the snapshots are exact.

use std::fmt::Write as _;
use std::path::Path;

use nbdsnap_tests::harness::files::folder;
use nbdsnap_tests::harness::random::Random;
use nbdsnap_tests::kernel::file_load::ext4;
use nbdsnap_tests::kernel::machine::Machine;
use nbdsnap_tests::kernel::play::{Score, apply};
use nbdsnap_tests::kernel::program::{nbdsnap, stripped};
use nbdsnap_tests::kernel::seed;
use nbdsnap_tests::kernel::slices::Slices;
use nbdsnap_tests::kernel::vm::{Output, Vm};

const SUITE: &str = "kernel_kills";
const SERVING: &str = include_str!("serving.sh");
const ORIGIN: usize = 24 << 20;
const COW: u64 = 27 << 20;
const LEDGER: u64 = 4 << 20;
/// How often the server is killed.
const KILLS: u64 = 3;
/// From the first files to a kill.
const LATEST_KILL_MS: u64 = 1200;
/// Requests of one score on the writable snapshot.
const STEPS: usize = 12;
const CHUNK: u64 = 4096;
/// The copy of a snapshot whose disk was written behind its back.
const STALE: &str = "stale";

/// The disk `o` with a file system, its stores, and a ledger for each writer.
fn slices(folder: &Path, image: &[u8], copies: &[String]) -> Slices {
    let mut slices = Slices::create(&folder.join("slices"));
    slices.add_filled("o", image);
    slices.add("c", COW);
    slices.add("cw", COW);
    slices.add("la", LEDGER);
    slices.add("lb", LEDGER);
    for copy in copies {
        slices.add(copy, ORIGIN as u64);
    }
    slices
}

fn boot(machine: &Machine, slices: &Slices, script: &str) -> Output {
    let mut vm = Vm::new(machine);
    vm.disk(slices.path())
        .program(&nbdsnap())
        .program(&stripped(Path::new(env!("CARGO_BIN_EXE_file-player"))))
        .program(&stripped(Path::new(env!("CARGO_BIN_EXE_kernel-player"))))
        .program(&stripped(Path::new(env!("CARGO_BIN_EXE_nbd-attach"))))
        .file("serving.sh", SERVING);
    let begin = "
. /test/serving.sh
modprobe nbd
modprobe ext4
serve_all() {
    serve disk=/dev/mapper/o --snapshot disk@s=/dev/mapper/c,chunk=4K \\
        --snapshot disk@w=/dev/mapper/cw,chunk=16K
}
";
    vm.run(&(slices.script("/dev/vda") + begin + script))
}

/// Insist that files were compared at all, and say how many.
fn assert_files(output: &Output) {
    for name in ["a", "b"] {
        let found = output.value(&format!("checked.{name}"));
        println!("files, bytes in {name}: {found}");
        let files = found.split(' ').nth(1).and_then(|n| n.parse().ok());
        assert!(files > Some(0_u64), "no file was compared: {found}");
    }
}

fn first_difference(slices: &Slices, copy: &str, expected: &[u8]) -> Option<usize> {
    let shown = slices.read(copy);
    shown.iter().zip(expected).position(|(x, y)| x != y)
}

#[test]
fn fsynced_files_are_there_when_the_server_is_killed_under_nbd_client() {
    let Some(machine) = Machine::for_suite(SUITE) else {
        return;
    };
    let mut random = Random::new(seed(SUITE, "fsynced_files"));
    let image = ext4(ORIGIN, 1024, &mut random);
    let copies: Vec<String> = (0..KILLS).map(|kill| format!("d{kill}")).collect();
    let folder = folder();
    let mut slices = slices(folder.path(), &image, &copies);
    slices.add(STALE, ORIGIN as u64);
    let mut script = "
begin() {
    serve_all
    attach disk 0
    attach disk@s 1
    mount -t ext4 /dev/nbd0 /mnt
}
begin
"
    .to_owned();
    for copy in &copies {
        // What was in flight on a connection that died waits for ever: only a
        // device that is detached lets it fail.
        let _ = write!(
            script,
            "
play_files {} /never a; a=$player
play_files {} /never b; b=$player
usleep {}
kill_server
detach 0
! wait $a || die 'a goes on without a server'
! wait $b || die 'b goes on without a server'
umount /mnt
detach 1
begin
checked a
checked b
umount /mnt
consistent /dev/nbd0
copy /dev/nbd1 /dev/mapper/{copy}
mount -t ext4 /dev/nbd0 /mnt
",
            random.below(1 << 32),
            random.below(1 << 32),
            1000 * random.below(LATEST_KILL_MS)
        );
    }
    script += "
umount /mnt
detach 0
detach 1
stop_server
# A store that has missed writes to its disk must be noticed.
dd if=/dev/urandom of=/dev/mapper/o bs=1M conv=fsync 2>/dev/null || true
serve_all
attach disk@s 1
copy /dev/nbd1 /dev/mapper/stale
detach 1
stop_server
";
    let output = boot(machine, &slices, &script);
    assert_files(&output);
    for copy in &copies {
        let at = first_difference(&slices, copy, &image);
        assert!(at.is_none(), "{copy}: not exact from byte {at:?} on");
    }
    let at = first_difference(&slices, STALE, &image);
    assert!(
        at.is_some(),
        "a stale snapshot was not told from an exact one"
    );
}

#[test]
fn a_mounted_file_system_lives_through_kills_with_a_client_that_holds_requests() {
    let Some(machine) = Machine::for_suite(SUITE) else {
        return;
    };
    let mut random = Random::new(seed(SUITE, "a_mounted_file_system"));
    let image = ext4(ORIGIN, 4096, &mut random);
    let folder = folder();
    let slices = slices(folder.path(), &image, &["d".to_owned(), "dw".to_owned()]);
    let first = random.below(1 << 32);
    let score = |nth: u64| Score {
        seed: first + nth,
        steps: STEPS,
        chunk: CHUNK,
        views: vec![ORIGIN as u64],
        snapshot_writes: 0,
        within_chunk: false,
    };
    // Two writers of files on the disk, one of sectors on the writable snapshot.
    let mut script = format!(
        "
serve_all
hold disk 0 2; h0=$holder
hold disk@s 1 1; h1=$holder
hold disk@w 2 1; h2=$holder
mount -t ext4 /dev/nbd0 /mnt
play_files {} /tmp/enough a; a=$player
play_files {} /tmp/enough b; b=$player
play_scores() {{
    n=0
    until [ -e /tmp/enough ]; do
        kernel-player $(({first} + n)) {STEPS} {CHUNK} 0 0 /dev/nbd2 >/tmp/scores.last || return 1
        n=$((n + 1))
        echo $n >/tmp/scores
    done
}}
play_scores & scores=$!
held_again() {{ [ $(grep -c again /tmp/hold.$1) -ge $2 ]; }}
wait_until [ -e /tmp/scores ]
",
        random.below(1 << 32),
        random.below(1 << 32),
    );
    for kill in 1..=KILLS {
        let _ = write!(
            script,
            "
usleep {}
kill_server
usleep {}
serve_all
wait_until held_again 0 $((2 * {kill}))
wait_until held_again 1 {kill}
wait_until held_again 2 {kill}
",
            1000 * random.below(LATEST_KILL_MS),
            1000 * random.below(1000),
        );
    }
    script += "
usleep 500000
touch /tmp/enough
wait $a || die \"a: $(cat /tmp/play.a)\"
wait $b || die \"b: $(cat /tmp/play.b)\"
wait $scores || die \"the snapshot: $(cat /tmp/scores.last)\"
say played.a $(grep played /tmp/play.a)
say played.b $(grep played /tmp/play.b)
say scores $(cat /tmp/scores)
! dmesg | grep -i 'I/O error\\|EXT4-fs error\\|aborting journal' || die 'the kernel noticed'
echo 3 >/proc/sys/vm/drop_caches
checked a
checked b
umount /mnt
consistent /dev/nbd0
copy /dev/nbd1 /dev/mapper/d
copy /dev/nbd2 /dev/mapper/dw
kill $h0 $h1 $h2
for n in 0 1 2; do nbd-attach disconnect $n; done
stop_server
";
    let output = boot(machine, &slices, &script);
    assert_files(&output);
    for name in ["a", "b"] {
        println!(
            "steps, longest in ms: {}",
            output.value(&format!("played.{name}"))
        );
    }
    let at = first_difference(&slices, "d", &image);
    assert!(at.is_none(), "the snapshot: not exact from byte {at:?} on");
    let mut forked = [image];
    let scores: u64 = output.value("scores").parse().expect("a count");
    for nth in 0..scores {
        apply(&score(nth).steps(), &mut forked);
    }
    let at = first_difference(&slices, "dw", &forked[0]);
    assert!(at.is_none(), "the fork: not as written from byte {at:?} on");
}
