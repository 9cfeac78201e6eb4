//! Hostile bytes and hostile messages against readers and whole replicas: nothing may panic. Used by a test (short) and by
//! `examples/fuzz_raft.rs` (as long as one likes).

use raft_meta::raft::format::{HardState, decode_raft_log, decode_raft_snapshot, encode_raft_snapshot};
use raft_meta::raft::message::{Agreement, Body, Kind, decode, encode};
use raft_meta::raft::{Configuration, Core, LogEntry, Machine, Member, Message, Payload, ReplicaId, Stored, Ticks};
use raft_meta::{Command, MetaState, format};
use std::collections::{BTreeMap, VecDeque};
use xsan_env::memory::mix;
use xsan_types::{ClusterId, NodeId};

const CLUSTER: ClusterId = ClusterId(7);
const TICKS: Ticks = Ticks { heartbeat: 1, election: 8, answer: 50, resend: 3, transfer: 10 };

pub struct Dice(pub u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = mix(self.0);
        self.0 % limit.max(1)
    }

    fn number(&mut self, near: u64) -> u64 {
        match self.below(6) {
            0 => 0,
            1 => near.saturating_sub(self.below(4)),
            2 => near + self.below(4),
            3 => (1 << 62) - self.below(2),
            4 => self.below(1 << 40),
            _ => self.below(12),
        }
    }
}

fn replica(number: u64, dice: &mut Dice) -> Core {
    let ids: Vec<ReplicaId> = (1..=3).map(ReplicaId).collect();
    let mut machine = Machine::new(MetaState::new(CLUSTER, false));
    (machine.index, machine.term) = (1, 1);
    let member = |id: &ReplicaId| (*id, Member { node: NodeId(u32::try_from(id.0).unwrap()), since: 1 });
    machine.members = ids.iter().map(member).collect::<BTreeMap<_, _>>();
    machine.configuration = Configuration { voters: ids, ..Configuration::default() };
    let state = HardState { term: 1, vote: 0, commit: 1 };
    let stored = Stored { replica: ReplicaId(number), start: 1, machine, base: (1, 1), state, entries: Vec::new() };
    Core::new(stored, TICKS, dice.below(u64::MAX), false)
}

/// One life of three replicas whose messages are forged, repeated, lost and reordered by somebody inside.
pub fn hostile_life(seed: u64) {
    let mut dice = Dice(mix(seed));
    let mut cores: Vec<Core> = (1..=3).map(|number| replica(number, &mut dice)).collect();
    let mut wire: VecDeque<(ReplicaId, Vec<u8>)> = VecDeque::new();
    for step in 0..400 {
        let at = usize::try_from(dice.below(3)).unwrap();
        match dice.below(10) {
            0..=2 => cores[at].tick(),
            3 => {
                let host = format!("h{step}").parse().unwrap();
                let add = Command::AddNode { name: format!("n{step}").parse().unwrap(), host, rack: None, zone: None };
                cores[at].propose(step, format::encode_command(&add));
            }
            4 => cores[at].read(step),
            5 => store_snapshot(&mut cores[at]),
            _ => pass_on(&mut cores, &mut wire, &mut dice),
        }
        for core in &mut cores {
            while core.poll().is_some() {
                core.written();
            }
            core.take_answers();
            wire.extend(core.take_outbox());
        }
    }
}

fn store_snapshot(core: &mut Core) {
    if core.fault().is_none() {
        let machine = core.machine().clone();
        core.snapshot_stored(&machine, encode_raft_snapshot(&machine).into());
        let (header, ..) = core.shorter_log(100);
        core.log_cut(header.base_index);
    }
}

fn pass_on(cores: &mut [Core], wire: &mut VecDeque<(ReplicaId, Vec<u8>)>, dice: &mut Dice) {
    let Some((to, mut bytes)) = wire.pop_front() else { return };
    // An answer to a sender that does not exist.
    let Some(target) = usize::try_from(to.0).ok().filter(|to| (1..=3).contains(to)).map(|to| to - 1) else { return };
    if dice.below(4) == 0 {
        // As it is, and then forged.
        // A replica that was fed numbers at the bound may answer with one beyond it.
        let Ok(message) = decode(&bytes) else { return };
        cores[target].deliver(message.from, message.clone()).ok();
        bytes = encode(&forged(message, dice));
    }
    if dice.below(20) == 0 {
        let at = usize::try_from(dice.below(bytes.len() as u64)).unwrap();
        bytes[at] ^= 1 << dice.below(8);
    }
    if let Ok(message) = decode(&bytes) {
        cores[target].deliver(message.from, message).ok();
    }
}

const KINDS: [Kind; 12] = [
    Kind::Propose,
    Kind::Append,
    Kind::AppendResponse,
    Kind::RequestVote,
    Kind::RequestVoteResponse,
    Kind::Heartbeat,
    Kind::HeartbeatResponse,
    Kind::TimeoutNow,
    Kind::ReadIndex,
    Kind::ReadIndexResponse,
    Kind::RequestPreVote,
    Kind::RequestPreVoteResponse,
];

fn forged(mut message: Message, dice: &mut Dice) -> Message {
    match &mut message.body {
        Body::Agreement(agreement) => forge(agreement, dice),
        Body::Chunk { term, index, total, offset, .. } => {
            *[term, index, total, offset][usize::try_from(dice.below(4)).unwrap()] = dice.number(9);
        }
        Body::ChunkAck { index, received } => (*index, *received) = (dice.number(*index), dice.number(*received)),
    }
    message
}

fn forge(agreement: &mut Agreement, dice: &mut Dice) {
    for _ in 0..=dice.below(2) {
        match dice.below(10) {
            0 => agreement.term = dice.number(agreement.term),
            1 => agreement.log_term = dice.number(agreement.log_term),
            2 => agreement.index = dice.number(agreement.index),
            3 => agreement.commit = dice.number(agreement.commit),
            4 => agreement.commit_term = dice.number(agreement.commit_term),
            5 => agreement.reject = !agreement.reject,
            6 => agreement.reject_hint = dice.number(agreement.reject_hint),
            7 => agreement.kind = KINDS[usize::try_from(dice.below(12)).unwrap()],
            8 => drop(agreement.entries.pop()),
            _ => {
                let index = agreement.entries.last().map_or(agreement.index, |last| last.index) + 1;
                agreement.entries.push(LogEntry { index, term: agreement.term, payload: Payload::Leave });
            }
        }
    }
}

/// Random and mutated bytes into every reader.
pub fn hostile_bytes(seed: u64) {
    let mut dice = Dice(mix(seed ^ 0xb17e5));
    let sources = [
        include_bytes!("../golden/raft-log-v1.bin").as_slice(),
        include_bytes!("../golden/raft-snapshot-v1.bin").as_slice(),
        include_bytes!("../golden/raft-messages-v1.bin").as_slice(),
    ];
    let mut bytes = sources[usize::try_from(dice.below(3)).unwrap()].to_vec();
    for _ in 0..dice.below(8) {
        let at = usize::try_from(dice.below(bytes.len() as u64)).unwrap();
        match dice.below(4) {
            0 => bytes.truncate(at.max(1)),
            1 => bytes[at] = 0xff,
            2 => bytes.insert(at, bytes[at]),
            _ => bytes[at] ^= 1 << dice.below(8),
        }
    }
    let skipped = usize::try_from(dice.below(12)).unwrap();
    for bytes in [&bytes[..], bytes.get(skipped..).unwrap_or_default()] {
        decode(bytes).ok();
        decode_raft_log(bytes).ok();
        decode_raft_snapshot(bytes).ok();
    }
}
