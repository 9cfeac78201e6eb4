//! Who is up, judged by silence alone so far. Pure.
#![allow(missing_docs, reason = "replaced by the detector of RFC 0005")]
use crate::state::NodeState;
use std::collections::BTreeMap;
use std::time::Duration;
use xsan_env::Moment;
use xsan_types::NodeId;
pub struct Beat {
    pub instance: u64,
    pub disk_silent_for: Duration,
    pub unreachable: Vec<NodeId>,
    pub leaving: bool,
}
#[derive(Default)]
pub struct Options {}
pub struct Observed {
    pub node: NodeId,
    pub state: NodeState,
    pub has_device: bool,
}
pub struct Verdict {
    pub node: NodeId,
    pub state: NodeState,
    pub reason: String,
}
pub struct Detector {
    begun: Moment,
    nodes: BTreeMap<NodeId, Observed>,
    heard: BTreeMap<NodeId, (Moment, bool)>,
}
impl Detector {
    pub fn new(_: Options, now: Moment) -> Self {
        Self { begun: now, nodes: BTreeMap::new(), heard: BTreeMap::new() }
    }
    pub fn observe(&mut self, nodes: impl IntoIterator<Item = Observed>, _now: Moment) {
        self.nodes = nodes.into_iter().map(|o| (o.node, o)).collect();
    }
    pub fn heard(&mut self, from: NodeId, beat: Beat, now: Moment) {
        self.heard.insert(from, (now, beat.leaving));
    }
    pub fn decide(&mut self, now: Moment) -> Vec<Verdict> {
        let mut out = Vec::new();
        for o in self.nodes.values() {
            let (at, leaving) = self.heard.get(&o.node).copied().unwrap_or((self.begun, false));
            let silent = now.since(at);
            let heard = self.heard.contains_key(&o.node);
            let to = if leaving || silent > Duration::from_secs(3) {
                NodeState::Down
            } else if silent > Duration::from_secs(1) {
                NodeState::Suspect
            } else if heard && o.has_device {
                NodeState::Up
            } else {
                continue;
            };
            if matches!(o.state, NodeState::Draining | NodeState::Removed)
                || to == o.state
                || (to == NodeState::Suspect && o.state != NodeState::Up)
                || (o.state == NodeState::Joining && to != NodeState::Up)
            {
                continue;
            }
            out.push(Verdict { node: o.node, state: to, reason: format!("silent for {silent:?}, leaving {leaving}") });
        }
        out
    }
    pub fn next_at(&self) -> Option<Moment> {
        None
    }
}
