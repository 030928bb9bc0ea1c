//! Arguments: what the kernel's targets take, and what they say of the rest.

use libc::{EBUSY, ENODEV};
use nbdsnap_engine::dm::{DeviceId, DiskId};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// `/dev/a` to `/dev/z` are disks, `0:N` devices, `busy` is in use.
fn device(name: &str) -> Result<Lower, i32> {
    if let Some(letter) = name.strip_prefix("/dev/") {
        let number = letter.bytes().next().ok_or(ENODEV)?;
        return Ok(Lower::Disk(DiskId(u32::from(number))));
    }
    if let Some(minor) = name.strip_prefix("0:") {
        return Ok(Lower::Device(DeviceId(minor.parse().map_err(|_| ENODEV)?)));
    }
    Err(if name == "busy" { EBUSY } else { ENODEV })
}

fn read(target: &str, len: u64, params: &str) -> Result<Target, TargetError> {
    parse(target, len, params, &mut device)
}

const STORE: &str = "Couldn't create exception store: ";

/// The error's number and words.
fn refusal(target: &str, len: u64, params: &str) -> (i32, String) {
    let error = read(target, len, params).expect_err(params);
    (error.errno, error.why.into_owned())
}

fn disk(letter: char) -> Lower {
    Lower::Disk(DiskId(letter as u32))
}

#[test]
fn every_target_is_read() {
    let linear = Target::Linear {
        lower: disk('a'),
        start: 384,
    };
    assert_eq!(read("linear", 8, "/dev/a 384"), Ok(linear));
    let striped = Target::Striped {
        chunk: 8,
        stripes: vec![(disk('a'), 0), (Lower::Device(DeviceId(3)), 16)],
    };
    assert_eq!(read("striped", 32, " 2\t+8 /dev/a 0 0:3 16 "), Ok(striped));
    assert_eq!(read("zero", 8, " "), Ok(Target::Zero));
    assert_eq!(read("error", 8, "what ever"), Ok(Target::Error));
    let origin = disk('o');
    let target = Target::SnapshotOrigin { origin };
    assert_eq!(read("snapshot-origin", 8, "/dev/o"), Ok(target));
}

#[test]
fn snapshots_are_read_with_their_features() {
    use Persistence::{Persistent, PersistentOverflow, Transient};
    let pair = |persistence, chunk| Pair {
        origin: disk('o'),
        cow: disk('c'),
        persistence,
        chunk,
        discard_zeroes_cow: false,
        discard_passdown_origin: false,
    };
    for (params, wanted) in [
        ("P 16", pair(Persistent, 16)),
        ("p 0", pair(Persistent, 0)),
        ("po 1", pair(PersistentOverflow, 1)),
        ("Poof 2097152", pair(PersistentOverflow, 1 << 21)),
        ("n 8 0 ignored", pair(Transient, 8)),
        ("Nonsense 8", pair(Transient, 8)),
    ] {
        let params = format!("/dev/o /dev/c {params}");
        assert_eq!(
            read("snapshot", 64, &params),
            Ok(Target::Snapshot(wanted.clone()))
        );
        let merge = read("snapshot-merge", 64, &params);
        if wanted.persistence == Transient {
            let error = merge.expect_err("a merge of a transient store");
            assert!(error.why.contains("does not support"), "{error}");
        } else {
            assert_eq!(merge, Ok(Target::SnapshotMerge(wanted)));
        }
    }
    let both = Pair {
        discard_zeroes_cow: true,
        discard_passdown_origin: true,
        ..pair(Persistent, 8)
    };
    let params = "/dev/o /dev/c P 8 2 DISCARD_passdown_origin discard_zeroes_cow";
    assert_eq!(read("snapshot", 64, params), Ok(Target::Snapshot(both)));
}

#[test]
fn what_is_wrong_is_said_as_the_kernel_says_it() {
    for (target, params, errno, why) in [
        ("linear", "", EINVAL, "Invalid argument count"),
        ("linear", "/dev/a", EINVAL, "Invalid argument count"),
        ("linear", "/dev/a 0 0", EINVAL, "Invalid argument count"),
        ("linear", "nowhere 0x8", EINVAL, "Invalid device sector"),
        ("linear", "nowhere -8", EINVAL, "Invalid device sector"),
        ("linear", "nowhere +8", EINVAL, "Invalid device sector"),
        ("linear", "nowhere 8", ENODEV, "Device lookup failed"),
        ("linear", "busy 8", EBUSY, "Device lookup failed"),
        ("striped", "2", EINVAL, "Not enough arguments"),
        ("striped", "0 8", EINVAL, "Invalid stripe count"),
        ("striped", "x 8", EINVAL, "Invalid stripe count"),
        ("striped", "2 0", EINVAL, "Invalid chunk_size"),
        ("striped", "2 4294967296", EINVAL, "Invalid chunk_size"),
        (
            "striped",
            "3 8",
            EINVAL,
            "Target length not divisible by number of stripes",
        ),
        (
            "striped",
            "2 5",
            EINVAL,
            "Target length not divisible by chunk size",
        ),
        (
            "striped",
            "2 8 /dev/a 0",
            EINVAL,
            "Not enough destinations specified",
        ),
        (
            "striped",
            "1 8 /dev/a 0 /dev/b",
            EINVAL,
            "Not enough destinations specified",
        ),
        (
            "striped",
            "2 8 /dev/a 0 busy x",
            EINVAL,
            "Couldn't parse stripe destination",
        ),
        (
            "striped",
            "2 8 /dev/a 0 busy 0",
            EBUSY,
            "Couldn't parse stripe destination",
        ),
        ("zero", "0", EINVAL, "No arguments required"),
        (
            "snapshot-origin",
            "",
            EINVAL,
            "origin: incorrect number of arguments",
        ),
        (
            "snapshot-origin",
            "/dev/o 0",
            EINVAL,
            "origin: incorrect number of arguments",
        ),
        (
            "snapshot-origin",
            "nowhere",
            ENODEV,
            "Cannot get target device",
        ),
        ("thin", "", EINVAL, "unknown target type"),
    ] {
        assert_eq!(
            refusal(target, 64, params),
            (errno, why.to_owned()),
            "{target} {params}"
        );
    }
}

#[test]
fn what_is_wrong_with_a_snapshot_is_said_in_the_kernels_order() {
    for (params, errno, why) in [
        ("", EINVAL, "requires 4 or more arguments".to_owned()),
        (
            "/dev/o /dev/c P",
            EINVAL,
            "requires 4 or more arguments".into(),
        ),
        (
            "nowhere /dev/c X x 3",
            EINVAL,
            "Invalid number of feature arguments".into(),
        ),
        (
            "nowhere /dev/c X x 1",
            EINVAL,
            "Invalid number of feature arguments".into(),
        ),
        (
            "nowhere /dev/c X x 1 discard",
            EINVAL,
            "Unrecognised feature requested".into(),
        ),
        (
            "nowhere /dev/c X x 1 discard_passdown_origin",
            EINVAL,
            "discard_passdown_origin feature depends on discard_zeroes_cow".into(),
        ),
        (
            "nowhere /dev/c X x",
            ENODEV,
            "Cannot get origin device".into(),
        ),
        ("/dev/o busy X x", EBUSY, "Cannot get COW device".into()),
        (
            "/dev/o /dev/o X x",
            EINVAL,
            "COW device cannot be the same as origin device".into(),
        ),
        (
            "/dev/o /dev/c X x",
            EINVAL,
            format!("{STORE}Exception store type is not P or N"),
        ),
        (
            "/dev/o /dev/c PX x",
            EINVAL,
            format!("{STORE}Invalid chunk size"),
        ),
        (
            "/dev/o /dev/c P -8",
            EINVAL,
            format!("{STORE}Invalid chunk size"),
        ),
        (
            "/dev/o /dev/c PX 12",
            EINVAL,
            format!("{STORE}Chunk size is not a power of 2"),
        ),
        (
            "/dev/o /dev/c PX 4194304",
            EINVAL,
            format!("{STORE}Chunk size is too high"),
        ),
        (
            "/dev/o /dev/c PX 8",
            EINVAL,
            format!("{STORE}Unsupported persistent store option: X"),
        ),
    ] {
        for target in ["snapshot", "snapshot-merge"] {
            assert_eq!(
                refusal(target, 64, params),
                (errno, why.clone()),
                "{params}"
            );
        }
    }
}

#[test]
fn a_backslash_takes_the_next_letter_as_it_is() {
    for (params, args) in [
        ("", &[][..]),
        (" \t\n", &[]),
        ("a b", &["a", "b"]),
        (r"a\ b c", &["a b", "c"]),
        (r"a\\ b", &["a\\", "b"]),
        (r"\a b\", &["a", "b\\"]),
        ("\u{b}a\u{c}ü\r", &["a", "ü"]),
    ] {
        assert_eq!(split(params), args, "{params:?}");
    }
}

/// What the disk or device with this number is called: nothing of it is easy.
fn awkward(lower: Lower) -> String {
    let blanks = [" ", "\t", "\\", "#", "\n", "ü ", "", "\\ "];
    let odd = |number: u32| blanks[number as usize % blanks.len()];
    match lower {
        Lower::Disk(DiskId(number)) => format!("/{}d{number}{}", odd(number), odd(number / 8)),
        Lower::Device(DeviceId(minor)) => format!("999:{minor}"),
    }
}

fn lower() -> impl Strategy<Value = Lower> {
    prop_oneof![
        (0..64_u32).prop_map(|number| Lower::Disk(DiskId(number))),
        (0..64_u32).prop_map(|minor| Lower::Device(DeviceId(minor))),
    ]
}

fn some_pair() -> impl Strategy<Value = Pair> {
    let persistence = prop_oneof![
        Just(Persistence::Persistent),
        Just(Persistence::PersistentOverflow),
        Just(Persistence::Transient),
    ];
    let chunk = prop_oneof![Just(0), (0..22_u32).prop_map(|shift| 1 << shift)];
    let features = prop_oneof![
        Just((false, false)),
        Just((true, false)),
        Just((true, true)),
    ];
    (lower(), lower(), persistence, chunk, features)
        .prop_filter("two devices", |(origin, cow, ..)| origin != cow)
        .prop_map(|(origin, cow, persistence, chunk, features)| Pair {
            origin,
            cow,
            persistence,
            chunk,
            discard_zeroes_cow: features.0,
            discard_passdown_origin: features.1,
        })
}

/// A target, and sectors that it can have.
fn line() -> impl Strategy<Value = (u64, Target)> {
    let stripes = vec((lower(), any::<u64>()), 1..6);
    let striped = (stripes, 1..1_u64 << 20, 1..1000_u64).prop_map(|(stripes, chunk, rows)| {
        let len = stripes.len() as u64 * chunk * rows;
        (len, Target::Striped { chunk, stripes })
    });
    let linear = (lower(), any::<u64>()).prop_map(|(lower, start)| Target::Linear { lower, start });
    let others = prop_oneof![
        linear,
        Just(Target::Zero),
        Just(Target::Error),
        lower().prop_map(|origin| Target::SnapshotOrigin { origin }),
        some_pair().prop_map(Target::Snapshot),
        some_pair()
            .prop_filter("persistent", |pair| pair.persistence
                != Persistence::Transient)
            .prop_map(Target::SnapshotMerge),
    ];
    prop_oneof![striped, (1..u64::MAX, others)]
}

proptest! {
    #[test]
    fn what_is_printed_is_read_as_the_same((len, target) in line()) {
        let text = print(&target, &awkward);
        let all = (0..64).map(|n| Lower::Disk(DiskId(n)));
        let all = all.chain((0..64).map(|n| Lower::Device(DeviceId(n))));
        let named: Vec<(String, Lower)> = all.map(|lower| (awkward(lower), lower)).collect();
        let mut resolve = |name: &str| {
            let found = named.iter().find(|(known, _)| known == name);
            found.map(|(_, lower)| *lower).ok_or(ENODEV)
        };
        prop_assert_eq!(parse(target.name(), len, &text, &mut resolve), Ok(target));
    }

    #[test]
    fn no_arguments_bring_it_down(len: u64, params: String) {
        for (target, _) in VERSIONS {
            let _ = parse(target, len, &params, &mut device);
        }
    }
}
