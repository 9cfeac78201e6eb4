//! The metadata: three replicas of a Raft group, each with files that outlive its processes, and the ways between them.
//!
//! Messages between replicas are one way: delayed, lost, doubled, overtaking each other, and cut off in one direction for a while.

use crate::executor::{Dice, Executor, Owner};
use crate::link::{MetaLink, Way, Weather};
use raft_meta::raft::Status;
use raft_meta::{Consensus, FormatError, GroupOptions, MetaState, RaftGroup, RaftTransport, ReplicaId};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use xsan_env::Env;
use xsan_env::file::MemoryDirectory;
use xsan_types::{ClusterId, NodeId};

/// Replicas of the metadata, on the first hosts.
pub const REPLICAS: usize = 3;

/// The group as the world keeps it.
pub struct MetaGroup {
    executor: Executor,
    cluster: ClusterId,
    post: Arc<Post>,
    replicas: Vec<Replica>,
    /// How gateways and the world reach it.
    link: Arc<MetaLink>,
}

struct Replica {
    files: MemoryDirectory,
    process: Mutex<Option<Owner>>,
}

/// Carries the messages. Replica ids are drawn when a replica is made, so they are learned as they start.
struct Post {
    world: Env,
    weather: Arc<Weather>,
    dice: Mutex<Dice>,
    running: Mutex<BTreeMap<ReplicaId, (usize, RaftGroup)>>,
    /// From whom to whom nothing comes through.
    cut: Mutex<BTreeSet<(usize, usize)>>,
}

/// The post as one replica uses it.
struct Sender {
    post: Arc<Post>,
    from: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl RaftTransport for Sender {
    fn send(&self, to: ReplicaId, message: Vec<u8>) {
        self.post.carry(self.from, to, message);
    }
}

impl Post {
    fn carry(self: &Arc<Self>, from: usize, to: ReplicaId, message: Vec<u8>) {
        let most = self.weather.delay_us.load(Ordering::Relaxed).max(1);
        let lost = self.weather.lost_request.load(Ordering::Relaxed);
        let (copies, delays) = {
            let mut dice = lock(&self.dice);
            let copies = if dice.chance(lost) { 0 } else { 1 + usize::from(dice.chance(lost)) };
            (copies, [dice.skewed(most), dice.skewed(most)])
        };
        for delay in delays.into_iter().take(copies) {
            let (post, message) = (Arc::clone(self), message.clone());
            drop(self.world.spawn("meta message", async move {
                post.world.sleep(Duration::from_micros(delay)).await;
                let sender = lock(&post.running).iter().find(|(_, (at, _))| *at == from).map(|(&id, _)| id);
                let receiver = lock(&post.running).get(&to).cloned();
                if let (Some(sender), Some((at, group))) = (sender, receiver)
                    && !lock(&post.cut).contains(&(from, at))
                {
                    group.deliver(sender, message);
                }
            }));
        }
    }
}

impl MetaGroup {
    /// A group without a running replica; the state `seen` is shown until one runs.
    #[must_use]
    pub fn new(
        executor: &Executor,
        world: &Env,
        weather: &Arc<Weather>,
        way: Way,
        dice: Dice,
        seen: MetaState,
    ) -> Self {
        let post = Post {
            world: world.clone(),
            weather: Arc::clone(weather),
            dice: Mutex::new(dice),
            running: Mutex::default(),
            cut: Mutex::default(),
        };
        let replica = || Replica { files: MemoryDirectory::new(), process: Mutex::new(None) };
        Self {
            executor: executor.clone(),
            cluster: seen.cluster,
            post: Arc::new(post),
            replicas: (0..REPLICAS).map(|_| replica()).collect(),
            link: Arc::new(MetaLink::new(way, Arc::new(seen))),
        }
    }

    /// The group as its users see it.
    #[must_use]
    pub fn link(&self) -> &Arc<MetaLink> {
        &self.link
    }

    /// Starts the replica `at`, if it does not run: with `genesis` the first of a new cluster, without it one that is there or joins.
    ///
    /// # Errors
    /// It does not open.
    pub async fn start(&self, at: usize, owner: Owner, genesis: Option<MetaState>) -> Result<(), FormatError> {
        let replica = &self.replicas[at];
        {
            let mut process = lock(&replica.process);
            if process.is_some() {
                return Ok(());
            }
            *process = Some(owner);
        }
        let env = self.executor.env(owner, 1);
        let files = Arc::new(replica.files.clone());
        let post = || Arc::new(Sender { post: Arc::clone(&self.post), from: at });
        let options = GroupOptions::default();
        let opened = match genesis {
            Some(state) => RaftGroup::create(&env, files, post(), options, node_of(at), state).await,
            None => match RaftGroup::open(&env, files.clone(), post(), options).await {
                Err(FormatError::Absent) => RaftGroup::join(&env, files, post(), options, self.cluster).await,
                opened => opened,
            },
        };
        if *lock(&replica.process) != Some(owner) {
            // Ended again while it opened.
            return Ok(());
        }
        let group = opened?;
        lock(&self.post.running).insert(group.replica(), (at, group.clone()));
        self.link.start(at, env, Arc::new(group) as Arc<dyn Consensus>);
        Ok(())
    }

    /// Ends the process of the replica `at`; with `power` (a seed) its host loses power.
    pub fn stop(&self, at: usize, power: Option<u64>) {
        let replica = &self.replicas[at];
        self.link.stop(at);
        let gone: Vec<_> = {
            let mut running = lock(&self.post.running);
            let ids: Vec<ReplicaId> =
                running.iter().filter(|(_, (other, _))| *other == at).map(|(&id, _)| id).collect();
            ids.into_iter().filter_map(|id| running.remove(&id)).collect()
        };
        if let Some(owner) = lock(&replica.process).take() {
            self.executor.kill(owner);
        }
        drop(gone);
        match power {
            Some(seed) => replica.files.power_off(seed),
            None => replica.files.crash_process(),
        }
    }

    /// Nothing comes through from one replica to another until [`MetaGroup::join_again`].
    pub fn cut(&self, from: usize, to: usize) {
        lock(&self.post.cut).insert((from, to));
    }

    /// All messages come through again, as far as the weather lets them.
    pub fn join_again(&self) {
        lock(&self.post.cut).clear();
    }

    /// What the running replicas say of themselves, by number.
    #[must_use]
    pub fn statuses(&self) -> BTreeMap<usize, Status> {
        lock(&self.post.running).values().map(|(at, group)| (*at, group.status().borrow().clone())).collect()
    }

    /// Makes every running replica a voter; done when all of them are.
    pub async fn gather(&self) {
        loop {
            let groups: Vec<(usize, RaftGroup)> = lock(&self.post.running).values().cloned().collect();
            for (_, leader) in &groups {
                let status = leader.status().borrow().clone();
                if status.leader != Some(status.replica) {
                    continue;
                }
                if status.configuration.voters.len() == groups.len() {
                    return;
                }
                for (at, joining) in groups.iter().filter(|(_, group)| !status.members.contains_key(&group.replica())) {
                    // Refused while another change is under way: asked again below.
                    leader.add_learner(joining.replica(), node_of(*at)).await.ok();
                }
            }
            self.post.world.sleep(Duration::from_millis(50)).await;
        }
    }

    /// Why the replicas are not all the same yet, if they are not.
    #[must_use]
    pub fn disagreement(&self) -> Option<String> {
        let statuses = self.statuses();
        let states: BTreeSet<(u64, u64)> = statuses.values().map(|status| (status.applied, status.digest)).collect();
        let fine = statuses.len() == REPLICAS && states.len() == 1 && statuses.values().all(|status| !status.faulty);
        (!fine).then(|| format!("{statuses:?}"))
    }
}

fn node_of(at: usize) -> NodeId {
    NodeId(at as u32 + 1)
}
