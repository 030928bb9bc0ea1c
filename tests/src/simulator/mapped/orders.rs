//! What the operator does: snapshots come and go, stores change hands, merges begin and
//! end, tables are exchanged, devices stand still; with requests going on all the while.

use nbdsnap_engine::Status;
use nbdsnap_engine::dm::{Line, Persistence, Target};

use super::boot::merge_device;
use super::process::{Process, Watched};
use super::tally::Tally;
use super::world::{COWS, Name, Phase, Place, SECTORS, Snap, Stop, World, line, linear};
use crate::model::ViewModel;
use crate::pattern::SECTOR;
use crate::simulator::Violation;
use crate::simulator::world::say;
use crate::store_bytes;
use nbdsnap_engine::Command;

/// How deep snapshots are taken of snapshots.
const DEEPEST: usize = 4;

impl Process<'_> {
    /// Some order, to its end.
    pub(super) fn random_order(&mut self) -> Result<(), Stop> {
        match self.world.rng.below(24) {
            0..8 => self.take_snapshot(),
            8..10 => self.remove_snapshot(),
            10..13 => self.hand_over(),
            13..16 => self.merge(),
            16..19 => self.exchange(),
            19..22 => self.stand_still(),
            _ => self.end_merges(),
        }
    }

    /// Requests, with operations under way.
    fn meanwhile(&mut self) -> Result<(), Stop> {
        for _ in 0..self.world.rng.below(8) {
            if self.world.rng.chance(1, 2) {
                self.random_request();
            }
            self.step()?;
        }
        Ok(())
    }

    /// A snapshot that nothing stands on, in this phase.
    fn pick(&mut self, is_it: impl Fn(&Snap) -> bool) -> Option<usize> {
        let snaps = &self.world.snaps;
        let fits = |&i: &usize| is_it(&snaps[i]) && self.world.snaps_of(Some(i)).is_empty();
        let found: Vec<_> = (0..snaps.len()).filter(fits).collect();
        (!found.is_empty()).then(|| found[self.world.rng.index(found.len())])
    }

    fn take_snapshot(&mut self) -> Result<(), Stop> {
        let used = |cow: usize| {
            let mut snaps = self.world.snaps.iter();
            snaps.any(|snap| snap.cow == cow && snap.phase != Phase::Gone)
        };
        let Some(cow) = (0..COWS).find(|&cow| !used(cow)) else {
            return Ok(());
        };
        let origins = self.world.in_phase(|phase| phase == Phase::Active);
        let origins = origins.into_iter().filter(|&i| {
            self.world.snaps[i].persistence != Persistence::Transient
                && self.world.path(Some(i)).len() < DEEPEST
        });
        let origins: Vec<Name> = std::iter::once(None).chain(origins.map(Some)).collect();
        let origin = origins[self.world.rng.index(origins.len())];
        // As everybody does before a device is used again for a store.
        let cow_device = self.lower(&format!("cow{cow}"));
        let zeros = Command::Write {
            offset: 0,
            data: vec![0; SECTOR as usize].into(),
            fua: true,
        };
        if let Err(failure) = self.ask(cow_device, zeros)? {
            return self.excused(&format!("zeroing cow{cow}: {failure:?}"));
        }
        let chunk = [1, 2, 4][self.world.rng.index(3)];
        let persistence = match self.world.rng.below(8) {
            0 => Persistence::Transient,
            1 | 2 => Persistence::PersistentOverflow,
            _ => Persistence::Persistent,
        };
        let room = match persistence {
            Persistence::Transient => self.world.room(cow) / chunk,
            _ => store_bytes::capacity(self.world.room(cow), chunk),
        };
        let index = self.world.snaps.len();
        let device = format!("snap{index}");
        self.world.snaps.push(Snap {
            origin,
            cow,
            persistence,
            chunk,
            device: device.clone(),
            model: ViewModel::new(0, |_| 0),
            phase: Phase::Creating,
            is_roomy: room >= SECTORS.div_ceil(chunk),
            is_unknown: false,
        });
        self.views.insert(device.clone(), index);
        self.create(&device);
        let lines = self.snap_lines(index, false);
        let mut refused = self.load(&device, &lines)?.err();
        if refused.is_none() {
            self.meanwhile()?;
            refused = self.resume_new(index)?;
        }
        let is_lost = || self.status(&device) == Some(Status::Invalid);
        if refused.is_none() && self.world.snaps[index].phase != Phase::Creating && !is_lost() {
            if persistence == Persistence::Transient {
                self.world.ledger.count(Tally::CreatedTransient);
            }
            return Ok(());
        }
        if self.world.snaps[index].phase != Phase::Creating && refused.is_none() {
            // It was lost as soon as it was there.
            return Ok(());
        }
        let merging = self.world.merging_into(origin).is_some();
        self.world.bury(index);
        self.remove(&device)?;
        if merging && refused.as_deref() == Some("A snapshot is already merging.") {
            self.world.ledger.count(Tally::CreateRefused);
            return Ok(());
        }
        self.world.ledger.count(Tally::CreateFailed);
        if self.world.may_be_lost(origin) {
            return Ok(());
        }
        self.excused(&format!("the creation of snapshot {index}: {refused:?}"))
    }

    /// Something failed that fails only where disks do, or stores without room.
    fn excused(&self, what: &str) -> Result<(), Stop> {
        let lost = self.world.in_phase(Phase::is_lost);
        if self.world.faulty || !lost.is_empty() {
            return Ok(());
        }
        Err(Violation(format!("{what}, for no reason")).into())
    }

    /// Resume a snapshot's device for the first time: its instant. Why it was refused.
    fn resume_new(&mut self, index: usize) -> Result<Option<String>, Stop> {
        let device = self.world.snaps[index].device.clone();
        let id = self.device(&device);
        let order = match self.mapper.resume(id, false) {
            Ok(order) => order,
            Err(refused) => return Ok(Some(refused.why)),
        };
        self.watched.insert(order, Watched::Creation { index });
        Ok(self.wait(order)?.err().map(|refused| refused.why))
    }

    fn remove_snapshot(&mut self) -> Result<(), Stop> {
        let is_it = |snap: &Snap| snap.phase == Phase::Active || snap.phase.is_lost();
        let Some(index) = self.pick(is_it) else {
            return Ok(());
        };
        if self.world.snaps[index].phase == (Phase::Lost { marked: false }) {
            self.world.ledger.count(Tally::RemovedUnmarked);
        }
        self.give_up(index);
        let device = self.world.snaps[index].device.clone();
        self.remove(&device)?;
        self.world.ledger.count(Tally::Removed);
        Ok(())
    }

    /// From here on the snapshot is no concern of anybody's.
    fn give_up(&mut self, index: usize) {
        let mut busy = false;
        for p in self.pending.values_mut().filter(|p| p.name == Some(index)) {
            p.orphan = true;
            busy = true;
        }
        if busy {
            self.world.ledger.count(Tally::RemovedBusy);
        }
        self.world.bury(index);
    }

    /// The store of a snapshot goes to another one.
    fn hand_over(&mut self) -> Result<(), Stop> {
        let Some(index) = self.pick(|snap| snap.phase == Phase::Active) else {
            return Ok(());
        };
        self.world.place = Place::Handover;
        let old = self.world.snaps[index].device.clone();
        let new = match old.as_str().strip_suffix("-again") {
            Some(first) => first.to_owned(),
            None => format!("{old}-again"),
        };
        self.create(&new);
        self.views.insert(new.clone(), index);
        let lines = self.snap_lines(index, false);
        must(self.load(&new, &lines)?, "the load of an heir")?;
        self.meanwhile()?;
        if self.world.rng.chance(1, 4) {
            let refused = self.resume(&new)?.err().map(|refused| refused.why);
            let why = "Unable to perform snapshot handover until source is suspended.";
            if refused.as_deref() != Some(why) {
                let text = format!("a handover from a running snapshot: {refused:?}");
                return Err(Violation(text).into());
            }
            self.world.ledger.count(Tally::HandoverRefused);
        }
        self.held = Some(index);
        self.suspend(&old, false)?;
        self.meanwhile()?;
        let resumed = self.resume(&new)?.map_err(|refused| refused.why);
        must(resumed, "a handover")?;
        self.world.snaps[index].device.clone_from(&new);
        self.held = None;
        self.meanwhile()?;
        self.remove(&old)?;
        self.views.remove(&old);
        self.world.ledger.count(Tally::HandedOver);
        Ok(())
    }

    /// The store of a snapshot goes to a snapshot-merge: in the place of the origin's
    /// snapshot-origin, as LVM does it, or in a device of its own.
    fn merge(&mut self) -> Result<(), Stop> {
        let Some(index) = self
            .pick(|snap| snap.phase == Phase::Active && snap.persistence != Persistence::Transient)
        else {
            return Ok(());
        };
        let origin = self.world.snaps[index].origin;
        if self.world.merging_into(origin).is_some() || self.world.is_unknown(Some(index)) {
            return Ok(());
        }
        self.world.place = Place::Handover;
        let old = self.world.snaps[index].device.clone();
        let merge = merge_device(origin, index);
        self.views.insert(merge.clone(), index);
        match origin {
            None => self.suspend(&merge, false)?,
            Some(_) => self.create(&merge),
        }
        self.held = Some(index);
        self.suspend(&old, false)?;
        let lines = self.snap_lines(index, true);
        must(self.load(&merge, &lines)?, "the load of a merge")?;
        self.meanwhile()?;
        if self.world.snaps[index].phase == Phase::Active {
            self.world.snaps[index].phase = Phase::MergeOrdered;
        }
        self.world.snaps[index].device.clone_from(&merge);
        self.world.place = Place::Order;
        let World { ledger, snaps, .. } = &mut *self.world;
        ledger.count(match snaps[index].origin {
            None => Tally::MergeOrdered,
            Some(_) => Tally::MergeOrderedInner,
        });
        if self.world.snaps_of(origin).len() > 1 {
            self.world.ledger.count(Tally::MergeWithSiblings);
        }
        let resumed = self.resume(&merge)?.map_err(|refused| refused.why);
        must(resumed, "a merge")?;
        self.views.remove(&old);
        self.remove(&old)?;
        let phase = self.world.snaps[index].phase;
        if phase == Phase::Merging || phase == Phase::Merged {
            self.held = None;
            return Ok(());
        }
        // It was lost before the merge could begin: the origin is what it was.
        say!(
            self.world,
            "the merge of snapshot {index} did not begin: {phase:?}"
        );
        let may_be_lost = self.world.may_be_lost(Some(index));
        self.end_merge(index)?;
        self.held = None;
        if may_be_lost {
            return Ok(());
        }
        self.excused(&format!("snapshot {index} was not merged"))
    }

    /// Where a merge is done, what was there before comes back.
    pub(super) fn end_merges(&mut self) -> Result<(), Stop> {
        for index in self.world.in_phase(|phase| phase == Phase::Merged) {
            self.end_merge(index)?;
            self.world.ledger.count(Tally::OriginBack);
        }
        Ok(())
    }

    fn end_merge(&mut self, index: usize) -> Result<(), Stop> {
        let Snap { origin, device, .. } = &self.world.snaps[index];
        let (origin, device) = (*origin, device.clone());
        if origin.is_some() {
            self.world.bury(index);
            self.views.remove(&device);
            return self.remove(&device);
        }
        let lines = self.origin_lines();
        must(self.load(&device, &lines)?, "snapshot-origin")?;
        self.world.bury(index);
        let resumed = self.resume(&device)?.map_err(|refused| refused.why);
        self.views.remove(&device);
        must(resumed, "snapshot-origin")
    }

    /// A device gets another table that means the same.
    fn exchange(&mut self) -> Result<(), Stop> {
        let at = self.world.rng.index(COWS);
        let (device, lines, tally) = match self.world.rng.below(4) {
            0 if self.world.merging_into(None).is_none() => {
                let real = self.lower("real");
                let lines = match self.world.rng.below(2) {
                    0 => self.origin_lines(),
                    _ => vec![line(0, SECTORS, linear(real, 0))],
                };
                ("base".to_owned(), lines, Tally::ExchangedUpper)
            }
            0 | 1 => {
                let lines = split(&self.world.real, self.world.rng.bits());
                self.world.real.clone_from(&lines);
                ("real".to_owned(), lines, Tally::ExchangedOrigin)
            }
            _ => {
                let lines = split(&self.world.cows[at], self.world.rng.bits());
                self.world.cows[at].clone_from(&lines);
                (format!("cow{at}"), lines, Tally::ExchangedStore)
            }
        };
        must(self.load(&device, &lines)?, "an exchange")?;
        if self.world.rng.chance(1, 2) {
            self.suspend(&device, false)?;
            self.meanwhile()?;
        }
        let resumed = self.resume(&device)?.map_err(|refused| refused.why);
        must(resumed, "an exchange")?;
        self.world.ledger.count(tally);
        Ok(())
    }

    fn stand_still(&mut self) -> Result<(), Stop> {
        let active = self.world.in_phase(|phase| phase == Phase::Active);
        let cow = format!("cow{}", self.world.rng.index(COWS));
        let mut devices: Vec<String> = vec!["real".into(), "base".into(), cow];
        let snaps = active.iter().map(|&i| self.world.snaps[i].device.clone());
        devices.extend(snaps);
        let merges = self.world.in_phase(|phase| phase == Phase::Merging);
        let merges: Vec<_> = merges
            .iter()
            .map(|&i| self.world.snaps[i].device.clone())
            .collect();
        devices.extend(merges.iter().cloned());
        let device = devices[self.world.rng.index(devices.len())].clone();
        let noflush = self.world.rng.chance(1, 4);
        self.suspend(&device, noflush)?;
        self.meanwhile()?;
        self.meanwhile()?;
        let resumed = self.resume(&device)?.map_err(|refused| refused.why);
        must(resumed, "the resume of a device that stood still")?;
        self.world.ledger.count(if noflush {
            Tally::StoodStillNoFlush
        } else {
            Tally::StoodStill
        });
        if merges.contains(&device) {
            self.world.ledger.count(Tally::MergeStoodStill);
        }
        Ok(())
    }
}

fn must(result: Result<(), String>, what: &str) -> Result<(), Stop> {
    result.map_err(|why| Violation(format!("{what} is refused: {why}")).into())
}

/// Some line of a table in two.
fn split(lines: &[Line], dice: u64) -> Vec<Line> {
    let mut lines = lines.to_vec();
    let at = dice as usize % lines.len();
    let whole = lines[at].clone();
    let row = match &whole.target {
        Target::Striped { chunk, stripes } => chunk * stripes.len() as u64,
        _ => 1,
    };
    let rows = whole.len / row;
    if rows < 2 || lines.len() > 4 {
        return lines;
    }
    let first = (1 + (dice >> 32) % (rows - 1)) * row;
    let rest = match whole.target.clone() {
        Target::Linear { lower, start } => linear(lower, start + first),
        Target::Striped { chunk, stripes } => Target::Striped {
            chunk,
            stripes: stripes
                .into_iter()
                .map(|(lower, start)| (lower, start + first / row * chunk))
                .collect(),
        },
        other => unreachable!("no such line is below: {other:?}"),
    };
    lines[at].len = first;
    lines.insert(at + 1, line(whole.start + first, whole.len - first, rest));
    lines
}
