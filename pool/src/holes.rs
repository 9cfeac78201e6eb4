//! Missing positions of a sealed segment, rebuilt from any k shards whose hashes were checked first (R6).
//!
//! Shards stream through in steps; only the rebuilt ones are held as a whole. Nothing of them is written before the hash
//! of every source has been found right.

use crate::encode::Encoded;
use crate::pool::Shared;
use crate::put::put;
use crate::read::{Reading, ShardRead};
use crate::task::Pacer;
use futures::future::join_all;
use lsm_block::store::{Holes, StoreError};
use std::collections::BTreeSet;
use std::sync::Arc;
use xsan_env::{Buf, BufMut};
use xsan_erasure::Stripe;
use xsan_types::{SegmentName, ShardId, ShardIndex};
use xsan_wire::node::NodeError;

/// Bytes of each shard read at once.
const STEP_BYTES: u64 = 256 << 10;

/// Rebuilds what it can of `holes`; see `SegmentStore::fill_holes`.
pub(crate) async fn fill(
    shared: Arc<Shared>,
    segment: SegmentName,
    segment_bytes: u64,
    holes: Holes,
) -> Result<Holes, StoreError> {
    let stripe = shared.stripe(segment_bytes)?;
    let wanted: BTreeSet<usize> = holes.0.iter().map(|index| usize::from(index.0)).collect();
    if wanted.iter().any(|&index| index >= stripe.scheme().width()) {
        return Err(StoreError::Internal);
    }
    let view = shared.view();
    let (possible, mut missing): (Vec<usize>, Vec<usize>) =
        wanted.iter().partition(|&&index| view.up_position(segment.pg, index).is_some());
    if !possible.is_empty() {
        let held = possible.len() as u64 * stripe.shard_bytes() + stripe.k() as u64 * STEP_BYTES;
        let _memory = shared.encode_memory(held).await;
        let reading = Reading { shared: Arc::clone(&shared), view, segment, offset: 0 };
        let shards = rebuild(&reading, &stripe, &wanted, &possible).await?;
        let puts = possible.into_iter().zip(shards).map(|(index, shard)| {
            let shared = Arc::clone(&shared);
            async move { (index, put(shared, segment, index, shard).await) }
        });
        for (index, result) in join_all(puts).await {
            match result {
                Ok(()) => shared.stats.holes_filled.inc(),
                Err(_) => missing.push(index),
            }
        }
    }
    missing.sort_unstable();
    Ok(Holes(missing.into_iter().map(|index| ShardIndex(index as u8)).collect()))
}

/// A shard that may serve.
struct Source {
    index: usize,
    hash: [u8; 32],
}

/// Why a set of sources did not serve.
enum Failure {
    /// The source at this place of the list is away or its hash is wrong.
    Source(usize),
    Store(StoreError),
}

/// The shards `wanted`, all of them whole; nothing of `except` serves as a source.
async fn rebuild(
    reading: &Reading,
    stripe: &Stripe,
    except: &BTreeSet<usize>,
    wanted: &[usize],
) -> Result<Vec<Encoded>, StoreError> {
    let k = stripe.k();
    let (mut sources, mut away) = find_sources(reading, stripe, except).await;
    loop {
        let Some(chosen) = sources.get(..k) else {
            let found = sources.len();
            if away > 0 {
                return Err(StoreError::TooFew { found, needed: k });
            }
            tracing::error!(segment = %reading.segment, found, needed = k, "too few good shards to rebuild from");
            return Err(StoreError::Corrupt { segment: reading.segment, offset: 0 });
        };
        match rebuild_from(reading, stripe, chosen, wanted, &mut away).await {
            Ok(shards) => return Ok(shards),
            Err(Failure::Source(at)) => drop(sources.remove(at)),
            Err(Failure::Store(error)) => return Err(error),
        }
    }
}

/// The positions that hold a finished shard of the right length; and how many could not be asked.
async fn find_sources(reading: &Reading, stripe: &Stripe, except: &BTreeSet<usize>) -> (Vec<Source>, usize) {
    let candidates = (0..stripe.scheme().width()).filter(|index| !except.contains(index));
    let infos = candidates.map(|index| async move {
        let Some((link, before)) = reading.view.readable(reading.segment.pg, index) else {
            return (index, Err(NodeError::Unavailable));
        };
        let shard = ShardId { segment: reading.segment, index: ShardIndex(index as u8) };
        match (link.node.shard_info(link.device, shard).await, before) {
            (Err(NodeError::NotFound | NodeError::StaleEpoch { .. }), Some(before)) => {
                (index, before.node.shard_info(before.device, shard).await)
            }
            (info, _) => (index, info),
        }
    });
    let (mut sources, mut away) = (Vec::new(), 0);
    for (index, info) in join_all(infos).await {
        match info {
            Ok(info) if !info.open && info.bytes == stripe.shard_bytes() => {
                sources.push(Source { index, hash: info.hash });
            }
            Ok(info) => {
                let (bytes, expected) = (info.bytes, stripe.shard_bytes());
                tracing::warn!(segment = %reading.segment, index, bytes, expected, open = info.open, "not a source");
            }
            Err(_) => away += 1,
        }
    }
    (sources, away)
}

/// A rebuilt shard, growing.
struct Output {
    index: usize,
    hasher: blake3::Hasher,
    data: Vec<Buf>,
}

/// The shards `wanted` from exactly these sources.
async fn rebuild_from(
    reading: &Reading,
    stripe: &Stripe,
    sources: &[Source],
    wanted: &[usize],
    away: &mut usize,
) -> Result<Vec<Encoded>, Failure> {
    let mut pacer = Pacer::default();
    let mut hashers: Vec<blake3::Hasher> = sources.iter().map(|_| blake3::Hasher::new()).collect();
    let output = |&index: &usize| Output { index, hasher: blake3::Hasher::new(), data: Vec::new() };
    let mut outputs: Vec<Output> = wanted.iter().map(output).collect();
    let mut offset = 0;
    while offset < stripe.shard_bytes() {
        let bytes = STEP_BYTES.min(stripe.shard_bytes() - offset) as usize;
        let columns = read_step(reading, sources, offset, bytes, away).await?;
        for (hasher, column) in hashers.iter_mut().zip(&columns) {
            hasher.update(column);
            pacer.spend(bytes).await;
        }
        compute_step(reading, sources, &columns, &mut outputs).map_err(Failure::Store)?;
        pacer.spend(bytes * sources.len()).await;
        for output in &mut outputs {
            if let Some(piece) = output.data.last() {
                output.hasher.update(piece);
            }
            pacer.spend(bytes).await;
        }
        offset += bytes as u64;
    }
    for (at, (source, hasher)) in sources.iter().zip(hashers).enumerate() {
        if hasher.finalize() != source.hash {
            reading.shared.stats.bad_sources.inc();
            tracing::warn!(segment = %reading.segment, index = source.index, "a shard's hash is wrong: not used as a source");
            return Err(Failure::Source(at));
        }
    }
    Ok(outputs.into_iter().map(|output| Encoded { hash: output.hasher.finalize().into(), data: output.data }).collect())
}

/// The same range of every source.
async fn read_step(
    reading: &Reading,
    sources: &[Source],
    offset: u64,
    bytes: usize,
    away: &mut usize,
) -> Result<Vec<Buf>, Failure> {
    let reads = sources.iter().map(|source| async move {
        match ShardRead::start(reading, source.index, offset, bytes) {
            Some(mut read) => read.wait(&reading.shared).await,
            None => Err(NodeError::Unavailable),
        }
    });
    let mut columns = Vec::with_capacity(sources.len());
    for (at, answer) in join_all(reads).await.into_iter().enumerate() {
        match answer {
            Ok(column) => columns.push(column),
            Err(error) => {
                *away += usize::from(error != NodeError::Corrupt);
                return Err(Failure::Source(at));
            }
        }
    }
    Ok(columns)
}

/// One more piece of every output.
fn compute_step(
    reading: &Reading,
    sources: &[Source],
    columns: &[Buf],
    outputs: &mut [Output],
) -> Result<(), StoreError> {
    if let [only] = columns {
        // One source means copies: its bytes are theirs.
        outputs.iter_mut().for_each(|output| output.data.push(only.clone()));
        return Ok(());
    }
    let bytes = columns.first().map_or(0, |column| column.len());
    let present: Vec<(ShardIndex, &[u8])> =
        sources.iter().zip(columns).map(|(source, column)| (ShardIndex(source.index as u8), &**column)).collect();
    let mut pieces: Vec<BufMut> = outputs.iter().map(|_| reading.shared.bufs.get(bytes)).collect();
    let mut wanted: Vec<(ShardIndex, &mut [u8])> =
        outputs.iter().zip(&mut pieces).map(|(output, piece)| (ShardIndex(output.index as u8), &mut **piece)).collect();
    reading.shared.codec.reconstruct(&present, &mut wanted).map_err(|_| StoreError::Internal)?;
    outputs.iter_mut().zip(pieces).for_each(|(output, piece)| output.data.push(piece.freeze()));
    Ok(())
}
