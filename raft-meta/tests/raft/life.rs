//! A life of a group: clients that work, a nemesis that breaks things, and a quiet end in which everything must heal.

use crate::world::{Sabotage, Setup, Start, World};
use raft_meta::{Command, Consensus, MetaError, MetaState, NodeState, Outcome, ReplicaId};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use xsan_types::{ChangeToken, Generation, NodeId, PoolId, RegisterChange, VolumeId};

const VOLUME: VolumeId = VolumeId(1);

/// What clients were told.
#[derive(Default)]
struct Told {
    /// Versions of the register, each the outcome of one change.
    versions: BTreeSet<u64>,
    /// Changes of which nobody knows the outcome.
    unknown: u64,
    volumes: BTreeMap<String, VolumeId>,
    next: u64,
}

/// Counters of a run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    pub acknowledged: u64,
    pub unknown: u64,
    pub reads: u64,
    pub term: u64,
    pub index: u64,
    pub trace: u64,
}

#[derive(Clone)]
struct Life {
    world: World,
    told: Arc<Mutex<Told>>,
    reads: Arc<Mutex<u64>>,
}

/// Runs a life; what went wrong otherwise.
pub fn live(setup: Setup) -> Result<Report, String> {
    let world = World::new(setup);
    let life = Life { world: world.clone(), told: Arc::default(), reads: Arc::default() };
    let (main, watch) = (life.clone(), world.clone());
    let result = world.executor.run(
        async move {
            let env = main.world.env.clone();
            env.timeout(Duration::from_secs(600), main.run()).await
        },
        move || watch.check(),
    );
    let last: Vec<_> = world
        .state()
        .slots
        .iter()
        .map(|slot| (slot.is_starting, slot.group.as_ref().map(|group| group.status().borrow().clone())))
        .collect();
    world.executor.kill_all();
    let groups: Vec<_> = world.state().slots.iter_mut().map(|slot| slot.group.take()).collect();
    drop(groups);
    match result? {
        Some(result) => result,
        None => Err(format!("no end after ten minutes: {last:#?}")),
    }
}

impl Life {
    async fn run(self) -> Result<Report, String> {
        self.build().await?;
        for client in 0..4 {
            let life = self.clone();
            self.world.spawn(async move { life.client(client).await });
        }
        self.nemesis().await;
        self.heal().await;
        self.settle().await
    }

    /// First replica, then the others join.
    async fn build(&self) -> Result<(), String> {
        self.world.start(0, Start::Create).await;
        let nodes = usize::try_from(self.world.setup.nodes).unwrap();
        for at in 1..nodes {
            self.world.start(at, Start::Join).await;
            self.enrol(at).await;
        }
        self.wait_for_voters(60_000).await
    }

    /// Asks whoever leads to make the node's replica a member, until it is one.
    async fn enrol(&self, at: usize) {
        loop {
            let (replica, node) = {
                let state = self.world.state();
                (state.slots[at].replica, state.slots[at].node)
            };
            if let Some((_, group, status)) = self.world.leader() {
                if status.members.contains_key(&replica) {
                    return;
                }
                group.add_learner(replica, node).await.ok();
            }
            self.world.sleep_millis(50).await;
        }
    }

    fn voters_wanted(&self) -> usize {
        match self.world.setup.nodes {
            0..=2 => 1,
            3 | 4 => 3,
            _ => 5,
        }
    }

    async fn wait_for_voters(&self, millis: u64) -> Result<(), String> {
        let wanted = self.voters_wanted();
        for _ in 0..millis / 100 {
            if let Some((_, _, status)) = self.world.leader() {
                let alive: BTreeSet<ReplicaId> = self.world.state().slots.iter().map(|slot| slot.replica).collect();
                let voters = &status.configuration.voters;
                let all_alive = voters.iter().all(|voter| alive.contains(voter));
                if voters.len() == wanted && !status.configuration.is_joint() && all_alive {
                    return Ok(());
                }
            }
            self.world.sleep_millis(100).await;
        }
        Err(format!("not {wanted} live voters: {:?}", self.world.leader().map(|(_, _, status)| status)))
    }

    async fn client(&self, client: u64) {
        while !self.world.state().quiet {
            let pause = 5 + self.world.roll(80);
            self.world.sleep_millis(pause).await;
            let at = self.world.pick(usize::try_from(self.world.setup.nodes).unwrap());
            match self.world.roll(10) {
                0..=4 => drop(self.change_register(at).await),
                5 | 6 => self.create_volume(at, client).await,
                _ => self.read(at).await,
            }
        }
    }

    fn newest(&self) -> u64 {
        self.told.lock().unwrap().versions.last().copied().unwrap_or(0)
    }

    /// Answers whether it was acknowledged. Each change counts the register's version up by one, so that a lost or a repeated one
    /// shows.
    async fn change_register(&self, at: usize) -> bool {
        let Some(group) = self.world.group(at) else { return false };
        let before = self.newest();
        let token = {
            let mut told = self.told.lock().unwrap();
            told.next += 1;
            ChangeToken(u128::from(told.next))
        };
        let (generation, change) = (Generation(0), RegisterChange::Take);
        let outcome =
            group.propose(Command::ChangeRegister { volume: VOLUME, generation, version: 0, token, change }).await;
        match outcome {
            Ok(Outcome::Register(register)) => {
                if register.version <= before {
                    self.world.broken(format!("version {} after {before} was acknowledged", register.version));
                }
                if !self.told.lock().unwrap().versions.insert(register.version) {
                    self.world.broken(format!("version {} was acknowledged twice", register.version));
                }
                return true;
            }
            Err(MetaError::NoAnswer | MetaError::Closed) => self.told.lock().unwrap().unknown += 1,
            other => self.world.broken(format!("a change was answered {other:?}")),
        }
        false
    }

    async fn create_volume(&self, at: usize, client: u64) {
        let Some(group) = self.world.group(at) else { return };
        let name = {
            let mut told = self.told.lock().unwrap();
            told.next += 1;
            format!("c{client}-{}", told.next)
        };
        let command = Command::CreateVolume { name: name.parse().unwrap(), pool: PoolId(1), size: 4096, ack: None };
        match group.propose(command).await {
            Ok(Outcome::Volume(id)) => drop(self.told.lock().unwrap().volumes.insert(name, id)),
            Err(MetaError::NoAnswer | MetaError::Closed) => {}
            // The name was never used before: it was applied twice.
            other => self.world.broken(format!("{name} was answered {other:?}")),
        }
    }

    async fn read(&self, at: usize) {
        let Some(group) = self.world.group(at) else { return };
        let (version, volumes) = {
            let told = self.told.lock().unwrap();
            (told.versions.last().copied().unwrap_or(0), told.volumes.clone())
        };
        if self.world.setup.sabotage != Sabotage::ReadWithoutBarrier && group.read_barrier().await.is_err() {
            return;
        }
        *self.reads.lock().unwrap() += 1;
        if let Some(stale) = missing(&group.view(), version, &volumes) {
            self.world.broken(format!("a read on slot {at}: {stale}"));
        }
    }

    async fn nemesis(&self) {
        let nodes = usize::try_from(self.world.setup.nodes).unwrap();
        let always = self.world.setup.sabotage == Sabotage::StateNotFlushed;
        self.world.state().contested = always || self.world.setup.seed.is_multiple_of(3);
        for _ in 0..40 {
            let pause = 50 + self.world.roll(700);
            self.world.sleep_millis(pause).await;
            let at = self.world.pick(nodes);
            let act = self.world.roll(20);
            if std::env::var_os("XSAN_RAFT_STORY").is_some() {
                eprintln!("{} slot {at} act {act}", self.world.executor.millis());
            }
            match act {
                0..=2 => self.crash_and_return(at, false),
                3..=5 => self.crash_and_return(at, true),
                6 => (0..nodes).for_each(|at| self.crash_and_return(at, true)),
                7..=9 => self.cut(nodes),
                10..=12 => self.world.state().blocked.clear(),
                13 => {
                    let (loss, repeats, late) = (self.world.roll(200), self.world.roll(200), self.world.roll(100));
                    let mut state = self.world.state();
                    (state.loss, state.repeats, state.late) = (loss, repeats, late);
                }
                14 => {
                    if let Some(group) = self.world.group(at) {
                        self.world.spawn(async move { drop(group.snapshot().await) });
                    }
                }
                15 | 16 => {
                    if let (Some((_, leader, _)), Some(group)) = (self.world.leader(), self.world.group(at)) {
                        leader.transfer_lead(group.replica()).await.ok();
                    }
                }
                17 | 18 => self.drain(at),
                _ => self.wipe(at).await,
            }
        }
    }

    fn crash_and_return(&self, at: usize, power: bool) {
        self.world.crash(at, power);
        let (world, pause) = (self.world.clone(), self.world.roll(2500));
        self.world.spawn(async move {
            world.sleep_millis(pause).await;
            world.start(at, Start::Open).await;
        });
    }

    /// Cuts a random half off, or the way in or out of one node, or the leader.
    fn cut(&self, nodes: usize) {
        let leader = self.world.leader().map(|(at, _, _)| at);
        let mut state = self.world.state();
        let kind = state.dice.below(4);
        let word = state.dice.word();
        let one = leader.filter(|_| kind == 3).unwrap_or(usize::try_from(word).unwrap_or(0) % nodes);
        for from in 0..nodes {
            for to in 0..nodes {
                let side = |at: usize| word >> at & 1;
                let blocked = match kind {
                    0 => side(from) != side(to),
                    1 => from == one,
                    2 => to == one,
                    _ => from == one || to == one,
                };
                if blocked && from != to {
                    state.blocked.insert((from, to));
                }
            }
        }
    }

    /// A node is to be emptied for a while: its vote goes elsewhere, if there is another node.
    fn drain(&self, at: usize) {
        let Some(group) = self.world.group(at) else { return };
        let (world, node, pause) = (self.world.clone(), NodeId(u32::try_from(at).unwrap() + 1), self.world.roll(4000));
        self.world.spawn(async move {
            group.propose(Command::SetNodeState { node, state: NodeState::Draining }).await.ok();
            world.sleep_millis(pause).await;
            world.undrain(node).await;
        });
    }

    /// The disk is lost and the node joins again. Only one at a time: a second loss may be one too many.
    async fn wipe(&self, at: usize) {
        let Some((_, _, status)) = self.world.leader() else { return };
        let alive: BTreeSet<ReplicaId> = {
            let state = self.world.state();
            if state.slots.iter().any(|slot| slot.group.is_none()) {
                return;
            }
            state.slots.iter().map(|slot| slot.replica).collect()
        };
        let configuration = &status.configuration;
        let known = configuration.voters.iter().chain(&configuration.outgoing).all(|voter| alive.contains(voter));
        if !known || configuration.is_joint() || configuration.voters.len() < 3 {
            return;
        }
        self.world.crash(at, true);
        self.world.state().slots[at].disk = Default::default();
        self.world.start(at, Start::Join).await;
        let life = self.clone();
        self.world.spawn(async move { life.enrol(at).await });
    }

    async fn heal(&self) {
        {
            let mut state = self.world.state();
            state.blocked.clear();
            state.contested = false;
            (state.loss, state.repeats, state.late) = (0, 0, 0);
        }
        self.world.sleep_millis(3000).await;
        for at in 0..usize::try_from(self.world.setup.nodes).unwrap() {
            self.world.start(at, Start::Open).await;
        }
        for node in 1..=self.world.setup.nodes {
            self.world.undrain(NodeId(node)).await;
        }
    }

    /// Everything works again: right voters, every node serves, all are equal, and nothing that was told is missing.
    async fn settle(&self) -> Result<Report, String> {
        self.wait_for_voters(120_000).await?;
        self.world.state().quiet = true;
        self.world.sleep_millis(11_000).await;
        for at in 0..usize::try_from(self.world.setup.nodes).unwrap() {
            if !self.change_register(at).await {
                return Err(format!("slot {at} does not serve"));
            }
        }
        for _ in 0..300 {
            if let Some(status) = self.all_equal() {
                return self.account(status.0, status.1, status.2);
            }
            self.world.sleep_millis(100).await;
        }
        Err("the replicas do not become equal".to_owned())
    }

    fn all_equal(&self) -> Option<(u64, u64, Arc<MetaState>)> {
        let groups: Vec<_> = self.world.state().slots.iter().map(|slot| slot.group.clone()).collect();
        let mut found = BTreeSet::new();
        let mut last = None;
        for group in groups {
            let group = group?;
            let status = group.status().borrow().clone();
            found.insert((status.applied, status.digest));
            last = Some((status.term, status.applied, group.view()));
        }
        last.filter(|_| found.len() == 1)
    }

    fn account(&self, term: u64, index: u64, view: Arc<MetaState>) -> Result<Report, String> {
        let told = self.told.lock().unwrap();
        let newest = told.versions.last().copied().unwrap_or(0);
        if let Some(lost) = missing(&view, newest, &told.volumes) {
            return Err(format!("at the end: {lost}"));
        }
        let version = view.volumes.get(&VOLUME).unwrap().register().version;
        let acknowledged = told.versions.len() as u64;
        if !(acknowledged..=acknowledged + told.unknown).contains(&version) {
            return Err(format!("{acknowledged} changes and {} unknown ones made version {version}", told.unknown));
        }
        let (reads, trace) = (*self.reads.lock().unwrap(), self.world.executor.trace());
        Ok(Report { acknowledged, unknown: told.unknown, reads, term, index, trace })
    }
}

impl World {
    async fn undrain(&self, node: NodeId) {
        loop {
            let at = self.pick(usize::try_from(self.setup.nodes).unwrap());
            if let Some(group) = self.group(at) {
                match group.propose(Command::SetNodeState { node, state: NodeState::Up }).await {
                    Err(MetaError::NoAnswer | MetaError::Closed) => {}
                    _ => return,
                }
            }
            self.sleep_millis(100).await;
        }
    }
}

/// What a view lacks of what was acknowledged.
fn missing(view: &MetaState, version: u64, volumes: &BTreeMap<String, VolumeId>) -> Option<String> {
    let found = view.volumes.get(&VOLUME).map_or(0, |volume| volume.register().version);
    if found < version {
        return Some(format!("version {found}, acknowledged was {version}"));
    }
    let lost = volumes.iter().find(|(name, id)| view.volume_named(name).map(|volume| volume.id) != Some(**id));
    lost.map(|(name, id)| format!("volume {name} ({id}) is missing"))
}
