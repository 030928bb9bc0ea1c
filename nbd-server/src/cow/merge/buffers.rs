//! Memory for what is read in a merge. It is used again as soon as what was read is
//! written: memory that goes back to the system each time, and is zeroed by it to be
//! handed out anew, costs more than the copy. All of it is no more than what the engine
//! has under way at a time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

/// Memory that nobody uses at the moment.
#[derive(Clone, Debug, Default)]
pub(super) struct Buffers(Arc<Mutex<Vec<Vec<u8>>>>);

impl Buffers {
    /// Some memory, or none yet.
    pub(super) fn take(&self) -> Vec<u8> {
        self.free().pop().unwrap_or_default()
    }

    /// The bytes, whose memory comes back with the last who has them.
    pub(super) fn lend(&self, bytes: Vec<u8>) -> Bytes {
        let home = self.clone();
        Bytes::from_owner(Lent { bytes, home })
    }

    fn free(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        // No state of it is a broken one.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Lent {
    bytes: Vec<u8>,
    home: Buffers,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        self.home.free().push(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again_when_the_last_has_let_go() {
        let buffers = Buffers::default();
        let lent = buffers.lend(vec![7; 100]);
        let part = lent.slice(10..20);
        drop(lent);
        assert_eq!(buffers.take().capacity(), 0, "somebody has a part of it");
        assert_eq!(part, vec![7; 10]);
        drop(part);
        assert!(buffers.take().capacity() >= 100);
        assert_eq!(buffers.take().capacity(), 0);
    }
}
