//! `xsan dev`: a whole cluster in one process, on directories of one machine. The same nodes, pools, volumes and gateway as
//! on real hosts; only the calls between them are direct.
//!
//! Layout of the directory: `lock`, `meta/` (metadata), `nN/device.img` and `nN/index/` per node, `admin.sock`, `nbd.sock`.

use super::export::export_key;
use super::facts::{Facts, NodeFacts, NodeReport};
use super::founding::Mute;
use super::handle::NodeHandle;
use super::storage::{Storage, lock_directory, share_of_space};
use super::volumes::{Attached, VolumeManager};
use super::{Cluster, Done, Events, events};
use crate::error::ClusterError;
use lsm_block::Tuning;
use lsm_block::index::PageCache;
use raft_meta::{
    AckPolicy, Command, Consensus, FormatError, GroupOptions, MetaState, Name, NodeState, Outcome, RaftGroup,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use xsan_env::os_disk::{Backend, IoDriver};
use xsan_env::runtime::{BoxFuture, TaskHandle};
use xsan_env::{BufPool, Directory, Env, Registry};
use xsan_gateway::server::Server as Gateway;
use xsan_node::{DeviceIdentity, Node};
use xsan_pool::{DeviceView, Pool, PoolConfig, PoolView};
use xsan_types::{ClusterId, DeviceId, Generation, NodeId, PoolId, RegisterView, Scheme, VolumeId};
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
pub const NODES_DEFAULT: usize = 6;
/// Most nodes of a development cluster.
pub const NODES_MAX: usize = 64;

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
    events: Arc<Events>,
    buffers: BufPool,
    storage: Storage,
    meta: RaftGroup,
    nodes: Vec<DevNode>,
    volumes: VolumeManager,
    gateway: OnceLock<Gateway>,
    /// What tells of events.
    following: Mutex<Option<TaskHandle>>,
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
        let lock = lock_directory(env, &options.dir).await?;
        let buffers = BufPool::new(options.arena_bytes, 64 << 20);
        let driver = IoDriver::start(env, &buffers, options.backend).map_err(ClusterError::io("disk I/O"))?;
        let meta = open_meta(env, &options.dir.join("meta")).await?;
        let cache = Arc::new(PageCache::new(options.page_cache_bytes));
        let consensus: Arc<dyn Consensus> = Arc::new(meta.clone());
        let volumes = VolumeManager::new(env.clone(), buffers.clone(), cache, consensus, options.tuning);
        let mut cluster = Self {
            env: env.clone(),
            options,
            registry: Registry::new(),
            events: Arc::default(),
            storage: Storage::new(env, driver, &buffers),
            buffers,
            meta,
            nodes: Vec::new(),
            volumes,
            gateway: OnceLock::new(),
            following: Mutex::new(None),
            changing: tokio::sync::Mutex::new(()),
            _lock: lock,
        };
        cluster.open_nodes().await?;
        cluster.open_pools().await?;
        cluster.tell_registers(None).await;
        let told = events::follow(env.clone(), Arc::new(cluster.meta.clone()), Arc::clone(&cluster.events));
        *cluster.following.lock().expect("task lock") = Some(env.spawn("events", told));
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
        self.storage.backend()
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

    /// The gateway whose clients are counted and cut off.
    pub fn set_gateway(&self, gateway: Gateway) {
        // Set once, by whoever made it.
        let _ = self.gateway.set(gateway);
    }

    fn clients(&self, volume: VolumeId) -> usize {
        self.gateway.get().map_or(0, |gateway| gateway.clients(&export_key(volume)).len())
    }

    async fn attached(&self, name: &str) -> Result<Arc<Attached>, ClusterError> {
        let volume = self.view().volume_named(name).map(|volume| volume.id);
        self.volumes.attach(volume.ok_or_else(|| ClusterError::NoVolume(name.to_owned()))?).await
    }

    async fn delete_volume(&self, name: &str, force: bool) -> Result<(), ClusterError> {
        let view = self.view();
        let volume = view.volume_named(name).ok_or_else(|| ClusterError::NoVolume(name.to_owned()))?;
        let clients = self.clients(volume.id);
        if clients > 0 && !force {
            return Err(ClusterError::InUse { name: name.to_owned(), clients });
        }
        self.volumes.delete(volume.id, volume.pool).await?;
        if let Some(gateway) = self.gateway.get() {
            gateway.disconnect(&export_key(volume.id)).await;
        }
        Ok(())
    }

    async fn follow_pools(&self) -> Result<(), ClusterError> {
        let _changing = self.changing.lock().await;
        let (view, served) = (self.view(), self.volumes.pools());
        for &id in view.pools.keys().filter(|id| !served.contains_key(id)) {
            self.serve_pool(id).await?;
        }
        for &id in served.keys().filter(|id| !view.pools.contains_key(id)) {
            self.volumes.remove_pool(id);
        }
        Ok(())
    }

    async fn facts(&self) -> Facts {
        let mut nodes = Vec::new();
        let mut statuses = Some(self.volumes.statuses());
        for node in &self.nodes {
            let running = node.running();
            let mut report = match &running {
                Some(running) => Some(NodeReport::of_storage(running).await),
                None => None,
            };
            // The process serves the volumes, whichever of its nodes they are told under.
            if let (Some(report), Some(statuses)) = (&mut report, statuses.take_if(|_| running.is_some())) {
                report.add_volumes(&statuses, |id| self.clients(id));
            }
            nodes.push(NodeFacts {
                id: node.id,
                state: if running.is_some() { NodeState::Up } else { NodeState::Down },
                since_millis: *node.since.lock().expect("since lock"),
                reason: if running.is_some() { "it runs" } else { "it was stopped" }.to_owned(),
                address: String::new(),
                metadata: None,
                report,
            });
        }
        let unserved = statuses.map(|statuses| {
            let mut report = NodeReport::default();
            report.add_volumes(&statuses, |id| self.clients(id));
            report
        });
        Facts {
            view: self.view(),
            metadata_answers: true,
            nodes,
            unplaced: unserved,
            io_backend: self.backend(),
            dir: self.dir().to_owned(),
        }
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
        if let Some(following) = self.following.lock().expect("task lock").take() {
            following.abort();
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
            None => share_of_space(&self.options.dir, of)?,
        };
        let disk = self.storage.open_disk(&dir.join("device.img"), Some(bytes)).await?;
        let identity =
            DeviceIdentity { cluster: self.view().cluster, node: id, device: DeviceId(self.env.random_u128()) };
        self.storage.format(&disk, identity).await
    }

    async fn open_node(&self, name: &str, dir: &Path, id: NodeId) -> Result<(Arc<Node>, DeviceStatus), ClusterError> {
        let failed = |reason: String| ClusterError::Node { node: name.to_owned(), reason };
        let disk = self.storage.open_disk(&dir.join("device.img"), None).await?;
        let node = self.storage.open_node(self.view().cluster, id).await?;
        self.storage.add_device(&node, name, &(disk, dir.join("index"))).await?;
        let status = node.devices().await.map_err(|error| failed(error.to_string()))?;
        let status = status.into_iter().next().ok_or_else(|| failed("it has no device".into()))?;
        Ok((node, status))
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
                    leaving: false,
                    sector: status.map_or(512, |status| status.sector),
                    free: status.map_or(0, |status| status.capacity.saturating_sub(status.used)),
                },
            );
        }
        Ok(Arc::new(PoolView { epoch: view.epoch, table: pool.table.positions.clone(), before: Vec::new(), devices }))
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
                // A volume that was never owned has nothing to free.
                if (register.generation > Generation::default() || register.deleted)
                    && let Err(error) = node.handle.registered(*register).await
                {
                    tracing::warn!(node = node.name, volume = %register.volume, %error, "cannot free what is old");
                }
            }
        }
    }
}

fn only_hosts<T: Send + 'static>() -> Done<'static, T> {
    Box::pin(std::future::ready(Err(ClusterError::Invalid(
        "`xsan dev` runs its nodes in one process: this is for clusters of hosts, or `xsan dev --processes`".into(),
    ))))
}

impl Cluster for DevCluster {
    fn env(&self) -> &Env {
        &self.env
    }
    fn registry(&self) -> &Registry {
        &self.registry
    }
    fn view(&self) -> Arc<MetaState> {
        self.meta.view()
    }
    fn catch_up(&self) -> BoxFuture<'_, bool> {
        // The only replica: its view is the truth.
        Box::pin(std::future::ready(true))
    }
    fn events(&self) -> &Events {
        &self.events
    }
    fn propose(&self, command: Command) -> Done<'_, Outcome> {
        Box::pin(self.propose(command))
    }
    fn follow_pools(&self) -> Done<'_, ()> {
        Box::pin(self.follow_pools())
    }
    fn facts(&self) -> BoxFuture<'_, Facts> {
        Box::pin(self.facts())
    }
    fn resize(&self, name: String, size: u64) -> Done<'_, ()> {
        Box::pin(async move { Ok(self.attached(&name).await?.volume.resize(size).await?) })
    }
    fn delete_volume(&self, name: String, force: bool) -> Done<'_, ()> {
        Box::pin(async move { self.delete_volume(&name, force).await })
    }
    fn renamed(&self, volume: VolumeId, name: &str) {
        self.volumes.renamed(volume, name);
    }
    fn stop_node(&self, name: String, crash: bool) -> Done<'_, ()> {
        Box::pin(async move { self.stop_node(&name, crash).await })
    }
    fn start_node(&self, name: String) -> Done<'_, ()> {
        Box::pin(async move { self.start_node(&name).await })
    }
    fn attach(&self, name: String) -> Done<'_, ()> {
        Box::pin(async move { self.attached(&name).await.map(drop) })
    }
    fn stand_by(&self, _name: String) -> Done<'_, ()> {
        Box::pin(std::future::ready(Err(ClusterError::Invalid(
            "all nodes are in one process here: a guest that migrates finds its volume where it is".into(),
        ))))
    }
    fn check_address(&self, _name: String, _place: raft_meta::ServiceAddress) -> Done<'_, ()> {
        only_hosts()
    }
    fn add_device(&self, _path: PathBuf) -> Done<'_, DeviceId> {
        only_hosts()
    }
    fn join_token(&self, _good_for: Duration, _uses: u32) -> Done<'_, String> {
        only_hosts()
    }
}

/// A group of one voter that speaks with nobody. What an earlier release left as a single log becomes one.
async fn open_meta(env: &Env, dir: &Path) -> Result<RaftGroup, ClusterError> {
    let files = xsan_env::file::OsDirectory::open(env, dir).await;
    let files: Arc<dyn Directory> =
        Arc::new(files.map_err(ClusterError::io(format!("cannot open {}", dir.display())))?);
    let (first, options) = (NodeId(1), GroupOptions::default());
    match RaftGroup::open_or_migrate(env, Arc::clone(&files), Arc::new(Mute), options, first).await {
        Err(FormatError::Absent) => {
            let genesis = MetaState::new(ClusterId(env.random_u128()), true);
            Ok(RaftGroup::create(env, files, Arc::new(Mute), options, first, genesis).await?)
        }
        opened => Ok(opened?),
    }
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
