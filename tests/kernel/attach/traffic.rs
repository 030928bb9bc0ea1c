//! Several connections at once, and a device that is detached in mid-write.

use nbdsnap_tests::harness::files::folder;
use nbdsnap_tests::harness::random::Random;
use nbdsnap_tests::kernel::machine::Machine;
use nbdsnap_tests::kernel::seed;
use nbdsnap_tests::kernel::slices::Slices;

use super::{MIB, SUITE, difference, machine_with_nbdsnap, script};

const DISK: usize = 4 * MIB as usize;
const STORE: u64 = 6 * MIB;
const BLOCK: usize = 4096;
/// The last piece of a disk, which nothing but `WRONG` writes.
const LAST_PIECE: usize = DISK - (64 << 10);

/// Four connections, each with a processor of its own that writes a quarter of the
/// disk, while the snapshot is read through four more.
const CONNECTIONS: &str = "
serve disk=/dev/mapper/c.origin --snapshot disk@past=/dev/mapper/c.store,chunk=4K
attach disk /dev/nbd0 -C 4
attach disk@past /dev/nbd1 -C 4
connections() { grep -c ':2A39 [0-9A-F:]* 01 ' /proc/net/tcp; }
[ $(connections) = 8 ] || die $(connections) connections
for n in 0 1 2 3; do
    [ $(cat /sys/block/nbd0/mq/$n/cpu_list) = $n ] || die connection $n has no processor
    taskset -c $n dd if=/dev/mapper/source of=/dev/nbd0 bs=4k count=256 skip=$((n * 256)) \
        seek=$((n * 256)) iflag=direct oflag=direct conv=notrunc,fsync 2>/tmp/dd$n &
    jobs=\"$jobs $!\"
done
copy /dev/nbd1 /dev/mapper/c.during
for job in $jobs; do wait $job || die a writer: $(cat /tmp/dd?); done
copy /dev/nbd0 /dev/mapper/c.now
copy /dev/nbd1 /dev/mapper/c.past
detach /dev/nbd0 /dev/nbd1
stop_server
";

/// Two disks are written; the first one's device goes away in the middle.
const DETACHED: &str = "
serve x=/dev/mapper/x.origin y=/dev/mapper/y.origin \
    --snapshot x@past=/dev/mapper/x.store --snapshot y@past=/dev/mapper/y.store
attach x /dev/nbd0
attach x@past /dev/nbd1
attach y /dev/nbd2
from_source() {
    local device=$1
    shift
    dd if=/dev/mapper/source of=$device iflag=direct oflag=direct \"$@\"
}
from_source /dev/nbd0 bs=64k count=16 conv=notrunc,fsync 2>/dev/null
(
    passes=0
    while from_source /dev/nbd0 bs=4k skip=256 seek=256 conv=notrunc 2>/tmp/x.dd; do
        passes=$((passes + 1))
    done
    echo $passes >/tmp/passes
) &
x=$!
from_source /dev/nbd2 bs=4k count=512 conv=notrunc,fsync 2>/tmp/y.dd &
y=$!
writes() { awk '{ print $5 }' /sys/block/nbd0/stat; }
has_written() { [ $(writes) -ge $1 ]; }
patiently 'writing' has_written $(($(writes) + 100))
nbd-client -d /dev/nbd0
wait $x
wait $y || die the other disk: $(cat /tmp/y.dd)
say passes $(cat /tmp/passes)
say blocks $(sed -n 's/+.* records out//p' /tmp/x.dd)
patiently 'the end of /dev/nbd0' is_free /dev/nbd0
attach x /dev/nbd0
attach y@past /dev/nbd3
copy /dev/nbd0 /dev/mapper/x.now
copy /dev/nbd1 /dev/mapper/x.past
copy /dev/nbd2 /dev/mapper/y.now
copy /dev/nbd3 /dev/mapper/y.past
detach /dev/nbd0 /dev/nbd1 /dev/nbd2 /dev/nbd3
stop_server
";

/// The origin is written where its server does not see it.
const WRONG: &str = "
from_source /dev/mapper/y.origin bs=64k skip=63 seek=63 count=1 conv=notrunc,fsync 2>/dev/null
serve y=/dev/mapper/y.origin --snapshot y@past=/dev/mapper/y.store
attach y@past /dev/nbd3
copy /dev/nbd3 /dev/mapper/y.wrong
detach /dev/nbd3
stop_server
";

#[test]
fn four_connections_and_a_device_that_goes_away() {
    let Some(machine) = Machine::for_suite(SUITE) else {
        return;
    };
    let mut random = Random::new(seed(SUITE, "four_connections"));
    let folder = folder();
    let mut slices = Slices::create(&folder.path().join("slices"));
    let source = random.bytes(DISK);
    slices.add_filled("source", &source);
    let images = ["c", "x", "y"].map(|disk| {
        let image = random.bytes(DISK);
        slices.add_filled(&format!("{disk}.origin"), &image);
        slices.add(&format!("{disk}.store"), STORE);
        for copy in ["now", "past"] {
            slices.add(&format!("{disk}.{copy}"), DISK as u64);
        }
        image
    });
    for copy in ["c.during", "y.wrong"] {
        slices.add(copy, DISK as u64);
    }
    let mut vm = machine_with_nbdsnap(machine);
    vm.disk(slices.path()).processors(4);
    let text = slices.script("/dev/vda") + &script("lib.sh") + CONNECTIONS + DETACHED + WRONG;
    let output = vm.run(&text);

    let same = |slice: &str, expected: &[u8]| {
        let at = difference(&slices.read(slice), expected);
        assert_eq!(at, None, "{slice} differs from this byte on");
    };
    let [c, x, y] = &images;
    same("c.during", c);
    same("c.past", c);
    same("c.now", &source);
    same("c.origin", &source);

    let count = |key: &str| output.value(key).parse::<usize>().expect("a number");
    let (passes, blocks) = (count("passes"), count("blocks"));
    println!("detached after {passes} passes and {blocks} blocks");
    same("x.past", x);
    check_detached(&slices.read("x.now"), x, &source, passes, blocks);

    same("y.past", y);
    let half = [&source[..DISK / 2], &y[DISK / 2..]].concat();
    same("y.now", &half);
    let at = difference(&slices.read("y.wrong"), y);
    assert!(
        at.is_some_and(|at| at >= LAST_PIECE),
        "a snapshot that is wrong from byte {LAST_PIECE} on differs from {at:?} on"
    );
}

/// The first MiB was made durable, and the blocks behind it were acknowledged one
/// by one; the one that was under way may be either.
fn check_detached(shown: &[u8], image: &[u8], source: &[u8], passes: usize, blocks: usize) {
    let first = MIB as usize / BLOCK;
    for (n, block) in shown.chunks(BLOCK).enumerate() {
        let range = n * BLOCK..(n + 1) * BLOCK;
        let new = block == &source[range.clone()];
        let old = block == &image[range];
        let written = passes > 0 || n < first + blocks;
        let under_way = n == first + blocks;
        assert!(
            new && written || old && !written || under_way && (new || old),
            "block {n}, of {blocks} that were acknowledged behind the first {first}"
        );
    }
}
