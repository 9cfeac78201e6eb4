//! Who is up: each rule, then any history of beats, changes by hand and lost proposals.

use proptest::prelude::*;
use raft_meta::detector::Options;
use raft_meta::{Beat, Detector, NodeState, Observed, Reason, Verdict};
use std::collections::BTreeMap;
use std::time::Duration;
use xsan_env::Moment;
use xsan_types::NodeId;

const BEAT: Duration = Duration::from_millis(250);

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn good(instance: u64) -> Beat {
    Beat { instance, ..Beat::default() }
}

fn leaving(instance: u64) -> Beat {
    Beat { leaving: true, ..good(instance) }
}

/// A bad one: a request is out for `silent`.
fn disk(silent: Duration) -> Beat {
    Beat { disk_silent_for: silent, ..good(1) }
}

/// It cannot reach the node.
fn cannot_reach(node: u32) -> Beat {
    Beat { unreachable: vec![NodeId(node)], ..good(1) }
}

/// A leader's detector and the metadata that it follows. Nodes count from 1.
struct Room {
    detector: Detector,
    now: Moment,
    nodes: BTreeMap<NodeId, (NodeState, bool)>,
}

impl Room {
    fn new(states: &[NodeState]) -> Self {
        let now = Moment(5_000_000_000);
        let nodes = (1..).map(NodeId).zip(states.iter().map(|state| (*state, true))).collect();
        let mut room = Self { detector: Detector::new(Options::default(), now), now, nodes };
        room.observe();
        room
    }

    fn all_up(count: usize) -> Self {
        Self::new(&vec![NodeState::Up; count])
    }

    fn observe(&mut self) {
        let nodes = self.nodes.iter().map(|(&node, &(state, has_device))| Observed { node, state, has_device });
        self.detector.observe(nodes.collect::<Vec<_>>(), self.now);
    }

    fn set(&mut self, node: u32, state: NodeState) {
        self.nodes.get_mut(&NodeId(node)).unwrap().0 = state;
        self.observe();
    }

    fn state(&self, node: u32) -> NodeState {
        self.nodes[&NodeId(node)].0
    }

    fn wait(&mut self, time: Duration) {
        self.now = self.now.after(time);
    }

    fn heard(&mut self, node: u32, beat: Beat) {
        self.detector.heard(NodeId(node), beat, self.now);
    }

    /// What it would propose.
    fn decide(&mut self) -> Vec<(u32, NodeState)> {
        self.verdicts().iter().map(|verdict| (verdict.node.0, verdict.state)).collect()
    }

    /// Checked: one for a node at most, another state than it has, and the same again when asked again.
    fn verdicts(&mut self) -> Vec<Verdict> {
        let verdicts = self.detector.decide(self.now);
        assert_eq!(self.detector.decide(self.now), verdicts);
        for (at, verdict) in verdicts.iter().enumerate() {
            let (state, has_device) = self.nodes[&verdict.node];
            assert!(verdicts[..at].iter().all(|other| other.node != verdict.node));
            assert_ne!(state, verdict.state);
            assert!(!matches!(state, NodeState::Draining | NodeState::Removed));
            assert!(state != NodeState::Joining || (verdict.state == NodeState::Up && has_device));
        }
        assert!(self.detector.next_at().is_none_or(|at| at > self.now), "what is past was decided");
        verdicts
    }

    /// Proposes what is due; the metadata takes it.
    fn apply(&mut self) {
        for verdict in self.verdicts() {
            self.nodes.get_mut(&verdict.node).unwrap().0 = verdict.state;
        }
        self.observe();
    }

    /// For so long these nodes beat every 250 ms, and what is due is done.
    fn run(&mut self, time: Duration, beats: &[(u32, Beat)]) {
        let end = self.now.after(time);
        while self.now < end {
            self.wait(BEAT.min(end.since(self.now)));
            for (node, beat) in beats {
                self.heard(*node, beat.clone());
            }
            self.apply();
        }
    }

    /// For so long these nodes beat well.
    fn run_good(&mut self, time: Duration, nodes: &[u32]) {
        let beats: Vec<(u32, Beat)> = nodes.iter().map(|node| (*node, good(1))).collect();
        self.run(time, &beats);
    }

    /// How long a node that is down must beat well; it is up then. The others are 1 and 2.
    fn time_to_return(&mut self, node: u32) -> Duration {
        let begun_at = self.now;
        while self.state(node) == NodeState::Down {
            assert!(self.now.since(begun_at) <= millis(120_000));
            self.run_good(BEAT, &[1, 2, node]);
        }
        // The run is counted from its first beat.
        self.now.since(begun_at) - BEAT
    }

    fn silence(&mut self, node: u32) {
        self.run_good(millis(3000), &[1, 2]);
        assert_eq!(self.state(node), NodeState::Down);
    }
}

#[test]
fn a_new_node_is_up_when_it_has_a_device_and_beats_steadily() {
    let mut room = Room::new(&[NodeState::Up, NodeState::Joining]);
    room.nodes.insert(NodeId(2), (NodeState::Joining, false));
    room.observe();
    room.run_good(millis(2000), &[1, 2]);
    assert_eq!(room.state(2), NodeState::Joining);

    let mut room = Room::new(&[NodeState::Up, NodeState::Joining]);
    room.run_good(millis(500), &[1, 2]);
    assert_eq!(room.state(2), NodeState::Joining, "two beats are 250 ms of good beats");
    room.run_good(BEAT, &[1, 2]);
    assert_eq!(room.state(2), NodeState::Up);
}

#[test]
fn a_new_node_that_is_silent_or_leaves_goes_on_joining() {
    let mut room = Room::new(&[NodeState::Up, NodeState::Joining, NodeState::Joining]);
    room.run(millis(5000), &[(1, good(1)), (2, leaving(1))]);
    assert_eq!((room.state(2), room.state(3)), (NodeState::Joining, NodeState::Joining));
}

#[test]
fn a_gap_between_good_beats_begins_the_steady_time_anew() {
    let mut room = Room::new(&[NodeState::Up, NodeState::Joining]);
    room.heard(2, good(1));
    room.wait(millis(1000));
    room.heard(1, good(1));
    room.heard(2, good(1));
    assert_eq!(room.decide(), []);
}

#[test]
fn a_silent_node_is_suspect_after_a_second_and_down_after_three() {
    let mut room = Room::all_up(3);
    room.run_good(millis(500), &[1, 2, 3]);
    room.run_good(millis(999), &[1, 2]);
    assert_eq!(room.state(3), NodeState::Up);
    room.wait(millis(1));
    let verdict =
        Verdict { node: NodeId(3), state: NodeState::Suspect, reason: Reason::Silent(Duration::from_secs(1)) };
    assert_eq!(room.verdicts(), [verdict]);
    room.run_good(millis(1999), &[1, 2]);
    assert_eq!(room.state(3), NodeState::Suspect);
    room.wait(millis(1));
    let verdict = Verdict { state: NodeState::Down, reason: Reason::Silent(Duration::from_secs(3)), ..verdict };
    assert_eq!(room.verdicts(), [verdict]);
}

#[test]
fn a_leader_that_was_not_asked_for_long_skips_suspect() {
    let mut room = Room::all_up(2);
    room.wait(millis(3000));
    room.heard(1, good(1));
    assert_eq!(room.decide(), [(2, NodeState::Down)]);
}

#[test]
fn a_suspect_is_up_at_its_next_good_beat_and_not_before() {
    let mut room = Room::all_up(3);
    room.run_good(millis(1500), &[1, 2]);
    assert_eq!(room.state(3), NodeState::Suspect);
    room.heard(3, disk(millis(1500)));
    assert_eq!(room.decide(), []);
    room.heard(3, good(1));
    assert_eq!(room.decide(), [(3, NodeState::Up)]);
}

#[test]
fn a_disk_that_does_not_answer_is_as_if_nothing_were_heard() {
    let mut room = Room::all_up(3);
    room.run(millis(3000), &[(1, good(1)), (2, good(1)), (3, disk(millis(1000)))]);
    assert_eq!(room.state(3), NodeState::Up, "a second is not too long");
    let beats = [(1, good(1)), (2, good(1)), (3, disk(millis(1001)))];
    room.run(millis(1000), &beats);
    assert_eq!(room.state(3), NodeState::Suspect);
    room.run(millis(1750), &beats);
    room.wait(millis(250));
    room.heard(3, disk(millis(4000)));
    room.heard(1, good(1));
    room.heard(2, good(1));
    let reason = Reason::Disk(Duration::from_secs(4));
    assert_eq!(room.verdicts(), [Verdict { node: NodeId(3), state: NodeState::Down, reason }]);
    // A disk that is slow now and then: none of its good times is steady.
    room.apply();
    for _ in 0..20 {
        room.run_good(millis(500), &[1, 2, 3]);
        room.heard(3, disk(millis(1500)));
        assert_eq!(room.state(3), NodeState::Down);
    }
}

#[test]
fn a_node_returns_at_once_the_first_time_and_later_each_further_time() {
    let mut room = Room::all_up(3);
    room.run_good(millis(1000), &[1, 2, 3]);
    for expected in [500, 1000, 2000, 4000, 8000, 16_000, 32_000, 60_000, 60_000] {
        room.silence(3);
        assert_eq!(room.time_to_return(3), millis(expected));
    }
    // Ten minutes later all is forgiven.
    room.run_good(millis(600_000), &[1, 2, 3]);
    room.silence(3);
    assert_eq!(room.time_to_return(3), millis(500));
}

#[test]
fn a_beat_missed_while_waiting_to_return_begins_the_wait_anew() {
    let mut room = Room::all_up(3);
    room.silence(3);
    room.time_to_return(3);
    room.silence(3);
    room.run_good(millis(1000), &[1, 2, 3]);
    room.run_good(millis(1000), &[1, 2]);
    assert_eq!(room.time_to_return(3), millis(1000));
}

#[test]
fn a_node_that_leaves_is_down_at_once_until_another_process_of_it_is_heard() {
    let mut room = Room::all_up(3);
    room.run_good(millis(500), &[1, 2, 3]);
    room.heard(3, leaving(1));
    let verdict = Verdict { node: NodeId(3), state: NodeState::Down, reason: Reason::Left };
    assert_eq!(room.verdicts(), [verdict]);
    room.apply();
    // A beat that was sent before comes late.
    room.run_good(millis(5000), &[1, 2, 3]);
    assert_eq!(room.state(3), NodeState::Down);
    let beats = [(1, good(1)), (2, good(1)), (3, good(2))];
    room.run(millis(750), &beats);
    assert_eq!(room.state(3), NodeState::Up);
    // The last word of the old process comes after its successor's first.
    room.heard(3, leaving(1));
    assert_eq!(room.decide(), []);
}

#[test]
fn all_may_leave_in_order() {
    let mut room = Room::all_up(3);
    room.run(millis(250), &[(1, good(1)), (2, leaving(1)), (3, leaving(1))]);
    assert_eq!((room.state(2), room.state(3)), (NodeState::Down, NodeState::Down));
}

#[test]
fn a_restarted_process_is_no_flap() {
    let mut room = Room::all_up(3);
    for instance in 1..40 {
        room.run(millis(500), &[(1, good(1)), (2, good(1)), (3, good(instance))]);
        assert_eq!(room.state(3), NodeState::Up);
    }
    room.silence(3);
    assert_eq!(room.time_to_return(3), millis(500));
}

#[test]
fn every_process_is_steady_of_its_own() {
    let mut room = Room::new(&[NodeState::Up, NodeState::Up, NodeState::Down]);
    for instance in 1..20 {
        room.run(millis(500), &[(1, good(1)), (2, good(1)), (3, good(instance))]);
        assert_eq!(room.state(3), NodeState::Down, "it ends twice a second");
    }
}

#[test]
fn nodes_that_are_emptied_or_removed_are_left_alone() {
    for state in [NodeState::Draining, NodeState::Removed] {
        let mut room = Room::new(&[NodeState::Up, NodeState::Up, state]);
        room.run_good(millis(2000), &[1, 2, 3]);
        room.run(millis(500), &[(1, good(1)), (2, good(1)), (3, leaving(1))]);
        room.run_good(millis(5000), &[1, 2]);
        assert_eq!(room.state(3), state);
    }
}

#[test]
fn a_node_that_most_others_cannot_reach_is_as_if_nothing_were_heard() {
    let mut room = Room::all_up(5);
    room.run_good(millis(500), &[1, 2, 3, 4, 5]);
    let mut beats: Vec<(u32, Beat)> = vec![(1, good(1)), (2, good(1)), (3, cannot_reach(5)), (4, cannot_reach(5))];
    beats.push((5, good(1)));
    room.run(millis(5000), &beats);
    assert_eq!(room.state(5), NodeState::Up, "two of four are not most");
    beats[0].1 = cannot_reach(5);
    room.run(millis(2999), &beats);
    assert_eq!(room.state(5), NodeState::Suspect);
    room.wait(millis(1));
    let reason = Reason::Unreachable { by: 3, of: 4 };
    assert_eq!(room.verdicts(), [Verdict { node: NodeId(5), state: NodeState::Down, reason }]);
    room.apply();
    room.run_good(millis(750), &[1, 2, 3, 4, 5]);
    assert_eq!(room.state(5), NodeState::Up);
}

#[test]
fn one_node_of_four_alone_calls_nobody_unreachable_and_one_of_two_does() {
    let mut room = Room::all_up(4);
    room.run(millis(5000), &[(1, good(1)), (2, good(1)), (3, cannot_reach(4)), (4, good(1))]);
    assert_eq!(room.state(4), NodeState::Up);
    let mut room = Room::all_up(2);
    room.run(millis(5000), &[(1, cannot_reach(2)), (2, good(1))]);
    assert_eq!(room.state(2), NodeState::Down, "the leader's own report counts");
}

#[test]
fn old_reports_and_those_of_nodes_that_are_not_up_do_not_count() {
    // They say it once and fall silent; the metadata is not told that they did.
    let mut room = Room::all_up(3);
    room.heard(1, cannot_reach(3));
    room.heard(2, cannot_reach(3));
    room.wait(millis(999));
    room.heard(3, good(1));
    room.wait(millis(1));
    assert!(room.decide().contains(&(3, NodeState::Suspect)));
    room.heard(3, good(1));
    assert!(!room.decide().contains(&(3, NodeState::Suspect)));

    let mut room = Room::new(&[NodeState::Up, NodeState::Draining, NodeState::Joining, NodeState::Up]);
    room.nodes.insert(NodeId(3), (NodeState::Joining, false));
    room.observe();
    room.run(millis(5000), &[(1, good(1)), (2, cannot_reach(4)), (3, cannot_reach(4)), (4, good(1))]);
    assert_eq!(room.state(4), NodeState::Up);
}

#[test]
fn a_new_leader_gives_everybody_the_full_time() {
    let mut room = Room::new(&[NodeState::Up, NodeState::Up, NodeState::Up, NodeState::Suspect, NodeState::Down]);
    assert_eq!(room.decide(), [], "a suspect is not up because nothing was heard of it yet");
    room.run_good(millis(999), &[1, 2]);
    assert_eq!((room.state(3), room.state(4)), (NodeState::Up, NodeState::Suspect));
    room.run_good(millis(2000), &[1, 2, 5]);
    assert_eq!((room.state(3), room.state(4)), (NodeState::Suspect, NodeState::Suspect));
    room.run_good(millis(1), &[1, 2, 5]);
    assert_eq!((room.state(3), room.state(4)), (NodeState::Down, NodeState::Down));
    assert_eq!(room.state(5), NodeState::Up);
}

#[test]
fn a_node_that_returns_has_its_time_from_its_last_beat() {
    let mut room = Room::all_up(3);
    room.silence(3);
    room.run_good(millis(500), &[1, 2, 3]);
    room.wait(millis(250));
    room.heard(3, good(1));
    room.wait(millis(900));
    room.apply();
    assert_eq!(room.state(3), NodeState::Up);
    room.run_good(millis(2099), &[1, 2]);
    assert_eq!(room.state(3), NodeState::Suspect);
    room.run_good(millis(1), &[1, 2]);
    assert_eq!(room.state(3), NodeState::Down);
}

#[test]
fn what_is_set_by_hand_has_the_full_time_too() {
    let mut room = Room::all_up(3);
    room.silence(3);
    room.set(3, NodeState::Up);
    room.run_good(millis(2999), &[1, 2]);
    assert_eq!(room.state(3), NodeState::Suspect);
    room.run_good(millis(1), &[1, 2]);
    assert_eq!(room.state(3), NodeState::Down);

    let mut room = Room::all_up(3);
    room.run_good(millis(2000), &[1, 2, 3]);
    room.set(3, NodeState::Down);
    assert_eq!(room.time_to_return(3), millis(500));
}

#[test]
fn a_leader_that_hears_nobody_calls_no_majority_down() {
    for (count, most) in [(2_u32, 1), (3, 1), (4, 2), (5, 2), (6, 3), (7, 3)] {
        let mut room = Room::all_up(usize::try_from(count).unwrap());
        let all: Vec<u32> = (1..=count).collect();
        room.run_good(millis(1000), &all);
        room.run_good(millis(60_000), &[1]);
        let down = all.iter().filter(|node| room.state(**node) == NodeState::Down).count();
        assert_eq!(down, most, "of {count}");
        assert!(all[1..].iter().all(|node| room.state(*node) != NodeState::Up));
    }
    // Who is removed is not one of them, and who left in order is not silent.
    let mut room = Room::all_up(6);
    (4..=6).for_each(|node| room.set(node, NodeState::Removed));
    room.run_good(millis(10_000), &[1]);
    assert_eq!((room.state(2), room.state(3)), (NodeState::Down, NodeState::Suspect));
    let mut room = Room::all_up(4);
    room.run(millis(250), &[(1, good(1)), (2, good(1)), (3, leaving(1)), (4, leaving(1))]);
    room.run_good(millis(10_000), &[1]);
    assert_eq!(room.state(2), NodeState::Down);
    // Nor is who is down and beats: these two begin anew all the time.
    let mut room = Room::new(&[NodeState::Up, NodeState::Up, NodeState::Up, NodeState::Down, NodeState::Down]);
    for instance in 0..7 {
        room.run(millis(500), &[(1, good(1)), (2, good(1)), (4, good(instance)), (5, good(instance))]);
    }
    assert_eq!([3, 4, 5].map(|node| room.state(node)), [NodeState::Down; 3]);
    // Half of them is heard: the leader is not cut off, and believes what it does not hear.
    let mut room = Room::all_up(6);
    room.set(6, NodeState::Down);
    room.run_good(millis(3000), &[1, 2, 3]);
    assert_eq!(room.decide(), []);
    assert_eq!((4..=6).filter(|node| room.state(*node) == NodeState::Down).count(), 3);
    // What nodes say themselves is no silence.
    let mut room = Room::all_up(4);
    let bad = || disk(millis(5000));
    room.run(millis(3000), &[(1, good(1)), (2, bad()), (3, bad()), (4, bad())]);
    assert_eq!((2..=4).filter(|node| room.state(*node) == NodeState::Down).count(), 3);
}

#[test]
fn those_silent_longest_are_called_down_first() {
    let mut room = Room::all_up(4);
    room.run_good(millis(500), &[1, 2, 3, 4]);
    room.run_good(millis(250), &[1, 2]);
    room.wait(millis(4000));
    room.heard(1, good(1));
    assert_eq!(room.decide(), [(2, NodeState::Suspect), (3, NodeState::Down), (4, NodeState::Down)]);
}

#[test]
fn two_processes_that_speak_in_turn_are_clones() {
    let mut room = Room::all_up(2);
    for instance in [1, 2, 3, 3] {
        room.run(BEAT, &[(1, good(1)), (2, good(instance))]);
    }
    assert_eq!(room.detector.clones(), []);
    room.run(BEAT, &[(1, good(1)), (2, good(2))]);
    assert_eq!(room.detector.clones(), [NodeId(2)]);
    room.run(millis(10_001), &[(1, good(1)), (2, good(2))]);
    assert_eq!(room.detector.clones(), []);
    // Nor is a number that comes again after a long time.
    room.run(BEAT, &[(1, good(1)), (2, good(3))]);
    room.run(BEAT, &[(1, good(1)), (2, good(2))]);
    assert_eq!(room.detector.clones(), [NodeId(2)]);
    room.run(millis(10_250), &[(1, good(1)), (2, good(2))]);
    room.run(BEAT, &[(1, good(1)), (2, good(3))]);
    assert_eq!(room.detector.clones(), []);
}

#[test]
fn strangers_are_not_kept_and_do_not_count() {
    let mut room = Room::all_up(3);
    for node in 100..200 {
        room.heard(node, cannot_reach(3));
    }
    // Of a list that is longer than the cluster only as much is read.
    let strangers = (100..200).chain([3]).map(NodeId).collect();
    let many = Beat { unreachable: strangers, ..good(1) };
    room.run(millis(5000), &[(1, many.clone()), (2, many.clone()), (3, good(1))]);
    room.heard(1, many);
    assert_eq!(room.state(3), NodeState::Up);
    let text = format!("{:?}", room.detector);
    assert!((100..200).all(|node| !text.contains(&format!("NodeId({node})"))), "{text}");
    // Who goes and comes again is unknown again.
    room.heard(1, cannot_reach(3));
    room.nodes.remove(&NodeId(3));
    room.observe();
    assert!(!format!("{:?}", room.detector).contains("NodeId(3)"));
    assert_eq!(room.decide(), []);
    room.nodes.insert(NodeId(3), (NodeState::Joining, true));
    room.observe();
    assert_eq!(room.decide(), []);
}

#[test]
fn the_clock_never_runs_backwards() {
    let mut room = Room::all_up(2);
    room.run_good(millis(1000), &[1, 2]);
    room.detector.heard(NodeId(2), good(1), Moment(0));
    assert_eq!(room.detector.decide(Moment(0)), []);
    assert!(room.detector.next_at().unwrap() > room.now);
}

#[test]
fn a_time_that_passes_while_others_are_heard_is_due_still() {
    let mut room = Room::all_up(2);
    room.run_good(BEAT, &[1, 2]);
    let at = room.detector.next_at().unwrap();
    assert_eq!(at, room.now.after(millis(1000)));
    room.wait(millis(1200));
    room.heard(1, good(1));
    assert_eq!(room.detector.next_at(), Some(at));
    assert_eq!(room.decide(), [(2, NodeState::Suspect)]);
    assert_eq!(
        room.detector.next_at(),
        Some(room.now.after(millis(1000))),
        "the other one's, which was heard just now"
    );
}

#[test]
fn reasons_are_for_people() {
    let texts = [
        (Reason::Silent(millis(3001)), "nothing heard for 3 s"),
        (Reason::Disk(millis(4000)), "its disk has not answered for 4 s"),
        (Reason::Unreachable { by: 3, of: 4 }, "3 of 4 other nodes cannot reach it"),
        (Reason::Left, "it left in order"),
        (Reason::HeardAgain, "heard again"),
        (Reason::Joined, "it has joined"),
    ];
    for (reason, text) in texts {
        assert_eq!(reason.to_string(), text);
    }
}

/// What may happen to a room.
#[derive(Clone, Debug)]
enum Event {
    Wait(u64),
    /// All beat well for so many rounds, but those of the mask.
    Rounds(u8, u8),
    Beat {
        node: u32,
        beat: Beat,
    },
    /// The metadata takes what is proposed to it: some of it.
    Apply(u8),
    Hand(u32, NodeState),
    Device(u32, bool),
    /// It is taken out of the cluster and comes again as a new one.
    Again(u32),
}

fn beats() -> impl Strategy<Value = Beat> {
    let leaving = prop::bool::weighted(0.1);
    (0..3_u64, 0..3000_u64, prop::collection::vec((0..9_u32).prop_map(NodeId), 0..12), leaving).prop_map(
        |(instance, silent, unreachable, leaving)| Beat {
            instance,
            disk_silent_for: millis(silent.saturating_sub(1500)),
            unreachable,
            leaving,
        },
    )
}

fn events() -> impl Strategy<Value = Event> {
    let states = [NodeState::Up, NodeState::Suspect, NodeState::Down, NodeState::Draining];
    prop_oneof![
        4 => (0..1500_u64).prop_map(Event::Wait),
        4 => (1..20_u8, any::<u8>()).prop_map(|(rounds, mask)| Event::Rounds(rounds, mask)),
        8 => (1..8_u32, beats()).prop_map(|(node, beat)| Event::Beat { node, beat }),
        6 => any::<u8>().prop_map(Event::Apply),
        1 => (1..8_u32, prop::sample::select(states.to_vec())).prop_map(|(node, state)| Event::Hand(node, state)),
        1 => (1..8_u32, any::<bool>()).prop_map(|(node, has)| Event::Device(node, has)),
        1 => (1..8_u32).prop_map(Event::Again),
    ]
}

impl Room {
    fn take(&mut self, event: Event) {
        let is_in = |mask: u8, node: u32| mask >> (node % 8) & 1 == 1;
        match event {
            Event::Wait(time) => self.wait(millis(time)),
            Event::Rounds(rounds, mask) => {
                let nodes: Vec<u32> = self.nodes.keys().map(|node| node.0).filter(|node| !is_in(mask, *node)).collect();
                self.run_good(BEAT * u32::from(rounds), &nodes);
            }
            Event::Beat { node, beat } => self.heard(node, beat),
            Event::Apply(mask) => {
                for verdict in self.verdicts().iter().filter(|verdict| is_in(mask, verdict.node.0)) {
                    self.nodes.get_mut(&verdict.node).unwrap().0 = verdict.state;
                }
                self.observe();
            }
            Event::Hand(node, state) if self.nodes.contains_key(&NodeId(node)) => self.set(node, state),
            Event::Device(node, has) if self.nodes.contains_key(&NodeId(node)) => {
                self.nodes.get_mut(&NodeId(node)).unwrap().1 = has;
                self.observe();
            }
            Event::Again(node) if self.nodes.remove(&NodeId(node)).is_some() => {
                self.observe();
                self.nodes.insert(NodeId(node), (NodeState::Joining, true));
                self.observe();
            }
            Event::Hand(..) | Event::Device(..) | Event::Again(_) => {}
        }
    }

    /// Until `next_at` the passing of time changes nothing.
    fn check_quiet(&mut self, share: u64) {
        let decided = self.decide();
        let end = self.detector.next_at().map_or(self.now.after(millis(200_000)), |at| Moment(at.0 - 1));
        let mut later = self.detector.clone();
        let at = Moment(self.now.0 + (end.0 - self.now.0) / 4 * (share % 5));
        for at in [at, end] {
            let then: Vec<_> = later.decide(at).iter().map(|verdict| (verdict.node.0, verdict.state)).collect();
            assert_eq!(then, decided);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn after_any_history_the_steady_come_up_and_the_silent_go_down(
        count in 1..8_usize,
        history in prop::collection::vec(events(), 0..120),
        silent in any::<u8>(),
    ) {
        let mut room = Room::all_up(count);
        for (at, event) in (0_u64..).zip(history) {
            room.take(event);
            room.check_quiet(at);
        }
        for node in room.nodes.values_mut() {
            node.1 = true;
        }
        room.observe();
        // Half of them beat at least: a leader that hears fewer believes itself cut off.
        let all: Vec<u32> = room.nodes.keys().map(|node| node.0).collect();
        let lost: Vec<u32> = all.iter().copied().filter(|node| silent >> node & 1 == 1).take(count / 2).collect();
        let steady: Vec<u32> = all.iter().copied().filter(|node| !lost.contains(node)).collect();
        let beats: Vec<(u32, Beat)> = steady.iter().map(|node| (*node, good(9))).collect();
        // A report of a node that is silent now counts for a second more.
        room.run(millis(1000), &beats);
        room.run(millis(2000), &beats);
        for node in &lost {
            prop_assert!(!matches!(room.state(*node), NodeState::Up | NodeState::Suspect));
        }
        room.run(millis(120_000), &beats);
        for node in &steady {
            prop_assert!(matches!(room.state(*node), NodeState::Up | NodeState::Draining));
        }
        room.check_quiet(1);
    }
}
