//! The exports that a handshake may choose from. A [`Catalog`] is checked when
//! it is made and never changes: a server whose exports come and go hands each
//! new connection the catalog of the moment.

use super::wire::{
    DEFAULT_MAX_PAYLOAD, NBD_FLAG_CAN_MULTI_CONN, NBD_FLAG_HAS_FLAGS, NBD_FLAG_READ_ONLY,
    NBD_FLAG_ROTATIONAL, NBD_FLAG_SEND_CACHE, NBD_FLAG_SEND_FAST_ZERO, NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA, NBD_FLAG_SEND_TRIM, NBD_FLAG_SEND_WRITE_ZEROES, NBD_MAX_STRING,
};

/// What a client learns of an export before it sends the first request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// `VOLUME` or `VOLUME@SNAPSHOT`.
    pub name: String,
    /// For people: origin or snapshot, and when it was taken. May be empty.
    pub description: String,
    /// Bytes.
    pub size: u64,
    /// `NBD_FLAG_*`, without [`NBD_FLAG_SEND_DF`](super::wire::NBD_FLAG_SEND_DF),
    /// which depends on the client. See [`transmission_flags`].
    pub flags: u16,
    /// The sizes that requests should have.
    pub block_size: BlockSize,
}

/// The size constraints of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSize {
    /// The smallest request and alignment: a power of two up to 65536.
    pub minimum: u32,
    /// The smallest efficient request: a power of two, 512 or more.
    pub preferred: u32,
    /// The longest read or write.
    pub maximum: u32,
}

impl BlockSize {
    /// The sizes for an export whose cheapest unit is a chunk of `chunk_bytes`:
    /// any request works down to a byte, and a chunk is what to aim for.
    pub fn for_chunk(chunk_bytes: u64) -> Self {
        let preferred = chunk_bytes
            .next_power_of_two()
            .clamp(4096, u64::from(DEFAULT_MAX_PAYLOAD));
        Self {
            minimum: 1,
            preferred: preferred as u32,
            maximum: DEFAULT_MAX_PAYLOAD,
        }
    }
}

/// The transmission flags of an export of this server: everything it can do,
/// less what a read-only export has no use for. MULTI_CONN always, since all
/// connections share one state.
pub const fn transmission_flags(read_only: bool, rotational: bool) -> u16 {
    let mut flags = NBD_FLAG_HAS_FLAGS
        | NBD_FLAG_SEND_FLUSH
        | NBD_FLAG_SEND_FUA
        | NBD_FLAG_SEND_CACHE
        | NBD_FLAG_CAN_MULTI_CONN;
    if read_only {
        flags |= NBD_FLAG_READ_ONLY;
    } else {
        flags |= NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO;
    }
    if rotational {
        flags |= NBD_FLAG_ROTATIONAL;
    }
    flags
}

/// The exports, in the order in which they are listed.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    exports: Vec<Export>,
    default: Option<usize>,
}

/// Why these exports make no [`Catalog`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CatalogError {
    /// The empty name means the default export, and cannot belong to any.
    #[error("an export needs a name; give one with NAME=")]
    EmptyName,
    /// NBD strings hold at most 4096 bytes.
    #[error("the name or the description of export {0:?} is longer than {NBD_MAX_STRING} bytes")]
    TooLong(String),
    /// NBD strings hold no NUL.
    #[error("the name or the description of export {0:?} contains a NUL character")]
    Nul(String),
    /// Two exports of one name.
    #[error("two exports are named {0:?}; give one of them another name with NAME=")]
    Duplicate(String),
}

impl Catalog {
    /// A catalog of `exports`, of which `default` (an index) answers to the empty name.
    ///
    /// # Panics
    /// If `default` is no index into `exports`, or an export's flags or block
    /// sizes contradict the specification: those come from the program, not from outside.
    pub fn new(exports: Vec<Export>, default: Option<usize>) -> Result<Self, CatalogError> {
        assert!(default.is_none_or(|index| index < exports.len()));
        let mut names = std::collections::BTreeSet::new();
        for export in &exports {
            check_export(export)?;
            if !names.insert(export.name.as_str()) {
                return Err(CatalogError::Duplicate(export.name.clone()));
            }
        }
        Ok(Self { exports, default })
    }

    /// All of them; an index into this slice names an export in a handshake's result.
    pub fn exports(&self) -> &[Export] {
        &self.exports
    }

    /// The index of the export that `name` means; the empty name means the default export.
    pub fn find(&self, name: &str) -> Option<usize> {
        if name.is_empty() {
            return self.default;
        }
        self.exports.iter().position(|export| export.name == name)
    }
}

fn check_export(export: &Export) -> Result<(), CatalogError> {
    if export.name.is_empty() {
        return Err(CatalogError::EmptyName);
    }
    for text in [&export.name, &export.description] {
        if text.len() > NBD_MAX_STRING {
            return Err(CatalogError::TooLong(export.name.clone()));
        }
        if text.contains('\0') {
            return Err(CatalogError::Nul(export.name.clone()));
        }
    }
    let has = |flag| export.flags & flag != 0;
    assert!(has(NBD_FLAG_HAS_FLAGS));
    assert!(!has(super::wire::NBD_FLAG_SEND_DF));
    assert!(!has(NBD_FLAG_SEND_FAST_ZERO) || has(NBD_FLAG_SEND_WRITE_ZEROES));
    let sizes = export.block_size;
    assert!(sizes.minimum.is_power_of_two() && sizes.minimum <= 65536);
    assert!(sizes.preferred.is_power_of_two() && sizes.preferred >= sizes.minimum.max(512));
    assert!(sizes.maximum >= sizes.preferred);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn export(name: &str) -> Export {
        Export {
            name: name.into(),
            description: String::new(),
            size: 1 << 20,
            flags: transmission_flags(false, false),
            block_size: BlockSize::for_chunk(16384),
        }
    }

    #[test]
    fn preferred_block_size_follows_the_chunk_within_bounds() {
        for (chunk, preferred) in [
            (512, 4096),
            (4096, 4096),
            (65536, 65536),
            (32 << 20, 32 << 20),
            (1 << 30, 32 << 20),
        ] {
            let sizes = BlockSize::for_chunk(chunk);
            assert_eq!(
                (sizes.minimum, sizes.preferred, sizes.maximum),
                (1, preferred, 32 << 20)
            );
        }
    }

    #[test]
    fn names_are_checked_and_found() {
        let catalog = Catalog::new(vec![export("disk"), export("disk@mon")], Some(0)).unwrap();
        assert_eq!(catalog.find(""), Some(0));
        assert_eq!(catalog.find("disk@mon"), Some(1));
        assert_eq!(catalog.find("Disk"), None);
        assert_eq!(
            Catalog::new(vec![export("a")], None).unwrap().find(""),
            None
        );
        let refused = |exports| Catalog::new(exports, None).unwrap_err();
        assert_eq!(refused(vec![export("")]), CatalogError::EmptyName);
        assert_eq!(
            refused(vec![export("a"), export("a")]),
            CatalogError::Duplicate("a".into())
        );
        assert_eq!(
            refused(vec![export("a\0")]),
            CatalogError::Nul("a\0".into())
        );
        let long = "x".repeat(4097);
        assert_eq!(refused(vec![export(&long)]), CatalogError::TooLong(long));
        assert!(Catalog::new(vec![export(&"x".repeat(4096))], None).is_ok());
    }
}
