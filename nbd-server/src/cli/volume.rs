//! `nbdsnap volume`: the volumes of a running server.

use clap::{Args, Subcommand};

use super::Failure;
use super::orders::{ToServer, beside_the_point, print, print_json, rough_size, table};
use crate::control::protocol::{Answer, Order, VolumeReport};

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
}

/// The verb.
pub(super) fn run(args: &VolumeArgs) -> Result<(), Failure> {
    let VolumeArgs { verb, server } = args;
    match verb {
        VolumeVerb::List => {
            let Answer::Volumes(volumes) = server.order(Order::VolumeList)? else {
                return Err(beside_the_point());
            };
            if server.json {
                return print_json(&volumes);
            }
            print(&volumes_table(&volumes))
        }
    }
}

fn volumes_table(volumes: &[VolumeReport]) -> String {
    let rows: Vec<Vec<String>> = volumes
        .iter()
        .map(|one| {
            vec![
                one.name.clone(),
                rough_size(Some(one.bytes)),
                if one.read_only {
                    "read-only"
                } else {
                    "read-write"
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
