//! The disks under mapped devices: files and block devices, opened when a table first
//! names them, closed when none does any more.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nbdsnap_engine::dm::{DeviceId, DeviceInfo, DiskId, Lower};

use super::{Done, refused};
use crate::control::dm::{DmDep, MAJOR};
use crate::disks::{self, Opening};
use crate::server::admin::refusal::Refused;
use crate::server::admin::turn::Turn;

/// The folder that the kernel shows its mapped devices in.
const FOLDER: &str = "/dev/mapper/";

/// Minor numbers from here on are those of volumes and their snapshots.
const FIRST_SERVED: u32 = 1 << 19;

/// The disks that are open.
#[derive(Debug, Default)]
pub(in crate::server::admin) struct DmDisks {
    disks: BTreeMap<DiskId, DmDisk>,
    /// How many tables are being loaded that may name disks from so many on: none of
    /// these is closed.
    loads: u32,
    /// Minor numbers of volumes and their snapshots, by their exports.
    served: BTreeMap<String, u32>,
    /// Merges that `snapshot merge` began: these devices go when it is done.
    merges: BTreeMap<DeviceId, DmMerge>,
}

/// A merge that `snapshot merge` began.
#[derive(Clone, Debug)]
pub(super) struct DmMerge {
    /// What the snapshot's device was called.
    pub(super) name: String,
    /// Delete the file of the store at the end.
    pub(super) delete_cow: bool,
    /// Chunks that there were when it began.
    pub(super) total_chunks: u64,
}

#[derive(Debug)]
struct DmDisk {
    path: PathBuf,
    /// Of a block device.
    numbers: Option<(u32, u32)>,
}

/// As long as a table is being loaded, no disk is closed.
#[derive(Debug)]
pub(super) struct Pins;

impl DmDisks {
    pub(super) fn pins(&mut self) -> Pins {
        self.loads += 1;
        Pins
    }

    pub(super) fn unpin(&mut self, _: Pins) {
        self.loads -= 1;
    }

    /// A merge of a device's snapshot begins.
    pub(super) fn begin_merge(&mut self, id: DeviceId, merge: DmMerge) {
        self.merges.insert(id, merge);
    }

    /// It is done, or given up.
    pub(super) fn end_merge(&mut self, id: DeviceId) {
        self.merges.remove(&id);
    }

    /// The merge that `snapshot merge` began of a device's snapshot. (One by another
    /// name has come in its place.)
    pub(super) fn merge_of(&self, info: &DeviceInfo) -> Option<&DmMerge> {
        let merge = self.merges.get(&info.id);
        merge.filter(|merge| merge.name == info.name)
    }

    /// The end of a device's merge is still to be seen to.
    pub(super) fn has_merge(&self, id: DeviceId) -> bool {
        self.merges.contains_key(&id)
    }

    /// There are merges whose end is to be seen to.
    pub(in crate::server::admin) fn has_merges(&self) -> bool {
        !self.merges.is_empty()
    }

    /// The path of a disk that is a file.
    pub(super) fn file_of(&self, id: DiskId) -> Option<&Path> {
        let disk = self.disks.get(&id)?;
        disk.numbers.is_none().then_some(&disk.path)
    }

    fn text(&self, id: DiskId) -> String {
        match self.disks.get(&id) {
            Some(DmDisk {
                numbers: Some((major, minor)),
                ..
            }) => format!("{major}:{minor}"),
            Some(DmDisk { path, .. }) => path.display().to_string(),
            None => "?".into(),
        }
    }

    /// Where a disk is.
    pub(super) fn path_of(&self, lower: Lower) -> String {
        match lower {
            Lower::Disk(id) => match self.disks.get(&id) {
                Some(disk) => disk.path.display().to_string(),
                None => "?".into(),
            },
            Lower::Device(_) => self.text_of(lower),
        }
    }

    /// The minor number by which `dm` calls a volume or a snapshot, as long as the
    /// server runs.
    pub(super) fn minor_of(&mut self, export: &str) -> u32 {
        let next = FIRST_SERVED + self.served.len() as u32;
        *self.served.entry(export.to_owned()).or_insert(next)
    }

    /// What it calls so.
    pub(super) fn served_by(&self, minor: u32) -> Option<String> {
        let mut served = self.served.iter();
        served
            .find(|(_, one)| **one == minor)
            .map(|(name, _)| name.clone())
    }

    /// What a table calls it.
    pub(super) fn text_of(&self, lower: Lower) -> String {
        match lower {
            Lower::Device(DeviceId(minor)) => format!("{MAJOR}:{minor}"),
            Lower::Disk(id) => self.text(id),
        }
    }

    /// How it is told as something that a device stands on; `name` is a device's.
    pub(super) fn dep(&self, lower: Lower, name: String) -> DmDep {
        let id = match lower {
            Lower::Device(DeviceId(minor)) => {
                let major = MAJOR;
                return DmDep::Mapped { name, major, minor };
            }
            Lower::Disk(id) => id,
        };
        let disk = self.disks.get(&id);
        let path = disk.map_or_else(PathBuf::new, |disk| disk.path.clone());
        match disk.and_then(|disk| disk.numbers) {
            Some((major, minor)) => DmDep::Block { path, major, minor },
            None => DmDep::File { path },
        }
    }
}

impl Turn<'_> {
    /// What an argument of a table names.
    pub(super) fn dm_resolve(&mut self, text: &str) -> Done<Lower> {
        let numbers = text
            .split_once(':')
            .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
        if let Some((major, minor)) = numbers {
            return self.dm_by_number(major, minor);
        }
        let name = text.strip_prefix(FOLDER).unwrap_or(text);
        if !name.contains('/') {
            let name = name.to_owned();
            let found = self.mapped(move |mapped| mapped.mapper().find(&name))?;
            if let Some(id) = found {
                return Ok(Lower::Device(id));
            }
        }
        if !text.starts_with('/') {
            let why =
                format!("{text}: no device has this name; a file is named by a path: ./{text}");
            return Err(refused(libc::ENODEV, why));
        }
        self.dm_open(Path::new(text))
    }

    fn dm_by_number(&mut self, major: u32, minor: u32) -> Done<Lower> {
        if major == MAJOR {
            let id = DeviceId(minor);
            let is_there = self.mapped(move |mapped| mapped.mapper().info(id).is_ok())?;
            if !is_there {
                return Err(refused(libc::ENODEV, "there is no such mapped device"));
            }
            return Ok(Lower::Device(id));
        }
        let known = self.dm.disks.iter();
        let mut known = known.filter(|(_, disk)| disk.numbers == Some((major, minor)));
        if let Some((&id, _)) = known.next() {
            return Ok(Lower::Disk(id));
        }
        let about = format!("/sys/dev/block/{major}:{minor}/uevent");
        let uevent = std::fs::read_to_string(about).unwrap_or_default();
        let mut names = uevent
            .lines()
            .filter_map(|line| line.strip_prefix("DEVNAME="));
        match names.next() {
            Some(name) => self.dm_open(&Path::new("/dev").join(name)),
            None => Err(refused(libc::ENODEV, "there is no such block device")),
        }
    }

    fn dm_open(&mut self, path: &Path) -> Done<Lower> {
        let meta = std::fs::metadata(path);
        let meta =
            meta.map_err(|error| refused(libc::ENODEV, format!("{}: {error}", path.display())))?;
        if let Some(id) = self.taken.mapped_disk(&meta) {
            return Ok(Lower::Disk(DiskId(id)));
        }
        let listed = self.records().list(&crate::state::place::settled(path));
        if listed.is_ok_and(|list| !list.stores.is_empty()) {
            let why = format!(
                "{}: there are stores on its list that must see every write: serve it with them, or give them up with 'nbdsnap serve --without'",
                path.display()
            );
            return Err(refused(libc::EBUSY, why));
        }
        let role = self.taken.check_free(&meta, path);
        role.map_err(|refusal| refused(libc::EBUSY, refusal.to_string()))?;
        let open = disks::existing(path, Opening::Write).map_err(|refusal| {
            let errno = if refusal.is_busy() {
                libc::EBUSY
            } else {
                libc::ENODEV
            };
            refused(errno, refusal.to_string())
        })?;
        let numbers = open.is_block_device.then(|| {
            let number = meta.rdev();
            (rustix::fs::major(number), rustix::fs::minor(number))
        });
        let id = self.mapped(move |mapped| mapped.add_disk(open))?;
        self.taken.take_mapped(&meta, id.0, path);
        let path = path.to_owned();
        self.dm.disks.insert(id, DmDisk { path, numbers });
        Ok(Lower::Disk(id))
    }

    /// Close the disks that no table names.
    pub(super) fn dm_close_unused(&mut self) -> Result<(), Refused> {
        let ids: Vec<_> = self.dm.disks.keys().copied().collect();
        if self.dm.loads > 0 || ids.is_empty() {
            return Ok(());
        }
        let closed = self.mapped(move |mapped| {
            let mut ids = ids;
            ids.retain(|&id| mapped.close_disk(id));
            ids
        })?;
        for id in closed {
            self.dm.disks.remove(&id);
            self.taken.give_back_mapped(id.0);
        }
        Ok(())
    }
}
