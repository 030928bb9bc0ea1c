//! A snapshot that LVM made: nbdsnap reads the same from its COW volume, and
//! counts the same as `lvs` shows.

use std::fmt::Write as _;
use std::path::Path;

use super::SUITE;
use nbdsnap_engine::{Status, StoreKind};
use nbdsnap_tests::harness::files::{folder, sparse_file};
use nbdsnap_tests::harness::random::Random;
use nbdsnap_tests::kernel::compare::{Compared, expect_difference, expect_same, same_bytes};
use nbdsnap_tests::kernel::exports::{self, Cow};
use nbdsnap_tests::kernel::machine::Machine;
use nbdsnap_tests::kernel::play::{Score, apply};
use nbdsnap_tests::kernel::seed;
use nbdsnap_tests::kernel::slices::Slices;
use nbdsnap_tests::kernel::vm::Vm;

const PLAYER: &str = env!("CARGO_BIN_EXE_kernel-player");
const ORIGIN: u64 = 12 << 20;
const COW: u64 = 8 << 20;

/// The name, what `lvcreate -c` is given (nothing: LVM's own choice), the bytes
/// of a chunk that come of it.
const SNAPSHOTS: [(&str, &str, u64); 2] = [("small", "", 4096), ("large", "-c 64k", 65536)];

#[test]
fn a_snapshot_of_lvms_reads_the_same_and_counts_the_same() {
    let Some(machine) = Machine::for_suite(SUITE) else {
        return;
    };
    let mut random = Random::new(seed(SUITE, "a_snapshot"));
    let folder = folder();
    let group = folder.path().join("group");
    sparse_file(&group, 64 << 20);
    let image = random.bytes(ORIGIN as usize);
    let mut slices = Slices::create(&folder.path().join("slices"));
    slices.add_filled("image", &image);
    slices.add("origin", ORIGIN);
    for (name, ..) in SNAPSHOTS {
        slices.add(&format!("{name}.view"), ORIGIN);
        slices.add(&format!("{name}.cow"), COW);
    }
    let score = Score {
        seed: random.below(1 << 32),
        steps: 120,
        chunk: 4096,
        views: vec![ORIGIN; 3],
        snapshot_writes: 3,
        within_chunk: false,
    };
    let devices = ["disk", "small", "large"].map(|name| format!("/dev/vg/{name}"));
    let mut script = slices.script("/dev/vda");
    script += "
lvm pvcreate -qq /dev/vdb
lvm vgcreate -qq vg /dev/vdb
lvm lvcreate -qq -Wn -Zn -an -L 12M -n disk vg
lvm lvchange -qq -ay vg/disk
lvm vgmknodes -qq
copy /dev/mapper/image /dev/vg/disk
";
    for (name, chunk, _) in SNAPSHOTS {
        let _ = writeln!(
            script,
            "lvm lvcreate -qq {chunk} -L 8M -s -n {name} vg/disk"
        );
    }
    let _ = writeln!(
        script,
        "lvm vgmknodes -qq\n{} || die play",
        score.command(&devices)
    );
    for (name, ..) in SNAPSHOTS {
        let _ = write!(
            script,
            "say status.{name} $(status vg-{name})
say lvs.{name} $(lvm lvs --noheadings -o data_percent vg/{name})
say chunk.{name} $(lvm lvs --noheadings -o chunk_size --units b --nosuffix vg/{name})
copy /dev/vg/{name} /dev/mapper/{name}.view
copy /dev/mapper/vg-{name}-cow /dev/mapper/{name}.cow
"
        );
    }
    script += "copy /dev/mapper/vg-disk-real /dev/mapper/origin\n";
    let mut vm = Vm::new(machine);
    vm.disk(slices.path())
        .disk(&group)
        .program(Path::new(PLAYER));
    let output = vm.run(&script);

    let mut models = vec![image; 3];
    apply(&score.steps(), &mut models);
    let origin = folder.path().join("disk");
    std::fs::write(&origin, slices.read("origin")).expect("a test file can be written");
    let mut cows = Vec::new();
    for (n, (name, _, chunk)) in SNAPSHOTS.into_iter().enumerate() {
        let view = slices.read(&format!("{name}.view"));
        assert!(view == models[n + 1], "{name}: the kernel's view");
        let path = folder.path().join(name);
        std::fs::write(&path, slices.read(&format!("{name}.cow")))
            .expect("a test file can be written");
        let status = exports::status(&path, StoreKind::Persistent, ORIGIN).expect("a store");
        assert_eq!(
            output.value(&format!("status.{name}")),
            status.to_string(),
            "{name}"
        );
        assert_eq!(
            output.value(&format!("chunk.{name}")),
            chunk.to_string(),
            "{name}"
        );
        assert_eq!(
            output.value(&format!("lvs.{name}")),
            percent(status),
            "{name}: {status}"
        );
        cows.push(Cow {
            path,
            options: String::new(),
        });
    }
    expect_same(check_views(folder.path(), &origin, &cows, &models));
    // The first chunk of a store is another: the comparison notices.
    change_a_byte(&cows[1].path, 2 * SNAPSHOTS[1].2);
    let compared = check_views(folder.path(), &origin, &cows, &models);
    expect_difference(compared, "nbdsnap's view 2: differs");
}

/// What nbdsnap shows of LVM's volumes.
fn check_views(folder: &Path, origin: &Path, cows: &[Cow], models: &[Vec<u8>]) -> Compared {
    let server = exports::serve(folder, origin, cows, false);
    let mut models = models.iter().enumerate();
    models.try_for_each(|(view, model)| {
        let shown = exports::read(&server, view).expect("readable");
        same_bytes(&shown, model, &format!("nbdsnap's view {view}"))
    })?;
    server.stop();
    Ok(())
}

fn change_a_byte(path: &Path, at: u64) {
    let mut bytes = std::fs::read(path).expect("readable");
    bytes[at as usize] ^= 1;
    std::fs::write(path, bytes).expect("a test file can be written");
}

/// A store's use as `lvs` words it: percents of its size, to two digits.
fn percent(status: Status) -> String {
    let Status::Active {
        allocated, total, ..
    } = status
    else {
        panic!("{status}");
    };
    format!("{:.2}", allocated as f64 * 100.0 / total as f64)
}
