//! The log of a `dm-log-writes` device, read from the file that was its log
//! device: every write, flush and mark, in an order in which they may have
//! reached the disk.
//!
//! The layout, all little-endian, in blocks of the superblock's `sectorsize`:
//! a superblock (`u64 magic, version, nr_entries; u32 sectorsize`), then for each
//! entry a block (`u64 sector, nr_sectors, flags, data_len`; a mark's text follows
//! in the same block) and the data that was written, `nr_sectors` blocks of it
//! (a discard has none). Writes are logged when a flush that was asked for after
//! their end has ended, just before that flush.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;
/// What the kernel marks the end of a log with, when its device is removed.
pub const END: &str = "dm-log-writes-end";

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// All that was written before is durable.
    pub flush: bool,
    /// What it does, after that.
    pub act: Logged,
}

/// What an entry does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Logged {
    /// It was only a flush.
    Nothing,
    /// Bytes were written.
    Write {
        /// First byte.
        offset: u64,
        /// The bytes.
        data: Vec<u8>,
        /// They were durable at once (FUA).
        durable: bool,
    },
    /// A range was given up.
    Discard {
        /// First byte.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// A mark of the test's.
    Mark(String),
}

/// Read a log; what is wrong with it, in words. It must be whole: ended by the
/// kernel when the device was removed.
pub fn read(path: &Path) -> Result<Vec<Entry>, String> {
    let file = File::open(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut head = [0; 28];
    let fault = |e: std::io::Error| e.to_string();
    file.read_exact_at(&mut head, 0).map_err(fault)?;
    let [magic, version, count] = [0, 8, 16].map(|at| word(&head, at));
    let block = u64::from(u32::from_le_bytes([head[24], head[25], head[26], head[27]]));
    if magic != MAGIC || version != VERSION {
        return Err(format!("magic {magic:#x}, version {version}: no log"));
    }
    if !(512..=4096).contains(&block) || !block.is_power_of_two() {
        return Err(format!("blocks of {block} bytes"));
    }
    let mut entries = Vec::with_capacity(count as usize);
    let mut at = block;
    for n in 0..count {
        let (entry, blocks) =
            read_entry(&file, at, block).map_err(|why| format!("entry {n} of {count}: {why}"))?;
        at += (1 + blocks) * block;
        entries.push(entry);
    }
    match entries.last() {
        Some(last) if last.act == Logged::Mark(END.to_owned()) => Ok(entries),
        last => Err(format!("the log does not end with {END:?}, but {last:?}")),
    }
}

/// The entry at `at`, and how many blocks of data follow its own.
fn read_entry(file: &File, at: u64, block: u64) -> Result<(Entry, u64), String> {
    let mut head = vec![0; block as usize];
    file.read_exact_at(&mut head, at)
        .map_err(|e| e.to_string())?;
    let [sector, sectors, flags, text_len] = [0, 8, 16, 24].map(|at| word(&head, at));
    let (offset, len) = match (sector.checked_mul(block), sectors.checked_mul(block)) {
        (Some(offset), Some(len)) if len <= 1 << 32 => (offset, len),
        _ => return Err(format!("{sectors} sectors at {sector}")),
    };
    let flush = flags & FLUSH != 0;
    let (act, blocks) = if flags & MARK != 0 {
        let text = head.get(32..32 + text_len as usize);
        let text = text.ok_or(format!("a mark of {text_len} bytes"))?;
        let text = String::from_utf8(text.to_vec()).map_err(|e| e.to_string())?;
        (Logged::Mark(text), 0)
    } else if flags & DISCARD != 0 {
        (Logged::Discard { offset, len }, 0)
    } else if sectors == 0 {
        (Logged::Nothing, 0)
    } else {
        let mut data = vec![0; len as usize];
        file.read_exact_at(&mut data, at + block)
            .map_err(|e| e.to_string())?;
        let durable = flags & FUA != 0;
        let act = Logged::Write {
            offset,
            data,
            durable,
        };
        (act, sectors)
    };
    Ok((Entry { flush, act }, blocks))
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let eight = bytes[at..at + 8].try_into();
    u64::from_le_bytes(eight.expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(words: [u64; 4], text: &str) -> Vec<u8> {
        let mut block: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        block.extend_from_slice(text.as_bytes());
        block.resize(512, 0);
        block
    }

    fn log(entries: u64, rest: &[Vec<u8>]) -> Result<Vec<Entry>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut bytes = block([MAGIC, 1, entries, 512], "");
        bytes.extend(rest.concat());
        std::fs::write(file.path(), bytes).unwrap();
        read(file.path())
    }

    #[test]
    fn entries_are_read_with_their_data() {
        let end = block([0, 0, MARK, END.len() as u64], END);
        let entries = log(
            5,
            &[
                block([3, 2, 0, 0], ""),
                vec![7; 1024],
                block([0, 0, FLUSH, 0], ""),
                block([9, 4, DISCARD, 0], ""),
                block([8, 1, FLUSH | FUA, 0], ""),
                vec![9; 512],
                end,
            ],
        );
        let entries = entries.unwrap();
        let of = |flush, act| Entry { flush, act };
        let write = |offset, data, durable| Logged::Write {
            offset,
            data,
            durable,
        };
        assert_eq!(
            entries,
            [
                of(false, write(3 * 512, vec![7; 1024], false)),
                of(true, Logged::Nothing),
                of(
                    false,
                    Logged::Discard {
                        offset: 9 * 512,
                        len: 4 * 512
                    }
                ),
                of(true, write(8 * 512, vec![9; 512], true)),
                of(false, Logged::Mark(END.to_owned())),
            ]
        );
    }

    #[test]
    fn a_log_that_is_cut_off_is_refused() {
        let write = [block([3, 2, 0, 0], ""), vec![7; 1024]];
        assert!(log(1, &write).unwrap_err().contains("does not end"));
        assert!(log(2, &write).unwrap_err().starts_with("entry 1 of 2"));
        assert!(log(1, &[block([0, 0, MARK, 481], "")]).is_err());
    }
}
