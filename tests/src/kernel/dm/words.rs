//! What the two sides print, in common words: the numbers of devices differ, and
//! nothing else may. dm's own devices keep their minor numbers (both give the lowest
//! free one); disks become `@a`, `@b`, ...

use std::sync::OnceLock;

use regex::{Captures, Regex};

use super::step::{Outcome, Step};

/// The numbers by which one side names devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Numbers {
    /// dm's major number.
    pub dm: u64,
    /// Major and minor of the disks `@a`, `@b`, ...
    pub disks: Vec<(u64, u64)>,
}

/// Steps that ask a side for its numbers; a device of this name must not be there.
pub fn probes(disks: usize) -> Vec<Step> {
    let mut steps = Vec::new();
    for letter in ('a'..).take(disks) {
        let table = format!("0 8 linear @{letter} 0");
        steps.push(Step::dm(["create", "probe", "--table", &table]));
        steps.push(Step::dm([
            "info",
            "-c",
            "--noheadings",
            "-o",
            "major",
            "probe",
        ]));
        steps.push(Step::dm(["deps", "probe"]));
        steps.push(Step::dm(["remove", "probe"]));
    }
    steps
}

impl Numbers {
    /// The numbers in the outcomes of [`probes`].
    pub fn learn(outcomes: &[Outcome]) -> Self {
        let mut dm = 0;
        let mut disks = Vec::new();
        for probe in outcomes.chunks(4) {
            for outcome in probe {
                assert_eq!(outcome.code, 0, "a side cannot be asked: {outcome}");
            }
            dm = probe[1].out[0].trim().parse().expect("a major number");
            let deps = numbers_in(&probe[2].out[0]);
            let [_, major, minor] = deps[..] else {
                panic!("no dependency: {}", probe[2]);
            };
            disks.push((major, minor));
        }
        Self { dm, disks }
    }

    /// An outcome in common words.
    pub fn translate(&self, outcome: &Outcome) -> Outcome {
        Outcome {
            code: outcome.code,
            out: outcome.out.iter().map(|line| self.line(line)).collect(),
            err: outcome.err.clone(),
        }
    }

    fn line(&self, line: &str) -> String {
        static PAIR: OnceLock<Regex> = OnceLock::new();
        static COLUMNS: OnceLock<Regex> = OnceLock::new();
        // 254:3, (254, 3), (254:3) and `Major, minor: 254, 3`.
        let pair = PAIR.get_or_init(|| Regex::new(r"\b(\d+)(:|, )(\d+)\b").expect("a pattern"));
        // The default columns of `info -c`: a name, the major and the minor number.
        let columns = COLUMNS
            .get_or_init(|| Regex::new(r"^(\S+) +(\d+) +(\d+) ([L-][I-])").expect("a pattern"));
        let line = pair.replace_all(line, |found: &Captures<'_>| {
            let number = |at: usize| found[at].parse().ok();
            match number(1).zip(number(3)) {
                Some(numbers) => format!("{}{}", self.word(numbers, &found[2]), ""),
                None => found[0].to_owned(),
            }
        });
        let line = columns.replace(&line, |found: &Captures<'_>| {
            let major = found[2].parse() == Ok(self.dm);
            let major = if major { "dm" } else { &found[2] };
            format!("{} {major} {} {}", &found[1], &found[3], &found[4])
        });
        line.into_owned()
    }

    fn word(&self, (major, minor): (u64, u64), between: &str) -> String {
        if major == self.dm {
            return format!("dm{between}{minor}");
        }
        let disk = self.disks.iter().position(|disk| *disk == (major, minor));
        match disk.and_then(|n| ('a'..='z').nth(n)) {
            Some(letter) => format!("@{letter}"),
            None => format!("{major}{between}{minor}"),
        }
    }
}

fn numbers_in(text: &str) -> Vec<u64> {
    text.split(|letter: char| !letter.is_ascii_digit())
        .filter_map(|word| word.parse().ok())
        .collect()
}

/// The first step that came out differently, in words, with those before it.
pub fn difference(
    steps: &[Step],
    left: &[Outcome],
    right: &[Outcome],
    names: [&str; 2],
) -> Option<String> {
    let at = (0..steps.len()).find(|&n| match (left.get(n), right.get(n)) {
        (Some(left), Some(right)) => left.code != right.code || left.out != right.out,
        _ => true,
    })?;
    let show = |outcome: Option<&Outcome>| {
        outcome.map_or_else(|| "came not so far".to_owned(), ToString::to_string)
    };
    let before: Vec<String> = (0..at)
        .map(|n| {
            let failed = left[n].code != 0;
            format!("{n:4}{} {}", if failed { "x" } else { " " }, steps[n])
        })
        .collect();
    Some(format!(
        "the steps before (x: refused):\n{}\nstep {at} differs:\n     {}\n  {}: {}\n  {}: {}",
        before.join("\n"),
        steps[at],
        names[0],
        show(left.get(at)),
        names[1],
        show(right.get(at)),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_become_words() {
        let numbers = Numbers {
            dm: 254,
            disks: vec![(252, 0), (252, 16)],
        };
        let cases = [
            ("0 8 snapshot 252:0 254:3 P 8", "0 8 snapshot @a dm:3 P 8"),
            (
                "2 dependencies\t: (252, 16) (254, 1)",
                "2 dependencies\t: (@b) (dm, 1)",
            ),
            ("Major, minor:      254, 3", "Major, minor:      dm, 3"),
            (
                "foo              254  10 L--w    0    1      0",
                "foo dm 10 L--w    0    1      0",
            ),
            ("0 8 snapshot 16/131072 16", "0 8 snapshot 16/131072 16"),
        ];
        for (line, words) in cases {
            assert_eq!(numbers.line(line), words);
        }
    }

    #[test]
    fn the_first_difference_is_told() {
        let steps = [Step::dm(["ls"]), Step::dm(["table", "x"])];
        let same = vec![Outcome::default(); 2];
        assert_eq!(difference(&steps, &same, &same, ["a", "b"]), None);
        let mut other = same.clone();
        other[1].out.push("0 8 zero ".to_owned());
        let told = difference(&steps, &same, &other, ["a", "b"]).expect("a difference");
        assert!(
            told.contains("step 1 differs") && told.contains("dmsetup table x"),
            "{told}"
        );
        assert!(difference(&steps, &same, &other[..1], ["a", "b"]).is_some());
    }
}
