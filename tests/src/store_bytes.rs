//! A second, independent look at persistent stores, byte by byte: the simulator
//! writes the stores that a run begins with and counts the exceptions of those
//! that a crash left behind, without asking the code that it tests.

/// Bytes in a sector.
const SECTOR: usize = 512;

/// Exceptions in an area whose chunks are `chunk_sectors` long.
pub fn area_entries(chunk_sectors: u64) -> u64 {
    chunk_sectors * SECTOR as u64 / 16
}

/// Chunks that a persistent store with `exceptions` exceptions takes up.
pub fn chunks_for(exceptions: u64, chunk_sectors: u64) -> u64 {
    2 + exceptions + exceptions / area_entries(chunk_sectors)
}

/// The chunk that holds the data of exception `n`, counted from 0.
pub fn data_chunk(n: u64, chunk_sectors: u64) -> u64 {
    2 + n + n / area_entries(chunk_sectors)
}

/// Exceptions that fit into a persistent store of `sectors`.
pub fn capacity(sectors: u64, chunk_sectors: u64) -> u64 {
    let chunks = sectors / chunk_sectors;
    (0..=chunks)
        .rev()
        .find(|&n| chunks_for(n, chunk_sectors) <= chunks)
        .unwrap_or(0)
}

/// Write a store into `disk`: a header, and an exception for each of `old_chunks`
/// whose data `data` puts into the chunk it is given.
pub fn write(
    disk: &mut [u8],
    chunk_sectors: u64,
    old_chunks: &[u64],
    mut data: impl FnMut(u64, &mut [u8]),
) {
    let chunk = chunk_sectors as usize * SECTOR;
    disk[..chunk].fill(0);
    for (i, word) in [0x7041_6e53, 1, 1, chunk_sectors as u32]
        .into_iter()
        .enumerate()
    {
        disk[i * 4..i * 4 + 4].copy_from_slice(&word.to_le_bytes());
    }
    let entries = area_entries(chunk_sectors);
    for area in 0..=old_chunks.len() as u64 / entries {
        let at = (1 + area * (entries + 1)) as usize * chunk;
        disk[at..at + chunk].fill(0);
    }
    for (n, &old) in old_chunks.iter().enumerate() {
        let n = n as u64;
        let at = entry_at(n, chunk_sectors);
        let new = data_chunk(n, chunk_sectors);
        disk[at..at + 8].copy_from_slice(&old.to_le_bytes());
        disk[at + 8..at + 16].copy_from_slice(&new.to_le_bytes());
        data(
            old,
            &mut disk[new as usize * chunk..(new as usize + 1) * chunk],
        );
    }
}

/// The origin chunks that a store holds exceptions for, in order; `None` where
/// the header is not one of a valid store.
pub fn exceptions(disk: &[u8], chunk_sectors: u64) -> Option<Vec<u64>> {
    let pairs = mappings(disk, chunk_sectors)?;
    Some(pairs.into_iter().map(|(old, _)| old).collect())
}

/// The same, each origin chunk with the chunk of the store that holds its data.
pub fn mappings(disk: &[u8], chunk_sectors: u64) -> Option<Vec<(u64, u64)>> {
    let word = |i: usize| u32::from_le_bytes([disk[i], disk[i + 1], disk[i + 2], disk[i + 3]]);
    if disk.len() < SECTOR
        || word(0) != 0x7041_6e53
        || word(4) == 0
        || u64::from(word(12)) != chunk_sectors
    {
        return None;
    }
    let long = |i: usize| {
        disk.get(i..i + 8)
            .map(|b| u64::from_le_bytes(b.try_into().unwrap_or_default()))
    };
    let mut found = Vec::new();
    loop {
        let at = entry_at(found.len() as u64, chunk_sectors);
        match (long(at), long(at + 8)) {
            (Some(old), Some(new)) if new != 0 => found.push((old, new)),
            _ => return Some(found),
        }
    }
}

/// Whether the byte at `offset` belongs to an area.
pub fn is_in_area(offset: u64, chunk_sectors: u64) -> bool {
    let chunk = offset / (chunk_sectors * SECTOR as u64);
    chunk % (area_entries(chunk_sectors) + 1) == 1
}

/// Where entry `n`, counted over all areas, lies.
fn entry_at(n: u64, chunk_sectors: u64) -> usize {
    let entries = area_entries(chunk_sectors);
    let area = 1 + n / entries * (entries + 1);
    (area * chunk_sectors) as usize * SECTOR + (n % entries) as usize * 16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_found_across_areas() {
        let old: Vec<u64> = (0..70).rev().collect();
        let mut disk = vec![0xaa; 512 * 2 * 80];
        write(&mut disk, 2, &old, |old, chunk| chunk.fill(old as u8));
        let new = (0..70).map(|n| data_chunk(n, 2));
        let pairs: Vec<_> = old.iter().copied().zip(new).collect();
        assert_eq!(mappings(&disk, 2), Some(pairs));
        assert_eq!(exceptions(&disk, 2), Some(old));
        assert_eq!(disk[data_chunk(69, 2) as usize * 1024], 0);
        assert_eq!(data_chunk(64, 2), 2 + 64 + 1);
    }

    #[test]
    fn capacity_leaves_room_for_the_next_area() {
        assert_eq!(capacity(3, 1), 1);
        assert_eq!(capacity(2 + 31, 1), 31);
        assert_eq!(capacity(2 + 32, 1), 31);
        assert_eq!(capacity(2 + 33, 1), 32);
    }
}
