//! Changes in memory: one entry per changed block in hash tables, and the zeroed ranges in order.
//!
//! Data and zeroes are kept apart and compared by version when looked up, so a zeroed range of any size costs the same.
//! An entry is 24 bytes in a table that is between 7/16 and 7/8 full (38 bytes on average); there are 64 tables, so that
//! a doubling copies a 64th of the entries.

use super::entry::{Change, LBA_MAX, POSITIONS_MAX, Place};
use super::hash::{FixedState, mix};
use hashbrown::{HashMap, HashTable};
use std::collections::{BTreeMap, BTreeSet};
use xsan_types::{Crc32c, Generation, Sequence, Version};

const TABLES: usize = 64;
/// Blocks of a region, the unit in which the delta knows where it has data at all.
pub(super) const REGION_BLOCKS: u64 = 512;
const CHUNK_REGIONS: u64 = 4096;
/// Memory of a zeroed range in its map.
const ZERO_MEMORY: usize = 64;

/// A block's newest known data.
struct Slot {
    /// lba << 16 | position.
    key: u64,
    sequence: u64,
    crc: u32,
    /// Index in `sources`.
    source: u32,
}

const _: () = assert!(size_of::<Slot>() == 24);
const _: () = assert!(LBA_MAX == 1 << 48 && POSITIONS_MAX == 1 << 16);

impl Slot {
    fn lba(&self) -> u64 {
        self.key >> 16
    }
}

/// Neighbouring blocks fall into neighbouring slots (a batch touches few cache lines) but keep different tags.
#[inline]
fn hash(lba: u64) -> u64 {
    let group = mix(lba >> 3);
    let within = lba & 7;
    (group & (u64::MAX >> 7)).wrapping_add(within) | (((group >> 57) + within * 16) << 57)
}

fn table_of(hash: u64) -> usize {
    (hash >> 40) as usize % TABLES
}

/// Where bytes come from: what the slots of a segment's entries share.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Source {
    number: u64,
    generation: Generation,
}

/// A zeroed range, from its key in the map to `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Zero {
    pub end: u64,
    pub version: Version,
    pub number: u64,
}

/// Which regions have data.
#[derive(Default)]
struct Presence {
    chunks: HashMap<u64, Box<[u64; CHUNK_REGIONS as usize / 64]>, FixedState>,
    order: BTreeSet<u64>,
}

impl Presence {
    fn set(&mut self, lba: u64) {
        let region = lba / REGION_BLOCKS;
        let (chunk, bit) = (region / CHUNK_REGIONS, region % CHUNK_REGIONS);
        let words = self.chunks.entry(chunk).or_insert_with(|| {
            self.order.insert(chunk);
            Box::new([0; CHUNK_REGIONS as usize / 64])
        });
        words[(bit / 64) as usize] |= 1 << (bit % 64);
    }

    /// First block at or behind `lba` that lies in a region with data.
    fn next(&self, lba: u64) -> Option<u64> {
        let region = lba / REGION_BLOCKS;
        for &chunk in self.order.range(region / CHUNK_REGIONS..) {
            let from = region.saturating_sub(chunk * CHUNK_REGIONS);
            let words = &self.chunks[&chunk];
            let mut word = (from / 64) as usize;
            let mut bits = words.get(word).map_or(0, |bits| bits & (u64::MAX << (from % 64)));
            while word < words.len() {
                if bits != 0 {
                    let found = chunk * CHUNK_REGIONS + word as u64 * 64 + u64::from(bits.trailing_zeros());
                    return Some((found * REGION_BLOCKS).max(lba));
                }
                word += 1;
                bits = words.get(word).copied().unwrap_or(0);
            }
        }
        None
    }

    fn count(&self) -> u64 {
        self.chunks.values().flat_map(|words| words.iter()).map(|word| u64::from(word.count_ones())).sum()
    }

    fn memory(&self) -> usize {
        self.chunks.len() * (CHUNK_REGIONS as usize / 8 + 64)
    }
}

/// Changes since a point in the log. The newest version of a block wins, whatever the order in which they come; of equal
/// versions the later one.
pub(super) struct Delta {
    tables: Box<[HashTable<Slot>]>,
    len: usize,
    sources: Vec<Source>,
    source_index: BTreeMap<Source, u32>,
    last_source: u32,
    zeroes: BTreeMap<u64, Zero>,
    presence: Presence,
    /// Newest version entered; the default if none.
    pub newest: Version,
    /// Oldest version of data entered.
    pub oldest_data: Option<Version>,
    /// Smallest segment number of a change that is newer than `horizon`.
    pub number_min: Option<u64>,
    /// What lies below knows every change up to this version.
    pub horizon: Version,
}

impl Delta {
    pub fn new(horizon: Version) -> Self {
        Self {
            tables: Box::default(),
            len: 0,
            sources: Vec::new(),
            source_index: BTreeMap::new(),
            last_source: 0,
            zeroes: BTreeMap::new(),
            presence: Presence::default(),
            newest: Version::default(),
            oldest_data: None,
            number_min: None,
            horizon,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0 && self.zeroes.is_empty()
    }

    /// Blocks with data.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn zero_count(&self) -> usize {
        self.zeroes.len()
    }

    /// Regions with data.
    pub fn regions(&self) -> u64 {
        self.presence.count()
    }

    pub fn memory(&self) -> usize {
        if self.is_empty() {
            return 0;
        }
        let slots: usize = self.tables.iter().map(HashTable::allocation_size).sum();
        slots + self.zeroes.len() * ZERO_MEMORY + self.presence.memory() + self.sources.len() * 48
    }

    pub fn apply(&mut self, change: &Change) {
        match *change {
            Change::Data { lba, version, place } => self.data(lba.0, version, place),
            Change::Zero { range, version, number } => {
                self.note(version, number);
                self.zero(range.start.0, range.start.0 + range.count, Zero { end: 0, version, number });
            }
        }
    }

    fn note(&mut self, version: Version, number: u64) {
        self.newest = self.newest.max(version);
        if version > self.horizon && self.number_min.is_none_or(|min| number < min) {
            self.number_min = Some(number);
        }
    }

    fn data(&mut self, lba: u64, version: Version, place: Place) {
        assert!(lba < LBA_MAX && place.position < POSITIONS_MAX, "block {lba}, position {}", place.position);
        self.note(version, place.number);
        if self.oldest_data.is_none_or(|oldest| version < oldest) {
            self.oldest_data = Some(version);
        }
        let source = self.source(Source { number: place.number, generation: version.generation });
        if self.tables.is_empty() {
            self.tables = (0..TABLES).map(|_| HashTable::new()).collect();
        }
        let slot =
            Slot { key: lba << 16 | u64::from(place.position), sequence: version.sequence.0, crc: place.crc.0, source };
        let hash_of = hash(lba);
        let sources = &self.sources;
        let entry = self.tables[table_of(hash_of)].entry(hash_of, |slot| slot.lba() == lba, |slot| hash(slot.lba()));
        match entry {
            hashbrown::hash_table::Entry::Occupied(mut old) => {
                let old = old.get_mut();
                let old_generation = sources[old.source as usize].generation;
                if (version.generation, version.sequence.0) >= (old_generation, old.sequence) {
                    *old = slot;
                }
            }
            hashbrown::hash_table::Entry::Vacant(free) => {
                free.insert(slot);
                self.len += 1;
                self.presence.set(lba);
            }
        }
    }

    fn source(&mut self, source: Source) -> u32 {
        if self.sources.get(self.last_source as usize) != Some(&source) {
            let next = u32::try_from(self.sources.len()).expect("fewer than 2^32 segments in one delta");
            self.last_source = *self.source_index.entry(source).or_insert_with(|| {
                self.sources.push(source);
                next
            });
        }
        self.last_source
    }

    /// Enters `start..end`; where it meets other ranges the newer version stays.
    fn zero(&mut self, start: u64, end: u64, zero: Zero) {
        assert!(end <= LBA_MAX, "zeroed blocks up to {end}");
        let mut from = start;
        let mut kept = Vec::new();
        let before = self.zeroes.range(..start).next_back().filter(|(_, zero)| zero.end > start).map(|(&at, _)| at);
        let first = before.unwrap_or(start);
        let met: Vec<_> = self.zeroes.range(first..end).map(|(&at, _)| at).collect();
        for at in met {
            let Some(old) = self.zeroes.remove(&at) else { continue };
            if old.version > zero.version {
                if from < at {
                    kept.push((from, Zero { end: at, ..zero }));
                }
                kept.push((at, old));
                from = from.max(old.end);
            } else {
                if at < start {
                    kept.push((at, Zero { end: start, ..old }));
                }
                if old.end > end {
                    kept.push((end, old));
                }
            }
        }
        if from < end {
            kept.push((from, Zero { end, ..zero }));
        }
        self.zeroes.extend(kept);
    }

    /// The data of a block, hidden or not.
    #[inline]
    pub fn get(&self, lba: u64) -> Option<(Version, Place)> {
        let hash_of = hash(lba);
        let slot = self.tables.get(table_of(hash_of))?.find(hash_of, |slot| slot.lba() == lba)?;
        let Source { number, generation } = self.sources[slot.source as usize];
        let version = Version { generation, sequence: Sequence(slot.sequence) };
        let position = (slot.key & u64::from(POSITIONS_MAX - 1)) as u32;
        Some((version, Place { number, position, crc: Crc32c(slot.crc) }))
    }

    /// The zeroed range that covers `lba`, or the first one behind it: its start (not before `lba`) and itself.
    pub fn zero_from(&self, lba: u64) -> Option<(u64, Zero)> {
        let covering = self.zeroes.range(..=lba).next_back().filter(|(_, zero)| zero.end > lba);
        covering.or_else(|| self.zeroes.range(lba..).next()).map(|(&start, &zero)| (start.max(lba), zero))
    }

    /// First block at or behind `lba` from which data may stand; everything before has none.
    pub fn data_from(&self, lba: u64) -> Option<u64> {
        self.presence.next(lba)
    }

    /// All blocks with data, in order.
    pub fn sorted(&self) -> Vec<u64> {
        let mut blocks = Vec::with_capacity(self.len);
        blocks.extend(self.tables.iter().flat_map(HashTable::iter).map(Slot::lba));
        blocks.sort_unstable();
        blocks
    }

    /// Whether zeroed ranges without a gap cover `start..end`.
    pub fn zeroes_cover(&self, start: u64, end: u64) -> bool {
        let mut reached = start;
        while reached < end {
            match self.zero_from(reached) {
                Some((at, zero)) if at == reached => reached = zero.end,
                _ => return false,
            }
        }
        true
    }

    /// Puts the changes of `older` beneath these, as if they had been entered first.
    pub fn merge_beneath(&mut self, older: Delta) {
        let newer = std::mem::replace(self, older);
        for slot in newer.tables.iter().flat_map(HashTable::iter) {
            if let Some((version, place)) = newer.get(slot.lba()) {
                self.data(slot.lba(), version, place);
            }
        }
        for (&start, &zero) in &newer.zeroes {
            self.note(zero.version, zero.number);
            self.zero(start, zero.end, zero);
        }
    }
}
