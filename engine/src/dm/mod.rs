//! Device-mapper's devices: tables over disks, and snapshots of what they make.

mod table;

pub use table::{DeviceId, DiskId, Line, Lower, Pair, Persistence, Target};
