//! The footer of a sealed segment: what its dense blocks are (docs/format/segment.md, "Footer"). With it a segment
//! explains itself, so the index can be rebuilt from segments alone (R4).

use super::codec::Reader;
use super::record::EntryKind;
use xsan_types::name::SEGMENT_NAME_BYTES;
use xsan_types::{BLOCK_BYTES, Crc32c, Generation, Lba, SegmentName, Sequence, Version, crc32c};

/// First bytes of a footer: "XFTR".
pub const FOOTER_MAGIC: u32 = u32::from_le_bytes(*b"XFTR");
/// The version written.
pub const FOOTER_VERSION: u16 = 1;
const FIXED_BYTES: usize = 64;
const ENTRY_BYTES: usize = 32;
const CRC_BYTES: usize = 4;
/// Last bytes of the footer: length of the footer and the magic again, so that it can be found from the segment's end.
const TRAILER_BYTES: usize = 12;

/// A run of blocks, or of zeroes, in the order of the log. Versions are those of the guest writes, kept by re-seal and cleaning (P1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FooterEntry {
    /// What.
    pub kind: EntryKind,
    /// First block.
    pub lba: Lba,
    /// Blocks; for zeroes any number.
    pub count: u64,
    /// Version of the guest write.
    pub version: Version,
}

/// A decoded footer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footer {
    /// The segment it belongs to.
    pub segment: SegmentName,
    /// Its entries, in order; data entries lie dense from position 0.
    pub entries: Vec<FooterEntry>,
    /// One per data block.
    pub crcs: Vec<Crc32c>,
}

/// Why bytes are not a footer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FooterError {
    /// Damaged, or of another segment.
    #[error("the segment's footer is damaged")]
    Damaged,
    /// A newer format.
    #[error("footer format version {0} is newer than this program")]
    Version(u16),
}

/// Upper bound of the bytes of a footer with so many entries and blocks.
#[must_use]
pub fn footer_bytes(entries: usize, blocks: usize) -> usize {
    (FIXED_BYTES + entries * ENTRY_BYTES + blocks * CRC_BYTES + TRAILER_BYTES).next_multiple_of(BLOCK_BYTES as usize)
}

impl Footer {
    /// Encodes the footer, a multiple of 4096 bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let length = footer_bytes(self.entries.len(), self.crcs.len());
        let mut out = Vec::with_capacity(length);
        out.extend_from_slice(&FOOTER_MAGIC.to_le_bytes());
        out.extend_from_slice(&FOOTER_VERSION.to_le_bytes());
        out.extend_from_slice(&0u16.to_le_bytes());
        out.extend_from_slice(&self.segment.to_bytes());
        out.extend_from_slice(&(self.entries.len() as u32).to_le_bytes());
        out.extend_from_slice(&(self.crcs.len() as u32).to_le_bytes());
        out.resize(FIXED_BYTES, 0);
        for entry in &self.entries {
            let kind: u64 = match entry.kind {
                EntryKind::Data => 1,
                EntryKind::Zero => 2,
            };
            assert!(entry.lba.0 < 1 << 56, "volumes have fewer than 2^56 blocks");
            out.extend_from_slice(&(entry.lba.0 | kind << 56).to_le_bytes());
            out.extend_from_slice(&entry.count.to_le_bytes());
            out.extend_from_slice(&entry.version.generation.0.to_le_bytes());
            out.extend_from_slice(&entry.version.sequence.0.to_le_bytes());
        }
        for crc in &self.crcs {
            out.extend_from_slice(&crc.0.to_le_bytes());
        }
        out.resize(length - TRAILER_BYTES, 0);
        out.extend_from_slice(&(length as u32).to_le_bytes());
        out.extend_from_slice(&FOOTER_MAGIC.to_le_bytes());
        let crc = crc32c(&out);
        out.extend_from_slice(&crc.0.to_le_bytes());
        out
    }

    /// Decodes and verifies a whole footer of `segment`.
    ///
    /// # Errors
    /// [`FooterError`].
    pub fn decode(bytes: &[u8], segment: SegmentName) -> Result<Self, FooterError> {
        let (version, footer) = Self::fields(bytes).ok_or(FooterError::Damaged)?;
        if version != FOOTER_VERSION {
            return Err(FooterError::Version(version));
        }
        if footer.segment == segment { Ok(footer) } else { Err(FooterError::Damaged) }
    }

    /// Where the footer starts in the last `bytes` of a segment, if it ends exactly there.
    #[must_use]
    pub fn find_at_end(bytes: &[u8]) -> Option<usize> {
        let at = bytes.len().checked_sub(TRAILER_BYTES)?;
        let mut reader = Reader::new(bytes.get(at..)?);
        let length = reader.u32()? as usize;
        (reader.u32()? == FOOTER_MAGIC).then_some(())?;
        bytes.len().checked_sub(length)
    }

    fn fields(bytes: &[u8]) -> Option<(u16, Self)> {
        let body = bytes.len().checked_sub(4)?;
        if crc32c(bytes.get(..body)?).0 != Reader::new(bytes.get(body..)?).u32()? {
            return None;
        }
        let mut reader = Reader::new(bytes);
        if reader.u32()? != FOOTER_MAGIC {
            return None;
        }
        let version = reader.u16()?;
        reader.u16()?;
        let segment = SegmentName::from_bytes(&reader.array::<SEGMENT_NAME_BYTES>()?);
        let entry_count = reader.u32()? as usize;
        let block_count = reader.u32()? as usize;
        reader.take(FIXED_BYTES - 48)?;
        if entry_count > bytes.len() / ENTRY_BYTES || block_count > bytes.len() / CRC_BYTES {
            return None;
        }
        let mut entries = Vec::with_capacity(entry_count);
        let mut blocks = 0u64;
        for _ in 0..entry_count {
            let head = reader.u64()?;
            let count = reader.u64()?;
            let version = Version { generation: Generation(reader.u64()?), sequence: Sequence(reader.u64()?) };
            let lba = head & ((1 << 56) - 1);
            lba.checked_add(count)?;
            let kind = match head >> 56 {
                1 => EntryKind::Data,
                2 => EntryKind::Zero,
                _ => return None,
            };
            if kind == EntryKind::Data {
                blocks = blocks.checked_add(count)?;
            }
            entries.push(FooterEntry { kind, lba: Lba(lba), count, version });
        }
        if blocks != block_count as u64 {
            return None;
        }
        let crcs = (0..block_count).map(|_| reader.u32().map(Crc32c)).collect::<Option<Vec<_>>>()?;
        Some((version, Self { segment, entries, crcs }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use xsan_types::{PgId, VolumeId};

    fn sample() -> Footer {
        let version = |sequence| Version { generation: Generation(2), sequence: Sequence(sequence) };
        Footer {
            segment: SegmentName { volume: VolumeId(1), generation: Generation(2), number: 3, pg: PgId::default() },
            entries: vec![
                FooterEntry { kind: EntryKind::Data, lba: Lba(5), count: 2, version: version(9) },
                FooterEntry { kind: EntryKind::Zero, lba: Lba(0), count: 1 << 32, version: version(10) },
            ],
            crcs: vec![Crc32c(11), Crc32c(12)],
        }
    }

    #[test]
    fn a_footer_is_read_back_as_written_and_found_from_the_end() {
        let footer = sample();
        let bytes = footer.encode();
        assert_eq!(bytes.len(), 4096);
        assert_eq!(Footer::decode(&bytes, footer.segment), Ok(footer.clone()));
        let mut segment = vec![1; 8192];
        segment.extend_from_slice(&bytes);
        assert_eq!(Footer::find_at_end(&segment), Some(8192));
        // Golden: changing it means a new version and a reader for this one.
        // (Without the CRC at the end: a CRC over itself is the same for every footer.)
        assert_eq!(crc32c(&bytes[..bytes.len() - 4]), Crc32c(GOLDEN));
    }
    const GOLDEN: u32 = 1_652_534_328;

    proptest! {
        #[test]
        fn damaged_footers_are_refused(at in 0usize..4096, bit in 0u8..8) {
            let footer = sample();
            let mut bytes = footer.encode();
            bytes[at] ^= 1 << bit;
            prop_assert!(Footer::decode(&bytes, footer.segment).is_err());
        }
    }
}
