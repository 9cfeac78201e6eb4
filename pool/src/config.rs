//! What a pool is and how much it may use.

use std::time::Duration;
use xsan_env::Registry;
use xsan_types::{PoolId, Scheme};

/// What a pool is and how much it may use.
#[derive(Clone)]
pub struct PoolConfig {
    /// Which pool; segments of other pools are refused.
    pub id: PoolId,
    /// Its name, for logs and metric labels.
    pub name: String,
    /// Its redundancy.
    pub scheme: Scheme,
    /// Whether a journal set may shrink to a single member while failure domains are down: writes go on with nothing
    /// left that may fail. Schemes that tolerate no failure always use single members.
    pub single_member: bool,
    /// No read is hedged before this time, however quick the devices are.
    pub hedge_floor: Duration,
    /// Memory that seals and hole filling may use at once, in bytes; more of them wait their turn, first come first served.
    pub encode_bytes_max: u64,
    /// How long a shard write waits for a newer map after a node said that it has one.
    pub map_wait: Duration,
    /// Where the counters are listed.
    pub registry: Registry,
}

impl PoolConfig {
    /// The defaults: hedges after 5 ms at the earliest, 128 MiB for seals, two members at least.
    #[must_use]
    pub fn new(id: PoolId, name: impl Into<String>, scheme: Scheme) -> Self {
        Self {
            id,
            name: name.into(),
            scheme,
            single_member: false,
            hedge_floor: Duration::from_millis(5),
            encode_bytes_max: 128 << 20,
            map_wait: Duration::from_secs(2),
            registry: Registry::new(),
        }
    }
}
