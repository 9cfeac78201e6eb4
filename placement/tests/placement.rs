//! The promises of placement, on random clusters: fair share, minimal movement, no two positions in one failure domain,
//! independence of the order of input.

use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use xsan_placement::{
    Device, DeviceState, FailureDomain, PgTable, PlacementError, Shape, Topology, assign, assign_with_holes, check,
    diff,
};
use xsan_types::{DeviceId, NodeId, PoolId};

const PG_COUNT: u32 = 512;

fn shape(width: usize, failure_domain: FailureDomain) -> Shape {
    Shape { pool: PoolId(1), width, failure_domain, pg_count: PG_COUNT }
}

/// `nodes` nodes, one per host, three hosts per rack, with `disks` disks each; `weight(node, disk)` bytes.
fn cluster(nodes: u32, disks: u32, weight: impl Fn(u32, u32) -> u64) -> Vec<Device> {
    let disk = |node: u32, disk: u32| Device {
        id: DeviceId(u128::from(node) * 0x1_0000_0001 + u128::from(disk)),
        node: NodeId(node),
        host: format!("host{node}"),
        rack: format!("rack{}", node / 3),
        zone: String::new(),
        weight: weight(node, disk),
        state: DeviceState::In,
    };
    (0..nodes).flat_map(|node| (0..disks).map(move |number| (node, number))).map(|(n, d)| disk(n, d)).collect()
}

fn topology(devices: &[Device]) -> Topology {
    Topology::new(devices.to_vec()).unwrap()
}

/// Positions by device.
fn loads(table: &PgTable) -> BTreeMap<DeviceId, usize> {
    let mut loads = BTreeMap::new();
    for device in table.positions.iter().flatten().flatten() {
        *loads.entry(*device).or_default() += 1;
    }
    loads
}

/// A cluster with enough domains for its width: (devices, width, level).
fn any_cluster() -> impl Strategy<Value = (Vec<Device>, usize, FailureDomain)> {
    let level = prop_oneof![
        Just(FailureDomain::Device),
        Just(FailureDomain::Node),
        Just(FailureDomain::Host),
        Just(FailureDomain::Rack)
    ];
    (6u32..30, 1u32..5, prop::collection::vec(1u64..5, 1..40), level, any::<prop::sample::Index>()).prop_map(
        |(nodes, disks, weights, level, width)| {
            let devices = cluster(nodes, disks, |node, disk| {
                weights[(node * disks + disk) as usize % weights.len()] * 1_000_000_000_000
            });
            let domains = topology(&devices).domain_count(level);
            let width = 1 + width.index(domains.min(12));
            (devices, width, level)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_group_is_full_in_separate_domains_and_every_device_has_its_share(
        (devices, width, level) in any_cluster()
    ) {
        let topology = topology(&devices);
        let table = assign(&topology, shape(width, level), None).unwrap();
        let report = check(&topology, &table);
        prop_assert_eq!(&report.violations, &[]);
        prop_assert_eq!(report.holes, 0);
        // With hardly more domains than positions, hashing has few choices and evening out needs chains of swaps.
        let tolerated = if topology.domain_count(level) >= width * 3 / 2 { 0.03 } else { 0.10 };
        for load in &report.loads {
            let off = (f64::from(load.positions) - load.fair).abs();
            prop_assert!(off <= 3.0 + tolerated * load.fair, "{load:?}");
        }
    }

    #[test]
    fn the_order_of_input_changes_nothing((devices, width, level) in any_cluster(), seed in any::<u64>()) {
        let mut shuffled = devices.clone();
        shuffled.sort_by_key(|device| (device.id.0 as u64 ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let shape = shape(width, level);
        let table = assign(&topology(&devices), shape, None).unwrap();
        prop_assert_eq!(assign(&topology(&shuffled), shape, None).unwrap(), table.clone());
        // What is fair stays as it is.
        prop_assert_eq!(assign(&topology(&shuffled), shape, Some(&table)).unwrap(), table);
    }

    #[test]
    fn when_a_device_leaves_only_its_own_positions_are_filled_anew(
        (devices, width, level) in any_cluster(),
        who in any::<prop::sample::Index>(),
        drained in any::<bool>(),
    ) {
        let shape = shape(width, level);
        let before = assign(&topology(&devices), shape, None).unwrap();
        let mut left = devices.clone();
        let who = who.index(devices.len());
        let gone = devices[who].id;
        if drained { left[who].state = DeviceState::Out } else { left.remove(who); }
        let after_topology = topology(&left);
        if after_topology.domain_count(level) < width {
            return Ok(());
        }
        let after = assign(&after_topology, shape, Some(&before)).unwrap();
        let moves = diff(&before, &after, |_| 1).unwrap();
        prop_assert!(moves.moves.iter().all(|step| step.from == Some(gone)));
        prop_assert_eq!(moves.moves.len(), loads(&before).get(&gone).copied().unwrap_or(0));
        let report = check(&after_topology, &after);
        prop_assert_eq!(&report.violations, &[]);
        prop_assert_eq!(report.holes, 0);
    }

    #[test]
    fn when_a_device_joins_it_takes_its_share_and_nothing_else_moves(
        (devices, width, level) in any_cluster(),
        weight in 1u64..5,
        new_node in any::<bool>(),
    ) {
        let shape = shape(width, level);
        let before = assign(&topology(&devices), shape, None).unwrap();
        let mut more = devices.clone();
        let mut joined = devices[0].clone();
        joined.id = DeviceId(u128::MAX);
        joined.weight = weight * 1_000_000_000_000;
        if new_node {
            (joined.node, joined.host, joined.rack) = (NodeId(1000), "new".into(), "new".into());
        }
        let (joined_id, more_topology) = (joined.id, { more.push(joined); topology(&more) });
        let after = assign(&more_topology, shape, Some(&before)).unwrap();
        let moves = diff(&before, &after, |_| 1).unwrap();
        prop_assert!(moves.moves.iter().all(|step| step.to == Some(joined_id) && step.from.is_some()));
        let report = check(&more_topology, &after);
        prop_assert_eq!(&report.violations, &[]);
        let load = report.loads.iter().find(|load| load.device == joined_id).unwrap();
        prop_assert!(f64::from(load.positions) <= load.fair + 1.0, "{load:?}");
        prop_assert!(f64::from(load.positions) >= 0.9 * load.fair - 2.0, "{load:?}");
    }

    #[test]
    fn a_node_that_leaves_and_returns_moves_only_its_share_twice(
        nodes in 5u32..20, disks in 1u32..4, who in any::<prop::sample::Index>()
    ) {
        let devices = cluster(nodes, disks, |_, _| 1 << 40);
        let shape = shape(4, FailureDomain::Host);
        let before = assign(&topology(&devices), shape, None).unwrap();
        let node = NodeId(u32::try_from(who.index(nodes as usize)).unwrap());
        let own: BTreeSet<_> = devices.iter().filter(|device| device.node == node).map(|device| device.id).collect();
        let left: Vec<_> = devices.iter().filter(|device| device.node != node).cloned().collect();
        let without = assign(&topology(&left), shape, Some(&before)).unwrap();
        let out = diff(&before, &without, |_| 1).unwrap();
        prop_assert!(out.moves.iter().all(|step| own.contains(&step.from.unwrap())));
        let again = assign(&topology(&devices), shape, Some(&without)).unwrap();
        let back = diff(&without, &again, |_| 1).unwrap();
        prop_assert!(back.moves.iter().all(|step| own.contains(&step.to.unwrap())));
        let share = f64::from(PG_COUNT) * 4.0 / f64::from(nodes);
        prop_assert!((back.moves.len() as f64) <= share + f64::from(disks), "{} of {share}", back.moves.len());
        prop_assert!((back.moves.len() as f64) >= 0.95 * share - f64::from(disks), "{} of {share}", back.moves.len());
        prop_assert_eq!(check(&topology(&devices), &again).violations, []);
    }
}

#[test]
fn a_long_life_keeps_shares_fair_and_moves_little() {
    // Nodes of different sizes come and go; the sum of moves stays near the sum of what came and went.
    let shape = shape(6, FailureDomain::Host);
    let mut devices = cluster(12, 2, |node, _| (1 + u64::from(node % 3)) << 40);
    let mut table = assign(&topology(&devices), shape, None).unwrap();
    let (mut moved, mut due) = (0.0, 0.0);
    for round in 0..40u32 {
        if round % 2 == 0 {
            let mut fresh = cluster(100 + round + 1, 2, |node, _| (1 + u64::from(node % 3)) << 40);
            devices.extend(fresh.split_off(fresh.len() - 2));
        } else {
            let gone = devices[(round * 7) as usize % devices.len()].node;
            due += table
                .positions
                .iter()
                .flatten()
                .flatten()
                .filter(|id| devices.iter().any(|device| device.id == **id && device.node == gone))
                .count() as f64;
            devices.retain(|device| device.node != gone);
        }
        let now = topology(&devices);
        let next = assign(&now, shape, Some(&table)).unwrap();
        let report = check(&now, &next);
        assert_eq!(report.violations, []);
        assert_eq!(report.holes, 0);
        assert!(report.ratio_max() < 1.15 && report.ratio_min() > 0.85, "round {round}: {report:?}");
        if round % 2 == 0 {
            due += report
                .loads
                .iter()
                .filter(|load| load.device.0 >> 32 == u128::from(100 + round))
                .map(|load| load.fair)
                .sum::<f64>();
        }
        moved += diff(&table, &next, |_| 1).unwrap().moves.len() as f64;
        table = next;
    }
    assert!(moved <= due * 1.05, "{moved} positions moved, {due} had to");
}

#[test]
fn too_few_domains_say_how_many_there_are_and_are_needed() {
    let devices = cluster(5, 2, |_, _| 1);
    let refused = assign(&topology(&devices), shape(6, FailureDomain::Host), None);
    let expected = PlacementError::TooFewDomains { domain: FailureDomain::Host, found: 5, needed: 6 };
    assert_eq!(refused, Err(expected.clone()));
    assert_eq!(expected.to_string(), "5 failure domains (host) have devices, 6 are needed");
    assert!(assign(&topology(&devices), shape(6, FailureDomain::Device), None).is_ok());
}

#[test]
fn a_cluster_without_spare_domains_keeps_holes_and_fills_them_when_a_node_joins() {
    let devices = cluster(6, 1, |_, _| 1);
    let shape = shape(6, FailureDomain::Host);
    let whole = assign(&topology(&devices), shape, None).unwrap();
    let gone = devices[2].id;
    let left: Vec<_> = devices.iter().filter(|device| device.id != gone).cloned().collect();
    assert!(matches!(
        assign(&topology(&left), shape, Some(&whole)),
        Err(PlacementError::TooFewDomains { found: 5, needed: 6, .. })
    ));
    let holed = assign_with_holes(&topology(&left), shape, 4, Some(&whole)).unwrap();
    assert_eq!(check(&topology(&left), &holed).holes, u64::from(PG_COUNT));
    for (before, after) in whole.positions.iter().flatten().zip(holed.positions.iter().flatten()) {
        assert_eq!(*after, before.filter(|id| *id != gone));
    }
    let mut joined = left.clone();
    joined.push(Device { id: DeviceId(77), node: NodeId(77), host: "new".into(), ..devices[2].clone() });
    let full = assign(&topology(&joined), shape, Some(&holed)).unwrap();
    for (before, after) in whole.positions.iter().flatten().zip(full.positions.iter().flatten()) {
        assert_eq!(*after, before.map(|id| if id == gone { DeviceId(77) } else { id }));
    }
}

#[test]
fn a_growing_pool_keeps_its_groups_and_a_wrong_previous_table_is_refused() {
    let now = topology(&cluster(9, 1, |_, _| 1));
    let small = Shape { pg_count: 64, ..shape(3, FailureDomain::Host) };
    let before = assign(&now, small, None).unwrap();
    let after = assign(&now, Shape { pg_count: 128, ..small }, Some(&before)).unwrap();
    assert_eq!(after.positions[..64], before.positions[..]);
    let report = check(&now, &after);
    assert!(report.violations.is_empty() && report.ratio_max() < 1.06, "{report:?}");
    for wrong in [Shape { pg_count: 32, ..small }, Shape { width: 4, ..small }, Shape { pool: PoolId(2), ..small }] {
        assert_eq!(assign(&now, wrong, Some(&before)), Err(PlacementError::PreviousShape));
    }
    assert_eq!(assign(&now, Shape { width: 65, ..small }, None), Err(PlacementError::Width { width: 65 }));
    assert_eq!(assign(&now, Shape { pg_count: 0, ..small }, None), Err(PlacementError::PgCount { count: 0 }));
}

#[test]
fn a_host_that_moves_into_the_domain_of_another_gives_up_the_clash() {
    let mut devices = cluster(12, 1, |_, _| 1);
    let shape = shape(3, FailureDomain::Rack);
    let before = assign(&topology(&devices), shape, None).unwrap();
    devices[0].rack = "rack1".into();
    let now = topology(&devices);
    let after = assign(&now, shape, Some(&before)).unwrap();
    assert_eq!(check(&now, &after).violations, []);
}
