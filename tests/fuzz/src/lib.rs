//! Arbitrary bytes as a COW store, for the fuzz targets in `bin/`: one for each tool.
//! Whatever the bytes are, a tool ends with an answer or a refusal, in bounded time
//! and memory.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A store to be looked at.
pub struct Case {
    /// The store.
    pub cow: PathBuf,
    /// A disk beside it, in half of all cases.
    pub origin: Option<PathBuf>,
}

/// The folder of this process. The script has it in memory, and deletes it.
fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = std::env::temp_dir().join(std::process::id().to_string());
        std::fs::create_dir_all(&folder).expect("a folder");
        folder
    })
}

/// A path for what a tool makes, where nothing is.
pub fn output() -> PathBuf {
    let path = folder().join("new");
    let _ = std::fs::remove_file(&path);
    path
}

/// Make a store of the fuzzer's bytes. The first two decide about its surroundings:
/// whether it gets a good header (of which chunk size), whether there is a disk and how
/// long that is, and whether a hole follows the bytes, so that more numbers are good.
pub fn case(data: &[u8]) -> Option<Case> {
    let [flags, length, bytes @ ..] = data else {
        return None;
    };
    let cow = folder().join("cow");
    let file = File::create(&cow).expect("a file");
    file.write_all_at(bytes, 0).expect("written");
    if flags & 1 != 0 {
        let sectors = 1_u32 << (flags >> 1 & 3);
        for (n, word) in [0x7041_6e53, 1, 1, sectors].into_iter().enumerate() {
            file.write_all_at(&u32::to_le_bytes(word), n as u64 * 4)
                .expect("written");
        }
    }
    if flags & 8 != 0 {
        file.set_len(bytes.len() as u64 + (256 << 10))
            .expect("longer");
    }
    let origin = (flags & 16 != 0).then(|| {
        let origin = folder().join("origin");
        let file = File::create(&origin).expect("a file");
        file.set_len(u64::from(*length) << (flags >> 5) << 9)
            .expect("its length");
        origin
    });
    Some(Case { cow, origin })
}
