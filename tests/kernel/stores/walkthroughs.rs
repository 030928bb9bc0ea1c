//! The two procedures by which people take a snapshot of a mounted device today,
//! with the real dmsetup: the scripts under `walkthroughs/` work, and what is
//! backed up is the file system of the instant, though writing never stops.

use std::path::Path;

use super::SUITE;
use nbdsnap_tests::harness::files::{folder, sparse_file};
use nbdsnap_tests::harness::program::workspace;
use nbdsnap_tests::kernel::machine::Machine;
use nbdsnap_tests::kernel::vm::Vm;

const MIB: u64 = 1 << 20;

/// What both scripts are given: files that are all there at the instant, a writer
/// that overwrites them from then on, and a backup that takes checksums while it
/// does.
const STAGE: &str = r"
modprobe ext4; modprobe xfs; modprobe dm-raid
mkdir -p /mnt/disk /mnt/snapshot
cat >/tmp/after <<'END'
#!/bin/sh
# Right after the instant: overwrite, remove and add files, and see it on the disk.
cd /mnt/disk
for n in $(seq 1 20); do head -c 40000 /dev/urandom >file$n; done
rm file2?
for n in $(seq 1 10); do head -c 30000 /dev/urandom >new$n; done
sync
END
cat >/tmp/backup <<'END'
#!/bin/sh
# Writing goes on while the backup is taken.
(cd /mnt/disk && for n in $(seq 1 10); do head -c 50000 /dev/urandom >busy$n; sync; done) &
(cd $1 && find . -type f | sort | xargs sha256sum) >/tmp/backup.sums
wait
END
chmod +x /tmp/after /tmp/backup
fill() { # fill: files and their checksums, some of them not on the disk yet
    for n in $(seq 1 40); do head -c $((n * 3000)) /dev/urandom >/mnt/disk/file$n; done
    (cd /mnt/disk && find . -type f | sort | xargs sha256sum) >/tmp/before.sums
}
verify() { # verify NAME TABLE: the backup is exact, the disk is as it was meant to be
    cmp /tmp/before.sums /tmp/backup.sums || die $1: the backup is not the instant
    [ $(wc -l </tmp/before.sums) -gt 30 ] || die $1: no files
    # The comparison can fail: a backup of the disk itself is not the instant.
    (cd /mnt/disk && find . -type f | sort | xargs sha256sum) >/tmp/disk.sums
    ! cmp -s /tmp/before.sums /tmp/disk.sums || die $1: the disk is still the instant
    [ $(ls /mnt/disk | grep -c -e new -e busy) = 20 ] || die $1: writes were lost
    [ $(dmsetup table $1 | tr ' ' _) = $(echo $2 | tr ' ' _) ] || die $1: the table is not the first one
    [ $(dmsetup ls | grep -c ^$1) = 1 ] || die $1: devices are left: $(dmsetup ls)
    umount /mnt/disk
    say done.$1 $(wc -l </tmp/backup.sums)
}
export AFTER=/tmp/after
";

#[test]
fn both_procedures_back_up_the_instant() {
    let Some(machine) = Machine::for_suite(SUITE) else {
        return;
    };
    let folder = folder();
    let mut vm = Vm::new(machine);
    for n in 0..4 {
        let disk = folder.path().join(format!("disk{n}"));
        sparse_file(&disk, 330 * MIB); // XFS takes 300 MiB at least
        vm.disk(&disk);
    }
    for name in ["live_linear", "live_xfs"] {
        let path = workspace().join("tests/kernel/walkthroughs").join(name);
        vm.program(Path::new(&path));
    }
    let script = format!("{STAGE}{LINEAR}{XFS_ON_RAID}{XFS_ON_LINEAR}");
    let output = vm.run(&script);
    // Header and first area, at 64 sectors a chunk, with old chunks behind them.
    let status = output.value("0 81920 snapshot");
    assert!(status.ends_with("/675840 128"), "{status}");
    for name in ["home", "mirror", "plain"] {
        let files = output.value(&format!("done.{name}"));
        println!("{name}: {files} files backed up");
    }
}

const LINEAR: &str = r#"
dmsetup create home --table "0 81920 linear /dev/vda 2048"
mkfs.ext4 -q -E lazy_itable_init=0 /dev/mapper/home
mount /dev/mapper/home /mnt/disk
fill
live_linear home /dev/vdb /mnt/snapshot /tmp/backup || die live_linear
verify home "0 81920 linear $(cat /sys/block/vda/dev) 2048"
e2fsck -fn /dev/mapper/home >/dev/null || die home: the file system is damaged
dmsetup remove home
"#;

const XFS_ON_RAID: &str = r#"
dmsetup create mirror --table "0 655360 raid raid1 4 0 nosync region_size 1024 2 - /dev/vdb - /dev/vdc"
mkfs.xfs -q -f /dev/mapper/mirror
mount -t xfs /dev/mapper/mirror /mnt/disk
fill
table=$(dmsetup table mirror)
live_xfs mirror /dev/vdd /mnt/snapshot /tmp/backup || die live_xfs
verify mirror "$table"
xfs_repair -n /dev/mapper/mirror >/dev/null 2>&1 || die mirror: the file system is damaged
dmsetup remove mirror
"#;

const XFS_ON_LINEAR: &str = r#"
dmsetup create plain --table "0 655360 linear /dev/vdc 2048"
mkfs.xfs -q -f /dev/mapper/plain
mount -t xfs /dev/mapper/plain /mnt/disk
fill
table=$(dmsetup table plain)
live_xfs plain /dev/vdd /mnt/snapshot /tmp/backup || die live_xfs
verify plain "$table"
xfs_repair -n /dev/mapper/plain >/dev/null 2>&1 || die plain: the file system is damaged
dmsetup remove plain
"#;
