//! The verbs that change something, composed of orders as dmsetup composes them of
//! ioctls: `create` is create, load and resume, and undoes itself; `remove --force`
//! has all I/O fail first.

use std::time::Duration;

use libc::EBUSY;

use super::name::{Kind, mangled, unmangled};
use super::session::{Device, Label, Session, Step, Stop, beside_the_point};
use super::show;
use crate::control::dm::{DeviceName, DmAnswer, DmInfo, DmName, DmOrder, TextLine};

/// `remove --retry`: so often, and so far apart.
const ATTEMPTS: u32 = 25;
const BETWEEN: Duration = Duration::from_millis(200);

/// `create NAME [FILE]`.
pub(super) fn create(session: &mut Session<'_>) -> Step {
    if session.switches.concise {
        return session.stop("--concise is not offered: make the devices one by one.");
    }
    let Some(word) = session.words.first().cloned() else {
        return session.stop("Please provide a name for the new device.");
    };
    if word.contains('/') {
        return session.stop(format_args!("Name \"{word}\" invalid. It contains \"/\"."));
    }
    session.check(&word, Kind::Name)?;
    let uuid = session
        .switches
        .uuid
        .clone()
        .filter(|uuid| !uuid.is_empty());
    if let Some(uuid) = &uuid {
        session.check(uuid, Kind::Uuid)?;
    }
    let lines = if session.switches.notable {
        Vec::new()
    } else {
        let file = session.words.get(1).cloned();
        session.table(file.as_deref())?
    };
    let info = make(session, &word, uuid.as_deref(), lines)?;
    show::changed(session, &Device::known(&unmangled(&word)), info)
}

/// Make a device with this table, or leave none.
fn make(
    session: &mut Session<'_>,
    word: &str,
    uuid: Option<&str>,
    lines: Vec<TextLine>,
) -> Step<DmInfo> {
    let minor = session.switches.minor;
    let numbers = session.switches.major.zip(minor);
    let numbers = numbers.filter(|(major, _)| *major > 0);
    let label = |uuid: Option<&str>, numbers| Label {
        name: mangled(word),
        uuid: uuid.map(mangled).unwrap_or_default(),
        numbers,
    };
    let create = DmOrder::Create {
        name: unmangled(word),
        uuid: uuid.map(unmangled),
        minor,
    };
    let info = session.order_device("create", &label(uuid, numbers), create)?;
    if lines.is_empty() {
        return Ok(info);
    }
    let name = DeviceName::Name(unmangled(word));
    let load = DmOrder::Load {
        device: name.clone(),
        read_only: session.switches.readonly,
        lines,
    };
    let resume = DmOrder::Resume {
        device: name.clone(),
        noflush: false,
        nolockfs: false,
    };
    let made = Some((info.major, info.minor));
    let mut ended = session.order_device("reload", &label(None, made), load);
    if ended.is_ok() {
        ended = session.order_device("resume", &label(None, numbers), resume);
    }
    if let Err(Stop::Said) = ended {
        let remove = DmOrder::Remove {
            device: name,
            deferred: false,
        };
        let gone = session.order("remove", &label(None, numbers), remove);
        if let Err(Stop::Said) = gone {
            session.complain("Failed to revert device creation.");
        }
    }
    ended
}

/// `load DEVICE [FILE]`.
pub(super) fn load(session: &mut Session<'_>) -> Step {
    if session.switches.notable {
        return session.stop("--notable only available when creating new device.");
    }
    let mut words = session.words.clone().into_iter();
    let switches = &session.switches;
    let word = if switches.uuid.is_none() && switches.major.is_none() {
        match words.next() {
            Some(word) => Some(word),
            None => return session.stop("Please specify device."),
        }
    } else if words.len() > 1 {
        return session.stop("Too many command line arguments.");
    } else {
        None
    };
    let device = session.device(word.as_deref())?;
    let lines = session.table(words.next().as_deref())?;
    let order = DmOrder::Load {
        device: device.name.clone(),
        read_only: session.switches.readonly,
        lines,
    };
    let info = session.order_device("reload", &device.label, order)?;
    show::changed(session, &device, info)
}

/// `clear`, `suspend` and `resume`: one order for a device.
pub(super) fn simple(
    session: &mut Session<'_>,
    word: Option<&str>,
    ioctl: &str,
    order: impl FnOnce(DeviceName, bool, bool) -> DmOrder,
) -> Step {
    let device = session.device(word)?;
    let info = send(session, &device, ioctl, order)?;
    show::changed(session, &device, info)
}

fn send(
    session: &mut Session<'_>,
    device: &Device,
    ioctl: &str,
    order: impl FnOnce(DeviceName, bool, bool) -> DmOrder,
) -> Step<DmInfo> {
    let (noflush, nolockfs) = (session.switches.noflush, session.switches.nolockfs);
    let order = order(device.name.clone(), noflush, nolockfs);
    session.order_device(ioctl, &device.label, order)
}

pub(super) fn clear(device: DeviceName, _: bool, _: bool) -> DmOrder {
    DmOrder::Clear { device }
}

pub(super) fn suspend(device: DeviceName, noflush: bool, nolockfs: bool) -> DmOrder {
    DmOrder::Suspend {
        device,
        noflush,
        nolockfs,
    }
}

pub(super) fn resume(device: DeviceName, noflush: bool, nolockfs: bool) -> DmOrder {
    DmOrder::Resume {
        device,
        noflush,
        nolockfs,
    }
}

/// `remove DEVICE`.
pub(super) fn remove(session: &mut Session<'_>, word: Option<&str>) -> Step {
    if session.switches.force && word.is_some() {
        ignore(wipe(session, word))?;
    }
    let device = session.device(word)?;
    let order = DmOrder::Remove {
        device: device.name,
        deferred: session.switches.deferred,
    };
    let attempts = if session.switches.retry { ATTEMPTS } else { 1 };
    for attempt in 1..=attempts {
        let Err(refusal) = session.ask(order.clone())? else {
            return Ok(());
        };
        session.refused("remove", &device.label, &refusal);
        if refusal.errno != EBUSY {
            break;
        }
        if attempt < attempts {
            session.world.pause(BETWEEN);
        }
    }
    Err(Stop::Said)
}

/// What has been said of it is enough.
fn ignore(step: Step) -> Step {
    match step {
        Err(Stop::Said) => Ok(()),
        other => other,
    }
}

/// `wipe_table DEVICE`: a table of its size whose I/O fails.
pub(super) fn wipe(session: &mut Session<'_>, word: Option<&str>) -> Step {
    let Some(word) = word else {
        return session.stop("No device specified.");
    };
    let device = session.device(Some(word))?;
    wipe_device(session, &device)
}

fn wipe_device(session: &mut Session<'_>, device: &Device) -> Step {
    let table = DmOrder::Table {
        device: device.name.clone(),
        inactive: session.switches.inactive,
    };
    let len = match session.order("table", &device.label, table) {
        Ok(DmAnswer::Lines { lines, .. }) => lines.iter().map(|line| line.len).sum(),
        Ok(_) => return Err(beside_the_point()),
        Err(Stop::Said) => 0,
        Err(lost) => return Err(lost),
    };
    let load = DmOrder::Load {
        device: device.name.clone(),
        read_only: session.switches.readonly,
        lines: vec![TextLine {
            start: 0,
            len,
            target: "error".into(),
            params: String::new(),
        }],
    };
    session.order("reload", &device.label, load)?;
    if session.switches.force {
        // What is in flight may never end.
        session.switches.noflush = true;
        session.switches.nolockfs = true;
    }
    let resumed = send(session, device, "resume", resume);
    if let Err(Stop::Said) = resumed {
        ignore(send(session, device, "clear", clear).map(drop))?;
    }
    resumed.map(drop)
}

/// `remove_all`: those that are not open, until none is left of them.
pub(super) fn remove_all(session: &mut Session<'_>) -> Step {
    remove_closed(session)?;
    if !session.switches.force {
        return Ok(());
    }
    for one in session.list()? {
        ignore(wipe_device(session, &Device::known(&one.name)))?;
    }
    remove_closed(session)?;
    let left = session.list()?.len();
    if left > 0 {
        session.complain(format_args!("Unable to remove {left} device(s)."));
    }
    Ok(())
}

/// Devices that stand on others go before them.
fn remove_closed(session: &mut Session<'_>) -> Step {
    loop {
        let left = session.list()?;
        let mut removed = false;
        for one in &left {
            removed |= session.ask(removal(one, false))?.is_ok();
        }
        if removed {
            continue;
        }
        if session.switches.deferred {
            for one in &left {
                // A refusal is for the next look at the list to show.
                let _ = session.ask(removal(one, true))?;
            }
        }
        return Ok(());
    }
}

fn removal(one: &DmName, deferred: bool) -> DmOrder {
    let (major, minor) = (one.major, one.minor);
    let device = DeviceName::Number { major, minor };
    DmOrder::Remove { device, deferred }
}

/// `rename [DEVICE] NAME`.
pub(super) fn rename(session: &mut Session<'_>) -> Step {
    let Some((new, rest)) = session
        .words
        .clone()
        .split_last()
        .map(|(new, rest)| (new.clone(), rest.to_vec()))
    else {
        return Err(Stop::Said);
    };
    let device = session.device(rest.first().map(String::as_str))?;
    let order = if session.switches.setuuid {
        session.check(&new, Kind::Uuid)?;
        DmOrder::SetUuid {
            device: device.name,
            uuid: unmangled(&new),
        }
    } else {
        session.check(&new, Kind::NewName)?;
        DmOrder::Rename {
            device: device.name,
            new_name: unmangled(&new),
        }
    };
    session.order("rename", &device.label, order).map(drop)
}

/// `message DEVICE SECTOR MESSAGE...`.
pub(super) fn message(session: &mut Session<'_>) -> Step {
    let mut words = session.words.clone().into_iter();
    let switches = &session.switches;
    let word = if switches.uuid.is_some() || switches.major.is_some() {
        None
    } else {
        words.next()
    };
    let device = session.device(word.as_deref())?;
    let sector = words.next().unwrap_or_default();
    let Ok(sector) = sector.parse() else {
        return session.stop("Invalid sector.");
    };
    if words.len() == 0 {
        session.complain("No message supplied.");
    }
    let message = words.collect::<Vec<_>>().join(" ");
    let order = DmOrder::Message {
        device: device.name,
        sector,
        message,
    };
    session.order("message", &device.label, order).map(drop)
}
