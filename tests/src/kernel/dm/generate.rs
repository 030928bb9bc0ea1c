//! Steps from a seed: what people do with snapshots (`procedures.rs`), single
//! commands on any device, looks at what there is, refused command lines (`bad.rs`),
//! and I/O wherever it goes through. While a merge is under way, only I/O.

use std::collections::BTreeSet;

use super::bad;
use super::layout::Layout;
use super::model::{Command, Device, Model, Store};
use super::procedures;
use super::step::Step;
use super::table::{Line, On, Table, Target};
use crate::harness::random::Random;

const SECTOR: u64 = 512;

/// Stacks of a sequence.
pub const STACKS: usize = 2;

/// The longest write.
const LONGEST: u64 = 64 << 10;

/// A sequence, and what the model says of it.
#[derive(Debug)]
pub struct Sequence {
    /// The steps.
    pub steps: Vec<Step>,
    /// Whether each succeeds, where that is known beforehand.
    pub expected: Vec<Option<bool>>,
}

/// Steps in the making.
#[derive(Debug)]
pub struct Generator {
    /// All choices.
    pub random: Random,
    /// What there is after the steps so far.
    pub model: Model,
    /// What lies where.
    pub layout: Layout,
    sequence: Sequence,
    /// Store devices whose bytes the order of things decided that went on side by side:
    /// what the stores show is compared, and they are not.
    pub(super) uneven: BTreeSet<String>,
    /// A write to an origin is copied by one chunk to stores that may be full.
    pub(super) is_careful: bool,
}

/// At least so many steps of a seed.
pub fn sequence(seed: u64, steps: usize) -> Sequence {
    let mut random = Random::new(seed);
    let layout = Layout::new(STACKS, &mut random);
    let is_careful = random.one_in(2);
    let mut generator = Generator {
        random,
        model: Model::default(),
        layout,
        sequence: Sequence {
            steps: Vec::new(),
            expected: Vec::new(),
        },
        uneven: BTreeSet::new(),
        is_careful,
    };
    while generator.sequence.steps.len() < steps {
        generator.round();
    }
    procedures::mend(&mut generator);
    generator.read_everything();
    generator.look_at_everything();
    generator.sequence
}

impl Generator {
    /// Something to do, and looks and I/O around it.
    fn round(&mut self) {
        procedures::while_it_merges(self);
        let stack = self.random.below(STACKS as u64) as usize;
        match self.random.below(24) {
            0..=2 => procedures::build(self, stack),
            3..=6 => procedures::take(self, stack),
            7 => procedures::drop_one(self, stack),
            8..=9 => procedures::hand_over(self, stack),
            10 => procedures::reload(self, stack),
            11..=13 => procedures::merge(self, stack),
            14 => procedures::nest(self, stack),
            15 => procedures::exchange_base(self, stack),
            16..=18 => self.scratch(),
            19..=20 => self.single(),
            21..=22 => procedures::mend(self),
            _ => self.read_everything(),
        }
        for _ in 0..self.random.below(3) {
            self.look();
        }
        if self.random.one_in(2) {
            let exists = self.any_device();
            let step = bad::command(exists.as_deref(), &mut self.random);
            self.push(step, Some(false));
        }
        for _ in 0..self.random.below(5) {
            self.write();
        }
    }

    /// A command, unless it could wait for ever or the model cannot tell its end.
    /// Whether it succeeds.
    pub fn command(&mut self, command: &Command) -> bool {
        if !self.model.is_safe(command) || self.disturbs_a_merge() {
            return false;
        }
        let step = self.words(command);
        let expected = self.model.apply(command);
        self.push(step, Some(expected));
        expected
    }

    /// While something merges, nothing: how far it has come is a matter of chance.
    fn disturbs_a_merge(&self) -> bool {
        self.merging().is_some()
    }

    /// The merge of a device stands still, and goes on at once: nobody sees how far
    /// it has come.
    pub fn stop_for_a_moment(&mut self, name: &str) {
        for command in [
            Command::Suspend(name.to_owned()),
            Command::Resume(name.to_owned()),
        ] {
            let step = self.words(&command);
            let expected = self.model.apply(&command);
            assert!(expected, "a merging device can be suspended and resumed");
            self.push(step, Some(true));
        }
    }

    /// The device that merges, if one does.
    pub fn merging(&self) -> Option<String> {
        let mut all = self.model.devices.iter();
        all.find(|(_, device)| device.is_merging() && !device.suspended)
            .map(|(name, _)| name.clone())
    }

    /// The merge of a device has been waited for.
    pub fn wait_for_merge(&mut self, name: &str) {
        self.model.merged(name);
        self.push(
            Step::Merged {
                device: name.to_owned(),
            },
            Some(true),
        );
    }

    /// A step as it is.
    pub fn push(&mut self, step: Step, expected: Option<bool>) {
        self.sequence.steps.push(step);
        self.sequence.expected.push(expected);
    }

    /// A command as somebody types it, in one of the ways that there are.
    fn words(&mut self, command: &Command) -> Step {
        match command {
            Command::Create { name, uuid, table } => {
                let mut args = vec!["create".to_owned(), name.clone()];
                if let Some(uuid) = uuid {
                    let word = if self.random.one_in(2) {
                        "-u"
                    } else {
                        "--uuid"
                    };
                    args.extend([word.to_owned(), uuid.clone()]);
                }
                match table {
                    None if self.random.one_in(2) => {
                        args.push("--notable".to_owned());
                        Step::Dm { args, input: None }
                    }
                    None => {
                        args.push("-n".to_owned());
                        Step::Dm { args, input: None }
                    }
                    Some(table) => self.with_table(args, table),
                }
            }
            Command::Load(name, table) => {
                let verb = if self.random.one_in(3) {
                    "reload"
                } else {
                    "load"
                };
                let name = self.spelled(name);
                self.with_table(vec![verb.to_owned(), name], table)
            }
            Command::Suspend(name) => {
                let mut args = vec!["suspend".to_owned()];
                match self.random.below(6) {
                    0 => args.push("--noflush".to_owned()),
                    1 => args.push("--nolockfs".to_owned()),
                    _ => {}
                }
                args.push(self.spelled(name));
                Step::dm(args)
            }
            Command::Resume(name) => Step::dm(["resume".to_owned(), self.spelled(name)]),
            Command::Clear(name) => Step::dm(["clear".to_owned(), self.spelled(name)]),
            Command::Remove(name) => Step::dm(["remove".to_owned(), self.spelled(name)]),
            Command::Rename(name, new) => {
                Step::dm(["rename".to_owned(), self.spelled(name), new.clone()])
            }
        }
    }

    /// A table is given as an argument or on standard input.
    fn with_table(&mut self, mut args: Vec<String>, table: &Table) -> Step {
        let text = self.model.text(table);
        if self.random.one_in(2) {
            args.extend(["--table".to_owned(), text]);
            return Step::Dm { args, input: None };
        }
        let head = if self.random.one_in(3) {
            "# a table\n\n"
        } else {
            ""
        };
        Step::Dm {
            args,
            input: Some(format!("{head}{text}\n")),
        }
    }

    /// A device by its name or by its node.
    fn spelled(&mut self, name: &str) -> String {
        let has_node = self.model.device(name).is_some_and(Device::has_node);
        if has_node && self.random.one_in(4) {
            return format!("/dev/mapper/{name}");
        }
        name.to_owned()
    }

    /// Some device.
    pub fn any_device(&mut self) -> Option<String> {
        let names: Vec<&String> = self.model.devices.keys().collect();
        if names.is_empty() {
            return None;
        }
        Some(names[self.random.below(names.len() as u64) as usize].clone())
    }

    /// One command on any device.
    fn single(&mut self) {
        let Some(name) = self.any_device() else {
            return;
        };
        let command = match self.random.below(8) {
            0 | 1 => Command::Suspend(name),
            2 | 3 => Command::Resume(name),
            4 => Command::Clear(name),
            5 => Command::Remove(name),
            6 => match self.any_device() {
                Some(other) => Command::Rename(name, other),
                None => return,
            },
            _ => Command::Create {
                name,
                uuid: None,
                table: None,
            },
        };
        self.command(&command);
    }

    /// Devices that nothing else needs: made, loaded, held, renamed, removed.
    fn scratch(&mut self) {
        for _ in 0..self.random.between(1, 4) {
            let name = format!("x{}", self.random.below(4));
            let command = match self.random.below(10) {
                0..=3 => Command::Create {
                    name,
                    uuid: self
                        .random
                        .one_in(4)
                        .then(|| format!("U-{}", self.random.below(3))),
                    table: (!self.random.one_in(5)).then(|| self.scratch_table()),
                },
                4 | 5 => Command::Load(name, self.scratch_table()),
                6 => Command::Resume(name),
                7 => Command::Suspend(name),
                8 => Command::Rename(name, format!("x{}", self.random.below(5))),
                _ => Command::Remove(name),
            };
            self.command(&command);
        }
    }

    fn scratch_table(&mut self) -> Table {
        let count = self.random.between(1, 3);
        (0..count).map(|_| self.scratch_line()).collect()
    }

    fn scratch_line(&mut self) -> Line {
        let len = 8 * self.random.between(1, 40);
        let on = self.layout.scratch;
        let room = self.layout.scratch_len() - len;
        let start = self.layout.scratch_start + 8 * self.random.below(room / 8);
        let target = match self.random.below(5) {
            0 => Target::Zero,
            1 => Target::Error,
            2 => {
                let pieces = (0..2).map(|n| (on, start + n * len)).collect();
                let target = Target::Striped {
                    chunk: 8,
                    on: pieces,
                };
                let len = len * 2;
                if start + len <= self.layout.scratch_start + room {
                    return Line { len, target };
                }
                Target::Zero
            }
            _ => Target::Linear { on, start },
        };
        Line { len, target }
    }

    /// A look at one device or at all.
    fn look(&mut self) {
        if self.merging().is_some() {
            return;
        }
        let name = self.any_device().unwrap_or_else(|| "none".to_owned());
        let words: &[&str] = match self.random.below(20) {
            0 => &["table"],
            1 => &["status"],
            2 => &["info", "-c"],
            3 => &["ls"],
            4 => &["info"],
            5 => &["deps"],
            6 => &["ls", "--tree"],
            7 => &[
                "info",
                "-c",
                "--noheadings",
                "-o",
                "name,attr,open,segments,events",
            ],
            8 => &[
                "info",
                "-c",
                "--separator",
                ":",
                "-o",
                "name,uuid,tables_loaded,suspended,readonly",
            ],
            9 => &["status", "--target", "snapshot"],
            10 => &["table", "--inactive"],
            11 => &["ls", "--target", "linear"],
            12 => &["deps", "-o", "devname", &name],
            13 | 14 => &["table", &name],
            15 | 16 => &["status", &name],
            17 => &["info", &name],
            18 => &["status", "--inactive", &name],
            _ => &["table", "--inactive", &name],
        };
        self.push(Step::dm(words.iter().copied()), None);
    }

    fn look_at_everything(&mut self) {
        for words in [&["table"][..], &["status"], &["info", "-c"], &["deps"]] {
            self.push(Step::dm(words.iter().copied()), None);
        }
    }

    /// A write to some device, where it goes through.
    pub fn write(&mut self) {
        let all = self.model.devices.keys();
        let able: Vec<String> = all
            .filter(|name| self.model.is_writable(name) && !self.is_a_matter_of_order(name))
            .cloned()
            .collect();
        if able.is_empty() {
            return;
        }
        let device = able[self.random.below(able.len() as u64) as usize].clone();
        self.note_order();
        let size = self.model.devices[&device].size() * SECTOR;
        let (offset, len) = self.place(&device, size);
        let fill = self.random.bits();
        let step = Step::Write {
            device,
            offset,
            len,
            fill,
        };
        self.push(step, None);
    }

    fn place(&mut self, device: &str, size: u64) -> (u64, u64) {
        let chunk = match self.model.devices[device].only_line() {
            Some(Target::Snapshot(line)) => line.chunk.max(1) * SECTOR,
            _ => 8 * SECTOR,
        };
        let offset = self.random.below(size / SECTOR) * SECTOR;
        let (offset, len) = match self.random.below(4) {
            0 | 1 => (offset / chunk * chunk, chunk),
            2 => (offset, self.random.between(1, 8) * SECTOR),
            _ => (offset, self.random.between(1, LONGEST / SECTOR) * SECTOR),
        };
        let mut len = len.min(LONGEST).min(size - offset);
        if let Some(uncut) = self.model.uncut(device) {
            let uncut = uncut * SECTOR;
            len = len.min(uncut - offset % uncut);
        }
        // Half a write that finds no space is a matter of order.
        if let Some(chunk) = self.small_store(device) {
            let chunk = chunk * SECTOR;
            return (offset, len.min(chunk - offset % chunk));
        }
        (offset, self.copied(device, offset, len))
    }

    /// Zeros over a store that nobody uses.
    pub fn zero(&mut self, name: &str) {
        let Some(device) = self.model.device(name) else {
            return;
        };
        let on = On::Device(device.number);
        if self.model.is_in_use(device.number) || self.model.is_blocked(on) {
            return;
        }
        self.model.zeroed(on);
        let step = Step::Zero {
            device: name.to_owned(),
            len: 32 * SECTOR,
        };
        self.push(step, Some(true));
    }

    /// What lies on a store device.
    pub fn store(&self, name: &str) -> Store {
        let device = self.model.device(name);
        device.map_or(Store::Unknown, |device| {
            self.model.store(On::Device(device.number))
        })
    }

    /// Everything that can be read, but for stores whose bytes are a matter of order.
    pub fn read_everything(&mut self) {
        if self.merging().is_some() {
            return;
        }
        let names: Vec<String> = self.model.devices.keys().cloned().collect();
        for name in names {
            let device = &self.model.devices[&name];
            let even = !self.uneven.contains(&name);
            if device.size() > 0 && even && self.model.is_readable(&name) {
                self.push(Step::Read { device: name }, None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_a_sequence_with_everything_in_it() {
        let one = sequence(7, 6000);
        assert_eq!(one.steps, sequence(7, 6000).steps);
        assert_ne!(one.steps[..100], sequence(8, 6000).steps[..100]);
        let count = |wanted: &str| {
            let lines = one.steps.iter().map(Step::to_line);
            lines.filter(|line| line.contains(wanted)).count()
        };
        let words = [
            "snapshot /dev",
            "snapshot-merge /dev",
            "snapshot-origin /dev",
            "striped",
            "error",
            "write",
            "zero\t",
            "read",
            "merged",
            "rename",
            "remove",
            "suspend",
            "clear",
        ];
        for word in words {
            assert!(count(word) > 3, "{word}: {}", count(word));
        }
        let refused = one.expected.iter().filter(|e| **e == Some(false)).count();
        assert!((200..3000).contains(&refused), "{refused} refusals");
        assert!(
            one.steps
                .iter()
                .all(|step| Step::parse(&step.to_line()).as_ref() == Ok(step))
        );
    }
}
