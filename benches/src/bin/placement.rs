//! Placement at scale: 1,000 nodes, 100,000 placement groups. Prints, per scheme and layout, the time of a fresh table, how
//! far devices are from their fair share, and what a lost and a joined node move compared with what they must.
//!
//! Run: `cargo run --release -p xsan-benches --bin placement [NODES [GROUPS]]`. Needs about 100 MiB and no disk.
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "a benchmark measures the real clock")]

use std::process::ExitCode;
use std::time::Instant;
use xsan_placement::{
    Device, DeviceState, FailureDomain, PgTable, PlacementError, Shape, Topology, assign, check, diff,
};
use xsan_types::{DeviceId, NodeId, PoolId};

const TIB: u64 = 1 << 40;

/// A cluster layout and a scheme.
struct Case {
    name: &'static str,
    disks: u32,
    /// Capacity of a node's disks in TiB.
    weight: fn(u32) -> u64,
    width: usize,
    failure_domain: FailureDomain,
}

const CASES: [Case; 6] = [
    Case { name: "4+2, equal nodes", disks: 1, weight: |_| 4, width: 6, failure_domain: FailureDomain::Host },
    Case { name: "8+3, equal nodes", disks: 1, weight: |_| 4, width: 11, failure_domain: FailureDomain::Host },
    Case { name: "replica 3, equal nodes", disks: 1, weight: |_| 4, width: 3, failure_domain: FailureDomain::Host },
    Case {
        name: "4+2, nodes 1:2:4",
        disks: 1,
        weight: |n| 1 << (n % 3),
        width: 6,
        failure_domain: FailureDomain::Host,
    },
    Case { name: "4+2, 10 disks a node", disks: 10, weight: |_| 4, width: 6, failure_domain: FailureDomain::Host },
    Case { name: "4+2 over racks of 20", disks: 1, weight: |_| 4, width: 6, failure_domain: FailureDomain::Rack },
];

fn node(case: &Case, number: u32) -> impl Iterator<Item = Device> {
    let weight = (case.weight)(number) * TIB;
    (0..case.disks).map(move |disk| Device {
        id: DeviceId(u128::from(number) << 64 | u128::from(disk)),
        node: NodeId(number),
        host: format!("host{number}"),
        rack: format!("rack{}", number / 20),
        zone: String::new(),
        weight,
        state: DeviceState::In,
    })
}

/// A table for a changed cluster, and: seconds, positions moved, positions that had to move.
fn change(
    topology: &Topology,
    shape: Shape,
    before: &PgTable,
    due: impl Fn(&PgTable) -> f64,
) -> Result<(PgTable, f64, f64), PlacementError> {
    let start = Instant::now();
    let after = assign(topology, shape, Some(before))?;
    let seconds = start.elapsed().as_secs_f64();
    let moved = diff(before, &after, |_| 1)?.moves.len() as f64;
    let ratio = moved / due(&after);
    Ok((after, seconds, ratio))
}

fn run(case: &Case, nodes: u32, groups: u32) -> Result<(), PlacementError> {
    let shape = Shape { pool: PoolId(1), width: case.width, failure_domain: case.failure_domain, pg_count: groups };
    let mut devices: Vec<Device> = (0..nodes).flat_map(|number| node(case, number)).collect();
    let topology = Topology::new(devices.clone())?;
    let start = Instant::now();
    let table = assign(&topology, shape, None)?;
    let seconds = start.elapsed().as_secs_f64();
    let report = check(&topology, &table);

    let lost = NodeId(nodes / 2);
    devices.retain(|device| device.node != lost);
    let smaller = Topology::new(devices.clone())?;
    let held = |table: &PgTable, number: NodeId| {
        table.positions.iter().flatten().flatten().filter(|id| id.0 >> 64 == u128::from(number.0)).count() as f64
    };
    let due = held(&table, lost);
    let (without, loss_seconds, loss_ratio) = change(&smaller, shape, &table, |_| due)?;
    let loss = check(&smaller, &without);

    devices.extend(node(case, nodes));
    let larger = Topology::new(devices)?;
    let joined = NodeId(nodes);
    let fair = |_: &PgTable| {
        let loads = check(&larger, &without).loads;
        loads.iter().filter(|load| load.device.0 >> 64 == u128::from(joined.0)).map(|load| load.fair).sum()
    };
    let (with, join_seconds, join_ratio) = change(&larger, shape, &without, fair)?;
    let join = check(&larger, &with);
    let broken = report.violations.len() + loss.violations.len() + join.violations.len();
    println!(
        "{:24} {seconds:7.2} {:7.3} {:7.3} | {loss_seconds:7.2} {loss_ratio:7.3} {:7.3} | {join_seconds:7.2} {join_ratio:7.3} {:7.3} | {broken:6}",
        case.name,
        report.ratio_max(),
        report.ratio_min(),
        loss.ratio_max(),
        join.ratio_max(),
    );
    Ok(())
}

fn main() -> ExitCode {
    let number = |at: usize, default| std::env::args().nth(at).and_then(|text| text.parse().ok()).unwrap_or(default);
    let (nodes, groups) = (number(1, 1_000), number(2, 100_000));
    println!(
        "{nodes} nodes, {groups} placement groups. max, min: positions of a device over its fair share by weight."
    );
    println!(
        "moved: positions that changed their device over those that had to (held by the lost, fair share of the joined)."
    );
    println!(
        "{:24} {:>7} {:>7} {:>7} | {:>7} {:>7} {:>7} | {:>7} {:>7} {:>7} | {:>6}",
        "", "fresh s", "max", "min", "loss s", "moved", "max", "join s", "moved", "max", "broken"
    );
    for case in &CASES {
        if let Err(error) = run(case, nodes, groups) {
            eprintln!("{}: {error}", case.name);
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
