//! Calls between processes: to a node, and to the metadata.
//!
//! A call becomes a task of the *callee's* process: it goes on when the caller dies, and ends when the callee does. Fault model: the
//! request is delayed, held up together with those behind it, lost, or arrives after the caller gave up; the answer is delayed or lost. Requests that are not late
//! arrive in order, as over one connection (`SegmentStore` promises its caller that calls start in order); answers overtake each
//! other. A caller without an answer is told `Unavailable` after a while, as by a connection that times out.

use crate::executor::{Dice, Executor};
use futures::FutureExt;
use raft_meta::{Command, Consensus, MetaError, MetaState, Outcome};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{oneshot, watch};
use xsan_env::memory::mix;
use xsan_env::runtime::BoxFuture;
use xsan_env::{Buf, Env};
use xsan_types::{
    ClosedMember, DeviceId, FlushRequest, Generation, Incarnation, MemberRef, RegisterView, SealedSegment, SegmentName,
    SetId, ShardId, VolumeId,
};
use xsan_wire::node::{
    CreateMember, CreatedMember, DeviceStatus, HoldShard, NodeApi, NodeError, NodeResult, PutShard, ShardInfo,
};

/// A rule of the protocol that the link breaks on purpose: the run must find it (canaries).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Canary {
    /// None.
    #[default]
    Off,
    /// A flush is answered without being done.
    FlushLies,
    /// Some records are answered by all members without being written.
    AppendLies,
    /// A member confirms reads though it is closed.
    ConfirmLies,
    /// A member that is closed answers appends as if it took them.
    ClosedTakes,
    /// All members show zeroes in the place of some records.
    ReplicaLies,
}

/// How calls fare, in thousandths; changed by the planner while the run goes on.
#[derive(Debug, Default)]
pub struct Weather {
    /// The request is lost.
    pub lost_request: AtomicU64,
    /// The answer is lost.
    pub lost_answer: AtomicU64,
    /// The caller gives up before the request arrives.
    pub late_request: AtomicU64,
    /// The request is held up on its way, and those behind it; nobody gives up.
    pub slow_request: AtomicU64,
    /// Longest usual delay one way, microseconds.
    pub delay_us: AtomicU64,
}

impl Weather {
    /// No faults from now on.
    pub fn calm(&self) {
        for chance in [&self.lost_request, &self.lost_answer, &self.late_request, &self.slow_request] {
            chance.store(0, Ordering::Relaxed);
        }
    }
}

/// What a call meets.
enum Fate {
    Fine,
    LostRequest,
    LostAnswer,
    Late,
    Slow,
}

/// The way from gateways to one process; clones are the same way.
pub struct Way {
    executor: Executor,
    world: Env,
    weather: Arc<Weather>,
    dice: Mutex<Dice>,
    name: String,
    /// Closed when the request before has arrived.
    before: Mutex<Option<oneshot::Receiver<()>>>,
}

impl Way {
    /// A way named after where it leads to.
    #[must_use]
    pub fn new(executor: &Executor, world: &Env, weather: &Arc<Weather>, dice: Dice, name: &str) -> Self {
        Self {
            executor: executor.clone(),
            world: world.clone(),
            weather: Arc::clone(weather),
            dice: Mutex::new(dice),
            name: name.to_owned(),
            before: Mutex::new(None),
        }
    }

    fn dice(&self) -> MutexGuard<'_, Dice> {
        self.dice.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn draw(&self) -> (Fate, [Duration; 2], Duration) {
        let mut dice = self.dice();
        let of = |chance: &AtomicU64| chance.load(Ordering::Relaxed);
        let fate = if dice.chance(of(&self.weather.lost_request)) {
            Fate::LostRequest
        } else if dice.chance(of(&self.weather.lost_answer)) {
            Fate::LostAnswer
        } else if dice.chance(of(&self.weather.late_request)) {
            Fate::Late
        } else if dice.chance(of(&self.weather.slow_request)) {
            Fate::Slow
        } else {
            Fate::Fine
        };
        let most = of(&self.weather.delay_us).max(1);
        let delay = [1, 2].map(|_| Duration::from_micros(dice.skewed(most)));
        let patience = Duration::from_micros(dice.between(2_000, 400_000));
        (fate, delay, patience)
    }

    /// Calls: `callee` runs what it is told to in its process. `None`: nothing is known of the outcome.
    fn call<T: Send + 'static>(
        self: &Arc<Self>,
        what: &'static str,
        callee: Option<Env>,
        call: impl FnOnce() -> BoxFuture<'static, T> + Send + 'static,
    ) -> BoxFuture<'static, Option<T>> {
        let way = Arc::clone(self);
        let (fate, [there, back], patience) = way.draw();
        let Some(callee) = callee else {
            return Box::pin(async move {
                way.world.sleep(there + back).await;
                None
            });
        };
        let (answer, answered) = oneshot::channel();
        let lose_answer = matches!(fate, Fate::LostAnswer);
        let there = match fate {
            Fate::Late => patience + there,
            Fate::Slow => there + patience * 3,
            _ => there,
        };
        match fate {
            Fate::Fine => {}
            Fate::LostRequest => way.executor.note(|| format!("{}: {what} is lost", way.name)),
            Fate::LostAnswer => way.executor.note(|| format!("{}: the answer to {what} is lost", way.name)),
            Fate::Late => way.executor.note(|| format!("{}: {what} is given up and arrives later", way.name)),
            Fate::Slow => way.executor.note(|| format!("{}: {what} is held up", way.name)),
        }
        let give_up = !matches!(fate, Fate::Fine | Fate::Slow);
        if !matches!(fate, Fate::LostRequest) {
            let env = callee.clone();
            let (arrived, next) = oneshot::channel::<()>();
            let mut before = None;
            if !matches!(fate, Fate::Late) {
                before = self.before.lock().unwrap_or_else(PoisonError::into_inner).replace(next);
            }
            drop(callee.spawn("call", async move {
                env.sleep(there).await;
                if let Some(before) = before {
                    // An error is what is waited for: the one before has arrived, or died with its process.
                    let _ = before.await;
                }
                let running = call();
                drop(arrived);
                let outcome = running.await;
                env.sleep(back).await;
                if !lose_answer {
                    // The caller gave up or died.
                    let _ = answer.send(outcome);
                }
            }));
        }
        Box::pin(async move {
            if give_up {
                way.world.sleep(patience).await;
                return None;
            }
            answered.await.ok()
        })
    }
}

/// A node as gateways reach it.
pub struct NodeLink {
    way: Arc<Way>,
    canary: Canary,
    behind: Mutex<Option<(Env, Arc<dyn NodeApi>)>>,
}

impl NodeLink {
    /// Nothing is behind it yet.
    #[must_use]
    pub fn new(way: Way, canary: Canary) -> Self {
        Self { way: Arc::new(way), canary, behind: Mutex::new(None) }
    }

    fn behind(&self) -> MutexGuard<'_, Option<(Env, Arc<dyn NodeApi>)>> {
        self.behind.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node runs, in the process of `env`.
    pub fn start(&self, env: Env, node: Arc<dyn NodeApi>) {
        *self.behind() = Some((env, node));
    }

    /// The node is gone.
    pub fn stop(&self) {
        let gone = self.behind().take();
        drop(gone);
    }

    /// Whether the node runs.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.behind().is_some()
    }

    fn call<T: Send + 'static>(
        &self,
        what: &'static str,
        call: impl FnOnce(&dyn NodeApi) -> NodeResult<T> + Send + 'static,
    ) -> NodeResult<T> {
        let (env, node) = match &*self.behind() {
            Some((env, node)) => (Some(env.clone()), Some(Arc::clone(node))),
            None => (None, None),
        };
        let answer = self.way.call(what, env, move || match node {
            Some(node) => call(&*node),
            None => Box::pin(std::future::ready(Err(NodeError::Unavailable))),
        });
        Box::pin(async move { answer.await.unwrap_or(Err(NodeError::Unavailable)) })
    }
}

impl NodeApi for NodeLink {
    fn devices(&self) -> NodeResult<Vec<DeviceStatus>> {
        self.call("devices", |node| node.devices())
    }
    fn create_member(&self, request: CreateMember) -> NodeResult<CreatedMember> {
        self.call("create_member", |node| node.create_member(request))
    }
    fn append(&self, member: MemberRef, segment: SegmentName, offset: u64, data: Buf) -> NodeResult<u64> {
        // All members alike: of a record that one of them has nothing is lost.
        if self.canary == Canary::AppendLies && mix(segment.number ^ offset.rotate_left(32)).is_multiple_of(20) {
            return Box::pin(std::future::ready(Ok(offset + data.len() as u64)));
        }
        let end = offset + data.len() as u64;
        let lies = self.canary == Canary::ClosedTakes;
        let answer = self.call("append", move |node| node.append(member, segment, offset, data));
        Box::pin(answer.map(move |answer| match answer {
            Err(NodeError::Closed) if lies => Ok(end),
            answer => answer,
        }))
    }
    fn flush(&self, request: FlushRequest) -> NodeResult<()> {
        if self.canary == Canary::FlushLies {
            return Box::pin(std::future::ready(Ok(())));
        }
        self.call("flush", |node| node.flush(request))
    }
    fn confirm(&self, member: MemberRef) -> NodeResult<()> {
        if self.canary == Canary::ConfirmLies {
            return Box::pin(std::future::ready(Ok(())));
        }
        self.call("confirm", move |node| node.confirm(member))
    }
    fn close(&self, device: DeviceId, volume: VolumeId, generation: Generation) -> NodeResult<Vec<ClosedMember>> {
        self.call("close", move |node| node.close(device, volume, generation))
    }
    fn read_replica(
        &self,
        device: DeviceId,
        volume: VolumeId,
        set: SetId,
        segment: SegmentName,
        offset: u64,
        length: u32,
    ) -> NodeResult<Buf> {
        if self.canary == Canary::ReplicaLies && mix(segment.number ^ offset.rotate_left(32)).is_multiple_of(4) {
            return Box::pin(std::future::ready(Ok(Buf::copied(&vec![0; length as usize]))));
        }
        self.call("read_replica", move |node| node.read_replica(device, volume, set, segment, offset, length))
    }
    fn sealed(&self, member: MemberRef, segment: SealedSegment) -> NodeResult<()> {
        self.call("sealed", move |node| node.sealed(member, segment))
    }
    fn trim_manifest(&self, member: MemberRef, border: u64, undecided: Vec<u64>) -> NodeResult<()> {
        self.call("trim_manifest", move |node| node.trim_manifest(member, border, undecided))
    }
    fn registered(&self, view: RegisterView) -> NodeResult<()> {
        self.call("registered", move |node| node.registered(view))
    }
    fn put_shard(&self, request: PutShard) -> NodeResult<()> {
        self.call("put_shard", |node| node.put_shard(request))
    }
    fn hold_shard(&self, request: HoldShard) -> NodeResult<()> {
        self.call("hold_shard", move |node| node.hold_shard(request))
    }
    fn read_shard(&self, device: DeviceId, shard: ShardId, offset: u64, length: u32) -> NodeResult<Buf> {
        self.call("read_shard", move |node| node.read_shard(device, shard, offset, length))
    }
    fn repair_shard(&self, device: DeviceId, shard: ShardId, offset: u64, data: Buf) -> NodeResult<()> {
        self.call("repair_shard", move |node| node.repair_shard(device, shard, offset, data))
    }
    fn shard_info(&self, device: DeviceId, shard: ShardId) -> NodeResult<ShardInfo> {
        self.call("shard_info", move |node| node.shard_info(device, shard))
    }
    fn verify_shard(&self, device: DeviceId, shard: ShardId) -> NodeResult<()> {
        self.call("verify_shard", move |node| node.verify_shard(device, shard))
    }
    fn delete_segments(&self, segments: Vec<SegmentName>) -> NodeResult<()> {
        self.call("delete_segments", |node| node.delete_segments(segments))
    }
    fn list_shards(
        &self,
        device: DeviceId,
        volume: VolumeId,
        after: Option<ShardId>,
        limit: u32,
    ) -> NodeResult<Vec<ShardInfo>> {
        self.call("list_shards", move |node| node.list_shards(device, volume, after, limit))
    }
    fn append_shard(
        &self,
        device: DeviceId,
        incarnation: Incarnation,
        shard: ShardId,
        offset: u64,
        data: Vec<Buf>,
    ) -> NodeResult<u64> {
        self.call("append_shard", move |node| node.append_shard(device, incarnation, shard, offset, data))
    }
    fn finish_shard(
        &self,
        device: DeviceId,
        incarnation: Incarnation,
        shard: ShardId,
        bytes: u64,
        hash: [u8; 32],
    ) -> NodeResult<()> {
        self.call("finish_shard", move |node| node.finish_shard(device, incarnation, shard, bytes, hash))
    }
}

/// Replicas that run, by number, with their processes.
type Replicas = BTreeMap<usize, (Env, Arc<dyn Consensus>)>;

/// The metadata as gateways reach it: a call goes to any replica that runs.
pub struct MetaLink {
    way: Arc<Way>,
    behind: Mutex<Replicas>,
    /// The newest state seen, for when nothing is behind, or only replicas that are behind themselves.
    seen: Mutex<Arc<MetaState>>,
}

impl MetaLink {
    /// The state `seen` is shown until something is behind.
    #[must_use]
    pub fn new(way: Way, seen: Arc<MetaState>) -> Self {
        Self { way: Arc::new(way), behind: Mutex::default(), seen: Mutex::new(seen) }
    }

    fn behind(&self) -> MutexGuard<'_, Replicas> {
        self.behind.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The replica `at` runs, in the process of `env`.
    pub fn start(&self, at: usize, env: Env, replica: Arc<dyn Consensus>) {
        self.behind().insert(at, (env, replica));
    }

    /// The replica `at` is gone.
    pub fn stop(&self, at: usize) {
        // What it knew stays known.
        self.view();
        let gone = self.behind().remove(&at);
        drop(gone);
    }

    /// The replica that has applied most.
    fn newest(&self) -> Option<Arc<dyn Consensus>> {
        let behind = self.behind();
        let newest = behind.values().max_by_key(|(_, replica)| *replica.subscribe().borrow());
        newest.map(|(_, replica)| Arc::clone(replica))
    }

    fn call<T: Send + 'static>(
        &self,
        what: &'static str,
        call: impl FnOnce(&dyn Consensus) -> BoxFuture<'static, Result<T, MetaError>> + Send + 'static,
    ) -> BoxFuture<'static, Result<T, MetaError>> {
        let chosen = {
            let behind = self.behind();
            let at = self.way.dice().below(behind.len() as u64) as usize;
            behind.values().nth(at).cloned()
        };
        let (env, replica) = chosen.unzip();
        let answer = self.way.call(what, env, move || match replica {
            Some(replica) => call(&*replica),
            None => Box::pin(std::future::ready(Err(MetaError::NoAnswer))),
        });
        Box::pin(async move { answer.await.unwrap_or(Err(MetaError::NoAnswer)) })
    }
}

impl Consensus for MetaLink {
    fn propose(&self, command: Command) -> BoxFuture<'static, Result<Outcome, MetaError>> {
        self.call("propose", move |replica| replica.propose(command))
    }

    fn read_barrier(&self) -> BoxFuture<'static, Result<u64, MetaError>> {
        self.call("read_barrier", |replica| replica.read_barrier())
    }

    fn view(&self) -> Arc<MetaState> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(replica) = self.newest() {
            let view = replica.view();
            // The map never goes back.
            if view.epoch >= seen.epoch {
                *seen = view;
            }
        }
        Arc::clone(&seen)
    }

    fn subscribe(&self) -> watch::Receiver<u64> {
        self.newest().map_or_else(|| watch::channel(0).1, |replica| replica.subscribe())
    }

    fn snapshot(&self) -> BoxFuture<'static, Result<u64, MetaError>> {
        self.call("snapshot", |replica| replica.snapshot())
    }
}
