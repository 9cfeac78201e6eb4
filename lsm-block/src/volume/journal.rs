//! What the writer keeps of its log: segments that are not sealed yet and the batches in flight.

use super::shared::{Done, RecordMemory};
use crate::index::Change;
use crate::segment::FooterEntry;
use crate::store::{Holes, RowWriter};
use std::sync::Arc;
use xsan_env::{Buf, Moment};
use xsan_types::{BLOCK_BYTES, Crc32c, SealedSegment, SegmentName};

/// How far a segment is on its way from open to sealed (P6).
#[derive(Clone)]
pub(super) enum Stage {
    /// Takes records, or waits until all of them are acknowledged.
    Open,
    /// Its shards are being written.
    Sealing,
    /// All shards are there and flushed; the members enter the name in their manifests.
    Manifest {
        sealed: SealedSegment,
        holes: Holes,
        /// Index changes of blocks that stand elsewhere now (rows that failed); applied when the name counts.
        changes: Vec<Change>,
        /// Members that have answered, of the current set.
        answered: usize,
    },
}

/// An unsealed journal segment.
pub(super) struct Segment {
    pub name: SegmentName,
    /// Bytes appended.
    pub end: u64,
    /// Bytes acknowledged by every member.
    pub acknowledged: u64,
    /// Of them covered by a flush of every member.
    pub flushed: u64,
    /// Dense blocks.
    pub blocks: u32,
    pub entries: Vec<FooterEntry>,
    pub crcs: Vec<Crc32c>,
    pub records: Vec<RecordMemory>,
    /// Contiguous length each member answered (P4).
    pub contiguous: Vec<u64>,
    /// Batches not acknowledged yet.
    pub pending: usize,
    /// Grows no more.
    pub frozen: bool,
    pub stage: Stage,
    /// Row segments that records here point to and that are not sealed yet: this segment is sealed after them, else its
    /// records would be gone before their footers count.
    pub rows: Vec<u64>,
}

impl Segment {
    pub(super) fn new(name: SegmentName, members: usize) -> Self {
        Self {
            name,
            end: 0,
            acknowledged: 0,
            flushed: 0,
            blocks: 0,
            entries: Vec::new(),
            crcs: Vec::new(),
            records: Vec::new(),
            contiguous: vec![0; members],
            pending: 0,
            frozen: false,
            stage: Stage::Open,
            rows: Vec::new(),
        }
    }

    /// Whether its shards may be written now: all of it acknowledged, nothing it points to unsealed.
    pub(super) fn can_seal(&self) -> bool {
        self.frozen && matches!(self.stage, Stage::Open) && self.pending == 0 && self.rows.is_empty()
    }

    /// Whether its replicas still hold what only they hold.
    pub(super) fn needs_members(&self) -> bool {
        !matches!(self.stage, Stage::Manifest { .. })
    }
}

/// An unsealed row segment (P9).
pub(super) struct RowSegment {
    pub name: SegmentName,
    pub writer: Arc<dyn RowWriter>,
    pub rows: u64,
    pub entries: Vec<FooterEntry>,
    pub crcs: Vec<Crc32c>,
    /// Changes that are acknowledged: what must be written elsewhere if this segment fails.
    pub acknowledged: Vec<Change>,
    /// Acknowledged since the last flush round began.
    pub dirty: bool,
    pub pending: usize,
    pub frozen: bool,
    pub failed: bool,
    pub stage: Stage,
}

impl RowSegment {
    /// Whether its content was sealed under another name.
    pub(super) fn failed_over(&self) -> bool {
        matches!(&self.stage, Stage::Manifest { sealed, .. } if sealed.name != self.name)
    }

    pub(super) fn can_seal(&self) -> bool {
        self.frozen && matches!(self.stage, Stage::Open) && self.pending == 0
    }
}

/// The rows of a batch.
pub(super) struct RowsPart {
    /// The row segment.
    pub number: u64,
    /// First block in it.
    pub first_block: u32,
    /// The blocks, concatenated; kept until acknowledged so that they can be written elsewhere.
    pub pieces: Vec<Buf>,
    /// Since when all k+m positions have them.
    pub written: Option<Moment>,
}

impl RowsPart {
    /// The block at dense ordinal `position` of the row segment.
    pub(super) fn block(&self, position: u32) -> Option<Buf> {
        let mut skip = position.checked_sub(self.first_block)? as usize * BLOCK_BYTES as usize;
        for piece in &self.pieces {
            if skip < piece.len() {
                return Some(piece.slice(skip..skip + BLOCK_BYTES as usize));
            }
            skip -= piece.len();
        }
        None
    }
}

/// A record on its way to the members; acknowledged in order.
pub(super) struct Batch {
    pub id: u64,
    /// Journal segment of the record.
    pub number: u64,
    /// Where the record ends in it.
    pub end: u64,
    pub changes: Vec<Change>,
    /// Guest requests that are complete with this batch, and whether they ask for stable media.
    pub requests: Vec<(Done, bool)>,
    pub rows: Option<RowsPart>,
}
