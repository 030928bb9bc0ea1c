//! Where the list of a disk is: beside an image, as `DISK.nbdsnap`; for a block
//! device in a state folder, under a name that outlives its device number. There too
//! for an image in a folder that cannot be written, under the name of its path.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::files::{self, beside};
use super::seal;

/// What stands behind an image's name.
const SUFFIX: &str = ".nbdsnap";

/// The list of `disk`, which exists. `folder` is the state folder that the
/// operator named, if one was.
pub fn list_of(disk: &Path, folder: Option<&Path>) -> io::Result<PathBuf> {
    let disk = fs::canonicalize(disk)?;
    let meta = fs::metadata(&disk)?;
    if !meta.file_type().is_block_device() {
        let wanted = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
        let can_write = rustix::fs::access(files::folder_of(&disk), wanted).is_ok();
        return Ok(of_image(&disk, folder, can_write));
    }
    match device(Path::new("/sys/dev/block"), meta.rdev()) {
        // Whoever serves the image itself finds the same list.
        Some(Device::Loop(image)) => Ok(beside(&image, SUFFIX)),
        Some(Device::Named(name)) => Ok(in_folder(folder, &name)),
        None => Ok(in_folder(folder, &seal::path::to_text(&disk))),
    }
}

/// A list of `disk` that lies beside it, though the one that is written is elsewhere:
/// whoever served the image before may have been allowed to write there.
pub fn beside_it(disk: &Path, list: &Path) -> io::Result<Option<PathBuf>> {
    let beside = beside(&fs::canonicalize(disk)?, SUFFIX);
    Ok((beside != list && beside.is_file()).then_some(beside))
}

fn of_image(disk: &Path, folder: Option<&Path>, can_write: bool) -> PathBuf {
    let name = seal::path::to_text(disk).replace('/', "%2f");
    let folder = folder.map_or_else(system_folder, Path::to_owned);
    let elsewhere = folder.join(format!("{name}{SUFFIX}"));
    // One that was begun elsewhere stays there, whoever may write what by now.
    if can_write && !elsewhere.exists() {
        beside(disk, SUFFIX)
    } else {
        elsewhere
    }
}

/// The path under which a file or device is known in records: where a file really
/// is, or will be; a device's own, which says more than what it leads to.
pub fn settled(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    match fs::metadata(&absolute) {
        Ok(meta) if meta.file_type().is_block_device() => absolute,
        Ok(_) => fs::canonicalize(&absolute).unwrap_or(absolute),
        Err(_) => match (
            absolute.parent().map(fs::canonicalize),
            absolute.file_name(),
        ) {
            (Some(Ok(folder)), Some(name)) => folder.join(name),
            _ => absolute,
        },
    }
}

fn in_folder(folder: Option<&Path>, name: &str) -> PathBuf {
    let name: String = name
        .trim_start_matches('/')
        .chars()
        .map(|c| {
            if c == '/' || c.is_whitespace() {
                '-'
            } else {
                c
            }
        })
        .collect();
    let folder = folder.map_or_else(system_folder, Path::to_owned);
    folder.join(format!("{name}{SUFFIX}"))
}

/// Where the lists of block devices are if nobody names a state folder.
pub fn system_folder() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return PathBuf::from("/var/lib/nbdsnap");
    }
    let home = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    match (home("XDG_STATE_HOME"), home("HOME")) {
        (Some(state), _) => PathBuf::from(state).join("nbdsnap"),
        (None, Some(home)) => PathBuf::from(home).join(".local/state/nbdsnap"),
        (None, None) => PathBuf::from("/var/lib/nbdsnap"),
    }
}

/// What a block device is, where it says so.
#[derive(Debug, PartialEq, Eq)]
enum Device {
    /// All of an image, as a loop device.
    Loop(PathBuf),
    /// A name that its numbers and its path may change under.
    Named(String),
}

/// Ask the kernel's description of a device, in `sys`.
fn device(sys: &Path, number: u64) -> Option<Device> {
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let about = sys.join(format!("{major}:{minor}"));
    let line = |name: &str| {
        let text = fs::read_to_string(about.join(name)).ok()?;
        let text = text.trim().to_owned();
        (!text.is_empty()).then_some(text)
    };
    if let Some(image) = line("loop/backing_file")
        && line("loop/offset").is_some_and(|offset| offset == "0")
        && line("loop/sizelimit").is_some_and(|limit| limit == "0")
    {
        return Some(Device::Loop(image.into()));
    }
    // A partition has its disk's name and its own number.
    let (name, partition) = match line("partition") {
        Some(number) => ("../", format!("-part{number}")),
        None => ("", String::new()),
    };
    ["dm/uuid", "md/uuid", "wwid", "device/wwid", "serial"]
        .iter()
        .find_map(|file| line(&format!("{name}{file}")))
        .map(|id| Device::Named(format!("{id}{partition}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn describe(about: &Path, files: &[(&str, &str)]) {
        for (name, text) in files {
            let path = about.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        }
    }

    #[test]
    fn devices_have_names_that_last() {
        let sys = tempfile::tempdir().unwrap();
        let number = rustix::fs::makedev(253, 4);
        let about = sys.path().join("253:4");
        assert_eq!(device(sys.path(), number), None);
        describe(&about, &[("dm/uuid", "LVM-abc"), ("wwid", "x")]);
        let named = Some(Device::Named("LVM-abc".into()));
        assert_eq!(device(sys.path(), number), named);

        let number = rustix::fs::makedev(7, 0);
        let about = sys.path().join("7:0");
        let whole = [
            ("loop/backing_file", "/a/disk.img"),
            ("loop/offset", "0"),
            ("loop/sizelimit", "0"),
        ];
        describe(&about, &whole);
        let image = Some(Device::Loop("/a/disk.img".into()));
        assert_eq!(device(sys.path(), number), image);
        describe(&about, &[("loop/offset", "1048576")]);
        assert_eq!(device(sys.path(), number), None, "only a part of the image");
    }

    #[test]
    fn the_list_of_an_image_is_beside_it_whatever_path_leads_there() {
        let folder = tempfile::tempdir().unwrap();
        let folder = fs::canonicalize(folder.path()).unwrap();
        let image = folder.join("disk.img");
        fs::write(&image, [0; 512]).unwrap();
        std::os::unix::fs::symlink(&image, folder.join("link")).unwrap();
        let list = folder.join("disk.img.nbdsnap");
        for path in ["disk.img", "link", "./disk.img"] {
            assert_eq!(list_of(&folder.join(path), None).unwrap(), list);
        }
        assert!(list_of(&folder.join("absent"), None).is_err());
    }

    #[test]
    fn the_list_of_an_image_that_lies_where_nobody_writes_is_in_the_state_folder() {
        let folder = tempfile::tempdir().unwrap();
        let folder = fs::canonicalize(folder.path()).unwrap();
        let image = folder.join("golden image");
        fs::write(&image, [0; 512]).unwrap();
        let state = folder.join("state");
        let list = of_image(&image, Some(&state), false);
        assert_eq!(list.parent(), Some(state.as_path()));
        let beside = beside(&image, SUFFIX);
        assert_eq!(of_image(&image, Some(&state), true), beside);
        assert_eq!(beside_it(&image, &list).unwrap(), None);
        // What somebody else has written beside it counts too.
        fs::write(&beside, []).unwrap();
        assert_eq!(beside_it(&image, &list).unwrap(), Some(beside.clone()));
        assert_eq!(beside_it(&image, &beside).unwrap(), None);
        // Once begun, it stays where it is.
        fs::create_dir(&state).unwrap();
        fs::write(&list, []).unwrap();
        assert_eq!(of_image(&image, Some(&state), true), list);
        // No two paths have the same.
        let other = of_image(Path::new("/a/b-c"), Some(&state), false);
        assert_ne!(other, of_image(Path::new("/a-b/c"), Some(&state), false));
    }

    #[test]
    fn names_in_a_folder_have_no_slashes() {
        let folder = Path::new("/state");
        let path = in_folder(Some(folder), "/dev/disk one");
        assert_eq!(path, Path::new("/state/dev-disk-one.nbdsnap"));
    }
}
