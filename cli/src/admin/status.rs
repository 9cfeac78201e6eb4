//! The truth about a cluster, computed from its parts when asked; nothing here is echoed from what was believed before.

use super::api::{
    AddressInfo, ClusterStatus, DeviceInfo, MoveStatus, NodeStatus, PoolStatus, Problem, ProcessCounters, VolumeInfo,
};
use crate::cluster::addresses::NBD_PORT;
use crate::cluster::carry::CarryReport;
use crate::cluster::facts::{DeviceReport, NodeFacts};
use crate::cluster::maps::answers;
use crate::cluster::{Cluster, Facts};
use raft_meta::NodeState;
use std::collections::BTreeSet;
use xsan_placement::DeviceState;
use xsan_types::DeviceId;

/// Looks at everything.
pub async fn cluster_status(cluster: &dyn Cluster, nbd: &[String]) -> ClusterStatus {
    let facts = cluster.facts().await;
    let view = &facts.view;
    let nodes: Vec<NodeStatus> = facts.nodes.iter().map(|node| node_status(&facts, node)).collect();
    let (pools, volumes) = (pool_statuses(&facts), volume_infos(&facts));
    let now_millis = cluster.env().wall_millis();
    let moves = move_statuses(&facts);
    let mut problems = warnings(&nodes, &volumes, now_millis);
    for told in &moves {
        if let Some(reason) = &told.waits_for {
            let text = format!("data of device {} of node {} does not move on: {reason}", told.device, told.node);
            let advice = "bring the nodes it speaks of back; it goes on by itself";
            problems.push(problem("MOVE_WAITS", "warning", &told.device, text, advice));
        }
    }
    let mut errors = errors(&nodes, &pools, &volumes);
    if !facts.metadata_answers {
        let text =
            "the metadata does not answer: too few of its voters are up; what is told here may be old".to_owned();
        let advice = "bring nodes back: volumes that are served go on, and nothing can be moved or made until then";
        errors.push(problem("METADATA_SILENT", "error", "metadata", text, advice));
    }
    let health = match (errors.is_empty(), problems.is_empty()) {
        (false, _) => "stalled",
        (true, false) => "degraded",
        (true, true) => "ok",
    };
    problems.extend(errors);
    ClusterStatus {
        health: health.to_owned(),
        reasons: problems.iter().map(|problem| problem.message.clone()).collect(),
        problems,
        cluster: view.cluster.to_string(),
        single_host: view.single_host,
        epoch: view.epoch.0,
        io_backend: facts.io_backend.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        nbd: nbd.to_vec(),
        counters: counters(&facts),
        moves,
        nodes,
        pools,
        volumes,
    }
}

/// Whether a node does what it is for.
fn serves(node: &NodeStatus) -> bool {
    node.answers && node.state != "down" && node.state != "joining"
}

/// Devices fuller than this are told of, in percent.
const FULL_PERCENT: u64 = 90;

fn problem(code: &str, severity: &str, subject: &str, message: String, advice: &str) -> Problem {
    let advice = advice.to_owned();
    Problem { code: code.to_owned(), severity: severity.to_owned(), subject: subject.to_owned(), message, advice }
}

/// What is served with less redundancy than wanted, or will soon not be served.
fn warnings(nodes: &[NodeStatus], volumes: &[VolumeInfo], now_millis: u64) -> Vec<Problem> {
    let mut found = Vec::new();
    let mut warn = |code, subject: &str, message, advice| {
        found.push(problem(code, "warning", subject, message, advice));
    };
    for node in nodes {
        let name = node.name.as_str();
        let seconds = now_millis.saturating_sub(node.since_millis) / 1000;
        match node.state.as_str() {
            _ if serves(node) => {}
            "joining" => warn(
                "NODE_JOINING",
                name,
                format!("node {name} is joining for {seconds} s; it holds no data yet"),
                "if it stays so, look at its log: its devices may not have been opened",
            ),
            "down" => warn(
                "NODE_DOWN",
                name,
                format!("node {name} is down for {seconds} s ({}); its shards are served from the others", node.reason),
                "bring it back; if it will not return, let a successor join with `xsan node join --replace`",
            ),
            state => warn(
                "NODE_SILENT",
                name,
                format!("node {name} is {state} and does not answer"),
                "look at its host and network; it is called down soon",
            ),
        }
        let why: Vec<String> = node.unopened.iter().map(|disk| format!("; {}", disk.why)).collect();
        if !why.is_empty() && !node.devices.iter().any(|device| device.missing) {
            warn(
                "DEVICE_MISSING",
                name,
                format!("node {name} cannot open a disk of its settings{}", why.concat()),
                "`xsan device add PATH` once it is there, or remove its line from the node's xsan.toml",
            );
        }
        for missing in node.devices.iter().filter(|device| device.missing) {
            warn(
                "DEVICE_MISSING",
                name,
                format!("node {name} does not serve its device {}{}", missing.id, why.concat()),
                "bring its disk back and say so: `xsan device add PATH`; if it is lost: `xsan device remove DEVICE`",
            );
        }
        if node.failed {
            let text = format!("a device of node {name} failed and takes no more writes");
            warn(
                "DEVICE_FAILED",
                name,
                text,
                "take it out with `xsan device replace DEVICE PATH`, or `xsan device remove DEVICE`",
            );
        }
        for device in node.devices.iter().filter(|device| device.capacity > 0) {
            let percent = device.used * 100 / device.capacity;
            if percent >= FULL_PERCENT {
                let text = format!("a device of node {name} is {percent} % full");
                warn(
                    "DEVICE_FULL",
                    name,
                    text,
                    "delete volumes, trim inside guests, or add devices: `xsan device add PATH`",
                );
            }
        }
    }
    for volume in volumes {
        if let Some((address, fault)) =
            volume.address.as_ref().and_then(|told| Some((&told.address, told.fault.as_ref()?)))
        {
            let text = format!("volume {}: its service address {address} does not work: {fault}", volume.name);
            warn(
                "ADDRESS_FAULT",
                &volume.name,
                text,
                "see docs/hosts.md, \"Service addresses\": rights of the daemon, the subnet's interface, nodes that are up",
            );
        }
    }
    for volume in volumes {
        let (name, Some(engine)) = (volume.name.as_str(), &volume.engine) else { continue };
        if engine.members < engine.members_wanted {
            let text = format!(
                "volume {name}: {} of {} journal members; the set grows when nodes return",
                engine.members, engine.members_wanted
            );
            warn("JOURNAL_SHORT", name, text, "bring nodes back");
        }
        if engine.segments_with_holes > 0 {
            let text = format!(
                "volume {name}: {} segments miss positions; they are filled when nodes return",
                engine.segments_with_holes
            );
            warn("POSITIONS_MISSING", name, text, "bring nodes back, or replace those that are lost");
        } else if engine.unchecked {
            let text = format!("volume {name}: nodes have come or gone; what they hold is being compared");
            warn(
                "POSITIONS_UNCHECKED",
                name,
                text,
                "wait some seconds: until then nobody knows whether anything is missing",
            );
        }
    }
    found
}

/// What waits or fails.
fn errors(nodes: &[NodeStatus], pools: &[PoolStatus], volumes: &[VolumeInfo]) -> Vec<Problem> {
    let mut found = Vec::new();
    let lost = nodes.iter().filter(|node| !serves(node) && node.state != "joining").count();
    for pool in pools.iter().filter(|pool| pool.positions_down > 0 && lost > pool.tolerates) {
        let text = format!(
            "pool {}: {lost} nodes are down and {} tolerates {}: I/O waits until one returns",
            pool.name, pool.scheme, pool.tolerates
        );
        found.push(problem("POOL_STALLED", "error", &pool.name, text, "bring nodes back: nothing is lost by waiting"));
    }
    for volume in volumes.iter().filter(|volume| volume.state == "waiting") {
        let reason = volume.reason.as_deref().unwrap_or("too few nodes");
        let text = format!("volume {}: I/O waits: {reason}", volume.name);
        found.push(problem(
            "VOLUME_WAITS",
            "error",
            &volume.name,
            text,
            "bring nodes back: requests go on by themselves",
        ));
    }
    found
}

fn node_status(facts: &Facts, node: &NodeFacts) -> NodeStatus {
    let record = facts.view.nodes.get(&node.id);
    let told: &[DeviceReport] = node.report.as_ref().map_or(&[], |report| &report.devices);
    let mut devices: Vec<DeviceInfo> = told
        .iter()
        .map(|device| DeviceInfo {
            id: device.id.to_string(),
            capacity: device.capacity,
            used: device.used,
            failed: device.failed,
            missing: false,
            state: device_state(facts, device.id),
        })
        .collect();
    let untold = facts.view.devices_of(node.id).filter(|device| !told.iter().any(|known| known.id == device.id));
    devices.extend(untold.map(|device| DeviceInfo {
        id: device.id.to_string(),
        capacity: device.capacity,
        used: 0,
        failed: false,
        missing: facts.is_missing(device.id),
        state: device_state(facts, device.id),
    }));
    let sum = |field: fn(&DeviceReport) -> u64| node.report.iter().flat_map(|report| &report.devices).map(field).sum();
    NodeStatus {
        name: record.map_or_else(|| node.id.to_string(), |record| record.name.to_string()),
        id: node.id.0,
        state: node.state.to_string(),
        since_millis: node.since_millis,
        reason: node.reason.clone(),
        answers: node.report.is_some(),
        host: record.map_or_else(String::new, |record| record.host.to_string()),
        address: node.address.clone(),
        metadata: node.metadata,
        device: devices.first().map_or_else(String::new, |device| device.id.clone()),
        capacity: sum(|device| device.capacity),
        used: sum(|device| device.used),
        shards: sum(|device| device.shards),
        members: sum(|device| device.members),
        failed: devices.iter().any(|device| device.failed),
        unopened: node.report.as_ref().map_or_else(Vec::new, |report| report.unopened.clone()),
        devices,
    }
}

fn device_state(facts: &Facts, id: DeviceId) -> String {
    let view = &facts.view;
    let is_placed = || {
        let tables = view.pools.values().flat_map(|pool| std::iter::once(&pool.table).chain(&pool.next));
        tables.into_iter().any(|table| table.holds(id))
    };
    match view.devices.get(&id).map(|device| device.state) {
        Some(DeviceState::In) => "in",
        Some(DeviceState::Out) if is_placed() => "leaving",
        Some(DeviceState::Out) | None => "empty",
    }
    .to_owned()
}

/// What moves, from where, how far it is.
fn move_statuses(facts: &Facts) -> Vec<MoveStatus> {
    let view = &facts.view;
    let mut found = Vec::new();
    for pool in view.pools.values() {
        for device in view.devices_to_empty(pool) {
            let node = view.devices.get(&device).map(|record| record.node);
            let of_it = |carry: &&CarryReport| carry.pool == pool.id && carry.device == device;
            let carry = facts.reports().flat_map(|report| &report.carries).find(of_it).cloned().unwrap_or_default();
            let rate = (carry.done_bytes * 1000).checked_div(carry.running_millis).unwrap_or(0);
            let is_away = facts.nodes.iter().any(|facts| Some(facts.id) == node && facts.report.is_none());
            let away = "its node is away: what it held is rebuilt from the others".to_owned();
            found.push(MoveStatus {
                pool: pool.name.to_string(),
                device: device.to_string(),
                node: node.and_then(|id| view.node(id)).map_or_else(String::new, |node| node.name.to_string()),
                done_bytes: carry.done_bytes,
                total_bytes: carry.total_bytes,
                rate,
                eta_seconds: carry.total_bytes.saturating_sub(carry.done_bytes).checked_div(rate),
                waits_for: if is_away { Some(away) } else { carry.waits_for },
            });
        }
    }
    found
}

fn pool_statuses(facts: &Facts) -> Vec<PoolStatus> {
    let view = &facts.view;
    let is_lost =
        |node: &NodeFacts| node.report.is_none() || !(answers(node.state) || node.state == NodeState::Joining);
    let lost: BTreeSet<DeviceId> = facts
        .nodes
        .iter()
        .filter(|node| is_lost(node))
        .flat_map(|node| view.devices_of(node.id))
        .map(|device| device.id)
        .collect();
    let status = |pool: &raft_meta::Pool| {
        let positions: Vec<_> = pool.table.positions.iter().flatten().copied().collect();
        PoolStatus {
            name: pool.name.as_str().to_owned(),
            scheme: pool.scheme,
            placement_groups: pool.table.positions.len(),
            tolerates: pool.scheme.tolerates(),
            positions_down: positions.iter().flatten().filter(|device| lost.contains(device)).count(),
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

fn volume_infos(facts: &Facts) -> Vec<VolumeInfo> {
    let view = &facts.view;
    let socket = facts.dir.join("nbd.sock");
    let info = |volume: &raft_meta::Volume| {
        let name = volume.name.as_str().to_owned();
        let told = facts.volume(volume.id);
        let server = facts.nodes.iter().find(|node| {
            node.report.as_ref().and_then(|report| report.volumes.get(&volume.id)).is_some_and(|v| v.state == "serving")
        });
        VolumeInfo {
            id: volume.id.0,
            pool: view.pools.get(&volume.pool).map_or_else(String::new, |pool| pool.name.as_str().to_owned()),
            size: told.map_or(volume.register().size, |told| told.size),
            ack: volume.ack.to_string(),
            state: told.map_or("idle", |told| told.state.as_str()).to_owned(),
            reason: told.and_then(|told| told.reason.clone()),
            node: server
                .filter(|node| !node.address.is_empty())
                .and_then(|node| view.node(node.id))
                .map(|node| node.name.to_string()),
            clients: told.map_or(0, |told| told.clients),
            generation: volume.register().generation.0,
            uri: unix_uri(&name, &socket),
            address: address_info(facts, volume),
            engine: told.map(|told| told.engine.clone()),
            name,
        }
    };
    view.volume_names.values().filter_map(|&id| view.volume(id)).map(info).collect()
}

/// Where a volume is reached on the network, and by whom it is held there.
fn address_info(facts: &Facts, volume: &raft_meta::Volume) -> Option<AddressInfo> {
    let view = &facts.view;
    let record = view.addresses.get(&volume.id)?;
    let place = &record.place;
    let told = facts.nodes.iter().filter_map(|node| Some((node, node.report.as_ref()?.addresses.get(&volume.id)?)));
    let told: Vec<_> = told.collect();
    let name = |node: &NodeFacts| view.node(node.id).map_or_else(String::new, |node| node.name.to_string());
    let holder = told.iter().find(|(_, report)| report.interface.is_some());
    let fault = match holder {
        Some((_, report)) => report.fault.clone(),
        None => {
            let faults =
                told.iter().filter_map(|(node, report)| Some(format!("{}: {}", name(node), report.fault.as_ref()?)));
            let faults: Vec<String> = faults.collect();
            Some(if faults.is_empty() { "no node has it yet".to_owned() } else { faults.join("; ") })
        }
    };
    let port = holder.map_or(NBD_PORT, |(_, report)| report.port);
    Some(AddressInfo {
        address: place.to_string(),
        interface: place.interface.clone(),
        node: holder.map(|(node, _)| name(node)),
        uri: format!("nbd://{}/{}", std::net::SocketAddr::new(place.address, port), volume.name),
        fault,
        clients: record.clients.iter().map(ToString::to_string).collect(),
    })
}

fn counters(facts: &Facts) -> ProcessCounters {
    let mut sums = ProcessCounters::default();
    for told in facts.reports().map(|report| report.counters) {
        sums.guest_read_bytes += told.guest_read_bytes;
        sums.guest_write_bytes += told.guest_write_bytes;
        sums.device_read_bytes += told.device_read_bytes;
        sums.device_reads += told.device_reads;
        sums.device_write_bytes += told.device_write_bytes;
        sums.device_writes += told.device_writes;
        sums.device_flushes += told.device_flushes;
        sums.corrupt_found += told.corrupt_found;
    }
    sums
}
