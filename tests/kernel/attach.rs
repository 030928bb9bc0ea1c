//! The kernel attaches nbdsnap's exports as block devices and lives on them: file
//! systems stay mounted and written while snapshots of them are taken, mounted,
//! checked and compared, file by file or byte by byte, with the instant; and the
//! same for discards, block sizes, several connections, devices that are detached
//! in mid-write, partitions, and the commands that the README prints.
//!
//! The scripts that run in the machine lie beside the suite, in `attach/`. Each
//! kind of comparison is also shown a snapshot that is wrong, and must say so.

#[path = "attach/devices.rs"]
mod devices;
#[path = "attach/traffic.rs"]
mod traffic;

use nbdsnap_tests::harness::files::{folder, sparse_file};
use nbdsnap_tests::harness::program::workspace;
use nbdsnap_tests::kernel::machine::Machine;
use nbdsnap_tests::kernel::program;
use nbdsnap_tests::kernel::vm::Vm;

const SUITE: &str = "kernel_attach";
const MIB: u64 = 1 << 20;

/// A script of this suite, as text.
fn script(name: &str) -> String {
    let path = workspace().join("tests/kernel/attach").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A machine with the program in it.
fn machine_with_nbdsnap(machine: &Machine) -> Vm<'_> {
    let mut vm = Vm::new(machine);
    vm.program(&program::nbdsnap());
    vm
}

/// The first byte in which a device differs from what it must hold.
fn difference(shown: &[u8], expected: &[u8]) -> Option<usize> {
    assert_eq!(shown.len(), expected.len(), "lengths");
    shown.iter().zip(expected).position(|(x, y)| x != y)
}

/// `attach/file_system.sh` on a disk of so many bytes.
fn live_on_a_file_system(kind: &str, bytes: u64) {
    let Some(machine) = Machine::for_suite(SUITE) else {
        return;
    };
    let folder = folder();
    let [disk, stores] = ["disk", "stores"].map(|name| folder.path().join(name));
    sparse_file(&disk, bytes);
    sparse_file(&stores, 128 * MIB);
    let mut vm = machine_with_nbdsnap(machine);
    vm.disk(&disk).disk(&stores);
    let text = format!(
        "FS={kind}\n{}{}",
        script("lib.sh"),
        script("file_system.sh")
    );
    let output = vm.run(&text);
    for stage in ["monday", "tuesday", "detached"] {
        println!("{kind}: {stage}: numbers {}", output.value(stage));
    }
    assert!(output.lines.iter().any(|line| line == "seen"));
}

#[test]
fn ext4_lives_on_while_its_snapshots_are_mounted() {
    live_on_a_file_system("ext4", 64 * MIB);
}

#[test]
fn xfs_lives_on_while_its_snapshots_are_mounted() {
    live_on_a_file_system("xfs", 320 * MIB); // it takes 300 MiB at least
}

/// The commands of the README's section `Attach it`, in their order.
fn commands_of_the_readme() -> String {
    let readme = std::fs::read_to_string(workspace().join("README.md")).expect("a README");
    let (_, section) = readme.split_once("### Attach it").expect("the section");
    let (_, block) = section.split_once("```sh\n").expect("its commands");
    let (block, _) = block.split_once("```").expect("their end");
    assert!(block.contains("nbd-client"), "{block}");
    block.to_owned()
}

#[test]
fn partitions_and_the_readmes_commands() {
    let Some(machine) = Machine::for_suite(SUITE) else {
        return;
    };
    let folder = folder();
    let disk = folder.path().join("disk");
    sparse_file(&disk, 48 * MIB);
    let mut vm = machine_with_nbdsnap(machine);
    vm.disk(&disk).file("readme", commands_of_the_readme());
    let text = script("lib.sh") + &script("readme.sh") + &script("partitions.sh");
    let output = vm.run(&text);
    println!("partitions: {}", output.value("partitions"));
    println!("devices of the README: {}", output.value("readme"));
}
