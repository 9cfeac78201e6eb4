//! One pool: segments spread over devices. Implements `lsm-block`'s `SegmentStore` on top of `NodeApi`.
//!
//! Owner: the process that runs volume owners; one [`Pool`] serves all volumes of its pool. It keeps no state that must
//! survive: the map comes from outside ([`Pool::set_view`]), names and lengths from the volume.
//!
//! - [`view`]: the map, resolved for quick look-ups. - [`plan`]: which devices and which placement group. - [`members`]:
//!   journal calls, passed on. - [`seal`] with [`encode`] and [`put`]: segment to shards to devices. - [`read`] with
//!   [`degraded`] and [`repair`]: one shard read when all is well, any k shards when not. - [`holes`]: missing positions
//!   rebuilt from verified shards. - [`rows`]: large writes straight to k+m extents (P9). - [`load`]: how quick each device
//!   answers, for hedges.
//!
//! Bounds: memory of seals, hole filling and repairs by [`PoolConfig::encode_bytes_max`]; reads and appends hold what their
//! callers hold. Nothing is read on the write path: [`PoolStats::shard_reads`] proves it.
#![forbid(unsafe_code)]

mod config;
mod degraded;
mod encode;
mod error;
mod holes;
mod load;
mod members;
mod plan;
mod pool;
mod put;
mod read;
mod repair;
mod rows;
mod seal;
mod stats;
mod task;
mod view;

pub use config::PoolConfig;
pub use error::PoolError;
pub use pool::Pool;
pub use stats::PoolStats;
pub use view::{DeviceView, PoolView};
