//! The words of the index: what is changed, what is found, what is listed.

use crate::store::StoreError;
use xsan_types::{BlockRange, Crc32c, ErrorKind, Lba, SealedSegment, ShardIndex, Version};

/// Where a block's bytes lie, and their checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// Number of the segment in the volume's log; unique per volume.
    pub number: u64,
    /// Block ordinal in the segment's dense layout. Below [`POSITIONS_MAX`].
    pub position: u32,
    /// CRC-32C of the block.
    pub crc: Crc32c,
}

/// Block ordinals of a segment are below this: the largest segment has 16384 blocks.
pub const POSITIONS_MAX: u32 = 1 << 16;
/// Blocks of a volume are below this: 2^60 bytes.
pub const LBA_MAX: u64 = 1 << 48;

/// An acknowledged change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// One block of data.
    Data {
        /// Which block.
        lba: Lba,
        /// Version of the guest write.
        version: Version,
        /// Where its bytes are.
        place: Place,
    },
    /// The range reads as zeroes from here on: a TRIM or write-zeroes record.
    Zero {
        /// Which blocks.
        range: BlockRange,
        /// Version of the guest request.
        version: Version,
        /// Number of the segment that holds the record.
        number: u64,
    },
}

impl Change {
    /// The segment whose log holds it.
    #[must_use]
    pub fn number(&self) -> u64 {
        match *self {
            Self::Data { place, .. } => place.number,
            Self::Zero { number, .. } => number,
        }
    }
}

/// What a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Never written, or zeroed: reads as zeroes.
    Hole,
    /// Data.
    Data {
        /// Where.
        place: Place,
        /// Version of the guest write.
        version: Version,
    },
}

/// What a listed segment holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SegmentKind {
    /// Guest blocks and zero records.
    Data,
    /// Index pages.
    Index,
}

/// A line of the live list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentRecord {
    /// Name and lengths. An index segment has no footer: `footer_offset` is `bytes`.
    pub sealed: SealedSegment,
    /// Data: blocks that the trees of the last checkpoint refer to. Index: bytes of live pages.
    pub live: u64,
    /// Positions that could not be written yet.
    pub holes: Vec<ShardIndex>,
    /// What it holds.
    pub kind: SegmentKind,
}

/// A run of blocks that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusRun {
    /// Length in blocks.
    pub blocks: u64,
    /// Whether they are holes.
    pub hole: bool,
}

/// Why bytes are not a page or a root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PageError {
    /// Too short, or a length field that does not fit.
    #[error("wrong length")]
    Length,
    /// Not an index page.
    #[error("wrong magic")]
    Magic,
    /// Written by a newer program.
    #[error("format version {0} is newer than this program")]
    Version(u16),
    /// Uses something this program does not know (compression, encryption, a flag).
    #[error("unknown feature")]
    Feature,
    /// The checksum inside differs.
    #[error("wrong checksum")]
    Checksum,
    /// A page of another volume, place or kind.
    #[error("the page belongs elsewhere")]
    Misplaced,
    /// Checksum right, content contradictory.
    #[error("contradictory content")]
    Content,
}

/// Why the index could not answer or build.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// The layer below.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A page is not what its pointer says, although its checksum holds.
    #[error("index page at segment {number} offset {offset}: {error}")]
    Page {
        /// Segment number.
        number: u64,
        /// Byte offset.
        offset: u64,
        /// What is wrong.
        error: PageError,
    },
    /// The index refers to a segment that is not listed: a frozen change of an unsealed segment, or a damaged index.
    #[error("the index refers to segment {number}, which is not listed")]
    Unlisted {
        /// Segment number.
        number: u64,
    },
    /// A change that is newer than the checkpoint lies below its border: replay would miss it.
    #[error("segment {number} lies below the border {border} but has changes after the freeze")]
    Border {
        /// Segment number.
        number: u64,
        /// The border asked for.
        border: u64,
    },
}

impl IndexError {
    /// What the caller can do.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Store(error) => error.kind(),
            Self::Page { .. } => ErrorKind::Corrupt,
            Self::Unlisted { .. } | Self::Border { .. } => ErrorKind::Internal,
        }
    }
}

const _: () = assert!(xsan_types::SEGMENT_BYTES_MAX / xsan_types::BLOCK_BYTES < POSITIONS_MAX as u64);
