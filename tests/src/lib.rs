//! Model, simulator and harness.

pub mod harness;
pub mod kernel;
pub mod model;
pub mod pattern;
pub mod simulator;
pub mod store_bytes;
pub mod workload;
