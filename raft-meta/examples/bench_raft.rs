//! Speed of the metadata's log over real files: `bench_raft [DIRECTORY] [SECONDS]` (default: a temporary one, 3 s each).
//!
//! One voter, and three in one process that pass messages by call: what remains is the cost of the code and of the flushes. All
//! three share one disk here, so their flushes queue behind each other; on three hosts they do not.
#![forbid(unsafe_code)]
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a program of its own: it makes the runtime and watches the clock"
)]

use raft_meta::{
    Command, Consensus, GroupOptions, MetaState, Options, RaftGroup, RaftTransport, ReplicaId, SingleReplica,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use xsan_env::file::OsDirectory;
use xsan_env::{Directory, Env, OsRuntime};
use xsan_types::{ClusterId, NodeId};

const CLUSTER: ClusterId = ClusterId(1);

/// Replicas of this process by id.
#[derive(Clone, Default)]
struct Peers(Arc<Mutex<BTreeMap<ReplicaId, RaftGroup>>>);

impl RaftTransport for Peers {
    fn send(&self, to: ReplicaId, message: Vec<u8>) {
        // The sender is part of the message; a real transport knows it from the connection.
        let from = raft_meta::raft::message::decode(&message).map(|message| message.from);
        let peer = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&to).cloned();
        if let (Some(peer), Ok(from)) = (peer, from) {
            peer.deliver(from, message);
        }
    }
}

fn genesis() -> MetaState {
    let mut state = MetaState::new(CLUSTER, true);
    for number in 1..=3 {
        let name = |letter: char| format!("{letter}{number}").parse().expect("a name");
        let add = Command::AddNode { name: name('n'), host: name('h'), rack: None, zone: None };
        state.apply(&add).expect("a new node");
    }
    state
}

async fn directory(env: &Env, base: &Path, name: &str) -> Arc<dyn Directory> {
    let path = base.join(name);
    std::fs::create_dir_all(&path).expect("the directory can be made");
    Arc::new(OsDirectory::open(env, path).await.expect("the directory can be opened"))
}

async fn group(env: &Env, base: &Path, voters: u32) -> RaftGroup {
    let (peers, options) = (Peers::default(), GroupOptions::default());
    let add = |group: &RaftGroup| {
        peers.0.lock().unwrap_or_else(PoisonError::into_inner).insert(group.replica(), group.clone());
    };
    let transport = || Arc::new(peers.clone());
    let files = directory(env, base, &format!("{voters}-1")).await;
    let first = RaftGroup::create(env, files, transport(), options, NodeId(1), genesis()).await.expect("create");
    add(&first);
    for node in 2..=voters {
        let files = directory(env, base, &format!("{voters}-{node}")).await;
        let joined = RaftGroup::join(env, files, transport(), options, CLUSTER).await.expect("join");
        add(&joined);
        while first.add_learner(joined.replica(), NodeId(node)).await.is_err() {
            env.sleep(Duration::from_millis(20)).await;
        }
    }
    let mut status = first.status();
    let all = usize::try_from(voters).expect("few");
    while status.borrow_and_update().configuration.voters.len() < all || status.borrow().configuration.is_joint() {
        status.changed().await.expect("the replica lives");
    }
    first
}

/// A command that always works and leaves the state as large as it was.
fn command() -> Command {
    Command::SetNodeState { node: NodeId(1), state: raft_meta::NodeState::Up }
}

async fn measure(name: &str, group: Arc<dyn Consensus>, clients: usize, time: Duration) {
    let end = Instant::now() + time;
    let client = || {
        let group = Arc::clone(&group);
        tokio::spawn(async move {
            let mut micros = Vec::new();
            while Instant::now() < end {
                let start = Instant::now();
                group.propose(command()).await.ok();
                micros.push(u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX));
            }
            micros
        })
    };
    let clients: Vec<_> = (0..clients).map(|_| client()).collect();
    let count = clients.len();
    let mut micros = Vec::new();
    for client in clients {
        micros.extend(client.await.expect("a client"));
    }
    micros.sort_unstable();
    let at = |part: usize| micros.get(micros.len() * part / 1000).copied().unwrap_or(0);
    let rate = micros.len() as f64 / time.as_secs_f64();
    println!("{name:<16} {count:>4} clients {rate:>9.0} /s  p50 {:>7} us  p99 {:>7} us", at(500), at(990));
}

async fn reads(name: &str, group: RaftGroup, time: Duration) {
    let (end, mut count) = (Instant::now() + time, 0u64);
    while Instant::now() < end {
        group.read_barrier().await.ok();
        count += 1;
    }
    println!("{name:<16} read barrier {:>9.0} /s", count as f64 / time.as_secs_f64());
}

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let base = arguments.get(1).map_or_else(|| std::env::temp_dir().join("bench_raft"), PathBuf::from);
    let seconds = arguments.get(2).and_then(|text| text.parse().ok()).unwrap_or(3);
    let (env, time) = (OsRuntime::current(), Duration::from_secs(seconds));
    // Only what this program makes: another path would be a surprise.
    for name in ["single", "1-1", "3-1", "3-2", "3-3"] {
        std::fs::remove_dir_all(base.join(name)).ok();
    }
    let files = directory(&env, &base, "single").await;
    let single = SingleReplica::create(&env, files, Options::default(), genesis()).await.expect("create");
    for clients in [1, 64] {
        measure("single log", Arc::new(single.clone()), clients, time).await;
    }
    single.close().await;
    for voters in [1, 3] {
        let group = group(&env, &base, voters).await;
        let name = format!("raft, {voters} voters");
        for clients in [1, 64] {
            measure(&name, Arc::new(group.clone()), clients, time).await;
        }
        reads(&name, group, time).await;
    }
}
