//! Positions of a placement group that move to other nodes (P11), while a segment is sealed, repaired and deleted.
//!
//! One segment with k = 2 and m = 1. Position 0 stays on n0, position 1 may move from n1 to n3, position 2 from n2 to n4. Movers
//! crash and begin again, and two may work at once; nodes go down and come back, one loses its disk or a shard rots.

use crate::bits::Bits;
use crate::check::{Model, Steps};
use crate::rules::{Ruled, Rules, read_words, rules};

rules! {
    /// Rules of moving positions.
    MoveRule {
        OldWritesRefused = "old-writes-refused", "P11: a node refuses a shard write older than its epoch for that position";
        EpochSurvives = "epoch-survives", "P11: a node that starts again refuses what it refused before";
        SeenBeforeList = "seen-before-list", "P11: the source has seen the new map before it is listed";
        SeenDrains = "seen-drains", "P11: a source has seen the new map when no older write is in flight any more";
        CopyBeforeDone = "copy-before-done", "P11: what was listed is copied before `done` is committed";
        FreeAfterDone = "free-after-done", "P11: a source frees when it has seen `done`";
        ReadersTryBoth = "readers-try-both", "P11: readers try next, then current";
        VerifyBeforeUse = "verify-before-use", "P11, R6: a shard is verified by its hash before another is made from it";
        RepairByLists = "repair-by-lists", "P11: repair works from live lists, never from inventories";
        Reconcile = "reconcile", "P7: what nodes hold is compared with the lists";
    }
}

const POSITIONS: u8 = 3;
const K: u32 = 2;
/// Node of each position before it moves.
const SOURCE: [u8; 3] = [0, 1, 2];
/// And after.
const TARGET: [u8; 3] = [0, 3, 4];
const NODES: u8 = 5;

/// How far the map is with a position, and how much of it a node has seen.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
enum Stage {
    #[default]
    Steady,
    Moving,
    Done,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
enum Segment {
    #[default]
    Open,
    Sealing,
    Sealed,
    Deleted,
}

/// What a mover does; it works on one position at a time.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
enum Mover {
    #[default]
    Idle,
    Listed {
        position: u8,
        has_shard: bool,
    },
    Ready {
        position: u8,
    },
}

/// A repair that has read k shards and will write one.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Repair {
    position: u8,
    /// By the map at its start.
    to_target: bool,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
struct Budget {
    mover_crashes: u8,
    downs: u8,
    disks_lost: u8,
    rots: u8,
    repairs: u8,
    deletes: u8,
}

/// Everything; sets of positions unless said otherwise.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct State {
    map: [Stage; 3],
    seen_by_source: [Stage; 3],
    segment: Segment,
    /// Positions whose new map the owner knows.
    known_to_owner: Bits,
    sent_to_source: Bits,
    sent_to_target: Bits,
    answered: Bits,
    /// A source admitted a write and its device writes.
    in_flight: Bits,
    at_source: Bits,
    at_target: Bits,
    rotten_at_source: Bits,
    rotten_at_target: Bits,
    delete_to_source: Bits,
    delete_to_target: Bits,
    movers: [Mover; 2],
    repair: Option<Repair>,
    /// Nodes that are down.
    down: Bits,
    /// Shards lost to failures.
    failures: u8,
    repaired_deleted: bool,
    left: Budget,
}

/// The model with its bounds.
pub struct Moves {
    rules: Rules<MoveRule>,
    moving: u8,
    movers: usize,
    in_flight: bool,
    budget: Budget,
}

impl Ruled for Moves {
    type Rule = MoveRule;
    const NAME: &'static str = "moves";
    const WORDS: &'static str = "\
moving positions (0 to 2), movers (1 or 2), crash of movers, down (times a node goes down), disk back empty, rot of a shard,
repair, delete; flag: inflight (writes take time on a node)";
    const NEEDED: &'static [(MoveRule, &'static str)] = &[
        (MoveRule::OldWritesRefused, "moving=1"),
        (MoveRule::EpochSurvives, "moving=1 down=1"),
        (MoveRule::SeenBeforeList, "moving=1"),
        (MoveRule::SeenDrains, "moving=1 inflight"),
        (MoveRule::CopyBeforeDone, "moving=1 movers=2 crash=1"),
        (MoveRule::FreeAfterDone, "moving=1"),
        (MoveRule::ReadersTryBoth, "moving=2"),
        (MoveRule::VerifyBeforeUse, "moving=1 rot=1"),
        (MoveRule::RepairByLists, "moving=1 down=1 repair=1 delete=1"),
        (MoveRule::Reconcile, "moving=1 down=1 delete=1"),
    ];

    fn build(words: &[&str], rules: Rules<MoveRule>) -> Result<Self, String> {
        let mut model = Self { rules, moving: 0, movers: 1, in_flight: false, budget: Budget::default() };
        read_words(words, |name, number| {
            match name {
                "moving" if number < POSITIONS => model.moving = number,
                "movers" if number <= 2 => model.movers = usize::from(number),
                "inflight" => model.in_flight = number != 0,
                "crash" => model.budget.mover_crashes = number,
                "down" => model.budget.downs = number,
                "disk" => model.budget.disks_lost = number,
                "rot" => model.budget.rots = number,
                "repair" => model.budget.repairs = number,
                "delete" => model.budget.deletes = number,
                _ => return None,
            }
            Some(())
        })?;
        Ok(model)
    }
}

impl State {
    fn map(&self, position: u8) -> Stage {
        self.map[usize::from(position)]
    }

    fn seen(&self, position: u8) -> Stage {
        self.seen_by_source[usize::from(position)]
    }

    fn source_is_up(&self, position: u8) -> bool {
        !self.down.has(SOURCE[usize::from(position)])
    }

    fn target_is_up(&self, position: u8) -> bool {
        !self.down.has(TARGET[usize::from(position)])
    }

    /// Shards that can be read and are sound, of nodes that are up or of all.
    fn readable(&self, try_both: bool, up_only: bool) -> Bits {
        let is_readable = |position: &u8| {
            let source = self.at_source - self.rotten_at_source;
            let target = self.at_target - self.rotten_at_target;
            let from_source = source.has(*position) && (self.source_is_up(*position) || !up_only);
            let from_target = target.has(*position) && (self.target_is_up(*position) || !up_only);
            match self.map(*position) {
                Stage::Steady => from_source,
                Stage::Moving => from_target || from_source && try_both,
                Stage::Done => from_target,
            }
        };
        (0..POSITIONS).filter(is_readable).collect()
    }

    /// Nothing is under way any more but what reconcile would do.
    fn is_quiet(&self) -> bool {
        let settled = |position: u8| match self.map(position) {
            Stage::Steady => true,
            Stage::Moving => false,
            Stage::Done => self.seen(position) == Stage::Done && !self.at_source.has(position),
        };
        let undelivered = (self.delete_to_source & self.at_source) | (self.delete_to_target & self.at_target);
        self.down.is_empty()
            && self.repair.is_none()
            && self.in_flight.is_empty()
            && undelivered.is_empty()
            && self.movers == [Mover::Idle; 2]
            && (0..POSITIONS).all(settled)
    }
}

impl Moves {
    fn hold(&self, rule: MoveRule) -> bool {
        self.rules.hold(rule)
    }

    fn owner_steps(&self, state: &State, steps: &mut Steps<State>) {
        if state.segment == Segment::Open {
            steps.add(State { segment: Segment::Sealing, ..*state }, || "the owner begins to seal".to_owned());
        }
        for position in 0..POSITIONS {
            if state.map(position) != Stage::Steady && !state.known_to_owner.has(position) {
                let mut next = *state;
                next.known_to_owner.add(position);
                steps.add(next, || format!("the owner learns the new map of position {position}"));
            }
            if state.segment == Segment::Sealing && !state.answered.has(position) {
                let mut next = *state;
                let to_target = state.known_to_owner.has(position);
                if to_target { &mut next.sent_to_target } else { &mut next.sent_to_source }.add(position);
                let node = if to_target { TARGET } else { SOURCE }[usize::from(position)];
                steps.add(next, || format!("the owner sends shard {position} to n{node}"));
            }
        }
        if state.segment == Segment::Sealing && state.answered == Bits::below(POSITIONS) {
            let next = State { segment: Segment::Sealed, ..*state };
            steps.add(next, || "every position has answered: sealed, the open replicas go".to_owned());
        }
        if state.segment == Segment::Sealed && state.left.deletes > 0 {
            let mut next = State { segment: Segment::Deleted, ..*state };
            next.left.deletes -= 1;
            next.delete_to_source = Bits::below(POSITIONS);
            next.delete_to_target = state.known_to_owner;
            steps.add(next, || "a checkpoint without the segment is registered; `delete` is sent".to_owned());
        }
    }

    /// Writes, deletes, and what nodes learn of the map.
    fn node_steps(&self, state: &State, steps: &mut Steps<State>) {
        for position in 0..POSITIONS {
            let (source, target) = (SOURCE[usize::from(position)], TARGET[usize::from(position)]);
            if state.source_is_up(position) {
                self.write_at_source(state, position, steps);
                self.learn(state, position, steps);
                if (state.delete_to_source & state.at_source).has(position) {
                    let mut next = *state;
                    next.at_source.remove(position);
                    steps.add(next, || format!("n{source} deletes shard {position}"));
                }
            }
            if state.target_is_up(position) {
                if (state.sent_to_target - state.at_target).has(position) {
                    let mut next = *state;
                    next.at_target.add(position);
                    next.answered.add(position);
                    // A message is executed once here; a copy of it would be one more stray.
                    next.sent_to_target.remove(position);
                    steps.add(next, || format!("n{target} stores shard {position}, answers"));
                }
                if (state.delete_to_target & state.at_target).has(position) {
                    let mut next = *state;
                    next.at_target.remove(position);
                    steps.add(next, || format!("n{target} deletes shard {position}"));
                }
            }
        }
    }

    fn write_at_source(&self, state: &State, position: u8, steps: &mut Steps<State>) {
        let node = SOURCE[usize::from(position)];
        let is_old = state.seen(position) != Stage::Steady;
        let stored = |mut next: State| {
            next.at_source.add(position);
            next.answered.add(position);
            next
        };
        if state.sent_to_source.has(position) && !(is_old && self.hold(MoveRule::OldWritesRefused)) {
            let mut next = *state;
            next.sent_to_source.remove(position);
            if self.in_flight {
                next.in_flight.add(position);
                steps.add(next, || format!("n{node} admits the write of shard {position}; its device writes"));
            } else {
                steps.add(stored(next), || format!("n{node} stores shard {position}, answers"));
            }
        }
        if state.in_flight.has(position) {
            let mut next = *state;
            next.in_flight.remove(position);
            steps.add(stored(next), || format!("n{node} has written shard {position}, answers"));
        }
    }

    fn learn(&self, state: &State, position: u8, steps: &mut Steps<State>) {
        let node = SOURCE[usize::from(position)];
        let (map, seen) = (state.map(position), state.seen(position));
        if map > seen && !(state.in_flight.has(position) && self.hold(MoveRule::SeenDrains)) {
            let mut next = *state;
            next.seen_by_source[usize::from(position)] = map;
            steps.add(next, || format!("n{node} has seen that position {position} is {map:?}"));
        }
        let frees_at = if self.hold(MoveRule::FreeAfterDone) { Stage::Done } else { Stage::Moving };
        if seen >= frees_at && state.at_source.has(position) {
            let mut next = *state;
            next.at_source.remove(position);
            next.rotten_at_source.remove(position);
            steps.add(next, || format!("n{node} frees shard {position}"));
        }
    }

    fn mover_steps(&self, state: &State, steps: &mut Steps<State>) {
        for position in 1..=self.moving {
            if state.map(position) == Stage::Steady {
                let mut next = *state;
                next.map[usize::from(position)] = Stage::Moving;
                steps.add(next, || format!("the map with the next node of position {position} is committed"));
            }
        }
        for number in 0..self.movers {
            let mut put = |mut next: State, mover: Mover, words: String| {
                next.movers[number] = mover;
                steps.add(next, || format!("mover {number} {words}"));
            };
            match state.movers[number] {
                Mover::Idle => {
                    for position in (1..=self.moving).filter(|position| state.source_is_up(*position)) {
                        let has_seen = state.seen(position) != Stage::Steady || !self.hold(MoveRule::SeenBeforeList);
                        if state.map(position) == Stage::Moving && has_seen {
                            let has_shard = state.at_source.has(position);
                            let words = format!("lists position {position} at its source: {has_shard}");
                            put(*state, Mover::Listed { position, has_shard }, words);
                        }
                    }
                }
                Mover::Listed { position, has_shard } => {
                    let is_needed = has_shard && self.hold(MoveRule::CopyBeforeDone);
                    if !is_needed {
                        put(*state, Mover::Ready { position }, format!("has nothing to copy for position {position}"));
                    } else if let Some((next, words)) = self.copy(state, position) {
                        let after = if words.is_empty() { Mover::Idle } else { Mover::Ready { position } };
                        put(next, after, if words.is_empty() { "begins again".to_owned() } else { words });
                    }
                }
                Mover::Ready { position } => {
                    let mut next = *state;
                    next.map[usize::from(position)] = Stage::Done;
                    put(next, Mover::Idle, format!("commits that position {position} is done"));
                }
            }
            if state.left.mover_crashes > 0 && state.movers[number] != Mover::Idle {
                let mut next = *state;
                next.left.mover_crashes -= 1;
                next.movers[number] = Mover::Idle;
                steps.add_failure(next, || format!("mover {number} crashes"));
            }
        }
    }

    /// Copies a shard, or makes it from the others if it is damaged. Without words: it is gone, list again.
    fn copy(&self, state: &State, position: u8) -> Option<(State, String)> {
        if !state.source_is_up(position) || !state.target_is_up(position) {
            return None;
        }
        let mut next = *state;
        if !state.at_source.has(position) {
            return Some((next, String::new()));
        }
        next.at_target.add(position);
        let is_rotten = state.rotten_at_source.has(position);
        if is_rotten && self.hold(MoveRule::VerifyBeforeUse) {
            let others = state.readable(true, true) - Bits::one(position);
            next.rotten_at_target.remove(position);
            let words = format!("finds shard {position} damaged and makes it from the others");
            return (others.count() >= K).then_some((next, words));
        }
        if is_rotten {
            next.rotten_at_target.add(position);
        }
        Some((next, format!("copies shard {position} to n{}", TARGET[usize::from(position)])))
    }

    fn repair_steps(&self, state: &State, steps: &mut Steps<State>) {
        if let Some(Repair { position, to_target }) = state.repair {
            let mut next = State { repair: None, ..*state };
            let node = if to_target { TARGET } else { SOURCE }[usize::from(position)];
            let is_old = !to_target && state.seen(position) != Stage::Steady && self.hold(MoveRule::OldWritesRefused);
            if is_old {
                steps.add(next, || format!("n{node} refuses the repaired shard {position}: its map is newer"));
            } else if !state.down.has(node) {
                if to_target { &mut next.at_target } else { &mut next.at_source }.add(position);
                steps.add(next, || format!("repair writes shard {position} to n{node}"));
            }
            return;
        }
        let is_listed = state.segment == Segment::Sealed || !self.hold(MoveRule::RepairByLists);
        let exists = matches!(state.segment, Segment::Sealed | Segment::Deleted);
        if state.left.repairs == 0 || !is_listed || !exists {
            return;
        }
        let readable = state.readable(true, true);
        for position in (Bits::below(POSITIONS) - state.readable(true, false)).iter() {
            if readable.count() >= K {
                let to_target = state.map(position) != Stage::Steady;
                let mut next = State { repair: Some(Repair { position, to_target }), ..*state };
                next.left.repairs -= 1;
                next.repaired_deleted |= state.segment == Segment::Deleted;
                steps.add(next, || format!("repair reads k shards to make shard {position} again"));
            }
        }
    }

    fn failure_steps(&self, state: &State, steps: &mut Steps<State>) {
        for node in 0..NODES {
            if state.down.has(node) {
                let mut next = *state;
                next.down.remove(node);
                if !self.hold(MoveRule::EpochSurvives) && node < POSITIONS {
                    next.seen_by_source[usize::from(node)] = Stage::Steady;
                }
                steps.add(next, || format!("n{node} starts again"));
            } else if state.left.downs > 0 && state.down.is_empty() {
                let mut next = *state;
                next.left.downs -= 1;
                go_down(&mut next, node);
                steps.add_failure(next, || format!("n{node} goes down; what is sent to it is lost"));
            }
            if state.left.disks_lost > 0 && state.down.is_empty() {
                let mut next = *state;
                next.left.disks_lost -= 1;
                next.failures += 1;
                go_down(&mut next, node);
                for position in (0..POSITIONS).filter(|position| SOURCE[usize::from(*position)] == node) {
                    next.at_source.remove(position);
                }
                for position in (0..POSITIONS).filter(|position| TARGET[usize::from(*position)] == node) {
                    next.at_target.remove(position);
                }
                steps.add_failure(next, || format!("n{node} goes down; its disk is empty when it comes back"));
            }
        }
        if state.left.rots > 0 {
            for position in state.at_source.iter() {
                let mut next = *state;
                next.left.rots -= 1;
                next.failures += 1;
                next.rotten_at_source.add(position);
                steps.add_failure(next, || format!("shard {position} rots on n{}", SOURCE[usize::from(position)]));
            }
        }
    }

    fn reconcile_steps(&self, state: &State, steps: &mut Steps<State>) {
        if state.segment != Segment::Deleted || !self.hold(MoveRule::Reconcile) {
            return;
        }
        for position in state.at_source.iter().filter(|position| state.source_is_up(*position)) {
            let mut next = *state;
            next.at_source.remove(position);
            steps.add(next, || {
                format!("n{} is asked what it holds: shard {position} goes", SOURCE[usize::from(position)])
            });
        }
        for position in state.at_target.iter().filter(|position| state.target_is_up(*position)) {
            let mut next = *state;
            next.at_target.remove(position);
            steps.add(next, || {
                format!("n{} is asked what it holds: shard {position} goes", TARGET[usize::from(position)])
            });
        }
    }
}

fn go_down(state: &mut State, node: u8) {
    state.down.add(node);
    for position in 0..POSITIONS {
        if SOURCE[usize::from(position)] == node {
            state.in_flight.remove(position);
            state.delete_to_source.remove(position);
        }
        if TARGET[usize::from(position)] == node {
            state.delete_to_target.remove(position);
        }
    }
}

impl Model for Moves {
    type State = State;

    fn initial(&self) -> State {
        State { left: self.budget, ..State::default() }
    }

    fn successors(&self, state: &State, steps: &mut Steps<State>) {
        self.owner_steps(state, steps);
        self.node_steps(state, steps);
        self.mover_steps(state, steps);
        self.repair_steps(state, steps);
        self.failure_steps(state, steps);
        self.reconcile_steps(state, steps);
    }

    fn violation(&self, state: &State) -> Option<&'static str> {
        let readable = state.readable(self.hold(MoveRule::ReadersTryBoth), false);
        let needed = u32::from(POSITIONS).saturating_sub(u32::from(state.failures));
        if state.segment == Segment::Sealed && readable.count() < needed {
            return Some("a sealed segment has fewer shards than its positions less the failed ones (R1, R2)");
        }
        if !state.rotten_at_target.is_empty() {
            return Some("a damaged shard was made into one that looks sound (R6)");
        }
        if state.repaired_deleted {
            return Some("a deleted segment is repaired (R5)");
        }
        let held = state.at_source | state.at_target;
        if state.segment == Segment::Deleted && state.is_quiet() && !held.is_empty() && !self.hold(MoveRule::Reconcile)
        {
            return Some("a deleted segment keeps a shard for ever (R5)");
        }
        None
    }
}
