//! The offline tools on random stores: a dump makes the same bytes again; no bytes at
//! all make a tool fail otherwise than by a refusal. Random choices are played again with
//! `NBDSNAP_SEED`; `NBDSNAP_LONG` lets the searches go on.
//!
//! The tools run in this process, and lock what they open: so no test here starts
//! another program, which would have the locks too from its fork to its exec.

use std::path::Path;
use std::time::Instant;

use nbdsnap::cow::{self, CowStore, Reading, dump, inspect, repair, restore};
use nbdsnap_tests::harness::files::{folder, sparse_file};
use nbdsnap_tests::harness::random::{Random, long_run, seed};

/// A store such as the kernel may have left, of any chunk size; its file in `folder`.
fn random_store(random: &mut Random, folder: &Path) {
    let sectors = 1 << random.below(6);
    let per_area = sectors * 32;
    let most = if random.one_in(3) { 3 * per_area } else { 90 };
    let count = random.below(most + 1);
    let chunks = 2 + count + count / per_area + random.below(50);
    let bytes = chunks * sectors * 512;
    // Chunks of data in some order, and runs among the old ones.
    let mut news: Vec<u64> = (2..chunks).filter(|c| c % (per_area + 1) != 1).collect();
    if random.one_in(2) {
        for n in (1..news.len()).rev() {
            news.swap(n, random.below(n as u64 + 1) as usize);
        }
    }
    let mut old = random.below(1000);
    let exceptions: Vec<(u64, u64)> = (0..count as usize)
        .map(|n| {
            old += if random.one_in(4) {
                random.between(2, 1 << 40)
            } else {
                1
            };
            (old, news[n])
        })
        .collect();
    let mut image = random.bytes(bytes as usize);
    let chunk = sectors as usize * 512;
    image[..chunk].fill(0);
    let valid = u32::from(!random.one_in(10));
    for (n, word) in [0x7041_6e53, valid, 1, sectors as u32]
        .into_iter()
        .enumerate()
    {
        image[n * 4..n * 4 + 4].copy_from_slice(&word.to_le_bytes());
    }
    for area in 0..=count / per_area {
        let at = (1 + area * (per_area + 1)) as usize * chunk;
        image[at..at + chunk].fill(0);
    }
    let entry = |n: u64| {
        (1 + n / per_area * (per_area + 1)) as usize * chunk + (n % per_area) as usize * 16
    };
    for (n, (old, new)) in (0..).zip(&exceptions) {
        image[entry(n)..entry(n) + 8].copy_from_slice(&old.to_le_bytes());
        image[entry(n) + 8..entry(n) + 16].copy_from_slice(&new.to_le_bytes());
    }
    // Sometimes what a torn write leaves.
    let next_sector = (count % per_area + 1).next_multiple_of(32);
    if random.one_in(3) && next_sector < per_area {
        let at = entry(count / per_area * per_area + next_sector);
        image[at..at + 8].copy_from_slice(&7_u64.to_le_bytes());
        image[at + 8..at + 16].copy_from_slice(&2_u64.to_le_bytes());
    }
    std::fs::write(folder.join("x"), image).expect("writable");
}

/// Repeat a random trial: some times, or as long as `NBDSNAP_LONG` says.
fn trials(name: &str, usual: u32, mut trial: impl FnMut(&mut Random, &Path)) {
    let folder = folder();
    let mut random = Random::new(seed(name));
    let begun = Instant::now();
    let mut count = 0;
    loop {
        trial(&mut random, folder.path());
        count += 1;
        let goes_on = match long_run() {
            None => count < usual,
            Some(time) => begun.elapsed() < time,
        };
        if !goes_on {
            println!("{name}: {count} stores");
            return;
        }
    }
}

#[test]
fn restore_of_dump_is_the_same_store_byte_for_byte() {
    trials("restore_of_dump", 150, |random, folder| {
        random_store(random, folder);
        let (x, copy) = (folder.join("x"), folder.join("copy"));
        let before = std::fs::read(&x).expect("readable");
        let format =
            [dump::Format::Text, dump::Format::Json, dump::Format::Xml][random.below(3) as usize];
        let mut text = Vec::new();
        {
            let store = CowStore::open(&x, Reading::Alone).expect("a store");
            dump::run(&store, format, &mut text).expect("readable");
        }
        let read = dump::read(&text[..], Path::new("dump")).expect("a dump");
        // The data stays; header and areas are junk before.
        let mut junk = before.clone();
        let chunk = read.store.header.chunk_size.bytes() as usize;
        let stride = (chunk / 16 + 1) * chunk;
        junk[..chunk].fill(0xc3);
        let exceptions: u64 = read.runs.iter().map(|run| run.chunks).sum();
        for area in 0..=exceptions as usize / (chunk / 16) {
            junk[chunk + area * stride..][..chunk].fill(0x3c);
        }
        std::fs::write(&copy, junk).expect("writable");
        restore::run(
            &read,
            Path::new("dump"),
            restore::Place::InPlace(&copy),
            None,
            true,
        )
        .expect("it can be restored");
        assert!(
            std::fs::read(&copy).expect("readable") == before,
            "{format:?}: the bytes differ"
        );
    });
}

/// Drives every reading tool, and repair, with the file `x`: whatever comes, it
/// comes as an answer or an error.
fn drive(folder: &Path, origin: Option<&Path>) {
    let (x, new) = (folder.join("x"), folder.join("new"));
    let _ = cow::check::run(&x, origin, Reading::Alone, None);
    let _ = inspect::run(&x, origin, Reading::Alone)
        .map(|found| (found.small.text(|at| at.to_string()), found.large.png("")));
    if let Ok(store) = CowStore::open(&x, Reading::Alone) {
        for order in [
            cow::ranges::Order::Origin,
            cow::ranges::Order::Store,
            cow::ranges::Order::List,
        ] {
            let all = cow::ranges::exceptions(&store, order).expect("readable");
            if order == cow::ranges::Order::Origin {
                let _ = cow::ranges::changed(&store, &all, None).count();
            }
        }
        let mut text = Vec::new();
        dump::run(&store, dump::Format::Text, &mut text).expect("readable");
        let read = dump::read(&text[..], Path::new("dump")).expect("what is dumped is read");
        let _ = read.contradiction(read.store.bytes);
    }
    let wanted = repair::Wanted {
        cow: &x,
        origin,
        output: Some(&new),
        force: false,
        chunk_size: None,
        beyond_holes: origin.is_none(),
    };
    if repair::run(wanted, &mut |_| {}).is_ok() {
        let report = cow::check::run(&new, origin, Reading::Alone, None).expect("readable");
        assert!(report.is_fine(), "repaired, and not sound: {report:?}");
        std::fs::remove_file(&new).expect("it was made");
    }
}

#[test]
fn no_bytes_make_the_tools_fail_otherwise_than_by_a_refusal() {
    trials("any_bytes", 150, |random, folder| {
        random_store(random, folder);
        let x = folder.join("x");
        let mut bytes = std::fs::read(&x).expect("readable");
        // Some entries, sectors or header words become something else; often the end
        // is cut off.
        for _ in 0..random.below(12) {
            let span = [8, 16, 512][random.below(3) as usize].min(bytes.len());
            let most = if random.one_in(2) {
                64 << 10
            } else {
                bytes.len()
            };
            let at = random.below((most.min(bytes.len()) - span + 1) as u64) as usize / 8 * 8;
            match random.below(4) {
                0 => bytes[at..at + span].fill(0),
                1 => bytes[at..at + span].fill(0xff),
                2 => {
                    let from = random.below((bytes.len() - span + 1) as u64) as usize;
                    bytes.copy_within(from..from + span, at);
                }
                _ => bytes[at] ^= 1 << random.below(8),
            }
        }
        if random.one_in(4) {
            bytes.truncate(random.below(bytes.len() as u64 + 1) as usize);
        }
        std::fs::write(&x, bytes).expect("writable");
        let origin = folder.join("origin");
        sparse_file(&origin, random.below(1 << 20) * 512);
        drive(folder, (!random.one_in(3)).then_some(origin.as_path()));
    });
}
