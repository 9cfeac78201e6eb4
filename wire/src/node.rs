//! The calls of a storage node: journal members, shards, open shards. Served by `node`, used by `pool`.
//!
//! Every call is safe to repeat. A dropped future may or may not have taken effect. Bytes travel as `Buf` without
//! copies when caller and node share a process.

use xsan_env::Buf;
use xsan_env::runtime::BoxFuture;
use xsan_types::{
    ClosedMember, DeviceId, Epoch, ErrorKind, FlushRequest, Generation, Incarnation, MemberRef, RegisterView,
    SealedSegment, SegmentName, SetId, ShardId, VolumeId,
};

/// Result of a node call.
pub type NodeResult<T> = BoxFuture<'static, Result<T, NodeError>>;

/// Why a node refused or failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NodeError {
    /// The node is down or does not answer; nothing is known of the outcome.
    #[error("the node does not answer")]
    Unavailable,
    /// The member is closed: a newer owner exists, or the set was given up. Final.
    #[error("the journal member is closed")]
    Closed,
    /// Another process runs on that device now: what the caller created is not live any more. Final for that member.
    #[error("the storage process was restarted (incarnation {current} now)")]
    NotLive {
        /// The incarnation now.
        current: Incarnation,
    },
    /// The device does not know the set, the segment or the shard.
    #[error("not on this device")]
    NotFound,
    /// No room on the device; nothing was changed.
    #[error("the device is full")]
    NoSpace,
    /// The shard write belongs to an older map.
    #[error("the cluster map is newer (epoch {current})")]
    StaleEpoch {
        /// The node's epoch for that position.
        current: Epoch,
    },
    /// A read found bytes the device cannot give (latent error) or that fail their own checks.
    #[error("the device holds damaged bytes there")]
    Corrupt,
    /// The device failed (I/O error, poisoned by a failed flush).
    #[error("the device failed")]
    DeviceFailed,
    /// The request breaks a rule (unaligned, gap too far, too large).
    #[error("the request breaks a rule of the protocol")]
    Invalid,
}

impl NodeError {
    /// What the caller can do.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Unavailable | Self::DeviceFailed | Self::StaleEpoch { .. } => ErrorKind::Unavailable,
            Self::Closed | Self::NotLive { .. } => ErrorKind::Fenced,
            Self::NotFound => ErrorKind::NotFound,
            Self::NoSpace => ErrorKind::NoSpace,
            Self::Corrupt => ErrorKind::Corrupt,
            Self::Invalid => ErrorKind::Invalid,
        }
    }
}

/// Makes a journal member (P3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateMember {
    /// Where.
    pub device: DeviceId,
    /// Whose.
    pub volume: VolumeId,
    /// Of which set.
    pub set: SetId,
    /// Manifest copied from the set before (P5); empty for a recovered volume, whose checkpoint decides everything.
    pub manifest: Vec<SealedSegment>,
}

/// A made member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreatedMember {
    /// The process that made it.
    pub incarnation: Incarnation,
    /// Logical sector of the device: offsets and lengths of appends are multiples of it.
    pub sector: u32,
}

/// Writes a whole shard.
#[derive(Clone, Debug)]
pub struct PutShard {
    /// Where.
    pub device: DeviceId,
    /// Which.
    pub shard: ShardId,
    /// The writer's map.
    pub epoch: Epoch,
    /// BLAKE3 of all bytes.
    pub hash: [u8; 32],
    /// The bytes, concatenated; total a multiple of 4096. Pieces are aligned to 4096 in memory and length.
    pub data: Vec<Buf>,
}

/// Asks whether a shard is at its place (P11).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HoldShard {
    /// Its place.
    pub device: DeviceId,
    /// Which.
    pub shard: ShardId,
    /// The asker's map, in which that is the shard's place.
    pub epoch: Epoch,
    /// BLAKE3 of its bytes.
    pub hash: [u8; 32],
}

/// What a device knows of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardInfo {
    /// Which.
    pub shard: ShardId,
    /// Bytes (for an open shard: written so far without a gap, as far as the device can tell).
    pub bytes: u64,
    /// BLAKE3 of the bytes; zeroes for an open shard.
    pub hash: [u8; 32],
    /// Still an append target (P9).
    pub open: bool,
}

/// State of one device of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceStatus {
    /// Which.
    pub device: DeviceId,
    /// The storage process now.
    pub incarnation: Incarnation,
    /// Bytes that shards and replicas can use.
    pub capacity: u64,
    /// Of them allocated.
    pub used: u64,
    /// Logical sector.
    pub sector: u32,
    /// Shards on it.
    pub shards: u64,
    /// Journal members on it.
    pub members: u64,
    /// A flush or write failed: it takes no more writes.
    pub failed: bool,
}

/// A storage node.
pub trait NodeApi: Send + Sync + 'static {
    /// All devices.
    fn devices(&self) -> NodeResult<Vec<DeviceStatus>>;

    /// Makes a member; durable (flushed) when answered. Repeating it for a live member of the same set answers the same.
    fn create_member(&self, request: CreateMember) -> NodeResult<CreatedMember>;

    /// Appends at `offset` to the member's replica of `segment`, which is made by its first append. Answers the
    /// *contiguous* length completed on the device (P4), which may be less than `offset` + data when an earlier append is
    /// still running, and more when later ones are done. Offset and length are multiples of the sector.
    fn append(&self, member: MemberRef, segment: SegmentName, offset: u64, data: Buf) -> NodeResult<u64>;

    /// One device flush that begins after everything named is complete (P4). Concurrent requests share the *next* flush.
    fn flush(&self, request: FlushRequest) -> NodeResult<()>;

    /// Answers iff the member is live and not closed (P8).
    fn confirm(&self, member: MemberRef) -> NodeResult<()>;

    /// Closes every member of the volume on the device whose set is older than `generation`, after finishing or refusing what is in
    /// flight; one-way. Answers them all, newest set first, closed earlier or not (none: `unknown`, P3). An older
    /// generation than the newest seen is refused with `Closed`.
    fn close(&self, device: DeviceId, volume: VolumeId, generation: Generation) -> NodeResult<Vec<ClosedMember>>;

    /// Raw bytes of an open replica, of any member state.
    fn read_replica(
        &self,
        device: DeviceId,
        volume: VolumeId,
        set: SetId,
        segment: SegmentName,
        offset: u64,
        length: u32,
    ) -> NodeResult<Buf>;

    /// Enters the segment in the manifest, durably (flushed), *then* frees its replica (P6). Repeats are no-ops.
    fn sealed(&self, member: MemberRef, segment: SealedSegment) -> NodeResult<()>;

    /// Drops manifest lines with a number below `border` that are not in `undecided` (P7).
    fn trim_manifest(&self, member: MemberRef, border: u64, undecided: Vec<u64>) -> NodeResult<()>;

    /// Frees what the register no longer counts (P2, P5), on all devices.
    fn registered(&self, view: RegisterView) -> NodeResult<()>;

    /// Writes a whole shard; flushed when answered. The same shard with the same hash is a no-op; with another hash it is replaced.
    fn put_shard(&self, request: PutShard) -> NodeResult<()>;

    /// Answers iff the device holds exactly this shard, sealed; it frees it under no older map than the asker's from then on.
    /// `NotFound`: it does not hold it, or holds other bytes under its name.
    fn hold_shard(&self, request: HoldShard) -> NodeResult<()>;

    /// Raw bytes of a shard, open or not: offset and length are multiples of 4096 inside it. Unverified: the caller checks.
    fn read_shard(&self, device: DeviceId, shard: ShardId, offset: u64, length: u32) -> NodeResult<Buf>;

    /// Overwrites a range of a sealed shard with its right bytes (repair in place, R6); flushed when answered.
    fn repair_shard(&self, device: DeviceId, shard: ShardId, offset: u64, data: Buf) -> NodeResult<()>;

    /// What the device knows of a shard.
    fn shard_info(&self, device: DeviceId, shard: ShardId) -> NodeResult<ShardInfo>;

    /// Reads the whole shard and compares its hash: `Corrupt` if it differs.
    fn verify_shard(&self, device: DeviceId, shard: ShardId) -> NodeResult<()>;

    /// Frees all shards of the segments on all devices; unknown names are no error (P7).
    fn delete_segments(&self, segments: Vec<SegmentName>) -> NodeResult<()>;

    /// Shards of a volume on a device in order of (segment, index), after `after`, at most `limit`.
    fn list_shards(
        &self,
        device: DeviceId,
        volume: VolumeId,
        after: Option<ShardId>,
        limit: u32,
    ) -> NodeResult<Vec<ShardInfo>>;

    /// Appends to an open shard (P9), which is made by its first append; answers the contiguous length completed. A restart
    /// closes open shards: later appends get `NotLive`.
    fn append_shard(
        &self,
        device: DeviceId,
        incarnation: Incarnation,
        shard: ShardId,
        offset: u64,
        data: Vec<Buf>,
    ) -> NodeResult<u64>;

    /// Turns an open shard of exactly `bytes` bytes into a sealed one; flushed when answered. Repeats are no-ops.
    fn finish_shard(
        &self,
        device: DeviceId,
        incarnation: Incarnation,
        shard: ShardId,
        bytes: u64,
        hash: [u8; 32],
    ) -> NodeResult<()>;
}
