//! Where data should be: while this node leads, it plans moves and ends those of lost devices (RFC 0006). And the checks before a
//! device or node is emptied.

use super::Facts;
use super::carry::places;
use super::facts::NodeReport;
use super::host::Host;
use super::maps::answers;
use crate::error::ClusterError;
use raft_meta::{Command, Consensus, MetaState, NodeState, Pool};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use xsan_placement::{DeviceState, assign_with_holes};
use xsan_types::{DeviceId, Epoch, NodeId, PoolId, VolumeId};

/// The map is quiet for this long before a move is planned: three new hosts are one move.
const QUIET_FOR: Duration = Duration::from_secs(2);
/// How often a leader looks while something is to be done.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long a device that is left may be away before its data is rebuilt from others; at once if it is out.
const AWAY_MAX: Duration = Duration::from_secs(600);

/// Plans moves until it is aborted, while this node leads.
pub async fn plan(host: Arc<Host>) {
    let mut applied = host.group().subscribe();
    let mut status = host.group().status();
    let (mut epoch, mut since) = (Epoch::default(), host.env().now());
    let mut tried: BTreeMap<PoolId, Epoch> = BTreeMap::new();
    loop {
        applied.borrow_and_update();
        let own = host.group().replica();
        if status.wait_for(|status| status.leader == Some(own)).await.is_err() {
            return;
        }
        let (view, now) = (host.view(), host.env().now());
        if view.epoch != epoch {
            (epoch, since) = (view.epoch, now);
        }
        let wanted = |pool: &&Pool| wants_move(&view, pool) && tried.get(&pool.id) != Some(&epoch);
        let wanted: Vec<&Pool> = view.pools.values().filter(wanted).collect();
        if now.since(since) >= QUIET_FOR {
            for pool in &wanted {
                tried.insert(pool.id, epoch);
                match host.propose(Command::PlanMove { pool: pool.id, holes_allowed: false }).await {
                    Ok(_) => tracing::info!(pool = %pool.name, "data moves to where the cluster's devices want it"),
                    Err(error) => tracing::warn!(pool = %pool.name, %error, "no move can be planned"),
                }
            }
        }
        let moving = view.pools.values().any(|pool| pool.next.is_some());
        if moving {
            end_lost(&host, &view).await;
        }
        let changed = applied.changed();
        if moving || !wanted.is_empty() {
            let _ = host.env().timeout(LOOK_EVERY, changed).await;
        } else if changed.await.is_err() {
            return;
        }
    }
}

/// Whether a pool's table names a device that is out, or lacks one that could hold data.
fn wants_move(view: &MetaState, pool: &Pool) -> bool {
    if pool.next.is_some() {
        return false;
    }
    let placed: BTreeSet<DeviceId> = pool.table.positions.iter().flatten().flatten().copied().collect();
    let node_of = |device: &DeviceId| view.devices.get(device).and_then(|record| view.node(record.node));
    if placed.iter().any(|device| node_of(device).is_some_and(|node| node.state == NodeState::Joining)) {
        // A replaced host: its devices are as good as there.
        return false;
    }
    view.devices.values().any(|device| match device.state {
        DeviceState::Out => placed.contains(&device.id),
        DeviceState::In => {
            !placed.contains(&device.id) && view.node(device.node).is_some_and(|node| node.state == NodeState::Up)
        }
    })
}

/// What nodes say of themselves, by node.
type Reports = BTreeMap<NodeId, NodeReport>;

async fn reports(host: &Host, view: &MetaState) -> Reports {
    let nodes = view.nodes.values().filter(|node| answers(node.state));
    let asked = nodes.map(|node| async { host.report_of(node.id).await.map(|report| (node.id, report)) });
    futures::future::join_all(asked).await.into_iter().flatten().collect()
}

/// Devices that carry nothing themselves because their node is away, or they were given up as lost, and whose data is to be rebuilt at the new
/// places.
fn lost_places(host: &Host, view: &MetaState, pool: &Pool, reports: &Reports) -> Vec<DeviceId> {
    let now = host.env().wall_millis();
    let is_lost = |device: &DeviceId| {
        let Some(record) = view.devices.get(device) else { return true };
        let Some(node) = view.node(record.node) else { return true };
        if let Some(report) = reports.get(&node.id) {
            let is_served = report.devices.iter().any(|served| served.id == *device);
            return view.lost_devices.contains(device) && !is_served;
        }
        let since = view.hosts.nodes.get(&node.id).map_or(now, |host| host.since_millis);
        let away = Duration::from_millis(now.saturating_sub(since));
        node.state == NodeState::Down && (record.state == DeviceState::Out || away > AWAY_MAX)
    };
    view.devices_to_empty(pool).into_iter().filter(is_lost).collect()
}

/// Says for lost devices that they are emptied, once every volume of the pool is whole without them.
async fn end_lost(host: &Arc<Host>, view: &MetaState) {
    let reports = reports(host, view).await;
    for pool in view.pools.values().filter(|pool| pool.next.is_some()) {
        let lost = lost_places(host, view, pool, &reports);
        if lost.is_empty() || !is_rebuilt(host, view, pool, &reports).await {
            continue;
        }
        for device in lost {
            let command = Command::PlaceEmptied { pool: pool.id, map_epoch: pool.map_epoch, device };
            match host.propose(command).await {
                Ok(_) => tracing::info!(pool = %pool.name, %device, "a lost device's data was rebuilt elsewhere"),
                Err(error) => tracing::debug!(pool = %pool.name, %device, %error, "not noted"),
            }
        }
    }
}

/// Whether every volume of the pool has all its positions, as its owner found them under a map as new as `view`: under that of the plan
/// the lost devices may still have answered. One that nobody serves is taken over to find out.
async fn is_rebuilt(host: &Arc<Host>, view: &MetaState, pool: &Pool, reports: &Reports) -> bool {
    let told = |volume: VolumeId| reports.values().find_map(|report| report.volumes.get(&volume));
    let mut whole = true;
    for volume in view.volumes.values().filter(|volume| volume.pool == pool.id && !volume.is_deleted()) {
        if volume.register().set.is_none() && volume.register().checkpoint.is_none() {
            // Nobody has ever written to it.
            continue;
        }
        match told(volume.id) {
            Some(report) => {
                let engine = &report.engine;
                whole &= engine.checked_epoch >= view.epoch.0 && engine.segments_with_holes == 0 && !engine.unchecked;
            }
            None => {
                whole = false;
                if let Err(error) = host.open_for_client(volume.name.as_str()).await {
                    tracing::debug!(volume = %volume.name, %error, "not taken over to be looked at");
                }
            }
        }
    }
    whole
}

/// Refuses what would leave a pool without enough devices: `out` will hold nothing any more. `facts` tell how full they are.
///
/// # Errors
/// Which pool does not fit on what is left, and what is missing.
pub fn check_without(facts: &Facts, out: &BTreeSet<DeviceId>) -> Result<(), ClusterError> {
    let mut after = MetaState::clone(&facts.view);
    for device in out {
        if let Some(record) = after.devices.get_mut(device) {
            record.state = DeviceState::Out;
        }
    }
    let topology = after.topology().map_err(|error| ClusterError::Invalid(error.to_string()))?;
    for pool in after.pools.values() {
        let table = places(pool);
        if let Err(error) = assign_with_holes(&topology, table.shape(), table.width, Some(table)) {
            return Err(ClusterError::Invalid(format!(
                "pool {} does not fit on what would be left: {error}; add hosts or devices first",
                pool.name
            )));
        }
    }
    let (mut leaves, mut room) = (0, 0);
    for report in facts.reports().flat_map(|report| &report.devices) {
        if out.contains(&report.id) {
            leaves += report.used;
        } else if after.devices.get(&report.id).is_some_and(|device| device.state == DeviceState::In) {
            room += report.capacity.saturating_sub(report.used);
        }
    }
    // A little is always needed for what is being written.
    if leaves > room / 10 * 9 {
        let (leaves, room) = (xsan_types::format_bytes(leaves), xsan_types::format_bytes(room));
        return Err(ClusterError::Invalid(format!(
            "{leaves} would have to move, and the other devices have {room} free: add devices first"
        )));
    }
    Ok(())
}
