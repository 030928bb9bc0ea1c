//! What tests that drive a rig by hand need beside it.

use super::*;

pub(super) fn is_origin_write(op: &DiskOp) -> bool {
    matches!(op.action, Action::Write { .. }) && op.device == Device::Origin
}

pub(super) fn is_origin_flush(op: &DiskOp) -> bool {
    op.action == Action::Flush && op.device == Device::Origin
}

impl Rig {
    /// An empty store and its device, for a snapshot that comes later: the next.
    pub(super) fn store(&mut self, kind: StoreKind, chunks: u64) -> Store {
        let chunk_size = ChunkSize::from_sectors(1).unwrap();
        let bytes = chunks * chunk_size.bytes();
        let mut memory = Memory(vec![0; bytes as usize]);
        let size = StoreSize {
            ready: bytes,
            limit: bytes,
            step: 0,
        };
        let spec = StoreSpec {
            kind,
            chunk_size,
            size,
        };
        let store = Store::create(spec, &mut memory).unwrap();
        self.devices.push(memory);
        store
    }

    pub(super) fn run(&mut self) {
        while self.step() {}
    }

    /// The answer to the request, which has been given.
    pub(super) fn answer(&mut self, id: u64) -> Result<(), Failure> {
        self.take_replies();
        let place = self.replies.iter().position(|r| r.id == RequestId(id));
        let place = place.unwrap_or_else(|| panic!("request {id} has not been answered"));
        self.replies.remove(place).result.map(|_| ())
    }

    pub(super) fn is_answered(&mut self, id: u64) -> bool {
        self.take_replies();
        self.replies.iter().any(|r| r.id == RequestId(id))
    }

    pub(super) fn take_replies(&mut self) {
        while let Some(reply) = self.volume.poll_reply() {
            self.replies.push(reply);
        }
    }
}
