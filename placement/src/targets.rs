//! How many positions each device should hold.

use crate::hash;
use crate::table::Shape;
use crate::topology::Topology;
use std::collections::BTreeMap;
use xsan_types::DeviceId;

/// A device that takes data.
#[derive(Debug)]
pub(crate) struct Slot {
    pub id: DeviceId,
    /// Index of its failure domain.
    pub domain: u32,
    pub hash: u64,
    pub weight: f64,
    /// Positions it should hold; a fraction.
    pub target: f64,
    /// Positions it holds now.
    pub load: u32,
}

impl Slot {
    /// Positions held beyond the fair share; negative below it.
    pub fn excess(&self) -> f64 {
        f64::from(self.load) - self.target
    }

    /// Whether one more position stays within the fair share rounded up.
    pub fn has_room(&self) -> bool {
        f64::from(self.load) < self.target.ceil()
    }
}

/// A failure domain: `first..end` of the slots are its devices.
#[derive(Debug)]
pub(crate) struct Domain {
    pub first: u32,
    pub end: u32,
    pub hash: u64,
    pub weight: f64,
    pub target: f64,
    pub load: u32,
}

impl Domain {
    pub fn has_room(&self) -> bool {
        f64::from(self.load) < self.target.ceil()
    }
}

/// Devices that take data, ordered by (failure domain, id), with their fair shares and loads.
#[derive(Debug)]
pub(crate) struct Layout {
    pub slots: Vec<Slot>,
    pub domains: Vec<Domain>,
    by_id: BTreeMap<DeviceId, u32>,
}

impl Layout {
    /// Fair shares of `topology` for tables of `shape`; all loads are 0.
    pub fn new(topology: &Topology, shape: Shape) -> Self {
        let mut layout = Self { slots: Vec::new(), domains: Vec::new(), by_id: BTreeMap::new() };
        for (key, devices) in topology.by_domain(shape.failure_domain) {
            let first = index(layout.slots.len());
            let domain = index(layout.domains.len());
            for device in &devices {
                layout.by_id.insert(device.id, index(layout.slots.len()));
                layout.slots.push(Slot {
                    id: device.id,
                    domain,
                    hash: hash::of_identity(device.id.0),
                    weight: device.weight as f64,
                    target: 0.0,
                    load: 0,
                });
            }
            layout.domains.push(Domain {
                first,
                end: index(layout.slots.len()),
                hash: hash::of_domain(&key),
                weight: devices.iter().map(|device| device.weight as f64).sum(),
                target: 0.0,
                load: 0,
            });
        }
        layout.share_out(shape);
        layout
    }

    /// Sets every target. A domain holds at most one position of a group: what a large one cannot take is shared by the
    /// others in proportion to their weights.
    fn share_out(&mut self, shape: Shape) {
        let mut full = vec![false; self.domains.len()];
        loop {
            let open = || self.domains.iter().zip(&full).filter(|(_, full)| !**full).map(|(domain, _)| domain);
            let positions = shape.width as f64 - full.iter().filter(|full| **full).count() as f64;
            let weight: f64 = open().map(|domain| domain.weight).sum();
            let mut again = false;
            for (domain, full) in self.domains.iter_mut().zip(&mut full) {
                if *full {
                    continue;
                }
                let share = (domain.weight * positions / weight).max(0.0);
                domain.target = share.min(1.0) * f64::from(shape.pg_count);
                if share >= 1.0 {
                    *full = true;
                    again = true;
                }
            }
            if !again || full.iter().all(|full| *full) {
                break;
            }
        }
        for slot in &mut self.slots {
            let domain = &self.domains[slot.domain as usize];
            slot.target = domain.target * slot.weight / domain.weight;
        }
    }

    /// The slot of a device, if it takes data.
    pub fn find(&self, id: DeviceId) -> Option<u32> {
        self.by_id.get(&id).copied()
    }

    /// Counts one position more on `slot`.
    pub fn load(&mut self, slot: u32) {
        let slot = &mut self.slots[slot as usize];
        slot.load += 1;
        self.domains[slot.domain as usize].load += 1;
    }

    /// Counts one position less on `slot`.
    pub fn unload(&mut self, slot: u32) {
        let slot = &mut self.slots[slot as usize];
        slot.load -= 1;
        self.domains[slot.domain as usize].load -= 1;
    }

    /// The slots of a domain with their numbers.
    pub fn slots_of(&self, domain: u32) -> impl Iterator<Item = (u32, &Slot)> {
        let Domain { first, end, .. } = self.domains[domain as usize];
        (first..end).zip(&self.slots[first as usize..end as usize])
    }
}

/// Numbers of devices and domains fit 32 bits: a topology of 2^32 devices does not fit memory.
fn index(number: usize) -> u32 {
    u32::try_from(number).expect("fewer than 2^32 devices")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::{Device, DeviceState, FailureDomain};
    use xsan_types::{NodeId, PoolId};

    fn targets(weights: &[u64], width: usize) -> Vec<f64> {
        let devices = (1u32..).zip(weights).map(|(number, weight)| Device {
            id: DeviceId(number.into()),
            node: NodeId(number),
            host: number.to_string(),
            rack: String::new(),
            zone: String::new(),
            weight: *weight,
            state: DeviceState::In,
        });
        let topology = Topology::new(devices.collect()).unwrap();
        let shape = Shape { pool: PoolId(1), width, failure_domain: FailureDomain::Device, pg_count: 100 };
        Layout::new(&topology, shape).slots.iter().map(|slot| slot.target).collect()
    }

    #[test]
    fn shares_follow_weight_and_a_large_domain_holds_one_position_of_each_group() {
        assert_eq!(targets(&[1, 1, 2], 1), [25.0, 25.0, 50.0]);
        assert_eq!(targets(&[1, 1, 8], 2), [50.0, 50.0, 100.0]);
        assert_eq!(targets(&[1, 8, 9], 3), [100.0, 100.0, 100.0]);
        // Two positions are taken by the giants, the rest is shared 1:1:2.
        assert_eq!(targets(&[1, 1, 2, 90, 90], 3), [25.0, 25.0, 50.0, 100.0, 100.0]);
        // Fewer domains than positions: each is full.
        assert_eq!(targets(&[3, 4], 5), [100.0, 100.0]);
    }
}
