//! Requests that have been taken in and not been answered.

use bytes::Bytes;

use crate::in_flight::RangeId;
use crate::request::{Failure, RequestId, View};

/// A request's place in the volume's slab.
pub(crate) type RequestKey = usize;

/// What a mutation puts in its range.
#[derive(Clone, Debug)]
pub(crate) enum Effect {
    /// These bytes.
    Data(Bytes),
    /// Zeros; the origin's range may become a hole.
    Zeroes {
        /// It may.
        may_punch: bool,
    },
    /// Nothing in particular.
    Trim,
}

impl Effect {
    /// The bytes for `start..end` of a mutation that begins at `offset`.
    pub(crate) fn pieces(&self, offset: u64, start: u64, end: u64, out: &mut Vec<Bytes>) {
        match self {
            Self::Data(data) => {
                out.push(data.slice((start - offset) as usize..(end - offset) as usize));
            }
            Self::Zeroes { .. } | Self::Trim => {
                const ZEROS: &[u8] = &[0; 1 << 16];
                let mut left = end - start;
                while left > 0 {
                    let len = left.min(ZEROS.len() as u64);
                    out.push(Bytes::from_static(&ZEROS[..len as usize]));
                    left -= len;
                }
            }
        }
    }
}

/// A write, zero or trim.
#[derive(Debug)]
pub(crate) struct Mutation {
    pub(crate) offset: u64,
    pub(crate) end: u64,
    pub(crate) effect: Effect,
    pub(crate) fua: bool,
    /// Its turn among overlapping writes of its view.
    pub(crate) turn: RangeId,
    /// Of the origin: it has begun to change it. Until then it can be held for
    /// an instant; from then on the instant waits for its end.
    pub(crate) begun: bool,
    /// The window that is being worked on: windows follow each other, so that
    /// one request never claims more than a bounded share of anything.
    pub(crate) window: (u64, u64),
}

/// What is being done for a request.
#[derive(Debug)]
pub(crate) enum Doing {
    /// The pieces of a read, in order, as they come.
    Read(Vec<Option<Bytes>>),
    /// A write, zero or trim.
    Mutate(Mutation),
    /// A flush of the view's device, for FLUSH or for the FUA of a mutation.
    Flush,
}

/// A request that has not been answered.
#[derive(Debug)]
pub(crate) struct Active {
    pub(crate) id: RequestId,
    pub(crate) view: View,
    pub(crate) doing: Doing,
    /// Parts of the current step that have not ended.
    pub(crate) parts: u32,
    pub(crate) failure: Option<Failure>,
}
