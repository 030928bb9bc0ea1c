//! What volumes and snapshots may be called, on the command line and in orders
//! alike: an export is `VOLUME` or `VOLUME@SNAPSHOT`.

/// So many bytes may a name have; `VOLUME@NAME` then always fits into NBD's 4096.
const LONGEST_NAME: usize = 255;

/// Why `text` cannot be the name of a volume or a snapshot; `None`: it can.
pub fn fault(text: &str) -> Option<&'static str> {
    if text.is_empty() {
        Some("is empty")
    } else if text.len() > LONGEST_NAME {
        Some("is longer than 255 bytes")
    } else if text.contains('@') {
        Some("contains a '@', which separates volume and snapshot")
    } else if text.contains('/') {
        Some("contains a '/'")
    } else if text.contains('=') {
        Some("contains a '=', which separates name and path")
    } else if text.contains(char::is_control) {
        Some("contains a control character")
    } else {
        None
    }
}

/// The export of a volume's snapshot.
pub fn export(volume: &str, snapshot: &str) -> String {
    format!("{volume}@{snapshot}")
}
