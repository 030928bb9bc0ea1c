//! Snapshots that are taken by an order: all of the order at one instant, though
//! they may be of several views of the volume. Each view has an instant of its own in
//! the engine; all are held before the first is taken.

use std::sync::mpsc::Sender;

use nbdsnap_engine::{InstantId, SnapshotId, TakeError, View};

use super::{Hosted, NewSnapshot, State};

/// Whom to tell when the volume is held.
pub(super) type Held = Sender<Result<Vec<SnapshotId>, NotHeld>>;

/// Why a volume cannot be held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotHeld {
    /// A flush of the origin failed.
    FlushFailed,
    /// The volume takes no more requests.
    Closing,
    /// What is to be taken a snapshot of is being merged, or has gone.
    NotThere,
}

impl From<TakeError> for NotHeld {
    fn from(refused: TakeError) -> Self {
        match refused {
            TakeError::NoSuchView | TakeError::Merging => Self::NotThere,
            TakeError::Closing => Self::Closing,
        }
    }
}

/// What is being prepared, or held.
#[derive(Debug)]
pub(super) struct Hold {
    /// One for each view; true: the engine holds it.
    instants: Vec<(InstantId, bool)>,
    /// In the order in which the snapshots were given.
    ids: Vec<SnapshotId>,
    held: Held,
}

impl Hosted {
    /// Begin to hold what these snapshots are of.
    pub(super) fn hold(&mut self, snapshots: Vec<NewSnapshot>, held: Held) {
        assert!(self.hold.is_none(), "one instant at a time");
        if self.state != State::Serving {
            let _ = held.send(Err(NotHeld::Closing));
            return;
        }
        let mut hold = Hold {
            instants: Vec::new(),
            ids: Vec::new(),
            held,
        };
        if let Err(refused) = self.begin_instants(snapshots, &mut hold) {
            self.give_up(&hold);
            let _ = hold.held.send(Err(refused));
            return;
        }
        self.hold = Some(hold);
    }

    fn begin_instants(
        &mut self,
        snapshots: Vec<NewSnapshot>,
        hold: &mut Hold,
    ) -> Result<(), NotHeld> {
        let mut views: Vec<(View, Vec<usize>)> = Vec::new();
        let mut stores = Vec::new();
        let mut rest = Vec::new();
        for (place, snapshot) in snapshots.into_iter().enumerate() {
            let of = self.origin_named(&snapshot.name);
            let of = of.ok_or(NotHeld::NotThere)?;
            match views.iter_mut().find(|(view, _)| *view == of) {
                Some((_, places)) => places.push(place),
                None => views.push((of, vec![place])),
            }
            stores.push(Some(snapshot.store));
            rest.push(Some((snapshot.name, snapshot.disk.file, snapshot.settings)));
        }
        let mut ids = vec![None; rest.len()];
        for (view, places) in views {
            let of_view = places.iter().filter_map(|&place| stores[place].take());
            let (instant, taken) = self.tree.begin_instant(view, of_view.collect())?;
            hold.instants.push((instant, false));
            hold.ids.extend(&taken);
            for (place, id) in places.into_iter().zip(taken) {
                let (name, file, settings) = rest[place].take().expect("it has one place");
                self.add_store(id, name, file);
                self.settle(id, settings);
                ids[place] = Some(id);
            }
        }
        hold.ids = ids.into_iter().flatten().collect();
        Ok(())
    }

    /// The instant is now. False: nothing is held any more.
    pub(super) fn take(&mut self) -> bool {
        let Some(hold) = self.hold.take() else {
            return false;
        };
        let mut instants = hold.instants.iter();
        instants.all(|&(instant, _)| self.tree.take_instant(instant).is_ok())
    }

    /// Nothing is taken.
    pub(super) fn abandon(&mut self) {
        if let Some(hold) = self.hold.take() {
            self.give_up(&hold);
        }
    }

    fn give_up(&mut self, hold: &Hold) {
        for &(instant, _) in &hold.instants {
            self.tree.abandon_instant(instant);
        }
        for id in &hold.ids {
            self.stores.remove(id);
            self.auto_extends.remove(id);
        }
    }

    /// The engine holds an instant.
    pub(super) fn instant_held(&mut self, instant: InstantId) {
        let Some(hold) = &mut self.hold else {
            return;
        };
        for (one, is_held) in &mut hold.instants {
            *is_held |= *one == instant;
        }
        if hold.instants.iter().all(|&(_, is_held)| is_held) {
            let _ = hold.held.send(Ok(hold.ids.clone()));
        }
    }

    /// It cannot be held.
    pub(super) fn instant_failed(&mut self, instant: InstantId) {
        let in_it = |hold: &mut Hold| hold.instants.iter().any(|&(one, _)| one == instant);
        if let Some(hold) = self.hold.take_if(in_it) {
            self.give_up(&hold);
            let why = if self.state == State::Serving {
                NotHeld::FlushFailed
            } else {
                NotHeld::Closing
            };
            let _ = hold.held.send(Err(why));
        }
    }
}
