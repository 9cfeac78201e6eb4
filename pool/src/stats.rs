//! Counters of a pool.

use xsan_env::{Counter, Registry};

/// Declares the counters once: the handles, the public snapshot, the names in the registry.
macro_rules! counters {
    ($($(#[$doc:meta])* $field:ident = $help:literal,)*) => {
        /// Handles, one relaxed atomic each.
        pub(crate) struct Stats {
            $(pub(crate) $field: Counter,)*
        }

        impl Stats {
            pub(crate) fn new(registry: &Registry, pool: &str) -> Self {
                Self {
                    $($field: registry.counter(
                        format!(concat!("xsan_pool_", stringify!($field), "_total{{pool=\"{}\"}}"), pool),
                        $help,
                    ),)*
                }
            }

            pub(crate) fn snapshot(&self) -> PoolStats {
                PoolStats { $($field: self.$field.get(),)* }
            }
        }

        /// What a pool has done since it was made.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct PoolStats {
            $($(#[$doc])* pub $field: u64,)*
        }
    };
}

counters! {
    /// Reads asked for.
    reads = "Reads asked for.",
    /// Bytes of reads answered.
    read_bytes = "Bytes of reads answered.",
    /// Reads sent to devices, for whatever reason: reads, rebuilding, hole filling. None of them belongs to a write.
    shard_reads = "Reads sent to devices.",
    /// Bytes asked of devices.
    shard_read_bytes = "Bytes asked of devices.",
    /// Reads for which some unit had to be rebuilt from others (device away, shard missing or damaged).
    degraded_reads = "Reads for which some unit was rebuilt from other shards.",
    /// Reads that took so long that the bytes were asked of other devices as well.
    hedges = "Reads asked of other devices as well because one was late.",
    /// Hedges that were quicker than the late device.
    hedge_wins = "Hedges that were quicker than the late device.",
    /// Blocks of 4 KiB that a device gave with wrong content, or could not give.
    damaged_blocks = "Blocks with wrong or unreadable content found on devices.",
    /// Blocks of 4 KiB that were rewritten in place.
    repaired_blocks = "Blocks rewritten in place with their right content.",
    /// Repairs that a device refused, or that were left to a later read because too many were waiting.
    repairs_failed = "Repairs in place that did not happen.",
    /// Reads that found no shards with the right content.
    corrupt_reads = "Reads that found no shards with the right content.",
    /// Segments sealed.
    seals = "Segments sealed.",
    /// Bytes of sealed segments, without redundancy.
    seal_bytes = "Bytes of sealed segments, without redundancy.",
    /// Bytes of shards written, redundancy included: seals, rows and holes.
    shard_write_bytes = "Bytes of shards written, redundancy included.",
    /// Positions that a seal had to leave out.
    holes = "Positions that a seal had to leave out.",
    /// Positions rebuilt later.
    holes_filled = "Positions rebuilt later.",
    /// Shards whose hash was wrong when they were about to serve as a source.
    bad_sources = "Shards found with a wrong hash before use as a source.",
    /// Row appends completed (P9).
    row_appends = "Row appends completed.",
    /// Bytes of completed row appends, without redundancy.
    row_bytes = "Bytes of completed row appends, without redundancy.",
    /// Segments written by rows and finished.
    rows_finished = "Segments written by rows and finished.",
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_listed_under_the_pools_name() {
        let registry = Registry::new();
        let stats = Stats::new(&registry, "fast");
        stats.reads.add(3);
        assert_eq!(stats.snapshot().reads, 3);
        assert!(registry.prometheus().contains("xsan_pool_reads_total{pool=\"fast\"} 3"));
    }
}
