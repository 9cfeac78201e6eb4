//! What is known of a cluster when somebody asks: gathered from the parts, nothing remembered.

use super::addresses::AddressReport;
use super::carry::CarryReport;
use crate::admin::api::{EngineStatus, ProcessCounters};
use lsm_block::{Health, VolumeStatus};
use raft_meta::MetaState;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use xsan_node::Node;
use xsan_types::{DeviceId, NodeId, VolumeId};
use xsan_wire::node::{DeviceStatus, NodeApi};

/// A whole cluster.
pub struct Facts {
    /// The metadata.
    pub view: Arc<MetaState>,
    /// The metadata answers; else `view` may be old.
    pub metadata_answers: bool,
    /// Every node that is not removed, in order.
    pub nodes: Vec<NodeFacts>,
    /// What the process tells that is no node's: the volumes of a process whose nodes are all stopped.
    pub unplaced: Option<NodeReport>,
    /// `uring` or `threads`, of the process that was asked.
    pub io_backend: &'static str,
    /// The directory with the NBD socket of the process that was asked.
    pub dir: std::path::PathBuf,
}

/// A node.
pub struct NodeFacts {
    /// Which.
    pub id: NodeId,
    /// Its state as the metadata has it.
    pub state: raft_meta::NodeState,
    /// Since when, milliseconds since 1970.
    pub since_millis: u64,
    /// Why.
    pub reason: String,
    /// Where it listens; empty inside one process.
    pub address: String,
    /// Its part in the metadata; `None`: it holds no replica, or all nodes share a process.
    pub metadata: Option<MetadataRole>,
    /// What it says of itself; `None`: it did not answer.
    pub report: Option<NodeReport>,
}

/// What a node's replica of the metadata is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MetadataRole {
    /// Decides what comes next.
    Leader,
    /// A majority of these decides.
    Voter,
    /// Follows, and takes the place of a voter that is lost.
    Learner,
}

impl MetadataRole {
    /// Of `node`'s replica, as one replica sees the group.
    #[must_use]
    pub fn of(node: NodeId, group: &raft_meta::raft::Status) -> Option<Self> {
        let (&replica, _) = group.members.iter().find(|(_, member)| member.node == node)?;
        Some(if group.leader == Some(replica) {
            Self::Leader
        } else if group.configuration.voters.contains(&replica) {
            Self::Voter
        } else {
            Self::Learner
        })
    }
}

impl std::fmt::Display for MetadataRole {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            Self::Leader => "leader",
            Self::Voter => "voter",
            Self::Learner => "learner",
        })
    }
}

/// What a process says of itself. Travels between nodes as JSON: fields are added, never changed.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct NodeReport {
    /// Its devices.
    pub devices: Vec<DeviceReport>,
    /// Volumes that it serves.
    pub volumes: BTreeMap<VolumeId, VolumeReport>,
    /// What it did.
    pub counters: ProcessCounters,
    /// What its devices carry elsewhere.
    #[serde(default)]
    pub carries: Vec<CarryReport>,
    /// Service addresses, of volumes that it serves or was asked to serve.
    #[serde(default)]
    pub addresses: BTreeMap<VolumeId, AddressReport>,
    /// Disks that it should serve and cannot.
    #[serde(default)]
    pub unopened: Vec<UnopenedDisk>,
}

/// A disk of a node's settings that is not served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnopenedDisk {
    /// Where it should be.
    pub path: std::path::PathBuf,
    /// Why it is not served.
    pub why: String,
}

/// A device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeviceReport {
    /// Which.
    pub id: DeviceId,
    /// Bytes for shards and replicas.
    pub capacity: u64,
    /// Of them allocated.
    pub used: u64,
    /// Shards on it.
    pub shards: u64,
    /// Journal members on it.
    pub members: u64,
    /// It takes no more writes.
    pub failed: bool,
}

/// A served volume.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VolumeReport {
    /// `serving`, `waiting` or `closed`.
    pub state: String,
    /// Why it waits.
    pub reason: Option<String>,
    /// Bytes.
    pub size: u64,
    /// NBD clients.
    pub clients: usize,
    /// The engine.
    pub engine: EngineStatus,
}

impl Facts {
    /// Whether a device's node answers, and does not serve it.
    #[must_use]
    pub fn is_missing(&self, device: DeviceId) -> bool {
        let Some(record) = self.view.devices.get(&device) else { return false };
        let report = self.nodes.iter().find(|node| node.id == record.node).and_then(|node| node.report.as_ref());
        report.is_some_and(|report| !report.devices.iter().any(|served| served.id == device))
    }

    /// All reports that came.
    pub fn reports(&self) -> impl Iterator<Item = &NodeReport> {
        self.nodes.iter().filter_map(|node| node.report.as_ref()).chain(&self.unplaced)
    }

    /// A served volume; of two that both believe to serve it, the one that does not wait.
    #[must_use]
    pub fn volume(&self, id: VolumeId) -> Option<&VolumeReport> {
        let told = self.reports().filter_map(|report| report.volumes.get(&id));
        told.min_by_key(|volume| volume.state != "serving")
    }
}

impl NodeReport {
    /// What a storage node says; empty if it does not answer.
    pub async fn of_storage(node: &Node) -> Self {
        let devices = node.devices().await.unwrap_or_default();
        let counters = node.counters();
        Self {
            devices: devices.iter().map(device_report).collect(),
            volumes: BTreeMap::new(),
            carries: Vec::new(),
            addresses: BTreeMap::new(),
            unopened: Vec::new(),
            counters: ProcessCounters {
                device_read_bytes: counters.device_read_bytes,
                device_reads: counters.device_reads,
                device_write_bytes: counters.device_write_bytes,
                device_writes: counters.device_writes,
                device_flushes: counters.device_flushes,
                corrupt_found: counters.corrupt_found,
                ..ProcessCounters::default()
            },
        }
    }

    /// Adds the volumes of the process; `clients` counts those of a volume.
    pub fn add_volumes(&mut self, statuses: &BTreeMap<VolumeId, VolumeStatus>, clients: impl Fn(VolumeId) -> usize) {
        for (&id, status) in statuses {
            self.counters.guest_read_bytes += status.counters.read_bytes;
            self.counters.guest_write_bytes += status.counters.write_bytes;
            self.volumes.insert(id, volume_report(status, clients(id)));
        }
    }
}

fn device_report(status: &DeviceStatus) -> DeviceReport {
    let &DeviceStatus { device, capacity, used, shards, members, failed, .. } = status;
    DeviceReport { id: device, capacity, used, shards, members, failed }
}

fn volume_report(status: &VolumeStatus, clients: usize) -> VolumeReport {
    let (state, reason) = match &status.health {
        Health::Serving => ("serving", None),
        Health::Waiting { reason, .. } => ("waiting", Some(reason.clone())),
        Health::Fenced(_) | Health::Closed => ("closed", None),
    };
    VolumeReport { state: state.into(), reason, size: status.size, clients, engine: engine_status(status) }
}

fn engine_status(status: &VolumeStatus) -> EngineStatus {
    let counters = status.counters;
    EngineStatus {
        members: status.members.len(),
        members_wanted: status.members_wanted,
        segments: status.segments,
        segments_with_holes: status.segments_with_holes,
        unchecked: status.unchecked,
        checked_epoch: status.checked_epoch.0,
        open_segments: status.open_segments,
        delta_bytes: status.delta_bytes,
        reads: counters.reads,
        read_bytes: counters.read_bytes,
        writes: counters.writes,
        write_bytes: counters.write_bytes,
        flushes: counters.flushes,
        batches: counters.batches,
        journal_bytes: counters.journal_bytes,
        row_bytes: counters.row_bytes,
        merge_reads: counters.merge_reads,
        seals: counters.seals,
        checkpoints: counters.checkpoints,
        set_changes: counters.set_changes,
        freed_segments: counters.freed_segments,
    }
}
