//! What happened in the cluster, told from one state of the metadata to the next.

use raft_meta::{Consensus, MetaState};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use xsan_env::Env;

/// Events that a process remembers; older ones are forgotten.
const EVENTS_MAX: usize = 1000;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Counts up in one process, from 1.
    pub number: u64,
    /// When this process learned of it, milliseconds since 1970.
    pub at_millis: u64,
    /// What kind, for programs: `node_state`, `node_joined`, `node_removed`, `node_renamed`, `pool_made`, `pool_removed`, `volume_made`,
    /// `volume_removed`, `volume_renamed`, `volume_resized`, `volume_served`, `volume_address`.
    pub kind: String,
    /// The node, pool or volume.
    pub subject: String,
    /// For people.
    pub message: String,
}

/// The events of a process.
pub struct Events {
    known: Mutex<VecDeque<Event>>,
    newest: watch::Sender<u64>,
}

impl Default for Events {
    fn default() -> Self {
        Self { known: Mutex::default(), newest: watch::Sender::new(0) }
    }
}

impl Events {
    fn add(&self, at_millis: u64, happened: Vec<(&'static str, String, String)>) {
        if happened.is_empty() {
            return;
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut number = *self.newest.borrow();
        for (kind, subject, message) in happened {
            number += 1;
            tracing::info!(kind, subject, "{message}");
            known.push_back(Event { number, at_millis, kind: kind.to_owned(), subject, message });
        }
        let surplus = known.len().saturating_sub(EVENTS_MAX);
        known.drain(..surplus);
        self.newest.send_replace(number);
    }

    /// Events after number `after`; waits up to `patience` for the first one.
    pub async fn after(&self, env: &Env, after: u64, patience: Duration) -> Vec<Event> {
        let mut newest = self.newest.subscribe();
        // Late or never: what is there is told.
        let _ = env.timeout(patience, newest.wait_for(|newest| *newest > after)).await;
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.iter().filter(|event| event.number > after).cloned().collect()
    }
}

/// Follows the metadata until its replica ends.
pub async fn follow(env: Env, consensus: Arc<dyn Consensus>, events: Arc<Events>) {
    let mut applied = consensus.subscribe();
    let mut before = consensus.view();
    while applied.changed().await.is_ok() {
        let now = consensus.view();
        events.add(env.wall_millis(), differences(&before, &now));
        before = now;
    }
}

type Happened = (&'static str, String, String);

/// What is to be told of the way from one state to another.
fn differences(before: &MetaState, now: &MetaState) -> Vec<Happened> {
    let mut told = Vec::new();
    nodes(before, now, &mut told);
    pools(before, now, &mut told);
    volumes(before, now, &mut told);
    told
}

fn nodes(before: &MetaState, now: &MetaState, told: &mut Vec<Happened>) {
    for node in now.nodes.values() {
        let name = node.name.to_string();
        let Some(old) = before.nodes.get(&node.id) else {
            told.push(("node_joined", name.clone(), format!("node {name} joined")));
            continue;
        };
        if old.name != node.name {
            told.push(("node_renamed", name.clone(), format!("node {} is {name} now", old.name)));
        }
        if old.state != node.state {
            let why = now.hosts.nodes.get(&node.id).map_or_else(String::new, |record| format!(": {}", record.reason));
            let kind = if now.node(node.id).is_none() { "node_removed" } else { "node_state" };
            told.push((kind, name.clone(), format!("node {name} was {} and is {}{why}", old.state, node.state)));
        }
    }
}

fn pools(before: &MetaState, now: &MetaState, told: &mut Vec<Happened>) {
    for pool in now.pools.values().filter(|pool| !before.pools.contains_key(&pool.id)) {
        told.push(("pool_made", pool.name.to_string(), format!("pool {} was made: {}", pool.name, pool.scheme)));
    }
    for pool in before.pools.values().filter(|pool| !now.pools.contains_key(&pool.id)) {
        told.push(("pool_removed", pool.name.to_string(), format!("pool {} was removed", pool.name)));
    }
}

fn volumes(before: &MetaState, now: &MetaState, told: &mut Vec<Happened>) {
    for volume in now.volumes.values() {
        let name = volume.name.to_string();
        let Some(old) = before.volumes.get(&volume.id) else {
            told.push(("volume_made", name.clone(), format!("volume {name} was made")));
            continue;
        };
        if volume.is_deleted() {
            if !old.is_deleted() {
                told.push(("volume_removed", name.clone(), format!("volume {name} was removed")));
            }
            continue;
        }
        if old.name != volume.name {
            told.push(("volume_renamed", name.clone(), format!("volume {} is {name} now", old.name)));
        }
        let (old_size, size) = (old.register().size, volume.register().size);
        if old_size != size {
            let text = format!("volume {name} has {} now", xsan_types::format_bytes(size));
            told.push(("volume_resized", name.clone(), text));
        }
        let place = |state: &MetaState| state.addresses.get(&volume.id).map(|record| record.place.to_string());
        if place(before) != place(now) {
            let text = match place(now) {
                Some(place) => format!("volume {name} has the service address {place}"),
                None => format!("volume {name} has no service address any more"),
            };
            told.push(("volume_address", name.clone(), text));
        }
        let served = |state: &MetaState| state.hosts.served.get(&volume.id).map(|served| served.node);
        if served(before) != served(now) {
            let text = match served(now).and_then(|node| now.node(node)) {
                Some(node) => format!("volume {name} is served by {}", node.name),
                None => format!("volume {name} is not served"),
            };
            told.push(("volume_served", name, text));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use raft_meta::{Command, NodeState};
    use xsan_types::{ClusterId, NodeId};

    #[test]
    fn what_changes_is_told_once_and_nothing_else_is() {
        let mut before = MetaState::new(ClusterId(1), true);
        let (name, host) = ("n1".parse().expect("a name"), "h".parse().expect("a name"));
        before.apply(&Command::AddNode { name, host, rack: None, zone: None }).expect("added");
        assert_eq!(differences(&before, &before), []);
        let mut now = before.clone();
        let (node, state) = (NodeId(1), NodeState::Up);
        now.apply(&Command::SetNodeState { node, state }).expect("up");
        let told = differences(&before, &now);
        assert_eq!(told.len(), 1);
        assert_eq!((told[0].0, told[0].2.as_str()), ("node_state", "node n1 was joining and is up"));
        let empty = MetaState::new(ClusterId(1), true);
        assert_eq!(differences(&empty, &now)[0].0, "node_joined");
    }

    #[tokio::test]
    async fn who_waits_is_told_and_old_events_are_forgotten() {
        let env = xsan_env::os::OsRuntime::current();
        let events = Arc::new(Events::default());
        let waiting = {
            let (env, events) = (env.clone(), Arc::clone(&events));
            tokio::spawn(async move { events.after(&env, 0, Duration::from_secs(30)).await })
        };
        for number in 0..EVENTS_MAX + 5 {
            events.add(7, vec![("pool_made", format!("p{number}"), String::new())]);
        }
        assert!(!waiting.await.expect("woken").is_empty());
        let all = events.after(&env, 0, Duration::ZERO).await;
        assert_eq!((all.len(), all[0].number), (EVENTS_MAX, 6));
        let last = events.after(&env, EVENTS_MAX as u64 + 4, Duration::ZERO).await;
        assert_eq!((last.len(), last[0].subject.as_str()), (1, "p1004"));
    }
}
