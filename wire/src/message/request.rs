//! What a node is asked.

use crate::codec::{Malformed, Reader, Writer, structures};
use crate::node::{CreateMember, HoldShard, PutShard};
use crate::payload::Payload;
use xsan_env::{Buf, BufPool};
use xsan_types::{
    DeviceId, Epoch, FlushRequest, Generation, Incarnation, MemberRef, RegisterView, SealedSegment, SegmentName, SetId,
    ShardId, VolumeId,
};

/// Numbers of the calls: never used for another one.
#[allow(missing_docs, reason = "named as the calls of NodeApi")]
pub mod operation {
    pub const DEVICES: u16 = 1;
    pub const CREATE_MEMBER: u16 = 2;
    pub const APPEND: u16 = 3;
    pub const FLUSH: u16 = 4;
    pub const CONFIRM: u16 = 5;
    pub const CLOSE: u16 = 6;
    pub const READ_REPLICA: u16 = 7;
    pub const SEALED: u16 = 8;
    pub const TRIM_MANIFEST: u16 = 9;
    pub const REGISTERED: u16 = 10;
    pub const PUT_SHARD: u16 = 11;
    pub const READ_SHARD: u16 = 12;
    pub const REPAIR_SHARD: u16 = 13;
    pub const SHARD_INFO: u16 = 14;
    pub const VERIFY_SHARD: u16 = 15;
    pub const DELETE_SEGMENTS: u16 = 16;
    pub const LIST_SHARDS: u16 = 17;
    pub const APPEND_SHARD: u16 = 18;
    pub const FINISH_SHARD: u16 = 19;
    pub const HOLD_SHARD: u16 = 20;
}

/// A call of `NodeApi` with its arguments. Each variant is the call of that name.
#[allow(missing_docs, reason = "variants and fields are the calls and arguments of NodeApi")]
#[derive(Clone, Debug)]
pub enum NodeRequest {
    Devices,
    CreateMember(CreateMember),
    Append { member: MemberRef, segment: SegmentName, offset: u64, data: Buf },
    Flush(FlushRequest),
    Confirm(MemberRef),
    Close { device: DeviceId, volume: VolumeId, generation: Generation },
    ReadReplica { device: DeviceId, volume: VolumeId, set: SetId, segment: SegmentName, offset: u64, length: u32 },
    Sealed { member: MemberRef, segment: SealedSegment },
    TrimManifest { member: MemberRef, border: u64, undecided: Vec<u64> },
    Registered(RegisterView),
    PutShard(PutShard),
    ReadShard { device: DeviceId, shard: ShardId, offset: u64, length: u32 },
    RepairShard { device: DeviceId, shard: ShardId, offset: u64, data: Buf },
    ShardInfo { device: DeviceId, shard: ShardId },
    VerifyShard { device: DeviceId, shard: ShardId },
    DeleteSegments(Vec<SegmentName>),
    ListShards { device: DeviceId, volume: VolumeId, after: Option<ShardId>, limit: u32 },
    AppendShard { device: DeviceId, incarnation: Incarnation, shard: ShardId, offset: u64, data: Vec<Buf> },
    FinishShard { device: DeviceId, incarnation: Incarnation, shard: ShardId, bytes: u64, hash: [u8; 32] },
    HoldShard(HoldShard),
}

structures! {
    CreateMember { device: DeviceId, volume: VolumeId, set: SetId, manifest: Vec<SealedSegment> }
    HoldShard { device: DeviceId, shard: ShardId, epoch: Epoch, hash: [u8; 32] }
}

/// Writes the fixed part of a request field by field.
macro_rules! put {
    ($out:ident, $($field:expr),*) => {{ $($out.put($field);)* }};
}

impl NodeRequest {
    /// The call's number.
    #[must_use]
    pub fn operation(&self) -> u16 {
        match self {
            Self::Devices => operation::DEVICES,
            Self::CreateMember(_) => operation::CREATE_MEMBER,
            Self::Append { .. } => operation::APPEND,
            Self::Flush(_) => operation::FLUSH,
            Self::Confirm(_) => operation::CONFIRM,
            Self::Close { .. } => operation::CLOSE,
            Self::ReadReplica { .. } => operation::READ_REPLICA,
            Self::Sealed { .. } => operation::SEALED,
            Self::TrimManifest { .. } => operation::TRIM_MANIFEST,
            Self::Registered(_) => operation::REGISTERED,
            Self::PutShard(_) => operation::PUT_SHARD,
            Self::ReadShard { .. } => operation::READ_SHARD,
            Self::RepairShard { .. } => operation::REPAIR_SHARD,
            Self::ShardInfo { .. } => operation::SHARD_INFO,
            Self::VerifyShard { .. } => operation::VERIFY_SHARD,
            Self::DeleteSegments(_) => operation::DELETE_SEGMENTS,
            Self::ListShards { .. } => operation::LIST_SHARDS,
            Self::AppendShard { .. } => operation::APPEND_SHARD,
            Self::FinishShard { .. } => operation::FINISH_SHARD,
            Self::HoldShard(_) => operation::HOLD_SHARD,
        }
    }

    /// Takes the bulk bytes out; what is left is what [`NodeRequest::put`] writes.
    #[must_use]
    pub fn take_payload(&mut self) -> Payload {
        match self {
            Self::Append { data, .. } | Self::RepairShard { data, .. } => std::mem::take(data).into(),
            Self::PutShard(request) => std::mem::take(&mut request.data).into(),
            Self::AppendShard { data, .. } => std::mem::take(data).into(),
            _ => Payload::None,
        }
    }

    /// Whether the node takes the bulk bytes in pieces.
    #[must_use]
    pub fn takes_pieces(&self) -> bool {
        matches!(self, Self::PutShard(_) | Self::AppendShard { .. })
    }

    /// Bulk bytes that the answer will have.
    #[must_use]
    pub fn answer_bytes(&self) -> u32 {
        match self {
            Self::ReadReplica { length, .. } | Self::ReadShard { length, .. } => *length,
            _ => 0,
        }
    }

    /// Writes the fixed part.
    pub fn put(&self, out: &mut Writer<'_>) {
        match self {
            Self::Devices => {}
            Self::CreateMember(request) => out.put(request),
            Self::Append { member, segment, offset, data: _ } => put!(out, member, segment, offset),
            Self::Flush(request) => out.put(request),
            Self::Confirm(member) => out.put(member),
            Self::Close { device, volume, generation } => put!(out, device, volume, generation),
            Self::ReadReplica { device, volume, set, segment, offset, length } => {
                put!(out, device, volume, set, segment, offset, length);
            }
            Self::Sealed { member, segment } => put!(out, member, segment),
            Self::TrimManifest { member, border, undecided } => put!(out, member, border, undecided),
            Self::Registered(view) => out.put(view),
            Self::PutShard(PutShard { device, shard, epoch, hash, data: _ }) => put!(out, device, shard, epoch, hash),
            Self::ReadShard { device, shard, offset, length } => put!(out, device, shard, offset, length),
            Self::RepairShard { device, shard, offset, data: _ } => put!(out, device, shard, offset),
            Self::ShardInfo { device, shard } | Self::VerifyShard { device, shard } => put!(out, device, shard),
            Self::DeleteSegments(segments) => out.put(segments),
            Self::HoldShard(request) => out.put(request),
            Self::ListShards { device, volume, after, limit } => put!(out, device, volume, after, limit),
            Self::AppendShard { device, incarnation, shard, offset, data: _ } => {
                put!(out, device, incarnation, shard, offset);
            }
            Self::FinishShard { device, incarnation, shard, bytes, hash } => {
                put!(out, device, incarnation, shard, bytes, hash);
            }
        }
    }

    /// Reads a request. `None`: this version has no such call.
    ///
    /// # Errors
    /// [`Malformed`]: not what a request of that kind is.
    pub fn get(
        operation: u16,
        mut input: Reader<'_>,
        payload: Payload,
        pool: &BufPool,
    ) -> Result<Option<Self>, Malformed> {
        let wants_payload = matches!(
            operation,
            operation::APPEND | operation::PUT_SHARD | operation::REPAIR_SHARD | operation::APPEND_SHARD
        );
        if !wants_payload && payload.bytes() > 0 {
            return Err(input.malformed("bulk bytes with a call that takes none"));
        }
        let Some(request) = Self::get_fields(operation, &mut input, payload, pool)? else { return Ok(None) };
        input.finish()?;
        Ok(Some(request))
    }

    /// Fields are evaluated in the order written, which is the order of the bytes.
    fn get_fields(
        operation: u16,
        input: &mut Reader<'_>,
        payload: Payload,
        pool: &BufPool,
    ) -> Result<Option<Self>, Malformed> {
        Ok(Some(match operation {
            operation::DEVICES => Self::Devices,
            operation::CREATE_MEMBER => Self::CreateMember(input.get()?),
            operation::APPEND => Self::Append {
                member: input.get()?,
                segment: input.get()?,
                offset: input.get()?,
                data: payload.into_one(pool),
            },
            operation::FLUSH => Self::Flush(input.get()?),
            operation::CONFIRM => Self::Confirm(input.get()?),
            operation::CLOSE => Self::Close { device: input.get()?, volume: input.get()?, generation: input.get()? },
            operation::READ_REPLICA => Self::ReadReplica {
                device: input.get()?,
                volume: input.get()?,
                set: input.get()?,
                segment: input.get()?,
                offset: input.get()?,
                length: input.get()?,
            },
            operation::SEALED => Self::Sealed { member: input.get()?, segment: input.get()? },
            operation::TRIM_MANIFEST => {
                Self::TrimManifest { member: input.get()?, border: input.get()?, undecided: input.get()? }
            }
            operation::REGISTERED => Self::Registered(input.get()?),
            operation::PUT_SHARD => Self::PutShard(PutShard {
                device: input.get::<DeviceId>()?,
                shard: input.get::<ShardId>()?,
                epoch: input.get::<Epoch>()?,
                hash: input.get()?,
                data: payload.into_pieces(),
            }),
            operation::READ_SHARD => Self::ReadShard {
                device: input.get()?,
                shard: input.get()?,
                offset: input.get()?,
                length: input.get()?,
            },
            operation::REPAIR_SHARD => Self::RepairShard {
                device: input.get()?,
                shard: input.get()?,
                offset: input.get()?,
                data: payload.into_one(pool),
            },
            operation::SHARD_INFO => Self::ShardInfo { device: input.get()?, shard: input.get()? },
            operation::VERIFY_SHARD => Self::VerifyShard { device: input.get()?, shard: input.get()? },
            operation::DELETE_SEGMENTS => Self::DeleteSegments(input.get()?),
            operation::HOLD_SHARD => Self::HoldShard(input.get()?),
            operation::LIST_SHARDS => Self::ListShards {
                device: input.get()?,
                volume: input.get()?,
                after: input.get()?,
                limit: input.get()?,
            },
            operation::APPEND_SHARD => Self::AppendShard {
                device: input.get()?,
                incarnation: input.get()?,
                shard: input.get()?,
                offset: input.get()?,
                data: payload.into_pieces(),
            },
            operation::FINISH_SHARD => Self::FinishShard {
                device: input.get()?,
                incarnation: input.get()?,
                shard: input.get()?,
                bytes: input.get()?,
                hash: input.get()?,
            },
            _ => return Ok(None),
        }))
    }
}
