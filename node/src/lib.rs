//! A storage node: devices with their log, allocator, journal members, shards and open shards.
//!
//! [`Node`] implements [`xsan_wire::NodeApi`] over any [`xsan_env::Disk`]. Bytes: docs/format/device.md. Reading order:
//! [`mod@format`], [`allocator`], [`state`], [`shard_index`], [`device`], [`node`].
#![forbid(unsafe_code)]

pub mod allocator;
pub mod counters;
pub mod device;
pub mod error;
mod finish;
mod flush;
pub mod format;
mod journal;
mod log;
pub mod node;
pub mod places;
mod rebuild;
pub mod shard_index;
mod shards;
pub mod state;

pub use counters::NodeCounters;
pub use error::NodeOpenError;
pub use node::{DeviceHandle, DeviceIdentity, Node, NodeConfig};
pub use places::Assignment;
pub use shard_index::fjall::FjallIndex;
pub use shard_index::{MemoryIndex, ShardIndex};
