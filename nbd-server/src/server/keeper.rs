//! Where durable memory plugs in: who must be told of what comes and goes, and
//! when, so that a restart, a crash or a reboot finds it again and no stale
//! snapshot is ever served (durability.md, rules 7 and 12).

use std::path::{Path, PathBuf};

/// A snapshot as the keeper is told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The volume.
    pub volume: String,
    /// Its disk.
    pub disk: PathBuf,
    /// The snapshot.
    pub snapshot: String,
    /// Its store.
    pub cow: PathBuf,
}

/// Why the keeper does not go along: one line for the operator.
pub type KeeperError = String;

/// Remembers durably what is attached. Every call has ended, and is durable, when
/// it returns; an error refuses the order. Called by the administrator's thread
/// only, never by a volume's.
pub trait Keeper: Send + std::fmt::Debug {
    /// These stores are about to be made: what a crash leaves of them is to be
    /// undone by the next start.
    fn before_make(&mut self, snapshots: &[Kept]) -> Result<(), KeeperError>;

    /// Every volume is held: from here on the snapshots count as taken. Called
    /// between "all held" and "take"; clients wait meanwhile.
    fn commit(&mut self, snapshots: &[Kept]) -> Result<(), KeeperError>;

    /// What [`Keeper::before_make`] announced has been taken back.
    fn abandon(&mut self, snapshots: &[Kept]);

    /// The stores are about to miss their first write: they must not be served
    /// any more. All of them or none.
    fn forget(&mut self, snapshots: &[Kept]) -> Result<(), KeeperError>;

    /// A snapshot is called something else from now on.
    fn rename(&mut self, snapshot: &Kept, name: &str) -> Result<(), KeeperError>;

    /// A volume is about to be served, with these snapshots.
    fn add_volume(
        &mut self,
        name: &str,
        disk: &Path,
        snapshots: &[Kept],
    ) -> Result<(), KeeperError>;

    /// A volume was not served after all, or is not any more. Its stores are good
    /// as long as nobody writes to its disk.
    fn drop_volume(&mut self, name: &str) -> Result<(), KeeperError>;

    /// The origin is about to read as the snapshot: a restart goes on with that.
    fn merge_begins(&mut self, snapshot: &Kept) -> Result<(), KeeperError>;

    /// The merge did not begin after all.
    fn merge_abandoned(&mut self, snapshot: &Kept) -> Result<(), KeeperError>;

    /// The merge is done, and the snapshot gone.
    fn merge_ends(&mut self, snapshot: &Kept) -> Result<(), KeeperError>;
}

/// Remembers nothing.
#[derive(Debug, Default)]
pub struct Forgetful;

impl Keeper for Forgetful {
    fn before_make(&mut self, _: &[Kept]) -> Result<(), KeeperError> {
        Ok(())
    }

    fn commit(&mut self, _: &[Kept]) -> Result<(), KeeperError> {
        Ok(())
    }

    fn abandon(&mut self, _: &[Kept]) {}

    fn forget(&mut self, _: &[Kept]) -> Result<(), KeeperError> {
        Ok(())
    }

    fn rename(&mut self, _: &Kept, _: &str) -> Result<(), KeeperError> {
        Ok(())
    }

    fn add_volume(&mut self, _: &str, _: &Path, _: &[Kept]) -> Result<(), KeeperError> {
        Ok(())
    }

    fn drop_volume(&mut self, _: &str) -> Result<(), KeeperError> {
        Ok(())
    }

    fn merge_begins(&mut self, _: &Kept) -> Result<(), KeeperError> {
        Ok(())
    }

    fn merge_abandoned(&mut self, _: &Kept) -> Result<(), KeeperError> {
        Ok(())
    }

    fn merge_ends(&mut self, _: &Kept) -> Result<(), KeeperError> {
        Ok(())
    }
}
