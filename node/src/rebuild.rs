//! Finds the shards of a device by their headers: fills the shard index again after it was lost.

use crate::format::{Extent, SHARD_HEADER_BYTES, ShardEntry, Superblock, UNIT};
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use xsan_env::{BufPool, Disk};
use xsan_types::ShardId;

/// Bytes read at once.
const WINDOW: u64 = 1 << 20;

/// Every shard whose header lies in the extent area. Of two that claim the same place the one allocated later is right; one that
/// claims a place of the log's state is older than it. Shards that were deleted may be found again: they are unlisted names that
/// nobody reads (P7).
pub(crate) async fn scan(
    disk: &Arc<dyn Disk>,
    buffers: &BufPool,
    superblock: &Superblock,
    used: &[Extent],
) -> io::Result<Vec<(ShardId, ShardEntry)>> {
    let mut found: Vec<(ShardId, ShardEntry)> = Vec::new();
    let mut at = superblock.area_offset();
    let end = superblock.bytes / UNIT * UNIT;
    while at < end {
        let bytes = WINDOW.min(end - at);
        // A damaged place holds no shard that could be used.
        if let Ok(window) = disk.read(at, buffers.get(bytes as usize)).await {
            for offset in (0..bytes).step_by(UNIT as usize) {
                let Some(header) = window.get(offset as usize..offset as usize + SHARD_HEADER_BYTES) else { break };
                if let Ok(shard) = ShardEntry::parse_header(header, superblock.device, at + offset) {
                    found.push(shard);
                }
            }
        }
        at += bytes;
    }
    found.sort_by_key(|(_, entry)| std::cmp::Reverse(entry.allocation));
    let mut taken: BTreeMap<u64, u64> = used.iter().map(|extent| (extent.offset, extent.bytes)).collect();
    let mut seen = std::collections::BTreeSet::new();
    found.retain(|(shard, entry)| {
        let free = entry.extents.iter().all(|extent| is_free(&taken, extent, end));
        let keep = free && seen.insert(*shard);
        if keep {
            taken.extend(entry.extents.iter().map(|extent| (extent.offset, extent.bytes)));
        }
        keep
    });
    Ok(found)
}

fn is_free(taken: &BTreeMap<u64, u64>, extent: &Extent, end: u64) -> bool {
    let Some(stop) = extent.offset.checked_add(extent.bytes).filter(|&stop| stop <= end) else { return false };
    taken.range(..stop).next_back().is_none_or(|(offset, bytes)| offset + bytes <= extent.offset)
}
