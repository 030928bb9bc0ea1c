//! `snapshot remove`.

use super::Administrator;
use super::refusal::Refused;
use crate::control::protocol::{Answer, SnapshotRemove};

impl Administrator {
    pub(super) fn remove(&mut self, remove: &SnapshotRemove) -> Result<Answer, Refused> {
        self.report_named(&remove.snapshots)?;
        Err(Refused::NotYet)
    }
}
