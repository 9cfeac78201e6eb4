//! Newtypes for every identifier and for the numbers that order things.
//!
//! `Display` prints the form used in logs, file names and the command line; `FromStr`, where it exists, reads it back.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty), $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl $name {
            /// The next number.
            ///
            /// # Panics
            /// When the number space is exhausted: numbers never wrap (P1), and 2^64 of them cannot be used up.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0.checked_add(1).expect("number space exhausted"))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

number!(
    /// A volume's identity; never reused, a rename keeps it (P2).
    VolumeId(u64), "v"
);
number!(
    /// Number of a volume's ownership: grows at every take-over and every start of an owner (P1).
    Generation(u64), "g"
);
number!(
    /// Order of a guest write inside one generation (P1).
    Sequence(u64), "s"
);
number!(
    /// Version of the cluster map (nodes, devices, placement groups).
    Epoch(u64), "e"
);
number!(
    /// A storage role's process number: new at every start, carried by every journal message (P3). Never 0 on a live member.
    Incarnation(u64), "i"
);
number!(
    /// A pool's identity, unique in the cluster.
    PoolId(u32), "p"
);
number!(
    /// A node's identity, unique in the cluster; users see its name ("n1").
    NodeId(u32), "node"
);

/// A 128-bit identity written as 32 hex digits.
macro_rules! identity {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(into = "String", try_from = "String")]
        pub struct $name(pub u128);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }
        impl std::str::FromStr for $name {
            type Err = std::num::ParseIntError;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                u128::from_str_radix(text, 16).map(Self)
            }
        }
        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.to_string()
            }
        }
        impl TryFrom<String> for $name {
            type Error = std::num::ParseIntError;
            fn try_from(text: String) -> Result<Self, Self::Error> {
                text.parse()
            }
        }
    };
}

identity!(
    /// A device's identity, drawn when it is formatted and kept in its superblock.
    DeviceId
);
identity!(
    /// A cluster's identity; a device of another cluster is refused.
    ClusterId
);

/// A placement group: a pool and an index below the pool's group count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PgId {
    /// The pool.
    pub pool: PoolId,
    /// Index inside the pool, from 0.
    pub index: u32,
}

impl fmt::Display for PgId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:x}", self.pool.0, self.index)
    }
}

/// Position of a shard inside its segment's stripe: data shards are 0..k, parity k..k+m. Below 64.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ShardIndex(pub u8);

impl fmt::Display for ShardIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Identity of a journal set of one volume: the generation that made it and its number in that generation (P3).
/// Ordered: a larger id is the newer set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SetId {
    /// Ownership that created the set.
    pub generation: Generation,
    /// Number inside that generation, from 1.
    pub number: u64,
}

impl fmt::Display for SetId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.generation, self.number)
    }
}

/// Version of a block: the guest write that made it. The newest wins wherever it is found; equal versions are equal
/// bytes (P1). Compared generation first: a new owner restarts the sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Version {
    /// Ownership under which the write was sequenced.
    pub generation: Generation,
    /// Order inside that ownership.
    pub sequence: Sequence,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.generation, self.sequence)
    }
}
