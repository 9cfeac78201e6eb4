//! A cluster as a whole: storage nodes, metadata, pools, volumes and the gateway, put together from their crates.
//!
//! [`dev`] runs all of it in one process on directories; [`host`] runs one node of a cluster of hosts. [`volumes`] owns the
//! volumes a process serves; [`export`] shows them to the gateway; [`facts`] is what both tell of themselves, [`events`]
//! what happened.
//! Of hosts: [`founding`] (how one becomes a node), [`identity`] and [`settings`] (its files), [`links`] (how others are reached),
//! [`membership`] (who is up), [`maps`] (what pools know), [`serving`] (who serves a volume), [`standby`] (guests that migrate), [`addresses`] (where it is reached), [`moves`] (where data should be) and
//! [`carry`] (bringing it there).

pub mod addresses;
#[cfg(feature = "canary")]
pub mod canary;
pub mod carry;
pub mod dev;
pub mod devices;
pub mod events;
pub mod export;
pub mod facts;
pub mod founding;
pub mod handle;
pub mod host;
pub mod identity;
pub mod links;
pub mod maps;
pub mod membership;
pub mod moves;
mod probe;
pub mod serving;
pub mod settings;
pub mod standby;
pub mod storage;
pub mod volumes;

pub use dev::{DevCluster, DevOptions};
pub use events::Events;
pub use facts::Facts;
pub use host::{Host, HostOptions};
pub use volumes::VolumeManager;

use crate::error::ClusterError;
use raft_meta::{AckPolicy, Command, MetaState, Name, Outcome};
use std::sync::Arc;
use std::time::Duration;
use xsan_env::runtime::BoxFuture;
use xsan_env::{Env, Registry};
use xsan_types::Scheme;

/// How a request ends.
pub type Done<'a, T> = BoxFuture<'a, Result<T, ClusterError>>;

/// A cluster as its administrator sees it, whatever runs it.
pub trait Cluster: Send + Sync + 'static {
    /// The world.
    fn env(&self) -> &Env;
    /// Counters of this process.
    fn registry(&self) -> &Registry;
    /// The metadata now.
    fn view(&self) -> Arc<MetaState>;
    /// Waits until the view holds everything that was answered to anybody before; `false`: the metadata does not answer in time,
    /// and the view may be old.
    fn catch_up(&self) -> BoxFuture<'_, bool>;
    /// What happened, as this process learned it.
    fn events(&self) -> &Events;
    /// Proposes a metadata command.
    fn propose(&self, command: Command) -> Done<'_, Outcome>;
    /// Makes this process follow the metadata's pools at once.
    fn follow_pools(&self) -> Done<'_, ()>;
    /// Everything that can be told.
    fn facts(&self) -> BoxFuture<'_, Facts>;
    /// Another size in bytes for a volume.
    fn resize(&self, name: String, size: u64) -> Done<'_, ()>;
    /// Removes a volume; `force`: with its clients.
    fn delete_volume(&self, name: String, force: bool) -> Done<'_, ()>;
    /// A volume has another name.
    fn renamed(&self, volume: xsan_types::VolumeId, name: &str);
    /// Stops a node that runs in this process.
    fn stop_node(&self, name: String, crash: bool) -> Done<'_, ()>;
    /// Starts a node that ran in this process.
    fn start_node(&self, name: String) -> Done<'_, ()>;
    /// Moves a volume to this process.
    fn attach(&self, name: String) -> Done<'_, ()>;
    /// Lets clients open a volume in this process while another one serves it.
    fn stand_by(&self, name: String) -> Done<'_, ()>;
    /// Looks whether a volume may have an address, as far as this process can see.
    fn check_address(&self, name: String, place: raft_meta::ServiceAddress) -> Done<'_, ()>;
    /// Makes a blank disk of this process's host a device; answers its id.
    fn add_device(&self, path: std::path::PathBuf) -> Done<'_, xsan_types::DeviceId>;
    /// A token that lets hosts in.
    fn join_token(&self, good_for: Duration, uses: u32) -> Done<'_, String>;
}

/// Makes a pool.
///
/// # Errors
/// The name is taken, or there are too few nodes for the scheme.
pub async fn create_pool(cluster: &dyn Cluster, name: &str, scheme: Scheme) -> Result<(), ClusterError> {
    let name: Name = name.parse()?;
    let command =
        Command::CreatePool { name, scheme, failure_domain: None, pg_count: None, ack: AckPolicy::Replicated };
    cluster.propose(command).await?;
    cluster.follow_pools().await
}

/// Removes an empty pool.
///
/// # Errors
/// It does not exist or has volumes.
pub async fn delete_pool(cluster: &dyn Cluster, name: &str) -> Result<(), ClusterError> {
    let pool = cluster.view().pool_named(name).ok_or_else(|| ClusterError::NoPool(name.to_owned()))?.id;
    cluster.propose(Command::DeletePool { pool }).await?;
    cluster.follow_pools().await
}
