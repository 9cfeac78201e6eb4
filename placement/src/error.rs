//! Why a placement was refused.

use crate::topology::FailureDomain;
use xsan_types::{DeviceId, ErrorKind, NodeId};

/// Why a topology, a shape or a table was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlacementError {
    /// Fewer failure domains with room than positions.
    #[error("{found} failure domains ({domain}) have devices, {needed} are needed")]
    TooFewDomains {
        /// The level at which domains are counted.
        domain: FailureDomain,
        /// Domains that have at least one device which may hold data.
        found: usize,
        /// Domains needed.
        needed: usize,
    },
    /// A device is listed twice.
    #[error("device {device} is listed twice")]
    DuplicateDevice {
        /// Which.
        device: DeviceId,
    },
    /// The devices of one node name different hosts, racks or zones.
    #[error("the devices of {node} disagree about where the node stands")]
    SplitNode {
        /// Which.
        node: NodeId,
    },
    /// The nodes of one host name different racks or zones.
    #[error("the nodes of one host disagree about where the host stands (device {device})")]
    SplitHost {
        /// The first device that disagrees with those before it.
        device: DeviceId,
    },
    /// A width outside 1..=64.
    #[error("a placement group has 1 to 64 positions, not {width}")]
    Width {
        /// Asked for.
        width: usize,
    },
    /// A number of groups outside 1..=2^20.
    #[error("a pool has 1 to {max} placement groups, not {count}", max = crate::table::PG_COUNT_MAX)]
    PgCount {
        /// Asked for.
        count: u32,
    },
    /// The previous table is of another pool or width, or has more groups: segment names carry the group, it cannot vanish.
    #[error("the previous table is of another shape")]
    PreviousShape,
    /// A stored table whose parts do not fit each other.
    #[error("the stored table does not fit together")]
    Table,
}

impl PlacementError {
    /// What the caller can do.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::TooFewDomains { .. } => ErrorKind::Unavailable,
            Self::Table => ErrorKind::Corrupt,
            _ => ErrorKind::Invalid,
        }
    }
}
