//! Which volumes orders are busy with. Orders that concern the same volume are
//! executed one after the other, in the order in which they came; so are those that
//! concern several volumes each, for a group is held as one and alone. All others
//! pass each other by.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard};

use crate::control::protocol::{Order, SnapshotName};

/// What an order concerns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Scope {
    volumes: BTreeSet<String>,
}

impl Scope {
    /// Nothing that others could change under it: a look.
    pub(super) fn nothing() -> Self {
        Self::default()
    }

    /// One volume.
    pub(super) fn volume(name: &str) -> Self {
        Self {
            volumes: BTreeSet::from([name.to_owned()]),
        }
    }

    fn volumes<'a>(names: impl IntoIterator<Item = &'a String>) -> Self {
        Self {
            volumes: names.into_iter().cloned().collect(),
        }
    }

    fn snapshots(names: &[SnapshotName]) -> Self {
        Self::volumes(names.iter().map(|name| &name.volume))
    }

    /// What `order` concerns.
    pub(super) fn of(order: &Order) -> Self {
        match order {
            Order::SnapshotCreate(create) => Self::snapshots(&create.snapshots),
            Order::SnapshotRemove(remove) => Self::snapshots(&remove.snapshots),
            Order::SnapshotExtend(extend) => Self::volume(&extend.snapshot.volume),
            Order::SnapshotMerge(merge) => Self::volume(&merge.snapshot.volume),
            Order::SnapshotCancel(cancel) => Self::volume(&cancel.snapshot.volume),
            Order::SnapshotRename(rename) => Self::volume(&rename.snapshot.volume),
            Order::SnapshotReset(reset) => Self::volume(&reset.snapshot.volume),
            Order::Suspend(suspend) => Self::volumes(&suspend.volumes),
            Order::Resume(resume) => Self::volumes(&resume.volumes),
            Order::VolumeResize(resize) => Self::volume(&resize.name),
            Order::VolumeAdd(add) => Self::volume(&add.name),
            Order::VolumeRemove(remove) => Self::volume(&remove.name),
            Order::SnapshotList(_)
            | Order::VolumeList
            | Order::Clients
            | Order::Disconnect(_)
            | Order::Events(_) => Self::nothing(),
        }
    }

    /// Whether it is about this volume.
    pub(super) fn has(&self, volume: &str) -> bool {
        self.volumes.contains(volume)
    }

    fn is_group(&self) -> bool {
        self.volumes.len() > 1
    }

    /// One of the two has to wait for the other.
    fn meets(&self, other: &Self) -> bool {
        (self.is_group() && other.is_group()) || !self.volumes.is_disjoint(&other.volumes)
    }
}

/// The orders that are executed, or wait for that.
#[derive(Debug, Default)]
pub(super) struct Claims {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    last: u64,
    /// In the order in which they came.
    claims: Vec<(u64, Scope)>,
    is_closed: bool,
}

/// What is one order's until it is dropped.
#[derive(Debug)]
pub(super) struct Claimed<'a> {
    claims: &'a Claims,
    number: u64,
    pub(super) scope: Scope,
}

impl Claims {
    /// Wait until nobody before has to do with `scope` any more. `None`: no more
    /// orders are executed.
    pub(super) fn claim(&self, scope: Scope) -> Option<Claimed<'_>> {
        let mut queue = self.lock();
        queue.last += 1;
        let number = queue.last;
        queue.claims.push((number, scope.clone()));
        let claimed = Claimed {
            claims: self,
            number,
            scope,
        };
        let must_wait = |queue: &mut Queue| {
            let mut earlier = queue.claims.iter().take_while(|(other, _)| *other < number);
            !queue.is_closed && earlier.any(|(_, other)| other.meets(&claimed.scope))
        };
        let queue = self.changed.wait_while(queue, must_wait);
        let is_closed = queue.expect("no holder of this lock panics").is_closed;
        (!is_closed).then_some(claimed)
    }

    /// Who waits does so in vain from now on, and so does who comes.
    pub(super) fn close(&self) {
        self.lock().is_closed = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().expect("no holder of this lock panics")
    }
}

impl Drop for Claimed<'_> {
    fn drop(&mut self) {
        let mut queue = self.claims.lock();
        queue.claims.retain(|(number, _)| *number != self.number);
        drop(queue);
        self.claims.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_meet_at_a_volume_and_groups_meet_each_other() {
        let of = |names: &[&str]| Scope {
            volumes: names.iter().map(|&name| name.to_owned()).collect(),
        };
        for (a, b, meet) in [
            (of(&["a"]), of(&["a"]), true),
            (of(&["a"]), of(&["b"]), false),
            (of(&["a", "b"]), of(&["b"]), true),
            (of(&["a", "b"]), of(&["c", "d"]), true),
            (of(&["a", "b"]), of(&["c"]), false),
            (of(&[]), of(&["a", "b"]), false),
            (of(&[]), of(&[]), false),
        ] {
            assert_eq!(a.meets(&b), meet, "{a:?} {b:?}");
            assert_eq!(b.meets(&a), meet, "{b:?} {a:?}");
        }
    }

    #[test]
    fn who_came_first_goes_first_and_closing_ends_the_waiting() {
        let claims = Claims::default();
        let first = claims.claim(Scope::volume("a")).unwrap();
        let other = claims.claim(Scope::volume("b")).unwrap();
        drop(other);
        std::thread::scope(|scope| {
            let (told, heard) = std::sync::mpsc::channel();
            let wait = |number, told: std::sync::mpsc::Sender<i32>| {
                let claimed = claims.claim(Scope::volume("a"));
                if claimed.is_some() {
                    told.send(number).unwrap();
                }
                claimed.is_some()
            };
            let mut waiting = Vec::new();
            for number in 1..=2 {
                let told = told.clone();
                waiting.push(scope.spawn(move || wait(number, told)));
                while claims.lock().claims.len() <= number as usize {
                    std::thread::yield_now();
                }
            }
            assert!(heard.try_recv().is_err(), "the volume is somebody's");
            drop(first);
            assert_eq!((heard.recv(), heard.recv()), (Ok(1), Ok(2)));
            assert!(waiting.into_iter().all(|one| one.join().unwrap()));
            let last = claims.claim(Scope::volume("a")).unwrap();
            let told = told.clone();
            let refused = scope.spawn(move || wait(3, told));
            while claims.lock().claims.len() < 2 {
                std::thread::yield_now();
            }
            claims.close();
            assert!(!refused.join().unwrap());
            drop(last);
        });
        assert!(claims.claim(Scope::nothing()).is_none());
    }
}
