//! Free space of the extent area. Pure. First fit from the lowest address, so that places that were written before are
//! used again first.

use crate::format::{Extent, UNIT};
use std::collections::BTreeMap;

/// Most extents of one allocation.
pub const EXTENTS_MAX: usize = 64;

/// Free runs by offset.
#[derive(Clone, Debug)]
pub struct Allocator {
    free: BTreeMap<u64, u64>,
    free_bytes: u64,
    area: Extent,
}

impl Allocator {
    /// Everything in `area` is free.
    #[must_use]
    pub fn new(area: Extent) -> Self {
        let bytes = area.bytes / UNIT * UNIT;
        let area = Extent { offset: area.offset, bytes };
        Self { free: BTreeMap::from([(area.offset, bytes)]), free_bytes: bytes, area }
    }

    /// Bytes of the area.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.area.bytes
    }

    /// Free bytes.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        self.free_bytes
    }

    /// Takes `bytes` (rounded up to whole units), in one run if there is one, in at most [`EXTENTS_MAX`] runs else.
    /// `None`: not so much is free; nothing was taken.
    pub fn take(&mut self, bytes: u64) -> Option<Vec<Extent>> {
        let bytes = bytes.next_multiple_of(UNIT);
        if let Some((&offset, _)) = self.free.iter().find(|&(_, &run)| run >= bytes) {
            self.cut(offset, bytes);
            return Some(vec![Extent { offset, bytes }]);
        }
        if self.free_bytes < bytes {
            return None;
        }
        // Fragmented: the largest runs first.
        let mut runs: Vec<(u64, u64)> = self.free.iter().map(|(&offset, &run)| (run, offset)).collect();
        runs.sort_unstable_by(|a, b| b.cmp(a));
        let mut taken = Vec::new();
        let mut left = bytes;
        for (run, offset) in runs.into_iter().take(EXTENTS_MAX) {
            let here = run.min(left);
            taken.push(Extent { offset, bytes: here });
            left -= here;
            if left == 0 {
                for extent in &taken {
                    self.cut(extent.offset, extent.bytes);
                }
                return Some(taken);
            }
        }
        None
    }

    /// Takes exactly this extent; for rebuilding the state at open. `false` if not all of it is free.
    #[must_use]
    pub fn claim(&mut self, extent: Extent) -> bool {
        let Some((&offset, &run)) = self.free.range(..=extent.offset).next_back() else { return false };
        let Some(end) = extent.offset.checked_add(extent.bytes) else { return false };
        if end > offset + run || extent.bytes == 0 {
            return false;
        }
        self.free.remove(&offset);
        if extent.offset > offset {
            self.free.insert(offset, extent.offset - offset);
        }
        if end < offset + run {
            self.free.insert(end, offset + run - end);
        }
        self.free_bytes -= extent.bytes;
        true
    }

    /// Gives extents back.
    ///
    /// # Panics
    /// When a part of one is free already: a bug that would give the same place to two tenants.
    pub fn put_back(&mut self, extents: &[Extent]) {
        for extent in extents {
            let end = extent.offset + extent.bytes;
            let before = self.free.range(..extent.offset).next_back().map(|(&offset, &run)| (offset, offset + run));
            let after = self.free.range(extent.offset..).next().map(|(&offset, &run)| (offset, run));
            assert!(before.is_none_or(|(_, before_end)| before_end <= extent.offset), "extent {extent:?} freed twice");
            assert!(after.is_none_or(|(offset, _)| offset >= end), "extent {extent:?} freed twice");
            let mut merged = *extent;
            if let Some((offset, before_end)) = before
                && before_end == extent.offset
            {
                self.free.remove(&offset);
                merged = Extent { offset, bytes: merged.bytes + (before_end - offset) };
            }
            if let Some((offset, run)) = after
                && offset == end
            {
                self.free.remove(&offset);
                merged.bytes += run;
            }
            self.free.insert(merged.offset, merged.bytes);
            self.free_bytes += extent.bytes;
        }
    }

    fn cut(&mut self, offset: u64, bytes: u64) {
        let run = self.free.remove(&offset).expect("a free run");
        if run > bytes {
            self.free.insert(offset + bytes, run - bytes);
        }
        self.free_bytes -= bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_place_is_given_to_two_tenants(steps in proptest::collection::vec((any::<bool>(), 1u64..40), 1..200)) {
            let area = Extent { offset: UNIT, bytes: 512 * UNIT };
            let mut allocator = Allocator::new(area);
            let mut held: Vec<Vec<Extent>> = Vec::new();
            for (take, units) in steps {
                if take {
                    match allocator.take(units * UNIT) {
                        Some(extents) => {
                            prop_assert_eq!(extents.iter().map(|e| e.bytes).sum::<u64>(), units * UNIT);
                            held.push(extents);
                        }
                        None => prop_assert!(allocator.free_bytes() < units * UNIT || held.len() > 1),
                    }
                } else if !held.is_empty() {
                    let extents = held.swap_remove(units as usize % held.len());
                    allocator.put_back(&extents);
                }
                let mut all: Vec<Extent> = held.iter().flatten().copied().collect();
                all.sort();
                prop_assert!(all.windows(2).all(|w| w[0].offset + w[0].bytes <= w[1].offset));
                let used: u64 = all.iter().map(|e| e.bytes).sum();
                prop_assert_eq!(allocator.free_bytes() + used, area.bytes);
            }
            let mut again = Allocator::new(area);
            for extent in held.iter().flatten() {
                prop_assert!(again.claim(*extent));
                prop_assert!(!again.claim(*extent));
            }
            prop_assert_eq!(again.free_bytes(), allocator.free_bytes());
        }
    }
}
