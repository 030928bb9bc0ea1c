//! What the verbs that give orders share: where the server is, and how answers
//! are printed.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Args, ValueHint};
use serde::Serialize;

use super::{Failure, size};
use crate::control;
use crate::control::client::ControlClient;
use crate::control::protocol::{Answer, Growth, Order, SnapshotName, StoreLimit, WhenFull};
use crate::names;

/// Which server an order goes to.
#[derive(Clone, Debug, Args)]
pub(super) struct ServerAt {
    /// The server's control socket; by default where 'serve --control' puts it:
    /// nbdsnap.control in XDG_RUNTIME_DIR, or in /run for root.
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath, global = true, display_order = 800)]
    control: Option<PathBuf>,
}

impl ServerAt {
    /// A connection to the server.
    pub(super) fn connect(&self) -> Result<ControlClient, Failure> {
        let path = match &self.control {
            Some(path) => path.clone(),
            None => control::default_path().ok_or_else(|| {
                Failure::Usage(
                    "XDG_RUNTIME_DIR is not set: name the server's socket with --control PATH"
                        .into(),
                )
            })?,
        };
        ControlClient::connect(&path).map_err(Failure::refused)
    }
}

/// Options of every verb that gives an order.
#[derive(Clone, Debug, Args)]
pub(super) struct ToServer {
    #[command(flatten)]
    at: ServerAt,

    /// Print JSON instead of a table.
    #[arg(long, global = true, display_order = 801)]
    pub(super) json: bool,
}

impl ToServer {
    /// A connection to the server.
    pub(super) fn connect(&self) -> Result<ControlClient, Failure> {
        self.at.connect()
    }

    /// Give one order.
    pub(super) fn order(&self, order: Order) -> Result<Answer, Failure> {
        self.connect()?.order(order).map_err(Failure::refused)
    }
}

/// The server has answered something that does not belong to the order.
pub(super) fn beside_the_point() -> Failure {
    Failure::Refused("the server's answer does not fit the order: is it of another version?".into())
}

/// Print a value as JSON, one document.
pub(super) fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(Failure::refused)?;
    print(&format!("{text}\n"))
}

/// Print, and fail where nobody can read it.
pub(super) fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| Failure::Refused(format!("standard output: {error}")))
}

/// A table for people: columns as wide as they have to be, two spaces between.
pub(super) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = head.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (cell, width) in cells.zip(&widths) {
            let pad = width - cell.chars().count();
            text.push_str(cell);
            text.extend(std::iter::repeat_n(' ', pad + 2));
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
        text
    };
    let mut text = line(&mut head.iter().copied());
    for row in rows {
        text.push_str(&line(&mut row.iter().map(String::as_str)));
    }
    text
}

/// A size for people, rounded; `-` where there is none.
pub(super) fn rough_size(bytes: Option<u64>) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let Some(bytes) = bytes else {
        return "-".into();
    };
    let mut size = bytes as f64;
    let mut unit = 0;
    while size >= 1024.0 && unit + 1 < UNITS.len() {
        size /= 1024.0;
        unit += 1;
    }
    if unit == 0 || size.fract() == 0.0 {
        format!("{size:.0} {}", UNITS[unit])
    } else {
        format!("{size:.1} {}", UNITS[unit])
    }
}

/// A span of time for people, rounded; `-` where there is none.
pub(super) fn rough_span(seconds: Option<u64>) -> String {
    match seconds {
        None => "-".into(),
        Some(s) if s < 120 => format!("{s} s"),
        Some(s) if s < 2 * 3600 => format!("{} min", s / 60),
        Some(s) if s < 2 * 86_400 => format!("{} h", s / 3600),
        Some(s) => format!("{} d", s / 86_400),
    }
}

/// The server's working folder may be another.
pub(super) fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    if path.to_str().is_none() {
        return Err(Failure::Usage(format!(
            "{}: orders carry paths in UTF-8 only",
            crate::disks::shown(path)
        )));
    }
    std::path::absolute(path).map_err(Failure::usage)
}

/// `--on-full`.
pub(super) fn parse_on_full(text: &str) -> Result<WhenFull, String> {
    match text {
        "invalidate" => Ok(WhenFull::Invalidate),
        "pause" => Ok(WhenFull::Pause),
        "error" => Ok(WhenFull::Error),
        _ => Err("there are invalidate, pause and error".into()),
    }
}

/// `--auto-extend`.
pub(super) fn parse_growth(text: &str) -> Result<Growth, String> {
    let percent = |text: &str| text.strip_suffix('%')?.parse::<u32>().ok();
    let parts = text
        .split_once('+')
        .and_then(|(threshold, step)| Some((percent(threshold)?, percent(step)?)));
    match parts {
        Some((threshold_percent @ 1..=99, step_percent @ 1..=1000)) => Ok(Growth {
            threshold_percent,
            step_percent,
        }),
        _ => Err("write it 80%+20%: from 1 to 99 % on, by 1 to 1000 %".into()),
    }
}

/// `--size` of a store.
pub(super) fn parse_limit(text: &str) -> Result<StoreLimit, String> {
    let Some((percent, of)) = text.split_once('%') else {
        return size::parse(text)
            .map(StoreLimit::Bytes)
            .map_err(|error| error.to_string());
    };
    if !of.is_empty() && of != "ORIGIN" {
        return Err(format!("'{text}': a share is written 20%ORIGIN"));
    }
    match percent.parse() {
        Ok(percent @ 1..=1000) => Ok(StoreLimit::PercentOfOrigin(percent)),
        _ => Err(format!("'{text}': a share is 1 to 1000 % of the origin")),
    }
}

/// `VOLUME@NAME[@NEXT]...` on the command line.
pub(super) fn parse_snapshot(text: &str) -> Result<SnapshotName, String> {
    let (volume, snapshot) = text
        .split_once('@')
        .ok_or("a snapshot is written VOLUME@NAME, one of a snapshot VOLUME@NAME@NEXT")?;
    check(volume)?;
    if let Some((name, why)) = names::path_fault(snapshot) {
        return Err(format!("the name '{}' {why}", name.escape_debug()));
    }
    Ok(SnapshotName {
        volume: volume.to_owned(),
        snapshot: snapshot.to_owned(),
    })
}

/// A name on the command line.
pub(super) fn parse_name(text: &str) -> Result<String, String> {
    check(text)?;
    Ok(text.to_owned())
}

fn check(name: &str) -> Result<(), String> {
    match names::fault(name) {
        None => Ok(()),
        Some(why) => Err(format!("the name '{}' {why}", name.escape_debug())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_aligned_and_end_without_blanks() {
        let rows = [
            vec!["a".into(), "bcd".into()],
            vec!["längst".into(), "x".into()],
        ];
        assert_eq!(
            table(&["ONE", "TWO"], &rows),
            "ONE     TWO\na       bcd\nlängst  x\n"
        );
    }

    #[test]
    fn sizes_and_spans_are_rounded() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (5 << 30, "5 GiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(rough_size(Some(bytes)), text);
        }
        assert_eq!(rough_size(None), "-");
        assert_eq!(rough_span(Some(119)), "119 s");
        assert_eq!(rough_span(Some(7199)), "119 min");
        assert_eq!(rough_span(Some(400_000)), "4 d");
    }

    #[test]
    fn names_are_judged_before_they_are_sent() {
        let name = parse_snapshot("disk@monday").unwrap();
        assert_eq!(name.to_string(), "disk@monday");
        let next = parse_snapshot("disk@monday@try").unwrap();
        assert_eq!(next.snapshot, "monday@try");
        for text in [
            "disk", "@", "disk@", "@a", "a/b@c", "a@b@", "a@@c", "a@b\nc", "a@b/c",
        ] {
            assert!(parse_snapshot(text).is_err(), "{text:?}");
        }
    }
}
