//! The two arguments with a grammar of their own: `[NAME=]DISK` and
//! `VOLUME@NAME[@NEXT]...=COW[,option]...`. Only words are judged here; no file is touched.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nbdsnap_engine::StoreKind;

use super::size::{self, SizeError};
use crate::disks::{Known, SnapshotRequest, VolumeRequest, shown};
use crate::io::VolumeAccess;
use crate::names;

/// `[NAME=]DISK`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DiskSpec {
    /// The export's name.
    pub name: String,
    /// The origin's path.
    pub path: PathBuf,
}

/// `VOLUME@NAME[@NEXT]...=COW[,option]...`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SnapshotSpec {
    /// The volume it is of.
    pub volume: String,
    /// Its path within that: what stands behind the first `@`.
    pub name: String,
    /// The COW store's path.
    pub cow: PathBuf,
    /// `chunk=`, in bytes.
    pub chunk: Option<u64>,
    /// `size=`, in bytes.
    pub size: Option<u64>,
    /// P, PO or N.
    pub kind: StoreKind,
    /// `ro`.
    pub read_only: bool,
    /// `format`.
    pub format: bool,
    /// `adopt`.
    pub adopt: bool,
}

/// What is wrong with the words of an argument.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum SpecError {
    /// No path.
    #[error("no path is given")]
    NoPath,
    /// A name that cannot be one.
    #[error("the name '{name}' {why}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A DISK whose stem cannot be a name.
    #[error("the file's name '{stem}' {why}: give the export another one, as in NAME={path}")]
    Stem {
        /// The stem.
        stem: String,
        /// What is wrong with it.
        why: &'static str,
        /// The path.
        path: String,
    },
    /// A snapshot without `@` or `=`.
    #[error(
        "a snapshot is written VOLUME@NAME=COW[,option]..., one of a snapshot VOLUME@NAME@NEXT=COW"
    )]
    NotASnapshot,
    /// Something that is no option.
    #[error(
        "unknown option '{0}' after the COW path: there are chunk=SIZE, size=SIZE, transient, overflow, ro, format and adopt (a comma that is part of the path is written ',,')"
    )]
    UnknownOption(String),
    /// An option that has come before.
    #[error("the option '{0}' is given twice")]
    Twice(&'static str),
    /// `transient` and `overflow`.
    #[error("'overflow' is for persistent stores: it does not go with 'transient'")]
    TransientOverflow,
    /// A bad size.
    #[error("{option}=: {error}")]
    Size {
        /// The option.
        option: &'static str,
        /// What is wrong.
        error: SizeError,
    },
    /// Two volumes, or two snapshots of one volume, with one name.
    #[error(
        "the name '{name}' is used twice, for {first} and {second}: give one of them another, as in {example}"
    )]
    SameName {
        /// The name.
        name: String,
        /// The first path.
        first: String,
        /// The second.
        second: String,
        /// How the second could be written.
        example: String,
    },
    /// A snapshot of a volume that is not served.
    #[error("there is no volume '{volume}' for the snapshot {volume}@{name}: {known}")]
    NoVolume {
        /// The unknown one.
        volume: String,
        /// The snapshot.
        name: String,
        /// Those that are known, in words.
        known: String,
    },
}

impl DiskSpec {
    /// Read a DISK argument. What stands before the first `=` is a name, unless
    /// it contains a `/`: so `./a=b.img` is a path, and `x=./a=b.img` one with a
    /// name.
    pub(super) fn parse(text: &OsStr) -> Result<Self, SpecError> {
        if let Some((name, path)) = split(text, b'=')
            && !name.as_bytes().contains(&b'/')
        {
            if path.is_empty() {
                return Err(SpecError::NoPath);
            }
            return Ok(Self {
                name: checked_name(&name)?,
                path: path.into(),
            });
        }
        if text.is_empty() {
            return Err(SpecError::NoPath);
        }
        let path = PathBuf::from(text);
        // The last name of `.` or `/` is of no use; whoever opens it says that
        // it is a directory.
        let stem = path.file_stem().unwrap_or(OsStr::new("disk"));
        let name = checked_name(stem).map_err(|error| match error {
            SpecError::Name { name, why } => SpecError::Stem {
                stem: name,
                why,
                path: shown(&path),
            },
            other => other,
        })?;
        Ok(Self { name, path })
    }
}

impl SnapshotSpec {
    /// Read a `--snapshot` argument.
    pub(super) fn parse(text: &OsStr) -> Result<Self, SpecError> {
        let (names, rest) = split(text, b'=').ok_or(SpecError::NotASnapshot)?;
        let (volume, name) = split(&names, b'@').ok_or(SpecError::NotASnapshot)?;
        let mut words = words(rest.as_bytes()).into_iter();
        let cow = words
            .next()
            .filter(|path| !path.is_empty())
            .ok_or(SpecError::NoPath)?;
        let mut options = Options::default();
        for word in words {
            options.take(&String::from_utf8_lossy(&word))?;
        }
        Ok(Self {
            volume: checked_name(&volume)?,
            name: checked_path(&name)?,
            cow: OsString::from_vec(cow).into(),
            chunk: options.chunk,
            size: options.size,
            kind: match (options.transient, options.overflow) {
                (false, false) => StoreKind::Persistent,
                (false, true) => StoreKind::PersistentOverflow,
                (true, false) => StoreKind::Transient,
                (true, true) => return Err(SpecError::TransientOverflow),
            },
            read_only: options.ro,
            format: options.format,
            adopt: options.adopt,
        })
    }
}

#[derive(Default)]
struct Options {
    chunk: Option<u64>,
    size: Option<u64>,
    transient: bool,
    overflow: bool,
    ro: bool,
    format: bool,
    adopt: bool,
}

impl Options {
    fn take(&mut self, word: &str) -> Result<(), SpecError> {
        let flag = |flag: &mut bool, name| {
            if std::mem::replace(flag, true) {
                Err(SpecError::Twice(name))
            } else {
                Ok(())
            }
        };
        let size = |slot: &mut Option<u64>, option, text| {
            let bytes = size::parse(text).map_err(|error| SpecError::Size { option, error })?;
            if slot.replace(bytes).is_some() {
                Err(SpecError::Twice(option))
            } else {
                Ok(())
            }
        };
        match word.split_once('=') {
            Some(("chunk", text)) => size(&mut self.chunk, "chunk", text),
            Some(("size", text)) => size(&mut self.size, "size", text),
            None if word == "transient" => flag(&mut self.transient, "transient"),
            None if word == "overflow" => flag(&mut self.overflow, "overflow"),
            None if word == "ro" => flag(&mut self.ro, "ro"),
            None if word == "format" => flag(&mut self.format, "format"),
            None if word == "adopt" => flag(&mut self.adopt, "adopt"),
            _ => Err(SpecError::UnknownOption(word.to_owned())),
        }
    }
}

/// Put snapshots to their volumes; names must be unique.
pub(super) fn assemble(
    disks: Vec<DiskSpec>,
    snapshots: Vec<SnapshotSpec>,
    access: VolumeAccess,
) -> Result<Vec<VolumeRequest>, SpecError> {
    let mut volumes: Vec<VolumeRequest> = Vec::new();
    for DiskSpec { name, path } in disks {
        if let Some(first) = volumes.iter().find(|volume| volume.name == name) {
            return Err(same_name(name, &first.path, &path, "NAME"));
        }
        volumes.push(VolumeRequest {
            name,
            path,
            access,
            snapshots: Vec::new(),
        });
    }
    for snapshot in snapshots {
        let here = |volume: &VolumeRequest| volume.name == snapshot.volume;
        let Some(place) = volumes.iter().position(here) else {
            let known = volumes.iter().map(|volume| format!("'{}'", volume.name));
            let known: Vec<String> = known.collect();
            return Err(SpecError::NoVolume {
                volume: snapshot.volume,
                name: snapshot.name,
                known: if known.is_empty() {
                    "there are none".into()
                } else {
                    format!("there is {}", known.join(", "))
                },
            });
        };
        let volume = &mut volumes[place];
        if let Some(first) = volume
            .snapshots
            .iter()
            .find(|other| other.name == snapshot.name)
        {
            let name = format!("{}@{}", snapshot.volume, snapshot.name);
            let other = names::origin_export(&snapshot.volume, &snapshot.name) + "@NAME";
            return Err(same_name(name, &first.cow, &snapshot.cow, &other));
        }
        volume.snapshots.push(SnapshotRequest {
            name: snapshot.name,
            cow: snapshot.cow,
            kind: snapshot.kind,
            chunk: snapshot.chunk,
            size: snapshot.size,
            read_only: snapshot.read_only,
            format: snapshot.format,
            adopt: snapshot.adopt,
            must_exist: false,
            known: Known::default(),
            behaviour: None,
        });
    }
    Ok(volumes)
}

fn same_name(name: String, first: &Path, second: &Path, other: &str) -> SpecError {
    SpecError::SameName {
        name,
        first: shown(first),
        second: shown(second),
        example: format!("{other}={}", shown(second)),
    }
}

fn split(text: &OsStr, at: u8) -> Option<(OsString, OsString)> {
    let bytes = text.as_bytes();
    let place = bytes.iter().position(|byte| *byte == at)?;
    let part = |bytes: &[u8]| OsStr::from_bytes(bytes).to_owned();
    Some((part(&bytes[..place]), part(&bytes[place + 1..])))
}

/// The words between commas; `,,` is a comma that belongs to its word.
fn words(text: &[u8]) -> Vec<Vec<u8>> {
    let mut words = vec![Vec::new()];
    let mut bytes = text.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        let word = words.last_mut().expect("there is one from the beginning");
        if byte != b',' {
            word.push(byte);
        } else if bytes.next_if_eq(&b',').is_some() {
            word.push(b',');
        } else {
            words.push(Vec::new());
        }
    }
    words
}

fn checked_name(name: &OsStr) -> Result<String, SpecError> {
    let refused = |why| SpecError::Name {
        name: shown(Path::new(name)),
        why,
    };
    let text = name.to_str().ok_or_else(|| refused("is not UTF-8"))?;
    match names::fault(text) {
        None => Ok(text.to_owned()),
        Some(why) => Err(refused(why)),
    }
}

fn checked_path(path: &OsStr) -> Result<String, SpecError> {
    let refused = |name: &str, why| SpecError::Name {
        name: shown(Path::new(name)),
        why,
    };
    let not_utf8 = || refused(&path.to_string_lossy(), "is not UTF-8");
    let text = path.to_str().ok_or_else(not_utf8)?;
    match names::path_fault(text) {
        None => Ok(text.to_owned()),
        Some((name, why)) => Err(refused(name, why)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(text: &str) -> Result<(String, String), SpecError> {
        DiskSpec::parse(OsStr::new(text))
            .map(|spec| (spec.name, spec.path.to_str().unwrap().to_owned()))
    }

    fn snapshot(text: &str) -> Result<SnapshotSpec, SpecError> {
        SnapshotSpec::parse(OsStr::new(text))
    }

    #[test]
    fn a_disk_is_named_by_its_stem_or_by_name() {
        for (text, name, path) in [
            ("disk.img", "disk", "disk.img"),
            ("/dev/vg/root", "root", "/dev/vg/root"),
            ("a.b.img", "a.b", "a.b.img"),
            (".hidden", ".hidden", ".hidden"),
            ("x=disk.img", "x", "disk.img"),
            ("x=./a=b.img", "x", "./a=b.img"),
            ("a,b.img", "a,b", "a,b.img"),
            (".", "disk", "."),
        ] {
            assert_eq!(disk(text), Ok((name.to_owned(), path.to_owned())), "{text}");
        }
    }

    #[test]
    fn a_name_that_cannot_be_one_is_refused() {
        assert_eq!(disk(""), Err(SpecError::NoPath));
        assert_eq!(disk("x="), Err(SpecError::NoPath));
        for text in ["=disk.img", "a@b=disk.img", "a\nb=disk.img"] {
            assert!(matches!(disk(text), Err(SpecError::Name { .. })), "{text}");
        }
        for text in ["./a=b.img", "/dev/a@b", "a\u{7f}b"] {
            assert!(matches!(disk(text), Err(SpecError::Stem { .. })), "{text}");
        }
        let long = "n".repeat(256);
        assert!(disk(&format!("{long}=x")).is_err());
        assert!(disk(&format!("{}=x", &long[1..])).is_ok());
        let latin1 = OsString::from_vec(b"\xe9.img".to_vec());
        assert!(matches!(
            DiskSpec::parse(&latin1),
            Err(SpecError::Stem { .. })
        ));
    }

    #[test]
    fn a_snapshot_has_options_after_its_path() {
        let plain = snapshot("disk@s1=s1.cow").unwrap();
        assert_eq!(
            plain,
            SnapshotSpec {
                volume: "disk".into(),
                name: "s1".into(),
                cow: "s1.cow".into(),
                chunk: None,
                size: None,
                kind: StoreKind::Persistent,
                read_only: false,
                format: false,
                adopt: false,
            }
        );
        let full = snapshot("disk@s1=s1.cow,size=1G,ro,chunk=16K,overflow,format").unwrap();
        assert_eq!(
            full,
            SnapshotSpec {
                chunk: Some(16384),
                size: Some(1 << 30),
                kind: StoreKind::PersistentOverflow,
                read_only: true,
                format: true,
                ..plain.clone()
            }
        );
        assert_eq!(
            snapshot("disk@s1=s1.cow,transient").unwrap().kind,
            StoreKind::Transient
        );
    }

    #[test]
    fn a_snapshot_of_a_snapshot_is_named_behind_it() {
        let next = snapshot("disk@a@b=b.cow,ro").unwrap();
        assert_eq!((&*next.volume, &*next.name), ("disk", "a@b"));
        assert_eq!(next.cow, Path::new("b.cow"));
    }

    #[test]
    fn commas_and_equals_signs_in_paths() {
        assert_eq!(
            snapshot("d@s=a=b.cow,ro").unwrap().cow,
            Path::new("a=b.cow")
        );
        assert_eq!(
            snapshot("d@s=a,,b.cow,ro").unwrap().cow,
            Path::new("a,b.cow")
        );
        let odd = snapshot("d@s=a,,,ro").unwrap();
        assert_eq!((odd.cow.as_path(), odd.read_only), (Path::new("a,"), true));
        assert_eq!(
            snapshot("d@s=a,b.cow"),
            Err(SpecError::UnknownOption("b.cow".into()))
        );
        assert_eq!(snapshot("d@s=a@b").unwrap().cow, Path::new("a@b"));
    }

    #[test]
    fn what_is_no_snapshot_is_refused() {
        for text in ["", "disk", "disk@s1", "disk=cow", "=cow"] {
            assert_eq!(snapshot(text), Err(SpecError::NotASnapshot), "{text}");
        }
        for text in ["d@s=", "d@s=,ro"] {
            assert_eq!(snapshot(text), Err(SpecError::NoPath), "{text}");
        }
        for text in ["@s=cow", "d@=cow", "d@s@=cow", "d@@t=cow", "d/e@s=cow"] {
            assert!(
                matches!(snapshot(text), Err(SpecError::Name { .. })),
                "{text}"
            );
        }
        for word in ["rw", "", "chunk", "ro=1", "chunks=4K", " ro"] {
            let text = format!("d@s=cow,{word}");
            assert_eq!(
                snapshot(&text),
                Err(SpecError::UnknownOption(word.to_owned())),
                "{text}"
            );
        }
        assert_eq!(snapshot("d@s=cow,ro,ro"), Err(SpecError::Twice("ro")));
        assert_eq!(
            snapshot("d@s=cow,chunk=4K,chunk=4K"),
            Err(SpecError::Twice("chunk"))
        );
        assert_eq!(
            snapshot("d@s=cow,transient,overflow"),
            Err(SpecError::TransientOverflow)
        );
        assert!(matches!(
            snapshot("d@s=cow,size=1.5G"),
            Err(SpecError::Size { option: "size", .. })
        ));
    }

    #[test]
    fn names_are_unique_and_volumes_known() {
        let disks = |texts: &[&str]| {
            texts
                .iter()
                .map(|text| DiskSpec::parse(OsStr::new(text)).unwrap())
                .collect()
        };
        let snapshots = |texts: &[&str]| texts.iter().map(|text| snapshot(text).unwrap()).collect();
        let volumes = assemble(
            disks(&["a.img", "b.img"]),
            snapshots(&["b@s=1", "a@s=2", "b@t=3"]),
            VolumeAccess::ReadOnly,
        )
        .unwrap();
        let names: Vec<Vec<&str>> = volumes
            .iter()
            .map(|volume| volume.snapshots.iter().map(|s| s.name.as_str()).collect())
            .collect();
        assert_eq!(names, [vec!["s"], vec!["s", "t"]]);
        assert!(
            volumes
                .iter()
                .all(|volume| volume.access == VolumeAccess::ReadOnly)
        );
        let same = assemble(
            disks(&["x/a.img", "y/a.raw"]),
            vec![],
            VolumeAccess::ReadWrite,
        );
        assert!(matches!(same, Err(SpecError::SameName { .. })));
        let same = assemble(
            disks(&["a.img"]),
            snapshots(&["a@s=1", "a@s=2"]),
            VolumeAccess::ReadWrite,
        );
        assert!(matches!(same, Err(SpecError::SameName { .. })));
        let none = assemble(
            disks(&["a.img"]),
            snapshots(&["b@s=1"]),
            VolumeAccess::ReadWrite,
        );
        assert!(matches!(none, Err(SpecError::NoVolume { .. })));
    }
}
