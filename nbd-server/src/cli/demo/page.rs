//! What the demonstration prints: numbered steps, aligned numbers, and claims,
//! each of which is checked before it is printed.

use std::fmt::Display;
use std::io::{self, Write};

use super::super::Failure;

/// Where the columns of a table begin.
const INDENT: &str = "     ";

/// A page that is being written.
pub(super) struct Page<'a> {
    out: &'a mut dyn Write,
    colour: bool,
    steps: u32,
    claims: u32,
}

impl<'a> Page<'a> {
    /// An empty page.
    pub(super) fn new(out: &'a mut dyn Write, colour: bool) -> Self {
        Self {
            out,
            colour,
            steps: 0,
            claims: 0,
        }
    }

    /// Claims that were made, all of which held.
    pub(super) fn claims(&self) -> u32 {
        self.claims
    }

    /// A line as it is.
    pub(super) fn line(&mut self, text: impl Display) -> Result<(), Failure> {
        writeln!(self.out, "{text}")
            .and_then(|()| self.out.flush())
            .map_err(|error: io::Error| {
                Failure::Refused(format!("demo: writing to standard output: {error}"))
            })
    }

    /// A line in bold.
    pub(super) fn headline(&mut self, text: &str) -> Result<(), Failure> {
        let text = self.styled("1", text);
        self.line(text)
    }

    /// The next step.
    pub(super) fn step(&mut self, title: &str) -> Result<(), Failure> {
        self.steps += 1;
        let title = format!("{:>2}. {title}", self.steps);
        self.line("")?;
        self.headline(&title)
    }

    /// A remark within a step.
    pub(super) fn text(&mut self, text: impl Display) -> Result<(), Failure> {
        self.line(format!("{INDENT}{text}"))
    }

    /// A command, as it could be typed.
    pub(super) fn command(&mut self, text: &str) -> Result<(), Failure> {
        let text = self.styled("36", &format!("$ {text}"));
        self.text(text)
    }

    /// The titles of the columns of [`Page::row`].
    pub(super) fn columns(&mut self) -> Result<(), Failure> {
        let titles = format!("{:<14}{:>10}{:>18}", "", "crc32", "sum of accounts");
        let titles = self.styled("2", &titles);
        self.text(titles)
    }

    /// What a disk holds.
    pub(super) fn row(&mut self, name: &str, image: &[u8]) -> Result<(), Failure> {
        let cents = super::accounts::total(image);
        let sum = format!("{}.{:02}", grouped(cents / 100), cents % 100);
        let crc = crc32fast::hash(image);
        self.text(format!("{name:<14}  {crc:08x}{sum:>18}"))
    }

    /// Claim that `found` is `expected`: print it if it is so, else fail.
    pub(super) fn claim<T: PartialEq + Display + ?Sized>(
        &mut self,
        what: &str,
        found: &T,
        expected: &T,
    ) -> Result<(), Failure> {
        if found != expected {
            return Err(Failure::Refused(format!(
                "demo: this does not hold: {what}: found {found}, expected {expected}"
            )));
        }
        self.claims += 1;
        let ok = self.styled("32", "ok");
        self.line(format!("  {ok} {what}"))
    }

    /// Claim that a disk holds `expected`.
    pub(super) fn claim_same(
        &mut self,
        what: &str,
        found: &[u8],
        expected: &[u8],
    ) -> Result<(), Failure> {
        let place = found.iter().zip(expected).position(|(a, b)| a != b);
        let verdict = match place {
            _ if found.len() != expected.len() => format!("{} bytes", found.len()),
            Some(offset) => format!("another byte at {offset}"),
            None => "the same bytes".to_owned(),
        };
        self.claim(what, verdict.as_str(), "the same bytes")
    }

    fn styled(&self, code: &str, text: &str) -> String {
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

/// A number with a comma before every third digit from the end.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        for (number, text) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (1_234_567, "1,234,567"),
        ] {
            assert_eq!(grouped(number), text);
        }
    }

    #[test]
    fn a_claim_that_does_not_hold_is_named_and_not_printed() {
        let mut out = Vec::new();
        let mut page = Page::new(&mut out, false);
        page.claim("two is two", &2, &2).unwrap();
        let Err(Failure::Refused(text)) = page.claim("two is three", &2, &3) else {
            panic!("it was let pass");
        };
        assert!(text.contains("two is three: found 2, expected 3"), "{text}");
        let Err(Failure::Refused(text)) = page.claim_same("they are alike", b"abc", b"abd") else {
            panic!("it was let pass");
        };
        assert!(
            text.contains("they are alike: found another byte at 2"),
            "{text}"
        );
        assert!(page.claim_same("they are alike", b"ab", b"abd").is_err());
        assert_eq!(page.claims(), 1);
        assert_eq!(out, b"  ok two is two\n");
    }
}
