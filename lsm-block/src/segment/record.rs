//! A journal record: one batch of guest writes as it lies in the open replicas (docs/format/segment.md, "Record").
//!
//! A record is a header of whole sectors followed by its data blocks. The header names the segment and the offset it lies
//! at and carries a CRC per block, so a stale, torn or misdirected record is a mismatch (H8). The data of a large write may
//! lie in stripe rows of another segment instead (P9, [`RowsRef`]).

use super::codec::Reader;
use xsan_types::name::SEGMENT_NAME_BYTES;
use xsan_types::{BLOCK_BYTES, Crc32c, Lba, PgId, PoolId, SegmentName, Sequence, crc32c};

/// First bytes of a record header: "XREC".
pub const RECORD_MAGIC: u32 = u32::from_le_bytes(*b"XREC");
/// The version written.
pub const RECORD_VERSION: u16 = 1;
/// Flag: the blocks lie in rows of another segment; a [`RowsRef`] follows the fixed part.
pub const FLAG_ROWS: u16 = 1;

const FIXED_BYTES: usize = 96;
const CRC_AT: usize = 88;
const ROWS_BYTES: usize = 32;
const ENTRY_BYTES: usize = 16;
const CRC_BYTES: usize = 4;
/// Largest header accepted: bounds what a damaged length field can ask for.
pub const HEADER_BYTES_MAX: usize = 1 << 20;
/// Most data blocks of one record.
pub const RECORD_BLOCKS_MAX: usize = 8192;

/// What an entry does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// `count` blocks of data follow, in order.
    Data,
    /// `count` blocks read as zeroes from here on (write-zeroes or trim).
    Zero,
}

/// One guest write (or a part of one) in a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What.
    pub kind: EntryKind,
    /// First block.
    pub lba: Lba,
    /// Blocks.
    pub count: u32,
    /// The guest write's order; its generation is the segment's.
    pub sequence: Sequence,
}

/// Where the blocks of a large write lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowsRef {
    /// Number of the row segment; volume and generation are the record's.
    pub number: u64,
    /// Its placement group.
    pub pg: PgId,
    /// Block ordinal of the record's first block in it.
    pub first_block: u32,
}

/// A verified header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    /// The segment.
    pub segment: SegmentName,
    /// Byte offset of the record in its segment.
    pub offset: u64,
    /// Bytes of the header: whole sectors; inline data starts behind it.
    pub header_bytes: u32,
    /// Dense ordinal, in this segment, of the first inline block.
    pub first_block: u32,
    /// Where the data lies if not inline.
    pub rows: Option<RowsRef>,
    /// The writes.
    pub entries: Vec<Entry>,
    /// One per data block, in order of the entries.
    pub crcs: Vec<Crc32c>,
}

/// Why bytes are not a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// No record begins here: the log ends, or the header is torn.
    #[error("no record here")]
    Absent,
    /// A record of a newer format.
    #[error("record format version {0} is newer than this program")]
    Version(u16),
}

impl RecordHeader {
    /// Inline data blocks.
    #[must_use]
    pub fn inline_blocks(&self) -> u32 {
        if self.rows.is_some() { 0 } else { self.crcs.len() as u32 }
    }

    /// Bytes of the whole record.
    #[must_use]
    pub fn record_bytes(&self) -> u64 {
        u64::from(self.header_bytes) + u64::from(self.inline_blocks()) * BLOCK_BYTES
    }

    /// Header length of the record that may begin at `bytes` (at least one sector of it), from the fixed part alone:
    /// how much to read before [`RecordHeader::parse`].
    #[must_use]
    pub fn peek_header_bytes(bytes: &[u8]) -> Option<usize> {
        let mut reader = Reader::new(bytes);
        let magic = reader.u32()?;
        reader.take(4)?;
        let length = reader.u32()? as usize;
        (magic == RECORD_MAGIC && (FIXED_BYTES..=HEADER_BYTES_MAX).contains(&length)).then_some(length)
    }

    /// Parses and verifies the header at `offset` of `segment`; the blocks are verified apart ([`RecordHeader::crcs`]).
    ///
    /// # Errors
    /// [`RecordError::Absent`] for anything that is not exactly this record; `Version` for a newer format.
    pub fn parse(bytes: &[u8], segment: SegmentName, offset: u64) -> Result<Self, RecordError> {
        let length = Self::peek_header_bytes(bytes).ok_or(RecordError::Absent)?;
        let bytes = bytes.get(..length).ok_or(RecordError::Absent)?;
        let (version, header) = Self::fields(bytes).ok_or(RecordError::Absent)?;
        if version != RECORD_VERSION {
            return Err(RecordError::Version(version));
        }
        if header.segment != segment || header.offset != offset {
            return Err(RecordError::Absent);
        }
        Ok(header)
    }

    /// All fields, the CRC checked before anything is believed.
    fn fields(bytes: &[u8]) -> Option<(u16, Self)> {
        let stored = Reader::new(bytes.get(CRC_AT..)?).u32()?;
        let mut unsigned = bytes.to_vec();
        unsigned.get_mut(CRC_AT..CRC_AT + 4)?.fill(0);
        if crc32c(&unsigned).0 != stored {
            return None;
        }
        let mut reader = Reader::new(bytes);
        reader.u32()?;
        let version = reader.u16()?;
        let flags = reader.u16()?;
        let header_bytes = reader.u32()?;
        let entry_count = reader.u32()? as usize;
        let block_count = reader.u32()? as usize;
        let first_block = reader.u32()?;
        let segment = SegmentName::from_bytes(&reader.array::<SEGMENT_NAME_BYTES>()?);
        let offset = reader.u64()?;
        let base_sequence = reader.u64()?;
        reader.take(FIXED_BYTES - 72)?;
        if block_count > RECORD_BLOCKS_MAX || entry_count > bytes.len() / ENTRY_BYTES {
            return None;
        }
        let rows = if flags & FLAG_ROWS == 0 {
            None
        } else {
            let rows = RowsRef {
                number: reader.u64()?,
                pg: PgId { pool: PoolId(reader.u32()?), index: reader.u32()? },
                first_block: reader.u32()?,
            };
            reader.take(ROWS_BYTES - 20)?;
            Some(rows)
        };
        let mut entries = Vec::with_capacity(entry_count);
        for _ in 0..entry_count {
            let lba = reader.u64()?;
            let count = reader.u32()?;
            let tail = reader.u32()?;
            let kind = match tail & 0xff {
                1 => EntryKind::Data,
                2 => EntryKind::Zero,
                _ => return None,
            };
            let sequence = Sequence(base_sequence.checked_add(u64::from(tail >> 8))?);
            lba.checked_add(u64::from(count))?;
            entries.push(Entry { kind, lba: Lba(lba), count, sequence });
        }
        let blocks: u64 = entries.iter().filter(|e| e.kind == EntryKind::Data).map(|e| u64::from(e.count)).sum();
        if blocks != block_count as u64 {
            return None;
        }
        let crcs = (0..block_count).map(|_| reader.u32().map(Crc32c)).collect::<Option<Vec<_>>>()?;
        Some((version, Self { segment, offset, header_bytes, first_block, rows, entries, crcs }))
    }
}

/// Bytes of the header of a record with so many entries and blocks, in whole sectors.
#[must_use]
pub fn header_bytes(entries: usize, blocks: usize, rows: bool, sector: u32) -> usize {
    let bytes = FIXED_BYTES + if rows { ROWS_BYTES } else { 0 } + entries * ENTRY_BYTES + blocks * CRC_BYTES;
    bytes.next_multiple_of(sector as usize)
}

/// Writes record headers.
#[derive(Clone, Copy, Debug)]
pub struct RecordBuilder {
    /// The segment.
    pub segment: SegmentName,
    /// Byte offset of the record.
    pub offset: u64,
    /// Dense ordinal of the first inline block.
    pub first_block: u32,
    /// Where the data lies if not inline.
    pub rows: Option<RowsRef>,
}

impl RecordBuilder {
    /// Encodes the header into `out` (exactly [`header_bytes`] long).
    ///
    /// # Panics
    /// When `out` is too short or the sequences of the entries span more than 2^24: bugs of the batch builder.
    pub fn encode(&self, entries: &[Entry], crcs: &[Crc32c], out: &mut [u8]) {
        let length = u32::try_from(out.len()).expect("a header is small");
        let base = entries.iter().map(|entry| entry.sequence.0).min().unwrap_or(0);
        out.fill(0);
        put(out, 0, &RECORD_MAGIC.to_le_bytes());
        put(out, 4, &RECORD_VERSION.to_le_bytes());
        put(out, 6, &if self.rows.is_some() { FLAG_ROWS } else { 0 }.to_le_bytes());
        put(out, 8, &length.to_le_bytes());
        put(out, 12, &(entries.len() as u32).to_le_bytes());
        put(out, 16, &(crcs.len() as u32).to_le_bytes());
        put(out, 20, &self.first_block.to_le_bytes());
        put(out, 24, &self.segment.to_bytes());
        put(out, 56, &self.offset.to_le_bytes());
        put(out, 64, &base.to_le_bytes());
        let mut at = FIXED_BYTES;
        if let Some(rows) = self.rows {
            put(out, at, &rows.number.to_le_bytes());
            put(out, at + 8, &rows.pg.pool.0.to_le_bytes());
            put(out, at + 12, &rows.pg.index.to_le_bytes());
            put(out, at + 16, &rows.first_block.to_le_bytes());
            at += ROWS_BYTES;
        }
        for entry in entries {
            let delta = u32::try_from(entry.sequence.0 - base).expect("sequences of a record lie close");
            assert!(delta < 1 << 24, "sequences of a record lie close");
            let kind = match entry.kind {
                EntryKind::Data => 1,
                EntryKind::Zero => 2,
            };
            put(out, at, &entry.lba.0.to_le_bytes());
            put(out, at + 8, &entry.count.to_le_bytes());
            put(out, at + 12, &(delta << 8 | kind).to_le_bytes());
            at += ENTRY_BYTES;
        }
        for crc in crcs {
            put(out, at, &crc.0.to_le_bytes());
            at += CRC_BYTES;
        }
        let crc = crc32c(out);
        put(out, CRC_AT, &crc.0.to_le_bytes());
    }
}

fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use xsan_types::{Generation, VolumeId};

    fn name() -> SegmentName {
        SegmentName {
            volume: VolumeId(7),
            generation: Generation(3),
            number: 42,
            pg: PgId { pool: PoolId(1), index: 5 },
        }
    }

    fn sample() -> (Vec<Entry>, Vec<Crc32c>, Vec<u8>) {
        let entries = vec![
            Entry { kind: EntryKind::Data, lba: Lba(10), count: 2, sequence: Sequence(100) },
            Entry { kind: EntryKind::Zero, lba: Lba(1 << 40), count: u32::MAX, sequence: Sequence(101) },
            Entry { kind: EntryKind::Data, lba: Lba(0), count: 1, sequence: Sequence(102) },
        ];
        let crcs = vec![Crc32c(1), Crc32c(2), Crc32c(3)];
        let mut out = vec![0xee; header_bytes(entries.len(), crcs.len(), true, 512)];
        let rows = RowsRef { number: 43, pg: PgId { pool: PoolId(1), index: 6 }, first_block: 64 };
        RecordBuilder { segment: name(), offset: 8192, first_block: 9, rows: Some(rows) }
            .encode(&entries, &crcs, &mut out);
        (entries, crcs, out)
    }

    #[test]
    fn a_header_is_read_back_as_written() {
        let (entries, crcs, bytes) = sample();
        let header = RecordHeader::parse(&bytes, name(), 8192).unwrap();
        assert_eq!((header.entries, header.crcs, header.first_block), (entries, crcs, 9));
        assert_eq!(header.rows.unwrap().first_block, 64);
    }

    #[test]
    fn a_header_of_another_name_or_offset_is_no_record() {
        let (_, _, bytes) = sample();
        let mut other = name();
        other.number = 41;
        assert_eq!(RecordHeader::parse(&bytes, other, 8192), Err(RecordError::Absent));
        assert_eq!(RecordHeader::parse(&bytes, name(), 0), Err(RecordError::Absent));
    }

    #[test]
    fn the_bytes_of_version_1_stay_as_they_are() {
        // Golden: changing it means a new version and a reader for this one.
        let (_, _, bytes) = sample();
        assert_eq!(bytes.len(), 512);
        assert_eq!(crc32c(&bytes), Crc32c(GOLDEN));
    }
    const GOLDEN: u32 = 2_582_558_365;

    proptest! {
        #[test]
        fn damaged_headers_are_refused(at in 0usize..512, bit in 0u8..8) {
            let (_, _, mut bytes) = sample();
            bytes[at] ^= 1 << bit;
            prop_assert!(RecordHeader::parse(&bytes, name(), 8192).is_err());
        }

        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = RecordHeader::parse(&bytes, name(), 0);
            let mut with_magic = bytes.clone();
            if with_magic.len() > 12 {
                with_magic[..4].copy_from_slice(b"XREC");
                let length = with_magic.len() as u32;
                with_magic[8..12].copy_from_slice(&length.to_le_bytes());
                let _ = RecordHeader::fields(&with_magic);
            }
        }
    }
}
