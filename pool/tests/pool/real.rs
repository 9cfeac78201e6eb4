//! The same promises on storage nodes as they run, over disks in memory.

use crate::cluster::{Dice, aligned, device, schemes, segment};
use lsm_block::store::{Check, Holes, SegmentRead, SegmentStore, StoreError};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use xsan_env::{Buf, BufPool, Env, MemoryDisk, OsRuntime};
use xsan_node::{DeviceHandle, DeviceIdentity, MemoryIndex, Node, NodeConfig};
use xsan_pool::{DeviceView, Pool, PoolConfig, PoolView};
use xsan_types::{ClusterId, Epoch, NodeId, PoolId, Scheme, SegmentName, ShardId, ShardIndex, UNIT_BYTES, crc32c};
use xsan_wire::node::NodeApi;

const DISK_BYTES: u64 = 128 << 20;
const UNIT: usize = UNIT_BYTES as usize;

struct Real {
    env: Env,
    pool: Pool,
    disks: Vec<MemoryDisk>,
    nodes: Vec<Arc<Node>>,
    view: PoolView,
}

async fn open(env: &Env, number: usize, disk: &MemoryDisk) -> Arc<Node> {
    let config = NodeConfig::new(ClusterId(1), NodeId(number as u32 + 1), BufPool::new(0, 4 << 20));
    let handle = DeviceHandle { disk: disk.open(), index: Box::<MemoryIndex>::default() };
    Node::open(env, config, vec![handle]).await.unwrap()
}

impl Real {
    async fn new(scheme: Scheme) -> Self {
        let env = OsRuntime::current();
        let (mut disks, mut nodes, mut devices) = (Vec::new(), Vec::new(), BTreeMap::new());
        for number in 0..scheme.width() {
            // Devices of both sector sizes, in one pool.
            let disk = MemoryDisk::new(DISK_BYTES, if number % 2 == 0 { 4096 } else { 512 });
            let node = NodeId(number as u32 + 1);
            let identity = DeviceIdentity { cluster: ClusterId(1), node, device: device(number) };
            Node::format(&env, &disk.open(), identity).await.unwrap();
            let node = open(&env, number, &disk).await;
            let api = Arc::clone(&node) as Arc<dyn NodeApi>;
            let domain = format!("host-{number}").into();
            devices.insert(
                device(number),
                DeviceView { node: api, domain, up: true, leaving: false, sector: 4096, free: 0 },
            );
            disks.push(disk);
            nodes.push(node);
        }
        let table = vec![(0..scheme.width()).map(|number| Some(device(number))).collect()];
        let view = PoolView { epoch: Epoch(1), table, before: Vec::new(), devices };
        let config = PoolConfig::new(PoolId(1), "real", scheme);
        let pool = Pool::new(env.clone(), config, Arc::new(view.clone()), BufPool::new(0, 4 << 20)).unwrap();
        Self { env, pool, disks, nodes, view }
    }

    fn set(&mut self, number: usize, node: Arc<Node>, up: bool) {
        let entry = self.view.devices.get_mut(&device(number)).unwrap();
        (entry.node, entry.up) = (Arc::clone(&node) as Arc<dyn NodeApi>, up);
        self.nodes[number] = node;
        self.view.epoch = self.view.epoch.next();
        self.pool.set_view(Arc::new(self.view.clone())).unwrap();
    }

    async fn kill(&mut self, number: usize, map_knows: bool) {
        self.nodes[number].kill().await;
        self.disks[number].crash_process();
        if map_knows {
            self.set(number, Arc::clone(&self.nodes[number]), false);
        }
    }

    async fn restart(&mut self, number: usize) {
        let node = open(&self.env, number, &self.disks[number]).await;
        self.set(number, node, true);
    }

    async fn read(&self, name: SegmentName, body: &[u8], offset: usize, length: usize) -> Result<Buf, StoreError> {
        let crcs = body[offset..offset + length].chunks(4096).map(crc32c).collect();
        let check = Check::Blocks(crcs);
        let (segment_bytes, offset, length) = (body.len() as u64, offset as u64, length as u32);
        self.pool.read(SegmentRead { segment: name, segment_bytes, offset, length, check }).await
    }

    async fn check_reads(&self, name: SegmentName, body: &[u8], dice: &mut Dice, why: &str) {
        let blocks = body.len() / 4096;
        for round in 0..12 {
            let first = if round == 0 { 0 } else { dice.below(blocks as u64) as usize };
            let most = if round == 0 { blocks } else { (blocks - first).min(100) };
            let count = if round == 0 { blocks } else { 1 + dice.below(most as u64) as usize };
            let (offset, length) = (first * 4096, count * 4096);
            let found = self.read(name, body, offset, length).await;
            assert!(found.as_deref() == Ok(&body[offset..offset + length]), "{why}: {offset}+{length} {found:?}");
        }
    }

    async fn hash(&self, name: SegmentName, index: usize) -> ([u8; 32], u64, bool) {
        let shard = ShardId { segment: name, index: ShardIndex(index as u8) };
        let info = self.nodes[index].shard_info(device(index), shard).await.unwrap();
        (info.hash, info.bytes, info.open)
    }

    /// Where on its disk a block with these bytes lies.
    fn find(&self, number: usize, block: &[u8]) -> u64 {
        let step = 1 << 20;
        for offset in (0..DISK_BYTES).step_by(step) {
            let bytes = self.disks[number].peek(offset, step);
            if let Some(at) = bytes.chunks(4096).position(|found| found == block) {
                return offset + at as u64 * 4096;
            }
        }
        panic!("the block is not on disk {number}");
    }

    async fn until(&self, is_true: impl Fn(&Self) -> bool) {
        while !is_true(self) {
            self.env.sleep(Duration::from_millis(1)).await;
        }
    }
}

#[tokio::test]
async fn real_nodes_give_back_what_was_sealed_with_m_of_them_dead() {
    let mut dice = Dice(1);
    for scheme in schemes() {
        for map_knows in [false, true] {
            let mut real = Real::new(scheme).await;
            let body = dice.bytes(1_400_832);
            assert_eq!(real.pool.seal(segment(1), vec![aligned(&body)]).await, Ok(Holes::default()));
            real.check_reads(segment(1), &body, &mut dice, "all alive").await;
            let dead = dice.choose(scheme.tolerates(), scheme.width());
            for &number in &dead {
                real.kill(number, map_knows).await;
            }
            real.check_reads(segment(1), &body, &mut dice, &format!("{scheme} without {dead:?}")).await;
            for &number in &dead {
                real.restart(number).await;
            }
            real.check_reads(segment(1), &body, &mut dice, "all restarted").await;
        }
    }
}

#[tokio::test]
async fn rotten_bits_and_unreadable_sectors_on_a_disk_are_repaired_there() {
    let mut dice = Dice(2);
    for scheme in schemes().into_iter().filter(|scheme| scheme.tolerates() > 0 && !scheme.is_replica()) {
        let real = Real::new(scheme).await;
        let body = dice.bytes(1 << 20);
        real.pool.seal(segment(1), vec![aligned(&body)]).await.unwrap();
        let at = real.find(0, &body[4096..8192]);
        real.disks[0].flip_bit(at + 99, 3);
        assert!(*real.read(segment(1), &body, 4096, 4096).await.unwrap() == body[4096..8192], "{scheme}");
        real.until(|real| real.disks[0].peek(at, 4096) == body[4096..8192]).await;

        real.disks[0].damage(at..at + 4096);
        assert!(*real.read(segment(1), &body, 0, 16384).await.unwrap() == body[..16384], "{scheme}");
        real.until(|real| real.pool.stats().repaired_blocks >= 2).await;
        let degraded = real.pool.stats().degraded_reads;
        assert!(*real.read(segment(1), &body, 0, 16384).await.unwrap() == body[..16384]);
        assert_eq!(real.pool.stats().degraded_reads, degraded, "readable again");
    }
}

#[tokio::test]
async fn rows_on_real_nodes_end_as_the_shards_of_a_seal() {
    let mut dice = Dice(3);
    for scheme in schemes().into_iter().filter(|scheme| scheme.k() > 1) {
        let row = scheme.k() * UNIT;
        let mut real = Real::new(scheme).await;
        let body = dice.bytes(9 * row + 20_480);
        real.pool.seal(segment(1), vec![aligned(&body)]).await.unwrap();
        let writer = real.pool.open_rows(segment(2)).await.unwrap();
        // Overlapping: nobody waits for the one before.
        let appends: Vec<_> = (0..9)
            .map(|number| writer.append(number as u64, vec![aligned(&body[number * row..(number + 1) * row])]))
            .collect();
        for append in appends {
            append.await.unwrap();
        }
        real.check_reads(segment(2), &body[..9 * row], &mut dice, "open").await;
        for request in writer.flush_requests() {
            real.pool.flush(request).await.unwrap();
        }
        writer.finish(aligned(&body[9 * row..])).await.unwrap();
        for index in 0..scheme.width() {
            assert_eq!(real.hash(segment(1), index).await, real.hash(segment(2), index).await, "{scheme} {index}");
        }
        for number in dice.choose(scheme.tolerates(), scheme.width()) {
            real.kill(number, true).await;
        }
        real.check_reads(segment(2), &body, &mut dice, "finished, degraded").await;
    }
}

#[tokio::test]
async fn a_restarted_node_ends_a_segment_of_rows() {
    let mut real = Real::new(Scheme::rs(2, 1).unwrap()).await;
    let body = Dice(4).bytes(4 * UNIT);
    let writer = real.pool.open_rows(segment(1)).await.unwrap();
    writer.append(0, vec![aligned(&body[..2 * UNIT])]).await.unwrap();
    real.kill(1, false).await;
    real.restart(1).await;
    let second = writer.append(1, vec![aligned(&body[2 * UNIT..])]).await;
    assert_eq!(second, Err(StoreError::Unavailable { device: device(1) }));
    // What was complete is still there, for whoever recovers the volume.
    real.check_reads(segment(1), &body[..2 * UNIT], &mut Dice(5), "after the restart").await;
}

#[tokio::test]
async fn holes_on_real_nodes_are_filled_from_verified_shards() {
    let mut dice = Dice(6);
    for scheme in schemes().into_iter().filter(|scheme| scheme.tolerates() > 0) {
        let mut real = Real::new(scheme).await;
        let body = dice.bytes(1_228_800);
        real.pool.seal(segment(2), vec![aligned(&body)]).await.unwrap();
        let dead = dice.choose(scheme.tolerates(), scheme.width());
        for &number in &dead {
            real.kill(number, true).await;
        }
        let holes = real.pool.seal(segment(1), vec![aligned(&body)]).await.unwrap();
        assert_eq!(holes.0.len(), dead.len());
        for &number in &dead {
            real.restart(number).await;
        }
        let filled = real.pool.fill_holes(segment(1), body.len() as u64, holes).await;
        assert_eq!(filled, Ok(Holes::default()));
        for index in 0..scheme.width() {
            assert_eq!(real.hash(segment(1), index).await, real.hash(segment(2), index).await, "{scheme} {index}");
        }
        let others: Vec<usize> = (0..scheme.width()).filter(|number| !dead.contains(number)).collect();
        for number in dice.choose(scheme.tolerates(), others.len()) {
            real.kill(others[number], true).await;
        }
        real.check_reads(segment(1), &body, &mut dice, "from what was filled").await;
    }
}

#[tokio::test]
async fn deleted_segments_leave_no_shards() {
    let real = Real::new(Scheme::rs(4, 2).unwrap()).await;
    let body = Dice(7).bytes(300_000);
    real.pool.seal(segment(1), vec![aligned(&body)]).await.unwrap();
    real.pool.delete(vec![segment(1)]).await.unwrap();
    assert_eq!(real.read(segment(1), &body[..4096], 0, 4096).await.unwrap_err(), StoreError::NotFound);
}
