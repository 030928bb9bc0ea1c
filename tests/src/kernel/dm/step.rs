//! One step of a sequence, and what came of it. Both are values and lines of text:
//! steps go into the virtual machine as a file, outcomes come back on its console.
//!
//! Disks are written `@a`, `@b`, ...; who plays the step puts in the path.

use std::fmt;

/// What is done next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// `dmsetup ARGS`, or `nbdsnap dm ARGS`.
    Dm {
        /// The arguments.
        args: Vec<String>,
        /// What is given on standard input.
        input: Option<String>,
    },
    /// Write to a device.
    Write {
        /// Its name.
        device: String,
        /// First byte.
        offset: u64,
        /// How many.
        len: u64,
        /// The seed of the bytes.
        fill: u64,
    },
    /// Zeros over the first bytes of a device: no store is there any more.
    Zero {
        /// Its name.
        device: String,
        /// How many bytes.
        len: u64,
    },
    /// Read all of a device.
    Read {
        /// Its name.
        device: String,
    },
    /// Wait until its merge has come to an end.
    Merged {
        /// The name of the merging device.
        device: String,
    },
}

impl Step {
    /// A dm command without standard input.
    pub fn dm<S: Into<String>>(args: impl IntoIterator<Item = S>) -> Self {
        Self::Dm {
            args: args.into_iter().map(Into::into).collect(),
            input: None,
        }
    }

    /// As one line of text, which [`Step::parse`] understands.
    pub fn to_line(&self) -> String {
        let mut fields = Vec::new();
        match self {
            Self::Dm { args, input } => {
                fields.push(if input.is_some() { "dm<" } else { "dm" }.to_owned());
                fields.extend(input.iter().map(|text| escaped(text)));
                fields.extend(args.iter().map(|arg| escaped(arg)));
            }
            Self::Write {
                device,
                offset,
                len,
                fill,
            } => {
                let numbers = [offset, len, fill].map(ToString::to_string);
                fields.extend(["write".to_owned(), device.clone()]);
                fields.extend(numbers);
            }
            Self::Zero { device, len } => {
                fields.extend(["zero".to_owned(), device.clone(), len.to_string()]);
            }
            Self::Read { device } => fields.extend(["read".to_owned(), device.clone()]),
            Self::Merged { device } => fields.extend(["merged".to_owned(), device.clone()]),
        }
        fields.join("\t")
    }

    /// The step of a line.
    pub fn parse(line: &str) -> Result<Self, String> {
        let fields: Vec<&str> = line.split('\t').collect();
        let number = |text: &str| {
            text.parse::<u64>()
                .map_err(|_| format!("{text}: no number"))
        };
        let args = |rest: &[&str]| rest.iter().map(|arg| unescaped(arg)).collect();
        let device = |name: &str| name.to_owned();
        match fields.as_slice() {
            ["dm", rest @ ..] => Ok(Self::Dm {
                args: args(rest),
                input: None,
            }),
            ["dm<", input, rest @ ..] => Ok(Self::Dm {
                args: args(rest),
                input: Some(unescaped(input)),
            }),
            ["write", name, offset, len, fill] => Ok(Self::Write {
                device: device(name),
                offset: number(offset)?,
                len: number(len)?,
                fill: number(fill)?,
            }),
            ["zero", name, len] => Ok(Self::Zero {
                device: device(name),
                len: number(len)?,
            }),
            ["read", name] => Ok(Self::Read {
                device: device(name),
            }),
            ["merged", name] => Ok(Self::Merged {
                device: device(name),
            }),
            _ => Err(format!("no step: {line}")),
        }
    }
}

/// For people, as they would type it.
impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dm { args, input } => {
                if let Some(text) = input {
                    write!(f, "printf '{}' | ", escaped(text))?;
                }
                write!(f, "dmsetup")?;
                args.iter()
                    .try_for_each(|arg| write!(f, " {}", quoted(arg)))
            }
            Self::Write {
                device,
                offset,
                len,
                fill,
            } => write!(
                f,
                "write {len} bytes at {offset} of {device} (bytes of {fill})"
            ),
            Self::Zero { device, len } => write!(f, "zero the first {len} bytes of {device}"),
            Self::Read { device } => write!(f, "read {device}"),
            Self::Merged { device } => write!(f, "wait for the merge of {device}"),
        }
    }
}

/// What came of a step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The exit status; of I/O 0, or 1 for an error.
    pub code: i32,
    /// Lines on standard output; of I/O what was read, in words.
    pub out: Vec<String>,
    /// Lines on standard error, or the error in words.
    pub err: Vec<String>,
}

impl Outcome {
    /// Its lines, the first with the number of the step. Each ends with a `$`, for
    /// blanks before it to survive.
    pub fn to_lines(&self, number: usize) -> Vec<String> {
        let mut lines = vec![format!("outcome {number} {}", self.code)];
        lines.extend(
            self.out
                .iter()
                .map(|line| format!("out {}$", escaped(line))),
        );
        lines.extend(
            self.err
                .iter()
                .map(|line| format!("err {}$", escaped(line))),
        );
        lines
    }

    /// The outcomes in these lines, in order; other lines are passed over.
    pub fn parse_all<'a>(lines: impl IntoIterator<Item = &'a str>) -> Vec<Self> {
        let mut all: Vec<Self> = Vec::new();
        for line in lines {
            let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
            let rest = rest.strip_suffix('$').unwrap_or(rest);
            match (word, all.last_mut()) {
                ("outcome", _) => {
                    let (number, code) = rest.split_once(' ').expect("a number and a status");
                    assert_eq!(number, all.len().to_string(), "outcomes come in order");
                    all.push(Self {
                        code: code.parse().expect("a status"),
                        ..Self::default()
                    });
                }
                ("out", Some(last)) => last.out.push(unescaped(rest)),
                ("err", Some(last)) => last.err.push(unescaped(rest)),
                _ => {}
            }
        }
        all
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "status {}", self.code)?;
        let lines = |f: &mut fmt::Formatter<'_>, word: &str, lines: &[String]| {
            lines
                .iter()
                .try_for_each(|line| write!(f, "\n      {word}| {line}"))
        };
        lines(f, "out", &self.out)?;
        lines(f, "err", &self.err)
    }
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('\n', "\\n")
        .replace('\t', "\\t")
}

fn unescaped(text: &str) -> String {
    let mut plain = String::new();
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        match (letter, letter == '\\') {
            (_, true) => match letters.next() {
                Some('n') => plain.push('\n'),
                Some('t') => plain.push('\t'),
                other => plain.extend(other),
            },
            (letter, false) => plain.push(letter),
        }
    }
    plain
}

fn quoted(arg: &str) -> String {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "-_./:@,+=".contains(letter);
    if !arg.is_empty() && arg.chars().all(plain) {
        return arg.to_owned();
    }
    format!("'{}'", arg.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_back_as_they_were() {
        let steps = [
            Step::dm(["create", "a b", "--table", "0 8 zero\n8 8 error", ""]),
            Step::Dm {
                args: vec!["load".to_owned(), "\\x20".to_owned()],
                input: Some("# a\tb\n".to_owned()),
            },
            Step::Read {
                device: "s".to_owned(),
            },
        ];
        for step in steps {
            assert_eq!(Step::parse(&step.to_line()), Ok(step));
        }
        let outcome = Outcome {
            code: 1,
            out: vec!["a\tb ".to_owned(), String::new()],
            err: vec!["no \\".to_owned()],
        };
        let lines = outcome.to_lines(0);
        assert_eq!(
            Outcome::parse_all(lines.iter().map(String::as_str)),
            [outcome]
        );
    }
}
