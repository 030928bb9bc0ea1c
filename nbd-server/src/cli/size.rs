//! Sizes as an operator writes them: `4K`, `16KiB`, `1G`, `64s` (sectors), or
//! plain bytes. The one parser and the one printer for the whole command line.

use nbdsnap_format::SECTOR_BYTES;

/// The units, smallest first; each may be followed by `iB`.
const UNITS: [char; 6] = ['K', 'M', 'G', 'T', 'P', 'E'];

/// Why a text is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// Nothing, or no digit where a number has to begin.
    #[error("'{0}' is no size: write 4096, 4K, 16KiB, 1G or 64s (sectors of 512 bytes)")]
    NoNumber(String),
    /// Digits after a point.
    #[error("'{0}' is a fraction: write it in a smaller unit")]
    Fraction(String),
    /// An unknown unit behind the number.
    #[error(
        "'{text}': unknown unit '{unit}': use K, M, G, T, P, E (or KiB and so on), or s for sectors"
    )]
    Unit {
        /// The whole text.
        text: String,
        /// What follows the number.
        unit: String,
    },
    /// More than 2^64 - 1 bytes.
    #[error("'{0}' is more than 2^64 bytes")]
    TooLarge(String),
}

/// Read a size; the answer is in bytes.
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(SizeError::NoNumber(text.to_owned()));
    }
    if unit.starts_with(['.', ',']) {
        return Err(SizeError::Fraction(text.to_owned()));
    }
    let factor = factor(unit).ok_or_else(|| SizeError::Unit {
        text: text.to_owned(),
        unit: unit.to_owned(),
    })?;
    number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(factor))
        .ok_or_else(|| SizeError::TooLarge(text.to_owned()))
}

fn factor(unit: &str) -> Option<u64> {
    match unit {
        "" => return Some(1),
        "s" => return Some(SECTOR_BYTES),
        _ => {}
    }
    let mut letters = unit.chars();
    let letter = letters.next()?.to_ascii_uppercase();
    let power = UNITS.iter().position(|known| *known == letter)? + 1;
    let rest = letters.as_str();
    (rest.is_empty() || rest.eq_ignore_ascii_case("ib")).then(|| 1 << (10 * power))
}

/// Print a number of bytes exactly, in the largest unit that divides it.
pub fn show(bytes: u64) -> String {
    let fits = |power: usize| bytes != 0 && bytes.is_multiple_of(1 << (10 * power));
    match (1..=UNITS.len()).rev().find(|power| fits(*power)) {
        Some(power) => format!("{} {}iB", bytes >> (10 * power), UNITS[power - 1]),
        None => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_way_of_writing_a_size() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("64s", 32768),
            ("4K", 4096),
            ("4k", 4096),
            ("16KiB", 16384),
            ("16kib", 16384),
            ("3M", 3 << 20),
            ("1G", 1 << 30),
            ("2T", 2 << 40),
            ("5PiB", 5 << 50),
            ("15E", 15 << 60),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn refuses_junk() {
        for text in ["", " ", "K", "-1", "+1", "x4K", " 4K"] {
            assert_eq!(
                parse(text),
                Err(SizeError::NoNumber(text.to_owned())),
                "{text}"
            );
        }
        for text in ["1.5G", "0.5K", "1,5G"] {
            assert_eq!(
                parse(text),
                Err(SizeError::Fraction(text.to_owned())),
                "{text}"
            );
        }
        for (text, unit) in [
            ("4KB", "KB"),
            ("4Q", "Q"),
            ("4 K", " K"),
            ("4K ", "K "),
            ("4KiBs", "KiBs"),
            ("4S", "S"),
            ("1e3", "e3"),
            ("0x10", "x10"),
            ("4é", "é"),
        ] {
            let error = SizeError::Unit {
                text: text.to_owned(),
                unit: unit.to_owned(),
            };
            assert_eq!(parse(text), Err(error), "{text}");
        }
    }

    #[test]
    fn refuses_what_does_not_fit() {
        for text in [
            "16E",
            "18446744073709551616",
            "99999999999999999999999",
            "36028797018963968s",
        ] {
            assert_eq!(
                parse(text),
                Err(SizeError::TooLarge(text.to_owned())),
                "{text}"
            );
        }
        assert_eq!(parse("36028797018963967s"), Ok(u64::MAX - 511));
    }

    #[test]
    fn what_is_shown_can_be_read_back() {
        for bytes in [
            0,
            1,
            511,
            512,
            1024,
            1536,
            16384,
            5 << 20,
            (1 << 30) + 512,
            3 << 60,
        ] {
            let shown = show(bytes);
            let compact = shown.replace(" bytes", "").replace(' ', "");
            assert_eq!(parse(&compact), Ok(bytes), "{shown}");
        }
        assert_eq!(show(16384), "16 KiB");
        assert_eq!(show(1000), "1000 bytes");
    }
}
