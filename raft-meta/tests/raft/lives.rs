//! Lives from seeds. `XSAN_RAFT_SEEDS=N` runs N of each kind; `XSAN_RAFT_SEED=S` one, of the size in `XSAN_RAFT_NODES`.

use crate::life::{Report, live};
use crate::world::{Sabotage, Setup};

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().and_then(|text| text.parse().ok())
}

fn seeds() -> u64 {
    // Unoptimised code is ten times slower.
    number("XSAN_RAFT_SEEDS").unwrap_or(if cfg!(debug_assertions) { 6 } else { 100 })
}

fn must_live(setup: Setup) -> Report {
    match live(setup) {
        Ok(report) => report,
        Err(broken) => {
            let (seed, nodes) = (setup.seed, setup.nodes);
            panic!(
                "{broken}\nagain: XSAN_RAFT_SEED={seed} XSAN_RAFT_NODES={nodes} cargo test -p raft-meta --test raft one_life"
            )
        }
    }
}

fn lives(nodes: u32) {
    let mut sum = Report::default();
    for seed in 0..seeds() {
        let report = must_live(Setup { seed, nodes, sabotage: Sabotage::Nothing });
        sum.acknowledged += report.acknowledged;
        sum.unknown += report.unknown;
        sum.reads += report.reads;
        sum.term += report.term;
        sum.index += report.index;
    }
    eprintln!("{nodes} nodes, {} seeds: {sum:?}", seeds());
    assert!(sum.acknowledged > 10 * seeds() && sum.reads > 10 * seeds(), "the lives did too little: {sum:?}");
}

/// One voter and a learner: the only group in which a leader can win a term without anybody else knowing.
#[test]
fn two_nodes_keep_every_promise_through_crashes_and_cuts() {
    lives(2);
}

#[test]
fn three_nodes_keep_every_promise_through_crashes_cuts_and_lost_disks() {
    lives(3);
}

#[test]
fn five_nodes_keep_every_promise_through_crashes_cuts_and_lost_disks() {
    lives(5);
}

#[test]
fn votes_move_to_a_spare_node_and_back_without_breaking_a_promise() {
    lives(4);
}

#[test]
fn one_life() {
    let (seed, nodes) = (number("XSAN_RAFT_SEED").unwrap_or(7), number("XSAN_RAFT_NODES").unwrap_or(3));
    let setup = Setup { seed, nodes: u32::try_from(nodes).unwrap(), sabotage: Sabotage::Nothing };
    let (first, again) = (must_live(setup), must_live(setup));
    assert_eq!(first.trace, again.trace, "the same seed must do the same");
}

/// A rule that is broken on purpose has to show, or the lives prove nothing.
fn must_show(sabotage: Sabotage, nodes: u32) {
    for seed in 0..300 {
        if let Err(broken) = live(Setup { seed, nodes, sabotage }) {
            eprintln!("{sabotage:?}: seed {seed}: {broken}");
            return;
        }
    }
    panic!("{sabotage:?} was not noticed in 300 lives");
}

#[test]
fn canary_term_and_vote_that_are_not_flushed_are_noticed() {
    must_show(Sabotage::StateNotFlushed, 3);
}

#[test]
fn canary_an_acknowledgement_before_a_majority_has_it_is_noticed() {
    must_show(Sabotage::AckBeforeQuorum, 3);
}

#[test]
fn canary_a_read_that_does_not_ask_the_leader_is_noticed() {
    must_show(Sabotage::ReadWithoutBarrier, 3);
}

#[test]
fn hostile_messages_make_no_replica_panic() {
    for seed in 0..seeds() * 20 {
        crate::hostile::hostile_life(seed);
        crate::hostile::hostile_bytes(seed);
    }
}
