//! What can be asked of the metadata. Stored in the log: see docs/format/meta.md before touching a variant.

use crate::addresses::AddressCommand;
use crate::hosts::{Authority, Candidacy, TokenRecord};
use crate::name::Name;
use crate::state::{AckPolicy, NodeState};
use serde::{Deserialize, Serialize};
use xsan_placement::{DeviceState, FailureDomain};
use xsan_types::{
    ChangeToken, DeviceId, Epoch, Generation, NodeId, PoolId, Register, RegisterChange, Scheme, SegmentName, VolumeId,
};

/// A command. Version 1 of the envelope holds exactly this enum in postcard: variants are numbered in order and their fields
/// are positional, so new variants go to the end and a changed field makes a new version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Makes a node known (state joining). Answer: [`Outcome::Node`].
    AddNode {
        /// Its name.
        name: Name,
        /// The machine it runs on.
        host: Name,
        /// The machine's rack.
        rack: Option<Name>,
        /// The rack's zone.
        zone: Option<Name>,
    },
    /// Makes a device known (state in).
    AddDevice {
        /// From its superblock.
        device: DeviceId,
        /// The node that serves it.
        node: NodeId,
        /// Bytes it can hold.
        capacity: u64,
    },
    /// A node changes its state. Removal needs that no placement group names its devices.
    SetNodeState {
        /// Which.
        node: NodeId,
        /// Its new state.
        state: NodeState,
    },
    /// A device is taken out of placement or back in.
    SetDeviceState {
        /// Which.
        device: DeviceId,
        /// Its new state.
        state: DeviceState,
    },
    /// Makes a pool and places its groups. Answer: [`Outcome::Pool`].
    CreatePool {
        /// Its name.
        name: Name,
        /// Redundancy.
        scheme: Scheme,
        /// What fails together; default: node in a cluster on one host, else host. On several hosts `node` means host, because
        /// nodes of one host fail together.
        failure_domain: Option<FailureDomain>,
        /// Number of placement groups; default: about 100 positions a device.
        pg_count: Option<u32>,
        /// Acknowledgement of new volumes.
        ack: AckPolicy,
    },
    /// Removes a pool that has no volumes.
    DeletePool {
        /// Which.
        pool: PoolId,
    },
    /// Plans where the pool's data goes under the nodes and devices as they are now (P11). No change: no move.
    PlanMove {
        /// Which.
        pool: PoolId,
        /// Leave holes if there are fewer failure domains than positions (at least k).
        holes_allowed: bool,
    },
    /// The planned table is the table at once, whatever has been carried. Moves end by `PlaceEmptied`.
    FinishMove {
        /// Which.
        pool: PoolId,
    },
    /// The planned table is forgotten at once: only before anybody has written by it.
    CancelMove {
        /// Which.
        pool: PoolId,
    },
    /// Makes a volume. Answer: [`Outcome::Volume`].
    CreateVolume {
        /// Its name.
        name: Name,
        /// Its pool.
        pool: PoolId,
        /// Bytes, a multiple of 4096.
        size: u64,
        /// Default: the pool's.
        ack: Option<AckPolicy>,
    },
    /// Gives a volume another name; nothing else changes (P2).
    RenameVolume {
        /// Which.
        volume: VolumeId,
        /// Its new name.
        name: Name,
    },
    /// Changes when a volume's writes are acknowledged; its owner sees it at its next start.
    SetVolumePolicy {
        /// Which.
        volume: VolumeId,
        /// The new policy.
        ack: AckPolicy,
    },
    /// A change of a volume's register, conditional as P2 says. Answer: [`Outcome::Register`].
    ChangeRegister {
        /// Which.
        volume: VolumeId,
        /// The writer's generation.
        generation: Generation,
        /// The version it knows.
        version: u64,
        /// Drawn at random by the writer, once per change: a repeat carries the same.
        token: ChangeToken,
        /// What.
        change: RegisterChange,
    },
    /// Pins the registered checkpoint: a snapshot. Conditional. Answer: [`Outcome::Register`].
    PinCheckpoint {
        /// Which.
        volume: VolumeId,
        /// The writer's generation.
        generation: Generation,
        /// The version it knows.
        version: u64,
        /// As in `ChangeRegister`.
        token: ChangeToken,
    },
    /// Lets a pinned checkpoint go. Conditional. Answer: [`Outcome::Register`].
    UnpinCheckpoint {
        /// Which.
        volume: VolumeId,
        /// The writer's generation.
        generation: Generation,
        /// The version it knows.
        version: u64,
        /// As in `ChangeRegister`.
        token: ChangeToken,
        /// Segment of the pinned root.
        segment: SegmentName,
    },
    /// The cluster's certificate authority; once.
    SetAuthority(Authority),
    /// Makes a join token. Its secret never comes here.
    AddToken {
        /// Drawn at random by whoever makes it.
        number: u64,
        /// What is kept of it.
        token: TokenRecord,
        /// The wall clock of whoever makes it: expired tokens are forgotten.
        now_millis: u64,
    },
    /// A token lets nobody in any more.
    RevokeToken {
        /// Which.
        number: u64,
    },
    /// A host joins (state joining). The same request again changes nothing. Answer: [`Outcome::Node`].
    AdmitNode(Candidacy),
    /// A node listens elsewhere.
    SetNodeAddress {
        /// Which.
        node: NodeId,
        /// `host:port`.
        address: String,
    },
    /// Gives a node another name.
    RenameNode {
        /// Which.
        node: NodeId,
        /// Its new name.
        name: Name,
    },
    /// A node was seen to be in another state than the metadata says.
    ReportNode {
        /// Which.
        node: NodeId,
        /// The term of the leader that saw it: refused in the log of a later one, which sees for itself.
        term: u64,
        /// What the metadata said then: refused if it says something else by now.
        from: NodeState,
        /// What was seen.
        to: NodeState,
        /// When, milliseconds since 1970.
        now_millis: u64,
        /// Why, for people.
        reason: String,
    },
    /// A node took a volume over, or let it go. Refused if a newer generation was noted.
    VolumeServed {
        /// Which.
        volume: VolumeId,
        /// The ownership.
        generation: Generation,
        /// Who; `None`: nobody any more.
        node: Option<NodeId>,
    },
    /// All that a device held of positions that leave it is at their new places. When that is so for all of them the planned
    /// table is the table (RFC 0006).
    PlaceEmptied {
        /// The pool that moves.
        pool: PoolId,
        /// The `map_epoch` of the pool under which it was seen: refused under another one.
        map_epoch: Epoch,
        /// Which.
        device: DeviceId,
    },
    /// Forgets a device that no table names.
    RemoveDevice {
        /// Which.
        device: DeviceId,
    },
    /// Service addresses (RFC 0007).
    ServiceAddress(AddressCommand),
    /// A device is lost with all it held: it is out for good, and nobody waits for it any more.
    LoseDevice {
        /// Which.
        device: DeviceId,
    },
}

/// What a command that was not refused has done.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// It is done; there is nothing to tell.
    Done,
    /// A new node.
    Node(NodeId),
    /// A new pool.
    Pool(PoolId),
    /// A new volume.
    Volume(VolumeId),
    /// The register after the change.
    Register(Register),
}
