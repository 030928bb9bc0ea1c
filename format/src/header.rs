//! The header: what the first sector of a store says. It is decoded once, here,
//! when a store is opened; past [`Header::decode`] no impossible header exists.
//! The engine and the offline tools call it.

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::units::{ChunkSize, ChunkSizeError, SECTOR_BYTES};

/// "SnAp" as a little-endian number: the first four bytes of every store.
pub const MAGIC: u32 = 0x7041_6e53;

/// The only layout version there is.
pub const VERSION: u32 = 1;

/// The bytes that [`Header::decode`] wants and [`Header::encode`] makes.
pub const HEADER_BYTES: usize = SECTOR_BYTES as usize;

/// The header on disk; zeros follow it to the end of chunk 0.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    valid: U32,
    version: U32,
    chunk_sectors: U32,
}

/// A store's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// False once the snapshot is lost: its exceptions are not to be read.
    /// Loaded from any non-zero number, written as 1 or 0.
    pub valid: bool,
    /// The chunk size, which beats any that an operator names.
    pub chunk_size: ChunkSize,
}

/// What lies where a header may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Magic 0: no store. The kernel would format it without asking.
    New,
    /// A store.
    Store(Header),
}

/// Why a sector is no header of a store. Each sentence says what was found,
/// what was expected and what that means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Less than a sector.
    #[error(
        "only {found} bytes where a header of {HEADER_BYTES} bytes is expected: this is no snapshot store, or it was cut off"
    )]
    TooShort {
        /// Bytes there are.
        found: u64,
    },
    /// Neither a store nor zeros.
    #[error(
        "no snapshot store: its magic is {found:#010x}, where a store has {MAGIC:#010x} (\"SnAp\") and an unused one 0: it holds something else"
    )]
    WrongMagic {
        /// The first four bytes, as a little-endian number.
        found: u32,
    },
    /// A store of another layout.
    #[error(
        "a snapshot store of version {found}, where only version {VERSION} is known: it is damaged, or newer than this program"
    )]
    WrongVersion {
        /// The version it claims.
        found: u32,
    },
    /// A chunk size that dm-snapshot cannot have written.
    #[error(
        "a snapshot store with an impossible header: {reason}, and a store has a power of two from 1 to 2097152 sectors: it is damaged"
    )]
    ImpossibleChunkSize {
        /// What is wrong with it.
        reason: ChunkSizeError,
    },
}

impl Header {
    /// What the first sector of a device or file says. Only the first
    /// [`HEADER_BYTES`] bytes are looked at; more may be given.
    ///
    /// The rest of chunk 0 is not checked: the kernel ignores it too.
    pub fn decode(bytes: &[u8]) -> Result<Found, HeaderError> {
        if bytes.len() < HEADER_BYTES {
            return Err(HeaderError::TooShort {
                found: bytes.len() as u64,
            });
        }
        let (raw, _) = RawHeader::read_from_prefix(bytes).expect("a sector holds a header");
        match raw.magic.get() {
            0 => return Ok(Found::New),
            MAGIC => {}
            found => return Err(HeaderError::WrongMagic { found }),
        }
        // The version before the chunk size: it says what the other fields mean.
        if raw.version.get() != VERSION {
            return Err(HeaderError::WrongVersion {
                found: raw.version.get(),
            });
        }
        let chunk_size = ChunkSize::from_sectors(raw.chunk_sectors.get().into())
            .map_err(|reason| HeaderError::ImpossibleChunkSize { reason })?;
        Ok(Found::Store(Self {
            valid: raw.valid.get() != 0,
            chunk_size,
        }))
    }

    /// The first sector of a store with this header. The rest of chunk 0 is
    /// zeros, which a store's maker writes.
    pub fn encode(self) -> [u8; HEADER_BYTES] {
        let mut raw = RawHeader::new_zeroed();
        raw.magic.set(MAGIC);
        raw.valid.set(self.valid.into());
        raw.version.set(VERSION);
        // At most 2^21.
        raw.chunk_sectors.set(self.chunk_size.sectors() as u32);
        let mut sector = [0; HEADER_BYTES];
        raw.write_to_prefix(&mut sector)
            .expect("a sector holds a header");
        sector
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header sector with these four fields.
    fn sector(fields: [u32; 4]) -> Vec<u8> {
        let mut bytes: Vec<u8> = fields.iter().flat_map(|f| f.to_le_bytes()).collect();
        bytes.resize(HEADER_BYTES, 0);
        bytes
    }

    #[test]
    fn a_header_has_the_bytes_that_the_kernel_writes() {
        let header = Header {
            valid: true,
            chunk_size: ChunkSize::DEFAULT,
        };
        let bytes = header.encode();
        assert_eq!(&bytes[..16], b"SnAp\x01\0\0\0\x01\0\0\0\x20\0\0\0");
        assert_eq!(bytes[16..], [0; 496]);
        let lost = Header {
            valid: false,
            ..header
        };
        assert_eq!(&lost.encode()[..8], b"SnAp\0\0\0\0");
    }

    #[test]
    fn every_header_survives_a_round_trip() {
        for shift in 0..=21 {
            for valid in [false, true] {
                let chunk_size = ChunkSize::from_sectors(1 << shift).unwrap();
                let header = Header { valid, chunk_size };
                assert_eq!(Header::decode(&header.encode()), Ok(Found::Store(header)));
            }
        }
    }

    #[test]
    fn any_non_zero_valid_loads_as_valid() {
        for valid in [1, 2, 0x8000_0000, u32::MAX] {
            let Ok(Found::Store(header)) = Header::decode(&sector([MAGIC, valid, 1, 8])) else {
                panic!("valid = {valid} is refused");
            };
            assert!(header.valid);
        }
    }

    #[test]
    fn magic_zero_is_new_whatever_follows() {
        assert_eq!(Header::decode(&[0; 512]), Ok(Found::New));
        assert_eq!(Header::decode(&sector([0, 7, 9, 3])), Ok(Found::New));
    }

    #[test]
    fn impossible_headers_say_what_was_found_and_expected() {
        let message = |fields| Header::decode(&sector(fields)).unwrap_err().to_string();
        assert_eq!(
            message([0x0000_ef53, 1, 1, 8]),
            "no snapshot store: its magic is 0x0000ef53, where a store has 0x70416e53 (\"SnAp\") and an unused one 0: it holds something else"
        );
        assert_eq!(
            message([MAGIC, 1, 2, 8]),
            "a snapshot store of version 2, where only version 1 is known: it is damaged, or newer than this program"
        );
        for sectors in [0, 3, 24, u32::MAX] {
            assert_eq!(
                message([MAGIC, 1, 1, sectors]),
                format!(
                    "a snapshot store with an impossible header: chunk size of {sectors} sectors is not a power of two, and a store has a power of two from 1 to 2097152 sectors: it is damaged"
                )
            );
        }
        assert_eq!(
            Header::decode(&sector([MAGIC, 1, 1, 1 << 22])),
            Err(HeaderError::ImpossibleChunkSize {
                reason: ChunkSizeError::TooLarge(1 << 22)
            })
        );
    }

    #[test]
    fn less_than_a_sector_is_too_short() {
        for len in [0, 15, 16, 511] {
            let bytes = &sector([MAGIC, 1, 1, 8])[..len];
            assert_eq!(
                Header::decode(bytes),
                Err(HeaderError::TooShort { found: len as u64 })
            );
        }
    }
}
