//! How much may be lost at once, so that everything promised must still hold. Pure.
//!
//! A host whose process crashed has all it acknowledged: any number of them may be away. A host that lost power, its disk, or bits of it counts
//! until the volume has all its redundancy again, and so does one that is away meanwhile: sets and seals did without it. Of these no more
//! than the scheme tolerates.

use std::collections::BTreeSet;

/// Numbers of hosts by what became of them since the volume was whole.
#[derive(Debug, Default)]
pub struct Budget {
    most: usize,
    unlimited: bool,
    damaged: BTreeSet<u64>,
    away: BTreeSet<u64>,
    /// The one whose disk does not keep what it says: only reads mend it, so it counts for ever.
    rotten: Option<u64>,
}

impl Budget {
    /// At most `most` hosts are damaged at once; any number if `unlimited`.
    #[must_use]
    pub fn new(most: usize, unlimited: bool) -> Self {
        Self { most, unlimited, ..Self::default() }
    }

    /// Whether a host may lose something now.
    #[must_use]
    pub fn may_damage(&self, host: u64) -> bool {
        let others = self.damaged.union(&self.away).filter(|&&other| other != host).count();
        self.unlimited || others < self.most
    }

    /// Whether a host's disk may lose what it said was stable.
    #[must_use]
    pub fn may_rot(&self, host: u64) -> bool {
        self.unlimited || (self.rotten.is_none_or(|rotten| rotten == host) && self.may_damage(host))
    }

    /// Whether a host may be away for a time: what is written meanwhile lies on the others, of which the rotten one may keep nothing.
    #[must_use]
    pub fn may_leave(&self, host: u64) -> bool {
        let Some(rotten) = self.rotten else { return true };
        let others = self.away.iter().filter(|&&other| other != host && other != rotten).count();
        self.unlimited || host == rotten || others + 1 < self.most
    }

    /// A host lost something.
    pub fn damaged(&mut self, host: u64) {
        self.damaged.insert(host);
    }

    /// A host's disk lost what it said was stable.
    pub fn rotten(&mut self, host: u64) {
        self.damaged.insert(host);
        self.rotten = Some(host);
    }

    /// A host's process ended.
    pub fn leaves(&mut self, host: u64) {
        self.away.insert(host);
    }

    /// Whether anything happened to a host since the volume was whole.
    #[must_use]
    pub fn is_touched(&self, host: u64) -> bool {
        self.damaged.contains(&host) || self.away.contains(&host)
    }

    /// Whether its disk is one that does not keep what it says.
    #[must_use]
    pub fn is_rotten(&self, host: u64) -> bool {
        self.unlimited || self.rotten == Some(host)
    }

    /// Whether there is one, and it counts.
    #[must_use]
    pub fn has_rotten(&self) -> bool {
        self.rotten.is_some() && !self.unlimited
    }

    /// The volume is whole.
    pub fn healed(&mut self) {
        self.away.clear();
        self.damaged = self.rotten.into_iter().collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_that_are_away_leave_less_room_for_damage() {
        let mut budget = Budget::new(2, false);
        budget.leaves(1);
        assert!(budget.may_damage(2));
        budget.damaged(2);
        assert!(!budget.may_damage(3) && budget.may_damage(1) && budget.may_damage(2));
        budget.leaves(3);
        assert!(!budget.may_damage(1), "three are touched");
        budget.healed();
        assert!(budget.may_damage(3) && !budget.is_touched(2));
    }

    #[test]
    fn a_rotten_disk_counts_for_ever_and_is_the_only_one() {
        let mut budget = Budget::new(2, false);
        budget.rotten(4);
        budget.healed();
        assert!(budget.is_touched(4) && budget.may_rot(4) && !budget.may_rot(5));
        budget.damaged(5);
        assert!(!budget.may_damage(6));
    }

    #[test]
    fn beside_a_rotten_disk_fewer_may_be_away() {
        let mut budget = Budget::new(2, false);
        budget.leaves(1);
        budget.leaves(2);
        assert!(budget.may_leave(3), "any number of processes may end");
        budget.healed();
        budget.rotten(4);
        assert!(budget.may_leave(1));
        budget.leaves(1);
        assert!(!budget.may_leave(2) && budget.may_leave(1) && budget.may_leave(4));
    }
}
