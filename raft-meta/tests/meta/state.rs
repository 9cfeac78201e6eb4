//! Nodes, devices, pools, names, the epoch.

use crate::support::{CLUSTER, create_pool, create_volume, device, name, nodes, state_after, whole_cluster};
use raft_meta::{AckPolicy, Command, MetaError, MetaState, NodeState, Outcome, VOLUME_BYTES_MAX};
use xsan_placement::{DeviceState, FailureDomain, PlacementError, check};
use xsan_types::{Epoch, ErrorKind, NodeId, PoolId, VolumeId};

fn refuse(state: &mut MetaState, command: &Command, expected: &MetaError) {
    let before = state.clone();
    assert_eq!(state.apply(command).as_ref(), Err(expected), "{command:?}");
    assert_eq!(*state, before, "a refused command changes nothing: {command:?}");
}

#[test]
fn a_pool_is_placed_over_the_nodes_that_serve() {
    let state = state_after(&whole_cluster());
    let pool = state.pool_named("p").unwrap();
    assert_eq!((pool.failure_domain, pool.table.width, pool.table.positions.len()), (FailureDomain::Host, 6, 32));
    let report = check(&state.topology().unwrap(), &pool.table);
    assert!(report.violations.is_empty() && report.holes == 0 && report.loads.len() == 6);
    let volume = state.volume_named("vm1").unwrap();
    assert_eq!((volume.id, volume.pool, volume.ack), (VolumeId(1), PoolId(1), AckPolicy::Replicated));
    assert_eq!((volume.register().version, volume.register().generation.0), (0, 0));
}

#[test]
fn every_change_of_the_map_is_a_new_epoch_and_nothing_else_is() {
    let mut state = state_after(&whole_cluster());
    let node = NodeId(2);
    let bumping = [
        Command::SetNodeState { node, state: NodeState::Suspect },
        Command::SetNodeState { node, state: NodeState::Down },
        Command::SetNodeState { node, state: NodeState::Up },
        Command::SetDeviceState { device: device(2), state: DeviceState::Out },
        Command::SetDeviceState { device: device(2), state: DeviceState::In },
        create_pool("fast", "replica(3)"),
        Command::DeletePool { pool: PoolId(2) },
    ];
    for command in bumping {
        let before = state.epoch;
        state.apply(&command).unwrap();
        assert!(state.epoch > before, "{command:?}");
    }
    let quiet = [
        Command::SetNodeState { node, state: NodeState::Up },
        Command::SetDeviceState { device: device(2), state: DeviceState::In },
        create_volume("vm2"),
        Command::RenameVolume { volume: VolumeId(2), name: name("vm3") },
        Command::SetVolumePolicy { volume: VolumeId(2), ack: AckPolicy::Persisted },
    ];
    for command in quiet {
        let before = state.epoch;
        state.apply(&command).unwrap();
        assert_eq!(state.epoch, before, "{command:?}");
    }
    state.check().unwrap();
}

#[test]
fn ids_are_never_used_again() {
    let mut state = state_after(&nodes(6));
    let removed = Command::SetNodeState { node: NodeId(6), state: NodeState::Removed };
    state.apply(&removed).unwrap();
    assert!(state.node_named("n6").is_none() && !state.devices.contains_key(&device(6)));
    refuse(&mut state, &Command::SetNodeState { node: NodeId(6), state: NodeState::Up }, &MetaError::NoNode(NodeId(6)));
    let again = Command::AddNode { name: name("n6"), host: name("host6"), rack: None, zone: None };
    assert_eq!(state.apply(&again), Ok(Outcome::Node(NodeId(7))));
    assert_eq!(state.apply(&create_pool("a", "4+1")), Ok(Outcome::Pool(PoolId(1))));
    state.apply(&Command::DeletePool { pool: PoolId(1) }).unwrap();
    assert_eq!(state.apply(&create_pool("a", "4+1")), Ok(Outcome::Pool(PoolId(2))));
    state.check().unwrap();
}

#[test]
fn what_makes_no_sense_is_refused_and_changes_nothing() {
    let mut state = state_after(&whole_cluster());
    let node = |host: &str, rack: &str| Command::AddNode {
        name: name("n9"),
        host: name(host),
        rack: Some(name(rack)),
        zone: None,
    };
    refuse(&mut state, &node("host3", "r2"), &MetaError::HostElsewhere(NodeId(3)));
    let twin = Command::AddNode { name: name("n1"), host: name("h"), rack: None, zone: None };
    refuse(&mut state, &twin, &MetaError::NameTaken);
    let add = |number, node, capacity| Command::AddDevice { device: device(number), node: NodeId(node), capacity };
    refuse(&mut state, &add(1, 1, 5), &MetaError::DeviceKnown(device(1)));
    refuse(&mut state, &add(9, 9, 5), &MetaError::NoNode(NodeId(9)));
    refuse(&mut state, &add(9, 1, 0), &MetaError::NoCapacity);
    let joining = Command::SetNodeState { node: NodeId(1), state: NodeState::Joining };
    refuse(&mut state, &joining, &MetaError::Transition { from: NodeState::Up, to: NodeState::Joining });
    let removed = Command::SetNodeState { node: NodeId(1), state: NodeState::Removed };
    refuse(&mut state, &removed, &MetaError::DeviceInUse(device(1)));
    refuse(&mut state, &create_pool("p", "4+2"), &MetaError::NameTaken);
    let few = PlacementError::TooFewDomains { domain: FailureDomain::Host, found: 6, needed: 7 };
    assert_eq!(MetaError::Placement(few.clone()).kind(), ErrorKind::Unavailable);
    refuse(&mut state, &create_pool("wide", "5+2"), &MetaError::Placement(few));
    refuse(&mut state, &Command::DeletePool { pool: PoolId(1) }, &MetaError::PoolInUse(VolumeId(1)));
    refuse(&mut state, &Command::DeletePool { pool: PoolId(2) }, &MetaError::NoPool(PoolId(2)));
    refuse(&mut state, &create_volume("vm1"), &MetaError::NameTaken);
    for size in [0, 1, 4095, 4097, VOLUME_BYTES_MAX + 4096, u64::MAX] {
        let create = Command::CreateVolume { name: name("x"), pool: PoolId(1), size, ack: None };
        refuse(&mut state, &create, &MetaError::VolumeBytes(size));
    }
    let largest = Command::CreateVolume { name: name("x"), pool: PoolId(1), size: VOLUME_BYTES_MAX, ack: None };
    assert_eq!(state.apply(&largest), Ok(Outcome::Volume(VolumeId(2))));
    let rename = |volume, to: &str| Command::RenameVolume { volume: VolumeId(volume), name: name(to) };
    refuse(&mut state, &rename(2, "vm1"), &MetaError::NameTaken);
    refuse(&mut state, &rename(7, "y"), &MetaError::NoVolume(VolumeId(7)));
    refuse(&mut state, &Command::FinishMove { pool: PoolId(1) }, &MetaError::NotMoving);
}

#[test]
fn a_rename_changes_the_way_to_the_id_and_nothing_else() {
    let mut state = state_after(&whole_cluster());
    let before = state.volumes[&VolumeId(1)].clone();
    state.apply(&Command::RenameVolume { volume: VolumeId(1), name: name("db") }).unwrap();
    assert!(state.volume_named("vm1").is_none());
    let mut after = state.volume_named("db").unwrap().clone();
    after.name = before.name.clone();
    assert_eq!(after, before);
    // To its own name: nothing to do.
    assert_eq!(state.apply(&Command::RenameVolume { volume: VolumeId(1), name: name("db") }), Ok(Outcome::Done));
    state.check().unwrap();
}

#[test]
fn nodes_of_one_host_fail_together_except_where_that_is_known() {
    let on_one_host = |single_host| {
        let mut state = MetaState::new(CLUSTER, single_host);
        for (number, host) in (1..=4u32).zip(["a", "a", "b", "c"]) {
            let host = if single_host { "a" } else { host };
            let add = Command::AddNode { name: name(&format!("n{number}")), host: name(host), rack: None, zone: None };
            state.apply(&add).unwrap();
            let node = NodeId(number);
            state.apply(&Command::AddDevice { device: device(number), node, capacity: 1 << 30 }).unwrap();
            state.apply(&Command::SetNodeState { node, state: NodeState::Up }).unwrap();
        }
        state
    };
    let mut dev = on_one_host(true);
    dev.apply(&create_pool("p", "2+2")).unwrap();
    assert_eq!(dev.pool_named("p").unwrap().failure_domain, FailureDomain::Node);
    let mut real = on_one_host(false);
    let by_node = |scheme: &str| Command::CreatePool {
        name: name("p"),
        scheme: scheme.parse().unwrap(),
        failure_domain: Some(FailureDomain::Node),
        pg_count: None,
        ack: AckPolicy::Persisted,
    };
    let few = PlacementError::TooFewDomains { domain: FailureDomain::Host, found: 3, needed: 4 };
    refuse(&mut real, &by_node("2+2"), &MetaError::Placement(few));
    real.apply(&by_node("2+1")).unwrap();
    assert_eq!(real.pool_named("p").unwrap().failure_domain, FailureDomain::Host);
    assert_eq!(real.pool_named("p").unwrap().table.positions.len(), 256);
}

#[test]
fn a_drained_node_is_left_by_its_positions_before_it_can_be_removed() {
    let mut commands = nodes(8);
    commands.push(create_pool("p", "4+2"));
    let mut state = state_after(&commands);
    let node = NodeId(8);
    state.apply(&Command::SetNodeState { node, state: NodeState::Draining }).unwrap();
    let plan = Command::PlanMove { pool: PoolId(1), holes_allowed: false };
    state.apply(&plan).unwrap();
    let pool = &state.pools[&PoolId(1)];
    let next = pool.next.clone().unwrap();
    assert!(pool.table.holds(device(8)) && !next.holds(device(8)) && pool.map_epoch == state.epoch);
    refuse(&mut state, &plan, &MetaError::Moving);
    let removed = Command::SetNodeState { node, state: NodeState::Removed };
    refuse(&mut state, &removed, &MetaError::DeviceInUse(device(8)));
    let epoch = state.epoch;
    state.apply(&Command::FinishMove { pool: PoolId(1) }).unwrap();
    assert!(state.epoch > epoch && state.pools[&PoolId(1)].table == next);
    state.apply(&removed).unwrap();
    // Nothing left to move: no new epoch.
    let epoch = state.epoch;
    state.apply(&plan).unwrap();
    assert_eq!((state.epoch, &state.pools[&PoolId(1)].next), (epoch, &None));
    state.check().unwrap();
}

#[test]
fn a_move_ends_when_every_old_place_has_said_that_it_is_empty() {
    let mut commands = nodes(8);
    commands.push(create_pool("p", "4+2"));
    let mut state = state_after(&commands);
    let out = Command::SetDeviceState { device: device(8), state: DeviceState::Out };
    state.apply(&out).unwrap();
    assert_eq!(state.node(NodeId(8)).unwrap().state, NodeState::Draining);
    let early = Command::PlaceEmptied { pool: PoolId(1), map_epoch: state.epoch, device: device(8) };
    refuse(&mut state, &early, &MetaError::NotMoving);
    state.apply(&Command::PlanMove { pool: PoolId(1), holes_allowed: false }).unwrap();
    let old = Command::PlaceEmptied { pool: PoolId(1), map_epoch: Epoch(1), device: device(8) };
    refuse(&mut state, &old, &MetaError::Outdated);
    let next = state.pools[&PoolId(1)].next.clone().unwrap();
    let places = state.devices_to_empty(&state.pools[&PoolId(1)]);
    assert!(places.contains(&device(8)));
    let removed = Command::RemoveDevice { device: device(8) };
    refuse(&mut state, &removed, &MetaError::DeviceInUse(device(8)));
    let map_epoch = state.pools[&PoolId(1)].map_epoch;
    for (told, place) in (1..).zip(places.iter().copied()) {
        assert!(state.pools[&PoolId(1)].next.is_some());
        // A device that is not left says nothing of the move, and a repeat nothing new.
        for device in [device(99), place, place] {
            let ended = told == places.len() && state.pools[&PoolId(1)].next.is_none();
            let answer = state.apply(&Command::PlaceEmptied { pool: PoolId(1), map_epoch, device });
            assert_eq!(answer.is_ok(), !ended);
        }
        state.check().unwrap();
    }
    assert_eq!((&state.pools[&PoolId(1)].table, &state.pools[&PoolId(1)].next), (&next, &None));
    state.apply(&removed).unwrap();
    assert_eq!(state.node(NodeId(8)).unwrap().state, NodeState::Up, "without devices it has nothing to drain");
    state.check().unwrap();
}

#[test]
fn a_device_that_is_given_up_as_lost_is_out_for_good() {
    let mut state = state_after(&nodes(8));
    state.apply(&create_pool("p", "4+2")).unwrap();
    let (lose, out) = (
        Command::LoseDevice { device: device(8) },
        Command::SetDeviceState { device: device(8), state: DeviceState::Out },
    );
    state.apply(&out).unwrap();
    assert!(!state.is_given_up(device(8)), "one that is drained holds what it holds");
    let before = state.epoch;
    state.apply(&lose).unwrap();
    assert!(state.is_given_up(device(8)) && state.epoch > before, "owners have to look again, though it was out");
    let after = state.clone();
    state.apply(&lose).unwrap();
    assert_eq!(state, after, "a repeat changes nothing");
    let back = Command::SetDeviceState { device: device(8), state: DeviceState::In };
    refuse(&mut state, &back, &MetaError::DeviceLost(device(8)));
    refuse(&mut state, &Command::LoseDevice { device: device(99) }, &MetaError::NoDevice(device(99)));
    state.check().unwrap();
    // Removal ends it: the tombstone is enough.
    state.apply(&Command::PlanMove { pool: PoolId(1), holes_allowed: false }).unwrap();
    let map_epoch = state.pools[&PoolId(1)].map_epoch;
    for place in state.devices_to_empty(&state.pools[&PoolId(1)]) {
        let _ = state.apply(&Command::PlaceEmptied { pool: PoolId(1), map_epoch, device: place });
    }
    state.apply(&Command::RemoveDevice { device: device(8) }).unwrap();
    assert!(state.lost_devices.is_empty() && state.is_given_up(device(8)));
    state.check().unwrap();
}

#[test]
fn a_draining_node_that_comes_back_from_down_is_draining_still() {
    let mut state = state_after(&nodes(2));
    let node = NodeId(2);
    for (to, state_now) in [(DeviceState::Out, NodeState::Draining), (DeviceState::In, NodeState::Up)] {
        state.apply(&Command::SetDeviceState { device: device(2), state: to }).unwrap();
        for seen in [NodeState::Suspect, NodeState::Down, NodeState::Up] {
            state.apply(&Command::SetNodeState { node, state: seen }).unwrap();
        }
        assert_eq!(state.node(node).unwrap().state, state_now);
    }
}

#[test]
fn a_cluster_without_spare_nodes_moves_only_with_holes() {
    let mut state = state_after(&whole_cluster());
    state.apply(&Command::SetDeviceState { device: device(3), state: DeviceState::Out }).unwrap();
    let few = PlacementError::TooFewDomains { domain: FailureDomain::Host, found: 5, needed: 6 };
    refuse(&mut state, &Command::PlanMove { pool: PoolId(1), holes_allowed: false }, &MetaError::Placement(few));
    state.apply(&Command::PlanMove { pool: PoolId(1), holes_allowed: true }).unwrap();
    let next = state.pools[&PoolId(1)].next.clone().unwrap();
    assert_eq!(next.positions.iter().flatten().filter(|position| position.is_none()).count(), 32);
    state.apply(&Command::CancelMove { pool: PoolId(1) }).unwrap();
    assert_eq!(state.pools[&PoolId(1)].next, None);
}
