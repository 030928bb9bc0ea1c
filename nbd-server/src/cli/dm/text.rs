//! Tables as they are written: lines of START LENGTH TARGET ARGUMENTS, read as
//! dmsetup reads them, comments and oddities included.

use crate::control::dm::TextLine;
use crate::dm::params;

/// A target's name has fewer bytes.
const TARGET_MAX: usize = 16;

/// Read a table; `source` is where it comes from, as dmsetup says it. Paths that begin
/// in the working folder are given to `absolute`: the server's may be another.
pub(super) fn parse(
    table: &str,
    source: &str,
    absolute: &dyn Fn(&str) -> String,
) -> Result<Vec<TextLine>, String> {
    let mut lines = Vec::new();
    for (index, line) in table.split('\n').enumerate() {
        let line = line.trim_matches(is_space);
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let Some((start, len, target, params)) = fields(line) else {
            let number = index + 1;
            return Err(format!(
                "Invalid format on line {number} of table {source}."
            ));
        };
        if target.len() >= TARGET_MAX {
            return Err(format!("Target type name {target} is too long."));
        }
        lines.push(TextLine {
            start,
            len,
            target: target.to_owned(),
            params: rooted(without_comment(params), absolute),
        });
    }
    Ok(lines)
}

/// What C's isspace takes for a blank.
fn is_space(letter: char) -> bool {
    matches!(letter, '\t'..='\r' | ' ')
}

/// As C's `sscanf(line, "%llu %llu %s %n")` has it, and what is behind.
fn fields(line: &str) -> Option<(u64, u64, &str, &str)> {
    let (start, line) = number(line)?;
    let (len, line) = number(line)?;
    let line = line.trim_start_matches(is_space);
    let end = line.find(is_space).unwrap_or(line.len());
    let (target, params) = line.split_at(end);
    let params = params.trim_start_matches(is_space);
    (!target.is_empty()).then_some((start, len, target, params))
}

/// `%llu`: blanks, a sign, digits; too large is the largest, and a minus counts.
fn number(line: &str) -> Option<(u64, &str)> {
    let line = line.trim_start_matches(is_space);
    let unsigned = line.strip_prefix(['+', '-']).unwrap_or(line);
    let end = unsigned.find(|letter: char| !letter.is_ascii_digit());
    let (digits, rest) = unsigned.split_at(end.unwrap_or(unsigned.len()));
    if digits.is_empty() {
        return None;
    }
    let number = match digits.parse::<u64>() {
        Ok(number) if line.starts_with('-') => number.wrapping_neg(),
        Ok(number) => number,
        Err(_) => u64::MAX,
    };
    Some((number, rest))
}

/// dmsetup cuts a line at any '#'; here one behind a backslash is a part of a path.
fn without_comment(params: &str) -> &str {
    let mut letters = params.char_indices();
    while let Some((at, letter)) = letters.next() {
        match letter {
            '#' => return &params[..at],
            '\\' => _ = letters.next(),
            _ => {}
        }
    }
    params
}

/// With paths that begin in the working folder from the root on.
fn rooted(params: &str, absolute: &dyn Fn(&str) -> String) -> String {
    let args = params::split(params);
    let is_relative = |arg: &String| arg.contains('/') && !arg.starts_with('/');
    if !args.iter().any(is_relative) {
        return params.to_owned();
    }
    let args = args.iter().map(|arg| {
        let path = is_relative(arg).then(|| absolute(arg));
        params::quote(path.as_deref().unwrap_or(arg))
    });
    args.collect::<Vec<_>>().join(" ")
}
