//! Plays a round of a load on nbdsnap's exports inside the virtual machine, and
//! sets the marks of it in the log of the `dm-log-writes` device `log`:
//! `log-player SEED ROUND SOCKET`.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use nbdsnap::client::Client;
use nbdsnap::nbd::uri::ListenAddr;
use nbdsnap_tests::kernel::load::{self, Load, SEGMENTS, Sent, VOLUMES};
use nbdsnap_tests::kernel::play::{Act, content};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            println!("log-player: {why}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String]) -> Result<(), String> {
    let [seed, round, socket] = args else {
        return Err("SEED ROUND SOCKET".to_owned());
    };
    let round: usize = round.parse().map_err(|e| format!("{round}: {e}"))?;
    let load = Load {
        seed: seed.parse().map_err(|e| format!("{seed}: {e}"))?,
        rounds: round + 1,
    };
    let address = ListenAddr::Unix(PathBuf::from(socket));
    let mut volumes = Vec::new();
    for volume in 0..VOLUMES.len() {
        volumes.push(connect(&address, volume, round)?);
    }
    mark(&load::taken(round))?;
    for segment in 0..SEGMENTS {
        std::thread::scope(|scope| {
            let players: Vec<_> = volumes
                .iter_mut()
                .enumerate()
                .map(|(volume, views)| {
                    let waves = load.waves(volume, round, segment);
                    scope.spawn(move || play(views, &waves))
                })
                .collect();
            players
                .into_iter()
                .try_for_each(|player| player.join().map_err(|_| "a player panicked".to_owned())?)
        })?;
        mark(&load::durable(round, segment))?;
    }
    Ok(())
}

/// The views of a volume, the origin first.
fn connect(address: &ListenAddr, volume: usize, round: usize) -> Result<Vec<Client>, String> {
    let snapshots = (0..load::snapshots(round)).map(|s| format!("v{volume}@s{s}"));
    std::iter::once(format!("v{volume}"))
        .chain(snapshots)
        .map(|export| Client::connect(&address.uri(&export)).map_err(|e| format!("{export}: {e}")))
        .collect()
}

/// Send wave after wave, then make all of it durable.
fn play(views: &mut [Client], waves: &[Vec<Sent>]) -> Result<(), String> {
    for wave in waves {
        for sent in wave {
            let client = &mut views[sent.view];
            match sent.act {
                Act::Write { offset, len, fill } => {
                    client.queue_write(offset, &content(fill, len), false)
                }
                Act::Flush => client.queue_flush(),
            };
        }
        answered(views)?;
    }
    for client in views.iter_mut() {
        client.queue_flush();
    }
    answered(views)
}

/// Send what is queued and wait for every reply.
fn answered(views: &mut [Client]) -> Result<(), String> {
    for client in views.iter_mut() {
        client.flush_out().map_err(|e| e.to_string())?;
    }
    for client in views {
        while client.in_flight() > 0 {
            let reply = client.recv_reply().map_err(|e| e.to_string())?;
            reply.result.map_err(|e| e.to_string())?;
        }
    }
    Ok(())
}

/// A mark in the log; it is there when this returns.
fn mark(name: &str) -> Result<(), String> {
    let status = Command::new("dmsetup")
        .args(["message", "log", "0", "mark", name])
        .status()
        .map_err(|e| format!("dmsetup: {e}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("dmsetup message: {status}"))
    }
}
