//! Plays steps with dmsetup on the kernel's devices, inside the virtual machine:
//! `dm-player STEPS DISK...`. Prints the outcome of each. A step that takes too long
//! ends it: something waits for what is suspended.

use std::io::Write;
use std::process::ExitCode;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use nbdsnap_tests::kernel::dm::play::Side;
use nbdsnap_tests::kernel::dm::step::Step;

/// No step takes so long, under emulation on a busy machine.
const PATIENCE: Duration = Duration::from_mins(2);

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let steps = match args
        .next()
        .ok_or("no file".to_owned())
        .and_then(|path| read(&path))
    {
        Ok(steps) => steps,
        Err(why) => {
            eprintln!("dm-player: {why}");
            return ExitCode::from(2);
        }
    };
    let side = Side::kernel(args.collect());
    let (sender, outcomes) = channel();
    let texts: Vec<String> = steps.iter().map(ToString::to_string).collect();
    std::thread::spawn(move || {
        for step in &steps {
            let _ = sender.send(side.play(step));
        }
    });
    let mut out = std::io::stdout().lock();
    for (number, text) in texts.iter().enumerate() {
        match outcomes.recv_timeout(PATIENCE) {
            Ok(outcome) => {
                let lines = outcome.to_lines(number).join("\n");
                let _ = writeln!(out, "{lines}");
            }
            Err(RecvTimeoutError::Timeout) => {
                let _ = writeln!(out, "HANGS at step {number}: {text}");
                return ExitCode::FAILURE;
            }
            Err(RecvTimeoutError::Disconnected) => return ExitCode::FAILURE,
        }
    }
    ExitCode::SUCCESS
}

fn read(path: &str) -> Result<Vec<Step>, String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))?;
    text.lines().map(Step::parse).collect()
}
