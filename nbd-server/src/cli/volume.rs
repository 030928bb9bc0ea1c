//! `nbdsnap volume`: the volumes of a running server.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::{Args, Subcommand, ValueHint};

use super::Failure;
use super::orders::{
    ToServer, absolute, beside_the_point, parse_name, print, print_json, rough_size, table,
};
use super::serve::{disk_parser, snapshot_parser};
use super::spec::{DiskSpec, SnapshotSpec};
use crate::control::protocol::{
    Answer, Order, Resume, StoreToServe, Suspend, VolumeAdd, VolumeRemove, VolumeReport,
    VolumeResize, VolumesAdd, VolumesRemove,
};

/// Look after the volumes of a running server.
#[derive(Debug, Args)]
pub(super) struct VolumeArgs {
    #[command(subcommand)]
    verb: VolumeVerb,
    #[command(flatten)]
    server: ToServer,
}

#[derive(Debug, Subcommand)]
enum VolumeVerb {
    /// Say which volumes are served.
    List,
    Add(AddArgs),
    Remove(RemoveArgs),
    Resize(ResizeArgs),
}

/// See how large a disk is by now, after it has grown.
///
/// Clients see the new size when they attach; snapshots keep theirs.
#[derive(Debug, Args)]
struct ResizeArgs {
    /// The volume.
    #[arg(value_name = "VOLUME", value_parser = parse_name)]
    name: String,
}

/// Have disks stand still: new requests wait, those in flight end, and everything
/// is flushed. Snapshots can be taken meanwhile.
#[derive(Debug, Args)]
pub(super) struct SuspendArgs {
    /// The volumes.
    #[arg(value_name = "VOLUME", required = true, value_parser = parse_name)]
    volumes: Vec<String>,
    /// Go on after so many seconds, so that a script that dies hangs no disk.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86400))]
    timeout: Option<u64>,
    #[command(flatten)]
    server: ToServer,
}

/// Have disks go on.
#[derive(Debug, Args)]
pub(super) struct ResumeArgs {
    /// The volumes.
    #[arg(value_name = "VOLUME", required = true, value_parser = parse_name)]
    volumes: Vec<String>,
    #[command(flatten)]
    server: ToServer,
}

/// The verb 'suspend'.
pub(super) fn suspend(args: SuspendArgs) -> Result<(), Failure> {
    let order = Order::Suspend(Suspend {
        volumes: args.volumes,
        timeout_seconds: args.timeout,
    });
    let volumes = ask(&args.server, order)?;
    show(&args.server, &volumes, |one| {
        format!("{}: stands still, and everything is flushed\n", one.name)
    })
}

/// The verb 'resume'.
pub(super) fn resume(args: ResumeArgs) -> Result<(), Failure> {
    let order = Order::Resume(Resume {
        volumes: args.volumes,
    });
    let volumes = ask(&args.server, order)?;
    show(&args.server, &volumes, |one| {
        format!("{}: goes on\n", one.name)
    })
}

/// Serve more disks, with their snapshots: all that are named, or none.
///
/// As with 'nbdsnap serve': a store that exists goes on, one that does not is made,
/// and its snapshot begins now. Many disks in one order are much faster than one by
/// one.
#[derive(Debug, Args)]
#[command(after_long_help = ADD_MORE)]
struct AddArgs {
    /// A disk image or block device; NAME is the export's name, without it the
    /// file's name less its last extension.
    #[arg(value_name = "[NAME=]DISK", required = true, value_hint = ValueHint::FilePath, value_parser = disk_parser())]
    disks: Vec<DiskSpec>,
    /// A snapshot of one of them, as with 'nbdsnap serve'.
    #[arg(long = "snapshot", value_name = "VOLUME@NAME=COW[,OPTION]...", value_parser = snapshot_parser())]
    snapshots: Vec<SnapshotSpec>,
    /// Change nothing, neither the disks nor their stores.
    #[arg(long, conflicts_with = "shared")]
    read_only: bool,
    /// Only read the disks. Several volumes, of several servers too, may have the
    /// same one, and each its own snapshots, which can be written.
    #[arg(long)]
    shared: bool,
    /// Write to the disk without its store COW: that snapshot is given up.
    #[arg(long, value_name = "COW", value_hint = ValueHint::FilePath)]
    without: Vec<PathBuf>,
}

const ADD_MORE: &str = "\
Examples:
  A thousand volumes on one image, each with a writable snapshot (in bash):
    forks=(fork{1..1000}=base.img)
    for i in {1..1000}; do forks+=(--snapshot fork$i@w=/var/forks/$i.cow); done
    nbdsnap volume add --shared \"${forks[@]}\"
";

/// Serve disks, and their snapshots, no longer. Their files stay.
#[derive(Debug, Args)]
struct RemoveArgs {
    /// The volumes: all of them go, or none.
    #[arg(value_name = "VOLUME", required = true, value_parser = parse_name)]
    names: Vec<String>,
    /// Even while clients are attached: they are dropped.
    #[arg(long)]
    force: bool,
}

/// The verb.
pub(super) fn run(args: VolumeArgs) -> Result<(), Failure> {
    let VolumeArgs { verb, server } = args;
    match verb {
        VolumeVerb::List => {
            let volumes = ask(&server, Order::VolumeList)?;
            if server.json {
                return print_json(&volumes);
            }
            print(&volumes_table(&volumes))
        }
        VolumeVerb::Add(args) => {
            let volumes = ask(&server, add(args)?)?;
            show(&server, &volumes, |one| {
                format!("{}: served, {}\n", one.name, one.disk.display())
            })
        }
        VolumeVerb::Resize(ResizeArgs { name }) => {
            let volumes = ask(&server, Order::VolumeResize(VolumeResize { name }))?;
            show(&server, &volumes, |one| {
                format!("{}: has {}\n", one.name, super::size::show(one.bytes))
            })
        }
        VolumeVerb::Remove(RemoveArgs { names, force }) => {
            let order = match <[String; 1]>::try_from(names) {
                Ok([name]) => Order::VolumeRemove(VolumeRemove { name, force }),
                Err(names) => Order::VolumesRemove(VolumesRemove { names, force }),
            };
            let volumes = ask(&server, order)?;
            show(&server, &volumes, |one| {
                format!("{}: not served any more\n", one.name)
            })
        }
    }
}

fn add(args: AddArgs) -> Result<Order, Failure> {
    let without: Result<Vec<PathBuf>, Failure> =
        args.without.iter().map(|path| absolute(path)).collect();
    let without = without?;
    let mut volumes = Vec::new();
    let mut places = BTreeMap::new();
    for disk in args.disks {
        places.insert(disk.name.clone(), volumes.len());
        volumes.push(VolumeAdd {
            disk: absolute(&disk.path)?,
            name: disk.name,
            read_only: args.read_only,
            shared: args.shared,
            snapshots: Vec::new(),
            without: without.clone(),
        });
    }
    for spec in args.snapshots {
        let Some(&place) = places.get(&spec.volume) else {
            let known: Vec<&str> = places.keys().map(String::as_str).collect();
            return Err(Failure::Usage(format!(
                "the snapshot {}@{} is not one of {}",
                spec.volume,
                spec.name,
                known.join(", ")
            )));
        };
        volumes[place].snapshots.push(StoreToServe {
            cow: absolute(&spec.cow)?,
            snapshot: spec.name,
            size_bytes: spec.size,
            chunk_bytes: spec.chunk,
            kind: spec.kind.into(),
            read_only: spec.read_only,
            format: spec.format,
            adopt: spec.adopt,
        });
    }
    Ok(match <[VolumeAdd; 1]>::try_from(volumes) {
        Ok([one]) => Order::VolumeAdd(one),
        Err(volumes) => Order::VolumesAdd(VolumesAdd { volumes }),
    })
}

fn ask(server: &ToServer, order: Order) -> Result<Vec<VolumeReport>, Failure> {
    match server.order(order)? {
        Answer::Volumes(volumes) => Ok(volumes),
        _ => Err(beside_the_point()),
    }
}

/// JSON, or a line for each.
fn show(
    server: &ToServer,
    volumes: &[VolumeReport],
    line: impl Fn(&VolumeReport) -> String,
) -> Result<(), Failure> {
    if server.json {
        return print_json(&volumes);
    }
    print(&volumes.iter().map(line).collect::<String>())
}

fn volumes_table(volumes: &[VolumeReport]) -> String {
    let rows: Vec<Vec<String>> = volumes
        .iter()
        .map(|one| {
            vec![
                one.name.clone(),
                rough_size(Some(one.bytes)),
                match (one.shared, one.read_only) {
                    (true, _) => "shared",
                    (false, true) => "read-only",
                    (false, false) => "read-write",
                }
                .into(),
                one.snapshots.len().to_string(),
                one.clients.to_string(),
                one.disk.display().to_string(),
            ]
        })
        .collect();
    table(
        &["VOLUME", "SIZE", "ACCESS", "SNAPSHOTS", "CLIENTS", "DISK"],
        &rows,
    )
}
