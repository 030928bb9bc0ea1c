//! Medians and ratios, for people and as JSON.

use std::fs;

use nbdsnap_benches::load::Measured;
use serde_json::{Value, json};

use crate::cases::Case;
use crate::contender::Contender;
use crate::server::Programs;

/// The part of the machine that others may take, in the median of the turns,
/// where a bar is judged.
const BUSY: f64 = 0.15;

/// Collects the turns of a case, and prints when it is complete. Call `begin`,
/// `add` for each turn, `end`; and `finish` behind the last case.
pub(crate) struct Report {
    as_json: bool,
    versions: Vec<String>,
    case: Option<&'static Case>,
    absent: Vec<Contender>,
    turns: Vec<Turn>,
    bars: Vec<Bar>,
    finished: Vec<Value>,
}

/// What one server did in one turn.
struct Turn {
    contender: Contender,
    number: u32,
    measured: Measured,
}

/// Where nbdsnap stands against the peer that it has to be the equal of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bar {
    /// At least its equal, in the median of the turns.
    Held,
    /// Below it.
    Missed,
    /// Not to be judged: other processes took too much of the machine, and a
    /// server of many threads then gets a larger share than one of one thread.
    Noisy,
    /// One of the two is not installed.
    NotMeasured,
}

impl Bar {
    fn word(self) -> &'static str {
        match self {
            Self::Held => "held",
            Self::Missed => "missed",
            Self::Noisy => "not judged: the machine was busy",
            Self::NotMeasured => "not measured",
        }
    }
}

/// The least, the middle and the greatest of some numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Spread {
    min: f64,
    median: f64,
    max: f64,
}

impl Spread {
    /// `None` of nothing.
    fn of(mut numbers: Vec<f64>) -> Option<Self> {
        numbers.sort_by(f64::total_cmp);
        let (min, max) = (*numbers.first()?, *numbers.last()?);
        let middle = numbers.len() / 2;
        let median = if numbers.len() % 2 == 1 {
            numbers[middle]
        } else {
            f64::midpoint(numbers[middle - 1], numbers[middle])
        };
        Some(Self { min, median, max })
    }

    fn to_json(self) -> Value {
        json!({ "min": self.min, "median": self.median, "max": self.max })
    }
}

impl Report {
    /// Says what is compared, and on what machine.
    pub(crate) fn new(as_json: bool, programs: &Programs) -> Self {
        let versions = programs.versions();
        if !as_json {
            println!("{}", versions.join("; "));
            println!("{}", machine());
        }
        Self {
            as_json,
            versions,
            case: None,
            absent: Vec::new(),
            turns: Vec::new(),
            bars: Vec::new(),
            finished: Vec::new(),
        }
    }

    /// A case begins. Those absent are not installed.
    pub(crate) fn begin(&mut self, case: &'static Case, absent: &[Contender]) {
        self.case = Some(case);
        self.absent = absent.to_vec();
        self.turns.clear();
    }

    /// A server had its turn.
    pub(crate) fn add(&mut self, contender: Contender, turn: u32, measured: Measured) {
        self.turns.push(Turn {
            contender,
            number: turn,
            measured,
        });
    }

    /// The case is complete.
    pub(crate) fn end(&mut self) {
        let case = self.case.expect("a case began");
        let bar = case.bar.map(|peer| self.bar(peer));
        self.bars.extend(bar);
        if self.as_json {
            let value = self.case_json(case, bar);
            self.finished.push(value);
        } else {
            self.print_case(case, bar);
        }
    }

    /// All cases are complete.
    pub(crate) fn finish(&self) {
        if self.as_json {
            let report = json!({
                "versions": self.versions,
                "machine": machine(),
                "debug_build": cfg!(debug_assertions),
                "cases": self.finished,
            });
            println!("{report:#}");
        }
    }

    /// True if nbdsnap is compared with every bar, and held it.
    pub(crate) fn bars_held(&self) -> bool {
        self.bars.iter().all(|bar| *bar == Bar::Held)
    }

    fn bar(&self, peer: Contender) -> Bar {
        let busy = self
            .turns
            .iter()
            .filter(|turn| turn.contender.is_nbdsnap() || turn.contender == peer);
        let busy = Spread::of(busy.filter_map(|turn| turn.measured.others).collect());
        match self.ratio_to(peer) {
            Some(_) if busy.is_none_or(|others| others.median > BUSY) => Bar::Noisy,
            Some(ratio) if ratio.median >= 1.0 => Bar::Held,
            Some(_) => Bar::Missed,
            None => Bar::NotMeasured,
        }
    }

    /// nbdsnap's operations a second by those of another server, turn by turn.
    fn ratio_to(&self, peer: Contender) -> Option<Spread> {
        let pairs = self.of(peer).filter_map(|peers| {
            let ours = self
                .turns
                .iter()
                .find(|ours| ours.contender.is_nbdsnap() && ours.number == peers.number)?;
            Some(ours.measured.iops() / peers.measured.iops())
        });
        Spread::of(pairs.collect())
    }

    fn of(&self, contender: Contender) -> impl Iterator<Item = &Turn> {
        self.turns
            .iter()
            .filter(move |turn| turn.contender == contender)
    }

    fn spread(&self, contender: Contender, of: impl Fn(&Measured) -> f64) -> Option<Spread> {
        Spread::of(self.of(contender).map(|turn| of(&turn.measured)).collect())
    }

    /// Over all turns: one of them is short for a clock that ticks every 10 ms.
    fn server_cpu_us(&self, contender: Contender) -> Option<f64> {
        let (mut cpu, mut operations) = (0.0, 0);
        for turn in self.of(contender) {
            cpu += turn.measured.server_cpu?.as_secs_f64();
            operations += turn.measured.operations;
        }
        (operations > 0).then(|| cpu * 1e6 / operations as f64)
    }

    fn print_case(&self, case: &Case, bar: Option<Bar>) {
        println!("\n{}: {}", case.name, case.title());
        println!(
            "  {:<30} {:>26} {:>7} {:>8} {:>9} {:>9} {:>7} {:>5} {:>6}   nbdsnap is",
            "",
            "IOPS min/median/max",
            "MB/s",
            "p50 us",
            "p99 us",
            "max us",
            "CPU us",
            "idle",
            "others"
        );
        for &contender in case.contenders {
            if self.absent.contains(&contender) {
                println!(
                    "  {:<30} {} is not installed",
                    contender.label(),
                    contender.program().name()
                );
            } else {
                self.print_contender(contender);
            }
        }
        let peer = case.bar.map(Contender::label).unwrap_or_default();
        match bar {
            Some(Bar::Held) => println!("  the bar is held: at least the equal of {peer}"),
            Some(Bar::Missed) => println!("  THE BAR IS MISSED: less than {peer}"),
            Some(Bar::Noisy) => println!(
                "  the bar is not judged: others took over {:.0} % of the machine; it is {peer}",
                BUSY * 100.0
            ),
            Some(Bar::NotMeasured) => println!("  the bar was not measured: it is {peer}"),
            None => {}
        }
    }

    fn print_contender(&self, contender: Contender) {
        let median = |of: &dyn Fn(&Measured) -> f64| {
            self.spread(contender, of)
                .map_or(0.0, |spread| spread.median)
        };
        let Some(iops) = self.spread(contender, Measured::iops) else {
            return;
        };
        let max_us = self
            .spread(contender, |m| m.latency_us(1.0))
            .map_or(0.0, |spread| spread.max);
        let ratio = if contender.is_nbdsnap() {
            None
        } else {
            self.ratio_to(contender)
        };
        println!(
            "  {:<30} {:>26} {:>7.0} {:>8.1} {:>9.1} {:>9.0} {:>7} {:>4.0}% {:>5.0}%   {}",
            contender.label(),
            format!("{:.0} / {:.0} / {:.0}", iops.min, iops.median, iops.max),
            median(&|m| m.bytes_per_second() / 1e6),
            median(&|m| m.latency_us(0.5)),
            median(&|m| m.latency_us(0.99)),
            max_us,
            self.server_cpu_us(contender)
                .map_or("?".into(), |cpu| format!("{cpu:.1}")),
            median(&|m| m.idle * 100.0),
            median(&|m| m.others.unwrap_or(0.0) * 100.0),
            ratio.map_or(String::new(), |ratio| format!(
                "x {:.2} ({:.2} to {:.2})",
                ratio.median, ratio.min, ratio.max
            )),
        );
    }

    fn case_json(&self, case: &Case, bar: Option<Bar>) -> Value {
        let present = case
            .contenders
            .iter()
            .filter(|contender| !self.absent.contains(contender));
        let servers: Vec<Value> = present
            .map(|&contender| self.contender_json(contender))
            .collect();
        let absent: Vec<String> = self
            .absent
            .iter()
            .map(|contender| contender.label())
            .collect();
        json!({
            "name": case.name,
            "title": case.title(),
            "servers": servers,
            "absent": absent,
            "bar": case.bar.map(|peer| json!({ "peer": peer.label(), "state": bar.map(Bar::word) })),
        })
    }

    fn contender_json(&self, contender: Contender) -> Value {
        let turns: Vec<Value> = self
            .of(contender)
            .map(|turn| {
                let measured = &turn.measured;
                json!({
                    "turn": turn.number + 1,
                    "operations": measured.operations,
                    "seconds": measured.elapsed.as_secs_f64(),
                    "iops": measured.iops(),
                    "p50_us": measured.latency_us(0.5),
                    "p99_us": measured.latency_us(0.99),
                    "max_us": measured.latency_us(1.0),
                    "server_cpu_us": measured.server_cpu_us(),
                    "generator_idle": measured.idle,
                    "others": measured.others,
                })
            })
            .collect();
        let spread =
            |of: &dyn Fn(&Measured) -> f64| self.spread(contender, of).map(Spread::to_json);
        let ratio = if contender.is_nbdsnap() {
            None
        } else {
            self.ratio_to(contender)
        };
        json!({
            "server": contender.label(),
            "iops": spread(&Measured::iops),
            "bytes_per_second": spread(&Measured::bytes_per_second),
            "p50_us": spread(&|m| m.latency_us(0.5)),
            "p99_us": spread(&|m| m.latency_us(0.99)),
            "max_us": spread(&|m| m.latency_us(1.0)),
            "server_cpu_us": self.server_cpu_us(contender),
            "nbdsnap_ratio": ratio.map(Spread::to_json),
            "turns": turns,
        })
    }
}

/// Processors, kernel and load: a busy machine explains strange numbers.
fn machine() -> String {
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    let first = |path: &str, words: usize| {
        let text = fs::read_to_string(path).unwrap_or_default();
        text.split_ascii_whitespace()
            .take(words)
            .collect::<Vec<_>>()
            .join(" ")
    };
    format!(
        "{processors} processors, Linux {}, load average at the start {}",
        first("/proc/sys/kernel/osrelease", 1),
        first("/proc/loadavg", 1)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_has_a_middle() {
        let spread = |numbers: &[f64]| Spread::of(numbers.to_vec());
        assert_eq!(spread(&[]), None);
        assert_eq!(
            spread(&[3.0, 1.0, 2.0]),
            Some(Spread {
                min: 1.0,
                median: 2.0,
                max: 3.0
            })
        );
        assert_eq!(
            spread(&[4.0, 1.0, 2.0, 3.0]).map(|spread| spread.median),
            Some(2.5)
        );
    }
}
