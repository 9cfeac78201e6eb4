//! Take-over and recovery, step by step (P10).

use super::bounds::K;
use super::state::{Change, Checkpoint, CloseAnswer, Condition, InFlight, Owner, Phase, Place, State, ZEROES};
use super::{Volume, VolumeRule as Rule};
use crate::bits::Bits;
use crate::check::Steps;

/// What a taker reads from members: records, and names of sealed segments.
struct Found {
    records: Bits,
    names: Bits,
    from: String,
}

impl Volume {
    /// P10.1: an idle process takes the volume.
    pub(super) fn take(&self, state: &State, process: usize, steps: &mut Steps<State>) {
        if state.left.takes == 0 {
            return;
        }
        let mut next = *state;
        next.left.takes -= 1;
        if self.hold(Rule::NewGeneration) {
            next.register.generation += 1;
        }
        self.spread_news(&mut next);
        let (generation, set, checkpoint) = (next.register.generation, state.register.set, state.register.checkpoint);
        // After a clean hand-over there is nothing to close, to find or to wait for.
        let phase = if set.is_some() { Phase::Closing } else { Phase::Committing };
        let index = checkpoint.index;
        next.owners[process] = Owner { phase, generation, set, checkpoint, index, ..Owner::default() };
        steps.add(next, || match set {
            Some(set) => format!("O{process} takes the volume: g{generation}, the register has J{set}"),
            None => format!("O{process} takes the volume: g{generation}, no set is registered"),
        });
    }

    /// What a taker does until it serves.
    pub(super) fn recovery_steps(&self, state: &State, process: usize, steps: &mut Steps<State>) {
        let owner = &state.owners[process];
        if state.left.owner_crashes > 0 {
            let mut next = *state;
            next.left.owner_crashes -= 1;
            next.owners[process] = Owner::default();
            steps.add_failure(next, || format!("O{process} crashes"));
        }
        match owner.phase {
            Phase::Closing => {
                self.close(state, process, steps);
                self.choose(state, process, steps);
            }
            Phase::Resealing => self.finish_reseal(state, process, steps),
            Phase::Committing if !self.waits(state, process) => self.commit(state, process, steps),
            Phase::Waiting => {
                self.stop_waiting(state, process, steps);
                if !self.hold(Rule::HandOverWaited) {
                    self.hand_over(state, process, steps);
                }
            }
            Phase::Committing | Phase::Serving | Phase::Away => {}
        }
    }

    /// P10.2: a member takes nothing more from older generations, and answers when nothing is in flight.
    fn close(&self, state: &State, process: usize, steps: &mut Steps<State>) {
        let owner = &state.owners[process];
        let Some(id) = owner.set else { return };
        for (place, member) in state.set(id).members() {
            let bit = u8::try_from(place).unwrap_or(0);
            let node = usize::from(member.node);
            if !state.nodes[node].is_up || owner.closed.has(bit) {
                continue;
            }
            let mut next = *state;
            next.nodes[node].closed = state.nodes[node].closed.max(owner.generation);
            let refuses = state.nodes[node].in_flight != InFlight::Nothing && self.hold(Rule::CloseDrains);
            if refuses {
                next.nodes[node].in_flight = InFlight::Nothing;
            }
            let taker = &mut next.owners[process];
            taker.closed.add(bit);
            taker.first_closed = taker.first_closed.or(Some((id, bit)));
            taker.answers[place] = CloseAnswer { condition: member.condition, manifest: member.manifest };
            let and = if refuses { " and refuses what is in flight" } else { "" };
            steps.add(next, || format!("n{node} closes J{id} for O{process}{and}"));
        }
    }

    /// P10.3 and P10.4: what there is, from one member or from all.
    fn choose(&self, state: &State, process: usize, steps: &mut Steps<State>) {
        for found in self.sources(state, &state.owners[process]) {
            let Some(names) = self.names(state, &state.owners[process], found.names) else { continue };
            let mut next = *state;
            let records = self.readable(state, &state.owners[process], found.records, names);
            self.build_index(&mut next, process, names, records);
            let owner = &mut next.owners[process];
            owner.sealed = names | owner.checkpoint.listed;
            owner.answers = Default::default();
            owner.closed = Bits::NONE;
            owner.phase = Phase::Committing;
            if !records.is_empty() {
                let generation = owner.generation;
                let Some(reseal) = next.new_segment(generation) else { continue };
                next.segments[usize::from(reseal)].records = records;
                next.segments[usize::from(reseal)].is_frozen = true;
                let owner = &mut next.owners[process];
                owner.reseal = Some(reseal);
                owner.phase = Phase::Resealing;
                for place in owner.index.iter_mut().filter(|place| records.has(place.record)) {
                    place.segment = reseal;
                }
            }
            let from = &found.from;
            steps.add(next, || format!("O{process} reads {from}: names {names}, records {records}, which it re-seals"));
        }
    }

    /// Who may be read: any one live or whole member, else all that are not lost, together.
    fn sources(&self, state: &State, owner: &Owner) -> Vec<Found> {
        let Some(set) = owner.set.map(|set| state.set(set)) else { return Vec::new() };
        let condition = |place: usize| self.condition(&owner.answers[place], set.members[place].condition);
        let answers = |place: usize| owner.closed.has(place as u8) && state.node(set.members[place].node).is_up;
        let places = 0..usize::from(set.size);
        let of_one = |place: usize| Found {
            records: set.members[place].stored,
            names: owner.answers[place].manifest,
            from: format!("n{}", set.members[place].node),
        };
        let is_enough = |place: usize| match self.hold(Rule::WholeMember) {
            true => condition(place) == Condition::Whole && !self.knows_of_damage(state, owner, place),
            false => condition(place) != Condition::Unknown,
        };
        let single: Vec<Found> =
            places.clone().filter(|place| answers(*place) && is_enough(*place)).map(of_one).collect();
        let is_lost = |place: usize| state.node(set.members[place].node).is_lost;
        let heard_all = places.clone().all(|place| is_lost(place) || answers(place));
        let left: Vec<usize> =
            places.filter(|place| answers(*place) && condition(*place) != Condition::Unknown).collect();
        if !single.is_empty() || !heard_all || left.is_empty() {
            return single;
        }
        let nothing = Found { records: Bits::NONE, names: Bits::NONE, from: "all members that are left".to_owned() };
        vec![left.into_iter().map(of_one).fold(nothing, |all, one| Found {
            records: all.records | one.records,
            names: all.names | one.names,
            from: all.from,
        })]
    }

    fn condition(&self, at_close: &CloseAnswer, now: Condition) -> Condition {
        let told = if self.hold(Rule::StateInEveryAnswer) { now } else { at_close.condition };
        match told {
            Condition::Unknown if !self.hold(Rule::UnknownIsLost) => Condition::Whole,
            told => told,
        }
    }

    /// A live member knows how far it has written, and so that it cannot read all of it.
    fn knows_of_damage(&self, state: &State, owner: &Owner, place: usize) -> bool {
        let Some(set) = owner.set.map(|set| state.set(set)) else { return false };
        let member = &set.members[place];
        let is_live = state.node(member.node).incarnation == member.incarnation;
        let replicas = member.answered - state.records_in(member.sealed);
        self.hold(Rule::DamageIsKnown) && is_live && !member.stored.covers(replicas)
    }

    /// The names to apply. `None`: the shards of one cannot be found now, so wait (P10.4).
    fn names(&self, state: &State, owner: &Owner, manifest: Bits) -> Option<Bits> {
        let undecided = |name: &u8| !owner.checkpoint.decides(*name, state.segment(*name));
        let visible = |name: &u8| state.shards(*name, true) >= u32::from(K);
        let mut names: Bits = manifest.iter().filter(undecided).collect();
        if !self.hold(Rule::StraysIgnored) {
            names |= state.names().filter(undecided).filter(visible).collect();
        }
        if !self.hold(Rule::WaitForShards) {
            names = names.iter().filter(visible).collect();
        }
        names.iter().all(|name| visible(&name)).then_some(names)
    }

    /// Records of open replicas, each segment up to the first that is missing. A manifest name wins over its replica.
    fn readable(&self, state: &State, owner: &Owner, stored: Bits, names: Bits) -> Bits {
        let mut records = Bits::NONE;
        for name in state.names() {
            let segment = state.segment(name);
            let is_open = !names.has(name) && !owner.checkpoint.decides(name, segment);
            if is_open {
                records |= segment.records.iter().take_while(|record| stored.has(*record)).collect();
            }
        }
        records
    }

    /// One order over everything that was found: the newest version of a block wins (P1).
    fn build_index(&self, state: &mut State, process: usize, names: Bits, records: Bits) {
        let mut index = state.owners[process].checkpoint.index;
        let mut apply = |record: u8, segment: u8, wins: bool| {
            let found = state.records[usize::from(record)];
            let place = &mut index[usize::from(found.block)];
            if wins || self.apparent_rank(state, record) >= self.apparent_rank(state, place.record) {
                *place = Place { record, segment };
            }
        };
        for segment in names.iter() {
            for record in state.segment(segment).records.iter() {
                apply(record, segment, false);
            }
        }
        for record in records.iter() {
            apply(record, state.segment_of(record), !self.hold(Rule::NewestWins));
        }
        state.owners[process].index = index;
    }

    /// The version that a record carries. Copies carry that of the guest's write.
    fn apparent_rank(&self, state: &State, record: u8) -> (u8, u8) {
        match self.hold(Rule::CopiesKeepVersion) {
            true => state.rank(record),
            false => (state.records[usize::from(record)].generation, record),
        }
    }

    fn finish_reseal(&self, state: &State, process: usize, steps: &mut Steps<State>) {
        let Some(reseal) = state.owners[process].reseal.filter(|name| self.has_all_shards(state, *name)) else {
            return;
        };
        let mut next = *state;
        next.owners[process].phase = Phase::Committing;
        next.owners[process].sealed.add(reseal);
        steps.add(next, || format!("O{process} has every shard of s{reseal}"));
    }

    /// P10.5 and P10.6: checkpoint and a new empty set, in one conditional write.
    fn commit(&self, state: &State, process: usize, steps: &mut Steps<State>) {
        let owner = &state.owners[process];
        for nodes in self.set_choices(state, None) {
            let mut next = *state;
            let Some(set) = next.new_set(owner.generation, nodes) else { return };
            let live = owner.index.iter().filter(|place| place.record != ZEROES);
            let checkpoint = Checkpoint {
                index: owner.index,
                listed: live.map(|place| place.segment).collect(),
                border: owner.generation,
                decided: owner.reseal.map_or(Bits::NONE, Bits::one),
            };
            self.ask(&mut next, process, Change::Commit(checkpoint, set));
            if !self.hold(Rule::ServeAfterCommit) {
                self.serve(&mut next, process, checkpoint, set);
            }
            steps.add(next, || {
                format!(
                    "O{process} (g{}) asks to commit: checkpoint lists {}, J{set} on nodes {nodes}",
                    owner.generation, checkpoint.listed
                )
            });
        }
    }

    /// P8: confirmations that the first closed member gave before have run out everywhere.
    fn stop_waiting(&self, state: &State, process: usize, steps: &mut Steps<State>) {
        let Some((set, place)) = state.owners[process].first_closed else { return };
        let counts = |owner: &Owner| {
            let own = owner.set == Some(set) && owner.fresh.has(place);
            own || owner.next_set == Some(set) && owner.fresh.has(Self::NEXT_SET_FROM + place)
        };
        if !state.owners.iter().any(counts) {
            let mut next = *state;
            next.owners[process].phase = Phase::Serving;
            next.owners[process].first_closed = None;
            steps.add(next, || format!("O{process} has waited for T, serves"));
        }
    }
}
