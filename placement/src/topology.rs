//! The devices of a cluster and what fails together: device < node < host < rack < zone.

use crate::error::PlacementError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use xsan_types::{DeviceId, NodeId};

/// What fails together. No two positions of a placement group share one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FailureDomain {
    /// A disk.
    Device,
    /// A storage process.
    Node,
    /// A machine.
    Host,
    /// A rack (named inside its zone).
    Rack,
    /// A zone.
    Zone,
}

/// All levels, smallest first.
const LEVELS: [(FailureDomain, &str); 5] = [
    (FailureDomain::Device, "device"),
    (FailureDomain::Node, "node"),
    (FailureDomain::Host, "host"),
    (FailureDomain::Rack, "rack"),
    (FailureDomain::Zone, "zone"),
];

impl fmt::Display for FailureDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(LEVELS.iter().find(|(level, _)| level == self).map_or("", |(_, name)| name))
    }
}

/// A word that is no failure domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a failure domain; write device, node, host, rack or zone")]
pub struct ParseDomainError;

impl FromStr for FailureDomain {
    type Err = ParseDomainError;

    fn from_str(text: &str) -> Result<Self, ParseDomainError> {
        LEVELS.iter().find(|(_, name)| *name == text).map(|(level, _)| *level).ok_or(ParseDomainError)
    }
}

/// Whether a device may hold data. A device that is only away for a while stays `In`: its positions wait for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum DeviceState {
    /// Holds positions in proportion to its weight.
    In,
    /// Holds none: drained or lost for ever.
    Out,
}

/// A device and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Identity.
    pub id: DeviceId,
    /// The node that serves it.
    pub node: NodeId,
    /// The machine of the node, unique in the cluster.
    pub host: String,
    /// The rack of the machine, unique in its zone; may be empty (then all such machines of the zone are one rack).
    pub rack: String,
    /// The zone; may be empty.
    pub zone: String,
    /// Capacity in bytes; 0 holds nothing.
    pub weight: u64,
    /// Whether it may hold data.
    pub state: DeviceState,
}

impl Device {
    /// Whether it may hold positions.
    #[must_use]
    pub fn takes_data(&self) -> bool {
        self.state == DeviceState::In && self.weight > 0
    }
}

/// A checked set of devices, ordered by id.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    devices: Vec<Device>,
}

/// Identity of a failure domain at one level. Ordered and comparable only within that level.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum DomainKey<'a> {
    Device(DeviceId),
    Node(NodeId),
    Host(&'a str),
    Rack(&'a str, &'a str),
    Zone(&'a str),
}

impl Topology {
    /// Checks and orders `devices`.
    ///
    /// # Errors
    /// A device that is listed twice, a node on two hosts, a host in two racks or zones.
    pub fn new(mut devices: Vec<Device>) -> Result<Self, PlacementError> {
        devices.sort_by_key(|device| device.id);
        if let Some(pair) = devices.windows(2).find(|pair| pair[0].id == pair[1].id) {
            return Err(PlacementError::DuplicateDevice { device: pair[0].id });
        }
        let mut nodes: BTreeMap<NodeId, &Device> = BTreeMap::new();
        let mut hosts: BTreeMap<&str, &Device> = BTreeMap::new();
        for device in &devices {
            let first = *nodes.entry(device.node).or_insert(device);
            if (&first.host, &first.rack, &first.zone) != (&device.host, &device.rack, &device.zone) {
                return Err(PlacementError::SplitNode { node: device.node });
            }
            let first = *hosts.entry(&device.host).or_insert(device);
            if (&first.rack, &first.zone) != (&device.rack, &device.zone) {
                return Err(PlacementError::SplitHost { device: device.id });
            }
        }
        Ok(Self { devices })
    }

    /// The devices, ordered by id.
    #[must_use]
    pub fn devices(&self) -> &[Device] {
        &self.devices
    }

    /// The device with this id.
    #[must_use]
    pub fn device(&self, id: DeviceId) -> Option<&Device> {
        self.devices.binary_search_by_key(&id, |device| device.id).ok().and_then(|at| self.devices.get(at))
    }

    /// How many failure domains at `level` have a device that takes data.
    #[must_use]
    pub fn domain_count(&self, level: FailureDomain) -> usize {
        self.by_domain(level).len()
    }

    /// Whether two devices stand in one failure domain at `level`.
    #[must_use]
    pub fn share_domain(&self, a: &Device, b: &Device, level: FailureDomain) -> bool {
        domain_of(a, level) == domain_of(b, level)
    }

    /// Devices that take data, by failure domain; inside a domain ordered by id.
    pub(crate) fn by_domain(&self, level: FailureDomain) -> BTreeMap<DomainKey<'_>, Vec<&Device>> {
        let mut domains: BTreeMap<DomainKey<'_>, Vec<&Device>> = BTreeMap::new();
        for device in self.devices.iter().filter(|device| device.takes_data()) {
            domains.entry(domain_of(device, level)).or_default().push(device);
        }
        domains
    }
}

/// The failure domain of `device` at `level`.
pub(crate) fn domain_of(device: &Device, level: FailureDomain) -> DomainKey<'_> {
    match level {
        FailureDomain::Device => DomainKey::Device(device.id),
        FailureDomain::Node => DomainKey::Node(device.node),
        FailureDomain::Host => DomainKey::Host(&device.host),
        FailureDomain::Rack => DomainKey::Rack(&device.zone, &device.rack),
        FailureDomain::Zone => DomainKey::Zone(&device.zone),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(id: u128, node: u32, host: &str, rack: &str) -> Device {
        Device {
            id: DeviceId(id),
            node: NodeId(node),
            host: host.into(),
            rack: rack.into(),
            zone: String::new(),
            weight: 1,
            state: DeviceState::In,
        }
    }

    #[test]
    fn a_tree_that_is_not_a_tree_is_refused() {
        let two = |a, b| Topology::new(vec![a, b]);
        let twice = two(device(1, 1, "a", ""), device(1, 2, "b", ""));
        assert_eq!(twice, Err(PlacementError::DuplicateDevice { device: DeviceId(1) }));
        let split = two(device(1, 1, "a", ""), device(2, 1, "b", ""));
        assert_eq!(split, Err(PlacementError::SplitNode { node: NodeId(1) }));
        let split = two(device(1, 1, "a", "r1"), device(2, 2, "a", "r2"));
        assert_eq!(split, Err(PlacementError::SplitHost { device: DeviceId(2) }));
    }

    #[test]
    fn levels_are_read_as_they_are_printed() {
        for (level, name) in LEVELS {
            assert_eq!(level.to_string(), name);
            assert_eq!(name.parse(), Ok(level));
        }
        assert_eq!("disk".parse::<FailureDomain>(), Err(ParseDomainError));
        assert!(FailureDomain::Device < FailureDomain::Node && FailureDomain::Rack < FailureDomain::Zone);
    }

    #[test]
    fn only_devices_that_take_data_make_a_domain() {
        let mut devices = vec![device(1, 1, "a", ""), device(2, 2, "a", ""), device(3, 3, "b", "")];
        devices[2].state = DeviceState::Out;
        let topology = Topology::new(devices).unwrap();
        assert_eq!(topology.domain_count(FailureDomain::Node), 2);
        assert_eq!(topology.domain_count(FailureDomain::Host), 1);
    }
}
