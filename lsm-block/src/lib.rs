//! One volume = one log: append, index, read, checkpoint, recovery.
//!
//! Reading order: [`store`] (what is needed from below), [`segment`] (bytes), [`index`] (where blocks are), [`volume`] (the
//! owner's state machine).
#![forbid(unsafe_code)]

pub mod error;
pub mod index;
pub mod memory_store;
pub mod segment;
pub mod store;
pub mod volume;

pub use error::VolumeError;
pub use store::{Check, Holes, NewMember, Registers, RowWriter, SegmentRead, SegmentStore, StoreError, StoreResult};
pub use volume::{AckPolicy, Health, Piece, Tuning, Volume, VolumeConfig, VolumeCounters, VolumeStatus};
