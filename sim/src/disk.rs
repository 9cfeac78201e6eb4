//! What a host keeps: a disk and a shard index, with what power loss does to them. Owner: the world, over all restarts.

use crate::executor::Dice;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use xsan_env::memory::{Keep, MemoryDisk};
use xsan_env::{Disk, Env};
use xsan_node::format::{SUPERBLOCK_BYTES, ShardEntry, Superblock};
use xsan_node::shard_index::IndexResult;
use xsan_node::{DeviceHandle, MemoryIndex, ShardIndex};
use xsan_types::{ShardId, VolumeId};

/// Bytes of a device; only what was written takes memory.
pub const DEVICE_BYTES: u64 = 512 << 20;

/// A host's storage.
pub struct HostStorage {
    disk: MemoryDisk,
    index: Arc<KeptIndex>,
}

impl HostStorage {
    /// A fresh disk whose requests take up to `delay_max`, overtaking each other.
    #[must_use]
    pub fn new(world: &Env, number: u64, sector: u32, delay_max: Duration) -> Self {
        // The disk draws its own faults from its size: another size, other faults.
        let bytes = DEVICE_BYTES + (number << 20);
        let delay = Duration::from_micros(5)..delay_max;
        let disk = MemoryDisk::with_latency(&format!("disk of n{number}"), bytes, sector, world, delay);
        Self { disk, index: Arc::default() }
    }

    /// What a starting process opens.
    #[must_use]
    pub fn open(&self) -> DeviceHandle {
        DeviceHandle { disk: self.disk.open(), index: Box::new(OpenIndex(Arc::clone(&self.index))) }
    }

    /// The disk alone, for formatting.
    #[must_use]
    pub fn open_disk(&self) -> Arc<dyn Disk> {
        self.disk.open()
    }

    /// Shards that the index shows.
    #[must_use]
    pub fn shards(&self) -> Vec<ShardId> {
        let page = self.index.state().now.page(None, usize::MAX).unwrap_or_default();
        page.into_iter().map(|(shard, _)| shard).collect()
    }

    /// Bits flip and sectors become unreadable where shards and replicas lie. Answers how many.
    pub fn rot(&self, dice: &mut Dice) -> u64 {
        let Ok(superblock) = Superblock::decode(&self.disk.peek(0, SUPERBLOCK_BYTES)) else { return 0 };
        // Places are taken from the lowest on.
        let (area, used) = (superblock.area_offset(), dice.between(1, 64) << 20);
        let places = dice.between(1, 2_000);
        for _ in 0..places {
            let at = area + dice.below(used);
            if dice.chance(100) {
                self.disk.damage(at..at + 1);
            } else {
                self.disk.flip_bit(at, dice.below(8) as u8);
            }
        }
        places
    }

    /// The process died: what is in flight may be done in part.
    pub fn crash_process(&self) {
        self.disk.crash_process();
    }

    /// The host lost power.
    pub fn power_off(&self, dice: &mut Dice) {
        self.disk.power_off(match dice.below(4) {
            0 => Keep::Nothing,
            _ => Keep::Seed(dice.word()),
        });
        self.index.power_off(dice);
    }
}

/// A change of the index.
enum Change {
    Put(ShardId, Box<ShardEntry>),
    Remove(Vec<ShardId>),
}

/// A shard index with the promises of the real one: changes stay in order, power loss keeps a prefix of what was not persisted.
#[derive(Default)]
struct KeptIndex {
    state: Mutex<IndexState>,
}

#[derive(Default)]
struct IndexState {
    now: MemoryIndex,
    stable: MemoryIndex,
    since: Vec<Change>,
}

impl KeptIndex {
    fn state(&self) -> MutexGuard<'_, IndexState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn power_off(&self, dice: &mut Dice) {
        let mut state = self.state();
        let kept = dice.below(state.since.len() as u64 + 1) as usize;
        let changes = std::mem::take(&mut state.since);
        for change in changes.into_iter().take(kept) {
            state.stable.apply(change);
        }
        state.now = copy(&state.stable);
    }
}

trait Apply {
    fn apply(&self, change: Change);
}

impl Apply for MemoryIndex {
    fn apply(&self, change: Change) {
        let done = match change {
            Change::Put(shard, entry) => self.put(shard, &entry),
            Change::Remove(shards) => self.remove(&shards),
        };
        assert!(done.is_ok(), "an index in memory does not fail");
    }
}

fn copy(index: &MemoryIndex) -> MemoryIndex {
    let fresh = MemoryIndex::default();
    for (shard, entry) in index.page(None, usize::MAX).unwrap_or_default() {
        fresh.apply(Change::Put(shard, Box::new(entry)));
    }
    fresh
}

/// What a process holds of it.
struct OpenIndex(Arc<KeptIndex>);

impl ShardIndex for OpenIndex {
    fn get(&self, shard: ShardId) -> IndexResult<Option<ShardEntry>> {
        self.0.state().now.get(shard)
    }
    fn put(&self, shard: ShardId, entry: &ShardEntry) -> IndexResult<()> {
        let mut state = self.0.state();
        state.since.push(Change::Put(shard, Box::new(entry.clone())));
        state.now.put(shard, entry)
    }
    fn remove(&self, shards: &[ShardId]) -> IndexResult<()> {
        let mut state = self.0.state();
        state.since.push(Change::Remove(shards.to_vec()));
        state.now.remove(shards)
    }
    fn page(&self, after: Option<ShardId>, limit: usize) -> IndexResult<Vec<(ShardId, ShardEntry)>> {
        self.0.state().now.page(after, limit)
    }
    fn volume_page(
        &self,
        volume: VolumeId,
        after: Option<ShardId>,
        limit: usize,
    ) -> IndexResult<Vec<(ShardId, ShardEntry)>> {
        self.0.state().now.volume_page(volume, after, limit)
    }
    fn persist(&self) -> IndexResult<()> {
        let mut state = self.0.state();
        for change in std::mem::take(&mut state.since) {
            state.stable.apply(change);
        }
        Ok(())
    }
    fn is_new(&self) -> bool {
        false
    }
    fn filled(&self) -> IndexResult<()> {
        self.persist()
    }
}
