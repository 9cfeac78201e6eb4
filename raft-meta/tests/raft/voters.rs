//! The choice of voters: a pure function, so every small cluster is tried.

use raft_meta::ReplicaId;
use raft_meta::raft::voters::{Candidate, Input, Next, Standing, next_step};
use raft_meta::raft::{Role, Step};
use std::collections::BTreeSet;
use xsan_types::NodeId;

/// A member on `host` of `rack`.
fn member(id: u64, rack: &str, host: &str, standing: Standing, votes: bool) -> Candidate {
    let domain = [String::new(), rack.to_owned(), host.to_owned()];
    Candidate { replica: ReplicaId(id), node: NodeId(u32::try_from(id).unwrap()), domain, standing, votes }
}

/// Good members, each on a host of its own; the first `voters` vote.
fn cluster(count: u64, voters: u64) -> Input {
    let members = (1..=count).map(|id| member(id, "", &format!("h{id}"), Standing::Good, id <= voters)).collect();
    Input { leader: ReplicaId(1), members }
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
                let mut input = Input { leader, members: members.clone() };
                settle(&mut input);
                assert_eq!(next_step(&input), None);
            }
        }
    }
}
