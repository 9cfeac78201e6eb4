//! Requests and answers of the admin API. Field names are stable: scripts read them.

use crate::cluster::facts::{MetadataRole, UnopenedDisk};
use serde::{Deserialize, Serialize};
use xsan_types::Scheme;

/// An error as the API tells it. `kind` is the name of an `ErrorKind` in lower case (docs/errors.md).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiError {
    /// What a program can decide on.
    pub kind: String,
    /// What is wrong, for people.
    pub message: String,
    /// What to do about it, for people.
    pub next_step: Option<String>,
}

/// The cluster's state, computed when asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// `ok`, `degraded` (served, with less redundancy than wanted) or `stalled` (some I/O waits).
    pub health: String,
    /// Why it is not `ok`, one sentence each.
    pub reasons: Vec<String>,
    /// The same with a code and advice.
    pub problems: Vec<Problem>,
    /// Identity of the cluster.
    pub cluster: String,
    /// All nodes are on one host.
    pub single_host: bool,
    /// Version of the cluster map.
    pub epoch: u64,
    /// `uring` or `threads`.
    pub io_backend: String,
    /// Version of this program.
    pub version: String,
    /// NBD addresses; a volume's URI is one of these with its name.
    pub nbd: Vec<String>,
    /// Nodes.
    pub nodes: Vec<NodeStatus>,
    /// Pools.
    pub pools: Vec<PoolStatus>,
    /// Volumes.
    pub volumes: Vec<VolumeInfo>,
    /// Pools whose data moves.
    #[serde(default)]
    pub moves: Vec<MoveStatus>,
    /// Sums over the process.
    pub counters: ProcessCounters,
}

/// Data on its way from one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveStatus {
    /// The pool.
    pub pool: String,
    /// The device that is left.
    pub device: String,
    /// Its node.
    pub node: String,
    /// Bytes that are at their new places.
    pub done_bytes: u64,
    /// All of them; 0 while it is not known.
    pub total_bytes: u64,
    /// Bytes a second since it began.
    pub rate: u64,
    /// Seconds until it is done at that rate.
    pub eta_seconds: Option<u64>,
    /// Why it does not go on.
    pub waits_for: Option<String>,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What kind, for programs: `NODE_DOWN`, `NODE_SILENT`, `NODE_JOINING`, `DEVICE_MISSING`, `DEVICE_FAILED`, `DEVICE_FULL`, `JOURNAL_SHORT`,
    /// `POSITIONS_MISSING`, `POSITIONS_UNCHECKED`, `MOVE_WAITS`, `POOL_STALLED`, `VOLUME_WAITS`, `METADATA_SILENT`, `ADDRESS_FAULT`.
    pub code: String,
    /// `warning` (served, with less redundancy or soon not) or `error` (some I/O waits or fails).
    pub severity: String,
    /// What it is about.
    pub subject: String,
    /// For people.
    pub message: String,
    /// What to do, for people.
    pub advice: String,
}

/// A node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its name.
    pub name: String,
    /// Its number.
    pub id: u32,
    /// `joining`, `up`, `suspect`, `down` or `draining`.
    pub state: String,
    /// Since when it is so, milliseconds since 1970.
    pub since_millis: u64,
    /// Why it is so.
    pub reason: String,
    /// It answered just now.
    pub answers: bool,
    /// The machine it runs on.
    pub host: String,
    /// Where other nodes reach it; empty for nodes that share a process.
    pub address: String,
    /// `leader`, `voter` or `learner` of the metadata; null: it holds no replica, or all nodes share a process.
    pub metadata: Option<MetadataRole>,
    /// Its devices.
    pub devices: Vec<DeviceInfo>,
    /// The first of its devices.
    pub device: String,
    /// Bytes for shards and replicas (0 while it is down).
    pub capacity: u64,
    /// Of them allocated.
    pub used: u64,
    /// Shards on it.
    pub shards: u64,
    /// Journal members on it.
    pub members: u64,
    /// Its device takes no more writes.
    pub failed: bool,
    /// Disks of its settings that it cannot open.
    #[serde(default)]
    pub unopened: Vec<UnopenedDisk>,
}

/// A device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// Its identity.
    pub id: String,
    /// Bytes for shards and replicas (of a node that does not answer: as it was known last).
    pub capacity: u64,
    /// Of them allocated (0 if its node does not answer).
    pub used: u64,
    /// It takes no more writes.
    pub failed: bool,
    /// Its node answers and does not serve it: its disk cannot be opened.
    #[serde(default)]
    pub missing: bool,
    /// `in`, `leaving` (out, and data is still to be moved away) or `empty` (out, and nothing of it is needed).
    #[serde(default)]
    pub state: String,
}

/// A pool.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PoolStatus {
    /// Its name.
    pub name: String,
    /// Redundancy.
    pub scheme: Scheme,
    /// Placement groups.
    pub placement_groups: usize,
    /// Nodes that may be lost when all is well.
    pub tolerates: usize,
    /// Positions of its placement groups whose node is down.
    pub positions_down: usize,
    /// All positions.
    pub positions: usize,
    /// Volumes in it.
    pub volumes: usize,
}

/// A volume.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VolumeInfo {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub id: u64,
    /// Its pool.
    pub pool: String,
    /// Bytes.
    pub size: u64,
    /// `replicated` or `persisted`.
    pub ack: String,
    /// `idle` (no client yet), `serving`, `waiting` or `closed`.
    pub state: String,
    /// Why it waits.
    pub reason: Option<String>,
    /// The node that serves it.
    pub node: Option<String>,
    /// Its NBD clients.
    pub clients: usize,
    /// Ownership.
    pub generation: u64,
    /// URI on the unix socket.
    pub uri: String,
    /// Where it is reached on the network, whichever node serves it.
    #[serde(default)]
    pub address: Option<AddressInfo>,
    /// The engine, if it serves.
    pub engine: Option<EngineStatus>,
}

/// A volume's service address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressInfo {
    /// `ADDRESS/PREFIX`.
    pub address: String,
    /// The interface that was asked for.
    pub interface: Option<String>,
    /// The node that has it now.
    pub node: Option<String>,
    /// Its URI there.
    pub uri: String,
    /// Why no node has it, or what does not work.
    pub fault: Option<String>,
    /// Clients there, as noted for whoever serves it next.
    pub clients: Vec<String>,
}

/// A served volume's engine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EngineStatus {
    /// Journal members.
    pub members: usize,
    /// Journal members when all is well.
    pub members_wanted: usize,
    /// Sealed segments.
    pub segments: usize,
    /// Of them with missing positions, being filled as nodes return.
    pub segments_with_holes: usize,
    /// Nodes have changed, and what they hold is being compared with what they should hold.
    #[serde(default)]
    pub unchecked: bool,
    /// Version of the newest map under which every shard was looked for.
    #[serde(default)]
    pub checked_epoch: u64,
    /// Segments open or being sealed.
    pub open_segments: usize,
    /// Memory of unregistered index entries.
    pub delta_bytes: usize,
    /// Guest reads.
    pub reads: u64,
    /// Guest bytes read.
    pub read_bytes: u64,
    /// Guest writes.
    pub writes: u64,
    /// Guest bytes written.
    pub write_bytes: u64,
    /// Guest flushes.
    pub flushes: u64,
    /// Batches appended.
    pub batches: u64,
    /// Journal bytes per member.
    pub journal_bytes: u64,
    /// Bytes written by rows, before parity.
    pub row_bytes: u64,
    /// Blocks read to merge sub-block writes.
    pub merge_reads: u64,
    /// Segments sealed.
    pub seals: u64,
    /// Checkpoints registered.
    pub checkpoints: u64,
    /// Journal set changes.
    pub set_changes: u64,
    /// Segments freed.
    pub freed_segments: u64,
}

/// Sums over the process.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct ProcessCounters {
    /// Guest bytes read since the start.
    pub guest_read_bytes: u64,
    /// Guest bytes written since the start.
    pub guest_write_bytes: u64,
    /// Bytes read from devices.
    pub device_read_bytes: u64,
    /// Reads from devices.
    pub device_reads: u64,
    /// Bytes written to devices.
    pub device_write_bytes: u64,
    /// Writes to devices.
    pub device_writes: u64,
    /// Device flushes.
    pub device_flushes: u64,
    /// Wrong bytes found by checksums (and repaired or read elsewhere).
    pub corrupt_found: u64,
}

/// Makes a pool.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CreatePool {
    /// Its name; `None`: one is derived from the scheme.
    pub name: Option<String>,
    /// Redundancy.
    pub scheme: Scheme,
}

/// Makes a volume.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CreateVolume {
    /// Its name.
    pub name: String,
    /// Bytes; rounded up to 4096.
    pub size: u64,
    /// Its pool; `None`: the only or the default one.
    pub pool: Option<String>,
    /// `replicated` or `persisted`; `None`: the pool's.
    pub ack: Option<String>,
    /// Its service address.
    #[serde(default)]
    pub address: Option<SetAddress>,
}

/// Gives a volume a service address, or none.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SetAddress {
    /// `ADDRESS/PREFIX`; `None`: none any more.
    pub address: Option<String>,
    /// The interface it is put on, of that name on every host; `None`: the one in its subnet.
    #[serde(default)]
    pub interface: Option<String>,
}

/// Changes a volume.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ChangeVolume {
    /// A new size in bytes.
    pub size: Option<u64>,
    /// Lets a size shrink (data beyond it is discarded).
    #[serde(default)]
    pub shrink: bool,
    /// A new name.
    pub name: Option<String>,
}

/// How a volume is deleted.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct DeleteVolume {
    /// Cut clients off.
    #[serde(default)]
    pub force: bool,
}

/// Makes a token that lets hosts in.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct CreateToken {
    /// How long it is good.
    pub seconds: u64,
    /// How many hosts it lets in.
    pub uses: u32,
}

/// A token that lets hosts in; a secret.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JoinToken {
    /// Its text.
    pub token: String,
}

/// Gives a node another name.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RenameNode {
    /// The new one.
    pub name: String,
}

/// Empties a node.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct DrainNode {
    /// Takes it back in.
    #[serde(default)]
    pub cancel: bool,
}

/// Makes a disk of the host that is asked a device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AddDevice {
    /// Its path there.
    pub path: std::path::PathBuf,
    /// A device whose data it takes over.
    #[serde(default)]
    pub replaces: Option<String>,
}

/// A device that was added.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AddedDevice {
    /// Its identity.
    pub device: String,
}

/// How a device is removed.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct RemoveDevice {
    /// It is missing and will not return: what it held is to be rebuilt from others, and nobody waits for it any more. Cannot be
    /// taken back.
    #[serde(default)]
    pub lost: bool,
}

/// What became of a device that is to be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RemovedDevice {
    /// Its data moves away first: ask again when it has.
    Leaving,
    /// It is forgotten.
    Removed,
}

/// How a node is stopped.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct StopNode {
    /// As a crash of its process.
    #[serde(default)]
    pub crash: bool,
}

/// An empty answer.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Done {}
