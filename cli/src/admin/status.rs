//! The truth about a cluster, computed from its parts when asked; nothing here is echoed from what was believed before.

use super::api::{ClusterStatus, EngineStatus, NodeStatus, PoolStatus, ProcessCounters, VolumeInfo};
use crate::cluster::DevCluster;
use lsm_block::{Health, VolumeStatus};
use std::collections::{BTreeMap, BTreeSet};
use xsan_gateway::server::Server;
use xsan_types::{DeviceId, VolumeId};

/// Looks at everything.
pub async fn cluster_status(cluster: &DevCluster, gateway: &Server, nbd: &[String]) -> ClusterStatus {
    let view = cluster.view();
    let statuses = cluster.volumes().statuses();
    let nodes = node_statuses(cluster).await;
    let pools = pool_statuses(cluster);
    let volumes = volume_infos(cluster, gateway, &statuses);
    let mut reasons = Vec::new();
    let mut health = "ok";
    for node in nodes.iter().filter(|node| node.state != "up") {
        health = "degraded";
        let seconds = cluster.env().wall_millis().saturating_sub(node.since_millis) / 1000;
        reasons.push(format!("node {} is down for {seconds} s; its shards are served from the others", node.name));
    }
    for node in nodes.iter().filter(|node| node.failed) {
        health = "degraded";
        reasons.push(format!("the device of node {} failed and takes no more writes", node.name));
    }
    for volume in &volumes {
        let Some(engine) = &volume.engine else { continue };
        if engine.members < engine.members_wanted {
            health = "degraded";
            reasons.push(format!(
                "volume {}: {} of {} journal members; the set grows when nodes return",
                volume.name, engine.members, engine.members_wanted
            ));
        }
        if engine.segments_with_holes > 0 {
            health = "degraded";
            reasons.push(format!(
                "volume {}: {} segments miss positions; they are filled when nodes return",
                volume.name, engine.segments_with_holes
            ));
        }
    }
    for pool in &pools {
        if pool.positions_down > 0 {
            let lost = nodes.iter().filter(|node| node.state != "up").count();
            if lost > pool.tolerates {
                health = "stalled";
                reasons.push(format!(
                    "pool {}: {lost} nodes are down and {} tolerates {}: I/O waits until one returns",
                    pool.name, pool.scheme, pool.tolerates
                ));
            }
        }
    }
    for volume in volumes.iter().filter(|volume| volume.state == "waiting") {
        health = "stalled";
        let reason = volume.reason.as_deref().unwrap_or("too few nodes");
        reasons.push(format!("volume {}: I/O waits: {reason}", volume.name));
    }
    ClusterStatus {
        health: health.to_owned(),
        reasons,
        cluster: view.cluster.to_string(),
        single_host: view.single_host,
        epoch: view.epoch.0,
        io_backend: cluster.backend().to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        nbd: nbd.to_vec(),
        nodes,
        pools,
        counters: process_counters(cluster, &statuses),
        volumes,
    }
}

async fn node_statuses(cluster: &DevCluster) -> Vec<NodeStatus> {
    let mut nodes = Vec::new();
    for node in cluster.nodes() {
        let device = cluster.device_status(node).await.and_then(|devices| devices.into_iter().next());
        nodes.push(NodeStatus {
            name: node.name.clone(),
            state: if device.is_some() { "up" } else { "down" }.to_owned(),
            since_millis: node.since_millis(),
            device: node.device.to_string(),
            capacity: device.map_or(0, |device| device.capacity),
            used: device.map_or(0, |device| device.used),
            shards: device.map_or(0, |device| device.shards),
            members: device.map_or(0, |device| device.members),
            failed: device.is_some_and(|device| device.failed),
        });
    }
    nodes
}

fn pool_statuses(cluster: &DevCluster) -> Vec<PoolStatus> {
    let down: BTreeSet<DeviceId> =
        cluster.nodes().iter().filter(|node| !node.handle.is_up()).map(|node| node.device).collect();
    let view = cluster.view();
    let status = |pool: &raft_meta::Pool| {
        let positions: Vec<_> = pool.table.positions.iter().flatten().copied().collect();
        PoolStatus {
            name: pool.name.as_str().to_owned(),
            scheme: pool.scheme,
            placement_groups: pool.table.positions.len(),
            tolerates: pool.scheme.tolerates(),
            positions_down: positions.iter().flatten().filter(|device| down.contains(device)).count(),
            positions: positions.len(),
            volumes: view.volume_names.values().filter(|&id| view.volumes[id].pool == pool.id).count(),
        }
    };
    view.pools.values().map(status).collect()
}

/// The URI of a volume on a unix socket.
#[must_use]
pub fn unix_uri(name: &str, socket: &std::path::Path) -> String {
    format!("nbd+unix:///{name}?socket={}", socket.display())
}

fn volume_infos(
    cluster: &DevCluster,
    gateway: &Server,
    statuses: &BTreeMap<VolumeId, VolumeStatus>,
) -> Vec<VolumeInfo> {
    let view = cluster.view();
    let socket = cluster.dir().join("nbd.sock");
    let info = |volume: &raft_meta::Volume| {
        let name = volume.name.as_str().to_owned();
        let status = statuses.get(&volume.id);
        let (state, reason) = match status.map(|status| &status.health) {
            None => ("idle", None),
            Some(Health::Serving) => ("serving", None),
            Some(Health::Waiting { reason, .. }) => ("waiting", Some(reason.clone())),
            Some(Health::Fenced(_) | Health::Closed) => ("closed", None),
        };
        VolumeInfo {
            id: volume.id.0,
            pool: view.pools.get(&volume.pool).map_or_else(String::new, |pool| pool.name.as_str().to_owned()),
            size: status.map_or(volume.register().size, |status| status.size),
            ack: volume.ack.to_string(),
            state: state.to_owned(),
            reason,
            clients: gateway.clients(&name).len(),
            generation: volume.register().generation.0,
            uri: unix_uri(&name, &socket),
            engine: status.map(engine_status),
            name,
        }
    };
    view.volume_names.values().filter_map(|&id| view.volume(id)).map(info).collect()
}

fn engine_status(status: &VolumeStatus) -> EngineStatus {
    let counters = status.counters;
    EngineStatus {
        members: status.members.len(),
        members_wanted: status.members_wanted,
        segments: status.segments,
        segments_with_holes: status.segments_with_holes,
        open_segments: status.open_segments,
        delta_bytes: status.delta_bytes,
        reads: counters.reads,
        read_bytes: counters.read_bytes,
        writes: counters.writes,
        write_bytes: counters.write_bytes,
        flushes: counters.flushes,
        batches: counters.batches,
        journal_bytes: counters.journal_bytes,
        row_bytes: counters.row_bytes,
        merge_reads: counters.merge_reads,
        seals: counters.seals,
        checkpoints: counters.checkpoints,
        set_changes: counters.set_changes,
        freed_segments: counters.freed_segments,
    }
}

fn process_counters(cluster: &DevCluster, statuses: &BTreeMap<VolumeId, VolumeStatus>) -> ProcessCounters {
    let mut sums = ProcessCounters::default();
    for status in statuses.values() {
        sums.guest_read_bytes += status.counters.read_bytes;
        sums.guest_write_bytes += status.counters.write_bytes;
    }
    for node in cluster.nodes().iter().filter_map(crate::cluster::dev::DevNode::running) {
        let counters = node.counters();
        sums.device_read_bytes += counters.device_read_bytes;
        sums.device_reads += counters.device_reads;
        sums.device_write_bytes += counters.device_write_bytes;
        sums.device_writes += counters.device_writes;
        sums.device_flushes += counters.device_flushes;
        sums.corrupt_found += counters.corrupt_found;
    }
    sums
}
