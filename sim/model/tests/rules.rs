//! Every rule of every model is needed: without it a promise breaks, with all of them none does, in every state within the
//! bounds. Larger bounds: `cargo run --release -p xsan-model -- --help`.

use xsan_model::moves::Moves;
use xsan_model::pins::Pins;
use xsan_model::reconnect::Reconnect;
use xsan_model::rows::Rows;
use xsan_model::rules::{Rule, Ruled, judge};
use xsan_model::volume::Volume;

/// More than any search here needs; one that gets there has bounds that are too wide.
const STATES_MAX: usize = 1_500_000;

fn every_rule_is_needed<M: Ruled>() {
    for rule in M::Rule::ALL {
        assert!(M::NEEDED.iter().any(|(needed, _)| needed == rule), "{}: no bounds for {}", M::NAME, rule.name());
    }
    for (rule, words) in M::NEEDED {
        let verdict = judge::<M>(*rule, words, STATES_MAX).unwrap();
        let story = verdict.with.story().map_or(String::new(), ToString::to_string);
        assert!(verdict.with.is_clean(), "{}: {words}: {} states\n{story}", M::NAME, verdict.with.states);
        assert!(verdict.without.story().is_some(), "{}: nothing breaks without {}", M::NAME, rule.name());
    }
}

#[test]
fn every_rule_of_a_volume_is_needed() {
    every_rule_is_needed::<Volume>();
}

#[test]
fn every_rule_of_moves_is_needed() {
    every_rule_is_needed::<Moves>();
}

#[test]
fn every_rule_of_rows_is_needed() {
    every_rule_is_needed::<Rows>();
}

#[test]
fn every_rule_of_pins_is_needed() {
    every_rule_is_needed::<Pins>();
}

#[test]
fn every_rule_of_connections_is_needed() {
    every_rule_is_needed::<Reconnect>();
}
