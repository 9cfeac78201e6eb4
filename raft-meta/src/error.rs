//! Why a command was refused, or not decided; why stored bytes were refused.

use crate::apply::BrokenRule;
use crate::state::NodeState;
use xsan_placement::PlacementError;
use xsan_types::{ClusterId, DeviceId, ErrorKind, NodeId, PoolId, RegisterError, VolumeId};

/// Why a command changed nothing, or nobody knows yet whether it did.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MetaError {
    /// The name is taken by another thing of the same kind.
    #[error("the name is taken")]
    NameTaken,
    /// No such node, or it is removed.
    #[error("no such node ({0})")]
    NoNode(NodeId),
    /// No such device.
    #[error("no such device ({0})")]
    NoDevice(DeviceId),
    /// No such pool.
    #[error("no such pool ({0})")]
    NoPool(PoolId),
    /// No such volume, or it is deleted.
    #[error("no such volume ({0})")]
    NoVolume(VolumeId),
    /// The device is known already.
    #[error("device {0} is known already")]
    DeviceKnown(DeviceId),
    /// The device was removed: its id is not taken back.
    #[error("device {0} was removed; wipe its disk to use it again")]
    DeviceRemoved(DeviceId),
    /// The device was given up as lost: what was concluded from that cannot be taken back.
    #[error("device {0} was given up as lost; wipe its disk and add it as a new one")]
    DeviceLost(DeviceId),
    /// Another node of the same host names another rack or zone.
    #[error("{0} stands on the same host and names another rack or zone")]
    HostElsewhere(NodeId),
    /// A node cannot go from one state to the other.
    #[error("a node cannot go from {from} to {to}")]
    Transition {
        /// Its state.
        from: NodeState,
        /// Asked for.
        to: NodeState,
    },
    /// A placement group still names a device of the node.
    #[error("device {0} still holds positions of placement groups; drain the node first")]
    DeviceInUse(DeviceId),
    /// The pool has volumes.
    #[error("the pool has volumes ({0} is one)")]
    PoolInUse(VolumeId),
    /// The pool is moving already (P11): finish or cancel that first.
    #[error("the pool is moving already")]
    Moving,
    /// The pool is not moving.
    #[error("the pool is not moving")]
    NotMoving,
    /// A volume size that is 0, no multiple of 4096 or beyond the bound.
    #[error("a volume's size is a multiple of 4096 from 4096 to {max}, not {0}", max = crate::state::VOLUME_BYTES_MAX)]
    VolumeBytes(u64),
    /// A device capacity of 0.
    #[error("a device needs capacity")]
    NoCapacity,
    /// An id space is used up.
    #[error("no more ids")]
    IdsExhausted,
    /// The placement refused.
    #[error(transparent)]
    Placement(#[from] PlacementError),
    /// The register refused.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// The encoded command is larger than the log takes.
    #[error("the command has {bytes} bytes, at most {max} are allowed", max = crate::format::COMMAND_BYTES_MAX)]
    TooLarge {
        /// Its encoded size.
        bytes: usize,
    },
    /// A text or key is longer than the metadata takes.
    #[error("a text is longer than {max} bytes", max = crate::hosts::TEXT_BYTES_MAX)]
    TextTooLong,
    /// The cluster has another authority.
    #[error("the cluster has a certificate authority already")]
    AuthorityKnown,
    /// No such token, or it was revoked, or its secret is another one.
    #[error("the cluster does not know the token, or it was revoked")]
    TokenUnknown,
    /// The token's time is over.
    #[error("the token has expired")]
    TokenExpired,
    /// The token has let in as many nodes as it may.
    #[error("the token was used as often as it may be")]
    TokenUsedUp,
    /// Another token has the number.
    #[error("another token has this number")]
    TokenKnown,
    /// Too many tokens that are still good.
    #[error("there are too many tokens: revoke some")]
    TooManyTokens,
    /// A node that is not down cannot be replaced.
    #[error("{0} is not down: it cannot be replaced")]
    NotDown(NodeId),
    /// No address that a host may have.
    #[error("no host may have this address")]
    AddressUnusable,
    /// The address is another volume's.
    #[error("the address is that of another volume ({0})")]
    AddressTaken(VolumeId),
    /// The metadata has changed since the command was decided.
    #[error("the metadata has changed meanwhile")]
    Outdated,
    /// The log did not confirm: the command may or may not take effect. Repeat it (registers: with the same token).
    #[error("the metadata log did not answer")]
    NoAnswer,
    /// The replica is shutting down; the command was not taken.
    #[error("the metadata service is closing")]
    Closed,
}

impl MetaError {
    /// What the caller can do.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NameTaken
            | Self::DeviceKnown(_)
            | Self::DeviceRemoved(_)
            | Self::DeviceLost(_)
            | Self::AuthorityKnown
            | Self::TokenKnown
            | Self::AddressTaken(_) => ErrorKind::Exists,
            Self::TokenUnknown | Self::TokenExpired | Self::TokenUsedUp => ErrorKind::Fenced,
            Self::NoNode(_) | Self::NoDevice(_) | Self::NoPool(_) | Self::NoVolume(_) => ErrorKind::NotFound,
            Self::HostElsewhere(_)
            | Self::Transition { .. }
            | Self::DeviceInUse(_)
            | Self::PoolInUse(_)
            | Self::Moving
            | Self::NotMoving
            | Self::VolumeBytes(_)
            | Self::NoCapacity
            | Self::TextTooLong
            | Self::TooManyTokens
            | Self::NotDown(_)
            | Self::AddressUnusable
            | Self::Outdated
            | Self::TooLarge { .. } => ErrorKind::Invalid,
            Self::IdsExhausted => ErrorKind::Internal,
            Self::Placement(error) => error.kind(),
            Self::Register(error) => error.kind(),
            Self::NoAnswer => ErrorKind::Unavailable,
            Self::Closed => ErrorKind::Closed,
        }
    }
}

/// Why stored metadata cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// There is no metadata here: no snapshot.
    #[error("no metadata here")]
    Absent,
    /// There is metadata here already.
    #[error("there is metadata here already")]
    Exists,
    /// The log is gone beside its snapshot: acknowledged commands may be lost.
    #[error("the log is missing beside its snapshot")]
    LogMissing,
    /// The snapshot is gone beside a log that was in use: acknowledged commands may be lost.
    #[error("{file} is missing beside its log; restore it, or remove this replica and let the node join again")]
    SnapshotMissing {
        /// Which file.
        file: &'static str,
    },
    /// Not a file of this kind.
    #[error("{file} is no metadata file (wrong magic)")]
    Magic {
        /// Which file.
        file: &'static str,
    },
    /// Written by a newer release.
    #[error("{file} has format version {found}; this release knows up to {newest}")]
    Version {
        /// Which file, or `command`.
        file: &'static str,
        /// Found.
        found: u16,
        /// Newest known.
        newest: u16,
    },
    /// Verification failed at a place that a crash cannot explain.
    #[error("{file} is damaged at byte {offset}")]
    Damaged {
        /// Which file.
        file: &'static str,
        /// Where.
        offset: u64,
    },
    /// The checksum holds but the content is not what the format says.
    #[error("the content of {file} at byte {offset} cannot be read")]
    Content {
        /// Which file.
        file: &'static str,
        /// Where.
        offset: u64,
    },
    /// Numbers of commands are missing between snapshot and log, or inside the log.
    #[error("the log goes on with command {found}, expected was {expected}")]
    Gap {
        /// Found.
        found: u64,
        /// Expected.
        expected: u64,
    },
    /// Log and snapshot are of different clusters.
    #[error("the log is of cluster {log}, the snapshot of {snapshot}")]
    Cluster {
        /// The log's.
        log: ClusterId,
        /// The snapshot's.
        snapshot: ClusterId,
    },
    /// The stored state breaks a rule that no command can break.
    #[error("the stored state breaks a rule: {0}")]
    Rule(#[from] BrokenRule),
    /// The file system refused.
    #[error("file system: {0}")]
    Io(#[from] std::io::Error),
}

impl FormatError {
    /// What the caller can do.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Absent => ErrorKind::NotFound,
            Self::Exists => ErrorKind::Exists,
            Self::Version { .. } | Self::Magic { .. } | Self::Cluster { .. } => ErrorKind::Invalid,
            Self::LogMissing
            | Self::SnapshotMissing { .. }
            | Self::Damaged { .. }
            | Self::Content { .. }
            | Self::Gap { .. }
            | Self::Rule(_) => ErrorKind::Corrupt,
            Self::Io(error) => xsan_env::error::kind(error),
        }
    }
}
