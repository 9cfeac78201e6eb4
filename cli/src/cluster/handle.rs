//! A node that can be stopped and started under the pools that use it.

use std::sync::{Arc, RwLock};
use tokio::sync::watch;
use xsan_env::Buf;
use xsan_types::{
    ClosedMember, DeviceId, FlushRequest, Generation, Incarnation, MemberRef, RegisterView, SealedSegment, SegmentName,
    SetId, ShardId, VolumeId,
};
use xsan_wire::node::{
    CreateMember, CreatedMember, DeviceStatus, HoldShard, NodeApi, NodeError, NodeResult, PutShard, ShardInfo,
};

/// The calls of a node while it runs, `Unavailable` while it does not. A call that is under way when the node stops ends with
/// `Unavailable` at once: nothing is known of its outcome, as with a host that loses power.
pub struct NodeHandle {
    node: RwLock<Option<Arc<dyn NodeApi>>>,
    /// Counts stops.
    stops: watch::Sender<u64>,
}

impl Default for NodeHandle {
    fn default() -> Self {
        Self { node: RwLock::new(None), stops: watch::Sender::new(0) }
    }
}

impl NodeHandle {
    /// Calls go to `node` from now on.
    pub fn start(&self, node: Arc<dyn NodeApi>) {
        *self.node.write().expect("node lock") = Some(node);
    }

    /// Calls fail from now on, also those under way.
    pub fn stop(&self) {
        *self.node.write().expect("node lock") = None;
        self.stops.send_modify(|stops| *stops += 1);
    }

    /// Whether a node is behind the handle.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.node.read().expect("node lock").is_some()
    }

    fn call<T: Send + 'static>(&self, call: impl FnOnce(&dyn NodeApi) -> NodeResult<T>) -> NodeResult<T> {
        let mut answer = match &*self.node.read().expect("node lock") {
            Some(node) => call(&**node),
            None => return Box::pin(async { Err(NodeError::Unavailable) }),
        };
        let stops = &self.stops;
        let before = *stops.borrow();
        let mut stopped = None;
        let stops = stops.subscribe();
        Box::pin(std::future::poll_fn(move |context| {
            use std::task::Poll;
            if let Poll::Ready(answer) = answer.as_mut().poll(context) {
                return Poll::Ready(answer);
            }
            // Made only when the call is not answered at once.
            let stopped = stopped.get_or_insert_with(|| {
                let mut stops = stops.clone();
                Box::pin(async move {
                    let _ = stops.wait_for(|&now| now != before).await;
                })
            });
            stopped.as_mut().poll(context).map(|()| Err(NodeError::Unavailable))
        }))
    }
}

impl NodeApi for NodeHandle {
    fn devices(&self) -> NodeResult<Vec<DeviceStatus>> {
        self.call(|node| node.devices())
    }
    fn create_member(&self, request: CreateMember) -> NodeResult<CreatedMember> {
        self.call(|node| node.create_member(request))
    }
    fn append(&self, member: MemberRef, segment: SegmentName, offset: u64, data: Buf) -> NodeResult<u64> {
        self.call(|node| node.append(member, segment, offset, data))
    }
    fn flush(&self, request: FlushRequest) -> NodeResult<()> {
        self.call(|node| node.flush(request))
    }
    fn confirm(&self, member: MemberRef) -> NodeResult<()> {
        self.call(|node| node.confirm(member))
    }
    fn close(&self, device: DeviceId, volume: VolumeId, generation: Generation) -> NodeResult<Vec<ClosedMember>> {
        self.call(|node| node.close(device, volume, generation))
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
        self.call(|node| node.read_replica(device, volume, set, segment, offset, length))
    }
    fn sealed(&self, member: MemberRef, segment: SealedSegment) -> NodeResult<()> {
        self.call(|node| node.sealed(member, segment))
    }
    fn trim_manifest(&self, member: MemberRef, border: u64, undecided: Vec<u64>) -> NodeResult<()> {
        self.call(|node| node.trim_manifest(member, border, undecided))
    }
    fn registered(&self, view: RegisterView) -> NodeResult<()> {
        self.call(|node| node.registered(view))
    }
    fn put_shard(&self, request: PutShard) -> NodeResult<()> {
        self.call(|node| node.put_shard(request))
    }
    fn hold_shard(&self, request: HoldShard) -> NodeResult<()> {
        self.call(|node| node.hold_shard(request))
    }
    fn read_shard(&self, device: DeviceId, shard: ShardId, offset: u64, length: u32) -> NodeResult<Buf> {
        self.call(|node| node.read_shard(device, shard, offset, length))
    }
    fn repair_shard(&self, device: DeviceId, shard: ShardId, offset: u64, data: Buf) -> NodeResult<()> {
        self.call(|node| node.repair_shard(device, shard, offset, data))
    }
    fn shard_info(&self, device: DeviceId, shard: ShardId) -> NodeResult<ShardInfo> {
        self.call(|node| node.shard_info(device, shard))
    }
    fn verify_shard(&self, device: DeviceId, shard: ShardId) -> NodeResult<()> {
        self.call(|node| node.verify_shard(device, shard))
    }
    fn delete_segments(&self, segments: Vec<SegmentName>) -> NodeResult<()> {
        self.call(|node| node.delete_segments(segments))
    }
    fn list_shards(
        &self,
        device: DeviceId,
        volume: VolumeId,
        after: Option<ShardId>,
        limit: u32,
    ) -> NodeResult<Vec<ShardInfo>> {
        self.call(|node| node.list_shards(device, volume, after, limit))
    }
    fn append_shard(
        &self,
        device: DeviceId,
        incarnation: Incarnation,
        shard: ShardId,
        offset: u64,
        data: Vec<Buf>,
    ) -> NodeResult<u64> {
        self.call(|node| node.append_shard(device, incarnation, shard, offset, data))
    }
    fn finish_shard(
        &self,
        device: DeviceId,
        incarnation: Incarnation,
        shard: ShardId,
        bytes: u64,
        hash: [u8; 32],
    ) -> NodeResult<()> {
        self.call(|node| node.finish_shard(device, incarnation, shard, bytes, hash))
    }
}
