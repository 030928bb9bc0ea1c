//! Whole tables: lines of text to [`Line`]s, in the order of the kernel's checks.
//!
//! What can be judged without the devices is judged here: that there are lines, that
//! they have a length and a known target, and that each begins where the one before
//! ended. Nothing has changed where a table is refused.

use std::borrow::Cow;

use libc::EINVAL;
use nbdsnap_engine::dm::{Line, Lower};
use nbdsnap_format::SECTOR_BYTES;

use super::params::{self, Resolve, TargetError};
use crate::control::dm::TextLine;

/// Sectors that a device can have: its bytes have to fit into an `off_t`.
const MOST_SECTORS: u64 = i64::MAX as u64 / SECTOR_BYTES;

/// What is wrong with a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TableError {
    /// It has no line.
    NoTargets,
    /// A line has no sectors.
    ZeroLength,
    /// A line ends beyond what a device can be.
    TooLarge,
    /// There is no such target.
    UnknownTarget(String),
    /// A line is wrong.
    Target {
        /// The name of its target.
        target: String,
        /// How.
        error: TargetError,
    },
}

impl TableError {
    /// The kernel's error number, positive.
    pub fn errno(&self) -> i32 {
        match self {
            Self::NoTargets | Self::ZeroLength | Self::TooLarge | Self::UnknownTarget(_) => EINVAL,
            Self::Target { error, .. } => error.errno,
        }
    }

    /// What the kernel writes to its log, without the `device-mapper: ` in front;
    /// `device` is the device's MAJOR:MINOR.
    pub fn log(&self, device: &str) -> String {
        match self {
            Self::NoTargets => "ioctl: populate_table: no targets specified".into(),
            Self::ZeroLength => format!("table: {device}: zero-length target"),
            Self::TooLarge => format!("table: {device}: too large device"),
            Self::UnknownTarget(name) => format!("table: {device}: {name}: unknown target type"),
            Self::Target { target, error } => {
                let TargetError { errno, why } = error;
                format!("table: {device}: {target}: {why} (-{})", errno_name(*errno))
            }
        }
    }
}

/// Read a table.
pub fn parse(lines: &[TextLine], resolve: &mut Resolve<'_>) -> Result<Vec<Line>, TableError> {
    if lines.is_empty() {
        return Err(TableError::NoTargets);
    }
    let mut next = 0;
    let mut table = Vec::with_capacity(lines.len());
    for line in lines {
        table.push(parse_line(line, next, resolve)?);
        next = line.start + line.len;
    }
    Ok(table)
}

/// The lines of a table as `table` shows them; `name` says what a device is called.
pub fn print(table: &[Line], name: &dyn Fn(Lower) -> String) -> Vec<TextLine> {
    let print = |line: &Line| TextLine {
        start: line.start,
        len: line.len,
        target: line.target.name().to_owned(),
        params: params::print(&line.target, name),
    };
    table.iter().map(print).collect()
}

/// Read a line that has to begin at `next`.
fn parse_line(line: &TextLine, next: u64, resolve: &mut Resolve<'_>) -> Result<Line, TableError> {
    let TextLine { start, len, .. } = *line;
    if len == 0 {
        return Err(TableError::ZeroLength);
    }
    if start.checked_add(len).is_none_or(|end| end > MOST_SECTORS) {
        return Err(TableError::TooLarge);
    }
    if !params::is_known(&line.target) {
        return Err(TableError::UnknownTarget(line.target.clone()));
    }
    let wrong = |error| TableError::Target {
        target: line.target.clone(),
        error,
    };
    if start != next {
        let why = "Gap in table".into();
        let errno = EINVAL;
        return Err(wrong(TargetError { errno, why }));
    }
    let target = params::parse(&line.target, len, &line.params, resolve).map_err(wrong)?;
    Ok(Line { start, len, target })
}

/// An error number as the kernel's log has it.
pub fn errno_name(errno: i32) -> Cow<'static, str> {
    match errno {
        libc::EINVAL => "EINVAL".into(),
        libc::ENODEV => "ENODEV".into(),
        libc::ENXIO => "ENXIO".into(),
        libc::ENOENT => "ENOENT".into(),
        libc::EBUSY => "EBUSY".into(),
        libc::EACCES => "EACCES".into(),
        libc::EPERM => "EPERM".into(),
        libc::EROFS => "EROFS".into(),
        libc::EIO => "EIO".into(),
        libc::ENOMEM => "ENOMEM".into(),
        libc::ENOTBLK => "ENOTBLK".into(),
        libc::EOVERFLOW => "EOVERFLOW".into(),
        libc::ELOOP => "ELOOP".into(),
        other => other.to_string().into(),
    }
}

#[cfg(test)]
mod tests {
    use libc::ENODEV;
    use nbdsnap_engine::dm::{DiskId, Target};

    use super::*;

    fn line(start: u64, len: u64, target: &str, params: &str) -> TextLine {
        TextLine {
            start,
            len,
            target: target.into(),
            params: params.into(),
        }
    }

    fn device(name: &str) -> Result<Lower, i32> {
        let number = name.strip_prefix("/dev/").and_then(|n| n.parse().ok());
        number.map(|n| Lower::Disk(DiskId(n))).ok_or(ENODEV)
    }

    #[test]
    fn lines_that_adjoin_are_a_table() {
        let text = [
            line(0, 8, "linear", "/dev/1 384"),
            line(8, 8, "error", ""),
            line(16, 4, "zero", ""),
        ];
        let table = parse(&text, &mut device).unwrap();
        let linear = Target::Linear {
            lower: Lower::Disk(DiskId(1)),
            start: 384,
        };
        assert_eq!(table[0].target, linear);
        assert_eq!((table[2].start, table[2].len), (16, 4));
        let name = |lower| match lower {
            Lower::Disk(DiskId(number)) => format!("/dev/{number}"),
            Lower::Device(_) => unreachable!("there is none"),
        };
        assert_eq!(print(&table, &name), text);
    }

    #[test]
    fn others_are_refused_in_the_kernels_words() {
        let good = line(0, 8, "zero", "");
        for (text, errno, log) in [
            (
                vec![],
                EINVAL,
                "ioctl: populate_table: no targets specified",
            ),
            (
                vec![line(1, 0, "nosuch", "")],
                EINVAL,
                "table: 999:7: zero-length target",
            ),
            (
                vec![line(1, 8, "nosuch", "")],
                EINVAL,
                "table: 999:7: nosuch: unknown target type",
            ),
            (
                vec![line(1, 8, "linear", "")],
                EINVAL,
                "table: 999:7: linear: Gap in table (-EINVAL)",
            ),
            (
                vec![good.clone(), line(9, 8, "linear", "")],
                EINVAL,
                "table: 999:7: linear: Gap in table (-EINVAL)",
            ),
            (
                vec![good.clone(), line(7, 8, "error", "")],
                EINVAL,
                "table: 999:7: error: Gap in table (-EINVAL)",
            ),
            (
                vec![good.clone(), line(8, u64::MAX, "error", "")],
                EINVAL,
                "table: 999:7: too large device",
            ),
            (
                vec![line(0, MOST_SECTORS + 1, "error", "")],
                EINVAL,
                "table: 999:7: too large device",
            ),
            (
                vec![good, line(8, 8, "linear", "/nowhere 0")],
                ENODEV,
                "table: 999:7: linear: Device lookup failed (-ENODEV)",
            ),
        ] {
            let error = parse(&text, &mut device).unwrap_err();
            assert_eq!((error.errno(), error.log("999:7").as_str()), (errno, log));
        }
    }
}
