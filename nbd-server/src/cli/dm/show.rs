//! What is done with a command line, device by device, and the verbs that tell
//! something.

use libc::ENXIO;

use super::change;
use super::line::Verb;
use super::report::{Report, Row};
use super::session::{Device, Label, Session, Step, Stop, beside_the_point};
use super::{name, tree};
use crate::cli::Failure;
use crate::control::dm::{DmAnswer, DmDep, DmInfo, DmOrder, DmTarget, TextLine};

/// Sectors that Linux reads ahead where nobody has said otherwise: dmsetup asks the
/// device's node for it, which exports do not have.
pub(super) const READ_AHEAD: u32 = 256;

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
        return session.stop("Incorrect number of arguments.");
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
            of_device(session, &device, word)
        }
        Verb::Ls => ls(session),
        Verb::Wait => wait(session),
        Verb::Targets => targets(session),
        Verb::TargetVersion => target_version(session, word.unwrap_or_default()),
        Verb::Version => version(session),
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
        match of_device(session, &Device::known(&one.name), Some(&one.name)) {
            Err(Stop::Said) => ended = Err(Stop::Said),
            other => other?,
        }
    }
    ended
}

/// A verb that tells something of a device; `word` is how it was named.
fn of_device(session: &mut Session<'_>, device: &Device, word: Option<&str>) -> Step {
    match session.verb {
        Verb::Table | Verb::Status => lines(session, device, word),
        Verb::Info => {
            let order = DmOrder::Info {
                device: device.name.clone(),
            };
            let info = if_it_exists(session, "info", &device.label, order)?;
            let DmAnswer::Device(info) = info else {
                return Err(beside_the_point());
            };
            tell_info(session, &info)
        }
        Verb::Deps => deps(session, device, word),
        _ => mangle(session, device),
    }
}

/// As an order, but dmsetup has words of its own for a device that is not there.
fn if_it_exists(
    session: &mut Session<'_>,
    ioctl: &str,
    label: &Label,
    order: DmOrder,
) -> Step<DmAnswer> {
    match session.ask(order)? {
        Ok(answer) => Ok(answer),
        Err(refusal) if refusal.errno == ENXIO => session.stop("Device does not exist."),
        Err(refusal) => {
            session.refused(ioctl, label, &refusal);
            Err(Stop::Said)
        }
    }
}

/// `table` and `status`.
fn lines(session: &mut Session<'_>, device: &Device, word: Option<&str>) -> Step {
    let (name, inactive) = (device.name.clone(), session.switches.inactive);
    let answer = if session.verb == Verb::Table {
        let order = DmOrder::Table {
            device: name,
            inactive,
        };
        session.order("table", &device.label, order)?
    } else {
        let order = DmOrder::Status {
            device: name,
            inactive,
            noflush: session.switches.noflush,
        };
        if_it_exists(session, "status", &device.label, order)?
    };
    let DmAnswer::Lines { device, lines } = answer else {
        return Err(beside_the_point());
    };
    let target = session.switches.target.clone();
    let is_wanted = |line: &&TextLine| target.as_ref().is_none_or(|name| *name == line.target);
    let wanted: Vec<&TextLine> = lines.iter().filter(is_wanted).collect();
    if wanted.is_empty() && target.is_some() {
        return Ok(());
    }
    if session.verb == Verb::Table && session.switches.concise {
        concise(session, &device, &wanted);
        return Ok(());
    }
    let is_verbose = session.verbose > 0;
    if is_verbose {
        info(session, &device);
    }
    let prefix = match (session.many && !is_verbose, word) {
        (true, Some(word)) => format!("{word}: "),
        _ => String::new(),
    };
    let mut text: String = wanted
        .iter()
        .map(|line| format!("{prefix}{}\n", shown(line)))
        .collect();
    if wanted.is_empty() {
        text = format!("{prefix}\n");
    }
    session.out.push_str(&text);
    if session.many && is_verbose {
        session.out.push('\n');
    }
    Ok(())
}

fn shown(line: &TextLine) -> String {
    let TextLine {
        start,
        len,
        target,
        params,
    } = line;
    format!("{start} {len} {target} {params}")
}

/// A device as `create --concise` of dmsetup takes it; several are one line.
fn concise(session: &mut Session<'_>, device: &DmInfo, lines: &[&TextLine]) {
    let quoted = |text: &str| {
        let mut quoted = String::new();
        for letter in text.chars() {
            if matches!(letter, ',' | ';' | '\\') {
                quoted.push('\\');
            }
            quoted.push(letter);
        }
        quoted
    };
    let mode = if device.read_only { "ro" } else { "rw" };
    let (name, uuid) = (quoted(&device.name), quoted(&device.uuid));
    let mut text = format!("{name},{uuid},{},{mode}", device.minor);
    for line in lines {
        let (start, len, target) = (line.start, line.len, &line.target);
        text.push_str(&format!(",{start} {len} {target} {}", quoted(&line.params)));
    }
    if session.out.ends_with('\n') {
        session.out.pop();
        session.out.push(';');
    }
    session.out.push_str(&text);
    session.out.push('\n');
}

/// `info`: the long form, or a row of columns.
fn tell_info(session: &mut Session<'_>, device: &DmInfo) -> Step {
    let Some(report) = &session.report else {
        info(session, device);
        return Ok(());
    };
    let mut row = Row::of(device.clone());
    if report.needs_deps() {
        let deps = deps_of(session, &Device::known(&device.name))?;
        row.deps = deps;
    }
    if session.report.as_ref().is_some_and(Report::needs_users) {
        for one in session.list()? {
            let deps = deps_of(session, &Device::known(&one.name))?;
            let stands_on =
                |dep: &DmDep| matches!(dep, DmDep::Mapped { name, .. } if *name == device.name);
            if deps.iter().any(stands_on) {
                row.users.push((one.name, one.major, one.minor));
            }
        }
    }
    if let Some(report) = session.report.as_mut() {
        report.rows.push(row);
    }
    Ok(())
}

fn deps_of(session: &mut Session<'_>, device: &Device) -> Step<Vec<DmDep>> {
    let order = DmOrder::Deps {
        device: device.name.clone(),
        inactive: session.switches.inactive,
    };
    match session.order("deps", &device.label, order)? {
        DmAnswer::Deps { deps, .. } => Ok(deps),
        _ => Err(beside_the_point()),
    }
}

/// How a device is doing, in lines.
pub(super) fn info(session: &mut Session<'_>, device: &DmInfo) {
    session.out.push_str(&long(device));
}

fn long(device: &DmInfo) -> String {
    let state = match device.suspended {
        true => "SUSPENDED",
        false => "ACTIVE",
    };
    let read_only = if device.read_only { " (READ-ONLY)" } else { "" };
    let deferred = match device.deferred_remove {
        true => " (DEFERRED REMOVE)",
        false => "",
    };
    let tables = match (device.live_table, device.inactive_table) {
        (true, true) => "LIVE & INACTIVE",
        (true, false) => "LIVE",
        (false, true) => "INACTIVE",
        (false, false) => "None",
    };
    let mut text = format!("Name:              {}\n", device.name);
    text.push_str(&format!(
        "State:             {state}{read_only}{deferred}\n"
    ));
    if tables != "None" {
        text.push_str(&format!("Read Ahead:        {READ_AHEAD}\n"));
    }
    text.push_str(&format!("Tables present:    {tables}\n"));
    text.push_str(&format!("Open count:        {}\n", device.open_count));
    text.push_str(&format!("Event number:      {}\n", device.event_nr));
    let (major, minor) = (device.major, device.minor);
    text.push_str(&format!("Major, minor:      {major}, {minor}\n"));
    text.push_str(&format!("Number of targets: {}\n", device.target_count));
    if !device.uuid.is_empty() {
        text.push_str(&format!("UUID: {}\n", device.uuid));
    }
    text.push('\n');
    text
}

/// How `ls` and `deps` name devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Naming {
    /// By numbers.
    Number,
    /// As block devices.
    Block,
    /// By their own names.
    Mapped,
}

impl Naming {
    /// The last one that is named counts; each can be shortened.
    fn of(options: Option<&str>) -> Result<Self, String> {
        let mut naming = Self::Number;
        for option in options.unwrap_or_default().split(',') {
            naming = if "devno".starts_with(option) {
                Self::Number
            } else if "blkdevname".starts_with(option) {
                Self::Block
            } else if "devname".starts_with(option) {
                Self::Mapped
            } else {
                return Err(format!("Option not recognised: {option}."));
            };
        }
        Ok(naming)
    }

    fn in_force(session: &Session<'_>) -> Self {
        Self::of(session.switches.options.as_deref()).unwrap_or(Self::Number)
    }
}

fn deps(session: &mut Session<'_>, device: &Device, word: Option<&str>) -> Step {
    let order = DmOrder::Deps {
        device: device.name.clone(),
        inactive: session.switches.inactive,
    };
    let answer = session.order("deps", &device.label, order)?;
    let DmAnswer::Deps { device, deps } = answer else {
        return Err(beside_the_point());
    };
    let is_verbose = session.verbose > 0;
    if is_verbose {
        info(session, &device);
    }
    let naming = Naming::in_force(session);
    let mut text = match (session.many && !is_verbose, word) {
        (true, Some(word)) => format!("{word}: "),
        _ => String::new(),
    };
    text.push_str(&format!("{} dependencies\t:", deps.len()));
    for dep in &deps {
        text.push_str(&match (dep, naming) {
            (
                DmDep::Mapped { major, minor, .. } | DmDep::Block { major, minor, .. },
                Naming::Number,
            ) => {
                format!(" ({major}, {minor})")
            }
            (DmDep::Mapped { name, .. }, Naming::Mapped) => format!(" ({name})"),
            (dep, _) => format!(" ({})", block_name(dep)),
        });
    }
    session.out.push_str(&text);
    session.out.push('\n');
    if session.many && is_verbose {
        session.out.push('\n');
    }
    Ok(())
}

/// What a block device is called by Linux; a file is called by its path.
pub(super) fn block_name(dep: &DmDep) -> String {
    match dep {
        DmDep::Mapped { minor, .. } => format!("dm-{minor}"),
        DmDep::Block { path, .. } => {
            let last = path.file_name().unwrap_or(path.as_os_str());
            last.to_string_lossy().into_owned()
        }
        DmDep::File { path } => path.display().to_string(),
    }
}

/// `mangle`: names are in correct form.
fn mangle(session: &mut Session<'_>, device: &Device) -> Step {
    let order = DmOrder::Info {
        device: device.name.clone(),
    };
    let info = session.order_device("status", &device.label, order)?;
    let (uuid, and_uuid) = match info.uuid.as_str() {
        "" => ("[no UUID]", ""),
        uuid => (uuid, "and UUID "),
    };
    let name = name::mangled(&info.name);
    session.out.push_str(&format!(
        "{name}: {uuid}: name {and_uuid}already in correct form\n"
    ));
    Ok(())
}

fn ls(session: &mut Session<'_>) -> Step {
    if session.switches.target.is_some() {
        return ls_target(session);
    }
    if session.switches.tree {
        return tree::show(session);
    }
    let names = session.list()?;
    if names.is_empty() {
        session.out.push_str("No devices found\n");
    }
    let naming = Naming::in_force(session);
    for one in names {
        let device = Device::known(&one.name);
        // Linux has no name for a device that never had a table.
        let has_name = naming != Naming::Number && {
            let order = DmOrder::Info {
                device: device.name.clone(),
            };
            let info = session.order_device("info", &device.label, order)?;
            info.live_table || info.inactive_table
        };
        let shown = match naming {
            Naming::Block if has_name => format!("dm-{}", one.minor),
            Naming::Mapped if has_name => one.name.clone(),
            _ => format!("{}:{}", one.major, one.minor),
        };
        session.out.push_str(&format!("{}\t({shown})\n", one.name));
    }
    Ok(())
}

/// Devices with a line of a target.
fn ls_target(session: &mut Session<'_>) -> Step {
    let wanted = session.switches.target.clone().unwrap_or_default();
    let names = session.list()?;
    if names.is_empty() {
        session.out.push_str("No devices found\n");
    }
    for one in names {
        let device = Device::known(&one.name);
        let order = DmOrder::Status {
            device: device.name.clone(),
            inactive: session.switches.inactive,
            noflush: session.switches.noflush,
        };
        let answer = if_it_exists(session, "status", &device.label, order)?;
        let DmAnswer::Lines { lines, .. } = answer else {
            return Err(beside_the_point());
        };
        if lines.iter().any(|line| line.target == wanted) {
            let (name, major, minor) = (one.name, one.major, one.minor);
            session
                .out
                .push_str(&format!("{name}\t({major}, {minor})\n"));
        }
    }
    Ok(())
}

/// `wait DEVICE [EVENT_NR]`.
fn wait(session: &mut Session<'_>) -> Step {
    let mut words = session.words.clone();
    let is_named = session.switches.uuid.is_some() || session.switches.major.is_some();
    let word = match is_named {
        true => None,
        false if words.is_empty() => return session.stop("No device specified."),
        false => Some(words.remove(0)),
    };
    let device = session.device(word.as_deref())?;
    let number = words.last().map(String::as_str).unwrap_or_default();
    let end = number.find(|letter: char| !letter.is_ascii_digit());
    let order = DmOrder::Wait {
        device: device.name,
        // As C's atoi: what is no number is none.
        event_nr: number[..end.unwrap_or(number.len())].parse().unwrap_or(0),
        inactive: session.switches.inactive,
    };
    let answer = session.order("waitevent", &device.label, order)?;
    if let (DmAnswer::Lines { device, .. }, true) = (answer, session.verbose > 0) {
        info(session, &device);
    }
    Ok(())
}

fn known_targets(session: &mut Session<'_>) -> Step<Vec<DmTarget>> {
    match session.order("versions", &Label::default(), DmOrder::Targets)? {
        DmAnswer::Targets(targets) => Ok(targets),
        _ => Err(beside_the_point()),
    }
}

fn tell_target(session: &mut Session<'_>, target: &DmTarget) {
    let [major, minor, patch] = target.version;
    let name = &target.name;
    session
        .out
        .push_str(&format!("{name:<16} v{major}.{minor}.{patch}\n"));
}

fn targets(session: &mut Session<'_>) -> Step {
    for target in known_targets(session)? {
        tell_target(session, &target);
    }
    Ok(())
}

fn target_version(session: &mut Session<'_>, wanted: &str) -> Step {
    let targets = known_targets(session)?;
    match targets.iter().find(|target| target.name == wanted) {
        Some(target) => {
            tell_target(session, target);
            Ok(())
        }
        None => session.stop(format_args!(
            "device-mapper: target-version ioctl on {wanted}  failed: Invalid argument"
        )),
    }
}

/// `version`: whose words these are, and how the device-mapper is to be taken.
fn version(session: &mut Session<'_>) -> Step {
    let program = env!("CARGO_PKG_VERSION");
    session.out.push_str(&format!(
        "Library version:   1.02.185 (nbdsnap {program})\n"
    ));
    match session.order("version", &Label::default(), DmOrder::Version)? {
        DmAnswer::Version { version } => {
            session
                .out
                .push_str(&format!("Driver version:    {version}\n"));
            Ok(())
        }
        _ => Err(beside_the_point()),
    }
}
