//! What becomes of exceptions: stores that change hands, are merged, or are full.

use super::super::*;
use super::rig::*;

use crate::request::{Command, Failure};

#[test]
fn a_store_changes_hands_as_the_kernel_has_it() {
    let mut rig = Rig::new(4);
    let (disk, cow) = (rig.disk(32), rig.empty_disk(200));
    let snapshot = || vec![line(0, 32, Target::Snapshot(pair(disk, cow, 2)))];
    let (first, view) = rig.device("first", snapshot());
    rig.write(disk, 4, 2, 90);
    assert_eq!(rig.status(first), "6/200 4");
    let second = rig.create("second");
    rig.load(second, snapshot()).unwrap();
    // A third one is too many.
    let third = rig.create("third");
    let refused = rig.load(third, snapshot()).unwrap_err();
    assert_eq!(
        refused.why,
        "Snapshot cow pairing for exception table handover failed"
    );
    let refused = rig.resume(second).unwrap_err();
    assert_eq!(
        refused.why,
        "Unable to perform snapshot handover until source is suspended."
    );
    rig.suspend(first);
    // It was refused with its table in place, and stands still.
    rig.resume(second).unwrap();
    assert_eq!(rig.status(second), "6/200 4");
    assert_eq!(rig.status(first), "Invalid");
    rig.resume(first).unwrap();
    let read = Command::Read {
        offset: 0,
        len: 512,
    };
    assert_eq!(rig.ask(view, read), Err(Failure::Io));
    let content = rig.read(Lower::Device(second));
    assert_eq!(sectors(&content)[4..6], [4, 5]);
    rig.remove(first).unwrap();
    rig.write(disk, 10, 1, 91);
    assert_eq!(sectors(&rig.read(Lower::Device(second)))[10], 10);
    // One whose source goes before it could take over is lost.
    rig.load(third, snapshot()).unwrap();
    rig.remove(second).unwrap();
    rig.resume(third).unwrap();
    assert_eq!(rig.status(third), "Invalid");
    rig.remove(third).unwrap();
    // The store itself is what it was.
    let (again, _) = rig.device("again", snapshot());
    assert_eq!(rig.status(again), "8/200 4");
}

#[test]
fn a_merge_is_begun_stopped_resumed_and_done() {
    let mut rig = Rig::new(5);
    let (disk, cow, other) = (rig.disk(64), rig.empty_disk(400), rig.empty_disk(400));
    let (_, real) = rig.device("real", vec![line(0, 64, linear(disk, 0))]);
    let origin = || Target::SnapshotOrigin { origin: real };
    let (base, top) = rig.device("base", vec![line(0, 64, origin())]);
    let (snap, view) = rig.device(
        "snap",
        vec![line(0, 64, Target::Snapshot(pair(real, cow, 2)))],
    );
    let second = Target::Snapshot(pair(real, other, 4));
    let (sibling, beside) = rig.device("sibling", vec![line(0, 64, second)]);
    let before = rig.read(top);
    for sector in (0..64).step_by(3) {
        rig.write(top, sector, 1, 150);
    }
    rig.write(view, 8, 4, 160);
    let wanted = rig.read(view);
    // dmsetup's way: the snapshot stands still, the mounted device gets the merge.
    rig.suspend(base);
    rig.suspend(snap);
    let merge = vec![line(0, 64, Target::SnapshotMerge(pair(real, cow, 2)))];
    rig.load(base, merge.clone()).unwrap();
    let order = rig.mapper.resume(base, false).unwrap();
    for _ in 0..10 {
        rig.step();
    }
    // Everybody sees the instant from the first moment on, by whatever way.
    let id = rig.hand_in(
        top,
        Command::Read {
            offset: 0,
            len: 64 * SECTOR,
        },
    );
    let around = rig.hand_in(
        disk,
        Command::Read {
            offset: 0,
            len: 64 * SECTOR,
        },
    );
    rig.end(order).unwrap();
    assert_eq!(rig.replies.remove(&id), Some(Ok(wanted.clone())));
    assert_eq!(rig.replies.remove(&around), Some(Ok(wanted.clone())));
    assert!(rig.events.contains(&MapperEvent::Merged(base)));
    assert_eq!(rig.status(base), "4/400 4");
    assert_eq!(rig.bytes(disk).clone(), wanted);
    assert_eq!(rig.read(beside), before);
    rig.remove(snap).unwrap();
    rig.load(base, vec![line(0, 64, origin())]).unwrap();
    rig.resume(base).unwrap();
    rig.write(top, 0, 8, 33);
    assert_eq!(rig.read(beside), before);
    // One that is given up in the middle leaves both as they are, and can be taken up.
    let (snap, view) = rig.device(
        "snap",
        vec![line(0, 64, Target::Snapshot(pair(real, cow, 2)))],
    );
    let wanted = rig.read(view);
    rig.write(top, 0, 64, 44);
    rig.suspend(snap);
    rig.load(base, merge.clone()).unwrap();
    let order = rig.mapper.resume(base, false).unwrap();
    while !rig.events.contains(&MapperEvent::MergeBegun(base)) || !rig.done.contains_key(&order) {
        assert!(rig.step());
    }
    rig.suspend(base);
    rig.load(base, vec![line(0, 64, origin())]).unwrap();
    rig.resume(base).unwrap();
    rig.remove(snap).unwrap();
    assert_eq!(rig.read(beside), before);
    rig.load(base, merge).unwrap();
    rig.resume(base).unwrap();
    rig.run();
    assert_eq!(rig.read(top), wanted);
    assert_eq!(rig.bytes(disk).clone(), wanted);
    assert_eq!(rig.read(beside), before);
    rig.remove(sibling).unwrap();
}

/// Nobody has suspended the device before: it stands still for the exchange, once its
/// requests have ended.
#[test]
fn a_merge_gives_way_to_another_table_with_requests_under_way() {
    let mut rig = Rig::new(6);
    let (disk, cow) = (rig.disk(64), rig.empty_disk(400));
    let (_, real) = rig.device("real", vec![line(0, 64, linear(disk, 0))]);
    let origin = || vec![line(0, 64, Target::SnapshotOrigin { origin: real })];
    let (base, top) = rig.device("base", origin());
    let pair = || pair(real, cow, 2);
    let (snap, _) = rig.device("snap", vec![line(0, 64, Target::Snapshot(pair()))]);
    rig.write(top, 0, 64, 44);
    rig.suspend(snap);
    rig.load(base, vec![line(0, 64, Target::SnapshotMerge(pair()))])
        .unwrap();
    let order = rig.mapper.resume(base, false).unwrap();
    while !rig.done.contains_key(&order) {
        assert!(rig.step());
    }
    let id = rig.hand_in(top, write(3, 2, 9));
    rig.load(base, origin()).unwrap();
    rig.resume(base).unwrap();
    assert_eq!(rig.replies.remove(&id), Some(Ok(Vec::new())));
}

/// A loss that no store can be made to say is one event, and stops the origin until the
/// snapshot's device is removed (durability.md, rule 6).
#[test]
fn a_loss_without_a_mark_stops_the_origin_until_the_snapshot_is_removed() {
    let mut rig = Rig::new(7);
    let (disk, cow) = (rig.disk(32), rig.empty_disk(200));
    let target = Target::Snapshot(pair(disk, cow, 2));
    let (id, view) = rig.device("snapshot", vec![line(0, 32, target)]);
    rig.write(disk, 4, 2, 90);
    let Lower::Disk(store) = cow else {
        unreachable!("it is a disk");
    };
    rig.fails = Some(store);
    let refused = rig.ask(disk, write(8, 1, 91));
    assert_eq!(refused, Err(Failure::Io));
    let lost = |event: &&MapperEvent| matches!(event, MapperEvent::Unmarked(one, _) if *one == id);
    assert_eq!(rig.events.iter().filter(lost).count(), 1);
    assert_eq!(rig.mapper.info(id).unwrap().event_nr, 1);
    assert_eq!(rig.status(id), "Invalid");
    // Whatever is written, until the operator gives the snapshot up.
    assert_eq!(rig.ask(disk, write(4, 1, 92)), Err(Failure::Io));
    let read = Command::Read {
        offset: 0,
        len: 512,
    };
    assert_eq!(rig.ask(view, read), Err(Failure::Io));
    rig.remove(id).unwrap();
    rig.write(disk, 8, 1, 93);
    assert_eq!(sectors(rig.bytes(disk))[8], 93);
}

/// What a flush has lost, no later one brings back: it is not said to (rule 10).
#[test]
fn a_disk_whose_flush_has_failed_is_trusted_no_more() {
    let mut rig = Rig::new(8);
    let (disk, other) = (rig.disk(32), rig.disk(32));
    let Lower::Disk(failing) = disk else {
        unreachable!("it is a disk");
    };
    let (_, top) = rig.device("top", vec![line(0, 32, linear(disk, 0))]);
    rig.write(top, 0, 4, 9);
    rig.fails = Some(failing);
    assert_eq!(rig.ask(top, Command::Flush), Err(Failure::Io));
    rig.fails = None;
    assert_eq!(rig.ask(top, Command::Flush), Err(Failure::Io));
    let fua = Command::Write {
        offset: 0,
        data: vec![1; 512].into(),
        fua: true,
    };
    assert_eq!(rig.ask(top, fua.clone()), Err(Failure::Io));
    assert_eq!(rig.ask(other, fua), Ok(Vec::new()));
    rig.mapper.close();
    rig.run();
    assert!(rig.events.contains(&MapperEvent::Closed(false)));
}

#[test]
fn full_stores_mean_what_they_mean_to_the_kernel() {
    for (persistence, status) in [
        (Persistence::Persistent, "Invalid"),
        (Persistence::PersistentOverflow, "Overflow"),
    ] {
        let mut rig = Rig::new(8);
        let (disk, cow) = (rig.disk(32), rig.empty_disk(8));
        let target = Target::Snapshot(Pair {
            persistence,
            ..pair(disk, cow, 1)
        });
        let (id, view) = rig.device("snapshot", vec![line(0, 32, target)]);
        let waiting = rig.mapper.wait(id, 0).unwrap();
        let events = u32::from(status == "Invalid");
        let written = (0..8).map(|sector| rig.ask(view, write(sector, 1, 9)));
        let written: Vec<_> = written.collect();
        assert_eq!(written[0], Ok(Vec::new()));
        assert_eq!(written[7], Err(Failure::Io));
        assert_eq!(rig.status(id), status);
        assert_eq!(rig.done.contains_key(&waiting), events == 1);
        // A count that is not the device's is not waited for.
        let other = rig.mapper.wait(id, 9).unwrap();
        assert_eq!(rig.end(other), Ok(()));
        assert_eq!(rig.mapper.info(id).unwrap().event_nr, events);
        // The origin goes on in any case, and then there is nothing left to read.
        rig.write(disk, 20, 4, 9);
        assert_eq!(rig.status(id), "Invalid");
        assert_eq!(rig.done.remove(&waiting), Some(Ok(())));
    }
}

#[test]
fn a_merge_beside_a_snapshot_that_has_snapshots_comes_to_its_end() {
    for seed in 1..40 {
        let mut rig = Rig::new(seed);
        // The stores lie beside the origin: what flushes one may flush the other.
        let disk = rig.disk(64 + 3 * 400);
        rig.bytes(disk)[64 * SECTOR as usize..].fill(0);
        let (_, real) = rig.device("real", vec![line(0, 64, linear(disk, 0))]);
        let mut cow = |n: u64| {
            let lines = vec![line(0, 400, linear(disk, 64 + 400 * n))];
            rig.device(&format!("cow{n}"), lines).1
        };
        let (cow1, cow2, cow3) = (cow(0), cow(1), cow(2));
        let origin = Target::SnapshotOrigin { origin: real };
        let (base, top) = rig.device("base", vec![line(0, 64, origin)]);
        let (_, sibling) = rig.device(
            "sibling",
            vec![line(0, 64, Target::Snapshot(pair(real, cow1, 1)))],
        );
        let (_, nested) = rig.device(
            "nested",
            vec![line(0, 64, Target::Snapshot(pair(sibling, cow2, 8)))],
        );
        let (snap, view) = rig.device(
            "snap",
            vec![line(0, 64, Target::Snapshot(pair(real, cow3, 4)))],
        );
        for _ in 0..30 {
            let to = [top, sibling, nested, view][rig.dice.below(4) as usize];
            let (sector, byte) = (rig.dice.below(60), rig.dice.below(200) as u8);
            rig.write(to, sector, 3, byte);
        }
        let wanted = rig.read(view);
        let others = [rig.read(sibling), rig.read(nested)];
        rig.suspend(base);
        rig.suspend(snap);
        let merge = Target::SnapshotMerge(pair(real, cow3, 4));
        rig.load(base, vec![line(0, 64, merge)]).unwrap();
        rig.resume(base).unwrap();
        assert_eq!(rig.read(top), wanted);
        rig.run();
        let merged = rig.bytes(disk)[..64 * SECTOR as usize].to_vec();
        assert_eq!(merged, wanted, "seed {seed}");
        assert_eq!([rig.read(sibling), rig.read(nested)], others);
    }
}

/// What a store is goes with the exceptions; whether it overflows when it is full does
/// not: that is the table's word which has it now, even of a transient one.
#[test]
fn whether_a_store_overflows_is_the_word_of_the_table_that_has_it_now() {
    use Persistence::{Persistent as P, PersistentOverflow as PO, Transient as N};
    for (first, second, shown, status) in [
        (PO, P, P, "Invalid"),
        (PO, N, P, "Invalid"),
        (PO, PO, PO, "Overflow"),
        (P, PO, PO, "Overflow"),
        (N, PO, N, "Overflow"),
        (N, P, N, "Invalid"),
    ] {
        let mut rig = Rig::new(17);
        let (disk, cow) = (rig.disk(32), rig.empty_disk(6));
        let on = |persistence| {
            let pair = Pair {
                persistence,
                ..pair(disk, cow, 1)
            };
            vec![line(0, 32, Target::Snapshot(pair))]
        };
        let (source, view) = rig.device("source", on(first));
        rig.write(view, 0, 1, 90);
        let heir = rig.create("heir");
        rig.load(heir, on(second)).unwrap();
        rig.suspend(source);
        rig.resume(heir).unwrap();
        let told = format!("{first:?} to {second:?}");
        let persistence = |rig: &Rig, id| match &rig.mapper.table(id, false).unwrap()[0].target {
            Target::Snapshot(pair) => pair.persistence,
            other => unreachable!("{other:?}"),
        };
        assert_eq!(persistence(&rig, heir), shown, "{told}");
        assert_eq!(persistence(&rig, source), second, "{told}");
        let view = Lower::Device(heir);
        let written: Vec<_> = (1..8).map(|n| rig.ask(view, write(n, 1, 9))).collect();
        assert_eq!(written[0], Ok(Vec::new()), "{told}");
        assert_eq!(written[6], Err(Failure::Io), "{told}");
        assert_eq!(rig.status(heir), status, "{told}");
        let lost = u32::from(status == "Invalid");
        assert_eq!(rig.mapper.info(heir).unwrap().event_nr, lost, "{told}");
    }
}

/// A snapshot of a snapshot that is lost is one, as long as it needs nothing of it: the
/// first chunk that it has to copy loses it too, which its store says and its device tells.
#[test]
fn a_snapshot_of_a_lost_one_is_lost_by_its_first_copy() {
    let mut rig = Rig::new(16);
    // Room for one chunk.
    let (disk, cow, other) = (rig.disk(32), rig.empty_disk(7), rig.empty_disk(200));
    let target = Target::Snapshot(pair(disk, cow, 2));
    let (lower, view) = rig.device("lower", vec![line(0, 32, target)]);
    rig.write(disk, 0, 8, 77);
    assert_eq!(rig.status(lower), "Invalid");
    let origin = Target::SnapshotOrigin { origin: view };
    let (_, way) = rig.device("way", vec![line(0, 32, origin)]);
    let target = Target::Snapshot(pair(view, other, 2));
    let (upper, top) = rig.device("upper", vec![line(0, 32, target.clone())]);
    assert_eq!(rig.status(upper), "4/200 4");
    // Nothing that was written there is safe, and whoever asks is told.
    assert_eq!(rig.ask(way, Command::Flush), Err(Failure::Io));
    rig.write(top, 4, 2, 88);
    assert_eq!(rig.status(upper), "6/200 4");
    assert_eq!(rig.ask(top, Command::Flush), Ok(Vec::new()));
    // It is taken anew, whoever was told meanwhile.
    rig.load(upper, vec![line(0, 32, target)]).unwrap();
    rig.resume(upper).unwrap();
    assert_eq!(rig.status(upper), "6/200 4");
    let third = rig.empty_disk(200);
    let target = Target::Snapshot(pair(view, third, 2));
    let (second, _) = rig.device("second", vec![line(0, 32, target)]);
    assert_eq!(rig.status(second), "4/200 4");
    assert_eq!(rig.mapper.info(upper).unwrap().event_nr, 0);
    assert_eq!(rig.ask(top, write(9, 2, 99)), Err(Failure::Io));
    assert_eq!(rig.status(upper), "Invalid");
    assert_eq!(rig.mapper.info(upper).unwrap().event_nr, 1);
    assert_eq!(rig.bytes(other)[4], 0, "the store says so");
    assert_eq!(rig.status(second), "4/200 4");
    rig.mapper.close();
    rig.run();
    assert_eq!(rig.events.last(), Some(&MapperEvent::Closed(true)));
}
