//! Carries what this node's devices hold of moved positions to where it belongs, and frees it afterwards (P11, RFC 0006).
//!
//! Nothing is remembered: a node that starts looks at its shards and at the map. Bounds: two shards of a device in memory at a
//! time, one page of names.

use super::host::Host;
use raft_meta::{Command, Consensus, MetaState, Pool};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use xsan_node::Assignment;
use xsan_placement::PgTable;
use xsan_types::{DeviceId, Epoch, PgId, PoolId, ShardId, ShardIndex, VolumeId};
use xsan_wire::node::{HoldShard, NodeApi, NodeError, PutShard, ShardInfo};

/// Shards of one device on their way at a time.
const AT_ONCE: usize = 2;
/// Names listed, and freed, at a time.
const PAGE: u32 = 256;
/// Until what could not be done is tried again, if the map stays as it is.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// A node that starts has more urgent things to do than to look for what it may free.
const FREE_AFTER: Duration = Duration::from_secs(10);
/// How long the newest map is waited for.
const NEWEST_FOR: Duration = Duration::from_secs(5);
/// Bytes hashed without a pause.
const HASH_BYTES: usize = 1 << 20;

/// A pool's table by which positions have their places now.
#[must_use]
pub fn places(pool: &Pool) -> &PgTable {
    pool.next.as_deref().unwrap_or(&pool.table)
}

/// The device a position belongs to; `None` for a hole, and for groups that the metadata does not know.
#[must_use]
pub fn place(view: &MetaState, pg: PgId, index: ShardIndex) -> Option<DeviceId> {
    let group = places(view.pools.get(&pg.pool)?).group(pg)?;
    *group.get(usize::from(index.0))?
}

/// The metadata as a storage node needs it.
pub struct HostMap(pub Arc<MetaState>);

impl Assignment for HostMap {
    fn epoch(&self) -> Epoch {
        self.0.epoch
    }

    fn is_elsewhere(&self, device: DeviceId, shard: ShardId) -> bool {
        place(&self.0, shard.segment.pg, shard.index).is_some_and(|place| place != device)
    }

    fn is_given_up(&self, device: DeviceId) -> bool {
        self.0.is_given_up(device)
    }
}

/// How far a device is with what it has to carry. Travels as JSON: fields are added, never changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CarryReport {
    /// The pool that moves.
    pub pool: PoolId,
    /// The device that is left.
    pub device: DeviceId,
    /// Bytes that were found at their new places, or brought there.
    pub done_bytes: u64,
    /// Bytes that it held of positions that leave it when it began.
    pub total_bytes: u64,
    /// Milliseconds since it began.
    pub running_millis: u64,
    /// Shards that were wrong and are left to be rebuilt from others.
    pub damaged: u64,
    /// Why it does not go on.
    pub waits_for: Option<String>,
}

/// What became of one shard.
enum Brought {
    /// It is at its place.
    There,
    /// It was deleted meanwhile.
    Gone,
    /// Its bytes are wrong: of no use to anybody.
    Damaged,
}

/// Carries and frees until it is aborted.
pub async fn run(host: Arc<Host>) {
    let mut applied = host.group().subscribe();
    let began = host.env().now();
    let mut freed = BTreeMap::new();
    loop {
        applied.borrow_and_update();
        let view = host.view();
        let mut left = carry(&host, &view).await;
        left |= match FREE_AFTER.checked_sub(host.env().now().since(began)) {
            Some(_) => true,
            None => free(&host, &view, &mut freed).await,
        };
        let changed = applied.changed();
        if left {
            let _ = host.env().timeout(RETRY_AFTER, changed).await;
        } else if changed.await.is_err() {
            return;
        }
    }
}

/// Carries for all pools that move; whether something is left to be done.
async fn carry(host: &Host, view: &Arc<MetaState>) -> bool {
    let mut left = false;
    let mut reports = Vec::new();
    for pool in view.pools.values().filter(|pool| pool.next.is_some()) {
        for device in view.devices_to_empty(pool) {
            // What is not open here is rebuilt from others (rule 5), or its disk returns.
            if !host.node().has_device(device) {
                left |= view.devices.get(&device).is_some_and(|record| record.node == host.node_id());
                continue;
            }
            reports.push((pool.id, device));
            let outcome = Carrying { host, view, pool: pool.id, device }.carry().await;
            let outcome = match outcome {
                Ok(()) => tell(host, pool, device).await,
                Err(reason) => Err(reason),
            };
            if let Err(reason) = &outcome {
                tracing::info!(pool = %pool.name, %device, reason, "data cannot be moved on now");
            }
            left |= outcome.is_err();
            host.note_carry(pool.id, device, |report| report.waits_for = outcome.err());
        }
    }
    host.keep_carry_reports(&reports);
    left
}

async fn tell(host: &Host, pool: &Pool, device: DeviceId) -> Result<(), String> {
    let command = Command::PlaceEmptied { pool: pool.id, map_epoch: pool.map_epoch, device };
    host.propose(command).await.map_err(|error| error.to_string())?;
    tracing::info!(pool = %pool.name, %device, "all data that leaves this device is at its new places");
    Ok(())
}

/// One device of a pool that moves.
struct Carrying<'a> {
    host: &'a Host,
    view: &'a Arc<MetaState>,
    pool: PoolId,
    device: DeviceId,
}

impl Carrying<'_> {
    async fn carry(&self) -> Result<(), String> {
        let (host, began) = (self.host, self.host.env().now());
        let map: Arc<dyn Assignment> = Arc::new(HostMap(Arc::clone(self.view)));
        host.node().set_map(&map);
        let open = host.node().settle(self.device).await.map_err(|error| error.to_string())?;
        for &shard in open.iter().filter(|shard| shard.segment.pg.pool == self.pool) {
            if !self.is_sealed_there(shard).await {
                return Err(format!("rows of {} are still open", shard.segment.volume));
            }
        }
        let (mut total, mut pages) = (0, self.pages());
        while let Some(page) = pages.next().await? {
            total += page.iter().map(|info| info.bytes).sum::<u64>();
        }
        host.note_carry(self.pool, self.device, |report| {
            *report = CarryReport { total_bytes: total, ..CarryReport::of(self.pool, self.device) };
        });
        let mut pages = self.pages();
        while let Some(page) = pages.next().await? {
            for pair in page.chunks(AT_ONCE) {
                let outcomes = futures::future::join_all(pair.iter().map(|info| self.bring(info))).await;
                for (info, outcome) in pair.iter().zip(outcomes) {
                    let damaged = matches!(outcome?, Brought::Damaged);
                    host.note_carry(self.pool, self.device, |report| {
                        report.done_bytes += info.bytes;
                        report.damaged += u64::from(damaged);
                        report.running_millis = millis(host.env().now().since(began));
                    });
                }
            }
        }
        Ok(())
    }

    /// Whether a shard that is open here was sealed at its place instead: nobody looks for it here any more.
    async fn is_sealed_there(&self, shard: ShardId) -> bool {
        let Some(place) = place(self.view, shard.segment.pg, shard.index) else { return false };
        let Some(record) = self.view.devices.get(&place) else { return false };
        let info = self.host.maps().storage_of(record.node).shard_info(place, shard).await;
        info.is_ok_and(|info| !info.open)
    }

    /// The sealed shards that this device holds and that belong elsewhere.
    fn pages(&self) -> Pages<'_> {
        let volumes = self.view.volumes.values().filter(|volume| volume.pool == self.pool && !volume.is_deleted());
        Pages { of: self, volumes: volumes.map(|volume| volume.id).collect(), after: None }
    }

    /// Brings a shard to its place, unless it is there.
    async fn bring(&self, info: &ShardInfo) -> Result<Brought, String> {
        let ShardInfo { shard, hash, bytes, .. } = *info;
        let (view, node) = (self.view, self.host.node());
        let place = place(view, shard.segment.pg, shard.index).ok_or("a position has no place")?;
        let record = view.devices.get(&place).ok_or("a place is not known")?;
        let there = self.host.maps().storage_of(record.node);
        let away = |error: &NodeError| {
            let name = view.node(record.node).map_or_else(|| record.node.to_string(), |node| node.name.to_string());
            format!("device {place} of {name}: {error}")
        };
        match there.hold_shard(HoldShard { device: place, shard, epoch: view.epoch, hash }).await {
            Ok(()) => return Ok(Brought::There),
            Err(NodeError::NotFound) => {}
            Err(error) => return Err(away(&error)),
        }
        let length = u32::try_from(bytes).map_err(|_| "a shard is too long")?;
        let data = match node.read_shard(self.device, shard, 0, length).await {
            Ok(data) => data,
            Err(NodeError::NotFound | NodeError::StaleEpoch { .. }) => return Ok(Brought::Gone),
            Err(NodeError::Corrupt) => return Ok(Brought::Damaged),
            Err(error) => return Err(format!("device {}: {error}", self.device)),
        };
        let mut hasher = blake3::Hasher::new();
        for piece in data.chunks(HASH_BYTES) {
            hasher.update(piece);
            xsan_env::yield_now().await;
        }
        if *hasher.finalize().as_bytes() != hash {
            tracing::warn!(%shard, device = %self.device, "a shard's bytes are wrong: it is rebuilt from others");
            return Ok(Brought::Damaged);
        }
        let put = PutShard { device: place, shard, epoch: view.epoch, hash, data: vec![data] };
        there.put_shard(put).await.map_err(|error| away(&error))?;
        Ok(Brought::There)
    }

    /// Frees what belongs elsewhere, each shard after it was seen there.
    async fn free(&self) -> Result<(), String> {
        let node = self.host.node();
        // Rows that are open in another's place end without being listed here; their shards are looked for next time.
        node.settle(self.device).await.map_err(|error| error.to_string())?;
        let mut pages = self.pages();
        while let Some(page) = pages.next().await? {
            let mut there = Vec::with_capacity(page.len());
            for info in &page {
                if let Brought::There = self.bring(info).await? {
                    there.push(info.shard);
                }
            }
            if !there.is_empty() {
                let freed = there.len();
                let done = node.free_misplaced(self.device, there, self.view.epoch).await;
                done.map_err(|error| format!("device {}: {error}", self.device))?;
                tracing::info!(device = %self.device, shards = freed, "shards that are at their places elsewhere were freed");
            }
        }
        Ok(())
    }
}

/// Names of one device, page by page.
struct Pages<'a> {
    of: &'a Carrying<'a>,
    /// Those not listed yet, the present one last.
    volumes: Vec<VolumeId>,
    after: Option<ShardId>,
}

impl Pages<'_> {
    /// The next page, which may be empty; `None` at the end.
    async fn next(&mut self) -> Result<Option<Vec<ShardInfo>>, String> {
        let Carrying { host, view, device, .. } = *self.of;
        while let Some(&volume) = self.volumes.last() {
            let page = host.node().list_shards(device, volume, self.after, PAGE).await;
            let mut page = page.map_err(|error| format!("device {device}: {error}"))?;
            self.after = page.last().map(|last| last.shard);
            if page.is_empty() {
                self.volumes.pop();
                continue;
            }
            let map = HostMap(Arc::clone(view));
            page.retain(|info| !info.open && map.is_elsewhere(device, info.shard));
            return Ok(Some(page));
        }
        Ok(None)
    }
}

impl CarryReport {
    fn of(pool: PoolId, device: DeviceId) -> Self {
        Self { pool, device, ..Self::default() }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Frees for all pools that rest and changed since the last time; whether something is left to be done.
async fn free(host: &Host, view: &MetaState, freed: &mut BTreeMap<(PoolId, DeviceId), Epoch>) -> bool {
    let rests = |pool: &Pool| pool.next.is_none();
    let own: Vec<DeviceId> = view.devices_of(host.node_id()).map(|device| device.id).collect();
    // One whose disk is away is due when it returns.
    let own: Vec<DeviceId> = own.into_iter().filter(|device| host.node().has_device(*device)).collect();
    let is_due = |pool: &Pool, device: DeviceId| freed.get(&(pool.id, device)) != Some(&pool.map_epoch);
    let pools = view.pools.values().filter(|pool| rests(pool));
    let due: Vec<(PoolId, DeviceId)> = pools
        .flat_map(|pool| own.iter().filter(|device| is_due(pool, **device)).map(|device| (pool.id, *device)))
        .collect();
    if due.is_empty() {
        return false;
    }
    // The position may have come back to this device under a map that is not known here yet.
    let Some(Ok(newest)) = host.env().timeout(NEWEST_FOR, host.newest_view()).await else { return true };
    let map: Arc<dyn Assignment> = Arc::new(HostMap(Arc::clone(&newest)));
    host.node().set_map(&map);
    let mut left = false;
    for (pool, device) in due {
        let Some(pool) = newest.pools.get(&pool).filter(|pool| rests(pool)) else { continue };
        if !host.node().has_device(device) {
            continue;
        }
        match (Carrying { host, view: &newest, pool: pool.id, device }.free().await) {
            Ok(()) => drop(freed.insert((pool.id, device), pool.map_epoch)),
            Err(reason) => {
                tracing::info!(pool = %pool.name, reason, "what belongs elsewhere cannot be freed now");
                left = true;
            }
        }
    }
    left
}

impl Host {
    fn note_carry(&self, pool: PoolId, device: DeviceId, note: impl FnOnce(&mut CarryReport)) {
        let mut reports = self.carries.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        note(reports.entry((pool, device)).or_insert_with(|| CarryReport::of(pool, device)));
    }

    fn keep_carry_reports(&self, of: &[(PoolId, DeviceId)]) {
        self.carries.lock().unwrap_or_else(std::sync::PoisonError::into_inner).retain(|key, _| of.contains(key));
    }

    /// What its devices have to carry, and how far they are.
    #[must_use]
    pub fn carry_reports(&self) -> Vec<CarryReport> {
        self.carries.lock().unwrap_or_else(std::sync::PoisonError::into_inner).values().cloned().collect()
    }
}
