//! What passes between a volume's owner and the members of its journal set, and how shards are named (P3-P6, P9, P10).

use crate::{BLOCK_BYTES, Crc32c, DeviceId, Generation, Incarnation, SegmentName, SetId, ShardIndex, VolumeId};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Largest logical length of a segment in bytes, footer included.
pub const SEGMENT_BYTES_MAX: u64 = 64 << 20;
/// Bytes of a stripe unit: segment bytes are cut in rows of k units.
pub const UNIT_BYTES: u64 = 64 << 10;

/// One shard of one segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ShardId {
    /// The segment.
    pub segment: SegmentName,
    /// The position.
    pub index: ShardIndex,
}

impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.segment, self.index)
    }
}

/// A journal member as its owner addresses it: every message carries the incarnation (P3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MemberRef {
    /// Where the open replicas lie.
    pub device: DeviceId,
    /// The volume.
    pub volume: VolumeId,
    /// The journal set.
    pub set: SetId,
    /// The storage process that created the member.
    pub incarnation: Incarnation,
}

/// A manifest line: a segment that is sealed because this line says so (P6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedSegment {
    /// The name.
    pub name: SegmentName,
    /// Logical bytes: blocks, then the footer.
    pub bytes: u64,
    /// Where the footer (the block list) starts: a multiple of 4096. The blocks lie dense before it.
    pub footer_offset: u64,
    /// CRC-32C of the footer's bytes (`footer_offset..bytes`).
    pub footer_crc: Crc32c,
    /// Positions whose devices were away at the seal, a bit per shard index: a taker goes on filling them.
    pub holes: u64,
}

impl SealedSegment {
    /// The positions of [`SealedSegment::holes`].
    #[must_use]
    pub fn missing(&self) -> Vec<ShardIndex> {
        (0..64).filter(|index| self.holes >> index & 1 == 1).map(ShardIndex).collect()
    }

    /// Data blocks before the footer.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.footer_offset / BLOCK_BYTES
    }
}

/// How much a member's word is worth (P3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum MemberState {
    /// Power loss or device reset since: it has all it flushed.
    Flushed,
    /// The process restarted, same boot, device not reset: it has all it acknowledged.
    Whole,
    /// Same incarnation.
    Live,
}

/// An open replica as found when its member was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenReplica {
    /// The segment.
    pub segment: SegmentName,
    /// Bytes that may hold records: the reserved length, at least everything acknowledged. Records prove themselves.
    pub length: u64,
    /// Bytes from the start that the member's process has written itself, without a gap: there are records up to here, whatever can be
    /// read now. 0 after a restart.
    pub complete: u64,
}

/// What a closed member says (P10, step 2).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClosedMember {
    /// Its set.
    pub set: SetId,
    /// What its word is worth.
    pub state: MemberState,
    /// Names sealed since the checkpoint.
    pub manifest: Vec<SealedSegment>,
    /// Its open replicas.
    pub replicas: Vec<OpenReplica>,
}

/// What to make stable on one device: one device flush that begins after all of this is complete (P4, P9).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlushRequest {
    /// The device.
    pub device: DeviceId,
    /// The storage process the owner believes it talks to; another one refuses.
    pub incarnation: Incarnation,
    /// The member, if this device carries one of the owner's; it must be live and not closed.
    pub member: Option<MemberRef>,
    /// Contiguous lengths of open replicas. A replica that was sealed in between counts as flushed.
    pub replicas: Vec<(SegmentName, u64)>,
    /// Contiguous lengths of open shards (P9). A shard that was finished in between counts as flushed.
    pub shards: Vec<(ShardId, u64)>,
}

/// What a node learns of a register so that it can free what no longer counts (P2, P5). It may be as old as it likes: what is garbage
/// once is so for ever, and what is made later is never named by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisterView {
    /// The volume.
    pub volume: VolumeId,
    /// Generation in the register.
    pub generation: Generation,
    /// The registered set; members of older sets and open shards of older generations than the set's are garbage. `None`:
    /// those of generations below `generation` are. (Of that generation itself nobody knows: its owner may have taken the volume and
    /// made a set that it has not registered yet.)
    pub set: Option<SetId>,
    /// The volume is retired: everything of it is garbage.
    pub deleted: bool,
}
