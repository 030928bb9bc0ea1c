//! Which volumes orders are busy with. Orders that concern the same volume are
//! executed one after the other, in the order in which they came; so are those that
//! hold several volumes each, for a group is held as one and alone. All others pass
//! each other by: also those that have several volumes come or go.

use std::collections::BTreeSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use crate::control::dm::{DeviceName, DmOrder};
use crate::control::protocol::{Order, SnapshotName};

/// What an order concerns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Scope {
    volumes: BTreeSet<String>,
    /// Several volumes that are held as one.
    is_group: bool,
}

impl Scope {
    /// Nothing that others could change under it: a look.
    pub(super) fn nothing() -> Self {
        Self::default()
    }

    /// One volume.
    pub(super) fn volume(name: &str) -> Self {
        Self::apart([name])
    }

    /// Several, each for itself.
    fn apart<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        Self {
            volumes: names.into_iter().map(str::to_owned).collect(),
            is_group: false,
        }
    }

    /// Several, held as one.
    fn group<'a>(names: impl IntoIterator<Item = &'a String>) -> Self {
        let apart = Self::apart(names.into_iter().map(String::as_str));
        Self {
            is_group: apart.volumes.len() > 1,
            ..apart
        }
    }

    fn snapshots(names: &[SnapshotName]) -> Self {
        Self::group(names.iter().map(|name| &name.volume))
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
            Order::Suspend(suspend) => Self::group(&suspend.volumes),
            Order::Resume(resume) => Self::group(&resume.volumes),
            Order::VolumeResize(resize) => Self::volume(&resize.name),
            Order::VolumeAdd(add) => Self::volume(&add.name),
            Order::VolumesAdd(adds) => Self::apart(adds.volumes.iter().map(|add| &*add.name)),
            Order::VolumeRemove(remove) => Self::volume(&remove.name),
            Order::VolumesRemove(remove) => Self::apart(remove.names.iter().map(String::as_str)),
            Order::SnapshotList(_)
            | Order::VolumeList
            | Order::Clients
            | Order::Disconnect(_)
            | Order::Events(_) => Self::nothing(),
            Order::Dm(order) => Self::of_dm(order),
        }
    }

    /// What changes a volume or its snapshots, should the order be about one; mapped
    /// devices are the device-mapper's to keep apart.
    fn of_dm(order: &DmOrder) -> Self {
        match order {
            DmOrder::Suspend { device, .. }
            | DmOrder::Resume { device, .. }
            | DmOrder::Remove { device, .. } => match device {
                DeviceName::Name(name) => Self::volume(name.split('@').next().unwrap_or(name)),
                DeviceName::Uuid(_) | DeviceName::Number { .. } => Self::nothing(),
            },
            _ => Self::nothing(),
        }
    }

    /// One of the two has to wait for the other.
    fn meets(&self, other: &Self) -> bool {
        (self.is_group && other.is_group) || !self.volumes.is_disjoint(&other.volumes)
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

/// What is one order's, or that of several which are executed as one, until it is
/// dropped.
#[derive(Debug)]
pub(super) struct Claimed {
    claims: Arc<Claims>,
    numbers: BTreeSet<u64>,
    scope: Scope,
}

impl Claimed {
    /// Whether it is about this volume.
    pub(super) fn has(&self, volume: &str) -> bool {
        self.scope.volumes.contains(volume)
    }

    /// What both have, as one.
    pub(super) fn and(mut self, mut other: Self) -> Self {
        self.numbers.append(&mut other.numbers);
        self.scope.volumes.append(&mut other.scope.volumes);
        self.scope.is_group |= other.scope.is_group;
        self
    }
}

impl Claims {
    /// Wait until nobody before has to do with `scope` any more. `None`: no more
    /// orders are executed.
    pub(super) fn claim(self: &Arc<Self>, scope: Scope) -> Option<Claimed> {
        let mut queue = self.lock();
        queue.last += 1;
        let number = queue.last;
        queue.claims.push((number, scope.clone()));
        let claimed = Claimed {
            claims: Arc::clone(self),
            numbers: BTreeSet::from([number]),
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

    /// No more orders are executed.
    pub(super) fn is_closed(&self) -> bool {
        self.lock().is_closed
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().expect("no holder of this lock panics")
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        let mut queue = self.claims.lock();
        queue
            .claims
            .retain(|(number, _)| !self.numbers.contains(number));
        drop(queue);
        self.claims.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::protocol::VolumesAdd;

    #[test]
    fn orders_meet_at_a_volume_and_groups_meet_each_other() {
        let of = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
            Scope::group(&names)
        };
        let apart = Scope::apart;
        for (a, b, meet) in [
            (of(&["a"]), of(&["a"]), true),
            (of(&["a"]), of(&["b"]), false),
            (of(&["a", "b"]), of(&["b"]), true),
            (of(&["a", "b"]), of(&["c", "d"]), true),
            (of(&["a", "b"]), of(&["c"]), false),
            (apart(["a", "b"]), of(&["c", "d"]), false),
            (apart(["a", "b"]), of(&["b", "c"]), true),
            (apart(["a", "b"]), apart(["c", "d"]), false),
            (of(&[]), of(&["a", "b"]), false),
            (of(&[]), of(&[]), false),
        ] {
            assert_eq!(a.meets(&b), meet, "{a:?} {b:?}");
            assert_eq!(b.meets(&a), meet, "{b:?} {a:?}");
        }
    }

    #[test]
    fn who_came_first_goes_first_and_closing_ends_the_waiting() {
        let claims = Arc::new(Claims::default());
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

    #[test]
    fn claims_that_are_joined_end_together() {
        let claims = Arc::new(Claims::default());
        let [a, b] = ["a", "b"].map(|name| claims.claim(Scope::volume(name)).unwrap());
        let other = claims.claim(Scope::volume("c")).unwrap();
        let both = a.and(b);
        assert!(both.has("a") && both.has("b") && !both.has("c"));
        assert_eq!(claims.lock().claims.len(), 3);
        drop(both);
        assert_eq!(claims.lock().claims.len(), 1);
        drop(other);
        let order = Order::VolumesAdd(VolumesAdd {
            volumes: Vec::new(),
        });
        assert_eq!(Scope::of(&order), Scope::nothing());
    }
}
