//! Writing a whole segment (P6): shards computed from memory, put on every reachable position at once.

use crate::encode::{self, Body};
use crate::pool::Shared;
use crate::put::{PutFailure, put};
use futures::stream::{FuturesUnordered, StreamExt};
use lsm_block::store::{Holes, StoreError};
use std::sync::Arc;
use xsan_env::Buf;
use xsan_types::{SegmentName, ShardIndex};

/// Seals a segment; see `SegmentStore::seal`.
pub(crate) async fn seal(shared: Arc<Shared>, segment: SegmentName, body: Vec<Buf>) -> Result<Holes, StoreError> {
    let body = Body::new(body);
    let stripe = shared.stripe(body.length())?;
    let (k, width) = (stripe.k(), stripe.scheme().width());
    let _memory = shared.encode_memory(stripe.shard_bytes() * width as u64).await;
    let reachable = count_up(&shared, segment, width);
    if reachable < k {
        // Before the work, not after it: the caller waits for a node and repeats.
        return Err(StoreError::TooFew { found: reachable, needed: k });
    }
    let shards = encode::encode(&shared, &stripe, &body).await?;
    let mut puts: FuturesUnordered<_> = (0..width)
        .filter_map(|index| Some((index, encode::shard_of(&shards, index)?.clone())))
        .map(|(index, shard)| {
            let shared = Arc::clone(&shared);
            async move { (index, put(shared, segment, index, shard).await) }
        })
        .collect();
    let mut holes = Vec::new();
    let mut is_full = false;
    while let Some((index, result)) = puts.next().await {
        if let Err(failure) = result {
            is_full |= failure == PutFailure::NoSpace;
            holes.push(ShardIndex(index as u8));
        }
    }
    let written = width - holes.len();
    if written < k {
        return Err(if is_full { StoreError::NoSpace } else { StoreError::TooFew { found: written, needed: k } });
    }
    holes.sort_unstable();
    if !holes.is_empty() {
        tracing::warn!(%segment, holes = holes.len(), "sealed with positions missing");
    }
    shared.stats.seals.inc();
    shared.stats.seal_bytes.add(body.length());
    shared.stats.holes.add(holes.len() as u64);
    Ok(Holes(holes))
}

fn count_up(shared: &Shared, segment: SegmentName, width: usize) -> usize {
    let view = shared.view();
    (0..width).filter(|&index| view.up_position(segment.pg, index).is_some()).count()
}
