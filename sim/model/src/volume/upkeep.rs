//! What an owner does beside its guests: seal, checkpoint, delete, clean (P6, P7).

use super::state::{Change, Checkpoint, Owner, Place, Record, State, ZEROES};
use super::{Volume, VolumeRule as Rule, called};
use crate::bits::Bits;
use crate::check::Steps;

impl Volume {
    /// What a serving owner does in the background.
    pub(super) fn upkeep_steps(&self, state: &State, process: usize, steps: &mut Steps<State>) {
        self.freeze(state, process, steps);
        self.finish_seal(state, process, steps);
        self.checkpoint(state, process, steps);
        self.delete(state, process, steps);
        self.clean(state, process, steps);
    }

    /// Closes the open segment to further records, sends its shards, opens the next. All of it must be acknowledged (P6).
    fn freeze(&self, state: &State, process: usize, steps: &mut Steps<State>) {
        let owner = &state.owners[process];
        let records = state.segment(owner.open).records;
        let may = owner.acknowledged.covers(records) || !self.hold(Rule::JournalAcknowledges);
        if state.left.seals == 0 || records.is_empty() || !may {
            return;
        }
        let mut next = *state;
        next.left.seals -= 1;
        next.segments[usize::from(owner.open)].is_frozen = true;
        let Some(open) = next.new_segment(owner.generation) else { return };
        next.owners[process].open = open;
        next.owners[process].unsealed.add(open);
        steps.add(next, || format!("O{process} freezes s{}, sends its shards, opens s{open}", owner.open));
    }

    /// Every position has its shard: the members are told to note the name and to free the replica.
    fn finish_seal(&self, state: &State, process: usize, steps: &mut Steps<State>) {
        let owner = &state.owners[process];
        let frozen = owner.unsealed.iter().filter(|name| state.segment(*name).is_frozen);
        for name in frozen.filter(|name| self.has_all_shards(state, *name)) {
            let mut next = *state;
            next.owners[process].unsealed.remove(name);
            next.owners[process].sealed.add(name);
            for set in state.sets_of(owner, true) {
                next.sets[usize::from(set)].sealed_sent.add(name);
            }
            // Nothing is left unless rule `journal-acknowledges` is out.
            for record in (state.segment(name).records - owner.acknowledged).iter() {
                self.set_acknowledged(&mut next, process, record, name);
            }
            steps.add(next, || format!("O{process} has every shard of s{name}, sends `sealed`"));
        }
    }

    /// Whether every position that is not lost has answered, and at least k of them (P6).
    pub(super) fn has_all_shards(&self, state: &State, name: u8) -> bool {
        let acting: Bits = self.positions().iter().filter(|node| !state.node(*node).is_lost).collect();
        let answered = state.segment(name).answered;
        answered.covers(acting) && answered.count() >= u32::from(super::bounds::K)
    }

    fn checkpoint(&self, state: &State, process: usize, steps: &mut Steps<State>) {
        let owner = &state.owners[process];
        let draft = self.draft(state, owner);
        if state.left.checkpoints == 0 || self.waits(state, process) || draft == owner.checkpoint {
            return;
        }
        let mut next = *state;
        next.left.checkpoints -= 1;
        if !self.hold(Rule::DeleteAfterCheckpoint) {
            // It relies on a checkpoint that may never count.
            next.owners[process].checkpoint = draft;
        }
        if !self.hold(Rule::TrimAfterCheckpoint) {
            self.send_trim(&mut next, process, &draft);
        }
        self.ask(&mut next, process, Change::Checkpoint(draft));
        steps.add(next, || format!("O{process} writes a checkpoint that lists {}, asks to register it", draft.listed));
    }

    /// The index of what is sealed. It decides all that is sealed; open segments stay undecided.
    fn draft(&self, state: &State, owner: &Owner) -> Checkpoint {
        let mut draft = Checkpoint { border: owner.generation, ..Checkpoint::default() };
        draft.decided =
            owner.sealed.iter().filter(|name| state.segment(*name).generation == owner.generation).collect();
        draft.decided |= owner.checkpoint.decided;
        for segment in owner.sealed.iter() {
            for record in state.segment(segment).records.iter() {
                let Record { block, .. } = state.records[usize::from(record)];
                let best = &mut draft.index[usize::from(block)];
                // Of copies of one version the last is listed, so that what it was copied from can go.
                if (state.rank(record), record) > (state.rank(best.record), best.record) {
                    *best = Place { record, segment };
                }
            }
        }
        draft.listed = draft.index.iter().filter(|place| place.record != ZEROES).map(|place| place.segment).collect();
        draft
    }

    /// The checkpoint counts: its owner goes by it, the members may trim their manifests.
    pub(super) fn checkpoint_counts(&self, state: &mut State, process: usize, checkpoint: Checkpoint) {
        let owner = state.owners[process];
        let undecided = owner.sealed.iter().filter(|name| !checkpoint.decides(*name, state.segment(*name)));
        state.owners[process].sealed = undecided.collect::<Bits>() | checkpoint.listed;
        state.owners[process].checkpoint = checkpoint;
        for (now, then) in state.owners[process].index.iter_mut().zip(checkpoint.index) {
            let same =
                state.records[usize::from(now.record)].version == state.records[usize::from(then.record)].version;
            if same && !owner.unsealed.has(now.segment) {
                *now = then;
            }
        }
        if self.hold(Rule::TrimAfterCheckpoint) {
            self.send_trim(state, process, &checkpoint);
        }
    }

    fn send_trim(&self, state: &mut State, process: usize, checkpoint: &Checkpoint) {
        let decided: Bits = state.names().filter(|name| checkpoint.decides(*name, state.segment(*name))).collect();
        let owner = state.owners[process];
        for set in state.sets_of(&owner, true) {
            state.sets[usize::from(set)].trim |= decided;
        }
    }

    /// Sends `delete` for a name that the checkpoint decides and does not list. Nothing fences, orders or repeats it (P7).
    fn delete(&self, state: &State, process: usize, steps: &mut Steps<State>) {
        let owner = &state.owners[process];
        let checkpoint = &owner.checkpoint;
        for name in state.names() {
            let segment = state.segment(name);
            let is_garbage = checkpoint.decides(name, segment) && !checkpoint.listed.has(name);
            let is_read = owner.read.is_some_and(|read| read.found.record != ZEROES && read.found.segment == name);
            let may = is_garbage && !(is_read && self.hold(Rule::DeleteAwaitsReads));
            if may && segment.is_frozen && !segment.deleting {
                let mut next = *state;
                next.segments[usize::from(name)].deleting = true;
                steps.add(next, || format!("O{process} (g{}) sends `delete` for s{name}", owner.generation));
            }
        }
    }

    /// Copies a live record out of a sealed segment, in two steps: the guest may write the block in between.
    fn clean(&self, state: &State, process: usize, steps: &mut Steps<State>) {
        let owner = &state.owners[process];
        if owner.cleaning == ZEROES && state.left.cleanings > 0 {
            let live = owner.index.iter().filter(|place| place.record != ZEROES && owner.sealed.has(place.segment));
            for place in live {
                let mut next = *state;
                next.left.cleanings -= 1;
                next.owners[process].cleaning = place.record;
                steps.add(next, || {
                    format!("O{process} picks {} of s{} to copy", called(state, place.record), place.segment)
                });
            }
        } else if owner.cleaning != ZEROES {
            let mut next = *state;
            let original = state.records[usize::from(owner.cleaning)];
            let copy = Record { generation: owner.generation, known: 0, is_late: false, ..original };
            let Some(id) = next.new_record(copy, true) else { return };
            next.owners[process].cleaning = ZEROES;
            self.append(&mut next, process, id);
            steps.add(next, || format!("O{process} appends {} to s{}", called(&next, id), owner.open));
        }
    }
}
