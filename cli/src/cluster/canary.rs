//! Rules of the protocol, broken on purpose, so that the tests prove that they would notice. Only in builds with the feature
//! `canary`, which nobody is given; the rule is named by `XSAN_CANARY`.

use std::sync::Arc;
use xsan_env::Buf;
use xsan_types::{
    ClosedMember, DeviceId, FlushRequest, Generation, Incarnation, MemberRef, RegisterView, SealedSegment, SegmentName,
    SetId, ShardId, VolumeId,
};
use xsan_wire::node::{
    CreateMember, CreatedMember, DeviceStatus, HoldShard, NodeApi, NodeError, NodeResult, PutShard, ShardInfo,
};

/// Which rule is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// P4: a member answers some appends that it has not got.
    Append,
    /// P3: a member that is closed goes on to answer appends.
    Closed,
    /// P4: a member answers a flush that it has not done.
    Flush,
    /// P8: reads are answered without being confirmed. Its process does not cut off clients of an owner that it knows to be replaced
    /// either: that is quicker than any client most of the time, and no rule of the protocol.
    Confirm,
}

impl Rule {
    fn named() -> Option<Self> {
        match std::env::var("XSAN_CANARY").ok()?.as_str() {
            "append" => Some(Self::Append),
            "closed" => Some(Self::Closed),
            "flush" => Some(Self::Flush),
            "confirm" => Some(Self::Confirm),
            // Another fault is wanted, no broken rule: see `xsan_env::faults`.
            "none" => None,
            other => panic!("XSAN_CANARY={other} is no rule"),
        }
    }
}

/// Whether clients stay with an owner that was replaced.
#[must_use]
pub fn keeps_replaced_owners() -> bool {
    Rule::named() == Some(Rule::Confirm)
}

/// A storage node that breaks a rule.
struct Broken {
    node: Arc<dyn NodeApi>,
    rule: Rule,
}

/// Breaks the rule that the environment names.
///
/// # Panics
/// It names none that there is.
#[must_use]
pub fn wrap(node: Arc<dyn NodeApi>) -> Arc<dyn NodeApi> {
    let Some(rule) = Rule::named() else { return node };
    tracing::warn!(?rule, "this process breaks a rule of the protocol");
    Arc::new(Broken { node, rule })
}

/// A quarter of the records of a device, always the same ones.
fn is_dropped(device: DeviceId, segment: SegmentName, offset: u64) -> bool {
    let mixed = (device.0 as u64)
        ^ segment.number.wrapping_mul(0x9e37_79b9_7f4a_7c15)
        ^ offset.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed ^ (mixed >> 29)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 62 == 0
}

impl NodeApi for Broken {
    fn append(&self, member: MemberRef, segment: SegmentName, offset: u64, data: Buf) -> NodeResult<u64> {
        let (rule, end) = (self.rule, offset + data.len() as u64);
        if rule == Rule::Append && offset > 0 && is_dropped(member.device, segment, offset) {
            return Box::pin(async move { Ok(end) });
        }
        let answer = self.node.append(member, segment, offset, data);
        Box::pin(async move {
            match (rule, answer.await) {
                // Behind a gap of its own making.
                (Rule::Append, Ok(length)) => Ok(length.max(end)),
                (Rule::Closed, Err(NodeError::Closed | NodeError::NotFound)) => Ok(end),
                (_, answer) => answer,
            }
        })
    }

    fn confirm(&self, member: MemberRef) -> NodeResult<()> {
        match self.rule {
            Rule::Confirm => Box::pin(async { Ok(()) }),
            _ => self.node.confirm(member),
        }
    }

    fn flush(&self, request: FlushRequest) -> NodeResult<()> {
        match self.rule {
            // What was dropped cannot be flushed, and must not be missed.
            Rule::Append | Rule::Flush => Box::pin(async { Ok(()) }),
            Rule::Closed | Rule::Confirm => self.node.flush(request),
        }
    }

    fn devices(&self) -> NodeResult<Vec<DeviceStatus>> {
        self.node.devices()
    }
    fn create_member(&self, request: CreateMember) -> NodeResult<CreatedMember> {
        self.node.create_member(request)
    }
    fn close(&self, device: DeviceId, volume: VolumeId, generation: Generation) -> NodeResult<Vec<ClosedMember>> {
        self.node.close(device, volume, generation)
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
        self.node.read_replica(device, volume, set, segment, offset, length)
    }
    fn sealed(&self, member: MemberRef, segment: SealedSegment) -> NodeResult<()> {
        self.node.sealed(member, segment)
    }
    fn trim_manifest(&self, member: MemberRef, border: u64, undecided: Vec<u64>) -> NodeResult<()> {
        self.node.trim_manifest(member, border, undecided)
    }
    fn registered(&self, view: RegisterView) -> NodeResult<()> {
        self.node.registered(view)
    }
    fn put_shard(&self, request: PutShard) -> NodeResult<()> {
        self.node.put_shard(request)
    }
    fn hold_shard(&self, request: HoldShard) -> NodeResult<()> {
        self.node.hold_shard(request)
    }
    fn read_shard(&self, device: DeviceId, shard: ShardId, offset: u64, length: u32) -> NodeResult<Buf> {
        self.node.read_shard(device, shard, offset, length)
    }
    fn repair_shard(&self, device: DeviceId, shard: ShardId, offset: u64, data: Buf) -> NodeResult<()> {
        self.node.repair_shard(device, shard, offset, data)
    }
    fn shard_info(&self, device: DeviceId, shard: ShardId) -> NodeResult<ShardInfo> {
        self.node.shard_info(device, shard)
    }
    fn verify_shard(&self, device: DeviceId, shard: ShardId) -> NodeResult<()> {
        self.node.verify_shard(device, shard)
    }
    fn delete_segments(&self, segments: Vec<SegmentName>) -> NodeResult<()> {
        self.node.delete_segments(segments)
    }
    fn list_shards(
        &self,
        device: DeviceId,
        volume: VolumeId,
        after: Option<ShardId>,
        limit: u32,
    ) -> NodeResult<Vec<ShardInfo>> {
        self.node.list_shards(device, volume, after, limit)
    }
    fn append_shard(
        &self,
        device: DeviceId,
        incarnation: Incarnation,
        shard: ShardId,
        offset: u64,
        data: Vec<Buf>,
    ) -> NodeResult<u64> {
        self.node.append_shard(device, incarnation, shard, offset, data)
    }
    fn finish_shard(
        &self,
        device: DeviceId,
        incarnation: Incarnation,
        shard: ShardId,
        bytes: u64,
        hash: [u8; 32],
    ) -> NodeResult<()> {
        self.node.finish_shard(device, incarnation, shard, bytes, hash)
    }
}
