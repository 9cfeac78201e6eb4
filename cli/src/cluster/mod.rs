//! A cluster as a whole: storage nodes, metadata, pools, volumes and the gateway, put together from their crates.
//!
//! [`dev`] runs all of it in one process on directories. [`volumes`] owns the volumes this process serves; [`export`] shows
//! them to the gateway; [`handle`] is how pools reach a node that can be stopped and started.

pub mod dev;
pub mod export;
pub mod handle;
pub mod volumes;

pub use dev::{DevCluster, DevOptions};
pub use volumes::VolumeManager;
