//! Stored bytes stay readable: files of every format version, sound and damaged, with what must be read from them.
//!
//! The newest version of each is written by this release, so its files are also compared byte by byte with what is written now. A
//! changed layout needs a new version and new files beside the old ones; `XSAN_GOLDEN=write` makes the files of the newest.
#![allow(clippy::disallowed_methods, reason = "writes its own golden files on demand")]

use crate::support::{
    CLUSTER, VOLUME, change, checkpoint, create_pool, create_volume, device, name, nodes, segment, set, state_after,
};
use raft_meta::inspect::{LogItem, inspect_log, inspect_snapshot};
use raft_meta::{
    AckPolicy, AddressCommand, Authority, Candidacy, Command, FormatError, NodeState, ServiceAddress, ShownToken,
    TokenRecord, format,
};
use std::path::PathBuf;
use xsan_placement::{DeviceState, FailureDomain};
use xsan_types::{ChangeToken, DeviceId, Generation, NodeId, PoolId, RegisterChange, VolumeId};

/// Every command once, with every kind of field.
fn every_command() -> Vec<Command> {
    let (volume, generation) = (VOLUME, Generation(1));
    let mut commands = nodes(6);
    commands.extend([
        create_pool("p", "4+2"),
        Command::CreatePool {
            name: name("copies"),
            scheme: "replica(3)".parse().unwrap(),
            failure_domain: Some(FailureDomain::Device),
            pg_count: Some(5),
            ack: AckPolicy::Persisted,
        },
        create_volume("vm1"),
        Command::CreateVolume { name: name("gone"), pool: PoolId(2), size: 4096, ack: Some(AckPolicy::Replicated) },
        Command::RenameVolume { volume, name: name("db.main_1") },
        Command::SetVolumePolicy { volume, ack: AckPolicy::Persisted },
        change(0, 0, 0xfeed, RegisterChange::Take),
        change(1, 1, 2, RegisterChange::Commit { set: set(1, 1), checkpoint: Some(checkpoint(1, 2, 3)) }),
        change(1, 2, 3, RegisterChange::Set(Some(set(1, 2)))),
        Command::PinCheckpoint { volume, generation, version: 3, token: ChangeToken(4) },
        change(1, 4, 5, RegisterChange::Checkpoint(checkpoint(1, 8, 7))),
        Command::UnpinCheckpoint { volume, generation, version: 5, token: ChangeToken(6), segment: segment(1, 2) },
        Command::PinCheckpoint { volume, generation, version: 6, token: ChangeToken(7) },
        change(1, 7, 8, RegisterChange::Resize(1 << 41)),
        Command::ChangeRegister {
            volume: VolumeId(2),
            generation: Generation(0),
            version: 0,
            token: ChangeToken(u128::MAX),
            change: RegisterChange::Retire,
        },
        Command::SetDeviceState { device: crate::support::device(2), state: DeviceState::Out },
        Command::PlanMove { pool: PoolId(1), holes_allowed: true },
        Command::CancelMove { pool: PoolId(1) },
        Command::PlanMove { pool: PoolId(2), holes_allowed: false },
        Command::FinishMove { pool: PoolId(2) },
        Command::PlanMove { pool: PoolId(1), holes_allowed: true },
        Command::DeletePool { pool: PoolId(2) },
    ]);
    commands
}

/// The log of these commands: three frames.
fn log() -> Vec<u8> {
    let envelopes: Vec<Vec<u8>> = every_command().iter().map(format::encode_command).collect();
    let mut bytes = format::encode_log_header(CLUSTER);
    for (first_index, frame) in [(1, &envelopes[..1]), (2, &envelopes[1..20]), (21, &envelopes[20..])] {
        bytes.extend(format::encode_frame(first_index, frame));
    }
    bytes
}

fn snapshot() -> Vec<u8> {
    let commands = every_command();
    format::encode_snapshot(&state_after(&commands), commands.len() as u64)
}

fn golden(file: &str, now: impl FnOnce() -> Vec<u8>) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(file);
    if std::env::var_os("XSAN_GOLDEN").is_some_and(|wish| wish == "write") {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, now()).unwrap();
    }
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn commands_in(bytes: &[u8]) -> Vec<Command> {
    let command = |item: LogItem| match item {
        LogItem::Command { command, .. } => Some(command),
        _ => None,
    };
    inspect_log(bytes).items.into_iter().filter_map(command).collect()
}

#[test]
fn a_log_of_version_1_is_read_and_still_written_alike() {
    let bytes = golden("log-v1.bin", log);
    assert_eq!(commands_in(&bytes), every_command());
    let read = format::decode_log(&bytes).unwrap();
    assert_eq!((read.cluster, read.frames.len(), read.good_bytes), (CLUSTER, 3, bytes.len()));
    assert!(bytes == log(), "the layout of version 1 has changed: make it version 2");
}

#[test]
fn a_snapshot_of_version_1_is_read_as_one_without_hosts() {
    // Of an older release: never made anew.
    let bytes = std::fs::read(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/snapshot-v1.bin")).unwrap();
    let (state, index) = format::decode_snapshot(&bytes).unwrap();
    let mut expected = state_after(&every_command());
    // To that release a node whose devices are out was up.
    expected.nodes.get_mut(&NodeId(2)).unwrap().state = NodeState::Up;
    assert_eq!((state, index), (expected, every_command().len() as u64));
    let report = inspect_snapshot(&bytes);
    assert_eq!(report.fault, None);
    let text = report.to_string();
    for expected in ["node6 n6 on host6 up", "p1 p rs(4,2) over host, 32 groups, moving", "v1 db.main_1 Open 2 TiB g1"]
    {
        assert!(text.contains(expected), "{expected}: {text}");
    }
    // As text: a `Value` cannot hold the 128 bits of a token.
    let json = serde_json::to_string(&report).unwrap();
    assert!(
        json.contains(r#""2":{"id":2,"name":"gone","pool":2,"ack":"replicated","register":{"register":{"version":1"#),
        "{json}"
    );
}

/// Every command about hosts.
fn host_commands() -> Vec<Command> {
    let token = TokenRecord { secret_hash: [7; 32], expires_millis: 5_000, uses_left: 2 };
    let candidacy = Candidacy {
        token: Some(ShownToken { number: 9, secret_hash: [7; 32] }),
        now_millis: 4_000,
        name: name("h1"),
        host: name("h1.example"),
        rack: Some(name("r1")),
        zone: None,
        address: "h1.example:7400".into(),
        public_key: vec![4; 65],
        replica: 0xabcd,
        replaces: false,
    };
    let spare = TokenRecord { secret_hash: [8; 32], expires_millis: 6_000, uses_left: 1 };
    let node = NodeId(7);
    vec![
        Command::SetAuthority(Authority { certificate: "certificate".into(), key: "hidden".into() }),
        Command::AddToken { number: 9, token, now_millis: 1_000 },
        Command::AddToken { number: 10, token: spare, now_millis: 1_000 },
        Command::RevokeToken { number: 10 },
        Command::AdmitNode(candidacy),
        Command::SetNodeAddress { node, address: "10.0.0.1:7400".into() },
        Command::RenameNode { node, name: name("h7") },
        Command::ReportNode {
            node,
            term: 1,
            from: NodeState::Joining,
            to: NodeState::Up,
            now_millis: 4_500,
            reason: "heard".into(),
        },
        Command::VolumeServed { volume: VOLUME, generation: Generation(1), node: Some(node) },
    ]
}

/// A cluster whose pool moves.
fn moving() -> Vec<Command> {
    let mut commands = nodes(8);
    commands.push(Command::AddDevice { device: DeviceId(0x77), node: NodeId(7), capacity: 1 << 40 });
    commands.push(create_pool("p", "4+2"));
    commands.push(Command::SetDeviceState { device: device(8), state: DeviceState::Out });
    commands.push(Command::SetDeviceState { device: device(7), state: DeviceState::Out });
    commands.push(Command::PlanMove { pool: PoolId(1), holes_allowed: false });
    commands
}

fn move_commands() -> Vec<Command> {
    let state = state_after(&moving());
    let pool = &state.pools[&PoolId(1)];
    let device = *state.devices_to_empty(pool).first().expect("the pool moves");
    let unused = Command::AddDevice { device: DeviceId(0x78), node: NodeId(7), capacity: 1 << 40 };
    vec![
        Command::PlaceEmptied { pool: pool.id, map_epoch: pool.map_epoch, device },
        unused,
        Command::RemoveDevice { device: DeviceId(0x78) },
    ]
}

fn commands_with_moves() -> Vec<Command> {
    moving().into_iter().chain(move_commands()).collect()
}

#[test]
fn a_snapshot_of_version_3_is_read_as_one_without_addresses_and_lost_devices() {
    // Of an older release: never made anew.
    let bytes = std::fs::read(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/snapshot-v3.bin")).unwrap();
    let (state, index) = format::decode_snapshot(&bytes).unwrap();
    let commands = commands_with_moves();
    assert_eq!((&state, index), (&state_after(&commands), commands.len() as u64));
    assert_eq!(state.emptied[&PoolId(1)].len(), 1);
}

fn address_and_loss_commands() -> Vec<Command> {
    let four = ServiceAddress { interface: Some("eth1".into()), ..place("10.0.0.50/24") };
    let clients = vec!["10.0.0.7:41000".parse().unwrap(), "[fd00::7]:41001".parse().unwrap()];
    let (volume, other) = (VOLUME, VolumeId(2));
    [
        AddressCommand::Set { volume, place: Some(four) },
        AddressCommand::Set { volume: other, place: Some(place("fd00::50/64")) },
        AddressCommand::Clients { volume, generation: Generation(3), clients },
        AddressCommand::Set { volume: other, place: None },
        AddressCommand::Set { volume: other, place: Some(place("fd00::51/64")) },
    ]
    .map(Command::ServiceAddress)
    .into_iter()
    .chain([Command::LoseDevice { device: DeviceId(0x77) }])
    .collect()
}

fn place(text: &str) -> ServiceAddress {
    text.parse().unwrap()
}

fn snapshot_with_addresses() -> Vec<u8> {
    let mut commands = commands_with_moves();
    commands.extend([create_volume("vm1"), create_volume("vm2")]);
    commands.extend(address_and_loss_commands());
    format::encode_snapshot(&state_after(&commands), commands.len() as u64)
}

#[test]
fn a_snapshot_of_version_4_is_read_and_still_written_alike() {
    let bytes = golden("snapshot-v4.bin", snapshot_with_addresses);
    let (state, _) = format::decode_snapshot(&bytes).unwrap();
    assert!(bytes == snapshot_with_addresses(), "the layout of version 4 has changed: make it version 5");
    assert_eq!(state.addresses[&VOLUME].place.to_string(), "10.0.0.50/24");
    assert_eq!(state.addresses[&VOLUME].clients.len(), 2);
    assert_eq!(state.addresses[&VolumeId(2)].place, place("fd00::51/64"));
    assert!(state.lost_devices.iter().eq([&DeviceId(0x77)]));
}

#[test]
fn commands_about_addresses_and_lost_devices_are_read_and_still_written_alike() {
    let written = || address_and_loss_commands().iter().map(format::encode_command).collect::<Vec<_>>();
    let bytes = golden("address-commands-v1.bin", || format::encode_frame(1, &written()));
    let frame = format::frame_at(&bytes, 0).unwrap();
    let read: Vec<Command> =
        frame.envelopes.iter().map(|(_, envelope)| format::decode_command(envelope, 0).unwrap()).collect();
    assert_eq!(read, address_and_loss_commands());
    assert!(bytes == format::encode_frame(1, &written()), "commands are encoded differently: make a new version");
}

#[test]
fn commands_about_moves_are_read_and_still_written_alike() {
    let written = || move_commands().iter().map(format::encode_command).collect::<Vec<_>>();
    let bytes = golden("move-commands-v1.bin", || format::encode_frame(1, &written()));
    let frame = format::frame_at(&bytes, 0).unwrap();
    let read: Vec<Command> =
        frame.envelopes.iter().map(|(_, envelope)| format::decode_command(envelope, 0).unwrap()).collect();
    assert_eq!(read, move_commands());
    assert!(bytes == format::encode_frame(1, &written()), "commands are encoded differently: make a new version");
}

#[test]
fn a_snapshot_of_version_2_is_read_as_one_without_moves() {
    // Of an older release: never made anew.
    let bytes = std::fs::read(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/snapshot-v2.bin")).unwrap();
    let (state, _) = format::decode_snapshot(&bytes).unwrap();
    assert!(state.emptied.is_empty());
    let record = &state.hosts.nodes[&NodeId(7)];
    assert_eq!((record.address.as_str(), record.replica, record.since_millis), ("10.0.0.1:7400", 0xabcd, 4_500));
    assert_eq!(state.node_named("h7").map(|node| node.state), Some(NodeState::Up));
    assert_eq!(state.hosts.tokens[&9].uses_left, 1);
    assert_eq!(state.hosts.served[&VOLUME].node, NodeId(7));
    assert_eq!(state.hosts.authority.as_ref().map(|authority| authority.key.as_str()), Some("hidden"));
    let report = inspect_snapshot(&bytes);
    let shown = format!("{report}{report:?}{}", serde_json::to_string(&report).unwrap());
    assert!(!shown.contains("hidden"), "a secret is shown");
}

#[test]
fn commands_about_hosts_are_read_and_still_written_alike() {
    let written = || host_commands().iter().map(format::encode_command).collect::<Vec<_>>();
    let bytes = golden("host-commands-v1.bin", || format::encode_frame(1, &written()));
    let frame = format::frame_at(&bytes, 0).unwrap();
    let read: Vec<Command> =
        frame.envelopes.iter().map(|(_, envelope)| format::decode_command(envelope, 0).unwrap()).collect();
    assert_eq!(read, host_commands());
    assert!(bytes == format::encode_frame(1, &written()), "commands are encoded differently: make a new version");
}

#[test]
fn a_torn_log_is_read_up_to_the_tear() {
    let torn = || {
        let mut bytes = log();
        bytes.truncate(bytes.len() - 9);
        bytes
    };
    let bytes = golden("log-v1-torn.bin", torn);
    let read = format::decode_log(&bytes).unwrap();
    assert_eq!(read.frames.len(), 2);
    assert!(read.good_bytes < bytes.len());
    assert_eq!(commands_in(&bytes), every_command()[..20]);
    let last = inspect_log(&bytes).items.pop().unwrap();
    assert!(matches!(last, LogItem::Damage { at_end: true, .. }), "{last:?}");
}

#[test]
fn a_log_damaged_in_the_middle_is_refused_and_shown_around_the_damage() {
    let damaged = || {
        let mut bytes = log();
        bytes[400] ^= 0x10;
        bytes
    };
    let bytes = golden("log-v1-damaged.bin", damaged);
    let error = format::decode_log(&bytes).unwrap_err();
    assert!(
        matches!(error, FormatError::Damaged { file: "meta.log", offset } if offset > 32 && offset < 400),
        "{error}"
    );
    let shown = commands_in(&bytes);
    assert_eq!((&shown[..1], &shown[1..]), (&every_command()[..1], &every_command()[20..]));
    let report = inspect_log(&bytes);
    assert!(matches!(report.items[1], LogItem::Damage { at_end: false, .. }), "{report}");
    assert!(report.to_string().contains("DAMAGE"));
}

#[test]
fn files_of_a_newer_release_are_refused_by_name_and_version() {
    let mut bytes = log();
    bytes[8] = 2;
    assert!(matches!(format::decode_log(&bytes), Err(FormatError::Version { file: "meta.log", found: 2, newest: 1 })));
    let mut bytes = snapshot();
    bytes[8] = 9;
    let error = format::decode_snapshot(&bytes).unwrap_err();
    assert!(matches!(error, FormatError::Version { file: "meta.snapshot", found: 9, newest: 4 }));
    assert!(inspect_snapshot(&bytes).fault.unwrap().contains("version 9"));
    // A newer command in a log of this version: shown as unreadable, refused when opened.
    let mut newer = format::encode_command(&create_volume("x"));
    newer[0] = 7;
    let mut bytes = format::encode_log_header(CLUSTER);
    bytes.extend(format::encode_frame(1, &[newer]));
    assert!(matches!(inspect_log(&bytes).items[..], [LogItem::Unreadable { index: 1, .. }]));
    let wrong = inspect_log(b"not a log at all, but long enough to hold a header");
    assert!(wrong.header_fault.unwrap().contains("wrong magic"));
    assert!(inspect_log(&[]).header_fault.is_some() && inspect_log(&[]).items.is_empty());
}
