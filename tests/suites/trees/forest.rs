//! The tree under test: a server with its state, and the model of every node.

use std::path::PathBuf;

use nbdsnap_format::ChunkSize;
use nbdsnap_tests::harness::files::{folder, random_file};
use nbdsnap_tests::harness::live::{done, names};
use nbdsnap_tests::harness::random::Random;
use nbdsnap_tests::harness::server::{Serve, Server};

use super::batch::{self, Performed};
use super::view::{Kind, Store, View};

/// Not a multiple of any chunk but the smallest.
const BYTES: u64 = 768 * 1024 + 5 * 512;

/// Connections to each node.
const CONNECTIONS: usize = 2;

/// How much is played.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    /// Snapshots at a time, at most.
    pub(crate) nodes: usize,
    /// Levels above the disk, at most.
    pub(crate) depth: usize,
    /// Each changes the tree, and then all of it is written.
    pub(crate) rounds: u64,
    /// Requests in a round.
    pub(crate) requests: usize,
}

/// What has happened.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    created: u64,
    groups: u64,
    transient: u64,
    removed: u64,
    removed_together: u64,
    merged: u64,
    /// Merges that a kill or a stop found under way.
    cut_off: u64,
    renamed: u64,
    kills: u64,
    stops: u64,
    most: usize,
    deepest: usize,
    reads: u64,
    writes: u64,
}

impl Tally {
    /// Nothing may have been left out.
    pub(crate) fn insist_on_everything(&self, size: Size) {
        let Self {
            created,
            groups,
            transient,
            removed,
            removed_together,
            merged,
            cut_off: _,
            renamed,
            kills,
            stops,
            most,
            deepest,
            reads,
            writes,
        } = *self;
        let counts = [
            created,
            groups,
            transient,
            removed,
            removed_together,
            merged,
            renamed,
            kills,
            stops,
            reads,
            writes,
        ];
        assert!(!counts.contains(&0), "something never happened: {self:?}");
        assert!(most >= size.nodes && deepest == size.depth, "{self:?}");
    }
}

/// A server, its tree and what every node of it has to show.
pub(crate) struct Forest {
    folder: tempfile::TempDir,
    size: Size,
    random: Random,
    server: Option<Server>,
    /// The disk first, then the snapshots in the order in which they came.
    views: Vec<View>,
    /// Of a merge that may be under way: the snapshot's export.
    merging: Vec<String>,
    stores: u64,
    /// Orders to create snapshots, and whose turn the first is.
    orders: u64,
    first_turn: u64,
    tally: Tally,
}

impl Forest {
    /// Play one run.
    pub(crate) fn play(size: Size, seed: u64) -> Tally {
        let mut random = Random::new(seed);
        let folder = folder();
        let content = random_file(&folder.path().join("disk.img"), BYTES as usize, &mut random);
        let first_turn = random.below(12);
        let mut this = Self {
            folder,
            size,
            random,
            orders: 0,
            first_turn,
            server: None,
            views: vec![View::new("disk", None, content)],
            merging: Vec::new(),
            stores: 0,
            tally: Tally::default(),
        };
        this.start(true);
        for round in 0..size.rounds {
            this.change(round);
            this.write_everywhere(round);
            if round % 6 == 5 {
                this.restart(round % 12 == 5);
            }
        }
        this.check_all();
        this.views.clear();
        if let Some(server) = this.server.take() {
            server.stop();
        }
        this.tally
    }

    fn start(&mut self, is_first: bool) {
        let mut serve = Serve::on_socket_in(self.folder.path());
        serve.control_in(self.folder.path());
        serve.state(&self.folder.path().join("state"), 0);
        if is_first {
            serve.disk("disk", &self.folder.path().join("disk.img"));
        }
        let server = serve.start();
        for view in &mut self.views {
            view.connect(&server.address(), CONNECTIONS);
        }
        self.server = Some(server);
    }

    fn server(&self) -> &Server {
        self.server.as_ref().expect("it runs")
    }

    fn restart(&mut self, kill: bool) {
        self.look_at_merges();
        self.tally.cut_off += self.merging.len() as u64;
        let server = self.server.take().expect("it runs");
        if kill {
            self.tally.kills += 1;
            server.kill();
        } else {
            self.tally.stops += 1;
            self.views.iter_mut().for_each(|view| view.sessions.clear());
            server.stop();
        }
        // What was in memory is gone.
        let lasts = |view: &View| {
            view.store
                .as_ref()
                .is_none_or(|store| store.kind != Kind::N)
        };
        self.views.retain(lasts);
        self.start(false);
        let disk = self.views[0].model.clone();
        for view in &mut self.views {
            view.reopened(&disk);
        }
        self.check_all();
    }

    fn check_all(&mut self) {
        for view in &mut self.views {
            view.check_all();
        }
    }

    fn write_everywhere(&mut self, round: u64) {
        let mut performed = vec![Performed::default(); self.views.len()];
        // Begin in a small part, where requests meet, and widen.
        let span = (BYTES * (round + 2) / (self.size.rounds + 2)).max(1 << 16);
        let requests = self.size.requests;
        batch::perform(
            &mut self.views,
            &mut self.random,
            requests,
            span,
            &mut performed,
        );
        self.tally.reads += performed.iter().map(|one| one.reads).sum::<u64>();
        self.tally.writes += performed.iter().map(|one| one.writes).sum::<u64>();
        if round.is_multiple_of(3) {
            self.check_all();
        }
    }

    fn change(&mut self, round: u64) {
        self.look_at_merges();
        // The first third makes the tree, the rest keeps it moving.
        let snapshots = self.views.len() - 1;
        let grows = round < self.size.rounds / 3;
        let wanted = if grows {
            self.size.nodes
        } else {
            self.size.nodes * 2 / 3
        };
        let most = 1 + self.size.nodes / 4;
        for _ in 0..most.min(wanted.saturating_sub(snapshots)) {
            if self.views.len() <= self.size.nodes {
                self.create();
            }
        }
        if !grows {
            if round % 3 == 1 {
                self.rename();
            }
            match round % 4 {
                0 | 2 => self.merge(),
                1 => self.remove(false),
                _ => self.remove(true),
            }
        }
        self.tally.most = self.tally.most.max(self.views.len() - 1);
    }

    /// The place of a view of which a snapshot of that kind can be taken: upon a
    /// transient one there are only transient ones.
    fn pick_origin(&mut self, kind: Kind) -> usize {
        let can = |view: &View| {
            let busy = self.merging.iter().any(|one| origin(one) == view.export);
            let below = view.store.as_ref().map(|store| store.kind);
            let lasts = kind == Kind::N || below != Some(Kind::N);
            !busy && lasts && depth(&view.export) < self.size.depth
        };
        let able: Vec<usize> = (0..self.views.len())
            .filter(|&n| can(&self.views[n]))
            .collect();
        // Half of the time as deep as can be: else there would be few deep ones.
        if self.random.one_in(2) {
            let deepest = able.iter().max_by_key(|&&n| depth(&self.views[n].export));
            return *deepest.expect("there is always one");
        }
        able[self.random.below(able.len() as u64) as usize]
    }

    fn create(&mut self) {
        // By turns, not by chance: no run is to go without. Some groups are transient.
        let turn = self.orders + self.first_turn;
        let count = if turn.is_multiple_of(4) { 2 } else { 1 };
        let (kind, mut words) = match turn % 6 {
            0 => (Kind::N, vec!["--transient".to_owned()]),
            _ if self.random.one_in(3) => (Kind::PO, vec!["--overflow".to_owned()]),
            _ => (Kind::P, Vec::new()),
        };
        self.orders += 1;
        let sectors = 1 << self.random.below(7);
        words.push(format!("--chunk={sectors}s"));
        let mut new = Vec::new();
        for _ in 0..count {
            let of = self.pick_origin(kind);
            let below = &self.views[of];
            self.stores += 1;
            let export = format!("{}@s{}", below.export, self.stores);
            let store = Store {
                kind,
                chunk: ChunkSize::from_sectors(sectors).expect("a chunk size"),
                size: None,
            };
            new.push(View::new(&export, Some(store), below.model.clone()));
        }
        let mut order = vec!["snapshot", "create"];
        order.extend(new.iter().map(|view| view.export.as_str()));
        order.extend(words.iter().map(String::as_str));
        let reported = names(&done(self.server(), &order));
        let wanted: Vec<&str> = new.iter().map(|view| view.export.as_str()).collect();
        assert_eq!(reported, wanted);
        self.tally.created += new.len() as u64;
        self.tally.groups += u64::from(new.len() > 1);
        self.tally.transient += u64::from(kind == Kind::N);
        let address = self.server().address();
        for mut view in new {
            self.tally.deepest = self.tally.deepest.max(depth(&view.export));
            view.connect(&address, CONNECTIONS);
            self.views.push(view);
        }
    }

    /// The places of snapshots that nothing stands on.
    fn leaves(&self) -> Vec<usize> {
        let bare = |n: &usize| {
            let export = &self.views[*n].export;
            let stands_on = |other: &str| other.starts_with(&format!("{export}@"));
            let mut others = self
                .views
                .iter()
                .map(|view| &view.export)
                .chain(&self.merging);
            !others.any(|other| stands_on(other))
        };
        (1..self.views.len()).filter(bare).collect()
    }

    fn merge(&mut self) {
        let mut leaves = self.leaves();
        leaves.retain(|&n| {
            let view = &self.views[n];
            let of = origin(&view.export);
            let busy = self.merging.iter().any(|one| origin(one) == of);
            let persistent = view.store.as_ref().is_some_and(|one| one.kind != Kind::N);
            persistent && !busy
        });
        if leaves.is_empty() {
            return;
        }
        let place = leaves[self.random.below(leaves.len() as u64) as usize];
        let merged = self.views.remove(place);
        let below = self
            .views
            .iter_mut()
            .find(|view| view.export == origin(&merged.export));
        below.expect("what it was taken of is there").model = merged.model;
        drop(merged.sessions);
        let order = [
            "snapshot",
            "merge",
            &merged.export,
            "--force",
            "--background",
            "--delete-cow",
        ];
        done(self.server(), &order);
        self.merging.push(merged.export);
        self.tally.merged += 1;
    }

    /// Merges that are done by now are forgotten.
    fn look_at_merges(&mut self) {
        let there = names(&done(self.server(), &["snapshot", "list"]));
        self.merging.retain(|one| there.contains(one));
        for view in &self.views[1..] {
            assert!(
                there.contains(&view.export),
                "{} is gone: {there:?}",
                view.export
            );
        }
        assert_eq!(there.len(), self.views.len() - 1 + self.merging.len());
    }

    /// Remove a leaf; or, `together` with it, what it was taken of, where nothing else
    /// stands on that.
    fn remove(&mut self, together: bool) {
        let leaves = self.leaves();
        let Some(&leaf) = leaves.get(self.random.below(leaves.len().max(1) as u64) as usize) else {
            return;
        };
        let leaf = self.views[leaf].export.clone();
        let mut exports = vec![leaf.clone()];
        if together && depth(&leaf) > 1 {
            let below = origin(&leaf).to_owned();
            let depends = |one: &&String| one.starts_with(&format!("{below}@"));
            let merges = self.merging.iter().any(|one| depends(&one));
            if !merges {
                let all = self.views.iter().map(|view| &view.export);
                let others = all.filter(depends).filter(|one| **one != leaf);
                // What it was taken of first: the order must not matter.
                let mut all = vec![below.clone()];
                all.extend(others.cloned());
                all.push(leaf);
                exports = all;
                self.tally.removed_together += 1;
            }
        }
        let gone = |view: &View| exports.contains(&view.export);
        self.views.retain(|view| !gone(view));
        let mut order = vec!["snapshot", "remove", "--delete-cow"];
        order.extend(exports.iter().map(String::as_str));
        done(self.server(), &order);
        self.tally.removed += exports.len() as u64;
    }

    /// Give a snapshot another name, and with it all that stand on it.
    fn rename(&mut self) {
        if self.views.len() < 2 || !self.merging.is_empty() {
            return;
        }
        let place = self.random.between(1, self.views.len() as u64 - 1) as usize;
        let old = self.views[place].export.clone();
        self.stores += 1;
        let name = format!("r{}", self.stores);
        done(self.server(), &["snapshot", "rename", &old, &name]);
        let new = format!("{}@{name}", origin(&old));
        for view in &mut self.views {
            let rest = view.export.strip_prefix(&old);
            if let Some(rest) = rest.filter(|rest| rest.is_empty() || rest.starts_with('@')) {
                view.export = format!("{new}{rest}");
            }
        }
        self.tally.renamed += 1;
    }
}

/// The export that a snapshot was taken of.
fn origin(export: &str) -> &str {
    export.rsplit_once('@').expect("it is a snapshot").0
}

/// Levels above the disk.
fn depth(export: &str) -> usize {
    export.matches('@').count()
}

/// Where the store of a snapshot lies that no order named one for.
pub(crate) fn store_of(folder: &std::path::Path, export: &str) -> PathBuf {
    let (_, path) = export.split_once('@').expect("it is a snapshot");
    folder.join(format!("disk.img.{path}.cow"))
}
