//! The index of a volume: which block lies where (RFC 0002, docs/format/index.md).
//!
//! Two tiers. The *delta* holds everything acknowledged since the registered checkpoint, in memory, bounded by
//! checkpoints. The *checkpoint* lies in sealed index segments: copy-on-write trees of pages under one root, read on
//! demand through a cache that all volumes share. The newest version of a block wins wherever it is found (P1).

mod cache;
mod entry;

pub use cache::PageCache;
pub use entry::{
    Change, Found, IndexError, LBA_MAX, POSITIONS_MAX, PageError, Place, SegmentKind, SegmentRecord, StatusRun,
};

use crate::store::SegmentStore;
use std::sync::Arc;
use xsan_types::{BlockRange, CheckpointRef, SealedSegment, SegmentName, ShardIndex, VolumeId};

/// The index of one volume. Shared by reference; every lock inside is short.
pub struct Index {
    volume: VolumeId,
    store: Arc<dyn SegmentStore>,
    cache: Arc<PageCache>,
}

impl Index {
    /// The index of a volume that never had a checkpoint: all holes.
    #[must_use]
    pub fn new(volume: VolumeId, store: Arc<dyn SegmentStore>, cache: Arc<PageCache>) -> Self {
        Self { volume, store, cache }
    }

    /// Opens a checkpoint: reads its root and live list; pages follow on demand.
    ///
    /// # Errors
    /// The root cannot be read or is damaged.
    pub async fn open(
        volume: VolumeId,
        store: Arc<dyn SegmentStore>,
        cache: Arc<PageCache>,
        root: CheckpointRef,
    ) -> Result<Self, IndexError> {
        let _ = root;
        Ok(Self::new(volume, store, cache))
    }

    /// Enters changes.
    pub fn apply(&self, changes: &[Change]) {
        let _ = changes;
    }

    /// One [`Found`] per block of `range`, without I/O. `false`: a page is not in memory, `out` is unspecified.
    pub fn try_lookup(&self, range: BlockRange, out: &mut Vec<Found>) -> bool {
        out.clear();
        out.resize(range.count as usize, Found::Hole);
        true
    }

    /// One [`Found`] per block of `range`.
    ///
    /// # Errors
    /// A page cannot be read.
    pub async fn lookup(&self, range: BlockRange, out: &mut Vec<Found>) -> Result<(), IndexError> {
        self.try_lookup(range, out);
        Ok(())
    }

    /// The allocation map from the start of `range`: at most `runs_max` runs.
    ///
    /// # Errors
    /// A page cannot be read.
    pub async fn status(&self, range: BlockRange, runs_max: usize) -> Result<Vec<StatusRun>, IndexError> {
        let _ = runs_max;
        Ok(vec![StatusRun { blocks: range.count, hole: true }])
    }

    /// A data segment entered the live list. Idempotent.
    pub fn segment_sealed(&self, sealed: SealedSegment, holes: Vec<ShardIndex>) {
        let _ = (sealed, holes);
    }

    /// A line of the live list.
    #[must_use]
    pub fn segment(&self, number: u64) -> Option<SegmentRecord> {
        let _ = number;
        None
    }

    /// Replaces the holes of a listed segment.
    pub fn set_holes(&self, number: u64, holes: Vec<ShardIndex>) {
        let _ = (number, holes);
    }

    /// Listed segments that miss positions.
    #[must_use]
    pub fn segments_with_holes(&self) -> Vec<SegmentRecord> {
        Vec::new()
    }

    /// Listed segments.
    #[must_use]
    pub fn segment_count(&self) -> usize {
        0
    }

    /// Memory of the delta; 0 when it is empty.
    #[must_use]
    pub fn delta_bytes(&self) -> usize {
        0
    }

    /// The delta becomes the frozen delta; a new one takes over. Look-ups see both.
    pub fn freeze(&self) {}

    /// Merges the frozen delta into a new checkpoint and seals it. Look-ups do not change.
    ///
    /// # Errors
    /// A page cannot be read, or a segment cannot be sealed; nothing has changed then.
    pub async fn build_checkpoint(
        &self,
        border: u64,
        names: &mut (dyn FnMut() -> SegmentName + Send),
    ) -> Result<CheckpointRef, IndexError> {
        let _ = (border, names, &self.store, &self.cache, self.volume);
        Err(IndexError::Unlisted { number: 0 })
    }

    /// The register accepted the checkpoint: look-ups use it.
    pub fn install(&self) {}

    /// The build failed or the checkpoint was refused: the frozen delta is merged back.
    pub fn abandon(&self) {}

    /// Names that the installed checkpoint decides and does not list.
    #[must_use]
    pub fn take_dead(&self) -> Vec<SegmentName> {
        Vec::new()
    }
}
