//! Discards, zeroes and block sizes: what the devices show afterwards is compared
//! with a model byte by byte, and what the stores took for it is counted.

use std::fmt::Write as _;
use std::path::Path;

use nbdsnap_engine::{Status, StoreKind};
use nbdsnap_tests::harness::files::{folder, sparse_file};
use nbdsnap_tests::harness::random::Random;
use nbdsnap_tests::kernel::exports;
use nbdsnap_tests::kernel::machine::Machine;
use nbdsnap_tests::kernel::play::{Score, apply};
use nbdsnap_tests::kernel::program::stripped;
use nbdsnap_tests::kernel::seed;
use nbdsnap_tests::kernel::slices::Slices;

use super::{MIB, SUITE, difference, machine_with_nbdsnap, script};

const PLAYER: &str = env!("CARGO_BIN_EXE_kernel-player");
const SECTOR: usize = 512;

#[test]
fn discards_zeroes_and_block_sizes() {
    let Some(machine) = Machine::for_suite(SUITE) else {
        return;
    };
    let mut random = Random::new(seed(SUITE, "discards"));
    let folder = folder();
    let [coarse, coarse_store] = ["coarse", "coarse.store"].map(|name| folder.path().join(name));
    sparse_file(&coarse_store, 4 * MIB);
    let mut slices = Slices::create(&folder.path().join("slices"));
    let discards = Discards::new(&mut slices, &mut random);
    add_trimmed(&mut slices);
    let blocks = Blocks::new(&mut slices, &coarse, &mut random);

    let mut vm = machine_with_nbdsnap(machine);
    vm.disk(slices.path())
        .disk_with_blocks(&coarse, 4096)
        .disk_with_blocks(&coarse_store, 4096)
        .program(&stripped(Path::new(PLAYER)));
    let text = slices.script("/dev/vda")
        + &script("lib.sh")
        + &discards.script()
        + TRIMMED
        + &Blocks::script();
    let output = vm.run(&text);

    discards.check(&slices);
    check_trimmed(&slices, folder.path(), output.value("fstrim"));
    blocks.check(&slices);
}

/// A disk with two snapshots, written through all three devices, then discarded
/// and zeroed in part and as a whole, with a copy of everything after each stage.
struct Discards {
    image: Vec<u8>,
    score: Score,
}

impl Discards {
    /// With a fraction of a chunk at the end.
    const ORIGIN: usize = 4 * MIB as usize + 5 * SECTOR;
    const STORE: u64 = 6 * MIB;
    const STAGES: [&str; 5] = ["played", "part", "zeroed", "all", "zeros"];
    /// What is discarded and zeroed of the origin and of its first snapshot, as
    /// offset and length.
    const PART: [(usize, usize); 2] = [((1 << 20) + 1024, 2 << 20), (0, 1 << 20)];
    const ZEROED: [(usize, usize); 2] = [(3 << 20, (1 << 19) + SECTOR), (2 << 20, 300 << 10)];

    fn new(slices: &mut Slices, random: &mut Random) -> Self {
        let image = random.bytes(Self::ORIGIN);
        slices.add_filled("origin", &image);
        for store in ["small", "large"] {
            slices.add(store, Self::STORE);
        }
        for stage in Self::STAGES {
            for view in 0..3 {
                slices.add(&format!("{stage}.{view}"), Self::ORIGIN as u64);
            }
            for store in ["small", "large"] {
                slices.add(&format!("{stage}.{store}"), Self::STORE);
            }
        }
        let score = Score {
            seed: random.below(1 << 32),
            steps: 120,
            chunk: 4096,
            views: vec![Self::ORIGIN as u64; 3],
            snapshot_writes: 4,
            within_chunk: false,
        };
        Self { image, score }
    }

    fn script(&self) -> String {
        let devices = ["/dev/nbd0", "/dev/nbd1", "/dev/nbd2"].map(str::to_owned);
        let play = self.score.command(&devices);
        let blkdiscard = |how: &str, ranges: [(usize, usize); 2]| {
            let mut text = String::new();
            for (n, (offset, len)) in ranges.into_iter().enumerate() {
                let _ = writeln!(text, "blkdiscard {how} -o {offset} -l {len} /dev/nbd{n}");
            }
            text
        };
        format!(
            "
stage() {{
    for n in 0 1 2; do sync /dev/nbd$n; copy /dev/nbd$n /dev/mapper/$1.$n; done
    for store in small large; do copy /dev/mapper/$store /dev/mapper/$1.$store; done
}}
serve disk=/dev/mapper/origin --snapshot disk@small=/dev/mapper/small,chunk=4K \
    --snapshot disk@large=/dev/mapper/large,chunk=64K
attach disk /dev/nbd0
attach disk@small /dev/nbd1
attach disk@large /dev/nbd2
[ $(cat /sys/block/nbd0/queue/discard_max_bytes) -gt 0 ] || die discards are not offered
{play} || die play
stage played
{}stage part
{}stage zeroed
blkdiscard /dev/nbd0
blkdiscard /dev/nbd2
stage all
blkdiscard -z /dev/nbd0
stage zeros
detach /dev/nbd0 /dev/nbd1 /dev/nbd2
stop_server
",
            blkdiscard("", Self::PART),
            blkdiscard("-z", Self::ZEROED),
        )
    }

    fn check(&self, slices: &Slices) {
        let mut models = vec![self.image.clone(); 3];
        apply(&self.score.steps(), &mut models);
        let exact = |stage: &str, views: &[usize], models: &[Vec<u8>]| {
            for &view in views {
                let shown = slices.read(&format!("{stage}.{view}"));
                let at = difference(&shown, &models[view]);
                assert_eq!(at, None, "{stage}: view {view} differs from this byte on");
            }
        };
        let same_stores = |stage: &str, before: &str| {
            for store in ["small", "large"] {
                let [now, then] = [stage, before].map(|s| slices.read(&format!("{s}.{store}")));
                assert!(now == then, "{stage}: the store {store} has changed");
            }
        };
        exact("played", &[0, 1, 2], &models);

        exact("part", &[1, 2], &models);
        same_stores("part", "played");
        let shown = slices.read("part.0");
        let trimmed = discarded(&shown, &models[0], Self::PART[0]);
        assert!(trimmed > 0, "nothing that both snapshots had was discarded");
        println!("discards: {trimmed} sectors of the origin now hold zeros");
        models[0] = shown;

        for (model, (offset, len)) in models.iter_mut().zip(Self::ZEROED) {
            model[offset..offset + len].fill(0);
        }
        exact("zeroed", &[0, 1, 2], &models);

        exact("all", &[1, 2], &models);
        same_stores("all", "zeroed");
        discarded(&slices.read("all.0"), &models[0], (0, Self::ORIGIN));

        models[0].fill(0);
        exact("zeros", &[0, 1, 2], &models);
    }
}

/// Insist that each sector of the range is as it was or zeros, and the rest as it
/// was. How many have become zeros.
fn discarded(shown: &[u8], before: &[u8], (offset, len): (usize, usize)) -> usize {
    let mut trimmed = 0;
    for (n, (now, then)) in shown.chunks(SECTOR).zip(before.chunks(SECTOR)).enumerate() {
        if now == then {
            continue;
        }
        let at = n * SECTOR;
        assert!(
            at >= offset && at + now.len() <= offset + len,
            "the sector at {at} was not to be discarded"
        );
        assert!(
            now.iter().all(|&byte| byte == 0),
            "the discarded sector at {at} holds something else"
        );
        trimmed += 1;
    }
    trimmed
}

const TRIMMED_DISK: u64 = 24 * MIB;
const TRIMMED_STORE: u64 = 26 * MIB;

/// A file system that is trimmed after most of it was removed.
const TRIMMED: &str = "
modprobe ext4
mkdir -p /mnt/trimmed
serve disk=/dev/mapper/t.origin --snapshot disk@empty=/dev/mapper/t.store
attach disk /dev/nbd0
attach disk@empty /dev/nbd1
mkfs.ext4 -q -F -E nodiscard,lazy_itable_init=0 /dev/nbd0
mount /dev/nbd0 /mnt/trimmed
head -c 3000000 /dev/urandom >/mnt/trimmed/gone
sync
rm /mnt/trimmed/gone
sync
copy /dev/mapper/t.store /dev/mapper/t.before
say fstrim $(fstrim -v /mnt/trimmed | sed 's/.*(\\([0-9]*\\) bytes.*/\\1/')
sync
copy /dev/mapper/t.store /dev/mapper/t.after
copy /dev/nbd1 /dev/mapper/t.view
umount /mnt/trimmed
e2fsck -fn /dev/nbd0 >/dev/null 2>&1 || die fstrim: the file system is damaged
detach /dev/nbd0 /dev/nbd1
stop_server
";

fn add_trimmed(slices: &mut Slices) {
    for (name, bytes) in [
        ("origin", TRIMMED_DISK),
        ("view", TRIMMED_DISK),
        ("store", TRIMMED_STORE),
        ("before", TRIMMED_STORE),
        ("after", TRIMMED_STORE),
    ] {
        slices.add(&format!("t.{name}"), bytes);
    }
}

fn check_trimmed(slices: &Slices, folder: &Path, bytes: &str) {
    let status = |name: &str| {
        let path = folder.join(name);
        std::fs::write(&path, slices.read(name)).expect("a test file can be written");
        exports::status(&path, StoreKind::Persistent, TRIMMED_DISK).expect("a store")
    };
    let (before, after) = (status("t.before"), status("t.after"));
    println!("fstrim: {bytes} bytes; the store before {before}, after {after}");
    assert!(bytes.parse::<u64>().expect("a number") > TRIMMED_DISK / 2);
    assert!(matches!(before, Status::Active { .. }), "{before}");
    assert_eq!(before, after, "fstrim filled the store");
    let view = slices.read("t.view");
    assert!(view.iter().all(|&byte| byte == 0), "the disk was empty");
}

/// Disks of 512 and of 4096 bytes a block, with the smallest chunks that each can
/// have, attached with every block size that nbd-client knows.
struct Blocks {
    /// The images of `fine` and `coarse`.
    images: [Vec<u8>; 2],
    source: Vec<u8>,
}

impl Blocks {
    const DISK: usize = 1 << 20;
    const SIZES: [usize; 4] = [512, 1024, 2048, 4096];
    const NAMES: [&str; 4] = ["fine", "fine@past", "coarse", "coarse@past"];
    /// Blocks in a write.
    const COUNT: usize = 5;

    fn new(slices: &mut Slices, coarse: &Path, random: &mut Random) -> Self {
        let images = [(); 2].map(|()| random.bytes(Self::DISK));
        slices.add_filled("b.origin", &images[0]);
        std::fs::write(coarse, &images[1]).expect("a test file can be written");
        let source = random.bytes(Self::DISK);
        slices.add_filled("b.source", &source);
        for view in 0..4 {
            slices.add(&format!("b.{view}"), Self::DISK as u64);
        }
        Self { images, source }
    }

    /// The first block of the write to a view with a block size: another place for
    /// each, that no chunk or larger block begins at.
    fn first_block(view: usize, size: usize) -> usize {
        let place = Self::SIZES.iter().position(|&s| s == size).expect("a size") * 4 + view;
        place * 64 * 1024 / size + 3
    }

    fn script() -> String {
        let mut text = String::from(
            "
nbdsnap serve coarse=/dev/vdb --snapshot coarse@past=/dev/vdc,chunk=2K 2>/tmp/refusal &&
    die chunks of less than a block
grep -q 'smaller than the logical block size 4096' /tmp/refusal || die $(cat /tmp/refusal)
serve fine=/dev/mapper/b.origin coarse=/dev/vdb --snapshot fine@past=/tmp/fine,chunk=1s \
    --snapshot coarse@past=/dev/vdc,chunk=4K
",
        );
        for (view, name) in Self::NAMES.iter().enumerate() {
            for size in Self::SIZES {
                let first = Self::first_block(view, size);
                let count = Self::COUNT;
                let _ = write!(
                    text,
                    "
attach {name} /dev/nbd0 -b {size}
[ $(cat /sys/block/nbd0/queue/logical_block_size) = {size} ] || die {name}: not in blocks of {size}
dd if=/dev/mapper/b.source of=/dev/nbd0 bs={size} skip={first} seek={first} count={count} \
    iflag=direct oflag=direct conv=notrunc,fsync 2>/tmp/dd || die {name}, blocks of {size}: $(cat /tmp/dd)
detach /dev/nbd0
"
                );
            }
        }
        for (view, name) in Self::NAMES.iter().enumerate() {
            let _ = writeln!(
                text,
                "attach {name} /dev/nbd0\ncopy /dev/nbd0 /dev/mapper/b.{view}\ndetach /dev/nbd0"
            );
        }
        text + "stop_server\n"
    }

    fn check(&self, slices: &Slices) {
        for (view, name) in Self::NAMES.iter().enumerate() {
            let mut model = self.images[view / 2].clone();
            for size in Self::SIZES {
                let start = Self::first_block(view, size) * size;
                let range = start..start + Self::COUNT * size;
                model[range.clone()].copy_from_slice(&self.source[range]);
            }
            let shown = slices.read(&format!("b.{view}"));
            let at = difference(&shown, &model);
            assert_eq!(at, None, "{name} differs from this byte on");
        }
    }
}
