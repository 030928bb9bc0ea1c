//! Merges, with clients at work on every view.

use nbdsnap_format::{Exception, area::EXCEPTION_BYTES};

use super::*;
use crate::volume::MergeError;

const STORES: [(StoreKind, u64, u64, u64); 4] = [
    (StoreKind::Persistent, 1, 80, 80),
    (StoreKind::Persistent, 2, 4, 60),
    (StoreKind::PersistentOverflow, 4, 3, 40),
    (StoreKind::Transient, 8, 8, 8),
];

impl Rig {
    /// What the volume said, but for how full its stores are.
    fn told(&mut self) -> Vec<Event> {
        let events = self.events().into_iter();
        let told =
            events.filter(|event| !matches!(event, Event::Filling(..) | Event::MergeProgress(..)));
        told.collect()
    }

    /// Hand a write in, and its reply's end.
    fn write_bytes(&mut self, view: View, offset: u64, byte: u8, len: u64) {
        self.hand_in(
            view,
            Command::Write {
                offset,
                data: Bytes::from(vec![byte; len as usize]),
                fua: false,
            },
        );
    }

    fn hand_in(&mut self, view: View, command: Command) {
        let id = RequestId(0);
        self.volume.handle_request(Request { id, view, command });
    }

    fn settle(&mut self) {
        while self.step() {}
    }
}

/// The exceptions of a store in memory, in its first area.
fn exceptions(store: &Memory, chunk: usize) -> Vec<Exception> {
    let area = &store.0[chunk..2 * chunk];
    let entries = area.as_chunks::<EXCEPTION_BYTES>().0;
    entries.iter().map_while(Exception::decode).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// From the order on the origin is what the snapshot was and what is written
    /// to it since; the others stay what they are.
    #[test]
    fn a_merged_origin_shows_its_snapshot_and_what_was_written_since(
        before in ops(5), after in ops(5), merged in 1..4usize, step in 1..8u64, random: u64,
    ) {
        let mut rig = Rig::new(&STORES, random);
        rig.volume.set_merge_step(step * 512);
        let mut models = vec![vec![7u8; ORIGIN as usize]; 5];
        let mut id = 0;
        let count = before.len();
        for (at, op) in before.into_iter().chain(after).enumerate() {
            if at == count {
                rig.settle();
                prop_assert!(rig.replies.drain(..).all(|reply| reply.result.is_ok()));
                let View::Snapshot(snapshot) = view_of(merged) else { unreachable!() };
                prop_assert_eq!(rig.volume.begin_merge(snapshot), Ok(()));
                models[0] = models[merged].clone();
            }
            let (view, command) = match op {
                Op::Write(view, offset, len, fua) => {
                    let byte = (at % 250) as u8 + 1;
                    models[view][offset as usize..(offset + len) as usize].fill(byte);
                    let data = Bytes::from(vec![byte; len as usize]);
                    (view, Command::Write { offset, data, fua })
                }
                Op::Zero(view, offset, len) => {
                    models[view][offset as usize..(offset + len) as usize].fill(0);
                    let (fua, no_hole, fast_only) = (false, false, false);
                    (view, Command::WriteZeroes { offset, len, fua, no_hole, fast_only })
                }
                Op::Flush(view) => (view, Command::Flush),
                Op::Steps(n) => {
                    for _ in 0..n {
                        rig.step();
                    }
                    continue;
                }
            };
            id += 1;
            let (id, view) = (RequestId(id * 8 + view as u64), view_of(view));
            rig.volume.handle_request(Request { id, view, command });
        }
        rig.settle();
        for reply in std::mem::take(&mut rig.replies) {
            let gone = reply.id.0 % 8 == merged as u64;
            let expected = if gone { Err(Failure::NoSuchView) } else { Ok(Vec::new()) };
            prop_assert_eq!(reply.result, expected);
        }
        let snapshot = SnapshotId(merged as u32 - 1);
        prop_assert_eq!(rig.told(), vec![Event::MergeBegun(snapshot), Event::Merged(snapshot)]);
        prop_assert!(rig.devices[0].0 == models[0], "the origin's device");
        for (index, model) in models.iter().enumerate() {
            if index != merged {
                prop_assert!(&rig.read_all(view_of(index)).unwrap() == model, "view {}", index);
            }
        }
        let chunk = STORES[merged - 1].1 as usize * 512;
        prop_assert_eq!(exceptions(&rig.devices[merged], chunk), vec![]);
        prop_assert_eq!(rig.volume.devices().len(), 4);
    }
}

/// A snapshot of two chunks that differ from the origin.
fn rig_with_two_chunks() -> Rig {
    let mut rig = Rig::new(&STORES[..2], 1);
    for chunk in [3, 9] {
        rig.write_bytes(View::Origin, chunk * 1024, 1, 1024);
    }
    rig.settle();
    rig.replies.clear();
    rig
}

const SECOND: SnapshotId = SnapshotId(1);

#[test]
fn what_cannot_be_merged_is_refused_and_nothing_changes() {
    let mut rig = Rig::new(&STORES, 1);
    let volume = &mut rig.volume;
    assert_eq!(
        volume.begin_merge(SnapshotId(9)),
        Err(MergeError::NoSuchSnapshot)
    );
    assert_eq!(
        volume.begin_merge(SnapshotId(3)),
        Err(MergeError::Transient)
    );
    assert_eq!(volume.begin_merge(SECOND), Ok(()));
    for id in [SECOND, SnapshotId(0)] {
        assert_eq!(volume.begin_merge(id), Err(MergeError::AlreadyMerging));
    }
    assert_eq!(volume.merging(), Some(SECOND));
    rig.settle();
    assert_eq!(
        rig.told(),
        [Event::MergeBegun(SECOND), Event::Merged(SECOND)]
    );
    assert_eq!(
        rig.volume.begin_merge(SECOND),
        Err(MergeError::NoSuchSnapshot)
    );
    rig.volume.close();
    assert_eq!(
        rig.volume.begin_merge(SnapshotId(0)),
        Err(MergeError::Closing)
    );
}

#[test]
fn a_suspended_merge_reads_as_the_snapshot_and_copies_nothing() {
    let mut rig = rig_with_two_chunks();
    rig.volume.suspend_merge();
    rig.volume.begin_merge(SECOND).unwrap();
    rig.settle();
    assert_eq!(rig.told(), [Event::MergeBegun(SECOND)]);
    assert!(rig.volume.merge_rests() && rig.volume.is_idle());
    let progress = rig.volume.merge_progress().unwrap();
    assert_eq!((progress.left_chunks, progress.total_chunks), (2, 2));
    assert_eq!(rig.devices[0].0[3 * 1024], 1, "the origin's device");
    assert_eq!(
        rig.read_all(View::Origin).unwrap(),
        vec![7; ORIGIN as usize]
    );
    // Mapped chunks are written in the store, the others in the origin.
    rig.write_bytes(View::Origin, 3 * 1024 + 5, 2, 2000);
    rig.settle();
    assert_eq!(rig.devices[0].0[3 * 1024 + 5], 1);
    assert_eq!(rig.devices[0].0[4 * 1024 + 5], 2);
    rig.volume.set_merge_step(1024);
    rig.volume.resume_merge();
    assert!(rig.step(), "it goes on");
    rig.volume.suspend_merge();
    rig.settle();
    assert_eq!(rig.volume.merge_progress().unwrap().left_chunks, 1);
    rig.volume.resume_merge();
    rig.settle();
    assert_eq!(rig.told(), [Event::Merged(SECOND)]);
    assert_eq!(rig.volume.merge_progress(), None);
    let mut expected = vec![7; ORIGIN as usize];
    expected[3 * 1024 + 5..3 * 1024 + 2005].fill(2);
    assert!(rig.devices[0].0 == expected);
}

#[test]
fn a_merge_stops_at_a_close_and_goes_on_when_it_is_attached() {
    let mut rig = rig_with_two_chunks();
    rig.volume.set_merge_step(1024);
    rig.volume.begin_merge(SECOND).unwrap();
    while rig
        .volume
        .merge_progress()
        .is_none_or(|p| p.left_chunks > 1)
    {
        assert!(rig.step());
    }
    rig.volume.close();
    rig.settle();
    assert_eq!(rig.told(), [Event::MergeBegun(SECOND), Event::Closed(true)]);
    let left = exceptions(&rig.devices[2], 1024);
    assert_eq!(left.len(), 1);
    let size = StoreSize {
        ready: rig.devices[2].0.len() as u64,
        limit: 60 * 1024,
        step: 0,
    };
    let store = Store::open(
        StoreKind::Persistent,
        size,
        ORIGIN,
        crate::Access::ReadWrite,
        &mut rig.devices[2],
    );
    rig.volume = Volume::new(rig.volume.config);
    let first = Store::open(
        StoreKind::Persistent,
        StoreSize {
            ready: 80 * 512,
            limit: 80 * 512,
            step: 0,
        },
        ORIGIN,
        crate::Access::ReadWrite,
        &mut rig.devices[1],
    );
    rig.volume.attach_snapshot(first.unwrap());
    assert_eq!(rig.volume.attach_merging(store.unwrap()), SECOND);
    assert_eq!(
        rig.volume.status(SECOND).unwrap().to_string(),
        "6/120 4",
        "one exception: two chunks of metadata and one of data"
    );
    assert_eq!(
        rig.read_all(View::Origin).unwrap(),
        vec![7; ORIGIN as usize]
    );
    rig.settle();
    assert_eq!(rig.told(), [Event::Merged(SECOND)]);
    assert!(rig.devices[0].0 == vec![7; ORIGIN as usize]);
    assert_eq!(
        rig.read_all(view_of(1)).unwrap(),
        vec![7; ORIGIN as usize],
        "the other snapshot"
    );
}

#[test]
fn around_the_queue_lies_what_no_step_is_copying() {
    let mut rig = rig_with_two_chunks();
    rig.volume.suspend_merge();
    rig.volume.begin_merge(SECOND).unwrap();
    rig.settle();
    let mut extents = Vec::new();
    let now = rig.volume.read_now(View::Origin, 0, ORIGIN, &mut extents);
    assert_eq!(now, Now::Go);
    let devices: Vec<_> = extents.iter().map(|e| e.device).collect();
    let (origin, cow) = (Device::Origin, Device::Cow(SECOND));
    assert_eq!(devices, [origin, cow, origin, cow, origin]);
    extents.clear();
    let mut write = |volume: &mut Volume, offset| {
        extents.clear();
        volume.write_now(View::Origin, offset, 512, &mut extents)
    };
    assert_eq!(write(&mut rig.volume, 3 * 1024), Now::Go);
    assert_eq!(
        write(&mut rig.volume, 0),
        Now::Queue,
        "the other snapshot has no copy"
    );
    rig.volume.set_merge_step(1024);
    rig.volume.resume_merge();
    // Until the list has been read, nobody knows which chunk is the last.
    assert!(rig.step());
    assert_eq!(write(&mut rig.volume, 9 * 1024), Now::Queue);
    assert_eq!(write(&mut rig.volume, 3 * 1024), Now::Go);
}

/// Found by the crash search: a snapshot that was lost in the middle of a step's
/// preparations woke the step while it was still being told what to wait for.
#[test]
fn a_snapshot_that_fills_while_a_step_is_prepared_is_lost_and_the_merge_goes_on() {
    for (kind, room) in [(StoreKind::Transient, 2), (StoreKind::Persistent, 4)] {
        let stores = [(StoreKind::Persistent, 2, 60, 60), (kind, 2, room, room)];
        let mut rig = Rig::new(&stores, 1);
        for chunk in [3, 6, 9, 12] {
            rig.write_bytes(View::Snapshot(SnapshotId(0)), chunk * 1024, 1, 1024);
        }
        rig.settle();
        rig.volume.begin_merge(SnapshotId(0)).unwrap();
        rig.settle();
        let events = rig.told();
        assert!(matches!(
            events[..],
            [
                Event::MergeBegun(_),
                Event::Invalid(SECOND, _),
                Event::Merged(_)
            ]
        ));
        for chunk in [3, 6, 9, 12] {
            assert_eq!(rig.devices[0].0[chunk * 1024], 1);
        }
    }
}

/// The same for a write that lies partly in the store.
#[test]
fn a_snapshot_that_fills_under_a_write_to_both_devices_is_lost_and_the_write_goes_on() {
    let stores = [
        (StoreKind::Persistent, 2, 60, 60),
        (StoreKind::Transient, 2, 2, 2),
    ];
    let mut rig = Rig::new(&stores, 1);
    for chunk in [3, 6, 9] {
        rig.write_bytes(View::Snapshot(SnapshotId(0)), chunk * 1024, 1, 1024);
    }
    rig.volume.suspend_merge();
    rig.settle();
    rig.volume.begin_merge(SnapshotId(0)).unwrap();
    rig.settle();
    rig.replies.clear();
    rig.write_bytes(View::Origin, 2 * 1024, 2, 9 * 1024);
    rig.settle();
    assert_eq!(rig.replies.len(), 1);
    let expected = [
        vec![7; 2048],
        vec![2; 9 * 1024],
        vec![7; ORIGIN as usize - 11 * 1024],
    ];
    assert!(rig.read_all(View::Origin).unwrap() == expected.concat());
    let lost = Event::Invalid(SECOND, "its store is full");
    assert_eq!(rig.told(), [Event::MergeBegun(SnapshotId(0)), lost]);
}

/// Found by the crash search: nothing was left to hand out but the flush that had
/// been held, and nobody looked for it.
#[test]
fn a_flush_that_was_held_until_the_merge_began_is_answered() {
    let mut rig = rig_with_two_chunks();
    rig.volume.suspend_merge();
    rig.volume.begin_merge(SECOND).unwrap();
    rig.hand_in(View::Origin, Command::Flush);
    rig.settle();
    assert_eq!(rig.told(), [Event::MergeBegun(SECOND)]);
    assert_eq!(rig.replies.len(), 1);
    assert_eq!(rig.replies[0].result, Ok(Vec::new()));
}

#[test]
fn a_suspended_volume_stops_its_merge_between_two_steps() {
    let mut rig = rig_with_two_chunks();
    rig.volume.set_merge_step(1024);
    rig.volume.begin_merge(SECOND).unwrap();
    while rig.volume.merge_progress().is_none() || rig.volume.merge_rests() {
        assert!(rig.step());
    }
    rig.volume.suspend();
    rig.write_bytes(View::Origin, 9 * 1024, 3, 1024);
    rig.settle();
    let events = [Event::MergeBegun(SECOND), Event::Suspended(true)];
    assert_eq!(rig.told(), events);
    assert!(rig.replies.is_empty() && rig.volume.merge_rests());
    let left = rig.volume.merge_progress().unwrap().left_chunks;
    assert_eq!(left, 1);
    assert_eq!(exceptions(&rig.devices[2], 1024).len(), 1);
    rig.volume.resume();
    rig.settle();
    assert_eq!(rig.told(), [Event::Merged(SECOND)]);
    assert_eq!(rig.replies.len(), 1);
    assert_eq!(rig.read_all(View::Origin).unwrap()[9 * 1024], 3);
}

/// Where a client's write would wait for room, or fail, a merge waits; meanwhile
/// writes to its chunks do not.
#[test]
fn a_merge_waits_for_room_in_another_snapshots_store() {
    for on_full in [OnFull::Pause, OnFull::Error] {
        let full = (StoreKind::Persistent, 2, 4, 4);
        let mut rig = Rig::new(&[(StoreKind::Persistent, 2, 60, 60), full], 1);
        rig.volume.set_on_full(SECOND, on_full);
        for chunk in [3, 6, 9, 12] {
            rig.write_bytes(View::Snapshot(SnapshotId(0)), chunk * 1024, 1, 1024);
        }
        rig.settle();
        rig.volume.begin_merge(SnapshotId(0)).unwrap();
        rig.settle();
        let events = rig.told();
        assert!(events.contains(&Event::Full(SECOND)), "{events:?}");
        assert!(rig.volume.merge_progress().unwrap().waits_for_room);
        rig.replies.clear();
        rig.write_bytes(View::Origin, 6 * 1024, 2, 1024);
        rig.settle();
        assert_eq!(rig.replies.len(), 1, "a write to the store needs no copy");
        rig.devices[2].0.resize(60 * 1024, 0);
        rig.volume.extend_snapshot(SECOND, 60 * 1024).unwrap();
        rig.settle();
        assert!(rig.told().contains(&Event::Merged(SnapshotId(0))));
        for (chunk, byte) in [(3, 1), (6, 2), (9, 1), (12, 1)] {
            assert_eq!(rig.devices[0].0[chunk * 1024], byte);
        }
        assert_eq!(rig.read_all(view_of(2)).unwrap(), vec![7; ORIGIN as usize]);
    }
}

#[test]
fn what_lies_behind_the_end_of_a_shorter_snapshot_stays() {
    let mut rig = Rig::new(&STORES[2..3], 1);
    // The snapshot's last chunk of four sectors is one that goes on behind its end.
    rig.write_bytes(View::Snapshot(SnapshotId(0)), ORIGIN - 1024, 1, 1024);
    rig.settle();
    rig.devices[0].0.resize(ORIGIN as usize + 1024, 5);
    rig.volume.grow_origin(ORIGIN + 1024).unwrap();
    rig.volume.suspend_merge();
    rig.volume.begin_merge(SnapshotId(0)).unwrap();
    rig.settle();
    rig.write_bytes(View::Origin, ORIGIN - 512, 2, 1024);
    rig.settle();
    rig.volume.resume_merge();
    rig.settle();
    assert!(rig.told().contains(&Event::Merged(SnapshotId(0))));
    let end = &rig.devices[0].0[ORIGIN as usize - 1024..];
    let expected = [[1; 512], [2; 512], [2; 512], [5; 512]];
    assert_eq!(end, expected.as_flattened());
}

/// A write that waits for room in the middle is not answered yet: it comes after
/// the rollback, and then all of it does, not only what is left of it.
#[test]
fn a_write_that_waits_for_room_in_the_middle_is_whole_after_a_merge_begins() {
    let small = (StoreKind::Persistent, 1, 3, 3);
    let large = (StoreKind::Persistent, 1, 60, 60);
    for (stores, full) in [([small, large], 0), ([large, small], 1)] {
        let mut rig = Rig::new(&stores, 1);
        let full = SnapshotId(full);
        rig.volume.set_window(512);
        rig.volume.set_on_full(full, OnFull::Pause);
        rig.write_bytes(View::Origin, 0, 9, 1024);
        rig.settle();
        assert_eq!(rig.told(), [Event::Full(full)]);
        assert_eq!(rig.devices[0].0[..1024], [[9; 512], [7; 512]].concat());
        rig.volume.begin_merge(SnapshotId(0)).unwrap();
        rig.settle();
        if full == SECOND {
            rig.devices[2].0.resize(60 * 512, 0);
            rig.volume.extend_snapshot(full, 60 * 512).unwrap();
            rig.settle();
        }
        assert!(rig.told().contains(&Event::Merged(SnapshotId(0))));
        assert_eq!(rig.replies.len(), 1);
        assert!(rig.replies[0].result.is_ok());
        let mut expected = vec![7; ORIGIN as usize];
        expected[..1024].fill(9);
        assert!(rig.read_all(View::Origin).unwrap() == expected);
    }
}
