//! Mapped devices over disks in memory: `rig.rs`.

mod rig;
mod stores;

use super::*;
use crate::request::{Command, Failure};
use rig::*;

#[test]
fn lines_are_where_their_tables_say() {
    let mut rig = Rig::new(1);
    let (a, b, c) = (rig.disk(40), rig.disk(40), rig.disk(40));
    let (_, pieces) = rig.device(
        "pieces",
        vec![
            line(0, 8, linear(b, 4)),
            line(8, 4, Target::Zero),
            line(12, 12, linear(a, 20)),
        ],
    );
    let expected: Vec<u8> = (54..62).chain([0; 4]).chain(20..32).collect();
    let read = rig.read(pieces);
    assert_eq!(sectors(&read), expected);
    let (_, striped) = rig.device(
        "striped",
        vec![line(
            0,
            24,
            Target::Striped {
                chunk: 2,
                stripes: vec![(a, 0), (b, 10), (c, 1)],
            },
        )],
    );
    let read = rig.read(striped);
    let row = |n: u8| {
        [
            2 * n,
            2 * n + 1,
            60 + 2 * n,
            61 + 2 * n,
            101 + 2 * n,
            102 + 2 * n,
        ]
    };
    let expected: Vec<u8> = (0..4).flat_map(row).collect();
    assert_eq!(sectors(&read), expected);
    // Across lines, and across stripes.
    rig.write(pieces, 6, 8, 200);
    assert_eq!(sectors(rig.bytes(b))[10..12], [200, 200]);
    assert_eq!(sectors(rig.bytes(a))[20..23], [200, 200, 22]);
    rig.write(striped, 1, 4, 201);
    assert_eq!(sectors(rig.bytes(a))[..3], [0, 201, 2]);
    assert_eq!(sectors(rig.bytes(b))[10..12], [201, 201]);
    assert_eq!(sectors(rig.bytes(c))[1..3], [201, 102]);
    let error = rig.create("error");
    rig.load(error, vec![line(0, 8, Target::Error)]).unwrap();
    rig.resume(error).unwrap();
    let read = Command::Read {
        offset: 0,
        len: 512,
    };
    assert_eq!(
        rig.ask(Lower::Device(error), read.clone()),
        Err(Failure::Io)
    );
    let past = Command::Read {
        offset: 7 * SECTOR,
        len: 1024,
    };
    assert_eq!(rig.ask(Lower::Device(error), past), Err(Failure::Invalid));
    assert_eq!(
        rig.ask(Lower::Device(DeviceId(9)), read),
        Err(Failure::NoSuchView)
    );
}

/// Whoever was attached has gone, and what was asked for has not ended.
#[test]
fn a_device_that_is_removed_keeps_its_number_until_its_requests_have_ended() {
    let mut rig = Rig::new(3);
    let disk = rig.disk(32);
    let (first, top) = rig.device("first", vec![line(0, 32, linear(disk, 0))]);
    let under_way = rig.hand_in(top, write(0, 4, 9));
    let order = rig.mapper.remove(first, false).unwrap().unwrap();
    let second = rig.create("second");
    assert_ne!(second, first);
    rig.end(order).unwrap();
    assert_eq!(rig.replies.remove(&under_way), Some(Ok(Vec::new())));
    // One that stands still lets go what has queued.
    let (third, top) = rig.device("third", vec![line(0, 32, linear(disk, 0))]);
    assert_eq!(third, first);
    rig.suspend(third);
    let queued = rig.hand_in(top, write(0, 4, 9));
    rig.remove(third).unwrap();
    assert_eq!(rig.replies.remove(&queued), Some(Err(Failure::Io)));
}

/// Origins of every make, snapshots of them, and writes that come through them, beside
/// them and from beneath, many at a time: every snapshot stays what it was, and
/// everything else is what was written.
#[test]
fn every_write_reaches_the_snapshots_of_what_it_lands_on() {
    for seed in 1..=60 {
        println!("seed {seed}");
        around_and_beneath(seed);
    }
}

fn around_and_beneath(seed: u64) {
    let mut rig = Rig::new(seed);
    let disks: Vec<_> = (0..3).map(|_| rig.disk(96)).collect();
    // What the origin is made of, and devices that reach the same by other ways.
    let shape = rig.dice.below(4);
    let lines = match shape {
        0 => vec![line(0, 96, linear(disks[0], 0))],
        1 => vec![
            line(0, 30, linear(disks[1], 7)),
            line(30, 42, linear(disks[0], 50)),
        ],
        _ => {
            let chunk = [2, 4, 8][rig.dice.below(3) as usize];
            let stripes = [(disks[0], 16), (disks[1], 0), (disks[2], 40)];
            let count = shape as usize;
            vec![line(
                0,
                24 * count as u64,
                Target::Striped {
                    chunk,
                    stripes: stripes[..count].to_vec(),
                },
            )]
        }
    };
    let bytes = lines.last().map(|l| l.start + l.len).unwrap();
    let (_, real) = rig.device("real", lines);
    let origin = Target::SnapshotOrigin { origin: real };
    let (_, origin) = rig.device("origin", vec![line(0, bytes, origin)]);
    let part = 3 + rig.dice.below(10);
    let (_, slice) = rig.device("slice", vec![line(0, bytes - part, linear(real, part))]);
    let ways = [real, origin, slice, disks[0], disks[1], disks[2]];
    let mut frozen: Vec<(DeviceId, Vec<u8>)> = Vec::new();
    let mut in_flight = Vec::new();
    for round in 0..120 {
        if round % 30 == 5 {
            // A snapshot of the origin, of the slice, or of a whole disk, while
            // writes are under way.
            let of = [real, slice, disks[0]][rig.dice.below(3) as usize];
            let len = rig.mapper.bytes_of(of) / SECTOR;
            let chunk = [1, 2, 4][rig.dice.below(3) as usize];
            let cow = rig.empty_disk(40 * chunk + len * 2);
            let id = rig.create(&format!("snapshot{round}"));
            rig.load(
                id,
                vec![line(0, len, Target::Snapshot(pair(of, cow, chunk)))],
            )
            .unwrap();
            // Nobody but the test knows the content of the instant unless all is quiet
            // then; that those under way are waited for is another test's.
            rig.run();
            let content = rig.read(of);
            rig.resume(id).unwrap();
            frozen.push((id, content));
        }
        let way = ways[rig.dice.below(ways.len() as u64) as usize];
        let size = rig.mapper.bytes_of(way) / SECTOR;
        let sector = rig.dice.below(size);
        let len = (1 + rig.dice.below(6)).min(size - sector);
        in_flight.push(rig.hand_in(way, write(sector, len, round as u8)));
        for _ in 0..rig.dice.below(6) {
            rig.step();
        }
    }
    rig.run();
    for id in in_flight {
        assert_eq!(rig.replies.remove(&id), Some(Ok(Vec::new())));
    }
    for (id, content) in &frozen {
        let read = rig.read(Lower::Device(*id));
        assert_eq!(
            sectors(&read),
            sectors(content),
            "{:?}",
            rig.mapper.info(*id)
        );
        assert!(rig.status(*id).contains('/'), "{}", rig.status(*id));
    }
    assert!(
        frozen
            .iter()
            .any(|(id, _)| !rig.status(*id).starts_with("2/"))
    );
    for (id, _) in frozen {
        rig.remove(id).unwrap();
    }
    rig.run();
    assert!(rig.mapper.is_idle());
    assert!(rig.mapper.levels.is_empty(), "volumes without snapshots go");
    rig.mapper.close();
    rig.run();
    assert_eq!(rig.events.last(), Some(&MapperEvent::Closed(true)));
}

#[test]
fn a_write_under_way_is_in_the_snapshot_or_after_it_and_never_in_half() {
    for seed in 1..200 {
        let mut rig = Rig::new(seed);
        let (disk, cow) = (rig.disk(32), rig.empty_disk(200));
        let (_, real) = rig.device("real", vec![line(0, 32, linear(disk, 0))]);
        let id = rig.create("snapshot");
        rig.load(id, vec![line(0, 32, Target::Snapshot(pair(real, cow, 2)))])
            .unwrap();
        // Through the device, and from beneath, before the order and after it.
        let mut ids = vec![rig.hand_in(real, write(0, 4, 201))];
        ids.push(rig.hand_in(disk, write(8, 4, 202)));
        for _ in 0..rig.dice.below(3) {
            rig.step();
        }
        let order = rig.mapper.resume(id, false).unwrap();
        ids.push(rig.hand_in(disk, write(16, 4, 203)));
        for _ in 0..rig.dice.below(4) {
            rig.step();
        }
        ids.push(rig.hand_in(real, write(24, 4, 204)));
        rig.end(order).unwrap();
        for id in ids {
            assert_eq!(rig.replies.remove(&id), Some(Ok(Vec::new())));
        }
        let first = rig.read(Lower::Device(id));
        for (at, byte) in [(0, 201), (8, 202), (16, 203), (24, 204)] {
            let now = &sectors(&first)[at..at + 4];
            assert!(
                now.iter().all(|s| *s == byte) || now.iter().all(|s| *s < 200),
                "seed {seed}: {now:?}"
            );
            assert!(at >= 16 || now[0] == byte, "what came first is in it");
        }
        rig.write(disk, 0, 32, 99);
        assert_eq!(rig.read(Lower::Device(id)), first, "seed {seed}");
    }
}

#[test]
fn a_suspended_device_holds_what_comes_through_it_and_nothing_else() {
    let mut rig = Rig::new(3);
    let disk = rig.disk(32);
    let (low, lower) = rig.device("low", vec![line(0, 16, linear(disk, 8))]);
    let (high, upper) = rig.device("high", vec![line(0, 16, linear(lower, 0))]);
    rig.suspend(low);
    assert!(rig.mapper.info(low).unwrap().suspended);
    let held = rig.hand_in(upper, write(2, 1, 77));
    let beside = rig.hand_in(disk, write(0, 1, 78));
    rig.run();
    assert_eq!(rig.replies.remove(&beside), Some(Ok(Vec::new())));
    assert!(!rig.replies.contains_key(&held));
    // The upper one cannot come to rest before that is answered.
    let order = rig.mapper.suspend(high, false).unwrap();
    rig.run();
    assert!(!rig.done.contains_key(&order));
    // The table is exchanged beneath what waits.
    rig.load(low, vec![line(0, 16, linear(disk, 16))]).unwrap();
    rig.resume(low).unwrap();
    assert_eq!(rig.replies.remove(&held), Some(Ok(Vec::new())));
    assert_eq!(rig.done.remove(&order), Some(Ok(())));
    assert_eq!(sectors(rig.bytes(disk))[18], 77);
    rig.resume(high).unwrap();
    assert_eq!(rig.mapper.info(low).unwrap().open_count, 1);
    let busy = rig.mapper.remove(low, false).unwrap_err();
    assert_eq!(busy.errno, Errno::Busy);
    rig.remove(high).unwrap();
    rig.remove(low).unwrap();
    assert!(rig.mapper.devices().is_empty());
}

/// It may be in pieces beneath, but not for who suspends the device that cuts it.
#[test]
fn a_standstill_waits_for_all_of_a_request_that_the_table_cuts() {
    let mut rig = Rig::new(18);
    let (a, b) = (rig.disk(16), rig.disk(16));
    let (chunk, stripes) = (2, vec![(a, 0), (b, 0)]);
    let target = Target::Striped { chunk, stripes };
    let (id, top) = rig.device("striped", vec![line(0, 32, target)]);
    let request = rig.hand_in(top, write(0, 8, 9));
    rig.collect();
    let order = rig.mapper.suspend(id, false).unwrap();
    while !rig.done.contains_key(&order) {
        assert!(rig.step());
        rig.collect();
    }
    assert_eq!(rig.replies.remove(&request), Some(Ok(Vec::new())));
    assert!(rig.ops.is_empty());
    assert_eq!(sectors(rig.bytes(a))[..5], [9, 9, 9, 9, 4]);
}

#[test]
fn snapshots_of_snapshots_by_tables() {
    let mut rig = Rig::new(6);
    let disk = rig.disk(32);
    let mut below = disk;
    let mut views = Vec::new();
    for depth in 0..5 {
        let cow = rig.empty_disk(200);
        let name = format!("depth{depth}");
        let (_, view) = rig.device(
            &name,
            vec![line(0, 32, Target::Snapshot(pair(below, cow, 2)))],
        );
        rig.write(view, 5 * depth, 3, 100 + depth as u8);
        views.push((view, rig.read(view)));
        below = view;
    }
    for round in 0..60 {
        let which = rig.dice.below(6) as usize;
        let (sector, len) = (rig.dice.below(30), 1 + rig.dice.below(2));
        let byte = 120 + round as u8;
        match views.get_mut(which) {
            None => rig.write(disk, sector, len, byte),
            Some((view, content)) => {
                content[(sector * SECTOR) as usize..][..(len * SECTOR) as usize].fill(byte);
                let view = *view;
                rig.write(view, sector, len, byte);
            }
        }
    }
    for (view, content) in &views {
        let read = rig.read(*view);
        assert_eq!(sectors(&read), sectors(content));
    }
}

#[test]
fn what_cannot_be_is_refused_and_leaves_the_active_table_alone() {
    let mut rig = Rig::new(7);
    let (disk, cow) = (rig.disk(64), rig.empty_disk(200));
    let (a, lower) = rig.device("a", vec![line(0, 32, linear(disk, 0))]);
    let (b, upper) = rig.device("b", vec![line(0, 32, linear(lower, 0))]);
    let refuse = |rig: &mut Rig, id: DeviceId, target: Target| -> String {
        let refused = rig.load(id, vec![line(0, 32, target)]).unwrap_err();
        assert_eq!(refused.errno, Errno::Invalid, "{refused}");
        refused.why
    };
    assert!(refuse(&mut rig, a, linear(lower, 0)).contains("itself"));
    assert!(refuse(&mut rig, a, linear(upper, 0)).contains("itself"));
    let same = Target::Snapshot(pair(disk, disk, 2));
    assert!(refuse(&mut rig, a, same).contains("cannot be the same"));
    let beneath = Target::Snapshot(pair(lower, disk, 2));
    assert!(refuse(&mut rig, b, beneath).contains("itself") || rig.status(b).is_empty());
    let new = rig.create("new");
    let beneath = Target::Snapshot(pair(lower, disk, 2));
    assert!(refuse(&mut rig, new, beneath).contains("overlaps"));
    let small = linear(disk, 40);
    assert!(refuse(&mut rig, new, small).contains("too small"));
    // Later it is found out at the resume, and the active table stays.
    rig.load(a, vec![line(0, 32, linear(disk, 40))]).unwrap();
    let refused = rig.resume(a).unwrap_err();
    assert!(refused.why.contains("too small"));
    assert_eq!(
        rig.mapper.table(a, false).unwrap()[0].target,
        linear(disk, 0)
    );
    rig.resume(a).unwrap();
    // Two origins cannot have one store.
    rig.device(
        "s",
        vec![line(0, 32, Target::Snapshot(pair(lower, cow, 2)))],
    );
    let refused = rig.load(new, vec![line(0, 64, Target::Snapshot(pair(disk, cow, 2)))]);
    assert_eq!(refused.unwrap_err().errno, Errno::Busy);
    assert_eq!(
        rig.mapper.create("a", "", None).unwrap_err().errno,
        Errno::Busy
    );
    assert_eq!(
        rig.mapper.info(DeviceId(77)).unwrap_err().errno,
        Errno::NoDevice
    );
    let read = rig.read(upper);
    assert_eq!(sectors(&read), (0..32).collect::<Vec<u8>>());
}

#[test]
fn an_end_with_everything_in_use_commits_all_of_it() {
    let mut rig = Rig::new(9);
    let (disk, cow, other) = (rig.disk(32), rig.empty_disk(200), rig.empty_disk(200));
    let (_, view) = rig.device(
        "snap",
        vec![line(0, 32, Target::Snapshot(pair(disk, cow, 2)))],
    );
    let upper = Target::Snapshot(pair(view, other, 2));
    let (upper, _) = rig.device("upper", vec![line(0, 32, upper)]);
    let (low, lower) = rig.device("low", vec![line(0, 32, linear(disk, 0))]);
    rig.suspend(low);
    let held = rig.hand_in(lower, write(2, 4, 77));
    let other = rig.hand_in(view, write(8, 3, 78));
    let waiting = rig.mapper.wait(upper, 0).unwrap();
    rig.mapper.close();
    rig.run();
    assert_eq!(rig.events.last(), Some(&MapperEvent::Closed(true)));
    // What waited went through, and nobody hears of an event that never came.
    for id in [held, other] {
        assert_eq!(rig.replies.remove(&id), Some(Ok(Vec::new())));
    }
    assert_eq!(sectors(rig.bytes(disk))[2..6], [77; 4]);
    assert!(!rig.done.contains_key(&waiting));
    let late = rig.hand_in(disk, Command::Flush);
    rig.run();
    assert_eq!(rig.replies.remove(&late), Some(Err(Failure::ShuttingDown)));
    assert!(rig.mapper.is_idle());
}

#[test]
fn an_end_is_a_good_one_where_a_snapshot_with_a_snapshot_was_lost() {
    let mut rig = Rig::new(11);
    // Room for one chunk.
    let (disk, cow, other) = (rig.disk(32), rig.empty_disk(7), rig.empty_disk(200));
    let target = Target::Snapshot(pair(disk, cow, 2));
    let (lower, view) = rig.device("lower", vec![line(0, 32, target)]);
    let target = Target::Snapshot(pair(view, other, 2));
    let (upper, _) = rig.device("upper", vec![line(0, 32, target)]);
    rig.write(disk, 0, 8, 77);
    assert_eq!(rig.status(lower), "Invalid");
    assert_eq!(rig.status(upper), "4/200 4");
    rig.mapper.close();
    rig.run();
    assert_eq!(rig.events.last(), Some(&MapperEvent::Closed(true)));
}

/// What stands on a snapshot that waits for a store has nothing there that an end could
/// lose: whatever was asked of it has failed.
#[test]
fn an_end_is_a_good_one_where_a_snapshot_never_took_over() {
    let mut rig = Rig::new(12);
    let disk = rig.disk(32);
    let cows = [(); 3].map(|()| rig.empty_disk(200));
    let on = |origin, cow| vec![line(0, 32, Target::Snapshot(pair(origin, cow, 2)))];
    let (lower, view) = rig.device("lower", on(disk, cows[0]));
    let (upper, _) = rig.device("upper", on(view, cows[1]));
    rig.device("source", on(disk, cows[2]));
    rig.load(lower, on(disk, cows[2])).unwrap();
    let refused = rig.resume(lower).unwrap_err();
    assert_eq!(
        refused.why,
        "Unable to perform snapshot handover until source is suspended."
    );
    assert_eq!(rig.status(upper), "4/200 4");
    rig.mapper.close();
    rig.run();
    assert_eq!(rig.events.last(), Some(&MapperEvent::Closed(true)));
}

#[test]
fn a_new_name_is_an_event_where_there_is_a_table() {
    let mut rig = Rig::new(13);
    let id = rig.create("one");
    let events = |rig: &Rig| rig.mapper.info(id).unwrap().event_nr;
    rig.mapper.rename(id, "two").unwrap();
    assert_eq!(events(&rig), 0);
    rig.load(id, vec![line(0, 8, Target::Zero)]).unwrap();
    rig.mapper.rename(id, "three").unwrap();
    assert_eq!(events(&rig), 0);
    rig.resume(id).unwrap();
    rig.mapper.rename(id, "four").unwrap();
    assert_eq!(events(&rig), 1);
}

#[test]
fn the_table_before_is_gone_where_a_resume_is_refused() {
    let mut rig = Rig::new(14);
    let (disk, cow, other) = (rig.disk(32), rig.empty_disk(200), rig.empty_disk(200));
    let (store, kept) = rig.device("store", vec![line(0, 200, linear(cow, 0))]);
    let on = |cow| vec![line(0, 32, Target::Snapshot(pair(disk, cow, 2)))];
    let (snap, _) = rig.device("snap", on(kept));
    let (source, _) = rig.device("source", on(other));
    rig.load(snap, on(other)).unwrap();
    let refused = rig.resume(snap).unwrap_err();
    assert_eq!(
        refused.why,
        "Unable to perform snapshot handover until source is suspended."
    );
    assert_eq!(rig.mapper.info(store).unwrap().open_count, 0);
    // The old snapshot keeps nothing any more, and the new one can take over.
    rig.write(disk, 0, 8, 99);
    assert_eq!(rig.status(source), "12/200 4");
    rig.suspend(source);
    rig.resume(snap).unwrap();
    assert_eq!(rig.status(snap), "12/200 4");
    let (again, _) = rig.device("again", on(kept));
    assert_eq!(rig.status(again), "4/200 4");
}

#[test]
fn tables_of_a_device_share_what_they_have_open_for_the_same_use() {
    let mut rig = Rig::new(12);
    let (disk, cow) = (rig.disk(32), rig.empty_disk(200));
    let (real, base) = rig.device("real", vec![line(0, 32, linear(disk, 0))]);
    let (store, kept) = rig.device("store", vec![line(0, 200, linear(cow, 0))]);
    let snapshot = || vec![line(0, 32, Target::Snapshot(pair(base, kept, 2)))];
    let (snap, _) = rig.device("snap", snapshot());
    let opened = |rig: &Rig| [real, store].map(|id| rig.mapper.info(id).unwrap().open_count);
    assert_eq!(opened(&rig), [1, 1]);
    rig.load(snap, snapshot()).unwrap();
    assert_eq!(opened(&rig), [1, 1]);
    rig.resume(snap).unwrap();
    let origin = || vec![line(0, 32, Target::SnapshotOrigin { origin: base })];
    let (top, _) = rig.device("top", origin());
    rig.load(top, origin()).unwrap();
    assert_eq!(opened(&rig), [2, 1]);
    // To be merged into it is another use than to be its origin.
    let merge = vec![line(0, 32, Target::SnapshotMerge(pair(base, kept, 2)))];
    rig.load(top, merge).unwrap();
    assert_eq!(opened(&rig), [3, 2]);
}

#[test]
fn a_snapshot_that_is_shorter_than_its_origin_keeps_nothing_behind_its_end() {
    let mut rig = Rig::new(10);
    let (disk, cow) = (rig.disk(64), rig.empty_disk(400));
    let half = vec![line(0, 30, Target::Snapshot(pair(disk, cow, 4)))];
    let (id, view) = rig.device("half", half);
    let frozen = rig.read(view);
    rig.write(disk, 24, 20, 99);
    // The chunks 6 and 7: the second one has two sectors of it.
    assert_eq!(rig.status(id), "16/400 8");
    rig.write(disk, 50, 10, 98);
    assert_eq!(rig.status(id), "16/400 8");
    assert_eq!(rig.read(view), frozen);
}

/// What the kernel left in a store (Linux 6.1, chunks of 16 sectors, a snapshot of 60
/// sectors): of the last chunk everything that the origin has, behind the snapshot's
/// end too.
#[test]
fn the_last_chunk_is_copied_as_far_as_the_origin_goes() {
    const CHUNK: u64 = 16;
    const NEW: u8 = 250;
    // The origin's length; who writes, from where on, how many sectors; how many sectors
    // of the last chunk the store had then.
    for (origin, by_snapshot, at, len, copied) in [
        (128, false, 48, 1, 16),
        (128, false, 48, 16, 16),
        (128, false, 50, 40, 16),
        (128, false, 60, 20, 0),
        (60, false, 48, 1, 12),
        (62, false, 48, 4, 14),
        (62, false, 60, 2, 0),
        (128, true, 48, 1, 16),
        (128, true, 48, 12, 16),
        (128, true, 32, 28, 16),
        (62, true, 48, 12, 14),
        (62, true, 59, 1, 14),
    ] {
        let mut rig = Rig::new(at + len);
        let (disk, cow) = (rig.disk(origin), rig.empty_disk(400));
        let short = vec![line(0, 60, Target::Snapshot(pair(disk, cow, CHUNK)))];
        let (id, view) = rig.device("short", short);
        rig.write(if by_snapshot { view } else { disk }, at, len, NEW);
        // Behind the header and an area; a chunk before it may have been written too.
        let first = if at < 48 { 3 } else { 2 };
        let allocated = if copied == 0 { first } else { first + 1 } * CHUNK;
        assert_eq!(rig.status(id), format!("{allocated}/400 32"));
        let kept = sectors(rig.bytes(cow))[(first * CHUNK) as usize..][..16].to_vec();
        let new = if by_snapshot { at..at + len } else { 0..0 };
        let wanted = (48..64).map(|sector| match sector {
            _ if sector - 48 >= copied => 0,
            _ if new.contains(&sector) => NEW,
            _ => sector as u8,
        });
        assert_eq!(kept, wanted.collect::<Vec<_>>(), "{origin} {at} {len}");
    }
}

#[test]
fn the_ways_to_an_origin_are_what_shares_its_bytes_from_the_top_down() {
    let mut rig = Rig::new(11);
    let (disk, cow) = (rig.disk(64), rig.empty_disk(400));
    let (low, lower) = rig.device("low", vec![line(0, 32, linear(disk, 0))]);
    let origin = Target::SnapshotOrigin { origin: lower };
    let (top, upper) = rig.device("top", vec![line(0, 32, origin)]);
    let (half, _) = rig.device("half", vec![line(0, 8, linear(disk, 24))]);
    let (other, beside) = rig.device("other", vec![line(0, 32, linear(disk, 32))]);
    let snapshot = Target::Snapshot(pair(lower, cow, 4));
    let (snap, view) = rig.device("snap", vec![line(0, 32, snapshot)]);
    let (above, _) = rig.device("above", vec![line(0, 8, linear(view, 0))]);
    rig.create("empty");
    let ways = |rig: &Rig, origin| rig.mapper.ways_to(&[origin]);
    assert_eq!(ways(&rig, lower), [top, low, half]);
    assert_eq!(ways(&rig, upper), [top, low, half]);
    assert_eq!(ways(&rig, beside), [other]);
    assert_eq!(ways(&rig, view), [above, snap]);
    assert_eq!(ways(&rig, disk), [top, low, half, other]);
    assert_eq!(rig.mapper.ways_to(&[beside, view]), [other, above, snap]);
}
