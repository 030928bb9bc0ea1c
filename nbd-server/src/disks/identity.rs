//! Which file or device a path means, so that one is never used for two things.

use std::ffi::OsString;
use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::{Cause, Refusal, shown};

/// What a path leads to: equal for hard links, symbolic links and device nodes
/// that lead to the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Identity {
    /// A regular file.
    File { device: u64, inode: u64 },
    /// A block device.
    Block { number: u64 },
    /// A file that is yet to be made, by its folder and name.
    Missing {
        device: u64,
        inode: u64,
        name: OsString,
    },
}

impl Identity {
    pub(super) fn of(meta: &Metadata) -> Self {
        if meta.file_type().is_block_device() {
            Self::Block {
                number: meta.rdev(),
            }
        } else {
            Self::File {
                device: meta.dev(),
                inode: meta.ino(),
            }
        }
    }

    pub(super) fn missing(folder: &Metadata, name: OsString) -> Self {
        Self::Missing {
            device: folder.dev(),
            inode: folder.ino(),
            name,
        }
    }
}

/// What a file is used for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The origin of a volume, by its name.
    Origin(String),
    /// The same, of one that several volumes may have.
    SharedOrigin(String),
    /// The COW store of `volume@snapshot`.
    Cow(String),
    /// A disk that tables of mapped devices name, by its number there.
    Mapped(u32),
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Origin(volume) | Self::SharedOrigin(volume) => {
                write!(f, "the origin of {volume}")
            }
            Self::Cow(snapshot) => write!(f, "the COW store of {snapshot}"),
            Self::Mapped(_) => write!(f, "a disk under mapped devices"),
        }
    }
}

/// The files that are used so far.
#[derive(Debug, Default)]
pub struct Taken {
    files: Vec<(Identity, Role, PathBuf)>,
}

impl Taken {
    /// Use a file, unless it is used already.
    pub(super) fn take(
        &mut self,
        identity: Identity,
        role: Role,
        path: &Path,
    ) -> Result<(), Refusal> {
        let shares = |other: &Role| {
            let roles = (other, &role);
            matches!(roles, (Role::SharedOrigin(_), Role::SharedOrigin(_)))
        };
        let mut files = self.files.iter();
        let mut clash = |(known, other, _): &&_| *known == identity && !shares(other);
        if let Some((_, role, other)) = files.find(&mut clash) {
            let cause = Cause::Twice {
                other: shown(other),
                role: role.to_string(),
            };
            return Err(Refusal::new(path, cause));
        }
        self.files.push((identity, role, path.to_owned()));
        Ok(())
    }

    /// How many there are, for [`Taken::back_to`].
    pub(super) fn mark(&self) -> usize {
        self.files.len()
    }

    /// Give back those that came after the mark.
    pub(super) fn back_to(&mut self, mark: usize) {
        self.files.truncate(mark);
    }

    /// The file of `role` turns out to be this one: it has been made.
    pub(super) fn identify(&mut self, role: &Role, identity: Identity) {
        if let Some((known, ..)) = self.files.iter_mut().find(|(_, other, _)| other == role) {
            *known = identity;
        }
    }

    /// Nobody uses the file of `role` any more.
    pub(super) fn give_back(&mut self, role: &Role) {
        self.files.retain(|(_, other, _)| other != role);
    }

    /// The number of a disk under mapped devices.
    pub fn mapped_disk(&self, meta: &Metadata) -> Option<u32> {
        let identity = Identity::of(meta);
        self.files.iter().find_map(|(known, role, _)| match role {
            Role::Mapped(number) if *known == identity => Some(*number),
            _ => None,
        })
    }

    /// Refused if a file is used for something.
    pub fn check_free(&mut self, meta: &Metadata, path: &Path) -> Result<(), Refusal> {
        let mark = self.mark();
        self.take(Identity::of(meta), Role::Mapped(u32::MAX), path)?;
        self.back_to(mark);
        Ok(())
    }

    /// A file that is free is used as a disk under mapped devices.
    pub fn take_mapped(&mut self, meta: &Metadata, number: u32, path: &Path) {
        let role = Role::Mapped(number);
        self.files.push((Identity::of(meta), role, path.to_owned()));
    }

    /// It is not used any more.
    pub fn give_back_mapped(&mut self, number: u32) {
        self.give_back(&Role::Mapped(number));
    }

    /// Nothing of a volume is used any more: neither its disk nor its stores.
    pub fn give_back_volume(&mut self, volume: &str) {
        self.files.retain(|(_, role, _)| match role {
            Role::Origin(name) | Role::SharedOrigin(name) => name != volume,
            Role::Cow(export) => export.split('@').next() != Some(volume),
            Role::Mapped(_) => true,
        });
    }

    /// The snapshot `from` is called `to` from now on.
    pub fn rename_cow(&mut self, from: &str, to: &str) {
        for (_, role, _) in &mut self.files {
            if *role == Role::Cow(from.to_owned()) {
                *role = Role::Cow(to.to_owned());
            }
        }
    }

    /// The store of the snapshot `export` is not used any more.
    pub fn give_back_cow(&mut self, export: &str) {
        self.give_back(&Role::Cow(export.to_owned()));
    }
}
