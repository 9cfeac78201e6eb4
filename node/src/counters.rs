//! What a node did.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        #[derive(Debug, Default)]
        pub(crate) struct Counters { $(pub(crate) $name: AtomicU64,)* }

        /// What a node did since it was opened.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct NodeCounters { $($(#[$doc])* pub $name: u64,)* }

        impl Counters {
            pub(crate) fn add_to(&self, sum: &mut NodeCounters) {
                $(sum.$name += self.$name.load(Ordering::Relaxed);)*
            }
        }
    };
}

counters! {
    /// Journal appends.
    appends,
    /// Journal bytes appended.
    append_bytes,
    /// Shards written whole.
    shard_puts,
    /// Appends to open shards.
    shard_appends,
    /// Reads of shards.
    shard_reads,
    /// Flush requests.
    flush_requests,
    /// Reads from devices.
    device_reads,
    /// Bytes read from devices.
    device_read_bytes,
    /// Writes to devices.
    device_writes,
    /// Bytes written to devices, log and headers included.
    device_write_bytes,
    /// Device flushes.
    device_flushes,
    /// Frames written to the device log.
    log_frames,
    /// Wrong bytes found.
    corrupt_found,
}

pub(crate) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}
