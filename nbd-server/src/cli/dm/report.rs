//! The columns of `info -c`: which fields there are, and how dmsetup lays them out.

use super::line::Switches;
use super::name::mangled;
use super::show::{READ_AHEAD, block_name};
use crate::control::dm::{DmDep, DmInfo};

/// The fields that are shown unless others are named.
const USUAL: &str = "name,major,minor,attr,open,segments,events,uuid";

/// What there is to say of a device.
#[derive(Clone, Debug)]
pub(super) struct Row {
    info: DmInfo,
    /// What it stands on, where a field asks for it: by the table that is asked about.
    pub(super) deps: Vec<DmDep>,
    /// The same by the active table, of which dmsetup has the names.
    pub(super) live_deps: Vec<DmDep>,
    /// What stands on it, where a field asks for it: names and numbers.
    pub(super) users: Vec<(String, u32, u32)>,
}

impl Row {
    pub(super) fn of(info: DmInfo) -> Self {
        Self {
            info,
            deps: Vec::new(),
            live_deps: Vec::new(),
            users: Vec::new(),
        }
    }
}

/// What a field is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum About {
    Name,
    Info,
    /// What the device stands on.
    Deps,
    /// What stands on the device.
    Users,
    SplitName,
}

impl About {
    /// Of its group in lists, and in front of `all`.
    fn prefix(self) -> &'static str {
        match self {
            Self::Name => "name_",
            Self::Info => "info_",
            Self::Deps | Self::Users => "deps_",
            Self::SplitName => "splitname_",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Name => "Mapped Device Name",
            Self::Info => "Mapped Device Information",
            Self::Deps | Self::Users => "Mapped Device Relationship Information",
            Self::SplitName => "Mapped Device Name Components",
        }
    }
}

/// A field.
struct Field {
    id: &'static str,
    heading: &'static str,
    width: usize,
    is_number: bool,
    about: About,
    description: &'static str,
    value: fn(&Row) -> String,
}

const fn text(
    about: About,
    heading: &'static str,
    width: usize,
    id: &'static str,
    description: &'static str,
    value: fn(&Row) -> String,
) -> Field {
    Field {
        id,
        heading,
        width,
        is_number: false,
        about,
        description,
        value,
    }
}

const fn number(
    about: About,
    heading: &'static str,
    width: usize,
    id: &'static str,
    description: &'static str,
    value: fn(&Row) -> String,
) -> Field {
    let text = text(about, heading, width, id, description, value);
    Field {
        is_number: true,
        ..text
    }
}

#[rustfmt::skip]
const FIELDS: [Field; 29] = [
    text(About::Name, "Name", 16, "name", "Name of mapped device.", |row| row.info.name.clone()),
    text(About::Name, "MangledName", 16, "mangled_name", "Mangled name of mapped device.", |row| mangled(&row.info.name)),
    text(About::Name, "UnmangledName", 16, "unmangled_name", "Unmangled name of mapped device.", |row| row.info.name.clone()),
    text(About::Name, "UUID", 32, "uuid", "Unique (optional) identifier for mapped device.", |row| row.info.uuid.clone()),
    text(About::Name, "MangledUUID", 32, "mangled_uuid", "Mangled unique (optional) identifier for mapped device.", |row| mangled(&row.info.uuid)),
    text(About::Name, "UnmangledUUID", 32, "unmangled_uuid", "Unmangled unique (optional) identifier for mapped device.", |row| row.info.uuid.clone()),
    number(About::Name, "RAhead", 6, "read_ahead", "Read ahead value.", |row| read_ahead(&row.info).to_string()),
    text(About::Info, "BlkDevName", 16, "blkdevname", "Name of block device.", |row| format!("dm-{}", row.info.minor)),
    text(About::Info, "Stat", 4, "attr", "(L)ive, (I)nactive, (s)uspended, (r)ead-only, read-(w)rite.", |row| attributes(&row.info)),
    text(About::Info, "Tables", 6, "tables_loaded", "Which of the live and inactive table slots are filled.", |row| tables(&row.info).into()),
    text(About::Info, "Suspended", 9, "suspended", "Whether the device is suspended.", |row| if row.info.suspended { "Suspended" } else { "Active" }.into()),
    text(About::Info, "Read-only", 9, "readonly", "Whether the device is read-only or writeable.", |row| if row.info.read_only { "Read-only" } else { "Writeable" }.into()),
    text(About::Info, "DevNo", 5, "devno", "Device major and minor numbers", |row| format!("{}:{}", row.info.major, row.info.minor)),
    number(About::Info, "Maj", 3, "major", "Block device major number.", |row| row.info.major.to_string()),
    number(About::Info, "Min", 3, "minor", "Block device minor number.", |row| row.info.minor.to_string()),
    number(About::Info, "Open", 4, "open", "Number of references to open device, if requested.", |row| row.info.open_count.to_string()),
    number(About::Info, "Targ", 4, "segments", "Number of segments in live table, if present.", |row| row.info.target_count.to_string()),
    number(About::Info, "Event", 6, "events", "Number of most recent event.", |row| row.info.event_nr.to_string()),
    number(About::Deps, "#Devs", 5, "device_count", "Number of devices used by this one.", |row| row.deps.len().to_string()),
    text(About::Deps, "DevNamesUsed", 16, "devs_used", "List of names of mapped devices used by this one.", |row| joined(row.live_deps.iter().filter_map(mapped_name))),
    text(About::Deps, "DevNosUsed", 16, "devnos_used", "List of device numbers of devices used by this one.", |row| joined(row.deps.iter().map(numbers))),
    text(About::Deps, "BlkDevNamesUsed", 16, "blkdevs_used", "List of names of block devices used by this one.", |row| joined(row.deps.iter().map(block_name))),
    number(About::Users, "#Refs", 5, "device_ref_count", "Number of mapped devices referencing this one.", |row| row.users.len().to_string()),
    text(About::Users, "RefNames", 8, "names_using_dev", "List of names of mapped devices using this one.", |row| joined(row.users.iter().map(|(name, ..)| name.clone()))),
    text(About::Users, "RefDevNos", 9, "devnos_using_dev", "List of device numbers of mapped devices using this one.", |row| joined(row.users.iter().map(|(_, major, minor)| format!("{major}:{minor}")))),
    text(About::SplitName, "Subsys", 6, "subsystem", "Userspace subsystem responsible for this device.", |row| subsystem(&row.info).into()),
    text(About::SplitName, "VG", 4, "vg_name", "LVM Volume Group name.", |row| lvm_part(&row.info, 0)),
    text(About::SplitName, "LV", 4, "lv_name", "LVM Logical Volume name.", |row| lvm_part(&row.info, 1)),
    text(About::SplitName, "LVLayer", 7, "lv_layer", "LVM device layer.", |row| lvm_part(&row.info, 2)),
];

fn read_ahead(info: &DmInfo) -> u32 {
    if info.live_table || info.inactive_table {
        READ_AHEAD
    } else {
        0
    }
}

fn attributes(info: &DmInfo) -> String {
    let letter = |is_so, letter, other| if is_so { letter } else { other };
    [
        letter(info.live_table, 'L', '-'),
        letter(info.inactive_table, 'I', '-'),
        letter(info.suspended, 's', '-'),
        letter(info.read_only, 'r', 'w'),
    ]
    .iter()
    .collect()
}

fn tables(info: &DmInfo) -> &'static str {
    match (info.live_table, info.inactive_table) {
        (true, true) => "Both",
        (true, false) => "Live",
        (false, true) => "Inactive",
        (false, false) => "None",
    }
}

fn joined(parts: impl Iterator<Item = String>) -> String {
    parts.collect::<Vec<_>>().join(",")
}

fn mapped_name(dep: &DmDep) -> Option<String> {
    match dep {
        DmDep::Mapped { name, .. } => Some(name.clone()),
        DmDep::Block { .. } | DmDep::File { .. } => None,
    }
}

/// A file has none: its path.
fn numbers(dep: &DmDep) -> String {
    match dep {
        DmDep::Mapped { major, minor, .. } | DmDep::Block { major, minor, .. } => {
            format!("{major}:{minor}")
        }
        DmDep::File { .. } => block_name(dep),
    }
}

/// What stands before the first `-` of the uuid.
fn subsystem(info: &DmInfo) -> &str {
    info.uuid.split_once('-').map_or("", |(first, _)| first)
}

/// LVM's names are VG-LV-LAYER, with two hyphens for each of their own.
fn lvm_part(info: &DmInfo, index: usize) -> String {
    if subsystem(info) != "LVM" {
        return String::new();
    }
    let mut parts = vec![String::new()];
    let mut letters = info.name.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter == '-' && parts.len() < 3 && letters.next_if_eq(&'-').is_none() {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(letter);
        }
    }
    parts.get(index).cloned().unwrap_or_default()
}

/// A report that is being made.
pub(super) struct Report {
    fields: Vec<&'static Field>,
    /// Fields to sort by, and whether backwards.
    keys: Vec<(&'static Field, bool)>,
    separator: String,
    is_aligned: bool,
    has_headings: bool,
    has_prefixes: bool,
    is_quoted: bool,
    is_in_rows: bool,
    pub(super) rows: Vec<Row>,
}

impl Report {
    /// As the switches want it; else the lines that say what is wrong with them.
    pub(super) fn new(switches: &Switches) -> Result<Self, String> {
        let wanted = match switches.options.as_deref() {
            None => USUAL.to_owned(),
            Some(more) if more.starts_with('+') => format!("{USUAL},{}", &more[1..]),
            Some(fields) => fields.to_owned(),
        };
        let keys = switches.sort.as_deref().unwrap_or_default();
        let separator = switches.separator.clone();
        let usual = if switches.noheadings { ":" } else { " " };
        Ok(Self {
            fields: fields(&wanted)?,
            keys: sort_keys(keys)?,
            is_aligned: !switches.noheadings && !switches.nameprefixes && separator.is_none(),
            separator: separator.unwrap_or_else(|| usual.into()),
            has_headings: !switches.noheadings,
            has_prefixes: switches.nameprefixes,
            is_quoted: !switches.unquoted,
            is_in_rows: switches.rows,
            rows: Vec::new(),
        })
    }

    /// Rows need to know what their devices stand on.
    pub(super) fn needs_deps(&self) -> bool {
        self.needs(About::Deps)
    }

    /// Rows need to know what stands on their devices.
    pub(super) fn needs_users(&self) -> bool {
        self.needs(About::Users)
    }

    fn needs(&self, about: About) -> bool {
        let keys = self.keys.iter().map(|(field, _)| field);
        self.fields
            .iter()
            .chain(keys)
            .any(|field| field.about == about)
    }

    /// The whole, as it is printed; nothing, if there are no rows.
    pub(super) fn text(mut self) -> String {
        if self.rows.is_empty() {
            return String::new();
        }
        for (field, is_backwards) in self.keys.iter().rev() {
            self.rows.sort_by(|one, other| {
                let order = compare(field, one, other);
                if *is_backwards {
                    order.reverse()
                } else {
                    order
                }
            });
        }
        let cells: Vec<Vec<String>> = self
            .rows
            .iter()
            .map(|row| self.fields.iter().map(|field| (field.value)(row)).collect())
            .collect();
        let widths = self.widths(&cells);
        let lines = if self.is_in_rows {
            self.in_rows(&cells, &widths)
        } else {
            self.in_columns(&cells, &widths)
        };
        lines.iter().flat_map(|line| [line, "\n"]).collect()
    }

    fn widths(&self, cells: &[Vec<String>]) -> Vec<usize> {
        let width = |(index, field): (usize, &&Field)| {
            let widest = cells.iter().map(|row| row[index].len()).max();
            let least = field.width.max(field.heading.len());
            least.max(widest.unwrap_or(0))
        };
        self.fields.iter().enumerate().map(width).collect()
    }

    fn in_columns(&self, cells: &[Vec<String>], widths: &[usize]) -> Vec<String> {
        let mut lines = Vec::new();
        if self.has_headings {
            let heading = |(field, width): (&&Field, &usize)| {
                let width = if self.is_aligned { *width } else { 0 };
                format!("{:<width$}", field.heading)
            };
            let headings = self.fields.iter().zip(widths).map(heading);
            lines.push(headings.collect::<Vec<_>>().join(&self.separator));
        }
        for row in cells {
            let cells = row.iter().enumerate();
            let shown = cells.map(|(index, cell)| self.cell(index, cell, widths));
            lines.push(shown.collect::<Vec<_>>().join(&self.separator));
        }
        lines
    }

    fn in_rows(&self, cells: &[Vec<String>], widths: &[usize]) -> Vec<String> {
        let line = |(index, field): (usize, &&Field)| {
            let heading = self.has_headings.then(|| field.heading.to_owned());
            let values = cells
                .iter()
                .map(|row| self.cell(index, &row[index], widths));
            let line: Vec<String> = heading.into_iter().chain(values).collect();
            line.join(&self.separator)
        };
        self.fields.iter().enumerate().map(line).collect()
    }

    fn cell(&self, index: usize, value: &str, widths: &[usize]) -> String {
        let (field, width) = (self.fields[index], widths[index]);
        let value = match (self.is_aligned, field.is_number) {
            (false, _) => value.to_owned(),
            (true, true) => format!("{value:>width$}"),
            (true, false) => format!("{value:<width$}"),
        };
        if !self.has_prefixes {
            return value;
        }
        let quote = if self.is_quoted { "'" } else { "" };
        format!("DM_{}={quote}{value}{quote}", field.id.to_ascii_uppercase())
    }
}

fn compare(field: &Field, one: &Row, other: &Row) -> std::cmp::Ordering {
    let (one, other) = ((field.value)(one), (field.value)(other));
    if field.is_number {
        let number = |text: &str| text.parse::<u64>().unwrap_or(0);
        number(&one).cmp(&number(&other))
    } else {
        one.cmp(&other)
    }
}

/// One field by its name, underscores or not.
fn field(name: &str) -> Option<&'static Field> {
    let plain = |text: &str| text.replace('_', "");
    FIELDS.iter().find(|field| plain(field.id) == plain(name))
}

fn fields(wanted: &str) -> Result<Vec<&'static Field>, String> {
    let mut fields = Vec::new();
    for name in wanted.split(',').filter(|name| !name.is_empty()) {
        let group = name.strip_suffix("all");
        if let Some(found) = field(name) {
            fields.push(found);
        } else if let Some(prefix) = group.filter(|prefix| is_group(prefix)) {
            let all = FIELDS.iter();
            fields.extend(all.filter(|one| prefix.is_empty() || one.about.prefix() == prefix));
        } else if matches!(name, "help" | "?") {
            return Err(list());
        } else {
            return Err(format!("{}\nUnrecognised field: {name}", list()));
        }
    }
    Ok(fields)
}

fn is_group(prefix: &str) -> bool {
    prefix.is_empty() || FIELDS.iter().any(|field| field.about.prefix() == prefix)
}

fn sort_keys(wanted: &str) -> Result<Vec<(&'static Field, bool)>, String> {
    let names = wanted.split(',').filter(|name| !name.is_empty());
    let key = |name: &str| {
        let is_backwards = name.starts_with('-');
        let name = name.trim_start_matches(['-', '+']);
        match field(name) {
            Some(found) => Ok((found, is_backwards)),
            None => Err(format!("{}\nUnrecognised field: {name}", list())),
        }
    };
    names.map(key).collect()
}

/// The fields that there are, group by group.
fn list() -> String {
    const NAMES: usize = 21;
    let mut lines = Vec::new();
    let mut group = "";
    for field in &FIELDS {
        let (prefix, title) = (field.about.prefix(), field.about.title());
        if prefix != group {
            if !group.is_empty() {
                lines.push(" ".to_owned());
            }
            lines.push(format!("{title} Fields"));
            lines.push("-".repeat(title.len() + 7));
            let all = format!("{prefix}all");
            lines.push(format!("  {all:<NAMES$} - All fields in this section."));
            group = prefix;
        }
        lines.push(format!("  {:<NAMES$} - {}", field.id, field.description));
    }
    lines.push(" ".to_owned());
    lines.join("\n")
}
