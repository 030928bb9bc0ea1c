//! The texts of the device-mapper: tables as they are written, and as they are printed.
//!
//! - [`params`]: the arguments of one target, in the order of the kernel's checks and
//!   with the kernel's words for what is wrong with them.
//! - [`text`]: whole tables, as far as they can be judged without their devices.
//!
//! Read from Linux 6.1: drivers/md/dm-table.c, dm-linear.c, dm-stripe.c, dm-snap.c,
//! dm-exception-store.c.

pub mod params;
pub mod text;

/// A reason as people are told it: where an error of the system is named, as the C
/// library says it, without Rust's `(os error N)`.
pub fn plain(reason: &str) -> String {
    const MARK: &str = " (os error ";
    let mut said = String::with_capacity(reason.len());
    let mut rest = reason;
    while let Some((before, behind)) = rest.split_once(MARK) {
        said.push_str(before);
        let is_number = |digits: &str| {
            let digits = digits.strip_prefix('-').unwrap_or(digits);
            !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit())
        };
        match behind.split_once(')') {
            Some((digits, behind)) if is_number(digits) => rest = behind,
            _ => {
                said.push_str(MARK);
                rest = behind;
            }
        }
    }
    said.push_str(rest);
    said
}

#[cfg(test)]
mod tests {
    use super::plain;

    #[test]
    fn reasons_are_said_as_the_c_library_says_them() {
        for (reason, said) in [
            ("it has gone", "it has gone"),
            (
                "/a: No such file or directory (os error 2)",
                "/a: No such file or directory",
            ),
            (
                "(Permission denied (os error 13)); Input/output error (os error 5): twice",
                "(Permission denied); Input/output error: twice",
            ),
            (
                "/a (os error x)/b (os error 2",
                "/a (os error x)/b (os error 2",
            ),
        ] {
            assert_eq!(plain(reason), said);
        }
    }
}
