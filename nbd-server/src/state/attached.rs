//! The list of a disk: the stores that must see every write to it.
//!
//! It is judged before a disk is served writable ([`Attached::judge`]); each
//! finding is a reason to refuse, unless the operator gives the word that goes
//! with it. A disk that is served read-only needs no list and changes none.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::files::FileIdentity;
use super::record::StorePath;
use super::seal;

/// How a store on the list stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mark {
    /// It has seen every write since its instant.
    Attached,
    /// It is being merged into the disk: the disk alone is a mixture.
    Merging,
    /// It has missed a write, and its own header could not be made to say so.
    Lost,
}

/// A store on the list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachedStore {
    /// What the snapshot was called within its volume.
    pub snapshot: String,
    /// Where the store is, absolute.
    #[serde(with = "seal::path")]
    pub cow: PathBuf,
    /// The store of the snapshot that it was taken of; none: of the disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub of: Option<StorePath>,
    /// How large the disk was at the snapshot's instant, in bytes: nothing in the
    /// store says so.
    #[serde(default)]
    pub bytes: Option<u64>,
    /// When that was, in seconds since 1970.
    #[serde(default)]
    pub taken_at: Option<u64>,
    /// Its file is deleted when it is merged.
    #[serde(default)]
    pub delete_cow: bool,
    /// The file that is about to take its place.
    #[serde(default)]
    pub anew: Option<Anew>,
    /// How it stands.
    pub mark: Mark,
}

/// A file that is about to take a store's place, with the instant of the snapshot
/// in it. Its rename is the one step in which the snapshot changes; which side of it
/// a crash fell on is told by the file that lies there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Anew {
    /// Which file.
    pub file: FileIdentity,
    /// How large the disk is at its snapshot's instant, in bytes.
    pub bytes: u64,
    /// When that is, in seconds since 1970.
    pub taken_at: Option<u64>,
}

impl AttachedStore {
    /// The store of the snapshot that it was taken of; none: of the disk.
    pub fn is_of(&self) -> Option<&Path> {
        self.of.as_ref().map(|of| of.0.as_path())
    }

    /// Settle a change of its file, given which one lies there: what was said of the
    /// old one does not hold for the new one.
    pub(super) fn settle_anew(&mut self, there: Option<FileIdentity>) {
        if let Some(anew) = self.anew.take().filter(|anew| Some(anew.file) == there) {
            self.bytes = Some(anew.bytes);
            self.taken_at = anew.taken_at;
            self.mark = Mark::Attached;
        }
    }
}

/// The list of a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// In the order in which they joined.
    pub stores: Vec<AttachedStore>,
}

/// A store with which a disk is to be served.
#[derive(Clone, Copy, Debug)]
pub struct Offered<'a> {
    /// Absolute.
    pub cow: &'a Path,
    /// The store of the snapshot that it is said to be of; none: of the disk.
    pub of: Option<&'a Path>,
    /// A persistent store that is there and valid; not one that is to be made.
    pub is_old: bool,
    /// The operator says that it has seen every write to the disk.
    pub adopted: bool,
}

/// Something that stands in the way of writing to a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// A store of the disk is not among those offered.
    Missing(AttachedStore),
    /// The same, of a store that is being merged: no word helps.
    MissingMerge(AttachedStore),
    /// A store that was used before is not on the list: it may be stale.
    Unlisted(PathBuf),
    /// A store that is known to be stale.
    Lost(AttachedStore),
    /// A store of a snapshot that was taken of something else.
    OtherOrigin(AttachedStore),
}

impl Attached {
    /// What is wrong with serving the disk with these stores, and without those
    /// that the operator gives up.
    pub fn judge(&self, offered: &[Offered<'_>], given_up: &[PathBuf]) -> Vec<Finding> {
        let mut findings = Vec::new();
        for store in &self.stores {
            let named = |offer: &&Offered<'_>| offer.cow.as_os_str() == store.cow.as_os_str();
            match (store.mark, offered.iter().find(named)) {
                (Mark::Merging, None) => findings.push(Finding::MissingMerge(store.clone())),
                (Mark::Attached, None) if !given_up.contains(&store.cow) => {
                    findings.push(Finding::Missing(store.clone()));
                }
                (Mark::Lost, Some(offer)) if offer.is_old => {
                    findings.push(Finding::Lost(store.clone()));
                }
                (_, Some(offer)) if offer.is_old && offer.of != store.is_of() => {
                    findings.push(Finding::OtherOrigin(store.clone()));
                }
                _ => {}
            }
        }
        let listed = |cow: &Path| self.stores.iter().any(|store| store.cow == cow);
        let unlisted = offered
            .iter()
            .filter(|offer| offer.is_old && !offer.adopted && !listed(offer.cow));
        findings.extend(unlisted.map(|offer| Finding::Unlisted(offer.cow.to_owned())));
        findings
    }

    /// Of these findings, those that count where nobody writes the disk: a store that
    /// is not served then misses nothing, unless it is of a snapshot that is.
    pub fn judge_shared(&self, offered: &[Offered<'_>], given_up: &[PathBuf]) -> Vec<Finding> {
        let mut findings = self.judge(offered, given_up);
        let writes =
            |of: Option<&Path>| of.is_some_and(|of| offered.iter().any(|one| one.cow == of));
        findings.retain(|finding| match finding {
            Finding::Missing(store) | Finding::MissingMerge(store) => writes(store.is_of()),
            Finding::Unlisted(_) | Finding::Lost(_) | Finding::OtherOrigin(_) => true,
        });
        findings
    }

    /// Its stores by their paths, which are compared as text: they are settled.
    pub fn by_cow(&self) -> BTreeMap<&OsStr, &AttachedStore> {
        let stores = self.stores.iter();
        stores.map(|store| (store.cow.as_os_str(), store)).collect()
    }

    /// The store at this path.
    pub fn find(&self, cow: &Path) -> Option<&AttachedStore> {
        self.stores.iter().find(|store| store.cow == cow)
    }

    /// The stores at these paths.
    #[must_use]
    pub fn only(&self, paths: &[StorePath]) -> Self {
        self.filtered(paths, true)
    }

    /// All but the stores at these paths.
    #[must_use]
    pub fn without(&self, paths: &[StorePath]) -> Self {
        self.filtered(paths, false)
    }

    fn filtered(&self, paths: &[StorePath], keep: bool) -> Self {
        let paths: BTreeSet<&OsStr> = paths.iter().map(|path| path.0.as_os_str()).collect();
        let kept = |store: &&AttachedStore| paths.contains(store.cow.as_os_str()) == keep;
        Self {
            stores: self.stores.iter().filter(kept).cloned().collect(),
        }
    }

    /// What both name: a store that is about to join or to leave is on it, and
    /// what `self` says of one that both have counts.
    #[must_use]
    pub fn with(&self, other: &Self) -> Self {
        let known = self.by_cow();
        let unknown = |store: &&AttachedStore| !known.contains_key(store.cow.as_os_str());
        let mut stores = self.stores.clone();
        stores.extend(other.stores.iter().filter(unknown).cloned());
        Self { stores }
    }
}
