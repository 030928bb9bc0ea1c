//! What volumes and snapshots may be called, on the command line and in orders
//! alike: an export is `VOLUME`, `VOLUME@SNAPSHOT`, or `VOLUME@SNAPSHOT@NEXT` for a
//! snapshot of a snapshot, and so on.
//!
//! Within a volume a snapshot is called by all that stands behind the first `@`, its
//! *path*: it says what the snapshot was taken of.

/// So many bytes may a name have.
const LONGEST_NAME: usize = 255;

/// So many may a path have: `VOLUME@PATH` then always fits into NBD's 4096.
const LONGEST_PATH: usize = 4096 - LONGEST_NAME - 1;

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

/// Why `path` cannot be that of a snapshot: the name in it that cannot be one, and
/// what is wrong with it. `None`: it can.
pub fn path_fault(path: &str) -> Option<(&str, &'static str)> {
    let mut names = path.split('@');
    let bad = names.find_map(|name| fault(name).map(|why| (name, why)));
    let long = || {
        let why = "is longer than 3840 bytes, with all that it was taken of";
        (path.len() > LONGEST_PATH).then_some((path, why))
    };
    bad.or_else(long)
}

/// The export of a volume's snapshot.
pub fn export(volume: &str, snapshot: &str) -> String {
    format!("{volume}@{snapshot}")
}

/// The export of what a volume's snapshot was taken of.
pub fn origin_export(volume: &str, snapshot: &str) -> String {
    origin(snapshot).map_or_else(|| volume.to_owned(), |of| export(volume, of))
}

/// The path of the snapshot that one was taken of; `None`: it is one of the disk.
pub fn origin(path: &str) -> Option<&str> {
    path.rsplit_once('@').map(|(of, _)| of)
}

/// A snapshot's own name.
pub fn last(path: &str) -> &str {
    path.rsplit_once('@').map_or(path, |(_, name)| name)
}

/// The path of the snapshot `name` of another, or of the disk.
pub fn path(of: Option<&str>, name: &str) -> String {
    of.map_or_else(|| name.to_owned(), |of| export(of, name))
}

/// How many snapshots lie between one and the disk.
pub fn depth(path: &str) -> usize {
    path.matches('@').count()
}

/// Whether a snapshot was taken of another, or of one that was, and so on.
pub fn depends(path: &str, on: &str) -> bool {
    let rest = path.strip_prefix(on);
    rest.is_some_and(|rest| rest.starts_with('@'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_says_what_a_snapshot_was_taken_of() {
        assert_eq!(origin("a"), None);
        assert_eq!(origin("a@b@c"), Some("a@b"));
        assert_eq!((last("a"), last("a@b@c")), ("a", "c"));
        assert_eq!(path(None, "a"), "a");
        assert_eq!(path(Some("a@b"), "c"), "a@b@c");
        assert_eq!(origin_export("disk", "a"), "disk");
        assert_eq!(origin_export("disk", "a@b"), "disk@a");
        assert_eq!((depth("a"), depth("a@b@c")), (0, 2));
        assert!(depends("a@b@c", "a") && depends("a@b@c", "a@b"));
        assert!(!depends("a", "a") && !depends("ab@c", "a") && !depends("a", "a@b"));
    }

    #[test]
    fn every_name_of_a_path_is_judged() {
        assert_eq!(path_fault("a@b@c"), None);
        assert_eq!(path_fault("a@@c"), Some(("", "is empty")));
        assert_eq!(path_fault(""), Some(("", "is empty")));
        assert_eq!(path_fault("a@b/c"), Some(("b/c", "contains a '/'")));
        let long = "n@".repeat(2000);
        let long = long.trim_end_matches('@');
        assert!(path_fault(long).is_some());
        assert_eq!(path_fault(&long[..LONGEST_PATH - 1]), None);
    }
}
