//! One shard onto the device of its position, whatever the map does meanwhile.

use crate::encode::Encoded;
use crate::pool::Shared;
use crate::view::Link;
use std::sync::Arc;
use tokio::sync::watch;
use xsan_types::{SegmentName, ShardId, ShardIndex};
use xsan_wire::node::{NodeError, NodeResult, PutShard};

/// Why a position stays a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PutFailure {
    /// No device, or one that is not up or does not answer.
    Away,
    /// Its device is full.
    NoSpace,
}

/// Writes a shard, flushed. A device that fails meanwhile is given one more try under a new map, if there is one.
pub(crate) async fn put(
    shared: Arc<Shared>,
    segment: SegmentName,
    index: usize,
    shard: Encoded,
) -> Result<(), PutFailure> {
    let mut changes = shared.changes();
    let bytes: u64 = shard.data.iter().map(|piece| piece.len() as u64).sum();
    let mut failure = PutFailure::Away;
    for _ in 0..2 {
        let seen = *changes.borrow_and_update();
        let view = shared.view();
        let Some(link) = view.up_position(segment.pg, index) else { return Err(failure) };
        let request = PutShard {
            device: link.device,
            shard: ShardId { segment, index: ShardIndex(index as u8) },
            epoch: view.epoch,
            hash: shard.hash,
            data: shard.data.clone(),
        };
        let started = link.node.put_shard(request);
        let error = match while_up(&shared, &mut changes, segment, index, link, started).await {
            Ok(()) => {
                shared.stats.shard_write_bytes.add(bytes);
                return Ok(());
            }
            Err(error) => error,
        };
        failure = if error == NodeError::NoSpace { PutFailure::NoSpace } else { PutFailure::Away };
        if let NodeError::StaleEpoch { current } = error {
            wait_for_epoch(&shared, current).await;
        } else {
            tracing::warn!(%segment, index, device = %link.device, %error, "a shard was not written");
        }
        if *changes.borrow() == seen {
            break;
        }
    }
    Err(failure)
}

/// The node's answer, or `Unavailable` as soon as the map takes the position away from the device or says it is down.
async fn while_up(
    shared: &Shared,
    changes: &mut watch::Receiver<u64>,
    segment: SegmentName,
    index: usize,
    link: &Link,
    mut answer: NodeResult<()>,
) -> Result<(), NodeError> {
    loop {
        tokio::select! {
            biased;
            result = &mut answer => return result,
            changed = changes.changed() => {
                let view = shared.view();
                let is_there = view.up_position(segment.pg, index).is_some_and(|now| now.device == link.device);
                if changed.is_err() || !is_there {
                    return Err(NodeError::Unavailable);
                }
            }
        }
    }
}

/// Waits for a map that is as new as the node's, but not for ever.
async fn wait_for_epoch(shared: &Shared, epoch: xsan_types::Epoch) {
    let mut changes = shared.changes();
    let newer = async {
        while shared.view().epoch < epoch {
            if changes.changed().await.is_err() {
                return;
            }
        }
    };
    if shared.env.timeout(shared.config.map_wait, newer).await.is_none() {
        tracing::warn!(%epoch, "a node has a newer map than this pool, which did not come");
    }
}
