//! Command lines that dmsetup refuses, whatever devices there are. Each says which
//! device it needs, if any, and leaves everything as it was.

use super::step::Step;
use crate::harness::random::Random;

/// Tables that no device can be given. `@a` is a disk of 65536 sectors.
const TABLES: [&str; 40] = [
    "0 8 zero\n16 8 zero",
    "0 8 zero\n4 8 zero",
    "0 8 zero\n0 8 zero",
    "8 8 zero",
    "8 8 zero\n0 8 zero",
    "0 0 zero",
    "0 8 zero\n8 0 zero",
    "0 8 zero extra",
    "0 8 nosuch",
    "0 8 nosuch a b c",
    "0 8 Linear @a 0",
    "0 8",
    "0",
    "x y z",
    "0 x zero",
    "0 8 zero\nrubbish",
    "0 -8 zero",
    "0 36028797018963968 zero",
    "0 8 verylongtargetnamethatislong",
    "0 8 linear",
    "0 8 linear @a",
    "0 8 linear @a 0 0",
    "0 8 linear /nosuch 0",
    "0 8 linear @a x",
    "0 8 linear @a -1",
    "0 8 striped",
    "0 8 striped 2 8 @a 0",
    "0 16 striped 2 8 @a 0 @b 0 @c 0",
    "0 16 striped 3 8 @a 0 @b 0 @c 0",
    "0 16 striped 0 8",
    "0 16 striped 2 0 @a 0 @b 0",
    "0 16 striped 2 3 @a 0 @b 0",
    "0 24 striped 2 8 @a 0 @b 0",
    "0 16 striped 2 8 @a 0 /nosuch 0",
    "0 8 snapshot-origin",
    "0 8 snapshot-origin @a 0",
    "0 8 snapshot-origin /nosuch",
    "0 8 snapshot @a",
    "0 8 snapshot-merge @a @b P",
    "",
];

/// Tables that reach beyond a disk. A device's first table is refused for that; a later
/// one is not, before it is to be used.
const TOO_LARGE: [&str; 4] = [
    "0 8 linear @a 65536",
    "0 9 linear @a 65528",
    "0 32 striped 2 8 @a 65528 @b 65528",
    "0 65537 snapshot-origin @a",
];

/// What stands where `@a @b P 8` would: both disks are without a store.
const SNAPSHOTS: [&str; 23] = [
    "@a @a P 8",
    "/nosuch @b P 8",
    "@a /nosuch P 8",
    "@a @b X 8",
    "@a @b PX 8",
    "@a @b Persistent 8",
    "@a @b N 0",
    "@a @b P 3",
    "@a @b P 24",
    "@a @b P x",
    "@a @b P -1",
    "@a @b P 8x",
    "@a @b P 2147483648",
    "@a @b P 8 1",
    "@a @b P 8 x",
    "@a @b P 8 1 nosuch",
    "@a @b P 8 2 discard_zeroes_cow",
    "@a @b P 8 1 discard_passdown_origin",
    "@a @b P 8 3 discard_zeroes_cow discard_passdown_origin x",
    "@a @b P 8",
    "@a @b PO 0",
    "@a @b N x",
    "@a @b P",
];

/// Command lines that are wrong in themselves, or name a device that is not there.
const LINES: [&[&str]; 34] = [
    &["create"],
    &["create", "a", "b", "c"],
    &["create", "a/b", "--table", "0 8 zero"],
    &["create", "/dev/mapper/a", "--table", "0 8 zero"],
    &["create", "new", "/nosuch"],
    &["load"],
    &["load", "nosuch", "--table", "0 8 zero"],
    &["reload"],
    &["clear", "nosuch"],
    &["suspend"],
    &["suspend", "nosuch"],
    &["resume"],
    &["resume", "nosuch"],
    &["remove"],
    &["remove", "nosuch"],
    &["remove", "--force", "nosuch"],
    &["remove", "/dev/mapper/nosuch"],
    &["remove_all", "extra"],
    &["rename"],
    &["rename", "nosuch"],
    &["rename", "nosuch", "new"],
    &["rename", "nosuch", "a/b"],
    &["rename", "nosuch", ""],
    &["table", "nosuch"],
    &["status", "nosuch"],
    &["info", "nosuch"],
    &["info", "-c", "nosuch"],
    &["info", "-c", "-o", "nosuchfield"],
    &["deps", "nosuch"],
    &["ls", "extra"],
    &["wait"],
    &["wait", "nosuch"],
    &["nosuch"],
    &["table", "--nosuch"],
];

/// All of them; `device` is loaded with the tables.
pub fn every(device: &str) -> Vec<Step> {
    let targets = ["snapshot", "snapshot-merge"].into_iter();
    let snapshots = targets.flat_map(|target| {
        let arguments = SNAPSHOTS.iter();
        arguments.map(move |arguments| format!("0 512 {target} {arguments}"))
    });
    let tables = TABLES.iter().map(|&table| table.to_owned());
    let tables: Vec<String> = tables.chain(snapshots).collect();
    let given = |verb: &str, name: &str, table: &str| Step::dm([verb, name, "--table", table]);
    let loads = tables.iter().map(|table| given("load", device, table));
    let made = tables.iter().filter(|table| !table.is_empty());
    let large = TOO_LARGE.iter().map(|&table| given("create", "new", table));
    let lines = LINES.iter().map(|line| Step::dm(line.iter().copied()));
    loads
        .chain(made.map(|table| Step::Dm {
            args: ["create", "new"].map(str::to_owned).to_vec(),
            input: Some(format!("{table}\n")),
        }))
        .chain(large)
        .chain(lines)
        .collect()
}

/// One that is refused. `device`, if there is one, is a device that is loaded with a
/// table that is refused.
pub fn command(device: Option<&str>, random: &mut Random) -> Step {
    let from = |random: &mut Random, many: &[&str]| {
        many[random.below(many.len() as u64) as usize].to_owned()
    };
    let table = match random.below(5) {
        0 | 1 => from(random, &TABLES),
        2 | 3 => {
            let target = if random.one_in(3) {
                "snapshot-merge"
            } else {
                "snapshot"
            };
            format!("0 512 {target} {}", from(random, &SNAPSHOTS))
        }
        _ => {
            let line = LINES[random.below(LINES.len() as u64) as usize];
            return Step::dm(line.iter().copied());
        }
    };
    let (device, table) = if random.one_in(12) {
        (None, from(random, &TOO_LARGE))
    } else {
        (device.filter(|_| !random.one_in(3)), table)
    };
    // Nothing on standard input is a device without a table.
    let (verb, name) = match device {
        Some(name) => ("load", name),
        None if table.is_empty() => ("load", "nosuch"),
        None => ("create", "new"),
    };
    if random.one_in(2) {
        return Step::dm([verb, name, "--table", &table]);
    }
    Step::Dm {
        args: vec![verb.to_owned(), name.to_owned()],
        input: Some(table + "\n"),
    }
}
