//! Changes of the journal set (P5) and of the register (P2).

use super::state::{Broken, Change, Checkpoint, News, Outcome, Owner, Phase, Request, State};
use super::{Volume, VolumeRule as Rule};
use crate::bits::Bits;
use crate::check::Steps;

impl Volume {
    /// What a serving owner does about its journal set.
    pub(super) fn change_steps(&self, state: &State, process: usize, steps: &mut Steps<State>) {
        let owner = &state.owners[process];
        if state.left.owner_crashes > 0 {
            let mut next = *state;
            next.left.owner_crashes -= 1;
            next.owners[process] = Owner::default();
            steps.add_failure(next, || format!("O{process} crashes"));
        }
        if self.waits(state, process) {
            return;
        }
        match owner.next_set {
            None => {
                self.start_set_change(state, process, steps);
                self.hand_over(state, process, steps);
            }
            Some(set) if !self.hold(Rule::CopyFirst) || self.has_everything(state, owner, set) => {
                let mut next = *state;
                self.ask(&mut next, process, Change::Set(set));
                steps.add(next, || format!("O{process} asks to register J{set}"));
            }
            Some(_) => {}
        }
    }

    /// Makes set n + 1 and sends it everything that is unsealed, and the manifest.
    fn start_set_change(&self, state: &State, process: usize, steps: &mut Steps<State>) {
        if state.left.set_changes == 0 {
            return;
        }
        let owner = &state.owners[process];
        let Some(old) = owner.set.map(|set| state.set(set)) else { return };
        let is_sound = old.members().all(|(place, _)| self.accepts(state, old, place));
        for nodes in self.set_choices(state, owner.set) {
            if is_sound && nodes.iter().all(|node| old.is_on(node)) {
                continue;
            }
            let mut next = *state;
            next.left.set_changes -= 1;
            let Some(id) = next.new_set(owner.generation, nodes) else { return };
            next.owners[process].next_set = Some(id);
            let set = &mut next.sets[usize::from(id)];
            set.sent = state.records_in(owner.unsealed);
            set.copies = set.sent;
            if self.hold(Rule::CopyManifest) {
                set.sealed_sent = undecided(state, owner);
            }
            steps.add(next, || format!("O{process} makes J{id} on nodes {nodes}, copies what is unsealed"));
        }
    }

    /// Whether every member of a new set has all unsealed records and the manifest.
    fn has_everything(&self, state: &State, owner: &Owner, set: u8) -> bool {
        let records = state.records_in(owner.unsealed);
        let names = if self.hold(Rule::CopyManifest) { undecided(state, owner) } else { Bits::NONE };
        // A record of a segment that was sealed meanwhile is in its shards.
        state.set(set).members().all(|(_, member)| member.answered.covers(records) && member.sealed.covers(names))
    }

    /// Gives the volume away cleanly: everything is sealed and decided, so the register needs no set.
    pub(super) fn hand_over(&self, state: &State, process: usize, steps: &mut Steps<State>) {
        let owner = &state.owners[process];
        let is_sealed = state.records_in(owner.unsealed).is_empty() && undecided(state, owner).is_empty();
        if state.left.hand_overs == 0 || (self.hold(Rule::HandOverSealed) && !is_sealed) {
            return;
        }
        let mut next = *state;
        next.left.hand_overs -= 1;
        self.ask(&mut next, process, Change::HandOver);
        next.owners[process] = Owner::default();
        steps.add(next, || format!("O{process} hands the volume over and stops"));
    }

    /// Whether the owner waits for an answer of the register: it sends one change at a time.
    pub(super) fn waits(&self, state: &State, process: usize) -> bool {
        let request = &state.requests[process];
        request.change != Change::Nothing && request.generation == state.owners[process].generation
    }

    /// Sends a conditional write. Unless answers may be late it is applied and known at once.
    pub(super) fn ask(&self, state: &mut State, process: usize, change: Change) {
        let generation = state.owners[process].generation;
        state.requests[process] = Request { generation, change, outcome: Outcome::Open };
        if !self.bounds.slow_register {
            while state.requests[process].outcome == Outcome::Open {
                self.apply(state, process);
            }
            self.learn(state, process);
        }
    }

    /// What the metadata does with a request, and what its owner does with the answer.
    pub(super) fn register_steps(&self, state: &State, process: usize, steps: &mut Steps<State>) {
        let request = &state.requests[process];
        if request.change == Change::Nothing {
            return;
        }
        if request.outcome == Outcome::Open {
            let mut next = *state;
            self.apply(&mut next, process);
            let said = if next.requests[process].outcome == Outcome::Refused { "refuses" } else { "applies" };
            steps.add(next, || format!("the register {said} what O{process} (g{}) asked", request.generation));
        } else if request.generation == state.owners[process].generation {
            let mut next = *state;
            self.learn(&mut next, process);
            steps.add(next, || format!("O{process} learns the outcome"));
        }
    }

    fn apply(&self, state: &mut State, process: usize) {
        let request = state.requests[process];
        if request.generation != state.register.generation && self.hold(Rule::Conditional) {
            state.requests[process].outcome = Outcome::Refused;
            return;
        }
        state.requests[process].outcome = Outcome::Applied;
        match request.change {
            Change::Nothing => {}
            Change::Set(set) => state.register.set = Some(set),
            Change::HandOver => state.register.set = None,
            Change::Checkpoint(checkpoint) | Change::HalfCommit(checkpoint, _) => {
                state.register.checkpoint = checkpoint
            }
            Change::Commit(checkpoint, set) => {
                state.register.set = Some(set);
                if self.hold(Rule::CommitTogether) {
                    state.register.checkpoint = checkpoint;
                } else {
                    state.requests[process] =
                        Request { change: Change::HalfCommit(checkpoint, set), ..state.requests[process] };
                    state.requests[process].outcome = Outcome::Open;
                }
                self.judge(state, &checkpoint);
            }
        }
        self.spread_news(state);
    }

    /// Nodes may learn what the register says now, at any later time.
    pub(super) fn spread_news(&self, state: &mut State) {
        let news = Some(News { generation: state.register.generation, set: state.register.set });
        if !self.bounds.garbage || state.news.contains(&news) {
            return;
        }
        if let Some(place) = state.news.iter_mut().find(|place| place.is_none()) {
            *place = news;
        }
    }

    /// A taker's checkpoint is the volume from now on: what guests were told must be in it.
    fn judge(&self, state: &mut State, checkpoint: &Checkpoint) {
        for block in 0..usize::from(self.bounds.blocks) {
            if state.rank(checkpoint.index[block].record) < state.rank(state.told[block].newest) {
                state.broken = Some(Broken::AcknowledgedLost);
            }
        }
    }

    fn learn(&self, state: &mut State, process: usize) {
        let request = std::mem::take(&mut state.requests[process]);
        if request.outcome == Outcome::Refused {
            // A newer generation: it stops for ever.
            state.owners[process] = Owner::default();
            return;
        }
        match request.change {
            Change::Nothing | Change::HandOver => {}
            Change::Set(set) => {
                let owner = &mut state.owners[process];
                owner.set = Some(set);
                owner.next_set = None;
                owner.read = None;
                owner.fresh = Bits::NONE;
            }
            Change::Checkpoint(checkpoint) => self.checkpoint_counts(state, process, checkpoint),
            Change::Commit(checkpoint, set) | Change::HalfCommit(checkpoint, set) => {
                self.serve(state, process, checkpoint, set);
            }
        }
    }

    /// The commit is known: the taker serves on its new, empty set, at once or when older confirmations have run out.
    pub(super) fn serve(&self, state: &mut State, process: usize, checkpoint: Checkpoint, set: u8) {
        let taker = state.owners[process];
        if taker.phase == Phase::Serving {
            // It did not wait for this answer: only without rule `serve-after-commit`.
            return;
        }
        let must_wait = self.bounds.window && self.hold(Rule::TakerWaits) && taker.first_closed.is_some();
        let Some(open) = state.new_segment(taker.generation) else {
            state.owners[process] = Owner::default();
            return;
        };
        state.owners[process] = Owner {
            phase: if must_wait { Phase::Waiting } else { Phase::Serving },
            generation: taker.generation,
            set: Some(set),
            first_closed: taker.first_closed.filter(|_| must_wait),
            open,
            unsealed: Bits::one(open),
            sealed: checkpoint.listed,
            index: checkpoint.index,
            checkpoint,
            ..Owner::default()
        };
    }
}

/// Sealed segments that the registered checkpoint says nothing of: what manifests must name.
fn undecided(state: &State, owner: &Owner) -> Bits {
    owner.sealed.iter().filter(|name| !owner.checkpoint.decides(*name, state.segment(*name))).collect()
}
