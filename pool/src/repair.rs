//! Rewriting damaged blocks where they lie, behind the read that found them. Never fails a read.

use crate::read::{BLOCK, Reading};
use std::sync::Arc;
use xsan_env::Buf;
use xsan_types::{ShardId, ShardIndex};
use xsan_wire::node::NodeError;

/// Rewrites the blocks of shard `index` from `offset` in which `wrong` (nothing: unreadable) is not `right`. Lengths are
/// multiples of 4096, `right` is aligned.
pub(crate) fn differences(reading: &Reading, index: usize, offset: u64, wrong: Option<&[u8]>, right: &Buf) {
    let is_wrong = |block: usize| match wrong {
        Some(wrong) => wrong.get(block * BLOCK..(block + 1) * BLOCK) != right.get(block * BLOCK..(block + 1) * BLOCK),
        None => true,
    };
    let blocks = right.len() / BLOCK;
    let mut block = 0;
    while block < blocks {
        let Some(first) = (block..blocks).find(|&block| is_wrong(block)) else { return };
        let end = (first..blocks).find(|&block| !is_wrong(block)).unwrap_or(blocks);
        let data = right.slice(first * BLOCK..end * BLOCK);
        rewrite(reading, index, offset + (first * BLOCK) as u64, data);
        block = end;
    }
}

/// Starts one repair, unless too many are running.
fn rewrite(reading: &Reading, index: usize, offset: u64, data: Buf) {
    let shared = &reading.shared;
    let blocks = (data.len() / BLOCK) as u64;
    shared.stats.damaged_blocks.add(blocks);
    let segment = reading.segment;
    let Some((link, before)) = reading.view.readable(segment.pg, index).map(|(now, old)| (now.clone(), old.cloned()))
    else {
        shared.stats.repairs_failed.add(blocks);
        return;
    };
    let Ok(permit) = Arc::clone(&shared.repairs).try_acquire_owned() else {
        shared.stats.repairs_failed.add(blocks);
        return;
    };
    let shared = Arc::clone(shared);
    reading.shared.env.spawn("repair", async move {
        let shard = ShardId { segment, index: ShardIndex(index as u8) };
        let mut repaired = link.node.repair_shard(link.device, shard, offset, data.clone()).await;
        if let (Err(NodeError::NotFound), Some(before)) = (&repaired, before) {
            repaired = before.node.repair_shard(before.device, shard, offset, data).await;
        }
        match repaired {
            Ok(()) => {
                shared.stats.repaired_blocks.add(blocks);
                tracing::warn!(%shard, device = %link.device, offset, blocks, "damaged blocks rewritten");
            }
            Err(error) => {
                shared.stats.repairs_failed.add(blocks);
                tracing::warn!(%shard, device = %link.device, offset, blocks, %error, "damaged blocks not rewritten");
            }
        }
        drop(permit);
    });
}
