//! The rules of P2, once by hand and once against a model that keeps the whole history instead of being clever.

use crate::support::{VOLUME, change, checkpoint, register_of, segment, set, state_after, whole_cluster};
use proptest::prelude::*;
use raft_meta::{Command, MetaError, MetaState, Outcome};
use xsan_types::{
    ChangeToken, CheckpointRef, Generation, JournalSet, Register, RegisterChange, RegisterError, VolumeState,
};

fn refused(result: Result<Outcome, MetaError>) -> RegisterError {
    match result {
        Err(MetaError::Register(error)) => error,
        other => panic!("not refused by the register: {other:?}"),
    }
}

fn ask(state: &mut MetaState, command: &Command) -> Register {
    register_of(state.apply(command).unwrap())
}

#[test]
fn an_owner_lives_through_all_its_changes() {
    let mut state = state_after(&whole_cluster());
    let taken = ask(&mut state, &change(0, 0, 1, RegisterChange::Take));
    assert_eq!((taken.generation, taken.version, &taken.set, taken.checkpoint), (Generation(1), 1, &None, None));
    let commit = RegisterChange::Commit { set: set(1, 1), checkpoint: Some(checkpoint(1, 1, 2)) };
    let committed = ask(&mut state, &change(1, 1, 2, commit));
    assert_eq!(
        (committed.version, committed.set, committed.checkpoint),
        (2, Some(set(1, 1)), Some(checkpoint(1, 1, 2)))
    );
    assert_eq!(ask(&mut state, &change(1, 2, 3, RegisterChange::Set(Some(set(1, 2))))).set, Some(set(1, 2)));
    let moved = ask(&mut state, &change(1, 3, 4, RegisterChange::Checkpoint(checkpoint(1, 9, 8))));
    assert_eq!((moved.checkpoint, moved.set), (Some(checkpoint(1, 9, 8)), Some(set(1, 2))));
    assert_eq!(ask(&mut state, &change(1, 4, 5, RegisterChange::Resize(8192))).size, 8192);
    // A clean hand-over; the next owner goes on from the checkpoint.
    assert_eq!(ask(&mut state, &change(1, 5, 6, RegisterChange::Set(None))).set, None);
    let next = ask(&mut state, &change(0, 0, 7, RegisterChange::Take));
    assert_eq!((next.generation, next.version, next.checkpoint), (Generation(2), 7, Some(checkpoint(1, 9, 8))));
    state.check().unwrap();
}

#[test]
fn a_stale_generation_is_refused_for_ever() {
    let mut state = state_after(&whole_cluster());
    ask(&mut state, &change(0, 0, 1, RegisterChange::Take));
    ask(&mut state, &change(0, 0, 2, RegisterChange::Take));
    let stale = [
        RegisterChange::Set(Some(set(1, 1))),
        RegisterChange::Set(None),
        RegisterChange::Checkpoint(checkpoint(1, 1, 1)),
        RegisterChange::Commit { set: set(1, 2), checkpoint: None },
        RegisterChange::Resize(4096),
    ];
    let refuse_all = |state: &mut MetaState, current: u64| {
        for (token, wanted) in (100..).zip(&stale) {
            for version in 0..10 {
                let before = state.clone();
                let error = refused(state.apply(&change(1, version, token, wanted.clone())));
                let (current, writer) = (Generation(current), Generation(1));
                assert_eq!(error, RegisterError::NewerOwner { current, writer });
                assert_eq!(*state, before);
            }
        }
    };
    refuse_all(&mut state, 2);
    let commit = RegisterChange::Commit { set: set(2, 1), checkpoint: None };
    ask(&mut state, &change(2, 2, 3, commit));
    refuse_all(&mut state, 2);
    // Even of a deleted volume the old owner learns that it must stop.
    ask(&mut state, &change(0, 0, 4, RegisterChange::Retire));
    refuse_all(&mut state, 3);
}

#[test]
fn a_repeat_gets_the_first_answer_and_happens_once() {
    let mut state = state_after(&whole_cluster());
    let steps = [
        change(0, 0, 11, RegisterChange::Take),
        change(1, 1, 12, RegisterChange::Commit { set: set(1, 1), checkpoint: None }),
        change(1, 2, 13, RegisterChange::Resize(1 << 20)),
        change(0, 0, 14, RegisterChange::Retire),
    ];
    for step in steps {
        let first = ask(&mut state, &step);
        let after = state.clone();
        for _ in 0..3 {
            assert_eq!(ask(&mut state, &step), first);
            assert_eq!(state, after);
        }
    }
}

#[test]
fn a_token_answers_for_its_own_change_only() {
    let mut state = state_after(&whole_cluster());
    ask(&mut state, &change(0, 0, 11, RegisterChange::Take));
    ask(&mut state, &change(1, 1, 12, RegisterChange::Resize(8192)));
    let other = refused(state.apply(&change(1, 1, 12, RegisterChange::Resize(4096))));
    assert_eq!(other, RegisterError::Version { current: 2, writer: 1 });
    // An earlier change asked again is not the last one: its version is gone, nothing happens twice.
    ask(&mut state, &change(1, 2, 13, RegisterChange::Resize(4096)));
    let late = refused(state.apply(&change(1, 1, 12, RegisterChange::Resize(8192))));
    assert_eq!(late, RegisterError::Version { current: 3, writer: 1 });
}

#[test]
fn what_breaks_a_rule_is_refused_and_changes_nothing() {
    let mut state = state_after(&whole_cluster());
    ask(&mut state, &change(0, 0, 1, RegisterChange::Take));
    let commit = RegisterChange::Commit { set: set(1, 5), checkpoint: Some(checkpoint(1, 1, 10)) };
    ask(&mut state, &change(1, 1, 2, commit));
    let twice = {
        let mut twice = set(1, 6);
        twice.members[1].device = twice.members[0].device;
        twice
    };
    let dead = {
        let mut dead = set(1, 6);
        dead.members[0].incarnation.0 = 0;
        dead
    };
    let foreign = {
        let mut foreign = checkpoint(1, 2, 11);
        foreign.segment.volume.0 += 1;
        foreign
    };
    let wrong = [
        RegisterChange::Set(Some(set(1, 5))),
        RegisterChange::Set(Some(set(1, 4))),
        RegisterChange::Set(Some(set(2, 1))),
        RegisterChange::Set(Some(JournalSet { members: vec![], ..set(1, 6) })),
        RegisterChange::Set(Some(twice)),
        RegisterChange::Set(Some(dead)),
        RegisterChange::Checkpoint(foreign),
        RegisterChange::Checkpoint(checkpoint(2, 2, 11)),
        RegisterChange::Checkpoint(checkpoint(1, 2, 9)),
        RegisterChange::Checkpoint(CheckpointRef { root_bytes: 0, ..checkpoint(1, 2, 11) }),
        RegisterChange::Checkpoint(CheckpointRef { root_offset: u64::MAX, ..checkpoint(1, 2, 11) }),
        RegisterChange::Checkpoint(CheckpointRef { segment_bytes: u64::MAX, ..checkpoint(1, 2, 11) }),
        RegisterChange::Commit { set: set(1, 6), checkpoint: None },
        RegisterChange::Resize(0),
        RegisterChange::Resize(4097),
        RegisterChange::Resize(1 << 63),
    ];
    for (token, wrong) in (10..).zip(wrong) {
        let before = state.clone();
        assert_eq!(refused(state.apply(&change(1, 2, token, wrong.clone()))), RegisterError::Invalid, "{wrong:?}");
        assert_eq!(state, before);
    }
    // A generation nobody was given.
    assert_eq!(refused(state.apply(&change(9, 2, 3, RegisterChange::Set(None)))), RegisterError::Invalid);
    // A set id stays used when a hand-over registered none.
    ask(&mut state, &change(1, 2, 4, RegisterChange::Set(None)));
    assert_eq!(refused(state.apply(&change(1, 3, 5, RegisterChange::Set(Some(set(1, 5)))))), RegisterError::Invalid);
    ask(&mut state, &change(1, 3, 6, RegisterChange::Set(Some(set(1, 6)))));
}

#[test]
fn nobody_changes_sets_and_checkpoints_of_a_volume_that_was_never_taken() {
    let mut state = state_after(&whole_cluster());
    for wrong in [RegisterChange::Set(Some(set(0, 1))), RegisterChange::Checkpoint(checkpoint(0, 1, 1))] {
        assert_eq!(refused(state.apply(&change(0, 0, 1, wrong))), RegisterError::Invalid);
    }
    // A detached volume can be resized by whoever knows its register.
    assert_eq!(ask(&mut state, &change(0, 0, 2, RegisterChange::Resize(4096))).size, 4096);
}

#[test]
fn a_pinned_volume_is_not_retired_and_a_retired_one_stays_a_tombstone() {
    let mut state = state_after(&whole_cluster());
    ask(&mut state, &change(0, 0, 1, RegisterChange::Take));
    let (volume, generation) = (VOLUME, Generation(1));
    let pin = |version, token| Command::PinCheckpoint { volume, generation, version, token: ChangeToken(token) };
    let unpin = |version, token, segment| Command::UnpinCheckpoint {
        volume,
        generation,
        version,
        token: ChangeToken(token),
        segment,
    };
    assert_eq!(refused(state.apply(&pin(1, 2))), RegisterError::Invalid, "there is no checkpoint to pin");
    ask(&mut state, &change(1, 1, 3, RegisterChange::Checkpoint(checkpoint(1, 1, 1))));
    let pinned = ask(&mut state, &pin(2, 4));
    assert_eq!(pinned.pins, [checkpoint(1, 1, 1)]);
    assert_eq!(ask(&mut state, &pin(2, 4)), pinned, "a repeat");
    assert_eq!(refused(state.apply(&change(0, 0, 5, RegisterChange::Retire))), RegisterError::Pinned);
    assert_eq!(refused(state.apply(&unpin(3, 6, segment(1, 2)))), RegisterError::Invalid);
    assert_eq!(ask(&mut state, &unpin(3, 7, segment(1, 1))).pins, []);
    let retired = ask(&mut state, &change(0, 0, 8, RegisterChange::Retire));
    assert_eq!((retired.state, retired.generation), (VolumeState::Deleted, Generation(2)));
    assert_eq!(refused(state.apply(&change(0, 0, 9, RegisterChange::Take))), RegisterError::NotFound);
    assert_eq!(refused(state.apply(&change(0, 0, 10, RegisterChange::Retire))), RegisterError::NotFound);
    let view = state.volumes[&VOLUME].register_view();
    assert!(view.deleted && view.generation == Generation(2));
    assert!(state.volume(VOLUME).is_none() && state.volume_named("vm1").is_none());
    // The name is free, the id is not; the tombstone and its answers stay.
    let again =
        Command::CreateVolume { name: "vm1".parse().unwrap(), pool: xsan_types::PoolId(1), size: 4096, ack: None };
    assert_eq!(state.apply(&again), Ok(Outcome::Volume(xsan_types::VolumeId(2))));
    assert_eq!(ask(&mut state, &change(0, 0, 8, RegisterChange::Retire)), retired);
    assert_eq!(state.volume_named("vm1").unwrap().id.0, 2);
    state.check().unwrap();
}

/// What a writer of the model asks.
#[derive(Clone, Debug)]
enum Ask {
    Take,
    Retire,
    Set(Option<u64>),
    Checkpoint(u64),
    Commit(u64, Option<u64>),
    Resize(u64),
    Pin,
}

/// A step: by which generation and version (relative to the register's), a new change or a repeat of an earlier one.
#[derive(Clone, Debug)]
enum Step {
    New { ask: Ask, generation_back: u64, version_back: u64 },
    Repeat(prop::sample::Index),
}

fn any_step() -> impl Strategy<Value = Step> {
    let ask = prop_oneof![
        3 => Just(Ask::Take),
        1 => Just(Ask::Retire),
        4 => prop::option::of(0u64..6).prop_map(Ask::Set),
        4 => (0u64..20).prop_map(Ask::Checkpoint),
        3 => (0u64..6, prop::option::of(0u64..20)).prop_map(|(set, border)| Ask::Commit(set, border)),
        2 => prop_oneof![Just(0u64), Just(4095), Just(4096), Just(1 << 40), Just(1 << 63)].prop_map(Ask::Resize),
        1 => Just(Ask::Pin),
    ];
    let back = || prop_oneof![4 => Just(0u64), 1 => 1u64..3];
    prop_oneof![
        5 => (ask, back(), back()).prop_map(|(ask, generation_back, version_back)| Step::New {
            ask,
            generation_back,
            version_back
        }),
        2 => any::<prop::sample::Index>().prop_map(Step::Repeat),
    ]
}

/// The naive twin: every register there ever was, every command that made one, every set number ever used.
struct Model {
    history: Vec<Register>,
    made_by: Vec<Option<Command>>,
    sets: Vec<(u64, u64)>,
}

impl Model {
    fn now(&self) -> &Register {
        self.history.last().unwrap()
    }

    /// Why the change is refused, as seen from the history; `None` if it is to happen.
    fn refusal(&self, generation: u64, version: u64, ask: &Ask) -> Option<RegisterError> {
        let now = self.now();
        if !matches!(ask, Ask::Take | Ask::Retire) {
            // Somebody took (or retired) the volume after this writer's generation: some register proves it.
            if self.history.iter().any(|register| register.generation.0 > generation) {
                let (current, writer) = (now.generation, Generation(generation));
                return Some(RegisterError::NewerOwner { current, writer });
            }
            if version != now.version {
                return Some(RegisterError::Version { current: now.version, writer: version });
            }
        }
        if now.state == VolumeState::Deleted {
            return Some(RegisterError::NotFound);
        }
        let border = now.checkpoint.map_or(0, |checkpoint| checkpoint.border);
        let newest = self.sets.iter().copied().max().unwrap_or((0, 0));
        let set_fits = |number: u64| number > 0 && (generation, number) > newest;
        let fits = match *ask {
            Ask::Take => true,
            Ask::Retire if !now.pins.is_empty() => return Some(RegisterError::Pinned),
            Ask::Retire => true,
            Ask::Set(None) => generation > 0,
            Ask::Set(Some(number)) => generation > 0 && set_fits(number),
            Ask::Checkpoint(wanted) => generation > 0 && wanted >= border,
            Ask::Commit(number, None) => generation > 0 && set_fits(number) && now.checkpoint.is_none(),
            Ask::Commit(number, Some(wanted)) => generation > 0 && set_fits(number) && wanted >= border,
            Ask::Resize(bytes) => bytes == 4096 || bytes == 1 << 40,
            Ask::Pin => now.checkpoint.is_some_and(|checkpoint| !now.pins.contains(&checkpoint)),
        };
        (!fits).then_some(RegisterError::Invalid)
    }

    fn happen(&mut self, generation: u64, ask: &Ask, command: Command) {
        let mut next = self.now().clone();
        next.version += 1;
        match *ask {
            Ask::Take => next.generation.0 += 1,
            Ask::Retire => {
                next.generation.0 += 1;
                next.state = VolumeState::Deleted;
            }
            Ask::Set(number) => next.set = number.map(|number| set(generation, number)),
            Ask::Checkpoint(border) => next.checkpoint = Some(checkpoint(generation, border, border)),
            Ask::Commit(number, border) => {
                next.set = Some(set(generation, number));
                next.checkpoint = border.map(|border| checkpoint(generation, border, border));
            }
            Ask::Resize(bytes) => next.size = bytes,
            Ask::Pin => next.pins.extend(next.checkpoint),
        }
        if let (Ask::Set(Some(number)) | Ask::Commit(number, _), _) = (ask, ()) {
            self.sets.push((generation, *number));
        }
        self.history.push(next);
        self.made_by.push(Some(command));
    }
}

fn command_of(ask: &Ask, generation: u64, version: u64, token: u128) -> Command {
    let wanted = match *ask {
        Ask::Take => RegisterChange::Take,
        Ask::Retire => RegisterChange::Retire,
        Ask::Set(number) => RegisterChange::Set(number.map(|number| set(generation, number))),
        Ask::Checkpoint(border) => RegisterChange::Checkpoint(checkpoint(generation, border, border)),
        Ask::Commit(number, border) => RegisterChange::Commit {
            set: set(generation, number),
            checkpoint: border.map(|border| checkpoint(generation, border, border)),
        },
        Ask::Resize(bytes) => RegisterChange::Resize(bytes),
        Ask::Pin => {
            let (volume, generation, token) = (VOLUME, Generation(generation), ChangeToken(token));
            return Command::PinCheckpoint { volume, generation, version, token };
        }
    };
    change(generation, version, token, wanted)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn the_register_does_what_its_whole_history_demands(steps in prop::collection::vec(any_step(), 1..60)) {
        let mut state = state_after(&whole_cluster());
        let first = state.volumes[&VOLUME].register().clone();
        let mut model = Model { history: vec![first], made_by: vec![None], sets: vec![] };
        let mut asked: Vec<(Ask, u64, u64, Command)> = vec![];
        for (token, step) in (1u128..).zip(steps) {
            let (ask, generation, version, command) = match step {
                Step::Repeat(_) if asked.is_empty() => continue,
                Step::Repeat(which) => asked[which.index(asked.len())].clone(),
                Step::New { ask, generation_back, version_back } => {
                    let now = model.now();
                    let generation = now.generation.0.saturating_sub(generation_back);
                    let version = now.version.saturating_sub(version_back);
                    let command = command_of(&ask, generation, version, token);
                    asked.push((ask.clone(), generation, version, command.clone()));
                    (ask, generation, version, command)
                }
            };
            let before = state.clone();
            let result = state.apply(&command);
            if model.made_by.last() == Some(&Some(command.clone())) {
                prop_assert_eq!(result, Ok(Outcome::Register(model.now().clone())), "a repeat of the last change");
                prop_assert_eq!(&state, &before);
            } else if let Some(error) = model.refusal(generation, version, &ask) {
                prop_assert_eq!(result, Err(MetaError::Register(error)), "{:?}", command);
                prop_assert_eq!(&state, &before);
            } else {
                model.happen(generation, &ask, command);
                prop_assert_eq!(result, Ok(Outcome::Register(model.now().clone())));
            }
            prop_assert_eq!(state.volumes[&VOLUME].register(), model.now());
            prop_assert_eq!(state.check(), Ok(()));
        }
    }
}

#[test]
fn a_generation_that_gave_its_set_up_is_told_to_be_over_and_one_that_was_only_taken_is_not() {
    let mut state = state_after(&whole_cluster());
    let view = |state: &MetaState| state.volumes[&VOLUME].register_view();
    assert_eq!(view(&state).generation, Generation(0));
    state.apply(&change(0, 0, 1, RegisterChange::Take)).unwrap();
    assert_eq!((view(&state).generation, view(&state).set), (Generation(1), None), "it may be about to register a set");
    state.apply(&change(1, 1, 2, RegisterChange::Commit { set: set(1, 1), checkpoint: None })).unwrap();
    assert_eq!(view(&state).generation, Generation(1));
    state.apply(&change(1, 2, 3, RegisterChange::Set(None))).unwrap();
    assert_eq!((view(&state).generation, view(&state).set), (Generation(2), None), "all of generation 1 is garbage");
    state.apply(&change(1, 3, 4, RegisterChange::Take)).unwrap();
    assert_eq!((view(&state).generation, view(&state).set), (Generation(2), None));
}
