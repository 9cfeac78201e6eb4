//! The simulator's own promises: it repeats, fresh seeds hold, and it finds what is broken on purpose.

use xsan_sim::link::Canary;
use xsan_sim::{Options, simulate};

const SMALL: Options = Options { faults: 4, canary: Canary::Off, beyond: false, print: false };

#[test]
fn the_same_seed_twice_gives_the_same_trace() {
    let (mut writes, mut takeovers) = (0, 0);
    for seed in [1, 2, 0xfeed] {
        let first = simulate(seed, SMALL).expect("a run that holds");
        let second = simulate(seed, SMALL).expect("a run that holds");
        assert_eq!(first, second, "seed {seed:#x} is two runs");
        writes += first.writes;
        takeovers += first.takeovers;
    }
    assert!(writes > 100 && takeovers > 5, "too little happened: {writes} writes, {takeovers} take-overs");
    let other = simulate(3, SMALL).expect("a run that holds");
    assert_ne!(other.trace, simulate(1, SMALL).expect("a run that holds").trace, "the trace says nothing");
}

#[test]
fn fresh_seeds_hold() {
    for seed in 100..108 {
        if let Err(failure) = simulate(seed, SMALL) {
            panic!("{failure}\nagain: cargo xtask sim --seed {seed:#x} --faults 4 --trace");
        }
    }
}

#[test]
fn seeds_that_once_failed_hold() {
    let mut count = 0;
    for line in include_str!("../seeds/found.txt").lines().filter(|line| !line.starts_with('#')) {
        let (seed, faults) = line.split_once(' ').expect("a seed and its faults");
        let seed = u64::from_str_radix(seed.trim_start_matches("0x"), 16).expect("a seed");
        let faults = faults.parse().expect("a number of faults");
        if let Err(failure) = simulate(seed, Options { faults, ..SMALL }) {
            panic!("{failure}\nagain: cargo xtask sim --seed {seed:#x} --faults {faults} --trace");
        }
        count += 1;
    }
    assert!(count > 10, "the seeds were not read");
}

#[test]
fn beyond_what_is_tolerated_nothing_wrong_is_given() {
    for seed in 200..208 {
        if let Err(failure) = simulate(seed, Options { beyond: true, ..SMALL }) {
            panic!("{failure}\nagain: cargo xtask sim --seed {seed:#x} --faults 4 --beyond --trace");
        }
    }
}

/// How many seeds it takes to see a broken rule, by what the guests are given and not by something that hangs.
fn found_within(canary: Canary, seeds: u64) -> Option<u64> {
    let found = |&seed: &u64| match simulate(seed, Options { faults: 8, canary, ..SMALL }) {
        Ok(_) => false,
        // As the model says it: other failures (a take-over that hangs) do not count.
        Err(failure) => failure.what.contains("sector at "),
    };
    (1..=seeds).find(found)
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

#[test]
fn an_append_to_a_closed_member_is_found() {
    assert!(found_within(Canary::ClosedTakes, 40).is_some(), "no seed saw what the old owner acknowledged go");
}

#[test]
fn records_that_recovery_drops_are_found() {
    assert!(found_within(Canary::ReplicaLies, 12).is_some(), "no seed missed the records");
}
