//! What records say: how lists are judged, and that they are read as they were written.

use std::path::{Path, PathBuf};

use super::*;
use crate::state::attached::{AttachedStore, Finding, Offered};
use crate::state::record::StorePath;
use crate::state::seal::{self, SealError};

fn store(name: &str, mark: Mark) -> AttachedStore {
    AttachedStore {
        snapshot: name.into(),
        cow: format!("/cows/{name}").into(),
        of: None,
        bytes: None,
        taken_at: None,
        delete_cow: false,
        anew: None,
        mark,
    }
}

#[test]
fn a_disk_is_not_written_without_its_stores_nor_with_strange_ones() {
    let list = Attached {
        stores: vec![
            store("a", Mark::Attached),
            store("m", Mark::Merging),
            store("l", Mark::Lost),
        ],
    };
    let offer = |cow, is_old, adopted| Offered {
        cow: Path::new(cow),
        of: None,
        is_old,
        adopted,
    };
    let (a, m) = (offer("/cows/a", true, false), offer("/cows/m", true, false));
    assert_eq!(list.judge(&[a, m], &[]), []);
    let missing = [
        Finding::Missing(store("a", Mark::Attached)),
        Finding::MissingMerge(store("m", Mark::Merging)),
    ];
    assert_eq!(list.judge(&[], &[]), missing);
    let given_up: Vec<PathBuf> = vec!["/cows/a".into(), "/cows/m".into()];
    assert_eq!(
        list.judge(&[], &given_up),
        missing[1..],
        "a merge is never given up"
    );
    let lost = offer("/cows/l", true, true);
    let found = list.judge(&[a, m, lost], &[]);
    assert_eq!(found, [Finding::Lost(store("l", Mark::Lost))]);
    let strange = offer("/cows/s", true, false);
    let found = list.judge(&[a, m, strange], &[]);
    assert_eq!(found, [Finding::Unlisted("/cows/s".into())]);
    for fine in [offer("/cows/s", true, true), offer("/cows/s", false, false)] {
        assert_eq!(list.judge(&[a, m, fine], &[]), []);
    }
}

#[test]
fn a_store_of_a_snapshot_is_served_upon_that_and_not_left_out_under_it() {
    let of_a = |name: &str, mark| AttachedStore {
        of: Some(StorePath("/cows/a".into())),
        ..store(name, mark)
    };
    let list = Attached {
        stores: vec![store("a", Mark::Attached), of_a("b", Mark::Attached)],
    };
    let offer = |cow, of: Option<&'static str>| Offered {
        cow: Path::new(cow),
        of: of.map(Path::new),
        is_old: true,
        adopted: false,
    };
    let (a, b) = (offer("/cows/a", None), offer("/cows/b", Some("/cows/a")));
    assert_eq!(list.judge(&[a, b], &[]), []);
    let misplaced = [Finding::OtherOrigin(of_a("b", Mark::Attached))];
    assert_eq!(list.judge(&[a, offer("/cows/b", None)], &[]), misplaced);
    // Where nobody writes the disk, what is of it may stay away; of a snapshot, not.
    let missing = [Finding::Missing(of_a("b", Mark::Attached))];
    assert_eq!(list.judge_shared(&[a], &[]), missing);
    assert_eq!(list.judge_shared(&[a], &["/cows/b".into()]), []);
    assert_eq!(list.judge_shared(&[], &[]), []);
}

#[test]
fn the_list_says_what_each_store_is_of() {
    let snapshots = ["a", "a@b", "a@b@c", "d"].map(|name| snapshot(name, &format!("/{name}")));
    let state = state(&snapshots, &[]);
    let lists = state.lists();
    let stores = &lists[Path::new("/disks/a")].stores;
    let of: Vec<_> = stores.iter().map(AttachedStore::is_of).collect();
    let [a, b] = ["/a", "/a@b"].map(|path| Some(Path::new(path)));
    assert_eq!(of, [None, a, b, None]);
}

#[test]
fn records_are_read_back_and_damage_is_noticed() {
    let list = Attached {
        stores: vec![store("a", Mark::Merging)],
    };
    let bytes = seal::encode("attached", &list);
    assert_eq!(seal::decode::<Attached>("attached", &bytes).unwrap(), list);
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1;
        assert!(
            seal::decode::<Attached>("attached", &damaged).is_err(),
            "byte {at}"
        );
    }
    for end in 0..bytes.len() {
        assert!(
            seal::decode::<Attached>("attached", &bytes[..end]).is_err(),
            "{end} bytes"
        );
    }
    let other = seal::decode::<State>("state", &bytes);
    assert!(matches!(other, Err(SealError::Foreign("state"))));
    let later = String::from_utf8(bytes).unwrap().replacen(" 1 ", " 2 ", 1);
    let later = seal::decode::<Attached>("attached", later.as_bytes());
    assert!(matches!(later, Err(SealError::Version(2))));
}

#[test]
fn paths_of_any_bytes_come_back() {
    use std::os::unix::ffi::OsStringExt;
    for bytes in [
        &b"/plain/path"[..],
        b"/a%b",
        b"/\xff\xfe/x\n",
        "/größe".as_bytes(),
    ] {
        let path = PathBuf::from(std::ffi::OsString::from_vec(bytes.to_vec()));
        let text = seal::path::to_text(&path);
        assert_eq!(seal::path::from_text(&text), Some(path), "{text}");
    }
    assert_eq!(seal::path::from_text("/a%f"), None);
}

/// As programs wrote them before times were written down.
#[test]
fn older_records_are_read() {
    let store = r#""cow": "/cows/a", "bytes": 4096"#;
    let list = format!(r#"{{"stores": [{{"snapshot": "a", {store}, "mark": "merging"}}]}}"#);
    let state = format!(
        r#"{{"volumes": [{{"name": "vm", "disk": "/disks/vm", "snapshots": [
            {{"name": "a", "kind": "overflow", "limit": null, {store}, "merging": true}}]}}]}}"#
    );
    let sealed = |what: &str, body: &str| {
        let sum = crc32fast::hash(body.as_bytes());
        format!("nbdsnap {what} 1 crc32 {sum:08x}\n{body}").into_bytes()
    };
    let list: Attached = seal::decode("attached", &sealed("attached", &list)).unwrap();
    let [store] = &list.stores[..] else {
        panic!("{list:?}");
    };
    assert_eq!((store.bytes, store.taken_at), (Some(4096), None));
    assert_eq!((store.mark, store.delete_cow), (Mark::Merging, false));
    let state: State = seal::decode("state", &sealed("state", &state)).unwrap();
    let snapshot = &state.volumes[0].snapshots[0];
    assert_eq!((snapshot.kind, snapshot.taken_at), (Kind::Overflow, None));
    assert!(snapshot.merging && !snapshot.delete_cow);
    assert_eq!(state.lists()[Path::new("/disks/vm")], list);
}
