//! The offline tools on stores that the kernel and LVM made in this very run: in use, full,
//! lost, and cut off in a merge. What they say is what `dmsetup status` said; what they
//! extract, and what a disk becomes that they roll back, is what the kernel read from the
//! snapshot; and of the stores that they make the kernel reads the same again.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use super::SUITE;
use nbdsnap_tests::harness::files::{folder, sparse_file};
use nbdsnap_tests::harness::process::{Finished, run};
use nbdsnap_tests::harness::program::program;
use nbdsnap_tests::harness::random::Random;
use nbdsnap_tests::kernel::compare::{expect_difference, expect_same, same, same_bytes};
use nbdsnap_tests::kernel::machine::Machine;
use nbdsnap_tests::kernel::play::Score;
use nbdsnap_tests::kernel::seed;
use nbdsnap_tests::kernel::slices::Slices;
use nbdsnap_tests::kernel::vm::{Output, Vm};

const SECTOR: u64 = 512;
const PLAYER: &str = env!("CARGO_BIN_EXE_kernel-player");
/// Sectors of the origins, with a fraction of a chunk at their end.
const ORIGIN: u64 = 8 * 300 + 3;
/// LVM's are whole extents.
const LVM_ORIGIN: u64 = 4 << 20;
const LVM_COW: u64 = 8 << 20;

/// A snapshot that dmsetup makes.
struct Shape {
    name: &'static str,
    letter: &'static str,
    /// Sectors in a chunk.
    chunk: u64,
    /// Chunks of the store.
    chunks: u64,
    /// As in [`Score`].
    snapshot_writes: u64,
}

const SHAPES: [Shape; 5] = [
    Shape {
        name: "c8",
        letter: "P",
        chunk: 8,
        chunks: 320,
        snapshot_writes: 3,
    },
    Shape {
        name: "c32",
        letter: "P",
        chunk: 32,
        chunks: 90,
        snapshot_writes: 3,
    },
    // Full, and read all the same.
    Shape {
        name: "full",
        letter: "PO",
        chunk: 8,
        chunks: 37,
        snapshot_writes: 1,
    },
    // Full, and lost.
    Shape {
        name: "lost",
        letter: "P",
        chunk: 8,
        chunks: 40,
        snapshot_writes: 0,
    },
    // Its merge is cut off.
    Shape {
        name: "cut",
        letter: "P",
        chunk: 8,
        chunks: 320,
        snapshot_writes: 3,
    },
];

/// A store as the kernel left it.
struct Made {
    name: &'static str,
    /// Bytes in a chunk.
    chunk: u64,
    origin: Vec<u8>,
    cow: Vec<u8>,
    /// What the kernel read from the snapshot; nothing where it is lost.
    view: Option<Vec<u8>>,
    /// What `dmsetup status` said of it.
    status: String,
}

/// A store that a tool made of one of those.
struct Given {
    of: &'static str,
    by: &'static str,
    chunk: u64,
    cow: Vec<u8>,
}

fn script_of(shape: &Shape, seed: u64, script: &mut String) {
    let Shape {
        name,
        letter,
        chunk,
        ..
    } = shape;
    let table =
        format!("0 {ORIGIN} snapshot /dev/mapper/{name}.o /dev/mapper/{name}.c {letter} {chunk}");
    let score = Score {
        seed,
        steps: 120,
        chunk: chunk * SECTOR,
        views: vec![ORIGIN * SECTOR; 2],
        snapshot_writes: shape.snapshot_writes,
        within_chunk: true,
    };
    let play = score.command(&["", ".s"].map(|view| format!("/dev/mapper/{name}{view}")));
    // What overflowed is known to the kernel only until it is loaded again.
    let _ = write!(
        script,
        "dmsetup create {name}.s --table \"{table}\"
dmsetup create {name} --table \"0 {ORIGIN} snapshot-origin /dev/mapper/{name}.o\"
say {name} $({play})
dmsetup remove {name}; dmsetup remove {name}.s
dmsetup create {name}.s --table \"{table}\"
say status.{name} $(status {name}.s)
copy /dev/mapper/{name}.s /dev/mapper/{name}.d || say unreadable.{name} yes
dmsetup remove {name}.s
"
    );
}

/// The merge of `cut` begins on a slow disk, and is taken down at its first sign of life.
const CUT: &str = "
copy /dev/mapper/cut.o /dev/mapper/slow.o
copy /dev/mapper/cut.c /dev/mapper/slow.c
sync
dmsetup create cut --table \"0 $(sectors /dev/mapper/slow.o) snapshot-merge /dev/mapper/slow.o /dev/mapper/slow.c P 8\"
first=$(status cut)
n=0
while [ \"$(status cut)\" = \"$first\" ]; do
    n=$((n + 1))
    [ $n -lt 2000 ] || die \"the merge does nothing: $first\"
    usleep 10000
done
dmsetup remove cut
dmsetup create cut.s --table \"0 $(sectors /dev/mapper/slow.o) snapshot /dev/mapper/slow.o /dev/mapper/slow.c P 8\"
say status.slow $(status cut.s)
dmsetup remove cut.s
";

fn script_of_lvm(seed: u64) -> String {
    let score = Score {
        seed,
        steps: 120,
        chunk: 4096,
        views: vec![LVM_ORIGIN; 2],
        snapshot_writes: 3,
        within_chunk: false,
    };
    let play = score.command(&["disk", "snap"].map(|name| format!("/dev/vg/{name}")));
    format!(
        "
lvm pvcreate -qq /dev/vdb
lvm vgcreate -qq vg /dev/vdb
lvm lvcreate -qq -Wn -Zn -an -L 4M -n disk vg
lvm lvchange -qq -ay vg/disk
lvm vgmknodes -qq
copy /dev/mapper/lvm.i /dev/vg/disk
lvm lvcreate -qq -L 8M -s -n snap vg/disk
lvm vgmknodes -qq
{play} || die play
say status.lvm $(status vg-snap)
copy /dev/vg/snap /dev/mapper/lvm.d
copy /dev/mapper/vg-snap-cow /dev/mapper/lvm.c
copy /dev/mapper/vg-disk-real /dev/mapper/lvm.o
"
    )
}

/// What the kernel and LVM make.
fn make(machine: &Machine, random: &mut Random) -> Vec<Made> {
    let folder = folder();
    let (group, slow) = (folder.path().join("group"), folder.path().join("slow"));
    sparse_file(&group, 32 << 20);
    let mut slices = Slices::create(&folder.path().join("slices"));
    let mut slow = Slices::create(&slow);
    let mut scripts = String::new();
    for shape in &SHAPES {
        let name = shape.name;
        let origin = random.bytes((ORIGIN * SECTOR) as usize);
        slices.add_filled(&format!("{name}.o"), &origin);
        slices.add(&format!("{name}.c"), shape.chunks * shape.chunk * SECTOR);
        slices.add(&format!("{name}.d"), ORIGIN * SECTOR);
        script_of(shape, random.below(1 << 32), &mut scripts);
    }
    slow.add("slow.o", ORIGIN * SECTOR);
    slow.add("slow.c", 320 * 4096);
    slices.add_filled("lvm.i", &random.bytes(LVM_ORIGIN as usize));
    slices.add("lvm.o", LVM_ORIGIN);
    slices.add("lvm.c", LVM_COW);
    slices.add("lvm.d", LVM_ORIGIN);
    let lvm = script_of_lvm(random.below(1 << 32));
    let mut vm = Vm::new(machine);
    vm.disk(slices.path())
        .disk(&group)
        .disk(slow.path())
        .slow(150);
    let output = vm
        .program(Path::new(PLAYER))
        .run(&(slices.script("/dev/vda") + &slow.script("/dev/vdc") + &scripts + CUT + &lvm));
    let mut made: Vec<Made> = SHAPES
        .iter()
        .map(|shape| made(shape.name, shape.chunk * SECTOR, &slices, &output))
        .collect();
    made.push(self::made("lvm", 4096, &slices, &output));
    let cut = made.iter_mut().find(|made| made.name == "cut");
    let cut = cut.expect("it is one of them");
    cut.origin = slow.read("slow.o");
    cut.cow = slow.read("slow.c");
    let before = std::mem::replace(&mut cut.status, output.value("status.slow").to_owned());
    println!(
        "cut: {before} before its merge, {} in the middle",
        cut.status
    );
    assert_ne!(
        before, cut.status,
        "the merge was not cut off in the middle"
    );
    made
}

fn made(name: &'static str, chunk: u64, slices: &Slices, output: &Output) -> Made {
    let lost = output.find(&format!("unreadable.{name}")).is_some();
    assert_eq!(lost, name == "lost", "{name}: whether the kernel lost it");
    Made {
        name,
        chunk,
        origin: slices.read(&format!("{name}.o")),
        cow: slices.read(&format!("{name}.c")),
        view: (!lost).then(|| slices.read(&format!("{name}.d"))),
        status: output.value(&format!("status.{name}")).to_owned(),
    }
}

fn cow(folder: &Path, args: &str) -> Finished {
    run(Command::new(program())
        .arg("cow")
        .args(args.split_whitespace())
        .current_dir(folder))
}

fn read(folder: &Path, name: &str) -> Vec<u8> {
    std::fs::read(folder.join(name)).expect("readable")
}

/// Which sectors the ranges of a list cover, of so many.
fn sectors_of(ranges: &serde_json::Value, sectors: usize) -> Vec<bool> {
    let mut covered = vec![false; sectors];
    for range in ranges.as_array().expect("a list") {
        let number = |name: &str| range[name].as_u64().expect("a number");
        let (start, end) = (number("offset"), number("offset") + number("length"));
        let end = end.div_ceil(SECTOR).min(sectors as u64);
        covered[(start / SECTOR) as usize..end as usize].fill(true);
    }
    covered
}

/// The verbs that read, on one store in a folder.
fn look(made: &Made, folder: &Path) {
    let name = made.name;
    let report = cow(folder, "inspect cow --origin disk --json").ok().json();
    let sectors = made.origin.len() as u64 / SECTOR;
    let line = format!("0 {sectors} snapshot {}", made.status);
    let said = report["status"].as_str().expect("a line").to_owned();
    expect_same(same(&said, &line, &format!("{name}: the status")));
    let Some(view) = &made.view else {
        let report = cow(folder, "check cow --origin disk --json").failed();
        assert_eq!(report.json()["verdict"], "invalid", "{name}");
        for verb in [
            "extract cow --origin disk -o x",
            "merge cow --origin disk --adopt",
        ] {
            let refused = cow(folder, verb).failed();
            assert!(refused.stderr.contains("is lost"), "{name}: {refused}");
        }
        return;
    };
    let report = cow(folder, "check cow --origin disk --json").ok().json();
    assert_eq!(report["verdict"], "sound", "{name}: {report}");
    let differs: Vec<bool> = (view.chunks(512).zip(made.origin.chunks(512)))
        .map(|(view, origin)| view != origin)
        .collect();
    let diff = cow(folder, "diff cow --origin disk --content --json").ok();
    let found = sectors_of(&diff.json(), differs.len());
    assert!(found == differs, "{name}: which sectors differ");
    let map = cow(folder, "map cow --changed --json --origin disk").ok();
    let changed = sectors_of(&map.json(), differs.len());
    let all = differs
        .iter()
        .zip(&changed)
        .all(|(differs, known)| *known || !differs);
    assert!(all, "{name}: a sector differs that the map does not know");
}

/// The verbs that write: what they make is compared with what the kernel read, and the
/// stores among it are to be given back to the kernel.
fn rewrite(made: &Made, folder: &Path) -> Vec<Given> {
    let (name, view) = (made.name, made.view.as_ref().expect("it is not lost"));
    let other = if made.chunk == 4096 { 16384 } else { 4096 };
    let dump = cow(folder, "dump cow").ok();
    std::fs::write(folder.join("dump"), &dump.stdout).expect("writable");
    let grown = 2 * made.cow.len();
    for verb in [
        "restore dump --output restored --data cow".to_owned(),
        "shrink cow --output shrunk".to_owned(),
        format!("grow cow --size {grown} --output grown"),
        format!("convert cow --origin disk --chunk {other} --output converted"),
        "repair cow --output repaired --origin disk".to_owned(),
    ] {
        let _ = cow(folder, &verb).ok();
    }
    assert_eq!(
        cow(folder, "dump restored").ok().stdout,
        dump.stdout,
        "{name}"
    );
    let stores = [
        ("cow", made.chunk),
        ("restored", made.chunk),
        ("shrunk", made.chunk),
        ("grown", made.chunk),
        ("converted", other),
        ("repaired", made.chunk),
    ];
    for (store, _) in stores {
        let _ = cow(folder, &format!("check {store} --origin disk")).ok();
        let extract = format!("extract {store} --origin disk -o {store}.image");
        let _ = cow(folder, &extract).ok();
        let image = read(folder, &format!("{store}.image"));
        expect_same(same_bytes(&image, view, &format!("{name}: out of {store}")));
    }
    let given = stores[1..].iter().map(|&(by, chunk)| Given {
        of: name,
        by,
        chunk,
        cow: read(folder, by),
    });
    let given = given.collect();
    // What was only read is as it was.
    assert!(read(folder, "cow") == made.cow && read(folder, "disk") == made.origin);
    let _ = cow(folder, "merge cow --origin disk --adopt").ok();
    expect_same(same_bytes(
        &read(folder, "disk"),
        view,
        &format!("{name}: rolled back"),
    ));
    given
}

/// What the kernel reads from the stores that the tools made.
fn give_back(machine: &Machine, made: &[Made], given: &[Given]) -> Vec<Vec<u8>> {
    let folder = folder();
    let mut slices = Slices::create(&folder.path().join("slices"));
    let mut script = String::new();
    for made in made {
        slices.add_filled(&format!("{}.o", made.name), &made.origin);
    }
    for Given { of, by, chunk, cow } in given {
        let made = made.iter().find(|made| made.name == *of);
        let bytes = made.expect("it was made of one of them").origin.len() as u64;
        slices.add_filled(&format!("{of}.{by}.c"), cow);
        slices.add(&format!("{of}.{by}.d"), bytes);
        let (sectors, chunk) = (bytes / SECTOR, chunk / SECTOR);
        let _ = write!(
            script,
            "dmsetup create s --table \"0 {sectors} snapshot /dev/mapper/{of}.o /dev/mapper/{of}.{by}.c P {chunk}\"
copy /dev/mapper/s /dev/mapper/{of}.{by}.d || die {of}.{by}: $(status s)
dmsetup remove s
"
        );
    }
    let _ = Vm::new(machine)
        .disk(slices.path())
        .run(&(slices.script("/dev/vda") + &script));
    given
        .iter()
        .map(|Given { of, by, .. }| slices.read(&format!("{of}.{by}.d")))
        .collect()
}

#[test]
fn the_offline_tools_take_what_the_kernel_made_and_give_it_back() {
    let Some(machine) = Machine::for_suite(SUITE) else {
        return;
    };
    let mut random = Random::new(seed(SUITE, "the_offline_tools"));
    let made = make(machine, &mut random);
    let mut given = Vec::new();
    for made in &made {
        let folder = folder();
        let write = |name: &str, bytes: &[u8]| {
            std::fs::write(folder.path().join(name), bytes).expect("writable");
        };
        write("disk", &made.origin);
        write("cow", &made.cow);
        look(made, folder.path());
        let Some(view) = &made.view else {
            continue;
        };
        given.extend(rewrite(made, folder.path()));
        // Another byte in the first chunk of data: the tool shows it, and so will the
        // kernel.
        let mut wrong = made.cow.clone();
        wrong[2 * made.chunk as usize] ^= 1;
        write("disk", &made.origin);
        write("wrong", &wrong);
        let _ = cow(folder.path(), "extract wrong --origin disk -o wrong.image").ok();
        let image = read(folder.path(), "wrong.image");
        expect_difference(same_bytes(&image, view, "x"), "x: differs");
        given.push(Given {
            of: made.name,
            by: "wrong",
            chunk: made.chunk,
            cow: wrong,
        });
    }
    let views = give_back(machine, &made, &given);
    let mut same = 0;
    for (Given { of, by, .. }, found) in given.iter().zip(&views) {
        let made = made.iter().find(|made| made.name == *of);
        let view = made
            .and_then(|made| made.view.as_ref())
            .expect("it is not lost");
        let what = format!("{of}, {by}, as the kernel reads it");
        let compared = same_bytes(found, view, &what);
        if *by == "wrong" {
            expect_difference(compared, "differs");
        } else {
            expect_same(compared);
            same += 1;
        }
    }
    println!("{} stores, {same} made of them", made.len());
}
