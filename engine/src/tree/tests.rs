//! Trees on devices in memory: what a search with crashes does not ask for. Depth,
//! turns, refusals, lost snapshots, and the cost of a read through many levels.

use std::collections::BTreeMap;

use bytes::Bytes;
use nbdsnap_format::{ChunkSize, CowChunk, OriginChunk};

use super::*;
use crate::disk::{Action, Device, DiskError, DiskOp, Outcome};
use crate::store::{Store, StoreIo, StoreKind, StoreSize, StoreSpec};
use crate::volume::{Extent, MergeError, Now, OnFull};

const SECTORS: u64 = 16;
const BYTES: u64 = SECTORS * 512;

/// A device in memory.
struct Memory(Vec<u8>);

impl Memory {
    fn perform(&mut self, action: &Action) -> Bytes {
        match action {
            Action::Read { offset, len } => {
                let range = *offset as usize..(*offset + *len) as usize;
                return Bytes::copy_from_slice(&self.0[range]);
            }
            Action::Write { offset, data } => {
                let data = data.concat();
                self.0[*offset as usize..*offset as usize + data.len()].copy_from_slice(&data);
            }
            Action::WriteZeroes { offset, len, .. } | Action::Trim { offset, len } => {
                self.0[*offset as usize..(*offset + *len) as usize].fill(0);
            }
            Action::Flush => {}
            Action::Grow { .. } => unreachable!("these stores do not grow"),
        }
        Bytes::new()
    }
}

impl StoreIo for Memory {
    fn act(&mut self, action: Action) -> Outcome {
        Ok(self.perform(&action))
    }

    fn keep_copy(&mut self, _: u64, _: &[u8]) -> Result<(), DiskError> {
        unreachable!("nothing tears here")
    }
}

/// A tree and its devices.
struct Rig {
    tree: Tree,
    devices: BTreeMap<Device, Memory>,
    events: Vec<Event>,
    next: u64,
}

fn disk(byte: u8) -> Rig {
    let tree = Tree::new(VolumeConfig {
        origin_bytes: BYTES,
        copy_memory: 4096,
        copy_piece: 2048,
    });
    Rig {
        tree,
        devices: BTreeMap::from([(Device::Origin, Memory(vec![byte; BYTES as usize]))]),
        events: Vec::new(),
        next: 0,
    }
}

/// A store of `chunks`, a sector each.
fn store(chunks: u64) -> (Store, Memory) {
    let chunk_size = ChunkSize::from_sectors(1).unwrap();
    let bytes = chunks * 512;
    let mut memory = Memory(vec![0; bytes as usize]);
    let (ready, limit, step) = (bytes, bytes, 0);
    let spec = StoreSpec {
        kind: StoreKind::Persistent,
        chunk_size,
        size: StoreSize { ready, limit, step },
    };
    (Store::create(spec, &mut memory).unwrap(), memory)
}

impl Rig {
    /// A snapshot of `of`, taken now, in a store of `chunks`.
    fn snapshot(&mut self, of: View, chunks: u64) -> View {
        let (store, memory) = store(chunks);
        let id = self.tree.create_snapshot(of, store).unwrap();
        self.devices.insert(Device::Cow(id), memory);
        self.run();
        assert!(self.events.contains(&Event::Created(id)));
        View::Snapshot(id)
    }

    fn perform(&mut self, op: &DiskOp) {
        let device = self.devices.get_mut(&op.device).expect("it is one of ours");
        let bytes = device.perform(&op.action);
        self.tree.handle_completion(op.id, Ok(bytes));
    }

    fn run(&mut self) {
        while let Some(op) = self.tree.poll_disk_op() {
            self.perform(&op);
        }
        self.events
            .extend(std::iter::from_fn(|| self.tree.poll_event()));
    }

    fn hand_in(&mut self, view: View, command: Command) -> RequestId {
        self.next += 1;
        let id = RequestId(self.next);
        self.tree.handle_request(Request { id, view, command });
        id
    }

    fn ask(&mut self, view: View, command: Command) -> Result<Vec<u8>, Failure> {
        let id = self.hand_in(view, command);
        self.run();
        let reply = self.tree.poll_reply().expect("it is answered");
        assert_eq!(reply.id, id);
        reply.result.map(|pieces| pieces.concat())
    }

    fn write(&mut self, view: View, sector: u64, byte: u8) -> Result<Vec<u8>, Failure> {
        self.ask(view, write(sector, byte))
    }

    /// The first byte of each sector, by a request and around the queue.
    fn show(&mut self, view: View) -> Vec<u8> {
        let (offset, len) = (0, BYTES);
        let read = self.ask(view, Command::Read { offset, len }).unwrap();
        let mut extents = Vec::new();
        assert_eq!(self.tree.read_now(view, 0, BYTES, &mut extents), Now::Go);
        assert_eq!(self.peek(&extents), read);
        assert_eq!(self.tree.map(view, 0, BYTES, usize::MAX), Ok(extents));
        self.show_pieces(view, &read);
        read.chunks(512).map(|sector| sector[0]).collect()
    }

    /// Every piece of a view shows what the whole of it does.
    fn show_pieces(&self, view: View, whole: &[u8]) {
        let places = || (0..=BYTES).step_by(256);
        let pieces = places().flat_map(|start| places().map(move |end| (start, end)));
        for (start, end) in pieces.filter(|(start, end)| start <= end) {
            let mut extents = Vec::new();
            let now = self.tree.read_now(view, start, end - start, &mut extents);
            assert_eq!(now, Now::Go);
            let piece = &whole[start as usize..end as usize];
            assert!(self.peek(&extents) == piece, "{start}..{end} of {view:?}");
        }
    }

    fn peek(&self, extents: &[Extent]) -> Vec<u8> {
        let bytes = |e: &Extent| {
            let range = e.offset as usize..(e.offset + e.len) as usize;
            self.devices[&e.device].0[range].to_vec()
        };
        extents.iter().flat_map(bytes).collect()
    }
}

fn write(sector: u64, byte: u8) -> Command {
    Command::Write {
        offset: sector * 512,
        data: vec![byte; 512].into(),
        fua: false,
    }
}

fn id(view: View) -> SnapshotId {
    match view {
        View::Snapshot(id) => id,
        View::Origin => unreachable!("it is a snapshot"),
    }
}

#[test]
fn fifty_levels_deep_every_view_keeps_its_own() {
    let mut rig = disk(1);
    let mut views = vec![View::Origin];
    for _ in 0..50 {
        let next = rig.snapshot(*views.last().unwrap(), 40);
        views.push(next);
    }
    let mut models = vec![vec![1; SECTORS as usize]; views.len()];
    // The disk last: what the deepest shows has to get through all of them.
    for (n, &view) in views.iter().enumerate().rev() {
        for sector in [n as u64 % SECTORS, 7] {
            rig.write(view, sector, 100 + n as u8).unwrap();
            models[n][sector as usize] = 100 + n as u8;
        }
    }
    for (view, model) in views.iter().zip(&models) {
        assert_eq!(&rig.show(*view), model, "{view:?}");
    }
    rig.ask(views[50], Command::Flush).unwrap();
    rig.tree.close();
    rig.run();
    assert_eq!(rig.events.last(), Some(&Event::Closed(true)));
    assert!(rig.tree.is_idle());
}

#[test]
fn a_map_of_part_of_a_view_begins_like_the_whole() {
    let mut rig = disk(1);
    let mut view = View::Origin;
    for sector in 0..6 {
        view = rig.snapshot(view, 40);
        rig.write(view, 2 * sector, 9).unwrap();
    }
    let whole = rig.tree.map(view, 0, BYTES, usize::MAX).unwrap();
    assert!(whole.len() > 8);
    for most in 1..=whole.len() {
        let part = rig.tree.map(view, 0, BYTES, most).unwrap();
        assert_eq!(part, whole[..most]);
    }
}

#[test]
fn what_others_stand_on_is_neither_removed_nor_merged() {
    let mut rig = disk(1);
    let inner = rig.snapshot(View::Origin, 40);
    let (a, b) = (rig.snapshot(inner, 40), rig.snapshot(inner, 40));
    assert_eq!(rig.tree.snapshots_of(inner), [id(a), id(b)]);
    assert_eq!(rig.tree.origin_of(id(a)), Some(inner));
    assert_eq!(rig.tree.origin_of(id(inner)), Some(View::Origin));
    let both = vec![id(a), id(b)];
    let refused = rig.tree.remove_snapshot(id(inner));
    assert_eq!(refused, Err(RemoveError::HasSnapshots(both.clone())));
    let refused = rig.tree.begin_merge(id(inner));
    assert_eq!(refused, Err(NodeMergeError::HasSnapshots(both)));
    // One goes into it, the other away; then it can go too.
    rig.write(a, 3, 7).unwrap();
    rig.tree.begin_merge(id(a)).unwrap();
    assert_eq!(rig.tree.remove_snapshot(id(a)), Err(RemoveError::Merging));
    let (new, _) = store(40);
    assert_eq!(
        rig.tree.create_snapshot(inner, new).err(),
        Some(TakeError::Merging)
    );
    rig.run();
    assert!(rig.events.contains(&Event::Merged(id(a))));
    assert_eq!(rig.show(inner)[3], 7);
    assert_eq!(rig.show(b)[3], 1);
    assert_eq!(rig.show(View::Origin)[3], 1);
    rig.tree.remove_snapshot(id(b)).unwrap();
    rig.run();
    assert_eq!(rig.tree.snapshots_of(inner), []);
    rig.tree.begin_merge(id(inner)).unwrap();
    rig.run();
    assert_eq!(rig.show(View::Origin)[3], 7);
    assert_eq!(rig.tree.devices(), [Device::Origin]);
    let gone = rig.tree.begin_merge(id(inner));
    assert_eq!(
        gone,
        Err(NodeMergeError::Refused(MergeError::NoSuchSnapshot))
    );
    let read = Command::Read {
        offset: 0,
        len: 512,
    };
    assert_eq!(rig.ask(inner, read), Err(Failure::NoSuchView));
}

#[test]
fn a_lost_snapshot_fails_those_that_stand_on_it_only_where_they_need_it() {
    let mut rig = disk(1);
    // Room for two exceptions.
    let inner = rig.snapshot(View::Origin, 4);
    let leaf = rig.snapshot(inner, 40);
    rig.write(leaf, 5, 7).unwrap();
    for sector in 0..4 {
        rig.write(View::Origin, sector, 9).unwrap();
    }
    let lost = |event: &Event| matches!(event, Event::Invalid(lost, _) if *lost == id(inner));
    assert!(rig.events.iter().any(lost));
    let read = |sector: u64| Command::Read {
        offset: sector * 512,
        len: 512,
    };
    assert_eq!(rig.ask(leaf, read(5)), Ok(vec![7; 512]));
    assert_eq!(rig.ask(leaf, read(6)), Err(Failure::Io));
    assert_eq!(rig.ask(inner, read(6)), Err(Failure::Io));
    // Part of a chunk needs the old rest of it.
    let data = vec![8; 100].into();
    let (offset, fua) = (6 * 512, false);
    let part = Command::Write { offset, data, fua };
    assert_eq!(rig.ask(leaf, part), Err(Failure::Io));
    let lost = |event: &Event| matches!(event, Event::Invalid(lost, _) if *lost == id(leaf));
    assert!(rig.events.iter().any(lost));
    // Nothing of that is a flush that failed.
    rig.tree.close();
    rig.run();
    assert_eq!(rig.events.last(), Some(&Event::Closed(true)));
}

#[test]
fn a_full_store_refuses_or_holds_up_writes_to_an_inner_snapshot_as_to_any_other() {
    let mut rig = disk(1);
    let inner = rig.snapshot(View::Origin, 4);
    let leaf = rig.snapshot(inner, 40);
    rig.tree.set_on_full(id(inner), OnFull::Error);
    rig.write(inner, 0, 9).unwrap();
    let refused = (1..4).map(|sector| rig.write(inner, sector, 9));
    assert_eq!(refused.last(), Some(Err(Failure::NoSpace)));
    rig.tree.set_on_full(id(inner), OnFull::Pause);
    let waits = rig.hand_in(inner, write(9, 9));
    rig.run();
    assert_eq!(rig.tree.poll_reply(), None);
    assert_eq!(rig.show(leaf), [1; SECTORS as usize]);
    // It does not keep a close waiting.
    rig.tree.close();
    rig.run();
    let reply = rig.tree.poll_reply().unwrap();
    assert_eq!((reply.id, reply.result), (waits, Err(Failure::NoSpace)));
    assert_eq!(rig.events.last(), Some(&Event::Closed(true)));
}

#[test]
fn a_level_that_always_has_work_keeps_no_other_waiting() {
    let mut rig = disk(1);
    let leaf = rig.snapshot(View::Origin, 40);
    let read = Command::Read {
        offset: 0,
        len: 512,
    };
    for _ in 0..4 * 256 {
        rig.hand_in(View::Origin, read.clone());
    }
    let last = rig.hand_in(leaf, write(3, 9));
    for performed in 0.. {
        let op = rig.tree.poll_disk_op().expect("there is more to do");
        rig.perform(&op);
        // Somebody who never stops reading.
        rig.hand_in(View::Origin, read.clone());
        let replies: Vec<_> = std::iter::from_fn(|| rig.tree.poll_reply()).collect();
        if replies.iter().any(|reply| reply.id == last) {
            break;
        }
        assert!(performed < 8 * 1024, "the write has starved");
    }
}

#[test]
fn one_instant_for_two_levels() {
    let mut rig = disk(1);
    let inner = rig.snapshot(View::Origin, 40);
    let mut taken = Vec::new();
    for of in [View::Origin, inner] {
        let (store, memory) = store(40);
        let (instant, ids) = rig.tree.begin_instant(of, vec![store]).unwrap();
        rig.devices.insert(Device::Cow(ids[0]), memory);
        taken.push((instant, View::Snapshot(ids[0])));
    }
    rig.run();
    for &(instant, _) in &taken {
        assert!(rig.events.contains(&Event::Held(instant)));
    }
    rig.hand_in(View::Origin, write(0, 2));
    rig.hand_in(inner, write(0, 3));
    rig.run();
    assert_eq!(rig.tree.poll_reply(), None);
    for &(instant, _) in &taken {
        rig.tree.take_instant(instant).unwrap();
        assert_eq!(rig.tree.take_instant(instant), Err(crate::NotHeld));
    }
    rig.run();
    assert_eq!(
        [rig.tree.poll_reply(), rig.tree.poll_reply()]
            .iter()
            .flatten()
            .count(),
        2
    );
    assert_eq!((rig.show(View::Origin)[0], rig.show(inner)[0]), (2, 3));
    for &(_, view) in &taken {
        assert_eq!(rig.show(view), [1; SECTORS as usize]);
    }
    // One that is given up leaves nothing behind.
    let (given_up, ids) = rig.tree.begin_instant(inner, vec![store(40).0]).unwrap();
    rig.tree.abandon_instant(given_up);
    assert_eq!(rig.tree.snapshots_of(inner), [id(taken[1].1)]);
    assert_eq!(rig.tree.status(ids[0]), None);
    rig.tree.abandon_instant(given_up);
}

#[test]
fn a_suspended_tree_lets_nothing_through_and_closes_from_there() {
    let mut rig = disk(1);
    let inner = rig.snapshot(View::Origin, 40);
    let leaf = rig.snapshot(inner, 40);
    rig.tree.suspend();
    rig.run();
    assert_eq!(rig.events.last(), Some(&Event::Suspended(true)));
    let queued = rig.hand_in(inner, write(1, 9));
    assert_eq!(
        rig.tree.write_now(inner, 0, 512, &mut Vec::new()),
        Now::Queue
    );
    // A snapshot is taken at once; it stands still like the others.
    let late = rig.snapshot(leaf, 40);
    assert!(rig.tree.poll_reply().is_none());
    rig.tree.resume();
    rig.run();
    assert_eq!(rig.tree.poll_reply().unwrap().id, queued);
    assert_eq!((rig.show(inner)[1], rig.show(late)[1]), (9, 1));
    rig.tree.suspend();
    rig.run();
    let queued = rig.hand_in(late, write(1, 9));
    rig.tree.close();
    rig.run();
    let reply = rig.tree.poll_reply().unwrap();
    assert_eq!(
        (reply.id, reply.result),
        (queued, Err(Failure::ShuttingDown))
    );
    assert_eq!(rig.events.last(), Some(&Event::Closed(true)));
    assert_eq!(rig.ask(leaf, Command::Flush), Err(Failure::ShuttingDown));
}

/// Around the queue too a snapshot that another is merged into shows that one, whatever
/// part of it has been copied; and its other snapshots, and theirs, what they did.
#[test]
fn reads_at_once_see_a_merge_from_its_beginning() {
    let mut rig = disk(1);
    rig.tree.set_merge_step(512);
    let inner = rig.snapshot(View::Origin, 40);
    let leaf = rig.snapshot(inner, 40);
    let sibling = rig.snapshot(inner, 40);
    let above = rig.snapshot(sibling, 40);
    rig.write(inner, 3, 5).unwrap();
    for (sector, byte) in [(1, 9), (2, 8), (5, 7)] {
        rig.write(leaf, sector, byte).unwrap();
    }
    let merged: Vec<u8> = (rig.show(leaf).iter())
        .flat_map(|&byte| [byte; 512])
        .collect();
    let old: Vec<u8> = (rig.show(sibling).iter())
        .flat_map(|&byte| [byte; 512])
        .collect();
    rig.tree.begin_merge(id(leaf)).unwrap();
    let mut seen = 0;
    while let Some(op) = rig.tree.poll_disk_op() {
        rig.perform(&op);
        let events = std::iter::from_fn(|| rig.tree.poll_event());
        rig.events.extend(events);
        if rig.events.contains(&Event::MergeBegun(id(leaf))) {
            rig.show_pieces(inner, &merged);
            rig.show_pieces(sibling, &old);
            rig.show_pieces(above, &old);
            seen += 1;
        }
    }
    assert!(seen >= 8, "{seen} moments of three steps");
    rig.run();
    assert!(rig.events.contains(&Event::Merged(id(leaf))));
    rig.show_pieces(inner, &merged);
}

/// A write to a snapshot that has none itself goes past its level: an instant that is
/// taken while the tree stands still waits for it all the same.
#[test]
fn a_write_under_way_is_waited_for_by_a_standstill() {
    let mut rig = disk(1);
    let inner = rig.snapshot(View::Origin, 40);
    let asked = rig.hand_in(inner, write(2, 9));
    let op = rig.tree.poll_disk_op().expect("the write begins");
    rig.tree.suspend();
    let (new, memory) = store(40);
    let leaf = rig.tree.create_snapshot(inner, new).unwrap();
    rig.devices.insert(Device::Cow(leaf), memory);
    rig.run();
    assert_eq!(rig.tree.poll_reply(), None);
    assert!(!rig.events.contains(&Event::Suspended(true)));
    rig.perform(&op);
    rig.run();
    assert_eq!(rig.tree.poll_reply().map(|reply| reply.id), Some(asked));
    assert!(rig.events.contains(&Event::Created(leaf)));
    assert_eq!(rig.events.last(), Some(&Event::Suspended(true)));
    rig.tree.resume();
    rig.write(inner, 2, 8).unwrap();
    let shown = [inner, View::Snapshot(leaf)].map(|view| rig.show(view)[2]);
    assert_eq!(shown, [8, 9]);
}

#[test]
fn zeroes_that_have_to_be_fast_are_refused_by_every_snapshot() {
    let mut rig = disk(1);
    let leaf = rig.snapshot(View::Origin, 40);
    let zero = |offset: u64| Command::WriteZeroes {
        offset,
        len: 512,
        fua: false,
        no_hole: false,
        fast_only: true,
    };
    assert_eq!(rig.ask(leaf, zero(0)), Err(Failure::NotSupported));
    assert_eq!(rig.ask(leaf, zero(BYTES)), Err(Failure::PastEnd));
    assert_eq!(rig.show(leaf), [1; SECTORS as usize]);
}

/// What it costs to find where a read through eight levels lies, beside one: with
/// `cargo test --release -p nbdsnap-engine the_cost -- --ignored --nocapture`.
#[test]
#[ignore = "it measures, and says what it found"]
fn the_cost_of_a_read_through_levels() {
    const CHUNKS: u64 = 1 << 16;
    let time = |depth: u64| {
        let mut tree = Tree::new(VolumeConfig {
            origin_bytes: CHUNKS * 4096,
            copy_memory: 1 << 20,
            copy_piece: 1 << 20,
        });
        let mut view = View::Origin;
        for level in 0..depth {
            // Every chunk in 16 has an exception, others at every level.
            let chunk_size = ChunkSize::from_sectors(8).unwrap();
            let mut memory = Memory(vec![0; 3 * 4096]);
            let (ready, limit, step) = (3 * 4096, 3 * 4096, 0);
            let spec = StoreSpec {
                kind: StoreKind::Persistent,
                chunk_size,
                size: StoreSize { ready, limit, step },
            };
            let mut store = Store::create(spec, &mut memory).unwrap();
            for i in 0..CHUNKS / 16 {
                let old = OriginChunk(16 * i + 2 * level);
                store.table.insert(old, CowChunk(2 * i + 2));
            }
            view = View::Snapshot(tree.attach_snapshot(view, store));
        }
        let mut extents = Vec::new();
        let mut at = 1u64;
        let start = std::time::Instant::now();
        for _ in 0..1_000_000 {
            at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(11);
            extents.clear();
            let offset = (at >> 33) % CHUNKS * 4096;
            assert_eq!(tree.read_now(view, offset, 4096, &mut extents), Now::Go);
        }
        start.elapsed().as_nanos() / 1_000_000
    };
    for depth in [0, 1, 2, 4, 8] {
        println!("{depth} levels: {} ns to resolve a 4 KiB read", time(depth));
    }
}
