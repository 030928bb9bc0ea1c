//! The list of a disk that several volumes have, and other servers too: a change of
//! one of them leaves alone what belongs to the others, wherever the power goes.

use std::path::Path;

use super::super::attached::Attached;
use super::super::keeper::{Keeper, StateError};
use super::super::record::{State, VolumeRecord};
use super::{Disk, SimFiles, locate, make, snapshot};

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

#[test]
fn a_power_cut_leaves_what_belongs_to_others_alone() {
    let next = || forks(&[("a", &["a"]), ("b", &["b2"]), ("c", &["c"])]);
    let (mut old, mut new) = (0, 0);
    for steps in 0.. {
        let mut cuts = 0;
        for choice in 0..16 {
            let mut files = prepared();
            let mut keeper = open(&files, "/state");
            files.0.borrow_mut().left = Some(steps);
            let ended = make(&mut keeper, &mut files, next(), &["/cows/c"]).and_then(|mut made| {
                keeper.commit(&mut made)?;
                keeper.finish(made)
            });
            let mut bits = choice;
            let choose = |options| {
                let chosen = bits % options;
                bits /= options;
                chosen
            };
            Disk::cut_power(&mut files.0.borrow_mut(), choose);
            let found = open(&files, "/state");
            let what = format!("after {steps} steps, choice {choice}");
            let is_new = *found.state() == next();
            assert!(ended.is_err() || is_new, "{what}: what was done stays done");
            if is_new {
                assert_eq!(listed(&found), ["a", "b2", "c", "gone", "other"], "{what}");
            } else {
                assert_eq!(listed(&found), ["a", "b1", "b2", "gone", "other"], "{what}");
            }
            assert_eq!(files.has("/cows/c"), is_new, "{what}");
            cuts += u32::from(ended.is_err());
            old += u32::from(!is_new);
            new += u32::from(is_new && ended.is_err());
        }
        if cuts == 0 {
            break;
        }
    }
    println!("{old} times the old, {new} times the new");
    assert!(old > 0 && new > 0, "the cuts reach both sides");
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
