//! What a leader saw of other nodes counts in its own term.

use raft_meta::raft::machine::Applied;
use raft_meta::raft::{LogEntry, Machine, Member, Origin, Payload, ReplicaId};
use raft_meta::{Command, MetaError, MetaState, NodeState, format};
use std::collections::BTreeMap;
use xsan_types::{ClusterId, NodeId};

const LEADER: ReplicaId = ReplicaId(9);

fn entry(index: u64, term: u64, command: &Command) -> LogEntry {
    let origin = Origin { replica: LEADER, start: 1, sequence: index };
    LogEntry { index, term, payload: Payload::Command { origin, envelope: format::encode_command(command) } }
}

#[test]
fn a_leader_that_was_frozen_takes_nobody_down_in_the_term_of_its_successor() {
    let mut state = MetaState::new(ClusterId(1), false);
    let (name, host) = ("n1".parse().unwrap(), "h1".parse().unwrap());
    state.apply(&Command::AddNode { name, host, rack: None, zone: None }).unwrap();
    let mut machine = Machine::new(state);
    machine.members = BTreeMap::from([(LEADER, Member { node: NodeId(1), since: 1 })]);
    let verdict = |from, to| Command::ReportNode {
        node: NodeId(1),
        term: 4,
        from,
        to,
        now_millis: 5,
        reason: "nothing heard".into(),
    };
    let up = machine.apply(&entry(1, 4, &verdict(NodeState::Joining, NodeState::Up))).unwrap();
    assert!(matches!(up, Applied::Command(_, Ok(_))), "{up:?}");
    // Made in term 4, handed on by its maker, who is no leader any more, and appended in term 5.
    let late = machine.apply(&entry(2, 5, &verdict(NodeState::Up, NodeState::Down))).unwrap();
    assert!(matches!(late, Applied::Command(_, Err(MetaError::Outdated))), "{late:?}");
    assert_eq!(machine.state.node(NodeId(1)).map(|node| node.state), Some(NodeState::Up));
}
