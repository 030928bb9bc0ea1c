//! What the two sides print, in common words: the numbers of devices differ, and
//! nothing else may. dm's own devices keep their minor numbers (both give the lowest
//! free one); disks become `@a`, `@b`, ...

use std::sync::OnceLock;

use regex::{Captures, Regex};

use super::step::{Outcome, Step};

/// What one side calls devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Numbers {
    /// dm's major number.
    pub dm: u64,
    /// What tables say for the disks `@a`, `@b`, ...: `MAJOR:MINOR`, or a file's path.
    pub disks: Vec<String>,
    /// What `deps -o devname` says for them, between its brackets.
    pub names: Vec<String>,
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
        steps.push(Step::dm(["table", "probe"]));
        steps.push(Step::dm(["deps", "-o", "devname", "probe"]));
        steps.push(Step::dm(["remove", "probe"]));
    }
    steps
}

impl Numbers {
    /// The numbers in the outcomes of [`probes`].
    pub fn learn(outcomes: &[Outcome]) -> Self {
        let mut dm = 0;
        let (mut disks, mut names) = (Vec::new(), Vec::new());
        for probe in outcomes.chunks(5) {
            for outcome in probe {
                assert_eq!(outcome.code, 0, "a side cannot be asked: {outcome}");
            }
            dm = probe[1].out[0].trim().parse().expect("a major number");
            let disk = probe[2].out[0].split_whitespace().nth(3);
            disks.push(disk.expect("the disk of a linear line").to_owned());
            let deps = &probe[3].out[0];
            let name = deps
                .split_once('(')
                .and_then(|(_, rest)| rest.strip_suffix(')'));
            names.push(name.expect("a name in brackets").to_owned());
        }
        Self { dm, disks, names }
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
        // The default columns of `info -c`, as wide as the major number wants it.
        let columns = COLUMNS.get_or_init(|| {
            Regex::new(r"^(\S+) +(\d+|Maj) +(\d+|Min) (Stat|[L-][I-])").expect("a pattern")
        });
        let names = ('a'..).zip(&self.names);
        let line = names.fold(line.to_owned(), |line, (letter, name)| {
            line.replace(&format!("({name})"), &format!("(@{letter})"))
        });
        let paths = ('a'..).zip(&self.disks);
        let paths = paths.filter(|(_, disk)| disk.starts_with('/'));
        let line = paths.fold(line, |line, (letter, path)| {
            line.replace(path, &format!("@{letter}"))
        });
        let line = pair.replace_all(&line, |found: &Captures<'_>| self.word(found));
        let line = columns.replace(&line, |found: &Captures<'_>| {
            let major = found[2].parse() == Ok(self.dm);
            let major = if major { "dm" } else { &found[2] };
            format!("{} {major} {} {}", &found[1], &found[3], &found[4])
        });
        line.into_owned()
    }

    fn word(&self, found: &Captures<'_>) -> String {
        if found[1].parse() == Ok(self.dm) {
            return format!("dm{}{}", &found[2], &found[3]);
        }
        let number = format!("{}:{}", &found[1], &found[3]);
        match ('a'..).zip(&self.disks).find(|(_, disk)| **disk == number) {
            Some((letter, _)) => format!("@{letter}"),
            None => found[0].to_owned(),
        }
    }
}

/// The first step that came out differently, in words, with those before it.
pub fn difference(
    steps: &[Step],
    left: &[Outcome],
    right: &[Outcome],
    names: [&str; 2],
) -> Option<String> {
    let differs = |&n: &usize| match (left.get(n), right.get(n)) {
        (Some(left), Some(right)) => left.code != right.code || left.out != right.out,
        _ => true,
    };
    let at = (0..steps.len()).find(differs)?;
    let later = (at + 1..steps.len()).filter(differs);
    let later = later.map(|n| {
        format!(
            "  {n}: {}{}",
            steps[n],
            first_line(left.get(n), right.get(n))
        )
    });
    let later: Vec<String> = later.collect();
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
        "the steps before (x: refused):\n{}\nstep {at} differs:\n     {}\n  {}: {}\n  {}: {}\nlater ones:\n{}",
        before.join("\n"),
        steps[at],
        names[0],
        show(left.get(at)),
        names[1],
        show(right.get(at)),
        later.join("\n"),
    ))
}

/// The first line that two outcomes do not share.
fn first_line(left: Option<&Outcome>, right: Option<&Outcome>) -> String {
    let (Some(left), Some(right)) = (left, right) else {
        return String::new();
    };
    let line = |outcome: &Outcome, n: usize| outcome.out.get(n).cloned();
    let mut lines = 0..left.out.len().max(right.out.len());
    let Some(n) = lines.find(|&n| line(left, n) != line(right, n)) else {
        return format!(": status {} and {}", left.code, right.code);
    };
    let word = |line: Option<String>| line.unwrap_or_else(|| "nothing".to_owned());
    format!(
        "\n      {}\n      {}",
        word(line(left, n)),
        word(line(right, n))
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_become_words() {
        let numbers = Numbers {
            dm: 254,
            disks: vec!["252:0".to_owned(), "/tmp/b".to_owned()],
            names: vec!["vda".to_owned(), "b".to_owned()],
        };
        let cases = [
            ("0 8 snapshot 252:0 254:3 P 8", "0 8 snapshot @a dm:3 P 8"),
            (
                "2 dependencies\t: (/tmp/b) (254, 1)",
                "2 dependencies\t: (@b) (dm, 1)",
            ),
            (
                "3 dependencies\t: (vda) (b) (c1)",
                "3 dependencies\t: (@a) (@b) (c1)",
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
