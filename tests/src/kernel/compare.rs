//! How the suites compare what two sides show: as values, so that each suite can
//! also try whether its comparisons notice a difference.

use std::fmt::Debug;

/// What is not as it should be, in words.
pub type Compared = Result<(), String>;

/// Both hold the same bytes.
pub fn same_bytes(found: &[u8], expected: &[u8], what: &str) -> Compared {
    if found.len() != expected.len() {
        let (found, expected) = (found.len(), expected.len());
        return Err(format!("{what}: {found} bytes instead of {expected}"));
    }
    match found.iter().zip(expected).position(|(f, e)| f != e) {
        None => Ok(()),
        Some(at) => Err(format!("{what}: differs from byte {at} on")),
    }
}

/// Both are the same.
pub fn same<T: PartialEq + Debug + ?Sized>(found: &T, expected: &T, what: &str) -> Compared {
    if found == expected {
        return Ok(());
    }
    Err(format!("{what}: {found:?} instead of {expected:?}"))
}

/// Insist that nothing was found to be wrong.
pub fn expect_same(compared: Compared) {
    if let Err(why) = compared {
        panic!("{why}");
    }
}

/// Insist that a difference was noticed, and that it is this one.
pub fn expect_difference(compared: Compared, wanted: &str) {
    match compared {
        Ok(()) => panic!("the comparison does not notice: {wanted}"),
        Err(why) => assert!(why.contains(wanted), "{why}, and not {wanted}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_found() {
        expect_same(same_bytes(b"abc", b"abc", "x"));
        expect_difference(same_bytes(b"abd", b"abc", "x"), "x: differs from byte 2 on");
        expect_difference(same_bytes(b"ab", b"abc", "x"), "2 bytes instead of 3");
        expect_difference(same(&1, &2, "x"), "x: 1 instead of 2");
    }
}
