//! What a node answers.

use super::operation;
use crate::codec::{Field, Malformed, Reader, Writer, structures};
use crate::node::{CreatedMember, DeviceStatus, NodeError, ShardInfo};
use crate::payload::Payload;
use xsan_env::{Buf, BufPool};
use xsan_types::{ClosedMember, DeviceId, Incarnation, ShardId};

/// What a call of `NodeApi` answers when it succeeds.
#[derive(Clone, Debug)]
pub enum NodeAnswer {
    /// Done; nothing to tell.
    Done,
    /// Of `devices`.
    Devices(Vec<DeviceStatus>),
    /// Of `create_member`.
    Created(CreatedMember),
    /// Of the appends: the contiguous length.
    Length(u64),
    /// Of `close`.
    Closed(Vec<ClosedMember>),
    /// Of the reads.
    Bytes(Buf),
    /// Of `shard_info`.
    Shard(ShardInfo),
    /// Of `list_shards`.
    Shards(Vec<ShardInfo>),
}

structures! {
    CreatedMember { incarnation: Incarnation, sector: u32 }
    ShardInfo { shard: ShardId, bytes: u64, hash: [u8; 32], open: bool }
    DeviceStatus {
        device: DeviceId,
        incarnation: Incarnation,
        capacity: u64,
        used: u64,
        sector: u32,
        shards: u64,
        members: u64,
        failed: bool,
    }
}

impl NodeAnswer {
    /// Takes the bulk bytes out; what is left is what [`NodeAnswer::put`] writes.
    #[must_use]
    pub fn take_payload(&mut self) -> Payload {
        match self {
            Self::Bytes(bytes) => std::mem::take(bytes).into(),
            _ => Payload::None,
        }
    }

    /// Writes the fixed part.
    pub fn put(&self, out: &mut Writer<'_>) {
        match self {
            Self::Done | Self::Bytes(_) => {}
            Self::Devices(devices) => out.put(devices),
            Self::Created(created) => out.put(created),
            Self::Length(length) => out.put(length),
            Self::Closed(members) => out.put(members),
            Self::Shard(info) => out.put(info),
            Self::Shards(infos) => out.put(infos),
        }
    }

    /// Reads the answer to `operation`.
    ///
    /// # Errors
    /// [`Malformed`]: not what an answer to that call is.
    pub fn get(operation: u16, mut input: Reader<'_>, payload: Payload, pool: &BufPool) -> Result<Self, Malformed> {
        let is_read = matches!(operation, operation::READ_REPLICA | operation::READ_SHARD);
        if !is_read && payload.bytes() > 0 {
            return Err(input.malformed("bulk bytes with an answer that has none"));
        }
        let answer = match operation {
            operation::DEVICES => Self::Devices(input.get()?),
            operation::CREATE_MEMBER => Self::Created(input.get()?),
            operation::APPEND | operation::APPEND_SHARD => Self::Length(input.get()?),
            operation::CLOSE => Self::Closed(input.get()?),
            operation::READ_REPLICA | operation::READ_SHARD => Self::Bytes(payload.into_one(pool)),
            operation::SHARD_INFO => Self::Shard(input.get()?),
            operation::LIST_SHARDS => Self::Shards(input.get()?),
            _ => Self::Done,
        };
        input.finish()?;
        Ok(answer)
    }
}

/// Writes an error of a node: its number, then what it carries.
pub fn put_error(error: &NodeError, out: &mut Writer<'_>) {
    let (number, detail): (u8, Option<u64>) = match error {
        NodeError::Unavailable => (1, None),
        NodeError::Closed => (2, None),
        NodeError::NotLive { current } => (3, Some(current.0)),
        NodeError::NotFound => (4, None),
        NodeError::NoSpace => (5, None),
        NodeError::StaleEpoch { current } => (6, Some(current.0)),
        NodeError::Corrupt => (7, None),
        NodeError::DeviceFailed => (8, None),
        NodeError::Invalid => (9, None),
    };
    out.put(&number);
    if let Some(detail) = detail {
        out.put(&detail);
    }
}

/// Reads an error of a node.
///
/// # Errors
/// [`Malformed`]: no error that this version has.
pub fn get_error(mut input: Reader<'_>) -> Result<NodeError, Malformed> {
    let error = match input.get::<u8>()? {
        1 => NodeError::Unavailable,
        2 => NodeError::Closed,
        3 => NodeError::NotLive { current: Field::get(&mut input)? },
        4 => NodeError::NotFound,
        5 => NodeError::NoSpace,
        6 => NodeError::StaleEpoch { current: Field::get(&mut input)? },
        7 => NodeError::Corrupt,
        8 => NodeError::DeviceFailed,
        9 => NodeError::Invalid,
        _ => return Err(input.malformed("unknown error")),
    };
    input.finish()?;
    Ok(error)
}
