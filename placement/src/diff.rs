//! What a new table moves.

use crate::error::PlacementError;
use crate::table::PgTable;
use std::collections::BTreeMap;
use xsan_types::{DeviceId, PgId, ShardIndex};

/// One position that changes its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// The group.
    pub pg: PgId,
    /// The position.
    pub position: ShardIndex,
    /// Who holds it; `None` is a hole (its bytes are rebuilt from k others).
    pub from: Option<DeviceId>,
    /// Who will hold it; `None` leaves a hole.
    pub to: Option<DeviceId>,
    /// Bytes that the new device must get; 0 if there is none.
    pub bytes: u64,
}

/// All moves between two tables, in order of group and position.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Diff {
    /// The moves.
    pub moves: Vec<Move>,
}

impl Diff {
    /// Bytes of all moves.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.moves.iter().fold(0, |sum, step| sum.saturating_add(step.bytes))
    }

    /// Bytes that each device must get.
    #[must_use]
    pub fn bytes_in(&self) -> BTreeMap<DeviceId, u64> {
        self.sums(|step| step.to)
    }

    /// Bytes that each device can free afterwards.
    #[must_use]
    pub fn bytes_out(&self) -> BTreeMap<DeviceId, u64> {
        self.sums(|step| step.from)
    }

    fn sums(&self, side: impl Fn(&Move) -> Option<DeviceId>) -> BTreeMap<DeviceId, u64> {
        let mut sums = BTreeMap::new();
        for (device, bytes) in self.moves.iter().filter_map(|step| side(step).map(|device| (device, step.bytes))) {
            let sum: &mut u64 = sums.entry(device).or_default();
            *sum = sum.saturating_add(bytes);
        }
        sums
    }
}

/// What has to move to get from `old` to `new`, when a position of a group holds `bytes_per_position(group)` bytes. Groups
/// that only `new` has start empty and move nothing.
///
/// # Errors
/// `PreviousShape` if the tables are of different pools or widths, or `new` has fewer groups.
pub fn diff(old: &PgTable, new: &PgTable, bytes_per_position: impl Fn(PgId) -> u64) -> Result<Diff, PlacementError> {
    if (old.pool, old.width) != (new.pool, new.width) || old.positions.len() > new.positions.len() {
        return Err(PlacementError::PreviousShape);
    }
    let mut moves = Vec::new();
    for (index, (before, after)) in (0..).zip(old.positions.iter().zip(&new.positions)) {
        let pg = PgId { pool: new.pool, index };
        for (position, (from, to)) in (0..).zip(before.iter().zip(after)) {
            if from != to {
                let bytes = if to.is_some() { bytes_per_position(pg) } else { 0 };
                moves.push(Move { pg, position: ShardIndex(position), from: *from, to: *to, bytes });
            }
        }
    }
    Ok(Diff { moves })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::FailureDomain;
    use xsan_types::PoolId;

    fn table(positions: &[[u128; 2]]) -> PgTable {
        let device = |id: &u128| (*id != 0).then_some(DeviceId(*id));
        PgTable {
            pool: PoolId(1),
            width: 2,
            failure_domain: FailureDomain::Node,
            positions: positions.iter().map(|group| group.iter().map(device).collect()).collect(),
        }
    }

    #[test]
    fn the_difference_names_each_move_and_its_bytes() {
        let old = table(&[[1, 2], [2, 3], [0, 3]]);
        let new = table(&[[1, 4], [2, 3], [4, 0], [1, 2]]);
        let diff = diff(&old, &new, |pg| 100 + u64::from(pg.index)).unwrap();
        let found: Vec<_> = diff.moves.iter().map(|step| (step.pg.index, step.position.0, step.bytes)).collect();
        assert_eq!(found, [(0, 1, 100), (2, 0, 102), (2, 1, 0)]);
        assert_eq!(diff.bytes(), 202);
        assert_eq!(diff.bytes_in(), BTreeMap::from([(DeviceId(4), 202)]));
        assert_eq!(diff.bytes_out(), BTreeMap::from([(DeviceId(2), 100), (DeviceId(3), 0)]));
    }

    #[test]
    fn tables_of_different_shape_have_no_difference() {
        let one = table(&[[1, 2]]);
        assert_eq!(diff(&table(&[[1, 2], [1, 2]]), &one, |_| 0), Err(PlacementError::PreviousShape));
        let other = PgTable { pool: PoolId(2), ..one.clone() };
        assert_eq!(diff(&one, &other, |_| 0), Err(PlacementError::PreviousShape));
    }
}
