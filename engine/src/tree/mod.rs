//! Snapshots of snapshots: a disk, its snapshots, theirs, and so on, to any depth.
//!
//! # What it is made of
//!
//! Every view of the tree (the disk, and each snapshot) is the origin of a
//! [`Volume`] of its own, a *level*, whether or not it has snapshots yet. What the
//! root's volume asks of its origin is done on the physical disk. What any other
//! volume asks of its origin becomes a request to the volume below it, for the
//! snapshot that is its origin; the reply becomes the end of the operation. What a
//! volume asks of a store is done on that store. (While nobody has taken a snapshot
//! of a snapshot, what its clients ask goes past its own level, which would only pass
//! it on.) This is how device-mapper stacks
//! a `snapshot-origin` over a `snapshot`, so each store is in the kernel's layout,
//! and stacked in the same order it reads the same there.
//!
//! The tree itself decides nothing about chunks. The Law at each level, group
//! commit, instants, merges, full stores and lost snapshots are the volume's.
//!
//! # Names
//!
//! A [`Tree`] looks to its caller as a volume does: the same requests, operations,
//! events and order of calls. Snapshots are counted over the whole tree, so that
//! [`View`] names any view of it and [`crate::Device`] any of its disks:
//! [`View::Origin`] is the disk at the root.
//!
//! # Why a power cut does no harm
//!
//! Let C be a snapshot of S, and S one of P.
//!
//! - *A write to S* is an origin write of S's level: it becomes a request to P's
//!   level once C's exceptions are durable, and not before. What the request does
//!   to S's store (a new exception, or a chunk written in place) is then free to be
//!   lost or kept in any part: C does not look there any more.
//! - *A write to P* waits until S has durable exceptions. That moves where S's
//!   bytes lie and changes none of them, so C needs nothing.
//! - *FLUSH of S* is a flush of S's level's origin: FLUSH of the view S at P's level,
//!   which is a flush of S's store, with the exceptions that are volatile there. It
//!   begins after every write that it answers for was answered (rule 9), because an
//!   operation ends when its request is answered.
//! - *The instant of C* holds, drains and flushes S, by the same flush: what C takes
//!   over from S is durable in S's store or deeper.
//! - *A copy for C* reads the view S. A crash may leave C's copy and lose its
//!   exception (C reads S, which was not changed), or keep C's exception and lose
//!   whatever came after it at S. No level relies on the order of another.
//! - *Reads* (rule 11): a read of C that goes down is in flight at each level that it
//!   passes: as a snapshot's read of S there, of P below. An origin write at any of
//!   these levels waits for it.
//! - *A merge of C into S* writes to S as a client would, FLUSHes S, and then takes
//!   the exceptions off C's list. The other snapshots of S have their copies first.
//!
//! # Where the kernel's ways were followed
//!
//! - A snapshot that others stand on cannot be removed or merged into its own
//!   origin: its device is open. The refusal names them ([`RemoveError`],
//!   [`NodeMergeError`]).
//! - A snapshot of S that is lost makes reads and writes of S fail. Snapshots of S
//!   see an origin that fails: what lies in their own stores can be read, what goes
//!   down to S cannot, and a copy that cannot be read makes them Invalid.
//!
//! # What to know
//!
//! - [`VolumeConfig::copy_memory`] is divided among the levels that have snapshots, in
//!   equal parts, but for a [`VolumeConfig::copy_piece`] that each has at least. They
//!   cannot have it in common: a write to S may need a copy at P's level, for which it
//!   would wait for ever if the level above held the memory.
//! - A write to S that waits for room in S's store ([`crate::OnFull::Pause`]) is an
//!   operation in flight for S's level. A snapshot of S, and [`Tree::suspend`], wait
//!   until the store is extended or S is removed. A close does not.
//! - Nothing here calls itself: depth costs queue entries, not stack.
//!
//! # Files
//!
//! - `route.rs`: operations down, replies and events up, and whose turn it is;
//! - `resolve.rs`: where the bytes of a view lie on the physical disks;
//! - `orders.rs`: snapshots come, go and are merged;
//! - `course.rs`: the whole tree is suspended, resumed and closed.

mod course;
mod orders;
mod resolve;
mod route;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use slab::Slab;

use crate::disk::OpId;
use crate::law::Law;
use crate::request::{Command, Failure, Reply, Request, RequestId, SnapshotId, View};
use crate::volume::{Event, InstantId, Volume, VolumeConfig};
use course::Course;

pub use orders::{NodeMergeError, RemoveError, TakeError};

/// A level's place in the tree's slab.
type LevelKey = usize;

/// A view and, as its snapshots' origin, the volume that serves it.
#[derive(Debug)]
struct Level {
    volume: Volume,
    /// What its origin is; none for the root, whose origin is the disk.
    below: Option<Below>,
    /// Its view is gone: it ends what it has under way, and goes.
    is_orphan: bool,
    /// Replies or events may have come of something that it was told.
    is_touched: bool,
    /// It may have operations to hand out.
    is_runnable: bool,
    /// Changes of its view that go past it and are under way in the level below.
    past_it: u64,
    /// Levels right above it that have not come where [`Course`] leads.
    waits_for: usize,
    /// It has come there.
    has_arrived: bool,
}

/// The snapshot that is the origin of a level.
#[derive(Clone, Copy, Debug)]
struct Below {
    /// The level that it is a snapshot of.
    level: LevelKey,
    snapshot: SnapshotId,
}

/// A snapshot.
#[derive(Clone, Copy, Debug)]
struct Node {
    /// The level that it is a snapshot of.
    origin: LevelKey,
    standing: Standing,
}

/// Where a snapshot stands in the tree.
#[derive(Clone, Copy, Debug)]
enum Standing {
    /// Its instant has not been taken: it is no view yet.
    Creating,
    /// It is a view, and the origin of this level.
    There(LevelKey),
    /// It is being removed.
    Removing,
    /// It is a part of its origin, into which it is being merged.
    Merging,
}

/// Who asked a volume for something.
#[derive(Clone, Copy, Debug)]
enum Asker {
    /// A client.
    Client(RequestId),
    /// A client, past this level, whose view it changes.
    PastLevel(LevelKey, RequestId),
    /// The level above, by an operation on its origin.
    Level(LevelKey, OpId),
}

/// A disk, its snapshots, and theirs. One thread owns it.
#[derive(Debug)]
pub struct Tree {
    config: VolumeConfig,
    law: Law,
    window: Option<u64>,
    merge_step: Option<u64>,
    levels: Slab<Level>,
    root: LevelKey,
    nodes: BTreeMap<SnapshotId, Node>,
    next_snapshot: u32,
    /// Instants that have not been taken, with their snapshots.
    instants: BTreeMap<InstantId, (LevelKey, Vec<SnapshotId>)>,
    next_instant: u32,
    asked: Slab<Asker>,
    /// Operations on physical disks, and whose they are.
    in_flight: Slab<(LevelKey, OpId)>,
    touched: VecDeque<LevelKey>,
    runnable: VecDeque<LevelKey>,
    /// Operations that the first of those has handed out in a row.
    turn: u32,
    replies: VecDeque<Reply>,
    events: VecDeque<Event>,
    course: Course,
    /// Requests handed in while the tree is suspended, or on the way there.
    queued: VecDeque<Request>,
}

impl Tree {
    /// A disk without snapshots. The config is that of the root's level; the others
    /// differ from it in their length only.
    pub fn new(config: VolumeConfig) -> Self {
        let mut this = Self {
            config,
            law: Law::default(),
            window: None,
            merge_step: None,
            levels: Slab::new(),
            root: 0,
            nodes: BTreeMap::new(),
            next_snapshot: 0,
            instants: BTreeMap::new(),
            next_instant: 0,
            asked: Slab::new(),
            in_flight: Slab::new(),
            touched: VecDeque::new(),
            runnable: VecDeque::new(),
            turn: 0,
            replies: VecDeque::new(),
            events: VecDeque::new(),
            course: Course::Open,
            queued: VecDeque::new(),
        };
        this.root = this.add_level(None, config.origin_bytes);
        this
    }

    /// See [`Volume::set_window`]. Nothing may have been attached yet.
    pub fn set_window(&mut self, bytes: u64) {
        assert!(self.nodes.is_empty());
        self.window = Some(bytes);
        self.levels[self.root].volume.set_window(bytes);
    }

    /// See [`Volume::set_merge_step`]. Nothing may have been attached yet.
    pub fn set_merge_step(&mut self, bytes: u64) {
        assert!(self.nodes.is_empty());
        self.merge_step = Some(bytes);
        self.levels[self.root].volume.set_merge_step(bytes);
    }

    /// A tree that breaks a rule. Nothing may have been attached yet.
    #[cfg(feature = "mutants")]
    pub fn set_law(&mut self, law: Law) {
        assert!(self.nodes.is_empty());
        self.law = law;
        self.levels[self.root].volume.set_law(law);
    }

    /// Hand in a request; its reply comes from [`Tree::poll_reply`].
    pub fn handle_request(&mut self, request: Request) {
        match self.course {
            Course::Open => self.admit(request),
            Course::Suspending { .. } | Course::Suspended => self.queued.push_back(request),
            Course::Closing { .. } | Course::Closed => {
                self.reply(request.id, Err(Failure::ShuttingDown));
            }
        }
    }

    fn admit(&mut self, request: Request) {
        let Request { id, view, command } = request;
        let Some(key) = self.level_of(view) else {
            return self.reply(id, Err(Failure::NoSuchView));
        };
        match self.levels[key].below {
            Some(below) if self.levels[key].volume.is_bare() => {
                self.ask_past(key, below, id, command);
            }
            Some(_) if self.wants_fast_zeroes(key, &command) => {
                // To its level it would look as if no store were in the way.
                self.reply(id, Err(Failure::NotSupported));
            }
            _ => self.ask(key, View::Origin, command, Asker::Client(id)),
        }
    }

    /// A level without snapshots has nothing to add to a request for its view: it
    /// goes straight to the level below. An instant of the view waits for changes
    /// that go this way.
    fn ask_past(&mut self, key: LevelKey, below: Below, id: RequestId, command: Command) {
        let changes = !matches!(command, Command::Read { .. } | Command::Flush);
        let asker = if changes {
            let level = &mut self.levels[key];
            level.past_it += 1;
            level.volume.change_begins_elsewhere();
            Asker::PastLevel(key, id)
        } else {
            Asker::Client(id)
        };
        let view = View::Snapshot(below.snapshot);
        self.ask(below.level, view, command, asker);
    }

    fn wants_fast_zeroes(&self, key: LevelKey, command: &Command) -> bool {
        let &Command::WriteZeroes {
            offset,
            len,
            fast_only: true,
            ..
        } = command
        else {
            return false;
        };
        let volume = &self.levels[key].volume;
        len > 0 && volume.check_range(View::Origin, offset, len).is_ok()
    }

    /// The next reply, if there is one.
    pub fn poll_reply(&mut self) -> Option<Reply> {
        self.settle();
        self.replies.pop_front()
    }

    /// The next event, if there is one.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.settle();
        self.events.pop_front()
    }

    /// Nothing is in flight or queued, and every reply has been taken.
    pub fn is_idle(&self) -> bool {
        self.touched.is_empty()
            && self.runnable.is_empty()
            && self.replies.is_empty()
            && self.queued.is_empty()
            && self.levels.iter().all(|(_, level)| level.volume.is_idle())
    }

    fn reply(&mut self, id: RequestId, result: Result<Vec<bytes::Bytes>, Failure>) {
        self.replies.push_back(Reply { id, result });
    }

    /// Levels with snapshots have come or gone: each has its part of the memory.
    fn share_copy_memory(&mut self) {
        let origins: BTreeSet<LevelKey> = self.nodes.values().map(|node| node.origin).collect();
        let share = self.config.copy_memory / origins.len().max(1) as u64;
        for key in origins {
            self.levels[key].volume.set_copy_memory(share);
        }
    }

    /// The level whose origin the view is, if it is there.
    fn level_of(&self, view: View) -> Option<LevelKey> {
        match view {
            View::Origin => Some(self.root),
            View::Snapshot(id) => match self.nodes.get(&id)?.standing {
                Standing::There(key) => Some(key),
                Standing::Creating | Standing::Removing | Standing::Merging => None,
            },
        }
    }

    /// A level for a view of `bytes` that has come into being.
    fn add_level(&mut self, below: Option<Below>, bytes: u64) -> LevelKey {
        let mut volume = Volume::new(VolumeConfig {
            origin_bytes: bytes,
            ..self.config
        });
        if below.is_some() {
            volume.stand_on_snapshot();
        }
        if let Some(bytes) = self.window {
            volume.set_window(bytes);
        }
        if let Some(bytes) = self.merge_step {
            volume.set_merge_step(bytes);
        }
        #[cfg(feature = "mutants")]
        volume.set_law(self.law);
        if self.course.stands_still() {
            volume.begin_suspended();
        }
        self.levels.insert(Level {
            volume,
            below,
            is_orphan: false,
            is_touched: false,
            is_runnable: false,
            past_it: 0,
            waits_for: 0,
            // It has nothing to end.
            has_arrived: true,
        })
    }
}
