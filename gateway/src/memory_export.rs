//! Exports in memory: what the protocol costs when the volume costs nothing; the other end of the gateway's tests.
//!
//! Sparse: chunks of 64 KiB come into being when they are written. Operations are complete when the call returns.

use crate::export::{Export, ExportError, ExportInfo, Exports, OpenError, ReadPiece, StatusExtent, Transport};
use std::collections::BTreeMap;
use std::future::ready;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use xsan_env::runtime::BoxFuture;
use xsan_env::{Buf, BufMut, BufPool};

const CHUNK: u64 = 64 << 10;
/// Granularity of holes.
const BLOCK: u64 = 4096;
/// Chunks are spread over so many locks.
const SHARDS: usize = 64;

/// 64 KiB with a bit per 4 KiB block that holds data; the bytes of other blocks are undefined.
struct Chunk {
    bytes: BufMut,
    present: u16,
}

/// Calls counted by a [`MemoryExport`].
#[derive(Debug, Default)]
pub struct Counters {
    /// Flushes.
    pub flushes: AtomicU64,
    /// Changes that asked for FUA.
    pub fua: AtomicU64,
}

/// A volume in memory.
pub struct MemoryExport {
    /// The name it was made with.
    key: String,
    info: Mutex<ExportInfo>,
    pool: BufPool,
    shards: Vec<Mutex<BTreeMap<u64, Chunk>>>,
    /// What was called.
    pub counters: Counters,
}

/// Part of a chunk: its number, first byte and length.
struct Span {
    chunk: u64,
    from: usize,
    bytes: usize,
}

/// Cuts a range at the borders of units.
fn spans(offset: u64, length: u64, unit: u64) -> impl Iterator<Item = Span> {
    let end = offset + length;
    let mut at = offset;
    std::iter::from_fn(move || {
        let left = end.checked_sub(at).filter(|&left| left > 0)?;
        let from = at % unit;
        let bytes = left.min(unit - from);
        let span = Span {
            chunk: at / unit,
            from: usize::try_from(from).unwrap_or(0),
            bytes: usize::try_from(bytes).unwrap_or(0),
        };
        at += bytes;
        Some(span)
    })
}

fn bit(block: u64) -> u16 {
    1 << (block % 16)
}

impl MemoryExport {
    /// An empty volume that looks like a real one: 512-byte granularity, 4 KiB preferred, payloads up to 32 MiB.
    #[must_use]
    pub fn new(name: &str, size: u64, multi_conn: bool, pool: BufPool) -> Self {
        let info = ExportInfo {
            name: name.to_owned(),
            description: String::new(),
            size,
            block_min: 512,
            block_preferred: 4096,
            payload_max: 32 << 20,
            read_only: false,
            multi_conn,
        };
        Self::with_info(info, pool)
    }

    /// An empty volume with the given looks.
    #[must_use]
    pub fn with_info(info: ExportInfo, pool: BufPool) -> Self {
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        Self { key: info.name.clone(), info: Mutex::new(info), pool, shards, counters: Counters::default() }
    }

    /// Changes the size; what lies behind a smaller one is kept but out of reach.
    pub fn resize(&self, size: u64) {
        self.info.lock().unwrap_or_else(PoisonError::into_inner).size = size;
    }

    /// Changes the name; the key stays the name it was made with.
    pub fn rename(&self, name: &str) {
        name.clone_into(&mut self.info.lock().unwrap_or_else(PoisonError::into_inner).name);
    }

    fn shard(&self, chunk: u64) -> MutexGuard<'_, BTreeMap<u64, Chunk>> {
        let index = usize::try_from(chunk).unwrap_or(0) % SHARDS;
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note_fua(&self, fua: bool) {
        self.counters.fua.fetch_add(u64::from(fua), Ordering::Relaxed);
    }

    fn read_now(&self, offset: u64, length: u32) -> Vec<ReadPiece> {
        let mut pieces = Vec::with_capacity(1);
        for span in spans(offset, u64::from(length), CHUNK) {
            self.read_span(&span, &mut pieces);
        }
        pieces
    }

    fn read_span(&self, span: &Span, pieces: &mut Vec<ReadPiece>) {
        let shard = self.shard(span.chunk);
        let Some(chunk) = shard.get(&span.chunk) else {
            pieces.push(ReadPiece::Hole(span.bytes as u64));
            return;
        };
        // Runs of blocks of one kind.
        let mut at = span.from;
        let end = span.from + span.bytes;
        while at < end {
            let is_data = |at: usize| chunk.present & bit(at as u64 / BLOCK) != 0;
            let data = is_data(at);
            let mut to = at;
            while to < end && is_data(to) == data {
                to = end.min((to / BLOCK as usize + 1) * BLOCK as usize);
            }
            pieces.push(match data {
                true => ReadPiece::Data(self.pool.copy_of(&chunk.bytes[at..to])),
                false => ReadPiece::Hole((to - at) as u64),
            });
            at = to;
        }
    }

    fn write_now(&self, offset: u64, data: &[u8]) {
        let mut rest = data;
        for span in spans(offset, data.len() as u64, CHUNK) {
            let (part, tail) = rest.split_at(span.bytes);
            rest = tail;
            let mut shard = self.shard(span.chunk);
            let chunk =
                shard.entry(span.chunk).or_insert_with(|| Chunk { bytes: self.pool.get(CHUNK as usize), present: 0 });
            let touched = spans(span.from as u64, span.bytes as u64, BLOCK);
            for block in touched.filter(|block| chunk.present & bit(block.chunk) == 0) {
                if block.bytes < BLOCK as usize {
                    let start = block.chunk as usize * BLOCK as usize;
                    chunk.bytes[start..start + BLOCK as usize].fill(0);
                }
            }
            for block in spans(span.from as u64, span.bytes as u64, BLOCK) {
                chunk.present |= bit(block.chunk);
            }
            chunk.bytes[span.from..span.from + span.bytes].copy_from_slice(part);
        }
    }

    /// Drops whole blocks; `exact`: cut blocks are overwritten with zeroes, else they are left.
    fn erase(&self, offset: u64, length: u64, exact: bool) {
        let (first, end) = (offset.div_ceil(BLOCK) * BLOCK, (offset + length) / BLOCK * BLOCK);
        if exact {
            let cut = if first > end { (offset, offset + length) } else { (offset, first) };
            self.zero_stored(cut.0, cut.1 - cut.0);
            if first <= end {
                self.zero_stored(end, offset + length - end);
            }
        }
        if first >= end {
            return;
        }
        for shard in &self.shards {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            let numbers: Vec<u64> =
                shard.range(first / CHUNK..end.div_ceil(CHUNK)).map(|(&number, _)| number).collect();
            for number in numbers {
                let (from, to) = (first.max(number * CHUNK), end.min((number + 1) * CHUNK));
                let gone = (from / BLOCK..to / BLOCK).fold(0, |mask, block| mask | bit(block));
                if let Some(chunk) = shard.get_mut(&number) {
                    chunk.present &= !gone;
                    if chunk.present == 0 {
                        shard.remove(&number);
                    }
                }
            }
        }
    }

    /// Zeroes the bytes of a range inside one block if they are stored.
    fn zero_stored(&self, offset: u64, length: u64) {
        for span in spans(offset, length, CHUNK) {
            if let Some(chunk) = self.shard(span.chunk).get_mut(&span.chunk) {
                for block in spans(span.from as u64, span.bytes as u64, BLOCK) {
                    if chunk.present & bit(block.chunk) != 0 {
                        let start = block.chunk as usize * BLOCK as usize + block.from;
                        chunk.bytes[start..start + block.bytes].fill(0);
                    }
                }
            }
        }
    }

    fn status_now(&self, offset: u64, length: u64, extents_max: usize) -> Vec<StatusExtent> {
        let mut extents: Vec<StatusExtent> = Vec::new();
        let mut push = |length: u64, hole: bool| {
            let full = extents.len() == extents_max;
            match extents.last_mut() {
                Some(last) if last.hole == hole => last.length += length,
                _ if full => return false,
                _ => extents.push(StatusExtent { length, hole, zero: hole }),
            }
            true
        };
        let end = offset + length;
        let mut at = offset;
        while at < end {
            let number = at / CHUNK;
            let present = self.shard(number).get(&number).map(|chunk| chunk.present);
            let (to, more) = match present {
                // Nothing here: on to the next chunk that exists, so that a hole of any size costs little.
                None => {
                    let to = self.next_chunk(number).map_or(end, |next| end.min(next * CHUNK));
                    (to, push(to - at, true))
                }
                Some(present) => {
                    let to = end.min((at / BLOCK + 1) * BLOCK);
                    (to, push(to - at, present & bit(at / BLOCK) == 0))
                }
            };
            if !more {
                break;
            }
            at = to;
        }
        extents
    }

    /// Number of the first stored chunk behind `number`.
    fn next_chunk(&self, number: u64) -> Option<u64> {
        let first_of = |shard: &Mutex<BTreeMap<u64, Chunk>>| {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            shard.range(number + 1..).next().map(|(&next, _)| next)
        };
        self.shards.iter().filter_map(first_of).min()
    }
}

impl Export for MemoryExport {
    fn key(&self) -> String {
        self.key.clone()
    }

    fn info(&self) -> ExportInfo {
        self.info.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn read(&self, offset: u64, length: u32) -> BoxFuture<'static, Result<Vec<ReadPiece>, ExportError>> {
        Box::pin(ready(Ok(self.read_now(offset, length))))
    }

    fn write(&self, offset: u64, data: Buf, fua: bool) -> BoxFuture<'static, Result<(), ExportError>> {
        self.note_fua(fua);
        self.write_now(offset, &data);
        Box::pin(ready(Ok(())))
    }

    fn flush(&self) -> BoxFuture<'static, Result<(), ExportError>> {
        self.counters.flushes.fetch_add(1, Ordering::Relaxed);
        Box::pin(ready(Ok(())))
    }

    fn trim(&self, offset: u64, length: u64, fua: bool) -> BoxFuture<'static, Result<(), ExportError>> {
        self.note_fua(fua);
        self.erase(offset, length, false);
        Box::pin(ready(Ok(())))
    }

    fn zero(&self, offset: u64, length: u64, fua: bool, _no_hole: bool) -> BoxFuture<'static, Result<(), ExportError>> {
        self.note_fua(fua);
        self.erase(offset, length, true);
        Box::pin(ready(Ok(())))
    }

    fn status(
        &self,
        offset: u64,
        length: u64,
        extents_max: usize,
    ) -> BoxFuture<'static, Result<Vec<StatusExtent>, ExportError>> {
        Box::pin(ready(Ok(self.status_now(offset, length, extents_max))))
    }
}

/// A fixed set of exports, found by the names they have now.
#[derive(Default)]
pub struct MemoryExports(Vec<Arc<dyn Export>>);

impl MemoryExports {
    /// The given exports.
    #[must_use]
    pub fn new(exports: impl IntoIterator<Item = Arc<dyn Export>>) -> Self {
        Self(exports.into_iter().collect())
    }

    fn named(&self, name: &str) -> Option<Arc<dyn Export>> {
        self.0.iter().find(|export| export.info().name == name).cloned()
    }
}

impl Exports for MemoryExports {
    fn list(&self) -> BoxFuture<'static, Vec<(String, String)>> {
        let infos = self.0.iter().map(|export| export.info());
        let mut names: Vec<_> = infos.map(|info| (info.name, info.description)).collect();
        names.sort();
        Box::pin(ready(names))
    }

    fn info(&self, name: &str, _: Transport) -> BoxFuture<'static, Option<ExportInfo>> {
        Box::pin(ready(self.named(name).map(|export| export.info())))
    }

    fn open(&self, name: &str, _: Transport) -> BoxFuture<'static, Result<Arc<dyn Export>, OpenError>> {
        Box::pin(ready(self.named(name).ok_or(OpenError::NotFound)))
    }
}
