//! What lies on a file or device that is no store: is it empty, and if not, what
//! is it? It is told to the operator before anything is overwritten; nothing
//! else depends on it.

use crate::server::setup::OpenDisk;

use std::io;
use std::os::unix::fs::FileExt;

/// A path that is to be created may hold only zeros in this much of its
/// beginning and of its end (durability.md, rule 15): ext4 begins with 1 KiB of
/// zeros, btrfs with 64 KiB.
const EDGE: u64 = 128 << 10;

/// What lies at the beginning of a disk.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Contents {
    /// Zeros at both ends, or no bytes at all.
    Empty,
    /// Begins with a store's magic number.
    Store,
    /// Something else, in words.
    Other(String),
}

/// Look at both ends of a disk.
pub(crate) fn contents(disk: &OpenDisk) -> io::Result<Contents> {
    let head = read(disk, 0, disk.bytes.min(EDGE))?;
    if head.starts_with(&nbdsnap_format::header::MAGIC.to_le_bytes()) {
        return Ok(Contents::Store);
    }
    let tail_at = disk.bytes.saturating_sub(EDGE).max(head.len() as u64);
    let tail = read(disk, tail_at, disk.bytes - tail_at)?;
    Ok(name(&head, &tail, tail_at))
}

fn read(disk: &OpenDisk, offset: u64, len: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len as usize];
    disk.file.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

/// Signatures at fixed places: where, which bytes, whose. The more certain ones
/// come first: a partition table's mark is also on a FAT.
const KNOWN: &[(usize, &[u8], &str)] = &[
    (0, b"XFSB", "an XFS file system"),
    (0x1_0040, b"_BHRfS_M", "a btrfs file system"),
    (0, b"LUKS\xba\xbe", "a LUKS volume"),
    (0, b"QFI\xfb", "a qcow2 image"),
    (0, b"KDMV", "a VMDK image"),
    (0, b"conectix", "a VHD image"),
    (0, b"vhdxfile", "a VHDX image"),
    (0x40, b"\x7f\x10\xda\xbe", "a VDI image"),
    (0x1000, b"\xfc\x4e\x2b\xa9", "a member of an md RAID"),
    (0x400, b"\x10\x20\xf5\xf2", "an F2FS file system"),
    (0, b"hsqs", "a squashfs file system"),
    (0xff6, b"SWAPSPACE2", "swap space"),
    (0x8001, b"CD001", "an ISO 9660 file system"),
    (3, b"NTFS    ", "an NTFS file system"),
    (3, b"EXFAT   ", "an exFAT file system"),
    (54, b"FAT1", "a FAT file system"),
    (82, b"FAT32", "a FAT file system"),
    (512, b"EFI PART", "a GPT partition table"),
    (4096, b"EFI PART", "a GPT partition table"),
    (0, b"\x1f\x8b", "a gzip file"),
    (0, b"\xfd7zXZ\0", "an xz file"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file"),
    (0, b"BZh", "a bzip2 file"),
    (0, b"PK\x03\x04", "a zip file"),
    (0, b"\x7fELF", "a program or library"),
    (0, b"SQLite format 3\0", "an SQLite database"),
    (257, b"ustar", "a tar archive"),
    (510, b"\x55\xaa", "a boot sector or MBR partition table"),
];

fn name(head: &[u8], tail: &[u8], tail_at: u64) -> Contents {
    let has = |at: usize, bytes: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(bytes));
    if let Some(ext) = ext_file_system(head) {
        return Contents::Other(ext.to_owned());
    }
    for sector in 0..4 {
        let at = sector * 512;
        if has(at, b"LABELONE") && has(at + 24, b"LVM2 001") {
            return Contents::Other("an LVM2 physical volume".to_owned());
        }
    }
    if let Some((.., what)) = KNOWN.iter().find(|(at, bytes, _)| has(*at, bytes)) {
        return Contents::Other((*what).to_owned());
    }
    if let Some(first) = head.iter().position(|byte| *byte != 0) {
        return Contents::Other(first_bytes(head, first, first as u64));
    }
    if let Some(first) = tail.iter().position(|byte| *byte != 0) {
        // The spare copy of a GPT lies in the last sector.
        let sector = tail.len().saturating_sub(512);
        if tail[sector..].starts_with(b"EFI PART") {
            return Contents::Other("the spare copy of a GPT partition table".to_owned());
        }
        return Contents::Other(first_bytes(tail, first, tail_at + first as u64));
    }
    Contents::Empty
}

/// ext2, 3 and 4 share a magic number and differ in their features.
fn ext_file_system(head: &[u8]) -> Option<&'static str> {
    const HAS_JOURNAL: u32 = 0x4;
    const EXT3_INCOMPAT: u32 = 0x2 | 0x4 | 0x10;
    let superblock = head.get(0x400..0x800)?;
    if superblock[0x38..0x3a] != [0x53, 0xef] {
        return None;
    }
    let features =
        |at: usize| u32::from_le_bytes(superblock[at..at + 4].try_into().expect("four bytes"));
    Some(if features(0x60) & !EXT3_INCOMPAT != 0 {
        "an ext4 file system"
    } else if features(0x5c) & HAS_JOURNAL != 0 {
        "an ext3 file system"
    } else {
        "an ext2 file system"
    })
}

fn first_bytes(bytes: &[u8], first: usize, offset: u64) -> String {
    let some = &bytes[first..bytes.len().min(first + 16)];
    if some.len() >= 4
        && some
            .iter()
            .all(|byte| (b' '..=b'~').contains(byte) || *byte == b'\n')
    {
        let text = String::from_utf8_lossy(some);
        return format!("at byte {offset} the text {text:?}");
    }
    let hex: Vec<String> = some.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("at byte {offset} the bytes {}", hex.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(head: &[(usize, &[u8])]) -> Contents {
        let mut bytes = vec![0; EDGE as usize];
        for (at, what) in head {
            bytes[*at..*at + what.len()].copy_from_slice(what);
        }
        name(&bytes, &[], EDGE)
    }

    fn other(what: &str) -> Contents {
        Contents::Other(what.to_owned())
    }

    #[test]
    fn names_what_is_well_known() {
        assert_eq!(of(&[]), Contents::Empty);
        for (at, bytes, what) in KNOWN {
            assert_eq!(of(&[(*at, bytes)]), other(what));
        }
        assert_eq!(of(&[(0x438, &[0x53, 0xef])]), other("an ext2 file system"));
        let ext3: [(usize, &[u8]); 3] = [(0x438, &[0x53, 0xef]), (0x45c, &[4]), (0x460, &[2])];
        assert_eq!(of(&ext3), other("an ext3 file system"));
        assert_eq!(
            of(&[(0x438, &[0x53, 0xef]), (0x460, &[0x42])]),
            other("an ext4 file system")
        );
        assert_eq!(
            of(&[(512, b"LABELONE"), (536, b"LVM2 001")]),
            other("an LVM2 physical volume")
        );
        // A protective MBR before a GPT does not hide it.
        assert_eq!(
            of(&[(510, &[0x55, 0xaa]), (512, b"EFI PART")]),
            other("a GPT partition table")
        );
    }

    #[test]
    fn shows_the_bytes_of_what_is_not() {
        assert_eq!(
            of(&[(0, b"hello")]),
            other("at byte 0 the bytes 68 65 6c 6c 6f 00 00 00 00 00 00 00 00 00 00 00")
        );
        assert_eq!(
            of(&[(2, b"0123456789abcdefgh")]),
            other("at byte 2 the text \"0123456789abcdef\"")
        );
        assert_eq!(
            name(b"hi!\n", &[], 4),
            other("at byte 0 the text \"hi!\\n\"")
        );
        assert_eq!(
            name(&[0; 8], &[0, 0, 7], 8),
            other("at byte 10 the bytes 07")
        );
        let mut gpt = vec![0; 1024];
        gpt[512..520].copy_from_slice(b"EFI PART");
        assert_eq!(
            name(&[0; 8], &gpt, 8),
            other("the spare copy of a GPT partition table")
        );
    }
}
