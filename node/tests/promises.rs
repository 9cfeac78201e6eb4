//! What a node promises, on a disk in memory that crashes, loses power and fails as told.
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "a test makes its own runtime")]

use std::sync::Arc;
use xsan_env::memory::{Keep, MemoryDisk, Operation};
use xsan_env::os::OsRuntime;
use xsan_env::{Buf, BufPool, Env};
use xsan_node::{DeviceHandle, DeviceIdentity, MemoryIndex, Node, NodeConfig, ShardIndex};
use xsan_types::{
    ClusterId, Crc32c, DeviceId, Epoch, FlushRequest, Generation, MemberRef, MemberState, NodeId, PgId, RegisterView,
    SealedSegment, SegmentName, SetId, ShardId, ShardIndex as Index, VolumeId,
};
use xsan_wire::node::{CreateMember, NodeApi, NodeError, PutShard};

const DEVICE: DeviceId = DeviceId(7);
const VOLUME: VolumeId = VolumeId(1);
const EIO: i32 = 5;

/// Shared between openings: what fjall keeps over a crash of the process.
#[derive(Clone)]
struct KeptIndex(Arc<MemoryIndex>);

impl ShardIndex for KeptIndex {
    fn get(&self, shard: ShardId) -> xsan_node::shard_index::IndexResult<Option<xsan_node::format::ShardEntry>> {
        self.0.get(shard)
    }
    fn put(&self, shard: ShardId, entry: &xsan_node::format::ShardEntry) -> xsan_node::shard_index::IndexResult<()> {
        self.0.put(shard, entry)
    }
    fn remove(&self, shards: &[ShardId]) -> xsan_node::shard_index::IndexResult<()> {
        self.0.remove(shards)
    }
    fn page(
        &self,
        after: Option<ShardId>,
        limit: usize,
    ) -> xsan_node::shard_index::IndexResult<Vec<(ShardId, xsan_node::format::ShardEntry)>> {
        self.0.page(after, limit)
    }
    fn volume_page(
        &self,
        volume: VolumeId,
        after: Option<ShardId>,
        limit: usize,
    ) -> xsan_node::shard_index::IndexResult<Vec<(ShardId, xsan_node::format::ShardEntry)>> {
        self.0.volume_page(volume, after, limit)
    }
    fn persist(&self) -> xsan_node::shard_index::IndexResult<()> {
        Ok(())
    }
    fn is_new(&self) -> bool {
        false
    }
    fn filled(&self) -> xsan_node::shard_index::IndexResult<()> {
        Ok(())
    }
}

struct Bench {
    disk: MemoryDisk,
    index: KeptIndex,
}

impl Bench {
    async fn new(env: &Env, bytes: u64) -> Self {
        let disk = MemoryDisk::new(bytes, 512);
        let identity = DeviceIdentity { cluster: ClusterId(1), node: NodeId(1), device: DEVICE };
        Node::format(env, &disk.open(), identity).await.expect("a fresh disk");
        Self { disk, index: KeptIndex(Arc::default()) }
    }

    async fn open(&self, env: &Env) -> Arc<Node> {
        let handle = DeviceHandle { disk: self.disk.open(), index: Box::new(self.index.clone()) };
        let config = NodeConfig::new(ClusterId(1), NodeId(1), BufPool::new(0, 1 << 20));
        Node::open(env, config, vec![handle]).await.expect("the device opens")
    }
}

fn run<F: Future<Output = ()>>(test: impl FnOnce(Env) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async { test(OsRuntime::current()).await });
}

fn boot(id: u128) -> Env {
    OsRuntime::with_boot_id(tokio::runtime::Handle::current(), id).into_env()
}

fn set(generation: u64) -> SetId {
    SetId { generation: Generation(generation), number: 1 }
}

fn segment(number: u64) -> SegmentName {
    SegmentName { volume: VOLUME, generation: Generation(1), number, pg: PgId::default() }
}

fn bytes(seed: u8, len: usize) -> Buf {
    Buf::copied(&vec![seed; len])
}

async fn member(node: &Node) -> Result<MemberRef, NodeError> {
    let request = CreateMember { device: DEVICE, volume: VOLUME, set: set(1), manifest: Vec::new() };
    let made = node.create_member(request).await?;
    Ok(MemberRef { device: DEVICE, volume: VOLUME, set: set(1), incarnation: made.incarnation })
}

fn flush_of(at: MemberRef, replicas: Vec<(SegmentName, u64)>) -> FlushRequest {
    FlushRequest { device: DEVICE, incarnation: at.incarnation, member: Some(at), replicas, shards: Vec::new() }
}

fn line(number: u64) -> SealedSegment {
    SealedSegment { name: segment(number), bytes: 8192, footer_offset: 4096, footer_crc: Crc32c(1), holes: 0 }
}

fn shard(number: u64) -> PutShard {
    let data = bytes(number as u8, 8192);
    PutShard {
        device: DEVICE,
        shard: ShardId { segment: segment(number), index: Index(0) },
        epoch: Epoch(1),
        hash: *blake3::hash(&data).as_bytes(),
        data: vec![data],
    }
}

/// What a workload was answered before its disk failed.
#[derive(Default)]
struct Answered {
    member: bool,
    /// Contiguous length of segment 1, and of it flushed.
    length: u64,
    flushed: u64,
    shards: Vec<u64>,
    sealed: bool,
}

async fn workload(node: &Node, answered: &mut Answered) -> Result<(), NodeError> {
    let at = member(node).await?;
    answered.member = true;
    let mut offset = 0;
    for step in 0..12u64 {
        let data = bytes(step as u8 + 1, 200 << 10);
        offset = node.append(at, segment(1), offset, data).await?;
        answered.length = offset;
        if step % 4 == 3 {
            node.flush(flush_of(at, vec![(segment(1), offset)])).await?;
            answered.flushed = offset;
        }
        if step % 3 == 0 {
            node.put_shard(shard(10 + step)).await?;
            answered.shards.push(10 + step);
        }
    }
    node.append(at, segment(2), 0, bytes(9, 4096)).await?;
    node.sealed(at, line(2)).await?;
    answered.sealed = true;
    Ok(())
}

async fn check(node: &Node, answered: &Answered, length: u64, state: MemberState) {
    let closed = NodeApi::close(node, DEVICE, VOLUME, Generation(2)).await.expect("closed");
    if !answered.member {
        return;
    }
    let found = closed.iter().find(|member| member.set == set(1)).expect("the member is known");
    assert_eq!(found.state, state);
    if length > 0 {
        let replica = found.replicas.iter().find(|r| r.segment == segment(1)).expect("the replica is known");
        assert!(replica.length >= length);
        let read = node.read_replica(DEVICE, VOLUME, set(1), segment(1), 0, length as u32).await.expect("readable");
        for (at, &byte) in read.iter().enumerate() {
            assert_eq!(byte, (at / (200 << 10)) as u8 + 1, "byte {at} of {length}");
        }
    }
    for &number in &answered.shards {
        let id = ShardId { segment: segment(number), index: Index(0) };
        let read = node.read_shard(DEVICE, id, 0, 8192).await.expect("the shard is there");
        assert!(read.iter().all(|&byte| byte == number as u8));
        node.verify_shard(DEVICE, id).await.expect("its hash holds");
    }
    if answered.sealed {
        assert!(found.manifest.contains(&line(2)));
        assert!(found.replicas.iter().all(|replica| replica.segment != segment(2)), "its replica is free");
    }
}

#[test]
fn what_was_acknowledged_survives_a_crash_of_the_process_at_every_io() {
    run(|env| async move {
        for nth in 1.. {
            let bench = Bench::new(&env, 64 << 20).await;
            let node = bench.open(&env).await;
            bench.disk.fail_nth(Operation::Any, nth, EIO);
            let mut answered = Answered::default();
            let done = workload(&node, &mut answered).await.is_ok();
            node.kill().await;
            bench.disk.crash_process();
            bench.disk.heal();
            let node = bench.open(&env).await;
            check(&node, &answered, answered.length, MemberState::Whole).await;
            if done {
                assert!(nth > 30, "the loop failed many I/Os");
                return;
            }
        }
    });
}

#[test]
fn what_was_flushed_survives_power_loss_at_every_io() {
    run(|_| async move {
        for nth in 1.. {
            let before = boot(1);
            let bench = Bench::new(&before, 64 << 20).await;
            let node = bench.open(&before).await;
            bench.disk.fail_nth(Operation::Any, nth, EIO);
            let mut answered = Answered::default();
            let done = workload(&node, &mut answered).await.is_ok();
            node.kill().await;
            bench.disk.power_off(Keep::Seed(nth));
            bench.disk.heal();
            let node = bench.open(&boot(2)).await;
            check(&node, &answered, answered.flushed, MemberState::Flushed).await;
            if done {
                return;
            }
        }
    });
}

/// A disk that was unplugged while its host went on comes back under the same boot id, without what was in its cache.
#[test]
fn a_disk_that_was_unplugged_promises_no_more_than_after_a_power_loss() {
    run(|_| async move {
        let env = boot(1);
        let bench = Bench::new(&env, 64 << 20).await;
        let node = bench.open(&env).await;
        let mut answered = Answered::default();
        workload(&node, &mut answered).await.expect("nothing fails");
        node.kill().await;
        bench.disk.power_off(Keep::Nothing);
        let node = bench.open(&env).await;
        check(&node, &answered, answered.flushed, MemberState::Flushed).await;
    });
}

/// The index may outlive what it tells of: a put that is repeated must not take its word for the bytes.
#[test]
fn a_put_that_is_repeated_after_power_loss_is_there_when_it_is_answered() {
    run(|_| async move {
        for nth in 1.. {
            let before = boot(1);
            let bench = Bench::new(&before, 64 << 20).await;
            let node = bench.open(&before).await;
            bench.disk.fail_nth(Operation::Any, nth, EIO);
            let mut done = true;
            for number in 1..4 {
                done &= node.put_shard(shard(number)).await.is_ok();
            }
            node.kill().await;
            bench.disk.power_off(Keep::Seed(nth));
            bench.disk.heal();
            let node = bench.open(&boot(2)).await;
            for number in 1..4 {
                node.put_shard(shard(number)).await.expect("a repeated put");
            }
            node.kill().await;
            bench.disk.power_off(Keep::Nothing);
            let node = bench.open(&boot(3)).await;
            for number in 1..4 {
                let id = ShardId { segment: segment(number), index: Index(0) };
                node.verify_shard(DEVICE, id)
                    .await
                    .unwrap_or_else(|error| panic!("I/O {nth}, shard {number}: {error}"));
            }
            if done {
                assert!(nth > 6, "the loop failed many I/Os");
                return;
            }
        }
    });
}

#[test]
fn a_restart_closes_members_and_old_incarnations_are_refused() {
    run(|env| async move {
        let bench = Bench::new(&env, 64 << 20).await;
        let node = bench.open(&env).await;
        let at = member(&node).await.unwrap();
        node.append(at, segment(1), 0, bytes(1, 512)).await.unwrap();
        node.close().await;
        let node = bench.open(&env).await;
        assert!(matches!(node.append(at, segment(1), 512, bytes(2, 512)).await, Err(NodeError::NotLive { .. })));
        assert!(matches!(node.confirm(at).await, Err(NodeError::NotLive { .. })));
        let lengths = vec![(segment(1), 512)];
        assert!(matches!(node.flush(flush_of(at, lengths)).await, Err(NodeError::NotLive { .. })), "C4");
        assert_eq!(member(&node).await, Err(NodeError::Closed), "nothing re-opens a set");
    });
}

#[test]
fn a_closed_member_takes_nothing_and_an_older_generation_closes_nothing() {
    run(|env| async move {
        let bench = Bench::new(&env, 64 << 20).await;
        let node = bench.open(&env).await;
        let at = member(&node).await.unwrap();
        node.append(at, segment(1), 0, bytes(1, 512)).await.unwrap();
        let closed = NodeApi::close(&*node, DEVICE, VOLUME, Generation(3)).await.unwrap();
        assert_eq!(closed[0].state, MemberState::Live);
        assert_eq!(node.append(at, segment(1), 512, bytes(2, 512)).await, Err(NodeError::Closed));
        assert_eq!(node.sealed(at, line(1)).await, Err(NodeError::Closed));
        assert_eq!(node.confirm(at).await, Err(NodeError::Closed));
        assert_eq!(NodeApi::close(&*node, DEVICE, VOLUME, Generation(2)).await, Err(NodeError::Closed));
    });
}

#[test]
fn a_close_waits_for_appends_in_flight() {
    use xsan_env::memory::Fault;
    run(|env| async move {
        let bench = Bench::new(&env, 64 << 20).await;
        let node = bench.open(&env).await;
        let at = member(&node).await.unwrap();
        node.append(at, segment(1), 0, bytes(1, 512)).await.unwrap();
        bench.disk.fault_nth(Operation::Write, 1, Fault::Stall);
        let append = node.append(at, segment(1), 512, bytes(2, 512));
        let mut close = NodeApi::close(&*node, DEVICE, VOLUME, Generation(2));
        assert!(futures::poll!(&mut close).is_pending(), "the append may still be answered ok (C7)");
        bench.disk.release_stalled();
        assert_eq!(append.await, Ok(1024));
        assert!(close.await.is_ok());
    });
}

/// Found by a simulated cluster: a close answered with a replica whose `sealed` was on its way, and then it was gone.
#[test]
fn a_close_answers_with_the_replica_or_with_its_line_and_that_stays_true() {
    use xsan_env::memory::Fault;
    run(|env| async move {
        let bench = Bench::new(&env, 64 << 20).await;
        let node = bench.open(&env).await;
        let at = member(&node).await.unwrap();
        node.append(at, segment(1), 0, bytes(1, 4096)).await.unwrap();
        // The record of the line.
        bench.disk.fault_nth(Operation::Write, 1, Fault::Stall);
        let sealed = node.sealed(at, line(1));
        for _ in 0..20 {
            tokio::task::yield_now().await;
        }
        let mut close = NodeApi::close(&*node, DEVICE, VOLUME, Generation(2));
        assert!(futures::poll!(&mut close).is_pending(), "answered while the line is on its way");
        bench.disk.release_stalled();
        let closed = close.await.unwrap();
        let listed: Vec<_> = closed[0].manifest.iter().map(|line| line.name).collect();
        assert!(listed == [segment(1)] && closed[0].replicas.is_empty(), "{closed:?}");
        assert_eq!(sealed.await, Err(NodeError::Closed));
    });
}

#[test]
fn a_flush_that_began_earlier_does_not_count() {
    use xsan_env::memory::Fault;
    run(|env| async move {
        let bench = Bench::new(&env, 64 << 20).await;
        let node = bench.open(&env).await;
        let at = member(&node).await.unwrap();
        node.append(at, segment(1), 0, bytes(1, 512)).await.unwrap();
        bench.disk.fault_nth(Operation::Flush, 1, Fault::Stall);
        let mut first = node.flush(flush_of(at, vec![(segment(1), 512)]));
        assert!(futures::poll!(&mut first).is_pending());
        // Until the device flush of the first request has begun.
        while bench.disk.in_flight() == 0 {
            xsan_env::yield_now().await;
        }
        node.append(at, segment(1), 512, bytes(2, 512)).await.unwrap();
        let mut second = node.flush(flush_of(at, vec![(segment(1), 1024)]));
        assert!(futures::poll!(&mut second).is_pending());
        for _ in 0..10 {
            xsan_env::yield_now().await;
        }
        let before = bench.disk.counters().flushes;
        bench.disk.release_stalled();
        assert!(first.await.is_ok() && second.await.is_ok());
        assert_eq!(bench.disk.counters().flushes, before + 1, "one more flush for what came later (H7)");
    });
}

#[test]
fn a_full_device_says_so_and_seals_go_on() {
    run(|env| async move {
        let bench = Bench::new(&env, 64 << 20).await;
        let node = bench.open(&env).await;
        let at = member(&node).await.unwrap();
        let mut offset = 0;
        let full = loop {
            match node.append(at, segment(1), offset, bytes(1, 1 << 20)).await {
                Ok(length) => offset = length,
                Err(error) => break error,
            }
        };
        assert_eq!(full, NodeError::NoSpace);
        node.put_shard(shard(5)).await.expect("the reserve is for seals");
        let read = node.read_replica(DEVICE, VOLUME, set(1), segment(1), 0, 4096).await.unwrap();
        assert!(read.iter().all(|&byte| byte == 1), "nothing is lost");
        node.sealed(at, line(1)).await.unwrap();
        node.append(at, segment(2), 0, bytes(1, 1 << 20)).await.expect("room again");
    });
}

/// Found by the simulated cluster: a register that was taken and has no set yet looked like one that was handed over, and nodes that learned of
/// it late freed the members of the set that had been registered meanwhile.
#[test]
fn an_old_view_of_the_register_frees_nothing_that_was_made_later() {
    run(|env| async move {
        let bench = Bench::new(&env, 64 << 20).await;
        let node = bench.open(&env).await;
        let at = member(&node).await.unwrap();
        node.append(at, segment(1), 0, bytes(1, 4096)).await.unwrap();
        let incarnation = node.devices().await.unwrap()[0].incarnation;
        let rows = ShardId { segment: segment(77), index: Index(1) };
        node.append_shard(DEVICE, incarnation, rows, 0, vec![bytes(3, 65536)]).await.unwrap();
        let used = node.devices().await.unwrap()[0].used;
        let taken = |generation| RegisterView { volume: VOLUME, generation, set: None, deleted: false };
        node.registered(taken(at.set.generation)).await.unwrap();
        node.append(at, segment(1), 4096, bytes(2, 4096)).await.expect("its set may be registered by now");
        node.append_shard(DEVICE, incarnation, rows, 65536, vec![bytes(3, 65536)]).await.expect("and its rows count");
        assert_eq!(node.devices().await.unwrap()[0].used, used);
        node.registered(taken(at.set.generation.next())).await.unwrap();
        assert_eq!(node.devices().await.unwrap()[0].used, 0, "what the next owner finds handed over is garbage");
    });
}

#[test]
fn a_deleted_volume_gives_all_its_space_back_at_once() {
    run(|env| async move {
        let bench = Bench::new(&env, 64 << 20).await;
        let node = bench.open(&env).await;
        let mut answered = Answered::default();
        workload(&node, &mut answered).await.unwrap();
        let incarnation = node.devices().await.unwrap()[0].incarnation;
        let rows = ShardId { segment: segment(77), index: Index(1) };
        node.append_shard(DEVICE, incarnation, rows, 0, vec![bytes(3, 65536)]).await.unwrap();
        assert!(node.devices().await.unwrap()[0].used > 0);
        let view = RegisterView { volume: VOLUME, generation: Generation(2), set: None, deleted: true };
        node.registered(view).await.unwrap();
        assert_eq!(node.devices().await.unwrap()[0].used, 0);
        assert_eq!(member(&node).await, Err(NodeError::Closed), "nothing of it is taken any more");
        node.kill().await;
        let node = bench.open(&env).await;
        assert_eq!(node.devices().await.unwrap()[0].used, 0, "also after a restart");
    });
}

#[test]
fn open_shards_become_sealed_ones_in_place() {
    run(|env| async move {
        let bench = Bench::new(&env, 64 << 20).await;
        let node = bench.open(&env).await;
        let incarnation = node.devices().await.unwrap()[0].incarnation;
        let id = ShardId { segment: segment(3), index: Index(2) };
        let parts = [bytes(1, 65536), bytes(2, 65536), bytes(3, 4096)];
        let mut hasher = blake3::Hasher::new();
        let mut offset = 0;
        for part in &parts {
            hasher.update(part);
            offset = node.append_shard(DEVICE, incarnation, id, offset, vec![part.clone()]).await.unwrap();
        }
        let hash = *hasher.finalize().as_bytes();
        assert!(node.shard_info(DEVICE, id).await.unwrap().open);
        assert!(node.finish_shard(DEVICE, incarnation, id, offset - 4096, hash).await.is_err(), "not its length");
        node.finish_shard(DEVICE, incarnation, id, offset, hash).await.unwrap();
        node.finish_shard(DEVICE, incarnation, id, offset, hash).await.expect("a repeat is a no-op");
        node.verify_shard(DEVICE, id).await.unwrap();
        node.kill().await;
        bench.disk.power_off(Keep::Nothing);
        let node = bench.open(&env).await;
        let read = node.read_shard(DEVICE, id, 65536, 4096).await.unwrap();
        assert!(read.iter().all(|&byte| byte == 2));
    });
}

#[test]
fn a_lost_shard_index_is_found_again_on_the_device() {
    run(|env| async move {
        let mut bench = Bench::new(&env, 64 << 20).await;
        let node = bench.open(&env).await;
        for number in 1..20 {
            node.put_shard(shard(number)).await.unwrap();
        }
        node.delete_segments(vec![segment(4)]).await.unwrap();
        node.close().await;
        bench.index = KeptIndex(Arc::default());
        let handle = DeviceHandle { disk: bench.disk.open(), index: Box::<MemoryIndex>::default() };
        let config = NodeConfig::new(ClusterId(1), NodeId(1), BufPool::new(0, 1 << 20));
        let node = Node::open(&env, config, vec![handle]).await.unwrap();
        for number in (1..20).filter(|&number| number != 4) {
            let id = ShardId { segment: segment(number), index: Index(0) };
            node.verify_shard(DEVICE, id).await.expect("found again");
        }
        let id = ShardId { segment: segment(4), index: Index(0) };
        assert_eq!(node.verify_shard(DEVICE, id).await, Err(NodeError::NotFound), "the log remembers the deletion");
    });
}

#[test]
fn a_device_of_another_cluster_and_a_damaged_log_are_refused() {
    run(|env| async move {
        let bench = Bench::new(&env, 64 << 20).await;
        let node = bench.open(&env).await;
        let mut answered = Answered::default();
        workload(&node, &mut answered).await.unwrap();
        node.close().await;
        let open = |cluster| {
            let handle = DeviceHandle { disk: bench.disk.open(), index: Box::new(bench.index.clone()) };
            let config = NodeConfig::new(ClusterId(cluster), NodeId(1), BufPool::new(0, 1 << 20));
            Node::open(&env, config, vec![handle])
        };
        assert!(matches!(open(2).await.err(), Some(xsan_node::NodeOpenError::OtherCluster { .. })));
        // The first frame of the half that the node began at its start, with flushed ones behind it: not a torn tail.
        let half = xsan_node::format::LOG_OFFSET + (1 << 20);
        bench.disk.flip_bit(half + 100, 3);
        assert!(matches!(open(1).await.err(), Some(xsan_node::NodeOpenError::LogDamaged { .. })));
        bench.disk.flip_bit(half + 100, 3);
        for offset in xsan_node::format::SUPERBLOCK_OFFSETS {
            bench.disk.flip_bit(offset + 20, 1);
            assert!(open(1).await.is_ok(), "one superblock is enough, and writes the other anew");
        }
        xsan_node::format::SUPERBLOCK_OFFSETS.into_iter().for_each(|offset| bench.disk.flip_bit(offset + 20, 1));
        assert!(matches!(open(1).await.err(), Some(xsan_node::NodeOpenError::SuperblockDamaged)));
    });
}

#[test]
fn the_log_goes_on_in_its_other_half() {
    run(|env| async move {
        let bench = Bench::new(&env, 64 << 20).await;
        let node = bench.open(&env).await;
        let at = member(&node).await.unwrap();
        node.append(at, segment(1), 0, bytes(1, 4096)).await.unwrap();
        // Each frame takes a sector of the half's 1 MiB: this fills it more than twice.
        for number in 0..4500u64 {
            node.trim_manifest(at, number, Vec::new()).await.unwrap();
        }
        node.sealed(at, line(9)).await.unwrap();
        node.kill().await;
        bench.disk.power_off(Keep::Seed(3));
        let node = bench.open(&boot(9)).await;
        let closed = NodeApi::close(&*node, DEVICE, VOLUME, Generation(2)).await.unwrap();
        assert_eq!(closed[0].manifest, vec![line(9)]);
        assert_eq!(closed[0].replicas.len(), 1);
    });
}

#[test]
fn growths_that_overlap_are_found_in_their_places_after_a_crash() {
    // Several workers: the log records of the growths come from tasks that may overtake each other.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let env = OsRuntime::current();
        for round in 0..30u8 {
            let bench = Bench::new(&env, 128 << 20).await;
            let node = bench.open(&env).await;
            let at = member(&node).await.unwrap();
            let piece = 1 << 20;
            let appends = (0..12u8).map(|i| node.append(at, segment(1), u64::from(i) << 20, bytes(i + 1, piece)));
            let rows = ShardId { segment: segment(2), index: Index(0) };
            let shards = (0..12u8).map(|i| {
                let data = vec![bytes(i + 101, piece)];
                node.append_shard(DEVICE, at.incarnation, rows, u64::from(i) << 20, data)
            });
            let (appends, shards): (Vec<_>, Vec<_>) = (appends.collect(), shards.collect());
            let appended = futures::future::try_join_all(appends).await.expect("appended");
            let grown = futures::future::try_join_all(shards).await.expect("appended");
            assert_eq!((appended.iter().max(), grown.iter().max()), (Some(&(12 << 20)), Some(&(12 << 20))));
            node.kill().await;
            bench.disk.crash_process();
            let node = bench.open(&env).await;
            for i in 0..12u8 {
                let offset = u64::from(i) << 20;
                let read = node.read_replica(DEVICE, VOLUME, set(1), segment(1), offset, 4096).await.expect("read");
                assert!(read.iter().all(|&byte| byte == i + 1), "round {round}: {} at MiB {i} of the replica", read[0]);
                let read = node.read_shard(DEVICE, rows, offset, 4096).await.expect("read");
                assert!(read.iter().all(|&byte| byte == i + 101), "round {round}: {} at MiB {i} of the rows", read[0]);
            }
        }
    });
}

/// An index that loses what was not persisted, and whose puts wait for a gate.
#[derive(Clone, Default)]
struct SlowIndex(Arc<Slow>);

#[derive(Default)]
struct Slow {
    now: MemoryIndex,
    persisted: MemoryIndex,
    persists: std::sync::atomic::AtomicUsize,
    puts: std::sync::Mutex<(usize, bool)>,
    opened: std::sync::Condvar,
}

impl ShardIndex for SlowIndex {
    fn get(&self, shard: ShardId) -> xsan_node::shard_index::IndexResult<Option<xsan_node::format::ShardEntry>> {
        self.0.now.get(shard)
    }
    fn put(&self, shard: ShardId, entry: &xsan_node::format::ShardEntry) -> xsan_node::shard_index::IndexResult<()> {
        let mut puts = self.0.puts.lock().unwrap();
        puts.0 += 1;
        let _open = self.0.opened.wait_while(puts, |puts| !puts.1).unwrap();
        self.0.now.put(shard, entry)
    }
    fn remove(&self, shards: &[ShardId]) -> xsan_node::shard_index::IndexResult<()> {
        self.0.now.remove(shards)
    }
    fn page(
        &self,
        after: Option<ShardId>,
        limit: usize,
    ) -> xsan_node::shard_index::IndexResult<Vec<(ShardId, xsan_node::format::ShardEntry)>> {
        self.0.now.page(after, limit)
    }
    fn volume_page(
        &self,
        volume: VolumeId,
        after: Option<ShardId>,
        limit: usize,
    ) -> xsan_node::shard_index::IndexResult<Vec<(ShardId, xsan_node::format::ShardEntry)>> {
        self.0.now.volume_page(volume, after, limit)
    }
    fn persist(&self) -> xsan_node::shard_index::IndexResult<()> {
        for (shard, entry) in self.0.now.page(None, 1024)? {
            self.0.persisted.put(shard, &entry)?;
        }
        self.0.persists.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        Ok(())
    }
    fn is_new(&self) -> bool {
        false
    }
    fn filled(&self) -> xsan_node::shard_index::IndexResult<()> {
        Ok(())
    }
}

#[test]
fn a_shard_on_its_way_into_the_index_is_not_lost_by_a_new_log_half() {
    run(|env| async move {
        let bench = Bench::new(&env, 64 << 20).await;
        let index = SlowIndex::default();
        let open = async |env: &Env, index: Box<dyn ShardIndex>| {
            let handle = DeviceHandle { disk: bench.disk.open(), index };
            let config = NodeConfig::new(ClusterId(1), NodeId(1), BufPool::new(0, 1 << 20));
            Node::open(env, config, vec![handle]).await.expect("the device opens")
        };
        let node = open(&boot(1), Box::new(index.clone())).await;
        let at = member(&node).await.unwrap();
        let put = tokio::spawn(node.put_shard(shard(7)));
        while index.0.puts.lock().unwrap().0 == 0 {
            tokio::task::yield_now().await;
        }
        // Its log record stands, the index does not show it: readers find it nevertheless.
        let id = ShardId { segment: segment(7), index: Index(0) };
        assert!(node.read_shard(DEVICE, id, 0, 4096).await.expect("readable").iter().all(|&byte| byte == 7));
        let mut number = 0;
        while index.0.persists.load(std::sync::atomic::Ordering::SeqCst) == 0 {
            number += 1;
            node.trim_manifest(at, number, Vec::new()).await.unwrap();
        }
        index.0.puts.lock().unwrap().1 = true;
        index.0.opened.notify_all();
        put.await.unwrap().expect("acknowledged");
        node.kill().await;
        bench.disk.power_off(Keep::Nothing);
        let kept = SlowIndex::default();
        kept.0.puts.lock().unwrap().1 = true;
        for (shard, entry) in index.0.persisted.page(None, 1024).unwrap() {
            kept.put(shard, &entry).unwrap();
        }
        let node = open(&boot(2), Box::new(kept)).await;
        node.verify_shard(DEVICE, id).await.expect("the shard that was acknowledged");
    });
}
