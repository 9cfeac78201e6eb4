//! A small cluster and short ways to write commands.

use raft_meta::{AckPolicy, Command, MetaState, Name, NodeState, Outcome};
use xsan_types::{
    ChangeToken, CheckpointRef, ClusterId, Crc32c, DeviceId, Generation, Incarnation, JournalSet, NodeId, PgId, PoolId,
    Register, RegisterChange, Scheme, SegmentName, SetId, SetMember, VolumeId,
};

pub const CLUSTER: ClusterId = ClusterId(0xc1c1_0000_0000_0000_0000_0000_0000_0001);
pub const VOLUME: VolumeId = VolumeId(1);
pub const GIB: u64 = 1 << 30;

pub fn name(text: &str) -> Name {
    text.parse().unwrap()
}

pub fn device(number: u32) -> DeviceId {
    DeviceId(u128::from(number) << 64 | 0xd)
}

/// Commands that make `nodes` nodes with a device each, all up.
pub fn nodes(nodes: u32) -> Vec<Command> {
    let node = |number: u32| {
        let id = NodeId(number);
        [
            Command::AddNode {
                name: name(&format!("n{number}")),
                host: name(&format!("host{number}")),
                rack: Some(name("r1")),
                zone: None,
            },
            Command::AddDevice { device: device(number), node: id, capacity: 100 * GIB },
            Command::SetNodeState { node: id, state: NodeState::Up },
        ]
    };
    (1..=nodes).flat_map(node).collect()
}

pub fn create_pool(pool: &str, scheme: &str) -> Command {
    Command::CreatePool {
        name: name(pool),
        scheme: scheme.parse::<Scheme>().unwrap(),
        failure_domain: None,
        pg_count: Some(32),
        ack: AckPolicy::Replicated,
    }
}

pub fn create_volume(volume: &str) -> Command {
    Command::CreateVolume { name: name(volume), pool: PoolId(1), size: GIB, ack: None }
}

/// Six nodes, a pool 4+2, a volume.
pub fn whole_cluster() -> Vec<Command> {
    let mut commands = nodes(6);
    commands.extend([create_pool("p", "4+2"), create_volume("vm1")]);
    commands
}

pub fn state_after(commands: &[Command]) -> MetaState {
    let mut state = MetaState::new(CLUSTER, false);
    for command in commands {
        state.apply(command).unwrap();
    }
    state.check().unwrap();
    state
}

pub fn change(generation: u64, version: u64, token: u128, change: RegisterChange) -> Command {
    let generation = Generation(generation);
    Command::ChangeRegister { volume: VOLUME, generation, version, token: ChangeToken(token), change }
}

pub fn set(generation: u64, number: u64) -> JournalSet {
    let member = |number| SetMember { device: device(number), incarnation: Incarnation(7) };
    let id = SetId { generation: Generation(generation), number };
    JournalSet { id, members: vec![member(1), member(2), member(3)] }
}

pub fn checkpoint(generation: u64, number: u64, border: u64) -> CheckpointRef {
    CheckpointRef {
        segment: segment(generation, number),
        segment_bytes: 1 << 20,
        root_offset: 4096,
        root_bytes: 512,
        root_crc: Crc32c(0x1234_5678),
        border,
    }
}

pub fn segment(generation: u64, number: u64) -> SegmentName {
    let pg = PgId { pool: PoolId(1), index: 3 };
    SegmentName { volume: VOLUME, generation: Generation(generation), number, pg }
}

pub fn register_of(outcome: Outcome) -> Register {
    match outcome {
        Outcome::Register(register) => register,
        other => panic!("not a register: {other:?}"),
    }
}
