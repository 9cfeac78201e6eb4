//! Joining, replacing, reports, who serves (RFC 0005).

use crate::support::{VOLUME, create_volume, name, state_after, whole_cluster};
use raft_meta::{
    AddressCommand, Authority, Candidacy, Command, MetaError, MetaState, NodeState, Outcome, ServiceAddress,
    ShownToken, TokenRecord,
};
use xsan_types::{ChangeToken, Generation, NodeId, RegisterChange, VolumeId};

const SECRET: [u8; 32] = [7; 32];

fn token(uses_left: u32) -> Command {
    let token = TokenRecord { secret_hash: SECRET, expires_millis: 1_000, uses_left };
    Command::AddToken { number: 1, token, now_millis: 0 }
}

fn candidacy(text: &str) -> Candidacy {
    Candidacy {
        token: Some(ShownToken { number: 1, secret_hash: SECRET }),
        now_millis: 10,
        name: name(text),
        host: name(text),
        rack: None,
        zone: None,
        address: format!("{text}:7400"),
        public_key: text.as_bytes().to_vec(),
        replica: 5,
        replaces: false,
    }
}

fn refuse(state: &mut MetaState, command: &Command, expected: &MetaError) {
    let before = state.clone();
    assert_eq!(state.apply(command).as_ref(), Err(expected), "{command:?}");
    assert_eq!(*state, before, "a refused command changes nothing: {command:?}");
}

fn admit(state: &mut MetaState, candidacy: Candidacy) -> NodeId {
    match state.apply(&Command::AdmitNode(candidacy)) {
        Ok(Outcome::Node(id)) => id,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_token_lets_in_as_many_nodes_as_it_may_and_no_more() {
    let mut state = state_after(&[token(2)]);
    let first = admit(&mut state, candidacy("a"));
    assert_eq!(state.node(first).map(|node| node.state), Some(NodeState::Joining));
    admit(&mut state, candidacy("b"));
    refuse(&mut state, &Command::AdmitNode(candidacy("c")), &MetaError::TokenUsedUp);
    state.check().unwrap();
}

#[test]
fn a_join_whose_answer_was_lost_is_answered_again_and_uses_nothing_up() {
    let mut state = state_after(&[token(1)]);
    let first = admit(&mut state, candidacy("a"));
    let again = Candidacy { replica: 6, address: "elsewhere:1".into(), now_millis: 5_000, ..candidacy("a") };
    assert_eq!(admit(&mut state, again), first);
    let record = &state.hosts.nodes[&first];
    assert_eq!((record.replica, record.address.as_str()), (6, "elsewhere:1"));
    assert_eq!((state.nodes.len(), state.hosts.tokens[&1].uses_left), (1, 0));
    // Another key is another host.
    let other = Candidacy { public_key: vec![1], ..candidacy("a") };
    refuse(&mut state, &Command::AdmitNode(other), &MetaError::TokenUsedUp);
}

#[test]
fn name_and_key_of_a_node_are_no_pass_for_its_record() {
    let mut state = state_after(&[token(1)]);
    let first = admit(&mut state, candidacy("a"));
    let again = Candidacy { replica: 6, address: "elsewhere:1".into(), now_millis: 5_000, ..candidacy("a") };
    // Certificates are shown to everybody who connects; the secret of the token is not.
    for wrong in [ShownToken { number: 1, secret_hash: [8; 32] }, ShownToken { number: 2, secret_hash: SECRET }] {
        let forged = Candidacy { token: Some(wrong), ..again.clone() };
        assert_eq!(state.check_candidacy(&forged), Err(MetaError::TokenUnknown));
        refuse(&mut state, &Command::AdmitNode(forged), &MetaError::TokenUnknown);
    }
    // A node that has been up is asked for its address and its replica, and nobody else.
    state.apply(&Command::SetNodeState { node: first, state: NodeState::Up }).unwrap();
    assert_eq!(state.check_candidacy(&again), Err(MetaError::NameTaken));
    refuse(&mut state, &Command::AdmitNode(again), &MetaError::NameTaken);
    assert_eq!(admit(&mut state, candidacy("a")), first, "the same request has the same answer");
    state.apply(&Command::RevokeToken { number: 1 }).unwrap();
    refuse(&mut state, &Command::AdmitNode(candidacy("a")), &MetaError::TokenUnknown);
}

#[test]
fn a_candidacy_is_judged_before_it_is_proposed_as_it_is_after() {
    let state = state_after(&[token(0)]);
    let wrong = Candidacy { token: Some(ShownToken { number: 1, secret_hash: [8; 32] }), ..candidacy("a") };
    let late = Candidacy { now_millis: 1_000, ..candidacy("a") };
    let (long, key) = ("x".repeat(256), vec![0; 257]);
    let judged = [
        (wrong, MetaError::TokenUnknown),
        (late, MetaError::TokenExpired),
        (candidacy("a"), MetaError::TokenUsedUp),
        (Candidacy { address: long, ..candidacy("a") }, MetaError::TextTooLong),
        (Candidacy { public_key: key, ..candidacy("a") }, MetaError::TextTooLong),
    ];
    for (candidacy, expected) in judged {
        assert_eq!(state.check_candidacy(&candidacy), Err(expected.clone()));
        refuse(&mut state.clone(), &Command::AdmitNode(candidacy), &expected);
    }
    assert_eq!(state_after(&[token(1)]).check_candidacy(&candidacy("a")), Ok(()));
}

#[test]
fn expired_revoked_and_wrong_tokens_let_nobody_in() {
    let mut state = state_after(&[token(2)]);
    let late = Candidacy { now_millis: 1_000, ..candidacy("a") };
    refuse(&mut state, &Command::AdmitNode(late), &MetaError::TokenExpired);
    let wrong = Candidacy { token: Some(ShownToken { number: 1, secret_hash: [8; 32] }), ..candidacy("a") };
    refuse(&mut state, &Command::AdmitNode(wrong), &MetaError::TokenUnknown);
    state.apply(&Command::RevokeToken { number: 1 }).unwrap();
    refuse(&mut state, &Command::AdmitNode(candidacy("a")), &MetaError::TokenUnknown);
    refuse(&mut state, &Command::RevokeToken { number: 1 }, &MetaError::TokenUnknown);
}

#[test]
fn a_taken_name_is_refused_unless_the_node_is_down_and_to_be_replaced() {
    let mut state = state_after(&whole_cluster());
    state.apply(&token(5)).unwrap();
    let old = state.node_named("n2").unwrap().clone();
    let place = (old.host.clone(), old.rack.clone(), old.zone.clone());
    let candidacy = Candidacy { name: old.name.clone(), host: place.0, rack: place.1, zone: place.2, ..candidacy("x") };
    refuse(&mut state, &Command::AdmitNode(candidacy.clone()), &MetaError::NameTaken);
    let replaces = Candidacy { replaces: true, ..candidacy };
    refuse(&mut state, &Command::AdmitNode(replaces.clone()), &MetaError::NotDown(old.id));
    state.apply(&Command::SetNodeState { node: old.id, state: NodeState::Down }).unwrap();
    let elsewhere = Candidacy { host: name("other"), ..replaces.clone() };
    refuse(&mut state, &Command::AdmitNode(elsewhere), &MetaError::HostElsewhere(old.id));
    let devices: Vec<_> = state.devices_of(old.id).map(|device| device.id).collect();
    let table = state.pool_named("p").unwrap().table.clone();
    let id = admit(&mut state, replaces);
    assert_ne!(id, old.id);
    assert_eq!(state.node(old.id), None, "the old node is not let in again");
    assert_eq!(state.devices_of(id).map(|device| device.id).collect::<Vec<_>>(), devices);
    assert_eq!(state.pool_named("p").unwrap().table, table, "nothing moves");
    state.check().unwrap();
}

#[test]
fn a_report_that_is_out_of_date_changes_nothing() {
    let mut state = state_after(&[token(5)]);
    let node = admit(&mut state, candidacy("a"));
    let report = |from, to| Command::ReportNode { node, term: 1, from, to, now_millis: 77, reason: "silent".into() };
    refuse(&mut state, &report(NodeState::Up, NodeState::Suspect), &MetaError::Outdated);
    state.apply(&report(NodeState::Joining, NodeState::Up)).unwrap();
    let record = &state.hosts.nodes[&node];
    assert_eq!((record.since_millis, record.reason.as_str()), (77, "silent"));
    let long = Command::ReportNode {
        node,
        term: 1,
        from: NodeState::Up,
        to: NodeState::Down,
        now_millis: 78,
        reason: "x".repeat(256),
    };
    refuse(&mut state, &long, &MetaError::TextTooLong);
}

#[test]
fn who_serves_is_noted_by_generation() {
    let mut state = state_after(&whole_cluster());
    let served = |generation, node| Command::VolumeServed { volume: VOLUME, generation: Generation(generation), node };
    state.apply(&served(2, Some(NodeId(1)))).unwrap();
    refuse(&mut state, &served(1, Some(NodeId(2))), &MetaError::Outdated);
    assert_eq!(state.hosts.served[&VOLUME].node, NodeId(1));
    state.apply(&served(2, None)).unwrap();
    assert!(state.hosts.served.is_empty());
}

#[test]
fn an_address_is_one_volumes_and_goes_with_it() {
    let mut state = state_after(&whole_cluster());
    let other = match state.apply(&create_volume("other")) {
        Ok(Outcome::Volume(id)) => id,
        answer => panic!("{answer:?}"),
    };
    let place = |text: &str| Some(text.parse::<ServiceAddress>().unwrap());
    let set = |volume, place| Command::ServiceAddress(AddressCommand::Set { volume, place });
    state.apply(&set(VOLUME, place("10.0.0.50/24"))).unwrap();
    refuse(&mut state, &set(other, place("10.0.0.50/16")), &MetaError::AddressTaken(VOLUME));
    let unusable = ServiceAddress { address: "10.0.0.0".parse().unwrap(), prefix: 24, interface: None };
    refuse(&mut state, &set(VOLUME, Some(unusable)), &MetaError::AddressUnusable);
    refuse(&mut state, &set(VolumeId(99), None), &MetaError::NoVolume(VolumeId(99)));
    let clients = |generation, clients: &[&str]| {
        let clients = clients.iter().map(|client| client.parse().unwrap()).collect();
        Command::ServiceAddress(AddressCommand::Clients { volume: VOLUME, generation: Generation(generation), clients })
    };
    state.apply(&clients(3, &["10.0.0.7:1"])).unwrap();
    refuse(&mut state, &clients(2, &[]), &MetaError::Outdated);
    let served = Command::VolumeServed { volume: VOLUME, generation: Generation(4), node: Some(NodeId(1)) };
    state.apply(&served).unwrap();
    refuse(&mut state, &clients(3, &[]), &MetaError::Outdated);
    refuse(&mut state, &clients(4, &["10.0.0.7:1"; 65]), &MetaError::TextTooLong);
    // Another prefix or interface is the same address: its clients stay.
    state.apply(&set(VOLUME, place("10.0.0.50/16"))).unwrap();
    assert_eq!(state.addresses[&VOLUME].clients.len(), 1);
    state.apply(&set(VOLUME, place("10.0.0.51/16"))).unwrap();
    assert!(state.addresses[&VOLUME].clients.is_empty());
    state.check().unwrap();
    let register = state.volume(VOLUME).unwrap().register().clone();
    let retire = Command::ChangeRegister {
        volume: VOLUME,
        generation: register.generation,
        version: register.version,
        token: ChangeToken(77),
        change: RegisterChange::Retire,
    };
    state.apply(&retire).unwrap();
    assert!(state.addresses.is_empty(), "the address is free with its volume");
    state.apply(&set(other, place("10.0.0.51/16"))).unwrap();
    state.check().unwrap();
}

#[test]
fn the_authority_never_changes() {
    let authority = Authority { certificate: "c".into(), key: "k".into() };
    let mut state = state_after(&[Command::SetAuthority(authority.clone())]);
    state.apply(&Command::SetAuthority(authority.clone())).unwrap();
    let other = Authority { key: "other".into(), ..authority };
    refuse(&mut state, &Command::SetAuthority(other), &MetaError::AuthorityKnown);
}

#[test]
fn nodes_are_renamed_to_free_names_only() {
    let mut state = state_after(&[token(5)]);
    let (a, _b) = (admit(&mut state, candidacy("a")), admit(&mut state, candidacy("b")));
    refuse(&mut state, &Command::RenameNode { node: a, name: name("b") }, &MetaError::NameTaken);
    state.apply(&Command::RenameNode { node: a, name: name("c") }).unwrap();
    assert_eq!(state.node_named("c").map(|node| node.id), Some(a));
}
