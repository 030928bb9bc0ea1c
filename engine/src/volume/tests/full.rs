//! Stores that fill, are extended, and origins that grow.

use super::faults::{is_flush, is_header, is_origin_read, rig, write};
use super::*;
use crate::volume::full::{ExtendError, OnFull};
use crate::volume::lifecycle::GrowError;

const FIRST: SnapshotId = SnapshotId(0);
const OF_FIRST: View = View::Snapshot(FIRST);

/// A snapshot whose store has room for one exception, in a device of 3 chunks.
fn small(kind: StoreKind, on_full: OnFull) -> Rig {
    let mut rig = rig(kind, 3, 3);
    rig.volume.set_on_full(FIRST, on_full);
    rig
}

fn full_events(rig: &mut Rig) -> Vec<Event> {
    let mut events = rig.events();
    events.retain(|event| !matches!(event, Event::Filling(..)));
    events
}

#[test]
fn with_error_a_write_without_room_fails_and_the_snapshot_lives() {
    for kind in [StoreKind::Persistent, StoreKind::PersistentOverflow] {
        let mut rig = small(kind, OnFull::Error);
        write(&mut rig, 1, View::Origin, 1);
        write(&mut rig, 2, View::Origin, 2);
        write(&mut rig, 3, OF_FIRST, 3);
        write(&mut rig, 4, View::Origin, 1);
        write(&mut rig, 5, OF_FIRST, 1);
        rig.run();
        assert_eq!(full_events(&mut rig), [Event::Full(FIRST)]);
        assert_eq!(rig.answer(1), Ok(()));
        assert_eq!(rig.answer(2), Err(Failure::NoSpace));
        assert_eq!(rig.answer(3), Err(Failure::NoSpace));
        assert_eq!(rig.answer(4), Ok(()));
        assert_eq!(rig.answer(5), Ok(()));
        let status = rig.volume.status(FIRST).unwrap();
        assert!(matches!(status, Status::Active { .. }), "{status}");
        let mut expected = vec![7; ORIGIN as usize];
        expected[512..1024].fill(5);
        assert_eq!(rig.read_all(OF_FIRST), Ok(expected));
    }
}

/// The write is refused only when what it has begun in other snapshots has ended.
#[test]
fn an_origin_write_that_one_of_two_stores_has_no_room_for_fails_once() {
    let stores = [
        (StoreKind::Persistent, 1, 40, 40),
        (StoreKind::Persistent, 1, 3, 3),
    ];
    let mut rig = Rig::new(&stores, 5);
    rig.volume.set_on_full(SnapshotId(1), OnFull::Error);
    write(&mut rig, 1, View::Origin, 1);
    write(&mut rig, 2, View::Origin, 2);
    write(&mut rig, 3, View::Origin, 2);
    rig.run();
    assert_eq!(rig.replies.len(), 3);
    assert_eq!(rig.answer(2), Err(Failure::NoSpace));
    assert_eq!(rig.answer(3), Err(Failure::NoSpace));
    assert!(rig.volume.is_idle());
}

/// Whoever is told that the snapshot is lost finds it lost, and everybody told.
#[test]
fn a_write_that_loses_its_snapshot_fails_once_that_is_durable() {
    for copies in [false, true] {
        let mut rig = if copies {
            rig(StoreKind::Persistent, 40, 40)
        } else {
            small(StoreKind::Persistent, OnFull::Invalidate)
        };
        write(&mut rig, 1, OF_FIRST, 1);
        rig.run();
        assert_eq!(rig.answer(1), Ok(()));
        full_events(&mut rig);
        if copies {
            let command = Command::Write {
                offset: 2000,
                data: Bytes::from(vec![2; 20]),
                fua: false,
            };
            let (id, view) = (RequestId(2), OF_FIRST);
            rig.volume.handle_request(Request { id, view, command });
            rig.take();
            rig.fail(is_origin_read, DiskError::Io(5));
        } else {
            write(&mut rig, 2, OF_FIRST, 2);
            rig.take();
        }
        rig.perform(is_header);
        assert!(!rig.is_answered(2) && full_events(&mut rig).is_empty());
        rig.perform(is_flush);
        rig.run();
        assert_eq!(rig.answer(2), Err(Failure::Io));
        assert!(matches!(full_events(&mut rig)[..], [Event::Invalid(..)]));
    }
}

#[test]
fn with_pause_a_write_waits_until_the_store_is_extended_and_others_go_on() {
    let mut rig = small(StoreKind::PersistentOverflow, OnFull::Pause);
    write(&mut rig, 1, View::Origin, 1);
    write(&mut rig, 2, View::Origin, 2);
    write(&mut rig, 3, OF_FIRST, 3);
    write(&mut rig, 4, View::Origin, 1);
    let flush = Request {
        id: RequestId(5),
        view: View::Origin,
        command: Command::Flush,
    };
    rig.volume.handle_request(flush);
    rig.run();
    assert_eq!(full_events(&mut rig), [Event::Full(FIRST)]);
    assert_eq!(rig.volume.snapshot_info(FIRST).unwrap().paused, 2);
    for id in [1, 4, 5] {
        assert_eq!(rig.answer(id), Ok(()));
    }
    assert!(!rig.is_answered(2) && !rig.is_answered(3));
    let store = rig.store(StoreKind::Persistent, 40);
    let new = rig.volume.create_snapshot(store);
    rig.run();
    assert_eq!(
        full_events(&mut rig),
        [Event::Created(new)],
        "no instant waits for it"
    );
    assert_eq!(
        rig.volume.extend_snapshot(FIRST, 512),
        Err(ExtendError::Smaller { limit: 3 * 512 })
    );
    assert_eq!(rig.volume.extend_snapshot(FIRST, 3 * 512), Ok(()));
    rig.run();
    assert_eq!(full_events(&mut rig), [Event::Full(FIRST)], "once a time");
    rig.devices[1].0.resize(20 * 512, 0);
    assert_eq!(rig.volume.extend_snapshot(FIRST, 20 * 512 + 7), Ok(()));
    rig.run();
    assert_eq!((rig.answer(2), rig.answer(3)), (Ok(()), Ok(())));
    assert_eq!(
        rig.volume.snapshot_info(FIRST).unwrap().limit_bytes,
        20 * 512
    );
    let mut expected = vec![7; ORIGIN as usize];
    expected[3 * 512..4 * 512].fill(3);
    assert_eq!(rig.read_all(OF_FIRST), Ok(expected));
}

#[test]
fn a_file_grows_again_once_it_is_extended() {
    let mut rig = rig(StoreKind::Persistent, 4, 5);
    rig.volume.set_on_full(FIRST, OnFull::Pause);
    for sector in 0..12 {
        write(&mut rig, sector + 1, View::Origin, sector);
    }
    rig.run();
    assert!(rig.replies.len() < 12);
    assert_eq!(rig.volume.extend_snapshot(FIRST, 60 * 512), Ok(()));
    rig.run();
    assert_eq!(rig.replies.len(), 12);
    assert!(rig.replies.iter().all(|reply| reply.result.is_ok()));
    assert_eq!(rig.read_all(OF_FIRST), Ok(vec![7; ORIGIN as usize]));
}

#[test]
fn whatever_ends_a_pause_ends_it() {
    type Answer = Result<(), Failure>;
    type End = (fn(&mut Rig), Answer, Answer);
    let ends: [End; 4] = [
        (
            |rig| rig.volume.remove_snapshot(FIRST),
            Ok(()),
            Err(Failure::Io),
        ),
        (
            |rig| rig.volume.close(),
            Err(Failure::ShuttingDown),
            Err(Failure::ShuttingDown),
        ),
        (
            |rig| rig.volume.set_on_full(FIRST, OnFull::Error),
            Err(Failure::NoSpace),
            Err(Failure::NoSpace),
        ),
        (
            |rig| rig.volume.set_on_full(FIRST, OnFull::Invalidate),
            Ok(()),
            Err(Failure::Io),
        ),
    ];
    for (end, of_origin, of_snapshot) in ends {
        let mut rig = small(StoreKind::Persistent, OnFull::Pause);
        write(&mut rig, 1, View::Origin, 1);
        rig.run();
        write(&mut rig, 2, View::Origin, 2);
        write(&mut rig, 3, OF_FIRST, 3);
        rig.run();
        assert!(!rig.is_answered(2) && !rig.is_answered(3));
        end(&mut rig);
        rig.run();
        assert_eq!((rig.answer(2), rig.answer(3)), (of_origin, of_snapshot));
        assert!(rig.volume.is_idle());
    }
}

#[test]
fn each_mark_is_said_once_until_the_store_is_extended() {
    let filling = |rig: &mut Rig| -> Vec<u8> {
        let percent = |event| match event {
            Event::Filling(FIRST, percent) => Some(percent),
            _ => None,
        };
        rig.events().into_iter().filter_map(percent).collect()
    };
    let mut rig = rig(StoreKind::Persistent, 20, 20);
    let mut said = Vec::new();
    // A header and an area first, then a chunk a write.
    for sector in 0..18 {
        write(&mut rig, sector + 1, View::Origin, sector);
        rig.run();
        for percent in filling(&mut rig) {
            said.push((sector + 3, percent));
        }
    }
    assert_eq!(said, [(10, 50), (16, 80), (19, 95)]);
    rig.devices[1].0.resize(25 * 512, 0);
    assert_eq!(rig.volume.extend_snapshot(FIRST, 25 * 512), Ok(()));
    assert_eq!(
        filling(&mut rig),
        [] as [u8; 0],
        "80 percent were said before"
    );
    for sector in 18..22 {
        write(&mut rig, sector + 1, View::Origin, sector);
        rig.run();
    }
    assert_eq!(filling(&mut rig), [95]);
}

#[test]
fn a_lost_or_absent_snapshot_is_not_extended() {
    let mut rig = small(StoreKind::Persistent, OnFull::Invalidate);
    write(&mut rig, 1, View::Origin, 1);
    write(&mut rig, 2, View::Origin, 2);
    rig.run();
    let volume = &mut rig.volume;
    assert_eq!(
        volume.extend_snapshot(FIRST, 1 << 20),
        Err(ExtendError::Invalid)
    );
    assert_eq!(
        volume.extend_snapshot(SnapshotId(7), 1 << 20),
        Err(ExtendError::NoSuchSnapshot)
    );
    volume.set_on_full(SnapshotId(7), OnFull::Error);
}

/// A snapshot keeps its length, in the middle of a chunk, and its bytes, whatever
/// is written to the larger origin.
#[test]
fn a_snapshot_of_an_origin_that_grew_keeps_its_length_and_its_bytes() {
    for random in 0..200 {
        let stores = [
            (StoreKind::Persistent, 8, 12, 12),
            (StoreKind::Persistent, 16, 8, 8),
        ];
        let mut rig = Rig::new(&stores, random);
        write(&mut rig, 1, OF_FIRST, 39);
        assert_eq!(
            rig.volume.grow_origin(ORIGIN - 512),
            Err(GrowError::Smaller { bytes: ORIGIN })
        );
        assert_eq!(
            rig.volume.grow_origin(ORIGIN + 1),
            Err(GrowError::NotSectors)
        );
        rig.devices[0].0.resize(60 * 512, 9);
        assert_eq!(rig.volume.grow_origin(60 * 512), Ok(()));
        write(&mut rig, 2, OF_FIRST, 40);
        assert_eq!(rig.answer(2), Err(Failure::PastEnd));
        let store = rig.store(StoreKind::Persistent, 80);
        let new = rig.volume.create_snapshot(store);
        rig.run();
        let trim = Command::Trim {
            offset: 37 * 512,
            len: 5 * 512,
            fua: false,
        };
        let id = RequestId(3);
        let view = View::Origin;
        rig.volume.handle_request(Request {
            id,
            view,
            command: trim,
        });
        let data = Bytes::from(vec![4; 24 * 512]);
        let command = Command::Write {
            offset: 36 * 512,
            data,
            fua: false,
        };
        let id = RequestId(4);
        rig.volume.handle_request(Request { id, view, command });
        write(&mut rig, 5, OF_FIRST, 38);
        rig.run();
        for id in [1, 3, 4, 5] {
            assert_eq!(rig.answer(id), Ok(()));
        }
        assert_eq!(rig.volume.view_bytes(OF_FIRST), Some(ORIGIN));
        let mut expected = vec![7; ORIGIN as usize];
        assert_eq!(
            rig.read_all(View::Snapshot(SnapshotId(1))),
            Ok(expected.clone())
        );
        expected[38 * 512..39 * 512].fill(5);
        expected[39 * 512..].fill(1);
        assert_eq!(rig.read_all(OF_FIRST), Ok(expected));
        assert_eq!(rig.volume.view_bytes(View::Snapshot(new)), Some(60 * 512));
        let now = rig
            .volume
            .write_now(View::Origin, 59 * 512, 512, &mut Vec::new());
        assert_eq!(
            now,
            Now::Go,
            "the newest has its copy, the others end before"
        );
        rig.volume.remove_snapshot(new);
        rig.run();
    }
}

#[test]
fn what_there_is_to_know_of_a_snapshot() {
    let mut rig = rig(StoreKind::Persistent, 6, 40);
    write(&mut rig, 1, View::Origin, 1);
    rig.run();
    let info = rig.volume.snapshot_info(FIRST).unwrap();
    assert_eq!(info.state, crate::SnapshotState::Active);
    assert_eq!(Some(info.status), rig.volume.status(FIRST));
    assert_eq!((info.bytes, info.exceptions), (ORIGIN, 1));
    assert_eq!(
        (info.allocated_bytes, info.ready_bytes, info.limit_bytes),
        (3 * 512, 6 * 512, 40 * 512)
    );
    assert_eq!(
        (info.kind, info.on_full),
        (StoreKind::Persistent, OnFull::Invalidate)
    );
    assert!(!info.is_full && info.paused == 0);
    assert_eq!(rig.volume.snapshot_info(SnapshotId(9)), None);
}
