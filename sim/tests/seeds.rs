//! The simulator's own promises: it repeats, fresh seeds hold, and it finds what is broken on purpose.

use xsan_sim::link::Canary;
use xsan_sim::{Options, simulate};

const SMALL: Options = Options { faults: 4, canary: Canary::Off, print: false };

#[test]
fn the_same_seed_twice_gives_the_same_trace() {
    for seed in [1, 2, 0xfeed] {
        let first = simulate(seed, SMALL).expect("a run that holds");
        let second = simulate(seed, SMALL).expect("a run that holds");
        assert_eq!(first, second, "seed {seed:#x} is two runs");
        assert!(first.writes > 10 && first.takeovers > 1, "too little happened: {first:?}");
    }
    let other = simulate(3, SMALL).expect("a run that holds");
    assert_ne!(other.trace, simulate(1, SMALL).expect("a run that holds").trace, "the trace says nothing");
}

#[test]
fn fresh_seeds_hold() {
    for seed in 100..108 {
        if let Err(failure) = simulate(seed, SMALL) {
            panic!("{failure}\nagain: cargo run --release -p xsan-sim -- --seed {seed:#x} --faults 4 --trace");
        }
    }
}

/// How many seeds it takes to see a broken rule.
fn found_within(canary: Canary, seeds: u64) -> Option<u64> {
    (1..=seeds).find(|&seed| simulate(seed, Options { faults: 8, canary, print: false }).is_err())
}

#[test]
fn a_flush_that_does_nothing_is_found() {
    assert!(found_within(Canary::FlushLies, 12).is_some(), "no seed saw flushed writes go with the power");
}

#[test]
fn an_append_that_does_nothing_is_found() {
    assert!(found_within(Canary::AppendLies, 12).is_some(), "no seed missed the writes");
}

#[test]
fn a_closed_member_that_confirms_reads_is_found() {
    assert!(found_within(Canary::ConfirmLies, 40).is_some(), "no seed saw a stale read of the old owner");
}
