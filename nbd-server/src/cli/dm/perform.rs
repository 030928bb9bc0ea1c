//! A command line is gone through: what makes no sense in it, then device by device.

use super::line::Verb;
use super::report::Report;
use super::session::{Device, Session, Step, Stop};
use super::show::Naming;
use super::{change, show, tree, usage};
use crate::cli::Failure;

/// How often a verb may be said for devices, and how many words it takes.
struct Shape {
    least: usize,
    most: Option<usize>,
    repeats: bool,
}

fn shape(verb: Verb) -> Shape {
    let (least, most, repeats) = match verb {
        Verb::Create | Verb::Load | Verb::Wait => (0, Some(2), false),
        Verb::Rename => (1, Some(2), false),
        Verb::Message => (2, None, false),
        Verb::RemoveAll | Verb::Ls | Verb::Targets | Verb::Version => (0, Some(0), false),
        Verb::TargetVersion => (1, None, true),
        Verb::Clear
        | Verb::Suspend
        | Verb::Resume
        | Verb::Remove
        | Verb::WipeTable
        | Verb::Table
        | Verb::Status
        | Verb::Info
        | Verb::Deps
        | Verb::Mknodes
        | Verb::Mangle => (0, None, true),
    };
    Shape {
        least,
        most,
        repeats,
    }
}

/// Do what the line says.
pub(super) fn perform(session: &mut Session<'_>) -> Result<(), Failure> {
    let ended = all(session);
    if let Some(report) = session.report.take() {
        session.out.push_str(&report.text());
    }
    match ended {
        Ok(()) => Ok(()),
        Err(Stop::Said) => Err(Failure::Found),
        Err(Stop::Lost(failure)) => Err(failure),
    }
}

fn all(session: &mut Session<'_>) -> Step {
    let shape = shape(session.verb);
    let count = session.words.len();
    if let Err(line) = senseless(session) {
        session.complain(line);
        return session.stop("Couldn't process command line.");
    }
    if count < shape.least || shape.most.is_some_and(|most| count > most) {
        session.complain("Incorrect number of arguments.");
        return session.stop(usage::of(session.verb));
    }
    if session.switches.columns && session.verb == Verb::Info {
        match Report::new(&session.switches) {
            Ok(report) => session.report = Some(report),
            Err(lines) => return session.stop(lines),
        }
    }
    let switches = &session.switches;
    let is_named = switches.uuid.is_some() || switches.major.is_some();
    session.many = shape.repeats && count != 1 && (count > 0 || !is_named);
    let ended = if shape.repeats && count > 0 {
        let words = session.words.clone();
        words.iter().try_for_each(|word| once(session, Some(word)))
    } else {
        once(session, None)
    };
    if let Err(Stop::Said) = ended {
        session.complain("Command failed.");
    }
    ended
}

/// What is wrong with the switches as a whole.
fn senseless(session: &Session<'_>) -> Result<(), String> {
    let switches = &session.switches;
    if switches.major.is_some() != switches.minor.is_some() {
        return Err("Please specify both major number and minor number.".into());
    }
    if switches.table.is_some() && switches.notable {
        return Err("--table and --notable are incompatible.".into());
    }
    if switches.accepted.addnodeonresume && switches.accepted.addnodeoncreate {
        return Err("--addnodeonresume and --addnodeoncreate are incompatible.".into());
    }
    if let Some(mode) = switches.accepted.manglename.as_deref()
        && !["none", "auto", "hex"].contains(&mode)
    {
        return Err("Unknown name mangling mode.".into());
    }
    if let Some(mode) = switches.accepted.mode.as_deref()
        && u32::from_str_radix(mode, 8).is_err()
    {
        return Err(format!("Invalid argument for --mode: {mode}."));
    }
    if switches.accepted.exec.is_some() {
        return Err("--exec is not offered: use the output of 'ls' in a loop.".into());
    }
    if switches.accepted.select.is_some() {
        return Err("--select is not offered: use --options and --sort.".into());
    }
    if switches.tree {
        tree::Style::of(session).map(drop)
    } else if switches.columns {
        Ok(())
    } else {
        Naming::of(switches.options.as_deref()).map(drop)
    }
}

/// Once, for a device or for the whole line.
fn once(session: &mut Session<'_>, word: Option<&str>) -> Step {
    let is_named = session.switches.uuid.is_some() || session.switches.major.is_some();
    let is_all = word.is_none() && !is_named;
    match session.verb {
        Verb::Create => change::create(session),
        Verb::Load => change::load(session),
        Verb::Clear => change::simple(session, word, "clear", change::clear),
        Verb::Suspend => change::simple(session, word, "suspend", change::suspend),
        Verb::Resume => change::simple(session, word, "resume", change::resume),
        Verb::Remove => change::remove(session, word),
        Verb::RemoveAll => change::remove_all(session),
        Verb::WipeTable => change::wipe(session, word),
        Verb::Rename => change::rename(session),
        Verb::Message => change::message(session),
        Verb::Table | Verb::Status | Verb::Info | Verb::Deps | Verb::Mangle if is_all => {
            every_device(session)
        }
        Verb::Table | Verb::Status | Verb::Info | Verb::Deps | Verb::Mangle => {
            let device = session.device(word)?;
            show::of_device(session, &device, word)
        }
        Verb::Ls => show::ls(session),
        Verb::Wait => show::wait(session),
        Verb::Targets => show::targets(session),
        Verb::TargetVersion => show::target_version(session, word.unwrap_or_default()),
        Verb::Version => show::version(session),
        Verb::Mknodes => Ok(()),
    }
}

/// For each device that there is; one that fails does not stop the others.
fn every_device(session: &mut Session<'_>) -> Step {
    let names = session.list()?;
    if names.is_empty() {
        session.out.push_str("No devices found\n");
        return Ok(());
    }
    let mut ended = Ok(());
    for one in names {
        match show::of_device(session, &Device::known(&one.name), Some(&one.name)) {
            Err(Stop::Said) => ended = Err(Stop::Said),
            other => other?,
        }
    }
    ended
}
