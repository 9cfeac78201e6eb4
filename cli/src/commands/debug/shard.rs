//! Shards found by their headers.

use super::image::Image;
use super::output::line;
use serde::Serialize;
use xsan_node::format::{Extent, SHARD_HEADER_BYTES, ShardEntry, Superblock, UNIT};
use xsan_types::{ShardId, VolumeId};

/// Bytes read at once.
const WINDOW: u64 = 1 << 20;

#[derive(Serialize)]
pub(super) struct FoundShard {
    pub(super) shard: ShardId,
    pub(super) bytes: u64,
    pub(super) allocation: u64,
    pub(super) extents: Vec<Extent>,
    /// `None`: not asked for.
    pub(super) whole: Option<bool>,
}

/// Every header in the extent area.
pub(super) fn scan(image: &Image, block: &Superblock, volume: Option<VolumeId>, verify: bool) -> Vec<FoundShard> {
    let mut found = Vec::new();
    let end = block.bytes / UNIT * UNIT;
    for at in (block.area_offset()..end).step_by(UNIT as usize) {
        // A place that cannot be read holds no shard that could be shown.
        let Ok(header) = image.read(at, SHARD_HEADER_BYTES as u64) else { continue };
        let Ok((shard, entry)) = ShardEntry::parse_header(&header, block.device, at) else { continue };
        if volume.is_some_and(|volume| volume != shard.segment.volume) {
            continue;
        }
        let whole = verify.then(|| is_whole(image, &entry));
        let ShardEntry { bytes, allocation, extents, .. } = entry;
        found.push(FoundShard { shard, bytes, allocation, extents, whole });
    }
    found
}

pub(super) fn is_whole(image: &Image, entry: &ShardEntry) -> bool {
    let mut hasher = blake3::Hasher::new();
    let mut at = 0;
    while at < entry.bytes {
        let bytes = WINDOW.min(entry.bytes - at);
        match image.read_over(&entry.extents, SHARD_HEADER_BYTES as u64 + at, bytes) {
            Ok(read) if read.len() as u64 == bytes => hasher.update(&read),
            _ => return false,
        };
        at += bytes;
    }
    *hasher.finalize().as_bytes() == entry.hash
}

impl FoundShard {
    pub(super) fn print(&self) {
        let state = match self.whole {
            None => "",
            Some(true) => ", whole",
            Some(false) => ", DAMAGED",
        };
        let at = self.extents.first().map_or(0, |extent| extent.offset);
        line!("{} @{at}, {} bytes, allocation {}{state}", self.shard, self.bytes, self.allocation);
    }
}
