//! Why a node cannot be opened.

use crate::shard_index::IndexError;
use std::io;
use xsan_types::{ClusterId, DeviceId, ErrorKind};

/// Why a device was refused or could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NodeOpenError {
    /// No superblock: the device was never formatted.
    #[error("the device is not an XSAN device (no superblock); format it, or name the right one")]
    NotFormatted,
    /// Both superblocks are damaged.
    #[error("both superblocks of the device are damaged; nothing was changed: see `xsan debug device`")]
    SuperblockDamaged,
    /// A newer release wrote it.
    #[error("device {device}: format version {version} is newer than this program; use the newer release")]
    Version {
        /// Which, as far as it is known.
        device: DeviceId,
        /// Found.
        version: u16,
    },
    /// It belongs to another cluster.
    #[error("device {device} belongs to cluster {found}, not to {expected}; nothing was changed")]
    OtherCluster {
        /// Which.
        device: DeviceId,
        /// Its cluster.
        found: ClusterId,
        /// This cluster.
        expected: ClusterId,
    },
    /// Another disk of this node says that it is the same device: one of them is a copy.
    #[error("device {0} is open already, on another disk: one of the two is a copy; wipe it, or take it out")]
    AlreadyOpen(DeviceId),
    /// The log is damaged before records that were flushed later.
    #[error("the log of device {device} is damaged at byte {offset}; nothing was changed: see `xsan debug device`")]
    LogDamaged {
        /// Which.
        device: DeviceId,
        /// Where.
        offset: u64,
    },
    /// Two tenants claim one place: the shard index is damaged.
    #[error("device {device}: two tenants claim byte {offset}; nothing was changed: see `xsan debug device`")]
    Overlap {
        /// Which.
        device: DeviceId,
        /// Where.
        offset: u64,
    },
    /// Too small.
    #[error("a device needs at least {min} bytes, this one has {bytes}")]
    TooSmall {
        /// Its size.
        bytes: u64,
        /// The least.
        min: u64,
    },
    /// Formatted already.
    #[error("the device holds data of XSAN already ({0}); nothing was changed")]
    Formatted(DeviceId),
    /// The shard index.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The disk.
    #[error("device {device}: {source}")]
    Io {
        /// Which, as far as it is known.
        device: DeviceId,
        /// Its answer.
        source: io::Error,
    },
}

impl NodeOpenError {
    /// Whether a shard index made anew from the device would help.
    #[must_use]
    pub fn blames_index(&self) -> bool {
        matches!(self, Self::Index(IndexError::Engine(_) | IndexError::Damaged) | Self::Overlap { .. })
    }

    /// What the caller can do.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFormatted => ErrorKind::NotFound,
            Self::Formatted(_) => ErrorKind::Exists,
            Self::Version { .. } | Self::OtherCluster { .. } | Self::TooSmall { .. } => ErrorKind::Invalid,
            Self::SuperblockDamaged | Self::LogDamaged { .. } | Self::Overlap { .. } => ErrorKind::Corrupt,
            Self::AlreadyOpen(_) => ErrorKind::Exists,
            Self::Index(_) | Self::Io { .. } => ErrorKind::Unavailable,
        }
    }
}
