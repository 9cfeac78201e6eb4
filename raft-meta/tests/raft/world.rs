//! A group of replicas in one thread: a network that loses, repeats, delays and cuts; disks that lose what was not flushed;
//! and what must hold at every moment.
//!
//! - At most one leader in a term.
//! - Replicas at the same index have applied the same entries and have the same state.
//! - No replica finds itself faulty: its disk kept what it flushed.

use crate::disk::SlowDirectory;
use crate::executor::{Dice, Executor};
use raft_meta::raft::message::{Agreement, Body, Kind, decode, encode};
use raft_meta::raft::{Message, Status};
use raft_meta::{
    AckPolicy, Command, GroupOptions, MetaState, Name, NodeState, RaftGroup, RaftTransport, ReplicaId, format,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::watch;
use xsan_env::Env;
use xsan_env::file::MemoryDirectory;
use xsan_types::{ClusterId, DeviceId, NodeId, crc32c};

pub const CLUSTER: ClusterId = ClusterId(0xc1);

/// What is deliberately broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    Nothing,
    /// Term and vote are not flushed.
    StateNotFlushed,
    /// The leader believes that followers have what was sent to them.
    AckBeforeQuorum,
    /// Reads look at the view without asking the leader.
    ReadWithoutBarrier,
}

/// A run.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub seed: u64,
    pub nodes: u32,
    pub sabotage: Sabotage,
}

/// A node: a disk, and a replica while its process lives.
pub struct Slot {
    pub node: NodeId,
    pub disk: MemoryDirectory,
    pub owner: u64,
    pub replica: ReplicaId,
    pub group: Option<RaftGroup>,
    pub is_starting: bool,
    status: Option<watch::Receiver<Status>>,
}

pub struct State {
    pub slots: Vec<Slot>,
    /// Where messages for a replica go; ids of former lives stay.
    routes: BTreeMap<ReplicaId, usize>,
    pub blocked: BTreeSet<(usize, usize)>,
    /// In thousandths.
    pub loss: u64,
    pub repeats: u64,
    pub late: u64,
    pub dice: Dice,
    next_owner: u64,
    leaders: BTreeMap<u64, ReplicaId>,
    states: BTreeMap<u64, (u64, u32)>,
    broken: Option<String>,
    pub quiet: bool,
    /// Elections are slow and repeat themselves, and voters lose power right after they voted: a vote that was not flushed is
    /// given twice.
    pub contested: bool,
}

#[derive(Clone)]
pub struct World {
    pub executor: Executor,
    pub env: Env,
    pub setup: Setup,
    state: Arc<Mutex<State>>,
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

/// Six commands' worth of cluster: nodes on hosts of their own, a pool, volume 1.
fn genesis(nodes: u32) -> MetaState {
    let mut state = MetaState::new(CLUSTER, false);
    let mut apply = |command| state.apply(&command).unwrap();
    for number in 1..=nodes {
        let (node, device) = (NodeId(number), DeviceId(u128::from(number)));
        let (name, host) = (name(&format!("n{number}")), name(&format!("h{number}")));
        apply(Command::AddNode { name, host, rack: None, zone: None });
        apply(Command::AddDevice { device, node, capacity: 1 << 40 });
        apply(Command::SetNodeState { node, state: NodeState::Up });
    }
    apply(Command::CreatePool {
        name: name("p"),
        scheme: "replica(2)".parse().unwrap(),
        failure_domain: None,
        pg_count: Some(2),
        ack: AckPolicy::Replicated,
    });
    let pool = xsan_types::PoolId(1);
    apply(Command::CreateVolume { name: name("v"), pool, size: 1 << 30, ack: None });
    state
}

pub fn options() -> GroupOptions {
    // So small that snapshots and late followers are common.
    GroupOptions { log_bytes_max: 3000, ..GroupOptions::default() }
}

impl World {
    pub fn new(setup: Setup) -> Self {
        let executor = Executor::new(setup.seed);
        let slot = |number| Slot {
            node: NodeId(number),
            disk: MemoryDirectory::new(),
            owner: 0,
            replica: ReplicaId(0),
            group: None,
            is_starting: false,
            status: None,
        };
        let state = State {
            slots: (1..=setup.nodes).map(slot).collect(),
            routes: BTreeMap::new(),
            blocked: BTreeSet::new(),
            loss: 0,
            repeats: 0,
            late: 0,
            dice: Dice::new(setup.seed ^ 0x5eed),
            next_owner: 1,
            leaders: BTreeMap::new(),
            states: BTreeMap::new(),
            broken: None,
            quiet: false,
            contested: false,
        };
        let env = executor.env(0);
        Self { executor, env, setup, state: Arc::new(Mutex::new(state)) }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn broken(&self, what: impl Into<String>) {
        self.state().broken.get_or_insert(what.into());
    }

    pub fn roll(&self, limit: u64) -> u64 {
        self.state().dice.below(limit)
    }

    pub fn pick(&self, limit: usize) -> usize {
        usize::try_from(self.roll(limit as u64)).unwrap()
    }

    pub async fn sleep_millis(&self, millis: u64) {
        self.env.sleep(Duration::from_millis(millis)).await;
    }

    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        drop(self.env.spawn("world", task));
    }

    pub fn group(&self, slot: usize) -> Option<RaftGroup> {
        self.state().slots[slot].group.clone()
    }

    /// The replica that leads, of several that think so the one with the newest term.
    pub fn leader(&self) -> Option<(usize, RaftGroup, Status)> {
        let groups: Vec<_> =
            self.state().slots.iter().enumerate().filter_map(|(at, slot)| Some((at, slot.group.clone()?))).collect();
        let leads = groups.into_iter().filter_map(|(at, group)| {
            let status = group.status().borrow().clone();
            (status.leader == Some(status.replica)).then_some((at, group, status))
        });
        leads.max_by_key(|(_, _, status)| status.term)
    }

    /// Starts a node's process: with what its disk holds, or as what `how` makes of an empty one.
    pub async fn start(&self, at: usize, how: Start) {
        let (disk, node, owner) = {
            let mut state = self.state();
            state.next_owner += 1;
            let owner = state.next_owner;
            let slot = &mut state.slots[at];
            if slot.group.is_some() || slot.is_starting {
                return;
            }
            slot.owner = owner;
            slot.is_starting = true;
            (slot.disk.clone(), slot.node, owner)
        };
        let env = self.executor.env(owner);
        let dice = Arc::new(Mutex::new(Dice::new(env.random())));
        let skip_state_flush = self.setup.sabotage == Sabotage::StateNotFlushed;
        let directory = Arc::new(SlowDirectory { inner: disk, env: env.clone(), dice, skip_state_flush });
        let transport = Arc::new(Wire { world: self.clone(), at });
        let world = self.clone();
        // In a task of the process, which may be killed in the middle of it.
        let nodes = self.setup.nodes;
        let started = env.clone().spawn("start", async move {
            let opened = match how {
                Start::Open => RaftGroup::open(&env, directory, transport, options()).await,
                Start::Create => RaftGroup::create(&env, directory, transport, options(), node, genesis(nodes)).await,
                Start::Join => RaftGroup::join(&env, directory, transport, options(), CLUSTER).await,
            };
            match opened {
                Ok(group) => world.started(at, owner, group),
                Err(error) => world.broken(format!("{node} does not start: {error}")),
            }
        });
        started.join().await;
    }

    fn started(&self, at: usize, owner: u64, group: RaftGroup) {
        let mut state = self.state();
        state.routes.insert(group.replica(), at);
        let slot = &mut state.slots[at];
        if slot.owner == owner {
            slot.replica = group.replica();
            slot.is_starting = false;
            slot.status = Some(group.status());
            slot.group = Some(group);
        }
    }

    /// The process dies; with `power`, so does what was not flushed.
    pub fn crash(&self, at: usize, power: bool) {
        let (owner, disk, group, seed) = {
            let mut state = self.state();
            let seed = state.dice.word();
            let slot = &mut state.slots[at];
            slot.status = None;
            slot.is_starting = false;
            let owner = std::mem::take(&mut slot.owner);
            (owner, slot.disk.clone(), slot.group.take(), seed)
        };
        // Owner 0 is the world: this process was dead already.
        if owner != 0 {
            self.executor.kill(owner);
        }
        drop(group);
        if power { disk.power_off(seed) } else { disk.crash_process() }
    }

    /// Looks at everything that changed since the last time.
    pub fn check(&self) -> Result<(), String> {
        let mut state = self.state();
        if let Some(broken) = &state.broken {
            return Err(format!("at {} ms: {broken}", self.executor.millis()));
        }
        let mut changed = Vec::new();
        for slot in &mut state.slots {
            if let Some(status) = slot.status.as_mut().filter(|status| status.has_changed().unwrap_or(false)) {
                changed.push((status.borrow_and_update().clone(), slot.group.clone()));
            }
        }
        for (status, group) in changed {
            if status.faulty {
                return Err(format!("{} stopped", status.replica));
            }
            if status.leader == Some(status.replica) {
                let leader = *state.leaders.entry(status.term).or_insert(status.replica);
                if leader != status.replica {
                    return Err(format!("{leader} and {} lead in term {}", status.replica, status.term));
                }
            }
            let Some(group) = group else { continue };
            let view = raft_meta::Consensus::view(&group);
            let now = (status.digest, crc32c(&format::encode_snapshot(&view, 0)).0);
            let known = *state.states.entry(status.applied).or_insert(now);
            if known != now {
                return Err(format!("{} differs from another replica at index {}", status.replica, status.applied));
            }
            self.executor.note(status.applied ^ status.term << 32);
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Debug)]
pub enum Start {
    Open,
    Create,
    Join,
}

struct Wire {
    world: World,
    at: usize,
}

impl RaftTransport for Wire {
    fn send(&self, to: ReplicaId, bytes: Vec<u8>) {
        let message = decode(&bytes).expect("replicas send what they read");
        assert_eq!(encode(&message), bytes, "one encoding for one message");
        let world = &self.world;
        if world.setup.sabotage == Sabotage::AckBeforeQuorum && self.forge(&message) {
            return;
        }
        let mut state = world.state();
        let Some(&target) = state.routes.get(&to) else { return };
        let (loss, repeats) = (state.loss, state.repeats);
        let mut copies = u64::from(!state.dice.chance(loss)) + u64::from(state.dice.chance(repeats));
        let asks = |kinds: &[Kind]| matches!(&message.body, Body::Agreement(body) if kinds.contains(&body.kind));
        let slow = state.contested && asks(&[Kind::RequestVote, Kind::RequestPreVote, Kind::RequestPreVoteResponse]);
        copies += u64::from(slow && copies > 0);
        if state.contested && asks(&[Kind::RequestVoteResponse]) && state.dice.chance(400) {
            self.power_off_soon();
        }
        if state.blocked.contains(&(self.at, target)) {
            return;
        }
        for _ in 0..copies {
            let late = state.late;
            let micros = match state.dice.chance(late) {
                true => state.dice.below(2_000_000),
                false if slow => state.dice.below(400_000),
                false => 100 + state.dice.below(3000),
            };
            let (world, from, at, bytes) = (world.clone(), message.from, self.at, bytes.clone());
            self.world.spawn(async move {
                world.env.sleep(Duration::from_micros(micros)).await;
                let group = {
                    let state = world.state();
                    if state.blocked.contains(&(at, target)) { None } else { state.slots[target].group.clone() }
                };
                if let Some(group) = group {
                    group.deliver(from, bytes);
                }
            });
        }
    }
}

impl Wire {
    fn power_off_soon(&self) {
        let (world, at) = (self.world.clone(), self.at);
        self.world.spawn(async move {
            world.crash(at, true);
            world.sleep_millis(1).await;
            world.start(at, Start::Open).await;
        });
    }

    /// Answers entries in the follower's name, and lets the follower have every other message only.
    fn forge(&self, message: &Message) -> bool {
        let Body::Agreement(append) = &message.body else { return false };
        let Some(last) = append.entries.last().filter(|_| append.kind == Kind::Append) else { return false };
        let answer = Agreement { term: append.term, index: last.index, ..Agreement::new(Kind::AppendResponse) };
        let forged = Message { cluster: CLUSTER, from: message.to, to: message.from, body: Body::Agreement(answer) };
        if let Some(group) = self.world.group(self.at) {
            group.deliver(message.to, encode(&forged));
        }
        self.world.roll(2) == 0
    }
}
