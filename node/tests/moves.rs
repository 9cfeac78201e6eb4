//! What a node promises about positions that move to another device and back (P11, RFC 0006).
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "a test makes its own runtime")]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::task::Poll;
use xsan_env::memory::{Fault, Keep, MemoryDisk, Operation};
use xsan_env::os::OsRuntime;
use xsan_env::{Buf, BufPool, Env};
use xsan_node::format::ShardEntry;
use xsan_node::shard_index::IndexResult;
use xsan_node::{Assignment, DeviceHandle, DeviceIdentity, MemoryIndex, Node, NodeConfig, ShardIndex};
use xsan_types::{
    ClusterId, DeviceId, Epoch, Generation, Incarnation, NodeId, PgId, SegmentName, ShardId, ShardIndex as Index,
    VolumeId,
};
use xsan_wire::node::{HoldShard, NodeApi, NodeError, PutShard};

const DEVICE: DeviceId = DeviceId(7);
/// Not open, and out.
const GIVEN_UP: DeviceId = DeviceId(8);
/// Not open.
const MISSING: DeviceId = DeviceId(9);
const VOLUME: VolumeId = VolumeId(1);

/// Shared between openings: what fjall keeps over a crash of the process.
#[derive(Clone, Default)]
struct KeptIndex(Arc<MemoryIndex>);

impl ShardIndex for KeptIndex {
    fn get(&self, shard: ShardId) -> IndexResult<Option<ShardEntry>> {
        self.0.get(shard)
    }
    fn put(&self, shard: ShardId, entry: &ShardEntry) -> IndexResult<()> {
        self.0.put(shard, entry)
    }
    fn remove(&self, shards: &[ShardId]) -> IndexResult<()> {
        self.0.remove(shards)
    }
    fn page(&self, after: Option<ShardId>, limit: usize) -> IndexResult<Vec<(ShardId, ShardEntry)>> {
        self.0.page(after, limit)
    }
    fn volume_page(
        &self,
        volume: VolumeId,
        after: Option<ShardId>,
        limit: usize,
    ) -> IndexResult<Vec<(ShardId, ShardEntry)>> {
        self.0.volume_page(volume, after, limit)
    }
    fn persist(&self) -> IndexResult<()> {
        Ok(())
    }
    fn is_new(&self) -> bool {
        false
    }
    fn filled(&self) -> IndexResult<()> {
        Ok(())
    }
}

/// A map in which these positions, told by the segment's number, are another device's.
struct Map {
    epoch: u64,
    elsewhere: BTreeSet<u64>,
}

impl Assignment for Map {
    fn epoch(&self) -> Epoch {
        Epoch(self.epoch)
    }
    fn is_elsewhere(&self, device: DeviceId, shard: ShardId) -> bool {
        device == DEVICE && self.elsewhere.contains(&shard.segment.number)
    }
    fn is_given_up(&self, device: DeviceId) -> bool {
        device == GIVEN_UP
    }
}

struct Bench {
    env: Env,
    disk: MemoryDisk,
    index: KeptIndex,
    node: Arc<Node>,
}

impl Bench {
    async fn new(env: Env) -> Self {
        let disk = MemoryDisk::new(64 << 20, 512);
        let identity = DeviceIdentity { cluster: ClusterId(1), node: NodeId(1), device: DEVICE };
        Node::format(&env, &disk.open(), identity).await.expect("a fresh disk");
        let index = KeptIndex::default();
        let node = open(&env, &disk, &index).await;
        Self { env, disk, index, node }
    }

    /// Another process; `keep`: after power loss.
    async fn restart(&mut self, keep: Option<Keep>) {
        self.node.kill().await;
        if let Some(keep) = keep {
            self.disk.power_off(keep);
        }
        self.node = open(&self.env, &self.disk, &self.index).await;
    }

    fn map(&self, epoch: u64, elsewhere: impl IntoIterator<Item = u64>) {
        let map: Arc<dyn Assignment> = Arc::new(Map { epoch, elsewhere: elsewhere.into_iter().collect() });
        self.node.set_map(&map);
    }

    async fn used(&self) -> u64 {
        self.node.devices().await.unwrap()[0].used
    }

    async fn incarnation(&self) -> Incarnation {
        self.node.devices().await.unwrap()[0].incarnation
    }

    async fn is_there(&self, number: u64) -> bool {
        match self.node.verify_shard(DEVICE, id(number)).await {
            Ok(()) => true,
            Err(NodeError::NotFound) => false,
            Err(error) => panic!("{number}: {error}"),
        }
    }
}

async fn open(env: &Env, disk: &MemoryDisk, index: &KeptIndex) -> Arc<Node> {
    let handle = DeviceHandle { disk: disk.open(), index: Box::new(index.clone()) };
    let config = NodeConfig::new(ClusterId(1), NodeId(1), BufPool::new(0, 1 << 20));
    Node::open(env, config, vec![handle]).await.expect("the device opens")
}

fn run<F: Future<Output = ()>>(test: impl FnOnce(Env) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async { test(OsRuntime::current()).await });
}

/// Lets everything run that can, also calls into the index.
async fn rest(disk: &MemoryDisk, in_flight: usize) {
    while disk.in_flight() < in_flight {
        tokio::task::yield_now().await;
    }
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
}

fn id(number: u64) -> ShardId {
    let segment = SegmentName { volume: VOLUME, generation: Generation(1), number, pg: PgId::default() };
    ShardId { segment, index: Index(0) }
}

fn body(number: u64) -> Buf {
    Buf::copied(&vec![number as u8; 8192])
}

fn hash(number: u64) -> [u8; 32] {
    *blake3::hash(&body(number)).as_bytes()
}

fn put(number: u64, epoch: u64) -> PutShard {
    PutShard { device: DEVICE, shard: id(number), epoch: Epoch(epoch), hash: hash(number), data: vec![body(number)] }
}

fn hold(number: u64, epoch: u64) -> HoldShard {
    HoldShard { device: DEVICE, shard: id(number), epoch: Epoch(epoch), hash: hash(number) }
}

fn stale<T>(current: u64) -> Result<T, NodeError> {
    Err(NodeError::StaleEpoch { current: Epoch(current) })
}

#[test]
fn what_is_written_under_an_old_map_to_a_position_of_others_is_refused() {
    run(|env| async move {
        let bench = Bench::new(env).await;
        let (node, incarnation) = (&bench.node, bench.incarnation().await);
        let append = |number, offset| node.append_shard(DEVICE, incarnation, id(number), offset, vec![body(1)]);
        append(5, 0).await.unwrap();
        bench.map(4, [1, 5, 6]);
        for epoch in [0, 3, 4] {
            assert_eq!(node.put_shard(put(1, epoch)).await, stale(4), "a writer that knows map {epoch}");
        }
        assert!(!bench.is_there(1).await);
        node.put_shard(put(2, 1)).await.expect("its own position, under whatever map");
        node.put_shard(put(1, 5)).await.expect("the writer knows more than the node");
        assert!(bench.is_there(1).await);
        assert_eq!(append(6, 0).await, stale(4), "rows are begun under the new map");
        assert_eq!(append(5, 8192).await, Ok(16384), "and end where they were begun");
        bench.map(3, [2]);
        node.put_shard(put(2, 3)).await.expect("an older map changes nothing");
    });
}

#[test]
fn what_is_absent_says_so_only_where_the_position_is_its_own() {
    run(|env| async move {
        let bench = Bench::new(env).await;
        bench.node.put_shard(put(3, 1)).await.unwrap();
        bench.map(4, [1, 3]);
        assert_eq!(bench.node.read_shard(DEVICE, id(1), 0, 4096).await.map(drop), stale(4));
        assert_eq!(bench.node.shard_info(DEVICE, id(1)).await.map(drop), stale(4));
        assert_eq!(bench.node.read_shard(DEVICE, id(2), 0, 4096).await.map(drop), Err(NodeError::NotFound));
        assert_eq!(bench.node.shard_info(DEVICE, id(2)).await.map(drop), Err(NodeError::NotFound));
        bench.node.read_shard(DEVICE, id(3), 0, 4096).await.expect("what is still here is read here");
    });
}

/// Whoever recovers a volume waits for a member that does not answer, and counts one that knows nothing as lost.
#[test]
fn of_a_device_that_is_not_open_nothing_is_said_unless_it_was_given_up() {
    run(|env| async move {
        let bench = Bench::new(env).await;
        let of = |device| NodeApi::close(&*bench.node, device, VOLUME, Generation(2));
        assert_eq!(of(GIVEN_UP).await.expect_err("not here"), NodeError::DeviceFailed, "no map says so yet");
        bench.map(1, []);
        assert_eq!(of(GIVEN_UP).await.expect_err("not here"), NodeError::NotFound);
        assert_eq!(of(MISSING).await.expect_err("not here"), NodeError::DeviceFailed);
        assert!(of(DEVICE).await.expect("it is here").is_empty());
        bench.node.remove_device(DEVICE).await;
        assert_eq!(of(DEVICE).await.expect_err("not here any more"), NodeError::DeviceFailed);
    });
}

#[test]
fn settling_waits_for_puts_that_were_let_in_before() {
    run(|env| async move {
        let bench = Bench::new(env).await;
        bench.disk.fault_nth(Operation::Write, 1, Fault::Stall);
        let put_before = bench.node.put_shard(put(1, 1));
        rest(&bench.disk, 1).await;
        bench.map(4, [1]);
        let mut settled = std::pin::pin!(bench.node.settle(DEVICE));
        for _ in 0..50 {
            assert!(futures::poll!(&mut settled).is_pending(), "the list would lack the shard");
            tokio::task::yield_now().await;
        }
        bench.disk.release_stalled();
        assert_eq!(settled.await, Ok(Vec::new()));
        let listed = bench.node.list_shards(DEVICE, VOLUME, None, 10).await.unwrap();
        assert_eq!(listed.len(), 1, "what was let in is listed");
        put_before.await.unwrap();
    });
}

#[test]
fn a_shard_that_is_being_finished_is_open_or_listed_for_whoever_settles() {
    run(|env| async move {
        // At every I/O of the finish.
        for (operation, nth) in [(Operation::Write, 1), (Operation::Write, 2), (Operation::Flush, 1)] {
            let bench = Bench::new(env.clone()).await;
            let incarnation = bench.incarnation().await;
            bench.node.append_shard(DEVICE, incarnation, id(1), 0, vec![body(1)]).await.unwrap();
            bench.map(4, [1]);
            bench.disk.fault_nth(operation, nth, Fault::Stall);
            let finish = bench.node.finish_shard(DEVICE, incarnation, id(1), 8192, hash(1));
            rest(&bench.disk, 1).await;
            let mut settled = std::pin::pin!(bench.node.settle(DEVICE));
            let early = futures::poll!(&mut settled);
            let list = || bench.node.list_shards(DEVICE, VOLUME, None, 10);
            let (open, listed) = match early {
                Poll::Ready(open) => (open, list().await.unwrap()),
                Poll::Pending => {
                    bench.disk.heal();
                    (settled.await, list().await.unwrap())
                }
            };
            bench.disk.heal();
            assert!(open == Ok(vec![id(1)]) || listed.len() == 1, "{operation:?} {nth}: nobody would carry it");
            finish.await.unwrap();
            assert_eq!(bench.node.settle(DEVICE).await, Ok(Vec::new()));
        }
    });
}

#[test]
fn open_shards_that_nobody_can_finish_keep_the_move_from_its_end_until_they_are_freed() {
    run(|env| async move {
        let mut bench = Bench::new(env).await;
        let incarnation = bench.incarnation().await;
        bench.node.append_shard(DEVICE, incarnation, id(1), 0, vec![body(1)]).await.unwrap();
        bench.map(4, [1]);
        NodeApi::close(&*bench.node, DEVICE, VOLUME, Generation(2)).await.unwrap();
        assert_eq!(bench.node.settle(DEVICE).await, Ok(vec![id(1)]), "who takes over has not read it yet");
        bench.restart(None).await;
        bench.map(4, [1]);
        assert_eq!(bench.node.settle(DEVICE).await, Ok(vec![id(1)]), "of the process before");
        bench.node.read_shard(DEVICE, id(1), 0, 4096).await.expect("found where it was begun");
        let view = xsan_types::RegisterView { volume: VOLUME, generation: Generation(2), set: None, deleted: false };
        bench.node.registered(view).await.unwrap();
        assert_eq!(bench.node.settle(DEVICE).await, Ok(Vec::new()));
    });
}

#[test]
fn what_somebody_put_or_asked_for_under_a_newer_map_is_not_freed() {
    run(|env| async move {
        for asks in [false, true] {
            let bench = Bench::new(env.clone()).await;
            bench.node.put_shard(put(1, 1)).await.unwrap();
            bench.node.put_shard(put(2, 1)).await.unwrap();
            bench.map(4, [1]);
            if asks {
                bench.node.hold_shard(hold(1, 5)).await.unwrap();
            } else {
                bench.node.put_shard(put(1, 5)).await.unwrap();
            }
            assert_eq!(bench.node.free_misplaced(DEVICE, vec![id(1)], Epoch(4)).await, stale(5));
            assert!(bench.is_there(1).await);
            bench.node.free_misplaced(DEVICE, vec![id(1)], Epoch(5)).await.expect("decided under that map");
            assert!(!bench.is_there(1).await && bench.is_there(2).await);
        }
    });
}

#[test]
fn a_put_that_found_its_shard_while_it_is_freed_writes_it_anew() {
    run(|env| async move {
        let mut bench = Bench::new(env).await;
        bench.node.put_shard(put(1, 1)).await.unwrap();
        bench.map(4, [1]);
        // The free has looked at the newest map and holds its place; its log record is on the way.
        bench.disk.fault_nth(Operation::Write, 1, Fault::Stall);
        let freed = bench.node.free_misplaced(DEVICE, vec![id(1)], Epoch(4));
        rest(&bench.disk, 1).await;
        // The position comes back.
        let mut back = bench.node.put_shard(put(1, 5));
        for _ in 0..50 {
            assert!(futures::poll!(&mut back).is_pending(), "answered for a shard that is going");
            tokio::task::yield_now().await;
        }
        bench.disk.release_stalled();
        freed.await.unwrap();
        back.await.unwrap();
        assert!(bench.is_there(1).await);
        bench.restart(Some(Keep::Nothing)).await;
        assert!(bench.is_there(1).await, "what was answered is stable");
    });
}

#[test]
fn a_free_waits_until_it_can_see_the_put_that_came_before_it() {
    run(|env| async move {
        let bench = Bench::new(env).await;
        bench.node.put_shard(put(1, 1)).await.unwrap();
        bench.map(4, [1]);
        // The put has found its shard and flushes.
        bench.disk.fault_nth(Operation::Flush, 1, Fault::Stall);
        let back = bench.node.put_shard(put(1, 5));
        rest(&bench.disk, 1).await;
        let freed = bench.node.free_misplaced(DEVICE, vec![id(1)], Epoch(4));
        assert_eq!(freed.await, stale(5));
        bench.disk.release_stalled();
        back.await.unwrap();
        assert!(bench.is_there(1).await);
    });
}

#[test]
fn a_shard_is_held_only_with_the_very_bytes() {
    run(|env| async move {
        let bench = Bench::new(env).await;
        bench.node.put_shard(put(1, 1)).await.unwrap();
        bench.node.hold_shard(hold(1, 1)).await.unwrap();
        assert_eq!(bench.node.hold_shard(hold(2, 1)).await, Err(NodeError::NotFound));
        let other = HoldShard { hash: hash(2), ..hold(1, 1) };
        assert_eq!(bench.node.hold_shard(other).await, Err(NodeError::NotFound));
        let incarnation = bench.incarnation().await;
        bench.node.append_shard(DEVICE, incarnation, id(3), 0, vec![body(3)]).await.unwrap();
        assert_eq!(bench.node.hold_shard(hold(3, 1)).await, Err(NodeError::NotFound), "not sealed");
        bench.map(4, [1]);
        assert_eq!(bench.node.hold_shard(hold(1, 4)).await, stale(4), "it may be freed here at any time");
    });
}

#[test]
fn a_shard_that_is_held_survives_power_loss() {
    run(|env| async move {
        let mut bench = Bench::new(env).await;
        bench.disk.fault_nth(Operation::Flush, 1, Fault::Stall);
        let slow = bench.node.put_shard(put(1, 1));
        rest(&bench.disk, 1).await;
        let mut held = bench.node.hold_shard(hold(1, 1));
        let mut answer = Poll::Pending;
        for _ in 0..200 {
            if answer.is_pending() {
                answer = futures::poll!(&mut held);
            }
            tokio::task::yield_now().await;
        }
        bench.disk.power_off(Keep::Nothing);
        bench.restart(None).await;
        // Whoever was told so has freed the only other copy.
        assert!(answer != Poll::Ready(Ok(())) || bench.is_there(1).await, "held, and gone after power loss");
        drop(slow);
    });
}

#[test]
fn what_was_freed_stays_free_after_a_restart_and_power_loss() {
    run(|env| async move {
        for keep in [None, Some(Keep::All), Some(Keep::Nothing)] {
            let mut bench = Bench::new(env.clone()).await;
            for number in 1..=3 {
                bench.node.put_shard(put(number, 1)).await.unwrap();
            }
            let unsynced = KeptIndex::default();
            for (shard, entry) in bench.index.page(None, 10).unwrap() {
                unsynced.put(shard, &entry).unwrap();
            }
            bench.map(4, [1, 2]);
            bench.node.free_misplaced(DEVICE, vec![id(1), id(2)], Epoch(4)).await.unwrap();
            bench.map(5, []);
            // Stable with the flush of this one; and what comes back after the free stays.
            bench.node.put_shard(put(2, 5)).await.unwrap();
            // Of the shard index nothing has reached the disk since.
            bench.index = unsynced;
            let used = bench.used().await;
            bench.restart(keep).await;
            assert!(!bench.is_there(1).await && bench.is_there(2).await && bench.is_there(3).await, "{keep:?}");
            assert_eq!(bench.used().await, used, "{keep:?}");
        }
    });
}

#[test]
fn the_space_of_what_is_freed_is_given_back_exactly_once() {
    run(|env| async move {
        let bench = Bench::new(env).await;
        bench.node.put_shard(put(9, 1)).await.unwrap();
        let used = bench.used().await;
        for number in 1..=4 {
            bench.node.put_shard(put(number, 1)).await.unwrap();
        }
        let full = bench.used().await;
        bench.map(4, [1, 2, 3, 4]);
        let free = |numbers: &[u64]| {
            bench.node.free_misplaced(DEVICE, numbers.iter().map(|&number| id(number)).collect(), Epoch(4))
        };
        free(&[1, 2]).await.unwrap();
        assert_eq!(bench.used().await, used + (full - used) / 2);
        free(&[1, 2]).await.expect("a repeat is a no-op");
        free(&[77]).await.expect("so is what was never here");
        assert_eq!(bench.used().await, used + (full - used) / 2);
        free(&[3, 4, 1]).await.unwrap();
        assert_eq!(bench.used().await, used);
        assert_eq!(bench.node.devices().await.unwrap()[0].shards, 1);
        assert!(bench.is_there(9).await);
    });
}
