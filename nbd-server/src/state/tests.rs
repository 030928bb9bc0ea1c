//! The power goes away between any two steps of any change; what is found at the
//! next start must be the old or the new, whole.

mod records;
mod shared;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::attached::{Attached, Mark};
use super::files::{FileIdentity, Files, SystemFiles, beside};
use super::keeper::{Change, Keeper, StateError};
use super::record::{IntentFile, SnapshotRecord, State, VolumeRecord};
use crate::control::protocol::Kind;

/// A file of the simulated file system.
#[derive(Clone, Debug, PartialEq)]
struct File {
    number: u64,
    bytes: Vec<u8>,
}

/// What happened to names since their folder was synced.
#[derive(Clone, Debug)]
enum Step {
    Put(PathBuf, File),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
}

fn apply(names: &mut BTreeMap<PathBuf, File>, step: &Step) {
    match step {
        Step::Put(path, file) => drop(names.insert(path.clone(), file.clone())),
        Step::Rename(from, to) => {
            if let Some(file) = names.remove(from) {
                names.insert(to.clone(), file);
            }
        }
        Step::Remove(path) => drop(names.remove(path)),
    }
}

/// Folders whose names reach the disk in order, each folder for itself, at the
/// latest when it is synced. What is in a file reaches it when it is written.
#[derive(Debug, Default)]
struct Disk {
    durable: BTreeMap<PathBuf, File>,
    now: BTreeMap<PathBuf, File>,
    unsynced: BTreeMap<PathBuf, Vec<Step>>,
    next: u64,
    /// Steps until the power goes.
    left: Option<u32>,
}

impl Disk {
    fn step(&mut self, folder: &Path, step: Step) -> io::Result<()> {
        self.spend()?;
        apply(&mut self.now, &step);
        self.unsynced
            .entry(folder.to_owned())
            .or_default()
            .push(step);
        Ok(())
    }

    fn spend(&mut self) -> io::Result<()> {
        match &mut self.left {
            Some(0) => Err(io::Error::other("the power is gone")),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Of each folder, some of the first unsynced steps were done.
    fn cut_power(&mut self, mut choose: impl FnMut(usize) -> usize) {
        for (_, steps) in std::mem::take(&mut self.unsynced) {
            let done = choose(steps.len() + 1);
            for step in &steps[..done] {
                apply(&mut self.durable, step);
            }
        }
        self.now = self.durable.clone();
        self.left = None;
    }
}

#[derive(Clone, Debug, Default)]
struct SimFiles(Rc<RefCell<Disk>>);

impl SimFiles {
    fn put(&self, path: &str, bytes: &[u8]) {
        let mut files = self.clone();
        files.write(Path::new(path), bytes).unwrap();
        files
            .sync_folder(Path::new(path).parent().unwrap())
            .unwrap();
    }

    fn has(&self, path: &str) -> bool {
        self.0.borrow().now.contains_key(Path::new(path))
    }
}

impl Files for SimFiles {
    fn read(&self, path: &Path) -> io::Result<Option<Vec<u8>>> {
        Ok(self.0.borrow().now.get(path).map(|file| file.bytes.clone()))
    }

    fn write(&mut self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut disk = self.0.borrow_mut();
        disk.next += 1;
        let file = File {
            number: disk.next,
            bytes: bytes.to_vec(),
        };
        let folder = path.parent().unwrap();
        disk.step(folder, Step::Put(path.to_owned(), file))
    }

    fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        assert_eq!(from.parent(), to.parent());
        let step = Step::Rename(from.to_owned(), to.to_owned());
        self.0.borrow_mut().step(to.parent().unwrap(), step)
    }

    fn remove(&mut self, path: &Path) -> io::Result<()> {
        let step = Step::Remove(path.to_owned());
        self.0.borrow_mut().step(path.parent().unwrap(), step)
    }

    fn sync_folder(&mut self, folder: &Path) -> io::Result<()> {
        let mut disk = self.0.borrow_mut();
        disk.spend()?;
        for step in disk.unsynced.remove(folder).unwrap_or_default() {
            apply(&mut disk.durable, &step);
        }
        Ok(())
    }

    fn identify(&self, path: &Path) -> io::Result<Option<FileIdentity>> {
        let disk = self.0.borrow();
        Ok(disk.now.get(path).map(|file| FileIdentity {
            device: 1,
            inode: file.number,
            born: 0,
        }))
    }
}

#[allow(clippy::unnecessary_wraps)]
fn locate(disk: &Path, _: Option<&Path>) -> io::Result<PathBuf> {
    Ok(beside(disk, ".nbdsnap"))
}

fn open(files: &SimFiles) -> Result<Keeper<SimFiles>, StateError> {
    Keeper::open_with(files.clone(), Some("/state".into()), locate)
}

fn snapshot(name: &str, cow: &str) -> SnapshotRecord {
    SnapshotRecord {
        name: name.into(),
        cow: cow.into(),
        kind: Kind::Persistent,
        limit: Some(1 << 30),
        bytes: Some(1 << 20),
        read_only: false,
        on_full: crate::control::protocol::WhenFull::Invalidate,
        auto_extend: None,
        taken_at: Some(1_700_000_000),
        merging: false,
        delete_cow: false,
        anew: None,
    }
}

fn volume(name: &str, snapshots: &[SnapshotRecord]) -> VolumeRecord {
    VolumeRecord {
        name: name.into(),
        disk: format!("/disks/{name}").into(),
        read_only: false,
        shared: false,
        snapshots: snapshots.to_vec(),
    }
}

fn state(a: &[SnapshotRecord], b: &[SnapshotRecord]) -> State {
    State {
        volumes: vec![volume("a", a), volume("b", b)],
    }
}

fn to_make(path: &str) -> IntentFile {
    IntentFile::to_make(path.into())
}

/// A change, with the files that it makes on the way.
type Play = fn(&mut Keeper<SimFiles>, &mut SimFiles) -> Result<(), StateError>;

fn make(
    keeper: &mut Keeper<SimFiles>,
    files: &mut SimFiles,
    next: State,
    new: &[&str],
) -> Result<Change, StateError> {
    let mut change = keeper.begin(next, new.iter().map(|path| to_make(path)).collect())?;
    for path in new {
        let (path, folder) = (Path::new(path), Path::new("/cows"));
        let made_as = change.made_as(path).unwrap();
        let made = files
            .write(&made_as, b"")
            .and_then(|()| files.sync_folder(folder));
        if made.is_err() {
            keeper.abandon(change)?;
            panic!("only the power can fail, and then abandoning fails too");
        }
        keeper.made(&mut change, &[path.to_owned()])?;
        let named = files
            .rename(&made_as, path)
            .and_then(|()| files.sync_folder(folder));
        if named.is_err() {
            keeper.abandon(change)?;
            panic!("only the power can fail, and then abandoning fails too");
        }
    }
    Ok(change)
}

fn old_one() -> SnapshotRecord {
    snapshot("old", "/cows/old")
}

fn create_group(keeper: &mut Keeper<SimFiles>, files: &mut SimFiles) -> Result<(), StateError> {
    let next = state(
        &[old_one(), snapshot("x", "/cows/ax")],
        &[snapshot("x", "/cows/bx")],
    );
    let mut change = make(keeper, files, next, &["/cows/ax", "/cows/bx"])?;
    keeper.commit(&mut change)?;
    keeper.finish(change)
}

fn fail_and_abandon(keeper: &mut Keeper<SimFiles>, files: &mut SimFiles) -> Result<(), StateError> {
    let next = state(&[old_one(), snapshot("x", "/cows/ax")], &[]);
    let change = make(keeper, files, next, &["/cows/ax"])?;
    keeper.abandon(change)
}

fn remove_and_delete(
    keeper: &mut Keeper<SimFiles>,
    files: &mut SimFiles,
) -> Result<(), StateError> {
    let identity = files.identify(Path::new("/cows/old")).unwrap().unwrap();
    let given_up = IntentFile::given_up("/cows/old".into(), identity);
    let mut change = keeper.begin(state(&[], &[]), vec![given_up])?;
    keeper.commit(&mut change)?;
    keeper.finish(change)
}

fn begin_merge(keeper: &mut Keeper<SimFiles>, _: &mut SimFiles) -> Result<(), StateError> {
    let mut merging = old_one();
    merging.merging = true;
    let mut change = keeper.begin(state(&[merging], &[]), Vec::new())?;
    keeper.commit(&mut change)?;
    keeper.finish(change)
}

/// A server with two disks, one snapshot, and somebody else's file.
fn prepared() -> SimFiles {
    let files = SimFiles::default();
    files.put("/cows/old", b"store");
    files.put("/cows/foreign", b"not ours");
    let mut keeper = open(&files).unwrap();
    let mut change = keeper.begin(state(&[old_one()], &[]), Vec::new()).unwrap();
    keeper.commit(&mut change).unwrap();
    keeper.finish(change).unwrap();
    files
}

/// Every file is where the state says, and every list says what the state says.
fn check(files: &SimFiles, keeper: &Keeper<SimFiles>, what: &str) {
    assert!(files.has("/cows/foreign"), "{what}: somebody else's file");
    let named = keeper.state().cows();
    for cow in ["/cows/old", "/cows/ax", "/cows/bx"] {
        let wanted = named.contains(std::ffi::OsStr::new(cow));
        assert_eq!(files.has(cow), wanted, "{what}: {cow}");
    }
    let unnamed =
        |path: &PathBuf| path.starts_with("/cows") && path.extension() == Some("new".as_ref());
    let left = files
        .0
        .borrow()
        .now
        .keys()
        .find(|path| unnamed(path))
        .cloned();
    assert_eq!(left, None, "{what}: a file that was being made");
    let lists = keeper.state().lists();
    for disk in ["/disks/a", "/disks/b"] {
        let list = keeper.list(Path::new(disk)).unwrap();
        let wanted = lists.get(Path::new(disk)).cloned();
        assert_eq!(
            *list,
            wanted.unwrap_or_default(),
            "{what}: the list of {disk}"
        );
    }
    assert!(!files.has("/state/intent"), "{what}: the intent is settled");
}

/// The power goes after each number of steps, and of what was not synced any
/// first part is there. Answers how often the old and the new were found.
fn cut_everywhere(play: Play) -> (u32, u32) {
    let (mut old, mut new) = (0, 0);
    for steps in 0.. {
        let mut cuts = 0;
        for choice in 0..16 {
            let mut files = prepared();
            let mut keeper = open(&files).unwrap();
            let before = keeper.state().clone();
            files.0.borrow_mut().left = Some(steps);
            let ended = play(&mut keeper, &mut files);
            let after = keeper.state().clone();
            let mut bits = choice;
            files.0.borrow_mut().cut_power(|options| {
                let chosen = bits % options;
                bits /= options;
                chosen
            });
            let found = open(&files).unwrap();
            let what = format!("after {steps} steps, choice {choice}");
            check(&files, &found, &what);
            if ended.is_ok() {
                assert_eq!(*found.state(), after, "{what}: what was done stays done");
            } else {
                cuts += 1;
                if *found.state() == before {
                    old += 1;
                } else {
                    new += 1;
                }
            }
        }
        if cuts == 0 {
            break;
        }
    }
    (old, new)
}

#[test]
fn a_power_cut_leaves_a_change_done_or_undone() {
    for (name, play) in [
        ("group", create_group as Play),
        ("removal", remove_and_delete),
        ("merge", begin_merge),
    ] {
        let (old, new) = cut_everywhere(play);
        println!("{name}: {old} times the old, {new} times the new");
        assert!(old > 0 && new > 0, "{name}: the cuts reach both sides");
    }
    let (old, new) = cut_everywhere(fail_and_abandon);
    assert!(old > 0 && new == 0, "what is abandoned never comes: {new}");
}

#[test]
fn a_store_is_listed_before_it_must_not_miss_a_write_and_until_it_may() {
    let mut files = prepared();
    let mut keeper = open(&files).unwrap();
    let next = state(&[old_one(), snapshot("x", "/cows/ax")], &[]);
    let mut change = make(&mut keeper, &mut files, next, &["/cows/ax"]).unwrap();
    let disk = Path::new("/disks/a");
    assert!(
        keeper
            .list(disk)
            .unwrap()
            .find(Path::new("/cows/ax"))
            .is_some()
    );
    keeper.commit(&mut change).unwrap();
    keeper.finish(change).unwrap();

    let mut change = keeper.begin(state(&[], &[]), Vec::new()).unwrap();
    assert_eq!(
        keeper.list(disk).unwrap().stores.len(),
        2,
        "until the commit"
    );
    keeper.commit(&mut change).unwrap();
    assert!(keeper.list(disk).unwrap().stores.is_empty());
    keeper.finish(change).unwrap();
    assert!(!files.has("/disks/a.nbdsnap"), "an empty list is no file");
}

#[test]
fn a_file_of_somebody_else_at_the_same_path_is_not_touched() {
    let mut files = prepared();
    let mut keeper = open(&files).unwrap();
    let next = state(&[old_one(), snapshot("x", "/cows/ax")], &[]);
    let change = make(&mut keeper, &mut files, next.clone(), &["/cows/ax"]).unwrap();
    drop(change);
    // A crash; the operator puts another file there before the next start.
    files.put("/cows/ax", b"precious");
    let keeper = open(&files).unwrap();
    assert!(files.has("/cows/ax"));
    assert_eq!(keeper.state().cows().len(), 1);

    // The same where the file had not been made yet.
    let mut keeper = open(&files).unwrap();
    drop(keeper.begin(next, vec![to_make("/cows/ax")]).unwrap());
    open(&files).unwrap();
    assert!(files.has("/cows/ax"));
}

#[test]
fn a_lost_store_stays_lost_and_a_volume_that_leaves_keeps_its_list() {
    let files = prepared();
    let mut keeper = open(&files).unwrap();
    let (disk, cow) = (Path::new("/disks/a"), Path::new("/cows/old"));
    assert!(!keeper.mark_lost(disk, Path::new("/cows/else")).unwrap());
    assert!(keeper.mark_lost(disk, cow).unwrap());
    let next = state(&[old_one(), snapshot("y", "/cows/y")], &[]);
    let mut change = keeper.begin(next, Vec::new()).unwrap();
    keeper.commit(&mut change).unwrap();
    keeper.finish(change).unwrap();
    let list = keeper.list(disk).unwrap();
    assert_eq!(list.find(cow).unwrap().mark, Mark::Lost);

    let without = State {
        volumes: vec![volume("b", &[])],
    };
    let mut change = keeper.begin(without, Vec::new()).unwrap();
    keeper.commit(&mut change).unwrap();
    keeper.finish(change).unwrap();
    assert_eq!(keeper.list(disk).unwrap(), list);
}

#[test]
fn the_files_of_this_machine_do_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for name in ["state", "disks", "cows"] {
        std::fs::create_dir(at(name)).unwrap();
    }
    let open = || Keeper::open_with(SystemFiles, Some(at("state")), locate).unwrap();
    let mut keeper = open();
    let mut record = snapshot("x", "");
    record.cow = at("cows/x");
    let mut disk = volume("a", &[record]);
    disk.disk = at("disks/a");
    let next = State {
        volumes: vec![disk],
    };
    let file = IntentFile::to_make(at("cows/x"));
    let make = |keeper: &mut Keeper<SystemFiles>, change: &mut Change| {
        let made_as = change.made_as(&at("cows/x")).unwrap();
        std::fs::write(&made_as, b"").unwrap();
        keeper.made(change, &[at("cows/x")]).unwrap();
        std::fs::rename(made_as, at("cows/x")).unwrap();
    };
    let mut change = keeper.begin(next.clone(), vec![file.clone()]).unwrap();
    make(&mut keeper, &mut change);
    drop((keeper, change));
    let mut keeper = open();
    assert!(!at("cows/x").exists(), "undone");
    assert_eq!(keeper.state(), &State::default());
    let mut change = keeper.begin(next.clone(), vec![file]).unwrap();
    make(&mut keeper, &mut change);
    keeper.commit(&mut change).unwrap();
    drop((keeper, change));
    let keeper = open();
    assert!(at("cows/x").exists(), "committed");
    assert_eq!(keeper.state(), &next);
    assert!(at("disks/a.nbdsnap").exists());
    assert!(!at("state/intent").exists());
}

/// Two changes at a time, of two volumes: each is done or undone by itself, whatever
/// the power leaves of the other.
fn two_at_a_time(keeper: &mut Keeper<SimFiles>, files: &mut SimFiles) -> Result<(), StateError> {
    let a = state(&[old_one(), snapshot("x", "/cows/ax")], &[]);
    let mut first = make(keeper, files, a, &["/cows/ax"])?;
    let b = state(&[old_one()], &[snapshot("x", "/cows/bx")]);
    let mut second = make(keeper, files, b, &["/cows/bx"])?;
    keeper.commit(&mut second)?;
    keeper.finish(second)?;
    keeper.commit(&mut first)?;
    keeper.finish(first)
}

#[test]
fn changes_of_two_volumes_pass_each_other_by() {
    let (old, new) = cut_everywhere(two_at_a_time);
    assert!(old > 0 && new > 0);
    let mut files = prepared();
    let mut keeper = open(&files).unwrap();
    two_at_a_time(&mut keeper, &mut files).unwrap();
    let both = state(
        &[old_one(), snapshot("x", "/cows/ax")],
        &[snapshot("x", "/cows/bx")],
    );
    assert_eq!(*keeper.state(), both);

    // What one gives up takes nothing of the other back.
    let without_a = state(&[old_one()], &[snapshot("x", "/cows/bx")]);
    let mut first = keeper.begin(without_a, Vec::new()).unwrap();
    keeper.commit(&mut first).unwrap();
    let without_b = state(&[old_one()], &[]);
    let mut second = keeper.begin(without_b.clone(), Vec::new()).unwrap();
    keeper.commit(&mut second).unwrap();
    keeper.abandon(first).unwrap();
    assert_eq!(keeper.state().volumes[0], both.volumes[0]);
    assert_eq!(keeper.state().volumes[1], without_b.volumes[1]);
    keeper.finish(second).unwrap();
    assert!(!files.has("/state/intent"));
}
