//! `xsan dev`: a whole cluster in one process, on directories of one machine. The same nodes, pools, volumes and gateway as
//! on real hosts; only the calls between them are direct.
//!
//! Layout of the directory: `lock`, `meta/` (metadata), `nN/device.img` and `nN/index/` per node, `admin.sock`, `nbd.sock`.

use super::handle::NodeHandle;
use super::volumes::VolumeManager;
use crate::error::ClusterError;
use lsm_block::Tuning;
use lsm_block::index::PageCache;
use raft_meta::{AckPolicy, Command, Consensus, MetaState, Name, NodeState, Options, Outcome, SingleReplica};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use xsan_env::os_disk::{Backend, DiskOptions, IoDriver};
use xsan_env::{BufPool, Disk, Env, Registry};
use xsan_node::{DeviceHandle, DeviceIdentity, FjallIndex, Node, NodeConfig, NodeOpenError};
use xsan_pool::{DeviceView, Pool, PoolConfig, PoolView};
use xsan_types::{ClusterId, DeviceId, NodeId, PoolId, RegisterView, Scheme};
use xsan_wire::node::{DeviceStatus, NodeApi};

/// How a development cluster is made or reopened.
#[derive(Clone, Debug)]
pub struct DevOptions {
    /// Where everything lies.
    pub dir: PathBuf,
    /// Storage nodes; `None`: as many as there are, or six.
    pub nodes: Option<usize>,
    /// Size of a new node's device in bytes; `None`: a share of the free space.
    pub device_bytes: Option<u64>,
    /// How disks are reached.
    pub backend: Backend,
    /// I/O memory registered with the kernel, in bytes.
    pub arena_bytes: usize,
    /// Memory for index pages, in bytes.
    pub page_cache_bytes: usize,
    /// Bounds of volumes.
    pub tuning: Tuning,
}

impl DevOptions {
    /// The defaults on `dir`.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            nodes: None,
            device_bytes: None,
            backend: Backend::Auto,
            arena_bytes: 96 << 20,
            page_cache_bytes: 64 << 20,
            tuning: Tuning::default(),
        }
    }
}

/// Nodes of a new cluster.
const NODES_DEFAULT: usize = 6;
/// Most nodes of a development cluster.
const NODES_MAX: usize = 64;
/// Smallest device.
const DEVICE_BYTES_MIN: u64 = 1 << 30;

/// The scheme of the default pool of so many nodes.
///
/// # Errors
/// None for 1 and more nodes.
pub fn default_scheme(nodes: usize) -> Scheme {
    let scheme = match nodes {
        0 | 1 => Scheme::replica(1),
        2 => Scheme::replica(2),
        3 => Scheme::rs(2, 1),
        4 | 5 => Scheme::rs(2, 2),
        _ => Scheme::rs(4, 2),
    };
    scheme.expect("valid by construction")
}

/// A node of the cluster.
pub struct DevNode {
    /// Its id.
    pub id: NodeId,
    /// Its name.
    pub name: String,
    /// Its device.
    pub device: DeviceId,
    /// How pools reach it.
    pub handle: Arc<NodeHandle>,
    dir: PathBuf,
    /// The running node. Taken out when it stops.
    running: Mutex<Option<Arc<Node>>>,
    /// Since when (wall clock, milliseconds) it is as it is.
    since: Mutex<u64>,
}

impl DevNode {
    /// Since when it is up or stopped, by the wall clock in milliseconds.
    #[must_use]
    pub fn since_millis(&self) -> u64 {
        *self.since.lock().expect("since lock")
    }

    /// The running node.
    #[must_use]
    pub fn running(&self) -> Option<Arc<Node>> {
        self.running.lock().expect("running lock").clone()
    }
}

/// A running development cluster.
pub struct DevCluster {
    env: Env,
    options: DevOptions,
    registry: Registry,
    buffers: BufPool,
    driver: IoDriver,
    meta: Arc<SingleReplica>,
    nodes: Vec<DevNode>,
    volumes: VolumeManager,
    /// Serialises stops, starts and map changes.
    changing: tokio::sync::Mutex<()>,
    _lock: std::fs::File,
}

impl DevCluster {
    /// Makes or reopens the cluster in `options.dir`.
    ///
    /// # Errors
    /// Another process runs there, the directory holds another number of nodes, or a part cannot be opened.
    pub async fn open(env: &Env, options: DevOptions) -> Result<Self, ClusterError> {
        let dir = options.dir.clone();
        let made = env.blocking(move || prepare_dir(&dir)).await;
        let lock = made.map_err(|error| match error.kind() {
            std::io::ErrorKind::WouldBlock => ClusterError::Busy(options.dir.clone()),
            _ => ClusterError::Io { what: format!("cannot use {}", options.dir.display()), source: error },
        })?;
        let buffers = BufPool::new(options.arena_bytes, 64 << 20);
        let driver = IoDriver::start(env, &buffers, options.backend).map_err(ClusterError::io("disk I/O"))?;
        let meta = Arc::new(open_meta(env, &options.dir.join("meta")).await?);
        let cache = Arc::new(PageCache::new(options.page_cache_bytes));
        let consensus = Arc::clone(&meta) as Arc<dyn Consensus>;
        let volumes = VolumeManager::new(env.clone(), buffers.clone(), cache, consensus, options.tuning);
        let mut cluster = Self {
            env: env.clone(),
            options,
            registry: Registry::new(),
            buffers,
            driver,
            meta,
            nodes: Vec::new(),
            volumes,
            changing: tokio::sync::Mutex::new(()),
            _lock: lock,
        };
        cluster.open_nodes().await?;
        cluster.open_pools().await?;
        cluster.tell_registers(None).await;
        Ok(cluster)
    }

    /// The world.
    #[must_use]
    pub fn env(&self) -> &Env {
        &self.env
    }

    /// Where everything lies.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.options.dir
    }

    /// I/O memory.
    #[must_use]
    pub fn buffers(&self) -> &BufPool {
        &self.buffers
    }

    /// `uring` or `threads`.
    #[must_use]
    pub fn backend(&self) -> &'static str {
        self.driver.backend()
    }

    /// Counters of all parts.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The metadata now.
    #[must_use]
    pub fn view(&self) -> Arc<MetaState> {
        self.meta.view()
    }

    /// The volumes.
    #[must_use]
    pub fn volumes(&self) -> &VolumeManager {
        &self.volumes
    }

    /// The nodes, in order.
    #[must_use]
    pub fn nodes(&self) -> &[DevNode] {
        &self.nodes
    }

    /// Proposes a metadata command.
    ///
    /// # Errors
    /// Why it was refused.
    pub async fn propose(&self, command: Command) -> Result<Outcome, ClusterError> {
        Ok(self.meta.propose(command).await?)
    }

    /// Makes a pool and serves it.
    ///
    /// # Errors
    /// The name is taken, or there are too few nodes for the scheme.
    pub async fn create_pool(&self, name: &str, scheme: Scheme) -> Result<PoolId, ClusterError> {
        let name: Name = name.parse()?;
        let _changing = self.changing.lock().await;
        let command =
            Command::CreatePool { name, scheme, failure_domain: None, pg_count: None, ack: AckPolicy::Replicated };
        let Outcome::Pool(id) = self.propose(command).await? else {
            return Err(ClusterError::Invalid("the metadata answered another command".into()));
        };
        self.serve_pool(id).await?;
        Ok(id)
    }

    /// Removes an empty pool.
    ///
    /// # Errors
    /// It does not exist or has volumes.
    pub async fn delete_pool(&self, name: &str) -> Result<(), ClusterError> {
        let _changing = self.changing.lock().await;
        let view = self.view();
        let pool = view.pool_named(name).ok_or_else(|| ClusterError::NoPool(name.to_owned()))?.id;
        self.propose(Command::DeletePool { pool }).await?;
        self.volumes.remove_pool(pool);
        Ok(())
    }

    /// Stops a node: cleanly, or as a crash of its process would (nothing is flushed, calls under way fail).
    ///
    /// # Errors
    /// No such node; it is stopped already.
    pub async fn stop_node(&self, name: &str, crash: bool) -> Result<(), ClusterError> {
        let _changing = self.changing.lock().await;
        let node = self.node(name)?;
        let running = node.running.lock().expect("running lock").take();
        let Some(running) = running else {
            return Err(ClusterError::Invalid(format!("node {name} is stopped already")));
        };
        // First the map, so that nothing new is sent there; then the calls under way fail.
        self.mark(node, NodeState::Down).await?;
        node.handle.stop();
        self.refresh_views().await?;
        if crash {
            running.kill().await;
        } else {
            running.close().await;
        }
        Ok(())
    }

    /// Starts a stopped node: a new incarnation on its disk.
    ///
    /// # Errors
    /// No such node; it runs already; its disk cannot be opened.
    pub async fn start_node(&self, name: &str) -> Result<(), ClusterError> {
        let _changing = self.changing.lock().await;
        let node = self.node(name)?;
        if node.running().is_some() {
            return Err(ClusterError::Invalid(format!("node {name} runs already")));
        }
        let (running, _) = self.open_node(&node.name, &node.dir, node.id).await?;
        node.handle.start(Arc::clone(&running) as Arc<dyn NodeApi>);
        *node.running.lock().expect("running lock") = Some(running);
        self.mark(node, NodeState::Up).await?;
        self.refresh_views().await?;
        self.tell_registers(Some(&node.handle)).await;
        Ok(())
    }

    /// Devices of a node, if it runs.
    pub async fn device_status(&self, node: &DevNode) -> Option<Vec<DeviceStatus>> {
        node.handle.devices().await.ok()
    }

    /// Hands volumes over, closes nodes and metadata.
    pub async fn close(&self) {
        self.volumes.close().await;
        for node in &self.nodes {
            let running = node.running.lock().expect("running lock").take();
            if let Some(running) = running {
                running.close().await;
            }
        }
        self.meta.close().await;
    }

    fn node(&self, name: &str) -> Result<&DevNode, ClusterError> {
        self.nodes.iter().find(|node| node.name == name).ok_or_else(|| ClusterError::NoNode(name.to_owned()))
    }

    async fn mark(&self, node: &DevNode, state: NodeState) -> Result<(), ClusterError> {
        *node.since.lock().expect("since lock") = self.env.wall_millis();
        self.propose(Command::SetNodeState { node: node.id, state }).await?;
        Ok(())
    }

    async fn open_nodes(&mut self) -> Result<(), ClusterError> {
        let view = self.view();
        let found = view.nodes.len();
        let wanted = match (found, self.options.nodes) {
            (0, asked) => asked.unwrap_or(NODES_DEFAULT),
            (found, Some(asked)) if asked != found => {
                return Err(ClusterError::NodeCount { dir: self.options.dir.clone(), found, asked });
            }
            (found, _) => found,
        };
        if !(1..=NODES_MAX).contains(&wanted) {
            return Err(ClusterError::Invalid(format!("a development cluster has 1 to {NODES_MAX} nodes")));
        }
        if wanted == 1 {
            tracing::warn!("one node: a lost disk loses everything");
        }
        for number in 1..=wanted {
            self.add_node(&format!("n{number}"), wanted).await?;
        }
        Ok(())
    }

    /// Opens node `name`, or makes it.
    async fn add_node(&mut self, name: &str, of: usize) -> Result<(), ClusterError> {
        let dir = self.options.dir.join(name);
        let view = self.view();
        let (id, known) = match view.node_named(name) {
            Some(node) => (node.id, Some(node.state)),
            None => {
                let host: Name = "localhost".parse()?;
                let command = Command::AddNode { name: name.parse()?, host, rack: None, zone: None };
                let Outcome::Node(id) = self.propose(command).await? else {
                    return Err(ClusterError::Invalid("the metadata answered another command".into()));
                };
                (id, None)
            }
        };
        let device = view.devices_of(id).next().map(|device| device.id);
        let handle = Arc::new(NodeHandle::default());
        let stopped = known == Some(NodeState::Down);
        let (running, device) = match (stopped, device) {
            // A node that was stopped stays stopped.
            (true, Some(device)) => (None, device),
            (_, device) => {
                self.make_device(&dir, id, device.is_some(), of).await?;
                let (running, status) = self.open_node(name, &dir, id).await?;
                if device.is_none() {
                    let capacity = status.capacity;
                    self.propose(Command::AddDevice { device: status.device, node: id, capacity }).await?;
                }
                handle.start(Arc::clone(&running) as Arc<dyn NodeApi>);
                (Some(running), status.device)
            }
        };
        let node = DevNode {
            id,
            name: name.to_owned(),
            device,
            handle,
            dir,
            running: Mutex::new(running),
            since: Mutex::new(self.env.wall_millis()),
        };
        if !matches!(known, Some(NodeState::Up | NodeState::Down)) {
            self.mark(&node, NodeState::Up).await?;
        }
        self.nodes.push(node);
        Ok(())
    }

    /// Formats a node's device if the cluster does not know one yet.
    async fn make_device(&self, dir: &Path, id: NodeId, known: bool, of: usize) -> Result<(), ClusterError> {
        if known {
            return Ok(());
        }
        let path = dir.to_owned();
        let made = self.env.blocking(move || std::fs::create_dir_all(&path)).await;
        made.map_err(ClusterError::io(format!("cannot make {}", dir.display())))?;
        let bytes = match self.options.device_bytes {
            Some(bytes) => bytes,
            None => {
                let free = free_bytes(&self.options.dir).map_err(ClusterError::io("cannot see the free space"))?;
                (free / 10 * 8 / of as u64).max(DEVICE_BYTES_MIN) / (1 << 20) * (1 << 20)
            }
        };
        let disk = self.open_disk(dir, Some(bytes)).await?;
        let identity =
            DeviceIdentity { cluster: self.view().cluster, node: id, device: DeviceId(self.env.random_u128()) };
        Node::format(&self.env, &disk, identity)
            .await
            .map_err(|error| ClusterError::Node { node: id.to_string(), reason: error.to_string() })
    }

    async fn open_disk(&self, dir: &Path, create_bytes: Option<u64>) -> Result<Arc<dyn Disk>, ClusterError> {
        let path = dir.join("device.img");
        let what = format!("cannot open {}", path.display());
        self.driver.open_disk(DiskOptions { path, create_bytes }).await.map_err(ClusterError::io(what))
    }

    /// The shard index is a view of the device: a damaged one is set aside and filled again.
    async fn open_node(&self, name: &str, dir: &Path, id: NodeId) -> Result<(Arc<Node>, DeviceStatus), ClusterError> {
        let failed = |reason: String| ClusterError::Node { node: name.to_owned(), reason };
        let disk = self.open_disk(dir, None).await?;
        let index = dir.join("index");
        let opened = match self.open_device(Arc::clone(&disk), &index, id).await {
            Err(error) if error.blames_index() => {
                let aside = index.with_extension(format!("damaged-{}", self.env.wall_millis()));
                tracing::warn!(
                    node = name, %error, aside = %aside.display(),
                    "the shard index is damaged: it is set aside and made anew from the device"
                );
                let (from, to) = (index.clone(), aside);
                let moved = self.env.blocking(move || std::fs::rename(from, to)).await;
                moved.map_err(|error| failed(error.to_string()))?;
                self.open_device(disk, &index, id).await
            }
            opened => opened,
        };
        let node = opened.map_err(|error| failed(error.to_string()))?;
        let status = node.devices().await.map_err(|error| failed(error.to_string()))?;
        let status = status.into_iter().next().ok_or_else(|| failed("it has no device".into()))?;
        Ok((node, status))
    }

    async fn open_device(&self, disk: Arc<dyn Disk>, index: &Path, id: NodeId) -> Result<Arc<Node>, NodeOpenError> {
        let index = Box::new(FjallIndex::open(&self.env, index.to_owned()).await?);
        let config = NodeConfig::new(self.view().cluster, id, self.buffers.clone());
        Node::open(&self.env, config, vec![DeviceHandle { disk, index }]).await
    }

    async fn open_pools(&self) -> Result<(), ClusterError> {
        if self.view().pools.is_empty() {
            let scheme = default_scheme(self.nodes.len());
            let command = Command::CreatePool {
                name: "default".parse()?,
                scheme,
                failure_domain: None,
                pg_count: None,
                ack: AckPolicy::Replicated,
            };
            self.propose(command).await?;
        }
        let ids: Vec<PoolId> = self.view().pools.keys().copied().collect();
        for id in ids {
            self.serve_pool(id).await?;
        }
        Ok(())
    }

    async fn serve_pool(&self, id: PoolId) -> Result<(), ClusterError> {
        let view = self.view();
        let pool = view.pools.get(&id).ok_or_else(|| ClusterError::NoPool(id.to_string()))?;
        let mut config = PoolConfig::new(id, pool.name.as_str(), pool.scheme);
        config.registry = self.registry.clone();
        let map = self.pool_view(&view, id).await?;
        let pool = Pool::new(self.env.clone(), config, map, self.buffers.clone())?;
        self.volumes.add_pool(id, Arc::new(pool));
        Ok(())
    }

    /// The map of a pool as metadata and nodes are now.
    async fn pool_view(&self, view: &MetaState, id: PoolId) -> Result<Arc<PoolView>, ClusterError> {
        let pool = view.pools.get(&id).ok_or_else(|| ClusterError::NoPool(id.to_string()))?;
        let mut devices = BTreeMap::new();
        for node in &self.nodes {
            let status = node.handle.devices().await.ok().and_then(|devices| devices.into_iter().next());
            devices.insert(
                node.device,
                DeviceView {
                    node: Arc::clone(&node.handle) as Arc<dyn NodeApi>,
                    domain: Arc::from(node.name.as_str()),
                    up: node.handle.is_up(),
                    sector: status.map_or(512, |status| status.sector),
                    free: status.map_or(0, |status| status.capacity.saturating_sub(status.used)),
                },
            );
        }
        Ok(Arc::new(PoolView { epoch: view.epoch, table: pool.table.positions.clone(), devices }))
    }

    async fn refresh_views(&self) -> Result<(), ClusterError> {
        let view = self.view();
        for (id, pool) in self.volumes.pools() {
            pool.set_view(self.pool_view(&view, id).await?)?;
        }
        Ok(())
    }

    /// Tells nodes of every register, so that one that was away frees what no longer counts.
    async fn tell_registers(&self, only: Option<&Arc<NodeHandle>>) {
        let view = self.view();
        let registers: Vec<RegisterView> = view.volumes.values().map(raft_meta::Volume::register_view).collect();
        for node in &self.nodes {
            if only.is_some_and(|only| !Arc::ptr_eq(only, &node.handle)) || !node.handle.is_up() {
                continue;
            }
            for register in &registers {
                // A volume that was never owned has nothing to free. One without a set may be between an owner's first
                // words: what is unregistered then may be about to serve.
                if (register.set.is_some() || register.deleted)
                    && let Err(error) = node.handle.registered(*register).await
                {
                    tracing::warn!(node = node.name, volume = %register.volume, %error, "cannot free what is old");
                }
            }
        }
    }
}

async fn open_meta(env: &Env, dir: &Path) -> Result<SingleReplica, ClusterError> {
    let files = xsan_env::file::OsDirectory::open(env, dir).await;
    let files = files.map_err(ClusterError::io(format!("cannot open {}", dir.display())))?;
    let cluster = ClusterId(env.random_u128());
    let genesis = move || MetaState::new(cluster, true);
    Ok(SingleReplica::open_or_create(env, Arc::new(files), Options::default(), genesis).await?)
}

/// Makes the directory and locks it for this process.
fn prepare_dir(dir: &Path) -> std::io::Result<std::fs::File> {
    std::fs::create_dir_all(dir)?;
    let lock = std::fs::OpenOptions::new().create(true).truncate(false).write(true).open(dir.join("lock"))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(std::fs::TryLockError::WouldBlock) => Err(std::io::ErrorKind::WouldBlock.into()),
        Err(std::fs::TryLockError::Error(error)) => Err(error),
    }
}

/// Bytes that may still be written below `dir`.
fn free_bytes(dir: &Path) -> std::io::Result<u64> {
    xsan_env::file::free_bytes(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_pool_follows_the_number_of_nodes() {
        let table = [
            (1, "replica(1)"),
            (2, "replica(2)"),
            (3, "rs(2,1)"),
            (4, "rs(2,2)"),
            (5, "rs(2,2)"),
            (6, "rs(4,2)"),
            (12, "rs(4,2)"),
        ];
        for (nodes, scheme) in table {
            assert_eq!(default_scheme(nodes).to_string(), scheme, "{nodes} nodes");
        }
    }
}
