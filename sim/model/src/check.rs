//! The checker: looks through the states of a model for one that breaks a promise, and tells how it came about.
//!
//! Breadth first, so the first story found is a shortest one. A model that is too big for that is walked through at
//! random, from a seed. Both see every step that the model offers; a search that ends as [`Outcome::Complete`] has seen every
//! state within the model's bounds.

use crate::fingerprint::{Fingerprint, Parents, fingerprint};
use std::fmt;
use std::hash::Hash;

/// A system as states and the steps between them.
pub trait Model {
    /// All there is at one moment; equal states have equal futures.
    type State: Clone + Hash;

    /// Where every story begins.
    fn initial(&self) -> Self::State;

    /// Adds every state that one step leads to.
    fn successors(&self, state: &Self::State, steps: &mut Steps<Self::State>);

    /// Forgets what can make no difference any more, so that states that differ in that alone become one.
    fn forget(&self, _state: &mut Self::State) {}

    /// The promise that this state breaks, in words.
    fn violation(&self, state: &Self::State) -> Option<&'static str>;
}

/// The steps that lead out of a state.
pub struct Steps<S> {
    steps: Vec<Step<S>>,
    /// Only a story needs words; most states are left without.
    with_words: bool,
}

struct Step<S> {
    state: S,
    words: String,
    is_failure: bool,
}

impl<S> Steps<S> {
    fn new(with_words: bool) -> Self {
        Self { steps: Vec::new(), with_words }
    }

    /// Something that the system does.
    pub fn add(&mut self, state: S, words: impl FnOnce() -> String) {
        self.push(state, words, false);
    }

    /// Something that goes wrong. Random walks choose it seldom, or they would never get anywhere.
    pub fn add_failure(&mut self, state: S, words: impl FnOnce() -> String) {
        self.push(state, words, true);
    }

    fn push(&mut self, state: S, words: impl FnOnce() -> String, is_failure: bool) {
        let words = if self.with_words { words() } else { String::new() };
        self.steps.push(Step { state, words, is_failure });
    }
}

/// How a search ended.
#[derive(Debug)]
pub enum Outcome {
    /// No state within the model's bounds breaks a promise.
    Complete,
    /// None of the states looked at does; there are more.
    Unfinished,
    /// One does.
    Violation(Story),
}

/// What a search saw.
#[derive(Debug)]
pub struct Report {
    /// How it ended.
    pub outcome: Outcome,
    /// Different states (a search) or steps (walks) looked at.
    pub states: usize,
    /// Steps of the longest way followed.
    pub depth: usize,
}

impl Report {
    /// Whether the search saw everything and found nothing.
    pub fn is_clean(&self) -> bool {
        matches!(self.outcome, Outcome::Complete)
    }

    /// The story that breaks a promise.
    pub fn story(&self) -> Option<&Story> {
        match &self.outcome {
            Outcome::Violation(story) => Some(story),
            Outcome::Complete | Outcome::Unfinished => None,
        }
    }
}

/// A way from the beginning to a broken promise.
#[derive(Debug)]
pub struct Story {
    /// What happens, in order.
    pub steps: Vec<String>,
    /// What is broken at the end.
    pub broken: &'static str,
}

impl fmt::Display for Story {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, step) in self.steps.iter().enumerate() {
            writeln!(f, "{:4}. {step}", number + 1)?;
        }
        write!(f, "   => {}", self.broken)
    }
}

/// Looks at every state, nearest first, until one breaks a promise or `states_max` were seen.
pub fn search<M: Model>(model: &M, states_max: usize) -> Report {
    let initial = model.initial();
    let mut parents = Parents::default();
    let first = fingerprint(&initial);
    parents.insert(first, first);
    let mut here = vec![(first, initial)];
    let mut steps = Steps::new(false);
    let mut depth = 0;
    while !here.is_empty() {
        let mut next = Vec::new();
        for (from, state) in here.drain(..) {
            if let Some(broken) = model.violation(&state) {
                let story = Story { steps: tell(model, &parents, from), broken };
                return Report { outcome: Outcome::Violation(story), states: parents.len(), depth };
            }
            model.successors(&state, &mut steps);
            for Step { mut state, .. } in steps.steps.drain(..) {
                model.forget(&mut state);
                let to = fingerprint(&state);
                if let hashbrown::hash_map::Entry::Vacant(place) = parents.entry(to) {
                    place.insert(from);
                    next.push((to, state));
                }
            }
            if parents.len() > states_max {
                return Report { outcome: Outcome::Unfinished, states: parents.len(), depth };
            }
        }
        depth += usize::from(!next.is_empty());
        here = next;
    }
    Report { outcome: Outcome::Complete, states: parents.len(), depth }
}

/// Walks the way again from the beginning, this time with words: the search kept fingerprints only.
fn tell<M: Model>(model: &M, parents: &Parents, last: Fingerprint) -> Vec<String> {
    let mut way = vec![last];
    while let Some(parent) = parents.get(&way[way.len() - 1]).filter(|parent| **parent != way[way.len() - 1]) {
        way.push(*parent);
    }
    let mut state = model.initial();
    let mut words = Vec::new();
    for wanted in way.iter().rev().skip(1) {
        let mut steps = Steps::new(true);
        model.successors(&state, &mut steps);
        steps.steps.iter_mut().for_each(|step| model.forget(&mut step.state));
        let Some(step) = steps.steps.into_iter().find(|step| fingerprint(&step.state) == *wanted) else {
            words.push("(the model does not repeat itself from here on)".to_owned());
            break;
        };
        words.push(step.words);
        state = step.state;
    }
    words
}

/// How random walks are made.
#[derive(Clone, Copy, Debug)]
pub struct Walks {
    /// How many, each from the beginning.
    pub count: u64,
    /// Steps of one, at most.
    pub steps_max: usize,
    /// The same seed walks the same ways.
    pub seed: u64,
}

/// Walks at random until a state breaks a promise or all walks are made. Never [`Outcome::Complete`].
pub fn walk<M: Model>(model: &M, walks: Walks) -> Report {
    let mut states = 0;
    let mut depth = 0;
    for number in 0..walks.count {
        let seed = walks.seed.wrapping_add(number.wrapping_mul(0xA24B_AED4_963E_E407));
        let way = walk_once(model, seed, walks.steps_max, false);
        states += way.steps;
        depth = depth.max(way.steps);
        if way.broken.is_some() {
            let told = walk_once(model, seed, walks.steps_max, true);
            let story = Story { steps: told.words, broken: told.broken.unwrap_or("(not repeated)") };
            return Report { outcome: Outcome::Violation(story), states, depth };
        }
    }
    Report { outcome: Outcome::Unfinished, states, depth }
}

struct Way {
    steps: usize,
    words: Vec<String>,
    broken: Option<&'static str>,
}

/// One choice in this many may be a failure.
const FAILURES_ONE_IN: u64 = 8;

fn walk_once<M: Model>(model: &M, seed: u64, steps_max: usize, with_words: bool) -> Way {
    let mut random = Random(seed);
    let mut state = model.initial();
    let mut way = Way { steps: 0, words: Vec::new(), broken: model.violation(&state) };
    let mut steps = Steps::new(with_words);
    while way.broken.is_none() && way.steps < steps_max {
        model.successors(&state, &mut steps);
        if random.below(FAILURES_ONE_IN) != 0 && steps.steps.iter().any(|step| !step.is_failure) {
            steps.steps.retain(|step| !step.is_failure);
        }
        if steps.steps.is_empty() {
            break;
        }
        let chosen = random.below(steps.steps.len() as u64);
        let step = steps.steps.swap_remove(usize::try_from(chosen).unwrap_or(0));
        steps.steps.clear();
        state = step.state;
        model.forget(&mut state);
        way.steps += 1;
        way.words.extend(with_words.then_some(step.words));
        way.broken = model.violation(&state);
    }
    way
}

/// splitmix64: small, and good enough to choose steps.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % bound
    }
}

#[cfg(test)]
mod tests {
    use super::{Model, Outcome, Steps, Walks, search, walk};

    /// Two jugs of 3 and 5 litres; "broken" is to measure `wanted`.
    struct Jugs {
        wanted: u8,
    }

    impl Model for Jugs {
        type State = (u8, u8);

        fn initial(&self) -> (u8, u8) {
            (0, 0)
        }

        fn successors(&self, &(small, big): &(u8, u8), steps: &mut Steps<(u8, u8)>) {
            steps.add((3, big), || "fill the small".to_owned());
            steps.add((small, 5), || "fill the big".to_owned());
            steps.add_failure((0, big), || "spill the small".to_owned());
            steps.add_failure((small, 0), || "spill the big".to_owned());
            let poured = small.min(5 - big);
            steps.add((small - poured, big + poured), || "pour into the big".to_owned());
            let poured = big.min(3 - small);
            steps.add((small + poured, big - poured), || "pour into the small".to_owned());
        }

        fn violation(&self, &(_, big): &(u8, u8)) -> Option<&'static str> {
            (big == self.wanted).then_some("measured")
        }
    }

    #[test]
    fn the_shortest_story_is_told() {
        let report = search(&Jugs { wanted: 4 }, 1000);
        let story = report.story().unwrap();
        assert_eq!(story.steps.len(), 6, "{story}");
        assert_eq!(story.steps[0], "fill the big");
        assert!(story.to_string().ends_with("=> measured"));
    }

    #[test]
    fn a_complete_search_counts_every_state_once() {
        let report = search(&Jugs { wanted: 6 }, 1000);
        assert!(report.is_clean());
        assert_eq!(report.states, 16);
    }

    #[test]
    fn a_search_that_was_cut_short_says_so() {
        assert!(matches!(search(&Jugs { wanted: 6 }, 5).outcome, Outcome::Unfinished));
    }

    #[test]
    fn a_walk_is_repeated_by_its_seed() {
        let walks = Walks { count: 50, steps_max: 200, seed: 3 };
        let (one, two) = (walk(&Jugs { wanted: 4 }, walks), walk(&Jugs { wanted: 4 }, walks));
        assert_eq!(one.story().unwrap().steps, two.story().unwrap().steps);
        assert_eq!(one.states, two.states);
    }
}
