//! The outside world, behind one crate: time, randomness, tasks, memory for direct I/O, disks, files and sockets.
//!
//! Everything above asks an [`Env`] for these and for nothing else, so that the same node, pool, volume and metadata
//! code runs on an operating system and, from one seed, in the simulator. Reading order: [`runtime`], [`buf`], [`disk`],
//! [`mod@file`], [`net`], [`addresses`], [`metrics`]; then what stands behind them: [`os`], [`os_disk`], [`memory`].

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "this crate is where the calls banned elsewhere live"
)]

pub mod addresses;
pub mod buf;
pub mod disk;
pub mod error;
#[cfg(any(test, feature = "faults"))]
pub mod faults;
pub mod file;
pub mod memory;
pub mod metrics;
pub mod net;
pub mod os;
pub mod os_disk;
pub mod runtime;
#[cfg(test)]
mod testing;
mod threads;
mod uring;

pub use buf::{Buf, BufMut, BufPool};
pub use disk::{Disk, Geometry, IoFuture};
pub use file::{AppendFile, Directory};
pub use memory::MemoryDisk;
pub use metrics::{Counter, Gauge, Histogram, Registry};
pub use net::{Listener, Stream};
pub use os::OsRuntime;
pub use runtime::{Env, Moment, Runtime, TaskHandle, yield_now};
