//! Stores in the hands of the kernel's dm-snapshot: full ones, cut-off ones, LVM's,
//! merges that change hands, snapshots of snapshots, all of them offline, and the two
//! procedures with dmsetup that people follow today. Each needs a machine for itself, and
//! one processor of it: as one suite they run side by side.

#[path = "stores/full.rs"]
mod full;
#[path = "stores/lvm.rs"]
mod lvm;
#[path = "stores/merges.rs"]
mod merges;
#[path = "stores/offline.rs"]
mod offline;
#[path = "stores/power_cuts.rs"]
mod power_cuts;
#[path = "stores/trees.rs"]
mod trees;
#[path = "stores/walkthroughs.rs"]
mod walkthroughs;

const SUITE: &str = "kernel_stores";
