//! `nbdsnap dm` beside dmsetup and the kernel: the same commands, the same requests
//! between them, the same answers, the same bytes. What differs is told with the
//! steps that led there, and each comparison is shown that it can differ.

#[path = "dm/differential.rs"]
mod differential;
#[path = "dm/pieces.rs"]
mod pieces;
#[path = "dm/walkthroughs.rs"]
mod walkthroughs;

const SUITE: &str = "kernel_dm";

/// Plays steps inside the virtual machine.
const PLAYER: &str = env!("CARGO_BIN_EXE_dm-player");
