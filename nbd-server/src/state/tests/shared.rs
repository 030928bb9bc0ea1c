//! The list of a disk that several volumes have, and other servers too: a change of
//! one of them leaves alone what belongs to the others, wherever the power goes.

use std::path::Path;

use super::super::attached::{Anew, Attached, Mark};
use super::super::files::Files;
use super::super::keeper::{Change, Keeper, StateError};
use super::super::record::{State, VolumeRecord};
use super::{Disk, Play, SimFiles, locate, make, snapshot};

const BASE: &str = "/disks/base";

/// Volumes on one base, each with the stores `/cows/NAME` that are named.
fn forks(volumes: &[(&str, &[&str])]) -> State {
    let volumes = volumes.iter().map(|(name, cows)| VolumeRecord {
        name: (*name).into(),
        disk: BASE.into(),
        read_only: false,
        shared: true,
        snapshots: cows
            .iter()
            .map(|cow| snapshot("w", &format!("/cows/{cow}")))
            .collect(),
    });
    State {
        volumes: volumes.collect(),
    }
}

fn open(files: &SimFiles, folder: &str) -> Keeper<SimFiles> {
    Keeper::open_with(files.clone(), Some(folder.into()), locate).unwrap()
}

fn change(keeper: &mut Keeper<SimFiles>, next: State) -> Result<(), StateError> {
    let mut change = keeper.begin(next, Vec::new())?;
    keeper.commit(&mut change)?;
    keeper.finish(change)
}

fn listed(keeper: &Keeper<SimFiles>) -> Vec<String> {
    let list = keeper.list(Path::new(BASE)).unwrap();
    let name = |cow: &Path| cow.file_name().unwrap().to_str().unwrap().to_owned();
    let mut names: Vec<String> = list.stores.iter().map(|one| name(&one.cow)).collect();
    names.sort_unstable();
    names
}

/// Two servers have volumes on the base, and a third that has gone had one.
fn prepared() -> SimFiles {
    let files = SimFiles::default();
    let mut gone = open(&files, "/gone");
    change(&mut gone, forks(&[("x", &["gone"])])).unwrap();
    let mut other = open(&files, "/other");
    change(&mut other, forks(&[("a", &["other"])])).unwrap();
    let mut ours = open(&files, "/state");
    change(&mut ours, forks(&[("a", &["a"]), ("b", &["b1", "b2"])])).unwrap();
    files
}

#[test]
fn each_server_changes_only_what_is_its_own() {
    let files = prepared();
    let (mut ours, mut other) = (open(&files, "/state"), open(&files, "/other"));
    assert_eq!(listed(&ours), ["a", "b1", "b2", "gone", "other"]);
    // A volume that leaves leaves its stores on the list; a snapshot takes its away.
    change(&mut ours, forks(&[("b", &["b2"])])).unwrap();
    assert_eq!(listed(&ours), ["a", "b2", "gone", "other"]);
    change(&mut other, forks(&[("a", &["other", "more"])])).unwrap();
    assert_eq!(listed(&other), ["a", "b2", "gone", "more", "other"]);
    change(&mut other, forks(&[("a", &[])])).unwrap();
    change(&mut ours, forks(&[("b", &[]), ("c", &["c"])])).unwrap();
    assert_eq!(listed(&ours), ["a", "c", "gone"]);
    // Written, it belongs to one server, which says what becomes of each store.
    let mut writable = forks(&[("disk", &["c"])]);
    writable.volumes[0].shared = false;
    let mut last = open(&files, "/last");
    change(&mut last, writable).unwrap();
    assert_eq!(listed(&last), ["c"]);
}

/// The power goes after each number of steps of `play`; `judge` is shown what is found
/// then, and whether the play had come to its end.
fn cut_everywhere(play: Play, mut judge: impl FnMut(&SimFiles, &Keeper<SimFiles>, bool, &str)) {
    for steps in 0.. {
        let mut cuts = 0;
        for choice in 0..16 {
            let mut files = prepared();
            let mut keeper = open(&files, "/state");
            files.0.borrow_mut().left = Some(steps);
            let ended = play(&mut keeper, &mut files);
            let mut bits = choice;
            let choose = |options| {
                let chosen = bits % options;
                bits /= options;
                chosen
            };
            Disk::cut_power(&mut files.0.borrow_mut(), choose);
            let found = open(&files, "/state");
            let what = format!("after {steps} steps, choice {choice}");
            judge(&files, &found, ended.is_ok(), &what);
            cuts += u32::from(ended.is_err());
        }
        if cuts == 0 {
            break;
        }
    }
}

fn one_change() -> State {
    forks(&[("a", &["a"]), ("b", &["b2"]), ("c", &["c"])])
}

#[test]
fn a_power_cut_leaves_what_belongs_to_others_alone() {
    let play: Play = |keeper, files| {
        let mut made = make(keeper, files, one_change(), &["/cows/c"])?;
        keeper.commit(&mut made)?;
        keeper.finish(made)
    };
    let (mut old, mut new) = (0, 0);
    cut_everywhere(play, |files, found, ended, what| {
        let is_new = *found.state() == one_change();
        assert!(!ended || is_new, "{what}: what was done stays done");
        if is_new {
            assert_eq!(listed(found), ["a", "b2", "c", "gone", "other"], "{what}");
        } else {
            assert_eq!(listed(found), ["a", "b1", "b2", "gone", "other"], "{what}");
        }
        assert_eq!(files.has("/cows/c"), is_new, "{what}");
        old += u32::from(!is_new);
        new += u32::from(is_new && !ended);
    });
    println!("{old} times the old, {new} times the new");
    assert!(old > 0 && new > 0, "the cuts reach both sides");
}

fn with_a() -> State {
    forks(&[("a", &["a", "ax"]), ("b", &["b1", "b2"])])
}

fn with_b() -> State {
    forks(&[("a", &["a"]), ("b", &["b2", "bx"])])
}

/// Two changes of two volumes on the base, the second within the first; meanwhile a
/// store of a third is lost.
fn two_at_a_time(keeper: &mut Keeper<SimFiles>, files: &mut SimFiles) -> Result<(), StateError> {
    let mut first = make(keeper, files, with_a(), &["/cows/ax"])?;
    let mut second = make(keeper, files, with_b(), &["/cows/bx"])?;
    keeper.commit(&mut second)?;
    assert!(keeper.mark_lost(Path::new(BASE), Path::new("/cows/b2"))?);
    keeper.finish(second)?;
    keeper.commit(&mut first)?;
    keeper.finish(first)
}

fn mark_of(keeper: &Keeper<SimFiles>, cow: &str) -> Option<Mark> {
    let list = keeper.list(Path::new(BASE)).unwrap();
    list.find(Path::new(cow)).map(|store| store.mark)
}

#[test]
fn two_changes_at_a_time_undo_nothing_of_each_other() {
    let both = forks(&[("a", &["a", "ax"]), ("b", &["b2", "bx"])]);
    let states = [open(&prepared(), "/state").state().clone(), with_b(), both];
    let mut found_so = [0; 3];
    cut_everywhere(two_at_a_time, |files, found, ended, what| {
        let which = states.iter().position(|state| state == found.state());
        let which = which.unwrap_or_else(|| panic!("{what}: {:?}", found.state()));
        assert!(!ended || which == 2, "{what}: what was done stays done");
        let stores: &[&str] = match which {
            0 => &["a", "b1", "b2", "gone", "other"],
            1 => &["a", "b2", "bx", "gone", "other"],
            _ => &["a", "ax", "b2", "bx", "gone", "other"],
        };
        assert_eq!(listed(found), stores, "{what}");
        for (cow, is_there) in [("/cows/ax", which == 2), ("/cows/bx", which > 0)] {
            assert_eq!(files.has(cow), is_there, "{what}: {cow}");
        }
        assert!(which < 2 || mark_of(found, "/cows/b2") == Some(Mark::Lost));
        found_so[which] += 1;
    });
    println!("{found_so:?} times none, one and both");
    assert!(found_so.iter().all(|&times| times > 0));
}

#[test]
fn a_change_that_is_given_up_beside_another_takes_nothing_of_it_back() {
    let mut files = prepared();
    let mut keeper = open(&files, "/state");
    let mut first = make(&mut keeper, &mut files, with_a(), &["/cows/ax"]).unwrap();
    keeper.commit(&mut first).unwrap();
    let next = forks(&[("a", &["a", "ax"]), ("b", &["b2", "bx"])]);
    let mut second = make(&mut keeper, &mut files, next, &["/cows/bx"]).unwrap();
    assert_eq!(
        listed(&keeper),
        ["a", "ax", "b1", "b2", "bx", "gone", "other"]
    );
    keeper.abandon(first).unwrap();
    assert_eq!(listed(&keeper), ["a", "b1", "b2", "bx", "gone", "other"]);
    keeper.commit(&mut second).unwrap();
    keeper.finish(second).unwrap();
    assert_eq!(*keeper.state(), with_b());
    assert_eq!(listed(&keeper), ["a", "b2", "bx", "gone", "other"]);
    assert!(!files.has("/cows/ax") && !files.has("/state/intent"));
}

/// Have `/cows/a` be exchanged for a new file, of 77 bytes: what is promised of it.
fn promise(keeper: &mut Keeper<SimFiles>, files: &SimFiles) -> Change {
    files.put("/cows/a", b"old");
    files.put("/cows/a.beside", b"new");
    let file = files.identify(Path::new("/cows/a.beside")).unwrap();
    let mut next = keeper.state().clone();
    next.snapshot_mut("a", "w").unwrap().anew = Some(Anew {
        file: file.unwrap(),
        bytes: 77,
        taken_at: None,
    });
    let mut change = keeper.begin(next, Vec::new()).unwrap();
    keeper.commit(&mut change).unwrap();
    change
}

fn length_of_a(keeper: &Keeper<SimFiles>) -> Option<u64> {
    let list = keeper.list(Path::new(BASE)).unwrap();
    list.find(Path::new("/cows/a")).unwrap().bytes
}

#[test]
fn a_store_that_is_about_to_be_exchanged_is_so_though_others_change_the_list() {
    let mut files = prepared();
    let mut ours = open(&files, "/state");
    let promised = promise(&mut ours, &files);
    let before = length_of_a(&ours);
    assert_ne!(before, Some(77));
    let mut other = open(&files, "/other");
    change(&mut other, forks(&[("a", &["other", "more"])])).unwrap();
    let mut next = ours.state().clone();
    next.volumes[1].snapshots.pop();
    change(&mut ours, next).unwrap();
    assert_eq!(listed(&ours), ["a", "b1", "gone", "more", "other"]);
    assert_eq!(length_of_a(&ours), before);
    let (from, to) = (Path::new("/cows/a.beside"), Path::new("/cows/a"));
    files.rename(from, to).unwrap();
    // By the list alone, too.
    assert_eq!(length_of_a(&other), Some(77));
    ours.finish(promised).unwrap();
}

#[test]
fn a_loss_is_marked_of_the_store_that_is_lost() {
    let (disk, cow) = (Path::new(BASE), Path::new("/cows/a"));
    for is_over in [false, true] {
        let mut files = prepared();
        let mut keeper = open(&files, "/state");
        let promised = promise(&mut keeper, &files);
        files.rename(Path::new("/cows/a.beside"), cow).unwrap();
        keeper.finish(promised).unwrap();
        if is_over {
            // The new one is served, and its exchange is only on the list.
            keeper = open(&files, "/state");
        }
        assert!(keeper.mark_lost(disk, cow).unwrap());
        let wanted = if is_over { Mark::Lost } else { Mark::Attached };
        assert_eq!(mark_of(&open(&files, "/state"), "/cows/a"), Some(wanted));
    }
}

#[test]
fn an_empty_list_of_a_shared_disk_is_no_file() {
    let files = SimFiles::default();
    let mut keeper = open(&files, "/state");
    change(&mut keeper, forks(&[("a", &["a"])])).unwrap();
    change(&mut keeper, forks(&[("a", &[])])).unwrap();
    assert_eq!(*keeper.list(Path::new(BASE)).unwrap(), Attached::default());
    assert!(!files.has("/disks/base.nbdsnap"));
}
