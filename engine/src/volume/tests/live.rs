//! Snapshots that come and go under traffic, step by step.

use super::faults::{is_flush, is_origin_read, is_store_write, rig, write};
use super::hands::{is_origin_flush, is_origin_write};
use super::*;

const FIRST: SnapshotId = SnapshotId(0);
const OF_FIRST: View = View::Snapshot(FIRST);

/// A disk that has grown is written at once behind the end of its snapshots.
#[test]
fn a_write_behind_a_shorter_snapshot_needs_no_queue() {
    let mut rig = rig(StoreKind::Persistent, 40, 40);
    rig.volume.grow_origin(ORIGIN + 4096).unwrap();
    let mut extents = Vec::new();
    for (offset, way) in [
        (ORIGIN - 512, Now::Queue),
        (ORIGIN, Now::Go),
        (ORIGIN + 3584, Now::Go),
    ] {
        let now = (rig.volume).write_now(View::Origin, offset, 512, &mut extents);
        assert_eq!(now, way, "at {offset}");
    }
}

#[test]
fn a_removed_snapshot_lets_origin_writes_go_and_leaves_when_its_operations_have_ended() {
    let mut rig = rig(StoreKind::Persistent, 40, 40);
    write(&mut rig, 1, View::Origin, 3);
    write(&mut rig, 2, OF_FIRST, 9);
    rig.take();
    rig.perform(is_origin_read);
    assert!(rig.wants(is_store_write));
    rig.volume.remove_snapshot(FIRST);
    rig.volume.remove_snapshot(FIRST);
    rig.take();
    assert!(rig.wants(is_origin_write), "nothing keeps the origin write");
    assert_eq!(rig.volume.devices().len(), 2, "a write is in flight there");
    assert_eq!(rig.volume.status(FIRST), None);
    write(&mut rig, 3, OF_FIRST, 1);
    assert_eq!(rig.answer(3), Err(Failure::NoSuchView));
    while rig.wants(is_store_write) {
        assert_eq!(rig.events(), []);
        rig.perform(is_store_write);
    }
    assert_eq!(rig.events(), [Event::Removed(FIRST)]);
    assert_eq!(rig.volume.devices(), [Device::Origin]);
    assert!(!rig.wants(is_flush), "the store is not touched again");
    rig.run();
    assert_eq!(rig.answer(1), Ok(()));
    assert_eq!(rig.answer(2), Err(Failure::Io));
    assert!(rig.volume.is_idle());
}

/// Whatever a snapshot is in the middle of, it can be removed, and every request
/// is answered.
#[test]
fn a_snapshot_is_removed_at_any_step() {
    for steps in 0..60 {
        for random in 0..20 {
            let stores = [
                (StoreKind::Persistent, 1, 4, 30),
                (StoreKind::Transient, 2, 3, 3),
                (StoreKind::PersistentOverflow, 1, 5, 5),
            ];
            let mut rig = Rig::new(&stores, random);
            for i in 0..12 {
                let view = view_of([0, 0, 1, 2, 3][rig.below(5)]);
                let sector = rig.below(30) as u64;
                write(&mut rig, i, view, sector);
            }
            let store = rig.store(StoreKind::Persistent, 8);
            rig.volume.create_snapshot(store);
            for _ in 0..steps {
                rig.step();
            }
            let id = SnapshotId(rig.below(4) as u32);
            rig.volume.remove_snapshot(id);
            rig.run();
            assert!(
                rig.volume.is_idle(),
                "removal of {id:?} after {steps} steps"
            );
            assert_eq!(rig.replies.len(), 12);
            assert!(rig.events().contains(&Event::Removed(id)));
            assert!(!rig.volume.devices().contains(&Device::Cow(id)));
        }
    }
}

#[test]
fn snapshots_of_one_instant_show_the_same_and_writes_are_held_until_it_is_taken() {
    let mut rig = rig(StoreKind::Persistent, 40, 40);
    write(&mut rig, 1, View::Origin, 3);
    rig.run();
    let stores = vec![
        rig.store(StoreKind::Persistent, 40),
        rig.store(StoreKind::Transient, 40),
    ];
    let (instant, ids) = rig.volume.begin_instant(stores);
    assert_eq!(rig.volume.take_instant(instant), Err(NotHeld));
    rig.run();
    assert_eq!(rig.events(), [Event::Held(instant)]);
    write(&mut rig, 2, View::Origin, 4);
    rig.run();
    assert!(!rig.is_answered(2), "the origin is held");
    assert_eq!(
        rig.volume
            .write_now(View::Origin, 3 * 512, 512, &mut Vec::new()),
        Now::Queue
    );
    assert_eq!(rig.volume.take_instant(instant), Ok(()));
    assert_eq!(
        rig.events(),
        ids.iter().map(|&id| Event::Created(id)).collect::<Vec<_>>()
    );
    assert_eq!(rig.volume.take_instant(instant), Err(NotHeld));
    rig.run();
    assert_eq!(rig.answer(2), Ok(()));
    let mut expected = vec![7; ORIGIN as usize];
    expected[3 * 512..4 * 512].fill(1);
    for id in ids {
        assert_eq!(rig.read_all(View::Snapshot(id)), Ok(expected.clone()));
    }
}

/// A write that waits for copies when an instant is begun has not begun, and is
/// not waited for.
#[test]
fn an_instant_waits_for_operations_on_the_origin_only() {
    let mut rig = rig(StoreKind::Persistent, 40, 40);
    write(&mut rig, 1, View::Origin, 3);
    rig.take();
    assert!(rig.wants(is_origin_read));
    let store = rig.store(StoreKind::Persistent, 40);
    let id = rig.volume.create_snapshot(store);
    rig.take();
    rig.perform(is_origin_flush);
    assert_eq!(rig.events(), [Event::Created(id)]);
    rig.run();
    assert_eq!(rig.answer(1), Ok(()));
    assert_eq!(
        rig.read_all(View::Snapshot(id)),
        Ok(vec![7; ORIGIN as usize])
    );
}

#[test]
fn an_abandoned_instant_leaves_nothing_behind_however_far_it_has_come() {
    for steps in 0..6 {
        let mut rig = rig(StoreKind::Persistent, 40, 40);
        write(&mut rig, 1, View::Origin, 3);
        rig.take();
        let store = rig.store(StoreKind::Persistent, 40);
        let (instant, _) = rig.volume.begin_instant(vec![store]);
        let store = rig.store(StoreKind::Persistent, 40);
        let next = rig.volume.create_snapshot(store);
        for _ in 0..steps {
            rig.step();
        }
        write(&mut rig, 2, View::Origin, 5);
        rig.volume.abandon_instant(instant);
        rig.volume.abandon_instant(instant);
        rig.run();
        let mut events = rig.events();
        events.retain(|event| *event != Event::Held(instant));
        assert_eq!(events, [Event::Created(next)], "after {steps} steps");
        assert_eq!(rig.volume.devices().len(), 3);
        assert_eq!((rig.answer(1), rig.answer(2)), (Ok(()), Ok(())));
        assert!(rig.volume.is_idle());
    }
}

#[test]
fn closing_fails_an_instant_that_nobody_is_going_to_take() {
    for steps in 0..6 {
        let mut rig = rig(StoreKind::Persistent, 40, 40);
        write(&mut rig, 1, View::Origin, 3);
        let store = rig.store(StoreKind::Persistent, 40);
        let (instant, _) = rig.volume.begin_instant(vec![store]);
        for _ in 0..steps {
            rig.step();
        }
        rig.volume.close();
        assert_eq!(rig.volume.take_instant(instant), Err(NotHeld));
        rig.run();
        let mut events = rig.events();
        events.retain(|event| *event != Event::Held(instant));
        assert_eq!(events, [Event::InstantFailed(instant), Event::Closed(true)]);
        assert_eq!(rig.answer(1), Ok(()));
    }
}

#[test]
fn a_flush_of_the_origin_that_fails_fails_the_instant() {
    let mut rig = rig(StoreKind::Persistent, 40, 40);
    let stores = vec![
        rig.store(StoreKind::Persistent, 40),
        rig.store(StoreKind::Persistent, 40),
    ];
    let (instant, _) = rig.volume.begin_instant(stores);
    rig.take();
    rig.fail(is_origin_flush, DiskError::Io(5));
    assert_eq!(rig.events(), [Event::InstantFailed(instant)]);
    assert_eq!(rig.volume.devices().len(), 2);
    write(&mut rig, 1, View::Origin, 3);
    rig.run();
    assert_eq!(rig.answer(1), Ok(()));
}

/// What leaves an instant before it is taken leaves it to the others.
#[test]
fn a_snapshot_leaves_its_instant() {
    let mut rig = rig(StoreKind::Persistent, 40, 40);
    let stores = vec![
        rig.store(StoreKind::Persistent, 40),
        rig.store(StoreKind::Persistent, 40),
    ];
    let (instant, ids) = rig.volume.begin_instant(stores);
    rig.volume.remove_snapshot(ids[0]);
    rig.run();
    assert_eq!(rig.events(), [Event::Removed(ids[0]), Event::Held(instant)]);
    assert_eq!(rig.volume.take_instant(instant), Ok(()));
    assert_eq!(rig.events(), [Event::Created(ids[1])]);
}
