//! Which sealed shards a device has and where they lie. A view of the device: it can be rebuilt from the shards' headers,
//! and what it missed since it was last persisted stands in the device log.

pub mod fjall;

use crate::format::ShardEntry;
use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Mutex;
use xsan_types::{SegmentName, ShardId, VolumeId};

/// Why the index failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// The system refused; the index itself may be fine.
    #[error("the shard index cannot be opened now: {0}")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The engine refused.
    #[error("the shard index failed: {0}")]
    Engine(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// An entry cannot be read: rebuild the index.
    #[error("the shard index holds an unreadable entry")]
    Damaged,
}

/// Result of an index call.
pub type IndexResult<T> = Result<T, IndexError>;

/// Sealed shards by name. Calls may block for long (an engine that compacts): not to be made on a guest's path.
pub trait ShardIndex: Send + Sync + 'static {
    /// One entry.
    fn get(&self, shard: ShardId) -> IndexResult<Option<ShardEntry>>;
    /// Inserts or replaces.
    fn put(&self, shard: ShardId, entry: &ShardEntry) -> IndexResult<()>;
    /// Removes; unknown names are no error.
    fn remove(&self, shards: &[ShardId]) -> IndexResult<()>;
    /// Entries in order of the key, after `after`, at most `limit`.
    fn page(&self, after: Option<ShardId>, limit: usize) -> IndexResult<Vec<(ShardId, ShardEntry)>>;
    /// Entries of one volume, after `after`, at most `limit`.
    fn volume_page(
        &self,
        volume: VolumeId,
        after: Option<ShardId>,
        limit: usize,
    ) -> IndexResult<Vec<(ShardId, ShardEntry)>>;
    /// Makes everything so far survive power loss.
    fn persist(&self) -> IndexResult<()>;
    /// Whether it was never filled: a device that was used before is scanned then.
    fn is_new(&self) -> bool;
    /// Notes, durably, that it shows the whole device; called once everything before is durable.
    fn filled(&self) -> IndexResult<()>;

    /// Shards of one segment.
    fn of_segment(&self, segment: SegmentName) -> IndexResult<Vec<(ShardId, ShardEntry)>> {
        let first = ShardId { segment, index: xsan_types::ShardIndex(0) };
        let mut found: Vec<_> = self.get(first)?.map(|entry| (first, entry)).into_iter().collect();
        let more = self.page(Some(first), xsan_types::scheme::SHARDS_MAX.into())?;
        found.extend(more.into_iter().take_while(|(shard, _)| shard.segment == segment));
        Ok(found)
    }
}

/// In memory; for the simulator and for tests.
#[derive(Debug, Default)]
pub struct MemoryIndex(Mutex<BTreeMap<ShardId, ShardEntry>>);

impl MemoryIndex {
    fn entries(&self) -> std::sync::MutexGuard<'_, BTreeMap<ShardId, ShardEntry>> {
        self.0.lock().expect("index lock")
    }
}

impl ShardIndex for MemoryIndex {
    fn get(&self, shard: ShardId) -> IndexResult<Option<ShardEntry>> {
        Ok(self.entries().get(&shard).cloned())
    }
    fn put(&self, shard: ShardId, entry: &ShardEntry) -> IndexResult<()> {
        self.entries().insert(shard, entry.clone());
        Ok(())
    }
    fn remove(&self, shards: &[ShardId]) -> IndexResult<()> {
        let mut entries = self.entries();
        for shard in shards {
            entries.remove(shard);
        }
        Ok(())
    }
    fn page(&self, after: Option<ShardId>, limit: usize) -> IndexResult<Vec<(ShardId, ShardEntry)>> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        Ok(self.entries().range((from, Bound::Unbounded)).take(limit).map(|(k, v)| (*k, v.clone())).collect())
    }
    fn volume_page(
        &self,
        volume: VolumeId,
        after: Option<ShardId>,
        limit: usize,
    ) -> IndexResult<Vec<(ShardId, ShardEntry)>> {
        let entries = self.entries();
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let of = entries.range((from, Bound::Unbounded)).skip_while(|(k, _)| k.segment.volume < volume);
        Ok(of.take_while(|(k, _)| k.segment.volume == volume).take(limit).map(|(k, v)| (*k, v.clone())).collect())
    }
    fn persist(&self) -> IndexResult<()> {
        Ok(())
    }
    fn is_new(&self) -> bool {
        self.entries().is_empty()
    }
    fn filled(&self) -> IndexResult<()> {
        Ok(())
    }
}

/// Key bytes whose order is the order of [`ShardId`].
#[must_use]
pub fn key_of(shard: ShardId) -> [u8; 33] {
    let mut key = [0; 33];
    key[0..8].copy_from_slice(&shard.segment.volume.0.to_be_bytes());
    key[8..16].copy_from_slice(&shard.segment.generation.0.to_be_bytes());
    key[16..24].copy_from_slice(&shard.segment.number.to_be_bytes());
    key[24..28].copy_from_slice(&shard.segment.pg.pool.0.to_be_bytes());
    key[28..32].copy_from_slice(&shard.segment.pg.index.to_be_bytes());
    key[32] = shard.index.0;
    key
}

/// The inverse of [`key_of`].
#[must_use]
pub fn shard_of(key: &[u8]) -> Option<ShardId> {
    use xsan_types::{Generation, PgId, PoolId};
    let key: &[u8; 33] = key.try_into().ok()?;
    let u64_at = |at: usize| key.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_be_bytes);
    let u32_at = |at: usize| key.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_be_bytes);
    let segment = SegmentName {
        volume: VolumeId(u64_at(0)?),
        generation: Generation(u64_at(8)?),
        number: u64_at(16)?,
        pg: PgId { pool: PoolId(u32_at(24)?), index: u32_at(28)? },
    };
    Some(ShardId { segment, index: xsan_types::ShardIndex(key[32]) })
}
