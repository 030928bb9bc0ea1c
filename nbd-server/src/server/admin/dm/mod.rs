//! Orders about mapped devices. What may be done when is the engine's to say
//! ([`nbdsnap_engine::dm`]); here the words are read, disks are opened (`disks.rs`),
//! stores are opened and made (`stores.rs`), answers are put into words (`words.rs`),
//! and clients are shown what there is. What `snapshot` and `volume` show of devices is
//! in `views.rs`, what they do to them in `ordered.rs`, `group.rs` and `rolling.rs`.
//!
//! Orders pass each other by: the device-mapper's thread is where they meet. An order
//! that waits (a suspension for requests, a load for a store on a device that stands
//! still) holds up no other.

mod disks;
mod group;
mod ordered;
mod rolling;
mod stores;
mod views;
mod words;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use nbdsnap_engine::dm::{DeviceId, DeviceInfo, Errno, Lower, Need, NewLine, OrderId, TableLine};

use super::refusal::Refused;
use super::turn::Turn;
use crate::control::dm::{DeviceName, DmAnswer, DmOrder, MAJOR, TextLine};
use crate::control::protocol::Answer;
use crate::dm::text;
use crate::io::{MAPPED_SHARD, Mapped};

pub(super) use disks::DmDisks;

/// How long a device's clients that are just leaving are waited for.
const LEAVING: Duration = Duration::from_millis(250);
/// Between two looks at whether they have.
const LOOK: Duration = Duration::from_millis(10);
/// Between two looks at whether the server stops.
const PATIENCE: Duration = Duration::from_millis(50);
/// A longer name does not fit into the kernel's either.
const LONGEST_NAME: usize = 127;

/// Why an order is not done: the device-mapper's word, or the server's.
pub(super) enum Failed {
    Dm { errno: i32, why: Option<String> },
    Server(Refused),
}

impl From<Refused> for Failed {
    fn from(refused: Refused) -> Self {
        Self::Server(refused)
    }
}

impl From<nbdsnap_engine::dm::Refused> for Failed {
    fn from(refused: nbdsnap_engine::dm::Refused) -> Self {
        Self::Dm {
            errno: errno(refused.errno),
            why: Some(refused.why),
        }
    }
}

fn errno(errno: Errno) -> i32 {
    match errno {
        Errno::Io => libc::EIO,
        Errno::NoDevice => libc::ENXIO,
        Errno::NoEntry => libc::ENOENT,
        Errno::Busy => libc::EBUSY,
        Errno::Invalid => libc::EINVAL,
    }
}

fn refused(errno: i32, why: impl Into<String>) -> Failed {
    Failed::Dm {
        errno,
        why: Some(why.into()),
    }
}

type Done<T> = Result<T, Failed>;

/// Puts the lines of a table into words, given what a device is called.
type Words = fn(&[TableLine], &dyn Fn(Lower) -> String) -> Vec<TextLine>;

impl Turn<'_> {
    pub(super) fn dm(&mut self, order: DmOrder) -> Result<Answer, Refused> {
        let answer = match self.dm_order(order) {
            Ok(answer) => answer,
            Err(Failed::Dm { errno, why }) => DmAnswer::Refused { errno, why },
            Err(Failed::Server(refused)) => return Err(refused),
        };
        Ok(Answer::Dm(answer))
    }

    fn dm_order(&mut self, order: DmOrder) -> Done<DmAnswer> {
        if let Some(export) = order.device().and_then(|device| self.served(device)) {
            return self.dm_served(&export, &order);
        }
        match order {
            DmOrder::Version => Ok(words::version()),
            DmOrder::Targets => Ok(words::targets()),
            DmOrder::List => self.dm_list(),
            DmOrder::Create { name, uuid, minor } => self.dm_create(&name, uuid, minor),
            DmOrder::Load {
                device,
                read_only,
                lines,
            } => self.dm_load(&device, read_only, &lines),
            DmOrder::Clear { device } => {
                let id = self.dm_device(&device)?;
                self.mapped(move |mapped| mapped.mapper().clear(id))??;
                self.dm_changed(id)
            }
            DmOrder::Suspend {
                device, noflush, ..
            } => {
                let id = self.dm_device(&device)?;
                self.dm_follow(move |mapped| mapped.mapper().suspend(id, noflush).map(Some))?;
                self.dm_changed(id)
            }
            DmOrder::Resume {
                device, noflush, ..
            } => {
                let id = self.dm_device(&device)?;
                let done =
                    self.dm_follow(move |mapped| mapped.mapper().resume(id, noflush).map(Some));
                let answer = self.dm_changed(id);
                done.and(answer)
            }
            DmOrder::Remove { device, deferred } => self.dm_remove(&device, deferred),
            DmOrder::Rename { device, new_name } => {
                let id = self.dm_device(&device)?;
                self.dm_check_name(&new_name)?;
                self.mapped(move |mapped| mapped.mapper().rename(id, &new_name))??;
                self.dm_changed(id)
            }
            DmOrder::SetUuid { device, uuid } => {
                let id = self.dm_device(&device)?;
                self.mapped(move |mapped| mapped.mapper().set_uuid(id, &uuid))??;
                self.dm_changed(id)
            }
            DmOrder::Info { device, inactive } => {
                let id = self.dm_device(&device)?;
                let info = words::info(&self.dm_info(id)?, inactive);
                Ok(DmAnswer::Device(info))
            }
            DmOrder::Table { device, inactive } => self.dm_lines(&device, inactive, words::table),
            DmOrder::Status {
                device, inactive, ..
            } => self.dm_lines(&device, inactive, words::status),
            DmOrder::Deps { device, inactive } => self.dm_deps(&device, inactive),
            DmOrder::Wait {
                device,
                event_nr,
                inactive,
            } => {
                let id = self.dm_device(&device)?;
                self.dm_follow(move |mapped| mapped.mapper().wait(id, event_nr).map(Some))?;
                self.dm_lines(&device, inactive, words::status)
            }
            DmOrder::Message { device, .. } => {
                self.dm_device(&device)?;
                Err(refused(libc::EINVAL, "no target here takes messages"))
            }
        }
    }

    /// Have something done on the thread of the mapped devices.
    pub(super) fn mapped<T: Send + 'static>(
        &mut self,
        call: impl FnOnce(&mut Mapped) -> T + Send + 'static,
    ) -> Result<T, Refused> {
        let (sender, answer) = channel();
        self.shards[MAPPED_SHARD].with_mapped(move |mapped| {
            // Whoever asked may have given up.
            let _ = sender.send(call(mapped));
        });
        self.wait(MAPPED_SHARD, &answer, None)
    }

    /// Begin something that takes time, and wait for its end, or for the server's.
    fn dm_follow(
        &mut self,
        begin: impl FnOnce(&mut Mapped) -> Result<Option<OrderId>, nbdsnap_engine::dm::Refused>
        + Send
        + 'static,
    ) -> Done<()> {
        self.dm_follow_until(None, begin)
    }

    /// The same; at a time it is given up, whatever comes of it.
    fn dm_follow_until(
        &mut self,
        until: Option<Instant>,
        begin: impl FnOnce(&mut Mapped) -> Result<Option<OrderId>, nbdsnap_engine::dm::Refused>
        + Send
        + 'static,
    ) -> Done<()> {
        let (sender, ended) = channel();
        let order = self.mapped(move |mapped| {
            let order = begin(mapped)?;
            if let Some(order) = order {
                mapped.follow(order, sender);
            }
            Ok::<_, nbdsnap_engine::dm::Refused>(order)
        })??;
        match order {
            Some(order) => self.dm_end(until, order, &ended),
            None => Ok(()),
        }
    }

    fn dm_end(
        &mut self,
        until: Option<Instant>,
        order: OrderId,
        ended: &Receiver<Result<(), nbdsnap_engine::dm::Refused>>,
    ) -> Done<()> {
        let (shards, claims) = (Arc::clone(&self.shards), self.claims());
        // Without the books: it may be long, and others are to go on.
        let end = self.aside(|_| {
            loop {
                let is_late = until.is_some_and(|until| Instant::now() >= until);
                match ended.recv_timeout(PATIENCE) {
                    Ok(end) => return Ok(end),
                    Err(RecvTimeoutError::Timeout) if is_late => return Err(Refused::TooSlow),
                    Err(RecvTimeoutError::Timeout)
                        if !claims.is_closed() && !shards[MAPPED_SHARD].has_ended() => {}
                    Err(_) => return Err(Refused::Stopping),
                }
            }
        });
        match end {
            Ok(end) => Ok(end?),
            Err(refused) => {
                self.shards[MAPPED_SHARD].with_mapped(move |mapped| mapped.forget(order));
                Err(refused.into())
            }
        }
    }

    fn dm_device(&mut self, name: &DeviceName) -> Done<DeviceId> {
        let name = name.clone();
        let found = self.mapped(move |mapped| {
            let mapper = mapped.mapper();
            match name {
                DeviceName::Name(name) => mapper.find(&name),
                DeviceName::Uuid(uuid) => mapper.find_uuid(&uuid),
                DeviceName::Number { major, minor } => {
                    let id = DeviceId(minor);
                    let is_there = major == MAJOR && mapper.info(id).is_ok();
                    is_there.then_some(id)
                }
            }
        })?;
        found.ok_or(Failed::Dm {
            errno: libc::ENXIO,
            why: None,
        })
    }

    fn dm_info(&mut self, id: DeviceId) -> Done<DeviceInfo> {
        Ok(self.mapped(move |mapped| mapped.mapper().info(id))??)
    }

    /// A device has changed: show clients, and tell whoever ordered it.
    fn dm_changed(&mut self, id: DeviceId) -> Done<DmAnswer> {
        self.dm_publish()?;
        Ok(DmAnswer::Device(words::info(&self.dm_info(id)?, false)))
    }

    /// Show clients the devices that there are, and close disks that none of them
    /// stands on.
    fn dm_publish(&mut self) -> Result<(), Refused> {
        let (number, devices) = self.mapped(Mapped::numbered_devices)?;
        if number > self.registry.mapped.number {
            self.registry.mapped.number = number;
            self.registry.mapped.devices = devices;
            self.publish();
        }
        self.dm_close_unused()
    }

    fn dm_list(&mut self) -> Done<DmAnswer> {
        let devices = self.mapped(|mapped| mapped.mapper().devices())?;
        let mut names: Vec<_> = devices.iter().map(words::name).collect();
        names.extend(self.served_names());
        names.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(DmAnswer::Names(names))
    }

    fn dm_create(
        &mut self,
        name: &str,
        uuid: Option<String>,
        minor: Option<u32>,
    ) -> Done<DmAnswer> {
        self.dm_check_name(name)?;
        let (name, uuid) = (name.to_owned(), uuid.unwrap_or_default());
        let id = self.mapped(move |mapped| mapped.mapper().create(&name, &uuid, minor))??;
        self.dm_changed(id)
    }

    /// A device's name is that of its export.
    fn dm_check_name(&self, name: &str) -> Done<()> {
        if name.is_empty() || name.len() > LONGEST_NAME || name.contains('/') {
            return Err(refused(
                libc::EINVAL,
                format!("{name:?} is no name for a device"),
            ));
        }
        if self.registry.is_served(name) {
            let why = format!("{name} is served already: 'nbdsnap volume list' shows it");
            return Err(refused(libc::EBUSY, why));
        }
        Ok(())
    }

    fn dm_load(
        &mut self,
        device: &DeviceName,
        read_only: bool,
        lines: &[TextLine],
    ) -> Done<DmAnswer> {
        let id = self.dm_device(device)?;
        let pins = self.dm.pins();
        let loaded = self.dm_load_pinned(id, read_only, lines);
        self.dm.unpin(pins);
        match loaded {
            Ok(()) => self.dm_changed(id),
            Err(failed) => {
                self.dm_close_unused()?;
                Err(failed)
            }
        }
    }

    fn dm_load_pinned(&mut self, id: DeviceId, read_only: bool, lines: &[TextLine]) -> Done<()> {
        let number = format!("{MAJOR}:{}", id.0);
        let mut why_not = None;
        let parsed = text::parse(lines, &mut |name| {
            self.dm_resolve(name).map_err(|failed| match failed {
                Failed::Dm { errno, why } => {
                    why_not = why;
                    errno
                }
                Failed::Server(refused) => {
                    why_not = Some(refused.to_string());
                    libc::EIO
                }
            })
        });
        let table = parsed.map_err(|error| {
            let log = error.log(&number);
            let why = match why_not {
                Some(why) => format!("{log}: {why}"),
                None => log,
            };
            refused(error.errno(), why)
        })?;
        let values = table.clone();
        let examined = self.mapped(move |mapped| mapped.mapper().examine(id, &values))?;
        let needs = examined.map_err(|refusal| in_table(&number, &table, refusal.into()))?;
        let mut new = Vec::with_capacity(table.len());
        for (line, need) in table.iter().zip(needs) {
            let store = match need {
                Some(Need::Store {
                    cow,
                    chunk,
                    cow_bytes,
                    origin_bytes,
                }) => {
                    let wanted =
                        stores::Wanted::of(&line.target, cow, chunk, cow_bytes, origin_bytes);
                    let store = self.dm_store(wanted);
                    Some(store.map_err(|failed| in_table(&number, &table, failed))?)
                }
                Some(Need::Heir) | None => None,
            };
            let line = line.clone();
            new.push(NewLine { line, store });
        }
        let loaded = self.mapped(move |mapped| mapped.mapper().load(id, read_only, new))?;
        loaded.map_err(|refusal| in_table(&number, &table, refusal.into()))
    }

    fn dm_remove(&mut self, device: &DeviceName, deferred: bool) -> Done<DmAnswer> {
        let id = self.dm_device(device)?;
        let until = Instant::now() + LEAVING;
        loop {
            let done = self.dm_follow(move |mapped| mapped.mapper().remove(id, deferred));
            match done {
                // A client that has detached may not have been heard of yet.
                Err(Failed::Dm { errno, .. })
                    if errno == libc::EBUSY
                        && Instant::now() < until
                        && self.dm_has_clients(id)? =>
                {
                    self.aside(|_| std::thread::sleep(LOOK));
                }
                Err(failed) => return Err(failed),
                Ok(()) => break,
            }
        }
        self.dm.end_merge(id);
        self.dm_publish()?;
        Ok(DmAnswer::Done)
    }

    fn dm_has_clients(&mut self, id: DeviceId) -> Result<bool, Refused> {
        self.mapped(move |mapped| mapped.mapper().has_clients(id))
    }

    fn dm_lines(&mut self, device: &DeviceName, inactive: bool, words: Words) -> Done<DmAnswer> {
        let id = self.dm_device(device)?;
        let (info, lines) = self.mapped(move |mapped| {
            let mapper = mapped.mapper();
            Ok::<_, nbdsnap_engine::dm::Refused>((mapper.info(id)?, mapper.table(id, inactive)?))
        })??;
        Ok(DmAnswer::Lines {
            device: words::info(&info, inactive),
            lines: words(&lines, &|lower| self.dm.text_of(lower)),
        })
    }

    fn dm_deps(&mut self, device: &DeviceName, inactive: bool) -> Done<DmAnswer> {
        let id = self.dm_device(device)?;
        let (info, deps) = self.mapped(move |mapped| {
            let mapper = mapped.mapper();
            let info = mapper.info(id)?;
            let deps = mapper.deps(id, inactive)?.into_iter().map(|lower| {
                let name = match lower {
                    Lower::Device(id) => mapper.info(id).ok().map(|info| info.name),
                    Lower::Disk(_) => None,
                };
                (lower, name.unwrap_or_default())
            });
            Ok::<_, nbdsnap_engine::dm::Refused>((info, deps.collect::<Vec<_>>()))
        })??;
        let deps = deps
            .into_iter()
            .map(|(lower, name)| self.dm.dep(lower, name));
        Ok(DmAnswer::Deps {
            device: words::info(&info, inactive),
            deps: deps.collect(),
        })
    }
}

/// Why a table is refused, as the kernel's log would have it.
fn in_table(number: &str, table: &[nbdsnap_engine::dm::Line], failed: Failed) -> Failed {
    let Failed::Dm { errno, why } = failed else {
        return failed;
    };
    let target = match table {
        [one] => format!("{}: ", one.target.name()),
        _ => String::new(),
    };
    let why = why.map(|why| format!("table: {number}: {target}{why}"));
    Failed::Dm { errno, why }
}
