//! Index pages in memory, for all volumes of a gateway: bounded, and not washed out by a scan.
//!
//! Two queues (2Q): a page enters *recent*, a FIFO of a quarter of the bytes; only one that is read again after it left
//! (its key is remembered for a while) enters *hot*, a clock. A scan touches each leaf many times in a short while, so a
//! hit in *recent* says nothing. Keys are never used for other bytes: segments are written once and their numbers never
//! return (P1), so nothing is ever invalidated.

use super::format::{Location, Page};
use super::hash::FixedState;
use hashbrown::HashMap;
use std::collections::VecDeque;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

const SHARDS: usize = 16;
/// Map and queue space of one page.
const OVERHEAD: usize = 96;
/// Keys that left *recent* are remembered, one for this many bytes of the cache.
const BYTES_PER_GHOST: usize = 8 << 10;

struct Entry {
    page: Arc<Page>,
    hot: bool,
    touched: bool,
}

#[derive(Default)]
struct Shard {
    pages: HashMap<Location, Entry, FixedState>,
    recent: VecDeque<Location>,
    hot: VecDeque<Location>,
    ghosts: VecDeque<Location>,
    ghost_keys: HashMap<Location, (), FixedState>,
    recent_bytes: usize,
    hot_bytes: usize,
}

impl Shard {
    fn insert(&mut self, key: Location, page: Arc<Page>, hot: bool, bytes_max: usize) {
        if self.pages.contains_key(&key) {
            return;
        }
        let bytes = page.memory() + OVERHEAD;
        let hot = hot || self.ghost_keys.contains_key(&key);
        if hot {
            self.hot.push_back(key);
            self.hot_bytes += bytes;
        } else {
            self.recent.push_back(key);
            self.recent_bytes += bytes;
        }
        self.pages.insert(key, Entry { page, hot, touched: false });
        while self.recent_bytes + self.hot_bytes > bytes_max {
            self.evict(bytes_max);
        }
    }

    fn evict(&mut self, bytes_max: usize) {
        if self.recent_bytes > bytes_max / 4 || self.hot.is_empty() {
            let Some(key) = self.recent.pop_front() else { return };
            self.drop_page(key);
            self.remember(key, bytes_max / BYTES_PER_GHOST);
            return;
        }
        let Some(key) = self.hot.pop_front() else { return };
        match self.pages.get_mut(&key) {
            Some(entry) if entry.touched => {
                entry.touched = false;
                self.hot.push_back(key);
            }
            _ => self.drop_page(key),
        }
    }

    fn drop_page(&mut self, key: Location) {
        if let Some(entry) = self.pages.remove(&key) {
            let bytes = entry.page.memory() + OVERHEAD;
            if entry.hot { self.hot_bytes -= bytes } else { self.recent_bytes -= bytes }
        }
    }

    fn remember(&mut self, key: Location, ghosts_max: usize) {
        if self.ghost_keys.insert(key, ()).is_none() {
            self.ghosts.push_back(key);
        }
        while self.ghosts.len() > ghosts_max {
            if let Some(old) = self.ghosts.pop_front() {
                self.ghost_keys.remove(&old);
            }
        }
    }
}

/// Bounded cache of index pages. Bytes are counted with their bookkeeping.
pub struct PageCache {
    shards: [Mutex<Shard>; SHARDS],
    bytes_max: usize,
    hits: AtomicU64,
    misses: AtomicU64,
}

impl Default for PageCache {
    /// 64 MiB: the entries of about 16 GiB of mapped data.
    fn default() -> Self {
        Self::new(64 << 20)
    }
}

impl PageCache {
    /// A cache of at most `bytes_max` bytes.
    #[must_use]
    pub fn new(bytes_max: usize) -> Self {
        let shards = std::array::from_fn(|_| Mutex::default());
        Self { shards, bytes_max, hits: AtomicU64::new(0), misses: AtomicU64::new(0) }
    }

    /// The bound.
    #[must_use]
    pub fn bytes_max(&self) -> usize {
        self.bytes_max
    }

    /// Bytes held now.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().expect("cache lock")).map(|s| s.recent_bytes + s.hot_bytes).sum()
    }

    /// Look-ups of pages that were there, and that were not.
    #[must_use]
    pub fn hits_and_misses(&self) -> (u64, u64) {
        (self.hits.load(Ordering::Relaxed), self.misses.load(Ordering::Relaxed))
    }

    fn shard(&self, key: &Location) -> &Mutex<Shard> {
        &self.shards[(FixedState.hash_one(key) >> 48) as usize % SHARDS]
    }

    pub(super) fn get(&self, key: &Location) -> Option<Arc<Page>> {
        let found = self.shard(key).lock().expect("cache lock").pages.get_mut(key).map(|entry| {
            entry.touched = true;
            Arc::clone(&entry.page)
        });
        let counter = if found.is_some() { &self.hits } else { &self.misses };
        counter.fetch_add(1, Ordering::Relaxed);
        found
    }

    /// Whether the page is held; does not count as a use.
    pub(super) fn contains(&self, key: &Location) -> bool {
        self.shard(key).lock().expect("cache lock").pages.contains_key(key)
    }

    /// Holds a page; `hot` if it replaces one that was held.
    pub(super) fn insert(&self, key: Location, page: Arc<Page>, hot: bool) {
        self.shard(&key).lock().expect("cache lock").insert(key, page, hot, self.bytes_max / SHARDS);
    }
}

impl std::fmt::Debug for PageCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PageCache({} of {} bytes)", self.bytes(), self.bytes_max)
    }
}
