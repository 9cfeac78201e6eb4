//! Snapshots, clones and deletes (P7, R5): a segment goes only when no checkpoint that anybody may read lists it.
//!
//! The volume's owner overwrites its only block segment by segment, checkpoints and deletes; people take snapshots, make clones of
//! them and drop them, by conditional writes of the register that the owner learns of late. A clone writes segments of its own.

use crate::bits::Bits;
use crate::check::{Model, Steps};
use crate::rules::{Ruled, Rules, read_words, rules};

rules! {
    /// Rules of snapshots and clones.
    PinRule {
        PinsHold = "pins-hold", "P7, R5: a name that a pinned checkpoint lists is not deleted";
        VersionChecked = "version-checked", "P2: a register write names the version of the register, not only the generation";
        PinRegistered = "pin-registered", "P7: a snapshot pins the checkpoint that is registered at that moment";
        CloneHoldsPin = "clone-holds-pin", "P2, P7: a pin stays while a clone reads it";
        CloneNeedsPin = "clone-needs-pin", "P2, P7: a clone is made of a pin that exists, in one conditional write";
        OwnNamesOnly = "own-names-only", "P7: a clone never deletes names that are not its own";
        RetireRefused = "retire-refused", "P2: a volume is not retired while it has pins or clones";
        DeleteAfterCheckpoint = "delete-after-checkpoint", "P7: only the registered checkpoint decides what may go";
    }
}

const SEGMENTS_MAX: u8 = 6;
const PINS: usize = 2;

/// What a checkpoint lists: with one block, one segment. `NOTHING` before the first write.
type Listed = u8;
const NOTHING: Listed = u8::MAX;

/// The part of the register that is looked at here.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Register {
    version: u8,
    checkpoint: Listed,
    /// Snapshots: the checkpoints that they pin.
    pins: [Option<Listed>; PINS],
    /// The pin that the clone reads.
    cloned: Option<u8>,
    is_retired: bool,
}

/// Somebody beside the owner: what he read of the register before he writes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Admin {
    read: Register,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
struct Budget {
    writes: u8,
    snapshots: u8,
    drops: u8,
    clones: u8,
    clone_writes: u8,
    retires: u8,
}

/// Everything.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct State {
    register: Register,
    /// What the owner knows of the register.
    known: Register,
    /// The segment with the newest content, sealed.
    newest: Listed,
    segment_count: u8,
    /// A checkpoint that the owner wrote and has not registered.
    draft: Option<Listed>,
    /// Segments whose shards exist.
    held: Bits,
    /// A segment that the clone reads through its own checkpoint: the pinned one, or one of its own.
    clone_reads: Option<Listed>,
    /// Segments that the clone wrote.
    of_clone: Bits,
    admins: [Option<Admin>; 2],
    left: Budget,
}

/// The model with its bounds.
pub struct Pins {
    rules: Rules<PinRule>,
    budget: Budget,
}

impl Ruled for Pins {
    type Rule = PinRule;
    const NAME: &'static str = "pins";
    const WORDS: &'static str =
        "w writes of the volume, snap (snapshots), drop (of snapshots), clone, cw writes of the clone, retire";
    const NEEDED: &'static [(PinRule, &'static str)] = &[
        (PinRule::PinsHold, "w=2 snap=1"),
        (PinRule::VersionChecked, "w=2 snap=1"),
        (PinRule::PinRegistered, "w=2 snap=1"),
        (PinRule::CloneHoldsPin, "w=2 snap=1 clone=1 drop=1"),
        (PinRule::CloneNeedsPin, "w=2 snap=1 clone=1 drop=1"),
        (PinRule::OwnNamesOnly, "w=1 snap=1 clone=1 cw=1"),
        (PinRule::RetireRefused, "w=1 snap=1 retire=1"),
        (PinRule::DeleteAfterCheckpoint, "w=2"),
    ];

    fn build(words: &[&str], rules: Rules<PinRule>) -> Result<Self, String> {
        let mut budget = Budget::default();
        read_words(words, |name, number| {
            let place = match name {
                "w" => &mut budget.writes,
                "snap" => &mut budget.snapshots,
                "drop" => &mut budget.drops,
                "clone" => &mut budget.clones,
                "cw" => &mut budget.clone_writes,
                "retire" => &mut budget.retires,
                _ => return None,
            };
            *place = number;
            Some(())
        })?;
        Ok(Self { rules, budget })
    }
}

impl State {
    fn new_segment(&mut self) -> Option<u8> {
        let name = self.segment_count;
        (name < SEGMENTS_MAX).then(|| {
            self.segment_count += 1;
            self.held.add(name);
            name
        })
    }

    /// Every segment that somebody may read: the registered checkpoint, each snapshot, the clone.
    fn needed(&self) -> Bits {
        let pins = self.register.pins.iter().flatten().copied();
        let volume = (!self.register.is_retired).then_some(self.register.checkpoint);
        pins.chain(volume).chain(self.clone_reads).filter(|name| *name != NOTHING).collect()
    }
}

impl Pins {
    fn hold(&self, rule: PinRule) -> bool {
        self.rules.hold(rule)
    }

    /// A conditional write by somebody who knows `known`: `None` if it is refused.
    fn write(&self, state: &State, known: &Register, change: impl FnOnce(&mut Register)) -> Option<State> {
        let is_same = known.version == state.register.version || !self.hold(PinRule::VersionChecked);
        if !is_same || state.register.is_retired {
            return None;
        }
        let mut next = *state;
        change(&mut next.register);
        next.register.version += 1;
        Some(next)
    }

    fn owner_steps(&self, state: &State, steps: &mut Steps<State>) {
        if state.left.writes > 0 {
            let mut next = *state;
            next.left.writes -= 1;
            if let Some(name) = next.new_segment() {
                next.newest = name;
                steps.add(next, || format!("the owner writes the block again: sealed s{name}"));
            }
        }
        if state.draft.is_none() && state.newest != state.known.checkpoint {
            let next = State { draft: Some(state.newest), ..*state };
            steps.add(next, || format!("the owner writes a checkpoint that lists s{}", state.newest));
        }
        if let Some(draft) = state.draft {
            match self.write(state, &state.known, |register| register.checkpoint = draft) {
                Some(mut next) => {
                    next.draft = None;
                    // It knows what it wrote, and of the rest what it knew before: the answer carries the version alone.
                    next.known = Register { version: next.register.version, checkpoint: draft, ..state.known };
                    steps.add(next, || format!("the register takes the checkpoint that lists s{draft}"));
                }
                None => {
                    let next = State { known: state.register, ..*state };
                    steps.add(next, || "the register refuses the owner, who reads it again".to_owned());
                }
            }
        }
        self.delete(state, steps);
    }

    /// The owner deletes what its checkpoint and the pins it knows of do not list.
    fn delete(&self, state: &State, steps: &mut Steps<State>) {
        let decided = match state.draft.filter(|_| !self.hold(PinRule::DeleteAfterCheckpoint)) {
            Some(draft) => draft,
            None => state.known.checkpoint,
        };
        for name in (state.held - state.of_clone).iter().filter(|name| decided != NOTHING && *name < decided) {
            let is_pinned = state.known.pins.contains(&Some(name)) && self.hold(PinRule::PinsHold);
            if !is_pinned {
                let mut next = *state;
                next.held.remove(name);
                steps.add(next, || format!("the owner deletes s{name}"));
            }
        }
    }

    fn admin_steps(&self, state: &State, number: usize, steps: &mut Steps<State>) {
        let Some(Admin { read }) = state.admins[number] else {
            let mut next = *state;
            next.admins[number] = Some(Admin { read: state.register });
            let Budget { snapshots, drops, clones, retires, .. } = state.left;
            if snapshots + drops + clones + retires > 0 {
                steps.add(next, || format!("admin {number} reads the register"));
            }
            return;
        };
        let mut put = |next: Option<State>, words: String| {
            if let Some(mut next) = next {
                next.admins[number] = None;
                steps.add(next, || format!("admin {number} {words}"));
            }
        };
        put(Some(*state), "leaves it".to_owned());
        if let Some(free) = read.pins.iter().position(Option::is_none).filter(|_| state.left.snapshots > 0) {
            put(self.snapshot(state, &read, free), "takes a snapshot".to_owned());
        }
        for (pin, listed) in read.pins.iter().enumerate().filter_map(|(pin, listed)| Some((pin, (*listed)?))) {
            let number = u8::try_from(pin).unwrap_or(0);
            let is_cloned = read.cloned == Some(number) && self.hold(PinRule::CloneHoldsPin);
            if state.left.drops > 0 && !is_cloned {
                let next = self.write(state, &read, |register| register.pins[pin] = None);
                let next =
                    next.map(|next| State { left: Budget { drops: state.left.drops - 1, ..state.left }, ..next });
                put(next, format!("drops the snapshot of s{listed}"));
            }
            if state.left.clones > 0 {
                put(
                    self.make_clone(state, &read, number, listed),
                    format!("makes a clone of the snapshot of s{listed}"),
                );
            }
        }
        let is_used = read.pins.iter().any(Option::is_some) || read.cloned.is_some();
        if state.left.retires > 0 && !(is_used && self.hold(PinRule::RetireRefused)) {
            let next = self.write(state, &read, |register| register.is_retired = true);
            let next = next.map(|mut next| {
                next.left.retires -= 1;
                // Nodes free by the volume's number: all of it.
                next.held = state.held & state.of_clone;
                next
            });
            put(next, "retires the volume".to_owned());
        }
    }

    fn snapshot(&self, state: &State, read: &Register, free: usize) -> Option<State> {
        // Without the rule somebody pins what he read some time ago.
        let is_now = self.hold(PinRule::PinRegistered);
        let known = if is_now { *read } else { Register { version: state.register.version, ..*read } };
        let mut next = self.write(state, &known, |register| {
            register.pins[free] = Some(if is_now { register.checkpoint } else { read.checkpoint });
        })?;
        next.left.snapshots -= 1;
        (state.register.pins[free].is_none()).then_some(next)
    }

    fn make_clone(&self, state: &State, read: &Register, pin: u8, listed: Listed) -> Option<State> {
        let known = match self.hold(PinRule::CloneNeedsPin) {
            true => *read,
            false => Register { version: state.register.version, ..*read },
        };
        let mut next = self.write(state, &known, |register| register.cloned = Some(pin))?;
        next.left.clones -= 1;
        next.clone_reads = Some(listed);
        Some(next)
    }

    /// The clone overwrites its block; what it read until then is garbage to it.
    fn clone_steps(&self, state: &State, steps: &mut Steps<State>) {
        let Some(reads) = state.clone_reads.filter(|_| state.left.clone_writes > 0) else { return };
        let mut next = *state;
        next.left.clone_writes -= 1;
        let Some(name) = next.new_segment() else { return };
        next.of_clone.add(name);
        next.clone_reads = Some(name);
        if reads != NOTHING && (state.of_clone.has(reads) || !self.hold(PinRule::OwnNamesOnly)) {
            next.held.remove(reads);
        }
        steps
            .add(next, || format!("the clone writes the block: sealed s{name}; deletes what it read before if it may"));
    }
}

impl Model for Pins {
    type State = State;

    fn initial(&self) -> State {
        let register = Register { version: 0, checkpoint: 0, pins: [None; PINS], cloned: None, is_retired: false };
        State {
            register,
            known: register,
            newest: 0,
            segment_count: 1,
            draft: None,
            held: Bits::one(0),
            clone_reads: None,
            of_clone: Bits::NONE,
            admins: [None; 2],
            left: self.budget,
        }
    }

    fn successors(&self, state: &State, steps: &mut Steps<State>) {
        if !state.register.is_retired {
            self.owner_steps(state, steps);
        }
        (0..state.admins.len()).for_each(|number| self.admin_steps(state, number, steps));
        self.clone_steps(state, steps);
    }

    fn violation(&self, state: &State) -> Option<&'static str> {
        (!state.held.covers(state.needed()))
            .then_some("a segment is gone that a checkpoint, a snapshot or a clone lists (R5)")
    }
}
