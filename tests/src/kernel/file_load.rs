//! A random load of files, and what it has promised about them.
//!
//! Each promise goes to a [`Ledger`] on a device of its own, past all caches,
//! before the load goes on: whatever cuts the machine off, the ledger says what
//! must be found. A [`Load`] writes, rewrites and removes files and says so;
//! [`check`] compares a folder with a ledger.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::play::content;
use crate::harness::files::{folder, random_file};
use crate::harness::process::{client, run};
use crate::harness::random::Random;

/// Bytes of a word in the ledger: what a disk writes as a whole.
pub const WORD: usize = 512;
/// `O_DIRECT` on x86-64.
const O_DIRECT: i32 = 0o40_000;
const PAGE: usize = 4096;
/// Bytes in a file at most.
const LONGEST: u64 = 160 << 10;
/// Bytes in the kept files, more or less.
const ENOUGH: u64 = 5 << 20;
/// Kept files before any is changed or removed.
const FEWEST: usize = 3;

/// A disk with an ext4 on it whose free blocks hold random bytes, so that no
/// chunk can be mistaken for another one or for nothing. The kernel is left some
/// of the making, to do it in the background.
pub fn ext4(bytes: usize, block: u64, random: &mut Random) -> Vec<u8> {
    let folder = folder();
    let path = folder.path().join("disk");
    random_file(&path, bytes, random);
    let mut mkfs = client("mkfs.ext4");
    mkfs.args(["-q", "-F", "-J", "size=4", "-b"])
        .arg(block.to_string())
        .args(["-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1"])
        .arg(&path);
    let _ = run(&mut mkfs).ok();
    std::fs::read(&path).expect("a test file can be read")
}

/// What is known of a file from here on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// It is durable, with this content.
    Kept {
        /// Its number.
        file: u64,
        /// Bytes in it.
        len: u64,
        /// What they are made from.
        fill: u64,
    },
    /// It is about to be changed or removed: nothing, until the next word.
    Loose {
        /// Its number.
        file: u64,
    },
    /// It is durably gone.
    Gone {
        /// Its number.
        file: u64,
    },
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kept { file, len, fill } => write!(f, "kept {file} {len} {fill}"),
            Self::Loose { file } => write!(f, "loose {file}"),
            Self::Gone { file } => write!(f, "gone {file}"),
        }
    }
}

impl Word {
    /// Reads one back; `None` where none was written.
    fn parse(bytes: &[u8]) -> io::Result<Option<Self>> {
        let text = std::str::from_utf8(bytes).map_err(|_| broken("no text"))?;
        let text = text.trim_end_matches('\0');
        if text.is_empty() {
            return Ok(None);
        }
        let number = |text: &str| text.parse().map_err(|_| broken(text));
        let words: Vec<&str> = text.split(' ').collect();
        Ok(Some(match words[..] {
            ["kept", file, len, fill] => Self::Kept {
                file: number(file)?,
                len: number(len)?,
                fill: number(fill)?,
            },
            ["loose", file] => Self::Loose {
                file: number(file)?,
            },
            ["gone", file] => Self::Gone {
                file: number(file)?,
            },
            _ => return Err(broken(text)),
        }))
    }
}

/// The words that were said, on a device.
#[derive(Debug)]
pub struct Ledger {
    file: File,
    next: u64,
    words: Vec<Word>,
}

impl Ledger {
    /// Reads it, to be continued.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut device = File::open(path)?;
        let mut words = Vec::new();
        let mut sector = [0; WORD];
        while device.read_exact(&mut sector).is_ok() {
            match Word::parse(&sector)? {
                Some(word) => words.push(word),
                None => break,
            }
        }
        let mut options = File::options();
        options.write(true).custom_flags(O_DIRECT);
        Ok(Self {
            file: options.open(path)?,
            next: words.len() as u64,
            words,
        })
    }

    /// Says a word; the disk has it when this returns.
    fn say(&mut self, word: Word) -> io::Result<()> {
        let mut buffer = vec![0; WORD + PAGE];
        let skip = buffer.as_ptr().align_offset(PAGE);
        let sector = &mut buffer[skip..skip + WORD];
        write!(&mut sector[..], "{word}")?;
        self.file.write_all_at(sector, self.next * WORD as u64)?;
        self.next += 1;
        self.words.push(word);
        Ok(())
    }

    /// The last word about each file.
    fn last_words(&self) -> BTreeMap<u64, Word> {
        let file = |word: &Word| match word {
            Word::Kept { file, .. } | Word::Loose { file } | Word::Gone { file } => *file,
        };
        self.words.iter().map(|word| (file(word), *word)).collect()
    }
}

/// Compare a folder with what was promised: how many files are as they must be,
/// and their bytes.
pub fn check(folder: &Path, ledger: &Ledger) -> io::Result<(usize, u64)> {
    let (mut files, mut bytes) = (0, 0);
    for word in ledger.last_words().values() {
        match *word {
            Word::Kept { file, len, fill } => {
                let path = path_of(folder, file);
                let found = std::fs::read(&path).map_err(|e| at(&path, &e))?;
                if found != content(fill, len) {
                    let found = found.len();
                    let why = format!("{}: {found} bytes, not as in `{word}`", path.display());
                    return Err(io::Error::other(why));
                }
                files += 1;
                bytes += len;
            }
            Word::Gone { file } => {
                let path = path_of(folder, file);
                if path.try_exists()? {
                    let why = format!("{} was removed, and is there", path.display());
                    return Err(io::Error::other(why));
                }
            }
            Word::Loose { .. } => {}
        }
    }
    Ok((files, bytes))
}

/// A load that goes on where the ledger ends.
#[derive(Debug)]
pub struct Load {
    folder: PathBuf,
    ledger: Ledger,
    random: Random,
    kept: BTreeMap<u64, u64>,
    next_file: u64,
}

impl Load {
    /// Begins: files of which nothing is promised are removed.
    pub fn begin(folder: &Path, ledger: Ledger, seed: u64) -> io::Result<Self> {
        std::fs::create_dir_all(folder).map_err(|e| at(folder, &e))?;
        let mut kept = BTreeMap::new();
        let mut next_file = 0;
        for (file, word) in ledger.last_words() {
            next_file = file + 1;
            if let Word::Kept { len, .. } = word {
                kept.insert(file, len);
            }
        }
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if !kept.keys().any(|file| path_of(folder, *file) == path) {
                std::fs::remove_file(&path).map_err(|e| at(&path, &e))?;
            }
        }
        File::open(folder)?.sync_all()?;
        Ok(Self {
            folder: folder.to_owned(),
            ledger,
            random: Random::new(seed),
            kept,
            next_file,
        })
    }

    /// One file made, rewritten or removed.
    pub fn step(&mut self) -> io::Result<()> {
        let full = self.kept.values().sum::<u64>() > ENOUGH;
        match self.random.below(8) {
            _ if !self.is_under_way() => self.write_new(true),
            0..4 if !full => self.write_new(true),
            4 if !full => self.write_new(false),
            5 | 6 => self.rewrite(),
            _ => self.remove(),
        }
    }

    /// Whether there is something to lose: from here on there always is.
    pub fn is_under_way(&self) -> bool {
        self.kept.len() >= FEWEST
    }

    /// A new file; durable, or left to the page cache without a promise.
    fn write_new(&mut self, durable: bool) -> io::Result<()> {
        let file = self.next_file;
        self.next_file += 1;
        let word = self.write(file)?;
        if durable {
            self.keep(word)?;
        }
        Ok(())
    }

    fn rewrite(&mut self) -> io::Result<()> {
        let file = self.any_kept();
        self.loosen(file)?;
        let word = self.write(file)?;
        self.keep(word)
    }

    fn remove(&mut self) -> io::Result<()> {
        let file = self.any_kept();
        self.loosen(file)?;
        let path = path_of(&self.folder, file);
        std::fs::remove_file(&path).map_err(|e| at(&path, &e))?;
        self.sync_folder()?;
        self.ledger.say(Word::Gone { file })
    }

    fn any_kept(&mut self) -> u64 {
        let nth = self.random.below(self.kept.len() as u64);
        let file = self.kept.keys().nth(nth as usize);
        *file.expect("nothing is changed before files are kept")
    }

    fn loosen(&mut self, file: u64) -> io::Result<()> {
        self.kept.remove(&file);
        self.ledger.say(Word::Loose { file })
    }

    /// All of a file, in pieces; the promise that could be made of it.
    fn write(&mut self, file: u64) -> io::Result<Word> {
        let len = if self.random.one_in(4) {
            self.random.below(6000)
        } else {
            self.random.below(LONGEST)
        };
        let fill = self.random.bits();
        let path = path_of(&self.folder, file);
        let fault = |e: io::Error| at(&path, &e);
        let mut open = File::create(&path).map_err(fault)?;
        for piece in content(fill, len).chunks(24 << 10) {
            open.write_all(piece).map_err(fault)?;
        }
        Ok(Word::Kept { file, len, fill })
    }

    /// Make a file durable, with its name, and promise it.
    fn keep(&mut self, word: Word) -> io::Result<()> {
        let Word::Kept { file, len, .. } = word else {
            unreachable!("only content is kept");
        };
        let path = path_of(&self.folder, file);
        let fault = |e: io::Error| at(&path, &e);
        let open = File::open(&path).map_err(fault)?;
        open.sync_all().map_err(fault)?;
        self.sync_folder()?;
        self.ledger.say(word)?;
        self.kept.insert(file, len);
        Ok(())
    }

    fn sync_folder(&self) -> io::Result<()> {
        let sync = File::open(&self.folder).and_then(|folder| folder.sync_all());
        sync.map_err(|e| at(&self.folder, &e))
    }
}

fn path_of(folder: &Path, file: u64) -> PathBuf {
    folder.join(format!("f{file}"))
}

fn at(path: &Path, error: &io::Error) -> io::Error {
    io::Error::other(format!("{}: {error}", path.display()))
}

fn broken(what: &str) -> io::Error {
    io::Error::other(format!("no word of a ledger: {what}"))
}
