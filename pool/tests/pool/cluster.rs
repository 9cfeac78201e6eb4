//! A pool over fake nodes, one device and one failure domain each.

use crate::fake::{FakeNode, Shard, Stall};
use lsm_block::store::{Check, Holes, SegmentRead, SegmentStore, StoreError};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use xsan_env::{Buf, BufMut, BufPool, Env, OsRuntime};
use xsan_pool::{DeviceView, Pool, PoolConfig, PoolView};
use xsan_types::{
    DeviceId, Epoch, Generation, PgId, PoolId, Scheme, SegmentName, ShardId, ShardIndex, VolumeId, crc32c,
};
use xsan_wire::node::NodeApi;

/// All schemes that tests go through.
pub fn schemes() -> Vec<Scheme> {
    vec![
        Scheme::rs(4, 2).unwrap(),
        Scheme::rs(2, 1).unwrap(),
        Scheme::rs(8, 3).unwrap(),
        Scheme::rs(1, 1).unwrap(),
        Scheme::replica(3).unwrap(),
        Scheme::replica(1).unwrap(),
    ]
}

/// Pseudo-random numbers from a seed (splitmix64).
pub struct Dice(pub u64);

impl Dice {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let value = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    /// `count` different numbers below `limit`.
    pub fn choose(&mut self, count: usize, limit: usize) -> Vec<usize> {
        let mut all: Vec<usize> = (0..limit).collect();
        for at in 0..count.min(limit) {
            let other = at + self.below((limit - at) as u64) as usize;
            all.swap(at, other);
        }
        all.truncate(count);
        all
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        // BLAKE3 as a generator: a build without optimisation makes megabytes of it in no time.
        let mut bytes = vec![0; count];
        blake3::Hasher::new().update(&self.next().to_le_bytes()).finalize_xof().fill(&mut bytes);
        bytes
    }
}

pub struct Cluster {
    pub env: Env,
    pub pool: Pool,
    pub nodes: Vec<Arc<FakeNode>>,
    pub view: PoolView,
}

pub fn device(number: usize) -> DeviceId {
    DeviceId(number as u128 + 1)
}

pub fn segment(number: u64) -> SegmentName {
    let pg = PgId { pool: PoolId(1), index: 0 };
    SegmentName { volume: VolumeId(7), generation: Generation(1), number, pg }
}

impl Cluster {
    /// As many nodes as the scheme is wide, plus `spare` ones; group g begins at node g.
    pub fn new(scheme: Scheme, spare: usize) -> Self {
        Self::with(scheme, spare, |_| {})
    }

    pub fn with(scheme: Scheme, spare: usize, adjust: impl FnOnce(&mut PoolConfig)) -> Self {
        let env = OsRuntime::current();
        let count = scheme.width() + spare;
        let nodes: Vec<Arc<FakeNode>> = (0..count).map(|number| FakeNode::new(device(number))).collect();
        let table = (0..count)
            .map(|group| (0..scheme.width()).map(|index| Some(device((group + index) % count))).collect())
            .collect();
        let devices: BTreeMap<DeviceId, DeviceView> = nodes
            .iter()
            .enumerate()
            .map(|(number, node)| {
                let domain = format!("host-{number}").into();
                let node = Arc::clone(node) as Arc<dyn NodeApi>;
                (device(number), DeviceView { node, domain, up: true, leaving: false, sector: 4096, free: 1 << 40 })
            })
            .collect();
        let view = PoolView { epoch: Epoch(1), table, before: Vec::new(), devices };
        let mut config = PoolConfig::new(PoolId(1), "test", scheme);
        adjust(&mut config);
        let bufs = BufPool::new(0, 4 << 20);
        let pool = Pool::new(env.clone(), config, Arc::new(view.clone()), bufs).unwrap();
        Self { env, pool, nodes, view }
    }

    pub fn update(&mut self, change: impl FnOnce(&mut PoolView)) {
        change(&mut self.view);
        self.view.epoch = self.view.epoch.next();
        self.pool.set_view(Arc::new(self.view.clone())).unwrap();
    }

    /// Devices of these nodes answer nothing, and the map says so.
    pub fn take_down(&mut self, numbers: &[usize]) {
        self.update(|view| {
            for &number in numbers {
                view.devices.get_mut(&device(number)).unwrap().up = false;
            }
        });
        numbers.iter().for_each(|&number| self.nodes[number].state().is_down = true);
    }

    pub fn bring_up_all(&mut self) {
        self.update(|view| view.devices.values_mut().for_each(|device| device.up = true));
        self.nodes.iter().for_each(|node| node.state().is_down = false);
    }

    pub fn stall(&self, number: usize, stall: Stall) {
        self.nodes[number].stall.send_replace(stall);
    }

    pub async fn seal(&self, name: SegmentName, body: &[u8]) -> Result<Holes, StoreError> {
        self.pool.seal(name, vec![aligned(body)]).await
    }

    /// The shard of a position, wherever the map says it is.
    pub fn shard(&self, name: SegmentName, index: usize) -> Option<Shard> {
        let node = self.node_of(name, index);
        let shard = ShardId { segment: name, index: ShardIndex(index as u8) };
        self.nodes[node].state().shards.get(&shard).cloned()
    }

    pub fn node_of(&self, name: SegmentName, index: usize) -> usize {
        let device = self.view.table[name.pg.index as usize][index].unwrap();
        self.nodes.iter().position(|node| node.device == device).unwrap()
    }

    /// Flips one bit.
    pub fn damage(&self, name: SegmentName, index: usize, offset: usize) {
        let shard = ShardId { segment: name, index: ShardIndex(index as u8) };
        let node = self.node_of(name, index);
        self.nodes[node].state().shards.get_mut(&shard).unwrap().bytes[offset] ^= 0x10;
    }

    /// Reads with a checksum per block, whole blocks.
    pub async fn read_blocks(
        &self,
        name: SegmentName,
        body: &[u8],
        offset: usize,
        length: usize,
    ) -> Result<Buf, StoreError> {
        let crcs = body[offset..offset + length].chunks(4096).map(crc32c).collect();
        self.read(name, body, offset, length, Check::Blocks(crcs)).await
    }

    /// Reads with one checksum, any length.
    pub async fn read_whole(
        &self,
        name: SegmentName,
        body: &[u8],
        offset: usize,
        length: usize,
    ) -> Result<Buf, StoreError> {
        let crc = crc32c(&body[offset..offset + length]);
        self.read(name, body, offset, length, Check::Whole(crc)).await
    }

    async fn read(
        &self,
        name: SegmentName,
        body: &[u8],
        offset: usize,
        length: usize,
        check: Check,
    ) -> Result<Buf, StoreError> {
        let (segment_bytes, offset, length) = (body.len() as u64, offset as u64, length as u32);
        self.pool.read(SegmentRead { segment: name, segment_bytes, offset, length, check }).await
    }

    /// Reads everything and some random ranges, in both ways, and compares.
    pub async fn check_reads(&self, name: SegmentName, body: &[u8], dice: &mut Dice, count: usize, why: &str) {
        for round in 0..count {
            let offset = dice.below(body.len().div_ceil(4096) as u64) as usize * 4096;
            let rest = body.len() - offset;
            let length = if round == 0 { rest } else { 1 + dice.below(rest.min(600_000) as u64) as usize };
            let found = self.read_whole(name, body, offset, length).await;
            assert!(found.as_deref() == Ok(&body[offset..offset + length]), "{why}: {offset}+{length} {found:?}");
            let length = length / 4096 * 4096;
            if length > 0 {
                let found = self.read_blocks(name, body, offset, length).await;
                assert!(found.as_deref() == Ok(&body[offset..offset + length]), "{why}: {offset}+{length} {found:?}");
            }
        }
    }

    /// Waits until `is_true`, for as long as it takes (the test runner's own limit ends a hang).
    pub async fn until(&self, mut is_true: impl FnMut(&Self) -> bool) {
        while !is_true(self) {
            self.env.sleep(Duration::from_millis(1)).await;
        }
    }
}

/// The bytes in page-aligned memory.
pub fn aligned(bytes: &[u8]) -> Buf {
    let mut buf = BufMut::heap(bytes.len());
    buf.copy_from_slice(bytes);
    buf.freeze()
}

/// The bytes in pieces of `piece` bytes, each at an address that no device would take.
pub fn unaligned(bytes: &[u8], piece: usize) -> Vec<Buf> {
    bytes
        .chunks(piece)
        .map(|chunk| {
            let mut buf = BufMut::heap(chunk.len() + 512);
            buf[512..].copy_from_slice(chunk);
            buf.freeze().slice(512..)
        })
        .collect()
}
