//! The machine is cut off while the kernel writes: at the next boot the kernel
//! and nbdsnap both show each snapshot as the disk was when it was taken.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use super::SUITE;
use nbdsnap_tests::harness::files::folder;
use nbdsnap_tests::harness::random::{Random, long_run};
use nbdsnap_tests::kernel::compare::{Compared, expect_difference, expect_same, same_bytes};
use nbdsnap_tests::kernel::exports::{self, Cow};
use nbdsnap_tests::kernel::machine::Machine;
use nbdsnap_tests::kernel::seed;
use nbdsnap_tests::kernel::slices::Slices;
use nbdsnap_tests::kernel::vm::Vm;

const SECTOR: u64 = 512;
const PLAYER: &str = env!("CARGO_BIN_EXE_kernel-player");
/// Chunk sizes in sectors, a disk with one snapshot each.
const CHUNKS: [u64; 4] = [1, 8, 32, 128];
/// Sectors of an origin, a fraction of a chunk at its end.
const ORIGIN: u64 = 12_345;
/// Room for the whole origin at every chunk size.
const COW: u64 = 2 * ORIGIN;
/// From the first steps to the cut.
const LATEST_CUT: Duration = Duration::from_millis(1500);

fn cuts() -> usize {
    if long_run().is_some() { 50 } else { 2 }
}

/// The kernel shows the snapshots that the last cut left; then new ones are
/// taken, in the old stores with only their heads zeroed, and written over.
fn script(chunk: u64, seed: u64, first: bool, last: bool) -> String {
    let mut script = String::new();
    let name = format!("c{chunk}");
    let snapshot =
        format!("0 {ORIGIN} snapshot /dev/mapper/{name}.o /dev/mapper/{name}.c P {chunk}");
    if !first {
        let _ = write!(
            script,
            "dmsetup create {name}.s --table \"{snapshot}\"
say {name} $(status {name}.s)
copy /dev/mapper/{name}.s /dev/mapper/{name}.d
dmsetup remove {name}.s
"
        );
    }
    if !last {
        let bytes = chunk * SECTOR;
        let _ = write!(
            script,
            "dd if=/dev/zero of=/dev/mapper/{name}.c bs={bytes} count=2 conv=fsync 2>/dev/null
dmsetup create {name}.s --table \"{snapshot}\"
dmsetup create {name} --table \"0 {ORIGIN} snapshot-origin /dev/mapper/{name}.o\"
say {name}.taken $(status {name}.s)
kernel-player forever {seed} 10 {bytes} 0 0 /dev/mapper/{name} >/tmp/{name} &
"
        );
    }
    script
}

/// Wait until each has begun to play. `sync` would make everything durable that
/// a cut ought to endanger.
const BEGUN: &str = "
for name in c1 c8 c32 c128; do
    until grep -q playing /tmp/$name; do usleep 10000; done
done
say begun
wait
";

/// nbdsnap shows the snapshots as these images; on how many disks more than
/// nothing had been overwritten.
fn check(slices: &Slices, images: &[Vec<u8>], what: &str) -> Result<u64, String> {
    let mut overwritten = 0;
    for (chunk, image) in CHUNKS.iter().zip(images) {
        let name = format!("c{chunk}");
        let folder = folder();
        let origin = folder.path().join("disk");
        let cow = folder.path().join("cow");
        let now = slices.read(&format!("{name}.o"));
        std::fs::write(&origin, &now).expect("a test file can be written");
        std::fs::write(&cow, slices.read(&format!("{name}.c")))
            .expect("a test file can be written");
        overwritten += u64::from(now != *image);
        let cow = Cow {
            path: cow,
            options: String::new(),
        };
        let server = exports::serve(folder.path(), &origin, &[cow], false);
        let shown = exports::read(&server, 1).expect("the snapshot is readable");
        server.stop();
        same_bytes(
            &shown,
            image,
            &format!("{what}: {name}: nbdsnap's snapshot"),
        )?;
    }
    Ok(overwritten)
}

/// The kernel's copies of its snapshots are these images.
fn check_kernels(slices: &Slices, images: &[Vec<u8>], what: &str) -> Compared {
    let mut all = CHUNKS.iter().zip(images);
    all.try_for_each(|(chunk, image)| {
        let shown = slices.read(&format!("c{chunk}.d"));
        same_bytes(
            &shown,
            image,
            &format!("{what}: c{chunk}: the kernel's snapshot"),
        )
    })
}

#[test]
fn a_cut_while_the_kernel_writes_leaves_every_snapshot_exact() {
    let Some(machine) = Machine::for_suite(SUITE) else {
        return;
    };
    let mut random = Random::new(seed(SUITE, "a_cut"));
    let folder = folder();
    let mut slices = Slices::create(&folder.path().join("slices"));
    for chunk in CHUNKS {
        slices.add_filled(
            &format!("c{chunk}.o"),
            &random.bytes((ORIGIN * SECTOR) as usize),
        );
        slices.add(&format!("c{chunk}.c"), COW * SECTOR);
        slices.add(&format!("c{chunk}.d"), ORIGIN * SECTOR);
    }
    let (mut images, mut overwritten) = (Vec::new(), 0);
    let cuts = cuts();
    for cut in 0..=cuts {
        let (first, last) = (cut == 0, cut == cuts);
        let mut script_text = slices.script("/dev/vda");
        for chunk in CHUNKS {
            script_text += &script(chunk, random.below(1 << 32), first, last);
        }
        let fresh: Vec<Vec<u8>> = CHUNKS
            .map(|chunk| slices.read(&format!("c{chunk}.o")))
            .into();
        let mut vm = Vm::new(machine);
        vm.disk(slices.path()).program(Path::new(PLAYER));
        if last {
            vm.run(&script_text);
        } else {
            let mut running = vm.start(&(script_text + BEGUN));
            running.wait_for("begun");
            let wait = random.below(LATEST_CUT.as_millis() as u64);
            std::thread::sleep(Duration::from_millis(wait));
            println!("cut {cut}: {wait} ms after the first steps");
            running.cut_power();
        }
        let what = format!("cut {cut}");
        expect_same(check_kernels(&slices, &images, &what));
        if !last {
            images = fresh;
            overwritten += check(&slices, &images, &what).unwrap_or_else(|why| panic!("{why}"));
        }
    }
    assert!(overwritten > 0, "no cut came after a write");
    // One byte of what the snapshots ought to show is another: both notice.
    let middle = images[2].len() / 2;
    images[2][middle] ^= 1;
    let wanted = format!("snapshot: differs from byte {middle} on");
    expect_difference(check_kernels(&slices, &images, "x"), &wanted);
    expect_difference(check(&slices, &images, "x").map(drop), &wanted);
}
