//! The offline tools on stores that are as wrong as a test wants them: each kind of
//! damage is found and mended or reported as lost; what is refused changes nothing.

use std::path::Path;
use std::process::Command;

use nbdsnap_tests::harness::files::{Fingerprint, folder, sparse_file};
use nbdsnap_tests::harness::process::{Finished, run};
use nbdsnap_tests::harness::program::program;
use nbdsnap_tests::harness::server::Serve;
use nbdsnap_tests::harness::store::StoreBytes;

const CHUNK: usize = 4096;

/// `nbdsnap cow ...` in a folder.
fn cow(folder: &Path, args: &str) -> Finished {
    run(Command::new(program())
        .arg("cow")
        .args(args.split_whitespace())
        .current_dir(folder))
}

/// A store of 4 KiB chunks in which every chunk of data holds its own number.
fn store(exceptions: &[(u64, u64)]) -> Vec<u8> {
    let store = StoreBytes {
        exceptions: exceptions.to_vec(),
        ..StoreBytes::default()
    };
    let mut bytes = store.encode();
    for (n, chunk) in bytes.chunks_mut(CHUNK).enumerate().skip(2) {
        chunk.fill(n as u8);
    }
    bytes
}

fn put_entry(bytes: &mut [u8], area: usize, entry: usize, old: u64, new: u64) {
    let at = (1 + area * 257) * CHUNK + entry * 16;
    bytes[at..at + 8].copy_from_slice(&old.to_le_bytes());
    bytes[at + 8..at + 16].copy_from_slice(&new.to_le_bytes());
}

/// A kind of damage, what 'check' calls it, and what becomes of it.
struct Damage {
    what: &'static str,
    bytes: Vec<u8>,
    code: &'static str,
    kernel: &'static str,
    /// Which ranges 'repair' reports as lost, in chunks; none where it refuses.
    lost: Option<&'static [u64]>,
    /// More for the command line of 'repair'.
    with: &'static str,
}

fn damages() -> Vec<Damage> {
    let good = [(5, 2), (6, 3), (9, 4)];
    let sound = || store(&good);
    let header = |at: usize, value: u32| {
        let mut bytes = sound();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        bytes
    };
    let with = |more: (u64, u64)| store(&[good[0], good[1], good[2], more]);
    let entries = |stale: &[(usize, u64, u64)]| {
        let mut bytes = sound();
        for (entry, old, new) in stale {
            put_entry(&mut bytes, 0, *entry, *old, *new);
        }
        bytes
    };
    // 256 exceptions fill area 0; area 1 lies at chunk 258.
    let full: Vec<(u64, u64)> = (0..256).map(|n| (n, n + 2)).collect();
    let full_store = |chunks| {
        let store = StoreBytes {
            exceptions: full.clone(),
            chunks,
            ..StoreBytes::default()
        };
        store.encode()
    };
    let full_and_junk = {
        let mut bytes = full_store(300);
        put_entry(&mut bytes, 1, 0, 290, 1 << 40);
        bytes
    };
    let damage = |what, bytes, code, kernel, lost, with| Damage {
        what,
        bytes,
        code,
        kernel,
        lost,
        with,
    };
    vec![
        damage(
            "the magic is zero",
            header(0, 0),
            "no-store",
            "formats",
            None,
            "",
        ),
        damage(
            "the same, with a chunk size",
            header(0, 0),
            "no-store",
            "formats",
            Some(&[]),
            "--chunk 4K",
        ),
        damage(
            "the magic is something",
            header(0, 0xef53),
            "wrong-magic",
            "rejects",
            None,
            "",
        ),
        damage(
            "the version",
            header(8, 2),
            "wrong-version",
            "rejects",
            Some(&[]),
            "--chunk 4K",
        ),
        damage(
            "the chunk size",
            header(12, 24),
            "impossible-chunk-size",
            "rejects",
            Some(&[]),
            "--chunk 4K",
        ),
        damage(
            "half a sector",
            vec![0; 256],
            "header-too-short",
            "rejects",
            None,
            "",
        ),
        damage(
            "no area",
            sound()[..8191].to_vec(),
            "truncated",
            "rejects",
            Some(&[]),
            "",
        ),
        damage(
            "cut in the data",
            sound()[..4 * CHUNK].to_vec(),
            "outside-store",
            "fails",
            Some(&[9]),
            "",
        ),
        damage(
            "outside the store",
            with((12, 64)),
            "outside-store",
            "fails",
            Some(&[12]),
            "",
        ),
        damage(
            "outside the origin",
            with((40, 5)),
            "outside-origin",
            "fails",
            Some(&[40]),
            "",
        ),
        damage(
            "on the header's neighbour",
            with((12, 1)),
            "on-metadata",
            "misreads",
            Some(&[12]),
            "",
        ),
        damage(
            "two for one old chunk",
            with((6, 5)),
            "same-origin-chunk",
            "misreads",
            Some(&[6]),
            "",
        ),
        damage(
            "two at one new chunk",
            with((12, 3)),
            "same-store-chunk",
            "misreads",
            Some(&[12]),
            "",
        ),
        damage(
            "a torn write",
            entries(&[(32, 12, 5)]),
            "torn",
            "misreads-later",
            Some(&[]),
            "",
        ),
        damage(
            "a hole, then entries",
            entries(&[(7, 12, 5)]),
            "corrupt",
            "misreads",
            Some(&[]),
            "",
        ),
        damage(
            "an end that is none",
            entries(&[(3, 12, 0)]),
            "corrupt",
            "misreads",
            Some(&[]),
            "",
        ),
        damage(
            "a full area and no next one",
            full_store(258),
            "no-next-area",
            "rejects",
            Some(&[]),
            "",
        ),
        damage(
            "a full area and junk behind",
            full_and_junk,
            "outside-store",
            "fails",
            Some(&[290]),
            "",
        ),
    ]
}

#[test]
fn each_kind_of_damage_is_found_and_mended_or_lost() {
    for damage in damages() {
        let what = damage.what;
        let folder = folder();
        let folder = folder.path();
        std::fs::write(folder.join("cow"), &damage.bytes).expect("writable");
        // 40 chunks; the archives with a full area have a larger one.
        let chunks = if damage.bytes.len() > 100 * CHUNK {
            300
        } else {
            40
        };
        sparse_file(&folder.join("origin"), chunks * CHUNK as u64);
        let before = Fingerprint::of(folder);

        let checked = cow(folder, "check cow --origin origin --json");
        assert_eq!(checked.code, Some(1), "{what}: {checked}");
        let report = checked.json();
        let codes: Vec<&str> = report["findings"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|finding| finding["code"].as_str().expect("a word"))
            .collect();
        assert_eq!(codes, [damage.code], "{what}");
        assert_eq!(report["kernel"], damage.kernel, "{what}");
        let words = cow(folder, "check cow --origin origin");
        assert!(words.text().starts_with(damage.code), "{what}: {words}");
        before.assert_unchanged(folder, what);

        let repaired = cow(
            folder,
            &format!(
                "repair cow --output new --origin origin --json {}",
                damage.with
            ),
        );
        let Some(lost) = damage.lost else {
            assert_eq!(repaired.code, Some(1), "{what}: {repaired}");
            assert!(!repaired.stderr.is_empty(), "{what}: {repaired}");
            before.assert_unchanged(folder, what);
            continue;
        };
        let report = repaired.json();
        let found: Vec<u64> = report["lost"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|loss| loss["offset"].as_u64().expect("a number") / CHUNK as u64)
            .collect();
        assert_eq!(found, lost, "{what}: {repaired}");
        let doubtful = damage.code == "corrupt";
        assert_eq!(report["doubtful"], doubtful, "{what}: {repaired}");
        let bad = !lost.is_empty() || doubtful;
        assert_eq!(repaired.code, Some(i32::from(bad)), "{what}: {repaired}");
        let _ = cow(folder, "check new --origin origin").ok();
        // What was kept reads as before.
        let _ = cow(folder, "extract new --origin origin -o image").ok();
        let image = std::fs::read(folder.join("image")).expect("readable");
        if report["kept"].as_u64() >= Some(3) && damage.bytes.len() < 100 * CHUNK {
            for (old, new) in [(5, 2), (6, 3)] {
                assert_eq!(image[old * CHUNK], new, "{what}: chunk {old}");
            }
        }
    }
}

#[test]
fn a_store_is_mended_in_its_place_and_its_metadata_are_kept() {
    let folder = folder();
    let folder = folder.path();
    let mut bytes = store(&[(5, 2), (6, 3), (5, 4)]);
    put_entry(&mut bytes, 0, 32, 9, 5);
    std::fs::write(folder.join("cow"), &bytes).expect("writable");
    let repaired = cow(folder, "repair cow --in-place");
    assert_eq!(repaired.code, Some(1), "{repaired}");
    assert_eq!(
        repaired.text(),
        "lost: 4096 bytes of the snapshot at 20480 (same-origin-chunk)\n\
         1 entry behind the end of the list scrubbed, which a power cut had left: nothing is lost with them\n\
         the metadata as they were are kept in cow.before-repair\n\
         cow: sound, with 2 exceptions; 1 lost\n"
    );
    let checked = cow(folder, "check cow").ok();
    assert_eq!(checked.text(), "cow: sound, with 2 exceptions\n");
    // And back again.
    let refused = cow(folder, "restore cow.before-repair --output cow --in-place").failed();
    assert!(refused.stderr.contains("--damaged"), "{refused}");
    let _ = cow(
        folder,
        "restore cow.before-repair --output cow --in-place --damaged",
    )
    .ok();
    assert_eq!(std::fs::read(folder.join("cow")).expect("readable"), bytes);
}

#[test]
fn what_is_refused_changes_nothing() {
    let folder = folder();
    let folder = folder.path();
    std::fs::write(folder.join("cow"), store(&[(5, 2)])).expect("writable");
    std::fs::write(folder.join("junk"), [0x5a; 8192]).expect("writable");
    std::fs::write(folder.join("dump"), "hello\n").expect("writable");
    sparse_file(&folder.join("origin"), 40 * CHUNK as u64);
    let before = Fingerprint::of(folder);
    for (args, status, line) in [
        ("inspect none", 1, "none: no such file or device"),
        (
            "check .",
            1,
            ".: is a directory: name a disk image or a block device",
        ),
        (
            "map junk",
            1,
            "junk: no snapshot store: its magic is 0x5a5a5a5a, where a store has 0x70416e53 (\"SnAp\") and an unused one 0: it holds something else",
        ),
        (
            "dump origin",
            1,
            "origin: no snapshot store: it begins with zeros, so none was made here, or its header is lost",
        ),
        (
            "extract cow --origin cow -o image",
            1,
            "cow: is both the store and the disk",
        ),
        (
            "extract cow --origin origin -o - --format qcow2",
            2,
            "a qcow2 image cannot go into a pipe (see 'nbdsnap cow --help')",
        ),
        (
            "restore dump --output new",
            1,
            "dump: line 1: 'hello' is none of 'store ...', 'run OLD -> NEW xCOUNT', 'stale AREA/ENTRY: OLD -> NEW' and 'end'",
        ),
        (
            "create cow --size 1M",
            1,
            "cow: exists already: name another path",
        ),
        (
            "create new",
            2,
            "a new file needs --size SIZE (see 'nbdsnap cow --help')",
        ),
        (
            "create new --size 8K --chunk 4K",
            1,
            "new: has 8192 bytes, and 12288 are needed",
        ),
        (
            "shrink cow --output new --size 4K",
            1,
            "new: has 4096 bytes, and 12288 are needed",
        ),
        (
            "shrink cow --output new --size 1G",
            2,
            "--size is more than the 256 KiB of the store: that is 'grow' (see 'nbdsnap cow --help')",
        ),
        (
            "grow cow --output new --size 4K",
            2,
            "--size is less than the 256 KiB of the store: that is 'shrink' (see 'nbdsnap cow --help')",
        ),
        (
            "convert cow --origin origin --chunk 3K --output new",
            2,
            "invalid value '3K' for '--chunk <SIZE>': chunk size of 6 sectors is not a power of two: use a power of two from 1 sector (1s) to 1G (see 'nbdsnap cow --help')",
        ),
        (
            "size --origin 1Q",
            2,
            "--origin: '1Q': unknown unit 'Q': use K, M, G, T, P, E (or KiB and so on), or s for sectors, or name a disk (see 'nbdsnap cow --help')",
        ),
    ] {
        let refused = cow(folder, args);
        assert_eq!(refused.code, Some(status), "{refused}");
        assert_eq!(refused.stderr, format!("nbdsnap: {line}\n"));
        assert_eq!(refused.text(), "");
        before.assert_unchanged(folder, args);
    }
}

#[test]
fn a_store_that_a_server_has_open_is_read_only_by_force() {
    let folder = folder();
    let disk = folder.path().join("disk");
    let cow_path = folder.path().join("cow");
    sparse_file(&disk, 1 << 20);
    let mut serve = Serve::on_socket_in(folder.path());
    serve.disk("disk", &disk).snapshot("disk@s", &cow_path, "");
    let server = serve.start();
    for verb in [
        "inspect cow",
        "check cow",
        "extract cow --origin disk -o image",
    ] {
        let refused = cow(folder.path(), verb).failed();
        assert_eq!(
            refused.stderr,
            "nbdsnap: cow: is in use (a server, device-mapper or another tool has it): stop that one first, or read it all the same with --force-read\n"
        );
    }
    let read = cow(folder.path(), "check cow --force-read").ok();
    assert_eq!(
        read.stderr,
        "nbdsnap: cow: read without a lock: it may be changing, and what follows may be wrong\n"
    );
    assert_eq!(read.text(), "cow: sound, with 0 exceptions\n");
    let refused = cow(folder.path(), "repair cow --in-place").failed();
    assert!(refused.stderr.contains("is in use"), "{refused}");
    server.stop();
    let _ = cow(folder.path(), "check cow").ok();
}

#[test]
fn sizes_are_those_of_the_layout() {
    let folder = folder();
    for (args, bytes) in [
        // The kernel's own numbers, at 8 sectors: 1 exception takes 24 sectors, 3 take 40.
        ("size --origin 4K --chunk 4K --bytes", 24 * 512),
        ("size --origin 12K --chunk 4K --bytes", 40 * 512),
        (
            "size --origin 1G --change 50% --chunk 4K --bytes",
            (2 + 131_072 + 512) * 4096,
        ),
        ("size --origin 1G --change 0% --bytes", 3 * 16384),
        ("size --origin 1G --change 1 --bytes", 3 * 16384),
    ] {
        let said = cow(folder.path(), args).ok();
        assert_eq!(said.text(), format!("{bytes}\n"), "{args}");
    }
    let said = cow(folder.path(), "size --origin 100G --change 20%").ok();
    assert_eq!(
        said.text(),
        "  disk                100 GiB (107374182400 bytes, 209715200 sectors)\n\
         \x20 chunk size          16 KiB\n\
         \x20 chunks that change  1310720\n\
         \x20 store               20.0 GiB (21495840768 bytes, 41984064 sectors)\n\
         \x20 never full with     100.1 GiB (107479072768 bytes, 209920064 sectors)\n"
    );
}

#[test]
fn an_empty_store_is_the_kernels_and_can_be_served() {
    let folder = folder();
    let _ = cow(folder.path(), "create cow --size 1M --chunk 4K").ok();
    let mut expected = vec![0; 1 << 20];
    expected[..16].copy_from_slice(b"SnAp\x01\0\0\0\x01\0\0\0\x08\0\0\0");
    assert_eq!(
        std::fs::read(folder.path().join("cow")).expect("readable"),
        expected
    );
    let _ = cow(folder.path(), "check cow").ok();
}

/// Of 60 exceptions a torn write has left 5 and, behind a hole, the second sector.
#[test]
fn what_lies_behind_a_hole_is_brought_back_where_asked() {
    let good: Vec<(u64, u64)> = (0..60).map(|n| (2 * n, n + 2)).collect();
    let mut torn = store(&good);
    torn[CHUNK + 5 * 16..CHUNK + 32 * 16].fill(0);
    let mut corrupt = torn.clone();
    put_entry(&mut corrupt, 0, 20, 3, 22);
    for (bytes, args, code, [kept, regained, scrubbed]) in [
        (&torn, "", 0, [5, 0, 28]),
        (&torn, "--beyond-holes", 1, [33, 28, 0]),
        // No torn write begins in the middle of a sector.
        (&corrupt, "--beyond-holes", 1, [5, 0, 29]),
    ] {
        let folder = folder();
        std::fs::write(folder.path().join("cow"), bytes).expect("writable");
        let done = cow(folder.path(), &format!("repair cow -o new --json {args}"));
        assert_eq!(done.code, Some(code), "{done}");
        let report = done.json();
        assert_eq!(report["kept"], kept, "{args}");
        assert_eq!(report["regained_exceptions"], regained, "{args}");
        assert_eq!(report["scrubbed"], scrubbed, "{args}");
        assert_eq!(report["doubtful"], code == 1, "{args}");
        let _ = cow(folder.path(), "check new").ok();
        sparse_file(&folder.path().join("disk"), 128 * CHUNK as u64);
        let _ = cow(folder.path(), "extract new --origin disk -o image").ok();
        let image = std::fs::read(folder.path().join("image")).expect("readable");
        for (n, (old, new)) in (0..).zip(&good) {
            let is_there = n < 5 || n >= 32 && regained > 0;
            let byte = if is_there { *new as u8 } else { 0 };
            let at = *old as usize * CHUNK;
            assert!(
                image[at..at + CHUNK].iter().all(|b| *b == byte),
                "{args}: {old}"
            );
        }
    }
}
