//! The CPU time that a process and the whole machine have used, and the
//! processor that a thread stays on.
//!
//! A process's time is user and system, of all threads, also those that have ended. The
//! kernel tells it in ticks of 10 ms, so a short run's value is rough; `peers`
//! adds up the turns before it divides.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_setaffinity};

/// CPU time of a process up to now; `None` where there is no such process.
pub fn cpu_time(pid: u32) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    parse_stat(&stat).map(ticks)
}

/// CPU time that all processors together have spent with work (or that the
/// hypervisor took from them) up to now.
pub fn machine_time() -> Option<Duration> {
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    parse_machine(stat.lines().next()?).map(ticks)
}

/// Waits until other processes leave the machine alone, at most for `longest`.
/// Waiting for all servers alike before each of their turns leans to none of them.
pub fn wait_until_quiet(longest: Duration) {
    /// Long enough for a share to be told from ticks of 10 ms.
    const WINDOW: Duration = Duration::from_millis(150);
    /// The part of one processor that may be in use.
    const QUIET: f64 = 0.2;
    let deadline = Instant::now() + longest;
    while Instant::now() < deadline {
        let Some(before) = machine_time() else { return };
        thread::sleep(WINDOW);
        let Some(after) = machine_time() else { return };
        if after.saturating_sub(before) < WINDOW.mul_f64(QUIET) {
            return;
        }
    }
}

fn ticks(number: u64) -> Duration {
    Duration::from_secs_f64(number as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// Keeps the calling thread, and those that it starts from now on, on one processor.
pub fn stay_on(processor: usize) -> io::Result<()> {
    if processor >= CpuSet::MAX_CPU {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut only = CpuSet::new();
    only.set(processor);
    Ok(sched_setaffinity(None, &only)?)
}

/// utime + stime of a line of /proc/PID/stat, in ticks.
fn parse_stat(stat: &str) -> Option<u64> {
    // The second field is the name in brackets, and may hold anything: begin behind its end.
    let behind_name = &stat[stat.rfind(')')? + 1..];
    // utime and stime are fields 14 and 15; the first behind the name is 3.
    let mut fields = behind_name.split_ascii_whitespace().skip(14 - 3);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

/// All but idle and iowait of the first line of /proc/stat, in ticks.
fn parse_machine(line: &str) -> Option<u64> {
    let fields = line.strip_prefix("cpu ")?.split_ascii_whitespace();
    let mut fields = fields.map(str::parse::<u64>);
    // user nice system idle iowait irq softirq steal; what follows is counted in these, too.
    let mut next = || fields.next()?.ok();
    let working = next()? + next()? + next()?;
    let _idle = next()? + next()?;
    Some(working + next()? + next()? + next()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_look_like_fields() {
        let line = "12 (a) b (c) S 1 12 12 0 -1 4194560 100 0 0 0 70 30 0 0 20 0 1 0 5 1 1";
        assert_eq!(parse_stat(line), Some(100));
        assert_eq!(parse_stat("12 (a"), None);
    }

    #[test]
    fn a_machine_that_waits_does_not_work() {
        let line = "cpu  100 20 3 5000 600 4 50 7 9 9";
        assert_eq!(parse_machine(line), Some(184));
        assert_eq!(parse_machine("cpu0 1 2 3"), None);
        assert!(machine_time().is_some());
    }

    #[test]
    fn this_process_has_a_time_and_an_absent_one_has_none() {
        assert!(cpu_time(std::process::id()).is_some());
        assert!(cpu_time(u32::MAX).is_none());
    }
}
