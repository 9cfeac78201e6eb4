//! The volume register: one small record per volume in raft-meta, changed by conditional writes only (P2).
//!
//! The types live here because both sides speak them: `lsm-block` (the owner) asks for changes, `raft-meta` decides
//! them. The rules of each change stand beside [`RegisterChange`].

use crate::{Crc32c, DeviceId, ErrorKind, Generation, Incarnation, SegmentName, SetId};
use serde::{Deserialize, Serialize};

/// Whether a volume still exists. A deleted volume's register stays for ever as a tombstone: absence frees nothing (P2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeState {
    /// In use.
    Open,
    /// Retired; nodes free what they hold of it by volume id.
    Deleted,
}

/// One member of a journal set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetMember {
    /// Where the open replicas lie.
    pub device: DeviceId,
    /// The storage role's process that created the member; another one is never live for this set (P3).
    pub incarnation: Incarnation,
}

/// The f+1 members that hold a volume's open segments (P3).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalSet {
    /// The set's identity.
    pub id: SetId,
    /// Its members, in different failure domains.
    pub members: Vec<SetMember>,
}

/// A registered checkpoint: where its root lies and what it decides (P7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointRef {
    /// The sealed index segment that holds the root.
    pub segment: SegmentName,
    /// Bytes of that segment.
    pub segment_bytes: u64,
    /// Where the root starts in it.
    pub root_offset: u64,
    /// Bytes of the root.
    pub root_bytes: u32,
    /// CRC-32C of the root.
    pub root_crc: Crc32c,
    /// Every name with a smaller number is decided by this checkpoint, except the open ones it lists.
    pub border: u64,
}

/// The record. `version` grows by one at every change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Register {
    /// Grows by one at every change; conditional writes name it.
    pub version: u64,
    /// Current ownership; 0 before the first take.
    pub generation: Generation,
    /// Whether the volume exists.
    pub state: VolumeState,
    /// Size in bytes, a multiple of 4096.
    pub size: u64,
    /// The members whose word counts; `None` before the first owner and after a clean hand-over: nobody serves under it.
    pub set: Option<JournalSet>,
    /// `None` until the first checkpoint: the volume is all zeroes then.
    pub checkpoint: Option<CheckpointRef>,
    /// Checkpoints held by snapshots and clones.
    pub pins: Vec<CheckpointRef>,
}

/// What an owner may ask of a register. Every one but `Take` and `Retire` is refused unless the writer's generation *and*
/// version are the register's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RegisterChange {
    /// generation + 1, by anybody whom policy allows; the answer holds set and checkpoint. Refused on a deleted volume.
    Take,
    /// Replaces the journal set (P5), or registers `None` at a clean hand-over.
    Set(Option<JournalSet>),
    /// Registers a checkpoint (P7).
    Checkpoint(CheckpointRef),
    /// Checkpoint and set together: the only commit point of a recovery (P10).
    Commit {
        /// The new owner's (empty) set.
        set: JournalSet,
        /// What recovery found; `None` only if the volume never had a checkpoint and nothing was found.
        checkpoint: Option<CheckpointRef>,
    },
    /// A new size in bytes, a multiple of 4096.
    Resize(u64),
    /// generation + 1, state deleted; refused while pins exist.
    Retire,
}

/// The number a writer gives a change so that a repeat of the very same change gets the first answer again (C18): drawn at random, 128 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ChangeToken(pub u128);

/// Why a change was refused, or not decided.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum RegisterError {
    /// A newer generation owns the volume: the writer stops for ever (R3).
    #[error("a newer owner has the volume (generation {current}, this writer has {writer})")]
    NewerOwner {
        /// Generation in the register.
        current: Generation,
        /// Generation of the writer.
        writer: Generation,
    },
    /// The writer's version is not the register's, under its own generation: a bug of the writer or a lost answer.
    #[error("the register is at version {current}, the writer knows {writer}")]
    Version {
        /// Version in the register.
        current: u64,
        /// Version the writer named.
        writer: u64,
    },
    /// No such volume, or it is deleted.
    #[error("no such volume")]
    NotFound,
    /// Pins or clones hold the volume.
    #[error("the volume has snapshots or clones")]
    Pinned,
    /// The change itself is not allowed (size of 0, set id not newer, checkpoint of another volume …).
    #[error("the change breaks a rule of the register")]
    Invalid,
    /// No answer: repeat the same change with the same token; neither outcome may be relied on.
    #[error("the metadata service did not answer")]
    NoAnswer,
}

impl RegisterError {
    /// What the caller does.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NewerOwner { .. } => ErrorKind::Fenced,
            Self::NotFound => ErrorKind::NotFound,
            Self::Version { .. } => ErrorKind::Internal,
            Self::Pinned | Self::Invalid => ErrorKind::Invalid,
            Self::NoAnswer => ErrorKind::Unavailable,
        }
    }
}
