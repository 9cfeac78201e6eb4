//! What a volume needs from the layer below: journal members and segments. `lsm-block` owns the trait, `pool` implements it.

use std::sync::Arc;
use xsan_env::Buf;
use xsan_env::runtime::BoxFuture;
use xsan_types::{
    ChangeToken, ClosedMember, Crc32c, DeviceId, Epoch, ErrorKind, FlushRequest, Generation, Incarnation, MemberRef,
    PgId, Register, RegisterChange, RegisterError, RegisterView, SealedSegment, SegmentName, SetId, ShardId,
    ShardIndex, VolumeId,
};

/// Result of a store call.
pub type StoreResult<T> = BoxFuture<'static, Result<T, StoreError>>;

/// Why the store refused or failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A device does not answer; nothing is known of the outcome.
    #[error("device {device} does not answer")]
    Unavailable {
        /// Which.
        device: DeviceId,
    },
    /// Fewer healthy positions or shards than needed; waits until a node returns.
    #[error("{found} of at least {needed} positions can be reached")]
    TooFew {
        /// Reachable.
        found: usize,
        /// Needed.
        needed: usize,
    },
    /// The member is closed or its process is gone: its set takes no more (P3).
    #[error("the journal member on device {device} is closed")]
    Closed {
        /// Which.
        device: DeviceId,
    },
    /// No room.
    #[error("no space left in the pool")]
    NoSpace,
    /// No such set, segment or shard there.
    #[error("not found")]
    NotFound,
    /// No k good shards give bytes with the right checksum.
    #[error("segment {segment} is damaged at {offset} beyond repair")]
    Corrupt {
        /// Which.
        segment: SegmentName,
        /// Where.
        offset: u64,
    },
    /// A bug or a broken rule.
    #[error("internal error of the store")]
    Internal,
}

impl StoreError {
    /// What the caller can do.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Unavailable { .. } | Self::TooFew { .. } => ErrorKind::Unavailable,
            Self::Closed { .. } => ErrorKind::Fenced,
            Self::NoSpace => ErrorKind::NoSpace,
            Self::NotFound => ErrorKind::NotFound,
            Self::Corrupt { .. } => ErrorKind::Corrupt,
            Self::Internal => ErrorKind::Internal,
        }
    }
}

/// A member as made by [`SegmentStore::create_member`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewMember {
    /// The process that made it.
    pub incarnation: Incarnation,
    /// Logical sector of its device.
    pub sector: u32,
}

/// How the bytes of a read prove themselves (R6). The store tries other shards until the check holds, repairs what was
/// wrong, and returns nothing unverified.
#[derive(Clone, Debug)]
pub enum Check {
    /// One CRC-32C per 4 KiB block of the range.
    Blocks(Vec<Crc32c>),
    /// One CRC-32C over the whole range.
    Whole(Crc32c),
}

/// A read of a sealed segment, or of the full rows of one that is written by rows (P9).
#[derive(Clone, Debug)]
pub struct SegmentRead {
    /// Which.
    pub segment: SegmentName,
    /// Logical bytes of the segment, for the stripe geometry; for open rows: rows written x row bytes.
    pub segment_bytes: u64,
    /// First byte, a multiple of 4096.
    pub offset: u64,
    /// Bytes; with [`Check::Blocks`] a multiple of 4096.
    pub length: u32,
    /// The proof.
    pub check: Check,
}

/// Outcome of a seal: the positions that could not be written (their devices are away). At most m.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holes(pub Vec<ShardIndex>);

/// Members, segments and rows of one pool.
///
/// Calls start at once and in order; each future may be dropped without harm.
pub trait SegmentStore: Send + Sync + 'static {
    /// Data shards k of the pool's scheme: a row is k units of 64 KiB (1 for replicas: rows make no sense there).
    fn data_shards(&self) -> usize;

    /// Whether rows (P9) may be opened now: a k+m scheme with k > 1 and a placement group whose positions are all up.
    fn rows_possible(&self) -> bool;

    /// Devices for a new journal set: f+1 in different failure domains, fewer while domains are down (never fewer than 2, 1 only by
    /// explicit policy or scheme), none of `avoid`. Spread by volume.
    ///
    /// # Errors
    /// `TooFew`.
    fn plan_set(&self, volume: VolumeId, avoid: &[DeviceId]) -> Result<Vec<DeviceId>, StoreError>;

    /// How many members a set has when all is well: f+1, or fewer when the pool has fewer domains.
    fn set_size(&self) -> usize;

    /// A placement group for a new segment; prefers groups whose devices carry `members` for replica schemes.
    fn choose_pg(&self, volume: VolumeId, number: u64, members: &[DeviceId]) -> PgId;

    /// Makes a member, durably (P3).
    fn create_member(
        &self,
        device: DeviceId,
        volume: VolumeId,
        set: SetId,
        manifest: Vec<SealedSegment>,
    ) -> StoreResult<NewMember>;

    /// See `NodeApi::append`: answers the contiguous length.
    fn append(&self, member: MemberRef, segment: SegmentName, offset: u64, data: Buf) -> StoreResult<u64>;

    /// See `NodeApi::flush`.
    fn flush(&self, request: FlushRequest) -> StoreResult<()>;

    /// See `NodeApi::confirm`.
    fn confirm(&self, member: MemberRef) -> StoreResult<()>;

    /// See `NodeApi::close`.
    fn close(&self, device: DeviceId, volume: VolumeId, generation: Generation) -> StoreResult<Vec<ClosedMember>>;

    /// Raw bytes of an open replica; the caller verifies records.
    fn read_replica(
        &self,
        device: DeviceId,
        volume: VolumeId,
        set: SetId,
        segment: SegmentName,
        offset: u64,
        length: u32,
    ) -> StoreResult<Buf>;

    /// See `NodeApi::sealed`.
    fn sealed(&self, member: MemberRef, segment: SealedSegment) -> StoreResult<()>;

    /// See `NodeApi::trim_manifest`.
    fn trim_manifest(&self, member: MemberRef, border: u64, undecided: Vec<u64>) -> StoreResult<()>;

    /// Tells all nodes of a registered change so that they free what no longer counts; best effort.
    fn registered(&self, view: RegisterView) -> StoreResult<()>;

    /// Writes a whole segment (`body` concatenated) to every reachable position of its group, flushed. Pieces are
    /// multiples of 4096 in length except the last; memory alignment is not required (unaligned pieces are copied).
    ///
    /// # Errors
    /// `TooFew` with fewer than k positions; the caller waits and repeats.
    fn seal(&self, segment: SegmentName, body: Vec<Buf>) -> StoreResult<Holes>;

    /// Reads and verifies; degraded when shards are missing, repaired in place when wrong.
    fn read(&self, read: SegmentRead) -> StoreResult<Buf>;

    /// Frees segments; late, repeated or lost is all the same (P7).
    fn delete(&self, segments: Vec<SegmentName>) -> StoreResult<()>;

    /// Devices of a group's positions, in order; `None` where there is none.
    fn positions(&self, pg: PgId) -> Vec<Option<DeviceId>>;

    /// Where positions were before they moved; `None` where one does not move, or was not there (P11).
    fn positions_before(&self, pg: PgId) -> Vec<Option<DeviceId>>;

    /// Whether journal members should leave a device: it is being emptied, or not of this pool any more.
    fn is_leaving(&self, device: DeviceId) -> bool;

    /// Version of the map.
    fn map_epoch(&self) -> Epoch;

    /// Devices that can be asked what they hold.
    fn devices(&self) -> Vec<DeviceId>;

    /// Shards that a device holds of a volume, in order, the first behind `after`; empty at the end.
    fn list(&self, device: DeviceId, volume: VolumeId, after: Option<ShardId>) -> StoreResult<Vec<ShardId>>;

    /// Rebuilds missing positions of a segment that has holes; answers those that are still missing.
    fn fill_holes(&self, segment: SegmentName, segment_bytes: u64, holes: Holes) -> StoreResult<Holes>;

    /// Opens a segment for writing by rows (P9).
    fn open_rows(&self, segment: SegmentName) -> StoreResult<Arc<dyn RowWriter>>;

    /// Counts up whenever a node or device comes or goes; owners look at their sets and holes then.
    fn changes(&self) -> tokio::sync::watch::Receiver<u64>;
}

/// A segment that is written by whole stripe rows straight to its k+m extents (P9).
pub trait RowWriter: Send + Sync + 'static {
    /// Writes rows from `first_row`: `data` concatenated is a whole number of rows (k x 64 KiB each), pieces aligned to
    /// 4096 in memory and length. Complete when all k+m positions have them. Calls come in order of rows and may overlap.
    fn append(&self, first_row: u64, data: Vec<Buf>) -> StoreResult<()>;

    /// Devices, incarnations and contiguous lengths to name in a FLUSH: everything whose append has completed.
    fn flush_requests(&self) -> Vec<FlushRequest>;

    /// Appends the footer behind the rows and turns the extents into flushed shards.
    fn finish(&self, footer: Buf) -> StoreResult<()>;
}

/// The volume registers (P2), as an owner sees them.
pub trait Registers: Send + Sync + 'static {
    /// The register now.
    fn read(&self, volume: VolumeId) -> BoxFuture<'static, Result<Register, RegisterError>>;

    /// A conditional change by a writer who knows `generation` and `version` (ignored by `Take` and `Retire`). `NoAnswer`: repeat it with the
    /// same token until there is an answer; until then neither outcome may be relied on.
    fn change(
        &self,
        volume: VolumeId,
        generation: Generation,
        version: u64,
        token: ChangeToken,
        change: RegisterChange,
    ) -> BoxFuture<'static, Result<Register, RegisterError>>;
}
