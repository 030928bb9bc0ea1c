//! Plays a score on block devices inside the virtual machine:
//! `kernel-player [forever] SEED STEPS CHUNK SNAPSHOT_WRITES WITHIN DEVICE...`,
//! the origin first, WITHIN 1 for requests that keep within a chunk. Prints
//! `outcomes` and a digit for each step, 1 where it succeeded; fails if one of
//! the origin's did not. With `forever` it goes on with one seed after the other
//! and prints `playing` after the first.

use std::io::{Seek, SeekFrom};
use std::process::ExitCode;

use nbdsnap_tests::kernel::play::{Place, Score, outcomes_text, play};

fn main() -> ExitCode {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let forever = args.first().is_some_and(|first| first == "forever");
    if forever {
        args.remove(0);
    }
    let (mut score, mut places) = match parse(&args) {
        Ok(parsed) => parsed,
        Err(why) => {
            eprintln!("kernel-player: {why}");
            return ExitCode::from(2);
        }
    };
    loop {
        let steps = score.steps();
        let outcomes = play(&steps, &mut places);
        let mut together = steps.iter().zip(&outcomes);
        let origin_failed = together.any(|(step, ok)| step.view == 0 && !ok);
        if !forever || origin_failed {
            println!("outcomes {}", outcomes_text(&outcomes));
            return if origin_failed {
                ExitCode::FAILURE
            } else {
                ExitCode::SUCCESS
            };
        }
        println!("playing");
        score.seed += 1;
    }
}

fn parse(args: &[String]) -> Result<(Score, Vec<Place>), String> {
    let number = |at: usize| -> Result<u64, String> {
        let text = args.get(at).ok_or("too few arguments")?;
        text.parse().map_err(|_| format!("{text} is no number"))
    };
    let mut views = Vec::new();
    let mut places = Vec::new();
    for path in args.get(5..).unwrap_or_default() {
        let fault = |e: std::io::Error| format!("{path}: {e}");
        let mut place = Place::device(path).map_err(fault)?;
        if let Place::Device(file) = &mut place {
            views.push(file.seek(SeekFrom::End(0)).map_err(fault)?);
        }
        places.push(place);
    }
    if places.is_empty() {
        return Err("no device".to_owned());
    }
    let score = Score {
        seed: number(0)?,
        steps: number(1)? as usize,
        chunk: number(2)?,
        snapshot_writes: number(3)?,
        within_chunk: number(4)? == 1,
        views,
    };
    Ok((score, places))
}
