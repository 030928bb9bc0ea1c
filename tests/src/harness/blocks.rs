//! Disks whose blocks say which write was the last one: each write fills whole
//! blocks with its number, so that what a view shows at any time can be told from
//! the numbers alone. A block that nobody wrote shows 0.
//!
//! A writer that writes one block after the other knows what the disk showed
//! between any two of its writes: [`Journal`].

/// Bytes of a block.
pub const BLOCK: usize = 4096;

/// The content of a block with this number.
pub fn block_of(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(BLOCK / 8)
}

/// The number of each block of `bytes`. A block that shows two numbers is an error:
/// a block is written whole, or not at all.
pub fn numbers_of(bytes: &[u8]) -> Result<Vec<u64>, String> {
    let blocks = bytes.chunks(BLOCK).enumerate();
    let number = |(index, block): (usize, &[u8])| {
        let mut words = block
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")));
        let first = words.next().unwrap_or(0);
        match words.find(|word| *word != first) {
            None => Ok(first),
            Some(other) => Err(format!("block {index} shows {first} and {other}")),
        }
    };
    blocks.map(number).collect()
}

/// The writes of one writer, in order: number n is at place n - 1.
#[derive(Clone, Debug, Default)]
pub struct Journal {
    blocks: Vec<usize>,
}

impl Journal {
    /// Note that `block` is written; the number of that write.
    pub fn write(&mut self, block: usize) -> u64 {
        self.blocks.push(block);
        self.blocks.len() as u64
    }

    /// Writes so far.
    pub fn len(&self) -> u64 {
        self.blocks.len() as u64
    }

    /// Whether nothing was written yet.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// What a disk of so many blocks showed after `writes` of them.
    pub fn shown_after(&self, writes: u64, blocks: usize) -> Vec<u64> {
        let mut shown = vec![0; blocks];
        for (place, &block) in self.blocks.iter().take(writes as usize).enumerate() {
            shown[block] = place as u64 + 1;
        }
        shown
    }

    /// The instant at which the disk showed `shown`, as a number of writes; an error
    /// if it never did. (It is the last write that can be seen: its block was not
    /// written again before the instant.)
    pub fn instant_of(&self, shown: &[u64]) -> Result<u64, String> {
        let instant = shown.iter().copied().max().unwrap_or(0);
        let then = self.shown_after(instant, shown.len());
        match (0..shown.len()).find(|&block| shown[block] != then[block]) {
            None => Ok(instant),
            Some(block) => Err(format!(
                "block {block} shows write {}, where after write {instant} it was {}",
                shown[block], then[block]
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instant_is_told_from_the_numbers() {
        let mut journal = Journal::default();
        for block in [0, 1, 0, 2] {
            journal.write(block);
        }
        assert_eq!(journal.shown_after(3, 3), [3, 2, 0]);
        assert_eq!(journal.instant_of(&[3, 2, 0]), Ok(3));
        assert_eq!(journal.instant_of(&[0, 0, 0]), Ok(0));
        // One write is missing, or one is too new.
        assert!(journal.instant_of(&[3, 0, 0]).is_err());
        assert!(journal.instant_of(&[1, 2, 4]).is_err());
    }

    #[test]
    fn a_block_shows_one_number() {
        let mut bytes = [block_of(7), block_of(0)].concat();
        assert_eq!(numbers_of(&bytes), Ok(vec![7, 0]));
        bytes[BLOCK - 8] = 8;
        assert!(numbers_of(&bytes).is_err());
    }
}
