//! COW stores written byte by byte, to be as wrong as a test wants them. The
//! layout is put down here once more on purpose: the program's own decoder is
//! what is under test.

/// A persistent store with any header and any exceptions.
#[derive(Clone, Debug)]
pub struct StoreBytes {
    /// `0x70416e53` in a good one.
    pub magic: u32,
    /// Not 0 in a good one.
    pub valid: u32,
    /// 1 in a good one.
    pub version: u32,
    /// In sectors.
    pub chunk_sectors: u32,
    /// Old and new chunk of each exception; all must fit into the first area.
    pub exceptions: Vec<(u64, u64)>,
    /// Chunks of the file.
    pub chunks: usize,
}

impl Default for StoreBytes {
    /// An empty store of 64 chunks of 4 KiB.
    fn default() -> Self {
        Self {
            magic: 0x7041_6e53,
            valid: 1,
            version: 1,
            chunk_sectors: 8,
            exceptions: Vec::new(),
            chunks: 64,
        }
    }
}

impl StoreBytes {
    /// The file. Its geometry is that of 4 KiB chunks, whatever the header claims.
    pub fn encode(&self) -> Vec<u8> {
        const CHUNK: usize = 4096;
        let mut bytes = vec![0; self.chunks * CHUNK];
        let header = [self.magic, self.valid, self.version, self.chunk_sectors];
        for (n, field) in header.iter().enumerate() {
            bytes[n * 4..n * 4 + 4].copy_from_slice(&field.to_le_bytes());
        }
        for (n, (old, new)) in self.exceptions.iter().enumerate() {
            let at = CHUNK + n * 16;
            bytes[at..at + 8].copy_from_slice(&old.to_le_bytes());
            bytes[at + 8..at + 16].copy_from_slice(&new.to_le_bytes());
        }
        bytes
    }
}
