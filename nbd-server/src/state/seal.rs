//! The form of a record: a line that says what it is, with a checksum, and JSON
//! that a person can read.
//!
//! ```text
//! nbdsnap attached 1 crc32 4f1d2a77
//! {
//!   "stores": [ ... ]
//! }
//! ```
//!
//! The checksum (CRC-32, as in zlib) covers everything behind the first line.
//! A rename is atomic, so a record that does not check was damaged by something
//! else, and nobody guesses at what it said.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The program that reads it must know this version of a record's fields.
const VERSION: u32 = 1;

/// Why a record cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// The first line is not that of such a record.
    #[error("it does not begin as a record of nbdsnap's ('nbdsnap {0} ...')")]
    Foreign(&'static str),
    /// Made by a later program.
    #[error("it has version {0}, and this program knows {VERSION}: use a newer nbdsnap")]
    Version(u32),
    /// The checksum is another one.
    #[error("its checksum is wrong: it was damaged or edited")]
    Checksum,
    /// The fields are not what they should be.
    #[error("it cannot be understood: {0}")]
    Fields(String),
}

/// Write a record of the kind `what`, a single word.
pub fn encode<T: Serialize>(what: &'static str, record: &T) -> Vec<u8> {
    let mut body = serde_json::to_vec_pretty(record).expect("records are plain values");
    body.push(b'\n');
    let sum = crc32fast::hash(&body);
    let mut bytes = format!("nbdsnap {what} {VERSION} crc32 {sum:08x}\n").into_bytes();
    bytes.extend(body);
    bytes
}

/// Read a record of the kind `what`.
pub fn decode<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, SealError> {
    let end = bytes
        .iter()
        .position(|&byte| byte == b'\n')
        .ok_or(SealError::Foreign(what))?;
    let (line, body) = (&bytes[..end], &bytes[end + 1..]);
    let line = std::str::from_utf8(line).map_err(|_| SealError::Foreign(what))?;
    let words: Vec<&str> = line.split(' ').collect();
    let ["nbdsnap", kind, version, "crc32", sum] = words[..] else {
        return Err(SealError::Foreign(what));
    };
    if kind != what {
        return Err(SealError::Foreign(what));
    }
    let version: u32 = version.parse().map_err(|_| SealError::Foreign(what))?;
    if version != VERSION {
        return Err(SealError::Version(version));
    }
    let sum = u32::from_str_radix(sum, 16).map_err(|_| SealError::Foreign(what))?;
    if sum != crc32fast::hash(body) {
        return Err(SealError::Checksum);
    }
    serde_json::from_slice(body).map_err(|error| SealError::Fields(error.to_string()))
}

/// Paths in records: text where they are UTF-8, which they nearly always are;
/// else `%` and two hexadecimal digits for each byte that is not, and for `%`.
pub mod path {
    use std::ffi::OsString;
    use std::fmt::Write as _;
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    use std::path::{Path, PathBuf};

    use serde::{Deserialize, Deserializer, Serializer};

    /// For `#[serde(with = ...)]`.
    pub fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&to_text(path))
    }

    /// For `#[serde(with = ...)]`.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
        let text = String::deserialize(deserializer)?;
        from_text(&text).ok_or_else(|| serde::de::Error::custom("a path with a broken %XX"))
    }

    /// A path as text that [`from_text`] reads back.
    pub fn to_text(path: &Path) -> String {
        let mut text = String::new();
        for chunk in path.as_os_str().as_bytes().utf8_chunks() {
            for character in chunk.valid().chars() {
                if character == '%' || character.is_control() {
                    let mut bytes = [0; 4];
                    escape(character.encode_utf8(&mut bytes).as_bytes(), &mut text);
                } else {
                    text.push(character);
                }
            }
            escape(chunk.invalid(), &mut text);
        }
        text
    }

    fn escape(bytes: &[u8], text: &mut String) {
        for byte in bytes {
            let _ = write!(text, "%{byte:02x}");
        }
    }

    /// The path that a text stands for.
    pub fn from_text(text: &str) -> Option<PathBuf> {
        let mut bytes = Vec::with_capacity(text.len());
        let mut rest = text.as_bytes();
        while let Some((&first, behind)) = rest.split_first() {
            if first == b'%' {
                let digits = behind.get(..2)?;
                let digits = std::str::from_utf8(digits).ok()?;
                bytes.push(u8::from_str_radix(digits, 16).ok()?);
                rest = &behind[2..];
            } else {
                bytes.push(first);
                rest = behind;
            }
        }
        Some(OsString::from_vec(bytes).into())
    }
}
