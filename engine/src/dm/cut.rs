//! Commands, cut.

use crate::request::Command;

/// The range of a command; a flush has none.
pub(super) fn range(command: &Command) -> Option<(u64, u64)> {
    match command {
        Command::Read { offset, len }
        | Command::WriteZeroes { offset, len, .. }
        | Command::Trim { offset, len, .. } => Some((*offset, *len)),
        Command::Write { offset, data, .. } => Some((*offset, data.len() as u64)),
        Command::Flush => None,
    }
}

/// The part of a command that begins `from` bytes in, for `len` bytes at `offset`.
pub(super) fn part(command: &Command, from: u64, offset: u64, len: u64) -> Command {
    match *command {
        Command::Read { .. } => Command::Read { offset, len },
        Command::Write { ref data, fua, .. } => Command::Write {
            offset,
            data: data.slice(from as usize..(from + len) as usize),
            fua,
        },
        Command::WriteZeroes {
            fua,
            no_hole,
            fast_only,
            ..
        } => Command::WriteZeroes {
            offset,
            len,
            fua,
            no_hole,
            fast_only,
        },
        Command::Trim { fua, .. } => Command::Trim { offset, len, fua },
        Command::Flush => Command::Flush,
    }
}
