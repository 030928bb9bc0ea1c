//! What happens to volumes and clients by itself, rather than by an order: told
//! to whoever listens, without waiting.

use std::sync::Arc;

use nbdsnap_engine::{SnapshotId, View};

use super::VolumeId;
use super::hosted::VolumeOrder;
use super::mailbox::Mailbox;
use super::shard::Message;

/// Something that has happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct News {
    /// To this volume.
    pub volume: VolumeId,
    /// Its name.
    pub volume_name: String,
    /// And to this snapshot of it, with its name.
    pub snapshot: Option<(SnapshotId, String)>,
    /// What.
    pub what: What,
}

/// What has happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// The snapshot is lost, for this reason.
    Invalid(&'static str),
    /// Its store is full: it can still be read.
    Overflow,
    /// So many percent of its store are used.
    Filling(u8),
    /// Its store is full.
    Full,
    /// Its store may grow to so many bytes now, by itself.
    Extended(u64),
    /// The origin reads as the snapshot from here on.
    MergeBegun,
    /// So many percent of a merge are done.
    MergeProgress(u8),
    /// The snapshot is merged, and gone.
    Merged,
    /// The merge has stopped, or did not begin.
    MergeFailed(&'static str),
    /// A client has attached.
    ClientCame {
        /// Its name within the server.
        id: u64,
        /// Who it is.
        peer: String,
        /// What it is attached to.
        view: View,
    },
    /// A client has gone.
    ClientWent {
        /// Its name within the server.
        id: u64,
        /// Who it was.
        peer: String,
    },
}

/// Who listens. Called on the volumes' threads: it must not wait.
pub trait Herald: Send + Sync + std::fmt::Debug {
    /// Hear of it.
    fn tell(&self, news: News);

    /// Have a loss marked durably where every later start looks.
    fn mark_lost(&self, loss: Loss);
}

/// A snapshot is lost, and its store cannot be made to say so (durability.md, rule 6):
/// a mark elsewhere is wanted, and the origin's writes wait for the answer. Dropped
/// without one, it answers that there is none.
#[derive(Debug)]
pub struct Loss {
    pub(super) mail: Arc<Mailbox<Message>>,
    /// The snapshot's volume.
    pub volume: VolumeId,
    /// Its name within the volume.
    pub snapshot: SnapshotId,
    pub(super) durable: bool,
}

impl Loss {
    /// There is a durable mark.
    pub fn marked(mut self) {
        self.durable = true;
    }
}

impl Drop for Loss {
    fn drop(&mut self) {
        let order = VolumeOrder::MarkedLost {
            snapshot: self.snapshot,
            durable: self.durable,
        };
        self.mail.post(Message::Order(self.volume, order));
    }
}
