//! What a host keeps: a disk and a shard index, with what power loss does to them. Owner: the world, over all restarts.

use crate::executor::Dice;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use xsan_env::memory::{Fault, Keep, MemoryDisk, Operation};
use xsan_env::{Disk, Env};
use xsan_node::format::{SUPERBLOCK_BYTES, ShardEntry, Superblock};
use xsan_node::shard_index::IndexResult;
use xsan_node::{DeviceHandle, MemoryIndex, ShardIndex};
use xsan_types::{ShardId, VolumeId};

/// Bytes of a device; only what was written takes memory.
pub const DEVICE_BYTES: u64 = 512 << 20;
/// What a disk answers that cannot.
const EIO: i32 = 5;

/// A host's storage.
pub struct HostStorage {
    make: Box<dyn Fn() -> MemoryDisk + Send + Sync>,
    held: Mutex<Held>,
}

/// The disk of now.
#[derive(Clone)]
struct Held {
    disk: MemoryDisk,
    index: Arc<KeptIndex>,
}

impl HostStorage {
    /// A fresh disk whose requests take up to `delay_max`, overtaking each other.
    #[must_use]
    pub fn new(world: &Env, number: u64, sector: u32, delay_max: Duration) -> Self {
        // The disk draws its own faults from its size: another size, other faults.
        let bytes = DEVICE_BYTES + (number << 20);
        let world = world.clone();
        let make = Box::new(move || {
            let delay = Duration::from_micros(5)..delay_max;
            MemoryDisk::with_latency(&format!("disk of n{number}"), bytes, sector, &world, delay)
        });
        let held = Mutex::new(Held { disk: make(), index: Arc::default() });
        Self { make, held }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An empty disk for [`HostStorage::replace`].
    #[must_use]
    pub fn spare(&self) -> MemoryDisk {
        (self.make)()
    }

    /// Another disk, formatted by now, takes the place of the one before.
    pub fn replace(&self, disk: MemoryDisk) {
        *self.held() = Held { disk, index: Arc::default() };
    }

    /// What a starting process opens.
    #[must_use]
    pub fn open(&self) -> DeviceHandle {
        let held = self.held();
        DeviceHandle { disk: held.disk.open(), index: Box::new(OpenIndex(Arc::clone(&held.index))) }
    }

    /// The disk alone, for formatting.
    #[must_use]
    pub fn open_disk(&self) -> Arc<dyn Disk> {
        self.held().disk.open()
    }

    /// Shards that the index shows.
    #[must_use]
    pub fn shards(&self) -> Vec<ShardId> {
        let page = self.held().index.state().now.page(None, usize::MAX).unwrap_or_default();
        page.into_iter().map(|(shard, _)| shard).collect()
    }

    /// Bits flip and sectors become unreadable where shards and replicas lie. Answers how many.
    pub fn rot(&self, dice: &mut Dice) -> u64 {
        let disk = self.held().disk.clone();
        let Ok(superblock) = Superblock::decode(&disk.peek(0, SUPERBLOCK_BYTES)) else { return 0 };
        // Places are taken from the lowest on.
        let (area, used) = (superblock.area_offset(), dice.between(1, 64) << 20);
        let places = dice.between(1, 2_000);
        for _ in 0..places {
            let at = area + dice.below(used);
            if dice.chance(100) {
                disk.damage(at..at + 1);
            } else {
                disk.flip_bit(at, dice.below(8) as u8);
            }
        }
        places
    }

    /// Some of the next requests are not answered until [`HostStorage::mend`]. Answers how many.
    pub fn stall(&self, dice: &mut Dice) -> u64 {
        let disk = self.held().disk.clone();
        let (first, count) = (dice.skewed(20), dice.between(1, 40));
        for nth in first..first + count {
            disk.fault_nth(Operation::Any, nth + 1, Fault::Stall);
        }
        count
    }

    /// One of the next requests fails. `true`: what was to be made stable by it is not, whatever is said later.
    pub fn fail_once(&self, dice: &mut Dice) -> bool {
        let (operation, fault) = match dice.below(5) {
            0 => (Operation::Read, Fault::Error(EIO)),
            1 => (Operation::Write, Fault::Error(EIO)),
            2 => (Operation::Write, Fault::ErrorAfter(EIO)),
            3 => (Operation::Write, Fault::Torn { kept: dice.skewed(1 << 20), errno: EIO }),
            _ => (Operation::Flush, Fault::Error(EIO)),
        };
        self.held().disk.fault_nth(operation, 1 + dice.skewed(60), fault);
        operation == Operation::Flush
    }

    /// One of the next requests is reported done and was not, or was done elsewhere.
    pub fn lie_once(&self, dice: &mut Dice) {
        let disk = self.held().disk.clone();
        let Ok(superblock) = Superblock::decode(&disk.peek(0, SUPERBLOCK_BYTES)) else { return };
        let used = dice.between(1, 32) << 20;
        let elsewhere = superblock.area_offset() + (dice.below(used) & !0xfff);
        let (operation, fault) = match dice.below(4) {
            0 => (Operation::Flush, Fault::Lost),
            1 => (Operation::Read, Fault::Misdirect(elsewhere)),
            2 => (Operation::Write, Fault::Misdirect(elsewhere)),
            _ => (Operation::Write, Fault::Lost),
        };
        disk.fault_nth(operation, 1 + dice.skewed(60), fault);
    }

    /// Nothing that was planned goes wrong any more; stalled requests run.
    pub fn mend(&self) {
        self.held().disk.clone().heal();
    }

    /// The process died: what is in flight may be done in part.
    pub fn crash_process(&self) {
        self.held().disk.crash_process();
    }

    /// The host lost power.
    pub fn power_off(&self, dice: &mut Dice) {
        let held = self.held().clone();
        held.disk.power_off(match dice.below(4) {
            0 => Keep::Nothing,
            _ => Keep::Seed(dice.word()),
        });
        held.index.power_off(dice);
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
