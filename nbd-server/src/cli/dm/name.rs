//! Names as the device-mapper keeps them: dmsetup writes letters that udev does not
//! like as `\xNN`, and reads them back. Here a name is what it reads; what the kernel
//! would keep decides the order of lists, and stands in messages.

use super::session::add;

/// Bytes that a name can have, the zero at its end included.
const NAME_MAX: usize = 128;
/// The same for a uuid.
const UUID_MAX: usize = 129;

/// What a text is to name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A device.
    Name,
    /// A device, from now on.
    NewName,
    /// Its uuid.
    Uuid,
}

impl Kind {
    fn word(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::NewName => "new name",
            Self::Uuid => "UUID",
        }
    }

    fn device_word(self) -> &'static str {
        match self {
            Self::Name => "device name",
            Self::NewName => "new device name",
            Self::Uuid => "device uuid",
        }
    }

    fn most(self) -> usize {
        match self {
            Self::Name | Self::NewName => NAME_MAX,
            Self::Uuid => UUID_MAX,
        }
    }
}

/// The letters that stay as they are.
fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"#+-.:=@_".contains(&byte)
}

/// The byte that `\xNN` at the beginning of `bytes` stands for.
fn written_out(bytes: &[u8]) -> Option<u8> {
    let digits = bytes.strip_prefix(b"\\x")?.get(..2)?;
    u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

/// As the kernel keeps it.
pub(super) fn mangled(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut kept = String::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        if written_out(&bytes[at..]).is_some() {
            kept.push_str(&text[at..at + 4]);
            at += 4;
            continue;
        }
        match bytes[at] {
            byte if is_plain(byte) => kept.push(char::from(byte)),
            byte => add(&mut kept, format_args!("\\x{byte:02x}")),
        }
        at += 1;
    }
    kept
}

/// As people write it.
pub(super) fn unmangled(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let written = written_out(&bytes[at..]);
        plain.push(written.unwrap_or(bytes[at]));
        at += if written.is_some() { 4 } else { 1 };
    }
    String::from_utf8(plain).unwrap_or_else(|_| text.to_owned())
}

/// Why `text` cannot be such a name: dmsetup's lines.
pub(super) fn fault(text: &str, kind: Kind) -> Option<Vec<String>> {
    match kind {
        Kind::Name if text.len() >= NAME_MAX => {
            return Some(vec![format!("Name \"{text}\" too long.")]);
        }
        Kind::NewName if text.contains('/') => {
            let line = format!("Name \"{text}\" invalid. It contains \"/\".");
            return Some(vec![line]);
        }
        Kind::NewName if text.len() >= NAME_MAX => {
            return Some(vec![format!("Name \"{text}\" too long")]);
        }
        Kind::NewName if text.is_empty() => {
            return Some(vec!["Non empty new name is required.".into()]);
        }
        _ => {}
    }
    let (word, device_word) = (kind.word(), kind.device_word());
    let failed = format!("Failed to mangle {device_word} \"{text}\".");
    let bytes = text.as_bytes();
    let written = (0..bytes.len()).any(|at| written_out(&bytes[at..]).is_some());
    let odd = bytes.iter().any(|byte| !is_plain(*byte) && *byte != b'\\');
    if written && odd {
        let line = format!(
            "The {word} \"{text}\" contains mixed mangled and unmangled characters or it's already mangled improperly."
        );
        return Some(vec![line, failed]);
    }
    if mangled(text).len() >= kind.most() {
        let line = format!("Mangled form of the {word} too long for \"{text}\".");
        return Some(vec![line, failed]);
    }
    None
}
