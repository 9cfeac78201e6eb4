//! How results look.

use super::Output;
use crate::admin::api::{ClusterStatus, DeviceInfo, MoveStatus, NodeStatus, PoolStatus, Problem, VolumeInfo};
use crate::cluster::events::Event;
use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{CellAlignment, Table};
use serde::Serialize;
use std::io::Write;
use xsan_types::format_bytes;

/// A line on stdout. A reader that has gone away (`xsan status | head`) is no error.
macro_rules! line {
    () => { super::output::put("") };
    ($($part:tt)*) => { super::output::put(&format!($($part)*)) };
}
pub(super) use line;

/// Writes one line.
pub(super) fn put(text: &str) {
    if writeln!(std::io::stdout().lock(), "{text}").is_err() {
        std::process::exit(0);
    }
}

/// One JSON document on stdout.
pub(super) fn json(value: &impl Serialize) {
    match serde_json::to_string_pretty(value) {
        Ok(text) => line!("{text}"),
        Err(error) => eprintln!("xsan: cannot print: {error}"),
    }
}

/// A finished command.
pub(super) fn done(output: Output, value: &impl Serialize, sentence: &str) {
    match output {
        Output::Json => json(value),
        Output::Text => line!("{sentence}"),
    }
}

fn table(header: &[&str], numbers: &[usize], rows: Vec<Vec<String>>) {
    let mut table = Table::new();
    table.load_preset(UTF8_HORIZONTAL_ONLY).set_header(header.to_vec());
    for row in rows {
        table.add_row(row);
    }
    for &column in numbers {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    line!("{table}");
}

pub(super) fn status(status: &ClusterStatus) {
    line!("cluster {}  {}", &status.cluster[..8.min(status.cluster.len())], status.health.to_uppercase());
    for reason in &status.reasons {
        line!("  - {reason}");
    }
    if status.single_host {
        line!("  one host: nodes are failure domains here, the host itself is not protected against");
    }
    line!();
    nodes(&status.nodes);
    pools(&status.pools);
    if status.volumes.is_empty() {
        line!("no volumes yet: xsan volume create vm1 --size 100GiB");
    } else {
        volumes(&status.volumes);
    }
    for told in &status.moves {
        line!("{}", moving(told));
    }
    for address in &status.nbd {
        line!("NBD: {address}");
    }
}

/// One line about data on its way.
pub(super) fn moving(told: &MoveStatus) -> String {
    let (done, total) = (format_bytes(told.done_bytes), format_bytes(told.total_bytes));
    let device = told.device.get(..8).unwrap_or(&told.device);
    let rest = match (&told.waits_for, told.eta_seconds) {
        (Some(reason), _) => format!("waits: {reason}"),
        (None, Some(seconds)) => format!("{}/s, {seconds} s left", format_bytes(told.rate)),
        (None, None) => "begins".to_owned(),
    };
    format!("pool {}: {done} of {total} moved off device {device} of {}: {rest}", told.pool, told.node)
}

pub(super) fn nodes(nodes: &[NodeStatus]) {
    let row = |node: &NodeStatus| {
        let used = if node.state == "up" {
            format!("{} of {}", format_bytes(node.used), format_bytes(node.capacity))
        } else {
            "-".to_owned()
        };
        let state = match (node.failed, node.answers || node.state == "down") {
            (true, _) => "failed".to_owned(),
            (false, true) => node.state.clone(),
            (false, false) => format!("{} (silent)", node.state),
        };
        let metadata = node.metadata.map_or_else(|| "-".to_owned(), |role| role.to_string());
        vec![node.name.clone(), state, used, node.shards.to_string(), node.members.to_string(), metadata]
    };
    table(&["node", "state", "used", "shards", "journals", "metadata"], &[2, 3, 4], nodes.iter().map(row).collect());
}

pub(super) fn problems(problems: &[Problem]) {
    if problems.is_empty() {
        line!("all is well");
    }
    for problem in problems {
        line!("{} {}: {}", problem.severity.to_uppercase(), problem.code, problem.message);
        line!("  {}", problem.advice);
    }
}

/// With the time of day, in UTC: what happened is read beside logs.
pub(super) fn event(event: &Event) {
    let seconds = event.at_millis / 1000;
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    line!("{hour:02}:{minute:02}:{second:02}.{:03}Z  {}", event.at_millis % 1000, event.message);
}

pub(super) fn devices(devices: &[(String, DeviceInfo)]) {
    let row = |(node, device): &(String, DeviceInfo)| {
        let state = match (device.missing, device.failed) {
            (true, _) if device.state == "in" => "missing",
            (_, true) => "failed",
            _ => device.state.as_str(),
        };
        vec![
            device.id.clone(),
            node.clone(),
            state.to_owned(),
            format!("{} of {}", format_bytes(device.used), format_bytes(device.capacity)),
        ]
    };
    table(&["device", "node", "state", "used"], &[3], devices.iter().map(row).collect());
}

pub(super) fn node(node: &NodeStatus) {
    line!("node      {} (id {})", node.name, node.id);
    line!("state     {} ({})", node.state, node.reason);
    line!("answers   {}", if node.answers { "yes" } else { "no" });
    line!("host      {}", node.host);
    if !node.address.is_empty() {
        line!("address   {}", node.address);
    }
    for device in &node.devices {
        let state = match (device.missing, device.failed) {
            (true, _) => ", missing",
            (_, true) => ", failed",
            _ => "",
        };
        let (used, capacity) = (format_bytes(device.used), format_bytes(device.capacity));
        line!("device    {} {used} of {capacity}{state}", device.id);
    }
    line!("shards    {}", node.shards);
    line!("journals  {}", node.members);
    if let Some(role) = node.metadata {
        line!("metadata  {role}");
    }
}

pub(super) fn pools(pools: &[PoolStatus]) {
    let row = |pool: &PoolStatus| {
        let state = if pool.positions_down == 0 {
            "whole".to_owned()
        } else {
            format!("{} of {} positions down", pool.positions_down, pool.positions)
        };
        vec![
            pool.name.clone(),
            pool.scheme.to_string(),
            format!("{} node(s)", pool.tolerates),
            state,
            pool.volumes.to_string(),
        ]
    };
    table(&["pool", "scheme", "survives", "state", "volumes"], &[4], pools.iter().map(row).collect());
}

pub(super) fn volumes(volumes: &[VolumeInfo]) {
    let row = |volume: &VolumeInfo| {
        vec![
            volume.name.clone(),
            format_bytes(volume.size),
            volume.pool.clone(),
            volume.ack.clone(),
            volume.state.clone(),
            volume.clients.to_string(),
            volume.address.as_ref().map_or_else(|| "-".to_owned(), |told| told.address.clone()),
        ]
    };
    let header = ["volume", "size", "pool", "ack", "state", "clients", "address"];
    table(&header, &[1, 5], volumes.iter().map(row).collect());
}

pub(super) fn volume(volume: &VolumeInfo) {
    line!("volume      {} (id {})", volume.name, volume.id);
    line!("size        {} ({} bytes)", format_bytes(volume.size), volume.size);
    line!("pool        {}", volume.pool);
    line!("ack         {}", volume.ack);
    line!("state       {}", volume.state);
    if let Some(reason) = &volume.reason {
        line!("waits for   {reason}");
    }
    if let Some(node) = &volume.node {
        line!("served by   {node}");
    }
    line!("clients     {}", volume.clients);
    line!("generation  {}", volume.generation);
    line!("uri         {}", volume.uri);
    if let Some(address) = &volume.address {
        let held = address.node.as_ref().map_or_else(|| "nobody has it".to_owned(), |node| format!("at {node}"));
        line!("address     {} ({held}): {}", address.address, address.uri);
        if let Some(fault) = &address.fault {
            line!("            {fault}");
        }
    }
    let Some(engine) = &volume.engine else { return };
    line!("journal     {} of {} members", engine.members, engine.members_wanted);
    line!(
        "segments    {} sealed ({} with missing positions), {} open",
        engine.segments,
        engine.segments_with_holes,
        engine.open_segments
    );
    line!("written     {} in {} writes", format_bytes(engine.write_bytes), engine.writes);
    line!("read        {} in {} reads", format_bytes(engine.read_bytes), engine.reads);
    line!("checkpoints {}", engine.checkpoints);
}
