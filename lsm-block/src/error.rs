//! What a volume's caller can be told.

use crate::index::IndexError;
use crate::segment::FooterError;
use crate::store::StoreError;
use xsan_types::{DeviceId, ErrorKind, Generation, RegisterError, SegmentName};

/// Why a request or an open failed.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VolumeError {
    /// Offset, length or size outside the rules.
    #[error("the request lies outside the volume or is not aligned to 512 bytes")]
    Invalid,
    /// No room left in the pool; nothing acknowledged was lost.
    #[error("no space left in the pool")]
    NoSpace,
    /// Waited for `io_timeout` while too few nodes answered.
    #[error("timed out waiting for nodes to return")]
    TimedOut,
    /// A newer owner has the volume: this one has stopped for ever.
    #[error("the volume has a newer owner (generation {0})")]
    Fenced(Generation),
    /// The volume is closed or closing.
    #[error("the volume is closed")]
    Closed,
    /// The layer below.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The index.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The register.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// A sealed segment's footer.
    #[error("segment {segment}: {error}")]
    Footer {
        /// Which.
        segment: SegmentName,
        /// What.
        error: FooterError,
    },
    /// A journal member told a take-over of a replica and does not give it: it went away or restarted meanwhile.
    #[error("device {device} does not give its replica of segment {segment}")]
    ReplicaGone {
        /// Which.
        device: DeviceId,
        /// Of what.
        segment: SegmentName,
    },
    /// Records that were acknowledged can be read from no journal member that answers.
    #[error("the log in segment {segment} is damaged at {offset} on every journal member that answers")]
    ReplicaDamaged {
        /// Which.
        segment: SegmentName,
        /// Where.
        offset: u64,
    },
    /// More members of the journal set are lost than the scheme tolerates.
    #[error("{lost} of {members} journal members are lost and none of the others is whole")]
    JournalLost {
        /// Lost members.
        lost: usize,
        /// All members.
        members: usize,
    },
}

impl VolumeError {
    /// What the caller can do.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Invalid => ErrorKind::Invalid,
            Self::NoSpace => ErrorKind::NoSpace,
            Self::TimedOut | Self::ReplicaGone { .. } => ErrorKind::Unavailable,
            Self::Fenced(_) => ErrorKind::Fenced,
            Self::Closed => ErrorKind::Closed,
            Self::Store(error) => error.kind(),
            Self::Index(error) => error.kind(),
            Self::Register(error) => error.kind(),
            Self::Footer { .. } | Self::JournalLost { .. } | Self::ReplicaDamaged { .. } => ErrorKind::Corrupt,
        }
    }
}
