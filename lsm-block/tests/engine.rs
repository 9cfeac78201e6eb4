//! The volume engine against a plain array of sectors: random writes, zeroes, trims, flushes, reads, checkpoints, while
//! nodes stop and start, calls fail or lose their answers, the engine crashes, all processes crash, all power goes.
//!
//! What may be read back is R7's table: after crashes of processes everything acknowledged, after power loss everywhere
//! everything flushed; each sector whole, never older than that.
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "a test makes its own runtime")]

use futures::future::join_all;
use lsm_block::index::PageCache;
use lsm_block::memory_store::{Fault, MemoryConfig, MemoryRegisters, MemoryStore};
use lsm_block::{AckPolicy, Health, Piece, Tuning, Volume, VolumeConfig};
use std::sync::Arc;
use std::time::Duration;
use xsan_env::os::OsRuntime;
use xsan_env::{Buf, BufPool, Env};
use xsan_types::{BLOCK_BYTES, DeviceId, Scheme, VolumeId};

const SECTOR: u64 = 512;
const VOLUME: VolumeId = VolumeId(1);
const SIZE: u64 = 6 << 20;

/// Pseudo-random numbers from a seed (splitmix64).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let value = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// A sector's content is its stamp, repeated; 0 is zeroes.
fn sector_of(stamp: u32) -> [u8; SECTOR as usize] {
    std::array::from_fn(|at| stamp.to_le_bytes()[at % 4])
}

/// What a sector may hold.
#[derive(Clone, Debug)]
struct Cell {
    /// Acknowledged.
    current: u32,
    /// Values since the last flush that covered it, oldest first (the flushed one included).
    since_flush: Vec<u32>,
    /// Submitted, not acknowledged.
    pending: Vec<u32>,
}

struct Oracle {
    cells: Vec<Cell>,
    stamp: u32,
}

#[derive(Clone, Copy, Debug)]
enum Change {
    Write,
    Zero,
    Trim,
}

impl Oracle {
    fn new() -> Self {
        let cell = Cell { current: 0, since_flush: vec![0], pending: Vec::new() };
        Self { cells: vec![cell; (SIZE / SECTOR) as usize], stamp: 0 }
    }

    fn range(offset: u64, length: u64) -> std::ops::Range<usize> {
        (offset / SECTOR) as usize..((offset + length) / SECTOR) as usize
    }

    fn submit(&mut self, offset: u64, length: u64, stamp: u32) {
        for cell in &mut self.cells[Self::range(offset, length)] {
            cell.pending.push(stamp);
        }
    }

    fn acknowledge(&mut self, offset: u64, length: u64, stamp: u32) {
        for cell in &mut self.cells[Self::range(offset, length)] {
            cell.pending.retain(|&pending| pending != stamp);
            cell.current = stamp;
            cell.since_flush.push(stamp);
        }
    }

    fn flushed(&mut self) {
        for cell in &mut self.cells {
            cell.since_flush = vec![cell.current];
        }
    }

    /// Everything was read back: what is there is what counts from now on.
    fn settle(&mut self, image: &[u8], power_lost: bool, context: &str) {
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

struct Rig {
    env: Env,
    store: MemoryStore,
    registers: MemoryRegisters,
    cache: Arc<PageCache>,
    buffers: BufPool,
    ack: AckPolicy,
    dice: Dice,
    oracle: Oracle,
    down: Vec<DeviceId>,
}

impl Rig {
    fn new(env: &Env, seed: u64, scheme: Scheme, delays: bool, ack: AckPolicy) -> Self {
        let config = MemoryConfig {
            scheme,
            devices: scheme.width() as u32,
            seed,
            env: delays.then(|| env.clone()),
            delay_max: Duration::from_micros(300),
            ..MemoryConfig::default()
        };
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

    fn tuning() -> Tuning {
        Tuning {
            segment_bytes: 1 << 20,
            delta_bytes_max: 256 << 10,
            checkpoint_bytes: 8 << 20,
            io_timeout: Duration::from_secs(20),
            read_window: Duration::from_millis(20),
            ..Tuning::default()
        }
    }

    async fn open(&self) -> Arc<Volume> {
        self.open_tuned(Self::tuning()).await
    }

    async fn open_tuned(&self, tuning: Tuning) -> Arc<Volume> {
        let config = VolumeConfig {
            id: VOLUME,
            env: self.env.clone(),
            buffers: self.buffers.clone(),
            store: Arc::new(self.store.clone()),
            registers: Arc::new(self.registers.clone()),
            cache: Arc::clone(&self.cache),
            ack: self.ack,
            tuning,
        };
        Volume::open(config).await.expect("the volume opens")
    }

    /// A few changes at once, over different sectors.
    fn draw_changes(&mut self) -> Vec<(Change, u64, u64)> {
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

    async fn change(&mut self, volume: &Arc<Volume>, wait: bool) {
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

    async fn read_all(&self, volume: &Arc<Volume>) -> Vec<u8> {
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

    async fn check(&mut self, volume: &Arc<Volume>, power_lost: bool, context: &str) {
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

    async fn toggle_node(&mut self, volume: &Arc<Volume>) {
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

    async fn until_whole(&self, volume: &Volume) {
        self.store.clear_plans();
        while volume.checkpoint().await.is_err() || volume.status().segments_with_holes > 0 {
            self.env.sleep(Duration::from_millis(1)).await;
        }
    }

    fn store_tolerates(&self) -> usize {
        self.store.devices().len().min(6) / 3
    }

    fn restart_all(&mut self) {
        self.store.clear_plans();
        for device in self.store.devices() {
            self.store.start(device);
        }
        self.down.clear();
    }

    fn start_all(&mut self) {
        for device in std::mem::take(&mut self.down) {
            self.store.start(device);
        }
    }

    async fn step(&mut self, volume: Arc<Volume>, step: u64, seed: u64) -> Arc<Volume> {
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

fn run_seed(seed: u64, steps: u64, scheme: Scheme, delays: bool, ack: AckPolicy) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let env = OsRuntime::current();
        let mut rig = Rig::new(&env, seed, scheme, delays, ack);
        let store = rig.store.clone();
        let releasing = tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(8)).await;
                store.release();
            }
        });
        let mut volume = rig.open().await;
        for step in 0..steps {
            volume = rig.step(volume, step, seed).await;
        }
        rig.start_all();
        rig.check(&volume, false, &format!("seed {seed}, end")).await;
        volume.close().await.expect("a clean hand-over");
        releasing.abort();
    });
}

#[test]
fn a_volume_that_has_stopped_answers_every_request_with_an_error() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let env = OsRuntime::current();
        let rig = Rig::new(&env, 1, Scheme::replica(3).unwrap(), false, AckPolicy::Replicated);
        let volume = rig.open().await;
        volume.write(0, Buf::copied(&[1; 4096]), false).await.expect("a write");
        volume.close().await.expect("a clean hand-over");
        for _ in 0..2 {
            let late = join_all([
                volume.write(0, Buf::copied(&[2; 4096]), false),
                volume.flush(),
                volume.zero(0, 4096, false),
                volume.resize(SIZE * 2),
                volume.close(),
            ]);
            let answers = tokio::time::timeout(Duration::from_secs(10), late).await.expect("answers");
            assert!(answers.iter().all(Result::is_err), "{answers:?}");
        }
        assert!(volume.read(0, 4096).await.is_err());
    });
}

/// A row may be under way for as long as it likes: its writer must not count it once a taker may have looked for it in vain.
#[test]
fn an_old_owner_acknowledges_nothing_that_its_successor_did_not_find() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let env = OsRuntime::current();
        let mut overtaken = 0;
        for (held_up, taken_over) in (0..4).flat_map(|of_old| (0..24).map(move |of_new| (of_old, of_new))) {
            let rig = Rig::new(&env, 1, Scheme::rs(4, 2).unwrap(), false, AckPolicy::Replicated);
            let old = rig.open().await;
            old.write(0, Buf::copied(&vec![1; 256 << 10]), false).await.expect("a large write");
            old.write(0, Buf::copied(&vec![1; 256 << 10]), false).await.expect("a large write");
            rig.store.plan(held_up, Fault::Stall);
            let mut write = Box::pin(old.write(0, Buf::copied(&vec![2; 256 << 10]), false));
            if env.timeout(Duration::from_millis(2), &mut write).await.is_some() {
                continue;
            }
            // The take-over stops at every one of its calls in turn; there the row arrives.
            rig.store.plan(taken_over, Fault::Stall);
            let mut opening = Box::pin(rig.open());
            let opened = env.timeout(Duration::from_millis(30), &mut opening).await;
            rig.store.clear_plans();
            rig.store.release();
            let answer = env.timeout(Duration::from_millis(50), &mut write).await;
            let new = match opened {
                Some(new) => new,
                None => env.timeout(Duration::from_secs(10), opening).await.expect("the volume opens"),
            };
            let pieces = new.read(0, 4096).await.expect("a read");
            let has_new = matches!(&pieces[0], Piece::Data(data) if data[0] == 2);
            assert!(has_new || !matches!(answer, Some(Ok(()))), "{held_up}, {taken_over}: acknowledged and lost");
            overtaken += u32::from(!has_new);
        }
        assert!(overtaken > 10, "only {overtaken} writes were overtaken");
    });
}

#[test]
fn a_large_write_that_crosses_the_end_of_a_row_segment_goes_on_in_the_next_one() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let env = OsRuntime::current();
        let rig = Rig::new(&env, 1, Scheme::rs(4, 2).unwrap(), false, AckPolicy::Replicated);
        let volume = rig.open().await;
        let large = |stamp: u8| Buf::copied(&vec![stamp; 512 << 10]);
        let has_rows = async {
            while volume.status().counters.row_bytes == 0 {
                volume.write(0, large(1), false).await.expect("a write");
            }
        };
        assert!(env.timeout(Duration::from_secs(10), has_rows).await.is_some(), "rows are opened");
        let before = volume.status().counters;
        // Two rows each into segments of three.
        for stamp in 2..12 {
            volume.write(u64::from(stamp) << 19, large(stamp), false).await.expect("a write");
        }
        let after = volume.status().counters;
        assert_eq!(after.row_bytes - before.row_bytes, 10 << 19);
        let journal = after.journal_bytes - before.journal_bytes;
        assert!(journal < 64 << 10, "{journal} bytes of large writes went through the journal");
        for stamp in 2..12 {
            let pieces = volume.read(u64::from(stamp) << 19, 512 << 10).await.expect("a read");
            let right = |piece: &Piece| matches!(piece, Piece::Data(data) if data.iter().all(|&byte| byte == stamp));
            assert!(pieces.iter().all(right), "write {stamp}");
        }
    });
}

#[test]
fn memory_of_changes_is_bounded_while_no_checkpoint_can_be_registered() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let env = OsRuntime::current();
        let rig = Rig::new(&env, 1, Scheme::rs(4, 2).unwrap(), false, AckPolicy::Replicated);
        let most = 4 << 10;
        let volume = rig.open_tuned(Tuning { delta_bytes_max: most, ..Rig::tuning() }).await;
        rig.registers.set_down(true);
        // Every other block, so that no two changes are one.
        let mut writing = Box::pin(async {
            for block in (0..SIZE / BLOCK_BYTES).step_by(2) {
                volume.write(block * BLOCK_BYTES, Buf::copied(&[1; BLOCK_BYTES as usize]), false).await?;
            }
            Ok::<(), lsm_block::VolumeError>(())
        });
        let told = async {
            while !matches!(volume.status().health, Health::Waiting { reason, .. } if reason.contains("checkpoint")) {
                env.sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::select! {
            biased;
            ended = &mut writing => panic!("the writes do not wait: {ended:?}, {:?}", volume.status()),
            waits = env.timeout(Duration::from_secs(15), told) => assert!(waits.is_some(), "{:?}", volume.status()),
        }
        assert!(volume.status().delta_bytes < most * 8, "{:?}", volume.status());
        rig.registers.set_down(false);
        let ended = env.timeout(Duration::from_secs(15), writing).await;
        assert!(matches!(ended, Some(Ok(()))), "{ended:?}, {:?}", volume.status());
    });
}

/// Found by processes on one machine: a host was wiped and came back, all seemed whole, and two later losses were one too many
/// for the rows that were open when the first one happened.
#[test]
fn a_wiped_device_is_made_good_in_what_is_open_though_no_guest_asks_for_anything() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let env = OsRuntime::current();
        let rig = Rig::new(&env, 1, Scheme::rs(4, 2).unwrap(), false, AckPolicy::Replicated);
        let volume = rig.open_tuned(Tuning { idle_seal_after: Duration::from_secs(3600), ..Rig::tuning() }).await;
        let large = Buf::copied(&vec![7; 512 << 10]);
        let has_rows = async {
            while volume.status().counters.row_bytes == 0 {
                volume.write(0, large.clone(), false).await.expect("a write");
            }
        };
        assert!(env.timeout(Duration::from_secs(10), has_rows).await.is_some(), "rows are opened");
        volume.write(1 << 20, Buf::copied(&[8; BLOCK_BYTES as usize]), false).await.expect("a write");
        volume.flush().await.expect("a flush");

        let devices = rig.store.devices();
        for &lost in &devices[..2] {
            rig.store.lose(lost);
            rig.store.start(lost);
        }
        let whole = async {
            loop {
                let status = volume.status();
                let is_full = status.members.len() == status.members_wanted
                    && !status.members.iter().any(|member| {
                        // A device that was wiped is a member only of a set that was made since.
                        devices[..2].contains(&member.device) && status.counters.set_changes == 0
                    });
                if is_full && status.counters.seals > 0 && status.segments_with_holes == 0 {
                    return;
                }
                env.sleep(Duration::from_millis(20)).await;
            }
        };
        assert!(env.timeout(Duration::from_secs(20), whole).await.is_some(), "{:?}", volume.status());
        // Two more, as the scheme allows.
        devices[2..4].iter().for_each(|&device| rig.store.stop(device));
        for (offset, length, byte) in [(0, 512 << 10, 7), (1 << 20, BLOCK_BYTES, 8)] {
            let read = env.timeout(Duration::from_secs(20), volume.read(offset, length)).await;
            let pieces = read.expect("in time").expect("a read");
            let right = |piece: &Piece| matches!(piece, Piece::Data(data) if data.iter().all(|&found| found == byte));
            assert!(pieces.iter().all(right), "at {offset}");
        }
    });
}

/// Found by a simulated cluster: after one failed attempt a set with fewer members was never made larger again.
#[test]
fn a_set_with_fewer_members_grows_though_an_attempt_fails() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let env = OsRuntime::current();
        let rig = Rig::new(&env, 1, Scheme::rs(4, 2).unwrap(), false, AckPolicy::Replicated);
        let devices = rig.store.devices();
        devices[..4].iter().for_each(|&device| rig.store.stop(device));
        let volume = rig.open().await;
        assert_eq!(volume.status().members.len(), 2, "as many as are up");
        rig.store.plan(0, Fault::Refuse);
        // The one change that is reported.
        rig.store.start(devices[0]);
        let grown = async {
            while volume.status().members.len() < volume.status().members_wanted {
                env.sleep(Duration::from_millis(20)).await;
            }
        };
        assert!(env.timeout(Duration::from_secs(20), grown).await.is_some(), "{:?}", volume.status());
        assert_eq!(rig.store.planned_faults(), 0, "the first attempt failed");
    });
}

fn seeds(from: u64, scheme: Scheme, delays: bool, ack: AckPolicy) {
    let count = std::env::var("XSAN_TEST_SEEDS").ok().and_then(|count| count.parse().ok()).unwrap_or(6);
    let steps = if delays { 60 } else { 120 };
    for seed in from..from + count {
        run_seed(seed, steps, scheme, delays, ack);
    }
}

#[test]
fn an_erasure_coded_volume_equals_its_surviving_writes() {
    seeds(1, Scheme::rs(4, 2).unwrap(), false, AckPolicy::Replicated);
}

#[test]
fn a_replicated_volume_equals_its_surviving_writes() {
    seeds(1000, Scheme::replica(3).unwrap(), false, AckPolicy::Replicated);
}

#[test]
fn answers_that_overtake_each_other_change_nothing() {
    seeds(2000, Scheme::rs(4, 2).unwrap(), true, AckPolicy::Replicated);
}

#[test]
fn persisted_writes_survive_power_loss() {
    seeds(3000, Scheme::rs(4, 2).unwrap(), false, AckPolicy::Persisted);
}
