//! Whether a table keeps its promises.

use crate::table::PgTable;
use crate::targets::Layout;
use crate::topology::{Topology, domain_of};
use std::collections::BTreeMap;
use xsan_types::{DeviceId, PgId, ShardIndex};

/// A broken promise of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// Two positions of a group stand in one failure domain.
    SharedDomain {
        /// The group.
        pg: PgId,
        /// The first position.
        first: ShardIndex,
        /// The second position.
        second: ShardIndex,
    },
    /// A position is held by a device that the topology does not know.
    UnknownDevice {
        /// The group.
        pg: PgId,
        /// The position.
        position: ShardIndex,
        /// The device.
        device: DeviceId,
    },
    /// A position is held by a device that is out or has no capacity.
    OutDevice {
        /// The group.
        pg: PgId,
        /// The position.
        position: ShardIndex,
        /// The device.
        device: DeviceId,
    },
    /// A group has more or fewer positions than the table's width.
    Width {
        /// The group.
        pg: PgId,
    },
}

/// How much a device holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeviceLoad {
    /// Which.
    pub device: DeviceId,
    /// Positions it holds.
    pub positions: u32,
    /// Positions that are its fair share by weight, as far as failure domains allow.
    pub fair: f64,
}

impl DeviceLoad {
    /// Load over fair share: 1 is fair. A device whose share is 0 and that holds nothing is fair.
    #[must_use]
    pub fn ratio(&self) -> f64 {
        if self.positions == 0 && self.fair == 0.0 { 1.0 } else { f64::from(self.positions) / self.fair }
    }
}

/// What [`check`] found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Broken promises, by group and position.
    pub violations: Vec<Violation>,
    /// Positions that nobody holds.
    pub holes: u64,
    /// Every device that takes data.
    pub loads: Vec<DeviceLoad>,
}

impl Report {
    /// The largest load over fair share; 0 without devices.
    #[must_use]
    pub fn ratio_max(&self) -> f64 {
        self.loads.iter().map(DeviceLoad::ratio).fold(0.0, f64::max)
    }

    /// The smallest load over fair share; infinite without devices.
    #[must_use]
    pub fn ratio_min(&self) -> f64 {
        self.loads.iter().map(DeviceLoad::ratio).fold(f64::INFINITY, f64::min)
    }
}

/// Checks `table` against `topology`.
#[must_use]
pub fn check(topology: &Topology, table: &PgTable) -> Report {
    let mut report = Report::default();
    let mut counts: BTreeMap<DeviceId, u32> = BTreeMap::new();
    for (index, group) in (0..).zip(&table.positions) {
        let pg = PgId { pool: table.pool, index };
        if group.len() != table.width {
            report.violations.push(Violation::Width { pg });
        }
        let mut domains = BTreeMap::new();
        for (position, device) in (0..).map(ShardIndex).zip(group) {
            let Some(device) = *device else {
                report.holes += 1;
                continue;
            };
            *counts.entry(device).or_default() += 1;
            let Some(known) = topology.device(device) else {
                report.violations.push(Violation::UnknownDevice { pg, position, device });
                continue;
            };
            if !known.takes_data() {
                report.violations.push(Violation::OutDevice { pg, position, device });
            }
            if let Some(first) = domains.insert(domain_of(known, table.failure_domain), position) {
                report.violations.push(Violation::SharedDomain { pg, first, second: position });
            }
        }
    }
    report.loads = Layout::new(topology, table.shape())
        .slots
        .iter()
        .map(|slot| DeviceLoad {
            device: slot.id,
            positions: counts.get(&slot.id).copied().unwrap_or(0),
            fair: slot.target,
        })
        .collect();
    report.loads.sort_by_key(|load| load.device);
    report
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::{Device, DeviceState, FailureDomain};
    use xsan_types::{NodeId, PoolId};

    #[test]
    fn every_kind_of_broken_promise_is_found() {
        let device = |id: u32, node, state| Device {
            id: DeviceId(id.into()),
            node: NodeId(node),
            host: format!("h{node}"),
            rack: String::new(),
            zone: String::new(),
            weight: 1,
            state,
        };
        let (inside, out) = (DeviceState::In, DeviceState::Out);
        let topology =
            Topology::new(vec![device(1, 1, inside), device(2, 1, inside), device(3, 2, inside), device(4, 3, out)])
                .unwrap();
        let at = |id: u128| Some(DeviceId(id));
        let table = PgTable {
            pool: PoolId(1),
            width: 2,
            failure_domain: FailureDomain::Node,
            positions: vec![vec![at(1), at(3)], vec![at(1), at(2)], vec![at(4), at(9)], vec![None]],
        };
        let report = check(&topology, &table);
        let pg = |index| PgId { pool: PoolId(1), index };
        assert_eq!(
            report.violations,
            [
                Violation::SharedDomain { pg: pg(1), first: ShardIndex(0), second: ShardIndex(1) },
                Violation::OutDevice { pg: pg(2), position: ShardIndex(0), device: DeviceId(4) },
                Violation::UnknownDevice { pg: pg(2), position: ShardIndex(1), device: DeviceId(9) },
                Violation::Width { pg: pg(3) },
            ]
        );
        assert_eq!(report.holes, 1);
        let loads: Vec<_> = report.loads.iter().map(|load| (load.device.0, load.positions, load.fair)).collect();
        assert_eq!(loads, [(1, 2, 2.0), (2, 1, 2.0), (3, 1, 4.0)]);
        assert_eq!((report.ratio_min(), report.ratio_max()), (0.25, 1.0));
    }
}
