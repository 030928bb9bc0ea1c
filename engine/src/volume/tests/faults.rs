//! Disks that fail, and others that never rest: what the engine does then, step by step.

use super::*;

const FIRST: SnapshotId = SnapshotId(0);

/// The volume of a rig with one store, driven by hand.
pub(super) fn rig(kind: StoreKind, ready: u64, limit: u64) -> Rig {
    Rig::new(&[(kind, 1, ready, limit)], 1)
}

pub(super) fn write(rig: &mut Rig, id: u64, view: View, sector: u64) {
    let command = Command::Write {
        offset: sector * 512,
        data: Bytes::from(vec![id as u8; 512]),
        fua: false,
    };
    let id = RequestId(id);
    rig.volume.handle_request(Request { id, view, command });
}

impl Rig {
    /// Take what the engine wants done.
    pub(super) fn take(&mut self) {
        while let Some(op) = self.volume.poll_disk_op() {
            self.running.push(op);
        }
    }

    /// Perform one of the operations that `chosen` picks, well.
    pub(super) fn perform(&mut self, chosen: impl Fn(&DiskOp) -> bool) {
        self.end(chosen, true, DiskError::Io(5));
    }

    /// Fail it.
    pub(super) fn fail(&mut self, chosen: impl Fn(&DiskOp) -> bool, error: DiskError) {
        self.end(chosen, false, error);
    }

    fn end(&mut self, chosen: impl Fn(&DiskOp) -> bool, well: bool, error: DiskError) {
        let index = self.running.iter().position(chosen);
        let op = self
            .running
            .remove(index.expect("the engine has asked for it"));
        let device = match op.device {
            Device::Origin => 0,
            Device::Cow(id) => id.0 as usize + 1,
        };
        let outcome = if well {
            Ok(self.devices[device].perform(&op.action))
        } else {
            Err(error)
        };
        self.volume.handle_completion(op.id, outcome);
        self.take();
    }

    pub(super) fn wants(&self, chosen: impl Fn(&DiskOp) -> bool) -> bool {
        self.running.iter().any(chosen)
    }

    pub(super) fn events(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.volume.poll_event()).collect()
    }
}

pub(super) fn is_flush(op: &DiskOp) -> bool {
    op.action == Action::Flush && op.device != Device::Origin
}

pub(super) fn is_grow(op: &DiskOp) -> bool {
    matches!(op.action, Action::Grow { .. })
}

pub(super) fn is_header(op: &DiskOp) -> bool {
    matches!(op.action, Action::Write { offset: 0, .. }) && op.device != Device::Origin
}

pub(super) fn is_store_write(op: &DiskOp) -> bool {
    matches!(op.action, Action::Write { offset, .. } if offset > 0) && op.device != Device::Origin
}

pub(super) fn is_origin_read(op: &DiskOp) -> bool {
    matches!(op.action, Action::Read { .. }) && op.device == Device::Origin
}

/// A snapshot that is lost while a flush of its store runs: the flush of the
/// header begins after that has ended, and is not believed if that has failed.
#[test]
fn a_flush_that_fails_beside_the_header_leaves_no_doubt() {
    for first_flush_ends_well in [true, false] {
        let mut rig = rig(StoreKind::Persistent, 40, 40);
        write(&mut rig, 1, View::Origin, 3);
        rig.take();
        rig.perform(is_origin_read);
        rig.perform(is_store_write);
        assert!(rig.wants(is_flush), "the commit's flush has begun");
        write(&mut rig, 2, View::Origin, 9);
        rig.take();
        rig.fail(is_origin_read, DiskError::Io(5));
        rig.perform(is_header);
        let flushes = rig.running.iter().filter(|op| is_flush(op)).count();
        assert_eq!(flushes, 1, "two flushes at the same time");
        if first_flush_ends_well {
            rig.perform(is_flush);
            rig.perform(is_flush);
            assert!(matches!(rig.events()[..], [Event::Invalid(..)]));
        } else {
            rig.fail(is_flush, DiskError::Io(5));
            assert!(matches!(rig.events()[..], [Event::MarkLost(FIRST, _)]));
            rig.volume.marked_lost(FIRST, false);
            assert!(matches!(rig.events()[..], [Event::Unmarked(..)]));
        }
        while rig.step() {}
        let replies = std::mem::take(&mut rig.replies);
        assert_eq!(replies.len(), 2);
        let all_well = replies.iter().all(|reply| reply.result.is_ok());
        assert_eq!(
            all_well, first_flush_ends_well,
            "origin writes go on if the disk knows"
        );
    }
}

/// A store whose header cannot be marked is marked elsewhere: until that is so the
/// write that broke it waits, and with it the end of the volume; if there is no mark
/// at all, it fails.
#[test]
fn a_write_waits_until_the_loss_is_marked_somewhere() {
    for durable in [true, false] {
        for closing in [true, false] {
            let mut rig = rig(StoreKind::Persistent, 40, 40);
            write(&mut rig, 1, View::Origin, 3);
            rig.take();
            rig.fail(is_origin_read, DiskError::Io(5));
            rig.fail(is_header, DiskError::Io(5));
            assert!(matches!(rig.events()[..], [Event::MarkLost(FIRST, _)]));
            if closing {
                rig.volume.close();
            }
            while rig.step() {}
            assert!(
                rig.replies.is_empty(),
                "the write does not wait for the mark"
            );
            assert!(rig.events().is_empty());
            assert_eq!(rig.volume.status(FIRST), Some(Status::Invalid));
            rig.volume.marked_lost(FIRST, durable);
            rig.volume.marked_lost(FIRST, !durable);
            while rig.step() {}
            let [reply] = &rig.replies[..] else {
                panic!("{:?}", rig.replies);
            };
            assert_eq!(reply.result.is_ok(), durable);
            let events = rig.events();
            let told = matches!(events[0], Event::Invalid(..));
            assert_eq!(told, durable, "{events:?}");
            if closing {
                assert_eq!(events.last(), Some(&Event::Closed(durable)));
            }
        }
    }
}

/// One that is removed while its mark is being made needs none.
#[test]
fn a_removal_does_not_wait_for_the_mark() {
    let mut rig = rig(StoreKind::Persistent, 40, 40);
    write(&mut rig, 1, View::Origin, 3);
    rig.take();
    rig.fail(is_origin_read, DiskError::Io(5));
    rig.fail(is_header, DiskError::Io(5));
    assert!(matches!(rig.events()[..], [Event::MarkLost(FIRST, _)]));
    rig.volume.remove_snapshot(FIRST);
    while rig.step() {}
    assert_eq!(rig.events(), [Event::Removed(FIRST)]);
    rig.volume.marked_lost(FIRST, false);
    while rig.step() {}
    assert_eq!(rig.replies.len(), 1);
    assert!(rig.replies[0].result.is_ok());
    assert!(rig.events().is_empty());
}

/// A full file system is asked again when there is need, and only then is the
/// store as large as it will be.
#[test]
fn growth_that_failed_ahead_of_need_is_tried_again() {
    let mut rig = rig(StoreKind::Persistent, 4, 30);
    write(&mut rig, 1, View::Origin, 0);
    rig.take();
    rig.fail(is_grow, DiskError::NoSpace);
    while rig.step() {}
    assert!(!rig.wants(is_grow), "asked again without need");
    for sector in 1..10 {
        write(&mut rig, sector + 1, View::Origin, sector);
        while rig.step() {}
    }
    let replies = std::mem::take(&mut rig.replies);
    assert_eq!(replies.len(), 10);
    assert!(replies.iter().all(|reply| reply.result.is_ok()));
    let status = rig.volume.status(SnapshotId(0)).unwrap();
    assert!(
        matches!(status, Status::Active { total: 30, .. }),
        "{status}"
    );
}

/// An error of growth that is no full disk may have lost what was copied before.
#[test]
fn growth_that_meets_an_io_error_loses_the_snapshot() {
    let mut rig = rig(StoreKind::Persistent, 4, 30);
    write(&mut rig, 1, View::Origin, 0);
    rig.take();
    rig.fail(is_grow, DiskError::Io(5));
    while rig.step() {}
    assert!(matches!(rig.events()[..], [Event::Invalid(..)]));
    assert_eq!(rig.replies.len(), 1);
}

/// A reader that always has another read in hand does not keep a FLUSH waiting.
#[test]
fn reads_without_end_do_not_starve_a_flush() {
    let mut rig = rig(StoreKind::Persistent, 40, 40);
    let flush = Request {
        id: RequestId(0),
        view: View::Origin,
        command: Command::Flush,
    };
    let read = |id| Request {
        id: RequestId(id),
        view: View::Snapshot(SnapshotId(0)),
        command: Command::Read {
            offset: 0,
            len: 512,
        },
    };
    rig.volume.handle_request(read(1));
    rig.volume.handle_request(flush);
    for id in 2..2000 {
        rig.volume.handle_request(read(id));
        let op = rig.volume.poll_disk_op().expect("there is always one");
        let bytes = match op.action {
            Action::Flush => return,
            _ => rig.devices[0].perform(&op.action),
        };
        rig.volume.handle_completion(op.id, Ok(bytes));
    }
    panic!("the flush was never begun");
}
