//! The choice of voters: a pure function, so every small cluster is tried.

use raft_meta::raft::voters::{Candidate, Input, Next, Standing, next_step};
use raft_meta::raft::{Machine, Member, Role, Step};
use raft_meta::{Command, MetaState, NodeState, ReplicaId};
use std::collections::BTreeSet;
use xsan_types::{ClusterId, NodeId};

/// A member on `host` of `rack`.
fn member(id: u64, rack: &str, host: &str, standing: Standing, votes: bool) -> Candidate {
    let domain = [String::new(), rack.to_owned(), host.to_owned()];
    Candidate { replica: ReplicaId(id), node: NodeId(u32::try_from(id).unwrap()), domain, standing, votes }
}

/// Good members, each on a host of its own; the first `voters` vote.
fn cluster(count: u64, voters: u64) -> Input {
    let members = (1..=count).map(|id| member(id, "", &format!("h{id}"), Standing::Good, id <= voters)).collect();
    Input { leader: ReplicaId(1), members, awaited: BTreeSet::new() }
}

/// Does what is proposed until nothing is; every step must be one the leader may take.
fn settle(input: &mut Input) -> BTreeSet<u64> {
    for _ in 0..20 {
        match next_step(input) {
            None => {
                return input.members.iter().filter(|member| member.votes).map(|member| member.replica.0).collect();
            }
            Some(Next::Transfer(to)) => {
                assert_ne!(to, input.leader);
                let heir = input.members.iter().find(|member| member.replica == to).unwrap();
                assert!(heir.votes && heir.standing == Standing::Good);
                input.leader = to;
            }
            Some(Next::Change(steps)) => take(input, &steps),
        }
        assert!(input.members.iter().any(|member| member.votes), "somebody votes at any time");
    }
    panic!("the choice does not come to rest: {input:?}");
}

fn take(input: &mut Input, steps: &[Step]) {
    for step in steps {
        assert!(step.replica != input.leader || step.role == Role::Voter, "the leader does not change itself");
        let at = input.members.iter().position(|member| member.replica == step.replica).unwrap();
        match step.role {
            Role::Removed => drop(input.members.remove(at)),
            role => input.members[at].votes = role == Role::Voter,
        }
    }
}

#[test]
fn one_three_or_five_vote() {
    for (count, expected) in [(1, 1), (2, 1), (3, 3), (4, 3), (5, 5), (6, 5), (9, 5)] {
        assert_eq!(settle(&mut cluster(count, 1)).len(), expected, "{count} hosts");
    }
}

#[test]
fn a_cluster_that_shrinks_has_fewer_voters_and_keeps_its_leader() {
    let mut input = cluster(5, 5);
    input.members.truncate(2);
    assert_eq!(settle(&mut input), BTreeSet::from([1]));
}

#[test]
fn two_voters_never_share_a_host_and_racks_are_spread() {
    let mut input = Input {
        leader: ReplicaId(1),
        members: vec![
            member(1, "a", "h1", Standing::Good, true),
            member(2, "a", "h1", Standing::Good, false),
            member(3, "a", "h2", Standing::Good, false),
            member(4, "b", "h3", Standing::Good, false),
            member(5, "c", "h4", Standing::Good, false),
        ],
        awaited: BTreeSet::new(),
    };
    assert_eq!(settle(&mut input), BTreeSet::from([1, 4, 5]));
}

#[test]
fn a_node_that_is_away_keeps_its_vote_and_gets_none() {
    let mut input = cluster(4, 3);
    input.members[1].standing = Standing::Away;
    assert_eq!(next_step(&input), None);
    let mut input = cluster(4, 1);
    input.members[3].standing = Standing::Away;
    assert_eq!(settle(&mut input), BTreeSet::from([1, 2, 3]));
}

#[test]
fn a_lost_voter_is_replaced_in_one_step() {
    let mut input = cluster(4, 3);
    input.members[2].standing = Standing::Gone;
    let replaced = [
        Step { replica: ReplicaId(3), node: NodeId(3), role: Role::Removed },
        Step { replica: ReplicaId(4), node: NodeId(4), role: Role::Voter },
    ];
    assert_eq!(next_step(&input), Some(Next::Change(replaced.to_vec())));
    assert_eq!(settle(&mut input), BTreeSet::from([1, 2, 4]));
}

#[test]
fn a_leader_on_a_node_that_is_emptied_hands_over() {
    let mut input = cluster(4, 3);
    input.members[0].standing = Standing::Leaving;
    assert_eq!(settle(&mut input), BTreeSet::from([2, 3, 4]));
    assert_ne!(input.leader, ReplicaId(1));
}

#[test]
fn a_wiped_replica_keeps_its_vote_until_its_successor_has_caught_up() {
    let mut input = cluster(3, 3);
    input.members[2].standing = Standing::Gone;
    input.members.push(Candidate { node: NodeId(3), ..member(4, "", "h3", Standing::Away, false) });
    assert_eq!(next_step(&input), None, "three vote, two of them alive");
    // And if another node goes away meanwhile.
    input.members[1].standing = Standing::Away;
    assert_eq!(next_step(&input), None);
    input.members[1].standing = Standing::Good;
    input.members[3].standing = Standing::Good;
    let replaced = [
        Step { replica: ReplicaId(3), node: NodeId(3), role: Role::Removed },
        Step { replica: ReplicaId(4), node: NodeId(3), role: Role::Voter },
    ];
    assert_eq!(next_step(&input), Some(Next::Change(replaced.to_vec())));
    assert_eq!(settle(&mut input), BTreeSet::from([1, 2, 4]));
}

#[test]
fn a_node_wiped_twice_leaves_nothing_behind() {
    let mut input = cluster(3, 3);
    input.members[2].standing = Standing::Gone;
    for (id, standing) in [(4, Standing::Gone), (5, Standing::Away)] {
        input.members.push(Candidate { node: NodeId(3), ..member(id, "", "h3", standing, false) });
    }
    assert_eq!(settle(&mut input), BTreeSet::from([1, 2, 3]));
    assert!(input.members.iter().all(|member| member.replica != ReplicaId(4)));
    input.members.last_mut().unwrap().standing = Standing::Good;
    assert_eq!(settle(&mut input), BTreeSet::from([1, 2, 5]));
}

#[test]
fn the_one_voter_of_two_hosts_is_not_doubled_and_grows_to_three_at_once() {
    let mut input = cluster(3, 1);
    input.members[2].standing = Standing::Away;
    assert_eq!(next_step(&input), None, "two voters would need both");
    input.members[2].standing = Standing::Good;
    assert_eq!(settle(&mut input), BTreeSet::from([1, 2, 3]));
}

#[test]
fn three_voters_grow_to_five_at_once() {
    let mut input = cluster(5, 3);
    input.members[4].standing = Standing::Away;
    assert_eq!(next_step(&input), None);
    input.members[4].standing = Standing::Good;
    assert_eq!(settle(&mut input).len(), 5);
    // And one to three where five could be.
    let mut input = cluster(5, 1);
    (input.members[3].standing, input.members[4].standing) = (Standing::Away, Standing::Away);
    assert_eq!(settle(&mut input), BTreeSet::from([1, 2, 3]));
}

#[test]
fn a_new_leader_that_has_heard_nobody_changes_nothing() {
    for (count, voters) in [(2, 1), (3, 3), (4, 3), (5, 5), (6, 5), (5, 3)] {
        let mut input = cluster(count, voters);
        input.members[1..].iter_mut().for_each(|member| member.standing = Standing::Away);
        assert_eq!(next_step(&input), None);
    }
}

#[test]
fn a_removed_node_takes_its_vote_with_it_and_an_emptied_one_too() {
    for standing in [Standing::Gone, Standing::Leaving] {
        let mut input = cluster(3, 3);
        input.members[2].standing = standing;
        assert_eq!(settle(&mut input), BTreeSet::from([1]), "two hosts stay");
        let mut input = cluster(5, 5);
        input.members[4].standing = standing;
        assert_eq!(settle(&mut input).len(), 3, "four hosts stay");
        let mut input = cluster(6, 5);
        input.members[4].standing = standing;
        assert_eq!(settle(&mut input), BTreeSet::from([1, 2, 3, 4, 6]));
    }
}

#[test]
fn a_vote_that_is_to_go_waits_for_the_fourth_host() {
    for standing in [Standing::Gone, Standing::Leaving] {
        let mut input = cluster(4, 3);
        (input.members[2].standing, input.members[3].standing) = (standing, Standing::Away);
        assert_eq!(next_step(&input), None);
        input.members[3].standing = Standing::Good;
        assert_eq!(settle(&mut input), BTreeSet::from([1, 2, 4]));
    }
}

#[test]
fn the_living_keep_their_votes_before_the_lost() {
    let mut input = cluster(4, 4);
    (input.members[1].standing, input.members[2].standing) = (Standing::Gone, Standing::Leaving);
    let away = [member(5, "", "h5", Standing::Away, false), member(6, "", "h6", Standing::Away, false)];
    input.members.extend(away);
    input.members.remove(3);
    assert_eq!(settle(&mut input), BTreeSet::from([1, 2, 3]));
    input.members.push(member(7, "", "h7", Standing::Good, false));
    assert_eq!(settle(&mut input), BTreeSet::from([1, 3, 7]));
}

#[test]
fn a_leader_hands_over_before_its_vote_goes() {
    let mut input = cluster(4, 3);
    (input.members[0].standing, input.members[3].standing) = (Standing::Leaving, Standing::Away);
    assert_eq!(next_step(&input), Some(Next::Transfer(ReplicaId(2))));
    assert_eq!(settle(&mut input), BTreeSet::from([1, 2, 3]));
    input.members[3].standing = Standing::Good;
    assert_eq!(settle(&mut input), BTreeSet::from([2, 3, 4]));
}

/// A new node takes a lost one's place: the lost one is removed by the entry that admits the new one, whose replica becomes a
/// member a little later.
#[test]
fn votes_wait_for_a_node_that_was_admitted_and_has_no_replica_yet() {
    let mut input = cluster(3, 3);
    input.members[2].standing = Standing::Gone;
    input.awaited.insert([String::new(), String::new(), "h3".to_owned()]);
    assert_eq!(next_step(&input), None);
    input.awaited.clear();
    input.members.push(member(4, "", "h3", Standing::Away, false));
    assert_eq!(next_step(&input), None);
    input.members[3].standing = Standing::Good;
    assert_eq!(settle(&mut input), BTreeSet::from([1, 2, 4]));
}

#[test]
fn the_metadata_says_who_stays_who_goes_and_who_is_awaited() {
    let mut state = MetaState::new(ClusterId(0xc1), false);
    for number in 1..=4 {
        let name = |letter: char| format!("{letter}{number}").parse().unwrap();
        state.apply(&Command::AddNode { name: name('n'), host: name('h'), rack: None, zone: None }).unwrap();
    }
    for (node, to) in [(1, NodeState::Up), (2, NodeState::Suspect), (3, NodeState::Removed)] {
        state.apply(&Command::SetNodeState { node: NodeId(node), state: to }).unwrap();
    }
    let mut machine = Machine::new(state);
    machine.configuration.voters = vec![ReplicaId(1), ReplicaId(2), ReplicaId(3)];
    // Node 1 was wiped and joined again; node 4 has no replica.
    for (replica, node, since) in [(1, 1, 1), (2, 2, 5), (3, 3, 6), (5, 1, 9)] {
        machine.members.insert(ReplicaId(replica), Member { node: NodeId(node), since });
    }
    let standings = |machine: &Machine, late: u64| {
        let input = Input::new(machine, ReplicaId(2), &|replica| replica.0 != late);
        let standings: Vec<Standing> = input.members.iter().map(|member| member.standing).collect();
        (standings, input.awaited.iter().map(|domain| domain[2].clone()).collect::<Vec<_>>())
    };
    let (away, gone, good) = (Standing::Away, Standing::Gone, Standing::Good);
    assert_eq!(standings(&machine, 0), (vec![gone, away, gone, good], vec!["h4".to_owned()]));
    assert_eq!(standings(&machine, 5), (vec![gone, away, gone, away], vec!["h4".to_owned()]));
    machine.members.insert(ReplicaId(7), Member { node: NodeId(4), since: 10 });
    assert_eq!(standings(&machine, 7), (vec![gone, away, gone, good, away], vec![]));
}

/// How many vote in the end is at least what was, if the hosts that stay are enough for it.
fn check_kept(before: &Input, after: &BTreeSet<u64>) {
    let staying = before.members.iter().filter(|member| member.standing < Standing::Leaving);
    let staying = staying.map(|member| &member.domain).collect::<BTreeSet<_>>().len();
    let suits = [0, 1, 1, 3, 3][staying];
    let present = before.members.iter().filter(|member| member.votes).count();
    assert!(after.len() >= present.min(suits), "{before:?} has only {after:?}");
}

/// All clusters of up to four members with any standing and any votes, leader included: it comes to rest, and rightly.
#[test]
fn every_small_cluster_comes_to_rest() {
    let standings = [Standing::Good, Standing::Away, Standing::Leaving, Standing::Gone];
    for count in 1..=4_u32 {
        for word in 0..8_u32.pow(count) {
            let members: Vec<Candidate> = (0..count)
                .map(|at| {
                    let digit = word / 8_u32.pow(at) % 8;
                    let standing = standings[usize::try_from(digit / 2).unwrap()];
                    member(u64::from(at) + 1, "", &format!("h{at}"), standing, digit % 2 == 1)
                })
                .collect();
            for leader in members.iter().filter(|member| member.votes).map(|member| member.replica) {
                let mut input = Input { leader, members: members.clone(), awaited: BTreeSet::new() };
                let before = input.clone();
                let voters = settle(&mut input);
                assert_eq!(next_step(&input), None);
                check_kept(&before, &voters);
            }
        }
    }
}
