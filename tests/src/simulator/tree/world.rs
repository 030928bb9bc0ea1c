//! What outlives a process: the disks, the models of the nodes, and the count.

use nbdsnap_engine::disk::sim::{Loss, Rng, SimDisk};
use nbdsnap_engine::{SnapshotId, StoreKind, View};

use super::tally::{Ledger, Tally};
use crate::model::{Crash, Time, ViewModel, Wrong};
use crate::pattern::{self, CELLS, SECTOR, Stamp};
use crate::simulator::{Checks, Violation};
use crate::store_bytes;

/// Names a node: none for the disk, else a snapshot's place in [`World::nodes`].
pub(super) type Name = Option<usize>;

/// Where a snapshot stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Ordered, and not announced yet.
    Creating,
    /// A view that can be read and written.
    Active,
    /// Lost: its store was too small, or that of a node that it stands on.
    Lost,
    /// Its merge was ordered, durably.
    MergeOrdered,
    /// It is a part of what it was taken of.
    Merging,
    /// Its removal was ordered, durably.
    Removing,
    /// It is no more.
    Gone,
}

impl Phase {
    pub(super) fn merges(self) -> bool {
        matches!(self, Self::MergeOrdered | Self::Merging)
    }

    /// Requests may be sent to it.
    pub(super) fn is_view(self) -> bool {
        matches!(self, Self::Active | Self::Lost | Self::MergeOrdered)
    }
}

/// A snapshot.
pub(super) struct Node {
    /// What it was taken of.
    pub(super) origin: Name,
    /// 1 for a snapshot of the disk.
    pub(super) depth: u64,
    pub(super) kind: StoreKind,
    pub(super) chunk_sectors: u64,
    pub(super) limit_sectors: u64,
    pub(super) step_chunks: u64,
    /// Its store can hold all that may come.
    pub(super) is_roomy: bool,
    pub(super) disk: SimDisk,
    pub(super) model: ViewModel,
    pub(super) phase: Phase,
    /// Its name in this process.
    pub(super) id: Option<SnapshotId>,
    /// What it holds is not known any more: it was lost, or stands on one that was.
    pub(super) is_unknown: bool,
}

impl Node {
    pub(super) fn chunk_bytes(&self) -> u64 {
        self.chunk_sectors * SECTOR
    }
}

/// What a run is like.
pub(super) struct Plan {
    pub(super) sectors: u64,
    /// Snapshots that there may be at once, and how deep.
    pub(super) most: u64,
    pub(super) depth: u64,
    /// Snapshots to begin with.
    pub(super) begin: u64,
    pub(super) window: u64,
    pub(super) merge_step: u64,
    pub(super) copy_memory: u64,
    pub(super) copy_piece: u64,
    /// Every so many stores are too small; 0 for none.
    pub(super) small: u64,
    /// Steps of a process.
    pub(super) steps: u64,
    /// How readily operations end, in 16ths of the steps.
    pub(super) haste: u64,
    /// How often orders come, in 64ths.
    pub(super) orders: u64,
    /// Writes prefer these first cells of a view.
    pub(super) hot_cells: u64,
}

impl Plan {
    fn pick(rng: &mut Rng) -> Self {
        let forty = rng.chance(1, 40);
        let sectors = if forty { 12 } else { rng.between(9, 40) };
        let most = if forty { 40 } else { rng.between(2, 12) };
        Self {
            sectors,
            most,
            depth: if rng.chance(1, 2) {
                8
            } else {
                rng.between(2, 8)
            },
            begin: if forty { 39 } else { rng.below(most + 1) },
            window: rng.between(1, 16) * SECTOR,
            merge_step: rng.between(1, 8) * SECTOR,
            copy_memory: 4096 * rng.between(1, 4),
            copy_piece: 512 * rng.between(1, 8),
            small: if rng.chance(1, 5) {
                rng.between(2, 6)
            } else {
                0
            },
            steps: rng.between(20, 260),
            haste: rng.between(3, 9),
            orders: rng.between(1, 6),
            hot_cells: rng.between(4, sectors * CELLS as u64),
        }
    }
}

/// The disks, the models and the count.
pub(super) struct World {
    pub(super) rng: Rng,
    pub(super) plan: Plan,
    pub(super) disk: SimDisk,
    pub(super) model: ViewModel,
    pub(super) nodes: Vec<Node>,
    pub(super) clock: Time,
    pub(super) stamp: Stamp,
    pub(super) images: Vec<u64>,
    pub(super) ledger: Ledger,
    /// Print every step.
    pub(super) told: bool,
}

impl World {
    pub(super) fn new(seed: u64, checks: Checks) -> Self {
        let mut rng = Rng::new(seed);
        let plan = Plan::pick(&mut rng);
        let mut content = vec![0; (plan.sectors * SECTOR) as usize];
        pattern::fill(1, 0, &mut content);
        Self {
            disk: SimDisk::new(content),
            model: ViewModel::new(plan.sectors as usize * CELLS, |_| 1),
            nodes: Vec::new(),
            clock: 1,
            stamp: 1,
            images: Vec::new(),
            ledger: Ledger::default(),
            told: checks.told,
            rng,
            plan,
        }
    }

    pub(super) fn tick(&mut self) -> Time {
        self.clock += 1;
        self.clock
    }

    pub(super) fn model(&mut self, name: Name) -> &mut ViewModel {
        match name {
            None => &mut self.model,
            Some(index) => &mut self.nodes[index].model,
        }
    }

    /// The node's name to the tree.
    pub(super) fn view(&self, name: Name) -> View {
        let id = |index: usize| self.nodes[index].id.expect("it has come in");
        name.map_or(View::Origin, |index| View::Snapshot(id(index)))
    }

    pub(super) fn node_of(&self, id: SnapshotId) -> usize {
        let place = self.nodes.iter().position(|node| node.id == Some(id));
        place.expect("the tree names a snapshot that there is")
    }

    /// Snapshots that were taken of a node and are not gone.
    pub(super) fn snapshots_of(&self, name: Name) -> Vec<usize> {
        let of_it = |&i: &usize| self.nodes[i].origin == name && self.nodes[i].phase != Phase::Gone;
        (0..self.nodes.len()).filter(of_it).collect()
    }

    /// The node and those that it stands on, down to the disk.
    pub(super) fn path(&self, name: Name) -> Vec<usize> {
        let next = |&index: &usize| self.nodes[index].origin;
        std::iter::successors(name, next).collect()
    }

    /// A store on the way down from the node may be full.
    pub(super) fn may_be_lost(&self, name: Name) -> bool {
        self.path(name).iter().any(|&i| !self.nodes[i].is_roomy)
    }

    /// The node or one that it stands on is lost.
    pub(super) fn stands_on_lost(&self, name: Name) -> bool {
        let lost = |i: &usize| self.nodes[*i].phase == Phase::Lost;
        self.path(name).iter().any(lost)
    }

    pub(super) fn is_unknown(&self, name: Name) -> bool {
        name.is_some_and(|index| self.nodes[index].is_unknown)
    }

    /// Snapshots that are not gone.
    pub(super) fn count(&self) -> u64 {
        let there = |node: &&Node| node.phase != Phase::Gone;
        self.nodes.iter().filter(there).count() as u64
    }

    /// Think of a snapshot of `origin`, with the disk that its store is made on.
    pub(super) fn new_node(&mut self, origin: Name) -> usize {
        let Self { rng, plan, .. } = self;
        let chunk_sectors = 1 << rng.below(4);
        let chunks = plan.sectors.div_ceil(chunk_sectors);
        let is_small = plan.small > 0 && rng.chance(1, plan.small);
        let holds = if is_small { rng.below(chunks) } else { chunks };
        let limit_sectors = (store_bytes::chunks_for(holds, chunk_sectors) + 1) * chunk_sectors;
        let grows = rng.chance(1, 3);
        let ready = if grows {
            4 * chunk_sectors
        } else {
            limit_sectors
        };
        let ready = ready.min(limit_sectors);
        let mut content = vec![0; (ready * SECTOR) as usize];
        if rng.chance(1, 2) {
            pattern::fill(u32::MAX, 0, &mut content);
        }
        let depth = 1 + origin.map_or(0, |index| self.nodes[index].depth);
        let kind = if self.rng.chance(1, 4) {
            StoreKind::PersistentOverflow
        } else {
            StoreKind::Persistent
        };
        self.nodes.push(Node {
            origin,
            depth,
            kind,
            chunk_sectors,
            limit_sectors,
            step_chunks: if grows { 1 + self.rng.below(6) } else { 0 },
            is_roomy: !is_small,
            disk: SimDisk::new(content),
            model: ViewModel::new(0, |_| 0),
            phase: Phase::Creating,
            id: None,
            is_unknown: false,
        });
        if depth == 8 {
            self.ledger.count(Tally::DepthEight);
        }
        if self.count() == 40 {
            self.ledger.count(Tally::Forty);
        }
        self.nodes.len() - 1
    }

    /// Some node that a snapshot may be taken of.
    pub(super) fn pick_origin(&mut self) -> Name {
        let fits = |index: &usize| {
            let node = &self.nodes[*index];
            node.phase == Phase::Active && node.depth < self.plan.depth
        };
        let mut names: Vec<Name> = (0..self.nodes.len()).filter(fits).map(Some).collect();
        // The younger, the likelier: trees are to be deep.
        if names.is_empty() || self.rng.chance(1, 5) {
            return None;
        }
        let from = self.rng.index(names.len());
        let at = from + self.rng.index(names.len() - from);
        names.swap_remove(at)
    }

    /// The power fails, or the process is killed: what that does to the disks, and
    /// what was durably ordered and not announced.
    pub(super) fn crash(&mut self, crash: Crash) {
        for index in 0..self.nodes.len() {
            self.nodes[index].id = None;
            match self.nodes[index].phase {
                Phase::Creating => {
                    self.ledger.count(Tally::CreateUndone);
                    self.bury(index);
                }
                Phase::Removing => {
                    self.ledger.count(Tally::RemovalCutOff);
                    self.bury(index);
                }
                Phase::Active
                | Phase::Lost
                | Phase::MergeOrdered
                | Phase::Merging
                | Phase::Gone => {}
            }
        }
        let Self {
            disk, nodes, rng, ..
        } = self;
        let there = nodes.iter_mut().filter(|node| node.phase != Phase::Gone);
        let disks = std::iter::once(disk).chain(there.map(|node| &mut node.disk));
        let same = rng.chance(1, 2).then(|| Loss::pick(rng));
        let mut digest = 0;
        for disk in disks {
            match crash {
                Crash::Power => disk.power_cut(same.unwrap_or_else(|| Loss::pick(rng)), rng),
                Crash::Kill | Crash::KillAfterError => disk.kill(rng),
            }
            digest = disk.digest(digest);
        }
        if crash == Crash::Power {
            self.images.push(digest);
        }
    }

    /// A snapshot is gone; its disk is not looked at any more.
    pub(super) fn bury(&mut self, index: usize) {
        let node = &mut self.nodes[index];
        node.phase = Phase::Gone;
        node.id = None;
        node.disk = SimDisk::new(Vec::new());
        node.model = ViewModel::new(0, |_| 0);
    }

    /// A view and its model differ.
    pub(super) fn wrong(&self, what: &str, name: Name, wrong: &Wrong) -> Violation {
        let offset = pattern::byte_of(wrong.cell);
        let known = |stamp: &Stamp| pattern::matches(*stamp, offset, &wrong.found);
        let found = match (0..=self.stamp).rev().find(known) {
            Some(stamp) => format!("stamp {stamp}"),
            None => "bytes that nobody wrote there".into(),
        };
        Violation(format!(
            "{what}: {}, sector {}, cell {}, shows {found} where it may show {}",
            called(name),
            wrong.cell / CELLS,
            wrong.cell,
            wrong.allowed
        ))
    }

    /// What a node holds according to the bytes of its stores, stacked as
    /// device-mapper would, with merges that are under way where they are. None
    /// if a store on the way is invalid.
    pub(super) fn stacked(&self, name: Name) -> Option<Vec<u8>> {
        let mut bytes = self.disk.content().to_vec();
        // What a snapshot stands on is a device, without the merge that may be over it.
        for &index in self.path(name).iter().rev() {
            self.overlay(index, &mut bytes)?;
        }
        self.overlay_merge(name, &mut bytes)?;
        Some(bytes)
    }

    fn overlay_merge(&self, name: Name, bytes: &mut [u8]) -> Option<()> {
        let merging = (self.snapshots_of(name).into_iter())
            .find(|&index| self.nodes[index].phase == Phase::Merging);
        merging.map_or(Some(()), |index| self.overlay(index, bytes))
    }

    /// Put the chunks of a store in the place of those that it has exceptions for.
    fn overlay(&self, index: usize, bytes: &mut [u8]) -> Option<()> {
        let node = &self.nodes[index];
        let size = node.chunk_bytes() as usize;
        let store = node.disk.content();
        for (old, new) in store_bytes::mappings(store, node.chunk_sectors)? {
            let (from, to) = (new as usize * size, old as usize * size);
            let end = (to + size).min(bytes.len());
            bytes[to..end].copy_from_slice(&store[from..from + (end - to)]);
        }
        Some(())
    }
}

/// A node's name in messages.
pub(super) fn called(name: Name) -> String {
    name.map_or_else(|| "the disk".into(), |index| format!("snapshot {index}"))
}
