//! One command line on its way: what is asked of the server, what has been said so
//! far, how refusals are worded, and how devices are named.
//!
//! The messages are dmsetup's. Where the server says why it refused something, that
//! comes in a line before: the kernel would say it to its log only.

use std::fmt;
use std::io;
use std::path::{Component, Path};
use std::time::Duration;

use super::line::{Line, Switches, Verb};
use super::name::{self, Kind, mangled, unmangled};
use super::report::Report;
use super::{FOLDER, text};
use crate::cli::Failure;
use crate::control::dm::{DeviceName, DmAnswer, DmInfo, DmName, DmOrder, MAJOR, TextLine};
use crate::dm::plain;

/// The server, and this machine.
pub(super) trait World {
    /// Have the server do something.
    fn ask(&mut self, order: DmOrder) -> Result<DmAnswer, Failure>;
    /// Let time pass.
    fn pause(&mut self, time: Duration);
    /// Read a file, or standard input.
    fn read(&mut self, file: Option<&str>) -> io::Result<String>;
    /// The path from the root on.
    fn absolute(&self, path: &str) -> String;
    /// Which mapped device is at a path.
    fn locate(&self, path: &str) -> Located;
    /// Columns of the terminal, if output goes to one.
    fn width(&self) -> Option<usize>;
    /// The locale's letters are UTF-8.
    fn speaks_utf8(&self) -> bool;
}

/// What is at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Located {
    /// The node of this mapped device, as `/dev/mapper` has it.
    Name(String),
    /// Something else.
    NotMapped,
    /// Nothing.
    Nowhere,
}

/// A verb goes no further for a device.
#[derive(Debug)]
pub(super) enum Stop {
    /// What there is to say has been said.
    Said,
    /// The server does not answer.
    Lost(Failure),
}

pub(super) type Step<T = ()> = Result<T, Stop>;

/// Why the server refused something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) errno: i32,
    pub(super) why: Option<String>,
}

/// A device on the command line.
#[derive(Clone, Debug)]
pub(super) struct Device {
    pub(super) name: DeviceName,
    pub(super) label: Label,
}

/// How messages name a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Label {
    pub(super) name: String,
    pub(super) uuid: String,
    pub(super) numbers: Option<(u32, u32)>,
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.uuid)?;
        match self.numbers {
            Some((major, minor)) => write!(f, "({major}:{minor})"),
            None => Ok(()),
        }
    }
}

impl Device {
    /// One that the server has named.
    pub(super) fn known(name: &str) -> Self {
        Self {
            name: DeviceName::Name(name.to_owned()),
            label: Label {
                name: mangled(name),
                ..Label::default()
            },
        }
    }
}

/// A command line on its way.
pub(super) struct Session<'a> {
    pub(super) verb: Verb,
    pub(super) words: Vec<String>,
    pub(super) switches: Switches,
    pub(super) verbose: u8,
    /// Lines begin with their device's name.
    pub(super) many: bool,
    pub(super) report: Option<Report>,
    pub(super) out: String,
    pub(super) err: String,
    pub(super) world: &'a mut dyn World,
}

impl<'a> Session<'a> {
    pub(super) fn new(line: Line, world: &'a mut dyn World) -> Self {
        let Line {
            verb,
            words,
            switches,
            verbose,
        } = line;
        Self {
            verb,
            words,
            switches,
            verbose,
            many: false,
            report: None,
            out: String::new(),
            err: String::new(),
            world,
        }
    }

    /// A line on standard error.
    pub(super) fn complain(&mut self, line: impl fmt::Display) {
        add(&mut self.err, format_args!("{line}\n"));
    }

    /// A line on standard error, and no further.
    pub(super) fn stop<T>(&mut self, line: impl fmt::Display) -> Step<T> {
        self.complain(line);
        Err(Stop::Said)
    }

    /// Have the server do something.
    pub(super) fn ask(&mut self, order: DmOrder) -> Step<Result<DmAnswer, Refusal>> {
        match self.world.ask(order) {
            Ok(DmAnswer::Refused { errno, why }) => Ok(Err(Refusal { errno, why })),
            Ok(answer) => Ok(Ok(answer)),
            Err(failure) => Err(Stop::Lost(failure)),
        }
    }

    /// Say that an order was refused, as dmsetup does of an ioctl.
    pub(super) fn refused(&mut self, ioctl: &str, label: &Label, refusal: &Refusal) {
        if let Some(why) = &refusal.why {
            self.complain(format_args!("device-mapper: {}", plain(why)));
        }
        let said = errno_text(refusal.errno);
        self.complain(format_args!(
            "device-mapper: {ioctl} ioctl on {label} failed: {said}"
        ));
    }

    /// Have the server do something, which dmsetup calls `ioctl`.
    pub(super) fn order(&mut self, ioctl: &str, label: &Label, order: DmOrder) -> Step<DmAnswer> {
        match self.ask(order)? {
            Ok(answer) => Ok(answer),
            Err(refusal) => {
                self.refused(ioctl, label, &refusal);
                Err(Stop::Said)
            }
        }
    }

    /// The same, where the answer is a device.
    pub(super) fn order_device(
        &mut self,
        ioctl: &str,
        label: &Label,
        order: DmOrder,
    ) -> Step<DmInfo> {
        match self.order(ioctl, label, order)? {
            DmAnswer::Device(info) => Ok(info),
            _ => Err(beside_the_point()),
        }
    }

    /// All devices, in the kernel's order.
    pub(super) fn list(&mut self) -> Step<Vec<DmName>> {
        match self.order("names", &Label::default(), DmOrder::List)? {
            DmAnswer::Names(mut names) => {
                names.sort_by_cached_key(|one| mangled(&one.name));
                Ok(names)
            }
            _ => Err(beside_the_point()),
        }
    }

    /// The device that is meant: `word`, or the one that switches name.
    pub(super) fn device(&mut self, word: Option<&str>) -> Step<Device> {
        let switches = &self.switches;
        if let Some(word) = word {
            return self.named(word);
        }
        if let Some(uuid) = switches.uuid.clone() {
            self.check(&uuid, Kind::Uuid)?;
            let label = Label {
                uuid: mangled(&uuid),
                ..Label::default()
            };
            let name = DeviceName::Uuid(unmangled(&uuid));
            return Ok(Device { name, label });
        }
        let (Some(major), Some(minor)) = (switches.major, switches.minor) else {
            return self.stop("No device specified.");
        };
        let label = Label {
            numbers: (major > 0).then_some((major, minor)),
            ..Label::default()
        };
        let name = DeviceName::Number { major, minor };
        Ok(Device { name, label })
    }

    fn named(&mut self, word: &str) -> Step<Device> {
        if word.contains('/') {
            return self.at_path(word);
        }
        self.check(word, Kind::Name)?;
        let number = word.split_once(':').and_then(|(major, minor)| {
            let minor = minor.parse().ok()?;
            (major == MAJOR.to_string()).then_some(minor)
        });
        let name = match number {
            Some(minor) => DeviceName::Number {
                major: MAJOR,
                minor,
            },
            None => DeviceName::Name(unmangled(word)),
        };
        let label = Label {
            name: mangled(word),
            ..Label::default()
        };
        Ok(Device { name, label })
    }

    fn at_path(&mut self, path: &str) -> Step<Device> {
        let cleaned = cleaned(&self.world.absolute(path));
        if let Some(name) = cleaned.strip_prefix(FOLDER) {
            let device = Device::known(&unmangled(name));
            let info = DmOrder::Info {
                device: device.name.clone(),
                inactive: false,
            };
            if self.ask(info)?.is_ok() {
                return Ok(device);
            }
        }
        match self.world.locate(path) {
            Located::Name(name) => Ok(Device::known(&unmangled(&name))),
            Located::NotMapped => {
                let last = path.rsplit('/').next().unwrap_or_default();
                self.stop(format_args!("Device {last} not found"))
            }
            Located::Nowhere => self.stop(format_args!("Device {path} not found")),
        }
    }

    /// Refuse what cannot be a name.
    pub(super) fn check(&mut self, text: &str, kind: Kind) -> Step {
        let Some(lines) = name::fault(text, kind) else {
            return Ok(());
        };
        for line in lines {
            self.complain(line);
        }
        Err(Stop::Said)
    }

    /// The table: of `--table`, else of the file, else of standard input.
    pub(super) fn table(&mut self, file: Option<&str>) -> Step<Vec<TextLine>> {
        let (source, table) = match (&self.switches.table, file) {
            (Some(table), _) => ("", Ok(table.clone())),
            (None, Some(file)) => (file, self.world.read(Some(file))),
            (None, None) => ("on stdin", self.world.read(None)),
        };
        let table = match (table, file) {
            (Ok(table), _) => table,
            (Err(_), Some(file)) => {
                return self.stop(format_args!("Couldn't open '{file}' for reading."));
            }
            (Err(error), None) => {
                let why = plain(&error.to_string());
                return self.stop(format_args!("Read from stdin aborted: {why}"));
            }
        };
        match text::parse(&table, source, &|path| self.world.absolute(path)) {
            Ok(lines) => Ok(lines),
            Err(line) => self.stop(line),
        }
    }
}

/// Write more.
pub(super) fn add(text: &mut String, more: fmt::Arguments<'_>) {
    fmt::Write::write_fmt(text, more).expect("memory takes it");
}

/// The server's answer does not belong to the order.
pub(super) fn beside_the_point() -> Stop {
    Stop::Lost(super::beside_the_point())
}

/// An error number as C's strerror says it.
pub(super) fn errno_text(errno: i32) -> String {
    plain(&io::Error::from_raw_os_error(errno).to_string())
}

/// A path without `.` and `..`, by its words alone.
fn cleaned(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in Path::new(path).components() {
        match part {
            Component::ParentDir => _ = parts.pop(),
            Component::Normal(part) => parts.extend(part.to_str()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    format!("/{}", parts.join("/"))
}
