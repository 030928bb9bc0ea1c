//! The verbs that tell something: dmsetup's texts of what the server answers.

use libc::ENXIO;

use super::line::Verb;
use super::report::{Report, Row};
use super::session::{Device, Label, Session, Step, Stop, add, beside_the_point};
use super::{name, tree};
use crate::control::dm::{DmAnswer, DmDep, DmInfo, DmOrder, DmTarget, TextLine};

/// Sectors that Linux reads ahead where nobody has said otherwise: dmsetup asks the
/// device's node for it, which exports do not have.
pub(super) const READ_AHEAD: u32 = 256;

/// A verb that tells something of a device; `word` is how it was named.
pub(super) fn of_device(session: &mut Session<'_>, device: &Device, word: Option<&str>) -> Step {
    match session.verb {
        Verb::Table | Verb::Status => lines(session, device, word),
        Verb::Info => {
            let order = DmOrder::Info {
                device: device.name.clone(),
                inactive: session.switches.inactive,
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
    for line in &wanted {
        add(&mut session.out, format_args!("{prefix}{}\n", shown(line)));
    }
    if wanted.is_empty() {
        add(&mut session.out, format_args!("{prefix}\n"));
    }
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
        add(
            &mut text,
            format_args!(",{start} {len} {target} {}", quoted(&line.params)),
        );
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
        let known = Device::known(&device.name);
        row.live_deps = deps_of(session, &known, false)?;
        row.deps = if session.switches.inactive {
            deps_of(session, &known, true)?
        } else {
            row.live_deps.clone()
        };
    }
    if session.report.as_ref().is_some_and(Report::needs_users) {
        for one in session.list()? {
            let deps = deps_of(session, &Device::known(&one.name), false)?;
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

fn deps_of(session: &mut Session<'_>, device: &Device, inactive: bool) -> Step<Vec<DmDep>> {
    let order = DmOrder::Deps {
        device: device.name.clone(),
        inactive,
    };
    match session.order("deps", &device.label, order)? {
        DmAnswer::Deps { deps, .. } => Ok(deps),
        _ => Err(beside_the_point()),
    }
}

/// How a device is doing that was changed, where that is to be told.
pub(super) fn changed(session: &mut Session<'_>, device: &Device, info: DmInfo) -> Step {
    if session.verbose == 0 {
        return Ok(());
    }
    let told = if session.switches.inactive {
        let order = DmOrder::Info {
            device: device.name.clone(),
            inactive: true,
        };
        session.order_device("info", &device.label, order)?
    } else {
        info
    };
    session.out.push_str(&long(&told));
    Ok(())
}

/// How a device is doing, in lines.
fn info(session: &mut Session<'_>, device: &DmInfo) {
    session.out.push_str(&long(device));
}

fn long(device: &DmInfo) -> String {
    let state = if device.suspended {
        "SUSPENDED"
    } else {
        "ACTIVE"
    };
    let read_only = if device.read_only { " (READ-ONLY)" } else { "" };
    let deferred = if device.deferred_remove {
        " (DEFERRED REMOVE)"
    } else {
        ""
    };
    let tables = match (device.live_table, device.inactive_table) {
        (true, true) => "LIVE & INACTIVE",
        (true, false) => "LIVE",
        (false, true) => "INACTIVE",
        (false, false) => "None",
    };
    let mut text = format!("Name:              {}\n", device.name);
    add(
        &mut text,
        format_args!("State:             {state}{read_only}{deferred}\n"),
    );
    if tables != "None" {
        add(&mut text, format_args!("Read Ahead:        {READ_AHEAD}\n"));
    }
    add(&mut text, format_args!("Tables present:    {tables}\n"));
    add(
        &mut text,
        format_args!("Open count:        {}\n", device.open_count),
    );
    add(
        &mut text,
        format_args!("Event number:      {}\n", device.event_nr),
    );
    let (major, minor) = (device.major, device.minor);
    add(
        &mut text,
        format_args!("Major, minor:      {major}, {minor}\n"),
    );
    add(
        &mut text,
        format_args!("Number of targets: {}\n", device.target_count),
    );
    if !device.uuid.is_empty() {
        add(&mut text, format_args!("UUID: {}\n", device.uuid));
    }
    text.push('\n');
    text
}

/// How `ls` and `deps` name devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Naming {
    /// By numbers.
    Number,
    /// As block devices.
    Block,
    /// By their own names.
    Mapped,
}

impl Naming {
    /// The last one that is named counts; each can be shortened.
    pub(super) fn of(options: Option<&str>) -> Result<Self, String> {
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
    add(&mut text, format_args!("{} dependencies\t:", deps.len()));
    for dep in &deps {
        let shown = match (dep, naming) {
            (
                DmDep::Mapped { major, minor, .. } | DmDep::Block { major, minor, .. },
                Naming::Number,
            ) => format!("{major}, {minor}"),
            (DmDep::Mapped { name, .. }, Naming::Mapped) => name.clone(),
            (dep, _) => block_name(dep),
        };
        add(&mut text, format_args!(" ({shown})"));
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
        inactive: false,
    };
    let info = session.order_device("status", &device.label, order)?;
    let (uuid, and_uuid) = match info.uuid.as_str() {
        "" => ("[no UUID]", ""),
        uuid => (uuid, "and UUID "),
    };
    let name = name::mangled(&info.name);
    add(
        &mut session.out,
        format_args!("{name}: {uuid}: name {and_uuid}already in correct form\n"),
    );
    Ok(())
}

pub(super) fn ls(session: &mut Session<'_>) -> Step {
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
                inactive: false,
            };
            let info = session.order_device("info", &device.label, order)?;
            info.live_table || info.inactive_table
        };
        let shown = match naming {
            Naming::Block if has_name => format!("dm-{}", one.minor),
            Naming::Mapped if has_name => one.name.clone(),
            _ => format!("{}:{}", one.major, one.minor),
        };
        add(&mut session.out, format_args!("{}\t({shown})\n", one.name));
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
            add(
                &mut session.out,
                format_args!("{name}\t({major}, {minor})\n"),
            );
        }
    }
    Ok(())
}

/// `wait DEVICE [EVENT_NR]`.
pub(super) fn wait(session: &mut Session<'_>) -> Step {
    let mut words = session.words.clone();
    let is_named = session.switches.uuid.is_some() || session.switches.major.is_some();
    let word = if is_named {
        None
    } else if words.is_empty() {
        return session.stop("No device specified.");
    } else {
        Some(words.remove(0))
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
    add(
        &mut session.out,
        format_args!("{name:<16} v{major}.{minor}.{patch}\n"),
    );
}

pub(super) fn targets(session: &mut Session<'_>) -> Step {
    for target in known_targets(session)? {
        tell_target(session, &target);
    }
    Ok(())
}

pub(super) fn target_version(session: &mut Session<'_>, wanted: &str) -> Step {
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
pub(super) fn version(session: &mut Session<'_>) -> Step {
    let program = env!("CARGO_PKG_VERSION");
    add(
        &mut session.out,
        format_args!("Library version:   1.02.185 (nbdsnap {program})\n"),
    );
    match session.order("version", &Label::default(), DmOrder::Version)? {
        DmAnswer::Version { version } => {
            add(
                &mut session.out,
                format_args!("Driver version:    {version}\n"),
            );
            Ok(())
        }
        _ => Err(beside_the_point()),
    }
}
