//! What the cluster knows about itself. Data and queries; every change goes through [`MetaState::apply`].

use crate::addresses::AddressRecord;
use crate::hosts::Hosts;
use crate::name::Name;
use crate::register::VolumeRegister;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use xsan_placement::{Device, DeviceState, FailureDomain, PgTable, PlacementError, Topology};
use xsan_types::{
    BLOCK_BYTES, ClusterId, DeviceId, Epoch, NodeId, PoolId, Register, RegisterView, Scheme, VolumeId, VolumeState,
};

/// Largest size of a volume: what a signed 64-bit file offset of a client can name, in whole blocks.
pub const VOLUME_BYTES_MAX: u64 = (1 << 63) - BLOCK_BYTES;

/// Where a node is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// Known; holds no data yet: placement does not use it.
    Joining,
    /// Serves.
    Up,
    /// Did not answer of late.
    Suspect,
    /// Away; its positions wait for it.
    Down,
    /// Is being emptied: placement does not use it.
    Draining,
    /// Gone for good; the id stays used.
    Removed,
}

impl NodeState {
    /// Whether placement may put data on the node's devices.
    #[must_use]
    pub fn takes_data(self) -> bool {
        matches!(self, Self::Up | Self::Suspect | Self::Down)
    }
}

impl fmt::Display for NodeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Joining => "joining",
            Self::Up => "up",
            Self::Suspect => "suspect",
            Self::Down => "down",
            Self::Draining => "draining",
            Self::Removed => "removed",
        })
    }
}

/// A storage process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Identity.
    pub id: NodeId,
    /// What people call it; unique among nodes that are not removed.
    pub name: Name,
    /// The machine it runs on.
    pub host: Name,
    /// The rack of the machine.
    pub rack: Option<Name>,
    /// The zone of the rack.
    pub zone: Option<Name>,
    /// Where it is in its life.
    pub state: NodeState,
}

/// A disk of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRecord {
    /// Identity, from its superblock.
    pub id: DeviceId,
    /// The node that serves it.
    pub node: NodeId,
    /// Capacity in bytes: its weight in placement.
    pub capacity: u64,
    /// Whether placement may use it.
    pub state: DeviceState,
}

/// When a write is acknowledged (R1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AckPolicy {
    /// All members of the journal set have it.
    #[default]
    Replicated,
    /// All members have flushed it.
    Persisted,
}

impl fmt::Display for AckPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Replicated => "replicated",
            Self::Persisted => "persisted",
        })
    }
}

/// Volumes with one redundancy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pool {
    /// Identity.
    pub id: PoolId,
    /// What people call it; unique among pools.
    pub name: Name,
    /// Redundancy of its segments.
    pub scheme: Scheme,
    /// No two positions of a group share one.
    pub failure_domain: FailureDomain,
    /// Acknowledgement of new volumes.
    pub ack: AckPolicy,
    /// Epoch in which `table` or `next` changed last: shard writes older than it are refused for positions that moved (P11).
    pub map_epoch: Epoch,
    /// Where data is.
    #[serde(with = "shared")]
    pub table: Arc<PgTable>,
    /// Where data is going, while it moves: written there, and read there first (P11).
    #[serde(with = "shared_option")]
    pub next: Option<Arc<PgTable>>,
}

/// A virtual disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Identity; never used again, not even after deletion.
    pub id: VolumeId,
    /// What people call it; unique among volumes that are not deleted. Of a deleted one: its last name.
    pub name: Name,
    /// Where its segments go.
    pub pool: PoolId,
    /// When its writes are acknowledged.
    pub ack: AckPolicy,
    /// Its register, with what makes repeated changes answerable.
    pub register: VolumeRegister,
}

impl Volume {
    /// The register (P2).
    #[must_use]
    pub fn register(&self) -> &Register {
        self.register.get()
    }

    /// Whether it is deleted: only the tombstone is left, for ever.
    #[must_use]
    pub fn is_deleted(&self) -> bool {
        self.register().state == VolumeState::Deleted
    }

    /// What nodes need to know of the register to free what no longer counts.
    #[must_use]
    pub fn register_view(&self) -> RegisterView {
        let register = self.register();
        // A generation that has given its set up is over; one that has only been taken may be about to register its first.
        let is_over = self.register.is_handed_over();
        RegisterView {
            volume: self.id,
            generation: if is_over { register.generation.next() } else { register.generation },
            set: register.set.as_ref().map(|set| set.id),
            deleted: self.is_deleted(),
        }
    }
}

/// The whole metadata of a cluster. Maps are ordered by id; sums of everything fit memory many times over (a volume costs
/// under 1 KiB, a placement group about 32 bytes a position).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetaState {
    /// Identity of the cluster.
    pub cluster: ClusterId,
    /// All nodes share one host and that is known (`xsan dev`): nodes count as failure domains.
    pub single_host: bool,
    /// Version of the cluster map.
    pub epoch: Epoch,
    /// All nodes ever known, removed ones too.
    pub nodes: BTreeMap<NodeId, Node>,
    /// All devices of nodes that are not removed.
    pub devices: BTreeMap<DeviceId, DeviceRecord>,
    /// All pools.
    pub pools: BTreeMap<PoolId, Pool>,
    /// All volumes ever made, deleted ones too (tombstones): absence frees nothing (P2).
    pub volumes: BTreeMap<VolumeId, Volume>,
    /// Names of volumes that are not deleted.
    pub volume_names: BTreeMap<Name, VolumeId>,
    /// The next node's id.
    pub(crate) next_node: NodeId,
    /// The next pool's id.
    pub(crate) next_pool: PoolId,
    /// The next volume's id.
    pub(crate) next_volume: VolumeId,
    /// Hosts as members of the cluster.
    pub hosts: Hosts,
    /// Of pools that move: devices that hold nothing any more which is not at its new place (RFC 0006).
    pub emptied: BTreeMap<PoolId, BTreeSet<DeviceId>>,
    /// Devices that were removed: a node that was away then must not bring them back.
    pub removed_devices: BTreeSet<DeviceId>,
    /// Of volumes that have one (RFC 0007).
    pub addresses: BTreeMap<VolumeId, AddressRecord>,
    /// Devices that somebody has said are lost with all they held, and that are still named by tables or journal sets (RFC 0006, rule 7).
    /// They are out for good.
    pub lost_devices: BTreeSet<DeviceId>,
}

impl MetaState {
    /// A cluster without anything. Ids start at 1: 0 never names a thing.
    #[must_use]
    pub fn new(cluster: ClusterId, single_host: bool) -> Self {
        Self {
            cluster,
            single_host,
            epoch: Epoch(1),
            nodes: BTreeMap::new(),
            devices: BTreeMap::new(),
            pools: BTreeMap::new(),
            volumes: BTreeMap::new(),
            volume_names: BTreeMap::new(),
            next_node: NodeId(1),
            next_pool: PoolId(1),
            next_volume: VolumeId(1),
            hosts: Hosts::default(),
            emptied: BTreeMap::new(),
            removed_devices: BTreeSet::new(),
            addresses: BTreeMap::new(),
            lost_devices: BTreeSet::new(),
        }
    }

    /// A node that is not removed, by id.
    #[must_use]
    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(&id).filter(|node| node.state != NodeState::Removed)
    }

    /// A node that is not removed, by name.
    #[must_use]
    pub fn node_named(&self, name: &str) -> Option<&Node> {
        self.nodes.values().find(|node| node.state != NodeState::Removed && node.name.as_str() == name)
    }

    /// A pool by name.
    #[must_use]
    pub fn pool_named(&self, name: &str) -> Option<&Pool> {
        self.pools.values().find(|pool| pool.name.as_str() == name)
    }

    /// A volume that is not deleted, by id.
    #[must_use]
    pub fn volume(&self, id: VolumeId) -> Option<&Volume> {
        self.volumes.get(&id).filter(|volume| !volume.is_deleted())
    }

    /// A volume that is not deleted, by name.
    #[must_use]
    pub fn volume_named(&self, name: &str) -> Option<&Volume> {
        self.volume_names.get(name).and_then(|id| self.volumes.get(id))
    }

    /// Whether nothing will ever be had of a device again: it was lost, or removed.
    #[must_use]
    pub fn is_given_up(&self, device: DeviceId) -> bool {
        self.lost_devices.contains(&device) || self.removed_devices.contains(&device)
    }

    /// Devices of a node.
    pub fn devices_of(&self, node: NodeId) -> impl Iterator<Item = &DeviceRecord> {
        self.devices.values().filter(move |device| device.node == node)
    }

    /// Devices that hold shards of a pool which now belong elsewhere, and have not said that all of them are there.
    #[must_use]
    pub fn devices_to_empty(&self, pool: &Pool) -> BTreeSet<DeviceId> {
        let Some(next) = &pool.next else { return BTreeSet::new() };
        let emptied = self.emptied.get(&pool.id);
        let pairs = pool.table.positions.iter().flatten().zip(next.positions.iter().flatten());
        let left = pairs.filter(|(from, to)| from != to && to.is_some()).filter_map(|(from, _)| *from);
        left.filter(|device| emptied.is_none_or(|emptied| !emptied.contains(device))).collect()
    }

    /// The devices as placement sees them. Devices of nodes that join, drain or are removed are out.
    ///
    /// # Errors
    /// None that [`MetaState::apply`] lets happen; the checks of [`Topology::new`] are repeated.
    pub fn topology(&self) -> Result<Topology, PlacementError> {
        let text = |name: &Option<Name>| name.as_ref().map_or_else(String::new, |name| name.as_str().to_owned());
        let device = |device: &DeviceRecord| {
            let node = self.nodes.get(&device.node)?;
            Some(Device {
                id: device.id,
                node: device.node,
                host: node.host.as_str().to_owned(),
                rack: text(&node.rack),
                zone: text(&node.zone),
                weight: device.capacity,
                state: if node.state.takes_data() { device.state } else { DeviceState::Out },
            })
        };
        Topology::new(self.devices.values().filter_map(device).collect())
    }
}

/// Serialises what an `Arc` holds: tables are shared between versions of the state, not on disk.
mod shared {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::sync::Arc;

    pub fn serialize<T: Serialize, S: Serializer>(value: &Arc<T>, serializer: S) -> Result<S::Ok, S::Error> {
        value.as_ref().serialize(serializer)
    }

    pub fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(deserializer: D) -> Result<Arc<T>, D::Error> {
        T::deserialize(deserializer).map(Arc::new)
    }
}

/// As [`shared`], for what may be absent.
mod shared_option {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::sync::Arc;

    pub fn serialize<T: Serialize, S: Serializer>(value: &Option<Arc<T>>, serializer: S) -> Result<S::Ok, S::Error> {
        value.as_deref().serialize(serializer)
    }

    pub fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Arc<T>>, D::Error> {
        Ok(Option::<T>::deserialize(deserializer)?.map(Arc::new))
    }
}
