//! The order of things in the core, where a life of a group hardly ever comes by: what may be said before it is on disk.

use raft_meta::raft::format::HardState;
use raft_meta::raft::message::{Agreement, Body, Kind, decode};
use raft_meta::raft::{Configuration, Core, Machine, Member, Message, ReplicaId, Stored, Ticks, Write};
use raft_meta::{Command, MetaState, format};
use std::collections::BTreeMap;
use xsan_types::{ClusterId, NodeId};

const CLUSTER: ClusterId = ClusterId(7);
const TICKS: Ticks = Ticks { heartbeat: 1, election: 8, answer: 50, resend: 3, transfer: 10 };

/// Replica 1 of a group at index 1, term 1.
fn core(voters: &[u64], learners: &[u64]) -> Core {
    let ids = |list: &[u64]| list.iter().map(|id| ReplicaId(*id)).collect::<Vec<_>>();
    let mut machine = Machine::new(MetaState::new(CLUSTER, false));
    (machine.index, machine.term) = (1, 1);
    let all = voters.iter().chain(learners);
    machine.members = all
        .map(|id| (ReplicaId(*id), Member { node: NodeId(u32::try_from(*id).unwrap()), since: 1 }))
        .collect::<BTreeMap<_, _>>();
    machine.configuration = Configuration { voters: ids(voters), learners: ids(learners), ..Configuration::default() };
    let state = HardState { term: 1, vote: 0, commit: 1 };
    let stored = Stored { replica: ReplicaId(1), start: 1, machine, base: (1, 1), state, entries: Vec::new() };
    Core::new(stored, TICKS, 1, false)
}

fn deliver(core: &mut Core, from: u64, agreement: Agreement) {
    let (from, to) = (ReplicaId(from), ReplicaId(1));
    core.deliver(from, Message { cluster: CLUSTER, from, to, body: Body::Agreement(agreement) }).unwrap();
}

/// What was sent, by kind.
fn sent(core: &mut Core) -> Vec<Kind> {
    let kind = |(_, bytes): (ReplicaId, Vec<u8>)| match decode(&bytes).unwrap().body {
        Body::Agreement(agreement) => Some(agreement.kind),
        _ => None,
    };
    core.take_outbox().into_iter().filter_map(kind).collect()
}

fn add_node(name: &str) -> Vec<u8> {
    let add = Command::AddNode { name: name.parse().unwrap(), host: "h".parse().unwrap(), rack: None, zone: None };
    format::encode_command(&add)
}

/// It could win the same term again after a power loss, with other entries than it has told the learner.
#[test]
fn a_lone_voter_tells_learners_nothing_of_a_term_that_is_not_on_disk() {
    let mut core = core(&[1], &[2]);
    core.propose(1, add_node("n1"));
    let Some(Write::Append { state, entries }) = core.poll() else { panic!("nothing to write") };
    assert_eq!((state.term, state.vote, entries.len()), (2, 1, 2));
    assert_eq!(sent(&mut core), []);
    core.written();
    assert!(sent(&mut core).contains(&Kind::Append));
}

#[test]
fn a_vote_is_said_after_it_is_on_disk() {
    let mut core = core(&[1, 2, 3], &[]);
    let ask = Agreement { term: 5, log_term: 1, index: 1, ..Agreement::new(Kind::RequestVote) };
    deliver(&mut core, 2, ask.clone());
    let Some(Write::Append { state, .. }) = core.poll() else { panic!("nothing to write") };
    assert_eq!((state.term, state.vote), (5, 2));
    assert_eq!(sent(&mut core), []);
    core.written();
    assert_eq!(sent(&mut core), [Kind::RequestVoteResponse]);
    // Another candidate of the same term gets a refusal, and nothing is written.
    deliver(&mut core, 3, ask);
    assert_eq!(core.poll(), None);
}

/// A replica that has the entry of one change must know, after a crash too, that what came before was agreed on.
#[test]
fn entries_are_confirmed_after_they_are_on_disk_and_the_commit_index_goes_with_them() {
    let mut core = core(&[1, 2, 3], &[]);
    let entry = |index| raft_meta::raft::LogEntry { index, term: 5, payload: raft_meta::raft::Payload::Empty };
    let append = Agreement { term: 5, log_term: 1, index: 1, commit: 1, ..Agreement::new(Kind::Append) };
    deliver(&mut core, 2, Agreement { entries: vec![entry(2)], ..append.clone() });
    let Some(Write::Append { state, .. }) = core.poll() else { panic!("nothing to write") };
    assert_eq!((state.commit, sent(&mut core)), (1, vec![]));
    core.written();
    assert_eq!(sent(&mut core), [Kind::AppendResponse]);
    deliver(&mut core, 2, Agreement { log_term: 5, index: 2, commit: 2, entries: vec![entry(3)], ..append });
    let Some(Write::Append { state, .. }) = core.poll() else { panic!("nothing to write") };
    assert_eq!(state.commit, 2, "written with the entry that came with it");
}

#[test]
fn a_disk_that_lost_what_was_confirmed_stops_its_replica() {
    let mut core = core(&[1, 2, 3], &[]);
    deliver(&mut core, 2, Agreement { term: 5, commit: 40, ..Agreement::new(Kind::Heartbeat) });
    let fault = core.fault().expect("the leader knows more than is here").to_string();
    assert!(fault.contains("entry 40") && fault.contains("join again"), "{fault}");
    core.propose(1, add_node("n1"));
    assert_eq!(core.poll(), None);
    assert_eq!(core.take_answers().len(), 1);
}
