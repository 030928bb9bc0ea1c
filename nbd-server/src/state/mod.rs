//! What outlives a server: which stores a disk has, and what was created while
//! it ran.
//!
//! Two kinds of records, each a small file that is written anew and renamed
//! into place ([`seal`] gives its form, [`files`] the steps):
//!
//! - **The list of a disk** ([`attached`]), beside it. It names the stores that
//!   must see every write to the disk. A store joins it before its instant and
//!   leaves it, durably, before it misses a write; so a store that is not on the
//!   list may be stale, and a disk must not be written without one that is
//!   (durability.md, rule 7). It also holds the mark of a merge that has begun
//!   (rule 12) and that of a store whose own header could not be marked (rule 6).
//! - **The state of a server** ([`record`]), in the folder of `--state`: its
//!   volumes and snapshots. Beside it, while something changes, an intent.
//!
//! # One change, in its order
//!
//! [`keeper::Keeper`] leads every change through the same steps, so that a crash
//! at any moment leaves the old or the new, never a mixture:
//!
//! 1. the intent: which disks' lists and which files this is about;
//! 2. lists that name more than before (a store is about to join);
//! 3. files are made, and identified in the intent before anything is in them;
//! 4. the state: its rename is the commit;
//! 5. lists that name less (a store may miss writes from now on);
//! 6. files that were given up are deleted;
//! 7. the intent goes.
//!
//! What a crash interrupted is settled at the next start by one rule, before or
//! after the commit alike: the lists of the disks in the intent are made to say
//! what the state says, and the files in it that no snapshot of the state names
//! are deleted, if they are still the ones that were identified.
//!
//! Changes of different volumes may be under way at the same time; the intent is then
//! about all of them. A store that is exchanged for a new one at the same path changes
//! by that one rename: which file it is whose instant the records know is written
//! down before ([`attached::Anew`]), and which one lies there is looked at.
//!
//! The list of a disk that several volumes share, of several servers perhaps, is locked
//! while it is read and written anew, and a change touches only the stores that it is
//! about ([`record::IntentList`]): those of others, which may be in the middle of a
//! change of their own, stay as they are written.
//!
//! Without `--state` there are only the lists, and each disk's rename commits
//! its own.

pub mod admission;
pub mod attached;
pub mod files;
pub mod folder;
pub mod keeper;
pub mod place;
pub mod record;
pub mod seal;
#[cfg(test)]
mod tests;

use files::SystemFiles;
use keeper::{Change, Keeper, StateError};

/// The records of a server that is about to start, and the change to them that
/// this is.
#[derive(Debug)]
pub struct Records {
    /// Who keeps them.
    pub keeper: Keeper<SystemFiles>,
    /// What has been begun.
    pub change: Option<Change>,
}

impl Records {
    /// Records of nothing, as for volumes whose lists do not change.
    pub fn unchanged() -> Result<Self, StateError> {
        Ok(Self {
            keeper: Keeper::open(SystemFiles, None)?,
            change: None,
        })
    }

    /// The server has begun: what was asked for is so.
    pub fn commit(mut self) -> Result<Keeper<SystemFiles>, StateError> {
        if let Some(mut change) = self.change.take() {
            if let Err(error) = self.keeper.commit(&mut change) {
                // The first error is the one to tell of.
                let _ = self.keeper.abandon(change);
                return Err(error);
            }
            self.keeper.finish(change)?;
        }
        Ok(self.keeper)
    }

    /// It has not: everything is as it was before.
    pub fn abandon(mut self) {
        if let Some(change) = self.change.take()
            && let Err(error) = self.keeper.abandon(change)
        {
            tracing::warn!("what was begun could not be taken back: {error}");
        }
    }
}
