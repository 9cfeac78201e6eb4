//! Who is up: the leader's opinion of every node, from what the nodes say of themselves and of each other. Pure: beats, the
//! metadata as it is, and the time come in; the changes to propose come out. Nothing is kept of what was proposed: a verdict
//! follows from what was heard and from the state in the metadata, so that it is said again until the metadata has it.
//!
//! A beat is *good* when its node's disks answer, it is not leaving, and the others reach it. It is judged once, as it comes.
//! Everything else is a question of how old the newest good one is.
//!
//! Nodes that are being emptied or were removed are left alone. Of one that falls silent while it is emptied nothing is said for
//! now: placement does not use it anyway, and who empties it waits for it to be done.

use crate::state::NodeState;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;
use xsan_env::Moment;
use xsan_types::NodeId;

/// Two processes of one node that speak in turn within this time are clones.
pub const CLONES_WITHIN: Duration = Duration::from_secs(10);

/// Most times of going down that are remembered of a node; the wait has long reached its maximum by then.
const DOWNS_MAX: usize = 64;

/// What a node says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Beat {
    /// The process, another number at each start.
    pub instance: u64,
    /// How long its oldest disk request is out.
    pub disk_silent_for: Duration,
    /// The nodes that it cannot reach.
    pub unreachable: Vec<NodeId>,
    /// It is about to end, in order.
    pub leaving: bool,
}

/// How patient the detector is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Without a good beat for so long: suspect. Reports of other nodes count for as long.
    pub suspect_after: Duration,
    /// Without a good beat for so long: down.
    pub down_after: Duration,
    /// A beat is good while no disk request is out for longer.
    pub disk_silent_max: Duration,
    /// Good beats for so long make a node up that joins, or was down once.
    pub steady_for: Duration,
    /// What a node needs instead when it was down twice; doubled each time.
    pub back_off_min: Duration,
    /// The most that it is doubled to.
    pub back_off_max: Duration,
    /// For how long its going down is held against a node.
    pub flaps_within: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            suspect_after: Duration::from_secs(1),
            down_after: Duration::from_secs(3),
            disk_silent_max: Duration::from_secs(1),
            steady_for: Duration::from_millis(500),
            back_off_min: Duration::from_secs(1),
            back_off_max: Duration::from_secs(60),
            flaps_within: Duration::from_secs(600),
        }
    }
}

/// A node as the metadata has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observed {
    /// Which.
    pub node: NodeId,
    /// Its state.
    pub state: NodeState,
    /// Whether a device of it is known.
    pub has_device: bool,
}

/// A change to propose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Of which node.
    pub node: NodeId,
    /// What its state should be.
    pub state: NodeState,
    /// Why.
    pub reason: Reason,
}

/// Why a state should change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// No beat of any kind.
    Silent(Duration),
    /// Its beats say that a disk request is out for too long.
    Disk(Duration),
    /// Its beats arrive, and most others do not reach it.
    Unreachable {
        /// How many say so.
        by: usize,
        /// How many could.
        of: usize,
    },
    /// It said that it leaves.
    Left,
    /// Its beats are good again.
    HeardAgain,
    /// A new node is heard and has a device.
    Joined,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Silent(time) => write!(f, "nothing heard for {} s", time.as_secs()),
            Self::Disk(time) => write!(f, "its disk has not answered for {} s", time.as_secs()),
            Self::Unreachable { by, of } => write!(f, "{by} of {of} other nodes cannot reach it"),
            Self::Left => f.write_str("it left in order"),
            Self::HeardAgain => f.write_str("heard again"),
            Self::Joined => f.write_str("it has joined"),
        }
    }
}

/// What was made of a beat as it came.
#[derive(Clone, Copy, Debug)]
enum Judged {
    Good,
    Disk(Duration),
    Unreachable { by: usize, of: usize },
    Left,
}

/// What is known of a process.
#[derive(Clone, Copy, Debug)]
struct Process {
    instance: u64,
    heard_at: Moment,
}

/// What is known of a node.
#[derive(Clone, Debug)]
struct Watch {
    state: NodeState,
    has_device: bool,
    /// Its time runs from here, if no good beat is younger.
    begun_at: Moment,
    /// The process of the newest beat.
    process: Option<Process>,
    /// The process before that one.
    former: Option<Process>,
    /// When two processes were last found to speak in turn.
    cloned_at: Option<Moment>,
    /// The process that said that it leaves, until another one is heard.
    left: Option<u64>,
    /// What was made of the newest beat.
    newest: Judged,
    good_at: Option<Moment>,
    /// The first beat of those that were all good, of one process and without a gap.
    steady_since: Option<Moment>,
    /// What it cannot reach, by its newest beat.
    unreachable: BTreeSet<NodeId>,
    /// When it went down, oldest first.
    downs: Vec<Moment>,
}

impl Watch {
    fn new(state: NodeState, now: Moment) -> Self {
        Self {
            state,
            has_device: false,
            begun_at: now,
            process: None,
            former: None,
            cloned_at: None,
            left: None,
            newest: Judged::Good,
            good_at: None,
            steady_since: None,
            unreachable: BTreeSet::new(),
            downs: Vec::new(),
        }
    }

    /// The metadata has this state now, by whomever it was made.
    fn enter(&mut self, state: NodeState, now: Moment, options: &Options) {
        let served = matches!(self.state, NodeState::Up | NodeState::Suspect);
        if state == NodeState::Down && self.state != state {
            if self.downs.len() == DOWNS_MAX {
                self.downs.remove(0);
            }
            self.downs.push(now);
            // Somebody may have called a node down that beats: it is steady from now on at the earliest.
            self.steady_since = None;
        }
        // Or up one that does not: it has the full time. One that was called up for its beats has it from the newest of them.
        let serves = matches!(state, NodeState::Up | NodeState::Suspect);
        if serves && !served && !self.is_good(now, options.suspect_after) {
            self.begun_at = now;
        }
        self.state = state;
    }

    /// Notes which process speaks. `false`: it is not the node's any more, and its beat says nothing about the node.
    fn meet(&mut self, beat: &Beat, now: Moment) -> bool {
        let speaks = Process { instance: beat.instance, heard_at: now };
        if self.process.is_none_or(|process| process.instance != beat.instance) {
            let returns =
                |former: Process| former.instance == beat.instance && now.since(former.heard_at) <= CLONES_WITHIN;
            if self.former.is_some_and(returns) {
                self.cloned_at = Some(now);
                // A process that ends after its successor was heard does not take the successor with it.
                if beat.leaving {
                    return false;
                }
            }
            self.former = self.process;
            // Every process must be steady of its own, or one that ends again and again would be.
            self.steady_since = None;
        }
        self.process = Some(speaks);
        if beat.leaving {
            self.left = Some(beat.instance);
        } else if self.left != Some(beat.instance) {
            self.left = None;
        }
        true
    }

    fn judge(&mut self, judged: Judged, now: Moment, suspect_after: Duration) {
        self.newest = judged;
        if !matches!(judged, Judged::Good) {
            self.steady_since = None;
            return;
        }
        if !self.is_good(now, suspect_after) {
            self.steady_since = None;
        }
        self.steady_since.get_or_insert(now);
        self.good_at = Some(now);
    }

    fn has_left(&self) -> bool {
        self.left.is_some()
    }

    fn is_heard(&self, now: Moment, within: Duration) -> bool {
        self.process.is_some_and(|process| now.since(process.heard_at) < within)
    }

    fn is_good(&self, now: Moment, within: Duration) -> bool {
        self.good_at.is_some_and(|at| now.since(at) < within)
    }

    fn quiet_since(&self) -> Moment {
        self.good_at.map_or(self.begun_at, |at| at.max(self.begun_at))
    }

    /// The state that the node should have instead.
    fn due(&self, now: Moment, options: &Options) -> Option<(NodeState, Reason)> {
        let is_good = self.is_good(now, options.suspect_after);
        match self.state {
            NodeState::Joining if self.has_device && is_good && self.steady_for() >= Some(options.steady_for) => {
                Some((NodeState::Up, Reason::Joined))
            }
            NodeState::Up | NodeState::Suspect if self.has_left() => Some((NodeState::Down, Reason::Left)),
            NodeState::Up | NodeState::Suspect => {
                let quiet = now.since(self.quiet_since());
                if quiet >= options.down_after {
                    Some((NodeState::Down, self.why_quiet(now, options)))
                } else if self.state == NodeState::Up && quiet >= options.suspect_after {
                    Some((NodeState::Suspect, self.why_quiet(now, options)))
                } else if self.state == NodeState::Suspect && is_good && matches!(self.newest, Judged::Good) {
                    Some((NodeState::Up, Reason::HeardAgain))
                } else {
                    None
                }
            }
            NodeState::Down if is_good && self.steady_for() >= Some(self.steady_needed(options)) => {
                Some((NodeState::Up, Reason::HeardAgain))
            }
            NodeState::Joining | NodeState::Down | NodeState::Draining | NodeState::Removed => None,
        }
    }

    /// For how long its beats were good, up to the newest one: time alone makes nobody steady.
    fn steady_for(&self) -> Option<Duration> {
        Some(self.good_at?.since(self.steady_since?))
    }

    /// How long a node that is down must be steady. Judged at its newest beat, so that no verdict comes of the mere passing of
    /// time.
    fn steady_needed(&self, options: &Options) -> Duration {
        let at = self.good_at.unwrap_or(self.begun_at);
        let flaps = self.downs.iter().filter(|down| at.since(**down) < options.flaps_within).count().saturating_sub(1);
        match u32::try_from(flaps).unwrap_or(u32::MAX) {
            0 => options.steady_for,
            flaps => options.back_off_min.saturating_mul(1 << (flaps - 1).min(31)).min(options.back_off_max),
        }
    }

    fn why_quiet(&self, now: Moment, options: &Options) -> Reason {
        let heard_at = self.process.map_or(self.begun_at, |process| process.heard_at);
        let age = now.since(heard_at);
        match self.newest {
            Judged::Disk(silent) if age < options.suspect_after => Reason::Disk(silent.saturating_add(age)),
            Judged::Unreachable { by, of } if age < options.suspect_after => Reason::Unreachable { by, of },
            _ => Reason::Silent(age),
        }
    }
}

/// The opinion of one leader; another leader begins with a new one.
#[derive(Clone, Debug)]
pub struct Detector {
    options: Options,
    /// The newest time it was told.
    now: Moment,
    /// When it was last asked.
    decided_at: Moment,
    /// The nodes of the metadata that are not removed, and no others: this bounds the memory.
    nodes: BTreeMap<NodeId, Watch>,
}

impl Detector {
    /// A leader begins: it has heard nobody yet, and everybody has the full time.
    #[must_use]
    pub fn new(options: Options, now: Moment) -> Self {
        Self { options, now, decided_at: now, nodes: BTreeMap::new() }
    }

    /// All nodes of the metadata, as they are now. What is not among them is forgotten.
    pub fn observe(&mut self, nodes: impl IntoIterator<Item = Observed>, now: Moment) {
        let now = self.advance(now);
        let mut before = std::mem::take(&mut self.nodes);
        for seen in nodes.into_iter().filter(|seen| seen.state != NodeState::Removed) {
            let mut watch = before.remove(&seen.node).unwrap_or_else(|| Watch::new(seen.state, now));
            watch.enter(seen.state, now, &self.options);
            watch.has_device = seen.has_device;
            self.nodes.insert(seen.node, watch);
        }
        let known: BTreeSet<NodeId> = self.nodes.keys().copied().collect();
        for watch in self.nodes.values_mut() {
            watch.unreachable.retain(|node| known.contains(node));
        }
    }

    /// A beat came. Those of unknown nodes are ignored. The node that asks feeds its own beats like all others: it always
    /// hears itself, and what it cannot reach counts.
    pub fn heard(&mut self, from: NodeId, beat: Beat, now: Moment) {
        let now = self.advance(now);
        let others = beat.unreachable.iter().take(self.nodes.len());
        let unreachable = others.copied().filter(|node| self.nodes.contains_key(node)).collect();
        let (by, of) = self.reports_about(from, now);
        let Options { suspect_after, disk_silent_max, .. } = self.options;
        let Some(watch) = self.nodes.get_mut(&from) else { return };
        if !watch.meet(&beat, now) {
            return;
        }
        watch.unreachable = unreachable;
        let judged = if watch.has_left() {
            Judged::Left
        } else if beat.disk_silent_for > disk_silent_max {
            Judged::Disk(beat.disk_silent_for)
        } else if by * 2 > of {
            Judged::Unreachable { by, of }
        } else {
            Judged::Good
        };
        watch.judge(judged, now, suspect_after);
    }

    /// The changes to propose now, one at most for each node; the same ones again while the metadata does not have them.
    pub fn decide(&mut self, now: Moment) -> Vec<Verdict> {
        let now = self.advance(now);
        self.decided_at = now;
        let believed = self.believed_silent(now);
        let verdicts = self.nodes.iter().filter_map(|(&node, watch)| {
            let (state, reason) = watch.due(now, &self.options)?;
            if !is_silence(state, reason) || believed.contains(&node) {
                return Some(Verdict { node, state, reason });
            }
            (watch.state == NodeState::Up).then_some(Verdict { node, state: NodeState::Suspect, reason })
        });
        verdicts.collect()
    }

    /// When [`Self::decide`] can have something new though nothing is heard and the metadata stays as it is: after the time it was
    /// asked last. A time that has passed meanwhile is due still.
    #[must_use]
    pub fn next_at(&self) -> Option<Moment> {
        let options = &self.options;
        let times = self.nodes.values().flat_map(|watch| {
            let judged = matches!(watch.state, NodeState::Up | NodeState::Suspect).then(|| watch.quiet_since());
            [
                judged.map(|since| since.after(options.suspect_after)),
                judged.map(|since| since.after(options.down_after)),
                // Who is heard no more, whatever its state, counts for the choice of those that silence is believed of.
                watch.process.map(|process| process.heard_at.after(options.suspect_after)),
            ]
        });
        times.flatten().filter(|at| *at > self.decided_at).min()
    }

    /// The nodes of which two processes spoke in turn of late: somebody copied a node's directory.
    #[must_use]
    pub fn clones(&self) -> Vec<NodeId> {
        let is_recent = |at: Moment| self.now.since(at) <= CLONES_WITHIN;
        self.nodes.iter().filter(|(_, watch)| watch.cloned_at.is_some_and(is_recent)).map(|(&node, _)| node).collect()
    }

    /// Time does not run backwards, whatever the caller says.
    fn advance(&mut self, now: Moment) -> Moment {
        self.now = self.now.max(now);
        self.now
    }

    /// How many of the other nodes that are up say that they cannot reach `node`, and how many there are. Only what was said of
    /// late counts. With three others more than half is two: one node alone calls nobody unreachable there.
    fn reports_about(&self, node: NodeId, now: Moment) -> (usize, usize) {
        let others = || self.nodes.iter().filter(|(id, watch)| **id != node && watch.state == NodeState::Up);
        let reports =
            |watch: &Watch| watch.is_heard(now, self.options.suspect_after) && watch.unreachable.contains(&node);
        (others().filter(|(_, watch)| reports(watch)).count(), others().count())
    }

    /// The nodes that may be called down because nothing is heard of them.
    ///
    /// A leader that hears fewer than half of the nodes is probably cut off itself: check-quorum ends its lead soon, and until
    /// then it must not call the rest of the cluster down. So at most half of all may be down for silence, those that are silent
    /// longest; a leader that hears half is not hindered by that.
    fn believed_silent(&self, now: Moment) -> BTreeSet<NodeId> {
        let is_lost = |watch: &Watch| {
            watch.state == NodeState::Down && !watch.has_left() && !watch.is_heard(now, self.options.suspect_after)
        };
        let lost = self.nodes.values().filter(|watch| is_lost(watch)).count();
        let due =
            |watch: &Watch| watch.due(now, &self.options).is_some_and(|(state, reason)| is_silence(state, reason));
        let silent = self.nodes.iter().filter(|(_, watch)| due(watch));
        let mut silent: Vec<(Moment, NodeId)> = silent.map(|(&node, watch)| (watch.quiet_since(), node)).collect();
        silent.sort_unstable();
        silent.truncate((self.nodes.len() / 2).saturating_sub(lost));
        silent.into_iter().map(|(_, node)| node).collect()
    }
}

/// Whether a node would be called down for silence alone; all other reasons were told by somebody.
fn is_silence(state: NodeState, reason: Reason) -> bool {
    state == NodeState::Down && matches!(reason, Reason::Silent(_))
}
