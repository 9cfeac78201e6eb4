//! The table of placement groups: group -> ordered list of devices, one per shard position.

use crate::error::PlacementError;
use crate::topology::FailureDomain;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use xsan_types::{DeviceId, PgId, PoolId};

/// Largest number of groups of a pool: keeps every count inside u32 and the table inside memory.
pub const PG_COUNT_MAX: u32 = 1 << 20;
/// Largest number of positions of a group (`xsan_types::scheme::SHARDS_MAX`).
pub const WIDTH_MAX: usize = 64;

/// What a table should look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The pool.
    pub pool: PoolId,
    /// Positions of each group: the width of the scheme, 1..=64.
    pub width: usize,
    /// No two positions of a group share one.
    pub failure_domain: FailureDomain,
    /// Number of groups, 1..=2^20.
    pub pg_count: u32,
}

/// The groups of one pool. Serialised compactly (a list of devices and indices into it); what is read back is checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "Stored", try_from = "Stored")]
pub struct PgTable {
    /// The pool.
    pub pool: PoolId,
    /// Positions of each group.
    pub width: usize,
    /// No two positions of a group share one.
    pub failure_domain: FailureDomain,
    /// Per group its devices in the order of the shard index; `None` is a hole. Every inner list has `width` entries.
    pub positions: Vec<Vec<Option<DeviceId>>>,
}

impl PgTable {
    /// The shape of this table.
    #[must_use]
    pub fn shape(&self) -> Shape {
        Shape {
            pool: self.pool,
            width: self.width,
            failure_domain: self.failure_domain,
            pg_count: u32::try_from(self.positions.len()).unwrap_or(u32::MAX),
        }
    }

    /// The devices of a group, one entry per position; `None` for a group of another pool or beyond the end.
    #[must_use]
    pub fn group(&self, pg: PgId) -> Option<&[Option<DeviceId>]> {
        if pg.pool != self.pool {
            return None;
        }
        self.positions.get(usize::try_from(pg.index).ok()?).map(Vec::as_slice)
    }

    /// Whether any position is held by `device`.
    #[must_use]
    pub fn holds(&self, device: DeviceId) -> bool {
        self.positions.iter().flatten().any(|position| *position == Some(device))
    }
}

/// What is written: each device once, positions as indices into the list plus one, 0 for a hole.
#[derive(Serialize, Deserialize)]
struct Stored {
    pool: PoolId,
    width: u32,
    failure_domain: FailureDomain,
    devices: Vec<DeviceId>,
    positions: Vec<u32>,
}

impl From<PgTable> for Stored {
    fn from(table: PgTable) -> Self {
        let mut numbers: BTreeMap<DeviceId, u32> = BTreeMap::new();
        for device in table.positions.iter().flatten().flatten() {
            numbers.insert(*device, 0);
        }
        for (number, slot) in (1..).zip(numbers.values_mut()) {
            *slot = number;
        }
        let number = |position: &Option<DeviceId>| position.and_then(|id| numbers.get(&id).copied()).unwrap_or(0);
        Self {
            pool: table.pool,
            width: u32::try_from(table.width).unwrap_or(u32::MAX),
            failure_domain: table.failure_domain,
            positions: table.positions.iter().flatten().map(number).collect(),
            devices: numbers.keys().copied().collect(),
        }
    }
}

impl TryFrom<Stored> for PgTable {
    type Error = PlacementError;

    fn try_from(stored: Stored) -> Result<Self, PlacementError> {
        let width = usize::try_from(stored.width).map_err(|_| PlacementError::Table)?;
        if width == 0 || width > WIDTH_MAX || !stored.positions.len().is_multiple_of(width) {
            return Err(PlacementError::Table);
        }
        if stored.positions.len() / width > PG_COUNT_MAX as usize {
            return Err(PlacementError::Table);
        }
        let device = |number: &u32| match number.checked_sub(1) {
            None => Ok(None),
            Some(at) => stored.devices.get(at as usize).copied().map(Some).ok_or(PlacementError::Table),
        };
        let positions = stored
            .positions
            .chunks(width)
            .map(|group| group.iter().map(device).collect::<Result<Vec<_>, _>>())
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self { pool: stored.pool, width, failure_domain: stored.failure_domain, positions })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(width: u32, positions: Vec<u32>) -> Stored {
        let devices = vec![DeviceId(5), DeviceId(9)];
        Stored { pool: PoolId(1), width, failure_domain: FailureDomain::Host, devices, positions }
    }

    #[test]
    fn a_table_survives_its_stored_form() {
        let table = PgTable::try_from(stored(2, vec![1, 2, 2, 0])).unwrap();
        assert_eq!(table.positions, [[Some(DeviceId(5)), Some(DeviceId(9))], [Some(DeviceId(9)), None]]);
        let bytes = postcard::to_allocvec(&table).unwrap();
        // Two devices of 33 bytes each, then one byte per position.
        assert_eq!(bytes.len(), 3 + 1 + 2 * 33 + 1 + 4);
        assert_eq!(postcard::from_bytes(&bytes), Ok(table));
    }

    #[test]
    fn a_stored_table_that_does_not_fit_together_is_refused() {
        for wrong in [stored(0, vec![]), stored(65, vec![]), stored(2, vec![1]), stored(1, vec![3])] {
            assert_eq!(PgTable::try_from(wrong), Err(PlacementError::Table));
        }
    }
}
