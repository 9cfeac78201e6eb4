//! Why a map was refused. Errors of calls are the store's own (`lsm_block::store::StoreError`).

use xsan_types::ErrorKind;

/// Why a map was refused; the pool goes on with the one it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// A pool without placement groups cannot hold segments.
    #[error("the map has no placement groups")]
    NoGroups,
    /// A group lists another number of positions than the scheme has shards.
    #[error("placement group {group} has {found} positions, the scheme has {expected}")]
    Width {
        /// Index of the group.
        group: usize,
        /// Positions listed.
        found: usize,
        /// k + m, or n.
        expected: usize,
    },
}

impl PoolError {
    /// What the caller can do.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::Invalid
    }
}
