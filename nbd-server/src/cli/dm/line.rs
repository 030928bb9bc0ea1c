//! The command line of `nbdsnap dm`: dmsetup's verbs and switches.
//!
//! As with dmsetup every switch is known to every verb and may stand anywhere, may
//! be shortened, and counts as last given. A verb's page shows those that mean
//! something to it ([`shown`]).

use clap::{Arg, Args, Command, Subcommand};

use crate::cli::orders::ServerAt;

/// Speak dmsetup's own words: mapped devices of a running server.
///
/// Tables, options, output and messages are dmsetup's, so that procedures which were
/// written for it run as they are, on disks that NBD clients keep attached. Each
/// device is an NBD export of its name. There are the targets linear, striped, zero,
/// error, snapshot-origin, snapshot and snapshot-merge.
///
/// In a table a device is named by a path (of a file or block device), by
/// /dev/mapper/NAME or NAME, or by the MAJOR:MINOR that 'info' shows.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    infer_long_args = true,
    after_help = "\
Examples:
  nbdsnap dm create vm --table '0 2097152 linear /srv/disk.img 0'
  nbdsnap dm create vm-snap --table '0 2097152 snapshot /dev/mapper/vm /srv/vm.cow P 32'
  nbdsnap dm status vm-snap
  nbdsnap dm suspend vm && nbdsnap dm load vm new.table && nbdsnap dm resume vm
  nbdsnap dm info -c -o name,open,attr
  nbdsnap dm ls --tree

Devices can stand on each other. 'nbdsnap snapshot' and 'nbdsnap volume' show the same
ones: 'nbdsnap snapshot create vm@monday' makes a device of that name. A line that makes
no sense ends with 1, as dmsetup's does."
)]
pub(in crate::cli) struct DmArgs {
    #[command(subcommand)]
    verb: DmVerb,
    #[command(flatten)]
    switches: Switches,
    #[command(flatten)]
    server: ServerAt,
}

/// One command line.
#[derive(Clone, Debug)]
pub(super) struct Line {
    /// What is to be done.
    pub(super) verb: Verb,
    /// What is named, in order.
    pub(super) words: Vec<String>,
    /// What else is said.
    pub(super) switches: Switches,
    /// How often `-v` was given.
    pub(super) verbose: u8,
}

impl DmArgs {
    /// The line itself, and where it goes.
    pub(super) fn split(self, verbose: u8) -> (Line, ServerAt) {
        let (verb, words) = self.verb.split();
        let line = Line {
            verb,
            words,
            switches: self.switches,
            verbose,
        };
        (line, self.server)
    }
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verb {
    /// Make a device.
    Create,
    /// Give it an inactive table.
    Load,
    /// Drop that.
    Clear,
    /// Have it stand still.
    Suspend,
    /// Have it go on, with the inactive table.
    Resume,
    /// End it.
    Remove,
    /// End all.
    RemoveAll,
    /// Have all its I/O fail.
    WipeTable,
    /// Give it another name.
    Rename,
    /// Show tables.
    Table,
    /// Show how targets are doing.
    Status,
    /// Show how devices are doing.
    Info,
    /// List devices.
    Ls,
    /// Show what devices stand on.
    Deps,
    /// Wait for an event.
    Wait,
    /// List targets.
    Targets,
    /// Show targets' versions.
    TargetVersion,
    /// Show versions.
    Version,
    /// Speak to a target.
    Message,
    /// Make nodes.
    Mknodes,
    /// Mend names.
    Mangle,
}

macro_rules! words {
    ($(#[$about:meta])* $name:ident { $($(#[$of:meta])* $word:ident,)* }) => {
        $(#[$about])*
        #[derive(Debug, Args)]
        struct $name {
            $($(#[$of])* $word: Option<String>,)*
            /// Too many, or not; the verb knows.
            #[arg(hide = true)]
            more: Vec<String>,
        }

        impl $name {
            fn all(self) -> Vec<String> {
                let words: Vec<Option<String>> = vec![$(self.$word,)*];
                words.into_iter().flatten().chain(self.more).collect()
            }
        }
    };
}

words! {
    /// A device that is to be made.
    NewDevice {
        /// What the device is called, and its export.
        #[arg(value_name = "NAME")]
        name,
        /// A file with its table; without it, and without --table, standard input.
        #[arg(value_name = "TABLE_FILE")]
        file,
    }
}
words! {
    /// A device, and its table.
    TableOf {
        /// The device.
        #[arg(value_name = "DEVICE")]
        device,
        /// A file with the table; without it, and without --table, standard input.
        #[arg(value_name = "TABLE_FILE")]
        file,
    }
}
words! {
    /// A device, and a name for it.
    Renamed {
        /// The device.
        #[arg(value_name = "DEVICE")]
        device,
        /// What it is called from now on, or its uuid with --setuuid.
        #[arg(value_name = "NEW_NAME")]
        new_name,
    }
}
words! {
    /// A device, and how many events it has had.
    Awaited {
        /// The device.
        #[arg(value_name = "DEVICE")]
        device,
        /// Wait as long as it has had exactly so many events; none unless said.
        #[arg(value_name = "EVENT_NR")]
        event_nr,
    }
}
words! {
    /// Something to say.
    Said {
        /// The device.
        #[arg(value_name = "DEVICE")]
        device,
        /// A sector of the target.
        #[arg(value_name = "SECTOR")]
        sector,
        /// What to say.
        #[arg(value_name = "MESSAGE")]
        text,
    }
}
words! {
    /// No device at all.
    Nothing {}
}

/// Devices, or all.
#[derive(Debug, Args)]
struct Devices {
    /// The devices: NAME, /dev/mapper/NAME, a path, or MAJOR:MINOR; one can also be
    /// named with --uuid, or --major and --minor.
    #[arg(value_name = "DEVICE")]
    words: Vec<String>,
}

/// Targets.
#[derive(Debug, Args)]
struct Targets {
    /// The targets.
    #[arg(value_name = "TARGET")]
    words: Vec<String>,
}

const NAMED: [&str; 3] = ["uuid", "major", "minor"];

#[derive(Debug, Subcommand)]
enum DmVerb {
    /// Make a device, and give it its table.
    ///
    /// Lines of a table are START LENGTH TARGET ARGUMENTS, in sectors of 512 bytes.
    /// Without a table (standard input that is empty, or --notable) the device waits
    /// for 'load' and 'resume'. If the table is refused, the device is gone again.
    ///
    /// A file is named by a path (./disk.img), and has to be there: a COW device too,
    /// which is new if it begins with zeros ('truncate -s 1G vm.cow').
    #[command(args = shown(&["table", "notable", "readonly", "uuid", "major", "minor"]), after_help = "\
Examples:
  nbdsnap dm create vm --table '0 2097152 linear /srv/disk.img 0'
  echo '0 2097152 snapshot-origin /srv/disk.img' | nbdsnap dm create vm-origin
  nbdsnap dm create vm-snap --notable
  nbdsnap dm create both --table '0 65536 linear /srv/a.img 0
65536 65536 linear /srv/b.img 2048'")]
    Create(NewDevice),
    /// Give a device an inactive table; 'resume' makes it the active one.
    #[command(visible_alias = "reload", args = shown(&["table", "readonly"]), args = shown(&NAMED), after_help = "\
Examples:
  nbdsnap dm load vm --table '0 2097152 snapshot-origin /dev/mapper/vm-base'
  nbdsnap dm table vm-base | nbdsnap dm load vm")]
    Load(TableOf),
    /// Drop a device's inactive table.
    #[command(args = shown(&NAMED))]
    Clear(Devices),
    /// Have devices stand still: what is in flight ends, what comes waits.
    ///
    /// Clients stay attached; their requests wait for 'resume'. No file system is
    /// frozen, since none is mounted here: freeze it where it is, with fsfreeze.
    #[command(args = shown(&["noflush", "nolockfs"]), args = shown(&NAMED))]
    Suspend(Devices),
    /// Have devices go on, with their inactive tables if they have been given one.
    #[command(args = shown(&["noflush", "nolockfs"]), args = shown(&NAMED))]
    Resume(Devices),
    /// End devices. One that is open (a client, another device) is busy.
    #[command(args = shown(&["force", "retry", "deferred"]), args = shown(&NAMED))]
    Remove(Devices),
    /// End all devices that are not open.
    #[command(name = "remove_all", args = shown(&["force", "deferred"]))]
    RemoveAll(Nothing),
    /// Have all I/O to devices fail: a table that is one line of 'error'.
    #[command(name = "wipe_table", args = shown(&["force", "noflush", "nolockfs"]), args = shown(&NAMED))]
    WipeTable(Devices),
    /// Give a device another name, or a uuid. Its clients stay attached.
    #[command(args = shown(&["setuuid"]), args = shown(&NAMED), after_help = "\
Examples:
  nbdsnap dm rename vm vm-old
  nbdsnap dm rename vm --setuuid VM-0001")]
    Rename(Renamed),
    /// Show the tables of devices, or of all; they can be loaded again as they are.
    #[command(args = shown(&["inactive", "target", "concise", "showkeys"]), args = shown(&NAMED))]
    Table(Devices),
    /// Show how the targets of devices are doing, or of all devices.
    ///
    /// For a snapshot: START LENGTH snapshot ALLOCATED/TOTAL METADATA, in sectors, or
    /// Invalid, Merge failed or Overflow.
    #[command(args = shown(&["target", "inactive", "noflush"]), args = shown(&NAMED), after_help = "\
Examples:
  nbdsnap dm status vm-snap
  nbdsnap dm status --target snapshot")]
    Status(Devices),
    /// Show how devices are doing, or all of them.
    #[command(args = shown(&["columns", "options", "sort", "noheadings", "separator", "nameprefixes", "unquoted", "rows", "inactive", "noopencount"]), args = shown(&NAMED), after_help = "\
Examples:
  nbdsnap dm info vm
  nbdsnap dm info -c
  nbdsnap dm info -c --noheadings -o name,open vm
  nbdsnap dm info -c -o +devnos_used,names_using_dev
  nbdsnap dm info -c -o help        # which fields there are")]
    Info(Devices),
    /// List devices.
    ///
    /// For --options: devno, devname, blkdevname. With --tree: ascii, utf, vt100;
    /// compact, inverted, notrunc; blkdevname, [no]device, active, open, rw and uuid.
    #[command(args = shown(&["tree", "options", "target", "inactive"]), after_help = "\
Examples:
  nbdsnap dm ls
  nbdsnap dm ls --target snapshot
  nbdsnap dm ls --tree -o inverted,open")]
    Ls(Nothing),
    /// Show what devices stand on, or all of them.
    ///
    /// For --options: devno, devname, blkdevname. A file has no numbers: its path is
    /// shown.
    #[command(args = shown(&["options", "inactive"]), args = shown(&NAMED))]
    Deps(Devices),
    /// Wait for an event: a snapshot that is lost, a merge that is done, a new table.
    #[command(args = shown(&["noflush"]), args = shown(&NAMED), after_help = "\
Examples:
  nbdsnap dm wait vm-snap $(nbdsnap dm info -c --noheadings -o events vm-snap)")]
    Wait(Awaited),
    /// List the targets that tables can have.
    Targets(Nothing),
    /// Show the versions of targets.
    TargetVersion(Targets),
    /// Show which dmsetup and which device-mapper is spoken.
    Version(Nothing),
    /// Say something to a target. None of those that there are listens.
    #[command(args = shown(&NAMED))]
    Message(Said),
    /// Does nothing: devices are exports, and have no nodes.
    Mknodes(Devices),
    /// Does nothing: all names are in correct form.
    #[command(args = shown(&NAMED))]
    Mangle(Devices),
}

impl DmVerb {
    fn split(self) -> (Verb, Vec<String>) {
        match self {
            Self::Create(words) => (Verb::Create, words.all()),
            Self::Load(words) => (Verb::Load, words.all()),
            Self::Clear(devices) => (Verb::Clear, devices.words),
            Self::Suspend(devices) => (Verb::Suspend, devices.words),
            Self::Resume(devices) => (Verb::Resume, devices.words),
            Self::Remove(devices) => (Verb::Remove, devices.words),
            Self::RemoveAll(words) => (Verb::RemoveAll, words.all()),
            Self::WipeTable(devices) => (Verb::WipeTable, devices.words),
            Self::Rename(words) => (Verb::Rename, words.all()),
            Self::Table(devices) => (Verb::Table, devices.words),
            Self::Status(devices) => (Verb::Status, devices.words),
            Self::Info(devices) => (Verb::Info, devices.words),
            Self::Ls(words) => (Verb::Ls, words.all()),
            Self::Deps(devices) => (Verb::Deps, devices.words),
            Self::Wait(words) => (Verb::Wait, words.all()),
            Self::Targets(words) => (Verb::Targets, words.all()),
            Self::TargetVersion(targets) => (Verb::TargetVersion, targets.words),
            Self::Version(words) => (Verb::Version, words.all()),
            Self::Message(words) => (Verb::Message, words.all()),
            Self::Mknodes(devices) => (Verb::Mknodes, devices.words),
            Self::Mangle(devices) => (Verb::Mangle, devices.words),
        }
    }
}

/// dmsetup's switches. Where one is said to be accepted, it means nothing here.
#[derive(Clone, Debug, Default, Args)]
pub(super) struct Switches {
    /// The table itself, instead of a file: one line or several.
    #[arg(
        long,
        value_name = "TABLE",
        global = true,
        hide = true,
        allow_hyphen_values = true
    )]
    pub(super) table: Option<String>,
    /// Make the device without a table.
    #[arg(short, long, global = true, hide = true)]
    pub(super) notable: bool,
    /// The table refuses writes.
    #[arg(short, long, global = true, hide = true)]
    pub(super) readonly: bool,
    /// Before, have the device's I/O fail, even while it is open.
    #[arg(short, long, global = true, hide = true)]
    pub(super) force: bool,
    /// Try again for five seconds while the device is busy.
    #[arg(long, global = true, hide = true)]
    pub(super) retry: bool,
    /// If the device is open, remove it as soon as it is not.
    #[arg(long, global = true, hide = true)]
    pub(super) deferred: bool,
    /// Do not wait until what is in flight has ended.
    #[arg(long, global = true, hide = true)]
    pub(super) noflush: bool,
    /// Do not freeze the file system: accepted, since nothing here freezes one.
    #[arg(long, global = true, hide = true)]
    pub(super) nolockfs: bool,
    /// The device's uuid: a second name, which stays.
    #[arg(short, long, value_name = "UUID", global = true, hide = true)]
    pub(super) uuid: Option<String>,
    /// The device's major number, together with --minor.
    #[arg(short = 'j', long, value_name = "MAJOR", global = true, hide = true)]
    pub(super) major: Option<u32>,
    /// The device's minor number, together with --major.
    #[arg(short, long, value_name = "MINOR", global = true, hide = true)]
    pub(super) minor: Option<u32>,
    /// The new name is a uuid, for a device that has none.
    #[arg(long, global = true, hide = true)]
    pub(super) setuuid: bool,
    /// Tell of the inactive table.
    #[arg(long, global = true, hide = true)]
    pub(super) inactive: bool,
    /// Only lines of this target.
    #[arg(long, value_name = "TARGET", global = true, hide = true)]
    pub(super) target: Option<String>,
    /// All on one line, for 'create --concise' of dmsetup.
    #[arg(long, global = true, hide = true)]
    pub(super) concise: bool,
    /// Show keys too: accepted, since no target here has any.
    #[arg(long, global = true, hide = true)]
    pub(super) showkeys: bool,
    /// A line for each device.
    #[arg(short, long, short_alias = 'C', global = true, hide = true)]
    pub(super) columns: bool,
    /// Fields, separated by commas; +FIELDS adds to the usual ones, 'all' is all of
    /// them, 'help' lists them.
    #[arg(short, long, value_name = "FIELDS", global = true, hide = true)]
    pub(super) options: Option<String>,
    /// Sort by these fields; -FIELD sorts backwards.
    #[arg(
        short = 'O',
        long,
        value_name = "FIELDS",
        global = true,
        hide = true,
        allow_hyphen_values = true
    )]
    pub(super) sort: Option<String>,
    /// Without the line of headings; separated by colons.
    #[arg(long, global = true, hide = true)]
    pub(super) noheadings: bool,
    /// What stands between fields, which are then not aligned.
    #[arg(
        long,
        value_name = "TEXT",
        global = true,
        hide = true,
        allow_hyphen_values = true
    )]
    pub(super) separator: Option<String>,
    /// Fields as DM_FIELD='VALUE', for a shell.
    #[arg(long, global = true, hide = true)]
    pub(super) nameprefixes: bool,
    /// Without the quotes of --nameprefixes.
    #[arg(long, global = true, hide = true)]
    pub(super) unquoted: bool,
    /// A line for each field.
    #[arg(long, global = true, hide = true)]
    pub(super) rows: bool,
    /// As a tree of what stands on what.
    #[arg(long, global = true, hide = true)]
    pub(super) tree: bool,
    /// Accepted: how often a device is open is always told.
    #[arg(long, global = true, hide = true)]
    pub(super) noopencount: bool,
    #[command(flatten)]
    pub(super) accepted: Accepted,
}

/// Switches that mean nothing here, or are refused.
#[derive(Clone, Debug, Default, Args)]
pub(super) struct Accepted {
    #[arg(long, value_name = "COMMAND", global = true, hide = true)]
    pub(super) exec: Option<String>,
    #[arg(
        short = 'S',
        long,
        value_name = "SELECTION",
        global = true,
        hide = true
    )]
    pub(super) select: Option<String>,
    #[arg(short, long, global = true, hide = true)]
    yes: bool,
    #[arg(long, global = true, hide = true)]
    checks: bool,
    #[arg(long, global = true, hide = true)]
    unbuffered: bool,
    #[arg(long, global = true, hide = true)]
    verifyudev: bool,
    #[arg(long, global = true, hide = true)]
    noudevsync: bool,
    #[arg(long, global = true, hide = true)]
    noudevrules: bool,
    #[arg(long, value_name = "COOKIE", global = true, hide = true)]
    udevcookie: Option<String>,
    #[arg(long, global = true, hide = true)]
    pub(super) addnodeonresume: bool,
    #[arg(long, global = true, hide = true)]
    pub(super) addnodeoncreate: bool,
    #[arg(
        long,
        value_name = "SECTORS",
        global = true,
        hide = true,
        allow_hyphen_values = true
    )]
    readahead: Option<String>,
    #[arg(short = 'U', long, value_name = "UID", global = true, hide = true)]
    uid: Option<String>,
    #[arg(short = 'G', long, value_name = "GID", global = true, hide = true)]
    gid: Option<String>,
    #[arg(short = 'M', long, value_name = "MODE", global = true, hide = true)]
    pub(super) mode: Option<String>,
    #[arg(long, value_name = "MODE", global = true, hide = true)]
    pub(super) manglename: Option<String>,
}

/// These switches, for the page of a verb that they mean something to.
fn shown(names: &[&str]) -> Vec<Arg> {
    let all = Switches::augment_args(Command::new("all"));
    let find = |name: &&str| {
        let arg = all.get_arguments().find(|arg| arg.get_id() == *name);
        arg.expect("a switch of this name").clone().hide(false)
    };
    names.iter().map(find).collect()
}
