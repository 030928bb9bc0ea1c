//! Many small devices on one disk of the virtual machine: a slice each, with a
//! name that the machine's script gives it through device-mapper's linear target.

use std::fmt::Write as _;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const SECTOR: u64 = 512;
/// Slices begin at multiples of this.
const ALIGNMENT: u64 = 1 << 20;

/// A part of the disk.
#[derive(Clone, Debug)]
struct Slice {
    name: String,
    start: u64,
    bytes: u64,
}

/// A disk, cut into slices.
#[derive(Debug)]
pub struct Slices {
    path: PathBuf,
    file: File,
    all: Vec<Slice>,
}

impl Slices {
    /// An empty disk, in a new file.
    pub fn create(path: &Path) -> Self {
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Self {
            path: path.to_owned(),
            file,
            all: Vec::new(),
        }
    }

    /// The disk's file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// One more slice, of zeros.
    pub fn add(&mut self, name: &str, bytes: u64) {
        assert!(bytes.is_multiple_of(SECTOR), "{name}: {bytes} bytes");
        let end = self.all.last().map_or(0, |last| last.start + last.bytes);
        let start = end.next_multiple_of(ALIGNMENT);
        self.all.push(Slice {
            name: name.to_owned(),
            start,
            bytes,
        });
        self.file
            .set_len((start + bytes).next_multiple_of(ALIGNMENT))
            .expect("a test file can grow");
    }

    /// One more slice, with this content.
    pub fn add_filled(&mut self, name: &str, content: &[u8]) {
        self.add(name, content.len() as u64);
        self.write(name, content);
    }

    /// Replace the head of a slice.
    pub fn write(&self, name: &str, content: &[u8]) {
        let slice = self.slice(name);
        assert!(content.len() as u64 <= slice.bytes, "{name} is too small");
        self.file
            .write_all_at(content, slice.start)
            .expect("a test file can be written");
    }

    /// All of a slice.
    pub fn read(&self, name: &str) -> Vec<u8> {
        let slice = self.slice(name);
        let mut content = vec![0; slice.bytes as usize];
        self.file
            .read_exact_at(&mut content, slice.start)
            .expect("a test file can be read");
        content
    }

    /// The slice that a byte of the disk lies in, and where in it.
    pub fn find(&self, offset: u64) -> (&str, u64) {
        let mut all = self.all.iter();
        let slice = all
            .find(|slice| (slice.start..slice.start + slice.bytes).contains(&offset))
            .unwrap_or_else(|| panic!("byte {offset} lies in no slice"));
        (&slice.name, offset - slice.start)
    }

    /// Shell lines that give each slice its device, on the machine's `disk`.
    pub fn script(&self, disk: &str) -> String {
        self.all.iter().fold(String::new(), |mut text, slice| {
            let (start, len) = (slice.start / SECTOR, slice.bytes / SECTOR);
            let _ = writeln!(text, "slice {} {disk} {start} {len}", slice.name);
            text
        })
    }

    fn slice(&self, name: &str) -> &Slice {
        let mut all = self.all.iter();
        all.find(|slice| slice.name == name)
            .unwrap_or_else(|| panic!("no slice {name}"))
    }
}
