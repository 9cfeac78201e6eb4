//! How results look.

use super::Output;
use crate::admin::api::{ClusterStatus, NodeStatus, PoolStatus, VolumeInfo};
use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{CellAlignment, Table};
use serde::Serialize;
use xsan_types::format_bytes;

/// One JSON document on stdout.
pub(super) fn json(value: &impl Serialize) {
    match serde_json::to_string_pretty(value) {
        Ok(text) => println!("{text}"),
        Err(error) => eprintln!("xsan: cannot print: {error}"),
    }
}

/// A finished command.
pub(super) fn done(output: Output, value: &impl Serialize, sentence: &str) {
    match output {
        Output::Json => json(value),
        Output::Text => println!("{sentence}"),
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
    println!("{table}");
}

pub(super) fn status(status: &ClusterStatus) {
    println!("cluster {}  {}", &status.cluster[..8.min(status.cluster.len())], status.health.to_uppercase());
    for reason in &status.reasons {
        println!("  - {reason}");
    }
    if status.single_host {
        println!("  one host: nodes are failure domains here, the host itself is not protected against");
    }
    println!();
    nodes(&status.nodes);
    pools(&status.pools);
    if status.volumes.is_empty() {
        println!("no volumes yet: xsan volume create vm1 --size 100GiB");
    } else {
        volumes(&status.volumes);
    }
    for address in &status.nbd {
        println!("NBD: {address}");
    }
}

pub(super) fn nodes(nodes: &[NodeStatus]) {
    let row = |node: &NodeStatus| {
        let used = if node.state == "up" {
            format!("{} of {}", format_bytes(node.used), format_bytes(node.capacity))
        } else {
            "-".to_owned()
        };
        let state = if node.failed { "failed".to_owned() } else { node.state.clone() };
        vec![node.name.clone(), state, used, node.shards.to_string(), node.members.to_string()]
    };
    table(&["node", "state", "used", "shards", "journals"], &[2, 3, 4], nodes.iter().map(row).collect());
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
        ]
    };
    table(&["volume", "size", "pool", "ack", "state", "clients"], &[1, 5], volumes.iter().map(row).collect());
}

pub(super) fn volume(volume: &VolumeInfo) {
    println!("volume      {} (id {})", volume.name, volume.id);
    println!("size        {} ({} bytes)", format_bytes(volume.size), volume.size);
    println!("pool        {}", volume.pool);
    println!("ack         {}", volume.ack);
    println!("state       {}", volume.state);
    if let Some(reason) = &volume.reason {
        println!("waits for   {reason}");
    }
    println!("clients     {}", volume.clients);
    println!("generation  {}", volume.generation);
    println!("uri         {}", volume.uri);
    let Some(engine) = &volume.engine else { return };
    println!("journal     {} of {} members", engine.members, engine.members_wanted);
    println!(
        "segments    {} sealed ({} with missing positions), {} open",
        engine.segments, engine.segments_with_holes, engine.open_segments
    );
    println!("written     {} in {} writes", format_bytes(engine.write_bytes), engine.writes);
    println!("read        {} in {} reads", format_bytes(engine.read_bytes), engine.reads);
    println!("checkpoints {}", engine.checkpoints);
}
