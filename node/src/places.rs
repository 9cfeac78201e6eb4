//! Which positions are this device's, by the cluster's map (P11, RFC 0006).

use crate::device::Device;
use std::sync::Arc;
use xsan_types::{DeviceId, Epoch, ShardId};
use xsan_wire::node::NodeError;

/// The map of the cluster, as far as a node needs it.
pub trait Assignment: Send + Sync + 'static {
    /// Its version.
    fn epoch(&self) -> Epoch;

    /// Whether the shard's position is another device's. Not so for what the map does not know.
    fn is_elsewhere(&self, device: DeviceId, shard: ShardId) -> bool;

    /// Whether somebody has said that the device is to be done without: what it held and cannot give is lost.
    fn is_given_up(&self, device: DeviceId) -> bool;
}

/// What a device knows of the map. In memory only: a node that starts learns it anew.
#[derive(Default)]
pub(crate) struct Places {
    map: Option<Arc<dyn Assignment>>,
    /// The newest map under which a shard was put here.
    newest: Epoch,
    /// Held by every put that was let in, and every finish that began, since the last one who settled.
    puts: Arc<()>,
}

impl Places {
    fn is_elsewhere(&self, device: DeviceId, shard: ShardId) -> bool {
        self.map.as_ref().is_some_and(|map| map.is_elsewhere(device, shard))
    }

    /// Refuses what is another device's.
    pub(crate) fn check(&self, device: DeviceId, shard: ShardId) -> Result<(), NodeError> {
        match &self.map {
            Some(map) if map.is_elsewhere(device, shard) => Err(NodeError::StaleEpoch { current: map.epoch() }),
            _ => Ok(()),
        }
    }

    /// Something that becomes a sealed shard and was let in.
    pub(crate) fn put(&self) -> Put {
        Put(Arc::clone(&self.puts))
    }

    /// Refuses what was decided under a map that is older than that of a put.
    pub(crate) fn check_newest(&self, epoch: Epoch) -> Result<(), NodeError> {
        if self.newest > epoch { Err(NodeError::StaleEpoch { current: self.newest }) } else { Ok(()) }
    }
}

/// A put that counts as under way as long as this lives. Dropped before a `Running`: that one wakes who waits for it.
pub(crate) struct Put(#[expect(dead_code, reason = "held, not read")] Arc<()>);

impl Device {
    /// From here on puts of positions that are others' are refused.
    pub(crate) fn set_map(&self, map: Arc<dyn Assignment>) {
        let mut inner = self.lock();
        if inner.places.map.as_ref().is_none_or(|known| known.epoch() < map.epoch()) {
            inner.places.map = Some(map);
        }
    }

    /// Lets a put in, unless this device knows a newer map in which the position is another device's.
    pub(crate) fn admit_put(&self, shard: ShardId, epoch: Epoch) -> Result<Put, NodeError> {
        let mut inner = self.lock();
        let places = &mut inner.places;
        if places.map.as_ref().is_some_and(|map| epoch <= map.epoch()) {
            places.check(self.id, shard)?;
        }
        places.newest = places.newest.max(epoch);
        Ok(places.put())
    }

    /// What to say of a shard that is not here: whoever looks for it here may know an old map.
    pub(crate) fn absent(&self, shard: ShardId) -> NodeError {
        self.lock().places.check(self.id, shard).err().unwrap_or(NodeError::NotFound)
    }

    /// Waits for the puts that were let in, and the open shards that began to be finished, before this call; answers the shards in
    /// positions of others that were still open then, whoever opened them: nobody begins new ones.
    pub(crate) async fn settle(&self) -> Vec<ShardId> {
        let (before, open) = {
            let mut inner = self.lock();
            let before = std::mem::take(&mut inner.places.puts);
            // Under one lock: a shard is either open, or its finish is waited for until it is listed.
            let open = inner.state.open_shards.keys().filter(|shard| inner.places.is_elsewhere(self.id, **shard));
            (before, open.copied().collect())
        };
        loop {
            let progress = self.progress.notified();
            let mut progress = std::pin::pin!(progress);
            progress.as_mut().enable();
            if Arc::strong_count(&before) == 1 {
                return open;
            }
            progress.await;
        }
    }
}
