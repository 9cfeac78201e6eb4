//! One volume = one log: append, index, read, checkpoint, recovery.
#![forbid(unsafe_code)]

pub mod store;

pub use store::{Check, Holes, NewMember, Registers, RowWriter, SegmentRead, SegmentStore, StoreError, StoreResult};
