//! Files of the tests: images, hashes, and fingerprints that tell whether
//! anything in a folder has changed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::random::Random;

/// A folder of the test's own, gone when it is dropped. Its path is short
/// enough for a Unix socket.
pub fn folder() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("nbdsnap-test-")
        .tempdir_in("/tmp")
        .expect("a temporary folder")
}

/// A file of `len` random bytes.
pub fn random_file(path: &Path, len: usize, random: &mut Random) -> Vec<u8> {
    let bytes = random.bytes(len);
    std::fs::write(path, &bytes).expect("a test file can be written");
    bytes
}

/// A file of `len` bytes that is one hole.
pub fn sparse_file(path: &Path, len: u64) {
    File::create(path)
        .and_then(|file| file.set_len(len))
        .expect("a test file can be made");
}

/// The SHA-256 of a file, in hexadecimal.
pub fn sha256(path: &Path) -> String {
    let mut file = File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut hash = Sha256::new();
    let mut piece = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut piece).expect("a test file can be read");
        if n == 0 {
            break;
        }
        hash.update(&piece[..n]);
    }
    hash.finalize()
        .iter()
        .fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

/// Insist that two files hold the same bytes; names the first that differs.
pub fn assert_same(a: &Path, b: &Path) {
    let (x, y) = (
        std::fs::read(a).expect("readable"),
        std::fs::read(b).expect("readable"),
    );
    assert_eq!(
        x.len(),
        y.len(),
        "{} and {} differ in length",
        a.display(),
        b.display()
    );
    if x != y {
        let at = x.iter().zip(&y).position(|(p, q)| p != q).unwrap_or(0);
        panic!(
            "{} and {} differ from byte {at} on",
            a.display(),
            b.display()
        );
    }
}

/// Name, size and hash of every file under a folder. Sockets count by their name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fingerprint(BTreeMap<PathBuf, String>);

impl Fingerprint {
    /// The fingerprint of `folder` now.
    pub fn of(folder: &Path) -> Self {
        let mut files = BTreeMap::new();
        let mut left = vec![folder.to_owned()];
        while let Some(path) = left.pop() {
            for entry in std::fs::read_dir(&path).expect("a test folder can be listed") {
                let path = entry.expect("a test folder can be listed").path();
                let meta = path
                    .symlink_metadata()
                    .expect("a test file can be looked at");
                let what = if meta.is_dir() {
                    left.push(path.clone());
                    "folder".to_owned()
                } else if meta.is_file() {
                    format!("{} bytes, sha256 {}", meta.len(), sha256(&path))
                } else if meta.file_type().is_socket() {
                    "socket".to_owned()
                } else {
                    "something else".to_owned()
                };
                files.insert(path, what);
            }
        }
        Self(files)
    }

    /// Insist that nothing has changed since `self` was taken of `folder`.
    pub fn assert_unchanged(&self, folder: &Path, what: &str) {
        let now = Self::of(folder);
        assert!(
            self == &now,
            "{what}: the files changed\nbefore: {:#?}\nafter: {:#?}",
            self.0,
            now.0
        );
    }
}
