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
use std::path::PathBuf;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, ValueHint};

use super::Failure;
use super::listen::{self, Bound};
use super::orders::{parse_growth, parse_on_full};
use super::spec::{self, DiskSpec, SnapshotSpec};
use crate::control;
use crate::control::protocol::{Growth, WhenFull};
use crate::disks::{self, Note, Opened, Taken, VolumeRequest};
use crate::nbd::uri::ListenAddr;
use crate::server;
use crate::server::setup::{Defaults, Listener, OpenVolume, Setup};

/// Serve disks and their snapshots until SIGTERM or SIGINT.
///
/// Every DISK becomes an export; the only one is also the default export (the
/// empty name). Every --snapshot becomes the export VOLUME@NAME. When all of it is
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

    /// Serve a snapshot of a disk, kept in the COW store COW.
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
    #[arg(long)]
    read_only: bool,

    /// Take orders on the Unix socket PATH, which is made with mode 0600.
    ///
    /// 'nbdsnap snapshot', 'volume', 'clients' and 'events' give them. A server that
    /// starts without any disk takes them at nbdsnap.control in XDG_RUNTIME_DIR, or
    /// in /run for root, unless PATH is given.
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    control: Option<PathBuf>,

    /// Threads that own volumes.
    ///
    /// A volume lives on one thread, with its clients. By default as many as there
    /// are cores, and no more than there are volumes.
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
    a store            is opened, whoever made it (the kernel's dm-snapshot, LVM, this
                       program): the snapshot goes on where it was.
    anything else      is refused and left alone; the message says what it is.
  A store belongs to its disk: write to the disk while a store of it is not served,
  and that snapshot is silently wrong.

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
  A writable copy for a test that nobody needs afterwards:
    nbdsnap serve disk.img --snapshot disk@try=/tmp/try.cow,transient
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
        control,
        threads,
        on_full,
        auto_extend,
        on_event,
    } = args;
    let control = match control {
        None if disks.is_empty() => Some(control::default_path().ok_or_else(|| {
            Failure::Usage("without a DISK a server is of use only if it takes orders: name a socket with --control".into())
        })?),
        control => control,
    };
    let volumes = spec::assemble(disks, snapshots, read_only).map_err(Failure::usage)?;
    let threads = threads.map_or_else(|| default_threads(volumes.len()), usize::from);
    let ready = make_ready(
        volumes,
        &listen,
        control.map(ListenAddr::Unix).as_ref(),
        threads,
    )?;
    let Ready { mut setup, lines } = ready;
    setup.on_event = on_event;
    setup.defaults = Defaults {
        on_full: on_full.into(),
        auto_extend,
    };
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

fn default_threads(volumes: usize) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    cores.min(volumes).max(1)
}

/// Steps 2 to 4.
pub(super) fn make_ready(
    volumes: Vec<VolumeRequest>,
    addresses: &[ListenAddr],
    control: Option<&ListenAddr>,
    threads: usize,
) -> Result<Ready, Failure> {
    let mut taken = Taken::default();
    let plan = disks::inspect(volumes, &mut taken).map_err(Failure::refused)?;
    let mut bound = Bound::default();
    for address in addresses {
        bound.add(address).map_err(Failure::refused)?;
    }
    let mut bound_control = Bound::default();
    if let Some(address) = control {
        bound_control.add(address).map_err(Failure::refused)?;
    }
    let Opened { volumes, notes } = plan.carry_out(&mut taken).map_err(Failure::refused)?;
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
        on_event: None,
        defaults: Defaults::default(),
    };
    Ok(Ready { setup, lines })
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
    let mut out = std::io::stdout().lock();
    for line in lines {
        let _ = writeln!(out, "{line}");
    }
    let _ = out.flush();
}
