//! An owner and its guests: writes, acknowledgements, FLUSH, reads (P4, P8).

use super::state::{Broken, Owner, Place, Read, Record, Set, State, ZEROES};
use super::{Volume, VolumeRule as Rule, called};
use crate::bits::Bits;
use crate::check::Steps;

impl Volume {
    /// What a serving owner does for its guests.
    pub(super) fn guest_steps(&self, state: &State, process: usize, steps: &mut Steps<State>) {
        self.write(state, process, steps);
        self.acknowledge(state, process, steps);
        self.flush(state, process, steps);
        if self.bounds.reads {
            match state.owners[process].read {
                None => self.start_read(state, process, steps),
                Some(read) => self.finish_read(state, process, read, steps),
            }
        }
    }

    fn write(&self, state: &State, process: usize, steps: &mut Steps<State>) {
        if state.left.writes == 0 {
            return;
        }
        let owner = &state.owners[process];
        for block in 0..self.bounds.blocks {
            let mut next = *state;
            next.left.writes -= 1;
            // A newer owner has committed once a set of its generation is registered.
            let committed = state.register.set.map_or(0, |set| state.set(set).generation);
            let record = Record {
                block,
                generation: owner.generation,
                version: 0,
                known: state.told[usize::from(block)].newest,
                is_late: committed > owner.generation,
                is_at_risk: false,
            };
            let Some(id) = next.new_record(record, false) else { return };
            self.append(&mut next, process, id);
            steps.add(next, || {
                format!("O{process} (g{}) appends w{id} of block {block} to s{}", owner.generation, owner.open)
            });
        }
    }

    /// Puts a record into the open segment and sends it to the set, and to the next one while that is being made (P5).
    pub(super) fn append(&self, state: &mut State, process: usize, record: u8) {
        let owner = state.owners[process];
        state.segments[usize::from(owner.open)].records.add(record);
        for set in state.sets_of(&owner, true) {
            state.sets[usize::from(set)].sent.add(record);
        }
    }

    fn acknowledge(&self, state: &State, process: usize, steps: &mut Steps<State>) {
        let owner = &state.owners[process];
        let open = state.records_in(owner.unsealed) - owner.acknowledged;
        for record in open.iter().filter(|record| self.is_everywhere(state, owner, *record)) {
            let mut next = *state;
            self.set_acknowledged(&mut next, process, record, state.segment_of(record));
            steps.add(next, || format!("O{process} acknowledges {}", called(state, record)));
        }
    }

    /// Whether every member's contiguous length covers the record (P4).
    fn is_everywhere(&self, state: &State, owner: &Owner, record: u8) -> bool {
        let segment = state.segment(state.segment_of(record));
        let needed = match self.hold(Rule::Contiguous) {
            true => segment.records & Bits::below(record + 1),
            false => Bits::one(record),
        };
        let sets = state.sets_of(owner, self.hold(Rule::BothSets));
        let mut members = sets.flat_map(|set| state.set(set).members());
        members.all(|(_, member)| member.answered.covers(needed))
    }

    /// The guest is answered: the index shows the record, and nothing older may be seen again.
    pub(super) fn set_acknowledged(&self, state: &mut State, process: usize, record: u8, segment: u8) {
        let owner = &mut state.owners[process];
        owner.acknowledged.add(record);
        self.index(state, process, Place { record, segment });
        let Record { block, version, known, is_late, .. } = state.records[usize::from(record)];
        if version != record {
            return;
        }
        if state.rank(known) > state.rank(record) {
            state.broken = Some(Broken::WrongOrder);
        }
        if is_late {
            state.broken = Some(Broken::TwoOwners);
        }
        state.tell(block, record);
    }

    /// Shows a record if it is newer than what the index has; a copy takes the place of what it is a copy of.
    fn index(&self, state: &mut State, process: usize, place: Place) {
        let record = state.records[usize::from(place.record)];
        let now = state.owners[process].index[usize::from(record.block)].record;
        let is_copy = record.version != place.record;
        let shows = match is_copy {
            true => state.records[usize::from(now)].version == record.version,
            false => state.rank(place.record) > state.rank(now),
        };
        if shows {
            state.owners[process].index[usize::from(record.block)] = place;
        }
    }

    fn flush(&self, state: &State, process: usize, steps: &mut Steps<State>) {
        let owner = &state.owners[process];
        if owner.flushing.is_empty() {
            if state.left.flushes > 0 && !owner.acknowledged.is_empty() {
                let mut next = *state;
                next.left.flushes -= 1;
                next.owners[process].flushing = owner.acknowledged;
                steps.add(next, || format!("O{process} sends FLUSH for {}", owner.acknowledged));
            }
        } else if owner.flushing.iter().all(|record| self.is_stable(state, owner, record)) {
            let mut next = *state;
            next.owners[process].flushing = Bits::NONE;
            for record in owner.flushing.iter() {
                next.tell_flushed(state.records[usize::from(record)].block, record);
            }
            steps.add(next, || format!("O{process} completes FLUSH of {}", owner.flushing));
        }
    }

    /// Whether a record is on stable media: every member flushed it, or named the segment that was sealed with it.
    fn is_stable(&self, state: &State, owner: &Owner, record: u8) -> bool {
        let name = state.segment_of(record);
        let is_decided = owner.checkpoint.decides(name, state.segment(name));
        if is_decided || owner.sealed.has(name) && !self.hold(Rule::FlushAwaitsSealed) {
            return true;
        }
        let mut members = state.sets_of(owner, true).flat_map(|set| state.set(set).members());
        members.all(|(_, member)| member.flushed.has(record) || member.sealed.has(name))
    }

    /// Looks the block up. What guests know of at this moment is the oldest that may be given.
    fn start_read(&self, state: &State, process: usize, steps: &mut Steps<State>) {
        let owner = &state.owners[process];
        for block in 0..self.bounds.blocks {
            let known = state.told[usize::from(block)].newest;
            let found = owner.index[usize::from(block)];
            if known == ZEROES && found.record == ZEROES {
                continue;
            }
            let read = Read { block, found, known, confirmed: Bits::NONE };
            let mut next = *state;
            if self.is_fresh(state, owner) {
                self.answer_read(&mut next, process, read);
                // A read that tells nothing new changes nothing.
                if next != *state {
                    steps.add(next, || {
                        format!("O{process} reads {} of block {block}: within T", called(state, found.record))
                    });
                }
            } else {
                next.owners[process].read = Some(read);
                steps.add(next, || format!("O{process} looks block {block} up: {}", called(state, found.record)));
            }
        }
    }

    /// Whether every member of the sets confirmed within T (P8).
    fn is_fresh(&self, state: &State, owner: &Owner) -> bool {
        let mut sets = state.sets_of(owner, self.hold(Rule::BothSets)).zip([0, Self::NEXT_SET_FROM]);
        self.bounds.window
            && sets.all(|(set, from)| (0..state.set(set).size).all(|member| owner.fresh.has(from + member)))
    }

    /// Members of the next set have their bits from here on, in `fresh` and in `confirmed`.
    pub(super) const NEXT_SET_FROM: u8 = 3;

    fn finish_read(&self, state: &State, process: usize, read: Read, steps: &mut Steps<State>) {
        let owner = &state.owners[process];
        let mut missing = 0;
        let sets = state.sets_of(owner, self.hold(Rule::BothSets)).zip([0, Self::NEXT_SET_FROM]);
        for (set, from) in sets {
            for (place, member) in state.set(set).members() {
                let bit = from + u8::try_from(place).unwrap_or(0);
                if read.confirmed.has(bit) || !self.hold(Rule::ReadsConfirmed) {
                    continue;
                }
                missing += 1;
                if self.accepts(state, state.set(set), place) {
                    let mut next = *state;
                    let confirmed = read.confirmed | Bits::one(bit);
                    next.owners[process].read = Some(Read { confirmed, ..read });
                    self.refresh(&mut next, process, bit);
                    steps.add(next, || format!("n{} confirms J{set} to O{process}", member.node));
                }
            }
        }
        if missing == 0 {
            let mut next = *state;
            next.owners[process].read = None;
            self.answer_read(&mut next, process, read);
            steps.add(next, || format!("O{process} gives the guest {}", called(state, read.found.record)));
        }
    }

    /// A member answered something that was sent at this moment.
    pub(super) fn refresh(&self, state: &mut State, process: usize, bit: u8) {
        if self.bounds.window {
            state.owners[process].fresh.add(bit);
        }
    }

    fn answer_read(&self, state: &mut State, process: usize, read: Read) {
        let owner = &state.owners[process];
        let is_current = owner.generation == state.register.generation;
        let is_sealed = read.found != Place::default() && !owner.unsealed.has(read.found.segment);
        if is_current && is_sealed && state.shards(read.found.segment, false) < u32::from(super::bounds::K) {
            state.broken = Some(Broken::ReadLostSegment);
        }
        if state.rank(read.found.record) < state.rank(read.known) {
            state.broken = Some(Broken::OldValue);
        }
        state.tell(read.block, read.found.record);
    }

    /// Whether a member takes anything for this set now: up, the same process, not closed, and it knows the set (P3).
    pub(super) fn accepts(&self, state: &State, set: &Set, place: usize) -> bool {
        let member = &set.members[place];
        let node = state.node(member.node);
        let is_same = node.incarnation == member.incarnation || !self.hold(Rule::Incarnations);
        node.is_up && is_same && member.condition != super::state::Condition::Unknown && node.closed <= set.generation
    }
}
