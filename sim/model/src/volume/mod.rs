//! One volume: its journal sets, owners, register and segments under failures (P1-P8 and P10).
//!
//! Up to two processes own the volume one after the other; a stale one goes on doing everything it can. Each owner appends
//! records, seals segments, changes its journal set, cleans, checkpoints and deletes; a taker closes, reads, re-seals and
//! commits step by step, and may die after each. The modules follow who acts: `owner` serves guests, `upkeep` seals, checkpoints and
//! cleans, `change` changes the set and the register, `recovery` takes over, `node` stores, `failure` breaks things.

mod bounds;
mod change;
mod failure;
mod needed;
mod node;
mod owner;
mod recovery;
mod state;
mod upkeep;

pub use bounds::{Bounds, Budget};
pub use state::State;

use crate::bits::Bits;
use crate::check::{Model, Steps};
use crate::rules::{Ruled, Rules, rules};
use bounds::K;
use state::{BLOCKS_MAX, Broken, Checkpoint, Condition, Member, NODES_MAX, Node, Owner, Phase, Place, Register};

rules! {
    /// Rules of a volume. Without any one of them the checker finds a broken promise.
    VolumeRule {
        NewGeneration = "new-generation", "P1: every take-over takes a new generation";
        NewestWins = "newest-wins", "P1: the newest version wins, wherever it is found";
        CopiesKeepVersion = "copies-keep-version", "P1: copies keep the version of the guest's write";
        Conditional = "conditional", "P2: the register changes only under the generation that the writer knows";
        Incarnations = "incarnations", "P3: a restarted member takes nothing more";
        UnknownIsLost = "unknown-is-lost", "P3, P10: a member that does not know the set is lost, not empty";
        Contiguous = "contiguous", "P4: a member answers with its contiguous length";
        JournalAcknowledges = "journal-acknowledges", "P4, P6: only the journal acknowledges, a seal does not";
        FlushBeginsAfter = "flush-begins-after", "P4: a FLUSH waits for a device flush that began after it";
        FlushAwaitsSealed = "flush-awaits-sealed", "P4, P6: a seal counts as a flush once every member has answered `sealed`";
        CopyFirst = "copy-first", "P5: a set is registered when it has everything";
        CopyFlushed = "copy-flushed", "P5: what is copied into a new set is flushed before the set is registered";
        CopyManifest = "copy-manifest", "P5: the manifest is copied too";
        BothSets = "both-sets", "P5: until the outcome of `set` is known everything needs both sets";
        FreeOlderSetsOnly = "free-older-sets-only", "P5: a node frees sets older than the registered one, never newer ones";
        NoSetNoNews = "no-set-no-news", "P5: without a registered set only older generations are garbage";
        ShardsFlushed = "shards-flushed", "P6: a shard is flushed before it is answered";
        NameBeforeFree = "name-before-free", "P6: a name is durable in the manifest before its replica is freed";
        DeleteAfterCheckpoint = "delete-after-checkpoint", "P7: delete only what the registered checkpoint decided";
        TrimAfterCheckpoint = "trim-after-checkpoint", "P7: manifests are trimmed when the checkpoint is registered";
        DeleteAwaitsReads = "delete-awaits-reads", "R5, P7: no delete of a segment that an own read runs on";
        ReadsConfirmed = "reads-confirmed", "P8: every member confirms a read after the look-up";
        TakerWaits = "taker-waits", "P8: a taker serves when confirmations from before its first close have run out";
        HandOverSealed = "hand-over-sealed", "P10: who hands over has sealed and checkpointed everything";
        HandOverWaited = "hand-over-waited", "P8, P10: a taker that has not waited yet does not hand over: the next one does not wait";
        CloseDrains = "close-drains", "P10.2: a close is answered when nothing is in flight any more";
        WholeMember = "whole-member", "P10.3: one member is enough only if it is live or whole";
        StateInEveryAnswer = "state-in-every-answer", "P3, P10.3: what a member is, is judged when its records are read";
        DamageIsKnown = "damage-is-known", "P10.3: a live member tells how far it has written: if less can be read, the others are needed";
        WaitForShards = "wait-for-shards", "P10.4: fewer than k shards of a name mean wait, never skip";
        StraysIgnored = "strays-ignored", "P6, P10.4: shards alone prove nothing";
        CommitTogether = "commit-together", "P10.6: checkpoint and set are registered in one write";
        ServeAfterCommit = "serve-after-commit", "P10.6: a taker serves when it knows that its commit was applied";
    }
}

/// The model: a cluster, what may happen to it, and which rules hold.
pub struct Volume {
    /// How far it goes.
    pub bounds: Bounds,
    /// What holds.
    pub rules: Rules<VolumeRule>,
}

impl Volume {
    fn hold(&self, rule: VolumeRule) -> bool {
        self.rules.hold(rule)
    }

    /// Nodes that hold positions.
    fn positions(&self) -> Bits {
        Bits::below(self.bounds.positions())
    }

    /// Nodes that a new set of an owner may be made on: the first that are up, the last that are up, and the old ones with one
    /// replaced. Fewer members while nodes are lost, never fewer than two (P3).
    fn set_choices(&self, state: &State, old: Option<u8>) -> Vec<Bits> {
        let all: Vec<u8> = (0..self.bounds.nodes()).collect();
        let up: Bits = all.iter().copied().filter(|node| state.node(*node).is_up).collect();
        let is_away = |node: &u8| state.node(*node).is_lost || self.bounds.shrink && !state.node(*node).is_up;
        let away = all.iter().copied().filter(is_away).count();
        let size = usize::from(self.bounds.members()).saturating_sub(away).max(2);
        let mut choices: Vec<Bits> = vec![up.iter().take(size).collect()];
        let from_the_end: Vec<u8> = up.iter().collect();
        choices.push(from_the_end.into_iter().rev().take(size).collect());
        if let Some(old) = old.map(|set| state.set(set)) {
            let old: Bits = old.members().map(|(_, member)| member.node).collect();
            for gone in old.iter() {
                let kept = (old - Bits::one(gone)) & up;
                let more = (up - old).iter().take(size.saturating_sub(kept.iter().count()));
                choices.push(kept | more.collect());
            }
        }
        choices.retain(|nodes| nodes.iter().count() == size);
        choices.sort_by_key(|nodes| nodes.iter().fold(0u32, |sum, node| sum | 1 << node));
        choices.dedup();
        choices
    }

    /// Whether fewer than k shards are left of a segment that is needed: the registered checkpoint lists it, a manifest of the
    /// registered set names it, or the registered owner reads from it.
    fn has_lost_segment(&self, state: &State) -> bool {
        let is_lost = |name: u8| state.shards(name, false) < u32::from(K);
        let serving = |owner: &&Owner| owner.phase == Phase::Serving && owner.generation == state.register.generation;
        let read_from = |owner: &Owner| {
            let places = owner.index.into_iter().filter(|place| *place != Place::default());
            places.map(|place| place.segment).filter(|name| !owner.unsealed.has(*name)).any(is_lost)
        };
        let checkpoint = &state.register.checkpoint;
        let named = |set: u8| {
            let names = state.set(set).members().fold(Bits::NONE, |all, (_, member)| all | member.manifest);
            names.iter().filter(|name| !checkpoint.decides(*name, state.segment(*name))).any(is_lost)
        };
        checkpoint.listed.iter().any(is_lost)
            || state.register.set.is_some_and(named)
            || state.owners.iter().filter(serving).any(read_from)
    }

    /// Whether no member of the registered set is left: nobody can ever take the volume over.
    fn has_lost_set(&self, state: &State) -> bool {
        let is_gone = |member: &Member| state.node(member.node).is_lost || member.condition == Condition::Unknown;
        state.register.set.is_some_and(|set| state.set(set).members().all(|(_, member)| is_gone(member)))
    }
}

impl Ruled for Volume {
    type Rule = VolumeRule;
    const NAME: &'static str = "volume";
    const WORDS: &'static str = bounds::WORDS;
    const NEEDED: &'static [(VolumeRule, &'static str)] = needed::NEEDED;

    fn build(words: &[&str], rules: Rules<VolumeRule>) -> Result<Self, String> {
        Ok(Self { bounds: Bounds::parse(words)?, rules })
    }
}

impl Model for Volume {
    type State = State;

    fn initial(&self) -> State {
        let checkpoint = Checkpoint { border: 1, ..Checkpoint::default() };
        let mut state = State {
            records: Default::default(),
            record_count: 1,
            segments: Default::default(),
            segment_count: 0,
            sets: Default::default(),
            set_count: 0,
            nodes: [Node::default(); NODES_MAX],
            owners: Default::default(),
            register: Register { generation: 1, set: Some(0), checkpoint },
            news: Default::default(),
            requests: Default::default(),
            told: [state::Told::default(); BLOCKS_MAX],
            failed: Bits::NONE,
            left: self.bounds.budget,
            broken: None,
        };
        for node in 0..self.bounds.nodes() {
            state.nodes[usize::from(node)].is_up = true;
        }
        self.spread_news(&mut state);
        state.new_set(1, Bits::below(self.bounds.members()));
        let open = state.new_segment(1).unwrap_or(0);
        state.owners[0] = Owner {
            phase: Phase::Serving,
            generation: 1,
            set: Some(0),
            open,
            unsealed: Bits::one(open),
            checkpoint,
            ..Owner::default()
        };
        state
    }

    fn successors(&self, state: &State, steps: &mut Steps<State>) {
        for process in 0..state::OWNERS {
            match state.owners[process].phase {
                Phase::Away => self.take(state, process, steps),
                Phase::Serving => {
                    self.guest_steps(state, process, steps);
                    self.upkeep_steps(state, process, steps);
                    self.change_steps(state, process, steps);
                }
                Phase::Closing | Phase::Resealing | Phase::Committing | Phase::Waiting => {
                    self.recovery_steps(state, process, steps)
                }
            }
            self.register_steps(state, process, steps);
        }
        self.node_steps(state, steps);
        self.failure_steps(state, steps);
    }

    fn forget(&self, state: &mut State) {
        state.forget(self.hold(VolumeRule::Conditional));
    }

    fn violation(&self, state: &State) -> Option<&'static str> {
        match state.broken {
            Some(Broken::OldValue) => {
                Some("a read gave an older value than one that was acknowledged or read before (R3, R7)")
            }
            Some(Broken::AcknowledgedLost) => {
                Some("a take-over committed without an acknowledged or flushed write (R1, R7)")
            }
            Some(Broken::WrongOrder) => Some("an acknowledged write is ordered behind an older one (R7)"),
            Some(Broken::TwoOwners) => {
                Some("an owner acknowledged a write that was sent after a newer one had committed (R3)")
            }
            Some(Broken::ReadLostSegment) => Some("a segment was deleted under a running read (R5)"),
            None if self.has_lost_segment(state) => Some("a valid segment has fewer than k shards (R2, R5)"),
            None if self.has_lost_set(state) => Some("no member of the registered journal set is left (R1)"),
            None => None,
        }
    }
}

/// How a record is called in a story.
fn called(state: &State, record: u8) -> String {
    let version = state.records[usize::from(record)].version;
    match record {
        state::ZEROES => "zeroes".to_owned(),
        own if own == version => format!("w{own}"),
        copy => format!("c{copy} (a copy of w{version})"),
    }
}
