//! What goes wrong with nodes, and what guests may still rely on then (the table of R7).

use super::Volume;
use super::state::{Condition, InFlight, Owner, Read, State, Told};
use crate::bits::Bits;
use crate::check::Steps;

/// What a device keeps of what was not flushed.
#[derive(Clone, Copy)]
enum Kept {
    Nothing,
    All,
    /// Later writes may be there and earlier ones not.
    Last,
}

impl Kept {
    const ALL: [(Self, &'static str); 3] = [
        (Self::Nothing, "what was flushed"),
        (Self::All, "everything"),
        (Self::Last, "what was flushed and the last write"),
    ];
}

/// What stops a node.
#[derive(Clone, Copy)]
enum Stop {
    Crash,
    PowerLoss(Kept),
    DiskLost,
}

impl Volume {
    /// Every failure that may still happen, and nodes that come back.
    pub(super) fn failure_steps(&self, state: &State, steps: &mut Steps<State>) {
        for node in 0..self.bounds.nodes() {
            if state.node(node).is_up {
                self.stops(state, node, steps);
                self.rot(state, node, steps);
            } else if !state.node(node).is_lost {
                let mut next = *state;
                start(&mut next, node);
                steps.add(next, || format!("n{node} starts again"));
            }
        }
        if state.left.blackouts > 0 {
            self.blackout(state, steps);
        }
        if self.bounds.window {
            self.time_passes(state, steps);
        }
    }

    fn stops(&self, state: &State, node: u8, steps: &mut Steps<State>) {
        if state.left.process_crashes > 0 {
            let mut next = *state;
            next.left.process_crashes -= 1;
            stop(&mut next, node, Stop::Crash);
            steps.add_failure(next, || format!("the process of n{node} crashes"));
        }
        if state.left.power_losses > 0 {
            for (kept, words) in Kept::ALL {
                let mut next = *state;
                next.left.power_losses -= 1;
                stop(&mut next, node, Stop::PowerLoss(kept));
                self.count_failure(&mut next, Bits::one(node));
                steps.add_failure(next, || format!("n{node} loses power, keeps {words}"));
            }
        }
        if state.left.nodes_lost > 0 {
            let mut next = *state;
            next.left.nodes_lost -= 1;
            stop(&mut next, node, Stop::Crash);
            next.nodes[usize::from(node)].is_lost = true;
            self.count_failure(&mut next, Bits::one(node));
            steps.add_failure(next, || format!("n{node} is lost for ever"));
        }
        if state.left.disks_lost > 0 {
            let mut next = *state;
            next.left.disks_lost -= 1;
            stop(&mut next, node, Stop::DiskLost);
            self.count_failure(&mut next, Bits::one(node));
            steps.add_failure(next, || format!("n{node} stops; its disk is empty when it comes back"));
        }
    }

    /// A record on one member can no longer be read. Its node does not know until somebody reads it.
    fn rot(&self, state: &State, node: u8, steps: &mut Steps<State>) {
        if state.left.rot == 0 {
            return;
        }
        for set in 0..state.set_count {
            for (place, member) in state.set(set).members().filter(|(_, member)| member.node == node) {
                for record in member.stored.iter() {
                    let mut next = *state;
                    next.left.rot -= 1;
                    let rotten = &mut next.sets[usize::from(set)].members[place];
                    rotten.stored.remove(record);
                    rotten.durable.remove(record);
                    self.count_failure(&mut next, Bits::one(node));
                    steps.add_failure(next, || format!("record {record} of J{set} rots on n{node}"));
                }
            }
        }
    }

    /// Everything loses power and starts again. Members of the registered set keep any of the three, each by itself.
    fn blackout(&self, state: &State, steps: &mut Steps<State>) {
        let members: Vec<u8> =
            state.register.set.map_or(Vec::new(), |set| state.set(set).members().map(|(_, m)| m.node).collect());
        for choice in 0..3usize.pow(u32::try_from(members.len()).unwrap_or(0)) {
            let mut next = *state;
            next.left.blackouts -= 1;
            let mut kept = String::new();
            for node in (0..self.bounds.nodes()).filter(|node| !state.node(*node).is_lost) {
                let digit =
                    members.iter().position(|member| *member == node).and_then(|place| u32::try_from(place).ok());
                let which = digit.map_or(0, |digit| choice / 3usize.pow(digit) % 3);
                stop(&mut next, node, Stop::PowerLoss(Kept::ALL[which].0));
                start(&mut next, node);
                if digit.is_some() {
                    kept += &format!(" n{node} keeps {};", Kept::ALL[which].1);
                }
            }
            next.owners = [Owner::default(); super::state::OWNERS];
            self.count_failure(&mut next, Bits::below(self.bounds.nodes()));
            steps.add_failure(next, || {
                format!("everything loses power and starts again:{kept} the others keep what was flushed")
            });
        }
    }

    /// R7: with up to f failed nodes everything that was acknowledged survives, with more what was flushed.
    fn count_failure(&self, state: &mut State, nodes: Bits) {
        state.failed |= nodes;
        if state.failed.count() <= u32::from(self.bounds.f) {
            return;
        }
        for told in &mut state.told {
            *told = Told { newest: told.flushed, ..*told };
        }
        // Answers to what was sent before may still be on their way.
        state.records.iter_mut().skip(1).for_each(|record| record.is_at_risk = true);
        // The guest of a running read may not rely on more either.
        for process in 0..state.owners.len() {
            let Some(read) = state.owners[process].read else { continue };
            let flushed = state.told[usize::from(read.block)].flushed;
            if state.rank(flushed) < state.rank(read.known) {
                state.owners[process].read = Some(Read { known: flushed, ..read });
            }
        }
    }

    /// A confirmation gets older than T.
    fn time_passes(&self, state: &State, steps: &mut Steps<State>) {
        for (process, owner) in state.owners.iter().enumerate() {
            for bit in owner.fresh.iter() {
                let mut next = *state;
                next.owners[process].fresh.remove(bit);
                steps.add(next, || format!("O{process}'s confirmation number {bit} gets older than T"));
            }
        }
    }
}

fn stop(state: &mut State, node: u8, how: Stop) {
    let stopped = &mut state.nodes[usize::from(node)];
    stopped.is_up = false;
    stopped.in_flight = InFlight::Nothing;
    if let Stop::PowerLoss(_) = how {
        stopped.shards -= stopped.unflushed_shards;
        stopped.unflushed_shards = Bits::NONE;
    }
    if let Stop::DiskLost = how {
        stopped.shards = Bits::NONE;
    }
    let members = state.sets.iter_mut().flat_map(|set| set.members.iter_mut().take(usize::from(set.size)));
    for member in members.filter(|member| member.node == node) {
        match how {
            Stop::Crash => {}
            Stop::PowerLoss(kept) => {
                let unflushed = member.stored - member.durable;
                member.stored = match kept {
                    Kept::Nothing => member.durable,
                    Kept::All => member.stored,
                    Kept::Last => member.durable | unflushed.last(),
                };
                // What is left is on the device.
                member.durable = member.stored;
                if member.condition == Condition::Whole {
                    member.condition = Condition::Flushed;
                }
            }
            Stop::DiskLost => {
                (member.stored, member.durable, member.manifest) = (Bits::NONE, Bits::NONE, Bits::NONE);
                member.condition = Condition::Unknown;
            }
        }
    }
}

/// A new process: another incarnation, nothing closed, nothing in flight.
fn start(state: &mut State, node: u8) {
    let started = &mut state.nodes[usize::from(node)];
    started.is_up = true;
    started.incarnation += 1;
    started.closed = 0;
}
