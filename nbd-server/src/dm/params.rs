//! The arguments of a target: text to [`Target`] and back.
//!
//! [`parse`] checks in the kernel's order, so that of several things that are wrong
//! the one is named that the kernel would name; it promises that [`print`] of what it
//! returns is read as the same again. What needs the devices themselves is not looked
//! at here: whether they are large enough, whether a chunk is a multiple of their
//! blocks, what a COW store holds, and handover.

use std::borrow::Cow;

use libc::EINVAL;
use nbdsnap_engine::dm::{Lower, Pair, Persistence, Target};

/// Sectors of the largest chunk: more bytes do not fit into the kernel's `int`.
const LARGEST_CHUNK: u32 = i32::MAX as u32 >> 9;

/// What is wrong with a target's arguments.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct TargetError {
    /// The kernel's error number, positive.
    pub errno: i32,
    /// The kernel's words.
    pub why: Cow<'static, str>,
}

impl TargetError {
    fn new(why: &'static str) -> Self {
        Self::with(EINVAL, why)
    }

    fn with(errno: i32, why: &'static str) -> Self {
        let why = why.into();
        Self { errno, why }
    }
}

/// Finds the device that an argument names: a path, `/dev/mapper/NAME` or
/// `MAJOR:MINOR`; else the error number of the kernel's `dm_get_device`, positive
/// (ENODEV, mostly).
pub type Resolve<'a> = dyn FnMut(&str) -> Result<Lower, i32> + 'a;

/// Whether there is a target of this name.
pub fn is_known(target: &str) -> bool {
    VERSIONS.iter().any(|(name, _)| *name == target)
}

/// The targets there are, with their versions in Linux 6.1, in the order in which
/// the kernel lists them.
pub const VERSIONS: [(&str, [u32; 3]); 7] = [
    ("snapshot-merge", [1, 5, 0]),
    ("snapshot-origin", [1, 9, 0]),
    ("snapshot", [1, 16, 0]),
    ("zero", [1, 1, 0]),
    ("striped", [1, 6, 0]),
    ("linear", [1, 4, 0]),
    ("error", [1, 5, 0]),
];

/// Read the arguments of `target`, on a line of `len` sectors.
pub fn parse(
    target: &str,
    len: u64,
    params: &str,
    resolve: &mut Resolve<'_>,
) -> Result<Target, TargetError> {
    let args = split(params);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match target {
        "linear" => linear(&args, resolve),
        "striped" => striped(len, &args, resolve),
        "zero" if args.is_empty() => Ok(Target::Zero),
        "zero" => Err(TargetError::new("No arguments required")),
        // Whatever it is given.
        "error" => Ok(Target::Error),
        "snapshot-origin" => snapshot_origin(&args, resolve),
        "snapshot" => Ok(Target::Snapshot(pair(&args, resolve)?)),
        "snapshot-merge" => snapshot_merge(&args, resolve),
        _ => Err(TargetError::new("unknown target type")),
    }
}

/// The arguments of a target as `table` shows them; `name` says what a device is
/// called.
pub fn print(target: &Target, name: &dyn Fn(Lower) -> String) -> String {
    let name = |lower: &Lower| quote(&name(*lower));
    match target {
        Target::Linear { lower, start } => format!("{} {start}", name(lower)),
        Target::Striped { chunk, stripes } => {
            let stripe = |(lower, start): &(Lower, u64)| format!("{} {start}", name(lower));
            let stripes: Vec<String> = stripes.iter().map(stripe).collect();
            format!("{} {chunk} {}", stripes.len(), stripes.join(" "))
        }
        Target::Zero | Target::Error => String::new(),
        Target::SnapshotOrigin { origin } => name(origin),
        Target::Snapshot(pair) | Target::SnapshotMerge(pair) => {
            let persistence = pair.persistence.word();
            let (origin, cow) = (name(&pair.origin), name(&pair.cow));
            let args = format!("{origin} {cow} {persistence} {}", pair.chunk);
            let features: Vec<&str> = [
                (pair.discard_zeroes_cow, ZEROES_COW),
                (pair.discard_passdown_origin, PASSDOWN_ORIGIN),
            ]
            .into_iter()
            .filter_map(|(wanted, name)| wanted.then_some(name))
            .collect();
            match features.len() {
                0 => args,
                count => format!("{args} {count} {}", features.join(" ")),
            }
        }
    }
}

const ZEROES_COW: &str = "discard_zeroes_cow";
const PASSDOWN_ORIGIN: &str = "discard_passdown_origin";

fn linear(args: &[&str], resolve: &mut Resolve<'_>) -> Result<Target, TargetError> {
    let [device, start] = args else {
        return Err(TargetError::new("Invalid argument count"));
    };
    let start = digits(start).ok_or(TargetError::new("Invalid device sector"))?;
    let lower =
        resolve(device).map_err(|errno| TargetError::with(errno, "Device lookup failed"))?;
    Ok(Target::Linear { lower, start })
}

fn striped(len: u64, args: &[&str], resolve: &mut Resolve<'_>) -> Result<Target, TargetError> {
    let [count, chunk, rest @ ..] = args else {
        return Err(TargetError::new("Not enough arguments"));
    };
    let count = number(count).filter(|count| *count != 0);
    let count = u64::from(count.ok_or(TargetError::new("Invalid stripe count"))?);
    let chunk = number(chunk).filter(|chunk| *chunk != 0);
    let chunk = u64::from(chunk.ok_or(TargetError::new("Invalid chunk_size"))?);
    if !len.is_multiple_of(count) {
        let why = "Target length not divisible by number of stripes";
        return Err(TargetError::new(why));
    }
    if !(len / count).is_multiple_of(chunk) {
        let why = "Target length not divisible by chunk size";
        return Err(TargetError::new(why));
    }
    if rest.len() as u64 != 2 * count {
        return Err(TargetError::new("Not enough destinations specified"));
    }
    let why = "Couldn't parse stripe destination";
    let mut stripes = Vec::with_capacity(rest.len() / 2);
    for destination in rest.chunks_exact(2) {
        let start = digits(destination[1]).ok_or(TargetError::new(why))?;
        let lower = resolve(destination[0]).map_err(|errno| TargetError::with(errno, why))?;
        stripes.push((lower, start));
    }
    Ok(Target::Striped { chunk, stripes })
}

fn snapshot_origin(args: &[&str], resolve: &mut Resolve<'_>) -> Result<Target, TargetError> {
    let [origin] = args else {
        return Err(TargetError::new("origin: incorrect number of arguments"));
    };
    let origin =
        resolve(origin).map_err(|errno| TargetError::with(errno, "Cannot get target device"))?;
    Ok(Target::SnapshotOrigin { origin })
}

fn snapshot_merge(args: &[&str], resolve: &mut Resolve<'_>) -> Result<Target, TargetError> {
    let pair = pair(args, resolve)?;
    if pair.persistence == Persistence::Transient {
        let why = "Snapshot exception store does not support snapshot-merge.";
        return Err(TargetError::new(why));
    }
    Ok(Target::SnapshotMerge(pair))
}

fn pair(args: &[&str], resolve: &mut Resolve<'_>) -> Result<Pair, TargetError> {
    let [origin, cow, persistence, chunk, rest @ ..] = args else {
        return Err(TargetError::new("requires 4 or more arguments"));
    };
    let (discard_zeroes_cow, discard_passdown_origin) = features(rest)?;
    let origin =
        resolve(origin).map_err(|errno| TargetError::with(errno, "Cannot get origin device"))?;
    let cow = resolve(cow).map_err(|errno| TargetError::with(errno, "Cannot get COW device"))?;
    if cow == origin {
        let why = "COW device cannot be the same as origin device";
        return Err(TargetError::new(why));
    }
    let (persistence, chunk) = store(persistence, chunk).map_err(|why| TargetError {
        errno: EINVAL,
        // The kernel stops at the colon: what comes behind it is lost there.
        why: format!("Couldn't create exception store: {why}").into(),
    })?;
    Ok(Pair {
        origin,
        cow,
        persistence,
        chunk,
        discard_zeroes_cow,
        discard_passdown_origin,
    })
}

/// What follows the four arguments of a snapshot. The kernel reads as many as the
/// first one says, and leaves the others alone.
fn features(args: &[&str]) -> Result<(bool, bool), TargetError> {
    let Some((count, args)) = args.split_first() else {
        return Ok((false, false));
    };
    let count = digits(count).and_then(|count| usize::try_from(count).ok());
    let given = count
        .filter(|count| *count <= 2)
        .and_then(|count| args.get(..count));
    let given = given.ok_or(TargetError::new("Invalid number of feature arguments"))?;
    let (mut zeroes_cow, mut passdown) = (false, false);
    for feature in given {
        if feature.eq_ignore_ascii_case(ZEROES_COW) {
            zeroes_cow = true;
        } else if feature.eq_ignore_ascii_case(PASSDOWN_ORIGIN) {
            passdown = true;
        } else {
            return Err(TargetError::new("Unrecognised feature requested"));
        }
    }
    if passdown && !zeroes_cow {
        let why = "discard_passdown_origin feature depends on discard_zeroes_cow";
        return Err(TargetError::new(why));
    }
    Ok((zeroes_cow, passdown))
}

/// The arguments of the exception store.
fn store(persistence: &str, chunk: &str) -> Result<(Persistence, u64), String> {
    let mut letters = persistence
        .chars()
        .map(|letter| letter.to_ascii_uppercase());
    let first = letters.next();
    if !matches!(first, Some('P' | 'N')) {
        return Err("Exception store type is not P or N".into());
    }
    let chunk = number(chunk).ok_or("Invalid chunk size")?;
    if chunk != 0 && !chunk.is_power_of_two() {
        return Err("Chunk size is not a power of 2".into());
    }
    if chunk > LARGEST_CHUNK {
        return Err("Chunk size is too high".into());
    }
    let persistence = match (first, letters.next()) {
        (Some('N'), _) => Persistence::Transient,
        (_, None) => Persistence::Persistent,
        (_, Some('O')) => Persistence::PersistentOverflow,
        (_, Some(_)) => {
            let options = &persistence[1..];
            return Err(format!("Unsupported persistent store option: {options}"));
        }
    };
    Ok((persistence, u64::from(chunk)))
}

/// A number as the kernel's `sscanf` takes it: digits, and nothing else.
fn digits(text: &str) -> Option<u64> {
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| text.parse().ok()).flatten()
}

/// A number as the kernel's `kstrtouint` takes it.
fn number(text: &str) -> Option<u32> {
    let text = text.strip_prefix('+').unwrap_or(text);
    digits(text).and_then(|number| u32::try_from(number).ok())
}

/// What separates arguments, to the kernel.
fn is_blank(letter: char) -> bool {
    matches!(letter, '\t'..='\r' | ' ')
}

/// The arguments of a line. A backslash has the letter behind it taken as it is.
pub(crate) fn split(params: &str) -> Vec<String> {
    let mut args = Vec::new();
    let mut arg: Option<String> = None;
    let mut letters = params.chars();
    while let Some(letter) = letters.next() {
        if is_blank(letter) {
            args.extend(arg.take());
            continue;
        }
        let letter = match letter {
            '\\' => letters.next().unwrap_or('\\'),
            other => other,
        };
        arg.get_or_insert_default().push(letter);
    }
    args.extend(arg);
    args
}

/// Have [`split`] see one argument, and dmsetup's tables no comment.
pub(crate) fn quote(name: &str) -> String {
    let mut text = String::with_capacity(name.len());
    for letter in name.chars() {
        if is_blank(letter) || matches!(letter, '\\' | '#') {
            text.push('\\');
        }
        text.push(letter);
    }
    text
}

#[cfg(test)]
mod tests;
