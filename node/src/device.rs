//! One device of a running node: its disk, log, state, free space and shard index, and what every call is made of.

use crate::allocator::Allocator;
use crate::counters::{Counters, count};
use crate::error::NodeOpenError;
use crate::finish::spawned;
use crate::flush::FlushGate;
use crate::format::{Extent, LogRecord, SHARD_HEADER_BYTES, ShardEntry, Superblock, UNIT, Unreadable};
use crate::log::{Log, read_superblock};
use crate::node::DeviceHandle;
use crate::places::Places;
use crate::shard_index::{IndexResult, ShardIndex};
use crate::state::{IndexChange, State, map_range};
use hashbrown::HashMap;
use std::collections::BTreeMap;
use std::hash::BuildHasherDefault;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::{Mutex as AsyncMutex, Notify};
use xsan_env::{Buf, BufPool, Disk, Env};
use xsan_types::{ClusterId, DeviceId, Generation, Incarnation, ShardId, VolumeId};
use xsan_wire::node::{DeviceStatus, NodeError, NodeResult};

/// Shard locations kept in memory.
const LOCATIONS_MAX: usize = 64 << 10;
/// Share of the area that journals may not use, so that seals (which free them) can go on: 1/32, at most this.
const RESERVE_BYTES_MAX: u64 = 1 << 30;

/// A hasher without random state: the simulator needs equal runs. Keys are names of our own making.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct FixedHasher(u64);

impl std::hash::Hasher for FixedHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(byte.into());
        }
    }
    fn write_u8(&mut self, value: u8) {
        self.write_u64(value.into());
    }
    fn write_u32(&mut self, value: u32) {
        self.write_u64(value.into());
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 29;
    }
}

type Locations = HashMap<ShardId, Arc<ShardEntry>, BuildHasherDefault<FixedHasher>>;

/// What changes under one short lock.
pub(crate) struct Inner {
    pub(crate) state: State,
    pub(crate) space: Allocator,
    /// The newest generation each volume was closed for, in memory only: a restart closes all members anyway (H1).
    pub(crate) closed_below: BTreeMap<VolumeId, Generation>,
    /// Whose positions are whose (P11).
    pub(crate) places: Places,
    locations: Locations,
    /// Records whose effect is in `state` already, in the order of that; the next log frame begins with them. Several
    /// growths of one replica run at a time: read back in another order, its bytes would be found in the wrong places.
    unlogged: Vec<LogRecord>,
    /// Changes of the shard index so far: tells a reader that what it read there may be old.
    index_changes: u64,
    /// Records of the log that the shard index does not show yet, by number. A new log half repeats them.
    unindexed: BTreeMap<u64, LogRecord>,
    next_unindexed: u64,
    pub(crate) shards: u64,
    pub(crate) allocation: u64,
}

/// What a log frame did.
#[must_use]
pub(crate) struct Committed {
    /// Space that is free once the frame is stable; for [`Device::give_back`].
    pub(crate) freed: Vec<Extent>,
    /// What the caller has to bring into the shard index; for [`Device::indexed`].
    unindexed: Vec<u64>,
}

pub(crate) struct Device {
    pub(crate) env: Env,
    pub(crate) id: DeviceId,
    pub(crate) incarnation: Incarnation,
    /// As long as it is the same, nothing that was completed is lost from the disk's cache.
    pub(crate) boot: u128,
    pub(crate) sector: u32,
    pub(crate) buffers: BufPool,
    pub(crate) counters: Counters,
    pub(crate) index: Arc<dyn ShardIndex>,
    /// Something completed: appends in flight, lengths.
    pub(crate) progress: Notify,
    /// Held while shards change hands: from the log record to the index and the free map, so that what is freed is what
    /// was taken out, once. Only tasks of the node hold it.
    pub(crate) tenancy: AsyncMutex<()>,
    disk: Arc<dyn Disk>,
    inner: Mutex<Inner>,
    log: AsyncMutex<Log>,
    gate: FlushGate,
    /// Log frames that a flush has covered.
    flushed_frames: AtomicU64,
    failed: AtomicBool,
    /// Calls that touch the disk and are not finished.
    pub(crate) running: AtomicU64,
    /// The process is (as if) dead: nothing is answered any more.
    pub(crate) dead: AtomicBool,
}

impl Device {
    /// Opens a formatted device: superblock, log, index, free space.
    pub(crate) async fn open(
        env: &Env,
        handle: DeviceHandle,
        cluster: ClusterId,
        incarnation: Incarnation,
        buffers: BufPool,
    ) -> Result<Arc<Self>, NodeOpenError> {
        let DeviceHandle { disk, index } = handle;
        let unknown = |source| NodeOpenError::Io { device: DeviceId(0), source };
        let superblock = match read_superblock(&disk, &buffers).await.map_err(unknown)? {
            Ok(superblock) => superblock,
            Err(Unreadable::Absent) => return Err(NodeOpenError::NotFormatted),
            Err(Unreadable::Version(version)) => {
                return Err(NodeOpenError::Version { device: DeviceId(0), version });
            }
            Err(Unreadable::Damaged) => return Err(NodeOpenError::SuperblockDamaged),
        };
        if superblock.cluster != cluster {
            let (device, found) = (superblock.device, superblock.cluster);
            return Err(NodeOpenError::OtherCluster { device, found, expected: cluster });
        }
        let replay = Log::open(Arc::clone(&disk), buffers.clone(), superblock).await?;
        let index: Arc<dyn ShardIndex> = Arc::from(index);
        let mut state = State::default();
        let mut changes = Vec::new();
        for record in &replay.records {
            // Freed space follows from what is left: the free map is made from the end state.
            let (_, change) = state.apply(record);
            changes.extend(change);
        }
        let used_before = superblock.log_epoch > 1 || !replay.records.is_empty();
        if used_before && index.is_new() {
            tracing::warn!(device = %superblock.device, "the shard index is missing: scanning the device for shards");
            let used: Vec<Extent> = state.extents().collect();
            let found = crate::rebuild::scan(&disk, &buffers, &superblock, &used).await.map_err(unknown)?;
            tracing::warn!(device = %superblock.device, shards = found.len(), "shard index rebuilt");
            // The log's changes come after what the headers say.
            changes.splice(0..0, found.into_iter().map(|(shard, entry)| IndexChange::Put(shard, entry)));
        }
        // What was read may be in a volatile cache only, and the index must not get ahead of it.
        disk.flush().await.map_err(unknown)?;
        let (space, shards, allocation) = {
            let index = Arc::clone(&index);
            let used: Vec<Extent> = state.extents().collect();
            env.blocking(move || {
                let built = build_space(&*index, changes, used, &superblock)?;
                index.persist()?;
                index.filled()?;
                Ok::<_, NodeOpenError>(built)
            })
            .await?
        };
        // A new half, a new epoch: frames behind a torn tail can never be read as a continuation, and numbers that carry
        // the epoch never repeat.
        let mut log = replay.log;
        let device = superblock.device;
        log.flip(&state.snapshot()).await.map_err(|source| NodeOpenError::Io { device, source })?;
        let allocation = allocation.max(log.epoch() << 32);
        // Whoever made them is not this process: one-way closed (P3).
        for member in state.members.values_mut() {
            member.closed = true;
        }
        let inner = Inner {
            state,
            space,
            closed_below: BTreeMap::new(),
            places: Places::default(),
            locations: Locations::default(),
            unlogged: Vec::new(),
            index_changes: 0,
            unindexed: BTreeMap::new(),
            next_unindexed: 0,
            shards,
            allocation,
        };
        Ok(Arc::new(Self {
            env: env.clone(),
            id: superblock.device,
            incarnation,
            boot: boot(env.boot_id(), disk.attachment()),
            sector: disk.geometry().sector.max(superblock.sector),
            buffers,
            counters: Counters::default(),
            index,
            progress: Notify::new(),
            tenancy: AsyncMutex::new(()),
            disk,
            inner: Mutex::new(inner),
            log: AsyncMutex::new(log),
            gate: FlushGate::default(),
            flushed_frames: AtomicU64::new(0),
            failed: AtomicBool::new(false),
            running: AtomicU64::new(0),
            dead: AtomicBool::new(false),
        }))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("device lock")
    }

    pub(crate) fn status(&self) -> DeviceStatus {
        let inner = self.lock();
        DeviceStatus {
            device: self.id,
            incarnation: self.incarnation,
            capacity: inner.space.capacity(),
            used: inner.space.capacity() - inner.space.free_bytes(),
            sector: self.sector,
            shards: inner.shards,
            members: inner.state.members.len() as u64,
            failed: self.failed.load(Ordering::Relaxed),
        }
    }

    /// Refuses calls of a dead process and writes to a failed device.
    pub(crate) fn check_writable(&self) -> Result<(), NodeError> {
        self.check_alive()?;
        if self.failed.load(Ordering::Relaxed) { Err(NodeError::DeviceFailed) } else { Ok(()) }
    }

    pub(crate) fn check_alive(&self) -> Result<(), NodeError> {
        if self.dead.load(Ordering::Relaxed) { Err(NodeError::Unavailable) } else { Ok(()) }
    }

    fn fail(&self, what: &'static str, error: &std::io::Error) -> NodeError {
        if !self.failed.swap(true, Ordering::Relaxed) {
            tracing::error!(device = %self.id, %error, "{what} failed: the device takes no more writes");
        }
        NodeError::DeviceFailed
    }

    /// Space for a journal or an open shard; leaves the reserve.
    pub(crate) fn take_journal_space(inner: &mut Inner, bytes: u64) -> Result<Vec<Extent>, NodeError> {
        let reserve = (inner.space.capacity() / 32).min(RESERVE_BYTES_MAX);
        if inner.space.free_bytes() < bytes + reserve {
            return Err(NodeError::NoSpace);
        }
        inner.space.take(bytes).ok_or(NodeError::NoSpace)
    }

    /// Starts writes of `data` (concatenated) over device ranges; the writes run whether or not the future is polled.
    pub(crate) fn start_write(
        self: &Arc<Self>,
        ranges: &[Extent],
        data: Vec<Buf>,
    ) -> impl Future<Output = Result<(), NodeError>> + Send + use<> {
        let total: u64 = ranges.iter().map(|range| range.bytes).sum();
        count(&self.counters.device_writes, ranges.len() as u64);
        count(&self.counters.device_write_bytes, total);
        let mut writes = Vec::with_capacity(ranges.len());
        if let [range] = ranges {
            writes.push(match <[Buf; 1]>::try_from(data) {
                Ok([one]) => self.disk.write(range.offset, one),
                Err(many) => self.disk.write_vectored(range.offset, many),
            });
        } else {
            let mut rest = data.into_iter();
            let mut current: Option<Buf> = None;
            for range in ranges {
                let mut pieces = Vec::new();
                let mut left = range.bytes as usize;
                while left > 0 {
                    let Some(piece) = current.take().or_else(|| rest.next()) else { break };
                    let here = piece.len().min(left);
                    if here < piece.len() {
                        current = Some(piece.slice(here..));
                    }
                    left -= here;
                    pieces.push(piece.slice(..here));
                }
                writes.push(self.disk.write_vectored(range.offset, pieces));
            }
        }
        let device = Arc::clone(self);
        async move {
            let mut failed = None;
            for write in writes {
                if let Err(error) = write.await {
                    failed = Some(error);
                }
            }
            match failed {
                None => Ok(()),
                Some(error) => Err(device.fail("a write", &error)),
            }
        }
    }

    /// Writes records to the log, behind those that wait for it, and makes them part of the state, in one step for
    /// everybody else. Space they free is *not* given back yet: see [`Device::give_back`].
    pub(crate) async fn commit(&self, mut records: Vec<LogRecord>) -> Result<Committed, NodeError> {
        let mut log = self.log.lock().await;
        self.check_writable()?;
        records.splice(0..0, std::mem::take(&mut self.lock().unlogged));
        if records.is_empty() {
            // Another frame took along what this call was for.
            return Ok(Committed { freed: Vec::new(), unindexed: Vec::new() });
        }
        let flushed = self.flushed_frames.load(Ordering::Relaxed);
        count(&self.counters.log_frames, 1);
        count(&self.counters.device_writes, 1);
        let failed = |error: std::io::Error| self.fail("a log write", &error);
        if !log.append(records.clone(), flushed).await.map_err(failed)? {
            self.flip(&mut log).await?;
            if !log.append(records.clone(), 0).await.map_err(failed)? {
                return Err(failed(std::io::ErrorKind::StorageFull.into()));
            }
        }
        let mut inner = self.lock();
        let mut committed = Committed { freed: Vec::new(), unindexed: Vec::new() };
        for record in records {
            let (freed, change) = inner.state.apply(&record);
            committed.freed.extend(freed);
            if change.is_some() {
                let number = inner.next_unindexed;
                inner.next_unindexed += 1;
                inner.unindexed.insert(number, record);
                committed.unindexed.push(number);
            }
        }
        Ok(committed)
    }

    /// Notes a record for the log whose effect is in the state already. The caller commits (nothing more) afterwards.
    pub(crate) fn log_next(inner: &mut Inner, record: LogRecord) {
        inner.unlogged.push(record);
    }

    /// Writes what waits for the log, as a task: growing something must not depend on who polls its append.
    pub(crate) fn commit_unlogged(self: &Arc<Self>) -> NodeResult<()> {
        let device = Arc::clone(self);
        spawned(&self.env, async move { device.commit(Vec::new()).await.map(|_| ()) })
    }

    /// The shard index shows what was committed.
    pub(crate) fn indexed(&self, committed: &Committed) {
        let mut inner = self.lock();
        for number in &committed.unindexed {
            inner.unindexed.remove(number);
        }
    }

    /// Whether the shard index still lacks what was committed: nobody has freed or replaced it meanwhile.
    pub(crate) fn is_unindexed(&self, committed: &Committed) -> bool {
        let inner = self.lock();
        committed.unindexed.iter().all(|number| inner.unindexed.contains_key(number))
    }

    pub(crate) fn has_unindexed_puts(&self, which: impl Fn(&ShardId) -> bool) -> bool {
        let inner = self.lock();
        inner.unindexed.values().any(|record| matches!(record, LogRecord::ShardPut { shard, .. } if which(shard)))
    }

    /// Shards that wait for the index and that `committed` replaces or frees: they never reach it. Answers their space, which is free
    /// once `committed` is stable if it replaces them, and at once if it frees them: then nobody needs their bytes any more.
    pub(crate) fn withdraw_puts(&self, committed: &Committed, which: impl Fn(&ShardId) -> bool) -> Vec<Extent> {
        let mut freed = Vec::new();
        let Some(&before) = committed.unindexed.first() else { return freed };
        self.lock().unindexed.retain(|&number, record| match record {
            LogRecord::ShardPut { shard, entry } if number < before && which(shard) => {
                freed.append(&mut entry.extents);
                false
            }
            _ => true,
        });
        freed
    }

    async fn flip(&self, log: &mut Log) -> Result<(), NodeError> {
        // The shard records of the old half live on in the index alone, those that are on their way into it in the new
        // half. (Taken first: what reaches the index from now on is repeated, which changes nothing.)
        let unindexed: Vec<LogRecord> = self.lock().unindexed.values().cloned().collect();
        let index = Arc::clone(&self.index);
        if let Err(error) = self.env.blocking(move || index.persist()).await {
            return Err(self.fail("the shard index", &std::io::Error::other(error)));
        }
        let mut snapshot = self.lock().state.snapshot();
        snapshot.extend(unindexed);
        log.flip(&snapshot).await.map_err(|error| self.fail("a log flip", &error))?;
        self.flushed_frames.store(log.sequence(), Ordering::Relaxed);
        count(&self.counters.device_flushes, 4);
        Ok(())
    }

    /// Makes everything that completed before this call stable.
    pub(crate) async fn flush(&self) -> Result<(), NodeError> {
        self.check_writable()?;
        let (epoch, frames) = {
            let log = self.log.lock().await;
            (log.epoch(), log.sequence())
        };
        let ok = self
            .gate
            .flush(async || {
                count(&self.counters.device_flushes, 1);
                match self.disk.flush().await {
                    Ok(()) => true,
                    Err(error) => {
                        self.fail("a flush", &error);
                        false
                    }
                }
            })
            .await;
        if !ok {
            return Err(NodeError::DeviceFailed);
        }
        // (After a flip the count starts again: what this flush covered says nothing about the new half.)
        let log = self.log.lock().await;
        if log.epoch() == epoch {
            self.flushed_frames.fetch_max(frames, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Frees space; called when the records that freed it are stable.
    pub(crate) fn give_back(&self, extents: &[Extent]) {
        if !extents.is_empty() {
            self.lock().space.put_back(extents);
        }
    }

    /// Raw bytes over device ranges.
    pub(crate) async fn read_ranges(&self, ranges: &[Extent]) -> Result<Buf, NodeError> {
        self.check_alive()?;
        count(&self.counters.device_reads, ranges.len() as u64);
        let total: u64 = ranges.iter().map(|range| range.bytes).sum();
        count(&self.counters.device_read_bytes, total);
        let failed = |error: std::io::Error| {
            tracing::warn!(device = %self.id, %error, "a read failed");
            NodeError::Corrupt
        };
        if let [range] = ranges {
            let bytes = self.disk.read(range.offset, self.buffers.get(range.bytes as usize)).await.map_err(failed)?;
            return Ok(bytes.freeze());
        }
        let mut whole = self.buffers.get(total as usize);
        let reads: Vec<_> =
            ranges.iter().map(|range| self.disk.read(range.offset, self.buffers.get(range.bytes as usize))).collect();
        let mut at = 0;
        for read in reads {
            let bytes = read.await.map_err(failed)?;
            whole[at..at + bytes.len()].copy_from_slice(&bytes);
            at += bytes.len();
        }
        Ok(whole.freeze())
    }

    /// Where a sealed shard lies.
    pub(crate) async fn locate(&self, shard: ShardId) -> Result<Option<Arc<ShardEntry>>, NodeError> {
        let changes = {
            let inner = self.lock();
            if let Some(entry) = inner.locations.get(&shard) {
                return Ok(Some(Arc::clone(entry)));
            }
            // Committed, and not in the index yet: the newest word counts.
            for record in inner.unindexed.values().rev() {
                match record {
                    LogRecord::ShardPut { shard: put, entry } if *put == shard => {
                        return Ok(Some(Arc::new(entry.clone())));
                    }
                    LogRecord::SegmentsFreed { segments } if segments.contains(&shard.segment) => return Ok(None),
                    LogRecord::VolumeFreed { volume } if *volume == shard.segment.volume => return Ok(None),
                    LogRecord::ShardsFreed { shards } if shards.contains(&shard) => return Ok(None),
                    _ => {}
                }
            }
            inner.index_changes
        };
        let index = Arc::clone(&self.index);
        let entry = self.index_call(move || index.get(shard)).await?;
        Ok(entry.map(|entry| {
            let entry = Arc::new(entry);
            let mut inner = self.lock();
            if inner.index_changes == changes {
                Self::remember(&mut inner, shard, Arc::clone(&entry));
            }
            entry
        }))
    }

    pub(crate) fn remember(inner: &mut Inner, shard: ShardId, entry: Arc<ShardEntry>) {
        if inner.locations.len() >= LOCATIONS_MAX {
            // Rare and cheap to refill.
            inner.locations.clear();
        }
        inner.locations.insert(shard, entry);
    }

    /// The index shows something else for these shards from now on.
    pub(crate) fn forget(inner: &mut Inner, shards: &[ShardId]) {
        inner.index_changes += 1;
        for shard in shards {
            inner.locations.remove(shard);
        }
    }

    /// A call into the index, away from the tasks.
    pub(crate) async fn index_call<T: Send + 'static>(
        &self,
        call: impl FnOnce() -> IndexResult<T> + Send + 'static,
    ) -> Result<T, NodeError> {
        self.env.blocking(call).await.map_err(|error| {
            tracing::error!(device = %self.id, %error, "shard index");
            NodeError::DeviceFailed
        })
    }

    /// Device ranges of a shard's bytes.
    pub(crate) fn shard_ranges(entry: &ShardEntry, offset: u64, bytes: u64) -> Result<Vec<Extent>, NodeError> {
        let end = offset.checked_add(bytes).ok_or(NodeError::Invalid)?;
        if end > entry.bytes.next_multiple_of(4096) || !offset.is_multiple_of(4096) || !bytes.is_multiple_of(4096) {
            return Err(NodeError::Invalid);
        }
        map_range(&entry.extents, SHARD_HEADER_BYTES as u64 + offset, bytes).ok_or(NodeError::Invalid)
    }

    /// Waits until every call that touches the disk is finished.
    pub(crate) async fn quiesce(&self) {
        loop {
            let progress = self.progress.notified();
            let mut progress = std::pin::pin!(progress);
            progress.as_mut().enable();
            if self.running.load(Ordering::Acquire) == 0 {
                return;
            }
            progress.await;
        }
    }
}

/// Counts a call that touches the disk, as long as it lives.
pub(crate) struct Running(Arc<Device>);

impl Running {
    pub(crate) fn new(device: &Arc<Device>) -> Self {
        device.running.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(device))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::AcqRel);
        self.0.progress.notify_waiters();
    }
}

/// Two of a host's boots never share their number's upper half, so neither do two attachments in different boots.
fn boot(of_host: u128, attachment: u64) -> u128 {
    of_host ^ (u128::from(attachment) << 64)
}

/// Brings the index up to the log and finds what is free.
fn build_space(
    index: &dyn ShardIndex,
    changes: Vec<IndexChange>,
    used: Vec<Extent>,
    superblock: &Superblock,
) -> Result<(Allocator, u64, u64), NodeOpenError> {
    for change in changes {
        match change {
            IndexChange::Put(shard, entry) => index.put(shard, &entry)?,
            IndexChange::Segments(segments) => {
                for segment in segments {
                    let shards: Vec<ShardId> = index.of_segment(segment)?.into_iter().map(|(shard, _)| shard).collect();
                    index.remove(&shards)?;
                }
            }
            IndexChange::Shards(shards) => index.remove(&shards)?,
            IndexChange::Volume(volume) => loop {
                let page = index.volume_page(volume, None, 1024)?;
                if page.is_empty() {
                    break;
                }
                let shards: Vec<ShardId> = page.into_iter().map(|(shard, _)| shard).collect();
                index.remove(&shards)?;
            },
        }
    }
    let area = superblock.area_offset();
    let mut space = Allocator::new(Extent { offset: area, bytes: (superblock.bytes - area) / UNIT * UNIT });
    let device = superblock.device;
    for extent in used {
        if !space.claim(extent) {
            return Err(NodeOpenError::LogDamaged { device, offset: extent.offset });
        }
    }
    let (mut after, mut shards, mut allocation) = (None, 0, 0);
    loop {
        let page = index.page(after, 1024)?;
        let Some((last, _)) = page.last() else { return Ok((space, shards, allocation)) };
        after = Some(*last);
        for (_, entry) in &page {
            shards += 1;
            allocation = allocation.max(entry.allocation);
            for extent in &entry.extents {
                if !space.claim(*extent) {
                    return Err(NodeOpenError::Overlap { device, offset: extent.offset });
                }
            }
        }
    }
}
