//! What people do in several commands: take a snapshot, hand a store over, merge,
//! snapshot a snapshot. Now and then a command is left out or comes too early, as it
//! happens to people.

use super::generate::Generator;
use super::layout::CHUNKS;
use super::model::{Command, Store};
use super::table::{Kind, Line, On, Snapshot, Table, Target};

/// The words for each kind of store.
const WORDS: [(Kind, &str); 8] = [
    (Kind::Persistent, "P"),
    (Kind::Persistent, "P"),
    (Kind::Persistent, "p"),
    (Kind::Overflow, "PO"),
    (Kind::Overflow, "po"),
    (Kind::Overflow, "Po"),
    (Kind::Transient, "N"),
    (Kind::Transient, "n"),
];

/// Play commands in order, or nearly so.
fn carry_out(generator: &mut Generator, mut commands: Vec<Command>) {
    let len = commands.len() as u64;
    if len > 1 {
        match generator.random.below(10) {
            0 => {
                let left_out = generator.random.below(len) as usize;
                commands.remove(left_out);
            }
            1 => {
                let early = generator.random.between(1, len - 1) as usize;
                commands.swap(early - 1, early);
            }
            _ => {}
        }
    }
    for command in commands {
        generator.command(&command);
        if generator.random.one_in(4) {
            generator.write();
        }
    }
}

fn base_name(stack: usize) -> String {
    format!("b{stack}")
}

fn origin_name(stack: usize) -> String {
    format!("o{stack}")
}

/// The number of a device, if it is there and a table can name it.
fn on(generator: &Generator, name: &str) -> Option<On> {
    let device = generator.model.device(name)?;
    device.has_node().then_some(On::Device(device.number))
}

fn create(name: &str, table: Table) -> Command {
    Command::Create {
        name: name.to_owned(),
        uuid: None,
        table: Some(table),
    }
}

fn one_line(len: u64, target: Target) -> Table {
    vec![Line { len, target }]
}

/// What is not there yet of a base, its stores and its origin.
pub fn build(generator: &mut Generator, stack: usize) {
    let base = base_name(stack);
    if generator.model.device(&base).is_none() {
        let table = generator.layout.stacks[stack].base[0].clone();
        generator.command(&create(&base, table));
    }
    let cows = generator.layout.stacks[stack].cows.clone();
    for cow in cows {
        if generator.model.device(&cow.name).is_none() {
            generator.command(&create(&cow.name, cow.table));
        }
    }
    let Some(on) = on(generator, &base) else {
        return;
    };
    let len = generator.model.devices[&base].size();
    generator.command(&create(
        &origin_name(stack),
        one_line(len, Target::Origin { on }),
    ));
}

/// A line for a new snapshot in some store, which is prepared for it.
fn new_line(generator: &mut Generator, stack: usize, origin: On) -> Option<Snapshot> {
    let cows = &generator.layout.stacks[stack].cows;
    let at = generator.random.below(cows.len() as u64) as usize;
    let name = cows[at].name.clone();
    let (kind, word) = WORDS[generator.random.below(WORDS.len() as u64) as usize];
    let chunk = CHUNKS[generator.random.below(CHUNKS.len() as u64) as usize];
    let cow = on(generator, &name)?;
    let fresh = match generator.store(&name) {
        Store::Rubbish => !generator.random.one_in(4),
        Store::Store => generator.random.one_in(3),
        Store::Zeros => false,
        Store::Unknown => true,
    };
    if fresh {
        generator.zero(&name);
    }
    Some(Snapshot {
        origin,
        cow,
        kind,
        word,
        chunk,
        merge: false,
    })
}

fn new_name(generator: &mut Generator, stack: usize) -> String {
    let names: Vec<String> = (0..5).map(|n| format!("s{stack}{n}")).collect();
    let free = names
        .iter()
        .find(|name| generator.model.device(name).is_none());
    match free {
        Some(free) if !generator.random.one_in(8) => free.clone(),
        _ => names[generator.random.below(5) as usize].clone(),
    }
}

/// A device made at once, or in three steps.
fn made(generator: &mut Generator, name: &str, table: Table) -> Vec<Command> {
    if generator.random.one_in(2) {
        return vec![create(name, table)];
    }
    vec![
        Command::Create {
            name: name.to_owned(),
            uuid: None,
            table: None,
        },
        Command::Load(name.to_owned(), table),
        Command::Resume(name.to_owned()),
    ]
}

/// A snapshot of a base, with its origin held or not.
pub fn take(generator: &mut Generator, stack: usize) {
    build(generator, stack);
    let Some(origin) = on(generator, &base_name(stack)) else {
        return;
    };
    let len = generator.model.devices[&base_name(stack)].size();
    let Some(line) = new_line(generator, stack, origin) else {
        return;
    };
    let name = new_name(generator, stack);
    let len = if generator.random.one_in(6) {
        len / 2
    } else {
        len
    };
    let mut commands = made(generator, &name, one_line(len, Target::Snapshot(line)));
    if generator.random.one_in(2) {
        commands.insert(0, Command::Suspend(origin_name(stack)));
        commands.push(Command::Resume(origin_name(stack)));
    }
    carry_out(generator, commands);
}

/// The snapshots of a stack, with their lines.
fn snapshots(generator: &Generator, stack: usize) -> Vec<(String, Snapshot, u64)> {
    let all = generator.model.devices.iter();
    let of_stack = all.filter(|(name, _)| name.starts_with(&format!("s{stack}")));
    of_stack
        .filter_map(|(name, device)| match device.only_line() {
            Some(Target::Snapshot(line)) => Some((name.clone(), line.clone(), device.size())),
            _ => None,
        })
        .collect()
}

fn any_snapshot(generator: &mut Generator, stack: usize) -> Option<(String, Snapshot, u64)> {
    let all = snapshots(generator, stack);
    let count = all.len() as u64;
    (count > 0).then(|| all[generator.random.below(count) as usize].clone())
}

/// The end of a snapshot.
pub fn drop_one(generator: &mut Generator, stack: usize) {
    if let Some((name, ..)) = any_snapshot(generator, stack) {
        let mut commands = vec![Command::Remove(name.clone())];
        if generator.random.one_in(3) {
            commands.insert(0, Command::Suspend(name));
        }
        carry_out(generator, commands);
    }
}

/// A store handed from one snapshot device to another.
pub fn hand_over(generator: &mut Generator, stack: usize) {
    let Some((name, line, len)) = any_snapshot(generator, stack) else {
        return;
    };
    let to = new_name(generator, stack);
    let load = Command::Load(to.clone(), one_line(len, Target::Snapshot(line)));
    let mut commands = vec![
        Command::Create {
            name: to.clone(),
            uuid: None,
            table: None,
        },
        load,
        Command::Suspend(name.clone()),
        Command::Resume(to),
    ];
    if generator.random.one_in(3) {
        commands.swap(1, 2);
    }
    if generator.random.one_in(4) {
        commands.push(Command::Resume(name.clone()));
    }
    if !generator.random.one_in(4) {
        commands.push(Command::Remove(name));
    }
    carry_out(generator, commands);
}

/// A snapshot's own table, loaded again.
pub fn reload(generator: &mut Generator, stack: usize) {
    let Some((name, line, len)) = any_snapshot(generator, stack) else {
        return;
    };
    let load = Command::Load(name.clone(), one_line(len, Target::Snapshot(line)));
    let mut commands = vec![load, Command::Resume(name.clone())];
    if generator.random.one_in(2) {
        commands.insert(generator.random.below(2) as usize, Command::Suspend(name));
    }
    carry_out(generator, commands);
}

/// An origin rolled back to one of its snapshots, as LVM does it, with requests and a
/// stop meanwhile; then it is an origin again.
pub fn merge(generator: &mut Generator, stack: usize) {
    let (base, origin) = (base_name(stack), origin_name(stack));
    let Some(beneath) = on(generator, &base) else {
        return;
    };
    let able = |(_, line, _): &(String, Snapshot, u64)| {
        line.origin == beneath && line.kind != Kind::Overflow && !line.merge
    };
    let all: Vec<_> = snapshots(generator, stack)
        .into_iter()
        .filter(able)
        .collect();
    if all.is_empty() || generator.model.device(&origin).is_none() {
        return;
    }
    let (name, line, len) = all[generator.random.below(all.len() as u64) as usize].clone();
    let merge = Snapshot {
        merge: true,
        ..line
    };
    let mut commands = vec![
        Command::Suspend(origin.clone()),
        Command::Suspend(name.clone()),
        Command::Load(origin.clone(), one_line(len, Target::Snapshot(merge))),
        Command::Resume(origin.clone()),
    ];
    if generator.random.one_in(4) {
        commands[1] = Command::Remove(name.clone());
    }
    carry_out(generator, commands);
    while_it_merges(generator);
    let len = generator.model.devices[&base].size();
    let back = one_line(len, Target::Origin { on: beneath });
    let commands = vec![
        Command::Suspend(origin.clone()),
        Command::Remove(name),
        Command::Load(origin.clone(), back),
        Command::Resume(origin),
    ];
    carry_out(generator, commands);
}

/// Requests, and now and then a stop, until it is waited for.
pub fn while_it_merges(generator: &mut Generator) {
    let Some(name) = generator.merging() else {
        return;
    };
    generator.note_order();
    for _ in 0..generator.random.below(6) {
        generator.write();
        if generator.random.one_in(4) {
            generator.stop_for_a_moment(&name);
        }
    }
    generator.wait_for_merge(&name);
}

/// A snapshot of a snapshot, with an origin over it.
pub fn nest(generator: &mut Generator, stack: usize) {
    let Some((name, inner, len)) = any_snapshot(generator, stack) else {
        return;
    };
    let Some(origin) = on(generator, &name) else {
        return;
    };
    let Some(line) = new_line(generator, stack, origin) else {
        return;
    };
    if line.cow == inner.cow {
        return;
    }
    let nested = new_name(generator, stack);
    let mut commands = made(generator, &nested, one_line(len, Target::Snapshot(line)));
    let above = format!("n{stack}{}", generator.random.below(2));
    commands.push(create(&above, one_line(len, Target::Origin { on: origin })));
    carry_out(generator, commands);
}

/// A base that is the same in other words.
pub fn exchange_base(generator: &mut Generator, stack: usize) {
    let tables = &generator.layout.stacks[stack].base;
    let table = tables[generator.random.below(tables.len() as u64) as usize].clone();
    let name = base_name(stack);
    if generator.model.device(&name).is_none() {
        return;
    }
    let commands = vec![Command::Load(name.clone(), table), Command::Resume(name)];
    carry_out(generator, commands);
}

/// Whatever is suspended goes on; what has been given away goes.
pub fn mend(generator: &mut Generator) {
    while_it_merges(generator);
    for _ in 0..2 {
        let all = generator.model.devices.iter();
        let held = all.filter(|(_, device)| device.suspended || device.has_inactive());
        let names: Vec<String> = held.map(|(name, _)| name.clone()).collect();
        for name in names {
            if !generator.command(&Command::Resume(name.clone())) {
                generator.command(&Command::Clear(name));
            }
            while_it_merges(generator);
        }
    }
    let held = |generator: &Generator| {
        let mut all = generator.model.devices.iter();
        all.find(|(_, device)| device.suspended)
            .map(|(name, _)| name.clone())
    };
    if let Some(name) = held(generator) {
        generator.command(&Command::Remove(name));
    }
}
