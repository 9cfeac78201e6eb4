//! One host's daemon: a replica of the metadata, the storage node, the pools, the volumes it serves, and its place among the
//! other hosts (RFC 0005). Layout of the directory: see [`super::founding`].

use super::addresses::{self, Addresses};
use super::carry::{self, CarryReport, HostMap};
use super::devices::{Disks, Probes, open_devices};
use super::export::export_key;
use super::facts::{Facts, MetadataRole, NodeFacts, NodeReport, UnopenedDisk};
use super::identity::Identity;
use super::links::{Links, MetaService, MetaTransport};
use super::maps::Maps;
use super::membership::{self, Beats, MembershipService};
use super::moves;
use super::settings::Settings;
use super::standby::Grant;
use super::storage::{Storage, lock_directory};
use super::volumes::VolumeManager;
use super::{Cluster, Done, Events, events};
use crate::error::ClusterError;
use lsm_block::Tuning;
use lsm_block::index::PageCache;
use raft_meta::{Command, Consensus, GroupOptions, MetaState, NodeState, Outcome, RaftGroup};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::Notify;
use xsan_env::os_disk::{Backend, IoDriver};
use xsan_env::runtime::{BoxFuture, TaskHandle};
use xsan_env::{BufPool, Env, Listener, Registry};
use xsan_node::{Assignment, Node};
use xsan_pool::{Pool, PoolConfig};
use xsan_types::{DeviceId, Generation, NodeId, PoolId, RegisterView, VolumeId};
use xsan_wire::config::Endpoint;
use xsan_wire::node::NodeApi;
use xsan_wire::{Server, ServiceId, Services};

/// How often devices are asked how full they are, while volumes are served.
const ASK_EVERY: Duration = Duration::from_secs(10);
/// Until a proposal that was not answered is made again.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// How long a command or a look waits for the newest metadata.
const CATCH_UP_FOR: Duration = Duration::from_secs(1);
/// How long another process of this node has to show itself. One that does not run is known at once; of a host that is gone nothing comes.
const CLONE_ANSWERS_WITHIN: Duration = Duration::from_millis(700);
/// How long requests of other nodes may take to end at shutdown.
const STOP_FOR: Duration = Duration::from_secs(5);

/// How a daemon is run; everything else stands in its settings.
#[derive(Clone, Copy, Debug)]
pub struct HostOptions {
    /// How disks are reached.
    pub backend: Backend,
    /// I/O memory registered with the kernel, in bytes.
    pub arena_bytes: usize,
    /// Memory for index pages, in bytes.
    pub page_cache_bytes: usize,
    /// Bounds of volumes.
    pub tuning: Tuning,
}

impl Default for HostOptions {
    fn default() -> Self {
        Self { backend: Backend::Auto, arena_bytes: 96 << 20, page_cache_bytes: 64 << 20, tuning: Tuning::default() }
    }
}

/// A running daemon.
pub struct Host {
    env: Env,
    dir: PathBuf,
    settings: Settings,
    identity: Identity,
    registry: Registry,
    events: Arc<Events>,
    buffers: BufPool,
    storage: Storage,
    endpoint: Endpoint,
    links: Arc<Links>,
    group: RaftGroup,
    consensus: Arc<dyn Consensus>,
    node: Arc<Node>,
    pub(super) probes: Mutex<Probes>,
    pub(super) disks: Mutex<Disks>,
    /// Held while the settings' devices change.
    pub(super) changing_devices: tokio::sync::Mutex<()>,
    maps: Maps,
    pub(super) carries: Mutex<BTreeMap<(PoolId, DeviceId), CarryReport>>,
    volumes: VolumeManager,
    pub(super) beats: Beats,
    pub(super) gateway: OnceLock<xsan_gateway::server::Server>,
    addresses: Addresses,
    /// Volumes on their way to another node: not taken back meanwhile.
    pub(super) releasing: Mutex<BTreeMap<VolumeId, xsan_env::Moment>>,
    /// Volumes that are being taken over: whose turn it is.
    pub(super) taking: Mutex<BTreeMap<VolumeId, Arc<tokio::sync::Mutex<()>>>>,
    /// Volumes that may be opened here while another node serves them.
    pub(super) standby: Mutex<BTreeMap<VolumeId, Arc<Grant>>>,
    server: Server,
    /// The map has changed: devices are asked again.
    pub(super) map_changed: Notify,
    tasks: Mutex<Vec<TaskHandle>>,
    _lock: std::fs::File,
}

impl Host {
    /// Starts the daemon of the node in `dir`. It serves other nodes when this returns.
    ///
    /// # Errors
    /// `dir` is of no member, another process runs there, or a part cannot be opened.
    pub async fn open(
        env: &Env,
        dir: &Path,
        settings: Settings,
        options: HostOptions,
    ) -> Result<Arc<Self>, ClusterError> {
        let lock = lock_directory(env, dir).await?;
        let identity = Identity::read(dir)?.ok_or_else(|| ClusterError::NoMember(dir.to_owned()))?;
        let buffers = BufPool::new(options.arena_bytes, 64 << 20);
        let driver = IoDriver::start(env, &buffers, options.backend).map_err(ClusterError::io("disk I/O"))?;
        let storage = Storage::new(env, driver, &buffers);
        let endpoint =
            Endpoint::new(env, buffers.clone(), identity.cluster, identity.node).with_tls(identity.tls(env)?);
        let links = Links::new(endpoint.clone());
        for (&node, address) in &identity.peers {
            links.learn_address(node, address);
        }
        // Its replica says nothing and hears nothing before `set_group`.
        let group = open_group(env, dir, &links).await?;
        if let Err(error) = refuse_clone(env, &links, &group.view(), &identity, &settings).await {
            group.close().await;
            return Err(error);
        }
        // Nobody is answered before this process can answer: the address is taken first.
        let listener = Listener::tcp(settings.listen).await;
        let listener = listener.map_err(ClusterError::io(format!("cannot listen on {}", settings.listen)))?;
        links.set_group(group.clone());
        let node = storage.open_node(identity.cluster, identity.node).await?;
        let (opened, disks) = open_devices(&storage, dir, &settings, &identity, &node).await?;
        let consensus: Arc<dyn Consensus> = Arc::new(group.clone());
        let cache = Arc::new(PageCache::new(options.page_cache_bytes));
        let volumes = VolumeManager::new(env.clone(), buffers.clone(), cache, Arc::clone(&consensus), options.tuning);
        let (beats, heard) = Beats::new();
        let own: Arc<dyn NodeApi> = Arc::<Node>::clone(&node);
        #[cfg(feature = "canary")]
        let own = super::canary::wrap(own);
        let host = Arc::new_cyclic(|me: &Weak<Self>| Self {
            maps: Maps::new(identity.node, Arc::clone(&own), Arc::clone(&links)),
            server: Server::new(&endpoint, services(me, &links, own, &consensus)),
            env: env.clone(),
            dir: dir.to_owned(),
            settings,
            identity,
            registry: Registry::new(),
            events: Arc::default(),
            storage,
            endpoint,
            links,
            group,
            consensus,
            probes: Mutex::default(),
            disks: Mutex::new(disks),
            changing_devices: tokio::sync::Mutex::default(),
            buffers,
            node,
            carries: Mutex::default(),
            volumes,
            beats,
            gateway: OnceLock::new(),
            addresses: Addresses::default(),
            releasing: Mutex::default(),
            taking: Mutex::default(),
            standby: Mutex::default(),
            map_changed: Notify::new(),
            tasks: Mutex::default(),
            _lock: lock,
        });
        host.watch_all(&opened);
        host.learn(&host.view());
        // Before anybody can call: without a map everything would be let in, and what is absent called `NotFound`.
        let places: Arc<dyn Assignment> = Arc::new(HostMap(host.view()));
        host.node.set_map(&places);
        host.serve_pools(&host.view())?;
        host.start(listener, heard);
        Ok(host)
    }

    fn start(self: &Arc<Self>, listener: Listener, heard: tokio::sync::mpsc::Receiver<membership::Heard>) {
        let server = self.server.clone();
        let tasks = vec![
            self.env.spawn("nodes", async move { server.serve(listener).await }),
            self.env.spawn("metadata", follow(Arc::clone(self))),
            self.env.spawn("registers", follow_registers(Arc::clone(self))),
            self.env.spawn(
                "events",
                events::follow(self.env.clone(), Arc::clone(&self.consensus), Arc::clone(&self.events)),
            ),
            self.env.spawn("devices", ask_devices(Arc::clone(self))),
            self.env.spawn("disks", super::devices::look_for_disks(Arc::clone(self))),
            self.env.spawn("introduction", introduce(Arc::clone(self))),
            self.env.spawn("moves", moves::plan(Arc::clone(self))),
            self.env.spawn("addresses", addresses::keep(Arc::clone(self))),
            self.env.spawn("servers", addresses::assign(Arc::clone(self))),
            self.env.spawn("carry", carry::run(Arc::clone(self))),
            self.env.spawn("heartbeat", membership::beat(Arc::clone(self))),
            self.env.spawn("detector", membership::lead(Arc::clone(self), heard)),
        ];
        *self.tasks.lock().unwrap_or_else(PoisonError::into_inner) = tasks;
    }

    /// The world.
    #[must_use]
    pub fn env(&self) -> &Env {
        &self.env
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its settings.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Its identity.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// I/O memory.
    #[must_use]
    pub fn buffers(&self) -> &BufPool {
        &self.buffers
    }

    /// Counters of all parts.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// `uring` or `threads`.
    #[must_use]
    pub fn backend(&self) -> &'static str {
        self.storage.backend()
    }

    /// Which node it is.
    #[must_use]
    pub fn node_id(&self) -> NodeId {
        self.identity.node
    }

    /// The process's number.
    #[must_use]
    pub fn instance(&self) -> u64 {
        self.endpoint.instance()
    }

    /// The metadata as this replica knows it.
    #[must_use]
    pub fn view(&self) -> Arc<MetaState> {
        self.group.view()
    }

    /// The replica.
    #[must_use]
    pub fn group(&self) -> &RaftGroup {
        &self.group
    }

    /// How disks are reached.
    #[must_use]
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// Its storage.
    #[must_use]
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// What its pools know.
    #[must_use]
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// The way to other nodes.
    #[must_use]
    pub fn links(&self) -> &Arc<Links> {
        &self.links
    }

    /// Service addresses here.
    #[must_use]
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// The volumes it serves.
    #[must_use]
    pub fn volumes(&self) -> &VolumeManager {
        &self.volumes
    }

    /// The gateway whose clients are counted and cut off.
    pub fn set_gateway(&self, gateway: xsan_gateway::server::Server) {
        // Set once, by whoever made it.
        let _ = self.gateway.set(gateway);
        self.addresses.look();
    }

    /// Age of the oldest request to its devices.
    #[must_use]
    pub fn disk_silent_for(&self) -> Duration {
        self.probes.lock().unwrap_or_else(PoisonError::into_inner).silent_for()
    }

    /// Proposes a metadata command.
    ///
    /// # Errors
    /// Why it was refused; `Unavailable`: no majority answers.
    pub async fn propose(&self, command: Command) -> Result<Outcome, ClusterError> {
        Ok(self.consensus.propose(command).await?)
    }

    /// Completes when the view holds everything that was answered to anybody before.
    ///
    /// # Errors
    /// No majority answers.
    pub async fn newest_view(&self) -> Result<Arc<MetaState>, ClusterError> {
        self.consensus.read_barrier().await?;
        Ok(self.view())
    }

    /// Makes pools served, or not, as the metadata has them now.
    ///
    /// # Errors
    /// A map that fits no pool.
    pub fn serve_pools(&self, view: &MetaState) -> Result<(), ClusterError> {
        let served = self.volumes.pools();
        for pool in view.pools.values() {
            let map = self.maps.pool_view(view, pool);
            if let Some(served) = served.get(&pool.id) {
                served.set_view(map)?;
                continue;
            }
            let mut config = PoolConfig::new(pool.id, pool.name.as_str(), pool.scheme);
            config.registry = self.registry.clone();
            let pool_served = Pool::new(self.env.clone(), config, map, self.buffers.clone())?;
            self.volumes.add_pool(pool.id, Arc::new(pool_served));
        }
        for id in served.keys().filter(|id| !view.pools.contains_key(id)) {
            self.volumes.remove_pool(*id);
        }
        Ok(())
    }

    fn learn(&self, view: &MetaState) {
        for (&node, record) in &view.hosts.nodes {
            if node != self.node_id() {
                self.links.learn_address(node, &record.address);
            }
            self.links.learn_replica(raft_meta::ReplicaId(record.replica), node);
        }
        for (&replica, member) in &self.group.status().borrow().members {
            self.links.learn_replica(replica, member.node);
        }
        for node in view.nodes.values().filter(|node| node.state == NodeState::Removed) {
            self.links.forget(node.id);
            self.server.cut(node.id);
        }
    }

    /// What this process says of itself.
    pub async fn report(&self) -> NodeReport {
        let mut report = NodeReport::of_storage(&self.node).await;
        report.add_volumes(&self.volumes.statuses(), |id| self.clients(id));
        report.carries = self.carry_reports();
        report.addresses = self.addresses.reports();
        report.unopened = self.unopened().into_iter().map(|(path, why)| UnopenedDisk { path, why }).collect();
        report
    }

    /// NBD clients of a volume here.
    #[must_use]
    pub fn clients(&self, volume: VolumeId) -> usize {
        self.gateway.get().map_or(0, |gateway| gateway.clients(&export_key(volume)).len())
    }

    /// Everything about the cluster, asked of all nodes that should answer.
    pub async fn facts(&self) -> Facts {
        let metadata_answers = Cluster::catch_up(self).await;
        let view = self.view();
        let group = self.group().status().borrow().clone();
        let present = view.nodes.values().filter(|node| node.state != NodeState::Removed);
        let asked = present.map(|node| async {
            let report = if node.state == NodeState::Down { None } else { self.report_of(node.id).await };
            let record = view.hosts.nodes.get(&node.id);
            NodeFacts {
                id: node.id,
                state: node.state,
                since_millis: record.map_or(0, |record| record.since_millis),
                reason: record.map_or_else(String::new, |record| record.reason.clone()),
                address: record.map_or_else(String::new, |record| record.address.clone()),
                metadata: MetadataRole::of(node.id, &group),
                report,
            }
        });
        let nodes = futures::future::join_all(asked).await;
        Facts {
            view: Arc::clone(&view),
            metadata_answers,
            nodes,
            unplaced: None,
            io_backend: self.backend(),
            dir: self.dir.clone(),
        }
    }

    /// Hands volumes over, tells the leader, and ends.
    pub async fn close(&self) {
        self.give_volumes_up().await;
        self.hand_lead_over().await;
        // To whoever leads now.
        self.send_beat(true);
        for task in self.tasks.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            task.abort();
        }
        self.probes.lock().unwrap_or_else(PoisonError::into_inner).end();
        self.server.stop(STOP_FOR).await;
        self.node.close().await;
        self.group.close().await;
    }

    /// A leader that just ended would leave the group without one for a second.
    async fn hand_lead_over(&self) {
        let mut status = self.group.status();
        let own = self.group.replica();
        let (leads, heirs) = {
            let status = status.borrow();
            let heirs: Vec<_> = status.configuration.voters.iter().copied().filter(|voter| *voter != own).collect();
            (status.leader == Some(own), heirs)
        };
        for heir in heirs.into_iter().filter(|_| leads) {
            if self.group.transfer_lead(heir).await.is_ok() {
                let gone = status.wait_for(|status| status.leader != Some(own));
                if self.env.timeout(Duration::from_secs(1), gone).await.is_some() {
                    return;
                }
            }
        }
    }
}

impl Cluster for Host {
    fn env(&self) -> &Env {
        &self.env
    }
    fn registry(&self) -> &Registry {
        &self.registry
    }
    fn view(&self) -> Arc<MetaState> {
        self.group.view()
    }
    fn catch_up(&self) -> BoxFuture<'_, bool> {
        Box::pin(async { matches!(self.env.timeout(CATCH_UP_FOR, self.consensus.read_barrier()).await, Some(Ok(_))) })
    }
    fn events(&self) -> &Events {
        &self.events
    }
    fn propose(&self, command: Command) -> Done<'_, Outcome> {
        Box::pin(self.propose(command))
    }
    fn follow_pools(&self) -> Done<'_, ()> {
        Box::pin(async { self.serve_pools(&self.view()) })
    }
    fn facts(&self) -> BoxFuture<'_, Facts> {
        Box::pin(self.facts())
    }
    fn resize(&self, name: String, size: u64) -> Done<'_, ()> {
        Box::pin(async move { self.resize(&name, size).await })
    }
    fn delete_volume(&self, name: String, force: bool) -> Done<'_, ()> {
        Box::pin(async move { self.delete_volume(&name, force).await })
    }
    fn renamed(&self, volume: VolumeId, name: &str) {
        self.volumes.renamed(volume, name);
    }
    fn stop_node(&self, _name: String, _crash: bool) -> Done<'_, ()> {
        not_here()
    }
    fn start_node(&self, _name: String) -> Done<'_, ()> {
        not_here()
    }
    fn attach(&self, name: String) -> Done<'_, ()> {
        Box::pin(async move { self.attach(&name).await.map(drop) })
    }
    fn stand_by(&self, name: String) -> Done<'_, ()> {
        Box::pin(async move { self.stand_by(&name).await })
    }
    fn check_address(&self, name: String, place: raft_meta::ServiceAddress) -> Done<'_, ()> {
        Box::pin(async move { self.check_address(&name, place).await })
    }
    fn add_device(&self, path: PathBuf) -> Done<'_, DeviceId> {
        Box::pin(async move { self.add_device(&path).await })
    }
    fn join_token(&self, good_for: Duration, uses: u32) -> Done<'_, String> {
        Box::pin(async move {
            let cluster = self.identity.cluster;
            let token = super::founding::new_token(&self.env, &*self.consensus, cluster, good_for, uses).await?;
            Ok(token.to_string())
        })
    }
}

fn not_here() -> Done<'static, ()> {
    Box::pin(std::future::ready(Err(ClusterError::Invalid(
        "nodes are processes of their own here: stop one on its host (`systemctl stop xsan`), start it with `xsan node run`"
            .into(),
    ))))
}

async fn open_group(env: &Env, dir: &Path, links: &Arc<Links>) -> Result<RaftGroup, ClusterError> {
    let path = dir.join("meta");
    let files = xsan_env::file::OsDirectory::open(env, &path).await;
    let files = files.map_err(ClusterError::io(format!("cannot open {}", path.display())))?;
    let transport = Arc::new(MetaTransport(Arc::clone(links)));
    Ok(RaftGroup::open(env, Arc::new(files), transport, GroupOptions::default()).await?)
}

/// A copy of a node's directory is that node, with its vote and its devices: two of them at work would be the end of every promise.
/// Whoever answers where this node is known to live, before this process listens there, is another process of it.
async fn refuse_clone(
    env: &Env,
    links: &Links,
    view: &MetaState,
    identity: &Identity,
    settings: &Settings,
) -> Result<(), ClusterError> {
    let own = identity.node;
    let known = view.hosts.nodes.get(&own).map(|record| record.address.clone());
    let places: BTreeSet<String> = known.into_iter().chain([settings.address.clone()]).collect();
    for address in places {
        links.learn_address(own, &address);
        let is_there = links.is_there(env, own, CLONE_ANSWERS_WITHIN).await;
        links.forget(own);
        if is_there {
            return Err(ClusterError::Cloned { node: settings.name.clone(), address });
        }
    }
    Ok(())
}

fn services(
    host: &Weak<Host>,
    links: &Arc<Links>,
    storage: Arc<dyn NodeApi>,
    consensus: &Arc<dyn Consensus>,
) -> Services {
    let consensus = Arc::clone(consensus);
    // A node that this replica has not heard of yet has a certificate all the same.
    let admission =
        move |node: NodeId| consensus.view().nodes.get(&node).is_none_or(|node| node.state != NodeState::Removed);
    Services::new()
        .with_node(storage)
        .with(ServiceId::META, Arc::new(MetaService(Arc::clone(links))))
        .with(ServiceId::MEMBERSHIP, Arc::new(MembershipService(Weak::clone(host))))
        .with_join(Arc::new(super::founding::JoinDesk(Weak::clone(host))))
        .with_admission(Arc::new(admission))
}

/// Does what a changed metadata asks of this node.
async fn follow(host: Arc<Host>) {
    let mut applied = host.group.subscribe();
    let opened = host.node.devices().await.unwrap_or_default();
    let (mut served, mut devices) = (None, BTreeSet::new());
    let opened: BTreeSet<DeviceId> = opened.into_iter().map(|status| status.device).collect();
    loop {
        applied.borrow_and_update();
        let view = host.view();
        host.learn(&view);
        let places: Arc<dyn Assignment> = Arc::new(HostMap(Arc::clone(&view)));
        host.node.set_map(&places);
        let map = (view.epoch, view.pools.len());
        if served != Some(map) {
            match host.serve_pools(&view) {
                Ok(()) => served = Some(map),
                Err(error) => tracing::error!(%error, "a pool cannot be served"),
            }
            host.map_changed.notify_one();
        }
        // Some may have been given up while this process did not run.
        devices.extend(opened.iter().copied().filter(|device| view.is_given_up(*device)));
        host.forget_devices(&view, &mut devices);
        host.fence(&view).await;
        if applied.changed().await.is_err() {
            return;
        }
    }
}

/// Tells this process's storage node of registers. Apart from everything else: its disks may hang while the process serves volumes.
async fn follow_registers(host: Arc<Host>) {
    let mut applied = host.group.subscribe();
    let mut told: BTreeMap<VolumeId, RegisterView> = BTreeMap::new();
    loop {
        applied.borrow_and_update();
        tell_registers(&host, &host.view(), &mut told).await;
        if applied.changed().await.is_err() {
            return;
        }
    }
}

/// Tells this process's storage node what no longer counts, so that it frees it (P5).
async fn tell_registers(host: &Host, view: &MetaState, told: &mut BTreeMap<VolumeId, RegisterView>) {
    for volume in view.volumes.values() {
        let register = volume.register_view();
        // A volume that was never owned has nothing to free.
        if told.get(&volume.id) == Some(&register) || !(register.generation > Generation::default() || register.deleted)
        {
            continue;
        }
        match host.node.registered(register).await {
            Ok(()) => drop(told.insert(volume.id, register)),
            Err(error) => tracing::warn!(volume = %volume.name, %error, "cannot free what is old"),
        }
    }
}

/// Keeps what is known of devices fresh: after changes of the map, and from time to time while volumes are served or one is missing.
async fn ask_devices(host: Arc<Host>) {
    loop {
        let view = host.view();
        host.maps.ask(&view).await;
        if let Err(error) = host.serve_pools(&host.view()) {
            tracing::error!(%error, "a pool cannot be served");
        }
        let changed = host.map_changed.notified();
        if host.volumes.statuses().is_empty() && !host.maps.lacks_devices() && host.unopened().is_empty() {
            changed.await;
        } else {
            // Either way it is time to look again.
            let _ = host.env.timeout(ASK_EVERY, changed).await;
        }
    }
}

/// Makes this node's devices and address known, as often as it takes.
async fn introduce(host: Arc<Host>) {
    let mut applied = host.group.subscribe();
    loop {
        let view = host.view();
        let mut done = false;
        if let Some(record) = view.hosts.nodes.get(&host.node_id()) {
            done = introduce_once(&host, &view, &record.address).await;
        }
        if done {
            return;
        }
        let again = async {
            applied.changed().await.ok();
        };
        let _ = host.env.timeout(RETRY_AFTER, again).await;
    }
}

async fn introduce_once(host: &Host, view: &MetaState, address: &str) -> bool {
    let mut commands = Vec::new();
    if address != host.settings.address {
        commands.push(Command::SetNodeAddress { node: host.node_id(), address: host.settings.address.clone() });
    }
    for status in host.node.devices().await.unwrap_or_default() {
        if !view.devices.contains_key(&status.device) && !view.removed_devices.contains(&status.device) {
            let (device, capacity) = (status.device, status.capacity);
            commands.push(Command::AddDevice { device, node: host.node_id(), capacity });
        }
    }
    for command in commands {
        if let Err(error) = host.propose(command).await {
            tracing::info!(%error, "this node cannot introduce itself yet");
            return false;
        }
    }
    true
}
