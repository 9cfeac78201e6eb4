//! A storage node at the other end of a connection, called like one in this process.

use crate::codec::{WireVersion, Writer};
use crate::error::CallError;
use crate::handshake::Class;
use crate::link::{Call, Waiting};
use crate::message::{NodeAnswer, NodeRequest};
use crate::node::{
    CreateMember, CreatedMember, DeviceStatus, HoldShard, NodeApi, NodeError, NodeResult, PutShard, ShardInfo,
};
use crate::peer::Peer;
use crate::service::ServiceId;
use std::future::ready;
use std::sync::Arc;
use tokio::sync::oneshot;
use xsan_env::Buf;
use xsan_types::{
    ClosedMember, DeviceId, FlushRequest, Generation, Incarnation, MemberRef, RegisterView, SealedSegment, SegmentName,
    SetId, ShardId, VolumeId,
};

/// A [`NodeApi`] over the wire. A call is sent when it is made, not when its future is polled, and calls of one class begin
/// at the node in the order in which they were made. No answer (connection lost, deadline passed, node away) is
/// [`NodeError::Unavailable`]: it may have been done or not, and is safe to repeat.
#[derive(Clone, Debug)]
pub struct RemoteNode {
    peer: Arc<Peer>,
    /// `None`: by what the call is.
    class: Option<Class>,
}

impl RemoteNode {
    /// Calls that guests wait for go over the guest connection, the others over the bulk connection.
    #[must_use]
    pub fn new(peer: Arc<Peer>) -> Self {
        Self { peer, class: None }
    }

    /// All calls go over the bulk connection: for repair, rebuild and scrub, whose reads must not stand before a guest's.
    #[must_use]
    pub fn bulk(peer: Arc<Peer>) -> Self {
        Self { peer, class: Some(Class::Bulk) }
    }

    /// The peer behind it.
    #[must_use]
    pub fn peer(&self) -> &Arc<Peer> {
        &self.peer
    }

    fn call<T: Send + 'static>(
        &self,
        mut request: NodeRequest,
        pick: impl FnOnce(NodeAnswer) -> Option<T> + Send + 'static,
    ) -> NodeResult<T> {
        let class = self.class.unwrap_or_else(|| class_of(&request));
        let (sender, receiver) = oneshot::channel();
        let operation = request.operation();
        let call = Call {
            service: ServiceId::NODE,
            operation,
            payload: request.take_payload(),
            in_pieces: request.takes_pieces(),
            answer_bytes: request.answer_bytes(),
            patience: self.peer.endpoint.limits.call_for(class),
            waiting: Some(Waiting::Node { operation, sender }),
        };
        // The only version there is. A second one needs the version of the connection here, which a call may precede: then
        // requests are laid out in the oldest form, or when they are sent.
        let put = |out: &mut Vec<u8>| request.put(&mut Writer::new(out, WireVersion::V1));
        match self.peer.link(class).call(call, put) {
            Ok(()) => Box::pin(async move {
                let answer = receiver.await.unwrap_or(Err(NodeError::Unavailable))?;
                // The answer was read as one to this call.
                pick(answer).ok_or(NodeError::Unavailable)
            }),
            Err(CallError::TooLarge) => Box::pin(ready(Err(NodeError::Invalid))),
            Err(_) => Box::pin(ready(Err(NodeError::Unavailable))),
        }
    }

    fn done(&self, request: NodeRequest) -> NodeResult<()> {
        self.call(request, |answer| matches!(answer, NodeAnswer::Done).then_some(()))
    }

    fn length(&self, request: NodeRequest) -> NodeResult<u64> {
        self.call(request, |answer| if let NodeAnswer::Length(length) = answer { Some(length) } else { None })
    }

    /// A read that answers with other than the wanted bytes' number is no answer.
    fn read(&self, request: NodeRequest) -> NodeResult<Buf> {
        let wanted = request.answer_bytes();
        self.call(request, move |answer| match answer {
            NodeAnswer::Bytes(bytes) if u32::try_from(bytes.len()) == Ok(wanted) => Some(bytes),
            _ => None,
        })
    }
}

/// Where a call goes: whatever a guest's request or a take-over waits for is guest traffic.
fn class_of(request: &NodeRequest) -> Class {
    match request {
        NodeRequest::PutShard(_)
        | NodeRequest::RepairShard { .. }
        | NodeRequest::VerifyShard { .. }
        | NodeRequest::HoldShard(_)
        | NodeRequest::ListShards { .. }
        | NodeRequest::DeleteSegments(_)
        | NodeRequest::Registered(_)
        | NodeRequest::Devices => Class::Bulk,
        _ => Class::Guest,
    }
}

impl NodeApi for RemoteNode {
    fn devices(&self) -> NodeResult<Vec<DeviceStatus>> {
        self.call(NodeRequest::Devices, |answer| match answer {
            NodeAnswer::Devices(devices) => Some(devices),
            _ => None,
        })
    }

    fn create_member(&self, request: CreateMember) -> NodeResult<CreatedMember> {
        self.call(NodeRequest::CreateMember(request), |answer| match answer {
            NodeAnswer::Created(created) => Some(created),
            _ => None,
        })
    }

    fn append(&self, member: MemberRef, segment: SegmentName, offset: u64, data: Buf) -> NodeResult<u64> {
        self.length(NodeRequest::Append { member, segment, offset, data })
    }

    fn flush(&self, request: FlushRequest) -> NodeResult<()> {
        self.done(NodeRequest::Flush(request))
    }

    fn confirm(&self, member: MemberRef) -> NodeResult<()> {
        self.done(NodeRequest::Confirm(member))
    }

    fn close(&self, device: DeviceId, volume: VolumeId, generation: Generation) -> NodeResult<Vec<ClosedMember>> {
        self.call(NodeRequest::Close { device, volume, generation }, |answer| match answer {
            NodeAnswer::Closed(members) => Some(members),
            _ => None,
        })
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
        self.read(NodeRequest::ReadReplica { device, volume, set, segment, offset, length })
    }

    fn sealed(&self, member: MemberRef, segment: SealedSegment) -> NodeResult<()> {
        self.done(NodeRequest::Sealed { member, segment })
    }

    fn trim_manifest(&self, member: MemberRef, border: u64, undecided: Vec<u64>) -> NodeResult<()> {
        self.done(NodeRequest::TrimManifest { member, border, undecided })
    }

    fn registered(&self, view: RegisterView) -> NodeResult<()> {
        self.done(NodeRequest::Registered(view))
    }

    fn put_shard(&self, request: PutShard) -> NodeResult<()> {
        self.done(NodeRequest::PutShard(request))
    }

    fn hold_shard(&self, request: HoldShard) -> NodeResult<()> {
        self.done(NodeRequest::HoldShard(request))
    }

    fn read_shard(&self, device: DeviceId, shard: ShardId, offset: u64, length: u32) -> NodeResult<Buf> {
        self.read(NodeRequest::ReadShard { device, shard, offset, length })
    }

    fn repair_shard(&self, device: DeviceId, shard: ShardId, offset: u64, data: Buf) -> NodeResult<()> {
        self.done(NodeRequest::RepairShard { device, shard, offset, data })
    }

    fn shard_info(&self, device: DeviceId, shard: ShardId) -> NodeResult<ShardInfo> {
        self.call(NodeRequest::ShardInfo { device, shard }, |answer| match answer {
            NodeAnswer::Shard(info) => Some(info),
            _ => None,
        })
    }

    fn verify_shard(&self, device: DeviceId, shard: ShardId) -> NodeResult<()> {
        self.done(NodeRequest::VerifyShard { device, shard })
    }

    fn delete_segments(&self, segments: Vec<SegmentName>) -> NodeResult<()> {
        self.done(NodeRequest::DeleteSegments(segments))
    }

    fn list_shards(
        &self,
        device: DeviceId,
        volume: VolumeId,
        after: Option<ShardId>,
        limit: u32,
    ) -> NodeResult<Vec<ShardInfo>> {
        self.call(NodeRequest::ListShards { device, volume, after, limit }, |answer| match answer {
            NodeAnswer::Shards(infos) => Some(infos),
            _ => None,
        })
    }

    fn append_shard(
        &self,
        device: DeviceId,
        incarnation: Incarnation,
        shard: ShardId,
        offset: u64,
        data: Vec<Buf>,
    ) -> NodeResult<u64> {
        self.length(NodeRequest::AppendShard { device, incarnation, shard, offset, data })
    }

    fn finish_shard(
        &self,
        device: DeviceId,
        incarnation: Incarnation,
        shard: ShardId,
        bytes: u64,
        hash: [u8; 32],
    ) -> NodeResult<()> {
        self.done(NodeRequest::FinishShard { device, incarnation, shard, bytes, hash })
    }
}
