//! A volume on a store in memory, what it must hold, and what happens to it at random.

use futures::future::join_all;
use lsm_block::index::PageCache;
use lsm_block::memory_store::{Fault, MemoryConfig, MemoryRegisters, MemoryStore};
use lsm_block::{AckPolicy, Piece, Tuning, Volume, VolumeConfig, VolumeStatus};
use std::sync::Arc;
use std::time::Duration;
use xsan_env::{Buf, BufPool, Env};
use xsan_types::{BLOCK_BYTES, DeviceId, Scheme, VolumeId};

pub const SECTOR: u64 = 512;
pub const VOLUME: VolumeId = VolumeId(1);
pub const SIZE: u64 = 6 << 20;

/// Pseudo-random numbers from a seed (splitmix64).
pub struct Dice(u64);

impl Dice {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let value = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// A sector's content is its stamp, repeated; 0 is zeroes.
pub fn sector_of(stamp: u32) -> [u8; SECTOR as usize] {
    std::array::from_fn(|at| stamp.to_le_bytes()[at % 4])
}

/// What a sector may hold.
#[derive(Clone, Debug)]
pub struct Cell {
    /// Acknowledged.
    pub current: u32,
    /// Values since the last flush that covered it, oldest first (the flushed one included).
    pub since_flush: Vec<u32>,
    /// Submitted, not acknowledged.
    pub pending: Vec<u32>,
}

pub struct Oracle {
    pub cells: Vec<Cell>,
    pub stamp: u32,
}

#[derive(Clone, Copy, Debug)]
pub enum Change {
    Write,
    Zero,
    Trim,
}

impl Oracle {
    pub fn new() -> Self {
        let cell = Cell { current: 0, since_flush: vec![0], pending: Vec::new() };
        Self { cells: vec![cell; (SIZE / SECTOR) as usize], stamp: 0 }
    }

    pub fn range(offset: u64, length: u64) -> std::ops::Range<usize> {
        (offset / SECTOR) as usize..((offset + length) / SECTOR) as usize
    }

    pub fn submit(&mut self, offset: u64, length: u64, stamp: u32) {
        for cell in &mut self.cells[Self::range(offset, length)] {
            cell.pending.push(stamp);
        }
    }

    pub fn acknowledge(&mut self, offset: u64, length: u64, stamp: u32) {
        for cell in &mut self.cells[Self::range(offset, length)] {
            cell.pending.retain(|&pending| pending != stamp);
            cell.current = stamp;
            cell.since_flush.push(stamp);
        }
    }

    pub fn flushed(&mut self) {
        for cell in &mut self.cells {
            cell.since_flush = vec![cell.current];
        }
    }

    /// Everything was read back: what is there is what counts from now on.
    pub fn settle(&mut self, image: &[u8], power_lost: bool, context: &str) {
        for (at, cell) in self.cells.iter_mut().enumerate() {
            let bytes = &image[at * SECTOR as usize..(at + 1) * SECTOR as usize];
            let found = u32::from_le_bytes(bytes[..4].try_into().unwrap());
            assert_eq!(bytes, sector_of(found), "sector {at} is torn ({context})");
            let acknowledged = found == cell.current || cell.pending.contains(&found);
            let allowed = acknowledged || (power_lost && cell.since_flush.contains(&found));
            assert!(allowed, "sector {at} holds {found}, expected {cell:?} ({context})");
            if found != cell.current {
                cell.current = found;
                cell.since_flush.push(found);
            }
            // A write that failed may still come to be, as long as its engine lives; after a restart it is decided.
            cell.pending.clear();
            if power_lost {
                cell.since_flush = vec![found];
            }
        }
    }
}

pub struct Rig {
    pub env: Env,
    pub store: MemoryStore,
    pub registers: MemoryRegisters,
    pub cache: Arc<PageCache>,
    pub buffers: BufPool,
    pub ack: AckPolicy,
    pub dice: Dice,
    pub oracle: Oracle,
    pub down: Vec<DeviceId>,
}

impl Rig {
    pub fn new(env: &Env, seed: u64, scheme: Scheme, delays: bool, ack: AckPolicy) -> Self {
        let config = MemoryConfig {
            scheme,
            devices: scheme.width() as u32,
            seed,
            env: delays.then(|| env.clone()),
            delay_max: Duration::from_micros(300),
            ..MemoryConfig::default()
        };
        Self::on(env, config, ack)
    }

    pub fn on(env: &Env, config: MemoryConfig, ack: AckPolicy) -> Self {
        let seed = config.seed;
        let store = MemoryStore::new(config);
        let registers = MemoryRegisters::new();
        registers.create(VOLUME, SIZE);
        store.check_against(&registers);
        Self {
            env: env.clone(),
            store,
            registers,
            cache: Arc::new(PageCache::new(1 << 20)),
            buffers: BufPool::new(0, 1 << 20),
            ack,
            dice: Dice(seed),
            oracle: Oracle::new(),
            down: Vec::new(),
        }
    }

    pub fn tuning() -> Tuning {
        Tuning {
            segment_bytes: 1 << 20,
            delta_bytes_max: 256 << 10,
            checkpoint_bytes: 8 << 20,
            io_timeout: Duration::from_secs(20),
            read_window: Duration::from_millis(20),
            ..Tuning::default()
        }
    }

    pub async fn open(&self) -> Arc<Volume> {
        self.open_tuned(Self::tuning()).await
    }

    pub async fn open_tuned(&self, tuning: Tuning) -> Arc<Volume> {
        Volume::open(self.config(tuning)).await.expect("the volume opens")
    }

    pub fn config(&self, tuning: Tuning) -> VolumeConfig {
        VolumeConfig {
            id: VOLUME,
            env: self.env.clone(),
            buffers: self.buffers.clone(),
            store: Arc::new(self.store.clone()),
            registers: Arc::new(self.registers.clone()),
            cache: Arc::clone(&self.cache),
            ack: self.ack,
            tuning,
        }
    }

    /// A few changes at once, over different sectors.
    pub fn draw_changes(&mut self) -> Vec<(Change, u64, u64)> {
        let mut drawn: Vec<(Change, u64, u64)> = Vec::new();
        for _ in 0..=self.dice.below(8) {
            let (change, unit, most) = match self.dice.below(12) {
                0..=5 => (Change::Write, SECTOR, 40),
                6..=7 => (Change::Write, BLOCK_BYTES, 16),
                8 => (Change::Write, 64 << 10, 24),
                9 => (Change::Zero, SECTOR, 200),
                10 => (Change::Zero, BLOCK_BYTES, 300),
                _ => (Change::Trim, SECTOR, 300),
            };
            let length = unit * (1 + self.dice.below(most));
            let offset = self.dice.below((SIZE - length) / unit + 1) * unit;
            if drawn.iter().all(|&(_, from, bytes)| offset + length <= from || from + bytes <= offset) {
                drawn.push((change, offset, length));
            }
        }
        drawn
    }

    pub async fn change(&mut self, volume: &Arc<Volume>, wait: bool) {
        let mut running = Vec::new();
        for (change, offset, length) in self.draw_changes() {
            self.oracle.stamp += 1;
            let fua = self.dice.below(8) == 0;
            let (stamp, done) = match change {
                Change::Write => {
                    let bytes = sector_of(self.oracle.stamp).repeat((length / SECTOR) as usize);
                    (self.oracle.stamp, volume.write(offset, Buf::copied(&bytes), fua))
                }
                Change::Zero => (0, volume.zero(offset, length, fua)),
                Change::Trim => (0, volume.trim(offset, length, fua)),
            };
            // A trim rounds inward to whole blocks.
            let (from, to) = match change {
                Change::Trim => (offset.next_multiple_of(BLOCK_BYTES), (offset + length) / BLOCK_BYTES * BLOCK_BYTES),
                _ => (offset, offset + length),
            };
            let length = to.saturating_sub(from);
            self.oracle.submit(from, length, stamp);
            running.push(async move { (from, length, stamp, done.await) });
        }
        if !wait {
            // Crash with them in flight: let them come some way.
            let _ = futures::poll!(Box::pin(join_all(running)));
            for _ in 0..self.dice.below(40) {
                xsan_env::yield_now().await;
            }
            return;
        }
        for (from, length, stamp, outcome) in join_all(running).await {
            outcome.expect("a change is acknowledged");
            self.oracle.acknowledge(from, length, stamp);
        }
    }

    pub async fn read_all(&self, volume: &Arc<Volume>) -> Vec<u8> {
        let mut image = Vec::with_capacity(SIZE as usize);
        for piece in volume.read(0, SIZE).await.expect("the volume reads") {
            match piece {
                Piece::Data(bytes) => image.extend_from_slice(&bytes),
                Piece::Hole(bytes) => image.resize(image.len() + bytes as usize, 0),
            }
        }
        assert_eq!(image.len() as u64, SIZE);
        image
    }

    pub async fn check(&mut self, volume: &Arc<Volume>, power_lost: bool, context: &str) {
        let image = self.read_all(volume).await;
        self.oracle.settle(&image, power_lost, context);
        let mut mapped = 0;
        for run in volume.allocation(0, SIZE, 100_000).await.expect("a map") {
            let bytes = &image[mapped as usize..(mapped + run.blocks * BLOCK_BYTES) as usize];
            assert!(!run.hole || bytes.iter().all(|&byte| byte == 0), "a hole holds data ({context})");
            mapped += run.blocks * BLOCK_BYTES;
        }
        assert_eq!(mapped, SIZE);
    }

    pub async fn toggle_node(&mut self, volume: &Arc<Volume>) {
        let tolerated = self.store_tolerates();
        if self.down.len() < tolerated && self.dice.below(2) == 0 {
            if self.down.is_empty() {
                // What nodes missed that were started again by a crash of everything counts as lost until it is filled.
                self.until_whole(volume).await;
            }
            let up: Vec<DeviceId> = self.store.devices().into_iter().filter(|d| !self.down.contains(d)).collect();
            let device = up[self.dice.below(up.len() as u64) as usize];
            self.store.stop(device);
            self.down.push(device);
        } else if !self.down.is_empty() {
            // Redundancy is back when the holes are filled: before that other nodes may not be lost.
            self.start_all();
            self.until_whole(volume).await;
        }
    }

    pub async fn until_whole(&self, volume: &Volume) {
        self.store.clear_plans();
        while volume.checkpoint().await.is_err() || volume.status().segments_with_holes > 0 {
            self.env.sleep(Duration::from_millis(1)).await;
        }
    }

    pub fn store_tolerates(&self) -> usize {
        self.store.devices().len().min(6) / 3
    }

    pub fn restart_all(&mut self) {
        self.store.clear_plans();
        for device in self.store.devices() {
            self.store.start(device);
        }
        self.down.clear();
    }

    pub fn start_all(&mut self) {
        for device in std::mem::take(&mut self.down) {
            self.store.start(device);
        }
    }

    pub async fn step(&mut self, volume: Arc<Volume>, step: u64, seed: u64) -> Arc<Volume> {
        let context = format!("seed {seed}, step {step}");
        let what = self.dice.below(100);
        if std::env::var_os("XSAN_TEST_TRACE").is_some() {
            eprintln!("{context}: {what}, down {:?}, {:?}", self.down, volume.status());
        }
        match what {
            0..=59 => self.change(&volume, true).await,
            60..=69 => {
                volume.flush().await.expect("a flush");
                self.oracle.flushed();
            }
            70..=76 => self.check(&volume, false, &context).await,
            77..=79 => {
                // Each planned fault happens once and may fail one attempt.
                let faults = self.store.planned_faults();
                let mut failed = 0;
                while let Err(error) = volume.checkpoint().await {
                    failed += 1;
                    assert!(failed <= faults, "{context}: {failed} checkpoints failed at {faults} faults: {error}");
                }
            }
            80..=87 => self.toggle_node(&volume).await,
            88..=89 => {
                let fault = match self.dice.below(4) {
                    0 => Fault::Refuse,
                    1 => Fault::LoseAnswer,
                    _ => Fault::Stall,
                };
                // Stalls come in groups: what overtakes them is what is looked for.
                let count = if matches!(fault, Fault::Stall) { 1 + self.dice.below(6) } else { 1 };
                for _ in 0..count {
                    self.store.plan(self.dice.below(30), fault);
                }
            }
            90..=93 => {
                // The engine's process dies with changes in flight.
                self.change(&volume, false).await;
                volume.abandon();
                drop(volume);
                self.store.clear_plans();
                let volume = self.open().await;
                self.check(&volume, false, &format!("{context}, after an engine crash")).await;
                return volume;
            }
            94..=95 => {
                volume.close().await.expect("a clean hand-over");
                self.store.clear_plans();
                let volume = self.open().await;
                self.check(&volume, false, &format!("{context}, after a hand-over")).await;
                return volume;
            }
            96..=97 => {
                self.change(&volume, false).await;
                volume.abandon();
                drop(volume);
                self.restart_all();
                let volume = self.open().await;
                self.check(&volume, false, &format!("{context}, after a crash of all processes")).await;
                return volume;
            }
            _ => {
                self.change(&volume, false).await;
                volume.abandon();
                drop(volume);
                self.store.clear_plans();
                self.store.power_loss_everywhere();
                self.restart_all();
                let volume = self.open().await;
                self.check(&volume, true, &format!("{context}, after power loss everywhere")).await;
                return volume;
            }
        }
        volume
    }
}

impl Rig {
    pub async fn until(&self, volume: &Volume, is_true: impl Fn(&VolumeStatus) -> bool) {
        let waits = async {
            while !is_true(&volume.status()) {
                self.env.sleep(Duration::from_millis(5)).await;
            }
        };
        assert!(self.env.timeout(Duration::from_secs(40), waits).await.is_some(), "{:?}", volume.status());
    }
}
