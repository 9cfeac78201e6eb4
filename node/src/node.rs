//! A node: its devices behind [`NodeApi`].

use crate::counters::NodeCounters;
use crate::device::Device;
use crate::error::NodeOpenError;
use crate::format::{DEVICE_BYTES_MIN, Superblock, Unreadable};
use crate::log::{read_superblock, write_superblocks};
use crate::places::Assignment;
use crate::shard_index::ShardIndex;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock};
use xsan_env::{Buf, BufPool, Disk, Env};
use xsan_types::{
    ClosedMember, ClusterId, DeviceId, Epoch, FlushRequest, Generation, Incarnation, MemberRef, NodeId, RegisterView,
    SealedSegment, SegmentName, SetId, ShardId, VolumeId,
};
use xsan_wire::node::{
    CreateMember, CreatedMember, DeviceStatus, HoldShard, NodeApi, NodeError, NodeResult, PutShard, ShardInfo,
};

/// What a device is told when it is formatted.
#[derive(Clone, Copy, Debug)]
pub struct DeviceIdentity {
    /// The cluster.
    pub cluster: ClusterId,
    /// The node that serves it.
    pub node: NodeId,
    /// Itself, drawn at random.
    pub device: DeviceId,
}

/// A device to open.
pub struct DeviceHandle {
    /// Its bytes.
    pub disk: Arc<dyn Disk>,
    /// Its shard index.
    pub index: Box<dyn ShardIndex>,
}

/// What a node is.
#[derive(Clone)]
pub struct NodeConfig {
    cluster: ClusterId,
    node: NodeId,
    buffers: BufPool,
}

impl NodeConfig {
    /// A node of `cluster`; memory for I/O comes from `buffers`.
    #[must_use]
    pub fn new(cluster: ClusterId, node: NodeId, buffers: BufPool) -> Self {
        Self { cluster, node, buffers }
    }
}

/// A running storage node. Dropping it without [`Node::close`] is a crash of its process.
pub struct Node {
    env: Env,
    config: NodeConfig,
    incarnation: Incarnation,
    devices: RwLock<BTreeMap<DeviceId, Arc<Device>>>,
    /// For devices that come later, and for those that are not here.
    map: RwLock<Option<Arc<dyn Assignment>>>,
}

impl Node {
    /// Writes a fresh superblock and an empty log.
    ///
    /// # Errors
    /// The device is too small, or formatted already.
    pub async fn format(_env: &Env, disk: &Arc<dyn Disk>, identity: DeviceIdentity) -> Result<(), NodeOpenError> {
        let geometry = disk.geometry();
        if geometry.bytes < DEVICE_BYTES_MIN {
            return Err(NodeOpenError::TooSmall { bytes: geometry.bytes, min: DEVICE_BYTES_MIN });
        }
        let buffers = BufPool::new(0, 0);
        let io = |source| NodeOpenError::Io { device: identity.device, source };
        match read_superblock(disk, &buffers).await.map_err(io)? {
            Err(Unreadable::Absent) => {}
            Ok(block) => return Err(NodeOpenError::Formatted(block.device)),
            Err(Unreadable::Version(version)) => {
                return Err(NodeOpenError::Version { device: DeviceId(0), version });
            }
            Err(Unreadable::Damaged) => return Err(NodeOpenError::SuperblockDamaged),
        }
        let log_half_bytes = (geometry.bytes / 256).clamp(1 << 20, 64 << 20).next_multiple_of(1 << 20);
        let block = Superblock {
            cluster: identity.cluster,
            node: identity.node,
            device: identity.device,
            bytes: geometry.bytes,
            sector: geometry.sector,
            log_half_bytes,
            active_half: 0,
            // Old frames that lie there belong to another device: nothing to erase.
            log_epoch: 1,
        };
        write_superblocks(disk, &buffers, &block).await.map_err(io)
    }

    /// Opens a node on its devices under a new incarnation: members of earlier ones are closed (P3).
    ///
    /// # Errors
    /// [`NodeOpenError`]; nothing was changed on the device.
    pub async fn open(env: &Env, config: NodeConfig, devices: Vec<DeviceHandle>) -> Result<Arc<Self>, NodeOpenError> {
        let incarnation = Incarnation(env.random().max(1));
        let node = Self { env: env.clone(), config, incarnation, devices: RwLock::default(), map: RwLock::default() };
        for handle in devices {
            node.add_device(handle).await?;
        }
        Ok(Arc::new(node))
    }

    /// Opens one more device.
    ///
    /// # Errors
    /// [`NodeOpenError`]; nothing was changed on the device.
    pub async fn add_device(&self, handle: DeviceHandle) -> Result<DeviceId, NodeOpenError> {
        let Self { env, config, incarnation, .. } = self;
        let device = Device::open(env, handle, config.cluster, *incarnation, config.buffers.clone()).await?;
        let id = device.id;
        // Held over both: a map that comes meanwhile reaches it either way.
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(map) = &*map {
            device.set_map(Arc::clone(map));
        }
        let mut devices = self.devices.write().unwrap_or_else(PoisonError::into_inner);
        if devices.contains_key(&id) {
            return Err(NodeOpenError::AlreadyOpen(id));
        }
        devices.insert(id, device);
        Ok(id)
    }

    /// Lets a device go: calls to it are refused from now on.
    pub async fn remove_device(&self, id: DeviceId) {
        let removed = self.devices.write().unwrap_or_else(PoisonError::into_inner).remove(&id);
        if let Some(device) = removed {
            device.dead.store(true, Ordering::Release);
            device.quiesce().await;
        }
    }

    fn all(&self) -> Vec<Arc<Device>> {
        self.devices.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Which device a disk is, and whether it was never opened; `None`: none that can be read.
    ///
    /// # Errors
    /// The disk's.
    pub async fn identify(disk: &Arc<dyn Disk>) -> std::io::Result<Option<(DeviceIdentity, bool)>> {
        let block = read_superblock(disk, &BufPool::new(0, 0)).await?;
        Ok(block.ok().map(|block| {
            let Superblock { cluster, node, device, log_epoch, .. } = block;
            (DeviceIdentity { cluster, node, device }, log_epoch == 1)
        }))
    }

    /// Its identity.
    #[must_use]
    pub fn id(&self) -> NodeId {
        self.config.node
    }

    /// Tells the node whose positions are whose; older maps than the one it knows change nothing.
    pub fn set_map(&self, map: &Arc<dyn Assignment>) {
        let mut known = self.map.write().unwrap_or_else(PoisonError::into_inner);
        if known.as_ref().is_none_or(|known| known.epoch() <= map.epoch()) {
            *known = Some(Arc::clone(map));
        }
        for device in self.all() {
            device.set_map(Arc::clone(map));
        }
    }

    /// Waits until no shard can come any more that was let in under an older map; answers the shards that were still open in
    /// positions of others: they are listed once they are sealed. Also those that nobody can finish any more: until they are freed,
    /// whoever recovers their volume looks for them here.
    ///
    /// # Errors
    /// Not a device of this node.
    pub async fn settle(&self, device: DeviceId) -> Result<Vec<ShardId>, NodeError> {
        Ok(self.device(device)?.settle().await)
    }

    /// Frees shards that are at their places elsewhere (RFC 0006, rule 4). `epoch`: of the map by which that was found.
    ///
    /// # Errors
    /// `StaleEpoch`: a put under a newer map has come since; nothing was freed.
    pub fn free_misplaced(&self, device: DeviceId, shards: Vec<ShardId>, epoch: Epoch) -> NodeResult<()> {
        self.on(device, |device| device.free_misplaced(shards, epoch))
    }

    /// What it did since it was opened.
    #[must_use]
    pub fn counters(&self) -> NodeCounters {
        let mut sum = NodeCounters::default();
        for device in self.all() {
            device.counters.add_to(&mut sum);
        }
        sum
    }

    /// Stops taking calls and flushes everything.
    pub async fn close(&self) {
        for device in self.all() {
            device.quiesce().await;
            // A failed device has said so already.
            let _ = device.flush().await;
            let index = Arc::clone(&device.index);
            let _ = device.index_call(move || index.persist()).await;
        }
        self.kill().await;
    }

    /// As a crash of the process: nothing is answered from now on. Returns when the device writes that were under way
    /// have ended (the kernel ends them after a real crash, too), so that another process can open the devices.
    pub async fn kill(&self) {
        for device in self.all() {
            device.dead.store(true, Ordering::Release);
            device.quiesce().await;
        }
    }

    /// Whether a device is open here.
    #[must_use]
    pub fn has_device(&self, id: DeviceId) -> bool {
        self.device(id).is_ok()
    }

    /// A device that is not open here may hold anything, and return with it: that it knows nothing is said of one that was given up only.
    fn device(&self, id: DeviceId) -> Result<Arc<Device>, NodeError> {
        let found = self.devices.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned();
        found.ok_or_else(|| {
            let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
            let is_given_up = map.as_ref().is_some_and(|map| map.is_given_up(id));
            if is_given_up { NodeError::NotFound } else { NodeError::DeviceFailed }
        })
    }

    /// Calls one device; refuses an unknown one.
    fn on<T: Send + 'static>(&self, id: DeviceId, call: impl FnOnce(&Arc<Device>) -> NodeResult<T>) -> NodeResult<T> {
        match self.device(id) {
            Ok(device) => call(&device),
            Err(error) => Box::pin(async move { Err(error) }),
        }
    }

    /// Calls all devices, one after the other; the first error wins, all are called.
    fn on_all(&self, call: impl Fn(Arc<Device>) -> NodeResult<()> + Send + 'static) -> NodeResult<()> {
        let devices = self.all();
        crate::finish::spawned(&self.env, async move {
            let mut outcome = Ok(());
            for device in devices {
                outcome = outcome.and(call(device).await);
            }
            outcome
        })
    }
}

impl NodeApi for Node {
    fn devices(&self) -> NodeResult<Vec<DeviceStatus>> {
        let statuses = self.all().iter().map(|device| device.status()).collect();
        Box::pin(async move { Ok(statuses) })
    }

    fn create_member(&self, request: CreateMember) -> NodeResult<CreatedMember> {
        self.on(request.device, |device| device.create_member(request))
    }

    fn append(&self, member: MemberRef, segment: SegmentName, offset: u64, data: Buf) -> NodeResult<u64> {
        self.on(member.device, |device| device.append(member, segment, offset, data))
    }

    fn flush(&self, request: FlushRequest) -> NodeResult<()> {
        self.on(request.device, |device| device.flush_request(request))
    }

    fn confirm(&self, member: MemberRef) -> NodeResult<()> {
        let confirmed = self.device(member.device).and_then(|device| device.confirm(&member));
        Box::pin(async move { confirmed })
    }

    fn close(&self, device: DeviceId, volume: VolumeId, generation: Generation) -> NodeResult<Vec<ClosedMember>> {
        self.on(device, |device| device.close_members(volume, generation))
    }

    fn read_replica(
        &self,
        device: DeviceId,
        volume: VolumeId,
        set: SetId,
        segment: SegmentName,
        offset: u64,
        length: u32,
    ) -> NodeResult<Buf> {
        self.on(device, |device| device.read_replica(volume, set, segment, offset, length))
    }

    fn sealed(&self, member: MemberRef, segment: SealedSegment) -> NodeResult<()> {
        self.on(member.device, |device| device.sealed(member, segment))
    }

    fn trim_manifest(&self, member: MemberRef, border: u64, undecided: Vec<u64>) -> NodeResult<()> {
        self.on(member.device, |device| device.trim_manifest(member, border, undecided))
    }

    fn registered(&self, view: RegisterView) -> NodeResult<()> {
        self.on_all(move |device| device.registered(view))
    }

    fn put_shard(&self, request: PutShard) -> NodeResult<()> {
        self.on(request.device, |device| device.put_shard(request))
    }

    fn hold_shard(&self, request: HoldShard) -> NodeResult<()> {
        self.on(request.device, |device| device.hold_shard(request))
    }

    fn read_shard(&self, device: DeviceId, shard: ShardId, offset: u64, length: u32) -> NodeResult<Buf> {
        self.on(device, |device| device.read_shard(shard, offset, length))
    }

    fn repair_shard(&self, device: DeviceId, shard: ShardId, offset: u64, data: Buf) -> NodeResult<()> {
        self.on(device, |device| device.repair_shard(shard, offset, data))
    }

    fn shard_info(&self, device: DeviceId, shard: ShardId) -> NodeResult<ShardInfo> {
        self.on(device, |device| {
            let device = Arc::clone(device);
            Box::pin(async move { device.shard_info(shard).await })
        })
    }

    fn verify_shard(&self, device: DeviceId, shard: ShardId) -> NodeResult<()> {
        self.on(device, |device| device.verify_shard(shard))
    }

    fn delete_segments(&self, segments: Vec<SegmentName>) -> NodeResult<()> {
        self.on_all(move |device| device.delete_segments(segments.clone()))
    }

    fn list_shards(
        &self,
        device: DeviceId,
        volume: VolumeId,
        after: Option<ShardId>,
        limit: u32,
    ) -> NodeResult<Vec<ShardInfo>> {
        self.on(device, |device| Box::pin(Arc::clone(device).list_shards(volume, after, limit)))
    }

    fn append_shard(
        &self,
        device: DeviceId,
        incarnation: Incarnation,
        shard: ShardId,
        offset: u64,
        data: Vec<Buf>,
    ) -> NodeResult<u64> {
        self.on(device, |device| device.append_shard(incarnation, shard, offset, data))
    }

    fn finish_shard(
        &self,
        device: DeviceId,
        incarnation: Incarnation,
        shard: ShardId,
        bytes: u64,
        hash: [u8; 32],
    ) -> NodeResult<()> {
        self.on(device, |device| device.finish_shard(incarnation, shard, bytes, hash))
    }
}
