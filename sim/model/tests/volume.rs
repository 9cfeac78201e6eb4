//! A volume beyond the table of rules: two failures, everything at once, and what the models found and nobody mended yet.

use xsan_model::check::{Outcome, Walks, search, walk};
use xsan_model::rules::{Ruled, Rules};
use xsan_model::volume::{Volume, VolumeRule};

fn volume(words: &str, rules: Rules<VolumeRule>) -> Volume {
    let words: Vec<&str> = words.split_whitespace().collect();
    Volume::build(&words, rules).unwrap()
}

#[test]
fn two_failures_are_tolerated_by_a_scheme_for_two() {
    for words in [
        "f=2 w=1 take=1 lost=2",
        "f=2 w=1 take=1 power=2",
        "f=2 w=1 take=1 disk=1 lost=1",
        "f=2 w=1 take=1 pc=2",
        "f=2 w=2 take=1",
        "f=2 w=1 seal=1 take=1",
    ] {
        let report = search(&volume(words, Rules::all()), 600_000);
        assert!(report.is_clean(), "{words}: {} states {:?}", report.states, report.story());
    }
}

#[test]
fn a_scheme_for_two_needs_the_rules_too() {
    for (rule, words) in [
        (VolumeRule::Incarnations, "f=2 w=1 flush=1 power=1 lost=1 take=1"),
        (VolumeRule::UnknownIsLost, "f=2 w=1 disk=1 take=1"),
        (VolumeRule::CopyFirst, "f=2 w=1 sc=1 take=1"),
        (VolumeRule::WholeMember, "f=2 w=1 power=1 take=1"),
        (VolumeRule::StraysIgnored, "f=2 w=1 seal=1 lost=1 take=1"),
    ] {
        let report = search(&volume(words, Rules::all().without(rule)), 600_000);
        assert!(report.story().is_some(), "{words}: nothing breaks without {rule:?}");
    }
}

/// Everything may happen, but for the failures: those are given.
const EVERYTHING: &str = "w=4 blocks=2 take=3 oc=2 pc=1 sc=2 seal=3 flush=2 ck=2 clean=1 over=1 reads inflight slow";

#[test]
fn walks_through_everything_break_nothing() {
    for failures in ["f=1 power=3 lost=1", "f=1 blackout=1", "f=1 disk=1 garbage", "f=2 lost=2", "f=2 power=2 window"] {
        let model = volume(&format!("{EVERYTHING} {failures}"), Rules::all());
        let report = walk(&model, Walks { count: 1_000, steps_max: 200, seed: 1 });
        if let Outcome::Violation(story) = report.outcome {
            panic!("{failures}\n{story}");
        }
    }
}

/// A member that was started again cannot tell how far it had written. If its last records rot, it looks whole and shorter, and a
/// taker to which the other member is silent is content with it.
#[test]
fn found_rot_on_a_restarted_member_is_not_seen() {
    let report = search(&volume("w=1 rot=1 pc=1 take=1", Rules::all()), 100_000);
    assert!(report.story().is_some_and(|story| story.broken.contains("acknowledged")));
}

/// A set that was made smaller for a node that is only down: two nodes are lost before it grows again, and with them the set, though
/// the scheme tolerates two and the third has all its bytes.
#[test]
fn found_a_smaller_set_tolerates_fewer_losses() {
    let report = search(&volume("f=2 w=1 sc=1 pc=1 lost=2 take=1 shrink", Rules::all()), 600_000);
    assert!(report.story().is_some_and(|story| story.broken.contains("journal set")));
}
