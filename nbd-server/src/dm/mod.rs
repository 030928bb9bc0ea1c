//! The texts of the device-mapper: tables as they are written, and as they are printed.
//!
//! - [`params`]: the arguments of one target, in the order of the kernel's checks and
//!   with the kernel's words for what is wrong with them.
//! - [`text`]: whole tables, as far as they can be judged without their devices.
//!
//! Read from Linux 6.1: drivers/md/dm-table.c, dm-linear.c, dm-stripe.c, dm-snap.c,
//! dm-exception-store.c.

pub mod params;
pub mod text;
