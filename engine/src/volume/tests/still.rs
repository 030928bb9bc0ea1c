//! A volume that is suspended stands still, and loses nothing.

use super::faults::{is_flush, rig, write};
use super::hands::{is_origin_flush, is_origin_write};
use super::*;
use crate::volume::full::OnFull;

const FIRST: SnapshotId = SnapshotId(0);
const OF_FIRST: View = View::Snapshot(FIRST);

fn read(rig: &mut Rig, id: u64, view: View) {
    let id = RequestId(id);
    let command = Command::Read {
        offset: 0,
        len: 512,
    };
    rig.volume.handle_request(Request { id, view, command });
}

#[test]
fn what_is_in_flight_ends_and_is_flushed_and_new_requests_wait() {
    let mut rig = rig(StoreKind::Persistent, 40, 40);
    write(&mut rig, 1, View::Origin, 3);
    write(&mut rig, 2, OF_FIRST, 9);
    rig.take();
    rig.volume.suspend();
    rig.volume.suspend();
    write(&mut rig, 3, View::Origin, 4);
    read(&mut rig, 4, OF_FIRST);
    let now = rig.volume.read_now(View::Origin, 0, 512, &mut Vec::new());
    assert_eq!(now, Now::Queue);
    while !rig.wants(is_origin_flush) {
        assert_eq!(rig.events(), []);
        assert!(rig.step());
        rig.take();
    }
    assert!(rig.wants(is_flush), "the store has writes in its cache");
    assert_eq!((rig.answer(1), rig.answer(2)), (Ok(()), Ok(())));
    rig.run();
    assert_eq!(rig.events(), [Event::Suspended(true)]);
    assert!(!rig.is_answered(3) && !rig.is_answered(4));
    assert!(!rig.volume.is_idle());
    rig.volume.resume();
    rig.volume.resume();
    rig.run();
    assert_eq!((rig.answer(3), rig.answer(4)), (Ok(()), Ok(())));
    assert_eq!(rig.events(), []);
    assert!(rig.volume.is_idle());
}

#[test]
fn snapshots_come_and_go_while_a_volume_is_suspended_without_touching_its_disks() {
    let mut rig = rig(StoreKind::Persistent, 40, 40);
    write(&mut rig, 1, View::Origin, 3);
    write(&mut rig, 2, View::Snapshot(FIRST), 3);
    rig.volume.suspend();
    rig.run();
    assert_eq!(rig.events(), [Event::Suspended(true)]);
    write(&mut rig, 3, View::Origin, 3);
    let own = rig.store(StoreKind::Persistent, 40);
    let own = rig.volume.create_snapshot(own);
    let store = rig.store(StoreKind::Persistent, 40);
    let (instant, ids) = rig.volume.begin_instant(vec![store]);
    rig.volume.remove_snapshot(FIRST);
    rig.take();
    assert!(rig.running.is_empty());
    assert_eq!(
        rig.events(),
        [
            Event::Created(own),
            Event::Held(instant),
            Event::Removed(FIRST)
        ]
    );
    rig.volume.resume();
    rig.run();
    assert!(!rig.is_answered(3), "the instant still holds the origin");
    assert_eq!(rig.volume.take_instant(instant), Ok(()));
    rig.run();
    assert_eq!(rig.answer(3), Ok(()));
    let mut expected = vec![7; ORIGIN as usize];
    expected[3 * 512..4 * 512].fill(1);
    for id in [own, ids[0]] {
        assert_eq!(rig.read_all(View::Snapshot(id)), Ok(expected.clone()));
    }
}

#[test]
fn a_resume_on_the_way_lets_everything_go_on() {
    for steps in 0..12 {
        let mut rig = rig(StoreKind::Persistent, 40, 40);
        write(&mut rig, 1, View::Origin, 3);
        write(&mut rig, 2, OF_FIRST, 5);
        rig.volume.suspend();
        for _ in 0..steps {
            rig.step();
        }
        write(&mut rig, 3, View::Origin, 3);
        let said = rig.events();
        rig.volume.resume();
        rig.run();
        assert_eq!(rig.events(), [], "after {steps} steps and {said:?}");
        for id in 1..=3 {
            assert_eq!(rig.answer(id), Ok(()));
        }
    }
}

#[test]
fn closing_a_suspended_volume_refuses_what_queues() {
    for steps in 0..12 {
        let mut rig = rig(StoreKind::Persistent, 40, 40);
        write(&mut rig, 1, View::Origin, 3);
        rig.volume.suspend();
        write(&mut rig, 2, View::Origin, 4);
        for _ in 0..steps {
            rig.step();
        }
        rig.volume.close();
        rig.volume.suspend();
        rig.run();
        assert_eq!(rig.events().last(), Some(&Event::Closed(true)));
        assert_eq!(rig.answer(1), Ok(()));
        assert_eq!(rig.answer(2), Err(Failure::ShuttingDown));
    }
}

#[test]
fn a_flush_that_fails_is_no_durable_suspension() {
    for of_origin in [true, false] {
        let mut rig = rig(StoreKind::Persistent, 40, 40);
        write(&mut rig, 1, View::Origin, 3);
        rig.run();
        rig.volume.suspend();
        rig.take();
        let chosen = if of_origin { is_origin_flush } else { is_flush };
        rig.fail(chosen, DiskError::Io(5));
        rig.run();
        let events = rig.events();
        assert_eq!(events.last(), Some(&Event::Suspended(false)));
        assert_eq!(events.len(), if of_origin { 1 } else { 2 }, "{events:?}");
    }
}

/// A write that waits for room is no reason not to stand still; extended or
/// removed meanwhile, its store is written again when the volume goes on.
#[test]
fn a_paused_write_stays_paused_while_the_volume_is_suspended() {
    for removed in [false, true] {
        let mut rig = rig(StoreKind::Persistent, 3, 3);
        rig.volume.set_on_full(FIRST, OnFull::Pause);
        write(&mut rig, 1, View::Origin, 1);
        write(&mut rig, 2, View::Origin, 2);
        write(&mut rig, 3, OF_FIRST, 3);
        rig.run();
        assert!(!rig.is_answered(2) && !rig.is_answered(3));
        rig.events();
        rig.volume.suspend();
        rig.run();
        assert_eq!(rig.events(), [Event::Suspended(true)]);
        if removed {
            rig.volume.remove_snapshot(FIRST);
            rig.take();
            assert_eq!(rig.events(), [Event::Removed(FIRST)]);
            assert_eq!(rig.answer(3), Err(Failure::Io));
        } else {
            rig.devices[1].0.resize(10 * 512, 0);
            assert_eq!(rig.volume.extend_snapshot(FIRST, 10 * 512), Ok(()));
            rig.take();
        }
        assert!(rig.running.is_empty() && !rig.is_answered(2));
        rig.volume.resume();
        rig.take();
        assert_eq!(rig.wants(is_origin_write), removed);
        rig.run();
        assert_eq!(rig.answer(2), Ok(()));
        if !removed {
            assert_eq!(rig.answer(3), Ok(()));
        }
    }
}
