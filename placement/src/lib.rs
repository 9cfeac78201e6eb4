//! Which device holds which shard position of which placement group.
//!
//! Pure: functions of a [`Topology`], a [`Shape`] and, when there is one, the previous [`PgTable`]. No I/O, no clock, no
//! randomness; the same inputs give the same table on every machine (only integer and IEEE basic operations decide), in
//! whatever order the devices are listed. Reading order: [`topology`], [`table`], `hash`, [`mod@assign`], [`mod@diff`],
//! [`mod@check`].
//!
//! The rule (design.md section 6): weighted highest-random-weight hashing over failure domains, then over the devices of
//! a domain, with bounded load. Positions are pinned: a shard's index is part of its bytes, so an ordered list that
//! shifts would move several times more data than a set that changes (crates.md section 5).
#![forbid(unsafe_code)]

pub mod assign;
pub mod check;
pub mod diff;
pub mod error;
mod hash;
pub mod table;
mod targets;
pub mod topology;

pub use assign::{assign, assign_with_holes, suggested_pg_count};
pub use check::{DeviceLoad, Report, Violation, check};
pub use diff::{Diff, Move, diff};
pub use error::PlacementError;
pub use table::{PgTable, Shape};
pub use topology::{Device, DeviceState, FailureDomain, Topology};
