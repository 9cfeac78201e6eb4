//! Shards and open shards on one device (P6, P7, P9).

use crate::counters::count;
use crate::device::{Device, Running};
use crate::finish::{Finish, spawned};
use crate::format::{LogRecord, SHARD_HEADER_BYTES, ShardEntry};
use crate::places::Put;
use crate::state::{Growing, OpenShard, map_range};
use std::sync::Arc;
use xsan_env::Buf;
use xsan_types::{Epoch, Incarnation, SEGMENT_BYTES_MAX, SegmentName, ShardId, VolumeId};
use xsan_wire::node::{HoldShard, NodeError, NodeResult, PutShard, ShardInfo};

/// Open shards grow by at least this.
const GROWTH_BYTES: u64 = 1 << 20;
/// Bytes hashed at once by a verification.
const VERIFY_BYTES: u64 = 1 << 20;
const HEADER: u64 = SHARD_HEADER_BYTES as u64;

type Calls<T> = Result<T, NodeError>;

impl Device {
    pub(crate) fn put_shard(self: &Arc<Self>, request: PutShard) -> NodeResult<()> {
        count(&self.counters.shard_puts, 1);
        let device = Arc::clone(self);
        let running = Running::new(self);
        spawned(&self.env, async move {
            let _running = running;
            device.check_writable()?;
            let bytes: u64 = request.data.iter().map(|piece| piece.len() as u64).sum();
            if bytes == 0 || !bytes.is_multiple_of(4096) || bytes > SEGMENT_BYTES_MAX {
                return Err(NodeError::Invalid);
            }
            let _put = device.admit_put(request.shard, request.epoch)?;
            if let Some(known) = device.locate(request.shard).await?
                && known.hash == request.hash
                && known.bytes == bytes
                && device.is_whole(&known).await?
            {
                // The call that put it may still be waiting for its flush.
                device.flush().await?;
                let _tenancy = device.tenancy.lock().await;
                if device.locate(request.shard).await?.is_some_and(|now| now.allocation == known.allocation) {
                    return Ok(());
                }
                // Freed since, as somebody else's (P11): written anew.
            }
            let entry = {
                let mut inner = device.lock();
                inner.allocation += 1;
                let allocation = inner.allocation;
                let extents = inner.space.take(HEADER + bytes).ok_or(NodeError::NoSpace)?;
                ShardEntry { bytes, hash: request.hash, extents, allocation }
            };
            let mut pieces = Vec::with_capacity(request.data.len() + 1);
            pieces.push(device.buffers.copy_of(&entry.header(device.id, request.shard)));
            pieces.extend(request.data);
            let ranges = map_range(&entry.extents, 0, HEADER + bytes).ok_or(NodeError::Invalid)?;
            // (A device that fails gives nothing away any more.)
            device.start_write(&ranges, pieces).await?;
            let extents = entry.extents.clone();
            let entered = device.enter_shard(request.shard, entry).await;
            if entered == Err(NodeError::Closed) {
                device.give_back(&extents);
            }
            entered
        })
    }

    /// Log record, flush, index and location of a shard whose bytes are written, in this order: the index survives power
    /// loss by its own rules, and must never show a shard whose record (and bytes) may be lost. What it replaces is free.
    async fn enter_shard(self: &Arc<Self>, shard: ShardId, entry: ShardEntry) -> Calls<()> {
        let (committed, replaced) = {
            let _tenancy = self.tenancy.lock().await;
            let volume = shard.segment.volume;
            let deleted = self.lock().closed_below.get(&volume).is_some_and(|below| below.0 == u64::MAX);
            if deleted {
                return Err(NodeError::Closed);
            }
            let committed = self.commit(vec![LogRecord::ShardPut { shard, entry: entry.clone() }]).await?;
            let replaced = self.withdraw_puts(&committed, |put| *put == shard);
            (committed, replaced)
        };
        self.flush().await?;
        self.give_back(&replaced);
        let _tenancy = self.tenancy.lock().await;
        if !self.is_unindexed(&committed) {
            // Freed or replaced meanwhile, and its space given back.
            return Ok(());
        }
        let index = Arc::clone(&self.index);
        let stored = entry.clone();
        let old = self
            .index_call(move || {
                let old = index.get(shard)?;
                index.put(shard, &stored)?;
                Ok(old)
            })
            .await?;
        {
            let mut inner = self.lock();
            Self::forget(&mut inner, &[shard]);
            Self::remember(&mut inner, shard, Arc::new(entry));
            inner.shards += u64::from(old.is_none());
        }
        self.indexed(&committed);
        if let Some(old) = old {
            self.give_back(&old.extents);
        }
        Ok(())
    }

    pub(crate) fn read_shard(self: &Arc<Self>, shard: ShardId, offset: u64, length: u32) -> NodeResult<Buf> {
        count(&self.counters.shard_reads, 1);
        let device = Arc::clone(self);
        Box::pin(async move {
            device.check_alive()?;
            let open = {
                let inner = device.lock();
                inner.state.open_shards.get(&shard).map(|open| open.space.extents.clone())
            };
            let ranges = match open {
                Some(extents) => {
                    if !offset.is_multiple_of(4096) || !length.is_multiple_of(4096) {
                        return Err(NodeError::Invalid);
                    }
                    map_range(&extents, HEADER + offset, length.into()).ok_or(NodeError::NotFound)?
                }
                None => {
                    let entry = device.locate(shard).await?.ok_or_else(|| device.absent(shard))?;
                    Self::shard_ranges(&entry, offset, length.into())?
                }
            };
            device.read_ranges(&ranges).await
        })
    }

    pub(crate) fn repair_shard(self: &Arc<Self>, shard: ShardId, offset: u64, data: Buf) -> NodeResult<()> {
        let device = Arc::clone(self);
        let running = Running::new(self);
        spawned(&self.env, async move {
            let _running = running;
            device.check_writable()?;
            count(&device.counters.corrupt_found, 1);
            {
                // Until the write is done the place must stay this shard's.
                let _tenancy = device.tenancy.lock().await;
                let entry = device.locate(shard).await?.ok_or(NodeError::NotFound)?;
                let ranges = Self::shard_ranges(&entry, offset, data.len() as u64)?;
                device.start_write(&ranges, vec![data]).await?;
            }
            device.flush().await
        })
    }

    pub(crate) async fn shard_info(self: &Arc<Self>, shard: ShardId) -> Calls<ShardInfo> {
        self.check_alive()?;
        {
            let inner = self.lock();
            if let Some(open) = inner.state.open_shards.get(&shard) {
                let known = open.space.contiguous.max(HEADER) - HEADER;
                let bytes = if open.incarnation == self.incarnation { known } else { open.space.reserved() - HEADER };
                return Ok(ShardInfo { shard, bytes, hash: [0; 32], open: true });
            }
        }
        let entry = self.locate(shard).await?.ok_or_else(|| self.absent(shard))?;
        Ok(ShardInfo { shard, bytes: entry.bytes, hash: entry.hash, open: false })
    }

    pub(crate) fn verify_shard(self: &Arc<Self>, shard: ShardId) -> NodeResult<()> {
        let device = Arc::clone(self);
        Box::pin(async move {
            let entry = device.locate(shard).await?.ok_or(NodeError::NotFound)?;
            if device.is_whole(&entry).await? {
                return Ok(());
            }
            count(&device.counters.corrupt_found, 1);
            Err(NodeError::Corrupt)
        })
    }

    /// Whether a shard's bytes can be read and have its hash.
    async fn is_whole(&self, entry: &ShardEntry) -> Calls<bool> {
        let mut hasher = blake3::Hasher::new();
        let mut offset = 0;
        while offset < entry.bytes {
            let bytes = (entry.bytes - offset).min(VERIFY_BYTES);
            let ranges = Self::shard_ranges(entry, offset, bytes)?;
            match self.read_ranges(&ranges).await {
                Ok(read) => hasher.update(&read),
                Err(NodeError::Corrupt) => return Ok(false),
                Err(error) => return Err(error),
            };
            offset += bytes;
            xsan_env::yield_now().await;
        }
        Ok(*hasher.finalize().as_bytes() == entry.hash)
    }

    pub(crate) fn delete_segments(self: &Arc<Self>, mut segments: Vec<SegmentName>) -> NodeResult<()> {
        let device = Arc::clone(self);
        let running = Running::new(self);
        spawned(&self.env, async move {
            let _running = running;
            device.check_writable()?;
            let _tenancy = device.tenancy.lock().await;
            {
                // Segments whose rows are still being written are left alone: the owner asks again, or its next
                // generation does.
                let mut inner = device.lock();
                let busy = |name: &SegmentName| {
                    inner.state.open_shards.iter().any(|(shard, open)| shard.segment == *name && open.in_flight > 0)
                };
                segments.retain(|name| !busy(name));
                for (shard, open) in &mut inner.state.open_shards {
                    open.finishing |= segments.contains(&shard.segment);
                }
            }
            let index = Arc::clone(&device.index);
            let asked = segments.clone();
            let found = device
                .index_call(move || {
                    let mut found = Vec::new();
                    for segment in asked {
                        found.extend(index.of_segment(segment)?);
                    }
                    Ok(found)
                })
                .await?;
            let open = device.lock().state.open_shards.keys().any(|shard| segments.contains(&shard.segment));
            if found.is_empty() && !open && !device.has_unindexed_puts(|put| segments.contains(&put.segment)) {
                return Ok(());
            }
            let committed = device.commit(vec![LogRecord::SegmentsFreed { segments: segments.clone() }]).await?;
            device.give_back(&device.withdraw_puts(&committed, |put| segments.contains(&put.segment)));
            device.drop_entries(found).await?;
            device.indexed(&committed);
            device.give_back(&committed.freed);
            Ok(())
        })
    }

    /// Takes entries out of the index and frees their space; the caller holds the tenancy and found them under it. The log
    /// record stands before the space can be given to somebody else: log frames are written in order, and a later flush
    /// covers the earlier ones.
    async fn drop_entries(self: &Arc<Self>, found: Vec<(ShardId, ShardEntry)>) -> Calls<()> {
        let shards: Vec<ShardId> = found.iter().map(|(shard, _)| *shard).collect();
        let index = Arc::clone(&self.index);
        let removed = shards.clone();
        self.index_call(move || index.remove(&removed)).await?;
        let mut inner = self.lock();
        Self::forget(&mut inner, &shards);
        inner.shards = inner.shards.saturating_sub(found.len() as u64);
        for (_, entry) in &found {
            inner.space.put_back(&entry.extents);
        }
        Ok(())
    }

    /// Whether the shard is here; see `NodeApi::hold_shard`.
    pub(crate) fn hold_shard(self: &Arc<Self>, request: HoldShard) -> NodeResult<()> {
        let device = Arc::clone(self);
        let running = Running::new(self);
        spawned(&self.env, async move {
            let _running = running;
            device.check_writable()?;
            drop(device.admit_put(request.shard, request.epoch)?);
            // What is being freed now is gone when this is answered.
            let _tenancy = device.tenancy.lock().await;
            let known = device.locate(request.shard).await?.ok_or(NodeError::NotFound)?;
            if known.hash != request.hash {
                return Err(NodeError::NotFound);
            }
            if device.has_unindexed_puts(|put| *put == request.shard) {
                // The call that put it is still waiting for its flush: the asker may free the only copy that survives power loss.
                device.flush().await?;
            }
            Ok(())
        })
    }

    /// Frees sealed shards of positions that are other devices' under the map of `epoch`, unless a put under a newer map has
    /// come since: the position may be this device's again (P11).
    pub(crate) fn free_misplaced(self: &Arc<Self>, shards: Vec<ShardId>, epoch: Epoch) -> NodeResult<()> {
        let device = Arc::clone(self);
        let running = Running::new(self);
        spawned(&self.env, async move {
            let _running = running;
            device.check_writable()?;
            // Puts look again for what they found under the same lock.
            let _tenancy = device.tenancy.lock().await;
            device.lock().places.check_newest(epoch)?;
            let index = Arc::clone(&device.index);
            let asked = shards.clone();
            let found = device
                .index_call(move || {
                    let mut found = Vec::new();
                    for shard in asked {
                        found.extend(index.get(shard)?.map(|entry| (shard, entry)));
                    }
                    Ok(found)
                })
                .await?;
            if found.is_empty() && !device.has_unindexed_puts(|put| shards.contains(put)) {
                return Ok(());
            }
            let withdrawn = shards.clone();
            let committed = device.commit(vec![LogRecord::ShardsFreed { shards }]).await?;
            device.give_back(&device.withdraw_puts(&committed, |put| withdrawn.contains(put)));
            device.drop_entries(found).await?;
            device.indexed(&committed);
            Ok(())
        })
    }

    pub(crate) async fn free_volume(self: &Arc<Self>, volume: VolumeId) -> Calls<()> {
        // One-way: nothing of the volume is taken any more.
        {
            let mut inner = self.lock();
            inner.closed_below.insert(volume, xsan_types::Generation(u64::MAX));
            for ((of, _), member) in &mut inner.state.members {
                member.closed |= *of == volume;
            }
        }
        loop {
            let progress = self.progress.notified();
            let mut progress = std::pin::pin!(progress);
            progress.as_mut().enable();
            let busy = {
                let inner = self.lock();
                let mut members = inner.state.members.iter();
                let mut shards = inner.state.open_shards.iter();
                members.any(|((of, _), member)| *of == volume && member.in_flight > 0)
                    || shards.any(|(shard, open)| shard.segment.volume == volume && open.in_flight > 0)
            };
            if !busy {
                break;
            }
            progress.await;
        }
        let _tenancy = self.tenancy.lock().await;
        let index = Arc::clone(&self.index);
        let mut page = self.index_call(move || index.volume_page(volume, None, 1024)).await?;
        let holds = {
            let inner = self.lock();
            inner.state.members.keys().any(|(of, _)| *of == volume)
                || inner.state.open_shards.keys().any(|shard| shard.segment.volume == volume)
        };
        if page.is_empty() && !holds && !self.has_unindexed_puts(|put| put.segment.volume == volume) {
            return Ok(());
        }
        let committed = self.commit(vec![LogRecord::VolumeFreed { volume }]).await?;
        self.flush().await?;
        self.give_back(&self.withdraw_puts(&committed, |put| put.segment.volume == volume));
        self.give_back(&committed.freed);
        while !page.is_empty() {
            self.drop_entries(page).await?;
            let index = Arc::clone(&self.index);
            page = self.index_call(move || index.volume_page(volume, None, 1024)).await?;
        }
        self.indexed(&committed);
        Ok(())
    }

    pub(crate) async fn list_shards(
        self: Arc<Self>,
        volume: VolumeId,
        after: Option<ShardId>,
        limit: u32,
    ) -> Calls<Vec<ShardInfo>> {
        self.check_alive()?;
        let index = Arc::clone(&self.index);
        let found = self.index_call(move || index.volume_page(volume, after, limit as usize)).await?;
        let info = |(shard, entry): (ShardId, ShardEntry)| ShardInfo {
            shard,
            bytes: entry.bytes,
            hash: entry.hash,
            open: false,
        };
        Ok(found.into_iter().map(info).collect())
    }

    pub(crate) fn append_shard(
        self: &Arc<Self>,
        incarnation: Incarnation,
        shard: ShardId,
        offset: u64,
        data: Vec<Buf>,
    ) -> NodeResult<u64> {
        count(&self.counters.shard_appends, 1);
        match self.start_shard_append(incarnation, shard, offset, data) {
            Ok(append) => append,
            Err(error) => Box::pin(async move { Err(error) }),
        }
    }

    fn start_shard_append(
        self: &Arc<Self>,
        incarnation: Incarnation,
        shard: ShardId,
        offset: u64,
        data: Vec<Buf>,
    ) -> Calls<NodeResult<u64>> {
        self.check_writable()?;
        if incarnation != self.incarnation {
            return Err(NodeError::NotLive { current: self.incarnation });
        }
        let bytes: u64 = data.iter().map(|piece| piece.len() as u64).sum();
        let end = offset.checked_add(bytes).filter(|&end| end <= SEGMENT_BYTES_MAX).ok_or(NodeError::Invalid)?;
        if bytes == 0 || !offset.is_multiple_of(4096) || !bytes.is_multiple_of(4096) {
            return Err(NodeError::Invalid);
        }
        let (ranges, has_grown) = {
            let mut inner = self.lock();
            let below = inner.closed_below.get(&shard.segment.volume);
            if below.is_some_and(|&below| shard.segment.generation < below) {
                return Err(NodeError::Closed);
            }
            let reserved = match inner.state.open_shards.get(&shard) {
                Some(open) if open.incarnation != self.incarnation => {
                    return Err(NodeError::NotLive { current: self.incarnation });
                }
                Some(open) if open.finishing => return Err(NodeError::Invalid),
                Some(open) => open.space.reserved(),
                None => {
                    // Which map the writer knows is not said: rows of a position that moves are begun under the new one.
                    inner.places.check(self.id, shard)?;
                    0
                }
            };
            // Appends come in order of rows and may overlap in time.
            if HEADER + offset > reserved && !(reserved == 0 && offset == 0) {
                return Err(NodeError::Invalid);
            }
            let grown = if HEADER + end > reserved {
                Self::take_journal_space(&mut inner, (HEADER + end - reserved).max(GROWTH_BYTES))?
            } else {
                Vec::new()
            };
            let fresh = OpenShard {
                boot: self.boot,
                incarnation,
                // The header's place counts as written: it will be, when the shard is finished.
                space: Growing::from(HEADER),
                in_flight: 0,
                finishing: false,
            };
            let open = inner.state.open_shards.entry(shard).or_insert(fresh);
            open.space.grow(grown.clone());
            open.in_flight += 1;
            let ranges = map_range(&open.space.extents, HEADER + offset, bytes).ok_or(NodeError::Invalid)?;
            let has_grown = !grown.is_empty();
            if has_grown {
                let boot = self.boot;
                Self::log_next(&mut inner, LogRecord::OpenShardGrew { shard, boot, incarnation, extents: grown });
            }
            (ranges, has_grown)
        };
        let write = self.start_write(&ranges, data);
        let logged = has_grown.then(|| self.commit_unlogged());
        let device = Arc::clone(self);
        let running = Running::new(self);
        Ok(Finish::boxed(&self.env, async move {
            let _running = running;
            let written = write.await;
            let logged = match logged {
                Some(logged) => logged.await,
                None => Ok(()),
            };
            let mut inner = device.lock();
            let outcome = match inner.state.open_shards.get_mut(&shard) {
                None => Err(NodeError::NotFound),
                Some(open) => {
                    open.in_flight -= 1;
                    match (written, logged) {
                        (Ok(()), Ok(())) => {
                            open.space.complete(HEADER + offset, HEADER + end);
                            Ok(open.space.contiguous - HEADER)
                        }
                        (Err(error), _) | (_, Err(error)) => Err(error),
                    }
                }
            };
            drop(inner);
            device.progress.notify_waiters();
            outcome
        }))
    }

    pub(crate) fn finish_shard(
        self: &Arc<Self>,
        incarnation: Incarnation,
        shard: ShardId,
        bytes: u64,
        hash: [u8; 32],
    ) -> NodeResult<()> {
        let device = Arc::clone(self);
        let running = Running::new(self);
        spawned(&self.env, async move {
            let _running = running;
            device.check_writable()?;
            if let Some((space, _put)) = device.begin_finish(incarnation, shard, bytes)? {
                let finished = device.finish_in_place(shard, space, bytes, hash).await;
                if let Some(open) = device.lock().state.open_shards.get_mut(&shard) {
                    // It failed: the shard is still open.
                    open.in_flight -= 1;
                    open.finishing = false;
                }
                device.progress.notify_waiters();
                return finished;
            }
            if incarnation != device.incarnation {
                return Err(NodeError::NotLive { current: device.incarnation });
            }
            // Finished already? The call that did it may still be waiting for its flush.
            match device.locate(shard).await? {
                Some(entry) if entry.hash == hash && entry.bytes == bytes => device.flush().await,
                Some(_) => Err(NodeError::Invalid),
                None => Err(NodeError::NotFound),
            }
        })
    }

    /// Marks an open shard as being finished: nothing is appended to it and nobody frees it meanwhile. `None`: it is not
    /// open.
    fn begin_finish(&self, incarnation: Incarnation, shard: ShardId, bytes: u64) -> Calls<Option<(Growing, Put)>> {
        let mut inner = self.lock();
        let below = inner.closed_below.get(&shard.segment.volume);
        if below.is_some_and(|&below| shard.segment.generation < below) {
            return Err(NodeError::Closed);
        }
        let Some(open) = inner.state.open_shards.get_mut(&shard) else { return Ok(None) };
        if incarnation != self.incarnation || open.incarnation != incarnation {
            return Err(NodeError::NotLive { current: self.incarnation });
        }
        if open.space.contiguous != HEADER + bytes || open.finishing {
            return Err(NodeError::Invalid);
        }
        open.finishing = true;
        open.in_flight += 1;
        let space = open.space.clone();
        Ok(Some((space, inner.places.put())))
    }

    /// Header, log record and index of an open shard that has all its bytes.
    async fn finish_in_place(
        self: &Arc<Self>,
        shard: ShardId,
        space: Growing,
        bytes: u64,
        hash: [u8; 32],
    ) -> Calls<()> {
        let allocation = {
            let mut inner = self.lock();
            inner.allocation += 1;
            inner.allocation
        };
        let entry = ShardEntry { bytes, hash, extents: space.extents, allocation };
        let header = self.buffers.copy_of(&entry.header(self.id, shard));
        let ranges = map_range(&entry.extents, 0, HEADER).ok_or(NodeError::Invalid)?;
        self.start_write(&ranges, vec![header]).await?;
        // The record takes the extents over from the open shard.
        self.enter_shard(shard, entry).await
    }
}
