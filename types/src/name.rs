//! The name of a segment.

use crate::{Generation, PgId, VolumeId};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A segment's name: used once, never again (P1). `number` grows over the whole life of a volume (it does not restart
/// with a generation), so inside one volume the number alone is unique.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SegmentName {
    /// The volume whose log this is a piece of; only its owner may delete it (H14).
    pub volume: VolumeId,
    /// Ownership that wrote it.
    pub generation: Generation,
    /// Number in the volume's log, from 1.
    pub number: u64,
    /// Where its shards live.
    pub pg: PgId,
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}@{}", self.volume, self.generation, self.number, self.pg)
    }
}

/// Bytes of an encoded segment name: volume, generation, number (u64 each), pool, pg index (u32 each), little endian.
pub const SEGMENT_NAME_BYTES: usize = 32;

impl SegmentName {
    /// The fixed little-endian encoding used by every on-disk format.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; SEGMENT_NAME_BYTES] {
        let mut out = [0; SEGMENT_NAME_BYTES];
        out[0..8].copy_from_slice(&self.volume.0.to_le_bytes());
        out[8..16].copy_from_slice(&self.generation.0.to_le_bytes());
        out[16..24].copy_from_slice(&self.number.to_le_bytes());
        out[24..28].copy_from_slice(&self.pg.pool.0.to_le_bytes());
        out[28..32].copy_from_slice(&self.pg.index.to_le_bytes());
        out
    }

    /// Reads the encoding of [`SegmentName::to_bytes`]; every bit pattern is a name.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; SEGMENT_NAME_BYTES]) -> Self {
        let u64_at = |at: usize| {
            let mut raw = [0; 8];
            raw.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(raw)
        };
        let u32_at = |at: usize| {
            let mut raw = [0; 4];
            raw.copy_from_slice(&bytes[at..at + 4]);
            u32::from_le_bytes(raw)
        };
        Self {
            volume: VolumeId(u64_at(0)),
            generation: Generation(u64_at(8)),
            number: u64_at(16),
            pg: PgId { pool: crate::PoolId(u32_at(24)), index: u32_at(28) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PoolId;

    #[test]
    fn a_name_survives_its_encoding() {
        let name = SegmentName {
            volume: VolumeId(1),
            generation: Generation(u64::MAX),
            number: 0x0102_0304_0506_0708,
            pg: PgId { pool: PoolId(9), index: 0xabcd },
        };
        assert_eq!(SegmentName::from_bytes(&name.to_bytes()), name);
        assert_eq!(name.to_bytes()[16..24], [8, 7, 6, 5, 4, 3, 2, 1]);
    }
}
