//! What the two halves promise, on real files: a refusal or a failure leaves
//! every file as it was, and what is made is of the size that was asked for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use nbdsnap_engine::StoreKind;
use nbdsnap_format::{ChunkSize, Header};

use super::*;

const CHUNK: u64 = 4096;
const MIB: u64 = 1 << 20;

/// A folder with an origin of 1 MiB in it.
struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let bench = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        bench.put("disk", &vec![0xdd; MIB as usize]);
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn put(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path(name), bytes).unwrap();
    }

    fn len(&self, name: &str) -> u64 {
        self.path(name).metadata().unwrap().len()
    }

    /// Every file's name and bytes.
    fn state(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        files(self.folder.path())
    }

    fn snapshot(&self, cow: &str) -> SnapshotRequest {
        SnapshotRequest {
            name: cow.to_owned(),
            cow: self.path(cow),
            kind: StoreKind::Persistent,
            chunk: Some(CHUNK),
            size: None,
            read_only: false,
            format: false,
            adopt: false,
            must_exist: false,
            known: Known::default(),
            behaviour: None,
        }
    }

    fn volume(&self, snapshots: Vec<SnapshotRequest>) -> VolumeRequest {
        VolumeRequest {
            name: "disk".to_owned(),
            path: self.path("disk"),
            access: VolumeAccess::ReadWrite,
            snapshots,
        }
    }

    fn open(&self, snapshots: Vec<SnapshotRequest>) -> Result<Opened, Refusal> {
        inspect(vec![self.volume(snapshots)], &mut Taken::default())?.carry_out(&mut Unrecorded)
    }

    /// Refused, with every file as it was; the message.
    fn refused(&self, snapshots: Vec<SnapshotRequest>) -> String {
        self.volumes_refused(vec![self.volume(snapshots)])
    }

    fn volumes_refused(&self, volumes: Vec<VolumeRequest>) -> String {
        let before = self.state();
        let message = inspect(volumes, &mut Taken::default())
            .unwrap_err()
            .to_string();
        assert_eq!(self.state(), before, "{message}");
        assert!(!message.contains('\n'), "{message}");
        message
    }
}

fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.insert(path.clone(), std::fs::read(&path).unwrap());
        }
    }
    found
}

/// A store with these entries in area 0, entry by entry.
fn store(entries: &[(u64, u64)], chunks: u64) -> Vec<u8> {
    let chunk_size = ChunkSize::from_bytes(CHUNK).unwrap();
    let header = Header {
        valid: true,
        chunk_size,
    };
    let mut bytes = vec![0; (chunks * CHUNK) as usize];
    let sector = header.encode();
    bytes[..sector.len()].copy_from_slice(&sector);
    for (number, (old, new)) in entries.iter().enumerate() {
        let at = CHUNK as usize + 16 * number;
        bytes[at..at + 8].copy_from_slice(&old.to_le_bytes());
        bytes[at + 8..at + 16].copy_from_slice(&new.to_le_bytes());
    }
    bytes
}

/// 100 exceptions of which the second sector was lost.
fn torn_store() -> Vec<u8> {
    let entries: Vec<(u64, u64)> = (0..100)
        .map(|n| {
            if (32..64).contains(&n) {
                (0, 0)
            } else {
                (n, n + 2)
            }
        })
        .collect();
    store(&entries, 110)
}

#[test]
fn a_store_is_made_once_and_then_opened() {
    let bench = Bench::new();
    let opened = bench.open(vec![bench.snapshot("new")]).unwrap();
    let made = &opened.volumes[0].snapshots[0];
    assert!(made.fresh && made.store.exception_count() == 0);
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&made.disk.file.metadata().unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    drop(opened);
    let opened = bench.open(vec![bench.snapshot("new")]).unwrap();
    assert!(!opened.volumes[0].snapshots[0].fresh);
}

#[test]
fn a_file_has_what_it_can_need_or_what_size_allows() {
    let bench = Bench::new();
    // 256 chunks, the header, area 0 that they fill, and area 1.
    let need = (256 + 3) * CHUNK;
    let cases = [
        ("all", None, need),
        ("less", Some(40 * CHUNK + 100), 40 * CHUNK),
        ("least", Some(3 * CHUNK), 3 * CHUNK),
        ("more", Some(1 << 40), need),
    ];
    for (name, size, bytes) in cases {
        let wanted = SnapshotRequest {
            size,
            ..bench.snapshot(name)
        };
        let opened = bench.open(vec![wanted]).unwrap();
        assert_eq!(bench.len(name), bytes, "{name}");
        let warned = opened
            .notes
            .iter()
            .any(|note| matches!(note, Note::Warning(text) if text.contains("is cut to")));
        assert_eq!(warned, name == "more", "{:?}", opened.notes);
    }
    let little = SnapshotRequest {
        size: Some(3 * CHUNK - 1),
        ..bench.snapshot("little")
    };
    assert!(
        bench
            .refused(vec![little])
            .contains("has room for 2 chunks")
    );
    let transient = SnapshotRequest {
        kind: StoreKind::Transient,
        ..bench.snapshot("transient")
    };
    let opened = bench.open(vec![transient]).unwrap();
    assert_eq!(bench.len("transient"), MIB);
    let snapshots = opened.volumes.into_iter().flat_map(|one| one.snapshots);
    for scratch in snapshots.filter_map(|one| one.scratch) {
        scratch.discard().unwrap();
    }
    assert_eq!(bench.len("transient"), 0);
}

#[test]
fn large_disks_begin_with_a_small_store() {
    let bench = Bench::new();
    let disk = std::fs::File::create(bench.path("disk")).unwrap();
    disk.set_len(1 << 40).unwrap();
    let opened = bench.open(vec![bench.snapshot("new")]).unwrap();
    assert_eq!(bench.len("new"), 16 * MIB);
    drop(opened);
    let file = std::fs::File::create(bench.path("zeros")).unwrap();
    file.set_len(5 * MIB).unwrap();
    bench.open(vec![bench.snapshot("zeros")]).unwrap();
    assert_eq!(bench.len("zeros"), 5 * MIB);
}

#[test]
fn other_contents_are_refused_until_format_is_said() {
    let bench = Bench::new();
    bench.put("text", b"a letter to a friend");
    bench.put("far", &[vec![0; 300 << 10], vec![1]].concat());
    for name in ["text", "far"] {
        let message = bench.refused(vec![bench.snapshot("new"), bench.snapshot(name)]);
        assert!(
            message.contains(name) && message.contains(",format"),
            "{message}"
        );
        let forced = SnapshotRequest {
            format: true,
            ..bench.snapshot(name)
        };
        let opened = bench.open(vec![forced]).unwrap();
        assert!(opened.volumes[0].snapshots[0].fresh);
        assert!(matches!(&opened.notes[0], Note::Warning(text) if text.contains("overwritten")));
        drop(opened);
        assert!(!bench.open(vec![bench.snapshot(name)]).unwrap().volumes[0].snapshots[0].fresh);
    }
}

#[test]
fn a_store_is_never_formatted_over() {
    let bench = Bench::new();
    bench.put("cow", &store(&[(7, 2)], 4));
    let format = SnapshotRequest {
        format: true,
        chunk: Some(64 << 10),
        ..bench.snapshot("cow")
    };
    let opened = bench.open(vec![format.clone()]).unwrap();
    let snapshot = &opened.volumes[0].snapshots[0];
    assert_eq!(
        (snapshot.fresh, snapshot.store.exception_count()),
        (false, 1)
    );
    assert_eq!(snapshot.store.chunk_size().bytes(), CHUNK);
    assert_eq!(opened.notes.len(), 2, "{:?}", opened.notes);
    drop(opened);
    bench.put("cut", &store(&[(7, 2)], 2));
    let cut = SnapshotRequest {
        cow: bench.path("cut"),
        ..format.clone()
    };
    assert!(bench.refused(vec![cut]).contains("damaged"));
    // A transient one does so when it is told to, and only then.
    let transient = SnapshotRequest {
        kind: StoreKind::Transient,
        ..format
    };
    let unasked = SnapshotRequest {
        format: false,
        ..transient.clone()
    };
    assert!(bench.refused(vec![unasked]).contains("persistent store"));
    assert!(bench.open(vec![transient]).unwrap().volumes[0].snapshots[0].fresh);
}

#[test]
fn one_file_has_one_use() {
    let bench = Bench::new();
    std::fs::hard_link(bench.path("disk"), bench.path("hard")).unwrap();
    std::os::unix::fs::symlink("disk", bench.path("soft")).unwrap();
    for name in ["disk", "hard", "soft"] {
        let message = bench.refused(vec![bench.snapshot("new"), bench.snapshot(name)]);
        assert!(message.contains("the origin of disk"), "{message}");
    }
    let mut again = bench.snapshot("new");
    again.cow = bench
        .path("../")
        .join(bench.folder.path().file_name().unwrap())
        .join("new");
    let message = bench.refused(vec![bench.snapshot("new"), again]);
    assert!(message.contains("the COW store of disk@new"), "{message}");
}

#[test]
fn what_is_open_is_locked() {
    let bench = Bench::new();
    let opened = bench.open(vec![bench.snapshot("new")]).unwrap();
    std::fs::hard_link(bench.path("new"), bench.path("link")).unwrap();
    let mut other = bench.volume(vec![bench.snapshot("link")]);
    assert!(
        bench
            .volumes_refused(vec![other.clone()])
            .contains("disk: is already open")
    );
    bench.put("other", &[1; 512]);
    other.path = bench.path("other");
    assert!(
        bench
            .volumes_refused(vec![other.clone()])
            .contains("link: is already open")
    );
    other.access = VolumeAccess::ReadOnly;
    assert!(
        bench
            .volumes_refused(vec![other])
            .contains("link: is already open")
    );
    drop(opened);
    let mut reader = bench.volume(vec![bench.snapshot("new")]);
    reader.access = VolumeAccess::ReadOnly;
    let first = inspect(vec![reader.clone()], &mut Taken::default()).unwrap();
    let second = inspect(vec![reader], &mut Taken::default()).unwrap();
    assert!(bench.refused(vec![]).contains("is already open"));
    drop((first, second));
    bench.open(vec![]).unwrap();
}

#[test]
fn reading_changes_nothing() {
    let bench = Bench::new();
    bench.put("cow", &store(&[(7, 2)], 4));
    bench.put("torn", &torn_store());
    let mut volume = bench.volume(vec![bench.snapshot("cow"), bench.snapshot("torn")]);
    volume.access = VolumeAccess::ReadOnly;
    let before = bench.state();
    let opened = inspect(vec![volume], &mut Taken::default())
        .unwrap()
        .carry_out(&mut Unrecorded)
        .unwrap();
    let snapshots = &opened.volumes[0].snapshots;
    assert!(
        snapshots
            .iter()
            .all(|snapshot| snapshot.read_only && !snapshot.fresh)
    );
    assert_eq!(snapshots[1].store.exception_count(), 32);
    assert_eq!(bench.state(), before);
    drop(opened);
    for (name, kind) in [
        ("none", StoreKind::Persistent),
        ("none", StoreKind::Transient),
    ] {
        let wanted = SnapshotRequest {
            kind,
            ..bench.snapshot(name)
        };
        let mut volume = bench.volume(vec![wanted]);
        volume.access = VolumeAccess::ReadOnly;
        assert!(bench.volumes_refused(vec![volume]).contains("--read-only"));
    }
}

#[test]
fn a_torn_area_is_repaired_and_a_copy_is_kept() {
    let bench = Bench::new();
    bench.put("torn", &torn_store());
    let torn = bench.volume(vec![bench.snapshot("torn")]);
    let plan = inspect(vec![torn], &mut Taken::default()).unwrap();
    assert_eq!(std::fs::read(bench.path("torn")).unwrap(), torn_store());
    let opened = plan.carry_out(&mut Unrecorded).unwrap();
    assert!(matches!(&opened.notes[0], Note::Warning(text) if text.contains("torn.torn-0")));
    let kept = std::fs::read(bench.path("torn.torn-0")).unwrap();
    assert_eq!(kept, torn_store()[CHUNK as usize..2 * CHUNK as usize]);
    drop(opened);
    assert!(
        bench
            .open(vec![bench.snapshot("torn")])
            .unwrap()
            .notes
            .is_empty()
    );
}

#[test]
fn a_failure_takes_back_what_was_made() {
    let bench = Bench::new();
    bench.put("empty", &[]);
    bench.put("zeros", &vec![0; 5 * CHUNK as usize]);
    std::fs::create_dir(bench.path("folder")).unwrap();
    let names = ["new", "empty", "zeros", "folder/gone"];
    let wanted = names.map(|name| bench.snapshot(name)).to_vec();
    let plan = inspect(vec![bench.volume(wanted)], &mut Taken::default()).unwrap();
    let before = bench.state();
    std::fs::remove_dir(bench.path("folder")).unwrap();
    let message = plan.carry_out(&mut Unrecorded).unwrap_err().to_string();
    assert!(message.contains("folder/gone"), "{message}");
    assert_eq!(bench.state(), before);
}

#[test]
fn a_copy_that_cannot_be_kept_stops_the_repair_and_everything_else() {
    let bench = Bench::new();
    std::fs::create_dir(bench.path("folder")).unwrap();
    bench.put("folder/torn", &torn_store());
    let wanted = vec![bench.snapshot("new"), bench.snapshot("folder/torn")];
    let plan = inspect(vec![bench.volume(wanted)], &mut Taken::default()).unwrap();
    // The store itself stays open; there is no place for its copy any more.
    std::fs::rename(bench.path("folder"), bench.path("moved")).unwrap();
    let before = bench.state();
    let message = plan.carry_out(&mut Unrecorded).unwrap_err().to_string();
    assert!(message.contains("folder/torn.torn-0"), "{message}");
    assert_eq!(bench.state(), before);
}
