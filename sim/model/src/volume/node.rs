//! What nodes do with what was sent to them: appends, flushes, `sealed`, shards, deletes, and freeing what is garbage.

use super::state::{Condition, InFlight, Member, News, Phase, State};
use super::{Volume, VolumeRule as Rule, called};
use crate::bits::Bits;
use crate::check::Steps;

impl Volume {
    /// Every message that could arrive now, and every piece of work that could end.
    pub(super) fn node_steps(&self, state: &State, steps: &mut Steps<State>) {
        for set in 0..state.set_count {
            for place in 0..usize::from(state.set(set).size) {
                if self.accepts(state, state.set(set), place) {
                    self.member_appends(state, set, place, steps);
                    self.member_names(state, set, place, steps);
                    self.member_flushes(state, set, place, steps);
                    self.member_trims(state, set, place, steps);
                }
            }
        }
        for node in (0..self.bounds.nodes()).filter(|node| state.node(*node).is_up) {
            self.complete(state, node, steps);
            self.shards(state, node, steps);
            if self.bounds.garbage {
                self.free_garbage(state, node, steps);
            }
        }
    }

    fn member_appends(&self, state: &State, set: u8, place: usize, steps: &mut Steps<State>) {
        let member = &state.set(set).members[place];
        let node = member.node;
        for record in (state.set(set).sent - member.answered).iter() {
            let is_copy = state.set(set).copies.has(record);
            let mut next = *state;
            if self.bounds.in_flight && !is_copy {
                if state.node(node).in_flight == InFlight::Nothing {
                    next.nodes[usize::from(node)].in_flight = InFlight::Append { set, record };
                    steps.add(next, || {
                        format!("n{node} admits {} for J{set}; its device writes", called(state, record))
                    });
                }
                continue;
            }
            self.store(&mut next, set, place, record);
            let how = if is_copy { "stores the copy of" } else { "stores" };
            steps.add(next, || format!("n{node} {how} {} for J{set}, answers", called(state, record)));
        }
    }

    fn store(&self, state: &mut State, set: u8, place: usize, record: u8) {
        let is_copy = state.set(set).copies.has(record);
        let member = &mut state.sets[usize::from(set)].members[place];
        member.stored.add(record);
        member.answered.add(record);
        if is_copy && self.hold(Rule::CopyFlushed) {
            member.durable.add(record);
            member.flushed.add(record);
        }
        self.answered_to_owner(state, set, place);
    }

    /// Each answer of a member confirms it to the owner that it answers (P8).
    fn answered_to_owner(&self, state: &mut State, set: u8, place: usize) {
        let place = u8::try_from(place).unwrap_or(0);
        for process in 0..state.owners.len() {
            let owner = &state.owners[process];
            if owner.phase != Phase::Serving {
                continue;
            }
            if owner.set == Some(set) {
                self.refresh(state, process, place);
            } else if owner.next_set == Some(set) {
                self.refresh(state, process, Self::NEXT_SET_FROM + place);
            }
        }
    }

    /// `sealed`, or a manifest line that a new set is sent.
    fn member_names(&self, state: &State, set: u8, place: usize, steps: &mut Steps<State>) {
        let member = &state.set(set).members[place];
        let node = member.node;
        for segment in (state.set(set).sealed_sent - member.sealed).iter() {
            let mut next = *state;
            if self.bounds.in_flight {
                if state.node(node).in_flight == InFlight::Nothing {
                    next.nodes[usize::from(node)].in_flight = InFlight::Sealed { set, segment };
                    steps.add(next, || format!("n{node} admits `sealed` of s{segment} for J{set}"));
                }
                continue;
            }
            self.note_sealed(&mut next, set, place, segment);
            steps.add(next, || format!("n{node} notes s{segment} in the manifest of J{set}, frees its replica"));
        }
    }

    /// The name becomes durable, then the replica goes (P6). Without that rule power may fail in between: no name is left.
    fn note_sealed(&self, state: &mut State, set: u8, place: usize, segment: u8) {
        let records = state.segment(segment).records;
        let member = &mut state.sets[usize::from(set)].members[place];
        if self.hold(Rule::NameBeforeFree) {
            member.manifest.add(segment);
        }
        member.sealed.add(segment);
        member.stored -= records;
        member.durable -= records;
    }

    fn complete(&self, state: &State, node: u8, steps: &mut Steps<State>) {
        let mut next = *state;
        next.nodes[usize::from(node)].in_flight = InFlight::Nothing;
        let place_in =
            |set: u8| state.set(set).members().find(|(_, member)| member.node == node).map(|(place, _)| place);
        match state.node(node).in_flight {
            InFlight::Nothing => {}
            InFlight::Append { set, record } => {
                let Some(place) = place_in(set) else { return };
                self.store(&mut next, set, place, record);
                steps.add(next, || format!("n{node} has written {} for J{set}, answers", called(state, record)));
            }
            InFlight::Sealed { set, segment } => {
                let Some(place) = place_in(set) else { return };
                self.note_sealed(&mut next, set, place, segment);
                steps.add(next, || format!("n{node} has noted s{segment} for J{set}, frees its replica"));
            }
        }
    }

    /// A device flush for the FLUSH of an owner that goes by this set.
    fn member_flushes(&self, state: &State, set: u8, place: usize, steps: &mut Steps<State>) {
        let member = &state.set(set).members[place];
        let goes_by = |owner: &&super::state::Owner| owner.set == Some(set) || owner.next_set == Some(set);
        let wanted = state.owners.iter().filter(goes_by).fold(Bits::NONE, |all, owner| all | owner.flushing);
        let asked = wanted & member.answered;
        if member.flushed.covers(asked) {
            return;
        }
        let mut next = *state;
        let told = &mut next.sets[usize::from(set)].members[place];
        told.flushed |= asked;
        if self.hold(Rule::FlushBeginsAfter) {
            told.durable |= told.stored;
        }
        let how = if self.hold(Rule::FlushBeginsAfter) { "flushes" } else { "joins a flush that began earlier" };
        steps.add(next, || format!("n{} {how} for J{set}, answers", member.node));
    }

    fn member_trims(&self, state: &State, set: u8, place: usize, steps: &mut Steps<State>) {
        let Member { node, manifest, .. } = state.set(set).members[place];
        let trimmed = manifest & state.set(set).trim;
        if !trimmed.is_empty() {
            let mut next = *state;
            next.sets[usize::from(set)].members[place].manifest -= trimmed;
            steps.add(next, || format!("n{node} takes segments {trimmed} out of the manifest of J{set}"));
        }
    }

    /// Shards and deletes know no generation: a node executes them whenever they arrive (P6, P7).
    fn shards(&self, state: &State, node: u8, steps: &mut Steps<State>) {
        let held = state.node(node).shards;
        for name in state.names() {
            let segment = state.segment(name);
            let is_position = self.positions().has(node);
            let place = usize::from(node);
            if segment.is_frozen && is_position && !segment.answered.has(node) {
                let mut next = *state;
                next.nodes[place].shards.add(name);
                next.segments[usize::from(name)].answered.add(node);
                if !self.hold(Rule::ShardsFlushed) {
                    next.nodes[place].unflushed_shards.add(name);
                }
                steps.add(next, || format!("n{node} stores its shard of s{name}, answers"));
            }
            if segment.deleting && held.has(name) {
                let mut next = *state;
                next.nodes[place].shards.remove(name);
                next.nodes[place].unflushed_shards.remove(name);
                steps.add(next, || format!("n{node} deletes its shard of s{name}"));
            }
        }
    }

    /// A node learned of the register at any time, and acts on it now (P5).
    fn free_garbage(&self, state: &State, node: u8, steps: &mut Steps<State>) {
        for set in 0..state.set_count {
            let mut news = state.news.iter().flatten();
            let Some(news) = news.find(|news| self.is_garbage(state, set, **news)) else { continue };
            for (place, member) in state.set(set).members().filter(|(_, member)| member.node == node) {
                if member.condition == Condition::Unknown {
                    continue;
                }
                let mut next = *state;
                let freed = &mut next.sets[usize::from(set)].members[place];
                (freed.stored, freed.durable, freed.manifest) = (Bits::NONE, Bits::NONE, Bits::NONE);
                freed.condition = Condition::Unknown;
                steps.add(next, || match news.set {
                    Some(id) => format!("n{node}, which learned that J{id} was registered, frees its member of J{set}"),
                    None => format!(
                        "n{node}, which learned of g{} without a set, frees its member of J{set}",
                        news.generation
                    ),
                });
            }
        }
    }

    fn is_garbage(&self, state: &State, set: u8, news: News) -> bool {
        let of = state.set(set).generation;
        match news.set {
            Some(registered) if self.hold(Rule::FreeOlderSetsOnly) => {
                (of, set) < (state.set(registered).generation, registered)
            }
            Some(registered) => set != registered,
            None if self.hold(Rule::NoSetNoNews) => of < news.generation,
            None => of <= news.generation,
        }
    }
}
