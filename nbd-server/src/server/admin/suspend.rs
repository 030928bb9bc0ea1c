//! `suspend` and `resume`: all the volumes that are named, or none.

use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use super::Administrator;
use super::refusal::Refused;
use super::turn::Turn;
use crate::control::protocol::{Answer, EventKind, EventReport, Resume, Suspend};
use crate::io::{VolumeId, VolumeOrder};
use crate::server::registry::Suspension;

/// Volumes come to rest within this time, or go on.
const REST: Duration = Duration::from_secs(30);

impl Turn<'_> {
    pub(super) fn suspend(&mut self, suspend: &Suspend) -> Result<Answer, Refused> {
        let names = &suspend.volumes;
        let places = self.places(names)?;
        for name in names {
            if self.suspension(name) != Suspension::Running {
                return Err(Refused::Suspended(name.clone()));
            }
        }
        let until = Instant::now() + REST;
        let mut answers = Vec::new();
        for &(shard, volume) in &places {
            let (suspended, answer) = channel();
            self.shards[shard].order(volume, VolumeOrder::Suspend { suspended });
            answers.push((shard, answer));
        }
        for (name, (shard, answer)) in names.iter().zip(answers) {
            let refused = match self.wait(shard, &answer, Some(until)) {
                Ok(true) => continue,
                Ok(false) => Refused::SuspendedNotDurable(name.clone()),
                Err(Refused::TooSlow) => Refused::NotSuspendedInTime(REST.as_secs()),
                Err(refused) => refused,
            };
            for &(shard, volume) in &places {
                self.shards[shard].order(volume, VolumeOrder::Resume);
            }
            return Err(refused);
        }
        let state = match suspend.timeout_seconds {
            None => Suspension::Suspended,
            Some(seconds) => Suspension::Until(Instant::now() + Duration::from_secs(seconds)),
        };
        for name in names {
            self.set_suspension(name, state, EventKind::Suspended);
        }
        self.report_volumes(&|name| names.iter().any(|one| one == name))
    }

    pub(super) fn resume(&mut self, resume: &Resume) -> Result<Answer, Refused> {
        let names = &resume.volumes;
        self.places(names)?;
        for name in names {
            if self.suspension(name) == Suspension::Running {
                return Err(Refused::NotSuspended(name.clone()));
            }
        }
        for name in names {
            self.go_on(name);
        }
        self.report_volumes(&|name| names.iter().any(|one| one == name))
    }

    fn places(&self, names: &[String]) -> Result<Vec<(usize, VolumeId)>, Refused> {
        if names.is_empty() {
            return Err(Refused::NoVolumes);
        }
        let mut places = Vec::new();
        for (place, name) in names.iter().enumerate() {
            if names[..place].contains(name) {
                return Err(Refused::VolumeTwice(name.clone()));
            }
            let missing = || Refused::NoVolume(name.clone());
            let volume = self.registry.volume(name).ok_or_else(missing)?;
            places.push((volume.shard, volume.id));
        }
        Ok(places)
    }

    fn suspension(&self, name: &str) -> Suspension {
        let volume = self.registry.volume(name);
        volume.map_or(Suspension::Running, |volume| volume.suspension)
    }
}

impl Administrator {
    /// When the next volume goes on by itself.
    pub(super) fn next_resumption(&self) -> Option<Instant> {
        let ends = self.registry.volumes.iter().filter_map(|volume| {
            if let Suspension::Until(at) = volume.suspension {
                Some(at)
            } else {
                None
            }
        });
        ends.min()
    }

    /// Have those go on whose time is up.
    pub(super) fn resume_in_time(&mut self) {
        let now = Instant::now();
        let due = |state| matches!(state, Suspension::Until(at) if at <= now);
        let volumes = self.registry.volumes.iter();
        let names: Vec<String> = volumes
            .filter(|volume| due(volume.suspension))
            .map(|volume| volume.name.clone())
            .collect();
        for name in names {
            tracing::warn!(
                volume = name,
                "nobody has resumed the volume in time: it goes on"
            );
            self.go_on(&name);
        }
    }

    fn go_on(&mut self, name: &str) {
        if let Some(volume) = self.registry.volume(name) {
            self.shards[volume.shard].order(volume.id, VolumeOrder::Resume);
        }
        self.set_suspension(name, Suspension::Running, EventKind::Resumed);
    }

    fn set_suspension(&mut self, name: &str, state: Suspension, event: EventKind) {
        if let Some(volume) = self.registry.volume_mut(name) {
            volume.suspension = state;
        }
        let event = EventReport::new(event).of_volume(name);
        self.events.publish(event);
    }
}
