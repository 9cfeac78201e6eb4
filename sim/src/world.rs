//! The cluster: six hosts with a node each, the metadata, gateways. Processes start, end and start again; what hosts keep
//! belongs to the world. Put together as `xsan dev` does it.

use crate::disk::HostStorage;
use crate::executor::{Dice, Executor, Owner, WORLD};
use crate::link::{Canary, NodeLink, Way, Weather};
use crate::meta::{MetaGroup, REPLICAS};
use crate::model::Model;
use futures::FutureExt;
use lsm_block::index::PageCache;
use lsm_block::{AckPolicy, Piece, Registers, Tuning, Volume, VolumeConfig, VolumeError};
use raft_meta::{Command, Consensus, MetaState, Name, NodeState, Outcome, RegisterClient};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use xsan_env::runtime::BoxFuture;
use xsan_env::{BufPool, Env};
use xsan_node::{DeviceIdentity, Node, NodeConfig};
use xsan_pool::{DeviceView, Pool, PoolConfig, PoolView};
use xsan_types::{
    ChangeToken, ClusterId, DeviceId, ErrorKind, Generation, NodeId, PoolId, Register, RegisterChange, RegisterError,
    RegisterView, Scheme, SegmentName, VolumeId,
};
use xsan_wire::node::NodeApi;

/// Storage nodes.
pub const NODES: usize = 6;
/// Bytes of the volume.
pub const VOLUME_BYTES: u64 = 4 << 20;
const CLUSTER: ClusterId = ClusterId(77);

/// A number drawn from the seed for a whole run.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Redundancy of the pool.
    pub scheme: Scheme,
    /// Logical sector of the disks.
    pub sector: u32,
    /// Longest disk request.
    pub disk_delay_max: Duration,
    /// Acknowledgement of the volume.
    pub ack: AckPolicy,
    /// Bounds of the volume.
    pub tuning: Tuning,
    /// Guests that use the volume at once.
    pub guests: u64,
}

impl Shape {
    /// What the seed says.
    #[must_use]
    pub fn draw(dice: &mut Dice) -> Self {
        let scheme = match dice.below(6) {
            0 => Scheme::replica(3),
            1 => Scheme::rs(2, 2),
            _ => Scheme::rs(4, 2),
        };
        let millis = Duration::from_millis;
        Self {
            scheme: scheme.expect("a valid scheme"),
            sector: if dice.chance(300) { 4096 } else { 512 },
            disk_delay_max: Duration::from_micros([50, 500, 5_000][dice.below(3) as usize]),
            ack: if dice.chance(150) { AckPolicy::Persisted } else { AckPolicy::Replicated },
            tuning: Tuning {
                segment_bytes: 1 << 20,
                batches_in_flight: dice.between(1, 4) as usize,
                seals_in_flight: dice.between(1, 3) as usize,
                io_timeout: Duration::from_secs(30),
                read_window: millis(dice.between(5, 300)),
                idle_seal_after: millis(dice.between(50, 5_000)),
                delta_bytes_max: 256 << 10,
                checkpoint_bytes: dice.between(1, 16) << 20,
            },
            guests: dice.between(1, 4),
        }
    }
}

/// A host with its storage process.
pub struct Host {
    /// Its number, from 1.
    pub number: u64,
    /// How gateways reach its node.
    pub link: Arc<NodeLink>,
    storage: HostStorage,
    id: NodeId,
    device: DeviceId,
    state: Mutex<HostState>,
}

struct HostState {
    boot_id: u128,
    process: Option<Owner>,
    /// Whether the map says that it is up.
    believed_up: bool,
}

/// A gateway process.
pub struct Gateway {
    /// Its process.
    pub owner: Owner,
    /// Its world.
    pub env: Env,
    pool: Pool,
    buffers: BufPool,
    volume: Mutex<Option<Arc<Volume>>>,
}

impl Gateway {
    /// The volume, once it is taken over.
    #[must_use]
    pub fn volume(&self) -> Option<Arc<Volume>> {
        self.volume.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What happened in a run, for people.
#[derive(Debug, Default)]
pub struct Tally {
    /// Acknowledged changes.
    pub writes: AtomicU64,
    /// Answered reads.
    pub reads: AtomicU64,
    /// Answered flushes.
    pub flushes: AtomicU64,
    /// Requests that failed.
    pub errors: AtomicU64,
    /// Take-overs that came to their end.
    pub takeovers: AtomicU64,
    /// Faults of the planner.
    pub faults: AtomicU64,
}

impl Tally {
    /// Counts one.
    pub fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// Everything.
pub struct World {
    /// Time and tasks.
    pub executor: Executor,
    /// The world's own view of it.
    pub env: Env,
    /// What the seed says of this run.
    pub shape: Shape,
    /// What may be read.
    pub model: Mutex<Model>,
    /// How calls fare.
    pub weather: Arc<Weather>,
    /// What happened.
    pub tally: Tally,
    /// More fails than the scheme tolerates: not to have something is no broken promise, to give what is wrong is.
    pub beyond: bool,
    /// Guests end after the request they are at.
    pub quiet: AtomicBool,
    /// The hosts with storage.
    pub hosts: Vec<Host>,
    /// The metadata.
    pub meta: MetaGroup,
    pool: PoolId,
    volume: VolumeId,
    gateways: Mutex<Vec<Arc<Gateway>>>,
    next_owner: AtomicU64,
    dice: Mutex<Dice>,
}

struct MetaRegisters(RegisterClient);

impl Registers for MetaRegisters {
    fn read(&self, volume: VolumeId) -> BoxFuture<'static, Result<Register, RegisterError>> {
        self.0.read(volume)
    }

    fn change(
        &self,
        volume: VolumeId,
        generation: Generation,
        version: u64,
        token: ChangeToken,
        change: RegisterChange,
    ) -> BoxFuture<'static, Result<Register, RegisterError>> {
        self.0.change(volume, generation, version, token, change)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    /// A fresh cluster: disks formatted, metadata made, nothing running but the nodes and the metadata.
    pub async fn build(executor: &Executor, dice: &mut Dice, canary: Canary, beyond: bool) -> Arc<Self> {
        let shape = Shape::draw(dice);
        executor.note(|| format!("{shape:?}"));
        let env = executor.env(WORLD, 1);
        let weather = Arc::new(Weather::default());
        let way = |dice: &mut Dice, name: &str| Way::new(executor, &env, &weather, Dice::new(dice.word()), name);
        let genesis = MetaState::new(CLUSTER, false);
        let (meta_way, meta_dice) = (way(dice, "to meta"), Dice::new(dice.word()));
        let meta = MetaGroup::new(executor, &env, &weather, meta_way, meta_dice, genesis.clone());
        meta.start(0, Owner(1), Some(genesis)).await.expect("fresh metadata");
        let mut hosts = Vec::new();
        for number in 1..=NODES as u64 {
            let link = Arc::new(NodeLink::new(way(dice, &format!("to n{number}")), canary));
            hosts.push(make_host(&env, &**meta.link(), link, number, &shape).await);
        }
        let (pool, volume) = make_volume(&**meta.link(), &shape).await;
        let world = Arc::new(Self {
            executor: executor.clone(),
            meta,
            env,
            shape,
            model: Mutex::new(Model::new(VOLUME_BYTES, beyond)),
            beyond,
            weather,
            tally: Tally::default(),
            quiet: AtomicBool::new(false),
            hosts,
            pool,
            volume,
            gateways: Mutex::new(Vec::new()),
            next_owner: AtomicU64::new(10),
            dice: Mutex::new(Dice::new(dice.word())),
        });
        world.start_meta().await;
        world.meta.gather().await;
        for host in &world.hosts {
            world.start_node(host, false).await;
        }
        world
    }

    /// The model, for a moment.
    pub fn model(&self) -> MutexGuard<'_, Model> {
        lock(&self.model)
    }

    /// Something cannot be had. That breaks a promise, unless more failed than the scheme tolerates.
    pub fn missing(&self, what: impl Into<String>) {
        if self.beyond {
            let what = what.into();
            self.executor.note(|| format!("lost: {what}"));
        } else {
            self.executor.fail(what);
        }
    }

    fn new_owner(&self) -> Owner {
        Owner(self.next_owner.fetch_add(1, Ordering::Relaxed))
    }

    fn random(&self) -> u64 {
        lock(&self.dice).word()
    }

    // --- Metadata ---

    /// Starts all replicas of the metadata that do not run.
    pub async fn start_meta(&self) {
        self.meta.join_again();
        for at in 0..REPLICAS {
            self.start_meta_replica(at).await;
        }
    }

    /// Starts one replica of the metadata, if it does not run.
    pub async fn start_meta_replica(&self, at: usize) {
        if let Err(error) = self.meta.start(at, self.new_owner(), None).await {
            self.executor.fail(format!("replica {at} of the metadata does not open: {error}"));
        }
    }

    /// Ends one replica's process; with `power` its host.
    pub fn stop_meta_replica(&self, at: usize, power: bool) {
        self.meta.stop(at, power.then(|| self.random()));
    }

    /// Ends all of them.
    pub fn stop_meta(&self, power: bool) {
        for at in 0..REPLICAS {
            self.stop_meta_replica(at, power);
        }
    }

    // --- Nodes ---

    /// Starts a host's node, if it does not run, and tells the map. A disk that does not keep what it says (`rotten`) is replaced if it
    /// does not open.
    pub async fn start_node(&self, host: &Host, rotten: bool) {
        // A request that fails while a node opens ends its process; it is started again, as a service manager would.
        let opened = match self.try_start_node(host).await {
            Err(error) => {
                self.executor.note(|| error);
                host.storage.mend();
                self.try_start_node(host).await
            }
            Ok(()) => Ok(()),
        };
        match opened {
            Err(error) if rotten => {
                self.executor.note(|| error);
                self.replace_disk(host).await;
                if let Err(error) = self.try_start_node(host).await {
                    self.executor.fail(format!("with an empty disk {error}"));
                }
            }
            Err(error) => self.executor.fail(error),
            Ok(()) => {}
        }
    }

    async fn try_start_node(&self, host: &Host) -> Result<(), String> {
        let boot_id = {
            let state = lock(&host.state);
            if state.process.is_some() {
                return Ok(());
            }
            state.boot_id
        };
        let owner = self.new_owner();
        lock(&host.state).process = Some(owner);
        let env = self.executor.env(owner, boot_id);
        let config = NodeConfig::new(CLUSTER, host.id, BufPool::new(0, 1 << 20));
        let opened = Node::open(&env, config, vec![host.storage.open()]).await;
        if lock(&host.state).process != Some(owner) {
            // Ended again while it opened.
            return Ok(());
        }
        match opened {
            Ok(node) => host.link.start(env, node as Arc<dyn NodeApi>),
            Err(error) => {
                lock(&host.state).process = None;
                self.executor.kill(owner);
                return Err(format!("n{} does not open: {error}", host.number));
            }
        }
        self.executor.note(|| format!("n{} runs", host.number));
        self.believe(host, true).await;
        self.tell_registers(host).await;
        Ok(())
    }

    /// A fresh disk takes the place of a host's. Its node ends, and starts by [`World::start_node`].
    pub async fn replace_disk(&self, host: &Host) {
        let spare = host.storage.spare();
        let identity = DeviceIdentity { cluster: CLUSTER, node: host.id, device: host.device };
        Node::format(&self.env, &spare.open(), identity).await.expect("a fresh disk");
        self.executor.note(|| format!("n{} gets an empty disk", host.number));
        self.stop_node(host, true);
        host.storage.replace(spare);
    }

    /// Ends a host's node; with `power` the host loses power. The map learns of it by [`World::believe`].
    pub fn stop_node(&self, host: &Host, power: bool) {
        let process = lock(&host.state).process.take();
        host.link.stop();
        if let Some(owner) = process {
            self.executor.kill(owner);
        }
        if power {
            host.storage.power_off(&mut lock(&self.dice));
            let boot_id = u128::from(self.random());
            lock(&host.state).boot_id = boot_id;
        } else {
            host.storage.crash_process();
        }
    }

    /// A host's disk stalls until [`World::mend_disk`].
    pub fn stall_disk(&self, host: &Host) {
        let requests = host.storage.stall(&mut lock(&self.dice));
        self.executor.note(|| format!("fault: {requests} requests to the disk of n{} stall", host.number));
    }

    /// A host's disk answers again.
    pub fn mend_disk(&self, host: &Host) {
        host.storage.mend();
    }

    /// A request to a host's disk will fail. `true`: the disk may lose what it said was stable.
    pub fn fail_disk(&self, host: &Host) -> bool {
        self.executor.note(|| format!("fault: a request to the disk of n{} will fail", host.number));
        host.storage.fail_once(&mut lock(&self.dice))
    }

    /// A host's disk lies about a request.
    pub fn lie_disk(&self, host: &Host) {
        self.executor.note(|| format!("fault: the disk of n{} will lie", host.number));
        host.storage.lie_once(&mut lock(&self.dice));
    }

    /// The data of a host rots.
    pub fn rot(&self, host: &Host) {
        let places = host.storage.rot(&mut lock(&self.dice));
        self.executor.note(|| format!("fault: n{} rots in {places} places", host.number));
    }

    /// Whether a host's node runs and has opened its disk.
    #[must_use]
    pub fn is_up(&self, host: &Host) -> bool {
        host.link.is_up()
    }

    /// Segments that hosts hold, and how many shards of each: with nothing missing and nothing left behind, those that are listed,
    /// each with one for every position.
    #[must_use]
    pub fn held(&self) -> BTreeMap<SegmentName, usize> {
        let mut held = BTreeMap::new();
        for shard in self.hosts.iter().flat_map(|host| host.storage.shards()) {
            *held.entry(shard.segment).or_default() += 1;
        }
        held
    }

    /// The map says from now on that the host is up or not, unless it says so already.
    pub async fn believe(&self, host: &Host, up: bool) {
        if std::mem::replace(&mut lock(&host.state).believed_up, up) != up {
            let state = if up { NodeState::Up } else { NodeState::Down };
            // Lost or refused: the view below says it all the same.
            let asked = self.meta.link().propose(Command::SetNodeState { node: host.id, state }).await;
            if asked.is_err() {
                self.executor.note(|| format!("the metadata does not learn that n{} is {state:?}", host.number));
            }
        }
        self.refresh_views();
    }

    fn refresh_views(&self) {
        let gateways = lock(&self.gateways).clone();
        let view = self.pool_view();
        for gateway in gateways {
            if let Err(error) = gateway.pool.set_view(Arc::clone(&view)) {
                self.executor.fail(format!("the map is refused: {error}"));
            }
        }
    }

    fn pool_view(&self) -> Arc<PoolView> {
        let view = self.meta.link().view();
        let mut devices = BTreeMap::new();
        for host in &self.hosts {
            let device = DeviceView {
                node: Arc::clone(&host.link) as Arc<dyn NodeApi>,
                domain: Arc::from(format!("n{}", host.number)),
                up: lock(&host.state).believed_up,
                leaving: false,
                sector: self.shape.sector,
                free: 0,
            };
            devices.insert(host.device, device);
        }
        let table = view.pools.get(&self.pool).map(|pool| pool.table.positions.clone()).unwrap_or_default();
        Arc::new(PoolView { epoch: view.epoch, table, before: Vec::new(), devices })
    }

    async fn tell_registers(&self, host: &Host) {
        let view = self.meta.link().view();
        let registers: Vec<RegisterView> = view.volumes.values().map(raft_meta::Volume::register_view).collect();
        for register in registers {
            if register.generation.0 > 0 && host.link.registered(register).await.is_err() {
                self.executor.note(|| format!("n{} does not learn of the registers", host.number));
            }
        }
    }

    // --- Gateways ---

    /// The gateways that run, oldest first.
    #[must_use]
    pub fn gateways(&self) -> Vec<Arc<Gateway>> {
        lock(&self.gateways).clone()
    }

    /// The gateway that was started last.
    #[must_use]
    pub fn newest_gateway(&self) -> Option<Arc<Gateway>> {
        lock(&self.gateways).last().cloned()
    }

    /// A new gateway process; it does nothing yet.
    pub fn start_gateway(&self) -> Arc<Gateway> {
        let owner = self.new_owner();
        let env = self.executor.env(owner, 1);
        let buffers = BufPool::new(0, 8 << 20);
        let config = PoolConfig::new(self.pool, "default", self.shape.scheme);
        let pool = Pool::new(env.clone(), config, self.pool_view(), buffers.clone()).expect("a map that fits");
        let gateway = Arc::new(Gateway { owner, env, pool, buffers, volume: Mutex::new(None) });
        lock(&self.gateways).push(Arc::clone(&gateway));
        self.executor.note(|| format!("gateway {} starts", owner.0));
        gateway
    }

    /// Ends a gateway's process.
    pub fn stop_gateway(&self, gateway: &Gateway) {
        lock(&self.gateways).retain(|other| other.owner != gateway.owner);
        self.executor.kill(gateway.owner);
        let volume = lock(&gateway.volume).take();
        drop(volume);
        self.executor.note(|| format!("gateway {} is gone", gateway.owner.0));
    }

    /// Takes the volume over and compares all of it with the model. Runs in the gateway's process. `None`: a newer gateway has it.
    pub async fn take_over(self: &Arc<Self>, gateway: &Gateway) -> Option<Arc<Volume>> {
        loop {
            let config = VolumeConfig {
                id: self.volume,
                env: gateway.env.clone(),
                buffers: gateway.buffers.clone(),
                store: Arc::new(gateway.pool.clone()),
                registers: Arc::new(MetaRegisters(RegisterClient::new(
                    Arc::clone(self.meta.link()) as Arc<dyn Consensus>
                ))),
                cache: Arc::new(PageCache::new(1 << 20)),
                ack: self.shape.ack,
                tuning: self.shape.tuning,
            };
            match Volume::open(config).await {
                Ok(volume) => match self.settle(gateway, &volume).await {
                    Ok(()) => {
                        *lock(&gateway.volume) = Some(Arc::clone(&volume));
                        Tally::count(&self.tally.takeovers);
                        return Some(volume);
                    }
                    Err(error) => self.executor.note(|| format!("gateway {}: {error}", gateway.owner.0)),
                },
                Err(error) => {
                    self.executor.note(|| format!("gateway {} cannot take over: {error}", gateway.owner.0));
                    // A taker that was overtaken itself may find anything gone.
                    let alone = lock(&self.gateways).len() == 1;
                    let may_wait =
                        matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Fenced | ErrorKind::Closed);
                    if alone && !may_wait {
                        self.missing(format!("the volume does not open: {error}"));
                        return None;
                    }
                }
            }
            if self.newest_gateway().is_none_or(|newest| newest.owner != gateway.owner) {
                return None;
            }
            gateway.env.sleep(Duration::from_millis(100)).await;
        }
    }

    async fn settle(&self, gateway: &Gateway, volume: &Volume) -> Result<(), VolumeError> {
        let image = read_bytes(volume, 0, VOLUME_BYTES).await?;
        let generation = volume.status().generation;
        self.executor.note(|| format!("gateway {} serves (generation {generation})", gateway.owner.0));
        let settled = self.model().settle(&image);
        if let Err(broken) = settled {
            self.executor.fail(broken.to_string());
        }
        Ok(())
    }
}

/// Reads, with holes as zeroes.
///
/// # Errors
/// Those of the volume.
pub async fn read_bytes(volume: &Volume, offset: u64, length: u64) -> Result<Vec<u8>, VolumeError> {
    let mut bytes = Vec::with_capacity(length as usize);
    for piece in volume.read(offset, length).await? {
        match piece {
            Piece::Data(data) => bytes.extend_from_slice(&data),
            Piece::Hole(hole) => bytes.resize(bytes.len() + hole as usize, 0),
        }
    }
    assert_eq!(bytes.len() as u64, length, "a read answers what was asked for");
    Ok(bytes)
}

async fn make_host(env: &Env, meta: &dyn Consensus, link: Arc<NodeLink>, number: u64, shape: &Shape) -> Host {
    let name = |name: String| name.parse::<Name>().expect("a valid name");
    let command =
        Command::AddNode { name: name(format!("n{number}")), host: name(format!("h{number}")), rack: None, zone: None };
    let Ok(Outcome::Node(id)) = meta.propose(command).await else { panic!("a node is added") };
    let device = DeviceId(u128::from(number) << 64 | 0xd);
    let storage = HostStorage::new(env, number, shape.sector, shape.disk_delay_max);
    let identity = DeviceIdentity { cluster: CLUSTER, node: id, device };
    Node::format(env, &storage.open_disk(), identity).await.expect("a fresh disk");
    let capacity = crate::disk::DEVICE_BYTES;
    meta.propose(Command::AddDevice { device, node: id, capacity }).await.expect("a device is added");
    meta.propose(Command::SetNodeState { node: id, state: NodeState::Up }).await.expect("a node is up");
    let state = HostState { boot_id: u128::from(number), process: None, believed_up: true };
    Host { number, link, storage, id, device, state: Mutex::new(state) }
}

async fn make_volume(meta: &dyn Consensus, shape: &Shape) -> (PoolId, VolumeId) {
    let ack = match shape.ack {
        AckPolicy::Replicated => raft_meta::AckPolicy::Replicated,
        _ => raft_meta::AckPolicy::Persisted,
    };
    let name = "default".parse().expect("a valid name");
    let command = Command::CreatePool { name, scheme: shape.scheme, failure_domain: None, pg_count: Some(16), ack };
    let Ok(Outcome::Pool(pool)) = meta.propose(command).await else { panic!("a pool is made") };
    let name = "disk".parse().expect("a valid name");
    let command = Command::CreateVolume { name, pool, size: VOLUME_BYTES, ack: Some(ack) };
    let Ok(Outcome::Volume(volume)) = meta.propose(command).await else { panic!("a volume is made") };
    // The device's figures are asked for once, so that a node that does not answer them is seen at once.
    assert!(meta.read_barrier().now_or_never().is_none_or(|done| done.is_ok()), "the metadata answers");
    (pool, volume)
}
