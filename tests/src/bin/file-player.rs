//! Plays a load of files on a mounted file system inside the virtual machine.
//!
//! `file-player play SEED STEPS FOLDER LEDGER` goes on where the ledger ends,
//! says `playing` after the first steps and `played` after the last (STEPS 0:
//! there is none), and fails where a step fails. `file-player check FOLDER
//! LEDGER` says `right FILES BYTES`, or fails with the first difference.

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;

use nbdsnap_tests::kernel::file_load::{Ledger, Load, check};

/// Steps until it says that it plays.
const FIRST: u64 = 3;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args[..] {
        ["play", seed, steps, folder, ledger] => play(seed, steps, folder, ledger),
        ["check", folder, ledger] => compare(folder, ledger),
        _ => Err("usage: file-player play SEED STEPS FOLDER LEDGER, or check FOLDER LEDGER".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            println!("file-player: {why}");
            ExitCode::FAILURE
        }
    }
}

fn play(seed: &str, steps: &str, folder: &str, ledger: &str) -> Result<(), Box<dyn Error>> {
    let steps: u64 = steps.parse()?;
    let ledger = Ledger::open(Path::new(ledger))?;
    let mut load = Load::begin(Path::new(folder), ledger, seed.parse()?)?;
    let mut step = 0;
    while steps == 0 || step < steps {
        load.step()?;
        step += 1;
        if step == FIRST {
            println!("playing");
        }
    }
    println!("played");
    Ok(())
}

fn compare(folder: &str, ledger: &str) -> Result<(), Box<dyn Error>> {
    let (files, bytes) = check(Path::new(folder), &Ledger::open(Path::new(ledger))?)?;
    println!("right {files} {bytes}");
    Ok(())
}
