//! `nbdsnap serve`: four steps, each of which can refuse only before the next
//! one begins, so that a refusal leaves everything as it was:
//!
//! 1. read the arguments;
//! 2. open, lock and check every disk and store (`disks::inspect`);
//! 3. bind every socket;
//! 4. make, grow and format what is to be new (`Plan::carry_out`).
//!
//! Then the server has all it needs and runs until a signal ends it.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, ValueHint};

use super::Failure;
use super::listen::{self, Bound};
use super::orders::{parse_growth, parse_on_full};
use super::spec::{self, DiskSpec, SnapshotSpec};
use crate::control;
use crate::control::protocol::{Growth, WhenFull};
use crate::disks::{self, Note, Opened, Plan, Taken, VolumeRequest};
use crate::io::VolumeAccess;
use crate::nbd::uri::ListenAddr;
use crate::server;
use crate::server::setup::{Defaults, Listener, OpenVolume, Setup};
use crate::state::Records;
use crate::state::admission::{self, Recorded};
use crate::state::files::SystemFiles;
use crate::state::folder::StateFolder;
use crate::state::keeper::Keeper;
use crate::state::place::settled;

/// Serve disks and their snapshots until SIGTERM or SIGINT.
///
/// Every DISK becomes an export; the only one is also the default export (the
/// empty name). Every --snapshot becomes the export VOLUME@NAME, or VOLUME@NAME@NEXT if
/// it is one of the snapshot VOLUME@NAME. When all of it is
/// ready, one line for each export is printed with its URI, to paste into a client
/// (several addresses: several URIs on the line).
///
/// Nothing is written before everything has been checked: if one argument is
/// refused, every file stays as it was.
#[derive(Debug, Args)]
#[command(after_long_help = MORE)]
pub(super) struct ServeArgs {
    /// A disk image or block device; there may be none, as long as orders are taken.
    ///
    /// NAME is the export's name; without it, the file's name less its last
    /// extension. What stands before the first '=' is a NAME unless it contains a
    /// '/': write './a=b.img' for a path with '='. A name may hold anything but
    /// '/', '@', '=' and control characters, up to 255 bytes.
    #[arg(value_name = "[NAME=]DISK", value_hint = ValueHint::FilePath, value_parser = disk_parser())]
    disks: Vec<DiskSpec>,

    /// Serve a snapshot of a disk, kept in the COW store COW; VOLUME@NAME@NEXT=COW is
    /// one of the snapshot VOLUME@NAME, which is given too.
    ///
    /// See "COW stores" below for what becomes of COW.
    #[arg(long = "snapshot", value_name = "VOLUME@NAME=COW[,OPTION]...", value_parser = snapshot_parser())]
    snapshots: Vec<SnapshotSpec>,

    /// Listen at HOST:PORT, unix:PATH or an NBD URI; may be given several times.
    ///
    /// Port 0 lets the system choose. A Unix socket is made with mode 0600; that of
    /// a server that died is replaced.
    #[arg(
        long = "listen",
        value_name = "ADDR",
        default_value = "127.0.0.1:10809"
    )]
    listen: Vec<ListenAddr>,

    /// Change nothing, neither disks nor stores: writes get EPERM.
    ///
    /// Disks and stores are opened for reading only and locked against writers, but
    /// not against other readers.
    #[arg(long, conflicts_with = "shared")]
    read_only: bool,

    /// Only read the disks, of which several may be the same image; snapshots of them
    /// can be written.
    ///
    /// For many copies of one image that cost only what they change. The image is
    /// locked against writers, of this program and others, but not against other
    /// readers. Writes to the disks themselves get EPERM.
    #[arg(long)]
    shared: bool,

    /// Take orders on the Unix socket PATH, which is made with mode 0600.
    ///
    /// 'nbdsnap snapshot', 'volume', 'clients' and 'events' give them. A server that
    /// starts without any disk takes them at nbdsnap.control in XDG_RUNTIME_DIR, or
    /// in /run for root, unless PATH is given.
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    control: Option<PathBuf>,

    /// Remember in the folder DIR what this server has, and serve it again.
    ///
    /// What was created while it ran comes back after a restart, a crash or a
    /// reboot, beside what the command line names. A volume whose disk or store is
    /// missing is reported, and does not stop the others. DIR is made if it does
    /// not exist; it is one server's alone.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    state: Option<PathBuf>,

    /// Write to a disk without its store COW: that snapshot is given up.
    ///
    /// A disk remembers its stores, since one that misses a write is wrong ever
    /// after; it is not served writable without one of them unless you say so.
    #[arg(long, value_name = "COW", value_hint = ValueHint::FilePath)]
    without: Vec<PathBuf>,

    /// Threads that own volumes.
    ///
    /// A volume lives on one thread, with its clients. By default as many as there
    /// are cores, and without --control no more than there are volumes.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

    /// What a write means that finds a store full.
    ///
    /// Of the disk: 'invalidate' loses the snapshot and goes on, as the kernel does;
    /// 'pause' waits until the store is extended or the snapshot removed; 'error'
    /// fails with ENOSPC, and the snapshot lives. For every snapshot that does not
    /// say otherwise.
    #[arg(long, value_name = "WHAT", default_value = "invalidate", value_parser = parse_on_full)]
    on_full: WhenFull,

    /// Let stores grow by themselves: 80%+20% is by 20 % when 80 % are used, up to
    /// what the disk can ever need. For every snapshot that does not say otherwise.
    #[arg(long, value_name = "N%+M%", value_parser = parse_growth)]
    auto_extend: Option<Growth>,

    /// Run a command for every event, by the shell, one after the other.
    ///
    /// It finds the event in NBDSNAP_EVENT (as 'nbdsnap events' writes it),
    /// NBDSNAP_SEQUENCE, _AT, _VOLUME, _SNAPSHOT, _PERCENT, _CLIENT and _MESSAGE.
    /// The server does not wait for it; one that takes more than a minute is killed.
    #[arg(long, value_name = "CMD")]
    on_event: Option<String>,
}

const MORE: &str = "\
COW stores:
  COW is a file or a block device. What is there decides what happens:
    nothing, or zeros  a new snapshot begins now. A file is created with mode 0600
                       and grows as it needs, in steps that are reserved and zeroed,
                       up to what the disk can ever need, or to size=. A file of zeros
                       keeps its length as its first size. Zeros means: the first and
                       the last 128 KiB are.
    a store            is opened, and the snapshot goes on where it was. One that the
                       kernel's dm-snapshot or LVM made, or that was used elsewhere,
                       needs 'adopt' the first time (below).
    anything else      is refused and left alone; the message says what it is.
  A store belongs to its disk: it must see every write to it. The disk's stores are
  listed in DISK.nbdsnap beside it (for a block device, in the folder of --state, else
  in /var/lib/nbdsnap). The disk is not served writable without one of them, unless
  --without gives that one up, nor with a store from elsewhere, unless 'adopt' says
  that it has missed nothing.

Options after COW, each with a comma before it (',,' is a comma in the path):
  chunk=SIZE   the unit of copying: a power of two from 1s to 1G, default 16K. Small
               chunks copy less for scattered writes, large ones need less metadata.
               A store that exists keeps its own.
  size=SIZE    how far the file may grow. It is not recorded: give it at every start.
  overflow     when the store is full, refuse further writes to the snapshot and keep
               it; without it such a write loses the snapshot. A write to the disk
               that finds the store full loses the snapshot in either case, and
               succeeds.
  transient    keep the list of exceptions in memory: faster, and gone when the server
               stops. What the file holds then means nothing; one that began empty is
               emptied at a clean stop. Never overwrites a persistent store unless
               'format' is given too.
  ro           refuse writes to the snapshot.
  format       make the new store even where something else lies, which is then lost.
               A healthy store is opened all the same, so that a command line with
               'format' can be run again.

  adopt        take in a store that the disk's list does not name: one that the
               kernel or LVM made, and kept up with the disk until now.

Sizes: 4096, 4K or 4KiB, 1M, 1G, 1T; 64s is 64 sectors of 512 bytes.

Signals:
  SIGTERM, SIGINT  take no more requests, finish those in flight, commit and flush
                   every store, exit with 0. A second one does not wait: exit with 1;
                   nothing that was flushed is lost.

Exit status:
  0  stopped by a signal, everything is durable
  1  refused (nothing was changed), or failed while running or stopping
  2  an argument that makes no sense

Examples:
  Serve a disk with a snapshot, and read the past while the disk is written:
    nbdsnap serve disk.img --snapshot disk@monday=monday.cow
    nbdcopy nbd://localhost/disk@monday monday.img
  On a Unix socket, two snapshots with chunks of 64 KiB, one of at most 10 GiB:
    nbdsnap serve vm=/dev/vg/vm --listen unix:/run/vm.sock \\
      --snapshot vm@a=/var/cow/a,chunk=64K --snapshot vm@b=/var/cow/b,chunk=64K,size=10G
  A snapshot, and a snapshot of that to try something on:
    nbdsnap serve disk.img --snapshot disk@monday=monday.cow \\
      --snapshot disk@monday@try=try.cow
  A writable copy for a test that nobody needs afterwards:
    nbdsnap serve disk.img --snapshot disk@try=/tmp/try.cow,transient
  Three machines on one image, each with what it changes in a store of its own:
    nbdsnap serve --shared vm1=base.img vm2=base.img vm3=base.img \\
      --snapshot vm1@w=1.cow --snapshot vm2@w=2.cow --snapshot vm3@w=3.cow
  Look at a kernel's snapshot and change nothing:
    nbdsnap serve --read-only origin.img --snapshot origin@old=cow.img
  Attach as a block device:
    nbd-client -N disk@monday localhost /dev/nbd0
";

pub(super) fn disk_parser() -> impl TypedValueParser<Value = DiskSpec> {
    OsStringValueParser::new().try_map(|text: OsString| DiskSpec::parse(&text))
}

pub(super) fn snapshot_parser() -> impl TypedValueParser<Value = SnapshotSpec> {
    OsStringValueParser::new().try_map(|text: OsString| SnapshotSpec::parse(&text))
}

/// Everything that a server needs, and what is to be done around it.
pub(super) struct Ready {
    pub(super) setup: Setup,
    /// One line for each export.
    lines: Vec<String>,
}

/// The verb.
pub(super) fn run(args: ServeArgs) -> Result<(), Failure> {
    let ServeArgs {
        disks,
        snapshots,
        listen,
        read_only,
        shared,
        control,
        state,
        without,
        threads,
        on_full,
        auto_extend,
        on_event,
    } = args;
    raise_limit_of_open_files();
    let access = VolumeAccess::from_words(read_only, shared);
    let control = match control {
        None if disks.is_empty() && state.is_none() => Some(control::default_path().ok_or_else(|| {
            Failure::Usage("without a DISK a server is of use only if it takes orders: name a socket with --control".into())
        })?),
        control => control,
    };
    let defaults = Defaults {
        on_full: on_full.into(),
        auto_extend,
    };
    let mut volumes = spec::assemble(disks, snapshots, access).map_err(Failure::usage)?;
    for snapshot in volumes.iter_mut().flat_map(|volume| &mut volume.snapshots) {
        snapshot.behaviour = Some(defaults);
    }
    let ready = make_ready(Wanted {
        volumes,
        addresses: &listen,
        control: control.map(ListenAddr::Unix),
        threads: threads.map(usize::from),
        state: state.as_deref(),
        without: &without,
    })?;
    let Ready { mut setup, lines } = ready;
    setup.on_event = on_event;
    setup.defaults = defaults;
    let paths = socket_paths(&setup);
    let mut served = false;
    let ended = server::run(setup, |_| {
        served = true;
        announce(&lines);
    })
    .map_err(Failure::refused);
    if !served {
        // A server that has begun takes its sockets away itself.
        for path in paths {
            let _ = std::fs::remove_file(path);
        }
    }
    ended
}

fn socket_paths(setup: &Setup) -> Vec<PathBuf> {
    let paths =
        setup
            .listeners
            .iter()
            .chain(&setup.control)
            .filter_map(|listener| match listener {
                Listener::Unix(_, path) => Some(path.clone()),
                Listener::Tcp(_) => None,
            });
    paths.collect()
}

fn default_threads(volumes: usize, takes_orders: bool) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    if takes_orders {
        // More may come.
        return cores;
    }
    cores.min(volumes).max(1)
}

/// A volume with a snapshot has two files open, and each client a socket: as many as
/// the system lets us, not the few that programs have by tradition.
fn raise_limit_of_open_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(errno) = setrlimit(Resource::Nofile, limit) {
        tracing::debug!("the limit of open files stays as it is: {errno}");
    }
}

/// What was asked for.
#[derive(Default)]
pub(super) struct Wanted<'a> {
    pub(super) volumes: Vec<VolumeRequest>,
    pub(super) addresses: &'a [ListenAddr],
    pub(super) control: Option<ListenAddr>,
    pub(super) threads: Option<usize>,
    pub(super) state: Option<&'a Path>,
    /// Stores that are given up.
    pub(super) without: &'a [PathBuf],
}

/// Steps 2 to 4.
pub(super) fn make_ready(wanted: Wanted<'_>) -> Result<Ready, Failure> {
    let folder = wanted.state.map(StateFolder::open).transpose();
    let mut keeper = folder
        .and_then(|folder| Keeper::open(SystemFiles, folder))
        .map_err(Failure::refused)?;
    let mut taken = Taken::default();
    let plan = plan(&keeper, wanted.volumes, wanted.without, &mut taken)?;
    let mut bound = Bound::default();
    for address in wanted.addresses {
        bound.add(address).map_err(Failure::refused)?;
    }
    let mut bound_control = Bound::default();
    if let Some(address) = &wanted.control {
        bound_control.add(address).map_err(Failure::refused)?;
    }
    let offered = plan.offered();
    let threads = wanted
        .threads
        .unwrap_or_else(|| default_threads(offered.len(), wanted.control.is_some()));
    let next = admission::state_with(&keeper, offered.iter().map(Into::into).collect());
    let files = admission::files_to_make(offered.iter().flat_map(|volume| &volume.stores));
    let mut change = keeper.begin(next, files).map_err(Failure::refused)?;
    let mut making = Recorded {
        keeper: &mut keeper,
        change: &mut change,
    };
    let carried_out = plan.carry_out(&mut making);
    let records = Records {
        keeper,
        change: Some(change),
    };
    let opened = match carried_out {
        Ok(opened) => opened,
        Err(refusal) => {
            records.abandon();
            return Err(Failure::refused(refusal));
        }
    };
    opened.note(&mut taken);
    let Opened { volumes, notes } = opened;
    for note in notes {
        match note {
            Note::Warning(text) => tracing::warn!("{text}"),
            Note::Info(text) => tracing::info!("{text}"),
        }
    }
    let listeners = bound.keep();
    let control = bound_control.keep().into_iter().next();
    let addresses: Result<Vec<ListenAddr>, _> = listeners.iter().map(listen::address_of).collect();
    let lines = lines(&volumes, &addresses.map_err(Failure::refused)?);
    let setup = Setup {
        volumes,
        listeners,
        threads,
        control,
        taken,
        records,
        on_event: None,
        defaults: Defaults::default(),
    };
    Ok(Ready { setup, lines })
}

/// Look at everything that was asked for, and at what the records name. What was
/// asked for must be as it should; what is only remembered is left out if it is not.
fn plan(
    keeper: &Keeper<SystemFiles>,
    asked: Vec<VolumeRequest>,
    without: &[PathBuf],
    taken: &mut Taken,
) -> Result<Plan, Failure> {
    let mut remembered: Vec<VolumeRequest> = Vec::new();
    let mut asked = asked;
    for volume in &keeper.state().volumes {
        let request = admission::request_of(volume);
        match asked.iter_mut().find(|asked| asked.name == request.name) {
            Some(asked) => join(asked, request, without)?,
            None => remembered.push(request),
        }
    }
    let asked = admission::as_listed(keeper, asked).map_err(Failure::refused)?;
    let mut plan = disks::inspect(asked, taken).map_err(Failure::refused)?;
    for volume in &plan.offered() {
        admission::admit(keeper, volume, without).map_err(Failure::refused)?;
    }
    // All together, which is faster by far; if one of them cannot be, each by itself.
    if remember(keeper, &mut plan, remembered.clone(), without, taken).is_err() {
        for request in remembered {
            let name = request.name.clone();
            if let Err(why) = remember(keeper, &mut plan, vec![request], without, taken) {
                tracing::error!("{name} is not served: {why}");
            }
        }
    }
    Ok(plan)
}

/// Add volumes that the records name, all or none.
fn remember(
    keeper: &Keeper<SystemFiles>,
    plan: &mut Plan,
    requests: Vec<VolumeRequest>,
    without: &[PathBuf],
    taken: &mut Taken,
) -> Result<(), String> {
    let mut requests = admission::as_listed(keeper, requests).map_err(|error| error.to_string())?;
    let given_up: Vec<PathBuf> = without.iter().map(|path| settled(path)).collect();
    for request in &mut requests {
        let snapshots = &mut request.snapshots;
        snapshots.retain(|snapshot| !given_up.contains(&settled(&snapshot.cow)));
    }
    let count = requests.len();
    plan.add(requests, taken)
        .map_err(|refusal| refusal.to_string())?;
    let offered = plan.last_offered(count);
    let admitted = offered
        .iter()
        .try_for_each(|volume| admission::admit(keeper, volume, without));
    admitted.map_err(|refusal| {
        plan.drop_last(count, taken);
        refusal.to_string()
    })
}

/// A volume that was asked for has the snapshots that the records name too. What
/// was asked for in other words counts as it was asked for.
fn join(
    asked: &mut VolumeRequest,
    remembered: VolumeRequest,
    without: &[PathBuf],
) -> Result<(), Failure> {
    if settled(&asked.path) != settled(&remembered.path) {
        return Err(Failure::Refused(format!(
            "the volume {} is known as {}: give {} another name, or take the other one out of the state first",
            asked.name,
            disks::shown(&remembered.path),
            disks::shown(&asked.path),
        )));
    }
    let given_up: Vec<PathBuf> = without.iter().map(|path| settled(path)).collect();
    for snapshot in remembered.snapshots {
        let cow = settled(&snapshot.cow);
        let known = asked
            .snapshots
            .iter()
            .any(|other| other.name == snapshot.name || settled(&other.cow) == cow);
        if !known && !given_up.contains(&cow) {
            asked.snapshots.push(snapshot);
        }
    }
    Ok(())
}

/// The URIs of every export, a line each.
fn lines(volumes: &[OpenVolume], addresses: &[ListenAddr]) -> Vec<String> {
    let mut lines = Vec::new();
    for volume in volumes {
        let snapshots = volume
            .snapshots
            .iter()
            .map(|snapshot| format!("{}@{}", volume.name, snapshot.name));
        for export in std::iter::once(volume.name.clone()).chain(snapshots) {
            let uris: Vec<String> = addresses
                .iter()
                .map(|address| address.uri(&export).to_string())
                .collect();
            lines.push(uris.join(" "));
        }
    }
    lines
}

/// Print the lines at once. Whoever started the server may not be listening.
fn announce(lines: &[String]) {
    let mut text = lines.join("\n");
    if !lines.is_empty() {
        text.push('\n');
    }
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes());
    let _ = out.flush();
}
