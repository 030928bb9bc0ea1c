//! Why an order is refused, or failed: one line, in the operator's words.

use crate::control::protocol::SnapshotName;
use crate::disks;
use crate::state::keeper::StateError;

/// Why an order is not executed. Unless it says otherwise, nothing has changed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    #[error("no volume is named {0:?}: 'nbdsnap volume list' shows those there are")]
    NoVolume(String),
    #[error("there is no snapshot {0}: 'nbdsnap snapshot list' shows those there are")]
    NoSnapshot(SnapshotName),
    #[error("the name {name:?} {why}")]
    Name { name: String, why: &'static str },
    #[error("there is a snapshot {0} already: take another name, or remove that one first")]
    Exists(SnapshotName),
    #[error("snapshots were taken of {0}, and depend on it: {list}", list = listed(.1))]
    Depended(SnapshotName, Vec<SnapshotName>),
    #[error(
        "{0} would be a snapshot of one that is transient and ends with the server: take it with --transient too"
    )]
    OfTransient(SnapshotName),
    #[error(
        "{0} is lost, and shows nothing that a snapshot of it could keep: 'nbdsnap snapshot reset' takes it anew"
    )]
    OfLost(SnapshotName),
    #[error("{0} is named twice")]
    Twice(SnapshotName),
    #[error("no snapshot is named: write VOLUME@NAME")]
    NothingNamed,
    #[error(
        "--cow names one path, and there are {0} snapshots: leave it out, or take them one by one, if they need not be of one instant"
    )]
    OnePath(usize),
    #[error("{0} is served with --read-only: no snapshot can be made of it")]
    ReadOnly(String),
    #[error(
        "{0}: the disk is a block device, beside which no file can be made: name the store's path with --cow"
    )]
    NoDefaultCow(String),
    #[error(
        "the path {0:?} is not absolute: the server's working folder may be another than yours"
    )]
    RelativePath(std::path::PathBuf),
    #[error("{0} %: the size of a store is 1 to 1000 % of its origin")]
    Percent(u32),
    #[error(transparent)]
    Disk(#[from] disks::Refusal),
    #[error("{0}: a flush of the disk failed, and no snapshot was taken; see the server's log")]
    FlushFailed(String),
    #[error("{0}: no snapshot of it can be taken now, for it is being merged")]
    NotTakeable(String),
    #[error(
        "not all disks could be brought to rest within {0} seconds, and no snapshot was taken: is one of them stalled?"
    )]
    NotHeld(u64),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(
        "{0} is being merged, or will be: wait for the end of that ('nbdsnap snapshot status' shows how far it is)"
    )]
    Merging(SnapshotName),
    #[error("{0} cannot be merged: its disk is shared, and nobody writes it")]
    MergeShared(SnapshotName),
    #[error("{0} is transient: what is merged is a persistent store")]
    MergeTransient(SnapshotName),
    #[error("{0} cannot be merged: {1}")]
    NotMergeable(SnapshotName, String),
    #[error(
        "{0} has clients attached ({1}), under which the disk would change: detach them first, or use --when-idle, which waits for that, or --force"
    )]
    MergeInUse(String, u64),
    #[error(
        "no merge of {0} waits: one that has begun cannot be called off, since the disk reads as the snapshot already"
    )]
    NoMergeWaits(SnapshotName),
    #[error("a store grows by itself from 1 to 99 % on, by 1 to 1000 %, not from {0} % by {1} %")]
    Growth(u32, u32),
    #[error("{0} cannot be extended: {1}")]
    NotExtended(SnapshotName, String),
    #[error(
        "{0}: its store is a block device, which is as large as it is: enlarge that, then leave --size out"
    )]
    ExtendDevice(SnapshotName),
    #[error("{0}: say how far the file of its store may grow, with --size")]
    ExtendBy(SnapshotName),
    #[error("{0} keeps its size: {1}")]
    NotResized(String, String),
    #[error("{0}")]
    Mapped(String),
    #[error("{0} is suspended already")]
    Suspended(String),
    #[error("{0} is suspended: resume it first")]
    StandsStill(String),
    #[error("{0} is not suspended")]
    NotSuspended(String),
    #[error("{0} is named twice")]
    VolumeTwice(String),
    #[error("no volume is named")]
    NoVolumes,
    #[error("{0}: a disk is read-only or shared, not both: snapshots of a shared one are written")]
    ReadOnlyShared(String),
    #[error(
        "not all could be brought to rest within {0} seconds, and all go on: is a disk stalled, or a store full?"
    )]
    NotSuspendedInTime(u64),
    #[error("{0}: not everything could be flushed, and the volumes go on; see the server's log")]
    SuspendedNotDurable(String),
    #[error(
        "the merge of {0} has not begun within {1} seconds: it will when the disk comes to rest; is one stalled, or a store full?"
    )]
    MergeSlow(SnapshotName, u64),
    #[error("no client has the id {0}: 'nbdsnap clients' shows those there are")]
    NoClient(u64),
    #[error("there is a volume {0:?} already: give this one another name")]
    VolumeExists(String),
    #[error("{0} has clients attached ({1}): detach them first, or drop them with --force")]
    InUse(String, u64),
    #[error(
        "{0} was removed, but not everything could be flushed: its last writes may be lost; check the disk and the kernel's log"
    )]
    NotDurable(String),
    #[error(
        "{0} is being removed, but operations on its disks have not ended within {1} seconds: is one of them stalled?"
    )]
    VolumeBusy(String, u64),
    #[error(
        "the snapshot {0} could not be taken, and the volume is not served: its disk or its store's failed; see the server's log"
    )]
    NotTaken(String),
    #[error(
        "{0}: its store is a block device, beside which no new one can be made: remove the snapshot and create it anew"
    )]
    ResetDevice(SnapshotName),
    #[error(
        "{0} has clients attached ({1}), who would be dropped: detach them first, or use --force"
    )]
    ResetInUse(SnapshotName, u64),
    #[error("{0} stays as it is: its new store cannot take the old one's place: {1}")]
    NotExchanged(SnapshotName, String),
    #[error(
        "{0} was taken anew, but the name of its new store could not be made durable ({1}): after a power cut it may be lost; look at the disk that the store is on"
    )]
    NameInDoubt(SnapshotName, std::io::Error),
    #[error("the server is stopping")]
    Stopping,
    #[error("a volume did not answer in time; see the server's log")]
    TooSlow,
    #[error(
        "{0}: its store {1} is a block device, which cannot be deleted: leave --delete-cow out"
    )]
    DeleteDevice(SnapshotName, String),
    #[error("{0} was removed, but its store {1} could not be deleted: {2}")]
    NotDeleted(SnapshotName, String, String),
    #[error(
        "{0} was removed, but operations on its store have not ended within {1} seconds: is its disk stalled?"
    )]
    StillBusy(SnapshotName, u64),
}

/// Names in one line.
fn listed(names: &[SnapshotName]) -> String {
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    names.join(", ")
}
