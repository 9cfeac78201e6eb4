//! A node that records what it is asked, and pipes that can be stopped and cut.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use xsan_env::runtime::BoxFuture;
use xsan_env::{Buf, BufPool, Env, OsRuntime, Stream};
use xsan_types::{
    ClosedMember, ClusterId, Crc32c, DeviceId, FlushRequest, Generation, Incarnation, MemberRef, MemberState, NodeId,
    OpenReplica, PgId, PoolId, RegisterView, SealedSegment, SegmentName, SetId, ShardId, ShardIndex, VolumeId, crc32c,
};
use xsan_wire::node::{
    CreateMember, CreatedMember, DeviceStatus, HoldShard, NodeApi, NodeError, NodeResult, PutShard, ShardInfo,
};
use xsan_wire::{Ca, Connect, Endpoint, Limits, NodeKey, Peer, RemoteNode, Server, Services, Tls};

pub const CLUSTER: ClusterId = ClusterId(0xc1);
pub const CLIENT: NodeId = NodeId(2);
pub const SERVER: NodeId = NodeId(5);
/// Longer than anything takes here, on the most loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub fn run<F: Future<Output = ()>>(test: impl FnOnce(Env) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let env = OsRuntime::current();
        env.timeout(Duration::from_secs(120), test(env.clone())).await.expect("the test ends in time");
    });
}

/// Limits under which nothing times out by accident.
pub fn patient() -> Limits {
    Limits {
        connect_for: PATIENCE,
        silence_for: PATIENCE,
        bulk_silence_for: PATIENCE,
        guest_for: PATIENCE,
        bulk_for: PATIENCE,
        ..Limits::default()
    }
}

pub fn endpoint(env: &Env, node: NodeId) -> Endpoint {
    Endpoint::new(env, BufPool::new(0, 4 << 20), CLUSTER, node).with_limits(patient())
}

/// TLS of a node that `ca` let in.
pub fn tls(env: &Env, ca: &Ca, node: NodeId) -> Arc<Tls> {
    let key = NodeKey::new().expect("a key");
    let certificate = ca.issue(node, key.public()).expect("a certificate");
    Tls::new(env, CLUSTER, ca.certificate_pem(), &certificate, &key.pem()).expect("usable")
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connector straight into a server, counting connections.
pub struct Direct {
    pub server: Mutex<Server>,
    pub made: AtomicUsize,
}

impl Direct {
    pub fn new(server: &Server) -> Arc<Self> {
        Arc::new(Self { server: Mutex::new(server.clone()), made: AtomicUsize::new(0) })
    }

    pub fn connector(self: &Arc<Self>) -> Arc<dyn Connect> {
        let direct = Arc::clone(self);
        Arc::new(move || -> BoxFuture<'static, std::io::Result<Stream>> {
            let (ours, theirs) = Stream::memory_pair(1 << 20);
            lock(&direct.server).accept(theirs);
            direct.made.fetch_add(1, Ordering::Relaxed);
            Box::pin(async move { Ok(ours) })
        })
    }
}

/// A recording node behind a server, and a client of it.
pub struct Pair {
    pub node: Arc<Recorder>,
    pub server: Server,
    pub direct: Arc<Direct>,
    pub peer: Arc<Peer>,
    pub remote: RemoteNode,
}

pub fn pair(env: &Env) -> Pair {
    pair_of(&endpoint(env, CLIENT), &endpoint(env, SERVER))
}

pub fn pair_of(client: &Endpoint, server: &Endpoint) -> Pair {
    let node = Arc::new(Recorder::default());
    let api: Arc<dyn NodeApi> = Arc::<Recorder>::clone(&node);
    let server = Server::new(server, Services::new().with_node(api));
    let direct = Direct::new(&server);
    let peer = Peer::new(client, SERVER, &direct.connector());
    let remote = RemoteNode::new(Arc::clone(&peer));
    Pair { node, server, direct, peer, remote }
}

/// What flows through a pipe.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    Open,
    Stalled,
    Cut,
}

/// A connector through pipes that obey: one per connection, in order of their making.
#[derive(Default)]
pub struct Pipes(Mutex<Vec<watch::Sender<Flow>>>);

impl Pipes {
    pub fn connector(self: &Arc<Self>, env: &Env, server: &Server) -> Arc<dyn Connect> {
        let (pipes, env, server) = (Arc::clone(self), env.clone(), server.clone());
        Arc::new(move || -> BoxFuture<'static, std::io::Result<Stream>> {
            let (client, near) = Stream::memory_pair(1 << 16);
            let (far, accepted) = Stream::memory_pair(1 << 16);
            let (sender, flow) = watch::channel(Flow::Open);
            server.accept(accepted);
            let (near, far) = (Arc::new(near), Arc::new(far));
            let both = [(&near, &far), (&far, &near)];
            for (from, to) in both {
                let (from, to, flow) = (Arc::clone(from), Arc::clone(to), flow.clone());
                drop(env.spawn("pump", async move { pump(&from, &to, flow).await }));
            }
            lock(&pipes.0).push(sender);
            Box::pin(async move { Ok(client) })
        })
    }

    pub fn set(&self, index: usize, flow: Flow) {
        lock(&self.0)[index].send_replace(flow);
    }

    pub fn made(&self) -> usize {
        lock(&self.0).len()
    }
}

async fn pump(from: &Stream, to: &Stream, mut flow: watch::Receiver<Flow>) {
    let mut bytes = vec![0; 4096];
    loop {
        let read = tokio::select! {
            biased;
            changed = flow.wait_for(|flow| *flow == Flow::Cut) => { drop(changed); break; }
            read = from.read(&mut bytes) => read,
        };
        let Ok(count @ 1..) = read else { break };
        let may_pass = |flow: &Flow| match flow {
            Flow::Open | Flow::Cut => true,
            Flow::Stalled => false,
        };
        let is_cut = flow.wait_for(may_pass).await.is_ok_and(|flow| *flow == Flow::Cut);
        if is_cut || to.write_all(&bytes[..count]).await.is_err() {
            break;
        }
    }
    from.cut();
    to.cut();
}

/// Answers every call in a fixed way and writes down what it was asked.
#[derive(Default)]
pub struct Recorder {
    pub log: Mutex<Vec<String>>,
    /// Answered instead of what was asked.
    pub error: Mutex<Option<NodeError>>,
    /// Nothing is answered while this is true.
    pub held: watch::Sender<bool>,
    /// Calls that ended.
    pub ended: watch::Sender<usize>,
}

impl Recorder {
    fn answer<T: Send + 'static>(&self, asked: String, answer: T) -> NodeResult<T> {
        lock(&self.log).push(asked);
        let outcome = match lock(&self.error).clone() {
            Some(error) => Err(error),
            None => Ok(answer),
        };
        let (mut held, ended) = (self.held.subscribe(), self.ended.clone());
        Box::pin(async move {
            drop(held.wait_for(|held| !*held).await);
            ended.send_modify(|count| *count += 1);
            outcome
        })
    }

    pub fn asked(&self) -> usize {
        lock(&self.log).len()
    }

    /// Waits until so many calls have begun.
    pub async fn begun(&self, count: usize) {
        while self.asked() < count {
            xsan_env::yield_now().await;
        }
    }

    pub async fn ended(&self, count: usize) {
        drop(self.ended.subscribe().wait_for(|ended| *ended >= count).await);
    }
}

/// A buffer as its content, and whether a device could write it as it is.
pub fn seen(data: &[Buf]) -> String {
    let pieces: Vec<&[u8]> = data.iter().map(|piece| &**piece).collect();
    let all = pieces.concat();
    let aligned = data.iter().all(|piece| piece.is_aligned(4096));
    format!("{} bytes {} aligned {aligned}", all.len(), crc32c(&all))
}

pub fn pattern(bytes: usize) -> Buf {
    let period: Vec<u8> = (0..249).collect();
    Buf::copied(&period.repeat(bytes / 249 + 1)[..bytes])
}

pub fn segment(number: u64) -> SegmentName {
    let pg = PgId { pool: PoolId(3), index: 11 };
    SegmentName { volume: VolumeId(1), generation: Generation(4), number, pg }
}

pub fn shard(number: u64) -> ShardId {
    ShardId { segment: segment(number), index: ShardIndex(3) }
}

pub fn member() -> MemberRef {
    MemberRef { device: DeviceId(8 << 70), volume: VolumeId(1), set: set(), incarnation: Incarnation(99) }
}

pub fn set() -> SetId {
    SetId { generation: Generation(4), number: 2 }
}

pub fn sealed(number: u64) -> SealedSegment {
    SealedSegment { name: segment(number), bytes: 9 << 20, footer_offset: 8 << 20, footer_crc: Crc32c(77), holes: 5 }
}

fn info(open: bool) -> ShardInfo {
    ShardInfo { shard: shard(3), bytes: 1 << 20, hash: [open.into(); 32], open }
}

fn status() -> DeviceStatus {
    DeviceStatus {
        device: DeviceId(17),
        incarnation: Incarnation(99),
        capacity: 1 << 40,
        used: 1 << 30,
        sector: 512,
        shards: 12,
        members: 3,
        failed: true,
    }
}

impl NodeApi for Recorder {
    fn devices(&self) -> NodeResult<Vec<DeviceStatus>> {
        self.answer("devices".into(), vec![status(); 3])
    }
    fn create_member(&self, request: CreateMember) -> NodeResult<CreatedMember> {
        self.answer(format!("{request:?}"), CreatedMember { incarnation: Incarnation(99), sector: 512 })
    }
    fn append(&self, member: MemberRef, segment: SegmentName, offset: u64, data: Buf) -> NodeResult<u64> {
        let length = offset + data.len() as u64;
        self.answer(format!("append {member:?} {segment:?} {offset} {}", seen(&[data])), length)
    }
    fn flush(&self, request: FlushRequest) -> NodeResult<()> {
        self.answer(format!("{request:?}"), ())
    }
    fn confirm(&self, member: MemberRef) -> NodeResult<()> {
        self.answer(format!("confirm {member:?}"), ())
    }
    fn close(&self, device: DeviceId, volume: VolumeId, generation: Generation) -> NodeResult<Vec<ClosedMember>> {
        let replica = OpenReplica { segment: segment(9), length: 4096, complete: 512 };
        let members = [MemberState::Live, MemberState::Whole, MemberState::Flushed].map(|state| ClosedMember {
            set: set(),
            state,
            manifest: vec![sealed(1), sealed(2)],
            replicas: vec![replica],
        });
        self.answer(format!("close {device} {volume} {generation}"), members.to_vec())
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
        let asked = format!("read_replica {device} {volume} {set} {segment} {offset} {length}");
        self.answer(asked, pattern(length as usize))
    }
    fn sealed(&self, member: MemberRef, segment: SealedSegment) -> NodeResult<()> {
        self.answer(format!("sealed {member:?} {segment:?}"), ())
    }
    fn trim_manifest(&self, member: MemberRef, border: u64, undecided: Vec<u64>) -> NodeResult<()> {
        self.answer(format!("trim {member:?} {border} {undecided:?}"), ())
    }
    fn registered(&self, view: RegisterView) -> NodeResult<()> {
        self.answer(format!("{view:?}"), ())
    }
    fn put_shard(&self, request: PutShard) -> NodeResult<()> {
        let PutShard { device, shard, epoch, hash, data } = request;
        self.answer(format!("put {device} {shard} {epoch} {hash:?} {}", seen(&data)), ())
    }
    fn read_shard(&self, device: DeviceId, shard: ShardId, offset: u64, length: u32) -> NodeResult<Buf> {
        self.answer(format!("read_shard {device} {shard} {offset} {length}"), pattern(length as usize))
    }
    fn repair_shard(&self, device: DeviceId, shard: ShardId, offset: u64, data: Buf) -> NodeResult<()> {
        self.answer(format!("repair {device} {shard} {offset} {}", seen(&[data])), ())
    }
    fn hold_shard(&self, request: HoldShard) -> NodeResult<()> {
        self.answer(format!("hold {} {} {}", request.device, request.shard, request.epoch), ())
    }
    fn shard_info(&self, device: DeviceId, shard: ShardId) -> NodeResult<ShardInfo> {
        self.answer(format!("info {device} {shard}"), info(false))
    }
    fn verify_shard(&self, device: DeviceId, shard: ShardId) -> NodeResult<()> {
        self.answer(format!("verify {device} {shard}"), ())
    }
    fn delete_segments(&self, segments: Vec<SegmentName>) -> NodeResult<()> {
        self.answer(format!("delete {segments:?}"), ())
    }
    fn list_shards(
        &self,
        device: DeviceId,
        volume: VolumeId,
        after: Option<ShardId>,
        limit: u32,
    ) -> NodeResult<Vec<ShardInfo>> {
        self.answer(format!("list {device} {volume} {after:?} {limit}"), vec![info(true), info(false)])
    }
    fn append_shard(
        &self,
        device: DeviceId,
        incarnation: Incarnation,
        shard: ShardId,
        offset: u64,
        data: Vec<Buf>,
    ) -> NodeResult<u64> {
        let asked = format!("append_shard {device} {incarnation} {shard} {offset} {}", seen(&data));
        self.answer(asked, offset)
    }
    fn finish_shard(
        &self,
        device: DeviceId,
        incarnation: Incarnation,
        shard: ShardId,
        bytes: u64,
        hash: [u8; 32],
    ) -> NodeResult<()> {
        self.answer(format!("finish {device} {incarnation} {shard} {bytes} {hash:?}"), ())
    }
}
