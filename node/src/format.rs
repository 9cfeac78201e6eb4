//! Bytes of a device: superblock, log frames, shard headers. Specified in docs/format/device.md.

use serde::{Deserialize, Serialize};
use xsan_types::{
    ClusterId, DeviceId, Incarnation, NodeId, SealedSegment, SegmentName, SetId, ShardId, VolumeId, crc32c,
};

/// Bytes of a superblock copy.
pub const SUPERBLOCK_BYTES: usize = 4096;
/// Where the two copies lie.
pub const SUPERBLOCK_OFFSETS: [u64; 2] = [0, 64 << 10];
/// Where the log region starts.
pub const LOG_OFFSET: u64 = 1 << 20;
/// Allocation unit of the extent area.
pub const UNIT: u64 = 16 << 10;
/// Bytes of a shard header, before the shard's bytes.
pub const SHARD_HEADER_BYTES: usize = 4096;
/// Smallest device.
pub const DEVICE_BYTES_MIN: u64 = 64 << 20;
/// The format written.
pub const FORMAT_VERSION: u16 = 1;

const SUPERBLOCK_MAGIC: [u8; 8] = *b"XSANDEV\0";
const FRAME_MAGIC: [u8; 4] = *b"XLOG";
const SHARD_MAGIC: [u8; 4] = *b"XSHD";
/// Bytes before a frame's payload.
pub const FRAME_HEADER_BYTES: usize = 64;

/// A run of the extent area, in bytes from the device's start; multiples of [`UNIT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
}

/// What a device is, and which half of its log counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Superblock {
    /// The cluster it belongs to.
    pub cluster: ClusterId,
    /// The node that serves it.
    pub node: NodeId,
    /// Itself.
    pub device: DeviceId,
    /// Bytes of the device when it was formatted.
    pub bytes: u64,
    /// Logical sector when it was formatted.
    pub sector: u32,
    /// Bytes of one half of the log.
    pub log_half_bytes: u64,
    /// Which half counts: 0 or 1.
    pub active_half: u8,
    /// Grows at every change of the half; frames of another epoch are not the log.
    pub log_epoch: u64,
}

impl Superblock {
    /// First byte of the extent area.
    #[must_use]
    pub fn area_offset(&self) -> u64 {
        (LOG_OFFSET + 2 * self.log_half_bytes).next_multiple_of(UNIT)
    }

    /// First byte of a half of the log.
    #[must_use]
    pub fn half_offset(&self, half: u8) -> u64 {
        LOG_OFFSET + u64::from(half & 1) * self.log_half_bytes
    }

    /// Whether the numbers make sense on a device of `bytes`.
    #[must_use]
    pub fn is_sound(&self, bytes: u64) -> bool {
        self.bytes <= bytes
            && self.bytes >= DEVICE_BYTES_MIN
            && self.active_half < 2
            && matches!(self.sector, 512 | 4096)
            && self.log_half_bytes.is_multiple_of(4096)
            && self.log_half_bytes >= 1 << 20
            && self.log_half_bytes < self.bytes / 4
    }

    /// The copy's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let payload = postcard::to_allocvec(self).unwrap_or_default();
        let mut out = vec![0; SUPERBLOCK_BYTES];
        out[..8].copy_from_slice(&SUPERBLOCK_MAGIC);
        out[8..10].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        out[12..16].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        out[16..16 + payload.len()].copy_from_slice(&payload);
        let crc = crc32c(&out[..SUPERBLOCK_BYTES - 4]);
        out[SUPERBLOCK_BYTES - 4..].copy_from_slice(&crc.0.to_le_bytes());
        out
    }

    /// Reads a copy.
    ///
    /// # Errors
    /// [`Unreadable`].
    pub fn decode(bytes: &[u8]) -> Result<Self, Unreadable> {
        let bytes = bytes.get(..SUPERBLOCK_BYTES).ok_or(Unreadable::Damaged)?;
        if bytes.get(..8) != Some(&SUPERBLOCK_MAGIC[..]) {
            return Err(Unreadable::Absent);
        }
        let version = u16_at(bytes, 8).ok_or(Unreadable::Damaged)?;
        if version != FORMAT_VERSION {
            return Err(Unreadable::Version(version));
        }
        if u32_at(bytes, SUPERBLOCK_BYTES - 4) != Some(crc32c(&bytes[..SUPERBLOCK_BYTES - 4]).0) {
            return Err(Unreadable::Damaged);
        }
        let length = u32_at(bytes, 12).ok_or(Unreadable::Damaged)? as usize;
        let payload = bytes.get(16..).and_then(|rest| rest.get(..length)).ok_or(Unreadable::Damaged)?;
        postcard::from_bytes(payload).map_err(|_| Unreadable::Damaged)
    }
}

/// Why bytes are not what was looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unreadable {
    /// Something else lies there.
    #[error("not there")]
    Absent,
    /// A newer format.
    #[error("format version {0} is newer than this program")]
    Version(u16),
    /// Its checksum does not hold.
    #[error("damaged")]
    Damaged,
}

/// A change of the device's state; the log is the state's only home besides the shard index.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // Fields are named after the types they hold; docs/format/device.md has the table.
pub enum LogRecord {
    /// A member was made (P3).
    MemberCreated { volume: VolumeId, set: SetId, boot: u128, incarnation: Incarnation, manifest: Vec<SealedSegment> },
    /// A replica of the member grew.
    ReplicaGrew { volume: VolumeId, set: SetId, segment: SegmentName, extents: Vec<Extent> },
    /// A segment is sealed: manifest line, and its replica is free.
    Sealed { volume: VolumeId, set: SetId, segment: SealedSegment },
    /// Manifest lines below a checkpoint's border are gone.
    ManifestTrimmed { volume: VolumeId, set: SetId, border: u64, undecided: Vec<u64> },
    /// A member and all its replicas are free.
    MemberFreed { volume: VolumeId, set: SetId },
    /// A sealed shard.
    ShardPut { shard: ShardId, entry: ShardEntry },
    /// All shards of the segments are free.
    SegmentsFreed { segments: Vec<SegmentName> },
    /// Everything of the volume is free.
    VolumeFreed { volume: VolumeId },
    /// An open shard grew (P9).
    OpenShardGrew { shard: ShardId, boot: u128, incarnation: Incarnation, extents: Vec<Extent> },
    /// An open shard is given up.
    OpenShardFreed { shard: ShardId },
    /// Sealed shards are free: their positions belong to other devices (P11).
    ShardsFreed { shards: Vec<ShardId> },
}

/// Where a sealed shard lies: its header, then its bytes, over the extents in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardEntry {
    /// Bytes without the header.
    pub bytes: u64,
    /// BLAKE3 of them.
    pub hash: [u8; 32],
    /// Where.
    pub extents: Vec<Extent>,
    /// Order of allocation: of two headers that claim the same place the larger one is right.
    pub allocation: u64,
}

impl ShardEntry {
    /// The header that makes the shard explain itself (the index can be rebuilt from headers).
    #[must_use]
    pub fn header(&self, device: DeviceId, shard: ShardId) -> Vec<u8> {
        let payload = postcard::to_allocvec(&(device, shard, self)).unwrap_or_default();
        let mut out = vec![0; SHARD_HEADER_BYTES];
        out[..4].copy_from_slice(&SHARD_MAGIC);
        out[4..6].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        out[8..12].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        out[16..16 + payload.len()].copy_from_slice(&payload);
        let crc = crc32c(&out[..SHARD_HEADER_BYTES - 4]);
        out[SHARD_HEADER_BYTES - 4..].copy_from_slice(&crc.0.to_le_bytes());
        out
    }

    /// Reads a header found at `offset` of `device`.
    ///
    /// # Errors
    /// [`Unreadable`]; a header that lies at another place than it says is absent there.
    pub fn parse_header(bytes: &[u8], device: DeviceId, offset: u64) -> Result<(ShardId, Self), Unreadable> {
        let bytes = bytes.get(..SHARD_HEADER_BYTES).ok_or(Unreadable::Damaged)?;
        if bytes.get(..4) != Some(&SHARD_MAGIC[..]) {
            return Err(Unreadable::Absent);
        }
        match u16_at(bytes, 4) {
            Some(FORMAT_VERSION) => {}
            Some(version) => return Err(Unreadable::Version(version)),
            None => return Err(Unreadable::Damaged),
        }
        if u32_at(bytes, SHARD_HEADER_BYTES - 4) != Some(crc32c(&bytes[..SHARD_HEADER_BYTES - 4]).0) {
            return Err(Unreadable::Damaged);
        }
        let length = u32_at(bytes, 8).ok_or(Unreadable::Damaged)? as usize;
        let payload = bytes.get(16..).and_then(|rest| rest.get(..length)).ok_or(Unreadable::Damaged)?;
        let (at, shard, entry): (DeviceId, ShardId, Self) =
            postcard::from_bytes(payload).map_err(|_| Unreadable::Damaged)?;
        let here = at == device && entry.extents.first().is_some_and(|extent| extent.offset == offset);
        if here { Ok((shard, entry)) } else { Err(Unreadable::Absent) }
    }
}

/// A frame of the log: records that became part of the state together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Position in the log of this epoch, from 0.
    pub sequence: u64,
    /// Every frame before this one was flushed when this one was written: one of them missing is damage, a later one
    /// missing is a torn tail.
    pub flushed: u64,
    /// Its records.
    pub records: Vec<LogRecord>,
}

impl Frame {
    /// The frame's bytes, whole sectors.
    #[must_use]
    pub fn encode(&self, device: DeviceId, epoch: u64, sector: u32) -> Vec<u8> {
        let payload = postcard::to_allocvec(&self.records).unwrap_or_default();
        let length = (FRAME_HEADER_BYTES + payload.len()).next_multiple_of(sector as usize);
        let mut out = vec![0; length];
        out[..4].copy_from_slice(&FRAME_MAGIC);
        out[4..6].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        out[8..12].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        out[16..32].copy_from_slice(&device.0.to_le_bytes());
        out[32..40].copy_from_slice(&epoch.to_le_bytes());
        out[40..48].copy_from_slice(&self.sequence.to_le_bytes());
        out[48..56].copy_from_slice(&self.flushed.to_le_bytes());
        out[FRAME_HEADER_BYTES..FRAME_HEADER_BYTES + payload.len()].copy_from_slice(&payload);
        let crc = crc32c(&out);
        out[12..16].copy_from_slice(&crc.0.to_le_bytes());
        out
    }

    /// Reads the frame at the start of `bytes`; answers its length on the device as well.
    ///
    /// # Errors
    /// `Absent` for anything that is not a whole frame of this device and epoch.
    pub fn decode(bytes: &[u8], device: DeviceId, epoch: u64, sector: u32) -> Result<(Self, usize), Unreadable> {
        let header = bytes.get(..FRAME_HEADER_BYTES).ok_or(Unreadable::Absent)?;
        let ours = header.get(..4) == Some(&FRAME_MAGIC[..])
            && header.get(16..32) == Some(&device.0.to_le_bytes()[..])
            && u64_at(header, 32) == Some(epoch);
        if !ours {
            return Err(Unreadable::Absent);
        }
        let payload = u32_at(header, 8).ok_or(Unreadable::Absent)? as usize;
        let length = FRAME_HEADER_BYTES
            .checked_add(payload)
            .and_then(|bytes| bytes.checked_next_multiple_of(sector as usize))
            .ok_or(Unreadable::Absent)?;
        let mut frame = bytes.get(..length).ok_or(Unreadable::Absent)?.to_vec();
        let crc = u32_at(&frame, 12).ok_or(Unreadable::Absent)?;
        frame[12..16].fill(0);
        if crc32c(&frame).0 != crc {
            return Err(Unreadable::Absent);
        }
        match u16_at(&frame, 4) {
            Some(FORMAT_VERSION) => {}
            Some(version) => return Err(Unreadable::Version(version)),
            None => return Err(Unreadable::Damaged),
        }
        let payload = frame.get(FRAME_HEADER_BYTES..FRAME_HEADER_BYTES + payload).ok_or(Unreadable::Damaged)?;
        let records = postcard::from_bytes(payload).map_err(|_| Unreadable::Damaged)?;
        let sequence = u64_at(&frame, 40).ok_or(Unreadable::Damaged)?;
        let flushed = u64_at(&frame, 48).ok_or(Unreadable::Damaged)?;
        Ok((Self { sequence, flushed, records }, length))
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use xsan_types::{Generation, PgId, ShardIndex};

    fn superblock() -> Superblock {
        Superblock {
            cluster: ClusterId(1),
            node: NodeId(2),
            device: DeviceId(3),
            bytes: 1 << 30,
            sector: 512,
            log_half_bytes: 4 << 20,
            active_half: 1,
            log_epoch: 7,
        }
    }

    fn shard() -> (ShardId, ShardEntry) {
        let segment = SegmentName { volume: VolumeId(1), generation: Generation(2), number: 3, pg: PgId::default() };
        let extents = vec![Extent { offset: 1 << 24, bytes: UNIT }];
        (ShardId { segment, index: ShardIndex(4) }, ShardEntry { bytes: 8192, hash: [5; 32], extents, allocation: 6 })
    }

    #[test]
    fn the_bytes_of_version_1_stay_as_they_are() {
        // Golden: changing one means a new version and a reader for this one. Trailing checksums are left out: a CRC over
        // its own CRC is constant.
        let block = superblock().encode();
        assert_eq!(Superblock::decode(&block), Ok(superblock()));
        let (id, entry) = shard();
        let header = entry.header(DeviceId(3), id);
        assert_eq!(ShardEntry::parse_header(&header, DeviceId(3), 1 << 24), Ok((id, entry.clone())));
        let frame = Frame { sequence: 1, flushed: 1, records: vec![LogRecord::ShardPut { shard: id, entry }] };
        let bytes = frame.encode(DeviceId(3), 7, 512);
        assert_eq!(Frame::decode(&bytes, DeviceId(3), 7, 512), Ok((frame, bytes.len())));
        let sums = [crc32c(&block[..4092]).0, crc32c(&header[..4092]).0, crc32c(&bytes).0];
        assert_eq!(sums, GOLDEN);
    }
    const GOLDEN: [u32; 3] = [2_932_754_388, 1_022_816_682, 2_735_586_801];

    #[test]
    fn bytes_of_another_device_or_place_are_not_taken() {
        let (id, entry) = shard();
        let header = entry.header(DeviceId(3), id);
        assert!(ShardEntry::parse_header(&header, DeviceId(4), 1 << 24).is_err());
        assert!(ShardEntry::parse_header(&header, DeviceId(3), 1 << 25).is_err());
        let bytes = Frame { sequence: 0, flushed: 0, records: Vec::new() }.encode(DeviceId(3), 7, 512);
        assert!(Frame::decode(&bytes, DeviceId(3), 8, 512).is_err());
        assert!(Frame::decode(&bytes, DeviceId(9), 7, 512).is_err());
    }

    #[test]
    fn flipped_bits_are_refused() {
        let (id, entry) = shard();
        let images = [
            superblock().encode(),
            entry.header(DeviceId(3), id),
            Frame { sequence: 1, flushed: 1, records: vec![LogRecord::ShardPut { shard: id, entry }] }.encode(
                DeviceId(3),
                7,
                512,
            ),
        ];
        for (kind, image) in images.iter().enumerate() {
            for at in 0..image.len() {
                let mut bytes = image.clone();
                bytes[at] ^= 0x10;
                let refused = match kind {
                    0 => Superblock::decode(&bytes).is_err(),
                    1 => ShardEntry::parse_header(&bytes, DeviceId(3), 1 << 24).is_err(),
                    _ => Frame::decode(&bytes, DeviceId(3), 7, 512).is_err(),
                };
                assert!(refused, "image {kind}, byte {at}");
            }
        }
    }
}
