//! Where what a volume stands on is no disk: its operations as requests to whatever is
//! below, and the replies as the ends of the operations. Used by `tree/` and `dm/`.

use bytes::Bytes;

use crate::disk::{Action, DiskError, Outcome};
use crate::request::{Command, Failure};

/// What an operation meets where what is below fails (EIO).
const EIO: i32 = 5;

/// An operation as a request.
pub(crate) fn request_for(action: Action) -> Command {
    let fua = false;
    match action {
        Action::Read { offset, len } => Command::Read { offset, len },
        Action::Write { offset, data } => Command::Write {
            offset,
            data: join(data),
            fua,
        },
        Action::WriteZeroes {
            offset,
            len,
            may_punch,
        } => Command::WriteZeroes {
            offset,
            len,
            fua,
            no_hole: !may_punch,
            fast_only: false,
        },
        Action::Trim { offset, len } => Command::Trim { offset, len, fua },
        Action::Flush => Command::Flush,
        Action::Grow { .. } => unreachable!("only files grow, and these are none"),
    }
}

/// The end of a request as the end of the operation.
pub(crate) fn outcome_of(result: Result<Vec<Bytes>, Failure>) -> Outcome {
    result.map(join).map_err(|failure| match failure {
        Failure::NoSpace => DiskError::NoSpace,
        _ => DiskError::Io(EIO),
    })
}

/// The pieces in one.
fn join(mut pieces: Vec<Bytes>) -> Bytes {
    match pieces.len() {
        1 => pieces.remove(0),
        _ => pieces.concat().into(),
    }
}
