//! Plays a load of files on a mounted file system inside the virtual machine.
//!
//! `file-player play SEED UNTIL FOLDER LEDGER` goes on where the ledger ends and
//! says `playing` once it keeps some files. When there is a file UNTIL it ends, and
//! says `played STEPS LONGEST`, the longest step in milliseconds. It fails where
//! a step fails. `file-player check FOLDER LEDGER` says `right FILES BYTES`, or
//! fails with the first difference.

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nbdsnap_tests::kernel::file_load::{Ledger, Load, check};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args[..] {
        ["play", seed, until, folder, ledger] => play(seed, until, folder, ledger),
        ["check", folder, ledger] => compare(folder, ledger),
        _ => Err("usage: file-player play SEED UNTIL FOLDER LEDGER, or check FOLDER LEDGER".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            println!("file-player: {why}");
            ExitCode::FAILURE
        }
    }
}

fn play(seed: &str, until: &str, folder: &str, ledger: &str) -> Result<(), Box<dyn Error>> {
    let until = Path::new(until);
    let ledger = Ledger::open(Path::new(ledger))?;
    let mut load = Load::begin(Path::new(folder), ledger, seed.parse()?)?;
    let (mut steps, mut longest, mut said) = (0, Duration::ZERO, false);
    while !until.exists() {
        let begun = Instant::now();
        load.step()?;
        longest = longest.max(begun.elapsed());
        steps += 1;
        if !said && load.is_under_way() {
            println!("playing");
            said = true;
        }
    }
    println!("played {steps} {}", longest.as_millis());
    Ok(())
}

fn compare(folder: &str, ledger: &str) -> Result<(), Box<dyn Error>> {
    let (files, bytes) = check(Path::new(folder), &Ledger::open(Path::new(ledger))?)?;
    println!("right {files} {bytes}");
    Ok(())
}
