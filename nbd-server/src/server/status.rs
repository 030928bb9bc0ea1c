//! How the snapshots of a running server are doing, in the words of `dmsetup
//! status`.

use std::fmt;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use nbdsnap_engine::Status;
use nbdsnap_format::SECTOR_BYTES;

use super::{RunningServer, ServerError};

/// How often a thread that does not answer is looked after.
const LOOK_AFTER: Duration = Duration::from_millis(100);

/// How a snapshot is doing. Display gives dmsetup's line for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotStatus {
    /// Its export, `VOLUME@NAME`.
    pub export: String,
    /// Sectors that the export has.
    pub sectors: u64,
    /// Its state.
    pub status: Status,
}

impl fmt::Display for SnapshotStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0 {} snapshot {}", self.sectors, self.status)
    }
}

impl RunningServer {
    /// How every snapshot is doing, in the order of the exports.
    pub fn statuses(&self) -> Result<Vec<SnapshotStatus>, ServerError> {
        let mut told = Vec::new();
        for shard in self.shards.iter() {
            let answer = shard.statuses();
            loop {
                match answer.recv_timeout(LOOK_AFTER) {
                    Ok(statuses) => break told.extend(statuses),
                    Err(RecvTimeoutError::Timeout) if !shard.has_ended() => {}
                    Err(_) => return Err(ServerError::ThreadEnded),
                }
            }
        }
        let of = |export: &crate::nbd::export::Export| {
            let hosted = told.iter().find(|one| one.export == export.name)?;
            Some(SnapshotStatus {
                export: export.name.clone(),
                sectors: export.size / SECTOR_BYTES,
                status: hosted.status,
            })
        };
        Ok(self.exports().iter().filter_map(of).collect())
    }
}
