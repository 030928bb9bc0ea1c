//! Power cuts under mapped devices: snapshots of slices, stripes, whole disks and of
//! each other, on disks that lose what was not flushed. After each cut the same tables
//! are loaded anew; every snapshot shows its instant and what was written to it, and
//! nothing that was flushed is missing.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use nbdsnap_format::ChunkSize;

use super::super::*;
use super::rig::{SECTOR, line, linear, pair, write};
use crate::disk::sim::{Loss, Rng, SimDisk};
use crate::disk::{DiskError, Outcome};
use crate::request::{Command, Failure, RequestId};
use crate::store::{Access, Store, StoreIo, StoreKind, StoreSize, StoreSpec};

/// What a sector of a view may hold: by its last byte that a flush promised, and all
/// that was written to it since.
#[derive(Clone, Debug)]
struct View {
    sectors: Vec<BTreeSet<u8>>,
    newest: Vec<u8>,
}

impl View {
    fn of(content: &[u8]) -> Self {
        Self {
            sectors: content.iter().map(|&byte| BTreeSet::from([byte])).collect(),
            newest: content.to_vec(),
        }
    }

    fn write(&mut self, sector: u64, len: u64, byte: u8) {
        for at in sector as usize..(sector + len) as usize {
            self.sectors[at].insert(byte);
            self.newest[at] = byte;
        }
    }

    /// Everything that was answered when a flush began is there.
    fn flushed(&mut self) {
        for (may, newest) in self.sectors.iter_mut().zip(&self.newest) {
            *may = BTreeSet::from([*newest]);
        }
    }
}

/// The tables of a run, by name, in the order in which they are loaded.
type Plan = Vec<(String, Vec<Line>)>;

struct Rig {
    mapper: Mapper,
    disks: BTreeMap<DiskId, SimDisk>,
    rng: Rng,
    next: u64,
    answered: BTreeMap<RequestId, Result<Vec<u8>, Failure>>,
    done: BTreeMap<OrderId, Result<(), Refused>>,
}

struct Cow<'a>(&'a mut Rig, Lower);

impl StoreIo for Cow<'_> {
    fn act(&mut self, action: Action) -> Outcome {
        let command = match action {
            Action::Read { offset, len } => Command::Read { offset, len },
            Action::Write { offset, data } => Command::Write {
                offset,
                data: Bytes::from(data.concat()),
                fua: false,
            },
            Action::WriteZeroes { offset, len, .. } => Command::WriteZeroes {
                offset,
                len,
                fua: false,
                no_hole: true,
                fast_only: false,
            },
            Action::Flush => Command::Flush,
            other => unreachable!("{other:?} of a store"),
        };
        let asked = self.0.ask(self.1, command);
        asked.map(Bytes::from).map_err(|_| DiskError::Io(5))
    }

    fn keep_copy(&mut self, _: u64, _: &[u8]) -> Result<(), DiskError> {
        Ok(())
    }
}

impl Rig {
    fn boot(disks: BTreeMap<DiskId, SimDisk>, rng: Rng) -> Self {
        let mut mapper = Mapper::new(VolumeConfig {
            origin_bytes: SECTOR,
            copy_memory: 1 << 20,
            copy_piece: 2048,
        });
        for (&id, disk) in &disks {
            assert_eq!(mapper.add_disk(disk.len(), 1), id);
        }
        Self {
            mapper,
            disks,
            rng,
            next: 0,
            answered: BTreeMap::new(),
            done: BTreeMap::new(),
        }
    }

    fn hand_in(&mut self, lower: Lower, command: Command) -> RequestId {
        let id = RequestId(self.next);
        self.next += 1;
        self.mapper.handle_request(id, lower, command);
        id
    }

    /// Hand out what there is, and let something that is under way go on or end.
    fn step(&mut self) -> bool {
        while let Some(op) = self.mapper.poll_disk_op() {
            let disk = self.disks.get_mut(&op.disk).expect("it is there");
            disk.issue(op.id.0, op.action, &mut self.rng);
        }
        while let Some(reply) = self.mapper.poll_reply() {
            let result = reply.result.map(|pieces| pieces.concat());
            self.answered.insert(reply.id, result);
        }
        while let Some(event) = self.mapper.poll_event() {
            if let MapperEvent::Done(order, result) = event {
                self.done.insert(order, result);
            }
        }
        let busy: Vec<_> = self
            .disks
            .iter()
            .filter(|(_, disk)| disk.in_flight() > 0)
            .map(|(&id, _)| id)
            .collect();
        if busy.is_empty() {
            return false;
        }
        let id = busy[self.rng.below(busy.len() as u64) as usize];
        let disk = self.disks.get_mut(&id).expect("it is there");
        let index = self.rng.below(disk.in_flight() as u64) as usize;
        if self.rng.below(4) == 0 {
            disk.progress(index, &mut self.rng);
        } else {
            let (tag, outcome) = disk.end(index, &mut self.rng);
            self.mapper.handle_completion(OpId(tag), outcome);
        }
        true
    }

    fn ask(&mut self, lower: Lower, command: Command) -> Result<Vec<u8>, Failure> {
        let id = self.hand_in(lower, command);
        loop {
            let went_on = self.step();
            if let Some(result) = self.answered.remove(&id) {
                return result;
            }
            assert!(went_on, "it is answered");
        }
    }

    fn read(&mut self, lower: Lower) -> Vec<u8> {
        let len = self.mapper.bytes_of(lower);
        let read = self.ask(lower, Command::Read { offset: 0, len }).unwrap();
        read.chunks(SECTOR as usize)
            .map(|sector| sector[0])
            .collect()
    }

    fn lower(&self, name: &str) -> Lower {
        Lower::Device(self.mapper.find(name).expect("it is there"))
    }

    /// A device, with its store opened or made as the kernel does.
    fn bring_up(&mut self, name: &str, lines: &[Line]) {
        let id = self.mapper.create(name, "", None).unwrap();
        let needs = self.mapper.examine(id, lines).unwrap();
        let mut new = Vec::new();
        for (line, need) in lines.iter().zip(needs) {
            let store = match need {
                Some(Need::Store {
                    cow,
                    chunk,
                    cow_bytes,
                    origin_bytes,
                }) => Some(self.store(cow, chunk, cow_bytes, origin_bytes)),
                _ => None,
            };
            let line = line.clone();
            new.push(NewLine { line, store });
        }
        self.mapper.load(id, false, new).unwrap();
        let order = self.mapper.resume(id, false).unwrap();
        loop {
            let went_on = self.step();
            if let Some(result) = self.done.remove(&order) {
                return result.unwrap();
            }
            assert!(went_on, "the order ends");
        }
    }

    fn store(&mut self, cow: Lower, chunk: u64, bytes: u64, origin_bytes: u64) -> Store {
        let size = StoreSize {
            ready: bytes,
            limit: bytes,
            step: 0,
        };
        let kind = StoreKind::Persistent;
        let chunk_size = ChunkSize::from_sectors(chunk).unwrap();
        let mut io = Cow(self, cow);
        match Store::open(kind, size, origin_bytes, Access::ReadWrite, &mut io) {
            Err(crate::OpenError::New) => {
                let spec = StoreSpec {
                    kind,
                    chunk_size,
                    size,
                };
                Store::create(spec, &mut io).unwrap()
            }
            opened => opened.unwrap(),
        }
    }
}

/// The devices that a run begins with: what the origin is made of, and slices for
/// stores, all on the same three disks.
fn plan(rng: &mut Rng) -> Plan {
    let disk = |n| Lower::Disk(DiskId(n));
    let real = match rng.below(3) {
        0 => vec![line(0, 48, linear(disk(0), 8))],
        1 => vec![
            line(0, 20, linear(disk(1), 3)),
            line(20, 28, linear(disk(0), 30)),
        ],
        _ => vec![line(
            0,
            48,
            Target::Striped {
                chunk: 4,
                stripes: vec![(disk(0), 5), (disk(1), 0)],
            },
        )],
    };
    let mut plan = vec![("real".to_owned(), real)];
    for n in 0..4 {
        // Beside the origin, or on a disk of their own, or dealt out over both.
        let cow = vec![match rng.below(3) {
            0 => line(0, 200, linear(disk(2), 200 * n)),
            1 => line(0, 200, linear(disk(n as u32 % 2), 64 + 200 * n)),
            _ => line(
                0,
                200,
                Target::Striped {
                    chunk: 4,
                    stripes: vec![(disk(0), 64 + 200 * n), (disk(2), 200 * n)],
                },
            ),
        }];
        plan.push((format!("cow{n}"), cow));
    }
    plan
}

/// One run: snapshots come, everything is written, the power goes; three times over.
/// How many snapshots had something to show that their origin did not.
fn run(seed: u64) -> u64 {
    let mut rng = Rng::new(seed);
    let mut plan = plan(&mut rng);
    let mut disks = BTreeMap::new();
    for n in 0..3 {
        // The origin's part, and room for stores behind it.
        let origin = if n < 2 { 64 * SECTOR } else { 0 };
        let mut content = vec![n as u8 + 1; origin as usize];
        content.resize((origin + 800 * SECTOR) as usize, 0);
        disks.insert(DiskId(n), SimDisk::new(content));
    }
    let mut rig = Rig::boot(disks, rng);
    for (name, lines) in plan.clone() {
        rig.bring_up(&name, &lines);
    }
    let real = rig.read(rig.lower("real"));
    let mut views = BTreeMap::from([("real".to_owned(), View::of(&real))]);
    let mut differ = 0;
    for _ in 0..3 {
        traffic(&mut rig, &mut plan, &mut views);
        let loss = Loss::pick(&mut rig.rng);
        let Rig {
            mut disks, mut rng, ..
        } = rig;
        for disk in disks.values_mut() {
            disk.power_cut(loss, &mut rng);
        }
        rig = Rig::boot(disks, rng);
        for (name, lines) in plan.clone() {
            rig.bring_up(&name, &lines);
        }
        for (name, view) in &mut views {
            let content = rig.read(rig.lower(name));
            for (at, (may, is)) in view.sectors.iter().zip(&content).enumerate() {
                assert!(
                    may.contains(is),
                    "seed {seed}: {name}, sector {at}: {is}, which may be {may:?} ({loss:?})"
                );
            }
            differ += u64::from(name != "real" && content != real);
            // What was read is what there is; the store's own flush has made it durable.
            *view = View::of(&content);
        }
    }
    differ
}

fn traffic(rig: &mut Rig, plan: &mut Plan, views: &mut BTreeMap<String, View>) {
    let rounds = 20 + rig.rng.below(60);
    let mut under_way: BTreeMap<RequestId, (String, u64, u64, u8)> = BTreeMap::new();
    for round in 0..rounds {
        let snapshots = views.len() - 1;
        if snapshots < 4 && rig.rng.below(12) == 0 {
            // All is answered at the instant, and not all is flushed.
            while rig.step() {}
            under_way.clear();
            let names: Vec<_> = views.keys().cloned().collect();
            let of = names[rig.rng.below(names.len() as u64) as usize].clone();
            let chunk = [1, 2, 4][rig.rng.below(3) as usize];
            let pair = pair(rig.lower(&of), rig.lower(&format!("cow{snapshots}")), chunk);
            let lines = vec![line(0, 48, Target::Snapshot(pair))];
            let name = format!("snap{snapshots}");
            rig.bring_up(&name, &lines);
            plan.push((name.clone(), lines));
            // The instant is durable, with all that had been answered.
            let view = views.get_mut(&of).expect("it is there");
            view.flushed();
            let taken = view.clone();
            views.insert(name, taken);
        }
        let names: Vec<_> = views.keys().cloned().collect();
        let name = names[rig.rng.below(names.len() as u64) as usize].clone();
        let lower = rig.lower(&name);
        if rig.rng.below(6) == 0 {
            // A flush answers for what was answered before it; the model asks for no
            // more by letting all of that end first.
            while rig.step() {}
            under_way.clear();
            if rig.rng.below(3) > 0 {
                rig.ask(lower, Command::Flush).unwrap();
                views.get_mut(&name).expect("it is there").flushed();
            }
            continue;
        }
        let sector = rig.rng.below(46);
        let len = 1 + rig.rng.below(2);
        let overlaps =
            |(other, at, _, _): &(String, u64, u64, u8)| *other == name && at.abs_diff(sector) < 4;
        if under_way.values().any(overlaps) {
            continue;
        }
        let byte = 10 + (round * 3 + rig.next) as u8 % 240;
        views
            .get_mut(&name)
            .expect("it is there")
            .write(sector, len, byte);
        let id = rig.hand_in(lower, write(sector, len, byte));
        under_way.insert(id, (name, sector, len, byte));
        for _ in 0..rig.rng.below(12) {
            rig.step();
        }
    }
    // The power goes with some of it under way.
    for _ in 0..rig.rng.below(20) {
        rig.step();
    }
}

#[test]
fn power_cuts_lose_nothing_that_was_flushed_and_no_instant() {
    let runs: u64 = std::env::var("NBDSNAP_RUNS").map_or(400, |runs| runs.parse().unwrap());
    let differ: u64 = (1..=runs).map(run).sum();
    println!("{runs} runs, 3 cuts each: {differ} snapshots showed something of their own");
    assert!(differ > runs);
}
